"""Figures of graded findings, of studies with modalities missing, of embeddings, and of grids; as `kerasmed.plots`."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from kerasmed.label_plots import GREY, METRICS
from kerasmed.metrics import LOWER_IS_BETTER
from kerasmed.plots import COLOURS, panels

GRADE_COLOURS = ("#a9c6e3", "#d98c3f", "#b5524d")  # from the mildest to the most severe
BLANK = "#e3e3e3"
CHANCE = {"macro_auroc": 0.5}  # what the colours of a heat map are centred on
_MOST = 4  # series of a modality in a study, from which on they share a bar


def shares(rows: pd.DataFrame, class_names: Sequence[str], *, title: str) -> Figure:
    """Draw the share of each grade, and of blanks, a panel a condition and a bar a level, and side where it has sides.

    Args:
        rows: a row a study and target: condition, side ("" where there are none), level, grade (NaN is blank).
        class_names: of the grades 0, 1, 2.
        title: of the figure.

    Raises:
        ValueError: there is no row.
    """
    if rows.empty:
        raise ValueError("`rows` is empty; expected a row a study and target.")
    rows = rows.reset_index(drop=True)
    sides = rows["side"].astype(object).where(rows["side"].notna(), "")
    bar_of = rows["level"].str.replace("_", "–").str.upper() + sides.map(lambda side: f" {side}" if side else "")
    conditions = pd.unique(rows["condition"])
    most = bar_of.groupby(rows["condition"]).nunique().max()
    figure, axes = panels(4.6 * len(conditions) + 0.4, 0.3 * most + 1.9, 1, len(conditions))
    for axis, condition in zip(axes[0], conditions):
        chosen = rows[rows["condition"] == condition]
        bars, bar = np.unique(bar_of[chosen.index].to_numpy(str), return_inverse=True)
        grade = chosen["grade"].fillna(len(class_names)).to_numpy(int)  # blank comes last
        counts = np.zeros((len(bars), len(class_names) + 1))
        np.add.at(counts, (bar, grade), 1)
        left = np.zeros(len(bars))
        for name, colour, found in zip([*class_names, "blank"], [*GRADE_COLOURS, BLANK], counts.T):
            widths = 100 * found / counts.sum(axis=1)
            axis.barh(range(len(bars)), widths, left=left, height=0.78, color=colour, label=name)
            for place, (start, width) in enumerate(zip(left, widths)):
                if width >= 7:  # percent that a figure has room in
                    options = {"ha": "center", "va": "center", "fontsize": 7.5}
                    axis.text(start + width / 2, place, f"{width:.0f}", **options)
            left += widths
        axis.set_yticks(range(len(bars)), bars, fontsize=8)
        count = f"{chosen['grade'].notna().sum():,} grades, {chosen['grade'].isna().sum():,} blank"
        axis.set_title(f"{condition.replace('_', ' ')}\n{count}", fontsize=10)
        axis.set(xlabel="% of the studies", xlim=(0, 100), ylim=(len(bars) - 0.5, -0.5))
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=11)
    return figure


def modalities(studies: pd.DataFrame, names: Sequence[str], *, title: str) -> Figure:
    """Draw how many series of each modality the studies have, and how many studies have which of the modalities.

    Args:
        studies: a row a study, with a column a modality: how many series of it there are.
        names: the modalities, columns of the table.
        title: of the figure.

    Raises:
        ValueError: a modality is no column.
    """
    absent = [name for name in names if name not in studies]
    if absent:
        raise ValueError(f"`names` {absent} are no columns of the studies; expected some of {list(studies.columns)}.")
    numbers = studies[list(names)].fillna(0).to_numpy(int)
    present = pd.Series([tuple(row) for row in numbers > 0]).value_counts().sort_values(kind="stable", ascending=False)
    figure, axes = panels(12, max(2.6, 0.36 * max(len(names), len(present)) + 1.7), 1, 2, width_ratios=(1.1, 1))
    by_count, by_set = axes[0]
    left = np.zeros(len(names))
    colours = (COLOURS[3], COLOURS[0], COLOURS[2], COLOURS[1], COLOURS[4])
    largest = min(numbers.max(initial=1), _MOST)
    for number in range(largest + 1):
        is_last = number == _MOST
        found = ((numbers >= number) if is_last else (numbers == number)).sum(axis=0)
        label = f"{number or 'no'}{' or more' if is_last else ''} series"
        by_count.barh(names, found, left=left, height=0.62, color=colours[number], label=label)
        for place, (start, count) in enumerate(zip(left, found)):
            if count >= 0.06 * len(numbers):  # room for the figure
                options = {"ha": "center", "va": "center", "fontsize": 8, "color": "white"}
                by_count.text(start + count / 2, place, f"{count:,}", **options)
        left += found
    labels = [f"{name}\n{count:,} without" for name, count in zip(names, (numbers == 0).sum(axis=0))]
    by_count.set_yticks(range(len(names)), labels, fontsize=8)
    by_count.set_title("Series of a study", fontsize=9.5)
    by_count.set(xlabel="studies", xlim=(0, max(len(numbers), 1)), ylim=(len(names) - 0.5, -0.5))
    handles, labels = by_count.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower left", ncols=largest + 1)
    sets = [" + ".join(itertools.compress(names, flags)) or "none of them" for flags in present.index]
    bars = by_set.barh(range(len(sets)), present.to_numpy(), height=0.62, color=COLOURS[5])
    texts = [f"{count:,} ({count / len(numbers):.1%})" for count in present]
    by_set.bar_label(bars, texts, padding=2, fontsize=8)
    by_set.set_yticks(range(len(sets)), sets, fontsize=8)
    by_set.set_title(f"Modalities of the {len(numbers):,} studies", fontsize=9.5)
    by_set.set(xlabel="studies", ylim=(len(sets) - 0.5, -0.5))
    by_set.margins(x=0.22)
    for axis in axes.flat:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def depths(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw how many slices the series of each modality have, a panel a modality on one scale.

    Args:
        table: a row a series: modality, slices.
        title: of the figure.
    """
    groups = dict(iter(table.groupby("modality", sort=False)["slices"]))
    top = int(table["slices"].max())
    step = max(1, -(-top // 40))  # at most forty bars
    edges = np.arange(0.5, top + step + 0.5, step)
    figure, axes = panels(8, 1.35 * len(groups) + 0.9, len(groups), 1, sharex=True)
    for axis, colour, (modality, slices) in zip(axes[:, 0], itertools.cycle(COLOURS), groups.items()):
        axis.hist(slices, edges, color=colour)
        axis.axvline(slices.median(), color="black", linewidth=1, linestyle="--")
        spread = f"median {slices.median():g}, {slices.min():g} to {slices.max():g} slices"
        axis.set_title(f"{modality}: {len(slices):,} series, {spread}", fontsize=9)
        axis.set_ylabel("series", fontsize=8)
        axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("slices of a series" + (f", {step} a bar" if step > 1 else "") + "; dashed: median")
    figure.suptitle(title, fontsize=11)
    return figure


def montage(volumes: Mapping[str, np.ndarray], *, title: str, count: int = 5) -> Figure:
    """Show slices of a study's series, a row a modality, evenly spread from the first slice to the last.

    Args:
        volumes: modality -> uint8, shape (slices, height, width); black at 0, white at 255.
        title: of the figure.
        count: slices of each; where there are fewer, places stay empty.
    """
    figure, axes = panels(1.75 * count + 0.5, 1.95 * len(volumes) + 0.4, len(volumes), count)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (modality, volume) in zip(axes, volumes.items()):
        chosen = np.unique(np.linspace(0, len(volume) - 1, min(count, len(volume))).round().astype(int))
        for axis, number in zip(row, chosen):
            axis.imshow(volume[number], cmap="gray", vmin=0, vmax=255)
            axis.set_title(f"slice {number + 1} of {len(volume)}", fontsize=7)
        options = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8, "transform": row[0].transAxes}
        row[0].text(-0.06, 0.5, modality, **options)
    figure.suptitle(title, fontsize=11)
    return figure


def before_after(images: Mapping[str, Sequence[np.ndarray]], row_labels: Sequence[str], *, title: str) -> Figure:
    """Show images as each normalisation leaves them, each above the histogram of its grey levels.

    Args:
        images: what was done, such as "raw" -> uint8 images, one a row label, in the same order.
        row_labels: of the images.
        title: of the figure.

    Raises:
        ValueError: as many images as labels are not there.
    """
    wrong = {name: len(each) for name, each in images.items() if len(each) != len(row_labels)}
    if wrong:
        raise ValueError(f"there are {wrong} images beside {len(row_labels)} `row_labels`; expected one a label.")
    heights = (2.1, 0.7) * len(row_labels)
    figure, axes = panels(2.5 * len(images) + 0.8, sum(heights) + 0.6, len(heights), len(images), height_ratios=heights)
    for column, (name, each) in zip(axes.T, images.items()):
        for picture, below, image in zip(column[::2], column[1::2], each):
            picture.imshow(image, cmap="gray", vmin=0, vmax=255)
            picture.set(xticks=[], yticks=[])
            share = 100 * np.bincount(image.ravel() // 4, minlength=64) / image.size
            below.bar(4 * np.arange(64) + 2, share, width=4, color=COLOURS[0])
            # A background of one level would flatten all else.
            below.set(xlim=(0, 256), ylim=(0, max(1.15 * np.sort(share)[-2], 1)), yticks=[])
            below.set_xticks([0, 128, 255])
            below.tick_params(labelsize=7)
            if share.max() > below.get_ylim()[1]:
                level = 4 * int(share.argmax())
                below.set_title(f"{share.max():.0f}% at {level}–{level + 3}", fontsize=6.5, pad=2)
            below.spines[["top", "right", "left"]].set_visible(False)
        column[0].set_title(name, fontsize=10)
        column[-1].set_xlabel("grey level", fontsize=8)
    for axis, label in zip(axes[::2, 0], row_labels):
        axis.set_ylabel(label, fontsize=9)
    for axis in axes[1::2, 0]:
        axis.set_ylabel("% of pixels", fontsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def slice_weights(
    weights: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    title: str,
    signal: Sequence[np.ndarray] | None = None,
    images: Sequence[np.ndarray] | None = None,
    columns: int = 3,
) -> Figure:
    """Draw the weight that attention gives each slice of a series, beside the slice that weighs most.

    The dashed line is the weight of a plain mean. Where it is known, the slices that carry the finding are coloured.

    Args:
        weights: a float array (slices,) a series, each with a sum of 1.
        captions: of the series.
        title: of the figure.
        signal: a bool array (slices,) a series: slices that carry the finding.
        images: a uint8 array (height, width) a series: its slice of the largest weight.
        columns: series a row.

    Raises:
        ValueError: another number of captions, signals or images than of series, or a signal of another length.
    """
    for name, each in (("captions", captions), ("signal", signal), ("images", images)):
        if each is not None and len(each) != len(weights):
            raise ValueError(f"`{name}` has {len(each)} entries beside {len(weights)} series; expected one each.")
    columns = min(columns, len(weights))
    rows, parts = -(-len(weights) // columns), 1 if images is None else 2
    ratios = [2.6, 1.3][:parts] * columns
    figure, axes = panels(sum(ratios) + 0.4, 1.6 * rows + 0.9, rows, parts * columns, width_ratios=ratios)
    for axis in axes.flat:
        axis.set_axis_off()
    spots = axes.reshape(rows * columns, parts)
    for place, (each, caption) in enumerate(zip(weights, captions)):
        axis, numbers = spots[place, 0], np.arange(1, len(each) + 1)
        axis.set_axis_on()
        marked = np.zeros(len(each), bool) if signal is None else np.asarray(signal[place], bool)
        if marked.shape != np.shape(each):
            raise ValueError(f"the signal of {caption!r} has shape {marked.shape}; expected {np.shape(each)}.")
        axis.bar(numbers, each, width=0.8, color=np.where(marked, COLOURS[1], COLOURS[0]))
        axis.axhline(1 / len(each), color="black", linewidth=0.8, linestyle="--")
        axis.set_title(caption, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("slice", fontsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.set(xlim=(0.4, len(each) + 0.6), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        if images is not None:
            spots[place, 1].imshow(images[place], cmap="gray", vmin=0, vmax=255)
            top = int(np.argmax(each))
            found = "" if signal is None else ", with it" if marked[top] else ", without it"
            spots[place, 1].set_title(f"slice {top + 1}{found}", fontsize=7.5)
    for axis in spots.reshape(rows, columns, parts)[:, 0, 0]:
        axis.set_ylabel("weight", fontsize=7)
    handles = [Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="weight in a plain mean")]
    if signal is not None:
        handles += [Patch(color=COLOURS[1], label="carries the finding"), Patch(color=COLOURS[0], label="does not")]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=11)
    return figure


def grid_heat_map(
    table: pd.DataFrame, *, metric: str, title: str, rows: Sequence[str], columns: str = "classifier"
) -> Figure:
    """Draw a metric over a grid of models, a panel a condition, its values in the cells; the best one is framed.

    Colours are centred on chance for AUROC; darker blue is better. The baselines' values stand below a panel's title.

    Args:
        table: of `kerasmed.grades.table`, of one split, with a column condition; a missing cell stays empty.
        metric: a column of it.
        title: of the figure.
        rows: factors whose values together make the lines.
        columns: the factor that makes the columns.

    Raises:
        ValueError: a column is absent, or a cell has several values.
    """
    needed = ["condition", "variant", *rows, columns, metric]
    absent = [name for name in needed if name not in table]
    if absent:
        raise ValueError(f"the table lacks the columns {absent}; expected {needed}.")
    is_model = (table[[*rows, columns]] != "").all(axis=1)
    models = table[is_model].assign(line=table.loc[is_model, list(rows)].astype(str).agg(" · ".join, axis=1))
    twice = models.duplicated(["condition", "line", columns])
    if twice.any():
        raise ValueError(
            f"{twice.sum()} of {len(models)} rows share a cell of condition, {', '.join(rows)} and {columns}; pass one "
            f"split, and name every factor. First: {models.loc[twice, 'variant'].head(3).tolist()}."
        )
    conditions, lines, names = (pd.unique(models[name]) for name in ("condition", "line", columns))
    lower = metric in LOWER_IS_BETTER
    low, high = models[metric].min(), models[metric].max()
    if metric in CHANCE:
        reach = max(abs(low - CHANCE[metric]), abs(high - CHANCE[metric]), 0.01)
        low, high = CHANCE[metric] - reach, CHANCE[metric] + reach
    shade = "RdBu" if metric in CHANCE else "Blues_r" if lower else "Blues"
    width = max(map(len, lines)) * 0.065 + len(conditions) * (0.62 * len(names) + 0.3) + 1
    figure, axes = panels(width, 0.235 * len(lines) + 2.2, 1, len(conditions), sharey=True)
    for axis, condition in zip(axes[0], conditions):
        cells = models[models["condition"] == condition].pivot(index="line", columns=columns, values=metric)
        cells = cells.reindex(index=lines, columns=names).to_numpy(float)
        mesh = axis.imshow(cells, cmap=shade, vmin=low, vmax=high, aspect="auto")
        for (line, column), value in np.ndenumerate(cells):
            if np.isfinite(value):
                red, green, blue, _ = mesh.cmap(mesh.norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                colour = "white" if dark else "black"
                axis.text(column, line, f"{value:.3f}", ha="center", va="center", fontsize=7, color=colour)
        if np.isfinite(cells).any():
            best = np.nanargmin(cells) if lower else np.nanargmax(cells)
            line, column = np.unravel_index(best, cells.shape)
            corner = (column - 0.5, line - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.8, clip_on=False))
        others = table[~is_model & (table["condition"] == condition)]
        said = [f"\n{name.replace('_', ' ')} {value:.3f}" for name, value in zip(others["variant"], others[metric])]
        axis.set_title(condition.replace("_", " ") + "".join(said), fontsize=8)
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(len(lines)), lines, fontsize=7.5)
        axis.tick_params(length=0)
    label = written(metric) + (", lower is better" if lower else "")
    figure.colorbar(mesh, ax=axes[0].tolist(), label=label, shrink=0.8, pad=0.015)
    figure.suptitle(title, fontsize=11)
    return figure


def contrasts(found: Sequence[Mapping], *, title: str, metric: str = "macro_auroc") -> Figure:
    """Draw differences between choices with their intervals, beside a line at no difference.

    Small grey dots are the pairs that a difference is the mean of.

    Args:
        found: of `kerasmed.grades.contrast`, with a key "condition" where there are several; one without a pair says
            so. From top to bottom, a line a contrast, a colour a condition.
        title: of the figure.
        metric: what the differences are of.

    Raises:
        ValueError: there is no contrast.
    """
    if not found:
        raise ValueError("`found` is empty; expected contrasts of `kerasmed.grades.contrast`.")
    names = [f"{_joined(each['plus'])} − {_joined(each['minus'])}" for each in found]
    conditions = list(dict.fromkeys(each.get("condition", "") for each in found))
    lines = list(dict.fromkeys(names))
    colours = dict(zip(conditions, itertools.cycle(COLOURS)))
    figure, axes = panels(8, len(lines) * (0.3 * len(conditions) + 0.2) + 1.4)
    axis = axes[0, 0]
    for line in range(0, len(lines), 2):
        axis.axhspan(line - 0.5, line + 0.5, color="#f1f1f1", linewidth=0, zorder=0)
    drawn = set()
    for name, each in zip(names, found):
        condition = each.get("condition", "")
        height = lines.index(name) + 0.8 * ((conditions.index(condition) + 0.5) / len(conditions) - 0.5)
        if each["value"] is None:
            axis.text(0, height, " no pair", ha="left", va="center", fontsize=7.5, color=colours[condition])
            continue
        singles = [pair["value"] for pair in each["each"]]
        axis.plot(singles, [height] * len(singles), "o", color=GREY, markersize=2.5, alpha=0.6)
        ends = each["ci95"] or [each["value"]] * 2
        axis.plot(ends, [height] * 2, color=colours[condition], linewidth=2)
        label = "_" if condition in drawn or not condition else condition.replace("_", " ")
        axis.plot(each["value"], height, "o", color=colours[condition], markersize=5, label=label)
        drawn.add(condition)
        text = f"{each['value']:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}], {each['pairs']} pair{'s'[: each['pairs'] > 1]}"
        options = {"va": "center", "fontsize": 7.5, "transform": axis.get_yaxis_transform()}
        axis.text(1.01, height, text, **options)
    axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(lines)), lines, fontsize=9)
    better = "left" if metric in LOWER_IS_BETTER else "right"
    axis.set_xlabel(f"difference in {written(metric)}, 95 % interval over studies; better to the {better}", fontsize=9)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.margins(x=0.08)
    if drawn - {""}:
        figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=11)
    return figure


def written(metric: str) -> str:
    """A metric as it is written: macro_auroc is macro AUROC."""
    stem = metric.removeprefix("macro_")
    return "macro " * (stem != metric) + METRICS.get(stem, stem.replace("_", " "))


def _joined(values) -> str:
    return "/".join(str(value).replace("_", " ") for value in values)


def retrieval(
    queries: Sequence[tuple[np.ndarray, str]],
    neighbours: Sequence[Sequence[tuple[np.ndarray, str]]],
    *,
    title: str,
) -> Figure:
    """Show queries, framed on the left, and beside each its nearest neighbours, the nearest first.

    Args:
        queries: (uint8 image, caption) each.
        neighbours: of each query, (uint8 image, caption) each; images may differ in size.
        title: of the figure.

    Raises:
        ValueError: there is no query, or another number of lists of neighbours than of queries.
    """
    if not queries or len(queries) != len(neighbours):
        raise ValueError(
            f"there are {len(queries)} queries and {len(neighbours)} lists of neighbours; expected one each."
        )
    count = 1 + max(map(len, neighbours))
    figure, axes = panels(1.8 * count + 0.2, 2.35 * len(queries) + 0.4, len(queries), count)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, query, found in zip(axes, queries, neighbours):
        for axis, (image, caption) in zip(row, [query, *found]):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set_title(caption, fontsize=7)
        row[0].set_axis_on()
        row[0].set(xticks=[], yticks=[])
        row[0].spines[:].set(color=COLOURS[1], linewidth=2.5)
    figure.suptitle(title, fontsize=11)
    return figure
