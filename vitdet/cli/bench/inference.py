"""How fast detection is: images to detections on the device, and an evaluation's loop to COCO results with run lengths.

Random weights find nothing that passes `evaluate.score_threshold`, so the class logits are scaled up until every image
has as many detections as `evaluate.max_detections` allows: the mask head and the results then have the work that they
have with LVIS. A row's time is from one call to the next, on a GPU in the order of its work, copies of the images
included.
"""

from __future__ import annotations

import statistics
import time

import torch

from vitdet.cli.bench.measurement import counted, forward_flops, measured, peak_memory, timed
from vitdet.cli.bench.training import images_for, new_detector
from vitdet.config import Config
from vitdet.evaluation.detections import results_of
from vitdet.models import Detector
from vitdet.models.compile import compile_parts
from vitdet.models.graphed_detector import GraphedDetector
from vitdet.training.precision import autocast
from vitdet.types import Batch, Detections

WARM, COUNTED = 3, 2
SCALES = (1, 4, 16, 32, 64)  # of the class logits, of which the smallest that serves is taken


def measure_inference(
    config: Config, sizes: list[int], precisions: list[str], steps: int, device: torch.device
) -> dict:
    """What `measurement.measured` returns, of detection."""
    detector = new_detector(config, device).eval()
    one = images_for(config, 1).to(device)
    detections = let_detect(detector, one)
    flops = forward_flops(detector, lambda: detector(one.images, None, one.sizes))
    if config.evaluate.compile and device.type == "cuda":
        compile_parts(detector)

    def measure(_: Config, precision: str, size: int) -> dict:
        found = measure_calls(detector, images_for(config, size), precision, steps, device)
        return {**found, "detections": detections}

    return measured(config, "evaluate", sizes, precisions, device, flops, measure)


@torch.no_grad()
def let_detect(detector: Detector, batch: Batch) -> int:
    """Scales the class logits until the image of `batch` has as many detections as there may be; their number."""
    layers = [stage.get_submodule("logits") for stage in detector.roi_heads.stages]
    drawn = [layer.get_parameter("weight").clone() for layer in layers]
    found = 0
    for scale in SCALES:
        for layer, weight in zip(layers, drawn, strict=True):
            layer.get_parameter("weight").copy_(scale * weight)
        found = len(detector(batch.images, None, batch.sizes)[0])
        if found == detector.roi_heads.max_detections:
            break
    return found


@torch.no_grad()
def measure_calls(
    detector: Detector, batch: Batch, precision: str, steps: int, device: torch.device
) -> dict:
    """The measurements of one batch size and precision: ms (median) a batch, counts, and those of an evaluation's loop."""
    peak = peak_memory(device)

    find = GraphedDetector(detector, lambda: autocast(precision, device))

    def detect() -> list[Detections]:
        images, sizes = (one.to(device, non_blocking=True) for one in (batch.images, batch.sizes))
        return find(images, sizes)

    times = timed(detect, device, steps, warm=WARM)
    with counted(device, COUNTED) as counts:
        for _ in range(COUNTED if device.type == "cuda" else 0):
            detect()
    return {
        "ms": statistics.median(times),
        "images_per_second": 1e3 * len(batch) / statistics.mean(times),
        "peak_gib": peak(),
        "results_per_second": len(batch)
        / result_seconds(detector, batch, precision, steps, device),
        **counts,
    }


def result_seconds(
    detector: Detector, batch: Batch, precision: str, steps: int, device: torch.device
) -> float:
    """Seconds a batch of an evaluation, detections as COCO results, its reading of images and its comparison left out."""
    loop = results_of(detector, [batch] * (WARM + steps), range(10**5), device, precision)
    for _ in range(WARM):
        next(loop)
    start = time.perf_counter()
    for _ in loop:
        pass
    return (time.perf_counter() - start) / steps
