# SPDX-License-Identifier: Apache-2.0
"""Publish a student on the Hugging Face Hub.

    python -m utils.publishing.hub student --hub_model_id user/name     # HF_TOKEN or `hf auth login` says who you are

does at any time what `--push_to_hub` does at the end of a training run: the pipeline, its card, its pictures, its
arguments and its log go into one commit. Checkpoints, `best/`, `samples/` and the trackers' files stay here; `best/`
is a pipeline of its own, and can be pushed as one.
"""

import contextlib
import gc
import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.command_line import ROOT, ArgumentParser, UsageError, run, start
from utils.flags import add_hub_arguments


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked. Raises UsageError."""
    parser = ArgumentParser(description=__doc__, usage="python -m utils.publishing.hub FOLDER [flags]")
    parser.add_argument("folder", type=Path, help="a pipeline: the --output_dir of a run, or its best/")
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    if not (args.folder / "model_index.json").exists():
        raise UsageError(f"{args.folder} has no model_index.json: give the --output_dir of a finished run.")
    return args


if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = start(parse_args)

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from utils.commands import from_folder, python
from utils.files import is_stray
from utils.publishing.card import card_for_hub
from utils.publishing.model_index import without_paths

# beside the components, as they are
FILES = ("model_index.json", "samples.png", "losses.png", "log.jsonl", "report.html")
RECORDS = ("args.json", "metrics.json")  # without this machine's paths


def check_push(args) -> None:
    """With `--push_to_hub` check token and name before anything else is done, and write nothing.

    Raises:
        UsageError: see `check_repository`.
    """
    if args.push_to_hub:
        check_repository(_name(args), args.hub_private_repo)


def prepare_push(args) -> str | None:
    """With `--push_to_hub` create the repository, before hours are spent; its id, else None.

    Raises:
        UsageError: see `create_repository`.
    """
    return create_repository(_name(args), args.hub_private_repo) if args.push_to_hub else None


def _name(args) -> str:
    return args.hub_model_id or Path(args.output_dir).resolve().name


def check_repository(name: str, private: bool) -> None:
    """Whether this token may write to a repository of this name, and make it where there is none, as far as the Hub
    says without writing.

    Raises:
        UsageError: no token, one that the Hub refuses or that may only read, a namespace that is not its owner's, a
            repository that it may not write to, a public one where a private one is asked for, or no Hub at all.
    """
    api = HfApi()
    with _refused(name):
        validate_repo_id(name)
        account = api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PermissionError("this token may only read")
        owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
        owner, _, rest = name.rpartition("/")
        repo_id = f"{owner or account['name']}/{rest}"
        try:
            found = api.model_info(repo_id)
        except RepositoryNotFoundError:
            if owner and owner not in owners:
                raise PermissionError(f"{owner} is none of {', '.join(owners)}, for whom this token speaks") from None
            return
        api.auth_check(repo_id, write=True)
    if private and not found.private:
        raise _public(repo_id)


def create_repository(name: str, private: bool, *, trained: bool = False) -> str:
    """The id, user/name, of a repository that this token may write to; created where there is none. `trained`: there
    is a student already, nothing to train without a push.

    Raises:
        UsageError: as `check_repository`.
    """
    api = HfApi()
    with _refused(name, trained):
        api.whoami()
        repo_id = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # creation is forgiven where the repository exists, though it be read-only
        public = private and not api.model_info(repo_id).private
    if public:
        raise _public(repo_id)
    return repo_id


@contextlib.contextmanager
def _refused(name: str, trained: bool = False) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the network, of HTTP, of the library's own checks: all mean no push
        token = "Give a token that may write there with `hf auth login`, HF_TOKEN or --hub_token"
        later = f"push the student's folder later: {push_command('FOLDER', '--hub_model_id', name)}"
        raise UsageError(
            f"{'' if trained else '--push_to_hub: '}the Hub refused {name}, or could not be asked. {token}"
            f"{', and run this again.' if trained else f'; or train without --push_to_hub and {later}'} "
            f"({type(error).__name__}: {error})"
        ) from error


def _public(repo_id: str) -> UsageError:
    return UsageError(
        f"--hub_private_repo: {repo_id} exists and is public. Make it private in its settings, or choose another "
        "--hub_model_id."
    )


def push(folder: str | Path, repo_id: str) -> None:
    """Upload the student in `folder` as one commit, or none if the repository holds the same already.

    Raises:
        SystemExit: it failed; says where the student is and the command that pushes it later.
    """
    folder = Path(folder)
    try:
        commit = HfApi().create_commit(repo_id, operations(folder, repo_id), commit_message="Upload the student")
    except Exception as error:  # whatever it is: the student is on disk, and this is the last thing a run does
        reason = f"{type(error).__name__}: {error} {error.__cause__ or ''}".rstrip()
    else:
        print(f"Pushed to {commit.repo_url}", flush=True)
        return
    gc.collect()  # the upload's progress bar goes with the error, so that the command is the last line of all
    raise SystemExit(
        f"The push to {repo_id} failed ({reason}). Nothing is lost: the student is in {folder.resolve()}. Push it "
        f"later with\n    {push_command(folder.resolve(), '--hub_model_id', repo_id)}"
    )


def push_command(*arguments: str | Path) -> str:
    """This module's, from any folder; Python finds it at the root of the repository alone."""
    return from_folder(ROOT, [python(), "-m", "utils.publishing.hub", *arguments])


def operations(folder: Path, repo_id: str) -> list[CommitOperationAdd]:
    """What is published: path in the repository and content."""
    index = json.loads((folder / "model_index.json").read_text())
    components = [name for name, entry in index.items() if isinstance(entry, list)]
    paths = [folder / name for name in FILES]
    paths += sorted(path for name in components for path in (folder / name).rglob("*"))
    added = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file() and not is_stray(path)}
    for name in RECORDS:
        if (folder / name).exists():
            record = without_paths(json.loads((folder / name).read_text()))
            added[name] = (json.dumps(record, indent=2) + "\n").encode()
    card = card_for_hub(folder, repo_id)
    if card is not None:
        added["README.md"] = card.encode()
    return [CommitOperationAdd(name, content) for name, content in added.items()]


def main(args: Namespace) -> None:
    """Push a folder."""
    repo_id = create_repository(args.hub_model_id or args.folder.resolve().name, args.hub_private_repo, trained=True)
    push(args.folder, repo_id)


if __name__ == "__main__":
    run(main, ARGS)
