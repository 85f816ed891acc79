# SPDX-License-Identifier: Apache-2.0
"""Where models and datasets from the Hub are stored."""

import os
import re
import sys
from pathlib import Path

from utils.command_line import UsageError


def use_download_cache(folder: str | None) -> None:
    """Honour `--cache_dir`: what diffusers, transformers and datasets download from now on, in this process and in
    those it starts, goes there and is looked for there. None leaves the libraries their own place.

    All of them ask huggingface_hub for its constant when they are called, so it is set once here, rather than
    `cache_dir=` given in every place, of which one would be forgotten.

    Raises:
        UsageError: a file, or one of our own caches, which an earlier version of a recipe meant.
    """
    if not folder:
        return
    path = Path(folder).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise UsageError(f"--cache_dir {folder} is a file. Give a folder, for what is downloaded from the Hub.")
    for flag, what in (("latent_cache_dir", is_latent_cache(path)), ("reference_cache_dir", is_reference_cache(path))):
        if what:
            raise UsageError(
                f"--cache_dir {folder} holds a cache of these scripts, whose flag is now --{flag}. --cache_dir is "
                "where models and datasets from the Hub are stored."
            )
    os.environ["HF_HUB_CACHE"] = os.environ["HF_DATASETS_CACHE"] = str(path)
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_CACHE = huggingface_hub.constants.HUGGINGFACE_HUB_CACHE = str(path)
    if "datasets" in sys.modules:  # else it reads the environment when it is imported
        config = sys.modules["datasets"].config
        config.HF_DATASETS_CACHE = path
        config.DOWNLOADED_DATASETS_PATH = path / config.DOWNLOADED_DATASETS_DIR
        config.EXTRACTED_DATASETS_PATH = config.DOWNLOADED_DATASETS_PATH / config.EXTRACTED_DATASETS_DIR


def is_latent_cache(folder: Path) -> bool:
    """Whether `folder` is one of `utils.data.cache`."""
    return (folder / "cache.json").is_file() or any(folder.glob("latents-*.safetensors"))


def is_reference_cache(folder: Path) -> bool:
    """Whether `folder` is one of `utils.evaluation.reference`."""
    return any(re.fullmatch(r"[0-9a-f]{32}", path.stem) for path in folder.glob("*.npz"))
