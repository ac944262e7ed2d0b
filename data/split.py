"""Decide which text trains and which validates. The order of the documents makes no difference.

Many documents go whole to one split, by a hash of their text: exact duplicates stay together, so
no validation document is also trained on. Few documents, such as one book, are each cut in two:
the beginning trains, the end validates. Up to 1,000 documents are cut, too, if whole ones would
leave the splits far from the fraction asked for, as one long document can. Not if only a few
characters of each would validate: then any whole ones are better.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from data.documents import Document
from data.format import SPLITS
from data.progress import progress
from data.sources import Corpus

MANY_DOCUMENTS = 20  # with fewer, whole documents cannot come near the fraction asked for
MOST_CUT = 1000  # more documents always go whole, so no more lengths need to be remembered
FAR = 2  # times too much or too little
SMALL = 1 / MANY_DOCUMENTS  # with a smaller fraction, cutting may leave only ends of documents
FEWEST_CUT = 20  # characters of each of many documents, on average, that such ends should have
HASH_BYTES = 8


class Part(NamedTuple):
    """A piece of a document that belongs to one split."""

    split: str
    text: str
    starts_document: bool  # it is the first piece of its document in this split


@dataclass(kw_only=True)
class Scan:
    """What is known of the corpus: all that is needed to split it.

    As soon as there are so many documents that they go whole, only the text of each decides. So
    the first reading may end there, and what is left is found while the corpus is read for use.
    """

    val_fraction: float
    goes_whole: bool = False  # it is a piece of a corpus that has many documents
    documents: int = 0
    characters: int = 0
    val_characters: int = 0  # in the documents that validate if documents go whole
    bytes: int = 0  # in UTF-8
    lengths: list[int] = field(default_factory=list)  # of the first documents, in characters
    validates: bytearray = field(default_factory=bytearray)  # per document: 1 if it validates whole
    is_complete: bool = False

    @classmethod
    def of(cls, corpus: Corpus, val_fraction: float, *, complete: bool = True) -> "Scan":
        """Read the corpus: all of it if `complete`, else no more than decides how to split it.

        Raises ValueError if that is not text, or if there is none, or too little to split.
        """
        scan = cls(val_fraction=val_fraction)
        with progress("scan", corpus.bytes if complete else None) as bar:
            for document in corpus.documents():
                bar.update(scan.add(document))
                if scan.documents > MOST_CUT and not complete:
                    return scan
        scan.is_complete = True
        if not scan.bytes:
            raise ValueError("the sources hold no text: name at least one file with text in it")
        if scan.cuts_are_short and not scan.go_whole:
            raise ValueError(
                f"a val_fraction of {val_fraction} would be the last characters of each of "
                f"{scan.documents} documents: give more text or a larger --val_fraction"
            )
        return scan

    def add(self, document: Document) -> int:
        """Count one document; return its size in bytes."""
        characters = 0
        n_bytes = 0
        digest = hashlib.blake2b(digest_size=HASH_BYTES)
        for piece in document:
            data = piece.encode()
            digest.update(data)
            characters += len(piece)
            n_bytes += len(data)
        self.documents += 1
        self.characters += characters
        self.bytes += n_bytes
        if len(self.lengths) < MOST_CUT:
            self.lengths.append(characters)
        validates = int.from_bytes(digest.digest(), "big") < self.val_fraction * 256**HASH_BYTES
        self.validates.append(int(validates))
        if validates:
            self.val_characters += characters
        return n_bytes

    @property
    def cuts_are_short(self) -> bool:
        """Say whether cutting would hold back no more than the last characters of documents."""
        n = self.characters * self.val_fraction / self.documents
        return self.documents >= MANY_DOCUMENTS and self.val_fraction < SMALL and n < FEWEST_CUT

    @property
    def go_whole(self) -> bool:
        """Say whether each document goes whole to one split."""
        if self.goes_whole or self.documents > MOST_CUT:
            return True
        share = self.val_characters / self.characters
        if self.cuts_are_short:
            return 0 < share <= FAR * SMALL
        asked = self.val_fraction
        is_near = asked / FAR <= share <= asked * FAR and 1 - share >= (1 - asked) / FAR
        return is_near and self.documents >= MANY_DOCUMENTS

    def train_characters(self, document: int) -> int:
        """Return how many characters of a document train, from its start; the rest validates."""
        if not self.go_whole:
            return int(self.lengths[document] * (1 - self.val_fraction))
        return 0 if self.validates[document] else sys.maxsize

    def parts(self, corpus: Corpus) -> Iterator[Part]:
        """Read the corpus, split. Raises ValueError if it differs from what was scanned."""
        changed = ValueError("the sources changed while they were read: prepare them again")
        documents = 0
        characters = 0
        for document in corpus.documents():
            if documents == self.documents:
                if self.is_complete:
                    raise changed
                self.add(document)
            for part in split_document(document, self.train_characters(documents)):
                characters += len(part.text)
                yield part
            documents += 1
        if (documents, characters) != (self.documents, self.characters):
            raise changed
        self.is_complete = True


def split_document(document: Document, train_characters: int) -> Iterator[Part]:
    """Yield the first `train_characters` of a document for training, the rest for validation."""
    started: set[str] = set()
    for piece in document:
        halves = (piece[:train_characters], piece[train_characters:])
        train_characters -= len(halves[0])
        for split, text in zip(SPLITS, halves, strict=True):
            if text:
                yield Part(split, text, starts_document=split not in started)
                started.add(split)
