# SPDX-License-Identifier: Apache-2.0
"""Train a small MMDiT by flow matching on the bundled images, told the class in words: a teacher for studies on a CPU.

    export OMP_NUM_THREADS=1
    python benchmarks/make_flow_teacher.py teachers            # teachers/flow, a stock StableDiffusion3Pipeline
    python benchmarks/make_flow_teacher.py teachers --measure  # samples as asked, Frechet distance, teachers/flow.png

SD3's layout: 8 layers, 2x2 latents a token, two CLIP text encoders of random frozen weights and no T5. In the place of
T5's tokens the stock pipeline tells its model zeros, as many as max_sequence_length says; this one was told 8, so it
is called with max_sequence_length=8. Times are drawn as SD3's, logit-normal, on its schedule of shift 3.
"""

from pathlib import Path

from latent_flags import SEED, Teacher, read

if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = read(__doc__, Teacher("flow", steps=2000, learning_rate=1e-3, guidance=2.0))

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import compute_density_for_timestep_sampling  # noqa: E402
from latent_teachers import CHANNELS, NOUNS, SIDE, make_text_encoder, make_tokenizer, run_script  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import CLIPTextModelWithProjection  # noqa: E402

from utils.command_line import run  # noqa: E402

TEXT_WIDTH, TOKENS = 32, 8  # of either encoder, and in the place of T5


class FlowTeacher:
    def __call__(self, vae: AutoencoderKL) -> tuple:
        torch.manual_seed(SEED)
        tokenizer, width = make_tokenizer(), 96
        transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=8,
            num_attention_heads=4,
            attention_head_dim=width // 4,
            caption_projection_dim=width,
            joint_attention_dim=2 * TEXT_WIDTH,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=SIDE,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
        encoders = [make_text_encoder(CLIPTextModelWithProjection, TEXT_WIDTH, tokenizer) for _ in range(2)]
        pipeline = StableDiffusion3Pipeline(
            vae=vae,
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            text_encoder_3=None,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            tokenizer_3=None,
            transformer=transformer,
            scheduler=scheduler,
        )
        prompts = [*NOUNS, ""]
        with torch.no_grad():
            embeddings, _, pooled, _ = pipeline.encode_prompt(
                prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS
            )
        times, sigmas = scheduler.timesteps.clone(), scheduler.sigmas.clone()

        def batch_loss(clean: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            noise = torch.randn(clean.shape, generator=generator)
            density = compute_density_for_timestep_sampling("logit_normal", len(clean), 0.0, 1.0, generator=generator)
            place = (density * len(times)).long()
            sigma = sigmas[place].view(-1, 1, 1, 1)
            velocity = transformer(
                hidden_states=(1 - sigma) * clean + sigma * noise,
                timestep=times[place],
                encoder_hidden_states=embeddings[labels],
                pooled_projections=pooled[labels],
            ).sample
            return (velocity - (noise - clean)).square().mean()

        return pipeline, transformer, batch_loss

    def load(self, folder: Path) -> StableDiffusion3Pipeline:
        absent = {"text_encoder_3": None, "tokenizer_3": None}
        return StableDiffusion3Pipeline.from_pretrained(folder, use_safetensors=True, **absent)

    def condition(self, labels: list[int]) -> dict:
        return {"prompt": [NOUNS[label] for label in labels], "max_sequence_length": TOKENS}


if __name__ == "__main__":
    run(run_script, ARGS, FlowTeacher())
