# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written beside and renamed, rotated, resumed exactly.

A checkpoint is a folder of safetensors and one JSON file, no pickle. It is complete if it carries its final name;
`state.json` holds the SHA-256 of every other file. With `utils.randomness` it is all there is to a run's state.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from utils.command_line import UsageError, announce, without_root
from utils.distributed import wait_for_everyone
from utils.files import sha256
from utils.output_dir import complete_checkpoints, step_of, wanted_checkpoint
from utils.students.depth import KEPT
from utils.training.log import RunLog
from utils.training.schedules import changed_curves

logger = get_logger(__name__)

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has no fsync, not of one that is full
TENSORS = ("student.safetensors", "optimizer.safetensors", "ema.safetensors")  # all else in the folder is not ours
TOLD = ("lr", "initial_lr", "betas", "eps", "weight_decay")  # of a group of the optimizer: by the command line
FORMAT = 2  # of state.json: counted up when flags or files change their names

# may change between a checkpoint and its continuation; all else would make it another run
HARMLESS_ARGUMENTS = frozenset(
    (
        "allow_changed_arguments allow_tf32 cache_dir latent_cache_dir checkpointing_steps checkpoints_total_limit "
        "dataloader_num_workers dry_run hub_model_id hub_private_repo logging_steps max_train_minutes "
        "max_train_steps mixed_precision num_cpu_threads output_dir overwrite_output_dir push_to_hub report_to "
        "resume_from_checkpoint tracker_project_name validation_batch_size validation_feature_extractor "
        "validation_guidance_channels validation_guidance_scale validation_shown_samples "
        "validation_num_inference_steps validation_num_samples validation_prompts validation_split validation_steps"
    ).split()
)

# flags that checkpoints of an earlier version may lack -> what was done without them
ADDED_ARGUMENTS = {"feature_mask_sigma": 0.0, "feature_weighting": "constant", "min_lr_rate": 0.0}


class Stateful(Protocol):
    """What changes during a run besides tensors: the log, the validation's distances."""

    def state(self) -> dict:
        """All of it, as JSON has types for."""

    def load_state(self, state: dict, step: int) -> None:
        """Go on from `state`, that of optimizer step `step`."""


class Checkpoints:
    """Saves and restores everything that changes during a run."""

    def __init__(
        self,
        args,
        accelerator: Accelerator,
        *,
        student: nn.Module,
        ema,
        optimizer,
        lr_scheduler,
        log: RunLog,
        validation: Stateful,
        fingerprint: str,
        **stateful: Stateful,
    ):
        """`student` is the prepared module, `ema` an `EMAModel` or None, `fingerprint` that of the data, which must be
        equal when the run goes on; more that changes can be given by name."""
        self.args, self.accelerator, self.log = args, accelerator, log
        self.stateful: dict[str, Stateful] = {"log": log, "validation": validation, **stateful}
        self.student = accelerator.unwrap_model(student, keep_torch_compile=False)
        self.ema, self.optimizer, self.lr_scheduler = ema, optimizer, lr_scheduler
        self.folder = Path(args.output_dir) / "checkpoints"
        self.facts = {
            "world_size": accelerator.num_processes,
            "data": fingerprint,
            "device_type": accelerator.device.type,
            "autocast": accelerator.mixed_precision,  # which may be accelerate's config's, without the flag
            "layers": self.student.denoiser.config.get(KEPT),  # of the teacher, which its student was made of
        }

    def all(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return complete_checkpoints(self.folder)

    def save(self, step: int) -> Path:
        """Write the checkpoint of optimizer step `step`, then remove the oldest beyond `--checkpoints_total_limit`.

        Raises:
            FloatingPointError: a loss since the last log is not finite; nothing is written.
            OSError: no space, or another failure to write; the earlier checkpoints are untouched.
        """
        wait_for_everyone(self.accelerator)  # the main process may have validated; the log then waits on the devices
        # the log reads every pending loss term first: nothing is saved after one that is not finite
        states = {name: part.state() for name, part in self.stateful.items()}
        final = self.folder / f"step-{step:07d}"
        announce(f"saving the checkpoint of step {step}")
        if self.accelerator.is_main_process:
            beside = self.folder / f".{final.name}.partial"
            try:
                self._write(beside, step, states)
                if final.exists():  # passed again after a resume from further back
                    _remove(final)
                beside.rename(final)
                _sync_to_disk(self.folder)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(beside, ignore_errors=True)
                last = self.all()[-1:] or ["none"]
                raise OSError(
                    f"The checkpoint of step {step} could not be written: {error}. The last good one is {last[0]}; "
                    "make space and go on with --resume_from_checkpoint latest."
                ) from error
            for old in self.all()[: -self.args.checkpoints_total_limit]:
                try:
                    _remove(old)
                except OSError as error:  # a file that another program has open
                    logger.warning(f"The old checkpoint {old} cannot be removed: {error}")
        wait_for_everyone(self.accelerator)
        self.log.last_checkpoint = final
        return final

    def _write(self, folder: Path, step: int, states: dict) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        optimizer_tensors, optimizer_rest = _flatten_optimizer(self.optimizer.state_dict())
        save_file(_plain(self.student.state_dict()), folder / "student.safetensors")
        save_file(optimizer_tensors, folder / "optimizer.safetensors")
        state = {
            "format": FORMAT,
            "step": step,
            "arguments": vars(self.args),
            "facts": self.facts,
            "optimizer": optimizer_rest,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "states": states,
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        if self.ema is not None:
            ema = self.ema.state_dict()
            shadow = ema.pop("shadow_params")
            save_file(_plain({str(i): tensor for i, tensor in enumerate(shadow)}), folder / "ema.safetensors")
            state["ema"] = ema
        written = [name for name in TENSORS if (folder / name).exists()]
        state["sha256"] = {name: sha256(folder / name) for name in written}
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        for path in (*(folder / name for name in written), folder / "state.json", folder):
            _sync_to_disk(path)

    def resume(self) -> int:
        """Restore from `--resume_from_checkpoint`; the optimizer step to go on from, 0 without the flag.

        Raises:
            UsageError: no such checkpoint, a damaged file, another student, fewer steps than it has made, or arguments
                that make it another run.
        """
        path = wanted_checkpoint(self.args)
        if path is None:
            self.log.drop_after(0)  # of a job that died before its first checkpoint
            return 0
        announce(f"reading {path}")
        state = self._read_state(path)
        if self.args.max_train_steps < state["step"]:
            raise UsageError(
                f"--max_train_steps is {self.args.max_train_steps}, and --resume_from_checkpoint {path} is of step "
                f"{state['step']} already. Give that number to export its student as it is, or a greater one to go on."
            )
        self._refuse_another_run(state)
        tensors = {name: load_file(path / name) for name in state["sha256"]}
        try:
            self.student.load_state_dict(tensors["student.safetensors"])
        except RuntimeError as error:
            raise UsageError(f"--resume_from_checkpoint {path} is of another student: {error}") from error
        told = [{name: group[name] for name in TOLD if name in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(_unflatten_optimizer(tensors["optimizer.safetensors"], state["optimizer"]))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self._follow_the_flags(told)
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            shadow = tensors["ema.safetensors"]
            average = {"shadow_params": [shadow[str(i)] for i in range(len(shadow))]}
            steps = {"optimization_step": state["ema"]["optimization_step"]}
            self.ema.load_state_dict({**self.ema.state_dict(), **steps, **average})
            self.ema.to(self.accelerator.device)
        for name, part in self.stateful.items():
            if name in state["states"]:  # or it begins anew, in a run that goes on with --allow_changed_arguments
                part.load_state(state["states"][name], state["step"])
        self.log.last_checkpoint = path
        return state["step"]

    def _follow_the_flags(self, told: list[dict]) -> None:
        """Rate, betas and decay as the command line has them now, `told` of each group; a checkpoint holds those of
        its run, which `--allow_changed_arguments` may have changed."""
        self.lr_scheduler.base_lrs = [group["initial_lr"] for group in told]
        for group, each, share in zip(self.optimizer.param_groups, told, self.lr_scheduler.lr_lambdas, strict=True):
            group.update(each | {"lr": each["initial_lr"] * share(self.lr_scheduler.last_epoch)})

    def _read_state(self, path: Path) -> dict:
        damaged = None
        try:
            state = json.loads((path / "state.json").read_text())
            hashes = state["sha256"] = {name: state["sha256"][name] for name in TENSORS if name in state["sha256"]}
            damaged = next(
                (name for name in hashes if not (path / name).is_file() or sha256(path / name) != hashes[name]), None
            )
        except (OSError, ValueError, KeyError, TypeError):  # or JSON that is no state
            damaged = "state.json"
        if damaged:
            earlier = [other for other in self.all() if step_of(other) < step_of(path)]
            offer = f"the one before it is {earlier[-1]}" if earlier else "there is none before it"
            raise UsageError(f"--resume_from_checkpoint {path}: {damaged} is damaged or missing; {offer}.")
        if state.get("format") != FORMAT:
            raise UsageError(
                f"--resume_from_checkpoint {path} is of an earlier version of these scripts, whose flags had other "
                "names (--cache_dir, now --latent_cache_dir). Finish that run with the version it was begun with, or "
                "begin another from its student with --student_model_name_or_path."
            )
        return state

    def _refuse_another_run(self, state: dict) -> None:
        if (kept := state["facts"].get("layers")) and kept != self.facts["layers"]:
            theirs, ours = (",".join(map(str, layers or ["none"])) for layers in (kept, self.facts["layers"]))
            raise UsageError(
                f"--resume_from_checkpoint: its student has the teacher's layers {theirs}, this one {ours}. "
                f"Give the flags it was made with or, with --allow_changed_arguments, --kept_layers {theirs}."
            )
        now = {**vars(self.args), **self.facts}
        arguments = ADDED_ARGUMENTS | state["arguments"]
        then = {**arguments, "layers": self.facts["layers"], **state["facts"]}
        now, then = ({name: without_root(value) for name, value in each.items()} for each in (now, then))
        changed = [
            f"{name} was {then.get(name)}, is {now.get(name)}"
            for name in sorted(then.keys() | now.keys())
            if name not in HARMLESS_ARGUMENTS
            and then.get(name) != now.get(name)
            and (name in then or now[name])  # a flag that is off, and that the version before did not have
        ]
        rates = state["lr_scheduler"]
        changed += changed_curves(
            arguments,
            vars(self.args),
            state["step"],
            peaks=(rates["base_lrs"][0], self.lr_scheduler.base_lrs[0]),
            rate_step=rates["last_epoch"],
        )
        if changed and self.args.allow_changed_arguments:
            logger.warning(f"Resuming what is now another run: {'; '.join(changed)}.")
        elif changed:
            raise UsageError(
                f"--resume_from_checkpoint: this would be another run: {'; '.join(changed)}. Resume with the "
                "arguments it was started with, start anew in another --output_dir, or insist with "
                "--allow_changed_arguments."
            )


def _remove(checkpoint: Path) -> None:
    """Rename first: half a checkpoint must never carry a checkpoint's name."""
    going = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going) if going.is_dir() else going.unlink()


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _flatten_optimizer(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimizer's state dict as flat tensors (safetensors) and the rest (JSON). bitsandbytes nests what is
    quantised, and loads it flat too; the tables that its weights share are written for each, as safetensors must."""
    tensors, scalars, places = {}, {}, set()
    for index, entries in state["state"].items():
        nested = [value for value in entries.values() if isinstance(value, dict)]
        for name, value in {name: value for part in (entries, *nested) for name, value in part.items()}.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.clone() if value.data_ptr() in places else value
                places.add(value.data_ptr())
            elif not isinstance(value, dict):
                scalars[f"{index}.{name}"] = value
    return _plain(tensors), {"scalars": scalars, "param_groups": state["param_groups"]}


def _unflatten_optimizer(tensors: dict[str, torch.Tensor], rest: dict) -> dict:
    state: dict[int, dict] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def _sync_to_disk(path: Path) -> None:
    """Wait until it is there for good. A folder for which that cannot be asked, as on Windows and on some network
    drives, is warned of once: the run goes on."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs what may be written to
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder or error.errno in NO_SYNC):
            raise
        logger.warning_once(
            f"The file system of --output_dir cannot be asked for {'folders' if is_folder else 'files'} to be on the "
            f"disk ({error.strerror}): after a power cut the newest checkpoint may be damaged, which a resume names."
        )
