# SPDX-License-Identifier: Apache-2.0
"""What a pipeline costs: parameters, multiply-adds, time, memory, bytes on disk. Measured while it samples."""

import gc
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from utils.image_sets import blocks
from utils.sampling import Sampler, denoiser_of


class Meter:
    """Draws blocks of samples and says what each cost. The first block of a process warms it up."""

    def __init__(self, sampler: Sampler, device: torch.device):
        self.sampler, self.device = sampler, device
        self.denoiser = denoiser_of(sampler.pipeline)
        self.passed = 0  # samples through the denoiser; guidance sends each twice
        self.macs: int | None = None  # of one sample, once
        self.counting, self.warm = False, False
        self.denoiser.register_forward_hook(self._count, with_kwargs=True)
        reset_peak_memory(device)

    def __call__(self, indices: Sequence[int]) -> tuple[torch.Tensor, dict]:
        """Uint8 images (B, C, H, W), and their record: seconds, samples through the denoiser, bytes at the peak."""
        self.passed, warm = 0, self.warm
        start = time.perf_counter()
        images = self.sampler(indices)  # on the CPU: the device has finished
        record = {
            "images": len(images),
            "seconds": time.perf_counter() - start,
            "warmed_up": warm,
            "passed": self.passed,
            "macs": self.macs,
            "peak_memory_bytes": peak_memory(self.device),
        }
        self.warm = True
        return images, record

    def _count(self, module, args, kwargs, _output) -> None:
        if self.counting:
            return
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim > 1)
        batch_size = len(next(inputs))
        self.passed += batch_size
        if self.macs is None:  # once more, to be counted; the samples come from the forward that was not
            self.counting = True
            with FlopCounterMode(display=False) as counter:
                module(*args, **kwargs)
            self.counting = False
            self.macs = counter.get_total_flops() // 2 // batch_size


def measure(meter: Meter, accelerator: Accelerator, num_samples: int, batch_size: int, description: str) -> list[dict]:
    """The records of `num_samples` samples, drawn by all processes as an evaluation draws them, and thrown away."""
    own = blocks(num_samples, batch_size)[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(own, desc=description, unit="block", disable=not accelerator.is_local_main_process)
    return gather_object([meter(block)[1] for block in bar])


def cost(pipeline: DiffusionPipeline, records: list[dict], files: Sequence[Path], num_processes: int) -> dict:
    """Sizes of `pipeline` and, from the `records` of its blocks, what a sample took; JSON's types.

    MACs are of the denoiser alone, which does nearly all of the work. Seconds per image are those of one process, at
    the batch size of the blocks; blocks that warmed a process up count only where there are no others.
    """
    timed = [record for record in records if record["warmed_up"]] or records
    seconds = sum(record["seconds"] for record in timed) / sum(record["images"] for record in timed)
    images = sum(record["images"] for record in records)
    calls = sum(record["passed"] for record in records) / images
    macs = next(record["macs"] for record in records if record["macs"] is not None)
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return {
        "parameters": sum(p.numel() for p in denoiser_of(pipeline).parameters()),
        "parameters_of_pipeline": sum(p.numel() for part in parts for p in part.parameters()),
        "size_on_disk_bytes": sum(path.stat().st_size for path in files),
        "macs_per_forward": macs,
        "forwards_per_image": calls,
        "macs_per_image": round(macs * calls),
        "seconds_per_image": seconds,
        "images_per_second": num_processes / seconds,
        "timed_images": sum(record["images"] for record in timed),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
    }


def free(pipeline: DiffusionPipeline) -> None:
    """Take the pipeline off its device, before another is measured."""
    pipeline.to("cpu")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pipeline_files(folder: Path, pipeline: DiffusionPipeline, variant: str | None) -> list[Path]:
    """The files that `pipeline` was loaded from: configs, tokenizers, and one set of weights of each component."""
    files = [folder / "model_index.json"]
    for name in pipeline.components:
        inside = (folder / name).is_dir()  # the Hub's oldest pipelines have their model in the root
        present = sorted(path for path in (folder / name if inside else folder).iterdir() if path.is_file())
        weights = [path for path in present if path.suffix == ".safetensors"]
        weights = weights or [path for path in present if path.suffix == ".bin"]
        plain = [path for path in weights if "." not in path.stem]
        chosen = [path for path in weights if variant and f".{variant}" in path.name] or plain
        rest = {".json", ".txt", ".model"} if inside else set()
        files += [path for path in present if path in chosen or path.suffix in rest or path.name == "config.json"]
    return sorted(set(files))


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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
