"""Finds the model that a profile names: `demo`, a directory, or a repository of the Hugging Face hub.

huggingface_hub downloads, keeps the cache, and reads the user's token; what it raises is told with the remedy. The
commit of a snapshot is part of its path in the cache, so a directory there needs no network to say its revision.
"""

from __future__ import annotations

import re
from pathlib import Path

from moeflow.errors import CheckpointError, StorageError

__all__ = ["resolve_config", "resolve_model", "snapshot_revision"]

DEMO = "demo"
WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*", "README.md"]
SHAPES = ["config.json", "model.safetensors.index.json"]
UNWANTED = ["*/*", "consolidated*"]  # the same weights again, as the authors' own code reads them
ELSEWHERE = "download it where there is a network, and name the directory"


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The directory of a checkpoint: `demo`, a local directory, or a hub id, which is downloaded into the hub cache.

    With HF_HUB_OFFLINE=1 only the cache is looked at.

    Raises:
        CheckpointError: there is no such model or revision, it is not open to this user, or the hub cannot be reached.
        StorageError: the cache cannot be written.
    """
    if model == DEMO:
        return Path(__file__).parent.parent / "demo"
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(
            f"{model}: no such directory; a model is a directory, a hub id such as "
            "mistralai/Mixtral-8x7B-Instruct-v0.1, or 'demo'"
        )
    return _download(model, revision, WANTED)


def resolve_config(model: str, revision: str | None = None) -> Path:
    """The directory of a hub id's config in the hub cache; its weights stay where they are.

    Raises:
        CheckpointError: as `resolve_model`.
        StorageError: the cache cannot be written.
    """
    return _download(model, revision, SHAPES)


def _download(model: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    offline = bool(constants.HF_HUB_OFFLINE)
    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED, local_files_only=offline
        )
        return Path(found)
    except Exception as error:  # the network's own exceptions are those of whichever library the hub's client uses
        raise _explained(error, model, revision, offline) from error


def _explained(error: Exception, model: str, revision: str | None, offline: bool) -> CheckpointError | StorageError:
    """What happened and what helps."""
    from huggingface_hub import constants, errors

    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set: unset it" if offline else "the hub cannot be reached"
        at = f"{model}@{revision}" if revision else model
        return CheckpointError(
            f"{at}: neither a local directory nor complete in the hub cache ({constants.HF_HUB_CACHE}), and {why}"
            f"{', or' if offline else ';'} {ELSEWHERE}"
        )
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{model}"
        return CheckpointError(
            f"{model}: gated: accept its terms at {page}, then log in (`hf auth login`) or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{model}: has no revision {revision!r}; name a branch, a tag or a commit of it")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{model}: neither a local directory nor a model on the hub that this user may see; "
            "for a private one log in (`hf auth login`) or set HF_TOKEN"
        )
    if isinstance(error, errors.HfHubHTTPError | ValueError):
        return CheckpointError(f"{model}: the hub refuses it: {reason}")
    if isinstance(error, OSError) and error.errno and error.filename:
        return StorageError(f"{error.filename}: cannot download {model}: {error.strerror}")
    return CheckpointError(
        f"{model}: the download broke off ({type(error).__name__}: {reason}); run it again: it goes on where it was"
    )


def snapshot_revision(directory: Path) -> str | None:
    """The commit that a directory of the hub cache holds; None for any other directory."""
    place = directory.absolute()
    is_commit = re.fullmatch(r"[0-9a-f]{40}", place.name) is not None
    return place.name if is_commit and place.parent.name == "snapshots" else None
