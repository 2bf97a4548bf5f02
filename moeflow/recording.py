"""Routes of a loaded model as a trace file: of an answer while it is generated, or of a text that is read through.

Holds expert ids and the model's name, no tokens and no text. Where routes are noted is the business of
`model.recorder`, the file's format that of `offload.trace`.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeflow.errors import UsageError
from moeflow.files import storage_errors
from moeflow.offload.trace import Routes, Trace, save_trace
from moeflow.planning.planner import PREFILL_CHUNK

if TYPE_CHECKING:
    from moeflow.engine import Engine
    from moeflow.model.recorder import RouteRecorder

__all__ = ["check_writable", "read_through", "recording", "text_ids", "trace_text"]


def check_writable(path: Path) -> None:
    """Whether a trace can be written there, before long work.

    Raises:
        StorageError: not; the message says why.
    """
    with storage_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def recording(engine: Engine, path: str | Path) -> Iterator[None]:
    """Write the routes of every token that goes through the model inside, once the block has ended without an error.

    They are those of the prompt and of the answer, less its last token, which no pass follows, and less the end-of-text
    token; what a session holds already does not go through the model again. The trace says how many tokens came before
    the answer: of several answers, before the last; without any, none.

    Args:
        engine: loaded with `record_routes=True`.
        path: of the trace, .npz by custom.

    Raises:
        UsageError: the engine was loaded to record nothing, or nothing was run.
        StorageError: the file cannot be written; said at the start where it is known by then.
    """
    target, recorder, before = Path(path), _recorder(engine), engine.stats
    check_writable(target)
    recorder.start()
    try:
        yield
        routes = recorder.take()
    finally:
        recorder.stop()
    prompt, stats = 0, engine.stats
    if stats is not before:
        prompt = len(routes) - stats.decode_steps
        # A device that runs ahead makes passes for the token that ends the text.
        routes = routes[: prompt + min(stats.decode_steps, stats.new_tokens)]
    save_trace(target, _trace(engine, routes, prompt))


def trace_text(
    engine: Engine,
    text: str,
    tokens: int | None = None,
    chunk: int = PREFILL_CHUNK,
    report: Callable[[int, int], None] | None = None,
) -> Trace:
    """The routes of a text that is given to the model, not written by it.

    Args:
        engine: loaded with `record_routes=True`.
        text: what is longer than the context is read in pieces of it, each as if nothing came before.
        tokens: only the first so many.
        chunk: tokens in one pass; a pass is faster the more it has.
        report: told after every pass how many tokens of how many were run.

    Raises:
        UsageError: the text is empty or shorter than `tokens`, or the engine was loaded to record nothing.
    """
    recorder = _recorder(engine)
    ids = text_ids(engine, text, tokens)
    found: list[Routes] = []
    recorder.start()
    try:
        for done in read_through(engine, ids, chunk):
            found.append(recorder.take())
            if report is not None:
                report(done, len(ids))
    finally:
        recorder.stop()
    return _trace(engine, np.concatenate(found), 0)


def text_ids(engine: Engine, text: str, tokens: int | None = None) -> list[int]:
    """A text's token ids, or the first `tokens` of them.

    Raises:
        UsageError: the text is empty or shorter than `tokens`.
    """
    ids: list[int] = engine.tokenizer(text, verbose=False)["input_ids"] if text else []
    if not ids:
        raise UsageError("the text is empty; give at least one token")
    if tokens is not None and not 1 <= tokens <= len(ids):
        raise UsageError(f"tokens is {tokens}; the text has {len(ids)}")
    return ids[:tokens]


def read_through(engine: Engine, ids: Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[int]:
    """Let the model read tokens, `chunk` in one pass; yields after every pass how many were read.

    Those beyond the plan's context are read in pieces of it, each as if nothing came before.
    """
    if chunk < 1:
        raise UsageError(f"chunk is {chunk}; it is 1 or more")
    for start in range(0, len(ids), engine.plan.context_length):
        end = min(len(ids), start + engine.plan.context_length)
        cache = engine.new_cache()
        for place in range(start, end, chunk):
            after = min(place + chunk, end)
            engine.forward(ids[place:after], cache, last=1)
            yield after


def _recorder(engine: Engine) -> RouteRecorder:
    if engine.recorder is None:
        raise UsageError("this engine records no routes; load the artifact with record_routes=True")
    return engine.recorder


def _trace(engine: Engine, routes: Routes, prompt: int) -> Trace:
    if not len(routes):
        raise UsageError("no token went through the model, so there is nothing to write")
    manifest = engine.artifact.manifest
    source = manifest.model.source
    name = Path(source).name if Path(source).is_absolute() else source  # whose directories is nobody's business
    return Trace(routes, max(layer.experts for layer in manifest.layers), name, prompt)
