"""A benchmark's header: facts of this machine, and the commit only where it is the package's own."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from moeflow.probe import environment as module
from moeflow.probe.environment import commit, environment
from moeflow.schema import Environment


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package in a repository of its own with one commit."""
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("x = 1\n")
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "-m", "first")
    return package


def test_it_describes_this_machine_and_comes_back() -> None:
    found = environment()
    assert Environment.model_validate(found.model_dump(mode="json")) == found
    assert found.cores >= 1 and found.ram > 1 << 28 and found.cpu
    assert found.torch.split("+")[0] == version("torch").split("+")[0]
    assert found.transformers == version("transformers")


def test_nothing_of_a_gpu_is_said_where_torch_uses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = environment()
    assert (found.gpu, found.gpu_memory, found.driver) == (None, None, None)


def test_the_commit_is_that_of_the_checkout(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "--short", "HEAD")
    assert commit(checkout) == head
    (checkout / "untracked.py").write_text("y = 2\n")
    assert commit(checkout) == head, "a file that git does not know changes no tracked code"
    (checkout / "code.py").write_text("x = 2\n")
    assert commit(checkout) == head + "+changes"


def test_a_package_inside_another_repository_has_no_commit(checkout: Path) -> None:
    installed = checkout.parent / ".venv" / "site-packages" / "moeflow"
    installed.mkdir(parents=True)
    assert commit(installed) is None


def test_no_repository_no_commit_or_no_git_give_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    assert commit(tmp_path / "package") is None
    git(tmp_path, "init", "--quiet")
    assert commit(tmp_path / "package") is None
    monkeypatch.setenv("PATH", "")
    assert commit(module.PACKAGE) is None
