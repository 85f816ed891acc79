# SPDX-License-Identifier: Apache-2.0
"""Where models run, in which dtype, on how many threads."""

import os
import sys
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from packaging.version import Version
from torch import nn

from utils.threads import wanted_threads

try:
    import resource
except ImportError:  # Windows
    import psutil

    resource = None

logger = get_logger(__name__)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
# of diffusers' `from_pretrained`, which warns of the older name where it knows the newer one
DTYPE_KEYWORD = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"


def cpu_share(accelerator: Accelerator) -> int:
    """Cores of the machine for each process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // accelerator.num_processes)


def peak_process_memory() -> int:
    """Bytes of memory that this process has taken at most."""
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def use_cpu_threads(args, accelerator: Accelerator) -> None:
    """On the CPU, threads as `--num_cpu_threads` says, else OMP_NUM_THREADS, else this process's share of the
    cores."""
    if accelerator.device.type == "cpu":
        torch.set_num_threads(args.num_cpu_threads or wanted_threads() or cpu_share(accelerator))


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """On its device, or on the CPU where that has no float64, as Apple's."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


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
            probe_xformers(accelerator.device, DTYPES[accelerator.mixed_precision])
        # on the CPU, where it is not installed, and where its wheel is of another torch
        except (ValueError, ModuleNotFoundError, NotImplementedError) as error:
            for model in filter(None, (student, teacher)):
                model.disable_xformers_memory_efficient_attention()
            logger.warning(f"--enable_xformers_memory_efficient_attention: PyTorch's attention stays. {error}")


def probe_xformers(device: torch.device, dtype: torch.dtype) -> None:
    """A forward and backward of its attention, which diffusers tries in float32 and forward alone. Raises
    NotImplementedError where it has no operator for them."""
    from xformers.ops import memory_efficient_attention

    query = torch.zeros((1, 2, 40), device=device, dtype=dtype, requires_grad=True)
    memory_efficient_attention(query, query, query).sum().backward()


EXACT = ("timestep", "time_ids")  # in bfloat16 a timestep of 999 would be 1000, and a side of 1023 pixels 1024


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The floating point tensors of a nested dict in `dtype`, but for those named in `EXACT`; all else as it is."""
    if isinstance(value, dict):
        return {name: part if name in EXACT else to_dtype(part, dtype) for name, part in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
