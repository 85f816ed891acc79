# SPDX-License-Identifier: Apache-2.0
"""What a GPU does otherwise, brought about on the CPU."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import train_place
from utils.training.arguments import parse_args
from utils.training.log import RunLog
from utils.training.optimizer import make_optimizer


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
        student = DistributedDataParallel(student, **self.ddp_handler.to_kwargs())
        assert student.gradient_as_bucket_view  # the gradients are averaged where they lie
        student.device_ids, student.use_side_stream_for_tensor_copies = [0], False
        return student, optimizer

    monkeypatch.setattr(train_place.Accelerator, "prepare", prepared)
    folder = run("train_place", "--max_train_steps", "2", "--validation_shown_samples", "0")
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
    flags = [
        "--use_8bit_adam",
        "--learning_rate",
        "1e-3",
        "--checkpointing_steps",
        "2",
        "--validation_shown_samples",
        "0",
    ]
    whole = run("train_place", *flags, output="whole")
    names = load_file(whole / "checkpoints" / "step-0000004" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in names.values()} == {torch.uint8, torch.float32}  # large and small weights
    shutil.copytree(whole, whole.with_name("resumed"))
    shutil.rmtree(whole.with_name("resumed") / "checkpoints" / "step-0000004")
    resumed = run("train_place", *flags, "--resume_from_checkpoint", "latest", output="resumed")
    assert same_run(resumed, whole, step=4)


def test_8_bit_adam_is_refused_where_it_has_no_kernels():
    weights, args = torch.nn.Linear(2, 2).parameters(), parse_args("", lambda group: None, ["--use_8bit_adam"])
    with pytest.raises(ValueError, match="--use_8bit_adam: bitsandbytes has no optimizer for Apple's GPU"):
        make_optimizer(args, weights, SimpleNamespace(device=torch.device("mps"), num_processes=1))


@pytest.fixture
def scaled(monkeypatch):
    """`scaled(init_scale=...)`: from now on accelerators train in fp16 with a loss scaler, as on CUDA; what it saw."""

    def use(**settings) -> SimpleNamespace:
        seen, init, end_step = SimpleNamespace(skipped=[], rates=[]), Accelerator.__init__, RunLog.end_step

        def with_scaler(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.scaler, self.native_amp = torch.amp.GradScaler("cpu", **settings), True
            self.state._mixed_precision = "fp16"

        def ended(self, step, grad_norm, learning_rate):
            seen.skipped.append(not math.isfinite(grad_norm))
            seen.rates.append(learning_rate)
            end_step(self, step, grad_norm, learning_rate)

        monkeypatch.setattr(Accelerator, "__init__", with_scaler)
        monkeypatch.setattr(RunLog, "end_step", ended)
        return seen

    return use


FP16 = ["--use_ema", "--learning_rate", "1e-3", "--lr_scheduler", "linear", "--checkpointing_steps", "1"]
FP16 += [
    "--checkpoints_total_limit",
    "9",
    "--validation_shown_samples",
    "0",
    "--max_train_steps",
    "6",
    "--logging_steps",
    "2",
]


def strict_log(folder: Path) -> list[dict]:
    def refuse(word):
        raise AssertionError(f"log.jsonl holds {word}, which is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_skipped_steps_do_not_count(run, scaled):
    """Not for the schedule, not for the average, not in means; the log tells how many they were. What they saw of the
    errors along the schedule does."""
    seen = scaled(init_scale=2.0**40, backoff_factor=2.0**-12)
    folder = run("train_place", *FP16, "--timestep_balance", "0.5", "--task_balance", "1")
    count = sum(seen.skipped)
    assert 1 <= count < 6
    state = json.loads((folder / "checkpoints" / "step-0000006" / "state.json").read_text())
    assert state["lr_scheduler"]["last_epoch"] == state["ema"]["optimization_step"] == 6 - count
    for _, counts in state["states"]["balance"].values():
        assert sum(counts) == pytest.approx(sum(4 * 0.99**age for age in range(6)))  # batches of 4
    taken = itertools.accumulate(not skipped for skipped in seen.skipped)
    assert seen.rates == pytest.approx([1e-3 * (1 - steps / 6) for steps in taken])
    log = strict_log(folder)
    assert sum(line["skipped_steps"] for line in log) == count
    assert log[-1]["loss_scale"] == 2.0 ** (40 - 12 * count) and log[-1]["grad_norm"] > 0


class Reads(TorchDispatchMode):
    """Counts numbers that the host reads from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fp16", [False, True])
def test_the_host_reads_one_number_an_optimizer_step_and_only_in_fp16(run, scaled, monkeypatch, fp16):
    reads, counts = Reads(), []
    batches, end_step = train_place.training_batches, RunLog.end_step

    def counted(*args, **span):
        for batch, rng in batches(*args, **span):
            with reads:
                yield batch, rng

    def ended(self, *rest):
        counts.append(reads.count)
        end_step(self, *rest)
        reads.count = 0

    if fp16:
        scaled(init_scale=2.0**10)
    monkeypatch.setattr(train_place, "training_batches", counted)
    monkeypatch.setattr(RunLog, "end_step", ended)
    run("train_place", "--use_ema", "--gradient_accumulation_steps", "2", "--validation_shown_samples", "0")
    assert counts == [int(fp16)] * 4


def test_endless_overflow_stops_the_run(run, scaled):
    scaled(init_scale=3e38, backoff_factor=0.999)
    with pytest.raises(FloatingPointError, match="8 steps in a row were skipped up to step 8.*--mixed_precision bf16"):
        run("train_place", *FP16, "--max_train_steps", "20", "--logging_steps", "4")


def test_a_loss_scale_below_one_stops_the_run(run, scaled):
    scaled(init_scale=0.75)
    with pytest.raises(FloatingPointError, match="the loss scale is down at 0.75"):
        run("train_place", *FP16)


def test_fp16_resumes_exactly(run, scaled):
    scaled(init_scale=2.0**40, backoff_factor=2.0**-12, growth_interval=2)
    whole = run("train_place", *FP16, output="whole")
    for step in (1, 3):  # after a skipped step, and between the counts of the scaler
        resumed = whole.with_name(f"resumed-{step}")
        shutil.copytree(whole, resumed)
        for later in range(step + 1, 7):
            shutil.rmtree(resumed / "checkpoints" / f"step-{later:07d}")
        run("train_place", *FP16, "--resume_from_checkpoint", "latest", output=resumed.name)
        assert same_run(resumed, whole, step=6)
        states = [json.loads((each / "checkpoints/step-0000006/state.json").read_text()) for each in (resumed, whole)]
        assert states[0]["scaler"] == states[1]["scaler"] and states[0]["ema"] == states[1]["ema"]


@pytest.mark.parametrize(
    "variable, value, told",
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "--gradient_accumulation_steps is 1, but accelerate is told 4",
        ),
    ],
)
def test_what_launch_may_ask_for_and_is_not_done_here_is_refused(run, monkeypatch, variable, value, told):
    monkeypatch.setenv(variable, value)
    for script in ("train_lift", "train_place"):
        with pytest.raises(ValueError, match=told):
            run(script, "--validation_shown_samples", "0")


def test_accumulation_told_twice_and_alike_is_no_contradiction(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    folder = run("train_place", "--gradient_accumulation_steps", "2", "--validation_shown_samples", "0")
    assert [line["step"] for line in strict_log(folder)] == [1, 2, 3, 4]


def test_a_checkpoint_belongs_to_its_precision(run, monkeypatch):
    """Also where it is accelerate's config that chose it; where the flag says the same, it is the same run."""
    flags = ["--checkpointing_steps", "2", "--validation_shown_samples", "0"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run("train_place", *flags)
    again = [*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "5"]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    with pytest.raises(ValueError, match="another run: autocast was bf16, is no"):
        run("train_place", *again)
    run("train_place", *again, "--mixed_precision", "bf16")


def test_another_device_is_another_run(run):
    folder = run("train_place", "--checkpointing_steps", "2", "--validation_shown_samples", "0")
    for path in folder.glob("checkpoints/*/state.json"):
        path.write_text(path.read_text().replace('"device_type": "cpu"', '"device_type": "cuda"'))
    with pytest.raises(ValueError, match="another run: device_type was cuda, is cpu"):
        run("train_place", "--resume_from_checkpoint", "latest", "--max_train_steps", "5")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_torch_has_for_a_device_what_a_step_asks_of_it(device):
    assert callable(torch.get_device_module(device).manual_seed)
    assert device in torch.utils._foreach_utils._get_fused_kernels_supported_devices()


def test_xformers_that_cannot_run_leave_torchs_attention(run, monkeypatch, caplog):
    """A wheel of another torch imports, and raises at the first call."""

    def raises(self, *_):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    monkeypatch.setattr(UNet2DModel, "enable_xformers_memory_efficient_attention", raises)
    run("train_place", "--enable_xformers_memory_efficient_attention", "--validation_shown_samples", "0")
    assert "PyTorch's attention stays. No operator found" in caplog.text
