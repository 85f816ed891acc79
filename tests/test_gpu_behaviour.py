# SPDX-License-Identifier: Apache-2.0
"""What a GPU does otherwise, brought about on the CPU."""

import pytest
import torch
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
