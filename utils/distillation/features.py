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
            # a block may give a tuple: a U-Net's (hidden, skips), an MMDiT's (text, image); its last tensor is the one
            outputs = output if isinstance(output, tuple) else (output,)
            self._taps[name] = [part for part in outputs if isinstance(part, torch.Tensor)][-1]

    def forward(self, x_t: torch.Tensor, **condition):
        """(B, C, *S) and the denoiser's keywords, its `timestep` (B,) among them, -> output (B, C, *S), features
        [(B, C_i, *S_i)], of transformers [(B, N, D_i)]. Floats are cast to the weights' dtype, see `to_dtype`."""
        self._taps = {}
        dtype = next(self.denoiser.parameters()).dtype  # diffusers' own `dtype` walks through every module
        output = self.denoiser(x_t.to(dtype), return_dict=False, **to_dtype(condition, dtype))[0]
        taps, self._taps = self._taps, None
        return output, [project(taps[name]) for name, project in zip(self.blocks, self.projectors, strict=True)]


def tap_pair(
    student: nn.Module, teacher: nn.Module | None, pairs: Sequence[tuple[str, str]], example: dict, seed: int
) -> tuple[Tapped, Tapped | None]:
    """Student and teacher with the `pairs` of block names tapped; projectors where the
    widths differ: 1x1 convolutions, of tokens linear.

    `example` holds the forward arguments of one sample; it shows the blocks' shapes.

    Raises:
        ValueError: two paired blocks differ in more than their channels.
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
            (width, places), (teacher_width, teacher_places) = map(
                _width_and_places, (student_feature, teacher_feature)
            )
            if places != teacher_places:
                raise UsageError(
                    f"--lambda_kd_feat: block {pair[0]} of the student is {tuple(places)} where the teacher's "
                    f"{pair[1]} is {tuple(teacher_places)}. Set --lambda_kd_feat 0."
                )
            projectors.append(_projector(width, teacher_width, is_tokens=student_feature.ndim == 3))
    tapped_student.projectors = nn.ModuleList(projectors)
    return tapped_student, tapped_teacher


def _width_and_places(feature: torch.Tensor) -> tuple[int, torch.Size]:
    """Of a map (B, C, *S) or of tokens (B, N, D)."""
    return (feature.shape[2], feature.shape[1:2]) if feature.ndim == 3 else (feature.shape[1], feature.shape[2:])


def _projector(width: int, teacher_width: int, *, is_tokens: bool) -> nn.Module:
    """From the student's width to the teacher's, place by place."""
    if width == teacher_width:
        return nn.Identity()
    return nn.Linear(width, teacher_width) if is_tokens else nn.Conv2d(width, teacher_width, kernel_size=1)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes and no values: its forward costs neither time nor memory."""
    tensors = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    tensors |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, tensors)


def feature_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask_sigma: float = 0.0
) -> torch.Tensor | float:
    """Sum over the paired blocks of the mean squared difference, a scalar; 0 where nothing is tapped.

    With a `mask_sigma` S above 0 it is mean (m_S f_S - m_T f_T)^2, the masks m as `within`: transformers have a few
    activations that are hundreds of times the others, and a square would follow them alone (TinyFusion, Fang et al.
    2025).
    """
    if not student:
        return 0.0
    sides = ([within(feature.float(), mask_sigma) for feature in side] for side in (student, teacher))
    return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in zip(*sides, strict=True)]).sum()


def within(feature: torch.Tensor, sigma: float) -> torch.Tensor:
    """A feature (B, ...) with 0 in the place of what lies more than `sigma` standard deviations from the mean of its
    sample; as it is for 0. No gradient goes into those entries, nor through mean and deviation."""
    if not sigma:
        return feature
    deviation, mean = torch.std_mean(feature.detach().flatten(1), dim=1, correction=0)
    mean, deviation = (each.reshape(-1, *[1] * (feature.ndim - 1)) for each in (mean, deviation))
    return feature.masked_fill((feature.detach() - mean).abs() > sigma * deviation, 0.0)  # NaN stays, and is seen


def feature_weight(weighting: str, progress: float) -> float:
    """Of `--lambda_kd_feat` at `progress` = step / max_steps in [0, 1]: constant is all of it, linear falls to 0."""
    return {"constant": 1.0, "linear": 1.0 - progress}[weighting]
