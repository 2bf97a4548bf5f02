"""Finding a model: here, in the hub's cache, on the hub; a fake client stands for the hub, which no test reaches."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import moeflow
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.hub import resolve_model, snapshot_revision
from moeflow.errors import CheckpointError, MoeflowError, StorageError

MODEL = "someone/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Answers for `snapshot_download`, and remembers what it was asked."""

    def __init__(self, answer: Path | Exception):
        self.answer = answer
        self.asked: dict[str, Any] = {}

    def __call__(self, model: str, **settings: Any) -> str:
        self.asked = {"model": model, **settings}
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | Exception], FakeHub]:
    def install(answer: Path | Exception) -> FakeHub:
        fake = FakeHub(answer)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return install


def _http(kind: type[Exception], message: str) -> Exception:
    return kind(message, response=SimpleNamespace(headers={}, request=None))  # type: ignore[call-arg]


def _refusal(revision: str | None = None) -> str:
    with pytest.raises(MoeflowError) as caught:
        resolve_model(MODEL, revision)
    return str(caught.value)


# -- on this machine ---------------------------------------------------------------------------------------


def test_a_directory_is_a_model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tiny_checkpoint)) == tiny_checkpoint
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert Checkpoint.open(resolve_model("checkpoint")).family.model_type == "mixtral"


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "nowhere", "a/b/c", "~/no/where"])
def test_a_model_that_is_nowhere_says_what_a_model_is(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory; a model is a directory, a hub id such as"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["bad id/with spaces", "a--b/..", "-/-"])
def test_a_name_that_the_hub_would_refuse_is_no_crash(model: str) -> None:
    with pytest.raises(MoeflowError, match=r"a--b|bad id|-/-"):
        resolve_model(model)


# -- without a network -------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_told_with_the_remedy(hub: Callable[..., FakeHub]) -> None:
    fake = hub(errors.LocalEntryNotFoundError("no network"))
    assert _refusal() == (
        f"{MODEL}: neither a local directory nor complete in the hub cache ({constants.HF_HUB_CACHE}), and the hub "
        "cannot be reached; download it where there is a network, and name the directory"
    )
    assert fake.asked["local_files_only"] is False


def test_offline_only_the_cache_is_asked_and_the_switch_is_named(
    hub: Callable[..., FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = hub(errors.LocalEntryNotFoundError("not there"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = _refusal("v1.0")
    assert message.startswith(f"{MODEL}@v1.0: neither a local directory nor complete in the hub cache")
    assert "HF_HUB_OFFLINE is set: unset it, or download it where there is a network" in message
    assert fake.asked["local_files_only"] is True


def test_offline_what_is_in_the_cache_is_used(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own client, on a cache of this test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "neither a local directory nor complete in the hub cache" in _refusal()
    folder = tmp_path / "models--someone--model"
    shutil.copytree(tiny_checkpoint, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for revision in (None, "main", COMMIT):
        assert Checkpoint.open(resolve_model(MODEL, revision)).revision == COMMIT


# -- what the hub refuses ----------------------------------------------------------------------------------


def test_a_gated_model_says_where_to_ask_and_how_to_log_in(hub: Callable[..., FakeHub]) -> None:
    hub(_http(errors.GatedRepoError, "401 Client Error.\n\nCannot access gated repo"))
    page = f"{constants.ENDPOINT}/{MODEL}"
    assert _refusal() == f"{MODEL}: gated: accept its terms at {page}, then log in (`hf auth login`) or set HF_TOKEN"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_http(errors.RepositoryNotFoundError, "404"), "nor a model on the hub that this user may see; for a private"),
        (_http(errors.RevisionNotFoundError, "404"), "has no revision 'v9'; name a branch, a tag or a commit"),
        (_http(errors.HfHubHTTPError, "503 Server Error\nmore"), "the hub refuses it: 503 Server Error"),
        (errors.HFValidationError("Repo id must use alphanumeric chars"), "the hub refuses it: Repo id must use"),
        (RuntimeError("connection reset"), r"broke off \(RuntimeError: connection reset\); run it again"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_refusals_are_told_with_their_remedies(
    hub: Callable[..., FakeHub], error: Exception, message: str
) -> None:
    hub(error)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model(MODEL, "v9")
    assert str(caught.value).startswith(MODEL)


def test_a_full_disk_is_a_storage_error(hub: Callable[..., FakeHub]) -> None:
    hub(OSError(errno.ENOSPC, "No space left on device", "/cache/blob"))
    with pytest.raises(StorageError, match="/cache/blob: cannot download someone/model: No space left"):
        resolve_model(MODEL)


def test_a_gated_model_leaves_no_output(hub: Callable[..., FakeHub], tmp_path: Path) -> None:
    hub(_http(errors.GatedRepoError, "401"))
    with pytest.raises(CheckpointError, match="gated"):
        moeflow.pack({"model": MODEL}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- the revision ------------------------------------------------------------------------------------------


def test_the_commit_of_a_snapshot_is_recorded(
    hub: Callable[..., FakeHub], tmp_path: Path, tiny_checkpoint: Path, demo_artifact: Path
) -> None:
    snapshot = tmp_path / "models--someone--model" / "snapshots" / COMMIT
    fake = hub(Path(shutil.copytree(tiny_checkpoint, snapshot)))
    none = {"experts": {"backend": "none"}, "attention": {"backend": "none"}}
    profile = {
        "model": MODEL,
        "revision": "v1.0",
        "quantization": none,
        "hardware": str(demo_artifact / "hardware.yaml"),
    }
    output = moeflow.pack(profile, tmp_path / "out")
    assert (fake.asked["model"], fake.asked["revision"]) == (MODEL, "v1.0")
    assert fake.asked["ignore_patterns"] == ["*/*", "consolidated*"]
    facts = moeflow.Manifest.load(output / "manifest.json").model
    assert (facts.source, facts.revision) == (MODEL, COMMIT)


def test_another_commit_of_the_same_bytes_is_another_manifest(tmp_path: Path, tiny_checkpoint: Path) -> None:
    first, second = (tmp_path / "snapshots" / (digit * 40) for digit in "ab")
    shutil.copytree(tiny_checkpoint, first)
    first.rename(second)
    assert snapshot_revision(first) == "a" * 40
    assert Checkpoint.open(second).revision == "b" * 40


@pytest.mark.parametrize(
    "place", [f"other/{COMMIT}", "snapshots/main", f"snapshots/{COMMIT}/sub", f"snapshots/{'A' * 40}"]
)
def test_other_directories_have_no_revision(tmp_path: Path, place: str) -> None:
    assert snapshot_revision(tmp_path / place) is None


def test_a_manifest_without_a_revision_does_not_mention_it(demo_artifact: Path) -> None:
    assert "revision" not in (demo_artifact / "manifest.json").read_text()
