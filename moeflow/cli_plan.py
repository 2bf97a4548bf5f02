"""`moeflow autotune` and `moeflow plan`: choices for a model on a machine, before or after it is packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeflow.cli_load import Cpu, Threads
from moeflow.errors import UsageError

if TYPE_CHECKING:
    from moeflow.planning.search import Candidate
    from moeflow.schema import HardwareProfile, Profile

__all__ = ["autotune", "plan"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Vram = Annotated[str, typer.Option(help="Device memory that may be used, such as 10GiB.")]
Ram = Annotated[str, typer.Option(help="Host memory for experts.")]
Disk = Annotated[str, typer.Option(help="Disk for experts that do not fit there; 0 forbids it.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer together.")]
MinSpeed = Annotated[float, typer.Option(min=0.0, help="Tokens/s below which fewer bits are preferred.")]
MinBits = Annotated[int, typer.Option(min=2, max=8, help="The least bits that experts may have.")]


def autotune(
    model: Annotated[
        str, typer.Argument(help="Hub id, checkpoint directory, config.json, published architecture, or demo.")
    ] = "demo",
    output: Annotated[Path, typer.Option("--output", "-o", help="Profile to write.")] = Path("profile.yaml"),
    hardware: Annotated[str, typer.Option(help="A name in hardware/, a path, or auto (probe).")] = "auto",
    vram: Vram = "auto",
    ram: Ram = "auto",
    disk: Disk = "auto",
    context_length: Context = 4096,
    min_speed: MinSpeed = 5.0,
    min_bits: MinBits = 2,
    as_json: Json = False,
) -> None:
    """Choose bits, cache, guesses and tiers for a model on a machine, and write a profile that `pack` takes.

    The model's config is enough: nothing is downloaded but a few KB. The reason of each choice stands in the profile.
    """
    from moeflow import pipeline
    from moeflow.artifact.architectures import ARCHITECTURES
    from moeflow.console import say
    from moeflow.console_hardware import show_hardware
    from moeflow.files import write_text
    from moeflow.planning.reasons import annotated, reasons

    machine = pipeline.resolve_hardware(hardware)
    base = _base(model, hardware, {"vram": vram, "ram": ram, "disk": disk}, context_length)
    chosen, found = pipeline.autotune(model, machine, base, min_speed, min_bits)
    why = reasons(chosen, found, machine, min_speed)
    write_text(output, annotated(pipeline.seen_from(output.parent, chosen.profile), why))
    if as_json:
        return typer.echo(json.dumps(_document(chosen, found, why)))
    show_hardware(machine)
    _show(chosen, found)
    bare = model in ARCHITECTURES or Path(model).is_file()
    first = "set its model to a hub id or a directory with weights, then " if bare else ""
    say(f"wrote {output}, with the reason of each choice; next: {first}moeflow pack {output}")
    return None


def plan(
    artifact: Annotated[
        Path | None, typer.Argument(help="Directory that `moeflow pack` wrote.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Plan for a model that is not packed: as `autotune` would, writing nothing.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Plan for this machine: a name in hardware/, a path, or auto (probe).")
    ] = None,
    k: Annotated[int | None, typer.Option("--experts-per-layer", "-k", min=0, help="Cached experts per layer.")] = None,
    policy: Annotated[
        Literal["lru", "lfu", "mix", "static", "learned"] | None, typer.Option(help="Cache policy.")
    ] = None,
    ablation: Annotated[
        Literal["full", "no-prefetch", "no-cache", "naive"] | None,
        typer.Option("--ablation", help="Row of the paper's ablation."),
    ] = None,
    cpu: Cpu = None,
    threads: Threads = None,
    vram: Vram = "auto",
    ram: Ram = "auto",
    disk: Disk = "auto",
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer together.", show_default=False)
    ] = None,
    min_speed: MinSpeed = 5.0,
    min_bits: MinBits = 2,
    save: Annotated[bool, typer.Option(help="Replace the artifact's plan.json.")] = False,
    as_json: Json = False,
) -> None:
    """Show how a model would run: memory by use, cache, tiers, predicted speed with its range.

    With --model and --hardware it answers before anything is downloaded, for machines that you do not have too.
    """
    from moeflow import pipeline
    from moeflow.console import out, show_plan

    if (artifact is None) == (model is None):
        raise UsageError("give an artifact, or --model with the name of one that is not packed")
    changes: dict[str, Any] = {"experts_per_layer": k, "policy": policy, "strategy": ablation}
    changes |= {"cpu_experts": cpu, "cpu_threads": threads}
    limits = {"vram": vram, "ram": ram, "disk": disk}
    if artifact is not None:
        changes |= {"hardware": hardware, "context_length": context_length}
        changes |= {name: value for name, value in limits.items() if value != "auto"}
        made = pipeline.plan_offload(artifact, changes, save=save)
        return typer.echo(made.to_json(), nl=False) if as_json else show_plan(made, to=out)
    if save:
        raise UsageError("--save replaces an artifact's plan; --model has none: moeflow autotune writes a profile")
    assert model is not None
    machine = pipeline.resolve_hardware(hardware or "auto")
    base = _base(model, hardware or "auto", limits, context_length or 4096, changes)
    chosen, found = pipeline.autotune(model, machine, base, min_speed, min_bits)
    if as_json:
        from moeflow.planning.reasons import reasons

        return typer.echo(json.dumps(_document(chosen, found, reasons(chosen, found, machine, min_speed))))
    return _show(chosen, found, machine)


def _base(
    model: str, hardware: str, limits: dict[str, str], context: int, changes: dict[str, Any] | None = None
) -> Profile:
    """What the command line fixes."""
    from moeflow.planning.overrides import override
    from moeflow.schema import Profile

    whole = {"model": model, "hardware": hardware, "memory": limits, "context_length": context}
    profile = Profile.parse(whole, "options")
    return override(profile, {name: value for name, value in (changes or {}).items() if value is not None})


def _show(chosen: Candidate, found: list[Candidate], machine: HardwareProfile | None = None) -> None:
    from moeflow.console import out, show_candidates, show_plan

    assert chosen.plan is not None, "what is chosen fits"
    if machine is not None:
        out.print(f"{machine.name}: {machine.description}", markup=False, highlight=False, soft_wrap=True)
    show_candidates(chosen, found, to=out)
    show_plan(chosen.plan, to=out)


def _document(chosen: Candidate, found: list[Candidate], why: dict[str, str]) -> dict[str, Any]:
    return {
        "profile": chosen.profile.to_dict(),
        "plan": chosen.plan.to_dict() if chosen.plan else None,
        "reasons": why,
        "candidates": [
            {
                "quantization": c.profile.quantization.model_dump(mode="json"),
                "prediction": c.plan.prediction.model_dump(mode="json") if c.plan and c.plan.prediction else None,
                "cache_slots": c.plan.cache_slots if c.plan else None,
                "disk_nbytes": c.plan.disk_nbytes if c.plan else None,
                "refusal": c.refusal,
            }
            for c in found
        ],
    }
