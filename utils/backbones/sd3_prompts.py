# SPDX-License-Identifier: Apache-2.0
"""Prompts as Stable Diffusion 3's transformer reads them: of two CLIP text encoders and, where there is one, T5.

The tokens of both CLIP encoders lie side by side in width, padded with zeros to that of T5, whose tokens follow. A
pipeline that goes without T5 has as many tokens of zeros in its place.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from utils.backbones.clip_prompts import clip_configs, tokenizer_of
from utils.backbones.conditions import Prompts
from utils.backbones.encoders import Frozen
from utils.backbones.folder import NO_PARTS, Part
from utils.command_line import UsageError
from utils.hub_folders import teacher_folder

CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
LENGTHS = (  # tokens of T5: the stock pipeline's own, and its most
    inspect.signature(StableDiffusion3Pipeline.__call__).parameters["max_sequence_length"].default,
    512,
)


def has_t5(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline of this model_index.json has it, or goes without."""
    return index.get(T5) not in NO_PARTS


def check_text(transformer: Mapping[str, Any], parts: Mapping[str, Part], said: str) -> None:
    """Refuse text encoders that do not fit their tokenizers or the transformer, whose config is whole.

    Raises:
        UsageError: `said` names the flag.
    """
    clips, width = clip_configs({name: parts[name] for name in CLIPS}, parts, said), transformer["joint_attention_dim"]
    pooled = sum(text.projection_dim for text in clips.values())
    if pooled != transformer["pooled_projection_dim"]:
        raise UsageError(
            f"{said}: its {' and '.join(clips)} give {pooled} numbers a prompt (projection_dim), its transformer "
            f"reads {transformer['pooled_projection_dim']} (pooled_projection_dim); they are of different models."
        )
    given = sum(text.hidden_size for text in clips.values())
    if given > width:
        raise UsageError(
            f"{said}: its {' and '.join(clips)} give {given} numbers a token, its transformer reads {width} "
            "(joint_attention_dim); they are of different models."
        )
    if T5 not in parts:
        return
    text = T5Config.from_pretrained(parts[T5].folder)
    if text.d_model != width:
        raise UsageError(
            f"{said}: its {T5} gives {text.d_model} numbers a token, its transformer reads {width} "
            "(joint_attention_dim); they are of different models."
        )
    known = len(T5TokenizerFast.from_pretrained(parts[tokenizer_of(T5)].folder))
    if known > text.vocab_size:
        raise UsageError(
            f"{said}: its {tokenizer_of(T5)} knows {known} tokens, its {T5} {text.vocab_size}; they are of different "
            "models."
        )


class Sd3Prompts(Prompts):
    """Of two CLIP text encoders and T5, or without it. What is kept of a prompt has neither padding nor the zeros that
    stand for T5."""

    def __init__(self, args, config, place):
        """`config` is the transformer's; `place` says on which device and in which dtype the encoders run."""
        source = args.pretrained_model_name_or_path
        self.config, self.max_sequence_length = config, args.max_sequence_length or LENGTHS[0]
        self.has_t5 = has_t5(DiffusionPipeline.load_config(source, revision=args.revision))
        folder = teacher_folder(source, args.revision, args.variant)
        tokenizers = [CLIPTokenizer.from_pretrained(folder / tokenizer_of(name)) for name in CLIPS]
        encoders = [Frozen(CLIPTextModelWithProjection, args, place, subfolder=name) for name in CLIPS]
        if self.has_t5:
            length = {"model_max_length": self.max_sequence_length}
            tokenizers.append(T5TokenizerFast.from_pretrained(folder / tokenizer_of(T5), **length))
            encoders.append(Frozen(T5EncoderModel, args, place, subfolder=T5))
        else:
            self.absent = (T5, tokenizer_of(T5))
        super().__init__(args, tokenizers, encoders)

    def call(self, condition: str) -> dict[str, str]:
        """The prompt, and the length where it is not the pipeline's own."""
        length = self.max_sequence_length
        return super().call(condition) | ({} if length == LENGTHS[0] else {"max_sequence_length": str(length)})

    def settings(self) -> dict[str, Any]:
        """As `Prompts.settings`, and what T5 makes of a prompt, or that there is none."""
        return super().settings() | ({"max_sequence_length": self.max_sequence_length} if self.has_t5 else {T5: None})

    def embed_tokens(self, input_ids: list[Tensor]) -> dict[str, Tensor]:
        """`clip` (B, T, D), the layer before the last of both encoders, their `pooled` (B, P), and `t5` (B, N, W)."""
        outputs = [self.encoders[i]()(input_ids[i], output_hidden_states=True) for i in range(len(CLIPS))]
        text = {
            "clip": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            "pooled": torch.cat([output[0] for output in outputs], dim=-1),
        }
        return text | ({"t5": self.encoders[-1]()(input_ids[-1])[0]} if self.has_t5 else {})

    def keywords(self, text: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, Any]:
        """The transformer's: tokens (B, T + N, W) and pooled (B, P)."""
        clip, width = text["clip"].float(), self.config.joint_attention_dim
        t5 = text["t5"].float() if self.has_t5 else clip.new_zeros(len(clip), self.max_sequence_length, width)
        tokens = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        return {"encoder_hidden_states": tokens, "pooled_projections": text["pooled"].float()}

    def pipeline_arguments(self, conditions: Sequence[str]) -> dict[str, Any]:
        """Embeddings of the prompts, and as often those of none, float32."""
        told = self.keywords(self.prompts(list(conditions)), {})
        empty = {
            name: value.expand(len(conditions), *value.shape[1:])
            for name, value in self.keywords(self.empty(), {}).items()
        }
        return {
            "prompt_embeds": told["encoder_hidden_states"],
            "pooled_prompt_embeds": told["pooled_projections"],
            "negative_prompt_embeds": empty["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": empty["pooled_projections"],
        }

    def example(self) -> dict[str, Any]:
        """The transformer's keywords for one sample."""
        width = self.config.joint_attention_dim
        text = {
            "clip": torch.zeros(1, self.tokenizers[0].model_max_length, width),
            "t5": torch.zeros(1, self.max_sequence_length, width),
            "pooled": torch.zeros(1, self.config.pooled_projection_dim),
        }
        return self.keywords(text, {})
