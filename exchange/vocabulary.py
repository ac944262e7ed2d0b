"""Our tokenizers as the tokenizer.json of the `tokenizers` library, and back.

There bytes are written as printable characters, as in GPT-2's own files: " the" is "Ġthe".
"""

import itertools
import json
from typing import Any

from data.hub_tokenizer import BYTE_OF, LETTERS, HubTokenizer
from data.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from files import readable
from model import require

GPT2_RANKS = 50256
OURS = ("ByteLevel", "Split")  # the types of pre_tokenizer that we write


def spelled(token: bytes) -> str:
    """b" the" -> "Ġthe"."""
    return "".join(LETTERS[byte] for byte in token)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return which two tokens each token of more than one byte was merged from, in order.

    A token's own merges, up to the last one, are those of all tokens before it. Raises ValueError
    if these do not lead to two tokens.
    """
    return [split_token(token, ranks) for token in ranks if len(token) > 1]


def split_token(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [a + b for a, b in itertools.pairwise(parts)]
        known = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks]
        rank, i = min(known, default=(len(ranks), 0))
        require(rank < ranks[token], f"the token {token!r} is no merge of tokens before it")
        parts[i : i + 2] = [pairs[i]]
    return parts[0], parts[1]


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of tokenizer.json, whose ids are those of ours for every text."""
    level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    before: dict[str, Any] = {**level, "add_prefix_space": False}
    after: dict[str, Any] = {**level, "add_prefix_space": True}
    match tokenizer:
        case BPETokenizer():
            require(tokenizer.pattern == GPT2_PATTERN, "only GPT-2's pattern can be exported")
            merges = [f"{spelled(a)} {spelled(b)}" for a, b in merges_of(tokenizer.ranks)]
            model = bpe_model({spelled(token): i for token, i in tokenizer.ranks.items()}, merges)
        case ByteTokenizer():
            before["use_regex"] = False
            model = bpe_model({letter: byte for byte, letter in enumerate(LETTERS)}, [])
        case CharTokenizer():
            # "<unk>" is no token, so an unknown character is an error, as it is here
            vocab = {character: i for i, character in enumerate(tokenizer.characters)}
            model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
            before = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}}
            before |= {"behavior": "Isolated", "invert": False}
            after = {"type": "Fuse"}
        case HubTokenizer():
            return json.loads(tokenizer.json)
        case _:
            raise ValueError(f"a {type(tokenizer).__name__} cannot be exported")
    added: list[dict[str, Any]] = []
    if tokenizer.end_of_text is not None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": tokenizer.end_of_text, "content": END_OF_TEXT, **flags, "special": True}]
        model["vocab"][END_OF_TEXT] = tokenizer.end_of_text
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": after,
        "model": model,
    }


def bpe_model(vocab: dict[str, int], merges: list[str]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def from_json(found: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json: one of ours, or if none is the same, a hub's.

    Raises ValueError if it is of another kind.
    """
    with readable("tokenizer.json"):
        before = found["pre_tokenizer"]
        if found["normalizer"] is None and before is not None and before["type"] in OURS:
            tokenizer = tokenizer_of(found)
            if plain(to_json(tokenizer)) == plain(found):
                return tokenizer
    return HubTokenizer(json.dumps(found, ensure_ascii=False))


def tokenizer_of(found: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that has this vocabulary, whatever else the file says."""
    vocab: dict[str, int] = dict(found["model"]["vocab"])
    names = [token["content"] for token in found["added_tokens"]]
    for name in names:
        vocab.pop(name, None)
    if found["model"]["type"] == "WordLevel":
        return CharTokenizer("".join(vocab), with_end_of_text=bool(names))
    if not found["model"]["merges"]:
        return ByteTokenizer()
    ranks = {
        bytes(BYTE_OF[letter] for letter in token): rank
        for token, rank in sorted(vocab.items(), key=lambda item: item[1])
    }
    return BPETokenizer(ranks, kind="gpt2" if len(ranks) == GPT2_RANKS else "bpe")


def plain(found: dict[str, Any]) -> list[Any]:
    """Return what decides about ids, in one form for all versions of the file."""
    model = {"merges": []} | found["model"]
    before = {"use_regex": True, "add_prefix_space": False} | found["pre_tokenizer"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in found["added_tokens"]}
    rules = [before["type"], before["use_regex"], before["add_prefix_space"]]
    return [rules, model["type"], found["normalizer"], merges, model["vocab"] | added, added]
