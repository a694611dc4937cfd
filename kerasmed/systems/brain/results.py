"""How good the cascade of notebook 08_brain_cascade is: end to end and stage by stage, by slice and by person."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from kerasmed import calibration, images, localisation, metrics, pipelines, predictions
from kerasmed.datasets import brain as data
from kerasmed.systems.brain import cascade
from kerasmed.systems.brain.cascade import NONE, OUTCOMES, STAGES
from kerasmed.systems.brain.staged import CASCADE, FLAT, Config, answer_of, ask, classes_of, tabulate_stages

JOINT = "cascade, likeliest"  # the outcome of the largest joint probability; that of `CASCADE` is the path's
SLICES, PEOPLE = "slices", "people"


class People(NamedTuple):
    """Slices gathered into people, a row a group."""

    manifest: pd.DataFrame  # of one fold, with `slices`, how many; people of several diseases are in split "left out"
    thumbnails: np.ndarray  # uint8 (num_people, 64, 64): means of their slices'
    tables: dict[str, pd.DataFrame]  # as of `tabulate`


def people(store: pipelines.Store, tables: Mapping[str, pd.DataFrame]) -> People:
    """Gather a fold's slices into people, as `BrainCascade.predict` does: the mean of each stage over the slices.

    Of the flat network and of the measures the outcomes' probabilities are averaged. A person has the disease that any
    slice has; one whose slices have several has no one outcome, and is left out.
    """
    number, _ = pd.factorize(store.manifest["group_id"])
    count = np.bincount(number)
    manifest = store.manifest.iloc[np.unique(number, return_index=True)[1]].reset_index(drop=True)
    has = store.manifest[list(OUTCOMES)].groupby(number).max()
    diseases = has.drop(columns=NONE).sum(axis=1)
    has[NONE] = (diseases == 0).astype(int)
    manifest = manifest.assign(**has, slices=count, split=manifest["split"].where(diseases <= 1, "left out"))
    # Rows of a group lie in no order: sums by number hold one picture a person in memory.
    sums = np.zeros((len(count), *images.THUMBNAIL_SIZE), np.float32)
    np.add.at(sums, number, store.thumbnails)
    thumbnails = np.rint(sums / count[:, None, None]).astype(np.uint8)
    gathered = {}
    for variant, table in tables.items():
        if variant == CASCADE:
            stages = {stage: table[cascade.columns(stage)].groupby(number).mean().to_numpy() for stage in STAGES}
        else:
            joint = table[[f"p_{name}" for name in OUTCOMES]].groupby(number).mean().to_numpy()
            stages = cascade.from_joint(joint)
        gathered[variant] = tabulate_stages(manifest, variant, stages, table["threshold"].iloc[0])
    return People(manifest, thumbnails, gathered)


def evaluate(
    config: Config, folds: Sequence[pipelines.Store | People], tables: Sequence[Mapping], *, task: str
) -> list[dict]:
    """Score the seven outcomes end to end, the cascade beside the flat network.

    Args:
        config: `bootstraps` is used.
        folds: of `read`, or of `people`.
        tables: of `tabulate`, or of `people`, for each fold.
        task: `SLICES` or `PEOPLE`.

    Returns:
        Rows of `kerasmed.metrics.multiclass_rows` of the variants `CASCADE`, `JOINT` and `FLAT`, beside majority,
        nearest neighbour and measures, with `reference` to the flat network.
    """
    variants = {CASCADE: CASCADE, JOINT: CASCADE, FLAT: FLAT, metrics.MEASURES: metrics.MEASURES}
    return predictions.evaluate(
        {variant: [of_fold[of] for of_fold in tables] for variant, of in variants.items()},
        [each.manifest for each in folds],
        folds[0].thumbnails,
        OUTCOMES,
        task=task,
        reference=FLAT,
        decide={CASCADE: answer_of},
        num_draws=config.bootstraps,
    )


def evaluate_stages(
    config: Config, folds: Sequence[pipelines.Store], tables: Sequence[Mapping], gathered: Sequence[People]
) -> list[dict]:
    """Score each stage on the test slices that it is for, beside what the flat network says of the same classes.

    Disease or none is scored within each of the two sets, and of people, as well. There the cascade's answer is by the
    threshold, the others' by the larger probability.

    Returns:
        Rows of `kerasmed.metrics.multiclass_rows` with `reference` to the flat network; the task is the stage,
        "disease, <set>" or "disease, people".
    """
    of_people = [each.tables for each in gathered]
    rows = _score_stage(config, "disease", "disease", folds, tables)
    for task in data.TASKS:
        rows += _score_stage(config, f"disease, {task}", "disease", folds, tables, only=task)
    rows += _score_stage(config, f"disease, {PEOPLE}", "disease", gathered, of_people)
    for stage in list(STAGES)[1:]:
        rows += _score_stage(config, stage, stage, folds, tables)
    return rows


def _score_stage(config, name, stage, folds, tables, *, only=None) -> list[dict]:
    """Rows of a stage on its test rows, or on those of the set `only`; `folds` and `tables` as in `evaluate`."""
    told = {CASCADE: [], FLAT: [], metrics.MEASURES: []}
    manifests = []
    for fold, of_fold in zip(folds, tables):
        manifest = ask(fold, stage).manifest
        if only:
            manifest = manifest.assign(split=manifest["split"].where(manifest["task"] == only, "left out"))
        manifests.append(manifest)
        for variant, each in told.items():
            values = of_fold[variant][cascade.columns(stage)].to_numpy()
            table = predictions.tabulate(manifest, values, classes_of(stage), variant=variant)
            each.append(table.assign(threshold=of_fold[variant]["threshold"].to_numpy()))

    def by_threshold(table, _):
        return (table["p_disease"] >= table["threshold"]).to_numpy(int)

    return predictions.evaluate(
        told,
        manifests,
        folds[0].thumbnails,
        classes_of(stage),
        task=name,
        reference=FLAT,
        decide={CASCADE: by_threshold} if stage == "disease" else {},
        num_draws=config.bootstraps,
    )


def where_lost(table: pd.DataFrame) -> pd.DataFrame:
    """Say of each outcome what share of its rows is answered right, and at which stage the others leave their path.

    Args:
        table: test rows of the cascade's tables of `tabulate`.

    Returns:
        DataFrame indexed by outcome, those without rows left out: images (how many), right, and each of `STAGES`, the
        share that this stage is the first to answer wrong.
    """
    truth, _ = predictions.truth_and_probabilities(table, OUTCOMES)
    ended = pd.Categorical(table["outcome"], OUTCOMES).codes
    lost = np.where(truth == ended, "right", "")
    for stage, classes in STAGES.items():
        # The class of each outcome at this stage, -1 where it is none of the stage's.
        number = np.array([[name in outcomes for outcomes in classes.values()] for name in OUTCOMES])
        number = np.where(number.any(axis=1), number.argmax(axis=1), -1)
        lost = np.where((lost == "") & (number[truth] != number[ended]), stage, lost)
    shares = pd.crosstab(np.array(OUTCOMES)[truth], lost, normalize="index")
    shares = shares.reindex(columns=["right", *STAGES], fill_value=0.0)
    shares.insert(0, "images", np.bincount(truth, minlength=len(OUTCOMES))[[OUTCOMES.index(n) for n in shares.index]])
    return shares.loc[[name for name in OUTCOMES if name in shares.index]].rename_axis(index=None, columns=None)


def verdicts(rows: Sequence[Mapping]) -> list[str]:
    """Say of each variant, over all outcomes, how it does beside the strongest baseline and beside the flat network.

    Args:
        rows: of `evaluate`.

    Returns:
        A sentence a task, variant and rival; an interval of the paired difference that holds 0 tells nothing apart.
    """
    told = {}
    for row in rows:
        if row["label"] != "all" or row["metric"] not in ("accuracy", "balanced_accuracy"):
            continue
        for against in filter(None, (row["baseline"], row.get("reference"))):
            low, high = against["difference_ci95"] or (np.nan, np.nan)
            word = "better" if low > 0 else "worse" if high < 0 else "not told apart"
            where = f"{row['task']}: {row['variant']} against {against['variant'].replace('_', ' ')}"
            told.setdefault(where, []).append(
                f"{row['metric'].replace('_', ' ')} {word} ({against['difference']:+.3f} [{low:+.3f}, {high:+.3f}])"
            )
    return [f"{where}: {', '.join(words)}" for where, words in told.items()]


def calibration_table(tables: Sequence[pd.DataFrame], prior: Mapping[str, float]) -> pd.DataFrame:
    """Ask whether probabilities of disease are honest: calibration error and Brier score, beside the training share's.

    Args:
        tables: test rows of tables of `tabulate`, one a variant.
        prior: variant name "training share" or the like -> the constant probability that it answers.

    Returns:
        DataFrame, a row a variant: expected calibration error, Brier score; 0 is perfect.
    """
    diseased = tables[0][[f"y_{NONE}"]].rsub(1).to_numpy(float)
    answers = {table["variant"].iloc[0]: table[["disease_disease"]].to_numpy(float) for table in tables}
    answers |= {name: np.full(diseased.shape, value) for name, value in prior.items()}
    return pd.DataFrame(
        {
            "expected calibration error": {
                name: calibration.expected_calibration_error(diseased, told) for name, told in answers.items()
            },
            "Brier score": {
                name: calibration.brier(diseased, told, ["disease"])["all"] for name, told in answers.items()
            },
        }
    )


def outer_heat(heat: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Share of each map's heat in the outer eighth of the picture on every side; by area it would be 0.44.

    Args:
        heat: of `gradcam.Maps`, (num_images, h, w).
        image_size: (height, width).
    """
    height, width = image_size
    middle = np.array([width / 8, height / 8, width * 3 / 4, height * 3 / 4])
    return 1 - localisation.energy_inside(heat, np.tile(middle, (len(heat), 1)), image_size)


def confident(table: pd.DataFrame, *, right: bool, count: int = 8) -> np.ndarray:
    """Return the index of the rows whose path was surest, right or wrong, one a group, surest first.

    Args:
        table: the cascade's, of `tabulate`.
        right: whether to look among the right or the wrong answers.
        count: at most so many.
    """
    ended = pd.Categorical(table["outcome"], OUTCOMES).codes
    return predictions.confident(table, OUTCOMES, right=right, count=count, answered=ended)


def captions(table: pd.DataFrame, readings: Sequence[cascade.Reading]) -> list[str]:
    """Say of each image its outcome, the path's, and the deciding stage with its own probability, in three lines."""
    truth, _ = predictions.truth_and_probabilities(table, OUTCOMES)
    return [
        f"{OUTCOMES[true]}\nread as {reading.outcome}\n{reading.path[-1].stage}: p = {reading.path[-1].probability:.2f}"
        for true, reading in zip(truth, readings)
    ]
