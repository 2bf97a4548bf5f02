"""Shapes of routes off a config, against the layers that transformers builds of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeflow.artifact.architectures import ARCHITECTURES, architecture
from moeflow.artifact.synthetic import synthetic_checkpoint
from moeflow.errors import CheckpointError
from moeflow.planning.shape import Shape, shape_of


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "olmoe-1b-7b"])
def test_layers_are_those_that_are_built(name: str) -> None:
    checkpoint = synthetic_checkpoint(architecture(name), name)
    experts = {len(layer.experts) for layer in checkpoint.layers}
    assert shape_of(name) == Shape(name, len(checkpoint.layers), experts.pop(), checkpoint.top_k)
    assert not experts


def test_published_shapes() -> None:
    found = {name: (s.layers, s.top_k, s.experts) for name in ARCHITECTURES if (s := shape_of(name))}
    assert found == {
        "mixtral-8x7b": (32, 2, 8),
        "qwen3-30b-a3b": (48, 8, 128),
        "deepseek-v2-lite": (26, 6, 64),
        "olmoe-1b-7b": (16, 8, 64),
        "gpt-oss-20b": (24, 4, 32),
    }


def test_a_config_with_dense_layers(tmp_path: Path) -> None:
    config = {**architecture("qwen3-30b-a3b"), "decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(str(tmp_path)).layers == 24 - 2


def test_what_has_no_experts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    with pytest.raises(CheckpointError, match="names no experts"):
        shape_of(str(tmp_path))
    with pytest.raises(CheckpointError, match="unknown architecture 'mixtrall'; known: deepseek-v2-lite"):
        shape_of("mixtrall")
