"""A machine's rates: what is measured is taken, what is not is named, and the copy engine's thresholds are its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from machines import KERNELS, MACHINE, machine

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.planning import rates
from moeflow.planning.rates import Launch, Rates, format_of
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import (
    BitsAndBytesScheme,
    Cpu,
    DenseScheme,
    Gpu,
    HardwareProfile,
    HqqScheme,
    Link,
    LinkPoint,
    Quantization,
)

MIB, GB = 1 << 20, 10**9


def rates_of(hardware: HardwareProfile) -> Rates:
    found = Rates.of(hardware)
    assert found is not None
    return found


def gpu(capability: str = "9.0", **more: object) -> Gpu:
    return Gpu(name="g", memory=GB, compute_capability=capability, memory_bandwidth=1000 * GB, **more)


# -- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (HqqScheme(bits=2), "2-bit"),
        (HqqScheme(bits=3), "3-bit"),
        (HqqScheme(bits=4), "4-bit"),
        (HqqScheme(bits=8), "8-bit"),
        (HqqScheme(bits=2, group_size=16, metadata_bits=8), "2-bit meta8"),
        (BitsAndBytesScheme(format="nf4"), "nf4"),
        (BitsAndBytesScheme(format="int8"), "int8"),
        (DenseScheme(), "none"),
    ],
)
def test_formats_have_the_names_that_products_are_measured_under(scheme, name: str) -> None:
    assert format_of(scheme) == name
    assert name in rates_of(MACHINE).products
    assert name in rates.PRODUCTS, "no figure of an H100"


def test_a_format_that_nobody_measured_counts_as_four_bits() -> None:
    found = rates_of(machine(gpu=gpu()))
    assert found.product("4-bit meta8", 6e6) == found.product("4-bit", 6e6)


# -- measured and assumed ----------------------------------------------------------------------------------


def test_kernels_of_the_profile_stand_for_those_of_an_h100() -> None:
    found = rates_of(MACHINE)
    assert found.assumed == ()
    assert found.layer == rates.WIDE * KERNELS.layer
    assert found.products["4-bit"] == Launch(2e-6, 0.5)
    assert found.product("4-bit", 5e6) == pytest.approx(12e-6)
    assert found.products["2-bit"] == rates.PRODUCTS["2-bit"], "not measured there"


def test_what_nobody_measured_is_named() -> None:
    found = rates_of(machine(gpu=gpu()))
    assert found.assumed == ("kernels, as measured on an H100",)
    assert found.layer == rates.LAYER
    sheet = rates_of(machine(gpu=gpu(), origin="datasheet"))
    assert sheet.assumed == ("link.host_to_device", "kernels, as measured on an H100")
    own = machine(gpu=gpu(), origin="datasheet", sources={"link.host_to_device": "measured, by me"})
    assert rates_of(own).assumed == ("kernels, as measured on an H100",)
    assert rates_of(machine(gpu=None)).assumed == ("computing, as measured on two cores of a server",)


def test_a_layer_takes_longer_before_hopper() -> None:
    ampere, hopper = (rates_of(machine(gpu=gpu(capability))) for capability in ("8.6", "9.0"))
    assert ampere.layer == pytest.approx(1.2 * hopper.layer)


def test_a_machine_without_its_memorys_rate_has_no_rates() -> None:
    assert Rates.of(machine(gpu=Gpu(name="g", memory=GB, compute_capability="9.0"))) is None
    assert Rates.of(machine(gpu=None, cpu=Cpu(cores=2))) is None


def test_a_kernels_copies_are_as_probed_or_a_share_of_the_link() -> None:
    points = (LinkPoint(nbytes=MIB, engine=9 * GB, kernel=3 * GB), LinkPoint(nbytes=64 * MIB, engine=10 * GB))
    assert rates_of(machine(link=Link(host_to_device=10 * GB, by_size=points))).kernel_link == 3 * GB
    assert rates_of(machine(link=Link(host_to_device=10 * GB, by_size=points[1:]))).kernel_link == 9.2 * GB
    assert rates_of(machine(link=Link(host_to_device=10 * GB))).kernel_link == 9.2 * GB


# -- the copy engine ---------------------------------------------------------------------------------------


def test_thresholds_are_those_of_the_engine() -> None:
    from moeflow.offload import copy_engine, mover

    assert rates.ENGINE_CORES == copy_engine.LEAST_CORES
    assert (rates.ENGINE_BLOB, rates.ENGINE_LEAST, rates.ENGINE_HEAD) == (mover.LEAST_BLOB, mover.LEAST, mover.HEAD)


@pytest.mark.parametrize("gate_up", [3 * MIB, 4 * MIB - 4096, 4 * MIB, 20 * MIB])
def test_blobs_pay_where_the_engine_thinks_so(gate_up: int) -> None:
    """Of a blob two thirds are gate and up; the head is a kernel's."""
    from moeflow.kernels.copy import PIECE
    from moeflow.offload.mover import Blobs, pays

    blob = gate_up * 3 / 2
    found = rates_of(machine(gpu=gpu(), cpu=Cpu(cores=16), link=Link(host_to_device=10 * GB)))
    by_engine = found.copies(20 * blob, blob) < 20 * blob / found.kernel_link
    assert by_engine == pays([Blobs(0, 0, int(blob), gate_up // PIECE)])


def test_few_bytes_and_few_cores_stay_with_kernels() -> None:
    many = rates_of(machine(gpu=gpu(), cpu=Cpu(cores=4), link=Link(host_to_device=10 * GB)))
    few = rates_of(machine(gpu=gpu(), cpu=Cpu(cores=3), link=Link(host_to_device=10 * GB)))
    kernel, engine = 9.2 * GB, 9.77 * GB
    assert many.copies(15 * MIB, 7.5 * MIB) == pytest.approx(5e-6 + 15 * MIB / engine)
    assert many.copies(15 * MIB - 1, 7.5 * MIB) == pytest.approx(5e-6 + 15 * MIB / kernel)
    assert few.copies(15 * MIB, 7.5 * MIB) == pytest.approx(5e-6 + 15 * MIB / kernel)
    assert many.copies(0, 7.5 * MIB) == 0


# -- sizes that rates are applied to -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tied", "latent"),
    [("mixtral", False, False), ("granitemoe", True, False), ("deepseek_v2", False, True)],
)
def test_what_a_token_reads_is_known_before_packing(
    checkpoint_factory: Callable[..., Path], tmp_path: Path, family: str, tied: bool, latent: bool
) -> None:
    checkpoint = Checkpoint.open(checkpoint_factory(family))
    quantization = Quantization(
        experts=HqqScheme(bits=2, group_size=16, metadata_bits=8), attention=HqqScheme(group_size=32)
    )
    before = ModelSizes.of_checkpoint(checkpoint, quantization)
    assert before == ModelSizes.of_manifest(Packer(checkpoint, "x", quantization, tmp_path).run())
    config = checkpoint.config
    rows = 0 if tied else config["vocab_size"] * config["hidden_size"]
    assert bool(config.get("tie_word_embeddings")) == tied
    assert before.embedding == rows * {"float32": 4, "bfloat16": 2}[checkpoint.dtype]
    assert before.read_resident == before.resident_packed + before.resident_dense - before.embedding
    assert before.latent == latent
    assert {layer.format for layer in before.layers} == {"2-bit meta8"}
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    assert {layer.weights for layer in before.layers} == {3 * config["hidden_size"] * inner}
