# SPDX-License-Identifier: Apache-2.0
"""Pixel-space DDPM: `UNet2DModel` teachers in a `DDPMPipeline` or `DDIMPipeline`.

Ho et al. 2020 (epsilon), Salimans and Ho 2022 (v_prediction); sampled with DDIM (Song et al. 2021).
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from utils.backbones.common import InFloat32, UNetBackbone
from utils.backbones.loading import (
    component_config,
    load_component,
    load_schedule,
    pipeline_class_name,
    read_json_config,
)
from utils.backbones.saving import save_pipeline
from utils.backbones.types import Noised
from utils.command_line import UsageError
from utils.data.transforms import ImageTransform
from utils.pixels import to_uint8
from utils.randomness import StepRandom
from utils.students.sizes import model_size, model_table
from utils.students.width import prune_width, taylor_scores, width_config

TAYLOR_TIMESTEPS = 20  # spread evenly over the schedule; each costs a forward and backward of the teacher
TAYLOR_PART = 16  # images at once: the teacher's backward would otherwise be the run's peak of memory

TEXT_FLAGS = (
    "caption_column proportion_empty_prompts noise_offset pretrained_vae_model_name_or_path validation_prompts "
    "validation_guidance_scale"
).split()


class DDPM(UNetBackbone):
    """Denoises pixels in [-1, 1] with a `UNet2DModel`."""

    component = "unet"

    def __init__(
        self,
        args,
        teacher: UNet2DModel | None,
        scheduler: DDPMScheduler,
        pipeline_class: type,
        channels: int,
        resolution: int,
    ):
        self.args = args
        self.teacher = teacher
        self.scheduler = scheduler
        self.pipeline_class = pipeline_class
        self.channels, self.resolution = channels, resolution
        if teacher is not None:
            teacher.register_to_config(sample_size=self.resolution)  # what the stock pipelines sample at

    @classmethod
    def load(cls, args) -> "DDPM":
        """The teacher in float32 on the CPU, eval mode, no gradients; without a teacher, only a fresh schedule.

        Raises:
            UsageError: see `check`.
        """
        channels, resolution = cls.check(args)
        if not args.pretrained_model_name_or_path:
            return cls(args, None, DDPMScheduler(), DDPMPipeline, channels, resolution)
        source, flag = args.pretrained_model_name_or_path, "--pretrained_model_name_or_path"
        # DDIM teachers too are trained with the DDPM forward process; a private copy keeps its tables on our device
        scheduler = load_schedule(args)
        teacher = load_component(
            UNet2DModel,
            source,
            flag,
            revision=args.revision,
            variant=args.variant,
            allow_pickle=args.allow_pickle_weights,
        )
        teacher.eval().requires_grad_(False)
        pipeline_class = getattr(diffusers, pipeline_class_name(source, args.revision, flag))
        return cls(args, teacher, scheduler, pipeline_class, channels, resolution)

    @classmethod
    def check(cls, args) -> tuple[int, int]:
        """Refuse what can be refused from the configs alone, before any weights load; (channels, resolution).

        Raises:
            UsageError: naming the flag, what was found and what to do.
        """
        teacher = None
        if args.pretrained_model_name_or_path:
            teacher = component_config(
                UNet2DModel, args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", args.revision
            )
        if args.student_preset:
            raise UsageError(
                f"--student_preset {args.student_preset} drops blocks of Stable Diffusion; a pixel U-Net is made "
                "narrower with --pruning_ratio, or built from --student_config."
            )
        if args.latent_cache_dir or args.lora_rank:
            flag = "--latent_cache_dir" if args.latent_cache_dir else "--lora_rank"
            raise UsageError(f"{flag} goes with a latent teacher; this one works in pixels, which need no encoding.")
        for name in TEXT_FLAGS:
            if getattr(args, name):
                warnings.warn(f"--{name} has no effect here: it goes with a text-to-image teacher.", stacklevel=2)
        if args.pruning_ratio is not None:
            flag, student = "--pruning_ratio", width_config(teacher, args.pruning_ratio)
        elif args.student_config:
            flag, student = "--student_config", read_json_config(args.student_config, "--student_config")
        else:
            flag = "--student_model_name_or_path"
            student = component_config(UNet2DModel, args.student_model_name_or_path, flag)
        if student.get("_class_name", "UNet2DModel") != "UNet2DModel":
            raise UsageError(f"{flag}: the student is a {student['_class_name']}; this teacher needs a UNet2DModel.")
        for config, source in ((teacher, "--pretrained_model_name_or_path"), (student, flag)):
            for key in ("num_class_embeds", "class_embed_type") if config else ():
                if config.get(key) is not None:
                    raise UsageError(
                        f"{source}: the U-Net is told a class ({key} is {config[key]}); pixel teachers and students "
                        "here are unconditional. Choose one without classes."
                    )
        for key in ("in_channels", "out_channels") if teacher else ():
            if student.get(key, 3) != teacher.get(key, 3):
                raise UsageError(
                    f"{flag}: the student has {key} {student.get(key, 3)}, the teacher {teacher.get(key, 3)}; both "
                    "must see and predict the same tensor."
                )
        if student.get("in_channels", 3) not in (1, 3, 4):
            raise UsageError(f"{flag}: in_channels is {student['in_channels']}; images have 1, 3 or 4.")
        if student.get("out_channels", 3) != student.get("in_channels", 3):
            raise UsageError(
                f"{flag}: out_channels is {student.get('out_channels', 3)} and in_channels "
                f"{student.get('in_channels', 3)}; they must be equal (learned variances are not supported)."
            )
        try:
            with torch.device("meta"):  # channels that do not fit each other show when the model is built
                UNet2DModel.from_config(student)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"{flag}: diffusers cannot build a UNet2DModel of this config: {error}") from error
        resolution = args.resolution or (teacher or student).get("sample_size")
        if not isinstance(resolution, int):
            raise UsageError(f"--resolution: the config says {resolution}; give a number of pixels.")
        for config, owner in ((teacher, "teacher"), (student, "student")):
            halvings = len(config["block_out_channels"]) - 1 if config else 0
            if resolution % 2**halvings:
                raise UsageError(
                    f"--resolution {resolution}: the {owner}'s U-Net halves it {halvings} times, so it must be a "
                    f"multiple of {2**halvings}."
                )
        group_size = getattr(args, "group_size", 2)
        if group_size > resolution**2:
            raise UsageError(
                f"--group_size {group_size}: a channel of {resolution}x{resolution} has only {resolution**2} elements."
            )
        return student.get("in_channels", 3), resolution

    def transform(self, args) -> ImageTransform:
        """A picklable row -> uint8 pixels."""
        return ImageTransform(args.image_column, self.channels, self.resolution, args.center_crop, args.random_flip)

    def make_student(self, args, batch: dict[str, torch.Tensor]) -> tuple[UNet2DModel, str]:
        """The student in float32 and a table of what it is made of. Taylor scores are taken on `batch`."""
        if args.pruning_ratio is not None:
            scores = None
            if args.student_init == "taylor":
                self.teacher.to(batch["pixels"].device)
                scores = taylor_scores(self.teacher, self._diffusion_losses(batch, args.seed))
            student, report = prune_width(
                self.teacher, args.pruning_ratio, init=args.student_init, scores=scores, seed=args.seed
            )
            table = report.table()
        else:
            if args.student_config:
                with torch.random.fork_rng():
                    torch.manual_seed(args.seed)
                    student = UNet2DModel.from_config(read_json_config(args.student_config, "--student_config"))
            else:
                student = load_component(
                    UNet2DModel,
                    args.student_model_name_or_path,
                    "--student_model_name_or_path",
                    allow_pickle=args.allow_pickle_weights,
                )
            table = model_table(self.teacher and model_size(self.teacher.config), model_size(student.config))
        student.register_to_config(sample_size=self.resolution)
        return student.train(), table

    def _diffusion_losses(self, batch: dict[str, torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
        """The teacher's diffusion loss on one real batch at timesteps across the schedule, from the smallest on, until
        it falls under 5 % of its maximum (Fang et al. 2023: later timesteps add noise to the scores, not signal).
        Each timestep's loss comes in parts that add up to it; the first decides."""
        rng = StepRandom(seed, 0, device=batch["pixels"].device)
        clean, _ = self.encode(batch, rng)
        last = self.scheduler.config.num_train_timesteps - 1
        largest = 0.0
        for t in torch.linspace(0, last, TAYLOR_TIMESTEPS).long().tolist():
            timestep = torch.full((clean.shape[0],), t, device=clean.device)
            noised = self.noise_at(clean, rng.normal(clean.shape), timestep)
            for first in range(0, clean.shape[0], TAYLOR_PART):
                part = slice(first, first + TAYLOR_PART)
                output = self.teacher(noised.x_t[part], timestep[part], return_dict=False)[0]
                loss = (output - noised.target[part]).square().sum() / noised.target.numel()
                if first == 0:
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

    def example(self) -> dict[str, torch.Tensor]:
        """Forward arguments of one sample, for the shapes of things."""
        size = (1, self.channels, self.resolution, self.resolution)
        return {"x_t": torch.zeros(size), "timestep": torch.zeros(1, dtype=torch.long)}

    def encode(self, batch: dict[str, torch.Tensor], rng: StepRandom) -> tuple[torch.Tensor, dict]:
        """Uint8 pixels (B, C, H, W) -> float32 in [-1, 1], and the condition: none."""
        return batch["pixels"].float() / 127.5 - 1, {}

    def add_noise(self, clean: torch.Tensor, rng: StepRandom) -> Noised:
        """Noise at random timesteps, one per sample."""
        timestep = self.random_timesteps(clean.shape[0], rng)
        return self.noise_at(clean, rng.normal(clean.shape), timestep)

    def conditions(self, dataset, first: int, count: int, num_prompts: int | None = None) -> list[None]:
        """What the samples `first` and on are of: nothing is asked for."""
        return [None] * count

    def pipeline(self, denoiser: UNet2DModel) -> DiffusionPipeline:
        """The stock pipeline of the teacher's own class and scheduler settings, for export."""
        return self.pipeline_class(unet=denoiser, scheduler=self.scheduler)

    def save(self, denoiser: UNet2DModel, folder: Path) -> None:
        """Write the stock pipeline to `folder`."""
        save_pipeline(self.pipeline(denoiser), folder)

    @torch.no_grad()
    def sample(
        self, denoiser: torch.nn.Module, seeds: Sequence[int], num_inference_steps: int, conditions: Sequence = ()
    ) -> torch.Tensor:
        """DDIM samples (eta 0), uint8 (B, C, H, W) on the CPU; a sample depends on its seed and the model alone."""
        pipeline = DDIMPipeline(unet=InFloat32(denoiser), scheduler=DDIMScheduler.from_config(self.scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on any device
        images = pipeline(
            batch_size=len(generators), generator=generators, num_inference_steps=num_inference_steps, output_type="np"
        ).images
        return to_uint8(images)
