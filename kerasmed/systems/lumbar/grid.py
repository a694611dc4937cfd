"""Notebook 02_lumbar_embeddings: classifiers over embeddings, each fitted on training studies alone.

03_lumbar_fusion asks the same questions, and has its networks scored beside the same baselines.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd

from kerasmed import classifiers, grades, metrics, runs, seals
from kerasmed import progress as bars
from kerasmed.datasets import lumbar as data
from kerasmed.systems.lumbar.shared import (
    CONDITIONS,
    TEST,
    Data,
    Part,
    fill_blank_grades,
    filled,
    nearest_studies,
    study_table,
)

FACTORS = ("embedding", "normalisation", "sampling", "classifier")
OWN_HEAD = ("weighted", "own head")  # sampling and classifier of the attention network's own answers
FOLDS = "folds"  # all parts but the test, each row answered by the model that has not seen its study
TOLD = [f"p_{name}" for name in data.GRADES]
ENSEMBLES = ("lightgbm", "xgboost", "bagging")
_ROW = ["study_id", "condition", "side", "level"]

Key = tuple[str, str, str, str]


class Question(NamedTuple):
    """Rows of one condition that one part learns from, and that it is asked."""

    part: Part
    condition: str
    learnt: pd.DataFrame
    asked: pd.DataFrame


def rows_of(found: Data, *, paired: bool = True) -> pd.DataFrame:
    """List what can be answered: every target of every study, or of those alone whose paired modality is there.

    Returns:
        DataFrame: study (position in the studies), study_id, condition, side, level, target, grade (NaN where blank).
    """
    table = data.long(found.studies)
    position = pd.Series(np.arange(len(found.studies)), index=found.studies["study_id"])
    table.insert(0, "study", position.reindex(table["study_id"]).to_numpy())
    if not paired:
        return table
    present = {name: found.studies[data.PAIRED[name]].to_numpy() > 0 for name in CONDITIONS}
    there = np.zeros(len(table), bool)
    for name, has in present.items():
        among = (table["condition"] == name).to_numpy()
        there[among] = has[table["study"].to_numpy()[among]]
    return table[there].reset_index(drop=True)


def questions(
    found: Data, parts: Sequence[Part], *, paired: bool = True, impute_labels: bool = False, seed: int = 0
) -> list[Question]:
    """Pair what is learnt from with what is asked, for each part and condition; only known grades are in either.

    Args:
        found: of `kerasmed.systems.lumbar.shared.read`.
        parts: of `split`.
        paired: leave out rows of studies that lack the condition's modality.
        impute_labels: fill the blank grades of the studies that are learnt from by random forests; never of the others.
        seed: of the forests.

    Raises:
        ValueError: a condition has fewer than two grades to learn from, or among what the test asks, or a fold asks
            nothing of it.
    """
    known, listed = rows_of(found, paired=paired), []
    for part in parts:
        learnt_from = known
        if impute_labels:
            complete = fill_blank_grades(found.studies, part.learnt, seed=seed)
            learnt_from = rows_of(found._replace(studies=complete), paired=paired)
        for condition in CONDITIONS:
            learnt, asked = (
                table[(table["condition"] == condition) & table["study"].isin(positions) & table["grade"].notna()]
                for table, positions in ((learnt_from, part.learnt), (known, part.asked))
            )
            fewest = 2 if part.name == TEST else 1
            if learnt["grade"].nunique() < 2 or asked["grade"].nunique() < fewest:
                raise ValueError(
                    f"{condition} has {len(learnt)} known grades, of {learnt['grade'].nunique()} kinds, to learn from "
                    f"and {len(asked)}, of {asked['grade'].nunique()} kinds, to answer in {part.name}; more studies "
                    f"{f'with a {data.PAIRED[condition]} series ' * paired}are needed, of two grades, or fewer folds."
                )
            listed.append(Question(part, condition, learnt.reset_index(drop=True), asked.reset_index(drop=True)))
    return listed


def design(rows: pd.DataFrame, vectors: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Lay rows of one condition out as numbers: the study's vector, then side and level as 0 and 1.

    Args:
        rows: study, side, level.
        vectors: float array, shape (num_studies, D).

    Returns:
        float32 array, shape (num_rows, D + 5, or D + 7 where there are sides), and the positions of the columns of 0
        and 1.
    """
    x = [vectors[rows["study"].to_numpy()]]
    sides = rows["side"].to_numpy()
    if (sides != "").any():
        x.append(np.stack([sides == side for side in data.SIDES], axis=1))
    x.append(np.stack([rows["level"].to_numpy() == level for level in data.LEVELS], axis=1))
    joined = np.concatenate(x, axis=1).astype(np.float32)
    return joined, list(range(vectors.shape[1], joined.shape[1]))


# --- fitting ---------------------------------------------------------------------------------------------------------


def points(methods, normalisations, samplings, names) -> list[Key]:
    """List the grid: embedding × normalisation × sampling × classifier."""
    return list(product(methods, normalisations, samplings, names))


def fit(
    asked: Sequence[Question],
    keys: Sequence[Key],
    vectors: Mapping[tuple[str, str, str], Mapping[str, np.ndarray]],
    *,
    run: Path,
    seed: int = 0,
    jobs: int = -1,
    progress: bool = True,
) -> dict[Key, pd.DataFrame]:
    """Fit and ask each classifier of the grid, or read what an earlier call finished, point by point.

    Args:
        asked: of `questions`.
        keys: of `points`.
        vectors: (embedding, normalisation, part) -> condition -> (num_studies, D).
        run: the run folder; a point's answers go to `variants/<its values>/predictions.csv`.
        seed: of the classifiers.
        jobs: joblib workers.
        progress: show a bar.

    Returns:
        Key -> answers, a row a target and part: part, study_id, condition, side, level, grade, p_<grade>.
    """
    folders = {key: runs.variant_folder(run, "-".join(key)) for key in keys}
    missing = [key for key in keys if not seals.is_sealed(folders[key])]
    tasks = [(key, question) for key in missing for question in asked]
    told = joblib.Parallel(n_jobs=jobs, return_as="generator")(
        _delayed(key, question, vectors, seed) for key, question in tasks
    )
    answers: list[pd.DataFrame] = []
    with bars.bar(len(tasks), "classifiers", shown=progress) as bar:
        for (key, question), probabilities in zip(tasks, told):
            answers.append(answered(question, probabilities))
            bar.update(1)
            if question is asked[-1]:
                table = pd.concat(answers, ignore_index=True)
                runs.write_table(folders[key] / "predictions.csv", table.assign(variant=" ".join(key)))
                seals.seal(folders[key])
                answers = []
    return {key: read(folder / "predictions.csv") for key, folder in folders.items()}


def _delayed(key, question, vectors, seed):
    """A call of `kerasmed.classifiers.fit_predict`: for its module alone, other processes need no TensorFlow."""
    of_part = vectors[key[0], key[1], question.part.name][question.condition]
    x_train, categorical = design(question.learnt, of_part)
    x_rows, _ = design(question.asked, of_part)
    y_train, groups = question.learnt["grade"].to_numpy(int), question.learnt["study_id"].to_numpy()
    options = {"num_classes": len(data.GRADES), "seed": seed, "categorical": categorical}
    return joblib.delayed(classifiers.fit_predict)(key[3], key[2], x_train, y_train, groups, x_rows, **options)


def answered(question: Question, probabilities: np.ndarray) -> pd.DataFrame:
    """Put probabilities, shape (num_asked, 3), beside the rows of a question."""
    table = question.asked[[*_ROW, "grade"]].copy()
    table.insert(0, "part", question.part.name)
    table[TOLD] = probabilities
    return table


def read(path: Path) -> pd.DataFrame:
    """Read answers that `fit` wrote; an empty side is "", not unknown."""
    table = pd.read_csv(path, dtype={"study_id": str}).drop(columns="variant")
    return table.assign(side=table["side"].fillna(""))


def own_answers(asked: Sequence[Question], attended: Mapping) -> dict[Key, pd.DataFrame]:
    """Lay the attention networks' own answers out as points of the grid.

    Args:
        asked: of `questions`.
        attended: (embedding, normalisation, part) -> `kerasmed.systems.lumbar.embedded.Attended`.
    """
    place = {target: number for number, target in enumerate(data.TARGETS)}
    found: dict[Key, list] = {}
    for method, normalisation in dict.fromkeys(key[:2] for key in attended):
        for question in asked:
            told = attended[method, normalisation, question.part.name].probabilities
            chosen = told[question.asked["study"], question.asked["target"].map(place)]
            found.setdefault((method, normalisation, *OWN_HEAD), []).append(answered(question, chosen))
    return {key: pd.concat(tables, ignore_index=True) for key, tables in found.items()}


# --- baselines -------------------------------------------------------------------------------------------------------


def baselines(found: Data, asked: Sequence[Question], *, seed: int = 0, jobs: int = -1) -> dict[str, pd.DataFrame]:
    """Answer the same rows without the pictures' content: constants, levels, the nearest neighbour, and patient data.

    The neighbour is the training study whose paired series' middle slice looks most alike. Patient data is boosted
    trees on age, sex, scanner and geometry, with side and level; gaps are filled by forests fitted on the same studies.

    Returns:
        Name in `kerasmed.metrics.BASELINES` -> answers as of `fit`.
    """
    tables: dict[str, list] = {}
    beside = study_table(found)
    values = {}
    for part in dict.fromkeys(question.part.name for question in asked):
        learnt = next(question.part.learnt for question in asked if question.part.name == part)
        values[part] = filled(beside, learnt, seed=seed)[0].to_numpy(np.float32)
    vectors = {("", "", part): dict.fromkeys(CONDITIONS, numbers) for part, numbers in values.items()}
    told = joblib.Parallel(n_jobs=jobs)(
        _delayed(("", "", "none", "lightgbm"), question, vectors, seed) for question in asked
    )
    ids = found.studies["study_id"].to_numpy()
    for question, from_table in zip(asked, told):
        nearest = nearest_studies(found, question.condition, question.part)
        neighbours = {ids[study]: ids[near] for study, near in zip(question.part.asked, nearest) if near >= 0}
        answers = grades.baselines(question.learnt, question.asked)
        has = question.asked["study_id"].isin(neighbours).to_numpy()
        answers[metrics.NEAREST_NEIGHBOUR] = answers[metrics.PRIOR].copy()
        if has.any():
            answers[metrics.NEAREST_NEIGHBOUR][has] = grades.nearest(question.learnt, question.asked[has], neighbours)
        answers[metrics.PATIENT] = from_table
        for name, probabilities in answers.items():
            tables.setdefault(name, []).append(answered(question, probabilities))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


# --- scores ----------------------------------------------------------------------------------------------------------


def of_split(table: pd.DataFrame, split: str, condition: str | None = None) -> pd.DataFrame:
    """Rows of the test part, or of all folds; of one condition, if it is named."""
    among = (table["part"] == TEST) == (split == TEST)
    if condition is not None:
        among &= table["condition"] == condition
    return table[among].reset_index(drop=True)


def score(
    answers: Mapping[Key | str, pd.DataFrame], *, num_draws: int, seed: int = 0
) -> dict[tuple[str, str], dict[str, dict]]:
    """Score every point of the grid, and the baselines, on the test studies and on the folds, with bootstrap draws.

    Args:
        answers: key, or name of a baseline -> answers as of `fit`.
        num_draws, seed: of the bootstrap over studies.

    Returns:
        dict (split, condition) -> `kerasmed.grades.draws`.
    """
    found = {}
    for split, condition in product((TEST, FOLDS), CONDITIONS):
        whole = of_split(next(iter(answers.values())), split)
        rows = whole[whole["condition"] == condition]
        # Studies without this condition stand in as blank rows: a draw then holds the same studies in all conditions.
        others = np.setdiff1d(whole["study_id"], rows["study_id"])
        uniform = np.full((len(others), len(TOLD)), 1 / len(TOLD))
        told = {key: of_split(table, split, condition)[TOLD].to_numpy() for key, table in answers.items()}
        found[split, condition] = grades.draws(
            {key: np.concatenate([each, uniform]) for key, each in told.items()},
            np.append(rows["grade"].to_numpy(float), np.full(len(others), np.nan)),
            np.append(rows["study_id"].to_numpy(str), others.astype(str)),
            num_draws=num_draws,
            seed=seed,
        )
    return found


def table_of(scored: Mapping[tuple[str, str], Mapping]) -> pd.DataFrame:
    """Lay all scores out as one tidy table, a row a split, condition and point; see `kerasmed.grades.table`."""
    tables = [
        grades.table(drawn, FACTORS, split=split, condition=condition) for (split, condition), drawn in scored.items()
    ]
    return pd.concat(tables, ignore_index=True)


def choose(table: pd.DataFrame) -> Key:
    """Choose the point of the best macro AUROC over the folds, averaged over the conditions; the test has no say."""
    among = table[(table["split"] == FOLDS) & (table["embedding"] != "")]
    means = among.groupby(list(FACTORS), sort=False)["macro_auroc"].mean()
    return tuple(means.idxmax())


def best_of_each(table: pd.DataFrame) -> list[Key]:
    """List the point that `choose` would take of each embedding and normalisation, the best first."""
    among = table[(table["split"] == FOLDS) & (table["embedding"] != "")]
    means = among.groupby(list(FACTORS), sort=False)["macro_auroc"].mean().sort_values(ascending=False, kind="stable")
    best: dict = {}
    for key in means.index:
        best.setdefault(key[:2], key)
    return list(best.values())


# Factor, what is taken off, what it is taken from: the questions that earlier work left open.
CONTRASTS = (
    ("sampling", "none", "weighted"),
    ("sampling", "weighted", "smote_under"),
    ("embedding", "average", "attention"),
    ("embedding", "average", "medicalnet"),
    ("classifier", "svc", ENSEMBLES),
    ("normalisation", "gsl", "hist"),
)


def contrasts(
    scored: Mapping[tuple[str, str], Mapping], table: pd.DataFrame, *, split: str = FOLDS, metric: str = "macro_auroc"
) -> list[dict]:
    """Answer `CONTRASTS` by pairs of points that differ in nothing else, averaged over the conditions, on equal draws.

    The ensembles of a reduced grid are those that it has. Points of the networks' own heads take no part.

    Returns:
        List of dicts as of `kerasmed.grades.contrast`, of those that the grid can answer.
    """
    present = {name: set(table[name]) for name in FACTORS}
    # One mean over the conditions for each point and draw: the draws of a study are the same in all.
    shared = [drawn[metric] for (name, _), drawn in scored.items() if name == split]
    means = {
        key: tuple(np.mean([points_[key][place] for points_ in shared], axis=0) for place in (0, 1))
        for key in shared[0]
        if not isinstance(key, str) and key[2:] != OWN_HEAD
    }
    found = []
    for factor, minus, plus in CONTRASTS:
        several = tuple(name for name in (plus if isinstance(plus, tuple) else (plus,)) if name in present[factor])
        if several and minus in present[factor]:
            result = grades.contrast(means, FACTORS, factor, minus, several)
            if result["value"] is not None:
                found.append(result)
    return found


def contrasts_table(found: Sequence[Mapping]) -> pd.DataFrame:
    """Lay contrasts out for reading: what is compared, the difference with its interval, and how many pairs."""
    rows = []
    for each in found:
        plus, minus = (", ".join(each[side]) for side in ("plus", "minus"))
        low, high = each["ci95"]
        shown = f"{each['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append(
            {"factor": each["factor"], "contrast": f"{plus} − {minus}", "difference": shown, "pairs": each["pairs"]}
        )
    return pd.DataFrame(rows, columns=["factor", "contrast", "difference", "pairs"]).set_index(["factor", "contrast"])


def evaluate(
    answers: Mapping[Key | str, pd.DataFrame], chosen: Sequence[Key], *, num_draws: int, seed: int = 0
) -> list[dict]:
    """Score some points and the baselines on the test studies, condition by condition, and by the competition's metric.

    Args:
        answers: as of `score`.
        chosen: keys; the first is what the others are compared with.
        num_draws, seed: of the bootstrap.

    Returns:
        Rows as of `kerasmed.metrics.multiclass_rows`.
    """
    kept = {" ".join(key): answers[key] for key in chosen} | {
        name: table for name, table in answers.items() if isinstance(name, str)
    }
    reference = dict.fromkeys((" ".join(key) for key in chosen[1:]), " ".join(chosen[0]))
    options = {"split": TEST, "reference": reference, "num_draws": num_draws, "seed": seed}
    rows = []
    for condition in CONDITIONS:
        among = {name: of_split(table, TEST, condition) for name, table in kept.items()}
        first = next(iter(among.values()))
        told = {name: table[TOLD].to_numpy() for name, table in among.items()}
        rows += grades.rows(told, first["grade"], first["study_id"], data.GRADES, task=condition, **options)
    whole = {name: of_split(table, TEST) for name, table in kept.items()}
    return rows + grades.competition_rows(
        whole, data.GRADES, conditions=CONDITIONS, spinal=CONDITIONS[0], task="all conditions", **options
    )


def headline(rows: Sequence[Mapping], key: Key) -> list[Mapping]:
    """Pick the rows that answer the notebook's question: each condition's macro AUROC, and the competition's metric."""
    wanted = {("macro_auroc", "all"), ("competition", "all")}
    return [row for row in rows if row["variant"] == " ".join(key) and (row["metric"], row["label"]) in wanted]
