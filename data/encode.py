"""Encode text on all cores, in order, with little of the text and its tokens in memory at once."""

import copy
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from data.split import Part
from data.tokenizer import Tokenizer

BATCH = 500_000  # characters that a thread encodes at a time


class Encoded(NamedTuple):
    """A part of a document and its tokens."""

    part: Part
    tokens_N: np.ndarray  # with end-of-text in front, where it is needed
    bytes: int  # of the text in UTF-8: end-of-text counts for none


def encode_all(parts: Iterable[Part], tokenizer: Tokenizer, *, separate: bool) -> Iterator[Encoded]:
    """Yield all parts with their tokens; `separate` puts end-of-text before each document.

    Raises ValueError if the tokenizer has no end-of-text to separate them by.
    """
    if separate:
        check_end_of_text(tokenizer)
    own = threading.local()

    def begin_thread() -> None:
        # The regex engine in tiktoken is free of locks only for the thread that used it first: two
        # threads that shared one engine were measured to take 1.8 times the CPU time.
        own.tokenizer = copy.deepcopy(tokenizer)

    def encode(batch: list[Part]) -> list[Encoded]:
        return [encode_part(part, own.tokenizer, separate) for part in batch]

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads, initializer=begin_thread) as pool:
        waiting: deque[Future[list[Encoded]]] = deque()
        for batch in batched(parts):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * threads:  # Executor.map would read all the text ahead
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def check_end_of_text(tokenizer: Tokenizer) -> None:
    """Raise ValueError if a tokenizer has nothing to separate documents by."""
    if tokenizer.end_of_text is None:
        kind = tokenizer.state()["kind"]
        raise ValueError(
            f"several documents are separated by end-of-text, which this {kind} tokenizer has not: "
            "give one document, or another --tokenizer"
        )


def encode_part(part: Part, tokenizer: Tokenizer, separate: bool) -> Encoded:
    """Return the tokens of a part, after end-of-text if it starts a document and `separate`."""
    before = [tokenizer.end_of_text] if separate and part.starts_document else []
    tokens_N = np.concatenate([np.array(before, np.uint32), tokenizer.encode_array(part.text)])
    return Encoded(part, tokens_N, len(part.text.encode()))


def batched(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Group parts, because handing each short document to a thread of its own would take long."""
    batch: list[Part] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH:
            yield batch
            batch = []
            characters = 0
    yield batch
