"""A container of a simulated pod: a local process with its children."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil


def now() -> str:
    """Return the current time in the API's format."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Container:
    """A process in a new group, restarted in place, and its timestamped output lines.

    The lines are printed as well, for the report of a failed test.
    """

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], folder: Path
    ) -> None:
        self.name, self.command, self.environment, self.folder = name, command, environment, folder
        self.restarts, self.killed_at = 0, 0.0
        self.lines: list[list[tuple[float, str]]] = []
        self.start()

    def start(self) -> None:
        self.lines.append([])
        self.started, self.over = now(), False
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            cwd=self.folder,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.root, self.family = psutil.Process(self.process.pid), set()
        self.reader = threading.Thread(
            target=self.listen, args=(self.process, self.lines[-1]), daemon=True
        )
        self.reader.start()

    def listen(self, process: subprocess.Popen, lines: list[tuple[float, str]]) -> None:
        for line in process.stdout:
            lines.append((time.time(), line.rstrip("\n")))
            print(f"{time.strftime('%H:%M:%S')} {self.name}: {line}", end="")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process; SIGKILL reaches all descendants, even in other sessions."""
        # psutil also raises NoSuchProcess if the process ID has been reused
        gone, found = (suppress(psutil.NoSuchProcess), set())
        with gone:
            while new := {self.root, *self.root.children(recursive=True)} - found:
                found |= new
                for process in new if number == signal.SIGKILL else ():
                    with gone:
                        process.suspend()  # so that it cannot fork unseen
        self.family |= found
        for process in self.family if number == signal.SIGKILL else {self.root}:
            with gone:
                process.send_signal(number)

    def wait(self) -> None:
        """End the process and its descendants, as the end of a container does; then its lines are complete."""
        if self.over:
            return
        self.over = True
        self.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.reader.join(5)
