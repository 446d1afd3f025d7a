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
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vitdet.config import DataConfig

if TYPE_CHECKING:
    from torch import Tensor

Picture: TypeAlias = "str | Path | Image.Image | np.ndarray | Tensor"

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
BITS_PER_SAMPLE = 258  # tag of TIFF


@dataclass(frozen=True)
class Reading:
    """The settings of `data` that say how an image file is read."""

    max_pixels: int = DataConfig.max_pixels
    bit_depth: int = DataConfig.bit_depth  # of values in more than 8 bits; 0: what the file says

    @classmethod
    def of(cls, data: DataConfig) -> Reading:
        """As these settings say."""
        return cls(data.max_pixels, data.bit_depth)


DEFAULT = Reading()


class Examined(NamedTuple):
    """size: height and width of the upright picture. highest: the largest value of one that is stored in more than 8
    bits and does not say how many of them it uses, else None; colors: whether it is in colour.
    """

    size: tuple[int, int]
    highest: int | None = None
    colors: bool = False


def open_image(path: Path, reading: Reading = DEFAULT) -> Image.Image:
    """The file as an upright RGB image.

    Raises FileNotFoundError, and ValueError with one line for a file that is no image, damaged or too large: one that
    promises more pixels than `reading` allows is not decoded.
    """
    with _named(path):
        look(path)
        with _opened(path, reading) as file:
            return upright(file, reading)


def find_image(path: Path) -> None:
    """Raises as `open_image` if there is nothing to read at `path`."""
    with _named(path):
        look(path)


def read_image(image: Picture, reading: Reading = DEFAULT) -> Image.Image:
    """Anything that `Predictor` takes, as an upright RGB image; errors as there. reading: of files and PIL images."""
    if isinstance(image, str | Path):
        return open_image(Path(image), reading)
    if isinstance(image, Image.Image):
        return upright(image, reading)
    import torch  # here, as reading and checking a data set does not need it: seconds of start

    if isinstance(image, torch.Tensor):
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


def image_size(path: Path, reading: Reading = DEFAULT) -> tuple[int, int]:
    """Height and width of the upright picture; of a JPEG only the head is read. Raises as `open_image`."""
    with _named(path):
        look(path)
        with _opened(path, reading) as file:
            return _upright_size(file)


def examine(content: bytes, reading: Reading = DEFAULT) -> Examined:
    """What is in the bytes of an image file.

    Raises ValueError, without a name, for those that `open_image` refuses: every byte is read, but of a JPEG only an
    eighth of the resolution is computed.
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
    """What to add where a picture's size is not the annotated one: '' unless the sides are those of a turned one."""
    return (
        "; a picture is annotated upright, as its EXIF orientation turns it"
        if found == annotated[::-1]
        else ""
    )


def upright(image: Image.Image, reading: Reading = DEFAULT) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says; the image itself, not a copy, where it is that already.

    Raises ValueError for pixels that are no numbers from 0 to 255 or to 65535, or are beyond the `reading`'s bit depth.
    """
    stated = _stated_depth(image)
    if _has_deep_colors(image):
        _check_colors(reading)
    image.load()  # which turns a TIFF already
    turn = _turn(image)
    if image.mode[0] in "IF":
        image = _eight_bits(image, stated, reading)
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


def _eight_bits(image: Image.Image, stated: int, reading: Reading) -> Image.Image:
    """Greys of up to 16 bits, or of 32 that hold no more than these, as 8 bits; Pillow would cut at 255."""
    depth = _depth(image, _highest(image), stated, reading)
    return Image.fromarray((np.asarray(image) >> (depth - 8)).astype(np.uint8))


def _highest(image: Image.Image) -> int:
    """The largest of its grey values. Raises ValueError for those that are no numbers from 0 to 65535."""
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers of no known range; save it with 8 or 16 bits"
        )
    pixels = np.asarray(image)
    low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels are numbers from {low} to {high}; save it with 8 or 16 bits")
    return high


def _depth(image: Image.Image, high: int, stated: int, reading: Reading) -> int:
    """How many bits its grey values have, of which the largest is `high`. stated: what the file says, 0: nothing."""
    usual = 16 if image.mode != "I" or image.format in SIXTEEN or high > 255 else 8
    depth = stated or reading.bit_depth or usual
    if high >= 1 << depth:
        raise ValueError(
            f"its pixels reach {high}, more than the {(1 << depth) - 1} of {depth} bits; "
            "data.bit_depth has to hold the values of all images"
        )
    return depth


def _stated_depth(image: Image.Image) -> int:
    """The bits of its grey values if the file says so, else 0. The image is not loaded yet."""
    if image.format == "TIFF":
        (bits, *_) = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) or (0,)
        return bits if 8 < bits < 16 else 0
    decoder, arguments = _decoder(image)
    # Pillow scales from 0..maxval to 0..65535
    return 16 if decoder in ("ppm", "ppm_plain") and arguments[1] < 65535 else 0


def _has_deep_colors(image: Image.Image) -> bool:
    """Whether it is a file with colours of 16 bits, of which Pillow reads the upper 8. The image is not loaded yet."""
    _, arguments = _decoder(image)
    return image.mode[0] not in "IF" and any(";16" in str(one) for one in arguments[:1])


def _decoder(image: Image.Image) -> tuple[str, tuple]:
    """The decoder of a file that is not loaded yet and its arguments, the stored mode of pixels first."""
    for decoder, _, _, arguments in getattr(image, "tile", ())[:1]:
        return decoder, arguments if isinstance(arguments, tuple) else (arguments,)
    return "", ()


def _check_colors(reading: Reading) -> None:
    if reading.bit_depth not in (0, 16):
        raise ValueError(
            f"of its colours of 16 bits the upper 8 are read, and data.bit_depth={reading.bit_depth} is for grey; "
            "save it with 8 bits a channel"
        )


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
