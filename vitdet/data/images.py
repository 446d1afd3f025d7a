"""Pictures as upright RGB of 8 bits a channel, wherever they come from.

As Detectron2 reads them, and where it would show noise, as people see them: the EXIF orientation turns a picture (an
annotation is of the upright one), 16 bits are scaled to 8, what is transparent lies over white, an animation is its
first picture. Numbers without a known range are refused rather than guessed.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from vitdet.config import DataConfig

Picture = str | Path | Image.Image | np.ndarray | Tensor

# EXIF orientation -> what makes it upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
JPEGS = ("JPEG", "MPO")
DRAWINGS = ("EPS", "WMF")  # programs that another program would have to run
SIXTEEN = ("PNG", "PPM")  # formats whose 16 bits an older Pillow or a newer one gives as 32


@dataclass(frozen=True)
class Reading:
    """The settings of `data` that say how an image file is read."""

    max_pixels: int = DataConfig.max_pixels

    @classmethod
    def of(cls, data: DataConfig) -> Reading:
        """As these settings say."""
        return cls(data.max_pixels)


DEFAULT = Reading()


def open_image(path: Path, reading: Reading = DEFAULT) -> Image.Image:
    """The file as an upright RGB image.

    Raises FileNotFoundError, and ValueError with one line for a file that is no image, damaged or too large: one that
    promises more pixels than `reading` allows is not decoded.
    """
    with _named(path):
        look(path)
        with _opened(path, reading) as file:
            return upright(file)


def read_image(image: Picture, reading: Reading = DEFAULT) -> Image.Image:
    """Anything that `Predictor` takes, as an upright RGB image; errors as there. reading: of files."""
    if isinstance(image, str | Path):
        return open_image(Path(image), reading)
    if isinstance(image, Image.Image):
        return upright(image)
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise ValueError(
                f"expected an image tensor (3, H, W) of uint8, got {tuple(image.shape)} of {image.dtype}"
            )
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"expected a file, PIL image, array or tensor as image, got {type(image).__name__}"
        )
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(
            f"expected an image array (H, W, 3) of uint8, got {image.shape} of {image.dtype}"
        )
    return Image.fromarray(np.ascontiguousarray(image))


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright picture; of a JPEG only the head is read. Raises as `open_image`."""
    with _named(path):
        look(path)
        with _opened(path, DEFAULT) as file:
            return _upright_size(file)


def examine(content: bytes) -> tuple[int, int]:
    """Height and width of the upright picture in the bytes of a file.

    Raises ValueError, without a name, for those that `open_image` refuses: every byte is read, but of a JPEG only an
    eighth of the resolution is computed.
    """
    with _one_line(), _opened(io.BytesIO(content), DEFAULT) as file:
        size = _upright_size(file)
        file.draft("RGB", (1, 1))
        file.load()
        if file.mode[0] in "IF":
            _eight_bits(file)
        return size


def exchanged(found: tuple[int, int], annotated: tuple[int, int]) -> str:
    """What to add where a picture's size is not the annotated one: '' unless the sides are those of a turned one."""
    return (
        "; a picture is annotated upright, as its EXIF orientation turns it"
        if found == annotated[::-1]
        else ""
    )


def upright(image: Image.Image) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says; the image itself, not a copy, where it is that already.

    Raises ValueError for pixels that are no numbers from 0 to 255 or to 65535.
    """
    image.load()  # which turns a TIFF already
    turn = _turn(image)
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = _over_white(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
        image.info.clear()  # else it would be turned once more by who looks at it next
    return image


def _upright_size(file: Image.Image) -> tuple[int, int]:
    # others may keep their EXIF at the end, and a TIFF is turned by Pillow as it is read
    if file.format not in JPEGS:
        file.load()
    lies = _turn(file) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
    return (file.width, file.height) if lies else (file.height, file.width)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # whatever Pillow does with broken EXIF: the pixels are sound, and lie as they are stored
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits, or of 32 that hold no more than these."""
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers of no known range; save it with 8 or 16 bits"
        )
    pixels = np.asarray(image)
    low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels are numbers from {low} to {high}; save it with 8 or 16 bits")
    if image.mode != "I" or image.format in SIXTEEN or high > 255:
        pixels = pixels >> 8  # Pillow would cut at 255
    return Image.fromarray(pixels.astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    """What a page would show; colours that nobody was meant to see do not appear."""
    image = image.convert("RGBA")
    opacity = image.getchannel("A")
    if opacity.getextrema()[1] == 0:  # nothing to be seen: that fourth channel was something else
        return image
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=opacity)
    return page


def look(path: Path) -> None:
    """Raises FileNotFoundError, ValueError and OSError, without a name, for a path where there is nothing to read."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise ValueError("it is a folder")
    if not stat.S_ISREG(found.st_mode):  # to read a pipe would be to wait
        raise ValueError("it is no regular file")
    if not found.st_size:
        raise ValueError("the file is empty")


class _TooLarge(ValueError):
    """An image file promises more pixels than are allowed."""


@contextmanager
def _opened(file: Path | io.BytesIO, reading: Reading) -> Iterator[Image.Image]:
    with Image.open(file) as image:
        if image.format in DRAWINGS:
            raise UnidentifiedImageError
        if image.width * image.height > reading.max_pixels:
            raise _TooLarge(
                f"the image has {image.width:,} x {image.height:,} pixels, more than the {reading.max_pixels:,} of "
                "data.max_pixels; make it smaller, cut it into parts, or raise data.max_pixels"
            )
        yield image


@contextmanager
def _one_line() -> Iterator[None]:
    """Whatever a decoder does with damaged bytes is a ValueError of one line."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError("no such image file") from None
    except _TooLarge as error:
        raise ValueError(str(error)) from None
    except UnidentifiedImageError as error:
        raise ValueError("not an image that can be read (JPEG, PNG, ...)") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"the image has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller or cut it "
            "into parts"
        ) from error
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the image cannot be read: {said}") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        with _one_line():
            yield
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
