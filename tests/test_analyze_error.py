# SPDX-License-Identifier: Apache-2.0
"""The diagnosis: coarse and fine error, groups, corrected sampling, and the script on tiny models."""

import hashlib
import json
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import build_unet, save_images
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from test_html_report import Page
from torch import nn

import analyze_error
import utils.analysis.error
import utils.analysis.report
from utils.analysis.arguments import PROBES, for_backbone, parse_args
from utils.analysis.corrected import WHO, CorrectedDenoiser, probe_denoisers
from utils.analysis.error import (
    ErrorStatistics,
    group_map,
    group_sizes,
    least_squares_line,
    split_error,
    split_groups,
    summarize,
)
from utils.analysis.figures import coarse_fine_figure, error_maps_figure, line_figure
from utils.analysis.report import FIGURES, error_table, save_figures
from utils.analysis.takeaways import coarse_fine_takeaway, error_maps_takeaway, line_takeaway, samples_takeaway
from utils.backbones import choose_backbone
from utils.backbones.ddpm import DDPM
from utils.command_line import call
from utils.distillation.losses import place_loss
from utils.metrics.distances import frechet_distance
from utils.metrics.extractors import FeatureExtractor
from utils.metrics.statistics import FeatureStatistics
from utils.randomness import VALIDATION_STREAM, seed_from, shuffled

CLASSIFIER = Path(__file__).resolve().parent.parent / "assets" / "classifier"
SMALL = {
    "--num_images": 6,
    "--num_timesteps": 4,
    "--batch_size": 4,
    "--shown_samples": 3,
    "--num_inference_steps": 3,
    "--num_cpu_threads": 1,
}


def predictions(shape=(5, 3, 6, 7), scale=1.0, offset=0.0, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 student and teacher, correlated and not equal."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator)
    teacher = 0.7 * student + 0.5 * torch.randn(shape, generator=generator) + 0.3
    return student * scale + offset, teacher * scale + offset


def affine_image(unet: UNet2DModel, scale=(0.6,), shift=(0.2,)) -> UNet2DModel:
    """A U-Net that predicts scale * (what `unet` predicts) + shift, channel by channel."""
    other = UNet2DModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict())
    scale, shift = torch.tensor(scale), torch.tensor(shift)
    with torch.no_grad():
        other.conv_out.weight.mul_(scale.view(-1, 1, 1, 1))
        other.conv_out.bias.mul_(scale).add_(shift)
    return other


@pytest.fixture
def save(tmp_path):
    """`save(unet)` saves a student and returns its folder."""

    def save_unet(unet: UNet2DModel, name: str = "saved") -> str:
        unet.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save_unet


@pytest.fixture
def flags(teacher_dir, data_dir):
    """`flags(student, "--flag", value)`: a small analysis; flags named in the call win."""

    def make_flags(student, *changes) -> list[str]:
        given = {"--pretrained_model_name_or_path": teacher_dir, "--dataset_name": data_dir, **SMALL}
        if student is not None:
            given["--student_model_name_or_path"] = student
        return [str(word) for pair in given.items() for word in pair] + [str(word) for word in changes]

    return make_flags


@pytest.fixture
def analyze(request, run, flags, monkeypatch):
    """`analyze(student, "--flag", value, output="name")` runs the script and returns analysis.json and its folder.

    Its figures, most of its time, are files of what they show where a test does not ask for `ornaments`."""

    def save_contents(_analysis, maps, samples, folder):
        for name in FIGURES:
            shown = {who: images.numpy() for who, images in samples.items()}
            (folder / name).write_bytes(pickle.dumps((maps, shown)))

    if "ornaments" not in request.fixturenames:
        monkeypatch.setattr(analyze_error, "save_figures", save_contents)

    def run_analysis(student, *changes, output="analysis") -> tuple[dict, Path]:
        folder = run("analyze_error", *flags(student, *changes), output=output, defaults=False)
        return json.loads((folder / "analysis.json").read_text()), folder

    return run_analysis


# The split


@pytest.mark.parametrize("scale, offset", [(1, 0), (1e-4, 0), (1e3, 0), (1, 50)])
@pytest.mark.parametrize("group_size", [2, 5, 16, 42])
def test_coarse_and_fine_add_up(scale, offset, group_size):
    """Pythagoras on every single line, by channel and by group; small scales show an eps, large ones float32."""
    student, teacher = predictions(scale=scale, offset=offset)
    for split in (split_error(student.flatten(2), teacher.flatten(2)), split_groups(student, teacher, group_size)):
        assert split.total.dtype == torch.float64
        assert torch.allclose(split.coarse + split.fine, split.total, rtol=1e-6, atol=0)
        assert (split.coarse >= 0).all() and (split.fine >= 0).all()


def numpy_line(student: np.ndarray, teacher: np.ndarray) -> tuple:
    """(slope, intercept, total, coarse, fine) of one line by numpy's least squares; coarse from the fitted values."""
    basis = np.stack([student, np.ones_like(student)], axis=1)
    (slope, intercept), *_ = np.linalg.lstsq(basis, teacher, rcond=None)
    fitted = basis @ (slope, intercept)
    return slope, intercept, *(np.mean(d**2) for d in (student - teacher, student - fitted, fitted - teacher))


@pytest.mark.parametrize("group_size", [2, 5, 16, 42])
def test_lines_are_numpys_least_squares(group_size):
    student, teacher = predictions()
    by_channel, by_group = (
        split_error(student.flatten(2), teacher.flatten(2)),
        split_groups(student, teacher, group_size),
    )
    groups = 42 // group_size
    assert by_group.slope.shape == (5, 3, groups)
    for b in range(5):
        for c in range(3):
            s, t = (pred[b, c].flatten().double().numpy() for pred in (student, teacher))
            assert np.allclose([entry[b, c] for entry in by_channel], numpy_line(s, t), rtol=1e-9)
            order = np.argsort(np.abs(t - s), kind="stable")
            for g in range(groups):
                own = order[g * group_size :] if g == groups - 1 else order[g * group_size : (g + 1) * group_size]
                found = [entry[b, c, g] for entry in by_group]
                # two elements: nothing is left, where rounding is all that a relative tolerance could compare
                assert np.allclose(found, numpy_line(s[own], t[own]), rtol=1e-6, atol=1e-18)


def test_groups_are_those_of_the_place_loss():
    student, teacher = predictions(shape=(4, 2, 8, 8))
    for group_size in (2, 16, 20, 64):
        loss = place_loss(student.double(), teacher.double(), group_size=group_size, eps=0)
        split = split_groups(student, teacher, group_size)
        assert torch.allclose(split.slope, loss.slope, rtol=1e-6, atol=1e-9)
        assert torch.allclose(split.intercept, loss.intercept, rtol=1e-6, atol=1e-9)
        sizes = torch.tensor(group_sizes(64, group_size)).double()
        assert torch.allclose((split.fine * sizes).sum(-1).mean() / 64, loss.fine)


def test_a_constant_student_is_corrected_in_its_mean_alone():
    student, teacher = torch.full((2, 1, 10), 0.1), predictions((2, 1, 10))[1]
    slope, intercept = least_squares_line(student, teacher)
    assert torch.equal(slope, torch.ones(2, 1))
    assert torch.allclose(intercept, (teacher - student).mean(-1))
    split = split_error(student, teacher)
    assert torch.allclose(split.coarse, (teacher.double().mean(-1) - student.double().mean(-1)).square())
    assert torch.allclose(split.fine, teacher.double().var(-1, correction=0))


def test_an_error_that_knows_nothing_of_the_student_has_the_chance_share():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn((400, 1, 8, 8), generator=generator)
    statistics = ErrorStatistics(group_size=20)
    statistics.update(student, student + 0.1 * torch.randn(student.shape, generator=generator))
    analysis = summarize([statistics], [0])
    chance = analysis["chance"]
    assert chance == {"coarse_share": 2 / 64, "groups": {"coarse_share": 2 * 3 / 64}}
    assert analysis["mean"]["coarse_share"] == pytest.approx(chance["coarse_share"], rel=0.1)
    ranks = analysis["mean"]["groups"]["ranks"]
    shares = np.array(ranks["coarse"]) / np.array(ranks["total"])
    assert np.allclose(shares, [2 / 20, 2 / 20, 2 / 24], rtol=0.2)


# Groups


@pytest.mark.parametrize("group_size, groups", [(2, 21), (5, 8), (16, 2), (41, 1), (42, 1)])
def test_errors_grow_with_the_rank(group_size, groups):
    student, teacher = predictions()
    ranks, error = group_map(student, teacher, group_size), (teacher - student).abs()
    assert ranks.shape == student.shape and ranks.dtype == torch.int64
    split = split_groups(student, teacher, group_size)
    for b in range(5):
        for c in range(3):
            own = [error[b, c][ranks[b, c] == g] for g in range(groups)]
            assert [len(group) for group in own] == group_sizes(42, group_size)
            assert all(lower.max() <= upper.min() for lower, upper in zip(own, own[1:], strict=False))
            totals = [group.double().square().mean().item() for group in own]
            assert split.total[b, c].tolist() == pytest.approx(totals, rel=1e-5)


@pytest.mark.parametrize("group_size, fits", [(2, 1), (5, 2), (41, 1), (42, 1)])
def test_groups_are_fitted_together(monkeypatch, group_size, fits):
    """All but the last at once: a line at a time is slow."""
    calls, fit = [], utils.analysis.error.split_error
    monkeypatch.setattr(utils.analysis.error, "split_error", lambda *preds: calls.append(preds) or fit(*preds))
    split_groups(*predictions(), group_size)
    assert len(calls) == fits


def test_one_group_is_a_constant_map():
    student, teacher = predictions()
    assert torch.equal(group_map(student, teacher, 42), torch.zeros(5, 3, 6, 7, dtype=torch.int64))
    whole, channel = split_groups(student, teacher, 42), split_error(student.flatten(2), teacher.flatten(2))
    for ours, theirs in zip(whole, channel, strict=True):
        assert torch.allclose(ours.squeeze(-1), theirs)


@pytest.mark.parametrize("group_size", [0, 1, 43])
def test_groups_that_cannot_be(group_size):
    for function in (group_map, split_groups):
        with pytest.raises(ValueError, match="from 2 to 42"):
            function(*predictions(), group_size)


# Statistics


def test_batches_add_up_to_the_whole():
    student, teacher = predictions()
    whole, parts = ErrorStatistics(16), ErrorStatistics(16)
    whole.update(student, teacher)
    for rows in ([0, 1], [2, 3], [4]):
        parts.update(student[rows], teacher[rows])
    assert _close(whole.summary(), parts.summary())
    expected = (teacher - student).double().abs()
    for statistics in (whole, parts):
        assert torch.allclose(statistics.error_map(), expected.mean((0, 1)), rtol=1e-6)
        assert torch.allclose(statistics.first_error, expected[0], rtol=1e-6)
        assert torch.equal(statistics.first_ranks, group_map(student, teacher, 16)[0, 0])


def test_channels_are_kept_apart():
    student, teacher = predictions()
    teacher[:, 1] = 2 * student[:, 1] + 1
    teacher[:, 2] = student[:, 2]
    statistics = ErrorStatistics(16)
    statistics.update(student, teacher)
    first, second, third = statistics.summary()["channels"]
    assert 0 < first["coarse_share"] < 1
    assert second["coarse_share"] == pytest.approx(1)
    assert second["slope"]["median"] == pytest.approx(2) and second["intercept"]["q75"] == pytest.approx(1)
    assert third["total"] == 0 and third["coarse_share"] is None


def test_the_spread_of_a_ranks_lines():
    statistics, (student, teacher) = ErrorStatistics(20), predictions()
    statistics.update(student[:3], teacher[:3])
    statistics.update(student[3:], teacher[3:])
    lines, ranks = split_groups(student, teacher, 20), statistics.summary()["groups"]["ranks"]
    for name in ("slope", "intercept"):
        values = getattr(lines, name).flatten(0, 1).numpy()  # (15, 2)
        assert ranks[name]["mean"] == pytest.approx(values.mean(0), rel=1e-5)
        assert ranks[name]["std"] == pytest.approx(values.std(0), rel=1e-5)
        for key, quantile in (("q25", 0.25), ("median", 0.5), ("q75", 0.75)):
            assert ranks[name][key] == pytest.approx(np.quantile(values, quantile, axis=0), rel=1e-5)


def test_predictions_that_are_not_finite():
    student, teacher = predictions()
    student[3, 1, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="--student_model_name_or_path: the student predicts NaN"):
        ErrorStatistics(16).update(student, teacher)
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path: the teacher predicts NaN"):
        ErrorStatistics(16).update(teacher, student)


def test_noise_is_a_function_of_seed_and_index():
    whole = analyze_error.image_noise((5, 1, 8, 8), seed=3, first=0)
    assert torch.equal(analyze_error.image_noise((3, 1, 8, 8), seed=3, first=2), whole[2:])
    assert len({image.sum().item() for image in whole}) == 5
    assert not torch.equal(analyze_error.image_noise((5, 1, 8, 8), seed=4, first=0), whole)
    drawn = [analyze_error.EncodeRandom(3, first, "cpu").normal((5 - first, 4, 8, 8)) for first in (0, 2)]
    assert torch.equal(drawn[0][2:], drawn[1]) and not torch.equal(drawn[0][:, :1], whole)


def test_timesteps_are_midpoints_of_the_schedule():
    assert analyze_error.spread_places(4, 1000) == [125, 375, 625, 875]
    assert analyze_error.spread_places(1, 1000) == [500]
    assert analyze_error.spread_places(1000, 1000) == list(range(1000))


# Corrected sampling


def test_a_line_for_every_sample_and_channel():
    teacher = build_unet(in_channels=3, out_channels=3).eval()
    student = affine_image(teacher, scale=(0.5, -2.0, 1.5), shift=(0.3, 0.0, -1.0)).eval()
    x_t = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([3, 400, 700, 999])
    corrected = CorrectedDenoiser(student, teacher)
    with torch.no_grad():
        target, found = teacher(x_t, timestep).sample, corrected(x_t, timestep).sample
        assert torch.allclose(found, target, atol=1e-5)
        assert not torch.allclose(student(x_t, timestep).sample, target, atol=0.1)
        assert torch.equal(corrected(x_t, timestep, return_dict=False)[0], found)


class Plain(nn.Module):
    """A denoiser that predicts `values`, whatever it sees."""

    config, dtype, device = None, torch.float32, torch.device("cpu")

    def __init__(self, values: torch.Tensor):
        super().__init__()
        self.values = values

    def forward(self, *_, **__):
        return UNet2DOutput(self.values)


def test_lines_of_sampling_are_fitted_in_float64():
    """Far from 0, float32 sums of squares know nothing of a spread; the moved prediction has the student's dtype."""
    student = (1000 + 1e-2 * torch.randn((2, 1, 64, 64), generator=torch.Generator().manual_seed(0))).float()
    teacher = 2 * student - 1500
    found = CorrectedDenoiser(Plain(student), Plain(teacher))(torch.zeros(1)).sample
    line = [
        value.double().view(2, 1, 1, 1)
        for value in least_squares_line(student.double().flatten(2), teacher.double().flatten(2))
    ]
    assert torch.equal(found, (line[1] + line[0] * student.double()).float())
    assert CorrectedDenoiser(Plain(student.bfloat16()), Plain(teacher))(torch.zeros(1)).sample.dtype == torch.bfloat16


def sampled(args, student: UNet2DModel) -> dict[str, torch.Tensor]:
    backbone = choose_backbone(args).load(for_backbone(args))
    denoisers = probe_denoisers(args.probe, student.eval(), backbone.teacher)
    return {who: backbone.sample(denoiser, range(4), 10).int() for who, denoiser in denoisers.items()}


@pytest.mark.parametrize("probe", PROBES)
def test_correcting_an_affine_student_recovers_the_teachers_samples(tmp_path, flags, save, teacher_dir, probe):
    teacher = UNet2DModel.from_pretrained(teacher_dir, subfolder="unet")
    args = parse_args("", [*flags(save(teacher), "--probe", probe), "--output_dir", str(tmp_path / "out")])
    images = sampled(args, affine_image(teacher))
    assert (images["student"] - images["teacher"]).abs().float().mean() > 10
    assert (images["corrected"] - images["teacher"]).abs().max() <= 1
    assert images["teacher"].float().std() > 10


@torch.no_grad()
def test_lines_along_the_teachers_trajectory_by_the_definition(tmp_path, flags, save):
    """The authors' DDPM probe as a plain DDIM loop: two paths from one noise, lines of the one used on the other,
    for every batch anew."""
    student = build_unet(seed=1).eval()
    argv = [*flags(save(student), "--probe", "teacher_trajectory"), "--output_dir", str(tmp_path / "out")]
    backbone = choose_backbone(parse_args("", argv)).load(for_backbone(parse_args("", argv)))
    denoisers, scheduler = probe_denoisers("teacher_trajectory", student, backbone.teacher), backbone.process.sampler()
    scheduler.set_timesteps(4)
    for seeds in ([0, 1], [2, 3]):
        images = {who: backbone.sample(denoiser, seeds, 4) for who, denoiser in denoisers.items()}
        noise = torch.cat([torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        teachers = students = noise
        for t in scheduler.timesteps:
            predicted, target = student(teachers, t).sample.double(), backbone.teacher(teachers, t).sample
            moved = student(students, t).sample.double()
            for i in range(2):
                slope, intercept = np.polyfit(predicted[i].flatten().numpy(), target[i].flatten().numpy(), 1)
                moved[i] = slope * moved[i] + intercept
            teachers = scheduler.step(target, t, teachers).prev_sample
            students = scheduler.step(moved.float(), t, students).prev_sample
        for who, path in (("teacher", teachers), ("corrected", students)):
            assert (images[who].int() - ((path.clamp(-1, 1) + 1) * 127.5).round().int()).abs().max() <= 1, who
    other = sampled(parse_args("", [*argv, "--probe", "student_input"]), student)
    assert not torch.equal(other["corrected"][2:], images["corrected"].int())


def test_the_pictures_are_the_samples_of_the_seeds(tmp_path, flags, save, teacher_dir):
    folder = save(affine_image(UNet2DModel.from_pretrained(teacher_dir, subfolder="unet")))
    args = parse_args("", [*flags(folder, "--batch_size", 2), "--output_dir", str(tmp_path / "out")])
    backbone, student = choose_backbone(args).load(for_backbone(args)), UNet2DModel.from_pretrained(folder)
    numbers, shown = analyze_error.measure_samples(args, backbone, student, None, None, None)
    seeds = [seed_from(0, VALIDATION_STREAM, i) for i in range(3)]
    denoisers = {"student": student, "corrected": CorrectedDenoiser(student, backbone.teacher)}
    drawn = {}
    for who, denoiser in {**denoisers, "teacher": backbone.teacher}.items():
        drawn[who] = torch.cat([backbone.sample(denoiser, part, 3) for part in (seeds[:2], seeds[2:])]).int()
        assert torch.equal(shown[who].int(), drawn[who])
        gap = (drawn[who] - backbone.sample(backbone.teacher, seeds, 3).int()).abs().double().mean().item()
        assert numbers["pixel_difference_to_teacher"][who] == pytest.approx(gap, abs=0.02)
    assert tuple(shown) == tuple(numbers["pixel_difference_to_teacher"]) == WHO
    args.probe = "teacher_trajectory"
    others, pictures = analyze_error.measure_samples(args, backbone, student, None, None, None)
    assert numbers["probe"] == "student_input" and others["probe"] == args.probe and tuple(pictures) == WHO
    assert all(torch.equal(pictures[who], shown[who]) for who in ("student", "teacher"))


def test_correcting_another_student_does_not(tmp_path, flags, save):
    student = build_unet(seed=1)
    args = parse_args("", [*flags(save(student)), "--output_dir", str(tmp_path / "out")])
    images = sampled(args, student)
    assert (images["corrected"] - images["teacher"]).abs().max() > 20
    assert not torch.equal(images["corrected"], images["student"])


# The script


def test_a_run_on_a_trained_student(run, analyze, ornaments, data_dir):
    """Everything is written, the numbers agree with each other, and the distance is the training script's own."""
    student = run(
        "train_place",
        *("--max_train_steps", 2, "--validation_steps", 2, "--validation_feature_extractor", CLASSIFIER),
        *("--validation_num_samples", 8, "--validation_batch_size", 8, "--validation_num_inference_steps", 3),
    )
    analysis, folder = analyze(
        student,
        *("--feature_extractor", CLASSIFIER, "--num_samples", 8, "--batch_size", 8, "--group_size", 20),
    )
    assert {path.name for path in folder.iterdir()} == {"analysis.json", "error_maps.npz", *FIGURES}
    assert "Where the error lies" in Page(student / "report.html").text  # that of a training run, which says more
    for name in FIGURES:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
            assert name == "samples.png" or picture.info["dpi"][0] > 150  # that one is drawn pixel by pixel
            assert np.asarray(picture.convert("L")).std() > 10

    rows, mean = analysis["places"], analysis["mean"]
    assert [row["place"] for row in rows] == [125, 375, 625, 875]
    for row in (*rows, mean):
        assert row["coarse"] + row["fine"] == pytest.approx(row["total"], rel=1e-9)
        assert row["coarse_share"] == pytest.approx(row["coarse"] / row["total"])
        groups, ranks = row["groups"], row["groups"]["ranks"]
        assert groups["coarse"] + groups["fine"] == pytest.approx(groups["total"], rel=1e-9)
        assert groups["total"] == pytest.approx(row["total"], rel=1e-5)  # grouped or not, it is the same error
        assert groups["fine"] < row["fine"]
        assert ranks["total"] == sorted(ranks["total"]) and len(ranks["total"]) == 3
        for part in ("total", "coarse", "fine"):
            weighted = np.dot(ranks[part], [20, 20, 24]) / 64
            assert groups[part] == pytest.approx(weighted)
    for row in rows:
        assert row["groups"]["ranks"]["elements"] == [20, 20, 24]
        assert row["slope"]["q25"] <= row["slope"]["median"] <= row["slope"]["q75"]
        assert row["channels"][0]["fine"] == pytest.approx(row["fine"])  # there is one
    assert mean["total"] == pytest.approx(np.mean([row["total"] for row in rows]))
    assert mean["groups"]["ranks"]["fine"][2] == pytest.approx(
        np.mean([row["groups"]["ranks"]["fine"][2] for row in rows])
    )

    samples, protocol = analysis["samples"], analysis["protocol"]
    trained = json.loads((student / "best" / "distance.json").read_text())["frechet_distance"]
    # this run measures to split train, as the training script's default does
    assert samples["frechet_distance"]["student"] == pytest.approx(trained, rel=1e-6)
    assert samples["num_samples"] == 8 and samples["num_real_images"] == 24
    assert "8 samples in 64 feature dimensions" in samples["warning"]
    assert samples["pixel_difference_to_teacher"]["teacher"] == 0 < samples["pixel_difference_to_teacher"]["student"]
    assert protocol["arguments"]["dataset_name"] == data_dir and protocol["num_rows"] == 24
    assert (protocol["num_places"], protocol["place_name"]) == (1000, "timestep")
    assert torch.__version__.startswith(protocol["versions"]["torch"]) and protocol["data_fingerprint"]
    assert samples["extractor"]["sha256"]["model.safetensors"]

    with np.load(folder / "error_maps.npz", allow_pickle=False) as maps:
        assert maps["place"].tolist() == [125, 375, 625, 875]
        assert all(maps[name].shape == (4, 1, 8, 8) for name in ("image", "image_error"))
        assert all(maps[name].shape == (4, 8, 8) for name in ("group_rank", "mean_error"))
        for t, row in enumerate(rows):
            assert np.square(maps["mean_error"][t]).mean() <= row["total"]  # the square of a mean
            order = np.argsort(maps["image_error"][t].ravel(), kind="stable")
            assert maps["group_rank"][t].ravel()[order].tolist() == [0] * 20 + [1] * 20 + [2] * 24


def test_the_numbers_are_those_of_a_plain_loop(analyze, save, teacher_dir, data_dir):
    """Here in one batch, in the script in two: the noise of an image does not depend on it."""
    folder = save(build_unet(seed=1, block_out_channels=(8, 16)))
    analysis, _ = analyze(folder, "--split", "test", "--seed", 5)

    rows = datasets.load_dataset(data_dir, split="test")
    chosen = [rows[int(row)]["image"] for row in shuffled(5, 0, len(rows))[:6]]
    clean = torch.stack([torch.from_numpy(np.array(image)) for image in chosen])[:, None].float() / 127.5 - 1
    noise = analyze_error.image_noise(clean.shape, seed=5, first=0)
    teacher = UNet2DModel.from_pretrained(teacher_dir, subfolder="unet")
    student, scheduler = UNet2DModel.from_pretrained(folder), DDPMScheduler()
    for row in analysis["places"]:
        t = torch.full((6,), row["place"])
        x_t = scheduler.add_noise(clean, noise, t)
        with torch.no_grad():
            predicted = [model(x_t, t).sample.double().flatten(1).numpy() for model in (student, teacher)]
        lines = np.array([numpy_line(s, t) for s, t in zip(*predicted, strict=True)])  # (6, 5)
        assert [row[part] for part in ("total", "coarse", "fine")] == pytest.approx(lines[:, 2:].mean(0), rel=1e-4)
        for name, values in (("slope", lines[:, 0]), ("intercept", lines[:, 1])):
            expected = {"mean": values.mean(), "std": values.std()}
            expected |= dict(zip(("q25", "median", "q75"), np.quantile(values, (0.25, 0.5, 0.75)), strict=True))
            assert row[name] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        groups = [np.argsort(np.abs(t - s), kind="stable").reshape(4, 16) for s, t in zip(*predicted, strict=True)]
        by_rank = np.array(
            [[numpy_line(s[own], t[own]) for own in g] for s, t, g in zip(*predicted, groups, strict=True)]
        )  # (6, 4, 5)
        for i, part in enumerate(("total", "coarse", "fine"), start=2):
            assert row["groups"]["ranks"][part] == pytest.approx(by_rank[..., i].mean(0), rel=1e-3)


def test_the_distance_of_corrected_samples(analyze, save, teacher_dir, data_dir, flags):
    """Corrected, an affine student is as good as its teacher; and the teacher's distance computed anew."""
    folder = save(affine_image(UNet2DModel.from_pretrained(teacher_dir, subfolder="unet")))
    extra = ("--feature_extractor", CLASSIFIER, "--num_samples", 12, "--split", "test")
    analysis, output = analyze(folder, *extra)
    distances, gaps = (analysis["samples"][k] for k in ("frechet_distance", "pixel_difference_to_teacher"))
    assert analysis["mean"]["coarse_share"] == pytest.approx(1, abs=1e-6)
    assert all(row["slope"]["std"] < 1e-4 for row in analysis["places"])
    assert analysis["mean"]["fine"] < 1e-10
    assert distances["corrected"] == pytest.approx(distances["teacher"], rel=0.02)
    assert distances["student"] != pytest.approx(distances["teacher"], rel=0.1)
    assert gaps["corrected"] < 0.1 < 10 < gaps["student"]
    assert all(row["slope"]["median"] == pytest.approx(1 / 0.6, rel=1e-4) for row in analysis["places"])

    args = parse_args("", [*flags(folder), "--output_dir", str(output / "unused")])
    backbone, extractor = choose_backbone(args).load(for_backbone(args)), FeatureExtractor(str(CLASSIFIER))
    real, drawn = FeatureStatistics(), FeatureStatistics()
    seeds = [seed_from(0, VALIDATION_STREAM, i) for i in range(12)]
    for first in range(0, 12, 4):
        drawn.update(extractor(backbone.sample(backbone.teacher, seeds[first : first + 4], 3)))
    images = [np.array(row["image"]) for row in datasets.load_dataset(data_dir, split="test")]
    real.update(extractor(torch.from_numpy(np.stack(images))[:, None]))
    assert distances["teacher"] == pytest.approx(
        frechet_distance(real.mean, real.cov, drawn.mean, drawn.cov), rel=1e-4
    )


@pytest.mark.slow
def test_a_perfect_student_has_no_shares(analyze, ornaments, teacher_dir):
    analysis, folder = analyze(teacher_dir)
    assert analysis["mean"]["total"] == 0 and analysis["mean"]["coarse_share"] is None
    assert set(analysis["samples"]["pixel_difference_to_teacher"].values()) == {0.0}
    assert (folder / "coarse_fine.png").exists()


def test_three_channels(analyze, save, tmp_path):
    colour = {"in_channels": 3, "out_channels": 3}
    DDPMPipeline(build_unet(**colour), DDPMScheduler()).save_pretrained(tmp_path / "teacher3")
    data = save_images(tmp_path / "data3", mode="RGB")
    extra = ("--pretrained_model_name_or_path", tmp_path / "teacher3", "--dataset_name", data, "--group_size", 64)
    analysis, folder = analyze(save(build_unet(seed=1, **colour)), *extra)
    for row in analysis["places"]:
        assert len({channel["total"] for channel in row["channels"]}) == 3
        for part in ("total", "coarse", "fine"):
            assert row[part] == pytest.approx(np.mean([channel[part] for channel in row["channels"]]))
            assert row[part] == pytest.approx(row["groups"][part])  # a group is a whole channel
    with np.load(folder / "error_maps.npz", allow_pickle=False) as maps:
        assert not maps["group_rank"].any()


def test_a_run_follows_from_its_seed_and_replaces_only_its_own_files(analyze, save):
    folder = save(build_unet(seed=1))
    first, output = analyze(folder)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ValueError, match="--output_dir .* is not empty"):
        analyze(folder, "--seed", 1)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before

    (output / "notes.txt").write_text("mine")
    again, _ = analyze(folder, "--overwrite_output_dir")  # with another global random state
    assert {name: again[name] for name in again if name != "protocol"} == {
        n: first[n] for n in first if n != "protocol"
    }
    changed = {name for name in before if (output / name).read_bytes() != before[name]}
    assert changed <= {"analysis.json"}
    other, _ = analyze(folder, "--overwrite_output_dir", "--seed", 1)
    assert other["places"] != first["places"] and other["samples"] != first["samples"]
    assert (output / "notes.txt").read_text() == "mine"


def _close(ours, theirs, rel=1e-9) -> bool:
    """Equal in structure, and in numbers to a relative (and 1e-9 absolute) tolerance."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_close(ours[k], theirs[k], rel) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(_close(a, b, rel) for a, b in zip(ours, theirs, strict=True))
    return ours == pytest.approx(theirs, rel=rel, abs=1e-9)


def test_what_fails_while_sampling_leaves_the_error(analyze, save, tmp_path, monkeypatch):
    folder = save(build_unet(seed=1))
    _, output = analyze(folder)
    with monkeypatch.context() as patch:
        patch.setattr(DDPM, "sample", lambda *_: (_ for _ in ()).throw(FloatingPointError("a sample holds NaN")))
        with pytest.raises(ValueError, match=r"Sampling \(student\) after 0 samples: a sample holds NaN"):
            analyze(folder, "--overwrite_output_dir", "--num_timesteps", 2)
    left = json.loads((output / "analysis.json").read_text())
    assert [row["place"] for row in left["places"]] == [250, 750] and "samples" not in left
    names = {path.name for path in output.iterdir()} - {".lock"}  # this process lives on
    assert names == {"analysis.json", "error_maps.npz"}  # no older figures
    with np.load(output / "error_maps.npz") as maps:
        assert maps["place"].tolist() == left["error_maps"]["places"] == [250, 750]


def test_the_file_is_compact_and_says_how_it_was_made(analyze, save, teacher_dir):
    folder = save(build_unet(seed=1))
    analysis, output = analyze(folder, "--group_size", 2)
    text = (output / "analysis.json").read_text()
    assert len(analysis["places"][0]["groups"]["ranks"]["fine"]) == 32
    assert max(line.count(",") for line in text.splitlines()) >= 31 and len(text.splitlines()) < 400
    protocol = analysis["protocol"]
    assert protocol["sampler"] == {"name": "DDIM, eta 0", "steps": 3}
    assert protocol["resolution"] == 8 and "num_prompts" not in analysis["samples"]
    name = "diffusion_pytorch_model.safetensors"
    for key, path, stored in (("teacher", teacher_dir, f"unet/{name}"), ("student", folder, name)):
        digest = hashlib.sha256((Path(path) / stored).read_bytes()).hexdigest()
        assert protocol[f"{key}_sha256"] == {stored: digest}


def test_flags_without_effect_are_warned_of(flags, tmp_path):
    other = ("--inception_path", "inception", "--num_samples", 9, "--dataset_config_name", "one")
    argv = [*flags("student", *other), "--dataset_name", "", "--train_data_dir", "images"]
    with pytest.warns(UserWarning) as caught:
        parse_args("", [*argv, "--output_dir", str(tmp_path / "out")])
    named = ("inception_path", "num_samples", "dataset_config_name")
    said = [str(warning.message).split(":")[0] for warning in caught]
    assert said == [f"--{name} has no effect here" for name in named]


# Figures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by file name; the files themselves are small."""
    saved, save_figure = {}, Figure.savefig

    def save_small(figure, path):
        saved[Path(path).name] = figure
        save_figure(figure, path, dpi=20)

    monkeypatch.setattr(Figure, "savefig", save_small)
    return saved


def texts(figure: Figure) -> str:
    """All that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def protocol_of(group_size: int, place_name: str = "timestep") -> dict:
    sampler = {"name": "DDIM, eta 0", "steps": 25}
    return {"num_places": 1000, "place_name": place_name, "group_size": group_size, "sampler": sampler}


def analysis_of(student, teacher, timesteps: int, group_size: int = 16, place_name: str = "timestep") -> dict:
    statistics = []
    for t in range(timesteps):
        statistics.append(ErrorStatistics(group_size))
        statistics[t].update(student * (1 + t / 100), teacher)
    return {
        "protocol": protocol_of(group_size, place_name),
        **summarize(statistics, analyze_error.spread_places(timesteps, 1000)),
    }


def test_channels_in_the_line_figure(figures, tmp_path):
    for channels, lines, words in ((1, 1, "quartiles of images"), (3, 3, "channel 2: median"), (5, 1, "and channels")):
        analysis = analysis_of(*predictions((4, channels, 6, 7)), timesteps=3)
        line_figure(analysis, tmp_path / "line.png")
        for axes, name in zip(figures["line.png"].axes, ("slope", "intercept"), strict=True):
            drawn = axes.lines[1:]  # after that of a perfect student
            assert len(drawn) == len(axes.collections) == lines and len({line.get_color() for line in drawn}) == lines
            of = [row["channels"][0] if lines > 1 else row for row in analysis["places"]]
            assert drawn[0].get_ydata() == pytest.approx([row[name]["median"] for row in of])
        assert words in texts(figures["line.png"])


def test_one_timestep_can_be_seen(figures, tmp_path):
    analysis = analysis_of(*predictions(), timesteps=1)
    coarse_fine_figure(analysis, tmp_path / "coarse_fine.png")
    assert all(line.get_marker() not in ("", "None", None) for line in figures["coarse_fine.png"].axes[0].lines)
    line_figure(analysis, tmp_path / "line.png")
    slope = analysis["places"][0]["channels"][0]["slope"]
    bar = figures["line.png"].axes[0].collections[0].get_segments()[0]
    assert bar[:, 1] == pytest.approx([slope["q25"], slope["q75"]])


@pytest.mark.parametrize("timesteps", [7, 60])
def test_many_timesteps_and_groups(figures, tmp_path, timesteps):
    """Stretches without gaps, one shape each for the coarse and the fine part, and no markers on top of each other."""
    analysis = analysis_of(*predictions((1, 1, 16, 16)), timesteps=timesteps, group_size=2)
    coarse_fine_figure(analysis, tmp_path / "coarse_fine.png")
    size, share, group = figures["coarse_fine.png"].axes
    assert {line.get_marker() for line in size.lines[1:]} == ({""} if timesteps > 40 else {"o", "s"})
    assert [len(axes.patches) for axes in (share, group)] == [3, 2]
    fine, coarse = (patch.get_data() for patch in share.patches[:2])
    assert fine.edges == pytest.approx(np.linspace(0, 1000, timesteps + 1)) and (fine.values == 1).all()
    assert coarse.values == pytest.approx([row["coarse_share"] for row in analysis["places"]])
    assert len(group.patches[0].get_data().values) == 128
    assert "fitted per image and channel" in texts(figures["coarse_fine.png"])


def test_no_error_and_one_group_in_figures(figures, tmp_path):
    student, _ = predictions((2, 1, 8, 8))
    coarse_fine_figure(analysis_of(student, student, timesteps=1, group_size=64), tmp_path / "coarse_fine.png")
    assert texts(figures["coarse_fine.png"]).count("no error") == 3
    assert figures["coarse_fine.png"].axes[2].get_xticks().tolist() == [0]
    empty = {"place": np.array([5]), "image": np.zeros((1, 1, 8, 8)), "image_error": np.zeros((1, 1, 8, 8))}
    empty |= {"group_rank": np.zeros((1, 8, 8), int), "mean_error": np.zeros((1, 8, 8))}
    error_maps_figure(empty, protocol_of(64), tmp_path / "error_maps.png")
    drawn = [axes.images[0] for axes in figures["error_maps.png"].axes if axes.images]
    assert all(image.norm.vmin == 0 and image.norm.vmax == 1 for image in drawn[1:4])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_error_maps_name_their_channels(figures, tmp_path, channels):
    random = np.random.default_rng(0)
    maps = {name: random.normal(size=(2, channels, 8, 8)) for name in ("image", "image_error")}
    maps |= {"place": np.array([5, 500]), "mean_error": random.normal(size=(2, 8, 8))}
    maps |= {"group_rank": random.integers(0, 4, (2, 8, 8))}
    error_maps_figure(maps, protocol_of(16), tmp_path / "error_maps.png")
    grid = figures["error_maps.png"].axes
    assert grid[0].images[0].get_array().shape == ((8, 8, 3) if channels == 3 else (8, 8))
    assert np.allclose(grid[2].images[0].get_array(), maps["image_error"][0].mean(0))
    labels = texts(figures["error_maps.png"]).replace("\n", " ")
    assert ("groups of 16 of channel 0, by rank" in labels) == ("mean of channels" in labels) == (channels > 1)
    assert ("channel 0, noised" in labels) == (channels == 4)


def test_distances_that_a_warning_goes_with_are_in_no_picture(figures, tmp_path, monkeypatch):
    rows = {name: torch.zeros(2, 1, 4, 4, dtype=torch.uint8) for name in ("student", "corrected", "teacher")}
    maps = {name: np.zeros((1, 1, 8, 8)) for name in ("image", "image_error")}
    maps |= {"place": np.array([5]), "mean_error": np.zeros((1, 8, 8)), "group_rank": np.zeros((1, 8, 8), int)}
    analysis, written, grid = analysis_of(*predictions(), timesteps=1), [], utils.analysis.report.image_grid
    monkeypatch.setattr(
        utils.analysis.report,
        "image_grid",
        lambda shown, **words: (
            written.append("\n".join([*shown, *words["columns"], words["title"]])) or grid(shown, **words)
        ),
    )
    for warning in (None, "8 samples in 64 dimensions"):
        analysis["samples"] = {"frechet_distance": dict.fromkeys(rows, 1.5), "warning": warning, "shown": ["a", "b"]}
        analysis["samples"]["pixel_difference_to_teacher"] = {"student": 4.0, "corrected": 3.0, "teacher": 0.0}
        save_figures(analysis, maps, rows, tmp_path)
        assert ("corrected\nFrechet 1.50" in written[-1]) == (warning is None) and "\na\nb\n" in written[-1]
        assert ("25% nearer" in written[-1]) == (warning is not None)
        assert "DDIM, eta 0, 25 steps, the same noise for all" in written[-1]
    assert Image.open(tmp_path / "samples.png").height > 3 * 64


def rows_of(totals: list[float], shares: list[float], slopes: list[float]) -> dict:
    """An analysis of which a takeaway is made: timesteps 100, 300 ... of 1000."""
    rows = [
        {"place": 200 * i + 100, "total": total, "coarse_share": share, "slope": {"median": slope}}
        for i, (total, share, slope) in enumerate(zip(totals, shares, slopes, strict=True))
    ]
    return {"protocol": {"num_places": 1000, "place_name": "timestep"}, "places": rows, "mean": {"coarse_share": 0.12}}


@pytest.mark.parametrize(
    "totals, shares, said",
    [
        ([6, 1, 1, 1, 1], [0.1, 0.4, 0.2, 0.4, 0.5], "60% of the error is in the cleanest fifth .* 12% .* 700 on"),
        ([1, 1, 1, 1, 6], [0.4] * 5, "60% of the error is in the noisiest fifth .* a third or more everywhere"),
        ([1, 1, 6, 1, 1], [0.1, 0.3, 0.2, 0.1, 0.1], "60% .* in the middle fifth .* and most at timestep 300: 30%"),
        ([0, 0], [None, None], "predicts what the teacher predicts"),
        ([3, 1], [0.1, 0.1], "removes 12% of the error, and most at timestep 100: 10%"),
    ],
)
def test_what_the_chart_of_the_error_says(totals, shares, said):
    assert re.search(said, coarse_fine_takeaway(rows_of(totals, shares, [1.0] * len(totals))))


def test_what_the_other_figures_say():
    said = line_takeaway(rows_of([1] * 3, [0] * 3, [1.05, 0.9, 1]))
    assert "shrink" in said and "timestep 300: median slope 0.900" in said
    assert "stretch" in line_takeaway(rows_of([1], [0], [1.2]))
    assert "within 0.5% of 1" in line_takeaway(rows_of([1, 1], [0, 0], [1.001, 0.999]))
    samples = {"frechet_distance": {"student": 50.0, "corrected": 20.0, "teacher": 10.0}}
    assert "50 to 20, 75% of the way to the teacher's 10" in samples_takeaway({"samples": samples})
    samples["frechet_distance"] |= {"teacher": 60.0}  # a student that is better has no way to go
    assert "the teacher's is 60" in samples_takeaway({"samples": samples})
    gaps = {"student": 4.0, "corrected": 5.0, "teacher": 0.0}
    assert "25% farther" in samples_takeaway({"samples": {"pixel_difference_to_teacher": gaps}})
    error = np.ones((2, 10, 10))
    error[1, 0] = 91  # a tenth of the image, 91 % of the error
    assert re.fullmatch(
        "At timestep 500, .* the worst 10% of the image hold 91% of it, 9.1 times an even share.",
        error_maps_takeaway({"place": np.array([5, 500]), "mean_error": error}, "timestep"),
    )
    assert "nearly evenly" in error_maps_takeaway({"place": np.array([5]), "mean_error": error[:1]}, "timestep")
    assert error_maps_takeaway({"place": np.array([5]), "mean_error": 0 * error[:1]}, "timestep") == ""


@pytest.mark.parametrize("name, other", [("timestep", "place"), ("place", "timestep")])
@pytest.mark.parametrize("coarse", [True, False])
def test_a_place_of_the_schedule_has_the_name_that_its_process_gives_it(figures, tmp_path, name, other, coarse):
    """A flow's places are no timesteps; whatever is written for people knows it."""
    student, teacher = predictions((4, 1, 8, 8))
    student = 3 * teacher + 0.1 * student if coarse else student
    analysis = analysis_of(student, teacher, timesteps=5, place_name=name)
    analysis["samples"] = {"num_samples": 2, "probe": "student_input", "shown": []}
    analysis["samples"]["pixel_difference_to_teacher"] = {"student": 4.0, "corrected": 3.0, "teacher": 0.0}
    maps = {what: np.ones((2, 1, 8, 8)) for what in ("image", "image_error")} | {"mean_error": np.ones((2, 8, 8))}
    maps |= {"place": np.array([5, 500]), "group_rank": np.zeros((2, 8, 8), int)}
    save_figures(analysis, maps, dict.fromkeys(WHO, torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), tmp_path)
    written = {figure: texts(drawn) for figure, drawn in figures.items()} | {"table": error_table(analysis)}
    assert len(written) == 4
    for what, text in written.items():
        assert name in text.lower() and other not in text.lower().replace("timestep_", ""), what


def test_error_maps_share_one_scale(figures, tmp_path):
    """Of all timesteps, for an image's error and that of all; ranks have their own."""
    shape, size = np.ones((3, 1, 8, 8)), np.array([1.0, 0.1, 0.01])
    maps = {"place": np.array([5, 500, 900]), "image": shape, "image_error": 2 * size[:, None, None, None] * shape}
    maps |= {"mean_error": size[:, None, None] * shape[:, 0], "group_rank": np.zeros((3, 8, 8), int)}
    error_maps_figure(maps, {"group_size": 16, "place_name": "timestep"}, tmp_path / "error_maps.png")
    drawn = [axes.images[0] for axes in figures["error_maps.png"].axes if axes.images]
    errors = [*drawn[3:6], *drawn[9:12]]
    assert {(image.norm.vmin, image.norm.vmax) for image in errors} == {(0.01, 2.0)}
    shown = [image.norm(image.get_array()).max() for image in errors]
    assert shown[:3] == sorted(shown[:3], reverse=True) and shown[0] == 1 and len(set(shown[:3])) == 3
    assert texts(figures["error_maps.png"]).count("error") >= 4  # the bars say so


def test_takeaways_stand_above_and_legends_hide_nothing(figures, tmp_path):
    analysis = analysis_of(*predictions((4, 3, 6, 7)), timesteps=5)
    line_figure(analysis, tmp_path / "line.png", line_takeaway(analysis))
    coarse_fine_figure(analysis, tmp_path / "coarse_fine.png", coarse_fine_takeaway(analysis))
    for name, figure in figures.items():
        figure.canvas.draw()
        (legend,) = figure.legends
        (said,) = (text for text in figure.texts if text.get_text() == figure.get_suptitle())
        assert said.get_text() and all(axes.get_legend() is None and axes.get_ylabel() for axes in figure.axes), name
        for axes in figure.axes:
            box = axes.get_window_extent()
            assert not legend.get_window_extent().overlaps(box) and said.get_window_extent().y0 > box.y1


# What is refused, before anything is measured or written


@pytest.mark.parametrize(
    "changes, message",
    [
        (("--group_size", 1), "--group_size is 1"),
        (("--group_size", 65), "--group_size 65: a channel of 8x8 has only 64"),
        (("--num_timesteps", 0), "--num_timesteps is 0"),
        (("--num_timesteps", 1001), "--num_timesteps is 1001; the teacher's schedule has 1000. Take fewer"),
        (
            ("--num_inference_steps", 1001),
            "--num_inference_steps is 1001; the teacher's schedule has 1000. Take fewer",
        ),
        (("--num_images", 25), "--num_images is 25; split 'train' has 24 images"),
        (("--num_images", 0), "--num_images is 0"),
        (("--batch_size", -1), "--batch_size is -1"),
        (("--seed", -1), "--seed is -1"),
        (("--resolution", 7), "--resolution 7"),
        (("--split", "dev"), "--split: .* no split 'dev'"),
        (("--train_data_dir", "images"), "one of --dataset_name and --train_data_dir; found both"),
        (("--dataset_name", ""), "one of --dataset_name and --train_data_dir; found neither"),
        (("--dataset_name", "no/such/folder/here"), "--dataset_name no/such/folder/here"),
        (("--pretrained_model_name_or_path", ""), "--pretrained_model_name_or_path is missing"),
        (("--pretrained_model_name_or_path", "no/such/folder/here"), "--pretrained_model_name_or_path no/such"),
        (("--student_model_name_or_path", ""), "--student_model_name_or_path is missing"),
        (("--student_model_name_or_path", "no/such/folder/here"), "--student_model_name_or_path no/such"),
        (("--feature_extractor", "no/such/folder/here"), "--feature_extractor: 'no/such/folder/here'"),
        (("--feature_extractor", CLASSIFIER, "--num_samples", 1), "at least 2 samples"),
        (("--feature_extractor", CLASSIFIER, "--num_samples", 2), "--shown_samples 3"),
        (("--num_timestep", 3), "did you mean --num_timesteps"),
    ],
)
def test_bad_input(analyze, save, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(analyze_error, "measure_error", lambda *_: pytest.fail("measured before it was refused"))
    with pytest.raises(ValueError, match=message):
        analyze(save(build_unet(seed=1)), *changes)
    assert not (tmp_path / "analysis").exists()


def test_a_student_of_another_shape(analyze, save):
    with pytest.raises(ValueError, match="--student_model_name_or_path: the student has in_channels 3, the teacher 1"):
        analyze(save(build_unet(in_channels=3, out_channels=3)))


def test_data_that_have_no_distance(analyze, save, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze_error, "measure_error", lambda *_: pytest.fail("measured before it was refused"))
    one, extractor = save_images(tmp_path / "one", count=1), ("--feature_extractor", CLASSIFIER)
    with pytest.raises(ValueError, match="--feature_extractor: .* split 'train' has 1"):
        analyze(save(build_unet()), "--dataset_name", one, "--num_images", 1, *extractor)
    four = {"in_channels": 4, "out_channels": 4}
    DDPMPipeline(build_unet(**four), DDPMScheduler()).save_pretrained(tmp_path / "teacher4")
    teacher = ("--pretrained_model_name_or_path", tmp_path / "teacher4")
    with pytest.raises(ValueError, match="--feature_extractor: .* 4 channels"):
        analyze(save(build_unet(**four), "student4"), *teacher, *extractor)


def test_a_damaged_image_is_named_by_its_row(analyze, save, tmp_path):
    random = np.random.default_rng(0)
    for i in range(5):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    row = int(shuffled(0, 0, 5)[0])  # the first that is chosen
    assert row != 0
    (tmp_path / "images" / f"{row}.png").write_bytes(b"no image")
    data = ("--dataset_name", "", "--train_data_dir", tmp_path / "images", "--num_images", 2)
    with pytest.raises(ValueError, match=f"row {row} .*{row}.png"):
        analyze(save(build_unet()), *data)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="--train_data_dir .*as a folder of images, there is none in it"):
        analyze(save(build_unet()), "--dataset_name", "", "--train_data_dir", tmp_path / "text")


def test_an_output_folder_that_is_a_file(analyze, save, tmp_path):
    (tmp_path / "analysis").write_text("")
    with pytest.raises(ValueError, match="--output_dir .* is a file"):
        analyze(save(build_unet()))


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        call(analyze_error, ["--help"])
    text = capsys.readouterr().out
    assert "python analyze_error.py --pretrained_model_name_or_path" in text and "How to read it" in text
