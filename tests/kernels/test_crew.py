"""The crew: whoever computes which rows, products are those of one thread, and threads end when they are told to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gemv_checks import matrix_of, random_pool

from moeflow.errors import DeviceError
from moeflow.kernels import crew as crew_module
from moeflow.kernels.cpu import CpuGemv
from moeflow.kernels.crew import Crew, processors
from moeflow.kernels.library import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason="no library")


@pytest.fixture(params=[1, 2, 5])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    made = Crew(request.param)
    yield made
    made.close()


def test_products_are_those_of_one_thread(crew: Crew) -> None:
    """Jobs of several matrices at once, of sizes that one thread does alone and that all share; again and again."""
    for name in ("hqq 2 64", "hqq 4 16", "int8"):
        matrix = matrix_of(name, random.randint(1500, 3000), 512)
        gemv, pool = CpuGemv(matrix), random_pool(matrix, 3)
        for _ in range(20):
            count = random.randint(1, 3)
            x = [gemv.prepare(torch.randn(random.randint(1, 3), 512)) for _ in range(count)]
            begins = [random.choice([0, 0, random.randint(0, matrix.rows)]) for _ in range(count)]
            out = [torch.full((v.struct.count, matrix.rows), -1.0) for v in x]
            crew.run([gemv.job(pool[i], x[i], out[i], begins[i]) for i in range(count)])
            for i in range(count):
                expected = gemv.multiply(pool[i], x[i], begins[i], out=torch.full_like(out[i], -1.0))
                assert torch.equal(out[i], expected)


def test_a_crew_that_slept_wakes() -> None:
    matrix = matrix_of("hqq 4 64", 4096, 1024)
    gemv, pool = CpuGemv(matrix), random_pool(matrix, 1)
    x = gemv.prepare(torch.randn(1, 1024))
    expected = gemv.multiply(pool[0], x)
    crew = Crew(3)
    for pause in (0.0, 0.001, 0.05, 0.3, 0.0):
        time.sleep(pause)
        out = torch.zeros(1, matrix.rows)
        crew.run([gemv.job(pool[0], x, out)])
        assert torch.equal(out, expected)
    crew.close()
    crew.close()


def test_sleeping_threads_take_no_time() -> None:
    crew = Crew(3)
    time.sleep(0.1)
    before = os.times()
    time.sleep(0.5)
    after = os.times()
    crew.close()
    assert after.user + after.system - before.user - before.system < 0.25


def tasks() -> int:
    """The process's threads, as the system counts them."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_threads_begin_and_end() -> None:
    before = threading.active_count(), tasks()
    crews = [Crew(4) for _ in range(3)]
    assert tasks() == before[1] + 9
    for crew in crews:
        crew.close()
    assert tasks() == before[1]
    assert threading.active_count() == before[0]


def test_a_system_that_gives_fewer_threads_is_an_error() -> None:
    with pytest.raises(DeviceError, match="no crew of 100000 threads: they are more than 1024"):
        Crew(100_000)


def test_processors_are_those_that_this_process_may_use() -> None:
    """Cores first, then their second threads; none twice, and None where they do not suffice."""
    allowed = sorted(os.sched_getaffinity(0))
    found = processors(len(allowed))
    assert found is not None and sorted(found) == allowed
    assert processors(len(allowed) + 1) is None
    assert processors(len(allowed), spare=1) is None
    os.sched_setaffinity(0, allowed[:1])
    try:
        assert processors(1) == allowed[:1] and processors(2) is None
    finally:
        os.sched_setaffinity(0, allowed)


def test_second_threads_of_cores_come_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu in range(6):
        place = tmp_path / f"cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{cpu % 3},{cpu % 3 + 3}\n")
    monkeypatch.setattr(crew_module, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    assert processors(6) == [0, 1, 2, 3, 4, 5]
    assert processors(2, spare=1) == [1, 2]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 4})
    assert processors(3) == [0, 4, 3]


INTERRUPTED = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests in the background ignores it
sys.path.insert(0, {tests!r})
from gemv_checks import matrix_of, random_pool
from moeflow.kernels.cpu import CpuGemv
from moeflow.kernels.crew import Crew
matrix = matrix_of("hqq 4 64", 4096, 1024)
gemv, pool = CpuGemv(matrix), random_pool(matrix, 1)
x, out, crew = gemv.prepare(torch.randn(1, 1024)), torch.zeros(1, matrix.rows), Crew(3)
try:
    print("begun", flush=True)
    while True:
        crew.run([gemv.job(pool[0], x, out)])
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_an_interruption_ends_the_process_while_threads_wait() -> None:
    tests = Path(__file__).resolve().parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.format(tests=str(tests))], stdout=subprocess.PIPE, text=True,
        cwd=tests.parent, env={**os.environ, "PYTHONPATH": str(tests.parent)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGINT)
    try:
        output, _ = child.communicate(timeout=30)
    finally:
        child.kill()
    assert output == "interrupted\n" and child.returncode == 0
