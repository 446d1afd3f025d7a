"""Detect objects in images with a trained detector."""

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
from vitdet.data.images import DEFAULT, ImageInput, Reading, read_image
from vitdet.data.transforms import resize_and_pad
from vitdet.models.boxes import nonempty
from vitdet.models.graphed_detector import GraphedDetector
from vitdet.types import Detections

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": None}


class Predictor:
    """A detector with preprocessing and class names; `predictor(image, threshold)` detects objects.

    A predictor may be called from several threads.

    Args:
        detector: model for square canvases of `image_size`; its mode and device are not changed.
        class_names: the name of each label.
        image_size: side of the canvas in pixels.
        antialias: whether to resize with antialiasing; must be the same as in training.
        reading: settings for reading image files.
        precision: 'fp32', 'bf16', 'fp16' or 'auto'; see the setting evaluate.precision.
    """

    def __init__(
        self,
        detector: nn.Module,
        class_names: Sequence[str],
        image_size: int,
        antialias: bool = DataConfig.antialias,
        reading: Reading = DEFAULT,
        precision: str = EvalConfig.precision,
    ) -> None:
        self._set(detector, precision)
        self.class_names = tuple(class_names)
        self.image_size = image_size
        self.antialias = antialias
        self.reading = reading

    @property
    def detector(self) -> nn.Module:
        """The detector, which can be replaced by assignment."""
        return self.detect.detector

    @detector.setter
    def detector(self, detector: nn.Module) -> None:
        self._set(detector, self.precision)

    @property
    def precision(self) -> str:
        """The precision of the computation. Assigning an unknown precision raises ValueError."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self._set(self.detector, precision)

    def _set(self, detector: nn.Module, precision: str) -> None:
        if precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision: expected one of {known}, got {precision!r}")
        self._precision = precision
        self.detect = GraphedDetector(detector, partial(_context, precision, detector))

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        precision: str | None = None,
    ) -> Predictor:
        """Load a predictor from a checkpoint.

        Args:
            device: the default is a GPU if one is available, otherwise the CPU.
            precision: the default is evaluate.precision in the checkpoint's config.

        Raises FileNotFoundError for a missing file, ValueError for a file that is not a checkpoint.
        """
        detector, config, class_names = restore_detector(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        data = config.data
        reading = (data.image_size, data.antialias, Reading.of(data))
        precision = precision or config.evaluate.precision
        return cls(detector.to(device).eval(), class_names, *reading, precision)

    @overload
    def __call__(self, image: ImageInput, threshold: float = 0.5) -> Detections: ...

    @overload
    def __call__(self, image: list[ImageInput], threshold: float = 0.5) -> list[Detections]: ...

    @torch.no_grad()
    def __call__(
        self, image: ImageInput | list[ImageInput], threshold: float = 0.5
    ) -> Detections | list[Detections]:
        """Return the detections in an image, on the CPU. Boxes are in pixels of the upright image.

        Args:
            image: path of a file, PIL image, uint8 RGB array (H, W, 3) or uint8 RGB tensor
                (3, H, W); the EXIF orientation is applied. For a list of images, the result is a
                list of `Detections`.
            threshold: minimum score of a detection, 0..1.

        Raises FileNotFoundError for a missing file, ValueError for an image that cannot be read.
        """
        if isinstance(image, list):
            return [self(item, threshold) for item in image]
        picture = read_image(image, self.reading)
        canvas, size = resize_and_pad(picture, self.image_size, self.antialias)
        device = device_of(self.detector)
        images = torch.from_numpy(canvas)[None].to(device)
        (found,) = self.detect(images, torch.tensor([size], device=device))
        found = to_image(found.to("cpu"), size, (picture.height, picture.width))
        return replace(found[found.scores >= threshold], class_names=self.class_names)


def device_of(detector: nn.Module) -> torch.device:
    """Return the device of a detector's weights."""
    return next((parameter.device for parameter in detector.parameters()), torch.device("cpu"))


def _context(precision: str, detector: nn.Module) -> AbstractContextManager:
    return autocast(precision, device_of(detector))


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return the autocast context for a value of evaluate.precision on a device."""
    dtype = PRECISIONS[precision] or fastest(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def fastest(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device supports it natively, else float16 on GPUs of compute
    capability 7.0 or higher, else float32.
    """
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    volta = torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if volta else torch.float32


def to_image(found: Detections, size: tuple[int, int], original: tuple[int, int]) -> Detections:
    """Return detections in pixels of the original image; clip boxes and remove empty boxes.

    As in Detectron2's `detector_postprocess`, x and y have separate scale factors, because the
    sides of a resized image are rounded independently.

    Args:
        found: detections in pixels of the canvas.
        size: (height, width) of the image on the canvas, without padding.
        original: (height, width) of the original image.
    """
    height, width = original
    factors = torch.tensor([width / size[1], height / size[0]] * 2, device=found.boxes.device)
    limits = torch.tensor([width, height] * 2, dtype=found.boxes.dtype, device=found.boxes.device)
    boxes = torch.minimum((found.boxes * factors).clamp(min=0), limits)
    return replace(found, boxes=boxes)[nonempty(boxes)]
