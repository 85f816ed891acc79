# SPDX-License-Identifier: Apache-2.0
"""The student as a plain diffusers pipeline, that loads with `from_pretrained` and nothing said."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from transformers import PreTrainedModel

from utils.backbones.folder import MODELS, Part, index_of, load_whole, parts_of, quietly
from utils.backbones.weights import copy_component, stored_dtypes
from utils.command_line import UsageError, announce


def save_pipeline(pipeline: DiffusionPipeline, component: str, folder: Path) -> None:
    """Write the pipeline to a hidden folder in `folder`, the same file system, and then move its parts into place."""
    beside = folder / ".pipeline.partial"
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.save_pretrained(beside, safe_serialization=True)
    for config_file in (beside / "model_index.json", *beside.glob("*/config.json")):
        config = json.loads(config_file.read_text())
        if Path(config.get("_name_or_path", "")).is_absolute():  # where a part was loaded from, on this machine
            del config["_name_or_path"]
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    move_into(beside, folder)
    load_back(folder, type(pipeline), component, getattr(pipeline, component))


def save_student(
    denoiser: ModelMixin, component: str, pipeline_class: type, parts: Mapping[str, Part], teacher: Path, folder: Path
) -> None:
    """Write `denoiser` in the pipeline of its `teacher`, whose other `parts` are copied as files, byte for byte: what
    transformers would write anew, other versions of it may not read."""
    beside = folder / ".pipeline.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    index = index_of(json.loads((teacher / "model_index.json").read_text()))
    for name, part in parts.items():
        copy_component(part.folder, beside / name, part.weights)
        if issubclass(part.kind, PreTrainedModel):
            _load_in_float32(beside / name / "config.json", part)
        index[name] = [index[name][0] if isinstance(index.get(name), list) else None, part.kind.__name__]
        if issubclass(part.kind, ModelMixin):
            index[name][0] = "diffusers"  # another VAE may stand in for one that is listed otherwise
    index[component] = ["diffusers", type(denoiser).__name__]  # today's name
    (beside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    denoiser.save_pretrained(beside / component, safe_serialization=True)
    move_into(beside, folder)
    load_back(folder, pipeline_class, component, denoiser)


def load_back(folder: Path, pipeline_class: type, component: str, denoiser: ModelMixin) -> None:
    """Load each part of an export as a plain `from_pretrained` does, one at a time; compare the denoiser's tensors.

    Raises:
        RuntimeError: a part does not load, or the parts do not go together; says where the student's weights are.
    """
    announce(f"loading {folder} back, as others will")
    try:
        for name, kind in parts_of(folder, pipeline_class, f"--output_dir {folder}", needed=component).items():
            if not issubclass(kind, MODELS):
                kind.from_pretrained(folder / name)
                continue
            with quietly():
                model = load_whole(kind, folder / name, f"--output_dir {folder}", pickled=None)
            others = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
            if others:
                raise UsageError(f"its {name} loads in {others.pop()}, the {component} in float32")
            if name == component:
                ours, theirs = denoiser.state_dict(), model.state_dict()
                if ours.keys() != theirs.keys() or not all(_equal(ours[key].cpu(), theirs[key]) for key in ours):
                    raise UsageError(f"the tensors of its {component} are others than those that were saved")
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"The student is written to {folder}, its own weights to {folder / component}, but it does not load back "
            f"as a pipeline: {error}"
        ) from error


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def move_into(source: Path, target: Path) -> None:
    """Move each entry of `source` to `target`, replacing what is there, and remove `source`."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        existing = target / entry.name
        if existing.is_dir():
            shutil.rmtree(existing)
        entry.replace(existing)
    source.rmdir()


def _load_in_float32(config_file: Path, part: Part) -> None:
    """Say in a copied text encoder's config that it loads in float32, as diffusers loads the other parts whatever
    their files are in; transformers alone would take the files' dtype, and the pipeline would hold two."""
    config = json.loads(config_file.read_text())
    said = config.get("dtype", config.get("torch_dtype"))
    may_be_half = part.weights.pickled or stored_dtypes(part.weights) != {torch.float32}
    if said == "float32" or (said is None and not may_be_half):
        return
    config |= {"dtype": "float32", "torch_dtype": "float32"}  # the second is read by transformers 4
    config_file.write_text(json.dumps(config, indent=2) + "\n")
