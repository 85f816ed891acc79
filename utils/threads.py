# SPDX-License-Identifier: Apache-2.0
"""How the threads of PyTorch's operators wait, and how many there are. Nothing here imports torch, which reads the
first when it is loaded."""

import os
from collections.abc import Mapping

from utils.launcher import launcher, launcher_environment

POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # OpenMP's own word, GNU's and Intel's and LLVM's


def sleep_in_wait() -> None:
    """Threads that have nothing to do sleep, where they would spin: one busy core would else hold up all others, as
    every operator waits for its slowest thread, which a spinning one keeps from the core. What the user has set stays.
    Before torch is imported."""
    if not any(name in os.environ for name in POLICIES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def wanted_threads() -> int | None:
    """OMP_NUM_THREADS, where the user has set it. `accelerate launch` and torchrun set it to 1 where it is not set: a
    1 that the launcher's own environment does not hold is nobody's wish."""
    count = _first_number(os.environ)
    if count == 1 and launcher():
        return _first_number(launcher_environment())
    return count


def _first_number(environment: Mapping[str, str]) -> int | None:
    """Of OMP_NUM_THREADS, which may have one for each level of nesting."""
    first = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None
