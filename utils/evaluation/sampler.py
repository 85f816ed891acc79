# SPDX-License-Identifier: Apache-2.0
"""Any diffusers pipeline as a function from (seed, index) to an image.

What a pipeline takes is read off its `__call__`, so there is no list of families. Every sample has a generator of its
own, seeded from (seed, index): its noise depends on no batch, device or number of processes. Its last bits do depend
on the batch it is drawn in, as convolutions sum in another order; so samples are drawn in fixed blocks of indices.
"""

import copy
import functools
import inspect
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline

from utils.backbones.stand_in import GuidedLabels
from utils.command_line import UsageError
from utils.data.labels import class_names, label_names
from utils.evaluation.conditions import LISTED, described, num_classes
from utils.evaluation.pipelines import clips, decoder_of, denoiser_of
from utils.randomness import VALIDATION_STREAM, seed_from

# the noise of a run's own validation, so that the same seed, steps and batch size measure the very same samples
STREAM = VALIDATION_STREAM
SETTINGS = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")  # of a pipeline's call


class Sampler:
    """Draws the samples of a list of indices."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        class_labels: Sequence[int] | None = None,
        guidance_channels: int | None = None,
        prompts: Sequence[str] | None = None,
    ):
        """What is None is left to the pipeline. Sample i gets label or prompt i % their number. `guidance_channels`:
        as `GuidedLabels`.

        Raises:
            UsageError: an argument that pipeline or scheduler do not take, or one missing that they need.
        """
        self.pipeline, self.seed, self.eta = pipeline, seed, eta
        self.name = type(pipeline).__name__
        self.takes = inspect.signature(pipeline.__call__).parameters
        self.class_labels, self.prompts, self.guidance_channels = class_labels, prompts, guidance_channels
        self.draws_ambient_noise: bool | None = None  # from PyTorch's global generator; the first block shows it
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "max_sequence_length": max_sequence_length,
        }
        self.options = {name: value for name, value in given.items() if value is not None}
        self._check()

    def _check(self) -> None:
        for name in self.options:
            if name not in self.takes:
                raise UsageError(f"--{name} has no effect: a {self.name} does not take it. Leave it out.")
        for name, values in (("class_labels", self.class_labels), ("prompt", self.prompts)):
            if values is not None and name not in self.takes:
                raise UsageError(f"--{name.replace('prompt', 'prompts')} has no effect: a {self.name} takes none.")
        if "prompt" in self.takes and not self.prompts:
            raise UsageError(
                f"a {self.name} draws what a prompt says: give --prompts FILE, one a line, or --caption_column, a "
                "column of --dataset_name."
            )
        if self.guidance_channels and not self._guides_labels():
            raise UsageError(
                f"--guidance_channels has no effect: it is for a DiTPipeline with --guidance_scale above 1, this is a "
                f"{self.name} with {self._default('guidance_scale')}. Leave it out."
            )
        config = denoiser_of(self.pipeline).config
        if "class_labels" in self.takes:
            self._check_labels(num_classes(self.pipeline))
        elif config.get("num_class_embeds") or config.get("class_embed_type"):
            raise UsageError(f"the model of this {self.name} needs class labels, which a {self.name} cannot give it.")
        filled = {"batch_size", "prompt", "class_labels"}
        needed = [p.name for p in self.takes.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if unknown := [name for name in needed if name not in filled]:
            raise UsageError(f"a {self.name} needs {', '.join(unknown)}, which this script cannot give it.")
        factor = self._pixels_per_latent() or 1
        for name in ("height", "width"):
            if self.options.get(name, 0) % factor:
                raise UsageError(f"--{name} is {self.options[name]}; a {self.name} draws multiples of {factor}.")
        if self.eta is not None and "eta" not in inspect.signature(self.pipeline.scheduler.step).parameters:
            raise UsageError(
                f"--eta has no effect: a {type(self.pipeline.scheduler).__name__} does not take it. Leave it out, or "
                "add --scheduler DDIMScheduler."
            )
        try:
            shifted = self.pipeline.scheduler.config.get("use_dynamic_shifting")  # by a mu that the pipeline computes
            options = {"mu": 1.0} if shifted else {}
            self._scheduler([]).set_timesteps(self._default("num_inference_steps"), **options)
        except (ValueError, IndexError) as error:
            raise UsageError(f"--num_inference_steps {self._default('num_inference_steps')}: {error}") from error

    def _check_labels(self, count: int | None) -> None:
        if self.class_labels is None:
            optional = self.takes["class_labels"].default is not inspect.Parameter.empty
            if count is None and optional:  # a model without classes, of a pipeline that may have them
                return
            if count is None:
                raise UsageError(
                    f"--class_labels: this {self.name} does not say how many classes it knows; list them."
                )
            self.class_labels = range(count)
        if count is not None and not all(0 <= label < count for label in self.class_labels):
            raise UsageError(f"--class_labels: this {self.name} knows the labels 0 to {count - 1}.")

    def _guides_labels(self) -> bool:
        """Whether every sample is drawn with its label and with that of none, as DiTPipeline does."""
        return "class_labels" in self.takes and (self._default("guidance_scale") or 0) > 1

    def _default(self, name: str):
        return self.options.get(name, self.takes[name].default if name in self.takes else None)

    @property
    def protocol(self) -> dict:
        """Everything but the weights that decides the samples."""
        scheduler = self.pipeline.scheduler
        step_takes = inspect.signature(scheduler.step).parameters
        return {
            "pipeline": self.name,
            "scheduler": type(scheduler).__name__,
            "clip_sample": scheduler.config.clip_sample if clips(scheduler) else None,
            "scheduler_config": {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")},
            **{name: self._default(name) for name in SETTINGS},
            "eta": step_takes["eta"].default if self.eta is None and "eta" in step_takes else self.eta,
            "guidance_channels": self.guidance_channels,
            "class_labels": described(self.class_labels, LISTED),
            "prompts": described(self.prompts),
            "seed": self.seed,
            "dtype": str(denoiser_of(self.pipeline).dtype).removeprefix("torch."),
            "device": self.pipeline.device.type,
        }

    def described(self) -> list[str]:
        """What samples are of in words, over and over; empty where they are of nothing in particular."""
        if self.class_labels:
            return label_names(self.class_labels, class_names(self.pipeline.config))
        return list(self.prompts or [])

    def size(self) -> tuple[int, int] | None:
        """Height and width of a sample, as the pipelines themselves work them out; None if that cannot be told."""
        given, factor = [self._default(name) for name in ("height", "width")], self._pixels_per_latent()
        side = denoiser_of(self.pipeline).config.get("sample_size")
        if side is None or factor is None:
            return tuple(given) if all(given) else None
        sides = (side, side) if isinstance(side, int) else side
        return tuple(wanted or own * factor for wanted, own in zip(given, sides, strict=True))

    def _pixels_per_latent(self) -> int | None:
        """1 where the denoiser works on pixels, None if the pipeline does not say."""
        if factor := getattr(self.pipeline, "vae_scale_factor", None):
            return factor
        if (decoder := decoder_of(self.pipeline)) is None:
            return 1
        widths = decoder.config.get("block_out_channels")
        return 2 ** (len(widths) - 1) if widths else None

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> torch.Tensor:
        """Uint8 (B, C, H, W) on the CPU, C 1 or 3.

        Raises:
            UsageError: the pipeline gives no images, or refuses its arguments.
            FloatingPointError: a sample is not finite.
        """
        generators = [torch.Generator().manual_seed(seed_from(self.seed, STREAM, index)) for index in indices]
        torch.manual_seed(seed_from(self.seed, STREAM + 1, indices[0]))  # of noise drawn without a generator
        conditions = {
            "batch_size": len(indices),
            "class_labels": self.class_labels and [self.class_labels[i % len(self.class_labels)] for i in indices],
            "prompt": self.prompts and [self.prompts[i % len(self.prompts)] for i in indices],
        }
        conditions = {name: value for name, value in conditions.items() if name in self.takes}
        state = torch.get_rng_state()
        images = self._pipeline(generators)(
            generator=generators, output_type="pt", **conditions, **self.options
        ).images
        if isinstance(images, np.ndarray):  # (B, H, W, C), of the oldest pipelines, which know no "pt"
            images = torch.from_numpy(images).permute(0, 3, 1, 2)
        if self.draws_ambient_noise is None:
            self.draws_ambient_noise = not torch.equal(state, torch.get_rng_state())
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
            found = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise UsageError(f"a {self.name} gives {found}; only images of 1 or 3 channels can be measured.")
        if not images.isfinite().all():
            raise FloatingPointError(
                f"samples {indices[0]} to {indices[-1]} are not finite: in half precision some models overflow (the "
                "VAE of SDXL in fp16); try --dtype bf16 or fp32."
            )
        return (images.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)

    def _pipeline(self, generators: list[torch.Generator]) -> DiffusionPipeline:
        """The pipeline for one block: its models, and copies of what changes in a call, scheduler and tokenizers, so
        that several threads may sample."""
        pipeline = copy.copy(self.pipeline)
        for name, part in self.pipeline.components.items():
            if not isinstance(part, torch.nn.Module):
                setattr(pipeline, name, copy.deepcopy(part))
        if self._guides_labels():  # DiTPipeline takes 1000 for no label; a model of another number of classes its own
            denoiser = denoiser_of(pipeline)
            pipeline.transformer = GuidedLabels(denoiser, denoiser.config.num_embeds_ada_norm, self.guidance_channels)
        pipeline.scheduler = self._scheduler(generators)
        return pipeline

    def _scheduler(self, generators: list[torch.Generator]):
        """A fresh scheduler, which remembers no earlier block. From any pipeline its step gets eta and the samples'
        generators (DDPMPipeline knows no eta, DiTPipeline passes no generator) and nothing that it does not take."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        step, takes = scheduler.step, inspect.signature(scheduler.step).parameters

        @functools.wraps(step)
        def step_of_samples(model_output, timestep, sample, **options):
            if self.eta is not None:
                options["eta"] = self.eta
            # under guidance DiTPipeline steps conditional and unconditional half together and drops the second
            options["generator"] = generators * (len(sample) // len(generators))
            return step(model_output, timestep, sample, **{k: v for k, v in options.items() if k in takes})

        scheduler.step = step_of_samples
        return scheduler
