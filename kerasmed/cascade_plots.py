"""Figures of a cascade: the threshold of its first stage, and where it loses the right answer."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kerasmed.plots import COLOURS, panels


def threshold(
    positive: Sequence[np.ndarray], scores: Sequence[np.ndarray], chosen: Sequence[float], *, title: str
) -> Figure:
    """Draw sensitivity and specificity of a yes-or-no stage over its threshold, a panel a fold; dashed: the chosen one.

    Args:
        positive: of each fold, bool (num_images,).
        scores: of each fold, probabilities beside it.
        chosen: the threshold of each fold.
        title: of the figure.
    """
    figure, axes = panels(4.6 * len(chosen), 3.2, 1, len(chosen))
    at = np.linspace(0, 1, 201)
    for number, (axis, truth, told, mark) in enumerate(zip(axes[0], positive, scores, chosen), start=1):
        truth = np.asarray(truth, bool)
        for name, values, colour, found in (
            ("sensitivity", told[truth], COLOURS[0], lambda values, t: values >= t),
            ("specificity", told[~truth], COLOURS[1], lambda values, t: values < t),
        ):
            shares = [found(values, t).mean() if len(values) else np.nan for t in at]
            there = found(values, mark).mean() if len(values) else np.nan
            axis.plot(at, shares, color=colour, label=f"{name} ({there:.2f} there)")
        axis.axvline(mark, color=COLOURS[3], linestyle="--", linewidth=1, label=f"threshold {mark:.2f}")
        axis.set(xlabel="threshold of the probability of disease", ylabel="share", ylim=(-0.02, 1.02), xlim=(0, 1))
        axis.set_title(f"fold {number}" if len(chosen) > 1 else "", fontsize=9)
        axis.legend(fontsize=8, loc="lower center")
    figure.suptitle(title, fontsize=11)
    return figure


def losses(shares: pd.DataFrame, *, title: str) -> Figure:
    """Draw for each true class how many images are answered right, and at which stage the others went astray.

    Args:
        shares: a row a true class, a column "right" and one a stage; rows sum to 1. Its column "images" is the count.
        title: of the figure.

    Raises:
        ValueError: no row.
    """
    if shares.empty:
        raise ValueError("`shares` has no class to draw; expected a row a true class.")
    figure, axes = panels(7.5, 0.36 * len(shares) + 1.4)
    axis = axes[0, 0]
    columns = [name for name in shares if name != "images"]
    colours = dict(zip(columns, (COLOURS[place] for place in (2, 3, 1, 4, 0))))
    left = np.zeros(len(shares))
    for name in columns:
        values = shares[name].to_numpy()
        label = "right" if name == "right" else f"lost at {name}"
        axis.barh(range(len(shares)), values, left=left, color=colours[name], label=label)
        for position, (start, value) in enumerate(zip(left, values)):
            if value >= 0.06:
                axis.text(start + value / 2, position, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w")
        left += values
    labels = [f"{name} ({count})" for name, count in shares["images"].items()]
    axis.set_yticks(range(len(shares)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="share of the images", xlim=(0, 1))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(columns), fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure
