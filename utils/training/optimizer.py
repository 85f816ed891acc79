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


def make_optimizer(args, parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW or Adam, fused into few kernels, or in 8 bits. With `--scale_lr` the rate is for one image of a step.

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
    micro_steps = args.gradient_accumulation_steps * accelerator.num_processes
    settings = {
        "lr": args.learning_rate * (args.train_batch_size * micro_steps if args.scale_lr else 1),
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        if accelerator.device.type == "mps":
            raise UsageError("--use_8bit_adam: bitsandbytes has no optimizer for Apple's GPU (mps); leave it out.")
        try:
            import bitsandbytes
        except ImportError as error:
            raise UsageError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.") from error
        eight_bit = {"adamw": bitsandbytes.optim.AdamW8bit, "adam": bitsandbytes.optim.Adam8bit}
        return eight_bit[args.optimizer](parameters, **settings)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[args.optimizer](parameters, fused=True, **settings)


def ema_warmup(args) -> dict[str, float]:
    """For `EMAModel`: a decay that grows as 1 - (1 + step / inv_gamma) ** -power, where one of the flags is given."""
    if args.ema_inv_gamma is None and args.ema_power is None:
        return {}
    return {"use_ema_warmup": True, "inv_gamma": args.ema_inv_gamma or 1.0, "power": args.ema_power or 0.75}


def stepped(accelerator: Accelerator, grad_norm: torch.Tensor) -> bool:
    """Whether the optimizer moved the weights: fp16's loss scaler leaves out a step whose gradient overflows, as its
    norm `grad_norm` () shows.

    A fused optimizer leaves it out on the device, and neither torch nor accelerate tells the host, which counts the
    steps of the schedule and of the average. So with a loss scaler, and only then, the host waits for this one number
    in every optimizer step; for an optimizer that is not fused, torch waits in the same way.
    """
    return accelerator.scaler is None or bool(grad_norm.isfinite())
