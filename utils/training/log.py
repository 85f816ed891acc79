# SPDX-License-Identifier: Apache-2.0
"""What a run says: the progress bar, `log.jsonl`, the trackers, the summary.

Loss terms stay on the device and are read together, every `--logging_steps` and before each checkpoint.
"""

import contextlib
import json
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from tqdm.auto import tqdm

from utils.command_line import UsageError
from utils.files import write_file

QUARTERS = 4  # of the schedule: where on it the student fails
# skipped steps in a row, and nothing else in a log interval: fp16's scale fell 256-fold, and it is no start
ENDLESS = 8

WARM_UP, PACED = 2, 8  # steps: the first are slow, of those behind them the pace is said
PATIENCE = 20  # seconds: of slower steps fewer


def duration(seconds: float) -> str:
    """In a unit that fits, to the figures that matter: 0.41 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size, above in (("days", 86400, 172800), ("h", 3600, 7200), ("min", 60, 120)):
        if seconds >= above:
            count = seconds / size
            return f"{count:.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def error_per_sample(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample: (B, C, *S) twice -> (B,), detached."""
    return (prediction.detach() - target.detach()).square().flatten(1).mean(dim=1)


def tracker_names(report_to: str) -> list[str] | None:
    """`--report_to` as a list of accelerate's trackers.

    Raises:
        UsageError: a tracker that accelerate does not know, or whose package is not installed.
    """
    if report_to == "none":
        return None
    installed = [str(tracker) for tracker in get_available_trackers()]
    names = installed if report_to == "all" else report_to.split(",")
    for name in names:
        if name not in installed:
            raise UsageError(
                f"--report_to {name}: not a tracker that is installed. Installed are {', '.join(installed)}; `none` "
                "reports nowhere but to log.jsonl."
            )
    return names


def _step_of(line: str) -> float:
    """Of a line of `log.jsonl`; infinity of half a line."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class RunLog:
    """Averages of every term between two logs."""

    def __init__(self, args, accelerator: Accelerator, num_places: int):
        self.args, self.accelerator = args, accelerator
        self.num_places = num_places
        self.path = Path(args.output_dir) / "log.jsonl"
        self.names: list[str] = []
        self.pending: list[tuple[int, torch.Tensor]] = []  # (step, terms of one micro-step), on the device
        self.pending_norms: list[tuple[int, torch.Tensor]] = []
        self.rows: list[list[float]] = []  # the same, read
        self.norms: list[float | None] = []  # None: a loss scaler skipped that step
        self.skipped_in_a_row = 0
        self.progress = None
        self.learning_rate = args.learning_rate
        self.last_checkpoint: Path | None = None

    def start(self, step: int) -> None:
        """Show the progress bar from `step` on and start the clock."""
        self.progress = tqdm(
            total=self.args.max_train_steps,
            initial=step,
            desc="steps",
            disable=not self.accelerator.is_local_main_process,
        )
        self.last_time, self.last_step = time.perf_counter(), step
        self.images, self.seconds = 0, 0.0
        self.paced_from, self.paced_time = step + WARM_UP, self.last_time

    def add(self, step: int, terms: dict[str, torch.Tensor | float], place: torch.Tensor, error: torch.Tensor) -> None:
        """Keep one micro-step: scalar `terms`, and the error per sample (B,) sorted into quarters of the schedule."""
        self.names = list(terms)
        scalars = [term if isinstance(term, torch.Tensor) else error.new_full((), term) for term in terms.values()]
        quarter = place * QUARTERS // self.num_places
        by_quarter = error.new_zeros(2, QUARTERS)
        by_quarter[0].index_add_(0, quarter, error)
        by_quarter[1].index_add_(0, quarter, torch.ones_like(error))
        self.pending.append((step, torch.cat([torch.stack(scalars).detach(), by_quarter.flatten()])))

    def end_step(self, step: int, grad_norm: torch.Tensor, learning_rate: float) -> None:
        """Keep the gradient norm of optimizer step `step`, move the bar, and log when it is time."""
        self.pending_norms.append((step, grad_norm))
        self.learning_rate = learning_rate
        self.progress.update()
        self._say_when_it_ends(step)
        if step % self.args.logging_steps == 0 or step == self.args.max_train_steps:
            self._report(step)
        if step == self.args.max_train_steps:
            self.progress.close()

    @contextlib.contextmanager
    def paused(self):
        """Time spent inside does not count for images per second."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.last_time, self.paced_time = self.last_time + spent, self.paced_time + spent

    def state(self) -> dict:
        """What has been added since the last log, for a checkpoint."""
        self._read()
        skipped = {"skipped_in_a_row": self.skipped_in_a_row}
        return {"names": self.names, "rows": self.rows, "norms": self.norms, **skipped}

    def load_state(self, state: dict, step: int) -> None:
        """Go on from a checkpoint of `step`."""
        self.names, self.rows, self.norms = state["names"], state["rows"], state["norms"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.drop_after(step)

    def drop_after(self, step: int) -> None:
        """Drop later lines of `log.jsonl`, for they will come again; and one that a full disk or a power cut left
        half written."""
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            write_file(self.path, "".join(line for line in lines if _step_of(line) <= step))

    def _read(self) -> None:
        """Bring the pending terms to the host: the one synchronisation of a logging interval.

        Raises:
            FloatingPointError: a term is not finite; names the first bad step and all its terms.
        """
        if not self.pending:
            return
        rows = torch.stack([row for _, row in self.pending])
        norms = torch.stack([norm.to(rows) for _, norm in self.pending_norms]) if self.pending_norms else rows[:0, 0]
        rows = self.accelerator.reduce(rows, "mean")
        rows, norms = rows.tolist(), norms.tolist()
        for (step, _), row in zip(self.pending, rows, strict=True):
            if not all(map(math.isfinite, row)):
                terms = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.names, row, strict=False))
                raise FloatingPointError(
                    f"The loss is not finite since step {step}: {terms}; learning rate {self.learning_rate:.3g}. The "
                    f"last good checkpoint is {self.last_checkpoint or 'none'}."
                )
        for (step, _), norm in zip(self.pending_norms, norms, strict=True):
            if math.isfinite(norm):
                self.norms.append(norm)
                self.skipped_in_a_row = 0
            elif self.accelerator.scaler is not None:  # it skips such steps
                self.norms.append(None)
                self.skipped_in_a_row += 1
            else:
                raise FloatingPointError(
                    f"The gradient is not finite since step {step}: norm {norm}, though the loss is; learning rate "
                    f"{self.learning_rate:.3g}. The last good checkpoint is {self.last_checkpoint or 'none'}."
                )
        self.rows += rows
        self.pending, self.pending_norms = [], []

    def _say_when_it_ends(self, step: int) -> None:
        """Once: how long the run will take, by the host's clock. A GPU is not waited for; it is a few steps behind."""
        now = time.perf_counter()
        if step == self.paced_from:
            self.paced_time = now
        elif step > self.paced_from and (step == self.paced_from + PACED or now - self.paced_time > PATIENCE):
            each, left = (now - self.paced_time) / (step - self.paced_from), self.args.max_train_steps - step
            if self.accelerator.is_main_process and left:
                self.progress.write(
                    f"A step takes {duration(each)}: about {duration(each * left)} for the {left:,} that are left, "
                    "validation and checkpoints not counted"
                )
            self.paced_from = math.inf

    def _report(self, step: int) -> None:
        self._read()
        now = time.perf_counter()
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        images, seconds = (step - self.last_step) * batch, now - self.last_time
        self.images, self.seconds = self.images + images, self.seconds + seconds
        self.last_time, self.last_step = now, step
        means = [math.fsum(column) / len(self.rows) for column in zip(*self.rows, strict=True)]
        values = dict(zip(self.names, means, strict=False))
        norms = [norm for norm in self.norms if norm is not None]
        values |= {"grad_norm": math.fsum(norms) / len(norms)} if norms else {}
        values["learning_rate"] = self.learning_rate
        if self.accelerator.scaler is not None:
            values |= {
                "skipped_steps": len(self.norms) - len(norms),
                "loss_scale": self.accelerator.scaler.get_scale(),
            }
        sums, counts = means[len(self.names) :][:QUARTERS], means[len(self.names) :][QUARTERS:]
        for quarter, (total, count) in enumerate(zip(sums, counts, strict=True), start=1):
            if count:
                values[f"error_quarter_{quarter}"] = total / count
        self.rows, self.norms = [], []
        self.write(step, values)
        self._stop_at_endless_overflow(step, values)
        self.accelerator.log({"images_per_second": images / seconds}, step=step)
        shown = {name: f"{values[name]:.3g}" for name in ("loss", "coarse", "fine", "w") if name in values}
        self.progress.set_postfix({**shown, "images/s": f"{images / seconds:.0f}"}, refresh=False)

    def _stop_at_endless_overflow(self, step: int, values: dict[str, float]) -> None:
        """Raises FloatingPointError where fp16's loss scaler finds no scale at which the gradient is finite."""
        all_skipped = "grad_norm" not in values and self.skipped_in_a_row >= ENDLESS
        if all_skipped or values.get("loss_scale", 1) < 1:
            raise FloatingPointError(
                f"The gradient overflows in float16: {self.skipped_in_a_row} steps in a row were skipped up to step "
                f"{step}, the loss scale is down at {values['loss_scale']:.3g}, the learning rate is "
                f"{self.learning_rate:.3g}. Use --mixed_precision bf16 or no. The last good checkpoint is "
                f"{self.last_checkpoint or 'none'}."
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """To `log.jsonl` and the trackers. Values that depend on the clock go to the trackers alone, so that two equal
        runs have equal files."""
        if values and self.accelerator.is_main_process:
            with self.path.open("a") as file:
                # JSON has no word for what is not finite, but null
                known = {name: value if math.isfinite(value) else None for name, value in values.items()}
                file.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")
        self.accelerator.log(values, step=step)
