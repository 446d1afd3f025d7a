"""Safe extraction of zip archives into one folder.

All entries are checked before anything is written. The whole archive is rejected if it contains a
path outside the folder, a link, a device, names that some file systems treat as equal, an encrypted
file, a compression method other than stored or deflated, or more files or bytes than allowed. Each
file must have the declared size and CRC-32 (ZIP specification, APPNOTE.TXT 4.4.7). Files are
written atomically. An interrupted extraction can be repeated: complete files are kept.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vitdet.data.download_record import crc32
from vitdet.files import FULL, folded

CHUNK = 1 << 20  # bytes
TEMPORARY = ".unpacking"  # suffix of a file that is being written
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# errors that zipfile raises for an invalid archive
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    UnicodeError,
)


class Limits(NamedTuple):
    """Upper limits on an archive's content."""

    files: int
    size: int  # bytes


class Entry(NamedTuple):
    """An extracted file: its name in the folder, size in bytes, and CRC-32."""

    name: str
    size: int
    crc: int


class _Refused(Exception):
    """Raised for an archive that is rejected."""


def unpack(
    archive: Path,
    folder: Path,
    choose: Callable[[str], str | None],
    limits: Limits,
    seen: Callable[[int], None],
    overwrite: bool,
) -> list[Entry]:
    """Extract the selected files of an archive; return an entry for each file.

    Args:
        archive: the zip archive.
        folder: the target folder.
        choose: maps a name in the archive to the name in the folder, or to None to skip the file.
        limits: upper limits on the content.
        seen: called after each file with the file's size in bytes.
        overwrite: replace existing files that differ; if False, raise ValueError.

    Raises:
        ValueError: the archive is rejected or damaged, or an existing file differs.
        OSError: the files cannot be written.
    """
    found, temporary = [], folder / f".{archive.stem}{TEMPORARY}"
    try:
        with zipfile.ZipFile(archive) as opened:
            chosen = _checked(opened.infolist(), choose, limits)
            folder.mkdir(parents=True, exist_ok=True)
            for info, name in chosen:
                path = folder / name
                _check_parents(path, folder)
                if not _is_complete(path, info, overwrite):
                    _write(opened, info, path, temporary)
                found.append(Entry(name, info.file_size, info.CRC))
                seen(info.file_size)
    except ZIP_ERRORS as error:
        raise ValueError(f"{archive}: not a complete zip archive ({error})") from error
    except _Refused as error:
        raise ValueError(f"{archive}: {error}; the archive was rejected") from error
    finally:
        if not folder.is_symlink():
            temporary.unlink(missing_ok=True)
    return found


def _checked(
    infos: list[zipfile.ZipInfo], choose: Callable[[str], str | None], limits: Limits
) -> list[tuple[zipfile.ZipInfo, str]]:
    """Return the selected files of a valid archive, with their names in the folder."""
    chosen: list[tuple[zipfile.ZipInfo, str]] = []
    for info in infos:
        _check_entry(info)
        name = None if info.is_dir() else choose(info.filename)
        if name is not None:
            _check_name(name)
            chosen.append((info, name))
    count, size = len(chosen), sum(info.file_size for info, _ in chosen)
    if count > limits.files:
        raise _Refused(f"contains {count:,} files, expected at most {limits.files:,}")
    if size > limits.size:
        raise _Refused(f"unpacks to {size:,} bytes, expected at most {limits.size:,}")
    first: dict[str, str] = {}
    for _, name in chosen:
        other = first.setdefault(folded(name), name)
        if other is not name:
            both = f"contains both {other} and {name}"
            raise _Refused(f"{both}, which are the same file on some file systems")
    return chosen


def _check_entry(info: zipfile.ZipInfo) -> None:
    if info.header_offset < 0:
        raise _Refused("not a complete zip archive (its beginning is missing)")
    _check_name(info.orig_filename.removesuffix("/"))
    kind, name = stat.S_IFMT(info.external_attr >> 16), info.filename
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > info.is_dir():
        what = "a link" if kind == stat.S_IFLNK else "not a regular file"
        raise _Refused(f"{name} is {what}")
    if info.flag_bits & 0x1:
        raise _Refused(f"{name} is encrypted")
    if info.compress_type not in METHODS:
        method = f"compression method {info.compress_type}"
        raise _Refused(f"{name} uses {method}, expected stored or deflated")


def _check_name(name: str) -> None:
    """Reject invalid names, and names that some operating systems resolve outside the folder."""
    parts = name.split("/")
    outside = not all(parts) or ".." in parts or "." in parts or "\\" in name or ":" in parts[0]
    if outside or not name.isprintable() or name.endswith(TEMPORARY):
        reason = "which is outside the folder or invalid"
        raise _Refused(f"contains the name {name!r}, {reason}")
    if max(len(part.encode()) for part in parts) > 255:
        raise _Refused(f"contains a name of more than 255 bytes, {name[:40]!r}...")


def _check_parents(path: Path, folder: Path) -> None:
    """Create the parent folders of a file; raise OSError if a parent is a symbolic link."""
    for parent in path.parents:
        if parent.is_symlink():
            raise OSError(
                f"{parent}: symbolic links are not followed; remove the link, or choose the "
                "folder that it points to"
            )
        if parent == folder:
            break
    path.parent.mkdir(parents=True, exist_ok=True)


def _is_complete(path: Path, info: zipfile.ZipInfo, overwrite: bool) -> bool:
    """Return whether a file is already extracted; raise ValueError if `path` is something else."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    regular = stat.S_ISREG(found.st_mode)
    if regular and found.st_size == info.file_size and crc32(path) == info.CRC:
        return True
    if overwrite and regular:
        return False
    what = "exists and differs from the file in the archive"
    raise ValueError(f"{path}: {what}; move it away and repeat the command")


def _write(opened: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, temporary: Path) -> None:
    """Write one file atomically."""
    done, declared = 0, info.file_size
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    try:
        with opened.open(info) as source, open(os.open(temporary, flags, 0o644), "wb") as target:
            while chunk := source.read(CHUNK):  # zipfile verifies the checksum at the end
                done += len(chunk)
                if done > declared:
                    more = f"more bytes than declared ({declared:,})"
                    raise _Refused(f"{info.filename} has {more}")
                target.write(chunk)
    except OSError as error:
        space = "free some space and " if error.errno in FULL else ""
        resume = f"{space}run the same command to resume"
        raise OSError(f"{path}: could not be extracted ({error}); {resume}") from error
    if done != declared:
        raise _Refused(f"{info.filename} has {done:,} bytes, expected {declared:,}")
    temporary.replace(path)
