# SPDX-License-Identifier: Apache-2.0
"""The student as a plain diffusers pipeline, with its card and every argument it was made with."""

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


def write_card(args, backbone, *, method: str, sizes: str, distances: dict[str, float]) -> None:
    """The student's model card, in the Hub's form, into `--output_dir`."""
    teacher, data = args.pretrained_model_name_or_path, args.dataset_name or args.train_data_dir
    pipeline_class = backbone.pipeline_class.__name__
    tags = ["diffusers", "distillation", "lift-place"] if teacher else ["diffusers"]
    made = f"Distilled from `{teacher}` with {method}" if teacher else "Trained from scratch"
    front = ["library_name: diffusers", "pipeline_tag: unconditional-image-generation", "tags:"]
    parts = [
        "\n".join(["---", *front, *(f"- {tag}" for tag in tags), "---"]),
        f"# {Path(args.output_dir).name}",
        f"{made} on `{data}`: {args.max_train_steps:,} steps of {args.train_batch_size} images a process.",
        "![samples](samples.png)",
        "Above the teacher, below the student, column by column from the same noise." if teacher else "",
        f"```python\nfrom diffusers import {pipeline_class}\n\n"
        f'pipeline = {pipeline_class}.from_pretrained("{args.output_dir}")\n```',
        f"```\n{sizes}\n```",
    ]
    if distances:
        rows = "\n".join(f"| {who} | {distance:.2f} |" for who, distance in distances.items())
        parts.append(
            f"Frechet distance of {args.validation_num_samples:,} samples ({args.validation_num_inference_steps} DDIM "
            f"steps, eta 0, seed {args.seed}) to split `{args.validation_split}`, on the features of "
            f"`{args.validation_feature_extractor}`. It compares rows of this table only; it is no FID.\n\n"
            f"| samples of | distance |\n|---|---|\n{rows}"
        )
    if teacher:
        parts.append(
            "Method: H. Han, S. Yeo, J. Yoo, LIFT and PLACE: A Simple, Stable, and Effective Knowledge Distillation "
            "Framework for Lightweight Diffusion Models, CVPR 2026, arXiv 2605.19729. All arguments: `args.json`."
        )
    (Path(args.output_dir) / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n")
