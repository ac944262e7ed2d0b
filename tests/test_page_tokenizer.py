"""The tokenizer of visualize.py's page gives the ids and the texts of data/tokenizer.py."""

import base64
import functools
import json
import random
import time
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

from browser import Page
from data.bpe import train_bpe
from data.tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    gpt2_ranks,
)
from viewer.weights import tokenizer_spec

SPACES = "".join(map(chr, [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)]))
SPACES += "\u2028\u2029\u202f\u205f\u3000"  # all that are White_Space
NEARLY_SPACES = "\ufeff\u200b\u180e\u2060\x1c\x1d\x1e\x1f"  # by some other definition
DIGITS = "0123٣४๗²½Ⅷⅷ一〇൰𝟘🄁"
MARKS = "e\u0301a\u0308\u0902\u20e3\u0e31\u093f"
EMOJI = "🙂👩\u200d🚀👍🏽🇫🇷❤\ufe0f1\ufe0f\u20e3"
WORDS = "the cat isn't we'll I'VE don''t they're 'd's'm'x naïve 日本語 Ωmega <|endoftext|>"
LONE = "\ud800\udfff"  # but in this order they are one character in UTF-16
EVERY = "".join(
    chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")
)
ALPHABETS = {
    "ASCII": "".join(map(chr, range(128))),
    "contractions": "'''strevmldSTD ’ \n",
    "spaces": SPACES * 3 + NEARLY_SPACES + "a1.",
    "digits": DIGITS + " a.",
    "marks": MARKS + EMOJI + " a",
    "lone surrogates": LONE + " a1\ufffd",
    "any": EVERY,
}
NAMES = ["byte", "bpe", "hard", "gpt2"]


@functools.cache
def learned() -> BPETokenizer:
    text = (
        f"{WORDS} {MARKS} {EMOJI} {DIGITS} \n\n\t  {SPACES} cats and the hats, the cat's ... " * 9
    )
    return BPETokenizer(train_bpe([text], 400, GPT2_PATTERN), kind="bpe")


@functools.cache
def hard() -> BPETokenizer:
    """Its ids show where a text was cut: what touches a letter, digit, dot or space is a token.

    As bc is merged before ab and cd, abcd is found as a whole word or not at all.
    """
    single = [bytes([byte]) for byte in range(255, -1, -1)]
    beside = [pair for side in b"a1. \n" for byte in range(256) for pair in both(side, byte)]
    tokens = dict.fromkeys([*single, b"bc", b"ab", b"cd", b"abcd", *beside])
    return BPETokenizer({token: rank for rank, token in enumerate(tokens)}, kind="bpe")


def both(first: int, second: int) -> list[bytes]:
    return [bytes([first, second]), bytes([second, first])]


@functools.cache
def gpt2() -> BPETokenizer:
    return BPETokenizer(gpt2_ranks(), kind="gpt2")


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    match request.param:
        case "byte":
            return ByteTokenizer()
        case "bpe":
            return learned()
        case "gpt2":
            request.getfixturevalue("gpt2_cache")
            return gpt2()
    return hard()


@pytest.fixture(scope="module")
def tab(browser: Page, tmp_path_factory: pytest.TempPathFactory) -> Page:
    browser.open_scripts(tmp_path_factory.mktemp("page"), "data.js", "tokenizer.js")
    return browser


@pytest.fixture
def in_page(tab: Page) -> Callable[..., list[Any]]:
    """Return a function that calls a method of the page's tokenizer with each of some things.

    What a call throws is returned in its place.
    """

    def call(tokenizer: Tokenizer, method: str, things: list[Any]) -> list[Any]:
        spec = json.loads(json.dumps(tokenizer_spec(tokenizer.state())))
        tab.run(f"tokenizer = makeTokenizer({json.dumps(spec)}); null")
        return tab.run(
            f"{json.dumps(things)}.map((thing) => {{ try {{ return tokenizer.{method}(thing); }}"
            " catch (error) { return String(error); } })"
        )

    return call


def texts(n: int, alphabet: str, longest: int = 40) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(alphabet, k=rng.randrange(longest))) for _ in range(n)]


def check_ids(in_page: Callable[..., list[Any]], tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = list(map(tokenizer.encode, texts))
    for text, found, ids in zip(texts, in_page(tokenizer, "encode", texts), expected, strict=True):
        assert found == ids, ascii(text)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_ids_are_pythons_for_random_texts(
    in_page: Callable[..., list[Any]], tokenizer: Tokenizer, alphabet: str
):
    check_ids(in_page, tokenizer, texts(1000, ALPHABETS[alphabet]))


def test_ids_are_pythons_for_words_in_any_order(
    in_page: Callable[..., list[Any]], tokenizer: Tokenizer
):
    rng = random.Random(1)
    parts = [*WORDS.split(), *SPACES, "\r\n", "  ", "\n\n\n", "\ufeff", *"'.,1", "abcd", "xabcd"]
    check_ids(in_page, tokenizer, ["", *("".join(rng.choices(parts, k=12)) for _ in range(2000))])


@pytest.mark.slow
def test_each_assigned_character_is_cut_from_its_neighbours_as_in_python(
    in_page: Callable[..., list[Any]],
):
    parts = [f"a{c}1 {c}." for c in EVERY]  # a letter joins a, a digit 1, others the dot
    check_ids(in_page, hard(), ["".join(parts[i : i + 50]) for i in range(0, len(parts), 50)])


def test_a_text_with_special_names_is_ordinary_and_end_of_text_decodes_to_its_name(
    in_page: Callable[..., list[Any]], tokenizer: Tokenizer
):
    check_ids(in_page, tokenizer, ["<|endoftext|>"])
    assert tokenizer.end_of_text not in in_page(tokenizer, "encode", ["<|endoftext|>"])[0]
    assert in_page(tokenizer, "decode", [[tokenizer.end_of_text]]) == ["<|endoftext|>"]


def test_random_ids_decode_to_pythons_text(in_page: Callable[..., list[Any]], tokenizer: Tokenizer):
    rng = random.Random(0)
    bom = tokenizer.encode("\ufeffa\ufeff")
    some = [rng.choices(range(tokenizer.vocab_size), k=rng.randrange(12)) for _ in range(3000)]
    high = [rng.choices(tokenizer.encode("é日🙂\ufffd"), k=rng.randrange(9)) for _ in range(3000)]
    chosen = [bom, *some, *high]
    assert in_page(tokenizer, "decode", chosen) == list(map(tokenizer.decode, chosen))


def test_decoding_undoes_encoding(in_page: Callable[..., list[Any]], tokenizer: Tokenizer):
    written = texts(1000, EVERY)
    ids = in_page(tokenizer, "encode", written)
    assert in_page(tokenizer, "decode", ids) == written


@pytest.mark.parametrize("with_end", [False, True])
def test_ids_and_texts_of_a_character_vocabulary_are_pythons(
    in_page: Callable[..., list[Any]], with_end: bool
):
    rng = random.Random(0)
    alphabet = SPACES + MARKS + EMOJI + "abc\0\uffff\U00010000" + "".join(rng.choices(EVERY, k=300))
    tokenizer = CharTokenizer(alphabet, with_end_of_text=with_end)
    written = texts(2000, alphabet)
    check_ids(in_page, tokenizer, written)
    ids = [rng.choices(range(tokenizer.vocab_size), k=9) for _ in written]
    assert in_page(tokenizer, "decode", ids) == list(map(tokenizer.decode, ids))


def test_characters_outside_a_character_vocabulary_are_named(in_page: Callable[..., list[Any]]):
    tokenizer = CharTokenizer("abc\ufffd", with_end_of_text=False)
    found = in_page(tokenizer, "encode", ["abé☃c☃", "\ud800", "abcdefghijklmnop", ""])
    lacks = "Error: the character vocabulary lacks"
    assert found[0] == f'{lacks} "é", "☃": use the characters of the training text'
    assert found[1].startswith(rf'{lacks} "\ud800":')
    assert found[2].count('"') == 2 * 10
    assert found[3] == []


def test_the_page_knows_the_size_and_the_end_of_the_vocabulary(tab: Page, tokenizer: Tokenizer):
    characters = [CharTokenizer("é🙂", with_end_of_text=with_end) for with_end in (False, True)]
    for one in (tokenizer, *characters):
        spec = tokenizer_spec(one.state())
        assert spec is not None
        assert tab.run(f"makeTokenizer({json.dumps(spec)}).size") == one.vocab_size
        assert spec["end"] == one.end_of_text


@pytest.mark.parametrize("letter", ["a", " ", "é", "."])
def test_ten_thousand_equal_letters_take_under_two_seconds(
    in_page: Callable[..., list[Any]], letter: str
):
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [letter.encode() * n for n in range(2 if letter == "é" else 3, 40)][:30]
    unique = list(dict.fromkeys([*tokens, letter.encode()]))
    tokenizer = BPETokenizer({token: rank for rank, token in enumerate(unique)}, kind="bpe")
    in_page(tokenizer, "encode", [letter])
    start = time.monotonic()
    found = in_page(tokenizer, "encode", [letter * 10_000])
    assert time.monotonic() - start < 2
    assert found == [tokenizer.encode(letter * 10_000)]


def test_other_patterns_and_foreign_tokenizers_are_left_to_python():
    assert tokenizer_spec(learned().state() | {"pattern": r"\S+|\s+"}) is None
    assert tokenizer_spec({"kind": "hub", "json": "{}"}) is None


def test_the_tokens_of_a_specification_are_in_the_order_of_their_ranks():
    spec = tokenizer_spec(learned().state())
    assert spec is not None
    assert [base64.b64decode(token) for token in spec["tokens"]] == list(learned().ranks)
