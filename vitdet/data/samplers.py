"""One infinite stream of images, from which every step, rank and restart takes its place.

Position p of the stream is an image of epoch p // size, in that epoch's own random order. A step takes the next
`batch_size` positions and a rank its contiguous share of them, so neither the number of processes, nor the workers,
nor a restart changes which images a step sees.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class InfiniteSampler:
    """Position -> index into `size` images; every image once an epoch, shuffled by `seed` and the epoch."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("there is no image to sample from")
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._order = np.arange(0)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch, 1)).permutation(self.size)
        return int(self._order[place])


def positions(start_step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[list[int]]:
    """The positions of one rank, a list a step, for ever; `batch_size` counts the images of all ranks.

    Raises ValueError when the ranks cannot share a batch evenly.
    """
    if batch_size % world_size:
        raise ValueError(f"train.batch_size must be a multiple of the {world_size} processes, got {batch_size}")
    return _positions(start_step, batch_size, rank, batch_size // world_size)


def _positions(step: int, batch_size: int, rank: int, share: int) -> Iterator[list[int]]:
    while True:
        first = step * batch_size + rank * share
        yield list(range(first, first + share))
        step += 1
