"""`vitdet data report`: content of the page, no external requests, and damaged data sets."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from vitdet.datasets.report.charts import count_bins, histogram, ranges
from vitdet.datasets.report.page import LENGTHS, OBJECTS, SIDES
from vitdet.visualize import class_color

Run = Callable[..., tuple[int, str, str]]
VOID = {"meta", "img", "input", "link"}
JPEG = "data:image/jpeg;base64,"


class Tags(HTMLParser):
    """Parser of a page, which requires balanced tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.handle_startendtag(tag, attributes)
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


def test_the_page_shows_the_data_set_without_any_request(
    vitdet: Run, tiny: Path, tmp_path: Path
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in tiny.rglob("*"))
    code, output, errors = vitdet("data", "report", tiny)
    assert (code, errors) == (0, "") and output.startswith("tiny.html: 16 images, ")
    assert sorted((path, path.stat().st_mtime_ns) for path in tiny.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.html"]
    page = (tmp_path / "tiny.html").read_text()
    tags = Tags(page).seen
    for tag, attributes in tags:
        assert tag not in ("script", "iframe", "object")
        assert attributes.get("href", "data:,") == "data:,"
        assert attributes.get("src", JPEG).startswith(JPEG)
    assert "url(" not in page and "http:" not in page and "https:" not in page
    photos = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(photos) == 10  # six of train and four of val
    content = base64.b64decode(photos[0].removeprefix(JPEG))
    assert Image.open(io.BytesIO(content)).format == "JPEG"
    for split in ("train", "val"):
        tree = json.loads((tiny / "annotations" / f"instances_{split}.json").read_text())
        kept = [annotation for annotation in tree["annotations"] if not annotation["iscrowd"]]
        head = f"<tr><th>{split}</th><td>{len(tree['images'])}</td>"
        assert re.search(rf"{head}<td>\d+</td><td>{len(kept)}</td>", page)
        first = tree["categories"][0]
        mine = [annotation for annotation in kept if annotation["category_id"] == first["id"]]
        row = re.search(rf"<tr><th>{first['name']}</th>(.*?)</tr>", page)[1]
        numbers = re.findall(r'<b>(\d+)</b></div></td><td class="n">(\d+)<', row)
        expected = (str(len(mine)), str(len({annotation["image_id"] for annotation in mine})))
        assert numbers[split == "val"] == expected


def test_an_outline_is_drawn_at_its_position(vitdet: Run, own_tiny: Path, tmp_path: Path) -> None:
    def then(tree: dict) -> None:
        head = tree["images"][0]
        # a vertical line in column 20
        counts = [head["height"] * 20 + 10, 30, head["height"] * (head["width"] - 20) - 40]
        tree["images"] = [head]
        common = {"image_id": head["id"], "category_id": 1, "area": 30, "iscrowd": 0}
        line = {"size": [head["height"], head["width"]], "counts": counts}
        corner = [[3, 4, 53, 4, 3, 64]]
        tree["annotations"] = [
            {"id": 1, "bbox": [3, 4, 50, 60], "segmentation": corner, **common},
            {"id": 2, "bbox": [20, 10, 1, 30], "segmentation": line, **common},
        ]

    change(own_tiny, "val", then)
    assert vitdet("data", "report", own_tiny, "--output", "deep/page.html")[0] == 0
    tags = Tags((tmp_path / "deep" / "page.html").read_text()).seen
    masks = [attributes["d"] for tag, attributes in tags if attributes.get("class") == "mask"]
    boxes = [attributes for tag, attributes in tags if attributes.get("class") == "box"]
    corner, line = masks[-2:]
    assert corner == "M3.0,4.0 53.0,4.0 3.0,64.0Z" and boxes[-2]["width"] == "50.0"
    assert [boxes[-1][key] for key in ("x", "y", "width")] == ["20.0", "10.0", "1.0"]
    points = np.array([point.split(",") for point in line.strip("MZ").split()], float)
    assert np.abs(points.min(axis=0) - (20, 10)).max() <= 0.5
    assert np.abs(points.max(axis=0) - (21, 40)).max() <= 0.5
    colors = [attributes.get("style") for tag, attributes in tags if tag == "g"]
    assert f"--c:rgb{class_color(0)}" in colors


def test_names_are_escaped_and_problems_are_shown(
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
    assert code == 0 and "4 errors" in output and Tags(page)
    assert "<script" not in page and "&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;" in page
    assert page.count("truncated or invalid image file") == 1
    assert page.count('<p class="error">') == 4 and "1 of zero size" in page


def test_an_unreadable_split_is_shown(vitdet: Run, own_tiny: Path, tmp_path: Path) -> None:
    change(own_tiny, "val", lambda tree: tree["annotations"][0].update(image_id=-5))
    change(own_tiny, "train", lambda tree: tree.update(annotations=[]))
    assert vitdet("data", "report", own_tiny)[0] == 0
    page = (tmp_path / "own.html").read_text()
    assert "annotation of an unknown image (dropped)" in page
    assert "<td>12</td><td>12</td><td>0</td><td>-</td>" in page


def test_a_folder_without_data_is_rejected_in_one_line(vitdet: Run, tmp_path: Path) -> None:
    code, output, errors = vitdet("data", "report", "nowhere")
    assert (code, output) == (1, "") and not list(tmp_path.iterdir())
    assert errors == (
        "vitdet: nowhere: no annotation file: expected nowhere/annotations/instances_SPLIT.json\n"
    )


def test_values_are_counted_in_bins() -> None:
    assert ranges((1, 2, 3, 5)) == ["0", "1", "2", "3-4", "5+"]
    assert count_bins(np.array([0, 1, 1, 3, 4, 9]), (1, 2, 3, 5)).tolist() == [1, 2, 0, 2, 1]
    assert ranges((8, 16)) == ["<8", "8-15", "16+"]


LETTERS = ImageFont.load_default(11)  # font size of SVG texts in pages/style.css


@pytest.mark.parametrize("edges, borders", [(OBJECTS, False), (SIDES, True), (LENGTHS, True)])
def test_neighboring_labels_do_not_overlap(edges: tuple[int, ...], borders: bool) -> None:
    counts = [("train", np.ones(len(edges) + 1, int))]
    found = histogram("", ranges(edges), counts, "", edges if borders else ()).marks
    ends = [(x - LETTERS.getlength(said) / 2, x + LETTERS.getlength(said) / 2) for x, said in found]
    assert len(found) == len(edges) + (not borders) and ends[0][0] > 0 and ends[-1][1] < 460
    assert all(right[0] - left[1] > 8 for left, right in zip(ends, ends[1:], strict=False))


def test_bins_include_their_lower_edge_only() -> None:
    chart = histogram(
        "", ranges((8, 16)), [("train", count_bins(np.array([3, 8, 8, 20]), (8, 16)))], "", (8, 16)
    )
    (eight, _), (sixteen, _) = chart.marks
    assert [bar.tip.split(": ")[1].split()[0] for bar in chart.bars] == ["1", "2", "1"]
    ends = [(bar.x, bar.x + bar.width) for bar in chart.bars]
    assert ends[0][1] < eight < ends[1][0] < ends[1][1] < sixteen < ends[2][0]
    assert [said for _, said in chart.marks] == ["8", "16"]
