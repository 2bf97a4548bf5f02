"""The trace file: what is written comes back, what is damaged is refused with its place, and nothing in it can run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeflow.errors import DocumentError, StorageError
from moeflow.offload.routing import recorded, uniform
from moeflow.offload.trace import Trace, load_trace, save_trace

TRACE = Trace(uniform(3, 8, 2, 20, seed=1), experts=8, model="größer/tiny-mixtral")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_trace(tmp_path / "routes.npz", TRACE)
    return tmp_path / "routes.npz"


def rewrite(path: Path, **changes: Any) -> None:
    """Replace or (with None) drop arrays of a trace."""
    with np.load(path, allow_pickle=False) as archive:
        content = {**{key: archive[key] for key in archive.files}, **changes}
    with path.open("wb") as stream:
        np.savez_compressed(stream, **{key: value for key, value in content.items() if value is not None})


def test_a_trace_comes_back(path: Path) -> None:
    found = load_trace(path)
    assert (found.routes == TRACE.routes).all() and found.routes.dtype == np.int16
    assert (found.experts, found.model) == (8, "größer/tiny-mixtral")
    assert (recorded(path) == TRACE.routes).all()


def test_any_numpy_reads_it(path: Path) -> None:
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive.files) == ["experts", "format_version", "model", "routes"]
        assert archive["routes"].shape == (20, 3, 2) and archive["experts"] == 8 and archive["format_version"] == 1


def test_an_hour_of_tokens_is_a_small_file(tmp_path: Path) -> None:
    save_trace(tmp_path / "t.npz", Trace(uniform(32, 8, 2, 5000, seed=2), 8, "m"))
    assert (tmp_path / "t.npz").stat().st_size < 0.6 * 5000 * 32 * 2 * 2  # three bits of sixteen say something


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routes": None}, "not a trace of routes: it has no routes"),
        ({"model": None, "experts": None}, "it has no experts, model"),
        ({"format_version": np.int64(2)}, "format_version is 2; this moeflow reads trace 1: upgrade moeflow"),
        ({"format_version": np.int64(0)}, "format_version is 0; this moeflow reads trace 1: record it again"),
        ({"format_version": np.float64(1)}, r"format_version is float64 \[\]; a whole number is expected"),
        ({"experts": np.array([8])}, r"experts is int64 \[1\]; a whole number is expected"),
        ({"model": np.int64(3)}, r"model is int64 \[\]; text is expected"),
        ({"routes": TRACE.routes.astype(np.int64)}, r"routes is int64 \[20, 3, 2\]; int16"),
        ({"routes": TRACE.routes[0]}, r"routes is int16 \[3, 2\]; int16 \[tokens, layers, top_k\]"),
        ({"routes": TRACE.routes[:0]}, r"routes is int16 \[0, 3, 2\]; .* none of them 0"),
        ({"experts": np.int64(2)}, r"expert ids lie outside 0 to 1"),
        ({"routes": np.array([[[0, 1]], [[3, 3]]], np.int16)}, r"token 1, layer 0: an expert is named twice: \[3, 3\]"),
        ({"routes": np.array([[[0, -1]]], np.int16)}, r"token 0, layer 0: expert ids lie outside 0 to 7: \[0, -1\]"),
        ({"routes": np.array([[[0, 8]]], np.int16)}, r"token 0, layer 0: expert ids lie outside 0 to 7: \[0, 8\]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_trace_that_breaks_a_rule_is_refused(path: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(path, **changes)
    with pytest.raises(DocumentError, match=message) as caught:
        load_trace(path)
    assert str(path) in str(caught.value)


def test_a_trace_that_breaks_a_rule_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="outside 0 to 3"):
        save_trace(tmp_path / "t.npz", Trace(TRACE.routes, 4, "m"))
    assert not list(tmp_path.iterdir())


def test_objects_are_not_unpickled(path: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    rewrite(path, routes=np.array([Bomb()], dtype=object))
    with pytest.raises(DocumentError, match="damaged, or not a trace"):
        load_trace(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"tokens: 3\n", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(DocumentError, match="damaged, or not a trace of routes"):
        load_trace(tmp_path / "t.npz")


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "t.npz").open("wb") as stream:
        np.save(stream, TRACE.routes)
    with pytest.raises(DocumentError, match="damaged, or not a trace of routes"):
        load_trace(tmp_path / "t.npz")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read: no such file"):
        load_trace(tmp_path / "none.npz")


def test_damage_never_gives_other_routes(path: Path) -> None:
    """Truncated anywhere or with any byte changed, a trace is refused or as it was."""
    whole = path.read_bytes()
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    damaged = [whole[:cut] for cut in draw.sample(range(len(whole)), 100)]
    for place in draw.sample(range(len(whole)), 400):
        damaged.append(whole[:place] + bytes([whole[place] ^ draw.randrange(1, 256)]) + whole[place + 1 :])
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = load_trace(path)
        except DocumentError:
            refused += 1
        else:
            assert (found.routes == TRACE.routes).all() and found.experts == 8
    assert refused > len(damaged) / 2


def test_a_trace_of_another_model_is_refused() -> None:
    TRACE.require(3, 8, 2, "routes.npz")
    for layers, experts, top_k in ((4, 8, 2), (3, 16, 2), (3, 8, 4)):
        with pytest.raises(DocumentError, match=r"^routes\.npz: a trace of .* with 3 layers, top-2 of 8 experts; this"):
            TRACE.require(layers, experts, top_k, "routes.npz")
