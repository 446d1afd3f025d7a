"""COCO and LVIS downloads over an unreliable connection: the standard layout or a one-line error."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.helpers.web import Handler, Web, file, status
from vitdet.data import download_record

TRAIN, VAL = "/zips/train2017.zip", "/zips/val2017.zip"
BOTH = "/annotations/annotations_trainval2017.zip"
Fetch = Callable[..., bool]


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def expected(content: bytes, folder: str) -> dict[str, bytes]:
    """Return the content of an archive's files by their paths below the root."""
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        return {
            f"{folder}/{name.split('/')[-1]}": opened.read(name)
            for name in opened.namelist()
            if not name.endswith("/") and "captions" not in name
        }


def check(root: Path, web: Web) -> None:
    """Assert that root contains all of COCO and nothing else."""
    wanted = {}
    for path, folder in ((TRAIN, "train2017"), (VAL, "val2017"), (BOTH, "annotations")):
        wanted |= expected(web.files[path], folder)
    assert len(wanted) == 26 and tree(root) == {*wanted, "manifest.json"}
    assert all((root / name).read_bytes() == content for name, content in wanted.items())
    download_record.verify(root, contents=True)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def until(happened: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Wait until the condition holds or the process has ended; pytest-timeout ends a test that hangs."""
    while not happened() and (process is None or process.poll() is None):
        time.sleep(0.01)
    assert happened(), process and process.communicate()


def asked(web: Web) -> list[str]:
    return sorted(path for path, _ in web.asked)


def test_coco_is_complete_and_fetched_only_once(get: Fetch, web: Web, root: Path) -> None:
    assert get() is True
    check(root, web)
    assert asked(web) == [BOTH, TRAIN, VAL]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert get() is False and len(web.asked) == 3
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_lvis_uses_the_same_images(get: Fetch, web: Web, root: Path) -> None:
    get()
    web.asked.clear()
    assert get("lvis") is True
    assert asked(web) == ["/LVIS/lvis_v1_train.json.zip", "/LVIS/lvis_v1_val.json.zip"]
    stems = ("instances_train2017", "instances_val2017", "lvis_v1_train", "lvis_v1_val")
    assert sorted(path.stem for path in (root / "annotations").iterdir()) == list(stems)
    assert get("lvis") is False and get() is False and len(download_record.read(root).archives) == 5


def test_splits_can_be_fetched_separately(get: Fetch, web: Web, root: Path) -> None:
    get(split="val")
    assert asked(web) == [BOTH, VAL]
    assert {path.name for path in root.iterdir()} == {"val2017", "annotations", "manifest.json"}
    assert [path.name for path in (root / "annotations").iterdir()] == ["instances_val2017.json"]
    assert get(split="val") is False
    get()
    check(root, web)
    assert asked(web) == [BOTH, BOTH, TRAIN, VAL]


@pytest.mark.parametrize(
    "bad",
    [
        [file(cut=9_000), file(cut=3_000)],
        [file(cut=5_000, stall=True)],
        [status(503, Retry_After=0), file(cut=10)],
        [file(cut=9_000), file(ranges=False)],
        [file(cut=9_000, tag=False), file(tag=False)],
        [file(length=False)],
        [file(cut=9_000), file(shift=3)],
    ],
    ids=["cut", "stall", "503", "no Range", "no tag", "no length", "another range"],
)
def test_a_bad_connection_only_takes_longer(get: Fetch, web: Web, root: Path, bad: list) -> None:
    web.plans = {TRAIN: list(bad), VAL: list(bad)}
    get()
    check(root, web)
    assert web.plans == {TRAIN: [], VAL: []}


def wrong(to: Handler) -> None:
    """Respond with other bytes of the same length."""
    to.begin(200, Content_Length=len(to.server.files[TRAIN]))
    to.body(bytes(len(to.server.files[TRAIN])))


OTHER = "sha256 .*, expected .*: not the published train2017.zip; the download was removed"


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [(wrong, ValueError, OTHER), (status(404), FileNotFoundError, "404 Not Found")],
    ids=["wrong bytes", "404"],
)
def test_a_bad_archive_is_rejected_and_the_others_are_kept(
    get: Fetch, web: Web, root: Path, bad: Callable, error: type[Exception], says: str
) -> None:
    web.plans = {TRAIN: [bad]}
    with pytest.raises(error, match=says) as caught:
        get()
    assert str(caught.value).startswith(f"{web.url}{TRAIN}: ") and "\n" not in str(caught.value)
    # nothing is extracted before everything is verified
    assert all(name.startswith(".archives/") for name in tree(root))
    get()
    check(root, web)


def test_a_failure_stops_the_other_downloads(get: Fetch, web: Web, root: Path) -> None:
    def late(to: Handler) -> None:
        until(lambda: size(root / ".archives" / "train2017.zip.part") == 5_000)
        status(404)(to)

    web.plans = {TRAIN: [file(cut=5_000, stall=True), *[file(cut=0)] * 9], BOTH: [late]}
    with pytest.raises(FileNotFoundError, match="404"):
        get()
    assert len(web.plans[TRAIN]) > 0  # stopped before the last attempt
    web.plans.clear()
    get()
    check(root, web)
    assert (TRAIN, "bytes=5000-") in web.asked


SCRIPT = """
import importlib.machinery, logging, os, sys, types
import vitdet
package = types.ModuleType("vitdet.data")  # without the loader's torch, which takes seconds
package.__path__ = [os.path.join(vitdet.__path__[0], "data")]
sys.modules["vitdet.data"] = package
from pathlib import Path
from tests.helpers.archives import miniatures
from vitdet.datasets import extract, fetch
from vitdet.datasets.download import Patience
class Quiet:
    def at(self, done, total): pass
    def end(self): pass
if len(sys.argv) > 3:
    def unpacked(opened, info, path, temporary, write=extract._write):
        if path.name == sys.argv[3]:
            temporary.write_bytes(b"half")
            print("here", flush=True)
            import time; time.sleep(600)
        write(opened, info, path, temporary)
    extract._write = unpacked
logging.basicConfig(level=logging.INFO)
url, root = sys.argv[1], Path(sys.argv[2])
print(fetch.fetch(miniatures("coco")[0], root, lambda _: Quiet(), url, patience=Patience(stall=600)))
"""


def start(web: Web, root: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, web.url, str(root), *words],
        env=environment(root.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_rerun_continues_after_a_kill_at_any_point(web: Web, root: Path) -> None:
    web.plans = {TRAIN: [file(cut=9_000, stall=True)]}
    process = start(web, root)
    part, val = (root / ".archives" / name for name in ("train2017.zip.part", "val2017.zip"))
    until(lambda: size(part) == 9_000 and size(val), process)
    kill(process)
    # this process stops while it writes image 5 of each folder
    process = start(web, root, "000000000005.jpg")
    assert process.stdout.readline().startswith("here")
    assert (TRAIN, "bytes=9000-") in web.asked
    # wait for the other folder
    until(lambda: (root / ".train2017.part" / "000000000004.jpg").exists(), process)
    kill(process)
    assert not (root / "train2017").exists()
    web.asked.clear()
    two = [start(web, root), start(web, root)]  # one waits and finds everything complete
    said = sorted(process.communicate()[0] for process in two)
    assert said == ["False\n", "True\n"] and web.asked == []
    check(root, web)
