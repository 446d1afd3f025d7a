"""Training sampler: each image once per epoch, the same stream for any number of ranks and after a restart."""

import time
from collections import Counter

import numpy as np
import pytest

from vitdet.data.samplers import InfiniteSampler, StepSampler, check_batch_size, repeat_factors


def test_every_epoch_has_each_image_once_in_a_new_order() -> None:
    sampler = InfiniteSampler(10, seed=3)
    epochs = [[sampler[10 * epoch + place] for place in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("repeats", [None, 1 + 2 * np.random.default_rng(0).random(9)])
def test_a_position_does_not_depend_on_earlier_reads(repeats: np.ndarray | None) -> None:
    forward, shuffled = InfiniteSampler(9, 5, repeats), InfiniteSampler(9, 5, repeats)
    stream = [forward[position] for position in range(400)]
    places = [*np.random.default_rng(1).permutation(400).tolist(), 45, 3, 45]
    assert [shuffled[place] for place in places] == [stream[place] for place in places]
    assert [InfiniteSampler(9, 6, repeats)[place] for place in range(30)] != stream[:30]


def test_repeat_factors_of_1_change_nothing() -> None:
    plain, ones = InfiniteSampler(9, 5), InfiniteSampler(9, 5, np.ones(9))
    assert [ones[place] for place in range(60)] == [plain[place] for place in range(60)]


@pytest.mark.parametrize("repeats", [None, np.array([1.0, 2.5, 1.25])], ids=["once", "repeated"])
def test_the_stream_is_infinite(repeats: np.ndarray | None) -> None:
    sampler = InfiniteSampler(3, 0, repeats)
    far = [sampler[position] for position in range(9_000, 9_600)]
    start = [sampler[position] for position in range(300)]
    assert set(far) == {0, 1, 2} and far[:300] != far[300:] != start != far[:300]
    (step,) = StepSampler(6, 10**12, 10**12 + 1, 1, 2)
    assert step == [6 * 10**12 + 3, 6 * 10**12 + 4, 6 * 10**12 + 5]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_split_the_batch_of_a_single_process(world_size: int, accumulate: int) -> None:
    alone = list(StepSampler(12, 0, 4))
    ranks = [StepSampler(12, 0, 4, rank, world_size, accumulate) for rank in range(world_size)]
    assert [len(rank) for rank in ranks] == [4 * accumulate] * world_size
    parts = [list(rank) for rank in ranks]
    for step, batch in enumerate(alone):
        mine = slice(step * accumulate, (step + 1) * accumulate)
        assert [place for rank in parts for part in rank[mine] for place in part] == batch
    assert sum(alone, []) == list(range(48))
    restarted = StepSampler(12, 3, 4, 0, world_size, accumulate)
    assert list(restarted) == parts[0][3 * accumulate :]
    assert list(StepSampler(12, 4, 4)) == [] and len(StepSampler(12, 5, 4)) == 0


def test_invalid_sampler_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 4 \(the number of processes\), got 6"):
        StepSampler(6, 0, 1, 0, 4)
    with pytest.raises(ValueError, match="no image"):
        InfiniteSampler(0, 0)
    with pytest.raises(ValueError, match="a repeat factor of at least 1 for each of 2 images"):
        InfiniteSampler(2, 0, np.array([1.0, 0.5]))


@pytest.mark.parametrize(
    ("batch", "processes", "accumulate", "parts", "sizes"),
    [
        (3, 2, 1, "2 (the number of processes)", "2 or 4"),
        (12, 2, 4, "8 (2 processes x train.accumulate=4)", "8 or 16"),
        (2, 1, 3, "3 (1 process x train.accumulate=3)", "3"),
    ],
)
def test_the_error_for_an_indivisible_batch_states_valid_sizes(
    batch: int, processes: int, accumulate: int, parts: str, sizes: str
) -> None:
    with pytest.raises(ValueError) as caught:
        check_batch_size(batch, processes, accumulate)
    what = f"train.batch_size must be a multiple of {parts}, got {batch}; set it to {sizes}, or "
    change = "change train.accumulate or the" if accumulate > 1 else "start a different"
    assert str(caught.value) == f"{what}{change} number of processes"
    check_batch_size(24, processes, accumulate)


def test_repeat_factors_follow_the_rarest_class() -> None:
    images = ([0, 0], [0, 1], [0], [0, 2, 3], [0], [0, 1], [0], [0, 3], [0], [])
    labels = [np.array(image, np.int64) for image in images]
    # Of ten images, class 0 is in 9, class 1 in 2, class 2 in 1, class 3 in 2.
    expected = [1, (0.4 / 0.2) ** 0.5, 1, 2, 1, (0.4 / 0.2) ** 0.5, 1, 2**0.5, 1, 1]
    assert repeat_factors(labels, 0.4) == pytest.approx(expected)
    assert repeat_factors(labels, 0.1).tolist() == [1.0] * 10  # no class is rarer than this


def test_repeat_factors_of_random_images_follow_the_formula() -> None:
    rng = np.random.default_rng(0)
    labels = [rng.geometric(0.2, rng.integers(1, 6)) for _ in range(300)]
    holding = Counter(label for image in labels for label in set(image.tolist()))
    slow = [
        max(max(1.0, (0.05 / (holding[label] / 300)) ** 0.5) for label in image.tolist())
        for image in labels
    ]
    assert max(slow) > 2 and repeat_factors(labels, 0.05) == pytest.approx(slow)


def test_images_are_repeated_according_to_their_factors() -> None:
    factors = np.array([1.0, 1.3, 2.0, 2.75, 4.5])
    sampler = InfiniteSampler(5, seed=1, repeats=factors)
    epochs = 2000
    ends, stream = [0], []
    while len(ends) <= epochs:  # stochastic rounding determines the length of an epoch
        sampler[ends[-1]]
        start, length = ends[-1], len(sampler._order)
        epoch = [sampler[position] for position in range(start, start + length)]
        counts = np.bincount(epoch, minlength=5)
        assert ((counts == np.floor(factors)) | (counts == np.ceil(factors))).all()
        stream += epoch
        ends.append(start + length)
    error = np.bincount(stream) / epochs - factors
    deviation = ((factors % 1) * (1 - factors % 1) / epochs) ** 0.5
    assert (np.abs(error) <= 4 * deviation + 1e-12).all()
    assert len(set(np.diff(ends).tolist())) > 2  # epochs differ in length
    assert stream[:12] != stream[ends[1] : ends[1] + 12]  # and in order


def test_a_late_restart_of_a_long_run_is_fast_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the 100,000 images of LVIS, step 150,000 at batch size 64 is in about epoch 80.

    Finding the position takes one draw per epoch instead of one per step, and one permutation.
    """
    epochs, real = [], InfiniteSampler._counts

    def counts(self: InfiniteSampler, *args: object) -> object:
        epochs.append(args[-1])
        return real(self, *args)

    monkeypatch.setattr(InfiniteSampler, "_counts", counts)
    factors = 1 + np.random.default_rng(0).exponential(0.2, 100_000)
    position = 150_000 * 64
    start = time.process_time()
    restarted = InfiniteSampler(100_000, 0, factors)
    image = restarted[position]
    print(f"{time.process_time() - start:.2f} s of CPU")
    assert len(epochs) < 100 and len(set(epochs)) >= len(epochs) - 1
    going_on = InfiniteSampler(100_000, 0, factors)
    for step in range(0, 150_000, 30_000):
        going_on[step * 64]
    assert going_on[position] == image and len(restarted._ends) < 100
