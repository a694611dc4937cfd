"""What the lumbar notebooks share: read, split by study, the study table, baselines."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from kerasmed import audit, datasets, images, imputation, pipelines, series, splits
from kerasmed.datasets import lumbar as data

CONDITIONS, TARGETS, MODALITIES = data.CONDITIONS, data.TARGETS, data.MODALITIES
# Branch names of networks: what Keras takes as the name of an input.
BRANCHES = {"spinal_canal_stenosis": "canal", "neural_foraminal_narrowing": "foraminal"}
BRANCHES |= {"subarticular_stenosis": "subarticular"}
_FEWEST_STUDIES = 10
TEST = "test"  # the part that is held out once; the others are folds of the rest


class Data(NamedTuple):
    """Studies, and their series as volumes."""

    studies: pd.DataFrame  # a row a study: study_id, TARGETS (0, 1, 2 or NaN), MODALITIES (series that could be read)
    store: pipelines.Store  # a row a series that could be read: the manifest, and its middle slice
    volumes: series.Volumes  # a row a series that could be read


class Part(NamedTuple):
    """A share of the studies that is asked, and those that may be learnt from for it; int positions in the studies."""

    name: str  # "test", "fold 1", ...
    train: np.ndarray
    valid: np.ndarray  # for early stopping
    asked: np.ndarray

    @property
    def learnt(self) -> np.ndarray:
        """Positions that may be learnt from, in order: train and valid."""
        return np.sort(np.concatenate([self.train, self.valid]))


def read(
    source: datasets.Source,
    *,
    image_size: Sequence[int],
    normalisations: Sequence[str],
    window: bool,
    max_quarantined_share: float,
) -> Data:
    """Read the tables, and each series once into volumes of slices in order.

    Args:
        source: of `kerasmed.datasets.locate`.
        image_size: height and width in pixels.
        normalisations: of `kerasmed.series.convert`.
        window: likewise.
        max_quarantined_share: stop where more files cannot be read.

    Raises:
        ValueError: too many files cannot be read.
    """
    manifest = data.read(source.root)
    volumes = series.convert(
        manifest,
        source.root,
        image_size=tuple(image_size),
        normalisations=tuple(normalisations),
        window=window,
        max_quarantined_share=max_quarantined_share,
    )
    studies = data.read_studies(source.root)
    present = volumes.table.groupby(["study_id", "modality"]).size().unstack(fill_value=0)
    present = present.reindex(index=studies["study_id"], columns=list(MODALITIES), fill_value=0)
    studies = studies.assign(**{name: present[name].to_numpy() for name in MODALITIES})
    return Data(studies, _middles(manifest, volumes, normalisations[0], tuple(image_size)), volumes)


def _middles(manifest, volumes, normalisation, image_size) -> pipelines.Store:
    """Lay the middle slice of each series out as a store, for the audit and for neighbours."""
    pictures = series.middle(volumes, normalisation, image_size)
    names = ["study_id", "series_id"]
    rows = volumes.table[names].merge(manifest, on=names, how="left", validate="one_to_one")
    return pipelines.Store(
        pictures,
        np.stack([images.thumbnail(picture) for picture in pictures]),
        rows[manifest.columns.tolist()],
        pd.DataFrame(np.array([images.facts(picture) for picture in pictures], images.FACTS)),
        volumes.quarantine,
        volumes.folder,
    )


# --- split -----------------------------------------------------------------------------------------------------------


def split(
    studies: pd.DataFrame,
    *,
    test_share: float,
    folds: int,
    valid_share: float,
    reserved: int = 0,
    seed: int,
    with_folds: bool = True,
) -> list[Part]:
    """Hold some studies out as test, and deal the rest into folds; each part's validation is carved off what is left.

    A study is never cut. Of each condition the share of studies with a Moderate or Severe finding is kept; the set
    names no patients, so that two studies of one patient, if there are any, may be parted.

    Args:
        studies: of `Data`.
        test_share: share of the studies.
        folds: how many.
        valid_share: share of the studies that may be learnt from, for early stopping.
        reserved: that many studies, at most a sixth of those that are not test, are learnt from by every part and asked
            by none: what all parts share may be fitted on them.
        seed: of the shuffles.
        with_folds: False for the test part alone.

    Returns:
        The test part, then the folds.

    Raises:
        ValueError: too few studies.
    """
    if len(studies) < _FEWEST_STUDIES:
        raise ValueError(
            f"{len(studies)} studies cannot be parted into test, folds and validation; expected at least "
            f"{_FEWEST_STUDIES} rows in train.csv."
        )
    graded = {name: _graded(studies, name) for name in CONDITIONS}
    table = pd.DataFrame({"group_id": studies["study_id"].to_numpy(), **graded})
    options = {"seed": seed}
    shares = {"test_share": test_share, "valid_share": valid_share * (1 - test_share)}
    held_out = (splits.assign(table, CONDITIONS, **shares, **options)["split"] == "test").to_numpy()
    rest = np.flatnonzero(~held_out)
    asked = {TEST: np.flatnonzero(held_out)}
    if with_folds:
        drawn = np.random.default_rng(seed).permutation(rest)[: min(reserved, len(rest) // 6)]
        dealt = np.setdiff1d(rest, drawn)
        fold = splits.folds(table.iloc[dealt].reset_index(drop=True), CONDITIONS, num_folds=folds, **options)
        asked |= {f"fold {number + 1}": dealt[fold == number] for number in range(fold.max() + 1)}
    parts = []
    for name, positions in asked.items():
        learnt = rest if name == TEST else np.setdiff1d(rest, positions)
        among = table.iloc[learnt].reset_index(drop=True)
        carved = splits.assign(among, CONDITIONS, test_share=0, valid_share=valid_share, **options)["split"]
        parts.append(Part(name, learnt[carved == "train"], learnt[carved == "valid"], positions))
    return parts


def never_asked(parts: Sequence[Part]) -> np.ndarray:
    """Return the studies that some part learns from and none asks, int, ascending."""
    learnt, asked = (np.concatenate([getattr(part, what) for part in parts]) for what in ("learnt", "asked"))
    return np.setdiff1d(learnt, asked)


def _graded(studies, condition) -> np.ndarray:
    """1.0 where any known target of a condition is Moderate or Severe, else 0.0."""
    columns = [name for name in TARGETS if condition in name]
    return (studies[columns] > 0).any(axis=1).to_numpy(float)


def gate(found: Data, parts: Sequence[Part], *, accepted: Sequence[str]) -> pd.DataFrame:
    """Ask `audit.gate` of each part whether it may be learnt for: the asked studies are its test.

    Returns:
        The checks of all parts, with a column `part`.

    Raises:
        kerasmed.audit.GateError: something that `accepted` does not name.
    """
    identity = audit.identify(found.store.thumbnails, found.store.facts)
    checks = []
    for part in parts:
        role = pd.Series("left out", index=found.studies["study_id"])
        for name, positions in (("train", part.train), ("valid", part.valid), ("test", part.asked)):
            role.iloc[positions] = name
        manifest = found.store.manifest
        manifest = manifest.assign(split=manifest["study_id"].map(role).fillna("left out"))
        kept = manifest["split"] != "left out"
        checked = audit.gate(
            manifest[kept].reset_index(drop=True), _rows_of(identity, kept), CONDITIONS, accepted=accepted
        )
        checks.append(checked.assign(part=part.name))
    return pd.concat(checks, ignore_index=True)


def _rows_of(identity: pd.DataFrame, kept) -> pd.DataFrame:
    return identity[kept.to_numpy()].reset_index(drop=True)


def parts_table(studies: pd.DataFrame, parts: Sequence[Part]) -> pd.DataFrame:
    """Count studies, and known grades by condition, of what each part learns from and of what it is asked."""
    rows = []
    for part in parts:
        for role, positions in (("learnt", part.learnt), ("asked", part.asked)):
            grades = data.long(studies.iloc[positions]).dropna(subset="grade")
            counts = grades.groupby("condition")["grade"].value_counts().unstack(fill_value=0)
            row = {"part": part.name, "role": role, "studies": len(positions)}
            for condition in CONDITIONS:
                found = counts.loc[condition] if condition in counts.index else {}
                row[BRANCHES[condition]] = " / ".join(str(int(found.get(grade, 0))) for grade in range(3))
            rows.append(row)
    return pd.DataFrame(rows)


# --- what is known beside the pictures -------------------------------------------------------------------------------


def study_table(found: Data) -> pd.DataFrame:
    """Lay out what is known of a study beside its pictures: age, sex, and how each modality was acquired.

    Returns:
        DataFrame, a row a study, indexed by study_id: age, sex, manufacturer and field_strength (of the first series
        that has it), and of each modality's first series slice_thickness, pixel_spacing (mm) and slices; gaps are NaN.
    """
    table = found.volumes.table
    whole = table.groupby("study_id")[["age", "sex", "manufacturer", "field_strength"]].first()
    columns = ["slice_thickness", "pixel_spacing", "slices"]
    first = table.drop_duplicates(["study_id", "modality"]).pivot(index="study_id", columns="modality", values=columns)
    first.columns = [f"{modality}: {name}" for name, modality in first.columns]
    joined = whole.join(first.astype(float)).reindex(found.studies["study_id"])
    return joined.astype({"age": float, "field_strength": float})


def filled(table: pd.DataFrame, learnt: np.ndarray, *, seed: int) -> tuple[pd.DataFrame, list[str]]:
    """Fill the gaps of a study table by random forests fitted on some of its rows, and lay categories out as 0 and 1.

    Args:
        table: of `study_table`.
        learnt: positions to fit on.
        seed: of the forests.

    Returns:
        DataFrame of numbers, in the table's order and index, and the columns that were left out, as they are unknown in
        all rows that are learnt from.
    """
    empty = [name for name in table if table[name].iloc[learnt].isna().all()]
    kept = table.drop(columns=empty)
    imputer = imputation.RandomForestImputer(seed=seed).fit(kept.iloc[learnt])
    complete = imputer.transform(kept)
    return pd.get_dummies(complete, dtype=float), empty


def fill_blank_grades(studies: pd.DataFrame, learnt: np.ndarray, *, seed: int) -> pd.DataFrame:
    """Fill blank grades of studies that are learnt from, by forests on their other grades; all others stay blank.

    Returns:
        A copy of the studies.
    """
    grades = studies.iloc[learnt][list(TARGETS)]
    usable = [name for name in TARGETS if grades[name].notna().any()]
    as_words = grades[usable].astype("Int64").astype("str").where(grades[usable].notna())
    complete = imputation.RandomForestImputer(seed=seed).fit_transform(as_words).astype(float)
    studies = studies.copy()
    studies.iloc[learnt, [studies.columns.get_loc(name) for name in usable]] = complete.to_numpy()
    return studies


def nearest_studies(found: Data, condition: str, part: Part) -> np.ndarray:
    """Find, by thumbnails of the paired modality, the training study that each asked study looks most like.

    Only training studies with a known grade of the condition are looked at.

    Returns:
        int array, shape (num_asked,): positions in the studies; -1 where either has no such series.
    """
    first = found.store.manifest.reset_index(names="row").query("modality == @data.PAIRED[@condition]")
    row_of = first.drop_duplicates("study_id").set_index("study_id")["row"]
    rows = found.studies["study_id"].map(row_of).fillna(-1).to_numpy(int)
    known = found.studies[list(data.targets_of(condition))].notna().any(axis=1).to_numpy()
    learnt = part.learnt[(rows[part.learnt] >= 0) & known[part.learnt]]
    asked = np.flatnonzero(rows[part.asked] >= 0)
    nearest = np.full(len(part.asked), -1)
    if len(learnt) and len(asked):
        thumbnails = found.store.thumbnails
        nearest[asked] = learnt[audit.nearest(thumbnails[rows[part.asked][asked]], thumbnails[rows[learnt]])[0]]
    return nearest


def truth_of_slices(source: datasets.Source, found: Data) -> Mapping[tuple[str, str], set[int]] | None:
    """Say which slices carry a sign of their modality's own condition; None for real data, of which it is not known.

    Returns:
        dict (study_id, series_id) -> positions in the volume.
    """
    if source.kind != "synthetic":
        return None
    truth = pd.read_csv(data.folder(source.root) / "truth.csv", dtype={"study_id": str, "series_id": str})
    modality = found.volumes.table.set_index(["study_id", "series_id"])["modality"]
    truth = truth[truth["condition"].map(data.PAIRED).to_numpy() == _looked_up(modality, truth)]
    truth = truth[truth["grade"] > 0]
    places = found.volumes.slices.merge(truth[["study_id", "series_id", "instance_number"]].drop_duplicates())
    return places.groupby(["study_id", "series_id"])["position"].agg(set).to_dict()


def _looked_up(modality: pd.Series, rows: pd.DataFrame) -> np.ndarray:
    return modality.reindex(pd.MultiIndex.from_frame(rows[["study_id", "series_id"]])).to_numpy()


def split_table(found: Data, parts: Sequence[Part]) -> pd.DataFrame:
    """Return the manifest with the split of the test part, and the fold in which a study is asked.

    The fold is "" for test studies and for those that no part asks.
    """
    role = pd.Series("", index=found.studies["study_id"])
    fold = role.copy()
    for name, positions in (("train", parts[0].train), ("valid", parts[0].valid), ("test", parts[0].asked)):
        role.iloc[positions] = name
    for part in parts[1:]:
        fold.iloc[part.asked] = part.name
    manifest = found.store.manifest
    study = manifest["study_id"]
    return manifest.assign(split=study.map(role).to_numpy(), fold=study.map(fold).to_numpy())
