"""`moeflow trace` and `generate --trace`, and what `simulate` and `bench` make of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moeflow import cli
from moeflow.offload.routing import uniform
from moeflow.offload.trace import Trace, load_trace, save_trace

Run = Callable[..., tuple[int, str, str]]
TEXT = "And the king said, Bring me the scribe, and he shall write. " * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_an_answers_routes_are_simulated(moe: Run, demo_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.npz"
    generate = ("generate", demo_artifact, "-p", "And the king said", "-n", 12, "--temperature", 0)
    _, plain, _ = moe(*generate)
    code, out, _ = moe(*generate, "--trace", path)
    assert (code, out) == (0, plain)
    trace = load_trace(path)
    stats = json.loads(moe(*generate, "--trace", tmp_path / "b.npz", "--json")[1])["stats"]
    assert np.array_equal(load_trace(tmp_path / "b.npz").routes, trace.routes)
    assert (trace.model, trace.prompt) == ("demo", stats["prompt_tokens"])
    assert len(trace.routes) == stats["prompt_tokens"] + stats["decode_steps"] == trace.prompt + 11
    assert f"{len(trace.routes)} tokens" in moe("simulate", path, "-k", 4)[1]
    assert "recorded routing, 11 tokens" in moe("simulate", path, "-k", 4, "--skip-prompt")[1]
    code, _, err = moe("simulate", path, "-k", 4, "--skip-prompt", "-n", 12)
    assert code == 2 and "--tokens is 12" in err and "has 11 after the prompt" in err
    moe(*generate[:4], "-n", 1, "--trace", path)
    code, _, err = moe("simulate", path, "--skip-prompt")
    assert code == 2 and "all of its tokens are the prompt's" in err


def test_a_texts_routes_are_simulated(moe: Run, demo_artifact: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    code, out, err = moe("trace", demo_artifact, "--text", text, "-o", path)
    assert (code, out) == (0, "")
    trace = load_trace(path)
    assert f"{len(trace.routes)} tokens, 8 layers, top-2 of 8 experts" in " ".join(err.split())
    assert len(trace.routes) > 40 and trace.prompt == 0
    assert moe("trace", demo_artifact, "--text", text, "-o", tmp_path / "u.npz", "-n", 10)[0] == 0
    assert np.array_equal(load_trace(tmp_path / "u.npz").routes, trace.routes[:10])
    assert moe("simulate", path, "-k", 4)[0] == 0
    code, _, err = moe("simulate", path, "--skip-prompt")
    assert code == 2 and "does not say where a prompt ends" in err
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive.files) == ["experts", "format_version", "model", "routes"], "ids and a name, no text"


def test_refused(moe: Run, demo_artifact: Path, text: Path, tmp_path: Path) -> None:
    output, empty, binary = tmp_path / "o.npz", tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"ab\xff")
    for arguments, code, message in (
        (("--text", tmp_path / "none.txt", "-o", output), 7, "none.txt: cannot read: no such file"),
        (("--text", empty, "-o", output), 2, "empty.txt: the text is empty"),
        (("--text", binary, "-o", output), 3, "byte 2 is not UTF-8"),
        (("--text", text, "-o", tmp_path), 7, "cannot write: this is a directory"),
        (("--text", text, "-o", text / "o.npz"), 7, "a part of the path is not a directory"),
        (("--text", text, "-o", output, "-n", 100000), 2, "text.txt: tokens is 100000; the text has"),
    ):
        found, _, err = moe("trace", demo_artifact, *arguments)
        assert (found, message in " ".join(err.split())) == (code, True), err
        assert not output.exists()
    code, out, err = moe("generate", demo_artifact, "-p", "And", "-n", 2, "--trace", tmp_path)
    assert (code, out) == (7, "") and "cannot write: this is a directory" in err
    assert moe("trace", tmp_path, "--text", text, "-o", output)[0] == 5
    code, _, err = moe("simulate", "--model", "mixtral-8x7b", "--skip-prompt")
    assert code == 2 and "synthetic routes have no prompt" in err


def test_a_prompts_length_comes_back_and_is_checked(tmp_path: Path) -> None:
    path, routes = tmp_path / "a.npz", uniform(2, 8, 2, 5, seed=1)
    save_trace(path, Trace(routes, 8, "m", prompt=5))
    assert load_trace(path).prompt == 5
    with pytest.raises(cli.MoeflowError, match="prompt is 6; 0 to 5, the tokens, is expected"):
        save_trace(path, Trace(routes, 8, "m", prompt=6))
    with path.open("wb") as stream:
        np.savez_compressed(stream, routes=routes, experts=8, model="m", format_version=1, prompt=-1)
    with pytest.raises(cli.MoeflowError, match="prompt is -1"):
        load_trace(path)
