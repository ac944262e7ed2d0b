"""Draw all heads of a model as one picture."""

import warnings
from pathlib import Path

import numpy as np
from torch import Tensor

import files
from viewer.labels import label
from viewer.probe import Measured
from viewer.scores import NAMES

MOST_NAMED = 40  # tokens; the names of more could not be read
INCHES = 2.2  # the side of one map


def draw(path: Path, weights_LHTT: Tensor, tokens: list[str], measured: Measured) -> None:
    """Write a PNG with a row of maps for each layer; a row of a map is a query.

    The colour is the square root of the weight, from 0 to 1 in every map; grey is masked.
    """
    import matplotlib  # slow to import, and needed for pictures only

    matplotlib.use("agg")
    from matplotlib import cm, colors, pyplot

    n_layer, n_head, T = weights_LHTT.shape[:3]
    size = (INCHES * n_head + 1.2, INCHES * n_layer + 0.8)
    figure, axes = pyplot.subplots(
        n_layer, n_head, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    ramp = pyplot.get_cmap("Blues").with_extremes(bad="#e6e6ec")
    scale = colors.PowerNorm(0.5, 0, 1)
    shown = tokens if T <= MOST_NAMED else []
    named = [token.replace("$", r"\$") for token in shown]  # or it would begin a formula
    points = min(7, 0.8 * 72 * INCHES / T)
    masked_TT = np.triu(np.ones((T, T), dtype=bool), 1)
    for (layer, head), axis in np.ndenumerate(axes):
        cells_TT = np.ma.array(weights_LHTT[layer, head].cpu().numpy(), mask=masked_TT)
        axis.imshow(cells_TT, cmap=ramp, norm=scale)
        key, _ = label(layer, head, measured)
        name = f"layer {layer}, head {head}" + (f": {NAMES[key][0]}" if key else "")
        axis.set_title(name, fontsize=8, fontweight="bold" if key else "normal")
        axis.set_xticks(range(len(named)), named, fontsize=points, rotation=90)
        axis.set_yticks(range(len(named)), named, fontsize=points)
    bar = figure.colorbar(cm.ScalarMappable(scale, ramp), ax=axes, shrink=0.6)
    bar.set_label("attention weight, on a scale of square roots")
    with warnings.catch_warnings(action="ignore"), files.whole(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")  # warns if its font lacks a letter
    pyplot.close(figure)
