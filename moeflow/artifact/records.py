"""Notes of finished shards, one file each, so that an interrupted pack goes on where it stopped.

A record is written after its shard and names the key of the inputs it was made from; a record whose shard is
gone, or of another size, does not count. Records are of use to this machine only and are no part of the
artifact that is shared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeflow.files import storage_errors, write_json
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

    def begin(self) -> None:
        """Make the directory: it tells that packing began."""
        with storage_errors(self.directory, "create"):
            self.directory.mkdir(parents=True, exist_ok=True)

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
