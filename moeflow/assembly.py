"""A model bound to the way its passes are carried out: device-driven where the plan says so and the machine can.

Everything that may refuse does so here, before the first token; what is refused falls back to the host-driven path with
the reason. It neither loads blobs nor generates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moeflow.artifact.reader import Artifact
from moeflow.errors import DeviceError
from moeflow.kernels.launcher import Launcher, cuda_launcher
from moeflow.model.build import build_model
from moeflow.model.execution import DeviceExecution, Execution, HostExecution
from moeflow.model.memory import release_memory
from moeflow.model.recorder import RouteRecorder
from moeflow.model.routes import ForcedRoutes
from moeflow.offload.copy_engine import copy_engine_mover
from moeflow.offload.device import MakeMover
from moeflow.offload.link import Link
from moeflow.offload.store import HostStore
from moeflow.schema import Plan

__all__ = ["Assembled", "Parts", "assemble"]


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    artifact: Artifact
    plan: Plan
    store: HostStore
    link: Link
    device: torch.device
    launcher: Launcher | None
    """None: CUDA's."""
    routes: ForcedRoutes | None
    mover: MakeMover | bool
    """True: the copy engine's; False: kernels copy all."""
    recorder: RouteRecorder | None = None


@dataclass(frozen=True)
class Assembled:
    """A model whose experts the execution runs."""

    execution: Execution
    model: Any
    fallback: str | None
    """Why the execution is not the plan's; None where it is."""


def assemble(parts: Parts) -> Assembled:
    """Build the model and bind it.

    Raises:
        torch.OutOfMemoryError: the device's memory does not do.
    """
    fallback = None
    if parts.plan.execution == "device":
        execution = None
        try:
            execution = _device_execution(parts)
            return Assembled(execution, _bound(parts, execution), None)
        except torch.OutOfMemoryError:
            raise
        except (DeviceError, RuntimeError) as error:  # capture has no error type of its own
            fallback = f"host-driven instead of device-driven: {error}"
            if execution is not None:
                execution.close()
        del execution
        release_memory(parts.device)  # the model that did not do lives on in reference cycles
    hosted = HostExecution(parts.artifact.manifest, parts.plan, parts.store, parts.link, parts.device)
    try:
        return Assembled(hosted, _bound(parts, hosted), fallback)
    except BaseException:
        hosted.close()
        raise


def _device_execution(parts: Parts) -> DeviceExecution:
    launcher, mover = parts.launcher, parts.mover
    if launcher is None:
        if parts.device.type != "cuda":
            raise DeviceError("kernels need a CUDA device")
        launcher = cuda_launcher(parts.device)
    if isinstance(mover, bool):
        feeds = mover and parts.device.type == "cuda"
        make: MakeMover | None = partial(copy_engine_mover, parts.device) if feeds else None
    else:
        make = mover
    return DeviceExecution(
        parts.artifact.manifest, parts.plan, parts.store, parts.link, launcher, parts.device, make
    )  # fmt: skip


def _bound(parts: Parts, execution: Execution) -> Any:
    routes = parts.routes
    execution.runner.routes, execution.runner.recorder = routes, parts.recorder
    model = build_model(parts.artifact, parts.plan, execution.runner, parts.device)
    if routes is not None and routes.guesses and execution.runner.predictor is not None:
        execution.runner.predictor = routes
    execution.bind(model)
    return model
