# SPDX-License-Identifier: Apache-2.0
"""Ending a run early but whole."""

import math
import os
import signal
import time

from utils.checkpoint import Checkpoints


class Stop:
    """SIGTERM, SIGUSR1, Ctrl-C or `--max_train_minutes` make the loop save a checkpoint after the optimizer step it is
    in. A second signal ends the process at once."""

    def __init__(self, max_train_minutes: float | None):
        self.deadline = time.monotonic() + 60 * max_train_minutes if max_train_minutes else math.inf
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, _frame):
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to end at once.", flush=True)

    def exit_if_asked(self, checkpoints: Checkpoints, step: int) -> None:
        """Save, say how to go on, and leave: with 128 + the signal, or 124 when the time is up."""
        if self.received is None and time.monotonic() < self.deadline:
            return
        path = checkpoints.save(step)
        print(f"Stopped at step {step}, saved {path}. Go on: the same command with --resume_from_checkpoint latest")
        raise SystemExit(124 if self.received is None else 128 + self.received)
