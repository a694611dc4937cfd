"""Chest: NIH ChestX-ray14, 14 findings on frontal radiographs, with age, sex, view and earlier visits of each patient.

112,120 PNG of 1024×1024 pixels (8-bit grey, a few RGBA) of 30,805 patients. An image has one finding or more, or
`No Finding`; they were taken from the reports by a program. The official lists hold 86,524 images for training and
validation and 25,596 for testing; no patient is in both, and 89 % of the test images are follow-ups. 984 boxes round 8
of the findings exist, on 880 test images. Older tables write ages as 058Y, 013M and 011D, and some are over 400 years.

Source: Wang et al. 2017, arXiv:1705.02315.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import images, manifest, tables

logger = logging.getLogger(__name__)

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
NO_FINDING = "No Finding"
CLASS_NAMES = {"frontal": (*FINDINGS, NO_FINDING)}
# An image may have several findings: independent sigmoids, not a softmax.
EXCLUSIVE = False
PREVIOUS = tuple(f"previous_{name}" for name in FINDINGS)
SOURCES = {
    "frontal": (
        "https://www.kaggle.com/datasets/nih-chest-xrays/data",
        "free use with attribution: Wang et al. 2017, arXiv:1705.02315",
    )
}
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
BOXES = "BBox_List_2017.csv"
LAYOUT = (
    "chest/Data_Entry_2017*.csv, chest/train_val_list.txt, chest/test_list.txt, perhaps chest/BBox_List_2017.csv, and "
    "the images in chest/images/*.png or in chest/images_001/images/*.png to chest/images_012/images/*.png"
)
# The tables last: a download that broke off is no set yet.
ARCHIVE_FOLDERS = {
    "frontal": {
        name: name
        for name in (
            *(f"images_{number:03d}" for number in range(1, 13)),
            BOXES,
            *LISTS.values(),
            "Data_Entry_2017.csv",
        )
    }
}
TABLES = (
    "Data_Entry_2017.csv",
    "Data_Entry_2017_v2020.csv",
    *LISTS.values(),
    BOXES,
    "README_CHESTXRAY.pdf",
    "FAQ_CHESTXRAY.pdf",
    "LOG_CHESTXRAY.pdf",
    "ARXIV_V5_CHESTXRAY.pdf",
)
MAX_AGE = 100  # years; older tables hold slips above it, up to 414
BOX_COLUMNS = ("study_id", "label", "x", "y", "width", "height")

# The columns that are read, each with its spellings; the sizes and spacings behind them split differently by version.
_SPELLINGS = {
    "image": ("Image Index",),
    "labels": ("Finding Labels",),
    "follow_up": ("Follow-up #",),
    "patient": ("Patient ID",),
    "age": ("Patient Age",),
    "sex": ("Patient Gender", "Patient Sex"),
    "view": ("View Position",),
}
_BOX_SPELLINGS = {"image": ("Image Index",), "label": ("Finding Label",)}
_BOX_LABELS = {**{name: name for name in FINDINGS}, "Infiltrate": "Infiltration"}
_AGE = re.compile(r"(\d+(?:\.\d*)?)([YMWD]?)")
_UNITS_A_YEAR = {"": 1.0, "Y": 1.0, "M": 12.0, "W": 365.25 / 7, "D": 365.25}
_BLANK = ("", "na", "nan", "n/a", "null", "none")


def folder(root) -> Path | None:
    """Return the folder of tables and images, `root/chest`, or None where no Data_Entry_2017*.csv lies in it."""
    home = Path(root) / "chest"
    return home if _find_entries(home) else None


def part_folder(root, part: str) -> Path:
    """Return the folder of a part: the one part lies in `root/chest` itself."""
    return Path(root) / "chest"


def read(root, part: str = "frontal") -> pd.DataFrame:
    """Read the images that are there into a manifest.

    Images that the table lists and no folder holds are left out, and one warning counts them: a partial download is a
    set. Their labels still stand in the PREVIOUS columns of later visits.

    Args:
        root: data root, the folder that holds `chest/`.
        part: "frontal", the only one.

    Returns:
        The rows of `read_table` whose image is there, without its column `present`.

    Raises:
        FileNotFoundError: no image that the table lists is there, or a table is absent.
        ValueError: unknown part, or see `read_table`.
    """
    if part not in CLASS_NAMES:
        raise ValueError(f"part {part!r} is unknown; known is {', '.join(CLASS_NAMES)}.")
    table = read_table(root)
    num_absent = int((~table["present"]).sum())
    if num_absent == len(table):
        raise FileNotFoundError(
            f"none of the {len(table):,} images listed lies under {part_folder(root, part)}; expected {LAYOUT}."
        )
    if num_absent:
        logger.warning(
            "%s of %s images listed are absent and were left out (a partial download)",
            f"{num_absent:,}",
            f"{len(table):,}",
        )
    return table[table["present"]].drop(columns="present").reset_index(drop=True)


def read_table(root) -> pd.DataFrame:
    """Read labels, patients, splits and earlier visits of all images, whether or not their files are there.

    `split` is the official one: train_val_list.txt is train, test_list.txt is test. The previous visit of an image is
    the row of the same patient with the next lower follow-up number, in the whole table; its findings stand in the
    PREVIOUS columns. On a first visit these are 0, and so is `has_previous`. Follow-up numbers give the order, not file
    names: in the table of 2020 no patient gets younger from one number to the next, but at 2,034 images in the order of
    names. The numbers count images and no table has dates: two images of one day are two visits.

    Args:
        root: data root, the folder that holds `chest/`.

    Returns:
        Manifest, a row an image in the table's order: the manifest's columns (patient_id = group_id: 8 digits as text;
        study_id: the file name without its suffix), view ("PA", "AP" or NaN), age (years, float; NaN: unknown, or over
        `MAX_AGE`), sex ("F", "M" or NaN), follow_up (int), the labels of `CLASS_NAMES["frontal"]` (1.0 and 0.0),
        has_previous (1.0 and 0.0), `PREVIOUS` (1.0 and 0.0) and present (bool: the image file is there).

    Raises:
        FileNotFoundError: Data_Entry_2017*.csv or one of the two lists is absent.
        ValueError: several Data_Entry_2017*.csv; columns missing; an image twice or in none or both of the lists; a
            label blank or unknown, or `No Finding` beside a finding; a patient or follow-up that is no number, or a
            follow-up that a patient has twice.
    """
    home = part_folder(root, "frontal")
    found = _find_entries(home)
    if not found:
        raise FileNotFoundError(f"no Data_Entry_2017*.csv in {home}; it holds the labels. Expected {LAYOUT}.")
    if len(found) > 1:
        raise ValueError(f"{home} holds {[path.name for path in found]}, which may differ; keep one of them.")
    path = found[0]
    cells = _read_cells(path, _SPELLINGS)
    names = cells["image"].tolist()
    if not names:
        raise ValueError(f"{path} lists no images.")
    if len(set(names)) < len(names):
        twice = cells["image"].duplicated().to_numpy()
        raise ValueError(
            f"{path} lists {int(twice.sum())} images that it has listed before; keep one row for each image. "
            f"First: {_first(names, twice)}."
        )
    labels = _read_labels(path, cells["labels"], names)
    patients = _whole_numbers(path, "Patient ID", cells["patient"], names)
    follow_ups = _whole_numbers(path, "Follow-up #", cells["follow_up"], names)
    previous, has_previous = _previous_visits(path, patients, follow_ups, labels[:, : len(FINDINGS)], names)
    numbers, codes = np.unique(patients, return_inverse=True)
    patient_ids = pd.array(np.array([f"{number:08d}" for number in numbers], dtype=object), dtype="str").take(codes)
    places = _find_images(home, names)
    present = np.array([name in places for name in names])
    facts = pd.DataFrame(
        {
            "image_path": [f"chest/{places.get(name, 'images')}/{name}" for name in names],
            "patient_id": patient_ids,
            "study_id": [_stem(name) for name in names],
            "group_id": patient_ids,
            "split": _read_splits(home, path, names),
            "view": _choices("view", cells["view"], ("PA", "AP")),
            "age": _ages(cells["age"]),
            "sex": _choices("sex", cells["sex"], ("F", "M")),
            "follow_up": follow_ups,
        }
    )
    table = pd.concat(
        [
            facts,
            pd.DataFrame(labels, columns=CLASS_NAMES["frontal"]),
            pd.DataFrame({"has_previous": has_previous}),
            pd.DataFrame(previous, columns=PREVIOUS),
            pd.DataFrame({"present": present}),
        ],
        axis=1,
    )
    return manifest.validate(table, CLASS_NAMES["frontal"], exclusive=EXCLUSIVE)


def read_boxes(root) -> pd.DataFrame:
    """Read the boxes that radiologists drew round findings; all lie on images of the official test list.

    Args:
        root: data root, the folder that holds `chest/`.

    Returns:
        DataFrame in the file's order: study_id, label (spelt as in `FINDINGS`: the file's "Infiltrate" is
        "Infiltration"), x, y (upper left corner), width and height, in pixels of the image file. No rows where
        BBox_List_2017.csv is absent.

    Raises:
        ValueError: other columns, an unknown label, or a box that is no four numbers or has no area.
    """
    path = part_folder(root, "frontal") / BOXES
    if not path.exists():
        return _lay_out_boxes([], [], np.empty((0, 4)))
    # The header's "Bbox [x,y,w,h]" splits on its commas: the numbers are known by their place, 2 to 5.
    cells = _read_cells(path, _BOX_SPELLINGS, also=range(2, 6))
    names = cells["image"].tolist()
    _refuse(
        path,
        "Finding Label",
        cells["label"],
        names,
        lambda value: value not in _BOX_LABELS,
        "is no known finding",
        f"known are {', '.join(_BOX_LABELS)}",
    )
    labels = [_BOX_LABELS[value.strip()] for value in cells["label"]]
    numbers = cells[[2, 3, 4, 5]].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    wrong = ~np.isfinite(numbers).all(axis=1) | ~(numbers[:, 2:] > 0).all(axis=1)
    if wrong.any():
        raise ValueError(
            f"{path} has {int(wrong.sum())} boxes that are not four numbers x, y, width and height with an area; mend "
            f"or remove these rows. First: {_first(names, wrong)}."
        )
    return _lay_out_boxes([_stem(name) for name in names], labels, numbers)


def _lay_out_boxes(study_ids: list[str], labels: list[str], numbers: np.ndarray) -> pd.DataFrame:
    texts = [pd.array(values, dtype="str") for values in (study_ids, labels)]
    return pd.DataFrame(dict(zip(BOX_COLUMNS, [*texts, *numbers.T])))


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _find_entries(home: Path) -> list[Path]:
    """Return the tables of labels in a folder: one, or what must be refused."""
    return sorted(home.glob("Data_Entry_2017*.csv"))


def _read_cells(path: Path, spellings: dict, also: Sequence[int] = ()) -> pd.DataFrame:
    """Read a CSV's named columns, and those at the positions `also`, as text; rows without any text are left out."""
    expected = f"the columns {', '.join(' or '.join(names) for names in spellings.values())}"
    header, rows = tables.read_rows(path, expected=expected)
    known = {
        key: next((name for name in names if name in header), " or ".join(names)) for key, names in spellings.items()
    }
    tables.check_columns(path, header, list(known.values()))
    places = {key: header.index(name) for key, name in known.items()} | {place: place for place in also}
    # A name or number that has a comma and no quotes is two cells: most rows, not the header, show how many there are.
    ((most, _),) = Counter(map(len, rows)).most_common(1) or [(0, 0)]
    fewest = max(places.values()) + 1
    tables.check_widths(path, rows, fewest, max(fewest, most))
    cells = {key: [row[place] for row in rows] for key, place in places.items()}
    for key, name in known.items():
        tables.check_length(path, name, cells[key])
    cells["image"] = [name.strip() for name in cells["image"]]
    cells = pd.DataFrame({key: pd.array(values, dtype="str") for key, values in cells.items()})
    unnamed = cells[cells["image"] == ""]
    if len(unnamed):
        filled = unnamed.apply(lambda column: column.str.strip() != "").any(axis=1)
        if filled.any():
            raise ValueError(
                f"{path} has {int(filled.sum())} rows without an image; write the file's name. "
                f"First rows: {(unnamed.index[filled][:3] + 1).tolist()}."
            )
        cells = cells.drop(index=unnamed.index).reset_index(drop=True)
    return cells


def _distinct(column: pd.Series) -> tuple[list[str], np.ndarray]:
    """Return a column's distinct texts, so that each is parsed once, and the position of each row's among them."""
    codes, values = pd.factorize(column)
    return [value.strip() for value in values], codes


def _first(names: Sequence[str], wrong: np.ndarray) -> list[str]:
    return [names[row] for row in np.flatnonzero(wrong)[:3]]


def _refuse(path: Path, column: str, cells: pd.Series, names: Sequence[str], is_wrong, what: str, mend: str) -> None:
    """Refuse the cells whose text `is_wrong`."""
    values, codes = _distinct(cells)
    wrong_values = np.array([is_wrong(value) for value in values], dtype=bool)
    if wrong_values.any():
        wrong = wrong_values[codes]
        shown = [value for value, is_so in zip(values, wrong_values) if is_so][:3]
        raise ValueError(
            f"{path}: {column} {what} in {int(wrong.sum())} of {len(wrong)} rows ({str(shown)[1:-1]}); {mend}. "
            f"First: {_first(names, wrong)}."
        )


def _read_labels(path: Path, cells: pd.Series, names: Sequence[str]) -> np.ndarray:
    """Return 1.0 and 0.0 in the order of the classes, shape (num_rows, 15)."""
    class_names = CLASS_NAMES["frontal"]

    def split(value):
        return {label.strip() for label in value.split("|")}

    for is_wrong, what, mend in (
        (lambda value: value.casefold() in _BLANK, "is blank", f"write {NO_FINDING!r} where there is none"),
        (
            lambda value: not split(value) <= set(class_names),
            "has unknown labels",
            f"known are {', '.join(class_names)}, joined by '|'",
        ),
        (
            lambda value: NO_FINDING in split(value) and len(split(value)) > 1,
            f"has findings beside {NO_FINDING!r}",
            "keep one of the two",
        ),
    ):
        _refuse(path, "Finding Labels", cells, names, is_wrong, what, mend)
    values, codes = _distinct(cells)
    return np.array([[float(name in split(value)) for name in class_names] for value in values])[codes]


def _whole_numbers(path: Path, column: str, cells: pd.Series, names: Sequence[str]) -> np.ndarray:
    """Parse whole numbers, also such as a spreadsheet writes ("3.0"): int64, shape (num_rows,)."""

    def digits(value):
        return value.removesuffix(".0")

    _refuse(
        path,
        column,
        cells,
        names,
        lambda value: not (digits(value).isdecimal() and len(digits(value)) < 19),
        "is no whole number",
        "write digits alone",
    )
    values, codes = _distinct(cells)
    return np.array([int(digits(value)) for value in values], dtype=np.int64)[codes]


def _ages(cells: pd.Series) -> np.ndarray:
    """Parse ages, in years or with a unit (058Y, 013M, 011D), as years; NaN where unknown; count the odd ones."""
    values, codes = _distinct(cells)
    found = [_AGE.fullmatch(value) for value in values]
    years = np.array([float(age[1]) / _UNITS_A_YEAR[age[2]] if age else np.nan for age in found])
    odd = np.array([value.casefold() not in _BLANK for value in values]) & ~(years <= MAX_AGE)
    if odd.any():
        logger.warning(
            "%d of %d ages are over %d years or no age, and count as unknown: %s",
            odd[codes].sum(),
            len(codes),
            MAX_AGE,
            [value for value, is_so in zip(values, odd) if is_so][:5],
        )
    return np.where(odd, np.nan, years)[codes]


def _choices(column: str, cells: pd.Series, known: Sequence[str]):
    """Return the texts that are one of the known spellings, NaN for others; count these but blank ones."""
    values, codes = _distinct(cells)
    texts = pd.array([value if value in known else None for value in values], dtype="str")
    odd = np.array([value not in known and value.casefold() not in _BLANK for value in values], dtype=bool)
    if odd.any():
        logger.warning(
            "%d of %d cells of %s are none of %s and count as unknown: %s",
            odd[codes].sum(),
            len(codes),
            column,
            ", ".join(known),
            [value for value, is_so in zip(values, odd) if is_so][:5],
        )
    return texts.take(codes)


def _read_splits(home: Path, table: Path, names: Sequence[str]) -> list[str]:
    """Return each image's split by the official lists."""
    listed = {}
    for split, name in LISTS.items():
        if not (home / name).exists():
            raise FileNotFoundError(
                f"{home / name} is absent; the official split wants {' and '.join(LISTS.values())} beside "
                f"{table.name}. Both come with the set: {SOURCES['frontal'][0]}."
            )
        text = tables.read_text(home / name, expected="the name of an image in each line")
        listed[split] = {line.strip() for line in text.splitlines()} - {""}
    train, test = listed["train"], listed["test"]
    both = sorted(train & test)
    if both:
        raise ValueError(
            f"{len(both)} images are in {' and in '.join(LISTS.values())} of {home}; keep each in one. "
            f"First: {both[:3]}."
        )
    splits = ["train" if name in train else "test" if name in test else "" for name in names]
    without = np.array(splits) == ""
    if without.any():
        raise ValueError(
            f"{table} has {int(without.sum())} of {len(names)} images that are neither in "
            f"{' nor in '.join(LISTS.values())}; add them to one. First: {_first(names, without)}."
        )
    surplus = sorted((train | test).difference(names))
    if surplus:
        logger.warning("%d images of the official lists are not in %s: %s", len(surplus), table.name, surplus[:3])
    return splits


def _find_images(home: Path, names: Sequence[str]) -> dict[str, str]:
    """Map the names of image files to their folders below `home`; one listing a folder, as a query a file is slow."""
    places, again = {}, []
    for place in ("images", *(f"{path.name}/images" for path in sorted(home.glob("images_*")))):
        if not (home / place).is_dir():
            continue
        with os.scandir(home / place) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or not name.lower().endswith(images.SUFFIXES) or entry.is_dir(follow_symlinks=False):
                    continue
                if name in places:
                    again.append(f"{place}/{name}")
                else:
                    places[name] = place
    surplus = sorted(places.keys() - set(names))
    if surplus:
        logger.warning("%d image files are not in the table and were left out: %s", len(surplus), surplus[:3])
    if again:
        logger.warning("%d image files lie in an earlier folder too and were left out: %s", len(again), again[:3])
    return places


def _previous_visits(path, patients, follow_ups, findings, names) -> tuple[np.ndarray, np.ndarray]:
    """Return the findings of each image's previous visit, 0 on first visits, and whether there is one (1.0, 0.0)."""
    order = np.lexsort((follow_ups, patients))
    same = patients[order][1:] == patients[order][:-1]
    twice = np.zeros(len(order), dtype=bool)
    twice[order[1:]] = same & (follow_ups[order][1:] == follow_ups[order][:-1])
    if twice.any():
        raise ValueError(
            f"{path} gives {int(twice.sum())} images a patient and follow-up number that another image has; which came "
            f"before is then unknown. Number the visits of a patient apart. First: {_first(names, twice)}."
        )
    later, earlier = order[1:][same], order[:-1][same]
    previous, has_previous = np.zeros_like(findings), np.zeros(len(order))
    previous[later], has_previous[later] = findings[earlier], 1.0
    return previous, has_previous
