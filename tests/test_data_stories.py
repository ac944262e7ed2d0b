"""Stories: each text has one derivation, whose probability is what is written beside it."""

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from data.loader import Dataset
from data.stories import GRAMMAR, PRONOUN, SLOT, Grammar, Options, Story, generate, questions
from helpers import TINY, train_here, write_dataset, write_stories

Rules = dict[str, Options]
Names = tuple[tuple[str, str], ...]

SMALL: Rules = {  # everything that a grammar can have
    "story": {"<name A> and <name B> sang <pair P>. <end>": 1},
    "end": {"<A> slept.": 3, "<name C> sang <P>.": 1, "<B> sang <tone>.": 1},
    "pair": {"<tone X> <tone Y>": 1},
    "name": {"Ann": 1, "Bob": 2, "Cy": 1},
    "tone": {"do": 1, "re": 1, "mi": 2},
}


def derivations(rules: Rules, rule: str, names: Names = ()) -> Iterator[tuple[str, Fraction]]:
    """Every way to replace a rule: the text and its probability, by plain counting."""
    taken = {word for _, text in names for word in text.split()}
    weights = {option: Fraction(w) for option, w in rules[rule].items() if option not in taken}
    for option, weight in weights.items():
        for text, p in filled(rules, option, names):
            yield text, p * weight / sum(weights.values())


def filled(rules: Rules, option: str, names: Names) -> Iterator[tuple[str, Fraction]]:
    """Every way to fill the slots of an option."""
    slot = SLOT.search(option)
    if slot is None:
        yield option, Fraction(1)
        return
    called, name = slot.groups()
    old = [] if called in rules else [(dict(names)[called], Fraction(1))]
    for part, p in old or derivations(rules, called, names):
        more = (*names, (name, part)) if name else names
        for rest, q in filled(rules, option[slot.end() :], more):
            yield option[: slot.start()] + part + rest, p * q


def readings(text: str, rule: str, names: Names = ()) -> Iterator[tuple[str, Fraction]]:
    """Every way to read the start of a text as a rule of GRAMMAR: the rest, and the probability."""
    taken = {word for _, known in names for word in known.split()}
    weights = {option: Fraction(w) for option, w in GRAMMAR[rule].items() if option not in taken}
    for option, weight in weights.items():
        for rest, p in read(text, option, names):
            yield rest, p * weight / sum(weights.values())


def read(text: str, option: str, names: Names) -> Iterator[tuple[str, Fraction]]:
    slot = SLOT.search(option)
    before = option[: slot.start()] if slot else option
    if not text.startswith(before):
        return
    text = text.removeprefix(before)
    if slot is None:
        yield text, Fraction(1)
    elif (called := slot[1]) in GRAMMAR:
        for rest, p in readings(text, called, names):
            more = (*names, (slot[2], text.removesuffix(rest))) if slot[2] else names
            yield from ((end, p * q) for end, q in read(rest, option[slot.end() :], more))
    elif text.startswith(known := dict(names)[called]):
        yield from read(text.removeprefix(known), option[slot.end() :], names)


@functools.cache
def real_stories() -> list[Story]:
    return list(generate(3000, seed=5))


def drawn(rules: Rules, n: int) -> list[Story]:
    grammar = Grammar(rules)
    rng = random.Random(0)
    return [grammar.write("story", rng) for _ in range(n)]


def test_the_texts_of_a_small_grammar_differ_and_their_probabilities_add_up_to_1():
    texts = list(derivations(SMALL, "story"))
    assert len(dict(texts)) == len(texts) == 6 * 6 * 3
    assert sum(p for _, p in texts) == 1


def test_a_story_has_the_probability_that_counting_gives_it():
    counted = dict(derivations(SMALL, "story"))
    for text, nats in drawn(SMALL, 1000):
        assert nats == pytest.approx(-math.log(counted[text]))


def test_stories_are_as_frequent_as_they_are_probable_and_their_nats_average_to_the_entropy():
    counted = dict(derivations(SMALL, "story"))
    stories = drawn(SMALL, 20_000)
    entropy = -sum(float(p) * math.log(p) for p in counted.values())
    assert math.fsum(story.nats for story in stories) / 20_000 == pytest.approx(entropy, rel=0.01)
    found = Counter(story.text for story in stories)
    for text, p in counted.items():
        assert abs(found[text] - 20_000 * p) < 5 * math.sqrt(20_000 * p)


def test_a_real_story_can_be_read_in_one_way_only_which_has_its_probability():
    for text, nats in generate(60, seed=3):
        whole = [p for rest, p in readings(text, "story") if not rest]
        assert len(whole) == 1, text
        assert nats == pytest.approx(-math.log(whole[0]))


def test_no_text_continues_another_so_that_the_end_of_text_costs_nothing():
    for text, _ in real_stories():
        assert text.count("The end.") == 1
        assert text.endswith(" The end.")


def test_stories_depend_on_the_seed_alone():
    assert list(generate(20, seed=1)) == list(generate(20, seed=1))
    assert list(generate(20, seed=1)) != list(generate(20, seed=2))


def test_the_adjective_alone_says_what_it_is():
    text = " ".join(story.text for story in real_stories())
    kinds: Counter[str] = Counter()
    for match in PRONOUN.finditer(text):
        first, second, noun = match.groups()
        adjective = match[0].split(" too ")[1].split(".")[0]
        kind = next(k for k in ("of_animal", "of_place", "big", "small") if adjective in GRAMMAR[k])
        animal = first if first in GRAMMAR["animal"] else second
        place = second if second in GRAMMAR["place"] else first
        assert noun == {"of_animal": animal, "of_place": place, "big": first, "small": second}[kind]
        kinds[kind] += 1
    assert min(kinds.values()) > 100


def test_repeated_words_differ_and_begin_and_end_anywhere():
    lengths: Counter[int] = Counter()
    starts: Counter[int] = Counter()
    for story in real_stories():
        spells = [part.split() for part in story.text.split('"')[1::2] if part[:4] == "Hear"]
        for (_, *taught), (_, *remembered) in zip(spells[::2], spells[1::2], strict=True):
            assert len(set(taught)) == len(taught)
            assert " ".join(taught).rstrip(".").endswith(" ".join(remembered).rstrip("."))
            lengths[len(remembered)] += 1
            starts[len(taught) - len(remembered)] += 1
    assert len(lengths) > 10
    assert len(starts) > 10


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of few stories."""
    return write_stories(tmp_path_factory.mktemp("stories"), 1200)


def test_a_dataset_has_the_entropy_of_its_own_stories(prepared: Path):
    dataset = Dataset.open(prepared)
    nats = dict(generate(1200, seed=1))
    for split in ("train", "val"):
        tokens_N = dataset.tokens(split)
        entropy = dataset.meta["entropy"][split]
        _, *texts = dataset.tokenizer.decode(tokens_N.tolist()).split("<|endoftext|>")
        total = math.fsum(nats[text] for text in texts)
        assert entropy["nats"] == pytest.approx(total)
        assert entropy["per_token"] == pytest.approx(total / (len(tokens_N) - 1))
        n_bytes = sum(map(len, texts))
        assert entropy["bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes)
    assert dataset.entropy() == dataset.meta["entropy"]["val"]["per_token"]
    assert dataset.meta["splits"]["val"]["documents"] > 50


def test_a_word_of_a_story_is_a_token(prepared: Path):
    tokenizer = Dataset.open(prepared).tokenizer
    words = itertools.chain(*(GRAMMAR[rule] for rule in ("animal", "place", "thing")))
    assert {word for word in words if len(tokenizer.encode(f" {word}")) > 1} == set()


def test_the_entropy_is_known_of_stories_only_and_of_a_whole_split_only(
    prepared: Path, tmp_path: Path
):
    assert Dataset.open(prepared).entropy(first=100) is None
    assert Dataset.open(write_dataset(tmp_path)).entropy() is None


def test_a_run_says_how_far_it_is_from_the_entropy(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "tiny.toml"
    config.write_text(TINY.format(dataset=prepared))
    train_here(config, tmp_path / "run", "--max_steps=1")
    entropy = Dataset.open(prepared).entropy()
    assert f" % above): {entropy:.4f} nats per token" in capsys.readouterr().out


def test_a_question_ends_before_the_noun_and_gives_it_and_the_other_one() -> None:
    text = "The road was not crossed by the pig because it was too lazy. The pig slept until noon."
    assert list(questions(text)) == [(text.removesuffix(" pig slept until noon."), "pig", "road")]
