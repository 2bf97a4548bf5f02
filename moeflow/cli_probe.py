"""`moeflow probe`: this machine as a hardware profile, shown and saved.

What changes by the minute (free memory, an idle bus) is shown and never saved. It measures nothing itself.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moeflow.schema import HardwareProfile

__all__ = ["probe"]

ROOM = 1 << 30  # bytes free before a disk is measured that nobody named


def probe(
    save: Annotated[
        Path | None, typer.Option("--save", "--output", "-o", help="Write a hardware profile here.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the hardware profile; with --save the file's.")] = "this-machine",
    disk: Annotated[
        Path | None,
        typer.Option(
            help="Directory whose disk is measured, by a temporary file of 256 MiB at most; an artifact's own: at the "
            "size of its experts. Default: artifacts/, or the current one.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure nothing: what the machine has, in a moment.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Measure this machine: GPU, CPU, memory, link, disk. The file is shareable; it names no host and no user."""
    from moeflow.console import out, progress_bar
    from moeflow.console_hardware import (
        show_cpu_kernels,
        show_findings,
        show_hardware,
        show_kernels,
        show_link,
        show_now,
    )
    from moeflow.probe.machine import probe as measure
    from moeflow.probe.match import known_hardware, match

    directory = disk or _usual_directory()
    with progress_bar() as progress:
        found = measure(name=save.stem if save else name, progress=progress, directory=directory, quick=quick)
        if found.gpu and not quick:
            from moeflow.calibration import calibrated

            found = calibrated(found, progress)
        if not quick:
            from moeflow.cpu_calibration import calibrated_cpu

            found = calibrated_cpu(found, progress)
    if save:
        found.save(save)
    if as_json:
        return typer.echo(found.to_json(), nl=False)
    typer.echo(found.description)
    show_hardware(found, to=out)
    show_link(found, to=out)
    show_kernels(found, to=out)
    show_cpu_kernels(found, to=out)
    show_now(_now(found, directory), to=out)
    if known := match(found, known_hardware().values()):
        show_findings("in hardware/", [known], to=out)
    return None


def _usual_directory() -> Path | None:
    """Where artifacts are written if nobody says; None where a file of the probe's would be refused or in the way."""
    directory = Path("artifacts") if Path("artifacts").is_dir() else Path()
    room = os.access(directory, os.W_OK) and shutil.disk_usage(directory).free > ROOM
    return directory if room else None


def _now(found: HardwareProfile, directory: Path | None) -> list[tuple[str, str]]:
    """What the file does not hold, because it is another tomorrow."""
    import psutil

    from moeflow.probe.nvml import find_board, read_bus
    from moeflow.schema.units import format_size

    rows = [("RAM", f"{format_size(min(psutil.virtual_memory().available, found.ram))} free")]
    if found.gpu:
        board = find_board(found.gpu.name, found.gpu)
        if board and board.free is not None:
            rows.append(("GPU memory", f"{format_size(board.free)} free"))
        with read_bus(found.gpu.name) as bus:
            if state := bus():
                rows.append(("bus", f"PCIe {state.generation}.0 x{state.lanes} at rest"))
    if directory:
        rows.append(("disk", f"{format_size(shutil.disk_usage(directory).free)} free"))
    else:
        rows.append(("disk", "left out: the current directory has no room or may not be written; name one by --disk"))
    return rows
