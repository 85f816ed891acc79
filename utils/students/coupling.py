# SPDX-License-Identifier: Apache-2.0
"""Which channels of a pixel U-Net must be cut together.

A *space* is a set of channels that is cut with one list of indices wherever it appears: a residual stream with all
that adds to it, the inside of a resnet, the queries and keys of an attention. `Coupling` walks the teacher in the
order of its forward and notes which spaces index each dimension of each tensor; a concatenation [hidden, skip] is two
spaces in a row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


@dataclass(eq=False)
class Space:
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


Channels = tuple[Space, ...]  # the spaces in a row along one dimension; () is a dimension that is never cut


def _spans(channels: Channels) -> Iterator[tuple[Space, int]]:
    """Each space with the position at which it starts in the row."""
    return zip(channels, accumulate((space.width for space in channels), initial=0), strict=False)


class Coupling:
    """`axes`: tensor name -> for each leading dimension its Channels. `unscaled`: single-head `to_q` layers."""

    def __init__(self, teacher: UNet2DModel, config: Mapping[str, Any]):
        widths = config["block_out_channels"]
        self.keep = dict(zip(teacher.config.block_out_channels, widths, strict=True))
        self.head_dim = teacher.config.attention_head_dim
        self.axes: dict[str, tuple[Channels, ...]] = {}
        self.unscaled: list[str] = []

        time_dims = teacher.time_embedding.linear_1.out_features, config["time_embedding_dim"] or 4 * widths[0]
        time_hidden, self.time = (Space(*time_dims),), (Space(*time_dims),)
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
        return (Space(width, self.keep[width]),)

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

    def kept(self, scores: Mapping[str, Tensor]) -> dict[Space, Tensor]:
        """Kept indices (keep,) of every space; a channel's score is the sum over all tensor slices it indexes."""
        totals: dict[Space, Tensor] = {}
        for name, axes in self.axes.items():
            for dim, channels in enumerate(axes):
                score = scores[name].double().transpose(0, dim)
                for space, start in _spans(channels):
                    part = score[start : start + space.width].reshape(space.width, -1).sum(1)
                    totals[space] = totals.get(space, 0) + part
        return {space: space.best(score) for space, score in totals.items()}


def cut(weight: Tensor, axes: tuple[Channels, ...], kept: Mapping[Space, Tensor]) -> Tensor:
    """A copy of `weight` with only the kept indices along every dimension that is cut."""
    weight = weight.clone()
    for dim, channels in enumerate(axes):
        if channels:
            index = torch.cat([kept[space] + start for space, start in _spans(channels)])
            weight = weight.index_select(dim, index)
    return weight
