"""Tasks of lm_eval on the demo model, from local files and without a network, against a plain loop of transformers.

Needs lm_eval, which is half a gigabyte with what it needs and so not part of `[dev]`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from oracle import dequantized_model, logits_of

from moeflow.engine import Engine
from moeflow.errors import MoeflowError, StorageError, UsageError
from moeflow.schema import TaskEvaluation

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "moeflow[tasks]"')

from lm_eval.api.instance import Instance

from moeflow.evaluation.harness import MoeflowLM
from moeflow.evaluation.tasks import Asked, evaluate_tasks

# The library's own clients warn of each other's old names; what moeflow raises is an error in every other file.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

TOLERANCE = 1e-3
QUESTIONS = [
    {"question": "The LORD is my", "choices": [" shepherd; I shall not want", " horse", " own"], "answer": 0},
    {"question": "In the beginning God created", "choices": [" the heaven", " the", " a"], "answer": 0},
    {"question": "And he said unto", "choices": [" him", " them", " the king of the land"], "answer": 1},
    {"question": "", "choices": ["And", "Blessed are the meek", "O"], "answer": 0},
]
TASKS: list[dict[str, Any]] = [
    {"task": "own_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
     "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": ""},
    {"task": "own_answer", "output_type": "generate_until", "doc_to_text": "{{question}} the",
     "doc_to_target": "{{choices[answer]}}", "generation_kwargs": {"until": [",", "\n"], "max_gen_toks": 9}},
    {"task": "own_text", "output_type": "loglikelihood_rolling", "doc_to_text": "",
     "doc_to_target": "{{question}}{{choices[answer]}}"},
]  # fmt: skip
METRICS = {"own_choice": "acc", "own_answer": "exact_match", "own_text": "byte_perplexity"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks and their data."""
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for task in TASKS:
        better = task["task"] != "own_text"
        metric = {"metric": METRICS[task["task"]], "aggregation": "mean" if better else "weighted_perplexity"}
        common = {
            "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
            "metric_list": [{**metric, "higher_is_better": better}], "metadata": {"version": 1.0},
        }  # fmt: skip
        (directory / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return directory


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` keeps lies with the tests' files."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def model(demo_artifact: Path) -> Any:
    return dequantized_model(demo_artifact)


@pytest.fixture
def lm(demo_engine: Engine) -> MoeflowLM:
    return MoeflowLM(demo_engine)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]  # type: ignore[arg-type]


def nats(model: Any, lm: MoeflowLM, ids: list[int]) -> float:
    """Of a text after the token that stands before one, in one window."""
    rows = logits_of(model, [lm.prefix_token_id, *ids[:-1]]).double().log_softmax(-1)
    return sum(float(row[token]) for row, token in zip(rows, ids, strict=True))


def test_log_likelihoods_are_those_of_a_plain_loop(lm: MoeflowLM, model: Any) -> None:
    asked = [(question["question"], choice) for question in QUESTIONS for choice in question["choices"]]
    found = lm.loglikelihood(instances("loglikelihood", *asked))
    for (context, choice), (likelihood, greedy) in zip(asked, found, strict=True):
        before = lm.tok_encode(context) if context else [lm.prefix_token_id]
        after = lm.tok_encode(context + choice)[len(before) if context else 0 :]
        rows = logits_of(model, [*before, *after][:-1]).double().log_softmax(-1)[-len(after) :]
        assert likelihood == pytest.approx(sum(float(r[t]) for r, t in zip(rows, after, strict=True)), abs=TOLERANCE)
        assert greedy == (rows.argmax(-1).tolist() == after)


def test_long_texts_are_cut_into_the_documented_windows(
    lm: MoeflowLM, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The docstring of lm_eval's `LM.loglikelihood_rolling`: the last window is as long as the others."""
    monkeypatch.setattr(lm.scorer, "limit", 8)
    text = " ".join(question["question"] for question in QUESTIONS) + " and they went forth"
    ids = lm.tok_encode(text)
    assert len(ids) > 16 and len(ids) % 8, "full windows and a rest"
    wanted = nats(model, lm, ids[:8])
    for begin in range(8, len(ids), 8):
        end = min(begin + 8, len(ids))
        rows = logits_of(model, ids[end - 9 : end - 1]).double().log_softmax(-1)[begin - end :]
        wanted += sum(float(row[token]) for row, token in zip(rows, ids[begin:end], strict=True))
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("The LORD",), (text,)))
    assert found == pytest.approx([wanted, nats(model, lm, lm.tok_encode("The LORD")), wanted], abs=TOLERANCE)


def test_answers_are_greedy_and_end_before_a_stop(lm: MoeflowLM, demo_engine: Engine) -> None:
    prompt = "And he said unto"
    whole = demo_engine.generate(prompt, max_new_tokens=20, temperature=0).text
    stop = whole[len(whole) // 2 :][:3]
    asked = {"until": [stop], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}
    short = {"until": [], "max_gen_toks": 4}
    found = lm.generate_until(instances("generate_until", (prompt, asked), (prompt, short)))
    assert found[0] == whole.split(stop)[0]
    assert whole.startswith(found[1]) and 0 < len(found[1]) < len(whole)
    assert lm.scorer.tally.tokens - lm.scorer.tally.computed == len(lm.tok_encode(prompt)) - 1


def test_sampled_answers_repeat_and_differ(lm: MoeflowLM, demo_engine: Engine) -> None:
    asked = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 1.0}
    requests = instances("generate_until", ("The", asked), ("The", asked))
    first, second = lm.generate_until(requests)
    assert first != second, "repeats of one prompt are other samples"
    assert MoeflowLM(demo_engine).generate_until(requests) == [first, second]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 4}, "generation with num_beams; moeflow knows"),
        ({"max_gen_toks": 2048}, "no room for a question"),
    ],
)
def test_generation_that_cannot_be_done_is_refused(lm: MoeflowLM, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lm.generate_until(instances("generate_until", ("The", {"until": [], **asked})))


def test_chats_go_through_the_models_template(lm: MoeflowLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        lm.tokenizer, "chat_template",
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}> {% endif %}",
    )  # fmt: skip
    chat = [{"role": "user", "content": "Who?"}]
    assert lm.apply_chat_template(chat) == "[user] Who?\n> "
    chat.append({"role": "assistant", "content": "The"})
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == "[user] Who?\n[assistant] The"
    assert lm.tokenizer_name == "demo" and "[{{ m.role }}]" in (lm.chat_template(True) or "")


def test_it_is_registered_and_made_as_lm_evals_command_makes_it(demo_artifact: Path) -> None:
    from lm_eval.api.registry import get_model

    arguments = f"artifact={demo_artifact},context_length=64"
    made = get_model("moeflow").create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    with made.engine:
        assert isinstance(made, MoeflowLM) and made.max_length == 64


def test_tasks_are_scored_beside_bytes_and_speed(
    moe: Callable[..., tuple[int, str, str]],
    demo_artifact: Path,
    model: Any,
    lm: MoeflowLM,
    files: Path,
    tmp_path: Path,
) -> None:
    names = ",".join(METRICS)
    code, out, err = moe("eval", demo_artifact, "--tasks", names, "--task-files", files, "--limit", 3,
                         "-o", tmp_path / "e.json", "--markdown", tmp_path / "e.md")  # fmt: skip
    assert code == 0, err
    found = TaskEvaluation.load(tmp_path / "e.json")
    scores = {score.task: score for score in found.rows[0].scores}
    assert {name: score.metric for name, score in scores.items()} == METRICS
    assert all(score.samples == 3 for score in scores.values())

    right = 0
    for question in QUESTIONS[:3]:
        asked = [(question["question"], choice) for choice in question["choices"]]
        chances = [likelihood for likelihood, _ in lm.loglikelihood(instances("loglikelihood", *asked))]
        right += chances.index(max(chances)) == question["answer"]
    assert scores["own_choice"].value == pytest.approx(right / 3)
    texts = [question["question"] + question["choices"][question["answer"]] for question in QUESTIONS[:3]]
    total = sum(nats(model, lm, lm.tok_encode(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert scores["own_text"].value == pytest.approx(math.exp(-total / size), rel=TOLERANCE)

    row = found.rows[0]
    assert row.requests == 9 + 3 + 3 and row.truncated == 0 and row.computed < row.tokens
    assert f"{row.computed:,}" in out and "own_choice" in out and "by lm_eval" in (tmp_path / "e.md").read_text()


def test_the_seeds_are_lm_evals(demo_artifact: Path, files: Path) -> None:
    """Its own entry is the yardstick: the same examples are drawn, so every score is the same."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    asked = Asked(["own_few"], files=files, shots=2)
    few = yaml.safe_load((files / "own_choice.yaml").read_text()) | {"task": "own_few", "fewshot_split": "test"}
    few["metric_list"] = [{"metric": "acc"}, {"metric": "brier_score"}]
    (files / "own_few.yaml").write_text(yaml.safe_dump(few))
    ours = {score.metric: score.value for score in evaluate_tasks(demo_artifact, asked).rows[0].scores}
    manager = TaskManager(include_path=str(files), include_defaults=False)
    theirs = simple_evaluate("moeflow", {"artifact": demo_artifact}, ["own_few"], num_fewshot=2, task_manager=manager)
    assert theirs is not None
    result = theirs["results"]["own_few"]
    assert ours == {metric: result[f"{metric},none"] for metric in ("acc", "brier_score")}


def test_a_reference_has_its_own_column(demo_artifact: Path, files: Path, tmp_path: Path) -> None:
    import moeflow

    none = {"backend": "none"}
    profile = {"model": "demo", "quantization": {"experts": none, "attention": none}, "hardware": "cpu-2-cores"}
    plain = moeflow.pack(profile, tmp_path / "plain")
    found = evaluate_tasks(demo_artifact, Asked(["own_text"], files=files, context=64), plain)
    assert found.tasks.context == 64
    own, theirs = (row.scores[0].value or 0 for row in found.rows)
    assert own > theirs, "quantization costs likelihood of these verses"


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        (Asked(["own_choice"], context=1 << 20), UsageError, "the model was made for no more than"),
        (Asked(["own_choice"], chat=True), UsageError, "has no chat template; leave out --chat"),
        (Asked(["own_choice"], files=Path("missing")), StorageError, "missing: no such directory"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    demo_artifact: Path, asked: Asked, kind: type[MoeflowError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        evaluate_tasks(demo_artifact, asked)


def test_an_unknown_task_names_its_neighbours(
    demo_artifact: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(  # its 14,000 tasks take seconds to read
        lm_eval.tasks, "TaskManager", lambda include_path=None: whole(
            include_path=include_path or str(files), include_defaults=False)
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"lm_eval knows no task 'own_chioce'; did you mean own_choice"):
        evaluate_tasks(demo_artifact, Asked(["own_chioce"]))
    with pytest.raises(UsageError, match=r"knows no task 'zzzz'; `lm_eval ls tasks` lists them"):
        evaluate_tasks(demo_artifact, Asked(["zzzz"]))


def test_a_data_set_out_of_reach_is_named(demo_artifact: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, **_: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    place = str(datasets.config.HF_DATASETS_CACHE)
    with pytest.raises(
        StorageError, match=r"task own_choice: its data set json cannot be loaded: Couldn't reach"
    ) as caught:
        evaluate_tasks(demo_artifact, Asked(["own_choice"], files=files))
    assert f"was looked for in {place} and at https://" in str(caught.value)
