"""Text to token files: python -m data.prepare SOURCE... [--tokenizer=bpe] [--out=DIR]

A SOURCE is a named corpus (stdlib, shakespeare, stories), a file or a folder. Where there is more
than one document, each begins with the end-of-text token, so that generation can start from it.
"""

import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from data.bpe import train_bpe
from data.encode import encode_all
from data.gpt2 import gpt2_ranks
from data.sources import NAMED, Corpus
from data.split import Scan
from data.stories import read_nats
from data.tokenizer import (
    GPT2_PATTERN,
    N_BYTES,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from data.writer import DatasetWriter, new_dataset
from engine.cli import Positional, parse_config, run

BPE_VOCAB_SIZE = 4096
BPE_TRAINING_CHARACTERS = 16_000_000  # more text hardly changes the merges, and costs memory


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text into token files that train.py reads."""

    sources: Positional[tuple[str, ...]] = ()
    """Named corpora (stdlib, shakespeare, stories), folders, files (.txt, .jsonl, code; .gz)."""

    tokenizer: Literal["bpe", "gpt2", "byte", "char"] = "bpe"
    """bpe is trained on the text; gpt2 is GPT-2's own; byte and char have no merges."""

    vocab_size: int = 0
    """Tokens of a bpe vocabulary, with the 256 bytes and end-of-text; 0 for 4096."""

    out: Path | None = None
    """Folder to write (default: data/ and the first source's name and the tokenizer's)."""

    val_fraction: float = 0.1
    """Fraction of the text that is held back for validation."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(f"name a file, a folder or one of {', '.join(NAMED)} to prepare")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1: got {self.val_fraction}")
        if self.vocab_size and self.tokenizer != "bpe":
            raise ValueError(
                f"vocab_size is chosen for bpe only: got tokenizer={self.tokenizer}, "
                f"vocab_size={self.vocab_size}; leave one of them out"
            )
        if self.vocab_size and self.vocab_size <= N_BYTES:
            raise ValueError(
                f"vocab_size must be at least {N_BYTES + 1} (the bytes and end-of-text): "
                f"got {self.vocab_size}"
            )

    @property
    def folder(self) -> Path:
        """Return the folder to write: books/emma.txt.gz -> data/emma_bpe."""
        stem = Path(self.sources[0]).resolve().name.split(".")[0]
        return self.out or Path("data", f"{stem}_{self.tokenizer}")


def prepare(config: PrepareConfig) -> None:
    """Tokenize the sources into a folder. Nothing is written before all of them were read."""
    corpus = Corpus.find(config.sources)
    if corpus.skipped:
        names = ", ".join(path.name for path in corpus.skipped[:3])
        print(f"not UTF-8 text, so left out: {len(corpus.skipped)} files, such as {names}")
    scan = Scan.of(corpus, config.val_fraction)
    tokenizer = make_tokenizer(config, corpus, scan)
    with new_dataset(config.folder, tokenizer) as writer:
        with progress("encode", scan) as bar:
            for encoded in encode_all(scan.parts(corpus), tokenizer, separate=scan.documents > 1):
                writer.files[encoded.split].write(encoded)
                bar.update(encoded.bytes)
        about: dict[str, Any] = {"sources": config.sources, "val_fraction": config.val_fraction}
        if config.sources == ("stories",):
            about["entropy"] = entropy(read_nats(), scan, writer)
        writer.commit(**about)
    if "entropy" in about:
        print(f"the entropy of val: {about['entropy']['val']['per_token']:.4f} nats per token")
    print(summary(writer, preset="stories" if "entropy" in about else "quickstart"))


def entropy(nats: list[float], scan: Scan, writer: DatasetWriter) -> dict[str, dict[str, float]]:
    """What each split costs under the grammar that wrote it: on average no model costs less.

    An end of text costs nothing, as "The end." announces it. The first token is not predicted.
    """
    found: dict[str, dict[str, float]] = {}
    for split, file in writer.files.items():
        in_val = split == "val"
        total = math.fsum(n for n, val in zip(nats, scan.validates, strict=True) if val == in_val)
        per_token, bits_per_byte = total / (file.tokens - 1), total / math.log(2) / file.bytes
        found[split] = {"nats": total, "per_token": per_token, "bits_per_byte": bits_per_byte}
    return found


def make_tokenizer(config: PrepareConfig, corpus: Corpus, scan: Scan) -> Tokenizer:
    """Return the tokenizer that `config` asks for, made from the text where that is its nature."""
    match config.tokenizer:
        case "gpt2":
            return BPETokenizer(gpt2_ranks(), kind="gpt2")
        case "byte":
            return ByteTokenizer()
        case "char":
            characters: set[str] = set()
            for pieces in corpus.documents():
                characters.update(*pieces)
            return CharTokenizer("".join(characters), with_end_of_text=scan.documents > 1)
        case "bpe":
            vocab_size = config.vocab_size or BPE_VOCAB_SIZE
            ranks = train_bpe(training_sample(corpus, scan), vocab_size - 1, GPT2_PATTERN)
            if len(ranks) < vocab_size - 1:
                print(f"the text has pairs for {len(ranks) + 1:,} tokens, not for {vocab_size:,}")
            return BPETokenizer(ranks, kind="bpe")


def training_sample(corpus: Corpus, scan: Scan) -> Iterator[str]:
    """Yield text of the training split, evenly from all of it where there is much."""
    share = min(1, BPE_TRAINING_CHARACTERS / scan.characters)
    seen = taken = 0
    with progress("learn", scan) as bar:
        for part in scan.parts(corpus):
            bar.update(len(part.text.encode()))
            seen += len(part.text)
            if part.split == "train" and taken < share * seen:
                taken += len(part.text)
                yield part.text


def progress(verb: str, scan: Scan) -> tqdm:
    """Return a bar that counts the bytes of text done; it is not drawn into a file or a pipe."""
    return tqdm(total=scan.bytes, desc=verb, unit="B", unit_scale=True, disable=None)


def summary(writer: DatasetWriter, preset: str) -> str:
    """Say what was written, and what to type next."""
    lines = [
        f"  {split:5} {file.tokens:>13,} tokens, {file.bytes:,} bytes, {file.documents:,} documents"
        for split, file in writer.files.items()
    ]
    n_bytes = sum(file.bytes for file in writer.files.values())
    tokens = sum(file.tokens for file in writer.files.values())
    vocabulary = f"{writer.tokenizer.vocab_size:,} tokens, {n_bytes / tokens:.2f} bytes per token"
    return "\n".join(
        [
            f"{writer.folder}: a vocabulary of {vocabulary}",
            *lines,
            f"next: python train.py config/{preset}.toml --data.path={writer.folder} "
            f"--out_dir=out/{writer.folder.name}",
        ]
    )


def main() -> None:
    """Prepare what the command line asks for; a termination cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    prepare(parse_config(PrepareConfig))


if __name__ == "__main__":
    run(main)
