"""Turn text into token files: python -m data.prepare SOURCE... [--tokenizer=bpe] [--out=DIR]

A SOURCE is a named corpus (such as stdlib or tinystories), a file or a folder. If there is more
than one document, each begins with the end-of-text token, so that generation can start from it.
"""

import math
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import Positional, parse_config, run
from data import pieces
from data.corpora import HUB
from data.encode import encode_all
from data.format import SPLITS
from data.learn import KINDS, Learn
from data.parquet import COLUMN
from data.progress import print_left_out, progress
from data.shards import adopt, find_shards
from data.sources import NAMED, Corpus
from data.split import Scan
from data.stories import read_nats
from data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from data.writer import DatasetWriter, new_dataset
from files import reserved


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text into token files that train.py reads."""

    sources: Positional[tuple[str, ...]] = ()
    """Folders, files (.txt, .jsonl, .parquet, code; .gz), or named corpora: stdlib, shakespeare,
    plays, stories, tinystories, wikitext, openwebtext, fineweb-edu. fineweb-edu:2 takes the first
    two of its files, and fineweb-edu:FOLDER those in a folder."""
    tokenizer: str = "bpe"
    """bpe learns merges from the text, gpt2 takes GPT-2's; byte; char; or a run's folder."""
    vocab_size: int = 0
    """Size of a bpe vocabulary, counting the 256 bytes and end-of-text; 0 takes 4096."""
    out: Path | None = None
    """Folder to write; by default data/SOURCE_TOKENIZER, such as data/stdlib_bpe."""
    val_fraction: float = 0
    """Fraction of the text that is held back for validation; 0 takes 0.1, of more than half a
    gigabyte in several files 0.001, and of named corpora what data/corpora.py says."""
    column: str = COLUMN
    """Column of .parquet files, or field of .jsonl files, that holds the text."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(f"name a file, a folder or one of {NAMED} to prepare")
        if self.tokenizer not in KINDS and not Path(self.tokenizer).is_dir():
            kinds = ", ".join(KINDS)
            raise ValueError(f"tokenizer must be {kinds} or a run's folder: got {self.tokenizer}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1: got {self.val_fraction}")
        least = ByteTokenizer.vocab_size
        if self.vocab_size and (self.tokenizer != "bpe" or self.vocab_size < least):
            raise ValueError(
                f"vocab_size is for bpe only, and at least {least} (the bytes and end-of-text): "
                f"got vocab_size={self.vocab_size}, tokenizer={self.tokenizer}; leave it out"
            )

    @property
    def folder(self) -> Path:
        """Return the folder to write: books/emma.txt.gz -> data/emma_bpe."""
        name, _, _ = self.sources[0].partition(":")
        source = name if name in HUB else self.sources[0]
        stem = Path(source).resolve().name.split(".")[0]
        return self.out or Path("data", f"{stem}_{Path(self.tokenizer).name}")


def prepare(config: PrepareConfig) -> None:
    """Turn the sources into a dataset. Nothing is put in place before all have been read."""
    shards = find_shards(config.sources)
    if shards and (config.val_fraction or config.column != COLUMN):
        raise ValueError(
            f"{config.sources[0]} has tokens, which are split already and have no columns: leave "
            "out --val_fraction and --column"
        )
    with reserved(config.folder):
        meta = adopt(shards, config.folder, config.tokenizer) if shards else write(config)
    report(config.folder, meta)


def write(config: PrepareConfig) -> dict[str, Any]:
    """Write the tokens of the sources; return meta.json."""
    corpus = Corpus.find(config.sources, config.column)
    parts = tuple(pieces.cut(corpus))
    most = pieces.VAL_FRACTION if len(parts) > 1 else 1.0
    fraction = config.val_fraction or min(corpus.val_fraction, most)
    about: dict[str, Any] = {"sources": config.sources, "val_fraction": fraction}
    print_left_out("not UTF-8 text", corpus.skipped)
    known = None if config.tokenizer in KINDS else tokenizer_of(Path(config.tokenizer))
    # An even sample of a small text needs the size of all of it; no other tokenizer than bpe does
    scan = Scan.of(corpus, fraction, complete=config.tokenizer == "bpe" and len(parts) == 1)
    if len(parts) > 1 and not scan.is_complete:
        learn = Learn(config.tokenizer, config.vocab_size, corpus, scan, parts, known)
        return pieces.write(config.folder, parts, about | {"column": config.column}, learn)
    tokenizer = Learn(config.tokenizer, config.vocab_size, corpus, scan, known=known).tokenizer()
    total = scan.bytes if scan.is_complete else corpus.bytes
    with new_dataset(config.folder, tokenizer) as writer, progress("encode", total) as bar:
        for encoded in encode_all(scan.parts(corpus), tokenizer, separate=scan.documents > 1):
            writer.files[encoded.part.split].write(encoded)
            bar.update(encoded.bytes)
        if config.sources == ("stories",):
            about["entropy"] = entropy(read_nats(), scan, writer)
        return writer.commit(**about)


def tokenizer_of(run: Path) -> Tokenizer:
    """Return the tokenizer of a run's best checkpoint."""
    from engine import checkpoint  # imports torch, which nothing else here needs

    return load_tokenizer(checkpoint.load(run, "best")["tokenizer"])


def entropy(nats: list[float], scan: Scan, writer: DatasetWriter) -> dict[str, dict[str, float]]:
    """Return the loss of the grammar itself on each split: on average, no model has a lower one.

    End-of-text costs nothing, because "The end." announces it. The first token is not predicted.
    """
    found: dict[str, dict[str, float]] = {}
    for split, file in writer.files.items():
        costs = zip(nats, scan.validates, strict=True)
        total = math.fsum(cost for cost, validates in costs if SPLITS[validates] == split)
        found[split] = {
            "nats": total,
            "per_token": total / (file.tokens - 1),
            "bits_per_byte": total / math.log(2) / file.bytes,
        }
    return found


def report(folder: Path, meta: dict[str, Any]) -> None:
    """Print what was written, and what to type next."""
    preset = "quickstart"
    if "entropy" in meta:
        preset = "stories"
        per_token = meta["entropy"]["val"]["per_token"]
        print(f"the entropy of val: {per_token:.4f} nats per token")
    splits = meta["splits"]
    ratio = sum(s["bytes"] for s in splits.values()) / sum(s["tokens"] for s in splits.values())
    vocabulary = f"{meta['vocab_size']:,} tokens, {ratio:.2f} bytes per token"
    print(f"{folder}: a vocabulary of {vocabulary}")
    for split, about in splits.items():
        sizes = f"{about['bytes']:,} bytes, {about['documents']:,} documents"
        print(f"  {split:5} {about['tokens']:>13,} tokens, {sizes}")
    flags = shlex.join((f"--data.path={folder}", f"--out_dir=out/{folder.name}"))
    print(f"next: python train.py config/{preset}.toml {flags}")


def main() -> None:
    """Prepare what the command line asks for. SIGTERM cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    prepare(parse_config(PrepareConfig))


if __name__ == "__main__":
    run(main)
