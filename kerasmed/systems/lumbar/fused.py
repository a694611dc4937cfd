"""Notebook 03_lumbar_fusion: all modalities of a study in one network, some of them missing.

    kerasmed run 02_lumbar_embeddings 03_lumbar_fusion --profile demo                synthetic data
    kerasmed run 03_lumbar_fusion --data-root DIR          goes on from the newest run of 02 on the same data

The vectors of slices are those of a run of 02_lumbar_embeddings, and so is the split. Every target of every study is
answered, from whichever modalities there are.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from kerasmed import (
    atomic,
    audit,
    embeddings,
    environment,
    grades,
    losses,
    modalities,
    pipelines,
    runs,
    seals,
    training,
)
from kerasmed.datasets import lumbar as data
from kerasmed.embeddings import Features
from kerasmed.parameters import refuse, refuse_others
from kerasmed.systems.lumbar import embedded, grid, shared
from kerasmed.systems.lumbar.shared import BRANCHES, CONDITIONS, MODALITIES, TARGETS, TEST, Data, Part

ORIGIN = "02_lumbar_embeddings"  # whose run this notebook goes on from
KINDS = ("slices", "planes")  # of the vectors that such a run holds: of single slices, or of depths in a volume
SHORT = {"Sagittal T1": "t1", "Sagittal T2/STIR": "t2", "Axial T2": "axial"}
GROUPS = {BRANCHES[condition]: len(data.targets_of(condition)) for condition in CONDITIONS}
FACTORS = ("architecture", "strategy", "modality_dropout")

Key = tuple[str, str, str]  # values of FACTORS


@dataclass(frozen=True)
class Config:
    """Parameters of notebook 03_lumbar_fusion; the notebook's parameters cell says what each means."""

    profile: str
    seed: int
    data_source: str
    synthetic_studies: int
    synthetic_seed: int
    from_run: str
    vectors: str
    normalisation: str
    max_quarantined_share: float
    accepted: Sequence[str]
    architectures: Sequence[str]
    strategies: Sequence[str]
    modality_dropouts: Sequence[float]
    width: int
    attention_units: int
    units: int
    dropout: float
    l2: float
    batch_size: int
    epochs: int
    learning_rate: float
    stop_patience: int
    pseudo_epochs: int
    precision: str
    deterministic: bool
    bootstraps: int

    def __post_init__(self):
        refuse_others("architectures", self.architectures, modalities.ARCHITECTURES)
        refuse_others("strategies", self.strategies, modalities.STRATEGIES)
        refuse(
            "strategies", self.strategies, "zero" in self.strategies, "zero among them, which the others are held to"
        )
        refuse("vectors", self.vectors, self.vectors in KINDS, f"one of {', '.join(KINDS)}")
        given = self.modality_dropouts
        fits = bool(given) and all(isinstance(rate, (int, float)) and 0 <= rate < 1 for rate in given)
        fits = fits and len({f"{rate:g}" for rate in given}) == len(given)
        refuse("modality_dropouts", given, fits, "rates from 0 and below 1, each but once")
        refuse(
            "accepted", self.accepted, set(self.accepted) <= set(audit.FAILING), f"some of {', '.join(audit.FAILING)}"
        )
        for name in ("width", "attention_units", "units", "batch_size", "epochs", "pseudo_epochs", "bootstraps"):
            refuse(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        refuse("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1")
        refuse("l2", self.l2, self.l2 >= 0, "at least 0")
        refuse("learning_rate", self.learning_rate, 0 < self.learning_rate < 1, "a number between 0 and 1")
        refuse("stop_patience", self.stop_patience, self.stop_patience >= 0, "at least 0")
        refuse("max_quarantined_share", self.max_quarantined_share, 0 <= self.max_quarantined_share <= 1, "0 to 1")

    @property
    def points(self) -> list[Key]:
        """What is trained: architecture × modality dropout × strategy."""
        drawn = product(self.architectures, self.modality_dropouts, self.strategies)
        return [(architecture, strategy, f"{rate:g}") for architecture, rate, strategy in drawn]


class Origin(NamedTuple):
    """The run that this one goes on from, and the vectors that are taken of it."""

    run: Path
    parameters: dict
    vectors: Path  # folder of features.npy and index.csv
    normalisation: str

    @property
    def encoder(self) -> Path:
        """The network that made the vectors."""
        return self.run / "encoders" / f"{self.vectors.name}.keras"


class Cases(NamedTuple):
    """Studies with at least one modality, as networks take them; arrays lie beside `found.studies`."""

    found: Data
    part: Part  # train, valid and, as `asked`, test
    features: Features
    bags: np.ndarray  # (num_studies, M, S): rows of the features, -1 for none
    left_out: list[str]  # studies without any modality

    @property
    def present(self) -> np.ndarray:
        """bool (num_studies, M)."""
        return (self.bags >= 0).any(axis=-1)


class Fused(NamedTuple):
    """What a training left."""

    folder: Path
    history: pd.DataFrame
    told: np.ndarray  # float32 (num_asked, 25, 3), beside the table of `asked`


def find_origin(config: Config, *, fingerprint: str, models_root=None) -> Origin:
    """Find the run of 02_lumbar_embeddings to go on from, and the vectors of it.

    Raises:
        FileNotFoundError: no complete run on these data.
        ValueError: it holds no such vectors.
    """
    options = {"fingerprint": fingerprint, "profile": config.profile, "models_root": models_root}
    run = runs.find("lumbar", ORIGIN, run=config.from_run, **options)
    parameters = runs.read_json(run / "params.json")
    held = sorted(path.parent.name for path in (run / "features").glob("*/index.csv"))
    known = [name for name in parameters["normalisations"] if f"{config.vectors}-{name}" in held]
    kinds = sorted({name.partition("-")[0] for name in held})
    refuse("vectors", config.vectors, bool(known), f"a kind that {run.name} holds: {', '.join(kinds)}")
    normalisation = config.normalisation or known[0]
    refuse("normalisation", normalisation, normalisation in known, f"empty, or one that {run.name} holds: {known}")
    return Origin(run, parameters, run / "features" / f"{config.vectors}-{normalisation}", normalisation)


def read(config: Config, source, origin: Origin) -> Cases:
    """Read studies and vectors as the earlier run left them, split as it was split.

    Raises:
        ValueError: the earlier run's split or vectors are not of the series here.
    """
    options = {name: origin.parameters[name] for name in ("image_size", "normalisations", "window")}
    found = shared.read(source, **options, max_quarantined_share=config.max_quarantined_share)
    features = embedded.open_features(found, origin.vectors)
    ids = found.studies["study_id"].to_numpy()
    bags = embeddings.stack_bags([embeddings.bag_rows(features.index, ids, name) for name in MODALITIES])
    has = (bags >= 0).any(axis=(1, 2))
    studies = found.studies[has].reset_index(drop=True)
    earlier = (
        pd.read_csv(origin.run / "split.csv", dtype=str).drop_duplicates("study_id").set_index("study_id")["split"]
    )
    split = studies["study_id"].map(earlier)
    if split.isna().any() or len(earlier) != len(studies):
        raise ValueError(
            f"{origin.run / 'split.csv'} parts {len(earlier)} studies, {int(split.notna().sum())} of them among the "
            f"{len(studies)} here; run {ORIGIN} again on these data."
        )
    part = Part(TEST, *(np.flatnonzero(split == name) for name in ("train", "valid", "test")))
    return Cases(found._replace(studies=studies), part, features, bags[has], ids[~has].tolist())


# --- what is asked ---------------------------------------------------------------------------------------------------


def subsets() -> dict[str, np.ndarray]:
    """List the subsets of the modalities that are not empty, the whole first: text -> bool (M,).

    Example:
        >>> list(subsets())[:2]
        ['t1 + t2 + axial', 't1 + t2']
    """
    count, names = len(MODALITIES), list(SHORT.values())
    chosen = [places for size in range(count, 0, -1) for places in combinations(range(count), size)]
    return {" + ".join(names[place] for place in places): np.isin(range(count), places) for places in chosen}


WHOLE, *PARTIAL = subsets()
_MASKS = np.stack(list(subsets().values()))


def asked(cases: Cases) -> pd.DataFrame:
    """List what networks are asked: each study as it is, and complete validation and test ones with some hidden.

    Returns:
        DataFrame: study (position), split, modalities (text of `subsets`), as_is (whether nothing is hidden), complete
        (whether the study has all modalities), shown (position in `subsets`).
    """
    present, rows = cases.present, []
    for split, studies in (("train", cases.part.train), ("valid", cases.part.valid), ("test", cases.part.asked)):
        for study in studies:
            complete = present[study].all()
            for place, name in enumerate(subsets()):
                as_is = (_MASKS[place] == present[study]).all()
                if as_is or (complete and split != "train"):
                    rows.append((study, split, name, as_is, complete, place))
    return pd.DataFrame(rows, columns=["study", "split", "modalities", "as_is", "complete", "shown"])


def inputs(cases: Cases, studies: np.ndarray, shown: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Gather what a network takes of some studies; `shown` is bool (num_studies, M), None for all there is."""
    return embeddings.modality_inputs(cases.features.values, cases.bags[studies], shown)


def build_model(config: Config, key: Key, cases: Cases) -> keras.Model:
    """Build the network of a point, its vectors of slices standardised by those of the training studies."""
    learnt = cases.bags[cases.part.train]
    moments = {
        name: embeddings.moments(cases.features.values, learnt[:, place]) for place, name in enumerate(SHORT.values())
    }
    return modalities.graded_fusion(
        GROUPS,
        list(SHORT.values()),
        num_slices=None,
        num_features=cases.features.values.shape[1],
        architecture=key[0],
        strategy=key[1],
        modality_dropout=float(key[2]),
        width=config.width,
        attention_units=config.attention_units,
        units=config.units,
        dropout=config.dropout,
        l2=config.l2,
        moments=moments,
    )


def fit(config: Config, key: Key, cases: Cases, rows: pd.DataFrame, *, run: Path) -> Fused:
    """Train a point and have it answer what is asked, or read what an earlier call finished.

    Args:
        config: the recipe.
        key: of `Config.points`.
        cases: of `read`.
        rows: of `asked`.
        run: the run folder; the training goes to `variants/<key>`.
    """
    folder = runs.variant_folder(run, "-".join(key))
    if not seals.is_sealed(folder):
        environment.fresh(config.seed)
        model = build_model(config, key, cases)
        y = cases.found.studies[list(TARGETS)].to_numpy(np.float32)
        train, valid = cases.part.train, cases.part.valid
        options = {"batch_size": config.batch_size}
        print(f"{folder.name}: {len(train)} studies to learn from", flush=True)
        training.fit(
            model,
            lambda first: embeddings.dataset(
                lambda rows: inputs(cases, train[rows]),
                len(train),
                y[train],
                seed=config.seed,
                first_epoch=first,
                **options,
            ),
            embeddings.dataset(lambda rows: inputs(cases, valid[rows]), len(valid), y[valid], **options),
            folder=folder,
            steps_per_epoch=pipelines.steps_per_epoch(len(train), config.batch_size),
            epochs=config.epochs,
            loss=losses.GradedCrossentropy(grades.SAMPLE_WEIGHTS),
            learning_rate=config.learning_rate,
            schedule="cosine",
            stop_patience=config.stop_patience,
        )
        if key[1] == "pseudo":
            _learn_pseudo(config, model, cases, rows, folder)
        told = answer(model, cases, rows, batch_size=config.batch_size)
        runs.write_table(folder / "predictions.csv", as_is(cases, rows, told).assign(variant=" ".join(key)))
        with atomic.whole(folder / "told.npz") as temporary:
            np.savez(temporary, told=told)
        seals.seal(folder)
    with np.load(folder / "told.npz") as saved:
        return Fused(folder, pd.read_csv(folder / "history.csv"), saved["told"])


def _learn_pseudo(config, model, cases, rows, folder) -> None:
    """Have the cross-modal network learn from the vectors that a trained model makes of complete training studies."""
    complete = rows[(rows["split"] == "train") & rows["complete"]].reset_index(drop=True)
    if len(complete):  # else there is nothing to learn a missing modality from
        vectors = answer(modalities.strategy_parts(model), cases, complete)["vectors"]
        options = {"epochs": config.pseudo_epochs, "batch_size": config.batch_size, "seed": config.seed}
        errors = modalities.learn_pseudo(model, vectors, **options)
        history = pd.DataFrame({"epoch": np.arange(1, len(errors) + 1), "error": errors})
        runs.write_table(folder / "pseudo.csv", history)
        runs.write_model(folder / "model.keras", model)


def answer(model: keras.Model, cases: Cases, rows: pd.DataFrame, *, batch_size: int = 32):
    """Ask a network, or parts of one, rows of `asked`: what it predicts for each."""
    study, shown = rows["study"].to_numpy(), _MASKS[rows["shown"]]
    every = embeddings.dataset(
        lambda chosen: inputs(cases, study[chosen], shown[chosen]), len(rows), batch_size=batch_size
    )
    return model.predict(every, verbose=0)


def as_is(cases: Cases, rows: pd.DataFrame, told: np.ndarray) -> pd.DataFrame:
    """Lay the answers to studies as they are out, a row a study and target.

    Returns:
        DataFrame: study_id, split, condition, side, level, grade, p_<grade>.
    """
    chosen = np.flatnonzero(rows["as_is"])
    table = grid.rows_of(
        cases.found._replace(studies=cases.found.studies.iloc[rows["study"].iloc[chosen]]), paired=False
    )
    table = table.assign(split=np.repeat(rows["split"].to_numpy()[chosen], len(TARGETS)))
    table[grid.TOLD] = told[chosen].reshape(-1, len(data.GRADES))
    return table[["study_id", "split", "condition", "side", "level", "grade", *grid.TOLD]]


def own_answers(told: Mapping[Key, np.ndarray], rows: pd.DataFrame, questions: Sequence[grid.Question]) -> dict:
    """Lay the answers to studies as they are out by question; see `kerasmed.systems.lumbar.grid.fit`."""
    chosen = np.flatnonzero(rows["as_is"])
    place = {target: number for number, target in enumerate(TARGETS)}
    of_study, found = pd.Series(chosen, index=rows["study"].iloc[chosen]), {}
    for key, each in told.items():
        found[key] = pd.concat(
            [
                grid.answered(question, each[of_study[question.asked["study"]], question.asked["target"].map(place)])
                for question in questions
            ],
            ignore_index=True,
        )
    return found


def keep(config: Config, origin: Origin, chosen: Fused, *, run: Path) -> None:
    """Put what stands for the run on top of its folder: the chosen network and what `kerasmed predict` needs beside it.

    Writes model.keras, encoder.keras, history.csv, predictions.csv, and answers.json, which says how series are read.
    """
    for source, name in (
        (chosen.folder / "model.keras", "model.keras"),
        (origin.encoder, "encoder.keras"),
        (chosen.folder / "history.csv", "history.csv"),
        (chosen.folder / "predictions.csv", "predictions.csv"),
    ):
        with atomic.whole(run / name) as temporary:
            shutil.copyfile(source, temporary)
    answers = {"variant": chosen.folder.name, "vectors": config.vectors, "normalisation": origin.normalisation}
    answers["read"] = {name: origin.parameters[name] for name in ("image_size", "window")}
    answers["encoder_from"] = origin.run.name
    runs.write_json(run / "answers.json", answers)


def compare(told: Mapping[str, pd.DataFrame], truth: pd.DataFrame) -> dict:
    """Score a submission as the competition would: see `kerasmed.grades.competition`.

    Args:
        told: of `kerasmed.datasets.lumbar.read_submission`.
        truth: study_id, condition, side, level, grade.
    """
    joined = truth.merge(told, on=["study_id", "condition", "side", "level"], how="left", validate="one_to_one")
    return grades.competition(joined, data.GRADES, conditions=CONDITIONS, spinal=CONDITIONS[0])
