# SPDX-License-Identifier: Apache-2.0
"""The student as a plain diffusers pipeline, and every argument it was made with."""

import json
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".msgpack", ".h5", ".onnx", ".pb")


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
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


def save_student(args, denoiser: ModelMixin, component: str, folder: Path) -> None:
    """Write `denoiser` in the pipeline of its teacher, whose other components are copied as files, byte for byte: what
    transformers would write anew, other versions of it may not read."""
    source = args.pretrained_model_name_or_path
    if not Path(source).is_dir():
        source = DiffusionPipeline.download(source, revision=args.revision, variant=args.variant)
    beside = folder / ".pipeline.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    index = json.loads((Path(source) / "model_index.json").read_text())
    for name, kind in index.items():
        if isinstance(kind, list) and kind[0] is not None and name != component:
            other = args.pretrained_vae_model_name_or_path if name == "vae" else None
            if other and not Path(other).is_dir():
                other = snapshot_download(other)
            copy_component(Path(other or Path(source) / name), beside / name, None if other else args.variant)
    shutil.copyfile(Path(source) / "model_index.json", beside / "model_index.json")
    denoiser.save_pretrained(beside / component, safe_serialization=True)
    move_into(beside, folder)


def copy_component(source: Path, target: Path, variant: str | None) -> None:
    """Copy a component's files; of its weights only the safetensors of `variant`, without that in their names, or
    where there are none, the pickled ones."""
    target.mkdir()
    weights = {path for path in source.iterdir() if path.suffix in WEIGHT_SUFFIXES}
    wanted = [path for path in weights if len(path.name.split(".")) == (3 if variant else 2)]
    wanted = [path for path in wanted if variant is None or path.name.split(".")[1].split("-")[0] == variant]
    for suffix in (".safetensors", ".bin"):
        if chosen := [path for path in wanted if path.suffix == suffix]:
            break
    for path in source.iterdir():
        if path.is_file() and (path not in weights or path in chosen):
            shutil.copyfile(path, target / (path.name.replace(f".{variant}", "") if variant else path.name))


def move_into(source: Path, target: Path) -> None:
    """Move each entry of `source` to `target`, replacing what is there, and remove `source`."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        existing = target / entry.name
        if existing.is_dir():
            shutil.rmtree(existing)
        entry.replace(existing)
    source.rmdir()
