"""Measurements beside other projects; not tests."""
