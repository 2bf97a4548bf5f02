"""How well packed models do: `moeflow eval` on one text by one protocol, or a grid of such, or on tasks of lm_eval.

Sums and counts are stored; perplexity, means and bits a weight follow by properties, so that no two figures of a
document can disagree. Likelihoods are in nats. Sizes are whole bytes and leave nothing out: scales, zeros and padding
count as weights do.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from moeflow.schema.base import Document, Part
from moeflow.schema.benchmark import Environment

__all__ = [
    "Divergence", "Evaluated", "Evaluation", "Measured", "TaskEvaluation", "TaskProtocol", "TaskScore", "TasksDone",
    "TextProtocol",
]  # fmt: skip

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TextProtocol(Part):
    """The text, and how it is cut into windows."""

    text: str
    """A file's name, or a data set's."""
    digest: str
    """SHA-256 of the token ids, as decimal numbers with a space between: the same text by the same tokenizer."""
    tokens: int = Field(ge=2)
    """Of the text."""
    scored: Positive
    """Tokens predicted: all but those with which a window starts that overlaps none before it."""
    context: int = Field(ge=2)
    """Tokens of a window."""
    stride: Positive
    """Tokens from a window's start to the next one's."""


class Divergence(Part):
    """How far the predictions lie from the unquantized model's, over the same tokens as the likelihood."""

    kl: Amount
    """Sum of KL(unquantized || this model) over the tokens, in nats."""
    agreed: Count
    """Tokens for which both models hold the same one likeliest."""


class Measured(Part):
    """One packed model, and what running it took."""

    experts: str
    """The quantization's label, such as `2-bit g16 meta8`."""
    attention: str
    quantization: str
    """In words, with every other role and override."""
    expert_nbytes: Positive
    """All experts, with scales, zeros and padding."""
    expert_parameters: Positive
    nbytes: Positive
    """All weights: every data file of the artifact in full."""
    parameters: Positive
    device: str
    dtype: str
    """In which activations are computed."""
    computed: Positive
    """Tokens that went through the model: windows overlap, requests share beginnings."""
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """In the model's passes, loading and scoring left out."""

    @property
    def expert_bits(self) -> float:
        """Bits a weight of the experts, with everything that is stored for them."""
        return 8 * self.expert_nbytes / self.expert_parameters

    @property
    def bits(self) -> float:
        """Bits a weight of the whole model."""
        return 8 * self.nbytes / self.parameters

    @property
    def tokens_per_second(self) -> float:
        """Of the passes: many tokens at once, as in prefill, save where a task has answers written."""
        return self.computed / self.seconds


class Evaluated(Measured):
    """One packed model and how it predicted the text."""

    nll: Amount
    """Sum of the negative log-likelihood of the scored tokens, in nats."""
    divergence: Divergence | None = None
    """None where there was nothing to compare with."""


class _Run(Document):
    """What ran, when, where, and of which model."""

    command: str
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    """UTC, such as 2026-11-23T14:05:00Z."""
    environment: Environment
    model: str
    """As its profile named it."""
    source_digest: str
    """Of the checkpoint, as in the manifest."""


class Evaluation(_Run):
    """One text, one protocol, one or more packings of one model."""

    kind: ClassVar[str] = "evaluation"

    protocol: TextProtocol
    rows: tuple[Evaluated, ...] = Field(min_length=1)

    def perplexity(self, row: Evaluated) -> float:
        """Of a token; infinite where it is more than a number can say."""
        mean = row.nll / self.protocol.scored
        return math.exp(mean) if mean < 700 else math.inf

    def mean_kl(self, row: Evaluated) -> float | None:
        """Nats a token."""
        return row.divergence.kl / self.protocol.scored if row.divergence else None

    def agreement(self, row: Evaluated) -> float | None:
        """Share of tokens."""
        return row.divergence.agreed / self.protocol.scored if row.divergence else None


class TaskProtocol(Part):
    """Which tasks were asked for, and how."""

    names: tuple[str, ...] = Field(min_length=1)
    """Of tasks, groups or tags, as lm_eval knows them."""
    harness: str
    """lm_eval's version."""
    limit: Positive | None
    """Questions of each task, at most; None is all."""
    shots: Count | None
    """Examples before each question; None leaves it to the task."""
    chat: bool
    """Whether prompts went through the model's chat template."""
    context: Positive
    """Tokens of a request, at most."""


class TaskScore(Part):
    """One metric of one task or group."""

    task: str
    depth: Count
    """0 for what stands alone or on top, 1 for the members of that group, and so on."""
    metric: str
    filter: str
    """What is done to answers before they are counted; `none` is nothing."""
    value: Annotated[float, Field(allow_inf_nan=False)] | None
    """None where it is no number."""
    stderr: Annotated[float, Field(allow_inf_nan=False)] | None
    """None where lm_eval gives none."""
    higher_is_better: bool | None
    samples: Positive
    """Questions, or texts."""
    shots: Count | None
    """None for a group whose members differ or do not say."""
    version: str | None
    """Of the task's definition."""


class TasksDone(Measured):
    """One packed model and its scores."""

    requests: Positive
    """Continuations, windows of texts, and answers."""
    truncated: Count
    """Requests that lost the beginning of their context, for lack of room."""
    tokens: Positive
    """Of all requests, each by itself; fewer are computed, since what they share is computed once."""
    scores: tuple[TaskScore, ...] = Field(min_length=1)


class TaskEvaluation(_Run):
    """Some tasks of lm_eval, one or more packings of one model."""

    kind: ClassVar[str] = "task evaluation"

    tasks: TaskProtocol
    rows: tuple[TasksDone, ...] = Field(min_length=1)
