"""Pre-trained files load into the backbone as in the reference, and a change of any value is detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tests.parity.__main__ as parity
from tests.parity.conftest import read, shared_case_holds, write
from vitdet.weights import resize

GOLDEN = Path(__file__).parents[1] / "golden" / "vitae_load_pretrained"
SHARED = Path(__file__).parents[3] / "shared" / "reference" / "vitae" / "golden" / "load_pretrained"
TAG = "mae_vitae_qv_bias"


def check(folder: Path, arrays: dict, config: dict) -> int:
    write(folder / "io.npz", arrays)
    write(folder / "config.json", config)
    return parity.main([str(folder)])


def case() -> tuple[dict, dict]:
    return read(GOLDEN / "io.npz"), read(GOLDEN / "config.json")


def test_the_case_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(GOLDEN)]) == 0
    assert f"{TAG}.backbone.pos_embed: error " in capsys.readouterr().out


def test_the_shared_case_passes() -> None:
    shared_case_holds(SHARED)


NAMES = (
    "pos_embed blocks.0.attn.qkv.bias blocks.2.attn.v_bias blocks.1.PCM.1.running_var norm.weight"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_a_change_of_any_tensor_fails(tmp_path: Path, name: str) -> None:
    arrays, config = case()
    arrays[f"{TAG}/dst/{name}"].flat[-1] += 1e-3
    assert check(tmp_path, arrays, config) == 1


def test_changes_of_the_lists_fail(tmp_path: Path) -> None:
    for entry in ("loaded", "left_at_init"):
        arrays, config = case()
        config[TAG][entry].pop()
        assert check(tmp_path, arrays, config) == 1


def test_another_interpolation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = resize.F.interpolate
    bilinear = lambda *given, **named: plain(*given, **named | {"mode": "bilinear"})  # noqa: E731
    monkeypatch.setattr(resize.F, "interpolate", bilinear)
    assert parity.main([str(GOLDEN)]) == 1


def test_tensors_that_the_reference_drops_are_loaded_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a ViTAE file with qkv.bias in all blocks, the reference drops the biases of global blocks."""
    arrays, config = case()
    stem = "blocks.2.attn."
    q, v = (arrays.pop(f"{TAG}/src/module.{stem}{part}_bias") for part in "qv")
    arrays[f"{TAG}/src/module.{stem}qkv.bias"] = np.concatenate([q, 0 * q, v])
    for part in "qv":
        del arrays[f"{TAG}/dst/{stem}{part}_bias"]
        config[TAG]["loaded"].remove(f"{stem}{part}_bias")
        config[TAG]["left_at_init"].append(f"{stem}{part}_bias")
    assert check(tmp_path, arrays, config) == 0
    said = capsys.readouterr().out
    assert "lost: 1 tensors of the file that the reference has no place for" in said
