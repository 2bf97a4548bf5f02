"""`moeflow explain` as a person and as a script use it: artifacts, plans, profiles, and what is none of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from moeflow.console_explain import sentence
from moeflow.files import data_dir
from moeflow.planning.explanation import explain as take_apart
from moeflow.schema import Plan

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def explain(moe: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    return partial(moe, "explain")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Planned from a config that ships, on a machine that ships."""
    path = tmp_path / "profile.yaml"
    path.write_text("model: mixtral-8x7b\nhardware: rtx-3090\ncache: {experts_per_layer: 3}\n")
    return path


@pytest.fixture
def artifact(demo_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_artifact, tmp_path / "demo"))


def milliseconds(out: str, part: str) -> float:
    return float(next(line for line in out.splitlines() if line.startswith(part)).removeprefix(part).split()[0])


def test_a_profile_is_planned_and_taken_apart(explain: Run, profile: Path) -> None:
    code, out, err = explain(profile)
    assert (code, err) == (0, "")
    document = json.loads(explain(profile, "--json")[1])
    plan = Plan.parse(document["plan"], "stdout")
    assert plan.prediction
    parts = ("reading resident weights", "computing with experts", "launches and small kernels")
    shown = [milliseconds(out, part) for part in (*parts, "copies that nothing hides")]
    assert sum(shown) == pytest.approx(1e3 * plan.prediction.decode.total, rel=0.02)
    assert f"{plan.prediction.tokens_per_second:.3g} tokens/s\n" in re.sub(r" +\n", "\n", out)
    assert document["bound"] == "misses"
    best = document["changes"][0]
    assert f"most would help {best['what']}" in " ".join(out.split())
    assert document["sentence"] in " ".join(out.split())
    bars = {line.split()[0]: line.count("█") for line in out.splitlines() if "█" in line}
    assert bars["link"] == 24, "the longest of a prompt's parts"
    assert bars["copies"] == round(24 * next(p["share"] for p in document["token"] if p["name"] == "misses"))


def test_a_split_is_shown_with_the_rates_of_both(explain: Run, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("model: mixtral-8x7b\nhardware: rtx-3090\ncache: {experts_per_layer: 3}\ncpu: {experts: on}\n")
    code, out, _ = explain(path)
    document = json.loads(explain(path, "--json")[1])
    split = document["split"]
    assert code == 0
    assert split["cpu_nbytes"] == document["plan"]["prediction"]["computed_bytes"]
    said = " ".join(out.split())
    assert f"missed at {split['link_rate'] / 1e9:.3g} GB/s" in said
    assert f"at {split['cpu_rate'] / 1e9:.3g} GB/s with 7 threads, while both read host memory" in said
    shown = [milliseconds(out, part) for part in ("misses, by link and CPU at once", "waiting for the CPU")]
    decode = document["plan"]["prediction"]["decode"]
    assert shown == [pytest.approx(1e3 * decode[name], rel=0.01) for name in ("misses", "cpu")]
    assert document["bound"] == "misses" and "host memory, which both read, bounds the speed" in said


def test_an_artifact_knows_what_would_help_and_its_plan_alone_does_not(explain: Run, artifact: Path) -> None:
    code, out, _ = explain(artifact, "--json")
    whole = json.loads(out)
    assert code == 0
    assert whole["unknown"] == ""
    alone = json.loads(explain(artifact / "plan.json", "--json")[1])
    assert alone["unknown"] == "the model's sizes or the machine are not at hand"
    assert alone["changes"] == []
    assert alone["token"] == whole["token"]
    code, out, _ = explain(artifact / "plan.json")
    assert code == 0
    assert "What would help is not said: the model's sizes or the machine are not at hand." in " ".join(out.split())
    assert "memory that stands for a device's" in out or "device memory" in out


def test_a_plan_for_another_machine_is_explained_with_that_one(explain: Run, artifact: Path) -> None:
    from moeflow import pipeline

    pipeline.plan_offload(artifact, {"hardware": "rtx-3060"})
    found = json.loads(explain(artifact, "--json")[1])
    assert found["plan"]["hardware"] == "rtx-3060"
    assert found["unknown"] == ""


def test_a_plan_without_a_prediction_has_bytes_only(explain: Run, artifact: Path) -> None:
    plan = Plan.load(artifact / "plan.json").model_copy(update={"prediction": None})
    plan.save(artifact / "plan.json")
    code, out, _ = explain(artifact)
    assert code == 0
    assert "cached experts" in out
    assert "no times: the plan predicts nothing: its hardware profile lacks a rate" in out
    assert "tokens/s" not in out
    found = json.loads(explain(artifact, "--json")[1])
    assert (found["token"], found["sentence"]) == ([], "")


def test_an_artifact_without_plan_says_how_to_make_one(explain: Run, artifact: Path) -> None:
    (artifact / "plan.json").unlink()
    code, _, err = explain(artifact)
    assert code == 5
    assert err == f"error: {artifact}/plan.json: no such file; make it with `moeflow plan {artifact} --save`\n"


def test_a_plan_of_another_packing_is_refused(explain: Run, artifact: Path) -> None:
    plan = Plan.load(artifact / "plan.json").model_copy(update={"manifest_digest": "0" * 64})
    plan.save(artifact / "plan.json")
    code, _, err = explain(artifact)
    assert code == 5
    assert f"{artifact}/plan.json: made for another packing of the model" in err


def test_what_is_no_plan_is_refused(explain: Run, tmp_path: Path) -> None:
    code, _, err = explain(tmp_path / "none.json")
    assert code == 7
    assert "none.json" in err
    code, _, err = explain(data_dir("hardware") / "rtx-3060.yaml")
    assert code == 3
    assert "a hardware profile; give an artifact, a plan or a profile" in err
    code, _, err = explain(tmp_path)
    assert code == 5
    assert "no manifest.json: not an artifact" in err


def test_the_sentence_names_what_bounds(artifact: Path) -> None:
    plan = Plan.load(artifact / "plan.json")
    assert plan.prediction
    decode = plan.prediction.decode

    def said(**parts: float) -> str:
        slower = plan.prediction.model_copy(update={"decode": decode.model_copy(update=parts)})  # type: ignore[union-attr]
        return sentence(take_apart(plan.model_copy(update={"prediction": slower, "device": "cuda"})))

    assert "reading resident weights: the memory's rate bounds" in said(dense=9.0)
    assert "copies that nothing hides: the link bounds" in said(misses=9.0)
    assert "reads of missing experts: the disk bounds" in said(disk=9.0)
    assert "the host's work: the host bounds" in said(launches=9.0)
    assert "100% of a token is computing with experts" in said(experts=9000.0)
