# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact resume, faults, damage, refusals."""

import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import build_unet, read_log, run_script, save_images
from diffusers import DDPMPipeline, DDPMScheduler
from forks import Process
from safetensors.torch import load_file, save_file

import train_place
import utils.data.rows
import utils.distillation.balance
from utils.flags import check_output_folder
from utils.output_dir import check_output_dir, lock_output_dir, unlock_output_dir
from utils.training import checkpoint, schedules
from utils.training.log import RunLog

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = (
    "--max_train_steps 6 --train_batch_size 5 --gradient_accumulation_steps 2 --checkpointing_steps 2 --use_ema "
    "--checkpoints_total_limit 9 --logging_steps 4 --lambda_kd_feat 1 --random_flip --learning_rate 1e-3 "
    "--lr_scheduler cosine --lr_warmup_steps 2 --weighting linear --timestep_balance 0.5 --task_balance 1 "
    "--min_lr_rate 0.5 --feature_weighting linear --feature_mask_sigma 2"
).split()
RUN = "--pretrained_model_name_or_path teacher --dataset_name data --pruning_ratio 0.5 --output_dir none".split()


@pytest.fixture(scope="module")
def dropout_teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("dropout")
    DDPMPipeline(build_unet(dropout=0.2), DDPMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teacher_dir, data_dir) -> Path:
    """One run with checkpoints of steps 2 and 4, which `stopped` copies."""
    folder = tmp_path_factory.mktemp("trained")
    return run_script(folder, teacher_dir, data_dir, "train_place", "--checkpointing_steps", "2", "--use_ema")


@pytest.fixture
def stopped(trained, tmp_path) -> Path:
    """That run where the fixture `run` goes on, to be damaged at will."""
    return shutil.copytree(trained, tmp_path / "student")


@pytest.fixture
def go_on(run, stopped):
    """`go_on(*flags)` resumes `stopped` from its newest checkpoint."""
    return functools.partial(
        run, "train_place", "--checkpointing_steps", "2", "--use_ema", "--resume_from_checkpoint", "latest"
    )


@pytest.fixture
def rows_seen(monkeypatch):
    """The row ids of every micro-step, in order."""
    seen = []
    original = train_place.training_batches

    def spy(*args, **kwargs):
        for batch, rng in original(*args, **kwargs):
            seen.append(batch["row"].tolist())
            yield batch, rng

    monkeypatch.setattr(train_place, "training_batches", spy)
    return seen


def cut_back(folder: Path, step: int) -> None:
    """The folder as a kill after the checkpoint of `step` leaves it: later checkpoints and the export are gone."""
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "unet")


def assert_same_run(ours: Path, theirs: Path, step: int = 6) -> None:
    for name in ("student", "ema", "optimizer"):
        pair = [load_file(run / "checkpoints" / f"step-{step:07d}" / f"{name}.safetensors") for run in (ours, theirs)]
        assert pair[0].keys() == pair[1].keys()
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0]), name
    states = [
        json.loads((run / "checkpoints" / f"step-{step:07d}" / "state.json").read_text()) for run in (ours, theirs)
    ]
    for key in ("step", "lr_scheduler", "optimizer", "ema"):
        assert states[0][key] == states[1][key]
    assert states[0]["states"]["balance"] == states[1]["states"]["balance"]
    assert (ours / "log.jsonl").read_text() == (theirs / "log.jsonl").read_text()


@pytest.fixture(scope="module")
def wholes() -> dict[int, tuple[Path, list]]:
    """Data workers -> the run that nothing stopped, and its rows: made by the first test that compares with it."""
    return {}


@pytest.mark.parametrize(
    ("stop_at", "workers"),  # 20 rows: in epoch 1; 40 rows: in epoch 2 of 24
    [(2, 2), (4, 0), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_resume_is_exact(run, wholes, rows_seen, dropout_teacher, tmp_path, monkeypatch, workers, stop_at):
    monkeypatch.setattr(utils.distillation.balance, "ENOUGH", 1)  # as if many more samples had been seen
    if workers:
        monkeypatch.setattr(utils.data.rows, "HOLD_IN_MEMORY_BYTES", 0)
    flags = ["--pretrained_model_name_or_path", dropout_teacher, *EVERYTHING, "--dataloader_num_workers", workers]
    if workers not in wholes:
        wholes[workers] = run("train_place", *flags, output="whole"), rows_seen.copy()
    whole, rows_whole = wholes[workers]
    start = load_file(whole / "checkpoints" / "step-0000002" / "student.safetensors")
    end = load_file(whole / "checkpoints" / "step-0000006" / "student.safetensors")
    assert all((start[name] - end[name]).abs().max() > 1e-4 for name in start if name.endswith("conv1.weight"))
    assert any(name.startswith("projectors") for name in start)
    assert [line["step"] for line in read_log(whole)] == [4, 6]

    shutil.copytree(whole, tmp_path / "resumed")
    cut_back(tmp_path / "resumed", stop_at)
    rows_seen.clear()
    # seeding differs: `run` seeds by the number of words
    resumed = run("train_place", *flags, "--resume_from_checkpoint", "latest", output="resumed")
    assert rows_seen == rows_whole[2 * stop_at :] and len(rows_seen[0]) == 5
    assert_same_run(whole, resumed)


@pytest.fixture
def script_process(python):
    """train_place.py in a new process with its own ambient seed, after `code`."""

    def start(*flags, seed: int, code: str = "pass") -> Process:
        command = (
            f"import random, numpy, torch; random.seed({seed}); numpy.random.seed({seed}); torch.manual_seed({seed});"
            f"{code}; import sys, train_place, utils.command_line as c; c.call(train_place, sys.argv[1:])"
        )
        return python.start("-c", command, *flags)

    return start


def flags_for(teacher: str, data: str, folder: Path) -> list[str]:
    flags = ["--pretrained_model_name_or_path", teacher, "--dataset_name", data, "--pruning_ratio", "0.5"]
    flags += [
        "--student_init",
        "magnitude",
        "--validation_shown_samples",
        "0",
        "--validation_num_inference_steps",
        "2",
    ]
    flags += ["--report_to", "none", "--num_cpu_threads", "1"]
    return [*flags, *EVERYTHING, "--output_dir", str(folder)]


def signal_in_a_window(number: signal.Signals) -> str:
    """Code that sends the signal in the middle of the accumulation window of step 3."""
    return (
        "import os, signal, utils.training.log as L; f, n = L.RunLog.add, [0]\n"
        f"def g(*a, **k):\n n[0] += 1\n n[0] == 5 and os.kill(os.getpid(), {int(number)})\n return f(*a, **k)\n"
        "L.RunLog.add = g\npass"
    )


@pytest.mark.parametrize(  # SIGTERM is that of `test_a_new_process_goes_on_exactly`
    "number", [signal.SIGUSR1, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_saves_and_says_how_to_go_on(script_process, dropout_teacher, data_dir, tmp_path, number):
    flags = flags_for(dropout_teacher, data_dir, tmp_path / "out")
    launched = "import os; os.environ['ACCELERATE_MIXED_PRECISION'] = 'no'\n"
    stopped = script_process(*flags, seed=1, code=launched + signal_in_a_window(number))
    assert stopped.wait() == 128 + number, stopped.stderr[-2000:]
    assert ("accelerate's own account of Ctrl-C" in stopped.stdout) == (number == signal.SIGINT)
    assert "--resume_from_checkpoint latest" in stopped.stdout and "step 3" in stopped.stdout
    assert (tmp_path / "out" / "checkpoints" / "step-0000003").is_dir()


@pytest.mark.slow
def test_a_new_process_goes_on_exactly(run, script_process, dropout_teacher, data_dir, tmp_path):
    flags = flags_for(dropout_teacher, data_dir, tmp_path / "stopped")
    stopped = script_process(*flags, seed=1, code=signal_in_a_window(signal.SIGTERM))
    assert stopped.wait() == 128 + signal.SIGTERM, stopped.stderr[-2000:]
    resumed = script_process(*flags, "--resume_from_checkpoint", "latest", seed=2)
    assert resumed.wait() == 0, resumed.stderr[-2000:]
    whole = run("train_place", *flags[:-2], output="whole")
    assert_same_run(tmp_path / "stopped", whole)


def test_a_second_signal_ends_at_once(script_process, dropout_teacher, data_dir, tmp_path):
    code = (
        "import os, signal, time, utils.training.log as L\n"
        "def g(*a, **k):\n os.kill(os.getpid(), 15); os.kill(os.getpid(), 15); time.sleep(600)\n"
        "L.RunLog.add = g\npass"
    )
    process = script_process(*flags_for(dropout_teacher, data_dir, tmp_path / "out"), seed=1, code=code)
    assert process.wait() == 128 + 15
    assert not list((tmp_path / "out" / "checkpoints").glob("step-*"))


def test_the_time_limit_stops_like_a_signal(run, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run("train_place", "--max_train_minutes", "1e-9")
    assert stop.value.code == 124 and "--resume_from_checkpoint latest" in capsys.readouterr().out
    folder = run("train_place", "--resume_from_checkpoint", "latest")  # a limit is harmless to change
    assert (folder / "unet").is_dir()


def test_after_the_loop_signals_do_what_they_did(run, monkeypatch):
    handlers, card = [], train_place.write_card

    def spy(*args, **kwargs):
        handlers.append([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)])
        return card(*args, **kwargs)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    monkeypatch.setattr(train_place, "write_card", spy)
    run("train_place", "--max_train_steps", "1")
    assert handlers == [before]


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(script_process, dropout_teacher, data_dir, tmp_path):
    flags = flags_for(dropout_teacher, data_dir, tmp_path / "out")
    # room for everything up to step 2; then the limit falls below a checkpoint's files
    code = (
        "import resource, utils.training.checkpoint as C; w = C.Checkpoints._write\n"
        "def g(self, folder, step, records):\n"
        " step > 2 and resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        " return w(self, folder, step, records)\n"
        "C.Checkpoints._write = g\npass"
    )
    process = script_process(*flags, seed=1, code=code)
    assert process.wait() != 0
    assert "step 4 could not be written" in process.stderr and "step-0000002" in process.stderr
    assert [path.name for path in sorted((tmp_path / "out" / "checkpoints").iterdir())] == ["step-0000002"]
    resumed = script_process(*flags, "--resume_from_checkpoint", "latest", seed=2)
    assert resumed.wait() == 0, resumed.stderr[-2000:]


def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch, tmp_path):
    original, calls = train_place.place_loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        kd = original(*args, **kwargs)
        return kd._replace(loss=kd.loss * float("nan")) if len(calls) == 3 else kd

    monkeypatch.setattr(train_place, "place_loss", poisoned)
    flags = ["--checkpointing_steps", "2", "--logging_steps", "50"]
    with pytest.raises(FloatingPointError, match=r"since step 3: loss nan, task [\d.]+.*learning rate.*step-0000002"):
        run("train_place", *flags)
    assert [path.name for path in (tmp_path / "student" / "checkpoints").iterdir()] == ["step-0000002"]


def test_a_gradient_that_is_not_finite_stops_the_run(run, monkeypatch, tmp_path):
    original, calls = train_place.place_loss, []

    def poisoned(student_pred, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            student_pred.register_hook(lambda gradient: gradient * float("inf"))
        return original(student_pred, *args, **kwargs)

    monkeypatch.setattr(train_place, "place_loss", poisoned)
    with pytest.raises(FloatingPointError, match="gradient is not finite since step 3: .*step-0000002"):
        run("train_place", "--max_train_steps", "3", "--checkpointing_steps", "2", "--logging_steps", "50")
    assert [path.name for path in (tmp_path / "student" / "checkpoints").iterdir()] == ["step-0000002"]


def test_rotation_keeps_the_newest(run):
    folder = run("train_place", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-0000003", "step-0000004"]


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_named_and_the_one_before_offered(go_on, stopped, name, damage):
    path = stopped / "checkpoints" / "step-0000004" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + (b"" if damage == "truncated" else b"\xff" + content[middle + 1 :]))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        go_on()
    assert "step-0000002" in str(error.value)


def test_fewer_steps_than_were_made_are_refused(go_on):
    with pytest.raises(ValueError, match="--max_train_steps is 3, and .* of step 4 already. Give that number to exp"):
        go_on("--max_train_steps", "3")


def test_the_one_before_can_be_resumed(run, trained, stopped):
    checkpoint = stopped / "checkpoints" / "step-0000004"
    (checkpoint / "state.json").write_text("{")
    run(
        "train_place",
        "--use_ema",
        "--checkpointing_steps",
        "2",
        "--resume_from_checkpoint",
        checkpoint.parent / "step-0000002",
    )
    assert_same_run(stopped, trained, step=4)


def test_leftovers_of_a_killed_process_are_no_checkpoints(go_on, stopped):
    for name in (".step-0000009.partial", ".step-0000001.removed"):
        shutil.copytree(stopped / "checkpoints" / "step-0000002", stopped / "checkpoints" / name)
    (stopped / "checkpoints" / ".step-0000005.partial").write_text("a file")
    go_on("--max_train_steps", "5")
    names = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    assert names == ["step-0000004", "step-0000005"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--train_batch_size", "8"], "train_batch_size was 4, is 8"),
        (["--seed", "7"], "seed was 0, is 7"),
        (["--group_size", "8"], "group_size was 16, is 8"),
        (["--lambda_task", "0.5"], "lambda_task was 1.0, is 0.5"),
        (["--learning_rate", "1e-3"], "learning_rate was"),
        (["--timestep_balance", "1", "--task_balance", "1"], "task_balance was 0.0, is 1.0; timestep_balance was 0.0"),
        (["--max_train_samples", "20"], "max_train_samples was None, is 20"),
        (["--pruning_ratio", "0.3"], "pruning_ratio was 0.5, is 0.3"),
    ],
)
def test_other_arguments_are_refused_by_name(go_on, flags, named):
    if "--pruning_ratio" in flags:
        flags = [*flags, "--student_init", "magnitude"]  # which `run` gives with its own ratio alone
    with pytest.raises(ValueError, match=named):
        go_on(*flags)


def test_changed_data_is_noticed(run, tmp_path, data_dir):
    shutil.copytree(data_dir, tmp_path / "data")
    run("train_place", "--dataset_name", tmp_path / "data", "--max_train_steps", "1")
    shutil.rmtree(tmp_path / "data")
    save_images(tmp_path / "data", seed=1)
    with pytest.raises(ValueError, match="data was"):
        run("train_place", "--dataset_name", tmp_path / "data", "--resume_from_checkpoint", "latest")


def test_allow_changed_arguments(go_on, caplog):
    changed = ["--learning_rate", "1e-5", "--adam_weight_decay", "0.5", "--ema_decay", "0.5"]
    folder = go_on("--allow_changed_arguments", "--max_train_steps", "5", *changed)
    assert "learning_rate was 0.0002, is 1e-05" in caplog.text
    assert read_log(folder)[-1]["learning_rate"] == 1e-5  # and not what the checkpoint has
    state = json.loads((folder / "checkpoints" / "step-0000005" / "state.json").read_text())
    group = state["optimizer"]["param_groups"][0]
    assert group["lr"] == group["initial_lr"] == 1e-5 and group["weight_decay"] == state["ema"]["decay"] == 0.5


CURVES = [
    (
        ["--lr_scheduler", "cosine", "--weighting", "linear"],
        "max_train_steps was 4, is 8, which --lr_scheduler cosine follows .the learning rate after step 2 was to be "
        "0.0001, is 0.000171; at the end it was to be 0, is 0.*max_train_steps was 4, is 8, which --weighting linear "
        "follows .the weight of the fine term after step 2 was to be 0.5, is 0.25",
    ),
    (
        ["--lr_scheduler", "cosine", "--min_lr_rate", "0.5"],
        "was to be 0.00015, is 0.000185; at the end it was to be 0.0001",
    ),
    (
        ["--lambda_kd_feat", "1", "--feature_weighting", "linear"],
        "--feature_weighting linear follows .the weight of the feature loss after step 2 was to be 0.5, is 0.75; "
        "at the end it was to be 0, is 0",
    ),
    (["--lambda_kd_feat", "1", "--feature_weighting", "constant"], None),
    (["--lr_scheduler", "polynomial"], "after step 2 was to be 0.0001, is 0.00015; at the end it was to be 1e-07, is"),
    (["--lr_scheduler", "linear", "--lr_warmup_steps", "1"], "was to be 0.000133, is 0.000171"),
    (["--lr_scheduler", "cosine_with_restarts"], "was to be 0.0001, is 0.000171"),
    (["--weighting", "cosine"], "the weight of the fine term after step 2 was to be 0.5, is 0.146"),
    (["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "3"], None),
    (["--weighting", "constant"], None),
    (["--weighting", "cosine", "--lambda_kd_output", "0"], None),
]


@pytest.mark.filterwarnings("ignore:--weighting has no effect here")
@pytest.mark.parametrize(("flags", "said"), CURVES, ids=lambda value: " ".join(value or ()) * isinstance(value, list))
def test_curves_that_follow_the_length_are_compared(flags, said):
    then, now = (
        vars(train_place.parse_args("", train_place.add_method_arguments, [*RUN, *flags, "--max_train_steps", steps]))
        for steps in ("4", "8")
    )
    found = schedules.changed_curves(then, now, 2, peaks=(2e-4, 2e-4), rate_step=2)
    assert re.search(said, "; ".join(found)) if said else not found
    assert not schedules.changed_curves(then, then, 2, peaks=(2e-4, 2e-4), rate_step=2)


def test_another_length_under_a_curve_is_another_run(run, caplog):
    cosine = ["train_place", "--lr_scheduler", "cosine"]
    run(*cosine, "--max_train_steps", "2")
    longer = [*cosine, "--resume_from_checkpoint", "latest", "--max_train_steps", "4"]
    with pytest.raises(ValueError, match="another run: max_train_steps was 2, is 4, .*--allow_changed_arguments"):
        run(*longer)
    folder = run(*longer, "--allow_changed_arguments")
    assert "after step 2 was to be 0, is 0.0001; at the end it was to be 0, is 0" in caplog.text
    assert [line["learning_rate"] for line in read_log(folder)[2:]] == pytest.approx([2.93e-5, 0], abs=1e-7)


def test_latest_without_a_checkpoint_begins_anew_and_says_so(run, tmp_path):
    """As a requeued job needs: before its first start, and after one that died before its first checkpoint."""
    plain = run("train_place", output="plain")
    for output, left in (("first", None), ("again", '{"step": 1, "loss": 9}\n')):
        if left:
            (tmp_path / output / "checkpoints" / ".step-0000002.1.partial").mkdir(parents=True)
            (tmp_path / output / "log.jsonl").write_text(left)
        nothing = f"--resume_from_checkpoint latest: no checkpoint in {tmp_path / output / 'checkpoints'}, so this run"
        with pytest.warns(UserWarning, match=re.escape(nothing)):
            folder = run("train_place", "--resume_from_checkpoint", "latest", output=output)
        assert read_log(folder) == read_log(plain)


def test_a_finished_student_without_checkpoints_is_not_begun_anew(run, tmp_path):
    shutil.rmtree(run("train_place") / "checkpoints" / "step-0000004")
    with pytest.raises(ValueError, match="has no checkpoint"):
        run("train_place", "--resume_from_checkpoint", "latest")


def test_a_checkpoint_of_an_earlier_version_is_refused(run):
    state_file = run("train_place") / "checkpoints" / "step-0000004" / "state.json"
    state = json.loads(state_file.read_text())
    del state["format"]
    state_file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="earlier version.*--latent_cache_dir"):
        run("train_place", "--resume_from_checkpoint", "latest")


def test_flags_that_an_earlier_version_did_not_have_are_off_in_its_checkpoints(stopped, run):
    state_file = stopped / "checkpoints" / "step-0000004" / "state.json"
    state = json.loads(state_file.read_text())
    for name in checkpoint.ADDED_ARGUMENTS:
        assert state["arguments"].pop(name) == checkpoint.ADDED_ARGUMENTS[name]
    state_file.write_text(json.dumps(state))
    again = ["train_place", "--checkpointing_steps", "2", "--use_ema", "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="min_lr_rate was 0.0, is 0.5"):
        run(*again, "--lr_scheduler", "cosine", "--min_lr_rate", "0.5")
    run(*again)


def test_resume_from_what_is_no_checkpoint(run, tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        run("train_place", "--resume_from_checkpoint", tmp_path)
    assert not (tmp_path / "student").exists()


def test_another_student_is_refused(go_on, stopped):
    checkpoint = stopped / "checkpoints" / "step-0000004"
    wrong = {"denoiser.conv_in.weight": torch.zeros(3)}
    save_file(wrong, checkpoint / "student.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"]["student.safetensors"] = hashlib.sha256(
        (checkpoint / "student.safetensors").read_bytes()
    ).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="another student"):
        go_on()


def test_an_occupied_folder_is_not_touched(run, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        run("train_place")
    assert (tmp_path / "student" / "thesis.txt").read_text() == "years"
    folder = run("train_place", "--overwrite_output_dir", "--max_train_steps", "1")
    assert not (folder / "thesis.txt").exists()


@pytest.mark.parametrize("folder", [".", "..", "data"])
def test_overwriting_never_deletes_what_the_run_needs(run, tmp_path, data_dir, monkeypatch, folder):
    (tmp_path / "here").mkdir()
    shutil.copytree(data_dir, tmp_path / "here" / "data")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="--overwrite_output_dir would delete"):
        run("train_place", "--dataset_name", "data", "--output_dir", folder, "--overwrite_output_dir")
    assert (tmp_path / "here" / "data" / "data").is_dir()


def test_an_output_folder_that_cannot_be_written(run):
    with pytest.raises(ValueError, match="--output_dir /proc/student cannot be written"):
        run("train_place", "--output_dir", "/proc/student")


def test_a_refused_run_leaves_no_folders(run, tmp_path):
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path"):
        run("train_place", "--pretrained_model_name_or_path", tmp_path / "none", output="new/nested/student")
    assert not (tmp_path / "new").exists()


def test_dry_run_leaves_nothing(run, ornaments, capsys):
    folder = run("train_place", "--dry_run")
    assert not folder.exists()
    printed = capsys.readouterr().out
    assert "memory       about" in printed and "parameters" in printed and "Saved" not in printed


# What else lies in the folders, and who else writes to them


def test_stray_files_break_neither_resume_nor_save(go_on, stopped):
    """Of file managers and network drives, and copies that a user has made."""
    folder, newest = stopped / "checkpoints", stopped / "checkpoints" / "step-0000004"
    strays = [".DS_Store", "Thumbs.db", "._step-0000004", "step-0000005.zip", "step-0000006"]
    files = [*(folder / name for name in strays), newest / ".DS_Store", newest / "._student.safetensors"]
    for path in (*files, stopped / ".DS_Store"):
        path.write_bytes(b"stray")
    copies = [folder / name for name in ("step-0000004 copy", "step-old", "@eaDir", ".hidden")]
    for path in (*copies, newest / "@eaDir"):
        path.mkdir()
    state = json.loads((newest / "state.json").read_text())
    state["sha256"][".DS_Store"] = hashlib.sha256(b"stray").hexdigest()  # as an earlier version wrote it
    (newest / "state.json").write_text(json.dumps(state))
    go_on("--max_train_steps", "6", "--checkpoints_total_limit", "1")
    assert all(path.exists() for path in copies)
    assert json.loads((folder / "step-0000006" / "state.json").read_text())["step"] == 6  # a file had its name
    assert sorted(path.name for path in folder.iterdir()) == sorted([*strays, *(path.name for path in copies)])


def test_a_folder_of_strays_is_an_empty_one(tmp_path):
    for name in (".DS_Store", "._student", "Thumbs.db", ".nfs0001", ".lock"):
        (tmp_path / name).touch()
    check_output_folder(Namespace(output_dir=tmp_path), "is not empty", unless=False)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        check_output_folder(Namespace(output_dir=tmp_path), "is not empty", unless=False)


def test_what_cannot_be_synced_is_warned_of_once(ornaments, tmp_path, monkeypatch, caplog):
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState()  # which the logger asks for its rank
    real, code = os.fsync, [errno.EINVAL]

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") or code[0] != errno.EINVAL:
            raise OSError(code[0], os.strerror(code[0]))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "file").write_text("content")
    for path in (tmp_path, tmp_path / "file", tmp_path):
        checkpoint._sync_to_disk(path)
    assert caplog.text.count("cannot be asked for folders") == 1 and "files" not in caplog.text
    code[0] = errno.ENOTSUP
    checkpoint._sync_to_disk(tmp_path / "file")
    assert caplog.text.count("cannot be asked for files") == 1
    for full in (errno.ENOSPC, errno.EIO):
        code[0] = full
        with pytest.raises(OSError, match=os.strerror(full)):
            checkpoint._sync_to_disk(tmp_path / "file")


@pytest.fixture
def other_run():
    """`other_run(folder)`: another process has locked it, and lives until the test ends."""
    code = "import sys; from utils.output_dir import lock_output_dir as f; f(sys.argv[1]); print(); sys.stdin.read()"
    processes = []

    def start(folder: Path) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, **pipes))
        processes[-1].stdout.readline()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_in_a_folder_is_refused(run, other_run, tmp_path):
    folder = tmp_path / "student"
    other = other_run(folder)
    message = (
        rf"--output_dir .*student: another run is writing to it .process {other.pid} of .*, since .*another folder"
    )
    with pytest.raises(ValueError, match=message):  # before the teacher loads
        run("train_place", "--pretrained_model_name_or_path", "none", "--overwrite_output_dir")
    with pytest.raises(ValueError, match=message):  # where both began in the same moment
        lock_output_dir(folder)
    other.kill()
    other.wait()
    assert (folder / ".lock").exists()  # which means nothing without its process
    check_output_dir(folder)
    lock_output_dir(folder)
    lock_output_dir(folder)  # ours already
    check_output_dir(folder)
    code = f"from utils.output_dir import check_output_dir as f; f({str(folder)!r})"
    refused = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"process {os.getpid()} of" in refused.stderr
    shutil.rmtree(folder)
    lock_output_dir(folder)  # made anew
    unlock_output_dir(folder)
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_locked_is_warned_of(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.*would not be noticed"):
        lock_output_dir(tmp_path)
    check_output_dir(tmp_path)


def test_half_a_line_of_the_log_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    args = Namespace(output_dir=tmp_path, learning_rate=1)
    RunLog(args, Namespace(is_main_process=True), 1000).drop_after(1)
    assert read_log(tmp_path) == [{"step": 1, "loss": 2}]
