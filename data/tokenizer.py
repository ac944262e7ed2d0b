"""Text <-> token ids: characters, bytes, and byte-pair encoding behind one small interface."""

import base64
import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import tiktoken

# GPT-2's pattern as tiktoken writes it, with possessive quantifiers: it matches the same, but the
# original form makes the regex engine give up on a million spaces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same again, but all that needs no backtracking in one group, which tiktoken's engine hands
# whole to a finite automaton: the encoding of a text takes little more than half the time.
FAST_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
N_BYTES = 256
END_OF_TEXT = "<|endoftext|>"  # how the end-of-text token is shown; text that says so is just text
PIECE = 500_000  # characters; tiktoken fails on a run of a million spaces before a letter


class Tokenizer(ABC):
    """Text <-> token ids. `end_of_text` is the id that separates documents, if there is one."""

    vocab_size: int
    end_of_text: int | None

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `text` as an integer array tokens_T."""

    @abstractmethod
    def _bytes(self, token: int) -> bytes:
        """Return the bytes of a token that is in the vocabulary and not end-of-text."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return JSON-able data from which `load_tokenizer` makes an equal tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which nothing is special, not even "<|endoftext|>"."""
        return self.encode_array(text).tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`, with U+FFFD for bytes that are not UTF-8."""
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token. Raises ValueError outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token ids go from 0 to {self.vocab_size - 1}: got {token}")
        return END_OF_TEXT.encode() if token == self.end_of_text else self._bytes(token)


class CharTokenizer(Tokenizer):
    """One token per character of the training text, in the order of their code points."""

    def __init__(self, characters: str, *, with_end_of_text: bool):
        self.characters = "".join(sorted(set(characters)))
        self.end_of_text = len(self.characters) if with_end_of_text else None
        self.vocab_size = len(self.characters) + with_end_of_text
        code_points = _code_points(self.characters)
        self._token_of = np.full(max(code_points, default=0) + 2, -1)  # the last: any larger one
        self._token_of[code_points] = np.arange(len(code_points))

    def encode_array(self, text: str) -> np.ndarray:
        code_points = _code_points(text)
        tokens_T = self._token_of[np.minimum(code_points, len(self._token_of) - 1)]
        if (tokens_T < 0).any():
            missing = sorted({chr(code_point) for code_point in code_points[tokens_T < 0]})
            raise ValueError(
                f"the character vocabulary lacks {', '.join(map(repr, missing[:10]))}: use the "
                "characters of the training text, or prepare it with --tokenizer=byte or bpe"
            )
        return tokens_T

    def _bytes(self, token: int) -> bytes:
        return self.characters[token].encode()

    def state(self) -> dict[str, Any]:
        with_end_of_text = self.end_of_text is not None
        return {"kind": "char", "characters": self.characters, "with_end_of_text": with_end_of_text}


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8, then end-of-text."""

    vocab_size, end_of_text = N_BYTES + 1, N_BYTES

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(well_formed(text).encode(), np.uint8)

    def _bytes(self, token: int) -> bytes:
        return bytes([token])

    def state(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding, run by tiktoken: one token per rank, then end-of-text."""

    def __init__(self, ranks: dict[bytes, int], *, kind: str, pattern: str = GPT2_PATTERN):
        every_byte = all(bytes([byte]) in ranks for byte in range(N_BYTES))
        if not every_byte or sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(  # tiktoken would panic, now or at the first such byte
                f"ranks must number all {N_BYTES} bytes and the merges from 0 up without a gap: "
                f"these {len(ranks)} do not, so prepare the data again"
            )
        self.kind, self.pattern, self.ranks = kind, pattern, ranks
        self.end_of_text, self.vocab_size = len(ranks), len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            kind,
            pat_str=FAST_PATTERN if pattern == GPT2_PATTERN else pattern,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode_array(self, text: str) -> np.ndarray:
        pieces = cut(well_formed(text)) or [""]
        # disallowed_special=(): special-token strings are ordinary text, as in encode_ordinary,
        # which would build a list of Python integers while it holds the interpreter's lock.
        return np.concatenate(
            [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        )

    def _bytes(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token)

    def state(self) -> dict[str, Any]:
        lines = (
            f"{base64.b64encode(token).decode()} {rank}\n"
            for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])
        )
        return {"kind": self.kind, "pattern": self.pattern, "ranks": "".join(lines)}


def load_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that `state` describes. Raises ValueError if it describes none."""
    try:
        match state["kind"]:
            case "char":
                return CharTokenizer(
                    state["characters"], with_end_of_text=state["with_end_of_text"]
                )
            case "byte":
                return ByteTokenizer()
            case "bpe" | "gpt2" as kind:
                lines = (line.split() for line in state["ranks"].splitlines())
                ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
                return BPETokenizer(ranks, kind=kind, pattern=state["pattern"])
            case kind:
                raise ValueError(f"a tokenizer is char, byte, bpe or gpt2: got {kind!r}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not the state of a tokenizer: {error!r}") from error


class TextStream:
    """Text from tokens as they come: a character is shown when its last byte has arrived."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the text that `token` completes, which may be none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return U+FFFD if the tokens ended inside a character."""
        return self._decoder.decode(b"", final=True)


def cut(text: str, longest: int = PIECE) -> list[str]:
    """Cut `text` into pieces that have, one after another, the same GPT-2 tokens as the whole.

    "to be or not" -> ["to be", " or not"]: a space before a non-space always starts a new token.
    Only a run of `longest` characters without such a place is cut anywhere.
    """
    if len(text) <= longest:
        return [text] if text else []
    n = f"{{1,{longest}}}"
    return re.findall(rf".{n}+\Z|.{n}(?= \S)|.{n}", text, re.DOTALL)


def well_formed(text: str) -> str:
    """Return `text` with U+FFFD for lone surrogates, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
