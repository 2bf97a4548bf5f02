"""Which bytes of a checkpoint are which expert's: the MoE layers, found by name and checked against each other.

Checkpoints store an expert's matrices one by one (Mixtral, Qwen, DeepSeek) or all experts of a layer in one tensor
(Granite, gpt-oss). Both become `Slice`s, so that the packer need not know which it was. Works on headers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeflow.artifact.families import Family
from moeflow.artifact.safetensors import TensorInfo
from moeflow.errors import CheckpointError

__all__ = ["MoeLayer", "Slice", "find_layers", "role_shapes"]


@dataclass(frozen=True)
class Slice:
    """One array of one expert: a tensor on disk, or one place along the first dimension of one."""

    tensor: str
    expert: int | None = None
    """Index into the tensor's first dimension; None takes the whole tensor."""
    transposed: bool = False
    """Whether what is stored is the transpose of `[outputs, inputs]`."""


@dataclass(frozen=True)
class MoeLayer:
    """The experts of one MoE layer."""

    index: int
    """Of the decoder layer in the model; dense layers count too."""
    experts: tuple[Mapping[str, Slice], ...]
    """Per expert: role (gate, up, gate_up, down, gate_up_bias, down_bias) -> where it is."""
    hidden: int
    intermediate: int

    @property
    def tensors(self) -> list[str]:
        """Names on disk of all that the layer's experts are made of."""
        return list(dict.fromkeys(part.tensor for expert in self.experts for part in expert.values()))


def find_layers(
    tensors: Mapping[str, TensorInfo], family: Family, layers: int, experts: int, directory: Path
) -> tuple[MoeLayer, ...]:
    """The MoE layers in order.

    Args:
        tensors: all of the checkpoint.
        family: names them.
        layers: of the model; what lies beyond is not used.
        experts: per layer, by the config; 0 if it does not say.
        directory: for messages.

    Raises:
        CheckpointError: there are none, an expert lacks a matrix, or experts of one layer differ in shape.
    """
    found: dict[int, dict[int, dict[str, Slice]]] = {}
    for name, info in tensors.items():
        tensor = family.expert_tensor(name)
        if tensor is None or family.is_unused(name, layers):
            continue
        layer = found.setdefault(tensor.layer, {})
        transposed = family.transposed and not tensor.role.endswith("_bias")
        if tensor.expert is not None:
            layer.setdefault(tensor.expert, {})[tensor.role] = Slice(name, None, transposed)
            continue
        for expert in range(info.shape[0] if info.shape else 0):
            layer.setdefault(expert, {})[tensor.role] = Slice(name, expert, transposed)
    if not found:
        templates = ", ".join(family.experts.values())
        raise CheckpointError(f"{directory}: no experts found; a {family.model_type} names them {templates}")
    builder = _Builder(tensors, family, experts, directory)
    return tuple(builder.layer(index, found[index]) for index in sorted(found))


def role_shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Role -> shape of one expert's array, a matrix as `[outputs, inputs]`."""
    return {
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "gate_up_bias": (2 * intermediate,),
        "down_bias": (hidden,),
    }


class _Builder:
    """Checks the experts of a layer."""

    def __init__(self, tensors: Mapping[str, TensorInfo], family: Family, experts: int, directory: Path):
        self.tensors = tensors
        self.family = family
        self.experts = experts
        self.directory = directory

    def layer(self, index: int, experts: Mapping[int, Mapping[str, Slice]]) -> MoeLayer:
        count = max(max(experts) + 1, self.experts)
        for expert in range(count):
            if missing := set(self.family.experts) - set(experts.get(expert, {})):
                raise CheckpointError(
                    f"{self.directory}: layer {index}, expert {expert} lacks {', '.join(sorted(missing))}; "
                    "the download may be incomplete"
                )
        first = experts[0]
        expected = self._shapes(first["down"])
        dtype = self.tensors[first["down"].tensor].dtype
        for expert in range(count):
            for role, part in experts[expert].items():
                self._check(part, expected[role], dtype, matrix=not role.endswith("_bias"))
        hidden, intermediate = expected["down"]
        return MoeLayer(index, tuple(experts[e] for e in range(count)), hidden, intermediate)

    def _shapes(self, down: Slice) -> dict[str, tuple[int, ...]]:
        """Of every role, by the first expert's way down."""
        shape = self._shape(down)
        if len(shape) != 2:
            raise CheckpointError(f"{self.directory}: {down.tensor} has shape {list(shape)}; a matrix is needed")
        return role_shapes(*shape)

    def _shape(self, part: Slice) -> tuple[int, ...]:
        """Of one expert's array, as `[outputs, inputs]`."""
        shape = self.tensors[part.tensor].shape[0 if part.expert is None else 1 :]
        return shape[::-1] if part.transposed else shape

    def _check(self, part: Slice, expected: tuple[int, ...], dtype: str, matrix: bool) -> None:
        found = self.tensors[part.tensor]
        if matrix and found.dtype != dtype:
            raise CheckpointError(
                f"{self.directory}: {part.tensor} is stored as {found.dtype}, the layer's first expert as {dtype}"
            )
        if self._shape(part) != expected:
            raise CheckpointError(
                f"{self.directory}: {part.tensor} has shape {list(self._shape(part))}, "
                f"the layer's first expert {list(expected)}"
            )
