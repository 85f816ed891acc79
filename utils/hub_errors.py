# SPDX-License-Identifier: Apache-2.0
"""Why nothing came from the Hub: what stands at the root of a library's error, and what to do about it."""

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

OFFLINE = "HF_HUB_OFFLINE is set, so that the Hub is not asked. Unset it, or give a folder."
UNREACHED = "the Hub cannot be reached. Give a folder, or try again later."
# the first that stands in the chain of an error; that of a gated repository is a RepositoryNotFoundError too
REASONS = (
    (OfflineModeIsEnabled, OFFLINE),
    (
        GatedRepoError,
        "its page there has terms to accept. Do so, then give a token: `hf auth login` or HF_TOKEN.",
    ),
    (RevisionNotFoundError, "the Hub has it, but not of this revision. Give another."),
    (RepositoryNotFoundError, "the Hub has none of that name, or not for your token. Paths start in this folder."),
    ((LocalEntryNotFoundError, ConnectionError), UNREACHED),
)


def why_not(error: BaseException | None) -> str | None:
    """The reason behind `error`, with what to do; None where it is none of the Hub's."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    found = next((said for kind, said in REASONS if any(isinstance(link, kind) for link in chain)), None)
    return OFFLINE if found == UNREACHED and constants.HF_HUB_OFFLINE else found


def no_pipeline(error: BaseException) -> str:
    """Why no pipeline came from the Hub, behind "no such folder here, and"."""
    return why_not(error) or (
        "no diffusers pipeline of that name was found on the Hub. Paths are relative to the current folder. "
        f"({type(error).__name__}: {error})"
    )
