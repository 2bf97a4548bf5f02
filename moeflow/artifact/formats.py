"""The formats that checkpoints are released in, by their config's `quantization_config`: plain, mxfp4, fp8.

A format is a file beside this one that makes plain tensors of headers, and an entry here. Weights that somebody
quantized afterwards (gptq, awq, bitsandbytes, ...) are refused: quantizing their rounded numbers again loses quality,
and the unquantized upload that they were made from exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeflow.artifact.fp8 import fp8_tensors
from moeflow.artifact.mxfp4 import mxfp4_tensors
from moeflow.artifact.safetensors import TensorInfo
from moeflow.artifact.stored import Plain, Stored
from moeflow.errors import CheckpointError

__all__ = ["stored_tensors"]

FORMATS = ("mxfp4", "fp8")
REMEDY = "use the model's unquantized upload"


def stored_tensors(config: Mapping[str, Any], headers: Mapping[str, TensorInfo], place: Path) -> dict[str, Stored]:
    """The plain tensors of a checkpoint, by the names that an unquantized release gives them.

    Args:
        config: its config.
        headers: the tensors on disk.
        place: the config's file, for messages.

    Raises:
        CheckpointError: the format is none that is read, or codes and scales do not belong together.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None:
        return {name: _plain(info) for name, info in headers.items()}
    method = _method(settings)
    if method == "mxfp4":
        return mxfp4_tensors(headers, _dtype(config), place)
    if method == "fp8":
        return fp8_tensors(headers, _dtype(config), settings, place)
    raise CheckpointError(
        f"{place}: quantization_config says {method!r}; moeflow packs plain weights and those released as "
        f"{' or '.join(FORMATS)}; {REMEDY}"
    )


def _method(settings: Any) -> str:
    """The name of the format, also where old bitsandbytes configs leave it out."""
    if not isinstance(settings, Mapping):
        return str(settings)
    loads = any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    return str(settings.get("quant_method") or ("bitsandbytes" if loads else "no quant_method")).lower()


def _dtype(config: Mapping[str, Any]) -> str:
    """What is dequantized becomes: the dtype of the model, where that has the range."""
    named = config.get("dtype") or config.get("torch_dtype")
    return "F32" if named == "float32" else "BF16"


def _plain(info: TensorInfo) -> Stored:
    if info.dtype.startswith("F8_"):
        raise CheckpointError(
            f"{info.file}: {info.name} is stored as {info.dtype}; supported: F32, BF16, F16; the config has no "
            f"quantization_config that says where its scales are; {REMEDY}"
        )
    return Plain(info)
