# SPDX-License-Identifier: Apache-2.0
"""A shorter Stable Diffusion U-Net: a plain `UNet2DConditionModel` config with fewer blocks first, the teacher's
tensors in it second.

A U-Net of n stages has in each of them `layers_per_block` layers (a resnet and perhaps an attention) on the way down,
one more on the way up, and its mid block below the innermost. Presets follow BK-SDM (Kim et al., 2024) for Stable
Diffusion 1.x and 2.x, and KOALA (Lee et al., 2024), which shortens the transformers too, for XL. The first two of
BK-SDM's fit XL as well; those sizes are our own, in neither paper.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from utils.command_line import UsageError
from utils.students.sizes import full_config, model_size, model_table

# entries with a value per stage; outermost stage first, and innermost stage first
PER_STAGE_DOWN = (
    "down_block_types",
    "block_out_channels",
    "only_cross_attention",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
)
PER_STAGE_UP = ("up_block_types", "reverse_transformer_layers_per_block")


@dataclass(frozen=True)
class Preset:
    """What is left of the teacher: one layer per block in each preset, and of the rest what the fields say."""

    mid_block: bool = True
    innermost_stage: bool = True
    max_transformer_layers: float = math.inf  # in one attention


PRESETS = {  # parameters of SD 1.4 (859.52M), SD 2.1 (865.91M), SDXL (2567.46M)
    "bk_base": Preset(),  # 579.38M, 583.48M, 1717.28M
    "bk_small": Preset(mid_block=False),  # 482.35M, 485.79M, 1304.16M
    "bk_tiny": Preset(mid_block=False, innermost_stage=False),  # 323.38M, 326.83M
    "koala_1b": Preset(max_transformer_layers=6),  # SDXL 1161.18M
    "koala_700m": Preset(mid_block=False, max_transformer_layers=5),  # SDXL 782.82M
}


def student_config(teacher_config: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """The student's complete `UNet2DConditionModel` config, with its `_class_name`.

    Raises UsageError for a preset that does not exist, or that does not fit the teacher, naming those that do.
    """
    if preset not in PRESETS:
        reason = f"Stable Diffusion has {', '.join(PRESETS)}"
    else:
        reason = _misfit(teacher_config, PRESETS[preset])
    if reason:
        fitting = ", ".join(presets_for(teacher_config)) or "none"
        raise UsageError(
            f"--student_preset {preset} does not fit this teacher: {reason}. Those that fit: {fitting}; any other "
            "smaller UNet2DConditionModel is given by its config.json with --student_config."
        )
    return {"_class_name": "UNet2DConditionModel", **_shortened(teacher_config, PRESETS[preset])}


def presets_for(teacher_config: Mapping[str, Any]) -> list[str]:
    """Names of the presets that make this teacher smaller and copy every tensor from it."""
    return [name for name, preset in PRESETS.items() if not _misfit(teacher_config, preset)]


def _misfit(config: Mapping[str, Any], preset: Preset) -> str:
    """Why `preset` cannot be made from a teacher with `config`; empty if it can."""
    if (found := config.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
        return f"it is a {found}, not a UNet2DConditionModel"
    config = full_config(config, UNet2DConditionModel)
    widths = tuple(config["block_out_channels"])
    if not preset.innermost_stage and len(widths) < 2:
        return f"the preset drops the innermost stage, and there is only {len(widths)}"
    if not preset.innermost_stage and widths[-1] != widths[-2]:  # the first up block's input changes its width
        return f"the preset drops the innermost stage, whose width {widths[-1]} is not {widths[-2]}, the next one's"
    deepest = max(_deepest(config[f"{way}transformer_layers_per_block"] or 0) for way in ("", "reverse_"))  # down, up
    most = preset.max_transformer_layers
    if deepest <= most < math.inf:
        return f"the preset leaves {most} transformer layers of an attention, which has at most {deepest}"
    drops_mid = not preset.mid_block and config["mid_block_type"] is not None
    if preset.innermost_stage and deepest <= most and not drops_mid and _deepest(config["layers_per_block"]) == 1:
        return "the preset drops nothing that the teacher has"
    return ""


def _shortened(config: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    student = full_config(config, UNet2DConditionModel)
    down, up = student["transformer_layers_per_block"], student["reverse_transformer_layers_per_block"]
    if up is not None:  # a stage may then hold a number for each of its attentions: keep those of the layers kept
        down = down if isinstance(down, int) else [s if isinstance(s, int) else s[:1] for s in down]
        up = [s if isinstance(s, int) else [s[0], s[-1]] for s in up]
    student |= {
        "layers_per_block": 1,
        "transformer_layers_per_block": _at_most(down, preset.max_transformer_layers),
        "reverse_transformer_layers_per_block": up and _at_most(up, preset.max_transformer_layers),
        "mid_block_type": student["mid_block_type"] if preset.mid_block else None,
    }
    for names, kept in ((PER_STAGE_DOWN, slice(-1)), (PER_STAGE_UP, slice(1, None))):
        for name in names if not preset.innermost_stage else ():
            if isinstance(student[name], list | tuple):  # otherwise one value serves all stages
                student[name] = student[name][kept]
    return student


def _at_most(layers: int | Iterable, most: float) -> int | list:
    return min(layers, most) if isinstance(layers, int) else [_at_most(part, most) for part in layers]


def _deepest(layers: int | Iterable) -> int:
    return layers if isinstance(layers, int) else max(map(_deepest, layers))


@dataclass(frozen=True)
class BlockReport:
    """`sources`: the student's tensor -> the teacher's it was copied from; `fresh`: the student's others.

    `dropped` and `fresh_modules` name the largest modules of which nothing was copied.
    """

    teacher_config: Mapping[str, Any]
    student_config: Mapping[str, Any]
    sources: Mapping[str, str]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    fresh_modules: tuple[str, ...]

    def table(self) -> str:
        """The sizes table (counted now), then a line per copied module, then the modules dropped and fresh."""
        sizes = (model_size(config, UNet2DConditionModel) for config in (self.teacher_config, self.student_config))
        copied = dict.fromkeys((_module(name), _module(source)) for name, source in self.sources.items())
        lines = [
            model_table(*sizes),
            f"tensors: {len(self.sources)} copied, {len(self.fresh)} fresh",
            *(f"  {name} <- {source}" for name, source in copied),
        ]
        for label, names in (("dropped", self.dropped), ("fresh", self.fresh_modules)):
            if names:
                lines += textwrap.wrap(f"{label}: {', '.join(names)}", width=100, subsequent_indent="  ")
        return "\n".join(lines)


def _module(name: str) -> str:
    """The layer of a block, or the top-level module, to which a tensor belongs."""
    return re.match(r"\w+_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|\w+", name)[0]


def _modules_without(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The largest modules that hold `names` and none of `others`."""
    taken = {prefix for name in others for prefix in accumulate(name.split("."), "{}.{}".format)}
    paths = (accumulate(name.split("."), "{}.{}".format) for name in names)
    return tuple(dict.fromkeys(next(prefix for prefix in path if prefix not in taken) for path in paths))


def copy_weights(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> BlockReport:
    """Copy into `student`, in place, every tensor of `teacher` that fits, by name and shape; the others stay.

    Blocks on the way up are counted from the outermost, up block i <- i + (n - n'), because that is where the stages
    of both models meet. There the last layer <- the teacher's last: it reads the skip of the stage above, and so has
    its own input width. Of a shortened transformer the first layers are kept. (BK-SDM and KOALA copy the same.)
    """
    new, old = student.state_dict(), teacher.state_dict()
    modules, teacher_modules = (dict(model.named_modules()) for model in (student, teacher))
    offset = len(teacher.up_blocks) - len(student.up_blocks)
    sources = {}
    for name, tensor in new.items():
        source = name
        if name.startswith("up_blocks."):
            _, stage, kind, layer, rest = name.split(".", 4)
            twin = f"up_blocks.{int(stage) + offset}.{kind}"
            if int(layer) == len(modules[f"up_blocks.{stage}.{kind}"]) - 1:
                layer = len(teacher_modules.get(twin, ())) - 1  # without a twin -1, which names nothing
            source = f"{twin}.{layer}.{rest}"
        if source in old and old[source].shape == tensor.shape:
            tensor.copy_(old[source])
            sources[name] = source
    fresh = tuple(name for name in new if name not in sources)
    used = set(sources.values())
    return BlockReport(
        teacher.config,
        student.config,
        sources,
        fresh,
        dropped=_modules_without((name for name in old if name not in used), used),
        fresh_modules=_modules_without(fresh, sources),
    )


def make_block_student(
    teacher: UNet2DConditionModel, preset_or_config: str | Mapping[str, Any], seed: int
) -> tuple[UNet2DConditionModel, BlockReport]:
    """A float32 student on the CPU in train mode, all parameters trainable; teacher and global RNG untouched.

    `preset_or_config`: a name in `PRESETS`, or any `UNet2DConditionModel` config, of which what does not fit the
    teacher keeps diffusers' own initialisation under `seed`.
    Raises UsageError as `student_config` does.
    """
    config = preset_or_config
    if isinstance(preset_or_config, str):
        config = student_config(teacher.config, preset_or_config)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        student = UNet2DConditionModel.from_config(config)
    return student, copy_weights(student, teacher)


def feature_pairs(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> list[tuple[str, str]]:
    """(student block, teacher block) whose outputs have the same height and width: down, mid, up.

    Down blocks pair from the outermost, up blocks as their weights do, mid blocks where both models have one below
    equally many stages. Where only one of two down blocks ends in a downsampler (the new innermost of bk_tiny), its
    partner is the last layer before it. (BK-SDM taps that layer's `proj_out`, before the residual is added; this is
    after, as in every other pair.)
    """
    blocks = zip(student.down_blocks, teacher.down_blocks, strict=False)
    pairs = [
        (_comparable(f"down_blocks.{i}", own, other), _comparable(f"down_blocks.{i}", other, own))
        for i, (own, other) in enumerate(blocks)
    ]
    offset = len(teacher.up_blocks) - len(student.up_blocks)
    if offset == 0 and student.mid_block is not None and teacher.mid_block is not None:
        pairs.append(("mid_block", "mid_block"))
    ups = range(max(0, -offset), len(student.up_blocks))
    return pairs + [(f"up_blocks.{i}", f"up_blocks.{i + offset}") for i in ups]


def _comparable(name: str, block: torch.nn.Module, other: torch.nn.Module) -> str:
    """The block called `name`, or its last layer before the downsampler that `other` lacks."""
    if block.downsamplers is None or other.downsamplers is not None:
        return name
    kind = "attentions" if hasattr(block, "attentions") else "resnets"
    return f"{name}.{kind}.{len(getattr(block, kind)) - 1}"
