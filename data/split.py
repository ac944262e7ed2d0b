"""Which text trains and which validates: the same for the same documents, in any order.

Few documents, such as one book, are each cut in two: the first part trains, the last validates.
Many documents go whole to one side, by a hash of their text: exact duplicates stay together, so
that no validation text is also trained on. Where that would leave far from the fraction asked for,
as one long document among short ones can, they are cut in two as well.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tqdm import tqdm

from data.format import SPLITS
from data.sources import Corpus

MANY_DOCUMENTS = 20  # with fewer, whole documents could not come near the fraction asked for
MOST_CUT = 1000  # with more they always go whole, so that no more lengths need to be remembered
FAR = 2  # times too much or too little
HASH_BYTES = 8


class Part(NamedTuple):
    """A piece of a document that belongs to one split."""

    split: str
    text: str
    starts_document: bool  # is the first piece of its document in this split


@dataclass(kw_only=True)
class Scan:
    """What one look at the whole corpus has found: all that is needed to split it."""

    val_fraction: float
    characters: int = 0
    val_characters: int = 0  # of the documents that validate if they go whole
    bytes: int = 0  # of UTF-8
    lengths: list[int] = field(default_factory=list)  # of the first documents, in characters
    validates: bytearray = field(default_factory=bytearray)  # per document: 1 if its hash says so

    @classmethod
    def of(cls, corpus: Corpus, val_fraction: float) -> "Scan":
        """Read the corpus once. Raises ValueError where it is not text or holds none."""
        scan = cls(val_fraction=val_fraction)
        with tqdm(desc="scan", unit="B", unit_scale=True, disable=None) as bar:
            for pieces in corpus.documents():
                bar.update(scan.add(pieces))
        if not scan.bytes:
            raise ValueError("the sources hold no text: name at least one file with text in it")
        return scan

    def add(self, pieces: Iterator[str]) -> int:
        """Count one document; return its size in bytes."""
        characters, n_bytes, digest = 0, 0, hashlib.blake2b(digest_size=HASH_BYTES)
        for piece in pieces:
            data = piece.encode()
            digest.update(data)
            characters += len(piece)
            n_bytes += len(data)
        self.characters += characters
        self.bytes += n_bytes
        if len(self.lengths) < MOST_CUT:
            self.lengths.append(characters)
        threshold = self.val_fraction * 2 ** (8 * HASH_BYTES)
        validates = int.from_bytes(digest.digest(), "big") < threshold
        self.validates.append(validates)
        self.val_characters += validates * characters
        return n_bytes

    @property
    def documents(self) -> int:
        """Return how many documents there are."""
        return len(self.validates)

    @property
    def go_whole(self) -> bool:
        """Say whether each document goes whole to one side."""
        if self.documents > MOST_CUT:
            return True
        share, asked = self.val_characters / self.characters, self.val_fraction
        is_near = asked / FAR <= share <= asked * FAR and 1 - share >= (1 - asked) / FAR
        return is_near and self.documents >= MANY_DOCUMENTS

    def train_characters(self, document: int) -> int:
        """Return how many characters at the start of a document train; the rest validates."""
        if not self.go_whole:
            return int(self.lengths[document] * (1 - self.val_fraction))
        return 0 if self.validates[document] else sys.maxsize

    def parts(self, corpus: Corpus) -> Iterator[Part]:
        """Read the corpus again, split. Raises ValueError if it is no longer what was scanned."""
        changed = ValueError("the sources changed while they were read: prepare them again")
        documents, characters = 0, 0
        for pieces in corpus.documents():
            if documents == self.documents:
                raise changed
            for part in split_document(pieces, self.train_characters(documents)):
                characters += len(part.text)
                yield part
            documents += 1
        if (documents, characters) != (self.documents, self.characters):
            raise changed


def split_document(pieces: Iterator[str], train_characters: int) -> Iterator[Part]:
    """Yield the first characters of a document as parts that train, the others to validate."""
    started: set[str] = set()
    for piece in pieces:
        halves = piece[:train_characters], piece[train_characters:]
        train_characters -= len(halves[0])
        for split, text in zip(SPLITS, halves, strict=True):
            if text:
                yield Part(split, text, starts_document=split not in started)
                started.add(split)
