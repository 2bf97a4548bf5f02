"""Readers that turn Debian text packages of books into plain English documents.

What: one function per source; each returns `Document`s (chapters, plays, psalms, dictionary letters)
in the order of the book, as ASCII paragraphs separated by blank lines.
Why so: the three container formats (SWORD zText/zCom modules, R lazy-load databases, dictd files) are
zlib streams with small indexes, so reading them here is shorter and more repeatable than installing and
driving each format's own program, and gives the same bytes on every machine.
What it does not do: download packages or decide what is held out (see corpus_sources.py); it is no general
reader of those formats, only of the modules named here.
"""

from __future__ import annotations

import gzip
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """One contiguous piece of a source: `key` names it ("Gen.1", "hamlet"); text of books is clean ASCII."""

    key: str
    text: str

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode())


PUNCTUATION = str.maketrans(
    {
        "‘": "'", "’": "'", "‛": "'", "´": "'", "`": "'",  # noqa: RUF001
        "“": '"', "”": '"', "–": "-", "—": "--", "…": "...",  # noqa: RUF001
        "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe",
    }
)  # fmt: skip


def to_ascii(text: str) -> str:
    """Fold typography and accents to ASCII and drop what is left (Hebrew and Greek words)."""
    folded = unicodedata.normalize("NFKD", text.translate(PUNCTUATION))
    return folded.encode("ascii", "ignore").decode("ascii")


def tidy(paragraphs: Iterable[str]) -> str:
    """Join paragraphs with blank lines, repairing the punctuation that removed references leave behind."""
    kept = []
    for paragraph in paragraphs:
        line = re.sub(r"[ \t\r\n]+", " ", to_ascii(paragraph)).strip()
        line = re.sub(r"\(\s*[;,.]*\s*\)|\[\s*\]", "", line)
        line = re.sub(r"\s+([,;:.!?)])", r"\1", line)
        line = re.sub(r"([,;:]\s*)+([.;:,])", r"\2", line)
        if len(line) > 1 and re.search(r"[a-z]", line):
            kept.append(re.sub(r" {2,}", " ", line))
    return "\n\n".join(kept)


def unwrap(text: str) -> list[str]:
    """Undo hard line wrapping: blank lines end paragraphs, single line ends are spaces."""
    return re.split(r"\n\s*\n", text.replace("\r", "").replace("_", ""))


def sword_entries(module: Path) -> Iterator[str]:
    """Every verse slot of a SWORD zText/zCom module, in canonical order, as OSIS markup."""
    for testament in ("ot", "nt"):
        stem = next(module.glob(f"{testament}.?zs")).name[:4]
        blocks = (module / f"{stem}zs").read_bytes()
        slots = (module / f"{stem}zv").read_bytes()
        packed = (module / f"{stem}zz").read_bytes()
        unpacked = [
            zlib.decompress(packed[start : start + size]) if size else b""
            for start, size, _ in struct.iter_unpack("<III", blocks)
        ]
        # zCom4 modules have 32-bit sizes, older drivers 16-bit; the file name tells them apart ("c" or "b").
        layout = "<III" if stem[3] == "c" else "<IIH"
        for block, start, size in struct.iter_unpack(layout, slots):
            yield unpacked[block][start : start + size].decode("utf-8") if size else ""


def osis_paragraphs(markup: str) -> list[str]:
    """Plain paragraphs of OSIS markup, without titles, tables, footnotes and cross references."""
    unwanted = "note|title|table|reference|foreign|speaker"
    markup = re.sub(rf"<({unwanted})\b[^>]*(?<!/)>.*?</\1>", " ", markup, flags=re.S)
    markup = re.sub(r'<hi type="bold">.{0,40}?</hi>', " ", markup, flags=re.S)  # "Verses 3-5"
    markup = re.sub(r'<div[^>]*(?:sID|eID)="gen\d+"[^>]*>', "\n\n", markup)
    return [re.sub(r"<[^>]*>", "", part) for part in markup.split("\n\n")]


def sword_chapters(module: Path) -> list[Document]:
    """One document per Bible chapter; what precedes a book's first chapter (titles, prefaces) is left out."""
    chapters: dict[str, list[str]] = {}
    key, previous = "", ""
    for entry in sword_entries(module):
        start = re.search(r'<chapter [^>]*sID="([^"]+)"[^>]*>', entry)
        if start:
            key = start.group(1)
            entry = entry[start.end() :]
        elif re.search(r'<div [^>]*type="book"', entry):
            key = ""
        # Commentaries repeat one note in each verse slot that it covers.
        if key and entry and entry != previous:
            chapters.setdefault(key, []).append(entry)
        previous = entry
    documents = [Document(name, tidy(osis_paragraphs(" ".join(parts)))) for name, parts in chapters.items()]
    return [document for document in documents if len(document.text) > 200]


def spurgeon_psalms(module: Path) -> list[Document]:
    """Spurgeon's exposition of each psalm and the notes he quotes; sermon outlines are left out."""
    documents, key = [], ""
    for entry in sword_entries(module):
        start = re.search(r'<chapter [^>]*sID="([^"]+)"', entry)
        key = start.group(1) if start else key
        parts = re.split(r"<title[^>]*>([^<]*)</title>", entry)
        wanted = ("EXPOSITION", "EXPLANATORY")
        bodies = [b for name, b in zip(parts[1::2], parts[2::2], strict=True) if name.startswith(wanted)]
        text = tidy(osis_paragraphs("\n\n".join(bodies)))
        if len(text) > 200:
            documents.append(Document(key, text))
    return documents


def r_strings(database: Path) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: each chunk is a length and a zlib stream (XDR)."""
    raw = database.read_bytes()
    while raw:
        stream = zlib.decompressobj()
        data = stream.decompress(raw[4:])
        raw = stream.unused_data
        # Serialization header: "X\n", three versions, then the native encoding's length and name.
        position = 18 + struct.unpack_from(">I", data, 14)[0]
        count = struct.unpack_from(">I", data, position + 4)[0]
        position += 8
        strings = []
        for _ in range(count):
            length = struct.unpack_from(">I", data, position + 4)[0]
            strings.append(data[position + 8 : position + 8 + length].decode("utf-8"))
            position += 8 + length
        yield strings


def novel_chapters(name: str, text: str, heading: str) -> list[Document]:
    """Split a novel at its chapter headings; the front matter before the first one is dropped."""
    parts = re.split(heading, text, flags=re.M)[1:]
    documents = [Document(f"{name}.{number}", tidy(unwrap(part))) for number, part in enumerate(parts, 1)]
    return [document for document in documents if len(document.text) > 500]


def austen(database: Path) -> list[Document]:
    """Jane Austen's six novels, one document per chapter."""
    documents = []
    for lines in r_strings(database):
        name = lines[0].title().replace(" ", "")
        text = re.sub(r"(?im)^\s*(?:the end|finis|volume \w+)\.?\s*$", "", "\n".join(lines))
        documents += novel_chapters(name, text, r"(?i)^\s*chapter [ivxlc\d]+\.?\s*$")
    return documents


def moby_dick(database: Path) -> list[Document]:
    """Moby-Dick without the e-text's header, footer and the book's opening extracts."""
    text = next(r_strings(database))[0].replace("\r", "")
    text = text[: text.index("End of Project Gutenberg")]
    return novel_chapters("MobyDick", text, r"^CHAPTER \d+\. .*$|^Epilogue$")


def verse(folder: Path, pattern: str) -> list[Document]:
    """Plays and poems, one document per file, lines kept as they are printed."""
    documents = []
    for path in sorted(folder.glob(pattern)):
        text = to_ascii(path.read_text("utf-8", errors="ignore")).replace("\r", "").replace("_", "")
        text = re.sub(r"[ \t]+", " ", re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text))
        documents.append(Document(path.stem.removesuffix("_gut"), re.sub(r"\n{3,}", "\n\n", text).strip()))
    return documents


def dictionary_letters(archive: Path, first_entry: str) -> list[Document]:
    """A dictd dictionary as one document per run of about 20 kB of entries, link braces removed."""
    text = to_ascii(gzip.decompress(archive.read_bytes()).decode("utf-8", errors="ignore"))
    text = text[text.index(first_entry) :]
    text = re.sub(r"(?m)^ ?/[^\n]*/,? ", " ", text)  # pronunciations
    paragraphs = unwrap(text.replace("{", "").replace("}", ""))
    documents, run, length = [], [], 0
    for paragraph in paragraphs:
        run.append(paragraph)
        length += len(paragraph)
        if length > 20_000:
            documents.append(Document(f"part.{len(documents) + 1}", tidy(run)))
            run, length = [], 0
    return [*documents, Document(f"part.{len(documents) + 1}", tidy(run))]
