"""Run a detector on batches of images and convert its detections to COCO results.

A COCO result is {image_id, category_id, bbox: [x, y, width, height], score, segmentation}. The
bbox is in pixels of the original image. The segmentation is a compressed RLE; it is omitted for
detectors without a mask head.

On a GPU, a thread with a separate CUDA stream converts the detections of a batch while the detector
processes the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from vitdet import kernels
from vitdet.evaluation.run_lengths import encode_columns
from vitdet.kernels.paste import bytes_of, paste, regions_of
from vitdet.models.graphed_detector import GraphedDetector
from vitdet.predictor import autocast, to_image
from vitdet.types import Batch, Detections

Result = TypeVar("Result")
BYTES = 2**25  # maximum total size in bytes of the masks that are pasted at once


def detections_to_results(
    detections: Detections,
    size: tuple[int, int],
    original: tuple[int, int],
    image_id: int,
    category_ids: Sequence[int],
) -> list[dict]:
    """Return the COCO results of one image.

    Args:
        detections: in pixels of the detector's input.
        size: (height, width) of the resized image in the detector's input, without padding.
        original: (height, width) of the image file.
        category_ids: the category id of each label.
    """
    (results,) = batch_to_results([detections], [size], [original], [image_id], category_ids)
    return results


def batch_to_results(
    detections: Sequence[Detections],
    sizes: Sequence[tuple[int, int]],
    originals: Sequence[tuple[int, int]],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
) -> list[list[dict]]:
    """Return the COCO results of each image; see `detections_to_results` for the arguments."""
    found = [
        to_image(_to_cpu(canvas), size, original)
        for canvas, size, original in zip(detections, sizes, originals, strict=True)
    ]
    results = []
    for image, image_id in zip(found, image_ids, strict=True):
        boxes = box_convert(image.boxes.double(), "xyxy", "xywh").tolist()
        columns = zip(image.labels.tolist(), boxes, image.scores.double().tolist(), strict=True)
        results.append(
            [
                {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": p}
                for label, box, p in columns
            ]
        )
    if any(map(len, found)) and all(image.masks is not None for image in found):
        codes = _segmentations(found, originals)
        for result, code in zip(chain.from_iterable(results), codes, strict=True):
            result["segmentation"] = code
    return results


@torch.no_grad()
def results_of(
    detector: nn.Module,
    batches: Iterable[Batch],
    category_ids: Sequence[int],
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Iterator[dict[int, list[dict]]]:
    """Yield the COCO results of each batch by image id.

    The detector must be on `device` and in evaluation mode. On a GPU, each batch is read before the
    results of the previous batch are yielded. For `precision`, see the setting evaluate.precision.
    """
    device = torch.device(device)
    detect = GraphedDetector(detector, lambda: autocast(precision, device))
    if device.type != "cuda":  # a thread would not help: the detector uses all cores
        for batch in batches:
            yield _results(_found(detect, batch, device), batch, category_ids)
        return
    stream = torch.cuda.Stream(device, priority=-1)

    def convert(
        found: list[Detections], batch: Batch, computed: torch.cuda.Event
    ) -> dict[int, list[dict]]:
        # the conversion waits for its copies to the CPU, so the memory of `found` can be reused
        with torch.cuda.stream(stream):
            stream.wait_event(computed)
            return _results(found, batch, category_ids)

    def jobs() -> Iterator[Callable[[], dict[int, list[dict]]]]:
        slots = 0
        for batch in batches:
            slots = slots or len(batch)
            found = _found(detect, batch, device, slots)
            computed = torch.cuda.current_stream(device).record_event()
            yield partial(convert, found, batch, computed)

    yield from one_behind(jobs())


def one_behind(jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Yield the results of jobs in order; a thread runs each job while `jobs` creates the next one.

    An exception in a job is raised when the job's result would be yielded.
    """
    pending: Future[Result] | None = None
    with ThreadPoolExecutor(1) as thread:
        for job in jobs:
            if pending is not None:
                yield pending.result()
            pending = thread.submit(job)
        if pending is not None:
            yield pending.result()


def _found(
    detect: GraphedDetector, batch: Batch, device: torch.device, slots: int = 0
) -> list[Detections]:
    """Detect objects; pad the batch to `slots` images (0: no padding), so all shapes are equal."""
    # non_blocking although `sizes` is not pinned: a blocking copy would wait for the previous batch
    images, sizes = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.sizes))
    if (spare := slots - len(batch)) > 0:
        images, sizes = F.pad(images, (0,) * 7 + (spare,)), F.pad(sizes, (0, 0, 0, spare))
    return detect(images, sizes)[: len(batch)]


def _results(
    found: list[Detections], batch: Batch, category_ids: Sequence[int]
) -> dict[int, list[dict]]:
    assert batch.originals is not None
    sizes, originals = batch.sizes.tolist(), batch.originals.tolist()
    results = batch_to_results(found, sizes, originals, batch.image_ids, category_ids)
    return dict(zip(batch.image_ids, results, strict=True))


def _to_cpu(found: Detections) -> Detections:
    """Move detections to the CPU, except masks that the kernels paste on the GPU."""
    if found.masks is None or not kernels.enabled(found.masks):
        return found.to("cpu")
    return replace(replace(found, masks=None).to("cpu"), masks=found.masks)


def _segmentations(
    found: Sequence[Detections], originals: Sequence[tuple[int, int]]
) -> Iterator[dict]:
    """Yield the RLE of each mask. Boxes must be on the CPU; masks may be on any device."""
    masks = torch.cat([image.masks.float() for image in found if image.masks is not None])
    boxes = torch.cat([detections.boxes.float() for detections in found])
    counts = torch.tensor([len(detections) for detections in found])
    sizes = torch.tensor(originals).repeat_interleave(counts, dim=0)
    regions = regions_of(boxes, sizes)
    for part in _parts(bytes_of(regions).tolist()):
        ends = bytes_of(regions[part]).cumsum(0)
        part_boxes, part_regions, part_ends, part_sizes = (
            tensor.to(masks.device, non_blocking=True)
            for tensor in (boxes[part], regions[part], ends, sizes[part])
        )
        pixels = paste(masks[part], part_boxes, part_regions, part_ends, int(ends[-1]))
        yield from encode_columns(pixels, part_regions, part_ends, part_sizes)


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Yield slices of masks with at most BYTES in total, or with a single larger mask."""
    start = total = 0
    for index, size in enumerate(sizes):
        if total + size > BYTES and index > start:
            yield slice(start, index)
            start, total = index, 0
        total += size
    yield slice(start, len(sizes))
