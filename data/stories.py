"""Small stories from a grammar, full of the examples that attention is usually explained with.

There are pronouns that only the context resolves, words with several senses, adjectives that
belong to a noun, names that recur, and random words that are repeated later. The grammar, which is
in stories.toml, knows how likely its choices are, so each story has an exact -ln p: no model can
have a lower mean loss.
"""

import itertools
import json
import math
import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import files

Options = Mapping[str, float]  # each with a weight, to which its probability is proportional
Name = tuple[str, str]  # a name that a slot has given, and the text that it stands for

# As the grammar writes it. Groups: the two nouns that "it" could be, then the one that it is.
PRONOUN = re.compile(
    r"The (\w+) (?:did|was) not (?:\w+ )+the (\w+) because it was too \w+\. The (\w+)"
)

N_STORIES = 50_000
SEED = 1
PATH = Path("data/generated/stories.jsonl")
SLOT = re.compile(r"<(\w+)(?: (\w+))?>")


def read_grammar() -> Mapping[str, Options]:
    """Return the rules of stories.toml, each with the weights of its options.

    "old tired" -> {"old": 1, "tired": 1}; ["lay down", "sighed"] -> {"lay down": 1, "sighed": 1}
    """
    rules = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    lists = {rule: text.split() for rule, text in rules.items() if isinstance(text, str)}
    lists |= {rule: texts for rule, texts in rules.items() if isinstance(texts, list)}
    return rules | {rule: dict.fromkeys(options, 1) for rule, options in lists.items()}


GRAMMAR = read_grammar()


def any_of(rules: str, others: str = "") -> str:
    """Return a pattern for the words of rules, and others: "big", "a b" -> big|large|...|a|b."""
    words = [word for rule in rules.split() for word in GRAMMAR[rule]] + others.split()
    return rf"\b(?:{'|'.join(words)})\b"


NOUN = any_of("name animal place thing hole", "mole bank tower spell sign")
VERB = rf"(?!{NOUN}|(?:and|because|for|a)\b)\w+"  # or whatever else follows its subject
ADJECTIVE = any_of("quality colour")
OPENING = re.compile(rf"Once {NOUN} and {NOUN} met\.")  # of every story
# Two words that belong together. Groups: the earlier one, which may be two words, and the later one
ROLES = {
    # "Anna and Ben met", "dog did not cross", "bank that lent": a subject and its verb
    "subject": rf"({NOUN}(?: and {NOUN})?) (?:that |(?:did|was) not )?({VERB})",
    # "gave Ben a lamp", "met a brave red fox": a verb and its object, if that has an article
    "object": rf"\b(?!into|by|for)(\w+) (?:{NOUN} a |the |a )(?:{ADJECTIVE} )*({NOUN})",
    # "brave red fox": adjectives and their noun
    "adjective": rf"({ADJECTIVE} {ADJECTIVE}) ({NOUN})",
}


class Story(NamedTuple):
    """A text and its -ln p, in nats."""

    text: str
    nats: float


class Rule:
    """Options with their probabilities, cut at their slots."""

    def __init__(self, options: Options):
        total = sum(options.values())
        self.options = list(options)
        self.p = {option: weight / total for option, weight in options.items()}
        self.cumulative = list(itertools.accumulate(self.p.values()))
        # "a <b C>." -> ["a ", "b", "C", "."]: text, then the rule, name and following text per slot
        self.pieces = {option: SLOT.split(option) for option in options}

    def draw(self, taken: set[str], rng: random.Random) -> Story:
        """Draw one of the options that are not taken, in proportion to their probabilities."""
        left = 1 - math.fsum(self.p[option] for option in taken)  # fsum, as a set has no order
        while True:
            option = rng.choices(self.options, cum_weights=self.cumulative)[0]
            if option not in taken:
                return Story(option, math.log(left / self.p[option]))


class Grammar:
    """Rules that write texts, each with its -ln p: no two series of choices may write the same."""

    def __init__(self, rules: Mapping[str, Options]):
        self.rules = {name: Rule(options) for name, options in rules.items()}

    def write(self, rule: str, rng: random.Random, scope: tuple[Name, ...] = ()) -> Story:
        """Write a text of `rule`, in which each name of `scope` stands for its text."""
        options = self.rules[rule]
        taken = {word for _, text in scope for word in text.split() if word in options.p}
        option, nats = options.draw(taken, rng)
        first, *slots = options.pieces[option]
        texts = [first]
        for called, name, after in zip(slots[::3], slots[1::3], slots[2::3], strict=True):
            if called in self.rules:
                part = self.write(called, rng, scope)
                scope = (*scope, (name, part.text)) if name else scope
            else:
                part = Story(dict(scope)[called], 0.0)  # the last text of that name
            texts += [part.text, after]
            nats += part.nats
        return Story("".join(texts), nats)


def generate(n: int, seed: int) -> Iterator[Story]:
    """Yield `n` stories, the same ones for the same seed."""
    grammar = Grammar(GRAMMAR)
    rng = random.Random(seed)
    return (grammar.write("story", rng) for _ in range(n))


def write_stories() -> Path:
    """Write the stories and their nats to a .jsonl file; return its path."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(PATH) as file:
        file.writelines(json.dumps(story._asdict()) + "\n" for story in generate(N_STORIES, SEED))
    return PATH


def read_nats() -> list[float]:
    """Return the -ln p of each story in the file, in order."""
    with open(PATH, encoding="utf-8") as file:
        return [json.loads(line)["nats"] for line in file]


def questions(story: str) -> Iterator[tuple[str, str, str]]:
    """Yield the text before each noun that a pronoun stood for, that noun, and the other one.

    "... it was too lazy. The pig slept ..." -> "... it was too lazy. The", "pig", "road"
    """
    for match in PRONOUN.finditer(story):
        first, second, noun = match.groups()
        yield story[: match.start(3) - 1], noun, first if noun == second else second
