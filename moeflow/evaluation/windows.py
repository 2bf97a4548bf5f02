"""Cuts a text into the windows of the sliding-window protocol, as Hugging Face documents it for perplexity.

Windows of `context` tokens start `stride` tokens apart. The first counts every token but the very first, which nothing
predicts; each later one counts only the tokens that no window before it had, so a token has at least `context - stride`
tokens before it, save near the start. Where stride equals context windows share nothing, and each one's first token is
not predicted: that is the cheapest form, and the one that papers of quantization use. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeflow.errors import UsageError

__all__ = ["Window", "check", "passes", "scored", "windows"]


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` (exclusive) of the text, of which those from `first` on are predicted and counted."""

    begin: int
    end: int
    first: int


def windows(count: int, context: int, stride: int) -> Iterator[Window]:
    """The windows of a text of `count` tokens; every token but an uncovered first one is counted exactly once.

    Raises:
        UsageError: the text has fewer than two tokens, or context and stride do not fit each other.
    """
    check(count, context, stride)
    return _windows(count, context, stride)


def check(count: int, context: int, stride: int) -> None:
    """What `windows` refuses, before work is begun."""
    if context < 2:
        raise UsageError(f"context is {context}; a window has 2 tokens or more: one to read, one to predict")
    if not 1 <= stride <= context:
        raise UsageError(f"stride is {stride}; it is from 1 to the context, {context}: a larger one skips tokens")
    if count < 2:
        raise UsageError(f"the text has {count} tokens; it takes 2 or more: one to read, one to predict")


def _windows(count: int, context: int, stride: int) -> Iterator[Window]:
    covered = 0
    for begin in range(0, count, stride):
        end = min(begin + context, count)
        first = max(covered, begin + 1)
        if first < end:
            yield Window(begin, end, first)
        covered = end
        if end == count:
            return


def passes(begin: int, end: int, first: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Tokens `begin` to `end` (exclusive) in passes of at most `size`, to predict those from `first` on.

    Returns:
        Of each pass its begin, its end, and after how many of its last tokens logits are wanted.
    """
    for start in range(begin, end, size):
        stop = min(start + size, end)
        yield start, stop, max(0, stop + 1 - max(start + 1, first))


def scored(count: int, context: int, stride: int) -> int:
    """How many tokens are counted in all."""
    return sum(window.end - window.first for window in windows(count, context, stride))
