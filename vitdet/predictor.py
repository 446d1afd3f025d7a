"""From an image to detections in its own pixels.

`to_image` undoes the canvas as Detectron2's `detector_postprocess` does: one factor an axis, since the sides of a
resized image are rounded apart; clip; drop what is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import overload

import torch
from torch import nn

from vitdet.checkpoint import restore_detector
from vitdet.config import DataConfig, EvalConfig
from vitdet.data.images import DEFAULT, Picture, Reading, read_image
from vitdet.data.transforms import resize_and_pad
from vitdet.models.graphed_detector import GraphedDetector
from vitdet.types import Detections

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": None}


class Predictor:
    """A detector with its class names: predictor(image, threshold) -> Detections in pixels of that image."""

    def __init__(
        self,
        detector: nn.Module,
        class_names: Sequence[str],
        image_size: int,
        antialias: bool = DataConfig.antialias,
        reading: Reading = DEFAULT,
        precision: str = EvalConfig.precision,
    ) -> None:
        """detector takes canvases of image_size pixels a side, resized with antialiasing or without as it was trained;
        its mode and device stay as they are. reading: how image files are read. precision: what the detector computes
        in, 'fp32', 'bf16', 'fp16' or 'auto', as evaluate.precision. Several threads may call one predictor.
        """
        self._set(detector, precision)
        self.class_names = tuple(class_names)
        self.image_size = image_size
        self.antialias = antialias
        self.reading = reading

    @property
    def detector(self) -> nn.Module:
        """What finds the objects; another one may be set."""
        return self.detect.detector

    @detector.setter
    def detector(self, detector: nn.Module) -> None:
        self._set(detector, self.precision)

    @property
    def precision(self) -> str:
        """The precision of the computation. Setting it raises ValueError for an unknown one."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self._set(self.detector, precision)

    def _set(self, detector: nn.Module, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {', '.join(PRECISIONS)}, got {precision!r}")
        self._precision = precision
        self.detect = GraphedDetector(detector, partial(_computing, precision, detector))

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        precision: str | None = None,
    ) -> Predictor:
        """The predictor of a checkpoint, on the given device (default: a GPU if there is one), in the given precision
        (default: that of the checkpoint's evaluations).

        Raises FileNotFoundError or ValueError with one line for a file that is no checkpoint.
        """
        detector, config, class_names = restore_detector(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            detector.to(device).eval(),
            class_names,
            config.data.image_size,
            config.data.antialias,
            Reading.of(config.data),
            precision or config.evaluate.precision,
        )

    @overload
    def __call__(self, image: Picture, threshold: float = 0.5) -> Detections: ...

    @overload
    def __call__(self, image: list[Picture], threshold: float = 0.5) -> list[Detections]: ...

    @torch.no_grad()
    def __call__(
        self, image: Picture | list[Picture], threshold: float = 0.5
    ) -> Detections | list[Detections]:
        """What is in an image with a score of at least `threshold`; a list of images gives a list.

        image: a file, a PIL image (EXIF orientation is applied), an array (H, W, 3) or a tensor (3, H, W), uint8 RGB.
        Boxes are pixels of the upright image; the result lies on the CPU. Raises FileNotFoundError for a missing file
        and ValueError for what is not an image.
        """
        if isinstance(image, list):
            return [self(item, threshold) for item in image]
        picture = read_image(image, self.reading)
        canvas, size = resize_and_pad(picture, self.image_size, self.antialias)
        device = device_of(self.detector)
        images = torch.from_numpy(canvas)[None].to(device)
        sizes = torch.tensor([size], device=device)
        (found,) = self.detect(images, sizes)
        found = to_image(found.to("cpu"), size, (picture.height, picture.width))
        return replace(found[found.scores >= threshold], class_names=self.class_names)


def device_of(detector: nn.Module) -> torch.device:
    """Where its weights are."""
    return next((parameter.device for parameter in detector.parameters()), torch.device("cpu"))


def _computing(precision: str, detector: nn.Module) -> AbstractContextManager:
    return autocast(precision, device_of(detector))


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """In which a detector on `device` computes in `precision`: 'fp32', 'bf16', 'fp16' or 'auto'."""
    kind = PRECISIONS[precision] or fastest(device)
    return nullcontext() if kind == torch.float32 else torch.autocast(device.type, kind)


def fastest(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it, float16 on older GPUs with tensor cores, else float32."""
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    volta = torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if volta else torch.float32


def to_image(found: Detections, size: tuple[int, int], original: tuple[int, int]) -> Detections:
    """Detections of a canvas in pixels of the original image, clipped to it and without empty boxes.

    size (height, width) of the unpadded image on the canvas, original (height, width) of the image itself.
    """
    high, wide = original
    factors = torch.tensor([wide / size[1], high / size[0]] * 2, device=found.boxes.device)
    limits = torch.tensor([wide, high] * 2, dtype=found.boxes.dtype, device=found.boxes.device)
    boxes = torch.minimum((found.boxes * factors).clamp(min=0), limits)
    return replace(found, boxes=boxes)[((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))]
