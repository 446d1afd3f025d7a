"""The migration of docs/kubeflow.md: dump, restore, accounts; with two PostgreSQL servers and MLflow on each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from tests.cluster.test_manifests import MANIFESTS
from tests.helpers.mlflow_server import free_port

if TYPE_CHECKING:
    from mlflow import MlflowClient

BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/lib/postgresql"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (BINARIES / "initdb").exists(), reason="needs Debian's postgresql"),
]
ADMIN, USER = "password-of-the-admin", "password-of-vitdet"


@contextmanager
def database(folder: Path) -> Iterator[int]:
    """Start a PostgreSQL server with the database and user of manifests/mlflow; return its port."""
    folder.mkdir()
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if user:
        shutil.chown(folder, user)
    port, data = free_port(), folder / "data"

    def run(*words: str) -> None:
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, user=user)
        assert done.returncode == 0, done.stderr + done.stdout

    run(str(BINARIES / "initdb"), "-D", str(data), "-U", "mlflow", "-A", "trust")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    control = (str(BINARIES / "pg_ctl"), "-D", str(data), "-w", "-t", "120")
    run(*control, "-l", str(folder / "log"), "-o", options, "start")
    try:
        run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow")
        yield port
    finally:
        run(*control, "-m", "fast", "stop")


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """Start MLflow with the account settings of manifests/mlflow on this database; return its URL."""
    settings = (MANIFESTS / "mlflow" / "basic_auth.ini").read_text()
    file = folder / "basic_auth.ini"
    file.write_text(settings.replace("mlflow-database:5432", f"127.0.0.1:{port}"))
    own = free_port()
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow",
        "MLFLOW_AUTH_CONFIG_PATH": str(file),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret",
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    words = ["server", "--app-name=basic-auth", "--host=127.0.0.1", f"--port={own}", "--workers=1"]
    log = (folder / "mlflow.log").open("w")
    command = [sys.executable, "-m", "mlflow", *words]
    process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{own}"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "mlflow.log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def account(address: str, name: str, password: str) -> Iterator[MlflowClient]:
    """Yield a client of this account; the password is read from the environment at each request."""
    from mlflow import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        for key, value in (("USERNAME", name), ("PASSWORD", password), ("URI", address)):
            patch.setenv(f"MLFLOW_TRACKING_{key}", value)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield MlflowClient(address)


def make_account(address: str) -> str:
    """Run manifests/mlflow/account.py as in the server's container; return its output."""
    done = subprocess.run(
        [sys.executable, str(MANIFESTS / "mlflow" / "account.py"), "vitdet"],
        input=USER + "\n",
        capture_output=True,
        text=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": address, "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def log(client: MlflowClient, folder: Path, ap: float) -> str:
    """Log as vitdet.tracking does: a run, a logged model with a file, a version, an alias. Return the version."""
    place = client.get_experiment_by_name("vitdet").experiment_id
    run = client.create_run(place).info.run_id
    client.log_metric(run, "segm/AP", ap)
    model = client.create_logged_model(place, "detector", run, model_type="detection").model_id
    files = folder / "files"
    files.mkdir(exist_ok=True)
    (files / "MLmodel").write_text("flavors: {}")
    client.log_model_artifacts(model, str(files))
    client.finalize_logged_model(model, "READY")
    client.set_terminated(run)
    version = client.create_model_version("detector", f"models:/{model}", run, model_id=model)
    client.set_registered_model_alias("detector", "champion", version.version)
    return str(version.version)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that PostgreSQL's user can enter; pytest's folders are private."""
    with TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_runs_models_and_accounts_move_to_another_database(folder: Path) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.server.auth.client import AuthServiceClient

    dump = folder / "mlflow.dump"
    with ExitStack() as stack:
        old, new = (stack.enter_context(database(folder / name)) for name in ("old", "new"))
        for name in ("before", "after"):
            (folder / name).mkdir()
        with server(folder / "before", old) as address:
            with account(address, "admin", ADMIN) as client:
                # an old installation, whose training runs log as the administrator
                client.create_experiment("vitdet")
                client.create_registered_model("detector")
                assert log(client, folder, 0.25) == "1"
            assert "may manage 3 existing" in make_account(address)
            with account(address, "vitdet", USER) as client:
                assert log(client, folder, 0.5) == "2"
        with dump.open("wb") as file:
            where = ("-h", "127.0.0.1", "-p", str(old), "--username=mlflow")
            words = ["pg_dump", *where, "--format=custom", "--no-owner", "mlflow"]
            subprocess.run(words, stdout=file, check=True)
        with server(folder / "after", new) as address:  # to create its tables
            with account(address, "admin", ADMIN) as client:
                assert client.get_experiment_by_name("vitdet") is None
        with dump.open("rb") as file:
            where = ("-h", "127.0.0.1", "-p", str(new), "--username=mlflow", "--dbname=mlflow")
            words = ["pg_restore", *where, "--clean", "--if-exists", "--no-owner"]
            subprocess.run([*words, "--single-transaction"], stdin=file, check=True)
        with server(folder / "after", new) as address:
            with account(address, "vitdet", USER) as client:
                place = client.get_experiment_by_name("vitdet").experiment_id
                found = [run.data.metrics["segm/AP"] for run in client.search_runs([place])]
                assert sorted(found) == [0.25, 0.5]
                assert str(client.get_model_version_by_alias("detector", "champion").version) == "2"
                assert log(client, folder, 0.75) == "3"
                with pytest.raises(MlflowException, match="Permission denied"):
                    AuthServiceClient(address).create_user("other", "password-of-other")
            assert "may manage 3 existing" in make_account(address)  # a second time
            with (
                account(address, "vitdet", "wrong-password") as client,
                pytest.raises(MlflowException, match="401|not authenticated"),
            ):
                client.get_experiment_by_name("vitdet")
