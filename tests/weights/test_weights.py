"""Initial weights: every tensor is used, or nothing is loaded and one line states the reason."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import minimal
from tests.helpers.runs import refused
from vitdet.checkpoint import Checkpoints, write_tensors
from vitdet.config import load_config
from vitdet.models import Detector, build_detector
from vitdet.training import train
from vitdet.weights import CATALOGUE, NOT_PRETRAINED, load_pretrained, resolve
from vitdet.weights.catalogue import find


@pytest.fixture
def detector(tiny: Path) -> Detector:
    torch.manual_seed(1)
    return build_detector(load_config("tiny", minimal(tiny)).model)


@pytest.fixture
def backbone(detector: Detector) -> dict[str, Tensor]:
    """Return weights of another seed without relative positions, like pretrained weights."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in detector.state_dict().items()
        if name.startswith("backbone.") and not name.endswith(NOT_PRETRAINED)
    }


def test_a_complete_backbone_is_loaded_and_the_rest_is_unchanged(
    detector: Detector, backbone: dict[str, Tensor], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    half = {name: tensor.half() for name, tensor in backbone.items()}
    save_file(half, tmp_path / "w.safetensors")
    fresh = load_pretrained(detector, tmp_path / "w.safetensors").fresh
    after = detector.state_dict()
    assert set(fresh) == set(before) - set(backbone)
    assert any(name.endswith(NOT_PRETRAINED) for name in fresh)
    for name, tensor in after.items():
        expected = half[name].float() if name in half else before[name]
        assert torch.equal(tensor, expected) and tensor.dtype == torch.float32, name


def test_mismatched_tensors_are_named_and_nothing_is_loaded(
    detector: Detector, backbone: dict[str, Tensor], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    lacking = {name: value for name, value in backbone.items() if not name.endswith("norm1.weight")}
    name, integers = "backbone.pos_embed", torch.ones(1, 16, 16, 128, dtype=torch.int8)
    shape, kind = "(1, 3, 3, 64), expected (1, 16, 16, 128)", "torch.int8, expected torch.float32"
    cases = (
        ({**backbone, "head.weight": torch.zeros(2)}, "unexpected tensors (1): head.weight"),
        (lacking, ": backbone.blocks.0.norm1.weight"),
        ({**backbone, name: torch.zeros(1, 3, 3, 64)}, f"wrong shapes (1): {name} {shape}"),
        ({**backbone, name: integers}, f"wrong types (1): {name} {kind}"),
        ({"x": torch.zeros(1)}, "unexpected tensors (1): x; "),
    )
    for number, (weights, says) in enumerate(cases):
        path = tmp_path / f"{number}.safetensors"
        save_file(weights, path)
        with refused(f"^{path}: does not fit this backbone: .*{re.escape(says)}"):
            load_pretrained(detector, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())


DEEP = (100_000).to_bytes(8, "little") + b"[" * 100_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"", "the file is empty"),
        (lambda whole: whole[:5], "truncated to 5 of "),
        (lambda whole: whole[:100], "truncated to 100 of "),
        (lambda whole: whole[:-1], "truncated to "),
        (lambda whole: b"{}", "truncated to 2 of 32,131 bytes"),
        (lambda whole: b"not weights at all", "not a safetensors file: its first 8 bytes are"),
        (lambda whole: whole[:8] + whole[9:], "not a complete safetensors file ("),
        # nested lists, deeper than Python's recursion limit
        (lambda whole: DEEP, "not a complete safetensors file ("),
    ],
)
def test_a_damaged_file_is_rejected_in_one_line(
    detector: Detector,
    backbone: dict[str, Tensor],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    path = tmp_path / "w.safetensors"
    save_file(backbone, path)
    path.write_bytes(damage(path.read_bytes()))
    with refused(f"^{path}: {re.escape(message)}"):
        load_pretrained(detector, path)


def test_weights_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert resolve("") is None
    with pytest.raises(ValueError, match="init: no weights named 'mae_vit_tny'; did you mean 'mae"):
        resolve("mae_vit_tny")
    for refuse in (resolve, find):  # an existing file, but a name without a suffix
        with pytest.raises(
            ValueError, match=r"no weights named '/.* file with a suffix, e.g. .pth"
        ):
            refuse(str(shutil.copy(__file__, tmp_path / "weights")))
    with pytest.raises(FileNotFoundError, match=r"none.safetensors: no such .* file \(train.i"):
        resolve("none.safetensors")
    name = next(iter(CATALOGUE))
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(b"")
    assert resolve(name, tmp_path) == resolve(str(path), Path("elsewhere")) == path


def test_training_starts_from_the_weights(
    tiny: Path, backbone: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(backbone, tmp_path / "w.safetensors")
    settings = minimal(tiny, train__init=tmp_path / "w.safetensors", optim__steps=1, train__keep=2)
    train(load_config("tiny", settings), tmp_path / "run")
    first = torch.load(Checkpoints(tmp_path / "run" / "checkpoints", 2).all()[0], weights_only=True)
    assert first["step"] == 0
    assert all(torch.equal(first["model"][name], tensor) for name, tensor in backbone.items())


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    path, tensors = tmp_path / "w.safetensors", {"b": torch.rand(2, 3), "a": torch.rand(3).half()}
    metadata = {"format": "pt", "names": '["\u00e9\\n", "\U0001f600\x7f\x01"]', "key": "value"}
    found = set()
    for _ in range(16):  # safetensors orders the metadata at random
        write_tensors(path, tensors, metadata)
        found.add(path.read_bytes())
    assert len(found) == 1
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.slow
def test_two_pretraining_runs_with_one_seed_write_the_same_file(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from vitdet.demo.mae import pretrain;"
        "pretrain('tiny', pathlib.Path(sys.argv[1]), count=80, steps=3, batch_size=8)"
    )
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in paths:
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()
