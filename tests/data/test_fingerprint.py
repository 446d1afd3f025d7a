"""The fingerprint of a split, and the description of a data set that a pipeline passes between its steps."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import minimal
from vitdet.checkpoint import load_model_file
from vitdet.config import DataConfig, load_config
from vitdet.config.digest import legacy_digest
from vitdet.data.dataset import read_split
from vitdet.data.fingerprint import (
    combined,
    describe,
    fingerprint,
    fingerprints,
    legacy_dataset_digest,
    verify,
)
from vitdet.training import train
from vitdet.training.resume import states_folder


@pytest.fixture
def data(own_tiny: Path) -> DataConfig:
    return DataConfig(root=str(own_tiny), train_split="train", val_split="val")


def add_image(root: Path, split: str = "train") -> None:
    """Add a copy of the first image and of its objects."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    first = content["images"][0]
    content["images"].append({**first, "id": 10_000, "file_name": "added.jpg"})
    content["annotations"] += [
        {**annotation, "id": 10_000 + annotation["id"], "image_id": 10_000}
        for annotation in content["annotations"]
        if annotation["image_id"] == first["id"]
    ]
    path.write_text(json.dumps(content))
    shutil.copyfile(root / split / first["file_name"], root / split / "added.jpg")


def rename_class(root: Path) -> None:
    for path in (root / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"][0]["name"] += "s"
        path.write_text(json.dumps(content))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda root: add_image(root), {"train"}),
        (lambda root: add_image(root, "val"), {"val"}),
        (rename_class, {"train", "val"}),
        (lambda root: append(root / "annotations" / "instances_val.json"), {"val"}),
        (lambda root: append(min((root / "train").glob("*.jpg"))), {"train"}),
        (lambda root: (root / "train" / ".DS_Store").touch(), set()),
        (lambda root: (root / "val" / "unnamed.jpg").touch(), set()),
        (lambda root: (root / "val" / "folder").mkdir(), set()),
        (lambda root: (root / "annotations" / "captions_val.json").write_text("{}"), set()),
    ],
)
def test_a_fingerprint_covers_annotations_and_named_images(
    data: DataConfig, change: Callable, changed: set[str]
) -> None:
    before = fingerprints(data)
    change(Path(data.root))
    after = fingerprints(data)
    assert {split for split in before if before[split] != after[split]} == changed
    for split in ("train", "val"):  # equal whether or not the split was read before
        assert after[split] == fingerprint(data, split, read_split(data, split).records)


def test_fingerprints_exclude_location_and_loading(data: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(data.root, tmp_path / "elsewhere")
    there = replace(data, root=str(tmp_path / "elsewhere"), flip=0.0, workers=3, image_size=64)
    assert fingerprints(there) == fingerprints(data)


def test_max_images_matters_only_if_it_limits_the_split(data: DataConfig) -> None:
    whole = fingerprints(data)
    few = fingerprints(replace(data, max_images=6))  # the splits have 12 and 4 images
    assert few["train"] != whole["train"] and few["val"] == whole["val"]
    append(max((Path(data.root) / "train").glob("*.jpg")))
    assert fingerprints(replace(data, max_images=6)) == few


def test_a_description_lists_files_images_and_classes(data: DataConfig) -> None:
    manifest = json.loads(json.dumps(describe(data)))
    root = Path(data.root)
    content = (root / "annotations" / "instances_train.json").read_bytes()
    assert manifest["files"][0] == {
        "path": "annotations/instances_train.json",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    sizes = [path.stat().st_size for path in (root / "train").glob("*.jpg")]
    assert manifest["images"]["train"] == {"count": 12, "bytes": sum(sizes)}
    assert manifest["images"]["val"]["count"] == 4
    assert len(manifest["classes"]) == 6
    assert manifest["fingerprints"] == fingerprints(data)


@pytest.mark.parametrize("look", [describe, fingerprints])
def test_a_missing_image_is_reported(data: DataConfig, look: Callable) -> None:
    gone = next((Path(data.root) / "val").glob("*.jpg"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone}: no such file"):
        look(data)


def test_a_manifest_of_another_program_is_ignored(data: DataConfig) -> None:
    expected = describe(data)
    (Path(data.root) / "manifest.json").write_text('{"name": "mine"}')
    assert describe(data) == expected


def test_data_changed_after_verification_is_refused(data: DataConfig) -> None:
    expected = combined(describe(data)["fingerprints"])
    assert combined(verify(data, expected)) == expected
    with pytest.raises(FileNotFoundError, match="removed after the data was verified"):
        verify(replace(data, root=data.root + "-gone"), expected)
    append(next((Path(data.root) / "train").glob("*.jpg")))
    with pytest.raises(ValueError, match=r"own: train has changed since it was verified"):
        verify(data, expected)


def test_a_run_of_version_0_1_resumes_only_with_equal_data(own_tiny: Path) -> None:
    """The states of version 0.1 contain the digest of the whole data set."""
    config = load_config("tiny", minimal(own_tiny, optim__steps=2, train__save_every=1))
    whole, old = own_tiny.parent / "whole", own_tiny.parent / "run"
    train(config, whole)
    (old / "checkpoints").mkdir(parents=True)
    state = torch.load(whole / "checkpoints" / "step_00000001.pt", weights_only=True)
    assert state.pop("fingerprints") == fingerprints(config.data)
    state["dataset_digest"] = legacy_dataset_digest(config.data)
    torch.save(state, old / "checkpoints" / "step_00000001.pt")
    shutil.copytree(old, own_tiny.parent / "other")
    train(config, old)
    expected, stored = (load_model_file(folder / "model.pt") for folder in (whole, old))
    assert stored["fingerprints"] == fingerprints(config.data)
    assert all(torch.equal(expected["model"][key], value) for key, value in stored["model"].items())
    add_image(own_tiny)
    with pytest.raises(ValueError, match="the data set has changed since this run started"):
        train(config, own_tiny.parent / "other")


def test_the_folder_of_states_of_version_0_1_is_found(own_tiny: Path, tmp_path: Path) -> None:
    config = load_config("tiny", minimal(own_tiny))
    prints = fingerprints(config.data)
    text = f"{legacy_digest(config)} {legacy_dataset_digest(config.data)} "
    old = tmp_path / hashlib.sha256(text.encode()).hexdigest()[:12]
    new = states_folder(config, tmp_path, tmp_path, prints, None)
    assert new != old
    old.mkdir()
    (old / "step_00000001.pt").touch()
    assert states_folder(config, tmp_path, tmp_path, prints, None) == old
    add_image(own_tiny)
    assert states_folder(config, tmp_path, tmp_path, fingerprints(config.data), None) != old
