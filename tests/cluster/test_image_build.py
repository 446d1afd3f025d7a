"""The images as `make image` builds them, run as a pod runs them: read-only root file system, user 1000, no network.

buildah builds without a daemon. As the base image cannot be pulled everywhere, it is replaced by Debian's packages of
the same release, including its Python. Needs 30 GB of free disk; all files are deleted at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, minimal, options

TOOLS = ("buildah", "debootstrap", "git", "ip", "make", "unshare")
DISK = 30e9
MEGABYTE = 1e6
# packages of the extra `dev`, and installers
TEST_TOOLS = ("pytest", "mypy", "ruff", "moto", "hypothesis", "xdist", "uv", "pip")

missing = [tool for tool in TOOLS if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for buildah and debootstrap"),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
]

# A container's file systems: $1 is the root, $2 the folder for /data, $3 the environment; then the command.
POD = """
ip link set lo up
root=$1 data=$2 environment=$3; shift 3
mount --bind "$root" "$root"
mount --bind "$data" "$root/data"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
exec chroot --userspec=1000:1000 "$root" env -i $environment sh -c 'cd /data && exec "$@"' sh "$@"
"""
# Starts the command and sends two requests: one for its health, and one that needs an account.
HEALTH = """
import subprocess, sys, time, urllib.error, urllib.request
server = subprocess.Popen(sys.argv[1:])
for _ in range(240):
    time.sleep(1)
    try:
        health = urllib.request.urlopen("http://127.0.0.1:5000/health").read().decode()
        break
    except OSError:
        assert server.poll() is None
try:
    urllib.request.urlopen("http://127.0.0.1:5000/api/2.0/mlflow/experiments/get?experiment_id=0")
except urllib.error.HTTPError as error:
    print(health, error.code)
server.terminate()
"""


def call(*words: object, **kwargs: object) -> str:
    """Return the command's output. Raises AssertionError with the output if it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a temporary folder for buildah's images and containers."""
    folder = tmp_path_factory.mktemp("images")
    if shutil.disk_usage(folder).free < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of free disk in {folder}")
    settings = folder / "storage.conf"
    settings.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CONTAINERS_STORAGE_CONF", str(settings))
            patch.setenv("BUILDAH_ISOLATION", "chroot")
            patch.setenv("TMPDIR", str(folder))
            yield folder
            call("buildah", "rm", "--all")
    finally:
        subprocess.run(["umount", "--recursive", folder / "graph" / "overlay"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def source(storage: Path) -> Path:
    """Return a repository with the current state of the files that the images are built from."""
    folder = storage / "source"
    for name in ("vitdet", "components", "manifests/image"):
        shutil.copytree(ROOT / name, folder / name)
    for name in (
        "Makefile",
        "requirements.lock",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
    ):
        shutil.copy(ROOT / name, folder)
    git = ("git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "--all"], ["commit", "-qm", "first"]):
        call(*git, *words)
    return folder


@pytest.fixture(scope="module")
def base(storage: Path) -> str:
    """Build a replacement for python:3.12-slim-bookworm, with this machine's pip settings and certificates."""
    container = call("buildah", "from", "scratch")
    root = Path(call("buildah", "mount", container))
    packages = "--include=python3-venv,ca-certificates"
    call("debootstrap", "--variant=minbase", packages, "bookworm", root)
    (root / "usr/bin/python").symlink_to("python3")
    for name in ("etc/pip.conf", "etc/ssl/certs/ca-certificates.crt"):
        if (Path("/") / name).exists():
            shutil.copy(Path("/") / name, root / name)
    settings = {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt", "PATH": "/usr/bin:/usr/sbin"}
    settings |= {
        name: value
        for name, value in os.environ.items()
        if name in ("PIP_INDEX_URL", "UV_INDEX_URL")
    }
    for name, value in settings.items():
        call("buildah", "config", "--env", f"{name}={value}", container)
    call("buildah", "commit", "--quiet", "--rm", container, "localhost/base")
    return "localhost/base"


@pytest.fixture(scope="module")
def built(source: Path, base: str) -> dict[str, dict]:
    """Return {name: buildah's description} of both images."""
    text = call(
        "make", "-C", source, "image", "ENGINE=buildah", f"OPTIONS=--build-arg BASE={base}",
        "REGISTRY=localhost/", "TAG=1",
    )  # fmt: skip
    names = ("localhost/vitdet:1", "localhost/vitdet-mlflow:1")
    assert f"built {names[0]} and {names[1]}" in text
    inspect = ("buildah", "inspect", "--type", "image")
    return {name[10:-2]: json.loads(call(*inspect, name))["OCIv1"] for name in names}


def layers(image: dict, storage: Path) -> list[float]:
    """Return the sizes of the image's layers in MB, the lowest layer first."""
    known = json.loads((storage / "graph" / "overlay-layers" / "layers.json").read_text())
    sizes = {layer["diff-digest"]: layer["diff-size"] for layer in known if "diff-size" in layer}
    return [sizes[digest] / MEGABYTE for digest in image["rootfs"]["diff_ids"]]


Pod = Callable[..., str]


@pytest.fixture(scope="module")
def pod(built: dict[str, dict], storage: Path) -> Pod:
    """Return a function pod(image, *command) -> output; /data is the folder `data` of the storage."""
    data = storage / "data"
    data.mkdir()
    os.chown(data, 1000, 1000)
    roots = {}
    for name in built:
        container = call("buildah", "from", f"localhost/{name}:1")
        roots[name] = call("buildah", "mount", container)
        Path(roots[name], "data").mkdir(exist_ok=True)

    def run(name: str, *command: object) -> str:
        environment = " ".join([*built[name]["config"]["Env"], "OMP_NUM_THREADS=2"])
        unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--net")
        return call(*unshare, "sh", "-ec", POD, "pod", roots[name], data, environment, *command)

    return run


def test_a_change_to_the_code_pushes_a_small_layer(built: dict[str, dict], storage: Path) -> None:
    sizes = layers(built["vitdet"], storage)
    dependencies = max(range(len(sizes)), key=sizes.__getitem__)
    assert sizes[dependencies] > 1000  # MB, mostly CUDA
    assert sum(sizes[dependencies + 1 :]) < 20, sizes
    assert sum(layers(built["vitdet-mlflow"], storage)) < 0.3 * sum(sizes)


def test_the_images_name_the_commit(built: dict[str, dict], source: Path) -> None:
    commit = call("git", "-C", source, "rev-parse", "HEAD")
    for image in built.values():
        assert image["config"]["Labels"]["org.opencontainers.image.revision"] == commit
        assert image["config"]["User"] == "1000:1000"


def test_no_image_contains_the_test_tools(pod: Pod) -> None:
    code = "import importlib.util, sys; print([m for m in sys.argv[1:] if importlib.util.find_spec(m)])"
    for name in ("vitdet", "vitdet-mlflow"):
        assert pod(name, "python", "-c", code, *TEST_TOOLS) == "[]"
    assert pod("vitdet-mlflow", "python", "-c", code, "torch", "vitdet", "mlflow") == "['mlflow']"


def test_training_runs_as_in_a_pod(pod: Pod, source: Path, storage: Path) -> None:
    assert "usage: vitdet" in pod("vitdet", "vitdet", "--help")
    assert pod("vitdet", "id", "-u") == "1000"
    with pytest.raises(AssertionError, match="Read-only file system"):
        pod("vitdet", "touch", "/app/file")
    pod("vitdet", "vitdet", "data", "tiny", "tiny", "--train", 8, "--val", 2)
    settings = options(minimal(Path("tiny"), optim__steps=5, train__log_every=1))
    pod("vitdet", "vitdet", "train", "tiny", *settings, "--output", "runs/tiny")
    assert (storage / "data/runs/tiny/model.pt").is_file()
    with sqlite3.connect(storage / "data/runs/mlflow.db") as store:
        tags = dict(store.execute("select key, value from tags"))
        last = store.execute("select max(step) from metrics where key = 'loss'").fetchone()
    assert tags["git_revision"] == call("git", "-C", source, "rev-parse", "HEAD")
    assert last == (5,)


def test_kubeflows_executor_runs_a_step(pod: Pod, storage: Path) -> None:
    pipeline = ROOT / "tests" / "golden_pipeline" / "pipeline.yaml"
    specification = next(yaml.safe_load_all(pipeline.read_text()))
    container = specification["deploymentSpec"]["executors"]["exec-configs"]["container"]
    schema = {"schemaTitle": "system.Artifact", "schemaVersion": "0.0.1"}
    settings = {"name": "settings", "uri": "/data/step/settings", "metadata": {}, "type": schema}
    request = {
        "inputs": {
            "parameterValues": {
                "recipes": ["tiny"],
                "overrides": [],
                "sweep": [],
                "seeds": 1,
                "workspace": "/data",
            }
        },
        "outputs": {
            "artifacts": {"settings": {"artifacts": [settings]}},
            "outputFile": "/data/step/output.json",
        },
    }
    words = [json.dumps(request) if word == "{{$}}" else word for word in container["args"]]
    pod("vitdet", *container["command"], *words)
    output = json.loads((storage / "data/step/output.json").read_text())
    assert len(output["parameterValues"]["Output"]) == 1
    assert (storage / "data/step/settings").exists()


def test_the_tracking_server_starts_as_in_its_manifest(pod: Pod, storage: Path) -> None:
    manifest = ROOT / "manifests" / "mlflow" / "server.yaml"
    (deployment,) = (
        document
        for document in yaml.safe_load_all(manifest.read_text())
        if document["kind"] == "Deployment"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    accounts = (ROOT / "manifests" / "mlflow" / "basic_auth.ini").read_text()
    accounts = re.sub(r"(?m)^database_uri = .*", "database_uri = sqlite:////data/auth.db", accounts)
    (storage / "data" / "basic_auth.ini").write_text(accounts)
    settings = {
        "MLFLOW_AUTH_CONFIG_PATH": "/data/basic_auth.ini",
        "MLFLOW_BACKEND_STORE_URI": "sqlite:////data/server.db",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "only-for-this-test",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only-for-this-test",
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    command = [*container["command"], *container["args"]]
    assert pod("vitdet-mlflow", "env", *words, "python", "-c", HEALTH, *command).endswith("OK 401")
