"""Files that are whole or absent: atomic writes, checksums, and YAML or JSON read with located errors.

A write goes to a temporary neighbour, is flushed to the disk and renamed over the final name, so that a
reader, or the next run after a crash, never meets half a file. Errors of the operating system become
`StorageError` here, once, with the path and the remedy. It does not know what the documents mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from moeflow.errors import DocumentError, StorageError

__all__ = [
    "atomic_writer",
    "write_text",
    "write_json",
    "read_document",
    "read_text",
    "sha256_file",
    "data_dir",
    "storage_errors",
]

CHUNK = 1 << 22  # bytes; large enough that hashing, not Python, is the cost

_REMEDY = {
    errno.ENOSPC: "the disk is full; free space or choose another output directory",
    errno.EDQUOT: "the disk quota is used up; free space or choose another output directory",
    errno.EFBIG: "the file would pass this process's size limit (ulimit -f) or the file system's",
    errno.EROFS: "the file system is read-only; choose another output directory",
    errno.EACCES: "permission denied; choose a directory that you may write to",
    errno.EPERM: "operation not permitted; choose a directory that you may write to",
    errno.ENOENT: "no such file or directory",
    errno.EEXIST: "a part of the path is not a directory",
    errno.ENOTDIR: "a part of the path is not a directory",
    errno.EISDIR: "this is a directory, not a file",
}


@contextlib.contextmanager
def storage_errors(path: Path, action: str) -> Iterator[None]:
    """Turn any `OSError` inside into a `StorageError` that names `path`, `action` and the remedy."""
    try:
        yield
    except OSError as error:
        reason = _REMEDY.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
        raise StorageError(f"{path}: cannot {action}: {reason}") from error


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` only once the block has ended without an error.

    Raises:
        StorageError: the directory cannot be written, or the disk is full; `path` is then as it was before.
    """
    temporary = path.with_name(path.name + ".part")
    with storage_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable, so that a later record never survives a crash that its file did not."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_writer(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically and with the same bytes each time."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """A whole file of UTF-8.

    Raises:
        StorageError: it cannot be read.
        DocumentError: it is not UTF-8; the message has the place.
    """
    with storage_errors(path, "read"):
        raw = path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}: not a text document (byte {error.start} is not UTF-8)") from error


def read_document(path: Path) -> Any:
    """Parse a YAML or JSON file (by its ending).

    Raises:
        StorageError: it cannot be read.
        DocumentError: it is not valid YAML or JSON; the message has line and column.
    """
    text = read_text(path)
    try:
        return _parse_json(path, text) if path.suffix == ".json" else _parse_yaml(path, text)
    except (ValueError, OverflowError, RecursionError) as error:  # numbers, dates and depths that Python refuses
        reason = str(error).partition("\n")[0].partition(":")[0]
        raise DocumentError(f"{path}: holds a value that cannot be read ({reason})") from error


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DocumentError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None:
            _refuse_repeated_keys(path, tree)
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise DocumentError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise DocumentError(f"{path}: not valid YAML: {str(error).partition(chr(10))[0]}") from error


def _refuse_repeated_keys(path: Path, node: Any) -> None:
    """YAML's reader keeps the last of two equal keys; a person who wrote both has overlooked one."""
    for key, value in node.value if node.id == "mapping" else ():
        twins = [other for other, _ in node.value if other.value == key.value and other is not key]
        if twins and isinstance(key.value, str):
            mark = max(key.start_mark, *(t.start_mark for t in twins), key=lambda m: m.index)
            raise DocumentError(f"{path}:{mark.line + 1}:{mark.column + 1}: {key.value} is given twice; keep one")
        _refuse_repeated_keys(path, value)
    for item in node.value if node.id == "sequence" else ():
        _refuse_repeated_keys(path, item)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, as `sha256sum` prints it."""
    with storage_errors(path, "read"), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def data_dir(name: str) -> Path:
    """The directory `hardware` or `profiles`: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "_data" / name
    return installed if installed.is_dir() else package.parent / name
