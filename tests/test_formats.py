"""Every packed format through a whole engine: packed, loaded, run, and compared with transformers on its weights."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import dequantized_model, greedy_of, logits_of
from rich.console import Console

import moeflow
from moeflow.artifact.reader import Artifact
from moeflow.console import show_manifest
from moeflow.errors import DocumentError

# As in test_engine.py: both sides do the same float32 operations, over another number of tokens at a time.
TOLERANCE = 2e-5
CPU = {
    "name": "test-cpu",
    "origin": "measured",
    "cpu": {"cores": 2, "memory_bandwidth": "10GB/s"},
    "ram": "16GiB",
    "link": {"host_to_device": "8GB/s"},
}
SCHEMES = {
    "meta8": {"backend": "hqq", "bits": 2, "group_size": 16, "metadata_bits": 8},
    "3-bit meta8": {"backend": "hqq", "bits": 3, "group_size": 32, "metadata_bits": 8},
    "nf4": {"backend": "bitsandbytes", "format": "nf4"},
    "int8": {"backend": "bitsandbytes", "format": "int8"},
    "none": {"backend": "none"},
}
PAIRS = [("nf4", "int8"), ("int8", "nf4"), ("meta8", "nf4"), ("none", "meta8"), ("3-bit meta8", "int8")]

Packed = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """`packed(experts, attention)` by names in SCHEMES, each pair made once."""
    hardware = tmp_path_factory.mktemp("hardware") / "test-cpu.yaml"
    moeflow.HardwareProfile.parse(CPU, "test").save(hardware)
    made: dict[tuple[str, str], Path] = {}

    def pack(experts: str, attention: str) -> Path:
        if (experts, attention) not in made:
            quantization = {"experts": SCHEMES[experts], "attention": SCHEMES[attention]}
            profile = {"model": str(tiny_checkpoint), "quantization": quantization, "hardware": str(hardware)}
            made[experts, attention] = moeflow.pack(profile, tmp_path_factory.mktemp("formats") / "a")
        return made[experts, attention]

    return pack


def _ids(count: int) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("experts", "attention"), PAIRS)
def test_an_engine_computes_what_transformers_does_with_the_dequantized_weights(
    packed: Packed, experts: str, attention: str
) -> None:
    artifact, ids = packed(experts, attention), _ids(30)
    assert list(Artifact.open(artifact).verify()) == []
    model = dequantized_model(artifact)
    reference = logits_of(model, ids)
    with moeflow.load(artifact, experts_per_layer=3, cpu_experts="off") as engine:  # kernels: test_cpu_engine.py
        for chunk in (512, 1):
            assert (engine.logits(ids, chunk=chunk) - reference).abs().max() <= TOLERANCE * reference.abs().max()
        found, expected = list(engine.generate(ids, max_new_tokens=12, temperature=0).ids), greedy_of(model, ids, 12)
        assert found == expected[: len(found)]
        assert len(found) == 12 or expected[len(found)] in engine._stop_ids  # the text may end


@pytest.mark.parametrize(("experts", "attention"), PAIRS[:3])
def test_every_row_of_the_ablation_gives_the_same_bits(packed: Packed, experts: str, attention: str) -> None:
    artifact, ids = packed(experts, attention), _ids(20)
    with moeflow.load(artifact, experts_per_layer=8) as engine:
        expected = engine.logits(ids, chunk=1)
    for strategy in ("full", "no-prefetch", "no-cache", "naive"):
        with moeflow.load(artifact, experts_per_layer=2, strategy=strategy, ram=0) as engine:
            assert torch.equal(engine.logits(ids, chunk=1), expected)


def test_packing_the_same_again_does_nothing(packed: Packed) -> None:
    """The profile and the manifest come back from their files as they were written, new keys included."""
    artifact = packed("meta8", "nf4")
    before = {p.name: p.stat().st_mtime_ns for p in artifact.iterdir() if p.suffix == ".safetensors"}
    assert moeflow.pack(artifact / "profile.yaml", artifact) == artifact
    assert {p.name: p.stat().st_mtime_ns for p in artifact.iterdir() if p.suffix == ".safetensors"} == before


def test_inspect_counts_scales_and_zeros(packed: Packed) -> None:
    """64 columns: 2 bits, 16 for each group of 16 and one block of 16 bytes, and nf4 at 4.25; blobs are whole pages."""
    manifest = Artifact.open(packed("meta8", "nf4")).manifest
    stream = io.StringIO()
    show_manifest(manifest, Console(file=stream, width=160))
    text = stream.getvalue()
    assert "experts 2-bit g16 meta8, attention nf4" in text
    rows = {line.split("  ")[0]: line for line in text.splitlines() if "iB" in line}
    weights = 3 * 64 * 64
    nbytes = -(-(weights * 3 // 8 + 3 * 64 * 16) // 4096) * 4096
    assert manifest.layouts[0].nbytes == nbytes
    assert f" {8 * nbytes / weights:.2f} " in rows["experts"]
    assert " 4.25 " in rows["attention, packed"]
    assert "meta_scales" in text


def test_a_model_whose_inputs_do_not_fit_is_refused_before_packing(
    checkpoint_factory: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = checkpoint_factory(experts=2, hidden=32, intermediate=32)
    quantization = {"experts": SCHEMES["nf4"], "attention": SCHEMES["none"]}
    with pytest.raises(DocumentError, match=r"has 32 inputs, not a multiple of 64 \(nf4\); format int8 would fit"):
        moeflow.pack({"model": str(checkpoint), "quantization": quantization}, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
