# SPDX-License-Identifier: Apache-2.0
"""Train a small text-to-image model on the bundled images, told the class in words: a teacher for studies on a CPU.

    export OMP_NUM_THREADS=1
    python benchmarks/make_text_teacher.py teachers            # teachers/text, a stock StableDiffusionPipeline
    python benchmarks/make_text_teacher.py teachers --measure  # samples as asked, Frechet distance, teachers/text.png

Its U-Net has three stages of two layers, as wide as a quarter of an hour of a core allows; attention starts in the
second, at 8x8 latents. Its text encoder is a two-layer CLIP of random frozen weights.
"""

from pathlib import Path

from latent_flags import SEED, Teacher, read

if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = read(__doc__, Teacher("text", steps=1200, learning_rate=1e-3, guidance=3.0))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from latent_teachers import CHANNELS, NOUNS, SIDE, make_text_encoder, make_tokenizer, run_script  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import CLIPTextModel  # noqa: E402

from utils.command_line import run  # noqa: E402


class TextTeacher:
    def __call__(self, vae: AutoencoderKL) -> tuple:
        torch.manual_seed(SEED)
        tokenizer = make_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(24, 48, 48),
            layers_per_block=2,
            norm_num_groups=8,
            attention_head_dim=4,  # as in Stable Diffusion 1.x, where the name hides the number of heads
            cross_attention_dim=64,
        )
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=make_text_encoder(CLIPTextModel, 64, tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(  # Stable Diffusion's settings
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        with torch.no_grad():
            embeddings, _ = pipeline.encode_prompt([*NOUNS, ""], "cpu", 1, do_classifier_free_guidance=False)

        def batch_loss(clean: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            noise = torch.randn(clean.shape, generator=generator)
            timestep = torch.randint(1000, labels.shape, generator=generator)
            noised = scheduler.add_noise(clean, noise, timestep)
            return F.mse_loss(unet(noised, timestep, embeddings[labels]).sample, noise)

        return pipeline, unet, batch_loss

    def load(self, folder: Path) -> StableDiffusionPipeline:
        return StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)

    def condition(self, labels: list[int]) -> dict:
        return {"prompt": [NOUNS[label] for label in labels]}


if __name__ == "__main__":
    run(run_script, ARGS, TextTeacher())
