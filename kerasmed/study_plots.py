"""Counts and figures of a set of studies: a study is several images of one patient that share one label."""

import itertools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kerasmed import manifest
from kerasmed.label_plots import GREY
from kerasmed.manifest import SPLITS
from kerasmed.plots import COLOURS, image_grid, panels

ALL = "all"  # the row of a split's totals
_COLUMNS = ["patient_id", "study_id", "split", "body_part", "abnormal"]
_MOST = 8  # studies of a patient, or images of a study, from which on they share a bar


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """Count patients, studies and images of each split and study type.

    Args:
        table: a row an image: patient_id, study_id, split, body_part (the study's type) and abnormal (its label: 1, 0
            or NaN).

    Returns:
        DataFrame indexed by split (train, valid, test, then others) and body_part (sorted; those that the split has):
        patients, studies, abnormal_studies, share_abnormal (of the studies with a label), images and images_per_study
        (the mean). Each split ends in the row "all", over its distinct patients: one with studies of two types counts
        once.

    Raises:
        ValueError: a column is absent, patient_id, study_id, split or body_part is missing in a row, or the images of a
            study differ in one of the columns.

    Example:
        >>> rows = [("p1", "a/p1/s1", "train", "a", 1)] * 3 + [("p1", "b/p1/s1", "train", "b", 0)]
        >>> table = pd.DataFrame(rows, columns=["patient_id", "study_id", "split", "body_part", "abnormal"])
        >>> counts(table).loc["train", ["patients", "studies", "images"]].T.to_dict("list")
        {'a': [1, 1, 3], 'b': [1, 1, 1], 'all': [1, 2, 4]}
    """
    studies = _studies(table).astype({"abnormal": float, "images": int})  # of no row, else text where pandas uses arrow
    splits, types = _splits(studies), sorted(studies["body_part"].unique())
    rows = pd.concat([studies, studies.assign(body_part=ALL)])
    rows["split"] = pd.Categorical(rows["split"], splits)
    rows["body_part"] = pd.Categorical(rows["body_part"], [*types, ALL])
    counted = rows.groupby(["split", "body_part"], observed=True).agg(
        patients=("patient_id", "nunique"),
        studies=("study_id", "size"),
        abnormal_studies=("abnormal", "sum"),
        share_abnormal=("abnormal", "mean"),
        images=("images", "sum"),
        images_per_study=("images", "mean"),
    )
    counted.index = counted.index.set_levels([level.astype(str) for level in counted.index.levels])
    return counted.astype({"abnormal_studies": int})


def samples(images: np.ndarray, table: pd.DataFrame, *, title: str, count: int = 4, captions=None) -> Figure:
    """Show images of each study type, a row a type: normal ones on the left, abnormal ones on the right.

    Args:
        images: uint8, shape (num_images, height, width).
        table: a row an image beside them, with body_part and abnormal.
        title: of the figure.
        count: images of each kind, evenly spread over those there are; where there are fewer, places stay black.
        captions: a line for each image, shape (num_images,), below its kind; None for the kind alone.

    Returns:
        The figure, 2 · count columns wide.
    """
    types = sorted(table["body_part"].unique())
    of_kind = [table["body_part"].eq(name) & table["abnormal"].eq(kind) for name in types for kind in (0, 1)]
    flags = pd.concat(of_kind, axis=1, keys=range(len(of_kind))).astype(int)
    chosen = manifest.samples(flags, flags.columns, count=count)
    shown = np.zeros((len(of_kind) * count, *images.shape[1:]), np.uint8)
    lines = [""] * len(shown)
    for place, positions in enumerate(chosen):
        for step, position in enumerate(positions):
            shown[place * count + step] = images[position]
            more = "" if captions is None else f"\n{captions[position]}"
            lines[place * count + step] = ("normal", "abnormal")[place % 2] + more
    labels = [name.removeprefix("XR_").lower() for name in types]
    return image_grid(shown, lines, title=title, columns=2 * count, row_labels=labels)


def overview(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw patients and the share of abnormal studies by type, the studies of a patient and the images of a study.

    Splits have their colours; the last panel compares labels instead, since a network can learn from the number of
    images what it should learn from the images.

    Args:
        table: as of `counts`. A bar of eight holds more as well, and is then called "8+".
        title: of the figure.

    Raises:
        ValueError: as `counts`, or no row.
    """
    counted, studies = counts(table), _studies(table)
    if studies.empty:
        raise ValueError("`table` has no row; expected a row an image.")
    splits = counted.index.unique("split")
    types = sorted(studies["body_part"].unique())
    colours = dict(zip([*SPLITS, *(name for name in splits if name not in SPLITS)], itertools.cycle(COLOURS)))
    height = max(2.6, 0.5 + len(types) * (0.14 + 0.17 * len(splits)))
    figure, axes = panels(13, height + 3.6, 2, 2, height_ratios=(height, 2.6))
    (of_type, of_label), (of_patient, of_study) = axes
    for number, split in enumerate(splits):
        found = counted.loc[split].reindex(types)
        places = np.arange(len(types)) + 0.84 * ((number + 0.5) / len(splits) - 0.5)
        options = {"height": 0.84 / len(splits), "color": colours[split], "label": split}
        bars = of_type.barh(places, found["patients"].fillna(0), **options)
        of_type.bar_label(bars, [f"{count:,.0f}" for count in found["patients"].fillna(0)], padding=2, fontsize=8)
        bars = of_label.barh(places, 100 * found["share_abnormal"].fillna(0), **options)
        known = studies[studies["split"] == split].groupby("body_part")["abnormal"].count().reindex(types, fill_value=0)
        texts = [
            f"{share:.0%} ({abnormal:,.0f} of {labelled:,})" if labelled else "none"
            for share, abnormal, labelled in zip(found["share_abnormal"], found["abnormal_studies"], known)
        ]
        of_label.bar_label(bars, texts, padding=2, fontsize=8)
    names = [name.removeprefix("XR_").replace("_", " ") for name in types]
    for axis in (of_type, of_label):
        axis.set_yticks(range(len(types)), names, fontsize=9)
        axis.set_ylim(len(types) - 0.45, -0.55)
    of_type.margins(x=0.12)
    of_type.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    of_type.xaxis.set_major_formatter("{x:,.0f}")
    total = counted.xs(ALL, level="body_part")
    said = ", ".join(f"{count:,} in {split}" for split, count in total["patients"].items())
    of_type.set(title=f"Patients: {said}", xlabel="patients with a study of the type")
    said = ", ".join(f"{share:.0%} in {split}" for split, share in total["share_abnormal"].dropna().items())
    of_label.set(title=f"Abnormal studies: {said}", xlabel="% of the studies with a label", xlim=(0, 125))
    of_label.set_xticks(range(0, 101, 20))

    per_patient = studies.groupby(["split", "patient_id"]).size()
    numbers = {split: (per_patient[split], colours[split]) for split in splits}
    _histogram(of_patient, numbers, xlabel="studies of a patient", ylabel="patients, logarithmic", log=True)
    several = [f"{(per_patient[split] > 1).mean():.0%} in {split}" for split in splits]
    of_patient.set_title(f"Patients with several studies: {', '.join(several)}")
    labels = {"normal": (0, COLOURS[5]), "abnormal": (1, COLOURS[3])}
    numbers = {
        name: (studies.loc[studies["abnormal"] == value, "images"], colour) for name, (value, colour) in labels.items()
    }
    numbers["no label"] = (studies.loc[studies["abnormal"].isna(), "images"], GREY)
    numbers = {name: each for name, each in numbers.items() if len(each[0])}
    _histogram(of_study, numbers, xlabel="images of a study", ylabel="studies of all splits")
    means = [f"{images.mean():.2f} if {name}" for name, (images, _) in numbers.items()]
    of_study.set_title(f"Images per study: {', '.join(means)}")
    of_study.legend(fontsize=8, loc="upper right")
    for axis in axes.flat:
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*of_type.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=len(splits))
    figure.suptitle(title, fontsize=12)
    return figure


def _histogram(axis, numbers, *, xlabel, ylabel, log=False) -> None:
    """Draw how often each number occurs, in bars side by side: name -> (numbers, colour)."""
    largest = max(each.max() for each, _ in numbers.values())
    shown = min(largest, _MOST)
    for place, (name, (each, colour)) in enumerate(numbers.items()):
        heights = np.bincount(each.clip(upper=shown), minlength=shown + 1)[1:]
        places = np.arange(1, shown + 1) + 0.84 * ((place + 0.5) / len(numbers) - 0.5)
        bars = axis.bar(places, heights, width=0.84 / len(numbers), color=colour, label=name)
        axis.bar_label(bars, [f"{count:,}" if count else "" for count in heights], padding=1, fontsize=6.5)
    ticks = [str(number) for number in range(1, shown + 1)]
    axis.set_xticks(range(1, shown + 1), [*ticks[:-1], ticks[-1] + "+" * int(largest > shown)], fontsize=9)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        axis.set_yscale("log")
        axis.set_ylim(0.5, axis.get_ylim()[1] * 1.8)  # a bar of one is to be seen
        axis.minorticks_off()
    else:
        axis.margins(y=0.12)
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.yaxis.set_major_formatter("{x:,.0f}")


def _splits(studies: pd.DataFrame) -> list[str]:
    found = set(studies["split"])
    return [*(name for name in SPLITS if name in found), *sorted(found - set(SPLITS))]


def _studies(table: pd.DataFrame) -> pd.DataFrame:
    """Make a row a study, in order of first appearance, with its number of images."""
    absent = [name for name in _COLUMNS if name not in table]
    if absent:
        raise ValueError(f"`table` lacks the columns {absent}; expected {_COLUMNS}, it has {list(table.columns)}.")
    missing = table[_COLUMNS[:-1]].isna()
    if missing.any(axis=None):
        rows = table.index[missing.any(axis=1)]
        names = missing.columns[missing.any()].tolist()
        raise ValueError(
            f"{names} are missing in {len(rows)} of {len(table)} rows; drop them. First: {rows[:5].tolist()}."
        )
    studies = table[_COLUMNS].drop_duplicates()
    twice = studies.loc[studies["study_id"].duplicated(), "study_id"].unique().tolist()
    if twice:
        raise ValueError(
            f"the images of {len(twice)} studies differ in patient, split, type or label; a study has one of each. "
            f"First: {twice[:5]}."
        )
    return studies.assign(images=studies["study_id"].map(table["study_id"].value_counts()))
