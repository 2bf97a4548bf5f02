"""`moeflow explain`: where each byte and each millisecond of a plan goes, as tables or JSON.

A plan alone says where they go. What would help takes the model's sizes and the machine as well: of an artifact they
lie beside its plan, of a profile they are found as for `pack --dry-run`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeflow.errors import ArtifactError, DocumentError

if TYPE_CHECKING:
    from moeflow.planning.explanation import Explanation
    from moeflow.schema import HardwareProfile, Plan, Profile

__all__ = ["explain"]


def explain(
    plan: Annotated[Path, typer.Argument(help="Artifact, plan.json or profile.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Say where each byte and each millisecond of a plan goes, what bounds its speed, and what would help most."""
    from moeflow.console_explain import sentence, show_explanation

    found = _explained(plan)
    if as_json:
        said = sentence(found) if found.plan.prediction else ""
        return typer.echo(json.dumps({**found.to_dict(), "sentence": said}, ensure_ascii=False))
    return show_explanation(found)


def _explained(path: Path) -> Explanation:
    from moeflow.planning.explanation import explain as take_apart
    from moeflow.schema import Plan, Profile
    from moeflow.schema.kinds import load_any

    if path.is_dir():
        return _of_artifact(path)
    document = load_any(path)
    if isinstance(document, Profile):
        return _of_profile(path)
    if isinstance(document, Plan):
        return take_apart(document)
    raise DocumentError(f"{path}: a {document.kind}; give an artifact, a plan or a profile")


def _of_artifact(directory: Path) -> Explanation:
    from moeflow.artifact.reader import PLAN, Artifact
    from moeflow.planning.explanation import explain as take_apart
    from moeflow.planning.sizes import ModelSizes
    from moeflow.schema import Plan

    artifact, path = Artifact.open(directory), directory / PLAN
    remedy = f"make it with `moeflow plan {directory} --save`"
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; {remedy}")
    plan = Plan.load(path)
    if plan.manifest_digest not in ("", artifact.manifest.digest()):
        raise ArtifactError(f"{path}: made for another packing of the model; {remedy}")
    return take_apart(plan, ModelSizes.of_manifest(artifact.manifest), _machine(directory, plan))


def _machine(directory: Path, plan: Plan) -> HardwareProfile | None:
    """That a plan was made for: the artifact's own, or one that ships with moeflow."""
    from moeflow.pipeline import HARDWARE
    from moeflow.probe.match import known_hardware
    from moeflow.schema import HardwareProfile

    own = directory / HARDWARE
    found = HardwareProfile.load(own) if own.is_file() else None
    return found if found and found.name == plan.hardware else known_hardware().get(plan.hardware)


def _of_profile(path: Path) -> Explanation:
    """Of a plan that is made on the fly, from a config or headers."""
    from moeflow.artifact.outline import outline
    from moeflow.console import say
    from moeflow.pipeline import read_profile, resolve_hardware
    from moeflow.planning.explanation import explain as take_apart
    from moeflow.planning.planner import make_plan
    from moeflow.planning.sizes import ModelSizes
    from moeflow.planning.standin import NOTE, stand_in

    asked: Profile = read_profile(path)
    checkpoint = outline(asked.model, asked.revision).checkpoint
    profile = stand_in(checkpoint, asked)
    sizes = ModelSizes.of_checkpoint(checkpoint, profile.quantization)
    if auto := asked.quantization.auto:
        say(f"experts are {NOTE.format(units=auto.units, budget=auto.budget)}")
    hardware = resolve_hardware(profile.hardware)
    return take_apart(make_plan(profile, sizes, hardware), sizes, hardware)
