"""`vitdet data coco` and `lvis`: output for the user, and the published facts."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.cli.test_cli import largest_file
from tests.helpers.archives import miniatures, path
from tests.helpers.web import Web, status
from vitdet.datasets import published

PART = r"d/\.archives/\w+\.\S*zip\.part"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def web(web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """Replace the published archives by those of the mirror."""
    monkeypatch.setattr(published, "archives", lambda *given: miniatures(*given)[0])
    return web


def test_the_published_files_are_those_of_the_official_sites() -> None:
    """cocodataset.org and lvisdataset.org; each LVIS split needs both image folders."""
    both, train, val = published.archives("coco")
    paths = ["annotations/annotations_trainval2017.zip", "zips/train2017.zip", "zips/val2017.zip"]
    urls = [f"http://images.cocodataset.org/{path}" for path in paths]
    assert [archive.url for archive in (both, train, val)] == urls
    assert (both.size, train.size, val.size) == (252_907_541, 19_336_861_798, 815_585_330)
    files = ("instances_train2017.json", "instances_val2017.json")
    assert both.paths == tuple(f"annotations/{name}" for name in files)
    for dataset, names in (
        ("coco", ["annotations_trainval2017.zip", "val2017.zip"]),
        ("lvis", ["train2017.zip", "val2017.zip", "lvis_v1_val.json.zip"]),
    ):
        assert [archive.name for archive in published.archives(dataset, "val")] == names
    every = published.archives("coco") + published.archives("lvis")
    assert all(len(bytes.fromhex(archive.sha256)) == 32 for archive in every)
    assert len({archive.sha256 for archive in every}) == 5
    assert path(every[-1]) == "/LVIS/lvis_v1_val.json.zip"


def test_only_images_are_extracted_from_an_archive_of_images() -> None:
    train = published.TRAIN2017
    assert train.choose("train2017/000000000009.jpg") == "000000000009.jpg"
    for name in ("val2017/000000000139.jpg", "000000000009.jpg", "train2017/more/000000000009.jpg"):
        with pytest.raises(ValueError, match="expected only files in train2017/"):
            train.choose(name)
    both = published.instances("val")
    assert both.choose("annotations/instances_val2017.json") == "instances_val2017.json"
    for name in ("annotations/instances_train2017.json", "instances_val2017.json"):
        assert both.choose(name) is None


def test_a_fetch_prints_progress_and_a_summary(vitdet: Run, web: Web) -> None:
    code, output, errors = vitdet("data", "coco", "d", "--mirror", web.url, "--split", "val")
    assert (code, output) == (0, "d: val2017 12 images, annotations/instances_val2017.json\n")
    assert "downloading  100%" in errors and "unpacking  100%" in errors
    code, output, errors = vitdet("data", "lvis", "d", "--mirror", web.url, "--keep-archives")
    files = "annotations/lvis_v1_train.json, annotations/lvis_v1_val.json"
    assert (code, output) == (0, f"d: train2017 12 images, val2017 12 images, {files}\n")
    again = vitdet("data", "lvis", "d", "--from", "nowhere")
    assert again == (0, output.replace("\n", ", already complete\n"), "")
    assert len(web.asked) == 5
    # d/archives does not contain COCO's annotations
    assert vitdet("data", "coco", "e", "--from", "d/archives", "--split", "train")[0] == 1
    # val2017.zip was not kept
    assert vitdet("data", "lvis", "e", "--from", "d/archives", "--split", "val")[0] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--mirror", "http://x", "--from", "y"), "--from and --mirror are mutually exclusive"),
        (("--mirror", "x"), "--mirror x: expected a URL such as https://"),
        (
            ("--from", "y"),
            "y: does not contain annotations_trainval2017.zip (http://images.cocodataset.org/",
        ),
    ],
    ids=["both", "mirror", "from"],
)
def test_a_wrong_argument_is_rejected_in_one_line(
    vitdet: Run, web: Web, words: tuple[str, ...], says: str
) -> None:
    code, output, errors = vitdet("data", "coco", "d", *words)
    assert (code, output, errors.count("\n")) == (1, "", 1) and web.asked == []
    assert errors.startswith(f"vitdet: {says}")


def test_a_failure_is_reported_without_a_traceback(vitdet: Run, web: Web, tmp_path: Path) -> None:
    web.plans = {"/zips/val2017.zip": [status(404)]}
    code, _, errors = vitdet("data", "coco", "d", "--mirror", web.url)
    says = f"vitdet: {web.url}/zips/val2017.zip: the server responded with 404 Not Found"
    assert code == 1 and says in errors
    assert "Traceback" not in errors and not (tmp_path / "d" / "manifest.json").exists()


@pytest.mark.parametrize("dataset", ["coco", "lvis"])
@pytest.mark.parametrize(
    ("limit", "local", "says"),
    [
        (10, False, rf"File too large: '{PART}\.json'"),
        (600, False, rf"{PART}: could not be written \(.*the 600 bytes received"),
        (9_000, False, rf"{PART}: could not be written \(.*File too large"),
        (100, True, r"d/\S+\.(jpg|json): could not be extracted \(.*File too large"),
    ],
    ids=["note", "start", "archive", "content"],
)
def test_a_full_disk_names_the_file_and_the_same_command_resumes(
    vitdet: Run, web: Web, tmp_path: Path, dataset: str, limit: int, local: bool, says: str
) -> None:
    for where, content in web.files.items():
        (tmp_path / where.rpartition("/")[2]).write_bytes(content)
    words = ("data", dataset, "d", *(("--from", ".") if local else ("--mirror", web.url)))
    with largest_file(limit):
        code, output, errors = vitdet(*words)
    said = [line for line in errors.splitlines() if line.startswith("vitdet: ")]
    assert (code, output, len(said)) == (1, "", 1) and "Traceback" not in errors
    assert re.match(f"vitdet: .*{says}", said[0])
    left = {child.name for child in (tmp_path / "d").rglob("*") if child.is_file()}
    assert not any(name.endswith((".tmp", ".unpacking", "manifest.json")) for name in left)
    assert vitdet(*words)[0] == 0
    assert not any(name[0] == "." for name in os.listdir("d"))


def test_a_full_disk_while_the_record_is_written_is_reported(
    vitdet: Run, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("data", "coco", "d", "--split", "val", "--mirror", web.url)
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with monkeypatch.context() as patched:
        patched.setattr(os, "sync", full)
        code, output, errors = vitdet(*words)
    said = errors.splitlines()[-1]
    assert (code, output) == (1, "")
    assert said == "vitdet: [Errno 28] No space left on device: 'd/manifest.json'"
    left = sorted(child.name for child in (tmp_path / "d").iterdir() if child.name != ".archives")
    assert left == ["annotations", "val2017"]
    asked = len(web.asked)
    assert vitdet(*words)[0] == 0 and len(web.asked) == asked
    assert sorted(os.listdir("d")) == ["annotations", "manifest.json", "val2017"]
