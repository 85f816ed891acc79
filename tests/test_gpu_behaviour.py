# SPDX-License-Identifier: Apache-2.0
"""What a GPU does otherwise, brought about on the CPU."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import train_place


@pytest.fixture
def one_process_group(tmp_path):
    """gloo, of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():  # a finished run has ended it
        torch.distributed.destroy_process_group()


def test_the_plan_does_not_call_a_wrapped_student(run, monkeypatch, one_process_group):
    """On CUDA accelerate gives DDP `device_ids`: it then moves its inputs, which tensors without values cannot be."""
    prepare = train_place.Accelerator.prepare

    def prepared(self, student, optimizer):
        student, optimizer = prepare(self, student, optimizer)
        student = DistributedDataParallel(student)
        student.device_ids, student.use_side_stream_for_tensor_copies = [0], False
        return student, optimizer

    monkeypatch.setattr(train_place.Accelerator, "prepare", prepared)
    folder = run("train_place", "--max_train_steps", "2", "--validation_images", "0")
    assert (folder / "unet").is_dir()


def same_run(ours: Path, theirs: Path, step: int) -> bool:
    """Every tensor of two checkpoints, and every line of the logs."""
    for file in sorted((ours / "checkpoints" / f"step-{step:07d}").glob("*.safetensors")):
        pair = load_file(file), load_file(theirs / file.relative_to(ours))
        assert pair[0].keys() == pair[1].keys() and pair[0], file.name
        assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0]), file.name
    return (ours / "log.jsonl").read_text() == (theirs / "log.jsonl").read_text()


def test_8_bit_adam_resumes_exactly(run):
    pytest.importorskip("bitsandbytes")
    flags = ["--use_8bit_adam", "--learning_rate", "1e-3", "--checkpointing_steps", "2", "--validation_images", "0"]
    whole = run("train_place", *flags, output="whole")
    names = load_file(whole / "checkpoints" / "step-0000004" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in names.values()} == {torch.uint8, torch.float32}  # large and small weights
    shutil.copytree(whole, whole.with_name("resumed"))
    shutil.rmtree(whole.with_name("resumed") / "checkpoints" / "step-0000004")
    resumed = run("train_place", *flags, "--resume_from_checkpoint", "latest", output="resumed")
    assert same_run(resumed, whole, step=4)
