# SPDX-License-Identifier: Apache-2.0
"""Images as uint8 tensors (B, C, H, W): made from what pipelines give, put side by side."""

import numpy as np
import torch
from PIL import Image
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


def image_grid(rows: list[torch.Tensor], columns: int = 8, least_side: int = 64) -> Image.Image:
    """Pictures side by side: each of `rows` is uint8 (B, C, H, W), cut into lines of `columns`; line by line the rows
    stand below each other. Small images are enlarged without smoothing to `least_side` pixels."""
    columns = min(columns, rows[0].shape[0])
    scale = max(1, -(-least_side // rows[0].shape[-1]))
    lines = []
    for first in range(0, rows[0].shape[0] // columns * columns, columns):
        for images in rows:
            line = images[first : first + columns].repeat_interleave(scale, -1).repeat_interleave(scale, -2)
            lines.append(torch.cat(list(torch.nn.functional.pad(line, (2, 2, 2, 2), value=255)), dim=-1))
        lines.append(torch.full_like(lines[-1][:, :8], 255))  # a gap between the sets of lines
    picture = torch.cat(lines[:-1], dim=-2).permute(1, 2, 0).numpy()
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
