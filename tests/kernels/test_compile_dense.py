"""The dense part's sources through NVRTC, for every architecture that moeflow serves; no GPU is needed."""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, spread

from moeflow.errors import DeviceError
from moeflow.kernels.compiler import compile_cubin

# Element, width of keys, width of values, rows.
SHAPES = ((1, 64, 64, 8), (2, 96, 96, 1), (1, 128, 128, 4), (2, 128, 128, 8), (2, 192, 128, 8), (0, 256, 256, 4))


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        compile_cubin("dense.cu", {"ELEMENT": 0}, 90)
    except DeviceError as error:
        if "missing" in str(error) or "libnvrtc" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dense(arch: int) -> None:
    for element, vectors, late in ((0, 2, 1), (1, 1, 1), (2, 1, 0)):
        code = compile_cubin("dense.cu", {"ELEMENT": element, "VECTORS": vectors, "LATE": late}, arch)
        assert all(name in code for name in (b"rms_norm", b"rotate", b"append"))


@pytest.mark.parametrize(("arch", "shape"), spread(SHAPES))
def test_attention(arch: int, shape: tuple[int, int, int, int]) -> None:
    defines = dict(zip(("ELEMENT", "WIDTH", "VALUES", "ROWS"), shape, strict=True))
    for fresh in (0, 1):
        assert b"attend" in compile_cubin("attention.cu", {**defines, "FRESH": fresh, "TOKENS": 1 + fresh}, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_junctions_and_routers(arch: int) -> None:
    form = {"KIND": "AFFINE", "BITS": 2, "GROUP": 64, "META": 16, "LAY_OUT": 1}
    row = {"ELEMENT": 2, "COLUMNS": 4096, "EACH": 1, "LATE": 0, "WEIGHT": 0}
    for added in ("NOTHING", "TENSOR", "EXPERTS"):
        assert b"junction" in compile_cubin("junction.cu", {**row, **form, "ADD": added}, arch)
    router = {"ELEMENT": 1, "MATRIX": 0, "EXPERTS": 128, "CHOICES": 8, "COLUMNS": 2048, "NORMALIZE": 1, "WEIGHT": 1}
    for first in ("SCORES", "CHOICE"):
        assert b"route" in compile_cubin("router.cu", {**router, "FIRST": first}, arch)
