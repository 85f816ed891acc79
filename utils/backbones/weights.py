# SPDX-License-Identifier: Apache-2.0
"""The weight files of one component: which of them a load takes, what is said where there are none, how they are
copied.

In a component's folder lie, side by side, whole files and shards with their index, variants (fp16) and formats:
`model.safetensors`, `model.fp16.safetensors`, `pytorch_model.bin`, `model-00001-of-00002.safetensors` with
`model.safetensors.index.json`, `model.fp16-00001-of-00002.safetensors` with `model.safetensors.index.fp16.json`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import ModelMixin
from safetensors import safe_open

from utils.counts import counted
from utils.files import read_json

OTHER_FORMATS = (".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".pt", ".pth", ".xml")  # nobody here reads
NARROW = {"F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors' headers name what is narrower than float32
WEIGHT_SUFFIXES = (".safetensors", ".bin", *OTHER_FORMATS)


class Weights(NamedTuple):
    """One set of a component's weights."""

    files: list[Path]  # the whole file, or the shards in order
    index: Path | None  # of shards
    variant: str | None  # in their names
    name: str  # what the whole file is called without a variant

    @property
    def pickled(self) -> bool:
        """Whether they are no safetensors."""
        return self.name.endswith(".bin")


def find_weights(folder: Path, kind: type, variant: str | None, *, pickled: bool) -> Weights:
    """Those that `kind.from_pretrained` takes of `folder`: of the variant, where the component has it, else plain
    ones, as a pipeline's `from_pretrained` does; safetensors, or with `pickled` .bin files where there are none.

    Raises:
        ValueError: there are none, or shards and their index do not agree; says what to do.
    """
    formats = _names(kind)[: 1 + pickled]
    for of in dict.fromkeys((variant, None)):
        for name in formats:
            whole = folder / _with_variant(name, of)
            indices = [folder / _with_variant(f"{name}.index.json", of), folder / f"{name}.{of}.index.json"]  # old
            index = next(filter(Path.is_file, indices), None)
            if index and not (whole.is_file() and not issubclass(kind, ModelMixin)):  # each library's order
                return Weights(_shards(index), index, of, name)
            if whole.is_file():
                return Weights([whole], None, of, name)
    raise ValueError(f"it holds no weights of a {kind.__name__} that can be read: {what_is_there(folder, kind)}.")


def stored_dtypes(weights: Weights) -> set[torch.dtype]:
    """Those of the tensors in the files, by their headers, as far as they are narrower than float32; all others, and
    pickled ones, which have no header, count as float32."""
    found = set()
    for path in weights.files if not weights.pickled else ():
        with safe_open(path, "pt") as file:
            found |= {NARROW.get(file.get_slice(name).get_dtype(), torch.float32) for name in file.keys()}
    return found or {torch.float32}


def what_is_there(folder: Path, kind: type) -> str:
    """Of weights that a load did not find: which others the folder holds, and the flag that takes them."""
    files = [path.name for path in sorted(folder.glob("*")) if path.is_file()]
    safe, bin_ = _names(kind)
    variants = sorted({found for name in files if (found := _variant_of(name, safe))})
    ways = [f"--variant {found} takes its {found} files" for found in variants]
    if any(name.startswith(bin_.removesuffix(".bin")) and name.endswith(".bin") for name in files):
        ways.append("--allow_pickle_weights loads its pickled .bin files, weights only")
    if ways:
        return ", ".join(ways)
    others = [name for name in files if name.endswith(WEIGHT_SUFFIXES)]
    return f"there is only {', '.join(others[:3])}" if others else "there is no weight file at all"


def has_only(folder: Path, variant: str) -> bool:
    """Whether a component has weights, of `variant` alone."""
    weights = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    return bool(weights) and all(f".{variant}." in name or f".{variant}-" in name for name in weights)


def copy_component(source: Path, target: Path, weights: Weights | None) -> None:
    """Copy a component's files to a new folder; of its weights only `weights`, under the names that a load without a
    variant looks for."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and ".index." not in path.name:
            shutil.copyfile(path, target / path.name)
    if weights is None:
        return
    count, stem, suffix = len(weights.files), *weights.name.rsplit(".", 1)
    plain = {}
    for i, path in enumerate(weights.files, start=1):
        plain[path.name] = f"{stem}-{i:05d}-of-{count:05d}.{suffix}" if weights.index else weights.name
        shutil.copyfile(path, target / plain[path.name])
    if weights.index:
        content = json.loads(weights.index.read_text())
        content["weight_map"] = {tensor: plain[file] for tensor, file in content["weight_map"].items()}
        (target / f"{weights.name}.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _names(kind: type) -> tuple[str, str]:
    return (
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        if issubclass(kind, ModelMixin)
        else ("model.safetensors", "pytorch_model.bin")
    )


def _with_variant(name: str, variant: str | None) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name


def _variant_of(file: str, name: str) -> str | None:
    """fp16 of model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors."""
    stem, suffix = map(re.escape, name.rsplit(".", 1))
    shard = r"(?:-\d{5}-of-\d{5})?"
    found = re.fullmatch(rf"{stem}{shard}\.([^.]+?){shard}\.{suffix}", file)
    return found and found[1]


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict) or not content["weight_map"]:
        raise ValueError(f"its {index.name} is no index of weight files. Fetch it again.")
    shards = [index.parent / name for name in sorted(set(content["weight_map"].values()))]
    absent = [path.name for path in shards if not path.is_file()]
    if absent:
        raise ValueError(
            f"its {index.name} names {counted(len(shards), 'file')}, not there: {len(absent)}, the first is "
            f"{absent[0]}. Fetch them, or delete the index if the weights are whole in another file."
        )
    return shards
