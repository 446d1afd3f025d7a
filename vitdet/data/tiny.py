"""A small data set in COCO's layout, drawn by a program: six classes that are told by shape and texture, not by colour.

Every class has its own silhouette and a favourite texture, which 70 % of its instances wear (the others wear any);
colours are random, backgrounds wear the same textures on a larger scale, and scraps and lines without a texture lie
about. An image depends on its seed and index only. The bytes are frozen: change what is drawn only with VERSION.

Scenes are painted without anti-aliasing on a canvas of twice the size ("fine" pixels) as indices into a palette, beside
a map of the owner of each fine pixel, from which the visible outline of each object is traced.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vitdet.data.outlines import fill, signed_area, trace

VERSION = 1
CATEGORIES = {1: "disc", 2: "triangle", 3: "bar", 5: "star", 8: "crescent", 13: "cross"}
PRETRAIN_SEED = 1_000_000  # scenes of seeds from here on are in no data set of make_tiny
FINE = 2  # fine pixels a pixel and axis
SIDES = (14.0, 80.0)  # longer side of an object's box, pixels, log-uniform
TEXTURES = ("rings", "checks", "dots", "stripes", "blotches", "zigzag")  # the favourites, in the order of CATEGORIES
TOLERANCE = 0.45  # pixels between a traced outline and its polygon
SLIVER = 4.0  # square pixels; smaller parts of an object are left out
VISIBLE = 0.45  # of an object's area and
VISIBLE_AREA = 44.0  # square pixels: what later objects leave of an earlier one
Color = tuple[float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """One annotated object: category id, box xywh, area in square pixels; a crowd has run lengths, others polygons."""

    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    segmentation: list[list[float]] | dict[str, list[int]]
    crowd: bool


@dataclass(frozen=True)
class Scene:
    """image (H, W, 3) uint8 RGB and its objects."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]


def make_tiny(folder: Path, train: int = 4000, val: int = 200, seed: int = 0, processes: int = 0) -> bool:
    """Writes folder/{train,val}/*.jpg and folder/annotations/instances_{train,val}.json; False if they are there.

    processes: 0 takes every processor this process may use; the result does not depend on it.
    Raises ValueError when the counts or the seed are out of range, or when the folder holds something else.
    """
    folder = Path(folder)
    if not (0 < train <= 500_000 and 0 < val <= 500_000):
        raise ValueError(f"expected 1 to 500000 images a split, got {train} and {val}")
    if not 0 <= seed < PRETRAIN_SEED // 2:
        raise ValueError(f"expected a seed from 0 to {PRETRAIN_SEED // 2 - 1}, got {seed}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if _holds(folder, train, val, seed):
            return False
        raise ValueError(f"{folder}: holds something else than the tiny data set (version {VERSION}, seed {seed}, "
                         f"{train} + {val} images); give another folder or delete this one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        (temporary / "annotations").mkdir()
        for order, (split, count) in enumerate((("train", train), ("val", val))):
            (temporary / split).mkdir()
            document = _write_split(temporary / split, count, 2 * seed + order, 1 + 500_000 * order, processes)
            document["info"] = _info(split, count, seed)
            (temporary / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def draw_scene(seed: int, index: int) -> Scene:
    """The scene of a seed and an index: the same one always and everywhere. 88 to 128 pixels a side, one side 128."""
    dice = _Dice(seed, index)
    short = dice.integer(88, 129)
    height, width = (128, short) if dice.chance(0.5) else (short, 128)
    canvas = _Canvas(height, width, dice)
    for _ in range(dice.integer(2, 9)):
        canvas.paint_scrap()
    if not dice.chance(0.03):
        crowd = dice.chance(0.05)
        if crowd:
            canvas.paint_crowd()
        count = 1 + int((11 if crowd else 12) * dice.uniform(0, 1) ** 1.6)
        sides = [math.exp(dice.uniform(math.log(SIDES[0]), math.log(SIDES[1]))) for _ in range(count)]
        for side in sorted(sides, key=lambda side: -side * dice.uniform(0.6, 1.6)):  # mostly small on large
            canvas.paint_object(side)
        if dice.chance(0.25):
            for _ in range(dice.integer(1, 3)):
                canvas.paint_line()
    return Scene(canvas.image(), canvas.objects())


class _Dice:
    """Random numbers from `random()` alone, the one distribution whose stream NumPy is least likely to change."""

    def __init__(self, seed: int, index: int) -> None:
        self.numbers: Callable[[int | tuple[int, int]], np.ndarray] = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([seed, index]))
        ).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.numbers(1)[0])

    def integer(self, low: int, high: int) -> int:
        return low + int(self.uniform(0, high - low))

    def chance(self, probability: float) -> bool:
        return self.uniform(0, 1) < probability


class _Canvas:
    """A scene while it is painted; its arrays count fine pixels, its arguments pixels."""

    def __init__(self, height: int, width: int, dice: _Dice) -> None:
        self.dice = dice
        self.height, self.width = height * FINE, width * FINE
        ground = _color(dice, [], 0)
        self.palette = [ground, _color(dice, [ground], 25, 75)]
        pattern = _texture(TEXTURES[dice.integer(0, 6)], self.height, self.width, FINE * dice.uniform(12, 40), dice)
        self.paint = pattern.astype(np.uint8)
        self.owner = np.zeros((self.height, self.width), dtype=np.int64)  # 0: nobody, else the number of an object
        self.category, self.crowd = [0], [False]  # of object 1, 2, ...; entry 0 is the ground
        self.full, self.seen = [0.0], [0]  # fine pixels: of the whole object, of its visible part
        self.window = [(slice(0, self.height), slice(0, self.width))]  # the part of the canvas that holds the object

    def paint_scrap(self) -> None:
        """A small untextured scrap or line that belongs to no class."""
        side = FINE * self.dice.uniform(3, 8)
        length = 1.0 if self.dice.chance(0.6) else self.dice.uniform(2.5, 6)
        scrap = _placed(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (0.5 + 0.5 * self.dice.numbers((4, 2)))
                        * [length, 0.6], side * length, self.dice)
        self._apply(scrap + self._centre(0), 0, None, force=True)

    def paint_line(self) -> None:
        """A thin line over everything, which cuts objects in parts but does not hide them."""
        line = _placed(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1, 0.02], FINE * self.dice.uniform(50, 110),
                       self.dice)
        self._apply(line + self._centre(20 * FINE), 0, None)

    def paint_crowd(self) -> None:
        """A cluster of small objects of one class, annotated as one region."""
        kind, side = self.dice.integer(0, 6), FINE * self.dice.uniform(30, 46)
        centre, texture = self._centre(side / 2), self._favourite(kind)
        number = self._register(kind, crowd=True)
        colors = self._colors()
        for _ in range(self.dice.integer(9, 16)):
            size = FINE * self.dice.uniform(8, 11)
            place = centre + (self.dice.numbers(2) - 0.5) * (side - size)
            self._apply(_placed(_outline(kind, self.dice), size, self.dice) + place, number, texture, colors, size,
                        force=True)
        self.full[number] = float(self.seen[number])

    def paint_object(self, side: float) -> None:
        """An object whose box has this longer side, at the best of a few places; none where all places are taken."""
        kind = self.dice.integer(0, 6)
        outline = _placed(_outline(kind, self.dice), FINE * side, self.dice)
        patience = 8 if self.dice.chance(0.75) else 1  # a few objects do not mind to hide others
        best, least = None, math.inf
        for _ in range(16):
            vertices = outline + self._centre(0.4 * FINE * side)
            cost = self._cost(vertices)
            if cost < least:
                best, least = vertices, cost
            patience -= math.isfinite(cost)
            if least == 0 or patience <= 0:
                break
        texture, colors = self._favourite(kind), self._colors()
        if best is not None:
            self._apply(best, self._register(kind, crowd=False), texture, colors, FINE * side, force=True)

    def image(self) -> np.ndarray:
        """The picture (H, W, 3) uint8: fine pixels averaged, under light that falls from one side."""
        fine = np.array(self.palette, dtype=np.uint16)[self.paint]
        rgb = fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]
        height, width = rgb.shape[:2]
        angle, strength = self.dice.uniform(0, 2 * math.pi), self.dice.uniform(0, 0.15)
        slope = (np.arange(height, dtype=np.float32)[:, None] / height - 0.5) * math.sin(angle)
        slope = slope + (np.arange(width, dtype=np.float32) / width - 0.5) * math.cos(angle)
        return np.clip(rgb * (0.25 + 0.25 * strength * slope[..., None]) + 0.5, 0, 255).astype(np.uint8)

    def objects(self) -> tuple[SceneObject, ...]:
        """What is visible of each object, in pixels."""
        found, numbers = [], range(1, len(self.category))
        windows = [self.window[number] for number in numbers]
        bitmaps = [self.owner[window] == number for number, window in zip(numbers, windows, strict=True)]
        traced = trace(bitmaps, TOLERANCE * FINE)
        for number, (rows, columns), bitmap, outlines in zip(numbers, windows, bitmaps, traced, strict=True):
            if self.crowd[number]:
                found.append(self._crowd_region(number))
                continue
            parts = [(part + (columns.start, rows.start)) / FINE for part in outlines]
            areas = [signed_area(part) for part in parts]
            parts = [part for part, area in zip(parts, areas, strict=True) if area >= min(SLIVER, max(areas))]
            x0, y0 = np.min([part.min(axis=0) for part in parts], axis=0).tolist()
            x1, y1 = np.max([part.max(axis=0) for part in parts], axis=0).tolist()
            found.append(SceneObject(self.category[number], (x0, y0, x1 - x0, y1 - y0), int(bitmap.sum()) / FINE**2,
                                     [part.ravel().tolist() for part in parts], False))
        return tuple(found)

    def _crowd_region(self, number: int) -> SceneObject:
        fine = (self.owner == number).astype(np.int64)
        region = fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2] >= 2
        rows, columns = (np.flatnonzero(region.any(axis)).tolist() for axis in (1, 0))
        flat = region.ravel(order="F")  # COCO runs down the columns and starts with the outside
        changes = np.flatnonzero(np.diff(flat, prepend=False))
        counts = np.diff(changes, prepend=0, append=flat.size).tolist()
        box = (float(columns[0]), float(rows[0]), columns[-1] + 1.0 - columns[0], rows[-1] + 1.0 - rows[0])
        return SceneObject(self.category[number], box, float(region.sum()),
                           {"size": list(region.shape), "counts": counts}, True)

    def _centre(self, margin: float) -> np.ndarray:
        return margin + self.dice.numbers(2) * (np.array([self.width, self.height]) - 2 * margin)

    def _favourite(self, kind: int) -> str:
        return TEXTURES[kind if self.dice.chance(0.64) else self.dice.integer(0, 6)]  # 0.64 + 0.36 / 6 = 0.7

    def _colors(self) -> list[Color]:
        """Two colours that stand off from each other and from both colours of the ground."""
        first = self._unlike(self.palette[:2])
        return [first, self._unlike([*self.palette[:2], first])]

    def _unlike(self, others: list[Color]) -> Color:
        """A colour that stands off from these, and of four such the one least like anything there is."""
        choices = [_color(self.dice, others, 95) for _ in range(4)]
        return max(choices, key=lambda color: min(math.dist(color, other) for other in self.palette))

    def _register(self, kind: int, crowd: bool) -> int:
        self.category.append(list(CATEGORIES)[kind])
        self.crowd.append(crowd)
        self.full.append(0.0)
        self.seen.append(0)
        self.window.append(self.window[0])
        return len(self.category) - 1

    def _window(self, vertices: np.ndarray) -> tuple[slice, slice]:
        (x0, y0), (x1, y1) = np.floor(vertices.min(axis=0)), np.ceil(vertices.max(axis=0))
        return (slice(max(int(y0), 0), max(min(int(y1), self.height), 0)),
                slice(max(int(x0), 0), max(min(int(x1), self.width), 0)))

    def _stencil(self, vertices: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
        rows, columns = window = self._window(vertices)
        size = max(rows.stop - rows.start, 0), max(columns.stop - columns.start, 0)
        return window, fill(vertices - (columns.start, rows.start), *size)

    def _cost(self, vertices: np.ndarray) -> float:
        """Fine pixels of other objects that a new one covers; inf if one of them would be hidden or get a hole."""
        window, stencil = self._stencil(vertices)
        size = int(stencil.sum())
        covered = np.bincount(self.owner[window][stencil], minlength=len(self.seen)).tolist()
        if size < 0.7 * abs(signed_area(vertices)) or max(covered[1:], default=0) == size:
            return math.inf
        left = zip(self.seen[1:], covered[1:], self.full[1:], strict=True)
        if any(loss and seen - loss < max(VISIBLE * full, VISIBLE_AREA * FINE**2) for seen, loss, full in left):
            return math.inf
        return float(sum(covered[1:]))

    def _apply(self, vertices: np.ndarray, number: int, texture: str | None, colors: list[Color] | None = None,
               side: float = 0.0, force: bool = False) -> None:
        """Paints a polygon for owner `number`; unless forced, only where `_cost` allows it."""
        colors = colors or [_color(self.dice, self.palette[:2], 60)]
        if not force and math.isinf(self._cost(vertices)):
            return
        window, stencil = self._stencil(vertices)
        index = np.full(stencil.shape, len(self.palette), dtype=np.uint8)
        if texture is not None:
            period = min(max(side * self.dice.uniform(0.22, 0.4), 4.5 * FINE), 12.0 * FINE)
            index += _texture(texture, *stencil.shape, period, self.dice)
        self.palette += colors
        self.paint[window][stencil] = index[stencil]
        for loser, loss in enumerate(np.bincount(self.owner[window][stencil], minlength=len(self.seen)).tolist()):
            self.seen[loser] -= loss
        self.owner[window][stencil] = number
        self.seen[number] += int(stencil.sum())
        self.full[number] = abs(signed_area(vertices))
        if not self.crowd[number]:
            self.window[number] = window


def _color(dice: _Dice, others: list[Color], apart: float, at_most: float = math.inf) -> Color:
    """A random colour (0..255 a channel) at this RGB distance from the others."""
    while True:
        color = tuple((20 + 225 * dice.numbers(3)).tolist())
        if all(apart <= math.dist(color, other) <= at_most for other in others):
            return color


def _outline(kind: int, dice: _Dice) -> np.ndarray:
    """The silhouette (V, 2) of a class around the origin, any size, upright."""
    if kind == 0:  # disc
        angle = np.arange(28) * (2 * math.pi / 28)
        return np.stack([np.cos(angle), np.sin(angle) * dice.uniform(0.6, 1)], axis=1)
    if kind == 1:  # triangle
        angle = np.arange(3) * (2 * math.pi / 3)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.3 * (dice.numbers((3, 2)) - 0.5)
    if kind == 2:  # bar
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1, dice.uniform(0.4, 0.9)]
    if kind == 3:  # star
        angle, radius = np.arange(10) * (2 * math.pi / 10), np.array([1, dice.uniform(0.4, 0.5)] * 5)
        return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)
    if kind == 4:  # crescent: most of a circle, and back along the half of an ellipse
        tip, depth = dice.uniform(0.7, 1.1), dice.uniform(0.25, 0.45)
        outer = tip + np.arange(21) / 20 * (2 * math.pi - 2 * tip)
        inner = (0.5 - np.arange(1, 14) / 14) * -math.pi
        x, y = math.cos(tip) - (math.cos(tip) + depth) * np.cos(inner), math.sin(tip) * np.sin(inner)
        return np.stack([np.append(np.cos(outer), x), np.append(np.sin(outer), y)], axis=1)
    arm = dice.uniform(0.28, 0.4)  # cross
    quarter = np.array([[arm, arm], [arm, 1], [-arm, 1]])
    turns = [quarter, quarter[:, ::-1] * [-1, 1], -quarter, quarter[:, ::-1] * [1, -1]]
    return np.concatenate(turns)


def _placed(outline: np.ndarray, side: float, dice: _Dice) -> np.ndarray:
    """Squeezed, bent and turned at random, the longer side of its box as given, centred at the origin."""
    outline = outline * [1, dice.uniform(0.8, 1)] + 0.05 * (dice.numbers(2) - 0.5) * outline[:, ::-1] ** 2
    angle = dice.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    outline = outline @ np.array([[cos, sin], [-sin, cos]])
    low, high = outline.min(axis=0), outline.max(axis=0)
    return (outline - (low + high) / 2) * (side / float((high - low).max()))


def _texture(name: str, height: int, width: int, period: float, dice: _Dice) -> np.ndarray:
    """A two-valued pattern (height, width) bool, turned and shifted at random."""
    angle, shift = dice.uniform(0, 2 * math.pi), dice.numbers(2)
    y, x = np.arange(height)[:, None] - height / 2, np.arange(width) - width / 2
    u = (x * math.cos(angle) + y * math.sin(angle)) / period + shift[0]
    if name == "stripes":
        return _fraction(u) < 0.5
    if name == "rings":
        x, y = x + period * (shift[0] - 0.5), y + period * (shift[1] - 0.5)
        return _fraction(np.sqrt(x * x + y * y) / period) < 0.5
    v = (y * math.cos(angle) - x * math.sin(angle)) / period + shift[1]
    if name == "checks":
        return (_fraction(u) < 0.5) ^ (_fraction(v) < 0.5)
    if name == "dots":
        return (_fraction(u) - 0.5) ** 2 + (_fraction(v) - 0.5) ** 2 < 0.1
    if name == "zigzag":
        return _fraction(u + np.abs(_fraction(0.7 * v) - 0.5)) < 0.5
    heights = dice.numbers((int(height / period) + 3, int(width / period) + 3))  # blotches: noise on a grid, smoothed
    rows, columns = np.arange(height) / period + shift[0], np.arange(width) / period + shift[1]
    return _smooth(heights, rows, columns) < 0.5


def _fraction(values: np.ndarray) -> np.ndarray:
    return values - np.floor(values)


def _smooth(heights: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    (i, a), (j, b) = ((at.astype(np.int64), (at % 1) ** 2 * (3 - 2 * (at % 1))) for at in (rows, columns))
    across = heights[:, j] * (1 - b) + heights[:, j + 1] * b
    return across[i] * (1 - a[:, None]) + across[i + 1] * a[:, None]


def _info(split: str, count: int, seed: int) -> dict[str, str | int]:
    return {"description": "vitdet tiny", "version": VERSION, "seed": seed, "split": split, "images": count}


def _holds(folder: Path, train: int, val: int, seed: int) -> bool:
    for split, count in (("train", train), ("val", val)):
        path = folder / "annotations" / f"instances_{split}.json"
        try:
            info = json.loads(path.read_text())["info"]
        except (OSError, ValueError, KeyError, TypeError):
            return False  # whatever this is, it is not ours
        if info != _info(split, count, seed) or len(list((folder / split).glob("*.jpg"))) != count:
            return False
    return True


def _write_split(folder: Path, count: int, seed: int, first_id: int, processes: int) -> dict[str, object]:
    """Draws and writes the images; returns the annotation document."""
    processes = processes or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    work = partial(_write_image, folder, seed, first_id)
    if min(processes, count // 16) > 1:
        # fork: the workers use nothing that runs threads, and start without importing the package again
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with context.Pool(processes) as pool:
            scenes = pool.map(work, range(count), chunksize=8)
    else:
        scenes = [work(index) for index in range(count)]
    images, annotations = [], []
    for index, (name, height, width, objects) in enumerate(scenes):
        images.append({"id": first_id + index, "file_name": name, "height": height, "width": width})
        for thing in objects:
            annotations.append({"id": 2 * first_id + len(annotations), "image_id": first_id + index,
                                "category_id": thing.category_id, "bbox": list(thing.bbox), "area": thing.area,
                                "segmentation": thing.segmentation, "iscrowd": int(thing.crowd)})
    categories = [{"id": number, "name": name, "supercategory": "shape"} for number, name in CATEGORIES.items()]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def _write_image(folder: Path, seed: int, first_id: int, index: int) -> tuple[str, int, int, tuple[SceneObject, ...]]:
    scene = draw_scene(seed, index)
    name = f"{first_id + index:012d}.jpg"
    Image.fromarray(scene.image).save(folder / name, quality=92, subsampling=0)
    return name, *scene.image.shape[:2], scene.objects
