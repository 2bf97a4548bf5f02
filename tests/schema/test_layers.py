"""Layers and experts by number, and overrides that contradict each other or change nothing."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from moeflow.errors import DocumentError
from moeflow.schema import HqqScheme, Override, Profile
from moeflow.schema.layers import shared, spans, written

TWO, FOUR = {"backend": "hqq", "bits": 2}, {"backend": "hqq", "bits": 4}


@pytest.mark.parametrize(
    ("pattern", "layers"), [("0", [0]), (31, [31]), ("0-3,31", [0, 1, 2, 3, 31]), (" 2 - 3, 5 ", [2, 3, 5])]
)
def test_a_pattern_names_layers(pattern: Any, layers: list[int]) -> None:
    override = Override(layers=pattern, experts=HqqScheme(bits=2))
    assert [layer for layer in range(50) if override.covers(layer)] == layers
    assert not override.covers(None)
    assert written(layers) == override.layers
    assert Override.model_validate(override.model_dump()) == override


@pytest.mark.parametrize("pattern", ["", "a", "3-1", "1,,2", "-1", "1-", "0x1", True, None, [1], 1.0])
def test_what_is_no_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(ValidationError, match="expected layers such as 31, 0-3 or 0-3,31"):
        Override(layers=pattern, experts=HqqScheme(bits=2))


def test_layers_that_two_patterns_share() -> None:
    assert shared("0-3,31", "4-30") is None
    assert shared("0-3,31", "31,2-9") == 2
    assert [len(span) for span in spans("0-999999")] == [1000000]  # ranges, not lists


def _faults(*overrides: dict[str, Any]) -> str:
    with pytest.raises(DocumentError) as caught:
        Profile.parse({"model": "x", "quantization": {"overrides": list(overrides)}}, "p.yaml")
    return str(caught.value)


def test_faults_are_located() -> None:
    both = _faults(
        {"layers": "0-3", "experts": TWO}, {"layers": "7", "experts": TWO}, {"layers": "2,9", "experts": FOUR}
    )
    assert both.startswith("p.yaml: quantization.overrides is [{'layers': '0-3'")
    assert both.endswith(
        "; entries 0 and 2 contradict each other: experts of layer 2 would be 2-bit g64 and 4-bit g64; "
        "name each layer once"
    )
    assert _faults({"layers": "0"}).endswith("it changes nothing: give experts, attention or shared_experts a scheme")
    assert _faults({"layers": "0", "experts": {**TWO, "bits": 5}}) == (
        "p.yaml: quantization.overrides.0.experts.bits is 5; hqq supports 2, 3, 4, 8"
    )
    assert _faults({"layers": "0", "head": TWO}) == (
        "p.yaml: quantization.overrides.0.head: unknown key; "
        "known: layers, only_experts, experts, attention, shared_experts"
    )
    assert _faults({"layers": "0", "experts": {**TWO, "bitz": 5}}) == (
        "p.yaml: quantization.overrides.0.experts.bitz: unknown key; did you mean bits? known: backend, bits, "
        "group_size, metadata_bits"
    )
    assert _faults({"layers": "x", "experts": TWO}) == (
        "p.yaml: quantization.overrides.0.layers is x; expected layers such as 31, 0-3 or 0-3,31"
    )


def test_two_entries_may_share_a_layer_where_they_agree_or_differ_in_role() -> None:
    overrides = [
        {"layers": "0-3", "experts": TWO}, {"layers": "3-5", "experts": TWO}, {"layers": "3", "attention": FOUR},
    ]  # fmt: skip
    quantization = Profile.parse({"model": "x", "quantization": {"overrides": overrides}}, "p.yaml").quantization
    assert [quantization.scheme("experts", layer).label for layer in (0, 3, 5, 6)] == ["2-bit g64"] * 3 + ["4-bit g64"]
    assert str(quantization) == (
        "experts 4-bit g64, attention 4-bit g64; in 0-3: experts 2-bit g64; in 3-5: experts 2-bit g64; "
        "in 3: attention 4-bit g64"
    )


@pytest.mark.parametrize("pattern", ["", "a", "3-1", True, [1], 1.0])
def test_what_is_no_pattern_of_experts_is_refused(pattern: Any) -> None:
    with pytest.raises(ValidationError, match="expected experts such as 5, 0-3 or 0,5-7"):
        Override(layers="0", only_experts=pattern, experts=HqqScheme(bits=2))


def test_some_experts_of_some_layers() -> None:
    overrides = [
        {"layers": "0-3", "only_experts": " 0, 5-7", "experts": TWO},
        {"layers": "1-2", "only_experts": 1, "experts": {**TWO, "bits": 8}},
        {"layers": "4", "experts": TWO}, {"layers": "0-3", "attention": TWO},
    ]  # fmt: skip
    profile = Profile.parse({"model": "x", "quantization": {"overrides": overrides}}, "p.yaml")
    quantization = profile.quantization
    labels = {layer: [quantization.scheme("experts", layer, e).label[0] for e in range(8)] for layer in (0, 1, 4, 5)}
    assert labels == {0: list("24444222"), 1: list("28444222"), 4: list("22222222"), 5: list("44444444")}
    assert [quantization.scheme("experts", layer).label for layer in (0, 4)] == ["4-bit g64", "2-bit g64"]
    assert quantization.scheme("attention", 1).label == "2-bit g64"
    assert "in 0-3: experts 0,5-7 2-bit g64; in 1-2: experts 1 8-bit g64; in 4: experts 2-bit g64" in str(quantization)
    assert Profile.parse(profile.to_dict(), "again") == profile
    assert "only_experts" not in profile.to_dict()["quantization"]["overrides"][2]


def test_faults_of_experts_are_located() -> None:
    some = {"layers": "0-3", "only_experts": "0,5-7", "experts": TWO}
    assert _faults(some, {"layers": "2", "only_experts": "3-6", "experts": FOUR}).endswith(
        "; entries 0 and 1 contradict each other: expert 5 of layer 2 would be 2-bit g64 and 4-bit g64; "
        "name each expert of a layer once"
    )
    for pair in ([some, {"layers": "3-9", "experts": FOUR}], [{"layers": "3-9", "experts": FOUR}, some]):
        assert "contradict each other: expert 0 of layer 3 would be" in _faults(*pair)
    assert _faults({**some, "attention": FOUR}).endswith(
        "only_experts is 0,5-7; attention cannot be of some experts alone: give that an entry of its own, "
        "without only_experts"
    )
    assert (
        _faults({**some, "shared_experts": FOUR, "attention": FOUR}).count("attention and shared_experts cannot") == 1
    )
    assert _faults({"layers": "0", "only_experts": "1"}).endswith("give experts, attention or shared_experts a scheme")
