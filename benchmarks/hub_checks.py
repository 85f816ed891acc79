# SPDX-License-Identifier: Apache-2.0
"""Everything that only a network can show, in one table: run this first on a machine that reaches the Hub.

    python benchmarks/hub_checks.py                   # every line; downloads 150 MB
    python benchmarks/hub_checks.py --only recipe     # those whose name holds one of these words

Every recipe's repositories: that they exist, at which revision, in a format that the recipe's flags load, and behind
which licence. Two small teachers load and train two steps. With a token (HF_TOKEN or `hf auth login`) one student is
pushed to a new private repository, loaded back and compared, and the repository is deleted. Each line passes, fails
or is skipped, with its reason; the script exits 1 where one failed. Without a network it checks that recipes parse.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "0")  # or the tests' own setting would hold

from check_table import Skip, quiet, run_table, train, wanted_words  # noqa: E402

from utils.command_line import start  # noqa: E402

if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    WORDS = start(wanted_words, __doc__)

import conftest  # noqa: E402
import latent_pipelines  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from huggingface_hub import HfApi, constants, get_token  # noqa: E402
from huggingface_hub.utils import get_session  # noqa: E402

import train_lift  # noqa: E402
import train_place  # noqa: E402
from utils.publishing.hub import create_repository, push  # noqa: E402
from utils.training.arguments import parse_args  # noqa: E402

SMALL = {  # a teacher of every kind that trains in seconds on a CPU, and its student
    "google/ddpm-cifar10-32": "--pruning_ratio 0.5 --student_init magnitude",
    "hf-internal-testing/tiny-stable-diffusion-pipe": "--student_preset bk_base --resolution 64",
}
STEPS = "--max_train_steps 2 --train_batch_size 2 --logging_steps 1 --report_to none --validation_shown_samples 0"
# what training reads, if a repository has it; another VAE's has its weights in the root, as the oldest pipelines do
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
SHARD = r"(?:-\d+-of-\d+)?"
WEIGHTS = rf"(?:diffusion_pytorch_model|pytorch_model|model){SHARD}(?:\.(\w+))?{SHARD}\.(safetensors|bin)"


def weight_formats(paths: Iterable[str], variant: str | None) -> dict[str, set[str]]:
    """Part of a pipeline ("" is the repository's root) -> the formats, "safetensors" or "bin", in which `variant` of
    its weights is there."""
    paths = list(paths)
    parts = [part for part in PARTS if any(path.startswith(f"{part}/") for path in paths)] or [""]
    formats = {part: set() for part in parts}
    for path in paths:
        part, _, name = path.rpartition("/")
        match = re.fullmatch(WEIGHTS, name)
        if part in formats and match and match[1] == variant:
            formats[part].add(match[2])
    return formats


def loadable(
    paths: Iterable[str], variant: str | None = None, pickled: bool = False, instead: str | None = None
) -> str:
    """In which format the weights load. Raises ValueError where they do not; `instead` is a part that comes from
    elsewhere."""
    formats = weight_formats(paths, variant)
    formats.pop(instead, None)
    for part, found in formats.items():
        where = f"{part or 'the root'} holds"
        if not found:
            raise ValueError(f"{where} no weights{f' of --variant {variant}' if variant else ''}")
        if found == {"bin"} and not pickled:
            raise ValueError(f"{where} .bin weights alone: it needs --allow_pickle_weights, and the recipe lacks it")
    return "safetensors" if all("safetensors" in found for found in formats.values()) else ".bin, as the recipe says"


def readable(paths: Iterable[str], name: str) -> str:
    """In which format a dataset's rows are. Raises ValueError where they come from a script, which `datasets` does not
    run."""
    suffixes = {Path(path).suffix for path in paths} - {"", ".md", ".py", ".gitattributes"}
    if not suffixes:
        raise ValueError(f"{name} holds no data, or a script that makes it: it needs --revision refs/convert/parquet")
    return "parquet" if ".parquet" in suffixes else ", ".join(sorted(suffixes))


def recipe_flags(path: Path) -> Namespace:
    """A recipe as its script parses it: the one that it names, else train_place.py."""
    script = train_lift if "train_lift.py" in path.read_text() else train_place
    with quiet():
        return parse_args(script.__doc__, script.add_method_arguments, [f"@{path}"])


def hub_names(args: Namespace) -> dict[str, str]:
    """Flag -> the Hub id that a recipe gives it; a name without an owner is a folder of the user's."""
    flags = [flag for flag in vars(args) if flag.endswith(("name_or_path", "dataset_name", "feature_extractor"))]
    named = {flag: getattr(args, flag) for flag in flags if getattr(args, flag)}
    return {flag: name for flag, name in named.items() if re.fullmatch(r"[\w-]+/[\w.-]+", name)}


class Hub:
    """The Hub, or why it cannot be asked; students are kept in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.api, self.silence = folder, HfApi(), None
        try:
            get_session().get(constants.ENDPOINT, timeout=20)
        except Exception as error:  # of whatever library asks: there is no answer
            self.silence = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def ask(self) -> HfApi:
        if self.silence:
            raise Skip("there is no network")
        return self.api

    def check_repository(self, args: Namespace, flag: str, name: str) -> str:
        """Existence, revision, format and licence of what `flag` names."""
        is_dataset = flag == "dataset_name"
        is_teacher = flag == "pretrained_model_name_or_path"
        revision = args.revision if is_teacher else None
        kind = "dataset" if is_dataset else "model"
        info = self.ask().repo_info(name, revision=revision, repo_type=kind, timeout=60)
        paths = [file.rfilename for file in info.siblings]
        if is_dataset:
            form = readable(paths, name)
        else:
            variant = args.variant if is_teacher else None
            other_vae = "vae" if is_teacher and args.pretrained_vae_model_name_or_path else None
            form = loadable(paths, variant, args.allow_pickle_weights, other_vae)
        licence = [tag.removeprefix("license:") for tag in info.tags if tag.startswith("license:")]
        found = f"{name} at {info.sha}, {form}, licence {' '.join(licence) or 'not said'}"
        if not info.gated:
            return f"{found}, no gate"
        try:
            self.api.auth_check(name, repo_type=kind)
        except Exception as error:  # no token, or one whose owner has not accepted
            where = f"{constants.ENDPOINT}/{'datasets/' if is_dataset else ''}{name}"
            raise Skip(f"{found}; gated: accept it at {where}, then `hf auth login`") from error
        return f"{found}, gated and accepted"

    @functools.cache  # noqa: B019  one Hub a process
    def student(self, teacher: str) -> Path:
        """The folder of a student of one of `SMALL`, after two steps."""
        paths = [file.rfilename for file in self.ask().model_info(teacher, timeout=60).siblings]
        output, data = (self.folder / kind / teacher.replace("/", "-") for kind in ("students", "data"))
        if "--resolution" in SMALL[teacher]:
            data = ["--train_data_dir", latent_pipelines.save_captioned(data)]
        else:
            data = ["--dataset_name", conftest.save_images(data, side=32, mode="RGB")]
        pickled = ["--allow_pickle_weights"] if any(f == {"bin"} for f in weight_formats(paths, None).values()) else []
        flags = ["--pretrained_model_name_or_path", teacher, *data, *pickled, *SMALL[teacher].split()]
        train([*STEPS.split(), *map(str, flags), "--output_dir", str(output)])
        return output

    def check_training(self, teacher: str) -> str:
        output = self.student(teacher)
        losses = [line["loss"] for line in conftest.read_log(output)]
        assert len(losses) == 2 and all(0 < loss < float("inf") for loss in losses), losses
        pickled = json.loads((output / "args.json").read_text())["arguments"]["allow_pickle_weights"]
        return f"losses {losses[0]:.3f}, {losses[1]:.3f}{', with --allow_pickle_weights' if pickled else ''}"

    def check_push(self) -> str:
        """A private repository of a random name, filled, read back without a cache, and deleted whatever happens."""
        if not self.ask().token and not get_token():
            raise Skip("there is no token: set HF_TOKEN or `hf auth login` with one that may write")
        output = self.student(next(iter(SMALL)))
        repo_id = create_repository(f"lift-place-check-{secrets.token_hex(8)}", private=True)
        try:
            with quiet():
                push(output, repo_id)
            assert self.api.model_info(repo_id).private, "the repository is public"
            files = [f for f in self.api.list_repo_tree(repo_id, recursive=True) if f.path.endswith(".safetensors")]
            way = "xet" if all(getattr(file, "xet_hash", None) for file in files) else "git-LFS, not xet"
            with quiet(), tempfile.TemporaryDirectory() as cache:
                theirs = DiffusionPipeline.from_pretrained(repo_id, cache_dir=cache, use_safetensors=True).unet
            ours = DiffusionPipeline.from_pretrained(output, use_safetensors=True).unet.state_dict()
            assert ours.keys() == theirs.state_dict().keys()
            assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.state_dict().items())
        finally:
            self.api.delete_repo(repo_id)
        return f"{len(ours)} tensors came back equal, over {way}; the repository is deleted"

    def checks(self) -> dict[str, Callable[[], str]]:
        """Name -> check, in the order of the table."""
        lines = {}
        for path in sorted((ROOT / "recipes").glob("*.args")):
            lines[f"recipe {path.stem} parses"] = functools.partial(self.check_recipe, path)
            with contextlib.suppress(Exception):  # the line above says what is wrong with it
                args = recipe_flags(path)
                for flag, name in hub_names(args).items():
                    lines[f"recipe {path.stem} --{flag}"] = functools.partial(self.check_repository, args, flag, name)
        for teacher in SMALL:
            lines[f"two steps of {teacher}"] = functools.partial(self.check_training, teacher)
        return {**lines, "private push and reload": self.check_push}

    @staticmethod
    def check_recipe(path: Path) -> str:
        named = hub_names(recipe_flags(path)).values()
        return f"names {', '.join(named) or 'nothing of the Hub'}"


def main(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        hub = Hub(Path(folder))
        silence = f", no network here ({hub.silence}): the lines that need none"
        print(f"{constants.ENDPOINT}{silence if hub.silence else ''}\n")
        failed = run_table(hub.checks(), words, hidden=get_token())
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main(WORDS)
