# SPDX-License-Identifier: Apache-2.0
"""Both training scripts, run for real on tiny models."""

import difflib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_unet, read_log, run_script
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

import train_place
import utils.training.log
from utils.backbones.ddpm import DDPM

ROOT = Path(__file__).resolve().parent.parent
BASELINES = {
    "without distillation": ["--lambda_kd_output", "0"],
    "OutKD": ["--output_loss", "mse"],
    "OutKD l1": ["--output_loss", "l1"],
    "OutKD huber": ["--output_loss", "huber"],
    "OutKD log": ["--output_loss", "log"],
    "FeatKD": ["--lambda_kd_output", "0", "--lambda_kd_feat", "1"],
    "OutKD + FeatKD": ["--output_loss", "mse", "--lambda_kd_feat", "1"],
    "LIFT": [],
    "LIFT per sample": ["--coefficients", "sample", "--coarse_norm", "l2", "--coarse_scale", "0.5"],
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported student's tensors."""
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_scripts_differ_in_their_method_alone():
    lift, place = ((ROOT / name).read_text() for name in ("train_lift.py", "train_place.py"))
    for text in (lift, place):
        assert "if family" not in text and "isinstance" not in text
    # docstring and method flags go; what is left may differ in the import of the loss and the lines that call it
    bodies = [
        re.sub(r'(?s)""".*?"""', "", text, count=1).split("def add_method_arguments")[0]
        + text[text.index('if __name__ == "__main__":') :]
        for text in (lift, place)
    ]
    changed = [
        line[2:].strip()
        for line in difflib.ndiff(*(body.splitlines() for body in bodies))
        if line[0] in "+-" and line[2:].strip()
    ]
    start = "from utils.distillation.losses import"
    allowed = re.compile(
        rf"{start}|output = (place|lift|output)_loss\(|if args.output_loss|else:|\)|student_pred.output,|teacher_pred."
        r"output,|(group_size|grouping|coefficients|coarse_norm|coarse_scale|kind)=args\.|weight=fine_weight\(|"
        r"sample_weight=balance"
    )
    assert [line for line in changed if not allowed.match(line)] == []


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(run, name):
    flags = ["--learning_rate", "1e-3", "--max_train_steps", "3", "--checkpointing_steps", "2"]
    folder = run("train_lift", *BASELINES[name], *flags)
    log = read_log(folder)
    assert [line["step"] for line in log] == [1, 2, 3]
    assert all(math.isfinite(value) for line in log for value in line.values() if value is not None)
    before, after = (load_file(path / "student.safetensors") for path in sorted((folder / "checkpoints").iterdir()))
    assert max((after[name] - tensor).abs().max() for name, tensor in before.items()) > 1e-4
    assert all(torch.equal(after[f"denoiser.{key}"], tensor) for key, tensor in weights(folder).items())
    terms = set(log[0])
    assert {"loss", "task", "grad_norm", "learning_rate"} <= terms
    assert any(f"error_quarter_{i}" in terms for i in (1, 2, 3, 4))
    assert ("slope" in terms) == (name != "without distillation")
    if name.startswith("OutKD"):
        assert log[0]["slope"] == 1 and log[0]["intercept"] == 0 and log[0]["w"] == 1 and log[0]["coarse"] == 0
    if "FeatKD" in name:
        assert log[0]["feature"] > 0
    pieces = log[0]["task"] + ("FeatKD" != name) * log[0].get("output", 0) + log[0].get("feature", 0)
    assert log[0]["loss"] == pytest.approx(pieces, rel=1e-6)


def test_without_distillation_the_teacher_never_runs(run):
    forwards = []

    def count(module, _inputs):
        # not those that count multiply-adds, on meta, or bytes, with fake tensors
        real = isinstance(module, UNet2DModel) and not isinstance(next(module.parameters()), FakeTensor)
        if real and module.device.type != "meta":
            forwards.append("student" if module.training else "frozen")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        run("train_lift", "--lambda_kd_output", "0", "--validation_shown_samples", "1")
        alone = forwards.count("frozen"), forwards.count("student")
        forwards.clear()
        run("train_lift", "--validation_shown_samples", "1", output="distilled")
    finally:
        handle.remove()
    assert alone[1] == 4
    assert forwards.count("frozen") - alone[0] == 4  # one a step; the rest are samples of the grid


def test_from_scratch(run, tmp_path, data_dir):
    config = tmp_path / "config.json"
    build_unet().save_config(tmp_path)
    argv = ["--student_config", config, "--lambda_kd_output", "0", "--max_train_steps", "2", "--train_batch_size", "4"]
    argv += ["--validation_num_inference_steps", "2", "--validation_shown_samples", "2", "--report_to", "none"]
    folder = run("train_lift", *argv, "--dataset_name", data_dir, defaults=False)
    assert DDPMPipeline.from_pretrained(folder).unet.config.block_out_channels == [16, 32]


@pytest.mark.slow  # the contract's tests of ddpm are quicker
def test_the_student_is_a_stock_pipeline(run, ornaments, python, tmp_path):
    """The whole way of a user, with Taylor scores, samples and loss curves, to a process that knows nothing of us."""
    flags = ["--use_ema", "--lambda_kd_feat", "1", "--learning_rate", "1e-3"]
    folder = run("train_place", *flags, "--student_init", "taylor", "--validation_shown_samples", "2")
    script = (
        "import sys, torch; from diffusers import DDPMPipeline; p = DDPMPipeline.from_pretrained(sys.argv[1]);"
        "i = p(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0];"
        "print(i.size, sum(x.numel() for x in p.unet.parameters()));"
        "assert not any(m.split('.')[0] in ('utils', 'train_place') for m in sys.modules)"
    )
    done = python.run("-c", script, folder, cwd=tmp_path)
    assert done.stdout.split()[:2] == ["(8,", "8)"] and done.returncode == 0, done.stderr
    ema = load_file(folder / "checkpoints" / "step-0000004" / "ema.safetensors")
    for i, parameter in enumerate(UNet2DModel.from_pretrained(folder / "unet").parameters()):
        assert torch.equal(parameter, ema[str(i)])  # the average, not the last weights
    live = load_file(folder / "checkpoints" / "step-0000004" / "student.safetensors")
    assert any(name.startswith("projectors.") for name in live)
    assert not any("projector" in name for name in weights(folder))
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments["arguments"]["lambda_kd_feat"] == 1 and "torch" in arguments["versions"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "PLACE" in card and "samples.png" in card
    assert Image.open(folder / "samples.png").size > (2 * 68, 2 * 68)  # which has words beside it
    assert Image.open(folder / "losses.png").size[0] > 900


def test_a_ddim_teacher_gives_a_ddim_student(run, tmp_path, teacher_dir):
    DDIMPipeline.from_pretrained(teacher_dir).save_pretrained(tmp_path / "ddim")
    folder = run("train_place", "--pretrained_model_name_or_path", tmp_path / "ddim", "--max_train_steps", "1")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"


@pytest.mark.slow
def test_a_norm_of_0_clips_nothing(run):
    """Adam does not see the gradient's scale, but with a large epsilon."""
    flags = ("--learning_rate", "1e-2", "--adam_epsilon", "1")
    plain, wide, narrow = (
        weights(run("train_place", *flags, "--max_grad_norm", norm, output=norm)) for norm in ("0", "1e9", "1e-3")
    )
    assert all(torch.equal(plain[name], wide[name]) for name in wide)
    assert not all(torch.equal(plain[name], narrow[name]) for name in narrow)


def test_projectors_are_trained_and_clipped_with_the_student(run):
    flags = ["--lambda_kd_feat", "1", "--learning_rate", "1e-2", "--checkpointing_steps", "1"]
    folder = run("train_place", *flags, "--checkpoints_total_limit", "9")
    first, last = (load_file(folder / "checkpoints" / f"step-000000{i}" / "student.safetensors") for i in (1, 4))
    projectors = [name for name in first if name.startswith("projectors.")]
    assert projectors
    assert all((first[name] - last[name]).abs().max() > 1e-3 for name in projectors)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, teacher_dir, data_dir) -> Path:
    """A run with the defaults alone."""
    return run_script(tmp_path_factory.mktemp("plain"), teacher_dir, data_dir, "train_place", "--max_train_steps", "3")


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision", "bf16"],
        ["--teacher_dtype", "bf16"],
        ["--optimizer", "adam", "--adam_weight_decay", "0.1"],
        ["--random_flip", "--antithetic_timesteps", "--snr_gamma", "5"],
        ["--weighting", "linear", "--grouping", "signed", "--group_size", "8", "--coarse_norm", "l2"],
        ["--weighting", "cosine", "--grouping", "patch", "--coarse_scale", "2"],
        ["--allow_tf32", "--weighting", "constant", "--gradient_accumulation_steps", "2"],
    ],
    ids=lambda flags: flags[0],
)
def test_flags_change_the_loss(run, plain, flags):
    other = run("train_place", "--max_train_steps", "3", *flags)
    traces = [[line["loss"] for line in read_log(folder)] for folder in (plain, other)]
    assert traces[0] != traces[1] and len(traces[1]) == 3
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def test_the_bar_is_closed_before_the_summary(run, monkeypatch):
    bars, original = [], train_place.summary
    monkeypatch.setattr(
        train_place, "summary", lambda args, log, *rest: bars.append(log.progress) or original(args, log, *rest)
    )
    run("train_place", "--max_train_steps", "2", "--logging_steps", "5")
    (bar,) = bars
    assert bar.disable and bar.n == 2  # tqdm's own sign that it is closed


def test_bad_images_are_skipped_and_counted(run, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("L", (8, 8), color=20 * i).save(folder / f"{i:02d}.png")
    (folder / "05.png").write_bytes(b"no image")
    data = ["--train_data_dir", folder, "--dataset_name", ""]
    with pytest.raises(ValueError, match=r"row 5 .*05\.png.*--skip_bad_images"):
        run("train_place", *data)
    run("train_place", *data, "--skip_bad_images", "--max_train_steps", "3")
    printed = capsys.readouterr().out
    assert (
        "12 images (1 undecodable one replaced) as L, 8 a side" in printed
        and "1 image could not be decoded" in printed
    )


def test_accumulation_counts_optimizer_steps(run):
    flags = ["--train_batch_size", "2", "--gradient_accumulation_steps", "3", "--lr_scheduler", "linear"]
    log = read_log(run("train_lift", *flags, "--learning_rate", "1.0e-3"))
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in log] == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0])


def test_a_feature_weight_that_falls_and_a_rate_that_falls_not_to_zero(run):
    flags = "--lambda_kd_feat 0.5 --feature_weighting linear --feature_mask_sigma 2 --lambda_kd_output 2".split()
    log = read_log(run("train_lift", *flags, "--lr_scheduler", "cosine", "--min_lr_rate", "0.5"))
    for line, share in zip(log, (1, 0.75, 0.5, 0.25), strict=True):
        parts = line["task"] + 2 * line["output"] + 0.5 * share * line["feature"]
        assert line["loss"] == pytest.approx(parts, rel=1e-6) and line["feature"] > 0
    rates = [2e-4 * (0.75 + 0.25 * math.cos(math.pi * step / 4)) for step in (1, 2, 3, 4)]
    assert [line["learning_rate"] for line in log] == pytest.approx(rates)


def test_a_run_says_its_threads_and_when_it_ends(run, capsys, monkeypatch):
    monkeypatch.setattr(utils.training.log, "PACED", 1)
    run("train_place", "--max_train_steps", "5", "--num_cpu_threads", "2")
    printed = capsys.readouterr().out
    assert re.search(r"^devices .*, 2 threads each, (asleep|spinning briefly|waiting)", printed, re.MULTILINE)
    assert re.search(r"^A step takes [\d.]+ m?s: about .* for the 2 that are left, ", printed, re.MULTILINE)


def test_feature_distance_keeps_the_best(run, capsys):
    flags = [
        "--validation_shown_samples",
        "2",
        "--validation_feature_extractor",
        ROOT / "assets" / "classifier",
        "--validation_num_samples",
        "20",
    ]
    flags += ["--validation_batch_size", "8", "--validation_split", "test", "--validation_steps", "2"]
    folder = run("train_place", *flags, "--learning_rate", "1e-2")
    distances = [line["frechet_distance"] for line in read_log(folder) if "frechet_distance" in line]
    best = json.loads((folder / "best" / "distance.json").read_text())
    assert len(distances) == 2 and best["frechet_distance"] == min(distances)
    assert DDPMPipeline.from_pretrained(folder / "best").unet.config.block_out_channels == [8, 16]
    printed = capsys.readouterr().out
    for who in ("noise", "student before training", "teacher", "student "):
        assert f"  {who}" in printed
    assert f"{min(distances):.2f}" in (printed + (folder / "README.md").read_text())
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]


def test_8bit_adam_without_bitsandbytes_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # it cannot be imported
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        run("train_place", "--use_8bit_adam")


def test_xformers_that_does_not_work_is_warned_of(run, caplog):
    run("train_place", "--enable_xformers_memory_efficient_attention", "--max_train_steps", "1")
    assert "PyTorch's attention stays" in caplog.text


@pytest.mark.parametrize("tracker", ["telepathy", "wandb"])
def test_a_tracker_that_is_not_there_is_refused(run, tracker):
    with pytest.raises(ValueError, match=f"--report_to {tracker}"):
        run("train_place", "--report_to", tracker)


def test_tensorboard_gets_every_term(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--report_to", "tensorboard", "--tracker_project_name", "here", "--validation_shown_samples", "1"]
    folder = run("train_place", *flags)
    events = EventAccumulator(str(folder / "here")).Reload()
    wanted = {"loss", "task", "coarse", "fine", "w", "slope", "intercept", "grad_norm", "images_per_second"}
    assert wanted | {"error_quarter_2"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]


def launch(*flags, cwd=ROOT, before=(), **environment) -> subprocess.CompletedProcess:
    """`accelerate launch`, as a user does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *before, *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_launched_under_dynamo(run, tmp_path, teacher_dir, data_dir):
    flags = ["--max_train_steps", "2", "--train_batch_size", "4", "--lambda_kd_feat", "1", "--use_ema"]
    flags += ["--validation_num_inference_steps", "2", "--validation_shown_samples", "2", "--num_cpu_threads", "1"]
    plain, compiled = run("train_lift", *flags, output="plain"), tmp_path / "compiled"
    flags += ["--pretrained_model_name_or_path", teacher_dir, "--dataset_name", data_dir, "--pruning_ratio", "0.5"]
    flags += ["--student_init", "magnitude"]  # as `run` has it
    done = launch("train_lift.py", *flags, "--output_dir", compiled, before=("--dynamo_backend", "eager"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Saved:" in done.stdout and "Next:" in done.stdout
    for key, tensor in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[key], tensor, rtol=1e-4, atol=1e-6)


def test_samples_that_overflow_do_not_end_a_run(run, monkeypatch, caplog):
    """Nor take the grid with them, where its own samples do not."""
    sample = DDPM.sample

    def overflow(self, denoiser, seeds, *more):
        if len(seeds) == 4:
            raise FloatingPointError("a sample holds NaN or infinity")
        return sample(self, denoiser, seeds, *more)

    monkeypatch.setattr(DDPM, "sample", overflow)
    given = ["--validation_feature_extractor", str(ROOT / "assets" / "classifier"), "--validation_num_samples", "4"]
    folder = run("train_place", *given, "--validation_steps", "2", "--validation_shown_samples", "2")
    assert (folder / "samples" / "step-0000002.png").exists()
    assert (folder / "unet" / "config.json").exists() and len(read_log(folder)) == 4
    assert "The validation of step 2 was left out: a sample holds NaN" in caplog.text
    assert "The validation of the references was left out" in caplog.text
