"""Scenes of the tiny data set: six classes that differ in shape and texture, not in colour.

Every class has its own silhouette and a preferred texture, used by 70 % of its instances (the
others use any); colours are random, backgrounds have the same textures on a larger scale, and there
are untextured fragments and lines as distractors. A scene depends on its seed and index only. The
drawing is frozen: change it only together with VERSION.

Scenes are painted without anti-aliasing on a canvas of twice the size ("fine" pixels) as indices
into a palette, with a map of the owner of each fine pixel, from which the visible outline of each
object is traced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vitdet.data.outlines import fill, signed_area, trace
from vitdet.demo.shapes import TEXTURES, Color, Dice, placed, random_color, silhouette, texture

VERSION = 1
# favourites: TEXTURES
CATEGORIES = {1: "disc", 2: "triangle", 3: "bar", 5: "star", 8: "crescent", 13: "cross"}
FINE = 2  # fine pixels a pixel and axis
SIDES = (14.0, 80.0)  # longer side of an object's box, pixels, log-uniform
TOLERANCE = 0.45  # pixels between a traced outline and its polygon
SLIVER = 4.0  # square pixels; smaller parts of an object are dropped
VISIBLE = 0.45  # of an object's area and
VISIBLE_AREA = 44.0  # square pixels: what later objects leave of an earlier one


@dataclass(frozen=True)
class SceneObject:
    """One annotated object: category id, box xywh, area in square pixels; a crowd has run lengths,
    others polygons.
    """

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


def draw_scene(seed: int, index: int) -> Scene:
    """Draw the scene of a seed and an index, deterministically. 88 to 128 pixels a side, one side
    128.
    """
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
        sides = [
            math.exp(dice.uniform(math.log(SIDES[0]), math.log(SIDES[1]))) for _ in range(count)
        ]
        # mostly small on large
        for side in sorted(sides, key=lambda side: -side * dice.uniform(0.6, 1.6)):
            canvas.paint_object(side)
        if dice.chance(0.25):
            for _ in range(dice.integer(1, 3)):
                canvas.paint_line()
    return Scene(canvas.image(), canvas.objects())


class _Canvas:
    """A scene while it is painted; its arrays are in fine pixels, its arguments in pixels."""

    def __init__(self, height: int, width: int, dice: Dice) -> None:
        self.dice = dice
        self.height, self.width = height * FINE, width * FINE
        ground = random_color(dice, [], 0)
        self.palette = [ground, random_color(dice, [ground], 25, 75)]
        pattern = texture(
            TEXTURES[dice.integer(0, 6)], self.height, self.width, FINE * dice.uniform(12, 40), dice
        )
        self.paint = pattern.astype(np.uint8)
        # number of an object; 0: none
        self.owner = np.zeros((self.height, self.width), dtype=np.uint8)
        self.category, self.crowd = [0], [False]  # of object 1, 2, ...; entry 0 is the ground
        self.full, self.seen = [0.0], [0]  # fine pixels: of the whole object, of its visible part
        # the part of the canvas that contains the object
        self.window = [(slice(0, self.height), slice(0, self.width))]

    def paint_scrap(self) -> None:
        """Paint a small untextured fragment or line that belongs to no class."""
        side = FINE * self.dice.uniform(3, 8)
        length = 1.0 if self.dice.chance(0.6) else self.dice.uniform(2.5, 6)
        scrap = placed(
            np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
            * (0.5 + 0.5 * self.dice.numbers((4, 2)))
            * [length, 0.6],
            side * length,
            self.dice,
        )
        self._apply(scrap + self._centre(0), 0, [self._plain()])

    def paint_line(self) -> None:
        """Paint a thin line over everything, which splits objects but does not hide them."""
        line = placed(
            np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1, 0.02],
            FINE * self.dice.uniform(50, 110),
            self.dice,
        )
        line, color = line + self._centre(20 * FINE), self._plain()
        if math.isfinite(self._cost(line)):
            self._apply(line, 0, [color])

    def paint_crowd(self) -> None:
        """Paint a cluster of small objects of one class, annotated as one region."""
        kind, side = self.dice.integer(0, 6), FINE * self.dice.uniform(30, 46)
        centre, pattern = self._centre(side / 2), self._favourite(kind)
        number = self._register(kind, crowd=True)
        colors = self._colors()
        for _ in range(self.dice.integer(9, 16)):
            size = FINE * self.dice.uniform(8, 11)
            place = centre + (self.dice.numbers(2) - 0.5) * (side - size)
            self._apply(
                placed(silhouette(kind, self.dice), size, self.dice) + place,
                number,
                colors,
                pattern,
                size,
            )
        self.full[number] = float(self.seen[number])

    def paint_object(self, side: float) -> None:
        """Paint an object whose box has this longer side, at the best of a few positions; nothing
        if all are occupied.
        """
        kind = self.dice.integer(0, 6)
        outline = placed(silhouette(kind, self.dice), FINE * side, self.dice)
        patience = 8 if self.dice.chance(0.75) else 1  # a few objects may hide others
        best, least = None, math.inf
        for _ in range(16):
            vertices = outline + self._centre(0.4 * FINE * side)
            cost = self._cost(vertices)
            if cost < least:
                best, least = vertices, cost
            patience -= math.isfinite(cost)
            if least == 0 or patience <= 0:
                break
        pattern, colors = self._favourite(kind), self._colors()
        if best is not None:
            self._apply(best, self._register(kind, crowd=False), colors, pattern, FINE * side)

    def image(self) -> np.ndarray:
        """Return the image (H, W, 3) uint8: averaged fine pixels, illuminated from one side."""
        fine = np.take(np.array(self.palette, dtype=np.uint16), self.paint, axis=0)
        rgb = fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]
        height, width = rgb.shape[:2]
        angle, strength = self.dice.uniform(0, 2 * math.pi), self.dice.uniform(0, 0.15)
        slope = (np.arange(height, dtype=np.float32)[:, None] / height - 0.5) * math.sin(angle)
        slope = slope + (np.arange(width, dtype=np.float32) / width - 0.5) * math.cos(angle)
        return np.clip(rgb * (0.25 + 0.25 * strength * slope[..., None]) + 0.5, 0, 255).astype(
            np.uint8
        )

    def objects(self) -> tuple[SceneObject, ...]:
        """Return the visible part of each object, in pixels."""
        things = [number for number in range(1, len(self.category)) if not self.crowd[number]]
        outlines = trace(
            [self.owner[self.window[number]] == number for number in things], TOLERANCE * FINE
        )
        return tuple(
            [
                self._crowd_region(number)
                for number in range(1, len(self.category))
                if self.crowd[number]
            ]
            + [self._visible(number, parts) for number, parts in zip(things, outlines, strict=True)]
        )

    def _visible(self, number: int, outlines: list[np.ndarray]) -> SceneObject:
        rows, columns = window = self.window[number]
        areas = [signed_area(part) for part in outlines]
        parts = [
            (part + (columns.start, rows.start)) / FINE
            for part, area in zip(outlines, areas, strict=True)
            if area >= min(SLIVER * FINE**2, max(areas))
        ]
        x0, y0 = np.min([part.min(axis=0) for part in parts], axis=0).tolist()
        x1, y1 = np.max([part.max(axis=0) for part in parts], axis=0).tolist()
        area = int(np.count_nonzero(self.owner[window] == number)) / FINE**2
        return SceneObject(
            self.category[number],
            (x0, y0, x1 - x0, y1 - y0),
            area,
            [part.ravel().tolist() for part in parts],
            False,
        )

    def _crowd_region(self, number: int) -> SceneObject:
        fine = (self.owner == number).astype(np.int64)
        region = fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2] >= 2
        rows, columns = (np.flatnonzero(region.any(axis)).tolist() for axis in (1, 0))
        flat = region.ravel(order="F")  # COCO's order: by column, starting with outside
        changes = np.flatnonzero(np.diff(flat, prepend=False))
        counts = np.diff(changes, prepend=0, append=flat.size).tolist()
        box = (
            float(columns[0]),
            float(rows[0]),
            columns[-1] + 1.0 - columns[0],
            rows[-1] + 1.0 - rows[0],
        )
        return SceneObject(
            self.category[number],
            box,
            float(region.sum()),
            {"size": list(region.shape), "counts": counts},
            True,
        )

    def _centre(self, margin: float) -> np.ndarray:
        return margin + self.dice.numbers(2) * (np.array([self.width, self.height]) - 2 * margin)

    def _favourite(self, kind: int) -> str:
        # 0.64 + 0.36 / 6 = 0.7
        return TEXTURES[kind if self.dice.chance(0.64) else self.dice.integer(0, 6)]

    def _colors(self) -> list[Color]:
        """Return two colours that contrast with each other and with both background colours."""
        first = self._unlike(self.palette[:2])
        return [first, self._unlike([*self.palette[:2], first])]

    def _plain(self) -> Color:
        return random_color(self.dice, self.palette[:2], 60)

    def _unlike(self, others: list[Color]) -> Color:
        """Return a colour that contrasts with these: of four candidates, the one most different
        from all.
        """
        choices = [random_color(self.dice, others, 95) for _ in range(4)]
        return max(
            choices, key=lambda color: min(math.dist(color, other) for other in self.palette)
        )

    def _register(self, kind: int, crowd: bool) -> int:
        self.category.append(list(CATEGORIES)[kind])
        self.crowd.append(crowd)
        self.full.append(0.0)
        self.seen.append(0)
        self.window.append(self.window[0])
        return len(self.category) - 1

    def _window(self, vertices: np.ndarray) -> tuple[slice, slice]:
        (x0, y0), (x1, y1) = np.floor(vertices.min(axis=0)), np.ceil(vertices.max(axis=0))
        return (
            slice(max(int(y0), 0), max(min(int(y1), self.height), 0)),
            slice(max(int(x0), 0), max(min(int(x1), self.width), 0)),
        )

    def _stencil(self, vertices: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
        rows, columns = window = self._window(vertices)
        size = max(rows.stop - rows.start, 0), max(columns.stop - columns.start, 0)
        return window, fill(vertices - (columns.start, rows.start), *size)

    def _cost(self, vertices: np.ndarray) -> float:
        """Return the fine pixels of other objects that a new one would cover; inf if it would hide
        one or make a hole.
        """
        window, stencil = self._stencil(vertices)
        size = int(np.count_nonzero(stencil))
        covered = np.bincount(self.owner[window][stencil], minlength=len(self.seen)).tolist()
        if size < 0.7 * abs(signed_area(vertices)) or max(covered[1:], default=0) == size:
            return math.inf
        left = zip(self.seen[1:], covered[1:], self.full[1:], strict=True)
        if any(
            loss and seen - loss < max(VISIBLE * full, VISIBLE_AREA * FINE**2)
            for seen, loss, full in left
        ):
            return math.inf
        return float(sum(covered[1:]))

    def _apply(
        self,
        vertices: np.ndarray,
        number: int,
        colors: list[Color],
        pattern: str = "",
        side: float = 0.0,
    ) -> None:
        """Paint a polygon for owner `number` in one colour, or in two with a pattern scaled to its
        longer side.
        """
        window, stencil = self._stencil(vertices)
        index = np.full(stencil.shape, len(self.palette), dtype=np.uint8)
        if pattern:
            period = min(max(side * self.dice.uniform(0.22, 0.4), 4.5 * FINE), 12.0 * FINE)
            height, width = stencil.shape
            index += texture(pattern, height, width, period, self.dice)
        self.palette += colors
        self.paint[window][stencil] = index[stencil]
        for loser, loss in enumerate(
            np.bincount(self.owner[window][stencil], minlength=len(self.seen)).tolist()
        ):
            self.seen[loser] -= loss
        self.owner[window][stencil] = number
        self.seen[number] += int(np.count_nonzero(stencil))
        self.full[number] = abs(signed_area(vertices))
        if not self.crowd[number]:
            self.window[number] = window
