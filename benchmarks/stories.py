"""`bench.py stories`: what a model has learned from data.stories, and which heads do it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.table import Output, Row, Tables
from data.bigram import bigram_loss
from data.loader import Dataset
from data.stories import questions
from engine.loss import LossModel
from model import GPT
from sampling.load import load_model
from sampling.score import split_loss
from viewer.labels import costs_of, label
from viewer.probe import Measured, make_probes, measure
from viewer.scores import NAMES


@dataclass(frozen=True, kw_only=True)
class Stories(Output):
    """Judge a run of config/stories.toml on stories that it has not seen."""

    out_dir: Path = Path("out/stories")
    """Folder that train.py wrote."""
    data: Path = Path("data/stories_bpe")
    """Folder that data.prepare wrote."""
    stories: int = 1000
    """Stories to ask for pronouns in, the first of the validation split."""

    @torch.inference_mode()
    def measure(self) -> Tables:
        """Measure loss, pronouns and heads."""
        dataset = Dataset.open(self.data)
        model = load_model(self.out_dir, "best", "cpu").model
        val_N = dataset.tokens("val")
        starts = np.flatnonzero(val_N == dataset.end_of_text)
        stories = np.split(val_N, starts[1:])[: self.stories]  # each begins with end-of-text
        start = dataset.end_of_text or 0
        probes = make_probes(model, start, dataset.vocab_size, dataset.tokenizer)
        return {
            "loss on unseen stories": losses(model, dataset),
            "right noun for the pronoun, %": [pronouns(model, dataset, stories)],
            "heads": head_rows(measure(model, probes)),
        }


def losses(model: GPT, dataset: Dataset) -> list[Row]:
    """Return the loss on all unseen stories, beside the least possible and a bigram model's."""
    entropy = dataset.entropy()
    if entropy is None:
        raise ValueError(f"{dataset.path} is not of stories: run python -m data.prepare stories")
    module, T = LossModel(model, torch.float32), model.config.context_length
    tokens = (dataset.tokens("train"), dataset.tokens("val"))
    found = {"the grammar: entropy": entropy, "the model": split_loss(module, T, dataset)}
    found["a bigram model"] = bigram_loss(*tokens, dataset.vocab_size)
    return [
        {"of": name, "nats per token": loss, "above entropy, %": 100 * (loss / entropy - 1)}
        for name, loss in found.items()
    ]


def pronouns(model: GPT, dataset: Dataset, stories: list[np.ndarray]) -> Row:
    """Return how often the noun that the pronoun stands for is likelier than the other one."""
    train_N = dataset.tokens("train").astype(np.int64)
    pairs = np.bincount(train_N[:-1] * dataset.vocab_size + train_N[1:])
    right: dict[str, list[float]] = {"model": [], "bigram model": []}
    encode = dataset.tokenizer.encode
    for story_N in stories:
        for text, *words in questions(dataset.tokenizer.decode(story_N[1:])):
            tokens = [int(story_N[0]), *encode(text)]
            noun, other = (encode(f" {word}")[0] for word in words)
            logits_V = model(torch.tensor([tokens[-model.config.context_length :]]))[0, -1]
            count_V = pairs[tokens[-1] * dataset.vocab_size :]
            right["model"].append(float(logits_V[noun] > logits_V[other]))
            right["bigram model"].append((np.sign(count_V[noun] - count_V[other]) + 1) / 2)
    shares: Row = {name: 100 * float(np.mean(values)) for name, values in right.items()}
    return shares | {"pronouns": len(right["model"])}


def head_rows(measured: Measured) -> list[Row]:
    """Return the heads with a label and what each is worth, then the most that others are worth.

    What a head is worth is by how much the loss rises without it, in nats per token.
    """
    rows: list[Row] = []
    others = [0.0]
    for layer, head in np.ndindex(*measured.cost_copied_LH.shape):
        name, _ = label(layer, head, measured)
        on_text, on_copies = costs_of(layer, head, measured)
        if not name:
            others.append(on_copies)
            continue
        row: Row = {"head": f"L{layer}H{head}", "label": NAMES[name][0]}
        row |= {"score": float(measured.score(name)[layer, head])}
        row |= {"of uniform attention": measured.uniform[name]}
        rows.append(row | {"worth on text": on_text, "worth on copies": on_copies})
    return [*rows, {"head": "any other, at most", "worth on copies": max(others)}]
