"""Data sets prepared for training: fetched, imported from other formats, reported on; the detector imports none of it."""
