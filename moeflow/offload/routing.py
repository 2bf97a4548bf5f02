"""Where a benchmark's routes come from when the model's own router is not asked: uniform, Markov, recorded.

A synthetic model's router has random weights and routes unlike any trained one; what a cache is worth depends on how
often neighbouring tokens share experts. So routes are forced, and a benchmark says which. Each source returns int16
[T, L, K], distinct in every row, the same for the same seed.

The Markov trace is calibrated to what the Mixtral report (arXiv 2401.04088, table 5) measured on consecutive tokens:
how often the first choice repeats, and how often the first two choices share an expert. The chain has two
probabilities per layer:

* `first`: the first choice is copied from the token before; else it is uniform over all experts.
* `later`: a further choice is one of the experts of the token before, at random; else it is uniform over all.

Both are solved for Mixtral's 8 experts, top-2, at layers 0, 15 and 31, and read off linearly at a layer's relative
depth. For other numbers of experts and choices the two probabilities stay and chance changes with the number: the
trained habit is taken to be the model's, not the count's, which is a guess, since no such figures are published for
other models. Layers are independent, and nothing older than the token before is remembered.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeflow.errors import UsageError
from moeflow.offload.trace import Routes, load_trace

__all__ = ["uniform", "markov", "recorded", "guesses", "habits", "repetition", "MIXTRAL"]

MIXTRAL = {0: (0.14, 0.47), 15: (0.27, 0.62), 31: (0.23, 0.59)}
"""Layer -> how often the first choice repeats, and how often the first two choices share an expert."""

Ids = npt.NDArray[np.int16]


def uniform(layers: int, experts: int, top_k: int, tokens: int, seed: int) -> Routes:
    """Every expert is as likely as any other, whatever came before.

    Raises:
        UsageError: there are not as many experts as choices, or a number is not positive.
    """
    _check_shape(layers, experts, top_k, tokens)
    return _uniform(np.random.default_rng(seed), (tokens, layers), experts, top_k)


def markov(layers: int, experts: int, top_k: int, tokens: int, seed: int) -> Routes:
    """A chain over tokens with Mixtral's published repetition; the module says how it carries over to other shapes.

    Raises:
        UsageError: as for `uniform`.
    """
    _check_shape(layers, experts, top_k, tokens)
    random = np.random.default_rng(seed)
    first, later = habits(layers)
    rows = np.empty((tokens, layers, top_k), np.int16)
    rows[0] = _uniform(random, (layers,), experts, top_k)
    for token in range(1, tokens):
        before, row = rows[token - 1], rows[token]
        copied = random.random((layers, top_k)) < np.column_stack([first, *[later] * (top_k - 1)])
        row[:, 0] = np.where(copied[:, 0], before[:, 0], _outside(random, row[:, :0], experts))
        for choice in range(1, top_k):
            taken = row[:, :choice]
            fresh = _outside(random, taken, experts)
            row[:, choice] = np.where(copied[:, choice], _among(random, before, taken), fresh)
    return rows


def recorded(path: Path) -> Routes:
    """The routes of a trace file.

    Raises:
        DocumentError: it is no trace, damaged, or of a newer format.
    """
    return load_trace(path).routes


def guesses(routes: Routes, experts: int, recall: float, seed: int) -> Routes:
    """What a predictor of this recall would have said of forced routes, [T, L, K] as they.

    Each entry is right with probability `recall`, whatever the others are; a wrong one is uniform over the experts
    that the token does not use in that layer. Distinct in every row.

    Raises:
        UsageError: recall is no probability, or a row has more choices than experts that it does not use.
    """
    if not 0 <= recall <= 1:
        raise UsageError(f"recall is {recall}; it lies between 0 and 1")
    top_k = routes.shape[-1]
    if recall == 1:
        return routes.copy()
    if experts < 2 * top_k:
        raise UsageError(
            f"a wrong guess needs an expert that is not used, and top-{top_k} of {experts} leaves {experts - top_k}; "
            "use recall 1"
        )
    random = np.random.default_rng(seed)
    right = random.random(routes.shape) < recall
    wrong = routes
    for _ in range(top_k):
        wrong = np.concatenate([wrong, _outside(random, wrong, experts)[..., None]], axis=-1)
    return np.where(right, routes, wrong[..., top_k:])


def repetition(routes: Routes) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Per layer, the two shares [L] of Mixtral's report: first choices that repeat, first two that share an expert."""
    before, after = routes[:-1], routes[1:]
    first = (before[..., 0] == after[..., 0]).mean(axis=0)
    shared = (before[..., :2, None] == after[..., None, :2]).any(axis=(-1, -2)).mean(axis=0)
    return first, shared


def habits(layers: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The chain's `first` and `later` of each layer, [L] each; the module says what they are."""
    depths = [layer / max(MIXTRAL) for layer in MIXTRAL]
    at = np.linspace(0, 1, layers)
    first, later = zip(*(_solve(*found) for found in MIXTRAL.values()), strict=True)
    return np.interp(at, depths, first), np.interp(at, depths, later)


def _solve(same_first: float, shared: float, experts: int = 8) -> tuple[float, float]:
    """The chain's probabilities that give these two shares at top-2.

    With the first choice new, which it is with 1 - same_first, the rows share an expert if the new first is the old
    second (1 in E - 1), or else if the new second is one of the old two: copied, or by chance (2 in E - 1).
    """
    others = experts - 1
    first = (same_first - 1 / experts) / (1 - 1 / experts)
    second = ((shared - same_first) / (1 - same_first) - 1 / others) * others / (others - 1)
    later = (second - 2 / others) / (1 - 2 / others)
    return max(0.0, first), max(0.0, later)  # layer 0 shares 0.4 points less than chance would, which is rounding


def _uniform(random: np.random.Generator, shape: tuple[int, ...], experts: int, top_k: int) -> Ids:
    """`top_k` different experts per row, in random order."""
    rows = np.empty((*shape, top_k), np.int16)
    for choice in range(top_k):
        rows[..., choice] = _outside(random, rows[..., :choice], experts)
    return rows


def _outside(random: np.random.Generator, taken: Ids, experts: int) -> Ids:
    """One expert per row, uniform over those that are not in `taken` [..., n], whose entries are distinct."""
    count = taken.shape[-1]
    drawn = random.integers(0, experts - count, taken.shape[:-1], dtype=np.int16)
    ordered = np.sort(taken, axis=-1)
    for position in range(count):  # ascending, so that each step passes one taken id
        drawn += drawn >= ordered[..., position]
    return drawn


def _among(random: np.random.Generator, before: Ids, taken: Ids) -> Ids:
    """One expert per row of `before` [L, K], uniform over those that are not in `taken` [L, n], n < K."""
    free = (before[:, :, None] != taken[:, None, :]).all(axis=-1)
    chosen = np.where(free, random.random(before.shape), -1.0).argmax(axis=-1)
    return np.take_along_axis(before, chosen[:, None], axis=-1)[:, 0]


def _check_shape(layers: int, experts: int, top_k: int, tokens: int) -> None:
    if min(layers, top_k, tokens) < 1 or not top_k <= experts <= np.iinfo(np.int16).max:
        raise UsageError(
            f"no routes of {tokens} tokens, {layers} layers, top-{top_k} of {experts} experts: all are 1 or more, "
            f"top-k is at most the experts, and these at most {np.iinfo(np.int16).max}"
        )
