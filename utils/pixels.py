# SPDX-License-Identifier: Apache-2.0
"""Images as uint8 tensors (B, C, H, W), made from what pipelines give."""

import numpy as np
import torch
from torch import Tensor


def to_uint8(images: np.ndarray) -> Tensor:
    """A pipeline's images (B, H, W, C) from 0 to 1 -> uint8 (B, C, H, W).

    FloatingPointError: NaN or infinity, which the cast would make grey values of."""
    if not np.isfinite(images).all():
        raise FloatingPointError(
            "a sample holds NaN or infinity: the denoiser predicted it, or overflowed on the way."
        )
    return torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2).contiguous()


def as_rgb(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) uint8 -> (B, 3, H, W) uint8."""
    assert images.dtype == torch.uint8, f"images must be uint8 from 0 to 255, found {images.dtype}"
    assert images.ndim == 4 and images.shape[1] in (1, 3), f"(B, 1 or 3, H, W), found {tuple(images.shape)}"
    return images.expand(-1, 3, -1, -1)
