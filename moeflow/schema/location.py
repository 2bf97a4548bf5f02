"""Turns a pydantic fault into one line that a person can act on: where, what stands there, what may stand.

pydantic's own location names the branch of a union that was tried (`experts.hqq.bits`); the reader wrote
`experts.bits` in a file, so the branch becomes the subject of the rule instead: "hqq supports 2, 3, 4, 8".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

__all__ = ["describe"]


def describe(model: type[BaseModel], data: Any, fault: Mapping[str, Any]) -> str:
    """One line for one fault of `data` against `model`, without the file name."""
    path, branch = _strip_branches(data, fault["loc"])
    place = ".".join(_shorten(step) for step in path) or "the document"
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "missing":
        return f"{place} is missing; it is required"
    if kind == "extra_forbidden":
        return f"{place}: unknown key{_known_keys(model, fault['loc'])}"
    value = _shorten(fault["input"])
    if kind == "literal_error":
        allowed = _plain_list(context["expected"])
        return f"{place} is {value}; {branch or 'it'} supports {allowed}"
    if kind == "union_tag_invalid":
        key = context["discriminator"].strip("'")
        return f"{place}.{key} is {context['tag']!r}; known: {_plain_list(context['expected_tags'])}"
    if kind == "union_tag_not_found":
        return f"{place}.{context['discriminator'].strip(chr(39))} is missing; it selects the kind"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{place} is {value}; {message[0].lower() + message[1:]}" if path else message


def _strip_branches(data: Any, location: tuple[int | str, ...]) -> tuple[list[int | str], str]:
    """Split a pydantic location into the path in the file and the last union branch on it."""
    path: list[int | str] = []
    branch = ""
    for step in location:
        if isinstance(data, dict) and step not in data and step in data.values():
            branch = str(step)
            continue
        path.append(step)
        if isinstance(data, dict):
            data = data.get(step)
        elif isinstance(data, list | tuple) and isinstance(step, int) and step < len(data):
            data = data[step]
    return path, branch


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """`; did you mean ...? known: ...` for the mapping that holds the last step of `location`."""
    candidates = [model]
    for step in location[:-1]:
        fields = [c.model_fields[step] for c in candidates if isinstance(step, str) and step in c.model_fields]
        if fields:
            candidates = [m for field in fields for m in _models_in(field.annotation)]
        elif isinstance(step, str):  # a union branch; an index keeps the element's model
            candidates = [c for c in candidates if step in get_args(c.model_fields["backend"].annotation)]
    names = [name for candidate in candidates for name in candidate.model_fields]
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return (f"; did you mean {near[0]}?" if near else ";") + f" known: {', '.join(names)}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _plain_list(expected: str) -> str:
    """pydantic's "2, 3, 4 or 8" and "'a', 'b'" as "2, 3, 4, 8" and "a, b"."""
    return re.sub(r"\s+or\s+", ", ", expected).replace("'", "")


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) and value and value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
