"""Which known machine is nearest to one, and in what the two differ.

The GPU's name and compute capability come first, since they decide which kernels run; numbers (memory, its rate, the
link) only order what these leave. A laptop's GPU shares the digits of a desktop's and little else, so that no number
brings the two together. Whoever asks is told what differs: some boards of one name exist with half of the memory. It
measures nothing and reads no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moeflow.schema import HardwareProfile
from moeflow.schema.units import format_rate, format_size

__all__ = ["Finding", "Sought", "nearest"]

BRANDS = {"nvidia", "geforce", "tesla"}  # in front of a name only
LAPTOPS = {"mobile", "notebook"}  # as people write what drivers call a laptop GPU
SIZE = re.compile(r"\b(\d+)\s*gi?b\b")


@dataclass(frozen=True)
class Sought:
    """What is known of a machine; None is not known, and a machine without GPU has all of a GPU's values None."""

    name: str | None = None
    compute_capability: str | None = None
    memory: int | None = None
    memory_bandwidth: int | None = None
    link: int | None = None
    cores: int | None = None
    ram: int | None = None

    @classmethod
    def of(cls, profile: HardwareProfile) -> Sought:
        """A whole profile."""
        gpu = profile.gpu
        return cls(
            name=gpu.name if gpu else None,
            compute_capability=gpu.compute_capability if gpu else None,
            memory=gpu.memory if gpu else None,
            memory_bandwidth=gpu.memory_bandwidth if gpu else None,
            link=profile.link.host_to_device,
            cores=profile.cpu.cores,
            ram=profile.ram,
        )

    @classmethod
    def named(cls, name: str, memory: int | None = None, compute_capability: str | None = None) -> Sought:
        """A GPU as a driver or a person names it; a size in the name counts where no other is given."""
        size = SIZE.search(name.lower())
        return cls(name, compute_capability, memory or (int(size[1]) << 30 if size else None))

    @property
    def has_gpu(self) -> bool:
        """Whether anything of a GPU is known."""
        return any(v is not None for v in (self.name, self.compute_capability, self.memory, self.memory_bandwidth))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; sizes in bytes, rates in bytes a second."""
        return asdict(self)


@dataclass(frozen=True)
class _Number:
    """A value that two machines are compared by."""

    key: str
    label: str
    written: Callable[[float], str]
    tolerance: float
    """Of the known machine's value: labels and drivers differ a little, peaks and measured rates more."""


NUMBERS = (
    _Number("memory", "memory", format_size, 0.1),
    _Number("memory_bandwidth", "memory rate", format_rate, 0.25),
    _Number("link", "link", format_rate, 0.25),
    _Number("cores", "CPU cores", str, 0),
    _Number("ram", "RAM", format_size, 0.1),
)
OF_GPU, OF_HOST = {"memory", "memory_bandwidth", "link"}, {"link", "cores", "ram"}


@dataclass(frozen=True)
class _Compared:
    """One value on both sides, as text; `here` is None where it is not known."""

    label: str
    here: str | None
    there: str | None
    equal: bool


@dataclass(frozen=True)
class Finding:
    """A known machine beside the sought one. The texts are for people."""

    profile: HardwareProfile
    kind: Literal["same", "variant", "nearest"]
    """The same GPU; its name with another memory or compute capability; another one."""
    same: tuple[str, ...]
    differs: tuple[str, ...]
    unknown: tuple[str, ...]
    """What the sought machine's side does not say."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the profile by its name."""
        texts = {key: list(getattr(self, key)) for key in ("same", "differs", "unknown")}
        return {"profile": self.profile.name, "kind": self.kind, **texts}


def nearest(sought: Sought, known: Iterable[HardwareProfile]) -> list[Finding]:
    """The profiles that resemble `sought`, nearest first; none if nothing but a name is known and it resembles none.

    A machine without GPU is compared with others without; the same GPU beats any other, and numbers decide the rest.
    """
    alike = [profile for profile in known if (profile.gpu is not None) == sought.has_gpu]
    ranked = sorted(alike, key=lambda profile: _order(sought, Sought.of(profile)))
    if sought.has_gpu and sought.compute_capability is None and sought.memory is None:
        ranked = [profile for profile in ranked if _likeness(sought.name, Sought.of(profile).name)]
    return [_finding(sought, profile) for profile in ranked]


def _order(sought: Sought, other: Sought) -> tuple[bool, bool, bool, float, float, float]:
    """Sorts the nearest first; boards of one name by their memory alone, which is what sets them apart."""
    named = _words(sought.name) == _words(other.name)
    return (
        not named,
        sought.compute_capability not in (None, other.compute_capability),
        sought.name is not None and _is_laptop(sought.name) != _is_laptop(other.name),
        _distance(sought, other, {"memory"}) if named else 0.0,
        _distance(sought, other, OF_GPU if sought.has_gpu else OF_HOST),
        -_likeness(sought.name, other.name),
    )


def _distance(sought: Sought, other: Sought, counted: set[str]) -> float:
    """In doublings, summed over what both sides know."""
    pairs = [(getattr(sought, key), getattr(other, key)) for key in counted]
    return sum(abs(math.log2(here / there)) for here, there in pairs if here and there)


def _finding(sought: Sought, profile: HardwareProfile) -> Finding:
    compared = _compared(sought, Sought.of(profile))
    unequal = {c.label for c in compared if c.here is not None and not c.equal}
    kind: Literal["same", "variant", "nearest"] = "nearest"
    if sought.name and "name" not in unequal:
        kind = "variant" if unequal & {"memory", "compute capability"} else "same"
    return Finding(
        profile,
        kind,
        same=tuple(c.label for c in compared if c.equal),
        differs=tuple(f"{c.label} is {c.here}, in the file {c.there}" for c in compared if c.label in unequal),
        unknown=tuple(c.label for c in compared if c.here is None),
    )


def _compared(sought: Sought, other: Sought) -> list[_Compared]:
    """Everything that the known machine says, beside the sought one's."""
    found = []
    if sought.has_gpu:
        found.append(_Compared("name", sought.name, other.name, _words(sought.name) == _words(other.name)))
        if sought.name and _is_laptop(sought.name) != _is_laptop(other.name):
            mine, theirs = ("a laptop's" if _is_laptop(side.name) else "not a laptop's" for side in (sought, other))
            found.append(_Compared("form", mine, theirs, equal=False))
        here, there = sought.compute_capability, other.compute_capability
        found.append(_Compared("compute capability", here, there, here == there))
    for number in NUMBERS:
        value, known = getattr(sought, number.key), getattr(other, number.key)
        if known is not None:
            equal = value is not None and abs(value - known) <= number.tolerance * known
            written = None if value is None else number.written(value)
            found.append(_Compared(number.label, written, number.written(known), equal))
    return found


def _words(gpu: str | None) -> tuple[str, ...]:
    """The words of a GPU's name in lower case, without brand in front, sizes such as 80GB, and the word GPU."""
    text = re.sub(r"\b(rtx|gtx)(\d)", r"\1 \2", SIZE.sub(" ", (gpu or "").lower()))
    words = ["laptop" if word in LAPTOPS else word for word in re.findall(r"[a-z0-9]+", text) if word != "gpu"]
    while words and words[0] in BRANDS:
        words.pop(0)
    return tuple(words)


def _is_laptop(gpu: str | None) -> bool:
    return "laptop" in _words(gpu)


def _likeness(one: str | None, other: str | None) -> float:
    """Shared words of two names, as a share of all; 0 without a shared number: `RTX` alone says nothing."""
    mine, theirs = set(_words(one)), set(_words(other))
    shared = mine & theirs
    return len(shared) / len(mine | theirs) if any(re.search(r"\d", word) for word in shared) else 0.0
