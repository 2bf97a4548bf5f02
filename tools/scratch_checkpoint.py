"""A Mixtral of random weights on disk, quickly written.

Every tensor is a stretch of one block of random numbers. It is for measuring: nobody should generate text with it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from moeflow.artifact.architectures import architecture
from moeflow.artifact.synthetic import synthetic_checkpoint

BLOCK = 64 << 20  # bytes of random numbers
SHARD = 4_000_000_000  # bytes of a file of the checkpoint


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
