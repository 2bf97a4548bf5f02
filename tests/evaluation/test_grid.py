"""A grid: its cells, and that nothing which is finished is done again."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeflow.errors import ArtifactError, DocumentError, UsageError
from moeflow.evaluation import grid
from moeflow.evaluation.grid import cells, merged, run_grid
from moeflow.evaluation.run import Text, evaluate
from moeflow.pipeline import resolve_hardware
from moeflow.schema import Evaluation

TEXT = Text("t.txt", "A single man in possession of a good fortune must be in want of a wife.", 16, 8)


def test_cells_are_every_combination_as_written() -> None:
    found = cells("m", "2g16m8,16", "4, 16")
    assert [cell.name for cell in found] == ["2g16m8-4", "16-4", "2g16m8-16", "16-16"]
    assert [str(cell.profile.quantization) for cell in found] == [
        "experts 2-bit g16 meta8, attention 4-bit g64", "experts unquantized, attention 4-bit g64",
        "experts 2-bit g16 meta8, attention unquantized", "experts unquantized, attention unquantized",
    ]  # fmt: skip


def test_schemes_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="'four' is no scheme; write bits"):
        cells("m", "2,four", "4")
    with pytest.raises(DocumentError, match=r"grid: quantization\.experts"):
        cells("m", "5", "4")


def run(checkpoint: Path, directory: Path, text: Text = TEXT, **settings: object) -> list[tuple[str, Evaluation, bool]]:
    wanted = cells(str(checkpoint), "16,2", "16")
    hardware = resolve_hardware("cpu-2-cores")
    found = run_grid(wanted, text, directory, hardware, **settings)  # type: ignore[arg-type]
    return [(cell.name, one, before) for cell, one, before in found]


def test_a_grid_is_its_evaluations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = run(tiny_checkpoint, tmp_path)
    assert [(name, before) for name, _, before in found] == [("16-16", False), ("2-16", False)]
    for name, one, _ in found:
        assert one.rows[0].nll == evaluate(tmp_path / name, TEXT).rows[0].nll
        assert Evaluation.load(tmp_path / f"{name}.json") == one
    whole = merged([one for _, one, _ in found], "moeflow eval-grid")
    assert [row.nll for row in whole.rows] == [one.rows[0].nll for _, one, _ in found]
    assert whole.command == "moeflow eval-grid"


def test_what_is_finished_is_not_done_again(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends in the second cell leaves one; the next one takes it as it is."""
    done: list[str] = []

    def interrupted(artifact: Path, *arguments: object) -> Evaluation:
        if done:
            raise KeyboardInterrupt
        done.append(artifact.name)
        return evaluate(artifact, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(grid, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_checkpoint, tmp_path)
    written = {name: (tmp_path / f"{name}.json").read_bytes() for name in done}
    assert done == [path.stem for path in tmp_path.glob("*.json")] == ["16-16"]
    again: list[str] = []

    def counted(artifact: Path, *arguments: object) -> Evaluation:
        again.append(artifact.name)
        return evaluate(artifact, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(grid, "evaluate", counted)
    found = run(tiny_checkpoint, tmp_path)
    assert again == ["2-16"]
    assert [before for _, _, before in found] == [True, False]
    assert {name: (tmp_path / f"{name}.json").read_bytes() for name in done} == written


def test_another_protocol_text_or_model_is_evaluated_anew(
    tiny_checkpoint: Path, checkpoint_factory: object, tmp_path: Path
) -> None:
    run(tiny_checkpoint, tmp_path)
    for text in (Text("t.txt", TEXT.content, 16, 16), Text("t.txt", TEXT.content[:-1], 16, 8)):
        assert not any(before for *_, before in run(tiny_checkpoint, tmp_path, text))
    assert all(before for *_, before in run(tiny_checkpoint, tmp_path, text))
    with pytest.raises(ArtifactError, match="made from another model or other settings"):
        run(checkpoint_factory("olmoe"), tmp_path, text)  # type: ignore[operator]


def test_artifacts_can_be_given_up_and_results_stay(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run(tiny_checkpoint, tmp_path, keep=False)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert all(before for *_, before in run(tiny_checkpoint, tmp_path))


def test_a_reference_is_compared_with_each(tiny_checkpoint: Path, plain: Path, quantized: Path, tmp_path: Path) -> None:
    run(tiny_checkpoint, tmp_path)
    whole: list[str] = []
    found = run(
        tiny_checkpoint,
        tmp_path,
        reference=plain,
        report=lambda what, done, total: whole.append(what) if done == total else None,
    )
    assert not any(before for *_, before in found), "those from before have no divergence"
    assert len(whole) == 3, "two cells, and the reference once"
    kl = {name: one.mean_kl(one.rows[0]) for name, one, _ in found}
    assert kl["16-16"] == 0 and kl["2-16"]
    with pytest.raises(UsageError, match="is quantized"):
        run(tiny_checkpoint, tmp_path / "new", reference=quantized)
    assert not (tmp_path / "new").exists(), "refused before anything is packed"
