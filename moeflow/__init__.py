"""Runs Mixture-of-Experts language models that do not fit the GPU.

    import moeflow

    artifact = moeflow.pack("profiles/demo.yaml")
    with moeflow.load(artifact) as engine:
        print(engine.generate("In the beginning", max_new_tokens=50, seed=1))

Names are imported when they are used: `import moeflow` costs nothing, and imports neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeflow.engine import Engine
    from moeflow.errors import MoeflowError
    from moeflow.generation import Generation, Statistics
    from moeflow.pipeline import load, pack
    from moeflow.schema import HardwareProfile, Manifest, Plan, Profile

__all__ = [
    "Engine",
    "Generation",
    "HardwareProfile",
    "Manifest",
    "MoeflowError",
    "Plan",
    "Profile",
    "Statistics",
    "__version__",
    "load",
    "pack",
]

__version__ = "0.1.0"

_HOME = {
    "Engine": "moeflow.engine",
    "Generation": "moeflow.generation",
    "HardwareProfile": "moeflow.schema",
    "Manifest": "moeflow.schema",
    "MoeflowError": "moeflow.errors",
    "Plan": "moeflow.schema",
    "Profile": "moeflow.schema",
    "Statistics": "moeflow.generation",
    "load": "moeflow.pipeline",
    "pack": "moeflow.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moeflow' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
