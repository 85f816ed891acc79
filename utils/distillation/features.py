# SPDX-License-Identifier: Apache-2.0
"""Feature distillation (FitNets, Romero et al. 2015): the student's blocks follow the teacher's.

Student and projectors are one module with one forward, so that DDP, FSDP2 and DeepSpeed prepare exactly one model and
average the projectors' gradients too.
"""

import copy
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from torch import nn

from utils.backbones.types import Prediction
from utils.command_line import UsageError
from utils.devices import to_dtype


class Tapped(nn.Module):
    """A denoiser whose forward also returns the outputs of some of its blocks, each through its projector.

    Without `blocks` it is the plain denoiser: no hooks, no cost.
    """

    def __init__(self, denoiser: nn.Module, blocks: Sequence[str] = ()):
        super().__init__()
        self.denoiser = denoiser
        self.projectors = nn.ModuleList(nn.Identity() for _ in blocks)
        self.blocks = list(blocks)
        self._taps: dict[str, torch.Tensor] | None = None  # None outside forward: hooks re-fire during recomputation
        for name in self.blocks:
            # on the module object: names change under DDP and torch.compile, objects do not
            denoiser.get_submodule(name).register_forward_hook(functools.partial(self._keep, name))

    def _keep(self, name: str, _module, _inputs, output):
        if self._taps is not None:
            self._taps[name] = output[0] if isinstance(output, tuple) else output  # down blocks: (hidden, skips)

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor, **condition):
        """(B, C, *S) and (B,) -> output (B, C, *S), features [(B, C_i, *S_i)]."""
        self._taps = {}
        dtype = next(self.denoiser.parameters()).dtype  # diffusers' own `dtype` walks through every module
        output = self.denoiser(x_t.to(dtype), timestep, return_dict=False, **to_dtype(condition, dtype))[0]
        taps, self._taps = self._taps, None
        return output, [project(taps[name]) for name, project in zip(self.blocks, self.projectors, strict=True)]


def tap_pair(
    student: nn.Module, teacher: nn.Module | None, pairs: Sequence[tuple[str, str]], example: dict, seed: int
) -> tuple[Tapped, Tapped | None]:
    """Student and teacher with the `pairs` of block names tapped; 1x1 projectors where the widths differ.

    `example` holds the forward arguments of one sample; it shows the blocks' shapes.

    Raises:
        UsageError: two paired blocks differ in more than their channels.
    """
    if not pairs:
        return Tapped(student), Tapped(teacher) if teacher is not None else None
    student_blocks, teacher_blocks = (list(side) for side in zip(*pairs, strict=True))
    tapped_student, tapped_teacher = Tapped(student, student_blocks), Tapped(teacher, teacher_blocks)
    inputs = recursively_apply(lambda tensor: tensor.to("meta"), example)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        student_features, teacher_features = (on_meta(side)(**inputs)[1] for side in (tapped_student, tapped_teacher))
        projectors = []
        for pair, student_feature, teacher_feature in zip(pairs, student_features, teacher_features, strict=True):
            if student_feature.shape[2:] != teacher_feature.shape[2:]:
                raise UsageError(
                    f"--lambda_kd_feat: block {pair[0]} of the student is {tuple(student_feature.shape[2:])} where "
                    f"the teacher's {pair[1]} is {tuple(teacher_feature.shape[2:])}. Set --lambda_kd_feat 0."
                )
            widths = student_feature.shape[1], teacher_feature.shape[1]
            projectors.append(nn.Identity() if widths[0] == widths[1] else nn.Conv2d(*widths, kernel_size=1))
    tapped_student.projectors = nn.ModuleList(projectors)
    return tapped_student, tapped_teacher


def on_meta(module: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes and no values: its forward costs neither time nor memory."""
    tensors = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    tensors |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, tensors)


def feature_loss(student: Prediction, teacher: Prediction) -> torch.Tensor:
    """Sum over the paired blocks of the mean squared difference, a scalar; 0 where nothing is tapped."""
    if not student.features:
        return torch.zeros((), device=student.output.device)
    pairs = zip(student.features, teacher.features, strict=True)
    return torch.stack([F.mse_loss(ours.float(), theirs.float()) for ours, theirs in pairs]).sum()
