# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and what identifies them and the packages that made them."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# what the numbers of a run may depend on
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors")
# what file managers and network drives leave in any folder
STRAY_NAMES = frozenset((".DS_Store", "Thumbs.db", "desktop.ini", ".directory", "@eaDir", "lost+found"))
STRAY_BEGINNINGS = ("._", ".nfs", ".fuse_hidden", ".Trash")


def is_stray(path: Path) -> bool:
    """Whether a file manager or a network drive has left it there, and no program of ours or of the user's."""
    return path.name in STRAY_NAMES or path.name.startswith(STRAY_BEGINNINGS)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A hidden path in the folder of `path`, of its suffix, to write to; it takes the name of `path` when the block
    ends well and is removed when it does not. A reader, or a crash, finds the old file or the new one, never half.

    The hidden name holds the process's number, so that two that write the same file do not share it."""
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """`content` in `path`, by `written_beside`."""
    with written_beside(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """JSON, indented, by `written_beside`; what JSON has no type for, such as a path, as a string."""
    write_file(path, json.dumps(content, indent=1, default=str) + "\n")


def read_json(path: Path) -> Any:
    """What a file holds; None where there is none, or a crash of another program has cut it off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def sha256(path: Path) -> str:
    """Of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def loaded_files(present: Iterable[Path], variant: str | None) -> list[Path]:
    """Of the files in a component's folder those that it is loaded from, in order of their names: configs,
    vocabularies, and one set of weights, that of `variant` where there is one, safetensors before pickles."""
    files = sorted(path for path in present if path.is_file() and path.name[0] != ".")
    plain = [path for path in files if "." not in path.stem]
    chosen: list[Path] = []
    for candidates in ([path for path in files if variant and f".{variant}" in path.name], plain):
        for suffix in (".safetensors", ".bin"):
            chosen = chosen or [path for path in candidates if path.suffix == suffix]
    return [path for path in files if path in chosen or path.suffix in (".json", ".txt", ".model")]


def versions(*packages: str) -> dict[str, str]:
    """Of the packages that are installed, as pip names them."""
    return {package: importlib.metadata.version(package) for package in packages}
