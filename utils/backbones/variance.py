# SPDX-License-Identifier: Apache-2.0
"""The variance that a denoiser predicts beside its output, and what trains it (Nichol and Dhariwal 2021, section 3.1).

A value v between -1 and 1 says where the logarithm of the variance of p(x_{t-1} | x_t) lies between its two bounds:
that of the true posterior and beta_t. The loss is that part of the variational bound that belongs to t, in bits a
dimension. Its mean is only looked at: no gradient goes into what the denoiser says of the noise.
"""

import math

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from utils.backbones.process import Noised

BIN = 1 / 255  # half the width of one of 256 values in [-1, 1], which the likelihood at t = 0 is of


def no_bound(scheduler: DDPMScheduler) -> str | None:
    """Why the variance that a model of this schedule predicts has none of these bounds, if so."""
    if scheduler.config.variance_type == "learned":
        return "holds variances as they are (variance_type learned), and no places between two bounds (learned_range)"
    if not (scheduler.betas > 0).all():
        return "has a timestep that adds no noise (a beta of 0), and so no variance"
    if len(scheduler.betas) < 2:
        return "has a single timestep, whose posterior has no variance"
    if scheduler.config.prediction_type == "epsilon" and not scheduler.alphas_cumprod[-1] > 0:
        return "ends in noise alone (rescale_betas_zero_snr), where a prediction of the noise says nothing of the data"
    return None


class LearnedVariance:
    """For the betas of one `scheduler`, of which `no_bound` finds nothing."""

    def __init__(self, scheduler: DDPMScheduler):
        self.prediction_type = scheduler.config.prediction_type
        kept = scheduler.alphas_cumprod.double().cpu()
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        beta = 1 - kept / before
        posterior = beta * (1 - before) / (1 - kept)
        posterior[0] = posterior[1]  # it is 0, which has no logarithm
        tables = {
            "signal": kept.sqrt(),
            "noise": (1 - kept).sqrt(),
            "least": posterior.log(),
            "most": beta.log(),
            "of_clean": beta * before.sqrt() / (1 - kept),
            "of_x_t": (1 - before) * (kept / before).sqrt() / (1 - kept),
        }
        self.tables = {name: table.float() for name, table in tables.items()}

    def bound(self, output: Tensor, variance: Tensor, noised: Noised) -> Tensor:
        """Towards the data: KL(q(x_{t-1} | x_t, x_0) || p), at t = 0 -log p(x_0); a scalar. `output` and `variance`
        (B, C, *S) as the denoiser gives them."""
        of = self._at(noised)
        output = output.detach()
        clean = {
            "epsilon": lambda: (noised.x_t - of["noise"] * output) / of["signal"],
            "v_prediction": lambda: of["signal"] * noised.x_t - of["noise"] * output,
            "sample": lambda: output,
        }[self.prediction_type]()
        mean, log_variance = self._mean(clean, noised, of), self._log_variance(variance, of)
        divergence = kl(self._mean(noised.clean, noised, of), of["least"], mean, log_variance)
        at_zero = -log_likelihood(noised.clean, mean, log_variance)
        is_zero = (noised.place == 0).reshape(-1, *[1] * (output.ndim - 1))
        return torch.where(is_zero, at_zero, divergence).mean() / math.log(2)

    def distance(self, student: Tensor, teacher: Tensor, noised: Noised) -> Tensor:
        """Towards the teacher: KL of two Gaussians of one mean, the teacher's variance and the student's; a scalar."""
        of = self._at(noised)
        theirs, ours = (self._log_variance(variance, of) for variance in (teacher.detach(), student))
        return kl(0.0, theirs, 0.0, ours).mean() / math.log(2)

    def _at(self, noised: Noised) -> dict[str, Tensor]:
        """Of every table the values of a batch, (B, 1, ...)."""
        device, shape = noised.x_t.device, (-1, *[1] * (noised.x_t.ndim - 1))
        if self.tables["least"].device != device:
            self.tables = {name: table.to(device) for name, table in self.tables.items()}
        return {name: table[noised.place].reshape(shape) for name, table in self.tables.items()}

    def _mean(self, clean: Tensor, noised: Noised, of: dict[str, Tensor]) -> Tensor:
        return of["of_clean"] * clean + of["of_x_t"] * noised.x_t

    def _log_variance(self, variance: Tensor, of: dict[str, Tensor]) -> Tensor:
        share = (variance + 1) / 2
        return share * of["most"] + (1 - share) * of["least"]


def kl(mean, log_variance, other_mean, other_log_variance) -> Tensor:
    """KL of two Gaussians, element by element, in nats."""
    apart = (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + torch.exp(log_variance - other_log_variance) + apart - 1)


def log_likelihood(clean: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Logarithm of the probability that a Gaussian gives the bin around `clean`, element by element; the bins at the
    ends, -1 and 1, are open. As DiT's own code takes it, of latents too."""
    inverse = torch.exp(-0.5 * log_variance)
    upper, lower = ((clean - mean + side) * inverse for side in (BIN, -BIN))
    below_upper, below_lower = (torch.special.ndtr(edge) for edge in (upper, lower))
    inside = (below_upper - below_lower).clamp(min=1e-12).log()
    first, last = below_upper.clamp(min=1e-12).log(), (1 - below_lower).clamp(min=1e-12).log()
    return torch.where(clean < -0.999, first, torch.where(clean > 0.999, last, inside))
