"""`bits: auto` in a profile: what is measured on a text, chosen, packed, planned before, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import checkpoint_model

import moeflow
from moeflow import choice, pipeline
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layout import packed_matrix
from moeflow.artifact.matrix import dequantize, encode, parts_of
from moeflow.artifact.reader import Artifact
from moeflow.artifact.shards import write_experts
from moeflow.errors import ArtifactError, DocumentError, UsageError
from moeflow.output_errors import measure_outputs
from moeflow.planning.sizes import ModelSizes
from moeflow.planning.standin import stand_in
from moeflow.quantization.registry import quantizer_for
from moeflow.schema import BitChoice, HqqScheme, MeasuredText, Plan, Profile, Scheme, Sensitivity

Run = Callable[..., tuple[int, str, str]]
WIDTHS: list[Scheme] = [HqqScheme(bits=2), HqqScheme(bits=3), HqqScheme(bits=4)]
IDS = [(7 * n + n * n) % 96 for n in range(100)]
TEXT = MeasuredText(name="t.txt", digest="0", tokens=len(IDS))
SEED = "In the beginning God created the heaven and the earth. "


def _asked(budget: float, model: str = "demo", **settings: object) -> dict[str, Any]:
    experts = {"bits": "auto", "budget": budget, **settings}
    return {"model": model, "quantization": {"experts": experts}, "hardware": "cpu-2-cores", "context_length": 128}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(SEED * 8)
    return path


@pytest.fixture(scope="module")
def small(checkpoint_factory: Callable[..., Path]) -> str:
    """Three layers of eight experts, 2.667 bits a weight at 2 bits, 5.333 at 3 and 4: a layer is 0.889."""
    return str(checkpoint_factory(layers=3))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured: one entry for each time."""
    found: list[str] = []

    def wrap(name: str, place: str) -> None:
        module = __import__(place, fromlist=[name])
        inner = getattr(module, name)

        def outer(*arguments: object) -> object:
            found.append(name)
            return inner(*arguments)

        monkeypatch.setattr(module, name, outer)

    wrap("measure", "moeflow.sensitivity")
    wrap("measure_outputs", "moeflow.output_errors")
    return found


# -- what is measured --------------------------------------------------------------------------------------


def _restored(weight: torch.Tensor, scheme: Scheme, dtype: str) -> torch.Tensor:
    matrix = packed_matrix("m", *weight.shape, scheme, "bfloat16")
    blob = torch.zeros(matrix.segments[-1].offset + matrix.segments[-1].nbytes, dtype=torch.uint8)
    encode(matrix, [weight.to(getattr(torch, dtype))], quantizer_for(scheme), blob)
    return dequantize(matrix, parts_of(matrix, blob), torch.float32)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_errors_are_the_change_of_what_an_expert_adds(checkpoint_factory: Callable[..., Path], family: str) -> None:
    """Beside transformers' own model, whose experts are run one by one; gpt-oss has biases and a gate of its own."""
    opened = Checkpoint.open(checkpoint_factory(family))
    found = measure_outputs(opened, "tiny", WIDTHS[:2], IDS, TEXT)
    model, seen = checkpoint_model(opened.directory), {}
    modules = {
        layer.index: model.get_submodule(opened.family.module.format(layer=layer.index)) for layer in opened.layers
    }
    for index, module in modules.items():
        module.register_forward_pre_hook(lambda _, given, index=index: seen.update({index: given}))
    with torch.inference_mode():
        model(torch.tensor([IDS]), use_cache=False)
        for entry in found.layers:
            module, (hidden, ids, weights) = modules[entry.layer], seen[entry.layer]
            for expert in (0, len(entry.squares) - 1):
                places = ids == expert  # [T, K]
                x, share = hidden[places.any(-1)], weights[places][:, None]
                if not len(x):
                    x, share = hidden[:1], weights.mean().view(1, 1)
                plain = _one(module, expert, x, None, opened.dtype) * share
                assert entry.squares[expert] == pytest.approx(float(plain.square().sum()), rel=1e-3)
                for number, scheme in enumerate(WIDTHS[:2]):
                    other = _one(module, expert, x, scheme, opened.dtype) * share
                    error = float((other - plain).square().sum())
                    assert entry.errors[expert][number] == pytest.approx(error, rel=2e-2)


def _one(module: Any, expert: int, x: torch.Tensor, scheme: Scheme | None, dtype: str) -> torch.Tensor:
    """An expert of transformers' module by itself, quantized or not."""
    matrices = []
    for name in ("gate_up", "down"):
        weight = getattr(module, f"{name}_proj")[expert]
        weight = weight.T if getattr(module, "is_transposed", False) else weight
        bias = getattr(module, f"{name}_proj_bias")[expert] if getattr(module, "has_bias", False) else 0
        matrices.append((weight if scheme is None else _restored(weight.contiguous(), scheme, dtype), bias))
    (gate_up, first), (down, second) = matrices
    return module._apply_gate(x @ gate_up.T + first) @ down.T + second


def test_a_pass_that_measures_is_the_models_own(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of later layers are for the hidden states that transformers has there."""
    seen: list[torch.Tensor] = []
    from moeflow import output_errors

    inner = output_errors._Runner.run
    monkeypatch.setattr(output_errors._Runner, "run", lambda self, *given: seen.append(given[2]) or inner(self, *given))
    opened = Checkpoint.open(tiny_checkpoint)
    measure_outputs(opened, "tiny", WIDTHS[:1], IDS, TEXT)
    model, theirs = checkpoint_model(tiny_checkpoint), []
    for layer in opened.layers:
        module = model.get_submodule(opened.family.module.format(layer=layer.index))
        module.register_forward_pre_hook(lambda _, given: theirs.append(given[0]))
    with torch.inference_mode():
        model(torch.tensor([IDS]), use_cache=False)
    for mine, own in zip(seen, theirs, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


# -- what is chosen and packed -----------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "measured"), [("layers", False), ("experts", True)])
def test_packing_chooses_what_allocate_writes(
    small: str, tmp_path: Path, text: Path, units: str, measured: bool
) -> None:
    settings = {"units": units, **({"text": str(text)} if measured else {})}
    directory = moeflow.pack(_asked(4.0, small, **settings), tmp_path / "auto")
    written = pipeline.allocate(small, 4.0, text=text if measured else None, by_layer=units == "layers")
    asked = {**_asked(4.0, small), "quantization": written.quantization.model_dump(mode="json")}
    by_hand = moeflow.pack(asked, tmp_path / "hand")
    one, other = (Artifact.open(path).manifest for path in (directory, by_hand))
    assert one == other and one.expert_nbytes == written.nbytes <= 4.0 * one.model.expert_parameters / 8
    assert len({m.scheme for layout in one.layouts for m in layout.matrices}) > 1
    assert any(layer.expert_layouts for layer in one.layers) == (units == "experts")
    made = BitChoice.load(directory / pipeline.BITS)
    assert np.array_equal(made.choices, written.choices) and made.nbytes == one.expert_nbytes
    assert made.asked.text == ("t.txt" if measured else None) and str(text.parent) not in made.to_json()
    assert Profile.load(directory / "profile.yaml").quantization == one.quantization
    assert not (by_hand / pipeline.BITS).exists()


def test_an_interrupted_pack_measures_once_and_chooses_the_same(
    small: str, tmp_path: Path, text: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, directory = _asked(4.0, small, text=str(text)), tmp_path / "a"
    whole = Artifact.open(moeflow.pack(asked, tmp_path / "whole")).manifest

    def stopping(path: Path, *arguments: Any) -> object:
        if path.name == "experts-1.safetensors":
            raise KeyboardInterrupt
        return write_experts(path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("moeflow.artifact.packer.write_experts", stopping)
        moeflow.pack(asked, directory)
    assert not (directory / "manifest.json").exists() and counted == ["measure_outputs"] * 2
    assert Artifact.open(moeflow.pack(asked, directory)).manifest == whole
    assert Artifact.open(moeflow.pack(asked, directory)).manifest == whole
    assert counted == ["measure_outputs"] * 2


def test_another_budget_takes_another_place_or_replaces(small: str, tmp_path: Path, counted: list[str]) -> None:
    directory = moeflow.pack(_asked(4.0, small), tmp_path / "a")
    with pytest.raises(ArtifactError, match="made from another model or other settings"):
        moeflow.pack(_asked(4.5, small), directory)
    moeflow.pack(_asked(4.5, small), directory, overwrite=True)
    assert counted == ["measure"] and BitChoice.load(directory / pipeline.BITS).asked.budget == 4.5
    moeflow.pack({**_asked(4.0, small), "quantization": {}}, directory, overwrite=True)
    assert not (directory / pipeline.BITS).exists()


def test_a_changed_text_is_measured_anew(small: str, tmp_path: Path, counted: list[str]) -> None:
    opened, path = Checkpoint.open(Path(small)), tmp_path / "t.txt"
    request = choice.Request(4.0, tuple(WIDTHS[:2]), by_layer=True, text=path)
    for content in (SEED, SEED, SEED[::-1]):
        path.write_text(content)
        choice.measured_for(opened, "tiny", request, tmp_path / "notes")
    assert counted == ["measure_outputs"] * 2


def test_so_many_tokens_are_measured_as_were_asked_for(small: str, tmp_path: Path, text: Path) -> None:
    directory = moeflow.pack(_asked(4.0, small, text=str(text), tokens=40), tmp_path / "a")
    made = BitChoice.load(directory / pipeline.BITS)
    assert made.asked.tokens == 40 and made.table.text is not None and made.table.text.tokens == 40
    more = pipeline.allocate(small, 4.0, text=text, tokens=64, table=tmp_path / "t.json")
    assert more.blobs is not None and (found := Sensitivity.load(tmp_path / "t.json").text) is not None
    assert found.tokens == 64


def test_a_file_beside_the_profile_is_found(tmp_path: Path) -> None:
    Profile.parse(_asked(3.2, text="t.txt"), "p").save(tmp_path / "p.yaml")
    auto = pipeline.read_profile(tmp_path / "p.yaml").quantization.auto
    assert auto is not None and auto.text == str(tmp_path / "t.txt")


# -- before packing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["layers", "experts"])
@pytest.mark.parametrize("budget", [2.67, 3.0, 4.4, 4.8888])
def test_sizes_before_packing_are_no_less_than_any_choices(units: str, budget: float) -> None:
    opened = Checkpoint.open(Path(moeflow.__file__).parent / "demo")
    profile = Profile.parse(_asked(budget, units=units), "p")
    sizes = ModelSizes.of_checkpoint(opened, stand_in(opened, profile).quantization)
    weights = opened.parameters(experts_only=True)
    step = 20480 * (1 if units == "experts" else 8)  # from the least width to the most
    assert budget * weights / 8 - 1 <= sizes.expert_nbytes < budget * weights / 8 + step
    assert stand_in(opened, Profile(model="demo")) == Profile(model="demo")


def test_dry_run_explain_and_inspect_say_what_is_chosen_when(small: str, tmp_path: Path, text: Path, moe: Run) -> None:
    Profile.parse(_asked(4.0, small, text=str(text)), "p").save(tmp_path / "p.yaml")
    found = pipeline.dry_run(tmp_path / "p.yaml")
    assert found.plan is not None and "at most, for a budget of 4 bits" in found.note and "layers" in found.note
    code, printed, err = moe("pack", tmp_path / "p.yaml", "--dry-run")
    assert code == 0 and "chosen while packing" in " ".join(printed.split())
    code, _, err = moe("explain", tmp_path / "p.yaml")
    assert code == 0 and "at most, for a budget of 4 bits" in " ".join(err.split())
    directory = moeflow.pack(tmp_path / "p.yaml", tmp_path / "a")
    code, _, err = moe("inspect", directory)
    assert code == 0 and "errors of outputs on" in " ".join(err.split())
    assert Plan.load(directory / "plan.json").manifest_digest == Artifact.open(directory).manifest.digest()
    document = json.loads(moe("validate", directory / pipeline.BITS, "--json")[1])
    assert document["kind"] == "bit choice"


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "said"),
    [(2.0, "smallest choice, 2-bit g64, takes 2.667"), (9.0, "largest choice, 4-bit g64, takes 4.889")],
)
def test_a_budget_that_no_choice_meets(tmp_path: Path, counted: list[str], budget: float, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        moeflow.pack(_asked(budget), tmp_path / "a")
    with pytest.raises(UsageError, match=said):
        pipeline.dry_run(_asked(budget))
    assert not counted and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ({"bits": "auto"}, "quantization.experts.budget is missing"),
        ({"bits": "auto", "budget": -1}, "quantization.experts.budget is -1"),
        ({"bits": "auto", "budget": 3, "widths": [2, 5]}, "experts.widths.1 is 5; auto supports 2, 3, 4, 8"),
        ({"bits": "auto", "budget": 3, "widths": [2, 2]}, "it names one twice"),
        ({"bits": "auto", "budget": 3, "budgte": 2}, "did you mean budget"),
        ({"bits": "auto", "budget": 3, "text": "a", "trace": "b"}, "leave out the trace"),
        ({"backend": "bitsandbytes", "bits": "auto"}, "quantization.experts.bits: unknown key"),
    ],
)  # fmt: skip
def test_bad_wishes_are_located(experts: dict[str, Any], said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        Profile.parse({"model": "demo", "quantization": {"experts": experts}}, "p.yaml")


def test_experts_are_chosen_or_said_not_both() -> None:
    quantization = {**_asked(3.0)["quantization"], "overrides": [{"layers": "2-3", "experts": {"backend": "none"}}]}
    with pytest.raises(DocumentError, match="an override names a scheme for those of layers 2-3"):
        Profile.parse({"model": "demo", "quantization": quantization}, "p.yaml")
    quantization["overrides"] = [{"layers": "2", "attention": {"backend": "none"}}]
    assert Profile.parse({"model": "demo", "quantization": quantization}, "p.yaml").quantization.overrides


def test_a_manifest_says_schemes(tiny_artifact: Path) -> None:
    manifest = Artifact.open(tiny_artifact).manifest
    data = manifest.to_dict()
    data["quantization"]["experts"] = {"bits": "auto", "budget": 3}
    with pytest.raises(DocumentError, match="a packed model has schemes"):
        type(manifest).parse(data, "manifest.json")


def test_a_wish_comes_back_from_a_document(tmp_path: Path) -> None:
    profile = Profile.parse(_asked(2.75, widths=[4, 2], units="experts", text="t.txt"), "p")
    for name in ("p.yaml", "p.json"):
        profile.save(tmp_path / name)
        assert Profile.load(tmp_path / name) == profile
    auto = profile.quantization.auto
    assert auto is not None and auto.widths == (2, 4) and "auto, 2.75 bits a weight" in str(profile.quantization)


def test_an_empty_text_and_one_too_many_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("")
    with pytest.raises(UsageError, match="the text is empty"):
        pipeline.allocate("demo", 3.0, text=tmp_path / "t.txt")
    with pytest.raises(UsageError, match="leave out the trace"):
        pipeline.allocate("demo", 3.0, text=tmp_path / "t.txt", trace=tmp_path / "r.npz")


def test_a_table_of_weights_is_none_of_outputs(small: str, tmp_path: Path, text: Path) -> None:
    table = tmp_path / "t.json"
    schemes = WIDTHS[:2]
    pipeline.allocate(small, 3.0, schemes=schemes, table=table)
    with pytest.raises(DocumentError, match=r"has errors of weights, asked are those of outputs on t.txt, \d+ tokens"):
        pipeline.allocate(small, 3.0, schemes=schemes, table=table, text=text)
