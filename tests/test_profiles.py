"""The shipped profiles plan on the shipped hardware, at the real model's size, without having the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeflow.artifact.architectures import ARCHITECTURES, PUBLISHED
from moeflow.artifact.layout import expert_layout, packed_matrix
from moeflow.files import data_dir
from moeflow.pipeline import dry_run
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import LayerSize, ModelSizes
from moeflow.probe.match import find_hardware
from moeflow.schema import Profile, Quantization

HIDDEN, INTERMEDIATE, LAYERS, EXPERTS, KV = 4096, 14336, 32, 8, 1024
MIXTRAL = sorted(data_dir("profiles").glob("mixtral-*.yaml"))


PROFILES = sorted(p for p in data_dir("profiles").glob("*.yaml") if p.stem != "demo")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and a hub cache with nothing in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_every_profile_plans_for_its_machine_offline(path: Path, tmp_path: Path) -> None:
    """With the published config that ships with moeflow: every scheme fits the model, and the plan fits the machine."""
    found = dry_run(path, tmp_path / "artifact")
    assert found.origin == "the config that ships with moeflow"
    assert found.plan is not None, found.refusal
    assert found.plan.memory.total <= found.plan.memory.limit and min(found.plan.cache_slots) >= 2
    assert list(tmp_path.iterdir()) == []


def test_published_models_have_a_config() -> None:
    assert set(PUBLISHED.values()) <= set(ARCHITECTURES)


def mixtral(quantization: Quantization) -> ModelSizes:
    """Mixtral-8x7B from its published dimensions."""
    layout = expert_layout(HIDDEN, INTERMEDIATE, quantization.experts, "bfloat16")
    shapes = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN)]
    attention = [packed_matrix("a", rows, columns, quantization.attention, "bfloat16") for rows, columns in shapes]
    return ModelSizes(
        layers=(LayerSize(EXPERTS, layout.nbytes, 2 * INTERMEDIATE * HIDDEN),) * LAYERS,
        top_k=2,
        dtype="bfloat16",
        resident_packed=LAYERS * sum(s.nbytes for m in attention for s in m.segments),
        resident_dense=2 * (2 * 32000 * HIDDEN + LAYERS * (EXPERTS + 2) * HIDDEN),
        kv_values_per_token=2 * LAYERS * KV,
        max_context=32768,
    )


@pytest.mark.parametrize("path", MIXTRAL, ids=lambda p: p.stem)
def test_mixtral_fits_the_machine_that_its_profile_names(path: Path) -> None:
    profile = Profile.load(path)
    plan = make_plan(profile, mixtral(profile.quantization), find_hardware(profile.hardware))
    assert plan.memory.total <= plan.memory.limit
    assert min(plan.cache_slots) >= 2  # the paper's k on the smallest card
    assert plan.prediction is not None


def test_the_papers_cards_keep_the_papers_experts() -> None:
    """k = 4 on 16 GB, as in the paper's section 4.2; 2-bit experts of group 64 are smaller than the paper's."""
    for name in ("mixtral-rtx-3080-mobile", "mixtral-t4", "mixtral-a100"):
        profile = Profile.load(data_dir("profiles") / f"{name}.yaml")
        assert (
            make_plan(profile, mixtral(profile.quantization), find_hardware(profile.hardware)).cache_slots == (4,) * 32
        )


def test_the_small_colab_machine_reads_the_rest_from_disk() -> None:
    profile = Profile.load(data_dir("profiles") / "mixtral-t4.yaml")
    plan = make_plan(profile, mixtral(profile.quantization), find_hardware("t4"))
    assert 0 < plan.disk_nbytes < plan.ram_nbytes
