"""Time the detection kernels and the code without Triton on this GPU: python -m tests.bench.kernels

Median milliseconds at the sizes of ViT-B at 1024 pixels and batch 8 (and 1), called directly and in a CUDA graph.
`plain` is torchvision, for one image (NMS) or one level in float32 (RoIAlign) at a time, or our code (rasterize).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from tests.kernels.test_kernels_roi_align import reference
from vitdet.kernels.nms import nms
from vitdet.kernels.rasterize import rasterize
from vitdet.kernels.roi_align import roi_align
from vitdet.models.mask_head import rasterize as plain_rasterize
from vitdet.types import Polygons

SIDE, STRIDES = 1024, [4, 8, 16, 32]
OBJECTS = 8  # per image; most boxes are near an object, as in a trained detector


def boxes_on_objects(images: int, count: int) -> Tensor:
    """Return boxes (images, count, 4) around random objects, clipped to the image."""
    center = torch.rand(images, OBJECTS, 2, device="cuda") * SIDE
    size = 16 * 32 ** torch.rand(images, OBJECTS, 2, device="cuda")
    chosen = torch.randint(OBJECTS, (images, count), device="cuda")[..., None].expand(-1, -1, 2)
    center, size = center.gather(1, chosen), size.gather(1, chosen)
    center = center + torch.randn_like(center) * size * 0.2
    size = size * torch.exp(0.3 * torch.randn_like(size))
    return torch.cat([center - size / 2, center + size / 2], dim=2).clamp(0, SIDE)


def nms_case(images: int, groups: int, labels: int, limit: int) -> tuple[Callable, Callable]:
    """Return NMS by kernel and torchvision; 2,000 boxes per group (level, or image with labels)."""
    boxes = boxes_on_objects(images * groups, 2000)
    label = torch.randint(labels, boxes.shape[:2], device="cuda") if labels else None
    iou = 0.5 if labels else 0.7
    level = torch.arange(groups, device="cuda").repeat_interleave(2000)
    each = boxes.view(images, -1, 4)
    of = level.expand(images, -1) if label is None else label
    scores = torch.arange(each.shape[1], 0, -1, device="cuda").float()

    def plain() -> None:
        for image, classes in zip(each, of, strict=True):
            batched_nms(image, scores, classes, iou)[:limit]

    return lambda: nms(boxes, label, iou, limit), plain


def roi_case(images: int, rois: int, bins: int, backward: bool) -> tuple[Callable, Callable]:
    """Return RoIAlign by kernel and torchvision: `rois` boxes per image, maps in bfloat16."""
    shape = (images, 256)
    maps = [
        torch.randn(*shape, SIDE // stride, SIDE // stride, device="cuda", dtype=torch.bfloat16)
        .to(memory_format=torch.channels_last)
        .requires_grad_(backward)
        for stride in STRIDES
    ]
    boxes = boxes_on_objects(images, rois).flatten(0, 1)
    side = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
    level = torch.floor(2 + torch.log2(side / 224 + 1e-8)).clamp(0, 3).long()
    image = torch.arange(images, device="cuda").repeat_interleave(rois)
    gradient = torch.randn(len(boxes), bins, bins, 256, device="cuda", dtype=torch.bfloat16)
    gradient = gradient.permute(0, 3, 1, 2)

    def run(function: Callable, read: Callable) -> Callable:
        def step() -> None:
            found = function([read(part) for part in maps], boxes, image, level, STRIDES, bins, 0)
            if backward:
                torch.autograd.grad(found, maps, gradient.to(found.dtype))

        return step

    return run(roi_align, lambda tensor: tensor), run(reference, Tensor.float)


def rasterize_case(rois: int, edges: int) -> tuple[Callable, Callable]:
    """Return mask targets by kernel and plain code, for up to 128 outlines of `edges` edges."""
    angle = torch.linspace(0, 2 * torch.pi, edges + 1, device="cuda")
    corners = 500 + 400 * torch.stack([angle.cos(), angle.sin()], dim=1)
    outline = torch.cat([corners[:-1], corners[1:]], dim=1)
    objects = min(rois, 128)
    masks = Polygons.of(outline.repeat(objects, 1), torch.full((objects,), edges, device="cuda"))
    masks = masks[torch.arange(rois, device="cuda") % objects]
    boxes = boxes_on_objects(1, rois)[0]
    return (
        lambda: rasterize(masks.edges, masks.spans, boxes, 28),
        lambda: plain_rasterize(masks, boxes, 28),
    )


CASES: dict[str, Callable[[], tuple[Callable, Callable]]] = {
    "NMS, 8 x 5 levels": lambda: nms_case(8, 5, 0, 1000),
    "NMS, 1 x 5 levels": lambda: nms_case(1, 5, 0, 1000),
    "NMS by class, 8 images": lambda: nms_case(8, 1, 80, 100),
    "NMS by class, 1 image": lambda: nms_case(1, 1, 80, 100),
    "RoIAlign 7 x 7, forward": lambda: roi_case(8, 512, 7, False),
    "RoIAlign 7 x 7, with backward": lambda: roi_case(8, 512, 7, True),
    "RoIAlign 14 x 14, forward": lambda: roi_case(8, 128, 14, False),
    "RoIAlign 14 x 14, with backward": lambda: roi_case(8, 128, 14, True),
    "rasterize, 1024 RoIs, 60 edges": lambda: rasterize_case(1024, 60),
    "rasterize, 1 RoI, 187,000 edges": lambda: rasterize_case(1, 187_000),
}


def main() -> int:
    """Print the table."""
    if not torch.cuda.is_available():
        print("tests.bench.kernels times GPU kernels: no CUDA device here", file=sys.stderr)
        return 2
    from triton.testing import do_bench, do_bench_cudagraph

    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; median ms")
    print(f"{'':34}{'kernel':>9}{'in graph':>10}{'plain':>9}{'ratio':>8}")
    for name, case in CASES.items():
        kernel, plain = case()
        ours = do_bench(kernel, return_mode="median")
        graph = do_bench_cudagraph(kernel, return_mode="median")
        theirs = do_bench(plain, return_mode="median")
        print(f"{name:34}{ours:9.3f}{graph:10.3f}{theirs:9.3f}{theirs / ours:8.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
