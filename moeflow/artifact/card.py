"""The model card of an artifact: README.md, whose front matter the Hugging Face hub reads.

What it says follows from the checkpoint and the settings alone, so that equal packs have equal cards; it names no path
of this machine. The licence is the checkpoint's: what its own card says, or that there is a LICENSE file. Nothing is
guessed: a checkpoint without either gives a card without a licence.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moeflow.artifact.blueprint import Blueprint
from moeflow.artifact.role_sizes import role_sizes
from moeflow.errors import DocumentError, StorageError
from moeflow.files import storage_errors
from moeflow.schema import BitsAndBytesScheme, Scheme
from moeflow.schema.units import format_size

__all__ = ["CARD", "front_matter", "model_card"]

CARD = "README.md"
CARRIED = ("license", "license_name", "license_link")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*?$", re.DOTALL | re.MULTILINE)


def front_matter(directory: Path) -> dict[str, Any]:
    """What the card of a checkpoint declares; nothing where there is none, or none that can be read."""
    import yaml

    try:
        with storage_errors(directory / CARD, "read"):
            text = (directory / CARD).read_text(encoding="utf-8", errors="replace")
        found = yaml.safe_load(match[1]) if (match := _FRONT.match(text)) else None
    except (StorageError, DocumentError, ValueError, yaml.YAMLError):
        return {}  # somebody else's page for people: no reason to refuse the model
    return found if isinstance(found, dict) else {}


def model_card(blueprint: Blueprint) -> str:
    """The text of README.md."""
    import yaml

    source, checkpoint = blueprint.source, blueprint.checkpoint
    is_hub_id = _HUB_ID.fullmatch(source) is not None and not Path(source).is_dir()
    declared = front_matter(checkpoint.directory)
    base = source if is_hub_id else declared.get("base_model")
    sizes = role_sizes(blueprint)
    tags = ["moeflow", "mixture-of-experts", checkpoint.family.model_type, *map(_tag, (s.scheme for s in sizes))]
    head: dict[str, Any] = {"library_name": "moeflow", "pipeline_tag": "text-generation"}
    if base:
        head |= {"base_model": base, "base_model_relation": "quantized"}
    head |= _license(checkpoint.directory, declared)
    head["tags"] = [tag for tag in dict.fromkeys(tags) if tag]
    rows = [f"| {s.role} | {s.scheme.label} | {s.weights:,} | {format_size(s.nbytes)} | {s.bits:.2f} |" for s in sizes]
    name = source.rpartition("/")[2] if is_hub_id else Path(source).resolve().name
    return _PAGE.format(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        name=name,
        origin=f"[{source}](https://huggingface.co/{source})" if is_hub_id else name,
        quantization=blueprint.quantization,
        rows="\n".join(rows),
    )


_PAGE = """---
{head}---

# {name}, packed by moeflow

The weights of {origin}, packed so that moeflow runs them with experts in host memory and a part of them on the GPU:
{quantization}.

| role | stored as | weights | bytes | bits a weight |
|---|---|---|---|---|
{rows}

Bits include scales, zeros and padding. `manifest.json` says where every byte lies, with checksums.

```
moeflow verify DIRECTORY
moeflow generate DIRECTORY -p "..."
```
"""


def _license(directory: Path, declared: dict[str, Any]) -> dict[str, Any]:
    """As the checkpoint's card has it, else by its file, whose terms have no name here."""
    if declared.get("license"):
        return {key: declared[key] for key in CARRIED if declared.get(key)}
    files = sorted(path.name for path in directory.glob("LICENSE*") if path.is_file())
    return {"license": "other", "license_name": "see-license-file", "license_link": files[0]} if files else {}


def _tag(scheme: Scheme) -> str:
    if isinstance(scheme, BitsAndBytesScheme):
        return scheme.format
    return f"{scheme.bits}-bit" if scheme.backend == "hqq" else ""
