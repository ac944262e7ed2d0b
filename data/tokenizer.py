"""Text <-> token ids: characters, bytes, and byte-pair encoding behind one small interface."""

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import tiktoken

# GPT-2's pattern as tiktoken writes it, with possessive quantifiers: it matches the same, but the
# original form makes the regex engine give up on a million spaces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# It matches the same again, but what needs no backtracking is in one group, which tiktoken's regex
# engine can leave to a finite automaton: encoding takes little more than half the time.
FAST_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
N_BYTES = 256
END_OF_TEXT = "<|endoftext|>"  # shows an end-of-text token; in a text it is ordinary characters
PIECE = 500_000  # characters; tiktoken fails on a run of a million spaces before a letter


class Tokenizer(ABC):
    """Text <-> token ids. `end_of_text` is the id that separates documents, if there is one."""

    vocab_size: int
    end_of_text: int | None

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `text`, (N,) integers."""

    @abstractmethod
    def _bytes(self, token: int) -> bytes:
        """Return the bytes of a token of the vocabulary that is not end-of-text."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return JSON-able data from which `load_tokenizer` makes an equal tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Nothing in it is special, not even "<|endoftext|>"."""
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
        n = len(self.characters)
        self.end_of_text = n if with_end_of_text else None
        self.vocab_size = n + 1 if with_end_of_text else n
        points_n = _code_points(self.characters)
        # The token of each code point, or -1; the last entry stands for all larger code points
        self._token_of_P = np.full(max(points_n, default=0) + 2, -1)
        self._token_of_P[points_n] = np.arange(n)

    def encode_array(self, text: str) -> np.ndarray:
        points_N = _code_points(text)
        tokens_N = self._token_of_P[np.minimum(points_N, len(self._token_of_P) - 1)]
        if (tokens_N < 0).any():
            missing = sorted({chr(point) for point in points_N[tokens_N < 0]})
            raise ValueError(
                f"the character vocabulary lacks {', '.join(map(repr, missing[:10]))}: use the "
                "characters of the training text, or prepare it with --tokenizer=byte or bpe"
            )
        return tokens_N

    def _bytes(self, token: int) -> bytes:
        return self.characters[token].encode()

    def state(self) -> dict[str, Any]:
        with_end_of_text = self.end_of_text is not None
        return {"kind": "char", "characters": self.characters, "with_end_of_text": with_end_of_text}


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8, then end-of-text."""

    vocab_size = N_BYTES + 1
    end_of_text = N_BYTES

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
        if not every_byte or list(ranks.values()) != list(range(len(ranks))):
            raise ValueError(  # tiktoken would panic, here or at the first byte without a rank
                f"ranks must number all {N_BYTES} bytes and the merges in order, from 0 without a "
                f"gap: these {len(ranks)} do not, so prepare the data again"
            )
        self.kind = kind
        self.pattern = pattern
        self.ranks = ranks
        self.end_of_text = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            kind,
            pat_str=FAST_PATTERN if pattern == GPT2_PATTERN else pattern,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode_array(self, text: str) -> np.ndarray:
        pieces = cut(well_formed(text)) or [""]
        # Strings like "<|endoftext|>" are ordinary text. encode_ordinary does the same, but holds
        # the interpreter's lock while it builds a list of Python integers.
        return np.concatenate(
            [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        )

    def _bytes(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token)

    def state(self) -> dict[str, Any]:
        lines = [f"{base64.b64encode(token).decode()} {i}\n" for token, i in self.ranks.items()]
        return {"kind": self.kind, "pattern": self.pattern, "ranks": "".join(lines)}


def load_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that `state` describes. Raises ValueError if it describes none."""
    match state:
        case {"kind": "char", "characters": str(characters), "with_end_of_text": bool(with_end)}:
            return CharTokenizer(characters, with_end_of_text=with_end)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "bpe" | "gpt2" as kind, "pattern": str(pattern), "ranks": str(text)}:
            lines = (line.split() for line in text.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            return BPETokenizer(ranks, kind=kind, pattern=pattern)
        case {"kind": "hub", "json": str(text)}:
            from data.hub_tokenizer import HubTokenizer  # it is built on this file

            return HubTokenizer(text)
    raise ValueError(f"this is no char, byte, bpe, gpt2 or hub tokenizer: got {str(state)[:60]}")


def gpt2_ranks() -> dict[bytes, int]:
    """Return GPT-2's tokens with their ranks, which tiktoken downloads once, or raise OSError."""
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except OSError as error:
        raise OSError(
            f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): let "
            "TIKTOKEN_CACHE_DIR name a folder that has its two files, or use --tokenizer=bpe, "
            "byte or char, which need no download"
        ) from error


def cut(text: str, longest: int = PIECE) -> list[str]:
    """Cut `text` into pieces, which together have the same GPT-2 tokens as the whole.

    "to be or not" -> ["to be", " or not"]: a space before a non-space always starts a token.
    Only a run of `longest` characters without such a place is cut elsewhere.
    """
    if len(text) <= longest:
        return [text] if text else []
    n = f"{{1,{longest}}}"
    return re.findall(rf".{n}+\Z|.{n}(?= \S)|.{n}", text, re.DOTALL)


def well_formed(text: str) -> str:
    """Return `text` with U+FFFD for lone surrogates, which cannot be encoded in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
