# SPDX-License-Identifier: Apache-2.0
"""Tiny real models and data, built once a session, and a way to run the scripts on them."""

import functools
import importlib
import json
import os
import signal
from pathlib import Path

# Before the libraries read them: a missing folder is not looked for on the Hub, and threads of the scripts that tests
# start wait asleep, for spinning they would take the cores from the other worker
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402
from forks import ForkServer  # noqa: E402

from utils.command_line import call  # noqa: E402
from utils.output_dir import unlock_output_dir  # noqa: E402
from utils.randomness import seed_from  # noqa: E402

TINY_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def build_unet(seed: int = 0, **changes) -> UNet2DModel:
    """A random `UNet2DModel` of 0.15M parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(**{**TINY_UNET, **changes})


def save_images(folder: Path, count: int = 24, side: int = 8, mode: str = "L", seed: int = 0) -> Path:
    """`count` random images as parquet in the Hub's layout, splits train and test."""
    generator = np.random.default_rng(seed)
    shape = (count, side, side) if mode == "L" else (count, side, side, 3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        rows = {"image": list(pixels), "label": list(range(count))}
        target = folder / "data" / f"{split}-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(target)
    return folder


# The longest files come first, so that no worker starts one of them when the other is about to end
LONGEST = "contract stable_diffusion evaluate_fid students hub distributed checkpoint analyze_error blocks".split()


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory) -> str:
    """A tiny DDPMPipeline, 8x8 grayscale."""
    folder = tmp_path_factory.mktemp("teacher")
    DDPMPipeline(build_unet(), DDPMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """24 train and 24 test images, 8x8 grayscale."""
    return str(save_images(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def python():
    """`python.start("train_place.py", "--flag", value)`: a new process; see `forks.ForkServer`."""
    with ForkServer() as server:
        yield server


# More than half of a tiny run's time, and no part of what it computes
ORNAMENTS = {
    "utils.publishing.card.plot_losses": lambda log, picture, teacher: picture.touch(),
    "train_lift.memory_estimate": lambda *_: "not estimated",
    "train_place.memory_estimate": lambda *_: "not estimated",
    "utils.backbones.saving.load_back": lambda *_: None,
    "utils.training.checkpoint._sync_to_disk": lambda path: None,  # the tests cut no power
}


@pytest.fixture
def ornaments():
    """A test that asks for it, or that runs in another process, gets the runs of a user, with loss curves and all."""


@pytest.fixture(autouse=True)
def _plain_runs(request, monkeypatch):
    if "ornaments" not in request.fixturenames:
        for name, stand_in in ORNAMENTS.items():
            monkeypatch.setattr(name, stand_in)


@pytest.fixture
def run(tmp_path, teacher_dir, data_dir):
    """`run("train_place", "--flag", value, ...)` runs a script in this process and returns its output folder.

    Teacher, data and small numbers are given, neither Taylor scores nor samples; flags named in the call win.
    """
    return functools.partial(run_script, tmp_path, teacher_dir, data_dir)


def run_script(
    folder: Path, teacher: str, data: str, script: str, *flags, output: str = "student", defaults: bool = True
) -> Path:
    """The fixture `run`, for fixtures that live longer: what it makes is in `folder`."""
    given = {
        "--pretrained_model_name_or_path": teacher,
        "--dataset_name": data,
        "--max_train_steps": "4",
        "--train_batch_size": "4",
        "--logging_steps": "1",
        "--validation_shown_samples": "0",
        "--validation_num_inference_steps": "2",
        "--report_to": "none",
        "--num_cpu_threads": "1",
    }
    flags = [str(flag) for flag in flags]
    if not any(flag in flags for flag in ("--pruning_ratio", "--student_config", "--student_model_name_or_path")):
        given |= {"--pruning_ratio": "0.5", "--student_init": "magnitude"}
    argv = [word for pair in given.items() for word in pair] if defaults else []
    argv += ["--output_dir", str(folder / output), *flags]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    torch.manual_seed(seed_from(len(argv)))  # another ambient seed each time: nothing may depend on it
    try:
        call(importlib.import_module(script), argv)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        unlock_output_dir(str(folder / output))  # as the end of a process does, where the run has failed
    return folder / output


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's `log.jsonl`."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
