"""Every error that moeflow raises on purpose, with the exit code that the command line ends with.

    MoeflowError                 1
    ├── UsageError               2   the command or call does not make sense as given
    ├── DocumentError            3   a YAML or JSON document is wrong: file, place, rule
    ├── CheckpointError          4   a model is missing, of an unknown type, or lacks tensors
    ├── ArtifactError            5   a packed model is incomplete, damaged or of a newer format
    ├── CapacityError            6   more memory or disk is asked for than there is
    ├── StorageError             7   the operating system refused to read or write a file
    └── DeviceError              8   the accelerator is missing or cannot do what is asked

130 is an interruption by the user (Ctrl-C). A message says what is wrong, where, and the remedy. What is
not in this tree is a bug and shows its traceback.
"""

from __future__ import annotations

__all__ = [
    "MoeflowError",
    "UsageError",
    "DocumentError",
    "CheckpointError",
    "ArtifactError",
    "CapacityError",
    "StorageError",
    "DeviceError",
    "unknown",
]


class MoeflowError(Exception):
    """Base of all deliberate errors."""

    exit_code = 1


class UsageError(MoeflowError):
    """The command or call does not make sense as given."""

    exit_code = 2


class DocumentError(MoeflowError):
    """A profile, hardware file, plan or manifest breaks a rule; the message names file and place."""

    exit_code = 3


class CheckpointError(MoeflowError):
    """A model cannot be found, is of an unknown type, or its files are incomplete."""

    exit_code = 4


class ArtifactError(MoeflowError):
    """A packed model is incomplete, damaged, or written by a newer moeflow."""

    exit_code = 5


class CapacityError(MoeflowError):
    """The machine has less memory, less disk or fewer cores than what is asked for."""

    exit_code = 6


class StorageError(MoeflowError):
    """The operating system refused to read or write; nothing half-written is left under its final name."""

    exit_code = 7


class DeviceError(MoeflowError):
    """The accelerator is missing or cannot do what is asked."""

    exit_code = 8


def unknown(what: str, name: str, known: object) -> str:
    """The message for a name that is not registered: it lists those that are."""
    names = ", ".join(sorted(str(k) for k in known))  # type: ignore[attr-defined]
    return f"unknown {what} {name!r}; known: {names}"
