"""Draw a small text of all kinds from a corpus that corpus.py made: the same bytes from every source.

What: `python tools/corpus_sample.py corpus heldout --bytes 3000 > sample.txt` takes the middle document of each
source, or --documents spaced evenly over it, and whole lines from the middle of each, 3,000 bytes together. Pieces are
joined as the models saw documents in training, by the end token alone. `--besides 1` leaves out the documents that
--documents 1 takes and draws from the others: a second sample that shares no document with the first.
Why so: sources differ in size by thirty, the first tokens of the stream are all Bible, and the first lines of
programs are licences that training text has too.
What it does not do: draw by chance, or weigh sources as the corpus does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

END = "<|endoftext|>"


def counts(corpus: Path, part: str) -> list[int]:
    """Documents of every source in this part, in the stream's order."""
    sources = json.loads((corpus / "recipe.json").read_text())["sources"]
    origins = [document["source"] for document in json.loads((corpus / "heldout.json").read_text())]
    held = [origins.count(name) for name in dict.fromkeys(origins)]
    if part == "heldout":
        return held
    return [source["documents"] - own for source, own in zip(sources, held, strict=True)]


def middle(text: str, most: int) -> str:
    """At most `most` bytes around the middle, cut at line ends where lines are short."""
    if len(data := text.encode()) <= most:
        return text
    start = (len(data) - most) // 2
    cut = data[start : start + most].decode(errors="ignore")
    whole = "".join(cut.splitlines(keepends=True)[1:-1])
    return whole if 2 * len(whole) > len(cut) else cut


def spaced(count: int, number: int) -> list[int]:
    """Places of `number` documents spaced evenly over `count`, of all if there are fewer."""
    number = min(number, count)
    return [count * (2 * i + 1) // (2 * number) for i in range(number)]


def sample(corpus: Path, part: str, size: int, documents: int, besides: int = 0) -> str:
    """The text; a source whose documents are short gives less than `size` bytes, one with none left gives none."""
    texts = (corpus / f"{part}.txt").read_text(encoding="utf-8").split(f"\n{END}\n")
    own = counts(corpus, part)
    if sum(own) != len(texts):
        raise SystemExit(f"{corpus}: {part}.txt has {len(texts)} documents, the corpus's records say {sum(own)}")
    pieces, start = [], 0
    for count in own:
        taken = spaced(count, besides)
        left = [texts[start + i] for i in range(count) if i not in taken]
        drawn = [left[i] for i in spaced(len(left), documents)]
        pieces += [middle(text, size // len(drawn)) for text in drawn]
        start += count
    return END.join(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path, help="folder written by corpus.py")
    parser.add_argument("part", choices=("train", "heldout"))
    parser.add_argument("--bytes", type=int, required=True, help="of each source, at most")
    parser.add_argument("--documents", type=int, default=1, help="of each source")
    parser.add_argument("--besides", type=int, default=0, help="leave out what so many --documents would take")
    options = parser.parse_args()
    sys.stdout.write(sample(options.corpus, options.part, options.bytes, options.documents, options.besides))


if __name__ == "__main__":
    main()
