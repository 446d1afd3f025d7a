"""The stream of images: every image once an epoch, and the same images for any number of ranks and after a restart."""

from itertools import islice

import pytest

from vitdet.data.samplers import InfiniteSampler, positions


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own() -> None:
    sampler = InfiniteSampler(10, seed=3)
    epochs = [[sampler[10 * epoch + place] for place in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [InfiniteSampler(10, 4)[place] for place in range(10)] != epochs[0]


def test_a_position_does_not_depend_on_what_was_asked_before() -> None:
    sampler, forward = InfiniteSampler(7, 0), InfiniteSampler(7, 0)
    stream = [forward[position] for position in range(50)]
    assert [sampler[position] for position in (45, 3, 22, 8, 45)] == [stream[p] for p in (45, 3, 22, 8, 45)]


def test_ranks_share_the_batch_of_one_process() -> None:
    alone = list(islice(positions(0, 6), 4))
    for world_size in (1, 2, 3, 6):
        ranks = [list(islice(positions(0, 6, rank, world_size), 4)) for rank in range(world_size)]
        assert [sum((rank[step] for rank in ranks), []) for step in range(4)] == alone
    assert sum(alone, []) == list(range(24))


def test_a_restart_takes_the_next_step() -> None:
    assert list(islice(positions(5, 4, 1, 2), 3)) == list(islice(positions(0, 4, 1, 2), 8))[5:]


def test_uneven_shares_and_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="train.batch_size must be a multiple of the 4 processes, got 6"):
        positions(0, 6, 0, 4)
    with pytest.raises(ValueError, match="no image"):
        InfiniteSampler(0, 0)
