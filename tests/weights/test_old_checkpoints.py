"""Checkpoints and training states written by commit dad8b8b still load.

tests/golden_checkpoints contains their structure (names, shapes, dtypes, all values that are not tensors); the tensors
are filled with seeded random numbers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.conftest import STEPS, Recorder, minimal
from vitdet import Predictor, evaluate, train
from vitdet.checkpoint import restore_detector
from vitdet.config import DataConfig, load_config

STORED = Path(__file__).parents[1] / "golden_checkpoints"
CASES = {
    "tiny": {},
    "cascade": {
        "model__roi_heads__ious": [0.5, 0.6, 0.7],
        "model__roi_heads__loss": "federated",
        "model__roi_heads__federated_classes": 3,
        "optim__ema": 0.0,
    },
}


def read(name: str, root: Path) -> dict:
    """Return the content of the stored file, with tensors, for the data set in `root`."""
    generator = torch.Generator().manual_seed(0)

    def fill(node: object, path: str = "") -> object:
        if isinstance(node, list):
            return [fill(item, path) for item in node]
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            dtype = getattr(torch, node["tensor"])
            if "value" in node:
                return torch.tensor(node["value"], dtype=dtype)
            values = 0.02 * torch.randn(node["shape"], generator=generator)
            if path.endswith("norm.weight") or ".norm" in path and path.endswith("weight"):
                values += 1
            if path.endswith("exp_avg_sq") or path.endswith("class_weights"):
                values = values.abs()
            return values.to(dtype)
        if "tuple" in node:
            return tuple(fill(node["tuple"], path))
        pairs = node["items"] if "items" in node else node.items()
        return {key: fill(value, f"{path}.{key}") for key, value in pairs}

    content = fill(json.loads((STORED / f"{name}.json").read_text())["content"])
    content["config"]["data"]["root"] = str(root)
    content["dataset_digest"] = dataset_digest(DataConfig(**content["config"]["data"]))
    return content


def dataset_digest(data: DataConfig) -> str:
    """Return a COCO data set's digest as computed by commit dad8b8b."""
    digest = hashlib.sha256(str(data.max_images).encode())
    for split in (data.train_split, data.val_split):
        annotations = Path(data.root, "annotations", f"instances_{split}.json").read_bytes()
        digest.update(f"\n{split}\n".encode() + hashlib.sha256(annotations).digest())
        images = sorted(Path(data.root, split).iterdir())
        digest.update("\n".join(f"{path.name} {path.stat().st_size}" for path in images).encode())
    return digest.hexdigest()[:16]


def write(name: str, root: Path, path: Path) -> dict:
    content = read(name, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return content


def config_of(case: str, root: Path, **changes: object):
    return load_config("tiny", minimal(root, **{**CASES[case], **changes}))


@pytest.mark.parametrize("case", CASES)
def test_a_finished_detector_loads(case: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    stored = write(f"model_{case}", tiny, path)
    detector, config, names = restore_detector(path)
    # commit dad8b8b did not store optim.lr_batch_size
    assert config == config_of(case, tiny, optim__lr_batch_size=64)
    assert names == tuple(stored["class_names"]) and len(names) == 6
    weights, expected = detector.state_dict(), stored["model"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    image = next((tiny / "val").iterdir())
    found = Predictor.load(path, "cpu")(image, threshold=0.0)
    assert len(found.names) == len(found.boxes) > 0
    metrics = evaluate(path, device="cpu")
    assert metrics.keys() == stored["metrics"].keys()


@pytest.mark.parametrize("case", CASES)
def test_a_finished_detector_initializes_training(case: str, tiny: Path, tmp_path: Path) -> None:
    stored = write(f"model_{case}", tiny, tmp_path / "first.pt")
    config = config_of(case, tiny, train__init=tmp_path / "first.pt", optim__steps=1)
    recorder = Recorder()
    train(config, tmp_path / "run", start_tracking=lambda *_: recorder)
    assert list(recorder.points) == [1]
    detector, _, _ = restore_detector(tmp_path / "run" / "model.pt")
    name = "backbone.blocks.0.attn.qkv.weight"
    difference = detector.state_dict()[name] - stored["model"][name]
    assert difference.abs().max() < 0.01  # one step of AdamW away from the stored weights


@pytest.mark.parametrize("case", CASES)
def test_a_training_state_resumes(case: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / f"step_{STEPS - 3:08d}.pt"
    stored = write(f"state_{case}", tiny, path)
    assert bool(stored["average"]) == (case == "tiny")
    recorder, begun = Recorder(), []

    def start_tracking(*given: object) -> Recorder:
        begun.append(given[1:])
        return recorder

    train(config_of(case, tiny), tmp_path / "run", start_tracking=start_tracking)
    assert begun == [("recorded", STEPS - 3)]
    assert list(recorder.points) == [STEPS - 2, STEPS - 1, STEPS]
    assert (tmp_path / "run" / "model.pt").is_file()


def test_a_training_state_from_before_commit_29b381b_resumes(tiny: Path, tmp_path: Path) -> None:
    """It lacks the step of the last evaluation, because states were saved after evaluations."""
    content = read("state_tiny", tiny)
    del content["evaluated"]
    content["step"] = 4
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(content, folder / "step_00000004.pt")
    recorder = Recorder()
    train(config_of("tiny", tiny), tmp_path / "run", start_tracking=lambda *_: recorder)
    assert list(recorder.points) == [5, 6, 7, 8]
