"""Independent labels: their metrics, thresholds tuned on validation, baselines, scores of the test images.

Labels are 1, 0 or NaN (unknown), which leaves a row out of that label only. `scores`, `rows` and `tune_thresholds`
work on arrays; the rest on a table of predictions as of `kerasmed.predictions` (`tabulate` makes it, `read` reads
it), where the p_<class> of a row need not sum to 1. What is scored is called an image here; rows may as well be studies
(`kerasmed.studies`).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from kerasmed import audit, metrics, predictions
from kerasmed.manifest import targets

# Baselines that look at pixels: on images that are all alike they mean nothing.
ON_PIXELS = (metrics.NEAREST_NEIGHBOUR, metrics.SVC)
# Metrics of a label that need no threshold.
RANKED = ("average_precision", "auroc")
# Metrics of a label that may be asked for at threshold 0.5 as well.
AT_HALF = ("f1", "accuracy", "sensitivity", "specificity", "precision", "kappa")


class Answer(NamedTuple):
    """What a variant answers of independent labels: present where the probability reaches the label's threshold."""

    probabilities: np.ndarray  # float, shape (num_images, num_labels)
    thresholds: np.ndarray  # float, shape (num_labels,)


def scores(
    y_true: np.ndarray,
    probabilities: np.ndarray,
    thresholds: np.ndarray,
    class_names: Sequence[str],
    weights: np.ndarray,
    *,
    averaged: Sequence[str] | None = None,
    at_half: Sequence[str] = ("f1",),
) -> dict:
    """Compute the metrics of independent labels under each row of weights.

    Of each label, over the rows where it is known: F1 = 2tp / (2tp + fp + fn), average precision, AUROC, accuracy,
    sensitivity (recall), specificity, precision, Cohen's kappa. A metric is NaN where its denominator is 0: F1 where
    the label is neither present nor answered, kappa where all rows and all answers are of one class. "all" is the mean
    over the labels in which a metric is defined, draw by draw, so ("f1", "all") is what is elsewhere called macro F1 or
    mean F1; a single label has no such mean.

    Args:
        y_true: float array, shape (num_images, num_labels): 1 present, 0 absent, NaN unknown, which leaves the row out
            of that label only.
        probabilities: shape (num_images, num_labels).
        thresholds: shape (num_labels,); a label is answered present where probability >= threshold.
        class_names: of the labels.
        weights: shape (num_draws, num_images); a row of ones gives the plain metrics.
        averaged: the labels that the means are over; None for all of them.
        at_half: of `AT_HALF`, given at threshold 0.5 as well, whatever the thresholds, as "<metric>_at_half".

    Returns:
        dict (metric, label) -> float array (num_draws,), first the means, whose label is "all".

    Raises:
        ValueError: `at_half` names another metric.
    """
    strange = [metric for metric in at_half if metric not in AT_HALF]
    if strange:
        raise ValueError(f"`at_half` names {strange}; expected some of {AT_HALF}: no other depends on the threshold.")
    counted = np.isin(list(class_names), list(class_names if averaged is None else averaged))
    decided = _decided(y_true, probabilities >= np.asarray(thresholds), weights)
    halved = _decided(y_true, probabilities >= 0.5, weights) if at_half else {}
    ranked = [metrics.ranking(truth, told, weights) for truth, told in zip(y_true.T, probabilities.T)]
    areas, averages = (np.stack(each, axis=1) for each in zip(*ranked))
    per_label = {
        "f1": decided["f1"],
        **{f"{metric}_at_half": halved[metric] for metric in at_half},
        "average_precision": averages,
        "auroc": areas,
    } | decided
    results = {}
    for metric, values in per_label.items() if len(class_names) > 1 else ():
        among = values[:, counted]
        results[metric, "all"] = metrics.ratio(np.nansum(among, axis=1), np.isfinite(among).sum(axis=1))
    for position, name in enumerate(class_names):
        results |= {(metric, name): values[:, position] for metric, values in per_label.items()}
    return results


def _decided(y_true, answered, weights) -> dict[str, np.ndarray]:
    """The metrics `AT_HALF` of yes-or-no answers, each float64 (num_draws, num_labels)."""
    cells = [truth & told for truth in (y_true == 1, y_true == 0) for told in (answered, ~answered)]
    tp, fn, fp, tn = [(weights @ cell.astype(np.float32)).astype(np.float64) for cell in cells]
    return {
        "f1": metrics.ratio(2 * tp, 2 * tp + fp + fn),
        "accuracy": metrics.ratio(tp + tn, tp + fp + fn + tn),
        "sensitivity": metrics.ratio(tp, tp + fn),
        "specificity": metrics.ratio(tn, tn + fp),
        "precision": metrics.ratio(tp, tp + fp),
        "kappa": metrics.kappa(tp, fn, fp, tn),
    }


def tune_thresholds(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Choose of each label the threshold that maximises F1 on validation rows; never call it on test rows.

    F1 changes only between neighbouring distinct probabilities. The threshold is the middle of such a gap, so that new
    images that score about the same are answered alike; below the lowest probability the gap reaches to 0. Of gaps
    with the same F1 the widest is taken, and of equally wide ones the highest. O(n log n) a label.

    Args:
        y_true: float array, shape (num_images, num_labels): 1, 0 or NaN (unknown: left out of that label).
        probabilities: shape (num_images, num_labels), in [0, 1].

    Returns:
        float64 array, shape (num_labels,); 0.5 for a label without a known positive row.

    Raises:
        ValueError: unlike shapes, a label that is not 1, 0 or NaN, or a probability that is NaN or outside [0, 1].

    Example:
        >>> tune_thresholds(np.array([[1], [1], [0], [0]]), np.array([[0.9], [0.6], [0.2], [0.1]])).tolist()
        [0.4]
    """
    y_true, probabilities = np.asarray(y_true, np.float64), np.asarray(probabilities, np.float64)
    check(y_true, probabilities)
    return np.array([_best_threshold(truth, told) for truth, told in zip(y_true.T, probabilities.T)])


def _best_threshold(truth, told) -> float:
    if not (truth == 1).any():
        return 0.5
    known = ~np.isnan(truth)
    values, run = np.unique(told[known], return_inverse=True)
    values = values[::-1]  # highest first: every image of the runs up to k is answered present
    answered = np.cumsum(np.bincount(run)[::-1])
    tp = np.cumsum(np.bincount(run, weights=truth[known])[::-1])
    f1 = 2 * tp / (answered + tp[-1])
    below = np.append(values[1:], 0.0)
    best = np.lexsort((values, values - below, f1))[-1]
    middle = (values[best] + below[best]) / 2
    # Between two neighbouring floats there is no middle, and it may be rounded to the lower one.
    return middle if middle > below[best] else values[best]


def check(y_true: np.ndarray, probabilities: np.ndarray, name: str = "`probabilities`") -> None:
    """Raise ValueError where labels are not 1, 0 or NaN, or probabilities do not fit them or are not in [0, 1]."""
    if y_true.ndim != 2 or np.shape(probabilities) != y_true.shape or not np.isfinite(probabilities).all():
        raise ValueError(
            f"{name} have shape {np.shape(probabilities)} beside labels of shape {y_true.shape}; "
            "expected the same, (num_images, num_labels), all finite."
        )
    low, high = np.min(probabilities, initial=0), np.max(probabilities, initial=1)
    if low < 0 or high > 1:
        raise ValueError(f"{name} are in [{low:.3g}, {high:.3g}]; expected in [0, 1]: no logits, no distances.")
    wrong = np.argwhere(~(np.isnan(y_true) | (y_true == 0) | (y_true == 1)))
    if len(wrong):
        first = f"First (row, label): {wrong[:3].tolist()}, the value {y_true[tuple(wrong[0])]:g}."
        raise ValueError(f"{len(wrong)} labels are not 1, 0 or NaN; write NaN for unknown. {first}")


def rows(
    y_true: np.ndarray,
    answers: Mapping[str, Answer],
    groups: Sequence,
    class_names: Sequence[str],
    *,
    task: str,
    split: str = "test",
    averaged: Sequence[str] | None = None,
    at_half: Sequence[str] = ("f1",),
    reference: str | Mapping[str, str] | None = None,
    num_draws: int = metrics.BOOTSTRAPS,
    seed: int = 0,
) -> list[dict]:
    """Tabulate every variant's metrics of independent labels, each beside the strongest baseline on the same draws.

    Args:
        y_true: float array, shape (num_images, num_labels): 1, 0 or NaN (unknown).
        answers: variant -> `Answer`; at least one of `kerasmed.metrics.BASELINES` among the variants.
        groups: shape (num_images,), for the bootstrap.
        class_names: of the labels.
        averaged, at_half: of `scores`.
        task, split, reference, num_draws, seed: as in `kerasmed.metrics.multiclass_rows`.

    Returns:
        Rows as of `kerasmed.metrics.multiclass_rows`, with the metrics of `scores`; n counts all images, known or not.

    Raises:
        ValueError: no baseline, no image, a label that is not 1, 0 or NaN, a probability outside [0, 1], a shape that
            does not fit, or a metric that has no threshold in `at_half`.
    """
    y_true = np.asarray(y_true, np.float64)
    for name, answer in answers.items():
        check(y_true, answer.probabilities, f"the probabilities of {name}")
        if not np.shape(answer.thresholds) == y_true.shape[1:] == (len(class_names),):
            raise ValueError(
                f"the thresholds of {name} have shape {np.shape(answer.thresholds)} beside labels of shape "
                f"{y_true.shape}; expected one for each of {list(class_names)}."
            )
    known, present = (dict(zip(class_names, each.any(axis=0))) for each in (~np.isnan(y_true), y_true == 1))

    def why(metric, label):
        if label == "all":
            return "undefined of every label"
        if not known[label]:
            return f"{label} is unknown in the {split} split"
        if metric.removesuffix("_at_half") == "precision":
            return "never predicted"
        return f"{'no image without' if present[label] else 'no'} {label} in the {split} split"

    def score(answer, weights):
        return scores(y_true, *answer, class_names, weights, averaged=averaged, at_half=at_half)

    options = {"task": task, "split": split, "reference": reference, "num_draws": num_draws, "seed": seed}
    return metrics.compared_rows(answers, groups, score, why, **options)


def truth_and_probabilities(table: pd.DataFrame, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a table's labels (1, 0, NaN) and probabilities, each float, shape (num_images, num_labels)."""
    return predictions.columns(table, class_names)


def thresholds(table: pd.DataFrame, class_names: Sequence[str], *, split: str = "valid") -> np.ndarray:
    """Tune the threshold of each label on one split of a table of predictions.

    Args:
        table: predictions, with `split`.
        class_names: label columns.
        split: which rows to tune on; never "test", where a tuned threshold would have seen the answers.

    Returns:
        float array, shape (num_labels,), of `tune_thresholds`.

    Raises:
        ValueError: the split is "test", or has no row.
    """
    if split == "test":
        raise ValueError("`split` is 'test'; tune thresholds on 'valid': on test rows they would know the answers.")
    return tune_thresholds(*truth_and_probabilities(_rows_of(table, split), class_names))


def cooccurrence(y_true: np.ndarray, class_names: Sequence[str]) -> pd.DataFrame:
    """Tell how often labels come together.

    Args:
        y_true: float array, shape (num_images, num_labels): 1, 0 or NaN.
        class_names: of the labels.

    Returns:
        DataFrame, a row and a column a label: the share of the images with the row's label that have the column's as
        well, where that is known; on the diagonal the share of all images, where known, that have the label. NaN where
        there is no such image.

    Example:
        >>> cooccurrence(np.array([[1, 1], [1, 0], [0, 0], [0, 0]]), ["a", "b"]).to_numpy().tolist()
        [[0.5, 0.5], [1.0, 0.25]]
    """
    y_true = np.asarray(y_true, np.float64)
    present, known = (each.astype(np.float64) for each in (y_true == 1, ~np.isnan(y_true)))
    shares = metrics.ratio(present.T @ present, present.T @ known)
    np.fill_diagonal(shares, metrics.ratio(present.sum(axis=0), known.sum(axis=0)))
    return pd.DataFrame(shares, index=list(class_names), columns=list(class_names))


def mean_score(
    table: pd.DataFrame, class_names: Sequence[str], *, split: str, metric: str = "average_precision"
) -> float:
    """Average precision, or AUROC, in a split, averaged over the labels that have one: what networks are chosen by.

    Networks are chosen on validation, where thresholds are tuned as well; F1 would be too high there by as much as the
    tuning gains, and by more for the network whose threshold fits by chance. These metrics need no threshold.

    Args:
        table: predictions, with `split`.
        class_names: label columns.
        split: which rows.
        metric: of `RANKED`.

    Raises:
        ValueError: another metric, the split has no row, or the metric is undefined of every label: average precision
            needs a positive, AUROC a positive and a negative.
    """
    if metric not in RANKED:
        raise ValueError(f"`metric` is {metric!r}; expected one of {RANKED}, which need no threshold.")
    truth, probabilities = truth_and_probabilities(_rows_of(table, split), class_names)
    once, half = np.ones((1, len(truth)), np.float32), np.full(len(class_names), 0.5)
    label = "all" if len(class_names) > 1 else class_names[0]
    value = float(scores(truth, probabilities, half, class_names, once, at_half=())[metric, label][0])
    if np.isnan(value):
        kinds = "a positive" if metric == "average_precision" else "a positive and a negative"
        raise ValueError(f"none of {list(class_names)} has {kinds} in the {split} split, which {metric} needs.")
    return value


def _rows_of(table, split) -> pd.DataFrame:
    found = table[table["split"] == split]
    if found.empty:
        raise ValueError(f"the table has no row of split {split!r}, only of {sorted(table['split'].unique())}.")
    return found


def baselines(
    y_train: np.ndarray,
    num_rows: int,
    thumbnails_train: np.ndarray | None = None,
    thumbnails_rows: np.ndarray | None = None,
) -> dict[str, Answer]:
    """Answer images without a model, learnt from the training images.

    - majority: each label present where more than half of its known training rows are positive, else absent.
    - all_positive: every label present. No other constant answer has a higher F1: at prevalence p it is 2p / (1 + p)
      (tp = p, fp = 1 − p, fn = 0), which a rare label's "absent" answer, with F1 = 0, hides.
    - nearest_neighbour: the labels of the most correlated training thumbnail; the majority's answer where that
      image's label is unknown, and to a constant image, which correlates with nothing.

    Args:
        y_train: float array, shape (num_train, num_labels): 1, 0 or NaN.
        num_rows: how many images to answer.
        thumbnails_train: uint8, shape (num_train, height, width); None, here and below, for no nearest neighbour.
        thumbnails_rows: uint8, shape (num_rows, height, width).

    Returns:
        dict name -> `Answer` with probabilities 0 and 1, shape (num_rows, num_labels), and thresholds 0.5.

    Raises:
        ValueError: the counts of labels and thumbnails differ, or there is no training image.
    """
    if num_rows and not len(y_train):
        raise ValueError("there is no training image for baselines to learn from; change the shares of the split.")
    num_labels = y_train.shape[1]
    majority = (2 * (y_train == 1).sum(axis=0) > np.isfinite(y_train).sum(axis=0)).astype(float)
    told = {
        metrics.MAJORITY: np.tile(majority, (num_rows, 1)),
        metrics.ALL_POSITIVE: np.ones((num_rows, num_labels)),
    }
    if thumbnails_train is not None or thumbnails_rows is not None:
        found = _neighbours(y_train, num_rows, thumbnails_train, thumbnails_rows)
        told[metrics.NEAREST_NEIGHBOUR] = np.where(np.isnan(found), majority, found)
    return {name: Answer(probabilities, np.full(num_labels, 0.5)) for name, probabilities in told.items()}


def _neighbours(y_train, num_rows, thumbnails_train, thumbnails_rows) -> np.ndarray:
    """Labels of the most correlated training image, NaN to a constant one, shape (num_rows, num_labels)."""
    counts = [0 if each is None else len(each) for each in (thumbnails_train, thumbnails_rows)]
    if counts != [len(y_train), num_rows]:
        raise ValueError(
            f"{counts[0]} training thumbnails beside {len(y_train)} rows of labels, and {counts[1]} others beside "
            f"{num_rows} rows; one thumbnail a row is expected."
        )
    if not num_rows:
        return np.zeros((0, y_train.shape[1]))
    constant = thumbnails_rows.min(axis=(1, 2)) == thumbnails_rows.max(axis=(1, 2))
    return np.where(constant[:, None], np.nan, y_train[audit.nearest(thumbnails_rows, thumbnails_train)[0]])


def evaluate(
    tables: Mapping[str, pd.DataFrame],
    manifest: pd.DataFrame,
    thumbnails: np.ndarray | None,
    class_names: Sequence[str],
    *,
    task: str,
    subsets: Mapping[str, np.ndarray] | None = None,
    constant_only: Collection[str] = (),
    extra: Mapping[str, Answer] | None = None,
    averaged: Sequence[str] | None = None,
    at_half: Sequence[str] = ("f1",),
    reference: str | Mapping[str, str] | None = None,
    num_draws: int = metrics.BOOTSTRAPS,
    seed: int = 0,
) -> list[dict]:
    """Score the test images, all and by subset, beside the baselines, with intervals over groups.

    Thresholds are tuned on the valid rows of each table; baselines learn from the manifest's training rows.

    Args:
        tables: variant -> predictions of all rows of the manifest, in its order; empty for the baselines alone.
        manifest: a row an image, with image_path, split, group_id and the label columns; or a row a study, with
            study_id and no image_path, beside tables of studies (`kerasmed.studies`).
        thumbnails: uint8, shape (num_images, 64, 64), in the manifest's order; None where rows have none, as studies:
            then there is no nearest neighbour but in `extra`.
        class_names: label columns.
        task: what is classified, for the rows.
        subsets: split as the rows name it -> bool mask over the manifest's rows, of which the test rows are scored,
            such as {"test": all, "test, black": black}; None for {"test": all}.
        constant_only: the subsets whose images are all alike, so that a nearest neighbour means nothing: the baselines
            `ON_PIXELS` are left out there.
        extra: further baselines, named in `kerasmed.metrics.BASELINES` -> `Answer` to the test rows, in their order.
        averaged, at_half: of `scores`.
        reference: variant that the others are compared with as well; or variant -> its own.
        num_draws, seed: of the bootstrap.

    Returns:
        List of dicts, of `rows`.

    Raises:
        ValueError: a table does not fit the manifest or was tuned on its test rows, a name or mask does not fit, or a
            subset has no test image.
    """
    split = manifest["split"].to_numpy()
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    subsets = {"test": np.ones(len(manifest), bool)} if subsets is None else subsets
    extra = {} if extra is None else extra
    _refuse_unfit(tables, manifest, subsets, constant_only, extra)
    answers = {
        variant: Answer(
            truth_and_probabilities(table.iloc[test], class_names)[1],
            thresholds(table, class_names),
        )
        for variant, table in tables.items()
    }
    y_true = targets(manifest, class_names)
    pictures = [] if thumbnails is None else [thumbnails[train], thumbnails[test]]
    answers |= baselines(y_true[train], len(test), *pictures) | dict(extra)
    groups = manifest["group_id"].to_numpy()[test]
    scored = []
    for name, mask in subsets.items():
        among = np.asarray(mask)[test]
        left_out = ON_PIXELS if name in constant_only else ()
        scored += rows(
            y_true[test][among],
            {
                variant: Answer(answer.probabilities[among], answer.thresholds)
                for variant, answer in answers.items()
                if variant not in left_out
            },
            groups[among],
            class_names,
            task=task,
            split=name,
            averaged=averaged,
            at_half=at_half,
            reference=reference,
            num_draws=num_draws,
            seed=seed,
        )
    return scored


def _refuse_unfit(tables, manifest, subsets, constant_only, extra) -> None:
    is_test = (manifest["split"] == "test").to_numpy()
    name_of_row = "image_path" if "image_path" in manifest else "study_id"
    for variant, table in tables.items():
        if variant in metrics.BASELINES:
            raise ValueError(f"`tables` name a variant {variant!r}, which is a baseline's name; rename it.")
        if name_of_row not in table or table[name_of_row].tolist() != manifest[name_of_row].tolist():
            raise ValueError(
                f"the table of {variant} has {len(table)} rows that are not the {len(manifest)} of the manifest in "
                f"its order, by {name_of_row}; predict all rows of the manifest."
            )
        seen = manifest[name_of_row][(table["split"] == "valid").to_numpy() & is_test]
        if len(seen):
            raise ValueError(
                f"{len(seen)} test rows are valid rows in the table of {variant}; its thresholds would be tuned on "
                f"them. First: {seen.head(3).tolist()}."
            )
    strange = [name for name in extra if name not in metrics.BASELINES]
    if strange:
        raise ValueError(f"`extra` names {strange}; expected baselines of {metrics.BASELINES}.")
    for name, answer in extra.items():
        if len(answer.probabilities) != is_test.sum():
            raise ValueError(
                f"`extra` answers {len(answer.probabilities)} rows as {name}; expected the {is_test.sum()} test rows."
            )
    strange = [name for name in constant_only if name not in subsets]
    if strange:
        raise ValueError(f"`constant_only` names {strange}; expected some of {list(subsets)}.")
    for name, mask in subsets.items():
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != (len(manifest),):
            raise ValueError(
                f"the mask of {name!r} is {mask.dtype} of shape {mask.shape}; expected bool, {(len(manifest),)}."
            )
        if not (mask & is_test).any():
            raise ValueError(f"the subset {name!r} has no test image; leave it out, or change the split.")


def headline(
    rows: Sequence[Mapping],
    *,
    task: str,
    variant: str,
    metrics: Sequence[str] = ("f1", "average_precision"),
    label: str = "all",
) -> list[Mapping]:
    """Pick the rows that answer the notebook's question, over all test images: of the means, or of a single label."""
    return [
        row
        for row in rows
        if (row["task"], row["variant"], row["split"], row["label"]) == (task, variant, "test", label)
        and row["metric"] in metrics
    ]
