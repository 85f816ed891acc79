# SPDX-License-Identifier: Apache-2.0
"""Prompts as Stable Diffusion's U-Net reads them, by one CLIP text encoder or XL's two; and whether these fit it."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from utils.backbones.conditions import Prompts
from utils.backbones.encoders import Frozen
from utils.backbones.folder import Part
from utils.command_line import UsageError
from utils.hub_folders import teacher_folder


def text_width(unet_config: Mapping[str, Any]) -> int | Sequence[int]:
    """Numbers a token that a U-Net reads, whichever way its config says so."""
    width = unet_config.get("encoder_hid_dim") or unet_config["cross_attention_dim"]
    return width if isinstance(width, int) or len(set(width)) > 1 else width[0]


def tokenizer_of(text_encoder: str) -> str:
    """The tokenizer's folder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def zeros_when_empty(name_or_path: str, revision: str | None) -> bool:
    """Whether an XL pipeline tells its U-Net zeros where there is no prompt: its model_index.json, or its default."""
    index = DiffusionPipeline.load_config(name_or_path, revision=revision)
    default = inspect.signature(diffusers.StableDiffusionXLPipeline).parameters["force_zeros_for_empty_prompt"].default
    return index.get("force_zeros_for_empty_prompt", default)


def clip_configs(encoders: Mapping[str, Part], parts: Mapping[str, Part], said: str) -> dict[str, CLIPTextConfig]:
    """Of CLIP text encoders, by name, each found to fit its tokenizer among the `parts`.

    Raises:
        UsageError: one does not fit; `said` names the flag.
    """
    lengths, texts = {}, {name: CLIPTextConfig.from_pretrained(part.folder) for name, part in encoders.items()}
    for name, text in texts.items():
        tokenizer = CLIPTokenizer.from_pretrained(parts[tokenizer_of(name)].folder)
        lengths[tokenizer_of(name)] = tokenizer.model_max_length
        if tokenizer.model_max_length > text.max_position_embeddings:
            raise UsageError(
                f"{said}: its {tokenizer_of(name)} gives up to {tokenizer.model_max_length} tokens "
                f"(model_max_length), its {name} reads {text.max_position_embeddings}. Set model_max_length in "
                "tokenizer_config.json."
            )
        if len(tokenizer) > text.vocab_size:
            raise UsageError(
                f"{said}: its {tokenizer_of(name)} knows {len(tokenizer)} tokens, its {name} {text.vocab_size}; "
                "they are of different models."
            )
        if getattr(text, "use_attention_mask", False):
            raise UsageError(
                f"{said}: its {name} reads an attention mask (use_attention_mask), which nobody gives it."
            )
    if len(set(lengths.values())) > 1:
        raise UsageError(f"{said}: its tokenizers give different numbers of tokens: {lengths}. It takes one number.")
    return texts


def check_text(unet: Mapping[str, Any], parts: Mapping[str, Part], said: str) -> None:
    """Refuse text encoders that do not fit their tokenizers or the U-Net, whose config is whole.

    Raises:
        UsageError: `said` names the flag.
    """
    texts = clip_configs({name: parts[name] for name in parts if name.startswith("text_encoder")}, parts, said)
    width, read = sum(text.hidden_size for text in texts.values()), text_width(unet)
    if width != read:
        raise UsageError(
            f"{said}: its {' and '.join(texts)} give {width} numbers a token, its unet reads {read} "
            "(cross_attention_dim); they are of different models."
        )
    if "text_encoder_2" in texts:
        pooled = texts["text_encoder_2"].projection_dim
        expected = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        if pooled != expected:
            raise UsageError(
                f"{said}: its text_encoder_2 gives {pooled} numbers a prompt (projection_dim), its unet reads "
                f"{expected} beside six sizes; they are of different models."
            )


class ClipPrompts(Prompts):
    """Prompts as Stable Diffusion's U-Net reads them: of one CLIP text encoder, or XL's two."""

    def __init__(self, args, config, place):
        """`config` is the U-Net's; `place` says on which device and in which dtype the encoders run."""
        self.config, self.xl = config, config.addition_embed_type == "text_time"
        source, self.micro_conditioning = args.pretrained_model_name_or_path, self.xl
        self.zeros_when_empty = self.xl and zeros_when_empty(source, args.revision)
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        names = list(kinds)[: 1 + self.xl]
        folder = teacher_folder(source, args.revision, args.variant)
        tokenizers = [CLIPTokenizer.from_pretrained(folder / tokenizer_of(name)) for name in names]
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
        """Embeddings of the prompts, and as often those of none, float32."""
        text, count = self.prompts(list(conditions)), len(conditions)
        empty = {name: value.expand(count, *value.shape[1:]) for name, value in self.empty().items()}
        arguments = {"prompt_embeds": text["prompt_embeds"], "negative_prompt_embeds": empty["prompt_embeds"]}
        if self.xl:
            arguments |= {"pooled_prompt_embeds": text["pooled"], "negative_pooled_prompt_embeds": empty["pooled"]}
        return {name: value.float() for name, value in arguments.items()}

    def example(self) -> dict[str, Any]:
        """The U-Net's keywords for one sample."""
        width = text_width(self.config)
        text = {"prompt_embeds": torch.zeros(1, self.tokenizers[0].model_max_length, width)}
        if self.xl:
            pooled = self.config.projection_class_embeddings_input_dim - 6 * self.config.addition_time_embed_dim
            text["pooled"] = torch.zeros(1, pooled)
        return self.keywords(text, {"time_ids": torch.zeros(1, 6)})
