# SPDX-License-Identifier: Apache-2.0
"""New Python processes without the seconds that imports take.

`python forks.py` imports the libraries, forgets this project's modules, and waits; every process that it is asked for
is a fork of it, which then runs as a new one would: its own arguments, folder, environment, output and exit code.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Process:
    """As much of `subprocess.Popen` as tests need."""

    def __init__(self, pid: int, folder: Path):
        self.pid, self.folder = pid, folder

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        code = self.folder / "code"
        return int(code.read_text()) if code.exists() else None

    @property
    def returncode(self) -> int | None:
        return self.poll()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def wait(self, timeout: float = 300) -> int:
        """The exit code; kills the process and raises where it takes longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"{timeout} s are over; stderr ends with {self.stderr[-3000:]}")
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class ForkServer:
    """`with ForkServer() as server: server.start("train_place.py", "--flag", value)`.

    `environment` is there before the libraries are imported: some read it only then.
    """

    def __init__(self, **environment: str):
        self.scratch = tempfile.TemporaryDirectory(prefix="forks-", ignore_cleanup_errors=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait()
        self.scratch.cleanup()

    def start(self, *words, cwd: Path = ROOT, **environment: str) -> Process:
        """What `python *words` starts: a script, `-c` code or `-m` module, and its arguments."""
        folder = Path(self.scratch.name) / str(self.count)
        folder.mkdir()
        self.count += 1
        job = {"words": [str(word) for word in words], "cwd": str(cwd), "environment": environment}
        self.server.stdin.write(json.dumps({**job, "folder": str(folder)}) + "\n")
        self.server.stdin.flush()
        return Process(int(self.server.stdout.readline()), folder)

    def run(self, *words, **options) -> Process:
        """The same, ended."""
        process = self.start(*words, **options)
        process.wait()
        return process

    def start_ranks(self, count: int, *words, **options) -> list[Process]:
        """`count` processes that find each other, as `torchrun` would start them on one machine."""
        return [self.start(*words, **world, **options) for world in worlds(count)]


def worlds(count: int) -> list[dict[str, str]]:
    """The environment of each of `count` processes of one machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(count)]


def serve() -> dict:
    """Fork for every line of the standard input; returns in the child alone, with its job."""
    folders: dict[int, Path] = {}
    while True:
        readable, _, _ = select.select([0], [], [], 0.01 if folders else None)
        while folders and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            folder = folders.pop(ended[0])
            (folder / "code.partial").write_text(str(os.waitstatus_to_exitcode(ended[1])))
            (folder / "code.partial").rename(folder / "code")
        if not readable:
            continue
        line = sys.stdin.buffer.raw.readline()  # unbuffered: what `select` sees is all there is
        if not line:
            for pid in folders:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        job = json.loads(line)
        if (pid := os.fork()) == 0:
            return job
        folders[pid] = Path(job["folder"])
        print(pid, flush=True)


def become(job: dict) -> None:
    """Run what the job names, as a new interpreter does."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(job["folder"]) / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    first, *rest = job["words"]
    script = first not in ("-c", "-m")
    sys.path[:0] = [str(Path(first).resolve().parent) if script else job["cwd"]]
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = [first, *rest] if script else [first, *rest[1:]]
    if job["cwd"] == str(ROOT) and (first == "-c" or first.startswith("train_")):
        leave_ornaments_out()
    if first == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")


def leave_ornaments_out() -> None:
    """More than half of a tiny training run's time, and no part of what it computes."""
    memory = importlib.import_module("utils.training.memory")
    curves = importlib.import_module("utils.publishing.curves")
    memory.memory_estimate = lambda *_: "not estimated"
    curves.plot_losses = lambda log, picture, teacher: picture.write_bytes(b"curves")


def leave(job: dict) -> None:
    """`become`, and end as an interpreter does, but for the seconds in which it would tidy up what it had imported."""
    code = 0
    try:
        become(job)
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def import_libraries() -> None:
    """All that the scripts import, and what they import late; then this project's own modules are forgotten."""
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    from diffusers import (  # noqa: F401
        DDIMPipeline,
        DDPMPipeline,
        DiTPipeline,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
    )
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    sys.path[0] = str(ROOT)  # in place of tests/, which no process of a user sees
    for script in ("train_place", "evaluate_fid"):
        importlib.import_module(script)
    sys.path.pop(0)
    for name, module in [*sys.modules.items()]:
        if name != "__main__" and str(getattr(module, "__file__", None)).startswith(f"{ROOT}{os.sep}"):
            del sys.modules[name]


if __name__ == "__main__":
    import_libraries()
    gc.freeze()  # no collection of a child copies these pages
    leave(serve())
