"""The disk's rates: what is read from it, in which order, past which cache, and when it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bandwidth import tick

from moeflow.errors import StorageError
from moeflow.probe import disk
from moeflow.probe.disk import CHUNK, DIRECT, DROPPED, disk_rates


class Calls:
    """Records what is asked of the file, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.names: list[str] = []
        self.places: list[int] = []
        for name in ("pwrite", "fdatasync", "posix_fadvise", "preadv"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            said = {os.POSIX_FADV_DONTNEED: "drop", os.POSIX_FADV_RANDOM: "nothing ahead"}
            self.names.append(said[arguments[3]] if name == "posix_fadvise" else name)  # type: ignore[index]
            if name == "preadv":
                self.places.append(arguments[2])  # type: ignore[arg-type]
            return function(*arguments)

        return call


def refuse_direct(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Be a file system that refuses direct I/O: when the flag is set, or only when it is read."""
    really = fcntl.fcntl
    direct: list[bool] = [False]

    def control(file: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL:
            direct[0] = bool(argument & os.O_DIRECT)
            if direct[0] and at == "flag":
                raise OSError(errno.EINVAL, "no")
            argument &= ~os.O_DIRECT
        return really(file, command, argument)

    read = os.preadv

    def preadv(*arguments: object) -> int:
        if direct[0]:
            raise OSError(errno.EINVAL, "no")
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "preadv", preadv)


def test_direct_reads_are_in_sequence_and_then_of_every_blob_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    told: list[tuple[str, int, int]] = []
    found = disk_rates(tmp_path, lambda *report: told.append(report), 2 * CHUNK, blob=CHUNK // 4)
    assert found.sequential.rate > 0 and found.random.rate > 0
    assert found.blob == CHUNK // 4
    assert calls.names[:5] == ["pwrite", "fdatasync"] * 2 + ["drop"]
    assert found.how in (DIRECT, DROPPED)  # as this file system has it
    _first_page, *places = calls.places
    assert places[:2] == [0, CHUNK]
    assert sorted(places[2:]) == [n * CHUNK // 4 for n in range(8)]
    assert [(done, total) for _, done, total in told] == [
        *((CHUNK * n, 2 * CHUNK) for n in (1, 2)), *((CHUNK // 4 * n, 2 * CHUNK) for n in range(1, 9)),
    ]  # fmt: skip


@pytest.mark.parametrize("at", ["flag", "read"])
def test_where_direct_reads_are_refused_the_cache_is_dropped_before_each_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    refuse_direct(monkeypatch, at)
    calls = Calls(monkeypatch)
    found = disk_rates(tmp_path, nbytes=CHUNK, blob=CHUNK)
    assert found.how == DROPPED
    first = ["preadv"] if at == "read" else []
    assert calls.names == ["pwrite", "fdatasync", "drop", *first, "preadv", "drop", "nothing ahead", "preadv"]


def test_buffers_of_direct_reads_are_whole_pages(tmp_path: Path) -> None:
    found = disk_rates(tmp_path, nbytes=CHUNK, blob=10_000)
    assert found.blob == 12_288
    assert disk_rates(tmp_path, nbytes=CHUNK, blob=100 * CHUNK).blob == CHUNK  # the file has no more


def test_bytes_of_the_disk_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # looks at the clock: the start, one before the second chunk is written; the start, one after each chunk read; again
    tick(monkeypatch, disk, [0.1, 9.0, 0.25, 0.25, 0.5, 1.0, 1.0])
    found = disk_rates(tmp_path, nbytes=2 * CHUNK, blob=CHUNK)
    assert found.sequential.rate == pytest.approx(4 * CHUNK)
    assert found.sequential.spread == 0
    assert found.random.rate == pytest.approx(CHUNK)


def test_a_slow_disk_ends_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    tick(monkeypatch, disk, [10.0])
    assert disk_rates(tmp_path, nbytes=100 * CHUNK).sequential.rate == pytest.approx(CHUNK / 10)
    assert calls.names.count("pwrite") == 1
    assert len(calls.places) == 1 + 1 + 1  # the first page, one chunk, one blob


def test_slow_reads_end_it_too_and_only_what_was_read_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    # looks at the clock: the start, before the second and third chunk written; the start, after each chunk read
    tick(monkeypatch, disk, [0.0, 0.0, 0.0, 1.5])
    found = disk_rates(tmp_path, nbytes=3 * CHUNK, blob=CHUNK)
    assert found.sequential.rate == pytest.approx(2 * CHUNK / 3)
    assert (calls.names.count("pwrite"), len(calls.places)) == (3, 1 + 2 + 2)


def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Path]] = []
    really = os.preadv

    def look(*arguments: object) -> int:
        seen.append(list(tmp_path.iterdir()))
        return really(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", look)
    disk_rates(tmp_path, nbytes=1)
    assert seen
    assert not any(seen)  # not even while it is read
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere: cannot measure the disk: no such file or directory"):
        disk_rates(tmp_path / "nowhere")
