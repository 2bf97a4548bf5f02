"""Recorded routes are those that transformers' own routers choose, whatever drives the passes, and of any length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import checkpoint_model, decided_ids, dequantized_model
from tiny import TOP_K

import moeflow
from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.errors import StorageError, UsageError
from moeflow.offload.trace import Routes, load_trace
from moeflow.pipeline import _plan_for
from moeflow.planning.simulator import hit_rates
from moeflow.recording import recording, trace_text

NONE = {"experts": {"backend": "none"}, "attention": {"backend": "none"}}
TEXT = "And the king said unto them, Go ye into the city, and it shall be so."  # a token a character
Load = Callable[..., Engine]


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    made: dict[Path, Path] = {}

    def pack(checkpoint: Path) -> Path:
        if checkpoint not in made:
            profile = {"model": str(checkpoint), "quantization": NONE, "hardware": "cpu-2-cores"}
            made[checkpoint] = moeflow.pack(profile, tmp_path_factory.mktemp("artifact") / "a")
        return made[checkpoint]

    return pack


def hosted(artifact: Path, record: bool = True, **overrides: object) -> Engine:
    return moeflow.load(artifact, record_routes=record, execution="host", **overrides)


def emulated(artifact: Path, record: bool = True, **overrides: object) -> Engine:
    """Device-driven, its kernels run by a CPU."""
    emulator = pytest.importorskip("emulator.launcher")
    if not emulator.available():
        pytest.skip("no g++")
    opened = Artifact.open(artifact)
    plan = _plan_for(opened, {"execution": "device", "context_length": 128, **overrides})
    engine = Engine(opened, plan, launcher=emulator.EmulatedLauncher(), record_routes=record)
    assert engine.execution == "device-driven", engine.fallback
    return engine


DRIVEN = pytest.mark.parametrize("load", [hosted, emulated])


@torch.inference_mode()
def routes_of(model: torch.nn.Module, ids: list[int]) -> Routes:
    """[T, L, K] by weight: what transformers' routers choose in one pass of its own model over all of `ids`.

    Where the choice is not made by a router module, as DeepSeek's, what the experts module is given.
    """
    layers: list[torch.Tensor] = []

    def note(weights: torch.Tensor, index: torch.Tensor) -> None:
        layers.append(index.gather(-1, weights.argsort(dim=-1, descending=True, stable=True)))

    def named(ending: str) -> list[torch.nn.Module]:
        return [module for module in model.modules() if type(module).__name__.endswith(ending)]

    handles = [r.register_forward_hook(lambda _m, _i, result: note(result[1], result[2])) for r in named("TopKRouter")]
    if not handles:
        handles = [e.register_forward_pre_hook(lambda _m, given: note(given[2], given[1])) for e in named("Experts")]
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    assert len(layers) == len(handles) > 0
    return torch.stack(layers, dim=1).numpy().astype(np.int16)


@DRIVEN
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_routes_are_those_of_transformers_own_routers(
    checkpoint_factory: Callable[..., Path], packed: Callable[[Path], Path], tmp_path: Path, family: str, load: Load
) -> None:
    checkpoint = checkpoint_factory(family)
    model = checkpoint_model(checkpoint)
    ids = decided_ids(model, 20) if family != "deepseek_v3" else list(range(3, 23))
    expected = routes_of(model, ids)
    with load(packed(checkpoint), experts_per_layer=3) as engine:
        for chunk in (1, 3, 512):
            with recording(engine, tmp_path / "a.npz"):
                engine.logits(ids, chunk=chunk)
            trace = load_trace(tmp_path / "a.npz")
            assert np.array_equal(trace.routes, expected), chunk
        assert (trace.prompt, trace.model) == (0, checkpoint.name)
        trace.require(expected.shape[1], engine.artifact.manifest.layers[0].experts, TOP_K, "here")


@pytest.mark.parametrize(("load", "ahead"), [(hosted, False), (emulated, False), (emulated, True)])
@pytest.mark.parametrize("stops", [False, True])
def test_an_answers_routes_and_its_text_unchanged(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load, ahead: bool, stops: bool
) -> None:
    """Teacher-forced over prompt and answer, transformers' routers choose the same."""
    model = dequantized_model(tiny_artifact)
    prompt = decided_ids(model, 12)
    with load(tiny_artifact, record=False, experts_per_layer=3) as engine:
        engine._stop_ids = set()
        plain = engine.generate(prompt, max_new_tokens=10, temperature=0).ids
        assert len(plain) == 10 and engine.recorder is None
    with load(tiny_artifact, experts_per_layer=3) as engine:
        monkeypatch.setattr(Engine, "runs_ahead", ahead)
        engine._stop_ids = {plain[6]} if stops else set()
        with recording(engine, tmp_path / "a.npz"):
            found = engine.generate(prompt, max_new_tokens=10, temperature=0).ids
    assert found == (plain[: plain.index(plain[6])] if stops else plain)
    trace = load_trace(tmp_path / "a.npz")
    ran = [*prompt, *found] if stops else [*prompt, *found[:-1]]
    assert (len(trace.routes), trace.prompt) == (len(ran), len(prompt))
    same = (trace.routes == routes_of(model, ran)).all(axis=(1, 2))
    assert same[: len(prompt)].all()
    assert load is emulated or same.all()  # kernels round at 1e-4, and nobody chose the answer's tokens


@DRIVEN
def test_a_texts_routes_do_not_depend_on_the_passes(tiny_artifact: Path, load: Load) -> None:
    """Pieces of the context's length are read as if nothing came before, in passes of any length."""
    with load(tiny_artifact, context_length=48) as engine:
        ids = engine.tokenizer(TEXT)["input_ids"]
        assert 48 < len(ids) < 96
        model = dequantized_model(tiny_artifact)
        whole = trace_text(engine, TEXT)
        reference = np.concatenate([routes_of(model, ids[:48]), routes_of(model, ids[48:])])
        if load is hosted:
            assert np.array_equal(whole.routes, reference)
        assert (whole.routes == reference).all(axis=(1, 2)).mean() > 0.9
        for chunk in (1, 5, 9, 64):
            seen: list[tuple[int, int]] = []
            part = trace_text(engine, TEXT, 52, chunk, lambda done, total, seen=seen: seen.append((done, total)))
            assert np.array_equal(part.routes[:48], whole.routes[:48]) or load is emulated
            assert part.routes.shape == (52, *whole.routes.shape[1:]) and part.prompt == 0
            assert seen[-1] == (52, 52) and len(seen) == -(-48 // chunk) + -(-4 // chunk)


def test_replayed_hits_are_the_live_caches(tiny_artifact: Path, tmp_path: Path) -> None:
    with hosted(tiny_artifact, strategy="no-prefetch", experts_per_layer=3) as engine:
        with recording(engine, tmp_path / "a.npz"):
            engine.logits(list(range(3, 60)), chunk=1)
        trace = load_trace(tmp_path / "a.npz")
        replayed = hit_rates(trace.routes, trace.experts, ks=[3]).mean() * trace.routes.size
        assert round(float(replayed)) == engine.traffic.hits > 0


def test_a_session_records_what_it_computes(tiny_artifact: Path, tmp_path: Path) -> None:
    with hosted(tiny_artifact) as engine:
        session, first = engine.session(), list(range(3, 15))
        answer = engine.generate(first, max_new_tokens=4, temperature=0, session=session)
        turn = [*first, *answer.ids, 5, 6, 7]
        with recording(engine, tmp_path / "a.npz"):
            engine.generate(turn, max_new_tokens=3, temperature=0, session=session)
        trace = load_trace(tmp_path / "a.npz")
        assert (len(trace.routes), trace.prompt) == (4 + 2, 4)  # the last answered token was never run
        with recording(engine, tmp_path / "b.npz"):
            list(engine.stream(turn, max_new_tokens=3, temperature=0))
        again = load_trace(tmp_path / "b.npz")
        assert np.array_equal(again.routes[-6:], trace.routes) and again.prompt == len(turn)


def test_routes_of_a_pass_that_failed_or_a_block_that_failed_are_not_kept(tiny_artifact: Path, tmp_path: Path) -> None:
    path, ids = tmp_path / "a.npz", list(range(3, 20))
    with hosted(tiny_artifact) as engine:
        with pytest.raises(KeyboardInterrupt), recording(engine, path):
            engine.logits(ids)
            raise KeyboardInterrupt
        assert not path.exists()
        engine.logits(ids)  # outside
        with pytest.raises(UsageError, match="no token went through the model"), recording(engine, path):
            pass
        with recording(engine, path):
            engine.logits(ids[:4])
        assert len(load_trace(path).routes) == 4


def test_refusals(tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with moeflow.load(tiny_artifact) as engine:
        with pytest.raises(UsageError, match="load the artifact with record_routes=True"):
            trace_text(engine, "abc")
        with pytest.raises(UsageError, match="records no routes"), recording(engine, tmp_path / "a.npz"):
            pass
    with hosted(tiny_artifact) as engine:
        for arguments, message in (
            (("",), "the text is empty"),
            (("abc", 4), "tokens is 4; the text has 3"),
            (("abc", 0), "tokens is 0"),
            (("abc", 2, 0), "chunk is 0"),
        ):
            with pytest.raises(UsageError, match=message):
                trace_text(engine, *arguments)
        for path, reason in ((tmp_path, "this is a directory"), (tmp_path / "file/a.npz", "not a directory")):
            with pytest.raises(StorageError, match=reason), recording(engine, path):
                raise AssertionError("nothing is to run")
