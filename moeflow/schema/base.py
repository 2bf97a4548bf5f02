"""What all documents share: frozen, no unknown keys, a format version, errors that name file and place.

A stage takes documents and returns documents; none is ever changed in place. It knows no document in
particular.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moeflow.errors import DocumentError
from moeflow.files import read_document, write_text
from moeflow.schema.location import describe

__all__ = ["Part", "Document"]


class Part(BaseModel):
    """A piece of a document: frozen, and closed to keys that it does not declare."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="null")


class Document(Part):
    """A whole document. Subclasses name their kind and the version that this moeflow writes and reads."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    format_version: int = 1
    """Version of this document's format."""

    @classmethod
    def parse(cls, data: Any, source: str) -> Self:
        """Validate `data`; `source` is the file or place that errors name.

        Raises:
            DocumentError: one line per fault, each with source, key path, rule.
        """
        if not isinstance(data, dict):
            raise DocumentError(f"{source}: a {cls.kind} is a mapping of keys, this is {type(data).__name__}")
        found = data.get("format_version", cls.version)
        if type(found) is not int or found != cls.version:
            remedy = "upgrade moeflow" if type(found) is int and found > cls.version else f"write {cls.version}"
            raise DocumentError(
                f"{source}: format_version is {found!r}; this moeflow reads {cls.kind} version {cls.version}: {remedy}"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            faults = [f"{source}: {describe(cls, data, fault)}" for fault in error.errors(include_url=False)]
            raise DocumentError("\n".join(dict.fromkeys(faults))) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate a YAML or JSON file."""
        return cls.parse(read_document(Path(path)), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `parse` takes back; sizes as people write them."""
        return self.model_dump(mode="json")

    def save(self, path: str | Path) -> None:
        """Write the document atomically, as YAML or JSON by the file's ending."""
        write_text(Path(path), self.to_yaml() if Path(path).suffix in (".yaml", ".yml") else self.to_json())

    def to_json(self) -> str:
        """The document as indented JSON; the same document gives the same bytes."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def to_yaml(self) -> str:
        """The document as YAML in the order of its declaration."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)

    def digest(self) -> str:
        """SHA-256 over the canonical content: equal documents have equal digests."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
