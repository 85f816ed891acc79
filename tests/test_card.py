# SPDX-License-Identifier: Apache-2.0
"""The model card: valid, complete, true to the run, and the same for a folder and for the Hub."""

import json
import math
import re
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import build_unet, read_log, run_script
from hub_rules import card_errors
from huggingface_hub import ModelCard
from PIL import Image

import train_place
import utils.publishing.card
from utils.backbones.conditions import Nothing, Prompts
from utils.backbones.diffusion import Diffusion
from utils.backbones.labels import Labels
from utils.distillation.equations import equations
from utils.distillation.losses import place_loss
from utils.publishing.card import card_for_hub, update_card, write_card
from utils.publishing.model_index import without_paths
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
    backbone = SimpleNamespace(
        pipeline_class=diffusers.DDPMPipeline, component="unet", process=Diffusion, conditions=Nothing
    )
    write_card(Namespace(**made_with["arguments"]), backbone, method="METHOD", sizes="SIZES", distances={})
    return valid(folder)


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
    loading = block(text, "from diffusers import DDPMPipeline")
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
    return Labels(Namespace(label_column=None, proportion_empty_prompts=None), num_classes)


UNCONDITIONAL, TEXT = "unconditional-image-generation", "text-to-image"
PIPELINES = [
    ("DDPMPipeline", Nothing, UNCONDITIONAL, "pipeline()"),
    ("DDIMPipeline", Nothing, UNCONDITIONAL, "pipeline()"),
    ("DiTPipeline", labels(1000), UNCONDITIONAL, "pipeline(class_labels=[0])"),
    ("DiTPipeline", labels(10), UNCONDITIONAL, "pipeline(class_labels=[0], guidance_scale=1)"),
    ("StableDiffusionPipeline", Prompts, TEXT, 'pipeline("a photo of a cat")'),
    ("StableDiffusionXLPipeline", Prompts, TEXT, 'pipeline("a photo of a cat")'),
]


@pytest.mark.parametrize("name, conditions, task, call", PIPELINES)
def test_the_task_follows_from_what_the_pipeline_takes(student, name, conditions, task, call):
    kind = getattr(diffusers, name)
    backbone = SimpleNamespace(pipeline_class=kind, component="unet", process=Diffusion, conditions=conditions)
    args = Namespace(**json.loads((student / "args.json").read_text())["arguments"])
    write_card(args, backbone, method="m", sizes="s", distances={})
    card = valid(student)
    assert card.data.pipeline_tag == task
    loading = block(str(card), "from diffusers")
    assert loading.splitlines()[0] == f"from diffusers import {name}"
    assert loading.splitlines()[2] == f"image = {call}.images[0]"
    compile(loading, "card", "exec")


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
    assert results["fid"].dataset_args == {
        "samples": {"name": "student", "count": 1000, "sizes": [8, "x"]},
        "reference": {"dataset_name": "my faces", "split": "test"},
        "extractor": {"name": "inception"},
    }
    assert "| frechet_distance | 12.5 |" in str(card) and "  count: 1000" in str(card)
    assert card.data.to_dict()["model-index"][0]["name"] == "first"
    hub = ModelCard(card_for_hub(student, "somebody/tiny"))
    assert card_errors(str(hub)) == [] and hub.data.to_dict()["model-index"][0]["name"] == "tiny"


def test_any_metrics_will_do(student):
    """Of another extractor no number is called FID; without a reference the data of the training stand for it."""
    (student / "metrics.json").write_text(json.dumps({"metrics": {"frechet_distance": 2}, "protocol": {"x": 1}}))
    update_card(student)
    (result,) = valid(student).data.eval_results
    assert result.metric_type == "frechet_distance" and result.dataset_args == {"x": 1}
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
    del args["task_balance"]  # of a student that was trained before there was one
    assert equations(args) == (["output = mean |e_S - e_T|"], "loss   = 1 * diffusion + 1 * output")


def test_baselines_are_called_what_they_are(run):
    text = (run("train_lift", "--max_train_steps", "1", "--output_loss", "l1") / "README.md").read_text()
    assert block(text, "output = mean |e_S - e_T|") and "b0" not in text and "output distillation (l1)" in text
    text = (
        run("train_lift", "--max_train_steps", "1", "--lambda_kd_output", "0", output="b") / "README.md"
    ).read_text()
    assert "trained without distillation" in text and "distillation" not in ModelCard(text).data.tags
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
