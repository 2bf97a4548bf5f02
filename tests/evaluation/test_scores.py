"""lm_eval's results as scores, and what is said where lm_eval is not installed: needs no lm_eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeflow.errors import UsageError
from moeflow.evaluation import tasks
from moeflow.evaluation.scores import read_scores


def results(**change: Any) -> dict[str, Any]:
    """As lm_eval 0.4.13 returned it for a group of a group without scores, shortened."""
    own = {"alias": "own", "name": "own", "sample_len": 12, "acc,none": 0.5, "acc_stderr,none": 0.2,
           "sample_count": {"acc,none": 6}}  # fmt: skip
    found = {
        "results": {
            "free": {"alias": "free", "name": "free", "sample_len": 4, "exact_match,strict": 0.25,
                     "exact_match_stderr,strict": "N/A", "exact_match,loose": float("nan")},
            "one": {"alias": "one", "name": "one", "sample_len": 6, "acc,none": 0.5, "acc_stderr,none": 0.2},
            "two": {"alias": "two", "name": "two", "sample_len": 6, "bits_per_byte,none": 1.5},
            "own::inner": {"alias": "own::inner", "name": "own::inner"},
            "own": own,
        },
        "groups": {"own": own},
        "group_subtasks": {"own": ["one", "own::inner"], "own::inner": ["two"]},
        "versions": {"own": "2", "own::inner": "N/A", "one": 1.0},
        "n-shot": {"free": 0, "one": 5, "two": 0, "own": "mixed"},
        "higher_is_better": {"own": {"acc": True}, "one": {"acc": True}, "two": {"bits_per_byte": False}, "free": {}},
    }  # fmt: skip
    return {**found, **change}


def test_members_stand_under_their_group() -> None:
    found = read_scores(results())
    assert [(s.task, s.depth, s.metric, s.samples) for s in found] == [
        ("own", 0, "acc", 6), ("one", 1, "acc", 6), ("two", 1, "bits_per_byte", 6),
        ("free", 0, "exact_match", 4), ("free", 0, "exact_match", 4),
    ]  # fmt: skip
    own, one, two, loose, strict = found
    assert (own.value, own.stderr, own.shots, own.version) == (0.5, 0.2, None, "2")
    assert (one.higher_is_better, two.higher_is_better, strict.higher_is_better) == (True, False, None)
    assert (one.shots, one.version, two.version) == (5, "1.0", None)
    assert (strict.filter, strict.value, strict.stderr) == ("strict", 0.25, None)
    assert (loose.filter, loose.value) == ("loose", None), "not a number"


def test_a_task_by_itself() -> None:
    alone = results(results={"one": {"sample_len": 3, "acc,none": 1.0, "acc_stderr,none": 0.0}}, group_subtasks={})
    alone.pop("groups")
    (score,) = read_scores(alone)
    assert (score.task, score.depth, score.value, score.stderr) == ("one", 0, 1.0, 0.0)


def test_without_the_library_the_remedy_is_named(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r'`lm_eval`, which is not installed: pip install "moeflow\[tasks\]"'):
        tasks.evaluate_tasks(tiny_artifact, tasks.Asked(["mmlu"]))
