# SPDX-License-Identifier: Apache-2.0
"""Commands that the scripts print, to be copied and run: quoted, and for whatever folder one is in."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.launcher import launching_words

SPECIAL = re.compile(r"[&|<>^(){};,'`$@!%]")  # to cmd or PowerShell
RESUMING = ("--resume_from_checkpoint", "--overwrite_output_dir", "--no-overwrite_output_dir")


def shell_line(words: Sequence[str | Path]) -> str:
    """The words quoted for the shell of this system."""
    words = [str(word) for word in words]
    if os.name != "nt":
        return shlex.join(words)
    quoted = (subprocess.list2cmdline([word]) for word in words)
    return " ".join(f'"{word}"' if SPECIAL.search(word) and word[0] != '"' else word for word in quoted)


def python() -> str:
    """This interpreter: by its name where the shell finds it so, else by its path. A virtual environment is known by
    the folder that its link lies in, not by what it links to."""
    found = shutil.which("python")
    return "python" if found and Path(found).parent == Path(sys.executable).parent else sys.executable


def from_folder(folder: str | Path, words: Sequence[str | Path]) -> str:
    """A command that is run in `folder`, from any; on Windows two lines, which cmd and PowerShell both read."""
    if os.name == "nt":  # cd would not change the drive
        return f"pushd {shell_line([folder])}\n    {shell_line(words)}"
    return f"cd {shell_line([folder])} && {shell_line(words)}"


def python_code(code: str) -> str:
    """A command that runs a line of Python."""
    return shell_line([python(), "-c", code])


def string(value: str | Path) -> str:
    """A Python string, in double quotes where that is possible, as a shell's quotes are single ones."""
    text = repr(str(value))
    return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text else text


def resuming_command() -> str:
    """What has started this process, launcher and all, going on from the newest checkpoint; a token in it stays
    untold."""
    given = [word for word in sys.argv[1:] if "***" not in word and word != "--hub_token"]
    kept, last = [], ""
    for word in given:  # once is enough, however often it was stopped; and what was trained stays
        names_one = last == "--resume_from_checkpoint" and not word.startswith("--")
        if not names_one and word.partition("=")[0] not in RESUMING:
            kept.append(word)
        last = word
    return from_folder(Path.cwd(), [*_before_script(), sys.argv[0], *kept, *_resume(given)])


def _resume(given: Sequence[str]) -> list[str]:
    """The flags that go on; a recipe may hold an --overwrite_output_dir, which has to be undone."""
    in_recipe = any(word.startswith("@") for word in given)
    return ["--resume_from_checkpoint", "latest"] + ["--no-overwrite_output_dir"] * in_recipe


def _before_script() -> list[str]:
    """The words before it: python, or `accelerate launch`, torchrun or another, with flags of their own."""
    script = sys.argv[0]
    own = sys.orig_argv[: sys.orig_argv.index(script)] if script in sys.orig_argv else [python()]
    words = launching_words() or own
    is_program = len(words) > 1 and Path(words[1]).is_file() and os.access(words[1], os.X_OK)
    return words[1:] if is_program else words  # such as accelerate, whose first line names its python
