# SPDX-License-Identifier: Apache-2.0
"""What the backbones with a diffusion scheduler and a U-Net share."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.training_utils import compute_snr

from utils.backbones.types import Noised, Prediction, to_dtype


def noise_at(
    scheduler: DDPMScheduler,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
    snr_gamma: float | None = None,
) -> Noised:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4) and the target of the scheduler's prediction
    type. `clean` and `noise` (B, C, H, W), `timestep` (B,), 0 the cleanest. `snr_gamma`: min-SNR weights (Hang et al.
    2023), divided by what the target already carries."""
    x_t = scheduler.add_noise(clean, noise, timestep)
    kind = scheduler.config.prediction_type
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(clean, noise, timestep),
        "sample": lambda: clean,
    }[kind]()
    weight = None
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timestep)
        weight = {
            "epsilon": lambda: (snr_gamma / snr).clamp(max=1),  # 1 where the SNR is 0
            "v_prediction": lambda: snr.clamp(max=snr_gamma) / (snr + 1),
            "sample": lambda: snr.clamp(max=snr_gamma),
        }[kind]()
    return Noised(x_t, timestep, clean, target, weight)


def weighted_mse(prediction: Prediction, noised: Noised) -> torch.Tensor:
    """Mean squared error to the target, weighted per sample: a scalar."""
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
