# SPDX-License-Identifier: Apache-2.0
"""Latent Stable Diffusion: `UNet2DConditionModel` teachers of versions 1.x, 2.x and XL.

Rombach et al. 2022; XL: Podell et al. 2023.
"""

import logging

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from utils.backbones.base import Configs
from utils.backbones.clip_prompts import ClipPrompts, check_text
from utils.backbones.folder import Part
from utils.backbones.latent import Latent
from utils.backbones.loading import TEACHER, pipeline_class_name, read_json_config
from utils.command_line import UsageError
from utils.students import blocks
from utils.students.sizes import full_config, model_size, model_table, set_dropout

logger = logging.getLogger(__name__)

XL = "StableDiffusionXLPipeline"
# a U-Net's config key -> what the pipelines here can honour, and what it is told otherwise
TOLD_BY_OTHERS = {
    "time_cond_proj_dim": ((None,), "the guidance scale, as distilled consistency models are"),
    "encoder_hid_dim_type": ((None, "text_proj"), "an image"),
    "addition_embed_type": ((None, "text_time"), "more of a text or image"),
}


class StableDiffusion(Latent):
    """Denoises latents with a `UNet2DConditionModel`, told what to draw by a prompt."""

    component, model_class = "unet", UNet2DConditionModel
    must_match = (
        "in_channels out_channels cross_attention_dim addition_embed_type projection_class_embeddings_input_dim"
    ).split()
    flags = Latent.flags | {"student_preset", "caption_column", "validation_prompts", "lora_rank", "fuse_lora"}
    told = "teachers and students here are told a prompt alone"
    vae_unread = (*Latent.vae_unread, "shift_factor")
    instead = {
        name: f"a Stable Diffusion U-Net is {how}. Give --student_preset "
        f"({', '.join(blocks.PRESETS)}) or --student_config"
        for name, how in {
            "pruning_ratio": "shortened, not narrowed",
            "student_depth": "shortened by whole blocks, and has no one depth",
            "kept_layers": "shortened by whole blocks, and has no one row of layers",
        }.items()
    }

    def __init__(self, args, teacher: UNet2DConditionModel, configs: Configs):
        self.xl = teacher.config.addition_embed_type == "text_time"
        self.vae_dtype = torch.float32 if self.xl else None  # XL's own overflows in half precision
        self.pipeline_class = diffusers.StableDiffusionXLPipeline if self.xl else diffusers.StableDiffusionPipeline
        super().__init__(args, teacher, configs)
        self.conditions = ClipPrompts(args, teacher.config, self.place)
        side = configs.resolution
        self.sampling_options = {"guidance_scale": self.guidance_scale(), "height": side, "width": side}

    def guidance_scale(self) -> float:
        """Of samples: what the flag says, else the stock pipeline's own; none for a teacher as the distilled ones."""
        if self.args.validation_guidance_scale is None and (why := self.process.guided_already()):
            flag = getattr(self.args, "called", {}).get("validation_guidance_scale", "validation_guidance_scale")
            logger.warning(
                f"The teacher was perhaps distilled to need no guidance: {why}. Samples are drawn without it; "
                f"--{flag} gives them some."
            )
            return 0.0
        return super().guidance_scale()

    @classmethod
    def parts_loaded(cls, index: dict) -> str:
        """The names of the parts that training loads."""
        second = " text_encoder_2 tokenizer_2" if index["_class_name"] == XL else ""
        return f"vae text_encoder tokenizer{second}"

    @classmethod
    def check_denoiser(cls, config: dict, flag: str) -> None:
        """Classes, and what else only other pipelines tell a U-Net."""
        super().check_denoiser(config, flag)
        for key, (known, what) in TOLD_BY_OTHERS.items():
            if config[key] not in known:
                raise UsageError(
                    f"{flag}: the U-Net is told {what} ({key} is {config[key]}); {cls.told}. Choose another one."
                )
        if config["in_channels"] != config["out_channels"]:
            raise UsageError(
                f"{flag}: the U-Net has in_channels {config['in_channels']} and out_channels "
                f"{config['out_channels']}; here it sees noisy latents alone (no inpainting, no editing) and "
                "predicts no variance. Choose another one."
            )

    @classmethod
    def check_more(cls, args, teacher: dict, student: dict, flag: str) -> None:
        """A U-Net that is not its pipeline's."""
        name = pipeline_class_name(args.pretrained_model_name_or_path, args.revision, TEACHER)
        if (name == XL) != (teacher["addition_embed_type"] == "text_time"):
            raise UsageError(
                f"{TEACHER} {args.pretrained_model_name_or_path} is a {name}, but the addition_embed_type of its "
                f"U-Net is {teacher['addition_embed_type']}: XL's is text_time, that of the others None."
            )

    @classmethod
    def check_parts(cls, args, configs: Configs, parts: dict[str, Part]) -> None:
        """The text encoders beside their tokenizers, and both beside the U-Net."""
        unet = full_config(configs.teacher, UNet2DConditionModel)
        check_text(unet, parts, f"{TEACHER} {args.pretrained_model_name_or_path}")

    @classmethod
    def student_config(cls, args, teacher: dict) -> tuple[str, dict]:
        """(the flag that says what the student is, its config)."""
        if args.student_preset:
            return "--student_preset", blocks.student_config(teacher, args.student_preset)
        return super().student_config(args, teacher)

    def make_student(self, args, batch: dict[str, Tensor]) -> tuple[UNet2DConditionModel, str]:
        """The student in float32 and a table of what it is made of; with `--lora_rank` only its adapters train."""
        if args.student_model_name_or_path:
            student = self.given_student(args)
            table = model_table(*(model_size(m.config, self.model_class) for m in (self.teacher, student)))
        else:
            config = args.student_preset or read_json_config(args.student_config, "--student_config")
            student, report = blocks.make_block_student(self.teacher, config, args.seed)
            table = report.table()
        set_dropout(student, args.dropout)
        table = self.adapted(student, table)
        return student.train(), table

    def feature_pairs(self, student: UNet2DConditionModel) -> list[tuple[str, str]]:
        """(student block, teacher block): outputs of the matching down, mid and up blocks, as BK-SDM."""
        return blocks.feature_pairs(student, self.teacher)

    def sampling_pipeline(self, denoiser: nn.Module) -> DiffusionPipeline:
        """Without text encoders: the prompts come as embeddings."""
        absent = ("text_encoder_2", "tokenizer_2") if self.xl else ("safety_checker", "feature_extractor")
        return self.pipeline_class(
            vae=self.decoder(),
            unet=denoiser,
            scheduler=self.process.sampler(),
            **dict.fromkeys(("text_encoder", "tokenizer", *absent)),
            **({} if self.xl else {"requires_safety_checker": False}),
        )
