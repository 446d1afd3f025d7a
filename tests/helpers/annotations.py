"""Valid small data sets, and hypothesis strategies for all that can be wrong with them.

A mutation knows the structure: it replaces a value anywhere by any other, takes keys and entries away, doubles and
swaps them; another one cuts and splices the bytes of the file.
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
COMPRESSED = {"size": [HEIGHT, WIDTH], "counts": "0`1`n2"}  # the same


def document(first_id: int = 1, lvis: bool = False) -> dict:
    """Three images with polygons of one and two parts, RLEs of both kinds, a crowd, a box of zero size; two classes."""
    one = {
        "image_id": first_id,
        "iscrowd": 0,
        "category_id": 1,
        "bbox": [10.0, 10.0, 20.0, 20.0],
        "area": 400.0,
    }
    wide = {
        "image_id": first_id + 1,
        "iscrowd": 0,
        "category_id": 3,
        "bbox": [0, 0, 1, HEIGHT],
        "area": HEIGHT,
    }
    objects = [
        one | {"segmentation": [SQUARE]},
        wide | {"segmentation": COLUMN, "iscrowd": int(not lvis)},
        wide
        | {
            "segmentation": [[5.0, 5.0, 5.0, 8.0, 5.0, 6.0]],
            "bbox": [5.0, 5.0, 0.0, 3.0],
            "area": 0.0,
        },
        one | {"segmentation": [SQUARE, SQUARE], "category_id": 3},
        wide | {"segmentation": COMPRESSED},
    ]
    images = [
        {"id": first_id + k, "file_name": f"{first_id + k}.png", "height": HEIGHT, "width": WIDTH}
        for k in range(3)
    ]
    categories = [{"id": 1, "name": "disc"}, {"id": 3, "name": "bar"}]
    if lvis:
        for image in images:
            image.update(
                coco_url=f"http://host/val/{image['file_name']}",
                neg_category_ids=[1],
                not_exhaustive_category_ids=[3],
            )
        for category in categories:
            category.update(frequency="r", image_count=2)
    return copy.deepcopy(
        {
            "images": images,
            "categories": categories,
            "annotations": [one | {"id": first_id + k} for k, one in enumerate(objects)],
        }
    )


def draw_images(folder: Path, first_id: int = 1) -> None:
    """The image files of a document."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(3):
        pixels = np.random.default_rng(first_id + k).integers(
            0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / f"{first_id + k}.png")


def results(lvis: bool = False) -> list[dict]:
    """A result for each object of the document, with box and mask."""
    return [
        {key: one[key] for key in ("image_id", "category_id", "bbox", "segmentation")}
        | {"score": 0.5}
        for one in document(lvis=lvis)["annotations"]
    ]


NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.floats(-70, 140),
    st.sampled_from(
        [
            True,
            1.0,
            1.5,
            2**16,
            2**31,
            2**32,
            2**63,
            -(2**63) - 1,
            1e10,
            1e39,
            1e308,
            -1e308,
            5e-324,
            10**400,
            float("nan"),
            float("inf"),
            -float("inf"),
        ]
    ),
)
TEXT = st.sampled_from(
    [
        "",
        "1",
        "disc",
        "1.png",
        "../1.png",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "\udcff",
        "é" * 300,
        "x\ny",
        "val/1.png",
        "NaN",
        "http://a/b/../1.png",
        "http://host/val/2.png",
        "0`1`n2",
        "0`1`n3",
        "PP",
        "o" * 9,
        "\x7f",
        "0",
        "r",
        "ä",
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
RLES = st.builds(
    lambda size, counts: {"size": size, "counts": counts},
    st.sampled_from(
        [[HEIGHT, WIDTH]] * 4
        + [[WIDTH, HEIGHT], [48.0, 64], [True, 1], [2**16, 2**16], [0, 0], [3072], None]
    ),
    st.one_of(
        TEXT,
        st.text("0123456789`n1PoOlk?", max_size=8),
        st.lists(st.integers(-1, 3072), max_size=4),
        st.sampled_from(
            [
                [3072],
                [0, 0, 3072, 0],
                [0, 3072],
                [2**32],
                [3072.0],
                [[3072]],
                [10**400, -(10**400), 3072],
                None,
            ]
        ),
    ),
)
SHAPES = st.one_of(
    RLES,
    st.lists(st.lists(NUMBERS, min_size=5, max_size=9), max_size=2),
    st.sampled_from(
        [
            [],
            {},
            [[]],
            [[1, 2, 3, 4]],
            [SQUARE[:-1]],
            [SQUARE, []],
            [[0] * 6],
            [[1e9] * 6],
            [[-64.0] * 6],
            COLUMN,
            COMPRESSED,
            SQUARE,
            [1, 2, 3, 4],
            [[[1, 2]] * 3],
            {"counts": []},
        ]
    ),
)
JSON = st.one_of(
    SCALARS,
    SHAPES,
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3)
        ),
        max_leaves=6,
    ),
)
CUTS = st.tuples(
    st.integers(0, 10**6),
    st.integers(0, 8),
    st.one_of(
        st.binary(max_size=4),
        st.sampled_from(
            [
                b'"',
                b"[",
                b"}",
                b",",
                b"null",
                b"\xff",
                b"\xef\xbb\xbf",
                b"NaN",
                b"1e999",
                b'"id":',
                b"[" * 2000,
                b'{"a":' * 500,
                b"\\ud800",
                b"\x1f\x8b",
                b"-0",
                b"1",
            ]
        ),
    ),
)


@st.composite
def mutated(draw: st.DrawFn, sound: dict | list, most: int = 3) -> dict | list:
    """The content with up to `most` changes anywhere in it."""
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
    """Values of the same kind."""
    if key == "segmentation":
        return SHAPES
    if key == "bbox":
        return st.lists(NUMBERS, min_size=4, max_size=4)
    return NUMBERS if isinstance(value, int | float) else TEXT if isinstance(value, str) else JSON


@st.composite
def files(draw: st.DrawFn, sound: dict | list) -> bytes:
    """A file that was JSON of the content: values changed, keys written twice, bytes cut and spliced, recoded."""
    kinds = ["values"] * 12 + ["twice", "bytes", "bytes", "code", "anything"]
    change = draw(st.sampled_from(kinds))
    content = draw(JSON if change == "anything" else mutated(sound))
    text = json.dumps(content)
    if change == "twice" and isinstance(content, dict) and content:
        text = f"{text[:-1]}, {json.dumps(draw(mutated(sound, 1)))[1:]}"
    if change == "bytes":
        return draw(spliced(json.dumps(sound).encode()))
    return text.encode(
        draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-32"])) if change == "code" else "utf-8"
    )


def spliced(sound: bytes) -> st.SearchStrategy[bytes]:
    """The bytes of a file with a few pieces cut out and others put in."""

    def cut(cuts: list[tuple[int, int, bytes]]) -> bytes:
        data = sound
        for place, length, put in cuts:
            place %= len(data) + 1
            data = data[:place] + put + data[place + length :]
        return data

    return st.lists(CUTS, min_size=1, max_size=4).map(cut)


def _places(content: dict | list) -> Iterator[tuple[dict | list, str | int]]:
    """Every (holder, key) in it."""
    waiting = [content]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
