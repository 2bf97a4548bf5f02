"""Fixtures shared by all tests: tiny checkpoints and artifacts, each made once a session."""

from __future__ import annotations

import os
import random
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from moeflow.engine import Engine

CheckpointFactory = Callable[..., Path]

SEED = "MOEFLOW_TEST_SEED"
"""Of a run's random inputs. A failure shows it; given again, it repeats them."""

# Matrices of 64 columns gain nothing from threads and lose much where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What looks on the hub by mistake fails at once; a client without a network tries for 23 seconds.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def moe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`moe(*arguments)` is the command line in this process: exit code, stdout, stderr."""
    from moeflow import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeflow", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except one that torch raises while hqq is imported, as transformers' caches do."""
    os.environ.setdefault(SEED, str(random.randrange(1 << 32)))  # for the processes too that share the tests
    ignored = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
    config.addinivalue_line("filterwarnings", ignored)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where torch finds no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every run draws other inputs; a test draws the same ones alone as in a whole run."""
    print(f"{SEED}={os.environ[SEED]}")
    _seed(item)


def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item)  # again: fixtures that tests share draw only where they are made


def _seed(item: pytest.Item) -> None:
    seed = zlib.crc32(f"{os.environ[SEED]} {item.nodeid}".encode())
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):  # tests of the control plane do without these
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


@pytest.fixture(scope="session")
def checkpoint_factory(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """`checkpoint_factory(family, **settings)` as in `tiny.tiny_checkpoint`; equal calls share a directory.

    The directories are shared between tests and must not be changed: copy one to damage it.
    """
    from tiny import tiny_checkpoint as build

    made: dict[str, Path] = {}

    def make(family: str = "mixtral", **settings: object) -> Path:
        key = f"{family} {sorted(settings.items(), key=str)}"
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp(family) / "checkpoint", family, **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(checkpoint_factory: CheckpointFactory) -> Path:
    """A tiny Mixtral, shared: 2 layers of 8 experts, top-2, bfloat16. Not to be changed."""
    return checkpoint_factory()


@pytest.fixture
def own_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_checkpoint` that the test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that ships with moeflow, packed as profiles/demo.yaml says. Not to be changed."""
    import moeflow
    from moeflow.files import data_dir

    return moeflow.pack(data_dir("profiles") / "demo.yaml", tmp_path_factory.mktemp("demo") / "artifact")


@pytest.fixture(scope="session")
def demo_engine(demo_artifact: Path) -> Iterator[Engine]:
    """The demo model, loaded."""
    import moeflow

    with moeflow.load(demo_artifact) as engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` packed with the default quantization, shared. Not to be changed."""
    from moeflow.artifact.checkpoint import Checkpoint
    from moeflow.artifact.packer import Packer
    from moeflow.schema import Quantization

    output = tmp_path_factory.mktemp("artifact") / "tiny"
    Packer(Checkpoint.open(tiny_checkpoint), "tiny/mixtral", Quantization(), output).run()
    return output


@pytest.fixture
def own_artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_artifact` that the test may damage."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
