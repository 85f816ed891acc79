# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written beside and renamed, rotated, resumed exactly.

A checkpoint is a folder of safetensors and one JSON file, no pickle. It is complete if it carries its final name;
`state.json` holds the SHA-256 of every other file. With `utils.randomness` it is all there is to a run's state.
"""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

# may change between a checkpoint and its continuation; everything else would make it another run
HARMLESS_ARGUMENTS = frozenset(
    "allow_tf32 checkpointing_steps checkpoints_total_limit dataloader_num_workers logging_steps max_train_steps "
    "output_dir overwrite_output_dir report_to resume_from_checkpoint tracker_project_name validation_batch_size "
    "validation_feature_extractor validation_images validation_num_inference_steps validation_num_samples "
    "validation_split validation_steps".split()
)


def prepare_output_dir(args, accelerator: Accelerator) -> None:
    """Make `--output_dir`, empty unless the run is resumed. Raises ValueError where it cannot be written."""
    folder = Path(args.output_dir)
    if accelerator.is_main_process:
        try:
            if args.overwrite_output_dir and folder.exists():
                shutil.rmtree(folder)
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output_dir {folder} cannot be written: {error}") from error
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        accelerator.init_trackers(args.tracker_project_name, {k: str(v) for k, v in vars(args).items()})


class Checkpoints:
    """Saves and restores everything that changes during a run."""

    def __init__(
        self, args, accelerator: Accelerator, student: nn.Module, ema, optimizer, lr_scheduler, *, records, facts
    ):
        """`student` is the prepared module, `ema` an `EMAModel` or None. `records` are named objects with `state()`
        and `load_state(state, step)`; `facts` must be equal when the run goes on, such as the data's fingerprint."""
        self.args, self.accelerator, self.records = args, accelerator, records
        self.student = accelerator.unwrap_model(student, keep_torch_compile=False)
        self.ema, self.optimizer, self.lr_scheduler = ema, optimizer, lr_scheduler
        self.folder = Path(args.output_dir) / "checkpoints"
        self.facts = {"world_size": accelerator.num_processes, **facts}

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return max(self.folder.glob("step-*"), default=None, key=lambda path: int(path.name.split("-")[1]))

    def save(self, step: int) -> Path:
        """Write the checkpoint of optimizer step `step`, then remove the oldest beyond `--checkpoints_total_limit`."""
        # the log reads every pending loss term first: nothing is saved after one that is not finite
        records = {name: record.state() for name, record in self.records.items()}
        final = self.folder / f"step-{step:07d}"
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            beside = self.folder / f".{final.name}.partial"
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            optimizer_tensors, optimizer_rest = _flatten_optimizer(self.optimizer.state_dict())
            save_file(_plain(self.student.state_dict()), beside / "student.safetensors")
            save_file(optimizer_tensors, beside / "optimizer.safetensors")
            state = {
                "step": step,
                "arguments": vars(self.args),
                "facts": self.facts,
                "optimizer": optimizer_rest,
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "records": records,
            }
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            if self.ema is not None:
                ema = self.ema.state_dict()
                shadow = ema.pop("shadow_params")
                save_file(_plain({str(i): tensor for i, tensor in enumerate(shadow)}), beside / "ema.safetensors")
                state["ema"] = ema
            state["sha256"] = {path.name: _sha256(path) for path in beside.iterdir()}
            (beside / "state.json").write_text(json.dumps(state, indent=1))
            for path in (*beside.iterdir(), beside):
                _sync_to_disk(path)
            if final.exists():
                shutil.rmtree(final)
            beside.rename(final)
            _sync_to_disk(self.folder)
            for old in sorted(self.folder.glob("step-*"))[: -self.args.checkpoints_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        self.records["log"].last_checkpoint = final
        return final

    def resume(self) -> int:
        """Restore from `--resume_from_checkpoint`; the optimizer step to go on from, 0 without the flag.

        Raises:
            ValueError: no such checkpoint, a damaged file, another student, or arguments that make it another run.
        """
        if not self.args.resume_from_checkpoint:
            return 0
        wanted = self.args.resume_from_checkpoint
        path = self.latest() if wanted == "latest" else Path(wanted)
        if path is None:
            raise ValueError(f"--resume_from_checkpoint latest: no checkpoint in {self.folder}.")
        state = self._read_state(path)
        self._refuse_another_run(state)
        tensors = {name: load_file(path / name) for name in state["sha256"]}
        try:
            self.student.load_state_dict(tensors["student.safetensors"])
        except RuntimeError as error:
            raise ValueError(f"--resume_from_checkpoint {path} is of another student: {error}") from error
        self.optimizer.load_state_dict(_unflatten_optimizer(tensors["optimizer.safetensors"], state["optimizer"]))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            shadow = tensors["ema.safetensors"]
            self.ema.load_state_dict({**state["ema"], "shadow_params": [shadow[str(i)] for i in range(len(shadow))]})
            self.ema.to(self.accelerator.device)
        for name, record in self.records.items():
            record.load_state(state["records"][name], state["step"])
        self.records["log"].last_checkpoint = path
        return state["step"]

    def _read_state(self, path: Path) -> dict:
        try:
            state = json.loads((path / "state.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--resume_from_checkpoint {path} is not a checkpoint: {error}") from error
        for name, expected in state["sha256"].items():
            if not (path / name).is_file() or _sha256(path / name) != expected:
                others = sorted(other for other in path.parent.glob("step-*") if other.name < path.name)
                offer = f" The one before it is {others[-1]}." if others else ""
                raise ValueError(f"--resume_from_checkpoint {path}: {name} is damaged or missing.{offer}")
        return state

    def _refuse_another_run(self, state: dict) -> None:
        now = {**vars(self.args), **self.facts}
        then = {**state["arguments"], **state["facts"]}
        changed = [
            f"{name} was {then.get(name)}, is {now.get(name)}"
            for name in sorted(then.keys() | now.keys())
            if name not in HARMLESS_ARGUMENTS and then.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"--resume_from_checkpoint: this would be another run: {'; '.join(changed)}. Resume with the "
                "arguments it was started with, or start anew in another --output_dir."
            )


class StopSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the loop to stop after the current optimizer step; a second one ends at once."""

    def __init__(self):
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, _frame):
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        print(
            f"\n{signal.Signals(number).name}: saving a checkpoint after this step; again to end at once.", flush=True
        )

    def exit_if_received(self, checkpoints: Checkpoints, step: int) -> None:
        """Save and leave with the signal's exit code."""
        if self.received is not None:
            path = checkpoints.save(step)
            print(f"Stopped at step {step}. Go on with the same command and --resume_from_checkpoint {path}")
            raise SystemExit(128 + self.received)


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _flatten_optimizer(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """A torch optimizer's state dict as flat tensors (safetensors) and the rest (JSON)."""
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, torch.Tensor) else scalars)[f"{index}.{name}"] = value
    return _plain(tensors), {"scalars": scalars, "param_groups": state["param_groups"]}


def _unflatten_optimizer(tensors: dict[str, torch.Tensor], rest: dict) -> dict:
    state: dict[int, dict] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
