# SPDX-License-Identifier: Apache-2.0
"""A row to tensors: the image decoded, resized, cropped and flipped; the caption of this epoch, tokenised."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from utils.command_line import UsageError
from utils.data.images import BACKGROUND, UnreadableImage, read_image, upright_size

if TYPE_CHECKING:
    import datasets


class ImageTransform:
    """A row to a uint8 image (C, resolution, resolution), in two halves: `decode` is the same every epoch and may be
    kept, `augment` depends on the random bits it is handed."""

    columns: tuple[str, ...] = ()  # what `batch` needs of a row besides the decoded image

    def __init__(
        self,
        image_column: str,
        channels: int,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        *,
        crop: Sequence[int] | None = None,
        interpolation: str = "bilinear",
        background: str | None = None,
    ):
        """`crop`: top, left, height and width of the box that stands for the whole picture, in pixels before it is
        resized; `interpolation`: one of `utils.flags.INTERPOLATIONS`; `background`: the colour behind transparent
        pixels."""
        self.image_column, self.background = image_column, background or BACKGROUND
        self.mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self.crop, self.interpolation = crop, interpolation

    def settings(self) -> dict[str, Any]:
        """All that decides what is made of a row, by name, of JSON's types: every field of this object, so that one
        that is added later counts too. For the keys of caches."""
        return json.loads(json.dumps(vars(self), default=str))

    def decode(self, row: dict) -> torch.Tensor:
        """Uint8 (C, H, W) with the shorter side at `resolution`.

        Raises:
            UnreadableImage: there is no image, one whose values cannot be kept, or `crop` goes beyond it.
        """
        image = read_image(row[self.image_column], self.mode, self.background)
        if self.crop:
            image = self._cropped(image)
        if min(image.size) != self.resolution:
            scale = self.resolution / min(image.size)
            size = tuple(max(self.resolution, round(side * scale)) for side in image.size)
            if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):  # a line of pixels, or a damaged header
                raise UnreadableImage(f"{image.width}x{image.height} pixels would become {size[0]}x{size[1]}")
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        array = np.array(image, dtype=np.uint8)
        return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()

    def _cropped(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.crop
        if top + height > image.height or left + width > image.width:  # where Pillow would add black
            raise UnreadableImage(
                f"--crop {top} {left} {height} {width} goes beyond its {image.height} rows and {image.width} columns"
            )
        return image.crop((left, top, left + width, top + height))

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
        """Raises UsageError where `rows` lack what `batch` needs."""

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


class CaptionedTransform(ImageTransform):
    """Adds `input_ids_0`, `input_ids_1` ... (B, T), one for each tokenizer, and with `micro_conditioning` SDXL's
    `time_ids` (B, 6): original height and width, top and left of the crop, height and width of the result."""

    def __init__(
        self, *image_settings, caption_column: str, tokenizers: Sequence, micro_conditioning: bool, **more_settings
    ):
        super().__init__(*image_settings, **more_settings)
        self.caption_column, self.tokenizers = caption_column, tokenizers
        self.micro_conditioning = micro_conditioning
        self.columns = (caption_column, self.image_column) if micro_conditioning else (caption_column,)

    def settings(self) -> dict[str, Any]:
        """As ImageTransform.settings, without the tokenizers: their files say what they are."""
        return {name: value for name, value in super().settings().items() if name != "tokenizers"}

    def check(self, rows: "datasets.Dataset") -> None:
        """Raises UsageError where there are no captions."""
        if self.caption_column not in rows.column_names:
            raise UsageError(
                f"--caption_column {self.caption_column}: the dataset has no such column, only "
                f"{', '.join(rows.column_names)}. A folder of images needs a metadata.jsonl with file_name and text."
            )
        check_captions(rows.features[self.caption_column], self.caption_column)

    def batch(self, images, columns: dict[str, list], bits: np.ndarray) -> dict[str, torch.Tensor]:
        """As ImageTransform.batch, with tokens and time ids."""
        batch = super().batch(images, columns, bits)
        captions = [choose_caption(given, int(b)) for given, b in zip(columns[self.caption_column], bits, strict=True)]
        for i, tokenizer in enumerate(self.tokenizers):
            batch[f"input_ids_{i}"] = tokenize(tokenizer, captions)
        if self.micro_conditioning:
            stored = columns[self.image_column]
            ids = [self._time_ids(*each) for each in zip(images, stored, bits, strict=True)]
            batch["time_ids"] = torch.tensor(ids, dtype=torch.float32)
        return batch

    def captions(self, columns: dict[str, list]) -> list[str]:
        """One caption a row, the first where there are several."""
        return [choose_caption(given, 0) for given in columns[self.caption_column]]

    def _time_ids(self, image: torch.Tensor, stored: dict, bits: np.uint64) -> tuple[int, ...]:
        """Podell et al. 2023, section 2.2."""
        width, height = upright_size(stored)
        if self.crop:  # the box is the picture
            height, width = self.crop[2:]
        top, left = self.crop_at(image, int(bits))
        if self.random_flip and int(bits) & 1:  # where the crop lies in the flipped image
            left = image.shape[-1] - self.resolution - left
        return height, width, top, left, self.resolution, self.resolution


def check_captions(feature, column: str) -> None:
    """Raises UsageError unless a column of this feature holds strings or lists of them. Of any row the caption may be
    missing: None, an empty string or an empty list, which are all the empty prompt."""
    kind = str(getattr(getattr(feature, "feature", feature), "dtype", feature))
    if kind not in ("string", "large_string", "string_view"):
        raise UsageError(
            f"--caption_column {column}: found {feature} there; a caption is a string or a list of strings."
        )


def choose_caption(given: str | list[str] | None, bits: int) -> str:
    """The caption, or a random one of several, by the highest 8 of 64 random bits; none is the empty prompt."""
    if isinstance(given, list):
        given = given[(bits >> 56) % len(given)] if given else ""
    return given or ""


def tokenize(tokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Int64 (B, T), padded and cut to the model's length, as Stable Diffusion's pipelines do."""
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(list(prompts), return_tensors="pt", **options).input_ids
