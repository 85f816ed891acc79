# SPDX-License-Identifier: Apache-2.0
"""A narrower pixel U-Net: a plain smaller `UNet2DModel` config first, slices of the teacher's tensors second.

A *space* is a set of channels that is cut with one list of indices wherever it appears: a residual stream with all
that adds to it, the inside of a resnet, the queries and keys of an attention. `_Coupling` walks the teacher in the
order of its forward and notes which spaces index each dimension of each tensor; a concatenation [hidden, skip] is two
spaces in a row. Scores are summed per channel of a space, its best channels are kept, every tensor is sliced once.

Widths follow Diff-Pruning (Fang et al., 2023) with the GroupNorm groups unchanged, so that the student needs no custom
class: `UNet2DModel.from_pretrained` and `DDPMPipeline` load it.
"""

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

logger = logging.getLogger(__name__)

RIDGE = 1e-3  # low frequencies are nearly collinear: plain least squares gives weights of 1e4 and more
SUPPORTED = {  # config entry -> the values whose tensors `_Coupling` knows
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


def _full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `UNet2DModel`, defaults filled in (Hub configs are often partial), private keys left out."""
    parameters = inspect.signature(UNet2DModel.__init__).parameters.values()
    return {p.name: config.get(p.name, p.default) for p in parameters if p.name != "self"}


def _height_width(sample_size: int | tuple[int, int]) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def _check_widths(config: Mapping[str, Any], owner: str) -> None:
    """Raise ValueError where `config`'s widths do not fit its groups, heads, time features or map sizes."""
    widths, groups, head_dim = config["block_out_channels"], config["norm_num_groups"], config["attention_head_dim"]
    stages = zip(widths, config["down_block_types"], reversed(config["up_block_types"]), strict=True)
    attended = {width for width, *blocks in stages if set(blocks) & {"AttnDownBlock2D", "AttnUpBlock2D"}}
    mid_groups = None
    if config["mid_block_type"] is not None and config["add_attention"]:
        attended, mid_groups = attended | {widths[-1]}, config["attn_norm_num_groups"]
    size = math.inf if config["sample_size"] is None else min(_height_width(config["sample_size"]))
    if any(width % groups for width in widths):
        raise ValueError(f"{owner} block_out_channels {widths} are no multiples of norm_num_groups {groups}")
    if mid_groups and widths[-1] % mid_groups:
        raise ValueError(f"{owner} last width {widths[-1]} is no multiple of attn_norm_num_groups {mid_groups}")
    if head_dim is not None and any(width % head_dim for width in attended):
        found = f"{owner} widths with attention {sorted(attended)} are no multiples of attention_head_dim {head_dim}"
        raise ValueError(f"{found}: heads are kept whole, choose another --pruning_ratio")
    if widths[0] // 2 <= config["freq_shift"]:
        raise ValueError(f"{owner} width {widths[0]} leaves no time frequency with freq_shift {config['freq_shift']}")
    if any(width == groups and size < 2 ** (stage + 1) for stage, width in enumerate(widths)):
        found = f"{owner} block_out_channels {widths} have one channel per group on a 1x1 map at sample_size {size}"
        raise ValueError(f"{found}: GroupNorm is constant there, choose a lower --pruning_ratio")


def check_width_prunable(teacher_config: Mapping[str, Any]) -> None:
    """Raise ValueError naming the entry of a `UNet2DModel` config that width pruning does not support."""
    config = _full_config(teacher_config)
    for name, known in SUPPORTED.items():
        found = config[name] if name.endswith("block_types") else [config[name]]
        if unknown := [value for value in found if value not in known]:
            raise ValueError(f"--pruning_ratio does not support {name}={unknown[0]!r} in the teacher; known: {known}")
    if not config["norm_num_groups"]:
        raise ValueError("--pruning_ratio needs norm_num_groups in the teacher's config, found None")
    _check_widths(config, "the teacher's")


def width_config(teacher_config: Mapping[str, Any], pruning_ratio: float) -> dict[str, Any]:
    """The student's complete `UNet2DModel` config: w -> g * max(1, ceil(int(w * (1 - r)) / g)), g = norm_num_groups.

    A `time_embedding_dim` the teacher sets is cut to int(dim * (1 - r)); unset, it stays 4 x the first width.
    Raises ValueError for a ratio outside (0, 1), one that cuts nothing, and configs that are not supported.
    """
    if not 0 < pruning_ratio < 1:
        raise ValueError(f"--pruning_ratio must lie between 0 and 1 (exclusive), found {pruning_ratio}")
    check_width_prunable(teacher_config)
    config = _full_config(teacher_config)
    groups, widths = config["norm_num_groups"], tuple(config["block_out_channels"])
    kept = tuple(groups * max(1, math.ceil(int(w * (1 - pruning_ratio)) / groups)) for w in widths)
    if kept == widths:
        raise ValueError(
            f"--pruning_ratio {pruning_ratio} cuts nothing of {widths} in multiples of {groups}: raise it"
        )
    config["block_out_channels"] = kept
    if config["time_embedding_dim"]:
        config["time_embedding_dim"] = max(1, int(config["time_embedding_dim"] * (1 - pruning_ratio)))
    _check_widths(config, f"at --pruning_ratio {pruning_ratio} the student's")
    return config


@dataclass(eq=False)
class _Space:
    """Channels kept or cut together. `cuts` are GroupNorm boundaries; `unit` is a head's width, kept whole."""

    width: int
    keep: int
    unit: int = 1
    cuts: set[int] = field(default_factory=set)

    def best(self, score_C: Tensor) -> Tensor:
        """Ascending indices (keep,) of the best channels, each span between cuts giving its proportional share.

        A boundary whose share is no whole number (groups of a concatenation whose parts shrink unequally) is no cut.
        """
        score_U = score_C.view(-1, self.unit).sum(1)
        cuts = {cut for cut in self.cuts if 0 < cut < self.width and cut * self.keep % self.width == 0}
        chosen = []
        for start, stop in pairwise(sorted(cuts | {0, len(score_U)})):
            order = score_U[start:stop].argsort(descending=True, stable=True)
            chosen.append(start + order[: (stop - start) * self.keep // self.width].sort().values)
        return (torch.cat(chosen)[:, None] * self.unit + torch.arange(self.unit)).flatten()


Channels = tuple[_Space, ...]  # the spaces in a row along one dimension; () is a dimension that is never cut


def _spans(channels: Channels) -> Iterator[tuple[_Space, int]]:
    """Each space with the position at which it starts in the row."""
    return zip(channels, accumulate((space.width for space in channels), initial=0), strict=False)


class _Coupling:
    """`axes`: tensor name -> for each leading dimension its Channels. `unscaled`: single-head `to_q` layers."""

    def __init__(self, teacher: UNet2DModel, config: Mapping[str, Any]):
        widths = config["block_out_channels"]
        self.keep = dict(zip(teacher.config.block_out_channels, widths, strict=True))
        self.head_dim = teacher.config.attention_head_dim
        self.axes: dict[str, tuple[Channels, ...]] = {}
        self.unscaled: list[str] = []

        time_dims = teacher.time_embedding.linear_1.out_features, config["time_embedding_dim"] or 4 * widths[0]
        time_hidden, self.time = (_Space(*time_dims),), (_Space(*time_dims),)
        self._layer("time_embedding.linear_1", time_hidden, ())
        self._layer("time_embedding.linear_2", self.time, time_hidden)

        x = self._new(teacher.conv_in.out_channels)
        self._layer("conv_in", x, ())
        skips = [x]
        for i, block in enumerate(teacher.down_blocks):
            for j, _ in enumerate(block.resnets):
                x = self._resnet_attention(f"down_blocks.{i}", block, j, x)
                skips.append(x)
            for j, downsampler in enumerate(block.downsamplers or ()):
                x = self._resample(f"down_blocks.{i}.downsamplers.{j}", downsampler, x)
                skips.append(x)
        for j, _ in enumerate(teacher.mid_block.resnets if teacher.mid_block is not None else ()):
            x = self._resnet_attention("mid_block", teacher.mid_block, j, x)
        for i, block in enumerate(teacher.up_blocks):
            for j, _ in enumerate(block.resnets):
                x = self._resnet_attention(f"up_blocks.{i}", block, j, x + skips.pop())  # cat([hidden, skip])
            for j, upsampler in enumerate(block.upsamplers or ()):
                x = self._resample(f"up_blocks.{i}.upsamplers.{j}", upsampler, x)
        self._norm("conv_norm_out", teacher.conv_norm_out, x)
        self._layer("conv_out", (), x)

    def _new(self, width: int) -> Channels:
        return (_Space(width, self.keep[width]),)

    def _layer(self, name: str, out: Channels, inp: Channels) -> None:
        self.axes[f"{name}.weight"], self.axes[f"{name}.bias"] = (out, inp), (out,)

    def _norm(self, name: str, norm: nn.GroupNorm, x: Channels) -> None:
        self.axes[f"{name}.weight"] = self.axes[f"{name}.bias"] = (x,)
        for space, start in _spans(x):
            step = norm.num_channels // norm.num_groups
            space.cuts.update(edge - start for edge in range(0, norm.num_channels, step))

    def _resnet(self, name: str, resnet: ResnetBlock2D, x: Channels) -> Channels:
        inner = self._new(resnet.conv1.out_channels)
        self._norm(f"{name}.norm1", resnet.norm1, x)
        self._layer(f"{name}.conv1", inner, x)
        scale_and_shift = resnet.time_embedding_norm == "scale_shift"  # one projection, chunked in two
        self._layer(f"{name}.time_emb_proj", inner * 2 if scale_and_shift else inner, self.time)
        self._norm(f"{name}.norm2", resnet.norm2, inner)
        # Without a shortcut the output is added to the input itself, so it keeps the input's channels.
        out = x if resnet.conv_shortcut is None else self._new(resnet.conv2.out_channels)
        self._layer(f"{name}.conv2", out, inner)
        if resnet.conv_shortcut is not None:
            self._layer(f"{name}.conv_shortcut", out, x)
        return out

    def _resnet_attention(self, name: str, block: nn.Module, index: int, x: Channels) -> Channels:
        """One resnet of a block and the attention after it, where there is one; attention adds to its stream."""
        x = self._resnet(f"{name}.resnets.{index}", block.resnets[index], x)
        attentions = getattr(block, "attentions", ())
        if index >= len(attentions) or attentions[index] is None:
            return x
        attention, name = attentions[index], f"{name}.attentions.{index}"
        if attention.group_norm is not None:
            self._norm(f"{name}.group_norm", attention.group_norm, x)
        query, value = self._new(attention.inner_dim), self._new(attention.inner_dim)
        if self.head_dim is None:  # one head as wide as the stage, whose softmax scale changes with the width
            self.unscaled.append(f"{name}.to_q")
        else:  # a head is one softmax and the values it weighs
            query[0].unit = self.head_dim
            value = query
        self._layer(f"{name}.to_q", query, x)
        self._layer(f"{name}.to_k", query, x)
        self._layer(f"{name}.to_v", value, x)
        self._layer(f"{name}.to_out.0", x, value)
        return x

    def _resample(self, name: str, module: nn.Module, x: Channels) -> Channels:
        if isinstance(module, ResnetBlock2D):
            return self._resnet(name, module, x)
        out = self._new(module.conv.out_channels)
        self._layer(f"{name}.conv", out, x)
        return out

    def kept(self, scores: Mapping[str, Tensor]) -> dict[_Space, Tensor]:
        """Kept indices (keep,) of every space; a channel's score is the sum over all tensor slices it indexes."""
        totals: dict[_Space, Tensor] = {}
        for name, axes in self.axes.items():
            for dim, channels in enumerate(axes):
                score = scores[name].double().transpose(0, dim)
                for space, start in _spans(channels):
                    part = score[start : start + space.width].reshape(space.width, -1).sum(1)
                    totals[space] = totals.get(space, 0) + part
        return {space: space.best(score) for space, score in totals.items()}


def _cut(weight: Tensor, axes: tuple[Channels, ...], kept: Mapping[_Space, Tensor]) -> Tensor:
    """A copy of `weight` with only the kept indices along every dimension that is cut."""
    weight = weight.clone()
    for dim, channels in enumerate(axes):
        if channels:
            index = torch.cat([kept[space] + start for space, start in _spans(channels)])
            weight = weight.index_select(dim, index)
    return weight


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


@dataclass(frozen=True)
class ModelSize:
    """`macs`: multiply-adds of one forward of one sample, None for a config without sample_size."""

    block_out_channels: tuple[int, ...]
    parameters: int
    macs: int | None


def model_size(config: Mapping[str, Any]) -> ModelSize:
    """Count parameters and MACs of any `UNet2DModel` config on the meta device: no memory, no random numbers."""
    config = _full_config(config)
    with torch.device("meta"):
        model, macs = UNet2DModel(**config), None
        if config["sample_size"] is not None:
            sample = torch.zeros(1, config["in_channels"], *_height_width(config["sample_size"]))
            time = torch.zeros(1, dtype=torch.long)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(sample, time, class_labels=None if model.class_embedding is None else time)
            macs = counter.get_total_flops() // 2
    return ModelSize(tuple(config["block_out_channels"]), sum(p.numel() for p in model.parameters()), macs)


def model_table(teacher: ModelSize | None, student: ModelSize) -> str:
    """Widths, parameters and MACs of teacher and student as plain text; without a teacher, the student's alone."""
    sizes = [student] if teacher is None else [teacher, student]
    rows = {
        "": ["teacher", "student"][-len(sizes) :],
        "widths": ["-".join(map(str, size.block_out_channels)) for size in sizes],
        "parameters": [f"{size.parameters:,}" for size in sizes],
        "MACs per sample": ["unknown" if size.macs is None else f"{size.macs:,}" for size in sizes],
    }
    if teacher is not None:
        rows["parameters kept"] = ["", f"{student.parameters / teacher.parameters:.2%}"]
    return "\n".join(f"{label:<16}" + "".join(f"{cell:>28}" for cell in cells) for label, cells in rows.items())


@dataclass(frozen=True)
class WidthReport:
    """Sizes, and tensor names: the student's `sliced`, `copied`, `refitted` and `fresh`, the teacher's `dropped`.

    `refit_error`: relative error over time of the refitted time embedding layer, None without a refit.
    """

    teacher: ModelSize
    student: ModelSize
    pruning_ratio: float
    init: str
    sliced: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    refitted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    refit_error: float | None = None

    def table(self) -> str:
        """The sizes table, then how many tensors took which way, then the names dropped and refitted."""
        kinds = ("sliced", "copied", "refitted", "dropped", "fresh")
        lines = [
            model_table(self.teacher, self.student),
            f"pruning ratio {self.pruning_ratio}, student init {self.init}",
            "tensors: " + ", ".join(f"{len(getattr(self, kind))} {kind}" for kind in kinds),
        ]
        if self.refitted:
            lines.append(f"refitted: {', '.join(self.refitted)} (relative error {self.refit_error:.2%})")
        if self.dropped:
            lines.append(f"dropped: {', '.join(self.dropped)}")
        return "\n".join(lines)


def taylor_scores(teacher: UNet2DModel, losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """First-order Taylor importance |w * dL/dw| of every parameter, L being the sum of `losses`.

    `losses` yields scalar losses of `teacher`, each computed when it is asked for (a generator), which may end early.
    Meanwhile dropout is off and gradients are on; the teacher's flags, gradients and modes are restored, also when a
    loss raises. Returns parameter name -> float32 scores (shape of the parameter).
    Raises ValueError for no loss at all, and for a loss that is not a finite scalar with a graph to the teacher.
    """
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
    coupling = _Coupling(teacher, config)
    assert coupling.axes.keys() == old.keys(), coupling.axes.keys() ^ old.keys()
    kept = coupling.kept({name: score.cpu() for name, score in scores.items()})
    new = {name: _cut(old[name], coupling.axes[name], kept) for name in student.state_dict()}
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
