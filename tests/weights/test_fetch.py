"""Fetching published weights: complete or absent, even if a process is killed."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.test_cli import largest_file
from tests.conftest import environment
from tests.helpers.runs import refused
from tests.helpers.web import Web, file, serve, status
from tests.weights.test_download import QUICK, Seen
from vitdet.weights.catalogue import Entry
from vitdet.weights.fetch import fetch

CONTENT = random.Random(0).randbytes(100_000)
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()
PART = [".some.part.pth", ".some.part.pth.json"]
Fetch = Callable[..., Path]


def turned(source: Path, target: Path) -> None:
    """Convert a file by reversing its bytes."""
    assert source.suffix == ".pth"
    target.write_bytes(source.read_bytes()[::-1])


def refuse(source: Path, target: Path) -> None:
    target.write_bytes(b"half")
    raise ValueError(f"{source.name}: 3 tensors unknown to this format")


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as web:
        web.content = CONTENT
        yield web


@pytest.fixture
def entry(web: Web) -> Entry:
    url = f"{web.url}/pub/some.pth"
    return Entry("some", "weights", url, "mae", size=len(CONTENT), sha256=SHA256)


@pytest.fixture
def get(entry: Entry, tmp_path: Path) -> Fetch:
    def run(
        convert: Callable[[Path, Path], None] = turned,
        mirror: str = "",
        local: Path | None = None,
        **changes: object,
    ) -> Path:
        changed, here = replace(entry, **changes), tmp_path / "here"
        return fetch(changed, here, convert, Seen(), mirror, local, QUICK)

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_once_and_converted(get: Fetch, web: Web, tmp_path: Path) -> None:
    assert get() == get() == tmp_path / "here" / "some.safetensors"
    assert get().read_bytes() == CONTENT[::-1] and len(web.asked) == 1
    assert names(tmp_path / "here") == ["some.safetensors"]


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"size": 99_999}, "file has 100,000 bytes, but the published file has 99,999"),
        ({"sha256": "0" * 64}, f"sha256 {SHA256}, expected {'0' * 64}: not the published some"),
        ({"sha256": "0000", "md5": MD5}, f"sha256 {SHA256[:4]}, expected 0000"),
        ({"sha256": "", "md5": "00000g"}, f"md5 {MD5[:6]}, expected 00000g: not the published "),
    ],
)
def test_a_file_that_is_not_the_published_file_is_removed(
    get: Fetch, web: Web, tmp_path: Path, known: dict, says: str
) -> None:
    with refused(says):
        get(**known)
    assert not names(tmp_path / "here")
    assert get().is_file()


def test_wrong_bytes_of_equal_length_are_rejected(get: Fetch, web: Web, tmp_path: Path) -> None:
    web.content = CONTENT[:-1] + b"?"
    with pytest.raises(ValueError, match="not the published some; the download was removed"):
        get()
    assert not names(tmp_path / "here")
    web.content, web.tag = CONTENT, '"right"'
    assert get().read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(
    ("known", "notes"),
    [
        ({"md5": MD5[:6]}, 0),
        ({"md5": MD5[:6], "sha256": SHA256[:8]}, 0),
        ({"md5": "abcdef", "md5_of_name": True}, 1),
        ({"md5": MD5[:6], "md5_of_name": True}, 0),
    ],
)
def test_a_checksum_in_the_file_name_is_only_a_hint(
    get: Fetch, caplog: pytest.LogCaptureFixture, known: dict, notes: int
) -> None:
    get(**{"sha256": "", "size": None, **known})
    says = "expected abcdef according to the published file name"
    assert len(caplog.messages) == notes and all(says in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (len(CONTENT), "some: no checksum is published; only the size was verified"),
        (None, "some: neither a checksum nor a size is published; nothing was verified"),
    ],
)
def test_an_unverified_file_is_reported(
    get: Fetch, caplog: pytest.LogCaptureFixture, size: int | None, says: str
) -> None:
    get(sha256="", size=size)
    assert caplog.messages == [says]


def test_a_file_that_cannot_be_converted_is_kept_only_if_verified(
    get: Fetch, web: Web, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="3 tensors unknown to this format; the download was kept"):
        get(refuse)
    assert names(tmp_path / "here") == PART and web.sent == 100_000
    assert get().is_file() and web.sent == 100_000
    get().unlink()
    with pytest.raises(ValueError, match="unknown to this format; the download was removed"):
        get(refuse, sha256="")
    assert not names(tmp_path / "here")


def test_a_local_copy_is_verified_and_converted(get: Fetch, web: Web, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.pth", tmp_path / "other.pth"
    copy.write_bytes(CONTENT)
    other.write_bytes(CONTENT[1:])
    with pytest.raises(ValueError, match="other.pth: 99,999 bytes, expected 100,000: not the pub"):
        get(local=other)
    with pytest.raises(ValueError, match=r"copy.pth: copy.pth: 3 tensors unknown to this format$"):
        get(refuse, local=copy)
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        get(local=tmp_path / "none.pth")
    assert get(local=copy).read_bytes() == CONTENT[::-1] and copy.read_bytes() == CONTENT
    assert names(tmp_path / "here") == ["some.safetensors"] and not web.asked


def test_a_mirror_replaces_the_host(get: Fetch, web: Web) -> None:
    assert get(mirror=f"{web.url}/mirror/", url="https://gone.example.org/pub/some.pth").is_file()
    assert web.asked == [("/mirror/pub/some.pth", None)]


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("dead", r"its link is dead \(https://x/y\); convert your copy .*, or start from other"),
        ("none", "its authors have not published it; convert your copy"),
        ("page", "https://x/y is a page, not a file; download it in a browser, then vitdet"),
    ],
)
def test_a_failed_download_states_the_remedy(
    get: Fetch, tmp_path: Path, state: str, says: str
) -> None:
    with pytest.raises(ValueError, match=f"^some cannot be downloaded: {says}"):
        get(state=state, url="https://x/y")
    assert not (tmp_path / "here").exists()
    (tmp_path / "copy.pth").write_bytes(CONTENT)
    assert get(state=state, url="https://x/y", local=tmp_path / "copy.pth").is_file()


def test_a_full_disk_during_conversion_keeps_the_download(
    get: Fetch, web: Web, tmp_path: Path
) -> None:
    def twice(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes() * 2)

    with largest_file(150_000), pytest.raises(OSError, match="File too large"):
        get(twice)
    assert names(tmp_path / "here") == PART
    assert get(twice).stat().st_size == 200_000 and web.sent == 100_000


def test_a_failure_before_the_first_byte_leaves_no_file(
    get: Fetch, web: Web, tmp_path: Path
) -> None:
    web.plan = [status(404)]
    with pytest.raises(FileNotFoundError, match="404"):
        get()
    assert not names(tmp_path / "here")


def test_concurrent_fetches_download_a_file_once(
    get: Fetch, web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    web.plan = [file(cut=50_000, stall=True)]
    done: list[Path] = []
    threads = [threading.Thread(target=lambda: done.append(get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3 and done[0].read_bytes() == CONTENT[::-1] and web.sent == 100_000
    assert sum("in use by another process; waiting" in text for text in caplog.messages) >= 2


SCRIPT = """
import shutil, sys
from pathlib import Path
from vitdet.datasets.download import Patience
from vitdet.weights.catalogue import Entry
from vitdet.weights.fetch import fetch
class Quiet:
    def at(self, done, total): pass
    def end(self): pass
entry = Entry("some", "weights", sys.argv[1], "mae", sha256=sys.argv[3])
fetch(entry, Path(sys.argv[2]), lambda a, b: shutil.copyfile(a, b), Quiet(), patience=Patience(stall=600))
"""


def test_a_killed_fetch_is_continued_by_the_next(web: Web, tmp_path: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, f"{web.url}/some.pth", str(tmp_path / "here"), SHA256]
    part = tmp_path / "here" / ".some.part.pth"
    web.plan = [file(cut=70_000, stall=True)]
    process = subprocess.Popen(words, env=environment(tmp_path))
    while not (part.exists() and part.stat().st_size == 70_000) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert names(tmp_path / "here") == PART
    (tmp_path / "here" / ".some.tmp").mkdir()
    (tmp_path / "here" / ".some.tmp" / "half").touch()  # as if killed in the conversion
    both = [subprocess.Popen(words, env=environment(tmp_path)) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "here" / "some.safetensors").read_bytes() == CONTENT
    assert web.sent == 100_000 and [asked for _, asked in web.asked] == [None, "bytes=70000-"]
    assert names(tmp_path / "here") == ["some.safetensors"]
