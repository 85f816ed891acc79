# SPDX-License-Identifier: Apache-2.0
"""Every command that a script prints is run, word for word, from another folder than the one it was printed in."""

import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from forks import ROOT, Process
from PIL import Image
from test_contract import COMMON, KINDS, NO_SAMPLES, SLOW

NAME = """it's "one" $HOME & more"""  # a folder's, of the kind that a shell takes for something else
CPU = {"ACCELERATE_USE_CPU": "true"}


def command_after(printed: str, beginning: str) -> str:
    """The command on the line below the one that holds `beginning`."""
    lines = printed.splitlines()
    (place,) = (i for i, line in enumerate(lines) if beginning in line)
    assert lines[place + 1].startswith("    ")
    return lines[place + 1].strip()


def run_in(folder: Path, line: str, python, **environment) -> Process:
    """What a shell does with the line in `folder`: `cd` first, where it begins so. The words are a shell's; the
    process is a fork, as it would take seconds to import all."""
    words = shlex.split(line)
    if words[0] == "cd":
        assert words[2] == "&&"
        folder, words = Path(folder) / words[1], words[3:]
    assert shutil.which(words[0]) == shutil.which(sys.executable) or words[0] == sys.executable, words
    return python.run(*words[1:], cwd=folder, **environment)


def run_by_shell(folder: Path, line: str, **environment) -> subprocess.CompletedProcess:
    """By the shell itself."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, **environment}
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, env=variables)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in KINDS])
def kind(request, tmp_path):
    return KINDS[request.param](tmp_path / "kind")


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """Another folder."""
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.fixture(autouse=True)
def _python_is_found(monkeypatch):
    """As in an environment that is active."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


# Next: a sample


def test_a_student_samples_as_its_run_says(kind, python, elsewhere, capsys):
    steps = ["--max_train_steps", "1", "--validation_num_inference_steps", "3"]
    kind.run(NAME, *NO_SAMPLES, *steps)
    line = command_after(capsys.readouterr().out, "Next: a picture")
    assert "num_inference_steps=3" in line
    done = run_in(elsewhere, line, python)
    assert done.returncode == 0, done.stderr[-3000:]
    side = 32 if kind.cached else 8
    assert Image.open(elsewhere / "sample.png").size == (side, side)


@pytest.mark.slow
def test_a_student_with_adapters_samples_with_them(python, elsewhere, capsys, tmp_path):
    kind = KINDS["sd1"](tmp_path / "kind")
    kind.run(NAME, *NO_SAMPLES, "--max_train_steps", "1", "--lora_rank", "2", "--validation_num_inference_steps", "2")
    line = command_after(capsys.readouterr().out, "Next: a picture")
    assert "load_lora_weights" in line
    assert run_by_shell(elsewhere, line).returncode == 0 and (elsewhere / "sample.png").is_file()


# Go on


def stopped_flags(kind, folder: Path) -> list[str]:
    """A run that stops itself after each step. Its data are named as they are seen from where it is started."""
    flags = ["--pretrained_model_name_or_path", kind.teacher, *COMMON.split(), *kind.flags, *kind.data, *NO_SAMPLES]
    flags += [
        "--output_dir",
        NAME,
        "--overwrite_output_dir",
        "--max_train_minutes",
        "1e-9",
        "--hub_token",
        "hf_secret",
    ]
    return [str(Path(flag).relative_to(folder)) if isinstance(flag, Path) else flag for flag in flags]


def test_a_stopped_run_goes_on_as_it_says(python, elsewhere, tmp_path):
    kind = KINDS["ddpm"](tmp_path / "kind")
    stopped = python.run(ROOT / "train_place.py", *stopped_flags(kind, tmp_path), cwd=tmp_path)
    assert stopped.returncode == 124, stopped.stderr[-3000:]
    line = command_after(stopped.stdout, "Stopped at step 1,")
    assert "hf_secret" not in line and "***" not in line
    again = run_in(elsewhere, line, python)
    assert again.returncode == 124 and "Stopped at step 2," in again.stdout, again.stderr[-3000:]
    assert command_after(again.stdout, "Stopped at step 2,") == line  # however often it is stopped
    checkpoints = (tmp_path / NAME / "checkpoints").iterdir()
    assert sorted(path.name for path in checkpoints) == ["step-0000001", "step-0000002"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, code",
    [
        (["python"], 124),
        (["accelerate", "launch", "-q", "--cpu", "--num_processes", "1"], 1),
        (["torchrun", "--nproc_per_node", "2"], 1),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_stopped_run_goes_on_by_its_launcher(elsewhere, tmp_path, launcher, code):
    kind = KINDS["ddpm"](tmp_path / "kind")
    words = [*launcher, str(ROOT / "train_place.py"), *stopped_flags(kind, tmp_path)]
    stopped = run_by_shell(tmp_path, shlex.join(words), **CPU)
    assert stopped.returncode == code, stopped.stderr[-3000:]
    line = command_after(stopped.stdout, "Stopped at step 1,")
    assert f"{shlex.join(launcher)} {ROOT}" in line.replace(f"{Path(sys.executable).parent}/", "")
    again = run_by_shell(elsewhere, line, **CPU)
    assert again.returncode == code and "Stopped at step 2," in again.stdout, again.stderr[-3000:]


# Next: where the error lies


@pytest.mark.parametrize("known_by", ["--compare_to", pytest.param("its own files", marks=pytest.mark.slow)])
def test_an_evaluation_of_a_student_prints_its_analysis(kind, known_by, python, elsewhere, capsys, tmp_path):
    """Complete, for a student of every family, whichever way its teacher is known."""
    student = kind.run(NAME, *NO_SAMPLES, "--max_train_steps", "1")
    flags = ["--pretrained_model_name_or_path", student, *kind.data, "--num_samples", "8", "--metrics", "fid"]
    flags += ["--num_inference_steps", "2", "--batch_size", "8", "--reference_cache_dir", "cache"]
    flags += ["--feature_extractor", "assets/classifier", "--resolution", "8"]
    if kind.prompt and isinstance(kind.prompt[0], str):
        flags += ["--caption_column", "text"]
    if known_by == "--compare_to":
        flags += ["--compare_to", kind.teacher, "--compare_num_samples", "2"]
    done = python.run(ROOT / "evaluate_fid.py", *map(str, flags), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    line = command_after(done.stdout, "Next: where the student's error lies")
    assert "--help" not in line and str(student.resolve()) in shlex.split(line)
    analysed = run_in(elsewhere, f"{line} --num_timesteps 2", python)
    assert analysed.returncode == 0, analysed.stderr[-3000:]
    assert (elsewhere / "analysis" / "analysis.json").is_file()


def test_an_evaluation_names_the_analysis(python, elsewhere, teacher_dir, data_dir, tmp_path):
    flags = f"--pretrained_model_name_or_path {teacher_dir} --dataset_name {data_dir} --num_samples 4 --metrics fid "
    flags += "--num_inference_steps 1 --feature_extractor assets/classifier --reference_cache_dir cache"
    done = python.run(ROOT / "evaluate_fid.py", *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = run_in(elsewhere, command_after(done.stdout, "Next: where a student's error lies"), python)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: analyze_error.py")


# What a launcher says last


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, is_last",
    [
        (["accelerate", "launch", "-q", "--cpu", "--num_processes", "1"], True),
        (["accelerate", "launch", "--cpu", "--num_processes", "1"], False),
        (["torchrun", "--nproc_per_node", "2"], False),
    ],
    ids=["quiet", "accelerate", "torchrun"],
)
def test_the_sentence_is_the_last_that_a_launcher_lets_be_read(launcher, is_last, tmp_path):
    words = [*launcher, str(ROOT / "train_place.py"), "--pruning_ratio", "3"]
    done = run_by_shell(tmp_path, shlex.join(words), **CPU)
    sentence = "train_place.py: error: --pruning_ratio is 3.0; it must lie between 0 and 1, both excluded."
    lines = done.stderr.splitlines()
    assert done.returncode != 0 and lines.count(sentence) in (1, 2)
    if is_last:
        assert lines[-1] == sentence
    elif launcher[0] == "accelerate":  # its traceback cannot be helped, but told of beforehand
        assert lines[lines.index(sentence) + 1].startswith("What follows is accelerate's")
    else:  # torchrun's report has room for it
        assert f"traceback : {sentence}" in done.stderr.partition("Root Cause")[2]


# Ctrl-C, by a terminal


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
    ],
    ids=["python", "accelerate", "torchrun"],
)
@pytest.mark.parametrize("by", ["Ctrl-C", "closing the terminal"])
def test_a_terminal_that_goes_away_takes_no_work_with_it(tmp_path, launcher, by):
    """Launcher or script lead the session, as in a container: when they end, the terminal goes, and SIGHUP comes."""
    kind = KINDS["ddpm"](tmp_path / "kind")
    flags = ["--pretrained_model_name_or_path", kind.teacher, *COMMON.split(), *kind.flags, *kind.data, *NO_SAMPLES]
    flags += ["--max_train_steps", "1000000", "--output_dir", tmp_path / "student"]
    flags += ["--gradient_accumulation_steps", "40"]  # a step takes longer than the launcher does to end
    words = [sys.executable, *launcher, str(ROOT / "train_place.py"), *map(str, flags)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(words[0], words, {**os.environ, **CPU})
    log, printed, deadline = tmp_path / "student" / "log.jsonl", b"", time.monotonic() + 200
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline, printed.decode()[-3000:]
        if select.select([terminal], [], [], 0.1)[0]:
            printed += os.read(terminal, 65536)
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    try:
        if by == "Ctrl-C":
            os.write(terminal, b"\x03")
            time.sleep(0.1)
        os.close(terminal)
        os.waitpid(pid, 0)
        psutil.wait_procs(processes[1:], timeout=60)
        (saved,) = (tmp_path / "student" / "checkpoints").glob("step-*")
        assert (saved / "state.json").is_file()
        assert not any(process.is_running() for process in processes[1:])
    finally:
        for process in processes:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
