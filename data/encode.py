"""Text to tokens on all cores, in order, with a bounded amount of either in memory."""

import copy
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from data.format import SPLITS
from data.split import Part
from data.tokenizer import Tokenizer

BATCH = 500_000  # characters that a thread takes at a time

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Some text of one split."""

    split: str
    tokens_T: np.ndarray
    bytes: int
    """Bytes of UTF-8 that the tokens stand for, without end-of-text."""
    documents: int
    """Documents that start here."""


def encode_all(parts: Iterable[Part], tokenizer: Tokenizer, *, separate: bool) -> Iterator[Encoded]:
    """Yield all parts as tokens, each document after an end-of-text token if `separate`."""
    own = threading.local()

    def begin_thread() -> None:
        # The regex engine in tiktoken is free of locks only for the thread that first used it: with
        # one engine for all, two threads were measured to take 1.8 times the CPU time.
        own.tokenizer = copy.deepcopy(tokenizer)

    def encode(parts: list[Part]) -> list[Encoded]:
        return encode_batch(parts, own.tokenizer, separate)

    for batch in map_in_order(encode, batched(parts), begin_thread):
        yield from batch


def encode_batch(parts: list[Part], tokenizer: Tokenizer, separate: bool) -> list[Encoded]:
    """Return the tokens of each split that occurs in `parts`."""
    batch: list[Encoded] = []
    for split in SPLITS:
        own = [part for part in parts if part.split == split]
        arrays: list[np.ndarray] = []
        for part in own:
            if separate and part.starts_document:
                arrays.append(np.array([tokenizer.end_of_text]))
            arrays.append(tokenizer.encode_array(part.text))
        if own:
            batch.append(
                Encoded(
                    split=split,
                    tokens_T=np.concatenate(arrays),
                    bytes=sum(len(part.text.encode()) for part in own),
                    documents=sum(part.starts_document for part in own),
                )
            )
    return batch


def batched(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Group parts, so that a short document is not a task of its own."""
    batch: list[Part] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    yield batch


def map_in_order(
    function: Callable[[ItemT], ResultT],
    items: Iterable[ItemT],
    begin_thread: Callable[[], None] = lambda: None,
) -> Iterator[ResultT]:
    """Map on a thread per core. Unlike Executor.map it reads only a few items ahead."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads, initializer=begin_thread) as pool:
        waiting: deque[Future[ResultT]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
