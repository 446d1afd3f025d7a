"""Atomic writes, exclusive locks and checksums of files.

Files and folders are written under a temporary name in the same folder and renamed when complete.
The previous version therefore remains if the process fails or is killed, and readers never see a
partial file. Temporary names identify the writing process; the next writer in the folder removes
the temporary files of processes that have ended.

The kernel releases a lock when the process that holds it ends, even after SIGKILL. filelock opens
the file for writing, as NFSv4 requires, and closes the file in forked processes, so that workers of
a data loader do not keep the lock of a killed training run.
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
import unicodedata
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

# temporary name: .NAME.MACHINE-PID-START[.RANDOM].tmp; in version 0.1: .NAME.PID.tmp
TEMPORARY = re.compile(r"\..+\.(?:([0-9a-f]{8})-(\d+)-(\d+)(?:\.\w+)?|\d+)\.tmp")
# a process on another machine is assumed to have ended this many seconds after its last write
DEAD_SECONDS = 3600
CRC_BLOCK = 1 << 20  # bytes per read
CRC_THREADS = 4  # zlib releases the GIL
# errors due to a full disk, a file size limit or a disk quota
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# errors of flock on Lustre without the flock mount option, NFS without lockd and some FUSE mounts
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
UNSUPPORTED |= {errno.EINVAL, errno.EBADF, errno.ENOTTY}
POLL_SECONDS = 0.2
_warned: set[str] = set()  # not empty after this process has warned about missing locks
log = logging.getLogger(__name__)


def folded(name: str) -> str:
    """Return a text that is equal for file names that some file systems do not distinguish."""
    return unicodedata.normalize("NFC", name).casefold()


def make_parent(path: Path) -> None:
    """Create the parent folder of a file to be written; raises OSError if `path` is a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


@contextmanager
def atomic_write(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` on success and removed on an error.

    Raises the errors of `make_parent`. If `sync`, calls fsync on the content before the rename and
    on the folder afterwards.
    """
    make_parent(path)
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
    """Add the file name to errors due to a full disk, which do not contain the name."""
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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # fsync of a folder is unsupported
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` on success and removed on an error.

    If `path` is a link, its target is written. Raises OSError if `path` is a mount point or the
    current folder, or on exit if `path` exists and is not an empty folder.
    """
    place = path.resolve()
    if place.exists() and (place.is_mount() or place.samefile(".")):
        kind = "a mount point or the current folder"
        raise OSError(f"{path}: {kind} cannot be replaced; choose a new folder in it")
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_once(place.parent, os.getpid())
    temporary = Path(tempfile.mkdtemp(".tmp", f".{place.name}.{writer()}.", place.parent))
    try:
        temporary.chmod(0o755)
        with _named(path):
            yield temporary
        temporary.replace(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files and folders that killed processes left in a folder."""
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
    return f"{_machine()}-{os.getpid()}-{_start_time(os.getpid())}"


def is_abandoned(path: Path) -> bool:
    """Return whether the process that wrote a temporary file or folder has ended.

    A process on another machine or in another container is not visible, and is assumed to have
    ended an hour after its last write.
    """
    match = TEMPORARY.fullmatch(path.name)
    if match and match[1] == _machine():
        return _start_time(int(match[2])) != match[3]
    try:
        newest = max(file.stat().st_mtime for file in (path, *path.rglob("*")))
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


def _start_time(pid: int) -> str:
    """Return a process's start time, "" if it has ended, or "0" if it runs but /proc is missing."""
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
    """Write a JSON file atomically; `sync` is passed to `atomic_write`."""
    with atomic_write(Path(path), sync) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


def write_jpeg(path: Path, image: Image.Image, quality: int, subsampling: int = -1) -> None:
    """Write an image as JPEG. Raises OSError on failure.

    Encodes in memory first, since on a full disk, Pillow truncates the file without an error.
    """
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, subsampling=subsampling)
    path.write_bytes(content.getvalue())


def damaged_record(path: Path) -> str | None:
    """Return the name of the first record in a zip archive that does not match its CRC-32.

    Returns None if all records match or if no record matches (an archive without checksums, see
    torch.serialization.set_crc32_options). Raises ValueError if the archive is incomplete.
    """
    workers = min(CRC_THREADS, os.cpu_count() or 1)
    try:
        with (
            zipfile.ZipFile(path) as archive,
            open(path, "rb") as file,
            ThreadPoolExecutor(workers) as pool,
        ):
            records = archive.infolist()
            descriptor = file.fileno()
            intact = list(pool.map(lambda record: _is_intact(archive, descriptor, record), records))
    except Exception as error:  # a damaged header can cause any exception
        if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.EINVAL):
            raise  # an error unrelated to the content, e.g. too many open files
        raise ValueError(f"not a complete zip archive ({error})") from error
    if not any(intact):
        return None
    return next((item.filename for item, ok in zip(records, intact, strict=True) if not ok), None)


def _is_intact(archive: zipfile.ZipFile, descriptor: int, record: zipfile.ZipInfo) -> bool:
    """Return whether the content of a record matches its CRC-32.

    Reads the file instead of mapping it, so that an I/O error raises OSError, not SIGBUS.
    """
    try:
        # `open` also compares the names in the local header and the central directory
        with archive.open(record) as content:
            if record.compress_type != zipfile.ZIP_STORED:
                while content.read(CRC_BLOCK):
                    pass
                return True
    except zipfile.BadZipFile:
        return False
    # APPNOTE.TXT 4.3.7: the local header of 30 bytes ends with the lengths of name and extra field
    name, extra = struct.unpack("<26xHH", os.pread(descriptor, 30, record.header_offset))
    offset = record.header_offset + 30 + name + extra
    left, value = record.file_size, 0
    block = memoryview(bytearray(min(left, CRC_BLOCK)))
    while left:
        count = os.preadv(descriptor, [block[: min(left, CRC_BLOCK)]], offset)
        if not count:
            return False
        value = zlib.crc32(block[:count], value)
        offset, left = offset + count, left - count
    return value == record.CRC


def sha256(path: str | Path) -> str:
    """Return a file's SHA-256 digest in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, waiting: str | None = None, remove: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if it does not exist.

    If another process holds the lock, logs the message `waiting` and waits, or raises
    BlockingIOError if `waiting` is None. If `remove`, removes the file afterwards. On file systems
    without locks, logs one warning per process and continues without a lock.
    """
    # filelock's soft fallback would leave the lock file of a killed process behind
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
        _warn_unsupported(path.parent, error)
    try:
        yield
    finally:
        # remove the file before releasing the lock, so that a waiting process locks a new file
        if remove:
            path.unlink(missing_ok=True)
        if lock.is_locked:
            lock.release()


def _warn_unsupported(folder: Path, error: OSError) -> None:
    if _warned:
        return
    _warned.add(str(folder))
    log.warning(
        "%s: this file system does not support locks (%s); vitdet cannot detect concurrent "
        "processes that write the same output, send the same run to MLflow, download the same file "
        "or promote a champion: do not start the same command twice",
        folder,
        error.strerror or error,
    )


def parse_yaml(text: str) -> object:
    """Parse YAML text. Raises ValueError with a one-line message for invalid YAML."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("invalid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: e.g. an invalid date
        raise ValueError(f"invalid YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path, expected: str = "YAML") -> Any:
    """Read a YAML file without converting scalars, since a class may be named "no".

    Raises FileNotFoundError, or ValueError with the text "not {expected}" for invalid YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not {expected}: {' '.join(str(error).split())}") from error


def first_line(error: object) -> str:
    """Return the first line of an error's message (at most 120 characters), or the error's type."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
