"""RoIAlign over all levels: Triton kernels against torchvision in float64."""

import math

import pytest
import torch
from torchvision import ops

from tests.helpers.triton_device import DEVICE, REGISTRATION, needs_gpu, needs_triton, no_waits
from vitdet.kernels.roi_align import roi_align

STRIDES = [4, 8, 16, 32, 64]


def reference(maps, boxes, image, level, strides, bins, ratio):
    """Compute `roi_align` of finite boxes by torchvision, in the maps' precision."""
    rois = torch.cat([image[:, None], boxes], dim=1).to(maps[0].dtype)
    found = maps[0].new_zeros(len(boxes), maps[0].shape[1], bins, bins)
    for number, (features, stride) in enumerate(zip(maps, strides, strict=True)):
        chosen = (level == number).nonzero().flatten()
        pooled = ops.roi_align(features, rois[chosen], bins, 1 / stride, ratio, aligned=True)
        found = found.index_put((chosen,), pooled)
    return found


class Scene:
    """Maps and RoIs that are small, large, empty, outside the map, or in an empty slot."""

    def __init__(self, sizes, rois, channels, images=2, kind=torch.float32):
        draw = torch.Generator().manual_seed(0)
        self.maps = [
            torch.randn(images, channels, *size, generator=draw).to(kind) for size in sizes
        ]
        self.strides = STRIDES[: len(sizes)]
        side = torch.tensor([sizes[0][1], sizes[0][0]]) * 4.0
        center = torch.rand(rois, 2, generator=draw) * side
        size = side * torch.rand(rois, 2, generator=draw) ** 2
        self.boxes = torch.cat([center - size / 2, center + size / 2], dim=1)
        self.boxes[0] = torch.cat([-side, 3 * side])
        self.boxes[1] = torch.cat([-side, -side / 2])
        self.boxes[2, 2] = self.boxes[2, 0]
        self.boxes[3, 2:] = self.boxes[3, :2] + 0.01
        self.image = torch.randint(0, images, (rois,), generator=draw)
        self.level = torch.randint(0, len(sizes), (rois,), generator=draw)
        self.level[4] = -1

    def run(self, function, device, kind, bins, ratio, layout=torch.channels_last):
        """Return the features, and the maps' gradients for a given gradient of the features."""
        maps = [
            tensor.to(device, kind).to(memory_format=layout).requires_grad_()
            for tensor in self.maps
        ]
        rest = [tensor.to(device) for tensor in (self.boxes, self.image, self.level)]
        found = function(maps, *rest, self.strides, bins, ratio)
        draw = torch.Generator().manual_seed(1)
        weight = torch.randn(found.shape, generator=draw).to(self.maps[0].dtype)
        return found, torch.autograd.grad(found, maps, weight.to(device, kind))

    def errors(self, bins, ratio, layout=torch.channels_last):
        """Return the largest relative error of features and gradients against float64."""
        kind = self.maps[0].dtype
        found, gradients = self.run(roi_align, DEVICE, kind, bins, ratio, layout)
        wanted, right = self.run(reference, DEVICE, torch.float64, bins, ratio)
        assert found.dtype == kind and found.shape == wanted.shape
        pairs = zip((found, *gradients), (wanted, *right), strict=True)
        return max(
            (a.double() - b).norm() / b.norm() if b.norm() else a.double().norm() for a, b in pairs
        )


EXACT = 5e-6  # float32: a GPU computes each product from three TF32 products
SMALL = [(17, 11), (9, 6)]


@needs_triton
@pytest.mark.parametrize(
    ("bins", "ratio"),
    [(3, 0), (3, 3), *(pytest.param(bins, 0, marks=pytest.mark.slow) for bins in (7, 14))],
)
def test_values_and_gradients_equal_torchvision(bins, ratio):
    assert Scene(SMALL, 8, 5).errors(bins, ratio) < EXACT


@needs_triton
def test_16_bit_maps_keep_the_precision_of_the_weights():
    assert Scene(SMALL, 7, 5, kind=torch.float16).errors(7, 0) < 3e-4


@needs_triton
def test_five_levels_in_another_memory_layout_equal_torchvision():
    scene = Scene([(9, 5), (5, 3), (3, 2), (2, 1), (1, 1)], 9, 3, images=1)
    assert scene.errors(2, 0, torch.contiguous_format) < EXACT


@needs_triton
def test_rois_without_points_give_zeros_and_no_gradient():
    scene = Scene([(9, 8)], 8, 3, images=1)
    scene.boxes[:] = torch.tensor([4.0, 4, 20, 20])
    scene.boxes[1] = math.nan
    scene.boxes[2, 3] = math.inf
    scene.boxes[3] = torch.tensor([20.0, 4, 4, 20])  # end before start
    scene.boxes[5] = torch.tensor([-1e30, 0, 1e30, 9])
    scene.boxes[6] = torch.tensor([-1e8, -1e8, 1e8, 1e8])  # too many points to iterate over
    scene.level[:] = torch.tensor([0, 0, 0, 0, -1, 0, 0, 1])  # level 1 does not exist
    found, (gradient,) = scene.run(roi_align, DEVICE, torch.float32, 2, 0)
    assert found[[0, 6]].isfinite().all() and found[0].abs().sum() > 0
    assert not found[[1, 2, 3, 4, 5, 7]].any() and gradient.isfinite().all()
    scene.level[[1, 2, 3, 4, 5, 7]] = -1
    again, (same,) = scene.run(roi_align, DEVICE, torch.float32, 2, 0)
    assert torch.equal(again, found) and torch.equal(same, gradient)


@needs_triton
def test_a_reversed_roi_with_a_fixed_number_of_points_equals_torchvision():
    scene = Scene([(9, 8)], 5, 3, images=1)
    scene.boxes[0] = torch.tensor([28.0, 4, 4, 30])
    assert scene.errors(2, 2) < EXACT


@needs_triton
def test_zero_rois_give_no_features_and_no_gradient():
    scene = Scene([(9, 8)], 5, 3)
    scene.boxes, scene.image, scene.level = scene.boxes[:0], scene.image[:0], scene.level[:0]
    found, (gradient,) = scene.run(roi_align, DEVICE, torch.float32, 7, 0)
    assert found.shape == (0, 3, 7, 7) and not gradient.any()


@needs_triton
def test_the_operator_passes_opcheck():
    scene = Scene([(4, 5)], 5, 2)
    maps = [features.to(DEVICE).requires_grad_() for features in scene.maps]
    rest = [tensor.to(DEVICE) for tensor in (scene.boxes, scene.image, scene.level)]
    torch.library.opcheck(roi_align, (maps, *rest, [4], 2, 2), test_utils=REGISTRATION)


FULL = [(256, 256), (128, 128), (64, 64), (32, 32)]


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize(("bins", "rois"), [(7, 512), (14, 128)])
@pytest.mark.parametrize(
    ("kind", "most"), [(torch.float32, 2e-5), (torch.float16, 4e-4), (torch.bfloat16, 3e-3)]
)
def test_errors_at_full_size_are_small(bins, rois, kind, most):
    assert Scene(FULL, rois, 256, images=1, kind=kind).errors(bins, 0) < most


@needs_gpu
@pytest.mark.cuda
def test_the_gradient_is_deterministic():
    scene = Scene(FULL, 512, 256, kind=torch.bfloat16)
    first = scene.run(roi_align, "cuda", torch.bfloat16, 7, 0)[1]
    second = scene.run(roi_align, "cuda", torch.bfloat16, 7, 0)[1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
@pytest.mark.cuda
def test_no_operation_synchronizes_with_the_gpu():
    scene = Scene(FULL, 64, 256, kind=torch.bfloat16)
    maps = [features.cuda().requires_grad_() for features in scene.maps]
    rest = [tensor.cuda() for tensor in (scene.boxes, scene.image, scene.level)]

    def step():
        found = roi_align(maps, *rest, scene.strides, 7, 0)
        torch.autograd.grad(found, maps, torch.ones_like(found))

    step()  # compiles the kernel
    with no_waits():
        step()
