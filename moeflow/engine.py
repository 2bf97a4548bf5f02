"""The stage generate: an artifact and a plan in, logits and text out.

Loading, text, sampling and errors; how a pass is carried out is the business of `model.execution`. Without a
GPU slots in host memory stand for the device's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from moeflow.artifact.reader import Artifact
from moeflow.assembly import Parts, assemble
from moeflow.decoding import Choice
from moeflow.errors import CapacityError, UsageError
from moeflow.generation import Generation, Sampler, Session, Statistics, TokenStream
from moeflow.kernels.launcher import Launcher
from moeflow.model.execution import DeviceExecution
from moeflow.model.kv import KvCache
from moeflow.model.memory import device_of, refusal, release_memory
from moeflow.model.recorder import RouteRecorder
from moeflow.model.routes import ForcedRoutes
from moeflow.offload.device import MakeMover
from moeflow.offload.link import make_link
from moeflow.offload.store import HostStore
from moeflow.offload.traffic import Traffic
from moeflow.planning.planner import PREFILL_CHUNK
from moeflow.progress import Progress, silent
from moeflow.schema import Plan
from moeflow.text import TextCodec

__all__ = ["Engine"]


class Engine:
    """A loaded model. Use as a context manager, or call `close`.

    Raises:
        ArtifactError: a file is damaged.
        CapacityError: memory was refused.
        DeviceError: the plan is for CUDA and there is none.
    """

    def __init__(
        self,
        artifact: Artifact,
        plan: Plan,
        progress: Progress = silent,
        launcher: Launcher | None = None,
        routes: Callable[[torch.device], ForcedRoutes] | None = None,
        store: HostStore | None = None,
        mover: MakeMover | bool = True,
        record_routes: bool = False,
    ):
        """`record_routes` is for `moeflow.recording`. For benchmarks and tests: `launcher` runs kernels in place of
        CUDA; `routes` replaces the router's choice; `store` holds the blobs already, and stays open; `mover` has
        copies brought by others than kernels, True by the copy engine."""
        self.artifact = artifact
        self.plan = plan
        self.fallback: str | None = None
        """Why the engine is host-driven although the plan is not; None where it does as planned."""
        self._carried = Traffic()
        self._own_store = store is None
        self.stats = Statistics()
        """Of the last generation."""
        self.device = device_of(plan)
        artifact.check_files()
        artifact.check_resident()
        self._text = TextCodec(artifact.directory)
        self._model: Any = None
        self._store = store or HostStore(artifact, plan.ram_experts, pin=plan.device == "cuda", progress=progress)
        self._link = make_link(self._store, self.device)
        forced = routes(self.device) if routes else None
        shape = len(artifact.manifest.layers), artifact.manifest.model.top_k
        self.recorder = RouteRecorder(*shape, self.device) if record_routes else None
        parts = Parts(artifact, plan, self._store, self._link, self.device, launcher, forced, mover, self.recorder)
        try:
            made = assemble(parts)
            self._execution, self._model, self.fallback = made.execution, made.model, made.fallback
        except torch.OutOfMemoryError as error:
            raise CapacityError(refusal(plan)) from error
        finally:
            if self._model is None:
                self._release()

    @property
    def execution(self) -> str:
        """`device-driven` or `host-driven`."""
        return "device-driven" if isinstance(self._execution, DeviceExecution) else "host-driven"

    @property
    def traffic(self) -> Traffic:
        """What the link has carried since the start, a snapshot; the last one once the engine is closed."""
        if self._model is not None:
            self._carried = self._execution.traffic.copy()
        return self._carried

    # -- tokens and logits --------------------------------------------------------------------------------

    @property
    def note(self) -> str | None:
        """What runs slower than planned, and why."""
        guessing = self.plan.strategy == "full" and self.plan.prefetch.depth > 0
        if guessing and not self.guessing:
            return "prefetch is off: this family's router cannot be applied to another layer's hidden states"
        return self.fallback or self._store.refused or self._execution.problem

    @property
    def pinned(self) -> bool:
        """Whether the experts lie in page-locked memory; where they do not, copies wait for the CPU."""
        return self._store.pinned

    @property
    def wasted_bytes(self) -> int | None:
        """Copied on guesses that were not used; None where nobody counts that."""
        return self._execution.wasted_bytes if isinstance(self._execution, DeviceExecution) else None

    @property
    def model(self) -> Any:
        """transformers' model, without its experts."""
        self._check_open()
        return self._model

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def guessing(self) -> bool:
        """Whether experts of coming layers are guessed; not every family's router can be applied out of turn."""
        return self._execution.runner.predictor is not None

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model."""
        return self._text.tokenizer

    def new_cache(self) -> KvCache:
        """An empty KV cache for `forward`. A device-driven engine has one: whoever had it before loses it."""
        return self._execution.new_kv()

    @property
    def runs_ahead(self) -> bool:
        """Whether a pass can begin on a token that the host has not read."""
        return self.execution == "device-driven" and self.device.type == "cuda"

    def choice(self, token: Tensor) -> Choice:
        """A token [1] that was chosen from logits, and will be read."""
        return Choice(token, self._execution.send(token))

    @torch.inference_mode()
    def forward(self, ids: Sequence[int] | Tensor, cache: Any, last: int = 0) -> Tensor:
        """Run tokens that follow those in `cache`, and append them to it.

        Args:
            ids: token ids; a single one may be a Tensor [1] on the engine's device.
            cache: from `new_cache`.
            last: how many positions to give logits for; 0 is all.

        Returns:
            Logits [T, V], or of the last positions, on the engine's device.
        """
        self._check_open()
        try:
            return self._execution.forward(ids, cache, last)
        except BaseException as error:  # an abandoned pass leaves copies under way and buffers without an owner
            self.empty_cache()
            if isinstance(error, torch.OutOfMemoryError):
                held = torch.cuda.memory_reserved() if self.device.type == "cuda" else 0
                raise CapacityError(refusal(self.plan, held)) from error
            raise

    def prefill(self, ids: Sequence[int], cache: Any) -> Tensor:
        """Run a prompt in chunks; returns the logits [V] after its last token."""
        logits = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits = self.forward(ids[start : start + PREFILL_CHUNK], cache, last=1)
        assert logits is not None, "an empty prompt is refused before"
        return logits[-1]

    def logits(self, text_or_ids: str | Sequence[int], chunk: int = PREFILL_CHUNK) -> Tensor:
        """Teacher-forced logits: row t is the prediction after token t.

        Args:
            text_or_ids: text, or token ids.
            chunk: tokens run at once; 1 takes the path that decoding takes.

        Returns:
            float32 [T, V] in host memory.
        """
        if chunk < 1:
            raise UsageError(f"chunk is {chunk}; it is 1 or more")
        ids = self._ids(text_or_ids, room=0)
        cache = self.new_cache()
        rows = [self.forward(ids[i : i + chunk], cache).float().cpu() for i in range(0, len(ids), chunk)]
        return torch.cat(rows)

    # -- text ---------------------------------------------------------------------------------------------

    def stream(
        self,
        text_or_ids: str | Sequence[int],
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        session: Session | None = None,
    ) -> Iterator[str]:
        """Yield the answer to what `generate` takes, piece by piece; `stats` is complete when it ends."""
        tokens = self._tokens(text_or_ids, max_new_tokens, temperature, top_k, top_p, seed, session)
        return (piece for _, piece in self._text.pieces(tokens.prompt, tokens) if piece)

    def generate(
        self,
        text_or_ids: str | Sequence[int],
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        session: Session | None = None,
    ) -> Generation:
        """Continue a prompt.

        Args:
            text_or_ids: the prompt, as text or token ids.
            max_new_tokens: upper bound; the model's end-of-text token stops earlier.
            temperature: 0 is greedy; None takes the model's own default, as for `top_k` and `top_p`.
            top_k: sample among the k likeliest.
            top_p: sample among the likeliest that together have this probability.
            seed: makes sampling repeatable.
            session: from `session()`; what the prompt shares with the tokens already in it is not computed again.

        Raises:
            UsageError: prompt and answer do not fit the context length, or a setting is out of range.
        """
        tokens = self._tokens(text_or_ids, max_new_tokens, temperature, top_k, top_p, seed, session)
        pieces = list(self._text.pieces(tokens.prompt, tokens))
        ids = tuple(token for token, _ in pieces if token is not None)
        return Generation("".join(piece for _, piece in pieces), ids, tokens.stats)

    def _tokens(
        self,
        text_or_ids: str | Sequence[int],
        max_new_tokens: int,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
        session: Session | None,
    ) -> TokenStream:
        sampler = Sampler.of(self._generation_config, temperature, top_k, top_p, seed)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}; it is 1 or more")
        ids = self._ids(text_or_ids, room=max_new_tokens)
        stream = TokenStream(self, ids, max_new_tokens, sampler, self._stop_ids, session)
        self.stats = stream.stats
        return stream

    @cached_property
    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.artifact.directory)
        except OSError:  # the file is optional
            return GenerationConfig.from_model_config(self._model.config)

    @cached_property
    def _stop_ids(self) -> set[int]:
        stop = self._generation_config.eos_token_id
        return set(stop) if isinstance(stop, list) else {stop} - {None}

    def _ids(self, text_or_ids: str | Sequence[int], room: int) -> list[int]:
        ids = self._text.encode(text_or_ids) if isinstance(text_or_ids, str) else [int(i) for i in text_or_ids]
        if not ids:
            raise UsageError("the prompt is empty; give at least one token")
        if (bad := next((i for i in ids if not 0 <= i < self.vocabulary), None)) is not None:
            raise UsageError(f"token id {bad} is outside the vocabulary of {self.vocabulary}")
        if len(ids) + room > self.plan.context_length:
            longer = self.plan.context_length < self.artifact.manifest.model.max_context
            remedy = ", or set context_length in the profile" if longer else ": the model was made for no more"
            raise UsageError(
                f"a prompt of {len(ids)} tokens and {room} new ones do not fit the context of "
                f"{self.plan.context_length}; shorten it{remedy}"
            )
        return ids

    def session(self) -> Session:
        """An empty session for `generate` and `stream`, to keep a conversation's KV cache between turns."""
        return Session(self)

    def conversation(self, messages: Sequence[dict[str, str]], room: int = 0) -> list[int]:
        """The prompt for a chat, less the oldest turns where it and `room` more tokens would not fit the context."""
        return self._text.conversation(messages, self.plan.context_length - room)

    def _check_open(self) -> None:
        if self._model is None:
            raise UsageError("the engine is closed; load the artifact again")

    def empty_cache(self) -> None:
        """Forget every cached expert, as if none had been used yet."""
        self._link.drain()
        self._execution.runner.reset()

    # -- life ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release memory and threads; calling it again does nothing."""
        if self._model is not None:
            with contextlib.suppress(RuntimeError):  # a device that failed has nothing left to say
                self._carried = self._execution.traffic.copy()
            self._release()
            self._model = None
            del self._execution
            release_memory(self.device)

    def _release(self) -> None:
        self._link.close()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels may still read the blobs
        if (execution := getattr(self, "_execution", None)) is not None:
            execution.close()
        if self._own_store:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
