# SPDX-License-Identifier: Apache-2.0
"""A narrower pixel U-Net: a plain smaller `UNet2DModel` config first, slices of the teacher's tensors second.

Widths follow Diff-Pruning (Fang et al., 2023) with the GroupNorm groups unchanged, so that the student needs no custom
class: `UNet2DModel.from_pretrained` and `DDPMPipeline` load it. Scores are summed per channel of a space (see
`coupling`), its best channels are kept, every tensor is sliced once, the time features are refitted.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor

from utils.command_line import UsageError, announce
from utils.students.coupling import Coupling, cut
from utils.students.sizes import WidthReport, full_config, height_width, model_size

logger = logging.getLogger(__name__)

RIDGE = 1e-3  # low frequencies are nearly collinear: plain least squares gives weights of 1e4 and more
SUPPORTED = {  # config entry -> the values whose tensors `Coupling` knows
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "mid_block_type": ("UNetMidBlock2D", None),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}


def _check_widths(config: Mapping[str, Any], owner: str) -> None:
    """Raise ValueError where `config`'s widths do not fit its groups, heads, time features or map sizes."""
    widths, groups, head_dim = config["block_out_channels"], config["norm_num_groups"], config["attention_head_dim"]
    stages = zip(widths, config["down_block_types"], reversed(config["up_block_types"]), strict=True)
    attended = {width for width, *blocks in stages if set(blocks) & {"AttnDownBlock2D", "AttnUpBlock2D"}}
    mid_groups = None
    if config["mid_block_type"] is not None and config["add_attention"]:
        attended, mid_groups = attended | {widths[-1]}, config["attn_norm_num_groups"]
    size = math.inf if config["sample_size"] is None else min(height_width(config["sample_size"]))
    if any(width % groups for width in widths):
        raise UsageError(f"{owner} block_out_channels {widths} are no multiples of norm_num_groups {groups}")
    if mid_groups and widths[-1] % mid_groups:
        raise UsageError(f"{owner} last width {widths[-1]} is no multiple of attn_norm_num_groups {mid_groups}")
    if head_dim is not None and any(width % head_dim for width in attended):
        found = f"{owner} widths with attention {sorted(attended)} are no multiples of attention_head_dim {head_dim}"
        raise UsageError(f"{found}: heads are kept whole, choose another --pruning_ratio")
    if widths[0] // 2 <= config["freq_shift"]:
        raise UsageError(f"{owner} width {widths[0]} leaves no time frequency with freq_shift {config['freq_shift']}")
    if any(width == groups and size < 2 ** (stage + 1) for stage, width in enumerate(widths)):
        found = f"{owner} block_out_channels {widths} have one channel per group on a 1x1 map at sample_size {size}"
        raise UsageError(f"{found}: GroupNorm is constant there, choose a lower --pruning_ratio")


def check_width_prunable(teacher_config: Mapping[str, Any]) -> None:
    """Raise ValueError naming the entry of a `UNet2DModel` config that width pruning does not support."""
    config = full_config(teacher_config)
    for name, known in SUPPORTED.items():
        found = config[name] if name.endswith("block_types") else [config[name]]
        if unknown := [value for value in found if value not in known]:
            raise UsageError(f"--pruning_ratio does not support {name}={unknown[0]!r} in the teacher; known: {known}")
    if not config["norm_num_groups"]:
        raise UsageError("--pruning_ratio needs norm_num_groups in the teacher's config, found None")
    _check_widths(config, "the teacher's")


def width_config(teacher_config: Mapping[str, Any], pruning_ratio: float) -> dict[str, Any]:
    """The student's complete `UNet2DModel` config: w -> g * max(1, ceil(int(w * (1 - r)) / g)), g = norm_num_groups.

    A `time_embedding_dim` the teacher sets is cut to int(dim * (1 - r)); unset, it stays 4 x the first width.
    Raises ValueError for a ratio outside (0, 1), one that cuts nothing, and configs that are not supported.
    """
    if not 0 < pruning_ratio < 1:
        raise UsageError(f"--pruning_ratio must lie between 0 and 1 (exclusive), found {pruning_ratio}")
    check_width_prunable(teacher_config)
    config = full_config(teacher_config)
    groups, widths = config["norm_num_groups"], tuple(config["block_out_channels"])
    kept = tuple(groups * max(1, math.ceil(int(w * (1 - pruning_ratio)) / groups)) for w in widths)
    if kept == widths:
        raise UsageError(
            f"--pruning_ratio {pruning_ratio} cuts nothing of {widths} in multiples of {groups}: raise it"
        )
    config["block_out_channels"] = kept
    if config["time_embedding_dim"]:
        config["time_embedding_dim"] = max(1, int(config["time_embedding_dim"] * (1 - pruning_ratio)))
    _check_widths(config, f"at --pruning_ratio {pruning_ratio} the student's")
    return config


def _refit(weight: Tensor, bias: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, float]:
    """Ridge regression of a linear layer of features `old` (T, F) onto features `new` (T, G) of the same T timesteps.

    weight (D, F), bias (D,) -> weight (D, G), bias (D,), and the relative error over time of the layer's output.
    """
    target = old.double() @ weight.double().T  # (T, D)
    centred, features = target - target.mean(0), new.double() - new.double().mean(0)
    gram = features.T @ features + RIDGE * torch.eye(new.shape[1], dtype=torch.float64)
    fitted = torch.linalg.solve(gram, features.T @ centred)  # (G, D)
    error = (centred - features @ fitted).norm() / centred.norm().clamp(min=1e-12)
    bias = bias + target.mean(0) - new.double().mean(0) @ fitted  # the intercept is not shrunk
    return fitted.T.float().contiguous(), bias.float(), error.item()


def taylor_scores(teacher: UNet2DModel, losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """First-order Taylor importance |w * dL/dw| of every parameter, L being the sum of `losses`.

    `losses` yields scalar losses of `teacher`, each computed when it is asked for (a generator), which may end early.
    Meanwhile dropout is off and gradients are on; the teacher's flags, gradients and modes are restored, also when a
    loss raises. Returns parameter name -> float32 scores (shape of the parameter).
    Raises ValueError for no loss at all, and for a loss that is not a finite scalar with a graph to the teacher.
    """
    announce("scoring the teacher's channels on real images (--student_init taylor)")
    parameters = dict(teacher.named_parameters())
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters.values()]
    modes = [(module, module.training) for module in teacher.modules()]
    count = 0
    try:
        teacher.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(True).grad = None
        with torch.enable_grad():
            for count, loss in enumerate(losses, start=1):
                if loss.numel() != 1 or not loss.requires_grad or not loss.isfinite():
                    raise ValueError(f"--student_init taylor: loss {count} is no finite scalar with a graph: {loss}")
                loss.backward()
        if not count:
            raise ValueError("--student_init taylor needs at least one loss, found none")
        return {
            name: torch.zeros_like(p).float() if p.grad is None else (p.detach().float() * p.grad.float()).abs()
            for name, p in parameters.items()
        }
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required).grad = gradient
        for module, training in modes:
            module.training = training


def prune_width(
    teacher: UNet2DModel,
    pruning_ratio: float,
    *,
    init: Literal["taylor", "magnitude", "random"],
    scores: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> tuple[UNet2DModel, WidthReport]:
    """A narrower float32 student on the CPU in train mode, all parameters trainable; teacher and global RNG untouched.

    `init`: keep the channels with the largest `scores` (taylor, see `taylor_scores`) or the largest squared weights
    (magnitude), or take no teacher weight at all but diffusers' own initialisation under `seed` (random).
    Raises ValueError as `width_config` does, and for an unknown `init` or scores that do not belong to it.
    """
    if init not in ("taylor", "magnitude", "random"):
        raise ValueError(f"--student_init must be taylor, magnitude or random, found {init!r}")
    if (scores is not None) != (init == "taylor"):
        raise ValueError(
            f"--student_init taylor needs scores and the others take none, found {init} and {type(scores)}"
        )
    config = width_config(teacher.config, pruning_ratio)
    sizes = model_size(teacher.config), model_size(config)
    if init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
            student = UNet2DModel(**config)
        return student, WidthReport(*sizes, pruning_ratio, init, fresh=tuple(student.state_dict()))

    old = {name: parameter.detach().float().cpu() for name, parameter in teacher.named_parameters()}
    scores = {name: weight.square() for name, weight in old.items()} if init == "magnitude" else scores
    if wrong := [name for name in old if name not in scores or scores[name].shape != old[name].shape]:
        raise ValueError(f"--student_init taylor: no scores of the teacher's shape for {wrong}")
    with torch.device("meta"):
        student = UNet2DModel(**config)
    coupling = Coupling(teacher, config)
    assert coupling.axes.keys() == old.keys(), coupling.axes.keys() ^ old.keys()
    kept = coupling.kept({name: score.cpu() for name, score in scores.items()})
    new = {name: cut(old[name], coupling.axes[name], kept) for name in student.state_dict()}
    for layer in coupling.unscaled:  # attention divides by sqrt(width): undo the change of width
        for name in (f"{layer}.weight", f"{layer}.bias"):
            new[name] *= math.sqrt(new[name].shape[0] / old[name].shape[0])
    refitted, error = (), None
    if teacher.time_proj.num_channels != student.time_proj.num_channels:
        refitted = ("time_embedding.linear_1.weight", "time_embedding.linear_1.bias")
        timesteps = torch.arange(teacher.config.num_train_timesteps or 1000)
        features = teacher.time_proj(timesteps), student.time_proj(timesteps)
        *fitted, error = _refit(*(new[name] for name in refitted), *features)
        new.update(zip(refitted, fitted, strict=True))
    student.load_state_dict(new, assign=True)  # raises where a shape differs from the config's
    dropped = tuple(name for name in old if name not in new)
    if dropped:
        logger.info("Two neighbouring widths became equal, their resnet has no shortcut any more: dropped %s", dropped)
    copied = tuple(name for name in new if name not in refitted and torch.equal(new[name], old[name]))
    sliced = tuple(name for name in new if name not in refitted + copied)
    return student, WidthReport(*sizes, pruning_ratio, init, sliced, copied, refitted, dropped, (), error)
