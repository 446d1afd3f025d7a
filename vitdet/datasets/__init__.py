"""Preparation of data sets: downloads, conversion from other formats, reports. Training and
inference do not use this package.
"""
