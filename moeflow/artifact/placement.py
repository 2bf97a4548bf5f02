"""Compares what a checkpoint holds beside its experts with transformers' model of it, before anything is packed.

A tensor that has another name or shape than the model's parameter is found in seconds here; loading would find it
after hours of quantizing. Needs torch and transformers; experts are checked by `moeflow.artifact.layers`.
"""

from __future__ import annotations

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.discovery import meta_model
from moeflow.errors import CheckpointError

__all__ = ["check_placement"]


def check_placement(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose resident tensors are not the parameters of transformers' model.

    Raises:
        CheckpointError: one has no place, a parameter has no tensor, or shapes differ.
    """
    model = meta_model(checkpoint.directory)
    experts = {checkpoint.family.module.format(layer=layer.index) for layer in checkpoint.layers}
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items() if n.rpartition(".")[0] not in experts}
    resident = checkpoint.resident
    missing = sorted(wanted.keys() - resident.keys() - model.all_tied_weights_keys.keys())
    stray = sorted(resident[name] for name in resident.keys() - wanted.keys())
    kind = f"transformers' {type(model).__name__}"
    faults = [f"{len(stray)} tensors have no place in {kind}, first {stray[0]}"] if stray else []
    faults += [f"{len(missing)} parameters of {kind} have no tensor, first {missing[0]}"] if missing else []
    if faults:
        raise CheckpointError(
            f"{checkpoint.directory}: {'; '.join(faults)}; fetch the config and all weight files of one revision"
        )
    for name, stored in resident.items():
        found = checkpoint.tensors[stored]
        if found.shape != wanted[name]:
            raise CheckpointError(
                f"{found.file}: {stored} has shape {list(found.shape)}, {kind} needs {list(wanted[name])}; "
                "fetch the config and all weight files of one revision"
            )
