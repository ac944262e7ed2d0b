"""Writing a prepared dataset, so that it is whole or not there.

Every file is written beside its final name and synced to the disk. Then the old meta.json goes,
the files are renamed, and meta.json last: whenever power fails, there is no half dataset.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.encode import Encoded
from data.format import FEWEST_TOKENS, FORMAT_VERSION, META, RANKS, SPLITS, token_dtype, token_file
from data.tokenizer import Tokenizer

NAMES = (*map(token_file, SPLITS), RANKS, META)  # in the order of renaming


class TokenFile:
    """The token file of one split, as it grows."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype, self.sha256 = dtype, hashlib.sha256()
        self.stream = open(path, "wb")  # noqa: SIM115 (closed in commit or abandon)
        self.tokens = self.bytes = self.documents = 0

    def write(self, encoded: Encoded) -> None:
        """Append tokens. Raises OSError if the disk is full."""
        data = encoded.tokens_T.astype(self.dtype).tobytes()
        self.stream.write(data)
        self.sha256.update(data)
        self.tokens += len(encoded.tokens_T)
        self.bytes += encoded.bytes
        self.documents += encoded.documents


@contextlib.contextmanager
def new_dataset(folder: Path, tokenizer: Tokenizer) -> Iterator["DatasetWriter"]:
    """Open a dataset to be written. Leaving before `commit` leaves what was there."""
    is_new = not folder.exists()
    writer = DatasetWriter(folder, tokenizer)
    try:
        writer.open()
        yield writer
    except BaseException as error:  # Ctrl-C as well
        writer.abandon(remove_folder=is_new)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(folder)  # "No space left on device": on which?
        raise


class DatasetWriter:
    """A dataset that is being written, in files beside those that it will replace."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.files: dict[str, TokenFile] = {}

    def open(self) -> None:
        """Begin the token files, after sweeping out what a killed preparation left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        for split in SPLITS:
            self.files[split] = TokenFile(self._partial(token_file(split)), self.dtype)

    def abandon(self, *, remove_folder: bool) -> None:
        """Remove what was written."""
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk fails once more here
                file.stream.close()
        with contextlib.suppress(OSError):  # what went wrong is said already
            self._sweep()
            if remove_folder:
                self.folder.rmdir()

    def commit(self, **about: Any) -> None:
        """Make what was written the dataset; `about` is added to meta.json."""
        for split, file in self.files.items():
            if file.tokens < FEWEST_TOKENS:
                raise ValueError(
                    f"the {split} split must have {FEWEST_TOKENS} tokens: got {file.tokens}; give "
                    "more text, or another --val_fraction"
                )
            sync(file.stream)
            file.stream.close()
        tokenizer = self.tokenizer.state()
        if "ranks" in tokenizer:
            ranks = tokenizer.pop("ranks")
            self._write(RANKS, ranks)
            tokenizer["ranks_sha256"] = hashlib.sha256(ranks.encode()).hexdigest()
        meta = self._describe() | about | {"tokenizer": tokenizer}
        self._write(META, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        self._rename()

    def _describe(self) -> dict[str, Any]:
        """Return what meta.json says about the token files."""
        splits = {
            split: {
                "file": token_file(split),
                "tokens": file.tokens,
                "bytes": file.bytes,
                "documents": file.documents,
                "sha256": file.sha256.hexdigest(),
            }
            for split, file in self.files.items()
        }
        return {
            "format_version": FORMAT_VERSION,
            "vocab_size": self.tokenizer.vocab_size,
            "end_of_text": self.tokenizer.end_of_text,
            "dtype": self.dtype.name,
            "splits": splits,
        }

    def _write(self, name: str, text: str) -> None:
        with open(self._partial(name), "w", encoding="utf-8", newline="") as file:
            file.write(text)
            sync(file)

    def _rename(self) -> None:
        for name in (META, RANKS):
            (self.folder / name).unlink(missing_ok=True)
        for name in NAMES:
            if self._partial(name).exists():
                self._partial(name).replace(self.folder / name)
        sync_folder(self.folder)

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial"

    def _sweep(self) -> None:
        for name in NAMES:
            self._partial(name).unlink(missing_ok=True)


def sync(file: IO[Any]) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
