# SPDX-License-Identifier: Apache-2.0
"""Corrected sampling: what a student's samples would be without the coarse part of its error."""

from torch import Tensor, nn

from utils.analysis.error import least_squares_line
from utils.backbones.base import StandIn


class CorrectedDenoiser(StandIn):
    """The paper's probe (section 1 of its method): a student whose every prediction is moved along the line to the
    teacher's for the same input, b0 + b1 * e_S with one line per sample and channel, fitted in float64.

    It stands in for a denoiser in any diffusers sampler. What it cannot mend is the fine part of the error.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__(student)
        self.teacher = teacher

    def denoise(self, *inputs, **condition):
        """As the student's own, and in its output class."""
        output = self.denoiser(*inputs, **condition)
        student_pred, teacher_pred = _in_float64(output.sample), _in_float64(self.teacher(*inputs, **condition).sample)
        slope_BC, intercept_BC = least_squares_line(student_pred.flatten(2), teacher_pred.flatten(2))
        per_channel = (*slope_BC.shape, *(1,) * (student_pred.ndim - 2))
        corrected = intercept_BC.view(per_channel) + slope_BC.view(per_channel) * student_pred
        return type(output)(sample=corrected.to(output.sample))  # its device and dtype


def _in_float64(pred: Tensor) -> Tensor:
    """On the CPU where the device has no float64."""
    return (pred.cpu() if pred.device.type == "mps" else pred).double()
