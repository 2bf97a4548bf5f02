"""Writes docs/cli.md: the help of every command, as a terminal of 100 columns shows it.

`python tools/cli_docs.py docs/cli.md`. The text depends on typer's version in its frames only; the test compares
commands, options and their sentences.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer.main

from moeflow.cli import app

HEAD = """# The command line

Made by `python tools/cli_docs.py docs/cli.md` from `--help`; a test checks that no command or option is missing.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a failure that has no class of its own |
| 2 | usage: the command or call does not make sense as given |
| 3 | document: a profile, hardware file, plan or manifest breaks a rule |
| 4 | checkpoint: a model is missing, of an unknown type, or incomplete |
| 5 | artifact: a packed model is incomplete, damaged or of a newer format |
| 6 | capacity: more memory or disk is asked for than there is |
| 7 | storage: the operating system refused to read or write |
| 8 | device: the accelerator is missing or cannot do what is asked |
| 130 | interrupted (Ctrl-C) |
"""


def help_of(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "TERMINAL_WIDTH": "100"}
    arguments = [sys.executable, "-m", "moeflow", *command, "--help"]
    text = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def commands() -> list[tuple[str, ...]]:
    """Every command in the order of the help, those of a group behind it."""
    found: list[tuple[str, ...]] = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found += [(name,), *((name, inner) for inner in getattr(command, "commands", ()))]
    return found


def page() -> str:
    parts = [HEAD, f"## moeflow\n\n```\n{help_of()}\n```\n"]
    parts += [f"## moeflow {' '.join(names)}\n\n```\n{help_of(*names)}\n```\n" for names in commands()]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
