# SPDX-License-Identifier: Apache-2.0
"""Flags that make a step faster or smaller and leave what it computes alone."""

import os
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

logger = get_logger(__name__)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


def cpu_share(accelerator: Accelerator) -> int:
    """Cores of the machine for each process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // accelerator.num_processes)


def use_cpu_threads(args, accelerator: Accelerator) -> None:
    """On the CPU, take this process's share of the cores: `accelerate launch` sets OMP_NUM_THREADS to 1."""
    if accelerator.device.type == "cpu":
        torch.set_num_threads(args.num_cpu_threads or cpu_share(accelerator))


def apply_speed_flags(args, accelerator: Accelerator, student: nn.Module, teacher: nn.Module | None) -> None:
    """The teacher on its device in its inference dtype, TF32, the student's gradient checkpointing, xformers."""
    if teacher is not None:
        dtype = DTYPES[args.teacher_dtype or accelerator.mixed_precision]
        nn.Module.to(teacher, accelerator.device, dtype)  # diffusers' own `to` warns of an empty list of modules
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        try:
            for model in filter(None, (student, teacher)):
                model.enable_xformers_memory_efficient_attention()
        except (ValueError, ModuleNotFoundError) as error:  # on the CPU, and where it is not installed
            logger.warning(f"--enable_xformers_memory_efficient_attention: PyTorch's attention stays. {error}")


def with_gradients(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(args, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or Adam, fused into few kernels, or in 8 bits.

    Raises:
        ValueError: weights that are not float32, or `--use_8bit_adam` without bitsandbytes.
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
        try:
            import bitsandbytes
        except ImportError as error:
            raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.") from error
        eight_bit = {"adamw": bitsandbytes.optim.AdamW8bit, "adam": bitsandbytes.optim.Adam8bit}
        return eight_bit[args.optimizer](parameters, **settings)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[args.optimizer](parameters, fused=True, **settings)
