"""Damaged weights and checkpoints: reading ends in a one-line error or in usable content."""

from __future__ import annotations

import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from tests.helpers.runs import refused
from vitdet.checkpoint import FORMAT, STATE, load
from vitdet.weights.convert import convert_file
from vitdet.weights.pickles import read_file

CUTS = [b"\x80\x04\x95", b"\x80\x04\x8e\x00", b"\x80\x02T\x00", b"G\x00"]
REPORTED = Path(__file__).parents[2].parent / "shared/cases/faults/02-cut-pickle/cut.pkl"
if REPORTED.exists():
    CUTS.append(REPORTED.read_bytes())


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change a byte, truncate, or repeat, remove or insert a piece, one to three times in total."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed) or 1)
        piece = changed[at : at + rng.randint(1, 8)]
        kind = rng.randrange(5)
        if kind == 0 and changed:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at + 1 :]
        elif kind == 2:
            changed[at:at] = piece * rng.randint(1, 4)
        elif kind == 3:
            del changed[at : at + len(piece)]
        else:
            changed[at:at] = bytes(rng.randrange(256) for _ in piece)
    return bytes(changed)


@pytest.mark.parametrize("protocol", range(6))
def test_500_damaged_pickles_per_protocol_are_read_or_rejected(
    tmp_path: Path, protocol: int
) -> None:
    arrays = {f"block{i}.weight": np.arange(6, dtype="f4").reshape(2, 3) for i in range(3)}
    whole = pickle.dumps({"model": arrays, "epoch": 3, "names": ["a", "ä"]}, protocol)
    path, rng, errors = tmp_path / "weights.pkl", random.Random(protocol), 0
    for _ in range(500):
        path.write_bytes(mutated(whole, rng))
        try:
            read_file(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            errors += 1
    assert errors > 250


@pytest.mark.parametrize("cut", CUTS)
def test_a_pickle_truncated_within_a_number_is_rejected(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "cut.pkl"
    path.write_bytes(cut)
    with refused("not a complete weights file"):
        convert_file(path, tmp_path / "out.safetensors", "detectron2")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "step_00000001.pt"
    model = {f"w{i}": torch.arange(500.0) + i for i in range(3)}
    torch.save({"format": STATE, "step": 1, "model": model, "config": {"a": "b"}}, path)
    return path


def same(ours: object, theirs: object) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_150_flipped_bits_of_a_checkpoint_are_rejected_or_harmless(checkpoint: Path) -> None:
    whole, rng, errors = checkpoint.read_bytes(), random.Random(0), 0
    content = torch.load(checkpoint, weights_only=True)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        checkpoint.write_bytes(damaged)
        try:
            assert same(load(checkpoint, STATE), content)
        except ValueError as error:
            assert str(error).startswith(f"{checkpoint}: ") and "\n" not in str(error)
            errors += 1
    assert errors > 100


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_flipped_bit_among_the_weights_is_located(checkpoint: Path, suffix: str) -> None:
    """This holds for files of this package and for third-party files."""
    path = checkpoint.rename(checkpoint.with_suffix(suffix))
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.arange(500.0).numpy().tobytes()) + 402] ^= 0x40
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="checksum of .*data/0 does not match: the file is dam"):
        load(path, STATE) if suffix == ".pt" else read_file(path)
    assert zipfile.ZipFile(path).testzip().endswith("data/0")


def test_a_flipped_bit_at_the_end_of_the_archive_is_rejected(checkpoint: Path) -> None:
    whole = bytearray(checkpoint.read_bytes())
    whole[whole.rindex(b"PK\x06\x07") + 16] ^= 2  # the field "number of disks"
    checkpoint.write_bytes(whole)
    with pytest.raises(ValueError, match="not a complete vitdet checkpoint"):
        load(checkpoint, STATE)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    path, before = tmp_path / "weights.pth", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"format": FORMAT, "w": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert zipfile.ZipFile(path).testzip()
    assert torch.equal(read_file(path)["w"], torch.ones(3))


def test_a_full_disk_while_weights_are_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(__file__).parents[2] / "vitdet/weights/mae_vit_tiny.safetensors"

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("vitdet.checkpoint.save_file", full)
    with refused(r"out.safetensors: could not be written \(", OSError):
        convert_file(source, tmp_path / "out.safetensors", "vitdet")
    assert not list(tmp_path.iterdir())
