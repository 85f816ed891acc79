# SPDX-License-Identifier: Apache-2.0
"""Nothing in a training step makes the host wait for its device.

The scripts train on torch's `meta` device, which is not the host's: a number read from there is an error, as is an
operator whose result's size depends on values, and a copy from the host is seen. Only random draws are replaced, as
there is no generator for that device; what is drawn has no values there anyhow.
"""

import latent_pipelines
import pytest
import torch
from accelerate.state import PartialState
from diffusers import SD3Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_place
import utils.data.rows
from utils.training.log import RunLog

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts operators that read a tensor of the host and give one of the device, or the other way."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {
                tensor.device.type for tensor in tree_leaves((args, result)) if isinstance(tensor, torch.Tensor)
            }
            if devices == {"cpu", "meta"}:
                self.found.append(f"{function} of {tuple(result.shape)}")
        if function is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            self.found.append(str(function))
        return result


class Shapes:
    """What `StepRandom` draws, without values."""

    def __init__(self, *counters, **settings):
        pass

    def normal(self, shape):
        return torch.empty(shape, device=META)

    uniform = normal

    def integers(self, high, batch_size, *, antithetic=False):
        return torch.empty(batch_size, dtype=torch.long, device=META)


class EnoughSteps(Exception):
    """The log, which comes next, reads what has no values."""


@pytest.fixture
def waits(run, monkeypatch):
    """`waits(*flags)`: what was waited for in the second and third step, micro-steps and all."""
    copies = Copies()

    def batches(*args, **span):
        # batches are copied from pinned memory while the device works; a step begins when they are there
        for batch, rng in stream(*args, **span):
            with copies:
                yield batch, rng

    def end_step(self, step, *rest):
        ended(self, step, *rest)
        if step == 1:
            copies.found.clear()  # tables that stay on the device once they are there
        if step == 3:
            raise EnoughSteps

    def run_on_meta(*flags) -> list[str]:
        monkeypatch.setattr(PartialState, "default_device", META)
        monkeypatch.setattr(train_place, "training_batches", batches)
        monkeypatch.setattr(utils.data.rows, "StepRandom", Shapes)
        monkeypatch.setattr(RunLog, "end_step", end_step)
        monkeypatch.setattr(train_place, "make_optimizer", lambda args, weights, _: torch.optim.SGD(weights, lr=1e-3))
        steps = ["--max_train_steps", 9, "--logging_steps", 9, "--validation_shown_samples", 0]
        with pytest.raises(EnoughSteps):
            run("train_place", *flags, *steps, output="on_meta")
        return copies.found

    stream, ended = train_place.training_batches, RunLog.end_step
    return run_on_meta


EVERYTHING = ["--lambda_kd_feat", 1, "--use_ema", "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine"]
EVERYTHING += ["--student_init", "magnitude", "--snr_gamma", 5, "--timestep_balance", 0.5, "--task_balance", 1]
EVERYTHING += ["--feature_mask_sigma", 2, "--feature_weighting", "linear", "--min_lr_rate", 0.5]


def test_no_step_of_a_pixel_student_waits(waits):
    assert waits(*EVERYTHING) == []


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sd3", marks=pytest.mark.slow)])
def test_no_step_with_a_latent_cache_waits(run, waits, tmp_path, kind):
    if kind == "sd1":
        teacher, more = latent_pipelines.save_pipeline(tmp_path / "teacher"), ["--noise_offset", "0.1"]
        latent_pipelines.build_unet(layers_per_block=1).save_pretrained(tmp_path / "student")
    else:
        teacher, more = latent_pipelines.save_sd3(tmp_path / "teacher"), ["--weighting_scheme", "sigma_sqrt"]
        SD3Transformer2DModel(**latent_pipelines.SD3 | {"num_layers": 2}).save_pretrained(tmp_path / "student")
    flags = ["--pretrained_model_name_or_path", teacher, "--student_model_name_or_path", tmp_path / "student"]
    flags += ["--latent_cache_dir", tmp_path / "cache", "--dataset_name", "", *more]
    data = ["--train_data_dir", latent_pipelines.save_captioned(tmp_path / "captioned")]
    run("train_place", *flags, *data, "--max_train_steps", 1, "--validation_shown_samples", 0, output="cached")
    assert waits(*flags, "--use_ema", "--gradient_accumulation_steps", 2) == []


@pytest.mark.parametrize("waiting", ["item", "copy", "mask"])
def test_a_wait_would_be_noticed(waits, monkeypatch, waiting):
    loss = train_place.place_loss

    def waits_for(student, teacher, **settings):
        if waiting == "item":
            student.mean().item()
        if waiting == "copy":
            torch.zeros(3).to(student.device)
        if waiting == "mask":
            student[student > 0]
        return loss(student, teacher, **settings)

    monkeypatch.setattr(train_place, "place_loss", waits_for)
    if waiting == "copy":
        assert len(waits(*EVERYTHING)) == 4  # two steps of two micro-steps
    else:
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits(*EVERYTHING)
