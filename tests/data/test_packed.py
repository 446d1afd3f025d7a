"""Packed lists: round trip, stored as one array."""

from array import array
from pathlib import Path

import numpy as np

from vitdet.data.records import Record
from vitdet.data.shared_memory import PackedList


def test_values_come_back() -> None:
    polygons = [[[0.1, 2.0, 3.5, 4.0, 1e-9, 6.0]], {"size": [2, 3], "counts": "0123"}]
    records = [
        Record(
            7,
            Path("a/b.jpg"),
            20,
            30,
            np.ones((2, 4), np.float32),
            np.array([3, 1]),
            polygons,
            np.zeros(2, bool),
        ),
        Record(
            8,
            Path("c.jpg"),
            1,
            1,
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.int64),
            [],
            np.zeros(0, bool),
        ),
    ]
    packed = PackedList(records)
    assert len(packed) == 2 and packed[1].image_id == 8 and len(packed[1]) == 0
    for _ in range(2):
        first = packed[0]
        assert (first.image_id, first.path, first.height, first.width) == (
            7,
            Path("a/b.jpg"),
            20,
            30,
        )
        assert first.segmentations == polygons and np.array_equal(first.boxes, records[0].boxes)
        assert first.labels.tolist() == [3, 1] and first.labels.dtype == np.int64
    assert len(PackedList([])) == 0


def test_the_values_are_no_objects_any_more() -> None:
    values = [[float(number)] * 50 for number in range(100)]
    packed = PackedList(values)
    values[3][0] = -1.0
    assert packed[3] == [3.0] * 50 and packed[3] is not packed[3]
    assert type(packed._ends) is array and type(packed._bytes) is bytearray
