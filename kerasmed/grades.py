"""Graded findings: their scores, the baselines beside them, the RSNA 2024 metric, and contrasts over a grid of models.

A finding is graded 0, 1 or 2 (normal or mild, moderate, severe), NaN where the grade is blank. A table of answers has a
row a study and target: study_id, condition, side, level, grade and p_<class name> of each grade. Blank grades are left
out of every score, and of what baselines learn from.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kerasmed import metrics

SAMPLE_WEIGHTS = (1, 2, 4)  # of the grades 0, 1, 2
ANY_SEVERE = "any_severe_spinal"
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "log_loss", "weighted_log_loss")
TARGET = ["condition", "side", "level"]  # what is graded in a study
_NUM_GRADES = len(SAMPLE_WEIGHTS)
_SLACK = 0.01 + 1e-9  # how far the probabilities of a row may be from a sum of 1, as rounded in a CSV file


def weighted_log_loss(
    grades: Sequence[float], probabilities: np.ndarray, sample_weights: Sequence[float] = SAMPLE_WEIGHTS
) -> float:
    """Log loss in which a row counts by its true grade: −Σ w log p / Σ w, blank rows left out.

    Args:
        grades: float array, shape (num_rows,): 0, 1, 2 or NaN.
        probabilities: shape (num_rows, 3).
        sample_weights: of each grade.

    Returns:
        float, in nats; NaN where all is blank.

    Raises:
        ValueError: shapes differ, another grade, or rows of no probabilities.

    Example:
        >>> told = np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [1, 0, 0]])
        >>> round(weighted_log_loss([0, 2, np.nan], told), 3)  # (log 2 + 4 log 2) / 5
        0.693

    Source: RSNA 2024 Lumbar Spine Degenerative Classification, evaluation page.
    """
    known, ids = _known(grades, {"the answer": probabilities})
    told, each = np.asarray(probabilities)[known], np.asarray(sample_weights, np.float64)[ids]
    return float(metrics.log_losses(ids, told, np.ones((1, len(ids))), each)[0])


def competition(
    table: pd.DataFrame,
    class_names: Sequence[str],
    *,
    conditions: Sequence[str],
    spinal: str,
    weights: np.ndarray | None = None,
) -> dict:
    """Compute the metric of the RSNA 2024 lumbar competition; lower is better.

    The equal mean of the weighted log loss (1, 2, 4 by grade) of each condition and that of `any_severe_spinal`, which
    has one row a study: its label is whether any level of the spinal canal is severe, its probability the largest
    p_<severe> of these levels, its weight the largest of their weights; a log loss of two classes. Blank rows take no
    part, here either.

    Args:
        table: answers, every study and target once.
        class_names: of the grades, in order.
        conditions, spinal: those of the table, and the one of them that `any_severe_spinal` is of.
        weights: shape (num_draws, num_rows), alike in the rows of a study; None for the plain metric.

    Returns:
        dict of each condition, "any_severe_spinal" and "all" -> float, or with weights float64 array (num_draws,), NaN
        where a draw has no row of a condition.

    Raises:
        ValueError: a column or condition is absent, a target occurs twice, another grade, or rows of no probabilities.

    Source: RSNA 2024 Lumbar Spine Degenerative Classification, evaluation page and metric notebook.
    """
    rows = _graded(table, class_names, conditions, spinal)
    known = rows["grade"].notna().to_numpy()
    drawn = np.ones((1, known.sum())) if weights is None else np.asarray(weights)[:, known]
    told = _told(table, class_names)[known]
    losses = _losses(rows[known], told, drawn, conditions, spinal)
    return {label: float(value[0]) if weights is None else value for label, value in losses.items()}


def _losses(rows, told, weights, conditions, spinal) -> dict[str, np.ndarray]:
    """The parts of `competition` and their mean, of rows whose grades are known."""
    ids, condition = rows["grade"].to_numpy().astype(int), rows["condition"].to_numpy()
    told = told / told.sum(axis=1, keepdims=True)
    losses = {}
    for name in conditions:
        among = np.flatnonzero(condition == name)
        losses[name] = _weighted(ids[among], told[among], weights[:, among])
    among = np.flatnonzero(condition == spinal)
    studies, first, study = np.unique(rows["study_id"].to_numpy(str)[among], return_index=True, return_inverse=True)
    worst, severe = np.zeros(len(studies), int), np.zeros(len(studies))
    np.maximum.at(worst, study, ids[among])
    np.maximum.at(severe, study, told[among, -1])
    is_severe, each = (worst == _NUM_GRADES - 1).astype(int), np.array(SAMPLE_WEIGHTS)[worst]
    two = np.stack([1 - severe, severe], axis=1)
    losses[ANY_SEVERE] = metrics.log_losses(is_severe, two, weights[:, among[first]], each)
    return losses | {"all": np.mean(list(losses.values()), axis=0)}


def _weighted(ids, told, weights) -> np.ndarray:
    return metrics.log_losses(ids, told, weights, np.array(SAMPLE_WEIGHTS)[ids])


def prior(grades_train: Sequence[float], num_rows: int) -> np.ndarray:
    """Baseline: answer every row with the class shares of the known training rows, shape (num_rows, 3)."""
    return weighted_prior(grades_train, num_rows, np.ones(_NUM_GRADES))


def weighted_prior(
    grades_train: Sequence[float], num_rows: int, sample_weights: Sequence[float] = SAMPLE_WEIGHTS
) -> np.ndarray:
    """Baseline: answer every row with the class shares of the known training rows, each counted with its weight.

    No other constant answer has a lower `weighted_log_loss` on the training rows. Shape (num_rows, 3). Without a known
    training row it raises ValueError.

    Example:
        >>> weighted_prior([0, 0, 1, 2, np.nan], 1).tolist()
        [[0.25, 0.25, 0.5]]
    """
    ids = _known(grades_train, {})[1]
    if not len(ids):
        raise ValueError(f"none of the {len(grades_train)} training rows has a grade; change the split.")
    counts = np.bincount(ids, minlength=_NUM_GRADES) * np.asarray(sample_weights, np.float64)
    return np.tile(counts / counts.sum(), (num_rows, 1))


def level_share(train: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Baseline: answer with the class shares of the training rows of the same side and level.

    The prior counts as one row more there, so that a grade that is rare, and absent at a level, is not impossible:
    p = (count + prior) / (n + 1), which is the prior where n = 0.

    Both tables are of one condition and have side and level, `train` also grade. Shape (num_rows, 3).
    """
    known, ids = _known(train["grade"], {})
    counts = pd.DataFrame(np.eye(_NUM_GRADES)[ids], index=_places(train[known], TARGET[1:])).groupby(level=[0, 1]).sum()
    found = counts.reindex(_places(rows, TARGET[1:]), fill_value=0).to_numpy()
    return (found + prior(train["grade"], len(rows))) / (found.sum(axis=1, keepdims=True) + 1)


def nearest(train: pd.DataFrame, rows: pd.DataFrame, neighbours: Mapping[str, str]) -> np.ndarray:
    """Baseline: answer with the grade that the nearest training study has at the same side and level.

    Args:
        train: of one condition: study_id, side, level, grade.
        rows: to be answered: study_id, side, level.
        neighbours: study_id of the rows -> study_id of the nearest training study.

    Returns:
        float array, shape (num_rows, 3): 1 at the neighbour's grade; the prior where that is blank or absent.

    Raises:
        ValueError: a study has no neighbour, or one that is no training study, or a training target is there twice.
    """
    studies = pd.unique(rows["study_id"])
    alone = [study for study in studies if study not in neighbours]
    if alone:
        raise ValueError(f"`neighbours` lacks {len(alone)} of {len(studies)} studies. First: {alone[:5]}.")
    named = rows["study_id"].map(dict(neighbours))
    strange = sorted(set(named) - set(train["study_id"]))
    if strange:
        raise ValueError(f"{len(strange)} `neighbours` are no training studies. First: {strange[:5]}.")
    place = ["study_id", "side", "level"]
    _refuse_twice(train, place)
    of_target = pd.Series(train["grade"].to_numpy(float), _places(train, place))
    found = of_target.reindex(_places(rows.assign(study_id=named), place)).to_numpy()
    answer, known = prior(train["grade"], len(rows)), np.isfinite(found)
    answer[known] = np.eye(_NUM_GRADES)[found[known].astype(int)]
    return answer


def baselines(
    train: pd.DataFrame, rows: pd.DataFrame, *, neighbours: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Answer rows without a model: majority, prior, weighted prior, level share and, with neighbours, the nearest.

    Args:
        train: study_id, condition, side, level, grade; each condition learns from its own rows.
        rows: to be answered: the same but grade.
        neighbours: of `nearest`.

    Returns:
        dict name in `kerasmed.metrics.BASELINES` -> float array, shape (num_rows, 3).

    Raises:
        ValueError: a condition of the rows has no training row with a grade; or as `nearest`.
    """
    answers: dict[str, np.ndarray] = {}
    for name in pd.unique(rows["condition"]):
        among = (rows["condition"] == name).to_numpy()
        learnt, asked = train[train["condition"] == name], rows[among]
        shares = prior(learnt["grade"], len(asked))
        of_condition = {
            metrics.MAJORITY: np.eye(_NUM_GRADES)[shares.argmax(axis=1)],
            metrics.PRIOR: shares,
            metrics.WEIGHTED_PRIOR: weighted_prior(learnt["grade"], len(asked)),
            metrics.LEVEL_SHARE: level_share(learnt, asked),
        }
        if neighbours is not None:
            of_condition[metrics.NEAREST_NEIGHBOUR] = nearest(learnt, asked, neighbours)
        for baseline, told in of_condition.items():
            answers.setdefault(baseline, np.zeros((len(rows), _NUM_GRADES)))[among] = told
    return answers


def scores(grades: Sequence[float], probabilities: np.ndarray, class_names: Sequence[str], weights: np.ndarray) -> dict:
    """Compute the metrics of graded findings under each row of weights, over the rows with a grade.

    Args:
        grades: float array, shape (num_rows,): 0, 1, 2 or NaN.
        probabilities: shape (num_rows, 3).
        class_names: of the grades.
        weights: shape (num_draws, num_rows); a row of ones gives the plain metrics.

    Returns:
        As `kerasmed.metrics.multiclass`, with ("log_loss", "all") and ("weighted_log_loss", "all").
    """
    known, ids = _known(grades, {"the answer": probabilities})
    return _scores(ids, np.asarray(probabilities)[known], class_names, np.asarray(weights)[:, known])


def _scores(ids, told, class_names, weights) -> dict:
    return metrics.multiclass(ids, told, class_names, weights) | _log_losses(ids, told, weights)


def _log_losses(ids, told, weights) -> dict:
    plain = metrics.log_losses(ids, told, weights)
    return {("log_loss", "all"): plain, ("weighted_log_loss", "all"): _weighted(ids, told, weights)}


def rows(
    answers: Mapping[str, np.ndarray],
    grades: Sequence[float],
    groups: Sequence,
    class_names: Sequence[str],
    *,
    task: str,
    split: str,
    reference: str | Mapping[str, str] | None = None,
    num_draws: int = metrics.BOOTSTRAPS,
    seed: int = 0,
) -> list[dict]:
    """Tabulate every variant's `scores` with intervals, each beside the strongest baseline on the same draws.

    Args:
        answers: variant -> probabilities, shape (num_rows, 3); at least one of `kerasmed.metrics.BASELINES`.
        grades: float array, shape (num_rows,): 0, 1, 2 or NaN; blank rows are left out, so n counts the others.
        groups: shape (num_rows,), for the bootstrap; studies.
        class_names: of the grades.
        task, split, reference, num_draws, seed: as in `kerasmed.metrics.multiclass_rows`, as are the rows returned.

    Raises:
        ValueError: no baseline, no row with a grade, another grade, or rows of no probabilities.
    """
    known, ids = _known(grades, answers)
    chosen = {variant: np.asarray(told)[known] for variant, told in answers.items()}
    options = {"task": task, "split": split, "reference": reference, "num_draws": num_draws, "seed": seed}
    return metrics.multiclass_rows(ids, chosen, np.asarray(groups)[known], class_names, scores=_scores, **options)


def competition_rows(
    tables: Mapping[str, pd.DataFrame],
    class_names: Sequence[str],
    *,
    conditions: Sequence[str],
    spinal: str,
    task: str,
    split: str,
    reference: str | Mapping[str, str] | None = None,
    num_draws: int = metrics.BOOTSTRAPS,
    seed: int = 0,
) -> list[dict]:
    """Tabulate every variant's `competition` with intervals over studies, beside the strongest baseline.

    Args:
        tables: variant -> answers to the same rows, as of `competition`; at least one of `kerasmed.metrics.BASELINES`.
        class_names, conditions, spinal: of `competition`.
        task, split, reference, num_draws, seed: as in `kerasmed.metrics.multiclass_rows`.

    Returns:
        Rows as there, of the metric "competition", a label a part; n counts the rows with a grade.

    Raises:
        ValueError: as `competition`, no table, or tables of different rows.
    """
    if not tables:
        raise ValueError("`tables` is empty; expected variant -> answers, with a baseline among them.")
    graded = {variant: _graded(table, class_names, conditions, spinal) for variant, table in tables.items()}
    first = next(iter(graded.values()))
    strange = [variant for variant, rows in graded.items() if not rows.equals(first)]
    if strange:
        raise ValueError(
            f"the rows of {strange} are not those of {next(iter(tables))} in their order, by study_id, "
            f"{', '.join(TARGET)} and grade; answer the same rows."
        )
    known = first["grade"].notna().to_numpy()

    def score(told, weights):
        losses = _losses(first[known], told, weights, conditions, spinal)
        return {("competition", label): losses[label] for label in ("all", *conditions, ANY_SEVERE)}

    answers = {variant: _told(table, class_names)[known] for variant, table in tables.items()}
    options = {"task": task, "split": split, "reference": reference, "num_draws": num_draws, "seed": seed}
    groups = first["study_id"].to_numpy()[known]
    return metrics.compared_rows(answers, groups, score, lambda *_: "a condition without a grade", **options)


def draws(
    grid: Mapping, grades: Sequence[float], groups: Sequence, *, num_draws: int = metrics.BOOTSTRAPS, seed: int = 0
) -> dict[str, dict]:
    """Score each point of a grid of models once, on the same bootstrap draws, for `table` and `contrast`.

    Groups are drawn before blank rows are left out, so that conditions with the same groups share their draws.

    Args:
        grid: key -> probabilities, shape (num_rows, 3). A key is a tuple of a model's factor values, always in the same
            order, or the name of a baseline.
        grades: float array, shape (num_rows,): 0, 1, 2 or NaN.
        groups: shape (num_rows,); studies.
        num_draws, seed: of the bootstrap.

    Returns:
        dict metric of `METRICS` -> key -> (value, float64 array (num_draws,)), NaN where undefined.

    Raises:
        ValueError: no row with a grade, another grade, or rows of no probabilities.
    """
    known, ids = _known(grades, grid)
    if not len(ids):
        raise ValueError(f"none of the {len(known)} rows has a grade.")
    drawn = metrics.bootstrap_weights(groups, num_draws=num_draws, seed=seed)[:, known]
    weights = np.concatenate([np.ones((1, len(ids)), np.float32), drawn])
    found: dict[str, dict] = {name: {} for name in METRICS}
    class_names = [str(number) for number in range(_NUM_GRADES)]
    for key, probabilities in grid.items():
        scored = _scores(ids, np.asarray(probabilities)[known], class_names, weights)
        for name in METRICS:
            found[name][key] = (float(scored[name, "all"][0]), scored[name, "all"][1:])
    return found


def table(drawn: Mapping[str, Mapping], factors: Sequence[str], **fields) -> pd.DataFrame:
    """Lay a scored grid out as a tidy table, a row a point.

    Args:
        drawn: of `draws`.
        factors: names of what the keys hold, in order.
        fields: columns put first, the same in every row, such as condition and split.

    Returns:
        DataFrame: the fields, variant (the key's values joined, or the baseline's name), the factors (empty for a
        baseline), and of each metric <metric>, <metric>_low and <metric>_high, the ends of the 95 % interval.
    """
    records: dict = {}
    for metric, points in drawn.items():
        for key, (value, spread) in points.items():
            name = key if isinstance(key, str) else " ".join(map(str, key))
            record = records.setdefault(key, {**fields, "variant": name, **_levels(key, factors)})
            low, high = metrics.interval(spread) or (np.nan, np.nan)
            record |= {metric: value, f"{metric}_low": low, f"{metric}_high": high}
    return pd.DataFrame(list(records.values()))


def contrast(
    points: Mapping, factors: Sequence[str], factor: str, minus, plus, *, within: Mapping | None = None
) -> dict:
    """Compare two values of a factor over all other settings of a grid, on the same bootstrap draws.

    The mean over the pairs of points that differ in that factor only of metric(plus) − metric(minus). Several values on
    a side are averaged first; a setting counts only where all of them are there and defined. The interval covers the
    choice of the studies that were scored, not of those that were learnt from.

    Args:
        points: key -> (value, draws), one metric of `draws`; baselines are passed over.
        factors: names of what the keys hold, in order.
        factor: the one that is contrasted.
        minus, plus: values of it, each one or a tuple of several.
        within: other factor -> value, or tuple of values, that the points are kept to.

    Returns:
        dict: factor, minus and plus (lists), value, ci95 [low, high], pairs (how many), each (a list of dicts of the
        other factors, value and ci95). Without a pair value and ci95 are None, and `reason` says why.

    Raises:
        ValueError: `factor` or `within` names no factor or the same, a value is on both sides, or a key does not fit.

    Example:
        >>> points = {("a", "x"): (0.5, np.zeros(2)), ("a", "y"): (0.75, np.ones(2)), ("b", "y"): (1.0, np.ones(2))}
        >>> found = contrast(points, ("letter", "sign"), "sign", "x", "y")
        >>> found["value"], found["pairs"], found["each"][0]["letter"]
        (0.25, 1, 'a')
    """
    minus, plus = _several(minus), _several(plus)
    within = {name: _several(values) for name, values in (within or {}).items()}
    others = [name for name in factors if name != factor]
    if factor not in factors or not set(within) <= set(others):
        raise ValueError(
            f"`factor` is {factor!r}, `within` names {list(within)}; expected among {list(factors)}, once."
        )
    if set(minus) & set(plus) or not minus or not plus:
        raise ValueError(f"`minus` is {minus} and `plus` {plus}; expected different values of {factor} on each side.")
    settings: dict[tuple, dict] = {}
    for key, point in points.items():
        levels = _levels(key, factors)
        value = levels.pop(factor)
        if all(levels[name] in allowed for name, allowed in within.items()) and np.isfinite(point[0]):
            settings.setdefault(tuple(levels.values()), {})[value] = point
    each, spreads = [], []
    for key, found in settings.items():
        if {*minus, *plus} <= set(found):
            means = [[np.mean(part, axis=0) for part in zip(*map(found.get, side))] for side in (minus, plus)]
            value, spread = means[1][0] - means[0][0], means[1][1] - means[0][1]
            each.append(dict(zip(others, key)) | {"value": float(value), "ci95": metrics.interval(spread)})
            spreads.append(spread)
    result = {"factor": factor, "minus": list(minus), "plus": list(plus)}
    if not each:
        reason = f"no setting of the grid has all of {[*minus, *plus]} as {factor}"
        return result | {"value": None, "ci95": None, "pairs": 0, "each": [], "reason": reason}
    middle = float(np.mean([pair["value"] for pair in each]))
    ends = metrics.interval(np.mean(spreads, axis=0))
    return result | {"value": middle, "ci95": ends, "pairs": len(each), "each": each}


def _several(values) -> tuple:
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def _levels(key, factors) -> dict:
    """A key's value of each factor; a baseline, whose key is its name, has none."""
    if not isinstance(key, str) and len(key) != len(factors):
        raise ValueError(f"the key {key} has {len(key)} values; expected one for each of {list(factors)}.")
    return dict.fromkeys(factors, "") if isinstance(key, str) else dict(zip(factors, key))


def _known(grades, answers) -> tuple[np.ndarray, np.ndarray]:
    """Mask of the rows with a grade, and those grades as int; refuses answers of the wrong form."""
    grades = np.asarray(grades, np.float64)
    known = ~np.isnan(grades)
    wrong = grades[known & ~np.isin(grades, range(_NUM_GRADES))]
    if len(wrong):
        raise ValueError(f"{len(wrong)} grades are not 0, 1, 2 or NaN (blank). First: {wrong[:5].tolist()}.")
    for name, told in answers.items():
        told = np.asarray(told)
        if told.shape != (len(grades), _NUM_GRADES):
            raise ValueError(f"{name} has shape {told.shape}; expected {(len(grades), _NUM_GRADES)}, a row a grade.")
        improper = told[~((told >= 0).all(axis=1) & (np.abs(told.sum(axis=1) - 1) <= _SLACK))]
        if len(improper):
            raise ValueError(
                f"{len(improper)} of {len(told)} rows of {name} are no probabilities: expected at least 0, with a sum "
                f"of 1; pass a softmax, no logits. First: {improper[:3].tolist()}."
            )
    return known, grades[known].astype(int)


def _places(table, names) -> pd.MultiIndex:
    """Where rows belong; a side that is empty in a file is read as missing."""
    columns = table[list(names)].astype(object)
    return pd.MultiIndex.from_frame(columns.where(columns.notna(), ""))


def _told(table, class_names) -> np.ndarray:
    return table[[f"p_{name}" for name in class_names]].to_numpy(np.float64)


def _graded(table, class_names, conditions, spinal) -> pd.DataFrame:
    """The study_id, target and grade of a table's rows, in order; refuses what `competition` cannot score."""
    needed = ["study_id", *TARGET, "grade", *(f"p_{name}" for name in class_names)]
    absent = [name for name in needed if name not in table]
    if absent:
        raise ValueError(f"the table lacks the columns {absent}; expected {needed}.")
    _known(table["grade"], {"the table": _told(table, class_names)})
    known, found = (set(each["condition"]) for each in (table[table["grade"].notna()], table))
    if not known == found == set(conditions) or spinal not in conditions:
        raise ValueError(
            f"the table has {sorted(found)}, graded {sorted(known)}; `conditions` are {list(conditions)}, `spinal` "
            f"is {spinal!r}. Expected rows with a grade of every condition and of no other, `spinal` among them."
        )
    _refuse_twice(table, ["study_id", *TARGET])
    return table[["study_id", *TARGET, "grade"]].reset_index(drop=True)


def _refuse_twice(table, place) -> None:
    twice = table.duplicated(place)
    if twice.any():
        raise ValueError(
            f"{twice.sum()} of {len(table)} rows repeat a {', '.join(place)}; keep one of each. "
            f"First: {table.loc[twice, place].head(3).to_numpy().tolist()}."
        )
