"""Prefill through the layer stream: the link is never kept waiting, and what it finds cached changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moeflow
from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.model.experts import _Groups
from moeflow.model.linear import PackedLinear
from moeflow.offload.link import CudaLink
from moeflow.pipeline import _plan_for

emulator = pytest.importorskip("emulator.launcher")
emulated = pytest.mark.skipif(not emulator.available(), reason="no g++")

HQQ = {"backend": "hqq", "bits": 2, "group_size": 64}


@pytest.fixture(scope="module")
def artifact(checkpoint_factory: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantization = {"experts": HQQ, "attention": {**HQQ, "bits": 4}}
    profile = {"model": str(checkpoint_factory(layers=4)), "quantization": quantization, "hardware": "cpu-2-cores"}
    return moeflow.pack(profile, tmp_path_factory.mktemp("artifact") / "a")


def load(artifact: Path, **overrides: object) -> Engine:
    opened = Artifact.open(artifact)
    plan = _plan_for(opened, {"execution": "device", "context_length": 128, **overrides})
    engine = Engine(opened, plan, launcher=emulator.EmulatedLauncher())
    assert engine.execution == "device-driven", engine.fallback
    return engine


def ids(count: int = 40) -> list[int]:
    return torch.randint(96, (count,)).tolist()


@emulated
def test_every_layer_is_begun_before_anybody_waits_for_the_router(artifact: Path) -> None:
    with load(artifact, experts_per_layer=3) as engine:
        many: Any = engine._execution.runner._many
        events: list[tuple[str, int]] = []
        read, begin, residents = many._ids, many.stream.begin, many.cache.residents

        def waiting(layer: int, *rest: Any, **more: Any) -> Any:
            events.append(("wait", layer))
            return read(layer, *rest, **more)

        def beginning(layer: int, skip: Any) -> None:
            events.append(("begin", layer))
            begin(layer, skip)

        def reading() -> Any:
            events.append(("read", -1))
            return residents()

        many._ids, many.stream.begin, many.cache.residents = waiting, beginning, reading
        for _ in range(2):
            events.clear()
            engine.logits(ids())
            assert events[:3] == [("read", -1), ("begin", 0), ("begin", 1)]
            assert sum(kind == "read" for kind, _ in events) == 1
            for layer in range(4):
                before = events[: events.index(("wait", layer))]
                assert ("begin", min(3, layer + 1)) in before
            for layer in (1, 2):  # not when their turn comes, which is after an attention, but when a buffer is free
                between = events[events.index(("wait", layer - 1)) + 1 : events.index(("wait", layer))]
                assert between[:2] == [("begin", layer - 1), ("begin", layer + 1)]


@emulated
@pytest.mark.parametrize("setting", [{"experts_per_layer": k} for k in (0, 1, 3, 8)] + [{"policy": "lfu"}], ids=str)
def test_what_is_cached_changes_no_bit_and_does_not_travel(artifact: Path, setting: dict[str, object]) -> None:
    with load(artifact, **setting) as engine:
        many: Any = engine._execution.runner._many
        original = many._blobs

        def checked(layer: int, *rest: object) -> Iterator[tuple[int, torch.Tensor]]:
            for expert, blob in original(layer, *rest):
                assert torch.equal(blob, engine._store.view(layer, expert)), f"layer {layer}, expert {expert}"
                yield expert, blob
                assert torch.equal(blob, engine._store.view(layer, expert)), f"layer {layer}, expert {expert}, after"

        many._blobs = checked
        blob = engine.artifact.manifest.layouts[0].nbytes
        for _ in range(3):
            prompt = ids()
            engine.empty_cache()
            before = engine.traffic
            cold = engine.logits(prompt, chunk=20)
            kept = sum(map(len, engine._execution._cache.residents()))
            middle = engine.traffic
            assert torch.equal(engine.logits(prompt, chunk=40), engine.logits(prompt, chunk=40))
            assert torch.equal(engine.logits(prompt, chunk=20), cold)
            assert middle.since(before).streamed_bytes <= 2 * 4 * 8 * blob
            assert kept == sum(min(8, k) for k in engine.plan.cache_slots) or max(engine.plan.cache_slots) == 8
            assert middle.since(before).missed_bytes == 0  # warming copies on the device
            engine.generate(prompt[:10], max_new_tokens=6, temperature=0)  # leaves another cache behind


def test_choices_are_grouped_in_their_order() -> None:
    for tokens, top_k in ((1, 2), (1, 4), (9, 2), (200, 4)):
        for twice in (False, True):
            index = torch.stack([torch.randperm(8)[:top_k] for _ in range(tokens)])
            if twice:
                index[:, 1] = index[:, 0]
            hidden, weights = torch.randn(tokens, 6), torch.rand(tokens, top_k)
            groups = _Groups(hidden, index)
            groups.split(index.flatten().tolist())
            assert groups.experts == sorted(set(index.flatten().tolist()))
            for expert in groups.experts:
                groups.results(expert).copy_(groups.inputs(expert) * (expert + 1))
            expected = sum((index[:, j, None] + 1) * hidden * weights[:, j, None] for j in range(top_k))
            assert torch.allclose(groups.sum(weights), expected, atol=1e-5)


def test_neighbours_travel_in_one_copy() -> None:
    link = CudaLink.__new__(CudaLink)  # without a device
    blob = 3 << 20

    def place(_: int, expert: int, count: int) -> slice:
        return slice(expert * blob, (expert + count) * blob)

    store = SimpleNamespace(place=place, in_ram=lambda _, e: e < 30, locked=lambda _: True)
    link._store = store  # type: ignore[assignment]
    assert list(link._runs(0, [0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 1), (7, 2)]
    assert list(link._runs(0, range(24))) == [(0, 10), (10, 10), (20, 4)]  # 32 MiB at most
    assert list(link._runs(0, [28, 29, 30, 31])) == [(28, 2), (30, 1), (31, 1)]  # from disk one by one
    assert list(link._runs(0, [])) == []
    blob = 64 << 20
    assert list(link._runs(0, [0, 1])) == [(0, 1), (1, 1)]


@emulated
def test_merged_projections_lie_where_the_single_ones_were(artifact: Path) -> None:
    def layers(engine: Engine) -> dict[str, PackedLinear]:
        return {n: m for n, m in engine.model.named_modules() if isinstance(m, PackedLinear)}

    with moeflow.load(artifact, execution="host") as host, load(artifact) as engine:
        found, expected = layers(engine), layers(host)
        assert {name.rpartition(".")[2] for name, y in found.items() if y.merged} == {"q_proj", "k_proj", "v_proj"}
        assert len({y.blob.untyped_storage().data_ptr() for y in found.values()}) == 1, "and nothing beside"
        for name, layer in found.items():
            assert torch.equal(layer.weight, expected[name].weight), name
