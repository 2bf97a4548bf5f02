"""autotune: chooses bits for a model on a machine, by bounds on speed and memory.

Candidates go from the best quality to the smallest. 8 bits and none are not among them: over 4 bits the
paper's table 1 gains 0.09 in perplexity at twice the bytes or more over the link. The first candidate that
fits and whose bound reaches the asked speed is taken, else the fastest that fits.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.errors import CapacityError, MoeflowError
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import HardwareProfile, HqqScheme, Plan, Profile, Quantization

__all__ = ["Candidate", "candidates", "choose"]

EXPERTS = (HqqScheme(bits=4, group_size=64), HqqScheme(bits=3, group_size=64), HqqScheme(bits=2, group_size=64))
ATTENTION = HqqScheme(bits=4, group_size=64)


@dataclass(frozen=True)
class Candidate:
    """One choice of bits and what it leads to."""

    profile: Profile
    expert_nbytes: int
    plan: Plan | None
    refusal: str = ""
    """Why there is no plan."""

    @property
    def tokens_per_second(self) -> float:
        """The plan's bound; 0 without one."""
        return self.plan.prediction.tokens_per_second if self.plan and self.plan.prediction else 0.0


def candidates(checkpoint: Checkpoint, base: Profile, hardware: HardwareProfile) -> list[Candidate]:
    """All choices for `base`, best quality first."""
    found = []
    for experts in EXPERTS:
        quantization = Quantization(experts=experts, attention=ATTENTION)
        profile = base.model_copy(update={"quantization": quantization})
        sizes = ModelSizes.of_checkpoint(checkpoint, quantization)
        try:
            found.append(Candidate(profile, sizes.expert_nbytes, make_plan(profile, sizes, hardware)))
        except MoeflowError as refusal:
            found.append(Candidate(profile, sizes.expert_nbytes, None, str(refusal)))
    return found


def choose(found: list[Candidate], min_speed: float) -> Candidate:
    """The first candidate that fits in memory and reaches `min_speed` tokens/s, else the fastest that fits.

    Raises:
        CapacityError: none fits.
    """
    fitting = [c for c in found if c.plan]
    if not fitting:
        raise CapacityError(f"no quantization makes the model fit; the smallest: {found[-1].refusal}")
    in_memory = [c for c in fitting if c.plan and not c.plan.disk_nbytes] or fitting
    fast = (c for c in in_memory if c.tokens_per_second >= min_speed)
    return next(fast, max(in_memory, key=lambda c: c.tokens_per_second))
