"""Decoding ahead: the order of passes and readings, and values written to the host by a kernel."""

from __future__ import annotations

import pytest
import torch

from moeflow.decoding import Choice, decode
from moeflow.kernels.publish import UNREAD, Publisher

emulator = pytest.importorskip("emulator.launcher")


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_choices_come_in_order(ahead: bool, most: int) -> None:
    happened: list[str] = []

    def choice(value: int) -> Choice:
        def read() -> int:
            happened.append(f"read {value}")
            return value

        return Choice(torch.tensor([value]), read)

    def advance(previous: Choice) -> Choice:
        value = int(previous.token) + 1
        happened.append(f"pass {value}")
        return choice(value)

    found = [c.read() for c in decode(advance, choice(0), most, ahead)]
    assert found == list(range(1, most + 1))
    assert sorted(happened) == sorted([f"{what} {i}" for i in found for what in ("pass", "read")])
    for i in found[:-1]:
        assert (happened.index(f"pass {i + 1}") < happened.index(f"read {i}")) == ahead


def test_a_choice_is_read_once() -> None:
    values = iter([7])
    choice = Choice(torch.tensor([7]), lambda: next(values))
    assert choice.read() == choice.read() == 7


@pytest.mark.skipif(not emulator.available(), reason="no g++")
def test_values_are_published() -> None:
    publish = Publisher(emulator.EmulatedLauncher("random"), torch.device("cpu"))
    for count in (1, 700, 3, 1024):
        values = torch.randint(-(2**62), 2**62, (count // 2 + 1, 2))
        assert publish(values) == values.flatten().tolist()
        assert publish(values.int()) == values.int().flatten().tolist()
    sent = [publish.send(torch.tensor([i])) for i in range(UNREAD)]
    assert [read() for read in sent] == list(range(UNREAD))
