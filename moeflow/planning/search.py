"""autotune: chooses bits, cache, guesses and tiers for a model on a machine, by predicted speed and by memory.

Every combination of bits of experts and attention is planned with guesses and without, and the better of both stands
for it. Candidates go from the best quality to the smallest; quality is the order in which hqq's errors grow, no
evaluation of the model. The first that fits in memory and reaches the asked speed is taken, else the fastest that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.errors import CapacityError, MoeflowError, UsageError
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import DenseScheme, HardwareProfile, HqqScheme, Plan, Prefetch, Profile, Quantization, Scheme

__all__ = ["ATTENTION", "Candidate", "EXPERTS", "candidates", "choose", "runners_up"]

EXPERTS: tuple[HqqScheme, ...] = (
    HqqScheme(bits=8, group_size=64),
    HqqScheme(bits=4, group_size=64),
    HqqScheme(bits=3, group_size=64),
    HqqScheme(bits=2, group_size=16, metadata_bits=8),
    HqqScheme(bits=2, group_size=64),
)
ENOUGH = 4  # bits of experts: more gain 0.09 in perplexity (paper, table 1) for twice the bytes; they can be asked for
ATTENTION: tuple[Scheme, ...] = (DenseScheme(), HqqScheme(bits=4, group_size=64))


@dataclass(frozen=True)
class Candidate:
    """One choice and what it leads to."""

    profile: Profile
    expert_nbytes: int
    plan: Plan | None
    refusal: str = ""
    """Why there is no plan."""
    other: float = 0.0
    """Tokens/s without guesses where the profile has some, or with where it has none; 0 where that does not fit."""

    @property
    def tokens_per_second(self) -> float:
        """As predicted; 0 without a plan, or where the machine's rates are not known."""
        return self.plan.prediction.tokens_per_second if self.plan and self.plan.prediction else 0.0

    @property
    def in_memory(self) -> bool:
        """Whether no expert is left on the disk."""
        return self.plan is not None and not self.plan.disk_nbytes


def candidates(checkpoint: Checkpoint, base: Profile, hardware: HardwareProfile, min_bits: int = 2) -> list[Candidate]:
    """All choices for `base`, best quality first.

    Args:
        checkpoint: names and shapes are enough.
        base: whatever it fixes beside quantization and guesses stays: memory, context, policy.
        hardware: the machine.
        min_bits: the least that experts may have.

    Raises:
        UsageError: no choice has as many bits.
    """
    wanted = [experts for experts in EXPERTS if min_bits <= experts.bits <= max(ENOUGH, min_bits)]
    if not wanted:
        known = ", ".join(dict.fromkeys(str(experts.bits) for experts in EXPERTS))
        raise UsageError(f"no choice has {min_bits} bits exactly; experts may have {known}")
    return [
        _candidate(checkpoint, base, hardware, Quantization(experts=experts, attention=attention))
        for experts, attention in product(wanted, ATTENTION)
    ]


def _candidate(
    checkpoint: Checkpoint, base: Profile, hardware: HardwareProfile, quantization: Quantization
) -> Candidate:
    """With guesses or without, whichever is faster; without where it makes no difference."""
    sizes = ModelSizes.of_checkpoint(checkpoint, quantization)
    asked = base.model_copy(update={"quantization": quantization})
    quiet = asked.model_copy(update={"prefetch": Prefetch(predictor="none", depth=0)})
    found = [_planned(profile, sizes, hardware) for profile in dict.fromkeys((quiet, asked))]
    best = max(found, key=lambda candidate: (candidate.in_memory, candidate.tokens_per_second))
    other = next((c.tokens_per_second for c in found if c is not best), 0.0)
    return Candidate(best.profile, best.expert_nbytes, best.plan, best.refusal, other)


def _planned(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile) -> Candidate:
    try:
        return Candidate(profile, sizes.expert_nbytes, make_plan(profile, sizes, hardware))
    except MoeflowError as refusal:
        return Candidate(profile, sizes.expert_nbytes, None, str(refusal))


def choose(found: list[Candidate], min_speed: float) -> Candidate:
    """The first candidate that fits in memory and reaches `min_speed` tokens/s, else the fastest that fits.

    Raises:
        CapacityError: none fits; the message says what the smallest would need.
    """
    fitting = [c for c in found if c.plan]
    if not fitting:
        raise CapacityError(f"no quantization makes the model fit; the smallest: {found[-1].refusal}")
    in_memory = [c for c in fitting if c.in_memory] or fitting
    fast = (c for c in in_memory if c.tokens_per_second >= min_speed)
    return next(fast, max(in_memory, key=lambda c: c.tokens_per_second))


def runners_up(found: list[Candidate], chosen: Candidate, count: int = 3) -> list[Candidate]:
    """The next best that fit: those in memory first, then the faster ones."""
    rank: Callable[[Candidate], tuple[bool, float]] = lambda c: (c.in_memory, c.tokens_per_second)  # noqa: E731
    return sorted((c for c in found if c.plan and c is not chosen), key=rank, reverse=True)[:count]
