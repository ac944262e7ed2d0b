"""Name what a head does, but only if its score, a baseline and its ablation agree."""

from data.stories import ROLES
from viewer.probe import Measured
from viewer.scores import NAMES

LEAST = 0.3  # a score below it gives no label; 0.4 would miss good heads of small models
TIMES_UNIFORM = 5  # uniform attention alone scores high on short texts
COST_WRITTEN = 0.01  # nats per token that the head must be worth on text,
COST_COPIED = 0.1  # or on copies
PERIODS_NEEDED = 2  # one period cannot tell copying from looking a fixed number of tokens back
LABELS = ("induction", "duplicate", "previous", "current", "first", "column", *ROLES)


def label(layer: int, head: int, measured: Measured) -> tuple[str, str]:
    """Return the key of a head's label, or "" for none, and why it has that label."""
    scores = {name: float(measured.score(name)[layer, head].nan_to_num()) for name in LABELS}
    reasons: list[str] = []
    for name in sorted(LABELS, key=lambda name: -scores[name]):
        if scores[name] < LEAST:
            break
        found = f"{NAMES[name][0]} {scores[name]:.2f} (uniform {measured.uniform[name]:.2f})"
        objection = objection_to(name, layer, head, measured)
        if not objection:
            on_text, on_copies = costs_of(layer, head, measured)
            costs = f"{on_text:+.2f} nats on text, {on_copies:+.2f} on a copy"
            return name, f"{found}; switching it off costs {costs}"
        reasons.append(f"{found} does not count: {objection}")
    return "", "; ".join(reasons) or f"no score of {LEAST} or more"


def objection_to(name: str, layer: int, head: int, measured: Measured) -> str:
    """Return why a high score is not to be believed, or ""."""
    on_text, on_copies = costs_of(layer, head, measured)
    if measured.score(name)[layer, head] < TIMES_UNIFORM * measured.uniform[name]:
        return f"less than {TIMES_UNIFORM} times uniform attention"
    if name == "induction" and layer == 0:
        return "induction takes two layers, so this head looks a fixed distance back"
    if name in ("induction", "duplicate") and measured.n_periods < PERIODS_NEEDED:
        return "the context is too short to try several periods"
    if name == "induction" and not on_copies >= COST_COPIED:
        return f"switching it off costs {on_copies:.2f} nats on a copy, less than {COST_COPIED}"
    if name == "first" and not measured.copied["first"][layer, head] >= LEAST:
        return f"below {LEAST} on random tokens"
    if name != "first" and not (on_text >= COST_WRITTEN or on_copies >= COST_COPIED):
        return "switching it off costs next to nothing"
    return ""


def costs_of(layer: int, head: int, measured: Measured) -> tuple[float, float]:
    """Return what the head is worth on text and on copies, in nats per token; nan if unknown."""
    return float(measured.cost_written_LH[layer, head]), float(measured.cost_copied_LH[layer, head])
