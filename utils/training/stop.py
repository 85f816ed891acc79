# SPDX-License-Identifier: Apache-2.0
"""Ending a run early but whole."""

import math
import os
import signal
import time

import torch
from accelerate import Accelerator

from utils.command_line import end_bars
from utils.commands import resuming_command
from utils.distributed import hosts
from utils.launcher import launcher
from utils.training.checkpoint import Checkpoints

# of which Windows has no SIGUSR1 and no SIGHUP, and others no SIGBREAK
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGBREAK")
PASSED_ON = 2  # seconds in which torchrun tells its workers what the terminal has told them already


class Stop:
    """SIGTERM, SIGUSR1, Ctrl-C, the end of the terminal or `--max_train_minutes` make the loop save a checkpoint after
    the optimizer step it is in. A second signal ends the process at once. Whichever process is asked, all stop after
    the same step.

    After Ctrl-C a launcher that leads its session, as in a container, ends at once and takes the terminal with it; the
    SIGHUP that then comes is no second wish. Under nohup there is none."""

    def __init__(self, max_train_minutes: float | None, accelerator: Accelerator):
        self.accelerator = accelerator
        self.deadline = time.monotonic() + 60 * max_train_minutes if max_train_minutes else math.inf
        self.received: int | None = None
        self.received_at = 0.0
        self.hosts = hosts(accelerator)  # asking them does not wait for a GPU
        self.terminal = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        if getattr(signal, "SIGHUP", None) in numbers and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number, _frame):
        if hung_up := signal.Signals(number).name == "SIGHUP":
            self._leave_terminal()
        if self.received is not None:
            passed_on = launcher() == "torchrun" and time.monotonic() - self.received_at < PASSED_ON
            if hung_up or passed_on:
                return
            os._exit(128 + number)
        self.received, self.received_at = number, time.monotonic()
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to end at once.", flush=True)

    def _leave_terminal(self) -> None:
        """Write to nowhere what would go to the terminal: to write there is an error when it has gone."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in self.terminal:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def exit_if_asked(self, checkpoints: Checkpoints, step: int) -> None:
        """Save, say how to go on, and leave: with 128 + the signal, or 124 when the time is up."""
        code = self._exit_code()
        if code == 0:
            return
        path = checkpoints.save(step)
        end_bars()
        self.accelerator.print(f"Stopped at step {step}, saved {path}. Go on:\n    {resuming_command()}")
        if code == 128 + signal.SIGINT and launcher() == "accelerate":  # which it gets too, and has no word for
            self.accelerator.print("The traceback above or below is accelerate's own account of Ctrl-C.")
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
