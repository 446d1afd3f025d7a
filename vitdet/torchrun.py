"""Functions for torchrun's workers. This module avoids the import of torch, which takes seconds."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1  # an option of prctl(2)


def is_worker() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int:
    """Return the number of processes that torchrun started on all nodes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_with_torchrun() -> None:
    """Let the Linux kernel send SIGTERM to this process when torchrun is killed (prctl).

    Without a handler, SIGTERM ends the process. With the handler of `vitdet.training.stop`,
    training first saves its state. On other systems, `vitdet.training.watchdog` detects that the
    parent process has changed. On rank 0's node, `has_ended` detects an earlier end of torchrun.
    """
    if is_worker() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def has_ended() -> bool:
    """Return whether the store that torchrun serves refuses connections.

    Call this well after `end_with_torchrun`: the socket of a killed torchrun may still accept
    connections for a short time.
    """
    # without torchrun's store, rank 0 serves a store, which it may not have started yet
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=10).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # a network problem: the rendezvous then times out
        return False
    return False
