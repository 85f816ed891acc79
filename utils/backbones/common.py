# SPDX-License-Identifier: Apache-2.0
"""What the backbones with a diffusion scheduler and a U-Net share."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.training_utils import compute_snr

from utils.backbones.types import Noised, Prediction
from utils.devices import to_dtype
from utils.distillation.features import Tapped
from utils.randomness import StepRandom


class UNetBackbone:
    """What is the same for every U-Net with a diffusion scheduler. `args` and `scheduler` are the subclass's."""

    guidance_scale: float | None = None  # of `sample`; None: there is no guidance
    vae_config: dict | None = None  # of what turns latents into images, where the denoiser works on latents

    def noise_at(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> Noised:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4) and the target of the scheduler's
        prediction type. `clean` and `noise` (B, C, H, W), `timestep` (B,): 0 the cleanest, T - 1 the noisiest."""
        x_t = self.scheduler.add_noise(clean, noise, timestep)
        kind, gamma = self.scheduler.config.prediction_type, self.args.snr_gamma
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.scheduler.get_velocity(clean, noise, timestep),
            "sample": lambda: clean,
        }[kind]()
        weight = None
        if gamma is not None:  # min-SNR (Hang et al. 2023), divided by what the target already carries
            snr = compute_snr(self.scheduler, timestep)
            weight = {
                "epsilon": lambda: (gamma / snr).clamp(max=1),  # 1 where the SNR is 0
                "v_prediction": lambda: snr.clamp(max=gamma) / (snr + 1),
                "sample": lambda: snr.clamp(max=gamma),
            }[kind]()
        return Noised(x_t, timestep, clean, target, weight)

    def random_timesteps(self, batch_size: int, rng: StepRandom) -> torch.Tensor:
        """(B,) int64, uniform over the schedule, or in antithetic pairs."""
        count = self.scheduler.config.num_train_timesteps
        return rng.integers(count, batch_size, antithetic=self.args.antithetic_timesteps)

    def predict(self, model: Tapped, noised: Noised, condition: dict) -> Prediction:
        """The model's prediction in float32; input and condition are cast to the dtype the weights are in."""
        output, features = model(noised.x_t, noised.timestep, **condition)
        return Prediction(output.float(), features)

    def task_loss(self, prediction: Prediction, noised: Noised) -> torch.Tensor:
        """Mean squared error to the target, weighted per sample by `--snr_gamma`."""
        if noised.weight is None:
            return F.mse_loss(prediction.output, noised.target)
        error = (prediction.output - noised.target).square().flatten(1).mean(dim=1)
        return (noised.weight * error).mean()


class InFloat32(torch.nn.Module):
    """A denoiser that takes and gives float32 whatever its weights are in, so that sampling starts from the same noise
    for every dtype and the sampler's sums keep their precision."""

    dtype = torch.float32

    def __init__(self, denoiser: ModelMixin):
        super().__init__()
        self.denoiser, self.config, self.device = denoiser, denoiser.config, denoiser.device

    def __getattr__(self, name: str):  # pipelines look at their denoiser's parts
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    def forward(
        self, x_t: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True, **condition
    ) -> UNet2DOutput:
        """As the denoiser's own forward; what it returns can be read by name and by index."""
        dtype = next(self.denoiser.parameters()).dtype
        output = self.denoiser(x_t.to(dtype), timestep, return_dict=False, **to_dtype(condition, dtype))[0]
        return UNet2DOutput(output.float())
