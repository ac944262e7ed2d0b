"""`bench.py prepare`: how fast text becomes tokens, beside tiktoken's own rate."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import ours, table
from benchmarks.runs import python, run, temporary_folder
from benchmarks.table import Row, Tables, Value
from data.gpt2 import gpt2_ranks
from data.sources import Corpus
from engine.cli import at_least

MEGABYTE, MEBIBYTE = 1e6, 2**20


@dataclass(frozen=True, kw_only=True)
class PrepareBench:
    """Measure data.prepare with every tokenizer."""

    text: Path | None = None
    """A text file (default: the sources of Python's standard library, one after another)."""
    tokenizers: tuple[Literal["byte", "char", "bpe", "gpt2"], ...] = ("byte", "char", "bpe", "gpt2")
    """Which to measure."""
    repeats: int = 3
    """Rounds, in each of which every tokenizer has its turn."""

    def __post_init__(self) -> None:
        at_least(1, self, "repeats")


def measure(config: PrepareBench) -> Tables:
    """Prepare the text with each tokenizer in turn, again and again."""
    with temporary_folder() as folder:
        text = config.text or write_stdlib(folder / "stdlib.txt")
        if not text.is_file() or not text.stat().st_size:
            raise ValueError(f"{text} is not a file that holds text")
        tokenizers = list(available(config.tokenizers))
        rounds = [
            [prepared(text, tokenizer, folder / f"{turn}_{tokenizer}") for tokenizer in tokenizers]
            for turn in range(config.repeats)
        ]
    median = [table.medians(list(rows)) for rows in zip(*rounds, strict=True)]
    return {"runs": [row for rows in rounds for row in rows], "median": median}


def available(tokenizers: Iterable[str]) -> Iterator[str]:
    """Yield the tokenizers; say so where GPT-2's vocabulary cannot be had."""
    for tokenizer in tokenizers:
        try:
            if tokenizer == "gpt2":
                gpt2_ranks()
            yield tokenizer
        except OSError as error:
            print(f"gpt2 is left out: {error}", file=sys.stderr)


def write_stdlib(path: Path) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        for pieces in Corpus.find(["stdlib"]).documents():
            file.writelines(pieces)
    return path


def prepared(text: Path, tokenizer: str, out: Path) -> Row:
    """Prepare once, and time the encoding alone beside tiktoken's."""
    finished = ours.prepare(text, tokenizer, out)
    command = python("-m", "benchmarks.encoding", f"--data={out}", f"--text={text.resolve()}")
    rates = json.loads(run(command).lines[-1].text)
    shutil.rmtree(out)
    megabytes, cores = text.stat().st_size / MEGABYTE, os.cpu_count() or 1
    reference = rates["tiktoken"] and rates["tiktoken"] * cores
    return {
        "tokenizer": tokenizer,
        "whole process s": finished.seconds,
        "whole process MB/s": megabytes / finished.seconds,
        "encoding MB/s": rates["ours"] / MEGABYTE,
        "tiktoken, 1 thread x cores MB/s": reference and reference / MEGABYTE,
        "encoding / that": share(rates["ours"], reference),
        "whole process / that": share(megabytes * MEGABYTE / finished.seconds, reference),
        "peak MiB": finished.peak_bytes / MEBIBYTE,
    }


def share(rate: float, reference: float | None) -> Value:
    return rate / reference if reference else None
