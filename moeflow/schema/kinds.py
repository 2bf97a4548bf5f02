"""Tells which kind of document a file holds, by the keys that only this kind has."""

from __future__ import annotations

from pathlib import Path

from moeflow.errors import DocumentError
from moeflow.files import read_document
from moeflow.schema.base import Document
from moeflow.schema.benchmark import Benchmark
from moeflow.schema.choice import BitChoice
from moeflow.schema.evaluation import Evaluation, TaskEvaluation
from moeflow.schema.hardware import HardwareProfile
from moeflow.schema.manifest import Manifest
from moeflow.schema.plan import Plan
from moeflow.schema.predictor import PredictorCard
from moeflow.schema.profile import Profile
from moeflow.schema.sensitivity import Sensitivity
from moeflow.schema.simulation import Simulation

__all__ = ["KINDS", "load_any"]

KINDS: tuple[type[Document], ...] = (
    Profile, HardwareProfile, Plan, Manifest, Benchmark, Simulation, Sensitivity, Evaluation,
    TaskEvaluation, PredictorCard, BitChoice,
)  # fmt: skip


def load_any(path: Path) -> Document:
    """Read and validate a document of any kind: the kind that shares most keys with it is meant."""
    data = read_document(path)
    if not isinstance(data, dict):
        raise DocumentError(f"{path}: a document is a mapping of keys, this is {type(data).__name__}")
    shared = {kind: len((kind.model_fields.keys() & data.keys()) - {"format_version"}) for kind in KINDS}
    kind = max(KINDS, key=shared.__getitem__)
    if 4 * shared[kind] < len(data):  # a file of some other program, not a document with a few wrong keys
        names = ", ".join(k.kind for k in KINDS)
        raise DocumentError(f"{path}: has few or no keys of any document of moeflow ({names})")
    return kind.parse(data, str(path))
