# SPDX-License-Identifier: Apache-2.0
"""Several processes that wait for each other, and never for one that has gone."""

import functools
import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

from utils.command_line import UsageError

# Hosts wait while the main process validates or indexes data. A process that dies is noticed by its launcher, and by
# its closed connection, without any timeout; the library's own is 30 minutes.
PATIENCE = timedelta(days=1)
# Devices wait for each other within a step, which all of them take at once: longer than this is a hung one. NCCL's own
# is 10 minutes.
STEP_PATIENCE = timedelta(minutes=30)

# how `accelerate launch` tells a script of what its config asks for
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def refuse_unsupported(args) -> None:
    """Refuse what `accelerate launch` asks for and these scripts do not do, before accelerate makes of it what it can.

    Raises:
        UsageError: FSDP, DeepSpeed, Megatron-LM or fp8, or other gradient accumulation steps than the flag's.
    """
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise UsageError(
                f"accelerate's config asks for {name} ({variable} is set); these scripts train with DDP alone. Launch "
                "them with a config of recipes/accelerate, or --config_file of a plain multi-GPU one."
            )
    if args.mixed_precision is None and os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() == "fp8":
        raise UsageError("accelerate's config asks for fp8, which is not supported here: give --mixed_precision bf16.")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(args.gradient_accumulation_steps))
    if steps != str(args.gradient_accumulation_steps):
        raise UsageError(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, but accelerate is told "
            f"{steps} by ACCELERATE_GRADIENT_ACCUMULATION_STEPS: make them equal, or unset the variable."
        )


def process_settings() -> list[KwargsHandler]:
    """For the Accelerator: how long devices wait for each other, and gradients that lie in DDP's buckets, where they
    are averaged, and not once more beside them."""
    return [
        InitProcessGroupKwargs(timeout=STEP_PATIENCE),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]


def hosts(accelerator: Accelerator) -> torch.distributed.ProcessGroup | None:
    """The processes as a gloo group of their own, which waits `PATIENCE`, and for no GPU; None where there is one.

    All processes must ask for it together the first time."""
    return _gloo_group(torch.distributed.group.WORLD) if accelerator.num_processes > 1 else None


@functools.cache
def _gloo_group(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def wait_for_everyone(accelerator: Accelerator) -> None:
    """As accelerate's, which waits in the GPU's group, where a long wait is taken for a hung one."""
    if group := hosts(accelerator):
        torch.distributed.barrier(group=group)


def on_main_process(accelerator: Accelerator, function: Callable, *arguments):
    """`function(*arguments)` on the main process, its value there and None elsewhere.

    Raises:
        ValueError: the one that `function` raised, on every process: none is left waiting at the next barrier.
    """
    value, refusals = None, [None]
    group = hosts(accelerator)
    if accelerator.is_main_process:
        try:
            value = function(*arguments)
        except ValueError as error:
            refusals = [error]
            if isinstance(error, UsageError):
                error.everywhere = True  # said once, by the main process
    if group:
        torch.distributed.broadcast_object_list(refusals, src=0, group=group)
    if refusals[0] is not None:
        raise refusals[0]
    return value


def main_process_first(accelerator: Accelerator, function: Callable, *arguments):
    """`function(*arguments)` on every process, on the main one before the others: what it downloads, they find.

    Raises:
        ValueError: as `on_main_process`; the others then do not begin.
    """
    value = on_main_process(accelerator, function, *arguments)
    return value if accelerator.is_main_process else function(*arguments)
