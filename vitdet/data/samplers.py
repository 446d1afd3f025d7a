"""Sampling from an infinite stream of images.

The stream is a sequence of epochs, each in a different random order. A step uses the next
`batch_size` positions, of which each rank processes a contiguous part. The images of a step
therefore do not depend on the number of processes, the number of workers or restarts.

Repeat factors follow Gupta et al. 2019 (LVIS) and Detectron2's RepeatFactorTrainingSampler: an
image with factor 2.3 occurs twice or, in 30% of the epochs, three times.
Notation: N images, G objects in one image.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np


class InfiniteSampler:
    """Maps a position to the index of one of `size` images, shuffled by `seed` and epoch.

    repeats (N,) float, at least 1, is the average number of occurrences of each image per epoch;
    None means 1. With repeats, epochs differ in length, so that the lengths of all epochs up to
    a position must be computed (1 ms per epoch of 100,000 images).
    """

    def __init__(self, size: int, seed: int, repeats: np.ndarray | None = None) -> None:
        if size < 1:
            raise ValueError("there is no image to sample from")
        if repeats is not None and (repeats.shape != (size,) or repeats.min() < 1):
            raise ValueError(f"expected a repeat factor of at least 1 for each of {size} images")
        self.size = size
        self.seed = seed
        self.repeats = repeats
        # with repeat factors: start position of each epoch so far, then the end of the last epoch
        self._ends = [0]
        self._epoch = -1
        self._order = np.arange(0)

    def __getitem__(self, position: int) -> int:
        epoch, index = self._locate(position)
        if epoch != self._epoch:
            self._epoch = epoch
            images = np.arange(self.size)
            if self.repeats is not None:
                images = images.repeat(self._counts(self.repeats, epoch))
            self._order = np.random.default_rng((self.seed, epoch, 1)).permutation(images)
        return int(self._order[index])

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the epoch of a position and the index of the position in this epoch."""
        if self.repeats is None:
            return divmod(position, self.size)
        while self._ends[-1] <= position:
            self._ends.append(
                self._ends[-1] + int(self._counts(self.repeats, len(self._ends) - 1).sum())
            )
        epoch = bisect_right(self._ends, position) - 1
        return epoch, position - self._ends[epoch]

    def _counts(self, repeats: np.ndarray, epoch: int) -> np.ndarray:
        """Return the number of occurrences of each image (N,): randomly rounded repeat factors."""
        whole = np.floor(repeats)
        up = np.random.default_rng((self.seed, epoch, 2)).random(self.size) < repeats - whole
        return whole.astype(np.int64) + up


def repeat_factors(labels: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """Return the repeat factor (N,) of each image, from the classes (G,) of its objects.

    A class that occurs in a fraction f of the images has the factor max(1, sqrt(threshold / f)). An
    image has the largest factor of its classes.
    """
    classes = [np.unique(image) for image in labels]
    share = np.bincount(np.concatenate(classes)) / len(classes)
    factors = np.maximum(1.0, np.sqrt(threshold / np.maximum(share, 1e-300)))
    return np.array([factors[image].max(initial=1.0) for image in classes])


def check_batch_size(batch_size: int, processes: int, accumulate: int = 1) -> None:
    """Raise ValueError if batch_size is not divisible by processes * accumulate."""
    parts = processes * accumulate
    if batch_size % parts:
        lower = batch_size - batch_size % parts
        fitting = " or ".join(str(size) for size in (lower, lower + parts) if size)
        divisor = f"{processes} (the number of processes)"
        other = "or start a different number of processes"
        if accumulate > 1:
            count = "1 process" if processes == 1 else f"{processes} processes"
            divisor = f"{parts} ({count} x train.accumulate={accumulate})"
            other = "or change train.accumulate or the number of processes"
        raise ValueError(
            f"train.batch_size must be a multiple of {divisor}, got {batch_size}; "
            f"set it to {fitting}, {other}"
        )


class StepSampler:
    """Yields one rank's positions for steps start_step..steps-1, as one list per micro-batch.

    batch_size is the total over all ranks. Micro-batch k of rank r contains the positions that
    rank r * accumulate + k would process with accumulate * world_size ranks. Raises the ValueError
    of `check_batch_size`.
    """

    def __init__(
        self,
        batch_size: int,
        start_step: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        check_batch_size(batch_size, world_size, accumulate)
        self.batch_size = batch_size
        self.share = batch_size // (world_size * accumulate)
        self.steps = range(start_step, max(start_step, steps))
        self.parts = range(rank * accumulate, (rank + 1) * accumulate)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for part in self.parts:
                first = step * self.batch_size + part * self.share
                yield list(range(first, first + self.share))

    def __len__(self) -> int:
        return len(self.steps) * len(self.parts)
