# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, in one table: run this first on a machine that has one. Ten minutes at most.

    python benchmarks/gpu_checks.py                   # every line
    python benchmarks/gpu_checks.py --only fp16 ddp   # those whose name holds one of these words

Each line passes, fails or is skipped, with its reason; the script exits 1 where one failed. Models are tiny and
random, made here; only the last lines are of real size. Without a GPU it runs what the CPU can.
"""

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from check_table import Skip, run_table, train, wanted_words  # noqa: E402

from utils.command_line import start  # noqa: E402

if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    WORDS = start(wanted_words, __doc__)

import conftest  # noqa: E402
import latent_pipelines  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import train_place  # noqa: E402
import utils.data.rows  # noqa: E402
from utils.distillation.features import Tapped  # noqa: E402
from utils.distillation.losses import place_loss  # noqa: E402
from utils.randomness import StepRandom  # noqa: E402
from utils.students import blocks  # noqa: E402
from utils.training import memory  # noqa: E402

CUDA = torch.cuda.is_available()
FAMILIES = ("pixel", "sd1", "sd2", "xl", "dit", "sd3")
COMMON = (
    "--max_train_steps 4 --train_batch_size 4 --logging_steps 1 --validation_shown_samples 0 --report_to none "
    "--use_ema --checkpointing_steps 2 --checkpoints_total_limit 9 --learning_rate 1e-4 --num_cpu_threads 1"
).split()
TOLERANCE = {"no": 1e-3, "bf16": 5e-2, "fp16": 1e-2}  # of a step's loss, relative to float32's on the CPU


class HostRandom(StepRandom):
    """Draws on the CPU, so that a step on any device is of the same numbers."""

    def __init__(self, *counters, device="cpu", **settings):
        super().__init__(*counters, **settings)
        self.device = device

    def _own_rows(self, whole: torch.Tensor) -> torch.Tensor:
        return super()._own_rows(whole).to(self.device)


class Bench:
    """The tiny teachers and data in `folder`, and runs of train_place.py on them."""

    def __init__(self, folder: Path):
        self.folder = folder

    @functools.cache  # noqa: B019  one bench a process
    def flags(self, family: str) -> list[str]:
        """Teacher, data and student of a family."""
        teacher = self.folder / family
        if family == "pixel":
            DDPMPipeline(conftest.build_unet(), DDPMScheduler()).save_pretrained(teacher)
            data = ["--dataset_name", conftest.save_images(self.folder / "images"), "--pruning_ratio", "0.5"]
            data += ["--student_init", "magnitude"]
        elif family == "dit":
            latent_pipelines.save_dit(teacher)
            data = ["--train_data_dir", latent_pipelines.save_classes(self.folder / "classes"), "--student_depth", "2"]
        else:
            captioned = self.folder / "captioned"
            if not captioned.exists():
                latent_pipelines.save_captioned(captioned)
            if family == "sd3":
                latent_pipelines.save_sd3(teacher)
                data = ["--student_depth", "2", "--max_sequence_length", "24"]
            else:
                latent_pipelines.save_pipeline(teacher, family)
                data = ["--student_preset", "bk_small"]
            data += ["--train_data_dir", captioned]
        return [str(word) for word in ("--pretrained_model_name_or_path", teacher, *data, "--lambda_kd_feat", "1")]

    def command(self, family: str, name: str, *more: str) -> list[str]:
        """The arguments of a run that writes to `name`."""
        return [*COMMON, *self.flags(family), *more, "--output_dir", str(self.folder / name)]

    def run(self, family: str, name: str, *more: str, cpu: bool = False) -> list[float]:
        """Train; the loss of every step."""
        with environment(ACCELERATE_USE_CPU="true" if cpu or not CUDA else "false"):
            train(self.command(family, name, *more))
        return [line["loss"] for line in conftest.read_log(self.folder / name)]

    @functools.cache  # noqa: B019
    def reference(self, family: str) -> list[float]:
        """Losses in float32 on the CPU."""
        return self.run(family, f"{family}-reference", "--mixed_precision", "no", cpu=True)


@contextlib.contextmanager
def environment(**variables: str):
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def need_cuda() -> None:
    if not CUDA:
        raise Skip("there is no GPU")


def compared(losses: list[float], expected: list[float], tolerance: float) -> str:
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    assert worst <= tolerance, f"losses {losses} against {expected} on the CPU"
    return f"losses within {worst:.1e} of the CPU's"


def same_checkpoint(ours: Path, theirs: Path) -> str:
    for file in sorted(theirs.glob("*.safetensors")):
        pair = load_file(ours / file.name), load_file(file)
        worst = max((pair[0][key].float() - pair[1][key].float()).abs().max().item() for key in pair[1])
        assert worst == 0, f"{file.name} differs by up to {worst:.1e}"
    return "bit-equal weights, average and optimizer"


def check_step(bench: Bench, family: str, precision: str) -> str:
    if precision == "fp16":
        need_cuda()
    losses = bench.run(family, f"{family}-{precision}", "--mixed_precision", precision)
    return compared(losses, bench.reference(family), TOLERANCE[precision])


def check_checkpointing(bench: Bench, family: str) -> str:
    losses = bench.run(family, f"{family}-checkpointing", "--mixed_precision", "no", "--gradient_checkpointing")
    return compared(losses, bench.reference(family), TOLERANCE["no"])


def check_resume(bench: Bench, *more: str) -> str:
    name = "resume" + "".join(more).replace("--", "-")
    torch.backends.cudnn.deterministic = True
    bench.run("pixel", name, *more)
    whole, resumed = bench.folder / name, bench.folder / f"{name}-again"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-0000004")
    bench.run("pixel", resumed.name, *more, "--resume_from_checkpoint", "latest")
    return same_checkpoint(*(each / "checkpoints" / "step-0000004" for each in (resumed, whole)))


def check_8_bit(bench: Bench) -> str:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    return check_resume(bench, "--use_8bit_adam")


def check_ddp(bench: Bench) -> str:
    count = torch.cuda.device_count() if CUDA else 2
    if count < 2:
        raise Skip("there is one GPU")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "train_place.py"]
    command += [
        *bench.command("pixel", "ddp"),
        "--validation_shown_samples",
        "2",
        "--validation_num_inference_steps",
        "2",
    ]
    run_process(command, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU=str(not CUDA).lower())
    assert len(conftest.read_log(bench.folder / "ddp")) == 4
    return f"{count} {'GPUs' if CUDA else 'processes on the CPU'}, steps, validation, checkpoints"


def check_xformers(bench: Bench) -> str:
    need_cuda()
    if importlib.util.find_spec("xformers") is None:
        raise Skip("xformers is not installed")
    losses = bench.run("sd2", "xformers", "--mixed_precision", "no", "--enable_xformers_memory_efficient_attention")
    return compared(losses, bench.reference("sd2"), TOLERANCE["no"])


def check_inductor(bench: Bench) -> str:
    need_cuda()  # it compiles on the CPU too, for minutes
    with environment(ACCELERATE_DYNAMO_BACKEND="inductor"):
        losses = bench.run("pixel", "inductor", "--mixed_precision", "no", "--lambda_kd_feat", "0")
    return compared(losses, bench.run("pixel", "eager", "--lambda_kd_feat", "0", cpu=True), TOLERANCE["no"])


def check_waits(bench: Bench, family: str) -> str:
    need_cuda()
    cache = [] if family == "pixel" else ["--latent_cache_dir", str(bench.folder / f"{family}-cache")]
    add, batches = train_place.RunLog.add, train_place.training_batches

    def strict(*args, **span):
        for number, item in enumerate(batches(*args, **span)):
            torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")
            yield item

    def added(self, *rest):  # the step is over: what follows reads losses and writes checkpoints
        add(self, *rest)
        torch.cuda.set_sync_debug_mode("default")

    train_place.training_batches, train_place.RunLog.add = strict, added
    utils.data.rows.StepRandom = StepRandom
    try:
        bench.run(family, f"{family}-waits", "--mixed_precision", "bf16", *cache)
    finally:
        train_place.training_batches, train_place.RunLog.add = batches, add
        utils.data.rows.StepRandom = HostRandom
        torch.cuda.set_sync_debug_mode("default")
    return "none from the batch to the optimizer's step"


def sd_models(device: str):
    """SD 2.1's U-Net in bf16 and its bk_tiny in float32, random weights."""
    with torch.device("meta"):
        config = {"sample_size": 64, "cross_attention_dim": 1024, "use_linear_projection": True}
        teacher = UNet2DConditionModel(**config, attention_head_dim=(5, 10, 20, 20)).bfloat16()
        student = UNet2DConditionModel.from_config(blocks.student_config(dict(teacher.config), "bk_tiny"))
    models = [model.to_empty(device=device) for model in (teacher.requires_grad_(False), student)]
    for parameter in (p for model in models for p in model.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    return models


def check_estimate(bench: Bench) -> str:
    need_cuda()
    teacher, student = sd_models("cuda")
    inputs = {"x_t": torch.zeros(1, 4, 64, 64), "timestep": torch.zeros(1, dtype=torch.long)}
    inputs["encoder_hidden_states"] = torch.zeros(1, 77, 1024)
    args = SimpleNamespace(lambda_kd_output=1, lambda_kd_feat=0, gradient_accumulation_steps=1, train_batch_size=4)
    args.enable_xformers_memory_efficient_attention = False
    accelerator = SimpleNamespace(
        device=torch.device("cuda"), num_processes=1, mixed_precision="bf16", native_amp=True
    )
    backbone = SimpleNamespace(example=lambda: inputs)
    told = memory._training_step(args, accelerator, Tapped(student.train()), Tapped(teacher), backbone)
    real = sd_step(teacher, student, batch=4)["bytes"]
    assert abs(told / real - 1) < 0.15, f"estimated {told / 2**30:.2f} GiB, real {real / 2**30:.2f}"
    return f"estimated {told / 2**30:.2f} GiB, real {real / 2**30:.2f}"


def sd_step(teacher, student, batch: int) -> dict[str, float]:
    """Median seconds of forward, loss and backward, of the loss alone, and bytes at the peak beside the weights."""
    x_t, time_t = torch.randn(batch, 4, 64, 64, device="cuda"), torch.randint(1000, (batch,), device="cuda")
    text = torch.randn(batch, 77, 1024, device="cuda")
    steps, losses = [], []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(8):
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            prediction = student(x_t, time_t, text, return_dict=False)[0].float()
        with torch.no_grad():
            target = teacher(x_t.bfloat16(), time_t, text.bfloat16(), return_dict=False)[0].float()
        torch.cuda.synchronize()
        middle = time.perf_counter()
        leaf = prediction.detach().requires_grad_()
        loss = place_loss(leaf, target).loss
        loss.backward()
        torch.cuda.synchronize()
        losses.append(time.perf_counter() - middle)
        prediction.backward(leaf.grad)
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
        student.zero_grad()
        del prediction, target, leaf, loss
    return {
        "step": sorted(steps[2:])[3],
        "loss": sorted(losses[2:])[3],
        "bytes": torch.cuda.max_memory_allocated() - before,
    }


def check_sd_step(bench: Bench) -> str:
    need_cuda()
    batch = 16 if torch.cuda.get_device_properties(0).total_memory > 24 * 2**30 else 4
    times = sd_step(*sd_models("cuda"), batch=batch)
    share = times["loss"] / times["step"]
    return (
        f"batch {batch}: {times['step'] * 1e3:.0f} ms a step, {batch / times['step']:.1f} images/s, PLACE {share:.2%}"
    )


def check_speed(bench: Bench) -> str:
    case, steps = ("celeba", 40) if CUDA else ("default", 8)
    output = bench.folder / "times.json"
    command = [sys.executable, "benchmarks/step_time.py", "--case", case, "--steps", str(steps), "--output", output]
    run_process([str(word) for word in command])
    times = json.loads(output.read_text())
    seconds, batch = times["seconds"], 4 if case == "celeba" else 64
    parts = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in seconds.items() if value > 1e-4)
    return f"{case}: {batch / seconds['step']:.0f} images/s, step / bare step {times['overhead']:.2f}; ms: {parts}"


def check_inception(bench: Bench) -> str:
    need_cuda()
    from torchvision.models import inception_v3

    model = inception_v3(weights=None, init_weights=False).eval().cuda()
    images = torch.rand(64, 3, 299, 299, device="cuda")
    with torch.no_grad():
        for number in range(12):
            if number == 2:
                torch.cuda.synchronize()
                start = time.perf_counter()
            model(images)
        torch.cuda.synchronize()
    return f"{640 / (time.perf_counter() - start):.0f} features/s, batch 64, float32"


def run_process(command: list[str], **variables: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {(done.stderr or done.stdout)[-500:]}"


def lines() -> dict[str, Callable[[Bench], str]]:
    """Name -> check, in the order of the table."""
    steps = {
        f"{name} step, {family}": functools.partial(check_step, family=family, precision=precision)
        for name, precision in (("fp32", "no"), ("bf16", "bf16"), ("fp16", "fp16"))
        for family in FAMILIES
    }
    for name, check in (("gradient checkpointing", check_checkpointing), ("no waits in a step", check_waits)):
        steps |= {f"{name}, {family}": functools.partial(check, family=family) for family in FAMILIES}
    return steps | {
        "ddp": check_ddp,
        "resume exact": check_resume,
        "resume exact, fp16": lambda bench: need_cuda() or check_resume(bench, "--mixed_precision", "fp16"),
        "8-bit Adam, resumed": check_8_bit,
        "xformers": check_xformers,
        "dynamo inductor": check_inductor,
        "memory estimate": check_estimate,
        "training speed": check_speed,
        "SD 2.1 bk_tiny step": check_sd_step,
        "Inception": check_inception,
    }


def main(words: list[str]) -> None:
    where = torch.cuda.get_device_name() if CUDA else "no GPU here: the lines that a CPU can show"
    print(f"{where}; torch {torch.__version__}\n")
    utils.data.rows.StepRandom = HostRandom
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared as float32
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        failed = run_table({name: functools.partial(check, bench) for name, check in lines().items()}, words)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main(WORDS)
