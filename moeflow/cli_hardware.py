"""`moeflow hardware`: the machines in hardware/, the one nearest to a GPU, and checks of files before they are shared.

Nothing is measured here, which takes seconds and torch; `moeflow probe` does that. Faults in files are one line each.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeflow.errors import DocumentError, MoeflowError, StorageError, UsageError, unknown

if TYPE_CHECKING:
    from moeflow.probe.nearest import Sought

__all__ = ["hardware", "list_machines", "match_machine", "show_machine", "validate_files"]

hardware = typer.Typer(
    help="Machines in hardware/: list them, show one with its sources, find the nearest, check files.",
    epilog="Exit codes: 0 done, 2 usage, 3 a file is wrong or nothing is called or resembles that, 7 a file cannot be "
    "read, 8 the driver does not answer.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
NEAREST = 3  # findings shown; those behind them resemble the GPU too little to plan with


@hardware.command("list")
def list_machines(as_json: Json = False) -> None:
    """List the machines that ship with moeflow."""
    from moeflow.console import out
    from moeflow.console_hardware import show_machines
    from moeflow.probe.match import known_hardware

    known = known_hardware()
    if as_json:
        return typer.echo(json.dumps([profile.to_dict() for profile in known.values()]))
    return show_machines(known.values(), to=out)


@hardware.command("show")
def show_machine(
    name: Annotated[str, typer.Argument(help="A name in hardware/, or the path of a file.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show a machine, and where each of its values comes from."""
    from moeflow.console import out
    from moeflow.console_hardware import show_sources
    from moeflow.probe.match import find_hardware

    profile = find_hardware(name)
    return typer.echo(profile.to_json(), nl=False) if as_json else show_sources(profile, to=out)


@hardware.command("match")
def match_machine(
    name: Annotated[str | None, typer.Option(help="A GPU as its driver names it; default: this machine.")] = None,
    memory: Annotated[str | None, typer.Option(help="The GPU's memory, such as 8GiB; needs --name.")] = None,
    compute_capability: Annotated[str | None, typer.Option(help="Such as 8.9; needs --name.")] = None,
    file: Annotated[Path | None, typer.Option(help="A hardware profile that `moeflow probe --save` wrote.")] = None,
    as_json: Json = False,
) -> None:
    """Find the machines in hardware/ nearest to this one, to a GPU or to a file, and say what differs."""
    from moeflow.console import out
    from moeflow.console_hardware import show_findings
    from moeflow.probe.match import known_hardware
    from moeflow.probe.nearest import nearest

    known = known_hardware()
    sought, title = _sought(name, memory, compute_capability, file)
    found = nearest(sought, known.values())[:NEAREST]
    if not found:
        raise DocumentError(
            f"{unknown('GPU', name or title, known)}; give its --memory and --compute-capability to find the nearest "
            "by these"
        )
    if as_json:
        return typer.echo(json.dumps({"sought": sought.to_dict(), "found": [f.to_dict() for f in found]}))
    return show_findings(title, found, to=out)


def _sought(name: str | None, memory: str | None, capability: str | None, file: Path | None) -> tuple[Sought, str]:
    """What is looked for, and a title for it."""
    from moeflow.probe.devices import find_cpu, find_memory
    from moeflow.probe.nearest import Sought
    from moeflow.probe.nvml import find_gpu
    from moeflow.schema import HardwareProfile

    if name is None and (memory or capability):
        raise UsageError("--memory and --compute-capability describe the GPU of --name; give that too")
    if name is not None and file is not None:
        raise UsageError("--name and --file are two machines; give one of them")
    if name is not None:
        if capability and not re.fullmatch(r"\d+\.\d+", capability):
            raise UsageError(f"--compute-capability is {capability}; expected one such as 8.9")
        return Sought.named(name, _size(memory), capability), name
    if file is not None:
        profile = HardwareProfile.load(file)
        return Sought.of(profile), profile.name
    gpu, cpu, ram = find_gpu(), find_cpu(), find_memory()
    host = Sought(cores=cpu.cores, ram=ram)
    if gpu is None:
        return host, "this machine, no GPU"
    found = replace(host, name=gpu.name, compute_capability=gpu.compute_capability, memory=gpu.memory)
    return found, f"this machine, {gpu.name}"


def _size(memory: str | None) -> int | None:
    from pydantic import TypeAdapter, ValidationError

    from moeflow.schema.units import Size

    try:
        return None if memory is None else int(TypeAdapter(Size).validate_python(memory))
    except ValidationError as error:
        raise UsageError(f"--memory is {memory}; expected a size such as 11GiB or 512 MiB") from error


@hardware.command("validate")
def validate_files(
    files: Annotated[list[Path], typer.Argument(help="Hardware profiles.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Check hardware profiles against their rules; all faults of all files are told."""
    from moeflow.schema import HardwareProfile

    results = []
    faults: list[MoeflowError] = []
    for path in files:
        lines: list[str] = []
        try:
            HardwareProfile.load(path)
        except (DocumentError, StorageError) as error:
            faults.append(error)
            lines = str(error).splitlines()
        results.append({"file": str(path), "valid": not lines, "faults": lines})
        if not as_json and not lines:
            typer.echo(f"{path}: valid {HardwareProfile.kind}")
    if as_json:
        typer.echo(json.dumps(results))
    if faults:
        kind = max((type(fault) for fault in faults), key=lambda error: error is DocumentError)
        raise kind("\n".join(str(fault) for fault in faults))
