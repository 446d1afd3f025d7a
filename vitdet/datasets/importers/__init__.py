"""Readers of data sets in other formats."""
