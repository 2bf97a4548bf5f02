"""The exception tree: what scripts rely on (exit codes) and what `except MoeflowError` must catch."""

from __future__ import annotations

import re

import pytest

from moeflow import errors
from moeflow.errors import MoeflowError, unknown

CLASSES = [c for n in errors.__all__ if isinstance(c := getattr(errors, n), type)]


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_a_moeflow_error(error: type[MoeflowError]) -> None:
    assert issubclass(error, MoeflowError)


def test_exit_codes_are_distinct_and_are_those_that_the_docstring_tells() -> None:
    told = dict(re.findall(r"(\w+Error) +(\d+)", errors.__doc__ or ""))
    assert {c.__name__: str(c.exit_code) for c in CLASSES} == told
    assert len(set(told.values())) == len(CLASSES) == 8


def test_no_exit_code_is_success_or_an_interruption() -> None:
    assert not {c.exit_code for c in CLASSES} & {0, 130}


def test_no_deliberate_error_is_missing_from_all() -> None:
    defined = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, MoeflowError)}
    assert defined <= set(errors.__all__)


def test_an_unknown_name_lists_the_known_ones_in_order() -> None:
    message = unknown("cache policy", "fifo", {"lru": 1, "lfu": 2})
    assert message == "unknown cache policy 'fifo'; known: lfu, lru"
