# SPDX-License-Identifier: Apache-2.0
"""Pixel-space DDPM: `UNet2DModel` teachers in a `DDPMPipeline` or `DDIMPipeline` (Ho et al. 2020)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel

from utils.backbones.base import Backbone, Configs
from utils.backbones.loading import TEACHER, pipeline_class_name
from utils.backbones.saving import save_pipeline
from utils.command_line import UsageError
from utils.randomness import StepRandom
from utils.students.sizes import model_size, model_table, set_dropout
from utils.students.width import prune_width, taylor_scores, width_config

TAYLOR_TIMESTEPS = 20  # by default; each costs a forward and backward of the teacher
TAYLOR_PART = 16  # images at once: the teacher's backward would otherwise be the run's peak of memory


class DDPM(Backbone):
    """Denoises pixels in [-1, 1] with a `UNet2DModel`."""

    component, model_class = "unet", UNet2DModel
    flags = frozenset({"pruning_ratio"})
    sampled_by = "DDIMPipeline"  # whatever the teacher's is: DDPM's own needs every step
    instead = {
        "student_preset": "a pixel U-Net is made narrower with --pruning_ratio, or built from --student_config",
        "student_depth": "a pixel U-Net is made narrower with --pruning_ratio, or built from --student_config",
        "kept_layers": "a pixel U-Net is made narrower with --pruning_ratio, or built from --student_config",
        "latent_cache_dir": "it works in pixels, which need no encoding; leave it out",
        "lora_rank": "adapters go with a latent teacher; leave it out",
    }

    def __init__(self, args, teacher: UNet2DModel | None, configs: Configs):
        super().__init__(args, teacher, configs)
        self.image_channels, self.pipeline_class = configs.student.get("in_channels", 3), DDPMPipeline
        if teacher is not None:
            source = args.pretrained_model_name_or_path
            self.pipeline_class = getattr(diffusers, pipeline_class_name(source, args.revision, TEACHER))
            teacher.register_to_config(sample_size=self.resolution)  # what the stock pipelines sample at
        if (args.taylor_timesteps or 0) > self.process.num_places:
            raise UsageError(
                f"--taylor_timesteps is {args.taylor_timesteps}; the teacher's schedule has {self.process.num_places}."
            )

    @classmethod
    def student_config(cls, args, teacher: dict | None) -> tuple[str, dict]:
        """(the flag that says what the student is, its config)."""
        if args.pruning_ratio is not None:
            return "--pruning_ratio", width_config(teacher, args.pruning_ratio)
        return super().student_config(args, teacher)

    @classmethod
    def check_more(cls, args, teacher: dict | None, student: dict, flag: str) -> None:
        """Learned variances, and what is no image."""
        if student["in_channels"] not in (1, 3, 4):
            raise UsageError(f"{flag}: in_channels is {student['in_channels']}; images have 1, 3 or 4.")
        if student["out_channels"] != student["in_channels"]:
            raise UsageError(
                f"{flag}: out_channels is {student['out_channels']} and in_channels {student['in_channels']}; they "
                "must be equal (learned variances are not supported)."
            )

    def make_student(self, args, batch: dict[str, torch.Tensor]) -> tuple[UNet2DModel, str]:
        """The student in float32 and a table of what it is made of. Taylor scores are taken on `batch`."""
        if args.pruning_ratio is not None:
            scores = None
            if args.student_init == "taylor":
                self.teacher.to(batch["pixels"].device)
                losses = self._diffusion_losses(batch, args.seed, args.taylor_timesteps)
                scores = taylor_scores(self.teacher, losses)
            student, report = prune_width(
                self.teacher, args.pruning_ratio, init=args.student_init, scores=scores, seed=args.seed
            )
            table = report.table()
        else:
            student = self.given_student(args)
            table = model_table(self.teacher and model_size(self.teacher.config), model_size(student.config))
        student.register_to_config(sample_size=self.resolution)
        set_dropout(student, args.dropout)
        return student.train(), table

    def _diffusion_losses(
        self, batch: dict[str, torch.Tensor], seed: int, timesteps: int | None
    ) -> Iterator[torch.Tensor]:
        """The teacher's diffusion loss on one real batch at so many `timesteps` across the schedule, from the smallest
        on. None is a few, until the loss falls under 5 % of its maximum (Fang et al. 2023: later timesteps add noise
        to the scores, not signal). Each timestep's loss comes in parts that add up to it; the first decides."""
        rng = StepRandom(seed, 0, device=batch["pixels"].device)
        clean, _ = self.encode(batch, rng)
        last = self.process.num_places - 1
        largest = 0.0
        for t in torch.linspace(0, last, timesteps or TAYLOR_TIMESTEPS).long().tolist():
            timestep = torch.full((clean.shape[0],), t, device=clean.device)
            noised = self.process.noised(clean, rng.normal(clean.shape), timestep)
            for first in range(0, clean.shape[0], TAYLOR_PART):
                part = slice(first, first + TAYLOR_PART)
                output = self.teacher(noised.x_t[part], timestep[part], return_dict=False)[0]
                loss = (output - noised.target[part]).square().sum() / noised.target.numel()
                if first == 0 and timesteps is None:
                    largest = max(largest, loss.item())
                    if loss.item() < 0.05 * largest:
                        return
                yield loss

    def feature_pairs(self, student: UNet2DModel) -> list[tuple[str, str]]:
        """(student block, teacher block): every down, mid and up block with its counterpart.

        Raises:
            UsageError: the two have different numbers of blocks.
        """
        stages = len(student.down_blocks)
        if stages != len(self.teacher.down_blocks):
            raise UsageError(
                f"--lambda_kd_feat: the student has {stages} stages, the teacher {len(self.teacher.down_blocks)}; "
                "features are matched block by block. Set --lambda_kd_feat 0."
            )
        middle = [] if student.mid_block is None or self.teacher.mid_block is None else ["mid_block"]
        names = [f"down_blocks.{i}" for i in range(stages)] + middle + [f"up_blocks.{i}" for i in range(stages)]
        return [(name, name) for name in names]

    def example(self) -> dict[str, Any]:
        """Forward arguments of one sample, for the shapes of things."""
        size = (1, self.image_channels, self.resolution, self.resolution)
        return {"x_t": torch.zeros(size), "timestep": torch.zeros(1, dtype=torch.long)}

    def sampling_pipeline(self, denoiser: torch.nn.Module) -> DDIMPipeline:
        """DDIM's, whatever the teacher's is: DDPM's own needs every step."""
        return DDIMPipeline(unet=denoiser, scheduler=self.process.sampler())

    def pipeline(self, denoiser: UNet2DModel) -> DiffusionPipeline:
        """The stock pipeline of the teacher's own class and scheduler settings."""
        return self.pipeline_class(unet=denoiser, scheduler=self.process.scheduler)

    def save(self, denoiser: UNet2DModel, folder: Path) -> None:
        """Write `pipeline` to `folder`."""
        save_pipeline(self.pipeline(denoiser), self.component, folder)
