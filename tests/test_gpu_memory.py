"""Too little memory of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitdet import stages
from vitdet.cli import main


def test_too_little_memory_of_a_gpu_is_one_line_that_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs.")

    monkeypatch.setattr(stages, "train", fill)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "tiny", "--output", str(tmp_path / "run")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.endswith(
        "vitdet: CUDA out of memory. Tried to allocate 2.00 GiB. Lower train.batch_size or "
        "evaluate.batch_size, or use more or larger GPUs\n"
    )
