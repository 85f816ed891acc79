# SPDX-License-Identifier: Apache-2.0
"""Latent Stable Diffusion: `UNet2DConditionModel` teachers of versions 1.x, 2.x and XL.

Rombach et al. 2022; XL: Podell et al. 2023. A batch holds pixels and tokens, or what a cache made of them.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTokenizer

from utils.backbones.common import InFloat32, UNetBackbone
from utils.backbones.encoders import Encoders
from utils.backbones.loading import component_config, load_component, load_schedule, read_json_config
from utils.backbones.saving import save_student
from utils.backbones.types import Noised
from utils.data.transforms import CaptionedTransform
from utils.pixels import to_uint8
from utils.randomness import StepRandom
from utils.students import blocks
from utils.students.lora import add_lora, fuse_saved_lora, save_lora, without_lora
from utils.students.sizes import model_size, model_table

TEACHER = "--pretrained_model_name_or_path"


class StableDiffusion(UNetBackbone):
    """Denoises latents with a `UNet2DConditionModel`, told what to draw by a prompt."""

    component = "unet"

    def __init__(
        self, args, teacher: UNet2DConditionModel, scheduler: DDPMScheduler, vae_config: dict, resolution: int
    ):
        self.args, self.teacher, self.scheduler = args, teacher, scheduler
        self.resolution, self.vae_config = resolution, vae_config
        scale = args.validation_guidance_scale
        self.guidance_scale = 7.5 if scale is None else scale
        self.xl = teacher.config.addition_embed_type == "text_time"
        self.pipeline_class = diffusers.StableDiffusionXLPipeline if self.xl else diffusers.StableDiffusionPipeline
        self.latent_size = resolution // vae_factor(vae_config)
        self.scaling_factor = vae_config.get("scaling_factor", 0.18215)
        subfolders = ("tokenizer", "tokenizer_2") if self.xl else ("tokenizer",)
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(args.pretrained_model_name_or_path, subfolder=name, revision=args.revision)
            for name in subfolders
        ]
        self.encoders = Encoders(args, tokenizers=self.tokenizers, xl=self.xl)
        self.empty: dict[str, torch.Tensor] | None = None  # embeddings of the empty prompt, (1, ...), when known

    @classmethod
    def load(cls, args) -> "StableDiffusion":
        """The teacher in float32 on the CPU, eval mode, no gradients; the encoders only when they are needed.

        Raises:
            ValueError: see `check`.
        """
        vae_config, resolution = cls.check(args)
        scheduler = load_schedule(args)
        teacher = load_component(
            UNet2DConditionModel,
            args.pretrained_model_name_or_path,
            TEACHER,
            revision=args.revision,
            variant=args.variant,
            allow_pickle=args.allow_pickle_weights,
        )
        return cls(args, teacher.eval().requires_grad_(False), scheduler, vae_config, resolution)

    @classmethod
    def check(cls, args) -> tuple[dict, int]:
        """Refuse what can be refused from the configs alone, before any weights load; (VAE config, resolution).

        Raises:
            ValueError: naming the flag, what was found and what to do.
        """
        source, vae_source = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
        teacher = component_config(UNet2DConditionModel, source, TEACHER, args.revision)
        if args.pruning_ratio is not None:
            blocks.refuse_pruning_ratio(teacher)
        if args.student_preset:
            student = blocks.student_config(teacher, args.student_preset)
            flag = "--student_preset"
        elif args.student_config:
            flag, student = "--student_config", read_json_config(args.student_config, "--student_config")
        else:
            flag = "--student_model_name_or_path"
            student = component_config(UNet2DConditionModel, args.student_model_name_or_path, flag)
        if student.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
            raise ValueError(f"{flag}: the student is a {student['_class_name']}; this teacher is Stable Diffusion's.")
        same = "in_channels out_channels cross_attention_dim addition_embed_type projection_class_embeddings_input_dim"
        defaults = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280}
        for key in same.split():
            ours, theirs = (config.get(key, defaults.get(key)) for config in (student, teacher))
            if ours != theirs:
                raise ValueError(
                    f"{flag}: the student has {key} {ours}, the teacher {theirs}; both must see and predict the same."
                )
        try:
            with torch.device("meta"):
                UNet2DConditionModel.from_config(student)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{flag}: diffusers cannot build a UNet2DConditionModel of this: {error}") from error
        vae_config = component_config(
            AutoencoderKL,
            vae_source or source,
            "--pretrained_vae_model_name_or_path" if vae_source else TEACHER,
            None if vae_source else args.revision,
        )
        factor = vae_factor(vae_config)
        resolution = args.resolution or teacher.get("sample_size", 64) * factor
        for config, owner in ((teacher, "teacher"), (student, "student")):
            least = factor * 2 ** (len(config.get("block_out_channels", range(4))) - 1)
            if resolution % least:
                raise ValueError(
                    f"--resolution {resolution}: the VAE divides it by {factor} and the {owner}'s U-Net by "
                    f"{least // factor}, so it must be a multiple of {least}."
                )
        group_size, elements = getattr(args, "group_size", 2), (resolution // factor) ** 2
        if group_size > elements:
            raise ValueError(f"--group_size {group_size}: a channel of the latents has only {elements} elements.")
        return vae_config, resolution

    def transform(self, args) -> CaptionedTransform:
        """A picklable row -> uint8 pixels, tokens, and XL's time ids."""
        image = (args.image_column, 3, self.resolution, args.center_crop, args.random_flip)
        return CaptionedTransform(
            *image,
            caption_column=args.caption_column or "text",
            tokenizers=self.tokenizers,
            micro_conditioning=self.xl,
        )

    def make_student(self, args, batch: dict[str, torch.Tensor]) -> tuple[UNet2DConditionModel, str]:
        """The student in float32 and a table of what it is made of; with `--lora_rank` only its adapters train."""
        if args.student_model_name_or_path:
            flag = "--student_model_name_or_path"
            source, pickled = args.student_model_name_or_path, args.allow_pickle_weights
            student = load_component(UNet2DConditionModel, source, flag, allow_pickle=pickled)
            fuse_saved_lora(student, source, flag)
            table = model_table(*(model_size(m.config, UNet2DConditionModel) for m in (self.teacher, student)))
        else:
            config = args.student_preset or read_json_config(args.student_config, "--student_config")
            student, report = blocks.make_block_student(self.teacher, config, args.seed)
            table = report.table()
        if args.lora_rank:
            count = add_lora(student, args.lora_rank, args.seed)
            table += f"\ntrainable: {count:,} parameters of LoRA adapters of rank {args.lora_rank}"
        return student.train(), table

    def feature_pairs(self, student: UNet2DConditionModel) -> list[tuple[str, str]]:
        """(student block, teacher block): outputs of the matching down, mid and up blocks, as BK-SDM."""
        return blocks.feature_pairs(student, self.teacher)

    def example(self) -> dict:
        """Forward arguments of one sample, for the shapes of things."""
        config = self.teacher.config
        tokens, width = self.tokenizers[0].model_max_length, config.cross_attention_dim
        condition = {"encoder_hidden_states": torch.zeros(1, tokens, width)}
        if self.xl:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            condition["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        x_t = torch.zeros(1, config.in_channels, self.latent_size, self.latent_size)
        return {"x_t": x_t, "timestep": torch.zeros(1, dtype=torch.long), **condition}

    def cache_rows(
        self, batch: dict[str, torch.Tensor], parts: Sequence[str] = ("latents", "text")
    ) -> dict[str, torch.Tensor]:
        """What does not change from step to step: of `latents` the VAE's posterior and XL's time ids, of `text` the
        prompts' embeddings."""
        self._place_encoders()
        rows = {}
        if "latents" in parts:
            rows |= self.encoders.posterior(batch["pixels"].float() / 127.5 - 1)
            rows |= {"time_ids": batch["time_ids"]} if self.xl else {}
        if "text" in parts:
            rows |= self.encoders.text([batch[f"input_ids_{i}"] for i in range(len(self.tokenizers))])
        return rows

    def encode(self, batch: dict[str, torch.Tensor], rng: StepRandom) -> tuple[torch.Tensor, dict]:
        """Latents (B, 4, h, w), float32, scaled, drawn from the posterior; and the prompts, some of them emptied."""
        encoded = batch if "latent_mean" in batch else self.cache_rows(batch)
        mean, std = encoded["latent_mean"].float(), encoded["latent_std"].float()
        latents = (mean + std * rng.normal(mean.shape)) * self.scaling_factor
        share = 0.1 if self.args.proportion_empty_prompts is None else self.args.proportion_empty_prompts
        dropped = rng.uniform((mean.shape[0],)) < share
        text = {
            name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), value, encoded[name])
            for name, value in self.empty_prompt().items()
        }
        return latents, self._condition(text, encoded.get("time_ids"))

    def empty_prompt(self) -> dict[str, torch.Tensor]:
        """Embeddings of the empty prompt, (1, ...)."""
        if self.empty is None:
            self._place_encoders()
            self.empty = self.encoders.prompts([""])
        device = next(self.teacher.parameters()).device
        self.empty = {name: value.to(device) for name, value in self.empty.items()}  # it stays there: no copy a step
        return self.empty

    def _condition(self, text: dict[str, torch.Tensor], time_ids: torch.Tensor | None) -> dict:
        condition = {"encoder_hidden_states": text["prompt_embeds"].float()}
        if self.xl:
            condition["added_cond_kwargs"] = {"text_embeds": text["pooled"].float(), "time_ids": time_ids}
        return condition

    def _place_encoders(self) -> None:
        parameter = next(self.teacher.parameters())
        self.encoders.place(parameter.device, parameter.dtype)

    def free_encoders(self) -> None:
        """VAE and text encoders out of memory; sampling loads them again for a while."""
        self.encoders.free()

    def add_noise(self, clean: torch.Tensor, rng: StepRandom) -> Noised:
        """Noise at random timesteps, one per sample, with `--noise_offset` a little of it alike in a channel."""
        timestep = self.random_timesteps(clean.shape[0], rng)
        noise = rng.normal(clean.shape)
        if self.args.noise_offset:
            noise = noise + self.args.noise_offset * rng.normal((*clean.shape[:2], 1, 1))
        return self.noise_at(clean, noise, timestep)

    def conditions(self, dataset, first: int, count: int, num_prompts: int | None = None) -> list[str]:
        """The prompts of samples `first` and on: `--validation_prompts`, else captions of the data's first rows, over
        and over: of `num_prompts` rows, by default --validation_images."""
        rows = num_prompts or self.args.validation_images or count
        prompts = self.args.validation_prompts or dataset.captions(rows)
        return [prompts[i % len(prompts)] for i in range(first, first + count)]

    @torch.no_grad()
    def sample(
        self, denoiser: torch.nn.Module, seeds: Sequence[int], num_inference_steps: int, conditions: Sequence[str]
    ) -> torch.Tensor:
        """DDIM samples (eta 0), uint8 (B, 3, H, W) on the CPU; a sample depends on its seed, prompt and the model."""
        self._place_encoders()
        text = self.encoders.prompts(list(conditions))
        empty = self.encoders.prompts([""] * len(conditions))
        arguments = {"prompt_embeds": text["prompt_embeds"], "negative_prompt_embeds": empty["prompt_embeds"]}
        if self.xl:
            arguments |= {"pooled_prompt_embeds": text["pooled"], "negative_pooled_prompt_embeds": empty["pooled"]}
        absent = ("text_encoder_2", "tokenizer_2") if self.xl else ("safety_checker", "feature_extractor")
        pipeline = self.pipeline_class(
            vae=copy.deepcopy(self.encoders.vae).float(),
            unet=InFloat32(denoiser),
            scheduler=DDIMScheduler.from_config(self.scheduler.config, clip_sample=False),  # latents have no bounds
            **dict.fromkeys(("text_encoder", "tokenizer", *absent)),
            **({} if self.xl else {"requires_safety_checker": False}),
        )
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            **{name: value.float() for name, value in arguments.items()},
            height=self.resolution,
            width=self.resolution,
            num_inference_steps=num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        if self.args.cache_dir:
            self.free_encoders()
        return to_uint8(images)

    def save(self, denoiser: UNet2DConditionModel, folder: Path) -> None:
        """The stock pipeline in `folder`: the denoiser's own files, everything else the teacher's, byte for byte."""
        plain = without_lora(denoiser, self.args.fuse_lora) if self.args.lora_rank else denoiser
        save_student(self.args, plain, self.component, folder)
        if self.args.lora_rank and not self.args.fuse_lora:
            save_lora(denoiser, folder)


def vae_factor(vae_config: dict) -> int:
    """Pixels a side of one latent."""
    return 2 ** (len(vae_config.get("block_out_channels", (64,))) - 1)
