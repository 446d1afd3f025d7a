"""Run `python -m vitdet` as on a file system with limited locks: `python -m tests.helpers.lockless KIND ARGUMENTS`."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Callable

# the error of flock on each kind of file system
KINDS = {
    "lustre without flock": errno.ENOSYS,
    "nfs without lockd": errno.ENOLCK,
    "fuse": errno.EOPNOTSUPP,
    "fuse that rejects the operation": errno.EINVAL,
    "nfs4": errno.EBADF,  # only for an exclusive lock through a read-only descriptor
}
flock, lockf = fcntl.flock, fcntl.lockf


def limited(kind: str, function: Callable[..., None]) -> Callable[..., None]:
    """Return the behavior of flock or lockf on this file system."""

    def call(file: object, operation: int, *args: int) -> None:
        number = file if isinstance(file, int) else file.fileno()
        readable = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if kind != "nfs4" or (readable and operation & fcntl.LOCK_EX):
            raise OSError(KINDS[kind], os.strerror(KINDS[kind]))
        return function(number, operation, *args)

    return call


def patches(kind: str) -> dict[str, Callable[..., None]]:
    """Return replacements for functions of the module fcntl."""
    return {"flock": limited(kind, flock), "lockf": limited(kind, lockf)}


if __name__ == "__main__":
    for name, function in patches(sys.argv[1]).items():
        setattr(fcntl, name, function)
    from vitdet.cli import main

    main(sys.argv[2:])
