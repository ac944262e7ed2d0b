"""Write a prepared dataset so that its folder holds all of it or none of it.

All files are written beside their places and synced to the disk. Then the old meta.json is removed,
and the new files are put in place, meta.json last. A folder without meta.json is not a dataset, so
not even a power failure leaves half of one.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.encode import Encoded
from data.format import FEWEST_TOKENS, FORMAT_VERSION, META, RANKS, SPLITS, token_dtype, token_file
from data.tokenizer import Tokenizer
from files import partial, sha256_of, sync, sync_folder, whole


class TokenFile:
    """The token file of one split while it is being written."""

    def __init__(self, stream: IO[bytes], dtype: np.dtype):
        self.stream = stream
        self.dtype = dtype
        self.sha256 = hashlib.sha256()
        self.tokens = 0
        self.bytes = 0
        self.documents = 0

    def write(self, encoded: Encoded) -> None:
        """Append tokens. Raises OSError if the disk is full."""
        data = encoded.tokens_N.astype(self.dtype).tobytes()
        self.stream.write(data)
        self.sha256.update(data)
        self.tokens += len(encoded.tokens_N)
        self.bytes += encoded.bytes
        if encoded.part.starts_document:
            self.documents += 1

    def describe(self, split: str) -> dict[str, Any]:
        """Return what meta.json says about the file."""
        return {
            "file": token_file(split),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "sha256": self.sha256.hexdigest(),
        }


@contextlib.contextmanager
def new_dataset(
    folder: Path, tokenizer: Tokenizer, splits: Sequence[str] = SPLITS
) -> Iterator["DatasetWriter"]:
    """Write a dataset, with token files of `splits`, into a folder.

    An error before `commit` leaves the old one as it is.
    """
    writer = DatasetWriter(folder, tokenizer)
    with contextlib.ExitStack() as stack:  # exits in reverse, so META is put in place last
        for name in (META, RANKS) if writer.ranks else (META,):
            writer.texts[name] = stack.enter_context(whole(folder / name))
        for split in splits:
            stream = stack.enter_context(whole(folder / token_file(split), "wb"))
            writer.files[split] = TokenFile(stream, writer.dtype)
        yield writer
    sync_folder(folder)


class DatasetWriter:
    """A dataset that is being written, in files beside those that it will replace."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder = folder
        self.tokenizer = tokenizer
        self.state = tokenizer.state()
        self.ranks: str = self.state.pop("ranks", "")
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.files: dict[str, TokenFile] = {}
        self.texts: dict[str, IO[str]] = {}

    def commit(self, **about: Any) -> dict[str, Any]:
        """Make the files ready to replace the old dataset; return meta.json, with `about` in it."""
        splits = {split: file.describe(split) for split, file in self.files.items()}
        for split, counts in about.get("splits", splits).items():
            if counts["tokens"] < FEWEST_TOKENS:
                raise ValueError(
                    f"the {split} split must have {FEWEST_TOKENS} tokens: got {counts['tokens']}; "
                    "give more text, or another --val_fraction"
                )
        if self.ranks:
            self.texts[RANKS].write(self.ranks)
            self.state["ranks_sha256"] = hashlib.sha256(self.ranks.encode()).hexdigest()
        meta = {
            "format_version": FORMAT_VERSION,
            "vocab_size": self.tokenizer.vocab_size,
            "end_of_text": self.tokenizer.end_of_text,
            "dtype": self.dtype.name,
            "splits": splits,
            **about,
            "tokenizer": self.state,
        }
        found = {"sha256": sha256_of(meta), **meta}
        self.texts[META].write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        for stream in (*(file.stream for file in self.files.values()), *self.texts.values()):
            sync(stream)
        others = [token_file(split) for split in SPLITS if split not in self.files]
        for name in (META, RANKS, *others):
            (self.folder / name).unlink(missing_ok=True)
        sync_folder(self.folder)
        if not self.ranks:  # a preparation that was killed may have had some
            partial(self.folder / RANKS).unlink(missing_ok=True)
        return meta
