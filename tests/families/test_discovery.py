"""Declarations against what transformers itself says, and the path of families that have none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import checkpoint_model
from routes import assert_follows
from safetensors.torch import load_file, save_file
from test_engine import NONE, random_ids
from tiny import FAMILIES, _save, tiny_unlisted
from tiny_families import UNLISTED

import moeflow
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.discovery import discover
from moeflow.artifact.families import FAMILIES as DECLARED
from moeflow.errors import CheckpointError

ANY_FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))
WITHOUT_GUESSES = {"afmoe"}  # its router takes three dimensions and takes them apart


@ANY_FAMILY
def test_declarations_are_what_transformers_says(checkpoint_factory: Callable[..., Path], family: str) -> None:
    checkpoint = Checkpoint.open(checkpoint_factory(family))
    assert discover(checkpoint.directory, checkpoint.tensors) == DECLARED[family]


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_family_runs_through_the_generic_path(
    tmp_path: Path, packed: Callable[..., Path], name: str
) -> None:
    assert name not in DECLARED
    try:
        checkpoint = tiny_unlisted(tmp_path, name)
    except ValueError:
        pytest.skip("newer than this transformers")
    with moeflow.load(packed(checkpoint, NONE), experts_per_layer=3) as engine:
        assert_follows(engine, checkpoint_model(checkpoint), random_ids(30), chunks=(512, 1))
        assert engine.guessing == (name not in WITHOUT_GUESSES)


def test_a_checkpoint_saved_as_it_is_in_memory_is_read(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """`save_original_format=False`: one tensor per layer where the declaration names one per expert."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=False)
    fused, usual = Checkpoint.open(tmp_path), Checkpoint.open(tiny_checkpoint)
    assert set(fused.family.experts) == {"gate_up", "down"}
    assert set(fused.resident) == set(usual.resident)
    read, parts = fused.layers[1].experts[5], usual.layers[1].experts[5]
    assert torch.equal(fused.read_slice(read["down"]), usual.read_slice(parts["down"]))
    both = torch.cat([usual.read_slice(parts["gate"]), usual.read_slice(parts["up"])])
    assert torch.equal(fused.read_slice(read["gate_up"]), both)


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    return str(caught.value)


def configure(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_unlisted(tmp_path, "flex_olmo")
    configure(checkpoint, model_type="no_such_model")
    assert "has no causal language model for it" in refusal(checkpoint)


def test_a_model_without_experts_says_what_was_looked_for(tmp_path: Path) -> None:
    checkpoint = tiny_unlisted(tmp_path, "flex_olmo")
    configure(checkpoint, model_type="llama")
    message = refusal(checkpoint)
    assert "looked for modules that transformers dispatches through its experts interface" in message
    assert "found none (no `experts`)" in message
    assert "docs/adding-a-model.md" in message


def test_experts_without_a_gate_are_refused(tmp_path: Path) -> None:
    from transformers import NemotronHConfig

    config = NemotronHConfig(
        vocab_size=128, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=8,
        moe_intermediate_size=64, moe_shared_expert_intermediate_size=64, mamba_num_heads=4, mamba_head_dim=32,
        n_groups=1, ssm_state_size=16, num_experts_per_tok=2, layers_block_type=["mamba", "moe"],
    )  # fmt: skip
    message = refusal(_save(tmp_path, config, 0, torch.bfloat16, "5GB"))
    assert "looked for experts with a gate and without a norm" in message
    assert "'has_gate': False" in message


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    checkpoint = tiny_unlisted(tmp_path, "flex_olmo")
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({**tensors, "model.stray.weight": torch.zeros(4)}, checkpoint / "model.safetensors")
    message = refusal(checkpoint)
    assert "1 tensors have no place in transformers' FlexOlmoForCausalLM, first model.stray.weight" in message


def test_a_missing_projection_is_named(tmp_path: Path) -> None:
    checkpoint = tiny_unlisted(tmp_path, "flex_olmo")
    tensors = {n: t for n, t in load_file(checkpoint / "model.safetensors").items() if ".up_proj." not in n}
    save_file(tensors, checkpoint / "model.safetensors")
    assert "looked for tensors of down, gate, up or down, gate_up; found down, gate" in refusal(checkpoint)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_layers_beyond_the_last_are_left_out(
    checkpoint_factory: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Checkpoints on the hub carry layers that predict further tokens; transformers drops them."""
    whole = Checkpoint.open(checkpoint_factory(family))
    directory = Path(shutil.copytree(whole.directory, tmp_path / "checkpoint"))
    configure(directory, num_hidden_layers=2)
    shorter = Checkpoint.open(directory)
    assert [[layer.index for layer in c.layers] for c in (whole, shorter)] == [[1, 2], [1]]
    assert not any(name.startswith("model.layers.2.") for name in shorter.resident)
    assert shorter.parameters() < whole.parameters()
