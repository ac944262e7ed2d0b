"""Token files to batches, as a pure function of (seed, step): nothing to save, nothing to restore.

Each rank computes the same order and takes its own rows, so a run can stop, resume or change
its number of devices and still see the same data.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.format import FORMAT_VERSION, META, RANKS, SPLITS, check_sha256, token_dtype, token_file
from data.tokenizer import Tokenizer, load_tokenizer
from data.windows import cut_windows

IGNORED = -100  # the target that torch's cross_entropy leaves out by default
QUICKLY_READ = 200_000_000  # bytes; a file up to this size is checked in whole when it is opened
Batch = tuple[Tensor, Tensor]  # tokens_BT, targets_BT


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are."""

    path: Path = Path("data/stdlib_bpe")
    """Folder that data.prepare wrote."""


class Dataset:
    """A folder that data.prepare wrote, checked. Make one with `Dataset.open`."""

    def __init__(self, path: Path, meta: dict[str, Any], tokenizer: Tokenizer):
        self.path, self.meta, self.tokenizer = path, meta, tokenizer
        self.vocab_size, self.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text

    @classmethod
    def open(cls, path: Path) -> "Dataset":
        """Open a dataset. Raises FileNotFoundError or ValueError if it is none, or is damaged."""
        if not (path / META).is_file():
            raise FileNotFoundError(
                f"{path} is not a prepared dataset (it has no {META}): "
                f"run python -m data.prepare SOURCE --out={path}"
            )
        try:
            meta = json.loads((path / META).read_bytes())
            if meta["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version is {meta['format_version']}: not known here")
            dataset = cls(path, meta, read_tokenizer(path, meta["tokenizer"]))
            if dataset.vocab_size != meta["vocab_size"]:
                raise ValueError(f"vocab_size should be {dataset.vocab_size}")
            for split in SPLITS:
                dataset._check(split)
            return dataset
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{META} lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is damaged: {reason}; prepare it again") from error

    def tokens(self, split: str, first: int = 0) -> np.ndarray:
        """Return the ids of "train" or "val", or the `first` so many, as they lie on the disk."""
        ids = np.memmap(self.path / token_file(split), token_dtype(self.vocab_size), mode="r")
        return ids[: first or None]

    def bits_per_byte(self, loss: float) -> float:
        """Return a validation loss in nats per token as bits per byte, whatever the tokenizer."""
        val = self.meta["splits"]["val"]
        return loss / math.log(2) * val["tokens"] / val["bytes"]

    def entropy(self, first: int = 0) -> float | None:
        """Return the least mean loss of validation in nats per token, where it is known."""
        known = "entropy" in self.meta and not first
        return self.meta["entropy"]["val"]["per_token"] if known else None

    def fitting_vocab_size(self, asked: int) -> int:
        """Return `asked`, or for 0 the dataset's own. Raises ValueError if it is too small."""
        if 0 < asked < self.vocab_size:
            raise ValueError(
                f"model.vocab_size must hold the {self.vocab_size} tokens of {self.path}: "
                f"got {asked}; leave it out to take the dataset's"
            )
        return asked or self.vocab_size

    @property
    def documents(self) -> int:
        """Return the number of training texts; with more than one, each starts with end-of-text."""
        return self.meta["splits"]["train"]["documents"]

    def _check(self, split: str) -> None:
        """Raise ValueError if a token file is not the one that meta.json describes."""
        about, file = self.meta["splits"][split], self.path / token_file(split)
        expected = about["tokens"] * token_dtype(self.vocab_size).itemsize
        if (size := file.stat().st_size) != expected:
            raise ValueError(f"{file.name} should have {expected} bytes, not {size}")
        if size <= QUICKLY_READ:
            tokens = self.tokens(split)
            check_ids(tokens, self.vocab_size)
            check_sha256(file.name, tokens.data, about["sha256"])


def read_tokenizer(path: Path, state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that meta.json describes, or whose ranks it has in a file."""
    if "ranks_sha256" in state:
        ranks = (path / RANKS).read_bytes()
        check_sha256(RANKS, ranks, state["ranks_sha256"])
        state = {**state, "ranks": ranks.decode()}
    return load_tokenizer(state)


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError if a token is outside the vocabulary: a GPU would only say "assert"."""
    if tokens.max(initial=0) >= vocab_size:
        raise ValueError(f"token {tokens.max()} is outside its vocabulary of {vocab_size}")


class Batches:
    """Windows of a split in a seeded order, each once per epoch."""

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        vocab_size: int,
        context_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size % world_size:
            raise ValueError(
                f"the number of processes must divide batch_size: got batch_size={batch_size}, "
                f"{world_size} processes"
            )
        if len(tokens) <= context_length:
            raise ValueError(
                f"a text must be longer than one context: got {len(tokens)} tokens, "
                f"context_length={context_length}; give more text or a smaller context_length"
            )
        self.tokens, self.vocab_size, self.seed = tokens, vocab_size, seed
        self.context_length, self.batch_size = context_length, batch_size
        self.rows = batch_size // world_size
        self.first_row = rank * self.rows
        # One window fewer than could fit leaves room to shift the grid by up to a context.
        self.n_windows = max(1, len(tokens) // context_length - 1)
        self.n_offsets = min(context_length, len(tokens) - self.n_windows * context_length)
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> Batch:
        """Return this rank's inputs and targets of a step; targets are one token later."""
        first = step * self.batch_size + self.first_row
        starts = map(self._start, range(first, first + self.rows))
        windows = [self.tokens[start : start + self.context_length + 1] for start in starts]
        windows_BS = np.stack(windows).astype(np.int64)  # S = T + 1
        check_ids(windows_BS, self.vocab_size)
        return torch.tensor(windows_BS[:, :-1]), torch.tensor(windows_BS[:, 1:])

    def _start(self, sample: int) -> int:
        """Return where the window of the run's n-th sample starts."""
        epoch, i = divmod(sample, self.n_windows)
        if epoch != self._epoch:  # keeps one epoch's order, since most samples share it
            rng = np.random.default_rng([self.seed, epoch])
            offset = rng.integers(self.n_offsets)  # so that windows begin elsewhere each time
            self._epoch = epoch
            self._starts = offset + self.context_length * rng.permutation(self.n_windows)
        return int(self._starts[i])


def eval_batches(
    tokens: np.ndarray,
    end_of_text: int | None = None,
    *,
    vocab_size: int,
    context_length: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's batches of a whole split: each token but the first is a target once.

    All have the same shape; what a window lacks has the target IGNORED. Ranks take batches in
    turn, so some may get one more.
    """
    shape, windows = (batch_size, context_length), cut_windows(tokens, context_length, end_of_text)
    for first in range(rank * batch_size, len(windows), world_size * batch_size):
        tokens_BT, targets_BT = np.zeros(shape, np.int64), np.full(shape, IGNORED)
        for b, (start, end) in enumerate(windows[first : first + batch_size]):
            window = tokens[start : end + 1].astype(np.int64)
            check_ids(window, vocab_size)
            tokens_BT[b, : end - start], targets_BT[b, : end - start] = window[:-1], window[1:]
        yield torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT)
