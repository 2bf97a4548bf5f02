"""Finds the backend for a scheme. A new backend is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

from moeflow.errors import DocumentError, unknown
from moeflow.quantization.base import Quantizer
from moeflow.schema.quantization import Scheme

__all__ = ["quantizer_for", "library_version"]

# Named, not imported: hqq and bitsandbytes take 5 s each to import.
BACKENDS = {
    "bitsandbytes": ("moeflow.quantization.bitsandbytes", "BitsAndBytesQuantizer"),
    "hqq": ("moeflow.quantization.hqq", "HqqQuantizer"),
    "none": ("moeflow.quantization.dense", "DenseQuantizer"),
}


def quantizer_for(scheme: Scheme) -> Quantizer:
    """The quantizer of `scheme.backend`, with the scheme's settings."""
    if scheme.backend not in BACKENDS:
        raise DocumentError(unknown("quantization backend", scheme.backend, BACKENDS))
    module, name = BACKENDS[scheme.backend]
    quantizer: Quantizer = getattr(import_module(module), name)(scheme)
    return quantizer


def library_version(scheme: Scheme) -> str:
    """Version of the library that decides the codes; a change of it makes packed shards outdated."""
    return "" if scheme.backend == "none" else version(scheme.backend)
