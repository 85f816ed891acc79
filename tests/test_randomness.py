# SPDX-License-Identifier: Apache-2.0
"""Randomness: a function of counters, the same in any process and whatever was drawn before."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.randomness import StepRandom, counter_hash, seed_from, shuffled

BITS = np.arange(64, dtype=np.uint64)


def bits_of(values: np.ndarray) -> np.ndarray:
    """(..., 64) of 0 and 1."""
    return (values[..., None] >> BITS & np.uint64(1)).astype(int)


def test_counter_hash_broadcasts():
    epochs, rows = np.arange(3)[:, None], np.arange(5)
    found = counter_hash(7, epochs, rows)
    assert found.shape == (3, 5) and found.dtype == np.uint64
    for epoch, row in itertools.product(range(3), range(5)):
        assert found[epoch, row] == counter_hash(7, epoch, row)


def test_counter_hash_takes_any_integer_type():
    expected = counter_hash(3, 2**40)
    for kind in (np.int64, np.uint64):
        assert counter_hash(kind(3), np.array(2**40, dtype=kind)) == expected


def test_counter_hash_differs_per_counter_and_per_position():
    tuples = [counters for length in (1, 2, 3) for counters in itertools.product(range(6), repeat=length)]
    values = {int(counter_hash(*counters)) for counters in tuples}
    assert len(values) == len(tuples)  # so (1, 2) is not (2, 1), (0,) is not (0, 0)
    large = [2**31, 2**32, 2**63 - 1, 2**63]
    assert len({int(counter_hash(a, b)) for a in large for b in large}) == len(large) ** 2


def test_counter_hash_bits_are_uniform():
    values = counter_hash(0, np.arange(20_000))
    assert len(np.unique(values)) == 20_000
    deviation = 0.5 / np.sqrt(20_000)
    assert np.abs(bits_of(values).mean(axis=0) - 0.5).max() < 5 * deviation
    # neighbouring bits, and the same bit of neighbouring counters, are independent
    bits = bits_of(values) * 2 - 1
    assert np.abs((bits[:, 1:] * bits[:, :-1]).mean(axis=0)).max() < 10 * deviation
    assert np.abs((bits[1:] * bits[:-1]).mean(axis=0)).max() < 10 * deviation


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("flipped", [0, 5, 31, 62])
def test_one_bit_of_any_counter_flips_half_of_the_hash(position, flipped):
    counters = [np.arange(2000), np.arange(2000) * 17 + 5, np.arange(2000) * 3]
    before = counter_hash(*counters)
    counters[position] = counters[position] ^ (1 << flipped)
    flips = bits_of(before ^ counter_hash(*counters))
    assert abs(flips.mean() - 0.5) < 0.01
    assert np.abs(flips.mean(axis=0) - 0.5).max() < 0.07


def test_seed_from_fits_a_generator():
    seeds = [seed_from(a, b) for a in range(50) for b in range(50)]
    assert len(set(seeds)) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize("num_rows", [1, 2, 7, 1000])
def test_shuffled_is_a_permutation(num_rows):
    order = shuffled(0, 3, num_rows)
    assert order.shape == (num_rows,) and order.dtype == np.int64
    assert sorted(order) == list(range(num_rows))


def test_shuffled_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = shuffled(4, 2, 500)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    np.testing.assert_array_equal(first, shuffled(4, 2, 500))
    assert torch.equal(state, torch.get_rng_state())
    for other in (shuffled(4, 3, 500), shuffled(5, 2, 500), shuffled(2, 4, 500)):
        assert (first != other).mean() > 0.9


def draws(rng: StepRandom, batch_size: int) -> dict[str, torch.Tensor]:
    """One draw of each kind, in a fixed order."""
    return {
        "normal": rng.normal((batch_size, 2, 3)),
        "integers": rng.integers(1000, batch_size),
        "antithetic": rng.integers(1000, batch_size, antithetic=True),
        "normal again": rng.normal((batch_size,)),
    }


@pytest.mark.parametrize("ambient", [0, 1, None])
def test_the_ambient_generator_does_not_matter(ambient):
    torch.manual_seed(99)
    expected = draws(StepRandom(5, 3), 4)
    if ambient is not None:
        torch.manual_seed(ambient)
    rng = StepRandom(5, 3)
    torch.rand(7)  # a model that drew something, such as dropout
    for name, tensor in draws(rng, 4).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("counters", [(5, 4), (6, 3), (3, 5)])
def test_other_counters_give_other_draws(counters):
    one, other = draws(StepRandom(5, 3), 64), draws(StepRandom(*counters), 64)
    for name in one:
        assert (one[name] != other[name]).float().mean() > 0.9, name


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_processes_share_the_draws_of_one(world_size, batch_size):
    whole = draws(StepRandom(5, 3), world_size * batch_size)
    parts = [draws(StepRandom(5, 3, rank=r, world_size=world_size), batch_size) for r in range(world_size)]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name


def test_distributions():
    rng = StepRandom(0, 0)
    noise = rng.normal((200, 500))
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.015 and abs(noise.std() - 1) < 0.015
    for antithetic in (False, True):
        timesteps = rng.integers(10, 20_000, antithetic=antithetic)
        assert timesteps.dtype == torch.int64 and timesteps.shape == (20_000,)
        counts = torch.bincount(timesteps, minlength=10)
        assert len(counts) == 10 and (counts / 2000 - 1).abs().max() < 0.12


@pytest.mark.parametrize("batch_size", [1, 2, 7, 8])
@pytest.mark.parametrize("high", [2, 999, 1000])
def test_antithetic_pairs_sum_to_high_less_one(batch_size, high):
    timesteps = StepRandom(1, 2).integers(high, batch_size, antithetic=True)
    assert timesteps.shape == (batch_size,)
    assert timesteps.min() >= 0 and timesteps.max() < high
    pairs = timesteps[: batch_size // 2 * 2].reshape(-1, 2)
    assert (pairs.sum(dim=1) == high - 1).all()


def dropped(seed: int, micro_step: int, rank: int, draw_before: bool = False) -> torch.Tensor:
    """What dropout does in one micro-step of one process."""
    rng = StepRandom(seed, micro_step, rank=rank, world_size=2)
    if draw_before:
        rng.normal((3, 4))
    return F.dropout(torch.ones(256), 0.5)


def test_dropout_is_a_function_of_seed_step_and_rank():
    expected = dropped(1, 2, 0)
    torch.rand(5)
    assert torch.equal(dropped(1, 2, 0), expected)
    assert torch.equal(dropped(1, 2, 0, draw_before=True), expected)  # the noise has a generator of its own
    for other in (dropped(1, 2, 1), dropped(1, 3, 0), dropped(2, 2, 0), dropped(2, 1, 0)):
        assert 0.3 < (other != expected).float().mean() < 0.7


def test_noise_and_dropout_do_not_share_their_numbers():
    rng = StepRandom(1, 2)
    assert not torch.equal(rng.normal((8,)), torch.randn(8))
