# SPDX-License-Identifier: Apache-2.0
"""What follows the length of a run, `--max_train_steps`: the learning rate, and weights of loss terms."""

import math
from argparse import Namespace
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from utils.distillation.features import feature_weight
from utils.distillation.losses import fine_weight

RATES = ("linear", "cosine", "cosine_with_restarts", "polynomial")
# flag -> (what it weighs, its values that follow the length, the weight by value and progress, what it needs)
WEIGHTS = {
    "weighting": ("the fine term", ("linear", "cosine"), fine_weight, "lambda_kd_output"),
    "feature_weighting": ("the feature loss", ("linear",), feature_weight, "lambda_kd_feat"),
}


def count_steps(args, num_rows: int, num_processes: int) -> None:
    """Turn `--num_train_epochs` into `--max_train_steps`, which is what everything else goes by."""
    if args.num_train_epochs:
        images = args.train_batch_size * args.gradient_accumulation_steps * num_processes
        args.max_train_steps = math.ceil(args.num_train_epochs * num_rows / images)
        args.num_train_epochs = None


def make_lr_scheduler(args, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """That of `--lr_scheduler`, as diffusers', to be stepped once for every optimizer step. With `--min_lr_rate` the
    cosine c(step) from 1 to 0 becomes min_lr_rate + (1 - min_lr_rate) * c(step), from the end of the warm-up on."""
    schedule = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    if args.min_lr_rate:
        share, least = schedule.lr_lambdas[0], args.min_lr_rate

        def raised(step: int) -> float:
            return share(step) if step < args.lr_warmup_steps else least + (1 - least) * share(step)

        schedule.lr_lambdas = [raised] * len(schedule.lr_lambdas)  # at step 0 they agree
    return schedule


def learning_rate(arguments: dict[str, Any], peak: float, step: int) -> float:
    """That after `step` optimizer steps of a run with these `arguments` of the command line."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=peak)
    return peak * make_lr_scheduler(Namespace(**arguments), optimizer).lr_lambdas[0](step)


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
    for name, (term, following, weight, needed) in WEIGHTS.items():
        value = now[name]
        if value in following and then[name] == value and now[needed]:
            here, last = [weight(value, min(1, step / end)) for end in ends], [weight(value, 1)] * 2
            curves[f"--{name} {value}"] = (f"the weight of {term}", here, last)
    return [
        f"max_train_steps was {ends[0]:,}, is {ends[1]:,}, which {flag} follows ({what} after step {step:,} was to be "
        f"{here[0]:.3g}, is {here[1]:.3g}; at the end it was to be {last[0]:.3g}, is {last[1]:.3g})"
        for flag, (what, here, last) in curves.items()
    ]
