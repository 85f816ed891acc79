# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that measure: loaded with a clear refusal, identified by their files, fed with images."""

import json
from pathlib import Path

import torch
from torch import Tensor

from utils.command_line import UsageError
from utils.files import sha256, versions


def preprocess(processor, images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, h, w) in the model's size, range and dtype."""
    options = {"return_tensors": "pt"}
    on_device = processor.backend == "torchvision"  # the other kind goes through PIL, and so through the CPU
    images = images.to(device if on_device else "cpu")
    if on_device:
        options["disable_grouping"] = False  # one resize for the batch; on the CPU the default is a loop
    return processor(images, **options)["pixel_values"].to(device, dtype)


def from_pretrained(auto_class, name: str, flag: str, what: str, needs: str, dtype: torch.dtype | None = None):
    """`auto_class.from_pretrained(name)`; with `dtype` a model and its loading report. Raises UsageError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.utils import logging

    options = {} if dtype is None else {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report of unused weights; what is missing is checked by the callers
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except (
        *(OSError, ValueError, ImportError, RuntimeError, AttributeError, TypeError, KeyError, SafetensorError),
        StrictDataclassError,
    ) as error:
        kind = "a directory" if Path(name).is_dir() else "no directory here, so taken for a Hub id,"
        raise UsageError(
            f"{flag}: {name!r} is {kind} but could not be loaded as {'an' if what[0] in 'aeiou' else 'a'} {what}. It "
            f"needs {needs}, as save_pretrained of a transformers model and of its processor write them. The library "
            f"says: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def check_weights(model, info: dict, name: str, flag: str, optional: str = "pooler.") -> None:
    """Raises UsageError when tensors are missing from the checkpoint, other than those that start with `optional`."""
    missing = {key for key in info["missing_keys"] if not key.startswith(optional)}
    if missing:
        raise UsageError(
            f"{flag}: the weights of {name!r} lack {len(missing)} tensors of "
            f"{type(model).__name__}, the first is {min(missing)}. Random weights would measure nothing."
        )


def describe(name: str, flag: str, processor, dtype: torch.dtype) -> dict:
    """The protocol of a transformers model: hashes of the files it was read from, and its preprocessing."""
    from transformers.utils import cached_file

    folder = Path(name)
    if not folder.is_dir():  # a Hub id, just loaded
        folder = Path(cached_file(name, "config.json", local_files_only=True)).parent
    whole = folder / "model.safetensors"
    weights = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not weights:
        raise UsageError(f"{flag}: {name!r} has no model.safetensors on its main branch, to identify it by.")
    preprocessing = json.loads(processor.to_json_string())
    size = "x".join(str(value) for value in preprocessing["size"].values()) if preprocessing.get("do_resize") else "no"
    return {
        "name": folder.resolve().name if Path(name).is_dir() else name,
        "resize": f"{size} resize, {processor.backend}",
        "preprocessing": {**preprocessing, "backend": processor.backend},
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": {path.name: sha256(path) for path in [folder / "config.json", *weights]},
        "libraries": versions("transformers", "torchvision", "pillow", "torch"),
    }
