# SPDX-License-Identifier: Apache-2.0
"""Tiny complete Stable Diffusion, DiT and SD3 pipelines, every part real, and pictures with captions or classes."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = "abcdefghijklmnopqrstuvwxyz"
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIDE = 32  # pixels; latents have 16, halved three times


def build_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *WORDS, *(f"{letter}</w>" for letter in WORDS)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def build_text_encoder(tokenizer: CLIPTokenizer, kind: type = CLIPTextModel, width: int = 32):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def build_unet(**changes) -> UNet2DConditionModel:
    """Stable Diffusion's layout, four stages, 0.5M parameters."""
    config = {
        "sample_size": SIDE // 2,
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 2,
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes})


def build_vae(**changes) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIDE,
        scaling_factor=0.5,
        **changes,
    ).eval()


def save_pipeline(folder: Path, kind: str = "sd1", seed: int = 0) -> Path:
    """`kind`: sd1 (epsilon, PNDM), sd2 (v-prediction, linear projections) or xl."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build_vae()
        tokenizer = build_tokenizer()
        if kind == "xl":
            unet = build_unet(
                block_out_channels=(16, 16, 32),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 3),
                attention_head_dim=(2, 4, 4),
                use_linear_projection=True,
                cross_attention_dim=64,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 32,
            )
            second = build_text_encoder(tokenizer, CLIPTextModelWithProjection)
            scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
            pipeline = StableDiffusionXLPipeline(
                vae, build_text_encoder(tokenizer), second, tokenizer, tokenizer, unet, scheduler
            )
        else:
            v = {"use_linear_projection": True, "attention_head_dim": (2, 2, 4, 4)} if kind == "sd2" else {}
            scheduler = PNDMScheduler(
                **SD_BETAS,
                skip_prk_steps=True,
                steps_offset=1,
                prediction_type="v_prediction" if kind == "sd2" else "epsilon",
            )
            unet, encoder = build_unet(**v), build_text_encoder(tokenizer)
            pipeline = StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, None, False)
        pipeline.save_pretrained(folder)
    return folder


def save_captioned(folder: Path, count: int = 12, captions=None, seed: int = 0) -> Path:
    """A folder of pictures with metadata.jsonl, wider than they are high, so that crops differ."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        name = f"{i:02d}.png"
        Image.fromarray(random.integers(0, 256, (36, 48, 3), dtype=np.uint8)).save(folder / name)
        text = captions[i % len(captions)] if captions else f"{WORDS[i % 26]} {WORDS[(i * 7 + 3) % 26]}"
        lines.append(json.dumps({"file_name": name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def save_dit(folder: Path, classes: int = 5, layers: int = 4, seed: int = 0, **changes) -> Path:
    """A `DiTPipeline` that predicts variances; its layers do something, where a new one's do nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = {
            "sample_size": SIDE // 2,
            "num_layers": layers,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 8,
            "num_embeds_ada_norm": classes,
        }
        transformer = DiTTransformer2DModel(**{**config, **changes}).eval()
        scheduler = DDIMScheduler(clip_sample=False)
        pipeline = DiTPipeline(transformer, build_vae(), scheduler)
        pipeline.register_to_config(id2label={str(i): f"{WORDS[i]}, {WORDS[i]}2" for i in range(classes)})
        pipeline.save_pretrained(folder)
    return folder


SD3 = {
    **{"sample_size": SIDE // 2, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8},
    **{"num_attention_heads": 2, "joint_attention_dim": 80, "caption_projection_dim": 16},
    **{"pooled_projection_dim": 64, "pos_embed_max_size": 12, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
}


def build_t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{letter}" for letter in WORDS), *WORDS]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def save_sd3(folder: Path, t5: bool = True, shift: float = 3.0, seed: int = 0, **changes) -> Path:
    """A `StableDiffusion3Pipeline` with dual attention, as 3.5's; CLIP's tokens are narrower than T5's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, third, t5_encoder = build_tokenizer(), None, None
        encoders = [build_text_encoder(tokenizer, CLIPTextModelWithProjection) for _ in range(2)]
        if t5:
            third = build_t5_tokenizer()
            ids = {"pad_token_id": third.pad_token_id, "eos_token_id": third.eos_token_id}
            sizes = {"d_model": 80, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            t5_encoder = T5EncoderModel(T5Config(vocab_size=len(third), **sizes, **ids)).eval()
        transformer = SD3Transformer2DModel(**{**SD3, **changes}).eval()
        vae = build_vae(shift_factor=0.1)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        one, two = encoders
        StableDiffusion3Pipeline(
            transformer, scheduler, vae, one, tokenizer, two, tokenizer, t5_encoder, third
        ).save_pretrained(folder)
    return folder


def save_classes(folder: Path, count: int = 12, classes: int = 5, seed: int = 0) -> Path:
    """Pictures in a subfolder for each class."""
    random = np.random.default_rng(seed)
    for i in range(count):
        path = folder / WORDS[i % classes] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (36, 48, 3), dtype=np.uint8)).save(path)
    return folder
