"""Text to token ids and back, by the model's own tokenizer.

Knows nothing of logits or sampling; a stream of ids comes in, pieces of text go out as soon as they are whole
characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from moeflow.errors import UsageError

__all__ = ["TextCodec"]


class TextCodec:
    """The tokenizer in an artifact's directory, loaded when it is first used."""

    def __init__(self, directory: Path):
        self._directory = directory

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._directory)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`.

        Raises:
            UsageError: it holds what is no Unicode text, as a shell may pass it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the prompt is not text: character {error.start} is not valid UTF-8") from error
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]  # whether they fit is for callers to say
        return ids

    def conversation(self, messages: Sequence[dict[str, str]], limit: int) -> list[int]:
        """Ids of a chat by the model's template, or of its messages as running text where it has none.

        The oldest turns are left out as far as needed for the ids to be at most `limit`.
        """
        kept = list(messages)
        while len(ids := self._conversation(kept)) > limit and len(kept) > 2:
            kept = kept[2:]
        return ids

    def _conversation(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.encode("\n".join(message["content"] for message in messages) + "\n")
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return ids

    def pieces(self, prompt: list[int], tokens: Iterable[int]) -> Iterator[tuple[int | None, str]]:
        """Ids and the text each completes; the last pair may be text alone, of an unfinished character."""
        from tokenizers.decoders import DecodeStream

        # begun with the prompt, since some tokenizers drop a space that stands first
        decoder = DecodeStream(ids=prompt, skip_special_tokens=True)
        waiting: list[int] = []
        for token in tokens:
            waiting.append(token)
            piece = decoder.step(self.tokenizer.backend_tokenizer, token)
            if piece:
                waiting.clear()
            yield token, piece or ""
        if waiting:
            yield None, self.tokenizer.decode(waiting, skip_special_tokens=True)
