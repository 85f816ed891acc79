# SPDX-License-Identifier: Apache-2.0
"""A folder of image files to rows: one rule for training, validation and evaluation.

An image is every file in the folder and below whose name ends as those of images do, in whatever subfolder, linked
ones too, each folder once; where there are metadata files, what they name. What is left out is counted and said.
"""

import os
import warnings
from collections import Counter, deque
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from PIL import Image

from utils.command_line import FOLDERS, UsageError
from utils.counts import counted
from utils.data.metadata import METADATA, read_metadata

if TYPE_CHECKING:
    import datasets

BUILDER = "image_files"  # in the info of the datasets that are made here
NO_DECODER = {"BUFR", "GRIB", "HDF5", "MPEG"}  # formats that Pillow knows by name alone
STORED = {".parquet", ".arrow", ".csv", ".json", ".jsonl", ".zip", ".tar"}  # what the datasets library reads
NOTES = {".md", ".ini", ".db"}  # of people and of file managers: not worth a word
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}  # as the datasets library names them


def folder_rows(folder: str, flag: str, split: str | None = None, split_flag: str | None = None) -> "datasets.Dataset":
    """The images as undecoded files in the column `image`, in the order of their paths' characters. With metadata
    files their rows and columns; without, and with all images in several subfolders of one depth, the subfolder's
    name as the class `label`. `split` is a subfolder, None all of them.

    Raises:
        UsageError: no such folder, no image in it, no such split, or metadata that cannot be used.
    """
    import datasets

    if not Path(folder).is_dir():
        found = "it is a file" if Path(folder).exists() else "no such folder"
        raise UsageError(f"{flag} {folder}: {found}. {FOLDERS['images']}")
    root, what = os.path.abspath(folder), f"{flag} {folder}"
    files = _Files(root, what)
    if files.metadata:
        table, image_columns = read_metadata(files.metadata, what)
        named = {path for column in image_columns for path in table[column].to_pylist()}
        files.left_out["that the metadata does not name"] = sum(path not in named for path in files.images)
    else:
        table, image_columns = pa.table({"image": pa.array(files.images, pa.string())}), ["image"]
    if not len(table):
        raise UsageError(f"{what}: {files.without_images()}")

    paths = table[image_columns[0]].to_pylist()
    subfolders = [_subfolder(path, root) for path in paths]
    chosen = _of_split(set(subfolders), split, what, split_flag or flag)
    if split is None and _are_splits(chosen):
        warnings.warn(
            f"{what}: all {counted(len(paths), 'image')} are used, those of {' and '.join(sorted(chosen))} alike"
            f"{f'; {split_flag} takes one of these subfolders' if split_flag else ''}.",
            stacklevel=3,
        )
    kept = [number for number, name in enumerate(subfolders) if name in chosen]
    files.left_out["in other subfolders"] = len(paths) - len(kept)
    files.warn(len(kept))
    table = table.take(kept) if len(kept) < len(paths) else table

    features = {column: datasets.Image(decode=False) for column in image_columns}
    if not files.metadata:
        parents = [os.path.dirname(paths[number]) for number in kept]
        labels = [os.path.basename(parent) for parent in parents]
        if len(set(labels)) > 1 and len({parent.count(os.sep) for parent in parents}) == 1:
            table = table.append_column("label", pa.array(labels))
            features["label"] = datasets.ClassLabel(names=sorted(set(labels)))
    rows = datasets.Dataset(table, info=datasets.DatasetInfo(builder_name=BUILDER))
    for column, feature in features.items():
        rows = rows.cast_column(column, feature)
    return rows


def is_image_folder(folder: str) -> bool:
    """Whether there are image files in it, and nothing that a dataset is stored in or described by."""
    card = Path(folder) / "README.md"
    if not Path(folder).is_dir() or (card.is_file() and "configs:" in card.read_text(errors="replace")):
        return False
    files = _Files(os.path.abspath(folder), folder)
    return bool(files.images) and not (files.others.keys() - NOTES - {"no suffix"})


def _subfolder(path: str | None, root: str) -> str:
    """Of the root, that a file lies in or below; empty for one in the root itself."""
    first, _, rest = os.path.relpath(path, root).partition(os.sep) if path else ("", "", "")
    return first if rest else ""


def _split_of(name: str) -> str | None:
    """The split that a word stands for: `val` for validation."""
    return next((split for split, words in SPLITS.items() if name.lower() in words), None)


def _are_splits(subfolders: set[str]) -> bool:
    return len(subfolders) > 1 and all(map(_split_of, subfolders))


def _of_split(subfolders: set[str], split: str | None, what: str, split_flag: str) -> set[str]:
    """Of the subfolders of a folder those of `split`. Raises UsageError where there is none."""
    if split is None:
        return subfolders
    same = {name for name in subfolders if name == split or (_split_of(name) or name) == _split_of(split)}
    if same:
        return same
    if _split_of(split) == "train" and not _are_splits(subfolders):  # what a dataset without splits is, too
        return subfolders
    found = ", ".join(sorted(filter(None, subfolders))) or "no subfolder"
    raise UsageError(f"{split_flag}: {what} has no split '{split}', only {found}. Of a folder it is a subfolder.")


class _Files:
    """What lies in a folder and below: `images` and `metadata`, sorted paths, and how many files are neither."""

    def __init__(self, root: str, what: str):
        self.what = what
        self.images: list[str] = []
        self.metadata: list[str] = []
        self.left_out: Counter[str] = Counter()  # images, by why
        self.others: Counter[str] = Counter()  # other files, by how their names end
        known = Image.registered_extensions().items()
        self._suffixes = {suffix for suffix, kind in known if kind in Image.OPEN and kind not in NO_DECODER}
        # each folder is read once, where it lies rather than where a link to it does; a link back up is none to follow
        seen = {_identity(parent) for parent in Path(root).resolve().parents}
        self._folders, self._links, self._hidden = deque([root]), deque(), deque()
        while self._folders or self._links or self._hidden:
            is_hidden = not (self._folders or self._links)
            folder = (self._folders or self._links or self._hidden).popleft()
            try:
                if (identity := _identity(folder)) not in seen:
                    seen.add(identity)
                    self._read(folder, is_hidden)
            except OSError as error:
                raise UsageError(f"{what}: {folder} cannot be read: {error}") from error
        self.images.sort()
        self.metadata.sort()

    def _read(self, folder: str, is_hidden: bool) -> None:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=attrgetter("name")):
                suffix = os.path.splitext(entry.name)[1].lower()
                hidden = is_hidden or entry.name.startswith(".") or entry.name in ("__MACOSX", "__pycache__")
                try:
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                except OSError:  # a link to itself
                    is_folder, is_file = False, False
                if is_folder:
                    later = self._hidden if hidden else self._links if entry.is_symlink() else self._folders
                    later.append(entry.path)
                elif suffix in self._suffixes and hidden:
                    self.left_out["hidden"] += 1
                elif suffix in self._suffixes and not is_file:
                    self.left_out["links to nothing" if entry.is_symlink() else "no regular files"] += 1
                elif hidden:
                    pass
                elif suffix in self._suffixes and not _is_text(entry.path):
                    self.left_out["with a name that is not UTF-8"] += 1
                elif suffix in self._suffixes:
                    self.images.append(entry.path)
                elif entry.name in METADATA:
                    self.metadata.append(entry.path)
                else:
                    self.others[suffix or "no suffix"] += 1

    def without_images(self) -> str:
        """Why there is no image, and what to do."""
        if not (self.left_out.total() or self.others):
            return "the folder is empty."
        instead = "give another" if STORED.isdisjoint(self.others) else "give it as --dataset_name"
        return f"cannot be loaded as a folder of images, there is none in it: {self._rest()}; {instead}."

    def warn(self, used: int) -> None:
        """Say what is left out, where something is."""
        if rest := self._rest():
            warnings.warn(f"{self.what}: {counted(used, 'image')} used. Left out: {rest}.", stacklevel=4)

    def _rest(self) -> str:
        parts = [f"{counted(number, 'image')}, {why}" for why, number in self.left_out.items() if number]
        others = {suffix: number for suffix, number in self.others.items() if suffix not in NOTES}
        if others:
            kinds = ", ".join(f"{suffix} {number:,}" for suffix, number in sorted(others.items()))
            parts.append(f"{counted(sum(others.values()), 'file')} of other kinds ({kinds})")
        return "; ".join(parts)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
