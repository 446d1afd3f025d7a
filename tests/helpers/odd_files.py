"""Image files of every kind, with pixels computed from the format's definition instead of Pillow's decoder."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# writes the file and returns its pixels (H, W, 3) and their tolerance
Make = Callable[[Path], tuple[np.ndarray, int]]
RNG = np.random.default_rng(0)
# flat blocks, which JPEG preserves
COLORS = np.kron(RNG.integers(0, 256, (2, 3, 3)), np.ones((8, 8, 1), int)).astype(np.uint8)
HIGH, WIDE = COLORS.shape[:2]
GRAY = RNG.integers(0, 256, (HIGH, WIDE), np.uint8)
OPACITY = RNG.choice(np.array([0, 1, 127, 128, 254, 255], np.uint8), (HIGH, WIDE))
MANY = RNG.integers(0, 65536, (HIGH, WIDE, 4)).astype(">u2")
FEW = (MANY >> 8).astype(np.uint8)
# EXIF orientation: the visual position of the first row and the first column
SEEN = (
    "top left, top right, bottom right, bottom left, left top, right top, right bottom, left bottom"
)
UPRIGHT = dict(enumerate(SEEN.split(", "), start=1))


def png(
    size: tuple[int, int], bits: int, kind: int, rows: list[bytes], *extra: tuple[bytes, bytes]
) -> bytes:
    """Return a PNG file of color type 0 (gray), 2 (RGB), 3 (palette), 4 (gray and alpha) or 6 (RGB and alpha)."""
    head = struct.pack(">IIBBBBB", size[1], size[0], bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", head), *extra, (b"IDAT", pixels), (b"IEND", b"")):
        length, check = (
            struct.pack(">I", number) for number in (len(content), zlib.crc32(name + content))
        )
        file += length + name + content + check
    return file


def rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


def over_white(colors: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    share = opacity[..., None] / 255
    return np.floor(colors * share + 255 * (1 - share) + 0.5).astype(np.uint8)


def saved(
    name: str, image: Image.Image, expected: np.ndarray, near: int = 0, **options: object
) -> Make:
    """Return a writer of files by Pillow; `name` is the format."""

    def make(path: Path) -> tuple[np.ndarray, int]:
        image.save(path, name, **options)
        return expected, near

    return make


def drawn(
    kind: int, pixels: np.ndarray, expected: np.ndarray, *extra: tuple[bytes, bytes], bits: int = 0
) -> Make:
    def make(path: Path) -> tuple[np.ndarray, int]:
        depth = bits or 8 * pixels.dtype.itemsize
        path.write_bytes(png((HIGH, WIDE), depth, kind, [row.tobytes() for row in pixels], *extra))
        return expected, 0

    return make


def turned(orientation: int, name: str) -> Make:
    def make(path: Path) -> tuple[np.ndarray, int]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        exact = {"quality": 100, "subsampling": 0, "lossless": True}
        Image.fromarray(COLORS).save(path, name, exif=exif, **exact)
        first_row, first_column = UPRIGHT[orientation].split()
        lies = first_row in ("left", "right")
        seen = np.zeros((WIDE, HIGH, 3) if lies else (HIGH, WIDE, 3), np.uint8)
        for row, column in np.ndindex(HIGH, WIDE):
            down, across = (column, row) if lies else (row, column)
            if "bottom" in (first_row, first_column):
                down = seen.shape[0] - 1 - down
            if "right" in (first_row, first_column):
                across = seen.shape[1] - 1 - across
            seen[down, across] = COLORS[row, column]
        return seen, 2 if name == "JPEG" else 0

    return make


def printed(mark: int, adobe: bool = True) -> Make:
    """Return a writer of CMYK JPEGs with inverted inks; mark 2 means YCbCr, not CMY; `adobe` keeps Adobe's marker."""

    def make(path: Path) -> tuple[np.ndarray, int]:
        # a stored value of 255 means no ink
        stored = np.concatenate([COLORS, np.full((HIGH, WIDE, 1), 200, np.uint8)], axis=2)
        inverted = Image.frombytes("CMYK", (WIDE, HIGH), (255 - stored).tobytes())
        inverted.save(path, "JPEG", quality=100, subsampling=0)
        content = path.read_bytes()
        place = content.index(b"Adobe")
        assert content[place - 4 : place] == b"\xff\xee\x00\x0e"
        content = content[: place + 11] + bytes([mark]) + content[place + 12 :]
        path.write_bytes(content if adobe else content[: place - 4] + content[place + 12 :])
        inks = COLORS.astype(float)
        if mark == 2:
            y, b, r = inks[..., 0], inks[..., 1] - 128, inks[..., 2] - 128
            colors = [y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b]
            inks = 255 - np.stack(colors, axis=2).clip(0, 255)
        return np.round(inks * 200 / 255).astype(np.uint8), 3

    return make


def animated(name: str) -> Make:
    later = [Image.new("RGB", (WIDE, HIGH), (value, 9, 9)) for value in (1, 2)]
    options = {"save_all": True, "append_images": later, "lossless": True}
    return saved(name, Image.fromarray(COLORS), COLORS, **options)


def unpacked(packed: np.ndarray, *shifts: int) -> np.ndarray:
    """Return the pixels of packed bytes: one pixel for each shift, from the left."""
    mask = (1 << 8 // len(shifts)) - 1
    return np.stack([packed >> shift & mask for shift in shifts], axis=2).reshape(HIGH, WIDE)


PALETTE = RNG.integers(0, 256, (256, 3), np.uint8)
TABLE = (b"PLTE", PALETTE.tobytes())
PICTURE = Image.fromarray(COLORS)
CLEAR = np.where((COLORS == COLORS[0, 0]).all(axis=2, keepdims=True), 255, COLORS).astype(np.uint8)
HALF = (b"tRNS", OPACITY.ravel()[:256].tobytes())
BEST = {"quality": 100, "subsampling": 0}
QUARTERS, HALVES = GRAY[:, : WIDE // 4], GRAY[:, : WIDE // 2]
OPAQUE, NATIVE = np.dstack([COLORS, OPACITY]), MANY[..., 0].astype("<u2")
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F] = 6, "maker"
BROKEN = {
    "short": EXIF.tobytes()[:11],
    "cut": EXIF.tobytes()[:-8],
    "no TIFF": b"Exif\0\0MM\0\0\0\0\0\x08",
    "a tag of text": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\2\0\0\x006\0\0\0\0\0\0\0",
    "beside": EXIF.tobytes().replace(b"\1\x0f\0\2", b"\1\x0f\0\x0a"),
}
ODD: dict[str, Make] = {
    "gray": drawn(0, GRAY, rgb(GRAY)),
    "gray JPEG": saved("JPEG", PICTURE.getchannel(0), rgb(COLORS[..., 0]), 1, quality=100),
    "gray of 2 bits": drawn(
        0, QUARTERS, rgb(unpacked(QUARTERS, 6, 4, 2, 0) * np.uint8(85)), bits=2
    ),
    "1 bit": drawn(0, np.packbits(GRAY > 99, axis=1), rgb((GRAY > 99) * np.uint8(255)), bits=1),
    "gray and opacity": drawn(4, np.dstack([GRAY, OPACITY]), over_white(rgb(GRAY), OPACITY)),
    "opacity": drawn(6, OPAQUE, over_white(COLORS, OPACITY)),
    "fully opaque": drawn(6, np.dstack([COLORS, np.full_like(GRAY, 255)]), COLORS),
    "fourth channel that is no opacity": drawn(6, np.dstack([COLORS, np.zeros_like(GRAY)]), COLORS),
    "opacity WebP": saved(
        "WEBP", Image.fromarray(OPAQUE), over_white(COLORS, OPACITY), lossless=True, exact=True
    ),
    "a clear color": drawn(2, COLORS, CLEAR, (b"tRNS", COLORS[0, 0].astype(">u2").tobytes())),
    "palette": drawn(3, GRAY, PALETTE[GRAY], TABLE),
    "palette and a clear color": drawn(
        3, GRAY, np.where(rgb(GRAY) == 2, 255, PALETTE[GRAY]), TABLE, (b"tRNS", b"\xff\xff\0")
    ),
    "palette and opacity": drawn(
        3, GRAY, over_white(PALETTE[GRAY], OPACITY.ravel()[:256][GRAY]), TABLE, HALF
    ),
    "palette of 4 bits": drawn(3, HALVES, PALETTE[unpacked(HALVES, 4, 0)], TABLE, bits=4),
    "CMYK": printed(0),
    "CMYK without Adobe's name": printed(0, adobe=False),
    "YCCK": printed(2),
    "CMYK TIFF": saved("TIFF", PICTURE.convert("CMYK"), COLORS),
    "16 bits": drawn(0, MANY[..., 0], rgb(FEW[..., 0])),
    "16 bits, dark": drawn(0, (MANY[..., 0] & 255).astype(">u2"), rgb(np.zeros_like(GRAY))),
    "16 bits RGB": drawn(2, MANY[..., :3], FEW[..., :3]),
    "16 bits and opacity": drawn(6, MANY, over_white(FEW[..., :3], FEW[..., 3])),
    "16 bits TIFF": saved("TIFF", Image.fromarray(NATIVE), rgb(FEW[..., 0])),
    "16 bits TIFF, high byte first": saved("TIFF", Image.fromarray(MANY[..., 0]), rgb(FEW[..., 0])),
    "16 bits PGM": saved("PPM", Image.fromarray(NATIVE), rgb(FEW[..., 0])),
    "16 bits PGM, dark": saved("PPM", Image.fromarray(NATIVE & 255), rgb(0 * FEW[..., 0])),
    "32 bits that hold 16": saved(
        "TIFF", Image.fromarray(NATIVE.astype(np.int32)), rgb(FEW[..., 0])
    ),
    "32 bits that hold 8": saved("TIFF", Image.fromarray(GRAY.astype(np.int32)), rgb(GRAY)),
    "progressive": saved("JPEG", PICTURE, COLORS, 2, progressive=True, **BEST),
    "PNG": drawn(2, COLORS, COLORS),
    "WebP": saved("WEBP", PICTURE, COLORS, lossless=True),
    "BMP": saved("BMP", PICTURE, COLORS),
    "TIFF": saved("TIFF", PICTURE, COLORS, compression="tiff_lzw"),
    "GIF": animated("GIF"),
    "animated PNG": animated("PNG"),
    "animated WebP": animated("WEBP"),
    "TIFF of several pages": animated("TIFF"),
    **{f"turned {way} {name}": turned(way, name) for way in UPRIGHT for name in ("JPEG", "TIFF")},
    "turned PNG": turned(6, "PNG"),
    "turned WebP": turned(8, "WEBP"),
    **{
        f"EXIF that is broken: {what}": saved(
            "JPEG", PICTURE, np.rot90(COLORS, -(what == "beside")), 2, exif=blob, **BEST
        )
        for what, blob in BROKEN.items()
    },
    "EXIF that is no TIFF": drawn(2, COLORS, COLORS, (b"eXIf", b"MM\0\0\0\0\0\x08")),
    "orientation 9": drawn(
        2, COLORS, COLORS, (b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x09\0\0\0\0\0\0")
    ),
}
