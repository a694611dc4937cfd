"""RSNA 2024 Lumbar Spine Degenerative Classification: MRI of 1,975 studies, graded at five levels.

6,294 series of 147,218 slices (DICOM): sagittal T1, sagittal T2 or STIR, and axial T2; a study may have several series
of one kind, or none. 25 grades a study, each Normal/Mild, Moderate, Severe or blank: spinal canal stenosis by level,
neural foraminal narrowing and subarticular stenosis by side and level. Of the known grades 8,664 / 736 / 470 are of the
canal, 15,357 / 3,564 / 779 foraminal and 13,733 / 3,660 / 1,840 subarticular; 5, 50 and 517 are blank. Readers took the
canal from sagittal T2, foramina from sagittal T1, and the subarticular zone from axial T2. The set names no patients:
a study stands for one. What the competition calls test_images is not read: it has no grades. Nothing of the set is
shipped with this package: its use is bound by the competition's rules.

Source: Richards et al. 2024; https://www.kaggle.com/competitions/rsna-2024-lumbar-spine-degenerative-classification
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import manifest, tables

logger = logging.getLogger(__name__)

PART = "series"
MODALITIES = ("Sagittal T1", "Sagittal T2/STIR", "Axial T2")
CONDITIONS = ("spinal_canal_stenosis", "neural_foraminal_narrowing", "subarticular_stenosis")
# The modality in which a condition is judged.
PAIRED = {
    "spinal_canal_stenosis": "Sagittal T2/STIR",
    "neural_foraminal_narrowing": "Sagittal T1",
    "subarticular_stenosis": "Axial T2",
}
GRADES = ("Normal/Mild", "Moderate", "Severe")  # 0, 1, 2
LEVELS = ("l1_l2", "l2_l3", "l3_l4", "l4_l5", "l5_s1")
SIDES = ("left", "right")
# Column of train.csv -> (condition, side, level), in the columns' order; the canal has no side: "".
PLACES = {
    "_".join(filter(None, (side, condition, level))): (condition, side, level)
    for condition in CONDITIONS
    for side in (("",) if condition == "spinal_canal_stenosis" else SIDES)
    for level in LEVELS
}
TARGETS = tuple(PLACES)
CLASS_NAMES = {PART: CONDITIONS}
EXCLUSIVE = False
SOURCES = {
    PART: (
        "https://www.kaggle.com/competitions/rsna-2024-lumbar-spine-degenerative-classification",
        "research, competition rules",
    )
}
LAYOUT = (
    "lumbar/{train.csv,train_series_descriptions.csv,train_label_coordinates.csv} and "
    "lumbar/train_images/<study>/<series>/<instance>.dcm"
)
ARCHIVE_FOLDERS = {}  # behind the competition's rules
TABLES = (
    "train.csv",
    "train_series_descriptions.csv",
    "train_label_coordinates.csv",
    "test_series_descriptions.csv",
    "sample_submission.csv",
)

_IMAGES = "train_images"
_TOLD = [f"p_{grade}" for grade in GRADES]
_SUBMITTED = ["normal_mild", "moderate", "severe"]  # the same grades, as a submission spells them
# Two decimals can be 0.01 off in sum; the rest is for their binary form.
_SLACK = 0.01 + 1e-9
_MOST_DIGITS = 18  # of what must fit 64 bits


def folder(root) -> Path | None:
    """Return the folder that holds `train_images`, `root/lumbar`, or None where it holds none."""
    home = part_folder(root, PART)
    return home if (home / _IMAGES).is_dir() else None


def part_folder(root, part: str) -> Path:
    """Return the folder of a part: the one part lies in `root/lumbar` itself."""
    return Path(root) / "lumbar"


def targets_of(condition: str) -> tuple[str, ...]:
    """List the columns of `TARGETS` that grade a condition, in their order.

    Example:
        >>> targets_of("spinal_canal_stenosis")[:2]
        ('spinal_canal_stenosis_l1_l2', 'spinal_canal_stenosis_l2_l3')
    """
    return tuple(name for name, (found, _, _) in PLACES.items() if found == condition)


# --- series ----------------------------------------------------------------------------------------------------------


def read(root, part: str = PART) -> pd.DataFrame:
    """Read the tables and list the folders into a manifest, a row a series.

    Folders are listed once, and no DICOM file is opened. A slice is a visible file that ends in .dcm, in either case;
    other files count nowhere. One warning each counts: studies of train.csv that no series is described of; described
    series that are not there, as after a partial download; series that are there but not described; and series of
    studies that train.csv does not have. None of these has a row.

    Args:
        root: data root, the folder that holds `lumbar/`.
        part: "series", the only one.

    Returns:
        Manifest, a row a series, ordered by study, modality (as in `MODALITIES`) and series, numbers in order: the
        manifest's columns (image_path: the middle slice by number, of an even number the later of the two; patient_id =
        group_id = study_id, text; split: "train"), modality, series_id (text), series_path (its folder relative to
        `root`), slices (files in it) and, for each condition, 1.0 where any of its grades is Moderate or Severe, 0.0
        where all are Normal/Mild, and NaN where those that are known are Normal/Mild and others are blank.

    Raises:
        FileNotFoundError: a table is absent, or none of its series is there.
        ValueError: unknown part; a table lacks columns, has an id twice or one that is no number, or a word that is
            none of `GRADES` or `MODALITIES`.
    """
    if part not in CLASS_NAMES:
        raise ValueError(f"part {part!r} is unknown; known is {', '.join(CLASS_NAMES)}.")
    home = part_folder(root, part)
    studies, described, found = _read_grades(home), _read_descriptions(home), list_series(home / _IMAGES)
    _warn(studies, described, found)
    table = _present(home, studies, described, found)
    known = studies.set_index("study_id")
    for condition in CONDITIONS:
        grades = known[list(targets_of(condition))]
        label = (grades > 0).any(axis=1).astype(float).where((grades > 0).any(axis=1) | grades.notna().all(axis=1))
        table[condition] = label.reindex(table["study_id"]).to_numpy()
    start = (home / _IMAGES).relative_to(root).as_posix()
    places = start + "/" + table["study_id"] + "/" + table["series_id"]
    files = [found[key] for key in zip(table["study_id"], table["series_id"])]
    image_paths = [f"{place}/{names[len(names) // 2]}" for place, names in zip(places, files)]
    manifest.check_paths(image_paths)
    table = table.assign(
        image_path=image_paths,
        patient_id=table["study_id"],
        group_id=table["study_id"],
        split="train",
        series_path=places,
        slices=[len(names) for names in files],
    )
    columns = [*manifest.COLUMNS, "modality", "series_id", "series_path", "slices", *CONDITIONS]
    return manifest.validate(table[columns], CONDITIONS, exclusive=EXCLUSIVE)


def read_studies(root) -> pd.DataFrame:
    """Read the grades, a row a study.

    Args:
        root: data root.

    Returns:
        DataFrame in the order of train.csv: study_id (text), the columns `TARGETS` (0.0, 1.0, 2.0 as in `GRADES`, NaN
        where blank), and for each of `MODALITIES` how many series of it are there.

    Raises:
        As `read`.
    """
    home = part_folder(root, PART)
    studies = _read_grades(home)
    present = _present(home, studies, _read_descriptions(home), list_series(home / _IMAGES))
    counts = pd.crosstab(present["study_id"], present["modality"])
    counts = counts.reindex(index=studies["study_id"], columns=list(MODALITIES), fill_value=0)
    return pd.concat([studies, counts.reset_index(drop=True).rename_axis(columns=None)], axis=1)


def long(studies: pd.DataFrame) -> pd.DataFrame:
    """Lay grades out a row a grade.

    Args:
        studies: of `read_studies`, or any table with study_id and the columns `TARGETS`.

    Returns:
        DataFrame in the order of the studies and, for each, of `TARGETS`: study_id, target, condition, side ("",
        "left" or "right"), level and grade (0.0, 1.0, 2.0; NaN where blank).
    """
    places = pd.DataFrame(PLACES.values(), columns=["condition", "side", "level"])
    places.insert(0, "target", TARGETS)
    rows = np.tile(np.arange(len(TARGETS)), len(studies))
    table = places.iloc[rows].reset_index(drop=True)
    table.insert(0, "study_id", np.repeat(studies["study_id"].to_numpy(), len(TARGETS)))
    return table.assign(grade=studies[list(TARGETS)].to_numpy(float).ravel())


def read_coordinates(root) -> pd.DataFrame:
    """Read where the graded places lie, a row a point, in the order of the file.

    Args:
        root: data root.

    Returns:
        DataFrame: study_id, series_id (text), instance_number (int), condition, side and level (as in `PLACES`), x and
        y (float, pixels of the slice, x to the right and y downwards).

    Raises:
        FileNotFoundError: the table is absent.
        ValueError: it lacks columns, or has a condition, level or number that is none.
    """
    path = part_folder(root, PART) / "train_label_coordinates.csv"
    table = _read_table(path, ("study_id", "series_id", "instance_number", "condition", "level", "x", "y"))
    _refuse_ids(path, table, ("study_id", "series_id", "instance_number"))
    words = {"spinal_canal_stenosis": "", "neural_foraminal_narrowing": " ", "subarticular_stenosis": " "}
    names = {
        (f"{side.title()}{gap}" if gap else "") + condition.replace("_", " ").title(): (condition, side)
        for condition, gap in words.items()
        for side in (SIDES if gap else ("",))
    }
    levels = {level.upper().replace("_", "/"): level for level in LEVELS}
    _refuse(path, table, "condition", ~table["condition"].isin(names), f"one of {', '.join(names)}")
    _refuse(path, table, "level", ~table["level"].isin(levels), f"one of {', '.join(levels)}")
    for name in ("x", "y"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        _refuse(path, table, name, ~np.isfinite(numbers), "a number")
        table[name] = numbers.astype(float)
    too_large = table["instance_number"].str.len() > _MOST_DIGITS
    _refuse(path, table, "instance_number", too_large, f"a number of at most {_MOST_DIGITS} digits")
    parts = [names[name] for name in table["condition"]]
    for column, values in (("condition", [name for name, _ in parts]), ("side", [side for _, side in parts])):
        table[column] = pd.array(values, dtype="str")
    table["level"] = table["level"].map(levels)
    table["instance_number"] = table["instance_number"].astype(int)
    return table[["study_id", "series_id", "instance_number", "condition", "side", "level", "x", "y"]]


def _present(home: Path, studies: pd.DataFrame, described: pd.DataFrame, found: dict) -> pd.DataFrame:
    """Described series that are there, of studies with grades: study_id, series_id, modality, in order."""
    is_here = [key in found for key in zip(described["study_id"], described["series_id"])]
    table = described[np.array(is_here, bool) & described["study_id"].isin(studies["study_id"]).to_numpy()]
    if table.empty:
        raise FileNotFoundError(
            f"no series of lumbar under {home / _IMAGES} that {home / 'train_series_descriptions.csv'} describes; "
            f"expected {LAYOUT}."
        )
    order = pd.DataFrame(
        {
            "study": table["study_id"].map(int),
            "modality": table["modality"].map(MODALITIES.index),
            "series": table["series_id"].map(int),
        }
    )
    return table.loc[order.sort_values(list(order)).index].reset_index(drop=True)


def _warn(studies: pd.DataFrame, described: pd.DataFrame, found: dict) -> None:
    """Warn of what has no row, once for each reason."""
    names = [f"{study}/{series}" for study, series in zip(described["study_id"], described["series_id"])]
    present = {f"{study}/{series}" for study, series in found}
    graded = set(studies["study_id"])
    pairs = [(name, name.partition("/")[0] in graded) for name in names]
    without = set(described["study_id"])
    for what, found_so in (
        (
            "studies of train.csv have no row in train_series_descriptions.csv, so no series",
            [study for study in studies["study_id"] if study not in without],
        ),
        (
            "described series are not there, or hold no .dcm file, and were left out",
            [name for name, _ in pairs if name not in present],
        ),
        (
            "series are there, but not in train_series_descriptions.csv, and were left out",
            sorted(present.difference(names), key=lambda name: [_by_number(part) for part in name.split("/")]),
        ),
        (
            "series are of studies that train.csv does not have, and were left out",
            [name for name, is_graded in pairs if name in present and not is_graded],
        ),
    ):
        if found_so:
            logger.warning("%d %s: %s", len(found_so), what, ", ".join(found_so[:3]))


def list_series(folder, studies: Sequence[str] | None = None) -> dict[tuple[str, str], list[str]]:
    """List the slices of every series that has some, without opening any: visible files that end in .dcm.

    Args:
        folder: that holds `<study>/<series>/<instance>.dcm`; an absent one has no series.
        studies: names of folders in it; None for all.

    Returns:
        dict (study, series) -> names of files, in the order of their numbers.
    """
    found = {}
    for study in _folders(f"{folder}") if studies is None else studies:
        for series in _folders(f"{folder}/{study}"):
            names = os.listdir(f"{folder}/{study}/{series}")
            names = [name for name in names if name[-4:].lower() == ".dcm" and name[0] != "."]
            if names:
                found[study, series] = sorted(names, key=lambda name: _by_number(name[:-4]))
    return found


def _folders(path: str) -> list[str]:
    """Names of the visible folders of a folder, none where it is absent."""
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
    except FileNotFoundError:
        return []


def _by_number(name: str) -> tuple:
    """Sorting key: the number where a name is one, else after the numbers by name."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


# --- submissions -----------------------------------------------------------------------------------------------------


def submission(table: pd.DataFrame) -> pd.DataFrame:
    """Lay answers out as the RSNA 2024 lumbar competition takes them; write with `to_csv(path, index=False)`.

    The competition scores 25 targets of every study, in any order of rows, and refuses values that are not finite or
    below 0.

    Args:
        table: a row a study and target, in any order: study_id (whole number, as text or int), condition, side ("" or
            missing for the canal) and level as in `PLACES`, and p_<grade> of each of `GRADES`. Other columns are left
            alone.

    Returns:
        DataFrame: row_id (text, <study_id>_<target>), normal_mild, moderate, severe (float); studies in the order in
        which they first appear and, for each, the targets in the order of `TARGETS`.

    Raises:
        ValueError: columns are absent, a study_id is no whole number, a row is of no target, a study lacks a target or
            has one twice, or probabilities are not finite, below 0, or more than 0.01 off a sum of 1.

    Example:
        >>> answers = long(pd.DataFrame({"study_id": ["44036939"]} | dict.fromkeys(TARGETS, 0)))
        >>> answers = answers.assign(**{"p_Normal/Mild": 0.5, "p_Moderate": 0.25, "p_Severe": 0.25})
        >>> print(submission(answers)[5:6].to_csv(index=False), end="")
        row_id,normal_mild,moderate,severe
        44036939_left_neural_foraminal_narrowing_l1_l2,0.5,0.25,0.25

    Source: the competition's page, evaluation.
    """
    needed = ["study_id", "condition", "side", "level", *_TOLD]
    absent = [name for name in needed if name not in table]
    if absent:
        raise ValueError(f"the table of answers lacks the columns {absent}; expected {needed}.")
    source, names = "the table of answers", {place: target for target, place in PLACES.items()}
    studies = table["study_id"].astype(object).map(str)
    wrong = ~studies.str.fullmatch("[0-9]+")
    _refuse_answers(source, studies, wrong, "have a study_id that is no whole number; pass it as text or int")
    sides = table["side"].astype(object)
    places = list(zip(table["condition"], sides.where(sides.notna(), ""), table["level"]))
    _refuse_answers(
        source,
        [(study, *place) for study, place in zip(studies, places)],
        [place not in names for place in places],
        "are of no target; expected condition, side and level as in PLACES",
    )
    ids = pd.Index([f"{study}_{names[place]}" for study, place in zip(studies, places)], dtype=str)
    _refuse_answers(source, ids, ids.duplicated(), "repeat a study and target; keep one of each")
    wanted = pd.Index([f"{study}_{target}" for study in studies.unique() for target in TARGETS], dtype=str)
    _refuse_answers(source, wanted, ~wanted.isin(ids), "are absent; answer each of the 25 targets of every study")
    told = pd.DataFrame(_probabilities(source, ids, table[_TOLD]), index=ids, columns=_SUBMITTED)
    return told.loc[wanted].rename_axis("row_id").reset_index()


def read_submission(path) -> pd.DataFrame:
    """Read what `submission` gives back from a CSV: the inverse, but for studies that lack targets, which are kept.

    Args:
        path: CSV with the columns row_id, normal_mild, moderate and severe, in any order; others are left alone.

    Returns:
        DataFrame in the order of the file: study_id (text), condition, side ("", "left" or "right"), level, and
        p_<grade> (float) of each of `GRADES`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: columns are absent, a row_id is not <study_id>_<target> or is there twice, or values are no
            probabilities, as in `submission`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is absent; expected a CSV with the columns row_id, {', '.join(_SUBMITTED)}.")
    table = _read_table(path, ("row_id", *_SUBMITTED))
    wrong = ~table["row_id"].str.fullmatch(f"[0-9]+_({'|'.join(TARGETS)})")
    _refuse(path, table, "row_id", wrong, f"a study_id and a target, such as 44036939_{TARGETS[5]}")
    _refuse_twice(path, table, ["row_id"])
    told = pd.DataFrame(_probabilities(str(path), table["row_id"], table[_SUBMITTED]), columns=_TOLD)
    parts = [row_id.split("_", maxsplit=1) for row_id in table["row_id"]]
    places = [(study, *PLACES[target]) for study, target in parts]
    return pd.concat([pd.DataFrame(places, columns=["study_id", "condition", "side", "level"]), told], axis=1)


def _probabilities(source: str, ids: Sequence[str], table: pd.DataFrame) -> np.ndarray:
    """Values as float64, shape (rows, 3); refuses rows that are no probabilities."""
    told = table.apply(pd.to_numeric, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    # So asked, NaN and infinity fail as well.
    wrong = ~((told >= 0).all(axis=1) & (np.abs(told.sum(axis=1) - 1) <= _SLACK))
    rows = [f"{row_id}: {values}" for row_id, values in zip(ids, table.to_numpy(object).tolist())]
    _refuse_answers(
        source, rows, wrong, "are no probabilities: expected at least 0, with a sum of 1; pass a softmax, no logits"
    )
    return told


def _refuse_answers(source: str, names: Sequence, wrong: Sequence[bool], what: str) -> None:
    """Refuse rows by what they hold, since a table of answers need not come from a file with lines."""
    first = [name for name, is_wrong in zip(names, wrong) if is_wrong]
    if first:
        raise ValueError(f"{source}: {len(first)} of {len(names)} rows {what}. First: {first[:3]}.")


# --- tables ----------------------------------------------------------------------------------------------------------


def _read_grades(home: Path) -> pd.DataFrame:
    """Read train.csv: study_id and `TARGETS` as numbers."""
    path = home / "train.csv"
    table = _read_table(path, ("study_id", *TARGETS))
    _refuse_ids(path, table, ["study_id"])
    _refuse_twice(path, table, ["study_id"])
    codes = {**{name: float(code) for code, name in enumerate(GRADES)}, "": np.nan}
    for name in TARGETS:
        _refuse(path, table, name, ~table[name].isin(codes), f"one of {', '.join(GRADES)}, or blank")
    return pd.concat([table["study_id"], table[list(TARGETS)].apply(lambda words: words.map(codes))], axis=1)


def read_descriptions(path) -> pd.DataFrame:
    """Read train_series_descriptions.csv or test_series_descriptions.csv: of which modality a series is.

    Returns:
        DataFrame in the order of the file: study_id, series_id (text) and modality, which is what the table says,
        whether it is one of `MODALITIES` or not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: columns are absent, an id is no whole number, or a series is there twice.
    """
    path = Path(path)
    table = _read_table(path, ("study_id", "series_id", "series_description"))
    _refuse_ids(path, table, ["study_id", "series_id"])
    _refuse_twice(path, table, ["study_id", "series_id"])
    return table.rename(columns={"series_description": "modality"})


def _read_descriptions(home: Path) -> pd.DataFrame:
    """Read train_series_descriptions.csv, of which every series must be of one of `MODALITIES`."""
    path = home / "train_series_descriptions.csv"
    table = read_descriptions(path)
    wrong, expected = ~table["modality"].isin(MODALITIES), f"one of {', '.join(MODALITIES)}"
    _refuse(path, table.rename(columns={"modality": "series_description"}), "series_description", wrong, expected)
    return table


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns of a CSV as text, whatever their order; others are left alone."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is absent; expected {LAYOUT}.")
    names = [*columns[:3], "…"] if len(columns) > 7 else columns
    return tables.read(path, columns, expected=f"the columns {', '.join(names)}")


def _refuse_ids(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    for name in columns:
        _refuse(path, table, name, ~table[name].str.fullmatch("[0-9]+"), "a whole number")


def _refuse_twice(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    wrong = table.duplicated(columns)
    if wrong.any():
        rows = [f"row {row + 2}: {'/'.join(table.loc[row, columns])}" for row in table.index[wrong][:3]]
        raise ValueError(f"{path} has {' and '.join(columns)} twice {int(wrong.sum())} times; keep one. First: {rows}.")


def _refuse(path: Path, table: pd.DataFrame, column: str, wrong: pd.Series, expected: str) -> None:
    if wrong.any():
        rows = [f"row {row + 2}: {table.loc[row, column]!r}" for row in table.index[wrong][:3]]
        raise ValueError(
            f"{path}, column {column}: {int(wrong.sum())} of {len(table)} values are not {expected}. Correct them. "
            f"First: {rows}."
        )
