"""Damaged tables: small trees in the real layouts, each with one stated damage; `corpus_layouts` has those of folders.

`plant` writes the sound trees; `of_tables` lists damages, each with what must come of it; `look` reads one and says
what came of it, or raises AssertionError where that is not what must.
"""

import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kerasmed import audit, datasets
from kerasmed.datasets import brain, chest, lumbar, tritask

RIGHT, REFUSED, ASIDE = "read right", "refused with a reason", "set aside with a reason"
SEED = 0
_SIZES = {
    "brain": {"patients_per_class": 3, "slices_per_patient": 1, "image_size": (64, 64)},
    "chest": {"patients": 20, "image_side": 48},
    "lumbar": {"studies": 10, "image_side": (48, 50)},
    "mura": {"patients": 40, "image_side": (64, 70)},
    "tritask": {"train_images": 12, "valid_images": 10, "test_images": 10},
}


class Case(NamedTuple):
    """One damage to one tree."""

    kind: str  # the class that it is counted in
    tree: str  # which tree it befalls
    damage: Callable[[Path], None]  # of the tree's root
    read: Callable[[Path], pd.DataFrame]
    outcome: str
    says: str = ""  # regular expression that the error, or the note of what is set aside, must have
    name: str = ""  # file, folder or column that the error must name
    expect: Callable[[pd.DataFrame], pd.DataFrame] | None = None  # of the sound table: the right one, else the same


class Table(NamedTuple):
    """A table that a reader reads, and what a cell of it may hold."""

    tree: str
    path: str
    read: Callable[[Path], pd.DataFrame]
    needed: tuple[str, ...]
    key: tuple[str, ...]  # columns that name a row
    has_places: bool = False  # whether columns behind the needed ones are known by their place


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values(list(frame.columns), kind="stable").reset_index(drop=True)


def read_manifest(root: Path) -> pd.DataFrame:
    _, table, class_names, _ = audit.index(root / "set/m.csv")
    return table[["image_path", "patient_id", "study_id", "group_id", "split", *class_names]]


def read_patients(root: Path) -> pd.DataFrame:
    return brain.read(root, "alzheimer")


TABLES = (
    Table("tritask", "tritask/train_labels.csv", tritask.read, ("id", "label1", "label2", "label3"), ("id",)),
    Table("tritask", "tritask/val_labels.csv", tritask.read, ("id", "label1", "label2", "label3"), ("id",)),
    Table(
        "tritask", "tritask/sample_submission.csv", tritask.read_sample, ("id", "label1", "label2", "label3"), ("id",)
    ),
    Table("lumbar", "lumbar/train.csv", lumbar.read_studies, ("study_id", *lumbar.TARGETS), ("study_id",)),
    Table(
        "lumbar",
        "lumbar/train_series_descriptions.csv",
        lumbar.read,
        ("study_id", "series_id", "series_description"),
        ("study_id", "series_id"),
    ),
    Table(
        "lumbar",
        "lumbar/train_label_coordinates.csv",
        lumbar.read_coordinates,
        ("study_id", "series_id", "instance_number", "condition", "level", "x", "y"),
        (),
    ),
    Table(
        "chest",
        "chest/Data_Entry_2017_v2020.csv",
        chest.read_table,
        (
            "Image Index",
            "Finding Labels",
            "Follow-up #",
            "Patient ID",
            "Patient Age",
            "Patient Gender",
            "View Position",
        ),
        ("Image Index",),
        has_places=True,
    ),
    Table("chest", "chest/BBox_List_2017.csv", chest.read_boxes, ("Image Index", "Finding Label"), (), has_places=True),
    Table("brain", "brain/alzheimer/patients.csv", read_patients, ("image_path", "patient_id"), ("image_path",)),
    Table("manifest", "set/m.csv", read_manifest, ("image_path",), ("image_path",)),
)


# --- trees -----------------------------------------------------------------------------------------------------------


def plant(folder: Path) -> dict[str, Path]:
    """Write the sound trees below a folder: name -> root."""
    roots = {}
    for system, options in _SIZES.items():
        roots[system] = datasets.write_synthetic(system, folder / system, seed=SEED, **options)
        for name in datasets.SYNTHETIC_FILES:
            (roots[system] / system / name).unlink()  # as if real
    home = roots["brain"] / "brain/alzheimer"
    paths = sorted(path.relative_to(home).as_posix() for path in home.rglob("*.jpg"))
    lines = ["image_path,patient_id,note", *(f"{path},P{row // 2:02d},n" for row, path in enumerate(paths))]
    (home / "patients.csv").write_text("\n".join([*lines, ""]))
    roots["manifest"] = folder / "manifest"
    shutil.copytree(home, roots["manifest"] / "set/images", ignore=shutil.ignore_patterns("*.csv"))
    lines = ["image_path,patient_id,split,label,age"]
    lines += [
        f"images/{path},P{row // 2:02d},{path.split('/')[0]},{path.split('/')[1]},6{row % 10}"
        for row, path in enumerate(paths)
    ]
    (roots["manifest"] / "set/m.csv").write_text("\n".join([*lines, ""]))
    return roots


def excerpt(real: Path, folder: Path, num_patients: int = 40) -> Path:
    """Write the rows of some patients of the real chest tables, and of the official lists, as a tree of its own."""
    home = folder / "chest"
    (home / "images").mkdir(parents=True)
    (source,) = (real / "chest").glob("Data_Entry_2017*.csv")
    header, *lines = source.read_text().splitlines()
    boxes = (real / "chest/BBox_List_2017.csv").read_text().splitlines()
    boxed = {line.split(",")[0][:8] for line in boxes[1:40]}
    known = sorted({line[:8] for line in lines[:2000]})
    chosen = {*np.random.default_rng(SEED).choice(known, num_patients, replace=False), *sorted(boxed)[:5]}
    lines = [line for line in lines if line[:8] in chosen][:200]
    names = {line.split(",")[0] for line in lines}
    (home / source.name).write_text("\n".join([header, *lines, ""]))
    for name in chest.LISTS.values():
        listed = (real / "chest" / name).read_text().splitlines()
        (home / name).write_text("\n".join(line for line in listed if line in names))
    found = [line for line in boxes[1:] if line.split(",")[0] in names]
    (home / "BBox_List_2017.csv").write_text("\n".join([boxes[0], *found, ""]))
    return folder


def copy(root: Path, target: Path) -> Path:
    """Copy a tree; its images are links to the same bytes, as no damage changes those."""
    return shutil.copytree(root, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    if source.endswith((".csv", ".txt")):
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


# --- damages ---------------------------------------------------------------------------------------------------------


def edit(path: str, change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def damage(root):
        content = change((root / path).read_text(encoding="utf-8"))
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    damage.only = path  # the one file that it touches
    return damage


def by_lines(change: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    return lambda text: "\n".join([*change(text.splitlines()), ""])


def by_cells(change: Callable[[pd.DataFrame], pd.DataFrame], quoting: int = 0) -> Callable[[str], str]:
    """A change of cells, as text; commas of a header without quotes make columns of their own, whatever their names."""

    def call(text):
        rows = pd.read_csv(io.StringIO(text), header=None, dtype=str, keep_default_na=False, names=_places(text))
        frame = rows[1:].set_axis(_unique(rows.iloc[0]), axis=1)
        return change(frame).rename(columns=lambda name: name.split("\t")[0]).to_csv(index=False, quoting=quoting)

    return call


def _places(text: str) -> range:
    return range(max(line.count(",") for line in text.splitlines()) + 1)


def _unique(names) -> list[str]:
    return [
        name if name and name not in list(names)[:place] else f"{name}\t{place}" for place, name in enumerate(names)
    ]


def _cell(table: Table, column: str, value: str, row: int = 1) -> Callable[[Path], None]:
    def change(frame):
        frame = frame.copy()
        frame.iloc[row, frame.columns.get_loc(column)] = value
        return frame

    return edit(table.path, by_cells(change))


def table_of(path: str) -> Table:
    (table,) = [table for table in TABLES if table.path == path]
    return table


def replaced(path: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(root):
        (root / path).unlink()
        make(root / path)

    damage.only = path
    return damage


def harmless(table: Table) -> Iterator[Case]:
    """What must not matter: the table is read as if nothing had befallen it."""
    text_changes = {
        "byte order mark": lambda text: "\ufeff" + text,
        "CRLF": lambda text: text.replace("\n", "\r\n"),
        "CR alone": lambda text: text.replace("\n", "\r"),
        "no end of the last line": lambda text: text.rstrip("\n"),
        "blank lines at the start": lambda text: "\n \n" + text,
        "blank lines in the middle": by_lines(lambda lines: [*lines[:3], "", "  ", "", *lines[3:]]),
        "blank lines at the end": lambda text: text + "\n\n  \n",
        "rows of commas alone": by_lines(lambda lines: [*lines[:2], ",,", *lines[2:], ",,,"]),
        "a comma at the end of each line": by_lines(lambda lines: [f"{line}," for line in lines]),
        "spaces round cells": by_lines(lambda lines: [line.replace(",", " , ") for line in lines]),
        "quotes round all cells": by_cells(lambda frame: frame, quoting=1),
        "unsorted rows": by_lines(lambda lines: [lines[0], *np.random.default_rng(SEED).permutation(lines[1:])]),
    }
    if not table.has_places:
        text_changes |= {
            "columns in another order": by_cells(lambda frame: frame[frame.columns[::-1]]),
            "a further column": by_cells(lambda frame: frame.assign(note="x, \n y")),
            "a column twice that is not read": by_cells(lambda frame: frame.assign(**{"note a": "1", "note b": "2"})),
            "a column without a name, as of row numbers": by_cells(
                lambda frame: frame.rename_axis(None).assign(**{"\tn": [str(row) for row in range(len(frame))]})
            ),
        }
    if table.path == "tritask/sample_submission.csv":  # a form to hand in: its columns and their order count
        text_changes = {kind: change for kind, change in text_changes.items() if "column" not in kind}
    for kind, change in text_changes.items():
        yield Case(kind, table.tree, edit(table.path, change), table.read, RIGHT)


def harmful(table: Table) -> Iterator[Case]:
    """What no table may have: each is refused with the file's name, what was found and the mend."""
    column = table.needed[-1]
    changes = {
        "UTF-16": (lambda text: text.encode("utf-16"), "not in UTF-8 .*; save it as a CSV in UTF-8"),
        "UTF-16 without its mark": (lambda text: text.encode("utf-16-le"), "NUL bytes.* in UTF-16; .*in UTF-8"),
        "Latin-1 with umlauts": (
            lambda text: text.replace("\n", ",Schädel\n", 1).encode("latin-1"),
            "not in UTF-8 .byte 0xe4 in line 1.; save it",
        ),
        "bytes that are no UTF-8": (
            lambda text: text.encode()[:-30] + b"\xc3\x28" + text.encode()[-30:],
            "not in UTF-8 .byte 0xc3 in line .*; save it",
        ),
        "a NUL byte": (lambda text: f"{text[:-20]}\0{text[-20:]}", "1 NUL bytes, the first in line .*get it again"),
        "the header twice": (
            by_lines(lambda lines: [*lines[:3], lines[0], *lines[3:]]),
            "line 4, repeats the line of column names; keep the first",
        ),
        "an empty file": (lambda text: "", "is empty; write "),
        "blank lines alone": (lambda text: "\n\n,,\n", "is empty; write "),
        "a needed column twice": (
            by_cells(lambda frame: frame.assign(**{f"{column}\tagain": frame[column]})),
            "twice; rename or remove one",
        ),
        "semicolons for commas": (
            lambda text: text.replace(",", ";"),
            "lacks the columns .*: separate columns by commas, not by ';'",
        ),
        "tabs for commas": (lambda text: text.replace(",", "\t"), r"separate columns by commas, not by '\\t'"),
        "a quote that is never closed": (
            by_lines(lambda lines: [*lines[:2], f'"{lines[2]}', *lines[3:]]),
            "no readable CSV: line .*Close every quote",
        ),
        "a cell of 2,000 characters": (
            by_cells(lambda frame: frame.assign(**{table.needed[0]: ["x" * 2000, *frame[table.needed[0]][1:]]})),
            "line 2: a cell of 2,000 characters in column .*; expected at most 1,000",
        ),
        "a cell of 200,000 characters": (
            by_lines(lambda lines: [lines[0], "x" * 200_000 + lines[1], *lines[2:]]),
            "line 2: field larger than field limit",
        ),
        "one line of 10 MB": (lambda text: "x," * 5_000_000, "lacks the columns .* and [0-9]+ more"),
        "one cell of 10 MB": (lambda text: "x" * 10_000_000, "line 1: field larger than field limit"),
        "a row cut off": (
            by_lines(lambda lines: [*lines[:-1], lines[-1].split(",")[0]]),
            "1 of .* rows have fewer than .*Complete a row that is cut off",
        ),
        "text beyond the last column": (
            by_lines(lambda lines: [*lines[:2], f"{lines[2]},5,7,9", *lines[3:]]),
            "1 of .* rows have .*, or more than .*put quotes round a cell with a comma",
        ),
    }
    for kind, (change, says) in changes.items():
        yield Case(kind, table.tree, edit(table.path, change), table.read, REFUSED, says, Path(table.path).name)
    for name in table.needed:
        damage = edit(table.path, by_cells(lambda frame, name=name: frame.rename(columns={name: "other"})))
        says = rf"lacks the columns \[.*{re.escape(name)}.*\]; it has "
        yield Case("a needed column missing", table.tree, damage, table.read, REFUSED, says, Path(table.path).name)
    if table.key:
        damage = edit(table.path, by_lines(lambda lines: [*lines, lines[1]]))
        says = "keep one|more than one|is not unique|two patients"
        if table.tree == "brain":  # the same patient twice contradicts nothing
            yield Case("a row twice that says the same", table.tree, damage, table.read, RIGHT)
        else:
            yield Case("an id twice", table.tree, damage, table.read, REFUSED, says, _named(table))
    for kind, make, says in (
        ("a folder in place of a table", Path.mkdir, "is a folder; put a file there|is neither"),
        ("a pipe in place of a table", os.mkfifo, "is no regular file; put a file there"),
    ):
        if table.tree == "manifest" and make is Path.mkdir:
            continue  # a folder is audited as one
        yield Case(kind, table.tree, replaced(table.path, make), table.read, REFUSED, says, Path(table.path).name)
    broken = replaced(table.path, lambda path: path.symlink_to("nowhere"))
    if table.path.endswith(("BBox_List_2017.csv", "sample_submission.csv", "patients.csv")):
        return  # these may be absent
    yield Case(
        "a link to nothing in place of a table",
        table.tree,
        broken,
        table.read,
        REFUSED,
        "is absent|does not exist",
        Path(table.path).name,
    )


def _named(table: Table) -> str:
    return "image_path" if table.tree == "manifest" else Path(table.path).name


def header_alone() -> Iterator[Case]:
    """Tables of column names without rows."""
    says = {
        "tritask/train_labels.csv": "no row for 12 of 12 images",
        "tritask/val_labels.csv": "no row for 10 of 10 images",
        "tritask/sample_submission.csv": "has no rows; expected one for each test image",
        "lumbar/train.csv": "no series of lumbar under",
        "lumbar/train_series_descriptions.csv": "no series of lumbar under .*train_series_descriptions.csv",
        "chest/Data_Entry_2017_v2020.csv": "lists no images",
        "brain/alzheimer/patients.csv": "gives no patient for",
        "set/m.csv": "manifest has no rows",
    }
    for path, text in says.items():
        table = table_of(path)
        damage = edit(path, by_lines(lambda lines: lines[:1]))
        name = "train_images" if path == "lumbar/train.csv" else Path(path).name
        yield Case("column names without rows", table.tree, damage, table.read, REFUSED, text, name)
    for path in ("chest/BBox_List_2017.csv", "lumbar/train_label_coordinates.csv"):
        table = table_of(path)
        damage = edit(path, by_lines(lambda lines: lines[:1]))
        yield Case("column names without rows", table.tree, damage, table.read, RIGHT, expect=lambda sound: sound[:0])


def cells() -> Iterator[Case]:
    """Values that no cell may hold, or that are read in one stated way."""
    label, numbers, labels = "a label that is none", "a number that is none", "labels that contradict"
    for path in ("tritask/train_labels.csv", "tritask/val_labels.csv"):
        table = table_of(path)
        for value in (
            "2",
            "-1",
            "yes",
            "0.5",
            "1,5",
            "inf",
            "1e400",
            "nan",
            "9" * 400,
            "True",
            "=cmd|' /C calc'!A0",
            "٣",
        ):
            yield refused(label, table, "label2", value, "1 labels other than 0 and 1; write 1 for present")
        yield refused("a blank label", table, "label1", "  ", "1 blank labels; write 1 or 0")
        yield refused("a blank id", table, "id", "", "1 rows without an id; write the image's file name")
        for value in ("../up.png", "/etc/passwd.png", "C:\\x.png", "~/x.png"):
            yield refused("an id that leads elsewhere", table, "id", value, "no row for 1 of|leaves the data root")
        damage = edit(path, by_lines(lambda lines: [*lines, f"{lines[1].split(',')[0]},0,0,0"]))
        yield Case(labels, "tritask", damage, table.read, REFUSED, "1 rows whose id is given before", Path(path).name)
        for kind, write in (("numbers as 1.0", "{}.0"), ("numbers with spaces", " {} ")):
            damage = edit(
                path, by_cells(lambda frame, write=write: frame.assign(label1=frame["label1"].map(write.format)))
            )
            yield Case(kind, "tritask", damage, table.read, RIGHT)
        damage = edit(path, by_cells(lambda frame: frame.assign(id=frame["id"].str.removesuffix(".png"))))
        yield Case("ids without their suffix", "tritask", damage, table.read, RIGHT)
    grades, described, points = (
        table_of(f"lumbar/{name}.csv") for name in ("train", "train_series_descriptions", "train_label_coordinates")
    )
    for value in ("Mild", "normal/mild", "3", "=cmd|' /C calc'!A0", "Severe|Moderate"):
        yield refused(label, grades, lumbar.TARGETS[3], value, "values are not one of Normal/Mild, .* Correct them")
        yield refused(label, described, "series_description", value, "values are not one of Sagittal T1, ")
        yield refused(label, points, "level", value, "values are not one of L1/L2")
        yield refused(label, points, "condition", value, "values are not one of Spinal Canal")
    for value in ("1,5", "1.0", "-7", "", "inf", "x", "0x10", "³"):
        for table, column in ((grades, "study_id"), (described, "series_id"), (points, "instance_number")):
            yield refused(numbers, table, column, value, "1 of .* values are not a whole number. Correct them")
    for value in ("1,5", "inf", "-inf", "1e400", "nan", "", "x", "1 2"):
        yield refused(numbers, points, "x", value, "1 of .* values are not a number. Correct them")
    yield refused("an id too large", points, "instance_number", "9" * 30, "not a number of at most 18 digits")
    for table in (grades, described):
        damage = edit(table.path, by_lines(lambda lines: [*lines, lines[1].rpartition(",")[0] + ","]))
        yield Case(labels, "lumbar", damage, table.read, REFUSED, "twice 1 times; keep one", Path(table.path).name)
    entries, boxes = table_of("chest/Data_Entry_2017_v2020.csv"), table_of("chest/BBox_List_2017.csv")
    for value in ("Mas", "mass", "Mass|", "|", "Mass;Nodule", "=cmd|' /C calc'!A0", "1"):
        yield refused(label, entries, "Finding Labels", value, "has unknown labels in 1 of .*known are Atelectasis")
        yield refused(label, boxes, "Finding Label", value, "is no known finding in 1 of .*known are Atelectasis")
    yield refused(labels, entries, "Finding Labels", "No Finding|Mass", "has findings beside 'No Finding'.*keep one")
    for value in ("", "NA", "nan", " "):
        yield refused("a blank label", entries, "Finding Labels", value, "is blank in 1 of .*write 'No Finding'")
    for column in ("Patient ID", "Follow-up #"):
        for value in ("1,5", "-1", "x", "inf", "1e400", "9" * 19, "", "³"):
            yield refused(numbers, entries, column, value, "is no whole number in 1 of .*write digits alone")
    yield refused("a blank id", entries, "Image Index", "", "1 rows without an image; write the file's name")
    for value in ("../up.png", "/etc/x.png", "x/../../y.png", "C:\\x.png"):
        yield refused("an id that leads elsewhere", entries, "Image Index", value, "neither in .* add them to one")
    for place in (2, 3, 4, 5):
        for value in ("", "x", "inf", "1e400", "1,5"):
            yield _box(place, value)
    yield _box(4, "-5")
    yield _box(5, "0")
    damage = edit(entries.path, by_cells(lambda frame: frame.assign(**{"Patient ID": frame["Patient ID"] + ".0"})))
    yield Case("numbers as 1.0", "chest", damage, entries.read, RIGHT)
    damage = edit(
        entries.path, by_cells(lambda frame: frame.assign(**{"Patient Age": frame["Patient Age"].map(_in_years)}))
    )
    yield Case("ages as 058Y", "chest", damage, entries.read, RIGHT)
    for value in ("-3", "414", "058X", "old", "inf", "9" * 400, "5,5"):
        yield Case(
            "an age that is none",
            "chest",
            _cell(entries, "Patient Age", value),
            entries.read,
            ASIDE,
            "1 of|ages are over 100 years or no age, and count as unknown",
            expect=_without("age"),
        )
    for column, name, value in (("Patient Gender", "sex", "female"), ("View Position", "view", "LL")):
        yield Case(
            "a sex or view that is none",
            "chest",
            _cell(entries, column, value),
            entries.read,
            ASIDE,
            f"1 of .* cells of {name} are none of",
            expect=_without(name),
        )


def _in_years(age: str) -> str:
    return f"{int(age):03d}Y"


def refused(kind: str, table: Table, column: str, value: str, says: str) -> Case:
    return Case(kind, table.tree, _cell(table, column, value), table.read, REFUSED, says, _named(table))


def _without(column: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """The sound table with the second row's value unknown."""
    return lambda sound: sound.assign(**{column: sound[column].where(np.arange(len(sound)) != 1)})


def _box(place: int, value: str) -> Case:
    table = table_of("chest/BBox_List_2017.csv")

    def change(frame):
        frame = frame.copy()
        frame.iloc[1, place] = value
        return frame

    says = "1 boxes that are not four numbers .*; mend or remove these rows"
    return Case(
        "a box that is none", "chest", edit(table.path, by_cells(change)), table.read, REFUSED, says, "BBox_List"
    )


def of_tables() -> list[Case]:
    """List the damages to the tables themselves, the same at every call."""
    found = [case for table in TABLES for make in (harmless, harmful) for case in make(table)]
    return [*found, *header_alone(), *cells()]


# --- looking ---------------------------------------------------------------------------------------------------------


class _Notes(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def read_with_notes(read: Callable[[Path], pd.DataFrame], root: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read, and collect the package's warnings."""
    notes, logger = _Notes(), logging.getLogger("kerasmed")
    logger.addHandler(notes)
    try:
        return read(root), notes.lines
    finally:
        logger.removeHandler(notes)


def look(case: Case, root: Path, sound: pd.DataFrame, usual: list[str]) -> str:
    """Read a damaged tree and say what came of it; raises AssertionError where that is not what must.

    Args:
        case: whose damage the tree has.
        root: of the tree.
        sound: what the sound tree is read as.
        usual: the warnings of the sound tree.
    """
    try:
        found, notes = read_with_notes(case.read, root)
    except (ValueError, OSError) as error:
        known = (ValueError, FileNotFoundError, PermissionError)
        assert type(error) in known, f"a bare {type(error).__name__}: {error}"
        assert case.outcome == REFUSED, f"refused: {error}"
        text = str(error)
        assert len(text) < 5000, f"an error of {len(text)} characters"
        assert case.name in text, f"does not name {case.name}: {text}"
        assert re.search(case.says, text, re.DOTALL), f"does not say {case.says!r}: {text}"
        return REFUSED
    assert case.outcome != REFUSED, "read without a word"
    more = [note for note in notes if note not in usual]
    if case.outcome == ASIDE:
        assert any(re.search(case.says, note) for note in more), f"does not say {case.says!r}: {more}"
        if case.expect is None:
            return ASIDE
    expected = case.expect(sound) if case.expect else sound
    if case.kind == "unsorted rows":
        found, expected = _sorted(found), _sorted(expected)
    pd.testing.assert_frame_equal(found, expected)
    return case.outcome
