"""Memory of packing is that of one layer: twelve take no more than two.

They are packed in a process of their own, after a model of two layers has warmed it up, so that what imports and first
uses cost is not counted. Weights of a layer are 9 MiB: if each layer left a third of itself behind, ten more would be
seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.schema import DenseScheme, HqqScheme, Quantization

def field(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) << 10

def pack(checkpoint, output):
    quantization = Quantization(experts=HqqScheme(bits=2, group_size=64), attention=DenseScheme())
    Packer(Checkpoint.open(Path(checkpoint)), "tiny/model", quantization, Path(output)).run()

peaks = []
for number, checkpoint in enumerate(sys.argv[2:]):
    pack(checkpoint, Path(sys.argv[1]) / str(number))
    peaks.append(field("VmHWM:"))
print(json.dumps(peaks))
"""
LEEWAY = 24 << 20  # allocators keep some of what hqq has let go of: 8.7 MiB were seen


@pytest.fixture(scope="module")
def checkpoints(checkpoint_factory: Callable[..., Path]) -> dict[int, Path]:
    return {n: checkpoint_factory(layers=n, experts=4, hidden=512, intermediate=768) for n in (2, 12)}


def test_more_layers_take_no_more_memory(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    counts = (2, 2, 12)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *(str(checkpoints[layers]) for layers in counts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    warm, *peaks = json.loads(done.stdout.splitlines()[-1])
    for layers, peak in zip(counts[1:], peaks, strict=True):
        assert peak - warm < LEEWAY, f"{layers} layers after 2"
