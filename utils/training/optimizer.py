# SPDX-License-Identifier: Apache-2.0
"""Which parameters train, and by which optimizer."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn

from utils.command_line import UsageError


def with_gradients(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(args, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """AdamW or Adam, fused into few kernels, or in 8 bits; it will step on `device`.

    Raises:
        UsageError: `--use_8bit_adam` without bitsandbytes, or on a device for which that has no such optimizer.
        ValueError: weights that are not float32.
    """
    parameters = list(parameters)
    if wrong := {str(p.dtype) for p in parameters if p.dtype != torch.float32}:
        raise ValueError(
            f"trainable weights must be float32, found {', '.join(sorted(wrong))}: half precision loses small "
            "updates; load the student in float32 and use --mixed_precision."
        )
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        if device.type == "mps":
            raise UsageError("--use_8bit_adam: bitsandbytes has no optimizer for Apple's GPU (mps); leave it out.")
        try:
            import bitsandbytes
        except ImportError as error:
            raise UsageError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.") from error
        eight_bit = {"adamw": bitsandbytes.optim.AdamW8bit, "adam": bitsandbytes.optim.Adam8bit}
        return eight_bit[args.optimizer](parameters, **settings)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[args.optimizer](parameters, fused=True, **settings)


def stepped(accelerator: Accelerator, grad_norm: torch.Tensor) -> bool:
    """Whether the optimizer moved the weights: fp16's loss scaler leaves out a step whose gradient overflows, as its
    norm `grad_norm` () shows.

    A fused optimizer leaves it out on the device, and neither torch nor accelerate tells the host, which counts the
    steps of the schedule and of the average. So with a loss scaler, and only then, the host waits for this one number
    in every optimizer step; for an optimizer that is not fused, torch waits in the same way.
    """
    return accelerator.scaler is None or bool(grad_norm.isfinite())
