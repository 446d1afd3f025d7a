"""A published file into weights under our names: downloaded or given, verified, converted, put in its place.

FOLDER/NAME.safetensors (a detector: .pt) appears whole or not at all. Beside it FOLDER/.NAME.part.SUFFIX holds a
download that is not complete, or that could not be converted yet; it is locked while a process works on it, so that two
of them download the file once.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from vitdet.datasets.download import Patience, Watcher, discard, download, mirrored
from vitdet.files import written
from vitdet.locks import locked
from vitdet.weights.catalogue import Entry, cache_folder, fetched, trouble

Convert = Callable[[Path, Path], None]  # (the published file, the file to write)
PATIENT = Patience()
log = logging.getLogger(__name__)


class _Silent:
    """Shows nothing of a download."""

    def at(self, done: int, total: int | None) -> None:
        pass

    def end(self) -> None:
        pass


def fetch_published(
    entry: Entry,
    folder: Path | None,
    show: Callable[[str], Watcher] = lambda _: _Silent(),
    mirror: str = "",
    local: Path | None = None,
) -> Path:
    """A file of the catalogue in this folder, or in the cache. A file in the cache is copied, not fetched again.

    show: makes what shows the progress of a download. Raises as `fetch` does.
    """

    def convert(source: Path, target: Path) -> None:
        from vitdet.weights.convert import convert_file

        for line in convert_file(source, target, entry.format, entry.recipe or None):
            log.info(line)

    if is_here(entry) and not local:
        return copy(fetched(entry.name), folder) if folder else fetched(entry.name)
    return fetch(entry, folder or cache_folder(), convert, show(entry.name), mirror, local)


def is_here(entry: Entry) -> bool:
    """Whether the file ships with the package or is in the cache."""
    try:
        fetched(entry.name)
    except FileNotFoundError:
        return False
    return True


def copy(source: Path, folder: Path) -> Path:
    """An atomic copy in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    with written(target) as temporary:
        shutil.copyfile(source, temporary)
    return target


def fetch(
    entry: Entry,
    folder: Path,
    convert: Convert,
    watcher: Watcher,
    mirror: str = "",
    local: Path | None = None,
    patience: Patience = PATIENT,
) -> Path:
    """The file of an entry in this folder; nothing is done if it is there.

    `local`: the published file itself, which is then not downloaded. Raises what `download` raises; ValueError for a
    file that is not the published one, that cannot be converted, or that nobody can download.
    """
    target = folder / entry.file
    if target.is_file():
        return target
    if local is None and not entry.downloadable:
        raise ValueError(f"{entry.name} cannot be downloaded: {trouble(entry)}; {entry.instead}")
    if local is not None and not local.is_file():
        raise FileNotFoundError(f"{local}: no such file (--from)")
    address = "" if local else mirrored(entry.url, mirror) if mirror else entry.url
    folder.mkdir(parents=True, exist_ok=True)
    # readers go by the suffix
    part = folder / f".{entry.name}.part{PurePosixPath(urlsplit(entry.url).path).suffix}"
    with _locked(part):
        if not target.is_file():  # else another process was faster
            if address:
                # it and the converted one
                download(address, part, watcher, patience, entry.size, copies=2)
                log.info("%s: verifying and converting", entry.name)
            _finish(local or part, target, entry, convert, address)
        discard(part)
    return target


def verify(path: Path, entry: Entry) -> None:
    """Raises ValueError if the size or a published checksum of the file is another."""
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        raise ValueError(f"{size:,} bytes, expected {entry.size:,}: not the published {entry.name}")
    for kind, expected in (("sha256", entry.sha256), ("md5", entry.md5)):
        if not expected:
            continue
        with open(path, "rb") as file:
            algorithm = partial(hashlib.new, kind, usedforsecurity=False)
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if found.startswith(expected):
            continue
        text = f"{kind} {found[: len(expected)]}, expected {expected}"
        if kind == "sha256" or not entry.md5_of_name:
            raise ValueError(f"{text}: not the published {entry.name}")
        log.warning(
            "%s: %s by the name of the published file; it may be another one", entry.name, text
        )


def _finish(source: Path, target: Path, entry: Entry, convert: Convert, address: str) -> None:
    """Verifies and converts a complete file. A download (`address`) that proves wrong is not kept for the next time."""
    verified = False
    try:
        verify(source, entry)
        verified = bool(entry.sha256 or entry.md5 and not entry.md5_of_name)
        if not (entry.sha256 or entry.md5):
            log.warning("%s: %s", entry.name, _unverified(entry))
        _place(source, target, convert)
    except ValueError as error:
        if not address:
            raise ValueError(f"{source}: {error}") from error
        if not verified:
            discard(source)
        fate = "kept" if verified else "thrown away"
        raise ValueError(
            f"{entry.name}, from {address}: {error}; the download was {fate}"
        ) from error


def _unverified(entry: Entry) -> str:
    """What was not verified of a file of which no checksum is published."""
    return (
        "neither a checksum nor a size is published; nothing was verified"
        if entry.size is None
        else "no checksum is published; only its size was verified"
    )


def _place(source: Path, target: Path, convert: Convert) -> None:
    """Converts into a folder of its own, where a killed process leaves what the next one removes."""
    workshop = target.with_name(f".{target.stem}.tmp")
    shutil.rmtree(workshop, ignore_errors=True)
    try:
        workshop.mkdir()
        convert(source, workshop / target.name)
        (workshop / target.name).replace(target)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Lock the file of a download, for one process at a time; an empty file does not stay."""
    with locked(part, waiting=f"{part}: another process works on it; waiting"):
        try:
            yield
        finally:
            if part.exists() and not part.stat().st_size:
                discard(part)
                part.unlink()
