"""The affine transform of pixels, outlines and boxes, against the published pipeline's arithmetic."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdet.data.masks import edges_of
from vitdet.data.transforms import (
    Affine,
    change_colors,
    fit,
    jitter,
    pad,
    resize_and_pad,
    resize_bilinear,
    resize_longest,
    visible_boxes,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "test_resize" / "io.npz"


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _seen(affine: Affine, pixels: np.ndarray, antialias: bool = True) -> np.ndarray:
    return np.asarray(affine.seen(Image.fromarray(pixels), antialias=antialias))


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> list:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def _draw(seed: int, source: tuple = (90, 140), canvas: int = 128, **settings: object) -> Affine:
    published = {"scale_range": (0.1, 2.0), "flip": 0.5, "transpose": 0.0, "color_jitter": 0.0}
    settings = {**published, "diagonal": True, **settings}
    return jitter(np.random.default_rng(seed), source, canvas, **settings)


def test_test_time_resize_equals_detectron2_to_the_byte() -> None:
    golden = np.load(GOLDEN)
    for index in range(8):
        found = resize_longest(golden[f"in{index}"], 128, antialias=True)
        assert np.array_equal(found, golden[f"out{index}"])


def test_padding_keeps_the_image_at_the_top_left() -> None:
    canvas, size = resize_and_pad(np.full((20, 50, 3), 9, np.uint8), 64, antialias=True)
    assert canvas.shape == (3, 64, 64) and size == (26, 64)
    assert (canvas[:, :26] == 9).all() and not canvas[:, 26:].any()
    assert fit((1, 1000), 64) == (1, 64)


@pytest.mark.parametrize("seed", range(12))
def test_a_rectangle_matches_its_box(seed: int) -> None:
    image = np.zeros((90, 140, 3), np.uint8)
    image[30:60, 50:100] = 255
    affine = _draw(seed, scale_range=(0.5, 2.0), transpose=0.5)
    seen = _seen(affine, image)
    assert seen.shape[:2] == affine.size
    outline, counts = edges_of([_rectangle(50, 30, 100, 60)], 90, 140)
    boxes, keep = visible_boxes(affine.edges(outline), counts, affine.size)
    rows, columns = np.nonzero(seen[:, :, 0] > 127)
    if not keep[0]:
        assert len(rows) == 0
        return
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    # tolerance: half a pixel of rounding and the blur of the resize
    assert np.abs(boxes[0] - found).max() <= 0.75


@pytest.mark.parametrize("seed", range(8))
def test_crop_before_resize_equals_resize_then_crop(seed: int) -> None:
    image = _noise(90, 140, seed)
    affine = _draw(seed, scale_range=(1.2, 2.0), transpose=0.5)
    slow = Image.fromarray(image)
    if affine.transpose:
        slow = slow.transpose(Image.Transpose.TRANSPOSE)
    if affine.flip:
        slow = slow.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    slow = np.asarray(slow.resize(affine.scaled[::-1], Image.Resampling.BILINEAR)).astype(int)
    (top, left), (height, width) = affine.offset, affine.size
    difference = _seen(affine, image) - slow[top : top + height, left : left + width]
    assert abs(difference).max() <= 1


def test_scale_jitter_follows_the_published_arithmetic() -> None:
    for seed in range(50):
        draws = np.random.default_rng(seed).random(7)
        affine = _draw(seed, source=(480, 640), canvas=1024)
        scale = 0.1 + 1.9 * draws[2]
        factor = min(1024 * scale / 480, 1024 * scale / 640)
        assert affine.scaled == (int(np.round(480 * factor)), int(np.round(640 * factor)))
        offset = (np.round(draws[3] * max(side - 1024, 0)) for side in affine.scaled)
        assert affine.offset == tuple(map(int, offset))
        assert affine.size == tuple(min(side, 1024) for side in affine.scaled)
        assert affine.flip == (draws[1] < 0.5)
        assert not affine.transpose and affine.colors == (1, 1, 1)


def test_settings_do_not_affect_each_other_s_random_draws() -> None:
    plain, changed = _draw(5), _draw(5, color_jitter=0.3)
    assert replace(changed, colors=plain.colors) == plain
    assert all(0.7 <= factor <= 1.3 for factor in changed.colors) and len(set(changed.colors)) == 3
    assert _draw(5, flip=0).flip is False and _draw(5, flip=1).flip is True


FLIP = Affine((30, 50), (30, 50), (0, 0), (30, 50), flip=True)
TRANSPOSE = Affine((30, 50), (50, 30), (0, 0), (50, 30), transpose=True)
TRANSPOSE_BACK = Affine((50, 30), (30, 50), (0, 0), (30, 50), transpose=True)


@pytest.mark.parametrize(("affine", "back"), [(FLIP, FLIP), (TRANSPOSE, TRANSPOSE_BACK)])
def test_flipping_or_transposing_twice_restores_the_image(affine: Affine, back: Affine) -> None:
    image, (outline, _) = _noise(30, 50), edges_of([[[3, 4, 20, 5, 11, 29]]], 30, 50)
    assert np.array_equal(_seen(back, _seen(affine, image)), image)
    assert not np.array_equal(affine.edges(outline), outline)
    assert np.allclose(back.edges(affine.edges(outline)), outline)


def test_flip_and_transpose_move_boxes_and_pixels() -> None:
    image, (outline, counts) = _noise(30, 50), edges_of([_rectangle(3, 4, 20, 29)], 30, 50)
    assert np.array_equal(_seen(FLIP, image), image[:, ::-1])
    assert np.array_equal(_seen(TRANSPOSE, image), image.swapaxes(0, 1))
    for affine, box in ((FLIP, [30, 4, 47, 29]), (TRANSPOSE, [4, 3, 29, 20])):
        boxes, _ = visible_boxes(affine.edges(outline), counts, affine.size)
        assert boxes.tolist() == [box]


def _clip_polygon(points: list[tuple], width: float, height: float) -> list[tuple]:
    """Clip a polygon by Sutherland-Hodgman, one side of the window at a time."""
    for axis, bound, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        kept = []
        for a, b in zip(points, points[1:] + points[:1], strict=True):
            da, db = sign * (a[axis] - bound), sign * (b[axis] - bound)
            if da >= 0:
                kept.append(a)
            if da * db < 0:
                t = da / (da - db)
                kept.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
        points = kept
    return points


def test_boxes_enclose_the_clipped_polygons() -> None:
    rng = np.random.default_rng(0)
    polygons = []
    for _ in range(300):  # star-shaped, so that no sides intersect
        center = rng.uniform(-10, 50, 2)
        turns = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        directions = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        polygons.append(center + rng.uniform(1, 60, (len(turns), 1)) * directions)
    outlines, counts = edges_of([[polygon.ravel().tolist()] for polygon in polygons], 30, 40)
    boxes, keep = visible_boxes(outlines, counts, (30, 40))
    seen = 0
    for polygon, box, kept in zip(polygons, boxes, keep, strict=True):
        clipped = np.reshape(_clip_polygon([tuple(point) for point in polygon], 40, 30), (-1, 2))
        if len(clipped) and (np.ptp(clipped, axis=0) > 1e-3).all():
            assert kept
            assert np.allclose(box, [*clipped.min(axis=0), *clipped.max(axis=0)], atol=1e-3)
            seen += 1
        elif len(clipped) == 0:
            assert not kept
    assert 150 < seen < 300


def test_an_outline_around_the_window_fills_it_and_outlines_outside_are_dropped() -> None:
    around, beside = _rectangle(-5, -5, 100, 100), _rectangle(50, 5, 60, 9)
    touching, flat = _rectangle(40, 0, 45, 30), _rectangle(5, 5, 9, 5)
    shapes = [around, beside, [[-30, 0, 0, -30, -30, -30]], touching, flat]
    boxes, keep = visible_boxes(*edges_of(shapes, 30, 40), (30, 40))
    assert keep.tolist() == [True, False, False, False, False]
    assert boxes[0].tolist() == [0, 0, 40, 30]
    assert visible_boxes(*edges_of([], 30, 40), (30, 40))[0].shape == (0, 4)


def test_boxes_of_many_outlines_equal_those_of_single_outlines() -> None:
    shapes = [None, _rectangle(-3, -3, 9, 9), [[1, 1, 5, 1, 3, 70]], None, [[2, 2, 60, 8, 9, 20]]]
    together = visible_boxes(*edges_of([*shapes, None], 30, 40), (30, 40))
    alone = [visible_boxes(*edges_of([shape], 30, 40), (30, 40)) for shape in [*shapes, None]]
    assert together[1].tolist() == [False, True, True, False, True, False]
    for found, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert np.array_equal(found, np.concatenate(parts))


def test_padding_edges_stay_zero() -> None:
    outline, _ = edges_of([[[0, 0, 0, 0, 5, 1, 3, 7]]], 30, 50)
    moved = Affine((30, 50), (60, 100), (10, 20), (30, 40), flip=True).edges(outline)
    assert moved.shape == (4, 4) and moved.any(axis=1).tolist() == [False, True, True, True]


def test_fused_color_jitter_equals_separate_steps() -> None:
    # no value saturates
    image = Image.fromarray(np.random.default_rng(0).integers(80, 150, (20, 30, 3), np.uint8))
    luma = np.array([0.299, 0.587, 0.114])
    expected = 1.1 * np.asarray(image).astype(float)
    expected = 0.8 * expected + 0.2 * (expected @ luma).mean()
    expected = 1.2 * expected - 0.2 * (expected @ luma)[..., None]
    assert abs(np.asarray(change_colors(image, 1.1, 0.8, 1.2)) - expected).max() <= 1.5
    assert change_colors(image, 1, 1, 1) is image


def test_pad_keeps_every_byte() -> None:
    image = _noise(5, 7)
    canvas = np.zeros((3, 8, 8), np.uint8)
    pad(Image.fromarray(image), canvas)
    assert np.array_equal(canvas[:, :5, :7].transpose(1, 2, 0), image) and not canvas[:, 5:].any()


def _slow_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolate the four neighbors of each pixel's center in float64."""
    out = np.zeros((*size, 3))
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * image.shape[0] / size[0] - 0.5, 0), image.shape[0] - 1)
            x = min(max((column + 0.5) * image.shape[1] / size[1] - 0.5, 0), image.shape[1] - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            corners = image[[top, top, bottom, bottom], [left, right, left, right]].astype(float)
            b, a = y - top, x - left
            weights = np.outer([1 - b, b], [1 - a, a]).ravel()
            out[row, column] = weights @ corners
    return out


@pytest.mark.parametrize("size", [(20, 31), (9, 13), (45, 40), (1, 1), (90, 3)])
def test_plain_bilinear_is_within_one_gray_level_of_its_definition(size: tuple[int, int]) -> None:
    image = _noise(23, 17)
    assert np.abs(resize_bilinear(image, size) - _slow_bilinear(image, size)).max() < 1
    assert np.array_equal(resize_bilinear(image, image.shape[:2]), image)


def test_resizing_a_crop_equals_cropping_the_resized_image() -> None:
    image = _noise(50, 70)
    for scaled in ((120, 168), (25, 35), (20, 90)):
        whole = resize_bilinear(image, scaled)
        assert np.array_equal(resize_bilinear(image, scaled, (7, 11), (9, 20)), whole[7:16, 11:31])


def test_antialiasing_can_be_disabled_in_training_and_evaluation() -> None:
    image = _noise(90, 140)
    affine = Affine((90, 140), (45, 70), (3, 5), (40, 60), flip=True)
    plain = _seen(affine, image, antialias=False)
    assert np.array_equal(plain, resize_bilinear(image[:, ::-1], (45, 70))[3:43, 5:65])
    # antialiasing smooths the noise
    assert np.abs(plain.astype(int) - _seen(affine, image)).mean() > 10
    resized = resize_bilinear(image, (41, 64)), resize_longest(image, 64, antialias=True)
    for antialias, expected in enumerate(resized):
        canvas, size = resize_and_pad(image, 64, antialias=bool(antialias))
        assert size == (41, 64)
        assert np.array_equal(canvas[:, :41], expected.transpose(2, 0, 1))


def test_crop_positions_are_on_the_diagonal_or_anywhere() -> None:
    def places(**settings: bool) -> np.ndarray:
        settings |= {"scale_range": (2, 2)}
        drawn = (_draw(seed, (100, 100), 100, **settings) for seed in range(200))
        return np.array([affine.offset for affine in drawn])

    diagonal, anywhere = places(), places(diagonal=False)
    assert (diagonal[:, 0] == diagonal[:, 1]).all() and (anywhere[:, 0] == diagonal[:, 0]).all()
    assert abs(np.corrcoef(anywhere.T)[0, 1]) < 0.2 and anywhere.min() < 5 and anywhere.max() > 95


def _published(
    rng: np.random.Generator, box: np.ndarray, source: tuple[int, int], canvas: int
) -> list[float]:
    """Transform a box like Detectron2's RandomFlip, ResizeScale and FixedSizeCrop, one step per line."""
    (height, width), (x0, y0, x1, y1) = source, box
    flip, scale, place = rng.random() < 0.5, rng.uniform(0.1, 2.0), rng.uniform()
    x0, x1 = (width - x1, width - x0) if flip else (x0, x1)
    factor = min(canvas * scale / height, canvas * scale / width)
    new_height, new_width = int(np.round(height * factor)), int(np.round(width * factor))
    top, left = (int(np.round(place * max(side - canvas, 0))) for side in (new_height, new_width))
    x0, x1 = (np.clip(x * new_width / width - left, 0, canvas) for x in (x0, x1))
    y0, y1 = (np.clip(y * new_height / height - top, 0, canvas) for y in (y0, y1))
    seen = x1 - x0 > 1e-5 and y1 - y0 > 1e-5
    corners = (x0, y0, x1, y1) if seen else (0, 0, 0, 0)
    return [new_height, new_width, top, left, flip, seen, *corners]


def test_scales_crops_flips_and_boxes_are_distributed_as_published() -> None:
    """Two-sample Kolmogorov-Smirnov test of each quantity at a significance level of 0.001."""
    count, source, box = 4000, (480, 640), np.array([400.0, 30.0, 610.0, 140.0])
    outline, counts = edges_of([_rectangle(*box)], *source)
    ours, theirs = [], []
    for seed in range(count):
        affine = _draw(seed, source, 1024)
        (found,), (seen,) = visible_boxes(affine.edges(outline), counts, affine.size)
        corners = found if seen else np.zeros(4)
        ours.append([*affine.scaled, *affine.offset, affine.flip, seen, *corners])
        theirs.append(_published(np.random.default_rng((1, seed)), box, source, 1024))
    for mine, other in zip(np.array(ours, float).T, np.array(theirs, float).T, strict=True):
        values = np.sort(np.concatenate([mine, other]))
        ranks = [np.searchsorted(np.sort(sample), values, side="right") for sample in (mine, other)]
        assert np.abs(ranks[0] - ranks[1]).max() / count < 1.95 * (2 / count) ** 0.5
