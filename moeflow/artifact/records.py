"""Notes of finished shards, one file each, so that an interrupted pack goes on where it stopped.

A record is written after its shard and names the key of the inputs it was made from; a record whose shard is
gone, or of another size, does not count. Records are of use to this machine only and are no part of the
artifact that is shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeflow.errors import StorageError, UsageError
from moeflow.files import sha256_file, storage_errors, write_json
from moeflow.schema import Shard

__all__ = ["Records"]


class Records:
    """The records in one directory, which lies in the artifact's."""

    def __init__(self, directory: Path):
        self.directory = directory

    def load(self, shard: str, key: str) -> dict[str, Any] | None:
        """The record of `shard` if it was made under `key` and the file is there in full size."""
        try:
            record: dict[str, Any] = json.loads((self.directory / f"{shard}.json").read_text())
            size = (self.directory.parent / shard).stat().st_size
            return record if record["key"] == key and record["shard"]["nbytes"] == size else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Make the directory, which tells that packing began, and keep every other process out of it.

        Raises:
            UsageError: another process is packing here.
        """
        with storage_errors(self.directory, "create"):
            self.directory.mkdir(parents=True, exist_ok=True)
            stream = (self.directory / "lock").open("w")
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
            except BlockingIOError as error:
                raise UsageError(f"{self.directory.parent}: another moeflow is packing here; wait for it") from error
            yield

    def drop_damaged(self) -> None:
        """Forget shards whose bytes are no longer those that were written."""
        for path in self.directory.glob("*.safetensors.json"):
            shard = self.directory.parent / path.name.removesuffix(".json")
            try:
                sound = sha256_file(shard) == json.loads(path.read_text())["shard"]["sha256"]
            except (StorageError, ValueError, TypeError, KeyError):
                sound = False
            if not sound:
                path.unlink()

    def keep_only(self, shards: set[str]) -> None:
        """Remove shards, and their records, that an earlier model of this directory left behind."""
        with storage_errors(self.directory, "tidy"):
            for record in self.directory.glob("*.safetensors.json"):
                if (name := record.name.removesuffix(".json")) not in shards:
                    (self.directory.parent / name).unlink(missing_ok=True)
                    record.unlink()

    def save(self, name: str, key: str, shard: Shard, entry: dict[str, Any]) -> None:
        """Note that `shard` is finished."""
        record = {"key": key, "shard": shard.model_dump(mode="json"), "entry": entry}
        write_json(self.directory / f"{name}.json", record)
