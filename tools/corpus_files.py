"""Readers of documentation and program code in Debian packages, for the mixed corpus.

What: `files` makes a document of each text file under a folder (plain or gzip), `pages` of each HTML page.
Why so: a file is the unit that its author wrote, so holding out whole files keeps related lines together.
Text stays as it is, indentation and accents included: the kinds of text differ in just such things.
What it does not do: parse any markup but HTML; reStructuredText, POD and Markdown are read as their authors do.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

from corpus_books import Document

LONGEST, SHORTEST = 200_000, 400  # bytes; longer files are generated tables and logs, shorter ones say nothing


def clean(raw: bytes) -> str:
    """UTF-8 text with unix line ends, no trailing blanks and at most one blank line in a row."""
    text = raw.decode("utf-8", errors="ignore").replace("\r\n", "\n").replace("\f", "\n").replace("\0", "")
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def files(folder: Path, pattern: str, unwanted: str = r"(?!)") -> list[Document]:
    """Files whose names match the glob `pattern` (with or without .gz), but not the expression `unwanted`.

    The key is the path below `folder`; of equal files the first in order of keys stays.
    """
    found = {}
    for path in sorted({*folder.rglob(pattern), *folder.rglob(f"{pattern}.gz")}):
        key = path.relative_to(folder).as_posix()
        if not path.is_file() or path.is_symlink() or re.search(unwanted, key):
            continue
        text = clean(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        if SHORTEST <= len(text) <= LONGEST:
            found.setdefault(text, Document(key, text))
    return list(found.values())


class PageText(HTMLParser):
    """Collects the text of paragraphs, headings, list entries and listings; navigation is left out."""

    BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "pre", "dt", "dd", "td", "th"})
    HIDDEN = frozenset({"head", "script", "style"})
    NAVIGATION = frozenset({"docnav", "banner", "breadcrumbs", "toc"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tags around the current position, and whether they hide

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in {"br", "hr", "img", "meta", "link", "input", "col"}:
            return
        names = {name for key, value in attributes if key in {"class", "id"} for name in (value or "").split()}
        self.open.append((tag, tag in self.HIDDEN or bool(names & self.NAVIGATION)))
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        while any(name == tag for name, _ in self.open):
            if self.open.pop()[0] == tag:
                break
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not any(hides for _, hides in self.open):
            listing = any(tag == "pre" for tag, _ in self.open)
            self.parts.append(data if listing else re.sub(r"\s+", " ", data))


def pages(folder: Path, languages: Iterable[str]) -> list[Document]:
    """HTML pages of each language's folder; the key is the page's name, so that translations share it."""
    documents = []
    for language in languages:
        for path in sorted((folder / language).glob("*.html")):
            parser = PageText()
            parser.feed(path.read_text("utf-8"))
            text = re.sub(r"\n\s*\n\s*", "\n\n", re.sub(r" +\n|\n +(?=\n)", "\n", "".join(parser.parts))).strip()
            if SHORTEST <= len(text) <= LONGEST:
                documents.append(Document(path.stem, text))
    return documents


def rank(key: str) -> int:
    """A number that orders keys at random, but on every machine alike."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def capped(documents: list[Document], most: int) -> list[Document]:
    """At most `most` bytes of whole documents, drawn by `rank`, in their own order."""
    kept, total = set(), 0
    for document in sorted(documents, key=lambda document: (rank(document.key), document.text)):
        total += document.size
        if total > most:
            break
        kept.add(document)
    return [document for document in documents if document in kept]
