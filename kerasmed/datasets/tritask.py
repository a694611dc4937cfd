"""Tritask: three binary labels on 64×64 grey scans; labelled training and validation images, unlabelled test images.

12,000, 3,000 and 5,000 PNG, grey stored in one channel or in three. 4,985 of the 15,000 labelled images are entirely
black, and their labels contradict one another: `kerasmed.audit` finds them. No patient ids. The answers are handed in
as a table of the form and order of `sample_submission.csv`: see `submission`.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import images, manifest, tables

logger = logging.getLogger(__name__)

CLASS_NAMES = {"scans": ("label1", "label2", "label3")}
# A row may have several labels or none: independent sigmoids, not a softmax.
EXCLUSIVE = False
SOURCES = {}  # no public link that is known here
LAYOUT = (
    "tritask/{train_images,val_images,test_images}/*.png, tritask/{train_labels,val_labels}.csv with the columns "
    "id,label1,label2,label3 (id = file name), and tritask/sample_submission.csv with the same columns"
)
ARCHIVE_FOLDERS = {}
FOLDERS = {"train": "train_images", "valid": "val_images", "test": "test_images"}
LABEL_TABLES = {"train": "train_labels.csv", "valid": "val_labels.csv"}
SAMPLE = "sample_submission.csv"
TABLES = (*LABEL_TABLES.values(), SAMPLE)


def folder(root) -> Path | None:
    """Return the folder that holds the images and tables, `root/tritask`, or None where it has no folder of images."""
    home = Path(root) / "tritask"
    return home if any((home / name).is_dir() for name in FOLDERS.values()) else None


def part_folder(root, part: str) -> Path:
    """Return the folder of a part: the one part lies in `root/tritask` itself."""
    return Path(root) / "tritask"


def read(root, part: str = "scans") -> pd.DataFrame:
    """Read the images and label tables into a manifest.

    `split` is the published one: train_images is train, val_images is valid, test_images is test. Patients, studies and
    groups are unknown. Labels are 1.0 and 0.0, and NaN for the test images. An id is a file name; where there is no
    such file, but one with ".png" added, that one is meant. An id without a file stays a row, so that decoding reports
    it; ids of the sample stay only where test_images holds an image at all, as it may be left out of a download.

    Args:
        root: data root, the folder that holds `tritask/`.
        part: "scans", the only one.

    Returns:
        Manifest in the order train, valid, test and of file names in each, with the label columns of
        `CLASS_NAMES["scans"]`.

    Raises:
        FileNotFoundError: no images of train or validation, or a label table is absent.
        ValueError: unknown part; a table without the columns, with an id twice, or with a label that is blank or not 0
            or 1; an image of train or validation without a row in its table.
    """
    if part not in CLASS_NAMES:
        raise ValueError(f"part {part!r} is unknown; known is {', '.join(CLASS_NAMES)}.")
    names = CLASS_NAMES[part]
    home = part_folder(root, part)
    frames, ignored = [], []
    for split, folder_name in FOLDERS.items():
        present, others = _list_images(home / folder_name)
        manifest.check_paths(sorted(present), f"the name of a file in {home / folder_name}")
        ignored += [f"tritask/{folder_name}/{name}" for name in others]
        if split in LABEL_TABLES:
            if not present:
                raise FileNotFoundError(
                    f"no images of tritask under {home / folder_name}; training and validation images are needed. "
                    f"Expected {LAYOUT}."
                )
            frame = _read_labels(home / LABEL_TABLES[split], names, present)
        else:
            frame = _read_unlabelled(home / SAMPLE, names, present)
        frames.append(frame.sort_values("id").assign(image_path=f"tritask/{folder_name}/" + frame["id"], split=split))
    if ignored:
        logger.warning("%d entries are no images by their suffix and were left out: %s", len(ignored), ignored[:5])
    table = pd.concat(frames, ignore_index=True).assign(patient_id=pd.NA, study_id=pd.NA, group_id=pd.NA)
    return manifest.validate(table[[*manifest.COLUMNS, *names]], names, exclusive=EXCLUSIVE)


def read_sample(root) -> pd.DataFrame | None:
    """Read the form in which the answers for the test images are handed in.

    Args:
        root: data root.

    Returns:
        DataFrame of `sample_submission.csv` in its order: id (text, spelled as in the file) and the label columns
        (placeholders, as numbers); None where the file is absent.

    Raises:
        ValueError: it has other columns than id and the labels, no rows, or an id twice or blank.
    """
    path = part_folder(root, "scans") / SAMPLE
    if not path.exists():
        return None
    names = CLASS_NAMES["scans"]
    table = _read_table(path, names)
    more = [name for name in table.columns if name not in ("id", *names)]
    if more:
        raise ValueError(
            f"{path} has the columns {more} beside id, {', '.join(names)}; answers cannot be written in that form. "
            "Remove them."
        )
    if table.empty:
        raise ValueError(f"{path} has no rows; expected one for each test image. Restore the file, or remove it.")
    _refuse_ids_twice(path, table["id"])
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce") for name in names})


def submission(sample: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Lay answers out in the form of the sample.

    Args:
        sample: from `read_sample`.
        answers: indexed by id (file name), a column of 0 and 1 for each label; rows that the sample does not ask for
            are left out. Where the sample's ids lack ".png", those of the answers may have it.

    Returns:
        DataFrame of the sample's columns, ids and order, labels as integers; it has passed `check_submission`.

    Raises:
        ValueError: a label has no column, an id of the sample has no answer or several, or an answer is not 0 or 1.
    """
    names = [name for name in sample.columns if name != "id"]
    absent = [name for name in names if name not in answers.columns]
    if absent:
        raise ValueError(f"`answers` lacks the columns {absent}; it has {list(answers.columns)}.")
    answers = answers.set_axis(answers.index.astype(str))
    _refuse_ids_twice("`answers`", answers.index.to_series())
    known = set(answers.index)
    wanted = sample["id"].map(lambda name: _as_file_name(str(name), known))
    missing = ~wanted.isin(known)
    if missing.any():
        raise ValueError(
            f"`answers` has no row for {int(missing.sum())} of {len(sample)} ids of the sample; predict these images "
            f"too, or give them a stated default. First: {sample.loc[missing, 'id'].head(3).tolist()}."
        )
    values = answers.loc[wanted, names]
    wrong = ~values.isin((0, 1)).to_numpy()
    if wrong.any():
        raise ValueError(
            f"`answers` has {int(wrong.sum())} values other than 0 and 1; compare probabilities with a threshold "
            f"first. First: {_first_cells(values.index, values, wrong)}."
        )
    table = values.astype("int64").reset_index(drop=True).assign(id=sample["id"].to_numpy())[list(sample.columns)]
    check_submission(table, sample)
    return table


def check_submission(table: pd.DataFrame, sample: pd.DataFrame) -> None:
    """Check that a table of answers has the form of the sample: columns, ids, order, and 0 or 1 as integers.

    Args:
        table: what is to be handed in; read a CSV back with `dtype={"id": str}`.
        sample: from `read_sample`.

    Raises:
        ValueError: says what differs, with the first offenders.
    """
    if list(table.columns) != list(sample.columns):
        raise ValueError(
            f"the columns are {list(table.columns)}; the sample has {list(sample.columns)}, in this order. "
            "Name and order them so."
        )
    ids, expected = table["id"], sample["id"].tolist()
    no_text = ~ids.map(lambda name: isinstance(name, str)).astype(bool)
    if no_text.any():
        raise ValueError(
            f"{int(no_text.sum())} of {len(table)} ids are no text; read them with dtype={{'id': str}}, so that they "
            f"keep their zeros. First: {ids[no_text].head(3).tolist()}."
        )
    _refuse_ids_twice("the table", ids)
    known, found = set(expected), set(ids)
    missing, extra = [name for name in expected if name not in found], [name for name in ids if name not in known]
    if missing or extra:
        raise ValueError(
            f"the table lacks {len(missing)} ids of the sample and has {len(extra)} that are not in it; write one row "
            f"for each of the {len(expected)} ids. First missing: {missing[:3]}; first not in the sample: {extra[:3]}."
        )
    moved = [position for position, (name, other) in enumerate(zip(ids, expected)) if name != other]
    if moved:
        raise ValueError(
            f"{len(moved)} of {len(table)} ids are out of the sample's order; sort the rows as the sample's. First: "
            f"row {moved[0]} is {ids.iloc[moved[0]]!r} where the sample has {expected[moved[0]]!r}."
        )
    labels = table.drop(columns="id")
    no_integers = {
        name: str(dtype) for name, dtype in labels.dtypes.items() if not pd.api.types.is_integer_dtype(dtype)
    }
    if no_integers:
        raise ValueError(f"columns {no_integers} are no integers; the sample wants 0 and 1: use astype(int).")
    wrong = ~labels.isin((0, 1)).to_numpy()
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} labels are neither 0 nor 1. First: {_first_cells(ids.to_numpy(), labels, wrong)}."
        )


def _list_images(folder_: Path) -> tuple[set[str], list[str]]:
    """Return the names of a folder's images, and of its other entries but hidden ones; none where it is absent."""
    if not folder_.is_dir():
        return set(), []
    entries = sorted(path for path in folder_.iterdir() if not path.name.startswith("."))
    found = {path.name for path in entries if path.suffix.lower() in images.SUFFIXES and not path.is_dir()}
    return found, [path.name for path in entries if path.name not in found]


def _read_labels(path: Path, names, present: set[str]) -> pd.DataFrame:
    """Read a label table: id as the file's name, labels as float; every image that is present has its row."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is absent; the {len(present)} images beside it need one with the columns id, {', '.join(names)}."
        )
    table = _read_table(path, names)[["id", *names]]
    table["id"] = table["id"].map(lambda name: _as_file_name(name, present))
    _refuse_ids_twice(path, table["id"])
    blank = (table[list(names)] == "").to_numpy()
    if blank.any():
        raise ValueError(
            f"{path} has {int(blank.sum())} blank labels; write 1 or 0, or remove the row and its image. "
            f"First: {_first_cells(table['id'], table[list(names)], blank)}."
        )
    values = table[list(names)].apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = ~values.isin((0, 1)).to_numpy()
    if wrong.any():
        raise ValueError(
            f"{path} has {int(wrong.sum())} labels other than 0 and 1; write 1 for present and 0 for absent. "
            f"First: {_first_cells(table['id'], table[list(names)], wrong)}."
        )
    unlabelled = sorted(present - set(table["id"]))
    if unlabelled:
        raise ValueError(
            f"{path} has no row for {len(unlabelled)} of {len(present)} images beside it; add the rows, or move the "
            f"images out. First: {unlabelled[:3]}."
        )
    return values.assign(id=table["id"])


def _read_unlabelled(path: Path, names, present: set[str]) -> pd.DataFrame:
    """List the test images that are present, and those of the sample that are not; none where none is present."""
    listed = set()
    if present and path.exists():
        table = _read_table(path, names)
        _refuse_ids_twice(path, table["id"])
        listed = {_as_file_name(name, present) for name in table["id"]}
    ids = sorted(present | listed)
    return pd.DataFrame({"id": pd.Series(ids, dtype=str), **{name: np.full(len(ids), np.nan) for name in names}})


def _read_table(path: Path, names) -> pd.DataFrame:
    """Read a CSV as text and check its columns and ids."""
    expected = f"the columns id, {', '.join(names)}"
    table = tables.read(path, ("id", *names), expected=expected, others=True)
    blank = table["id"] == ""
    if blank.any():
        raise ValueError(
            f"{path} has {int(blank.sum())} rows without an id; write the image's file name. "
            f"First rows: {(np.flatnonzero(blank)[:3] + 1).tolist()}."
        )
    return table


def _as_file_name(name: str, known: set[str]) -> str:
    """Return the id, with ".png" added where only that is known."""
    return f"{name}.png" if name not in known and f"{name}.png" in known else name


def _refuse_ids_twice(where, ids: pd.Series) -> None:
    twice = ids[ids.duplicated()]
    if len(twice):
        raise ValueError(
            f"{where} has {len(twice)} rows whose id is given before; keep one row for each image. "
            f"First: {twice.unique()[:3].tolist()}."
        )


def _first_cells(ids, table: pd.DataFrame, wrong: np.ndarray) -> str:
    """Name the first three cells that a mask marks: id, column and value."""
    rows, columns = np.nonzero(wrong)
    cells = [(np.asarray(ids)[row], table.columns[column]) for row, column in zip(rows[:3], columns[:3])]
    values = table.to_numpy(object)[wrong][:3]
    return ", ".join(f"{row} {column} {value!r}" for (row, column), value in zip(cells, values))
