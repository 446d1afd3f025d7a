"""From batches of images to COCO results of what a detector finds in them.

On a GPU the results of a batch are made while the next one is computed, by a thread with a CUDA stream of its own, which
waits for that batch alone: its boxes come to the CPU, its masks are pasted and their runs counted where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from vitdet import kernels
from vitdet.evaluation.run_lengths import encode_columns
from vitdet.kernels.paste import bytes_of, paste, regions_of
from vitdet.models.graphed_detector import GraphedDetector
from vitdet.predictor import autocast, to_image
from vitdet.types import Batch, Detections

Result = TypeVar("Result")
BYTES = 2**25  # of pasted masks at a time


def detections_to_results(
    detections: Detections,
    size: tuple[int, int],
    original: tuple[int, int],
    image_id: int,
    category_ids: Sequence[int],
) -> list[dict]:
    """COCO results {image_id, category_id, bbox xywh, score, segmentation RLE} of the detections of one canvas.

    Those of a detector without masks have no segmentation.

    size (height, width) of the unpadded image on the canvas, original of the file; category_ids[label] is a label's id.
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
    """What `detections_to_results` gives for each canvas of a batch.

    Where the kernels run (`vitdet.kernels.enabled`), masks stay on the GPU until their runs are counted.
    """
    found = [
        to_image(_moved(one), size, original)
        for one, size, original in zip(detections, sizes, originals, strict=True)
    ]
    results = [
        _without_masks(one, image_id, category_ids)
        for one, image_id in zip(found, image_ids, strict=True)
    ]
    masked = [index for index, one in enumerate(found) if one.masks is not None and len(one)]
    if masked:
        codes = _segmentations([found[i] for i in masked], [originals[i] for i in masked])
        for result, code in zip([one for i in masked for one in results[i]], codes, strict=True):
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
    """For each batch, the COCO results of its images by their ids.

    The detector is on `device`, in evaluation mode, and computes in `precision` (as `evaluate.precision`). On a GPU
    the results of a batch come after the next batch was computed; of no more than two batches there is anything in
    memory.
    """
    device = torch.device(device)
    detect = GraphedDetector(detector, lambda: autocast(precision, device))
    if device.type != "cuda":  # the detector needs all cores
        for batch in batches:
            yield _results(_found(detect, batch, device), batch, category_ids)
        return
    stream = torch.cuda.Stream(device, priority=-1)

    def jobs() -> Iterator[Callable[[], dict[int, list[dict]]]]:
        slots = 0
        for batch in batches:
            slots = slots or len(batch)
            found = _found(detect, batch, device, slots)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(device))
            yield partial(_results_aside, stream, done, found, batch, category_ids)

    yield from one_behind(jobs())


def one_behind(jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """What the jobs return, in order; each runs in a thread while the next one is taken from `jobs`.

    An error of a job is raised here, in its turn.
    """
    before: Future[Result] | None = None
    with ThreadPoolExecutor(1) as thread:
        for job in jobs:
            if before is not None:
                yield before.result()
            before = thread.submit(job)
        if before is not None:
            yield before.result()


def _found(
    detect: GraphedDetector, batch: Batch, device: torch.device, slots: int = 0
) -> list[Detections]:
    """The detections in the images of a batch. A smaller batch is padded to `slots` images, as the detector is compiled and
    recorded for each batch size.
    """
    # sizes are in memory that is not pinned: a blocking copy would wait for the batch before
    images, sizes = (one.to(device, non_blocking=True) for one in (batch.images, batch.sizes))
    if (spare := slots - len(batch)) > 0:
        images, sizes = F.pad(images, (0,) * 7 + (spare,)), F.pad(sizes, (0, 0, 0, spare))
    return detect(images, sizes)[: len(batch)]


def _results_aside(
    stream: torch.cuda.Stream,
    done: torch.cuda.Event,
    found: list[Detections],
    batch: Batch,
    category_ids: Sequence[int],
) -> dict[int, list[dict]]:
    """The results of a batch that was computed on another stream, there `done`; made on `stream`.

    When they are there, the stream has nothing left to do, so the memory of `found` may be used again.
    """
    with torch.cuda.stream(stream):
        stream.wait_event(done)
        return _results(found, batch, category_ids)


def _results(
    found: list[Detections], batch: Batch, category_ids: Sequence[int]
) -> dict[int, list[dict]]:
    assert batch.originals is not None
    sizes, originals = batch.sizes.tolist(), batch.originals.tolist()
    results = batch_to_results(found, sizes, originals, batch.image_ids, category_ids)
    return dict(zip(batch.image_ids, results, strict=True))


def _moved(found: Detections) -> Detections:
    """Detections on the CPU; masks that the kernels can paste stay where they are."""
    if found.masks is None or not kernels.enabled(found.masks):
        return found.to("cpu")
    return replace(replace(found, masks=None).to("cpu"), masks=found.masks)


def _without_masks(found: Detections, image_id: int, category_ids: Sequence[int]) -> list[dict]:
    corners = found.boxes.double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(
            found.labels.tolist(), boxes, found.scores.double().tolist(), strict=True
        )
    ]


def _segmentations(
    found: Sequence[Detections], originals: Sequence[tuple[int, int]]
) -> Iterator[dict]:
    """RLE dicts of the masks of several images, which are on one device; the boxes are on the CPU."""
    masks = torch.cat([one.masks.float() for one in found if one.masks is not None])
    boxes = torch.cat([one.boxes.float() for one in found])
    sizes = torch.tensor(originals).repeat_interleave(
        torch.tensor([len(one) for one in found]), dim=0
    )
    regions = regions_of(boxes, sizes)
    for part in _parts(bytes_of(regions).tolist()):
        ends = bytes_of(regions[part]).cumsum(0)
        placed, inside, stops, wholes = (
            one.to(masks.device, non_blocking=True)
            for one in (boxes[part], regions[part], ends, sizes[part])
        )
        pixels = paste(masks[part], placed, inside, stops, int(ends[-1]))
        yield from encode_columns(pixels, inside, stops, wholes)


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Cuts so that no part has more than BYTES, unless one mask alone has."""
    start = total = 0
    for index, size in enumerate(sizes):
        if total + size > BYTES and index > start:
            yield slice(start, index)
            start, total = index, 0
        total += size
    yield slice(start, len(sizes))
