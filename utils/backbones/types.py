# SPDX-License-Identifier: Apache-2.0
"""What passes between a backbone and the training loop."""

from typing import NamedTuple

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
