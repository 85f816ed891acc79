# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (Hu et al. 2022) on a student whose own weights stay as they are, by peft."""

import copy
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError

from utils.command_line import UsageError

WEIGHTS = "pytorch_lora_weights.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of an MMDiT's text; others have none


def add_lora(denoiser: ModelMixin, rank: int, seed: int) -> int:
    """Freeze `denoiser` and give its attention trainable adapters, which change nothing at first; how many
    parameters they have."""
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=[*ATTENTION, *TEXT_ATTENTION]
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        denoiser.add_adapter(config)
    return sum(p.numel() for p in denoiser.parameters() if p.requires_grad)


def without_lora(denoiser: ModelMixin, fuse: bool) -> ModelMixin:
    """A copy that is a plain model again, the adapters added to its weights if `fuse`, otherwise gone."""
    plain = copy.deepcopy(denoiser)
    if fuse:
        plain.fuse_lora()
    plain.unload_lora()
    return plain


def save_lora(denoiser: ModelMixin, pipeline_class: type, component: str, folder: Path) -> None:
    """Write `WEIGHTS`, which the `load_lora_weights` of the `pipeline_class` reads into its `component`."""
    layers = get_peft_model_state_dict(denoiser)
    converted = convert_state_dict_to_diffusers(layers)
    if not any("lora_A" in name for name in converted):  # it has no names for an MMDiT's text: of a mixture half loads
        layers = converted
    pipeline_class.save_lora_weights(folder, **{f"{component}_lora_layers": layers}, safe_serialization=True)


def fuse_saved_lora(denoiser: ModelMixin, component: str, folder: str, flag: str) -> None:
    """Add to a student's weights the adapters that `save_lora` left beside them, where it did: it is both.

    Raises UsageError naming `flag` where they do not fit."""
    if not (Path(folder) / WEIGHTS).is_file():
        return
    try:
        denoiser.load_lora_adapter(folder, prefix=component, weight_name=WEIGHTS)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{flag} {folder}: its {WEIGHTS} does not load: {error}") from error
    denoiser.fuse_lora()
    denoiser.unload_lora()
