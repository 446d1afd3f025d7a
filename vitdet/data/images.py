"""Reading images as upright 8-bit RGB.

As in Detectron2, the EXIF orientation is applied, since annotations refer to the upright image. In
addition, 16-bit values are scaled to 8 bits, transparent pixels are blended with white, and
animations are reduced to their first frame. Pixel values of unknown range are rejected.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from vitdet.config import DataConfig

if TYPE_CHECKING:
    from torch import Tensor

ImageInput: TypeAlias = "str | Path | Image.Image | np.ndarray | Tensor"

# EXIF orientation -> transposition that makes the image upright
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
DRAWINGS = ("EPS", "WMF")  # vector formats, which Pillow does not decode itself
SIXTEEN = ("PNG", "PPM")  # formats whose 16-bit values some versions of Pillow return as 32 bits
NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC = 254, 258, 262  # TIFF tags


@dataclass(frozen=True)
class Reading:
    """Settings for reading image files."""

    max_pixels: int = DataConfig.max_pixels
    bit_depth: int = DataConfig.bit_depth

    @classmethod
    def of(cls, data: DataConfig) -> Reading:
        """Return the settings for reading the images of a data set."""
        return cls(data.max_pixels, data.bit_depth)


DEFAULT = Reading()


class Examined(NamedTuple):
    """Properties of an image file.

    Attributes:
        size: (height, width) of the upright image.
        highest: largest 16-bit value (colors: upper bound) if the bit depth is unclear, else None.
        colors: whether the file contains 16-bit colors.
    """

    size: tuple[int, int]
    highest: int | None = None
    colors: bool = False


def open_image(path: Path, reading: Reading = DEFAULT) -> Image.Image:
    """Read a file as an upright RGB image.

    Raises FileNotFoundError, and ValueError if the file is damaged or not an image, has more pixels
    than `reading.max_pixels` (checked before decoding), or has values that `upright` rejects.
    """
    with _named(path):
        check_file(path)
        with _opened(path, reading) as file:
            return upright(file, reading)


def find_image(path: Path) -> None:
    """Raise the errors of `open_image` if `path` is missing, empty or not a regular file."""
    with _named(path):
        check_file(path)


def read_image(image: ImageInput, reading: Reading = DEFAULT) -> Image.Image:
    """Convert any input of `Predictor` to an upright RGB image.

    Raises the errors of `Predictor.__call__`."""
    if isinstance(image, str | Path):
        return open_image(Path(image), reading)
    if isinstance(image, Image.Image):
        return upright(image, reading)
    import torch  # slow to import, and not needed by `vitdet data check`

    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise ValueError(
                "expected an image tensor (3, H, W) of uint8, got "
                f"{tuple(image.shape)} of {image.dtype}"
            )
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"expected an image as a path, PIL image, array or tensor, got {type(image).__name__}"
        )
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(
            f"expected an image array (H, W, 3) of uint8, got {image.shape} of {image.dtype}"
        )
    return Image.fromarray(np.ascontiguousarray(image))


def image_size(path: Path, reading: Reading = DEFAULT) -> tuple[int, int]:
    """Return the height and width of the upright image, without decoding the pixels of a JPEG.

    Raises FileNotFoundError, and ValueError for a file that cannot be read.
    """
    with _named(path):
        check_file(path)
        with _opened(path, reading) as file:
            return _upright_size(file)


def examine(content: bytes, reading: Reading = DEFAULT) -> Examined:
    """Examine the bytes of an image file; JPEGs are decoded at an eighth of their resolution.

    Raises ValueError (message without a file name) for files that `open_image` rejects.
    """
    with _one_line(), _opened(io.BytesIO(content), reading) as file:
        colors, stated = _has_deep_colors(file), _stated_depth(file)
        size = _upright_size(file)
        file.draft("RGB", (1, 1))
        file.load()
        if colors:
            _check_colors(reading)
            high = int(np.asarray(file).max())
            return Examined(size, high << 8 | 255, colors)
        if file.mode[0] not in "IF":
            return Examined(size)
        high = _highest(file)
        depth = _depth(file, high, stated, reading)
        return Examined(size, None if stated or depth == 8 else high)


def exchanged(found: tuple[int, int], annotated: tuple[int, int]) -> str:
    """Return a hint for size errors if height and width are swapped, otherwise ""."""
    hint = "; annotations must refer to the upright image, after its EXIF orientation is applied"
    return hint if found == annotated[::-1] else ""


def upright(image: Image.Image, reading: Reading = DEFAULT) -> Image.Image:
    """Convert an image to upright RGB; an image that is already upright RGB is returned unchanged.

    Raises ValueError for pixel values that are floats, outside 0..65535 or beyond the bit depth,
    and for 16-bit colors if `reading.bit_depth` is set to less than 16."""
    stated = _stated_depth(image)
    if _has_deep_colors(image):
        _check_colors(reading)
    image.load()  # also applies the orientation of a TIFF
    turn = _turn(image)
    if image.mode[0] in "IF":
        image = _eight_bits(image, stated, reading)
    elif image.has_transparency_data:
        image = _over_white(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
        image.info.clear()  # otherwise the orientation would be applied again
    return image


def _upright_size(file: Image.Image) -> tuple[int, int]:
    # a PNG may store EXIF after the pixels; loading a TIFF applies its orientation
    if file.format not in JPEGS:
        file.load()
    rotated = _turn(file) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
    return (file.width, file.height) if rotated else (file.height, file.width)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # invalid EXIF can raise any exception
        return None


def _eight_bits(image: Image.Image, stated: int, reading: Reading) -> Image.Image:
    """Scale gray values of up to 16 bits to 8 bits; Pillow would clip values at 255."""
    depth = _depth(image, _highest(image), stated, reading)
    pixels = (np.asarray(image) >> (depth - 8)).astype(np.uint8)
    # 0 is white; Pillow inverts only values of up to 8 bits
    negative = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0
    return Image.fromarray(~pixels if negative else pixels)


def _highest(image: Image.Image) -> int:
    """Return the largest gray value. Raises ValueError for floats and values outside 0..65535."""
    if image.mode == "F":
        raise ValueError(
            "the pixels are floating-point numbers of unknown range; save them with 8 or 16 bits"
        )
    pixels = np.asarray(image)
    low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
    if low < 0 or high > 65535:
        raise ValueError(f"pixel values range from {low} to {high}; save them with 8 or 16 bits")
    return high


def _depth(image: Image.Image, high: int, stated: int, reading: Reading) -> int:
    """Return the bit depth of gray values; `stated` is the result of `_stated_depth`."""
    default = 16 if image.mode != "I" or image.format in SIXTEEN or high > 255 else 8
    depth = stated or reading.bit_depth or default
    if high >= 1 << depth:
        raise ValueError(
            f"the largest pixel value is {high}, above {(1 << depth) - 1} for {depth} bits; "
            "data.bit_depth must cover the values of all images"
        )
    return depth


def _stated_depth(image: Image.Image) -> int:
    """Return the gray bit depth if the file states it unambiguously, or 0. Call before loading."""
    if image.format == "TIFF":
        (bits, *_) = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) or (0,)
        return bits if 8 < bits < 16 else 0
    decoder, arguments = _decoder(image)
    # Pillow scales PPM values from 0..maxval to 0..65535
    return 16 if decoder in ("ppm", "ppm_plain") and arguments[1] < 65535 else 0


def _is_preview(image: Image.Image) -> bool:
    """Return whether the first image of a TIFF is a reduced one, as in raw files of cameras."""
    kind = image.tag_v2.get(NEW_SUBFILE_TYPE) if isinstance(image, TiffImageFile) else 0
    return isinstance(kind, int) and kind & 1 == 1


def _has_deep_colors(image: Image.Image) -> bool:
    """Return whether a file has 16-bit colors, of which Pillow reads only the upper 8 bits.

    Call before loading the image.
    """
    _, arguments = _decoder(image)
    return image.mode[0] not in "IF" and any(";16" in str(mode) for mode in arguments[:1])


def _decoder(image: Image.Image) -> tuple[str, tuple]:
    """Return the decoder (name, arguments) of an image that is not loaded; ("", ()) if unknown."""
    for decoder, _, _, arguments in getattr(image, "tile", ())[:1]:
        return decoder, arguments if isinstance(arguments, tuple) else (arguments,)
    return "", ()


def _check_colors(reading: Reading) -> None:
    if reading.bit_depth not in (0, 16):
        raise ValueError(
            "only the upper 8 bits of 16-bit colors are read, and data.bit_depth="
            f"{reading.bit_depth} is only for gray images; save the image with 8 bits per channel"
        )


def _over_white(image: Image.Image) -> Image.Image:
    """Blend with white, to hide the arbitrary colors of transparent pixels."""
    image = image.convert("RGBA")
    opacity = image.getchannel("A")
    if opacity.getextrema()[1] == 0:  # an alpha channel of zeros is ignored
        return image
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=opacity)
    return page


def check_file(path: Path) -> None:
    """Raise FileNotFoundError for a missing file, ValueError for an empty or non-regular file."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise ValueError("the path is a folder")
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would block
        raise ValueError("the path is not a regular file")
    if not found.st_size:
        raise ValueError("the file is empty")


class _TooLarge(ValueError):
    """Error for an image with more pixels than `Reading.max_pixels`."""


@contextmanager
def _opened(file: Path | io.BytesIO, reading: Reading) -> Iterator[Image.Image]:
    with Image.open(file) as image:
        if image.format in DRAWINGS or _is_preview(image):
            raise UnidentifiedImageError
        if image.width * image.height > reading.max_pixels:
            raise _TooLarge(
                f"the image has {image.width:,} x {image.height:,} pixels, more than "
                f"data.max_pixels={reading.max_pixels}; downscale it, cut it into tiles, or raise "
                "data.max_pixels"
            )
        yield image


@contextmanager
def _one_line() -> Iterator[None]:
    """Convert exceptions other than FileNotFoundError to ValueError, with a one-line message."""
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
            f"the image has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; downscale it "
            "or cut it into tiles"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the image cannot be read: {reason}") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        with _one_line():
            yield
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
