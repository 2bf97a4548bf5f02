"""The safetensors container, read by header and written as a stream.

The safetensors library writes whole dictionaries from memory and starts data wherever the header ends. An
artifact wants the opposite: blobs written one at a time, data on a page boundary (the format allows the
header to be padded with spaces), digests taken on the way. Any safetensors reader reads the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moeflow.artifact.layout import PAGE
from moeflow.errors import CheckpointError, MoeflowError
from moeflow.files import atomic_writer, storage_errors
from moeflow.schema import Shard

if TYPE_CHECKING:
    import torch

__all__ = ["TensorInfo", "Header", "ShardWriter", "read_header", "read_tensor", "shard_writer"]

ITEM = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
STAGED = 1 << 20  # bytes of a tensor from which on it takes a GPU's way from the disk; an expert's index may be less
DURABLE = 32 << 20  # bytes written after which they are sent to the disk: the end of a shard then waits for few


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes are."""

    file: Path
    name: str
    dtype: str
    """In safetensors' names: F32, BF16, U8."""
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    data_offset: int
    tensors: dict[str, TensorInfo]


def read_header(file: Path, error: type[MoeflowError]) -> Header:
    """Read a file's header and check it against the file's size.

    Raises:
        MoeflowError: of the type `error`; the file is truncated, too long, or no safetensors at all.
    """
    with storage_errors(file, "read"), file.open("rb") as stream:
        size = file.stat().st_size
        start = 8 + int.from_bytes(stream.read(8), "little")
        if size < 8 or start > size:
            raise error(f"{file}: truncated or not safetensors: its header needs {start} bytes, the file has {size}")
        try:
            entries = json.loads(stream.read(start - 8))
            entries.pop("__metadata__", None)
            tensors = {name: _info(file, name, entry, start) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
            raise error(f"{file}: not a safetensors file: its header cannot be parsed ({fault})") from fault
    end = max((t.offset + t.nbytes for t in tensors.values()), default=start)
    if end != size:
        raise error(
            f"{file}: {'truncated' if end > size else 'too long'}: its tensors need {end} bytes, the file has {size}"
        )
    _check_places(file, tensors.values(), start, error)
    return Header(start, tensors)


def _check_places(file: Path, tensors: Iterable[TensorInfo], start: int, error: type[MoeflowError]) -> None:
    """Every byte is one tensor's: two tensors of the same bytes are two names for one of them, and one is wrong."""
    end, before = 0, "the header"
    for info in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        begin = info.offset - start
        if begin != end:
            what = f"overlaps {before}" if begin < end else f"leaves a gap after {before}"
            raise error(
                f"{file}: {info.name} {what}: it begins at byte {begin} of the data, {before} ends at {end}; "
                "fetch this file again"
            )
        end, before = begin + info.nbytes, info.name


def _info(file: Path, name: str, entry: dict[str, Any], start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    dtype, shape = str(entry["dtype"]), entry["shape"]
    if dtype not in ITEM:
        raise ValueError(f"{name} is stored as {dtype}; known: {', '.join(ITEM)}")
    if any(type(n) is not int or n < 0 for n in (begin, end, *shape)) or end - begin != prod(shape) * ITEM[dtype]:
        raise ValueError(f"{name}: bytes {begin} to {end} do not hold {dtype} {shape}")
    return TensorInfo(file, name, str(entry["dtype"]), tuple(entry["shape"]), start + begin, end - begin)


def read_tensor(info: TensorInfo, index: int | None = None, device: torch.device | None = None) -> torch.Tensor:
    """Load one tensor, or what is at `index` of its first dimension, into host memory or onto `device`.

    Raises:
        CheckpointError: the file is not what its header said.
        StorageError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with storage_errors(info.file, "read"), safe_open(info.file, framework="pt") as reader:
            if device is not None and device.type == "cuda" and info.nbytes >= STAGED:
                return _staged(info, reader.get_slice(info.name)[:0].dtype, index, device)
            tensor: torch.Tensor = reader.get_tensor(info.name) if index is None else reader.get_slice(info.name)[index]
            # safetensors maps the file; copied here, it is read by the thread that asks, and not by whoever computes.
            return tensor.to(device or "cpu", copy=True)
    except SafetensorError as error:
        raise CheckpointError(f"{info.file}: {info.name} cannot be read: {error}; fetch this file again") from error


def _staged(info: TensorInfo, dtype: torch.dtype, index: int | None, device: torch.device) -> torch.Tensor:
    from moeflow.artifact.staging import read_to_device

    if index is None:
        return read_to_device(info.file, info.offset, info.nbytes, device).view(dtype).view(info.shape)
    nbytes = info.nbytes // info.shape[0]
    offset = info.offset + range(info.shape[0])[index] * nbytes
    return read_to_device(info.file, offset, nbytes, device).view(dtype).view(info.shape[1:])


class ShardWriter:
    """Takes the tensors of a shard in the order of its header and digests them."""

    def __init__(
        self,
        stream: IO[bytes],
        path: Path,
        entries: Sequence[tuple[str, str, tuple[int, ...]]],
        pool: ThreadPoolExecutor,
    ):
        self._stream = stream
        self._pool = pool
        self._pending = 0
        self._path = path
        self._sizes = [prod(shape) * ITEM[dtype] for _, dtype, shape in entries]
        self._file_digest = hashlib.sha256()
        self.digests: list[str] = []
        header = _header_bytes(entries, self._sizes)
        self.data_offset = len(header)
        self._file_digest.update(header)
        stream.write(header)

    def write(self, data: memoryview) -> None:
        """Append the next tensor's bytes."""
        expected = self._sizes[len(self.digests)]
        assert data.nbytes == expected, f"tensor {len(self.digests)}: {data.nbytes} bytes, header says {expected}"
        whole = self._pool.submit(self._file_digest.update, data)  # beside the tensor's own: both pass over all bytes
        try:
            self.digests.append(hashlib.sha256(data).hexdigest())
            self._stream.write(data)
            self._pending += data.nbytes
            if self._pending >= DURABLE:
                self._stream.flush()
                getattr(os, "fdatasync", os.fsync)(self._stream.fileno())
                self._pending = 0
        finally:
            whole.result()

    def shard(self) -> Shard:
        """The finished file's entry for the manifest."""
        assert len(self.digests) == len(self._sizes), "the header promises more tensors"
        nbytes = self.data_offset + sum(self._sizes)
        return Shard(file=self._path.name, nbytes=nbytes, sha256=self._file_digest.hexdigest())


@contextlib.contextmanager
def shard_writer(path: Path, entries: Sequence[tuple[str, str, tuple[int, ...]]]) -> Iterator[ShardWriter]:
    """Write a shard of `(name, dtype, shape)` entries; the file appears whole when the block ends, or not at all."""
    with atomic_writer(path) as stream, ThreadPoolExecutor(1, "moeflow-digest") as pool:
        yield ShardWriter(stream, path, entries, pool)


def _header_bytes(entries: Sequence[tuple[str, str, tuple[int, ...]]], sizes: Sequence[int]) -> bytes:
    """Length and JSON, padded with spaces so that data starts on a page."""
    table, offset = {}, 0
    for (name, dtype, shape), size in zip(entries, sizes, strict=True):
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // PAGE) * PAGE - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)
