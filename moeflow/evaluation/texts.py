"""Texts to evaluate on: any file of UTF-8, or WikiText-2, C4 and PTB by name through the library `datasets`.

The parts and separators are those of GPTQ's evaluation, which later papers of quantization share, so that figures can
stand beside theirs: WikiText-2 raw, test, lines joined by two newlines; C4 English, the first 1,100 documents of the
first validation file, joined by spaces; PTB, test, sentences joined by spaces. `datasets` is imported when a name is
asked for; it looks into its own cache first, so a machine that has them needs no network. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeflow.errors import StorageError, UsageError, unknown
from moeflow.files import read_text

__all__ = ["DATASETS", "dataset_text", "file_text"]


@dataclass(frozen=True)
class _Part:
    """What of a data set is read, and how it becomes one text."""

    path: str
    column: str
    separator: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    split: str = "test"


C4_FILE = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
DATASETS: Mapping[str, _Part] = {
    "wikitext-2": _Part("Salesforce/wikitext", "text", "\n\n", {"name": "wikitext-2-raw-v1"}),
    "c4": _Part("allenai/c4", "text", " ", {"data_files": C4_FILE}, "validation[:1100]"),
    # The hub's own conversion: the data set itself is a script, which the library no longer runs.
    "ptb": _Part("ptb-text-only/ptb_text_only", "sentence", " ", {"revision": "refs/convert/parquet"}),
}


def file_text(path: Path) -> str:
    """The whole file.

    Raises:
        StorageError: it cannot be read.
        DocumentError: it is not UTF-8.
        UsageError: it is empty.
    """
    text = read_text(path)
    if not text.strip():
        raise UsageError(f"{path}: the text is empty")
    return text


def dataset_text(name: str) -> str:
    """The text of a data set.

    Raises:
        UsageError: the name is unknown, or `datasets` is not installed.
        StorageError: it is neither in the library's cache nor to be had from the network.
    """
    if name not in DATASETS:
        raise UsageError(unknown("data set", name, DATASETS))
    part = DATASETS[name]
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{name} is read by the library `datasets`, which is not installed: pip install datasets, "
            "or give the text as a file: --text FILE"
        ) from error
    try:
        rows = datasets.load_dataset(part.path, split=part.split, **part.arguments)
    except Exception as error:  # the library and its clients raise dozens of kinds, few of them documented
        reason = str(error).partition("\n")[0]
        raise StorageError(
            f"{name}: `datasets` cannot load {part.path}: {reason}; fetch it once where there is a network, "
            "or give the text as a file: --text FILE"
        ) from error
    return part.separator.join(rows[part.column])
