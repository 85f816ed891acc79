# SPDX-License-Identifier: Apache-2.0
"""The process that a denoiser undoes: which noise a sample gets at which place, and what is to be predicted of it.

A place is an integer from 0, the cleanest, to `num_places` - 1, the noisiest; logs, bins and analyses speak of places.
What the denoiser is told, its time, is another thing in a flow, and the same in a diffusion.
"""

import inspect
from typing import NamedTuple

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from utils.backbones.loading import TEACHER, component_config
from utils.command_line import UsageError
from utils.randomness import StepRandom


class Noised(NamedTuple):
    """A noisy batch and what the task loss needs to know of it."""

    x_t: Tensor  # (B, C, *S)
    place: Tensor  # (B,) int64, 0 the cleanest
    time: Tensor  # (B,) what the denoiser is told: its timestep, int64, or a flow's, float32
    clean: Tensor  # (B, C, *S), x_0
    target: Tensor  # (B, C, *S), what the denoiser should predict: noise, velocity or x_0
    weight: Tensor | None  # (B,), the task loss's weight per sample; None is 1

    def weighted(self, weight: Tensor | None) -> "Noised":
        """The same with the task loss of every sample times `weight` (B,); None is 1."""
        if weight is None:
            return self
        return self._replace(weight=weight if self.weight is None else self.weight * weight)


# the first letters of a scheduler's name -> the process that it samples; none of these has betas
OTHER_PROCESSES = {
    "EDM": "EDM's process (Karras et al. 2022)",
    "FlowMatch": "flow matching",
    "Flow": "flow matching",
    "CMStochastic": "a consistency model's process",
    "ScoreSdeVe": "a variance exploding process",
    "KarrasVe": "a variance exploding process",
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def ddpm_scheduler(config: dict, said: str) -> DDPMScheduler:
    """The scheduler that adds noise as the one of this config, of whatever class, expects it.

    `DDPMScheduler.from_config` alone takes any config, and gives one that says nothing of betas DDPM's own.

    Raises:
        UsageError: its process is another, or cannot be told; `said` names the flag.
    """
    name = config.get("_class_name", "DDPMScheduler")
    kind, prediction = getattr(diffusers, name, None), config.get("prediction_type", "epsilon")
    absent = getattr(kind, "_backends", ())  # a stand-in for a class whose packages are not installed
    takes = dict(inspect.signature(kind.__init__).parameters) if kind and not absent else dict.fromkeys(config)
    process = next(
        (what for start, what in OTHER_PROCESSES.items() if name.startswith(start)), "a process without betas"
    )
    if kind is None:
        found = "which this diffusers does not have, so that its process is unknown"
    elif not {"beta_start", "beta_end", "beta_schedule"} <= takes.keys():
        found = f"which samples {process}"
    elif prediction not in PREDICTIONS:
        found = f"whose model predicts {prediction}"
    elif config.get("use_flow_sigmas"):
        found = "which samples flow matching (use_flow_sigmas)"
    elif config.get("timestep_type", "discrete") != "discrete":
        found = f"whose model is told {config['timestep_type']} times (timestep_type), as EDM's"
    elif "snr_shift_scale" in takes:
        found = "whose schedule is shifted (snr_shift_scale)"
    else:
        own = {key: p.default for key, p in takes.items() if p and key in Diffusion.schedule}  # not all are DDPM's
        try:
            scheduler = DDPMScheduler.from_config({**own, **config})
        except (NotImplementedError, ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"{said}: its scheduler's betas cannot be had of its config: {error}") from error
        if len(scheduler.betas) == scheduler.config.num_train_timesteps:
            return scheduler
        found = (
            f"with {len(scheduler.betas)} trained_betas for num_train_timesteps {scheduler.config.num_train_timesteps}"
        )
    raise UsageError(
        f"{said}: its scheduler is a {name}, {found}. Trained here is DDPM's process, of one beta a timestep, with "
        f"{', '.join(PREDICTIONS[:-1])} or {PREDICTIONS[-1]} predicted: choose a teacher and student of that."
    )


def _short(value) -> str:
    return f"{value[0]:g} ... {value[-1]:g}" if isinstance(value, list | tuple) else str(value)


class Diffusion:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4), sampled by DDIM (Song et al. 2021).

    Predicted is the noise, x_0, or v (Salimans and Ho 2022), as the teacher's scheduler says.
    """

    name = "DDIM, eta 0"  # the sampler, for logs, cards and analyses
    # what decides which noise a timestep has
    schedule = "num_train_timesteps trained_betas beta_start beta_end beta_schedule rescale_betas_zero_snr".split()

    def __init__(self, args, scheduler: DDPMScheduler, *, bounded: bool):
        """`scheduler` is kept private: `set_timesteps` never touches it, and its tables move to the data's device.
        `bounded`: whether clean data lie in [-1, 1], where the sampler may clip them, as pixels do and latents not."""
        self.scheduler, self.bounded = scheduler, bounded
        self.antithetic, self.snr_gamma = args.antithetic_timesteps, args.snr_gamma
        self.noise_offset, self.input_perturbation = args.noise_offset, args.input_perturbation

    @classmethod
    def load(cls, args, *, bounded: bool) -> "Diffusion":
        """The teacher's process, which a student must share; without a teacher, DDPM's own.

        Its pipeline's scheduler, DDIM or PNDM, only samples. A denoiser without a pipeline does not say what it was
        trained on, so that of a student cannot be compared.

        Raises:
            UsageError: the teacher has no scheduler or one of no such process, or the student's pipeline has another
                process than the teacher.
        """
        source, student = args.pretrained_model_name_or_path, args.student_model_name_or_path
        if not source:
            return cls(args, DDPMScheduler(), bounded=bounded)
        config = component_config(DDPMScheduler, "scheduler", source, TEACHER, args.revision)
        process = cls(args, ddpm_scheduler(config, f"{TEACHER} {source}"), bounded=bounded)
        if not student:
            return process
        try:
            theirs = component_config(DDPMScheduler, "scheduler", student, "--student_model_name_or_path")
        except ValueError:
            return process
        if differing := process.differs(ddpm_scheduler(theirs, f"--student_model_name_or_path {student}")):
            raise UsageError(
                f"--student_model_name_or_path {student}: its scheduler {differing[0]}; both must see the same noise "
                "and predict the same of it. Take a student and a teacher of one schedule."
            )
        return process

    def differs(self, scheduler: DDPMScheduler) -> list[str]:
        """In what the process of another scheduler is another, a phrase for each; betas are compared as the numbers
        that they come to, whichever way a config gives them."""
        theirs, ours = scheduler.config, self.scheduler.config
        differing = []
        if theirs.prediction_type != ours.prediction_type:
            differing.append(f"predicts {theirs.prediction_type}, the teacher's {ours.prediction_type}")
        betas, own = scheduler.alphas_cumprod, self.scheduler.alphas_cumprod.cpu()
        if len(betas) != len(own) or not torch.allclose(betas, own, rtol=1e-5, atol=1e-9):
            differing += [
                f"has {key} {_short(theirs[key])}, the teacher's {_short(ours[key])}"
                for key in self.schedule
                if theirs[key] != ours[key]
            ]
        return differing

    def looks_guided_already(self) -> bool:
        """Whether the teacher's scheduler is as those of models that were distilled to need no guidance (SD-Turbo,
        SDXL-Turbo): epsilon from the last timestep on, where an epsilon model without such a distillation starts one
        step before, and one of v_prediction may have a zero terminal SNR."""
        config = self.scheduler.config
        trailing = config.get("timestep_spacing") == "trailing" and not config.rescale_betas_zero_snr
        return trailing and config.prediction_type == "epsilon"

    @property
    def num_places(self) -> int:
        """How many there are: the timesteps of the schedule."""
        return self.scheduler.config.num_train_timesteps

    def draw(self, count: int, rng: StepRandom) -> Tensor:
        """(count,) int64 places, uniform over the schedule, or in antithetic pairs."""
        return rng.integers(self.num_places, count, antithetic=self.antithetic)

    def add_noise(self, clean: Tensor, rng: StepRandom) -> Noised:
        """Noise at random places, one a sample, with `--noise_offset` a little of it alike in a channel; with
        `--input_perturbation` (Ning et al. 2023) there is more of it in the input than the target says."""
        place = self.draw(clean.shape[0], rng)
        noise = rng.normal(clean.shape)
        if self.noise_offset:
            noise = noise + self.noise_offset * rng.normal((*clean.shape[:2], 1, 1))
        noised = self.noised(clean, noise, place)
        if self.input_perturbation:
            more = noise + self.input_perturbation * rng.normal(clean.shape)
            noised = noised._replace(x_t=self.scheduler.add_noise(clean, more, place))
        return noised

    def noised(self, clean: Tensor, noise: Tensor, place: Tensor) -> Noised:
        """x_t and target: `clean` and `noise` (B, C, *S), `place` (B,) int64."""
        x_t = self.scheduler.add_noise(clean, noise, place)
        kind, gamma = self.scheduler.config.prediction_type, self.snr_gamma
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.scheduler.get_velocity(clean, noise, place),
            "sample": lambda: clean,
        }[kind]()
        weight = None
        if gamma is not None:  # min-SNR (Hang et al. 2023), divided by what the target already carries
            snr = compute_snr(self.scheduler, place)
            weight = {
                "epsilon": lambda: (gamma / snr).clamp(max=1),  # 1 where the SNR is 0
                "v_prediction": lambda: snr.clamp(max=gamma) / (snr + 1),
                "sample": lambda: snr.clamp(max=gamma),
            }[kind]()
        return Noised(x_t, place, place, clean, target, weight)

    def sampler(self) -> DDIMScheduler:
        """A fresh one of the same process."""
        return DDIMScheduler.from_config(self.scheduler.config, **({} if self.bounded else {"clip_sample": False}))
