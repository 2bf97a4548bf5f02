"""The tool that measures packing: a tiny run gives every figure, and leaves nothing behind."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = importlib.import_module("packing")
    folder, figures, picture = tmp_path / "scratch", tmp_path / "out.json", tmp_path / "out.png"
    options = ["--tiny", "--layers", "2", "--group-size", "32", "--json", str(figures), "--plot", str(picture)]
    tool.main([str(folder), *options])
    found = json.loads(figures.read_text())
    assert found["layers"] == 2
    assert found["input_bytes"] > found["output_bytes"] > 0
    assert found["input_rate"] == pytest.approx(found["input_bytes"] / found["seconds"])
    assert {"read", "quantize", "pack", "hash and write", "fsync"} <= set(found["phases"])
    assert found["memory_peak"] >= max(nbytes for _, nbytes in found["memory_curve"]) > 0
    assert found["memory_bound"] > 3 << 30
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not folder.exists()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {key: value for key, value in found.items() if key != "memory_curve"}


def test_beside_hqq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = importlib.import_module("packing")
    tool.main(["--against-hqq", "--rounds", "1", "--shape", "64", "256"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(entry["ratio"] > 0 for entry in found["schemes"].values())
