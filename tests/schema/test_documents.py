"""Every document survives its file, cannot be changed, and is refused when it is newer than this moeflow."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from moeflow import schema
from moeflow.artifact.layout import expert_layout, resident_matrix
from moeflow.errors import DocumentError
from moeflow.schema import (
    AutoBits,
    Benchmark,
    BenchmarkRow,
    BitChoice,
    Cpu,
    CpuUse,
    DecodeTime,
    DenseScheme,
    Disk,
    Divergence,
    Document,
    Environment,
    Evaluated,
    Evaluation,
    ExpertLayer,
    Gpu,
    Guessing,
    HardwareProfile,
    HqqScheme,
    LayerErrors,
    Limits,
    Link,
    Manifest,
    MeasuredText,
    Memory,
    MemoryBudget,
    ModelFacts,
    Part,
    Plan,
    PlannedCpu,
    PlannedPrefetch,
    Prediction,
    PredictorCard,
    Prefetch,
    PrefillTime,
    Profile,
    Quantization,
    Recall,
    ReuseHits,
    Sensitivity,
    Shard,
    SimulatedRow,
    Simulation,
    TaskEvaluation,
    TaskProtocol,
    TaskScore,
    TasksDone,
    TextProtocol,
    Timing,
)

DIGEST = "0" * 64

PROFILE = Profile(
    model="mistralai/Mixtral-8x7B-Instruct-v0.1",
    revision="main",
    hardware="rtx-3060",
    quantization=Quantization(experts=HqqScheme(bits=2, group_size=16), attention=DenseScheme()),
    prefetch=Prefetch(depth=0),
    memory=Memory(vram=11 << 30, ram=25_000_000_001),
    context_length=8192,
    dtype="float16",
    cpu=CpuUse(experts="on", threads=7),
    strategy="no-prefetch",
)
MACHINE = HardwareProfile(
    name="rtx-3060",
    description="größer: a board, its bus",
    origin="datasheet",
    gpu=Gpu(name="RTX 3060", memory=12 << 30, compute_capability="8.6", memory_bandwidth=360_000_000_000),
    cpu=Cpu(name="Ryzen", cores=8),
    ram=32 << 30,
    link=Link(host_to_device=12_340_000_000),
    disk=Disk(read=3_000_000_000),
)
PLAN = Plan(
    hardware="rtx-3060",
    device="cuda",
    dtype="bfloat16",
    strategy="full",
    policy="lfu",
    context_length=4096,
    cache_slots=(2, 3),
    staging_slots=4,
    stream_layers=2,
    prefetch=PlannedPrefetch(predictor="next-gate", depth=1, experts=2),
    cpu=PlannedCpu(threads=7, share=0.597, fixed=False, activations="fixed16"),
    ram_experts=(8, 7),
    memory=MemoryBudget(
        resident=1, kv_cache=2, slots=3, staging=4, stream=5, workspace=6, total=21, limit=22
    ),
    ram_nbytes=15 << 20,
    disk_nbytes=1 << 20,
    prediction=Prediction(
        tokens_per_second=12.5, low=9.0, high=14.0, hit_rate=0.31, missed_bytes=7, guessed_bytes=3, wasted_bytes=1,
        read_bytes=8, hidden=1e-3,
        decode=DecodeTime(dense=1e-3, experts=2e-3, launches=3e-3, misses=0.05, disk=0.0),
        prefill=PrefillTime(tokens=512, link=0.2, compute=0.1, disk=0.0),
        assumed=("routes repeat as Mixtral's do",),
    ),
)  # fmt: skip
MANIFEST = Manifest(
    model=ModelFacts(
        source="x/y", type="mixtral", source_digest=DIGEST, dtype="bfloat16", parameters=10, expert_parameters=9,
        top_k=2, kv_values_per_token=128, max_context=256,
    ),
    quantization=Quantization(),
    layouts=(expert_layout(64, 128, HqqScheme(bits=3, group_size=64), "bfloat16"),),
    layers=(
        ExpertLayer(
            module="model.layers.0.mlp.experts", router="model.layers.0.mlp.gate", experts=2, layout=0,
            shard="experts-0.safetensors", data_offset=4096, digests=(DIGEST, DIGEST), relative_error=0.123456,
        ),
    ),
    resident_shard="resident.safetensors",
    resident=(resident_matrix("head", "lm_head.weight", 64, 64, HqqScheme(), "bfloat16"),),
    resident_error=0.05,
    resident_nbytes=4096,
    shards=tuple(Shard(file=f"{n}.safetensors", nbytes=8192, sha256=DIGEST) for n in ("experts-0", "resident")),
    files={"config.json": DIGEST, "LICENSE": DIGEST},
)  # fmt: skip
BENCHMARK = Benchmark(
    command="moeflow bench --synthetic mixtral-8x7b -k 4",
    date="2026-11-23T14:05:00Z",
    environment=Environment(
        gpu="NVIDIA H100", gpu_memory=80 << 30, cpu="Xeon", cores=16, ram=1 << 37, driver="580.1", cuda="13.0",
        python="3.11.7", torch="2.13.0", transformers="5.23.0", moeflow="0.1.0", commit="3d66d47+changes",
    ),
    limits=Limits(link_peak=54.7e9, memory_bandwidth=3.1e12),
    rows=(
        BenchmarkRow(
            model="mixtral-8x7b", synthetic=True, experts=8, top_k=2, expert_scheme="2-bit g64",
            attention_scheme="4-bit g64", strategy="full", execution="device", k=4, routing="uniform", recall=0.7,
            prompt_tokens=4, tokens=128, batch=1, tokens_per_second=27.5, hit_rate=0.475, missed_bytes=1.85e9,
        ),
    ),
)  # fmt: skip
SIMULATION = Simulation(
    command="moeflow simulate --model mixtral-8x7b -k 4",
    model="mixtral-8x7b",
    routing="markov",
    seed=0,
    tokens=10,
    layers=2,
    experts=8,
    top_k=2,
    guessing=Guessing(predictor="recall", recall=0.7, experts=2, depth=1, staging=4),
    rows=(SimulatedRow(policy="lru", k=4, hits=(11, 12), guesses=9, guesses_used=6),),
    timings=(Timing(what="lru with guesses", steps=20, seconds=1e-4),),
)
SENSITIVITY = Sensitivity(
    model="demo",
    source_digest=DIGEST,
    schemes=(HqqScheme(bits=2), HqqScheme(bits=3)),
    layers=(LayerErrors(layer=0, squares=(4.0, 5.0), errors=((0.5, 0.1), (0.25, 1 / 3))),),
)
CHOICE = BitChoice(
    asked=AutoBits(bits="auto", budget=2.75, widths=(2, 3), text="t.txt"),
    measured="outputs on 9 tokens of t.txt",
    table=SENSITIVITY.model_copy(update={"text": MeasuredText(name="t.txt", digest=DIGEST, tokens=9)}),
    sizes=((4096, 8192),),
    choices=((1, 0),),
    nbytes=12288,
    achieved=2.7,
    error=0.2,
    bound=0.1,
    reason="why",
)
EVALUATION = Evaluation(
    command="moeflow eval artifacts/a --text book.txt",
    date="2026-11-25T14:05:00Z",
    environment=BENCHMARK.environment,
    model="x/y",
    source_digest=DIGEST,
    protocol=TextProtocol(text="book.txt", digest=DIGEST, tokens=101, scored=100, context=64, stride=32),
    rows=(
        Evaluated(
            experts="2-bit g64", attention="4-bit g64", quantization="experts 2-bit g64, attention 4-bit g64",
            expert_nbytes=300, expert_parameters=1000, nbytes=900, parameters=2000, device="cpu", dtype="float32",
            nll=250.5, computed=180, seconds=0.5, divergence=Divergence(kl=3.25, agreed=91),
        ),
    ),
)  # fmt: skip
TASKS = TaskEvaluation(
    command="moeflow eval artifacts/a --tasks mmlu",
    date="2026-11-25T14:05:00Z",
    environment=BENCHMARK.environment,
    model="x/y",
    source_digest=DIGEST,
    tasks=TaskProtocol(names=("mmlu",), harness="0.4.13", limit=None, shots=5, chat=False, context=4096),
    rows=(
        TasksDone(
            experts="2-bit g64", attention="4-bit g64", quantization="experts 2-bit g64, attention 4-bit g64",
            expert_nbytes=300, expert_parameters=1000, nbytes=900, parameters=2000, device="cpu", dtype="float32",
            computed=180, seconds=0.5, requests=40, truncated=1, tokens=700,
            scores=(
                TaskScore(task="mmlu", depth=0, metric="acc", filter="none", value=1 / 3, stderr=None,
                          higher_is_better=True, samples=10, shots=None, version="2"),
            ),
        ),
    ),
)  # fmt: skip
PREDICTOR = PredictorCard(
    model="m",
    routers="0" * 64,
    hidden=8,
    experts=(4, 4),
    depth=1,
    reuse=0.5,
    tokens=4096,
    held_out=512,
    recalls=(Recall(depth=1, fetched=2, learned=0.75, gate=0.5),),
    hits=(ReuseHits(k=2, lru=0.5, learned=0.625, optimum=0.75),),
)
DOCUMENTS = [PROFILE, MACHINE, PLAN, MANIFEST, BENCHMARK, SIMULATION, SENSITIVITY, EVALUATION, TASKS, PREDICTOR, CHOICE]
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.kind)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"layers": []}, "layers is empty"),
        ({"layout": 3}, r"layers\.0\.layout is 3; there are 1 layouts"),
        ({"experts": 3}, r"layers\.0 has 3 experts and 2 digests"),
        ({"shard": "other"}, r"layers\.0\.shard is other; it is not among shards"),
        ({"expert_layouts": [0]}, r"layers\.0\.expert_layouts has 1 entries; the layer has 2 experts"),
        ({"expert_layouts": [0, 1]}, r"layers\.0\.expert_layouts names layout 1; there are 1 layouts"),
        ({"expert_layouts": [0, -1]}, r"layers\.0\.expert_layouts names layout -1; there are 1 layouts"),
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_refused(fault: dict[str, object], message: str) -> None:
    data = MANIFEST.to_dict()
    for key, value in fault.items():
        (data if key in data else data["layers"][0])[key] = value
    with pytest.raises(DocumentError, match=message):
        Manifest.parse(data, "manifest.json")


def test_every_kind_of_document_is_tested_here() -> None:
    exported = [getattr(schema, name) for name in schema.__all__]
    kinds = {c for c in exported if isinstance(c, type) and issubclass(c, Document)} - {Document}
    assert kinds == {type(d) for d in DOCUMENTS}


@documents
@pytest.mark.parametrize("name", ["document.yaml", "document.yml", "document.json"])
def test_a_document_comes_back_from_its_file(tmp_path: Path, document: Document, name: str) -> None:
    document.save(tmp_path / name)
    assert type(document).load(tmp_path / name) == document
    is_json = (tmp_path / name).read_text().startswith("{\n")
    assert is_json == name.endswith(".json")


@documents
def test_an_own_file_is_written_with_the_same_bytes_again(tmp_path: Path, document: Document) -> None:
    for name in ("a.yaml", "a.json"):
        document.save(tmp_path / name)
        type(document).load(tmp_path / name).save(tmp_path / ("again-" + name))
        assert (tmp_path / name).read_bytes() == (tmp_path / ("again-" + name)).read_bytes()


def test_a_profile_needs_nothing_but_a_model_and_comes_back_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("model: demo\n")
    profile = Profile.load(tmp_path / "p.yaml")
    assert profile == Profile(model="demo")
    assert (profile.memory.vram, profile.cache.experts_per_layer, profile.dtype) == ("auto", "auto", "auto")
    profile.save(tmp_path / "q.yaml")
    assert Profile.load(tmp_path / "q.yaml") == profile


def test_sizes_are_written_as_people_write_them() -> None:
    assert "vram: 11GiB" in PROFILE.to_yaml()
    assert "ram: 25000000001" in PROFILE.to_yaml()
    assert "host_to_device: 12.34GB/s" in MACHINE.to_yaml()


def _parts(value: Any) -> list[BaseModel]:
    if isinstance(value, BaseModel):
        return [value, *(p for name in type(value).model_fields for p in _parts(getattr(value, name)))]
    return [p for element in value for p in _parts(element)] if isinstance(value, tuple) else []


@documents
def test_no_part_of_a_document_can_be_changed(document: Document) -> None:
    parts = _parts(document)
    assert len(parts) > 2
    for part in parts:
        for field in type(part).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(part, field, getattr(part, field))


@documents
def test_no_part_of_a_document_takes_an_unknown_key(document: Document) -> None:
    for part in _parts(document):
        assert isinstance(part, Part)
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            type(part).model_validate({**part.model_dump(mode="json"), "surprise": 1})


@documents
@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_format_is_refused_with_the_remedy(document: Document, version: int) -> None:
    with pytest.raises(DocumentError) as caught:
        type(document).parse({**document.to_dict(), "format_version": version}, "a.json")
    assert re.fullmatch(
        rf"a\.json: format_version is {version}; this moeflow reads {document.kind} version 1: upgrade moeflow",
        str(caught.value),
    )


@documents
@pytest.mark.parametrize("version", [0, -1, True, "one", "1", "99", 99.0, None, [1]])
def test_a_format_that_never_was_is_refused(document: Document, version: object) -> None:
    with pytest.raises(DocumentError, match=r"a\.json: format_version is "):
        type(document).parse({**document.to_dict(), "format_version": version}, "a.json")


@documents
def test_a_newer_format_is_told_before_its_unknown_keys(document: Document) -> None:
    with pytest.raises(DocumentError, match=r"^a\.json: format_version is 2; [^\n]*$"):
        type(document).parse({**document.to_dict(), "format_version": 2, "new_key": 1}, "a.json")


@documents
def test_equal_documents_have_equal_digests(document: Document) -> None:
    again = type(document).parse(json.loads(document.to_json()), "a.json")
    assert again.digest() == document.digest()
    assert re.fullmatch("[0-9a-f]{64}", document.digest())


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    data = PROFILE.to_dict()
    assert Profile.parse(dict(reversed(data.items())), "p").digest() == PROFILE.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"revision": None},
        {"context_length": 8191},
        {"memory": Memory(vram=(11 << 30) + 1, ram=25_000_000_001)},
        {"quantization": Quantization(experts=HqqScheme(bits=3, group_size=16), attention=DenseScheme())},
    ],
    ids=lambda c: next(iter(c)),
)
def test_any_change_changes_the_digest(change: dict[str, Any]) -> None:
    assert PROFILE.model_copy(update=change).digest() != PROFILE.digest()


def test_a_digest_is_the_same_in_every_process_and_version() -> None:
    """It keys caches and resumed work: a change of this constant is a change of the format."""
    assert Profile(model="demo").digest() == "9fe1856c915a3176a8e0c6d2888efb7507bc4ead2a2a6df7c56ca307a49ccd75"


@pytest.mark.parametrize("document", [Profile, HardwareProfile, Plan, Manifest, Benchmark])
def test_editors_get_a_json_schema(document: type[Document]) -> None:
    exported = document.model_json_schema()
    assert exported["additionalProperties"] is False
    assert "format_version" in exported["properties"]


def test_a_layer_knows_its_layout_and_a_model_its_size() -> None:
    layout = MANIFEST.layouts[0]
    assert MANIFEST.layout_of(0) is layout
    assert MANIFEST.expert_nbytes == 2 * layout.nbytes
    assert MANIFEST.starts(0) == (0, layout.nbytes, 2 * layout.nbytes)


def test_a_layer_whose_experts_differ_is_as_large_as_its_blobs() -> None:
    """Its `layout` is the largest one's, which a buffer for any of them has."""
    large = expert_layout(64, 128, HqqScheme(bits=8, group_size=64), "bfloat16")
    data = {**MANIFEST.to_dict(), "layouts": [y.model_dump(mode="json") for y in (*MANIFEST.layouts, large)]}
    data["layers"][0] |= {"layout": 1, "expert_layouts": [1, 0]}
    mixed = Manifest.parse(data, "manifest.json")
    assert mixed.to_dict() == data
    small = MANIFEST.layouts[0].nbytes
    assert mixed.starts(0) == (0, large.nbytes, large.nbytes + small) and mixed.expert_nbytes == large.nbytes + small
    assert [mixed.layout_of(0, expert) for expert in (None, 0, 1)] == [large, large, MANIFEST.layouts[0]]
    data["layers"][0]["layout"] = 0
    with pytest.raises(DocumentError, match=r"layers\.0\.layout is 0; it must be the largest of expert_layouts"):
        Manifest.parse(data, "manifest.json")
