# SPDX-License-Identifier: Apache-2.0
"""The student's error, split by lines: what they remove is coarse, what they leave is fine.

H. Han, S. Yeo, J. Yoo, "LIFT and PLACE", CVPR 2026, arXiv 2605.19729. With s = e_S, t = e_T and the least-squares line
t ~ b0 + b1 * s over the K elements of a line:

    coarse = mean d^2    d = s - (b0 + b1 * s)    how far the line moves the student
    fine   = mean r^2    r = (b0 + b1 * s) - t    how far from the teacher it then still is
    total  = mean (s - t)^2 = coarse + fine

Pythagoras: s - t = d + r, and the residual r is orthogonal to 1 and to s, so also to d. Each of the three is computed
on its own, in float64, and the line with eps = 0: an eps above 0 tilts it, and leaves a cross term 2 mean(d * r).

Shape suffixes as in `utils/distillation/losses.py`: B batch, C channel, N elements of a channel, G groups, K elements
of one line.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.command_line import UsageError
from utils.distillation.losses import fit_line, group_order, group_sizes, in_groups


class Split(NamedTuple):
    """Lines and their part of the error, float64, one entry per line: (B, C), or (B, C, G) for groups."""

    slope: Tensor
    intercept: Tensor
    total: Tensor  # mean squared error of the line's elements
    coarse: Tensor  # the part that the line removes
    fine: Tensor  # the part that it leaves


def least_squares_line(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept of teacher ~ intercept + slope * student over the last dimension, without an eps.

    (..., K) twice -> (...) twice, in float32 or better. A constant student has no slope of its own: every slope leaves
    the same residual, and 1 is returned, so that the line corrects the mean alone.
    ValueError: as `fit_line`.
    """
    slope, intercept = fit_line(student, teacher, eps=0.0)
    constant = student.amax(-1) == student.amin(-1)
    shift = (teacher.to(slope.dtype) - student.to(slope.dtype)).mean(-1)
    return slope.masked_fill(constant, 1.0), torch.where(constant, shift, intercept)


def split_error(student_XK: Tensor, teacher_XK: Tensor) -> Split:
    """One line for the last dimension: (..., K) twice -> entries (...). ValueError: as `fit_line`."""
    student_XK, teacher_XK = student_XK.double(), teacher_XK.double()
    slope_X, intercept_X = least_squares_line(student_XK, teacher_XK)
    fitted_XK = intercept_X.unsqueeze(-1) + slope_X.unsqueeze(-1) * student_XK
    return Split(
        slope_X,
        intercept_X,
        total=(student_XK - teacher_XK).square().mean(-1),
        coarse=(student_XK - fitted_XK).square().mean(-1),
        fine=(fitted_XK - teacher_XK).square().mean(-1),
    )


def split_groups(student_pred: Tensor, teacher_pred: Tensor, group_size: int) -> Split:
    """One line per PLACE group: (B, C, *S) twice -> entries (B, C, G), group 0 has the smallest errors |e_T - e_S|.

    ValueError: as `group_sizes`.
    """
    student_BCN, teacher_BCN = student_pred.flatten(2), teacher_pred.flatten(2)
    order_BCN = group_order(student_BCN, teacher_BCN)
    ordered = (in_groups(pred_BCN.gather(-1, order_BCN), group_size) for pred_BCN in (student_BCN, teacher_BCN))
    parts = [split_error(student_XK, teacher_XK) for student_XK, teacher_XK in zip(*ordered, strict=True)]
    return Split(*(torch.cat(entries, dim=-1) for entries in zip(*parts, strict=True)))


def group_map(student_pred: Tensor, teacher_pred: Tensor, group_size: int) -> Tensor:
    """The rank of every element's PLACE group, 0 for the smallest errors: (B, C, *S) twice -> int64 (B, C, *S).

    ValueError: as `group_sizes`.
    """
    order_BCN = group_order(student_pred.flatten(2), teacher_pred.flatten(2))
    sizes = torch.tensor(group_sizes(order_BCN.shape[-1], group_size), device=order_BCN.device)
    rank_N = torch.arange(len(sizes), device=order_BCN.device).repeat_interleave(sizes)
    ranks_BCN = torch.empty_like(order_BCN).scatter_(-1, order_BCN, rank_N.expand_as(order_BCN))
    return ranks_BCN.view(student_pred.shape)


class ErrorStatistics:
    """The split of every batch seen at one place of the schedule, and its maps over the image."""

    def __init__(self, group_size: int):
        self.group_size = group_size
        self._lines: list[Split] = []  # (B, C) per batch
        self._group_lines: list[Tensor] = []  # float32 (2, B * C, G) per batch: slopes and intercepts of the groups
        self._group_sums: Tensor | None = None  # (3, G), parts of their error summed over samples and channels
        self._error_sum: Tensor | None = None  # (*S), |e_T - e_S| summed over samples and channels
        self.first_error: Tensor | None = None  # (C, *S), |e_T - e_S| of the first sample
        self.first_ranks: Tensor | None = None  # (*S), group map of its first channel

    def update(self, student_pred: Tensor, teacher_pred: Tensor) -> None:
        """Add predictions (B, C, *S) of student and teacher for one noisy batch.

        ValueError: a prediction that is not finite; otherwise as `group_sizes`.
        """
        student, teacher = student_pred.detach().cpu(), teacher_pred.detach().cpu()
        for flag, name, pred in (
            ("--student_model_name_or_path", "student", student),
            ("--pretrained_model_name_or_path", "teacher", teacher),
        ):
            if not pred.isfinite().all():
                raise UsageError(f"{flag}: the {name} predicts NaN or infinity, of which no error has a size.")
        self._lines.append(split_error(student.flatten(2), teacher.flatten(2)))
        slope_BCG, intercept_BCG, *parts = split_groups(student, teacher, self.group_size)
        self._group_lines.append(torch.stack([slope_BCG, intercept_BCG]).flatten(1, 2).float())
        group_sums = torch.stack([part_BCG.sum((0, 1)) for part_BCG in parts])
        error = (teacher.double() - student.double()).abs()
        if self._group_sums is None:
            self._group_sums, self._error_sum = group_sums, error.sum((0, 1))
            self.first_error = error[0]
            self.first_ranks = group_map(student[:1, :1], teacher[:1, :1], self.group_size)[0, 0]
        else:
            self._group_sums += group_sums
            self._error_sum += error.sum((0, 1))

    def error_map(self) -> Tensor:
        """Mean |e_T - e_S| everywhere in the image, over samples and channels: (*S)."""
        return self._error_sum / sum(batch.slope.numel() for batch in self._lines)

    def summary(self) -> dict:
        """Plain numbers: one line per sample and channel first, then by channel, then PLACE's lines by group rank.

        total, coarse and fine are per element; elements counts those of a channel that a rank holds.
        """
        lines = Split(*(torch.cat(entries) for entries in zip(*self._lines, strict=True)))
        num_lines, elements = lines.slope.numel(), self._error_sum.numel()
        sizes = group_sizes(elements, self.group_size)
        parts_G = self._group_sums / num_lines
        shares_G = torch.tensor(sizes, dtype=torch.float64) / elements
        ranks = {part: part_G.tolist() for part, part_G in zip(Split._fields[2:], parts_G, strict=True)}
        slope_LG, intercept_LG = torch.cat(self._group_lines, dim=1)
        return {
            **_described(lines),
            "channels": [_described(Split(*(entry[:, c] for entry in lines))) for c in range(lines.slope.shape[1])],
            "groups": {
                **_shared(*((part_G * shares_G).sum().item() for part_G in parts_G)),
                "ranks": {
                    "elements": sizes,
                    "slope": _spread(slope_LG),
                    "intercept": _spread(intercept_LG),
                    **ranks,
                },
            },
        }


def _described(lines: Split) -> dict:
    parts = _shared(*(part.mean().item() for part in lines[2:]))
    return {**parts, "slope": _spread(lines.slope.flatten()), "intercept": _spread(lines.intercept.flatten())}


def _shared(total: float, coarse: float, fine: float) -> dict[str, float | None]:
    """The three parts and coarse / total, None for an error of 0."""
    return {"total": total, "coarse": coarse, "fine": fine, "coarse_share": coarse / total if total > 0 else None}


def _spread(values_L: Tensor) -> dict[str, float | list[float]]:
    """Mean, standard deviation (biased) and quartiles over L lines, (L,) -> numbers; (L, G) -> lists of G. A slope of
    few elements is a ratio with heavy tails: its median says more than its mean."""
    values = values_L.double().numpy()
    q25, median, q75 = np.quantile(values, (0.25, 0.5, 0.75), axis=0)  # torch's takes 16 million values at most
    spread = {"mean": values.mean(0), "std": values.std(0), "q25": q25, "median": median, "q75": q75}
    return {name: value.tolist() for name, value in spread.items()}


def summarize(statistics: list[ErrorStatistics], places: list[int]) -> dict:
    """`places`: the summary of each; `mean`: total, coarse and fine over all of them, also by group rank; `chance`:
    the coarse share that lines have of an error which knows nothing of the student's prediction, 2 of K elements."""
    rows = [{"place": place, **each.summary()} for place, each in zip(places, statistics, strict=True)]
    parts, ranks = Split._fields[2:], [row["groups"]["ranks"] for row in rows]

    def mean(values: list) -> list:
        return torch.tensor(values, dtype=torch.float64).mean(0).tolist()

    groups = _shared(*mean([[row["groups"][part] for part in parts] for row in rows]))
    groups["ranks"] = {part: mean([rank[part] for rank in ranks]) for part in parts}
    sizes = ranks[0]["elements"]
    return {
        "places": rows,
        "mean": {**_shared(*mean([[row[part] for part in parts] for row in rows])), "groups": groups},
        "chance": {"coarse_share": 2 / sum(sizes), "groups": {"coarse_share": 2 * len(sizes) / sum(sizes)}},
    }
