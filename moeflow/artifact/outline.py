"""A checkpoint's names and shapes from the least that is there: for sizes before anything is downloaded.

Headers where the weights lie on this disk. Where only a config does, names and shapes follow from it, without torch
for the families that `moeflow.artifact.structures` lists; for others transformers builds the model on the meta device,
which takes some seconds. The published configs that ship with moeflow come before the hub's cache, which takes the
hub's client to look into; last the hub is asked for the config alone. No weights are downloaded or read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeflow.artifact.architectures import ARCHITECTURES, PUBLISHED, architecture
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.hub import resolve_config, resolve_model
from moeflow.artifact.shapes import config_checkpoint
from moeflow.files import read_document

__all__ = ["Outline", "outline"]

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Outline:
    """What is known of a model before it is packed."""

    checkpoint: Checkpoint
    origin: str
    """Where shapes come from."""
    nbytes: int
    """Of the checkpoint's tensors as they are stored."""


def outline(model: str, revision: str | None = None) -> Outline:
    """Names and shapes of a model.

    Args:
        model: as a profile names it; or the name of an architecture that ships with moeflow, or a config's file.
        revision: of a hub id.

    Raises:
        CheckpointError: nothing is known of it here, and the hub cannot be reached; or its config lacks a number.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return _of_config(path)
    name = PUBLISHED.get(model, model)
    if name in ARCHITECTURES and revision is None and not path.is_dir():
        checkpoint = config_checkpoint(architecture(name), model)
        return Outline(checkpoint, "the config that ships with moeflow", _nbytes(checkpoint))
    is_hub_id = model.count("/") == 1 and not model.startswith((".", "~", "/")) and not path.is_dir()
    directory = _cached(model, revision) if is_hub_id else resolve_model(model)
    if directory is not None and _has_weights(directory):
        checkpoint = Checkpoint.open(directory)
        return Outline(checkpoint, f"tensor headers in {directory}", _nbytes(checkpoint))
    return _of_config((directory or resolve_config(model, revision)) / "config.json")


def _of_config(file: Path) -> Outline:
    directory = file.parent
    is_release = file.name == "config.json"  # else what lies beside it may be of another model
    checkpoint = config_checkpoint(architecture(str(file)), str(directory if is_release else file))
    total = (_index(directory).get("metadata") or {}).get("total_size") if is_release else None
    return Outline(
        checkpoint,
        f"{file}, no weights read",
        int(total) if isinstance(total, int | float) else _nbytes(checkpoint),
    )


def _nbytes(checkpoint: Checkpoint) -> int:
    return sum(info.nbytes for info in checkpoint.headers.values())


def _index(directory: Path) -> dict[str, Any]:
    found = read_document(directory / INDEX) if (directory / INDEX).is_file() else {}
    return found if isinstance(found, dict) else {}


def _has_weights(directory: Path) -> bool:
    """Whether all weight files are there, or what is wrong is to be said by whoever opens them."""
    if not (directory / "config.json").is_file():
        return True
    named = _index(directory).get("weight_map")
    if isinstance(named, dict):
        return all((directory / str(file)).is_file() for file in set(named.values()))
    return any(directory.glob("*.safetensors"))


def _cached(model: str, revision: str | None) -> Path | None:
    """The hub cache's directory of a model, if it has at least the config."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
    return directory if (directory / "config.json").is_file() else None
