"""Pictures as upright RGB of 8 bits a channel, wherever they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


def open_image(path: Path) -> Image.Image:
    """The file as an upright RGB image.

    Raises FileNotFoundError, and ValueError with one line for a file that is no image or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    try:
        with Image.open(path) as file:
            file.load()
            return upright(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image that can be read (JPEG, PNG, ...)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: the image cannot be read: {' '.join(str(error).split())}") from error


def upright(image: Image.Image) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says; the image itself, not a copy, where it is that already."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":  # PIL would cut 16 bits to 255 instead of scaling them
        pixels = np.asarray(image)
        if image.mode != "I" or pixels.max(initial=0) > 255:
            image = Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
