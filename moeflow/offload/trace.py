"""Recorded routes as a file: which experts each token used in each layer of one model.

A trace is a compressed `.npz` of plain arrays, so that any numpy reads it without moeflow and nothing in it can
run: `routes` int16 [T, L, K] in the router's order, likeliest first; `experts`, how many a layer has; `model`, for
people; `format_version`; and, where the first tokens were a prompt, `prompt`, how many. There is no text in it and no
token id. Knows neither where routes come from nor what they are good for.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeflow.errors import DocumentError
from moeflow.files import atomic_writer, storage_errors

__all__ = ["Routes", "Trace", "save_trace", "load_trace"]

Routes = npt.NDArray[np.int16]
"""[T, L, K]: per token and MoE layer, the experts that it uses, all different."""

FORMAT_VERSION = 1
_KEYS = ("routes", "experts", "model", "format_version")
_PROMPT = "prompt"  # may be missing, and readers that do not know it pass over it
# What numpy and zipfile make of bytes that are no archive of plain arrays.
_DAMAGE = (
    ValueError, KeyError, EOFError, OSError, AttributeError, MemoryError, NotImplementedError, RuntimeError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """A recording of one model's router."""

    routes: Routes
    experts: int
    """Per layer."""
    model: str
    prompt: int = 0
    """The first so many tokens were given to the model before it wrote the rest; 0 where that is not told."""

    def require(self, layers: int, experts: int, top_k: int, place: str) -> None:
        """Check that the trace fits a model.

        Raises:
            DocumentError: it was recorded with another shape; the message names `place` and both shapes.
        """
        found = (*self.routes.shape[1:], self.experts)
        if found != (layers, top_k, experts):
            raise DocumentError(
                f"{place}: a trace of {self.model} with {found[0]} layers, top-{found[1]} of {found[2]} experts; "
                f"this model has {layers} layers, top-{top_k} of {experts}: record one with it"
            )


def save_trace(path: Path, trace: Trace) -> None:
    """Write a trace, atomically.

    Raises:
        DocumentError: it breaks a rule of the format.
        StorageError: the file cannot be written.
    """
    _check(trace.routes, trace.experts, str(path))
    _check_prompt(trace, str(path))
    told: dict[str, Any] = {_PROMPT: np.int64(trace.prompt)} if trace.prompt else {}
    with atomic_writer(path) as stream:
        np.savez_compressed(
            stream,
            routes=trace.routes,
            experts=np.int64(trace.experts),
            model=np.str_(trace.model),
            format_version=np.int64(FORMAT_VERSION),
            **told,
        )


def load_trace(path: Path) -> Trace:
    """Read and check a trace.

    Raises:
        StorageError: the file cannot be read.
        DocumentError: it is damaged, no trace, of a newer format, or breaks a rule; the message says which.
    """
    with storage_errors(path, "read"):
        content = path.read_bytes()
    try:
        archive = np.load(io.BytesIO(content), allow_pickle=False)
        found = {key: archive[key] for key in archive.files if key in (*_KEYS, _PROMPT)}
    except _DAMAGE as error:
        wanted = ", ".join(_KEYS)
        raise DocumentError(f"{path}: damaged, or not a trace of routes (.npz of {wanted}); record it again") from error
    missing = [key for key in _KEYS if key not in found]
    if missing:
        raise DocumentError(f"{path}: not a trace of routes: it has no {', '.join(missing)}")
    version = _scalar(found, "format_version", "i", path)
    if version != FORMAT_VERSION:
        remedy = "upgrade moeflow" if version > FORMAT_VERSION else "record it again"
        raise DocumentError(f"{path}: format_version is {version}; this moeflow reads trace {FORMAT_VERSION}: {remedy}")
    experts = int(_scalar(found, "experts", "iu", path))
    _check(found["routes"], experts, str(path))
    prompt = int(_scalar(found, _PROMPT, "iu", path)) if _PROMPT in found else 0
    trace = Trace(found["routes"], experts, str(_scalar(found, "model", "U", path)), prompt)
    _check_prompt(trace, str(path))
    return trace


def _scalar(found: dict[str, npt.NDArray[Any]], key: str, kinds: str, path: Path) -> Any:
    value = found[key]
    if value.shape != () or value.dtype.kind not in kinds:
        wanted = "text" if kinds == "U" else "a whole number"
        raise DocumentError(f"{path}: {key} is {value.dtype} {list(value.shape)}; {wanted} is expected")
    return value[()]


def _check_prompt(trace: Trace, place: str) -> None:
    if not 0 <= trace.prompt <= len(trace.routes):
        raise DocumentError(f"{place}: prompt is {trace.prompt}; 0 to {len(trace.routes)}, the tokens, is expected")


def _check(routes: npt.NDArray[Any], experts: int, place: str) -> None:
    """The rules of `routes`; the first row that breaks one is named."""
    if routes.dtype != np.int16 or routes.ndim != 3 or not routes.size:
        raise DocumentError(
            f"{place}: routes is {routes.dtype} {list(routes.shape)}; "
            "int16 [tokens, layers, top_k] is expected, none of them 0"
        )
    ordered = np.sort(routes, axis=-1)
    for fault, broken in (
        (f"expert ids lie outside 0 to {experts - 1}", (ordered[..., 0] < 0) | (ordered[..., -1] >= experts)),
        ("an expert is named twice", (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)),
    ):
        if broken.any():
            token, layer = np.argwhere(broken)[0]
            row = routes[token, layer].tolist()
            raise DocumentError(f"{place}: routes of token {token}, layer {layer}: {fault}: {row}")
