# SPDX-License-Identifier: Apache-2.0
"""Numbered sets of images, read by index: files of a folder, or rows of a dataset."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from utils.command_line import UsageError
from utils.data.rows import ImageTransform

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# what Pillow raises on damage and on bombs
UNREADABLE = (OSError, TypeError, AttributeError, ValueError, SyntaxError, Image.DecompressionBombError)


class ImageSet(Dataset):
    """Images by lists of indices, uint8 (B, 3, H, W): files of a folder, or rows of a dataset."""

    def __init__(self, rows: Sequence[dict], source: str, *, image_column: str = "image", **settings):
        """`rows` hold undecoded images, {"bytes", "path"}, in `image_column`; `source` names them in errors;
        `settings` are `ImageTransform`'s crop and interpolation."""
        self.rows, self.source, self.image_column = rows, source, image_column
        self.cut = False
        self.transform = ImageTransform(image_column, 3, 1, center_crop=True, random_flip=False, **settings)

    @classmethod
    def from_files(cls, paths: Sequence[Path], source: str, **settings) -> "ImageSet":
        """The image files `paths`, in this order, read as clean-fid reads them: as they are stored."""
        images = cls([{"image": {"bytes": None, "path": str(path)}} for path in paths], source, **settings)
        images.transform.turn_upright = False
        return images

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
                with Image.open(self.rows[index][self.image_column]["path"]) as image:
                    sizes.setdefault(tuple(box or image.size), index)
            except (OSError, Image.DecompressionBombError) as error:
                raise self._unreadable(index, error) from error
            if len(sizes) > 1:
                raise self._mixed(*sizes.values())
        (width, height), *_ = sizes
        self.transform.resolution = min(width, height)  # of no image, then, is the shorter side resized
        return height, width

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Raises UsageError where an image cannot be decoded."""
        return torch.stack([self._read(index) for index in indices])

    def _read(self, index: int) -> torch.Tensor:
        try:
            image = self.transform.decode(self.rows[index])
        except UNREADABLE as error:
            raise self._unreadable(index, error) from error
        return self.transform.augment(image, 0) if self.cut else image

    def _name(self, index: int) -> str:
        path = (self.rows[index][self.image_column] or {}).get("path")
        return f"image {index} ({path or 'stored in the dataset'})"

    def _unreadable(self, index: int, error: Exception) -> UsageError:
        return UsageError(
            f"{self.source}: {self._name(index)} cannot be decoded as an image: {error}. Mend or remove it."
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
            stored = self.rows[index][self.image_column] or {}
            content = stored.get("bytes") or (Path(stored["path"]).read_bytes() if stored.get("path") else b"")
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()


def image_files(folder: str, flag: str, limit: int | None = None) -> list[Path]:
    """The image files in `folder` and below, in order of path with 2.png before 10.png; the first `limit` of them.

    Raises:
        UsageError: no such folder, or fewer than 2 images.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{flag} {folder}: no such folder. Give a folder of images.")
    found = (path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    paths = sorted((path for path in found if path.is_file()), key=_natural)[:limit]
    if len(paths) < 2:
        raise UsageError(
            f"{flag} {folder}: found {len(paths)} image files ({', '.join(sorted(SUFFIXES))}); a distance needs at "
            "least 2, a meaningful one thousands."
        )
    return paths


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers in a path by their value."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
