"""The areas of many run-length codes at once, and whether each of them fills its mask.

A code that does not fill its mask sends pycocotools and faster-coco-eval into an endless loop when it is compared with
another one, hence the check. COCO's compressed text (maskApi.c): 5 bits a character from '0' on, lowest first; bit 5
marks that the number continues, bit 4 of its last character is the sign; from the fourth number on it is the difference of
a run to two runs before. Runs alternate down the columns, background first.
Letters: C characters, U numbers of all codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

AT_ONCE = 512  # codes: what is known of their runs stays in the processor's cache


def areas(texts: Sequence[bytes], pixels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Areas int64 of codes in pixels, and whether each is valid: its runs add up to `pixels`.

    With a code that is no run lengths at all in it, a part of AT_ONCE codes is as a whole not sound.
    """
    sizes, sound = np.zeros(len(texts), np.int64), np.zeros(len(texts), bool)
    for start in range(0, len(texts), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        found = _sums(texts[part])
        if found is not None:
            sizes[part] = found[1]
            sound[part] = found[0] == np.asarray(pixels[part])
    return sizes, sound


def _sums(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray] | None:
    """The sums of all runs and of those inside the masks; None if a text is not made of whole numbers."""
    ends = np.cumsum([len(text) for text in texts])
    codes = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)
    final = (codes & 32) == 0  # (C,) the last characters of numbers
    if min(map(len, texts)) == 0 or codes.max() > 63 or not final[ends - 1].all():
        return None
    numbers = _numbers(codes, np.flatnonzero(final))
    if numbers is None:
        return None
    counts = np.add.reduceat(final, np.append(0, ends[:-1]), dtype=np.int64)  # numbers of each code
    starts = np.cumsum(counts) - counts
    place = np.arange(len(numbers)) - np.repeat(starts, counts)
    # a number is in its own run and, by the differences, in every second one after it; the first only in its own
    weights = (np.repeat(counts, counts) - 1 - place) // 2 + 1
    weights[starts] = 1
    numbers *= weights
    total = np.add.reduceat(numbers, starts)
    numbers *= place & 1
    return total, np.add.reduceat(numbers, starts)


def _numbers(codes: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """The signed numbers (U,) int64 whose last characters are at `ends` (U,); None if one is too long."""
    lengths = np.diff(ends, prepend=-1)
    longest = int(lengths.max())
    if longest > 7:  # 35 bits
        return None
    numbers = ((codes[ends] & 31).astype(np.int64) ^ 16) - 16
    for back in range(1, longest):
        longer = np.flatnonzero(lengths > back)
        numbers[longer] = (numbers[longer] << 5) | (codes[ends[longer] - back] & 31)
    return numbers
