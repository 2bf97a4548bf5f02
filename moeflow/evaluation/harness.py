"""moeflow as a model of EleutherAI's lm-evaluation-harness (`lm_eval`), under the name `moeflow`.

Importing this module registers it, and needs the library; nothing else of moeflow imports it but `evaluation.tasks`,
which runs tasks. What lm_eval documents is followed where there is a choice: how texts are tokenized, which token
stands before an empty context, windows of a long text, what is cut. Requests run one at a time (`scoring`); batch sizes
are not used. As a program, `python -m moeflow.evaluation.harness`, it is lm_eval's own command line with this model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moeflow import pipeline
from moeflow.engine import Engine
from moeflow.errors import UsageError
from moeflow.evaluation.scoring import Scorer

__all__ = ["MoeflowLM"]

MAX_NEW_TOKENS = 256  # where a task says nothing, as in lm_eval's own models
SAMPLING = ("temperature", "top_k", "top_p")
STOPPING = ("do_sample", "until", "max_gen_toks")

Report = Callable[[str, int, int], None]


@register_model("moeflow")
class MoeflowLM(TemplateLM):  # type: ignore[misc]
    """A packed model as lm_eval sees it."""

    def __init__(
        self,
        artifact: str | Path | Engine,
        seed: int = 1234,
        report: Report = lambda _what, _done, _total: None,
        batch_size: int | str = 1,  # noqa: ARG002  lm_eval passes these three to every model
        max_batch_size: int | None = None,  # noqa: ARG002
        device: str | None = None,  # noqa: ARG002
        **overrides: Any,
    ):
        """From a directory, or from an engine that is loaded and stays open.

        Args:
            artifact: what `moeflow pack` wrote.
            seed: of sampled answers; each request has its own, which follows from this one and its place.
            report: told what runs, how many requests are done, of how many.
            batch_size: not used, as `max_batch_size`.
            max_batch_size: not used.
            device: not used: the plan says it.
            **overrides: as in `moeflow.load`, such as context_length.
        """
        super().__init__()
        self.engine = artifact if isinstance(artifact, Engine) else pipeline.load(artifact, **overrides)
        self.scorer = Scorer(self.engine)
        self.tokenizer = self.engine.tokenizer
        self._seed = seed
        self._report = report

    @property
    def max_length(self) -> int:
        """Tokens of a request, at most."""
        return self.scorer.limit

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or the one that begins it where there is no other."""
        found = self.tokenizer.eos_token_id
        found = self.tokenizer.bos_token_id if found is None else found
        if found is None:
            raise UsageError(
                f"{self.engine.artifact.directory}: the tokenizer names no token that begins or ends a text; this task "
                "needs one to stand before its texts: set bos_token or eos_token in tokenizer_config.json"
            )
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests: the model's source, and its template may differ from one to another."""
        return self.engine.artifact.manifest.model.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with the tokens that the tokenizer puts before one, unless it has them already."""
        if add_special_tokens is None:
            begun = self.tokenizer.bos_token_id is not None and has_bos_prefix(string, self.tokenizer.bos_token)
            add_special_tokens = not begun
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for a chat; without `add_generation_prompt` its last message is to be continued."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of continuations, each after its context: nats, and whether it is what greedy decoding gives."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = self.scorer.score([request[1:] for request in requests], self._told("log-likelihoods"))
        found = [(score.likelihood, score.greedy) for score in scores]
        for (texts, *_ids), one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, one)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Of whole texts, in lm_eval's windows: each as long as the context, none overlapping another but the last."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += map(make_disjoint_window, cut)
            owners += [place] * (len(windows) - len(owners))
        found = [0.0] * len(requests)
        for place, score in zip(owners, self.scorer.score(windows, self._told("windows of texts")), strict=True):
            found[place] += score.likelihood
        for request, nats in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Answers, each up to its first stop sequence. In the order of their prompts, which may share a beginning."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        told, found = self._told("answers"), [""] * len(requests)
        for done, place in enumerate(sorted(range(len(requests)), key=prompts.__getitem__), start=1):
            _, asked = requests[place].args
            found[place] = self._answer(prompts[place], asked, self._seed + place)
            self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
            told(done, len(requests))
        return found

    def _answer(self, prompt: list[int], asked: dict[str, Any], seed: int) -> str:
        settings = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
        if unknown := [name for name in settings if name not in (*SAMPLING, *STOPPING)]:
            raise UsageError(
                f"the task asks for generation with {', '.join(unknown)}; moeflow knows {', '.join(SAMPLING)}, until "
                "and max_gen_toks"
            )
        sampling = {name: settings.get(name) for name in SAMPLING} if settings["do_sample"] else {"temperature": 0.0}
        return self.scorer.answer(prompt, int(settings["max_gen_toks"]), settings["until"], seed, **sampling)

    def _told(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._report(what, done, total)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
