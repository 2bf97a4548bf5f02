"""N-gram baselines that a trained model must beat: a smoothed unigram and a Kneser-Ney 5-gram.

What: held-out negative log-likelihood of both, over the same tokens and the same split as the model's.
Why so: a perplexity says nothing alone. Modified interpolated Kneser-Ney (Chen and Goodman 1999) is the
strongest plain n-gram smoothing, so the comparison flatters nobody. Token ids fit 12 bits, so a whole
5-gram packs into one 64-bit integer and counting is a sort: seconds and no further dependency.
What it does not do: prune, tune on held-out text, or serve as a general n-gram library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS = 12
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def unigram_nll(train: Ints, heldout: Ints, vocabulary: int) -> Floats:
    """Nats per held-out token under add-one smoothed unigram frequencies."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return np.asarray(-np.log(counts / counts.sum())[heldout])


def pack(tokens: Ints, order: int) -> Ints:
    """The n-gram ending at each position, the last token in the lowest bits; zeros before the start."""
    packed = np.zeros(len(tokens), dtype=np.int64)
    for distance in range(order):
        packed[distance:] |= tokens[: len(tokens) - distance] << (BITS * distance)
    return packed


def find(keys: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Index of each wanted key in the sorted `keys`, and whether it is there."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return index, keys[index] == wanted


def discounts(counts: Ints) -> Floats:
    """The three Chen-Goodman discounts, for counts of one, two, and three or more."""
    n1, n2, n3, n4 = (max(int((counts == k).sum()), 1) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    values = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.clip(np.array(values), 0.0, [0.0, 1.0, 2.0, 3.0])


@dataclass(frozen=True)
class Level:
    """One order: sorted n-grams with discounted counts, sorted contexts with totals and back-off mass."""

    keys: Ints
    reduced: Floats
    contexts: Ints
    totals: Floats
    backoff: Floats

    @classmethod
    def build(cls, keys: Ints, counts: Ints) -> Level:
        discount = discounts(counts)[np.minimum(counts, 3)]
        contexts, starts = np.unique(keys >> BITS, return_index=True)
        totals = np.add.reduceat(counts, starts).astype(np.float64)
        mass = np.add.reduceat(discount, starts) / totals
        return cls(keys, counts - discount, contexts, totals, mass)

    def apply(self, wanted: Ints, lower: Floats) -> Floats:
        """P(last token | context), interpolated with `lower`; an unseen context leaves `lower` as it is."""
        position, known = find(self.contexts, wanted >> BITS)
        index, seen = find(self.keys, wanted)
        own = np.where(seen, self.reduced[index], 0.0) / self.totals[position]
        return np.where(known, own + self.backoff[position] * lower, lower)


class KneserNey:
    """Modified interpolated Kneser-Ney model of fixed order."""

    def __init__(self, train: Ints, vocabulary: int, order: int = 5) -> None:
        if vocabulary > 1 << BITS or order * BITS > 63:
            raise ValueError(f"{order}-grams over {vocabulary} tokens do not pack into 63 bits")
        self.vocabulary = vocabulary
        self.levels: list[Level] = []
        keys, counts = np.unique(pack(train, order), return_counts=True)
        for length in range(order, 0, -1):
            self.levels.insert(0, Level.build(keys, counts))
            # Below the top, an n-gram counts the distinct tokens seen before it, not its occurrences.
            keys, counts = np.unique(keys & ((1 << BITS * (length - 1)) - 1), return_counts=True)

    def probabilities(self, packed: Ints) -> Floats:
        """P(last token | the four before it) for n-grams as made by `pack`."""
        result = np.full(len(packed), 1.0 / self.vocabulary)
        for length, level in enumerate(self.levels, 1):
            result = level.apply(packed & ((1 << BITS * length) - 1), result)
        return result

    def nll(self, heldout: Ints) -> Floats:
        """Nats per held-out token."""
        return np.asarray(-np.log(self.probabilities(pack(heldout, len(self.levels)))))
