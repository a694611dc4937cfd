"""Audit any folder or manifest, and write what was found as one page and as JSON."""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kerasmed import atomic, images, manifest, runs, tables
from kerasmed.audit import findings, likeness, page, shortcuts
from kerasmed.datasets import files

_SPLIT_FOLDER = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?)(set)?(?![a-z])", re.IGNORECASE)
# More names than this are no classes and no splits: folders of patients, say.
_MOST_LABELS, _MOST_SPLITS = 200, 20
_SHOWN_NAMES, _SHOWN_SHORTCUTS = 8, 5  # in a line


class Report(NamedTuple):
    """What an audit found."""

    name: str
    manifest: pd.DataFrame  # the images that could be read, with `group_id` where it is known or was found
    thumbnails: np.ndarray  # uint8, (num_images, 64, 64), beside the manifest
    class_names: Sequence[str]
    found: pd.DataFrame  # of `findings.find`, with unreadable files and shortcuts, and `note`: why
    probe: pd.DataFrame  # of `shortcuts.probe`
    accepted: Sequence[str]
    grouped: bool = False  # whether `group_id` was found by likeness

    def closed_by(self) -> list[str]:
        """Name the kinds of finding that close the gate; where no image could be read, that does."""
        if self.manifest.empty:
            return ["unreadable"]
        kinds = set(self.found["kind"]) - set(self.accepted)
        return [kind for kind in findings.KINDS if kind in findings.FAILING and kind in kinds]

    def by_kind(self) -> pd.DataFrame:
        """Count findings and the images in them, a row a kind that was found, in the order of `KINDS`."""
        counts = self.found.groupby("kind")["images"].agg(findings="size", images="sum")
        return counts.loc[[kind for kind in findings.KINDS if kind in counts.index]]

    def groups(self) -> pd.Series:
        """List the image paths of each `group_id` that several images have, largest group first."""
        several = self.manifest[self.manifest["group_id"].duplicated(keep=False)]
        listed = several.groupby("group_id")["image_path"].agg(list)
        return listed.loc[listed.map(len).sort_values(ascending=False, kind="stable").index]

    def lines(self) -> list[str]:
        """Say in a line each how large the groups of several images are, and which targets a shortcut tells."""
        sizes = self.groups().map(len)
        if sizes.empty:
            groups = "no groups of several images"
        else:
            # Only where no id was known were groups sought by likeness.
            by = "similarity " if self.grouped else ""
            few, most = int(sizes.min()), int(sizes.max())
            each = f"{few} images" if few == most else f"{few} to {most} images"
            plural = "" if len(sizes) == 1 else "s"
            groups = f"{len(sizes)} {by}group{plural} of {each}, {int(sizes.sum())} images in all"
        short = self.found[self.found["kind"] == "shortcut"]
        told = [f"{name} ({note})" for name, note in zip(short["name"], short["note"])]
        return [groups, *([f"shortcuts: {_first(told, _SHOWN_SHORTCUTS)}"] if told else [])]


def index(path, *, root=None) -> tuple[Path, pd.DataFrame, list[str], str]:
    """Read a bare folder of images, or a manifest, into a table.

    Of a folder, an image's split is the first folder on its path that is named train, val, test or the like
    ("Training", "val_1"); if none is, the first of several. Its label is the last of the other folders. More than 20
    names are no splits, and more than 200 no labels: folders of patients, say.
    A manifest is a CSV with `image_path` (relative to the CSV, or to `root`), as far as known `split`, `patient_id`,
    `study_id` and `group_id`, and one column `label` of names or, without it, columns of labels that hold 1, 0 or
    nothing; other columns are left alone, and a column without a name is not read. Only a blank cell is missing: a
    label may be spelt "None", a patient "NA". Spaces round a cell do not count. What the paths may be is said in
    `kerasmed.manifest.check_paths`: they never lead out of the root by what they say; links on the disk are followed.

    Args:
        path: folder or CSV file.
        root: folder that a manifest's paths are relative to, or that absolute ones lie in [the manifest's own].

    Returns:
        The folder that paths are relative to; the table, a row an image, with the columns of
        `kerasmed.manifest.COLUMNS` (missing where unknown) and of the labels; the labels' names; and a line that says
        what was taken for labels and splits, and which columns were left alone.

    Raises:
        FileNotFoundError: no such path or root, or no image below it.
        ValueError: neither folder nor CSV; a root for a folder; a CSV that is empty, not in UTF-8 or not separated by
            commas (see `kerasmed.tables.read`), with a column twice, without `image_path` or rows, with a path twice,
            or with one that leaves its folder; a label with the name of a column; below a folder, an image whose name
            is not in UTF-8 or holds a backslash.
    """
    path = Path(path)
    if path.is_dir():
        if root is not None:
            raise ValueError(
                f"{path} is a folder, whose images need no other root, and {root} was given (--data-root); leave it "
                "out, or name a manifest (CSV)."
            )
        return path, *_of_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name a folder of images, or a manifest (CSV).")
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path} is neither a folder nor a CSV; name a folder of images, or a manifest (CSV).")
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(
            f"{root} is no folder; name the one that the paths of {path.name} are relative to (--data-root)."
        )
    root = path.parent if root is None else Path(root)
    return root, *_of_csv(path, root)


def _of_csv(path: Path, root: Path) -> tuple[pd.DataFrame, list[str], str]:
    table = _read_csv(path)
    for place in (os.path.abspath(root), os.path.realpath(root)):  # as it is named, and as it is behind links
        table["image_path"] = table["image_path"].str.removeprefix(f"{place.rstrip(os.sep)}{os.sep}")
    table["image_path"] = table["image_path"].str.replace(r"^(\./+)+(?!/)", "", regex=True)  # as `find .` writes them
    missing = [name for name in manifest.COLUMNS if name not in table]
    table = table.assign(**dict.fromkeys(missing, pd.Series(pd.NA, table.index, dtype="str")))
    if "label" in table:
        table, class_names, labels = _one_hot(table)
    else:
        others = table.columns.difference([*manifest.COLUMNS, *manifest.OPTIONAL], sort=False)
        class_names = [name for name in others if table[name].notna().any() and table[name].dropna().isin([0, 1]).all()]
        labels = _named("labels", class_names)
    try:
        # The splits of a strange table may have any name.
        manifest.validate(table.assign(split="train"), class_names)
    except ValueError as error:
        absolute = table["image_path"].dropna().map(os.path.isabs).any()
        mend = " Absolute paths: name the folder that all of them lie in as `root` (--data-root)." if absolute else ""
        raise ValueError(f"{path}: {error}{mend}") from error
    alone = table.columns.difference([*manifest.COLUMNS, *class_names], sort=False).tolist()
    taken = [labels, _named("splits", sorted(table["split"].dropna().unique()))]
    return table, class_names, "; ".join([*taken, *([_named("left alone", alone)] if alone else [])])


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a manifest as text, what is blank as missing, and columns of numbers, or of true and false, as numbers."""
    expected = "a line of column names, image_path among them, and a row an image, separated by commas"
    table = tables.read(path, ["image_path"], expected=expected, mend="give the column of paths this name", others=True)
    # A label or an id may be spelt "None" or "NA": only nothing is missing.
    table = table.mask(table == "")
    others = table.columns.difference([*manifest.COLUMNS, "label"], sort=False)
    return table.assign(**{name: _as_numbers(table[name]) for name in others})


def _as_numbers(column: pd.Series) -> pd.Series:
    """A column of text as numbers, where every cell that is not missing is one."""
    numbers = pd.to_numeric(column.str.lower().replace({"true": "1", "false": "0"}), errors="coerce").astype(float)
    return numbers if numbers.notna().equals(column.notna()) else column


def _first(names: Sequence[str], count: int) -> str:
    more = f" ({len(names) - count} more)" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _named(what: str, names: Sequence[str]) -> str:
    return f"{what}: {_first(names, _SHOWN_NAMES)}" if len(names) else f"no {what}"


def _too_many(what: str, count: int, most: int) -> str:
    return f"no {what}: {count} names are too many, at most {most} are taken for {what}"


def _of_folder(root: Path) -> tuple[pd.DataFrame, list[str], str]:
    paths = [Path(entry.path).relative_to(root) for entry in files(root)]
    paths = [path for path in paths if path.suffix.lower() in images.SUFFIXES]
    if not paths:
        raise FileNotFoundError(f"no image under {root}; files ending in {', '.join(images.SUFFIXES)} are read.")
    manifest.check_paths([path.as_posix() for path in paths], f"the path of an image below {root}")
    records = [(path.as_posix(), *_split_and_label(path.parts[:-1])) for path in paths]
    table = pd.DataFrame(records, columns=["image_path", "split", "label"], dtype="str")
    names = sorted(table["split"].dropna().unique())
    splits = _named("splits", names)
    if len(names) > _MOST_SPLITS:
        table["split"] = table["split"].mask(table["split"].notna())
        splits = _too_many("splits", len(names), _MOST_SPLITS)
    for name in ("patient_id", "study_id", "group_id"):
        table[name] = pd.Series(pd.NA, table.index, dtype="str")
    table, class_names, labels = _one_hot(table)
    return table, class_names, f"{labels}; {splits}"


def _split_and_label(folders: Sequence[str]) -> tuple[str | None, str | None]:
    named = [place for place, name in enumerate(folders) if _SPLIT_FOLDER.match(name)]
    place = named[0] if named else 0 if len(folders) > 1 else None
    others = [name for other, name in enumerate(folders) if other != place]
    return None if place is None else folders[place], others[-1] if others else None


def _one_hot(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str], str]:
    """Turn the column `label` into a column a label, NaN where it is missing; name them, and say so in words."""
    labels, table = table["label"], table.drop(columns="label")
    class_names = sorted(labels.dropna().unique())
    if len(class_names) > _MOST_LABELS:
        return table, [], _too_many("labels", len(class_names), _MOST_LABELS)
    taken = [name for name in class_names if name in table]
    if taken:
        raise ValueError(f"labels {taken} have the names of columns; rename them.")
    known = labels.notna()
    columns = {name: (labels == name).astype(float).where(known) for name in class_names}
    return table.assign(**columns), class_names, _named("labels", class_names)


def examine(
    table: pd.DataFrame,
    class_names: Sequence[str],
    *,
    name: str,
    thumbnails: np.ndarray,
    facts: pd.DataFrame,
    headers: pd.DataFrame,
    quarantine: pd.DataFrame,
    similarity: float | None = likeness.SAME_ANATOMY,
    accepted: Collection[str] = (),
    seed: int = 0,
) -> Report:
    """Look for everything that `KINDS` lists.

    Args:
        table: of `index`, the images that could be read.
        class_names: its label columns.
        name: of what is audited, for the report.
        thumbnails, facts: of `kerasmed.pipelines.decode`, beside the table.
        headers: of `kerasmed.images.headers`, beside the table.
        quarantine: image_path and reason of the files that could not be read.
        similarity: correlation above which thumbnails are of one group, where the table knows neither groups nor
            patients; all pairs are compared, so 100,000 images take some ten minutes. None does without groups.
        accepted: kinds, of `FAILING`, that do not close the gate.
        seed: of the probe.

    Returns:
        `Report`.

    Raises:
        ValueError: `accepted` names no kind that could close the gate.
    """
    findings.check_accepted(accepted)
    table = table.reset_index(drop=True)
    identity = likeness.identify(thumbnails, facts)
    grouped = bool(similarity) and bool(table[["group_id", "patient_id"]].isna().all(axis=None))
    if grouped:
        table = likeness.assign_groups(table, thumbnails, prefix="group", threshold=similarity, facts=facts)
    groups = table["group_id"].fillna(table["patient_id"])
    groups = groups.fillna("alone-" + pd.Series(identity["near"].to_numpy()).astype(str))
    probed = shortcuts.probe(shortcuts.measure(headers, thumbnails), _targets(table, class_names), groups, seed=seed)
    short = probed[probed["low"] > shortcuts.SHORTCUT]
    notes = [f"AUROC {row.auroc:.2f}, most by {row.strongest}" for row in short.itertuples()]
    found = [
        _noted("unreadable", quarantine["image_path"], quarantine["reason"], images=1),
        findings.find(table, identity, class_names).assign(note=""),
        _noted("shortcut", short["target"], notes, images=0),
    ]
    found = pd.concat(found, ignore_index=True)
    return Report(name, table, thumbnails, class_names, found, probed, list(accepted), grouped)


def _targets(table: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Lay out what is probed: each label, and each split where there are several."""
    splits = sorted(table["split"].dropna().unique())
    splits = splits if 1 < len(splits) <= _MOST_SPLITS else []
    chosen = {f"split {split}": (table["split"] == split).astype(float) for split in splits}
    return table[list(class_names)].assign(**chosen)


def _noted(kind: str, names: Collection[str], notes: Collection[str], *, images: int) -> pd.DataFrame:
    """Lay findings that are no sets of images out as `findings.find` does, with a note."""
    rows = [(kind, name, images, "", "", [], note) for name, note in zip(names, notes)]
    return pd.DataFrame(rows, columns=[*findings.COLUMNS, "note"]).astype({"images": int})


def write(report: Report, folder) -> tuple[Path, Path]:
    """Write a report as `audit.json`, with every finding and group, and `audit.html`, one page with the first of each.

    Returns:
        The paths of both files.
    """
    folder = Path(folder)
    runs.write_json(folder / "audit.json", as_dict(report))
    with atomic.whole(folder / "audit.html") as temporary:
        temporary.write_text(page.render(report), encoding="utf-8")
    return folder / "audit.json", folder / "audit.html"


def as_dict(report: Report) -> dict:
    """Lay a report out as plain data: gate, counts by kind, every finding, groups of several images, probe."""
    closed_by = report.closed_by()
    return {
        "name": report.name,
        "images": len(report.manifest),
        "gate": {"open": not closed_by, "closed_by": closed_by, "accepted": list(report.accepted)},
        "kinds": report.by_kind().to_dict("index"),
        "findings": report.found.to_dict("records"),
        "groups": [{"group_id": name, "image_paths": paths} for name, paths in report.groups().items()],
        "probe": report.probe.astype(object).where(report.probe.notna(), None).to_dict("records"),
    }
