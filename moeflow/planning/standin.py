"""What a profile that asks for `bits: auto` will weigh, before anything is measured: at most this.

Which layers or experts get which width is known once packing has measured. Together they take no more than the
budget; a stand-in that reaches it, widths dealt out in order, lets the rest of planning work on plain schemes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.planning.allocation import Ints, allocate
from moeflow.planning.bits import quantization
from moeflow.planning.blobs import Blobs
from moeflow.schema import AutoBits, HqqScheme, Profile, Scheme

__all__ = ["NOTE", "schemes_of", "stand_in"]

NOTE = "at most, for a budget of {budget:g} bits a weight: which {units} get which width is chosen while packing"


def schemes_of(asked: AutoBits) -> tuple[Scheme, ...]:
    """What may be chosen from."""
    return tuple(HqqScheme(bits=bits, group_size=asked.group_size) for bits in asked.widths)


def stand_in(checkpoint: Checkpoint, profile: Profile) -> Profile:
    """The profile with schemes in place of `bits: auto`, together as large as the budget or less than a step larger.

    Args:
        checkpoint: names and shapes are enough.
        profile: as it is where bits are said.

    Raises:
        UsageError: no choice meets the budget.
        DocumentError: no width fits the model's dimensions.
    """
    asked = profile.quantization.auto
    if asked is None:
        return profile
    blobs = Blobs.of(checkpoint, schemes_of(asked))
    room = blobs.budget(asked.budget)
    per = 1 if asked.units == "experts" else blobs.experts  # experts of a unit
    sizes = np.repeat(per * blobs.sizes, blobs.experts // per, axis=0)  # [U, S]
    bits = [float(getattr(scheme, "bits", 16)) for scheme in blobs.schemes]
    found = allocate(np.tile(4.0 ** -np.array(bits), (len(sizes), 1)), np.ones(len(sizes)), sizes, room)
    choices = _filled_up(sizes, found.choices, room)
    dealt = np.repeat(choices, per).reshape(len(blobs.layers), blobs.experts)
    chosen = profile.quantization.chosen(*quantization(blobs, dealt))
    return profile.model_copy(update={"quantization": chosen})


def _filled_up(sizes: Ints, choices: Sequence[int], room: int) -> Ints:
    """With the least step more that reaches `room`, so that no choice within it is larger."""
    found = np.array(choices)
    now = sizes[np.arange(len(found)), found]
    more = np.where(sizes - now[:, None] >= room - now.sum(), sizes - now[:, None], np.iinfo(np.int64).max)
    if now.sum() < room and more.min() < np.iinfo(np.int64).max:
        unit, choice = np.unravel_index(more.argmin(), more.shape)
        found[unit] = choice
    return found
