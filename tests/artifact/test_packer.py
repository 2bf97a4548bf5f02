"""Packing: the right bytes, whatever interrupts it, and no work done twice."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.artifact.reader import Artifact
from moeflow.artifact.safetensors import ShardWriter
from moeflow.errors import ArtifactError, CapacityError, CheckpointError, DocumentError, StorageError
from moeflow.kernels.dequantize import NF4_CODEBOOK
from moeflow.progress import Progress, silent
from moeflow.quantization import registry
from moeflow.quantization.hqq import HqqQuantizer
from moeflow.schema import BitsAndBytesScheme, DenseScheme, HqqScheme, Manifest, PackedMatrix, Quantization, Scheme

SMALL = Quantization(experts=HqqScheme(bits=2, group_size=16), attention=DenseScheme())


def _packer(checkpoint: Path, output: Path, quantization: Quantization = SMALL, progress: Progress = silent) -> Packer:
    return Packer(Checkpoint.open(checkpoint), "tiny/model", quantization, output, progress)


def _content(artifact: Path) -> dict[str, bytes]:
    """Every file of the artifact; the notes of the packing itself are no part of it."""
    files = (p for p in artifact.rglob("*") if p.is_file() and p.relative_to(artifact).parts[0] != ".moeflow")
    return {str(p.relative_to(artifact)): p.read_bytes() for p in files}


def _identity(artifact: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in artifact.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def small(checkpoint_factory: Callable[..., Path]) -> Path:
    """A checkpoint that packs in a few milliseconds."""
    return checkpoint_factory(experts=2, hidden=32, intermediate=32)


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    output = tmp_path_factory.mktemp("whole")
    _packer(small, output).run()
    return _content(output)


# -- the right bytes ---------------------------------------------------------------------------------------

QUANTIZATIONS = {
    "2-bit": Quantization(experts=HqqScheme(bits=2, group_size=16)),
    "3-bit, attention as it is": Quantization(experts=HqqScheme(bits=3), attention=DenseScheme()),
    "4-bit": Quantization(),
    "8-bit, 3-bit attention": Quantization(experts=HqqScheme(bits=8), attention=HqqScheme(bits=3, group_size=32)),
    "2-bit with 8-bit scales, int8 attention": Quantization(
        experts=HqqScheme(bits=2, group_size=16, metadata_bits=8), attention=BitsAndBytesScheme(format="int8")
    ),
    "nf4": Quantization(experts=BitsAndBytesScheme(format="nf4"), attention=BitsAndBytesScheme(format="nf4")),
    "int8, 3-bit attention with 8-bit scales": Quantization(
        experts=BitsAndBytesScheme(format="int8"), attention=HqqScheme(bits=3, group_size=32, metadata_bits=8)
    ),
    "unquantized": Quantization(experts=DenseScheme(), attention=DenseScheme()),
}


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def packed(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    output = tmp_path_factory.mktemp("packed")
    return output, _packer(tiny_checkpoint, output, QUANTIZATIONS[request.param]).run()


def _array(raw: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(shape).astype(np.float64)
    names = {"uint8": "u1", "int32": "<u4", "float16": "<f2", "float32": "<f4"}
    return np.frombuffer(raw, names[dtype]).reshape(shape)


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Little-endian fields of `bits` bits, from the bytes of the words."""
    stream = np.unpackbits(words.copy().view(np.uint8), axis=-1, bitorder="little")
    fields = stream.reshape(words.shape[0], -1, bits).astype(np.int64)
    return (fields << np.arange(bits)).sum(-1)


def _restored(matrix: PackedMatrix, part: Callable[[str], bytes]) -> np.ndarray:
    """The matrix in float64, from raw bytes by the manifest's description alone."""
    arrays = {s.part: _array(part(s.part), s.dtype, s.shape) for s in matrix.segments}
    if "dense" in arrays:
        return arrays["dense"]
    if isinstance(matrix.scheme, BitsAndBytesScheme):
        return _restored_bitsandbytes(matrix.scheme, arrays)
    assert isinstance(matrix.scheme, HqqScheme)
    codes = _fields(arrays["words"], 2 if matrix.scheme.bits == 3 else matrix.scheme.bits)
    if "high" in arrays:
        columns = np.arange(codes.shape[1])
        bits = columns // 32 * 32 + 8 * (columns % 16 // 4) + 4 * (columns % 32 // 16) + columns % 4
        codes = codes + 4 * _fields(arrays["high"], 1)[:, bits]
    pairs = _pairs(arrays).repeat(matrix.scheme.group_size, axis=1)
    return (codes - pairs[..., 1]) * pairs[..., 0]


def _pairs(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Scale and zero of each group; 8-bit ones take two roundings in float32, which is part of the format."""
    if "scales" in arrays:
        return arrays["scales"].astype(np.float64)
    steps = arrays["meta_scales"].repeat(128, axis=1)[:, : arrays["meta"].shape[1]]
    return (arrays["meta"].astype(np.float32) * steps[..., ::2] + steps[..., 1::2]).astype(np.float64)


def _restored_bitsandbytes(scheme: BitsAndBytesScheme, arrays: dict[str, np.ndarray]) -> np.ndarray:
    scales = arrays["scales"].astype(np.float64)
    if scheme.format == "int8":
        return arrays["words"].copy().view("i1") * scales[:, None]
    return np.array(NF4_CODEBOOK)[_fields(arrays["words"], 4)] * scales.repeat(64, axis=1)


def _expected(weights: list[torch.Tensor], scheme: Scheme) -> np.ndarray:
    """Each matrix by the backend's own library: hqq with its scale and zero in 16 bits, nf4 with its scale in 16."""
    from hqq.core.quantize import Quantizer

    if isinstance(scheme, DenseScheme):
        return torch.cat(weights).double().numpy()
    if isinstance(scheme, BitsAndBytesScheme):
        return np.concatenate([_by_bitsandbytes(weight, scheme.format) for weight in weights])
    rows = []
    for weight in weights:
        if scheme.metadata_bits == 8:  # hqq has no such codes: tests/quantization/test_metadata.py is their oracle
            rows.append(torch.from_numpy(_by_own_codes(weight, scheme)))
            continue
        codes, meta = Quantizer.quantize(
            weight.float(), nbits=scheme.bits, group_size=scheme.group_size, axis=1, bitpack=False, device="cpu"
        )
        scale, zero = meta["scale"].half().double(), meta["zero"].half().double()
        rows.append(((codes.double() - zero) * scale).view(weight.shape))
    return torch.cat(rows).numpy()


def _by_own_codes(weight: torch.Tensor, scheme: HqqScheme) -> np.ndarray:
    stored = HqqQuantizer(scheme).quantize(weight)
    pairs = _pairs({part: tensor.numpy() for part, tensor in stored.factors.items()})
    wide = pairs.repeat(scheme.group_size, axis=1)
    return (stored.codes.double().numpy() - wide[..., 1]) * wide[..., 0]


def _by_bitsandbytes(weight: torch.Tensor, form: str) -> np.ndarray:
    from bitsandbytes import functional

    if form == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(weight.float())
        return (codes.double() * (largest / 127).double().unsqueeze(1)).numpy()
    packed, state = functional.quantize_4bit(weight.float(), quant_type="nf4", blocksize=64)
    scales, state.absmax = state.absmax.half().double(), torch.ones_like(state.absmax)
    numbers = functional.dequantize_4bit(packed, state).double()  # of the codebook; their products here do not round
    return (numbers * scales.view(len(weight), -1).repeat_interleave(64, dim=1)).numpy()


def _squares(restored: np.ndarray, original: torch.Tensor) -> np.ndarray:
    exact = original.double().numpy()
    return np.array([((restored - exact) ** 2).sum(), (exact**2).sum()])


def test_every_blob_holds_its_expert_and_the_error_is_the_true_one(
    packed: tuple[Path, Manifest], tiny_checkpoint: Path
) -> None:
    output, manifest = packed
    checkpoint, tensors = Checkpoint.open(tiny_checkpoint), load_file(tiny_checkpoint / "model.safetensors")
    for number, (entry, layer) in enumerate(zip(manifest.layers, checkpoint.layers, strict=True)):
        layout = manifest.layout_of(number)
        raw = (output / entry.shard).read_bytes()
        assert entry.data_offset % 4096 == 0
        assert len(raw) == entry.data_offset + entry.experts * layout.nbytes
        sums = np.zeros(2)
        for expert, names in enumerate(layer.experts):
            start = entry.data_offset + expert * layout.nbytes
            for matrix, roles in zip(layout.matrices, (("gate", "up"), ("down",)), strict=True):
                places = {s.part: (start + s.offset, start + s.offset + s.nbytes) for s in matrix.segments}
                restored = _restored(matrix, lambda part, raw=raw, places=places: raw[slice(*places[part])])
                weights = [tensors[names[role].tensor] for role in roles]
                np.testing.assert_array_equal(restored, _expected(weights, matrix.scheme))
                sums += _squares(restored, torch.cat(weights))
        assert entry.relative_error == pytest.approx(math.sqrt(sums[0] / sums[1]), abs=1.5e-6)


def test_every_resident_tensor_is_there_and_the_error_is_the_true_one(
    packed: tuple[Path, Manifest], tiny_checkpoint: Path
) -> None:
    output, manifest = packed
    checkpoint, tensors = Checkpoint.open(tiny_checkpoint), load_file(tiny_checkpoint / "model.safetensors")
    matrices = {m.name: m for m in manifest.resident}
    sums = np.zeros(2)
    with safe_open(output / manifest.resident_shard, framework="pt") as reader:
        expected_keys = {f"{m.name}.{s.part}" for m in manifest.resident for s in m.segments}
        assert set(reader.keys()) == expected_keys | (set(checkpoint.resident) - set(matrices))
        for name, stored in checkpoint.resident.items():
            if name not in matrices:
                assert torch.equal(reader.get_tensor(name), tensors[stored])
                continue
            matrix = matrices[name]
            restored = _restored(matrix, lambda part, name=name: reader.get_tensor(f"{name}.{part}").numpy().tobytes())
            np.testing.assert_array_equal(restored, _expected([tensors[stored]], matrix.scheme))
            sums += _squares(restored, tensors[stored])
    expected = math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0
    assert manifest.resident_error == pytest.approx(expected, abs=1.5e-6)


def test_attention_alone_is_quantized_among_the_resident(packed: tuple[Path, Manifest]) -> None:
    _, manifest = packed
    names = {m.name for m in manifest.resident}
    assert all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj") for name in names)
    assert len(names) == (0 if isinstance(manifest.quantization.attention, DenseScheme) else 8)


def test_the_resident_bytes_are_the_data_of_the_shard(packed: tuple[Path, Manifest]) -> None:
    output, manifest = packed
    with safe_open(output / manifest.resident_shard, framework="pt") as reader:
        assert manifest.resident_nbytes == sum(reader.get_tensor(name).nbytes for name in reader.keys())  # noqa: SIM118


def test_the_manifest_tells_the_model(tiny_artifact: Path, tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    manifest = Manifest.load(tiny_artifact / "manifest.json")
    facts = manifest.model
    assert (facts.source, facts.type, facts.dtype, facts.top_k) == ("tiny/mixtral", "mixtral", "bfloat16", 2)
    assert (facts.parameters, facts.expert_parameters) == (checkpoint.parameters(), checkpoint.parameters(True))
    assert facts.source_digest == checkpoint.digest()
    assert manifest.expert_nbytes == 2 * 8 * manifest.layouts[0].nbytes
    assert [(layer.module, layer.router) for layer in manifest.layers] == [
        (f"model.layers.{i}.mlp.experts", f"model.layers.{i}.mlp.gate") for i in range(2)
    ]


def test_an_artifact_is_usable_without_the_checkpoint(tiny_artifact: Path, tiny_checkpoint: Path) -> None:
    manifest = Manifest.load(tiny_artifact / "manifest.json")
    carried = {p.name for p in tiny_checkpoint.iterdir()} - {"model.safetensors"}
    assert set(manifest.files) == carried >= {"config.json", "tokenizer.json", "LICENSE", "chat_template.jinja"}
    for name in carried:
        assert (tiny_artifact / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [{"family": "olmoe"}, {"family": "qwen2_moe"}, {"family": "qwen3_moe", "layers": 3, "dense_layers": (1,)}],
)
def test_other_families_pack_and_verify(
    checkpoint_factory: Callable[..., Path], tmp_path: Path, settings: dict[str, object]
) -> None:
    checkpoint = checkpoint_factory(**{"experts": 4, **settings})
    manifest = _packer(checkpoint, tmp_path / "out").run()
    expected = [0, 2] if "dense_layers" in settings else [0, 1]
    assert [layer.module for layer in manifest.layers] == [f"model.layers.{i}.mlp.experts" for i in expected]
    assert list(Artifact.open(tmp_path / "out").verify()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unquantized_weights_stay_bit_for_bit(
    checkpoint_factory: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    directory = checkpoint_factory(experts=2, hidden=32, intermediate=32, dtype=dtype)
    manifest = _packer(directory, tmp_path, Quantization(experts=DenseScheme(), attention=DenseScheme())).run()
    tensors = load_file(directory / "model.safetensors")
    names = Checkpoint.open(directory).layers[1].experts[1]
    raw = (tmp_path / manifest.layers[1].shard).read_bytes()
    down = manifest.layout_of(1).matrices[1].segments[0]
    start = manifest.layers[1].data_offset + manifest.layout_of(1).nbytes + down.offset
    assert raw[start : start + down.nbytes] == tensors[names["down"].tensor].view(torch.uint8).numpy().tobytes()
    assert {layer.relative_error for layer in manifest.layers} == {0.0}


def test_the_place_of_checkpoint_and_artifact_leaves_no_trace(
    small: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    copy = shutil.copytree(small, tmp_path / "elsewhere")
    _packer(copy, tmp_path / "out" / "deep").run()
    assert _content(tmp_path / "out" / "deep") == whole


def test_a_group_size_that_does_not_fit_is_refused_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for quantization in (
        Quantization(experts=HqqScheme(group_size=128)),
        Quantization(attention=HqqScheme(group_size=256)),
    ):
        with pytest.raises(DocumentError, match="group_size 64, 32, 16 would fit"):
            _packer(tiny_checkpoint, tmp_path / "out", quantization)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["experts.1.w2", "self_attn.q_proj"])
def test_weights_that_are_no_numbers_are_refused_by_name(small: Path, tmp_path: Path, place: str, value: float) -> None:
    damaged = Path(shutil.copytree(small, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    name = next(n for n in sorted(tensors) if place in n)
    tensors[name][3, 5] = value
    save_file(tensors, damaged / "model.safetensors")
    quantization = Quantization(experts=HqqScheme(group_size=32), attention=HqqScheme(group_size=32))
    with pytest.raises(CheckpointError, match=name):
        _packer(damaged, tmp_path / "out", quantization).run()


# -- interruptions -----------------------------------------------------------------------------------------


class _Interruption:
    """Raises at the n-th call of a function of the writing machinery; the call itself does not happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seam: str, after: int, error: BaseException):
        owner, name = {
            "rename": (Path, "replace"),
            "flush": (os, "fsync"),
            "shard": (ShardWriter, "write"),
        }[seam]
        original = getattr(owner, name)
        self.calls = 0

        def call(*args: object) -> object:
            self.calls += 1
            if self.calls == after:
                raise error
            return original(*args)

        monkeypatch.setattr(owner, name, call)


def _interrupt(
    packer: Packer, monkeypatch: pytest.MonkeyPatch, seam: str, after: int, error: BaseException
) -> tuple[bool, BaseException | None]:
    with monkeypatch.context() as patch:
        interruption = _Interruption(patch, seam, after, error)
        try:
            packer.run()
        except BaseException as caught:
            assert caught is error or caught.__cause__ is error
            return True, caught
        return interruption.calls >= after, None


@pytest.mark.parametrize("seam", ["rename", "flush", "shard"])
def test_interrupted_at_any_write_the_next_run_gives_the_same_bytes(
    small: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, seam: str
) -> None:
    points = 0
    for after in range(1, 200):
        output = tmp_path / str(after)
        error = OSError(errno.ENOSPC, "full") if after % 2 else KeyboardInterrupt()
        reached, caught = _interrupt(_packer(small, output), monkeypatch, seam, after, error)
        if not reached:
            break
        points += 1
        assert caught is not None
        assert isinstance(caught, StorageError if after % 2 else KeyboardInterrupt)
        assert not list(output.rglob("*.part"))
        kept = _identity(output)
        shards = sorted((n for n in kept if n.endswith(".safetensors")), key=lambda n: kept[n][1])
        packer = _packer(small, output)
        if "manifest.json" not in kept:
            assert not packer.finished()
            with pytest.raises(ArtifactError, match="packing was interrupted: run `moeflow pack` again"):
                Artifact.open(output)
        packer.run()
        assert _content(output) == whole
        assert packer.finished()
        now = _identity(output)
        assert all(now[name] == kept[name] for name in shards[:-1]), "at most one finished shard is made again"
    else:
        pytest.fail("the run never came to its end")
    assert points >= {"rename": 10, "flush": 20, "shard": 20}[seam]


def test_a_shard_that_was_recorded_is_not_made_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third rename is layer 1's shard; layer 0 has its shard and its record."""
    _interrupt(_packer(small, tmp_path), monkeypatch, "rename", 3, KeyboardInterrupt())
    before = _identity(tmp_path)
    assert set(before) == {"experts-0.safetensors"}
    _packer(small, tmp_path).run()
    assert _identity(tmp_path)["experts-0.safetensors"] == before["experts-0.safetensors"]


def test_interruptions_may_follow_one_another(
    small: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0
    while runs < 50:
        runs += 1
        reached, _ = _interrupt(_packer(small, tmp_path), monkeypatch, "rename", 3, KeyboardInterrupt())
        if not reached:
            break
        if all((tmp_path / f"{name}.safetensors").exists() for name in ("experts-0", "experts-1", "resident")):
            _packer(small, tmp_path).run()
            break
    assert 2 < runs < 50
    assert _content(tmp_path) == whole


def test_the_manifest_is_the_last_file(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (names.append(Path(to).name), replace(self, to))[1])
    _packer(small, tmp_path).run()
    assert names[-1] == "manifest.json"
    assert names.count("manifest.json") == 1
    assert names.index("experts-0.safetensors") < names.index("experts-1.safetensors") < names.index("config.json")


def test_while_an_artifact_is_made_anew_it_has_no_manifest(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _packer(small, tmp_path).run()
    other = Quantization(experts=HqqScheme(bits=8, group_size=16), attention=DenseScheme())
    _interrupt(_packer(small, tmp_path, other), monkeypatch, "shard", 1, KeyboardInterrupt())
    with pytest.raises(ArtifactError, match="run `moeflow pack` again"):
        Artifact.open(tmp_path)


SLOW_PACK = """
import sys, time
from pathlib import Path
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.schema import DenseScheme, HqqScheme, Quantization
quantization = Quantization(experts=HqqScheme(bits=2, group_size=16), attention=DenseScheme())
slow = lambda *_: time.sleep(0.05)
Packer(Checkpoint.open(Path(sys.argv[1])), "tiny/model", quantization, Path(sys.argv[2]), slow).run()
"""


def test_a_killed_process_is_gone_on_with(small: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """SIGKILL, with nothing run on the way out, while the second shard is being written."""
    process = subprocess.Popen([sys.executable, "-c", SLOW_PACK, str(small), str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "experts-1.safetensors.part").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    before = _identity(tmp_path)
    assert set(before) == {"experts-0.safetensors", "experts-1.safetensors.part"}
    with pytest.raises(ArtifactError, match="run `moeflow pack` again"):
        Artifact.open(tmp_path)
    _packer(small, tmp_path).run()
    assert _content(tmp_path) == whole
    assert _identity(tmp_path)["experts-0.safetensors"] == before["experts-0.safetensors"]


# -- no work twice -----------------------------------------------------------------------------------------


def _everything(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.rglob("*")}


def test_a_second_run_does_nothing(small: Path, tmp_path: Path) -> None:
    first = _packer(small, tmp_path).run()
    before = _everything(tmp_path)
    again = _packer(small, tmp_path)
    assert again.finished()
    assert again.run() == first
    assert _everything(tmp_path) == before


def test_asking_whether_it_is_finished_writes_nothing(small: Path, tmp_path: Path) -> None:
    assert not _packer(small, tmp_path / "out").finished()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("quantization", "remade"),
    [
        (SMALL.model_copy(update={"experts": HqqScheme(bits=3, group_size=16)}), {"experts-0", "experts-1"}),
        (SMALL.model_copy(update={"experts": HqqScheme(bits=2, group_size=32)}), {"experts-0", "experts-1"}),
        (SMALL.model_copy(update={"attention": HqqScheme(bits=4, group_size=16)}), {"resident"}),
    ],
    ids=["bits", "group", "attention"],
)
def test_a_changed_quantization_is_noticed_and_makes_only_its_shards(
    small: Path, tmp_path: Path, quantization: Quantization, remade: set[str]
) -> None:
    _packer(small, tmp_path / "out").run()
    before = _identity(tmp_path / "out")
    packer = _packer(small, tmp_path / "out", quantization)
    assert not packer.finished()
    packer.run()
    assert packer.finished()
    assert not _packer(small, tmp_path / "out").finished()
    after = _identity(tmp_path / "out")
    assert {n.removesuffix(".safetensors") for n in after if n.endswith("rs") and after[n] != before[n]} == remade
    _packer(small, tmp_path / "fresh", quantization).run()
    assert _content(tmp_path / "out") == _content(tmp_path / "fresh")


def test_another_version_of_a_library_outdates_only_what_it_quantized(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8 = BitsAndBytesScheme(format="int8")
    for experts, attention in ((HqqScheme(group_size=32), int8), (int8, HqqScheme(group_size=32)), (int8, int8)):
        packer = _packer(small, tmp_path, Quantization(experts=experts, attention=attention))
        before = {unit.shard: unit.key for unit in packer.units()}
        with monkeypatch.context() as patch:
            patch.setattr(registry, "version", lambda name: "99" if name == "bitsandbytes" else version(name))
            after = {unit.shard: unit.key for unit in packer.units()}
        changed = {shard for shard in before if before[shard] != after[shard]}
        experts_change = {s for s in before if s.startswith("experts-")} if experts == int8 else set()
        assert changed == experts_change | ({"resident.safetensors"} if attention == int8 else set())


def _touch_weights(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"] *= 2
    save_file(tensors, checkpoint / "model.safetensors")


def _edit_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))


def _edit_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text("{}")


def _add_license(checkpoint: Path) -> None:
    (checkpoint / "LICENSE.md").write_text("More words.\n")


@pytest.mark.parametrize("change", [_touch_weights, _edit_config, _edit_tokenizer, _add_license])
def test_a_changed_checkpoint_is_noticed(small: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    checkpoint = Path(shutil.copytree(small, tmp_path / "checkpoint"))
    _packer(checkpoint, tmp_path / "out").run()
    change(checkpoint)
    packer = _packer(checkpoint, tmp_path / "out")
    assert not packer.finished()
    packer.run()
    _packer(checkpoint, tmp_path / "fresh").run()
    assert _content(tmp_path / "out") == _content(tmp_path / "fresh")
    assert packer.finished()


@pytest.mark.parametrize("damage", ["removed", "cut", "without its record", "with garbage for a record"])
@pytest.mark.parametrize("shard", ["experts-1.safetensors", "resident.safetensors"])
def test_a_shard_that_is_not_there_in_full_is_made_again(
    small: Path, tmp_path: Path, whole: dict[str, bytes], shard: str, damage: str
) -> None:
    _packer(small, tmp_path).run()
    (record,) = (p for p in (tmp_path / ".moeflow").iterdir() if p.name.startswith(shard))
    match damage:
        case "removed":
            (tmp_path / shard).unlink()
        case "cut":
            os.truncate(tmp_path / shard, 5000)
        case "without its record":
            record.unlink()
        case _:
            record.write_text("[]")
    packer = _packer(small, tmp_path)
    assert not packer.finished()
    packer.run()
    assert _content(tmp_path) == whole
    assert packer.finished()


def test_a_larger_model_that_was_there_before_leaves_no_shards(
    small: Path, tmp_path: Path, whole: dict[str, bytes], checkpoint_factory: Callable[..., Path]
) -> None:
    _packer(checkpoint_factory(layers=3, experts=2, hidden=32, intermediate=32), tmp_path).run()
    _packer(small, tmp_path).run()
    assert _content(tmp_path) == whole


# -- room and refusals -------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_too_little_disk_is_told_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 1000, 1000))
    with pytest.raises(CapacityError, match=r"packing needs .* KiB more, the disk has 1000 B free; choose another"):
        _packer(small, tmp_path / "out").run()
    assert not (tmp_path / "out").exists() or _content(tmp_path / "out") == {}


def test_too_little_disk_leaves_a_finished_artifact_usable(
    small: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    _packer(small, tmp_path).run()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 1000, 1000))
    with pytest.raises(CapacityError):
        _packer(small, tmp_path, SMALL.model_copy(update={"experts": HqqScheme(bits=8, group_size=16)})).run()
    assert _content(tmp_path) == whole


def test_the_room_that_is_asked_for_is_what_the_artifact_takes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers and small files aside: enough is asked for, and not half as much again."""
    needed = sum(unit.nbytes for unit in _packer(tiny_checkpoint, tmp_path, Quantization()).units())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed, 0, needed))
    manifest = _packer(tiny_checkpoint, tmp_path, Quantization()).run()
    written = sum(shard.nbytes - 4096 for shard in manifest.shards)
    assert written - 3 * 4096 <= needed <= 1.5 * written


def test_a_finished_shard_needs_no_room_again(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt(_packer(small, tmp_path), monkeypatch, "rename", 3, KeyboardInterrupt())
    rest = sum(unit.nbytes for unit in _packer(small, tmp_path).units()[1:])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(rest, 0, rest))
    _packer(small, tmp_path).run()
    assert Artifact.open(tmp_path)


def test_a_place_that_takes_no_directory_is_a_storage_error(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        _packer(small, tmp_path / "file" / "out").run()


def test_progress_counts_bytes_up_to_all_of_them(small: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    packer = _packer(small, tmp_path, progress=lambda *report: reports.append(report))
    packer.run()
    total = sum(unit.nbytes for unit in packer.units())
    done = [report[1] for report in reports]
    assert done == sorted(done)
    assert done[-1] == total
    assert {report[2] for report in reports} == {total}
    assert len({report[0] for report in reports}) == 3
