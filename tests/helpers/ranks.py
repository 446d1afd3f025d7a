"""Real training runs under torchrun whose code a test patches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import environment, minimal, options

# A patch that prevents the import of MLflow, which takes seconds; progress is printed.
UNTRACKED = "from vitdet.tracking import runs\nruns.has_mlflow = lambda: False\n"


def start_ranks(
    patch: str, tiny: Path, folder: Path, *torchrun: str, **changes: object
) -> subprocess.Popen:
    """Start `vitdet train` with the `minimal` settings in two processes; both run `patch` first.

    The run is folder/run. Output goes to folder/log, since the processes may outlive torchrun.
    """
    script = folder / "patched.py"
    script.write_text(f"import os, time\n{patch}\nfrom vitdet.cli import main\nmain()\n")
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node=2", *torchrun, str(script)),
                *("train", "tiny", *options(minimal(tiny, **changes)), "--output", "run"),
            ],
            cwd=folder,
            env=environment(folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for_log(folder: Path, text: str, process: subprocess.Popen, seconds: float = 120) -> str:
    """Wait until the log contains this text; return the log."""
    end = time.monotonic() + seconds
    while True:
        ended = process.poll() is not None
        log = (folder / "log").read_text()
        if text in log:
            return log
        assert not ended and time.monotonic() < end, f"no {text!r} in:\n{log}"
        time.sleep(0.05)


def processes_of(folder: Path) -> list[int]:
    """Return the IDs of the processes that run this folder's patched script, and of their forks."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:  # the process has ended
            continue
        if str(folder / "patched.py") in command:
            found.append(int(pid))
    return found
