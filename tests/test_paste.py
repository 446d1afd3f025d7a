"""Pasted masks and their run lengths, from the pixels of their boxes alone, beside the whole images'."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from vitdet.data.masks import encode, paste
from vitdet.evaluation import detections
from vitdet.evaluation.detections import batch_to_results
from vitdet.evaluation.run_lengths import encode_columns
from vitdet.kernels.paste import bytes_of, reference, regions_of
from vitdet.types import Detections

HEIGHT, WIDTH = 37, 53
# boxes on an image of 37 x 53 pixels
PLACES = {
    "inside": [10.3, 8.9, 41.2, 30.1],
    "whole image": [0, 0, WIDTH, HEIGHT],
    "beyond the image": [-9.5, -4.2, WIDTH + 7.7, HEIGHT + 30.4],
    "top left corner": [-3, -2, 9.5, 11],
    "bottom right corner": [40.6, 22.1, WIDTH, HEIGHT],
    "bottom right corner, beyond": [40.6, 22.1, WIDTH + 20, HEIGHT + 20],
    "full height": [20.2, -8, 31, HEIGHT + 8],
    "full width": [-8, 11, WIDTH + 8, 16.4],
    "last column": [WIDTH - 1, -30, WIDTH, HEIGHT + 30],
    "less than a pixel": [12.1, 13.2, 12.4, 13.9],
    "no area": [12.5, 7.5, 12.5, 9.5],
    "left of the image": [-30, 3, -10, 20],
    "below the image": [3, HEIGHT + 5, 20, HEIGHT + 9],
}
CELLS = torch.cartesian_prod(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28))
MASKS = {
    "noise": lambda: torch.rand(28, 28, generator=torch.Generator().manual_seed(3)),
    "stripes": lambda: (torch.arange(28) % 2).float().expand(28, -1),
    "disc": lambda: (
        (8 - 8 * torch.cdist(CELLS[:, None], torch.zeros(1, 1, 2))).view(28, 28).sigmoid()
    ),
    "full": lambda: torch.ones(28, 28),
    "empty": lambda: torch.zeros(28, 28),
    "half everywhere": lambda: torch.full((28, 28), 0.5),
}


def columns(masks: Tensor, boxes: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    """The arguments of `encode_columns`."""
    regions = regions_of(boxes, sizes)
    ends = bytes_of(regions).cumsum(0)
    return reference(masks, boxes, regions, ends, int(ends[-1])), regions, ends, sizes


@pytest.mark.parametrize("kind", MASKS)
def test_the_strings_are_those_of_whole_images(kind: str) -> None:
    boxes = torch.tensor(list(PLACES.values()))
    masks = MASKS[kind]().repeat(len(boxes), 1, 1)
    size = (HEIGHT, WIDTH)
    found = encode_columns(*columns(masks, boxes, torch.tensor([size] * len(boxes))))
    for name, one, wanted in zip(PLACES, found, encode(paste(masks, boxes, size)), strict=True):
        assert one == wanted, name


def some(count: int, seed: int, masks: bool = True) -> Detections:
    """Detections of a canvas of 100 x 100 pixels."""
    generator = torch.Generator().manual_seed(seed)
    low = 110 * torch.rand(count, 2, generator=generator) - 10
    sides = 90 * torch.rand(count, 2, generator=generator) ** 2
    return Detections(
        torch.cat([low, low + sides], dim=1),
        torch.rand(count, generator=generator),
        torch.zeros(count, dtype=torch.int64),
        torch.rand(count, 28, 28, generator=generator) if masks else None,
    )


SIZES = [(100, 100), (90, 100), (100, 47), (100, 80)]
ORIGINALS = [(50, 50), (120, 133), (311, 146), (40, 32)]


@pytest.mark.parametrize("most", [2**25, 20_000, 1])
def test_a_batch_of_any_images_gives_what_each_gives_alone(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detections, "BYTES", most)
    batch = [some(7, 0), some(0, 1), some(30, 2), some(1, 3)]
    results = batch_to_results(batch, SIZES, ORIGINALS, (4, 5, 6, 7), (9,))
    for found, size, original, image_id, ours in zip(
        batch, SIZES, ORIGINALS, (4, 5, 6, 7), results, strict=True
    ):
        moved = detections.to_image(found, size, original)
        assert moved.masks is not None
        wanted = encode(paste(moved.masks, moved.boxes, original))
        assert [one["segmentation"] for one in ours] == wanted
        assert all(one["image_id"] == image_id for one in ours)


def test_detectors_without_masks_have_boxes_only() -> None:
    results = batch_to_results(
        [some(3, 0, masks=False), some(0, 1, masks=False)], SIZES[:2], ORIGINALS[:2], (1, 2), (9,)
    )
    assert [len(one) for one in results] == [3, 0]
    assert all("segmentation" not in one for image in results for one in image)


def test_large_images_are_sampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.tensor(list(PLACES.values()))
    masks = MASKS["noise"]().repeat(len(boxes), 1, 1)
    sizes = torch.tensor([(HEIGHT, WIDTH)] * len(boxes))
    at_once = columns(masks, boxes, sizes)[0]
    monkeypatch.setattr("vitdet.kernels.paste.PIXELS", 100)
    assert torch.equal(columns(masks, boxes, sizes)[0], at_once)


# In a process of its own, as Triton's interpreter is chosen when it is imported
INTERPRETED = """
import torch
from tests.test_paste import MASKS, PLACES, HEIGHT, WIDTH, columns
from vitdet.kernels.paste_kernels import launch
boxes = torch.tensor(list(PLACES.values()))
sizes = torch.tensor([(HEIGHT, WIDTH)] * len(boxes))
masks = MASKS["noise"]().repeat(len(boxes), 1, 1)
wanted, regions, ends, _ = columns(masks, boxes, sizes)
assert torch.equal(launch(masks, boxes, regions, ends, len(wanted)), wanted)
"""


def test_the_kernel_writes_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=True,
        timeout=600,
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_strings_of_the_cpu() -> None:
    batch = [some(100, seed) for seed in range(4)]
    originals = [(480, 640), (427, 640), (50, 50), (1500, 2000)]
    wanted = batch_to_results(batch, SIZES, originals, range(4), (9,))
    moved = [one.to("cuda") for one in batch]
    assert batch_to_results(moved, SIZES, originals, range(4), (9,)) == wanted
