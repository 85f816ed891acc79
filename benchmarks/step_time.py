# SPDX-License-Identifier: Apache-2.0
"""Where a training step's time goes, and what the step costs beyond the work that no distillation can avoid.

    python benchmarks/step_time.py                 # the embedded default
    python benchmarks/step_time.py --case celeba   # a CelebA-64-shaped teacher with a 50 % student, random weights

The script's own loop is timed: main() of train_place.py runs with its parts wrapped in timers, so nothing is copied
here. The bare step (teacher forward, student forward and backward, optimizer) is timed in between, every second step,
on the same batch in the same process. Prints medians with quartiles and two ratios: loss / step, and step / bare step.
On a GPU every timer synchronises, so read the ratios there with care.
"""

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

START = time.perf_counter()  # before the imports, which are most of a start

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.command_line import call, start  # noqa: E402


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["default", "celeba"], default="default", help="what is trained")
    parser.add_argument("--steps", type=int, default=60, help="timed steps (default: 60)")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = start(parse_args)

import torch  # noqa: E402

import train_place  # noqa: E402
from utils.backbones.ddpm import DDPM  # noqa: E402

CELEBA = {
    "sample_size": 64,
    "block_out_channels": (128, 256, 256, 256, 512),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
WARM_UP = 3  # steps not counted


class Timers:
    """Seconds per part of the step that is being taken; finished steps are kept."""

    def __init__(self):
        self.parts: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self.bare: list[float] = []
        self.step_start = self.first_step = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, part: str):
        synchronise()
        start = time.perf_counter()
        yield
        synchronise()
        self.parts[part] += time.perf_counter() - start

    def wrap(self, part: str, function):
        """`function`, timed."""

        def timed(*args, **kwargs):
            with self.measure(part):
                return function(*args, **kwargs)

        return timed

    def add(self, part: str, start: float) -> None:
        """Seconds since `start` to `part`."""
        synchronise()
        self.parts[part] += time.perf_counter() - start

    def end_step(self) -> None:
        synchronise()
        now = time.perf_counter()
        self.steps.append({**self.parts, "step": now - self.step_start})

    def restart(self) -> None:
        self.parts = defaultdict(float)  # the bare step's own traces go
        self.step_start = time.perf_counter()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def instrument(timers: Timers, bare_every: int) -> None:
    """Replace the names that train_place.main looks up by timed ones."""
    predict, batches = DDPM.predict, train_place.training_batches
    captured = {}

    def timed_predict(self, model, noised, condition):
        part = "student forward" if torch.is_grad_enabled() else "teacher forward"
        captured[part] = (model, noised)
        with timers.measure(part):
            return predict(self, model, noised, condition)

    def timed_batches(*args, **kwargs):
        stream = batches(*args, **kwargs)
        timers.first_step = time.perf_counter()
        while True:
            timers.restart()
            with timers.measure("data"):
                item = next(stream, None)
            if item is None:
                return
            yield item
            timers.end_step()
            if len(timers.steps) % bare_every == 0:
                timers.bare.append(bare_step(captured))

    DDPM.predict = timed_predict
    for method in ("encode", "add_noise", "task_terms"):
        part = "losses" if method == "task_terms" else "noising"
        setattr(DDPM, method, timers.wrap(part, getattr(DDPM, method)))
    train_place.training_batches = timed_batches
    for name in ("place_loss", "feature_loss"):
        setattr(train_place, name, timers.wrap("losses", getattr(train_place, name)))
    accelerator, ema, log = train_place.Accelerator, train_place.EMAModel, train_place.RunLog
    accelerator.backward = timers.wrap("backward", accelerator.backward)
    accelerator.clip_grad_norm_ = timers.wrap("clip and optimizer", accelerator.clip_grad_norm_)
    ema.step = timers.wrap("EMA", ema.step)
    log.add, log.end_step = timers.wrap("logging", log.add), timers.wrap("logging", log.end_step)
    make_optimizer = train_place.make_optimizer

    def timed_optimizer(*args):
        optimizer = make_optimizer(*args)
        captured["optimizer"] = optimizer
        # hooks, not a wrapped step: the scheduler needs the bound method
        optimizer.register_step_pre_hook(lambda *_: captured.update(started=time.perf_counter()))
        optimizer.register_step_post_hook(lambda *_: timers.add("clip and optimizer", captured["started"]))
        return optimizer

    train_place.make_optimizer = timed_optimizer


def bare_step(captured: dict) -> float:
    """Seconds of teacher forward, student forward and backward, optimizer step, on the batch that was just seen."""
    (student, noised), (teacher, _) = captured["student forward"], captured["teacher forward"]
    optimizer = captured["optimizer"]
    saved = [parameter.detach().clone() for parameter in student.parameters()]
    synchronise()
    start = time.perf_counter()
    with torch.no_grad():
        target, _ = teacher(noised.x_t, timestep=noised.time)
    output, _ = student(noised.x_t, timestep=noised.time)
    torch.nn.functional.mse_loss(output, target.float()).backward()
    type(optimizer).step(optimizer)
    optimizer.zero_grad()
    synchronise()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        for parameter, value in zip(student.parameters(), saved, strict=True):
            parameter.copy_(value)
    return seconds


def make_celeba(folder: Path) -> list[str]:
    """A random CelebA-64-shaped teacher and a few random images; the flags that use them."""
    import numpy as np
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from PIL import Image

    DDPMPipeline(UNet2DModel(**CELEBA), DDPMScheduler()).save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    for i in range(32):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    flags = ["--pretrained_model_name_or_path", str(folder / "teacher"), "--train_data_dir", str(folder / "images")]
    return [*flags, "--pruning_ratio", "0.5", "--student_init", "random", "--train_batch_size", "4", "--use_ema"]


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle * 1e3:9.2f}  ({low * 1e3:.2f} to {high * 1e3:.2f})"


def main(args: argparse.Namespace) -> None:
    timers = Timers()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        flags = [f"@{ROOT / 'assets' / 'default.args'}"] if args.case == "default" else make_celeba(folder)
        flags += ["--max_train_steps", str(args.steps + WARM_UP), "--output_dir", str(folder / "student")]
        flags += ["--validation_feature_extractor", "", "--validation_steps", "100000"]
        flags += ["--validation_shown_samples", "1"]
        flags += ["--validation_num_inference_steps", "1", "--lr_scheduler", "constant", "--report_to", "none"]
        instrument(timers, bare_every=2)
        call(train_place, flags)
    steps, bare = timers.steps[WARM_UP:-1], timers.bare[WARM_UP // 2 :]  # the last step validates and saves
    names = ("data", "noising", "teacher forward", "student forward", "losses", "backward", "clip and optimizer")
    names += ("EMA", "logging")
    print(f"\n{args.case}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"{len(steps)} steps, median ms (quartiles)\n")
    rows = {name: [step.get(name, 0.0) for step in steps] for name in names}
    rows["rest"] = [step["step"] - sum(step.get(name, 0.0) for name in names) for step in steps]
    rows["step"], rows["bare step"] = [step["step"] for step in steps], bare
    for name, values in rows.items():
        print(f"{name:<20}{quartiles(values)}")
    loss = statistics.median(a / b for a, b in zip(rows["losses"], rows["step"], strict=True))
    whole = statistics.median(rows["step"]) / statistics.median(bare)
    print(f"\nstart to first step {timers.first_step - START:.1f} s")
    print(f"loss / step       {loss:.4f}\nstep / bare step  {whole:.4f}")
    if args.output:
        medians = {name: statistics.median(values) for name, values in rows.items()}
        args.output.write_text(json.dumps({"seconds": medians, "loss_share": loss, "overhead": whole}, indent=1))


if __name__ == "__main__":
    main(ARGS)
