"""`moeflow simulate` as a person and as a script use it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moeflow.offload.policy import Rule
from moeflow.offload.routing import markov, uniform
from moeflow.offload.trace import Trace, save_trace
from moeflow.planning.fitting import Fit
from moeflow.planning.replay import replay
from moeflow.planning.simulator import hit_rates
from moeflow.schema import Simulation

Run = Callable[..., tuple[int, str, str]]
SHAPE = ("--layers", 3, "--experts", 8, "--top-k", 2, "-n", 60)


@pytest.fixture
def simulate(moe: Run) -> Run:
    """Exit code, stdout, stderr."""

    return partial(moe, "simulate")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    save_trace(tmp_path / "routes.npz", Trace(uniform(3, 8, 2, 40, seed=1), 8, "tiny/mixtral"))
    return tmp_path / "routes.npz"


def parsed(line: str) -> Simulation:
    document = json.loads(line)
    del document["derived"], document["remarks"]
    return Simulation.parse(document, "stdout")


def test_a_trace_is_replayed_for_every_k(simulate: Run, trace: Path) -> None:
    code, out, err = simulate(trace)
    assert (code, err) == (0, "")
    assert out.startswith(
        "tiny/mixtral: 3 layers, top-2 of 8 experts; recorded routing, 40 tokens from an empty cache."
    )
    rates = hit_rates(uniform(3, 8, 2, 40, seed=1), 8).mean(axis=0)
    for k in range(1, 8):
        line = next(line for line in out.splitlines() if line.startswith(f"k = {k} "))
        assert f"{100 * rates[k]:.3g}%" == line.split()[3]
    with pytest.raises(json.JSONDecodeError):
        json.loads(out.splitlines()[-1])


def test_json_is_one_document(simulate: Run, trace: Path) -> None:
    code, out, err = simulate(trace, "--json", "-k", 4, "-k", 2, "--policy", "lru", "--policy", "lfu", "-n", 30)
    assert (code, err, out.count("\n")) == (0, "", 1)
    found = parsed(out)
    assert [(row.policy, row.k) for row in found.rows] == [
        ("lru", 2), ("lru", 4), ("lfu", 2), ("lfu", 4), ("optimum", 2), ("optimum", 4)
    ]  # fmt: skip
    routes = uniform(3, 8, 2, 40, seed=1)[:30]
    for row in found.rows:
        assert np.allclose(found.layer_hit_rates(row), hit_rates(routes, 8, row.policy, [row.k])[:, 0])
    assert (found.tokens, found.routing, found.seed) == (30, "recorded", None)
    assert found.command.startswith("moeflow simulate ")


@pytest.mark.parametrize("routing", ["uniform", "markov"])
def test_synthetic_routes_are_those_of_the_seed(simulate: Run, routing: str) -> None:
    arguments = ("--routing", routing, "--seed", 5, "-k", 3, "--json")
    found = parsed(simulate(*SHAPE, *arguments)[1])
    routes = {"uniform": uniform, "markov": markov}[routing](3, 8, 2, 60, 5)
    assert found.hit_rate(found.rows[0]) == pytest.approx(hit_rates(routes, 8, "lru", [3]).mean())
    assert (found.seed, found.routing) == (5, routing)


def test_a_known_models_shape(simulate: Run) -> None:
    code, out, _ = simulate("--model", "mixtral-8x7b", "-n", 20, "-k", 4, "--by-layer")
    assert code == 0
    assert out.startswith("mixtral-8x7b: 32 layers, top-2 of 8 experts; Markov routing")
    assert sum(line.startswith("layer 31 ") for line in out.splitlines()) == 2  # of lru and of the optimum


def test_guesses_say_what_stands_for_the_gate(simulate: Run) -> None:
    code, out, _ = simulate(*SHAPE, "--predictor", "recall", "--recall", 0.7, "-k", 2, "--depth", 9)
    assert code == 0
    assert "guesses: 2 for each of the next 2 layers, 70% of them right; 6 landing buffers" in out
    assert "a recall stands for it" in " ".join(out.split())
    found = parsed(simulate(*SHAPE, "--predictor", "previous", "--guesses", 1, "-k", 2, "--json")[1])
    assert found.guessing is not None and found.guessing.model_dump() == {
        "predictor": "previous", "recall": None, "experts": 1, "depth": 1, "staging": 4
    }  # fmt: skip
    assert sum(row.guesses is not None for row in found.rows) == 1


def test_a_mix_for_every_half_life(simulate: Run, trace: Path) -> None:
    arguments = ("--policy", "mix", "--half-life", 1, "--half-life", 8, "--policy", "lru", "-k", 3, "--json")
    found = parsed(simulate(trace, *arguments)[1])
    assert [row.label for row in found.rows] == ["mix 1", "mix 8", "lru", "optimum"]
    assert found.rows[0].hits == found.rows[2].hits
    routes = uniform(3, 8, 2, 40, seed=1)
    assert np.allclose(found.layer_hit_rates(found.rows[1]), hit_rates(routes, 8, Rule("mix", 8), [3])[:, 0])


def test_a_static_set_and_quotas_come_from_the_trace_that_is_named(simulate: Run, trace: Path, tmp_path: Path) -> None:
    other = markov(3, 8, 2, 90, seed=4)
    save_trace(tmp_path / "other.npz", Trace(other, 8, "tiny/mixtral"))
    arguments = (trace, "--policy", "static", "--policy", "lru", "-k", 3, "-k", 5, "--quotas")
    found = parsed(simulate(*arguments, "--fit", tmp_path / "other.npz", "--json")[1])
    routes, fit = uniform(3, 8, 2, 40, seed=1), Fit(other, 8, "static", 1)
    shared = [row for row in found.rows if row.quotas]
    assert [(row.label, row.k) for row in shared] == [(p, k) for p in ("static", "lru", "optimum") for k in (3, 5)]
    assert all(sum(row.quotas or ()) == 3 * row.k for row in shared)
    assert list(found.rows[0].hits) == replay(routes, fit.rule, (3, 3, 3))
    assert shared[0].quotas == tuple(fit.quotas([3] * 3, [1] * 3, [8] * 3))
    assert list(shared[0].hits) == replay(routes, fit.rule, shared[0].quotas)
    for k in (3, 5):
        hits = {row.label: sum(row.hits) for row in shared if row.k == k}
        assert max(hits.values()) == hits["optimum"]
    text = simulate(*arguments, "--fit", tmp_path / "other.npz", "--plot", tmp_path / "hits.png")[1]
    assert "static: the experts most used in other.npz" in text
    assert f"quotas of static, k = 3: {' '.join(map(str, shared[0].quotas))}\n" in text
    assert "static: the experts most used in these routes themselves" in simulate(*arguments)[1]


def test_a_trace_of_another_shape_cannot_be_fitted_to(simulate: Run, trace: Path, tmp_path: Path) -> None:
    save_trace(tmp_path / "other.npz", Trace(uniform(3, 9, 2, 20, seed=4), 9, "another"))
    code, _, err = simulate(trace, "--policy", "static", "--fit", tmp_path / "other.npz")
    assert code == 3
    assert "a trace of another with 3 layers, top-2 of 9 experts; this model has 3 layers, top-2 of 8" in err


def test_a_plot_is_written(simulate: Run, tmp_path: Path) -> None:
    code, _, err = simulate(*SHAPE, "--plot", tmp_path / "hits.png")
    assert code == 0
    assert "".join(err.split()).endswith("".join(f"wrote {tmp_path}/hits.png".split()))
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_without_matplotlib_the_remedy_is_named(simulate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    code, out, err = simulate(*SHAPE, "--plot", tmp_path / "hits.png")
    assert (code, out) == (2, "")
    assert err == "error: a plot needs matplotlib, which is not installed: pip install moeflow[plot]\n"


ONE = "give a trace, or --model, or a shape by --layers, --experts and --top-k: one of the three"
GUESSES = "--recall, --guesses, --depth and --staging are of guesses"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, ONE),
        (("routes.npz", "--model", "mixtral-8x7b"), 2, ONE),
        (("--layers", 3), 2, "a shape needs --layers, --experts and --top-k, all three"),
        (("--layers", 3, "--experts", 4, "--top-k", 5), 2, "no routes of 5000 tokens, 3 layers, top-5 of 4 experts"),
        (("--model", "mixtrall"), 4, "unknown architecture 'mixtrall'; known: deepseek-v2-lite"),
        (("absent.npz",), 7, "absent.npz: cannot read: no such file or directory"),
        ((*SHAPE, "-k", 9), 2, "k is 9; a layer has 8 experts: give 0 to 8"),
        ((*SHAPE, "--policy", "fifo"), 2, "unknown cache policy 'fifo'; known: lfu, lru, mix, static"),
        ((*SHAPE, "--half-life", 4), 2, "--half-life is of the policy mix; give --policy mix, too"),
        ((*SHAPE, "--fit", "a.npz"), 2, "--fit is of static sets and of quotas; give --policy static or --quotas, too"),
        ((*SHAPE, "--recall", 0.5), 2, GUESSES),
        ((*SHAPE, "--depth", 1), 2, GUESSES),
        ((*SHAPE, "--predictor", "recall"), 2, "--predictor recall needs --recall, and no other takes it"),
        ((*SHAPE, "--predictor", "previous", "--guesses", 3), 2, "3 guesses a layer; routes are top-2"),
        ((*SHAPE, "--plot", "hits.pdf"), 2, "hits.pdf: a plot is written as PNG"),
    ],
    ids=str,
)
def test_refused(simulate: Run, arguments: tuple[object, ...], code: int, message: str) -> None:
    found, out, err = simulate(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_damaged_trace_and_wishes_that_it_cannot_fulfil(simulate: Run, trace: Path) -> None:
    code, _, err = simulate(trace, "-n", 41)
    assert (code, err) == (2, f"error: --tokens is 41; {trace} has 40\n")
    code, _, err = simulate(trace, "--routing", "markov")
    assert (code, err) == (2, f"error: --routing is of synthetic routes; those of {trace} are recorded\n")
    content = trace.read_bytes()
    trace.write_bytes(content[: len(content) // 2])
    code, out, err = simulate(trace)
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {trace}: damaged, or not a trace of routes")


def test_it_imports_no_torch() -> None:
    arguments = ["moeflow", "simulate", *map(str, SHAPE)]
    code = (
        f"import sys; sys.argv={arguments}\nfrom moeflow import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("False")
