"""`kerasmed predict lumbar`: raw series of MRI, study by study, with the table that says what each series shows."""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kerasmed import embeddings, runs, saved_models, series
from kerasmed import progress as bars
from kerasmed.datasets import lumbar as data
from kerasmed.embeddings import Features
from kerasmed.systems.lumbar.embedded import encode_series
from kerasmed.systems.lumbar.fused import SHORT
from kerasmed.systems.lumbar.shared import MODALITIES, TARGETS

_AT_ONCE = 16  # studies: what they take, in memory and in the temporary folder, is bounded
_NAMED_FILES = 3  # of a series: a reason stands in each of a study's 25 rows
_TABLE = "*series_descriptions.csv"
_TOLD = [f"p_{grade}" for grade in data.GRADES]
_WANTED = (
    "a folder of studies (<study>/<series>/<instance>.dcm), one such study, or a folder with studies in train_images/, "
    "test_images/ or images/"
)


class Study(NamedTuple):
    """A study that was found, and what there is to say of it before any file is read."""

    study_id: str
    path: str  # relative to the root, "/" between folders
    series: list[tuple[str, str]]  # (series_id, modality), in the order of training
    reasons: list[str]  # why series of it are left out


def predict(run: Path, path, *, progress: bool = True) -> pd.DataFrame:
    """Grade studies with the network that a run chose, reading series as its training did.

    `path` is a folder of studies, `<study>/<series>/<instance>.dcm`; one such study; or a folder that holds
    train_images, test_images or images with studies in it. What a series shows is looked up by study and series id in
    train_series_descriptions.csv and test_series_descriptions.csv, which lie beside the studies, in the folder above
    or, of one study, in itself; the nearest folder that has one counts, and where it has both, the rows of both.

    Several series of a modality follow one another by id. Studies are worked through a few at a time, in a temporary
    folder that is removed.

    Args:
        run: a complete run folder of 03_lumbar_fusion.
        path: see above.
        progress: show a bar.

    Returns:
        DataFrame, a row a study and target, studies in the order of their numbers: row_id, normal_mild, moderate,
        severe, as `kerasmed.datasets.lumbar.submission` has them (NaN for a study that cannot be answered), study_path
        (relative to `path`; its own name where it is `path`), modalities (those that the answer is made of, such as
        "t1 + axial") and error: "", or which files or series are not in the answer and why.

    Raises:
        FileNotFoundError: no series below `path`, no table beside them, or a run of another kind.
        ValueError: a table lacks columns, has ids that are no numbers, or contradicts another.
    """
    run = Path(run)
    absent = [name for name in ("model.keras", "encoder.keras", "answers.json") if not (run / name).exists()]
    if absent:
        raise FileNotFoundError(f"{run} has no {', '.join(absent)}; expected a complete run of 03_lumbar_fusion.")
    root, studies = gather(path)
    chosen = runs.read_json(run / "answers.json")
    model, encoder = (saved_models.read(run / name, compile=False) for name in ("model.keras", "encoder.keras"))
    answers = []
    with bars.bar(len(studies), "predict", unit="study", shown=progress, file=sys.stderr) as bar:
        for first in range(0, len(studies), _AT_ONCE):
            asked = studies[first : first + _AT_ONCE]
            answers += _answer(model, encoder, chosen, root, asked)
            bar.update(len(asked))
    return _lay_out(studies, answers)


# --- what is there ---------------------------------------------------------------------------------------------------


def gather(path) -> tuple[Path, list[Study]]:
    """Find studies and their series, without opening a file of them; see `predict` for what is looked for.

    A study that lies in two folders, as the competition's example of a test does, is taken from the first by name.

    Args:
        path: the folder.

    Returns:
        The folder that the studies' paths are relative to, and the studies in the order of their numbers.

    Raises:
        As `predict`.
    """
    start = Path(os.path.abspath(path))
    if not start.is_dir():
        raise FileNotFoundError(f"{path} is no folder; expected {_WANTED}.")
    root, listed, levels = _look(start)
    # As it was named and as it is: a big set may be linked to from elsewhere, under either name.
    beside = [place for each in (start, start.resolve()) for place in (each, *each.parents[:levels])]
    studies: dict[str, Study] = {}
    for home, of_home in listed.items():
        described, source = read_tables([root / home, *beside] if home else beside)
        for name, (found, refused) in of_home.items():
            rows = described.get(name, {})
            if not (found or refused or rows):
                continue  # a folder of something else
            study = _describe(name, f"{home}{name}", found, refused, rows, source)
            if name in studies:
                studies[name].reasons.append(f"{study.path}: left out, for it is read from {studies[name].path}")
            else:
                studies[name] = study
    return root, sorted(studies.values(), key=lambda study: series.natural(study.study_id))


def _look(start: Path) -> tuple[Path, dict[str, dict[str, tuple[list[str], str]]], int]:
    """What studies are relative to; of each folder of studies `_list` of each; how far above a table may lie."""
    images = [name for name in _folders(start) if name == "images" or name.endswith("_images")]
    whole = start.resolve()
    for root, homes, levels in (
        (start, {f"{name}/": _folders(start / name) for name in images}, 0),
        (start, {"": _folders(start)}, 1),
        (whole.parent, {"": [whole.name]}, 2),
    ):
        listed = {home: {name: _list(root / home, name) for name in names} for home, names in homes.items()}
        if any(found for of_home in listed.values() for found, _ in of_home.values()):
            return root, listed, levels
    raise FileNotFoundError(f"there is no series below {start}: no folder of .dcm files; expected {_WANTED}.")


def read_tables(folders: Sequence[Path]) -> tuple[dict[str, dict[str, str]], str]:
    """Read the tables that describe series from the first folder that has some.

    Returns:
        study_id -> series_id -> description, and the tables' names.

    Raises:
        FileNotFoundError: none of the folders has a table.
        ValueError: as of `kerasmed.datasets.lumbar.read_descriptions`, or two tables contradict one another.
    """
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        paths = sorted(path for path in folder.glob(_TABLE) if path.name[0] != ".")
        if paths:
            break
    else:
        raise FileNotFoundError(
            f"there is no table {_TABLE} in {' or '.join(map(str, folders))}, and no DICOM header is asked which "
            f"modality a series is. Put one there, with a row a series, such as\n"
            f"    study_id,series_id,series_description\n    44036939,2828203845,{MODALITIES[0]}\n"
            f"where series_description is one of {', '.join(MODALITIES)}."
        )
    table = pd.concat([data.read_descriptions(path) for path in paths]).drop_duplicates()
    names = " and ".join(path.name for path in paths)
    twice = table[table.duplicated(["study_id", "series_id"])]
    if len(twice):
        first = (twice["study_id"] + "/" + twice["series_id"]).tolist()
        raise ValueError(
            f"{names} in {folder} describe {len(first)} series differently; correct one of them. First: {first[:3]}."
        )
    of_study = table.groupby("study_id", sort=False)
    return {study: dict(zip(rows["series_id"], rows["modality"])) for study, rows in of_study}, names


def _folders(path: Path) -> list[str]:
    """Names of the visible folders of a folder, in natural order."""
    return sorted((each.name for each in path.iterdir() if each.name[0] != "." and each.is_dir()), key=series.natural)


def _list(home: Path, study: str) -> tuple[list[str], str]:
    """Names of a study's series in natural order, and why it cannot be looked into."""
    try:
        return sorted((name for _, name in data.list_series(home, [study])), key=series.natural), ""
    except OSError as error:  # of one study, which must not stop the others
        return [], f"{type(error).__name__}: {error.strerror}"


def _describe(name, path, found, refused, described: Mapping[str, str], source: str) -> Study:
    reasons = [f"{path}: {refused}"] if refused else []
    for each in found:
        if each not in described:
            reasons.append(f"{path}/{each}: not described by {source}")
        elif described[each] not in MODALITIES:
            reasons.append(f"{path}/{each}: described as {described[each]!r}, none of {', '.join(MODALITIES)}")
    absent = sorted((each for each in described if each not in found and not refused), key=series.natural)
    reasons += [f"{path}/{each}: described by {source}, but no .dcm file of it is there" for each in absent]
    kept = [(each, described[each]) for each in found if described.get(each) in MODALITIES]
    return Study(name, path, sorted(kept, key=lambda pair: MODALITIES.index(pair[1])), reasons)


# --- what is told ----------------------------------------------------------------------------------------------------


def _answer(model, encoder, chosen: Mapping, root: Path, studies: Sequence[Study]) -> list[tuple]:
    """Of each study: probabilities (25, 3) or None, modalities as text, and reasons."""
    manifest = pd.DataFrame(
        [
            (study.study_id, name, modality, f"{study.path}/{name}")
            for study in studies
            for name, modality in study.series
        ],
        columns=series.COLUMNS,
    )
    normalisation, size = chosen["normalisation"], tuple(chosen["read"]["image_size"])
    with tempfile.TemporaryDirectory(prefix="kerasmed-") as folder:
        volumes = series.convert(
            manifest,
            root,
            image_size=size,
            normalisations=(normalisation,),
            window=chosen["read"]["window"],
            max_quarantined_share=1.0,
            folder=folder,
            progress=False,
        )
        features = _encode(encoder, chosen["vectors"], volumes, normalisation, Path(folder))
    ids = [study.study_id for study in studies]
    bags = embeddings.stack_bags([embeddings.bag_rows(features.index, ids, name) for name in MODALITIES])
    reasons = [[*study.reasons, *_unreadable(study, volumes.quarantine)] for study in studies]
    available = (bags >= 0).any(axis=-1)
    answered = np.flatnonzero(available.any(axis=-1))
    told: list = [None] * len(studies)
    if len(answered):
        inputs = embeddings.modality_inputs(features.values, bags[answered])
        for row, probabilities in zip(answered, model.predict_on_batch(inputs)):
            told[row] = probabilities
    shown = [" + ".join(SHORT[name] for name, is_there in zip(MODALITIES, row) if is_there) for row in available]
    return list(zip(told, shown, reasons))


def _encode(encoder, kind: str, volumes: series.Volumes, normalisation: str, folder: Path) -> Features:
    """Encode series as a run of 02_lumbar_embeddings does."""
    if volumes.table.empty:
        return Features(np.empty((0, encoder.output_shape[-1]), np.float32), volumes.table)
    values, index = encode_series(encoder, kind, volumes, normalisation, folder, progress=False)
    return Features(np.array(values), index)  # a copy: the folder goes


def _unreadable(study: Study, quarantine: pd.DataFrame) -> list[str]:
    """Say of each series of a study which of its files could not be read: the first, and how many more."""
    said = []
    for name, _ in study.series:
        path = f"{study.path}/{name}"
        reasons = quarantine["path"] + ": " + quarantine["reason"]
        said += reasons[quarantine["path"] == path].tolist()
        files = reasons[quarantine["path"].str.startswith(f"{path}/")].tolist()
        said += files[:_NAMED_FILES]
        if len(files) > _NAMED_FILES:
            said.append(f"and {len(files) - _NAMED_FILES} more files of {path}")
    return said


def _lay_out(studies: Sequence[Study], answers: Sequence[tuple]) -> pd.DataFrame:
    """Lay answers out, a row a study and target."""
    told, shown, reasons = zip(*answers)
    rows = data.long(pd.DataFrame({"study_id": [each.study_id for each in studies]} | dict.fromkeys(TARGETS, np.nan)))
    unknown = np.full((len(TARGETS), len(data.GRADES)), np.nan)
    rows[_TOLD] = np.concatenate([unknown if each is None else each for each in told])
    table = data.submission(rows.dropna(subset=_TOLD)).set_index("row_id")
    table = table.reindex((rows["study_id"] + "_" + rows["target"]).rename("row_id")).reset_index()
    beside = {
        "study_path": [each.path for each in studies],
        "modalities": shown,
        "error": ["; ".join(each) for each in reasons],
    }
    return table.assign(**{name: np.repeat(np.array(each, object), len(TARGETS)) for name, each in beside.items()})
