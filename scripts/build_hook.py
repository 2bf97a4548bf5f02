"""Hatchling's hook: compiles the CPU kernels into the wheel, and leaves them out where that cannot be done.

The library has a plain C interface, so one wheel per platform, py3-none-PLATFORM, serves all versions of Python and
torch. Without a compiler the wheel is pure: moeflow installs and runs all the same, the warning here says why its CPU
kernels are off, and a note in the library's place repeats it when somebody asks, since pip shows a hook's output only
with -v. An editable install compiles into the source tree. Wheels for an index still need auditwheel.

    CXX                     the compiler's command; otherwise g++ or clang++
    MOEFLOW_NO_COMPILER=1   a pure wheel, whatever is there
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "moeflow/kernels"
LIBRARY = "_cpu.so"
NOTE = "_cpu.missing"  # why there is no library; read by moeflow/kernels/library.py


class CompiledKernels(BuildHookInterface):
    """Adds the library, or the note, to a wheel that hatchling is about to write."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile. `version` is hatchling's kind of wheel: standard or editable."""
        if version == "editable":
            self._make(Path(self.root, KERNELS))
            return
        self._directory = tempfile.TemporaryDirectory()  # not the source tree, which may be an editable install's
        made = self._make(Path(self._directory.name))
        build_data["force_include"][str(made)] = f"{KERNELS}/{made.name}"
        if made.name == LIBRARY:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
            build_data["pure_python"] = False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """The wheel is written: what went into it may go."""
        if version != "editable":
            self._directory.cleanup()

    def _make(self, directory: Path) -> Path:
        """The library in `directory`, or else the note; never both, nor one of an earlier build."""
        library, note = directory / LIBRARY, directory / NOTE
        reason = self._compile(library)
        if reason is None:
            note.unlink(missing_ok=True)
            return library
        library.unlink(missing_ok=True)
        note.write_text(reason + "\n", encoding="utf-8")
        self.app.display_warning(f"warning: moeflow's CPU kernels are off: {reason}")
        return note

    def _compile(self, target: Path) -> str | None:
        """None when it is done, else why not, in one line."""
        if os.environ.get("MOEFLOW_NO_COMPILER") == "1":
            return "MOEFLOW_NO_COMPILER was set"
        # by its path: in pip's build environment neither moeflow nor what it imports is installed
        spec = importlib.util.spec_from_file_location("cpp_build", Path(self.root, KERNELS, "cpp_build.py"))
        cpp_build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cpp_build)
        try:
            cpp_build.build(target, os.environ.get("CXX"))
        except Exception as error:  # whatever it is, moeflow is installed without its CPU kernels
            first, *rest = str(error).splitlines() or [repr(error)]
            return " ".join([first, *[line.strip() for line in rest if "error" in line][:1]])
        return None
