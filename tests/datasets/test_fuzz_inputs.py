"""Random results files and data sets of other formats: accepted with valid output, or rejected in one line
that names the file. For longer runs, see `test_fuzz_annotations`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.annotations import HEIGHT, WIDTH, document, files, results, spliced
from vitdet.data.check import check
from vitdet.datasets.convert import convert
from vitdet.datasets.importers.dataset import SourceError
from vitdet.evaluation.evaluator import evaluate_results

YAML = "path: .\ntrain: images/train\nval: [images/val]\nnames: {0: no, 1: dog}\n"
LABELS = "1 0.5 0.5 0.2 0.4\n0 0.1 0.2 0.5 0.2 0.5 0.8\n"
XML = (
    "<annotation><filename>a.png</filename><size><width>64</width><height>48</height><depth>3</depth></size><object>"
    "<name>dog</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6.5</ymin><xmax>30</xmax><ymax>40</ymax>"
    "</bndbox></object></annotation>"
)
BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
WORDS = [
    *"nan inf -1 1e999 1e308 1_0 0x10 2 0.5 é ١ ../.. /etc ~ null [ { *x &b; &lt; <!-- ]]>".split(),
    *("<object>", "</object>", "<object><name>cat</name></object>", BOMB),
    *("<?xml version='1.0' encoding='utf-7'?>", "- a", "&x [*x, *x]", "names: []", "names: {1: a}"),
    *("!!python/object/apply:os.system [id]", "nc: 3", "kpt_shape: [1]", "train: [a, b]", "val: 5"),
    *("", "\udcff", "\0", "\n", "\t", ": ", "0 0 0 0 0", "0 1 1 1 1 1 1", "\ufeff"),
]


@st.composite
def texts(draw: st.DrawFn, sound: str) -> bytes:
    """Replace and insert words of the text, or splice its bytes."""
    if draw(st.sampled_from([False, False, False, True])):
        return draw(spliced(sound.encode()))
    text = sound
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        start, length = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 0, 1, 3, 8]))
        text = text[:start] + draw(st.sampled_from(WORDS)) + text[start + length :]
    encodings = ["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"]
    return text.encode(draw(st.sampled_from(encodings)), "replace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with COCO and LVIS annotations, and a data set in YOLO and in VOC format."""
    root = tmp_path_factory.mktemp("inputs")
    for lvis, name in ((False, "coco.json"), (True, "lvis.json")):
        (root / name).write_text(json.dumps(document(lvis=lvis)))
    yolo = [f"yolo/{kind}/{split}" for kind in ("images", "labels") for split in ("train", "val")]
    for place in (*yolo, "voc/Annotations", "voc/JPEGImages", "voc/ImageSets/Main"):
        (root / place).mkdir(parents=True)
    images = ("yolo/images/train/a", "yolo/images/val/b", "voc/JPEGImages/a", "voc/JPEGImages/b")
    for value, place in enumerate(images):
        Image.new("RGB", (WIDTH, HEIGHT), (60 * value, 9, 9)).save(root / f"{place}.png")
    for split, name in (("train", "a"), ("val", "b")):
        (root / "voc" / "ImageSets" / "Main" / f"{split}.txt").write_text(name)
        (root / "voc" / "Annotations" / f"{name}.xml").write_text(XML)
        (root / "yolo" / "labels" / split / f"{name}.txt").write_text(LABELS)
    (root / "yolo" / "data.yaml").write_text(YAML)
    return root


def one_line(root: Path, work: Callable[[], object]) -> object:
    """Return the function's result, or None if it raises a one-line error that names a file."""
    try:
        return work()
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError, SourceError), repr(error)
        several = type(error) is SourceError and "problems, nothing was written\n" in str(error)
        assert str(root) in str(error) and (several or "\n" not in str(error)), repr(error)
        return None


@pytest.mark.parametrize("dataset", ["coco", "lvis"])
@given(content=files(results()))
def test_results_are_scored_or_rejected(folder: Path, dataset: str, content: bytes) -> None:
    path = folder / "results.json"
    path.write_bytes(content)
    figures = one_line(folder, lambda: evaluate_results(path, folder / f"{dataset}.json", dataset))
    assert figures is None or all(0 <= value <= 100 + 1e-9 for value in figures.values())


@given(content=texts(YAML), labels=texts(LABELS), head=st.booleans())
def test_a_yolo_folder_is_converted_or_rejected(
    folder: Path, content: bytes, labels: bytes, head: bool
) -> None:
    if head:
        converted(folder, "yolo", "data.yaml", content, YAML)
    else:
        converted(folder, "yolo", "labels/train/a.txt", labels, LABELS)


@given(content=texts(XML), ids=texts("a\nb\n"), xml=st.sampled_from([True, True, True, False]))
def test_a_voc_folder_is_converted_or_rejected(
    folder: Path, content: bytes, ids: bytes, xml: bool
) -> None:
    if xml:
        converted(folder, "voc", "Annotations/a.xml", content, XML)
    else:
        converted(folder, "voc", "ImageSets/Main/train.txt", ids, "a")


def converted(root: Path, kind: str, which: str, content: bytes, sound: str) -> None:
    """Convert the data set with this content in one file; assert that no partial output remains."""
    target, path = root / "converted", root / kind / which
    path.write_bytes(content)
    try:
        made = one_line(root, lambda: convert(root / kind, target, kind))
        if made:
            found = {finding.kind for finding in check(target).errors}
            assert found <= {"no objects", "same image file in two splits"}, found
        there = {child.name for child in root.iterdir()} - {"results.json"}
        new = ["converted"] if made else []
        assert there == {"coco.json", "lvis.json", "yolo", "voc", *new}
    finally:
        path.write_text(sound)
        shutil.rmtree(target, ignore_errors=True)
