# SPDX-License-Identifier: Apache-2.0
"""Numbered sets of images: read by index, worked on in fixed blocks, written so that a stopped run goes on.

Block b holds the indices from b * batch_size on and goes to process b % num_processes; results are put together in the
order of the blocks. So no number depends on how many processes there were, or on which was faster.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from utils.data import ImageTransform, as_is

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def blocks(count: int, size: int) -> list[range]:
    """The indices below `count` in blocks of `size`; the last may be shorter."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def check_processes(accelerator: Accelerator) -> None:
    """Raises ValueError where several processes were launched that do not know of each other: each would do all of the
    work, into the same folder."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}. On the CPU set the "
            "environment variable ACCELERATE_USE_CPU=true before `torchrun` or `accelerate launch --multi_gpu`."
        )


class ImageSet(Dataset):
    """Images by lists of indices, uint8 (B, 3, H, W): files of a folder, or rows of a dataset."""

    def __init__(self, rows: Sequence[dict], source: str, *, image_column: str = "image"):
        """`rows` hold undecoded images, {"bytes", "path"}, in `image_column`; `source` names them in errors."""
        self.rows, self.source, self.image_column = rows, source, image_column
        self.cut = False
        self.transform = ImageTransform(image_column, 3, 1, center_crop=True, random_flip=False)

    @classmethod
    def from_files(cls, paths: Sequence[Path], source: str) -> "ImageSet":
        """The image files `paths`, in this order."""
        return cls([{"image": {"bytes": None, "path": str(path)}} for path in paths], source)

    def resize_to(self, resolution: int) -> None:
        """From now on bring every image's shorter side to `resolution` (bilinear, antialiased) and cut the centre."""
        self.transform.resolution, self.cut = resolution, True

    def keep_size(self, *, quiet: bool) -> tuple[int, int]:
        """Read the images as they are; returns (height, width), from the files' headers.

        Raises:
            ValueError: they are not of one size, or one is no image; both named.
        """
        sizes: dict[tuple[int, int], int] = {}
        for index in tqdm(range(len(self)), desc="checking image sizes", disable=quiet, leave=False):
            try:
                with Image.open(self.rows[index][self.image_column]["path"]) as image:
                    sizes.setdefault(image.size, index)
            except OSError as error:
                raise self._unreadable(index, error) from error
            if len(sizes) > 1:
                raise self._mixed(*sizes.values())
        (width, height), *_ = sizes
        self.transform.resolution = min(width, height)  # of no image, then, is the shorter side resized
        return height, width

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Raises ValueError where an image cannot be decoded, or has another size than the others."""
        images = [self._read(index) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:  # turned by its EXIF tag, which the headers' check does not see
                raise self._mixed(indices[0], index)
        return torch.stack(images)

    def _read(self, index: int) -> torch.Tensor:
        try:
            image = self.transform.decode(self.rows[index])
        except (OSError, TypeError, AttributeError, ValueError, SyntaxError) as error:  # what Pillow raises on damage
            raise self._unreadable(index, error) from error
        return self.transform.augment(image, 0) if self.cut else image

    def _name(self, index: int) -> str:
        path = (self.rows[index][self.image_column] or {}).get("path")
        return f"image {index} ({path or 'stored in the dataset'})"

    def _unreadable(self, index: int, error: Exception) -> ValueError:
        return ValueError(
            f"{self.source}: {self._name(index)} cannot be decoded as an image: {error}. Mend or remove it."
        )

    def _mixed(self, first: int, second: int) -> ValueError:
        return ValueError(
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
    """The image files in `folder` and below, sorted by path, the first `limit` of them.

    Raises:
        ValueError: no such folder, or fewer than 2 images.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{flag} {folder}: no such folder. Give a folder of images.")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    paths = paths[:limit]
    if len(paths) < 2:
        raise ValueError(
            f"{flag} {folder}: found {len(paths)} image files ({', '.join(sorted(SUFFIXES))}); a distance needs at "
            "least 2, a meaningful one thousands."
        )
    return paths


def in_order(
    images: ImageSet,
    work: Callable[[torch.Tensor, range], object],
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int,
    description: str,
) -> Iterator:
    """`work(images, indices)` of every block, done by all processes, given to every one in the order of the blocks.

    What `work` returns is gathered block by block, so memory does not grow; it must be picklable and lie on the CPU.
    """
    all_blocks = blocks(len(images), batch_size)
    own = [list(block) for block in all_blocks[accelerator.process_index :: accelerator.num_processes]]
    batches = iter(DataLoader(images, batch_sampler=own, num_workers=num_workers, collate_fn=as_is))
    progress = tqdm(total=len(images), desc=description, unit="image", disable=not accelerator.is_local_main_process)
    for number in range(math.ceil(len(all_blocks) / accelerator.num_processes)):
        mine = number * accelerator.num_processes + accelerator.process_index
        result = work(next(batches), all_blocks[mine]) if mine < len(all_blocks) else None
        for offset, each in enumerate(gather_object([result])):
            block = number * accelerator.num_processes + offset
            if block < len(all_blocks):
                progress.update(len(all_blocks[block]))
                yield each
    progress.close()


class SampleFolder:
    """Samples as PNG files, block by block. A block is complete when its record is there, written after its images.

    `images/000000.png` and so on; `sampling/protocol.json`, what the samples depend on; `sampling/block-000000.json`,
    the number of images in a block and what they cost.
    """

    def __init__(self, output_dir: str, num_samples: int, batch_size: int):
        self.images, self.records = Path(output_dir) / "images", Path(output_dir) / "sampling"
        self.num_samples = num_samples
        self.blocks = blocks(num_samples, batch_size)

    def open(self, protocol: dict) -> int:
        """Begin, or go on; how many samples are there already. For the main process alone.

        Raises:
            ValueError: the folder holds samples of another protocol; names what differs.
        """
        file = self.records / "protocol.json"
        protocol = json.loads(json.dumps(protocol, default=str))
        if file.exists():
            found = json.loads(file.read_text())
            changed = [key for key in {**protocol, **found} if protocol.get(key) != found.get(key)]
            if changed:
                shown = "; ".join(f"{key}: {_short(found.get(key))} -> {_short(protocol.get(key))}" for key in changed)
                raise ValueError(
                    f"--output_dir {self.records.parent} holds samples that were made otherwise ({shown}). Choose "
                    "another folder, or start anew in this one with --overwrite_output_dir."
                )
        self.images.mkdir(parents=True, exist_ok=True)
        self.records.mkdir(exist_ok=True)
        _write_beside(file, json.dumps(protocol, indent=1).encode())
        for leftover in (*self.images.glob(".*"), *self.records.glob(".*")):  # of a process that was killed
            leftover.unlink()
        return self.num_samples - sum(len(block) for block in self.missing())

    def missing(self) -> list[range]:
        """The blocks that are not, or not wholly, there. A sample's last bits depend on the size of its block, so one
        of another size is made again."""
        return [block for block in self.blocks if not self._is_complete(block)]

    def _is_complete(self, block: range) -> bool:
        record = self._record(block)
        whole = record.exists() and json.loads(record.read_text())["images"] == len(block)
        return whole and all(path.exists() for path in self.paths(block))

    def write(self, block: range, images: torch.Tensor, record: dict) -> None:
        """Write the uint8 images (B, C, H, W) of `block`, then its record."""
        self._record(block).unlink(missing_ok=True)  # of another size
        for path, image in zip(self.paths(block), images, strict=True):
            array = image.permute(1, 2, 0).numpy()
            partial = path.with_name(f".{path.name}")
            Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(partial, "PNG", compress_level=1)
            partial.replace(path)
        _write_beside(self._record(block), json.dumps({"images": len(block), **record}).encode())

    def paths(self, indices: range | None = None) -> list[Path]:
        """The files of `indices`, by default of all samples."""
        return [self.images / f"{index:06d}.png" for index in indices or range(self.num_samples)]

    def block_records(self) -> list[dict]:
        """What was recorded of every block."""
        return [json.loads(self._record(block).read_text()) for block in self.blocks]

    def _record(self, block: range) -> Path:
        return self.records / f"block-{block.start:06d}.json"


def _write_beside(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    partial.replace(path)


def _short(value) -> str:
    return text if len(text := json.dumps(value)) <= 60 else text[:57] + "..."
