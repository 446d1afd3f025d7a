"""Speed of detection: from images to detections on the device, and to COCO results with RLE.

With random weights, a detector may find nothing, so that the mask head would process no RoIs.
Therefore the class logits are scaled up so that an image has up to `evaluate.max_detections`
detections. Times are measured from one call to the next and include copying images to the device.
"""

from __future__ import annotations

import time

import torch

from vitdet.cli.bench.measurement import call_row, forward_flops, measured, peak_memory
from vitdet.cli.bench.training import images_for, new_detector
from vitdet.config import Config
from vitdet.evaluation.detections import results_of
from vitdet.models import Detector
from vitdet.models.compile import compile_parts
from vitdet.models.graphed_detector import GraphedDetector
from vitdet.training.precision import autocast
from vitdet.types import Batch, Detections

WARM = 3  # number of warm-up calls
SCALES = (1, 4, 16, 32, 64)  # factors of the class logits, tried in this order


def measure_inference(
    config: Config, sizes: list[int], precisions: list[str], steps: int, device: torch.device
) -> dict:
    """Measure detection for these batch sizes and precisions; see `measurement.measured`."""
    detector = new_detector(config, device).eval()
    image = images_for(config, 1).to(device)
    detections = let_detect(detector, image)
    flops = forward_flops(detector, lambda: detector(image.images, None, image.sizes))
    if config.evaluate.compile and device.type == "cuda":
        compile_parts(detector)

    def measure(_: Config, precision: str, size: int) -> dict:
        found = measure_calls(detector, images_for(config, size), precision, steps, device)
        return {**found, "detections": detections}

    return measured(config, "evaluate", sizes, precisions, device, flops, measure)


@torch.no_grad()
def let_detect(detector: Detector, batch: Batch) -> int:
    """Scale the class logits by increasing factors (SCALES) until the image in `batch` has the
    maximum number of detections or the last factor is reached; return the number of detections.
    """
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
    """Return the table row for one batch size and precision; see `measurement.call_row`.

    The additional key results_per_second is the number of images per second for detection and
    conversion to COCO results, without reading images or computing AP.
    """
    peak = peak_memory(device)
    find = GraphedDetector(detector, lambda: autocast(precision, device))

    def detect() -> list[Detections]:
        images = batch.images.to(device, non_blocking=True)
        return find(images, batch.sizes.to(device, non_blocking=True))

    row = call_row(detect, len(batch), steps, device, WARM, peak)
    loop = results_of(detector, [batch] * (WARM + steps), range(10**5), device, precision)
    for _ in range(WARM):
        next(loop)
    start = time.perf_counter()
    for _ in loop:
        pass
    return row | {"results_per_second": len(batch) * steps / (time.perf_counter() - start)}
