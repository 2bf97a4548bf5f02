"""A checkpoint's bytes on their way to a GPU: whole, in order, and no more than were asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeflow.artifact.safetensors import STAGED, read_header, read_tensor
from moeflow.artifact.staging import PIECE, read_piece
from moeflow.errors import CheckpointError


def test_a_piece_is_filled_from_its_offset_however_little_comes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(1000)
    (tmp_path / "file").write_bytes(content)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:7]], offset))
    into = bytearray(300)
    with (tmp_path / "file").open("rb") as stream:
        read_piece(tmp_path / "file", stream.fileno(), 450, memoryview(into))
    assert into == content[450:750]


def test_a_file_that_became_shorter_is_told_with_the_bytes_that_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    with (tmp_path / "file").open("rb") as stream, pytest.raises(CheckpointError, match="ends at byte 100, 20 bytes"):
        read_piece(tmp_path / "file", stream.fileno(), 60, memoryview(bytearray(60)))


@pytest.mark.gpu
def test_a_gpu_gets_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "pieces": torch.randn(5 * PIECE // 16 + 3, 7),  # more than one piece, and a rest
        "experts": torch.randn(3, 512, 1031).bfloat16(),
        "bytes": torch.randint(0, 255, (STAGED + 1,), dtype=torch.uint8),
        "small": torch.randn(()),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    infos = read_header(tmp_path / "m.safetensors", CheckpointError).tensors
    cuda = torch.device("cuda")
    for name, tensor in tensors.items():
        read = read_tensor(infos[name], device=cuda)
        assert read.is_cuda and read.dtype == tensor.dtype and torch.equal(read.cpu(), tensor)
    for expert in range(3):
        assert torch.equal(read_tensor(infos["experts"], expert, cuda).cpu(), tensors["experts"][expert])


@pytest.mark.gpu
def test_what_a_gpu_still_computes_with_is_not_overwritten_by_the_next_read(tmp_path: Path) -> None:
    save_file({str(i): torch.full((4 << 20,), float(i)) for i in range(8)}, tmp_path / "m.safetensors")
    infos = read_header(tmp_path / "m.safetensors", CheckpointError).tensors
    sums = []
    for i in range(8):
        tensor = read_tensor(infos[str(i)], device=torch.device("cuda"))
        torch.cuda._sleep(20_000_000)  # the sum is queued, and its tensor freed, before the next is read
        sums.append(tensor.sum(dtype=torch.float64))
        del tensor
    assert [float(s) for s in sums] == [i * float(4 << 20) for i in range(8)]
