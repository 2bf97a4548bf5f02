"""Reading ahead and writing behind: in order, no further than allowed, and no error lost."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from moeflow.artifact.overlap import Task, WriteBehind, read_ahead


class _Bytes:
    """Can be referred to weakly."""


def _tasks(count: int, run: Callable[[int], object], nbytes: int = 10) -> list[Task[object]]:
    return [Task(nbytes, lambda i=i: run(i)) for i in range(count)]


@pytest.mark.parametrize("most", [0, 10, 35, 1000])
def test_results_come_in_order(most: int) -> None:
    with read_ahead(_tasks(20, lambda i: i), most) as results:
        assert list(results) == list(range(20))


def test_no_more_waits_than_allowed() -> None:
    """Two tasks of 10 bytes fit 25 beside the one that is asked for; the next begins when that is handed over."""
    begun: list[int] = []
    with read_ahead(_tasks(20, begun.append), 25) as results:
        for number, _ in enumerate(results):
            assert len(begun) <= number + 3
    assert begun == list(range(20))


def test_what_was_handed_over_is_not_kept() -> None:
    with read_ahead(_tasks(3, lambda _: _Bytes()), 100) as results:
        kept = weakref.ref(next(results))
        gc.collect()
        assert kept() is None


def test_a_failed_task_raises_in_its_place_and_an_early_end_stops() -> None:
    error = KeyError("three")

    def run(i: int) -> int:
        if i == 3:
            raise error
        return i

    found = []
    with pytest.raises(KeyError) as caught, read_ahead(_tasks(1000, run), 100) as results:
        found.extend(results)
    assert found in ([], [0, 1, 2])  # extend keeps what came before an error, or nothing
    assert caught.value is error
    before = threading.active_count()
    begun: list[int] = []
    with read_ahead(_tasks(1000, begun.append), 20) as results:
        next(results)
    assert len(begun) <= 4
    assert threading.active_count() <= before


def test_a_write_runs_beside_its_caller_and_one_at_a_time() -> None:
    go, written = threading.Event(), []
    with WriteBehind() as behind:
        behind.submit(lambda: (go.wait(10), written.append(0)))
        assert written == []
        go.set()
        for i in range(1, 20):
            behind.submit(lambda i=i: written.append(i))
            assert written[:i] == list(range(i)), "the write before has ended"
    assert written == list(range(20))


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_is_raised_by_the_next_or_at_the_end(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught, WriteBehind() as behind:
        behind.submit(fail)
        behind.submit(lambda: pytest.fail("nothing is written after an error"))
    assert caught.value is error
    with pytest.raises(type(error)) as caught, WriteBehind() as behind:
        behind.submit(fail)
    assert caught.value is error
