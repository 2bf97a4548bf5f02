"""Finding hardware profiles: by name among those that ship, by path, or by what a probe saw.

A GPU is the same if its name is, apart from what makers and drivers add or leave out between versions
("NVIDIA GeForce RTX 3060", "GeForce RTX 3060"), and its memory nearly is: drivers report less than the label
says. With the same name and another memory it is a variant. Machines without a GPU have nothing to be known by.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moeflow.errors import DocumentError, unknown
from moeflow.files import data_dir
from moeflow.probe.nearest import Finding, Sought, nearest
from moeflow.schema import HardwareProfile

__all__ = ["match", "known_hardware", "find_hardware"]


def match(probed: HardwareProfile, known: Iterable[HardwareProfile]) -> Finding | None:
    """The profile of `known` with the same GPU, or else a variant of it, and what differs; the nearest in memory."""
    if probed.gpu is None:
        return None
    found = nearest(Sought.of(probed), known)
    return found[0] if found and found[0].kind != "nearest" else None


def known_hardware() -> dict[str, HardwareProfile]:
    """All profiles that ship with moeflow, by name.

    Raises:
        DocumentError: one of the files breaks a rule.
    """
    return {path.stem: HardwareProfile.load(path) for path in _files()}


def find_hardware(name_or_path: str) -> HardwareProfile:
    """The profile called `name_or_path` in hardware/, or else the YAML or JSON file at that path.

    Raises:
        DocumentError: no such name, or the file breaks a rule.
        StorageError: the path cannot be read.
    """
    shipped = {path.stem: path for path in _files()}
    if name_or_path in shipped:
        return HardwareProfile.load(shipped[name_or_path])
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        return HardwareProfile.load(path)
    raise DocumentError(f"{unknown('hardware', name_or_path, shipped)}; or give the path of a YAML file")


def _files() -> list[Path]:
    return sorted(data_dir("hardware").glob("*.yaml"))
