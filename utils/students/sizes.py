# SPDX-License-Identifier: Apache-2.0
"""How large a model is, and what became of a teacher's tensors in its student."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `UNet2DModel`, defaults filled in (Hub configs are often partial), private keys left out."""
    parameters = inspect.signature(UNet2DModel.__init__).parameters.values()
    return {p.name: config.get(p.name, p.default) for p in parameters if p.name != "self"}


def height_width(sample_size: int | tuple[int, int]) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


@dataclass(frozen=True)
class ModelSize:
    """`macs`: multiply-adds of one forward of one sample, None for a config without sample_size."""

    block_out_channels: tuple[int, ...]
    parameters: int
    macs: int | None


def model_size(config: Mapping[str, Any]) -> ModelSize:
    """Count parameters and MACs of any `UNet2DModel` config on the meta device: no memory, no random numbers."""
    config = full_config(config)
    with torch.device("meta"):
        model, macs = UNet2DModel(**config), None
        if config["sample_size"] is not None:
            sample = torch.zeros(1, config["in_channels"], *height_width(config["sample_size"]))
            time = torch.zeros(1, dtype=torch.long)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(sample, time, class_labels=None if model.class_embedding is None else time)
            macs = counter.get_total_flops() // 2
    return ModelSize(tuple(config["block_out_channels"]), sum(p.numel() for p in model.parameters()), macs)


def model_table(teacher: ModelSize | None, student: ModelSize) -> str:
    """Widths, parameters and MACs of teacher and student as plain text; without a teacher, the student's alone."""
    sizes = [student] if teacher is None else [teacher, student]
    rows = {
        "": ["teacher", "student"][-len(sizes) :],
        "widths": ["-".join(map(str, size.block_out_channels)) for size in sizes],
        "parameters": [f"{size.parameters:,}" for size in sizes],
        "MACs per sample": ["unknown" if size.macs is None else f"{size.macs:,}" for size in sizes],
    }
    if teacher is not None:
        rows["parameters kept"] = ["", f"{student.parameters / teacher.parameters:.2%}"]
    return "\n".join(f"{label:<16}" + "".join(f"{cell:>28}" for cell in cells) for label, cells in rows.items())


@dataclass(frozen=True)
class WidthReport:
    """Sizes, and tensor names: the student's `sliced`, `copied`, `refitted` and `fresh`, the teacher's `dropped`.

    `refit_error`: relative error over time of the refitted time embedding layer, None without a refit.
    """

    teacher: ModelSize
    student: ModelSize
    pruning_ratio: float
    init: str
    sliced: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    refitted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    refit_error: float | None = None

    def table(self) -> str:
        """The sizes table, then how many tensors took which way, then the names dropped and refitted."""
        kinds = ("sliced", "copied", "refitted", "dropped", "fresh")
        lines = [
            model_table(self.teacher, self.student),
            f"pruning ratio {self.pruning_ratio}, student init {self.init}",
            "tensors: " + ", ".join(f"{len(getattr(self, kind))} {kind}" for kind in kinds),
        ]
        if self.refitted:
            lines.append(f"refitted: {', '.join(self.refitted)} (relative error {self.refit_error:.2%})")
        if self.dropped:
            lines.append(f"dropped: {', '.join(self.dropped)}")
        return "\n".join(lines)
