"""Encoding alone: python -m benchmarks.encoding --data=DATASET --text=FILE

On the same text in the same process: our encoder, which prepares datasets, on all cores; and
tiktoken's own encode_ordinary with the same vocabulary on one thread. Prints bytes per second.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from data.encode import encode_all
from data.loader import Dataset
from data.split import Part
from data.tokenizer import BPETokenizer, Tokenizer, cut
from engine.cli import parse_config, run

SAMPLE = 32_000_000  # characters; more would say the same, and not fit into small memories


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """Time the tokenizer of a dataset on a text."""

    data: Path
    """Folder that data.prepare wrote."""
    text: Path
    """A text file in UTF-8."""


def rates(tokenizer: Tokenizer, text: str) -> dict[str, float | None]:
    """Bytes per second of ours, and of tiktoken on one thread where it knows the vocabulary."""
    n_bytes = len(text.encode())
    parts = [Part("train", piece, starts_document=False) for piece in cut(text)]

    def encode() -> None:
        for _ in encode_all(parts, tokenizer, separate=False):
            pass

    found: dict[str, float | None] = {"ours": n_bytes / seconds(encode), "tiktoken": None}
    if isinstance(tokenizer, BPETokenizer):
        reference = tiktoken.Encoding(
            tokenizer.kind,
            pat_str=tokenizer.pattern,
            mergeable_ranks=tokenizer.ranks,
            special_tokens={},
        )
        found["tiktoken"] = n_bytes / seconds(lambda: reference.encode_ordinary(text))
    return found


def seconds(function: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    function()
    return time.perf_counter() - started_at


def main() -> None:
    config = parse_config(EncodingConfig)
    with open(config.text, encoding="utf-8") as file:
        text = file.read(SAMPLE)
    print(json.dumps(rates(Dataset.open(config.data).tokenizer, text)))


if __name__ == "__main__":
    run(main)
