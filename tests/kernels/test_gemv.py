"""Products with packed matrices, and their unpacking, against dequantize + matmul on fresh random inputs.

Here the kernels are run by the emulator; test_gemv_gpu.py runs the same checks on a device.
"""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, spread
from gemv_checks import FORMATS, check_gates, check_not_a_number, check_product, check_unpack, matrix_of

from moeflow.kernels.compiler import SOURCE, compile_cubin
from moeflow.kernels.gemv import Gemv

emulator = pytest.importorskip("emulator.launcher")
emulated = pytest.mark.skipif(not emulator.available(), reason="no g++")

CPU = torch.device("cpu")
SCHEMES = ("hqq 2 64", "hqq 3 64", "hqq 4 64", "hqq 8 64", "hqq 2 16 8", "nf4", "int8", "none bfloat16")


@emulated
@pytest.mark.parametrize("scheme", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_product(scheme: str, tokens: int) -> None:
    order = ("forward", "reverse", "random")[tokens % 3]
    check_product(emulator.EmulatedLauncher(order), CPU, scheme, tokens, rows=40, columns=384)


@emulated
@pytest.mark.parametrize("gate", ["SILU", "GELU", "GELU_TANH", "RELU", "CLAMPED"])
def test_gates(gate: str) -> None:
    check_gates(emulator.EmulatedLauncher(), CPU, gate)


@emulated
@pytest.mark.parametrize("scheme", ["hqq 4 64", "nf4", "int8", "none float16"])
def test_what_is_no_number_stays_none(scheme: str) -> None:
    check_not_a_number(emulator.EmulatedLauncher(), CPU, scheme)


@emulated
@pytest.mark.parametrize("scheme", FORMATS, ids=str)
def test_unpack_is_dequantize_bit_for_bit(scheme: str) -> None:
    check_unpack(emulator.EmulatedLauncher("random"), CPU, scheme, rows=5, columns=384)


@pytest.mark.parametrize(("arch", "scheme"), spread(SCHEMES))
def test_every_format_compiles(arch: int, scheme: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    form = Gemv(None, matrix_of(scheme, 8, 384), CPU)._format  # type: ignore[arg-type]
    for tokens in (1, 8):
        defines = {**form.defines, "ROWS": 2, "TOKENS": tokens, "OUTPUT": 2, "COLUMNS": 384}
        assert compile_cubin("gemv.cu", defines, arch)
    assert compile_cubin("activation.cu", {**form.defines, "GATE": "SILU", "INPUT": 0}, arch)
    if not scheme.startswith("none"):
        assert compile_cubin("unpack.cu", {**form.defines, "OUTPUT": 2}, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_source_compiles(arch: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    for lfu in (0, 1):
        tables = {"EXPERTS": 128, "GUESSES": 8, "WARPS": 64, "LFU": lfu}
        assert compile_cubin("cache.cu", tables, arch)
        assert compile_cubin("copy.cu", tables, arch)
        assert compile_cubin("hand_over.cu", tables, arch)
    assert compile_cubin("publish.cu", {}, arch)
    assert {path.name for path in SOURCE.glob("*.cu")} >= {"gemv.cu", "activation.cu", "cache.cu", "copy.cu"}
