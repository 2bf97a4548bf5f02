"""Annotated profiles: they load back as they were, and every choice has its reason, with figures of the plan."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeflow.artifact.architectures import architecture
from moeflow.artifact.shapes import config_checkpoint
from moeflow.planning.reasons import annotated, reasons
from moeflow.planning.search import Candidate, candidates, choose
from moeflow.probe.match import find_hardware, known_hardware
from moeflow.schema import Cache, CpuUse, HardwareProfile, Memory, Profile
from moeflow.schema.units import format_size, three_digits

GIB = 1 << 30
MODELS = {name: config_checkpoint(architecture(name), name) for name in ("mixtral-8x7b", "olmoe-1b-7b")}
CHOICES = ("quantization", "cache", "prefetch", "memory")


def _tuned(
    model: str, hardware: HardwareProfile, min_speed: float = 5.0, **settings: Any
) -> tuple[Candidate, dict[str, str]]:
    found = candidates(MODELS[model], Profile(model=model, hardware=hardware.name, **settings), hardware)
    chosen = choose(found, min_speed)
    return chosen, reasons(chosen, found, hardware, min_speed)


def _above(text: str, key: str) -> str:
    """The comment that stands right above a key."""
    found = re.search(rf"((?:^# .*\n)+){key}:", text, flags=re.MULTILINE)
    assert found, f"{key} has no comment"
    return " ".join(line.removeprefix("# ") for line in found[1].splitlines())


def _without_rates(hardware: HardwareProfile) -> HardwareProfile:
    assert hardware.gpu is not None
    return hardware.model_copy(update={"gpu": hardware.gpu.model_copy(update={"memory_bandwidth": None})})


@pytest.mark.parametrize("machine", sorted(known_hardware()))
@pytest.mark.parametrize("model", MODELS)
def test_the_annotated_profile_is_the_profile_with_a_reason_for_each_choice(
    model: str, machine: str, tmp_path: Path
) -> None:
    chosen, why = _tuned(model, find_hardware(machine))
    text = annotated(chosen.profile, why)
    (tmp_path / "profile.yaml").write_text(text)
    assert Profile.load(tmp_path / "profile.yaml") == chosen.profile
    assert list(yaml.safe_load(text)) == list(chosen.profile.to_dict()), "keys in the document's order"
    for key in CHOICES:
        assert _above(text, key) == why[key]
    assert text.startswith("# Chosen for ") and "Predicted, not measured" in why[""]
    assert max(map(len, text.splitlines())) <= 102


def test_the_summary_has_the_prediction_and_what_was_assumed() -> None:
    chosen, why = _tuned("mixtral-8x7b", find_hardware("rtx-3060"))
    assert chosen.plan is not None and chosen.plan.prediction is not None
    assert chosen.plan.prediction.speed in why[""]
    assert all(assumed in why[""] for assumed in chosen.plan.prediction.assumed)
    assert "link 12 GB/s (derived)" in why[""]


def test_bits_name_the_next_better_choice_and_its_speed() -> None:
    hardware = find_hardware("rtx-3060")
    found = candidates(MODELS["mixtral-8x7b"], Profile(model="x"), hardware)
    chosen = choose(found, 5.0)
    better = found[found.index(chosen) - 1]
    text = reasons(chosen, found, hardware, 5.0)["quantization"]
    assert text.startswith(f"{chosen.label}: the best quality that reaches 5 tokens/s. {better.label} would give ")
    assert text.endswith(f"{three_digits(better.tokens_per_second)} tokens/s.")
    slow = choose(found, 500.0)
    assert "none reaches 500 tokens/s" in reasons(slow, found, hardware, 500.0)["quantization"]
    first = choose(found, 0.0)
    assert reasons(first, found, hardware, 0.0)["quantization"].endswith("reaches 0 tokens/s.")


def test_bits_say_where_the_next_better_choice_does_not_fit_or_lies_on_the_disk() -> None:
    _, why = _tuned("mixtral-8x7b", find_hardware("t4"))
    assert "with experts on the disk" in why["quantization"]
    assert re.search(r"4.92 GiB read from the disk", why["memory"])
    ram = 15 * GIB  # holds 2 bits in groups of 64 alone
    chosen, why = _tuned("mixtral-8x7b", find_hardware("rtx-3060"), 0.0, memory=Memory(ram=ram, disk=0))
    assert chosen.label == "2-bit g64 experts with unquantized attention"
    assert "2-bit g16 meta8 experts with 4-bit g64 attention does not fit: " in why["quantization"]
    assert "memory.ram leaves 15 GiB" in why["quantization"]


def test_the_cache_is_what_the_memory_leaves() -> None:
    chosen, why = _tuned("mixtral-8x7b", find_hardware("rtx-3060"))
    assert chosen.plan is not None
    memory, slots = chosen.plan.memory, chosen.plan.cache_slots
    assert f"k = {min(slots)} or {max(slots)}" in why["cache"]
    for size in (memory.limit, memory.total - memory.slots, memory.slots):
        assert format_size(size) in why["cache"]
    assert "hold all of them" in _tuned("mixtral-8x7b", find_hardware("a100-80gb"))[1]["cache"]
    asked = _tuned("mixtral-8x7b", find_hardware("rtx-3060"), cache=Cache(experts_per_layer=2))[1]["cache"]
    assert asked.startswith("k = 2 experts a layer, as asked: ") and "auto" not in asked
    assert "where they lie" in _tuned("olmoe-1b-7b", find_hardware("cpu-2-cores"))[1]["cache"]
    torch_only = {"cpu": CpuUse(experts="off")}
    assert "half of them" in _tuned("olmoe-1b-7b", find_hardware("cpu-2-cores"), **torch_only)[1]["cache"]
    naive = _tuned("mixtral-8x7b", find_hardware("rtx-3060"), strategy="naive")[1]
    assert naive["cache"] == "Nothing is cached: the strategy is naive."
    assert naive["prefetch"] == "Guesses are off: the strategy is naive."


def test_guesses_have_both_speeds() -> None:
    chosen, why = _tuned("mixtral-8x7b", find_hardware("rtx-3080-mobile"))
    assert chosen.other < chosen.tokens_per_second
    speeds = (three_digits(chosen.tokens_per_second), three_digits(chosen.other))
    assert why["prefetch"] == "Guesses are on: {} tokens/s with them, {} without, as predicted.".format(*speeds)
    assert why["prefetch"] != _tuned("mixtral-8x7b", find_hardware("a100-80gb"))[1]["prefetch"]
    assert _tuned("mixtral-8x7b", find_hardware("a100-80gb"))[1]["prefetch"].startswith("Guesses are off: ")


def test_unknown_rates_are_no_speed_of_zero() -> None:
    _, why = _tuned("mixtral-8x7b", _without_rates(find_hardware("rtx-3060")))
    assert "lacks a rate that a predicted speed needs" in why[""]
    assert why["quantization"].endswith("since speeds are not known.")
    assert why["prefetch"] == "Guesses are on; what they gain is not known."
    assert "0 tokens/s" not in " ".join(why.values())


def test_experts_in_memory() -> None:
    chosen, why = _tuned("olmoe-1b-7b", find_hardware("rtx-3060"))
    assert why["memory"] == f"All experts, {format_size(chosen.sizes.expert_nbytes)}, lie in host memory."


def test_reasons_do_not_change_what_is_written() -> None:
    chosen, why = _tuned("olmoe-1b-7b", find_hardware("rtx-3060"))
    plain, commented = annotated(chosen.profile, {}), annotated(chosen.profile, why)
    assert "#" not in plain
    assert [line for line in commented.splitlines() if not line.startswith("#")] == plain.splitlines()
