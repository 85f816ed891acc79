# SPDX-License-Identifier: Apache-2.0
"""benchmarks/study.py: its rows can be run, the teacher's record changes no bit of them, and its tables add up."""

import json
import math
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import read_log
from latent_pipelines import save_captioned, save_classes, save_dit, save_pipeline, save_sd3
from safetensors.torch import load_file

import train_lift
import train_place
from utils.backbones.base import Backbone
from utils.backbones.ddpm import DDPM
from utils.backbones.dit import DiT
from utils.backbones.sd3 import SD3
from utils.backbones.stable_diffusion import StableDiffusion
from utils.command_line import UsageError
from utils.training.arguments import parse_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import recorded  # noqa: E402
import study  # noqa: E402
import study_jobs  # noqa: E402
import study_report  # noqa: E402
import study_rows  # noqa: E402


@pytest.fixture
def recording(run, tmp_path, monkeypatch):
    """`recording("train_place", *flags)`: (how often the teacher was asked, output folder)."""
    answer, asked = recorded.Record.answer, []

    def counted(self, question, ask):
        return answer(self, question, lambda: asked.append(1) or ask())

    def run_recorded(script: str, *flags, output: str, **options):
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Backbone, "predict", Backbone.predict)  # which comes back
            recorded.record_teacher(tmp_path / "record")
            return run(script, *flags, output=output, **options), len(asked)

    monkeypatch.setattr(recorded.Record, "answer", counted)
    return run_recorded


def test_a_row_with_the_record_equals_one_without(run, recording, tmp_path):
    plain = run("train_place", output="plain")
    recording("train_lift", "--output_loss", "mse", "--max_train_steps", "2", output="shorter")
    with open(tmp_path / "record" / "outputs.f32", "ab") as file:
        file.write(b"cut")  # by a kill
    folder, asked = recording("train_place", output="recorded")
    assert asked == 2 and read_log(folder) == read_log(plain)
    ours, theirs = (load_file(each / "unet" / "diffusion_pytorch_model.safetensors") for each in (folder, plain))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    with pytest.raises(ValueError, match="its step 0 is of another seed"):
        recording("train_place", "--seed", "1", output="another")


FEW = (
    "--max_train_steps 2 --train_batch_size 2 --validation_shown_samples 0 --report_to none --logging_steps 1".split()
)


def test_the_record_asks_what_a_latent_teacher_is_told(recording, run, tmp_path):
    teacher = save_pipeline(tmp_path / "teacher")
    flags = ["--pretrained_model_name_or_path", teacher, "--student_preset", "bk_tiny", *FEW]
    data = [save_captioned(tmp_path / name, captions=[name]) for name in ("shoe", "hat")]
    options = {"defaults": False}
    plain = run("train_place", *flags, "--train_data_dir", data[0], output="plain", **options)
    folder, asked = recording("train_place", *flags, "--train_data_dir", data[0], output="recorded", **options)
    assert asked == 2 and read_log(folder) == read_log(plain)
    with pytest.raises(ValueError, match="its step 0 is of another seed"):  # same pictures and noise, other captions
        recording("train_place", *flags, "--train_data_dir", data[1], output="other", **options)


def test_a_student_is_made_of_the_teacher_itself(recording, run, tmp_path):
    """Scores are gradients, of which a record has none."""
    teacher, data = save_sd3(tmp_path / "teacher", t5=False), save_captioned(tmp_path / "data")
    flags = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", data, *FEW, "--student_depth", "2"]
    flags += ["--layer_choice", "scored"]
    plain = run("train_place", *flags, output="plain", defaults=False)
    folder, asked = recording("train_place", *flags, output="recorded", defaults=False)
    assert asked == 2 and read_log(folder) == read_log(plain)


def test_the_record_refuses_predicted_variances(recording, tmp_path):
    teacher, data = save_dit(tmp_path / "teacher"), save_classes(tmp_path / "data")
    flags = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", data, "--student_depth", "2", *FEW]
    with pytest.raises(ValueError, match="predicts variances"):
        recording("train_place", *flags, output="student", defaults=False)


@pytest.mark.filterwarnings("error:.*no effect here")
def test_every_row_is_a_command(tmp_path):
    families = {"text": StableDiffusion, "dit": DiT, "flow": SD3}
    names = [(setting, name) for stage in study_rows.STAGES.values() for setting in stage for name in stage[setting]]
    assert len({*names}) == len(names) and {name for _, name in names} == {*study_rows.ROWS}
    parsed = {}
    for setting, name in names:
        row = study_rows.ROWS[name]
        rates = study_rows.SETTINGS[setting].family.rates
        tuned = study_rows.ROWS[row.tuned_as or name].grid(rates)
        assert not study_rows.ROWS[row.tuned_as or name].tuned_as and 2 <= len(tuned) <= 4
        flags = study.row_flags(setting, name, tuned[-1], seed=0, steps=9, data="d", teacher="t")
        method = {"train_lift.py": train_lift, "train_place.py": train_place}[row.script].add_method_arguments
        args = parse_args("", method, [*study_rows.COMMON, *flags, "--output_dir", str(tmp_path / "none")])
        parsed[setting, name] = args
        families.get(study_rows.SETTINGS[setting].teacher, DDPM).check_flags(args)  # none that it refuses or ignores
        assert args.learning_rate == float(rates[-1]) and args.max_train_steps == 9
    assert parsed["random", "PLACE, coarse only"].lambda_kd_output == pytest.approx(1e-5)  # of a term a million times
    assert parsed["taylor", "w/o KD, balanced"].lambda_kd_output == 0
    assert study.record_of(tmp_path, "mse + FeatKD", "t", "all", 0) is None


def test_a_shipped_teacher_is_taken_with_its_captions(tmp_path, monkeypatch):
    monkeypatch.chdir(study.ROOT)
    assert study.teacher_of("flow", tmp_path) == "assets/flow_teacher"
    assert study.teacher_of("dit", tmp_path) == "assets/dit_teacher"
    rows = datasets.load_dataset(study.data_of("flow", tmp_path), split="test", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 10_000 and rows[0]["text"] == "an ankle boot"
    prompts = (study.ROOT / study_rows.SETTINGS["flow"].family.prompts).read_text().splitlines()
    assert {*prompts} == {*rows["text"]}


def test_differences_are_paired():
    mean, error, count = study_report.paired({0: 5.0, 1: 7.0, 2: 6.0, 9: 0.0}, {0: 4.0, 1: 5.0, 2: 3.0})
    assert (mean, count) == (2, 3) and error == pytest.approx(1 / math.sqrt(3))
    assert study_report.verdict(mean, error, count) == "**+2.00 +- 0.58**"
    assert study_report.verdict(1.0, 0.58, 3) == study_report.verdict(1.0, 0.58, 2) == "+1.00 +- 0.58"
    assert study_report.verdict(mean, error, 2) == "+2.00 +- 0.58"  # of two, the spread is a guess
    assert study_report.verdict(*study_report.paired({0: 1.0}, {0: 2.0})) == "-1.00"  # of one seed nothing is said


def results(folder: Path, name: str, *records: dict) -> None:
    (folder / f"{name}.json").write_text(json.dumps(records))


def test_a_seed_is_finished_where_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(study_jobs, "RESULTS", tmp_path)
    results(tmp_path, "stage_1", {"setting": "random", "seed": 0, "cpu": "other"})
    with pytest.raises(UsageError, match="--settings random --seeds 0: stage_1.json has rows of these from other"):
        study_jobs.Results("stage_2", "setting", "row", "seed").check_machine("random", 0)  # compared across stages
    for setting, seed in (("random", 1), ("taylor", 0)):
        study_jobs.Results("stage_1", "setting", "row", "seed").check_machine(setting, seed)


def test_variants_get_a_plot_of_their_own_where_they_are_many():
    few, many = dict.fromkeys(study_rows.BASELINES, []), dict.fromkeys(study_rows.ROWS, [])
    assert study_report.pictures_of(few) == {"": few}
    plain, own = study_report.pictures_of(many).values()
    assert {*plain} == {*study_rows.BASELINES, "log"} and {"PLACE", "PLACE, balanced", "PLACE, signed"} < {*own}
    assert {*plain} | {*own} == {*many} and max(len(plain), len(own)) <= 20  # two styles of ten colours


def test_the_report_adds_up(tmp_path):
    def record(row: str, seed: int, distance: float, training: float) -> dict:
        curves = {"error_to_teacher": [1.0] * 20, "gradient_norm": [1.0] * 20}
        return {
            **{"setting": "random", "row": row, "seed": seed, "probe": {"start": curves, "end": curves}},
            **{"cpu": "a", "commit": "b", "versions": {"torch": "1"}},
            "metrics": {"frechet_distance": distance, "precision": 0.5, "recall": 0.25},
            "cpu_seconds": {"training": training, "samples": 5.0},
        }

    results(tmp_path, "stage_1", *(record("mse", seed, 10.0 + seed, 10) for seed in range(3)))
    results(tmp_path, "stage_2", *(record("log", seed, 8.0 + seed / 2, 20) for seed in range(3)))
    results(tmp_path, "rounding", {**record("mse", 1, 12.5, 10), "cpu": "z"}, record("l1", 1, 9.0, 10))
    study_report.report(tmp_path, {"random": study_rows.SETTINGS["random"]})
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "| log | 8.50 (8.00 to 9.00) | **-2.50 +- 0.29** | 0.500 (0.500 to 0.500) " in lines[12]
    assert lines[12].endswith("| 0.250 (0.250 to 0.250) | 3 | 25 |") and lines[13].startswith(
        "| mse | 11.00 (10.00 to"
    )
    assert (tmp_path / "random.png").stat().st_size > 10_000 and "- a, commit b, torch 1" in lines
    assert "| mse, random, 1 | a: 11.00 | z: 12.50 |" in lines and not any(line.startswith("| l1,") for line in lines)
