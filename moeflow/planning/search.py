"""autotune: chooses bits, cache, guesses and tiers for a model on a machine, by predicted speed and by memory.

Every combination of bits of experts and attention is planned with guesses and without, and the better of both stands
for it. Candidates go from the best quality to the smallest; quality is the order in which hqq's errors grow, no
evaluation of the model. The first that fits in memory and reaches the asked speed is taken, else the fastest that fits;
where speeds differ by less than a prediction can tell, quality decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.errors import CapacityError, DocumentError, MoeflowError, UsageError
from moeflow.planning.least import least, refusals
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import DenseScheme, HardwareProfile, HqqScheme, Plan, Prefetch, Profile, Quantization, Scheme
from moeflow.schema.units import format_size

__all__ = ["ATTENTION", "Candidate", "EXPERTS", "candidates", "choose"]

EXPERTS: tuple[HqqScheme, ...] = (
    HqqScheme(bits=8, group_size=64),
    HqqScheme(bits=4, group_size=64),
    HqqScheme(bits=3, group_size=64),
    HqqScheme(bits=2, group_size=16, metadata_bits=8),
    HqqScheme(bits=2, group_size=64),
)
ENOUGH = 4  # bits of experts: more gain 0.09 in perplexity (paper, table 1) for twice the bytes; they can be asked for
ATTENTION: tuple[Scheme, ...] = (DenseScheme(), HqqScheme(bits=4, group_size=64))
SAME = 0.99  # of the fastest's speed: predictions do not tell such choices apart


@dataclass(frozen=True)
class Candidate:
    """One choice and what it leads to."""

    profile: Profile
    sizes: ModelSizes
    hardware: HardwareProfile
    plan: Plan | None = None
    error: MoeflowError | None = None
    """Why there is no plan."""
    other: float = 0.0
    """Tokens/s without guesses where the profile has some, or with where it has none; 0 where that does not fit."""

    @property
    def refusal(self) -> str:
        """Why there is no plan, in words."""
        return str(self.error or "")

    @property
    def label(self) -> str:
        """For people: `2-bit g64 experts with 4-bit g64 attention`."""
        quantization = self.profile.quantization
        return f"{quantization.experts.label} experts with {quantization.attention.label} attention"

    @property
    def expert_nbytes(self) -> int:
        """Of all experts."""
        return self.sizes.expert_nbytes

    @property
    def tokens_per_second(self) -> float:
        """As predicted; 0 without a plan, or where the machine's rates are not known."""
        return self.plan.prediction.tokens_per_second if self.plan and self.plan.prediction else 0.0

    @property
    def in_memory(self) -> bool:
        """Whether no expert is left on the disk."""
        return self.plan is not None and not self.plan.disk_nbytes


def candidates(checkpoint: Checkpoint, base: Profile, hardware: HardwareProfile, min_bits: int = 2) -> list[Candidate]:
    """All choices for `base`, best quality first; those whose groups do not fit the model's dimensions are left out.

    Args:
        checkpoint: names and shapes are enough.
        base: whatever it fixes beside quantization and guesses stays: memory, context, policy.
        hardware: the machine.
        min_bits: the least that experts may have.

    Raises:
        UsageError: no choice has as many bits.
        DocumentError: none fits the model's dimensions.
    """
    allowed = [experts for experts in EXPERTS if experts.bits >= min_bits]
    if not allowed:
        known = ", ".join(dict.fromkeys(str(experts.bits) for experts in EXPERTS))
        raise UsageError(f"no choice has {min_bits} bits or more; experts may have {known}")
    most = max(ENOUGH, min(experts.bits for experts in allowed))
    wanted = [experts for experts in allowed if experts.bits <= most]
    found, unfit = [], None
    for experts, attention in product(wanted, ATTENTION):
        try:
            found.append(_candidate(checkpoint, base, hardware, Quantization(experts=experts, attention=attention)))
        except DocumentError as error:
            unfit = error
    if unfit and not found:
        raise unfit
    return found


def _candidate(
    checkpoint: Checkpoint, base: Profile, hardware: HardwareProfile, quantization: Quantization
) -> Candidate:
    """With guesses or without, whichever is faster; without where it makes no difference, as asked if nobody knows."""
    sizes = ModelSizes.of_checkpoint(checkpoint, quantization)
    asked = base.model_copy(update={"quantization": quantization})
    quiet = asked.model_copy(update={"prefetch": Prefetch(predictor="none", depth=0)})
    found = [_planned(profile, sizes, hardware) for profile in dict.fromkeys((quiet, asked))]
    if found[-1].plan and not found[-1].plan.prediction:
        return found[-1]
    best = max(found, key=lambda candidate: (candidate.in_memory, candidate.tokens_per_second))
    return replace(best, other=next((c.tokens_per_second for c in found if c is not best), 0.0))


def _planned(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile) -> Candidate:
    try:
        return Candidate(profile, sizes, hardware, plan=make_plan(profile, sizes, hardware))
    except MoeflowError as error:
        return Candidate(profile, sizes, hardware, error=error)


def choose(found: list[Candidate], min_speed: float) -> Candidate:
    """The first candidate that fits in memory and reaches `min_speed` tokens/s, else the fastest that fits.

    Raises:
        CapacityError: none fits; the message says what the smallest needs and what there is.
        MoeflowError: whatever it is that has nothing to do with quantization.
    """
    fitting = [c for c in found if c.plan]
    if not fitting:
        raise _nothing_fits(found)
    in_memory = [c for c in fitting if c.in_memory] or fitting
    fastest = max(c.tokens_per_second for c in in_memory)
    enough = min_speed if fastest >= min_speed else SAME * fastest
    return next(c for c in in_memory if c.tokens_per_second >= enough)


def _nothing_fits(found: list[Candidate]) -> MoeflowError:
    smallest = found[-1]
    same = len({c.refusal for c in found}) < len({c.expert_nbytes for c in found})  # whatever the bits
    if smallest.error and (same or not isinstance(smallest.error, CapacityError)):
        return smallest.error
    asked = (smallest.profile, smallest.sizes, smallest.hardware)
    ram = least(*asked, "ram")
    experts = f"and {format_size(ram)} of host memory for experts" if ram else "with all experts on the disk"
    return CapacityError(
        f"no quantization makes the model fit {smallest.hardware.name}; the smallest, {smallest.label}, takes at least "
        f"{format_size(least(*asked, 'vram'))} of device memory {experts}: {'; and '.join(refusals(*asked))}"
    )
