"""Atomic writes, exclusive locks and checksums of files.

Files and folders are written under a temporary name in the same folder and renamed when complete,
so that after an error or a kill the previous version remains, and readers never see a partial file.
Temporary names identify the writing process; the next writer in a folder removes those of processes
that ended.

The kernel releases a lock when its process ends, even after SIGKILL. filelock opens the file for
writing, as NFSv4 requires, and closes it in forked children, so data-loader workers do not keep the
lock of a killed training run.
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
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from PIL import Image

# .NAME.MACHINE-PID-START.tmp, also with random letters before .tmp; version 0.1: .NAME.PID.tmp
TEMPORARY = re.compile(r"\..+\.(?:([0-9a-f]{8})-(\d+)-(\d+)(?:\.\w+)?|\d+)\.tmp")
# seconds since the last write, after which a process on another machine counts as ended
DEAD_SECONDS = 3600
CRC_BLOCK = 1 << 20  # bytes per read
CRC_THREADS = 4  # zlib releases the GIL
# disk full, file size limit, disk quota
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# flock on Lustre without the mount option flock, on NFS without lockd, and on some FUSE mounts
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
UNSUPPORTED |= {errno.EINVAL, errno.EBADF, errno.ENOTTY}
POLL_SECONDS = 0.2
_warned: set[str] = set()  # once per process
log = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` on success and removed on an error.

    Creates the parent folder. sync: fsync the content before the rename and the folder after it.
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
    """Add the file name to errors of a full disk, which do not contain it."""
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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by all file systems
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Like `atomic_write`, but for a folder.

    Raises OSError on exit if `path` exists and is not an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_once(path.parent.resolve(), os.getpid())
    temporary = Path(tempfile.mkdtemp(".tmp", f".{path.name}.{writer()}.", path.parent))
    try:
        temporary.chmod(0o755)
        with _named(path):
            yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder."""
    try:
        with os.scandir(folder) as entries:
            found = [Path(entry.path) for entry in entries if TEMPORARY.fullmatch(entry.name)]
    except OSError:
        return
    for path in filter(is_abandoned, found):
        log.info("%s: removed the incomplete file of a killed process", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@cache
def _remove_once(folder: Path, _pid: int) -> None:
    remove_abandoned(folder)


def writer() -> str:
    """Return an identifier of this process that is unique across machines: MACHINE-PID-START."""
    return f"{_machine()}-{os.getpid()}-{_start(os.getpid())}"


def is_abandoned(path: Path) -> bool:
    """Return whether the process that a temporary name identifies has ended.

    Processes of other machines or containers are not visible: they count as ended an hour after
    their last write.
    """
    match = TEMPORARY.fullmatch(path.name)
    if match and match[1] == _machine():
        return _start(int(match[2])) != match[3]
    try:
        newest = max(one.stat().st_mtime for one in (path, *path.rglob("*")))
    except OSError:
        return False  # the file is being renamed or removed
    return time.time() - newest > DEAD_SECONDS


@cache
def _machine() -> str:
    """Return 8 hexadecimal digits that identify this PID namespace until the next boot."""
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
    """Return when a process started; "" if it does not exist, "0" if the system has no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]  # a zombie cannot write
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
    """Write a JSON file atomically; sync as in `atomic_write`."""
    with atomic_write(Path(path), sync) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


def write_jpeg(path: Path, image: Image.Image, quality: int, subsampling: int = -1) -> None:
    """Write an image as JPEG; raises OSError if that fails.

    Encodes in memory first, since Pillow truncates the file without an error on a full disk.
    """
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, subsampling=subsampling)
    path.write_bytes(content.getvalue())


def damaged_record(path: Path) -> str | None:
    """Return the first record of a zip archive whose content differs from its CRC-32, or None.

    None also if no record matches: the archive was written without checksums
    (torch.serialization.set_crc32_options). Raises ValueError if the archive is incomplete.
    """
    workers = min(CRC_THREADS, os.cpu_count() or 1)
    try:
        with (
            zipfile.ZipFile(path) as archive,
            open(path, "rb") as file,
            ThreadPoolExecutor(workers) as pool,
        ):
            records = archive.infolist()
            whole = list(pool.map(lambda one: _is_whole(archive, file.fileno(), one), records))
    except Exception as error:  # a damaged header can raise any exception
        if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.EINVAL):
            raise  # e.g. too many open files: unrelated to the content
        raise ValueError(f"not a complete zip archive ({error})") from error
    if not any(whole):
        return None
    return next((one.filename for one, fits in zip(records, whole, strict=True) if not fits), None)


def _is_whole(archive: zipfile.ZipFile, descriptor: int, record: zipfile.ZipInfo) -> bool:
    """Return whether the content of a record matches its CRC-32.

    Reads instead of mapping the file, so that an I/O error raises OSError instead of SIGBUS.
    """
    try:
        # compares the local header's name with the central directory's
        with archive.open(record) as content:
            if record.compress_type != zipfile.ZIP_STORED:
                while content.read(CRC_BLOCK):
                    pass
                return True
    except zipfile.BadZipFile:
        return False
    # APPNOTE.TXT 4.3.7: the local header of 30 bytes ends with the lengths of name and extra field
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
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, waiting: str | None = None, remove: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if it does not exist.

    waiting: message logged before waiting for another process; None: raise BlockingIOError if
    another process holds the lock. remove: remove the file afterwards. On file systems without
    locks the code runs unlocked, after one warning per process.
    """
    # without the soft fallback, which would leave behind the lock file of a killed process
    lock = FileLock(path, fallback_to_soft=False, poll_interval=POLL_SECONDS)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            if waiting is None:
                raise BlockingIOError(f"{path}: locked by another process") from error
            log.info(waiting)
            lock.acquire()
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn(path.parent, error)
    try:
        yield
    finally:
        # before the release, so that a process that waits for this file locks a new file
        if remove:
            path.unlink(missing_ok=True)
        if lock.is_locked:
            lock.release()


def _warn(folder: Path, error: OSError) -> None:
    if _warned:
        return
    _warned.add(str(folder))
    log.warning(
        "%s: this file system does not support locks (%s); concurrent processes that write the "
        "same output, send the same run to MLflow, download the same file or promote a champion "
        "are not detected: do not start the same command twice",
        folder,
        error.strerror or error,
    )


def parse_yaml(text: str) -> object:
    """Return the plain data in a YAML text. Raises ValueError with a one-line message."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("invalid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: e.g. an invalid date, !!int abc
        raise ValueError(f"invalid YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path, expected: str = "YAML") -> Any:
    """Return the content of a file; scalars stay text: a class may be named "no".

    Raises FileNotFoundError, and ValueError if it is not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not {expected}: {' '.join(str(error).split())}") from error


def first_line(error: object) -> str:
    """Return the first line of an error's message, or its type without one."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
