"""The HTML report of a data set."""
