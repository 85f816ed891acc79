# SPDX-License-Identifier: Apache-2.0
"""Latent Stable Diffusion: `UNet2DConditionModel` teachers of versions 1.x, 2.x and XL.

Rombach et al. 2022; XL: Podell et al. 2023.
"""

import copy
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from utils.backbones.base import Configs
from utils.backbones.conditions import Prompts
from utils.backbones.encoders import Frozen
from utils.backbones.latent import Latent
from utils.backbones.loading import load_component, read_json_config
from utils.backbones.process import Diffusion
from utils.students import blocks
from utils.students.lora import add_lora, fuse_saved_lora
from utils.students.sizes import model_size, model_table, set_dropout


class ClipPrompts(Prompts):
    """Prompts as Stable Diffusion's U-Net reads them: of one CLIP text encoder, or XL's two."""

    def __init__(self, args, config, place):
        """`config` is the U-Net's; `place` says on which device and in which dtype the encoders run."""
        self.config, self.xl = config, config.addition_embed_type == "text_time"
        self.micro_conditioning = self.xl
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        names = list(kinds)[: 1 + self.xl]
        tokenizers = [
            CLIPTokenizer.from_pretrained(
                args.pretrained_model_name_or_path,
                subfolder=name.replace("text_encoder", "tokenizer"),
                revision=args.revision,
            )
            for name in names
        ]
        super().__init__(args, tokenizers, [Frozen(kinds[name], args, place, subfolder=name) for name in names])

    def kept(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """XL's time ids (B, 6)."""
        return {"time_ids": batch["time_ids"]} if self.xl else {}

    def embed_tokens(self, input_ids: list[Tensor]) -> dict[str, Tensor]:
        """`prompt_embeds` (B, T, D) and, for XL, `pooled` (B, P)."""
        pairs = zip(self.encoders, input_ids, strict=True)
        outputs = [encoder()(ids, output_hidden_states=self.xl) for encoder, ids in pairs]
        if not self.xl:
            return {"prompt_embeds": outputs[0][0]}
        # XL reads the layer before the last of both, and the second encoder's pooled projection (Podell et al. 2023)
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"prompt_embeds": embeds, "pooled": outputs[-1][0]}

    def keywords(self, text: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, Any]:
        """The U-Net's."""
        condition = {"encoder_hidden_states": text["prompt_embeds"].float()}
        if self.xl:
            condition["added_cond_kwargs"] = {"text_embeds": text["pooled"].float(), "time_ids": rows["time_ids"]}
        return condition

    def pipeline_arguments(self, conditions: Sequence[str]) -> dict[str, Any]:
        """Embeddings of the prompts and of as many empty ones, float32."""
        text, empty = self.prompts(list(conditions)), self.prompts([""] * len(conditions))
        arguments = {"prompt_embeds": text["prompt_embeds"], "negative_prompt_embeds": empty["prompt_embeds"]}
        if self.xl:
            arguments |= {"pooled_prompt_embeds": text["pooled"], "negative_pooled_prompt_embeds": empty["pooled"]}
        return {name: value.float() for name, value in arguments.items()}

    def example(self) -> dict[str, Any]:
        """The U-Net's keywords for one sample."""
        text = {"prompt_embeds": torch.zeros(1, self.tokenizers[0].model_max_length, self.config.cross_attention_dim)}
        if self.xl:
            pooled = self.config.projection_class_embeddings_input_dim - 6 * self.config.addition_time_embed_dim
            text["pooled"] = torch.zeros(1, pooled)
        return self.keywords(text, {"time_ids": torch.zeros(1, 6)})


class StableDiffusion(Latent):
    """Denoises latents with a `UNet2DConditionModel`, told what to draw by a prompt."""

    component, model_class = "unet", UNet2DConditionModel
    must_match = (
        "in_channels out_channels cross_attention_dim addition_embed_type projection_class_embeddings_input_dim"
    ).split()
    flags = Latent.flags | {"student_preset"}
    instead = {
        "pruning_ratio": "a Stable Diffusion U-Net is shortened, not narrowed. Give --student_preset "
        f"({', '.join(blocks.PRESETS)}) or --student_config"
    }

    def __init__(self, args, teacher: UNet2DConditionModel, process: Diffusion, configs: Configs):
        self.xl = teacher.config.addition_embed_type == "text_time"
        self.vae_dtype = torch.float32 if self.xl else None  # XL's own overflows in half precision
        self.pipeline_class = diffusers.StableDiffusionXLPipeline if self.xl else diffusers.StableDiffusionPipeline
        super().__init__(args, teacher, process, configs)
        self.conditions = ClipPrompts(args, teacher.config, self.place)
        scale = args.validation_guidance_scale
        side = configs.resolution
        self.sampling_options = {"guidance_scale": 7.5 if scale is None else scale, "height": side, "width": side}

    @classmethod
    def student_config(cls, args, teacher: dict) -> tuple[str, dict]:
        """(the flag that says what the student is, its config)."""
        if args.student_preset:
            return "--student_preset", blocks.student_config(teacher, args.student_preset)
        return super().student_config(args, teacher)

    def make_student(self, args, batch: dict[str, Tensor]) -> tuple[UNet2DConditionModel, str]:
        """The student in float32 and a table of what it is made of; with `--lora_rank` only its adapters train."""
        if args.student_model_name_or_path:
            flag, source = "--student_model_name_or_path", args.student_model_name_or_path
            pickled = args.allow_pickle_weights
            student = load_component(self.model_class, self.component, source, flag, allow_pickle=pickled)
            fuse_saved_lora(student, self.component, source, flag)
            table = model_table(*(model_size(m.config, self.model_class) for m in (self.teacher, student)))
        else:
            config = args.student_preset or read_json_config(args.student_config, "--student_config")
            student, report = blocks.make_block_student(self.teacher, config, args.seed)
            table = report.table()
        set_dropout(student, args.dropout)
        if args.lora_rank:
            count = add_lora(student, args.lora_rank, args.seed)
            table += f"\ntrainable: {count:,} parameters of LoRA adapters of rank {args.lora_rank}"
        return student.train(), table

    def feature_pairs(self, student: UNet2DConditionModel) -> list[tuple[str, str]]:
        """(student block, teacher block): outputs of the matching down, mid and up blocks, as BK-SDM."""
        return blocks.feature_pairs(student, self.teacher)

    def sampling_pipeline(self, denoiser: nn.Module) -> DiffusionPipeline:
        """Without text encoders: the prompts come as embeddings."""
        absent = ("text_encoder_2", "tokenizer_2") if self.xl else ("safety_checker", "feature_extractor")
        vae = self.vae()
        return self.pipeline_class(
            vae=vae if vae.dtype == torch.float32 else copy.deepcopy(vae).float(),
            unet=denoiser,
            scheduler=self.process.sampler(),
            **dict.fromkeys(("text_encoder", "tokenizer", *absent)),
            **({} if self.xl else {"requires_safety_checker": False}),
        )
