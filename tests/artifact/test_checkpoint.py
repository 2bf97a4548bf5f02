"""Checkpoints as the hub has them, and as broken downloads leave them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_mixtral

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.families import FAMILIES as KNOWN
from moeflow.errors import CheckpointError, DocumentError

EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"


def _rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Save the checkpoint's tensors again after `change`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def _configure(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    config.update(changes)
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "removed"}))


def _refusal(directory: Path) -> str:
    """The message of opening the checkpoint and asking for all that packing asks for."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint = Checkpoint.open(directory)
        _ = checkpoint.layers, checkpoint.dtype, checkpoint.top_k, checkpoint.kv_values_per_token
    return str(caught.value)


# -- what is there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_with_its_experts_and_the_rest(
    checkpoint_factory: Callable[..., Path], family: str
) -> None:
    directory = checkpoint_factory(family)
    checkpoint = Checkpoint.open(directory)
    tensors = load_file(directory / "model.safetensors")
    assert checkpoint.family.model_type == family
    assert {(len(y.experts), y.hidden, y.intermediate) for y in checkpoint.layers} == {(8, 64, 64)}
    used = [n for y in checkpoint.layers for n in y.tensors] + [*checkpoint.resident.values()]
    assert sorted(used) == sorted(tensors)
    assert (checkpoint.top_k, checkpoint.max_context, checkpoint.dtype) == (2, 256, "bfloat16")
    for name in used[:: len(used) // 20]:
        assert torch.equal(checkpoint.read(name), tensors[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_resident_names_and_modules_are_transformers_own(checkpoint_factory: Callable[..., Path], family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = Checkpoint.open(checkpoint_factory(family))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.directory))
    modules = dict(model.named_modules())
    for layer in checkpoint.layers:
        assert checkpoint.family.module.format(layer=layer.index) in modules
        assert checkpoint.family.router.format(layer=layer.index) in modules
    expected = {name for name in model.state_dict() if ".experts." not in name}
    tied = {"lm_head.weight"} if checkpoint.config["tie_word_embeddings"] else set()
    assert set(checkpoint.resident) == expected - tied


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_are_those_of_transformers_forward(checkpoint_factory: Callable[..., Path], family: str) -> None:
    """The loaded model's own stacked experts are gate, up and down of our reading."""
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(checkpoint_factory(family))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.bfloat16)
    for layer in checkpoint.layers:
        experts = model.get_submodule(checkpoint.family.module.format(layer=layer.index))
        for number, parts in enumerate(layer.experts):
            read = {role: checkpoint.read_slice(part) for role, part in parts.items()}
            gate_up = read["gate_up"] if "gate_up" in read else torch.cat([read["gate"], read["up"]])
            for parameter, value in (("gate_up_proj", gate_up), ("down_proj", read["down"])):
                stored = getattr(experts, parameter)[number]
                assert torch.equal(stored.T if checkpoint.family.transposed else stored, value)
            for role in ("gate_up", "down") if checkpoint.family.biased else ():
                assert torch.equal(getattr(experts, f"{role}_proj_bias")[number], read[f"{role}_bias"])


def test_parameters_are_counted(tiny_checkpoint: Path) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert checkpoint.parameters() == sum(t.numel() for t in tensors.values())
    assert checkpoint.parameters(experts_only=True) == 2 * 8 * 3 * 64 * 64


def test_the_cache_of_keys_and_values_is_counted(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert checkpoint.kv_values_per_token == 2 * 2 * 2 * 16  # K and V, layers, heads, dim


def test_layers_without_experts_are_left_out_and_are_resident(checkpoint_factory: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(checkpoint_factory("qwen3_moe", layers=3, dense_layers=(0,)))
    assert [layer.index for layer in checkpoint.layers] == [1, 2]
    assert "model.layers.0.mlp.gate_proj.weight" in checkpoint.resident


def test_layers_are_in_order_past_the_tenth(checkpoint_factory: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(checkpoint_factory(layers=11, experts=2, hidden=16, intermediate=16))
    assert [layer.index for layer in checkpoint.layers] == list(range(11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_known(checkpoint_factory: Callable[..., Path], dtype: torch.dtype) -> None:
    assert "torch." + Checkpoint.open(checkpoint_factory(dtype=dtype)).dtype == str(dtype)


# -- several files -----------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_mixtral(tmp_path / "sharded", max_shard_size="100KB")


def test_a_checkpoint_in_several_files_is_read_equally(sharded: Path, tiny_checkpoint: Path) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    one, several = Checkpoint.open(tiny_checkpoint), Checkpoint.open(sharded)
    assert several.layers == one.layers
    assert several.resident == one.resident
    assert several.digest() == one.digest()
    for name in one.tensors:
        assert torch.equal(one.read(name), several.read(name))


def test_a_missing_file_of_the_index_is_named(sharded: Path) -> None:
    count = len(list(sharded.glob("model-*.safetensors")))
    missing = sorted(sharded.glob("model-*.safetensors"))[1]
    missing.unlink()
    assert _refusal(sharded) == (
        f"{sharded}: 1 of {count} weight files are missing, first {missing.name}; resume the download"
    )


def test_a_truncated_file_of_the_index_is_named(sharded: Path) -> None:
    path = sorted(sharded.glob("model-*.safetensors"))[2]
    size = path.stat().st_size
    os.truncate(path, size - 10)
    assert _refusal(sharded) == f"{path}: truncated: its tensors need {size} bytes, the file has {size - 10}"


def test_a_tensor_of_the_index_that_is_in_no_file_is_named(sharded: Path) -> None:
    path = sorted(sharded.glob("model-*.safetensors"))[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path)
    assert _refusal(sharded) == (
        f"{sharded}: 1 tensors of the index are in no file, first {name}; fetch the index and its files again"
    )


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "null"])
def test_an_index_that_is_none_is_refused(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in _refusal(sharded)


def test_files_beside_the_index_are_ignored(sharded: Path, tiny_checkpoint: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"not ours")
    assert Checkpoint.open(sharded).digest() == Checkpoint.open(tiny_checkpoint).digest()


# -- what is wrong -----------------------------------------------------------------------------------------


def test_a_directory_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    assert _refusal(tmp_path) == f"{tmp_path}: not a checkpoint: it has no config.json"


def test_a_checkpoint_without_weights_says_which_are_read(own_checkpoint: Path) -> None:
    (own_checkpoint / "model.safetensors").rename(own_checkpoint / "pytorch_model.bin")
    assert _refusal(own_checkpoint) == f"{own_checkpoint}: no *.safetensors file; other formats are not read"


def test_an_unknown_model_type_lists_the_known_ones(own_checkpoint: Path) -> None:
    _configure(own_checkpoint, model_type="gpt2")
    message = _refusal(own_checkpoint)
    assert (
        f"{own_checkpoint / 'config.json'}: model type 'gpt2' is not declared ({', '.join(sorted(KNOWN))})" in message
    )
    assert "looked for modules that transformers dispatches through its experts interface" in message
    assert set(FAMILIES) == set(KNOWN)


@pytest.mark.parametrize("text", ["{", "[]", "null", '"mixtral"'])
def test_a_config_that_is_none_names_the_file(own_checkpoint: Path, text: str) -> None:
    (own_checkpoint / "config.json").write_text(text)
    with pytest.raises((CheckpointError, DocumentError), match=r"config\.json"):
        Checkpoint.open(own_checkpoint)


@pytest.mark.parametrize("key", ["num_experts_per_tok", "num_hidden_layers", "num_attention_heads"])
def test_a_config_that_lacks_a_number_names_it(own_checkpoint: Path, key: str) -> None:
    _configure(own_checkpoint, **{key: "removed"})
    message = _refusal(own_checkpoint)
    assert "config.json" in message
    assert key in message


@pytest.mark.parametrize(("projection", "role"), [("w1", "gate"), ("w2", "down"), ("w3", "up")])
def test_an_expert_that_lacks_a_matrix_is_named(own_checkpoint: Path, projection: str, role: str) -> None:
    _rewrite(own_checkpoint, lambda tensors: tensors.pop(EXPERT.format(5, projection)))
    assert _refusal(own_checkpoint) == (
        f"{own_checkpoint}: layer 1, expert 5 lacks {role}; the download may be incomplete"
    )


def _drop(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(prefix)]:
            del tensors[name]

    return drop


@pytest.mark.parametrize("expert", [0, 3, 7])
def test_an_expert_that_is_missing_is_named(own_checkpoint: Path, expert: int) -> None:
    _rewrite(own_checkpoint, _drop(f"model.layers.1.block_sparse_moe.experts.{expert}."))
    assert f"layer 1, expert {expert} lacks down, gate, up" in _refusal(own_checkpoint)


def test_a_layer_whose_experts_are_missing_is_noticed(own_checkpoint: Path) -> None:
    _rewrite(own_checkpoint, _drop("model.layers.1.block_sparse_moe.experts."))
    assert "layer 1" in _refusal(own_checkpoint)


def test_a_model_without_experts_is_told_how_they_are_named(own_checkpoint: Path) -> None:
    _rewrite(own_checkpoint, lambda t: [t.pop(n) for n in [*t] if ".experts." in n])
    assert "no experts found; a mixtral names them model" in _refusal(own_checkpoint)


def test_experts_that_differ_in_shape_are_refused(own_checkpoint: Path) -> None:
    name = EXPERT.format(4, "w2")
    _rewrite(own_checkpoint, lambda tensors: tensors.update({name: torch.zeros(64, 32, dtype=torch.bfloat16)}))
    assert _refusal(own_checkpoint) == (
        f"{own_checkpoint}: {name} has shape [64, 32], the layer's first expert [64, 64]"
    )


def test_weights_in_another_dtype_list_those_supported(own_checkpoint: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    _rewrite(own_checkpoint, narrow)
    assert "is stored as F8_E4M3; supported: F32, BF16, F16" in _refusal(own_checkpoint)


def test_one_expert_in_another_dtype_is_refused(own_checkpoint: Path) -> None:
    name = EXPERT.format(6, "w3")
    _rewrite(own_checkpoint, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert name in _refusal(own_checkpoint)


# -- identity ----------------------------------------------------------------------------------------------


def test_the_digest_is_of_config_and_headers_not_of_the_place(own_checkpoint: Path, tiny_checkpoint: Path) -> None:
    digest = Checkpoint.open(tiny_checkpoint).digest()
    assert Checkpoint.open(own_checkpoint).digest() == digest
    _configure(own_checkpoint, rms_norm_eps=0.5)
    assert Checkpoint.open(own_checkpoint).digest() != digest


def test_the_fingerprint_changes_with_the_file(own_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(own_checkpoint)
    names = list(checkpoint.tensors)
    before = checkpoint.fingerprint(names)
    assert Checkpoint.open(own_checkpoint).fingerprint(names) == before
    os.utime(own_checkpoint / "model.safetensors", ns=(1, 1))
    assert Checkpoint.open(own_checkpoint).fingerprint(names) != before
