"""Benchmarks beside other projects; not tests."""
