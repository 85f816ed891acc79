# SPDX-License-Identifier: Apache-2.0
"""What follows the length of a run, `--max_train_steps`: the learning rate, and the weight of the fine term."""

import math
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from utils.distillation.losses import fine_weight

RATES = ("linear", "cosine", "cosine_with_restarts", "polynomial")
WEIGHTS = ("linear", "cosine")


def count_steps(args, num_rows: int, num_processes: int) -> None:
    """Turn `--num_train_epochs` into `--max_train_steps`, which is what everything else goes by."""
    if args.num_train_epochs:
        images = args.train_batch_size * args.gradient_accumulation_steps * num_processes
        args.max_train_steps = math.ceil(args.num_train_epochs * num_rows / images)
        args.num_train_epochs = None


def learning_rate(arguments: dict[str, Any], peak: float, step: int) -> float:
    """That after `step` optimizer steps of a run with these `arguments` of the command line."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=peak)
    steps = {"num_warmup_steps": arguments["lr_warmup_steps"], "num_training_steps": arguments["max_train_steps"]}
    schedule = get_scheduler(arguments["lr_scheduler"], optimizer, **steps)
    return peak * schedule.lr_lambdas[0](step)


def changed_curves(
    then: dict[str, Any], now: dict[str, Any], step: int, *, peaks: tuple[float, float], rate_step: int
) -> list[str]:
    """What another `--max_train_steps` makes of the curves of a run that goes on after `step`: a phrase for each that
    follows it, with its values here and at the end.

    `then` and `now` are the arguments of the command line, `peaks` the learning rates that their schedules begin from;
    `rate_step` counts as the schedule does, without the steps that a loss scaler skipped.
    """
    ends = [each["max_train_steps"] for each in (then, now)]
    if ends[0] == ends[1]:
        return []
    curves = {}
    if now["lr_scheduler"] in RATES:
        runs = list(zip((then, now), peaks, strict=True))
        curves[f"--lr_scheduler {now['lr_scheduler']}"] = (
            "the learning rate",
            [learning_rate(each, peak, rate_step) for each, peak in runs],
            [learning_rate(each, peak, end) for (each, peak), end in zip(runs, ends, strict=True)],
        )
    weighting = now.get("weighting")
    if weighting in WEIGHTS and then.get("weighting") == weighting and now["lambda_kd_output"]:
        curves[f"--weighting {weighting}"] = (
            "the weight of the fine term",
            [fine_weight(weighting, min(1, step / end)) for end in ends],
            [fine_weight(weighting, 1)] * 2,
        )
    return [
        f"max_train_steps was {ends[0]:,}, is {ends[1]:,}, which {flag} follows ({what} after step {step:,} was to be "
        f"{here[0]:.3g}, is {here[1]:.3g}; at the end it was to be {last[0]:.3g}, is {last[1]:.3g})"
        for flag, (what, here, last) in curves.items()
    ]
