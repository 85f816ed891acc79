# SPDX-License-Identifier: Apache-2.0
"""One image: decoded, resized, cropped and flipped."""

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import datasets


class ImageTransform:
    """A row to a uint8 image (C, resolution, resolution), in two halves: `decode` is the same every epoch and may be
    kept, `augment` depends on the random bits it is handed."""

    columns: tuple[str, ...] = ()  # what `batch` needs of a row besides the decoded image

    def __init__(self, image_column: str, channels: int, resolution: int, center_crop: bool, random_flip: bool):
        self.image_column = image_column
        self.mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self.turn_upright = True  # by a photo's EXIF tag, as viewers do

    def decode(self, row: dict) -> torch.Tensor:
        """Uint8 (C, H, W) with the shorter side at `resolution`.

        Raises:
            OSError: the bytes are not an image.
        """
        stored = row[self.image_column]
        with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
            if self.turn_upright:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            image = image.convert(self.mode)
        if min(image.size) != self.resolution:
            scale = self.resolution / min(image.size)
            size = tuple(max(self.resolution, round(side * scale)) for side in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR)  # Pillow's bilinear filter antialiases
        array = np.array(image, dtype=np.uint8)
        return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()

    def augment(self, image: torch.Tensor, bits: int) -> torch.Tensor:
        """Crop (C, H, W) to a square and perhaps flip it. `bits` are 64 random ones: the lowest decides the flip, two
        fields of 24 the crop."""
        top, left = self.crop_at(image, bits)
        image = image[:, top : top + self.resolution, left : left + self.resolution]
        return image.flip(-1) if self.random_flip and bits & 1 else image

    def crop_at(self, image: torch.Tensor, bits: int) -> tuple[int, int]:
        """Top and left of the square that `augment` crops."""
        spare_y, spare_x = (side - self.resolution for side in image.shape[-2:])
        across_y, across_x = ((bits >> shift & 0xFFFFFF) / 2**24 for shift in (8, 32))
        if self.center_crop:
            return spare_y // 2, spare_x // 2
        return int(across_y * (spare_y + 1)), int(across_x * (spare_x + 1))

    def check(self, rows: "datasets.Dataset") -> None:
        """Raises ValueError where `rows` lack what `batch` needs."""

    def batch(
        self, images: torch.Tensor | list[torch.Tensor], columns: dict[str, list], bits: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """Decoded images, their values in `self.columns` and random bits, uint64 (B,), to the tensors of a batch."""
        return {"pixels": self.augment_all(images, bits)}

    def augment_all(self, images: torch.Tensor | list[torch.Tensor], bits: np.ndarray) -> torch.Tensor:
        """`augment` for a batch, at once where nothing is cropped."""
        if isinstance(images, torch.Tensor) and images.shape[-2:] == (self.resolution, self.resolution):
            flipped = torch.from_numpy(bits & np.uint64(1) == 1)[:, None, None, None]
            return torch.where(flipped, images.flip(-1), images) if self.random_flip else images
        return torch.stack([self.augment(image, int(b)) for image, b in zip(images, bits, strict=True)])
