"""Rasterized outlines against pycocotools, pasting against a reference implementation, RLE round trips."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitdet.data.coco import read_coco
from vitdet.data.masks import decode, edges_of, encode, paste

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "coco-sample"


def _rasterize(lines: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a mask (H, W) of the pixels whose centers have a nonzero winding number."""
    turns = np.zeros((height, width), int)
    x = np.arange(width) + 0.5
    for x0, y0, x1, y1 in lines.astype(np.float64):
        for row in range(height):
            y = row + 0.5
            if min(y0, y1) <= y < max(y0, y1):
                crossing = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
                turns[row] += np.sign(y1 - y0).astype(int) * (x > crossing)
    return turns != 0


def _closes(lines: np.ndarray) -> bool:
    return sorted(lines[:, :2].tolist()) == sorted(lines[:, 2:].tolist())


def test_overlapping_parts_of_opposite_orientation_are_united() -> None:
    square, turned = ([1, 1, 7, 1, 7, 7, 1, 7], [4, 4, 4, 9, 9, 9, 9, 4])
    found, counts = edges_of([[square, turned], None, [square]], 12, 12)
    assert found.shape == (12, 4) and found.dtype == np.float32 and counts.tolist() == [8, 0, 4]
    expected = np.zeros((12, 12), bool)
    expected[1:7, 1:7] = expected[4:9, 4:9] = True
    assert np.array_equal(_rasterize(found[:8], 12, 12), expected)
    assert _closes(found[:8]) and _closes(found[8:])


def test_an_rle_outline_covers_exactly_its_pixels() -> None:
    rng = np.random.default_rng(0)
    for density in (0.1, 0.5, 0.9, 1.0):
        pixels = rng.random((17, 23)) < density
        (rle,) = encode(torch.from_numpy(pixels)[None])
        found, _ = edges_of([rle], 17, 23)
        assert np.array_equal(_rasterize(found, 17, 23), pixels) and _closes(found)
        across = found[:, [1, 0, 3, 2]]  # the transposed mask needs the horizontal edges
        assert np.array_equal(_rasterize(across, 23, 17), pixels.T)


def test_a_rectangle_of_pixels_has_four_edges() -> None:
    # columns 1, 2, rows 1, 2
    found, _ = edges_of([{"size": [4, 5], "counts": [5, 2, 2, 2, 9]}], 4, 5)
    assert sorted(found.tolist()) == [[1, 1, 1, 3], [1, 3, 3, 3], [3, 1, 1, 1], [3, 3, 3, 1]]


def test_no_objects_and_empty_masks_have_no_edges() -> None:
    assert [part.shape for part in edges_of([], 4, 5)] == [(0, 4), (0,)]
    edges, counts = edges_of([{"size": [4, 5], "counts": [20]}], 4, 5)
    assert edges.shape == (0, 4) and counts.tolist() == [0]
    with pytest.raises(ValueError, match="RLE of size"):
        edges_of([{"size": [4, 5], "counts": [20]}], 5, 5)


def test_encoded_masks_decode_to_the_same_pixels() -> None:
    bitmaps = torch.rand(3, 9, 14, generator=torch.Generator().manual_seed(0)) < 0.4
    encoded = encode(bitmaps)
    assert [type(code["counts"]) for code in encoded] == [str] * 3 and encoded[0]["size"] == [9, 14]
    assert np.array_equal(np.stack([decode(code, 9, 14) for code in encoded]), bitmaps.numpy())
    assert encode(bitmaps[:0]) == []


def test_real_outlines_cover_the_pixels_of_pycocotools() -> None:
    if not SAMPLE.is_dir():
        pytest.skip("needs ../shared")
    split = read_coco(SAMPLE / "annotations" / "instances_val2017.json", SAMPLE / "val2017")
    overlaps = []
    for record in split.records[:6]:
        size = record.height, record.width
        for segmentation in record.segmentations[:6]:
            expected = decode(segmentation, *size)
            if expected.sum() >= 200:
                ours = _rasterize(edges_of([segmentation], *size)[0], *size)
                overlaps.append((ours & expected).sum() / (ours | expected).sum())
    assert len(overlaps) > 10 and np.mean(overlaps) > 0.95 and min(overlaps) > 0.8


def _slow_paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return probabilities (H, W), bilinear between cell centers; cells outside the grid are zero."""
    side = len(mask)
    ringed = np.pad(mask.astype(np.float64), 1)
    out = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            v = (row + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
            u = (column + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
            if -1 < u < side and -1 < v < side:
                i, j = int(np.floor(v)), int(np.floor(u))
                a, b = v - i, u - j
                cell = ringed[i + 1 : i + 3, j + 1 : j + 3]
                out[row, column] = np.array([1 - a, a]) @ cell @ np.array([1 - b, b])
    return out


BOXES = [[3.2, 4.7, 20.1, 15.9], [-6.0, -3.5, 9.0, 40.0], [0, 0, 33, 26], [25.4, 20.2, 50, 60]]
SMALL = [[10.1, 10.2, 10.4, 10.9], [12.5, 7.5, 12.5, 9.5]]


def test_paste_equals_a_reference_implementation() -> None:
    masks = torch.rand(6, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(BOXES + SMALL)
    found = paste(masks, boxes, (26, 33)).numpy()
    assert found.shape == (6, 26, 33) and found.dtype == bool
    for mask, box, pasted in zip(masks.numpy(), boxes.double().numpy(), found, strict=True):
        if box[2] > box[0]:
            value = _slow_paste(mask, box, 26, 33)
            sure = abs(value - 0.5) > 1e-4
            assert np.array_equal(pasted[sure], value[sure] >= 0.5)
    assert not found[5].any()  # a box without area
    assert paste(masks[:0], boxes[:0], (26, 33)).shape == (0, 26, 33)


def test_pasting_only_the_box_equals_pasting_the_whole_image() -> None:
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(40, 2, generator=generator) * 90 - 10
    boxes = torch.cat([low, low + 1 + torch.rand(40, 2, generator=generator) * 80], dim=1)
    masks = torch.rand(40, 28, 28, generator=generator)
    y, x = torch.arange(90) + 0.5, torch.arange(110) + 0.5
    x = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, 90, -1), y[:, :, None].expand(-1, -1, 110)], dim=3)
    whole = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    assert torch.equal(paste(masks, boxes, (90, 110)), whole >= 0.5)
    assert torch.equal(paste(masks, boxes, (90, 110), 0.7), whole >= 0.7)
