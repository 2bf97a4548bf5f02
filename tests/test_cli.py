"""The command line as a person and as a script use it: output, exit codes, one clear message per fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moeflow import cli
from moeflow.artifact.hub import resolve_model
from moeflow.files import data_dir


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A real process, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "moeflow", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip


def test_help_imports_no_torch_and_lists_every_command() -> None:
    code = (
        "import sys; sys.argv=['moeflow','--help']\nfrom moeflow import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    )
    code += "print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("False")
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    assert len(names) == 18
    for command in names:
        assert command in result.stdout
    assert "130 interrupted" in result.stdout


@pytest.mark.parametrize("path", sorted(data_dir("profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_profile_is_valid(moe, path: Path) -> None:
    code, out, _ = moe("validate", path)
    assert (code, out.strip()) == (0, f"{path}: valid profile")


def test_wrong_bits_are_located(moe, tmp_path: Path) -> None:
    path = tmp_path / "laptop.yaml"
    path.write_text("model: demo\nquantization:\n  experts: {backend: hqq, bits: 5}\n")
    code, _, err = moe("validate", path)
    assert code == 3
    assert err == f"error: {path}: quantization.experts.bits is 5; hqq supports 2, 3, 4, 8\n"


def test_pack_generate_verify_inspect(moe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profile = data_dir("profiles") / "demo.yaml"
    code, out, _ = moe("pack", profile)
    assert (code, out.strip()) == (0, "artifacts/demo")
    stamps = {p: p.stat().st_mtime_ns for p in Path("artifacts/demo").glob("*.safetensors")}
    assert moe("pack", profile)[0] == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}, "a second pack rewrote shards"

    arguments = ("generate", "artifacts/demo", "-p", "In the beginning", "--seed", 1, "-n", 20)
    code, first, stats = moe(*arguments)
    assert code == 0
    assert moe(*arguments)[1] == first
    assert "tokens/s" in stats
    assert "hit rate" in stats
    document = json.loads(moe(*arguments, "--json")[1])
    assert document["text"] == first.removesuffix("\n")
    assert document["stats"]["new_tokens"] == 20
    assert document["stats"]["bytes_per_token"] > 0

    assert moe("verify", "artifacts/demo")[0] == 0
    code, out, _ = moe("inspect", "artifacts/demo", "--json")
    assert json.loads(out)["model"]["type"] == "mixtral"
    code, out, _ = moe("inspect", "artifacts/demo")
    assert "gate_up" in out
    assert "4-bit g64" in out


def test_ablations_give_the_same_greedy_text(moe, demo_artifact: Path) -> None:
    texts = {
        moe("generate", demo_artifact, "-p", "And the king", "-n", 12, "--temperature", 0, "--ablation", row)[1]
        for row in ("full", "no-prefetch", "no-cache", "naive")
    }
    assert len(texts) == 1


def test_verify_names_the_flipped_bit(moe, demo_artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo_artifact, broken)
    shard = broken / "experts-5.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0b100
    shard.write_bytes(content)
    code, _, err = moe("verify", broken)
    assert code == 5
    assert f"{broken}/experts-5.safetensors: SHA-256 differs from the manifest's (layer 5, expert" in err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"model": "no/such/model"}, 4, "no/such/model: no such directory"),
        ({"memory": {"vram": "900TiB"}}, 6, "memory.vram is 921,600 GiB"),
        ({"memory": {"ram": "900TiB"}}, 6, "memory.ram is 921,600 GiB"),
        ({"memory": {"vram": "10MiB"}}, 6, "the limit is 10 MiB"),
        ({"cache": {"experts_per_layer": 9}}, 3, "cache.experts_per_layer is 9; the model has 8 experts per layer"),
        ({"quantization": {"experts": {"backend": "hqq", "group_size": 256}}}, 3, "group_size 64, 32, 16 would fit"),
        ({"hardware": "rtx-9999"}, 3, "rtx-9999"),
        ({"modle": "demo"}, 3, "did you mean model?"),
    ],
)
def test_refused_profiles(moe, tmp_path: Path, change: dict[str, object], code: int, message: str) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"model": "demo", "hardware": "cpu-2-cores", **change}))
    found, _, err = moe("pack", profile, "-o", tmp_path / "artifact")
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "artifact").exists(), "something was left behind"


def test_other_settings_do_not_replace_an_artifact(moe, demo_artifact: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(demo_artifact, kept)
    profile = tmp_path / "profile.yaml"
    profile.write_text("model: demo\nhardware: cpu-2-cores\nquantization: {experts: {backend: none}}\n")
    before = {p.name: p.read_bytes() for p in kept.iterdir() if p.is_file()}
    code, _, err = moe("pack", profile, "-o", kept)
    assert code == 5
    assert "--overwrite" in err
    assert before == {p.name: p.read_bytes() for p in kept.iterdir() if p.is_file()}
    assert moe("pack", profile, "-o", kept, "--overwrite")[0] == 0
    assert moe("verify", kept)[0] == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "tokenizer"])
def test_overwrite_mends_a_damaged_artifact(moe, demo_artifact: Path, tmp_path: Path, damage: str) -> None:
    broken, shard = tmp_path / "broken", tmp_path / "broken" / "experts-3.safetensors"
    shutil.copytree(demo_artifact, broken)
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[-9] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        os.truncate(shard, 5000)
    elif damage == "remove":
        shard.unlink()
    else:
        (broken / "tokenizer.json").write_text("{}")
    code, _, err = moe("generate", broken, "-p", "And", "-n", 2)
    assert code == 5
    assert "--overwrite" in err
    assert moe("pack", data_dir("profiles") / "demo.yaml", "-o", broken, "--overwrite")[0] == 0
    assert moe("verify", broken)[0] == 0
    files = [p.name for p in demo_artifact.glob("*.safetensors")]
    assert all((broken / name).read_bytes() == (demo_artifact / name).read_bytes() for name in files)


def test_a_copy_without_notes_is_packed_again_without_being_asked(moe, demo_artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo_artifact, copy, ignore=shutil.ignore_patterns(".moeflow"))
    assert moe("pack", data_dir("profiles") / "demo.yaml", "-o", copy)[0] == 0
    assert moe("verify", copy)[0] == 0


def test_an_earlier_models_chat_template_does_not_stay(moe, demo_artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo_artifact, copy)
    (copy / "chat_template.jinja").write_text("{{ 'stale' }}")
    profile = tmp_path / "profile.yaml"
    profile.write_text("model: demo\nhardware: cpu-2-cores\nquantization: {experts: {backend: hqq, bits: 8}}\n")
    assert moe("pack", profile, "-o", copy, "--overwrite")[0] == 0
    assert not (copy / "chat_template.jinja").exists()


def test_two_packs_into_one_directory_are_refused(moe, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "a" / ".moeflow").mkdir(parents=True)
    with (tmp_path / "a" / ".moeflow" / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        code, _, err = moe("pack", data_dir("profiles") / "demo.yaml", "-o", tmp_path / "a")
    assert code == 2
    assert "another moeflow is packing here" in err
    assert moe("pack", data_dir("profiles") / "demo.yaml", "-o", tmp_path / "a")[0] == 0


def test_a_plan_of_another_artifact_is_not_followed(moe, demo_artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo_artifact, copy)
    plan = json.loads((copy / "plan.json").read_text())
    plan |= {"cache_slots": [4, 4], "manifest_digest": "0" * 64}
    (copy / "plan.json").write_text(json.dumps(plan))
    assert moe("generate", copy, "-p", "And", "-n", 2)[0] == 0


def test_paths_in_a_profile_are_relative_to_it(moe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    shutil.copytree(resolve_model("demo"), tmp_path / "sub" / "checkpoint")
    shutil.copy(data_dir("hardware") / "cpu-2-cores.yaml", tmp_path / "sub" / "mine.yaml")
    (tmp_path / "sub" / "profile.yaml").write_text("model: ./checkpoint\nhardware: mine.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert moe("pack", "sub/profile.yaml", "-o", "artifact")[0] == 0
    monkeypatch.chdir(tmp_path / "sub")
    assert moe("generate", "../artifact", "-p", "And", "-n", 2, "-k", 2)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("generate", "ARTIFACT", "-p", "x", "--ablation", "wrong"), 2, "no-prefetch"),
        (("generate", "ARTIFACT", "-p", "x", "--policy", "wrong"), 2, "lru"),
        (("generate", "ARTIFACT", "-p", "x", "-k", 99), 3, "the model has 8 experts per layer"),
        (("generate", "ARTIFACT", "-p", "x", "-n", 0), 2, "Invalid value"),
        (("generate", "ARTIFACT", "-p", ""), 2, "the prompt is empty"),
        (("generate", "ARTIFACT", "-p", "x", "-n", 5000), 2, "the model was made for no more"),
        (("generate", "ARTIFACT", "-p", "x", "--temperature", 1, "--top-p", 2), 2, "top_p is 2.0"),
        (("generate", "ARTIFACT", "-p", "x", "--seed", 10**30), 2, "64 bits"),
        (("generate", "DEMO", "-p", "x"), 5, "this is a checkpoint"),
        (("pack", "PROFILE", "-o", "/proc/x"), 7, "/proc/x: cannot create"),
        (("validate", "DEMO/config.json"), 3, "keys of any document"),
        (("validate", "nothing.yaml"), 7, "no such file"),
    ],
    ids=str,
)
def test_bad_input_is_one_message(
    moe, demo_artifact: Path, arguments: tuple[object, ...], code: int, message: str
) -> None:
    places = {"ARTIFACT": demo_artifact, "DEMO": resolve_model("demo"), "PROFILE": data_dir("profiles") / "demo.yaml"}
    words = [re.sub("ARTIFACT|DEMO|PROFILE", lambda m: str(places[m[0]]), str(a)) for a in arguments]
    found, _, err = moe(*words)
    assert found == code
    assert message in err
    assert "Traceback" not in err


def test_a_plan_for_cuda_without_cuda(moe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    profile = tmp_path / "gpu.yaml"
    profile.write_text("model: demo\nhardware: rtx-3060\n")
    artifact = tmp_path / "artifact"
    assert moe("pack", profile, "-o", artifact)[0] == 0
    code, _, err = moe("generate", artifact, "-p", "And")
    assert code == 8
    assert "--hardware auto" in err
    assert moe("generate", artifact, "-p", "And", "-n", 3, "--hardware", "cpu-2-cores")[0] == 0


def test_plan_shows_and_does_not_save(moe, demo_artifact: Path) -> None:
    before = (demo_artifact / "plan.json").read_bytes()
    code, out, _ = moe("plan", demo_artifact, "--hardware", "rtx-3060", "--json")
    assert code == 0
    assert json.loads(out)["device"] == "cuda"
    assert (demo_artifact / "plan.json").read_bytes() == before
    assert "KV cache" in moe("plan", demo_artifact, "--hardware", "t4")[1]


def test_autotune_writes_what_pack_takes(moe, tmp_path: Path) -> None:
    profile = tmp_path / "tuned.yaml"
    code, out, _ = moe("autotune", "demo", "-o", profile, "--hardware", "rtx-3060")
    assert code == 0
    assert "4-bit g64" in out
    text = profile.read_text()
    assert "Predicted, not measured" in text and "Guesses are" in text and "All experts" in text
    assert "# 4-bit g64 experts with unquantized attention: the best quality that reaches 5 tokens/s." in text
    assert moe("validate", profile)[0] == 0
    assert moe("pack", profile, "-o", tmp_path / "artifact")[0] == 0


def test_quickstart_twice(moe, tmp_path: Path) -> None:
    output = tmp_path / "quickstart"
    code, first, err = moe("quickstart", "-o", output, "-n", 15)
    assert code == 0
    assert "tokens/s" in err
    code, second, err = moe("quickstart", "-o", output, "-n", 15)
    assert (code, second) == (0, first)
    assert "using the artifact" in err


def test_chat_ends_with_an_empty_line(moe, demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["And the king said", "Then", ""])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    code, out, _ = moe("chat", demo_artifact, "-n", 8, "--seed", 1)
    assert code == 0
    assert len(out.split()) > 4


def test_usage_errors_exit_with_2(moe) -> None:
    code, _, err = moe("generate")
    assert code == 2
    assert "Missing argument" in err


def test_a_traceback_only_with_debug(tmp_path: Path) -> None:
    assert "Traceback" not in run("verify", tmp_path).stderr
    assert "Traceback" in run("--debug", "verify", tmp_path).stderr
    assert "Traceback" in run("verify", tmp_path, "--debug").stderr
    assert run("verify", tmp_path).returncode == 5


def test_probe_json_is_a_hardware_profile(moe, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    code, out, _ = moe("probe", "-o", path, "--json")
    assert code == 0
    assert json.loads(out)["origin"] == "measured"
    assert moe("validate", path)[1].strip().endswith("valid hardware profile")


def test_a_dry_run_shows_numbers_and_writes_nothing(moe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profile = data_dir("profiles") / "demo.yaml"
    code, out, _ = moe("pack", profile, "--dry-run")
    assert code == 0
    for word in (
        "experts",
        "bits a weight",
        "needed",
        "free",
        "experts per layer",
        "device memory",
        "in RAM",
        "together",
    ):
        assert word in out
    code, out, _ = moe("pack", profile, "--dry-run", "--json", "-o", "elsewhere")
    assert code == 0 and json.loads(out)["output"] == "elsewhere" and json.loads(out)["plan"]["cache_slots"]
    assert list(tmp_path.iterdir()) == []


def test_threads_that_wait_leave_their_core_to_others(
    moe: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's OpenMP reads this once, when it is loaded; what the user set stays."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert moe("--help")[0] == 0 and os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert moe("--help")[0] == 0 and os.environ["OMP_WAIT_POLICY"] == "active"
