# SPDX-License-Identifier: Apache-2.0
"""How much memory a run will take on each device, known before it starts.

One training step is taken with fake tensors, which have shapes, dtypes and lifetimes but no values, and the storages
that are alive at once are counted. So autocast's copies, fused attention and gradient checkpointing are what they are
in the run. What the libraries take for themselves (contexts, convolution workspaces, fragmentation) comes on top.
"""

import contextlib
import copy
import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.command_line import announce
from utils.counts import counted
from utils.devices import DTYPES
from utils.distillation.losses import place_loss


class PeakMemory(TorchDispatchMode):
    """Inside, counts the bytes of all storages that operators have seen and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.see(args, kwargs, result)
        return result

    def see(self, *values) -> None:
        """Count the tensors in nested containers, those that are new."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.alive:
                    self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
                    self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size


@contextlib.contextmanager
def _norms_in_float32() -> Iterator[None]:
    """Autocast on CUDA runs group and layer norms in float32, and what they give goes on in float32 to the next
    convolution; autocast on the CPU, where fake tensors live, does not. (A function mode would not see what gradient
    checkpointing recomputes within the backward.)"""

    def in_float32(norm):
        return lambda x, *args, **options: norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **options)

    plain = F.group_norm, F.layer_norm
    F.group_norm, F.layer_norm = map(in_float32, plain)
    try:
        yield
    finally:
        F.group_norm, F.layer_norm = plain


def memory_estimate(args, accelerator: Accelerator, student: nn.Module, teacher: nn.Module | None, backbone) -> str:
    """GiB of a training step's peak on each device, what it is made of, and of the samples of a validation.

    `student` as it is before `accelerator.prepare`: a wrapped one would move its inputs to a device.
    """
    announce("estimating the memory of a step")
    trained = [p for p in student.parameters() if p.requires_grad]
    gradients = _size(trained)
    optimizer = sum(_optimizer_state(p.numel(), args.use_8bit_adam) for p in trained)
    ema = gradients if args.use_ema else 0
    kept = {f"student with optimizer{' and EMA' if ema else ''}": _size(_tensors(student)) + optimizer + ema}
    kept["teacher"] = _size(_tensors(teacher))
    buckets = gradients if accelerator.num_processes > 1 else 0  # DDP's; the gradients are views of them
    # the step of the average holds one difference for every weight
    step = max(_training_step(args, accelerator, student, teacher, backbone), buckets + ema)
    resident = sum(kept.values())
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in (*kept.items(), ("gradients and activations", step)))
    estimate = f"about {_gib(resident + step)} a device: {parts}"
    at_once = max(
        args.validation_shown_samples, args.validation_batch_size if args.validation_feature_extractor else 0
    )
    if at_once:
        sampling = resident + buckets + _sampling(args, accelerator, student, teacher, backbone, at_once)
        # the trained weights make room for the average; they wait in the host's memory
        sampling += ema if accelerator.device.type == "cpu" else 0
        estimate += f"\nvalidation   about {_gib(sampling)} on the main process, {counted(at_once, 'sample')} at once"
    return estimate


def _training_step(args, accelerator: Accelerator, student: nn.Module, teacher: nn.Module | None, backbone) -> int:
    """Bytes at the peak of forward, losses and backward, without the weights."""
    distil = args.lambda_kd_output > 0 or args.lambda_kd_feat > 0
    with _counted(accelerator) as memory:
        student, teacher = _faked(args, student), _faked(args, teacher) if distil else None
        memory.see(_tensors(student), _tensors(teacher))
        weights = memory.now
        if accelerator.num_processes > 1 or args.gradient_accumulation_steps > 1:  # they are there from before
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        inputs = recursively_apply(lambda x: x.new_empty(args.train_batch_size, *x.shape[1:]), backbone.example())
        clean, noise = (torch.empty_like(inputs["x_t"]) for _ in range(2))
        with _autocast(accelerator):
            output, features = student(**inputs)
        output, features = backbone.read(output.float())[0], [feature.float() for feature in features]
        loss = F.mse_loss(output, noise)
        if distil:
            with torch.no_grad():
                target, target_features = teacher(**inputs)
            # PLACE stands for all output losses: it holds the most, its order and both predictions sorted by it
            group_size = min(getattr(args, "group_size", 16), output[0, 0].numel())
            loss = loss + place_loss(output, backbone.read(target.float())[0], group_size=group_size).loss
            for ours, theirs in zip(features, target_features, strict=True):
                loss = loss + F.mse_loss(ours, theirs.float())
        loss.backward()
        del clean
        return memory.peak - weights


def _sampling(
    args, accelerator: Accelerator, student: nn.Module, teacher: nn.Module | None, backbone, count: int
) -> int:
    """Bytes at the peak of drawing `count` samples, without the denoisers' weights."""
    shape = backbone.example()["x_t"].shape[1:]
    guided = backbone.sampling_options.get("guidance_scale", 0) > 1  # with and without the prompt
    doubled = count * 2 if guided else count
    peaks = []
    for denoiser in filter(None, (student, teacher)):
        with _counted(accelerator) as memory, torch.no_grad(), _autocast(accelerator):
            denoiser = _faked(args, denoiser)
            memory.see(_tensors(denoiser))
            weights = memory.now
            denoiser(**recursively_apply(lambda x: x.new_empty(doubled, *x.shape[1:]), backbone.example()))
        peaks.append(memory.peak - weights)
    if backbone.configs.vae is not None:
        with _counted(accelerator) as memory, torch.no_grad():
            vae = AutoencoderKL.from_config(backbone.configs.vae)
            memory.see(_tensors(vae))
            vae.enable_slicing()
            vae.decode(torch.empty(count, *shape))
        peaks.append(memory.peak)
    return max(peaks)


@contextlib.contextmanager
def _counted(accelerator: Accelerator) -> Iterator[PeakMemory]:
    """Inside, tensors are fake, and their storages are counted."""
    norms = _norms_in_float32() if accelerator.device.type == "cuda" else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), norms, PeakMemory() as memory:
        yield memory


def _autocast(accelerator: Accelerator) -> torch.autocast:
    """As the accelerator's, on the CPU: it decides what fake tensors are cast to."""
    return torch.autocast("cpu", DTYPES[accelerator.mixed_precision], enabled=accelerator.native_amp)


def _faked(args, module: nn.Module) -> nn.Module:
    """A copy whose tensors are fake, on the CPU; the module itself is not touched."""
    tensors = {id(p): nn.Parameter(_like(p), p.requires_grad) for p in module.parameters()}
    tensors |= {id(buffer): _like(buffer) for buffer in module.buffers()}
    shadow = copy.deepcopy(module, tensors)
    if args.enable_xformers_memory_efficient_attention:  # CUDA alone has it; it keeps what PyTorch's fused one keeps
        shadow.denoiser.disable_xformers_memory_efficient_attention()
    return shadow


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _tensors(module: nn.Module | None) -> list[torch.Tensor]:
    return [] if module is None else [*module.parameters(), *module.buffers()]


def _size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizer_state(count: int, eight_bit: bool) -> int:
    """Bytes of Adam's two moments of `count` weights; bitsandbytes keeps small tensors in float32 and gives each
    256 others a scale."""
    return 2 * (count + 4 * -(-count // 256)) if eight_bit and count >= 4096 else 8 * count


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"
