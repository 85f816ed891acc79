# SPDX-License-Identifier: Apache-2.0
"""Two processes that behave like one: real processes on the CPU, talking gloo."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import latent_pipelines
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import read_log
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from utils.distributed import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "accelerate"
STEPS, MICRO_STEPS, BATCH = 5, 2, 4  # of the one process; two have half the batch each
COMMON = (
    f"--max_train_steps {STEPS} --gradient_accumulation_steps {MICRO_STEPS} --weighting constant --adam_epsilon 1e-3 "
    "--timestep_balance 0.5 --task_balance 1 --lambda_kd_feat 1 "
    "--learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 2 --max_grad_norm 1e6 "
    "--checkpointing_steps 1 --checkpoints_total_limit 9 --logging_steps 1 --validation_shown_samples 2 --use_ema "
    "--validation_num_inference_steps 2 --report_to none --num_cpu_threads 1"
).split()


def environment(**changes: str) -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **variables, **changes}


def job(folder: Path, processes: int, *flags, **more) -> dict:
    """Of `pair.py`: the global batch is the same for any number of processes."""
    argv = [*COMMON, *flags, "--train_batch_size", BATCH // processes, "--output_dir", folder / "out"]
    folder.mkdir(parents=True, exist_ok=True)
    return {"argv": [str(word) for word in argv], "folder": str(folder), "processes": processes, **more}


def done(each: dict) -> SimpleNamespace:
    """What a job left: its output folder, and of every rank what it saw and printed."""
    folder, ranks = Path(each["folder"]), range(each["processes"])
    printed = [(folder / f"out-{rank}.txt").read_text() for rank in ranks]
    assert all((folder / f"seen-{rank}.json").exists() for rank in ranks), "\n".join(printed)[-6000:]
    seen = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in ranks]
    assert each.get("fails") or all(rank["code"] != 1 for rank in seen), "\n".join(printed)[-6000:]
    return SimpleNamespace(folder=folder / "out", seen=seen, printed=printed)


def run_jobs(python, jobs: dict[str, dict], folder: Path) -> SimpleNamespace:
    """Run them one after the other in forks of one new process."""
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    offline = environment(HF_HUB_OFFLINE="1", HF_TOKEN="hf_nobody")
    process = python.run(ROOT / "tests" / "pair.py", folder / "jobs.json", **offline)
    assert process.returncode == 0, process.stderr[-6000:]
    return SimpleNamespace(**{name: done(each) for name, each in jobs.items()})


@pytest.fixture(scope="module")
def pixel(python, tmp_path_factory, teacher_dir, data_dir):
    """One process, two, and two of which one was told to stop after step 3 and both went on."""
    folder = tmp_path_factory.mktemp("pixel")
    flags = ["--pretrained_model_name_or_path", teacher_dir, "--dataset_name", data_dir]
    flags += ["--pruning_ratio", "0.5", "--student_init", "magnitude", "--random_flip"]
    again = [*flags, "--resume_from_checkpoint", "latest"]
    stopped = job(folder / "stopped", 2, *flags, signal=3)
    resumed = job(folder / "resumed", 2, *again)
    resumed["argv"][-1] = stopped["argv"][-1]  # the same output folder
    jobs = {"one": job(folder / "one", 1, *flags), "two": job(folder / "two", 2, *flags)}
    jobs |= {"stopped": stopped, "resumed": resumed}
    jobs["refused"] = job(folder / "refused", 2, *flags, "--push_to_hub", fails=True)  # there is no Hub
    runs = run_jobs(python, jobs, folder)
    runs.resumed.folder = runs.stopped.folder
    runs.flags = flags
    return runs


def latent_jobs(python, folder: Path, *flags) -> SimpleNamespace:
    """On one process and on two, encoding in every step and once, in 2 ways."""
    # of thousands of elements two may swap PLACE's groups where a last bit differs: squares stay as they are
    flags = [*flags, "--student_model_name_or_path", folder / "narrow", "--grouping", "patch"]
    short = [*flags, "--max_train_steps", "2", "--validation_shown_samples", "0", "--cache_variants", "2"]
    short += ["--latent_cache_dir"]
    jobs = {
        **{"one": job(folder / "one", 1, *flags), "two": job(folder / "two", 2, *flags)},
        "cached_one": job(folder / "cached_one", 1, *short, folder / "cache_one"),
        "cached_two": job(folder / "cached_two", 2, *short, folder / "cache_two"),
    }
    runs = run_jobs(python, jobs, folder)
    runs.caches = folder / "cache_one", folder / "cache_two"
    return runs


@pytest.fixture(scope="module")
def latent(python, tmp_path_factory):
    """A Stable Diffusion student."""
    folder = tmp_path_factory.mktemp("latent")
    teacher = latent_pipelines.save_pipeline(folder / "sd1")
    data = latent_pipelines.save_captioned(folder / "captioned")
    narrow = latent_pipelines.build_unet(block_out_channels=(8, 8, 16, 16), layers_per_block=1)  # needs projectors
    narrow.save_pretrained(folder / "narrow")
    runs = latent_jobs(python, folder, "--pretrained_model_name_or_path", teacher, "--train_data_dir", data)
    runs.encoded = ["latents-00-000000.safetensors", "text-000000.safetensors", "empty.safetensors"]
    return runs


@pytest.fixture(scope="module")
def dit(python, tmp_path_factory):
    """A DiT student, with its layers recomputed and a part of its labels dropped."""
    folder = tmp_path_factory.mktemp("dit")
    teacher = latent_pipelines.save_dit(folder / "teacher")
    data = latent_pipelines.save_classes(folder / "classes")
    latent_pipelines.save_dit(folder / "narrow", layers=2, attention_head_dim=6)  # needs projectors
    flags = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", data, "--gradient_checkpointing"]
    flags += [
        "--proportion_empty_prompts",
        "0.3",
        "--feature_weighting",
        "linear",
        "--validation_guidance_channels",
        3,
    ]
    runs = latent_jobs(python, folder, *flags)
    runs.encoded = ["latents-00-000000.safetensors"]
    return runs


@pytest.fixture(scope="module")
def flow(python, tmp_path_factory):
    """A Stable Diffusion 3 student on one process and on two, its times weighted."""
    folder = tmp_path_factory.mktemp("flow")
    teacher = latent_pipelines.save_sd3(folder / "sd3", t5=False)
    data = latent_pipelines.save_captioned(folder / "captioned")
    narrow = latent_pipelines.SD3 | {"num_attention_heads": 1, "caption_projection_dim": 8, "num_layers": 2}
    SD3Transformer2DModel(**narrow).save_pretrained(folder / "narrow")
    flags = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", data, "--weighting_scheme", "cosmap"]
    runs = latent_jobs(python, folder, *flags)
    runs.encoded = ["latents-00-000000.safetensors", "text-000000.safetensors", "empty.safetensors"]
    return runs


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("latent", "dit", "flow")]


@pytest.fixture(params=["pixel", *SLOW])
def runs(request):
    return request.getfixturevalue(request.param)


def checkpoint(run: SimpleNamespace, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "checkpoints" / f"step-{step:07d}" / f"{name}.safetensors")


def balance(run: SimpleNamespace) -> dict[str, torch.Tensor]:
    """Sums and counts that the run ended with."""
    state = json.loads((run.folder / "checkpoints" / f"step-{STEPS:07d}" / "state.json").read_text())
    return {name: torch.tensor(values) for name, values in state["states"]["balance"].items()}


def relative_l2(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys() and ours
    difference = sum((ours[name] - theirs[name]).square().sum() for name in ours)
    return math.sqrt(difference / sum(tensor.square().sum() for tensor in theirs.values()))


def test_there_are_two(runs):
    assert [(rank["processes"], rank["rank"]) for rank in runs.two.seen] == [(2, 0), (2, 1)]
    assert [(rank["processes"], rank["rank"]) for rank in runs.one.seen] == [(1, 0)]
    assert "2 processes = 8" in runs.two.printed[0]


def test_gradients_equal_those_of_one_process(runs):
    """Adam's first moment after the first step is (1 - beta1) times the gradient."""
    moments = [
        {name: value for name, value in checkpoint(run, 1, "optimizer").items() if name.endswith(".exp_avg")}
        for run in (runs.two, runs.one)
    ]
    assert relative_l2(*moments) < 1e-5
    # the projectors come last: student and projectors are one module
    student = checkpoint(runs.one, 1, "student")
    projectors = [name for name in student if name.startswith("projectors.")]
    last = sorted(moments[0], key=lambda name: int(name.split(".")[0]))[-len(projectors) :]
    assert projectors
    assert sorted(moments[0][name].shape for name in last) == sorted(student[name].shape for name in projectors)
    assert relative_l2(*({name: side[name] for name in last} for side in moments)) < 1e-5
    assert all(moments[0][name].abs().max() > 0 for name in last)


def test_weights_after_five_steps_equal_those_of_one_process(runs):
    for name in ("student", "ema"):
        assert relative_l2(checkpoint(runs.two, STEPS, name), checkpoint(runs.one, STEPS, name)) < 1e-5
    ours, theirs = (balance(run) for run in (runs.two, runs.one))
    assert relative_l2(ours, theirs) < 1e-5 and theirs["task"][1].sum() > 0.95 * STEPS * MICRO_STEPS * BATCH
    start, end = (checkpoint(runs.one, step, "student") for step in (1, STEPS))
    assert relative_l2(start, end) > 1e-3  # they moved
    assert any(name.startswith("projectors.") for name in end)


def test_the_logs_are_those_of_one_process(runs):
    ours, theirs = read_log(runs.two.folder), read_log(runs.one.folder)
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5]
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-5, abs=1e-7)
        assert our["learning_rate"] == their["learning_rate"]
    # in optimizer steps: neither processes nor accumulation hasten it; the rate that comes next is logged
    wanted = [0.5, 1, *((1 + math.cos(math.pi * part / 3)) / 2 for part in (1, 2, 3))]
    assert [line["learning_rate"] for line in ours] == pytest.approx([1e-3 * part for part in wanted], abs=1e-12)


@pytest.mark.parametrize("what", ["rows", "timesteps"])
def test_ranks_differ_and_together_are_the_one_process(runs, what):
    first, second = (rank[what] for rank in runs.two.seen)
    (whole,) = (rank[what] for rank in runs.one.seen)
    assert len(whole) == STEPS * MICRO_STEPS and len(whole[0]) == BATCH
    for a, b, both in zip(first, second, whole, strict=True):
        assert a + b == both
        assert a != b
    if what == "rows":
        assert all(not set(a) & set(b) for a, b in zip(first[:3], second[:3], strict=True))  # within an epoch


def test_only_the_main_process_writes_and_samples(runs):
    main, other = runs.two.seen
    assert main["checkpoints"] == [1, 2, 3, 4, 5] and main["sampled"] > 0
    assert other["checkpoints"] == [] and other["sampled"] == 0
    assert "Saved:" in runs.two.printed[0] and "Saved:" not in runs.two.printed[1]
    assert "parameters" not in runs.two.printed[1]  # nor the plan
    names = [{str(path.relative_to(run.folder)) for path in run.folder.rglob("*")} for run in (runs.two, runs.one)]
    assert names[0] == names[1]


def test_a_signal_to_one_stops_all_and_the_run_goes_on_exactly(pixel):
    assert [rank["code"] for rank in pixel.stopped.seen] == [128 + signal.SIGTERM] * 2
    assert [len(rank["rows"]) for rank in pixel.stopped.seen] == [3 * MICRO_STEPS] * 2
    assert "SIGTERM: saving after this step" in pixel.stopped.printed[1]
    assert "SIGTERM" not in pixel.stopped.printed[0] and "Stopped at step 3" in pixel.stopped.printed[0]
    for ours, whole in zip(pixel.resumed.seen, pixel.two.seen, strict=True):
        assert ours["rows"] == whole["rows"][3 * MICRO_STEPS :]
    for name in ("student", "ema", "optimizer"):
        ours, theirs = (checkpoint(run, STEPS, name) for run in (pixel.resumed, pixel.two))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_log(pixel.resumed.folder) == read_log(pixel.two.folder)
    assert relative_l2(balance(pixel.resumed), balance(pixel.two)) == 0


def test_another_number_of_processes_is_another_run(pixel, run):
    with pytest.raises(ValueError, match="--resume_from_checkpoint: .*world_size was 2, is 1"):
        path = pixel.two.folder / "checkpoints" / "step-0000003"
        run("train_place", *COMMON, *pixel.flags, "--train_batch_size", "2", "--resume_from_checkpoint", path)


@pytest.mark.parametrize("name", SLOW)
def test_two_processes_encode_a_share_each(request, name):
    latent = request.getfixturevalue(name)
    main, other = latent.cached_two.seen
    assert sorted(main["encoded"]) == sorted(latent.encoded)
    assert other["encoded"] == ["latents-01-000000.safetensors"]
    for ours, theirs in zip(read_log(latent.cached_two.folder), read_log(latent.cached_one.folder), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    one, two = ({path.name for path in folder.iterdir()} for folder in latent.caches)
    assert one == two
    for path in latent.caches[0].glob("*.safetensors"):
        ours, theirs = load_file(latent.caches[1] / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)


def test_what_the_hub_refuses_all_processes_refuse(pixel):
    """None is left waiting at a barrier for one that has gone."""
    for rank, printed in zip(pixel.refused.seen, pixel.refused.printed, strict=True):
        assert rank["code"] == 1 and rank["rows"] == []
        assert re.search("UsageError: --push_to_hub: .*OfflineModeIsEnabled", printed)
    assert not pixel.refused.folder.exists()


@pytest.mark.slow
def test_only_a_short_timeout_ends_a_long_validation(python, tmp_path, pixel):
    """With the scripts' own the others wait, as hosts and not as devices, which lose patience sooner; with 2 seconds
    they do not, at the barrier before a checkpoint and where they ask each other whether to stop."""
    jobs = {}
    for name, patience in (("long", {"step_patience": 4}), ("short", {"patience": 2, "fails": True})):
        for where, checkpointing in (("barrier", 1), ("stop", 9)):
            flags = ["--max_train_steps", 2, "--validation_steps", 1, "--checkpointing_steps", checkpointing]
            each = job(tmp_path / name / where, 2, *pixel.flags, *flags, validation_takes=7, **patience)
            jobs[f"{name}_{where}"] = each
    runs = run_jobs(python, jobs, tmp_path)
    assert PATIENCE >= timedelta(days=1)
    for where in ("barrier", "stop"):
        long, short = getattr(runs, f"long_{where}"), getattr(runs, f"short_{where}")
        assert [rank["code"] for rank in long.seen] == [0, 0]
        assert short.seen[1]["code"] == 1
        assert re.search("(?i)timed? ?out", short.printed[1])


def test_the_recipes_are_accelerates(tmp_path):
    single, several = (load_config_from_file(str(RECIPES / f"ddp_{name}.yaml")) for name in ("single", "multi"))
    for config in (single, several):
        assert config.distributed_type == DistributedType.MULTI_GPU
        assert config.num_processes % config.num_machines == 0 and not config.use_cpu
    assert single.num_machines == 1 and single.main_process_port == 0
    assert several.num_machines == 2 and several.main_process_ip and several.main_process_port


def test_the_documents_show_how_to_launch_them():
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    shown = set(re.findall(r"--config_file (recipes/accelerate/[\w.]+)", text))
    assert shown == {str(path.relative_to(ROOT)) for path in RECIPES.iterdir()}


@pytest.fixture
def launched(tmp_path, teacher_dir, data_dir):
    """The single-machine recipe on two CPU processes, by `accelerate launch`, in the midst of a long run."""
    flags = ["--pretrained_model_name_or_path", teacher_dir, "--dataset_name", data_dir, "--pruning_ratio", "0.5"]
    flags += [*COMMON, "--train_batch_size", "2", "--student_init", "magnitude", "--checkpointing_steps", "100000"]
    flags += ["--max_train_steps", "100000", "--output_dir", str(tmp_path / "out")]
    command = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "ddp_single.yaml")]
    command += ["--num_processes", "2", str(ROOT / "train_place.py"), *flags]
    with (tmp_path / "printed.txt").open("w") as printed:
        launcher = subprocess.Popen(
            [sys.executable, *command], stdout=printed, stderr=subprocess.STDOUT, cwd=ROOT, env=environment()
        )
    log, ranks = tmp_path / "out" / "log.jsonl", {}
    for _ in range(600):
        if (log.exists() and len(log.read_text().splitlines()) > 2) or launcher.poll() is not None:
            break
        time.sleep(0.2)
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if "RANK" in (variables := child.environ()):
            ranks[int(variables["RANK"])] = child
    yield SimpleNamespace(launcher=launcher, ranks=ranks, folder=tmp_path / "out", printed=tmp_path / "printed.txt")
    for process in (launcher, *ranks.values()):
        if psutil.pid_exists(process.pid):
            process.kill()


@pytest.mark.slow
def test_killing_one_ends_the_other(launched):
    assert sorted(launched.ranks) == [0, 1], launched.printed.read_text()[-3000:]
    launched.ranks[1].kill()
    assert launched.launcher.wait(timeout=60) != 0
    assert not any(rank.is_running() for rank in launched.ranks.values())
    printed = launched.printed.read_text()
    assert f"Signal 9 (SIGKILL) received by PID {launched.ranks[1].pid}" in printed
    assert "Saved:" not in printed and not list((launched.folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves(launched):
    assert sorted(launched.ranks) == [0, 1], launched.printed.read_text()[-3000:]
    launched.launcher.terminate()
    assert launched.launcher.wait(timeout=60) != 0
    assert not any(rank.is_running() for rank in launched.ranks.values())
    printed = launched.printed.read_text()
    (saved,) = (launched.folder / "checkpoints").iterdir()
    assert printed.count("SIGTERM: saving after this step") == 2
    assert printed.count(f"Stopped at step {int(saved.name[5:])}, saved {saved}") == 1
    assert (saved / "state.json").is_file()
