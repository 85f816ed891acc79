# SPDX-License-Identifier: Apache-2.0
"""What is about to happen, to be read before hours are spent; what came of it; and with which arguments."""

import math
import platform
from pathlib import Path

import torch
from accelerate import Accelerator

from utils.commands import python_code, string
from utils.counts import counted
from utils.devices import peak_process_memory
from utils.files import PACKAGES, versions, write_json
from utils.threads import how_threads_wait
from utils.training.log import RunLog


def plan(args, accelerator: Accelerator, dataset, sizes: str, memory: str | None) -> str:
    """Sizes, devices, batch, epochs, where things are saved, and the memory that training will take on each device:
    `memory` as `utils.training.memory` estimates it."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    images = batch * args.max_train_steps
    count, threads = torch.get_num_threads(), ""
    if accelerator.device.type == "cpu":
        threads = f", {counted(count, 'thread')} each" + f", {how_threads_wait()}" * (count > 1)
    distance = " and the best by Frechet distance" if args.validation_feature_extractor else ""
    return "\n".join(
        [
            sizes,
            "",
            f"devices      {accelerator.num_processes} x {accelerator.device.type}, mixed precision "
            f"{accelerator.mixed_precision}{threads}",
            f"batch        {args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
            f"{counted(accelerator.num_processes, 'process')} = {batch}",
            f"data         {dataset}; {images:,} seen in {counted(args.max_train_steps, 'step')}, "
            f"{images / len(dataset):.1f} epochs",
            f"memory       {memory}",
            f"checkpoints  {args.output_dir}/checkpoints, every {counted(args.checkpointing_steps, 'step')}, the "
            f"newest {args.checkpoints_total_limit} kept{distance}",
            f"student      {args.output_dir}, a diffusers pipeline",
            *(["Dry run: this is the plan; nothing was trained or written."] if args.dry_run else []),
        ]
    )


def save_arguments(args, script: str, data_fingerprint: str) -> None:
    """`args.json`: every flag, the versions, and which data."""
    content = {
        "script": Path(script).name,
        "arguments": vars(args),
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "data_fingerprint": data_fingerprint,
    }
    write_json(Path(args.output_dir) / "args.json", content)


def _peak_memory(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    return f"{peak_process_memory() / 2**30:.2f} GiB, of which Python and its libraries are most in a small run"


def summary(args, log: RunLog, validation, dataset) -> str:
    """What was made, where, how good it is, and what to run next."""
    folder = Path(args.output_dir)
    lines = [
        f"Saved: {folder}, a stock diffusers pipeline, loaded back; log: {log.path}",
        f"Report: {folder / 'report.html'}, samples, sizes, distances and curves on one page",
    ]
    if validation.distances:
        lines.append(f"Frechet distance to real images, {counted(args.validation_num_samples, 'sample')}:")
        lines += [f"  {who:<26}{distance:10.2f}" for who, distance in validation.distances.items()]
    if validation.best:
        distance, step = validation.best
        untrained = validation.distances.get("student before training", math.inf)
        worse = ", further away than before training: train longer" * (untrained < distance)
        lines.append(f"Best at step {step:,} with {distance:.2f}, kept in {folder / 'best'}{worse}")
    if log.seconds:
        lines.append(
            f"{log.images / log.seconds:.0f} images/s in training, peak memory {_peak_memory(log.accelerator)}"
        )
    if dataset.bad_rows:
        lines.append(f"{counted(len(dataset.bad_rows), 'image')} could not be decoded; the next good rows stood in")
    code = validation.backbone.sampling_code(
        string(folder.resolve()), args.validation_num_inference_steps, validation.condition
    )
    lines.append(f"Next: a picture, sample.png in the current folder\n    {python_code(code)}")
    return "\n".join(lines)
