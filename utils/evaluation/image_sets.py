# SPDX-License-Identifier: Apache-2.0
"""Numbered sets of images, read by index: files of a folder, or rows of a dataset."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from utils.command_line import UsageError
from utils.counts import counted
from utils.data.folders import folder_rows
from utils.data.images import UnreadableImage, file_content, upright_size
from utils.data.transforms import ImageTransform


class ImageSet(Dataset):
    """Images by lists of indices, uint8 (B, 3, H, W): files of a folder, or rows of a dataset."""

    def __init__(self, rows: Sequence[dict], source: str, *, image_column: str = "image", **settings):
        """`rows` hold undecoded images, {"bytes", "path"}, in `image_column`; `source` names them in errors;
        `settings` are `ImageTransform`'s crop, interpolation and background."""
        self.rows, self.source, self.image_column = rows, source, image_column
        self.cut = False
        self.numbers: Sequence[int] = range(len(rows))  # the place of each before some were left out
        self.transform = ImageTransform(image_column, 3, 1, center_crop=True, random_flip=False, **settings)

    @classmethod
    def from_files(cls, paths: Sequence[Path | str], source: str, **settings) -> "ImageSet":
        """The image files `paths`, in this order."""
        return cls([{"image": {"bytes": None, "path": str(path)}} for path in paths], source, **settings)

    def resize_to(self, resolution: int) -> None:
        """From now on bring every image's shorter side to `resolution` and cut the centre."""
        self.transform.resolution, self.cut = resolution, True

    def keep_size(self, *, quiet: bool) -> tuple[int, int]:
        """Read the images, or the box of each, as they are; returns (height, width), from the files' headers.

        Raises:
            UsageError: they are not of one size, or one is no image; both named.
        """
        sizes: dict[tuple[int, int], int] = {}
        box = self.transform.crop and self.transform.crop[:1:-1]  # width and height
        for index in tqdm(range(len(self)), desc="checking image sizes", disable=quiet, leave=False):
            try:
                size = upright_size(self.rows[index][self.image_column])
                sizes.setdefault(tuple(box or size), index)
            except UnreadableImage as error:
                raise self._unreadable(index, error) from error
            if len(sizes) > 1:
                raise self._mixed(*sizes.values())
        (width, height), *_ = sizes
        self.transform.resolution = min(width, height)  # of no image, then, is the shorter side resized
        return height, width

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Raises UsageError where an image cannot be decoded, or is of another size than its header says."""
        images = [self._read(index) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                raise self._mixed(indices[0], index)
        return torch.stack(images)

    def leave_out_unreadable(self, *, quiet: bool) -> None:
        """Decode every image once, and go on without those that cannot be: how many is said.

        Raises:
            UsageError: fewer than 2 are left.
        """
        good, last = [], None
        for index in tqdm(range(len(self)), desc=f"checking {self.source}", disable=quiet, leave=False):
            try:
                self.transform.decode(self.rows[index])
                good.append(index)
            except UnreadableImage as error:
                last = f"{self._name(index)}: {error}"
        if last is None:
            return
        bad = f"{len(self) - len(good)} of {counted(len(self), 'image')}, the last is {last}"
        if len(good) < 2:
            raise UsageError(f"{self.source}: cannot be decoded: {bad}. A distance needs at least 2.")
        warnings.warn(f"{self.source}: cannot be decoded and left out: {bad}.", stacklevel=2)
        self.rows = self.rows.select(good) if hasattr(self.rows, "select") else [self.rows[i] for i in good]
        self.numbers = good

    def _read(self, index: int) -> torch.Tensor:
        try:
            image = self.transform.decode(self.rows[index])
        except UnreadableImage as error:
            raise self._unreadable(index, error) from error
        return self.transform.augment(image, 0) if self.cut else image

    def _name(self, index: int) -> str:
        path = (self.rows[index][self.image_column] or {}).get("path")
        return f"image {self.numbers[index]} ({path or 'stored in the dataset'})"

    def _unreadable(self, index: int, error: Exception) -> UsageError:
        return UsageError(
            f"{self.source}: {self._name(index)} cannot be decoded as an image: {error}. Mend or remove it, or "
            "leave such images out with --skip_bad_images."
        )

    def _mixed(self, first: int, second: int) -> UsageError:
        return UsageError(
            f"{self.source}: {self._name(first)} and {self._name(second)} are of different sizes, so what is measured "
            "would depend on how they are resized. Give --resolution, pixels a side that all are brought to."
        )

    def content_hash(self, *, quiet: bool) -> str:
        """SHA-256 over the stored bytes of every image, in order."""
        digest = hashlib.sha256()
        for index in tqdm(range(len(self)), desc=f"hashing {self.source}", disable=quiet, leave=False):
            content = file_content(self.rows[index][self.image_column])
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()


def image_files(folder: str, flag: str, limit: int | None = None) -> list[str]:
    """The images that training would find in `folder`, in order of path with 2.png before 10.png; the first `limit`
    of them.

    Raises:
        UsageError: as `folder_rows`, or fewer than 2 images.
    """
    rows = folder_rows(folder, flag)
    if "image" not in rows.column_names:
        raise UsageError(f"{flag} {folder}: its metadata has no column file_name, which names the images to measure.")
    # a row that names none stays, as in training: it is refused, or skipped and counted, like what cannot be read
    paths = sorted((image["path"] if image else "" for image in rows["image"]), key=_natural)[:limit]
    if len(paths) < 2:
        raise UsageError(
            f"{flag} {folder}: found {len(paths)} image files; a distance needs 2, a meaningful one thousands."
        )
    return paths


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers in a path by their value."""
    parts = re.split(r"(\d+)", path)  # every second a number
    return [(place % 2 == 1, int(part) if place % 2 else 0, part) for place, part in enumerate(parts)]
