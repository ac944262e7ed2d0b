"""Name what a head does, but only where score, baseline and behaviour agree."""

import math

from viewer.probe import Measured
from viewer.scores import NAMES

LEAST = 0.3  # of a score: 0.4 would miss good heads of small models
TIMES_UNIFORM = 5  # in short texts uniform attention scores high by itself
COST_WRITTEN = 0.01  # nats per token that the head must be worth on text,
COST_COPIED = 0.1  # or on copies
PERIODS_NEEDED = 2  # one period cannot tell copying from looking a fixed number of tokens back
LABELS = ("induction", "duplicate", "previous", "current", "first")


def label(layer: int, head: int, measured: Measured) -> tuple[str, str]:
    """The key of a head's label, or "" for none, and a sentence that says why."""
    reasons: list[str] = []
    for name in sorted(LABELS, key=lambda name: -number(measured.score(name)[layer, head])):
        score, uniform = number(measured.score(name)[layer, head]), measured.uniform[name]
        if score < LEAST:
            break
        found = f"{NAMES[name][0]} {score:.2f} (uniform {uniform:.2f})"
        objection = objection_to(name, layer, head, measured)
        if not objection:
            return name, f"{found}: {evidence(name, layer, head, measured)}"
        reasons.append(f"not labelled {found}: {objection}")
    return "", "; ".join(reasons) or f"no score of {LEAST} or more"


def objection_to(name: str, layer: int, head: int, measured: Measured) -> str:
    """Why a high score is not to be believed, or ""."""
    on_text, on_copies = costs_of(layer, head, measured)
    if number(measured.score(name)[layer, head]) < TIMES_UNIFORM * measured.uniform[name]:
        return f"less than {TIMES_UNIFORM} times uniform"
    if name == "induction" and layer == 0:
        return "it takes two layers, so this is a fixed distance"
    if name in ("induction", "duplicate") and measured.n_periods < PERIODS_NEEDED:
        return "the context is too short to try several periods"
    if name == "induction" and not on_copies >= COST_COPIED:
        return f"switched off, it costs {on_copies:.2f} nats on a copy, less than {COST_COPIED}"
    if name == "first" and number(measured.copied["first"][layer, head]) < LEAST:
        return "not on random tokens"
    if name != "first" and not (on_text >= COST_WRITTEN or on_copies >= COST_COPIED):
        return "switched off, it costs next to nothing"
    return ""


def evidence(name: str, layer: int, head: int, measured: Measured) -> str:
    """What speaks for a label besides the score."""
    if name == "first":  # at rest, so that it need not cost anything
        return "and on random tokens too"
    on_text, on_copies = costs_of(layer, head, measured)
    return f"switched off, it costs {on_text:+.2f} nats on text, {on_copies:+.2f} on a copy"


def costs_of(layer: int, head: int, measured: Measured) -> tuple[float, float]:
    """What switching a head off costs on text and on copies, in nats per token; nan if unknown."""
    return float(measured.cost_written_LH[layer, head]), float(measured.cost_copied_LH[layer, head])


def number(score: object) -> float:
    """A score, with 0 for one that no text could tell."""
    value = float(score)  # type: ignore[arg-type]
    return 0.0 if math.isnan(value) else value
