"""One image cannot take the memory of the machine, whatever its annotations hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import environment

MB = 1024  # of ru_maxrss's unit, KB
GROWTH = """
import resource
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
OBJECTS = """
import torch
from tests import parts
from tests.small import target
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
READ = f"""{RAGGED}
start = peak()
edges, counts = edges_of(shapes, 1000, 1000)
boxes, keep = visible_boxes(affine.edges(edges), counts, affine.size)
"""
TARGETS = f"""{RAGGED}
edges, counts = map(torch.from_numpy, edges_of(shapes, 1000, 1000))
masks = Polygons.of(edges, counts)
boxes = torch.rand(8, 4) * 100
boxes[:, 2:] += 800
start = peak()
mask_targets(masks[torch.zeros(8, dtype=torch.int64)], boxes)
"""


def growth(script: str, tmp_path: Path) -> int:
    """By how many MB the peak memory of a Python process grows over what follows the line `start = peak()`."""
    printed = subprocess.run(
        [sys.executable, "-c", f"{GROWTH}{script}\nprint(peak() - start)"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert printed.returncode == 0, printed.stderr
    return int(printed.stdout) // MB


def test_anchors_are_matched_with_a_thousand_objects_in_little_memory(tmp_path: Path) -> None:
    assert growth(OBJECTS, tmp_path) < 600  # 65 million pairs: 1,000 for the corners alone


def test_one_ragged_outline_among_many_objects_is_read_in_little_memory(tmp_path: Path) -> None:
    assert growth(READ, tmp_path) < 200  # padded to the longest: 1,500


def test_mask_targets_of_a_ragged_outline_take_little_memory(tmp_path: Path) -> None:
    assert growth(TARGETS, tmp_path) < 300  # all edges at once: 1,000
