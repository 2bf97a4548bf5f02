"""Writes the documents' JSON Schemas, which let an editor complete and check profiles.

`python -m moeflow.schema.export docs/schemas`; a test keeps that directory current.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moeflow.files import write_text
from moeflow.schema.kinds import KINDS

__all__ = ["export", "schemas"]


def schemas() -> dict[str, str]:
    """File name -> schema text, one per kind of document."""
    found = {}
    for kind in KINDS:
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}
        found[f"{kind.kind.replace(' ', '-')}.schema.json"] = json.dumps(schema, indent=2) + "\n"
    return found


def export(directory: Path) -> None:
    """Write all schemas."""
    for name, text in schemas().items():
        write_text(directory / name, text)


if __name__ == "__main__":
    export(Path(sys.argv[1]))
