# SPDX-License-Identifier: Apache-2.0
"""DDPM's process (Ho et al. 2020): one beta a timestep, with the noise, x_0 or v predicted."""

import inspect

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from utils.backbones.process import Noised, Process
from utils.command_line import UsageError
from utils.randomness import StepRandom

# the first letters of a scheduler's name -> the process that it samples; none of these has betas
OTHER_PROCESSES = {
    "EDM": "EDM's process (Karras et al. 2022)",
    "FlowMatch": "flow matching",
    "Flow": "flow matching",
    "CMStochastic": "a consistency model's process",
    "ScoreSdeVe": "a variance exploding process",
    "KarrasVe": "a variance exploding process",
}
CONSISTENCY = ("LCMScheduler", "TCDScheduler")  # of consistency models in DDPM's process, which have guidance in them
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
        except (NotImplementedError, ValueError, TypeError, RuntimeError, IndexError) as error:
            raise UsageError(f"{said}: its scheduler's betas cannot be had of its config: {error}") from error
        count, spacing = scheduler.config.num_train_timesteps, config.get("timestep_spacing")
        ends_in_noise = prediction == "epsilon" and not scheduler.alphas_cumprod[-1] > 0
        if len(scheduler.betas) != count:
            found = f"with {len(scheduler.betas)} trained_betas for num_train_timesteps {count}"
        elif ends_in_noise and spacing in ("trailing", "linspace"):
            found = (
                f"which samples from noise alone on (rescale_betas_zero_snr, timestep_spacing {spacing}), where a "
                "prediction of the noise says nothing of the data"
            )
        else:
            return scheduler
    raise UsageError(
        f"{said}: its scheduler is a {name}, {found}. Trained here is DDPM's process, of one beta a timestep, with "
        f"{', '.join(PREDICTIONS[:-1])} or {PREDICTIONS[-1]} predicted: choose a teacher and student of that."
    )


def _short(value) -> str:
    return f"{value[0]:g} ... {value[-1]:g}" if isinstance(value, list | tuple) else str(value)


class Diffusion(Process):
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4), sampled by DDIM (Song et al. 2021).

    Predicted is the noise, x_0, or v (Salimans and Ho 2022), as the teacher's scheduler says.
    """

    name, scheduler_class, place_name = "DDIM, eta 0", DDPMScheduler, "timestep"
    flags = frozenset("snr_gamma antithetic_timesteps input_perturbation noise_offset".split())
    # what decides which noise a timestep has
    schedule = "num_train_timesteps trained_betas beta_start beta_end beta_schedule rescale_betas_zero_snr".split()

    def __init__(self, args, scheduler: DDPMScheduler, *, bounded: bool):
        """The scheduler's tables move to the data's device."""
        super().__init__(args, scheduler, bounded=bounded)
        self.antithetic, self.snr_gamma = args.antithetic_timesteps, args.snr_gamma
        self.noise_offset, self.input_perturbation = args.noise_offset, args.input_perturbation

    @classmethod
    def scheduler_of(cls, config: dict, said: str) -> DDPMScheduler:
        """See `ddpm_scheduler`."""
        return ddpm_scheduler(config, said)

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

    def guided_already(self) -> str | None:
        """By what the teacher's scheduler looks as those of models that were distilled to need no guidance, if it
        does: it samples consistency models, as LCM and TCD; or is as SD-Turbo's and SDXL-Turbo's, epsilon from the
        last timestep on, where an epsilon model without such a distillation starts one step before, and one of
        v_prediction may have a zero terminal SNR."""
        if found := [name for name in self.listed if name in CONSISTENCY]:
            return f"its scheduler is a {found[0]}, as consistency models' are"
        config = self.scheduler.config
        if config.get("timestep_spacing") != "trailing" or config.rescale_betas_zero_snr:
            return None
        if config.prediction_type != "epsilon":
            return None
        return "it predicts the noise, and its scheduler spaces timesteps from the last one on, as turbo models' do"

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
