# SPDX-License-Identifier: Apache-2.0
"""What the command lines of all scripts share: the parser, recipe files, flags that stand in several."""

import argparse
import difflib
import os
import re
import shlex
import sys


class HideToken(argparse.Action):
    """Hands a token to huggingface_hub, in `HF_TOKEN`, and leaves it nowhere else: not in the parsed arguments, which
    go into checkpoints, cards and trackers, and not in `sys.argv`, which trackers copy."""

    def __call__(self, _parser, _namespace, token, _option_string=None):
        if token:  # empty is what a script passes that has none
            os.environ["HF_TOKEN"] = token
            sys.argv[:] = [word.replace(token, "***") for word in sys.argv]


class ArgumentParser(argparse.ArgumentParser):
    """argparse with ValueErrors, no abbreviations, and recipe files: `@file.args` holds one flag with its values a
    line; `#` starts a comment; flags behind it on the command line win."""

    def __init__(self, **kwargs):
        super().__init__(
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def error(self, message: str):
        """Raises ValueError: a script, a notebook and a test can all read it."""
        message = re.sub(r"hf_\w+", "hf_***", message)  # a token behind a misspelt flag
        flags = list(self._option_string_actions)
        words = message.split() if message.startswith("unrecognized") else []
        unknown = [word for word in words if word.startswith("--") and word not in flags]
        close = [match for word in unknown for match in difflib.get_close_matches(word, flags, n=1)]
        raise ValueError(f"{message}{f' (did you mean {close[0]}?)' if close else ''}. See --help.")


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a push; `python -m utils.publishing.hub` has them too."""
    group = parser.add_argument_group("Hub")
    group.add_argument(
        "--push_to_hub",
        action="store_true",
        help="publish the student at the end; its repository is created, and the token checked, before training",
    )
    group.add_argument("--hub_model_id", help="name, user/name or organisation/name; default: the student's folder")
    group.add_argument(
        "--hub_private_repo",
        action="store_true",
        help="create the repository private; default: as the account or organisation has it",
    )
    group.add_argument(
        "--hub_token",
        action=HideToken,
        default=argparse.SUPPRESS,
        help="for everything on the Hub, gated teachers too; written nowhere. Default and safer: HF_TOKEN, or that of "
        "`hf auth login`, as `ps` shows a command line, and so does `accelerate launch` when a run fails",
    )
