# SPDX-License-Identifier: Apache-2.0
"""Configs and weights from folders and from the Hub, with errors that name the flag."""

import json
from pathlib import Path

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin

from utils.backbones.weights import find_weights, has_only
from utils.command_line import UsageError, announce
from utils.devices import DTYPE_KEYWORD
from utils.hub_errors import no_pipeline

TEACHER = "--pretrained_model_name_or_path"
# a model class -> what it was called where its oldest pipelines on the Hub were saved; diffusers loads these as it
OLD_NAMES = {"DiTTransformer2DModel": "Transformer2DModel"}


def read_json_config(path: str, flag: str) -> dict:
    """A model config from a JSON file. Raises UsageError naming `flag` where there is none."""
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{flag} {path} is not a readable JSON file: {error}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise UsageError(f"{flag} {path} has no '_class_name': give the config.json of a diffusers model.")
    return config


def pipeline_class_name(name_or_path: str, revision: str | None, flag: str) -> str:
    """The `_class_name` of a pipeline's model_index.json. Raises UsageError naming `flag` where there is none."""
    return pipeline_index(name_or_path, revision, flag)["_class_name"]


def pipeline_index(name_or_path: str, revision: str | None, flag: str) -> dict:
    """A pipeline's model_index.json. Raises UsageError naming `flag` where there is none that names its class."""
    try:
        index = DiffusionPipeline.load_config(name_or_path, revision=revision)
        index["_class_name"]  # which every pipeline names
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:  # the last two: JSON of something else
        where = "that folder has no model_index.json" if Path(name_or_path).is_dir() else "no such folder here"
        if Path(name_or_path).is_file():
            where = (
                "that is one file, not a pipeline's folder (diffusers' from_single_file and save_pretrained make one)"
            )
        raise UsageError(f"{flag} {name_or_path}: {where}, and {no_pipeline(error)}") from error


def component_config(
    model_class: type[ConfigMixin], folder: str, name_or_path: str, flag: str, revision: str | None = None
) -> dict:
    """A model's or scheduler's config from its `folder` in a pipeline or, as in the Hub's oldest repositories, from
    the root; or from a folder of the model alone. Raises UsageError naming `flag` where there is none."""
    errors = []
    for subfolder in (folder, None):
        try:
            return dict(model_class.load_config(name_or_path, subfolder=subfolder, revision=revision))
        except (OSError, ValueError, TypeError) as error:
            errors.append(str(error))
    raise UsageError(f"{flag} {name_or_path} holds no config of a {model_class.__name__}: {errors[0]}")


def listed_scheduler(name_or_path: str, flag: str, revision: str | None = None) -> str | None:
    """The scheduler's class in a pipeline's model_index.json, which is the one that loads, whatever its own config
    says; None where there is no pipeline. Raises UsageError naming `flag` where a pipeline has none."""
    try:
        listed = DiffusionPipeline.load_config(name_or_path, revision=revision).get("scheduler")
    except (OSError, ValueError):
        return None
    if not isinstance(listed, list) or not all(listed):
        raise UsageError(
            f"{flag} {name_or_path}: its model_index.json lists no scheduler, without which no pipeline loads. Add it."
        )
    return listed[1]


def load_component(
    model_class: type[ModelMixin],
    folder: str,
    name_or_path: str,
    flag: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ModelMixin:
    """The model whose config `component_config` finds. Raises UsageError naming `flag`."""
    announce(f"loading the {folder} of {name_or_path}")
    for subfolder in (folder, None):
        try:
            model_class.load_config(name_or_path, subfolder=subfolder, revision=revision)
        except (OSError, ValueError):
            continue
        _check_weights(Path(name_or_path) / (subfolder or ""), model_class, flag, variant, allow_pickle)
        try:
            model, info = model_class.from_pretrained(
                name_or_path,
                subfolder=subfolder,
                revision=revision,
                variant=variant,
                use_safetensors=None if allow_pickle else True,  # diffusers unpickles with weights_only=True
                output_loading_info=True,
                **{DTYPE_KEYWORD: dtype},
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{flag} {name_or_path} does not load: {error} If its weights are pickled (.bin), "
                "--allow_pickle_weights loads them, weights only."
            ) from error
        if info["missing_keys"]:  # diffusers would go on with random ones
            raise UsageError(
                f"{flag} {name_or_path}: the weights lack {len(info['missing_keys'])} tensors of the "
                f"{model_class.__name__} in its config, the first is {min(info['missing_keys'])}."
            )
        return model
    raise UsageError(f"{flag} {name_or_path} holds no {model_class.__name__}.")


def _check_weights(folder: Path, kind: type, flag: str, variant: str | None, pickled: bool) -> None:
    """Raises UsageError where a folder here holds no such weights, with what it holds and the flag that takes it."""
    if not folder.is_dir():
        return  # of the Hub
    try:
        found = find_weights(folder, kind, variant, pickled=pickled)
    except ValueError as error:
        hint = "" if flag == TEACHER else " (--variant is the teacher's: save a student without one)"
        raise UsageError(f"{flag} {folder} does not load: {error}{hint}") from error
    if found.variant != variant:
        parts = sorted(folder.parent.glob("*/")) if (folder.parent / "model_index.json").is_file() else []
        if alone := [part.name for part in parts if has_only(part, variant)]:
            raise UsageError(
                f"--variant {variant}: {folder} has no weights of it, and {' and '.join(alone)} beside it no others. "
                f'Give all parts plain ones: DiffusionPipeline.from_pretrained("{folder.parent}", '
                f'variant="{variant}").save_pretrained("other"), and name that folder without the flag.'
            )
        raise UsageError(
            f"--variant {variant}: {folder} has no weights of it. Leave the flag out to load its plain ones."
        )
