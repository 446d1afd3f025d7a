"""A file or folder that is whole or not there: it is written beside its place and takes its name when it is complete.

A full disk or a kill so leaves the old one, and readers never see half of the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(path: Path, sync: bool = False) -> Iterator[Path]:
    """The name under which to write the file; what was written there takes the name `path`, or if that fails is gone.

    The folder is made. sync: the content reaches the disk before its name does, and the name before this returns, for
    when the machine goes down.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        if sync:
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(
    path: str | Path, content: object, indent: int | None = 1, sync: bool = False
) -> None:
    """Writes a JSON file, whole or not at all; sync as of `written`."""
    with written(Path(path), sync) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
