"""A data set on one HTML page."""
