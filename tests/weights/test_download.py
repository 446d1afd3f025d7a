"""Downloads over an unreliable connection: the whole file or a one-line error, without fetching bytes twice."""

from __future__ import annotations

import http.client
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.test_cli import largest_file
from tests.helpers.web import Answer, Web, changed, file, serve, status
from vitdet.datasets.download import Patience, download, mirrored, note

CONTENT = random.Random(0).randbytes(100_000)
OTHER = random.Random(1).randbytes(90_000)
QUICK = Patience(tries=3, pause=0.01, longest_pause=0.05, stall=1.0)
Load = Callable[..., Path]


class Seen:
    """A progress callback that records its calls."""

    def __init__(self) -> None:
        self.all: list[tuple[int, int | None]] = []

    def at(self, done: int, total: int | None) -> None:
        self.all.append((done, total))

    def end(self) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as web:
        web.content = CONTENT
        yield web


@pytest.fixture
def load(web: Web, tmp_path: Path) -> Load:
    """Return a function that downloads from a server with these responses and returns the file."""

    def run(
        *plan: Answer, size: int | None = None, patience: Patience = QUICK, copies: int = 1
    ) -> Path:
        web.plan = list(plan)
        download(f"{web.url}/a/file.pth", tmp_path / "part", Seen(), patience, size, copies)
        return tmp_path / "part"

    return run


def ranges(web: Web) -> list[str | None]:
    return [asked for _, asked in web.asked]


def test_a_file_is_downloaded_by_one_request(web: Web, tmp_path: Path) -> None:
    seen = Seen()
    download(f"{web.url}/a/file.pth", tmp_path / "part", seen, QUICK, 100_000)
    assert (tmp_path / "part").read_bytes() == CONTENT and web.asked == [("/a/file.pth", None)]
    assert seen.all[0] == (0, 100_000) and seen.all[-1] == (100_000, 100_000)
    assert all(a[0] < b[0] for a, b in zip(seen.all, seen.all[1:], strict=False))


def test_a_download_resumes_after_a_dropped_connection(web: Web, load: Load) -> None:
    part = load(file(cut=30_000), file(cut=20_000), file(cut=1), file(cut=1), file(cut=1))
    assert part.read_bytes() == CONTENT and web.sent == 100_000
    assert ranges(web) == [None, *(f"bytes={n}-" for n in (30_000, 50_000, 50_001, 50_002, 50_003))]


@pytest.mark.parametrize(
    "bad",
    [
        file(cut=5_000, stall=True),
        status(500),
        status(503, Retry_After=0),
        status(429),
        file(cut=0),
    ],
    ids=["stall", "500", "503", "429", "nothing"],
)
def test_transient_errors_are_retried(web: Web, load: Load, bad: Answer) -> None:
    assert load(bad, bad).read_bytes() == CONTENT
    assert web.sent == 100_000 and len(web.asked) == 3


def test_a_server_without_progress_is_an_error(web: Web, load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError) as caught:
        load(file(cut=30_000), *[file(cut=0)] * 9)
    cut = "the connection was closed after 30,000 of 100,000 bytes, 3 times in a row"
    kept = "the 30,000 bytes received are kept; run the same command to resume"
    assert str(caught.value) == f"{web.url}/a/file.pth: {cut}; {kept}"
    assert len(web.asked) == 3 and (tmp_path / "part").read_bytes() == CONTENT[:30_000]
    assert load().read_bytes() == CONTENT and web.sent == 100_000


def test_a_download_restarts_if_range_is_ignored(web: Web, load: Load, tmp_path: Path) -> None:
    assert load(file(cut=30_000), file(ranges=False)).read_bytes() == CONTENT
    assert web.sent == 130_000
    (tmp_path / "part").unlink()
    with pytest.raises(
        ConnectionError, match="closed after 40,000 of 90,000 bytes, 3 times in a row"
    ):
        load(changed(OTHER, file(ranges=False, cut=40_000)), *[file(ranges=False, cut=40_000)] * 9)


@pytest.mark.parametrize(
    "then",
    [file(), file(honest=False), file(ranges=False), file(cut=20_000)],
    ids=["If-Range", "ignores If-Range", "ignores Range", "cut again"],
)
def test_parts_of_two_files_are_never_joined(load: Load, then: Answer) -> None:
    assert load(file(cut=30_000), changed(OTHER, then)).read_bytes() == OTHER


def test_a_wrong_or_invalid_range_restarts_the_download(web: Web, load: Load) -> None:
    assert load(file(cut=30_000), file(shift=7)).read_bytes() == CONTENT
    (web.content, web.tag) = (OTHER, '"three"')
    assert load().read_bytes() == CONTENT  # the file is complete: no request is sent
    assert load(file(cut=95_000), status(416)).read_bytes() == CONTENT
    assert ranges(web)[-1] is None


def test_a_download_without_a_validator_starts_again(web: Web, load: Load) -> None:
    assert load(file(cut=30_000, tag=False), file(tag=False)).read_bytes() == CONTENT
    assert ranges(web) == [None, None]


def test_a_weak_etag_is_ignored_but_a_date_is_used(web: Web, load: Load, tmp_path: Path) -> None:
    web.tag, date = 'W/"weak"', "Sun, 22 Nov 2026 10:00:00 GMT"
    assert load(file(cut=30_000), file()).read_bytes() == CONTENT and ranges(web) == [None, None]
    (tmp_path / "part").unlink()
    assert load(file(cut=30_000, date=date), file(date=date)).read_bytes() == CONTENT
    assert ranges(web)[2:] == [None, "bytes=30000-"]


PAGE = status(200, b"<html>log in</html>", Content_Type="text/html")
LONGER = "the server's file has 100,001 bytes, but the published file has 100,000 bytes"
FORBIDDEN = "the server responded with 403 Forbidden (the server denies access to this file)"


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (
            status(404),
            FileNotFoundError,
            "responded with 404 Not Found (no such file on the server)",
        ),
        (status(403), ConnectionError, FORBIDDEN),
        (PAGE, ValueError, "received a web page instead of the file"),
        (file(surplus=1), ValueError, LONGER),
    ],
    ids=["404", "403", "web page", "wrong length"],
)
def test_permanent_errors_are_reported_without_a_retry(
    web: Web, load: Load, tmp_path: Path, answer: Answer, error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        load(answer, size=100_000)
    text = str(caught.value)
    assert says in text and f"{web.url}/a/file.pth" in text and "\n" not in text
    assert len(web.asked) == 1 and not (tmp_path / "part").exists()


def test_fewer_bytes_than_announced_are_a_dropped_connection(load: Load) -> None:
    with pytest.raises(ConnectionError, match="closed after 100,000 of 100,001 bytes"):
        load(*[file(surplus=1)] * 3)


def test_a_refused_connection_is_reported(tmp_path: Path) -> None:
    with serve() as web:
        url = web.url
    with pytest.raises(
        ConnectionError, match="Connection refused.*3 times in a row; nothing was saved"
    ):
        download(url, tmp_path / "part", Seen(), QUICK)


def test_redirects_keep_the_range(web: Web, load: Load) -> None:
    to = status(302, Location=f"{web.url}/signed?key=1")
    assert load(to, file(cut=30_000), to, file()).read_bytes() == CONTENT and web.sent == 100_000
    assert web.asked[-1] == ("/signed?key=1", "bytes=30000-")
    assert json.loads(note(load()).read_text())["url"] == f"{web.url}/a/file.pth"


def test_a_full_disk_keeps_the_downloaded_part(load: Load, web: Web, tmp_path: Path) -> None:
    says = "part: could not be written .*File too large"
    with largest_file(40_000), pytest.raises(OSError, match=says):
        load()
    assert (tmp_path / "part").read_bytes() == CONTENT[:40_000]
    assert load().read_bytes() == CONTENT and ranges(web) == [None, "bytes=40000-"]


def test_free_space_is_checked_before_a_write(
    load: Load, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=199_999))
    with pytest.raises(OSError, match="0.2 MB is needed for 2 files of 0.1 MB, but only 0.2 MB"):
        load(copies=2)
    assert web.sent <= 1000 * 100 and not (tmp_path / "part").exists()


def test_a_mirror_url_keeps_the_path() -> None:
    url = "https://files.example.org/detectron2/ViTDet/model.pkl?v=1"
    for mirror in ("http://inside:8080/weights", "http://inside:8080/weights/"):
        assert mirrored(url, mirror) == "http://inside:8080/weights/detectron2/ViTDet/model.pkl?v=1"
    assert mirrored(url, "https://inside") == "https://inside/detectron2/ViTDet/model.pkl?v=1"
    for mirror in ("inside", "ftp://inside", "/mnt/weights"):
        with pytest.raises(ValueError, match=f"--mirror {mirror}: expected a URL"):
            mirrored(url, mirror)


@pytest.mark.parametrize("known", [True, False])
def test_the_download_ends_after_the_last_byte_of_an_endless_response(
    web: Web, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """There is no Content-Length; the expected size of the file is known or unknown."""
    monkeypatch.setattr("vitdet.datasets.download.LARGEST", 50_000)
    web.content = b"x" * 5_000_000
    size, most = (1000, "1,000") if known else (None, "50,000")
    with pytest.raises(ValueError, match=f"sends more than (the expected )?{most} bytes"):
        load(file(length=False), size=size)
    assert len(web.asked) == 1 and web.sent < 5_000_000
    assert (tmp_path / "part").stat().st_size == 0


@pytest.mark.parametrize("size", [1, 999, 100_000, 1 << 20])
def test_only_one_byte_beyond_the_expected_size_is_read(
    web: Web, load: Load, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    received = []
    read = http.client.HTTPResponse.read1

    def counted(response: http.client.HTTPResponse, most: int) -> bytes:
        chunk = read(response, most)
        received.append(len(chunk))
        return chunk

    monkeypatch.setattr(http.client.HTTPResponse, "read1", counted)
    web.content = b"x" * (size + 3_000_000)
    with pytest.raises(ValueError, match=f"sends more than the expected {size:,} bytes"):
        load(file(length=False), size=size)
    assert sum(received) == size + 1
