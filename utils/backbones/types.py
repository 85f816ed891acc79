# SPDX-License-Identifier: Apache-2.0
"""What passes between a backbone and the training loop."""

from typing import Any, NamedTuple

import torch


class Noised(NamedTuple):
    """A noisy batch and what the task loss needs to know of it."""

    x_t: torch.Tensor  # (B, C, *S)
    timestep: torch.Tensor  # (B,) int64
    clean: torch.Tensor  # (B, C, *S), x_0
    target: torch.Tensor  # (B, C, *S), what the denoiser should predict: noise, velocity or x_0
    weight: torch.Tensor | None  # (B,), the task loss's weight per sample; None is 1


class Prediction(NamedTuple):
    """What a denoiser said of a noisy batch, in float32."""

    output: torch.Tensor  # (B, C, *S)
    features: list[torch.Tensor]  # of the tapped blocks, in the order of the pairs; the student's are projected


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The floating point tensors of a nested dict in `dtype`; everything else as it is."""
    if isinstance(value, dict):
        return {name: to_dtype(part, dtype) for name, part in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
