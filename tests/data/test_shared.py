"""The annotation index in spawned workers: shared memory, equal images."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import environment
from tests.helpers.large import write
from vitdet.config import DataConfig
from vitdet.data.dataset import TrainData, read_split
from vitdet.data.shared_memory import PackedList, Shared

WORKERS = """
import json, os, sys
import numpy as np
import torch
from vitdet.config import DataConfig
from vitdet.data import TrainData, read_split
from vitdet.data.loader import _processes, configure_process
from vitdet.data.shared_memory import Shared

def places(data):
    columns, found = data.records._columns, []
    for part in (columns.boxes, columns.heads, columns.names._sent[0], columns.segmentations._sent[1]):
        address = part.array.__array_interface__["data"][0]
        for line in open("/proc/self/maps"):
            low, high = (int(side, 16) for side in line.split()[0].split("-"))
            if low <= address < high:
                found.append(" ".join(line.split()[4:]))
    return found

class Told(TrainData):
    def __getitems__(self, positions):
        parent = "libtorch" in open(f"/proc/{os.getppid()}/maps").read()
        seen = [*places(self), str(self.nothing.array.shape), parent]
        return [(image, os.getpid(), seen) for image in super().__getitems__(positions).image_ids]

if __name__ == "__main__":
    torch.multiprocessing.set_start_method("forkserver")
    configure_process()
    data = DataConfig(root=sys.argv[1], train_split="train", image_size=64)
    told = Told(read_split(data, "train"), data, 0)
    told.nothing = Shared(np.zeros((0, 4)))  # as the boxes of images without objects
    options = {**_processes(2), "collate_fn": list, "batch_size": 3}
    rows = [row for batch in torch.utils.data.DataLoader(told, sampler=range(12), **options) for row in batch]
    print(json.dumps([rows, places(told)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    write(path, 20, 60)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_new_workers_share_the_first_worker_s_memory(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", folder],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows, own = json.loads(done.stdout)
    assert len({pid for _, pid, _ in rows}) == 2
    assert len(own) == 4 and all("memfd:vitdet" in place for place in own) and len(set(own)) == 4
    # the same inodes and names in all workers; the fork server has loaded torch
    assert all(place == [*own, "(0, 4)", True] for _, _, place in rows)
    data = DataConfig(root=str(folder), train_split="train", image_size=64)
    alone = TrainData(read_split(data, "train"), data, 0)
    assert [image for image, _, _ in rows] == list(alone.__getitems__(range(12)).image_ids)


def test_pickled_copies_are_equal() -> None:
    block = pickle.loads(pickle.dumps(Shared(np.arange(6).reshape(2, 3))))
    assert block.array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(block) == 2 and block[1].tolist() == [3, 4, 5]
    values = [[1.5, 2.0], {"size": [3, 4], "counts": "abc"}, "name", []]
    packed = PackedList(values)
    again = pickle.loads(pickle.dumps(packed))
    assert list(again) == list(packed) == values and len(again) == 4
    empty = pickle.loads(pickle.dumps(PackedList()))
    assert len(empty) == 0 and list(empty) == []
    with pytest.raises(TypeError):
        packed.append("one more")  # would move the memory that other processes read


def test_packed_values_are_not_python_objects() -> None:
    values = [[float(number)] * 50 for number in range(100)]
    packed = PackedList(values)
    values[3][0] = -1.0
    assert packed[3] == [3.0] * 50 and packed[3] is not packed[3] and len(packed) == 100
