"""Log-likelihoods of continuations, and answers, with what requests share computed once.

Requests are run in the order of their contexts' tokens, so that examples which stand before many questions stay in the
KV cache; the choices of one question share its context and the logits after it, so that a choice of one token costs no
pass. Offloaded models run one sequence at a time, and this is what they gain in place of batches. It knows token ids
and an engine, and no task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.engine import Engine
from moeflow.errors import UsageError
from moeflow.evaluation.quality import ROWS
from moeflow.evaluation.windows import passes
from moeflow.generation import Session
from moeflow.planning.planner import PREFILL_CHUNK

__all__ = ["Score", "Scorer", "Tally"]

Report = Callable[[int, int], None]
Ids = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Score:
    """Of one continuation."""

    likelihood: float
    """Sum of the log-likelihood of its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest where it stands."""


@dataclass
class Tally:
    """What requests took; filled as they run."""

    requests: int = 0
    truncated: int = 0
    """Requests that lost the beginning of their context, for lack of room."""
    tokens: int = 0
    """That would have been computed, had each request been run by itself."""
    computed: int = 0
    seconds: float = 0.0
    """In the model's passes."""


class Scorer:
    """An engine, and the session in which its requests run."""

    def __init__(self, engine: Engine):
        self.session = Session(engine)
        self.limit = engine.plan.context_length
        """Tokens that go through the model in one request, at most."""
        self.tally = Tally()
        self._engine = engine

    def score(self, requests: Sequence[Request], report: Report = lambda _done, _total: None) -> list[Score]:
        """The score of each request, in their order.

        Args:
            requests: token ids of a context and of its continuation, one or more of each. What is too long for the
                model loses the beginning of its context.
            report: told how many requests are done, of how many.

        Raises:
            UsageError: a context or continuation is empty, or a continuation is longer than the model's context.
        """
        groups: dict[Ids, dict[Ids, list[int]]] = {}
        for place, request in enumerate(requests):
            context, continuation = self._cut(*request)
            groups.setdefault(context, {}).setdefault(continuation, []).append(place)
        found: dict[int, Score] = {}
        for context in sorted(groups):
            for continuation, score in self._group(context, list(groups[context])):
                found |= dict.fromkeys(groups[context][continuation], score)
                report(len(found), len(requests))
        return [found[place] for place in range(len(requests))]

    def answer(
        self, prompt: Sequence[int], count: int, stop: Sequence[str], seed: int, **sampling: float | None
    ) -> str:
        """What the model writes after a prompt, up to a stop sequence.

        Args:
            prompt: token ids; they lose their beginning where they and the answer do not fit the model's context.
            count: tokens of the answer, at most.
            stop: texts before the first of which the answer ends; empty ones end none.
            seed: makes sampling repeatable.
            **sampling: temperature, top_k and top_p as in `Engine.generate`.

        Raises:
            UsageError: the answer leaves no room for a prompt, or the prompt is empty.
        """
        room = self.limit - count
        if room < 1:
            raise UsageError(
                f"the task asks for answers of up to {count} tokens, which leaves no room for a question in a context "
                f"of {self.limit}; load the model for a longer one"
            )
        kept, stops = list(prompt)[-room:], [text for text in stop if text]
        begin = time.perf_counter()
        computed = len(kept) - self.session.keep(kept, len(kept) - 1)
        pieces = self._engine.stream(kept, count, seed=seed, session=self.session, **sampling)  # type: ignore[arg-type]
        text = ""
        for piece in pieces:
            text += piece
            if any(one in text for one in stops):
                break
        pieces.close()  # type: ignore[attr-defined]  # a generator: its statistics are complete when it ends
        steps = self._engine.stats.decode_steps
        self.tally.seconds += time.perf_counter() - begin
        self.tally.requests += 1
        self.tally.truncated += len(prompt) > room
        self.tally.tokens += len(kept) + steps
        self.tally.computed += computed + steps
        for one in stops:
            text = text.partition(one)[0]
        return text

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Ids, Ids]:
        if not context or not continuation:
            raise UsageError("a request has a context and a continuation of one token or more")
        if len(continuation) > self.limit:
            raise UsageError(
                f"a continuation of {len(continuation)} tokens does not fit the context of {self.limit}; "
                "load the model for a longer one"
            )
        room = self.limit + 1 - len(continuation)  # the last token predicts nothing and is not run
        self.tally.requests += 1
        self.tally.truncated += len(context) > room
        kept = tuple(context)[-room:]
        self.tally.tokens += len(kept) + len(continuation) - 1
        return kept, tuple(continuation)

    def _group(self, context: Ids, continuations: Sequence[Ids]) -> Iterator[tuple[Ids, Score]]:
        """Continuations of one context, each with its score. The first pass brings the logits for all first tokens."""
        head: Tensor | None = None
        for continuation in continuations:
            likelihood, greedy, place = 0.0, True, 0
            if head is not None:
                likelihood, greedy = _add(head, continuation[:1])
                place = 1
            for rows in self._rows((*context, *continuation), len(context) + place):
                head = rows[:1].clone() if head is None else head
                nats, likeliest = _add(rows, continuation[place : place + len(rows)])
                likelihood, greedy, place = likelihood + nats, greedy and likeliest, place + len(rows)
            yield continuation, Score(likelihood, greedy)

    def _rows(self, ids: Ids, first: int) -> Iterator[Tensor]:
        """Logits [n, V] for the tokens from `first` on, pass by pass."""
        if first == len(ids):
            return
        kept = self.session.keep(ids, first - 1)
        for start, stop, wanted in passes(kept, len(ids) - 1, first, PREFILL_CHUNK):
            begin = time.perf_counter()
            logits = self.session.extend(ids[start:stop], _forward(self._engine, max(1, wanted))).float().cpu()
            self.tally.seconds += time.perf_counter() - begin
            self.tally.computed += stop - start
            if wanted:
                yield logits


def _forward(engine: Engine, last: int) -> Callable[[Sequence[int], object], Tensor]:
    return lambda ids, cache: engine.forward(ids, cache, last=last)


def _add(rows: Tensor, targets: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of targets [n] under logits [n, V], and whether each is the likeliest."""
    wanted = torch.tensor(targets)
    total = 0.0
    for part, ids in zip(rows.split(ROWS), wanted.split(ROWS), strict=True):
        total += float(part.double().log_softmax(-1).gather(1, ids[:, None]).sum())
    return total, bool(torch.equal(rows.argmax(-1), wanted))
