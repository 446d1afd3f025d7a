"""Benchmarks, some against other projects; not tests."""
