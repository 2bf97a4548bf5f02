"""The checks of test_gemv.py on a CUDA device, and at Mixtral's shapes."""

from __future__ import annotations

import pytest
import torch
from gemv_checks import FORMATS, check_gates, check_not_a_number, check_product, check_unpack

from moeflow.kernels.launcher import CudaLauncher, cuda_launcher

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda() -> CudaLauncher:
    return cuda_launcher(torch.device("cuda"))


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
def test_product(cuda: CudaLauncher, scheme: str, tokens: int) -> None:
    check_product(cuda, torch.device("cuda"), scheme, tokens, rows=200, columns=1536)


@pytest.mark.parametrize("scheme", ["hqq 2 64", "hqq 3 64", "hqq 4 64", "hqq 2 16 8", "nf4"])
@pytest.mark.parametrize("shape", [(28672, 4096), (4096, 14336), (1536, 2048), (2048, 768)], ids=str)
def test_real_shapes(cuda: CudaLauncher, scheme: str, shape: tuple[int, int]) -> None:
    check_product(cuda, torch.device("cuda"), scheme, 1, *shape)
    check_unpack(cuda, torch.device("cuda"), scheme, shape[0] // 8, shape[1])


@pytest.mark.parametrize("gate", ["SILU", "GELU", "GELU_TANH", "RELU", "CLAMPED"])
def test_gates(cuda: CudaLauncher, gate: str) -> None:
    check_gates(cuda, torch.device("cuda"), gate)


@pytest.mark.parametrize("scheme", ["hqq 4 64", "nf4", "int8", "none float16"])
def test_what_is_no_number_stays_none(cuda: CudaLauncher, scheme: str) -> None:
    check_not_a_number(cuda, torch.device("cuda"), scheme)


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
def test_unpack_is_dequantize_bit_for_bit(cuda: CudaLauncher, scheme: str) -> None:
    check_unpack(cuda, torch.device("cuda"), scheme, rows=37, columns=1536)
