"""The training job of a pipeline step: create it, follow it to its end, report why it failed.

The entry points are the functions of `launch`.
"""
