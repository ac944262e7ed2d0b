"""`bench.py prepare`: how fast text becomes tokens, beside tiktoken's own rate."""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken

from benchmarks.runs import Finished, python, run, seconds_of, temporary_folder
from benchmarks.table import MEBIBYTE, Repeated, Row, Tables, medians
from data.encode import encode_all
from data.sources import Corpus
from data.split import Part
from data.tokenizer import BPETokenizer, Tokenizer

PIECES = 100  # of half a million characters, for encoding alone: memory may not hold more


@dataclass(frozen=True, kw_only=True)
class Prepare(Repeated):
    """Measure data.prepare with every tokenizer."""

    text: str = "stdlib"
    """A source of data.prepare: a named corpus, a file or a folder."""
    tokenizers: tuple[Literal["byte", "char", "bpe", "gpt2"], ...] = ("byte", "char", "bpe")
    """Tokenizers to measure; gpt2 downloads its vocabulary once."""

    def measure(self) -> Tables:
        """Prepare the text with each tokenizer in turn, again and again; then only encode it."""
        kinds = self.tokenizers
        with temporary_folder() as folder:
            rounds = range(self.repeats)
            runs = [{k: prepare(self.text, k, folder / k) for k in kinds} for _ in rounds]
            rows = [row(k, self.text, found[k], folder / k) for found in runs for k in kinds]
        median = [medians([r for r in rows if r["tokenizer"] == kind]) for kind in kinds]
        return {"runs": rows, "median": median}


def prepare(text: str | Path, tokenizer: str, out: Path) -> Finished:
    """Run data.prepare in a process of its own."""
    return run(python("-m", "data.prepare", text, f"--tokenizer={tokenizer}", f"--out={out}"))


def row(kind: str, text: str, finished: Finished, data: Path) -> Row:
    """Return the rates of a preparation, and of the encoding alone beside tiktoken's."""
    from data.loader import Dataset  # and so torch: not before a run, see Finished.peak_bytes

    dataset = Dataset.open(data)
    megabytes = sum(split["bytes"] for split in dataset.meta["splits"].values()) / 1e6
    ours, reference = encoding_rates(dataset.tokenizer, text)
    return {
        "tokenizer": kind,
        "whole process s": finished.seconds,
        "whole process MB/s": megabytes / finished.seconds,
        "encoding MB/s": ours,
        "tiktoken, 1 thread x cores MB/s": reference,
        "encoding / that": reference and ours / reference,
        "whole process / that": reference and megabytes / finished.seconds / reference,
        "peak MiB": finished.peak_bytes / MEBIBYTE,
    }


def encoding_rates(tokenizer: Tokenizer, text: str) -> tuple[float, float | None]:
    """Return MB/s of our encoder on all cores, and of tiktoken's on one thread, times the cores."""
    pieces = itertools.chain.from_iterable(Corpus.find([text]).documents())
    parts = [Part("train", one, starts_document=False) for one in itertools.islice(pieces, PIECES)]
    megabytes = sum(len(part.text.encode()) for part in parts) / 1e6
    ours = megabytes / seconds_of(lambda: list(encode_all(parts, tokenizer, separate=False)))
    if not isinstance(tokenizer, BPETokenizer):
        return ours, None
    theirs = tiktoken.Encoding(
        "theirs", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks, special_tokens={}
    )
    alone = seconds_of(lambda: [theirs.encode_ordinary(part.text) for part in parts])
    return ours, megabytes / alone * (os.cpu_count() or 1)
