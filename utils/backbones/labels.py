# SPDX-License-Identifier: Apache-2.0
"""Class labels as a condition: one of a model's classes, or none."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.backbones.conditions import Nothing
from utils.data.labels import LabelTransform, label_names
from utils.randomness import StepRandom


class Labels(Nothing):
    """One of `num_classes` classes, or none, whose label is `num_classes`."""

    def __init__(self, args, num_classes: int, class_names: Mapping[int, str]):
        self.label_column, self.num_classes = args.label_column or "label", num_classes
        self.class_names = class_names  # what the teacher calls them, where it says
        self.share_dropped = 0.1 if args.proportion_empty_prompts is None else args.proportion_empty_prompts

    def call(self, condition: int) -> dict[str, str]:
        """The class; without guidance where `DiTPipeline`'s label of none, 1000, is not this model's."""
        return {"class_labels": f"[{condition}]"} | ({} if self.num_classes == 1000 else {"guidance_scale": "1"})

    def transform(self, *image_settings, **more_settings) -> LabelTransform:
        """Pixels and labels."""
        return LabelTransform(
            *image_settings,
            label_column=self.label_column,
            num_classes=self.num_classes,
            class_names=self.class_names,
            **more_settings,
        )

    def settings(self) -> dict[str, Any]:
        """The column that the labels are in."""
        return {"label_column": self.label_column}

    def kept(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The labels."""
        return {"label": batch["label"]}

    def drop(self, rows: dict[str, Tensor], rng: StepRandom) -> dict[str, Any]:
        """A share of the labels, `--proportion_empty_prompts`, becomes that of none."""
        dropped = rng.uniform((len(rows["label"]),)) < self.share_dropped
        return {"class_labels": torch.where(dropped, self.num_classes, rows["label"])}

    def of_samples(self, dataset, first: int, count: int, num_rows: int | None = None) -> list[int]:
        """All classes in turn."""
        return [number % self.num_classes for number in range(first, first + count)]

    def described(self, conditions: Sequence[int]) -> list[str]:
        """See `label_names`."""
        return label_names(conditions, self.class_names)

    def pipeline_arguments(self, conditions) -> dict[str, Any]:
        """Of the stock pipeline's call."""
        return {"class_labels": list(conditions)}

    def example(self) -> dict[str, Any]:
        """The denoiser's keywords for one sample."""
        return {"class_labels": torch.zeros(1, dtype=torch.long)}
