# SPDX-License-Identifier: Apache-2.0
"""Publish a student on the Hugging Face Hub.

    python -m utils.publishing.hub student --hub_model_id user/name     # HF_TOKEN or `hf auth login` says who you are

does at any time what `--push_to_hub` does at the end of a training run: the pipeline, its card, its pictures, its
arguments and its log go into one commit. Checkpoints, `best/`, `samples/` and the trackers' files stay here; `best/`
is a pipeline of its own, and can be pushed as one.
"""

import gc
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from utils.command_line import ArgumentParser, add_hub_arguments
from utils.publishing.card import card_for_hub
from utils.publishing.model_index import without_paths

FILES = ("model_index.json", "samples.png", "losses.png", "log.jsonl")  # beside the components, as they are
RECORDS = ("args.json", "metrics.json")  # without this machine's paths


def prepare_push(args) -> str | None:
    """With `--push_to_hub` create the repository and check the token, before hours are spent; its id, else None.

    Raises:
        ValueError: see `create_repository`.
    """
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return create_repository(name, args.hub_private_repo, args.dry_run)


def create_repository(name: str, private: bool, dry_run: bool = False) -> str:
    """The id, user/name, of a repository that this token may write to; created where there is none, unless `dry_run`.

    Raises:
        ValueError: no token, one the Hub refuses, a repository it may not write to, a public one where a private one
            is asked for, or no Hub at all.
    """
    api = HfApi()
    try:
        api.whoami()
        if dry_run:
            return name
        repo_id = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # creation is forgiven where the repository exists, though it be read-only
        public = private and not api.model_info(repo_id).private
    except Exception as error:  # of the network, of HTTP, of the library's own checks: all mean no push
        raise ValueError(
            f"--push_to_hub: the Hub refused {name}, or could not be asked. Give a token that may write there with "
            "`hf auth login`, HF_TOKEN or --hub_token; or train without --push_to_hub and push later with python -m "
            f"utils.publishing.hub. ({type(error).__name__}: {error})"
        ) from error
    if public:
        raise ValueError(
            f"--hub_private_repo: {repo_id} exists and is public. Make it private in its settings, or choose another "
            "--hub_model_id."
        )
    return repo_id


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
        "later, from the root of this repository, with\n"
        f"    python -m utils.publishing.hub {shlex.quote(str(folder.resolve()))} --hub_model_id {repo_id}"
    )


def operations(folder: Path, repo_id: str) -> list[CommitOperationAdd]:
    """What is published: path in the repository and content."""
    index = json.loads((folder / "model_index.json").read_text())
    components = [name for name, entry in index.items() if isinstance(entry, list)]
    paths = [folder / name for name in FILES]
    paths += sorted(path for name in components for path in (folder / name).rglob("*"))
    added = {str(path.relative_to(folder)): path for path in paths if path.is_file()}
    for name in RECORDS:
        if (folder / name).exists():
            record = without_paths(json.loads((folder / name).read_text()))
            added[name] = (json.dumps(record, indent=2) + "\n").encode()
    card = card_for_hub(folder, repo_id)
    if card is not None:
        added["README.md"] = card.encode()
    return [CommitOperationAdd(name, content) for name, content in added.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Push a folder."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a pipeline: the --output_dir of a run, or its best/")
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    if not (args.folder / "model_index.json").exists():
        raise ValueError(f"{args.folder} has no model_index.json: give the --output_dir of a finished run.")
    repo_id = create_repository(args.hub_model_id or args.folder.resolve().name, args.hub_private_repo)
    push(args.folder, repo_id)


if __name__ == "__main__":
    main()
