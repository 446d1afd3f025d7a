"""Checkpoints: atomic writes, and loading that cannot execute code."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.conftest import environment
from tests.helpers.runs import refused
from vitdet.checkpoint import (
    FORMAT,
    STATE,
    Checkpoints,
    load,
    load_model_file,
    load_weights,
    restore_detector,
    save,
)
from vitdet.config import load_config
from vitdet.demo.tiny import CATEGORIES

# A process whose files cannot exceed 100 kB: `File too large` is raised in the same place as `No space left`.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from vitdet.checkpoint import Checkpoints
states = Checkpoints(Path(sys.argv[1]), keep=1)
states.save(1, {"x": torch.arange(10)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for size in (1_000_000, 24_900):  # the disk fills in the middle; with the very last bytes
    try:
        states.save(2, {"x": torch.zeros(size)})
    except OSError as error:
        print(error)
"""


class Exploit:
    """An object whose unpickling runs code."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_state_and_is_reported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "states")],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    says = "step_00000002.pt: could not be written ([Errno 27] File too large); free some space"
    assert all(says in line for line in lines)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step_00000001.pt"]
    assert torch.equal(Checkpoints(tmp_path / "states", 1).latest()["x"], torch.arange(10))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save(path, {"format": FORMAT, "x": torch.ones(3)})
    with pytest.raises(AttributeError):  # not a disk error, so the file is not named
        save(path, {"format": FORMAT, "x": lambda: None})
    assert [child.name for child in tmp_path.iterdir()] == ["model.pt"]
    assert torch.equal(load(path, FORMAT)["x"], torch.ones(3))


def test_the_last_states_are_kept(tmp_path: Path) -> None:
    states = Checkpoints(tmp_path, keep=2)
    assert states.latest() is None
    (tmp_path / ".step_00000002.pt.123.tmp").write_bytes(b"a killed process left this")
    (tmp_path / "step_notes.pt").write_text("somebody's")
    for step in (0, 3, 20, 100):
        states.save(step, {"x": step})
    left = ["step_00000020.pt", "step_00000100.pt", "step_notes.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert states.latest() == {"format": STATE, "step": 100, "x": 100}


@pytest.mark.parametrize("part", [0, 1, 100, 0.5, 0.999, -1])
def test_a_truncated_file_is_rejected(trained: Path, tmp_path: Path, part: float) -> None:
    whole = (trained / "model.pt").read_bytes()
    path = tmp_path / "model.pt"
    path.write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    with refused(f"^{path}: .*not a complete vitdet checkpoint"):
        load_model_file(path)


def test_a_damaged_file_is_rejected_or_read(trained: Path, tmp_path: Path) -> None:
    whole = (trained / "model.pt").read_bytes()
    begin = whole.find(b"data.pkl")
    generator = torch.Generator().manual_seed(0)
    errors = []
    for place in torch.randint(begin, begin + 3000, (60,), generator=generator).tolist():
        path = tmp_path / "model.pt"
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            load_model_file(path)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > 20 and not any("\n" in text for text in errors)


def test_other_files_are_rejected(trained: Path, tmp_path: Path) -> None:
    states = sorted((trained / "checkpoints").glob("*.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    (tmp_path / "text.pt").write_text("weights")
    for path, says in (
        (states[-1], f"expected a '{FORMAT}' file, got '{STATE}'"),
        (tmp_path / "list.pt", "got 'list'"),
        (tmp_path / "foreign.pt", "got None"),
        (tmp_path / "photos.zip", "not a complete vitdet"),
        (tmp_path / "text.pt", "or a different kind of file"),
        (trained / "config.yaml", "or a different kind of file"),
    ):
        with refused(f"^{path}: .*{says}"):
            load_model_file(path)
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            load_model_file(path)


@pytest.mark.parametrize("packed", [True, False], ids=["as torch packs it", "as pickle does"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, packed: bool) -> None:
    content = {"format": FORMAT, "model": {}, "config": Exploit(tmp_path / "proof")}
    path = tmp_path / "model.pt"
    if packed:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with refused("checkpoint"):
        load(path, FORMAT)
    assert not (tmp_path / "proof").exists()
    if packed:
        torch.load(path, weights_only=False)
        assert (tmp_path / "proof").exists()  # without the protection, the code runs


def test_a_detector_is_loaded_unchanged(trained: Path) -> None:
    detector, config, names = restore_detector(trained / "model.pt")
    assert not detector.training and names == tuple(CATEGORIES.values())
    stored = load_model_file(trained / "model.pt")["model"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in detector.state_dict().items())
    assert config == load_config(trained / "config.yaml")


def test_weights_of_another_model_are_rejected(trained: Path, tmp_path: Path) -> None:
    stored = load_model_file(trained / "model.pt")
    path = tmp_path / "model.pt"
    unknown = "its config is not valid in this version: model.pyramids: no such setting"
    for change, says in (
        ({"pyramid": {"channels": 32}}, "its weights do not fit its config"),
        ({"pyramids": {}}, unknown),
    ):
        config = {**stored["config"], "model": {**stored["config"]["model"], **change}}
        save(path, {**stored, "config": config})
        with refused(f"^{path}: .*{says}"):
            restore_detector(path)


def test_only_errors_of_a_full_disk_advise_freeing_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = "free some space and run the same command"
    torch_says = "PytorchStreamWriter failed writing file data/7: file write failed"
    disk = [OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    other = f"^{tmp_path / 'model.pt'}: could not be written ..Errno 5. Input/output error.$"
    for error, kind, says in (
        *((failure, OSError, full) for failure in disk),
        (RuntimeError("[enforce fail at x.cc:664] . unexpected pos 576 vs 470"), OSError, full),
        (RuntimeError(torch_says), OSError, full),
        (OSError(errno.EIO, "Input/output error"), OSError, other),
        (RuntimeError("CUDA error: out of memory"), RuntimeError, "^CUDA error: out of memory$"),
    ):
        monkeypatch.setattr(torch, "save", Mock(side_effect=error))
        with refused(says, kind):
            save(tmp_path / "model.pt", {})
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [(3, torch.zeros(2)), (None, torch.zeros(2)), ("bias", 3), ("bias", torch.zeros(2) + 1j)],
)
def test_weights_other_than_named_real_tensors_are_rejected(name: object, value: object) -> None:
    layer = torch.nn.Linear(2, 2)
    weights = dict(layer.state_dict()) | {name: value}
    with pytest.raises(ValueError, match="^x.pt: the weight .* is not a real-valued tensor"):
        load_weights(layer, weights, "x.pt")
