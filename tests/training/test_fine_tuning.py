"""Fine-tuning: with equal classes, all weights load; otherwise, all except the class layers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.runs import assert_equal, go, read_state, refused
from tests.helpers.small import CLASSES, small_detector
from vitdet.checkpoint import FORMAT, load_model_file, save
from vitdet.weights import load_pretrained

LAYERS = {
    f"roi_heads.{layer}.{kind}"
    for layer in ("stages.0.logits", "stages.0.deltas", "mask.logits")
    for kind in ("weight", "bias")
}


def other_classes(data: Path, names: list[str]) -> None:
    """Keep the first len(names) categories, renamed."""
    for path in (data / "annotations").glob("instances_*.json"):
        content = json.loads(path.read_text())
        kept = sorted(content["categories"], key=lambda category: category["id"])[: len(names)]
        ids, objects = {category["id"] for category in kept}, content["annotations"]
        content["annotations"] = [item for item in objects if item["category_id"] in ids]
        content["categories"] = [item | {"name": n} for item, n in zip(kept, names, strict=True)]
        path.write_text(json.dumps(content))


def start(data: Path, output: Path, source: Path, **changes: object) -> dict[str, Tensor]:
    """Return the initial weights of a run that starts from `source`."""
    go(data, output, train__init=source, optim__steps=1, train__keep=2, **changes)
    return read_state(output, 0)["model"]


@pytest.mark.parametrize("names", [["one", "two"], None], ids=["another number", "other names"])
def test_class_layers_are_newly_initialized_for_other_classes(
    trained: Path,
    own_tiny: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    names: list[str] | None,
) -> None:
    source = trained / "model.pt"
    before = load_model_file(source)
    count = len(before["class_names"])
    names = names or [*before["class_names"][:-1], "pentagon"]
    other_classes(own_tiny, names)
    with caplog.at_level(logging.INFO):
        changes = {"model__roi_heads__num_classes": len(names)}
        weights = start(own_tiny, tmp_path / "run", source, **changes)
    old, last = before["model"], before["class_names"][-1]
    assert {name for name, new in weights.items() if not torch.equal(new, old[name])} == LAYERS
    said = {record.message for record in caplog.records if "newly initialized" in record.message}
    why = (
        f"number of classes: {count} in the file, 2 in this model"
        if len(names) == 2
        else f"classes differ, e.g. {last!r} in the file, 'pentagon' in this model"
    )
    assert said == {f"{source}: {name}: newly initialized ({why})" for name in LAYERS}


def test_all_weights_load_for_the_same_classes(
    trained: Path, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        weights = start(tiny, tmp_path / "run", trained / "model.pt")
    before = load_model_file(trained / "model.pt")["model"]
    assert_equal(weights, before)
    assert "newly initialized" not in caplog.text


def test_positions_are_resized_for_another_image_size(
    trained: Path, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        changes = {"model__backbone__rel_pos_size": 64, "model__backbone__pos_embed_grid": 8}
        weights = start(tiny, tmp_path / "run", trained / "model.pt", **changes)
    assert weights["backbone.pos_embed"].shape[1:3] == (8, 8)
    said = [message.partition(": ")[2] for message in caplog.messages if "resized" in message]
    assert said[0] == "backbone.pos_embed: resized from (1, 16, 16, 128) to (1, 8, 8, 128)"
    resized = "backbone.blocks.1.attn.rel_pos_h and 3 more: resized from (31, 32) to (15, 32)"
    assert said[1].startswith(resized)


def test_other_layers_must_have_equal_shapes(trained: Path, own_tiny: Path, tmp_path: Path) -> None:
    other_classes(own_tiny, ["one", "two"])
    changes = {"model__roi_heads__num_classes": 2, "model__roi_heads__fc_dim": 16}
    shape = r"wrong shapes \(\d+\): roi_heads.stages.0.fcs.0.weight "
    with refused(f"model.pt: does not fit this detector: .*{shape}"):
        start(own_tiny, tmp_path / "run", trained / "model.pt", **changes)


def stored(path: Path, **settings: object) -> Path:
    """Write a detector of tests.helpers.small as a checkpoint without a config."""
    detector = small_detector(seed=1, **settings)
    save(path, {"format": FORMAT, "model": detector.state_dict()})
    return path


def test_class_agnostic_box_layers_of_a_cascade_are_kept(tmp_path: Path) -> None:
    path = stored(tmp_path / "model.pt", ious=(0.5, 0.6, 0.7))
    content = torch.load(path, weights_only=True)
    for name, tensor in content["model"].items():
        if "logits" in name and name.startswith("roi_heads"):
            content["model"][name] = torch.cat([tensor, tensor[:1]])
    save(path, content)
    detector = small_detector(seed=2, ious=(0.5, 0.6, 0.7))
    loaded = load_pretrained(detector, path)
    layers = ("mask.logits", *(f"stages.{stage}.logits" for stage in range(3)))
    fresh = [f"roi_heads.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert sorted(loaded.fresh) == sorted(fresh)
    counts = f"number of classes: {CLASSES + 1} in the file, {CLASSES} in this model"
    assert all(counts in note for note in loaded.notes)


def test_another_loss_affects_only_its_class_weights(tmp_path: Path) -> None:
    softmax, federated = stored(tmp_path / "s.pt"), stored(tmp_path / "f.pt", loss="federated")
    odds = "roi_heads.classification.class_weights"
    detector = small_detector(seed=2, loss="federated")
    assert load_pretrained(detector, softmax).fresh == [odds]
    detector = small_detector(seed=2)
    loaded = load_pretrained(detector, federated)
    assert not loaded.fresh and loaded.notes == [f"{odds}: not loaded (a different loss)"]
    assert not load_pretrained(small_detector(seed=2, loss="federated"), federated).notes


def test_a_detector_without_its_class_layers_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "model.pt")
    content = torch.load(path, weights_only=True)
    for lost in ("roi_heads.stages.0.logits.weight", "roi_heads.mask.logits.bias"):
        save(path, {**content, "model": {k: v for k, v in content["model"].items() if k != lost}})
        with refused(rf"missing tensors \(1\): {lost}"):
            load_pretrained(small_detector(), path)


def test_class_layers_are_not_loaded_if_the_file_names_only_some_classes(tmp_path: Path) -> None:
    """mmdet files of models with more classes than their data set, e.g. the default of 80."""
    path, names = stored(tmp_path / "model.pt"), ["a", "b", "c", "d"]
    save(path, torch.load(path, weights_only=True) | {"class_names": names[:2]})
    loaded = load_pretrained(small_detector(seed=2), path, class_names=names)
    assert set(loaded.fresh) == LAYERS
    assert loaded.notes[0].endswith("(classes differ, e.g. '' in the file, 'c' in this model)")
