# SPDX-License-Identifier: Apache-2.0
"""Class labels of a dataset: a column of it, or the folders that images lie in; checked against a model's classes."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from utils.command_line import UsageError
from utils.counts import counted
from utils.data.folders import BUILDER
from utils.data.transforms import ImageTransform

if TYPE_CHECKING:
    import datasets


class LabelTransform(ImageTransform):
    """Adds `label` int64 (B,)."""

    def __init__(
        self,
        *image_settings,
        label_column: str,
        num_classes: int,
        class_names: Mapping[int, str] | None = None,
        **more_settings,
    ):
        """`class_names`: what the model calls its classes, where it says."""
        super().__init__(*image_settings, **more_settings)
        self.label_column, self.num_classes, self.columns = label_column, num_classes, (label_column,)
        self.class_names = class_names or {}

    def settings(self) -> dict[str, Any]:
        """As ImageTransform.settings, without the names, which decide nothing."""
        return {name: value for name, value in super().settings().items() if name != "class_names"}

    def check(self, rows: "datasets.Dataset") -> None:
        """Raises UsageError where there are no labels, or some that the teacher does not know."""
        read_labels(rows, self.label_column, self.num_classes, self.class_names)

    def batch(self, images, columns: dict[str, list], bits: np.ndarray) -> dict[str, Tensor]:
        """As ImageTransform.batch, with labels."""
        labels = torch.tensor(list(columns[self.label_column]), dtype=torch.int64)
        return super().batch(images, columns, bits) | {"label": labels}


def class_names(pipeline_config: Mapping[str, Any]) -> dict[int, str]:
    """What a pipeline's model_index.json calls the classes by their numbers, its `id2label`; empty where it does not
    say."""
    return {int(number): name for number, name in (pipeline_config.get("id2label") or {}).items()}


def label_names(labels: Iterable[int], names: Mapping[int, str]) -> list[str]:
    """The first of each class's names, of those in `class_names`, or its number."""
    return [names.get(label, f"class {label}").split(",")[0] for label in labels]


def read_labels(
    rows: "datasets.Dataset", column: str, num_classes: int, class_names: Mapping[int, str] | None = None
) -> list[int]:
    """All labels of `column`.

    Raises:
        UsageError: there are none, some that a model of `num_classes` classes does not know, or names that are other
            classes' in `class_names`, the model's.
    """
    said = f"--label_column {column}"
    if column not in rows.column_names:
        raise UsageError(
            f"{said}: the dataset has no such column, only {', '.join(rows.column_names)}. A folder of images has "
            "labels where every class is a subfolder, and no metadata file lies beside them."
        )
    feature = rows.features[column]
    if "int" not in str(getattr(feature, "dtype", "")):
        raise UsageError(
            f"{said}: found {feature} there; a label is an integer from 0 to {num_classes - 1}, of one of the model's "
            "classes."
        )
    names = getattr(feature, "names", None) or []
    _check_names(names, class_names or {}, said)
    if names and rows.info.builder_name == BUILDER:
        _check_folders(names, num_classes, said)
    labels = rows.select_columns([column])[:][column]
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < num_classes:
            raise UsageError(
                f"{said}: row {row} has label {label}; the model knows the classes 0 to {num_classes - 1}. Leave such "
                "rows out, or choose a model of these classes."
            )
    return list(labels)


def _check_names(names: list[str], class_names: Mapping[int, str], said: str) -> None:
    """A name that the model has, under another number: ImageNet's folders in the order of the alphabet, for one. What
    the model has no name for may be right: synset ids, another language."""
    numbers: dict[str, set[int]] = {}  # several classes may share a name: ImageNet has two cranes
    for number, name in class_names.items():
        for synonym in _synonyms(name):
            numbers.setdefault(synonym, set()).add(number)
    for number, name in enumerate(names):
        meant = set().union(*(numbers.get(synonym, set()) for synonym in _synonyms(name)))
        if meant and number not in meant:
            raise UsageError(
                f"{said}: label {number} is called {name} there, which is class {min(meant)} of the model; its class "
                f"{number} is {class_names.get(number, 'none')}. Give a dataset whose labels are the model's numbers."
            )


def _synonyms(name: str) -> set[str]:
    """`tench, Tinca tinca` are two."""
    return {word.strip().lower().replace("_", " ") for word in name.split(",")} - {""}


def _check_folders(names: list[str], num_classes: int, said: str) -> None:
    """Folders are numbered in the order of their names: right where each of the model's classes has one."""
    if len(names) != num_classes:
        raise UsageError(
            f"{said}: {counted(len(names), 'class folder')}, numbered in the order of the names, and the "
            f"model knows {num_classes} classes: which is which cannot be told. Give a dataset whose label column "
            "holds the model's numbers."
        )
    wrong = [(name, number) for number, name in enumerate(names) if name.isdecimal() and int(name) != number]
    if wrong:
        raise UsageError(
            f"{said}: the class folder {wrong[0][0]} would be label {wrong[0][1]}, as folders are numbered in the "
            "order of their names. Write all numbers with as many digits, from 0 on."
        )
