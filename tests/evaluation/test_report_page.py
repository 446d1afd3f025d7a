"""The report page: its content, no external requests, and its behavior in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitdet.evaluation.analysis import Analysis, ClassResult, Confusion, ImageResult, Threshold
from vitdet.evaluation.errors import TYPES
from vitdet.evaluation.page import Facts, write_page
from vitdet.evaluation.pictures import Images, draw_pairs, images_of
from vitdet.evaluation.results import Truth, read_truth

EVIL = "<script>alert('&')</script>"
RECALLS = [i / 100 for i in range(101)]
LIMIT = 2_000_000  # in bytes


def class_result(name: str, ap: float | None, error: str | None = "missed") -> ClassResult:
    """Return results of a class that follow from its AP; AP None means a class without objects."""
    if ap is None:
        return ClassResult(name, 0, 0, *[None] * 8, [], {}, {}, None)
    errors = dict.fromkeys(TYPES, 1.0) | ({error: 7.25} if error else {})
    curve = [round(ap / 100 * (1 - recall), 3) for recall in RECALLS]
    values = [ap] * 7 + [Threshold(0.5, 0.6, 0.7, 0.65)]
    counts = dict.fromkeys(TYPES, 4)
    return ClassResult(name, 1200, 30, *values, curve, errors, counts, error)


def analysis(kind: str, classes: list[ClassResult], image_ids: list[int] = []) -> Analysis:  # noqa: B006
    names = [*[row.name for row in classes][:30], "background"]
    images = [ImageResult(image_id, f"{image_id}.jpg", 0.25, 3, 2, 2, 1) for image_id in image_ids]
    aps = [row.ap for row in classes if row.ap is not None]
    mean = sum(aps) / len(aps)
    special = {"background": 9.5, "false_positive": 3.0, "false_negative": 4.0}
    return Analysis(
        kind=kind,
        metrics={"ap": mean, "ap50": mean, "ap_small": mean, "ar_1": 1.0, "ar_300": mean},
        classes=classes,
        curves=dict.fromkeys(("0.5", "0.75", "mean"), RECALLS[::-1]),
        thresholds=[Threshold(i / 100, i / 100, 1 - i / 100, 0.5) for i in range(1, 100)],
        best_threshold=Threshold(0.5, 0.5, 0.5, 0.5),
        errors=dict.fromkeys(TYPES, 2.0) | special,
        error_counts=dict.fromkeys(TYPES, 1234),
        confusion=Confusion(0.5, names, [[1] * len(names)] * len(names), len(classes)),
        worst=images,
        best=images[::-1],
    )


FACTS = Facts("Mask R-CNN on val", {"Images": "2", "Objects": "3", "Classes": "3"}, {"Step": "9"})
CLASSES = [
    class_result("star", 40.0),
    class_result(EVIL, 12.34, "classification"),
    class_result("ring", None),
    class_result("box", 8.0, "localization"),
]


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    """Two images in COCO's layout; the second file is missing."""
    (tmp_path / "val").mkdir()
    Image.new("RGB", (100, 60), "white").save(tmp_path / "val" / "1.jpg")
    triangle = [[10, 10, 50, 10, 10, 50]]
    shared = {"category_id": 5, "area": 800, "segmentation": triangle, "bbox": [10, 10, 40, 40]}
    tree = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 60} for i in (1, 2)],
        "categories": [{"id": 5, "name": "star"}],
        "annotations": [
            {"id": 1, "image_id": 1, "iscrowd": 0, **shared},
            {"id": 2, "image_id": 1, "iscrowd": 1, **shared, "bbox": [60, 10, 30, 40]},
        ],
    }
    path = tmp_path / "annotations" / "instances_val.json"
    path.parent.mkdir()
    path.write_text(json.dumps(tree))
    return read_truth(path)


@pytest.fixture
def page(truth: Truth, tmp_path: Path) -> Path:
    """Return a report of boxes and masks with pictures of one image."""
    path = tmp_path / "new" / "report.html"
    analyses = [analysis("box", CLASSES, [1, 2]), analysis("mask", CLASSES[:2])]
    write_page(path, analyses, FACTS, truth, [], images_of(truth.path, "coco"))
    return path


def test_the_summary_names_the_weakest_class_and_its_main_error(page: Path) -> None:
    text = page.read_text().partition("</section>")[0].partition("<body>")[2]
    text = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    assert "box is the weakest class: AP 8.0 with 1,200 objects, mean of all classes 20.1" in text
    assert "Its main error is localization (4 cases)" in text and "AP50 would be 7.2" in text
    assert "ring" not in text


def test_the_page_loads_no_resources_and_escapes_names(page: Path) -> None:
    text = page.read_text()
    assert text.count("<script>") == 1 and "&lt;script&gt;alert(&#39;&amp;&#39;)" in text
    assert not re.search(r"https?:|url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")", text)
    assert set(re.findall(r'(?:src|href)="([^:]*:)', text)) == {"data:"}
    assert "default-src 'none'" in text


def test_a_missing_image_has_no_pictures(page: Path) -> None:
    text = page.read_text()
    assert text.count('src="data:image/jpeg;base64,') == 4  # a pair as worst, a pair as best
    assert "1.jpg" in text and "2.jpg" not in text


@pytest.mark.parametrize("name", [7, None, ["1.jpg"], {}])
def test_an_image_without_a_valid_name_has_no_pictures(truth: Truth, name: object) -> None:
    images = images_of(truth.path, "coco")
    truth.images[2]["file_name"] = name
    assert images and list(draw_pairs(truth, [], [1, 2], 0.5, images)) == [1]
    truth.images[2] |= {"file_name": "1.jpg", "coco_url": name or 7}
    assert list(draw_pairs(truth, [], [1, 2], 0.5, replace(images, lvis=True))) == [1]


def test_without_images_there_are_no_pictures(truth: Truth, tmp_path: Path) -> None:
    write_page(tmp_path / "r.html", [analysis("mask", CLASSES, [1])], FACTS, truth, [], None)
    text = (tmp_path / "r.html").read_text()
    assert "Worst images" not in text and 'type="radio"' not in text and "<dd>9</dd>" in text
    (tmp_path / "some.json").write_text("{}")  # not in a known layout
    assert images_of(tmp_path / "some.json", "coco") is None


def test_the_threshold_is_one_half_without_a_true_positive(truth: Truth, tmp_path: Path) -> None:
    nothing = replace(analysis("box", CLASSES, [1]), best_threshold=None)
    below = {"image_id": 1, "category_id": 5, "score": 0.4, "bbox": [0, 0, 99, 5]}
    pages = []
    for results in ([], [below]):
        images = images_of(truth.path, "coco")
        write_page(tmp_path / "r.html", [nothing], FACTS, truth, results, images)
        pages.append((tmp_path / "r.html").read_text())
    assert pages[0] == pages[1] and "the score threshold 0.50, lowest first" in pages[0]


def test_names_that_are_not_valid_unicode_are_written(truth: Truth, tmp_path: Path) -> None:
    classes = [class_result("\ud800 star", 1.0)]
    write_page(tmp_path / "r.html", [analysis("box", classes)], FACTS, truth, [], None)
    assert "\\ud800 star" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_objects_and_detections_are_drawn_in_place(truth: Truth) -> None:
    mask = {"image_id": 1, "category_id": 5, "segmentation": {"size": [60, 100], "counts": "0"}}
    runs = [0, 60 * 20, 60 * 80]
    results = [
        {"image_id": 1, "category_id": 5, "score": 0.9, "bbox": [60, 10, 30, 40]},
        {"image_id": 1, "category_id": 5, "score": 0.4, "bbox": [0, 0, 99, 5]},
        {**mask, "score": 0.8, "segmentation": {"size": [60, 100], "counts": runs}},
    ]
    images = images_of(truth.path, "coco")
    assert images is not None and images.folder.name == "val"
    ((left, right),) = draw_pairs(truth, results, [1, 2], 0.5, images).values()
    assert max(left.size) == max(right.size) == 520
    drawn = [np.asarray(half.resize((100, 60))).min(axis=2) < 240 for half in (left, right)]
    assert drawn[0][12:40, 12:15].all() and not drawn[0][:, 60:].any()  # crowds are not drawn
    assert drawn[1][20:50, 60].all() and drawn[1][30, 5:15].all()  # a mask without a box
    assert not drawn[1][1:4, 30:55].any()  # below the threshold


def test_the_page_is_small_for_a_data_set_of_coco_s_size(truth: Truth, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    for number in (1, 2):  # with as much detail as photographs
        Image.fromarray(noise).resize((640, 480)).save(tmp_path / "val" / f"{number}.jpg")
        truth.images[number].update(width=640, height=480)
    classes = [class_result(f"class {i}", 30.0 + i / 2) for i in range(80)]
    analyses = [analysis(kind, classes, [1, 2, 1, 2, 1]) for kind in ("box", "mask")]
    images = Images(tmp_path / "val", lvis=False)
    write_page(tmp_path / "r.html", analyses, FACTS, truth, [], images)
    assert 500_000 < (tmp_path / "r.html").stat().st_size < LIMIT


class Browser:
    """A page in Chromium, controlled by DevTools: https://chromedevtools.github.io/devtools-protocol/."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0
        self.events: list[dict] = []

    def __call__(self, method: str, **params: object) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv())).get("id") != self.number:
            self.events.append(message)
        return message["result"]

    def value(self, expression: str) -> Any:
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self("Input.dispatchKeyEvent", type="keyDown", text=text, **shared)
        self("Input.dispatchKeyEvent", type="keyUp", **shared)

    def open(self, path: Path) -> None:
        self("Page.navigate", url=path.as_uri())
        while not (
            self.value("location.protocol") == "file:"
            and self.value("document.readyState") == "complete"
        ):
            pass


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program, websocket = shutil.which("chromium"), pytest.importorskip("websocket")
    if program is None:
        pytest.skip("needs Chromium")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-allow-origins=*"]
    profile = [f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [program, *words, *profile, "about:blank"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        found = (re.search(r"ws://(127\.0\.0\.1:\d+)/", line) for line in process.stderr)
        address = next(groups[1] for groups in found if groups)
        with urllib.request.urlopen(f"http://{address}/json") as answer:
            tabs = json.load(answer)
        url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        socket = websocket.create_connection(url, timeout=60)
        browser = Browser(socket)
        for domain in ("Log", "Runtime", "Page", "Network"):
            browser(f"{domain}.enable")
        yield browser
        socket.close()
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_the_page_works_in_a_browser(browser: Browser, page: Path) -> None:
    browser("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)  # fmt: skip
    browser.open(page)
    assert browser.value("document.documentElement.scrollWidth") == 360

    rows = "[...document.querySelectorAll('main.box .sortable tbody tr')].map(row => row.cells[0].textContent)"
    state = "[...document.querySelectorAll('main.box [aria-sort]')].map(one => [one.textContent.trim(), one.ariaSort])"
    assert browser.value(rows) == ["box", EVIL, "star", "ring"]
    assert browser.value(state) == [["AP", "ascending"]]
    browser.value("document.querySelector('main.box .sortable button').focus()")
    browser.press("Tab", 9)  # to the next column title
    assert browser.value("document.activeElement.textContent") == "AP"
    browser.press("Enter", 13, "\r")
    assert browser.value(rows) == ["star", EVIL, "box", "ring"]  # ring has no objects
    assert browser.value(state) == [["AP", "descending"]]
    browser.value("document.querySelector('main.box .sortable button').focus()")
    browser.press(" ", 32, " ")
    assert browser.value(rows) == [EVIL, "box", "ring", "star"]
    assert browser.value(state) == [["Class", "ascending"]]

    shown = "[...document.querySelectorAll('main')].map(one => one.checkVisibility())"
    assert browser.value(shown) == [True, False]
    browser.value("document.querySelector('#box').focus()")
    browser.press("ArrowRight", 39)
    assert browser.value(shown) == [False, True]

    light = browser.value("getComputedStyle(document.body).backgroundColor")
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser("Emulation.setEmulatedMedia", features=[dark])
    assert browser.value("getComputedStyle(document.body).backgroundColor") != light

    sent = [event for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    urls = [request["params"]["request"]["url"] for request in sent]
    assert [url for url in urls if not url.startswith("data:")] == [page.as_uri()]
    wrong = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert not [event for event in browser.events if event["method"] in wrong]
