# SPDX-License-Identifier: Apache-2.0
"""Any diffusers pipeline: found, loaded, given another scheduler; and the files it was loaded from."""

import inspect
import json
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from utils.backbones.clip_prompts import tokenizer_of
from utils.backbones.sd3_prompts import T5
from utils.command_line import UsageError, announce
from utils.devices import DTYPE_KEYWORD
from utils.files import loaded_files
from utils.hub_errors import no_pipeline

LORA = "pytorch_lora_weights.safetensors"


def pipeline_folder(name_or_path: str, flag: str, *, revision=None, variant=None, pickled: bool = False) -> Path:
    """The local folder of a pipeline; a Hub id is downloaded.

    Raises:
        UsageError: there is no diffusers pipeline of that name.
    """
    if Path(name_or_path).is_dir():
        if not (Path(name_or_path) / "model_index.json").is_file():
            raise UsageError(
                f"{flag} {name_or_path}: that folder has no model_index.json. Give the folder of a whole pipeline, as "
                "its save_pretrained and the training scripts write it."
            )
        return Path(name_or_path)
    safe = None if pickled else True
    try:
        return Path(DiffusionPipeline.download(name_or_path, revision=revision, variant=variant, use_safetensors=safe))
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {name_or_path}: no such folder here, and {no_pipeline(error)}") from error


def load_pipeline(
    folder: Path, flag: str, *, dtype: torch.dtype, device, variant=None, pickled: bool = False
) -> DiffusionPipeline:
    """The pipeline on its device, without what would touch its images afterwards: safety checker and watermark.

    Raises:
        UsageError: it does not load; safetensors alone are read unless `pickled`.
    """
    announce(f"loading the pipeline of {flag}")
    try:
        parts = json.loads((folder / "model_index.json").read_text())
        absent = {name: None for name, part in parts.items() if part == [None, None]}  # such as T5, left out of an SD3
        if parts.get("_class_name") == "StableDiffusion3Pipeline":  # or not even listed
            absent |= dict.fromkeys({T5, tokenizer_of(T5)} - parts.keys())
        pipeline = DiffusionPipeline.from_pretrained(
            folder, variant=variant, use_safetensors=None if pickled else True, **{DTYPE_KEYWORD: dtype}, **absent
        )
        if (folder / LORA).is_file():  # of a student whose adapters were not fused
            pipeline.load_lora_weights(folder, weight_name=LORA)
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        hint = ""
        if not variant and any(folder.rglob("*.fp16*.safetensors")):
            hint = " If its weights are a variant alone, name it: --variant fp16."
        if not pickled and any(folder.rglob("*.bin")):
            hint += " If its weights are pickled (.bin), --allow_pickle_weights loads them, weights only."
        raise UsageError(f"{flag} {folder} does not load: {error}{hint}") from error
    for name in ("safety_checker", "watermark"):
        if getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def denoiser_of(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The U-Net or transformer; in a pipeline that has neither by name, the component with the most parameters."""
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    largest = max(models, key=lambda name: sum(p.numel() for p in models[name].parameters()))
    return models.get("unet", models.get("transformer", models[largest]))


def decoder_of(pipeline: DiffusionPipeline) -> torch.nn.Module | None:
    """What makes pixels of latents; None where the denoiser works on pixels."""
    parts = (getattr(pipeline, name, None) for name in ("vae", "vqvae", "movq"))
    return next((part for part in parts if part is not None), None)


def use_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Give the pipeline the diffusers scheduler of that class name, with the settings of its own. Latents are clipped
    only where those settings say so.

    Raises:
        UsageError: no scheduler of diffusers, none for this kind of model, or one that this pipeline would misuse.
    """
    own = pipeline.scheduler
    compatible = {cls.__name__ for cls in own.compatibles}
    if type(own).__name__.startswith("FlowMatch"):  # diffusers lists none of these as compatible with another
        compatible |= {name for name in dir(diffusers) if name.startswith("FlowMatch") and name.endswith("Scheduler")}
    if name not in compatible:
        known = "is no scheduler of diffusers" if not hasattr(diffusers, name) else "is for another kind of model"
        raise UsageError(
            f"--scheduler {name} {known}. In place of the {type(own).__name__} of this pipeline can come: "
            f"{', '.join(sorted(compatible))}."
        )
    try:
        scheduler = getattr(diffusers, name).from_config(own.config)
    except (ImportError, ValueError) as error:
        raise UsageError(f"--scheduler {name} cannot be made from the pipeline's settings: {error}") from error
    source = "".join(inspect.getsource(cls) for cls in type(pipeline).__mro__ if "diffusers" in cls.__module__)
    if getattr(scheduler, "init_noise_sigma", 1) != 1 and "init_noise_sigma" not in source:
        raise UsageError(
            f"--scheduler {name} starts from noise of another scale (init_noise_sigma), which a "
            f"{type(pipeline).__name__} does not give it: the samples would be wrong. DDIMScheduler, "
            "DPMSolverMultistepScheduler, PNDMScheduler and UniPCMultistepScheduler start from unit noise."
        )
    pipeline.scheduler = scheduler
    if decoder_of(pipeline) is not None and clips(scheduler) and "clip_sample" not in own.config:
        use_clip_sample(pipeline, False)  # diffusers' default is made for pixels, and latents go beyond [-1, 1]


def clips(scheduler) -> bool:
    """Whether `clip_sample` is a setting of its class; in its config it may be a leftover of another's."""
    return "clip_sample" in inspect.signature(type(scheduler).__init__).parameters


def use_clip_sample(pipeline: DiffusionPipeline, clip: bool) -> None:
    """Have the pipeline's scheduler clip its estimates of the clean image, or not.

    Raises:
        UsageError: the scheduler has no such setting.
    """
    scheduler = pipeline.scheduler
    if not clips(scheduler):
        raise UsageError(
            f"--clip_sample has no effect: a {type(scheduler).__name__} does not clip. Leave it out, or add "
            "--scheduler DDIMScheduler."
        )
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, clip_sample=clip)


def pipeline_files(folder: Path, pipeline: DiffusionPipeline, variant: str | None) -> list[Path]:
    """The files that `pipeline` was loaded from: configs, tokenizers, and one set of weights of each component."""
    files = [path for path in (folder / "model_index.json", folder / LORA) if path.is_file()]
    for name, part in pipeline.components.items():
        if part is None:
            continue
        present = loaded_files((folder / name).glob("*"), variant)
        if not present:  # the Hub's oldest pipelines have their model in the root
            root = (*folder.glob("*config.json"), *folder.glob("diffusion_pytorch_model*"))
            present = loaded_files(root, variant)
        files += present
    return sorted(set(files))
