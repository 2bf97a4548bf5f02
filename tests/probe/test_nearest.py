"""What a machine is compared by: name and compute capability first, then numbers, and every difference said."""

from __future__ import annotations

import pytest

from moeflow.probe.match import find_hardware, known_hardware
from moeflow.probe.nearest import Finding, Sought, nearest

GIB = 1 << 30
KNOWN = known_hardware()


def best(sought: Sought) -> Finding:
    return nearest(sought, KNOWN.values())[0]


def text(finding: Finding) -> str:
    return f"{finding.profile.name} {finding.kind}: {'; '.join(finding.differs)}"


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_shipped_machine_is_nearest_to_itself_and_differs_in_nothing(name: str) -> None:
    found = best(Sought.of(KNOWN[name]))
    assert (found.profile.name, found.differs, found.unknown) == (name, (), ())
    assert found.kind == ("same" if KNOWN[name].gpu else "nearest")
    assert set(found.same) >= {"link", "CPU cores", "RAM"}


@pytest.mark.parametrize(
    ("gpu", "memory", "capability", "found"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "8.9", "rtx-4060-ti-16gb same: "),
        ("NVIDIA GeForce RTX 4060 Ti", 8188, "8.9",
         "rtx-4060-ti-16gb variant: memory is 8 GiB, in the file 16 GiB"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8188, "8.9", "rtx-4060-mobile same: "),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 8188, "8.9",
         "rtx-4060-mobile nearest: name is NVIDIA GeForce RTX 4070 Laptop GPU, in the file NVIDIA GeForce RTX 4060 "
         "Laptop GPU"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, "8.9",
         "rtx-4060-mobile nearest: name is NVIDIA GeForce RTX 4090 Laptop GPU, in the file NVIDIA GeForce RTX 4060 "
         "Laptop GPU; memory is 16 GiB, in the file 8 GiB"),
        ("NVIDIA GeForce RTX 3080", 10240, "8.6",
         "rtx-3060 nearest: name is NVIDIA GeForce RTX 3080, in the file NVIDIA GeForce RTX 3060; memory is 10 GiB, "
         "in the file 12 GiB"),
        ("NVIDIA GeForce RTX 3090 Ti", 24564, "8.6",
         "rtx-3090 nearest: name is NVIDIA GeForce RTX 3090 Ti, in the file NVIDIA GeForce RTX 3090"),
        ("NVIDIA H100 80GB HBM3", 81559, "9.0", "h100-80gb same: "),
        ("NVIDIA H100 PCIe", 81559, "9.0",
         "h100-80gb nearest: name is NVIDIA H100 PCIe, in the file NVIDIA H100 80GB HBM3"),
        ("NVIDIA L4", 23034, "8.9", "l4 same: "),
        ("NVIDIA L40", 46068, "8.9",
         "rtx-4090 nearest: name is NVIDIA L40, in the file NVIDIA GeForce RTX 4090; memory is 45 GiB, in the file "
         "24 GiB"),
        ("Tesla T4", 15360, "8.0", "t4 variant: compute capability is 8.0, in the file 7.5"),
    ],
)  # fmt: skip
def test_a_driver_s_words_and_what_differs(gpu: str, memory: int, capability: str, found: str) -> None:
    assert text(best(Sought.named(gpu, memory << 20, capability))) == found


def test_a_desktop_gpu_is_never_taken_for_the_laptop_s_of_the_same_digits() -> None:
    found = nearest(Sought.named("NVIDIA GeForce RTX 4060", 8 * GIB, "8.9"), KNOWN.values())
    assert {f.kind for f in found} == {"nearest"}
    laptop = next(f for f in found if f.profile.name == "rtx-4060-mobile")
    assert "form is not a laptop's, in the file a laptop's" in laptop.differs
    assert found[0].profile.name != "rtx-4060-mobile"


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("RTX 4060 Ti 8GB", "rtx-4060-ti-16gb variant: memory is 8 GiB, in the file 16 GiB"),
        ("rtx-4060-ti 16 GB", "rtx-4060-ti-16gb same: "),
        ("RTX4090", "rtx-4090 same: "),
        ("rtx 4060 mobile", "rtx-4060-mobile same: "),
        ("A100-SXM4-80GB", "a100-80gb same: "),
    ],
)
def test_a_person_s_words(written: str, found: str) -> None:
    assert text(best(Sought.named(written))) == found


def test_what_is_not_known_is_said_and_not_taken_for_equal() -> None:
    found = best(Sought.named("NVIDIA GeForce RTX 4060 Ti"))
    assert (found.profile.name, found.kind, found.same) == ("rtx-4060-ti-16gb", "same", ("name",))
    assert {"memory", "compute capability", "link"} <= set(found.unknown)


@pytest.mark.parametrize("name", ["Radeon RX 7900", "RTX", "NVIDIA", "NVIDIA RTX A6000", ""])
def test_a_name_that_resembles_none_finds_nothing(name: str) -> None:
    assert nearest(Sought.named(name), KNOWN.values()) == []


def test_numbers_find_what_a_name_does_not() -> None:
    found = best(Sought.named("NVIDIA RTX A6000", 48 * GIB, "8.6"))
    assert (found.profile.name, found.kind) == ("rtx-3090", "nearest")
    assert best(Sought(compute_capability="8.9", memory=13 * GIB)).profile.name == "rtx-4070"


def test_a_measured_link_of_half_the_lanes_is_said() -> None:
    profile = find_hardware("rtx-4090")
    half = profile.link.model_copy(update={"host_to_device": 12_600_000_000})
    found = best(Sought.of(profile.model_copy(update={"link": half})))
    assert text(found) == "rtx-4090 same: link is 12.6 GB/s, in the file 25.2 GB/s"


def test_a_machine_without_gpu_is_compared_with_others_without() -> None:
    found = nearest(Sought(cores=8, ram=64 * GIB), KNOWN.values())
    assert [(f.profile.name, f.kind) for f in found] == [("cpu-2-cores", "nearest")]
    assert "CPU cores is 8, in the file 2" in found[0].differs
