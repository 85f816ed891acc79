# SPDX-License-Identifier: Apache-2.0
"""Modules that a stock pipeline takes for its denoiser, so that no second sampling loop is needed."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from utils.devices import to_dtype


class StandIn(nn.Module):
    """A module that a stock pipeline takes for the `denoiser` in it: its config and parts are the denoiser's.

    What it does otherwise is `denoise`, which gives the denoiser's own output class."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def __getattr__(self, name: str):  # pipelines look at their denoiser's parts
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    def forward(self, *inputs, return_dict: bool = True, **condition):
        """As the denoiser's own, by whatever names and places a pipeline passes its inputs."""
        output = self.denoise(*inputs, **condition)
        return output if return_dict else (output.sample,)

    def denoise(self, *inputs, **condition):
        """The output, with its `sample` (B, C, *S)."""
        return self.denoiser(*inputs, **condition)


class InAutocast(StandIn):
    """A denoiser that runs under autocast; what a pipeline does around it, decoding above all, does not."""

    def __init__(self, denoiser: nn.Module, autocast: Callable[[], AbstractContextManager]):
        super().__init__(denoiser)
        self.autocast = autocast

    def denoise(self, *inputs, **condition):
        """The denoiser's own output."""
        with self.autocast():
            return self.denoiser(*inputs, **condition)


class InFloat32(StandIn):
    """A denoiser that takes and gives float32 whatever its weights are in, so that sampling starts from the same noise
    for every dtype and the sampler's sums keep their precision."""

    dtype = torch.float32

    def denoise(self, *inputs, **condition):
        """Cast there and back."""
        dtype = next(self.denoiser.parameters()).dtype
        inputs = [
            x.to(dtype) if i == 0 else x for i, x in enumerate(inputs)
        ]  # the second is the time, if there is one
        output = self.denoiser(*inputs, **to_dtype(condition, dtype))
        return type(output)(sample=output.sample.float())


class GuidedLabels(StandIn):
    """A DiT under guidance, which `DiTPipeline` calls with a batch that is told its labels and then the same batch
    told label 1000: here that half is told `null`, the denoiser's own label of none, however many classes it knows."""

    def __init__(self, denoiser: nn.Module, null: int, channels: int | None = None):
        """`channels`: only so many, the first ones, are guided, as in DiT's own code (3 of 4); None is all."""
        super().__init__(denoiser)
        self.null, self.channels = null, channels

    def denoise(self, hidden_states, *, class_labels, **condition):
        """What is not to be guided is the same in both halves, that of the labels."""
        told = class_labels.chunk(2)[0]
        labels = torch.cat([told, torch.full_like(told, self.null)])
        output = self.denoiser(hidden_states, class_labels=labels, **condition)
        if self.channels is not None:
            half = len(told)
            output.sample[half:, self.channels :] = output.sample[:half, self.channels :]
        return output
