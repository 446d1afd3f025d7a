"""Pasted masks: the Triton kernel returns the same bytes as `grid_sample` on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.triton_device import DEVICE, REGISTRATION, needs_gpu, needs_triton
from tests.models.test_paste import ORIGINALS, SIZES, columns, placed, some
from vitdet.evaluation.detections import batch_to_results
from vitdet.kernels.paste import paste


@needs_triton
@pytest.mark.parametrize("kind", ["noise", "disc"])
def test_the_kernel_writes_the_same_bytes_as_the_cpu(kind: str) -> None:
    from vitdet.kernels.paste_kernels import launch

    masks, boxes, sizes = placed(kind)
    wanted, regions, ends, _ = columns(masks, boxes, sizes)
    given = (tensor.to(DEVICE) for tensor in (masks, boxes, regions, ends))
    assert torch.equal(launch(*given, len(wanted)).cpu(), wanted)


@needs_triton
def test_the_kernel_accepts_zero_masks() -> None:
    from vitdet.kernels.paste_kernels import launch

    masks, boxes, sizes = (tensor[:0] for tensor in placed("noise"))
    ends = torch.zeros(0, dtype=torch.int64)
    given = (tensor.to(DEVICE) for tensor in (masks, boxes, sizes.repeat(1, 2), ends))
    assert len(launch(*given, 0)) == 0


def test_the_operator_passes_opcheck() -> None:
    masks, boxes, sizes = placed("noise")
    wanted, regions, ends, _ = columns(masks, boxes, sizes)
    torch.library.opcheck(
        paste, (masks, boxes, regions, ends, len(wanted)), test_utils=REGISTRATION
    )


@pytest.mark.cuda
@needs_gpu
def test_rle_strings_from_gpu_and_cpu_are_equal() -> None:
    batch = [some(100, seed) for seed in range(4)]
    originals = [(480, 640), (427, 640), *ORIGINALS[:1], (1500, 2000)]
    wanted = batch_to_results(batch, SIZES, originals, range(4), (9,))
    moved = [tensor.to("cuda") for tensor in batch]
    assert batch_to_results(moved, SIZES, originals, range(4), (9,)) == wanted
