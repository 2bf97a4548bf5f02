"""Schemes by role: shared experts and the output head, packed as attention is, on disk, in plans and in engines."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.routes import assert_follows
from oracle import dequantized_model
from rich.console import Console
from safetensors import safe_open
from tiny import FAMILIES

import moeflow
from moeflow.artifact import layout
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.artifact.reader import Artifact
from moeflow.console import show_manifest
from moeflow.engine import Engine
from moeflow.errors import DocumentError
from moeflow.model.linear import PackedLinear
from moeflow.pipeline import _plan_for
from moeflow.planning.sizes import ModelSizes
from moeflow.planning.workspace import matrices
from moeflow.schema import HqqScheme, Quantization

BOUND = 5e-3  # of the largest logit; the kernels round activations to 16-bit fixed point
HQQ = {"backend": "hqq", "bits": 4, "group_size": 64}
META8 = {**HQQ, "metadata_bits": 8}  # not nf4, whose kernel multiplies halves: 5e-4 a product
SHARED = ("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "qwen2_moe")
TIED = ("ernie4_5_moe", "granitemoe", "hunyuan_v1_moe", "lfm2_moe")


def _quantization(family: str) -> dict[str, Any]:
    """Everything that can be packed is."""
    roles: dict[str, Any] = {"experts": {**HQQ, "bits": 3}, "attention": {**HQQ, "bits": 8, "group_size": 32}}
    if family in SHARED:
        roles["shared_experts"] = META8
    if family not in TIED:
        roles["head"] = {**HQQ, "bits": 8}
    return roles


@pytest.fixture(scope="module")
def packed(checkpoint_factory: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's artifact with every role packed, made once."""
    made: dict[str, Path] = {}

    def pack(family: str) -> Path:
        if family not in made:
            checkpoint = checkpoint_factory(family, layers=2)
            profile = {
                "model": str(checkpoint), "quantization": _quantization(family), "hardware": "cpu-2-cores",
                "context_length": 128,
            }  # fmt: skip
            made[family] = moeflow.pack(profile, tmp_path_factory.mktemp("roles") / "a")
        return made[family]

    return pack


def _ids(count: int) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_which_matrices_have_a_role(checkpoint_factory: Callable[..., Path], family: str) -> None:
    checkpoint = Checkpoint.open(checkpoint_factory(family))
    roles: dict[str, list[str]] = {}
    for name in checkpoint.resident:
        roles.setdefault(checkpoint.family.resident_role(name) or "", []).append(name)
    assert ("shared_experts" in roles) == (family in SHARED)
    assert roles.get("head", []) == ([] if family in TIED else ["lm_head.weight"])
    assert all("shared" in name for name in roles.get("shared_experts", []))
    assert len(roles.get("shared_experts", [])) % 3 == 0  # gate, up, down
    left = [n for n in roles[""] if "shared" in n]
    assert all(n.endswith((".bias", ".shared_expert_gate.weight")) for n in left)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "hunyuan_v1_moe", "phimoe"])
def test_the_host_computes_what_the_dequantized_weights_do(packed: Callable[[str], Path], family: str) -> None:
    artifact, ids = packed(family), _ids(24)
    assert list(Artifact.open(artifact).verify()) == []
    model = dequantized_model(artifact)
    with moeflow.load(artifact, experts_per_layer=3, cpu_experts="off") as engine:
        assert_follows(engine, model, ids, chunks=(512, 1))
    with moeflow.load(artifact) as engine:  # by the CPU's kernels where they are
        assert_follows(engine, model, ids, (512, 4, 1), BOUND)


def _on_device(artifact: Path, **overrides: object) -> Engine:
    emulator = pytest.importorskip("emulator.launcher")
    if not emulator.available():
        pytest.skip("no g++")
    opened = Artifact.open(artifact)
    plan = _plan_for(opened, {"execution": "device", "experts_per_layer": 3, **overrides})
    engine = Engine(opened, plan, launcher=emulator.EmulatedLauncher("forward"))
    assert engine.execution == "device-driven", engine.fallback
    return engine


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_the_device_computes_what_the_dequantized_weights_do(packed: Callable[[str], Path], family: str) -> None:
    artifact = packed(family)
    with _on_device(artifact) as engine:
        assert_follows(engine, dequantized_model(artifact), _ids(20), (512, 1), BOUND)
        head = engine._model.get_output_embeddings()
        assert isinstance(head, PackedLinear) and head.gemv is not None


def test_a_large_matrix_is_unpacked_block_by_block(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, and the memory of one block; here the head is four blocks."""
    artifact, ids = packed("qwen2_moe"), _ids(20)
    model = dequantized_model(artifact)
    monkeypatch.setattr(layout, "UNPACKED", 32 * 64)
    monkeypatch.setattr(layout, "BLOCK_ROWS", 32)
    head = next(m for m in Artifact.open(artifact).manifest.resident if m.role == "head")
    assert [block.rows for block in layout.row_blocks(head)] == [32] * 4
    with moeflow.load(artifact, experts_per_layer=3, cpu_experts="off") as engine:
        assert_follows(engine, model, ids, (512,))
    with moeflow.load(artifact) as engine:
        assert_follows(engine, model, ids * 2, (512,), BOUND)  # more tokens than are multiplied packed
    with _on_device(artifact) as engine:
        assert_follows(engine, model, ids, (512,), BOUND)


def test_an_output_head_takes_no_more_workspace_than_a_block() -> None:
    wide = layout.resident_matrix("head", "lm_head.weight", 151936, 2048, HqqScheme(), "bfloat16")
    blocks = layout.row_blocks(wide)
    assert sum(b.rows for b in blocks) == wide.rows
    assert max(b.rows * b.columns for b in blocks) <= layout.UNPACKED
    for part, segment in enumerate(wide.segments):
        assert blocks[0].segments[part].offset == segment.offset
        assert sum(b.segments[part].nbytes for b in blocks) == segment.nbytes
        assert all(b.segments[part].offset % layout.ALIGNMENT == 0 for b in blocks)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "hunyuan_v1_moe", "gpt_oss"])
def test_manifest_sizes_and_inspect_count_them(packed: Callable[[str], Path], family: str) -> None:
    opened = Artifact.open(packed(family))
    manifest, quantization = opened.manifest, Quantization.model_validate(_quantization(family))
    assert manifest.quantization == quantization
    wanted = {role for role in ("attention", "shared_experts", "head") if role in _quantization(family)}
    assert {m.role for m in manifest.resident} == wanted
    for matrix in manifest.resident:
        assert matrix.scheme == getattr(quantization, matrix.role)
    with safe_open(opened.directory / manifest.resident_shard, framework="pt") as reader:
        assert manifest.resident_nbytes == sum(reader.get_tensor(name).nbytes for name in reader.keys())  # noqa: SIM118
    checkpoint = Checkpoint.open(Path(manifest.model.source))
    sizes = ModelSizes.of_checkpoint(checkpoint, quantization)
    assert sizes == ModelSizes.of_manifest(manifest)
    assert sizes.largest_resident * 8 <= matrices(sizes, "float32", "host")
    stream = io.StringIO()
    show_manifest(manifest, Console(file=stream, width=160))
    for role in wanted:
        assert f"{role.replace('_', ' ')}, packed" in stream.getvalue()


def test_documents_from_before_keep_their_bytes(tiny_artifact: Path) -> None:
    text = (tiny_artifact / "manifest.json").read_text()
    assert '"role"' not in text and '"head"' not in text and '"shared_experts"' not in text


def test_a_scheme_without_anything_to_apply_to_is_refused(
    checkpoint_factory: Callable[..., Path], tmp_path: Path
) -> None:
    def refusal(family: str, **roles: Any) -> str:
        with pytest.raises(DocumentError) as caught:
            Packer(Checkpoint.open(checkpoint_factory(family)), "x", Quantization(**roles), tmp_path)
        return str(caught.value)

    assert refusal("mixtral", shared_experts=HqqScheme(bits=4)) == (
        "quantization.shared_experts is 4-bit g64; this mixtral has no shared experts: leave it out"
    )
    for family in TIED:
        message = refusal(family, head=HqqScheme(bits=4))
        assert message.startswith(
            f"quantization.head is 4-bit g64; this {family} ties its output head to the embedding"
        )
        assert message.endswith("leave it out")
    assert "group_size 64, 32, 16 would fit" in refusal("mixtral", head=HqqScheme(group_size=128))
