# SPDX-License-Identifier: Apache-2.0
"""The folder that a script writes to: tried before anything else is done, made; and the checkpoints in it."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from utils.command_line import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_output_dir(output_dir: str) -> None:
    """Raises UsageError where `--output_dir` cannot be written; leaves nothing behind."""
    folder = Path(output_dir)
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be written: {error}") from error
    finally:
        for path in made:
            if path.exists():
                path.rmdir()


def wanted_checkpoint(args) -> Path | None:
    """What `--resume_from_checkpoint` names; None without it, and where `latest` finds none, as a job that is started
    again may have died before its first.

    Raises:
        UsageError: there is no checkpoint in the folder that it names.
    """
    wanted = args.resume_from_checkpoint
    if wanted == "latest":
        return next(reversed(complete_checkpoints(Path(args.output_dir) / "checkpoints")), None)
    if wanted and not (Path(wanted) / "state.json").is_file():
        raise UsageError(f"--resume_from_checkpoint {wanted} is not a checkpoint: it has no state.json.")
    return Path(wanted) if wanted else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those in `folder` that carry their final name, oldest first."""
    return sorted(folder.glob("step-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint.name.startswith("step-") else 0


def prepare_output_dir(args, accelerator: "Accelerator") -> None:
    """Make `--output_dir`, empty unless the run is resumed, and start the trackers in it."""
    folder = Path(args.output_dir)
    if accelerator.is_main_process:
        if args.overwrite_output_dir and folder.exists():
            shutil.rmtree(folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for leftover in (folder / "checkpoints").glob(".*"):  # of a process that was killed while writing or deleting
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        accelerator.init_trackers(args.tracker_project_name, {name: str(value) for name, value in vars(args).items()})
