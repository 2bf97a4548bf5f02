"""Where the CPU kernels are missing or unusable, the message says which of the two, why, and what to do."""

from __future__ import annotations

import _ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeflow.errors import DeviceError
from moeflow.kernels import library as module
from moeflow.kernels.library import library, why_not


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the library is looked for, in this test alone."""
    monkeypatch.setattr(module, "LIBRARY", tmp_path / "_cpu.so")
    module._open.cache_clear()
    yield module.LIBRARY
    module._open.cache_clear()


def refused(reason: str) -> None:
    assert (why_not() or "").startswith(reason)
    assert (why_not() or "").endswith(module.REMEDY)
    with pytest.raises(DeviceError) as raised:
        library()
    assert str(raised.value) == f"CPU kernels are off: {why_not()}"


def test_what_was_compiled_here_is_usable() -> None:
    """Where this checkout is an editable install; a failed compilation fails here."""
    if not list(module.LIBRARY.parent.glob("_cpu.*")):
        pytest.skip("nothing was compiled here: pip install --editable .")
    reason = why_not()
    if any(expected in (reason or "") for expected in ("MOEFLOW_NO_COMPILER", "no C++ compiler")):
        pytest.skip(reason)
    assert reason is None


def test_a_checkout_without_a_build(place: Path) -> None:
    assert not place.exists()
    refused("_cpu.so was not built; install moeflow again with a C++ compiler, g++ or clang++")


def test_an_installation_that_noted_why(place: Path) -> None:
    place.with_suffix(".missing").write_text("g++ failed: error: no such instruction\n")
    refused("_cpu.so was not built: g++ failed: error: no such instruction; install moeflow again")


def test_a_file_that_the_loader_refuses(place: Path) -> None:
    place.write_bytes(b"\x7fELF" + bytes(1000))
    refused(f"_cpu.so cannot be loaded: {place}: ")


def test_a_library_of_another_kind(place: Path) -> None:
    shutil.copy(_ctypes.__file__, place)
    refused(f"_cpu.so has interface None, and this moeflow needs {module.INTERFACE}")


def test_it_is_opened_once(place: Path) -> None:
    first = why_not()
    place.with_suffix(".missing").write_text("written later")
    assert why_not() is first
