"""The run-time compiler and its cache on disk, and the launcher over a driver that only takes notes."""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES

from moeflow.errors import DeviceError
from moeflow.kernels import compiler
from moeflow.kernels.compiler import cached_cubin, full_source
from moeflow.kernels.launcher import CudaLauncher, compile_cubin, cuda_launcher

EMULATOR = Path(__file__).parent.parent / "emulator"


def bindings_are_here() -> bool:
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


def nvrtc_is_here() -> bool:
    try:
        compiler._compiler()
    except DeviceError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not nvrtc_is_here(), reason="NVRTC is not installed")
needs_bindings = pytest.mark.skipif(not bindings_are_here(), reason="cuda-bindings are not installed")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A kernel that includes a neighbour twice, which includes what only the package has."""
    (tmp_path / "shared.cuh").write_text('#pragma once\n#include "primitives.cuh"\n#define TWICE(x) (2 * (x))\n')
    text = '#include "shared.cuh"\n#include "shared.cuh"\n\n'
    (tmp_path / "small.cu").write_text(text + 'extern "C" __global__ void small(float* x) { *x = TWICE(VALUE); }\n')
    return tmp_path


@pytest.fixture
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moeflow" / "kernels"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was really compiled: file and architecture. Code is made up, and differs each time."""
    calls: list[tuple[str, int]] = []

    def compile_(_text: str, source: str, _defines: object, arch: int) -> bytes:
        calls.append((source, arch))
        return f"code {len(calls)}".encode()

    monkeypatch.setattr(compiler, "_compile", compile_)
    monkeypatch.setattr(compiler, "_compiler", lambda: (None, (13, 0)))
    return calls


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_compiles(arch: int, sources: Path) -> None:
    assert compile_cubin("probe.cu", {}, arch, EMULATOR).startswith(b"\x7fELF")
    assert compile_cubin("meeting.cu", {"T": "double", "WIDTH": 16}, arch, EMULATOR).startswith(b"\x7fELF")
    assert b"small" in compile_cubin("small.cu", {"VALUE": 3}, arch, sources)


@needs_nvrtc
def test_a_compile_error_names_the_place_the_macros_and_the_reason(sources: Path) -> None:
    with pytest.raises(DeviceError) as error:
        compile_cubin("small.cu", {"VALUE": "missing"}, 80, sources)
    said = str(error.value)
    assert "small.cu(4)" in said
    assert 'identifier "missing" is undefined' in said
    assert "'VALUE': 'missing'" in said
    assert "sm_80" in said
    (sources / "shared.cuh").write_text('#pragma once\n#include "primitives.cuh"\n\nint wrong = ;\n')
    with pytest.raises(DeviceError, match=r"shared\.cuh\(4\)"):
        compile_cubin("small.cu", {"VALUE": 1}, 80, sources)
    with pytest.raises(DeviceError, match="sm_7"):
        compile_cubin("small.cu", {"VALUE": 1}, 7, sources)


def test_a_source_holds_each_of_its_neighbours_once(sources: Path) -> None:
    text = full_source("small.cu", sources)
    assert text.count("define TWICE") == 1
    assert text.count("dp4a_us(unsigned") == 1
    assert "pragma once" not in text
    assert text.count("#include") == full_source("primitives.cuh").count("#include") == 1  # the emulator's own


def test_equal_sources_are_compiled_once(sources: Path, cache_directory: Path, compiled: list[object]) -> None:
    def code(source: str = "small.cu", arch: int = 80, **defines: int) -> bytes:
        return cached_cubin(source, defines, arch, sources)

    first = code(VALUE=1)
    assert code(VALUE=1) == first
    assert len(compiled) == len(list(cache_directory.iterdir())) == 1
    others = [code(VALUE=2), code(VALUE=1, arch=90), code(VALUE=1, MORE=1)]
    assert len({first, *others}) == 4
    header = sources / "shared.cuh"
    header.write_text(header.read_text() + "// changed\n")
    assert code(VALUE=1) not in {first, *others}
    assert len(compiled) == 5


@pytest.mark.usefixtures("cache_directory", "compiled")
def test_another_compiler_compiles_again(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_cubin("small.cu", {}, 80, sources)
    monkeypatch.setattr(compiler, "_compiler", lambda: (None, (13, 5)))
    assert cached_cubin("small.cu", {}, 80, sources) != first


@pytest.mark.parametrize("damage", [b"", b"short", None], ids=["emptied", "cut", "bit flipped"])
def test_a_damaged_file_is_compiled_again_and_replaced(
    damage: bytes | None, sources: Path, cache_directory: Path, compiled: list[object]
) -> None:
    cached_cubin("small.cu", {}, 80, sources)
    (file,) = cache_directory.iterdir()
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]) if damage is None else damage)
    again = cached_cubin("small.cu", {}, 80, sources)
    assert (again, len(compiled)) == (b"code 2", 2)
    assert cached_cubin("small.cu", {}, 80, sources) == again
    assert len(compiled) == 2


@pytest.mark.usefixtures("compiled")
def test_a_cache_that_cannot_be_written_costs_only_time(
    sources: Path, cache_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_directory.parent.parent.write_text("a file where the directory should be")
    assert cached_cubin("small.cu", {}, 80, sources) == b"code 1"
    assert cached_cubin("small.cu", {}, 80, sources) == b"code 2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert cached_cubin("small.cu", {}, 80, sources) == b"code 3"


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_cache_lies_in_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert compiler._directory() == tmp_path / ".cache" / "moeflow" / "kernels"


@pytest.fixture
def no_compiler_yet() -> Iterator[None]:
    compiler._compiler.cache_clear()
    yield
    compiler._compiler.cache_clear()


@pytest.mark.usefixtures("no_compiler_yet")
def test_missing_bindings_are_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"pip install moeflow\[cuda\]"):
        compile_cubin("primitives.cuh", {}, 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(DeviceError, match=r"pip install moeflow\[cuda\]"):
        cuda_launcher(torch.device("cuda"))


@needs_bindings
@pytest.mark.usefixtures("no_compiler_yet")
def test_a_missing_compiler_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def not_found() -> None:
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", not_found)
    with pytest.raises(DeviceError, match=r"libnvrtc\.so\.13.*pip install moeflow\[cuda\]"):
        compile_cubin("primitives.cuh", {}, 80)


def test_a_device_that_is_no_gpu_or_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="cpu"):
        cuda_launcher(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    with pytest.raises(DeviceError, match=r"V100 has compute capability 7\.0.*need 7\.5"):
        cuda_launcher(torch.device("cuda"))


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_FOUND = 500


class Driver:
    """Says yes to everything and writes it down; `answers` are what the next launches return."""

    CUresult = Result

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.calls: list[str] = []
        self.answers: list[Result] = []

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: object) -> tuple[Any, ...]:
            self.calls.append(name)
            return Result.CUDA_SUCCESS, (name, *arguments)

        return call

    def cuModuleGetFunction(self, module: object, name: bytes) -> tuple[Result, object]:  # noqa: N802
        return (Result.CUDA_ERROR_NOT_FOUND if name == b"missing" else Result.CUDA_SUCCESS), (module, name)

    def cuGetErrorString(self, code: Result) -> tuple[Result, bytes | None]:  # noqa: N802
        return Result.CUDA_SUCCESS, b"invalid argument" if code == Result.CUDA_ERROR_INVALID_VALUE else None

    def cuLaunchKernel(self, *arguments: Any) -> tuple[Result]:  # noqa: N802
        self.launches.append(arguments)
        return (self.answers.pop(0) if self.answers else Result.CUDA_SUCCESS,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Driver:
    for name in ("cache_directory", "compiled"):
        request.getfixturevalue(name)
    cuda_bindings = pytest.importorskip("cuda.bindings")
    fake = Driver()
    monkeypatch.setattr(cuda_bindings, "driver", fake, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    stream = type("Stream", (), {"cuda_stream": 1234})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return fake


def arguments_of(launch: tuple[Any, ...], kinds: str) -> list[Any]:
    """What the device would read from a launch's array of pointers."""
    types = {"p": ctypes.c_uint64, "i": ctypes.c_longlong, "f": ctypes.c_float}
    pointers = (ctypes.c_void_p * len(kinds)).from_address(launch[9])
    return [types[kind].from_address(pointers[i]).value for i, kind in enumerate(kinds)]


def test_arguments_arrive_as_the_convention_says(driver: Driver, sources: Path) -> None:
    kernel = CudaLauncher(torch.device("cuda", 0), sources).kernel("small.cu", "small", {"VALUE": 1})
    x = torch.zeros(3)
    kernel((4, 5, 6), 128, x, None, -7, 0.1, 1 << 40, -0.0, x[1:])
    (launch,) = driver.launches
    assert launch[1:9] == (4, 5, 6, 128, 1, 1, 0, 1234)
    found = arguments_of(launch, "ppififp")
    assert found == [x.data_ptr(), 0, -7, pytest.approx(0.1), 1 << 40, 0.0, x.data_ptr() + 4]
    assert str(found[5]) == "-0.0"
    kernel(9, 32)
    kernel(9, 32, 2.0, x)  # other types than before: memory of its own
    assert driver.launches[1][1:7] == (9, 1, 1, 32, 1, 1)
    assert arguments_of(driver.launches[2], "fp") == [2.0, x.data_ptr()]


def test_modules_and_functions_are_made_once(driver: Driver, sources: Path, compiled: list[tuple[str, int]]) -> None:
    launcher = CudaLauncher(torch.device("cuda", 0), sources)
    kernel = launcher.kernel("small.cu", "small", {"VALUE": 1, "MORE": "x"})
    assert launcher.kernel("small.cu", "small", {"MORE": "x", "VALUE": 1}) is kernel
    assert launcher.kernel("small.cu", "other", {"VALUE": 1, "MORE": "x"}) is not kernel
    assert compiled == [("small.cu", 86)]
    assert driver.calls.count("cuModuleLoadData") == 1
    assert driver.calls.count("cuCtxPushCurrent") == driver.calls.count("cuCtxPopCurrent") == 1
    launcher.kernel("small.cu", "small", {"VALUE": 2})
    assert len(compiled) == 2


def test_a_refused_launch_names_the_kernel_and_the_reason(driver: Driver, sources: Path) -> None:
    launcher = CudaLauncher(torch.device("cuda", 0), sources)
    kernel = launcher.kernel("small.cu", "small", {"VALUE": 1})
    driver.answers = [Result.CUDA_ERROR_INVALID_VALUE]
    with pytest.raises(DeviceError) as error:
        kernel((1, 2, 3), 4096)
    for part in ("small of small.cu", "(1, 2, 3)", "4096", "CUDA_ERROR_INVALID_VALUE: invalid argument"):
        assert part in str(error.value)
    with pytest.raises(DeviceError, match=r"missing of small\.cu: CUDA_ERROR_NOT_FOUND: unknown error"):
        launcher.kernel("small.cu", "missing")


def test_a_thread_without_a_context_gets_torchs(driver: Driver, sources: Path) -> None:
    kernel = CudaLauncher(torch.device("cuda", 0), sources).kernel("small.cu", "small")
    driver.answers = [Result.CUDA_ERROR_INVALID_CONTEXT]
    kernel(1, 32, 5)
    assert [arguments_of(launch, "i") for launch in driver.launches] == [[5], [5]]
    assert driver.calls.count("cuCtxSetCurrent") == 1
