"""Draw detections and ground truth on images."""

from __future__ import annotations

import colorsys
import logging
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from vitdet.data.images import ImageInput, read_image
from vitdet.data.masks import paste
from vitdet.types import Detections

LEGIBLE = 768  # small images are enlarged to about this longest side, so that captions fit
# color of shadows, which add contrast; opacity of masks; opacity of shadows
DARK, FILL, SHADOW = ((15, 15, 15), 0.42, 0.5)
GOLDEN = 0.618034  # hue step (golden ratio), so that consecutive labels have distinct colors
# fonts of Linux distributions for Latin, Greek and Cyrillic letters, then for Chinese, Japanese and
# Korean; Pillow searches the system's font folders
FONTS = ("DejaVuSans.ttf", "wqy-microhei.ttc", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc")
NONCHARACTER = "\uffff"  # fonts draw the symbol of missing characters for it
log = logging.getLogger(__name__)

Color = tuple[int, int, int]  # red, green and blue, 0..255
Frame = tuple[float, float, float, float]  # xyxy


def class_color(label: int) -> Color:
    """Return the color in which objects with this label are drawn."""
    value, saturation = ((1.0, 0.80), (0.86, 0.62), (1.0, 0.48))[label // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * GOLDEN) % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(image: ImageInput, found: Detections, scale: float | None = None) -> Image.Image:
    """Draw the masks, boxes, names and scores of detections on an enlarged copy of the image.

    Boxes are in pixels of the input image. The default `scale` is the result of `legible_scale`.
    """
    picture = read_image(image)
    scale = legible_scale(picture.size) if scale is None else scale
    labels, scores = found.labels.tolist(), found.scores.tolist()
    names = found.names if found.class_names else [f"class {label}" for label in labels]
    captions = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    width, height = scaled(picture.size, scale)
    boxes = found.boxes.detach().cpu().float() * scale
    masks = None if found.masks is None else found.masks.detach().cpu().float()

    def bitmap(i: int) -> Tensor | None:
        if masks is None:
            return None
        return paste(masks[i : i + 1], boxes[i : i + 1], (height, width))[0]

    return paint(picture, found.boxes, labels, captions, bitmap, scale)


def legible_scale(size: tuple[int, int]) -> int:
    """Return the default enlargement factor for an image of this size."""
    return max(1, round(LEGIBLE / max(size)))


def caption_font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Return a font for this text at a size in pixels.

    This is Pillow's default font, which has only ASCII, or the installed font that has most of the
    other characters. Raises RuntimeError if Pillow was built without FreeType.
    """
    others = "".join(sorted({char for char in text if not char.isascii()}))
    if others and (path := _font_with(others)):
        return ImageFont.truetype(path, size)
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType; install a Pillow wheel")
    return font


@cache
def _font_with(characters: str) -> str:
    """Return the path of the font that has most of these characters; "" if none is installed."""
    lacking = {str(font.path): _lacking(font, characters) for font in _installed_fonts()}
    path = min(lacking, key=lambda path: len(lacking[path]), default="")
    if lacking.get(path, characters):
        _warn_once()
    return path


@cache
def _warn_once() -> None:
    log.warning(
        "no supported font has all characters of the class names, so pictures show boxes instead; "
        "for Latin, Greek, Cyrillic and Arabic install DejaVu (Debian: fonts-dejavu-core), for "
        "Chinese, Japanese and Korean WenQuanYi Micro Hei (fonts-wqy-microhei)"
    )


def _installed_fonts() -> Iterator[ImageFont.FreeTypeFont]:
    names = list(FONTS)
    # matplotlib, which MLflow requires, contains DejaVu Sans
    if (spec := find_spec("matplotlib")) is not None and spec.origin:
        names.append(str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"))
    for name in names:
        try:
            yield ImageFont.truetype(name, 16)
        except OSError:
            continue  # not installed


def _lacking(font: ImageFont.FreeTypeFont, characters: str) -> str:
    """Return the characters that the font lacks."""

    def drawn(char: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(char)
        return mask.size, bytes(mask)

    missing = drawn(NONCHARACTER)
    return "".join(char for char in characters if not char.isspace() and drawn(char) == missing)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return an image size multiplied by `scale`, at least 1 pixel per side."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def paint(
    picture: Image.Image,
    boxes: Tensor,
    labels: Sequence[int],
    captions: Sequence[str],
    bitmap: Callable[[int], Tensor | None],
    scale: float,
) -> Image.Image:
    """Resize an image by `scale` and draw N objects on it, small objects on top.

    boxes (N, 4) are xyxy in pixels of the original image; labels determine the colors. bitmap(i)
    returns the mask (H, W) bool of object i in the resized image, or None for an object without a
    mask. It is called separately for each object, so that only one mask is in memory.
    """
    size = scaled(picture.size, scale)
    canvas = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    width = max(2, round(max(size) / 400))
    corners = (boxes.detach().cpu().double() * scale).tolist()
    order = sorted(range(len(corners)), key=lambda i: -_area(corners[i]))
    colors = [class_color(label) for label in labels]
    for i in order:
        if (mask := bitmap(i)) is not None:
            _paint_mask(canvas, mask, colors[i], width)
    for i in order:
        _paint_box(canvas, corners[i], colors[i], width)
    taken: list[Frame] = []
    height = max(12, round(max(size) / 52))
    default = caption_font(height)
    for i in reversed(order):  # captions of small objects are placed first
        text = unicodedata.normalize("NFC", captions[i])  # fonts have composed characters
        font = default if text.isascii() else caption_font(height, text)
        taken.append(_paint_caption(canvas, corners[i], text, colors[i], font, taken))
    return canvas


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _paint_mask(canvas: Image.Image, bitmap: Tensor, color: Color, width: int) -> None:
    inside = bitmap.cpu().numpy()
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return
    margin = 2 * width
    left, top = max(0, columns[0] - margin), max(0, rows[0] - margin)
    part = inside[top : rows[-1] + 1 + margin, left : columns[-1] + 1 + margin]
    # pad, so that objects at the image's edge also have an outline there
    shape = ImageOps.expand(Image.fromarray((part * 255).astype(np.uint8)), margin)
    line = ImageChops.subtract(shape, _shrunk(shape, width))
    shadow = ImageChops.subtract(shape.filter(ImageFilter.MaxFilter(3)), shape)
    at = (int(left), int(top))
    for paint_color, area, blur, opacity in (
        (color, shape, 0.7, FILL),
        (DARK, shadow, 0.5, SHADOW),
        (color, line, 0.6, 1.0),
    ):
        soft = ImageOps.crop(area.filter(ImageFilter.GaussianBlur(blur)), margin)
        canvas.paste(paint_color, at, soft.point([round(value * opacity) for value in range(256)]))


def _shrunk(shape: Image.Image, width: int) -> Image.Image:
    """Apply a minimum filter of 2 * width + 1 pixels along both axes in O(log width) passes."""
    pixels, side = np.pad(np.asarray(shape), width, "edge"), 2 * width + 1
    for _ in range(2):
        reach, low = 1, pixels.T
        while reach < side:
            step = min(reach, side - reach)
            low, reach = np.minimum(low[:-step], low[step:]), reach + step
        pixels = low
    return Image.fromarray(pixels)


def _paint_box(canvas: Image.Image, box: Sequence[float], color: Color, width: int) -> None:
    left, top = (max(0, math.floor(value)) for value in box[:2])
    right = min(canvas.width, math.ceil(box[2])) - 1
    bottom = min(canvas.height, math.ceil(box[3])) - 1
    if right < left or bottom < top:
        return
    pen = ImageDraw.Draw(canvas, "RGBA")
    shadow = (left - 1, top - 1, right + 1, bottom + 1)
    pen.rectangle(shadow, outline=(*DARK, round(255 * SHADOW)), width=1)
    pen.rectangle((left, top, right, bottom), outline=(*color, 235), width=width)


def _paint_caption(
    canvas: Image.Image,
    box: Sequence[float],
    text: str,
    color: Color,
    font: ImageFont.FreeTypeFont,
    taken: Sequence[Frame],
) -> Frame:
    pen = ImageDraw.Draw(canvas)
    pad = max(2, round(font.size / 5))
    ascent, descent = font.getmetrics()
    width, height = math.ceil(pen.textlength(text, font)) + 2 * pad, ascent + descent + pad
    left, top, right, bottom = box
    positions = [
        (left, top - height),
        (left, top),
        (right - width, top - height),
        (left, bottom),
        (right - width, bottom - height),
        (left, bottom - height),
        (right - width, bottom),
    ]
    frames = []
    for x, y in positions:
        x = round(min(max(x, 0), max(0, canvas.width - width)))
        y = round(min(max(y, 0), max(0, canvas.height - height)))
        frames.append((x, y, x + width, y + height))
    frame = min(frames, key=lambda candidate: sum(_overlap(candidate, other) for other in taken))
    pen.rounded_rectangle((frame[0], frame[1], frame[2] - 1, frame[3] - 1), radius=pad, fill=color)
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    fill = (20, 20, 20) if luma > 140 else "white"
    pen.text((frame[0] + pad, frame[1] + pad // 2), text, fill=fill, font=font)
    return frame


def _overlap(first: Sequence[float], second: Sequence[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def spread(length: int, count: int) -> list[int]:
    """Return up to `count` distinct, evenly spaced indices below `length`."""
    count = min(length, count)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
