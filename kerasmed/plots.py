"""Figures: each function returns a matplotlib figure with a title, units and a legend where there is one to need.

`kerasmed.runs.save_figure` writes them, and marks those made from synthetic data.
"""

import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator

COLOURS = ("#3b6ea5", "#d98c3f", "#5b9a68", "#b5524d", "#7d6aa8", "#6f6f6f")
BOX = "#53d8fb"  # of outlines, on grey and on a heat map


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, np.ndarray]:
    """Make a figure of so many inches and its axes, shape (rows, columns); options of `Figure.subplots`."""
    # No pyplot: a notebook displays what a cell returns, and nothing is kept open.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def image_grid(
    images: np.ndarray,
    captions: Sequence[str],
    *,
    title: str,
    columns: int = 8,
    row_labels: Sequence[str] = (),
    boxes: Sequence[tuple[int, float, float, float, float, str]] = (),
) -> Figure:
    """Show uint8 images (num_images, height, width) in a grid, each under its caption, black at 0 and white at 255.

    `boxes` are outlined: (position of the image, x, y, width, height in its pixels, label), any number an image. A
    position that is none of an image's raises ValueError.
    """
    astray = [box for box in boxes if not 0 <= box[0] < len(images)]
    if astray:
        raise ValueError(f"{len(astray)} `boxes` lie in none of the {len(images)} images. First: {astray[:3]}.")
    rows = -(-len(images) // columns)
    figure, axes = panels(1.5 * columns, 1.65 * rows + 0.4, rows, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_title(caption, fontsize=7 if max(map(len, caption.split("\n"))) < 20 else 5.5)
    for position, *box, label in boxes:
        x0, y0, x1, _ = _outline(axes.flat[position], box).get_bbox().extents
        height, width = images.shape[1:3]
        # The label stays in the picture: it grows to the left in the right half, and moves into a box at the top.
        at_right, at_top = x0 + x1 > width, y0 < 0.1 * height
        options = {"ha": "right" if at_right else "left", "va": "top" if at_top else "bottom", "fontsize": 5.5}
        options["bbox"] = {"facecolor": BOX, "edgecolor": "none", "pad": 0.5}
        axes.flat[position].text(x1 if at_right else x0, y0, label, **options)
    for axis, label in zip(axes[:, 0], row_labels):
        axis.text(-0.08, 0.5, label, transform=axis.transAxes, rotation=90, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _outline(axis, box) -> Rectangle:
    x, y, width, height = box
    # A pixel's centre is at its index, so its edge is half a pixel before.
    outline = Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=BOX, linewidth=1.2)
    return axis.add_patch(outline)


def class_counts(counts: Mapping[str, pd.DataFrame], *, title: str) -> Figure:
    """Draw images a class and split, stacked, a panel a task.

    Args:
        counts: task -> table of `splits.groups_per_split`, or of images alone, indexed by class, a column a split.
        title: of the figure.
    """
    figure, axes = panels(5.5 * len(counts), 3, 1, len(counts))
    for axis, (task, table) in zip(axes[0], counts.items()):
        has_groups = table.columns.nlevels > 1
        shown = table.xs("images", axis=1, level=1) if has_groups else table
        left = np.zeros(len(table))
        for colour, split in zip(COLOURS, ("train", "valid", "test")):
            if split in shown:
                axis.barh(shown.index, shown[split], left=left, color=colour, label=split)
                left += shown[split].to_numpy()
        for position, (name, total) in enumerate(zip(table.index, left)):
            groups = f" in {int(table.loc[name].xs('groups', level=1).sum())} groups" if has_groups else ""
            axis.text(total, position, f" {int(total)}{groups}", va="center", fontsize=8)
        axis.set(title=task, xlabel="images", xlim=(0, left.max() * 1.55))
        axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=11)
    return figure


def group_sizes(sizes: Mapping[str, np.ndarray], *, title: str) -> Figure:
    """Draw how many images the groups of each task hold."""
    figure, axes = panels(4.5 * len(sizes), 2.8, 1, len(sizes))
    for axis, (task, values) in zip(axes[0], sizes.items()):
        axis.hist(values, bins=np.arange(0.5, values.max() + 1.5), color=COLOURS[0])
        axis.set(
            title=f"{task}: {len(values)} groups of {int(values.sum())} images",
            xlabel="images in a group",
            ylabel="groups",
            yscale="log",
        )
        axis.set_ylim(bottom=0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=11)
    return figure


def learning_curves(
    histories: Mapping[str, pd.DataFrame], *, title: str, metrics: Sequence[str] = ("loss", "accuracy")
) -> Figure:
    """Draw those of the metrics that a history has by epoch, training and validation; dashed: the epoch that was kept.

    Args:
        histories: name -> table with epoch, kept, and <metric> and val_<metric> of each metric that was measured.
        title: of the figure.
        metrics: a column each, in order; those that no history has are left out.

    Raises:
        ValueError: no history has any of the metrics.
    """
    shown = [metric for metric in metrics if any(metric in history for history in histories.values())]
    if not shown:
        raise ValueError(f"`metrics` are {list(metrics)}, of which no history has any.")
    figure, axes = panels(4.5 * len(shown), 2.8 * len(histories), len(histories), len(shown))
    for row, (name, history) in zip(axes, histories.items()):
        best = history.loc[history["kept"], "epoch"].item()
        for axis, metric in zip(row, shown):
            if metric not in history:
                axis.set_axis_off()
                continue
            axis.plot(history["epoch"], history[metric], color=COLOURS[0], label="train")
            axis.plot(history["epoch"], history[f"val_{metric}"], color=COLOURS[1], label="validation")
            axis.axvline(best, color="grey", linestyle="--", linewidth=1, label=f"kept: epoch {best}")
            axis.set(title=f"{name}: {metric}", xlabel="epoch", ylabel=metric)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def confusion(tables: Mapping[str, np.ndarray], class_names: Mapping[str, Sequence[str]], *, title: str) -> Figure:
    """Draw confusion matrices: colour is the share of the true class, the figure in a cell the number of images."""
    figure, axes = panels(4.8 * len(tables), 4.2, 1, len(tables))
    for axis, (name, table) in zip(axes[0], tables.items()):
        totals = table.sum(axis=1, keepdims=True)
        shares = np.divide(table, totals, out=np.zeros_like(table, dtype=float), where=totals > 0)
        mesh = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(table):
            axis.text(
                column,
                row,
                int(count),
                ha="center",
                va="center",
                color="white" if shares[row, column] > 0.5 else "black",
            )
        ticks = range(len(table))
        axis.set_xticks(ticks, class_names[name], rotation=30, ha="right", fontsize=8)
        axis.set_yticks(ticks, class_names[name], fontsize=8)
        axis.set(title=name, xlabel="predicted class", ylabel="true class")
    figure.colorbar(mesh, ax=axes[0].tolist(), label="share of the true class", shrink=0.8)
    figure.suptitle(title, fontsize=11)
    return figure


def metric_intervals(
    rows: Sequence[Mapping], *, metrics: Sequence[str], title: str, ceilings: Mapping[str, float] | None = None
) -> Figure:
    """Draw the value and 95 % interval of each variant, a panel a task: models in blue, baselines in grey.

    Args:
        rows: of `kerasmed.metrics.multiclass_rows`; those labelled "all" are drawn.
        metrics: which ones, in order.
        title: of the figure.
        ceilings: task -> best attainable accuracy and balanced accuracy, where it is known; a dashed line.
    """
    table = pd.DataFrame([row for row in rows if row["label"] == "all" and row["metric"] in metrics])
    tasks = list(dict.fromkeys(table["task"]))
    num_lines = max(table["task"].value_counts())
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
    figure, axes = panels(5.8 * len(tasks), 0.36 * num_lines + 1.3, 1, len(tasks))
    for axis, task in zip(axes[0], tasks):
        labels = []
        ordered = [
            row
            for metric in metrics
            for row in table[(table["task"] == task) & (table["metric"] == metric)].to_dict("records")
        ]
        for position, row in enumerate(ordered):
            colour = COLOURS[5] if row["baseline"] is None else COLOURS[0]
            axis.plot(row["ci95"] or [row["value"]] * 2, [position] * 2, color=colour, linewidth=2)
            axis.plot(row["value"], position, "o", color=colour)
            axis.text(
                row["value"], position - 0.18, f"{row['value']:.3f}", ha="center", va="bottom", fontsize=7, bbox=box
            )
            if ceilings and "accuracy" in row["metric"]:
                axis.plot(
                    [ceilings[task]] * 2,
                    [position - 0.5, position + 0.5],
                    color=COLOURS[3],
                    linestyle="--",
                    linewidth=1,
                )
            labels.append(
                f"{row['metric'].replace('_', ' ')}: {row['variant'].removeprefix(task + '-').replace('_', ' ')}"
            )
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set(
            title=task + (f" (dashed: ceiling {ceilings[task]:.2f})" if ceilings else ""),
            xlabel="value, 95 % interval over groups",
            xlim=(-0.02, 1.04),
            ylim=(len(labels) - 0.4, -0.8),
        )
    figure.suptitle(title, fontsize=11)
    return figure


def model_diagram(model, *, title: str, columns: int = 6) -> Figure:
    """Draw a model block by block: layers whose names share the part before the first "_" are one box.

    A box gives the block's name, its layer types, the shape that it puts out and its number of weights. Layers that
    Keras named by itself ("conv2d_17") belong to the next one that has a name of its own; "patient_dense" does not
    belong to an input "patient". An input is a box of its whole name, unless other layers share its part. An arrow
    leads from the box before; where a block takes something else, the box says from which blocks. Operations that are
    no layers, such as those of `keras.ops`, have no box: a block behind them takes what they take.
    """
    inputs = {tensor.name for tensor in model.inputs}
    parts = {layer.name.split("_")[0] for layer in model.layers if layer.name not in inputs} - inputs
    blocks: dict[str, list] = {}
    unnamed = []
    for layer in model.layers:
        given_by_keras = re.sub("(?<=[a-z])(?=[A-Z])", "_", type(layer).__name__).lower()
        unnamed.append(layer)
        if not re.fullmatch(rf"{given_by_keras}(_\d+)?", layer.name) or layer is model.layers[-1]:
            first = layer.name.split("_")[0]
            name = layer.name.replace("_", " ") if first in inputs else first
            if layer.name in inputs and first not in parts:
                name = layer.name
            blocks.setdefault(name, []).extend(unnamed)
            unnamed = []
    rows = -(-len(blocks) // columns)
    figure, axes = panels(11, 1.9 * rows + 0.5)
    axis = axes[0, 0]
    operations = getattr(model, "operations", model.layers)  # a Sequential has layers alone
    makers = {id(tensor): operation for operation in operations for tensor in _listed(operation.output)}
    block_of = {id(layer): name for name, members in blocks.items() for layer in members}
    line = 186 // min(columns, len(blocks))  # letters of the smallest size that a box has room for
    before = None
    for position, (name, members) in enumerate(blocks.items()):
        kinds = list(dict.fromkeys(type(layer).__name__.removesuffix("2D") for layer in members))
        shape = "×".join("any" if side is None else str(side) for side in _listed(members[-1].output)[0].shape[1:])
        weights = sum(layer.count_params() for layer in members)
        taken = [source for source in _sources(members, makers, block_of) if source != name]
        x, y = position % columns * 1.2, -(position // columns) * 1.15
        axis.add_patch(
            FancyBboxPatch((x, y), 1, 1, boxstyle="round,pad=0.02", facecolor="#e8eef5", edgecolor=COLOURS[0])
        )
        size = min(10, 5 * line / len(name))
        axis.text(x + 0.5, y + 0.88, name, ha="center", va="center", fontsize=size, weight="bold")
        axis.text(x + 0.5, y + 0.04, f"{shape}\n{weights:,} weights", ha="center", va="bottom", fontsize=8)
        middle = 0.56
        if taken not in ([], [before]):
            said = _from_text(taken, line)
            axis.text(x + 0.5, y + 0.79, "\n".join(said), ha="center", va="top", fontsize=6, style="italic")
            middle = min(middle, 0.74 - 0.06 * len(said) - 0.042 * len(kinds))
        axis.text(x + 0.5, y + middle, "\n".join(kinds), ha="center", va="center", fontsize=8)
        if position % columns and before in taken:
            arrow = {"arrowstyle": "->", "color": "grey"}
            axis.annotate("", (x - 0.02, y + 0.5), (x - 0.18, y + 0.5), arrowprops=arrow)
        before = name
    axis.set(xlim=(-0.1, min(columns, len(blocks)) * 1.2), ylim=(-1.15 * (rows - 1) - 0.1, 1.1))
    axis.set_axis_off()
    figure.suptitle(f"{title}: {model.count_params():,} weights, read from left to right", fontsize=11)
    return figure


def _sources(layers, makers: Mapping, block_of: Mapping) -> list[str]:
    """Blocks that feed layers, in the order of what these take; plain operations in between are followed through."""
    waiting = [tensor for layer in layers for tensor in _listed(layer.input)][::-1]
    sources, seen = {}, set()
    while waiting:
        tensor = waiting.pop()
        maker = makers.get(id(tensor))
        if id(maker) in block_of:
            sources[block_of[id(maker)]] = True
        elif maker is not None and id(tensor) not in seen:
            waiting += _listed(maker.input)[::-1]
        seen.add(id(tensor))
    return list(sources)


def _from_text(names: Sequence[str], width: int, most: int = 3) -> list[str]:
    """Lines that say from which blocks, at most `most` of `width` letters; names that find no room are counted."""
    for kept in range(len(names), 0, -1):
        told = [name.replace(" ", "\u00a0") for name in names[:kept]]  # names are not broken at their blanks
        told += [f"{len(names) - kept}\u00a0more"] if kept < len(names) else []
        text = f"from {' and '.join([', '.join(told[:-1]), told[-1]] if len(told) > 1 else told)}"
        lines = textwrap.wrap(text, width, break_on_hyphens=False)
        if len(lines) <= most:
            break
    return [each.replace("\u00a0", " ") for each in lines[:most]]


def _listed(tensors) -> list:
    return list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]


def image_sizes(sizes: Mapping[str, pd.DataFrame], *, title: str) -> Figure:
    """Draw the widths and heights of files, a panel a task; the area of a circle grows with the number of files.

    Args:
        sizes: task -> table with `height` and `width` in pixels, NaN where unknown.
        title: of the figure.
    """
    figure, axes = panels(4.8 * len(sizes), 4, 1, len(sizes))
    for axis, (task, table) in zip(axes[0], sizes.items()):
        counts = table.groupby(["height", "width"]).size().sort_values(ascending=False, kind="stable")
        height, width = (counts.index.get_level_values(name).to_numpy(float) for name in ("height", "width"))
        largest = max(height.max(), width.max()) * 1.1
        axis.plot([0, largest], [0, largest], color="lightgrey", linewidth=1, zorder=0)
        area = 8 + 400 * counts.to_numpy() / counts.sum()
        axis.scatter(width, height, s=area, color=COLOURS[0], alpha=0.5, linewidths=0)
        most = f"most: {height[0]:.0f}×{width[0]:.0f},\n{counts.iloc[0]} of {counts.sum()} files"
        axis.text(0.03, 0.97, most, transform=axis.transAxes, va="top", fontsize=8)
        axis.set(
            title=f"{task}: {len(counts)} size{'s'[: len(counts) > 1]}, height×width",
            xlabel="width in pixels",
            ylabel="height in pixels",
            xlim=(0, largest),
            ylim=(0, largest),
            aspect="equal",
        )
    figure.suptitle(title, fontsize=11)
    return figure


def grey_levels(shares: Mapping[str, Mapping[str, np.ndarray]], *, title: str) -> Figure:
    """Draw the mean distribution of grey levels of each class, a panel a task.

    Args:
        shares: task -> class -> share of the pixels at each of the 256 grey levels.
        title: of the figure.
    """
    figure, axes = panels(5.5 * len(shares), 3.4, 1, len(shares))
    for axis, (task, classes) in zip(axes[0], shares.items()):
        for colour, (name, values) in zip(itertools.cycle(COLOURS), classes.items()):
            axis.plot(np.arange(256), 100 * np.asarray(values), color=colour, linewidth=1.2, label=name)
        axis.set(title=task, xlabel="grey level", ylabel="% of pixels (log)", yscale="log", xlim=(0, 255))
        axis.set_ylim(bottom=1e-3)  # below a pixel in 100,000 is noise
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def heat_maps(
    images: np.ndarray,
    heat: np.ndarray,
    captions: Sequence[str],
    *,
    title: str,
    columns: int = 8,
    boxes: np.ndarray | None = None,
) -> Figure:
    """Show images in grey under their heat maps, each map as a share of its own maximum.

    The overlay is the more opaque the hotter it is, and nowhere more than two thirds, so that the anatomy stays in
    sight; a map of zeros leaves the image bare. Colours do not compare between images.

    Args:
        images: uint8, shape (num_images, height, width).
        heat: float of the same shape, at least 0, from `kerasmed.localisation.upsample`.
        captions: one per image.
        title: of the figure.
        columns: images a row.
        boxes: float, shape (num_images, 4): x, y, width, height in pixels, outlined; NaN where an image has none.

    Raises:
        ValueError: shapes differ.
    """
    if heat.shape != images.shape:
        raise ValueError(
            f"`heat` has shape {heat.shape} and `images` {images.shape}; enlarge the maps with `localisation.upsample`."
        )
    columns = min(columns, max(len(images), 1))
    rows = max(-(-len(images) // columns), 1)
    figure, axes = panels(1.5 * columns + 0.9, 1.65 * rows + 0.5, rows, columns)
    longest = max((len(line) for caption in captions for line in caption.split("\n")), default=0)
    colours = ScalarMappable(Normalize(0, 1), "inferno")
    for axis in axes.flat:
        axis.set_axis_off()
    for position, (axis, image, heat_map, caption) in enumerate(zip(axes.flat, images, heat, captions)):
        share = heat_map / (heat_map.max() or 1)
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.imshow(share, cmap=colours.cmap, norm=colours.norm, alpha=share * 2 / 3)
        if boxes is not None and np.isfinite(boxes[position]).all():
            _outline(axis, boxes[position])
        axis.set_title(caption, fontsize=7 if longest < 20 else 5.5)
    bar = figure.colorbar(colours, ax=axes.ravel().tolist(), pad=0.02, aspect=25)
    bar.set_label("share of the map's maximum", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def cam_health(rows: Sequence[Mapping], *, title: str) -> Figure:
    """Draw the shares of living and dead maps of each variant, and beside them how often a peak lies in its box.

    The hit rate is drawn with its 95 % interval, the share that a peak at random would hit as a dashed line; this panel
    is left out where there are no boxes.

    Args:
        rows: of `kerasmed.localisation.summary`, variants from top to bottom; those labelled "all" are drawn.
        title: of the figure.

    Raises:
        ValueError: no row, or a variant's metric twice.
    """
    table = pd.DataFrame([row for row in rows if row["label"] == "all"], columns=["variant", "metric", "split", "n"])
    found = {(row["variant"], row["metric"]): row for row in rows if row["label"] == "all"}
    if not found or len(found) < len(table):
        raise ValueError(
            f"there are {len(table)} rows labelled 'all' for {len(found)} places, of the splits "
            f"{sorted(set(table['split']))}; expected one a variant and metric: pass the rows of one split."
        )
    variants = table["variant"].unique().tolist()
    places = np.arange(len(variants))
    pointing = [found.get((name, "pointing_hit")) for name in variants]
    figure, axes = panels(9.5 if any(pointing) else 6, 0.42 * len(variants) + 1.7, 1, 2 if any(pointing) else 1)
    no_gradient, negative = (
        np.array([found[name, metric]["value"] for name in variants])
        for metric in ("dead_zero_gradient", "dead_negative")
    )
    axis, left = axes[0, 0], np.zeros(len(variants))
    for colour, name, share in (
        (COLOURS[0], "alive", 1 - no_gradient - negative),
        (COLOURS[3], "dead: no gradient", no_gradient),
        (COLOURS[1], "dead: all against the label", negative),
    ):
        axis.barh(places, 100 * share, left=left, height=0.62, color=colour, label=name)
        for place, start, width in zip(places, left, 100 * share):
            if width >= 8:  # percent that a figure has room in
                axis.text(start + width / 2, place, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8)
        left += 100 * share
    counts = table.groupby("variant")["n"].first()
    axis.set_yticks(places, [f"{name} ({counts[name]} maps)" for name in variants], fontsize=8)
    axis.set(title="Maps", xlabel="% of maps", xlim=(0, 100), ylim=(len(variants) - 0.4, -0.6))
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=3)
    if any(pointing):
        axis = axes[0, 1]
        for place, row in zip(places, pointing):
            if row is None:
                continue
            axis.plot(row["ci95"] or [row["value"]] * 2, [place] * 2, color=COLOURS[0], linewidth=2)
            axis.plot(row["value"], place, "o", color=COLOURS[0])
            axis.text(row["value"], place - 0.15, f"{row['value']:.3f}", ha="center", va="bottom", fontsize=7)
            chance = [row["baseline"]["value"]] * 2
            axis.plot(chance, [place - 0.4, place + 0.4], color=COLOURS[5], linestyle="--", linewidth=1.5)
        axis.set_yticks([])
        axis.set(
            title="Peak in the box (dashed: chance)",
            xlabel="hit rate, 95 % interval over groups; a dead map misses",
            xlim=(-0.03, 1.03),
            ylim=(len(variants) - 0.4, -0.6),
        )
    figure.suptitle(title, fontsize=11)
    return figure
