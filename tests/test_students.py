# SPDX-License-Identifier: Apache-2.0
"""Students: width pruning of a pixel U-Net, exact where it can be, and counted where it cannot."""

import logging
import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published import CELEBA_64, CIFAR, HUB_256, unet_config
from utils.evaluation.cost import CPU_ATTENTION
from utils.students.coupling import Coupling
from utils.students.sizes import model_size, model_table
from utils.students.width import check_width_prunable, prune_width, taylor_scores, width_config

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
    repeats, or something would read them, and the teacher would not equal its student. Returns scores: 1 for the
    weights between kept channels, 0 for all others.
    """
    generator = torch.Generator().manual_seed(seed)
    coupling = Coupling(teacher, width_config(teacher.config, ratio))
    scores = {name: torch.ones_like(parameter) for name, parameter in teacher.named_parameters()}
    queries = {coupling.axes[f"{name}.weight"][0] for name in coupling.unscaled}
    source, dead = {}, {}  # by space
    for space in dict.fromkeys(space for axes in coupling.axes.values() for row in axes for space in row):
        units, keep = space.width // space.unit, space.keep / space.width
        cuts = {cut for cut in space.cuts if 0 <= cut <= units and (cut * keep).is_integer()} | {0, units}
        origin = torch.arange(units)
        for start, stop in pairwise(sorted(cuts)):
            order = start + torch.randperm(stop - start, generator=generator)
            best = order[: int((stop - start) * keep)]
            origin[order] = best.repeat(len(order) // len(best))  # every kept channel is repeated equally often
        source[space] = (origin[:, None] * space.unit + torch.arange(space.unit)).flatten()
        dead[space] = source[space] != torch.arange(space.width)
    for name, parameter in teacher.named_parameters():
        for dim, channels in enumerate(coupling.axes[name]):
            if not channels:
                continue
            starts = [sum(space.width for space in channels[:i]) for i in range(len(channels))]
            unread = torch.cat([dead[space] for space in channels])
            scores[name].transpose(0, dim)[unread] = 0
            if dim == 0:
                parts = [source[space] + start for space, start in zip(channels, starts, strict=True)]
                parameter.data = parameter.data[torch.cat(parts)]
                if channels in queries and ".to_q." in name:
                    parameter.data[dead[channels[0]]] = 0
            else:
                parameter.data[:, unread] = 0
    # Frequencies 1 and 0.1 (0.01 at .75) exist in the narrow sinusoid too, so that the refit can be exact.
    weight, half = teacher.time_embedding.linear_1.weight.data, teacher.config.block_out_channels[0] // 2
    step = round(1 / (1 - ratio))
    heard = torch.tensor([0, step, half, half + step])
    weight[:, [column for column in range(2 * half) if column not in heard]] = 0
    return scores


def in_double(model):
    """A copy that computes in float64 with the same float32 values, so that rounding does not blur the comparison."""
    copy = UNet2DModel.from_config(model.config).double().eval()
    copy.load_state_dict(model.state_dict())
    return copy


@torch.no_grad()
def output(model):
    """Two samples at two timesteps, shape (2, C, H, W)."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    return model(x.to(model.dtype), torch.tensor([7, 400])).sample


def difference(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("name", VARIANTS)
def test_cutting_dead_channels_changes_nothing(name):
    config, ratio = VARIANTS[name]
    teacher = teacher_of(config)
    scores = make_redundant(teacher, ratio)
    student, report = prune_width(teacher, ratio, init="taylor", scores=scores)
    assert report.student.parameters < 0.6 * report.teacher.parameters
    assert report.refit_error < 1e-4
    assert difference(output(in_double(student)), output(in_double(teacher))) < 1e-5


@pytest.mark.parametrize("head_dim", [None, 4], ids=["single-head", "multi-head"])
@torch.no_grad()
def test_dead_channel_equality_notices_every_wrong_index(head_dim):
    """Wrong rows or columns in any one tensor, or a query scale off by sqrt(2), must move the output visibly."""
    teacher = teacher_of(unet_config((16, 32), {1}, attention_head_dim=head_dim, **TINY))
    student, report = prune_width(teacher, 0.5, init="taylor", scores=make_redundant(teacher, 0.5))
    student, expected = in_double(student), output(in_double(teacher))
    parameters = dict(student.named_parameters())
    for tensor in report.sliced + report.refitted:
        for dim in range(min(2, parameters[tensor].ndim)):
            if parameters[tensor].shape[dim] == 1:
                continue
            right = parameters[tensor].data
            parameters[tensor].data = right.roll(1, dim)
            moved = difference(output(student), expected)
            parameters[tensor].data = right
            if tensor.endswith("to_k.bias"):  # adds the same number to all logits of a query: softmax ignores it
                assert moved < 1e-5
            else:
                assert moved > 1e-3, (tensor, dim, moved)
    for tensor in (tensor for tensor in parameters if ".to_q." in tensor):
        parameters[tensor].data *= math.sqrt(2)
    assert difference(output(student), expected) > 1e-3


def test_every_group_norm_group_keeps_as_many_channels():
    teacher = teacher_of(SINGLE)
    first_is_best = {
        name: torch.arange(parameter.numel(), 0.0, -1).view_as(parameter)
        for name, parameter in teacher.named_parameters()
    }
    student, _ = prune_width(teacher, 0.5, init="taylor", scores=first_is_best)
    kept = [0, 1, 4, 5, 8, 9, 12, 13]  # the best half of each of 4 groups, not the best half of all 16
    assert torch.equal(student.conv_in.bias, teacher.conv_in.bias[kept])
    # These 32 channels are normalised only in front of 16 others: in groups of 12, whose boundaries are 12 and 24.
    kept = [*range(6), *range(12, 18), *range(24, 28)]
    student_conv, teacher_conv = (model.up_blocks[1].upsamplers[0].conv for model in (student, teacher))
    assert torch.equal(student_conv.bias, teacher_conv.bias[kept])


def attention_scores(teacher, name, **scores_by_layer):
    """Zero scores, but for the output channels of some layers of one attention."""
    scores = {key: torch.zeros_like(parameter) for key, parameter in teacher.named_parameters()}
    for layer, channels in scores_by_layer.items():
        scores[f"{name}.{layer}.bias"][list(channels)] = 1
    return scores


def test_a_single_head_chooses_values_apart_from_queries_and_rescales_the_queries():
    teacher, name = teacher_of(SINGLE), "down_blocks.1.attentions.0"
    queries, values = range(0, 32, 2), range(16)
    scores = attention_scores(teacher, name, to_q=list(queries)[:8], to_k=list(queries)[8:], to_v=values)
    student, _ = prune_width(teacher, 0.5, init="taylor", scores=scores)
    old, new = (model.get_submodule(name) for model in (teacher, student))
    torch.testing.assert_close(new.to_q.bias, old.to_q.bias[queries] * math.sqrt(0.5))
    assert torch.equal(new.to_k.bias, old.to_k.bias[queries])
    assert torch.equal(new.to_v.bias, old.to_v.bias[values])


def test_multi_head_attention_keeps_the_same_whole_heads():
    teacher, name = teacher_of(MULTI), "down_blocks.1.attentions.0"
    scores = attention_scores(teacher, name, to_q=[5, 6, 7], to_k=[16, 17, 18], to_v=[2, 28, 29])
    scores[f"{name}.to_out.0.weight"][0, [8, 9]] = 1  # heads 1, 4, 7 and 2 lead; head 0 has one good channel only
    student, _ = prune_width(teacher, 0.5, init="taylor", scores=scores)
    kept = [*range(4, 12), *range(16, 20), *range(28, 32)]
    old, new = (model.get_submodule(name) for model in (teacher, student))
    for layer in ("to_q", "to_k", "to_v"):
        assert torch.equal(getattr(new, layer).bias, getattr(old, layer).bias[kept])
    assert new.heads == 4


def millions(config):
    return round(model_size({**config, "sample_size": None}).parameters / 1e6, 2)  # no size: no MACs are counted


@pytest.mark.parametrize(
    ("config", "teacher_millions", "students"),
    [
        (CELEBA_64, 78.70, {0.5: 19.70, 0.7: 9.73, 0.9: 1.44}),
        (CELEBA_64 | {"time_embedding_dim": 512}, 78.70, {0.5: 19.70, 0.7: 9.38, 0.9: 1.34}),
        (HUB_256, 113.67, {0.3: 63.96, 0.5: 28.45, 0.7: 13.12}),
    ],
)
def test_parameter_counts_of_the_papers_models(config, teacher_millions, students):
    assert millions(config) == teacher_millions
    assert {ratio: millions(width_config(config, ratio)) for ratio in students} == students


@pytest.mark.parametrize(("ratio", "widths", "parameters"), [(0.8, (8, 12, 28), 121_997), (0.875, (4, 8, 16), 41_613)])
def test_parameter_counts_of_the_small_model(ratio, widths, parameters):
    teacher = UNet2DModel(**SMALL)
    student, report = prune_width(teacher, ratio, init="magnitude")
    assert report.teacher.parameters == 2_586_337
    assert report.student.shape == "-".join(map(str, widths))
    assert tuple(student.config.block_out_channels) == widths
    assert report.student.parameters == sum(p.numel() for p in student.parameters()) == parameters
    assert output(student).isfinite().all()


@pytest.mark.parametrize("config", [CIFAR, HUB_256], ids=["32", "256"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.9])
def test_the_hubs_ddpm_models_are_prunable(config, ratio):
    hub = config | {"_class_name": "UNet2DModel", "_diffusers_version": "0.1.1", "_name_or_path": "ddpm"}
    assert not [key for key in width_config(hub, ratio) if key.startswith("_")]
    narrow = tuple(width // 8 for width in config["block_out_channels"])  # the same topology, quick enough to run
    narrow = config | dict(block_out_channels=narrow, norm_num_groups=4, sample_size=2 ** len(narrow))
    student, report = prune_width(teacher_of(narrow), ratio, init="magnitude")
    assert output(student).isfinite().all()
    assert report.student.macs < report.teacher.macs
    assert len(report.sliced + report.copied + report.refitted) == len(student.state_dict())


def test_the_student_is_a_plain_trainable_model_that_the_stock_pipeline_samples(tmp_path):
    teacher = teacher_of(MULTI).half().eval().requires_grad_(False)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student, _ = prune_width(teacher, 0.5, init="magnitude")
    assert student.training
    assert all(p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" for p in student.parameters())
    output(student)
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    student.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, use_safetensors=True)
    assert type(loaded) is UNet2DModel
    assert torch.equal(output(loaded), output(student.eval()))
    pipeline = DDPMPipeline(unet=loaded, scheduler=DDPMScheduler(num_train_timesteps=10))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_the_three_starts_differ_and_leave_the_global_rng_alone():
    teacher = teacher_of(SINGLE)
    state = torch.get_rng_state()
    scores = {name: parameter.detach().abs().flip(0) for name, parameter in teacher.named_parameters()}
    students = [
        prune_width(teacher, 0.5, init="taylor", scores=scores)[0],
        prune_width(teacher, 0.5, init="magnitude")[0],
        *(prune_width(teacher, 0.5, init="random", seed=seed)[0] for seed in (0, 1)),
    ]
    again, report = prune_width(teacher, 0.5, init="random", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    outputs = [output(student) for student in students]
    assert all(difference(one, other) > 1e-3 for i, one in enumerate(outputs) for other in outputs[:i])
    assert torch.equal(output(again), outputs[-1])
    assert len(report.fresh) == len(again.state_dict())
    assert not report.sliced + report.copied + report.refitted + report.dropped


def test_magnitude_keeps_the_largest_channels():
    teacher = teacher_of(SINGLE)
    large = torch.tensor([2, 3, 4, 6, 9, 11, 13, 14])  # two in each group of four
    inner = teacher.down_blocks[0].resnets[0].conv1
    inner.weight.data[large] *= 10
    student, _ = prune_width(teacher, 0.5, init="magnitude")
    assert torch.equal(student.down_blocks[0].resnets[0].conv1.bias, inner.bias[large])


def squared_errors(teacher, count=2):
    for i in range(count):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(i))
        yield teacher(x.to(teacher.dtype), torch.tensor([5, 50 * i])).sample.square().mean()


def test_taylor_scores_are_weight_times_gradient_of_the_summed_losses():
    teacher = teacher_of(SINGLE, dropout=0.5).train().requires_grad_(False)
    teacher.conv_in.bias.requires_grad_(True).grad = torch.ones(16)
    teacher.mid_block.eval()
    with torch.no_grad():
        scores = taylor_scores(teacher, squared_errors(teacher))
    # restored: modes, flags and gradients
    assert teacher.training and teacher.up_blocks[0].training and not teacher.mid_block.resnets[0].training
    assert [name for name, p in teacher.named_parameters() if p.requires_grad] == ["conv_in.bias"]
    assert torch.equal(teacher.conv_in.bias.grad, torch.ones(16))
    assert all(p.grad is None for name, p in teacher.named_parameters() if name != "conv_in.bias")

    teacher.eval().requires_grad_(True)
    loss = sum(squared_errors(teacher))
    for (name, p), gradient in zip(
        teacher.named_parameters(), torch.autograd.grad(loss, list(teacher.parameters())), strict=True
    ):
        torch.testing.assert_close(scores[name], (p * gradient).abs().detach(), rtol=1e-3, atol=1e-6)
    teacher.double()
    with torch.no_grad():
        weight, losses = teacher.conv_out.weight, []
        for step in (1e-4, -2e-4):
            weight[0, 3, 1, 1] += step
            losses.append(sum(loss.item() for loss in squared_errors(teacher)))
        gradient = (losses[0] - losses[1]) / 2e-4
        weight[0, 3, 1, 1] += 1e-4
        expected = abs(weight[0, 3, 1, 1].item() * gradient)
    assert scores["conv_out.weight"][0, 3, 1, 1].item() == pytest.approx(expected, rel=1e-3)
    student, _ = prune_width(teacher, 0.5, init="taylor", scores=scores)
    assert student.dtype == torch.float32


def test_taylor_scores_refuse_bad_losses_and_still_restore_the_teacher():
    teacher = teacher_of(SINGLE).train().requires_grad_(False)

    def bad():
        yield from squared_errors(teacher, 1)
        yield torch.tensor(float("nan"), requires_grad=True)

    for losses in (bad(), [], [torch.tensor(1.0)], (loss * torch.ones(2) for loss in squared_errors(teacher))):
        with pytest.raises(ValueError, match="--student_init taylor"):
            taylor_scores(teacher, losses)
        assert teacher.training
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(("flip", "freq_shift"), [(True, 0), (False, 1)])
def test_the_refit_follows_the_teachers_time_embedding_with_moderate_weights(flip, freq_shift):
    config = SINGLE | dict(block_out_channels=(64, 64, 64), flip_sin_to_cos=flip, freq_shift=freq_shift)
    teacher = teacher_of(config)
    linear = teacher.time_embedding.linear_1
    linear.weight.data[:, :16] = linear.weight.data[:, 32:48] = 0  # leave the slow features, easy for any width
    student, report = prune_width(teacher, 0.5, init="magnitude")
    assert report.refitted == ("time_embedding.linear_1.weight", "time_embedding.linear_1.bias")
    assert student.time_embedding.linear_1.weight.abs().max() < 100
    assert report.refit_error < 0.02
    timesteps = torch.arange(1000)
    with torch.no_grad():
        old, new = (model.time_embedding.linear_1(model.time_proj(timesteps)) for model in (teacher, student))
    distance = torch.cdist(new.T, old.T).min(1).values / 1000**0.5  # each kept row has its teacher row
    assert distance.max() < 0.1

    fast = teacher_of(config | dict(block_out_channels=(16, 32, 32)))
    assert prune_width(fast, 0.5, init="magnitude")[1].refit_error > 0.2  # honest where features are missing


def test_a_shortcut_between_widths_that_became_equal_is_dropped_and_logged(caplog):
    config = unet_config((8, 16, 32), {1}, attention_head_dim=None, **(GREY | dict(norm_num_groups=8)))
    teacher = teacher_of(config)
    with caplog.at_level(logging.INFO, logger="utils.students.width"):
        student, report = prune_width(teacher, 0.6, init="magnitude")
    assert report.student.shape == "8-8-16"
    shortcut = "down_blocks.1.resnets.0.conv_shortcut"
    assert report.dropped == (f"{shortcut}.weight", f"{shortcut}.bias")
    assert shortcut in caplog.text and shortcut in report.table()
    assert student.down_blocks[1].resnets[0].conv_shortcut is None
    # The first width stayed, so the time features did, and their layer is copied, not refitted.
    assert report.refitted == () and report.refit_error is None
    assert {"time_embedding.linear_1.weight", "conv_out.bias", "conv_in.weight"} <= set(report.copied)
    assert torch.equal(student.time_embedding.linear_1.weight, teacher.time_embedding.linear_1.weight)
    assert output(student).isfinite().all()


def test_sizes_and_tables():
    teacher = UNet2DModel(**SMALL)
    _, report = prune_width(teacher, 0.8, init="magnitude")
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        teacher(torch.zeros(1, 1, 16, 16), 0)
    assert report.teacher.macs == counter.get_total_flops() // 2
    table = report.table()
    for text in ("32-64-128", "8-12-28", "2,586,337", "121,997", "4.72%", "0.8", "181 sliced", "2 refitted"):
        assert text in table
    assert "time_embedding.linear_1.weight" in table and table.isascii()
    alone = model_table(None, report.student)
    assert "121,997" in alone and "teacher" not in alone
    assert model_table(report.teacher, report.student) in table
    labelled = model_size(SMALL | dict(num_class_embeds=3, sample_size=(16, 32)))
    assert labelled.macs > report.teacher.macs and labelled.parameters == 2_586_337 + 3 * 128
    assert "unknown" in model_table(None, model_size(SMALL | dict(sample_size=None)))


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
def test_a_ratio_outside_0_and_1_is_refused(ratio):
    with pytest.raises(ValueError, match="--pruning_ratio must lie between 0 and 1"):
        width_config(SMALL, ratio)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(class_embed_type="timestep"), "class_embed_type"),
        (dict(num_class_embeds=10), "num_class_embeds"),
        (dict(time_embedding_type="fourier"), "time_embedding_type"),
        (dict(time_embedding_type="learned", num_train_timesteps=10), "time_embedding_type"),
        (dict(down_block_types=("KDownBlock2D",) * 3), "KDownBlock2D"),
        (dict(down_block_types=("DownBlock2D", "SkipDownBlock2D", "DownBlock2D")), "SkipDownBlock2D"),
        (dict(up_block_types=("SkipUpBlock2D",) * 3), "SkipUpBlock2D"),
        (dict(mid_block_type="UNetMidBlock2DCrossAttn"), "mid_block_type"),
        (dict(resnet_time_scale_shift="spatial"), "resnet_time_scale_shift"),
        (dict(downsample_type="pool"), "downsample_type"),
        (dict(upsample_type="pool"), "upsample_type"),
        (dict(norm_num_groups=None), "norm_num_groups"),
        (dict(block_out_channels=(30, 64, 128)), "teacher's block_out_channels .* norm_num_groups 4"),
        (dict(attention_head_dim=24), "teacher's widths with attention .* attention_head_dim 24"),
    ],
)
def test_unsupported_teachers_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        check_width_prunable(SMALL | changes)
    with pytest.raises(ValueError, match=message):
        width_config(SMALL | changes, 0.5)


@pytest.mark.parametrize(
    ("changes", "ratio", "message"),
    [
        (dict(attention_head_dim=8), 0.8, "attention_head_dim 8: heads are kept whole"),
        (dict(attn_norm_num_groups=8), 0.8, "attn_norm_num_groups 8"),
        (dict(freq_shift=2), 0.875, "no time frequency"),
        (dict(sample_size=4), 0.97, "one channel per group on a 1x1 map"),
        (dict(norm_num_groups=32, block_out_channels=(32, 64, 128)), 0.1, "cuts nothing"),
    ],
)
def test_ratios_that_leave_no_sound_student_are_refused(changes, ratio, message):
    check_width_prunable(SMALL | changes)
    with pytest.raises(ValueError, match=f"--pruning_ratio.*{message}|{message}.*--pruning_ratio"):
        width_config(SMALL | changes, ratio)


def test_an_unknown_start_and_scores_that_do_not_belong_to_it_are_refused():
    teacher = UNet2DModel(**SINGLE)
    scores = {name: parameter.detach().abs() for name, parameter in teacher.named_parameters()}
    for init, given in (("largest", None), ("taylor", None), ("magnitude", scores), ("random", scores)):
        with pytest.raises(ValueError, match="--student_init"):
            prune_width(teacher, 0.5, init=init, scores=given)
    for wrong in (torch.ones(3), None):
        broken = {name: score for name, score in (scores | {"conv_in.bias": wrong}).items() if score is not None}
        with pytest.raises(ValueError, match="conv_in.bias"):
            prune_width(teacher, 0.5, init="taylor", scores=broken)
