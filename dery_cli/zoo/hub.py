"""Networks on the Hugging Face hub: fetched by name, sent from a folder.

``HF_HUB_OFFLINE`` is honoured: then only what the hub's cache holds is found, and nothing is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dery_cli.errors import DeryError, UsageError

FETCHED = ("run.json", "assembly.json", "model.safetensors")
"""All that loading a network needs."""


def check_repo(repo: str) -> str:
    """The name, if it is one.

    Raises:
        UsageError: It is not ``OWNER/REPO``.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"'{repo}' is no name on the hub: {error}", "OWNER/REPO") from error
    if "/" not in repo:
        raise UsageError(f"'{repo}' names no owner", f"OWNER/{repo}")
    return repo


def fetch(place: str) -> Path:
    """The folder of the hub's cache that holds a network, fetched where it is not there yet.

    Args:
        place: ``OWNER/REPO`` or ``OWNER/REPO@REVISION``.

    Raises:
        UsageError: The name is none.
        DeryError: It is neither to be had nor in the cache.
    """
    repo, _, revision = place.partition("@")
    check_repo(repo)
    with _in_words(f"cannot fetch {place}"):
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(FETCHED)
        )
    return Path(folder)


def send(
    folder: Path, repo: str, *, private: bool | None, revision: str | None, message: str
) -> str:
    """Upload a folder as a model; the repository is made where it is not there.

    Args:
        folder: Its files go to the repository's root.
        repo: ``OWNER/REPO``.
        private: Whether a new repository is private; None for the hub's default.
        revision: Branch to commit to, made where it is not there; None for ``main``.
        message: Of the commit.

    Returns:
        The commit's URL.

    Raises:
        UsageError: The name is none.
        DeryError: The hub is out of reach, or refuses.
    """
    check_repo(repo)
    if is_offline():
        raise DeryError(
            f"cannot push to {repo}: HF_HUB_OFFLINE is set",
            "unset it, or see what would be sent: --dry-run",
        )
    api = huggingface_hub.HfApi(library_name="dery-cli")
    with _in_words(f"cannot push to {repo}"):
        api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message
        )
    return str(commit.commit_url)


def is_offline() -> bool:
    """Whether the hub must not be asked."""
    return bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Whatever the hub's client raises, as one line."""
    try:
        yield
    except DeryError:
        raise
    except Exception as error:  # its own, its transport's, and the operating system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "HF_HUB_OFFLINE is set: only what is in the cache is found" if is_offline() else (
            "check the name, and that you are logged in: hf auth login"
        )  # fmt: skip
        raise DeryError(f"{what}: {reason}", hint) from error
