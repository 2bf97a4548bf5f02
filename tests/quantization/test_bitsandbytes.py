"""nf4 and int8 against bitsandbytes' own functions, on fresh random weights."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moeflow.kernels.dequantize import NF4_CODEBOOK
from moeflow.quantization.bitsandbytes import BitsAndBytesQuantizer
from moeflow.schema import BitsAndBytesScheme

ROWS, COLUMNS = 48, 512
NF4, INT8 = (BitsAndBytesQuantizer(BitsAndBytesScheme.model_validate({"format": f})) for f in ("nf4", "int8"))


@pytest.fixture(scope="module")
def functional() -> Any:
    """bitsandbytes.functional, imported as the backend imports it, so that a test fails where that would warn."""
    NF4.quantize(torch.zeros(1, 64))
    import bitsandbytes.functional

    return bitsandbytes.functional


def _generator() -> torch.Generator:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def _gaussian() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=_generator()) * 0.02


def _heavy_tailed() -> Tensor:
    draws = torch.randn(4, ROWS, COLUMNS, generator=_generator())
    return draws[0] / draws[1:].square().mean(0).sqrt() * 0.02


weights = pytest.mark.parametrize("weight", [_gaussian, _heavy_tailed])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def test_the_codebook_is_bitsandbytes_own(functional: Any) -> None:
    _, state = functional.quantize_4bit(torch.ones(64), quant_type="nf4", blocksize=64)
    assert torch.equal(state.code.cpu(), torch.tensor(NF4_CODEBOOK, dtype=torch.float32))
    assert torch.tensor(NF4_CODEBOOK).tolist() == list(NF4_CODEBOOK)


@weights
@dtypes
def test_nf4_is_bitsandbytes_to_the_rounding_of_scales(
    functional: Any, weight: Callable[[], Tensor], dtype: torch.dtype
) -> None:
    """float16 rounds a scale by at most 2**-11 of itself; weights of 0.02 keep it in the normal range."""
    original = weight().to(dtype)
    stored = NF4.quantize(original)
    packed, state = functional.quantize_4bit(original, quant_type="nf4", blocksize=64)
    expected = functional.dequantize_4bit(packed, state).double()
    scales = stored.factors["scales"]
    assert (stored.codes.dtype, stored.codes.shape) == (torch.uint8, original.shape)
    assert (scales.dtype, scales.shape) == (torch.float16, (ROWS, COLUMNS // 64))
    assert torch.equal(scales, original.view(ROWS, -1, 64).abs().amax(-1).half())
    table = torch.tensor(NF4_CODEBOOK, dtype=torch.float64)
    restored = table[stored.codes.long()] * scales.double().repeat_interleave(64, dim=1)
    mantissa = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]  # of bitsandbytes' result
    bound = expected.abs() * (2.0**-11 + 2.0 ** -(mantissa + 1)) * 1.01
    if dtype == torch.float16:
        bound += 2.0**-25  # half of its smallest step
    assert ((restored - expected).abs() <= bound).all()


@weights
def test_nf4_takes_the_nearest_of_its_numbers(weight: Callable[[], Tensor]) -> None:
    original = weight()
    stored = NF4.quantize(original)
    table = torch.tensor(NF4_CODEBOOK, dtype=torch.float64)
    scaled = original.double() / original.view(ROWS, -1, 64).abs().amax(-1).double().repeat_interleave(64, dim=1)
    best = (scaled.unsqueeze(-1) - table).abs().amin(-1)
    assert ((table[stored.codes.long()] - scaled).abs() <= best + 1e-6).all()


@weights
def test_int8_is_bitsandbytes_to_the_bit(functional: Any, weight: Callable[[], Tensor]) -> None:
    """Its function is made for float16; the same weights in float32 give the same codes."""
    original = weight().half()
    stored = INT8.quantize(original)
    codes, largest, outliers = functional.int8_vectorwise_quant(original.float())
    assert outliers is None
    assert torch.equal(stored.codes.view(torch.int8), codes)
    assert torch.equal(stored.factors["scales"], largest / 127)
    assert stored.factors["scales"].dtype == torch.float32
    expected = functional.int8_vectorwise_dequant(codes, largest)  # multiplies by a float32 near 1 / 127
    restored = stored.codes.view(torch.int8).float() * stored.factors["scales"].unsqueeze(1)
    torch.testing.assert_close(restored, expected, rtol=1e-6, atol=0)


@weights
@dtypes
def test_int8_is_off_by_half_a_step_at_most(weight: Callable[[], Tensor], dtype: torch.dtype) -> None:
    original = weight().to(dtype)
    stored = INT8.quantize(original)
    scales = stored.factors["scales"].double().unsqueeze(1)
    codes = stored.codes.view(torch.int8).double()
    assert ((codes * scales - original.double()).abs() <= scales * (0.5 + 1e-4)).all()
    assert (codes.abs().amax(1) == 127).all()


@pytest.mark.parametrize("quantizer", [NF4, INT8], ids=lambda q: q.scheme.label)
def test_rows_of_zeros_stay_zeros(quantizer: BitsAndBytesQuantizer) -> None:
    weight = _gaussian()
    weight[3] = 0
    stored = quantizer.quantize(weight)
    assert (stored.factors["scales"][3] == 0).all()
    assert torch.isfinite(stored.factors["scales"].float()).all()
    zero = NF4_CODEBOOK.index(0.0) if quantizer is NF4 else 0
    assert (stored.codes[3] == zero).all()


@pytest.mark.parametrize("quantizer", [NF4, INT8], ids=lambda q: q.scheme.label)
def test_the_weights_are_left_alone_and_a_view_serves(quantizer: BitsAndBytesQuantizer) -> None:
    weight = _gaussian()
    before = weight.clone()
    turned = quantizer.quantize(weight.t().contiguous().t())
    assert torch.equal(turned.codes, quantizer.quantize(weight).codes)
    assert torch.equal(weight, before)


def test_the_library_is_imported_without_its_warnings_and_keeps_its_log_level() -> None:
    script = (
        "import torch; from moeflow.quantization.registry import quantizer_for; from moeflow.schema import *;"
        "quantizer_for(BitsAndBytesScheme(format='nf4')).quantize(torch.ones(1, 64));"
        "import logging; assert logging.getLogger('bitsandbytes').level == logging.NOTSET"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout + result.stderr == ""
