"""The manifest of a data set: what it holds, and that a change is seen."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vitdet.config import DataConfig
from vitdet.data.fingerprint import dataset_digest, describe, verify


@pytest.fixture
def data(own_tiny: Path) -> DataConfig:
    return DataConfig(root=str(own_tiny), train_split="train", val_split="val")


def test_it_names_files_images_and_classes(data: DataConfig) -> None:
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
    assert manifest["digest"] == dataset_digest(data) == verify(manifest, data)


def test_a_missing_image_is_told_at_once(data: DataConfig) -> None:
    gone = next((Path(data.root) / "val").glob("*.jpg"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone}: no such file"):
        describe(data)


def test_a_wiped_volume_is_told(data: DataConfig) -> None:
    manifest = describe(data)
    with pytest.raises(FileNotFoundError, match="gone since the data was verified"):
        verify(manifest, replace(data, root=data.root + "-gone"))


def test_other_annotations_are_told(data: DataConfig) -> None:
    manifest = describe(data)
    path = Path(data.root) / "annotations" / "instances_val.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(
        ValueError, match=r"instances_val.json: no longer the file that was verified"
    ):
        verify(manifest, data)


def test_other_images_are_told(data: DataConfig) -> None:
    manifest = describe(data)
    path = next((Path(data.root) / "train").glob("*.jpg"))
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="its images are not those that were verified"):
        verify(manifest, data)
