# SPDX-License-Identifier: Apache-2.0
"""The student as a plain diffusers pipeline, and every argument it was made with."""

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors")


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


def move_into(source: Path, target: Path) -> None:
    """Move each entry of `source` to `target`, replacing what is there, and remove `source`."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        existing = target / entry.name
        if existing.is_dir():
            shutil.rmtree(existing)
        entry.replace(existing)
    source.rmdir()


def save_arguments(args, script: str, data_fingerprint: str) -> None:
    """`args.json`: every flag, the versions, and which data."""
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    content = {
        "script": Path(script).name,
        "arguments": vars(args),
        "versions": versions,
        "data_fingerprint": data_fingerprint,
    }
    (Path(args.output_dir) / "args.json").write_text(json.dumps(content, indent=2) + "\n")
