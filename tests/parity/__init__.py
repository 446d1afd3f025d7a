"""Comparison of our numbers with golden cases computed by the published implementations."""
