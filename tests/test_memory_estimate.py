# SPDX-License-Identifier: Apache-2.0
"""The plan's memory estimate against what a real training step holds, as the allocator itself reports it."""

import itertools
import re
import time
from types import SimpleNamespace

import latent_pipelines
import pytest
import torch
from conftest import TINY_UNET, build_unet, save_images
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel
from torch.profiler import profile

import train_place
from utils.distillation.features import Tapped
from utils.students import blocks
from utils.training import memory

SHAPES = ["default", "text", "tokens", "checkpointing"]


def flags_of(shape: str, tmp_path) -> list:
    """Of a run whose activations are most of its memory."""
    if shape == "default":
        return ["@assets/default.args", "--max_train_samples", 64, "--validation_feature_extractor", ""]
    if shape == "text":
        teacher = latent_pipelines.save_pipeline(tmp_path / "sd1")
        data = latent_pipelines.save_captioned(tmp_path / "captioned")
        return [
            *("--pretrained_model_name_or_path", teacher, "--train_data_dir", data, "--student_preset", "bk_small"),
            *("--train_batch_size", 16, "--mixed_precision", "bf16", "--use_ema"),
        ]
    if shape == "tokens":
        teacher = latent_pipelines.save_sd3(tmp_path / "sd3", num_attention_heads=4, caption_projection_dim=32)
        data = latent_pipelines.save_captioned(tmp_path / "captioned")
        return [
            *("--pretrained_model_name_or_path", teacher, "--train_data_dir", data, "--student_depth", 3),
            *("--train_batch_size", 16, "--mixed_precision", "bf16", "--use_ema", "--lambda_kd_feat", 1),
        ]
    unet = {**TINY_UNET, "sample_size": 32, "block_out_channels": (32, 64)}
    DDPMPipeline(build_unet(**unet), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    data = save_images(tmp_path / "large", side=32)
    return [
        *("--pretrained_model_name_or_path", tmp_path / "teacher", "--dataset_name", data, "--pruning_ratio", "0.5"),
        *("--gradient_checkpointing", "--lambda_kd_feat", 1, "--train_batch_size", 8),
        *("--gradient_accumulation_steps", 2),
    ]


@pytest.fixture
def measured(monkeypatch):
    """The real peak in bytes of the second optimizer step of train_place.py."""
    seen = SimpleNamespace(peak=None, profiler=None)
    tap, batches, checkpoints = train_place.tap_pair, train_place.training_batches, train_place.Checkpoints

    def tap_pair(*args):
        seen.student, seen.teacher = tap(*args)
        return seen.student, seen.teacher

    class Checkpoints(checkpoints):
        def __init__(self, *args, **parts):
            super().__init__(*args, **parts)
            seen.ema, seen.optimizer = parts["ema"], parts["optimizer"]

    def training_batches(dataset, args, *rest, **span):
        micro_steps = args.gradient_accumulation_steps
        for number, item in enumerate(batches(dataset, args, *rest, **span)):
            if number == micro_steps:
                tensors = [v for entry in seen.optimizer.state.values() for v in entry.values()]
                tensors += seen.ema.shadow_params if seen.ema else []
                for module in (seen.student, seen.teacher):
                    tensors += [*module.parameters(), *module.buffers()]
                seen.resident = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                seen.profiler = profile(profile_memory=True).__enter__()
            yield item

    def end_step(self, step, *rest):
        if step == 2:
            seen.profiler.__exit__(None, None, None)
            events = seen.profiler.profiler.kineto_results.events()
            changes = [event.nbytes() for event in events if event.name() == "[memory]"]
            seen.peak = seen.resident + max(itertools.accumulate(changes))
        ended(self, step, *rest)

    ended = train_place.RunLog.end_step
    monkeypatch.setattr(train_place, "tap_pair", tap_pair)
    monkeypatch.setattr(train_place, "Checkpoints", Checkpoints)
    monkeypatch.setattr(train_place, "training_batches", training_batches)
    monkeypatch.setattr(train_place.RunLog, "end_step", end_step)
    return seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_the_estimate_is_within_15_percent_of_the_real_peak(ornaments, run, tmp_path, monkeypatch, measured, shape):
    monkeypatch.setattr(memory, "_gib", lambda count: f"{count} bytes")
    told = []
    estimate = train_place.memory_estimate
    monkeypatch.setattr(train_place, "memory_estimate", lambda *args: told.append(estimate(*args)) or told[0])
    flags = flags_of(shape, tmp_path)
    common = ["--max_train_steps", 2, "--validation_shown_samples", 0, "--report_to", "none", "--num_cpu_threads", 1]
    run("train_place", *flags, *common, "--output_dir", tmp_path / "student", defaults=False)
    estimated = int(re.search(r"about (\d+) bytes", told[0])[1])
    print(f"{shape}: estimated {estimated:,}, real {measured.peak:,}, ratio {estimated / measured.peak:.3f}")
    assert estimated == pytest.approx(measured.peak, rel=0.15)


def arguments(**changes) -> SimpleNamespace:
    settings = {"train_batch_size": 16, "gradient_accumulation_steps": 1, "use_8bit_adam": False, "use_ema": False}
    settings |= {"lambda_kd_output": 1, "lambda_kd_feat": 0, "enable_xformers_memory_efficient_attention": False}
    settings |= {"validation_shown_samples": 0, "validation_feature_extractor": None, "validation_batch_size": 4}
    return SimpleNamespace(**{**settings, **changes})


def accelerator(device: str = "cpu", mixed_precision: str = "no", num_processes: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device(device),
        mixed_precision=mixed_precision,
        native_amp=mixed_precision != "no",
        num_processes=num_processes,
    )


class Example:
    """As much of a backbone as the estimate asks."""

    def __init__(self, **example):
        self.inputs = {"x_t": torch.zeros(1, 1, 8, 8), "timestep": torch.zeros(1, dtype=torch.long), **example}

    def read(self, output):
        return output, None

    def example(self) -> dict:
        return self.inputs


def step_bytes(args=None, where=None, backbone=None, student=None) -> int:
    student, teacher = Tapped(student or build_unet(dropout=0.1)).train(), Tapped(build_unet())
    return memory._training_step(args or arguments(), where or accelerator(), student, teacher, backbone or Example())


def test_the_estimate_touches_neither_generators_nor_gradients():
    student = build_unet(dropout=0.5)
    student.enable_gradient_checkpointing()
    state = torch.get_rng_state()
    step_bytes(student=student)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert sum(value.abs().sum() for value in student.parameters()) > 0  # real values, still


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_recomputed_is_what_was_computed(device):
    """Autocast and float32 norms of CUDA in both passes of gradient checkpointing, which compares their dtypes."""
    student = build_unet()
    student.enable_gradient_checkpointing()
    where = accelerator(device, "bf16")
    assert step_bytes(where=where, student=student) < 0.8 * step_bytes(where=where)


def test_what_the_estimate_counts():
    """Each by its own size."""
    gradients = sum(4 * p.numel() for p in build_unet().parameters())
    alone = step_bytes()
    assert step_bytes(arguments(train_batch_size=32)) == pytest.approx(2 * alone, rel=0.25)
    # buckets and accumulated gradients are there while the activations are
    assert step_bytes(where=accelerator(num_processes=2)) == pytest.approx(alone + gradients, rel=0.05)
    assert step_bytes(arguments(gradient_accumulation_steps=2)) == pytest.approx(alone + gradients, rel=0.05)
    # autocast halves what is saved, but for norms on CUDA
    half, on_cuda = (step_bytes(where=accelerator(device, "bf16")) for device in ("cpu", "cuda"))
    assert half < 0.75 * alone and half < on_cuda < alone
    assert memory._optimizer_state(10_000, False) == 80_000
    assert memory._optimizer_state(10_000, True) == pytest.approx(20_000 * (1 + 4 / 256), rel=1e-2)


@pytest.mark.slow
def test_a_stable_diffusion_is_estimated_in_seconds():
    """SD 2.1 and bk_tiny, 16 images: 17 GiB, where the attention matrices would make 42 of it."""
    with torch.device("meta"):
        config = {"sample_size": 64, "cross_attention_dim": 1024, "use_linear_projection": True}
        teacher = UNet2DConditionModel(**config, attention_head_dim=(5, 10, 20, 20))
        student = UNet2DConditionModel.from_config(blocks.student_config(dict(teacher.config), "bk_tiny"))
    example = {"x_t": torch.zeros(1, 4, 64, 64), "encoder_hidden_states": torch.zeros(1, 77, 1024)}
    args, where = arguments(use_ema=True), accelerator(mixed_precision="fp16")
    start = time.perf_counter()
    told = memory.memory_estimate(
        args, where, Tapped(student.train()), Tapped(teacher.half().requires_grad_(False)), Example(**example)
    )
    print(f"{time.perf_counter() - start:.1f} s: {told}")
    assert float(re.search(r"about ([\d.]+) GiB", told)[1]) == pytest.approx(17.0, rel=0.05)
