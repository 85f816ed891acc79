# SPDX-License-Identifier: Apache-2.0
"""Feature distillation: which tensors are tapped, projected and compared, and what gradients follow."""

import copy
import math

import pytest
import torch
from conftest import build_unet
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.distillation.features import Tapped, feature_loss, feature_weight, tap_pair, within

BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
PAIRS = [(name, name) for name in BLOCKS]
EXAMPLE = {"x_t": torch.zeros(1, 1, 8, 8), "timestep": torch.zeros(1, dtype=torch.long)}
NARROW = {"block_out_channels": (8, 16)}
HALF = {"block_out_channels": (16, 16)}  # the first stage is as wide as the teacher's


def noisy(batch_size=3, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch_size, 1, 8, 8, generator=generator)
    return {"x_t": x_t, "timestep": torch.tensor([3, 400, 999])[:batch_size]}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def manual_features(model: nn.Module, inputs: dict) -> dict:
    """The raw outputs of the blocks, by hooks of our own."""
    kept, handles = {}, []
    for name in BLOCKS:
        block = model.get_submodule(name)
        handles.append(block.register_forward_hook(lambda _m, _i, out, name=name: kept.__setitem__(name, out)))
    with torch.no_grad():
        model(inputs["x_t"], inputs["timestep"])
    for handle in handles:
        handle.remove()
    return kept


def test_without_blocks_it_is_the_plain_denoiser():
    model = build_unet()
    tapped = Tapped(model)
    assert hooks(model) == 0 and tapped.blocks == []
    assert [id(p) for p in tapped.parameters()] == [id(p) for p in model.parameters()]
    output, features = tapped(**noisy())
    assert features == []
    assert torch.equal(output, model(*noisy().values()).sample)


def test_features_are_the_outputs_of_the_blocks():
    model = build_unet(seed=1)
    kept = manual_features(model, noisy())
    output, features = Tapped(model, BLOCKS)(**noisy())
    assert torch.equal(output, model(*noisy().values()).sample)
    for name, feature in zip(BLOCKS, features, strict=True):
        if name.startswith("down"):
            hidden, residuals = kept[name]
            assert torch.equal(feature, hidden)
            assert isinstance(residuals, tuple)
        else:
            assert torch.equal(feature, kept[name])
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (16, 4, 4),
        (32, 4, 4),
        (32, 4, 4),
        (32, 8, 8),
        (16, 8, 8),
    ]


def test_features_come_in_the_order_of_the_blocks():
    model = build_unet(seed=1)
    _, features = Tapped(model, BLOCKS)(**noisy())
    _, turned = Tapped(model, BLOCKS[::-1])(**noisy())
    assert all(torch.equal(a, b) for a, b in zip(features, turned[::-1], strict=True))


def test_every_forward_has_its_own_features():
    tapped = Tapped(build_unet(), BLOCKS)
    _, first = tapped(**noisy(seed=0))
    copies = [feature.clone() for feature in first]
    _, second = tapped(**noisy(2, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    assert all(feature.shape[0] == 2 for feature in second)
    assert tapped._taps is None


def test_calls_outside_forward_leave_nothing():
    model = build_unet()
    tapped = Tapped(model, BLOCKS)
    model(*noisy().values())  # as the sampler does
    assert tapped._taps is None


def test_input_is_cast_to_the_weights():
    model = nn.Module.to(build_unet(), torch.bfloat16)
    output, features = Tapped(model, BLOCKS)(**noisy())
    assert output.dtype == torch.bfloat16 and all(feature.dtype == torch.bfloat16 for feature in features)


@pytest.mark.parametrize("changes, projected", [({}, []), (HALF, [1, 2, 3]), (NARROW, [0, 1, 2, 3, 4])])
def test_projectors_stand_where_widths_differ(changes, projected):
    student, teacher = tap_pair(build_unet(1, **changes), build_unet(), PAIRS, EXAMPLE, 0)
    for index, projector in enumerate(student.projectors):
        if index in projected:
            assert isinstance(projector, nn.Conv2d) and projector.kernel_size == (1, 1)
        else:
            assert isinstance(projector, nn.Identity)
    assert not list(teacher.projectors.parameters())
    _, ours = student(**noisy())
    _, theirs = teacher(**noisy())
    assert [feature.shape for feature in ours] == [feature.shape for feature in theirs]
    kept = manual_features(student.denoiser, noisy())
    for name, projector, feature in zip(BLOCKS, student.projectors, ours, strict=True):
        raw = kept[name][0] if isinstance(kept[name], tuple) else kept[name]
        torch.testing.assert_close(feature, projector(raw), rtol=1e-5, atol=1e-6)


def test_blocks_may_be_paired_with_others():
    student, teacher = tap_pair(build_unet(1), build_unet(), [("up_blocks.0", "up_blocks.1")], EXAMPLE, 0)
    _, ours = student(**noisy())
    _, theirs = teacher(**noisy())
    torch.testing.assert_close(theirs[0], manual_features(teacher.denoiser, noisy())["up_blocks.1"])
    assert student.blocks == ["up_blocks.0"] and ours[0].shape == theirs[0].shape == (3, 16, 8, 8)


def test_without_pairs():
    student, teacher = build_unet(1), build_unet()
    tapped, tapped_teacher = tap_pair(student, teacher, [], EXAMPLE, 0)
    assert tapped.denoiser is student and tapped_teacher.denoiser is teacher
    assert hooks(student) == hooks(teacher) == 0 and not list(tapped.projectors)
    assert tap_pair(student, None, [], EXAMPLE, 0)[1] is None


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"--lambda_kd_feat.*up_blocks.0.*\(8, 8\).*mid_block.*\(4, 4\).*Set"):
        tap_pair(build_unet(1), build_unet(), [("up_blocks.0", "mid_block")], EXAMPLE, 0)


def test_projectors_depend_on_the_seed_alone():
    def weights(seed, ambient):
        torch.manual_seed(ambient)
        return tap_pair(build_unet(1, **NARROW), build_unet(), PAIRS, EXAMPLE, seed)[0].projectors.state_dict()

    first, same, other = weights(5, 0), weights(5, 1), weights(6, 0)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_global_generator_is_untouched(dropout):
    student = build_unet(1, **NARROW, dropout=dropout).train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    tap_pair(student, build_unet(), PAIRS, EXAMPLE, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_student_keeps_no_other_hooks():
    student, teacher = build_unet(1), build_unet()
    tap_pair(student, teacher, PAIRS, EXAMPLE, 0)
    assert hooks(teacher) == len(PAIRS)
    assert hooks(student) == len(PAIRS)  # those that looked at the shapes are gone


@pytest.mark.parametrize("student_dtype, teacher_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2])
def test_feature_loss_equals_a_sum_by_hand(student_dtype, teacher_dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, 4), (2, 5, 2, 2)]
    ours = [torch.randn(shape, generator=generator).to(student_dtype) for shape in shapes]
    theirs = [torch.randn(shape, generator=generator).to(teacher_dtype) for shape in shapes]
    found = feature_loss(ours, theirs)
    assert found.dtype == torch.float32 and found.shape == ()
    by_hand = 0.0
    for our, their in zip(ours, theirs, strict=True):
        by_hand += ((our.double() - their.double()) ** 2).sum().item() / our.numel()
    assert found.item() == pytest.approx(by_hand, rel=1e-5)
    assert feature_loss(theirs, theirs) == 0


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 4, 6, 6)], ids=["tokens", "maps"])
def test_a_mask_leaves_out_what_lies_far_from_the_mean(shape):
    """mean (m_S f_S - m_T f_T)^2, each mask its own model's and its own sample's."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(shape, generator=generator) for _ in range(2))
    ours[0].view(-1)[3], theirs[1].view(-1)[7] = 300.0, -500.0  # massive activations, in places of their own
    ours, theirs = ours.bfloat16().requires_grad_(), theirs.bfloat16()
    found, by_hand, kept = feature_loss([ours], [theirs], 2.0), 0.0, []
    for our, their in zip(ours.detach().double(), theirs.double(), strict=True):
        masks = [((x - x.mean()).abs() <= 2 * x.std(correction=0)).double() for x in (our, their)]
        by_hand += ((masks[0] * our - masks[1] * their) ** 2).sum().item() / ours.numel()
        kept.append(masks[0].bool())
    assert found.dtype == torch.float32 and found.item() == pytest.approx(by_hand, rel=1e-5)
    assert feature_loss([ours], [theirs]) > 100 * found  # without it they are all that counts
    found.backward()
    left_out = ~torch.stack(kept)
    assert left_out.sum() > 3 and (ours.grad[left_out] == 0).all()
    expected = 2 * (ours - within(theirs.float(), 2.0)).detach() / ours.numel()
    torch.testing.assert_close(ours.grad.float()[~left_out], expected.float()[~left_out], rtol=1e-2, atol=1e-5)


def test_a_mask_that_leaves_out_everything_and_one_that_leaves_out_nothing():
    feature = torch.tensor([[[-1.0, 1.0], [1.0, -1.0]]], requires_grad=True)  # every entry is one deviation away
    loss = feature_loss([feature], [feature.detach() + 3], 0.5)
    loss.backward()
    assert loss == 0 and (feature.grad == 0).all()
    assert torch.equal(within(feature, 1e9), feature) and within(feature, 0) is feature
    constant = torch.full((2, 3, 4), 0.1)
    assert torch.equal(within(constant, 1.0), constant)
    assert feature_loss([torch.full((2, 3), math.nan)], [torch.zeros(2, 3)], 2.0).isnan()  # and is not hidden


def test_the_weight_of_the_feature_loss():
    assert [feature_weight("linear", part) for part in (0, 0.25, 1)] == [1, 0.75, 0]
    assert {feature_weight("constant", part) for part in (0, 0.25, 1)} == {1}


def test_feature_loss_of_nothing_is_zero():
    output = torch.zeros(2, 1, 8, 8)
    found = feature_loss([], [])
    assert found == 0
    with pytest.raises(ValueError):
        feature_loss([output], [output, output])


def gradients(student: Tapped, teacher: Tapped) -> dict[str, torch.Tensor]:
    """Of one step of feature and output loss."""
    with torch.no_grad():
        theirs = teacher(**noisy())
    ours = student(**noisy())
    (feature_loss(ours[1], theirs[1]) + ours[0].square().mean()).backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def test_projectors_and_student_get_gradients():
    student, teacher = tap_pair(build_unet(1, **NARROW), build_unet().requires_grad_(False), PAIRS, EXAMPLE, 0)
    with torch.no_grad():
        theirs = teacher(**noisy())
    feature_loss(student(**noisy())[1], theirs[1]).backward()
    assert len(list(student.projectors.parameters())) == 2 * len(PAIRS)
    for name, parameter in student.named_parameters():
        last = name.startswith(("denoiser.conv_out", "denoiser.conv_norm_out"))  # behind every tapped block
        assert (parameter.grad is None) == last, name
        assert last or parameter.grad.abs().max() > 0 or name.endswith("to_k.bias"), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_nothing(dropout):
    teacher = build_unet().requires_grad_(False).eval()
    plain_student = build_unet(1, **NARROW, dropout=dropout).train()
    checkpointed_student = copy.deepcopy(plain_student)
    checkpointed_student.enable_gradient_checkpointing()
    found = []
    for student in (plain_student, checkpointed_student):
        tapped, tapped_teacher = tap_pair(student, teacher, PAIRS, EXAMPLE, 0)
        calls = []
        student.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(4)
        found.append(gradients(tapped, tapped_teacher))
        assert tapped._taps is None and tapped_teacher._taps is None
        assert len(calls) == (2 if student is checkpointed_student else 1)  # it was computed again
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


class Recomputed(nn.Module):
    """A denoiser whose tapped block itself runs again in backward, hooks and all."""

    dtype = torch.float32

    def __init__(self, recompute: bool):
        super().__init__()
        self.recompute = recompute
        torch.manual_seed(0)
        self.block, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)

    def both(self, x_t):
        return self.last(self.block(x_t).tanh())

    def forward(self, x_t, timestep, return_dict):
        return (checkpoint(self.both, x_t, use_reentrant=False) if self.recompute else self.both(x_t),)


def test_a_block_that_runs_again_in_backward():
    found, runs = [], []
    for recompute in (False, True):
        denoiser = Recomputed(recompute)
        tapped = Tapped(denoiser, ["block"])
        denoiser.block.register_forward_hook(lambda *_: runs.append(1))
        output, features = tapped(**noisy())
        (output.square().mean() + features[0].square().mean()).backward()
        assert tapped._taps is None
        found.append([parameter.grad for parameter in tapped.parameters()])
    assert len(runs) == 3
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)
