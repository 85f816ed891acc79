# SPDX-License-Identifier: Apache-2.0
"""Class labels as a condition: read from a column of the data, or from the folders that images lie in."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from utils.backbones.conditions import Nothing
from utils.command_line import UsageError
from utils.data.folders import BUILDER
from utils.data.transforms import ImageTransform
from utils.randomness import StepRandom

if TYPE_CHECKING:
    import datasets


class LabelTransform(ImageTransform):
    """Adds `label` int64 (B,)."""

    def __init__(self, *image_settings, label_column: str, num_classes: int, **more_settings):
        super().__init__(*image_settings, **more_settings)
        self.label_column, self.num_classes, self.columns = label_column, num_classes, (label_column,)

    def check(self, rows: "datasets.Dataset") -> None:
        """Raises UsageError where there are no labels, or some that the teacher does not know."""
        said = f"--label_column {self.label_column}"
        if self.label_column not in rows.column_names:
            raise UsageError(
                f"{said}: the dataset has no such column, only {', '.join(rows.column_names)}. A folder of images has "
                "labels where every class is a subfolder, and no metadata file lies beside them."
            )
        feature = rows.features[self.label_column]
        if "int" not in str(getattr(feature, "dtype", "")):
            raise UsageError(
                f"{said}: found {feature} there; a label is an integer from 0 to {self.num_classes - 1}, of one of "
                "the teacher's classes."
            )
        if rows.info.builder_name == BUILDER and (names := getattr(feature, "names", None)):
            self._check_folders(names, said)
        labels = rows.select_columns([self.label_column])[:][self.label_column]
        for row, label in enumerate(labels):
            if label is None or not 0 <= label < self.num_classes:
                raise UsageError(
                    f"{said}: row {row} has label {label}; the teacher knows the classes 0 to {self.num_classes - 1}. "
                    "Leave such rows out, or choose a teacher of these classes."
                )

    def _check_folders(self, names: list[str], said: str) -> None:
        """Folders are numbered in the order of their names: right where each of the teacher's classes has one."""
        if len(names) != self.num_classes:
            raise UsageError(
                f"{said}: there are {len(names)} class folders, which are numbered in the order of their names, and "
                f"the teacher knows {self.num_classes} classes: which is which cannot be told. Give a dataset whose "
                "label column holds the teacher's numbers."
            )
        wrong = [(name, number) for number, name in enumerate(names) if name.isdecimal() and int(name) != number]
        if wrong:
            raise UsageError(
                f"{said}: the class folder {wrong[0][0]} would be label {wrong[0][1]}, as folders are numbered in the "
                "order of their names. Write all numbers with as many digits, from 0 on."
            )

    def batch(self, images, columns: dict[str, list], bits: np.ndarray) -> dict[str, Tensor]:
        """As ImageTransform.batch, with labels."""
        labels = torch.tensor(list(columns[self.label_column]), dtype=torch.int64)
        return super().batch(images, columns, bits) | {"label": labels}


class Labels(Nothing):
    """One of `num_classes` classes, or none, whose label is `num_classes`."""

    def __init__(self, args, num_classes: int, class_names: Mapping[int, str] | None = None):
        self.label_column, self.num_classes = args.label_column or "label", num_classes
        self.class_names = class_names or {}  # what the teacher calls them, where it says
        self.share_dropped = 0.1 if args.proportion_empty_prompts is None else args.proportion_empty_prompts

    def call(self, condition: int) -> dict[str, str]:
        """The class; without guidance where `DiTPipeline`'s label of none, 1000, is not this model's."""
        return {"class_labels": f"[{condition}]"} | ({} if self.num_classes == 1000 else {"guidance_scale": "1"})

    def transform(self, *image_settings, **more_settings) -> LabelTransform:
        """Pixels and labels."""
        return LabelTransform(
            *image_settings, label_column=self.label_column, num_classes=self.num_classes, **more_settings
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
        """The first of each class's names, or its number."""
        return [self.class_names.get(label, f"class {label}").split(",")[0] for label in conditions]

    def pipeline_arguments(self, conditions) -> dict[str, Any]:
        """Of the stock pipeline's call."""
        return {"class_labels": list(conditions)}

    def example(self) -> dict[str, Any]:
        """The denoiser's keywords for one sample."""
        return {"class_labels": torch.zeros(1, dtype=torch.long)}
