# SPDX-License-Identifier: Apache-2.0
"""Train a small DiT on the bundled images, told the class by its number: a teacher for studies on a CPU.

    export OMP_NUM_THREADS=1
    python benchmarks/make_dit_teacher.py teachers            # teachers/dit, a stock DiTPipeline; an hour of a core
    python benchmarks/make_dit_teacher.py teachers --measure  # samples as asked, Frechet distance, teachers/dit.png

DiT's layout at an eighth of the width: 8 layers, 2x2 latents a token, ten classes and none. It predicts the noise and
no variances. Low noise, which is most of DiT's schedule, is weighted by min-SNR (Hang et al. 2023, gamma 5). The stock
pipeline calls its model of none 1000, so under guidance it is measured through the stand-in that the training scripts
sample with.
"""

from pathlib import Path

from latent_flags import SEED, Teacher, read

if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = read(__doc__, Teacher("dit", steps=3000, learning_rate=1e-3, guidance=4.0))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel  # noqa: E402
from diffusers.models.embeddings import LabelEmbedding  # noqa: E402
from diffusers.training_utils import compute_snr  # noqa: E402
from latent_teachers import CHANNELS, NOUNS, SIDE, run_script  # noqa: E402
from torch import Tensor  # noqa: E402

from utils.backbones.stand_in import GuidedLabels  # noqa: E402
from utils.command_line import run  # noqa: E402

MIN_SNR_GAMMA = 5.0


class DiTTeacher:
    def __call__(self, vae: AutoencoderKL) -> tuple:
        torch.manual_seed(SEED)
        transformer = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=24,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=8,
            sample_size=SIDE,
            patch_size=2,
            num_embeds_ada_norm=len(NOUNS),
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
        for module in transformer.modules():
            if isinstance(module, LabelEmbedding):  # in every layer, and each would drop labels of its own
                module.dropout_prob = 0.0
        scheduler = DDPMScheduler(clip_sample=False)  # DiT's: linear betas from 1e-4 to .02

        def batch_loss(clean: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            noise = torch.randn(clean.shape, generator=generator)
            timestep = torch.randint(1000, labels.shape, generator=generator)
            noised = scheduler.add_noise(clean, noise, timestep)
            predicted = transformer(noised, timestep=timestep, class_labels=labels).sample
            snr = compute_snr(scheduler, timestep)
            errors = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
            return (errors * snr.clamp(max=MIN_SNR_GAMMA) / snr).mean()

        names = dict(enumerate(NOUNS))
        sampler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
        pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=sampler, id2label=names)
        pipeline.register_to_config(id2label=names)
        return pipeline, transformer, batch_loss

    def load(self, folder: Path) -> DiTPipeline:
        pipeline = DiTPipeline.from_pretrained(folder, use_safetensors=True)
        pipeline.transformer = GuidedLabels(pipeline.transformer, len(NOUNS))
        return pipeline

    def condition(self, labels: list[int]) -> dict:
        return {"class_labels": labels}


if __name__ == "__main__":
    run(run_script, ARGS, DiTTeacher())
