# SPDX-License-Identifier: Apache-2.0
"""Several processes that wait for each other, and never for one that has gone."""

from collections.abc import Callable
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from utils.command_line import UsageError

# The others wait while the main process validates or indexes data; a process that dies is noticed by its launcher, and
# by its closed connection, without any timeout. The libraries' own are 10 minutes (NCCL) and 30 (gloo).
PATIENCE = timedelta(days=1)


def long_timeout() -> InitProcessGroupKwargs:
    """For the Accelerator: processes wait `PATIENCE` for each other."""
    return InitProcessGroupKwargs(timeout=PATIENCE)


def on_main_process(accelerator: Accelerator, function: Callable, *arguments):
    """`function(*arguments)` on the main process, its value there and None elsewhere.

    Raises:
        ValueError: the one that `function` raised, on every process: none is left waiting at the next barrier.
    """
    value, refusals = None, [None]
    if accelerator.is_main_process:
        try:
            value = function(*arguments)
        except ValueError as error:
            refusals = [error]
            if isinstance(error, UsageError):
                error.everywhere = True  # said once, by the main process
    broadcast_object_list(refusals)
    if refusals[0] is not None:
        raise refusals[0]
    return value


def main_process_first(accelerator: Accelerator, function: Callable, *arguments):
    """`function(*arguments)` on every process, on the main one before the others: what it downloads, they find.

    Raises:
        ValueError: as `on_main_process`; the others then do not begin.
    """
    value = on_main_process(accelerator, function, *arguments)
    return value if accelerator.is_main_process else function(*arguments)
