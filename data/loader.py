"""Make batches from token files, as a pure function of (seed, step): there is no state to save.

Each rank computes the same order and takes its own rows, so a run can stop, resume, or change
its number of devices, and still sees the same data.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from data.format import (
    FORMAT_VERSION,
    META,
    QUICKLY_READ,
    SPLITS,
    Joined,
    TokenFiles,
    check_ids,
    read_tokenizer,
    token_file,
)
from data.order import Order
from data.tokenizer import Tokenizer
from data.windows import cut_windows
from files import plain_name, sha256_of

IGNORED = -100  # the target that torch's cross_entropy leaves out by default
Batch = tuple[Tensor, Tensor]  # tokens_BT, targets_BT


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are."""

    path: Path = Path("data/plays_bpe")
    """Folder that data.prepare wrote."""


class Dataset:
    """A folder that data.prepare wrote, checked. Make one with `Dataset.open`."""

    def __init__(self, path: Path, meta: dict[str, Any], tokenizer: Tokenizer):
        self.path = path
        self.meta = meta
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.end_of_text = tokenizer.end_of_text
        self.bytes_per_token = meta["splits"]["val"]["bytes"] / meta["splits"]["val"]["tokens"]
        self.mapped = TokenFiles(path, self.vocab_size, meta.get("header", 0))

    @classmethod
    def open(cls, path: Path) -> "Dataset":
        """Open a dataset. Raises FileNotFoundError if there is none, ValueError if damaged."""
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
            for files in map(dataset._files, SPLITS):
                for file, about in files:
                    dataset.mapped.check_size(file, about)
                if len(files) == 1 and files[0][0].stat().st_size <= QUICKLY_READ:
                    dataset.mapped.check_content(*files[0])
            sha256 = meta.pop("sha256", None)  # older ones have none
            if sha256 is not None and sha256 != sha256_of(meta):
                raise ValueError(f"{META} was changed after it was written (its SHA-256 differs)")
            return dataset
        except MemoryError:
            raise
        except Exception as error:  # a made-up file can fail in any way
            reason = f"{META} lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is damaged: {reason}; prepare it again") from error

    def tokens(self, split: str, first: int = 0) -> np.ndarray:
        """Map the ids of "train" or "val", (N,), into memory; `first` > 0 takes only that many.

        The training ids of shards are a Joined: their length and slices are all that is ever used.
        """
        files = self._files(split)
        if len(files) == 1:
            return self.mapped.map(files[0][0])[: first or None]
        lengths = [about["tokens"] for _, about in files]
        joined = Joined(lengths, lambda i: self.mapped.check_and_map(*files[i]))
        is_read_whole = first > 0 or split == "val"
        return joined[: first or None] if is_read_whole else cast(np.ndarray, joined)

    def bits_per_byte(self, loss: float) -> float:
        """Convert a validation loss from nats per token, to compare it across tokenizers."""
        return loss / math.log(2) / self.bytes_per_token

    def entropy(self, first: int = 0) -> float | None:
        """Return the lowest possible loss on all of val, in nats per token; None if unknown."""
        known = "entropy" in self.meta and not first
        return self.meta["entropy"]["val"]["per_token"] if known else None

    def fitting_vocab_size(self, asked: int) -> int:
        """Return `asked`, or the dataset's own for 0. Raises ValueError if it is too small."""
        if 0 < asked < self.vocab_size:
            raise ValueError(
                f"model.vocab_size must hold the {self.vocab_size} tokens of {self.path}: "
                f"got {asked}; leave it out to take the dataset's"
            )
        return asked or self.vocab_size

    def identity(self) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint stores of it: the tokenizer, and sizes and hashes of splits."""
        return {"tokenizer": self.tokenizer.state(), "data": self.meta["splits"]}

    def _files(self, split: str) -> list[tuple[Path, dict[str, Any]]]:
        """Return the token files of a split, each with what meta.json says of it."""
        about = self.meta["splits"][split]
        if "shards" in self.meta:
            folder = self.path / self.meta["shards"]  # an absolute path stays as it is
            return [(folder / plain_name(shard["file"]), shard) for shard in about["shards"]]
        return [(self.path / token_file(split), about)]


@dataclass(frozen=True)
class Windows:
    """How a split is cut into windows, and which of the processes reads them."""

    vocab_size: int  # of the tokenizer: ids that are not below it are refused
    context_length: int
    rank: int = 0
    world_size: int = 1


class Batches:
    """Windows of a split in a seeded order, each once per epoch."""

    def __init__(self, tokens_N: np.ndarray, windows: Windows, batch_size: int, seed: int) -> None:
        T = windows.context_length
        processes = windows.world_size
        if batch_size % processes:
            raise ValueError(
                f"the number of processes must divide batch_size: got batch_size={batch_size}, "
                f"{processes} processes"
            )
        if len(tokens_N) <= T:
            raise ValueError(
                f"a text must be longer than one context: got {len(tokens_N)} tokens, "
                f"context_length={T}; give more text or a smaller context_length"
            )
        self.tokens_N = tokens_N
        self.windows = windows
        self.batch_size = batch_size
        self.rows = batch_size // processes
        # One window fewer than could fit leaves room to shift the grid by up to a context
        self.n_windows = max(1, len(tokens_N) // T - 1)
        self.n_offsets = min(T, len(tokens_N) - self.n_windows * T)
        self.order = Order(self.n_windows, self.n_offsets, seed)

    def batch(self, step: int) -> Batch:
        """Return this rank's inputs and targets of a step; targets are one token later."""
        first = step * self.batch_size + self.windows.rank * self.rows
        windows_B, offsets_B = self.order.windows(np.arange(first, first + self.rows))
        starts_B = windows_B * self.windows.context_length + offsets_B
        length = self.windows.context_length + 1
        windows_BS = np.stack([self.tokens_N[i : i + length] for i in starts_B.tolist()])
        check_ids(windows_BS, self.windows.vocab_size)
        tokens_BS = torch.from_numpy(windows_BS.astype(np.int64))  # S = T + 1
        return tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous()


def eval_batches(
    tokens_N: np.ndarray, windows: Windows, batch_size: int, end_of_text: int | None = None
) -> Iterator[Batch]:
    """Yield this rank's batches of a whole split: each token but the first is a target once.

    All batches have the same shape; where a window is shorter, the target is IGNORED. The ranks
    take batches in turn, and all get the same number: the last ones may have nothing but IGNORED.
    """
    bounds = cut_windows(tokens_N, windows.context_length, end_of_text)
    shape = (batch_size, windows.context_length)
    n_together = windows.world_size * batch_size
    for first in range(
        windows.rank * batch_size, n_together * math.ceil(len(bounds) / n_together), n_together
    ):
        tokens_BT = np.zeros(shape, np.int64)
        targets_BT = np.full(shape, IGNORED)
        for b, (start, end) in enumerate(bounds[first : first + batch_size]):
            window_S = tokens_N[start : end + 1].astype(np.int64)
            check_ids(window_S, windows.vocab_size)
            tokens_BT[b, : end - start] = window_S[:-1]
            targets_BT[b, : end - start] = window_S[1:]
        yield torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT)
