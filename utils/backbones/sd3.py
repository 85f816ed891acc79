# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: latent transformers of text and image together, `SD3Transformer2DModel` teachers, which
flow matching trains (MMDiT, Esser et al. 2024)."""

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

from utils.backbones.base import Configs, vae_factor
from utils.backbones.clip_prompts import tokenizer_of
from utils.backbones.flow import Flow
from utils.backbones.folder import Part
from utils.backbones.loading import TEACHER
from utils.backbones.sd3_prompts import CLIPS, LENGTHS, T5, Sd3Prompts, check_text, has_t5
from utils.backbones.transformer import Transformer
from utils.command_line import UsageError
from utils.students.sizes import full_config


class SD3(Transformer):
    """Denoises latents with an `SD3Transformer2DModel`, told what to draw by a prompt."""

    model_class, pipeline_class, process_class = SD3Transformer2DModel, StableDiffusion3Pipeline, Flow
    must_match = "in_channels out_channels joint_attention_dim pooled_projection_dim".split()
    told = "teachers and students here are told a prompt alone"
    flags = Transformer.flags | {
        *("caption_column", "validation_prompts", "max_sequence_length"),
        *("lora_rank", "fuse_lora"),
    }
    vae_dtype = torch.float32  # as diffusers' own training of it encodes
    vae_numbers = Transformer.vae_numbers | {
        "shift_factor": "Write 0.0 into its config.json where it has none, or choose another"
    }
    last_stays = True  # the last layer alone gives no text

    def __init__(self, args, teacher: SD3Transformer2DModel, configs: Configs):
        super().__init__(args, teacher, configs)
        self.conditions = Sd3Prompts(args, teacher.config, self.place)
        side = configs.resolution
        self.sampling_options = {"guidance_scale": self.guidance_scale(), "height": side, "width": side}

    @classmethod
    def parts_loaded(cls, index: dict) -> str:
        """The names of the parts that training loads: T5 only where the pipeline has it."""
        texts = [*CLIPS, *([T5] if has_t5(index) else [])]
        return " ".join(["vae", *texts, *map(tokenizer_of, texts)])

    @classmethod
    def check_denoiser(cls, config: dict, flag: str) -> None:
        """What sees more than noisy latents."""
        super().check_denoiser(config, flag)
        if config["out_channels"] not in (None, config["in_channels"]):
            raise UsageError(
                f"{flag}: the transformer has in_channels {config['in_channels']} and out_channels "
                f"{config['out_channels']}; here it sees noisy latents alone. Choose another one."
            )

    @classmethod
    def check_more(cls, args, teacher: dict, student: dict, flag: str) -> None:
        """More places than the table of positions has, more tokens than the stock pipeline takes, and dropout."""
        factor = vae_factor(cls.vae_config(args))
        resolution = args.resolution or cls.own_resolution(teacher, factor)
        for config in (teacher, student):
            tokens = config["pos_embed_max_size"]  # null where positions are computed for any size
            most = tokens and tokens * config["patch_size"] * factor
            if isinstance(resolution, int) and most and resolution > most:
                raise UsageError(
                    f"--resolution {resolution}: the table of positions ends at {most} pixels a side "
                    "(pos_embed_max_size). Give less."
                )
        if (args.max_sequence_length or 0) > LENGTHS[1]:
            raise UsageError(
                f"--max_sequence_length {args.max_sequence_length}: the stock pipeline takes up to {LENGTHS[1]}."
            )
        if args.dropout is not None:
            raise UsageError(f"--dropout {args.dropout}: a {cls.model_class.__name__} has none. Leave it out.")

    @classmethod
    def check_parts(cls, args, configs: Configs, parts: dict[str, Part]) -> None:
        """The text encoders beside their tokenizers, and all beside the transformer."""
        transformer = full_config(configs.teacher, cls.model_class)
        check_text(transformer, parts, f"{TEACHER} {args.pretrained_model_name_or_path}")

    def sampling_pipeline(self, denoiser: nn.Module) -> DiffusionPipeline:
        """Without text encoders: the prompts come as embeddings."""
        texts = (*CLIPS, T5)
        return self.pipeline_class(
            vae=self.decoder(),
            transformer=denoiser,
            scheduler=self.process.sampler(),
            **dict.fromkeys((*texts, *map(tokenizer_of, texts))),
        )
