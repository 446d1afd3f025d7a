"""A real MLflow server on loopback, and a private PostgreSQL cluster for it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """`mlflow server` on the given store, by default with one worker."""

    def __init__(self, store: str, artifacts: Path, workers: int = 1) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        options = {
            "--backend-store-uri": store,
            "--workers": workers,
            "--artifacts-destination": artifacts,
            "--host": "127.0.0.1",
            "--port": self.port,
        }
        words = (str(word) for option in options.items() for word in option)
        self.command = [sys.executable, "-m", "mlflow", "server", *words]
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            self.command,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def wait(self) -> None:
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=10):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"mlflow server ended with {self.process.returncode}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def postgres_binaries() -> Path | None:
    """Return the folder of PostgreSQL's server programs, None if it is not installed."""
    folders = [*Path("/usr/lib/postgresql").glob("*/bin")]
    if found := shutil.which("initdb"):
        folders.append(Path(found).resolve().parent)
    return next((folder for folder in sorted(folders) if (folder / "initdb").exists()), None)


@contextmanager
def postgres(password: str) -> Iterator[str]:
    """Yield the URL of the database `mlflow` in a temporary PostgreSQL cluster."""
    programs = postgres_binaries()
    assert programs is not None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="vitdet-postgres-", dir="/tmp") as work:
        folder = Path(work)  # a short path: the length of socket paths is limited
        user = "nobody" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
        (folder / "password").write_text(password)
        for path in (folder, folder / "password") if user else ():
            shutil.chown(path, user)

        def run(program: str, *words: object) -> None:
            subprocess.run(
                [str(programs / program), *map(str, words)],
                check=True,
                user=user,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PGPASSWORD": password, "HOME": work},
            )

        data, where = folder / "data", ["-h", "127.0.0.1", "-p", port, "-U", "mlflow"]
        secret = f"--pwfile={folder / 'password'}"
        run("initdb", "-D", data, "-U", "mlflow", "--auth=scram-sha-256", secret, "--no-sync")
        listen = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        run("pg_ctl", "-D", data, "-w", "-o", listen, "-l", folder / "log", "start")
        try:
            run("createdb", *where, "mlflow")
            yield f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/mlflow"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")
