# SPDX-License-Identifier: Apache-2.0
"""Flow matching on a straight path from data to noise, as Stable Diffusion 3 is trained (Esser et al. 2024).

    x_t = (1 - s) x_0 + s noise        predicted is the velocity, noise - x_0

The sigmas s of a schedule fall from 1, and the denoiser is told s * T, a float. A place counts from the other end, as
everywhere here: 0 has the smallest sigma.
"""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from utils.backbones.process import Noised, Process
from utils.command_line import UsageError
from utils.randomness import StepRandom

LOGIT_MEAN, LOGIT_STD, MODE_SCALE = 0.0, 1.0, 1.29  # unless the flags say otherwise, as in diffusers
SAMPLERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")  # of one process, sigma by sigma


def flow_scheduler(config: dict, said: str) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler whose sigmas and times a model of this scheduler's config was trained on.

    Raises:
        UsageError: its process is another, or its sigmas are not the same for all images; `said` names the flag.
    """
    name = config.get("_class_name", SAMPLERS[0])
    if name not in SAMPLERS:
        found = "of another process, or of one that is sampled in another way than its models are trained"
    elif config.get("use_dynamic_shifting"):
        found = "whose shift follows an image's size (use_dynamic_shifting)"
    elif config.get("invert_sigmas"):
        found = "whose sigmas are inverted (invert_sigmas)"
    else:
        try:
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        except (ValueError, TypeError, IndexError, ZeroDivisionError, ImportError) as error:
            raise UsageError(f"{said}: its scheduler's sigmas cannot be had of its config: {error}") from error
        sigmas = scheduler.sigmas
        if sigmas[0] == 1 and sigmas[-1] > 0 and (sigmas.diff() < 0).all():
            return scheduler
        found = f"with shift {config.get('shift')}, whose sigmas do not fall from 1 towards 0"
    raise UsageError(
        f"{said}: its scheduler is a {name}, {found}. Trained here is flow matching of one fixed shift, as a "
        f"{' or '.join(SAMPLERS)} samples it: choose a teacher and student of that."
    )


class Flow(Process):
    """Sampled by Euler's steps. `--weighting_scheme` says where training looks, or how much the task loss weighs
    there, in the words and numbers of diffusers' own scripts."""

    flags = frozenset("weighting_scheme logit_mean logit_std mode_scale".split())
    instead = {
        "snr_gamma": "a flow's loss is weighted by --weighting_scheme",
        "antithetic_timesteps": "--weighting_scheme says how its times are drawn. Leave it out",
        "input_perturbation": "it has no such form for a flow. Leave it out",
        "noise_offset": "a flow starts from pure noise, which it was trained on. Leave it out",
    }
    scheduler_class, place_name = FlowMatchEulerDiscreteScheduler, "place"  # its times are other numbers

    def __init__(self, args, scheduler: FlowMatchEulerDiscreteScheduler, *, bounded: bool):
        super().__init__(args, scheduler, bounded=bounded)
        # by place; the scheduler's own stay on the CPU, in falling order
        self.sigmas, self.times = scheduler.sigmas.flip(0), scheduler.timesteps.flip(0)
        self.scheme = args.weighting_scheme or "logit_normal"
        self.logit_mean = LOGIT_MEAN if args.logit_mean is None else args.logit_mean
        self.logit_std = LOGIT_STD if args.logit_std is None else args.logit_std
        self.mode_scale = MODE_SCALE if args.mode_scale is None else args.mode_scale

    @classmethod
    def scheduler_of(cls, config: dict, said: str) -> FlowMatchEulerDiscreteScheduler:
        """See `flow_scheduler`."""
        return flow_scheduler(config, said)

    @property
    def name(self) -> str:
        """The sampler."""
        return f"Euler, shift {self.scheduler.config.shift:g}"

    def differs(self, scheduler: FlowMatchEulerDiscreteScheduler) -> list[str]:
        """In what the sigmas of another scheduler are others."""
        theirs, ours = scheduler.sigmas, self.sigmas.cpu().flip(0)
        if theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-5, atol=0):
            return []
        return [
            f"has {key} {scheduler.config[key]:g}, the teacher's {self.scheduler.config[key]:g}"
            for key in ("num_train_timesteps", "shift")
            if scheduler.config[key] != self.scheduler.config[key]
        ]

    def draw(self, count: int, rng: StepRandom) -> Tensor:
        """(count,) int64 places, by the scheme's density: diffusers draws a share u of the falling schedule."""
        if self.scheme == "logit_normal":
            share = torch.sigmoid(rng.normal((count,)) * self.logit_std + self.logit_mean)
        else:
            share = rng.uniform((count,))
        if self.scheme == "mode":
            share = 1 - share - self.mode_scale * (torch.cos(math.pi * share / 2) ** 2 - 1 + share)
        last = self.num_places - 1
        return last - (share * self.num_places).long().clamp(0, last)  # in float32 a share may be 1

    def noised(self, clean: Tensor, noise: Tensor, place: Tensor) -> Noised:
        """x_t and target: `clean` and `noise` (B, C, *S), `place` (B,) int64; the time is float32."""
        if self.sigmas.device != clean.device:
            self.sigmas, self.times = self.sigmas.to(clean.device), self.times.to(clean.device)
        sigma = self.sigmas[place]
        s = sigma.reshape(-1, *[1] * (clean.ndim - 1))
        weight = None
        if self.scheme == "sigma_sqrt":
            weight = sigma**-2.0
        elif self.scheme == "cosmap":
            weight = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return Noised((1 - s) * clean + s * noise, place, self.times[place], clean, noise - clean, weight)

    def sampler(self) -> FlowMatchEulerDiscreteScheduler:
        """A fresh one, by Euler's deterministic steps."""
        return FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config, stochastic_sampling=False)
