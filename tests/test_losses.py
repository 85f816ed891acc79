# SPDX-License-Identifier: Apache-2.0
"""Losses against plain loops, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.distillation.losses import KDLoss, fit_line, lift_loss, output_loss, place_loss

STATISTICS = KDLoss._fields[1:]


def predictions(*shape, seed=0, gap=0.2, dtype=torch.float64):
    """A student close enough to the teacher (gap small) for the adaptive weight to lie inside (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    student = 0.9 * teacher + gap * noise + 0.05
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def lines_of(student, teacher, method, group_size=None, grouping=None):
    """Index lists of the elements of every line, for flat (B, C, N) arrays: [[[(flat indices)]]] by B, C, G."""
    B, C, *space = student.shape
    N = math.prod(space)
    index = np.arange(B * C * N).reshape(B, C, N)
    if method == "sample":
        return [[[list(index[b].ravel())]] for b in range(B)]
    if method == "channel":
        return [[[list(index[b, c])] for c in range(C)] for b in range(B)]
    s, t = student.reshape(-1), teacher.reshape(-1)
    result = []
    for b in range(B):
        result.append([])
        for c in range(C):
            if grouping == "patch":
                k, (H, W) = math.isqrt(group_size), space
                grid = index[b, c].reshape(H, W)
                groups = [list(grid[i : i + k, j : j + k].ravel()) for i in range(0, H, k) for j in range(0, W, k)]
            else:
                keys = {"error": lambda i: abs(t[i] - s[i]), "signed": lambda i: t[i] - s[i]}
                order = sorted(index[b, c], key=keys[grouping])  # python's sort is stable
                count = N // group_size
                groups = [order[g * group_size : (g + 1) * group_size] for g in range(count - 1)]
                groups.append(order[(count - 1) * group_size :])
            result[-1].append(groups)
    return result


def reference(student, teacher, lines, norm="l1", scale=1.0, weight=None, eps=1e-8):
    """Loss, statistics and gradient by the paper's equations, one line and one element at a time."""
    s, t = student.reshape(-1), teacher.reshape(-1)
    flat = [line for sample in lines for channel in sample for line in channel]
    fits = []
    for line in flat:
        x, y, k = s[line], t[line], len(line)
        mean_x, mean_y = sum(x) / k, sum(y) / k
        var = sum((xi - mean_x) ** 2 for xi in x) / k
        cov = sum((xi - mean_x) * (yi - mean_y) for xi, yi in zip(x, y, strict=True)) / k
        slope = cov / (var + eps)
        fits.append((slope, mean_y - slope * mean_x, mean_x, mean_y, var))
    L, total = len(flat), sum(len(line) for line in flat)
    absolute = sum(abs(f[0] - 1) for f in fits) / L + sum(abs(f[1]) for f in fits) / L
    squared = sum((f[0] - 1) ** 2 for f in fits) / L + sum(f[1] ** 2 for f in fits) / L
    coarse = absolute if norm == "l1" else squared
    w = 1 - min(1, absolute) if weight is None else weight
    fine, gradient = 0.0, np.zeros_like(s)
    for line, (slope, intercept, mean_x, mean_y, var) in zip(flat, fits, strict=True):
        k = len(line)
        if norm == "l1":
            d_slope, d_intercept = np.sign(slope - 1) / L, np.sign(intercept) / L
        else:
            d_slope, d_intercept = 2 * (slope - 1) / L, 2 * intercept / L
        for i in line:
            residual = intercept + slope * s[i] - t[i]
            fine += residual**2 / total
            slope_i = ((t[i] - mean_y) - 2 * slope * (s[i] - mean_x)) / (k * (var + eps))
            intercept_i = -slope_i * mean_x - slope / k
            gradient[i] = scale * (d_slope * slope_i + d_intercept * intercept_i) + w * 2 * residual * slope / total
    values = [
        np.array([[[f[j] for f in fits][n] for n in range(L)]]).reshape(len(lines), len(lines[0]), -1) for j in (0, 1)
    ]
    slope, intercept = (np.repeat(value.ravel(), [len(line) for line in flat]) for value in values)
    order = np.concatenate(flat)
    squares = np.zeros_like(s)
    squares[order] = (intercept + slope * s[order] - t[order]) ** 2
    error = squares.reshape(len(student), -1).mean(1)
    return KDLoss(scale * coarse + w * fine, coarse, fine, w, *values, error), gradient.reshape(student.shape)


def assert_matches(result, student, expected, gradient):
    result.loss.backward()
    for name in KDLoss._fields:
        found, wanted = getattr(result, name).detach().numpy(), getattr(expected, name)
        wanted = np.asarray(wanted).reshape(found.shape)
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-9, atol=1e-12)


VARIANTS = [
    {},
    {"coarse_norm": "l2"},
    {"coarse_scale": 3.0},
    {"weight": 0.3},
    {"eps": 0.1},
    {"coarse_norm": "l2", "coarse_scale": 0.5, "eps": 0.1},
]


def reference_options(variant):
    names = {"coarse_norm": "norm", "coarse_scale": "scale"}
    return {names.get(key, key): value for key, value in variant.items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("coefficients", ["channel", "sample"])
def test_lift_matches_loops(coefficients, variant):
    student, teacher = predictions(3, 2, 4, 5)
    expected, gradient = reference(
        student.detach().numpy(),
        teacher.numpy(),
        lines_of(student, teacher, coefficients),
        **reference_options(variant),
    )
    assert 0.05 < expected.weight < 0.95
    result = lift_loss(student, teacher, coefficients=coefficients, **variant)
    assert result.slope.shape == (3, 2 if coefficients == "channel" else 1)
    assert_matches(result, student, expected, gradient)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("grouping", "group_size", "groups"),
    [("error", 6, 6), ("error", 5, 7), ("error", 20, 1), ("error", 36, 1), ("signed", 5, 7), ("patch", 9, 4)],
)
def test_place_matches_loops(grouping, group_size, groups, variant):
    student, teacher = predictions(2, 2, 6, 6, seed=7, gap=0.1)  # 36 elements: 5 and 20 leave a remainder
    arrays = student.detach().numpy(), teacher.numpy()
    lines = lines_of(*arrays, "place", group_size, grouping)
    expected, gradient = reference(*arrays, lines, **reference_options(variant))
    assert 0.05 < expected.weight < 0.95
    result = place_loss(student, teacher, group_size=group_size, grouping=grouping, **variant)
    assert result.slope.shape == result.intercept.shape == (2, 2, groups)
    assert_matches(result, student, expected, gradient)


def test_hand_computed():
    # means 1, 4; var 2/3, cov 1/3: b1 = 1/2, b0 = 7/2; residuals 1/2, -1, 1/2
    student = torch.tensor([[[0.0, 1.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[3.0, 5.0, 4.0]]], dtype=torch.float64)
    result = lift_loss(student, teacher, eps=0.0, weight=0.5)
    numbers = [float(value.detach()) for value in result]
    assert numbers == pytest.approx([4.0 + 0.5 * 0.5, 4.0, 0.5, 0.5, 0.5, 3.5, 0.5])
    assert float(lift_loss(student, teacher, eps=0.0).weight) == 0.0  # the coarse part is past 1


@pytest.mark.parametrize(("a", "b"), [(0.7, 0.1), (1.2, -0.3), (-2.0, 5.0)])
def test_closed_form(a, b):
    student = predictions(2, 3, 4, 4)[0]
    teacher = (a * student + b).detach()
    for result in (lift_loss(student, teacher, eps=0.0), place_loss(student, teacher, group_size=5, eps=0.0)):
        torch.testing.assert_close(result.slope, torch.full_like(result.slope, a))
        torch.testing.assert_close(result.intercept, torch.full_like(result.intercept, b))
        assert float(result.fine) < 1e-20
        assert float(result.weight) == pytest.approx(1 - min(1, abs(a - 1) + abs(b)))
        assert float(result.loss.detach()) == pytest.approx(abs(a - 1) + abs(b))


def test_one_group_is_lift():
    student, teacher = predictions(2, 3, 4, 4)
    place, lift = place_loss(student, teacher, group_size=16), lift_loss(student, teacher)
    for name in KDLoss._fields:
        torch.testing.assert_close(
            getattr(place, name).squeeze(-1), getattr(lift, name).squeeze(-1), rtol=1e-12, atol=0
        )
    gradients = [torch.autograd.grad(result.loss, student)[0] for result in (place, lift)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_sums_of_the_authors_are_these_means():
    """The repository sums over channels and pixels: coarse x K + fine. Divided by C*H*W that is our loss."""
    student, teacher = predictions(2, 3, 4, 4)
    result = place_loss(student, teacher, group_size=4)
    order = (teacher - student).square().flatten(2).argsort(-1)
    s, t = (x.flatten(2).gather(-1, order).view(2, 3, 4, 4) for x in (student.detach(), teacher))
    fitted = s * result.slope[..., None] + result.intercept[..., None]
    fine = (fitted - t).pow(2).sum(dim=(1, 2, 3)).mean()
    coarse = (result.slope - 1).abs().sum(dim=(1, 2)).mean() + result.intercept.abs().sum(dim=(1, 2)).mean()
    torch.testing.assert_close(result.loss.detach(), (coarse * 4 + result.weight * fine) / 48, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_fit_line(eps):
    student, teacher = predictions(3, 2, 7)
    slope, intercept = fit_line(student, teacher, eps=eps)
    assert slope.shape == intercept.shape == (3, 2) and slope.requires_grad
    s, t = student.detach().numpy(), teacher.numpy()
    for i in np.ndindex(3, 2):
        wanted = np.cov(s[i], t[i], bias=True)[0, 1] / (s[i].var() + eps)
        assert float(slope[i].detach()) == pytest.approx(wanted, rel=1e-12)
        assert float(intercept[i].detach()) == pytest.approx(t[i].mean() - wanted * s[i].mean(), rel=1e-12)
    assert torch.autograd.gradcheck(fit_line, (student, teacher.clone().requires_grad_()))
    assert fit_line(torch.ones(5), torch.ones(5))[0].shape == ()


LINE_LOSSES = [
    lambda s, t, **k: lift_loss(s, t, coefficients="channel", **k),
    lambda s, t, **k: lift_loss(s, t, coefficients="sample", coarse_norm="l2", **k),
    lambda s, t, **k: place_loss(s, t, group_size=4, **k),
    lambda s, t, **k: place_loss(s, t, group_size=5, coarse_norm="l2", coarse_scale=2.0, **k),
    lambda s, t, **k: place_loss(s, t, group_size=5, grouping="signed", **k),
    lambda s, t, **k: place_loss(s, t, group_size=4, grouping="patch", **k),
]


@pytest.mark.parametrize("loss", LINE_LOSSES)
def test_gradcheck_of_the_coarse_part(loss):
    student, teacher = predictions(2, 2, 4, 4)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, weight=0.0).loss, (student,))


@pytest.mark.parametrize("coarse_norm", ["l1", "l2"])
@pytest.mark.parametrize(
    ("method", "loss"),
    [
        (("channel",), lift_loss),
        (("sample",), lambda s, t, **k: lift_loss(s, t, coefficients="sample", **k)),
        (("place", 4, "error"), lambda s, t, **k: place_loss(s, t, group_size=4, **k)),
        (("place", 5, "signed"), lambda s, t, **k: place_loss(s, t, group_size=5, grouping="signed", **k)),
        (("place", 4, "patch"), lambda s, t, **k: place_loss(s, t, group_size=4, grouping="patch", **k)),
    ],
    ids=["channel", "sample", "error", "signed", "patch"],
)
def test_adaptive_gradient_is_that_of_frozen_weight_groups_and_fine_coefficients(method, loss, coarse_norm):
    """Finite differences of coarse + w0 * mean (b0 + b1 * s - t)^2: w0, b0, b1 and the groups are constants."""
    options = {"coarse_norm": coarse_norm, "eps": 0.1}  # at 1e-8 an attached b0 or b1 has the same gradient
    student, teacher = predictions(2, 2, 4, 4, gap=0.1)
    (gradient,) = torch.autograd.grad(loss(student, teacher, **options).loss, student)
    s0, t = student.detach().numpy(), teacher.numpy()
    lines = lines_of(s0, t, *method)
    fixed = reference(s0, t, lines, norm=coarse_norm, eps=0.1)[0]
    assert 0.05 < fixed.weight < 0.95
    b0, b1 = np.zeros(s0.size), np.zeros(s0.size)
    flat = [line for sample in lines for channel in sample for line in channel]
    for line, slope, intercept in zip(flat, fixed.slope.ravel(), fixed.intercept.ravel(), strict=True):
        b0[line], b1[line] = intercept, slope

    def frozen(s):
        coarse = reference(s, t, lines, norm=coarse_norm, eps=0.1)[0].coarse
        return coarse + fixed.weight * np.mean((b0 + b1 * s.ravel() - t.ravel()) ** 2)

    step, numeric = 1e-6, np.zeros_like(s0)
    for i in np.ndindex(*s0.shape):
        unit = np.zeros_like(s0)
        unit[i] = step
        numeric[i] = (frozen(s0 + unit) - frozen(s0 - unit)) / (2 * step)
    np.testing.assert_allclose(gradient.numpy(), numeric, rtol=1e-5, atol=1e-8)


def test_fine_gradient_sees_neither_coefficient():
    student, teacher = predictions(2, 3, 4, 4)
    results = [lift_loss(student, teacher, weight=w, eps=0.1) for w in (1.0, 0.0)]
    found = torch.autograd.grad(results[0].loss - results[1].loss, student)[0]
    slope, intercept = (x[..., None, None] for x in (results[0].slope, results[0].intercept))
    frozen = torch.autograd.grad((intercept + slope * student - teacher).square().mean(), student)[0]
    torch.testing.assert_close(found, frozen, rtol=1e-9, atol=1e-13)
    var = student.flatten(2).var(-1, correction=0)
    mean_s, mean_t = student.flatten(2).mean(-1), teacher.flatten(2).mean(-1)
    live = ((student * teacher).flatten(2).mean(-1) - mean_s * mean_t) / (var + 0.1)
    moving = (mean_t - live * mean_s)[..., None, None] + live[..., None, None] * student - teacher
    attached = torch.autograd.grad(moving.square().mean(), student)[0]
    assert (found - attached).abs().max() > 1e-3  # otherwise this test could not tell


@pytest.mark.parametrize("loss", [*LINE_LOSSES, output_loss])
def test_only_the_loss_has_a_gradient(loss):
    student, teacher = predictions(2, 2, 4, 4)
    teacher.requires_grad_()
    result = loss(student, teacher)
    assert isinstance(result, KDLoss) and result.loss.shape == () and result.loss.requires_grad
    assert not any(getattr(result, name).requires_grad for name in STATISTICS)
    result.loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_weight():
    student, teacher = predictions(2, 3, 4, 4)
    squared = lift_loss(student, teacher, coarse_norm="l2", coarse_scale=5.0)
    plain = lift_loss(student, teacher)
    assert torch.equal(squared.weight, plain.weight)  # from the absolute form, whatever the norm or scale
    torch.testing.assert_close(plain.weight, 1 - plain.coarse)
    assert float(squared.coarse) != pytest.approx(float(plain.coarse), rel=0.1)
    torch.testing.assert_close(squared.loss.detach(), 5 * squared.coarse + squared.weight * squared.fine)

    learned = torch.tensor([0.25], dtype=torch.float32, requires_grad=True)
    fixed = lift_loss(student, teacher, weight=learned)
    torch.testing.assert_close(fixed.loss, lift_loss(student, teacher, weight=0.25).loss)
    assert fixed.weight.shape == fixed.loss.shape == () and fixed.weight.dtype == torch.float64
    fixed.loss.backward()
    assert float(learned.grad) == pytest.approx(float(fixed.fine))
    assert float(lift_loss(student, teacher + 9).weight) == 0.0


def test_output_loss():
    student, teacher = predictions(2, 3, 4, 4)
    for kind, wanted in (("mse", F.mse_loss), ("l1", F.l1_loss), ("huber", F.huber_loss)):
        student_far = student * 2  # errors on both sides of huber's delta
        result = output_loss(student_far, teacher, kind=kind)
        assert torch.equal(result.loss, wanted(student_far, teacher))
        assert [float(x) for x in result[1:-1]] == [0.0, float(result.loss.detach()), 1.0, 1.0, 0.0]
        assert all(x.shape == () and x.dtype == torch.float64 for x in result[:-1])
        torch.testing.assert_close(result.error, wanted(student_far, teacher, reduction="none").flatten(1).mean(1))
    assert torch.equal(output_loss(student, teacher).loss, F.mse_loss(student, teacher))
    identity = (0.0 + 1.0 * student - teacher).square().mean()
    torch.testing.assert_close(output_loss(student, teacher).loss, identity)

    # An error without mean and orthogonal to the student leaves LIFT's line at b0 = 0, b1 = 1.
    s = student.detach().flatten(2)
    centred, noise = s - s.mean(-1, keepdim=True), (teacher - student).detach().flatten(2)
    noise = noise - noise.mean(-1, keepdim=True)
    noise -= centred * (noise * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True)
    lift, mse = lift_loss(s, s + noise, eps=0.0), output_loss(s, s + noise)
    for name in KDLoss._fields:
        found, wanted = getattr(lift, name), getattr(mse, name)
        torch.testing.assert_close(found, wanted.expand_as(found), rtol=1e-12, atol=1e-12)


def test_log_divides_the_gradient_of_a_sample_by_its_error():
    student, teacher = predictions(3, 2, 4, 4)
    result = output_loss(student, teacher, kind="log")
    torch.testing.assert_close(result.error, output_loss(student, teacher).error.log(), rtol=1e-6, atol=0)
    assert float(result.loss.detach()) == float(result.fine) == pytest.approx(float(result.error.mean()))
    (found,) = torch.autograd.grad(result.loss, student)
    error = (student - teacher).detach()
    wanted = 2 * error / 32 / error.square().flatten(1).mean(1).view(3, 1, 1, 1) / 3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    same = output_loss(teacher.clone().requires_grad_(), teacher, kind="log")
    same.loss.backward()
    assert same.loss.isfinite()


@pytest.mark.parametrize("loss", [*LINE_LOSSES, output_loss, lambda s, t, **k: output_loss(s, t, kind="l1", **k)])
def test_sample_weights_weigh_the_fine_part_alone(loss):
    student, teacher = predictions(3, 2, 4, 4, gap=0.1)
    weights = torch.tensor([0.05, 1.0, 3.0], dtype=torch.float64)
    plain, weighed = loss(student, teacher), loss(student, teacher, sample_weight=weights)
    for name in STATISTICS:  # also w and fine: what is logged and what decides do not see the weights
        assert torch.equal(getattr(plain, name), getattr(weighed, name)), name
    alone = [loss(student[b : b + 1], teacher[b : b + 1]) for b in range(3)]
    torch.testing.assert_close(plain.error, torch.stack([each.fine for each in alone]))
    more = plain.weight * ((weights - 1) * plain.error).mean()
    torch.testing.assert_close(weighed.loss.detach(), plain.loss.detach() + more)
    # the gradient of a sample's fine part is that of the sample alone: lines are fitted within samples
    given = {} if loss not in LINE_LOSSES else {"weight": 1.0}
    nothing = {} if loss not in LINE_LOSSES else {"weight": 0.0}
    wanted = torch.autograd.grad(plain.loss, student)[0]
    for b, weight in enumerate(weights.tolist()):
        part = student[b : b + 1].detach().requires_grad_()
        fine = loss(part, teacher[b : b + 1], **given).loss
        fine = fine - (loss(part, teacher[b : b + 1], **nothing).loss if nothing else 0)
        wanted[b] += (weight - 1) * float(plain.weight) * torch.autograd.grad(fine, part)[0][0] / 3
    torch.testing.assert_close(torch.autograd.grad(weighed.loss, student)[0], wanted)
    torch.testing.assert_close(loss(student, teacher, sample_weight=torch.ones(3)).loss, plain.loss)


def test_sort_is_stable_and_by_error():
    # Errors of both signs, tied in pairs and fours: a stable sort keeps the order of position within a tie.
    error = torch.tensor([2, -1, 1, 2, -2, 1, -1, -2] * 8, dtype=torch.float64)
    student = torch.arange(64, dtype=torch.float64).sin().mul(8).round()  # integers: differences are exact
    teacher = student + error
    small = [i for i in range(64) if abs(error[i]) == 1]
    large = [i for i in range(64) if abs(error[i]) == 2]
    orders = {"error": small + large, "signed": sorted(range(64), key=lambda i: float(error[i]))}
    for grouping, order in orders.items():
        result = place_loss(student.view(1, 1, 8, 8), teacher.view(1, 1, 8, 8), group_size=8, grouping=grouping)
        slope, intercept = fit_line(student[order].view(8, 8), teacher[order].view(8, 8))
        torch.testing.assert_close(result.slope.view(-1), slope, rtol=1e-12, atol=0)
        torch.testing.assert_close(result.intercept.view(-1), intercept, rtol=1e-12, atol=1e-13)


def test_patches_are_spatial():
    student = predictions(1, 2, 4, 6)[0].detach()
    teacher = student.clone()
    teacher[0, 1, 2:, 2:4] *= 3  # the second row and second column of 2 x 2 patches in channel 1
    slope = place_loss(student, teacher, group_size=4, grouping="patch").slope
    assert slope.shape == (1, 2, 6)
    assert (slope - 1).abs().gt(0.5).nonzero().tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [*LINE_LOSSES, output_loss])
def test_low_precision_is_computed_in_float32(loss, dtype):
    student, teacher = predictions(2, 2, 4, 4, dtype=dtype)
    result = loss(student, teacher)
    exact_student = student.detach().float().requires_grad_()
    exact = loss(exact_student, teacher.float())
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(result, exact, strict=True))
    result.loss.backward()
    exact.loss.backward()
    assert student.grad.dtype == dtype and torch.equal(student.grad, exact_student.grad.to(dtype))
    assert loss(student, teacher.double()).loss.dtype == torch.float64


@pytest.mark.parametrize("loss", [*LINE_LOSSES, output_loss])
def test_autocast_changes_nothing(loss):
    student, teacher = predictions(2, 2, 4, 4, dtype=torch.float32)
    plain = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(student, teacher)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("loss", LINE_LOSSES)
def test_float32_accuracy(loss):
    student, teacher = predictions(4, 2, 12, 12)
    student, teacher = student.detach() + 30, teacher + 30  # an offset would cancel in E[s^2] - E[s]^2
    student, teacher = student.float().double().requires_grad_(), teacher.float().double()
    low = student.detach().float().requires_grad_()
    exact, found = loss(student, teacher), loss(low, teacher.float())
    assert float(found.fine) == pytest.approx(float(exact.fine), rel=1e-5)
    assert float(found.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=1e-4)
    exact.loss.backward()
    found.loss.backward()
    assert (low.grad - student.grad).norm() < 1e-4 * student.grad.norm()


@pytest.mark.parametrize("shape", [(2, 3, 16), (2, 3, 4, 4), (2, 3, 2, 2, 4)])
def test_any_trailing_shape(shape):
    student, teacher = predictions(2, 3, 16)
    for loss in (lift_loss, lambda s, t: place_loss(s, t, group_size=5), output_loss):
        assert torch.equal(loss(student.view(shape), teacher.view(shape)).loss, loss(student, teacher).loss)


@pytest.mark.parametrize("loss", [*LINE_LOSSES, output_loss])
def test_non_contiguous(loss):
    student, teacher = predictions(2, 3, 4, 8)
    wanted = loss(student, teacher)
    for layout in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
    ):
        assert not layout(teacher).is_contiguous()
        found = loss(layout(student), layout(teacher))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LINE_LOSSES)
def test_degenerate_is_finite(loss, dtype):
    teacher = predictions(2, 2, 4, 4, dtype=dtype)[1]
    for student in (torch.zeros_like(teacher), torch.full_like(teacher, 0.1), teacher.clone()):
        for target in (teacher, torch.ones_like(teacher), student.clone()):
            leaf = student.clone().requires_grad_()
            result = loss(leaf, target)
            result.loss.backward()
            assert all(x.isfinite().all() for x in result) and leaf.grad.isfinite().all()
    constant = loss(torch.zeros_like(teacher), teacher)
    assert constant.slope.eq(0).all() and constant.intercept.abs().sum() > 0


def errors():
    x = torch.zeros(2, 3, 4, 4)
    both = ("lift", lift_loss), ("place", place_loss), ("output", output_loss)
    for name, loss in both:
        yield f"{name} shape", lambda loss=loss: loss(x, x[:1]), r"teacher_pred.*\(1, 3, 4, 4\).*equal"
        yield f"{name} broadcast", lambda loss=loss: loss(x, x[..., :1]), "teacher_pred"
        yield f"{name} integer student", lambda loss=loss: loss(x.long(), x), "student_pred.*int64.*floating"
        yield f"{name} integer teacher", lambda loss=loss: loss(x, x.int()), "teacher_pred.*int32.*floating"
        yield f"{name} complex", lambda loss=loss: loss(x.cfloat(), x), "student_pred.*complex"
        yield f"{name} samples", lambda loss=loss: loss(x, x, sample_weight=torch.ones(3)), r"sample_weight.*\(3,\).*2"
        yield f"{name} empty", lambda loss=loss: loss(x[:0], x[:0]), r"student_pred.*\(0, 3, 4, 4\)"
    for name, loss in both[:2]:
        yield f"{name} dims", lambda loss=loss: loss(x[0, 0], x[0, 0]), r"student_pred.*\(4, 4\).*3"
        yield f"{name} norm", lambda loss=loss: loss(x, x, coarse_norm="l3"), "coarse_norm.*'l3'.*l1, l2"
        yield f"{name} weight", lambda loss=loss: loss(x, x, weight=torch.ones(2)), r"weight.*\(2,\).*one element"
    yield "fit_line scalar", lambda: fit_line(x.sum(), x.sum()), "student_pred.*1"
    yield "fit_line point", lambda: fit_line(x[..., :1], x[..., :1]), "student_pred.*found 1 element.*at least 2"
    yield "fit_line integer", lambda: fit_line(x.long(), x), "student_pred.*int64"
    yield "lift point", lambda: lift_loss(x[:, :, :1, :1], x[:, :, :1, :1]), "student_pred.*found 1 element"
    yield "coefficients", lambda: lift_loss(x, x, coefficients="pixel"), "coefficients.*'pixel'.*channel, sample"
    yield "kind", lambda: output_loss(x, x, kind="l2"), "kind.*'l2'.*mse, l1, huber, log"
    yield "grouping", lambda: place_loss(x, x, grouping="sign"), "grouping.*'sign'.*error, signed, patch"
    for size in (-1, 0, 1, 17, 4.0, None):
        yield f"group_size {size}", lambda size=size: place_loss(x, x, group_size=size), f"group_size.*{size}.*2 to 16"
    yield "not square", lambda: place_loss(x, x, group_size=8, grouping="patch"), "group_size.*8.*square"
    for crop in (x[..., :3, :], x[..., :3]):  # 2 x 2 patches tile neither 3 x 4 nor 4 x 3
        yield (
            "no tiling",
            lambda crop=crop: place_loss(crop, crop, group_size=4, grouping="patch"),
            "group_size.*divides",
        )
    video = x[:, :, None]
    yield "video patch", lambda: place_loss(video, video, grouping="patch"), "grouping.*patch.*B, C, H, W"


@pytest.mark.parametrize(("call", "message"), [pytest.param(*case[1:], id=case[0]) for case in errors()])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("weight", [None, 0.5, torch.ones((), device="meta")])
@pytest.mark.parametrize("loss", LINE_LOSSES)
def test_no_host_sync(loss, weight):
    """Meta tensors have no values: .item(), float() and a branch on a value raise."""
    student = torch.randn(2, 3, 4, 4, device="meta", requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, device="meta")
    balance = torch.ones(2, device="meta")
    results = loss(student, teacher, weight=weight, sample_weight=balance), output_loss(student, teacher, kind="log")
    for result in results:
        result.loss.backward()
        assert all(x.device.type == "meta" for x in result)
