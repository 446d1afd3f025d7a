"""The floating-point precision of evaluation and prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.bench.precision import compare, detect
from tests.conftest import minimal
from vitdet.checkpoint import restore_detector
from vitdet.config import load_config
from vitdet.evaluation.detections import results_of
from vitdet.evaluation.evaluator import evaluate
from vitdet.predictor import Predictor, autocast, fastest
from vitdet.training import train
from vitdet.types import Batch, Detections

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Witness(nn.Module):
    """A detector without detections that records the dtype of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[torch.dtype] = []

    def forward(self, images: Tensor, targets: None, sizes: Tensor) -> list[Detections]:
        self.kinds.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        labels = torch.zeros(0, dtype=torch.int64)
        return [Detections(torch.zeros(0, 4), torch.zeros(0), labels, None) for _ in images]


NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision", NAMES)
def test_only_the_detector_computes_in_the_given_precision(precision: str) -> None:
    detector, outside = Witness(), []
    sizes = torch.tensor([[8, 8]])
    batch = Batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [], sizes, (1,), sizes)
    for _ in results_of(detector, [batch, batch], (1,), "cpu", precision):
        outside.append(torch.is_autocast_enabled("cpu"))
    Predictor(detector, ("thing",), 8, precision=precision)(np.zeros((8, 8, 3), np.uint8))
    assert detector.kinds == [NAMES[precision]] * 3 and outside == [False, False]


def test_a_predictor_refuses_an_unknown_precision() -> None:
    message = "precision: expected one of fp32, bf16, fp16, auto, got 'fp8'"
    with pytest.raises(ValueError, match=message):
        Predictor(Witness(), ("thing",), 8, precision="fp8")


def test_auto_is_the_fastest_native_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=answer: answer)
        assert fastest(CPU) == wanted
        with autocast("auto", CPU):
            assert torch.is_autocast_enabled("cpu") is answer
    capability = (0, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or capability >= (8, 0)  # torch emulates bf16 on older GPUs

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    wanted = {(9, 0): torch.bfloat16, (7, 5): torch.float16, (6, 1): torch.float32}
    for capability, precision in wanted.items():  # noqa: B007 - the functions above read it
        assert fastest(GPU) == precision


def test_evaluation_and_prediction_use_the_checkpoint_s_precision(trained: Path) -> None:
    exact = evaluate(trained / "model.pt")
    reduced = evaluate(trained / "model.pt", ["evaluate.precision=bf16"])
    assert reduced.keys() == exact.keys()
    assert Predictor.load(trained / "model.pt", "cpu").precision == "fp32"
    assert Predictor.load(trained / "model.pt", "cpu", "bf16").precision == "bf16"


def test_the_precision_setting_is_validated(tiny: Path) -> None:
    config = load_config("tiny", minimal(tiny, evaluate__precision="bf16"))
    assert config.evaluate.precision == "bf16" and load_config("tiny").evaluate.precision == "fp32"
    with pytest.raises(ValueError, match="evaluate.precision"):
        load_config("tiny", ["evaluate.precision=fp8"])


def test_detections_of_two_precisions_are_matched_per_class() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60], [70, 0, 80, 9]])
    exact = Detections(boxes, torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0, 1, 1, 0]), None)
    moved, scores = boxes[[1, 0, 2]] + torch.tensor([0.0, 0, 0, 1]), torch.tensor([0.81, 0.85, 0.7])
    other = Detections(moved, scores, torch.tensor([1, 0, 0]), None)
    figures = compare([exact, exact[:0]], [other, other[:0]], 0.3)
    assert (figures["images"], figures["matched"]) == (2, 2)
    assert figures["in fp32 only"] == figures["in the other only"] == 1
    assert figures["mean IoU"] == pytest.approx((10 / 11 + 20 / 21) / 2)
    assert figures["largest difference of scores"] == pytest.approx(0.05)
    assert figures["share of scores within 0.02"] == 0.5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_trained_detector_has_similar_detections_in_bf16(tiny: Path, tmp_path: Path) -> None:
    steps = [f"{name}=300" for name in ("optim.steps", "train.eval_every", "train.save_every")]
    config = load_config("tiny", [f"data.root={tiny}", "optim.ema=0.9", *steps])
    detector, *_ = restore_detector(train(config, tmp_path))
    detector.cuda().eval()
    exact, other = (detect(detector, config, precision, GPU) for precision in ("fp32", "bf16"))
    figures = compare(exact, other, 0.3)
    assert figures["matched"] >= 20 and figures["mean IoU"] >= 0.98, figures
    assert figures["mean difference of scores"] <= 0.02, figures
