"""The precision of training, on simulated devices."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.conftest import STEPS
from tests.helpers.runs import go
from vitdet.training import step as training_step
from vitdet.training import trainer
from vitdet.training.precision import chosen, tf32

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("device", [CPU, GPU])
def test_an_explicit_precision_is_used(device: torch.device) -> None:
    for told in ("bf16", "fp16", "fp32"):
        assert chosen(told, device) == told


def test_auto_selects_a_precision_with_native_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=answer: answer)
        assert chosen("auto", CPU) == wanted


def test_training_on_a_gpu_without_bf16_uses_fp16_and_logs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A V100 emulates bf16, which torch reports as supported unless emulation is excluded."""
    emulated = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    with caplog.at_level(logging.INFO):
        assert chosen("auto", GPU) == "fp16"
    assert len(caplog.messages) == 1 and "does not support bf16" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert chosen("auto", GPU) == "bf16" and len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("device", "precision", "within"),
    [(GPU, "fp32", "high"), (GPU, "bf16", "highest"), (CPU, "fp32", "highest")],
)
def test_tf32_is_enabled_only_for_fp32_on_a_gpu_and_only_in_the_context(
    device: torch.device, precision: str, within: str
) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), tf32(precision, device):
        assert torch.get_float32_matmul_precision() == within
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_enabled_in_steps_but_not_in_evaluations(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, within, evaluated, steps = [], [], [], []

    @contextmanager
    def spy(precision: str, device: torch.device) -> Iterator[None]:
        told.append((precision, device.type))
        within.append(True)
        yield
        within.pop()

    monkeypatch.setattr(training_step, "tf32", spy)

    def listen(owner: object, name: str, heard: list[bool]) -> None:
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: heard.append(bool(within)) or whole(*a))

    listen(trainer, "evaluate_detector", evaluated)
    listen(torch.Tensor, "backward", steps)
    go(tiny, tmp_path)
    assert steps == [True] * STEPS and evaluated == [False] * 2 and set(told) == {("fp32", "cpu")}
