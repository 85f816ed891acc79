# SPDX-License-Identifier: Apache-2.0
"""What differs between denoisers, one file each. To add one: write the file, name its pipelines in `BACKBONES`."""

import importlib
import json
from pathlib import Path

# pipeline class in the teacher's model_index.json, or model class in --student_config -> module and class
BACKBONES = {
    "DDPMPipeline": ("utils.backbones.ddpm", "DDPM"),
    "DDIMPipeline": ("utils.backbones.ddpm", "DDPM"),
    "UNet2DModel": ("utils.backbones.ddpm", "DDPM"),
}


def choose_backbone(args) -> type:
    """The backbone class for the teacher, or, training from scratch, for the student's config.

    Raises:
        ValueError: no such teacher, not a diffusers pipeline, or a class that no backbone knows.
    """
    if args.pretrained_model_name_or_path:
        flag, source = "--pretrained_model_name_or_path", args.pretrained_model_name_or_path
        class_name = _pipeline_class_name(source, args.revision, flag)
    elif args.student_config:
        flag, source = "--student_config", args.student_config
        class_name = read_json_config(source, flag)["_class_name"]
    else:  # a student that exists, trained on without a teacher
        flag, source = "--student_model_name_or_path", args.student_model_name_or_path
        class_name = _pipeline_class_name(source, None, flag)
    if class_name not in BACKBONES:
        kind = "Pipeline" if args.pretrained_model_name_or_path else "Model"
        supported = ", ".join(name for name in BACKBONES if name.endswith(kind))
        raise ValueError(f"{flag} {source} is a {class_name}; supported are {supported}.")
    module, name = BACKBONES[class_name]
    return getattr(importlib.import_module(module), name)


def read_json_config(path: str, flag: str) -> dict:
    """A model config from a JSON file. Raises ValueError naming `flag` where there is none."""
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{flag} {path} is not a readable JSON file: {error}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise ValueError(f"{flag} {path} has no '_class_name': give the config.json of a diffusers model.")
    return config


def _pipeline_class_name(name_or_path: str, revision: str | None, flag: str) -> str:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(name_or_path, revision=revision)["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        where = "that folder has no model_index.json" if Path(name_or_path).is_dir() else "no such folder here"
        raise ValueError(
            f"{flag} {name_or_path}: {where}, and no diffusers pipeline of that name was "
            f"found on the Hub. Paths are relative to the current folder. ({type(error).__name__}: {error})"
        ) from error
