# SPDX-License-Identifier: Apache-2.0
"""Corrected sampling: what a student's samples would be without the coarse part of its error.

The paper's probe exists in two versions in the authors' code, and which of them its numbers are of is not known. Both
move the student's every prediction along a line to the teacher's, b0 + b1 * e_S, one for each sample and channel. They
differ in where the line is fitted, here in float64: see `PROBES` in `arguments.py`.
"""

from collections import deque

from torch import Tensor, nn

from utils.analysis.error import least_squares_line
from utils.backbones.stand_in import StandIn
from utils.devices import in_float64

WHO = ("student", "corrected", "teacher")  # whose samples are compared, in the order in which they are shown


class CorrectedDenoiser(StandIn):
    """`student_input`: the student and, for the same input, the teacher. What no line can mend is the fine part."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__(student)
        self.teacher = teacher

    def denoise(self, *inputs, **condition):
        """As the student's own, and in its output class."""
        output = self.denoiser(*inputs, **condition)
        return _moved(output, _line(output.sample, self.teacher(*inputs, **condition).sample))


class FittingTeacher(StandIn):
    """The teacher itself, which leaves the line of every call of a batch's sampling in `lines`."""

    def __init__(self, teacher: nn.Module, student: nn.Module, lines: deque):
        super().__init__(teacher)
        self.student, self.lines = student, lines

    def denoise(self, *inputs, **condition):
        """The teacher's own output."""
        output = self.denoiser(*inputs, **condition)
        self.lines.append(_line(self.student(*inputs, **condition).sample, output.sample))
        return output


class FollowingStudent(StandIn):
    """The student, moved along the `lines` that a `FittingTeacher` left, one a call."""

    def __init__(self, student: nn.Module, lines: deque):
        super().__init__(student)
        self.lines = lines

    def denoise(self, *inputs, **condition):
        """As the student's own, and in its output class."""
        return _moved(self.denoiser(*inputs, **condition), self.lines.popleft())


def probe_denoisers(probe: str, student: nn.Module, teacher: nn.Module) -> dict[str, nn.Module]:
    """What stands for each of `WHO` in a sampler without noise of its own, in the order in which they have to sample a
    batch, each to its end. `probe` is one of `PROBES`."""
    if probe == "student_input":
        return dict(zip(WHO, (student, CorrectedDenoiser(student, teacher), teacher), strict=True))
    lines: deque = deque()
    fitting, following = FittingTeacher(teacher, student, lines), FollowingStudent(student, lines)
    return {"teacher": fitting, "corrected": following, "student": student}


def _line(student_pred: Tensor, teacher_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept, float64 (B, C, 1 ...), of predictions (B, C, *S)."""
    line = least_squares_line(*(in_float64(pred).flatten(2) for pred in (student_pred, teacher_pred)))
    return tuple(value_BC.view(*value_BC.shape, *(1,) * (student_pred.ndim - 2)) for value_BC in line)


def _moved(output, line: tuple[Tensor, Tensor]):
    """A denoiser's output with its `sample` moved along a line, in its own device and dtype."""
    slope, intercept = line
    return type(output)(sample=(intercept + slope * in_float64(output.sample)).to(output.sample))
