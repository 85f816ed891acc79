# SPDX-License-Identifier: Apache-2.0
"""What the command lines of all scripts share: the parser, recipe files, and how a user's error is told."""

import argparse
import contextlib
import difflib
import itertools
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from utils.launcher import launcher, launching_words
from utils.recipe_files import read_lines, split_line
from utils.threads import sleep_in_wait

ROOT = Path(__file__).resolve().parent.parent
ALONE = 5  # seconds: a launcher that has seen the main process fail ends the others in less

KINDS = {int: "N", float: "X", Path: "PATH"}  # what --help writes behind a flag; `bundled` joins below
EPILOG = """\
@file.args   a recipe: one flag with its values a line; # before a word starts a comment, ~ and $NAME are expanded
@@name       a value that begins with @
later flags win: --no-FLAG undoes a switch, FLAG "" any other, as if it had never been given
assets/... and recipes/... that are not in the current folder are those of this repository"""


# of one training script alone
OTHERS = dict.fromkeys(("--output_loss", "--coefficients"), "train_lift.py")
OTHERS |= dict.fromkeys(("--group_size", "--grouping"), "train_place.py")
# what other scripts call a flag, where that is too far from ours to be taken for a slip of it
HABITS = {
    **dict.fromkeys(("--lr", "--rate"), "--learning_rate"),
    **dict.fromkeys(("--batch_size", "--bs", "--per_device_train_batch_size"), "--train_batch_size"),
    **dict.fromkeys(("--epochs", "--num_epochs"), "--num_train_epochs"),
    **dict.fromkeys(("--steps", "--max_steps", "--iterations"), "--max_train_steps"),
    **dict.fromkeys(("--model", "--teacher", "--model_id"), "--pretrained_model_name_or_path"),
    **dict.fromkeys(("--student",), "--student_model_name_or_path"),
    **dict.fromkeys(("--data", "--data_dir", "--image_dir"), "--train_data_dir"),
    **dict.fromkeys(("--fp16", "--bf16", "--amp"), "--mixed_precision"),
    **dict.fromkeys(("--guidance_scale", "--cfg"), "--validation_guidance_scale"),
}


class UsageError(ValueError):
    """What a user got wrong, in one sentence that names the flag, what was found and what to do."""

    everywhere = False  # raised on every process, by `utils.distributed.on_main_process`


def bundled(path: str) -> str:
    """A path of this repository, `assets/...` or `recipes/...`, from whatever folder it is given; others as they
    are. The type of every flag that names something to read."""
    is_ours = path.startswith(("assets/", "recipes/")) and not Path(path).exists() and (ROOT / path).exists()
    return str(ROOT / path) if is_ours else path


KINDS[bundled] = "PATH"


def without_root(value):
    """A path below this repository as it is written at its root; everything else as it is."""
    return value.removeprefix(f"{ROOT}{os.sep}") if isinstance(value, str) else value


class Switch(argparse.BooleanOptionalAction):
    """`--use_ema`, and `--no-use_ema` to undo it."""

    def __init__(self, option_strings, dest, default=False, help=None, **kwargs):
        super().__init__(option_strings, dest, default=default, help=help, **kwargs)
        self.help = help  # Python 3.11 adds the default


class HideToken(argparse.Action):
    """Hands a token to huggingface_hub, in `HF_TOKEN`, and leaves it nowhere else: not in the parsed arguments, which
    go into checkpoints, cards and trackers, and not in `sys.argv`, which trackers copy."""

    def __call__(self, _parser, _namespace, token, _option_string=None):
        if token:  # empty is what a script passes that has none
            os.environ["HF_TOKEN"] = token
            sys.argv[:] = [word.replace(token, "***") for word in sys.argv]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The kind of a flag's value, not its name once more in capitals."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return KINDS.get(action.type, "TEXT")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with UsageErrors, no abbreviations, values that can be unset, and recipe files: see `EPILOG`."""

    def __init__(self, *, renamed: Mapping[str, str] | None = None, epilog: str | None = None, **kwargs):
        """`renamed`: flags of earlier versions, and what they are called now."""
        super().__init__(
            **{"usage": "%(prog)s [@recipe.args] [flags]", **kwargs},
            epilog="\n\n".join(filter(None, (EPILOG, epilog))),
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        self.renamed = renamed or {}
        self.words: list[tuple[str, str]] = []  # of the command line, and where in a recipe each stands

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """As argparse's, with the words of recipes; those of this repository are found from any folder."""
        words = _with_recipes(sys.argv[1:] if args is None else args)
        self.words = [(word if place else _at_home(word), place) for word, place in words]
        return super().parse_known_args([word for word, _ in self.words], namespace)

    @contextlib.contextmanager
    def placed_errors(self) -> Iterator[None]:
        """Inside, a UsageError that begins with a flag says where in a recipe that stands."""
        try:
            yield
        except UsageError as error:
            flag = re.match(r"--[\w-]+", str(error))
            raise UsageError(f"{self._place(flag[0]) if flag else ''}{error}") from error

    def _place(self, name: str, value: str | None = None) -> str:
        """Where a flag, or a word that is none, stands in a recipe, to begin an error with: the last time or, if one
        is given, the last time with that value. Empty on the command line itself."""
        found = ""
        for i, (word, place) in enumerate(self.words):
            flag, _, joined = word.partition("=")
            values = itertools.takewhile(lambda other: not other.startswith("--"), (w for w, _ in self.words[i + 1 :]))
            if name in (word, flag) and value in (None, joined, *values):
                found = f"{place}: " if place else ""
        return found

    def _get_values(self, action: argparse.Action, arg_strings: list[str]):
        if arg_strings == [""] and action.option_strings and action.default is not argparse.SUPPRESS:
            return action.default
        return super()._get_values(action, arg_strings)

    def error(self, message: str):
        """Raises UsageError: a script, a notebook and a test can all read it."""
        message = re.sub(r"hf_\w+", "hf_***", message)  # a token behind a misspelt flag
        flags = list(self._option_string_actions)
        words = message.split() if message.startswith("unrecognized") else []
        unknown = [word for word in words if word.startswith("--") and word not in flags]
        names = [word.partition("=")[0] for word in unknown]
        if about := re.match(r"argument (--[\w-]+)(?:[^']*'([^']*)')?", message):
            place = self._place(*about.groups())
        else:
            place = self._place((unknown or words[2:] or [""])[0])
        if renamed := [f"{name} is now {self.renamed[name]}." for name in names if name in self.renamed]:
            raise UsageError(f"{place}{' '.join(renamed)} See --help.")
        if theirs := [f"{name} is a flag of {OTHERS[name]}." for name in names if name in OTHERS.keys() - flags]:
            raise UsageError(f"{place}{' '.join(theirs)} See --help.")
        habits = [HABITS[name] for name in names if HABITS.get(name) in flags]
        others = [word for word in unknown if HABITS.get(word.partition("=")[0]) not in flags]
        close = habits + [match for word in others for match in difflib.get_close_matches(word, flags, n=1)]
        meant = f" (did you mean {' and '.join(close)}?)" if close else ""
        raise UsageError(f"{place}{message}{meant}. See --help.")


def _at_home(word: str) -> str:
    """`~/x` and `--flag=~/x` as a shell would have them, had they not been quoted; the second no shell expands."""
    flag, joined, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{joined}{os.path.expanduser(value)}" if value.startswith("~/") else word


def _with_recipes(words: Sequence[str], place: str = "", within: Sequence[Path] = ()) -> Iterator[tuple[str, str]]:
    """Each word and its place, those of `@recipes` in their stead. `place`: where the words stand; `within`: the
    recipes that lead there. Raises UsageError where one cannot be read; names file and line."""
    for word in words:
        if not word.startswith("@") or word.startswith("@@"):
            yield word.removeprefix("@"), place
            continue
        path = bundled(os.path.expanduser(word[1:]))
        before, hint = f"{place}: " if place else "", "A value that begins with @ is written with two, @@."
        if (resolved := Path(path).resolve()) in within:
            raise UsageError(f"{before}{word} is a recipe that reads itself.")
        try:
            lines = read_lines(path)
        except OSError as error:
            names = (f"{start}{word[1:]}{end}" for start in ("", "recipes/") for end in ("", ".args"))
            if found := next((name for name in names if Path(bundled(name)).is_file()), None):
                hint = f"Did you mean @{found}?"
            raise UsageError(f"{before}{word}: there is no such recipe to read ({error.strerror}). {hint}") from error
        except ValueError as error:
            raise UsageError(f"{before}{word} cannot be read as a recipe: {error}. {hint}") from error
        for number, line in enumerate(lines, start=1):
            here = f"{word}, line {number}"
            try:
                inner = split_line(line)
            except ValueError as error:
                raise UsageError(f"{here}: {error}.") from error
            yield from _with_recipes(inner, here, (*within, resolved))


# flags that name something to read -> what to give; a name of the last kind may be one of the Hub
FOLDERS = dict.fromkeys(("train_data_dir", "images", "reference_images"), "Give a folder of images.")
FILES = {
    "prompts": "Give a text file, one prompt a line.",
    "student_config": "Give the config.json of a diffusers model.",
    "reference_stats": "Give an .npz file of --save_stats, clean-fid or pytorch-fid.",
    "inception_path": "Give the file of inception's weights, or the folder that it lies in.",
    "config": "Give the config.json of a UNet2DModel.",
}
ON_HUB = (
    *("pretrained_model_name_or_path", "student_model_name_or_path", "pretrained_vae_model_name_or_path"),
    *("compare_to", "dataset_name", "feature_extractor", "validation_feature_extractor", "clip_model"),
)
MODEL_FILES = ("model_index.json", "config.json")  # no folder of a user's repositories has one itself
# a name that ends so is a file's; repositories have dots in their names too, as of versions
SUFFIXES = {".json", ".jsonl", ".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".parquet", ".arrow", ".csv", ".zip"}


def refuse_missing(args: argparse.Namespace) -> None:
    """Raises UsageError where a flag names something to read that is not here and can be nothing on the Hub."""
    for name, value in vars(args).items():
        if not isinstance(value, str) or Path(value).exists():
            continue
        if name in FOLDERS:
            raise UsageError(f"--{name} {value}: no such folder. {FOLDERS[name]}")
        if name in FILES:
            raise UsageError(f"--{name} {value}: no such file. {FILES[name]}")
        if name in ON_HUB and not _may_be_on_hub(value):
            raise UsageError(f"--{name} {value}: no such folder here. Paths are relative to the current folder.")


def _may_be_on_hub(name: str) -> bool:
    """Whether `name`, which is nothing here, can be that of a repository, `model` or `user/model`; or a URL."""
    if "://" in name:
        return True
    user = Path(name).parts[0]
    is_ours = user in ("assets", "recipes") or any((Path(user) / each).is_file() for each in MODEL_FILES)
    looks_so = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)
    return bool(looks_so) and Path(name).suffix.lower() not in SUFFIXES and not ("/" in name and is_ours)


def warn_of_idle_flags(
    args: argparse.Namespace, parser: argparse.ArgumentParser, table: Sequence[tuple[str, bool, str]]
) -> None:
    """Warn of every flag that was given but changes nothing beside the others. A row of `table`: flags, whether they
    are idle, and what they go with."""
    for names, is_idle, partner in table:
        for name in names.split():
            if is_idle and getattr(args, name, None) != parser.get_default(name):
                warnings.warn(f"--{name} has no effect here: it goes with {partner}.", stacklevel=3)


def announce(waiting_for: str) -> None:
    """Say what the next seconds or minutes are spent on, once for each machine; above a progress bar, if there is
    one."""
    if int(os.environ.get("LOCAL_RANK", 0)) <= 0:
        write = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print
        with contextlib.suppress(OSError):  # a terminal that has gone: what comes now may be what saves the work
            write(f"{Path(sys.argv[0]).name}: {waiting_for} ...", file=sys.stderr)


def end_bars() -> None:
    """End the lines of progress bars, so that what is said next begins one: of those that are still there, and, in a
    file, of one that was wiped away, as the blanks that wipe it are followed by no end of the line."""
    if "tqdm" not in sys.modules:
        return
    bars = list(sys.modules["tqdm"].tqdm._instances)
    for bar in bars:
        bar.leave = True
        bar.close()
    if not bars and not sys.stderr.isatty():
        print(file=sys.stderr)


def start(parse: Callable[..., argparse.Namespace], *arguments) -> argparse.Namespace:
    """What a script's `parse` says of the command line, before the script imports what takes seconds: --help, a wrong
    flag and a folder that is not there do not wait for torch, and its threads are told how to wait while it can still
    hear of it."""
    sleep_in_wait()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # in a file too, which people follow
    args = run(parse, *arguments)
    if isinstance(args, argparse.Namespace):
        run(refuse_missing, args)
    announce("loading torch, diffusers and transformers")
    return args


def call(script: ModuleType, argv: Sequence[str]) -> None:
    """An imported script's `main` with this command line, as a notebook or a benchmark calls it; it raises what it
    finds wrong, and signals then do what they did before."""
    method = [script.add_method_arguments] if hasattr(script, "add_method_arguments") else []
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        script.main(script.parse_args(script.__doc__, *method, argv))
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def run(function: Callable, *arguments):
    """Call a script's `main`, or what parses its command line. A UsageError becomes one sentence on stderr and exit
    code 2, read once however many processes raise it; everything else keeps its traceback. Our own warnings are one
    line each."""
    warnings.showwarning = _show_warning
    try:
        return function(*arguments)
    except UsageError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:  # the main process says it, and its launcher ends this one meanwhile; or this one is alone
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(ALONE)
        if not (rank and error.everywhere):
            process = f" of process {rank}" if rank else ""
            sentence = str(error).rsplit("UsageError: ", 1)[-1]  # a data worker's comes inside of its traceback
            end_bars()
            _tell(f"{Path(sys.argv[0]).name}: error{process}: {sentence.rstrip()}")
        raise SystemExit(2) from None


def _tell(sentence: str) -> None:
    """To the reader, and to the launcher, which ends with a report of its own: torchrun's has room for the sentence,
    `accelerate launch` for one process has none."""
    print(sentence, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": details}}))
    elif launcher() == "accelerate" and not {"-q", "--quiet"} & set(launching_words()):
        print("What follows is accelerate's: `accelerate launch -q`, or python, would not say it.", file=sys.stderr)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A sentence where it comes from this repository, once for each machine; where it stands, if from a library."""
    is_ours = issubclass(category, UserWarning) and ROOT in Path(filename).resolve().parents
    if not is_ours or "site-packages" in filename:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)
    elif int(os.environ.get("LOCAL_RANK", 0)) <= 0:
        print(f"{Path(sys.argv[0]).name}: warning: {message}", file=file or sys.stderr, flush=True)
