"""`vitdet bench train` and `vitdet bench infer` on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from tests.cli.test_cli import Run, refused
from tests.conftest import MINIMAL, options
from tests.helpers.parts import block
from vitdet.cli.bench.measurement import forward_flops, report
from vitdet.cli.bench.synthetic import boxes_on_objects, make_images

SETTINGS = options([f"{key}={value}" for key, value in MINIMAL.items()])


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_a_benchmark_measures_a_row_for_each_batch_size(
    kind: str, vitdet: Run, tmp_path: Path
) -> None:
    words = "--batch 1,2 --steps 2 --precision fp32 --output bench.json".split()
    code, output, error = vitdet("bench", kind, "tiny", *SETTINGS, *words)
    assert code == 0, error
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch"] for row in figures["rows"]] == [1, 2]
    for row in figures["rows"]:
        assert row["precision"] == "fp32" and row["ms"] > 0 and row["peak_gib"] > 0
        rate = figures["product_tflops"]["fp32"]
        expected = row["images_per_second"] * figures["tflop_per_image"] / rate
        assert row["mfu"] == pytest.approx(expected)
        if kind == "infer":
            assert row["detections"] == MINIMAL["evaluate.max_detections"]
            assert row["results_per_second"] > 0
    assert report(figures) in output and len(output.splitlines()) == 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["train", "infer"])
def test_on_a_gpu_kernels_and_host_waits_are_counted(
    kind: str, vitdet: Run, tmp_path: Path
) -> None:
    words = "--batch 2 --steps 4 --precision bf16 --output bench.json".split()
    code, _, error = vitdet("bench", kind, "tiny", *SETTINGS, *words)
    assert code == 0, error
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["kernels"] >= row["launches"] > 0 and row["waits"] >= 0
    assert 0 < row["busy_ms"] and 0 < row["mfu"] < 1


def test_bad_arguments_are_rejected_in_one_line(vitdet: Run) -> None:
    message = "positive integers, e.g. 1,8; got '0'"
    refused(vitdet("bench", "train", "tiny", "--batch", "0"), message)
    refused(vitdet("bench", "train", "tiny", "--batch", "1,x"), "got '1,x'")
    refused(vitdet("bench", "infer", "tiny", "--steps", "0"), "--steps must be at least 1, got 0")
    refused(vitdet("bench", "train", "tiny", "--precision", "fp31"), "train.precision")


def test_attention_flops_follow_the_definition_in_windows_and_on_the_grid() -> None:
    dim, height, width = 8, 5, 4
    for window in (0, 3):  # windows of 3 do not divide the grid; their padding is not counted
        part = block(dim=dim, heads=2, window=window, grid=(height, width))
        found = forward_flops(part, lambda part=part: part(torch.randn(2, height, width, dim)))
        tokens, keys = 2 * height * width, window**2 or height * width
        layers = 2 * tokens * (4 * dim * dim + 2 * dim * 4 * dim)
        assert found == layers + 4 * tokens * keys * dim


def test_flops_of_convolutions_and_matrix_products_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 16, 7))
    found = forward_flops(model, lambda: model(torch.randn(1, 3, 4, 4)))
    assert found == 2 * (16 * 5 * 3 * 9 + 80 * 7)


def test_images_are_reproducible_and_contain_their_objects() -> None:
    batch, again = (make_images(2, 128, 6) for _ in range(2))
    assert batch.images.equal(again.images) and batch.images.float().std() > 20
    for target in batch.targets:
        assert len(target) and (target.labels < 6).all()
        assert (target.boxes >= 0).all() and (target.boxes <= 128).all()
        spans = target.masks.spans
        for box, (start, end) in zip(target.boxes, spans.tolist(), strict=True):
            points = target.masks.edges[start:end, :2]
            assert torch.cat([points.amin(0), points.amax(0)]).allclose(box)


def test_boxes_on_objects_are_foreground() -> None:
    (target,) = make_images(1, 1024, 80).targets
    laid = boxes_on_objects(target.boxes, 200, 1024)
    overlap = box_iou(laid, target.boxes).amax(dim=1)
    assert (overlap >= 0.5).float().mean() > 0.8
