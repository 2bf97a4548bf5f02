"""A checkpoint of each family, packed once per quantization, and transformers' own model of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_engine import CPU

import moeflow

Packed = Callable[[Path, dict[str, object]], Path]


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Packs a checkpoint for a CPU, once per quantization."""
    hardware = tmp_path_factory.mktemp("hardware") / "test-cpu.yaml"
    moeflow.HardwareProfile.parse(CPU, "test").save(hardware)
    made: dict[str, Path] = {}

    def pack(checkpoint: Path, quantization: dict[str, object]) -> Path:
        key = f"{checkpoint} {quantization}"
        if key not in made:
            profile = {"model": str(checkpoint), "quantization": quantization, "hardware": str(hardware)}
            made[key] = moeflow.pack(profile, tmp_path_factory.mktemp("artifact") / "a")
        return made[key]

    return pack


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Any]:
    """transformers' float32 model of a checkpoint, loaded once."""
    from oracle import checkpoint_model

    made: dict[Path, Any] = {}

    def load(checkpoint: Path) -> Any:
        if checkpoint not in made:
            made[checkpoint] = checkpoint_model(checkpoint)
        return made[checkpoint]

    return load
