"""Download of one file over unreliable connections.

PATH contains the bytes received so far. PATH.json describes the file on the server: its URL, length
and validator (a strong ETag or, without one, Last-Modified). The next attempt requests the
remaining bytes (Range), provided that the file has not changed (If-Range). If the server sends the
whole file, the download starts over. The download fails after `Patience.tries` consecutive failed
attempts; new data resets the count. See RFC 9110, sections 8.8, 13.1.5 and 14.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import shutil
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen

from vitdet.files import FULL, write_json

CHUNK = 1 << 18  # bytes
LARGEST = 100 * 10**9  # maximum file size in bytes if the expected size is unknown
RETRIED = (408, 425, 429, 500, 502, 503, 504)  # status codes
DENIED = "the server denies access to this file"
REASONS = {
    401: "the file requires a password",
    404: "no such file on the server",
    410: "the file was removed from the server",
}
CHANGED = "the file on the server has changed"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """Retry policy."""

    tries: int = 5  # maximum number of consecutive failed attempts; new data resets the count
    pause: float = 1.0  # seconds to wait after a failure; doubled after each consecutive failure
    longest_pause: float = 60.0  # seconds
    stall: float = 30.0  # seconds without data before an attempt fails


class Watcher(Protocol):
    """Progress display of a download."""

    def at(self, done: int, total: int | None) -> None:
        """Report the number of bytes received, and the total number (None if unknown)."""

    def end(self) -> None:
        """Report the end of an attempt; may be called twice."""


class _Broken(Exception):
    """A failed attempt that may be retried. pause: seconds according to Retry-After, or 0."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class _Origin(NamedTuple):
    """The content of PATH.json; `total` is the length of the file in bytes, None if unknown."""

    url: str
    validator: str
    total: int | None


def download(
    url: str,
    path: Path,
    watcher: Watcher,
    patience: Patience,
    size: int | None = None,
    copies: int = 1,
) -> None:
    """Download a file to `path`, resuming a previous download if possible.

    Args:
        url: the HTTP URL of the file.
        path: the file to write.
        watcher: progress display.
        patience: retry policy.
        size: expected number of bytes; None if unknown.
        copies: number of files of this size that must fit on the disk, including the download.

    Raises:
        ConnectionError, FileNotFoundError: the server does not send the file.
        OSError: the file cannot be written or does not fit on the disk.
        ValueError: the server sends something other than the expected file.
    """
    attempt = _Attempt(url, path, watcher, patience.stall, size, copies)
    furthest, failures = _size(path), 0
    while True:
        try:
            return attempt.run()
        except _Broken as broken:
            received = _size(path)
            failures = 1 if received > furthest else failures + 1
            furthest = max(received, furthest)
            if failures >= patience.tries:
                times = f"{failures} times in a row; {_kept(received)}"
                raise ConnectionError(f"{url}: {broken}, {times}") from broken
            pause = max(patience.pause * 2 ** (failures - 1), broken.pause)
            pause = min(pause, patience.longest_pause)
            watcher.end()
            log.warning("%s: %s; next attempt in %.0f s", path.name, broken, pause)
            time.sleep(pause)
        finally:
            watcher.end()


def mirrored(url: str, mirror: str) -> str:
    """Return the URL on a mirror: MIRROR/PATH, with the path and query of the original URL.

    Raises ValueError for a mirror that is not an HTTP URL.
    """
    base, original = urlsplit(mirror), urlsplit(url)
    if base.scheme not in ("http", "https") or not base.netloc:
        raise ValueError(
            f"--mirror {mirror}: expected a URL such as https://mirror.example.org/weights"
        )
    path = base.path.rstrip("/") + original.path
    return urlunsplit(original._replace(scheme=base.scheme, netloc=base.netloc, path=path))


def discard(path: Path) -> None:
    """Remove PATH.json and truncate PATH to 0 bytes, which keeps a lock on PATH valid."""
    note(path).unlink(missing_ok=True)
    if path.exists():
        os.truncate(path, 0)


def note(path: Path) -> Path:
    """Return the path of PATH.json, which describes the partial download PATH."""
    return path.with_name(f"{path.name}.json")


@dataclass(frozen=True)
class _Attempt:
    url: str
    path: Path
    watcher: Watcher
    stall: float  # seconds
    size: int | None
    copies: int

    def run(self) -> None:
        """Request and receive the missing bytes of the file."""
        received, origin = _size(self.path), _origin(self.path)
        if not received or origin is None or origin.url != self.url:
            received, origin = 0, None
        if origin and received == origin.total:
            return  # the previous attempt was interrupted after the last byte
        request = Request(self.url, headers={"User-Agent": "vitdet", "Accept-Encoding": "identity"})
        if origin:
            request.add_header("Range", f"bytes={received}-")
            request.add_header("If-Range", origin.validator)
        with self.send(request) as response:
            start, total = self.extent(response, received, origin)
            self.check(response, total)
            self.check_space(total, received)
            if not start:
                # first remove the old bytes, which the new PATH.json does not describe
                discard(self.path)
                origin = _Origin(self.url, _validator(response), total)
                write_json(note(self.path), origin._asdict())
            self.receive(response, start, total)
        received = _size(self.path)
        if total is not None and received != total:
            raise _Broken(f"the connection was closed after {received:,} of {total:,} bytes")

    def send(self, request: Request) -> http.client.HTTPResponse:
        """Send the request and return the response, before its body is read."""
        try:
            return urlopen(request, timeout=self.stall)
        except HTTPError as error:
            with error:
                if error.code == 416:  # range not satisfiable
                    discard(self.path)
                    raise _Broken(CHANGED) from error
                text = f"the server responded with {error.code} {error.reason}"
                if error.code in RETRIED:
                    after = error.headers.get("Retry-After", "")
                    raise _Broken(text, float(after) if after.isdigit() else 0.0) from error
                kind = FileNotFoundError if error.code in (404, 410) else ConnectionError
                reason = REASONS.get(error.code, DENIED)
                raise kind(f"{self.url}: {text} ({reason})") from error
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ConnectionError(f"{self.url}: {cause}") from error
            raise self.broken(cause) from error

    def extent(
        self, response: http.client.HTTPResponse, received: int, origin: _Origin | None
    ) -> tuple[int, int | None]:
        """Return the file offset of the response body, and the file's length (None if unknown)."""
        headers = response.headers
        if response.status != 206 or origin is None:
            length = headers.get("Content-Length", "")
            return 0, int(length) if length.isdigit() else None
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        total = int(found[2]) if found and found[2] != "*" else None
        same = _validator(response) in (origin.validator, "")  # some servers ignore If-Range
        if not found or int(found[1]) != received or total != origin.total or not same:
            discard(self.path)
            raise _Broken(CHANGED)
        return received, total

    def check(self, response: http.client.HTTPResponse, total: int | None) -> None:
        """Raise ValueError if the response cannot be the expected file."""
        before, after = (urlsplit(url).scheme for url in (self.url, response.url))
        if before == "https" and after != "https":
            address = f"an unencrypted address ({response.url}), whose content was not used"
            raise ValueError(f"{self.url}: redirects to {address}")
        if response.headers.get_content_type() == "text/html":
            raise ValueError(
                f"{self.url}: received a web page instead of the file (login, proxy or dead link); "
                "download the file with a browser and use --from"
            )
        if self.size is not None and total is not None and total != self.size:
            expected = f"but the published file has {self.size:,} bytes"
            raise ValueError(f"{self.url}: the server's file has {total:,} bytes, {expected}")

    def check_space(self, total: int | None, received: int) -> None:
        """Raise OSError if the missing bytes of `copies` files do not fit on the disk."""
        needed = self.copies * (total or 0) - received
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            size = _bytes(total or 0)
            what = "the file" if self.copies == 1 else f"{self.copies} files of {size}"
            raise OSError(
                f"{self.path.parent}: {_bytes(needed)} is needed for {what}, but only "
                f"{_bytes(free)} is free; free some space or choose another folder"
            )

    def receive(self, response: http.client.HTTPResponse, start: int, total: int | None) -> None:
        """Append the response body to the file, which already contains `start` bytes."""
        done, most = start, LARGEST if self.size is None else self.size
        with open(self.path, "ab", buffering=0) as file:  # a kill would lose buffered data
            try:
                self.watcher.at(done, total)
                # read one byte more than expected, to detect a longer file
                while chunk := self.read(response, min(CHUNK, most - done + 1)):
                    if done + len(chunk) > most:
                        break
                    view = memoryview(chunk)
                    while view:
                        count = file.write(view)  # less than len(view) if the disk is nearly full
                        view, done = view[count:], done + count
                    self.watcher.at(done, total)
            except OSError as error:
                space = "free some space; " if error.errno in FULL else ""
                text = f"could not be written ({error}); {space}{_kept(done)}"
                raise OSError(f"{self.path}: {text}") from error
        if chunk:
            discard(self.path)
            most_bytes = f"{'' if self.size is None else 'the expected '}{most:,} bytes"
            raise ValueError(
                f"{response.url}: the server sends more than {most_bytes}; the received bytes "
                "were discarded"
            )

    def read(self, response: http.client.HTTPResponse, most: int) -> bytes:
        """Read up to `most` bytes of the response body."""
        try:
            return response.read1(most)  # read() would lose bytes received before an error
        except (OSError, http.client.HTTPException) as error:
            raise self.broken(error) from error

    def broken(self, error: object) -> _Broken:
        """Return the exception for a connection error."""
        if isinstance(error, TimeoutError):
            return _Broken(f"no data received for {self.stall:g} s")
        return _Broken(f"the connection failed ({error})")


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _validator(response: http.client.HTTPResponse) -> str:
    """Return the strong ETag or, without one, Last-Modified; '' if the server sends neither."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _kept(received: int) -> str:
    if not received:
        return "nothing was saved"
    return f"the {received:,} bytes received are kept; run the same command to resume"


def _origin(path: Path) -> _Origin | None:
    """Read PATH.json; return None if it is missing, invalid or without a validator."""
    try:
        origin = _Origin(**json.loads(note(path).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return origin if origin.validator else None
