"""The workspace of a pass: each term is what its shapes say, and the drivers differ where they should."""

from __future__ import annotations

import pytest

from moeflow.artifact.architectures import architecture
from moeflow.artifact.synthetic import synthetic_manifest
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.planning.workspace import SEGMENT, activations, library, matrices, workspace
from moeflow.schema import Cpu, Gpu, HardwareProfile, Link, Profile

MIB, GIB = 1 << 20, 1 << 30


def machine(capability: str = "9.0", memory: int = 80 * GIB) -> HardwareProfile:
    gpu = Gpu(name="g", memory=memory, compute_capability=capability)
    return HardwareProfile(
        name="box", origin="datasheet", gpu=gpu, cpu=Cpu(cores=8), ram=128 * GIB,
        link=Link(host_to_device=50_000_000_000),
    )  # fmt: skip


def profile(bits: int = 2, **settings: object) -> Profile:
    experts = {"backend": "hqq", "bits": bits, "group_size": 64} if bits < 16 else {"backend": "none"}
    attention = {"backend": "hqq", "bits": 4, "group_size": 64}
    quantization = {"experts": experts, "attention": attention}
    return Profile.parse({"model": "m", "quantization": quantization, "context_length": 1024, **settings}, "test")


def sizes(name: str = "mixtral-8x7b", bits: int = 2) -> ModelSizes:
    return ModelSizes.of_manifest(synthetic_manifest(architecture(name), profile(bits).quantization, name))


def test_device_driven_mixtral_by_hand() -> None:
    model = sizes()
    assert matrices(model, "bfloat16", "device") == 2 * 14336 * 4096 * 2  # gate and up, once
    # 512 tokens: residual and norm; sorted inputs and results of two experts each; all tokens at one expert
    assert activations(model, "bfloat16", 1024) == 512 * 2 * (2 * 4096 + 4 * 4096 + 4 * 14336)
    assert library(machine(), "device") == 3 * 32 * MIB
    assert library(machine("8.6"), "device") == 3 * (8 * MIB + 128 * 1024)
    parts = (matrices(model, "bfloat16", "device"), activations(model, "bfloat16", 1024), library(machine(), "device"))
    assert workspace(model, machine(), "bfloat16", 1024, "device") == sum(parts) + SEGMENT


@pytest.mark.parametrize(("bits", "scratch"), [(2, 8), (3, 16), (4, 8), (16, 0)])
def test_the_host_dequantizes_in_int32(bits: int, scratch: int) -> None:
    largest = 2 * 14336 * 4096
    model = sizes(bits=bits)
    assert model.scratch == scratch
    expected = largest * scratch if scratch else 4096 * 4096 * 8  # unquantized experts: attention's largest is left
    assert matrices(model, "bfloat16", "host") == expected
    assert matrices(model, "float16", "host") == largest * (scratch or 2)  # stored as bfloat16, so converted


def test_a_long_context_is_repeated_for_every_head() -> None:
    model = sizes("qwen3-30b-a3b")  # queries twice as wide as the model
    assert model.layers[0].hidden == 2048 and model.largest_resident == 4096 * 2048
    assert activations(model, "bfloat16", 32768) > 2 * 32768 * 4096 * 2
    assert activations(model, "bfloat16", 1024) == activations(model, "bfloat16", 2048)  # experts take more there


def test_who_drives_decides_the_workspace() -> None:
    model = sizes()
    plans = [make_plan(profile(execution=e), model, machine()) for e in ("auto", "device", "host")]
    assert [plan.execution for plan in plans] == ["device", "device", "host"]
    for plan in plans:
        expected = workspace(model, machine(), "bfloat16", 1024, plan.execution)
        assert plan.memory.workspace == expected
    # Too small for layer buffers, which the device's way needs: then the host's, with its workspace.
    small = make_plan(profile(), model, machine(memory=4 * GIB))
    assert (small.execution, small.stream_layers) == ("host", 0)
    assert small.memory.workspace == workspace(model, machine(), "bfloat16", 1024, "host")
