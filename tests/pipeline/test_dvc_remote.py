"""DVC remotes, a folder and a bucket, store outputs of stages; of COCO, only the annotations and the download record.

The stages are those of dvc.yaml, run by the stub of test_pipeline_dvc.py: what is pushed and what is rerun depends on
the graph and its files, not on what a verb computes.
"""

# ruff: noqa: F401, F811 - fixtures of another file
from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.helpers.archives import miniatures
from tests.pipeline.test_pipeline_dvc import RECIPE, ROOT, Project, finished, project

pytestmark = pytest.mark.slow

KEYS = {
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
# If there are no images, runs the real `vitdet data coco` with archives of 12 images in bin/ (even a call without work
# takes a second). Runs the stub for the other verbs; `train` and `evaluate` require the images.
COCO = """#!{python}
import os, sys
sys.path.insert(0, {root!r})
there = [len(os.listdir(name)) for name in ("data/coco/train2017", "data/coco/val2017") if os.path.isdir(name)]
if sys.argv[1:3] == ["data", "coco"] and not there:
    from tests.helpers.archives import miniatures
    from vitdet import cli
    from vitdet.datasets import published
    os.sync = lambda: None
    published.archives = lambda dataset, split: miniatures(dataset, split)[0]
    cli.main([*sys.argv[1:], "--from", "bin"])
assert there == [12, 12] or sys.argv[1] not in ("train", "evaluate")
if sys.argv[1] != "data":
    os.execv("bin/stub", ["bin/stub", *sys.argv[1:]])
"""


@pytest.fixture(autouse=True)
def nobodys_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove AWS variables, so that the user's credentials are not used; HOME is the project's."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def bucket() -> Iterator[str]:
    """Start an S3 server with one empty bucket; return its URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=10).close()
    yield address
    server.stop()


def results(folder: Path) -> dict[str, str]:
    """Return the checksums of the files in work and data."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for place in ("work", "data")
        for path in (folder / place).rglob("*")
        if path.is_file() and path.name != ".gitignore"
    }


def on_another_machine(project: Project) -> None:
    """Reduce the project to the files in git, without results and DVC's cache."""
    for name in ("work", "data", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(project.folder / name, ignore_errors=True)


def remote(project: Project, url: str, endpoint: str = "") -> None:
    """Add a remote as `dvc remote add -d` does, and its endpoint as `dvc remote modify` does."""
    lines = f"['remote \"storage\"']\n    url = {url}\n" + (
        f"    endpointurl = {endpoint}\n" if endpoint else ""
    )
    config = project.folder / ".dvc" / "config"
    config.write_text(
        config.read_text().replace("[core]", "[core]\n    remote = storage", 1) + lines
    )


def with_coco(project: Project) -> None:
    """Change the stages as the comment in dvc.yaml describes."""
    text = (ROOT / "dvc.yaml").read_text()
    lines = re.search(r"^#   data:\n(?:#   .*\n)+", text, re.MULTILINE)[0].splitlines()
    document = yaml.safe_load(text)
    stages = document["stages"]
    stages["data"] = yaml.safe_load("\n".join(line[2:] for line in lines))["data"]
    for name in ("train", "evaluate"):
        stage, cmd = stages[name], stages[name]["cmd"]
        stage["cmd"] = [stages["data"]["cmd"], *(cmd if isinstance(cmd, list) else [cmd])]
        stage["deps"].remove("work/data/tiny")
        stage["deps"] += [next(iter(out)) for out in stages["data"]["outs"]]
    (project.folder / "dvc.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    shutil.rmtree(project.folder / "work" / "data")
    stub = project.folder / "bin" / "vitdet"
    stub.rename(stub.with_name("stub"))
    stub.write_text(COCO.format(python=sys.executable, root=str(ROOT)))
    stub.chmod(0o755)
    for where, content in miniatures("coco")[1].items():
        stub.with_name(where.split("/")[-1]).write_bytes(content)


def test_a_folder_remote_transfers_cocos_annotations_and_record(
    project: Project, tmp_path: Path
) -> None:
    with_coco(project)
    remote(project, str(tmp_path / "storage"))
    project("dvc", "repro")
    assert project.ran == ["train", "from 0 to 20", "evaluate"]
    before = results(project.folder)
    assert len([name for name in before if name.startswith("data/")]) == 24 + 3
    locked = yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]
    held = {out["path"]: out.get("nfiles", 1) for out in locked["data"]["outs"]}
    assert held == {"data/coco/annotations": 2, "data/coco/manifest.json": 1}
    assert held.keys() < {dep["path"] for dep in locked["train"]["deps"]}

    project("dvc", "repro", "--force", "--single-item", "data")
    # nothing was deleted that would need another download
    assert results(project.folder) == before

    project("dvc", "push")
    on_another_machine(project)
    project("dvc", "pull")
    pictures = {name for name in before if "2017/" in name}
    assert results(project.folder) == {name: before[name] for name in before.keys() - pictures}
    project("dvc", "repro")
    assert project.ran == []
    (project.folder / RECIPE).write_text("optim: {lr: 2e-3, steps: 20}\n")
    project("dvc", "repro")
    assert project.ran == ["config", "train", "from 0 to 20", "evaluate", "register"]
    after = results(project.folder)
    assert {name: after[name] for name in after if name.startswith("data/")} == {
        name: before[name] for name in before if name.startswith("data/")
    }


def test_a_bucket_remote_transfers_the_results_to_another_machine(
    project: Project, bucket: str
) -> None:
    before = results(project.folder)
    assert {
        "work/data/tiny/image",
        "work/train/model.pt",
        "work/metrics.json",
        "work/registered.json",
    } <= before.keys()
    remote(project, "s3://bucket/vitdet", bucket)
    project("dvc", "push", **KEYS)
    on_another_machine(project)
    assert "Unable to locate credentials" in project(
        "dvc", "pull", ok=False, AWS_EC2_METADATA_DISABLED="true"
    )
    project("dvc", "pull", **KEYS)
    assert results(project.folder) == before
    project("dvc", "repro", **KEYS)
    assert project.ran == []
