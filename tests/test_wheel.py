"""Wheels, built from the unpacked source distribution: they carry the CPU kernels, or say why not.

What is in a wheel is loaded by an interpreter without site-packages, so that neither this checkout nor torch helps.
The kernels themselves take long to compile, and their own tests need them compiled anyway; here `CXX` is a script that
fails, or that writes a library with nothing but its version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="hatchling, which builds wheels, is not installed: pip install moeflow[dev]")
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from moeflow.kernels.library import INTERFACE

ROOT = Path(__file__).parent.parent
KERNELS = "moeflow/kernels"
FAILS = "echo 'gemv.cpp:1:1: error: no such instruction' >&2; exit 1"
TO_OUTPUT = 'while [ $# -gt 1 ] && [ "$1" != -o ]; do shift; done; '
WRITES = TO_OUTPUT + 'echo compiled > "$2"'
COMPILES = TO_OUTPUT + """echo 'extern "C" int moeflow_version() { return %d; }' | %s -x c++ -shared -fPIC - -o "$2\""""
GXX = shutil.which("g++") or shutil.which("clang++")
EDITABLE = ("-m", "hatchling", "build", "-t", "wheel:editable", "--hooks-only")  # the rest needs another package


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hatchling(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")[0]


@pytest.fixture
def source(archive: Path, tmp_path: Path) -> Path:
    """The unpacked source distribution."""
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    return next(tmp_path.glob("moeflow-*"))


def python(*arguments: object, cwd: Path, **environment: str) -> str:
    """Its output, with `environment` for all that a build listens to."""
    clean = {key: value for key, value in os.environ.items() if key not in ("CXX", "MOEFLOW_NO_COMPILER", "PYTHONPATH")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=clean | environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def hatchling(source: Path, to: Path, kind: str = "wheel", **environment: str) -> tuple[Path, str]:
    """The file that it makes, and its output."""
    said = python("-m", "hatchling", "build", "-t", kind, "-d", to, cwd=source, **environment)
    return next(to.iterdir()), said


def compiler(directory: Path, script: str) -> str:
    path = directory / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def unpacked(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(wheel.parent)
        return set(packed.namelist())


def answer(wheel: Path, code: str) -> str:
    """What `code` prints where only the unpacked wheel can be imported."""
    code = f"from moeflow.kernels.library import library, why_not; import moeflow.kernels.library as module; {code}"
    return python("-S", "-c", code, cwd=wheel.parent, PYTHONPATH=str(wheel.parent)).strip()


def sources(kernels: Path) -> set[str]:
    return {f"{KERNELS}/cpp/{path.name}" for path in (kernels / "cpp").iterdir()}


@pytest.mark.skipif(GXX is None, reason="no C++ compiler")
def test_a_compiler_puts_the_kernels_into_a_wheel_for_this_platform(source: Path, tmp_path: Path) -> None:
    wheel, said = hatchling(source, tmp_path / "wheels", CXX=compiler(tmp_path, COMPILES % (INTERFACE, GXX)))
    assert "warning" not in said
    (tag,) = parse_wheel_filename(wheel.name)[3]
    assert tag in set(sys_tags()), "pip would refuse it here"
    assert (tag.interpreter, tag.abi) == ("py3", "none")
    assert tag.platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")
    names = unpacked(wheel)
    assert f"{KERNELS}/_cpu.so" in names
    assert f"{KERNELS}/_cpu.missing" not in names
    assert sources(ROOT / KERNELS) <= names
    metadata = next(wheel.parent.glob("*.dist-info/WHEEL")).read_text()
    assert "Root-Is-Purelib: false" in metadata
    assert answer(wheel, "print(why_not(), library().moeflow_version())") == f"None {INTERFACE}"
    other = answer(wheel, "module.INTERFACE += 1; print(why_not())")
    assert other.startswith(
        f"_cpu.so has interface {INTERFACE}, and this moeflow needs {INTERFACE + 1}; install moeflow"
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MOEFLOW_NO_COMPILER": "1"}, "MOEFLOW_NO_COMPILER was set"),
        ({"PATH": ""}, "no C++ compiler"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
        ({"CXX": FAILS}, "error: no such instruction"),
    ],
    ids=["unwanted", "none", "missing", "failing"],
)
def test_without_a_compiler_the_wheel_is_pure_and_says_why(
    source: Path, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    if environment.get("CXX") == FAILS:
        environment = {"CXX": compiler(tmp_path, FAILS)}
    wheel, said = hatchling(source, tmp_path / "wheels", **environment)
    (warning,) = (line for line in said.splitlines() if "warning" in line)
    assert warning.startswith("warning: moeflow's CPU kernels are off: ")
    assert reason in warning
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in unpacked(wheel) if name.endswith(".so")]
    missing = answer(wheel, "print(why_not())")
    assert missing.startswith("_cpu.so was not built: ")
    assert reason in missing
    assert "install moeflow again" in missing


def test_an_editable_install_compiles_into_the_source_tree(source: Path, tmp_path: Path) -> None:
    kernels = source / KERNELS
    (kernels / "_cpu.missing").write_text("earlier")
    python(*EDITABLE, cwd=source, CXX=compiler(tmp_path, WRITES))
    assert {path.name for path in kernels.glob("_cpu.*")} == {"_cpu.so"}
    assert (kernels / "_cpu.so").read_text() == "compiled\n"
    # what cannot be compiled any more is not left from before
    assert "CPU kernels are off" in python(*EDITABLE, cwd=source, CXX=compiler(tmp_path, FAILS))
    assert {path.name for path in kernels.glob("_cpu.*")} == {"_cpu.missing"}


def test_what_an_editable_install_compiled_is_in_no_archive(source: Path, tmp_path: Path) -> None:
    (source / KERNELS / "_cpu.so").write_text("old")
    wheel, _ = hatchling(source, tmp_path / "wheels", MOEFLOW_NO_COMPILER="1")
    assert f"{KERNELS}/_cpu.so" not in unpacked(wheel)
    again, _ = hatchling(source, tmp_path / "again", "sdist")
    with tarfile.open(again) as packed:
        names = {name.split("/", 1)[1] for name in packed.getnames()}
    assert f"{KERNELS}/_cpu.so" not in names
    assert sources(ROOT / KERNELS) <= names
