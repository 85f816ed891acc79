# SPDX-License-Identifier: Apache-2.0
"""What families of latent denoisers have in common: a frozen VAE, a cache, the teacher's other files kept."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor, nn

from utils.backbones.base import Backbone, Configs, vae_factor
from utils.backbones.encoders import Frozen
from utils.backbones.loading import TEACHER, component_config
from utils.backbones.process import Diffusion
from utils.backbones.saving import save_student
from utils.randomness import StepRandom
from utils.students.lora import save_lora, without_lora


class Latent(Backbone):
    """A denoiser of latents. A batch holds pixels and a condition's tensors, or what a cache made of them."""

    bounded = False
    image_channels = 3
    vae_dtype: torch.dtype | None = None  # where it may not be the teacher's
    flags = frozenset(
        "caption_column proportion_empty_prompts noise_offset pretrained_vae_model_name_or_path validation_prompts "
        "validation_guidance_scale latent_cache_dir cache_variants lora_rank fuse_lora".split()
    )

    def __init__(self, args, teacher: ModelMixin, process: Diffusion, configs: Configs):
        super().__init__(args, teacher, process, configs)
        self.latent_size = configs.resolution // vae_factor(configs.vae)
        self.scaling_factor = configs.vae.get("scaling_factor", 0.18215)
        self.shift_factor = configs.vae.get("shift_factor") or 0.0
        other = args.pretrained_vae_model_name_or_path
        self.vae = Frozen(
            AutoencoderKL,
            args,
            self.place,
            subfolder="vae",
            argument="pretrained_vae_model_name_or_path" if other else "pretrained_model_name_or_path",
            dtype=None if other else self.vae_dtype,
        )

    @classmethod
    def vae_config(cls, args) -> dict:
        """Of the teacher's VAE, or of the one that stands in for it."""
        other = args.pretrained_vae_model_name_or_path
        if other:
            return component_config(AutoencoderKL, "vae", other, "--pretrained_vae_model_name_or_path")
        return component_config(AutoencoderKL, "vae", args.pretrained_model_name_or_path, TEACHER, args.revision)

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where the teacher is now: there the encoders run."""
        parameter = next(self.teacher.parameters())
        return parameter.device, parameter.dtype

    def cache_rows(self, batch: dict[str, Tensor], parts: Sequence[str] = ("latents", "text")) -> dict[str, Tensor]:
        """What does not change from step to step: of `latents` the VAE's posterior and what the condition keeps beside
        an image, of `text` the prompts' embeddings."""
        rows = {}
        if "latents" in parts:
            rows |= self.posterior(batch["pixels"].float() / 127.5 - 1) | self.conditions.kept(batch)
        if "text" in parts:
            rows |= self.conditions.embed(batch)
        return rows

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> dict[str, Tensor]:
        """Float pixels in [-1, 1] (B, 3, H, W) -> `latent_mean` and `latent_std` (B, C, h, w), not yet scaled."""
        vae, (device, dtype) = self.vae(), self.place()
        with torch.autocast(device.type, enabled=False):
            posterior = vae.encode(pixels.to(device, vae.dtype)).latent_dist
        return {"latent_mean": posterior.mean.to(dtype), "latent_std": posterior.std.to(dtype)}

    def encode(self, batch: dict[str, Tensor], rng: StepRandom) -> tuple[Tensor, dict[str, Any]]:
        """Latents (B, C, h, w), float32, scaled, drawn from the posterior; and the condition, some of it dropped."""
        rows = batch if "latent_mean" in batch else self.cache_rows(batch)
        mean, std = rows["latent_mean"].float(), rows["latent_std"].float()
        latents = mean + std * rng.normal(mean.shape)
        return (latents - self.shift_factor) * self.scaling_factor, self.conditions.drop(rows, rng)

    def example(self) -> dict[str, Any]:
        """Forward arguments of one sample, for the shapes of things."""
        x_t = torch.zeros(1, self.teacher.config.in_channels, self.latent_size, self.latent_size)
        return {"x_t": x_t, "timestep": torch.zeros(1, dtype=torch.long), **self.conditions.example()}

    def decoder(self) -> AutoencoderKL:
        """The VAE in float32, as pictures are decoded whatever dtype training encodes in, and image by image: at
        1024 pixels a side each takes gigabytes."""
        vae = self.vae()
        vae = copy.copy(vae) if vae.dtype == torch.float32 else copy.deepcopy(vae).float()
        vae.enable_slicing()
        return vae

    def sample(
        self, denoiser: nn.Module, seeds: Sequence[int], num_inference_steps: int, conditions: Sequence
    ) -> Tensor:
        """As `Backbone.sample`; with a cache, encoders do not stay."""
        images = super().sample(denoiser, seeds, num_inference_steps, conditions)
        if self.args.latent_cache_dir:
            self.free_encoders()
        return images

    def free_encoders(self) -> None:
        """VAE and text encoders out of memory; they load again when they are needed again."""
        self.vae.free()
        self.conditions.free()

    def save(self, denoiser: ModelMixin, folder: Path) -> None:
        """The stock pipeline in `folder`: the denoiser's own files, everything else the teacher's, byte for byte."""
        plain = without_lora(denoiser, self.args.fuse_lora) if self.args.lora_rank else denoiser
        save_student(self.args, plain, self.component, folder)
        if self.args.lora_rank and not self.args.fuse_lora:
            save_lora(denoiser, self.pipeline_class, self.component, folder)
