# SPDX-License-Identifier: Apache-2.0
"""benchmarks/compare.py, sweep.py and the latent teachers: what they write, what they refuse, that they go on."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_script
from diffusers import UNet2DModel
from safetensors.torch import load_file

from utils.command_line import UsageError, call

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import compare  # noqa: E402
import latent_teachers  # noqa: E402
import make_dit_teacher  # noqa: E402
import recipe_memory  # noqa: E402
import sweep  # noqa: E402

import evaluate_fid  # noqa: E402


def test_runs_side_by_side(run, tmp_path, monkeypatch, teacher_dir):
    place = run("train_place", "--max_train_steps", "2", output="place")
    l1 = run("train_lift", "--output_loss", "l1", "--max_train_steps", "2", output="l1")
    flags = ["--samples", "2", "--num_inference_steps", "2", "--output", str(tmp_path / "out")]
    compare.main([str(place), str(l1), *flags])
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    cells = [dict(zip(lines[0].split(" | "), line.split(" | "), strict=True)) for line in lines[2:]]
    assert [cell["--script"] for cell in cells] == ["train_place.py", "train_lift.py"]
    assert [cell["coarse"] == "" for cell in cells] == [False, True]  # the conventional loss has none
    assert not any("output_dir" in name for name in cells[0])
    last = json.loads((place / "log.jsonl").read_text().splitlines()[-1])
    assert cells[0]["task"] == f"{last['task']:.4g}"
    log = [
        {**line, "output": 1 - line["step"]} for line in map(json.loads, (l1 / "log.jsonl").read_text().splitlines())
    ]
    (l1 / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))  # the logarithm of an error
    here = l1 / "args.json"
    here.write_text(here.read_text().replace(json.dumps(teacher_dir), '"assets/teacher"'))
    there = place / "args.json"
    there.write_text(there.read_text().replace(json.dumps(teacher_dir), json.dumps(str(ROOT / "assets" / "teacher"))))
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(compare, "draw", lambda name, *_, **__: drawn.append(name) or (torch.zeros(2, 1, 8, 8), 1))
    compare.main([str(place), str(l1), *flags])
    assert drawn == [str(ROOT / "assets" / "teacher"), str(place), str(l1)]  # one teacher, from wherever it is named
    header, _, _, line = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    shown = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert shown["output"] == "-1" and "--pretrained_model_name_or_path" not in header
    for folders, said in (([place], "nothing to compare"), ([place, tmp_path], "has no log.jsonl")):
        with pytest.raises(UsageError, match=said):
            compare.main([*map(str, folders), *flags])


@pytest.fixture
def launched(monkeypatch, tmp_path, teacher_dir, data_dir):
    """The commands of a sweep, each run in this process."""
    commands = []

    def launch(command, log=None):
        script = next(Path(word).stem for word in command if word.endswith(".py"))
        flags = command[next(i for i, word in enumerate(command) if word.endswith(".py")) + 1 :]
        commands.append((script, "--dry_run" in flags))
        if script == "evaluate_fid":
            call(evaluate_fid, flags)
        else:
            run_script(tmp_path, teacher_dir, data_dir, script, *flags, defaults=False)

    monkeypatch.setattr(sweep, "launch", launch)
    return commands


def test_a_sweep_is_one_student_of_each_size(launched, tmp_path, teacher_dir, data_dir, capsys):
    folder = tmp_path / "sweep"
    flags = ["--pretrained_model_name_or_path", teacher_dir, "--dataset_name", data_dir, "--student_init", "random"]
    flags += ["--max_train_steps", "1", "--train_batch_size", "4", "--validation_shown_samples", "0"]
    flags += ["--validation_num_inference_steps", "2", "--validation_feature_extractor", "assets/classifier"]
    flags += ["--validation_num_samples", "4", "--report_to", "none", "--output_dir", str(folder)]
    after = ["--evaluate", "--num_samples", "4", "--num_cpu_threads", "1", "--reference_cache_dir", str(tmp_path)]
    sweep.main(*sweep.parse_args(["--ratios", ".5", *flags, *after]))
    train, measure = ("train_place", False), ("evaluate_fid", False)
    assert launched == [("train_place", True), train, measure, measure]
    sweep.main(*sweep.parse_args(["--ratios", ".5", ".25", *flags, *after]))  # one more, and the rest is there
    assert launched[4:] == [("train_place", True), train, measure]
    state = json.loads((folder / "sweep.json").read_text())
    rows = [row for row in state["rows"] if row["size"] != "teacher"]  # as a crash leaves it between the two
    (folder / "sweep.json").write_text(json.dumps(state | {"rows": rows}))
    shutil.rmtree(folder / "teacher")
    sweep.main(*sweep.parse_args(["--ratios", ".5", ".25", *flags, *after]))
    assert launched[7:] == [measure]
    lines = (folder / "sweep.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| teacher", "| pruning-ratio-.5", "| pruning-ratio-.25"]
    parameters = [
        UNet2DModel.from_pretrained(folder / f"pruning-ratio-{r}" / "unet").num_parameters() for r in (".5",)
    ]
    assert f"{parameters[0] / 1e6:.3f} (" in lines[3] and (folder / "sweep.png").stat().st_size > 10_000
    with pytest.raises(UsageError, match="a sweep with other flags"):
        sweep.main(*sweep.parse_args(["--ratios", ".5", *flags, "--seed", "1", *after]))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ratios", ".5", "x"], "--ratios x: not a number"),
        (["--ratios", ".5", "--presets", "bk_tiny"], "not allowed with"),
        (["--ratios", ".5", "--student_config", "c"], "--student_config: the students' size"),
        (["--ratios", ".5", "1.5"], "1.5"),
        (["--ratios", ".5", "--max_train_step", "3"], "did you mean --max_train_steps"),
        (["--ratios", ".5", "--evaluate", "--metric", "kid"], "did you mean --metrics"),
        ([], "one of the arguments"),
    ],
)
def test_a_sweep_refuses_before_it_trains(launched, tmp_path, flags, said):
    with pytest.raises(UsageError, match=said):
        sweep.main(*sweep.parse_args(["--output_dir", str(tmp_path / "sweep"), *flags]))
    assert not launched


def test_a_killed_teacher_goes_on(tmp_path, monkeypatch):
    """Interrupted after the second of four steps, a teacher ends as it would have."""
    images, labels = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8), torch.arange(16) % 10
    monkeypatch.setattr(latent_teachers, "load_split", lambda split: (images, labels))
    monkeypatch.setattr(latent_teachers, "SAVING_STEPS", 2)
    monkeypatch.setattr(latent_teachers, "BATCH", 4)
    vae = latent_teachers.train_vae(tmp_path / "vae", 1)

    def make(folder: str, killed_at: int | None = None) -> None:
        pipeline, transformer, batch_loss = make_dit_teacher.DiTTeacher()(vae)
        asked = []

        def counted(*batch):
            if len(asked) == killed_at:
                raise KeyboardInterrupt
            asked.append(batch)
            return batch_loss(*batch)

        latent_teachers.train(pipeline, transformer, counted, tmp_path / folder, steps=4, rate=1e-3, seed=0)

    make("whole")
    with pytest.raises(KeyboardInterrupt):
        make("killed", killed_at=3)
    assert not (tmp_path / "killed").exists()
    make("killed", killed_at=2)  # which are left
    whole, killed = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[name], killed[name]) for name in whole) and not (tmp_path / "killed.state").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, gib", [("sd21_bk_tiny", "11.7"), ("dit_xl2_d4", "22.0"), ("ddpm_cifar10_place", "4.0")]
)
def test_the_documented_memory_of_a_recipe_is_what_is_estimated(recipe, gib):
    told = recipe_memory.estimate(recipe)
    assert f"{float(re.search(r'about ([0-9.]+) GiB', told)[1]):.1f}" == gib
    rows = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    assert any(recipe.rsplit("_", 1)[0] in row and gib in row for row in rows)


def test_a_recipe_of_an_unknown_teacher_has_no_estimate():
    with pytest.raises(UsageError, match="none of TEACHERS"):
        recipe_memory.estimate("ddpm_cifar10_place", "--pretrained_model_name_or_path", "somebody/other")
