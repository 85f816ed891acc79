# SPDX-License-Identifier: Apache-2.0
"""Students: width pruning of a pixel U-Net, exact where it can be, and counted where it cannot."""

import math
from itertools import pairwise

import torch
from diffusers import UNet2DModel

from utils.students.width import (
    _Coupling,
    width_config,
)


def unet_config(widths, attention, **changes):
    """A `UNet2DModel` config with attention in the given down stages, mirrored on the way up."""
    down = ["AttnDownBlock2D" if stage in attention else "DownBlock2D" for stage in range(len(widths))]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return dict(block_out_channels=tuple(widths), down_block_types=tuple(down), up_block_types=tuple(up)) | changes


HUB = dict(
    attention_head_dim=None,
    norm_eps=1e-6,
    flip_sin_to_cos=False,
    freq_shift=1,
    downsample_padding=0,
    act_fn="silu",
    mid_block_scale_factor=1,
    center_input_sample=False,
    time_embedding_type="positional",
    layers_per_block=2,
)
CIFAR = unet_config((128, 256, 256, 256), {1}, sample_size=32, **HUB)
HUB_256 = unet_config((128, 128, 256, 256, 512, 512), {4}, sample_size=256, **HUB)
CELEBA_64 = unet_config((128, 256, 256, 256, 512), {2}, sample_size=64, **HUB)
GREY = dict(in_channels=1, out_channels=1, norm_num_groups=4, sample_size=16)
SMALL = unet_config((32, 64, 128), {1}, attention_head_dim=4, layers_per_block=1, **GREY)
# Half of every width: groups of the concatenation 64 + 32 straddle those of its parts, and equal widths share streams.
TINY = GREY | dict(layers_per_block=1, sample_size=8, freq_shift=0)
SINGLE = unet_config((16, 32, 32), {1}, attention_head_dim=None, **TINY)
MULTI = unet_config((16, 32, 32), {1}, attention_head_dim=4, **TINY)
VARIANTS = {
    "single-head": (SINGLE, 0.5),
    "multi-head": (MULTI, 0.5),
    "multi-head at .75": (unet_config((32, 64, 128), {1}, attention_head_dim=4, **TINY), 0.75),
    "straddling groups": (unet_config((16, 32, 64), {0, 2}, attention_head_dim=None, **TINY), 0.5),
    "scale_shift": (SINGLE | dict(resnet_time_scale_shift="scale_shift"), 0.5),
    "resnet resamplers": (MULTI | dict(downsample_type="resnet", upsample_type="resnet"), 0.5),
    "resnet resampling blocks": (
        SINGLE
        | dict(
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        ),
        0.5,
    ),
    "no mid attention": (MULTI | dict(add_attention=False, layers_per_block=2), 0.5),
    "no mid block": (SINGLE | dict(mid_block_type=None), 0.5),
    "own mid groups": (SINGLE | dict(attn_norm_num_groups=8), 0.5),
    "own time width": (SINGLE | dict(time_embedding_dim=48), 0.5),
}


def lively(model, gain=1.5, seed=0):
    """Re-initialise in place so that deep layers reach the output; the default start hides most pruning mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 9.0
        parameter.data = noise * gain / math.sqrt(fan_in)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data += 1
    return model


def teacher_of(config, **changes):
    return lively(UNet2DModel(**(config | changes)))


def make_redundant(teacher, ratio, seed=0):
    """Make half (or more) of every space's channels dead: they repeat a kept channel, and nothing reads them.

    Repeating instead of zeroing keeps the GroupNorm statistics; a repeated query would change the logits, so the dead
    queries of a single head are zero. The spaces come from the pruner: if they were wrong, the repeats would not be
    repeats, or something would read them, and the teacher would not equal its student. Returns the expected indices.
    """
    generator = torch.Generator().manual_seed(seed)
    coupling = _Coupling(teacher, width_config(teacher.config, ratio))
    queries = {coupling.axes[f"{name}.weight"][0] for name in coupling.unscaled}
    source, dead, kept = {}, {}, {}
    for space in {space for axes in coupling.axes.values() for channels in axes for space in channels}:
        units, keep = space.width // space.unit, space.keep / space.width
        cuts = {cut for cut in space.cuts if 0 <= cut <= units and (cut * keep).is_integer()} | {0, units}
        origin = torch.arange(units)
        for start, stop in pairwise(sorted(cuts)):
            order = start + torch.randperm(stop - start, generator=generator)
            best = order[: int((stop - start) * keep)]
            origin[order] = best.repeat(len(order) // len(best))  # every kept channel is repeated equally often
        source[space] = (origin[:, None] * space.unit + torch.arange(space.unit)).flatten()
        dead[space] = source[space] != torch.arange(space.width)
        kept[space] = (~dead[space]).nonzero().flatten()
    for name, parameter in teacher.named_parameters():
        for dim, channels in enumerate(coupling.axes[name]):
            if not channels:
                continue
            starts = [sum(space.width for space in channels[:i]) for i in range(len(channels))]
            if dim == 0:
                parts = [source[space] + start for space, start in zip(channels, starts, strict=True)]
                parameter.data = parameter.data[torch.cat(parts)]
                if channels in queries and ".to_q." in name:
                    parameter.data[dead[channels[0]]] = 0
            else:
                parameter.data[:, torch.cat([dead[space] for space in channels])] = 0
    # Frequencies 1 and 0.1 (0.01 at .75) exist in the narrow sinusoid too, so that the refit can be exact.
    weight, half = teacher.time_embedding.linear_1.weight.data, teacher.config.block_out_channels[0] // 2
    step = round(1 / (1 - ratio))
    heard = torch.tensor([0, step, half, half + step])
    weight[:, [column for column in range(2 * half) if column not in heard]] = 0
    return coupling, kept


@torch.no_grad()
def output(model, seed=1):
    """Two samples at two timesteps in float64, shape (2, C, H, W); the parameters themselves stay float32 values."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    copy = UNet2DModel.from_config(config).double().eval()
    copy.load_state_dict(model.state_dict())
    return copy(x.double(), torch.tensor([7, 400])).sample


def difference(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()
