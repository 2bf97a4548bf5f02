"""The stages, strung together: quantize -> pack -> offload-plan -> generate.

Each takes documents and returns or writes documents; each writes its record last (a note per shard, the
manifest, the plan), so that a stage which is run again does only what is missing. What needs torch is
imported when it is needed: planning and validating work without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow import choice
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.hub import resolve_model
from moeflow.artifact.outline import outline
from moeflow.artifact.reader import MANIFEST, PLAN, Artifact
from moeflow.errors import ArtifactError
from moeflow.files import storage_errors
from moeflow.planning.bits import Allotment
from moeflow.planning.blobs import SCHEMES
from moeflow.planning.forecast import Forecast, forecast
from moeflow.planning.overrides import override
from moeflow.planning.planner import make_plan
from moeflow.planning.search import Candidate, candidates, choose
from moeflow.planning.sizes import ModelSizes
from moeflow.planning.standin import stand_in
from moeflow.probe.machine import probe
from moeflow.probe.match import find_hardware
from moeflow.progress import Progress, silent
from moeflow.schema import BitChoice, HardwareProfile, Manifest, Plan, Profile, Scheme
from moeflow.schema.auto import TOKENS

if TYPE_CHECKING:
    from moeflow.engine import Engine

__all__ = [
    "allocate", "autotune", "dry_run", "load", "pack", "plan_offload", "read_profile", "resolve_hardware", "seen_from",
]  # fmt: skip

MIN_SPEED = 5.0
PROFILE = "profile.yaml"
HARDWARE = "hardware.yaml"
ROUTES = "routes.npz"
BITS = "bits.json"
NOTES = ".moeflow"

ProfileLike = str | Path | Mapping[str, Any] | Profile


def read_profile(profile: ProfileLike) -> Profile:
    """A profile from a path, a mapping, or itself; relative paths in a file are relative to that file."""
    if isinstance(profile, Profile):
        return profile
    if isinstance(profile, Mapping):
        return Profile.parse(dict(profile), "profile")
    read, here = Profile.load(profile), Path(profile).parent
    model = str(here / read.model) if read.model.startswith(".") else read.model
    quantization = read.quantization
    if auto := quantization.auto:
        paths = {key: str(here / path) for key in ("text", "trace") if (path := getattr(auto, key)) is not None}
        quantization = quantization.model_copy(update={"experts": auto.model_copy(update=paths)})
    is_path = read.hardware.endswith((".yaml", ".yml", ".json")) and not Path(read.hardware).is_absolute()
    read = _with_trace(read, lambda trace: str(here / trace))
    hardware = str(here / read.hardware) if is_path else read.hardware
    return read.model_copy(update={"model": model, "hardware": hardware, "quantization": quantization})


def _with_trace(profile: Profile, place: Callable[[str], str]) -> Profile:
    """The profile with the trace that it names, if it does, at `place` of its path."""
    if profile.cache.trace is None:
        return profile
    cache = profile.cache.model_copy(update={"trace": place(profile.cache.trace)})
    return profile.model_copy(update={"cache": cache})


def seen_from(directory: Path, profile: Profile) -> Profile:
    """The profile with paths as a file in `directory` has them: `read_profile` reads them so."""
    if profile.cache.trace is not None and not Path(profile.cache.trace).is_absolute():
        profile = _with_trace(profile, lambda trace: os.path.relpath(trace, directory))
    changes = {}
    if profile.model.startswith("."):
        changes["model"] = f"./{os.path.relpath(profile.model, directory)}"
    if profile.hardware.endswith((".yaml", ".yml", ".json")) and not Path(profile.hardware).is_absolute():
        changes["hardware"] = os.path.relpath(profile.hardware, directory)
    return profile.model_copy(update=changes)


def resolve_hardware(name: str) -> HardwareProfile:
    """`auto` probes this machine, beside a GPU with the CPU's kernels; else a name in `hardware/` or a path."""
    if name != "auto":
        return find_hardware(name)
    found = probe()
    if found.gpu is None:  # what is planned does not depend on them
        return found
    from moeflow.cpu_calibration import calibrated_cpu

    return calibrated_cpu(found)


def autotune(
    model: str,
    hardware: HardwareProfile,
    base: Profile | None = None,
    min_speed: float = MIN_SPEED,
    min_bits: int = 2,
) -> tuple[Candidate, list[Candidate]]:
    """Choose a profile for `model` on `hardware`; returns the choice and all candidates, best quality first.

    Args:
        model: as in a profile, or the name of a published architecture; its config is enough, no weights are read.
        hardware: the machine.
        base: what is fixed beside quantization: memory, context, policy.
        min_speed: tokens/s below which fewer bits are preferred.
        min_bits: the least that experts may have.

    Raises:
        CapacityError: nothing fits.
    """
    base = base or Profile(model=model)
    found = candidates(outline(model, base.revision).checkpoint, base, hardware, min_bits)
    return choose(found, min_speed), found


def allocate(
    model: str,
    budget: float,
    *,
    schemes: Sequence[Scheme] = (SCHEMES["2"], SCHEMES["3"], SCHEMES["4"]),
    text: str | Path | None = None,
    tokens: int = TOKENS,
    trace: str | Path | None = None,
    table: str | Path | None = None,
    by_layer: bool = False,
    progress: Progress = silent,
) -> Allotment:
    """Choose a scheme for every expert of a model, for the least measured error within a budget.

    Args:
        model: as in a profile; its weights are read, unless `table` has their errors.
        budget: bits a weight over all experts, with scales, zeros and padding.
        schemes: to choose from.
        text: a UTF-8 file; errors are of what experts add to its first tokens' hidden states, and not of weights.
        tokens: how many.
        trace: recorded routes of the model; errors of weights count by how often an expert is used.
        table: JSON of measured errors; what it lacks is measured and added.
        by_layer: all experts of a layer alike, so that the model can run device-driven.
        progress: told of bytes as they are quantized.

    Raises:
        UsageError: the budget is below the smallest scheme or above the largest, or text and trace are both given.
        DocumentError: trace or table are of another model, or no scheme fits its dimensions.
    """
    text, trace, table = (Path(path) if path is not None else None for path in (text, trace, table))
    request = choice.Request(budget, tuple(schemes), by_layer, text, trace, tokens)
    return choice.choose(Checkpoint.open(resolve_model(model)), model, request, table, progress)[0]


def pack(
    profile: ProfileLike,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    hardware: HardwareProfile | None = None,
    progress: Progress = silent,
) -> Path:
    """Quantize and pack the profile's model, and plan for its hardware.

    Args:
        profile: a path, a mapping or a document.
        output: the artifact's directory; by default `artifacts/` and the name of the profile's file, or of its model.
        overwrite: replace an artifact that was made from another model or other settings, and mend a damaged one.
        hardware: plan for this machine instead of the profile's.
        progress: told of bytes as they are written.

    Returns:
        The artifact's directory. Packing again what is packed already does nothing. With `bits: auto` the profile there
        has the schemes that were chosen, and `bits.json` says why.
    """
    wanted = read_profile(profile)
    directory = Path(output) if output is not None else _default_output(profile, wanted)
    checkpoint = Checkpoint.open(resolve_model(wanted.model, wanted.revision))
    hardware = hardware or resolve_hardware(wanted.hardware)
    likely = stand_in(checkpoint, wanted)
    make_plan(
        likely, ModelSizes.of_checkpoint(checkpoint, likely.quantization), hardware
    )  # refused before hours of work
    wanted, made = _chosen(checkpoint, wanted, directory, overwrite, progress)

    from moeflow.artifact.packer import Packer

    packer = Packer(checkpoint, wanted.model, wanted.quantization, directory, progress)
    if packer.foreign() and not overwrite:
        raise _foreign(directory)
    packer.run(check=overwrite)
    _keep_trace(wanted, directory).save(directory / PROFILE)
    hardware.save(directory / HARDWARE)
    if made is not None:
        made.save(directory / BITS)
    else:
        (directory / BITS).unlink(missing_ok=True)  # of what was packed here before
    plan_offload(directory, hardware=hardware)
    return directory


def _keep_trace(profile: Profile, directory: Path) -> Profile:
    """The profile with its trace copied beside it: an artifact may go elsewhere, and be planned anew there."""
    trace = profile.cache.trace
    if trace is not None and Path(trace).resolve() != (directory / ROUTES).resolve():
        with storage_errors(directory / ROUTES, "write"):
            shutil.copyfile(trace, directory / ROUTES)
    return _with_trace(profile, lambda _: ROUTES)


def _chosen(
    checkpoint: Checkpoint, wanted: Profile, directory: Path, overwrite: bool, progress: Progress
) -> tuple[Profile, BitChoice | None]:
    """The profile with schemes in place of `bits: auto`, and why; a place of another artifact is refused first."""
    asked = wanted.quantization.auto
    if asked is None:
        return wanted, None
    if (directory / MANIFEST).is_file() and not overwrite:
        known = BitChoice.load(directory / BITS) if (directory / BITS).is_file() else None
        same = known.asked == choice.without_paths(asked) if known else (directory / NOTES).is_dir()
        if not same or Manifest.load(directory / MANIFEST).model.source_digest != checkpoint.digest():
            raise _foreign(directory)
    found, table = choice.measured_for(checkpoint, wanted.model, choice.of_profile(asked), directory / NOTES, progress)
    chosen = wanted.model_copy(update={"quantization": found.applied_to(wanted.quantization)})
    return chosen, choice.record(asked, found, table)


def _foreign(directory: Path) -> ArtifactError:
    return ArtifactError(
        f"{directory}: holds an artifact made from another model or other settings; choose another output, "
        "or overwrite it (`--overwrite`)"
    )


def dry_run(
    profile: ProfileLike, output: str | Path | None = None, hardware: HardwareProfile | None = None
) -> Forecast:
    """What `pack` would make of a profile, and take: nothing is written, and no weights are read or downloaded."""
    wanted = read_profile(profile)
    directory = Path(output) if output is not None else _default_output(profile, wanted)
    known = outline(wanted.model, wanted.revision)
    hardware = hardware or resolve_hardware(wanted.hardware)
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
    with storage_errors(place, "measure"):
        free = shutil.disk_usage(place).free
    return forecast(stand_in(known.checkpoint, wanted), known, hardware, str(directory), free, wanted.quantization.auto)


def _default_output(given: ProfileLike, profile: Profile) -> Path:
    model = Path(profile.model)
    name = Path(given).stem if isinstance(given, str | Path) else (model.resolve() if model.is_dir() else model).name
    return Path("artifacts") / name


def plan_offload(
    artifact: str | Path,
    overrides: Mapping[str, Any] | None = None,
    hardware: HardwareProfile | None = None,
    save: bool = True,
) -> Plan:
    """Plan how to run a packed model; writes `plan.json`.

    Args:
        artifact: its directory.
        overrides: changes to its profile, as in `load`.
        hardware: the machine; by default the one that is overridden, or that it was packed for.
        save: replace the artifact's plan.
    """
    opened = Artifact.open(artifact)
    changes = {name: value for name, value in (overrides or {}).items() if value is not None}
    profile = override(_profile_of(opened), changes)
    if hardware is None:
        hardware = resolve_hardware(profile.hardware) if "hardware" in changes else _hardware_of(opened, profile)
    plan = make_plan(profile, ModelSizes.of_manifest(opened.manifest), hardware, opened.manifest.digest())
    if save:
        plan.save(opened.directory / PLAN)
    return plan


def _hardware_of(artifact: Artifact, profile: Profile) -> HardwareProfile:
    """The machine that the artifact was packed for; if that was probed and is another kind than this one, this one."""
    path = artifact.directory / HARDWARE
    if not path.is_file():
        return resolve_hardware(profile.hardware)
    packed_for = HardwareProfile.load(path)
    if profile.hardware == "auto" and not _has_device(packed_for.device):
        return resolve_hardware("auto")
    return packed_for


def _profile_of(artifact: Artifact) -> Profile:
    path = artifact.directory / PROFILE
    if path.is_file():
        return _with_trace(Profile.load(path), lambda trace: str(artifact.directory / trace))
    return Profile(model=artifact.manifest.model.source, quantization=artifact.manifest.quantization)


def load(artifact: str | Path, *, progress: Progress = silent, record_routes: bool = False, **overrides: Any) -> Engine:
    """Load a packed model.

    Without overrides the artifact's own plan is followed; where it has none, or was planned for a probed machine
    with another kind of device, or something is overridden, a new plan is made and not saved.

    Args:
        artifact: directory that `pack` returned.
        progress: told of bytes as they are loaded.
        record_routes: let `moeflow.recording` write which experts tokens use.
        **overrides: of the profile: hardware, experts_per_layer, policy, half_life, cache_trace, predictor,
            prefetch_depth, prefetch_experts, vram, ram, disk, context_length, dtype, strategy, execution, cpu_experts,
            cpu_threads, cpu_activations.
    """
    opened = Artifact.open(artifact)
    plan = _plan_for(opened, overrides)

    from moeflow.engine import Engine

    return Engine(opened, plan, progress, record_routes=record_routes)


def _plan_for(artifact: Artifact, overrides: Mapping[str, Any]) -> Plan:
    path = artifact.directory / PLAN
    if path.is_file() and all(value is None for value in overrides.values()):
        plan = Plan.load(path)
        usable = _profile_of(artifact).hardware != "auto" or _has_device(plan.device)
        if usable and plan.manifest_digest == artifact.manifest.digest():
            return plan
    return plan_offload(artifact.directory, overrides, save=False)


def _has_device(device: str) -> bool:
    import torch

    return (device == "cuda") == torch.cuda.is_available()
