"""Scores of tasks as text: every figure under its heading, packings side by side, cut requests said."""

from __future__ import annotations

import json
from typing import Any

from sample_benchmark import run as benchmark

from moeflow.reporting.tasks import json_line, markdown, table
from moeflow.schema import TaskEvaluation, TaskProtocol, TaskScore, TasksDone

MIB = 1 << 20


def score(task: str, value: float | None, **change: Any) -> TaskScore:
    settings: dict[str, Any] = {
        "depth": 0, "metric": "acc", "filter": "none", "stderr": 0.0123, "higher_is_better": True, "samples": 1500,
        "shots": 5, "version": "1.0",
    }  # fmt: skip
    return TaskScore(task=task, value=value, **{**settings, **change})


def row(experts: str, *scores: TaskScore, truncated: int = 0) -> TasksDone:
    return TasksDone(
        experts=experts, attention="4-bit g64", quantization=f"experts {experts}", expert_nbytes=2 * MIB,
        expert_parameters=4 * MIB, nbytes=3 * MIB, parameters=5 * MIB, device="cpu", dtype="float32", computed=4000,
        seconds=2.0, requests=6000, truncated=truncated, tokens=16000, scores=scores,
    )  # fmt: skip


def evaluation(*rows: TasksDone, **change: Any) -> TaskEvaluation:
    asked: dict[str, Any] = {
        "names": ("mmlu", "gsm8k"), "harness": "0.4.13", "limit": None, "shots": None, "chat": False, "context": 4096,
    }  # fmt: skip
    return TaskEvaluation(
        command="moeflow eval a --tasks mmlu,gsm8k", date="2026-11-25T14:05:00Z", environment=benchmark().environment,
        model="x/y", source_digest="1" * 64, tasks=TaskProtocol(**{**asked, **change}), rows=rows,
    )  # fmt: skip


MMLU = score("mmlu", 0.70123)
STEM = score("mmlu_stem", 0.5, depth=1, stderr=None)
ANSWERS = [score("gsm8k", 0.25, metric="exact_match", filter=chosen, shots=None) for chosen in ("strict", "loose")]
TWO = row("2-bit g64", MMLU, STEM, *ANSWERS)
PLAIN = row("unquantized", score("mmlu", 0.75), STEM, score("gsm8k", None), ANSWERS[1])


def block(text: str, title: str) -> list[list[str]]:
    lines = next(part for part in text.split("\n\n") if part.startswith(title)).splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_each_figure_stands_under_its_heading() -> None:
    text = table(evaluation(TWO, PLAIN))
    head, mmlu, stem, strict, loose = block(text, "task")
    assert head == ["task", "metric", "better", "experts 2-bit g64", "experts unquantized", "questions", "examples"]
    assert mmlu == ["mmlu", "acc", "higher", "0.7012 ± 0.012", "0.75 ± 0.012", "1,500", "5"]
    assert stem == ["mmlu_stem", "acc", "higher", "0.5", "0.5", "1,500", "5"]
    assert strict == ["gsm8k", "exact_match, strict", "higher", "0.25 ± 0.012", "-", "1,500", "-"]
    assert loose[0] == "exact_match, loose", "a task's name stands at its first line"
    assert "\n  mmlu_stem" in text, "under its group"
    assert block(text, "quantization")[1] == [
        "experts 2-bit g64", "2 MiB", "4.00", "3 MiB", "6,000", "16,000", "4,000", "2,000", "cpu, float32",
    ]  # fmt: skip


def test_what_was_asked_is_said() -> None:
    text = table(evaluation(TWO))
    assert "x/y: mmlu, gsm8k by lm_eval 0.4.13, all questions, the tasks' own number of examples" in text
    assert "did not fit" not in text
    text = table(evaluation(TWO, limit=100, shots=0, chat=True)).replace("\n", " ")
    for phrase in ("the first 100 questions of each task", "examples before each: 0", "through the chat template"):
        assert phrase in text


def test_requests_that_were_cut_are_said_first() -> None:
    text = table(evaluation(row("2-bit g64", MMLU, truncated=1234)))
    assert "\n1,234 requests did not fit the context and lost their beginning: see --context;" in text


def test_markdown_has_the_same_cells() -> None:
    run = evaluation(TWO, PLAIN)
    text = markdown(run)
    assert "## x/y on mmlu, gsm8k, 2026-11-25" in text and f"`{run.command}`" in text
    for title in ("task", "quantization"):
        assert all(f"{cell} |" in text for line in block(table(run), title) for cell in line)


def test_the_json_line_is_the_document_and_what_follows_from_it() -> None:
    run = evaluation(TWO, PLAIN)
    document = json.loads(json_line(run))
    assert document.pop("derived")[0] == {"expert_bits": 4.0, "bits": 4.8, "tokens_per_second": 2000.0}
    assert TaskEvaluation.parse(document, "line") == run
