"""Scenes of the tiny data set: six classes that differ in shape and texture, not in color.

Every class has a silhouette and a preferred texture, which 70% of its instances use. Colors are
random, backgrounds have the same textures at a larger scale, and untextured fragments and lines are
distractors. A scene depends only on its seed and index. Any change to the drawing requires a
new VERSION.

Scenes are painted without anti-aliasing on a canvas of twice the size ("fine" pixels) as indices
into a palette. A second array contains the owner of each fine pixel; the visible outlines of the
objects are traced from this array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vitdet.data.outlines import fill, signed_area, trace
from vitdet.demo.shapes import (
    SQUARE,
    TEXTURES,
    Color,
    Dice,
    placed,
    random_color,
    silhouette,
    texture,
)

VERSION = 1
# the preferred texture of a class is at the same index of TEXTURES
CATEGORIES = {1: "disc", 2: "triangle", 3: "bar", 5: "star", 8: "crescent", 13: "cross"}
FINE = 2  # fine pixels per pixel along each axis
SIDES = (14.0, 80.0)  # range of the longer side of an object's box in pixels, log-uniform
TOLERANCE = 0.45  # maximum distance in pixels between a traced outline and its polygon
SLIVER = 4.0  # square pixels; smaller parts of an object are dropped, except the largest part
VISIBLE = 0.45  # minimum visible fraction of an object's area
VISIBLE_AREA = 44.0  # minimum visible area of an object in square pixels
Window = tuple[slice, slice]


@dataclass(frozen=True)
class SceneObject:
    """An annotated object."""

    category_id: int
    bbox: tuple[float, float, float, float]  # x, y, width, height
    area: float  # square pixels
    segmentation: list[list[float]] | dict[str, list[int]]  # polygons, or the RLE of a crowd
    crowd: bool


@dataclass(frozen=True)
class Scene:
    """An image with annotated objects."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    objects: tuple[SceneObject, ...]


def draw_scene(seed: int, index: int) -> Scene:
    """Draw a scene whose longer side is 128 pixels, and whose shorter side is at least 88."""
    dice = Dice(seed, index)
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
        low, high = map(math.log, SIDES)
        sides = [math.exp(dice.uniform(low, high)) for _ in range(count)]
        # paint large objects first in most cases, so that small objects remain visible
        for side in sorted(sides, key=lambda side: -side * dice.uniform(0.6, 1.6)):
            canvas.paint_object(side)
        if dice.chance(0.25):
            for _ in range(dice.integer(1, 3)):
                canvas.paint_line()
    return Scene(canvas.image(), canvas.objects())


@dataclass
class _Owner:
    """An owner of fine pixels: an object or the background."""

    category: int
    crowd: bool
    window: Window  # region that contains the object
    full: float = 0.0  # area of the whole object in fine pixels
    seen: int = 0  # number of visible fine pixels


class _Canvas:
    """A scene that is being painted; its arrays consist of fine pixels."""

    def __init__(self, height: int, width: int, dice: Dice) -> None:
        self.dice = dice
        self.height, self.width = height * FINE, width * FINE
        ground = random_color(dice, [], 0)
        self.palette = [ground, random_color(dice, [ground], 25, 75)]
        kind, period = TEXTURES[dice.integer(0, 6)], FINE * dice.uniform(12, 40)
        pattern = texture(kind, self.height, self.width, period, dice)
        self.paint = pattern.astype(np.uint8)
        self.owner = np.zeros((self.height, self.width), dtype=np.uint8)  # index into `owners`
        self.owners = [_Owner(0, False, (slice(0, self.height), slice(0, self.width)))]

    def paint_scrap(self) -> None:
        """Paint a small untextured fragment or line that belongs to no class."""
        side = FINE * self.dice.uniform(3, 8)
        length = 1.0 if self.dice.chance(0.6) else self.dice.uniform(2.5, 6)
        outline = SQUARE * (0.5 + 0.5 * self.dice.numbers((4, 2))) * [length, 0.6]
        scrap = placed(outline, side * length, self.dice)
        self._apply(scrap + self._center(0), 0, [self._plain()])

    def paint_line(self) -> None:
        """Paint a thin line over all objects, if its `_cost` is finite."""
        length = FINE * self.dice.uniform(50, 110)
        line = placed(SQUARE * [1, 0.02], length, self.dice)
        line, color = line + self._center(20 * FINE), self._plain()
        if math.isfinite(self._cost(line)):
            self._apply(line, 0, [color])

    def paint_crowd(self) -> None:
        """Paint a cluster of small objects of one class, annotated as one crowd region."""
        kind, side = self.dice.integer(0, 6), FINE * self.dice.uniform(30, 46)
        center, pattern = self._center(side / 2), self._preferred(kind)
        number = self._register(kind, crowd=True)
        colors = self._colors()
        for _ in range(self.dice.integer(9, 16)):
            size = FINE * self.dice.uniform(8, 11)
            place = center + (self.dice.numbers(2) - 0.5) * (side - size)
            outline = placed(silhouette(kind, self.dice), size, self.dice)
            self._apply(outline + place, number, colors, pattern, size)
        self.owners[number].full = float(self.owners[number].seen)

    def paint_object(self, side: float) -> None:
        """Paint an object at a random valid position, if any; `side`: longer side in pixels."""
        kind = self.dice.integer(0, 6)
        outline = placed(silhouette(kind, self.dice), FINE * side, self.dice)
        patience = 8 if self.dice.chance(0.75) else 1  # number of valid positions to compare
        best, least = None, math.inf
        for _ in range(16):
            vertices = outline + self._center(0.4 * FINE * side)
            cost = self._cost(vertices)
            if cost < least:
                best, least = vertices, cost
            patience -= math.isfinite(cost)
            if least == 0 or patience <= 0:
                break
        pattern, colors = self._preferred(kind), self._colors()
        if best is not None:
            self._apply(best, self._register(kind, crowd=False), colors, pattern, FINE * side)

    def image(self) -> np.ndarray:
        """Return the image (H, W, 3) uint8: averaged fine pixels, illuminated from one side."""
        rgb = _sums(np.take(np.array(self.palette, dtype=np.uint16), self.paint, axis=0))
        height, width = rgb.shape[:2]
        angle, strength = self.dice.uniform(0, 2 * math.pi), self.dice.uniform(0, 0.15)
        slope = (np.arange(height, dtype=np.float32)[:, None] / height - 0.5) * math.sin(angle)
        slope = slope + (np.arange(width, dtype=np.float32) / width - 0.5) * math.cos(angle)
        lit = rgb * (0.25 + 0.25 * strength * slope[..., None]) + 0.5
        return np.clip(lit, 0, 255).astype(np.uint8)

    def objects(self) -> tuple[SceneObject, ...]:
        """Return the visible part of each object, in pixels."""
        numbered = list(enumerate(self.owners))[1:]
        crowds = [self._crowd_region(number, owner) for number, owner in numbered if owner.crowd]
        single = [(number, owner) for number, owner in numbered if not owner.crowd]
        bitmaps = [self.owner[owner.window] == number for number, owner in single]
        outlines = trace(bitmaps, TOLERANCE * FINE)
        visible = [
            self._visible(owner, parts, int(np.count_nonzero(bitmap)))
            for (_, owner), parts, bitmap in zip(single, outlines, bitmaps, strict=True)
        ]
        return (*crowds, *visible)

    def _visible(self, owner: _Owner, outlines: list[np.ndarray], pixels: int) -> SceneObject:
        rows, columns = owner.window
        areas = [signed_area(part) for part in outlines]
        parts = [
            (part + (columns.start, rows.start)) / FINE
            for part, area in zip(outlines, areas, strict=True)
            if area >= min(SLIVER * FINE**2, max(areas))
        ]
        x0, y0 = np.min([part.min(axis=0) for part in parts], axis=0).tolist()
        x1, y1 = np.max([part.max(axis=0) for part in parts], axis=0).tolist()
        polygons = [part.ravel().tolist() for part in parts]
        box = (x0, y0, x1 - x0, y1 - y0)
        return SceneObject(owner.category, box, pixels / FINE**2, polygons, False)

    def _crowd_region(self, number: int, owner: _Owner) -> SceneObject:
        region = _sums((self.owner == number).astype(np.int64)) >= 2
        rows, columns = (np.flatnonzero(region.any(axis)).tolist() for axis in (1, 0))
        flat = region.ravel(order="F")  # COCO's RLE is column-major and starts with background
        changes = np.flatnonzero(np.diff(flat, prepend=False))
        counts = np.diff(changes, prepend=0, append=flat.size).tolist()
        x, y = float(columns[0]), float(rows[0])
        box = (x, y, columns[-1] + 1.0 - x, rows[-1] + 1.0 - y)
        code = {"size": list(region.shape), "counts": counts}
        return SceneObject(owner.category, box, float(region.sum()), code, True)

    def _center(self, margin: float) -> np.ndarray:
        return margin + self.dice.numbers(2) * (np.array([self.width, self.height]) - 2 * margin)

    def _preferred(self, kind: int) -> str:
        # the preferred texture has the probability 0.64 + 0.36 / 6 = 0.7
        return TEXTURES[kind if self.dice.chance(0.64) else self.dice.integer(0, 6)]

    def _colors(self) -> list[Color]:
        """Return two colors that contrast with each other and with both background colors."""
        first = self._unlike(self.palette[:2])
        return [first, self._unlike([*self.palette[:2], first])]

    def _plain(self) -> Color:
        return random_color(self.dice, self.palette[:2], 60)

    def _unlike(self, others: list[Color]) -> Color:
        """Draw 4 colors unlike `others`; return the color that contrasts most with the palette."""
        choices = [random_color(self.dice, others, 95) for _ in range(4)]
        return max(choices, key=lambda color: min(math.dist(color, used) for used in self.palette))

    def _register(self, kind: int, crowd: bool) -> int:
        self.owners.append(_Owner(list(CATEGORIES)[kind], crowd, self.owners[0].window))
        return len(self.owners) - 1

    def _stencil(self, vertices: np.ndarray) -> tuple[Window, np.ndarray, list[int]]:
        """Return a polygon's window and mask, and the number of covered pixels of each owner."""
        (x0, y0), (x1, y1) = np.floor(vertices.min(axis=0)), np.ceil(vertices.max(axis=0))
        rows = slice(max(int(y0), 0), max(min(int(y1), self.height), 0))
        columns = slice(max(int(x0), 0), max(min(int(x1), self.width), 0))
        size = max(rows.stop - rows.start, 0), max(columns.stop - columns.start, 0)
        stencil = fill(vertices - (columns.start, rows.start), *size)
        owners = self.owner[rows, columns][stencil]
        covered = np.bincount(owners, minlength=len(self.owners)).tolist()
        return (rows, columns), stencil, covered

    def _cost(self, vertices: np.ndarray) -> float:
        """Return how many fine pixels of objects a polygon would cover.

        The result is infinite if the polygon extends far outside the image, is inside one object,
        or would hide too much of an object.
        """
        _, stencil, covered = self._stencil(vertices)
        size, losses = int(np.count_nonzero(stencil)), covered[1:]
        if size < 0.7 * abs(signed_area(vertices)) or max(losses, default=0) == size:
            return math.inf
        for owner, loss in zip(self.owners[1:], losses, strict=True):
            least = max(VISIBLE * owner.full, VISIBLE_AREA * FINE**2)
            if loss and owner.seen - loss < least:
                return math.inf
        return float(sum(losses))

    def _apply(
        self,
        vertices: np.ndarray,
        number: int,
        colors: list[Color],
        pattern: str = "",
        side: float = 0.0,
    ) -> None:
        """Paint a polygon in one color, or a two-color pattern whose period depends on `side`."""
        window, stencil, covered = self._stencil(vertices)
        index = np.full(stencil.shape, len(self.palette), dtype=np.uint8)
        if pattern:
            period = min(max(side * self.dice.uniform(0.22, 0.4), 4.5 * FINE), 12.0 * FINE)
            height, width = stencil.shape
            index += texture(pattern, height, width, period, self.dice)
        self.palette += colors
        self.paint[window][stencil] = index[stencil]
        for covered_owner, loss in zip(self.owners, covered, strict=True):
            covered_owner.seen -= loss
        self.owner[window][stencil] = number
        owner = self.owners[number]
        owner.seen += int(np.count_nonzero(stencil))
        owner.full = abs(signed_area(vertices))
        if not owner.crowd:
            owner.window = window


def _sums(fine: np.ndarray) -> np.ndarray:
    """Return, for each pixel, the sum of its 4 fine pixels."""
    return fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]
