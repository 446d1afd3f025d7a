"""Preparation of data sets: download, conversion from other formats, and reports."""
