# SPDX-License-Identifier: Apache-2.0
"""evaluate_fid.py and analyze_error.py on DiT: classes, guidance whatever their number, corrected samples."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import DiTPipeline
from latent_pipelines import save_classes, save_dit

import analyze_error
import evaluate_fid
from utils.analysis.arguments import PROBES, for_backbone, parse_args
from utils.analysis.corrected import probe_denoisers
from utils.backbones import choose_backbone
from utils.command_line import call
from utils.data.folders import folder_rows
from utils.distillation.features import Tapped
from utils.evaluation.conditions import read_class_labels
from utils.evaluation.sampler import STREAM, Sampler
from utils.randomness import seed_from

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_dit(tmp_path_factory.mktemp("dit") / "teacher", CLASSES)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return save_classes(tmp_path_factory.mktemp("data") / "images")


def pipeline_of(folder: Path) -> DiTPipeline:
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def analysis(teacher: Path, images: Path, student, *flags) -> Namespace:
    given = ["--pretrained_model_name_or_path", teacher, "--student_model_name_or_path", student]
    given += ["--train_data_dir", images, "--output_dir", Path(student) / "none", *flags]
    return parse_args("", [str(word) for word in given])


# evaluate_fid.py


@pytest.mark.parametrize("scale, channels", [(1.0, None), (3.0, None), (3.0, 3)])
def test_samples_are_those_of_the_validation(teacher, images, scale, channels):
    """Of a model of 5 classes, whose table DiTPipeline's label 1000 would overrun."""
    args = analysis(teacher, images, teacher, "--guidance_scale", scale)
    wanted = for_backbone(args)
    wanted.validation_guidance_channels = channels
    backbone = choose_backbone(wanted).load(wanted)
    seeds, labels = [seed_from(0, STREAM, i) for i in range(3)], backbone.conditions.of_samples(None, 0, 3)
    expected = backbone.sample(backbone.teacher, seeds, 3, labels)
    options = {"num_inference_steps": 3, "guidance_scale": scale, "guidance_channels": channels}
    found = Sampler(pipeline_of(teacher), **options)(range(3))
    assert (found.int() - expected.int()).abs().max() <= 1 and found.float().std() > 10


@pytest.mark.parametrize("classes", [1000, 1003])
def test_no_label_is_the_models_own(tmp_path, classes):
    """1000 where it knows 1000, as DiTPipeline has it; of a model that knows more, 1000 is a class."""
    pipeline = pipeline_of(save_dit(tmp_path / "dit", num_embeds_ada_norm=classes))
    told = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    drawn = Sampler(pipeline, num_inference_steps=2, class_labels=[999, 7])(range(2))
    assert told[0] == [999, 7, classes, classes]
    if classes == 1000:
        generators = [torch.Generator().manual_seed(seed_from(0, STREAM, i)) for i in range(2)]
        stock = pipeline([999, 7], generator=generators, num_inference_steps=2, output_type="np").images
        assert np.array_equal(drawn.permute(0, 2, 3, 1).numpy(), (stock * 255).round().astype("uint8"))


def test_labels_are_those_of_the_data_in_a_shuffle(teacher, images):
    rows = folder_rows(str(images), "--train_data_dir")
    pipeline = pipeline_of(teacher)

    def labels(seed, column="label"):
        args = Namespace(label_column=column, class_labels=[4], seed=seed)
        return read_class_labels(args, Namespace(rows=rows), pipeline, {})

    assert sorted(labels(0)) == sorted(rows["label"]) and labels(0) == labels(0) != labels(1)
    assert len(set(labels(0)[:6])) > 2  # though the data lie class by class
    assert labels(0, column=None) == [4]
    sampler = Sampler(pipeline, class_labels=labels(0) * 20, num_inference_steps=2)
    assert sampler.protocol["class_labels"]["count"] == 240 and len(sampler.protocol["class_labels"]["sha256"]) == 64


def evaluate(folder: Path, pipeline, images: Path, *flags) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    given = ["--pretrained_model_name_or_path", pipeline, "--train_data_dir", images, "--num_samples", 10]
    given += ["--num_inference_steps", 2, "--metrics", "fid", "--feature_extractor", ROOT / "assets" / "classifier"]
    given += ["--batch_size", 5, "--num_cpu_threads", 1, "--output_dir", folder, *flags]
    call(evaluate_fid, [str(word) for word in (*given, "--reference_cache_dir", folder.parent / "cache")])
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_says_what_it_drew(teacher, images, tmp_path):
    guided = ["--guidance_scale", 1.5, "--guidance_channels", 3, "--label_column", "label"]
    found = evaluate(tmp_path / "guided", teacher, images, *guided, "--scheduler", "DDPMScheduler")
    samples = found["protocol"]["samples"]
    assert (samples["guidance_scale"], samples["guidance_channels"]) == (1.5, 3)
    assert sorted(samples["class_labels"]) == sorted(folder_rows(str(images), "--train_data_dir")["label"])
    assert found["cost"]["forwards_per_image"] == 4 and found["cost"]["macs_per_forward"] > 0
    plain = evaluate(tmp_path / "plain", teacher, images, "--guidance_scale", 1)["protocol"]["samples"]
    assert plain["class_labels"] == "0 to 4" and plain["guidance_channels"] is None


REFUSED = {
    "no such class": (["--class_labels", 5], "--class_labels: this DiTPipeline knows the labels 0 to 4"),
    "no such column": (["--label_column", "fine"], "--label_column fine: the dataset has no such column"),
    "both": (["--label_column", "label", "--class_labels", 1], "Give one of --class_labels and --label_column"),
    "no guidance": (
        ["--guidance_channels", 3, "--guidance_scale", 1],
        "--guidance_channels has no effect: .* this is a DiTPipeline with 1.0",
    ),
    "labels of statistics": (
        ["--train_data_dir", "", "--reference_stats", "x.npz", "--label_column", "label"],
        "--label_column is a column of --dataset_name or --train_data_dir",
    ),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_with_labels_is_said_first(teacher, images, tmp_path, flags, message, monkeypatch):
    monkeypatch.setattr(evaluate_fid, "draw_missing", lambda *_: pytest.fail("samples were drawn"))
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "out", teacher, images, *flags)


def test_a_pipeline_without_classes_takes_no_labels(teacher_dir, data_dir, images, tmp_path):
    for flags in (["--label_column", "label"], ["--guidance_channels", 3]):
        with pytest.raises(ValueError, match=f"{flags[0]} has no effect: .* DDPMPipeline"):
            evaluate(tmp_path / "out", teacher_dir, images, *flags)


# analyze_error.py


@pytest.fixture(scope="module")
def affine(teacher, tmp_path_factory) -> Path:
    """The teacher, but for a line: what it says of the noise is .6 times as large, and moved by .2."""
    model = pipeline_of(teacher).transformer
    with torch.no_grad():  # of 2 x 2 places and 8 channels the first four
        weight, bias = (each.view(4, 8, -1)[:, :4] for each in (model.proj_out_2.weight, model.proj_out_2.bias))
        weight.mul_(0.6)
        bias.mul_(0.6).add_(0.2)
    folder = tmp_path_factory.mktemp("affine")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("guided", [["--guidance_scale", 1], ["--guidance_scale", 2, "--guidance_channels", 3]])
def test_correcting_an_affine_student_recovers_the_teachers_samples(teacher, images, affine, probe, guided):
    args = analysis(teacher, images, affine, "--probe", probe, *guided)
    wanted = for_backbone(args)
    backbone = choose_backbone(wanted).load(wanted)
    student, _ = backbone.make_student(wanted, {})
    drawn = {
        who: backbone.sample(denoiser, range(3), 4, [0, 3, 4]).int()
        for who, denoiser in probe_denoisers(probe, student.eval(), backbone.teacher).items()
    }
    assert (drawn["student"] - drawn["teacher"]).abs().max() > 10
    assert (drawn["corrected"] - drawn["teacher"]).abs().max() <= 1 and drawn["teacher"].float().std() > 5


@pytest.mark.slow
def test_the_error_is_that_of_the_noise_under_each_images_label(teacher, images, affine, tmp_path):
    flags = ["--num_images", "6", "--num_timesteps", "2", "--num_inference_steps", "2", "--shown_samples", "2"]
    flags += ["--guidance_channels", "3", "--batch_size", "4", "--num_cpu_threads", "1"]
    given = ["--pretrained_model_name_or_path", teacher, "--student_model_name_or_path", affine]
    given += ["--train_data_dir", images, "--output_dir", tmp_path / "out", *flags]
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    told, predict = [], Tapped.forward

    def forward(self, x_t, **condition):
        told.append(condition["class_labels"].tolist())
        return predict(self, x_t, **condition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tapped, "forward", forward)
        call(analyze_error, [str(word) for word in given])
    written = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert all(label < CLASSES for labels in told for label in labels)  # none is left out for guidance
    for row in written["places"]:  # a line removes all of it
        assert len(row["channels"]) == 4 and row["coarse_share"] == pytest.approx(1, abs=1e-4)
        assert row["slope"]["median"] == pytest.approx(1 / 0.6, rel=1e-3)
    assert written["protocol"]["sampler"]["guidance_scale"] == 4.0
    gap = written["samples"]["pixel_difference_to_teacher"]
    assert gap["corrected"] < 0.5 < gap["student"]
