# SPDX-License-Identifier: Apache-2.0
"""A dataset to batches: which row comes when.

A run sees one endless stream of rows, epoch after epoch, each a new permutation; position p of the stream is row
`shuffled(seed, p // num_rows)[p % num_rows]`. Micro-step m of rank r takes the positions from (m * world_size + r) *
batch_size on. Nothing else decides the order, so resuming is starting at another m.
"""

import errno
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from utils.command_line import UsageError, announce
from utils.counts import counted
from utils.data.columns import undecoded
from utils.data.folders import BUILDER, folder_rows, is_image_folder
from utils.data.images import UnreadableImage, file_content
from utils.data.transforms import ImageTransform
from utils.hub_errors import why_not
from utils.randomness import StepRandom, counter_hash, shuffled

if TYPE_CHECKING:
    import datasets

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}
HOLD_IN_MEMORY_BYTES = 256 * 2**20  # decoded sets up to this size are held as uint8; larger ones are decoded as read


def load_rows(args, split: str | None = None, *, split_flag: str | None = None) -> "datasets.Dataset":
    """The dataset that the flags name, images undecoded, cut to `--max_train_samples` for the split that is trained
    on. Without `split` a dataset's `train`, and of a folder of images all. `split_flag` is the flag that names the
    split, where there is one.

    Raises:
        UsageError: none named, nothing there, no such split, or no such image column (named with those there are).
    """
    name = args.dataset_name or args.train_data_dir
    if not name:
        raise UsageError("Give --dataset_name or --train_data_dir: images are needed here, a cache is not enough.")
    announce(f"opening {name}")
    flag = "--dataset_name" if args.dataset_name else "--train_data_dir"
    if args.train_data_dir:
        rows = folder_rows(name, flag, split, split_flag)
    elif not args.dataset_config_name and is_image_folder(name):
        rows = folder_rows(name, flag, split or "train", split_flag)
    else:
        rows = _dataset_rows(args, split or "train", split_flag)
    if args.image_column not in rows.column_names:
        raise UsageError(
            f"--image_column {args.image_column}: {name} has no such column, only {', '.join(rows.column_names)}."
        )
    if len(rows) == 0:
        raise UsageError(f"{flag} {name}: split '{split or 'train'}' has no rows.")
    limit = getattr(args, "max_train_samples", None)  # a flag of the training scripts alone
    if limit and (split or "train") == (getattr(args, "train_split", None) or "train"):
        rows = rows.select(range(min(limit, len(rows))))
    return undecoded(rows, args.image_column, name)


def _dataset_rows(args, split: str, split_flag: str | None) -> "datasets.Dataset":
    """Of a dataset on the Hub, or of a local folder in its layout."""
    import datasets

    name, flag = args.dataset_name, "--dataset_name"
    if Path(name).is_dir():
        if not any(path.is_file() for path in Path(name).rglob("*")):
            raise UsageError(f"{flag} {name}: the folder is empty.")
        if not {*"*?[]"}.isdisjoint(str(Path(name).resolve())):
            raise UsageError(
                f"{flag} {name}: the datasets library takes * ? [ ] in a path for a pattern, and would read the files "
                "of other folders. Rename the folder."
            )
    elif Path(name).is_file():
        raise UsageError(f"{flag} {name} is a file. Give the folder it lies in.")
    try:
        splits = datasets.load_dataset(name, args.dataset_config_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        is_of_cache = isinstance(error, OSError) and error.errno in UNWRITABLE
        hint = " The library keeps what it reads in --cache_dir, or HF_HOME: name a folder there." * is_of_cache
        raise UsageError(f"{flag} {name} cannot be loaded as a dataset: {why_not(error) or error}{hint}") from error
    if split not in splits:
        how = "" if split_flag else " Name one with --train_split."
        raise UsageError(f"{split_flag or flag}: {name} has no split '{split}', only {', '.join(splits)}.{how}")
    return splits[split]


def fingerprint(rows: "datasets.Dataset", read: Sequence[str] = ()) -> str:
    """A short hash of a dataset's size, columns and 32 of its rows: the same for the same data wherever it lies, and
    an unreadable image like an empty one. The classes that image files have by their folders are no part of it, unless
    they are `read`."""
    named_by_folder = {"label"} - set(read) if rows.info.builder_name == BUILDER else set()
    columns = sorted(set(rows.column_names) - named_by_folder)
    digest = hashlib.sha256(f"{len(rows)} {columns}".encode())
    for row in np.linspace(0, len(rows) - 1, num=min(32, len(rows)), dtype=int):
        values = rows[int(row)]
        for column in columns:
            is_file = isinstance(values[column], dict) and set(values[column]) == {"bytes", "path"}
            content = file_content(values[column]) if is_file else values[column]
            digest.update(f"{column}={content!r}".encode())
    return digest.hexdigest()[:16]


class ImageRows(Dataset):
    """Rows to batches. Indexed by lists of (epoch, row), which is what `StreamSampler` yields."""

    def __init__(
        self,
        rows: "datasets.Dataset",
        transform: ImageTransform,
        seed: int,
        *,
        skip_bad_images: bool = False,
        variants: int | None = None,
        numbers: Sequence[int] | None = None,
        quiet: bool = False,
    ):
        """`variants`: crop and flip every row in this many ways, one after the other; None is another way each epoch.
        `numbers`: where `rows` are a selection, the place of each in its dataset, for errors to name.

        Raises UsageError as `transform.check` and, where the images are held, `decode` do."""
        self.rows, self.transform, self.seed = rows, transform, seed
        self.skip_bad_images, self.variants = skip_bad_images, variants
        self.numbers = range(len(rows)) if numbers is None else numbers
        self.bad_rows: set[int] = set()
        self.stand_ins: dict[int, int] = {}  # rows that others were decoded for
        transform.check(rows)
        self.columns = rows.select_columns(list(transform.columns)) if transform.columns else None
        self.held: torch.Tensor | list[torch.Tensor] | None = None  # one tensor where all images are of one size
        channels = len(transform.mode)
        if len(rows) * channels * transform.resolution**2 <= HOLD_IN_MEMORY_BYTES:
            progress = tqdm(range(len(rows)), desc="decoding images", unit="image", disable=quiet, leave=False)
            self.held = [self.decode(row) for row in progress]
            if len({image.shape for image in self.held}) == 1:
                self.held = torch.stack(self.held)

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, row: int) -> torch.Tensor:
        """Uint8 (C, H, W) of one row; of the next good one, where bad ones are skipped.

        Raises:
            UsageError: the row is not an image that Pillow reads; named by row and, where it has one, path.
        """
        for candidate in itertools.chain(range(row, len(self)), range(row)):
            stored = self.rows[candidate]
            try:
                return self.transform.decode(stored)
            except UnreadableImage as error:
                self.bad_rows.add(candidate)
                self.stand_ins[row] = (candidate + 1) % len(self)
                if not self.skip_bad_images:
                    path = (stored[self.transform.image_column] or {}).get("path") or "stored in the dataset"
                    raise UsageError(
                        f"row {self.numbers[candidate]} ({path}) cannot be decoded as an image: {error}. Mend or "
                        "remove it, or put the next good one in its place with --skip_bad_images."
                    ) from error
                last = error
        raise UsageError(f"none of {counted(len(self), 'image')} can be decoded; the last: {last}.")

    def __getitems__(self, positions: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """A batch: `pixels` uint8 (B, C, R, R), `row` int64 (B,), `replaced` bool (B,) where another row stands in."""
        epochs, rows = np.array(positions).T
        bits = counter_hash(self.seed, epochs % self.variants if self.variants else epochs, rows)
        if isinstance(self.held, torch.Tensor):
            images = self.held[rows]
        else:
            images = [self.held[row] if self.held else self.decode(row) for row in rows.tolist()]
        bad = torch.tensor([row in self.bad_rows for row in rows.tolist()])
        shown = [self.stand_ins.get(row, row) for row in rows.tolist()]
        batch = self.transform.batch(images, self.columns[shown] if self.columns else {}, bits)
        return {**batch, "row": torch.from_numpy(rows), "replaced": bad}

    def captions(self, count: int) -> list[str]:
        """Of the first rows."""
        return self.transform.captions(self.columns[:count])

    def fingerprint(self) -> str:
        """See `fingerprint`."""
        return fingerprint(self.rows, self.transform.columns)

    def __str__(self) -> str:
        bad = f" ({counted(len(self.bad_rows), 'undecodable one')} replaced)" if self.bad_rows else ""
        size = f"{self.transform.mode}, {self.transform.resolution} a side"
        held = "decoded as read" if self.held is None else "held in memory"
        return f"{counted(len(self), 'image')}{bad} as {size}, {held}"


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, row) for the micro-steps `first` to `last` (exclusive) of one rank."""

    def __init__(self, num_rows, batch_size, seed, *, rank=0, world_size=1, first=0, last=2**62):
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size, self.first, self.last = rank, world_size, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, np.ndarray] = {}
        for micro_step in range(self.first, self.last):
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            places = [divmod(start + offset, self.num_rows) for offset in range(self.batch_size)]
            wanted = range(places[0][0], places[-1][0] + 1)
            orders = {epoch: orders.get(epoch) for epoch in wanted}
            for epoch in wanted:
                if orders[epoch] is None:
                    orders[epoch] = shuffled(self.seed, epoch, self.num_rows)
            yield [(epoch, int(orders[epoch][place])) for epoch, place in places]


def as_is(batch):
    """`ImageRows` collates; a named function because workers must pickle it."""
    return batch


def sample_batch(dataset: ImageRows, batch_size: int, seed: int, device="cpu") -> dict[str, torch.Tensor]:
    """One batch of random rows on `device`, the same on every process."""
    order = shuffled(seed, 0, len(dataset))[:batch_size]
    batch = dataset.__getitems__([(0, int(row)) for row in order])
    return {name: value.to(device) for name, value in batch.items()}


def training_batches(
    dataset: ImageRows, args, accelerator, *, first: int, last: int
) -> Iterator[tuple[dict[str, torch.Tensor], StepRandom]]:
    """(batch on the device, its randomness) for the micro-steps `first` to `last` (exclusive) of this process."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    sampler = StreamSampler(
        len(dataset),
        args.train_batch_size,
        args.seed,
        rank=rank,
        world_size=world_size,
        first=first,
        last=last,
    )
    cuda = accelerator.device.type == "cuda"
    workers = min(args.dataloader_num_workers, os.cpu_count() or 1)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=as_is, pin_memory=cuda)
    for micro_step, batch in enumerate(loader, start=first):
        dataset.bad_rows.update(batch["row"][batch.pop("replaced")].tolist())  # workers found them in their own copy
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        yield (
            batch,
            StepRandom(args.seed, micro_step, rank=rank, world_size=world_size, device=accelerator.device),
        )
