# SPDX-License-Identifier: Apache-2.0
"""Balance between timesteps: a sample's loss divided by what is usual where it lies in the schedule.

Errors at the clean end of a schedule are many times larger than elsewhere, and a mean over samples trains little but
that end. Dividing by the expected error of the noise level is known: EDM2 learns it beside the model (Karras et al.
2024), min-SNR is its fixed cousin (Hang et al. 2023). Here it is a running mean in each of 20 bins of the schedule,
to a power P, for output distillation (`--timestep_balance`), LIFT and PLACE included, and for the diffusion loss
(`--task_balance`):

    bin = floor(20 * place / places)                                      place 0 is the cleanest
    weight = clamp((M / m[bin]) ** P, 1/20, 20)                           1 where less than 8 samples have been seen
    m = S / N,  M = sum(S) / sum(N)                                       S: sum of errors, N: count, of each bin
    S, N <- .99 * (S, N) + those of the step                              after every optimizer step

With P = 0 all samples count alike, with P = 1 all bins do; M keeps the loss's scale.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

BINS = 20
DECAY = 0.99  # of sums and counts, for every optimizer step: a memory of about a hundred
ENOUGH = 8  # samples in a bin before its mean is trusted
LIMIT = 20.0  # of the weight, and its inverse


class TimestepBalance:
    """Running sums and counts of errors by bin of the schedule, and the weights that follow from them.

    They are float32, equal on all processes, and nothing here waits for the device: a mask and a sum sort a batch into
    bins, and one all-reduce for each optimizer step adds up the processes. So a step of 4 x 16 samples, on one process
    or on four, sees and leaves what a step of 64 does.
    """

    def __init__(
        self, powers: Mapping[str, float], num_places: int, device, total: Callable[[Tensor], Tensor] = torch.clone
    ):
        """`powers`: by the name of a loss its P, 0 for no balance. `total`: a tensor to its sum over all processes."""
        self.powers = {name: power for name, power in powers.items() if power}
        self.num_places, self.total = num_places, total
        self.bins = torch.arange(BINS, device=device)
        shape = (len(self.powers), 2, BINS)  # of each loss its sums and its counts
        self.seen = torch.zeros(shape, device=device)
        self.new = torch.zeros(shape, device=device)  # of the optimizer step that is not over

    def weight(self, name: str, place: Tensor) -> Tensor | None:
        """Of the loss `name`, a weight for each sample at `place` (B,) int64: (B,) float32, from the steps before this
        one; None where it is not balanced."""
        if name not in self.powers:
            return None
        sums, counts = self.seen[list(self.powers).index(name)]
        ratio = (sums.sum() / counts.sum()) / (sums / counts)
        weight = ratio.nan_to_num(nan=1.0).pow(self.powers[name]).clamp(1 / LIMIT, LIMIT)  # nan: no error at all
        return torch.where(counts >= ENOUGH, weight, 1.0)[self._bin(place)]

    def add(self, place: Tensor, errors: Mapping[str, Tensor]) -> None:
        """Keep one micro-step: `place` (B,) int64, and by name of the loss its unweighted `errors` (B,), detached.
        Those that are not finite are left out, and so are losses that are not balanced."""
        for index, name in enumerate(self.powers):
            if name in errors:
                error_1B = errors[name].float().unsqueeze(0)
                counted_NB = (self._bin(place) == self.bins.unsqueeze(1)) & error_1B.isfinite()
                self.new[index, 0] += torch.where(counted_NB, error_1B, 0.0).sum(dim=1)
                self.new[index, 1] += counted_NB.sum(dim=1)

    def end_step(self) -> None:
        """Close an optimizer step, whether or not the weights moved in it; all processes together."""
        if self.powers:
            self.seen = DECAY * self.seen + self.total(self.new)
            self.new = torch.zeros_like(self.new)

    def state(self) -> dict:
        """Sums and counts by name, for a checkpoint; between optimizer steps there is nothing else."""
        return dict(zip(self.powers, self.seen.tolist(), strict=True))

    def load_state(self, state: dict, step: int) -> None:
        """Go on from `state`; a loss that it does not know begins anew."""
        for index, name in enumerate(self.powers):
            if name in state:
                self.seen[index] = torch.tensor(state[name])

    def _bin(self, place: Tensor) -> Tensor:
        return place * BINS // self.num_places
