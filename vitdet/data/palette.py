"""The colour of a class: the same in the pictures of detections, of an evaluation and of a data set."""

from __future__ import annotations

import colorsys

GOLDEN = 0.618034  # of the circle of hues: neighbours in the list of classes get far colours, however many there are


def class_color(label: int) -> tuple[int, int, int]:
    """Red, green and blue, 0..255, of the class with this number."""
    value, saturation = ((1.0, 0.80), (0.86, 0.62), (1.0, 0.48))[label // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * GOLDEN) % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
