# SPDX-License-Identifier: Apache-2.0
"""What families of latent denoisers have in common: a frozen VAE, a cache, the teacher's other files kept."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor, nn

from utils.backbones.base import Backbone, Configs, vae_factor
from utils.backbones.encoders import Frozen
from utils.backbones.folder import Part, parts_to_copy
from utils.backbones.loading import TEACHER, component_config, pipeline_index
from utils.backbones.saving import save_student
from utils.backbones.weights import find_weights, stored_dtypes
from utils.command_line import UsageError
from utils.hub_folders import VAE, teacher_folder
from utils.randomness import StepRandom
from utils.students.lora import WEIGHTS, add_lora, fuse_saved_lora, save_lora, without_lora
from utils.students.sizes import full_config


class Latent(Backbone):
    """A denoiser of latents. A batch holds pixels and a condition's tensors, or what a cache made of them."""

    bounded = False
    image_channels = 3
    vae_dtype: torch.dtype | None = None  # where it may not be the teacher's
    vae_unread: ClassVar[Sequence[str]] = (
        "latents_mean",
        "latents_std",
    )  # of its config: would be left out in silence
    # of its config, which the stock pipeline computes with: what to do where one is none
    vae_numbers: ClassVar[Mapping[str, str]] = {"scaling_factor": "Fetch its config again"}
    flags = frozenset(
        "proportion_empty_prompts pretrained_vae_model_name_or_path validation_guidance_scale "
        "latent_cache_dir cache_variants".split()
    )

    def __init__(self, args, teacher: ModelMixin, configs: Configs):
        super().__init__(args, teacher, configs)
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
    def check(cls, args) -> Configs:
        """As `Backbone.check`; then the parts of the teacher that training loads and the export copies, each alone and
        beside its neighbours. They are fetched from the Hub here, where all that the configs say is found good.

        Raises:
            UsageError: naming the flag, what was found and what to do.
        """
        if not args.pretrained_model_name_or_path:
            raise UsageError(
                f"{TEACHER} is missing: VAE and text encoders of a {cls.model_class.__name__} come from it. A "
                "student that is trained on without a teacher may name its own folder there, with --lambda_kd_output "
                "0."
            )
        configs = super().check(args)
        cls.check_vae(args, configs)
        cls.check_parts(args, configs, cls.parts(args))
        return configs

    def guidance_scale(self) -> float:
        """Of samples: what the flag says, else the stock pipeline's own."""
        default = inspect.signature(self.pipeline_class.__call__).parameters["guidance_scale"].default
        given = self.args.validation_guidance_scale
        return default if given is None else given

    @classmethod
    def teacher_dtype(cls, args) -> torch.dtype:
        """That of its files: they stay mapped, once for all processes of a host (in another dtype each would hold a
        copy), and nothing is lost of what a student starts from."""
        folder = teacher_folder(args.pretrained_model_name_or_path, args.revision, args.variant) / cls.component
        try:
            weights = find_weights(folder, cls.model_class, args.variant, pickled=args.allow_pickle_weights)
        except ValueError:  # said when they are loaded
            return torch.float32
        dtypes = stored_dtypes(weights)
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @classmethod
    def parts(cls, args) -> dict[str, Part]:
        """What the export copies: all of the teacher's parts but the denoiser."""
        index = pipeline_index(args.pretrained_model_name_or_path, args.revision, TEACHER)
        return parts_to_copy(args, getattr(diffusers, index["_class_name"]), cls.component, cls.parts_loaded(index))

    @classmethod
    def parts_loaded(cls, index: dict) -> str:
        """The names of those that training loads; `index` is the pipeline's model_index.json."""
        return "vae"

    @classmethod
    def check_parts(cls, args, configs: Configs, parts: dict[str, Part]) -> None:
        """Refuse parts that do not fit each other."""

    @classmethod
    def check_vae(cls, args, configs: Configs) -> None:
        """Refuse a VAE of another kind, and one whose latents the denoiser does not know."""
        other = args.pretrained_vae_model_name_or_path
        said = f"{VAE} {other}" if other else f"{TEACHER} {args.pretrained_model_name_or_path}"
        vae, teacher = full_config(configs.vae, AutoencoderKL), full_config(configs.teacher, cls.model_class)
        if (found := configs.vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
            raise UsageError(f"{said}: the VAE is a {found}; latents here are an AutoencoderKL's.")
        if unread := [key for key in cls.vae_unread if vae.get(key)]:
            raise UsageError(
                f"{said}: the VAE's latents have {unread[0]} {vae[unread[0]]}, which is not scaling_factor alone, as "
                "the teachers here are trained on. Choose a teacher and VAE without it."
            )
        for key, hint in cls.vae_numbers.items():
            if not isinstance(vae[key], int | float):
                raise UsageError(f"{said}: the VAE's {key} is {vae[key]}, which is no number. {hint}.")
        if (colours := (vae["in_channels"], vae["out_channels"])) != (3, 3):
            raise UsageError(f"{said}: the VAE has {colours[0]} channels in and {colours[1]} out; images here have 3.")
        if vae["latent_channels"] != teacher["in_channels"]:
            raise UsageError(
                f"{said}: the VAE gives {vae['latent_channels']} latent_channels, the {cls.component} of {TEACHER} "
                f"takes in_channels {teacher['in_channels']}: it is for inpainting or editing, or of another VAE. "
                "Choose another teacher, with its own VAE."
            )

    @classmethod
    def vae_config(cls, args) -> dict:
        """Of the teacher's VAE, or of the one that stands in for it."""
        other = args.pretrained_vae_model_name_or_path
        if other:
            return component_config(AutoencoderKL, "vae", other, "--pretrained_vae_model_name_or_path")
        return component_config(AutoencoderKL, "vae", args.pretrained_model_name_or_path, TEACHER, args.revision)

    def given_student(self, args) -> ModelMixin:
        """As `Backbone.given_student`; adapters that lie beside one are added to its weights."""
        student = super().given_student(args)
        if args.student_model_name_or_path:
            flag = "--student_model_name_or_path"
            fuse_saved_lora(student, self.component, args.student_model_name_or_path, flag)
        return student

    def adapted(self, student: ModelMixin, table: str) -> str:
        """With `--lora_rank` give the student adapters, which alone train then; the table of what it is made of."""
        if not self.args.lora_rank:
            return table
        count = add_lora(student, self.args.lora_rank, self.args.seed)
        return f"{table}\ntrainable: {count:,} parameters of LoRA adapters of rank {self.args.lora_rank}"

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

    def adapters(self, folder: str) -> str:
        """LoRA's, which the pipeline does not load of itself."""
        if not self.args.lora_rank or self.args.fuse_lora:
            return ""
        return f'p.load_lora_weights({folder}, weight_name="{WEIGHTS}"); '

    def save(self, denoiser: ModelMixin, folder: Path) -> None:
        """The stock pipeline in `folder`: the denoiser's own files, everything else the teacher's, byte for byte."""
        plain = without_lora(denoiser, self.args.fuse_lora) if self.args.lora_rank else denoiser
        args = self.args
        teacher = teacher_folder(args.pretrained_model_name_or_path, args.revision, args.variant)
        save_student(plain, self.component, self.pipeline_class, self.parts(args), teacher, folder)
        if self.args.lora_rank and not self.args.fuse_lora:
            save_lora(denoiser, self.pipeline_class, self.component, folder)
