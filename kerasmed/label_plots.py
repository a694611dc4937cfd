"""Figures of independent labels, of how they are answered, and of the patients; as those of `kerasmed.plots`."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kerasmed import metrics
from kerasmed.plots import COLOURS, panels

GREY = "#8a8a8a"  # of baselines, and of what is unknown
MARKERS = "osD^vP"
METRICS = {"auroc": "AUROC", "f1": "F1", "kappa": "Cohen's kappa"}  # as they are written, where not as they are spelt
DASHES = ((0, (4, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (8, 2)), (0, (2, 2)))  # of published values


def intervals(
    rows: Sequence[Mapping],
    *,
    metric: str,
    title: str,
    labels: Sequence[str],
    by: str = "label",
    names: Mapping[str, str] | None = None,
    published: Mapping[str, float] | None = None,
) -> Figure:
    """Draw a metric of each label, or of each split, value and 95 % interval: variants in colours, baselines in grey.

    Args:
        rows: of `kerasmed.multilabel.rows`, of one task and split, or with `by` "split" of one task and label; an
            undefined value leaves its place empty. Up to six variants can be told apart.
        metric: which one.
        title: of the figure.
        labels: the lines, from top to bottom: labels such as ("all", *class_names), or with `by` "split" splits such as
            ("test", "test, XR_ELBOW").
        by: the field of the rows that makes the lines, "label" or "split".
        names: label or split -> what its line is called, where not as it is spelt.
        published: name -> value as published, a dashed tick each over the first line, which is to be the whole; up to
            five can be told apart.

    Raises:
        ValueError: another `by`, no row has the metric and one of the labels, or a variant has a line twice.
    """
    if by not in ("label", "split"):
        raise ValueError(f"`by` is {by!r}; expected 'label' or 'split'.")
    chosen = [row for row in rows if row["metric"] == metric and row[by] in labels]
    found = {(row["variant"], row[by]): row for row in chosen}
    variants = list(dict.fromkeys(row["variant"] for row in chosen))
    if not found or len(found) < len(chosen):
        other = "split" if by == "label" else "label"
        others = sorted({row[other] for row in chosen})
        raise ValueError(
            f"{len(chosen)} rows of {metric} for {len(found)} places, {other}s {others}; expected at least one, and "
            f"one a {by} and variant: pass the rows of one task and {other}."
        )
    published, names = published or {}, names or {}
    height = len(labels) * (0.11 * len(variants) + 0.14) + 1.2
    figure, axes = panels(7.5, height + 0.18 * -(-len(published) // 3))  # room for its part of the legend
    axis = axes[0, 0]
    for place in range(0, len(labels), 2):
        axis.axhspan(place - 0.5, place + 0.5, color="#f1f1f1", linewidth=0, zorder=0)
    colours = itertools.cycle(COLOURS[:5])
    for number, variant in enumerate(variants):
        colour = GREY if variant in metrics.BASELINES else next(colours)
        shown = [(place, found[variant, label]) for place, label in enumerate(labels) if (variant, label) in found]
        shown = [(place, row) for place, row in shown if row["value"] is not None]
        heights = np.array([place for place, _ in shown]) + 0.76 * ((number + 0.5) / len(variants) - 0.5)
        values = [row["value"] for _, row in shown]
        ends = np.array([row["ci95"] or [row["value"]] * 2 for _, row in shown]).reshape(-1, 2)
        axis.hlines(heights, ends[:, 0], ends[:, 1], color=colour, linewidth=1.5)
        options = {"color": colour, "markersize": 4, "label": variant.replace("_", " ")}
        axis.plot(values, heights, MARKERS[number % len(MARKERS)], **options)
    if metric == "auroc":
        axis.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    for (name, value), dashes in zip(published.items(), itertools.cycle(DASHES)):
        axis.vlines(value, -0.5, 0.5, color="black", linewidth=1, linestyle=dashes, label=f"{name}: {value:.3f}")
    axis.set_yticks(range(len(labels)), [names.get(label, label.replace("_", " ")) for label in labels], fontsize=9)
    spelt = metric.removesuffix("_at_half")
    written = METRICS.get(spelt, spelt.replace("_", " ")) + (" at 0.5" if spelt != metric else "")
    axis.set(xlabel=f"{written}, 95 % interval over groups", ylim=(len(labels) - 0.5, -0.5))
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=11)
    return figure


def calibration(curves: Mapping[str, pd.DataFrame], *, title: str) -> Figure:
    """Draw the observed share over the predicted probability; below the diagonal the predictions are too high.

    Twice, as they are and on logarithmic axes, where rare labels can be read.

    Args:
        curves: name -> table of `kerasmed.calibration.reliability`; the area of a point grows with its n. A bin where
            nothing was observed is missing on logarithmic axes.
        title: of the figure.
    """
    figure, axes = panels(9, 5.2, 1, 2)
    points = pd.concat(curves.values())
    values = points[["mean_probability", "observed"]].to_numpy()
    smallest, largest = min(values[values > 0].min(initial=1), 0.1) / 1.4, min(1, 1.06 * values.max())
    for axis, scale, low in zip(axes[0], ("linear", "log"), (0, smallest)):
        axis.set(xscale=scale, yscale=scale, xlim=(low, largest), ylim=(low, largest), aspect="equal")
        axis.set(title=f"{scale} axes", xlabel="predicted probability", ylabel="observed share")
        axis.plot([low, largest], [low, largest], color=GREY, linestyle="--", linewidth=1, label="as observed")
        for colour, (name, table) in zip(itertools.cycle(COLOURS), curves.items()):
            count = " to ".join(dict.fromkeys(f"{n:,}" for n in (table["n"].min(), table["n"].max())))
            drawn = table[(table["observed"] > 0) & (table["mean_probability"] > 0)] if scale == "log" else table
            label = f"{name}: {len(table)} bins of {count}"
            axis.plot(drawn["mean_probability"], drawn["observed"], color=colour, linewidth=1.2, label=label)
            area = 36 * drawn["n"] / points["n"].max()
            axis.scatter(drawn["mean_probability"], drawn["observed"], s=area, color=colour)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=11)
    return figure


def cooccurrence(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw how often labels come together, in per cent; on the diagonal, in grey, each label's share of all images.

    Args:
        table: of `kerasmed.multilabel.cooccurrence`; NaN leaves a cell empty.
        title: of the figure.
    """
    shares, names = 100 * table.to_numpy(float), [name.replace("_", " ") for name in table.index]
    figure, axes = panels(0.46 * len(names) + 2.4, 0.4 * len(names) + 1.9)
    axis = axes[0, 0]
    itself = np.eye(len(names), dtype=bool)
    others = np.where(itself, np.nan, shares)
    most = np.nanmax(others, initial=1)
    mesh = axis.imshow(others, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    axis.imshow(np.where(itself, 0.2, np.nan), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            dark = row != column and share > 0.55 * most
            text = f"{share:.1f}" if share < 9.95 else f"{share:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
    axis.set_yticks(range(len(names)), names, fontsize=8.5)
    axis.set(xlabel="… that also have this label", ylabel="of the images with this label, % …")
    figure.colorbar(mesh, ax=axis, label="% of the row's images", shrink=0.7, pad=0.02)
    figure.suptitle(f"{title} (grey: % of all images)", fontsize=11)
    return figure


def patients(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw the images by age and sex and by view, and the images a patient has.

    Args:
        table: a row an image, with patient_id and, as far as known, age (years), sex and view. A panel whose column is
            absent, or missing in every row, says so.
        title: of the figure.
    """
    known = {name: table[name] if name in table else pd.Series(np.nan, table.index) for name in ("age", "sex", "view")}
    figure, axes = panels(13, 3.5, 1, 3)
    by_age, by_view, by_patient = axes[0]
    ages = pd.Series(known["age"].to_numpy(float, na_value=np.nan), table.index)
    sexes = _named(known["sex"], "sex")
    if ages.notna().any():
        steps = np.arange(0, ages.max() + 5, 5)
        for colour, (sex, values) in zip(_colours(sexes), ages.groupby(sexes)):
            label = f"{sex}: {values.notna().sum():,}"
            by_age.hist(values.dropna(), steps, histtype="stepfilled", color=colour, alpha=0.25)
            by_age.hist(values.dropna(), steps, histtype="step", color=colour, linewidth=1.4, label=label)
        by_age.margins(y=0.3)  # room for the legend
        by_age.legend(fontsize=8, loc="upper left")
    _describe(by_age, "age", ages, xlabel="age in years", ylabel="images in 5 years")
    views = _named(known["view"], "view")
    if known["view"].notna().any():
        counts = views.value_counts().sort_index()
        bars = by_view.bar(counts.index, counts, color=_colours(views), width=0.6)
        by_view.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8)
        by_view.margins(y=0.12)
    _describe(by_view, "view", known["view"], xlabel="view", ylabel="images")
    sizes = table["patient_id"].value_counts()
    _describe(by_patient, "patient", table["patient_id"], xlabel="images of a patient", ylabel="patients")
    if len(sizes):
        ends = 2 ** np.arange(np.ceil(np.log2(sizes.max())).astype(int) + 1)  # 1, 2, 4 ...: a few have very many
        firsts = [1, *(ends[:-1] + 1)]
        names = [str(last) if first == last else f"{first}–{last}" for first, last in zip(firsts, ends)]
        counts = np.bincount(np.searchsorted(ends, sizes), minlength=len(ends))
        bars = by_patient.bar(names, counts, color=COLOURS[0])
        by_patient.bar_label(bars, [f"{count:,}" for count in counts], fontsize=7)
        by_patient.tick_params(axis="x", labelsize=8, rotation=35 if len(names) > 5 else 0)
        by_patient.margins(y=0.12)
        more = (sizes > 1).mean()
        by_patient.set_title(f"{len(sizes):,} patients, {more:.0%} with several images", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def _named(values, what) -> pd.Series:
    return values.astype(object).where(values.notna(), f"{what} not known").astype(str)


def _colours(names) -> list[str]:
    """A colour for each distinct name in sorted order, grey for what is not known."""
    return [GREY if name.endswith("not known") else colour for name, colour in zip(sorted(set(names)), COLOURS)]


def _describe(axis, what, values, **labels) -> None:
    """Label a panel; where no value is known, let it say so instead."""
    missing = int(values.isna().sum())
    if missing == len(values):
        axis.text(0.5, 0.5, f"{what} not known", ha="center", va="center", transform=axis.transAxes)
        axis.set(xticks=[], yticks=[])
    title = f"{len(values):,} images" + (f", {missing:,} without {what}" if missing else "")
    axis.set_title(title, fontsize=10)
    axis.set(**labels)
