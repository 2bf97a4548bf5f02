"""Packings of one tiny model, shared and not to be changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import moeflow

MACHINE = "cpu-2-cores"
NONE: dict[str, object] = {"backend": "none"}
TWO_BITS: dict[str, object] = {"backend": "hqq", "bits": 2, "group_size": 64}


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pack(checkpoint, experts, attention)`; equal calls share a directory."""
    made: dict[str, Path] = {}

    def make(checkpoint: Path, experts: dict[str, object] = NONE, attention: dict[str, object] = NONE) -> Path:
        quantization = {"experts": experts, "attention": attention}
        key = f"{checkpoint} {quantization}"
        if key not in made:
            profile = {"model": str(checkpoint), "quantization": quantization, "hardware": MACHINE}
            made[key] = moeflow.pack(profile, tmp_path_factory.mktemp("packed") / "a")
        return made[key]

    return make


@pytest.fixture(scope="session")
def plain(pack: Callable[..., Path], tiny_checkpoint: Path) -> Path:
    """Unquantized."""
    return pack(tiny_checkpoint)


@pytest.fixture(scope="session")
def quantized(pack: Callable[..., Path], tiny_checkpoint: Path) -> Path:
    """Experts of 2 bits."""
    return pack(tiny_checkpoint, TWO_BITS)
