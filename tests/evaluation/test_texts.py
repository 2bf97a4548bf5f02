"""Texts from files and, through a stand-in for `datasets`, by name: what is asked for and how it is joined."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moeflow.errors import DocumentError, StorageError, UsageError
from moeflow.evaluation.texts import DATASETS, dataset_text, file_text


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Größe\r\n\n".encode())
    assert file_text(path) == "Größe\r\n\n"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(StorageError, match=r"a\.txt: cannot read: no such file"):
        file_text(path)
    path.write_bytes(b"ab\xff")
    with pytest.raises(DocumentError, match="byte 2 is not UTF-8"):
        file_text(path)
    path.write_text(" \n")
    with pytest.raises(UsageError, match="the text is empty"):
        file_text(path)


@pytest.mark.parametrize(
    ("name", "path", "column", "separator", "split"),
    [
        ("wikitext-2", "Salesforce/wikitext", "text", "\n\n", "test"),
        ("c4", "allenai/c4", "text", " ", "validation[:1100]"),
        ("ptb", "ptb-text-only/ptb_text_only", "sentence", " ", "test"),
    ],
)
def test_a_name_is_the_part_that_papers_use(
    monkeypatch: pytest.MonkeyPatch, name: str, path: str, column: str, separator: str, split: str
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(source: str, **arguments: Any) -> dict[str, list[str]]:
        asked.append((source, arguments))
        return {column: ["One.", "", "Two."]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert dataset_text(name) == separator.join(["One.", "", "Two."])
    ((source, arguments),) = asked
    assert (source, arguments["split"]) == (path, split)


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in DATASETS:
        with pytest.raises(UsageError, match="pip install datasets, or give the text as a file: --text FILE"):
            dataset_text(name)
    with pytest.raises(UsageError, match="unknown data set 'wikitext'; known: c4, ptb, wikitext-2"):
        dataset_text("wikitext")


def test_without_a_network_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(source: str, **_: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{source}' on the Hub\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(StorageError, match=r"Couldn't reach 'allenai/c4' on the Hub; fetch it once .* --text FILE"):
        dataset_text("c4")
