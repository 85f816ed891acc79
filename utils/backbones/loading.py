# SPDX-License-Identifier: Apache-2.0
"""Configs and weights from folders and from the Hub, with errors that name the flag."""

import json
from pathlib import Path

import torch
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin

from utils.command_line import UsageError

# class -> its folder in a pipeline
COMPONENTS = {
    "UNet2DModel": "unet",
    "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae",
    "DDPMScheduler": "scheduler",
}
# what decides which noise a timestep has and what is predicted of it
SCHEDULE = "prediction_type num_train_timesteps beta_start beta_end beta_schedule rescale_betas_zero_snr".split()


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
    try:
        return DiffusionPipeline.load_config(name_or_path, revision=revision)["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        where = "that folder has no model_index.json" if Path(name_or_path).is_dir() else "no such folder here"
        raise UsageError(
            f"{flag} {name_or_path}: {where}, and no diffusers pipeline of that name was "
            f"found on the Hub. Paths are relative to the current folder. ({type(error).__name__}: {error})"
        ) from error


def component_config(
    model_class: type[ConfigMixin], name_or_path: str, flag: str, revision: str | None = None
) -> dict:
    """A model's or scheduler's config from its folder in a pipeline or, as in the Hub's oldest repositories, from the
    root; or from a folder of the model alone. Raises UsageError naming `flag` where there is none."""
    errors = []
    for subfolder in (COMPONENTS[model_class.__name__], None):
        try:
            return dict(model_class.load_config(name_or_path, subfolder=subfolder, revision=revision))
        except (OSError, ValueError) as error:
            errors.append(str(error))
    raise UsageError(f"{flag} {name_or_path} holds no config of a {model_class.__name__}: {errors[0]}")


def load_schedule(args) -> DDPMScheduler:
    """The teacher's schedule, which a student must share: its pipeline's own scheduler only samples.

    Raises:
        UsageError: the teacher has no scheduler, or the student's pipeline has one of another schedule. A denoiser
            without a pipeline does not say what it was trained on.
    """
    flag, source = "--pretrained_model_name_or_path", args.pretrained_model_name_or_path
    scheduler = DDPMScheduler.from_config(component_config(DDPMScheduler, source, flag, args.revision))
    if not args.student_model_name_or_path:
        return scheduler
    flag, source = "--student_model_name_or_path", args.student_model_name_or_path
    try:
        config = component_config(DDPMScheduler, source, flag)
    except ValueError:
        return scheduler
    student = DDPMScheduler.from_config(config).config
    for key in SCHEDULE:
        if student[key] != scheduler.config[key]:
            what = "predicts" if key == "prediction_type" else f"has {key}"
            raise UsageError(
                f"{flag} {source}: its scheduler {what} {student[key]}, the teacher's {scheduler.config[key]}; both "
                "must see the same noise and predict the same of it. Take a student and a teacher of one schedule."
            )
    return scheduler


def load_component(
    model_class: type[ModelMixin],
    name_or_path: str,
    flag: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> ModelMixin:
    """The float32 model whose config `component_config` finds. Raises UsageError naming `flag`."""
    for subfolder in (COMPONENTS[model_class.__name__], None):
        try:
            model_class.load_config(name_or_path, subfolder=subfolder, revision=revision)
        except (OSError, ValueError):
            continue
        try:
            model, info = model_class.from_pretrained(
                name_or_path,
                subfolder=subfolder,
                revision=revision,
                variant=variant,
                use_safetensors=None if allow_pickle else True,  # diffusers unpickles with weights_only=True
                dtype=torch.float32,
                output_loading_info=True,
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
