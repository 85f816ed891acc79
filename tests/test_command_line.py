# SPDX-License-Identifier: Apache-2.0
"""What the command lines of all scripts have in common: names, kinds of flags, recipes, and how an error is told."""

import argparse
import errno
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import datasets
import huggingface_hub
import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import build_unet
from diffusers import DDPMPipeline, DDPMScheduler
from hub_server import USER, HubServer
from tqdm import tqdm

from utils.analysis import arguments as analysis
from utils.command_line import (
    OTHERS,
    ROOT,
    ArgumentParser,
    Switch,
    UsageError,
    announce,
    bundled,
    call,
    refuse_missing,
    run,
    without_root,
)
from utils.devices import cpu_share, use_cpu_threads
from utils.distributed import on_main_process
from utils.download_cache import use_download_cache
from utils.evaluation import arguments as evaluation
from utils.evaluation.parallel import block_threads
from utils.launcher import VARIABLES
from utils.publishing.card import recipe as card_recipe
from utils.threads import AT_ONCE, BRIEFLY, POLICIES, how_threads_wait
from utils.training import arguments as training

TRAINING = ("train_lift", "train_place")
SCRIPTS = (*TRAINING, "evaluate_fid", "analyze_error")
PROGRAMS = {name: [str(ROOT / f"{name}.py")] for name in SCRIPTS}  # and all others that documents name
PROGRAMS["convert_ddim"] = [str(ROOT / "recipes" / "convert_ddim.py")]
PROGRAMS["hub"] = ["-m", "utils.publishing.hub"]
PROGRAMS |= {
    name: [str(ROOT / "benchmarks" / f"{name}.py")]
    for name in "busy_machine cache_speed compare default_study faults gpu_checks hub_checks make_assets "
    "make_dit_teacher make_flow_teacher make_text_teacher peers recipe_memory step_time study sweep".split()
}
NEEDED = {  # the shortest command line of each
    "evaluate_fid": "--pretrained_model_name_or_path t --dataset_name d",
    "analyze_error": "--pretrained_model_name_or_path t --student_model_name_or_path s --dataset_name d",
    **dict.fromkeys(TRAINING, "--pretrained_model_name_or_path t --dataset_name d --pruning_ratio 0.5"),
}


def parse(script: str, *flags, needed: str | None = None) -> argparse.Namespace:
    argv = [*(NEEDED[script] if needed is None else needed).split(), *map(str, flags)]
    if script in TRAINING:
        return training.parse_args("", importlib.import_module(script).add_method_arguments, argv)
    return {"evaluate_fid": evaluation, "analyze_error": analysis}[script].parse_args("", argv)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Where no earlier run has left an output folder, and nothing is bundled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def parser_of(script: str) -> ArgumentParser:
    """The parser that a script makes."""
    made = []

    def keep(self, *_args):
        made.append(self)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ArgumentParser, "parse_known_args", keep)
        parse(script)
    return made[0]


def actions(script: str) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser_of(script)._actions if action.dest != "help"}


# Names


@pytest.mark.parametrize("name", "num_samples split num_inference_steps feature_extractor guidance_scale".split())
def test_one_idea_one_flag(name):
    kinds = [actions(script)[name].type for script in ("evaluate_fid", "analyze_error")]
    kinds += [actions(script)[f"validation_{name}"].type for script in TRAINING]
    assert len(set(kinds)) == 1


def test_a_flag_of_several_scripts_is_one_flag():
    """Its kind is the same everywhere, and its default too but where scripts differ in what they do."""
    differs = {"output_dir", "feature_extractor", "num_samples", "batch_size", "num_inference_steps"}
    found = {}
    for script in SCRIPTS:
        for name, action in actions(script).items():
            default = None if name in differs else action.default
            kind = (type(action), action.type, action.nargs, default, action.metavar)
            assert found.setdefault(name, kind) == kind, (script, name)


def test_no_old_name_is_left():
    for script in SCRIPTS:
        assert not {"prompt_column"} & actions(script).keys()
    assert not [name for name in actions("analyze_error") if name.startswith("validation")]


@pytest.mark.parametrize(
    "script, given, now",
    [
        ("evaluate_fid", "--prompt_column text", "--prompt_column is now --caption_column"),
        ("evaluate_fid", "--prompt_column=text", "--prompt_column is now --caption_column"),
        ("analyze_error", "--validation_split test", "--validation_split is now --split"),
        ("analyze_error", "--validation_num_samples 9", "--validation_num_samples is now --num_samples"),
        ("analyze_error", "--validation_images 3", "--validation_images is now --shown_samples"),
        ("train_place", "--validation_images 3", "--validation_images is now --validation_shown_samples"),
        ("train_lift", "--validation_images 3", "--validation_images is now --validation_shown_samples"),
        ("analyze_error", "--validation_prompts a b", "--validation_prompts is now --prompts FILE"),
        ("analyze_error", "--validation_guidance_scale 3", "--validation_guidance_scale is now --guidance_scale"),
    ],
)
@pytest.mark.parametrize("in_recipe", [False, True])
def test_an_old_name_is_answered_with_the_new(tmp_path, script, given, now, in_recipe):
    (tmp_path / "old.args").write_text(given)
    with pytest.raises(UsageError, match=now):
        parse(script, *([f"@{tmp_path / 'old.args'}"] if in_recipe else given.split()))


def test_two_misspelt_flags_get_two_suggestions():
    with pytest.raises(UsageError, match=r"did you mean --learning_rate and --train_batch_size\?"):
        parse("train_place", "--learning_rat", 1, "--train_batchsize", 2)


def test_patches_are_squares():
    with pytest.raises(UsageError, match="--group_size is 10; --grouping patch needs a square"):
        parse("train_place", "--grouping", "patch", "--group_size", 10)
    assert parse("train_place", "--grouping", "patch", "--group_size", 9).group_size == 9


# Kinds


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.filterwarnings("ignore:.*no effect here")
def test_a_switch_can_be_undone(script):
    switches = [name for name, action in actions(script).items() if isinstance(action, Switch)]
    assert "overwrite_output_dir" in switches
    assert all(action.nargs != 0 or name in switches for name, action in actions(script).items())
    for name in switches:
        assert getattr(parse(script), name) is False
        assert getattr(parse(script, f"--no-{name}"), name) is False
        if name != "update_model_card":  # of a folder that there is
            assert getattr(parse(script, f"--{name}"), name) is True
        assert getattr(parse(script, f"--{name}", f"--no-{name}"), name) is False


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_empty_value_unsets(script):
    """Whatever the flag takes: numbers, choices, lists, paths."""
    plain = vars(parse(script))
    needed = [name.removeprefix("--") for name in NEEDED[script].split()[::2]]
    for name, action in actions(script).items():
        if action.nargs != 0 and name != "hub_token" and name not in needed:
            assert vars(parse(script, f"--{name}", "")) == plain, name
            assert vars(parse(script, f"--{name}=")) == plain, name


def test_an_empty_value_wins_over_a_recipe(tmp_path):
    recipe = tmp_path / "my.args"
    recipe.write_text(
        "--validation_feature_extractor model\n--max_train_samples 5\n--weighting linear\n--validation_prompts a b\n"
    )
    flags = "validation_feature_extractor max_train_samples weighting validation_prompts".split()
    args = parse("train_place", f"@{recipe}", *(word for name in flags for word in (f"--{name}", "")))
    assert [getattr(args, name) for name in flags] == [None, None, "adaptive", None]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_short(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "119")
    text = parser_of(script).format_help()
    assert text.count("usage:") == 1 and len(text.split("\n\n")[0].splitlines()) == 1
    for name, action in actions(script).items():
        assert f"--{name}" in text and f" {name.upper()}" not in text
        if isinstance(action, Switch):
            assert f"--{name}, --no-{name}\n" in text
    assert 'FLAG ""' in text and "(default: False)" not in text


@pytest.mark.parametrize("script", TRAINING)
def test_the_recipe_of_a_card_parses_back(tmp_path, script):
    prompts = ["a cat", "it's # one", '"b"']
    args = parse(script, "--use_ema", "--validation_prompts", *prompts, "--learning_rate", "3e-3", "--seed", 5)
    recipe = tmp_path / "card.args"
    recipe.write_text(card_recipe(json.loads(json.dumps(vars(args)))))
    assert vars(parse(script, f"@{recipe}", needed="")) == vars(args)


LISTS = {"validation_prompts": ("a", "b"), "crop": ("0", "1", "8", "8"), "kept_layers": ("0,3",)}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_in_the_recipe_of_a_card_parses_back(tmp_path, name):
    options = {"needed": "--pretrained_model_name_or_path t --dataset_name d"} if name == "kept_layers" else {}
    args = parse("train_place", f"--{name}", *LISTS[name], **options)
    assert isinstance(getattr(args, name), list)
    recipe = tmp_path / "card.args"
    recipe.write_text(card_recipe(json.loads(json.dumps(vars(args)))))
    assert vars(parse("train_place", f"@{recipe}", needed="")) == vars(args)


def test_every_flag_of_several_values_is_among_these():
    given = actions("train_place").items()
    assert {name for name, flag in given if flag.nargs == "+" or "," in str(flag.metavar)} == LISTS.keys()


@pytest.mark.parametrize("script, other", [("train_place", "train_lift"), ("train_lift", "train_place")])
def test_a_flag_of_the_other_script_is_told_so(script, other):
    alone = actions(other).keys() - actions(script).keys()
    assert alone == {name.removeprefix("--") for name, owner in OTHERS.items() if owner == f"{other}.py"}
    for name in alone:
        with pytest.raises(UsageError, match=f"^--{name} is a flag of {other}.py. See --help.$"):
            parse(script, f"--{name}", "1")


# The quickstart


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize(
    "flags",
    ["", "--dry_run", "--resume_from_checkpoint latest", "--max_train_steps 20", "--push_to_hub", "--no-use_ema", "-"],
)
@pytest.mark.filterwarnings("ignore:--ema_decay has no effect")
def test_flags_without_a_teacher_stand_behind_the_default_recipe(script, flags, capsys, tmp_path):
    if flags == "-":
        (tmp_path / "my.args").write_text("--max_train_steps 7\n")
        flags = "@my.args"
    args = parse(script, *flags.split(), needed="")
    said = capsys.readouterr().out
    recipe = f"@assets/default{'' if script == 'train_place' else '_lift'}.args"
    assert f"{recipe}{',' if flags else '.'}" in said and ("with the flags that are given" in said) == bool(flags)
    assert vars(args) == vars(parse(script, recipe, *flags.split(), needed=""))
    assert args.pruning_ratio == 0.8 and args.max_train_steps == {"--max": 20, "@my.a": 7}.get(flags[:5], 1200)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flag", training.BEGINNINGS)
def test_one_of_its_own_is_another_run(flag, capsys):
    with pytest.raises(UsageError):
        parse("train_place", f"--{flag}", "0.5", needed="")
    assert capsys.readouterr().out == ""


# Bundled paths


def test_bundled_paths_are_found_from_any_folder(tmp_path):
    assert bundled("assets/teacher") == str(ROOT / "assets" / "teacher")
    assert without_root(bundled("recipes/fashion_mnist_teacher.json")) == "recipes/fashion_mnist_teacher.json"
    for other in ("assets/missing", "teacher", "google/ddpm-cifar10-32", str(tmp_path), "../assets/teacher"):
        assert bundled(other) == other
    (tmp_path / "assets" / "teacher").mkdir(parents=True)
    assert bundled("assets/teacher") == "assets/teacher"  # what is in the current folder comes first


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_name_something_to_read_are_bundled(script):
    found = {name for name, action in actions(script).items() if action.type is bundled}
    named = {"pretrained_model_name_or_path", "dataset_name", "train_data_dir", "student_config", "prompts"}
    named |= {"student_model_name_or_path", "feature_extractor", "validation_feature_extractor", "compare_to"}
    assert named & actions(script).keys() <= found
    assert not {"output_dir", "cache_dir", "save_stats", "latent_cache_dir", "reference_cache_dir"} & found


def test_at_the_root_they_stay_as_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    args = parse("train_place", "@recipes/fashion_mnist_teacher.args", "--output_dir", tmp_path / "out", needed="")
    assert args.student_config == "recipes/fashion_mnist_teacher.json"
    assert args.lambda_kd_output == 0
    monkeypatch.chdir(tmp_path)
    away = parse("train_place", "@recipes/fashion_mnist_teacher.args", "--output_dir", tmp_path / "out", needed="")
    assert away.student_config == str(ROOT / "recipes" / "fashion_mnist_teacher.json")
    assert {name: without_root(value) for name, value in vars(away).items()} == vars(args)


def test_a_run_is_resumed_from_another_folder(run, tmp_path, monkeypatch):
    flags = ["--dataset_name", "assets/fashion_mnist_16", "--max_train_samples", "16"]
    flags += ["--validation_shown_samples", "0"]
    monkeypatch.chdir(ROOT)
    folder = run("train_place", *flags, "--max_train_steps", "1")
    assert json.loads((folder / "args.json").read_text())["arguments"]["dataset_name"] == "assets/fashion_mnist_16"
    monkeypatch.chdir(tmp_path)
    run("train_place", *flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert (folder / "checkpoints" / "step-0000002").is_dir()


# The download cache


@pytest.fixture
def _libraries(monkeypatch):
    """What `use_download_cache` sets is put back."""
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    constants = huggingface_hub.constants
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, getattr(constants, name))
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, getattr(datasets.config, name))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.usefixtures("_libraries")
def test_the_libraries_take_the_download_cache(script, tmp_path, data_dir):
    parse(script, "--cache_dir", "downloads")
    folder = tmp_path / "downloads"
    rows = datasets.load_dataset(data_dir, split="train")
    assert all(Path(file["filename"]).is_relative_to(folder) for file in rows.cache_files) and rows.cache_files
    blob = folder / "models--somebody--it" / "snapshots" / "main" / "config.json"
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    assert huggingface_hub.try_to_load_from_cache("somebody/it", "config.json", revision="main") == str(blob)
    assert os.environ["HF_HUB_CACHE"] == os.environ["HF_DATASETS_CACHE"] == str(folder)  # of what it starts


@pytest.mark.slow
def test_a_script_downloads_into_it(tmp_path, data_dir):
    """A teacher from a Hub on this machine, by a real process; nothing is put where the libraries would. Nor does this
    dry run write to the Hub: it asks whether it may."""
    DDPMPipeline(build_unet(), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    home, cache = tmp_path / "home", tmp_path / "cache"
    flags = f"--pretrained_model_name_or_path {USER}/teacher --dataset_name {data_dir} --pruning_ratio 0.5 --dry_run "
    flags += f"--student_init magnitude --cache_dir {cache} --output_dir {tmp_path / 'student'} --report_to none "
    flags += "--push_to_hub --hub_model_id imagined"
    with HubServer() as hub:
        hub.publish("teacher", tmp_path / "teacher")
        done = script_process(str(ROOT / "train_place.py"), *flags.split(), **hub.environment(home))
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((cache / f"models--{USER}--teacher").rglob("diffusion_pytorch_model.safetensors"))
    assert list(cache.rglob("*.arrow"))
    assert not [path for path in home.rglob("*") if path.suffix in (".safetensors", ".arrow", ".json")]
    assert not (tmp_path / "student").exists()
    assert f"{USER}/imagined" not in hub.repositories and "GET /api/whoami-v2" in hub.requests
    assert not [request for request in hub.requests if request.split()[0] not in ("GET", "HEAD")]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "content, flag",
    [
        ("cache.json", "--latent_cache_dir"),
        ("latents-00-000000.safetensors", "--latent_cache_dir"),
        (f"{'0123456789abcdef' * 2}.npz", "--reference_cache_dir"),
    ],
)
def test_a_cache_of_ours_is_no_download_cache(tmp_path, script, content, flag):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / content).touch()
    with pytest.raises(UsageError, match=f"--cache_dir cache holds .* now {flag}"):
        parse(script, "--cache_dir", "cache")
    with pytest.raises(UsageError, match="is a file"):
        use_download_cache(str(tmp_path / "cache" / content))


# How an error is told


def script_process(*words, **environment) -> subprocess.CompletedProcess:
    """Python with these words, as a user runs it."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=variables)


def test_what_is_printed_is_in_a_file_at_once(tmp_path):
    """Before the end of the process, which flushes what it holds."""
    text = "import os, utils.command_line as c\nc.start(lambda: None)\nprint('told')\nos._exit(0)\n"
    Path("small.py").write_text(text)
    assert script_process("small.py", PYTHONUNBUFFERED="").stdout == "told\n"


def test_a_terminal_that_has_gone_stops_nothing(monkeypatch):
    """A checkpoint says that it is saved, and then has to be."""

    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    announce("saving the checkpoint")


def test_signals_do_what_they_did_before_a_notebook_called(monkeypatch):
    script = types.SimpleNamespace(
        __doc__="", parse_args=lambda *_: None, main=lambda _: signal.signal(signal.SIGTERM, lambda *_: None)
    )
    before = signal.getsignal(signal.SIGTERM)
    call(script, [])
    assert signal.getsignal(signal.SIGTERM) is before


def told(body: str, **environment) -> subprocess.CompletedProcess:
    """A script of one `main`."""
    text = f"import warnings, utils.command_line as c\nc.ALONE = 0\ndef main():\n    {body}\nc.run(main)\n"
    Path("small.py").write_text(text)
    return script_process("small.py", **environment)


def test_a_usage_error_is_one_sentence():
    done = told("raise c.UsageError('--seed is -1; it must not be negative.')")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "small.py: error: --seed is -1; it must not be negative.\n"


@pytest.mark.parametrize("kind", ["ValueError", "RuntimeError", "OSError"])
def test_another_error_keeps_its_traceback(kind):
    done = told(f"raise {kind}('mine')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith(f"{kind}: mine\n")


def test_an_error_of_all_processes_is_read_once():
    everywhere = "error = c.UsageError('no'); error.everywhere = True; raise error"
    assert [told(everywhere, RANK=str(rank)).stderr for rank in (0, 1)] == ["small.py: error: no\n", ""]
    assert told(everywhere, RANK="1").returncode == 2
    assert told("raise c.UsageError('no')", RANK="3").stderr == "small.py: error of process 3: no\n"


def test_an_error_inside_of_a_data_worker():
    message = "Caught UsageError in DataLoader worker process 0.\\nTraceback:\\nUsageError: row 3 is none.\\n"
    assert told(f"raise c.UsageError({message!r}.replace(chr(92) + 'n', chr(10)))").stderr == (
        "small.py: error: row 3 is none.\n"
    )


def test_a_warning_is_one_line():
    """One of this repository; a library's says where it stands."""
    body = "; ".join(
        f"warnings.warn_explicit('{text}', UserWarning, '{path}', 3)"
        for text, path in (("ours", ROOT / "utils" / "any.py"), ("theirs", "/site-packages/any.py"))
    )
    assert told(body).stderr == "small.py: warning: ours\n/site-packages/any.py:3: UserWarning: theirs\n"
    assert told(body, LOCAL_RANK="1").stderr == "/site-packages/any.py:3: UserWarning: theirs\n"


def test_main_processes_refuse_for_all():
    """The error that all get is marked as such."""

    class One:
        is_main_process, num_processes = True, 1

    def refuse(error):
        raise error

    with pytest.raises(UsageError) as caught:
        on_main_process(One(), refuse, UsageError("no"))
    assert caught.value.everywhere
    with pytest.raises(ValueError) as caught:
        on_main_process(One(), refuse, ValueError("no"))
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize("path", [*(f"{script}.py" for script in SCRIPTS), "utils/publishing/hub.py"])
def test_every_script_tells_its_errors_so(path):
    assert (ROOT / path).read_text().endswith('\n\nif __name__ == "__main__":\n    run(main, ARGS)\n')


def cpu_seconds(*words) -> tuple[subprocess.CompletedProcess, float]:
    """What a process said, and what it and all that it started have taken of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = script_process(*words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_waits_for_no_library(program):
    done, seconds = cpu_seconds(*PROGRAMS[program], "--help")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("usage: ")
    assert ("[@recipe" in done.stdout.splitlines()[0]) == (program in (*SCRIPTS, "sweep"))
    assert seconds < 1  # a tenth here; torch alone takes 1.4, all that the scripts import 5 to 7
    assert ("--push_to_hub, " in done.stdout) == (program in TRAINING)  # what pushes does not ask whether to


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_flag_is_refused_before_anything_is_loaded(program):
    """In the same time, and with nothing behind the sentence, whatever a library says when it is loaded."""
    done, seconds = cpu_seconds("-X", "importtime", *PROGRAMS[program], "--sed", "3")
    imported = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    sentence = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and ": error: " in sentence
    if program in SCRIPTS:
        assert sentence.startswith(f"{program}.py: error: unrecognized arguments: --sed")
        assert len(imported) == len(done.stderr.splitlines()) - 1
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in imported}
    assert not loaded & {"torch", "diffusers", "transformers", "accelerate", "datasets", "numpy"}
    assert seconds < 1


MISSING = {  # what is not here and cannot be on the Hub either -> how the sentence goes on
    "evaluate_fid": {
        "--images nothere": "no such folder. Give a folder of images.",
        "--reference_images nothere": "no such folder. Give a folder of images.",
        "--reference_stats nothere.npz": "no such file. Give an .npz file",
        "--prompts nothere.txt": "no such file. Give a text file, one prompt a line.",
        "--compare_to ../nothere": "no such folder here. Paths are relative",
        "--clip_model a/b/c": "no such folder here",
    },
    "analyze_error": {
        "--prompts nothere.txt": "no such file. Give a text file, one prompt a line.",
        "--student_model_name_or_path earlier/nothere": "no such folder here",
        "--feature_extractor ./nothere": "no such folder here",
        "--inception_path nothere": "no such file. Give the file of inception's",
    },
    **dict.fromkeys(
        TRAINING,
        {
            "--train_data_dir nothere": "no such folder. Give a folder of images.",
            "--pretrained_model_name_or_path ./nothere": "no such folder here. Paths are relative to the current",
            "--pretrained_model_name_or_path teacher.safetensors": "no such folder here",
            "--student_config x.json": "no such file. Give the config.json of a diffusers model.",
            "--dataset_name assets/typo": "no such folder here",
            "--dataset_name /nothere": "no such folder here",
            "--validation_feature_extractor ./nothere": "no such folder here",
            "--resume_from_checkpoint nothere": "",
        },
    ),
}


def named(script: str, *flags: str) -> list[str]:
    """The shortest command line with these flags in the place of those that exclude them."""
    instead = {"--train_data_dir": "--dataset_name", "--student_config": "--pruning_ratio"}
    instead |= dict.fromkeys(("--reference_images", "--reference_stats"), "--dataset_name")
    instead["--images"] = "--pretrained_model_name_or_path"
    words = NEEDED[script].split()
    kept = [words[i : i + 2] for i in range(0, len(words), 2)]
    kept = [pair for pair in kept if pair[0] not in (flags[0], instead.get(flags[0]))]
    return [*(word for pair in kept for word in pair), *flags]


@pytest.mark.parametrize("script, flags", [(script, flags) for script in MISSING for flags in MISSING[script]])
def test_what_is_missing_is_refused_before_anything_is_loaded(script, flags, tmp_path):
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "model_index.json").touch()
    path = str(ROOT / f"{script}.py")
    done, seconds = cpu_seconds("-X", "importtime", path, *named(script, *flags.split()))
    sentence = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and sentence.startswith(f"{script}.py: error: {flags}"), done.stderr[-2000:]
    assert MISSING[script][flags] in sentence
    assert not [line for line in done.stderr.splitlines() if line.endswith("| torch")] and seconds < 1


@pytest.mark.parametrize(
    "name",
    "student user/model user/model-v1.5 google/ddpm-cifar10-32 d hf://datasets/user/images assets/teacher".split(),
)
def test_what_may_be_on_the_hub_is_not_refused(name, tmp_path):
    """A folder here of a user's name, as of copies of their repositories, makes no path of a Hub id."""
    (tmp_path / "google" / "ddpm-celebahq-256").mkdir(parents=True)
    refuse_missing(parse("train_place", "--pretrained_model_name_or_path", name, "--dataset_name", name))
    refuse_missing(parse("evaluate_fid", "--compare_to", name, "--feature_extractor", name))


def test_every_program_of_the_documents_is_among_them():
    texts = [path.read_text() for path in (ROOT, ROOT / "docs", ROOT / "assets") for path in path.glob("*.md")]
    found = {name for text in texts for name in re.findall(r"(?:benchmarks|recipes)/(\w+)\.py", text)}
    found |= {name for text in texts for name in re.findall(r"python -m utils[\w.]*\.(\w+)", text)}
    assert found - {"study_rows"} <= PROGRAMS.keys()  # which holds settings


def test_a_script_as_a_user_runs_it(tmp_path):
    done = script_process(str(ROOT / "analyze_error.py"), "--validation_split", "test")
    assert done.returncode == 2
    assert done.stderr == "analyze_error.py: error: --validation_split is now --split. See --help.\n"


@pytest.mark.slow  # it loads them
def test_a_run_says_at_once_what_it_waits_for(tmp_path):
    """The first line comes before the libraries do; what is then refused stands behind it."""
    done = script_process("-X", "importtime", str(ROOT / "evaluate_fid.py"), *NEEDED["evaluate_fid"].split())
    lines = done.stderr.splitlines()
    first = lines.index("evaluate_fid.py: loading torch, diffusers and transformers ...")
    assert not [line for line in lines[:first] if line.endswith("| torch")]
    assert [line for line in lines[first:] if line.endswith("| torch")]
    own = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == 2 and own[-1].startswith("evaluate_fid.py: error: ")


def test_a_sentence_begins_a_line_below_a_progress_bar(capsys):
    def fail():
        for _ in tqdm(range(3), leave=False):
            raise UsageError("--x is y.")

    with pytest.raises(SystemExit):
        run(fail)
    assert re.search(r"^\S+: error: --x is y\.$", capsys.readouterr().err.replace("\r", "|"), re.MULTILINE)


# How threads wait


def started(percent: float = 0.0, **environment) -> dict:
    """What a script finds after `start`: the environment that torch will read, and whether it is there already; on a
    machine whose cores are so busy."""
    known = f"t.psutil.cpu_percent = lambda interval: {percent}"
    code = f"import json, os, sys, utils.command_line as c, utils.threads as t; {known}; c.start(lambda: None); "
    code += "print(json.dumps({'torch': 'torch' in sys.modules, **{n: os.environ.get(n) for n in t.POLICIES}}))"
    unset = dict.fromkeys(POLICIES, "")
    variables = {name: value for name, value in {**os.environ, **unset, **environment}.items() if value}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.stderr == "-c: loading torch, diffusers and transformers ...\n"
    return json.loads(done.stdout)


@pytest.mark.parametrize("percent, ours", [(0.0, BRIEFLY), (49.0, BRIEFLY), (50.0, AT_ONCE), (100.0, AT_ONCE)])
def test_threads_sleep_in_wait(percent, ours, monkeypatch):
    """At once where half of the cores are busy."""
    assert started(percent) == {"torch": False, **dict.fromkeys(POLICIES), **ours}
    for name in POLICIES:
        monkeypatch.delenv(name, raising=False)
    assert how_threads_wait() == "waiting as the environment says"
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    assert how_threads_wait().startswith("asleep" if ours is AT_ONCE else "spinning briefly")


@pytest.mark.parametrize("name, value", zip(POLICIES, ("ACTIVE", "30000", "200"), strict=True))
@pytest.mark.parametrize("percent", [0.0, 100.0])
def test_a_users_wish_how_threads_wait_holds(name, value, percent):
    assert started(percent, **{name: value}) == {"torch": False, **dict.fromkeys(POLICIES), name: value}


@pytest.mark.parametrize(
    "flag, own, launchers, expected",
    [
        (3, "5", None, 3),  # --num_cpu_threads wins over all
        (None, "5", None, 5),
        (None, "1", None, 1),
        (None, "4,2", None, 4),
        (None, "many", None, "share"),
        (None, None, None, "share"),
        (None, "1", {}, "share"),  # `accelerate launch` sets it where nobody has
        (None, "1", {"OMP_NUM_THREADS": "1"}, 1),
        (None, "6", {}, 6),  # accelerate launch --num_cpu_threads_per_process 6
    ],
)
def test_who_says_how_many_threads(flag, own, launchers, expected, monkeypatch):
    """`launchers`: the environment of the process that started this one, None without a launcher."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    if launchers is not None:
        monkeypatch.setenv(next(iter(VARIABLES)), "no")
        monkeypatch.setattr(psutil.Process, "environ", lambda self: launchers)
    accelerator, before = Accelerator(cpu=True), torch.get_num_threads()
    try:
        use_cpu_threads(argparse.Namespace(num_cpu_threads=flag), accelerator)
        assert torch.get_num_threads() == (cpu_share(accelerator) if expected == "share" else expected)
    finally:
        torch.set_num_threads(before)
    wanted = cpu_share(accelerator) if expected == "share" else expected
    assert block_threads(flag, accelerator) == wanted


def test_idle_flags_are_warned_of_once_each():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parse("train_place", "--ema_decay", "0.5", "--fuse_lora")
    assert [str(each.message) for each in caught] == [
        "--ema_decay has no effect here: it goes with --use_ema.",
        "--fuse_lora has no effect here: it goes with --lora_rank.",
    ]
