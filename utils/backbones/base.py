# SPDX-License-Identifier: Apache-2.0
"""The contract of a backbone: what the scripts ask of a denoiser, and the answers that all families share.

A backbone composes a process (`diffusion.py` or `flow.py`), a condition (`conditions.py`) and a denoiser's class. To
add a family, write one file with a subclass and name its pipelines in `__init__.py`; nothing else in the repository
knows one.

What a subclass must say: `component`, `model_class`, `make_student`, `feature_pairs`, `sampling_pipeline`, `save`.
What it may say otherwise: everything else. Shapes: B batch, C channels of what the denoiser sees, *S its places.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from utils.backbones.conditions import Nothing
from utils.backbones.diffusion import Diffusion
from utils.backbones.flow import Flow
from utils.backbones.loading import OLD_NAMES, TEACHER, component_config, load_component, read_json_config
from utils.backbones.process import Noised, Process
from utils.backbones.stand_in import InFloat32
from utils.command_line import UsageError
from utils.data.transforms import ImageTransform
from utils.distillation.features import Tapped
from utils.pixels import to_uint8
from utils.randomness import StepRandom
from utils.students.sizes import full_config

# Flags that only some families read -> their value when they are off. Given to another family, those of `DECISIVE`
# are refused, as without them another student would be trained; the rest are warned of.
FAMILY_FLAGS = {
    **dict.fromkeys(("pruning_ratio", "student_preset", "lora_rank", "latent_cache_dir")),
    **dict.fromkeys(("student_depth", "kept_layers", "layer_choice", "label_column", "validation_guidance_channels")),
    **dict.fromkeys(("caption_column", "proportion_empty_prompts", "pretrained_vae_model_name_or_path")),
    **dict.fromkeys(("cache_variants", "validation_prompts", "validation_guidance_scale", "max_sequence_length")),
    "fuse_lora": False,
    **dict.fromkeys(("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "snr_gamma")),
    "antithetic_timesteps": False,
    "input_perturbation": 0.0,
    "noise_offset": 0.0,
}
DECISIVE = {"pruning_ratio", "student_preset", "student_depth", "kept_layers", "lora_rank", "latent_cache_dir"}
DECISIVE |= Diffusion.flags | Flow.flags


class Prediction(NamedTuple):
    """What a denoiser said of a noisy batch, in float32."""

    output: Tensor  # (B, C, *S), what LIFT and PLACE compare
    variance: Tensor | None  # (B, C, *S), of denoisers that predict it too
    features: list[Tensor]  # of the tapped blocks, in the order of the pairs; the student's are projected


class Configs(NamedTuple):
    """What `check` read and found good."""

    teacher: dict | None
    student: dict
    resolution: int  # pixels a side
    vae: dict | None  # of latent families
    process: Process


class Backbone:
    """A family of denoisers, with its teacher. `args` are the flags of a training script."""

    component: ClassVar[str]  # the denoiser's folder in its pipeline: unet, transformer
    model_class: ClassVar[type[ModelMixin]]
    process_class: ClassVar[type[Process]] = Diffusion
    bounded: ClassVar[bool] = True  # clean data lie in [-1, 1]
    must_match: ClassVar[Sequence[str]] = ("in_channels", "out_channels")  # config keys, in teacher and student
    sampled_by: ClassVar[str] = "DiffusionPipeline"  # of diffusers, what a sample of the student is drawn with
    told: ClassVar[str] = "teachers and students here are unconditional"
    flags: ClassVar[frozenset[str]] = frozenset()  # those of FAMILY_FLAGS that it reads, its process's left out
    instead: ClassVar[dict[str, str]] = {}  # a decisive flag that it does not read -> what to do here

    image_channels: int  # of the images that `sample` gives
    sampling_options: dict[str, Any]  # of the stock pipeline's call in `sample`, such as a guidance_scale

    def __init__(self, args, teacher: ModelMixin | None, configs: Configs):
        self.args, self.teacher, self.process, self.conditions = args, teacher, configs.process, Nothing()
        self.configs, self.resolution, self.sampling_options = configs, configs.resolution, {}

    # --- Loading: everything that can be refused is, from the configs alone, before weights load

    @classmethod
    def load(cls, args) -> "Backbone":
        """The teacher on the CPU, in `teacher_dtype`, eval mode, no gradients; none where none is named.

        Raises:
            UsageError: see `check` and `Process.load`.
        """
        configs, teacher = cls.check(args), None
        if args.pretrained_model_name_or_path:
            teacher = load_component(
                cls.model_class,
                cls.component,
                args.pretrained_model_name_or_path,
                TEACHER,
                revision=args.revision,
                variant=args.variant,
                allow_pickle=args.allow_pickle_weights,
                dtype=cls.teacher_dtype(args),
            )
            teacher.eval().requires_grad_(False)
        return cls(args, teacher, configs)

    @classmethod
    def teacher_dtype(cls, args) -> torch.dtype:
        """What the teacher loads in, before its student is made of it; `apply_speed_flags` casts it to the one that
        it then runs in."""
        return torch.float32

    @classmethod
    def check(cls, args) -> Configs:
        """Refuse what can be refused before any weights load.

        Raises:
            UsageError: naming the flag, what was found and what to do.
        """
        cls.check_flags(args)
        process = cls.process_class.load(args, bounded=cls.bounded)  # another one is refused first
        teacher, vae = None, cls.vae_config(args)
        if args.pretrained_model_name_or_path:
            source = args.pretrained_model_name_or_path
            teacher = component_config(cls.model_class, cls.component, source, TEACHER, args.revision)
            if found := cls.other_class(teacher):
                raise UsageError(
                    f"{TEACHER} {source}: its {cls.component} is a {found}, not a {cls.model_class.__name__}."
                )
            cls.check_denoiser(full_config(teacher, cls.model_class), TEACHER)
        flag, student = cls.student_config(args, teacher)
        if found := cls.other_class(student):
            raise UsageError(f"{flag}: the student is a {found}; this teacher needs a {cls.model_class.__name__}.")
        cls.check_denoiser(full_config(student, cls.model_class), flag)
        owners = {"teacher": teacher, "student": student}
        full = {owner: full_config(config, cls.model_class) for owner, config in owners.items() if config}
        for key in cls.must_match if teacher else ():
            ours, theirs = (full[owner][key] for owner in ("student", "teacher"))
            if key == "out_channels":  # null is a transformer's word for as many as come in
                ours, theirs = (value or full["teacher"]["in_channels"] for value in (ours, theirs))
            if ours != theirs:
                raise UsageError(
                    f"{flag}: the student has {key} {ours}, the teacher {theirs}; both must see and predict the same."
                )
        cls.check_more(args, full.get("teacher"), full["student"], flag)
        try:
            with torch.device("meta"):  # channels that do not fit each other show when the model is built
                cls.model_class.from_config(student)
        except (ValueError, TypeError, RuntimeError) as error:
            name = cls.model_class.__name__
            raise UsageError(f"{flag}: diffusers cannot build a {name} of this config: {error}") from error
        factor = 1 if vae is None else vae_factor(vae)
        resolution = args.resolution or cls.own_resolution(full.get("teacher") or full["student"], factor)
        if not isinstance(resolution, int):
            raise UsageError(f"--resolution: the config says {resolution}; give a number of pixels.")
        for owner, config in full.items():
            least = factor * cls.divisor(config)
            if resolution % least:
                by = f"the VAE divides it by {factor}, then " if vae else ""
                raise UsageError(
                    f"--resolution {resolution}: {by}the {owner}'s {cls.model_class.__name__} divides it by "
                    f"{cls.divisor(config)}, so it must be a multiple of {least}."
                )
        side = resolution // factor
        if (group_size := getattr(args, "group_size", 2)) > side**2:
            raise UsageError(f"--group_size {group_size}: a channel of {side}x{side} has only {side**2} elements.")
        if getattr(args, "grouping", "error") == "patch" and side % math.isqrt(group_size):
            raise UsageError(
                f"--grouping patch --group_size {group_size}: squares of that many elements do not tile {side}x{side}."
            )
        return Configs(teacher, student, resolution, vae, process)

    @classmethod
    def other_class(cls, config: dict) -> str | None:
        """The class that a config names, where it is not this family's under its name or its old one."""
        name = cls.model_class.__name__
        found = config.get("_class_name", name)
        return None if found in (name, OLD_NAMES.get(name)) else found

    @classmethod
    def check_flags(cls, args) -> None:
        """Flags of other families: refused or warned of, see `FAMILY_FLAGS`."""
        for name in sorted(FAMILY_FLAGS.keys() - cls.flags - cls.process_class.flags):
            if getattr(args, name) == FAMILY_FLAGS[name]:
                continue
            called = getattr(args, "called", {}).get(name, name)  # analyze_error.py has other names for some
            if name in DECISIVE:
                instead = {**cls.process_class.instead, **cls.instead}.get(name, "leave it out")
                found = f"--{called} {getattr(args, name)}"
                raise UsageError(f"{found} does not go with a {cls.model_class.__name__} teacher: {instead}.")
            warnings.warn(
                f"--{called} has no effect here: a {cls.model_class.__name__} teacher does not read it.", stacklevel=2
            )

    @classmethod
    def student_config(cls, args, teacher: dict | None) -> tuple[str, dict]:
        """(the flag that says what the student is, its config)."""
        if args.student_config:
            return "--student_config", read_json_config(args.student_config, "--student_config")
        flag = "--student_model_name_or_path"
        return flag, component_config(cls.model_class, cls.component, args.student_model_name_or_path, flag)

    @classmethod
    def check_denoiser(cls, config: dict, flag: str) -> None:
        """Refuse a teacher or student that is told what nobody tells it here; `config` is whole, defaults filled
        in."""
        for key in ("num_class_embeds", "class_embed_type"):
            if config.get(key) is not None:
                raise UsageError(
                    f"{flag}: the {cls.component} is told a class ({key} is {config[key]}); {cls.told}. Choose one "
                    "without classes."
                )

    @classmethod
    def check_more(cls, args, teacher: dict | None, student: dict, flag: str) -> None:
        """What else a family refuses; the configs are whole, defaults filled in."""

    @classmethod
    def vae_config(cls, args) -> dict | None:
        """Of latent families."""
        return None

    @classmethod
    def own_resolution(cls, config: dict, factor: int):
        """Pixels a side that a denoiser was made for; `factor` pixels a side are one place of what it sees."""
        return config["sample_size"] * factor if isinstance(config["sample_size"], int) else config["sample_size"]

    @classmethod
    def divisor(cls, config: dict) -> int:
        """The sides of what the denoiser sees must be a multiple of it."""
        return 2 ** (len(config["block_out_channels"]) - 1)

    # --- Students

    def images_for_student(self, args) -> int:
        """How many real images may help to make it."""
        return args.train_batch_size

    def make_student(self, args, batch: dict[str, Tensor]) -> tuple[ModelMixin, str]:
        """The student in float32 and a table of what it is made of; `batch`, real images, may help to choose."""
        raise NotImplementedError

    def given_student(self, args) -> ModelMixin:
        """That of `--student_config`, fresh under the seed, or of `--student_model_name_or_path`; in float32."""
        if args.student_config:
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)
                return self.model_class.from_config(read_json_config(args.student_config, "--student_config"))
        flag, pickled = "--student_model_name_or_path", args.allow_pickle_weights
        source = args.student_model_name_or_path
        return load_component(self.model_class, self.component, source, flag, allow_pickle=pickled)

    def feature_pairs(self, student: ModelMixin) -> list[tuple[str, str]]:
        """(student block, teacher block) by module name: whose outputs feature distillation compares.

        Raises:
            UsageError: the two have no matching blocks.
        """
        raise NotImplementedError

    # --- Training

    def transform(self, args, *, plain: bool = False) -> ImageTransform:
        """A picklable row -> tensors of a batch; `plain`, of its pixels alone."""
        conditions = Nothing() if plain else self.conditions
        return conditions.transform(
            args.image_column,
            self.image_channels,
            self.resolution,
            args.center_crop,
            args.random_flip,
            crop=args.crop,
            interpolation=args.image_interpolation_mode,
            background=args.background,
        )

    def encode(self, batch: dict[str, Tensor], rng: StepRandom) -> tuple[Tensor, dict[str, Any]]:
        """Clean data (B, C, *S), float32, and the denoiser's keywords of the condition, some of them dropped."""
        return batch["pixels"].float() / 127.5 - 1, self.conditions.drop(batch, rng)

    def add_noise(self, clean: Tensor, rng: StepRandom) -> Noised:
        """Noise at random places, one a sample."""
        return self.process.add_noise(clean, rng)

    def predict(self, model: Tapped, noised: Noised, condition: dict[str, Any]) -> Prediction:
        """The model's prediction in float32; what it is given is cast to the dtype that its weights are in."""
        output, features = model(noised.x_t, timestep=noised.time, **condition)
        return Prediction(*self.read(output.float()), features)

    def read(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what LIFT and PLACE compare, the variance where the denoiser predicts one), both (B, C, *S)."""
        return output, None

    def task_terms(self, prediction: Prediction, noised: Noised) -> dict[str, Tensor]:
        """The task loss, a sum of scalars that are logged by name: the mean squared error to the target, weighted per
        sample by the process, as `task`."""
        if noised.weight is None:
            return {"task": F.mse_loss(prediction.output, noised.target)}
        error = (prediction.output - noised.target).square().flatten(1).mean(dim=1)
        return {"task": (noised.weight * error).mean()}

    def distillation_terms(self, student: Prediction, teacher: Prediction, noised: Noised) -> dict[str, Tensor]:
        """What beside the output is distilled, as scalars by name: nothing, where there is no variance."""
        return {}

    def example(self) -> dict[str, Any]:
        """Forward arguments of one sample, for the shapes of things."""
        raise NotImplementedError

    # --- Samples and the student as a pipeline

    def sampling_denoiser(self, denoiser: nn.Module) -> nn.Module:
        """What stands in the pipeline for `denoiser`."""
        return InFloat32(denoiser)

    def sampling_pipeline(self, denoiser: nn.Module) -> DiffusionPipeline:
        """The stock pipeline that samples with the process's own sampler."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self, denoiser: nn.Module, seeds: Sequence[int], num_inference_steps: int, conditions: Sequence | None = None
    ) -> Tensor:
        """Uint8 (B, C, H, W) on the CPU; a sample depends on its seed, its condition and the model alone. `conditions`
        as `Nothing.of_samples` and its kin give them.

        Raises:
            FloatingPointError: a sample is not finite.
        """
        pipeline = self.sampling_pipeline(self.sampling_denoiser(denoiser))
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on any device
        images = pipeline(
            generator=generators,
            num_inference_steps=num_inference_steps,
            output_type="np",
            **self.conditions.pipeline_arguments(conditions or [None] * len(seeds)),
            **self.sampling_options,
        ).images
        return to_uint8(images)

    def sampling_code(self, folder: str, num_inference_steps: int, condition: Any) -> str:
        """A line of Python that saves one picture of the student, as `sample` draws it and stock diffusers alone;
        `folder` is written as a string of Python's, `condition` is one of `of_samples`."""
        load = ", ".join([folder, *(f"{part}=None" for part in self.conditions.absent)])
        load = f"p = P.from_pretrained({load}); {self.adapters(folder)}"
        given = self.sampling_arguments(num_inference_steps, condition)
        return f'from diffusers import {self.sampled_by} as P; {load}p({given}).images[0].save("sample.png")'

    def sampling_arguments(self, num_inference_steps: int, condition: Any) -> str:
        """Those of the stock pipeline's call for one sample, as Python's."""
        told = self.conditions.call(condition)
        options = {"num_inference_steps": num_inference_steps, **self.sampling_options}
        return ", ".join(f"{name}={value}" for name, value in {**told, **options, **told}.items())

    def adapters(self, folder: str) -> str:
        """The statement of `sampling_code` that loads what lies beside the student's own weights."""
        return ""

    def save(self, denoiser: ModelMixin, folder: Path) -> None:
        """Write the stock pipeline to `folder`."""
        raise NotImplementedError


def vae_factor(vae_config: dict) -> int:
    """Pixels a side of one latent."""
    return 2 ** (len(vae_config.get("block_out_channels", (64,))) - 1)
