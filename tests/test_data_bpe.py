"""The BPE trainer against rustbpe, and its ranks under tiktoken against rustbpe's own encoder."""

import random
import sysconfig
import time
from pathlib import Path

import pytest
from rustbpe import Tokenizer as RustBPE  # pyright: ignore[reportAttributeAccessIssue]

from data.bpe import LONGEST_PRETOKEN, train_bpe
from data.tokenizer import GPT2_PATTERN, BPETokenizer

LIBRARY = Path(sysconfig.get_path("stdlib"))


def source(*names: str) -> list[str]:
    return [(LIBRARY / name).read_text("utf-8") for name in names]


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    alphabets = [
        "ab ",
        "aA1.'s \n\t",
        "the cat's 12 hats\n  ",
        "é☃日本🙂 x\u00a0\u3000\x1c",
        "  \n",
    ]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(1, 80))) for _ in range(n)]


@pytest.fixture(scope="module")
def trained() -> tuple[dict[bytes, int], RustBPE]:
    texts = source("argparse.py", "typing.py", "ast.py", "_pydecimal.py")
    oracle = RustBPE()
    oracle.train_from_iterator(iter(texts), 4000, pattern=GPT2_PATTERN)
    return train_bpe(texts, 4000, GPT2_PATTERN), oracle


def test_the_docstring_example_merges_aa_then_ab_then_aaab():
    ranks = train_bpe(["aaabdaaabac"], 300, GPT2_PATTERN)
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    assert list(ranks.values()) == list(range(259))


def test_ranks_equal_rustbpe_rank_for_rank(trained: tuple[dict[bytes, int], RustBPE]):
    ranks, oracle = trained
    assert len(ranks) == 4000
    assert ranks == {bytes(token): rank for token, rank in oracle.get_mergeable_ranks()}


@pytest.mark.parametrize("n_ranks", [256, 257, 270, 300])
def test_ranks_equal_rustbpe_on_runs_of_one_letter_and_on_ties(n_ranks: int):
    texts = ["a aa aaa aaaa aaaaa abababa bababab ccc dddd " * 3, *random_texts(50)]
    oracle = RustBPE()
    oracle.train_from_iterator(iter(texts), n_ranks, pattern=GPT2_PATTERN)
    expected = {bytes(token): rank for token, rank in oracle.get_mergeable_ranks()}
    assert train_bpe(texts, n_ranks, GPT2_PATTERN) == expected


def test_our_ids_on_texts_it_was_not_trained_on_are_rustbpes_own(
    trained: tuple[dict[bytes, int], RustBPE],
):
    ranks, oracle = trained
    tokenizer = BPETokenizer(ranks, kind="bpe")
    for text in source("inspect.py", "tarfile.py", "turtle.py") + random_texts(2000):
        assert tokenizer.encode(text) == oracle.encode(text)


def test_training_ends_when_no_pair_is_seen_twice():
    assert len(train_bpe(["abc def"], 1000, GPT2_PATTERN)) == 256


def test_a_word_of_300_000_letters_is_left_out_so_that_training_stays_fast():
    started_at = time.perf_counter()
    ranks = train_bpe(["ab" * 150_000 + " hello hello"], 4000, GPT2_PATTERN)
    assert time.perf_counter() - started_at < 2
    assert max(map(len, ranks)) <= LONGEST_PRETOKEN
    assert b" hello" in ranks
    assert b"abab" not in ranks
