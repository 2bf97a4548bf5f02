"""docs/models.md lists what the tests run, with what each test model covers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import FAMILIES
from tiny_families import UNLISTED

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.families import FAMILIES as DECLARED

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def tool() -> Any:
    specification = importlib.util.spec_from_file_location("models_docs", ROOT / "tools" / "models_docs.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_declared_family_is_run_and_listed() -> None:
    page = (ROOT / "docs/models.md").read_text()
    assert set(FAMILIES) == set(DECLARED)
    for name in (*DECLARED, *UNLISTED):
        assert f"`{name}`" in page, "run: python tools/models_docs.py docs/models.md"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_are_current_but_for_their_figures(
    checkpoint_factory: Callable[..., Path], tool: Any, family: str
) -> None:
    rows = [line for line in (ROOT / "docs/models.md").read_text().splitlines() if line.startswith(f"| `{family}` ")]
    current = tool.row(family, Checkpoint.open(checkpoint_factory(family, layers=3)), (0.0, 0.0))
    assert [row.split("|")[:4] for row in rows] == [current.split("|")[:4]], (
        "run: python tools/models_docs.py docs/models.md"
    )


def test_prose_is_current(tool: Any) -> None:
    page = (ROOT / "docs/models.md").read_text()
    for part in (tool.HEAD.format(bound=tool.TOLERANCE), *tool.GENERIC.split("{names}")[1].split("{without}")):
        assert part in page, "run: python tools/models_docs.py docs/models.md"
