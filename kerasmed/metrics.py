"""Metrics with intervals, and the baseline rows that stand beside them.

Here are the metrics of exclusive classes and what they share with independent labels (`kerasmed.multilabel`). Images
of one patient are no independent draws, so intervals come from a bootstrap over groups: whole groups are drawn with
replacement, 1,000 times, seeded, and the 2.5th and 97.5th percentiles are reported. Every metric is computed from
weights, one per image (how often its group was drawn), so that all draws are one matrix product, and two models are
compared on the same draws.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

BOOTSTRAPS = 1000
MAJORITY, ALL_POSITIVE, NEAREST_NEIGHBOUR, SVC = "majority", "all_positive", "nearest_neighbour", "svc"
PATIENT = "patient_data"  # a model on age, sex and view, which sees no image
CARRY_FORWARD = "carry_forward"  # the findings of the patient's previous visit
PATIENT_AND_PREVIOUS = "patient_and_previous"  # a model on both, which sees no image
TYPE_SHARE = "type_share"  # the share of abnormal training studies of the study's own type
PRIOR = "prior"  # the class shares of the training rows
WEIGHTED_PRIOR = "weighted_prior"  # the same, each row counted with its sample weight
LEVEL_SHARE = "level_share"  # the class shares of the training rows of the same level and side
MEASURES = "measures"  # a model on size, border and mean intensity, which sees no image
BASELINES = (
    *(MAJORITY, ALL_POSITIVE, NEAREST_NEIGHBOUR, SVC, PATIENT, CARRY_FORWARD, PATIENT_AND_PREVIOUS, TYPE_SHARE),
    *(PRIOR, WEIGHTED_PRIOR, LEVEL_SHARE, MEASURES),
)
LOWER_IS_BETTER = ("log_loss", "weighted_log_loss", "competition")
_LEAST = 1e-15  # what a probability of 0 counts as in a log loss
_CHUNK = 2**22  # weights looked at together: what bounds the memory of `ranking`, at 32 MB an array


def bootstrap_weights(groups: Sequence, *, num_draws: int = BOOTSTRAPS, seed: int = 0) -> np.ndarray:
    """Draw groups with replacement and count how often each image is in each draw.

    Args:
        groups: shape (num_images,): group of each image.
        num_draws: bootstrap draws.
        seed: of the draws.

    Returns:
        float32 array, shape (num_draws, num_images).
    """
    if num_draws < 1:
        raise ValueError(f"`num_draws` is {num_draws}; expected at least 1 (1,000 is usual).")
    _, group_of_image = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    num_groups = group_of_image.max() + 1
    counts = np.random.default_rng(seed).multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_draws)
    return counts.astype(np.float32)[:, group_of_image]


def confusion(
    class_ids: np.ndarray, predicted: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Count true against predicted classes, rows true, columns predicted.

    Args:
        class_ids, predicted: int arrays, shape (num_images,).
        num_classes: how many there are.
        weights: shape (num_draws, num_images); None counts each image once.

    Returns:
        float64 array, shape (num_draws, num_classes, num_classes), without the first axis where weights is None.
    """
    cell = np.zeros((len(class_ids), num_classes**2), np.float32)
    cell[np.arange(len(class_ids)), class_ids * num_classes + predicted] = 1
    counts = (cell.sum(axis=0) if weights is None else weights @ cell).astype(np.float64)
    return counts.reshape(*counts.shape[:-1], num_classes, num_classes)


def auroc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve under each row of weights: the chance that a positive outscores a negative, ties half.

    Args:
        positive: bool array, shape (num_images,).
        scores: float array, shape (num_images,).
        weights: shape (num_draws, num_images).

    Returns:
        float64 array, shape (num_draws,); NaN where a draw has no positive or no negative.

    Example:
        >>> auroc(np.array([False, True, True]), np.array([0.2, 0.2, 0.9]), np.ones((1, 3))).tolist()
        [0.75]
    """
    return ranking(positive, scores, weights)[0]


def average_precision(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision under each row of weights: the precision at each positive, averaged over the positives.

    AP = Σ_k (R_k − R_{k−1}) · P_k over the distinct scores, highest first, where R_k and P_k are recall and precision
    of all images that score at least as high: equal scores count together. A constant score has AP = prevalence.

    Args:
        positive: bool array, shape (num_images,).
        scores: float array, shape (num_images,).
        weights: shape (num_draws, num_images).

    Returns:
        float64 array, shape (num_draws,); NaN where a draw has no positive.

    Example:
        >>> average_precision(np.array([False, True, True]), np.full(3, 0.2), np.ones((1, 3))).round(2).tolist()
        [0.67]

    Source: scikit-learn, `average_precision_score`, which gives 0 where there is no positive.
    """
    return ranking(positive, scores, weights)[1]


def ranking(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute `auroc` and `average_precision` of one sort.

    Args:
        truth: shape (num_images,): 1 or True, 0 or False, or NaN, which leaves the row out.
        scores: float array, shape (num_images,).
        weights: shape (num_draws, num_images).

    Returns:
        Two float64 arrays, shape (num_draws,), NaN where undefined.
    """
    rows = np.flatnonzero(~np.isnan(truth))
    order = rows[np.argsort(scores[rows], kind="stable")[::-1]]
    positive = truth[order] == 1
    areas, averages = np.full((2, len(weights)), np.nan)
    if not positive.any():
        return areas, averages
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # first image of each run of equal scores
    # Only runs with a positive add to either figure: neighbouring runs without one are taken together.
    bears = np.logical_or.reduceat(positive, starts)
    starts = starts[bears | np.append(True, bears[:-1])]
    step = max(1, _CHUNK // len(order))
    for first in range(0, len(weights), step):
        part = slice(first, first + step)
        drawn = weights[part][:, order].astype(np.float64)
        met = np.add.reduceat(drawn, starts, axis=1)
        drawn *= positive
        found = np.add.reduceat(drawn, starts, axis=1)
        all_met, all_found = np.cumsum(met, axis=1), np.cumsum(found, axis=1)
        positives = all_found[:, -1]
        negatives = all_met[:, -1] - positives
        outscored = negatives[:, None] - (all_met - all_found) + (met - found) / 2  # negatives below, ties half
        areas[part] = ratio((found * outscored).sum(axis=1), positives * negatives)
        precision = np.divide(all_found, all_met, out=np.zeros_like(met), where=all_met > 0)
        averages[part] = ratio((found * precision).sum(axis=1), positives)
    return areas, averages


def log_losses(
    class_ids: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, sample_weights: np.ndarray | None = None
) -> np.ndarray:
    """Log loss of exclusive classes under each row of weights: the mean of −log p of the true class.

    −Σ w log p / Σ w over the images, where w is how often an image is in the draw times its sample weight.
    Probabilities are clipped to [1e-15, 1] and divided by their sum over the classes.

    Args:
        class_ids: int array, shape (num_images,).
        probabilities: shape (num_images, num_classes).
        weights: shape (num_draws, num_images); a row of ones gives the plain log loss.
        sample_weights: shape (num_images,), at least 0; None weighs all images alike.

    Returns:
        float64 array, shape (num_draws,), in nats, at least 0; NaN where a draw has no weight.

    Example:
        >>> log_losses(np.array([0, 1]), np.array([[0.5, 0.5], [0.75, 0.25]]), np.ones((1, 2))).round(3).tolist()
        [1.04]

    Source: scikit-learn, `log_loss`, which clips to the epsilon of the float type instead of 1e-15.
    """
    clipped = np.clip(np.asarray(probabilities, np.float64), _LEAST, 1)
    losses = np.log(clipped.sum(axis=1)) - np.log(clipped[np.arange(len(class_ids)), class_ids])
    each = np.ones(len(losses)) if sample_weights is None else np.asarray(sample_weights, np.float64)
    lost, weight = (weights @ np.stack([losses * each, each], axis=1)).T
    return ratio(lost, weight)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide, element by element; NaN where the denominator is not above 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)


def kappa(tp: np.ndarray, fn: np.ndarray, fp: np.ndarray, tn: np.ndarray) -> np.ndarray:
    """Cohen's kappa of a yes-or-no answer: the agreement with the truth beyond what chance would give.

    κ = (p_o − p_e) / (1 − p_e), with the share of right answers p_o and the share p_e that would be right by chance, if
    truth and answer kept their shares and knew nothing of each other. Here without a difference of near shares:
    κ = 2 (tp · tn − fn · fp) / ((tp + fp)(fp + tn) + (tp + fn)(fn + tn)).

    Args:
        tp, fn, fp, tn: how many are found, missed, falsely found and rightly left; arrays of one shape.

    Returns:
        float64 array of that shape, at most 1, and 0 where all answers are the same but the truth is not; NaN where
        p_e = 1, as truth and answers are all of one class, and where there is nothing to answer.

    Example:
        >>> kappa(*np.array([[20], [5], [10], [15]])).tolist()
        [0.4]

    Source: Cohen 1960, doi:10.1177/001316446002000104.
    """
    return ratio(2 * (tp * tn - fn * fp), (tp + fp) * (fp + tn) + (tp + fn) * (fn + tn))


def threshold_of_sensitivity(positive: np.ndarray, scores: np.ndarray, sensitivity: float) -> float:
    """Choose a threshold at which at least a share of the positives is found, and no more than need be; on validation.

    It is the middle between the highest score at which they are found and the next lower one of any row, or 0, so that
    new images that score about the same are answered alike. Never call it on test rows.

    Args:
        positive: bool array, shape (num_images,).
        scores: probabilities, shape (num_images,).
        sensitivity: share of the positives with a score at or above the threshold, in (0, 1].

    Returns:
        The threshold, in [0, 1].

    Raises:
        ValueError: no positive, or a share out of range.

    Example:
        >>> threshold_of_sensitivity(np.array([True, True, True, False]), np.array([0.9, 0.8, 0.3, 0.6]), 0.6)
        0.7
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"`sensitivity` is {sensitivity}; expected a share above 0, at most 1.")
    if not np.any(positive):
        raise ValueError("no row is positive, so no threshold has a sensitivity; take a split that has some.")
    found = np.sort(scores[np.asarray(positive, bool)])[::-1]
    # Rounded first: 0.07 · 100 is a little above 7.
    lowest = found[max(1, int(np.ceil(np.round(sensitivity * len(found), 9)))) - 1]
    below = np.max(scores[scores < lowest], initial=0.0)
    middle = (float(lowest) + float(below)) / 2
    return middle if middle > below else float(lowest)


def multiclass(
    class_ids: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    weights: np.ndarray,
    *,
    answered: np.ndarray | None = None,
) -> dict:
    """Compute the metrics of exclusive classes under each row of weights.

    Accuracy; balanced accuracy (mean sensitivity of the classes that occur); macro F1 and macro AUROC (one against the
    rest) likewise over the classes that occur; and of each class sensitivity (recall), specificity, precision, AUROC.

    Args:
        class_ids: int array, shape (num_images,).
        probabilities: shape (num_images, num_classes); the largest is the prediction.
        class_names: label of each class.
        weights: shape (num_draws, num_images); a row of ones gives the plain metrics.
        answered: int array, shape (num_images,): the prediction, where it is not the largest probability.

    Returns:
        dict (metric, label) -> float array (num_draws,); the label of a metric over all classes is "all".
    """
    num_classes = len(class_names)
    predicted = probabilities.argmax(axis=1) if answered is None else answered
    table = confusion(class_ids, predicted, num_classes, weights)
    right, true, predicted = np.diagonal(table, axis1=1, axis2=2), table.sum(axis=2), table.sum(axis=1)
    total = table.sum(axis=(1, 2))
    occurs = true > 0
    sensitivity = ratio(right, true)
    f1 = np.where(occurs, ratio(2 * right, true + predicted), np.nan)
    areas = np.stack(
        [auroc(class_ids == position, probabilities[:, position], weights) for position in range(num_classes)], axis=1
    )

    def over_classes(values):
        return ratio(np.nansum(values, axis=1), np.isfinite(values).sum(axis=1))

    # AUROC needs two classes; a draw may hold no image, where others than these were drawn as well.
    results = {
        ("accuracy", "all"): ratio(right.sum(axis=1), total),
        ("balanced_accuracy", "all"): over_classes(sensitivity),
        ("macro_f1", "all"): over_classes(f1),
        ("macro_auroc", "all"): over_classes(areas),
    }
    others = total[:, None] - true
    specificity = ratio(others - (predicted - right), others)
    precision = ratio(right, predicted)
    for position, name in enumerate(class_names):
        results["sensitivity", name] = sensitivity[:, position]
        results["specificity", name] = specificity[:, position]
        results["precision", name] = precision[:, position]
        results["auroc", name] = areas[:, position]
    return results


def interval(draws: np.ndarray) -> list[float] | None:
    """95 % percentile interval of bootstrap draws, None where more than half of them are undefined."""
    defined = draws[np.isfinite(draws)]
    return None if len(defined) * 2 < len(draws) else np.percentile(defined, [2.5, 97.5]).tolist()


def majority_probabilities(train_ids: np.ndarray, num_rows: int, num_classes: int) -> np.ndarray:
    """Baseline: answer every row with the most frequent class of the training split.

    Its AUROC is 0.5, also over several folds, where class shares would tell the folds apart.

    Returns:
        float array, shape (num_rows, num_classes).
    """
    majority = np.bincount(train_ids, minlength=num_classes).argmax()
    return np.tile(np.eye(num_classes)[majority], (num_rows, 1))


def multiclass_rows(
    class_ids: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    groups: Sequence,
    class_names: Sequence[str],
    *,
    task: str,
    split: str = "test",
    prefix: str = "",
    reference: str | Mapping[str, str] | None = None,
    num_draws: int = BOOTSTRAPS,
    seed: int = 0,
    scores: Callable = multiclass,
    answered: Mapping[str, np.ndarray] | None = None,
) -> list[dict]:
    """Tabulate every variant's metrics with intervals, each beside the strongest baseline on the same draws.

    Args:
        class_ids: int array, shape (num_images,).
        probabilities: variant -> array (num_images, num_classes); at least one of `BASELINES` among the variants.
        groups: shape (num_images,), for the bootstrap.
        class_names: label of each class.
        task: what is classified, for the table.
        split: what the images are, for the table; never the split that steered early stopping or a threshold.
        prefix: put before every label, where only some of a task's classes are scored.
        reference: a variant that the others are compared with as well, as in an ablation; or variant -> its own.
        num_draws: bootstrap draws.
        seed: of the draws.
        scores: computes the metrics, as `multiclass` does.
        answered: variant -> its predictions, int (num_images,), where they are not the largest probabilities.

    Returns:
        List of dicts: task, variant, split, metric, label, value, ci95 [low, high], n, n_groups, baseline, reason.
        `baseline` is None on a baseline's own row, else {variant, value, difference, difference_ci95} of the strongest;
        with a reference, `reference` is the same against it, on the rows of the other variants but the baselines.
        `value` is None where the metric is undefined, and `reason` then says why. Where it is defined, `draws` is the
        metric on each bootstrap draw, float32 (num_draws,), and `paired_by` tells groups and draws: rows of equal
        `paired_by` may be compared draw by draw, as `kerasmed.report` does with those of several runs.

    Raises:
        ValueError: no baseline, no image, or a shape that does not fit.
    """
    for name, values in probabilities.items():
        if np.shape(values) != (len(class_ids), len(class_names)) or not np.isfinite(values).all():
            raise ValueError(
                f"`probabilities` of {name} have shape {np.shape(values)}; "
                f"expected {(len(class_ids), len(class_names))}, all finite."
            )
    present = set(np.asarray(class_names)[np.unique(class_ids)])

    def why(metric, label):
        if label not in present and label != "all":
            return f"no {label} in the {split} split"
        return "never predicted" if metric == "precision" else "one class only"

    def score(variant, weights):
        extra = {"answered": answered[variant]} if variant in (answered or {}) else {}
        return scores(class_ids, probabilities[variant], class_names, weights, **extra)

    options = {"task": task, "split": split, "prefix": prefix}
    options |= {"reference": reference, "num_draws": num_draws, "seed": seed}
    return compared_rows({name: name for name in probabilities}, groups, score, why, **options)


def compared_rows(
    answers: Mapping,
    groups: Sequence,
    score: Callable,
    why: Callable,
    *,
    task: str,
    split: str,
    prefix: str = "",
    reference: str | Mapping[str, str] | None,
    num_draws: int,
    seed: int,
) -> list[dict]:
    """Score every variant on the same bootstrap draws and lay the figures out beside the strongest baseline.

    The strongest has the highest value, of the metrics `LOWER_IS_BETTER` the lowest.

    Args:
        answers: variant -> whatever `score` takes; at least one of `BASELINES` among the variants.
        groups: shape (num_images,), for the bootstrap.
        score: (answer, weights of shape (num_draws, num_images)) -> dict (metric, label) -> array (num_draws,).
        why: (metric, label) -> why that value is undefined.
        task, split, prefix, reference, num_draws, seed: as in `multiclass_rows`.

    Returns:
        Rows as of `multiclass_rows`.

    Raises:
        ValueError: no baseline, no image, or a reference that is no variant.
    """
    baselines = [name for name in answers if name in BASELINES]
    of = reference if isinstance(reference, Mapping) else dict.fromkeys(answers, reference) if reference else {}
    if not {*of, *of.values()} <= set(answers):
        raise ValueError(f"`reference` is {reference!r}; expected one of {list(answers)}.")
    if not baselines:
        raise ValueError(f"there is no baseline among the variants {list(answers)}; add one of {BASELINES}.")
    if not len(groups):
        raise ValueError(f"the {split} split of {task} has no image; change the shares or the seed of the split.")
    draws = bootstrap_weights(groups, num_draws=num_draws, seed=seed)
    once = np.ones((1, len(groups)), np.float32)
    points = {name: score(answer, once) for name, answer in answers.items()}
    spreads = {name: score(answer, draws) for name, answer in answers.items()}
    paired_by = _paired_by(groups, num_draws, seed)
    num_groups = len(np.unique(np.asarray(groups).astype(str)))
    common = {"task": task, "split": split, "n": len(groups), "n_groups": num_groups}
    rows = []
    for name in answers:
        for key, value in points[name].items():
            metric, label = key
            value = float(value[0])
            row = {**common, "variant": name, "metric": metric, "label": prefix + label}
            row |= {"value": None if np.isnan(value) else value, "ci95": None, "baseline": None}
            if np.isnan(value):
                row["reason"] = why(metric, label)
            else:
                row["ci95"] = interval(spreads[name][key])
                row |= {"draws": np.asarray(spreads[name][key], np.float32), "paired_by": paired_by}
                rivals = [rival for rival in baselines if np.isfinite(points[rival][key][0])]
                if name not in BASELINES and rivals:
                    strongest = min if metric in LOWER_IS_BETTER else max
                    best = strongest(rivals, key=lambda rival: points[rival][key][0])
                    row["baseline"] = _against(best, name, key, points, spreads)
                if of.get(name, name) != name and name not in BASELINES:
                    row["reference"] = _against(of[name], name, key, points, spreads)
            rows.append(row)
    return rows


def _paired_by(groups, num_draws, seed) -> str:
    """Hash what the draws of `bootstrap_weights` depend on, and how many images each group has."""
    names, counts = np.unique(np.asarray(groups).astype(str), return_counts=True)
    told = json.dumps([names.tolist(), counts.tolist(), num_draws, seed])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _against(rival, name, key, points, spreads) -> dict | None:
    """Compare a variant with a rival on the same draws; None where the rival's value is undefined."""
    value = float(points[rival][key][0])
    if np.isnan(value):
        return None
    return {
        "variant": rival,
        "value": value,
        "difference": float(points[name][key][0]) - value,
        "difference_ci95": interval(spreads[name][key] - spreads[rival][key]),
    }


def tabulate(rows: Sequence[Mapping]) -> pd.DataFrame:
    """Lay rows out for reading: value with interval, baseline, and difference with interval.

    Args:
        rows: of `multiclass_rows` or `kerasmed.multilabel.rows`.

    Returns:
        DataFrame: task, split, label, metric, variant, shown, baseline, difference, to_reference (where rows have
        one), n, n_groups.
    """
    has_reference = any("reference" in row for row in rows)
    records = []
    for row in rows:
        rival, reference = row["baseline"], row.get("reference")
        compared = _with_interval(reference["difference"], reference["difference_ci95"], "+") if reference else ""
        records.append(
            {
                **{name: row[name] for name in ("task", "split", "label", "metric", "variant")},
                "shown": row["reason"] if row["value"] is None else _with_interval(row["value"], row["ci95"]),
                "baseline": f"{rival['variant']} {rival['value']:.3f}" if rival else "",
                "difference": _with_interval(rival["difference"], rival["difference_ci95"], "+") if rival else "",
                **({"to_reference": compared} if has_reference else {}),
                "n": row["n"],
                "n_groups": row["n_groups"],
            }
        )
    return pd.DataFrame(records)


def wide(table: pd.DataFrame, values: str) -> pd.DataFrame:
    """Lay a column of `tabulate` out with a column a metric, a row a variant."""
    index = ["task", "split", "label", "n", "n_groups", "variant", "metric"]
    return table.set_index(index)[values].unstack("metric", sort=False)


def _with_interval(value, ends, sign=""):
    return f"{value:{sign}.3f}" + (f" [{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]" if ends else "")
