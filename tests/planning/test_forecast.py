"""What a dry run says is what a pack makes, from headers or from a config alone, and it leaves nothing behind."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import moeflow
from moeflow.artifact.outline import outline
from moeflow.artifact.reader import Artifact
from moeflow.artifact.role_sizes import OTHER
from moeflow.console import show_forecast
from moeflow.errors import CheckpointError, DocumentError
from moeflow.pipeline import dry_run
from moeflow.schema import Plan

QUANTIZATION = {
    "experts": {"backend": "hqq", "bits": 2},
    "attention": {"backend": "hqq", "bits": 4},
    "shared_experts": {"backend": "bitsandbytes", "format": "nf4"},
    "overrides": [{"layers": "0", "experts": {"backend": "hqq", "bits": 8}}],
}


def _profile(model: Path | str, **settings: Any) -> dict[str, Any]:
    return {
        "model": str(model), "quantization": QUANTIZATION, "hardware": "cpu-2-cores", "context_length": 128, **settings,
    }  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory: Callable[..., Path]) -> Path:
    return checkpoint_factory("qwen2_moe", layers=3)


def test_it_says_what_a_pack_makes(checkpoint: Path, tmp_path: Path) -> None:
    found = dry_run(_profile(checkpoint), tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    manifest = Artifact.open(moeflow.pack(_profile(checkpoint), tmp_path / "a" / "b")).manifest
    assert found.disk_needed == manifest.expert_nbytes + manifest.resident_nbytes
    assert sum(role.weights for role in found.roles) == manifest.model.parameters
    rows = {(role.role, role.scheme.label): role for role in found.roles}
    assert set(rows) == {
        ("experts", "8-bit g64"), ("experts", "2-bit g64"), ("attention", "4-bit g64"), ("shared experts", "nf4"),
        ("head", "unquantized"), (OTHER, "unquantized"),
    }  # fmt: skip
    experts = [role for role in found.roles if role.role == "experts"]
    assert sum(role.weights for role in experts) == manifest.model.expert_parameters
    assert sum(role.nbytes for role in experts) == manifest.expert_nbytes
    assert rows["shared experts", "nf4"].bits == 4.25 and rows["head", "unquantized"].bits == 16
    plan = Plan.load(tmp_path / "a" / "b" / "plan.json")
    assert found.plan == plan.model_copy(update={"manifest_digest": ""})
    assert found.seconds == max(part.seconds for part in found.work) > 0
    assert json.loads(json.dumps(found.to_dict()))["disk_needed"] == found.disk_needed


def test_a_config_and_an_index_are_enough(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    full, found = (dry_run(_profile(model), tmp_path / "a") for model in (checkpoint, bare))
    assert sorted(found.roles, key=str) == sorted(full.roles, key=str)
    assert found.plan == full.plan and found.origin == f"{bare / 'config.json'}, no weights read"
    index = {"metadata": {"total_size": 12345}, "weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}
    (bare / "model.safetensors.index.json").write_text(json.dumps(index))
    assert outline(str(bare)).nbytes == 12345


def test_headers_need_no_torch(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom moeflow.pipeline import dry_run\n"
        f"assert dry_run({_profile(checkpoint)!r}, {str(tmp_path / 'a')!r}).plan\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "set()", result.stderr


def test_what_a_pack_would_refuse_is_said(checkpoint: Path, tmp_path: Path) -> None:
    found = dry_run(_profile(checkpoint, memory={"vram": "1KiB"}), tmp_path / "a")
    assert found.plan is None and "the limit is 1 KiB" in found.refusal
    stream = io.StringIO()
    show_forecast(found, Console(file=stream, width=160))
    assert "no plan:" in stream.getvalue() and "bits a weight" in stream.getvalue()
    wrong = {**QUANTIZATION, "overrides": [{"layers": "7", "experts": {"backend": "none"}}]}
    with pytest.raises(DocumentError, match=r"overrides\.0\.layers is 7"):
        dry_run(_profile(checkpoint, quantization=wrong), tmp_path / "a")


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="nor complete in the hub cache"):
        outline("nobody/nothing-of-this-name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        outline(str(tmp_path / "empty"))
