"""Small stories from a grammar, in which what attention is taught with can really be learned.

Pronouns that only the context resolves, words with several senses, adjectives that belong to a
noun, names that recur, and random words that are repeated later. The grammar knows how likely each
of its choices is, so each story comes with its exact -ln p: no model of such text has a lower mean.
"""

import itertools
import json
import math
import random
import re
from bisect import bisect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

Options = Mapping[str, float]  # each with a weight: how likely it is beside the others


def evenly(words: str) -> Options:
    """`tired old` -> {"tired": 1, "old": 1}: one option per word."""
    return dict.fromkeys(words.split(), 1)


# A rule stands for one of its options. In an option <rule> is replaced by that rule's text;
# <rule X> also calls it X, so that <X> is the same text again, here and in what replaces a later
# slot. A word that is in a named text is not drawn again there: two names, two people.
GRAMMAR: dict[str, Options] = {
    "story": {"Once <name A> and <name B> met. <scene> <more>": 1},
    "more": {"<scene> <more>": 1, "The end.": 1},
    "scene": {"<calm>": 2, "<spell>": 1, "<song>": 3},
    "calm": {"<crossing>": 2, "<fitting>": 1, "<sense>": 1, "<colours>": 1, "<gift>": 1},
    # A pronoun: what "it" is follows from who can be tired and what can be wide ...
    "crossing": {
        "The <animal X> did not cross the <place Y> because it was too <why>": 1,
        "The <place Y> was not crossed by the <animal X> because it was too <why>": 1,
    },
    "why": {"<of_animal>. The <X> <slept>.": 1, "<of_place>. The <Y> <stayed>.": 1},
    "slept": {"slept until noon": 1, "went home": 1, "lay down": 1, "sighed": 1},
    "stayed": {"stayed quiet": 1, "was closed": 1, "had a sign": 1, "lay empty": 1},
    # ... or from which of two things must be smaller than the other.
    "fitting": {"The <thing X> did not fit into the <thing Y> because it was too <size>": 1},
    "size": {"<big>. The <X> was <left>.": 1, "<small>. The <Y> was <left>.": 1},
    # A word with several senses: the place, not the word, says what follows.
    "sense": {
        "By the river <A> found a <by_river>.": 1,
        "In the city <A> found a <in_city>.": 1,
        "In the laboratory <A> found a <in_laboratory>.": 1,
    },
    "by_river": {"mole that dug a <hole>": 1, "bank that was <muddy>": 1},
    "in_city": {"bank that lent <money>": 1, "tower that had <windows>": 1},
    "in_laboratory": {"mole that weighed <grams>": 1, "tower that boiled <oil>": 1},
    # Adjectives that belong to a noun.
    "colours": {
        "A <quality P> <colour C> <animal X> met a <quality Q> <colour D> <animal Y>. <which>.": 1
    },
    "which": {"The <X> was <P> and <C>": 1, "The <Y> was <Q> and <D>": 1},
    # Names that recur.
    "gift": {
        "<A> gave <B> a <thing X>. <B> thanked <A> for the <X>.": 1,
        "<B> gave <A> a <thing X>. <A> thanked <B> for the <X>.": 1,
    },
    # Quoted repetition: of as many words and as much later as chance wants, from any word on.
    "spell": {
        '<A> taught <B> a spell: "Hear <words U> <words V>." <gap><B> remembered: "Hear <V>."': 1,
        '<B> taught <A> a spell: "Hear <words U> <words V>." <gap><A> remembered: "Hear <V>."': 1,
    },
    "song": {'<A> sang: "La <words U> <U> <U>."': 1, '<B> sang: "La <words U> <U> <U>."': 1},
    "words": {"<thing X> <thing Y><rest>": 1},
    "rest": {" <thing X><rest>": 5, "": 1},
    "gap": {"<calm> <gap>": 1, "": 3},
    "name": evenly(
        "Anna Ben Clara David Emma Felix Greta Henry Ida Jonas Karla Leo Mara Nils Olga Paul Rosa "
        "Simon Tina Viktor Wanda Alma Boris Cora Dario Elsa Frida Gustav Hanna Igor Julia Kasper"
    ),
    "animal": evenly(
        "dog cat horse goat fox hare bear wolf hen duck frog toad snail mouse rat pig cow sheep "
        "camel lion tiger zebra donkey badger"
    ),
    "place": evenly(
        "street road field meadow desert valley swamp canyon lake square trail highway bridge "
        "beach track glacier"
    ),
    "of_animal": evenly("tired sleepy hungry lazy shy old weak frightened"),
    "of_place": evenly("wide long steep deep muddy icy crowded rocky"),
    "big": evenly("big large huge bulky"),
    "small": evenly("small tiny narrow short"),
    "left": evenly("sold broken painted cut lost burnt"),
    "quality": evenly("fluffy gentle clever brave noisy polite proud merry curious calm fat thin"),
    "colour": evenly("red blue green white black brown grey golden"),
    "hole": evenly("tunnel burrow hole passage"),
    "muddy": evenly("green slippery flooded sandy"),
    "money": evenly("money gold silver coins"),
    "windows": evenly("windows bells stairs flags"),
    "grams": evenly("little nothing much half"),
    "oil": evenly("oil water wine petrol"),
    "thing": evenly(
        "lamp rope drum moon cup stone key box ring coat hat boot glove scarf belt purse book pen "
        "brush comb mirror clock bell flute harp violin trumpet candle torch match log barrel "
        "bucket basket bottle jar pot pan plate bowl spoon fork knife table chair bench stool bed "
        "pillow blanket rug curtain door gate fence wall roof ladder hammer nail saw shovel rake "
        "plough wheel cart wagon sledge boat sail net hook paddle compass map flag kite ball doll "
        "puppet mask crown sword shield bow helmet saddle whip cage nest feather shell pearl coral "
        "leaf seed root branch flower rose tulip lily thorn berry pear plum peach lemon melon nut "
        "bread cheese butter honey salt pepper sugar soup cake biscuit letter stamp ticket coin"
    ),
}
# Groups: the two nouns that "it" could be, and after it the one that it was.
PRONOUN = re.compile(
    r"The (\w+) (?:did|was) not (?:\w+ )+the (\w+) because it was too \w+\. The (\w+)"
)

N_STORIES = 50_000
SEED = 1
PATH = Path("data/generated/stories.jsonl")
SLOT = re.compile(r"<(\w+)(?: (\w+))?>")


class Story(NamedTuple):
    """A text and its -ln p, in nats."""

    text: str
    nats: float


class Named(NamedTuple):
    """A text that a slot has called by a name."""

    name: str
    text: str


class Rule:
    """Options with their probabilities, cut at their slots."""

    def __init__(self, options: Options):
        self.options, total = list(options), sum(options.values())
        self.p = {option: weight / total for option, weight in options.items()}
        self.cumulative = list(itertools.accumulate(self.p.values()))
        # "a <b C>." -> ["a ", "b", "C", "."]: text, then rule, name and text of each slot
        self.pieces = {option: SLOT.split(option) for option in options}

    def draw(self, taken: set[str], rng: random.Random) -> Story:
        """Choose an option that is not taken; the others keep their proportions."""
        left = 1 - math.fsum(self.p[text] for text in taken)  # in any order the same
        while True:
            option = self.options[bisect(self.cumulative, rng.random() * self.cumulative[-1])]
            if option not in taken:
                return Story(option, math.log(left / self.p[option]))


class Grammar:
    """Rules from which texts are drawn, each with its -ln p.

    That is the text's own only if no other choices lead to the same text, as holds for GRAMMAR.
    """

    def __init__(self, rules: Mapping[str, Options]):
        self.rules = {name: Rule(options) for name, options in rules.items()}

    def write(self, rule: str, rng: random.Random, scope: tuple[Named, ...] = ()) -> Story:
        """Draw a text of `rule`, in which the names of `scope` stand for their texts."""
        options = self.rules[rule]
        taken = {word for it in scope for word in it.text.split() if word in options.p}
        option, nats = options.draw(taken, rng)
        first, *slots = options.pieces[option]
        texts = [first]
        for called, name, after in zip(slots[::3], slots[1::3], slots[2::3], strict=True):
            if called in self.rules:
                part = self.write(called, rng, scope)
                scope = (*scope, Named(name, part.text)) if name else scope
            else:
                part = Story(next(it.text for it in scope[::-1] if it.name == called), 0.0)
            texts += part.text, after
            nats += part.nats
        return Story("".join(texts), nats)


def generate(n: int, seed: int) -> Iterator[Story]:
    """Yield `n` stories, the same for the same seed."""
    grammar, rng = Grammar(GRAMMAR), random.Random(seed)
    return (grammar.write("story", rng) for _ in range(n))


def write_stories() -> Path:
    """Write the stories with their nats, whole or not at all; return the file."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    partial = PATH.with_name(f"{PATH.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(story._asdict()) + "\n" for story in generate(N_STORIES, SEED))
    return partial.replace(PATH)


def read_nats() -> list[float]:
    """Return the -ln p of each story that was written, in order."""
    with open(PATH, encoding="utf-8") as file:
        return [json.loads(line)["nats"] for line in file]
