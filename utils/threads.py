# SPDX-License-Identifier: Apache-2.0
"""How the threads of PyTorch's operators wait, and how many there are. Nothing here imports torch, which reads the
first when it is loaded."""

import os
from collections.abc import Mapping

import psutil

from utils.launcher import launcher, launcher_environment

POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # OpenMP's own word, GNU's, and LLVM's and Intel's
# some ten microseconds, then sleep: as fast as spinning on an idle machine, where sleeping at once (PASSIVE) makes the
# default's step 40 % longer; GNU's own is 30 times as long
BRIEFLY = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
AT_ONCE = {"OMP_WAIT_POLICY": "PASSIVE"}  # beside a busy core a third faster than briefly


def sleep_in_wait() -> None:
    """Threads that have nothing to do spin briefly and then sleep, where they would spin on: one busy core would else
    hold up all others, as every operator waits for its slowest thread, which a spinning one keeps from the core. On a
    machine that is busy when this is called they sleep at once. What the user has set stays. Before torch is imported.
    """
    if not any(name in os.environ for name in POLICIES):
        os.environ.update(AT_ONCE if is_busy() else BRIEFLY)


def is_busy() -> bool:
    """Whether others keep half of the cores, or more, at work now: a load average would still count what has ended."""
    return psutil.cpu_percent(interval=0.1) >= 50


def how_threads_wait() -> str:
    """In a few words, for the plan."""
    if os.environ.items() >= AT_ONCE.items():
        return "asleep while they wait"
    if os.environ.items() >= BRIEFLY.items():
        return "spinning briefly while they wait"
    return "waiting as the environment says"


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
