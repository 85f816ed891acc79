# SPDX-License-Identifier: Apache-2.0
"""Ending a run early but whole."""

import math
import os
import signal
import time

import torch
from accelerate import Accelerator

from utils.distributed import hosts
from utils.training.checkpoint import Checkpoints

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGBREAK")  # of which Windows has no SIGUSR1, and others no SIGBREAK


class Stop:
    """SIGTERM, SIGUSR1, Ctrl-C or `--max_train_minutes` make the loop save a checkpoint after the optimizer step it is
    in. A second signal ends the process at once. Whichever process is asked to, all stop after the same step."""

    def __init__(self, max_train_minutes: float | None, accelerator: Accelerator):
        self.accelerator = accelerator
        self.deadline = time.monotonic() + 60 * max_train_minutes if max_train_minutes else math.inf
        self.received: int | None = None
        self.hosts = hosts(accelerator)  # asking them does not wait for a GPU
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number, _frame):
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to end at once.", flush=True)

    def exit_if_asked(self, checkpoints: Checkpoints, step: int) -> None:
        """Save, say how to go on, and leave: with 128 + the signal, or 124 when the time is up."""
        code = self._exit_code()
        if code == 0:
            return
        path = checkpoints.save(step)
        self.accelerator.print(
            f"Stopped at step {step}, saved {path}. Go on: the same command with --resume_from_checkpoint latest"
        )
        raise SystemExit(code)

    def _exit_code(self) -> int:
        """0 is to go on; the largest of all processes, since clocks differ and a signal may reach only one."""
        own = 128 + self.received if self.received is not None else 124 * (time.monotonic() >= self.deadline)
        if self.hosts is None:
            return own
        code = torch.tensor(own)
        torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX, group=self.hosts)
        return int(code)

    def restore_handlers(self) -> None:
        """The loop is over: from now on signals do what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
