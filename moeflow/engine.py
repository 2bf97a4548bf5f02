"""The stage generate: an artifact and a plan in, logits and text out.

This is the host-driven path: Python reads the router's choice of every layer, fetches through the cache, and
computes. It runs on any device, the CPU included, where slots in host memory stand for a GPU's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from moeflow.artifact.reader import Artifact
from moeflow.errors import CapacityError, DeviceError, UsageError
from moeflow.generation import Generation, Sampler, Session, Statistics, TokenStream
from moeflow.model.build import build_model
from moeflow.model.experts import ExpertRunner
from moeflow.offload.cache import ExpertCache
from moeflow.offload.link import make_link
from moeflow.offload.store import HostStore
from moeflow.offload.stream import LayerStream
from moeflow.offload.traffic import Traffic
from moeflow.planning.planner import PREFILL_CHUNK
from moeflow.progress import Progress, silent
from moeflow.schema import Plan
from moeflow.schema.units import format_size
from moeflow.text import TextCodec

__all__ = ["Engine"]


class Engine:
    """A loaded model. Use as a context manager, or call `close`.

    Raises:
        ArtifactError: a file is damaged.
        CapacityError: memory was refused.
        DeviceError: the plan is for CUDA and there is none.
    """

    def __init__(self, artifact: Artifact, plan: Plan, progress: Progress = silent):
        self.artifact = artifact
        self.plan = plan
        self.traffic = Traffic()
        self.stats = Statistics()
        """Of the last generation."""
        self.device = _device(plan)
        artifact.check_files()
        self._text = TextCodec(artifact.directory)
        self._model: Any = None
        self._store = HostStore(artifact, plan.ram_experts, pin=plan.device == "cuda", progress=progress)
        self._link = make_link(self._store, self.device)
        try:
            self._model = self._build()
        except torch.OutOfMemoryError as error:
            raise CapacityError(_out_of_memory(plan)) from error
        finally:
            if self._model is None:
                self._link.close()
                self._store.close()

    def _build(self) -> Any:
        manifest, plan = self.artifact.manifest, self.plan
        cache = ExpertCache(manifest, plan, self._link, self.device, self.traffic)
        stream = LayerStream(manifest, self._link, self.device, self.traffic) if plan.stream_layers else None
        self._runner = ExpertRunner(manifest, plan, cache, stream, getattr(torch, plan.dtype))
        return build_model(self.artifact, plan, self._runner, self.device)

    # -- tokens and logits --------------------------------------------------------------------------------

    @property
    def pinned(self) -> bool:
        """Whether the experts lie in page-locked memory; where they do not, copies wait for the CPU."""
        return self._store.pinned

    @property
    def guessing(self) -> bool:
        """Whether experts of coming layers are guessed; not every family's router can be applied out of turn."""
        return self._runner.predictor is not None

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model."""
        return self._text.tokenizer

    def new_cache(self) -> Any:
        """An empty KV cache for `forward`."""
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], cache: Any, last: int = 0) -> Tensor:
        """Run tokens that follow those in `cache`, and append them to it.

        Args:
            ids: token ids.
            cache: from `new_cache`.
            last: how many positions to give logits for; 0 is all.

        Returns:
            Logits [T, V], or of the last positions, on the engine's device.
        """
        self._check_open()
        inputs = torch.tensor([list(ids)], device=self.device)
        pieces = inputs.split(1, dim=1) if self._stepwise and cache.get_seq_length() else [inputs]
        try:
            rows = [
                self._model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=last).logits[0]
                for piece in pieces
            ]
        except BaseException as error:  # an abandoned pass leaves copies under way and buffers without an owner
            self._link.drain()
            self._runner.reset()
            if isinstance(error, torch.OutOfMemoryError):
                raise CapacityError(_out_of_memory(self.plan)) from error
            raise
        return rows[0] if len(rows) == 1 else torch.cat(rows)[-last:]

    @cached_property
    def _stepwise(self) -> bool:
        """Whether tokens that follow others go one by one: transformers' Mamba scans of several start from nothing."""
        config = self._model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
        return not {"mamba", "mamba2", "linear_attention", "recurrent"}.isdisjoint(kinds)

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
        """Yield the answer piece by piece; `stats` is complete when it ends.

        Arguments are those of `generate`.
        """
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
        defaults = self._generation_config
        if temperature is None:
            temperature = (defaults.temperature or 1.0) if defaults.do_sample else 0.0
        sampler = Sampler(
            temperature,
            defaults.top_k if top_k is None and defaults.do_sample else top_k,
            defaults.top_p if top_p is None and defaults.do_sample else top_p,
            seed,
        )
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
        self._check_open()
        vocabulary = self._model.config.get_text_config().vocab_size
        if (bad := next((i for i in ids if not 0 <= i < vocabulary), None)) is not None:
            raise UsageError(f"token id {bad} is outside the vocabulary of {vocabulary}")
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

    # -- life ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release memory and threads; calling it again does nothing."""
        if self._model is not None:
            self._link.close()
            self._store.close()
            self._model = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _out_of_memory(plan: Plan) -> str:
    free = f"{format_size(torch.cuda.mem_get_info()[0])} free now, " if torch.cuda.is_available() else ""
    return (
        f"device memory was refused: the plan for {plan.hardware} takes {format_size(plan.memory.total)}, {free}"
        f"of which {format_size(plan.memory.slots)} for {max(plan.cache_slots)} experts per layer; end other programs "
        "that use the device, or lower memory.vram, cache.experts_per_layer or context_length"
    )


def _device(plan: Plan) -> torch.device:
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"the plan is for CUDA ({plan.hardware}), and torch finds no CUDA device here; "
            "plan for this machine with hardware=auto (`--hardware auto`)"
        )
    return torch.device(plan.device)
