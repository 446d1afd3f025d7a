"""A file or folder that is whole or not there: it is written beside its place and takes its name when it is complete.

A full disk or a kill so leaves the old one, and readers never see half of the new one. What a killed process leaves
under a temporary name is removed by the next one that writes into the folder: the name identifies the process.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import socket
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

# .NAME.MACHINE-PID-START.tmp, also with random letters before .tmp; version 0.1: .NAME.PID.tmp
TEMPORARY = re.compile(r"\..+\.(?:([0-9a-f]{8})-(\d+)-(\d+)(?:\.\w+)?|\d+)\.tmp")
DEAD_SECONDS = (
    3600  # without a write: the time after which a process on another machine counts as dead
)
CRC_BLOCK = 1 << 20  # bytes of a file that are read at once
CRC_THREADS = 4  # zlib computes without Python's lock
# the errors of a disk that is full, of a file that may not grow, and of a quota
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
log = logging.getLogger(__name__)


@contextmanager
def written(path: Path, sync: bool = False) -> Iterator[Path]:
    """The name under which to write the file; what was written there takes the name `path`, or if that fails is gone.

    The folder is made. sync: the content reaches the disk before its name does, and the name before this returns, for
    when the machine goes down.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_once(path.parent.resolve(), os.getpid())
    temporary = path.with_name(f".{path.name}.{writer()}.tmp")
    try:
        with _named(path):
            yield temporary
            if sync:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
        temporary.replace(path)
        if sync:
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the name to the error of a disk that is full, which the system gives without one."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(descriptor)


@contextmanager
def written_folder(path: Path) -> Iterator[Path]:
    """The same for a folder. Raises OSError in the end where `path` is there and not an empty folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_once(path.parent.resolve(), os.getpid())
    prefix = f".{path.name}.{writer()}."
    temporary = Path(tempfile.mkdtemp(".tmp", prefix, path.parent))
    try:
        temporary.chmod(0o755)
        with _named(path):
            yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left in a folder under temporary names."""
    try:
        with os.scandir(folder) as entries:
            found = [Path(entry.path) for entry in entries if TEMPORARY.fullmatch(entry.name)]
    except OSError:
        return
    for path in filter(is_abandoned, found):
        log.info("%s: removed, its writer was killed", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@cache
def _remove_once(folder: Path, _pid: int) -> None:
    remove_abandoned(folder)


def writer() -> str:
    """Return an identifier of this process among those of all machines: MACHINE-PID-START."""
    return f"{_machine()}-{os.getpid()}-{_start(os.getpid())}"


def is_abandoned(path: Path) -> bool:
    """Whether the process that is named in a temporary name has ended.

    A process of another machine or container cannot be seen from here: it has ended if nothing was written for an hour.
    """
    match = TEMPORARY.fullmatch(path.name)
    if match and match[1] == _machine():
        return _start(int(match[2])) != match[3]
    try:
        newest = max(one.stat().st_mtime for one in (path, *path.rglob("*")))
    except OSError:
        return False  # it is being renamed or removed
    return time.time() - newest > DEAD_SECONDS


@cache
def _machine() -> str:
    """Return 8 hexadecimal digits for the processes that see each other's ids, until the machine is started again."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            continue  # not Linux
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _start(pid: int) -> str:
    """Return when a process started, "" if there is none; "0" where the system does not tell."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]  # a zombie writes no more
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "0"


def write_json(
    path: str | Path, content: object, indent: int | None = 1, sync: bool = False
) -> None:
    """Writes a JSON file, whole or not at all; sync as of `written`."""
    with written(Path(path), sync) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


def write_jpeg(path: Path, image: Image.Image, quality: int, subsampling: int = -1) -> None:
    """Writes an image as JPEG, by way of memory: on a full disk Pillow ends a file early without an error.

    Raises OSError if the disk does not take it.
    """
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, subsampling=subsampling)
    path.write_bytes(content.getvalue())


def damaged_record(path: Path) -> str | None:
    """Return the first record of a zip archive whose content differs from its CRC-32, None if there is none.

    None too if no record matches: it was written without checksums (torch.serialization.set_crc32_options). Raises
    ValueError for a file that is no whole archive. Records are read in several threads: 0.5 s of CPU per GB.
    """
    try:
        with (
            zipfile.ZipFile(path) as archive,
            open(path, "rb") as file,
            ThreadPoolExecutor(min(CRC_THREADS, os.cpu_count() or 1)) as pool,
        ):
            records = archive.infolist()
            whole = list(pool.map(lambda one: _is_whole(archive, file.fileno(), one), records))
    except Exception as error:  # a damaged header raises anything
        if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.EINVAL):
            raise  # says nothing of the content
        raise ValueError(f"not a whole zip archive ({error})") from error
    if not any(whole):
        return None
    return next((one.filename for one, fits in zip(records, whole, strict=True) if not fits), None)


def _is_whole(archive: zipfile.ZipFile, descriptor: int, record: zipfile.ZipInfo) -> bool:
    """Whether the content of a record has its CRC-32. Not mapped: a disk that fails is an error, no signal."""
    try:
        with archive.open(
            record
        ) as content:  # compares the name before the content with the archive's list
            if record.compress_type != zipfile.ZIP_STORED:
                while content.read(CRC_BLOCK):
                    pass
                return True
    except zipfile.BadZipFile:
        return False
    # APPNOTE.TXT 4.3.7: the header of 30 bytes ends with the lengths of the name and of what is between it and the content
    name, extra = struct.unpack("<26xHH", os.pread(descriptor, 30, record.header_offset))
    place = record.header_offset + 30 + name + extra
    left, value = record.file_size, 0
    block = memoryview(bytearray(min(left, CRC_BLOCK)))
    while left:
        count = os.preadv(descriptor, [block[: min(left, CRC_BLOCK)]], place)
        if not count:
            return False
        value = zlib.crc32(block[:count], value)
        place, left = place + count, left - count
    return value == record.CRC


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
