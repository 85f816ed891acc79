# SPDX-License-Identifier: Apache-2.0
"""Samples while training: a grid of teacher and student from the same noise, and a feature distance to real images."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from tqdm.auto import tqdm

from utils.backbones.stand_in import InAutocast
from utils.command_line import announce
from utils.counts import counted
from utils.data.rows import ImageRows, load_rows
from utils.distributed import on_main_process
from utils.files import write_file, write_json
from utils.grids import image_grid, writable
from utils.metrics.distances import frechet_distance
from utils.metrics.extractors import FeatureExtractor
from utils.metrics.statistics import FeatureStatistics
from utils.randomness import VALIDATION_STREAM, seed_from
from utils.training.optimizer import with_gradients

logger = get_logger(__name__)


class Validation:
    """Draws the grids and keeps the distances; does its work on the main process only."""

    def __init__(self, args, accelerator: Accelerator, backbone, student: nn.Module, dataset):
        """`student` still as it was made: a copy is kept, to be measured beside the trained one. `dataset` is what the
        backbone may take prompts from.

        Raises:
            UsageError: `--validation_feature_extractor` is no image model, or `--validation_split` no split.
        """
        self.args, self.accelerator, self.backbone, self.dataset = args, accelerator, backbone, dataset
        self.folder = Path(args.output_dir)
        self.distances: dict[str, float] = {}  # who -> Frechet distance
        self.best: tuple[float, int] | None = None
        self.teacher_images: torch.Tensor | None = None
        self.extractor = None
        if args.validation_feature_extractor:
            on_main_process(accelerator, self._prepare_distance, student)

    def _prepare_distance(self, student: nn.Module) -> None:
        self.extractor = FeatureExtractor(self.args.validation_feature_extractor, device=self.accelerator.device)
        split = self.args.validation_split or self.args.train_split
        self.real_rows = load_rows(self.args, split, split_flag="--validation_split")
        self.untrained = copy.deepcopy(student).cpu().eval()

    @functools.cached_property
    def reference(self) -> FeatureStatistics:
        """Of the real images; computed when first needed, as training need not wait for it."""
        return self._statistics(self._real_images())

    def measure_references(self) -> None:
        """Distances to read the student's beside: noise, the student before training, the teacher."""
        if self.extractor is None:
            return
        with self._at_any_rate("the references"):
            announce("measuring the distance of noise, of the student before training and of the teacher")
            self.distances = {"noise": self._distance(self._noise_images()), **self.distances}
            untrained = self._sampled(self.untrained.to(self.accelerator.device), "the student before training")
            distance = self._distance(untrained)
            self.distances = {"noise": self.distances["noise"], "student before training": distance, **self.distances}
            if self.backbone.teacher is not None:
                self.distances["teacher"] = self._distance(self._sampled(self.backbone.teacher, "the teacher"))

    def run(self, student: nn.Module, step: int) -> dict[str, float]:
        """Grid and distance of `student`, as it is inside `evaluated`; values to log."""
        values = {}
        if not self.accelerator.is_main_process:
            return values
        with self._at_any_rate(f"step {step}"):
            if self.extractor is not None:
                announce(f"measuring the student's distance at step {step:,}")
                distance = self._distance(self._sampled(student, "the student"))
                self.distances["student"] = values["frechet_distance"] = distance
                if self.best is None or distance < self.best[0]:
                    self.best = (distance, step)
                    self.backbone.save(student, self.folder / "best")
                    write_json(self.folder / "best" / "distance.json", {"step": step, "frechet_distance": distance})
        if self.args.validation_shown_samples:  # behind the distance that it names, and without one that overflowed
            with self._at_any_rate(f"step {step}, its grid,"):
                self._grid(student, step, values.get("frechet_distance"))
        return values

    @contextlib.contextmanager
    def _at_any_rate(self, what: str) -> Iterator[None]:
        """Samples that overflow end a validation, not the run: its weights may be sound, in another dtype at least."""
        try:
            yield
        except FloatingPointError as error:
            logger.warning(f"The validation of {what} was left out: {error}")

    @property
    def condition(self):
        """What the first sample is of: a prompt or a class of the data, None where there is neither."""
        return self.backbone.conditions.of_samples(self.dataset, 0, 1)[0]

    def state(self) -> dict:
        """What a resumed run must know."""
        return {"distances": self.distances, "best": self.best}

    def load_state(self, state: dict, step: int) -> None:
        """Go on from `state`."""
        self.distances = state["distances"]
        self.best = tuple(state["best"]) if state["best"] else None

    def _seeds(self, first: int, count: int) -> list[int]:
        return [seed_from(self.args.seed, VALIDATION_STREAM, first + i) for i in range(count)]

    def _title(self, step: int, distance: float | None) -> str:
        """What a grid shows, and the distance with what it has to be read with."""
        guidance = self.backbone.sampling_options.get("guidance_scale")
        how = f"{self.backbone.process.name}, {counted(self.args.validation_num_inference_steps, 'step')}"
        how += "" if guidance is None else f", guidance {guidance:g}"
        title = f"step {step:,} of {self.args.max_train_steps:,}; {how}"
        if distance is None:
            return title
        samples = counted(self.args.validation_num_samples, "sample")
        name = Path(self.args.validation_feature_extractor).name
        return f"{title}\nFrechet distance of the student {distance:.4g}: {samples}, features of {name}"

    def _grid(self, student: nn.Module, step: int, distance: float | None) -> None:
        """Above the teacher, below the student, column by column from the same noise."""
        announce(f"sampling the grid of step {step:,}")
        count = self.args.validation_shown_samples
        rows = {"student": self._draw(student, 0, count)}
        if self.backbone.teacher is not None:
            if self.teacher_images is None:
                self.teacher_images = self._draw(self.backbone.teacher, 0, count)
            rows = {"teacher": self.teacher_images, **rows}
        conditions = self.backbone.conditions
        words = conditions.described(conditions.of_samples(self.dataset, 0, count))
        grid = image_grid(rows, columns=writable(words), title=self._title(step, distance))
        grid.save(self.folder / "samples.png")
        (self.folder / "samples").mkdir(exist_ok=True)
        grid.save(self.folder / "samples" / f"step-{step:07d}.png")
        if words:  # whole, where a grid has no room or no letters for them
            numbered = (f"{number} {' '.join(text.split())}\n" for number, text in enumerate(words, start=1))
            write_file(self.folder / "samples" / "columns.txt", "".join(numbered))
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=step, **layout)

    def _distance(self, batches: Iterator[torch.Tensor]) -> float:
        statistics = self._statistics(batches)
        return frechet_distance(self.reference.mean, self.reference.cov, statistics.mean, statistics.cov)

    def _statistics(self, batches: Iterator[torch.Tensor]) -> FeatureStatistics:
        statistics = FeatureStatistics()
        for images in batches:
            statistics.update(self.extractor(images.to(self.accelerator.device)))
        return statistics

    def _batches(self, description: str, count: int) -> Iterator[tuple[int, int]]:
        """(first index, size) of blocks; fixed blocks, as a sample's last bits depend on the batch it is in."""
        size = self.args.validation_batch_size
        firsts = range(0, count, size)
        for first in tqdm(firsts, desc=description, leave=False, disable=not self.accelerator.is_local_main_process):
            yield first, min(size, count - first)

    def _sampled(self, denoiser: nn.Module, who: str) -> Iterator[torch.Tensor]:
        for first, size in self._batches(f"sampling {who}", self.args.validation_num_samples):
            yield self._draw(denoiser, first, size)

    def _draw(self, denoiser: nn.Module, first: int, count: int) -> torch.Tensor:
        """Samples `first` and on, each by its own seed."""
        conditions = self.backbone.conditions.of_samples(self.dataset, first, count)
        return self.backbone.sample(
            InAutocast(denoiser, self.accelerator.autocast),
            self._seeds(first, count),
            self.args.validation_num_inference_steps,
            conditions,
        )

    def _noise_images(self) -> Iterator[torch.Tensor]:
        shape = (self.backbone.image_channels, self.backbone.resolution, self.backbone.resolution)
        for first, size in self._batches("noise", self.args.validation_num_samples):
            noise = torch.randn((size, *shape), generator=torch.Generator().manual_seed(self._seeds(first, 1)[0]))
            yield ((noise.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def _real_images(self) -> Iterator[torch.Tensor]:
        transform = self.backbone.transform(self.args, plain=True)
        transform.center_crop, transform.random_flip = True, False
        rows = ImageRows(self.real_rows, transform, seed=0, skip_bad_images=self.args.skip_bad_images, quiet=True)
        for first, size in self._batches("real images", len(rows)):
            yield rows.__getitems__([(0, row) for row in range(first, first + size)])["pixels"]


@contextlib.contextmanager
def evaluated(model: nn.Module, ema):
    """Inside, `model` is in eval mode and holds the EMA weights; without an EMA, its own."""
    model.eval()
    weights = with_gradients(model)
    if ema is not None:
        ema.store(weights)
        ema.copy_to(weights)
    try:
        yield model
    finally:
        if ema is not None:
            ema.restore(weights)
        model.train()
