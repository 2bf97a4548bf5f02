"""Documentation that is made from the code is current, and what is written by hand names things that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from moeflow import cli, errors
from moeflow.schema.export import schemas

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_schemas_are_current() -> None:
    """Compared by keys: pydantic's versions word the rest differently."""
    written = {path.name: _keys(path.read_text()) for path in (ROOT / "docs/schemas").glob("*.json")}
    current = {name: _keys(text) for name, text in schemas().items()}
    assert written == current, "run: python -m moeflow.schema.export docs/schemas"


def _keys(schema: str) -> dict[str, list[str]]:
    document = json.loads(schema)
    parts = {"document": document, **document.get("$defs", {})}
    return {name: sorted(part.get("properties", {})) for name, part in parts.items()}


def test_cli_page_has_every_command_option_and_sentence() -> None:
    words = " ".join(re.sub(r"[│╭╮╰╯─┃]", " ", (ROOT / "docs/cli.md").read_text()).split())
    commands = dict(typer.main.get_command(cli.app).commands)
    for group in [name for name, command in commands.items() if hasattr(command, "commands")]:
        commands |= {f"{group} {name}": command for name, command in commands[group].commands.items()}
    for name, command in commands.items():
        assert f"## moeflow {name}" in words
        assert " ".join((command.help or "").split()) in words
        for parameter in command.params:
            for option in getattr(parameter, "opts", []):
                assert option.lower() in words.lower(), f"{name} {option}: run python tools/cli_docs.py docs/cli.md"


def test_predictions_are_the_planners() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "tools/paper_table.py"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    page = (ROOT / "docs/predictions.md").read_text()
    assert made.stdout == page, "run: python tools/paper_table.py docs/predictions.md"
    assert page.count("PREDICTED |") == page.count("paper, measured |") == 12
    assert made.stderr == "", "a row does not fit its machine"


def test_cli_page_has_every_exit_code() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    kinds = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert f"| {kind.exit_code} |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_named_in_pages_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_pages_exist(page: Path) -> None:
    names = set(typer.main.get_command(cli.app).commands)
    for name in re.findall(r"(?:`|^ {4})moeflow ([a-z]+(?:-[a-z]+)*)", page.read_text(), flags=re.MULTILINE):
        assert name in names, f"{page.name}: moeflow {name}"
