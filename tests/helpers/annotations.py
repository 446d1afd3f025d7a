"""Valid small data sets, and hypothesis strategies that corrupt them.

Structural mutations replace any value, and remove, duplicate and swap keys and entries. Others cut and splice the
bytes of the file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

HEIGHT, WIDTH = 48, 64
SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
COLUMN = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT, (WIDTH - 1) * HEIGHT]}
COMPRESSED = {"size": [HEIGHT, WIDTH], "counts": "0`1`n2"}  # the same mask, compressed


def document(first_id: int = 1, lvis: bool = False) -> dict:
    """Return a document: three images, two classes, polygons, both forms of RLE, an empty box and, in COCO, a crowd."""
    square, bar = [10.0, 10.0, 20.0, 20.0], [0, 0, 1, HEIGHT]

    def entry(image: int, category: int, box: list, area: float, shape: object, crowd=0) -> dict:
        about = {"image_id": first_id + image, "iscrowd": crowd, "category_id": category}
        return about | {"bbox": box, "area": area, "segmentation": shape}

    objects = [
        entry(0, 1, square, 400.0, [SQUARE]),
        entry(1, 3, bar, HEIGHT, COLUMN, crowd=int(not lvis)),
        entry(1, 3, [5.0, 5.0, 0.0, 3.0], 0.0, [[5.0, 5.0, 5.0, 8.0, 5.0, 6.0]]),
        entry(0, 3, square, 400.0, [SQUARE, SQUARE]),
        entry(1, 3, bar, HEIGHT, COMPRESSED),
    ]
    images = [
        {"id": first_id + k, "file_name": f"{first_id + k}.png", "height": HEIGHT, "width": WIDTH}
        for k in range(3)
    ]
    categories = [{"id": 1, "name": "disc"}, {"id": 3, "name": "bar"}]
    if lvis:
        for image in images:
            image["coco_url"] = f"http://host/val/{image['file_name']}"
            image |= {"neg_category_ids": [1], "not_exhaustive_category_ids": [3]}
        for category in categories:
            category.update(frequency="r", image_count=2)
    annotations = [annotation | {"id": first_id + k} for k, annotation in enumerate(objects)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    return copy.deepcopy(content)


def draw_images(folder: Path, first_id: int = 1) -> None:
    """Write the image files of a document."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(3):
        rng = np.random.default_rng(first_id + k)
        pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{first_id + k}.png")


def results(lvis: bool = False) -> list[dict]:
    """Return a result with a box and a mask for each object of the document."""
    keys = ("image_id", "category_id", "bbox", "segmentation")
    objects = document(lvis=lvis)["annotations"]
    return [{key: annotation[key] for key in keys} | {"score": 0.5} for annotation in objects]


LARGE = [2**16, 2**31, 2**32, 2**63, -(2**63) - 1, 1e10, 1e39, 1e308, -1e308, 5e-324, 10**400]
OTHERS = [True, 1.0, 1.5, float("nan"), float("inf"), -float("inf")]
NUMBERS = st.one_of(st.integers(-3, 70), st.floats(-70, 140), st.sampled_from(LARGE + OTHERS))
WORDS = ["", "0", "1", "disc", "r", "ä", "NaN"]
ODD_WORDS = ["a\0b", "\ud800", "\udcff", "é" * 300, "x\ny", "\x7f"]
PATHS = ["1.png", "../1.png", "/etc/passwd", "val/1.png"]
ADDRESSES = ["http://a/b/../1.png", "http://host/val/2.png"]
CODES = ["0`1`n2", "0`1`n3", "PP", "o" * 9]  # compressed RLEs, valid and not
TEXT = st.sampled_from(WORDS + ODD_WORDS + PATHS + ADDRESSES + CODES)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
SIDES = [[WIDTH, HEIGHT], [48.0, 64], [True, 1], [2**16, 2**16], [0, 0], [3072], None]
RUNS = [[3072], [0, 0, 3072, 0], [0, 3072], [2**32], [3072.0], [[3072]], None]
RLES = st.builds(
    lambda size, counts: {"size": size, "counts": counts},
    st.sampled_from([[HEIGHT, WIDTH]] * 4 + SIDES),
    st.one_of(
        TEXT,
        st.text("0123456789`n1PoOlk?", max_size=8),
        st.lists(st.integers(-1, 3072), max_size=4),
        st.sampled_from([*RUNS, [10**400, -(10**400), 3072]]),
    ),
)
POLYGONS = [[[1, 2, 3, 4]], [SQUARE[:-1]], [SQUARE, []], [[0] * 6], [[1e9] * 6], [[-64.0] * 6]]
ODD_SHAPES = [[], [[]], {}, SQUARE, [1, 2, 3, 4], [[[1, 2]] * 3], {"counts": []}]
SHAPES = st.one_of(
    RLES,
    st.lists(st.lists(NUMBERS, min_size=5, max_size=9), max_size=2),
    st.sampled_from(POLYGONS + ODD_SHAPES + [COLUMN, COMPRESSED]),
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
JSON = st.one_of(SCALARS, SHAPES, NESTED)
TOKENS = [b'"', b"[", b"}", b",", b"null", b"NaN", b"1e999", b"-0", b"1", b'"id":', b"\\ud800"]
BYTES = [b"\xff", b"\xef\xbb\xbf", b"\x1f\x8b", b"[" * 2000, b'{"a":' * 500]
PIECES = st.one_of(st.binary(max_size=4), st.sampled_from(TOKENS + BYTES))
CUTS = st.tuples(st.integers(0, 10**6), st.integers(0, 8), PIECES)


@st.composite
def mutated(draw: st.DrawFn, sound: dict | list, most: int = 3) -> dict | list:
    """Generate the content with up to `most` changes."""
    content = copy.deepcopy(sound)
    for _ in range(draw(st.sampled_from(range(1, most + 1)))):
        places = list(_places(content))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["like", "like", "replace", "delete", "double", "swap"]))
        if action == "delete":
            del holder[key]
        elif action == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif action == "swap":
            other, its_key = draw(st.sampled_from(places))
            holder[key], other[its_key] = copy.deepcopy(other[its_key]), copy.deepcopy(holder[key])
        else:
            holder[key] = copy.deepcopy(draw(_like(key, holder[key]) if action == "like" else JSON))
    return content


def _like(key: str | int, value: object) -> st.SearchStrategy:
    """Generate values of the kind that the key holds, else of the type of `value`."""
    if key == "segmentation":
        return SHAPES
    if key == "bbox":
        return st.lists(NUMBERS, min_size=4, max_size=4)
    return NUMBERS if isinstance(value, int | float) else TEXT if isinstance(value, str) else JSON


@st.composite
def files(draw: st.DrawFn, sound: dict | list) -> bytes:
    """Generate damaged JSON files: changed values, duplicate keys, spliced bytes, encodings, other content."""
    kinds = ["values"] * 12 + ["twice", "bytes", "bytes", "code", "anything"]
    change = draw(st.sampled_from(kinds))
    content = draw(JSON if change == "anything" else mutated(sound))
    text = json.dumps(content)
    if change == "twice" and isinstance(content, dict) and content:
        text = f"{text[:-1]}, {json.dumps(draw(mutated(sound, 1)))[1:]}"
    if change == "bytes":
        return draw(spliced(json.dumps(sound).encode()))
    codes = ["utf-8-sig", "utf-16", "utf-32"] if change == "code" else ["utf-8"]
    return text.encode(draw(st.sampled_from(codes)))


def spliced(sound: bytes) -> st.SearchStrategy[bytes]:
    """Generate the file's bytes with a few pieces removed and others inserted."""

    def cut(cuts: list[tuple[int, int, bytes]]) -> bytes:
        data = sound
        for place, length, put in cuts:
            place %= len(data) + 1
            data = data[:place] + put + data[place + length :]
        return data

    return st.lists(CUTS, min_size=1, max_size=4).map(cut)


def _places(content: dict | list) -> Iterator[tuple[dict | list, str | int]]:
    """Return the (container, key) of every value."""
    waiting = [content]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
