"""Draw all heads of a model as one picture."""

import warnings
from pathlib import Path

import numpy as np
from torch import Tensor

from viewer.labels import label
from viewer.probe import Measured
from viewer.scores import NAMES

MOST_NAMED = 40  # tokens, beyond which their names cannot be read
INCHES = 2.2  # the side of one map


def draw(path: Path, weights_LHTT: Tensor, tokens: list[str], measured: Measured) -> None:
    """Write a PNG, a row per layer and a column per head; rows of a map are queries.

    The colour is the square root of the weight, from 0 to 1 in every map; grey is masked.
    """
    import matplotlib  # slow to import, and needed once

    matplotlib.use("agg")
    from matplotlib import cm, colors, pyplot

    n_layer, n_head, T = weights_LHTT.shape[:3]
    size = (INCHES * n_head + 1.2, INCHES * n_layer + 0.8)
    figure, axes = pyplot.subplots(
        n_layer, n_head, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    ramp = pyplot.get_cmap("Blues").with_extremes(bad="#e6e6ec")
    scale = colors.PowerNorm(0.5, 0, 1)
    masked = np.triu(np.ones((T, T), dtype=bool), 1)
    for layer, row in enumerate(axes):
        for head, axis in enumerate(row):
            cells_TT = np.ma.array(weights_LHTT[layer, head].cpu().numpy(), mask=masked)
            axis.imshow(cells_TT, cmap=ramp, norm=scale)
            key, _ = label(layer, head, measured)
            name = f"layer {layer}, head {head}" + (f": {NAMES[key][0]}" if key else "")
            axis.set_title(name, fontsize=8, fontweight="bold" if key else "normal")
            _name_tokens(axis, tokens)
    bar = figure.colorbar(cm.ScalarMappable(scale, ramp), ax=axes, shrink=0.6)
    bar.set_label("attention weight, on a scale of square roots")
    with warnings.catch_warnings(action="ignore"):  # a font may lack a token's letters
        figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _name_tokens(axis: object, tokens: list[str]) -> None:
    ticks = range(len(tokens) if len(tokens) <= MOST_NAMED else 0)
    names = [token.replace("$", r"\$") for token in tokens[: len(ticks)]]
    points = min(7, 0.8 * 72 * INCHES / len(tokens))
    axis.set_xticks(ticks, names, fontsize=points, rotation=90)  # type: ignore[attr-defined]
    axis.set_yticks(ticks, names, fontsize=points)  # type: ignore[attr-defined]
