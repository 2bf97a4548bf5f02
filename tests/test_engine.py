"""The engine against transformers: same checkpoint, same numbers, whatever the cache does."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracle import checkpoint_model, dequantized_model, greedy_of, logits_of

import moeflow
from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.errors import ArtifactError, CapacityError, StorageError, UsageError
from moeflow.offload.policy import LruPolicy
from moeflow.offload.store import HostStore
from moeflow.pipeline import plan_offload
from moeflow.schema.units import format_size

# Engine and reference do the same float32 operations in the same order, but a matrix product over one token rounds
# differently from one over many: each rounding is 6e-8 relative, and some tens of them add up over two or three layers.
# The bound is relative to the largest logit; 60 random prompts gave at most 4.1e-6. A real fault (a wrong expert, a
# missed copy) shows at magnitude 0.1 to 1.
TOLERANCE = 2e-5
CPU = {
    "format_version": 1,
    "name": "test-cpu",
    "origin": "measured",
    "cpu": {"cores": 2, "memory_bandwidth": "10GB/s"},
    "ram": "16GiB",
    "link": {"host_to_device": "8GB/s"},
}
NONE = {"experts": {"backend": "none"}, "attention": {"backend": "none"}}
STRATEGIES = ("full", "no-prefetch", "no-cache", "naive")

Packed = Callable[..., Path]


@pytest.fixture(scope="session")
def hardware_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hardware") / "test-cpu.yaml"
    moeflow.HardwareProfile.parse(CPU, "test").save(path)
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, hardware_file: Path) -> Packed:
    """Packs a checkpoint once per quantization."""
    made: dict[str, Path] = {}

    def pack(checkpoint: Path, quantization: dict[str, object] = NONE) -> Path:
        key = f"{checkpoint} {quantization}"
        if key not in made:
            profile = {"model": str(checkpoint), "quantization": quantization, "hardware": str(hardware_file)}
            made[key] = moeflow.pack(profile, tmp_path_factory.mktemp("artifact") / "a")
        return made[key]

    return pack


def random_ids(count: int, vocabulary: int = 96) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_same(found: torch.Tensor, expected: torch.Tensor, bound: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * expected.abs().max()


def hqq(bits: int, attention: int = 4) -> dict[str, object]:
    scheme = {"backend": "hqq", "group_size": 32}
    return {"experts": {**scheme, "bits": bits}, "attention": {**scheme, "bits": attention}}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("k", range(1, 9))
def test_unquantized_equals_transformers(tiny_checkpoint: Path, packed: Packed, strategy: str, k: int) -> None:
    ids = random_ids(40)
    reference = logits_of(checkpoint_model(tiny_checkpoint), ids)
    with moeflow.load(packed(tiny_checkpoint), experts_per_layer=k, strategy=strategy) as engine:
        assert_same(engine.logits(ids), reference)
        assert_same(engine.logits(ids, chunk=1), reference)
        assert_same(engine.logits(ids, chunk=7), reference)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_greedy_tokens_equal_transformers(tiny_checkpoint: Path, packed: Packed, strategy: str) -> None:
    ids = random_ids(12)
    expected = greedy_of(checkpoint_model(tiny_checkpoint), ids, 24)
    with moeflow.load(packed(tiny_checkpoint), experts_per_layer=3, strategy=strategy) as engine:
        assert _tokens(engine, ids, 24) == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_equals_dequantized_weights(tiny_checkpoint: Path, packed: Packed, bits: int) -> None:
    ids = random_ids(30)
    artifact = packed(tiny_checkpoint, hqq(bits, attention={2: 4, 3: 2, 4: 8, 8: 3}[bits]))
    model = dequantized_model(artifact)
    with moeflow.load(artifact, experts_per_layer=4, cpu_experts="off") as engine:  # kernels: test_cpu_engine.py
        assert_same(engine.logits(ids), logits_of(model, ids))
        assert_same(engine.logits(ids, chunk=1), logits_of(model, ids))
        assert _tokens(engine, ids, 16) == greedy_of(model, ids, 16)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "qwen2_moe"])
def test_other_families(checkpoint_factory: Callable[..., Path], packed: Packed, family: str) -> None:
    checkpoint = checkpoint_factory(family, layers=3)
    ids = random_ids(24)
    reference = logits_of(checkpoint_model(checkpoint), ids)
    with moeflow.load(packed(checkpoint), experts_per_layer=3) as engine:
        assert_same(engine.logits(ids), reference)
        assert_same(engine.logits(ids, chunk=1), reference)


def test_dense_layers_between_moe_layers(checkpoint_factory: Callable[..., Path], packed: Packed) -> None:
    checkpoint = checkpoint_factory("qwen3_moe", layers=4, dense_layers=(0, 2))
    ids = random_ids(24)
    with moeflow.load(packed(checkpoint), experts_per_layer=3) as engine:
        assert len(engine.artifact.manifest.layers) == 2
        reference = logits_of(checkpoint_model(checkpoint), ids)
        assert_same(engine.logits(ids, chunk=1), reference)


def test_every_switch_gives_the_same_bits(tiny_checkpoint: Path, packed: Packed) -> None:
    """Results are summed in the router's order: nothing the cache does may change a bit."""
    artifact, ids = packed(tiny_checkpoint, hqq(4)), random_ids(24)
    settings = [{"experts_per_layer": k, "strategy": STRATEGIES[k % 4]} for k in range(1, 9)]
    settings += [{"experts_per_layer": 3, "strategy": s} for s in STRATEGIES]
    settings += [{"policy": "lfu"}, {"prefetch_depth": 2}, {"prefetch_experts": 4}, {"ram": 0}, {"prefetch_depth": 0}]
    with moeflow.load(artifact, experts_per_layer=4) as engine:
        whole, stepwise = engine.logits(ids), engine.logits(ids, chunk=1)
    for setting in settings:
        with moeflow.load(artifact, **setting) as engine:
            assert torch.equal(engine.logits(ids), whole), setting
            assert torch.equal(engine.logits(ids, chunk=1), stepwise), setting


def test_prefill_through_the_cache_equals_streaming(tiny_checkpoint: Path, packed: Packed) -> None:
    """Where layer buffers do not fit, a prompt that needs all experts goes through few slots."""
    artifact, ids = packed(tiny_checkpoint, hqq(4)), random_ids(60)
    with moeflow.load(artifact, experts_per_layer=2) as engine:
        streamed = engine.logits(ids)
        assert engine.traffic.streamed_bytes > 0
    plan = moeflow.Plan.load(artifact / "plan.json").model_copy(update={"stream_layers": 0, "staging_slots": 1})
    with Engine(Artifact.open(artifact), plan) as engine:
        assert torch.equal(engine.logits(ids), streamed)
        assert engine.traffic.streamed_bytes == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_prompts_and_decoding_in_turn_always_compute_with_the_right_blob(
    tiny_checkpoint: Path, packed: Packed, strategy: str, k: int
) -> None:
    """One engine, many generations: streaming, warming, eviction and left-over guesses meet in every order."""
    rng = random.Random(seed := random.randrange(1 << 30))
    print(f"seed {seed}")
    artifact = packed(tiny_checkpoint, hqq(4))
    plan = plan_offload(artifact, {"experts_per_layer": k, "strategy": strategy}, save=False)
    tight = plan.model_copy(update={"staging_slots": rng.choice((1, 2, plan.staging_slots))})
    with Engine(Artifact.open(artifact), tight) as engine:
        _check_blobs(engine)
        for _ in range(12):
            engine.logits(random_ids(rng.randint(1, 30)), chunk=rng.choice((1, 3, 512)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_activations(tiny_checkpoint: Path, packed: Packed, dtype: str) -> None:
    """Same dtype on both sides; 16-bit rounding (2**-8 for bfloat16) of logits of magnitude up to 10."""
    ids = random_ids(20)
    reference = logits_of(checkpoint_model(tiny_checkpoint, getattr(torch, dtype)), ids)
    with moeflow.load(packed(tiny_checkpoint), experts_per_layer=4, dtype=dtype) as engine:
        difference = (engine.logits(ids) - reference).norm() / reference.norm()
    assert difference < (2**-7 if dtype == "bfloat16" else 2**-10)


def test_hits_are_those_of_the_policy(tiny_checkpoint: Path, packed: Packed) -> None:
    """The live cache against a plain policy fed with the routes that the routers chose."""
    ids, k = random_ids(50), 3
    with moeflow.load(packed(tiny_checkpoint), experts_per_layer=k, strategy="no-prefetch") as engine:
        routes = _record_routes(engine)
        engine.logits(ids, chunk=1)
        expected_hits = 0
        for steps in routes:
            policy = LruPolicy(k)
            for chosen in steps:
                hits = [e for e in sorted(chosen) if e in policy]
                expected_hits += len(hits)
                for expert in hits:
                    policy.touch(expert)
                for expert in sorted(set(chosen) - set(hits)):
                    policy.admit(expert)
        assert engine.traffic.hits == expected_hits > 0
        assert engine.traffic.misses == 2 * 2 * len(ids) - expected_hits


def test_prefetch_serves_misses_and_counts_them(tiny_checkpoint: Path, packed: Packed) -> None:
    ids = random_ids(50)
    with moeflow.load(packed(tiny_checkpoint), experts_per_layer=2) as engine:
        engine.logits(ids, chunk=1)
        traffic = engine.traffic
    assert traffic.uses == 2 * 2 * len(ids)
    assert 0 < traffic.guesses_used <= traffic.guesses
    nbytes = engine.artifact.manifest.layout_of(0).nbytes
    assert traffic.missed_bytes == traffic.misses * nbytes
    assert traffic.guessed_bytes == traffic.guesses * nbytes


def test_decode_after_prefill_finds_warm_slots(tiny_checkpoint: Path, packed: Packed) -> None:
    ids = random_ids(30)
    with moeflow.load(packed(tiny_checkpoint), experts_per_layer=8, strategy="no-prefetch") as engine:
        engine.logits(ids)
        before = engine.traffic.copy()
        engine.logits([ids[-1]])
        after = engine.traffic.since(before)
    assert after.hits > after.misses


def test_sampling_repeats_with_a_seed(demo_engine: Engine) -> None:
    first = demo_engine.generate("The king", max_new_tokens=20, temperature=0.9, seed=7)
    second = demo_engine.generate("The king", max_new_tokens=20, temperature=0.9, seed=7)
    other = demo_engine.generate("The king", max_new_tokens=20, temperature=0.9, seed=8)
    assert first.ids == second.ids
    assert first.ids != other.ids


def test_streamed_text_is_the_generated_text(demo_engine: Engine) -> None:
    whole = demo_engine.generate("In the beginning", max_new_tokens=30, seed=3)
    assert "".join(demo_engine.stream("In the beginning", max_new_tokens=30, seed=3)) == whole.text
    assert demo_engine.stats.new_tokens == whole.stats.new_tokens == 30
    assert demo_engine.stats.tokens_per_second > 0


def test_a_session_computes_only_what_is_new(demo_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    original = demo_engine.forward

    def counted(ids: list[int], *arguments: object, **options: object) -> torch.Tensor:
        computed.append(len(ids))
        return original(ids, *arguments, **options)

    monkeypatch.setattr(demo_engine, "forward", counted)
    session = demo_engine.session()
    first = list(demo_engine.tokenizer("And the king said")["input_ids"])
    answer = demo_engine.generate(first, max_new_tokens=20, temperature=0, session=session)
    second = [*first, *answer.ids, *demo_engine.tokenizer(" Then she went")["input_ids"]]
    computed.clear()
    continued = demo_engine.generate(second, max_new_tokens=15, temperature=0, session=session)
    assert computed[0] == len(second) - len(first) - len(answer.ids) + 1  # the last answered token was never run
    assert continued.ids == demo_engine.generate(second, max_new_tokens=15, temperature=0).ids
    changed = [*first[:-1], *second[:7]]  # a turn that was edited: the common part is kept, the rest dropped
    edited = demo_engine.generate(changed, max_new_tokens=15, temperature=0, session=session)
    assert edited.ids == demo_engine.generate(changed, max_new_tokens=15, temperature=0).ids


def test_an_interrupted_session_starts_anew(demo_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session, prompt = demo_engine.session(), "And the king said"
    expected = demo_engine.generate(prompt, max_new_tokens=10, temperature=0)
    runner, _ = demo_engine._model.get_submodule(demo_engine.artifact.manifest.layers[4].module).moeflow
    original = runner.run

    def interrupted(layer: int, *arguments: object) -> torch.Tensor:
        if layer == 4:
            raise KeyboardInterrupt
        return original(layer, *arguments)

    monkeypatch.setattr(runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_engine.generate(prompt, max_new_tokens=10, temperature=0, session=session)
    monkeypatch.undo()
    assert demo_engine.generate(prompt, max_new_tokens=10, temperature=0, session=session).ids == expected.ids


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_engine_that_was_interrupted_anywhere_goes_on_rightly(
    tiny_checkpoint: Path, packed: Packed, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(20)
    with moeflow.load(packed(tiny_checkpoint, hqq(4)), experts_per_layer=3, strategy=strategy) as engine:
        expected, stepwise = engine.logits(ids), engine.logits(ids, chunk=1)
        original = engine._execution.runner._expert
        for count in range(12):
            calls = iter(range(count))

            def stop(*arguments: object, calls: Iterator[int] = calls) -> torch.Tensor:
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return original(*arguments)

            for chunk in (512, 1, 3):
                monkeypatch.setattr(engine._execution.runner, "_expert", stop)
                with pytest.raises(KeyboardInterrupt):
                    engine.logits(ids * 4, chunk=chunk)
                monkeypatch.setattr(engine._execution.runner, "_expert", original)
            assert torch.equal(engine.logits(ids), expected)
            assert torch.equal(engine.logits(ids, chunk=1), stepwise)


def test_a_disk_that_fails_for_a_while_fails_only_then(
    tiny_checkpoint: Path, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(20)
    with moeflow.load(packed(tiny_checkpoint, hqq(4)), experts_per_layer=2, ram=0) as engine:
        expected, stepwise = engine.logits(ids), engine.logits(ids, chunk=1)
        original = engine._store.read

        def fail(*_: object) -> None:
            raise StorageError("the disk did not answer")

        for chunk in (512, 1):
            monkeypatch.setattr(engine._store, "read", fail)
            with pytest.raises(StorageError, match="did not answer"):
                engine.logits(ids, chunk=chunk)
            monkeypatch.setattr(engine._store, "read", original)
            assert torch.equal(engine.logits(ids), expected)
            assert torch.equal(engine.logits(ids, chunk=1), stepwise)


def test_speed_is_the_engines_not_the_readers(demo_engine: Engine) -> None:
    for _ in demo_engine.stream("The king", max_new_tokens=5, temperature=0):
        time.sleep(0.2)
    assert demo_engine.stats.decode_steps == 4
    assert demo_engine.stats.decode_seconds < 0.6


def test_a_chat_forgets_its_oldest_turns_when_the_context_is_full(demo_engine: Engine) -> None:
    messages = [{"role": "user", "content": f"word {i} " * 60} for i in range(15)]
    ids = demo_engine.conversation(messages, room=200)
    assert len(ids) + 200 <= demo_engine.plan.context_length
    assert "word 14" in demo_engine.tokenizer.decode(ids)
    assert "word 0" not in demo_engine.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_p": 2.0},
        {"seed": 10**30},
        {"max_new_tokens": 0},
        {"max_new_tokens": -5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(demo_engine: Engine, settings: dict[str, object]) -> None:
    with pytest.raises(
        UsageError, match=next(name for name in settings if name != "temperature" or len(settings) == 1)
    ):
        demo_engine.generate("word", **settings)


def test_a_temperature_of_almost_nothing_is_greedy(demo_engine: Engine) -> None:
    cold = demo_engine.generate("The king", max_new_tokens=8, temperature=1e-40, seed=1)
    assert cold.ids == demo_engine.generate("The king", max_new_tokens=8, temperature=0).ids


def test_refusals(demo_engine: Engine) -> None:
    with pytest.raises(UsageError, match="not text"):
        demo_engine.generate("\udcff")
    with pytest.raises(UsageError, match="chunk is 0"):
        demo_engine.logits("word", chunk=0)
    with pytest.raises(UsageError, match="prompt is empty"):
        demo_engine.generate([])
    with pytest.raises(UsageError, match=r"do not fit the context of \d+"):
        demo_engine.generate("word", max_new_tokens=100_000)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        demo_engine.generate([10**6])
    with pytest.raises(UsageError, match="temperature"):
        demo_engine.generate("word", temperature=-1.0)
    with pytest.raises(UsageError, match="top_p"):
        demo_engine.generate("word", temperature=1.0, top_p=0.0)


def test_damaged_blob_is_refused_at_load(tiny_checkpoint: Path, packed: Packed, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(packed(tiny_checkpoint), broken)
    shard = broken / "experts-1.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"experts-1\.safetensors: layer 1, expert 7 is damaged"):
        moeflow.load(broken)


def test_refused_device_memory_says_what_was_planned(
    tiny_checkpoint: Path, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moeflow.model.execution.ExpertCache", refuse)
    with pytest.raises(
        CapacityError, match=r"plan for test-cpu takes .* for 3 experts per layer; .* lower memory\.vram"
    ):
        moeflow.load(packed(tiny_checkpoint), experts_per_layer=3)


def test_without_page_locked_memory_ordinary_memory_serves(
    tiny_checkpoint: Path, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system locks one layer and refuses the second."""
    answers = iter([None, "out of memory"])
    monkeypatch.setattr("moeflow.offload.store._register", lambda _: next(answers))
    monkeypatch.setattr("moeflow.offload.store._unregister", lambda _: None)
    artifact = Artifact.open(packed(tiny_checkpoint))
    store = HostStore(artifact, (8, 8), pin=True)
    assert (store.pinned, store.locked(0), store.locked(1)) == (False, True, False)
    half, whole = (format_size(n * store.place(0, 0, 8).stop) for n in (1, 2))
    assert store.refused is not None
    assert f"{half} of {whole} of experts are in page-locked memory" in store.refused
    assert "out of memory" in store.refused and "ulimit -l" in store.refused
    blob = bytearray(store.view(1, 5).nbytes)
    artifact.read_blob(1, 5, memoryview(blob))
    assert store.view(1, 5).numpy().tobytes() == bytes(blob)


def test_closed_engine_says_so(tiny_checkpoint: Path, packed: Packed) -> None:
    engine = moeflow.load(packed(tiny_checkpoint))
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.logits([1, 2])


def _tokens(engine: Engine, ids: list[int], count: int) -> list[int]:
    from moeflow.generation import Sampler, TokenStream

    return list(TokenStream(engine, ids, count, Sampler(0.0), set()))


def _check_blobs(engine: Engine) -> None:
    """Compare every blob that is computed with, before and after, to the one in the store."""
    runner, _ = engine._model.get_submodule(engine.artifact.manifest.layers[0].module).moeflow
    original = runner._blobs

    def checked(layer: int, *arguments: object) -> Iterator[tuple[int, torch.Tensor]]:
        for expert, blob in original(layer, *arguments):
            assert torch.equal(blob, engine._store.view(layer, expert)), f"layer {layer}, expert {expert}"
            yield expert, blob
            assert torch.equal(blob, engine._store.view(layer, expert)), f"layer {layer}, expert {expert}, after"

    runner._blobs = checked


def _record_routes(engine: Engine) -> list[list[list[int]]]:
    """Per MoE layer, per step, the chosen experts."""
    routes: list[list[list[int]]] = []
    for layer in engine.artifact.manifest.layers:
        steps: list[list[int]] = []
        router = engine._model.get_submodule(layer.router)
        router.register_forward_hook(lambda _m, _i, result, steps=steps: steps.append(result[2].flatten().tolist()))
        routes.append(steps)
    return routes
