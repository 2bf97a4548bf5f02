"""A Mixtral of random weights on disk, quickly written, and how fast its disk reads and writes.

Every tensor is a stretch of one block of random numbers. It is for measuring: nobody should generate text with it.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moeflow.artifact.architectures import architecture
from moeflow.artifact.synthetic import synthetic_checkpoint

BLOCK = 64 << 20  # bytes of random numbers
CHUNK = 8 << 20  # of a read or write of the disk alone
SHARD = 4_000_000_000  # bytes of a file of the checkpoint
DISK_BYTES = 4_000_000_000  # that the disk's rates are measured on, at most


def config_of(layers: int, tiny: bool) -> dict[str, Any]:
    """Mixtral-8x7B's, with other numbers of layers; `tiny` is for tests."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        **architecture("mixtral-8x7b"),
        "num_hidden_layers": layers,
        **(small | {"vocab_size": 128} if tiny else {}),
    }


def layers_for(nbytes: int, tiny: bool) -> int:
    """Layers of a checkpoint of about `nbytes`."""
    one, two = (sum(t.nbytes for t in synthetic_checkpoint(config_of(n, tiny)).tensors.values()) for n in (1, 2))
    return max(1, round((nbytes - one) / (two - one)) + 1)


def write_checkpoint(directory: Path, layers: int, tiny: bool) -> int:
    """Write a checkpoint of random bfloat16 weights, and return its bytes."""
    directory.mkdir(parents=True)
    config = config_of(layers, tiny)
    (directory / "config.json").write_text(json.dumps(config))
    block = (torch.randn(BLOCK // 2 if not tiny else 1 << 16) * 0.02).bfloat16().view(torch.uint8).numpy()
    files: list[list[Any]] = [[]]
    room = SHARD
    for name, info in synthetic_checkpoint(config).tensors.items():
        if info.nbytes > room and files[-1]:
            files.append([])
            room = SHARD
        files[-1].append((name, info))
        room -= info.nbytes
    index = {}
    for number, entries in enumerate(files, 1):
        file = directory / f"model-{number:05}-of-{len(files):05}.safetensors"
        index |= dict.fromkeys((name for name, _ in entries), file.name)
        header, offset = {}, 0
        for name, info in entries:
            header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, offset + info.nbytes]}
            offset += info.nbytes
        text = json.dumps(header).encode()
        with file.open("wb", buffering=0) as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for begin in range(0, offset, len(block)):
                stream.write(block[: offset - begin].data)
            os.fsync(stream.fileno())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    drop_cache(directory)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def drop_cache(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(directory: Path, direct: bool) -> float | None:
    """Bytes a second of reading the checkpoint's files in sequence, and nothing else; None where the disk refuses."""
    drop_cache(directory)
    buffer = mmap.mmap(-1, CHUNK)  # on a page boundary, which direct reads need
    done, begin = 0, time.perf_counter()
    for file in sorted(directory.glob("*.safetensors")):
        try:
            descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        except OSError:
            return None
        try:
            place, count = 0, CHUNK
            while done < DISK_BYTES and count == CHUNK:  # a direct read may not go on at a file's end
                count = os.preadv(descriptor, [buffer], place)
                place += count
                done += count
        except OSError:
            return None
        finally:
            os.close(descriptor)
    return done / (time.perf_counter() - begin)


def write_rate(directory: Path, nbytes: int) -> float:
    """Bytes a second of writing a file in sequence and making it durable."""
    block = os.urandom(CHUNK)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as stream:
        begin, done = time.perf_counter(), 0
        while done < nbytes:
            done += stream.write(block)
        os.fsync(stream.fileno())
        return done / (time.perf_counter() - begin)
