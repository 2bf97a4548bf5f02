"""From logits to text: sampling, stopping, streaming, and the statistics of a run.

Sampling is done by transformers' own warpers where the logits are, so that only the chosen token is read back, and on a
GPU the next pass begins before it is; a seed
repeats a text on the same kind of device. It does not know how logits are computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from moeflow.decoding import Choice, decode
from moeflow.errors import UsageError
from moeflow.offload.traffic import Traffic

if TYPE_CHECKING:
    from moeflow.engine import Engine

__all__ = ["Generation", "Passes", "Sampler", "Session", "Statistics", "TokenStream"]


COLDEST = 1e-5  # below this temperature scores overflow float32, and the likeliest token is certain anyway


@dataclass
class Statistics:
    """What one generation took; filled as it goes."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    time_to_first_token: float = 0.0
    """Seconds of prefill and the first choice."""
    decode_steps: int = 0
    """Passes after prefill: one for each token but the first, and for the end-of-text token if it came; where the
    device runs ahead, also the one after that."""
    decode_seconds: float = 0.0
    """Seconds of these passes and the choices after them, not of whoever consumes the tokens; where the device runs
    ahead, by its clock."""
    prefill: Traffic = field(default_factory=Traffic)
    decode: Traffic = field(default_factory=Traffic)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed; 0 until there is a second token."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Over the link, per decoded token."""
        return self.decode.moved_bytes / self.decode_steps if self.decode_steps else 0.0

    @property
    def computed_per_token(self) -> float:
        """Bytes of weights that the CPU multiplied where they lay, per decoded token."""
        return self.decode.computed_bytes / self.decode_steps if self.decode_steps else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, derived figures too, for `--json`."""
        derived = {
            "tokens_per_second": self.tokens_per_second,
            "hit_rate": self.decode.hit_rate,
            "bytes_per_token": self.bytes_per_token,
            "computed_per_token": self.computed_per_token,
        }
        return {**asdict(self), **derived}


@dataclass(frozen=True)
class Generation:
    """A finished answer. `str()` gives its text."""

    text: str
    ids: tuple[int, ...]
    stats: Statistics

    def __str__(self) -> str:
        return self.text


class Sampler:
    """Chooses the next token: greedily at temperature 0, else by temperature, top-k and top-p."""

    def __init__(
        self, temperature: float, top_k: int | None = None, top_p: float | None = None, seed: int | None = None
    ):
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        if not math.isfinite(temperature) or temperature < 0:
            raise UsageError(f"temperature is {temperature}; it is 0 (greedy) or more")
        if top_k is not None and top_k < 0:
            raise UsageError(f"top_k is {top_k}; it is 1 or more, or 0 for all tokens")
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise UsageError(f"seed is {seed}; it fits 64 bits")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"top_p is {top_p}; it lies above 0 and is at most 1")
        self.greedy = temperature < COLDEST
        self._warpers = LogitsProcessorList()
        if not self.greedy and temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        self._seed = seed
        self._random: torch.Generator | None = None

    @classmethod
    def of(
        cls, defaults: Any, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
    ) -> Self:
        """With a model's own settings (transformers' GenerationConfig) where None is given."""
        if temperature is None:
            temperature = (defaults.temperature or 1.0) if defaults.do_sample else 0.0
        if defaults.do_sample:
            top_k = defaults.top_k if top_k is None else top_k
            top_p = defaults.top_p if top_p is None else top_p
        return cls(temperature, top_k, top_p, seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose from logits [V]; int64 [1], where they are."""
        if self.greedy:
            return logits.argmax(dim=-1, keepdim=True)
        if self._random is None or self._random.device != logits.device:
            self._random = torch.Generator(logits.device)
            if self._seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(self._seed)
        scores = self._warpers(None, logits.float().unsqueeze(0))
        return torch.multinomial(scores.softmax(-1), 1, generator=self._random).view(1)


class Session:
    """A KV cache and the tokens in it, so that a conversation is not computed anew at every turn."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._ids: list[int | Choice] = []  # choices: perhaps not read yet
        self._cache = engine.new_cache()

    def _renew(self) -> None:
        """Start with an empty cache, for lack of one that still holds the tokens."""
        self._ids, self._cache = [], self._engine.new_cache()

    def settle(self) -> list[int]:
        """The tokens in the cache; waits for those that nobody has read."""
        ids = [entry.read() if isinstance(entry, Choice) else entry for entry in self._ids]
        self._ids = list(ids)
        return ids

    def prefill(self, prompt: list[int]) -> Tensor:
        """Logits [V] after `prompt`, computing only what differs from the tokens already there."""
        return self.extend(prompt[self.keep(prompt, len(prompt) - 1) :], self._engine.prefill)

    def keep(self, prompt: Sequence[int], most: int) -> int:
        """Forget all tokens but those that `prompt` begins with, and of these all but `most`; how many are left."""
        if self._cache.stale:
            self._renew()
        ids = self.settle()
        kept = 0
        while kept < min(len(ids), most) and ids[kept] == prompt[kept]:
            kept += 1
        if self._cache.crop(kept):
            del self._ids[kept:]
            return kept
        self._renew()
        return 0

    def step(self, token: int | Choice) -> Tensor:
        """Logits [V] after one more token."""
        if self._cache.stale:  # another session was begun on this engine meanwhile
            ids = [*self.settle(), token.read() if isinstance(token, Choice) else token]
            self._renew()
            return self.extend(ids, self._engine.prefill)
        given = token.token if isinstance(token, Choice) else [token]
        return self.extend([token], lambda _, cache: self._engine.forward(given, cache)[-1])

    def extend(self, ids: Sequence[int | Choice], compute: Callable[[Any, Any], Tensor]) -> Tensor:
        """What `compute` returns for `ids` and the cache, to which it appends them."""
        try:
            logits = compute(ids, self._cache)
        except BaseException:  # some layers may hold the tokens and some not
            self._renew()
            raise
        self._ids += ids
        return logits


class TokenStream:
    """One generation as an iterator over token ids; `stats` is complete when it ends."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        max_new_tokens: int,
        sampler: Sampler,
        stop: set[int],
        session: Session | None = None,
    ):
        self.stats = Statistics(prompt_tokens=len(prompt))
        self._engine = engine
        self._session = session or Session(engine)
        self.prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._sampler = sampler
        self._stop = stop

    def __iter__(self) -> Iterator[int]:
        """Yield ids as they are chosen, the stop token not included."""
        stats, engine = self.stats, self._engine
        before = engine.traffic
        begin = time.perf_counter()
        choice = engine.choice(self._sampler(self._session.prefill(self.prompt)))
        token = choice.read()
        stats.time_to_first_token = time.perf_counter() - begin
        after = engine.traffic
        stats.prefill = after.since(before)
        passes = Passes(engine, self._session, self._sampler)
        following = decode(passes.advance, choice, self._max_new_tokens - 1, passes.ahead)
        try:
            while token not in self._stop:
                stats.new_tokens += 1
                yield token
                if stats.new_tokens == self._max_new_tokens:
                    return
                with passes.waiting():
                    token = next(following).read()
        finally:  # once, at the end: asking a device for its counters in between would hold it up
            self._session.settle()
            stats.decode_steps, stats.decode_seconds = passes.count, passes.seconds()
            stats.decode = engine.traffic.since(after)


class Passes:
    """Decoding passes of one session, counted and timed."""

    def __init__(self, engine: Engine, session: Session, sampler: Sampler):
        self._engine = engine
        self._session = session
        self._sampler = sampler
        self._waited = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._last: Choice | None = None
        self.ahead = engine.runs_ahead
        """Whether a pass begins before the token that it is for is read."""
        self._timed = self.ahead and engine.device.type == "cuda"
        self.count = 0

    def advance(self, choice: Choice) -> Choice:
        """A pass over a choice, to the next one."""
        begin = self._mark()
        token = self._sampler(self._session.step(choice))
        self.count += 1
        if begin is not None and (end := self._mark()) is not None:
            self._marks.append((begin, end))
        self._last = self._engine.choice(token)
        return self._last

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time of passes is spent inside, where the device does not measure it."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def seconds(self) -> float:
        """Of all passes; waits for them to end."""
        if self._last is not None:
            self._last.read()
        if not self._timed:
            return self._waited
        return sum(begin.elapsed_time(end) for begin, end in self._marks) / 1e3

    def _mark(self) -> torch.cuda.Event | None:
        if not self._timed:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
