"""A family's declaration, read off transformers: the generic path for model types that are not listed.

The model is made on the meta device, where it costs no memory. Its experts are the modules that transformers
dispatches through its experts interface, its router is the module beside them, and transformers' own renaming of
checkpoints, which loading applies and saving reverts, says what each tensor on disk becomes. What does not fit
is refused with what was looked for and what was found: a guess here would be a model that talks nonsense.
Needs torch and transformers, so the listed families do not come here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moeflow.artifact.families import ATTENTION, COMPUTED, FAMILIES, HEAD, SHARED_EXPERTS, Family
from moeflow.errors import CheckpointError

__all__ = ["discover", "meta_model"]

# Parameter of transformers' experts module -> role of its slices, for one tensor with all experts.
FUSED = {
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "gate_up_proj_bias": "gate_up_bias",
    "down_proj_bias": "down_bias",
}
# Operations of a conversion, of parameters in the order of its sources -> their roles.
CONVERTED = {
    ("gate_up_proj", "MergeModulelist", "Concatenate"): ("gate", "up"),
    ("gate_up_proj", "MergeModulelist"): ("gate_up",),
    ("down_proj", "MergeModulelist"): ("down",),
}
ROUTER_NAMES = ("gate", "router")


def discover(directory: Path, names: Iterable[str]) -> Family:
    """The declaration of a checkpoint's family.

    Args:
        directory: has its `config.json`.
        names: its tensors.

    Raises:
        CheckpointError: transformers does not know the model type, or its model has another structure.
    """
    model = meta_model(directory)
    model_type = str(model.config.model_type)
    try:
        return _Discovery(model, model_type).family(list(names))
    except _MisfitError as misfit:
        raise CheckpointError(
            f"{directory / 'config.json'}: model type {model_type!r} is not declared "
            f"({', '.join(sorted(FAMILIES))}), and the generic path does not fit it: {misfit}; "
            "docs/adding-a-model.md says what is needed"
        ) from misfit


def meta_model(directory: Path) -> Any:
    """transformers' causal language model of a config, without weights.

    Raises:
        CheckpointError: transformers has none.
    """
    import torch
    import transformers

    place = directory / "config.json"
    try:
        # A synthetic checkpoint's directory is but a name, which must not be looked for on the hub.
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config can break its class in any way: all are the config's fault
        raise CheckpointError(
            f"{place}: transformers {transformers.__version__} has no causal language model for it: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}; "
            f"declared are {', '.join(sorted(FAMILIES))}"
        ) from error


class _MisfitError(Exception):
    """What was looked for and what was found."""


class _Discovery:
    """Reads one model."""

    def __init__(self, model: Any, model_type: str):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self.model = model
        self.model_type = model_type
        self.state = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
        self.experts = {name: module for name, module in model.named_modules() if _is_dispatched(module)}

    def family(self, names: list[str]) -> Family:
        module, flags = self._module()
        router = self._router()
        experts: dict[str, str] = {}
        renames: dict[str, str] = {}
        unplaced: list[str] = []
        ignored = self._ignored()
        draft = Family(self.model_type, {}, module=module, ignored=ignored)
        layers = self.model.config.get_text_config().num_hidden_layers
        for name in names:
            if draft.is_unused(name, layers):
                continue
            target, pattern = self._target(name)
            if target not in self.state:
                unplaced.append(name)
            elif (parent := target.rpartition(".")[0]) in self.experts:
                role = self._role(target.removeprefix(f"{parent}."), name, pattern)
                template = _template(name, expert=pattern is not None)
                if experts.setdefault(role, template) != template:
                    raise _MisfitError(f"looked for one name of {role}, found {experts[role]} and {template}")
            elif pattern is not None:
                raise _MisfitError(f"{name} is converted to {target}; moeflow converts experts alone")
            elif target != name:
                renames[_template(name, expert=False)] = _template(target, expert=False)
        if unplaced:
            raise _MisfitError(f"{len(unplaced)} tensors have no place in {self._name}, first {unplaced[0]}")
        order = {role: i for i, role in enumerate(("gate", "up", *FUSED.values()))}
        experts = dict(sorted(experts.items(), key=lambda item: order[item[0]]))
        self._check_roles(experts, flags["has_bias"])
        return Family(
            self.model_type,
            experts,
            module=module,
            router=router,
            renames=renames,
            transposed=flags["is_transposed"],
            ignored=ignored,
            attention=self._linear(ATTENTION),
            shared_experts=self._linear(SHARED_EXPERTS),
            head=self._linear(HEAD),
        )

    @property
    def _name(self) -> str:
        return f"transformers' {type(self.model).__name__}"

    def _module(self) -> tuple[str, dict[str, bool]]:
        """The experts modules' place, and what they are."""
        if not self.experts:
            named = [n for n, m in self.model.named_modules() if n.endswith("experts") and m is not self.model]
            found = f"{named[0]} is a {type(self.model.get_submodule(named[0])).__name__}" if named else "no `experts`"
            raise _MisfitError(
                f"looked for modules that transformers dispatches through its experts interface in {self._name}, "
                f"found none ({found})"
            )
        places = {_template(name, expert=False) for name in self.experts}
        if len(places) > 1 or "{layer}" not in min(places):
            raise _MisfitError(f"looked for one experts module per numbered layer, found {', '.join(sorted(places))}")
        kinds = [{flag: bool(getattr(m, flag, False)) for flag in _FLAGS} for m in self.experts.values()]
        flags, (name, module) = kinds[0], next(iter(self.experts.items()))
        wanted = {p for p in FUSED if flags["has_bias"] or not p.endswith("_bias")}
        present = {p for p, _ in module.named_parameters(recurse=False)}
        if any(kind != flags for kind in kinds) or not flags["has_gate"] or flags["has_post_expert_norm"]:
            raise _MisfitError(f"looked for experts with a gate and without a norm, all alike; {name} has {flags}")
        if present != wanted:
            raise _MisfitError(f"looked for {sorted(wanted)} in {name}, found {sorted(present)}")
        return places.pop(), flags

    def _router(self) -> str:
        """The module beside the experts that chooses among them; empty if none is found, and then no guesses are."""
        name, experts = next(iter(self.experts.items()))
        parent = name.rpartition(".")[0]
        count = next(iter(experts.parameters())).shape[0]
        beside = dict(self.model.get_submodule(parent).named_children())
        for candidate in (*ROUTER_NAMES, *beside):
            if candidate in beside and beside[candidate] is not experts:
                shapes = [p.shape for p in beside[candidate].parameters()]
                if any(len(shape) == 2 and shape[0] == count for shape in shapes):
                    return _template(f"{parent}.{candidate}", expert=False)
        return ""

    def _target(self, name: str) -> tuple[str, str | None]:
        """The parameter that loading makes of a tensor, and the source pattern if a conversion does it."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.state)
        if target not in self.state and name in self.state:  # saved as it is in memory
            return name, None
        return target, pattern

    def _role(self, parameter: str, name: str, pattern: str | None) -> str:
        if pattern is None:
            return FUSED[parameter]
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        operations = tuple(type(o).__name__ for o in converter.operations)
        roles = CONVERTED.get((parameter, *operations), ())
        if len(roles) != len(converter.source_patterns):
            raise _MisfitError(
                f"{name} becomes {parameter} by {', '.join(operations)}; known: "
                + "; ".join(f"{p} by {', '.join(o)}" for p, *o in CONVERTED)
            )
        return str(roles[converter.source_patterns.index(pattern)])

    def _check_roles(self, experts: dict[str, str], biased: bool) -> None:
        biases = {"gate_up_bias", "down_bias"} if biased else set()
        wanted = [{"gate", "up", "down"} | biases, {"gate_up", "down"} | biases]
        if set(experts) not in wanted:
            listed = " or ".join(", ".join(sorted(roles)) for roles in wanted)
            raise _MisfitError(f"looked for tensors of {listed}; found {', '.join(sorted(experts)) or 'none'}")

    def _ignored(self) -> tuple[str, ...]:
        """What transformers leaves out without a word; layers beyond the last are left out by number."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return tuple(sorted(p for p in patterns if not p.startswith(r"model\.layers\.") and p != COMPUTED))

    def _linear(self, pattern: str) -> str:
        """`pattern`, which names linear layers, or nothing where the names mean something else here."""
        import torch

        chosen = [n for n in self.state if re.search(pattern, n)]
        plain = all(isinstance(self.model.get_submodule(n.rpartition(".")[0]), torch.nn.Linear) for n in chosen)
        return pattern if plain else r"(?!)"


_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


def _is_dispatched(module: Any) -> bool:
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate"))


def _template(name: str, expert: bool) -> str:
    """A name with `{layer}` in place of its first number, and `{expert}` in place of its second."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for place, index in zip(("{layer}", "{expert}") if expert else ("{layer}",), numbers, strict=False):
        parts[index] = place
    return ".".join(parts)
