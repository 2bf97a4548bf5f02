"""`moeflow bench` on shapes small enough for a CPU: what it counts, what it refuses, what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moeflow.artifact.random_weights import RandomArtifact
from moeflow.bench import Settings, measure_limits, run_rows
from moeflow.errors import DocumentError, UsageError
from moeflow.pipeline import resolve_hardware
from moeflow.schema import BenchmarkRow, Profile

CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 100, "max_position_embeddings": 256, "dtype": "bfloat16",
}  # fmt: skip
QUANTIZATION = {"experts": {"backend": "hqq", "bits": 2, "group_size": 64}, "attention": {"backend": "none"}}


def settings(execution: str, **changes: object) -> Settings:
    profile = {"model": "small", "quantization": QUANTIZATION, "context_length": 128, "execution": execution}
    base = {"experts_per_layer": 4, "routing": "uniform", "tokens": 12, "prompt": 20, "warm_up": 6, **changes}
    return Settings(profile=Profile.parse(profile, "test"), **base)  # type: ignore[arg-type]


def artifact() -> RandomArtifact:
    return RandomArtifact(
        CONFIG, Profile.parse({"model": "m", "quantization": QUANTIZATION}, "t").quantization, "small"
    )


@pytest.mark.parametrize("execution", ["host", "device"])
def test_rows_count_what_was_moved(execution: str) -> None:
    launcher = None
    if execution == "device":
        emulator = pytest.importorskip("emulator.launcher")
        if not emulator.available():
            pytest.skip("no g++")
        launcher = emulator.EmulatedLauncher()
    source = artifact()
    chosen = settings(execution, rows=("full", "no-prefetch"), all_hits=True, recall=1.0, launcher=launcher)
    full, cached, hits = run_rows(source, resolve_hardware("cpu-2-cores"), chosen)
    blob = source.manifest.layouts[0].nbytes
    for row in (full, cached, hits):
        assert row.cold_time_to_first_token and row.time_to_first_token
        assert row.cold_prefill_bytes == 8 * 3 * blob  # of 8 experts in each of 3 layers
        assert row.prefill_bytes == 4 * 3 * blob if row is not hits else row.prefill_bytes < 3 * 3 * blob
    assert {row.execution for row in (full, cached, hits)} == {execution}
    assert full.synthetic and full.routing == "uniform" and full.recall == 1.0 and cached.recall is None
    assert full.tokens_per_second and full.time_to_first_token and full.read_bytes
    # The same routes: a guess that is always right leaves only the first layer's misses waiting.
    assert cached.hit_rate is not None and 0.2 < cached.hit_rate < 0.8
    assert cached.missed_bytes == pytest.approx((1 - cached.hit_rate) * 6 * blob)
    assert full.missed_bytes is not None and full.guessed_bytes is not None
    assert full.missed_bytes < cached.missed_bytes
    assert full.guesses == full.guesses_used
    assert hits.hit_rate == 1.0 and hits.missed_bytes == 0


def test_compared_rows_differ_in_who_takes_the_experts_and_share_everything_else() -> None:
    emulator = pytest.importorskip("emulator.launcher")
    if not emulator.available():
        pytest.skip("no g++")
    source = artifact()
    few = {"tokens": 4, "warm_up": 2, "prompt": 8}
    chosen = settings("device", compare=("cpu", "link", "both"), launcher=emulator.EmulatedLauncher(), **few)
    cpu, link, both = run_rows(source, resolve_hardware("cpu-2-cores"), chosen)
    assert [row.experts_on for row in (cpu, link, both)] == ["cpu", "link", "both"]
    assert (cpu.k, link.k, both.k) == (0, 4, 4)
    assert link.computed_bytes is None and link.cpu_share is None
    assert cpu.computed_bytes is not None and both.computed_bytes is not None
    assert link.read_bytes and both.read_bytes == link.read_bytes - both.computed_bytes
    if not both.note:  # the kernels are there
        assert cpu.missed_bytes == 0 and cpu.cpu_share == 1.0 and 0 < (both.cpu_share or 0) < 1
    assert (cpu.tokens, cpu.prompt_tokens, cpu.routing) == (link.tokens, link.prompt_tokens, link.routing)
    settings_that_differ = {"k", "experts_on", "note"}
    asked = BenchmarkRow.model_fields.keys() - settings_that_differ
    asked = {n for n in asked if BenchmarkRow.model_fields[n].is_required()}
    assert all(getattr(link, name) == getattr(both, name) for name in asked)


@pytest.mark.parametrize("least", [1, 1 << 60])
def test_a_host_reads_experts_where_they_lie_and_plain_layers_in_their_bits(
    monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr("moeflow.model.plain_linear.LEAST", least)
    source = artifact()
    few = settings("host", experts_per_layer=0, tokens=4, warm_up=2, prompt=8)
    [row] = run_rows(source, resolve_hardware("cpu-2-cores"), few)
    linear = 3 * (2 * 64 * 64 + 2 * 64 * 32) + 64 * 100  # attention and head; an embedding's row is nothing
    others = 3 * (2 * 64 + 8 * 64) + 64  # norms and routers
    each = 2 if least == 1 and not row.note else 4  # there is a note where the kernels are missing
    assert row.read_bytes == 6 * source.manifest.layouts[0].nbytes + linear * each + others * 4


def test_limits_have_what_the_host_reads() -> None:
    limits = measure_limits()
    assert limits.host_read and limits.host_read == limits.memory_bandwidth  # without a GPU they are one


def test_settings_that_contradict_each_other() -> None:
    machine = resolve_hardware("cpu-2-cores")
    with pytest.raises(UsageError, match="--recall is of forced guesses"):
        next(run_rows(artifact(), machine, settings("host", routing="model", recall=0.5)))
    with pytest.raises(UsageError, match="--trace FILE"):
        next(run_rows(artifact(), machine, settings("host", routing="recorded")))
    with pytest.raises(UsageError, match="--compare is of CPU and link beside a GPU"):
        next(run_rows(artifact(), machine, settings("host", compare=("cpu", "both"))))
    h100 = resolve_hardware("h100-80gb")
    with pytest.raises(DocumentError, match=r"cpu\.experts is on; beside a GPU that needs the device to drive"):
        next(run_rows(artifact(), h100, settings("host", compare=("both",))))


def test_the_command_prints_a_table_and_a_line_of_json(
    moe: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    picture, record = tmp_path / "bench.png", tmp_path / "bench.json"
    code, out, _ = moe(
        "bench", "--synthetic", str(config), "-k", "4", "-n", "8", "--prompt", "16", "--context-length", "128",
        "--hardware", "cpu-2-cores", "--plot", str(picture), "--output", str(record),
    )  # fmt: skip
    assert code == 0
    last = json.loads(out.rstrip().splitlines()[-1])
    assert last["rows"][0]["k"] == 4 and "full algorithm" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(record.read_text())["rows"] == last["rows"]
    code, _, err = moe("bench")
    assert code == 2 and "--synthetic" in err
    for wrong, said in (("cpu,gpu", "unknown row 'gpu'; known: both, cpu, link"), ("", "unknown row ''")):
        code, _, err = moe("bench", "--synthetic", str(config), "--compare", wrong)
        assert code == 2 and said in err
    code, _, err = moe("bench", "--synthetic", str(config), "--compare", "both", "--ablations")
    assert code == 2 and "--compare and --ablations are two tables; ask for one" in err
