# SPDX-License-Identifier: Apache-2.0
"""Output distillation losses: LIFT, PLACE, and the conventional mse, l1, huber and log.

H. Han, S. Yeo, J. Yoo, "LIFT and PLACE", CVPR 2026, arXiv 2605.19729. e_S and e_T are what student and teacher
predict for the same noisy input. A least-squares line e_T ~ b0 + b1 * e_S splits their difference into a coarse
part, which the line removes, and a fine part, which it leaves (var and cov are biased, K elements per line):

    b1 = cov(e_S, e_T) / (var(e_S) + eps)       b0 = mean(e_T) - b1 * mean(e_S)
    L_coarse = mean |b1 - 1| + mean |b0|        gradient through b0 and b1
    L_fine = mean (b0 + b1 * e_S - e_T)^2       b0 and b1 detached: gradient through e_S only
    w = 1 - min(1, L_coarse)                    detached: the fine part counts once the coarse part is small
    L = L_coarse + w * L_fine

LIFT fits one line per channel or sample, PLACE one per group of elements whose errors are alike. Means are per
line and per element, so the loss keeps its scale when resolution or batch size change. With a `sample_weight` v (B,)
the fine part is mean_b v_b * L_fine_b; coarse and w do not see it (`utils.distillation.balance`). The teacher gets no
gradient. Low precision inputs are computed in float32, float64 stays float64, and nothing here waits for the device.

Shape suffixes: B batch, C channel, N elements of a channel, G groups, K elements of one line, X one entry per
line, whatever its dimensions ((B, C) in LIFT, (B, C, G) in PLACE), 1 a kept dimension.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUT_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
OUTPUT_KINDS = (*OUTPUT_LOSSES, "log")


class KDLoss(NamedTuple):
    """A scalar `loss` to call backward on, and detached statistics, all tensors on the device of the predictions."""

    loss: Tensor  # () coarse_scale * coarse + weight * fine, the fine part of every sample with its sample_weight
    coarse: Tensor  # () before coarse_scale
    fine: Tensor  # () before weight and sample_weight
    weight: Tensor  # ()
    slope: Tensor  # b1: (B, C) or (B, 1) in LIFT, (B, C, G) in PLACE, () in output_loss
    intercept: Tensor  # b0: as slope
    error: Tensor  # (B,) the fine part of each sample; its mean is `fine`

    def terms(self) -> dict[str, Tensor]:
        """The scalars worth logging, by name; slope and intercept as means over the lines."""
        return {
            "output": self.loss.detach(),
            "coarse": self.coarse,
            "fine": self.fine,
            "w": self.weight,
            "slope": self.slope.mean(),
            "intercept": self.intercept.mean(),
        }


def fit_line(student: Tensor, teacher: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Least squares teacher ~ intercept + slope * student over the last dimension, differentiable in both.

    (..., K), (..., K) -> (...), (...), in float32 or better.
    ValueError: shapes that differ or are empty, dtypes that are not floating point, K < 2.
    """
    slope_X, intercept_X, _ = _fit(*_checked(student, teacher, min_dims=1), eps)
    return slope_X, intercept_X


def lift_loss(
    student_pred: Tensor,
    teacher_pred: Tensor,
    *,
    coefficients: str = "channel",
    coarse_norm: str = "l1",
    coarse_scale: float = 1.0,
    weight: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    eps: float = 1e-8,
) -> KDLoss:
    """LIFT (arXiv 2605.19729): the equations above with one line per (sample, channel), or per sample.

    student_pred, teacher_pred (B, C, *S), any trailing shape S. `coefficients`: channel | sample. `coarse_norm`: l1,
    or l2 for mean (b1 - 1)^2 + mean b0^2; w keeps the l1 form and never sees `coarse_scale`. `weight`: None for the
    adaptive w, otherwise the w to use; a tensor that requires grad is learned. `sample_weight` (B,): see above.
    ValueError: shapes that differ, are empty or have fewer than 3 dimensions, dtypes that are not floating point,
    fewer than 2 elements in a line, unknown options, a weight of more than one element, a sample_weight not (B,).
    """
    _check_choice("coefficients", coefficients, ("channel", "sample"))
    student, teacher = _checked(student_pred, teacher_pred.detach(), min_dims=3)
    if coefficients == "sample":  # one channel of C * N elements
        student, teacher = student.flatten(1).unsqueeze(1), teacher.flatten(1).unsqueeze(1)
    pieces = [(student.flatten(2), teacher.flatten(2))]
    return _line_loss(pieces, coarse_norm, coarse_scale, weight, sample_weight, eps)


def place_loss(
    student_pred: Tensor,
    teacher_pred: Tensor,
    *,
    group_size: int = 16,
    grouping: str = "error",
    coarse_norm: str = "l1",
    coarse_scale: float = 1.0,
    weight: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    eps: float = 1e-8,
) -> KDLoss:
    """PLACE (arXiv 2605.19729): LIFT's equations with one line per group of `group_size` elements of a channel.

    student_pred, teacher_pred (B, C, *S). `grouping`: error cuts the elements sorted by |e_T - e_S| into groups (the
    paper's), signed those sorted by e_T - e_S, patch takes square spatial patches (the paper's ablation; (B, C, H, W)
    only). Of N elements the last of N // group_size groups also takes the remainder. Other arguments as in lift_loss.
    ValueError: as lift_loss; group_size < 2 (a point has no slope) or > N; patches that are not square or do not tile.
    """
    _check_choice("grouping", grouping, ("error", "signed", "patch"))
    student, teacher = _checked(student_pred, teacher_pred.detach(), min_dims=3)
    group_sizes(student.shape[2:].numel(), group_size)
    if grouping == "patch":
        student_BCN, teacher_BCN = _patch_order(student, group_size), _patch_order(teacher, group_size)
    else:
        student_BCN, teacher_BCN = student.flatten(2), teacher.flatten(2)
        order_BCN = group_order(student_BCN, teacher_BCN, grouping)
        student_BCN, teacher_BCN = student_BCN.gather(-1, order_BCN), teacher_BCN.gather(-1, order_BCN)
    pieces = zip(in_groups(student_BCN, group_size), in_groups(teacher_BCN, group_size), strict=True)
    return _line_loss(list(pieces), coarse_norm, coarse_scale, weight, sample_weight, eps)


def group_sizes(elements: int, group_size: int) -> list[int]:
    """Elements in each of PLACE's groups, in order; the last group also takes the remainder.

    ValueError: group_size below 2 (a point has no slope) or above `elements`.
    """
    if not isinstance(group_size, int) or not 2 <= group_size <= elements:
        raise ValueError(f"group_size: found {group_size!r}; choose an integer from 2 to {elements}, a whole channel")
    groups, remainder = divmod(elements, group_size)
    return [group_size] * (groups - 1) + [group_size + remainder]


def group_order(student_BCN: Tensor, teacher_BCN: Tensor, grouping: str = "error") -> Tensor:
    """The order that puts PLACE's groups side by side, int64 (B, C, N), smallest errors first: |e_T - e_S|, or the
    signed e_T - e_S. Stable, so that equal errors (a constant image, a perfect student) give the same groups on every
    device."""
    error_BCN = (teacher_BCN - student_BCN).detach()
    return torch.argsort(error_BCN.abs() if grouping == "error" else error_BCN, dim=-1, stable=True)


def in_groups(ordered_BCN: Tensor, group_size: int) -> list[Tensor]:
    """Elements in order (B, C, N) -> groups (B, C, G, K): those of one size, and where there is a remainder the last,
    which takes it, by itself."""
    sizes = group_sizes(ordered_BCN.shape[-1], group_size)
    if sizes[-1] == group_size:
        return [ordered_BCN.unflatten(-1, (-1, group_size))]
    equal_BCN, last_BCK = ordered_BCN.split([sum(sizes[:-1]), sizes[-1]], dim=-1)
    equal = [equal_BCN.unflatten(-1, (-1, group_size))] if len(sizes) > 1 else []
    return [*equal, last_BCK.unsqueeze(-2)]


def output_loss(
    student_pred: Tensor, teacher_pred: Tensor, *, kind: str = "mse", sample_weight: Tensor | None = None
) -> KDLoss:
    """Conventional output distillation, the mean of a distance per element: LIFT with the line fixed at (0, 1).

    student_pred, teacher_pred (B, ...) of one shape. `kind`: mse | l1 | huber (delta 1) | log, the mean over samples
    of log(mean squared error + 1e-8): each sample's gradient over its own error. `sample_weight` (B,): see above.
    ValueError: shapes that differ or are empty, dtypes that are not floating point, an unknown kind, a sample_weight
    not (B,).
    """
    _check_choice("kind", kind, OUTPUT_KINDS)
    student, teacher = _checked(student_pred, teacher_pred.detach(), min_dims=1)
    distance = OUTPUT_LOSSES["mse" if kind == "log" else kind]
    error_B = distance(student, teacher, reduction="none").reshape(len(student), -1).mean(1)
    if kind == "log":
        error_B = (error_B + 1e-8).log()
    fine = error_B.mean() if kind == "log" else distance(student, teacher)
    loss = _weighted(fine, error_B, sample_weight)
    zero, one = loss.new_zeros(()), loss.new_ones(())
    return KDLoss(loss, zero, fine.detach(), weight=one, slope=one, intercept=zero, error=error_B.detach())


def _fit(student_XK: Tensor, teacher_XK: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Slope (X), intercept (X) and the residual (X, K) that they leave, in which they are detached.

    Only means and elementwise products: autocast leaves those in float32, and would not a matmul or einsum.
    """
    if student_XK.shape[-1] < 2:
        raise ValueError(f"student_pred: found {student_XK.shape[-1]} element per line; a line needs at least 2")
    student_mean_X1, teacher_mean_X1 = student_XK.mean(-1, keepdim=True), teacher_XK.mean(-1, keepdim=True)
    student_centred_XK, teacher_centred_XK = student_XK - student_mean_X1, teacher_XK - teacher_mean_X1
    variance_X1 = student_centred_XK.square().mean(-1, keepdim=True)
    covariance_X1 = (student_centred_XK * teacher_centred_XK).mean(-1, keepdim=True)
    slope_X1 = covariance_X1 / (variance_X1 + eps)
    intercept_X1 = teacher_mean_X1 - slope_X1 * student_mean_X1
    # b0 + b1 * e_S - e_T from the tensors at hand. Its mean is 0 whatever b1 is, and so is the gradient that a mean
    # square sends through student_mean: that of e_S with b0 and b1 detached is all that is left.
    residual_XK = slope_X1.detach() * student_centred_XK - teacher_centred_XK
    return slope_X1.squeeze(-1), intercept_X1.squeeze(-1), residual_XK


def _line_loss(
    pieces: list[tuple[Tensor, Tensor]],
    coarse_norm: str,
    coarse_scale: float,
    weight: float | Tensor | None,
    sample_weight: Tensor | None,
    eps: float,
) -> KDLoss:
    """L = L_coarse + w * L_fine over all lines; a piece is a pair (B, C, K) or (B, C, G, K), K its own."""
    _check_choice("coarse_norm", coarse_norm, ("l1", "l2"))
    slopes, intercepts, residuals = zip(*(_fit(student, teacher, eps) for student, teacher in pieces), strict=True)
    slope_X, intercept_X = torch.cat(slopes, dim=-1), torch.cat(intercepts, dim=-1)
    tilt_X = slope_X - 1
    absolute = tilt_X.abs().mean() + intercept_X.abs().mean()
    coarse = absolute if coarse_norm == "l1" else tilt_X.square().mean() + intercept_X.square().mean()
    squares, elements = [r.square() for r in residuals], sum(r.numel() for r in residuals)
    fine = sum(square.sum() for square in squares) / elements
    error_B = sum(square.flatten(1).sum(1) for square in squares) / (elements // len(squares[0]))

    if weight is None:
        w = 1 - absolute.detach().clamp(max=1)
    elif not isinstance(weight, Tensor):
        w = fine.new_full((), weight)
    elif weight.numel() == 1:
        w = weight.to(fine).reshape(())
    else:
        raise ValueError(f"weight: found shape {tuple(weight.shape)}; give a number or a tensor of one element")
    loss = coarse_scale * coarse + w * _weighted(fine, error_B, sample_weight)
    statistics = (coarse, fine, w, slope_X, intercept_X, error_B)
    return KDLoss(loss, *(value.detach() for value in statistics))


def _weighted(mean: Tensor, error_B: Tensor, sample_weight: Tensor | None) -> Tensor:
    """() `mean` itself without weights: a mean over samples of means rounds otherwise."""
    if sample_weight is None:
        return mean
    if sample_weight.shape != error_B.shape:
        found = f"found shape {tuple(sample_weight.shape)}"
        raise ValueError(f"sample_weight: {found}; give one number a sample, {tuple(error_B.shape)}")
    return (sample_weight * error_B).mean()


def _patch_order(pred: Tensor, group_size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, N) with the `group_size` elements of every square patch side by side."""
    if pred.ndim != 4:
        raise ValueError(f"grouping: patch needs (B, C, H, W), found shape {tuple(pred.shape)}; use error or signed")
    (B, C, H, W), side = pred.shape, math.isqrt(group_size)
    if side * side != group_size or H % side or W % side:
        raise ValueError(f"group_size: found {group_size}; choose a square number whose root divides {H} and {W}")
    return pred.reshape(B, C, H // side, side, W // side, side).transpose(3, 4).flatten(2)


def _checked(student: Tensor, teacher: Tensor, min_dims: int) -> tuple[Tensor, Tensor]:
    """Both predictions in one dtype, float32 or better."""
    if student.shape != teacher.shape:
        shapes = f"found shape {tuple(teacher.shape)}, student_pred has {tuple(student.shape)}"
        raise ValueError(f"teacher_pred: {shapes}; make them equal")
    if student.ndim < min_dims or not student.numel():
        raise ValueError(
            f"student_pred: found shape {tuple(student.shape)}; {min_dims}+ dimensions are needed, none empty"
        )
    for name, pred in (("student_pred", student), ("teacher_pred", teacher)):
        if not pred.is_floating_point():
            raise ValueError(f"{name}: found dtype {pred.dtype}; convert it to a floating point dtype")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: found {value!r}; choose one of {', '.join(allowed)}")


def fine_weight(weighting: str, progress: float) -> float | None:
    """The w of the paper's ablation at `progress` = step / max_steps in [0, 1]; None is the adaptive weight.

    ValueError: an unknown weighting.
    """
    _check_choice("weighting", weighting, ("adaptive", "constant", "linear", "cosine"))
    return {"adaptive": None, "constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[
        weighting
    ]
