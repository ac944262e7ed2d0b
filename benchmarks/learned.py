"""What a model has learned from stories: python -m benchmarks.learned --out_dir=RUN --data=DATASET

Prints the tables of `bench.py stories` as one JSON object.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.heads import heads
from benchmarks.stories import StoriesBench
from benchmarks.table import Row, Tables
from data.bigram import bigram_loss
from data.loader import Dataset, eval_batches
from data.stories import PRONOUN
from data.tokenizer import Tokenizer
from engine import checkpoint, cli
from engine.evaluate import evaluate
from engine.parallel import World
from model import GPT, ModelConfig

BATCH = 16  # windows at a time


def measure(config: StoriesBench) -> Tables:
    """Measure loss, pronouns and heads."""
    dataset, model = Dataset.open(config.data), load(config.out_dir)
    stories = split_stories(dataset.tokens("val"), dataset.tokenizer)
    return {
        "loss on unseen stories": losses(model, dataset),
        "right noun for the pronoun, %": [pronouns(model, dataset, stories[: config.stories])],
        **heads(model, dataset),
    }


def load(out_dir: Path) -> GPT:
    """Rebuild the model of a run."""
    state = checkpoint.load(out_dir, "best")
    model = GPT(ModelConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model.eval()


def split_stories(tokens_N: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Cut a split before each end-of-text: each story begins with one, and ends before the next."""
    starts = np.flatnonzero(tokens_N == tokenizer.end_of_text)
    return [story.astype(np.int64) for story in np.split(tokens_N, starts[1:])]


def losses(model: GPT, dataset: Dataset) -> list[Row]:
    """The loss on all unseen stories, beside the least possible and a bigram model's."""
    val_T, vocab_size = dataset.tokens("val"), dataset.vocab_size
    window = {"vocab_size": vocab_size, "context_length": model.config.context_length}
    batches = eval_batches(val_T, dataset.end_of_text, batch_size=BATCH, **window)
    entropy = dataset.entropy()
    if entropy is None:
        raise ValueError(f"{dataset.path} is not of stories: run python -m data.prepare stories")
    found = {
        "the grammar: entropy": entropy,
        "the model": evaluate(model, batches, World(torch.device("cpu"))),
        "a bigram model": bigram_loss(dataset.tokens("train"), val_T, vocab_size),
    }
    return [
        {"of": name, "nats per token": loss, "above entropy, %": 100 * (loss / entropy - 1)}
        for name, loss in found.items()
        if loss is not None
    ]


@torch.no_grad()
def pronouns(model: GPT, dataset: Dataset, stories: list[np.ndarray]) -> Row:
    """How often the noun that the pronoun stands for is likelier than the other one, in %."""
    train_T, tokenizer = dataset.tokens("train").astype(np.int64), dataset.tokenizer
    pairs = np.bincount(train_T[:-1] * dataset.vocab_size + train_T[1:])
    right: dict[str, list[float]] = {"model": [], "bigram model": []}
    for story in stories:
        for prefix, (noun, other) in questions(story, tokenizer):
            logits_V = model(torch.tensor([prefix[-model.config.context_length :]]))[0, -1]
            count_V = pairs[prefix[-1] * dataset.vocab_size :]
            right["model"].append(float(logits_V[noun] > logits_V[other]))
            right["bigram model"].append((np.sign(count_V[noun] - count_V[other]) + 1) / 2)
    shares: Row = {name: 100 * float(np.mean(values)) for name, values in right.items()}
    return shares | {"pronouns": len(right["model"])}


def questions(
    story: np.ndarray, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yield the tokens before each noun that a pronoun stood for, that noun's, and the other's."""
    text = tokenizer.decode(story[1:])
    for match in re.finditer(PRONOUN, text):
        first, second, noun = match.groups()
        other = first if noun == second else second
        prefix = tokenizer.encode(text[: match.start(3) - 1])
        yield (
            [int(story[0]), *prefix],
            (tokenizer.encode(f" {noun}")[0], tokenizer.encode(f" {other}")[0]),
        )


def main() -> None:
    print(json.dumps(measure(cli.parse_config(StoriesBench))))


if __name__ == "__main__":
    cli.run(main)
