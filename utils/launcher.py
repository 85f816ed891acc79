# SPDX-License-Identifier: Apache-2.0
"""What has started this process: a shell, or `accelerate launch` or torchrun, whose child it then is."""

import os
import sys
from collections.abc import Mapping
from typing import Literal

import psutil

VARIABLES = {"TORCHELASTIC_RUN_ID": "torchrun", "ACCELERATE_MIXED_PRECISION": "accelerate"}  # set in what they start


def launcher() -> Literal["torchrun", "accelerate", None]:
    """`accelerate`: one process, by `accelerate launch` itself; several it starts as torchrun does."""
    return next((name for variable, name in VARIABLES.items() if variable in os.environ), None)


def launcher_environment() -> Mapping[str, str]:
    """What the launcher's own process was started with; empty where that cannot be known."""
    try:
        return psutil.Process().parent().environ()
    except (psutil.Error, AttributeError, OSError):  # it has ended, or is someone else's
        return {}


def launching_words() -> list[str]:
    """The words before the script in the command line of the process that started this one; none where that was no
    command of this script's."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError, OSError):
        return []
    before = words[: max(0, len(words) - len(sys.argv))]
    return before if before and words[len(before)] == sys.argv[0] else []
