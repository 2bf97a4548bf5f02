"""The cost model against what was measured: a change that makes it worse is seen here, without a GPU."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path
from types import ModuleType

import pytest

from moeflow.probe.match import find_hardware
from moeflow.schema import Benchmark

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs/measured").glob("h100-*.json"))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("predictions")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_predictions_are_near_what_was_measured(tool: ModuleType, path: Path) -> None:
    run = Benchmark.load(path)
    pairs = tool.pairs_of(run, find_hardware("h100-80gb"))
    assert len(pairs) >= 15
    errors = {
        execution: [abs(tool.error(p)) for p in pairs if p[0].execution == execution]
        for execution in ("device", "host")
    }
    assert statistics.median(errors["device"]) <= 0.04 and max(errors["device"]) <= 0.15
    assert all(error <= 0.2 for error in errors["host"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_memory_in_use_was_what_plans_stated(path: Path) -> None:
    for row in Benchmark.load(path).rows:
        assert row.memory_ratio is not None and 0.97 < row.memory_ratio < 1.03
        assert row.host_in_use is not None and row.host_planned is not None
        assert row.host_in_use < row.host_planned + (1.5 * (1 << 30))


def test_the_files_hold_the_configurations_that_the_page_counts() -> None:
    rows = [row for path in FILES for row in Benchmark.load(path).rows]
    assert len({(r.model, r.expert_scheme, r.k, r.strategy, r.routing, r.execution) for r in rows}) == len(rows) == 45
    assert {row.model for row in rows} >= {"mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite"}
