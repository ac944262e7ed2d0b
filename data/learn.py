"""The tokenizer that data.prepare was asked for: learned from the text, or known."""

from collections.abc import Iterator
from dataclasses import dataclass

from data.bpe import train_bpe
from data.progress import progress
from data.sources import Corpus
from data.split import Scan
from data.tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    gpt2_ranks,
)

KINDS = ("bpe", "gpt2", "byte", "char")
BPE_VOCAB_SIZE = 4096
BPE_TRAINING_CHARACTERS = 16_000_000  # more text hardly changes the merges, and costs memory


@dataclass(frozen=True)
class Learn:
    """What is asked for, and the text to learn it from."""

    kind: str
    vocab_size: int  # of bpe; 0 takes BPE_VOCAB_SIZE
    corpus: Corpus
    scan: Scan
    pieces: tuple[Corpus, ...] = ()  # of a large corpus, which has not been read as a whole
    known: Tokenizer | None = None  # of another run, if `kind` is its folder

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises ValueError or OSError if it cannot be had."""
        if self.known is not None:
            return self.known
        match self.kind:
            case "gpt2":
                return BPETokenizer(gpt2_ranks(), kind="gpt2")
            case "byte":
                return ByteTokenizer()
            case "char":
                characters: set[str] = set()
                for document in self.corpus.documents():
                    for piece in document:
                        characters.update(piece)
                return CharTokenizer("".join(characters), with_end_of_text=self.scan.documents > 1)
        vocab_size = self.vocab_size or BPE_VOCAB_SIZE
        sample = sample_of_each(self.pieces, self.scan) if self.pieces else self.sample()
        ranks = train_bpe(sample, vocab_size - 1, GPT2_PATTERN)
        if len(ranks) < vocab_size - 1:
            print(f"the text suffices for {len(ranks) + 1:,} tokens, not {vocab_size:,}")
        return BPETokenizer(ranks, kind="bpe")

    def sample(self) -> Iterator[str]:
        """Yield text of the training split: all of it, or if there is much, an even sample."""
        share = min(1, BPE_TRAINING_CHARACTERS / self.scan.characters)
        seen = 0
        taken = 0
        with progress("learn", self.scan.bytes) as bar:
            for part in self.scan.parts(self.corpus):
                bar.update(len(part.text.encode()))
                seen += len(part.text)
                if part.split == "train" and taken < share * seen:
                    taken += len(part.text)
                    yield part.text


def sample_of_each(pieces: tuple[Corpus, ...], scan: Scan) -> Iterator[str]:
    """Yield the beginning of each piece's training text."""
    for piece in pieces:
        left = BPE_TRAINING_CHARACTERS // len(pieces)
        parts = Scan(val_fraction=scan.val_fraction, goes_whole=True).parts(piece)
        for part in parts:
            if part.split == "train":
                yield part.text[:left]
                left -= len(part.text)
            if left <= 0:
                break
