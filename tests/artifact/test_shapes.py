"""Names and shapes from a config alone: what transformers builds of it, tensor by tensor, and at once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_unlisted

from moeflow.artifact import families
from moeflow.artifact.architectures import ARCHITECTURES, PUBLISHED, architecture
from moeflow.artifact.outline import outline
from moeflow.artifact.safetensors import TensorInfo
from moeflow.artifact.shapes import config_checkpoint
from moeflow.artifact.structures import STRUCTURES
from moeflow.artifact.synthetic import synthetic_checkpoint
from moeflow.errors import CheckpointError

Config = dict[str, Any]
Draw = Callable[[random.Random, Config], Any]
VARIANTS = 6  # of each family


def _config(checkpoint_factory: Callable[..., Path], family: str) -> Config:
    return architecture(str(checkpoint_factory(family, layers=3)))


def _headers(config: Config) -> Mapping[str, TensorInfo]:
    return config_checkpoint(config, "model").headers


def _assert_as_built(config: Config) -> None:
    found, wanted = _headers(config), synthetic_checkpoint(config, "model").headers
    assert found.keys() == wanted.keys()
    assert found == wanted


# -- the same as transformers ------------------------------------------------------------------------------


def test_structures_are_of_listed_families() -> None:
    assert set(STRUCTURES) <= set(families.FAMILIES)


@pytest.mark.parametrize("family", STRUCTURES)
def test_a_tiny_model_of_each_family(checkpoint_factory: Callable[..., Path], family: str) -> None:
    _assert_as_built(_config(checkpoint_factory, family))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_architectures(name: str) -> None:
    _assert_as_built(architecture(name))


def _switch(draw: random.Random, _config: Config) -> bool:
    return draw.random() < 0.5


def _each_layer(*kinds: str) -> Draw:
    return lambda draw, config: [draw.choice(kinds) for _ in range(config["num_hidden_layers"])]


def _below(key: str) -> Draw:
    return lambda draw, config: draw.randrange(config[key])


# Key -> what it may be, in an order in which each finds those that it depends on; a config takes those that it has.
OPTIONS: dict[str, Draw] = {
    "dtype": lambda draw, _: draw.choice(["float32", "bfloat16", "float16"]),
    "num_hidden_layers": lambda draw, _: draw.randint(1, 5),
    "num_attention_heads": lambda draw, _: draw.choice([2, 4, 8]),
    "num_key_value_heads": lambda draw, config: draw.choice([1, 2, config["num_attention_heads"]]),
    "hidden_size": lambda draw, config: config["num_attention_heads"] * draw.choice([8, 12, 24]),
    "head_dim": lambda draw, config: draw.choice([8, 16, 20]) if config["head_dim"] else None,
    "vocab_size": lambda draw, _: draw.randint(5, 99),
    "intermediate_size": lambda draw, _: draw.randint(5, 99),
    "moe_intermediate_size": lambda draw, _: draw.randint(5, 99),
    "shared_expert_intermediate_size": lambda draw, _: draw.randint(5, 99),
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), lambda draw, _: draw.randint(2, 13)
    ),
    "n_shared_experts": lambda draw, _: draw.randint(1, 3),
    "moe_num_shared_experts": lambda draw, _: draw.randint(0, 2),
    "kv_lora_rank": lambda draw, _: draw.randint(5, 40),
    "q_lora_rank": lambda draw, _: draw.choice([None, draw.randint(5, 40)]),
    "qk_nope_head_dim": lambda draw, _: draw.randint(5, 40),
    "qk_rope_head_dim": lambda draw, _: 2 * draw.randint(2, 20),
    "v_head_dim": lambda draw, _: draw.randint(5, 40),
    "first_k_dense_replace": lambda draw, config: draw.randint(0, config["num_hidden_layers"]),
    "num_dense_layers": lambda draw, config: draw.randint(0, config["num_hidden_layers"]),
    "decoder_sparse_step": lambda draw, _: draw.randint(1, 3),
    "mlp_only_layers": lambda draw, config: draw.choice([None, [], [draw.randrange(config["num_hidden_layers"])]]),
    "moe_layer_interval": lambda draw, _: draw.randint(1, 2),
    "moe_layer_start_index": lambda draw, _: draw.randint(0, 2),
    "moe_layer_end_index": lambda draw, config: draw.choice([-1, draw.randrange(config["num_hidden_layers"])]),
    "attn_layer_period": lambda draw, _: draw.randint(1, 3),
    "attn_layer_offset": _below("attn_layer_period"),
    "expert_layer_period": lambda draw, _: draw.randint(1, 3),
    "expert_layer_offset": _below("expert_layer_period"),
    "mamba_d_state": lambda draw, _: draw.randint(3, 9),
    "mamba_d_conv": lambda draw, _: draw.randint(2, 5),
    "mamba_expand": lambda draw, _: draw.randint(1, 3),
    "mamba_dt_rank": lambda draw, _: draw.choice(["auto", draw.randint(3, 9)]),
    "conv_L_cache": lambda draw, _: draw.randint(2, 5),
    **dict.fromkeys(
        (
            "tie_word_embeddings", "attention_bias", "qkv_bias", "use_bias", "mlp_bias", "lm_head_bias", "use_qk_norm",
            "use_expert_bias", "mamba_conv_bias", "mamba_proj_bias", "conv_bias",
        ),
        _switch,
    ),
}  # fmt: skip
LAYER_TYPES = {"lfm2_moe": _each_layer("conv", "full_attention")}
ATTENTION_TYPES = _each_layer("sliding_attention", "full_attention")


def _variant(config: Config, draw: random.Random) -> Config:
    changed = dict(config)
    for key, option in OPTIONS.items():
        if key in config:
            changed[key] = option(draw, changed)
    if "layer_types" in config:
        changed["layer_types"] = LAYER_TYPES.get(config["model_type"], ATTENTION_TYPES)(draw, changed)
    return changed


@pytest.mark.parametrize("family", STRUCTURES)
def test_any_dimensions_and_options(checkpoint_factory: Callable[..., Path], family: str) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    config = _config(checkpoint_factory, family)
    for _ in range(VARIANTS):
        changed = _variant(config, draw)
        print({key: value for key, value in changed.items() if config[key] != value})
        _assert_as_built(changed)


def test_the_options_cover_what_shapes_depend_on() -> None:
    for family, structure in STRUCTURES.items():
        numbers, switches = _keys(family)
        assert numbers | switches <= set(OPTIONS), family
        assert set(structure.on) <= switches and set(structure.states) <= numbers | switches


def _keys(family: str) -> tuple[set[str], set[str]]:
    """Config keys of the dimensions of a family's tensors, and those that say whether a tensor is there."""
    structure = STRUCTURES[family]
    every = (
        structure.around,
        structure.norms,
        structure.attention,
        structure.recurrent,
        structure.moe,
        structure.dense,
    )
    parts = [part for group in every for part in group]
    sizes = {key for part in parts for size in part.shape for key in size.replace("+", "*").split("*")}
    numbers = {key for key in sizes if not key.isdigit() and key != "experts"} | {structure.inner}
    return numbers, {switch.removeprefix("!") for part in parts for switch in part.when}


# -- what a config leaves out ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STRUCTURES)
def test_switches_that_are_missing_mean_what_transformers_takes(
    checkpoint_factory: Callable[..., Path], family: str
) -> None:
    numbers, switches = _keys(family)
    missing = ((switches - numbers) | {"mlp_only_layers", "head_dim"}) - set(STRUCTURES[family].states)
    config = _config(checkpoint_factory, family)
    _assert_as_built({key: value for key, value in config.items() if key not in missing})


@pytest.mark.parametrize("family", STRUCTURES)
def test_numbers_that_are_missing_are_refused_by_name(checkpoint_factory: Callable[..., Path], family: str) -> None:
    config = _config(checkpoint_factory, family)
    if "mlp_only_layers" in config:
        config["mlp_only_layers"] = [1]  # a dense layer, as others' tiny models have
    optional = {"head_dim"} - set(STRUCTURES[family].states)
    for key in (_keys(family)[0] | set(STRUCTURES[family].states)) - optional:
        with pytest.raises(CheckpointError, match=rf"model/config\.json: .*{key}"):
            _headers({other: value for other, value in config.items() if other != key})


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {"hidden_size": "4096"}, "hidden_size is '4096', a whole number is needed"),
        ("mixtral", {"num_attention_heads": 0}, "num_attention_heads is 0, a whole number above zero is needed"),
        ("mixtral", {"num_local_experts": [8, 8]}, r"num_local_experts is \[8, 8\]"),
        ("mixtral", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', true or false is needed"),
        ("mixtral", {"dtype": "float8"}, "dtype is 'float8'; supported: float32, bfloat16, float16"),
        ("qwen3_moe", {"mlp_only_layers": 2}, "mlp_only_layers is 2, a list is needed"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("lfm2_moe", {"layer_types": ["conv"]}, "layer_types has 1 entries, one for each layer is needed"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    checkpoint_factory: Callable[..., Path], family: str, change: Config, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        _headers({**_config(checkpoint_factory, family), **change})


def test_experts_are_counted_under_some_name(checkpoint_factory: Callable[..., Path]) -> None:
    config = _config(checkpoint_factory, "mixtral")
    del config["num_local_experts"]
    with pytest.raises(CheckpointError, match=r"no number of experts under num_local_experts, num_experts"):
        _headers(config)


def test_lfm2_has_its_own_name_for_tied_embeddings(checkpoint_factory: Callable[..., Path]) -> None:
    for tied in (True, False):
        config = {**_config(checkpoint_factory, "lfm2_moe"), "tie_embedding": tied, "tie_word_embeddings": not tied}
        assert ("lm_head.weight" in _headers(config)) != tied
        _assert_as_built(config)


def test_a_released_quantization_is_left_out(checkpoint_factory: Callable[..., Path]) -> None:
    config = _config(checkpoint_factory, "gpt_oss")
    assert _headers({**config, "quantization_config": {"quant_method": "mxfp4"}}) == _headers(config)


# -- who asks ----------------------------------------------------------------------------------------------


def test_a_family_without_a_structure_goes_through_transformers(tmp_path: Path) -> None:
    config = architecture(str(tiny_unlisted(tmp_path, "granitemoeshared")))
    assert config["model_type"] not in STRUCTURES
    _assert_as_built(config)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-20b", "Qwen/Qwen3-30B-A3B"])
def test_an_outline_of_a_name_that_ships_with_moeflow(name: str) -> None:
    known = outline(name)
    assert known.origin == "the config that ships with moeflow"
    assert known.checkpoint.headers.keys() == _headers(architecture(PUBLISHED.get(name, name))).keys()
    assert known.nbytes == sum(info.nbytes for info in known.checkpoint.headers.values())


def test_a_directory_goes_before_a_name(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixtral-8x7b").symlink_to(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    assert outline("mixtral-8x7b").origin == "tensor headers in mixtral-8x7b"


def test_an_outline_of_a_config_by_its_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "configs" / "other.json"
    other.parent.mkdir()
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    other.write_text(json.dumps(config))
    (other.parent / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 1}}')
    of_file, of_other = outline(str(tiny_checkpoint / "config.json")), outline(str(other))
    assert of_file.checkpoint.digest() == of_other.checkpoint.digest()
    assert (of_other.origin, of_other.nbytes) == (f"{other}, no weights read", of_file.nbytes)
    other.write_text(json.dumps({**config, "num_experts_per_tok": None, "hidden_size": None}))
    with pytest.raises(CheckpointError, match=r"configs/other\.json: hidden_size is None"):
        outline(str(other))


@pytest.mark.parametrize("model", ["directory", "file", "mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"])
def test_sizes_of_a_config_need_nothing_heavy(tiny_checkpoint: Path, tmp_path: Path, model: str) -> None:
    """Neither torch nor the hub's client, by name, by hub id, and by config."""
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    model = {"directory": str(tmp_path), "file": str(tmp_path / "config.json")}.get(model, model)
    code = (
        "import sys\n"
        "from moeflow.artifact.outline import outline\n"
        "from moeflow.planning.sizes import ModelSizes\n"
        "from moeflow.schema import HqqScheme, Quantization\n"
        "two_bit = Quantization(experts=HqqScheme(bits=2, group_size=64))\n"
        f"assert ModelSizes.of_checkpoint(outline({model!r}).checkpoint, two_bit).expert_nbytes\n"
        "heavy = {'torch', 'transformers', 'hqq', 'huggingface_hub', 'safetensors.torch', 'numpy'}\n"
        "print(heavy & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "set()", result.stderr
