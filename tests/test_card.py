# SPDX-License-Identifier: Apache-2.0
"""The model card: valid, complete, true to the run, and the same for a folder and for the Hub."""

import json
import math
import re
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import yaml
from conftest import build_unet, read_log, run_script
from hub_rules import card_errors
from huggingface_hub import ModelCard
from PIL import Image

import train_place
import utils.publishing.card
from utils.backbones.base import Backbone
from utils.backbones.conditions import Nothing, Prompts
from utils.backbones.diffusion import Diffusion
from utils.backbones.labels import Labels
from utils.commands import string
from utils.distillation.equations import equations
from utils.distillation.losses import place_loss
from utils.files import sha256
from utils.publishing.card import card_for_hub, update_card, write_card
from utils.publishing.curves import plot_losses
from utils.publishing.model_index import without_paths
from utils.publishing.repository import NAME, repository_url
from utils.students.sizes import model_size
from utils.training.arguments import parse_args


@pytest.fixture(scope="module")
def made(tmp_path_factory, teacher_dir, data_dir) -> Path:
    """The student that `student` copies, as a user trains it."""
    flags = ["--max_train_steps", "2", "--lambda_kd_feat", "0.5", "--random_flip", "--validation_shown_samples", "2"]
    return run_script(tmp_path_factory.mktemp("made"), teacher_dir, data_dir, "train_place", *flags, output="first")


@pytest.fixture
def student(made, tmp_path) -> Path:
    """A student of a local teacher, to be changed at will."""
    copy = shutil.copytree(made, tmp_path / "copies" / "first")
    record = (copy / "args.json").read_text()
    (copy / "args.json").write_text(record.replace(json.dumps(str(made)), json.dumps(str(copy))))
    update_card(copy)
    return copy


def rewritten(folder: Path, **changes) -> ModelCard:
    """The card of the same run, had these arguments been other ones."""
    made_with = json.loads((folder / "args.json").read_text())
    made_with["arguments"] |= changes
    (folder / "args.json").write_text(json.dumps(made_with))
    write_card(Namespace(**made_with["arguments"]), backbone_of(), measured(), method="METHOD", sizes="SIZES")
    return valid(folder)


def backbone_of(kind=diffusers.DDPMPipeline, conditions=None, sampled_by="DDIMPipeline", **options) -> Backbone:
    """As far as a card reads it."""
    backbone = Backbone.__new__(Backbone)
    backbone.pipeline_class, backbone.component, backbone.process = kind, "unet", Diffusion
    backbone.conditions, backbone.sampled_by, backbone.sampling_options = conditions or Nothing(), sampled_by, options
    backbone.teacher = None
    return backbone


def measured(condition=None, **distances) -> SimpleNamespace:
    """What a card reads of a validation."""
    return SimpleNamespace(distances=distances, condition=condition)


def valid(folder: Path) -> ModelCard:
    """The folder's card, if it is one that the Hub takes and that huggingface_hub reads as it was written."""
    text = (folder / "README.md").read_text()
    assert card_errors(text) == []
    card = ModelCard.load(folder / "README.md")
    assert str(card) == text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / picture).is_file()
    return card


def block(text: str, first_words: str) -> str:
    """The fenced block that starts so."""
    return next(body for body in re.findall(r"```\w*\n(.*?)\n```", text, re.DOTALL) if body.startswith(first_words))


def test_a_card_of_a_folder(student, teacher_dir):
    card = valid(student)
    text = str(card)
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "unconditional-image-generation"
    assert {"distillation", "lift-place"} <= set(data["tags"])
    assert not {"base_model", "base_model_relation", "datasets", "license", "model-index"} & set(data)
    assert "names no licence" in text

    namespace = {}
    loading = block(text, "from diffusers import DDIMPipeline")
    assert loading.count("\n") == 2  # two lines that load, one that samples
    exec("\n".join(loading.splitlines()[:2]), namespace)
    sizes = [model_size(model.config) for model in (namespace["pipeline"].unet,)]
    teacher = model_size(diffusers.UNet2DModel.load_config(teacher_dir, subfolder="unet"))
    table = block(text, " ")
    assert f"{sizes[0].parameters:,}" in table and f"{teacher.parameters:,}" in table
    assert f"{sizes[0].parameters / teacher.parameters:.2%}" in table

    # nothing but the line that loads it says where on this machine it was made
    elsewhere = text.replace(loading, "")
    home = Path(teacher_dir).parent  # of everything in this session
    assert str(home) in loading and str(home) not in elsewhere
    assert "Distilled from `teacher" in text and "PLACE (error groups of 16)" in text


def test_the_flags_are_a_recipe(student, tmp_path):
    text = (student / "README.md").read_text()
    recipe = tmp_path / "student.args"
    recipe.write_text(block(text, "--group_size"))
    listed = {line.removeprefix("# ").split()[0] for line in recipe.read_text().splitlines()}
    again = parse_args("", train_place.add_method_arguments, [f"@{recipe}", "--output_dir", str(tmp_path / "new")])
    assert listed == {f"--{name}" for name in vars(again)} and "--hub_token" not in listed
    made_with = json.loads((student / "args.json").read_text())["arguments"]
    same = {name for name, value in vars(again).items() if made_with[name] == value}
    # their folders are absolute paths, cut here
    assert set(made_with) - same == {"pretrained_model_name_or_path", "dataset_name", "output_dir"}


def test_loss_curves(student, ornaments, tmp_path):
    picture = np.asarray(Image.open(student / "losses.png").convert("L"))
    assert picture.shape[0] > 300 and picture.shape[1] > 900
    assert (picture < 128).mean() > 0.002
    utils.publishing.card.plot_losses(student / "log.jsonl", tmp_path / "same.png")
    assert (tmp_path / "same.png").read_bytes() == (student / "losses.png").read_bytes()
    lines = read_log(student)
    lines[-1]["task"] *= 100
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    utils.publishing.card.plot_losses(tmp_path / "log.jsonl", tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != (student / "losses.png").read_bytes()


def test_no_line_is_drawn_where_none_is_fitted(student, tmp_path):
    """A conventional loss has neither w nor a slope."""
    drawn = []
    for coarse, slope in ((0.0, 1.0), (0.0, 0.5), (0.1, 0.5)):
        lines = [{**line, "coarse": coarse, "slope": slope} for line in read_log(student)]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_losses(tmp_path / "log.jsonl", tmp_path / "losses.png")
        drawn.append((tmp_path / "losses.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_card_without_samples_shows_none(student):
    (student / "samples.png").unlink()
    text = str(rewritten(student, validation_shown_samples=0))
    assert "samples.png" not in text and "as the samples below" not in text and "more steps take longer" in text


LICENCES = {
    "license: mit": {"license": "mit"},
    "license: other\nlicense_name: ours\nlicense_link: https://example.org/l": {
        "license": "other",
        "license_name": "ours",
        "license_link": "https://example.org/l",
    },
    # a file of the teacher's folder, which is not published
    "license: other\nlicense_name: ours\nlicense_link: LICENSE": {"license": "other", "license_name": "ours"},
    "tags: [a]": {},
}


@pytest.mark.parametrize("front", LICENCES)
def test_the_teachers_licence_is_carried_over(student, tmp_path, teacher_dir, front):
    teacher = shutil.copytree(teacher_dir, tmp_path / "teacher")
    (teacher / "README.md").write_text(f"---\n{front}\n---\n# Teacher\n")
    card = rewritten(student, pretrained_model_name_or_path=str(teacher))
    assert {key: value for key, value in card.data.to_dict().items() if key.startswith("license")} == LICENCES[front]
    name = LICENCES[front].get("license_name", LICENCES[front].get("license"))
    assert (f"licence is the teacher's, {name}." if name else "names no licence") in str(card)


def test_a_broken_card_of_the_teacher_is_said(student, tmp_path, teacher_dir):
    teacher = shutil.copytree(teacher_dir, tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.warns(UserWarning, match="licence of .* could not be read"):
        card = rewritten(student, pretrained_model_name_or_path=str(teacher))
    assert card.data.license is None


def test_teacher_and_data_of_the_hub(student, monkeypatch):
    """Offline the teacher's card cannot be read, which is said; who it was needs no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.warns(UserWarning, match="licence of google/ddpm-x could not be read"):
        card = rewritten(student, pretrained_model_name_or_path="google/ddpm-x", dataset_name="some/faces")
    assert card.data.base_model == "google/ddpm-x" and card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["some/faces"]
    assert "[google/ddpm-x](https://huggingface.co/google/ddpm-x)" in str(card)


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets" / "teacher").mkdir(parents=True)
    card = rewritten(student, pretrained_model_name_or_path="assets/teacher", dataset_name="../some data")
    assert card.data.base_model is None and card.data.datasets is None


def labels(num_classes: int) -> Labels:
    return Labels(Namespace(label_column=None, proportion_empty_prompts=None), num_classes, {})


def prompts() -> Prompts:
    return Prompts(Namespace(caption_column=None, proportion_empty_prompts=None, **VALIDATION), [], [])


VALIDATION = {"validation_prompts": None, "validation_shown_samples": 2}
UNCONDITIONAL, TEXT = "unconditional-image-generation", "text-to-image"
CAPTION = 'the height="1", in\n``` "quotes" | </script>'  # of the kind that a format takes for something else
PIPELINES = [
    ("DDPMPipeline", Nothing, None, UNCONDITIONAL, ""),
    ("DDIMPipeline", Nothing, None, UNCONDITIONAL, ""),
    ("DiTPipeline", lambda: labels(1000), 7, UNCONDITIONAL, "class_labels=[7], "),
    ("DiTPipeline", lambda: labels(10), 7, UNCONDITIONAL, "class_labels=[7], guidance_scale=1, "),
    ("StableDiffusionPipeline", prompts, CAPTION, TEXT, f"prompt={string(CAPTION)}, "),
    ("StableDiffusionXLPipeline", prompts, "a cat", TEXT, 'prompt="a cat", '),
]


@pytest.mark.parametrize("name, conditions, condition, task, told", PIPELINES)
def test_a_card_calls_the_pipeline_with_what_the_data_hold(student, name, conditions, condition, task, told):
    """And suggests the sampler that the samples in it were drawn with."""
    kind, pixels = getattr(diffusers, name), name in ("DDPMPipeline", "DDIMPipeline")
    options = {} if pixels else {"guidance_scale": 4.0, "height": 32}
    backbone = backbone_of(kind, conditions(), "DDIMPipeline" if pixels else "DiffusionPipeline", **options)
    args = Namespace(**json.loads((student / "args.json").read_text())["arguments"])
    write_card(args, backbone, measured(condition), method="m", sizes="s")
    card = valid(student)
    assert card.data.pipeline_tag == task
    loading = block(str(card), "from diffusers")
    assert loading.splitlines()[0] == f"from diffusers import {'DDIMPipeline' if pixels else name}"
    more = "" if pixels else ", height=32" if "guidance" in told else ", guidance_scale=4.0, height=32"
    assert loading.splitlines()[2] == f"image = pipeline({told}num_inference_steps=2{more}).images[0]"
    compile(loading, "card", "exec")
    assert f"Suggested: DDIM, eta 0, 2 steps{', guidance 4' * (not pixels)}, as the samples" in str(card)


def test_a_missing_mid_block_is_said(student):
    config = json.loads((student / "unet" / "config.json").read_text())
    assert "ControlNet" not in str(rewritten(student))
    (student / "unet" / "config.json").write_text(json.dumps({**config, "mid_block_type": None}))
    assert "ControlNet" in str(rewritten(student))


METRICS = {
    "metrics": {"frechet_distance": 12.5, "kernel_distance": 0.001, "clip_score": None, "broken": math.nan},
    "protocol": {
        "samples": {"name": "/home/me/student", "count": 1000, "sizes": [8, "/home/me/x"]},
        "reference": {"dataset_name": "/data/my faces", "split": "test"},
        "extractor": {"name": "inception"},
        "clip_model": None,
        "arguments": {"many": 1},
    },
}


def test_metrics_come_later(student):
    (student / "metrics.json").write_text(json.dumps(METRICS))
    update_card(student)
    card = valid(student)
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"fid": 12.5, "kid": 0.001}
    assert results["fid"].dataset_name == "my faces" and results["fid"].dataset_type == "my-faces"
    assert results["fid"].dataset_args == {"samples": "1000", "features": "inception"}
    text = str(card)
    assert "| FID, lower is better | 12.5 |" in text and "/home" not in text
    whole = yaml.safe_load(block(text, "samples:"))
    assert whole == {
        "samples": {"name": "student", "count": 1000, "sizes": [8, "x"]},
        "reference": {"dataset_name": "my faces", "split": "test"},
        "extractor": {"name": "inception"},
    }
    sentence = "1,000 samples against the images of my faces, split test, on the features of inception"
    assert text.index("## Evaluation") < text.index(sentence) < text.index("| FID")  # before the number
    assert card.data.to_dict()["model-index"][0]["name"] == "first"
    hub = ModelCard(card_for_hub(student, "somebody/tiny"))
    assert card_errors(str(hub)) == [] and hub.data.to_dict()["model-index"][0]["name"] == "tiny"


EVERYTHING = {
    "metrics": {
        "frechet_distance": 12.345678,
        "kernel_distance": 0.0123456,
        "kernel_distance_stderr": 0.000456,
        "precision": 0.654321,
        "recall": 0.123456,
        "inception_score": 3.21098,
        "inception_score_std": 0.0456,
        "clip_score": 31.41592,
    },
    "compare_to_metrics": {"frechet_distance": 2.34567, "kernel_distance": 0.002, "kernel_distance_stderr": 0.0001},
    "cost": {"parameters": 1000, "seconds_per_image": 0.0123456, "peak_memory_bytes": 3 * 2**20},
    "compare_to": {"parameters": 2000, "seconds_per_image": 0.04, "peak_memory_bytes": 6 * 2**20},
    "warnings": ["few samples."],
    "protocol": {
        "samples": {
            **{"name": "/x/student", "scheduler": "DPMSolverMultistepScheduler", "num_inference_steps": 1000},
            **{"eta": 0.5, "guidance_scale": 7.5, "seed": 123456, "count": 50000, "device": "cuda"},
            "model_files": {f"unet/{i}.json": "0" * 64 for i in range(30)},
        },
        "reference": {"dataset_name": "some/very-long-name-of-faces", "dataset_config_name": "all", "split": "train"},
        "extractor": {"name": "inception", "dimensions": 2048},
        "arguments": {"compare_to": "/models/teacher"},
    },
}
LONG_LICENCE = {"license": "other", "license_name": "a-licence", "license_link": "https://example.org/licence"}


def test_the_front_matter_is_short_and_the_numbers_are_what_they_carry(student):
    """At its longest: everything of the Hub, a licence of its own, every metric there is."""
    (student / "metrics.json").write_text(json.dumps(EVERYTHING))
    facts = json.loads((student / "card.json").read_text())
    facts |= {"base_model": "google/ddpm-x", "datasets": ["some/faces"], "license": LONG_LICENCE}
    facts |= {"size": {"teacher": {"parameters": 2000, "macs": 3}, "student": {"parameters": 1000, "macs": 1}}}
    (student / "card.json").write_text(json.dumps(facts))
    update_card(student)
    text = str(valid(student))
    header = text.split("\n---\n")[0]
    assert "samples: 50000 by DPMSolverMultistep, 1,000 steps, eta 0.5, guidance 7.5\n" in header
    assert len(header.splitlines()) < 40 and "0" * 64 not in header and "0" * 64 in text
    values = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert values == {
        **{"fid": 12.35, "kid": 0.01235, "precision": 0.654, "recall": 0.123},
        **{"inception_score": 3.211, "clip_score": 31.42},
    }
    assert "| metric | student | `teacher` |" in text and "| FID, lower is better | 12.35 | 2.346 |" in text
    assert (
        "| KID, lower is better | 0.01235 +- 0.00046 | 0.00200 +- 0.00010 |" in text
        and "Warning: few samples." in text
    )
    assert "| parameters of the denoiser | 2,000 | 1,000 | 0.5 |" in text
    assert "| | student | `teacher` | ratio |" in text and "cuda" in text.split("| | student | `teacher`")[0]
    assert "| memory above the idle process | 3 MiB | 6 MiB | 0.5 |" in text
    assert "| seconds an image, a process | 0.0123 s | 0.04 s | 0.309 |" in text
    assert text.count("parameters of the denoiser") == 1  # not again in the second table


def test_numbers_of_other_weights_are_left_out(student):
    """A run that went on has made others since."""
    weights = "unet/diffusion_pytorch_model.safetensors"
    for known, present in ((sha256(student / weights), True), ("0" * 64, False)):
        content = json.loads(json.dumps(EVERYTHING))
        content["protocol"]["samples"]["model_files"] = {weights: known}
        (student / "metrics.json").write_text(json.dumps(content))
        update_card(student)
        assert ("## Evaluation" in (student / "README.md").read_text()) == present


def test_two_distances_stand_apart_each_with_its_protocol(student):
    (student / "metrics.json").write_text(json.dumps(EVERYTHING))
    args = json.loads((student / "args.json").read_text())["arguments"] | {
        "validation_feature_extractor": "/home/me/classifier",
        "validation_num_samples": 64,
    }
    rewritten(student, **args)
    write_card(Namespace(**args), backbone_of(), measured(teacher=1.23456, student=20.4), method="m", sizes="s")
    sections = str(valid(student)).split("\n## ")
    (evaluation,) = [section for section in sections if section.startswith("Evaluation\n")]
    (training,) = [section for section in sections if section.startswith("Distance to real images in training\n")]
    assert "12.35" in evaluation and "50,000 samples" in evaluation and "20.4" not in evaluation
    assert "| teacher | 1.23 |" in training and "64 samples (DDIM, eta 0, 2 steps, seed 0)" in training
    assert "`classifier`" in training and "12.35" not in training


def test_a_card_of_an_earlier_version_is_written_again(student):
    facts = json.loads((student / "card.json").read_text())
    for name in ("size", "options", "repository"):
        del facts[name]
    (student / "card.json").write_text(json.dumps(facts))
    assert update_card(student)
    valid(student)


REMOTES = {
    "https://me:secret@example.org/me/code.git?token=secret#x": "https://example.org/me/code",
    "https://example.org:8443/me/code": "https://example.org:8443/me/code",
    "git@example.org:me/code.git": None,
    "ssh://git@example.org/me/code.git": None,
    "/home/me/code": None,
    "http://localhost/code": None,
    "http://10.0.0.3/code": None,
    "https://git/code": None,
    "https://code.internal/code": None,
}


@pytest.mark.parametrize("remote", REMOTES)
def test_the_link_to_the_code_is_public_and_holds_no_secret(tmp_path, remote):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert repository_url(tmp_path) is None
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", remote], check=True)
    assert repository_url(tmp_path) == REMOTES[remote]


def test_the_code_is_named_with_a_link_where_there_is_one(student, monkeypatch):
    assert f"Trained with `{NAME}`." in str(rewritten(student)) or repository_url()
    monkeypatch.setattr("utils.publishing.card.repository_url", lambda: "https://example.org/me/code")
    assert f"Trained with [{NAME}](https://example.org/me/code)." in str(rewritten(student))


def test_any_metrics_will_do(student):
    """Of another extractor no number is called FID; without a reference the data of the training stand for it."""
    (student / "metrics.json").write_text(json.dumps({"metrics": {"frechet_distance": 2}, "protocol": {"x": 1}}))
    update_card(student)
    (result,) = valid(student).data.eval_results
    assert result.metric_type == "frechet_distance" and result.dataset_args is None
    assert block((student / "README.md").read_text(), "x:") == "x: 1"
    assert (
        result.dataset_name == Path(json.loads((student / "args.json").read_text())["arguments"]["dataset_name"]).name
    )


def test_the_hub_gets_the_same_card(student):
    local, hub = (student / "README.md").read_text(), card_for_hub(student, "somebody/tiny")
    expected = local.replace(f'from_pretrained("{student}")', 'from_pretrained("somebody/tiny")')
    assert hub == expected.replace("# first\n", "# tiny\n") != local


def test_a_card_edited_by_hand_stays(student):
    edited = (student / "README.md").read_text() + "By hand.\n"
    (student / "README.md").write_text(edited)
    (student / "metrics.json").write_text(json.dumps(METRICS))
    update_card(student)
    assert (student / "README.md").read_text() == card_for_hub(student, "somebody/tiny") == edited


def test_a_folder_without_our_card(tmp_path):
    assert card_for_hub(tmp_path, "somebody/tiny") is None
    (tmp_path / "README.md").write_text("mine")
    assert card_for_hub(tmp_path, "somebody/tiny") == "mine"
    update_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("flags", [[], ["--coarse_norm", "l2", "--weighting", "constant", "--coarse_scale", "2"]])
def test_the_equations_are_what_was_trained_with(run, flags):
    """The printed lines, taken as Python, give what utils/distillation/losses.py computes."""
    folder = run("train_place", "--max_train_steps", "1", "--grouping", "patch", *flags)
    args = json.loads((folder / "args.json").read_text())["arguments"]
    generator = torch.Generator().manual_seed(0)
    e_S, e_T = torch.randn(2, 1, 1, 4, 4, generator=generator, dtype=torch.float64)  # one patch of 16
    options = {key: args[key] for key in ("group_size", "grouping", "coarse_norm", "coarse_scale")}
    expected = place_loss(e_S, e_T, weight=None if args["weighting"] == "adaptive" else 1.0, **options)

    values = {"e_S": e_S, "e_T": e_T, "mean": torch.mean, "abs": torch.abs, "diffusion": 0.0}
    values |= {"var": lambda x: x.var(correction=0), "cov": lambda x, y: (x * y).mean() - x.mean() * y.mean()}
    _, *lines = block((folder / "README.md").read_text(), "e_T ~").splitlines()
    for line in lines:
        code = re.sub(r"\|(.*?)\|", r"abs(\1)", line.split("  (")[0]).replace(",  ", ";").replace("^", "**")
        exec(re.sub(r"mean (\w*\([^)]*\)(\*\*2)?|b0\*\*2)", r"mean(\1)", code), values)
    assert values["coarse"].item() == pytest.approx(expected.coarse.item(), rel=1e-6)
    assert values["fine"].item() == pytest.approx(expected.fine.item(), rel=1e-6)
    assert values["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-6)


def test_the_equations_say_what_is_balanced():
    args = {"lambda_task": 1, "lambda_kd_output": 1, "lambda_kd_feat": 0, "output_loss": "l1", "task_balance": 1.0}
    lines, total = equations({**args, "timestep_balance": 0.5})
    assert [line[:19] for line in lines] == ["u      = (M / m)^1 ", "v      = (M / m)^0.", "output = mean v * |"]
    assert total == "loss   = 1 * u * diffusion + 1 * output"
    assert equations({**args, "lambda_kd_output": 0})[1] == "loss   = 1 * u * diffusion"
    lines, total = equations({**args, "timestep_balance": 0.5}, ("loss", "variance", "output_variance"))
    assert [line.split(" = ")[0] for line in lines[3:]] == ["variance", "output_variance"]
    assert total == "loss   = 1 * (u * diffusion + variance) + 1 * (output + output_variance)"
    assert equations({**args, "lambda_kd_output": 0}, ("variance",))[1] == "loss   = 1 * (u * diffusion + variance)"
    del args["task_balance"]  # of a student that was trained before there was one
    assert equations(args) == (["output = mean |e_S - e_T|"], "loss   = 1 * diffusion + 1 * output")


def test_baselines_are_called_what_they_are(run):
    text = (run("train_lift", "--max_train_steps", "1", "--output_loss", "l1") / "README.md").read_text()
    assert block(text, "output = mean |e_S - e_T|") and "b0" not in text and "output distillation (l1)" in text
    text = (
        run("train_lift", "--max_train_steps", "1", "--lambda_kd_output", "0", output="b") / "README.md"
    ).read_text()
    assert "trained without distillation" in text and "distillation" not in (ModelCard(text).data.tags or [])
    assert block(text, "loss   = 1 * diffusion") == "loss   = 1 * diffusion"


def test_from_scratch(run, tmp_path, data_dir):
    build_unet().save_config(tmp_path)
    flags = ["--student_config", tmp_path / "config.json", "--lambda_kd_output", "0", "--max_train_steps", "1"]
    flags += ["--validation_num_inference_steps", "2", "--validation_shown_samples", "2", "--report_to", "none"]
    folder = run("train_lift", *flags, "--dataset_name", data_dir, "--train_batch_size", "4", defaults=False)
    text = str(valid(folder))
    assert (
        "Trained from scratch" in text and "teacher" not in text.replace("# --teacher_dtype", "").split("## Size")[0]
    )


def test_paths_are_cut():
    value = {"a": "/home/me/teacher", "b": ["/x/y", 1, None, {"c": "assets/teacher"}], "d": "google/ddpm", "e": ""}
    assert without_paths(value) == {**value, "a": "teacher", "b": ["y", 1, None, {"c": "assets/teacher"}]}


def test_a_continued_student_forgets_where_it_came_from(run, student):
    folder = run("train_place", "--student_model_name_or_path", student, "--max_train_steps", "1", output="second")
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert str(student) not in (folder / name).read_text()
    diffusers.DDPMPipeline.from_pretrained(folder)
