# SPDX-License-Identifier: Apache-2.0
"""Flags of diffusers' own training scripts: each does what it does there, and nothing while it is off."""

import math
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate.tracking import get_available_trackers
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

import train_place
from utils.backbones.diffusion import Diffusion
from utils.randomness import StepRandom
from utils.training.arguments import parse_args
from utils.training.log import tracker_names
from utils.training.optimizer import ema_warmup, make_optimizer
from utils.training.schedules import count_steps, make_lr_scheduler

ROOT = Path(__file__).resolve().parent.parent
GIVEN = "--pretrained_model_name_or_path teacher --dataset_name data --pruning_ratio 0.5 --output_dir none".split()


def parsed(*flags) -> Namespace:
    return parse_args("", train_place.add_method_arguments, [*GIVEN, *map(str, flags)])


@pytest.mark.parametrize(
    ("flags", "rate"),
    [([], 1e-4), (["--scale_lr"], 1e-4 * 3 * 2 * 4), (["--scale_lr", "--optimizer", "adam"], 1e-4 * 3 * 2 * 4)],
)
def test_scale_lr_is_a_rate_for_one_image(flags, rate):
    args = parsed("--learning_rate", 1e-4, "--train_batch_size", 3, "--gradient_accumulation_steps", 2, *flags)
    optimizer = make_optimizer(
        args, nn.Linear(2, 2).parameters(), Namespace(device=torch.device("cpu"), num_processes=4)
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)
    assert args.learning_rate == 1e-4  # what cards and checkpoints say


@pytest.mark.parametrize("warmup", [0, 3])
def test_min_lr_rate_is_that_of_transformers(warmup):
    """Whose function counts the same steps; and the closed form."""
    args = parsed(
        "--lr_scheduler", "cosine", "--min_lr_rate", 0.3, "--lr_warmup_steps", warmup, "--max_train_steps", 9
    )
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4) for _ in range(2))
    schedules = (
        make_lr_scheduler(args, ours),
        get_cosine_with_min_lr_schedule_with_warmup(theirs, warmup, 9, min_lr_rate=0.3),
    )
    for step in range(10):
        share = step / 3 if step < warmup else 0.65 + 0.35 * math.cos(math.pi * (step - warmup) / (9 - warmup))
        assert ours.param_groups[0]["lr"] == pytest.approx(2e-4 * share, rel=1e-6)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-6)
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            optimizer.step()
            schedule.step()


def test_input_perturbation_is_noise_of_the_input_alone():
    clean = torch.ones(2, 1, 4, 4)
    found = {}
    for share in (None, 0, 0.1):
        args = parsed(*(() if share is None else ("--input_perturbation", share)))
        found[share] = Diffusion(args, DDPMScheduler(), bounded=True).add_noise(clean, StepRandom(0, 3))
    plain, off, more = found.values()
    for name in ("x_t", "place", "target"):
        assert torch.equal(getattr(plain, name), getattr(off, name))
    assert torch.equal(plain.target, more.target) and torch.equal(plain.place, more.place)
    rng = StepRandom(0, 3)
    rng.integers(1000, 2)
    first, second = rng.normal(clean.shape), rng.normal(clean.shape)
    assert torch.equal(first, more.target)
    assert torch.equal(more.x_t, DDPMScheduler().add_noise(clean, first + 0.1 * second, more.place))


@pytest.mark.parametrize(("epochs", "steps"), [(None, 100_000), (1, 5), (2, 9), (0.5, 3), (0.001, 1)])
def test_epochs_are_counted_in_steps(epochs, steps):
    args = parsed("--train_batch_size", 3, "--gradient_accumulation_steps", 2, "--num_train_epochs", epochs or "")
    count_steps(args, 100, 4)  # 24 images a step
    assert args.max_train_steps == steps and args.num_train_epochs is None  # a card's recipe says one of them


def test_epochs_and_steps_are_one_too_many(tmp_path):
    with pytest.raises(ValueError, match="one of --num_train_epochs and --max_train_steps; found both .3 and 50"):
        parsed("--num_train_epochs", 3, "--max_train_steps", 50)
    (tmp_path / "my.args").write_text("--max_train_steps 50\n")
    assert parsed(f"@{tmp_path / 'my.args'}", "--num_train_epochs", 3, "--max_train_steps", "").num_train_epochs == 3


@pytest.mark.parametrize(
    ("flags", "decays"),
    [
        ([], [0, 2 / 11, 3 / 12, 4 / 13]),
        (["--ema_power", 1], [0, 1 / 2, 2 / 3, 3 / 4]),
        (["--ema_power", 1, "--ema_inv_gamma", 2], [0, 1 / 3, 1 / 2, 3 / 5]),
        (["--ema_inv_gamma", 1], [0, 1 - 2**-0.75, 1 - 3**-0.75, 1 - 4**-0.75]),
    ],
)
def test_the_warm_up_of_the_average(flags, decays):
    ema = EMAModel([nn.Parameter(torch.zeros(1))], decay=0.9999, **ema_warmup(parsed("--use_ema", *flags)))
    assert [ema.get_decay(step) for step in range(1, 5)] == pytest.approx(decays)


def test_report_to_all():
    assert tracker_names("all") == [str(tracker) for tracker in get_available_trackers()]
    assert tracker_names("tensorboard") == ["tensorboard"] and tracker_names("none") is None


def test_the_table_names_flags_as_they_are():
    """Of `docs/flags.md`: what is not here is not, and what is named as ours is ours."""
    text = (ROOT / "docs" / "flags.md").read_text()
    _, absent = text.split("## Not here")
    others = {"--image_interpolation_mode", "--images", "--reference_images"}  # stored otherwise; evaluate_fid.py's
    ours = {f"--{name}" for name in vars(parsed())} | others
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert all(len(row) == 2 for row in rows)
    theirs, answers = ({flag for row in rows for flag in re.findall(r"`(--\w+)", row[i])} for i in (0, 1))
    assert answers <= ours
    not_here = {flag for flag in theirs if f"`{flag}`" in absent.split("|---|---|")[1]} - answers
    assert not not_here & ours and {"--prediction_type", "--offload_ema"} <= not_here
    assert {"--scale_lr", "--input_perturbation", "--num_train_epochs", "--max_train_samples", "--report_to"} <= theirs
