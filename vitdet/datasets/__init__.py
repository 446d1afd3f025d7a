"""Preparation of data sets: downloads, conversion from other formats, reports. Not used by the
detector.
"""
