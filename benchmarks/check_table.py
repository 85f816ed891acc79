# SPDX-License-Identifier: Apache-2.0
"""A table of checks, for scripts that are run once on a machine that has what this one lacks: a GPU, a network."""

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Mapping


class Skip(Exception):
    """The line does not apply here; says why."""


@contextlib.contextmanager
def quiet():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def train(command: list[str]) -> None:
    """train_place.py in this process, without a word."""
    from accelerate.state import AcceleratorState, PartialState  # here and not above: --help need not wait for it

    import train_place
    from utils.command_line import call

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    with quiet():
        call(train_place, command)


def wanted_words(description: str) -> list[str]:
    """What `--only` says: words, of which a line's name holds one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="lines whose name holds one of these")
    return parser.parse_args().only


def run_table(checks: Mapping[str, Callable[[], str]], words: list[str], hidden: str | None = None) -> int:
    """Print a line for each check that `words` ask for, as soon as it is known, and return how many failed. A check
    returns what it found, raises `Skip`, or fails with anything else. `hidden` is printed nowhere."""
    chosen = {name: check for name, check in checks.items() if any(word in name for word in words)}
    width = max(map(len, chosen), default=0) + 2
    failed = 0
    for name, check in chosen.items():
        start = time.perf_counter()
        try:
            outcome, detail = "pass", check()
        except Skip as reason:
            outcome, detail = "skipped", str(reason)
        except (Exception, SystemExit) as error:  # one line's failure is its result; the others still run
            outcome, detail = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())}"
            failed += 1
        line = f"{name:<{width}}{outcome:<9}{time.perf_counter() - start:6.1f} s  {detail}"
        print(line.replace(hidden, "***") if hidden else line, flush=True)
    return failed
