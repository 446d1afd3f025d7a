"""Exclusive locks between processes, on file systems that support them.

The kernel releases a lock when its process ends, also after SIGKILL. filelock opens the file for writing, as NFSv4
requires, and closes it in forked children, so data-loader workers do not keep the lock of a killed training.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# flock on Lustre without the mount option flock, on NFS without lockd, and on some FUSE mounts
UNSUPPORTED = {
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EINVAL,
    errno.EBADF,
    errno.ENOTTY,
}
POLL_SECONDS = 0.2
_warned: set[str] = set()  # once per process
log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, waiting: str | None = None, remove: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if it does not exist.

    waiting: logged before waiting for another process; without it, BlockingIOError is raised when another process holds
    the lock. remove: remove the file afterwards. Where the file system does not support locks, the code runs without one, after one warning per process.
    """
    # without the soft fallback: the lock file of a killed process would stay
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
        if (
            remove
        ):  # before the lock is released: a process that waits for this file then locks a new one
            path.unlink(missing_ok=True)
        if lock.is_locked:
            lock.release()


def _warn(folder: Path, error: OSError) -> None:
    if _warned:
        return
    _warned.add(str(folder))
    log.warning(
        "%s: this file system does not support locks (%s); two processes that write the same output, send the same run "
        "to MLflow, download the same file or promote a champion at the same time are not kept apart: do not start "
        "the same command twice",
        folder,
        error.strerror or error,
    )
