"""`vitdet data report`: content of the page, self-containedness, and damaged data sets."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from vitdet.datasets.report.charts import doubling, ranges
from vitdet.demo.scenes import CATEGORIES
from vitdet.visualize import class_color

Run = Callable[..., tuple[int, str, str]]
VOID = {"meta", "img", "input", "link"}


class Tags(HTMLParser):
    """The tags of a page that must balance."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def change(root: Path, split: str, then: Callable[[dict], None]) -> None:
    path = root / "annotations" / f"instances_{split}.json"
    tree = json.loads(path.read_text())
    then(tree)
    path.write_text(json.dumps(tree))


def test_the_page_tells_what_is_there_and_asks_nobody(
    vitdet: Run, tiny: Path, tmp_path: Path
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in tiny.rglob("*"))
    code, output, errors = vitdet("data", "report", tiny)
    assert (code, errors) == (0, "") and output.startswith("tiny.html: 16 images, ")
    assert sorted((path, path.stat().st_mtime_ns) for path in tiny.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.html"]
    page = (tmp_path / "tiny.html").read_text()
    tags = Tags(page)
    assert not tags.open
    for tag, attributes in tags.seen:
        assert tag not in ("script", "iframe", "object")
        assert attributes.get("href", "data:,") == "data:,"
        assert (
            attributes.get("src", "data:").startswith("data:image/jpeg;base64,")
            or "src" not in attributes
        )
    assert "url(" not in page and "http:" not in page and "https:" not in page
    photos = [attributes["src"] for tag, attributes in tags.seen if tag == "img"]
    assert len(photos) == 10  # six of train, the four of val
    assert Image.open(io.BytesIO(base64.b64decode(photos[0].split(",")[1]))).format == "JPEG"
    for split in ("train", "val"):
        tree = json.loads((tiny / "annotations" / f"instances_{split}.json").read_text())
        kept = [one for one in tree["annotations"] if not one["iscrowd"]]
        assert re.search(
            rf"<tr><th>{split}</th><td>{len(tree['images'])}</td><td>\d+</td><td>{len(kept)}</td>",
            page,
        )
        first = tree["categories"][0]
        mine = [one for one in kept if one["category_id"] == first["id"]]
        row = re.search(rf"<tr><th>{first['name']}</th>(.*?)</tr>", page)[1]
        numbers = re.findall(r'<b>(\d+)</b></div></td><td class="n">(\d+)<', row)
        assert (str(len(mine)), str(len({one["image_id"] for one in mine}))) == numbers[
            split == "val"
        ]


def test_an_outline_is_drawn_where_it_is(vitdet: Run, own_tiny: Path, tmp_path: Path) -> None:
    def then(tree: dict) -> None:
        head = tree["images"][0]
        # a line down in column 20
        counts = [head["height"] * 20 + 10, 30, head["height"] * (head["width"] - 20) - 40]
        tree["images"] = [head]
        tree["annotations"] = [
            {
                "id": 1,
                "image_id": head["id"],
                "category_id": 1,
                "bbox": [3, 4, 50, 60],
                "area": 1500,
                "iscrowd": 0,
                "segmentation": [[3, 4, 53, 4, 3, 64]],
            },
            {
                "id": 2,
                "image_id": head["id"],
                "category_id": 1,
                "bbox": [20, 10, 1, 30],
                "area": 30,
                "iscrowd": 0,
                "segmentation": {"size": [head["height"], head["width"]], "counts": counts},
            },
        ]

    change(own_tiny, "val", then)
    assert vitdet("data", "report", own_tiny, "--output", "deep/page.html")[0] == 0
    page = (tmp_path / "deep" / "page.html").read_text()
    assert (
        'd="M3.0,4.0 53.0,4.0 3.0,64.0Z"/><rect class="box" x="3.0" y="4.0" width="50.0" height="60.0"/>'
        in page
    )
    (path,) = re.findall(r'd="M([^"Z]*)Z"/><rect class="box" x="20.0" y="10.0" width="1.0"', page)
    points = np.array([[float(value) for value in point.split(",")] for point in path.split()])
    assert (
        f'<g style="--c:rgb{class_color(0)}"><title>{CATEGORIES[1]}</title><path class="mask" d="M3.0,4.0'
        in page
    )
    assert (
        np.abs(points.min(axis=0) - (20, 10)).max() <= 0.5
        and np.abs(points.max(axis=0) - (21, 40)).max() <= 0.5
    )


def test_names_are_text_and_problems_are_on_the_page(
    vitdet: Run, own_tiny: Path, tmp_path: Path
) -> None:
    evil = "<script>alert('&')</script>"

    def then(tree: dict) -> None:
        tree["categories"][0]["name"] = evil
        tree["annotations"][0]["bbox"][2] = 0

    for split in ("train", "val"):
        change(own_tiny, split, then)
    for path in (own_tiny / "val").iterdir():
        path.write_bytes(b"no image")
    code, output, _ = vitdet("data", "report", own_tiny, "--images")
    page = (tmp_path / "own.html").read_text()
    assert code == 0 and "4 errors" in output and not Tags(page).open
    assert "<script" not in page and "&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;" in page
    assert page.count("image file that is truncated or no image") == 1
    assert page.count('<p class="error">') == 4 and "1 of zero size" in page


def test_a_split_that_cannot_be_read_is_said(vitdet: Run, own_tiny: Path, tmp_path: Path) -> None:
    change(own_tiny, "val", lambda tree: tree["annotations"][0].update(image_id=-5))
    change(own_tiny, "train", lambda tree: tree.update(annotations=[]))
    assert vitdet("data", "report", own_tiny)[0] == 0
    page = (tmp_path / "own.html").read_text()
    assert "annotation of an image that does not exist (it is left out)" in page
    assert "<td>12</td><td>12</td><td>0</td><td>-</td>" in page


def test_nothing_to_show_is_one_line(vitdet: Run, tmp_path: Path) -> None:
    code, output, errors = vitdet("data", "report", "nowhere")
    assert (code, output) == (1, "") and not list(tmp_path.iterdir())
    assert errors == (
        "vitdet: nowhere: no annotation file: expected nowhere/annotations/instances_SPLIT.json\n"
    )


def test_bins() -> None:
    assert ranges((1, 2, 3, 5)) == ["0", "1", "2", "3-4", "5+"]
    assert doubling(np.array([0, 1, 1, 3, 4, 9]), (1, 2, 3, 5)).tolist() == [1, 2, 0, 2, 1]
    assert ranges((8, 16)) == ["<8", "8-15", "16+"]
