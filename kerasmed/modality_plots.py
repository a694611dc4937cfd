"""Figures of models that read several modalities, some of them missing; as `kerasmed.plots`."""

import itertools
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from kerasmed.grade_plots import BLANK, written
from kerasmed.metrics import LOWER_IS_BETTER
from kerasmed.plots import COLOURS, panels

CELL = ["value", "low", "high", "difference", "difference_low", "difference_high"]
_WIDEST = 11  # inches of panels beside one another
_NARROWEST = 5  # inches, that a title has room
_LEAST = 8  # percent of a bar in which a number has room
_SLACK = 1e-3  # that weights, rounded in a table, may be away from a sum of 1


def report_card(card: pd.DataFrame, *, metric: str, title: str, reference: str = "") -> Figure:
    """Draw how each model does on each subset of the modalities: a line a subset, a column a model, a cell a value.

    A cell holds the value, below it its interval, and below that the paired difference to the reference, in bold where
    its interval excludes 0. Colour is the value, on one scale over all panels; darker is better, of the metrics
    `LOWER_IS_BETTER` too. All panels have all lines and columns; a cell without a row, or of an undefined value, is
    grey and stays empty.

    Args:
        card: a row a subset and model: modalities and column (their texts, in order of first appearance), value, low
            and high (95 % interval; NaN: none), difference, difference_low and difference_high (to the reference,
            whose own are NaN), and, where there are several panels, panel (text).
        metric: what the values are of.
        title: of the figure.
        reference: what differences are to; empty: the column that has none itself, if that is one.

    Raises:
        ValueError: the card is empty, lacks a column, has a cell twice, or holds no value.
    """
    keys = [*(["panel"] if "panel" in card else []), "modalities", "column"]
    _check("card", card, keys, CELL)
    finite = card.loc[np.isfinite(card["value"]), "value"]
    if finite.empty:
        raise ValueError(f"`card` holds no finite value in {len(card)} rows; expected some {written(metric)}.")
    card = card if "panel" in card else card.assign(panel="")
    subsets, names, groups = (pd.unique(card[name]) for name in ("modalities", "column", "panel"))
    lower = metric in LOWER_IS_BETTER
    shade = {"cmap": "Blues_r" if lower else "Blues", "vmin": finite.min(), "vmax": finite.max()}
    lines = 1 + card["low"].notna().any() + card["difference"].notna().any()
    headings = [_broken(name) for name in names]
    longest = max(len(line) for heading in headings for line in heading.split("\n"))
    width = len(names) * max(0.72, 0.06 * longest + 0.1)
    rows, columns = _arranged(len(groups), width)
    height = (0.03 + 0.15 * lines) * len(subsets) + 0.13 * max(each.count("\n") for each in headings) + 0.55
    size = (columns * (width + 0.15) + 0.07 * max(map(len, subsets)) + 1, rows * height + 0.6)
    figure, axes = panels(max(size[0], _NARROWEST), size[1], rows, columns, sharex=True, sharey=True)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, group in zip(axes.flat, groups):
        chosen = card[card["panel"] == group].set_index(["modalities", "column"])
        values = chosen["value"].unstack().reindex(index=subsets, columns=names).to_numpy(float)
        mesh = axis.imshow(np.ma.masked_invalid(values), aspect="auto", **shade)
        axis.set_facecolor(BLANK)
        for line, column in np.argwhere(np.isfinite(values)):
            colour = _ink(mesh.cmap(mesh.norm(values[line, column])))
            _fill(axis, line, column, chosen.loc[(subsets[line], names[column])], lines, colour)
        axis.set_xticks(range(len(names)), headings, fontsize=7.5)
        axis.set_yticks(range(len(subsets)), subsets, fontsize=8)
        axis.set_xticks(np.arange(0.5, len(names) - 1), minor=True)
        axis.set_yticks(np.arange(0.5, len(subsets) - 1), minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="both", length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
        axis.spines[:].set_visible(False)
        axis.set_title(group.replace("_", " "), fontsize=9.5)
    label = written(metric) + (", lower is better" if lower else "")
    shown = axes.ravel()[: len(groups)].tolist()
    inch = 1 / max(size[0], _NARROWEST)  # as a share of the width: by default a bar takes 15 % of it from the cells
    options = {"shrink": 0.8 / rows**0.5, "aspect": 25, "fraction": 0.25 * inch, "pad": 0.15 * inch}
    bar = figure.colorbar(mesh, ax=shown, label=label, **options)
    bar.ax.tick_params(labelsize=8)
    figure.supxlabel(_legend(card, reference), fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _broken(name) -> str:
    """A text in several lines, broken at its commas, and where it is still long."""
    return "\n".join(textwrap.fill(part, 16, break_long_words=False) for part in name.replace(", ", ",\n").split("\n"))


def _fill(axis, line, column, cell, lines, colour) -> None:
    """Write a cell's value, interval and difference, so many lines; where there is none, its line stays empty."""
    texts = [(f"{cell['value']:.3f}", 8.5, "normal")]
    if np.isfinite([cell["low"], cell["high"]]).all():
        texts.append((f"[{cell['low']:.3f}, {cell['high']:.3f}]", 6, "normal"))
    elif lines == 3:
        texts.append(("", 6, "normal"))  # the difference stays in line with those beside it
    if np.isfinite(cell["difference"]):
        is_clear = cell["difference_low"] > 0 or cell["difference_high"] < 0
        texts.append((f"{cell['difference']:+z.3f}", 7, "bold" if is_clear else "normal"))
    for place, (text, size, weight) in enumerate(texts):
        options = {"ha": "center", "va": "center", "fontsize": size, "fontweight": weight, "color": colour}
        if text:
            axis.text(column, line + 0.29 * (place - (lines - 1) / 2), text, **options)


def _legend(card, reference) -> str:
    """What stands in a cell, from the first line to the last."""
    said = ["value"]
    if card["low"].notna().any():
        said.append("95 % interval")
    has = card["difference"].notna().groupby(card["column"], sort=False).any()
    if has.any():
        references = has.index[~has]
        whose = reference or (references[0] if len(references) == 1 else "the reference")
        said.append(f"paired difference to {whose} (bold: its 95 % interval excludes 0)")
    return "a cell: " + "; ".join(said)


def modality_weights(weights: pd.DataFrame, *, title: str) -> Figure:
    """Draw what share each modality has in a model's answer, a panel a group and a bar a subset of the modalities.

    Args:
        weights: a row a group, subset and modality: group (such as a condition), modalities (the text of which were
            there; bars are in order of first appearance), modality, weight (mean, in [0, 1]; those of a bar have a
            sum of 1; a modality without a row weighs 0).
        title: of the figure.

    Raises:
        ValueError: there is no row, a column is absent, a row is there twice, a weight is NaN or outside [0, 1], or
            the weights of a bar have another sum than 1, by more than 0.001.
    """
    _check("weights", weights, ["group", "modalities", "modality"], ["weight"])
    wrong = weights[~weights["weight"].between(0, 1)]
    if len(wrong):
        raise ValueError(
            f"`weights` has {len(wrong)} of {len(weights)} weights that are NaN or outside [0, 1]; expected shares, "
            f"and no row where a modality has none. First: {wrong.head(3).to_dict('records')}."
        )
    sums = weights.groupby(["group", "modalities"], sort=False)["weight"].sum()
    wrong = sums[(sums - 1).abs() > _SLACK]
    if len(wrong):
        raise ValueError(
            f"`weights` of {len(wrong)} of {len(sums)} bars do not have a sum of 1 within {_SLACK}; pass every "
            f"modality of a subset. First sums by (group, modalities): {wrong.head(3).round(4).to_dict()}."
        )
    groups, subsets, names = (pd.unique(weights[name]) for name in ("group", "modalities", "modality"))
    rows, columns = _arranged(len(groups), 3.4)
    labels = 0.07 * max(map(len, subsets))
    size = (3.4 * columns + labels + 0.3, rows * (0.3 * len(subsets) + 0.8) + 0.7)
    figure, axes = panels(*size, rows, columns, sharey=True)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, group in zip(axes.flat, groups):
        chosen = weights[weights["group"] == group].pivot(index="modalities", columns="modality", values="weight")
        shares = 100 * chosen.reindex(index=subsets, columns=names).fillna(0).to_numpy(float)
        left = np.zeros(len(subsets))
        for name, colour, widths in zip(names, itertools.cycle(COLOURS), shares.T):
            axis.barh(range(len(subsets)), widths, left=left, height=0.74, color=colour, label=name)
            for place in np.flatnonzero(widths >= _LEAST):
                options = {"ha": "center", "va": "center", "fontsize": 8, "color": _ink(to_rgb(colour))}
                axis.text(left[place] + widths[place] / 2, place, f"{widths[place]:.0f}", **options)
            left += widths
        axis.set_yticks(range(len(subsets)), subsets, fontsize=8)
        axis.set_title(group.replace("_", " "), fontsize=10)
        axis.set(xlabel="mean weight, %", xlim=(0, 100), ylim=(len(subsets) - 0.5, -0.5))
        axis.xaxis.set_major_locator(MultipleLocator(25))
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=min(len(names), 4))
    figure.suptitle(title, fontsize=11)
    return figure


def _check(what: str, table: pd.DataFrame, keys: Sequence[str], values: Sequence[str]) -> None:
    """Refuse a table that is empty, lacks a column, or has a combination of the keys twice or without a name."""
    if table.empty:
        raise ValueError(f"`{what}` is empty; expected a row for each {', '.join(keys)}.")
    absent = [name for name in (*keys, *values) if name not in table]
    if absent:
        raise ValueError(f"`{what}` lacks the columns {absent}; expected {[*keys, *values]}.")
    nameless = table[list(keys)].isna().any(axis=1)
    if nameless.any():
        raise ValueError(
            f"`{what}` has {nameless.sum()} of {len(table)} rows that lack a text in {', '.join(keys)}; name or drop "
            f"them. First: {table.loc[nameless, list(keys)].head(3).to_dict('records')}."
        )
    twice = table.duplicated(list(keys))
    if twice.any():
        first = list(table.loc[twice, list(keys)].head(3).itertuples(index=False, name=None))
        raise ValueError(
            f"`{what}` has {twice.sum()} of {len(table)} rows whose ({', '.join(keys)}) is there before; expected one "
            f"row each: pass one metric and split. First: {first}."
        )


def _arranged(count: int, width: float) -> tuple[int, int]:
    """Rows and columns of so many panels, each so wide in inches: as few rows as fit, evenly filled."""
    rows = -(-count // max(1, int(_WIDEST // width)))
    return rows, -(-count // rows)


def _ink(colour) -> str:
    """White on a dark colour, black on a light one."""
    red, green, blue = colour[:3]
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
