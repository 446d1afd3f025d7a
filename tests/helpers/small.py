"""A small detector for tests, with weights that give every part an effect, and its targets."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitdet.config import (
    BackboneConfig,
    EvalConfig,
    MaskConfig,
    ModelConfig,
    PyramidConfig,
    RoIHeadsConfig,
    RPNConfig,
)
from vitdet.models import build_detector
from vitdet.types import Polygons, Target

SIDE = 128
CLASSES = 4


def small_config(ious=(0.5,), loss="softmax", sampling_ratio=2, fork=False):
    """Return a small config; `fork` selects the common settings of ViTAE-Transformer/ViTDet's recipes."""
    return ModelConfig(
        backbone=BackboneConfig(
            name="vit_tiny",
            window_size=3,
            drop_path=0.0,
            pos_embed_grid=4,
            rel_pos_size=96,
            scaled_rel_pos=fork,
            final_norm=fork,
        ),
        pyramid=PyramidConfig(channels=16, halve_channels=not fork),
        rpn=RPNConfig(
            samples=32,
            pre_nms_train=60,
            pre_nms_test=30,
            post_nms_train=50,
            post_nms_test=25,
            norm=fork,
            divide_by_sampled=fork,
        ),
        roi_heads=RoIHeadsConfig(
            num_classes=CLASSES,
            ious=ious,
            loss=loss,
            samples=24,
            num_convs=1,
            fc_dim=32,
            sampling_ratio=sampling_ratio,
            federated_classes=3,
        ),
        mask=MaskConfig(num_convs=1, samples=8),
        norm_eps=1e-5 if fork else 1e-6,
        low_quality="best" if fork else "own",
        clamp_shrinking=fork,
    )


def small_detector(seed=0, ious=(0.5,), loss="softmax", sampling_ratio=2, fork=False):
    torch.manual_seed(seed)
    settings = EvalConfig(score_threshold=0.05, max_detections=20)
    detector = build_detector(small_config(ious, loss, sampling_ratio, fork), settings)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            factor = 0.05 if "rpn.deltas" in name or ".deltas" in name else 0.7
            parameter += factor * torch.randn_like(parameter) / fan_in**0.5
    return detector


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return blocks.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def rectangle(x0, y0, x1, y1):
    """Return the outline of a box as directed edges (4, 4)."""
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    edges = [start + end for start, end in zip(corners, corners[1:] + corners[:1], strict=True)]
    return torch.tensor(edges, dtype=torch.float32)


def target(boxes, labels):
    """Return a target of rectangles that fill their boxes."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor(labels, dtype=torch.int64)
    return Target(boxes, labels, polygons([rectangle(*box) for box in boxes.tolist()]))


def polygons(outlines):
    """Return the masks of a target from each object's edges (E, 4)."""
    counts = torch.tensor([len(lines) for lines in outlines], dtype=torch.int64)
    return Polygons.of(torch.cat([torch.zeros(0, 4), *outlines]), counts)


class Operations(TorchDispatchMode):
    """Record the names and keyword arguments of the operations that torch runs."""

    def __init__(self):
        super().__init__()
        self.names, self.given = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        self.given.append(kwargs or {})
        return function(*args, **(kwargs or {}))
