"""The device-driven engine on a CPU: its real kernels, emulated, against transformers and the host-driven path."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from families.routes import assert_follows
from oracle import checkpoint_model, decided_ids, dequantized_model, greedy_of, logits_of
from tiny_families import LONGROPE

import moeflow
from moeflow.artifact.families import FAMILIES
from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.errors import DeviceError
from moeflow.generation import Sampler, TokenStream
from moeflow.offload.device import MakeMover
from moeflow.offload.mover import Blobs, Mover
from moeflow.pipeline import _plan_for

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

# Activations are rounded to 16-bit fixed point, a scale per chunk of 16 to 64: at most 1.6e-5 of the chunk's largest a
# product. These models are 64 wide and random, which amplifies it: of 3,622 prompts of 24 tokens in test_overrides.py's
# model, half differed by 3.5e-4 of the largest logit or more, one by 1.9e-3. A real fault is 0.1 to 1.
BOUND = 5e-3
NONE = {"experts": {"backend": "none"}, "attention": {"backend": "none"}}


class Memory:
    """Copies at once."""

    def enter(self) -> None:
        """Any thread may."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def announce(self, target: int, value: int) -> None:
        ctypes.c_int.from_address(target).value = value

    def wait(self) -> None:
        """Nothing is ever under way."""


def hqq(bits: int, attention: int = 4) -> dict[str, object]:
    scheme = {"backend": "hqq", "group_size": 64}
    return {"experts": {**scheme, "bits": bits}, "attention": {**scheme, "bits": attention}}


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def pack(checkpoint: Path, quantization: dict[str, object]) -> Path:
        key = f"{checkpoint} {quantization}"
        if key not in made:
            profile = {"model": str(checkpoint), "quantization": quantization, "hardware": "cpu-2-cores"}
            made[key] = moeflow.pack(profile, tmp_path_factory.mktemp("artifact") / "a")
        return made[key]

    return pack


def load(artifact: Path, order: str = "forward", mover: MakeMover | bool = True, **overrides: object) -> Engine:
    opened = Artifact.open(artifact)
    plan = _plan_for(opened, {"execution": "device", "context_length": 128, **overrides})
    engine = Engine(opened, plan, launcher=emulator.EmulatedLauncher(order), mover=mover)
    assert engine.execution == "device-driven", engine.fallback
    return engine


def random_ids(count: int) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_near(found: torch.Tensor, reference: torch.Tensor, bound: float = BOUND) -> None:
    assert found.shape == reference.shape
    error = float((found - reference).abs().max() / reference.abs().max())
    print(f"largest difference {error:.2e} of the largest logit")
    assert error <= bound


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_logits_are_those_of_the_dequantized_weights(
    tiny_checkpoint: Path, packed: Callable[..., Path], bits: int
) -> None:
    artifact = packed(tiny_checkpoint, hqq(bits, {2: 4, 3: 2, 4: 8, 8: 3}[bits]))
    model = dequantized_model(artifact)
    ids = decided_ids(model, 24)
    reference = logits_of(model, ids)
    with load(artifact, experts_per_layer=3) as engine:
        assert_near(engine.logits(ids, chunk=1), reference)
        assert_near(engine.logits(ids), reference)  # prefill: whole layers, unpacked by the kernel


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"jamba", "lfm2_moe"}))
def test_families_unquantized(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path], family: str
) -> None:
    checkpoint = checkpoint_factory(family)
    ids = random_ids(16)
    with load(packed(checkpoint, NONE), experts_per_layer=3) as engine:
        assert_follows(engine, checkpoint_model(checkpoint), ids, (1,))


def test_positions_beyond_the_length_of_training(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path]
) -> None:
    """PhiMoE's own frequencies and scales: transformers chooses by the longest position, in Python."""
    artifact, ids = packed(checkpoint_factory("phimoe", rope_parameters=LONGROPE), NONE), random_ids(24)
    with moeflow.load(artifact, execution="host") as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, experts_per_layer=3) as engine:
        assert engine._execution.fused.replaced["rotary tables"] == 1
        assert_near(engine.logits(ids, chunk=1), expected)


def test_a_state_that_a_graph_cannot_replay_is_the_hosts(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path]
) -> None:
    opened = Artifact.open(packed(checkpoint_factory("lfm2_moe"), NONE))
    plan = _plan_for(opened, {"execution": "device", "context_length": 128})
    with Engine(opened, plan, launcher=emulator.EmulatedLauncher()) as engine:
        assert engine.execution == "host-driven"
        assert engine.fallback is not None and "whose state a CUDA graph cannot replay" in engine.fallback


def test_every_switch_gives_the_same_bits(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    artifact, ids = packed(tiny_checkpoint, hqq(2)), random_ids(12)
    with load(artifact, experts_per_layer=4) as engine:
        expected = engine.logits(ids, chunk=1)
    settings: list[dict[str, object]] = [{"experts_per_layer": k} for k in (0, 1, 3, 8)]
    settings += [{"strategy": "no-prefetch"}, {"strategy": "no-cache"}, {"policy": "lfu", "experts_per_layer": 3}]
    for number, setting in enumerate(settings):
        with load(artifact, ("forward", "reverse", "random")[number % 3], **setting) as engine:
            assert torch.equal(engine.logits(ids, chunk=1), expected), setting


@pytest.mark.parametrize("order", ["forward", "random"])
def test_copies_that_are_handed_over_change_no_bit(
    tiny_checkpoint: Path, packed: Callable[..., Path], order: str
) -> None:
    artifact, ids = packed(tiny_checkpoint, hqq(4)), random_ids(20)
    with load(artifact, experts_per_layer=2) as engine:
        expected = engine.logits(ids, chunk=1)
    movers: list[Mover] = []

    def make(layers: Sequence[Blobs], jobs: int) -> Mover:
        movers.append(Mover(Memory(), layers, jobs, torch.device("cpu"), head=0, least=1))
        return movers[-1]

    with load(artifact, order, make, experts_per_layer=2) as engine:
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        engine.logits(random_ids(30))  # streams whole layers, which nobody hands over
        assert torch.equal(engine.logits(ids, chunk=3), engine.logits(ids, chunk=3))
        assert movers[0].moved_bytes > 0.9 * engine.traffic.missed_bytes > 0
        assert engine.note is None
        movers[0].problem = "the thread ended"
        assert engine.note == "the thread ended"
    assert not movers[0]._thread.is_alive()


def test_greedy_tokens_are_the_hosts(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    artifact, ids = packed(tiny_checkpoint, hqq(4)), random_ids(12)
    with moeflow.load(artifact, execution="host") as engine:
        assert engine.execution == "host-driven"
        expected = engine.generate(ids, max_new_tokens=24, temperature=0).ids
    model = dequantized_model(artifact)
    with load(artifact, experts_per_layer=3) as engine:
        found = engine.generate(ids, max_new_tokens=24, temperature=0).ids
        assert engine.generate(ids, max_new_tokens=24, temperature=0).ids == found  # a used engine, and cache
        stats = engine.stats
        assert_same_until_a_tie(found, expected, ids, model)
        before = engine.traffic.copy()
        engine.logits(random_ids(32), chunk=1)  # greedy text repeats itself, and then one guess that is wrong fills it
        traffic = engine.traffic.since(before)
    assert stats.decode.uses == 2 * 2 * stats.decode_steps  # layers, top-k
    assert traffic.uses == 2 * 2 * 32 and traffic.hits and traffic.misses and traffic.guesses_used
    if len(expected) == 24:
        assert_same_until_a_tie(expected, tuple(greedy_of(model, ids, 24)), ids, model)


def assert_same_until_a_tie(
    found: tuple[int, ...], expected: tuple[int, ...], prompt: list[int], model: torch.nn.Module
) -> None:
    """The same tokens, or the first difference is between two whose logits rounding may exchange."""
    for i, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            logits = logits_of(model, [*prompt, *found[:i]])[-1]
            gap = float((logits[one] - logits[other]).abs() / logits.abs().max())
            assert gap <= 2 * BOUND, f"token {i} differs, and the logits by {gap:.1e} of the largest"
            return
    assert len(found) == len(expected)


@pytest.mark.parametrize("most", [1, 2, 12])
def test_a_device_that_runs_ahead_gives_the_same_text(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    ids = random_ids(10)
    with load(tiny_artifact) as engine:
        expected = engine.generate(ids, max_new_tokens=most, temperature=0).ids
        sampled = engine.generate(ids, max_new_tokens=most, temperature=1, seed=3).ids
        monkeypatch.setattr(Engine, "runs_ahead", True)
        session = engine.session()
        assert engine.generate(ids, max_new_tokens=most, temperature=0, session=session).ids == expected
        assert engine.stats.decode_steps == len(expected) - 1
        assert session.settle() == [*ids, *expected[:-1]]
        assert engine.generate(ids, max_new_tokens=most, temperature=1, seed=3).ids == sampled
        if most > 4:
            stop = expected[3]
            stream = TokenStream(engine, ids, most, Sampler(0.0), {stop})
            assert list(stream) == list(expected[: expected.index(stop)])
            index = expected.index(stop)
            assert stream.stats.decode_steps == (index + 1 if index else 0)  # one in vain, unless the prompt ends it
            assert stream.stats.decode.uses == 2 * 2 * stream.stats.decode_steps
            again = engine.generate([*ids, *expected[:3], 5], max_new_tokens=4, temperature=0, session=session).ids
            assert again == engine.generate([*ids, *expected[:3], 5], max_new_tokens=4, temperature=0).ids
            taken = iter(TokenStream(engine, ids, most, Sampler(0.0), set(), session))
            assert [next(taken), next(taken)] == list(expected[:2])
            taken.close()  # type: ignore[attr-defined]
            assert engine.generate(ids, max_new_tokens=most, temperature=0, session=session).ids == expected


def test_hit_counts_are_the_hosts(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    """Without guesses both paths keep and evict the same experts."""
    artifact, ids = packed(tiny_checkpoint, NONE), random_ids(24)
    counts = []
    for execution in ("host", "device"):
        settings = {"strategy": "no-prefetch", "experts_per_layer": 3}
        engine = (
            load(artifact, **settings)
            if execution == "device"
            else moeflow.load(artifact, execution="host", **settings)
        )
        with engine:
            engine.logits(ids, chunk=1)
            counts.append((engine.traffic.hits, engine.traffic.misses, engine.traffic.missed_bytes))
    assert counts[0] == counts[1]


def test_a_conversation_computes_only_what_is_new(tiny_artifact: Path) -> None:
    with load(tiny_artifact) as engine:
        first = random_ids(20)
        session = engine.session()
        answer = engine.generate(first, max_new_tokens=8, temperature=0, session=session).ids
        turn = [*first, *answer, *random_ids(6)]
        continued = engine.generate(turn, max_new_tokens=8, temperature=0, session=session).ids
        assert continued == engine.generate(turn, max_new_tokens=8, temperature=0).ids  # takes the KV cache away
        again = [*turn, *continued, *random_ids(3)]
        expected = engine.generate(again, max_new_tokens=8, temperature=0).ids
        assert engine.generate(again, max_new_tokens=8, temperature=0, session=session).ids == expected


def test_two_generations_at_once_take_turns(tiny_artifact: Path) -> None:
    with load(tiny_artifact) as engine:
        one, two = random_ids(10), random_ids(14)
        expected = [engine.generate(ids, max_new_tokens=8, temperature=0).ids for ids in (one, two)]
        streams = [iter(TokenStream(engine, ids, 8, Sampler(0.0), set())) for ids in (one, two)]
        found: list[list[int]] = [[], []]
        for _ in range(len(expected[0])):
            for stream, tokens in zip(streams, found, strict=True):
                tokens.append(next(stream))
        assert found[0] == list(expected[0])[: len(found[0])]
        assert found[1] == list(expected[1])[: len(found[1])]


def test_an_interrupted_step_leaves_a_sound_engine(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(16)
    with load(tiny_artifact, experts_per_layer=2) as engine:
        expected = engine.logits(ids, chunk=1)
        runner = engine._execution.runner
        for name in ("_sum", "_gated", "_guess_next"):
            original, calls = getattr(runner, name), 0

            def stop(*arguments: object, original: Callable[..., object] = original) -> object:
                nonlocal calls
                calls += 1
                if calls == 3:
                    raise KeyboardInterrupt
                return original(*arguments)

            monkeypatch.setattr(runner, name, stop)
            with pytest.raises(KeyboardInterrupt):
                engine.logits(ids, chunk=1)
            monkeypatch.setattr(runner, name, original)
            assert torch.equal(engine.logits(ids, chunk=1), expected)


def test_a_graph_that_forgot_to_count_is_found(tiny_artifact: Path) -> None:
    """Replays that see the first position for ever, as a model that counts in Python would."""
    with load(tiny_artifact) as engine, torch.inference_mode():
        step = engine._execution.steps.single

        class Replay:
            def __init__(self, stuck: bool):
                self.stuck = stuck

            def replay(self) -> None:
                if self.stuck:
                    step._begin()
                    step._position.zero_()
                step._logits = step._pass()

        step._graph = Replay(stuck=False)
        step.check()
        step._graph = Replay(stuck=True)
        with pytest.raises(RuntimeError, match=r"differs from the one it was made of by .* at token 1"):
            step.check()
        step._graph = None


def test_falls_back_and_says_why(tiny_artifact: Path) -> None:
    opened = Artifact.open(tiny_artifact)
    plan = _plan_for(opened, {"execution": "device", "context_length": 64})
    with Engine(opened, plan) as engine:
        assert engine.execution == "host-driven"
        assert engine.fallback == "host-driven instead of device-driven: kernels need a CUDA device"
        assert engine.generate("abc", max_new_tokens=4, temperature=0).ids

    class Broken(emulator.EmulatedLauncher):  # type: ignore[name-defined, misc]
        def kernel(self, source: str, *rest: object) -> object:
            if source == "gemv.cu":
                raise DeviceError("gemv.cu: CUDA says CUDA_ERROR_NO_BINARY_FOR_GPU")
            return super().kernel(source, *rest)

    with Engine(opened, plan, launcher=Broken()) as engine:
        assert engine.execution == "host-driven" and "NO_BINARY" in (engine.fallback or "")
        assert engine.generate("abc", max_new_tokens=4, temperature=0).ids
