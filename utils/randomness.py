# SPDX-License-Identifier: Apache-2.0
"""Randomness as a function of counters, never of how a process got there.

The crop and flip of an image depend on (seed, epoch, row); noise, timesteps and dropout of a step on
(seed, micro-step). Exact resume, any number of data workers, and a batch split over several processes follow from it.
"""

import numpy as np
import torch

# Counters that no micro-step reaches, in its place: the noise of samples and of an analysis is no training noise
VALIDATION_STREAM, NOISE_STREAM, ENCODE_STREAM = 2**32, 2**33, 2**34


def counter_hash(*counters: int | np.ndarray) -> np.ndarray:
    """64 random bits for a tuple of non-negative integers (splitmix64's finaliser, applied once per counter).

    Integer arrays broadcast against each other: `counter_hash(seed, epochs, rows)` has one value per row.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):  # unsigned wrap-around is the point
        for counter in counters:
            z = (state ^ np.asarray(counter).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return state


def seed_from(*counters: int) -> int:
    """A non-negative 63-bit seed for `torch.Generator.manual_seed`."""
    return int(counter_hash(*counters) >> np.uint64(1))


def shuffled(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order in which epoch `epoch` visits the rows: a permutation of range(num_rows), (num_rows,) int64."""
    generator = torch.Generator().manual_seed(seed_from(seed, epoch))
    return torch.randperm(num_rows, generator=generator).numpy()


class StepRandom:
    """The random numbers of one micro-step.

    Every draw is made for the global batch and a process takes its own rows, so two processes with half the batch see
    the noise that one process with the whole batch sees. Dropout draws from the global generators, which are seeded
    here per rank.
    """

    def __init__(self, seed: int, micro_step: int, *, rank: int = 0, world_size: int = 1, device="cpu"):
        self.rank, self.world_size = rank, world_size
        self.generator = torch.Generator(device).manual_seed(seed_from(seed, micro_step, 0))
        # torch.manual_seed would visit every kind of device, and keep a stack trace for each call before CUDA starts
        dropout_seed = seed_from(seed, micro_step, 1, rank)
        torch.default_generator.manual_seed(dropout_seed)
        if self.generator.device.type != "cpu":  # cuda and mps draw dropout from generators of their own
            torch.get_device_module(self.generator.device).manual_seed(dropout_seed)

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal float32 noise of `shape` = (B, ...), B the batch of this process."""
        whole = torch.randn(
            (shape[0] * self.world_size, *shape[1:]), generator=self.generator, device=self.generator.device
        )
        return self._own_rows(whole)

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Uniform float32 in [0, 1) of `shape` = (B, ...), B the batch of this process."""
        whole = torch.rand(
            (shape[0] * self.world_size, *shape[1:]), generator=self.generator, device=self.generator.device
        )
        return self._own_rows(whole)

    def integers(self, high: int, batch_size: int, *, antithetic: bool = False) -> torch.Tensor:
        """(B,) int64 in [0, high). `antithetic`: neighbours are pairs (t, high - 1 - t), which lowers the variance of
        a batch's loss because small and large timesteps always come together."""
        count = batch_size * self.world_size
        draws = (count + 1) // 2 if antithetic else count
        whole = torch.randint(high, (draws,), generator=self.generator, device=self.generator.device)
        if antithetic:
            whole = torch.stack([whole, high - 1 - whole], dim=1).flatten()[:count]
        return self._own_rows(whole)

    def _own_rows(self, whole: torch.Tensor) -> torch.Tensor:
        batch_size = whole.shape[0] // self.world_size
        return whole[self.rank * batch_size : (self.rank + 1) * batch_size]
