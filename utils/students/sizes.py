# SPDX-License-Identifier: Apache-2.0
"""How large a model is, and what became of a teacher's tensors in its student."""

import functools
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import diffusers
import torch
from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch.utils.flop_counter import FlopCounterMode

TEXT_TOKENS = 77  # what the CLIP text encoders of Stable Diffusion pad every prompt to
T5_TOKENS = 256  # that follow these in Stable Diffusion 3, unless its stock pipeline is told another number


def full_config(config: Mapping[str, Any], model_class: type[ModelMixin] = UNet2DModel) -> dict[str, Any]:
    """All arguments of `model_class`, defaults filled in (Hub configs are often partial), private keys left out."""
    parameters = inspect.signature(model_class.__init__).parameters.values()
    return {p.name: config.get(p.name, p.default) for p in parameters if p.name != "self"}


def height_width(sample_size: int | tuple[int, int]) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


@singledispatch
def example_inputs(model: ModelMixin) -> dict[str, Any]:
    """Arguments of one forward of one sample, all zeros, on the default device. A new denoiser registers its own.

    `sample` is (1, C, H, W) at the config's sample_size; text is (1, 77, D), of Stable Diffusion 3 (1, 333, D).
    """
    raise TypeError(f"no example inputs are registered for {type(model).__name__}")


@example_inputs.register
def _(model: UNet2DModel) -> dict[str, Any]:
    labels = None if model.class_embedding is None else torch.zeros(1, dtype=torch.long)
    return _sample_and_time(model) | {"class_labels": labels}


@example_inputs.register
def _(model: UNet2DConditionModel) -> dict[str, Any]:
    config, inputs = model.config, _sample_and_time(model)
    width = config.cross_attention_dim  # a list gives one per stage, of the same text
    width = width if isinstance(width, int) else width[0]
    inputs["encoder_hidden_states"] = torch.zeros(1, TEXT_TOKENS, width)
    if model.class_embedding is not None:
        inputs["class_labels"] = torch.zeros(1, dtype=torch.long)
    if config.addition_embed_type == "text_time":  # SDXL: pooled text beside the embedding of six sizes
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
    return inputs


@example_inputs.register
def _(model: DiTTransformer2DModel) -> dict[str, Any]:
    inputs = _sample_and_time(model)
    return {"hidden_states": inputs.pop("sample"), **inputs, "class_labels": torch.zeros(1, dtype=torch.long)}


@example_inputs.register
def _(model: SD3Transformer2DModel) -> dict[str, Any]:
    inputs, config = _sample_and_time(model), model.config
    return {
        "hidden_states": inputs.pop("sample"),
        "timestep": inputs["timestep"].float(),
        "encoder_hidden_states": torch.zeros(1, TEXT_TOKENS + T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
    }


def _sample_and_time(model: ModelMixin) -> dict[str, Any]:
    size = height_width(model.config.sample_size)
    return {
        "sample": torch.zeros(1, model.config.in_channels, *size),
        "timestep": torch.zeros(1, dtype=torch.long),
    }


@dataclass(frozen=True)
class ModelSize:
    """`shape`: a U-Net's widths, or a transformer's layers and their width; `counted_once`: see `paper_parameters`;
    `macs`: multiply-adds of one forward of one sample, None for a config without sample_size."""

    shape: str
    parameters: int
    counted_once: int
    macs: int | None


def model_size(config: Mapping[str, Any], model_class: type[ModelMixin] | None = None) -> ModelSize:
    """Count parameters and MACs of a config on the meta device: no memory, no random numbers.

    `model_class`: whose config it is; None is the diffusers class it names in `_class_name`, or `UNet2DModel`.
    """
    model_class = model_class or getattr(diffusers, config.get("_class_name", "UNet2DModel"))
    return _counted(json.dumps(full_config(config, model_class)), model_class)


@functools.cache
def _counted(config_json: str, model_class: type[ModelMixin]) -> ModelSize:
    config = json.loads(config_json)
    with torch.device("meta"):
        model, macs = model_class(**config), None
        if config["sample_size"] is not None:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(**example_inputs(model))
            macs = counter.get_total_flops() // 2
    parameters = sum(p.numel() for p in model.parameters())
    if "block_out_channels" in config:
        shape = "-".join(map(str, config["block_out_channels"]))
    else:
        shape = f"{config['num_layers']} x {config['num_attention_heads'] * config['attention_head_dim']}"
    return ModelSize(shape, parameters, paper_parameters(model), macs)


def paper_parameters(model: ModelMixin) -> int:
    """Parameters as DiT's paper (Peebles and Xie 2023) counts them: it has one embedder of time and label, where
    diffusers gives every layer one of its own, and counts the table of positions, here a buffer."""
    count = sum(p.numel() for p in model.parameters())
    if isinstance(model, DiTTransformer2DModel):
        embedders = [sum(p.numel() for p in block.norm1.emb.parameters()) for block in model.transformer_blocks]
        count += model.pos_embed.pos_embed.numel() - sum(embedders[1:])
    return count


def model_table(teacher: ModelSize | None, student: ModelSize) -> str:
    """Widths, parameters and MACs of teacher and student as plain text; without a teacher, the student's alone."""
    sizes = [student] if teacher is None else [teacher, student]
    rows = {
        "": ["teacher", "student"][-len(sizes) :],
        "layers x width" if " x " in student.shape else "widths": [size.shape for size in sizes],
        "parameters": [f"{size.parameters:,}" for size in sizes],
        "MACs per sample": ["unknown" if size.macs is None else f"{size.macs:,}" for size in sizes],
    }
    if any(size.counted_once != size.parameters for size in sizes):
        rows["as papers count"] = [f"{size.counted_once:,}" for size in sizes]
    if teacher is not None:
        rows["parameters kept"] = ["", f"{student.parameters / teacher.parameters:.2%}"]
    return "\n".join(f"{label:<16}" + "".join(f"{cell:>28}" for cell in cells) for label, cells in rows.items())


def set_dropout(model: ModelMixin, dropout: float | None) -> None:
    """Give `model` the dropout that its class gives a model whose config says `dropout`; None leaves it as it is."""
    if dropout is None:
        return
    with torch.device("meta"):  # which of its layers a config's dropout is of, diffusers alone knows
        twin = type(model)(**{**full_config(model.config, type(model)), "dropout": dropout})
    for name, layer in twin.named_modules():
        if isinstance(layer, torch.nn.Dropout):
            model.get_submodule(name).p = layer.p
    model.register_to_config(dropout=dropout)


@dataclass(frozen=True)
class WidthReport:
    """Sizes, and tensor names: the student's `sliced`, `copied`, `refitted` and `fresh`, the teacher's `dropped`.

    `refit_error`: relative error of the refitted time embedding layer's output over time, None without a refit.
    """

    teacher: ModelSize
    student: ModelSize
    pruning_ratio: float
    init: str
    sliced: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    refitted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    refit_error: float | None = None

    def table(self) -> str:
        """The sizes table, then how many tensors took which way, then the names dropped and refitted."""
        kinds = ("sliced", "copied", "refitted", "dropped", "fresh")
        lines = [
            model_table(self.teacher, self.student),
            f"pruning ratio {self.pruning_ratio}, student init {self.init}",
            "tensors: " + ", ".join(f"{len(getattr(self, kind))} {kind}" for kind in kinds),
        ]
        if self.refitted:
            lines.append(
                f"refitted: {', '.join(self.refitted)}, by least squares to the teacher's output over all timesteps "
                f"(what is left of it: {self.refit_error:.0%}, for training to learn)"
            )
        if self.dropped:
            lines.append(f"dropped: {', '.join(self.dropped)}")
        return "\n".join(lines)
