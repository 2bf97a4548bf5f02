"""CUDA C++ to machine code by NVRTC, the run-time compiler that torch's CUDA wheels bring; kept on disk.

Machine code (cubin) for one real architecture, not PTX: the driver then has nothing left to translate, and an older
driver of the same major version takes the code of a newer compiler. No GPU is needed here. A file in the cache is
named by a digest of all that goes into it and begins with a digest of what it holds, so neither a changed source nor a
damaged file is ever run; a cache that cannot be written costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from moeflow.errors import DeviceError, StorageError
from moeflow.files import atomic_writer

__all__ = ["SOURCE", "Defines", "cached_cubin", "compile_cubin", "full_source"]

SOURCE = Path(__file__).parent / "source"
Defines = Mapping[str, int | str]

REMEDY = "`pip install moeflow[cuda]` brings it; cuda-bindings must have the major version of torch's CUDA ({})"
DIGEST = 32  # bytes of a SHA-256
_INCLUDE = re.compile(r'#include "([^"]+\.cuh)"\s*')


def full_source(name: str, directory: Path = SOURCE) -> str:
    """A source file with its `#include "NAME.cuh"` of neighbours in place, each once.

    One text is what is compiled and what the cache's digest is of, so nothing can be forgotten in the digest; `#line`
    keeps the compiler's messages right. What a source in another directory includes is looked for in `SOURCE` too.
    """
    seen: set[str] = set()

    def expand(file: str) -> list[str]:
        if file in seen:
            return []
        seen.add(file)
        place = directory / file if (directory / file).exists() else SOURCE / file
        lines = [f'#line 1 "{file}"']
        for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), 1):
            if include := _INCLUDE.fullmatch(line):
                lines += [*expand(include[1]), f'#line {number + 1} "{file}"']
            else:
                lines.append("" if line == "#pragma once" else line)
        return lines

    return "\n".join(expand(name)) + "\n"


def compile_cubin(source: str, defines: Defines, arch: int, directory: Path = SOURCE) -> bytes:
    """Machine code of a source file for compute capability `arch` (75: 7.5).

    Raises:
        DeviceError: the compiler is missing or refuses the source; what it says is included.
    """
    return _compile(full_source(source, directory), source, defines, arch)


def _compile(text: str, source: str, defines: Defines, arch: int) -> bytes:
    nvrtc, _ = _compiler()
    # In the text, not as -D, which would reach the compiler's own headers: one of them has a template parameter T.
    macros = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    options = [f"--gpu-architecture=sm_{arch}".encode(), b"-std=c++17", b"-default-device"]
    program = _check(nvrtc, nvrtc.nvrtcCreateProgram((macros + text).encode(), source.encode(), 0, [], []), source)
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program), source))
            nvrtc.nvrtcGetProgramLog(program, log)
            said = log.decode(errors="replace").rstrip("\0\n ")
            raise DeviceError(f"{source} {dict(defines)} does not compile for sm_{arch}: {result.name}\n{said}")
        cubin = bytearray(_check(nvrtc, nvrtc.nvrtcGetCUBINSize(program), source))
        _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin), source)
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _check(nvrtc: Any, result: tuple[Any, ...], source: str) -> Any:
    code, *values = result
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(f"{source}: NVRTC says {code.name}")
    return values[0] if values else None


@cache
def _compiler() -> tuple[Any, tuple[int, int]]:
    """The bindings and the version of NVRTC; the library itself is looked for at the first call."""
    try:
        from cuda.bindings import nvrtc

        result, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        import torch

        remedy = REMEDY.format(torch.version.cuda or "torch here is built for the CPU")
        raise DeviceError(f"NVIDIA's run-time compiler is missing ({error}): {remedy}") from error
    _check(nvrtc, (result,), "nvrtcVersion")
    return nvrtc, (major, minor)


def cached_cubin(source: str, defines: Defines, arch: int, directory: Path = SOURCE) -> bytes:
    """As `compile_cubin`, from the disk where it was compiled before."""
    text = full_source(source, directory)
    key = repr((text, sorted(defines.items()), arch, _compiler()[1]))
    try:
        place = _directory() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    except RuntimeError:  # there is no home directory
        return _compile(text, source, defines, arch)
    with contextlib.suppress(OSError):
        content = place.read_bytes()
        if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]:
            return content[DIGEST:]
    code = _compile(text, source, defines, arch)
    with contextlib.suppress(StorageError), atomic_writer(place) as stream:
        stream.write(hashlib.sha256(code).digest() + code)
    return code


def _directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeflow" / "kernels"
