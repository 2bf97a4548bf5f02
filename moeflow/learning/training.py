"""A predictor from a text: fitted to its beginning, judged on its end, the model read through once.

What it learns are habits of this model's routers on texts like this one; how far they carry to others is for the user
to judge, who can name another text. It writes no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from moeflow.artifact.predictors import Matrices, router_digest
from moeflow.errors import UsageError
from moeflow.learning.fitting import fit
from moeflow.learning.judgement import Judge
from moeflow.learning.moments import TAIL, Gate, Moments
from moeflow.model.recorder import Recorder
from moeflow.model.routers import find_routers, router_matrix
from moeflow.offload.predictor import Guesser, next_gate
from moeflow.planning.planner import PREFILL_CHUNK
from moeflow.progress import Progress, silent
from moeflow.recording import read_through, text_ids
from moeflow.schema import PredictorCard

if TYPE_CHECKING:
    from moeflow.engine import Engine

__all__ = ["DEPTH", "HELD_OUT", "LEAST", "REUSE", "judged", "train_predictor"]

DEPTH = 2
REUSE = 0.7
HELD_OUT = 0.1
LEAST = 2048
"""Tokens below which a fit says nothing."""


def train_predictor(
    engine: Engine,
    text: str,
    tokens: int | None = None,
    depth: int = DEPTH,
    reuse: float = REUSE,
    held_out: float = HELD_OUT,
    progress: Progress = silent,
) -> tuple[PredictorCard, Matrices]:
    """Fit maps from hidden states to coming uses of experts.

    Args:
        engine: loaded with `record_routes=True`.
        text: tens of thousands of tokens, like what the model shall work on.
        tokens: only the first so many.
        depth: layers ahead that are guessed.
        reuse: a use one token later counts so much less than the one before it; below 1.
        held_out: the share at the end that is not fitted to.
        progress: told of tokens.

    Raises:
        UsageError: the text is too short, a number is out of range, or the engine was loaded to record nothing.
    """
    if depth < 1 or not 0 <= reuse < 1 or not 0 < held_out < 1:
        raise UsageError(f"depth {depth}, reuse {reuse}, held-out {held_out}: 1 or more, 0 to below 1, between 0 and 1")
    ids = text_ids(engine, text, tokens)
    first = int(len(ids) * (1 - held_out)) // PREFILL_CHUNK * PREFILL_CHUNK
    if first < LEAST or len(ids) - first <= TAIL:
        raise UsageError(
            f"{len(ids):,} tokens are too few: fitting takes {LEAST:,}, and judging {held_out:.0%} of all; tens of "
            "thousands are better"
        )
    layers = engine.artifact.manifest.layers
    experts = tuple(layer.experts for layer in layers)
    depth = min(depth, len(layers) - 1)
    hidden = int(engine.model.config.get_text_config().hidden_size)
    moments = Moments(experts, hidden, depth, reuse, _place(engine, hidden), _gates(engine))
    _read(engine, ids[:first], moments, "reading", progress)
    fitted = fit(moments, progress)
    judge = judged(engine, fitted, ids[first:], _fetched(engine), progress)
    source = engine.artifact.manifest.model.source
    card = PredictorCard(
        model=Path(source).name if Path(source).is_absolute() else source,
        routers=router_digest(engine.artifact),
        hidden=hidden,
        experts=experts,
        depth=depth,
        reuse=reuse,
        tokens=moments.tokens,
        held_out=len(ids) - first,
        recalls=judge.recalls(),
        hits=judge.hits(sorted({max(1, max(experts) * part // 4) for part in (1, 2, 3)})),
    )
    return card, fitted


def judged(
    engine: Engine, matrices: Matrices, ids: Sequence[int], fetched: Sequence[int], progress: Progress = silent
) -> Judge:
    """How well maps do on tokens, beside the coming layers' own routers.

    Args:
        engine: loaded with `record_routes=True`.
        matrices: of its model.
        ids: that they were not fitted to.
        fetched: numbers of guesses, none more than a layer has experts.
        progress: told of tokens.

    Raises:
        UsageError: the engine was loaded to record nothing.
    """
    judge = Judge(_on(matrices, engine.device), _gate(engine, len(matrices.guess), max(fetched)), fetched)
    _read(engine, ids, judge, "judging", progress)
    return judge


def _read(engine: Engine, ids: Sequence[int], listener: Recorder, what: str, progress: Progress) -> None:
    if engine.recorder is None:
        raise UsageError("this engine observes nothing; load the artifact with record_routes=True")
    engine.recorder.listener = listener
    try:
        progress(what, 0, len(ids))
        for done in read_through(engine, ids):
            progress(what, done, len(ids))
    finally:
        engine.recorder.listener = None


def _fetched(engine: Engine) -> tuple[int, ...]:
    """As many as a token uses, and twice as many where that is not all."""
    manifest = engine.artifact.manifest
    least, top_k = min(layer.experts for layer in manifest.layers), manifest.model.top_k
    return tuple(count for count in (top_k, 2 * top_k) if count < least) or (least,)


def _gates(engine: Engine) -> list[Gate | None]:
    """The linear part of each layer's router, where it is one matrix."""

    def numbers(matrix: Tensor, bias: Tensor | None, hidden_states: Tensor) -> Tensor:
        return linear(hidden_states.float(), matrix.float(), None if bias is None else bias.float())

    found: list[Gate | None] = []
    for layer in engine.artifact.manifest.layers:
        own = router_matrix(engine.model.get_submodule(layer.router)) if layer.router else None
        found.append(partial(numbers, *own) if own is not None and own[0].shape[0] == layer.experts else None)
    return found


def _gate(engine: Engine, depth: int, experts: int) -> Guesser | None:
    dtype = getattr(torch, engine.plan.dtype)
    routers = find_routers(engine.model, engine.artifact.manifest.layers, experts, dtype)
    return next_gate(routers, depth) if routers else None


def _on(matrices: Matrices, device: torch.device) -> Matrices:
    guess = [[None if m is None else m.to(device) for m in row] for row in matrices.guess]
    return Matrices(guess, [m.to(device) for m in matrices.keep])


def _place(engine: Engine, hidden: int) -> torch.device:
    """The device, if the sums leave half of what is free there to passes."""
    if engine.device.type == "cuda":
        needed = len(engine.artifact.manifest.layers) * (hidden + 1) ** 2 * 4
        if 2 * needed < torch.cuda.mem_get_info(engine.device)[0]:
            return engine.device
    return torch.device("cpu")
