"""`moeflow plan` and `moeflow autotune` before a model is there: what they print, keep to, and refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeflow.artifact.architectures import architecture
from moeflow.files import data_dir
from moeflow.probe.match import find_hardware
from moeflow.schema import Plan, Profile

Run = Callable[..., tuple[int, str, str]]
GIB = 1 << 30
MIXTRAL = ("--model", "mixtral-8x7b")
PAPER = ("rtx-3060", "t4", "rtx-3080-mobile", "a100-80gb")


@pytest.fixture
def moe(moe: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Exit code, stdout, stderr; in this process, without a network, on a wide terminal."""
    from huggingface_hub import constants

    from moeflow import console

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(console.out, "_width", 200)

    return moe


def _hardware(name: str) -> Path:
    return data_dir("hardware") / f"{name}.yaml"


def _config(directory: Path, model: str = "olmoe-1b-7b", without: str = "", **changes: Any) -> Path:
    config = architecture(model) | changes
    config.pop(without, None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory / "config.json"


def _edited(directory: Path, **changes: Any) -> Path:
    """The RTX 3060's file with other values, by dotted name."""
    document = yaml.safe_load(_hardware("rtx-3060").read_text())
    for name, value in changes.items():
        *parents, key = name.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        place[key] = value
    (directory / "mine.yaml").write_text(yaml.safe_dump(document))
    return directory / "mine.yaml"


def _planned(moe: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = moe("plan", *arguments, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert isinstance(document, dict)
    return document


# -- what is printed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_machines_show_choices_range_and_assumptions(moe: Run, name: str) -> None:
    code, out, err = moe("plan", *MIXTRAL, "--hardware", _hardware(name))
    assert (code, err) == (0, "")
    assert out.startswith(f"{name}: {find_hardware(name).description}")
    document = _planned(moe, *MIXTRAL, "--hardware", _hardware(name))
    lines = out.splitlines()
    assert sum(line.startswith("→") for line in lines) == 1
    assert [c["quantization"]["experts"]["bits"] for c in document["candidates"]] == [4, 4, 3, 3, 2, 2, 2, 2]
    prediction = Plan.parse(document["plan"], "stdout").prediction
    assert prediction is not None and prediction.low < prediction.tokens_per_second < prediction.high
    row = next(line for line in lines if line.startswith("prediction"))
    assert prediction.speed in row
    assert f"{prediction.range}" in next(line for line in lines if line.startswith("→"))
    assumed = next(line for line in lines if line.startswith("assumed"))
    assert "link.host_to_device" in assumed and "kernels, as measured on an H100" in assumed
    assert "routes repeat as Mixtral's do" in assumed
    assert ("of it on disk" in out) == (name == "t4"), "only Colab's memory is too small"


def test_json_has_profile_plan_reasons_and_candidates(moe: Run) -> None:
    document = _planned(moe, *MIXTRAL, "--hardware", "rtx-3060", "--vram", "4GiB")
    assert set(document) == {"profile", "plan", "reasons", "candidates"}
    profile = Profile.parse(document["profile"], "stdout")
    assert profile.memory.vram == 4 * GIB and profile.hardware == "rtx-3060"
    assert set(document["reasons"]) == {"", "quantization", "cache", "prefetch", "memory"}
    refused = [c for c in document["candidates"] if c["prediction"] is None]
    assert refused and all("the limit is 4 GiB" in c["refusal"] and c["cache_slots"] is None for c in refused)
    kept = [c for c in document["candidates"] if not c["refusal"]]
    assert document["plan"]["cache_slots"] in [c["cache_slots"] for c in kept]


def test_refused_choices_stand_in_the_table_with_their_reason(moe: Run) -> None:
    code, out, _ = moe("plan", *MIXTRAL, "--hardware", "rtx-3060", "--vram", "4GiB")
    assert code == 0 and "before the first cached" in out


def test_a_directory_with_a_config_is_enough(moe: Run, tmp_path: Path) -> None:
    file = _config(tmp_path)
    by_name = _planned(moe, "--model", "olmoe-1b-7b", "--hardware", "t4")
    for model in (file, tmp_path):
        assert _planned(moe, "--model", model, "--hardware", "t4")["plan"] == by_name["plan"]


# -- what is kept to ---------------------------------------------------------------------------------------


def test_memory_limits_are_honoured(moe: Run) -> None:
    plan = _planned(moe, *MIXTRAL, "--hardware", "rtx-3060", "--vram", "6GiB", "--ram", "10GiB", "--disk", "5GiB")[
        "plan"
    ]
    assert plan["memory"]["total"] <= plan["memory"]["limit"] == 6 * GIB
    assert 0 < plan["ram_nbytes"] <= 10 * GIB and 0 < plan["disk_nbytes"] <= 5 * GIB


def test_context_length_takes_its_kv_cache(moe: Run) -> None:
    short, long = (
        _planned(moe, *MIXTRAL, "--hardware", "rtx-3060", "--min-speed", 0, "--context-length", n)["plan"]
        for n in (1000, 2000)
    )
    assert (short["context_length"], long["context_length"]) == (1000, 2000)
    assert long["memory"]["kv_cache"] == 2 * short["memory"]["kv_cache"] > 0


def test_speed_and_bits_move_the_choice(moe: Run) -> None:
    def bits(*arguments: object) -> int:
        document = _planned(moe, *MIXTRAL, "--hardware", "rtx-3080-mobile", *arguments)
        return int(document["profile"]["quantization"]["experts"]["bits"])

    assert (bits("--min-speed", 0), bits("--min-speed", 10), bits("--min-speed", 20)) == (4, 3, 2)
    assert (bits("--min-speed", 20, "--min-bits", 3), bits("--min-bits", 8)) == (3, 8)


def test_cache_policy_and_strategy_are_taken(moe: Run) -> None:
    document = _planned(
        moe, *MIXTRAL, "--hardware", "rtx-3060", "-k", 2, "--policy", "lfu", "--ablation", "no-prefetch"
    )
    plan = document["plan"]
    assert set(plan["cache_slots"]) == {2} and plan["policy"] == "lfu" and plan["strategy"] == "no-prefetch"
    assert document["reasons"]["prefetch"] == "Guesses are off: the strategy is no-prefetch."


def test_the_cpu_s_part_is_taken_and_shown(moe: Run) -> None:
    here = (*MIXTRAL, "--hardware", "rtx-3090", "-k", 3, "--cpu", "on", "--threads", 5)
    part = _planned(moe, *here)["plan"]["cpu"]
    assert part["threads"] == 5 and 0 < part["share"] < 1 and not part["fixed"]
    code, out, _ = moe("plan", *here)
    assert code == 0
    assert f"5 threads for {part['share']:.0%} of missing bytes at first" in " ".join(out.split())
    assert "computed by the CPU" in out
    alone = _planned(moe, *MIXTRAL, "--hardware", "rtx-3090", "--cpu", "only")["plan"]
    assert set(alone["cache_slots"]) == {0} and alone["cpu"]["fixed"]
    assert "cpu" not in _planned(moe, *MIXTRAL, "--hardware", "rtx-3090", "-k", 3)["plan"]


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "give an artifact, or --model"),
        (("artifacts/x", *MIXTRAL), 2, "give an artifact, or --model"),
        ((*MIXTRAL, "--hardware", "t4", "--save"), 2, "moeflow autotune writes a profile"),
        (("--model", "mixtral", "--hardware", "t4"), 4, "mixtral: no such directory; a model is a directory, a hub id"),
        (("--model", "no/such-model", "--hardware", "t4"), 4, "no/such-model: neither a local directory"),
        ((*MIXTRAL, "--hardware", "rtx-9999"), 3, "unknown hardware 'rtx-9999'; known: a100-80gb"),
        ((*MIXTRAL, "--hardware", "nothing.yaml"), 7, "nothing.yaml: cannot read: no such file"),
        ((*MIXTRAL, "--hardware", "t4", "--vram", "lots"), 3, "memory.vram is lots; expected a size such as 11GiB"),
        ((*MIXTRAL, "--hardware", "t4", "--vram", "20GiB"), 6, "memory.vram is 20 GiB; t4 has 15 GiB"),
        ((*MIXTRAL, "--hardware", "t4", "--disk", "0"), 6, "takes at least 2.89 GiB of device memory and 13.1 GiB of"),
        ((*MIXTRAL, "--hardware", "t4", "-k", 9), 3, "experts_per_layer is 9; the model has 8 experts per layer"),
        ((*MIXTRAL, "--hardware", "t4", "--min-bits", 9), 2, "--min-bits"),
        ((*MIXTRAL, "--hardware", "rtx-3090", "--threads", 99), 6, "cpu.threads is 99; rtx-3090 has 8 cores for this"),
        ((*MIXTRAL, "--hardware", "t4", "--cpu", "on"), 3, "cpu.experts is on; beside a GPU that needs the device"),
        ((*MIXTRAL, "--hardware", "t4", "--context-length", 0), 2, "--context-length"),
        ((*MIXTRAL, "--hardware", "t4", "--min-speed", -1), 2, "--min-speed"),
    ],
    ids=str,
)
def test_bad_input_is_one_message(moe: Run, arguments: tuple[object, ...], code: int, message: str) -> None:
    found, out, err = moe("plan", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu__memory": "-1GiB"}, "gpu.memory is -1GiB; expected a size"),
        ({"gpu__memory": 0}, "gpu.memory is 0"),
        ({"gpu__memory_bandwidth": "5000000GB/s"}, "gpu.memory_bandwidth is 5000000GB/s; no memory is faster"),
        ({"link__host_to_device": "0GB/s"}, "link.host_to_device is 0GB/s; expected a rate"),
        ({"cpu__cores": 0}, "cpu.cores is 0"),
        ({"format_version": 9}, "format_version is 9; this moeflow reads hardware profile version 1: upgrade moeflow"),
        ({"warp_drive": 1}, "warp_drive"),
    ],
    ids=str,
)
def test_a_wrong_hardware_file_is_located(moe: Run, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = _edited(tmp_path, **changes)
    code, out, err = moe("plan", *MIXTRAL, "--hardware", file)
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {file}: ") and message in err


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("hidden_size", "hidden_size is None, a whole number is needed"),
        ("num_experts", "has no number of experts"),
        ("num_experts_per_tok", "num_experts_per_tok"),
        ("num_hidden_layers", "num_hidden_layers"),
        ("model_type", "not a model's config: it has no model_type"),
    ],
)
def test_a_config_that_lacks_a_field_is_located(moe: Run, tmp_path: Path, without: str, message: str) -> None:
    file = _config(tmp_path, without=without)
    code, out, err = moe("plan", "--model", file, "--hardware", "t4")
    assert (code, out) == (4, "")
    assert err.startswith(f"error: {file}: ") and message in err


# -- autotune ----------------------------------------------------------------------------------------------


def test_autotune_from_a_config_writes_what_plans_the_same(moe: Run, tmp_path: Path) -> None:
    profile = tmp_path / "tuned" / "profile.yaml"
    code, out, err = moe("autotune", "mixtral-8x7b", "-o", profile, "--hardware", "rtx-3060")
    assert code == 0 and "→" in out
    assert "set its model to a hub id" in " ".join(err.split()), "a name of shapes alone has no weights"
    code, out, _ = moe("pack", profile, "--dry-run", "--json", "-o", tmp_path / "artifact")
    assert code == 0
    assert json.loads(out)["plan"] == _planned(moe, *MIXTRAL, "--hardware", "rtx-3060")["plan"]
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]


def test_relative_paths_are_written_as_seen_from_the_profile(
    moe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _edited(tmp_path, name="mine")
    (tmp_path / "model").mkdir()
    _config(tmp_path / "model")
    assert moe("autotune", "./model", "-o", "deep/er/profile.yaml", "--hardware", "mine.yaml")[0] == 0
    written = Profile.load(tmp_path / "deep/er/profile.yaml")
    assert (written.model, written.hardware) == ("./../../model", "../../mine.yaml")
    monkeypatch.chdir("/")
    code, out, err = moe("pack", tmp_path / "deep/er/profile.yaml", "--dry-run", "--json", "-o", tmp_path / "artifact")
    assert code == 0, err
    assert json.loads(out)["plan"]["hardware"] == "mine"


def test_autotune_that_refuses_writes_nothing(moe: Run, tmp_path: Path) -> None:
    code, _, err = moe(
        "autotune", "mixtral-8x7b", "-o", tmp_path / "p.yaml", "--hardware", "t4", "--vram", "1GiB"
    )  # fmt: skip
    assert code == 6 and "the limit is 1 GiB" in err
    assert list(tmp_path.iterdir()) == []


# -- what it takes -----------------------------------------------------------------------------------------

WATCHED = """
import sys
touched = []
sys.addaudithook(lambda event, _: touched.append(event) if event.startswith("socket.") else None)
from moeflow import cli
try:
    cli.main()
except SystemExit as ended:
    code = ended.code
heavy = sorted({"torch", "transformers", "hqq", "huggingface_hub"} & set(sys.modules))
print(code, heavy, touched)
"""


@pytest.mark.parametrize("command", ["plan", "autotune"])
def test_a_plan_from_a_config_takes_no_torch_and_no_network(command: str, tmp_path: Path) -> None:
    config, profile = _config(tmp_path, "qwen3-30b-a3b"), tmp_path / "profile.yaml"
    arguments = ["plan", "--model", config] if command == "plan" else ["autotune", config, "-o", profile]
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, arguments), "--hardware", "rtx-3060"],
        capture_output=True, text=True, check=True, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    print(f"{command}: {time.perf_counter() - start:.2f} s with the interpreter's start")
    assert result.stdout.splitlines()[-1] in ("0 [] []", "None [] []")
    assert "tokens/s" in result.stdout
