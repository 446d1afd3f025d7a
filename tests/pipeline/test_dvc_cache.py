"""DVC's cache with linked workspaces (cache.type hardlink, symlink): its contents and modes never change, and
regenerated outputs replace links.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import minimal, options
from tests.helpers.archives import miniatures
from vitdet.datasets import published
from vitdet.datasets.fetch import fetch
from vitdet.tracking.tracker import Tracker

pytestmark = pytest.mark.slow

HELD = (
    "work/data work/train work/pictures work/plots work/weights work/config.yaml work/metrics.json "
    "work/registered.json work/tensors.safetensors drawn yolo data/coco/annotations "
    "data/coco/manifest.json"
).split()
# existing files that the verbs replace
RESULTS = (
    "work/plots/results.json work/plots/curve.json work/plots/classes.json "
    "work/plots/thresholds.json work/plots/matches.npz work/plots/report.html work/config.yaml "
    "work/metrics.json work/registered.json work/weights/mae_vit_tiny.safetensors "
    "drawn/000000500001.jpg drawn/detections.json"
).split()
Run = Callable[..., tuple[int, str, str]]


class Watch(Tracker):
    def at(self, done: int, total: int | None) -> None: ...

    def end(self) -> None: ...


@pytest.fixture
def space(
    tiny: Path, trained: Path, tmp_path: Path, vitdet: Run, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the current folder, with the inputs of all verbs and existing files as results."""
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(published, "archives", lambda dataset, split: miniatures(dataset, split)[0])
    shutil.copytree(tiny, "work/data/tiny")
    shutil.copytree(
        trained, "work/train", ignore=shutil.ignore_patterns("checkpoints", "points.json")
    )
    model = torch.load("work/train/model.pt", weights_only=True)
    torch.save({**model, "run_id": None}, "work/train/model.pt")
    for split in ("train", "val"):
        shutil.copytree(tiny / split, f"yolo/images/{split}")
        Path("yolo/labels", split).mkdir(parents=True)
        for image in (tiny / split).iterdir():
            Path("yolo/labels", split, f"{image.stem}.txt").write_text(
                f"0 0.5 0.5 0.2 0.{image.stem[-4:]}1\n"
            )
    Path("yolo/data.yaml").write_text("train: images/train\nval: images/val\nnames: [dog]\n")
    Path("archives").mkdir()
    for path, content in miniatures("coco")[1].items():
        Path("archives", path.split("/")[-1]).write_bytes(content)
    fetch(
        published.archives("coco", ""), Path("data/coco"), lambda _: Watch(), local=Path("archives")
    )
    Path("data/coco/train2017").rename("another disk")
    Path("data/coco/train2017").symlink_to(tmp_path / "another disk")
    shutil.copytree(min((trained / "pictures").iterdir()), "work/pictures")
    result = {"image_id": 500001, "category_id": 1, "score": 0.5, "bbox": [0, 0, 9, 9]}
    for name in RESULTS:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps([result]) + "\n" * len(name))
    words = "weights convert work/train/model.pt work/tensors.safetensors --format vitdet"
    assert vitdet(*words.split())[0] == 0
    return tmp_path


def making(root: Path) -> list[list[object]]:
    """Return the commands that regenerate outputs tracked by DVC."""
    changes = options(minimal(root, train__init="mae_vit_tiny"))
    picture = min((root / "val").iterdir())
    settings = "work/train/model.pt --config work/config.yaml"
    commands = (
        "weights fetch work/config.yaml --output work/weights",
        f"evaluate {settings} --output work/metrics.json --pictures work/pictures "
        "--plots work/plots",
        f"register {settings} --metrics work/metrics.json --output work/registered.json",
        "weights convert work/train/model.pt work/tensors.safetensors --format vitdet",
        f"predict work/train/model.pt {picture} --threshold 0 --output drawn",
    )
    first = ["config", "tiny", *changes, "--output", "work/config.yaml"]
    return [first, *(command.split() for command in commands)]


def reading(root: Path) -> list[list[object]]:
    """Return the commands that read these outputs and write elsewhere, or have nothing to do."""
    few = options(minimal(root, optim__steps=1, train__init="work/train/model.pt"))
    commands = (
        f"data check {root} --images",
        f"data report {root} --output page.html --images",
        f"data tiny {root} --train 12 --val 4",
        "data coco data/coco --from archives",
        "data convert yolo converted",
        "evaluate --results work/plots/results.json "
        f"--annotations {root}/annotations/instances_val.json",
        "weights convert work/tensors.safetensors tensors.safetensors --format vitdet",
    )
    return [["train", "tiny", *few, "--output", "runs/tuned"], *(line.split() for line in commands)]


def cache() -> dict[str, tuple[str, int, int]]:
    """Return checksum, mode and modification time of every file in DVC's cache."""
    return {
        str(path): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in Path(".dvc/cache/files").rglob("*")
        if path.is_file()
    }


def is_link(path: Path) -> bool:
    return path.is_symlink() or path.stat().st_nlink > 1


@pytest.mark.parametrize("kind", ["hardlink", "symlink"])
def test_no_verb_writes_into_a_linked_cache(space: Path, vitdet: Run, kind: str) -> None:
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text(
        f"[core]\n    no_scm = true\n    analytics = false\n[cache]\n    type = {kind}\n"
    )
    dvc = Path(sys.executable).with_name("dvc")
    subprocess.run(
        [dvc, "add", "--quiet", *HELD], check=True, env={**os.environ, "HOME": str(space / "home")}
    )
    before, root = cache(), Path("work/data/tiny")
    files = [
        path
        for name in HELD
        for path in (Path(name).rglob("*") if Path(name).is_dir() else [Path(name)])
        if path.is_file() and path.stat().st_size
    ]
    assert len(files) > 50 and all(map(is_link, files))
    assert {mode & 0o777 for _, mode, _ in before.values()} == {0o444}

    for words in reading(root):
        code, out, said = vitdet(*words)
        assert code == 0 and cache() == before, (words, out, said)
        assert all(map(is_link, files)), words  # no link has been replaced
    for words in making(root):
        code, _, said = vitdet(*words)
        assert code == 0 and cache() == before, (words, said)
    made = [
        path
        for path in files
        if path.parts[:2] not in (("work", "data"), ("work", "train"), ("data", "coco"))
        and path.parts[0] != "yolo"
    ]
    assert len(made) > 8 and {str(path) for path in made if is_link(path)} == set()
    assert all(os.access(path, os.W_OK) and path.stat().st_mode & 0o200 for path in made)
    # a finished run is reused with the same settings and data, and rejected with other settings
    words = ["train", "tiny", "--output", "work/train"]
    assert vitdet(*words, *options(minimal(root)))[0] == 0
    assert vitdet(*words, *options(minimal(root, optim__lr=0.5)))[0] == 1
    assert cache() == before
