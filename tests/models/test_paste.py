"""Masks pasted within their boxes, and their run lengths, against masks of whole images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.triton_device import needs_gpu
from vitdet.data.masks import encode, paste
from vitdet.evaluation import detections
from vitdet.evaluation.detections import (
    batch_to_results,
    detections_to_results,
    one_behind,
    results_of,
)
from vitdet.evaluation.run_lengths import encode_columns
from vitdet.kernels.paste import bytes_of, reference, regions_of
from vitdet.types import Batch, Detections

HEIGHT, WIDTH = 37, 53
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
    "disc": lambda: (8 - 8 * CELLS.norm(dim=1)).view(28, 28).sigmoid(),
    "full": lambda: torch.ones(28, 28),
    "empty": lambda: torch.zeros(28, 28),
    "half everywhere": lambda: torch.full((28, 28), 0.5),
}


def placed(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks, boxes and image sizes, with one mask at each of PLACES."""
    boxes = torch.tensor(list(PLACES.values()))
    masks = MASKS[kind]().repeat(len(boxes), 1, 1)
    return masks, boxes, torch.tensor([(HEIGHT, WIDTH)] * len(boxes))


def columns(masks: Tensor, boxes: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    """Return the arguments of `encode_columns`."""
    regions = regions_of(boxes, sizes)
    ends = bytes_of(regions).cumsum(0)
    return reference(masks, boxes, regions, ends, int(ends[-1])), regions, ends, sizes


@pytest.mark.parametrize("kind", MASKS)
def test_run_length_strings_equal_the_strings_of_whole_images(kind: str) -> None:
    masks, boxes, sizes = placed(kind)
    found = encode_columns(*columns(masks, boxes, sizes))
    whole = encode(paste(masks, boxes, (HEIGHT, WIDTH)))
    for name, pasted, wanted in zip(PLACES, found, whole, strict=True):
        assert pasted == wanted, name


def some(count: int, seed: int, masks: bool = True) -> Detections:
    """Return detections on a canvas of 100 x 100 pixels."""
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
def test_results_of_a_batch_equal_the_results_of_single_images(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detections, "BYTES", most)
    batch = [some(7, 0), some(0, 1), some(30, 2), some(1, 3)]
    results = batch_to_results(batch, SIZES, ORIGINALS, (4, 5, 6, 7), (9,))
    rows = zip(batch, SIZES, ORIGINALS, (4, 5, 6, 7), results, strict=True)
    for found, size, original, image_id, ours in rows:
        moved = detections.to_image(found, size, original)
        assert moved.masks is not None
        wanted = encode(paste(moved.masks, moved.boxes, original))
        assert [result["segmentation"] for result in ours] == wanted
        assert all(result["image_id"] == image_id for result in ours)


def test_results_of_detectors_without_masks_have_no_segmentation() -> None:
    batch = [some(count, seed, masks=False) for seed, count in enumerate((3, 0))]
    results = batch_to_results(batch, SIZES[:2], ORIGINALS[:2], (1, 2), (9,))
    assert [len(rows) for rows in results] == [3, 0]
    assert all("segmentation" not in result for image in results for result in image)


def test_large_images_are_sampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = columns(*placed("noise"))[0]
    monkeypatch.setattr("vitdet.kernels.paste.PIXELS", 100)
    assert torch.equal(columns(*placed("noise"))[0], at_once)


class Squares(nn.Module):
    """A detector that returns three squares at positions given by an image's first pixels."""

    def forward(self, images: Tensor, targets: None, sizes: Tensor) -> list[Detections]:
        low = images.flatten(1)[:, :6].float().view(-1, 3, 2) / 8
        masks = torch.arange(784, device=images.device).view(1, 28, 28).expand(3, -1, -1) / 1024
        return [
            Detections(torch.cat([xy, xy + 30], dim=1), xy[:, 0], xy[:, 1].long(), masks)
            for xy in low
        ]


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    sizes, originals = torch.tensor([[64, 64], [50, 64]]), torch.tensor([[60, 60], [375, 480]])
    found = []
    for number in range(0, 2 * count, 2):
        pixels = torch.randint(256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
        found.append(Batch(pixels, [], sizes, (number, number + 1), originals))
    return found


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]
)
def test_results_of_batches_are_assigned_to_their_images(device: str) -> None:
    given, classes = batches(4), range(100, 140)
    found = list(results_of(Squares(), given, classes, device))
    assert [list(span) for span in found] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for batch, results in zip(given, found, strict=True):
        detected = Squares()(batch.images, None, batch.sizes)
        assert batch.originals is not None
        for i, image_id in enumerate(batch.image_ids):
            size, original = batch.sizes[i].tolist(), batch.originals[i].tolist()
            wanted = detections_to_results(detected[i], size, original, image_id, classes)
            assert results[image_id] == wanted and len(wanted) == 3


def test_a_job_runs_while_the_next_is_prepared() -> None:
    made = [threading.Event() for _ in range(4)]
    finished: list[int] = []

    def job(number: int) -> int:
        assert made[number + 1].wait(60)
        finished.append(number)
        return number

    def jobs() -> Iterator[Callable[[], int]]:
        for number in range(3):
            made[number].set()
            assert len(finished) >= number - 1  # at most one job is pending
            yield partial(job, number)
        made[3].set()

    assert list(one_behind(jobs())) == [0, 1, 2]


def test_errors_of_jobs_and_their_iterator_are_raised_unchanged() -> None:
    error = RuntimeError("in a job")

    def failing() -> int:
        raise error

    results = one_behind([lambda: 1, failing, lambda: 3])
    assert next(results) == 1
    with pytest.raises(RuntimeError) as caught:
        next(results)
    assert caught.value is error

    def jobs() -> Iterator[Callable[[], int]]:
        yield lambda: 1
        raise error

    with pytest.raises(RuntimeError) as caught:
        list(one_behind(jobs()))
    assert caught.value is error
    assert list(one_behind([])) == []
