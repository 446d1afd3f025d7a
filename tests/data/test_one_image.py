"""The memory needed for one image is bounded for any annotations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

pytestmark = pytest.mark.slow  # arrays of 65 million pairs, in separate processes
MB = 1024  # in the unit of ru_maxrss, KB
GROWTH = """
import resource
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
OBJECTS = """
import torch
from tests.helpers import parts
from tests.helpers.small import target
from vitdet.models import assign
from vitdet.models.anchors import grid_anchors
from vitdet.types import Targets
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
boxes = torch.rand(1000, 4, generator=generator) * 400
boxes[:, 2:] += boxes[:, :2] + 8
batch = Targets.of([target(boxes.tolist(), [0] * 1000)])
sides = [(512 // stride, 512 // stride) for stride in (4, 8, 16, 32, 64)]
anchors = torch.cat(grid_anchors(sides, [4, 8, 16, 32, 64], 8.0, (0.5, 1.0, 2.0)))
start = peak()
for match in (assign.match, assign.match_keeping_own, assign.match_keeping_best):
    parts.rpn(channels=4, strides=[4, 8, 16, 32, 64], match=match).sample(anchors, batch)
print(peak() - start)
"""
RAGGED = """
import numpy as np
import torch
from vitdet.data.masks import edges_of
from vitdet.data.transforms import Affine, visible_boxes
from vitdet.models.mask_head import mask_targets
from vitdet.types import Polygons
torch.set_num_threads(1)
turns = np.arange(187_000) / 187_000 * 2 * np.pi
radius = 300 + 150 * np.random.default_rng(0).random(len(turns))
points = 500 + radius[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
shapes = [[points.ravel().tolist()], *[[[9, 9, 20, 9, 20, 30, 9, 30]]] * 499]
affine = Affine((1000, 1000), (1500, 1500), (200, 200), (1024, 1024))
"""
READ_AND_CUT = f"""{RAGGED}
start = peak()
edges, counts = edges_of(shapes, 1000, 1000)
boxes, keep = visible_boxes(affine.edges(edges), counts, affine.size)
read = peak()
masks = Polygons.of(torch.from_numpy(edges), torch.from_numpy(counts))
boxes = torch.rand(8, 4) * 100
boxes[:, 2:] += 800
mask_targets(masks[torch.zeros(8, dtype=torch.int64)], boxes)
print(read - start, peak() - read)
"""


def growth(script: str, tmp_path: Path) -> list[int]:
    """Return the growth of a Python process's peak memory in MB, for each part of the script."""
    printed = subprocess.run(
        [sys.executable, "-c", GROWTH + script],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert printed.returncode == 0, printed.stderr
    return [int(grown) // MB for grown in printed.stdout.split()]


def test_matching_anchors_with_a_thousand_objects_needs_little_memory(tmp_path: Path) -> None:
    (matched,) = growth(OBJECTS, tmp_path)
    assert matched < 600  # 65 million pairs need 1,000 MB for the corners alone


def test_one_long_outline_among_many_objects_needs_little_memory(tmp_path: Path) -> None:
    read, targets = growth(READ_AND_CUT, tmp_path)
    assert read < 200  # padding to the longest outline would need 1,500 MB
    assert targets < 300  # all edges at once would need 1,000 MB
