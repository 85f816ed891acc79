# SPDX-License-Identifier: Apache-2.0
"""What Windows lacks, taken away here: the scripts start all the same. Nothing was run on Windows itself."""

import errno
import importlib.util
import os
import signal
import sys
import types
from pathlib import Path

import psutil
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from utils.command_line import UsageError
from utils.commands import from_folder
from utils.training.stop import Stop

ROOT = Path(__file__).resolve().parent.parent
# as a user's own process is without them, once the libraries are there
TAKE_AWAY = """
import os, signal, sys, types, psutil, torch, datasets, diffusers, transformers, accelerate, tensorboard
del signal.SIGUSR1, os.sched_getaffinity, os.fork
sys.modules |= {"fcntl": None, "resource": None}
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda descriptor, mode, count: None)
memory = psutil.Process.memory_info
psutil.Process.memory_info = lambda self: types.SimpleNamespace(peak_wset=memory(self).rss)
opened = os.open
def only_files(path, flags, *more, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied")
    return opened(path, flags, *more, **options)
os.open = only_files
"""


@pytest.fixture
def fresh(monkeypatch):
    """`fresh("output_dir")`: that module of `utils`, imported once more, where no POSIX module is."""
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)

    def load(name: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(f"fresh_{name}", ROOT / "utils" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_memory_is_asked_of_psutil(fresh, monkeypatch):
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: types.SimpleNamespace(peak_wset=2**30))
    assert fresh("devices").peak_process_memory() == 2**30


def test_the_lock_is_windows_own(fresh, monkeypatch, tmp_path):
    locked = set()

    def locking(descriptor, mode, count):
        assert (mode, count) == (2, 1) and os.lseek(descriptor, 0, os.SEEK_CUR) == 2**30
        inode = os.fstat(descriptor).st_ino
        if inode in locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        locked.add(inode)

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    ours, theirs = fresh("output_dir"), fresh("output_dir")
    ours.lock_output_dir(tmp_path)
    assert (tmp_path / ".lock").stat().st_size < 200  # the locked byte is not written
    with pytest.raises(UsageError, match=f"another run is writing to it .process {os.getpid()} of"):
        theirs.lock_output_dir(tmp_path)
    with pytest.raises(UsageError, match="another run is writing to it"):
        theirs.check_output_dir(tmp_path)
    ours.unlock_output_dir(tmp_path)
    locked.clear()
    theirs.lock_output_dir(tmp_path)


def test_signals_that_are_not_there_are_not_waited_for(monkeypatch):
    PartialState._reset_state()
    AcceleratorState._reset_state()
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.delattr(signal, "SIGHUP")
    stop = Stop(None, Accelerator(cpu=True))
    stop.restore_handlers()
    assert set(stop.before) == {signal.SIGTERM, signal.SIGINT}


def test_commands_are_of_its_shells():
    """Which part at what a path may hold, and know no && (PowerShell) or change no drive (cmd)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "name", "nt")
        line = from_folder("D:\\my data", ["python", "C:\\a&b\\train.py", "--seed", 5, "a b", "x;y"])
    assert line == 'pushd "D:\\my data"\n    python "C:\\a&b\\train.py" --seed 5 "a b" "x;y"'


@pytest.mark.slow
def test_a_script_runs_without_what_windows_lacks(python, teacher_dir, data_dir, tmp_path):
    flags = ["--pretrained_model_name_or_path", teacher_dir, "--dataset_name", data_dir, "--pruning_ratio", "0.5"]
    flags += ["--max_train_steps", "2", "--train_batch_size", "4", "--validation_num_inference_steps", "2"]
    code = f"{TAKE_AWAY}\nimport train_place, utils.command_line as c; c.call(train_place, sys.argv[1:])"
    process = python.start("-c", code, *flags, "--output_dir", str(tmp_path / "student"))
    assert process.wait() == 0, process.stderr[-3000:]
    assert "Saved:" in process.stdout and "GiB" in process.stdout
    assert process.stderr.count("cannot be asked for folders") == 1
