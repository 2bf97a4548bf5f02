"""Models without files: the shapes and sizes of real checkpoints, and manifests equal to packed ones but for bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeflow.artifact import families
from moeflow.artifact.architectures import ARCHITECTURES, architecture
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.families import Family
from moeflow.artifact.packer import Packer
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.artifact.synthetic import synthetic_checkpoint, synthetic_manifest
from moeflow.errors import CheckpointError, DocumentError
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import DenseScheme, HqqScheme, Manifest, Quantization

TWO_BIT = Quantization(experts=HqqScheme(bits=2, group_size=64))
# In billions: all parameters, as their makers state them, and those of the routed experts.
PUBLISHED = {
    "mixtral-8x7b": (46.7, 45.1),
    "qwen3-30b-a3b": (30.5, 29.0),
    "olmoe-1b-7b": (6.9, 6.4),
    "deepseek-v2-lite": (15.7, 14.4),
    "gpt-oss-20b": (20.9, 19.1),
}


def known(name: str) -> bool:
    return ARCHITECTURES[name]["model_type"] in families.FAMILIES


# -- published architectures -------------------------------------------------------------------------------


def test_every_architecture_is_counted_here() -> None:
    assert set(PUBLISHED) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_come_out_as_published(name: str) -> None:
    """Counted in the model that transformers builds; for experts, in whatever tensors its layers call so."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture(name)))
    counts = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    experts = sum(count for name, count in counts.items() if ".mlp.experts." in name)
    found = (round(sum(counts.values()) / 1e9, 1), round(experts / 1e9, 1))
    assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n != "gpt-oss-20b"])
def test_transformers_keeps_every_key_of_a_config(name: str) -> None:
    """A misspelt key would be ignored, and the default of some other model taken. gpt-oss has one of its own."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**architecture(name))
    skipped = {"rope_theta", "rope_scaling", "dtype", "decoder_sparse_step"}
    for key, value in architecture(name).items():
        assert key in skipped or getattr(config, key) == value, key
    rope = {**architecture(name).get("rope_scaling", {"rope_type": "default"})}
    assert config.rope_parameters == {**rope, "rope_theta": architecture(name)["rope_theta"]}


@pytest.mark.parametrize("name", [n for n in PUBLISHED if known(n)])
def test_a_published_architecture_has_a_manifest(name: str) -> None:
    config = architecture(name)
    manifest = synthetic_manifest(config, TWO_BIT, name)
    assert Manifest.parse(json.loads(manifest.to_json()), "manifest.json") == manifest
    facts = manifest.model
    billions = round(facts.parameters / 1e9, 1), round(facts.expert_parameters / 1e9, 1)
    assert billions == PUBLISHED[name]
    assert (facts.source, facts.dtype, facts.top_k) == (name, "bfloat16", config["num_experts_per_tok"])
    assert 2.5 <= 8 * manifest.expert_nbytes / facts.expert_parameters < 2.52, "2 bits, and 32 for each group of 64"
    assert len(manifest.layers) == config["num_hidden_layers"] - config.get("first_k_dense_replace", 0)


def test_the_blobs_of_mixtral_at_two_bits_by_hand() -> None:
    manifest = synthetic_manifest(architecture("mixtral-8x7b"), TWO_BIT)
    blob = manifest.layouts[0]
    assert [(m.rows, m.columns) for m in blob.matrices] == [(28672, 4096), (4096, 14336)]
    assert blob.nbytes == 3 * 4096 * 14336 * 5 // 16 == 55_050_240, "2.5 bits a weight, and whole pages already"
    assert manifest.expert_nbytes == 32 * 8 * blob.nbytes


@pytest.mark.parametrize("name", [n for n in PUBLISHED if not known(n)])
def test_a_family_that_moeflow_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{name}: unknown model type .* known: mixtral"):
        synthetic_manifest(architecture(name), TWO_BIT, name)


@pytest.mark.skipif(known("deepseek-v2-lite"), reason="it has a declaration of its own by now")
def test_a_new_family_needs_only_its_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Family(
        model_type="deepseek_v2",
        experts=r"model\.layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight",
        roles={"gate": "gate", "up": "up", "down": "down"},
    )
    monkeypatch.setitem(families.FAMILIES, "deepseek_v2", declared)
    manifest = synthetic_manifest(architecture("deepseek-v2-lite"), TWO_BIT)
    assert len(manifest.layers) == 26 and manifest.layers[0].module == "model.layers.1.mlp.experts"
    assert manifest.layers[0].experts == 64


# -- as a real checkpoint ----------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe with a dense layer": ("qwen3_moe", {"layers": 3, "dense_layers": (1,)}),
    "float32, odd sizes": ("mixtral", {"dtype": torch.float32, "hidden": 128, "experts": 6}),
}


@pytest.fixture(params=VARIANTS)
def directory(request: pytest.FixtureRequest, checkpoint_factory: Callable[..., Path]) -> Path:
    family, settings = VARIANTS[request.param]
    return checkpoint_factory(family, **settings)


def test_it_has_the_tensors_that_transformers_saves(directory: Path) -> None:
    real, made = Checkpoint.open(directory), synthetic_checkpoint(architecture(str(directory)))
    assert made.digest() == real.digest(), "config, names, dtypes and shapes"
    assert made.layers == real.layers
    assert made.resident == real.resident
    assert [t.nbytes for _, t in sorted(made.tensors.items())] == [t.nbytes for _, t in sorted(real.tensors.items())]


@pytest.mark.parametrize("quantization", [TWO_BIT, Quantization(experts=DenseScheme(), attention=DenseScheme())])
def test_its_manifest_differs_from_the_packed_one_in_bytes_alone(
    directory: Path, tmp_path: Path, quantization: Quantization
) -> None:
    packed = Packer(Checkpoint.open(directory), "x", quantization, tmp_path).run()
    made = synthetic_manifest(architecture(str(directory / "config.json")), quantization, "x")
    empty = {"digests": ("",) * made.layers[0].experts, "relative_error": 0.0, "data_offset": 0}
    expected = packed.model_copy(
        update={
            "layers": tuple(layer.model_copy(update=empty) for layer in packed.layers),
            "shards": made.shards,
            "resident_error": 0.0,
            "files": {},
        }
    )
    assert made == expected
    for shard, real in zip(made.shards, packed.shards, strict=True):
        assert shard.file == real.file and 0 < real.nbytes - shard.nbytes <= 4 * 4096, "without the header"
    assert ModelSizes.of_manifest(made) == ModelSizes.of_manifest(packed)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, OlmoeConfig

    config = OlmoeConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, vocab_size=64, tie_word_embeddings=True, pad_token_id=None,
        eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    real, made = Checkpoint.open(tmp_path), synthetic_checkpoint(architecture(str(tmp_path)))
    assert "lm_head.weight" not in made.tensors
    assert made.digest() == real.digest()


# -- what is asked for wrongly -----------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_ones_and_the_other_way() -> None:
    with pytest.raises(
        CheckpointError, match=r"unknown architecture 'mixtral'; known: deepseek-v2-lite, .*config\.json"
    ):
        architecture("mixtral")


@pytest.mark.parametrize("content", ["[]", "{}", '{"architectures": ["x"]}'])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: not a model's config: it has no model_type"):
        architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "4096"}, "cannot build a model of this config: .*hidden_size"),
        ({"num_attention_heads": 0}, "cannot build a model of this config: integer division"),
        ({"num_local_experts": 0}, "cannot build a model of this config"),
        ({"num_hidden_layers": 0}, "no experts found"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"dtype": "float8"}, "dtype is 'float8'; supported: float32, bfloat16, float16"),
        ({"model_type": "llama"}, "declared are .*mixtral"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_config_that_makes_no_model_is_refused_with_its_source(change: dict[str, Any], message: str) -> None:
    config = {**architecture("mixtral-8x7b"), "num_hidden_layers": 1, **change}
    with pytest.raises(CheckpointError, match=message) as caught:
        synthetic_manifest(config, TWO_BIT, "my-model")
    assert "my-model" in str(caught.value)


def test_a_group_that_does_not_fit_is_refused_as_for_a_real_model() -> None:
    config = {**architecture("mixtral-8x7b"), "hidden_size": 4160, "num_hidden_layers": 1}
    with pytest.raises(DocumentError, match="group_size 64, 32, 16 would fit"):
        synthetic_manifest(config, Quantization(experts=HqqScheme(bits=2, group_size=128)))


def test_a_released_quantization_is_left_out(tiny_checkpoint: Path) -> None:
    config = architecture(str(tiny_checkpoint))
    made = synthetic_checkpoint({**config, "quantization_config": {"quant_method": "mxfp4"}})
    assert made.digest() == synthetic_checkpoint(config).digest()


def test_a_name_gives_a_config_of_its_own() -> None:
    architecture("gpt-oss-20b")["rope_scaling"]["factor"] = 1.0
    assert architecture("gpt-oss-20b")["rope_scaling"]["factor"] == 32.0


def test_random_weights_are_the_same_at_every_call() -> None:
    """Two engines over one artifact are compared by tests and benchmarks."""
    config = {**architecture("mixtral-8x7b"), "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256,
              "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}  # fmt: skip
    four = HqqScheme(bits=4, group_size=64)
    artifact = RandomArtifact(config, Quantization(experts=four, attention=four), "m")
    dtypes = dict.fromkeys(artifact._checkpoint.resident, torch.bfloat16)
    first, again = (artifact.resident(torch.device("cpu"), dtypes) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.keys() == other.keys() and one
        assert all(torch.equal(one[name], other[name]) for name in one)
    blobs = [bytearray(artifact.manifest.layout_of(1).nbytes) for _ in range(3)]
    for blob, expert in zip(blobs, (3, 3, 4), strict=True):
        artifact.read_blob(1, expert, memoryview(blob))
    assert blobs[0] == blobs[1] != blobs[2]
