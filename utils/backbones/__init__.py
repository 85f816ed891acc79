# SPDX-License-Identifier: Apache-2.0
"""What differs between denoisers, one file each. To add one: write the file, name its pipelines in `BACKBONES`."""

import importlib

from utils.backbones.loading import pipeline_class_name, read_json_config
from utils.command_line import UsageError

# pipeline class in the teacher's model_index.json, or model class in --student_config -> module and class
BACKBONES = {
    "DDPMPipeline": ("utils.backbones.ddpm", "DDPM"),
    "DDIMPipeline": ("utils.backbones.ddpm", "DDPM"),
    "UNet2DModel": ("utils.backbones.ddpm", "DDPM"),
    "StableDiffusionPipeline": ("utils.backbones.stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("utils.backbones.stable_diffusion", "StableDiffusion"),
    "StableDiffusion3Pipeline": ("utils.backbones.sd3", "SD3"),
    "DiTPipeline": ("utils.backbones.dit", "DiT"),
}


def choose_backbone(args) -> type:
    """The backbone class for the teacher, or, training from scratch, for the student's config.

    Raises:
        UsageError: no such teacher, not a diffusers pipeline, or a class that no backbone knows.
    """
    if args.pretrained_model_name_or_path:
        flag, source = "--pretrained_model_name_or_path", args.pretrained_model_name_or_path
        class_name = pipeline_class_name(source, args.revision, flag)
    elif args.student_config:
        flag, source = "--student_config", args.student_config
        class_name = read_json_config(source, flag)["_class_name"]
    else:  # a student that exists, trained on without a teacher
        flag, source = "--student_model_name_or_path", args.student_model_name_or_path
        class_name = pipeline_class_name(source, None, flag)
    if class_name not in BACKBONES:
        kind = "Pipeline" if args.pretrained_model_name_or_path else "Model"
        supported = ", ".join(name for name in BACKBONES if name.endswith(kind))
        raise UsageError(f"{flag} {source} is a {class_name}; supported are {supported}.")
    module, name = BACKBONES[class_name]
    return getattr(importlib.import_module(module), name)
