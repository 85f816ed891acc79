# SPDX-License-Identifier: Apache-2.0
"""The folder that a script writes to: tried before anything else is done, made, and kept for one run; and the
checkpoints in it."""

import contextlib
import datetime
import errno
import os
import re
import shutil
import socket
import tempfile
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

from utils.command_line import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

LOCK = ".lock"  # in the folder; who has locked it stands in it, for the message
TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what a lock that another process has gives
FAR = 2**30  # the byte that Windows locks: what stands before it can be read
_locked: dict[Path, IO[str]] = {}  # by this process


def check_output_dir(output_dir: str) -> None:
    """Raises UsageError where `--output_dir` cannot be written, or another run writes to it; leaves nothing behind."""
    folder = Path(output_dir)
    if (folder / LOCK).is_file() and not _is_ours(folder):
        try:
            with (folder / LOCK).open("r+") as file:
                _lock(folder, file)
        except OSError:  # said below, or when it is locked
            pass
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


def lock_output_dir(output_dir: str) -> None:
    """Keep `--output_dir`, made where it is not there, from other runs until this process ends, however it ends: a
    lock of the operating system, not a file whose being there means something. For the main process of a run alone.

    Where the file system has no locks this is warned of.

    Raises:
        UsageError: another process has it.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if _is_ours(folder):
        return
    try:
        while not _is_ours(folder):  # again where the run before ends just now, and the file goes that was opened
            _locked[folder.resolve()] = file = (folder / LOCK).open("a+")
            _lock(folder, file)
    except (OSError, UsageError) as error:
        if file := _locked.pop(folder.resolve(), None):
            file.close()
        if isinstance(error, UsageError):
            raise
        warnings.warn(
            f"--output_dir {folder}: it cannot be locked ({error.strerror}), so a second run in it would not be "
            "noticed.",
            stacklevel=2,
        )
        return
    file.truncate(0)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    print(f"process {os.getpid()} of {socket.gethostname()}, since {now}", file=file, flush=True)


def unlock_output_dir(output_dir: str) -> None:
    """Let other runs into it; for a process that lives on, such as a notebook's."""
    folder = Path(output_dir)
    if _is_ours(folder):
        file = _locked.pop(folder.resolve())
        with contextlib.suppress(OSError):  # Windows deletes no file that is open
            (folder / LOCK).unlink()
        file.close()


def _is_ours(folder: Path) -> bool:
    """Whether this process has the lock. To ask so comes first: POSIX drops it when the file is closed once more."""
    file = _locked.get(folder.resolve())
    same = file and (folder / LOCK).exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
    if file and not same:  # the folder was deleted meanwhile
        _locked.pop(folder.resolve()).close()
    return bool(same)


def _lock(folder: Path, file: IO[str]) -> None:
    """Lock `file`, of the folder. Raises UsageError where another process has it, OSError where it cannot be."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # data workers do not inherit it, as they would flock's
        else:
            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        file.seek(0)
        raise UsageError(
            f"--output_dir {folder}: another run is writing to it ({file.read().strip() or 'it does not say which'}). "
            "End that one, or choose another folder."
        ) from error


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
    """Those in `folder` that carry their final name, oldest first; a copy, an archive or a file of the system that
    lies beside them is none."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name; 0 in another name."""
    name = re.fullmatch(r"step-([0-9]+)", checkpoint.name)
    return int(name[1]) if name else 0


def prepare_output_dir(args, accelerator: "Accelerator") -> None:
    """Make `--output_dir`, empty unless the run is resumed, and start the trackers in it."""
    folder = Path(args.output_dir)
    if accelerator.is_main_process:
        for path in folder.iterdir() if args.overwrite_output_dir and folder.exists() else ():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for leftover in (folder / "checkpoints").glob(".step-*"):  # of a process killed while writing or deleting
            if leftover.suffix in (".partial", ".removed"):
                shutil.rmtree(leftover, ignore_errors=True)
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        accelerator.init_trackers(args.tracker_project_name, {name: str(value) for name, value in vars(args).items()})
