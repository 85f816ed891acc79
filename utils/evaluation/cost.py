# SPDX-License-Identifier: Apache-2.0
"""What a pipeline costs: parameters, multiply-adds, time, memory, bytes on disk. Measured while it samples.

Memory is that above an idle process, which has the libraries loaded and nothing else: the weights, and what sampling
adds to what is there. The mark of a whole process says 1 GiB of a small pipeline and of one twenty times its size.
"""

import contextlib
import ctypes
import functools
import gc
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from utils.devices import peak_process_memory
from utils.evaluation.parallel import mapping
from utils.evaluation.pipelines import denoiser_of
from utils.evaluation.sampler import Sampler


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__) -> int:
    """Of shapes (B, heads, tokens, D): PyTorch 2.14 has no formula for its fused CPU attention, and counts none."""
    return sdpa_flop_count(query, key, value)


# as safetensors abbreviates them
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class Meter:
    """Draws blocks of samples and says what each cost: the first by itself, then `threads` at once."""

    def __init__(self, sampler: Sampler, device: torch.device, threads: int = 1):
        self.sampler, self.device, self.threads = sampler, device, threads
        self.forwards, self.forwards_per_image = 0, 0.0  # through the denoiser; guidance sends each sample twice
        self.macs: int | None = None  # of one forward of one sample
        self.counting = False
        self.weights = _touch_weights(sampler.pipeline)
        _give_back()
        self.used_before = used_memory(device)  # by the process, its weights, and whatever else is kept
        reset_peak_memory(device)

    def draw(self, own: Sequence[range], keep: Callable[[range, torch.Tensor, dict], None] | None = None):
        """Draw every block and yield its record: seconds of the process's time, forwards, bytes at the peak.

        `keep(block, images, record)` is called with each, its images uint8 (B, C, H, W), by the thread that drew it.
        """
        if not own:
            return
        hook = denoiser_of(self.sampler.pipeline).register_forward_hook(self._count, with_kwargs=True)
        yield self._draw_block(own[0], keep, warmed_up=False)
        hook.remove()
        self.threads = 1 if self.sampler.draws_ambient_noise else max(1, min(self.threads, len(own) - 1))
        with mapping(self.threads) as map_blocks:
            yield from map_blocks(functools.partial(self._draw_block, keep=keep), own[1:])

    def _draw_block(self, block: range, keep, warmed_up: bool = True) -> dict:
        start = time.perf_counter()
        images = self.sampler(block)  # on the CPU: the device has finished
        seconds = time.perf_counter() - start
        if not warmed_up:
            self.forwards_per_image = self.forwards / len(images)
        record = {
            "images": len(images),
            "seconds": seconds / self.threads if warmed_up else seconds,
            "warmed_up": warmed_up,
            "forwards_per_image": self.forwards_per_image,
            "macs": self.macs,
            # what sampling added, and the weights: what a process needs that does nothing else
            "peak_memory_bytes": max(0, peak_memory(self.device) - self.used_before) + self.weights,
        }
        if keep:
            keep(block, images, record)
        return record

    def _count(self, module, args, kwargs, _output) -> None:
        if self.counting:
            return
        inputs = (*args, *kwargs.values())  # the latents come first; some models take a list of them
        batched = (x for x in inputs if isinstance(x, list) or (isinstance(x, torch.Tensor) and x.ndim > 1))
        batch_size = len(next(batched))
        self.forwards += batch_size
        if self.macs is None:  # once more, to be counted; the samples come from the forward that was not
            self.counting = True
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                module(*args, **kwargs)
            self.counting = False
            self.macs = counter.get_total_flops() // 2 // batch_size


def cost(pipeline: DiffusionPipeline, records: list[dict], files: Sequence[Path], num_processes: int) -> dict:
    """Sizes of `pipeline` and, from the `records` of its blocks, what a sample took; JSON's types.

    MACs are of the denoiser alone, which does nearly all of the work. Seconds per image are those of one process, at
    the batch size of the blocks; blocks that warmed a process up count only where there are no others.
    """
    timed = [record for record in records if record["warmed_up"]] or records
    seconds = sum(record["seconds"] for record in timed) / sum(record["images"] for record in timed)
    images = sum(record["images"] for record in records)
    calls = sum(record["forwards_per_image"] * record["images"] for record in records) / images
    macs = records[0]["macs"]
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return {
        "parameters": sum(p.numel() for p in denoiser_of(pipeline).parameters()),
        "parameters_of_pipeline": sum(p.numel() for part in parts for p in part.parameters()),
        "size_on_disk_bytes": sum(path.stat().st_size for path in files),
        **({"stored_as": ", ".join(stored)} if (stored := stored_dtypes(files)) else {}),
        "macs_per_forward": macs,
        "forwards_per_image": calls,
        "macs_per_image": round(macs * calls),
        "seconds_per_image": seconds,
        "images_per_second": num_processes / seconds,
        "timed_images": sum(record["images"] for record in timed),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
    }


def stored_dtypes(files: Sequence[Path]) -> list[str]:
    """Of the floating-point tensors in those of `files` that are safetensors: a size on disk halves with float16."""
    found = set()
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    return sorted(STORED[name] for name in found & set(STORED))


def free(sampler: Sampler) -> None:
    """Let go of its pipeline, before another's memory is measured."""
    del sampler.pipeline
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _touch_weights(pipeline: DiffusionPipeline) -> int:
    """Bytes of a pipeline's parameters and buffers, all brought into memory: safetensors reads them when they are
    first needed, and what is measured from here on should not depend on that."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    tensors = {id(t): t for part in parts for t in (*part.parameters(), *part.buffers())}.values()
    for tensor in tensors:
        tensor.sum()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _give_back() -> None:
    """What is freed goes back to the system, where the C library is one that is asked for it: what is sampled would be
    put there, unseen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def used_memory(device: torch.device) -> int:
    """Bytes now, of what `peak_memory` says the highest of."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def reset_peak_memory(device: torch.device) -> None:
    """Begin to look for the highest use from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the process's high-water mark
        except PermissionError:  # in some containers; the mark is then that of the whole run
            pass


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU, of PyTorch's tensors; else of the whole process, its libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    mark = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if mark:
        return int(mark[1]) * 1024
    return peak_process_memory()
