"""Tokenizers against tiktoken, nanoGPT's published counts and Python's own UTF-8 codec."""

import functools
import json
import random
import socket
from pathlib import Path

import pytest
import tiktoken

from data.bpe import train_bpe
from data.tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    cut,
    gpt2_ranks,
    load_tokenizer,
)

TEXTS = ["", "Hello, world", "naïve 🙂 日本 ☃", "a\r\nb\tc\0", "<|endoftext|>", "  \n\n x ' 's"]


def bpe() -> BPETokenizer:
    return BPETokenizer(train_bpe(["hello world, hello words " * 9], 300, GPT2_PATTERN), kind="bpe")


@functools.cache
def read_gpt2() -> BPETokenizer:
    return BPETokenizer(gpt2_ranks(), kind="gpt2")


@pytest.fixture
def gpt2(gpt2_cache: Path) -> BPETokenizer:
    return read_gpt2()


@pytest.fixture(params=["char", "char with end-of-text", "byte", "bpe", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    match request.param:
        case "gpt2":
            return request.getfixturevalue("gpt2")
        case "byte":
            return ByteTokenizer()
        case "bpe":
            return bpe()
        case kind:
            return CharTokenizer("".join(TEXTS), with_end_of_text="with" in kind)


def test_decode_undoes_encode(tokenizer: Tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_lie_in_the_vocabulary_and_none_is_end_of_text(tokenizer: Tokenizer):
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.end_of_text not in tokens


def test_a_tokenizer_comes_back_from_its_state_through_json(tokenizer: Tokenizer):
    again = load_tokenizer(json.loads(json.dumps(tokenizer.state())))
    assert again.vocab_size == tokenizer.vocab_size
    assert again.end_of_text == tokenizer.end_of_text
    assert again.state() == tokenizer.state()
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_tokens_that_are_no_utf8_decode_as_python_replaces_them():
    rng = random.Random(0)
    for _ in range(200):
        data = rng.randbytes(12)
        assert ByteTokenizer().decode(data) == data.decode("utf-8", "replace")


def test_a_token_outside_the_vocabulary_is_refused_with_its_bounds(tokenizer: Tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"0 to {tokenizer.vocab_size - 1}: got {token}"):
            tokenizer.decode([token])


def test_end_of_text_decodes_to_its_name(tokenizer: Tokenizer):
    if tokenizer.end_of_text is not None:
        assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_a_lone_surrogate_becomes_a_replacement_character():
    for tokenizer in (ByteTokenizer(), bpe()):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_characters_outside_a_character_vocabulary_are_named():
    with pytest.raises(ValueError, match=r"the character vocabulary lacks 'é', '☃': .*bpe"):
        CharTokenizer("abc", with_end_of_text=False).encode("abé☃c☃")
    with pytest.raises(ValueError, match="ud800"):
        CharTokenizer("abc", with_end_of_text=False).encode("\ud800")


def test_characters_are_numbered_in_sorted_order():
    tokenizer = CharTokenizer("hello", with_end_of_text=True)
    assert tokenizer.encode("ehlo") == [0, 1, 2, 3]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (4, 5)


def test_gpt2s_ranks_and_ids_are_tiktokens_own(gpt2: BPETokenizer):
    oracle = tiktoken.get_encoding("gpt2")
    assert gpt2.ranks == oracle._mergeable_ranks
    assert (gpt2.end_of_text, gpt2.vocab_size) == (oracle.eot_token, oracle.n_vocab)
    for text in [*TEXTS, Path(__file__).read_text("utf-8")]:
        assert gpt2.encode(text) == oracle.encode_ordinary(text)


def test_the_fast_pattern_gives_tiktokens_own_ids_of_any_characters(gpt2: BPETokenizer):
    oracle = tiktoken.get_encoding("gpt2")
    rng = random.Random(0)
    separators = " \t\n\r\x0b\x1c\x85\u00a0\u1680\u2009\u2028\u200b\u3000\ufeff"
    alphabets = [
        "'strevmld SDx \n",
        "aé日ⅷ9²٣._-'" + separators,
        separators,
        "".join(chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000),
    ]
    for _ in range(20_000):
        text = "".join(rng.choices(rng.choice(alphabets), k=rng.randrange(1, 40)))
        assert gpt2.encode(text) == oracle.encode_ordinary(text)


def test_cutting_a_text_keeps_its_tokens():
    oracle = bpe()._encoding
    rng = random.Random(1)
    for _ in range(1000):
        text = "".join(rng.choices("hello wo'rds  \n\t\u00a0é1.", k=200)) + " y" * 10
        pieces = cut(text, longest=40)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 40
        if all(piece[0] == " " and piece[1].strip() for piece in pieces[1:]):
            tokens = [token for piece in pieces for token in oracle.encode_ordinary(piece)]
            assert tokens == oracle.encode_ordinary(text)


@pytest.mark.parametrize(
    "text", ["a" * 10**6, " " * 10**6 + "x", "\n" * 10**6 + "x", "\u3000" * 10**6 + "x"]
)
def test_a_million_letters_or_spaces_in_a_row_are_encoded(text: str):
    tokenizer = bpe()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, "no char, byte, bpe, gpt2 or hub tokenizer: got {}"),
        ({"kind": "words"}, "got {'kind': 'words'}"),
        ({"kind": "char"}, "got {'kind': 'char'}"),
        ({"kind": "bpe", "pattern": "a", "ranks": "YQ== 0\n"}, "all 256 bytes"),
        ({"kind": "bpe", "pattern": "a", "ranks": "YQ==\n"}, "not enough values"),
        ({"kind": "bpe", "pattern": "a", "ranks": None}, "'ranks': None}"),
    ],
)
def test_a_broken_state_is_refused_with_a_sentence(state: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(state)


def test_ranks_that_are_not_in_order_are_refused():
    state = bpe().state()
    first, second, *others = state["ranks"].splitlines(keepends=True)
    with pytest.raises(ValueError, match="the merges in order, from 0"):
        load_tokenizer(state | {"ranks": "".join([second, first, *others])})


def test_without_network_or_cache_gpt2_names_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def offline(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # another test may have loaded it
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(OSError, match=r"TIKTOKEN_CACHE_DIR.*bpe, byte or char"):
        gpt2_ranks()
