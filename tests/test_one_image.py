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
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
boxes = torch.rand(1000, 4, generator=generator) * 400
boxes[:, 2:] += boxes[:, :2] + 8
one = target(boxes.tolist(), [0] * 1000)
sides = [(512 // stride, 512 // stride) for stride in (4, 8, 16, 32, 64)]
anchors = torch.cat(grid_anchors(sides, [4, 8, 16, 32, 64], 8.0, (0.5, 1.0, 2.0)))
start = peak()
for match in (assign.match, assign.match_keeping_own, assign.match_keeping_best):
    parts.rpn(channels=4, strides=[4, 8, 16, 32, 64], match=match).sample(anchors, one)
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
