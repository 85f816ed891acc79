# SPDX-License-Identifier: Apache-2.0
"""The folders that flags name: those of this machine, or what is fetched from the Hub, which is asked once."""

import functools
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from utils.command_line import UsageError
from utils.hub_errors import why_not

VAE = "--pretrained_vae_model_name_or_path"


def teacher_folder(source: str, revision: str | None, variant: str | None) -> Path:
    """The folder of the teacher's pipeline; of a Hub id, all that its stock pipeline loads is downloaded first.

    Raises:
        UsageError: it could not be.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return _downloaded(source, revision, variant)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--pretrained_model_name_or_path {source}: what the student takes over of it could not be fetched from "
            f"the Hub: {why_not(error) or error}"
        ) from error


@functools.cache
def _downloaded(source: str, revision: str | None, variant: str | None) -> Path:
    return Path(DiffusionPipeline.download(source, revision=revision, variant=variant))


@functools.cache
def _downloaded_model(name: str) -> Path:
    formats = [f"diffusion_pytorch_model*{suffix}" for suffix in (".safetensors", ".bin", ".index.json")]
    return Path(snapshot_download(name, allow_patterns=["config.json", *formats]))


def vae_folder(name: str) -> Path:
    """The folder of another VAE than the teacher's.

    Raises:
        UsageError: it is a whole pipeline, or could not be fetched.
    """
    if not Path(name).is_dir():
        try:
            return _downloaded_model(name)
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            raise UsageError(f"{VAE} {name} cannot be had from the Hub: {why_not(error) or error}") from error
    if (Path(name) / "vae" / "config.json").is_file():
        raise UsageError(f"{VAE} {name} is a whole pipeline. Give the folder of its VAE, {Path(name) / 'vae'}.")
    return Path(name)
