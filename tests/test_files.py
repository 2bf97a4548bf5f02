"""Files are whole or absent, and every refusal of the operating system is a StorageError with a remedy."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeflow import files
from moeflow.errors import DocumentError, StorageError
from moeflow.files import (
    atomic_writer,
    data_dir,
    read_document,
    sha256_file,
    storage_errors,
    write_json,
    write_text,
)


def _refuse(code: int) -> object:
    def refusal(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return refusal


# -- atomic writes -----------------------------------------------------------------------------------------


def test_a_written_file_has_its_content_and_no_neighbour(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "deep" / "a.txt", "größer\n")
    assert (tmp_path / "new" / "deep" / "a.txt").read_bytes() == "größer\n".encode()
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: type[BaseException], existed: bool) -> None:
    path = tmp_path / "a.bin"
    if existed:
        path.write_bytes(b"old")
    with pytest.raises(error), atomic_writer(path) as stream:
        stream.write(b"half of the new")
        raise error
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"a.bin": b"old"} if existed else {})


def test_the_final_name_is_untouched_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_writer(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_part_file_of_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(b"much longer leftover of a killed run")
    with atomic_writer(tmp_path / "a.bin") as stream:
        stream.write(b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.bin": b"new"}


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        steps.append("sync " + ("directory" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file"))
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_text(tmp_path / "a.txt", "x")
    assert steps == ["sync file", "rename", "sync directory"]


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "the disk is full; free space or choose another output directory"),
        (errno.EDQUOT, "the disk quota is used up; free space or choose another output directory"),
        (errno.EROFS, "the file system is read-only; choose another output directory"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refusal_while_writing_names_path_and_remedy_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, remedy: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), _refuse(code))
        with pytest.raises(StorageError) as caught:
            write_text(path, "new")
    assert str(caught.value) == f"{path}: cannot write: {remedy}"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}


def test_a_real_size_limit_is_a_storage_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    script = f"""
import resource, signal
from pathlib import Path
from moeflow.errors import StorageError
from moeflow.files import atomic_writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with atomic_writer(Path({str(path)!r})) as stream:
        for _ in range(100):
            stream.write(bytes(10_000))
except StorageError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith(f"{path}: cannot write: the file would pass this process's size limit (ulimit -f)")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.bin": b"old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_really_full_device_is_a_storage_error() -> None:
    with (
        pytest.raises(StorageError, match="/dev/full: cannot write: the disk is full; free space"),
        storage_errors(Path("/dev/full"), "write"),
        Path("/dev/full").open("wb") as stream,
    ):
        stream.write(b"x")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_place_that_takes_no_files_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match=r"^/proc/moeflow/a\.txt: cannot write: no such file or directory$"):
        write_text(Path("/proc/moeflow/a.txt"), "x")


def test_a_read_only_file_system_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", _refuse(errno.EROFS))
    with pytest.raises(StorageError, match="the file system is read-only; choose another output directory"):
        write_text(tmp_path / "a.txt", "x")


def test_a_forbidden_directory_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", _refuse(errno.EACCES))
    with pytest.raises(StorageError, match="permission denied; choose a directory that you may write to"):
        write_text(tmp_path / "b" / "a.txt", "x")


def test_a_file_where_a_directory_should_be_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(StorageError, match="a part of the path is not a directory"):
        write_text(tmp_path / "file" / "a.txt", "x")
    assert (tmp_path / "file").read_text() == "old"


def test_writing_over_a_directory_is_refused_and_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(StorageError, match="this is a directory, not a file"):
        write_text(tmp_path / "d", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_errors_that_are_not_the_systems_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage_errors(tmp_path, "read"):
        _ = 1 // 0


# -- documents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.json", "a"])
def test_json_is_read_under_every_ending(tmp_path: Path, name: str) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "größer"}}
    write_json(tmp_path / name, value)
    assert read_document(tmp_path / name) == value


def test_equal_values_are_written_as_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "ä"})
    assert (tmp_path / "a.json").read_bytes() == '{\n "b": 1,\n "a": "ä"\n}\n'.encode()


@pytest.mark.parametrize(
    ("name", "text", "place", "reason"),
    [
        ("a.yaml", "a: [1,\n b: }", "2:5", "not valid YAML: expected the node content, but found '}'"),
        ("a.yaml", "model: x\n\tcache: 1\n", "2:1", "not valid YAML: found character '\\t'"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "2:1", "not valid YAML: but found another document"),
        ("a.yaml", "a: !!python/name:os.x 1", "1:4", "not valid YAML: could not determine a constructor"),
        ("a.json", '{"a":\n 1,}', "2:4", "not valid JSON: "),
        ("a.json", "", "1:1", "not valid JSON: Expecting value"),
    ],
)
def test_a_syntax_error_names_line_and_column(tmp_path: Path, name: str, text: str, place: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DocumentError) as caught:
        read_document(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}:{place}: {reason}")
    assert "\n" not in str(caught.value)


HOSTILE = {
    "a date that does not exist": ("a.yaml", "model: 2024-99-99"),
    "a number without digits": ("a.yaml", "model: 0x_"),
    "a number of 5000 digits": ("a.yaml", "model: " + "1" * 5000),
    "a control character": ("a.yaml", "model: \0"),
    "depth": ("a.yaml", "[" * 20_000),
    "a JSON number of 5000 digits": ("a.json", "1" * 5000),
    "JSON depth": ("a.json", "[" * 200_000),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_whatever_a_document_holds_the_error_is_one_line(tmp_path: Path, case: str) -> None:
    name, text = HOSTILE[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(DocumentError) as caught:
        read_document(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}:")
    assert "\n" not in str(caught.value)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("cache: {experts_per_layer: 2}\nmodel: x\ncache: {experts_per_layer: 4}\n")
    with pytest.raises(DocumentError, match=r"a\.yaml:3:1: .*cache"):
        read_document(tmp_path / "a.yaml")


def test_a_file_that_is_not_text_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(DocumentError, match=r"a\.yaml: not a text document \(byte 7 is not UTF-8\)"):
        read_document(tmp_path / "a.yaml")


def test_a_missing_document_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"a\.yaml: cannot read: no such file or directory"):
        read_document(tmp_path / "a.yaml")


def test_a_directory_is_no_document(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read: this is a directory, not a file"):
        read_document(tmp_path)


# -- the rest ----------------------------------------------------------------------------------------------


def test_a_digest_is_that_of_the_whole_content(tmp_path: Path) -> None:
    content = os.urandom(3 * files.CHUNK // 2)
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_digest_of_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read: no such file"):
        sha256_file(tmp_path / "a")


def test_data_lies_in_the_wheel_or_else_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "__file__", str(tmp_path / "moeflow" / "files.py"))
    assert data_dir("profiles") == tmp_path / "profiles"
    (tmp_path / "moeflow" / "_data" / "profiles").mkdir(parents=True)
    assert data_dir("profiles") == tmp_path / "moeflow" / "_data" / "profiles"


def test_reading_files_needs_no_torch() -> None:
    script = "import sys, moeflow.files, moeflow.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_written_json_is_what_json_reads(tmp_path: Path) -> None:
    value = {"nested": [[], {}, "", 0, -1.5]}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value
