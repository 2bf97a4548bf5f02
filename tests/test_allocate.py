"""Bits by measured errors, from a checkpoint to an artifact: table, profile, what is packed, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import moeflow
from moeflow import pipeline
from moeflow.artifact.architectures import architecture
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layout import packed_matrix
from moeflow.artifact.matrix import dequantize, encode, parts_of
from moeflow.artifact.reader import Artifact
from moeflow.artifact.shapes import config_checkpoint
from moeflow.errors import CheckpointError, DocumentError, UsageError
from moeflow.offload.trace import Trace, save_trace
from moeflow.planning.bits import Allotment, allot, even, importance, layers_alike
from moeflow.planning.blobs import SCHEMES, Blobs
from moeflow.quantization.registry import quantizer_for
from moeflow.schema import Profile, Scheme, Sensitivity
from moeflow.sensitivity import measure

Run = Callable[..., tuple[int, str, str]]
LAYERS, EXPERTS = 3, 8
WIDTHS: list[Scheme] = [SCHEMES["2"], SCHEMES["3"], SCHEMES["4"]]


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory: Callable[..., Path]) -> Path:
    return checkpoint_factory(layers=LAYERS)


@pytest.fixture(scope="module")
def table(checkpoint: Path) -> Sensitivity:
    return measure(Checkpoint.open(checkpoint), "tiny", WIDTHS)


@pytest.fixture
def table_file(table: Sensitivity, tmp_path: Path) -> Path:
    table.save(tmp_path / "errors.json")
    return tmp_path / "errors.json"


@pytest.fixture
def moe(moe: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Exit code, stdout, stderr; in this process, without a network, on a wide terminal."""
    from huggingface_hub import constants

    from moeflow import console

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(console.out, "_width", 200)

    return partial(moe, "allocate")


def _trace(path: Path, experts: int = EXPERTS, layers: int = LAYERS, favourite: int = 3) -> Path:
    """Every token uses the favourite; the second choice goes round the others."""
    others = [e for e in range(experts) if e != favourite]
    rows = [[[favourite, others[token % len(others)]]] * layers for token in range(700)]
    save_trace(path, Trace(np.array(rows, np.int16), experts, "tiny"))
    return path


# -- the table ---------------------------------------------------------------------------------------------


def _direct(weight: torch.Tensor, scheme: Scheme) -> float:
    """Of one matrix by itself, in float64."""
    matrix = packed_matrix("m", *weight.shape, scheme, "bfloat16")
    blob = torch.zeros(matrix.segments[-1].offset + matrix.segments[-1].nbytes, dtype=torch.uint8)
    encode(matrix, [weight], quantizer_for(scheme), blob)
    restored = dequantize(matrix, parts_of(matrix, blob), torch.float32)
    return float((weight.double() - restored.double()).square().sum())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_table_is_what_quantizing_each_matrix_costs(checkpoint_factory: Callable[..., Path], family: str) -> None:
    """gpt-oss stores all experts of a layer in one tensor, transposed, with biases, which are no error."""
    opened = Checkpoint.open(checkpoint_factory(family))
    calls: list[tuple[int, int]] = []
    schemes = [SCHEMES["2"], SCHEMES["2g16"], SCHEMES["8"]]
    found = measure(opened, "x", schemes, lambda _, done, total: calls.append((done, total)))
    assert found.source_digest == opened.digest() and found.schemes == tuple(schemes)
    for layer, entry in zip(opened.layers, found.layers, strict=True):
        assert entry.layer == layer.index and len(entry.squares) == len(layer.experts)
        for expert in (0, len(layer.experts) - 1):
            parts = [part for role, part in layer.experts[expert].items() if not role.endswith("_bias")]
            weights = [opened.read_slice(part) for part in parts]
            square = sum(float(weight.double().square().sum()) for weight in weights)
            assert entry.squares[expert] == pytest.approx(square, rel=1e-5)
            for scheme, error in zip(schemes, entry.errors[expert], strict=True):
                assert error == pytest.approx(sum(_direct(w, scheme) for w in weights), rel=1e-4)
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1] > 0


def test_the_table_is_the_packers_error(checkpoint: Path, table: Sensitivity, tmp_path: Path) -> None:
    """The manifest says it layer by layer, to six digits."""
    wanted = {"model": str(checkpoint), "quantization": {"experts": WIDTHS[1].model_dump()}, "hardware": "cpu-2-cores"}
    directory = moeflow.pack({**wanted, "context_length": 128}, tmp_path / "a")
    stated = [layer.relative_error for layer in Artifact.open(directory).manifest.layers]
    found = [(sum(row[1] for row in entry.errors) / sum(entry.squares)) ** 0.5 for entry in table.layers]
    assert stated == pytest.approx(found, abs=1e-6)


def test_a_table_is_read_and_what_it_lacks_is_added(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, measured = tmp_path / "errors.json", []

    def counted(*arguments: object) -> Sensitivity:
        measured.append([scheme.label for scheme in arguments[2]])  # type: ignore[attr-defined]
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("moeflow.sensitivity.measure", counted)
    few = pipeline.allocate(str(checkpoint), 3.6, schemes=WIDTHS[:2], table=path)
    again = pipeline.allocate(str(checkpoint), 3.6, schemes=WIDTHS[:2], table=path)
    more = pipeline.allocate(str(checkpoint), 3.6, schemes=WIDTHS[::-1], table=path)
    assert measured == [["2-bit g64", "3-bit g64"], ["4-bit g64"]]
    assert few.to_dict() == again.to_dict() and more.blobs.schemes == tuple(WIDTHS[::-1])
    assert Sensitivity.load(path).schemes == tuple(WIDTHS)
    assert more.error <= few.error
    assert more.to_dict() == pipeline.allocate(str(checkpoint), 3.6, schemes=WIDTHS[::-1]).to_dict()


def test_a_table_that_contradicts_itself_is_refused(table: Sensitivity) -> None:
    data = table.to_dict()
    data["layers"][1]["errors"][2] = [1.0]
    with pytest.raises(DocumentError, match="layer 1 has errors of 8 experts in rows of 1, 3; 8 experts and 3 schemes"):
        Sensitivity.parse(data, "errors.json")
    with pytest.raises(DocumentError, match="schemes names one twice"):
        Sensitivity.parse({**table.to_dict(), "schemes": [WIDTHS[0].model_dump()] * 3}, "errors.json")


# -- the choice --------------------------------------------------------------------------------------------


def _allot(checkpoint: Path, table: Sensitivity, budget: float, by_layer: bool = False) -> Allotment:
    blobs = Blobs.of(Checkpoint.open(checkpoint), WIDTHS)
    return allot(blobs, table, budget, even(blobs), by_layer=by_layer)


def _between(checkpoint: Path, share: float) -> float:
    """A budget that lies so far from the smallest to the largest scheme."""
    blobs = Blobs.of(Checkpoint.open(checkpoint), WIDTHS)
    least, most = (blobs.bits(blobs.experts * float(f(axis=1).sum())) for f in (blobs.sizes.min, blobs.sizes.max))
    return least + share * (most - least)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_packed_model_has_the_chosen_widths_within_the_budget(
    checkpoint: Path, table_file: Path, tmp_path: Path, moe: Run, share: float, by_layer: bool
) -> None:
    budget, profile = _between(checkpoint, share), tmp_path / "here" / "p.yaml"
    options = ("--budget", repr(budget), "--table", table_file, "-o", profile)
    code, printed, err = moe(checkpoint, *options, *(["--by-layer"] if by_layer else []))
    assert code == 0, err
    chosen = _allot(checkpoint, Sensitivity.load(table_file), budget, by_layer)
    assert Profile.load(profile).quantization == chosen.quantization
    wanted = Profile.load(profile).model_copy(update={"hardware": "cpu-2-cores", "context_length": 128})
    manifest = Artifact.open(moeflow.pack(wanted, tmp_path / "a")).manifest
    for layer, row in enumerate(chosen.choices):
        for expert, number in enumerate(row):
            assert manifest.layout_of(layer, expert).matrices[0].scheme == chosen.blobs.schemes[number]
    assert manifest.expert_nbytes == chosen.nbytes <= budget * manifest.model.expert_parameters / 8 + 1e-6
    if by_layer:
        assert not any(layer.expert_layouts for layer in manifest.layers)
    assert f"{chosen.bits:.3f}" in printed and f"{chosen.error:.4f}" in printed
    assert chosen.bound <= chosen.error
    for uniform in chosen.uniform:
        assert uniform.nbytes > chosen.nbytes or chosen.error <= uniform.error * (1 + 1e-12)


def test_equal_choices_are_one_entry(checkpoint: Path, table: Sensitivity) -> None:
    found = _allot(checkpoint, table, _between(checkpoint, 0.4))
    choices = np.zeros((LAYERS, EXPERTS), np.int64)
    choices[0, [1, 2, 5]] = choices[2, [1, 2, 5]] = 1
    choices[1] = 2
    changed = Allotment(found.blobs, choices, found.errors, found.square, found.least, found.budget, False, 0)
    entries = [(o.layers, o.only_experts, o.experts) for o in changed.quantization.overrides]
    assert changed.quantization.experts == WIDTHS[0]
    assert entries == [("0,2", "1-2,5", WIDTHS[1]), ("1", None, WIDTHS[2])]


def test_experts_that_are_used_more_get_more(checkpoint: Path, table_file: Path, tmp_path: Path) -> None:
    trace = _trace(tmp_path / "t.npz")
    budget = _between(checkpoint, 1 / EXPERTS)
    found = pipeline.allocate(str(checkpoint), budget, table=table_file, trace=trace)
    assert (found.layer_bits[:, 3] == found.layer_bits.max()).all() and found.tokens == 700
    plain = pipeline.allocate(str(checkpoint), budget, table=table_file)
    assert (plain.choices != found.choices).any()


def test_importance_is_use_and_none_is_free() -> None:
    routes = np.array([[[0, 1]], [[0, 2]]], np.int16)
    found = importance(Trace(routes, 4, "x"))
    assert found.tolist() == [[1.5, 1.0, 1.0, 0.5]]


def test_layers_count_alike_whatever_the_size_of_their_outputs(table: Sensitivity) -> None:
    first, *others = table.layers
    larger = first.model_copy(update={"errors": tuple(tuple(1000 * e for e in row) for row in first.errors)})
    nothing = first.model_copy(update={"errors": tuple(tuple(0.0 for _ in row) for row in first.errors)})
    one, other = (
        np.array([entry.errors for entry in t.layers]) * layers_alike(t)[..., None]
        for t in (table, table.model_copy(update={"layers": (larger, *others)}))
    )
    assert one == pytest.approx(other) and one.sum(axis=1).max(axis=1) == pytest.approx(np.ones(LAYERS))
    assert (layers_alike(table.model_copy(update={"layers": (nothing, *others)}))[0] == 1).all()


def test_comments_give_the_reason(checkpoint: Path, table_file: Path, tmp_path: Path, moe: Run) -> None:
    budget = _between(checkpoint, 0.3)
    code, _, err = moe(checkpoint, "--budget", budget, "--table", table_file, "-o", tmp_path / "p.yaml")
    text = " ".join((tmp_path / "p.yaml").read_text().replace("\n#", "").split())
    found = _allot(checkpoint, Sensitivity.load(table_file), budget)
    assert code == 0 and "next: moeflow pack" in err
    for uniform in found.uniform:
        assert f"{uniform.scheme.label} {uniform.error:.4f} at {uniform.bits:.3f} bits" in text
    assert f"Relative error {found.error:.4f}; none within the budget is below {found.bound:.4f}" in text
    assert ("runs host-driven" in text) == bool((found.choices != found.choices[:, :1]).any())


def test_json_has_every_choice(checkpoint: Path, table_file: Path, tmp_path: Path, moe: Run) -> None:
    budget = _between(checkpoint, 0.3)
    _, printed, _ = moe(checkpoint, "--budget", budget, "--table", table_file, "-o", tmp_path / "p.yaml", "--json")
    document = json.loads(printed)
    found = _allot(checkpoint, Sensitivity.load(table_file), budget)
    labels = [[found.blobs.schemes[number].label for number in row] for row in found.choices]
    assert list(document["choices"].values()) == labels
    assert document["nbytes"] == found.nbytes and document["error"] == found.error
    assert Profile.parse(document["profile"], "x").quantization == found.quantization


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "what"), [(1.5, "smallest choice, 2-bit"), (9.5, "largest choice, 4-bit")])
def test_a_budget_that_cannot_be_met_is_refused_before_work(
    checkpoint: Path, tmp_path: Path, moe: Run, monkeypatch: pytest.MonkeyPatch, budget: float, what: str
) -> None:
    monkeypatch.setattr("moeflow.sensitivity.measure", None)
    code, _, err = moe(checkpoint, "--budget", budget, "-o", tmp_path / "p.yaml")
    message = " ".join(err.split())
    assert code == UsageError.exit_code and f"the budget is {budget} bits a weight; the {what}" in message
    assert not (tmp_path / "p.yaml").exists()


@pytest.mark.parametrize("budget", ["nan", "-1", "much"])
def test_a_budget_is_a_number(checkpoint: Path, moe: Run, budget: str) -> None:
    assert moe(checkpoint, "--budget", budget)[0] == UsageError.exit_code


def test_a_trace_of_another_model_is_refused(checkpoint: Path, tmp_path: Path, moe: Run) -> None:
    trace = _trace(tmp_path / "t.npz", layers=5)
    code, _, err = moe(checkpoint, "--budget", 3.6, "--trace", trace, "-o", tmp_path / "p.yaml")
    assert code == DocumentError.exit_code and "this model has 3 layers, top-2 of 8" in " ".join(err.split())


def test_a_table_of_another_model_is_refused_and_kept(tiny_checkpoint: Path, table_file: Path, moe: Run) -> None:
    before = table_file.read_bytes()
    code, _, err = moe(tiny_checkpoint, "--budget", 3.6, "--table", table_file, "-o", table_file.with_name("p.yaml"))
    assert code == DocumentError.exit_code and "errors.json: measured with tiny" in err.replace("\n", " ")
    assert table_file.read_bytes() == before


def test_unknown_models_and_schemes_are_named(checkpoint: Path, moe: Run) -> None:
    code, _, err = moe("./nowhere", "--budget", 3)
    assert code == 4 and "nowhere" in err
    code, _, err = moe(checkpoint, "--budget", 3, "--scheme", "5")
    assert code == UsageError.exit_code and "unknown scheme '5'; known: 2, 2g16, 3, 4, 8" in " ".join(err.split())


def test_schemes_that_do_not_fit_are_left_out() -> None:
    """14,352 inputs divide by 16, not by 64."""
    config = architecture("mixtral-8x7b") | {"intermediate_size": 14352}
    outlined = config_checkpoint(config, "x")
    assert Blobs.of(outlined, list(SCHEMES.values())).schemes == (SCHEMES["2g16"],)
    with pytest.raises(DocumentError, match="not a multiple of 64"):
        Blobs.of(outlined, WIDTHS)


def test_layers_of_different_numbers_of_experts_are_refused(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    first, *others = opened.layers
    opened.__dict__["layers"] = (replace(first, experts=first.experts[:4]), *others)
    with pytest.raises(CheckpointError, match="layers have 4 to 8 experts"):
        Blobs.of(opened, WIDTHS)
