"""Probabilities of independent labels made honest: of the images said to be 20 % likely, 20 % have the label.

A network trained with weights answers as if labels were balanced; `remove_weights` takes that back. What it is then too
sure of, one temperature mends, fitted on validation. Neither changes which image ranks above which, so AUROC and
average precision of a label stay; thresholds must be tuned anew.

A probability of 0 counts as the smallest normal float32, 1.2e-38, and one of 1 as the largest float64 below it,
1 − 1.1e-16: logits of −87.3 and 36.7. They stay finite, and no two float32 probabilities between become equal.

Source: Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599, with exclusive classes and bins
of equal width; here bins are of equal count, as most probabilities of rare labels lie in the first of ten equal widths.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit

from kerasmed import metrics, multilabel

LOWEST, HIGHEST = float(np.finfo(np.float32).tiny), 1 - float(np.finfo(np.float64).epsneg)
TEMPERATURES = (0.05, 20.0)  # between which one is looked for


def logits(probabilities: np.ndarray) -> np.ndarray:
    """Return log(p / (1 − p)), float64, finite also at 0 and 1.

    Example:
        >>> logits([0, 0.5, 0.75, 1]).round(4).tolist()
        [-87.3365, 0.0, 1.0986, 36.7368]
    """
    clipped = np.clip(np.asarray(probabilities, np.float64), LOWEST, HIGHEST)
    return np.log(clipped) - np.log1p(-clipped)


def remove_weights(
    probabilities: np.ndarray, positive_weights: Sequence[float], negative_weights: Sequence[float]
) -> np.ndarray:
    """Take back what the weights of a cross-entropy add to the probabilities.

    Where the true chance is π, −w⁺ · y · log p − w⁻ · (1 − y) · log(1 − p) is least, on average, at
    p = w⁺π / (w⁺π + w⁻(1 − π)): a logit too high by log(w⁺ / w⁻). This subtracts it.

    Args:
        probabilities: shape (num_images, num_labels), of a network trained with these weights.
        positive_weights, negative_weights: w⁺ and w⁻ of each label, above 0: in `WeightedBinaryCrossentropy` the share
            of negatives and the share of positives in the training split.

    Returns:
        float64 array, shape (num_images, num_labels).

    Raises:
        ValueError: not one weight a label, or one that is not above 0.

    Example:
        >>> remove_weights(np.array([[0.5], [0.9]]), [0.9], [0.1]).round(3).tolist()  # one image in ten is positive
        [[0.1], [0.5]]
    """
    given = {"positive_weights": positive_weights, "negative_weights": negative_weights}
    for name, weights in given.items():
        weights = np.asarray(weights, np.float64)
        if weights.shape != np.shape(probabilities)[1:] or not (np.isfinite(weights) & (weights > 0)).all():
            raise ValueError(
                f"`{name}` are {weights.tolist()} beside probabilities of shape {np.shape(probabilities)}; expected a "
                "finite one above 0 for each label."
            )
    shift = np.log(np.asarray(positive_weights, np.float64)) - np.log(np.asarray(negative_weights, np.float64))
    return expit(logits(probabilities) - shift)


def fit_temperature(y_true: np.ndarray, probabilities: np.ndarray) -> float:
    """Find the temperature T that minimises the mean cross-entropy of sigmoid(logit / T), over all known entries.

    Above 1 where the network is too sure, below 1 where it is not sure enough. Fit it on validation rows, never on
    test rows.

    Args:
        y_true: float array, shape (num_images, num_labels): 1, 0 or NaN.
        probabilities: of the same shape, in [0, 1].

    Returns:
        T, within `TEMPERATURES`; near the low end where no label is told wrong, near the high end where the
        probabilities tell nothing.

    Raises:
        ValueError: unlike shapes, a value out of range, or no known label.
    """
    truth, told = _known(y_true, probabilities)
    wrong = (1 - 2 * truth) * logits(told)  # the logit of the other answer

    def loss(log_temperature):
        return np.logaddexp(0, wrong / np.exp(log_temperature)).mean()

    # In 1 / T the loss is convex: it has one minimum.
    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return sigmoid(logit / T), float64; T = 1 changes nothing, a larger one draws probabilities towards one half.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> apply_temperature([0.5, 0.8, 0.9], 2.0).round(3).tolist()  # odds of 1, 4, 9 become 1, 2, 3
        [0.5, 0.667, 0.75]
    """
    if not 0 < temperature < np.inf:
        raise ValueError(
            f"`temperature` is {temperature}; expected a finite one above 0, such as of `fit_temperature`."
        )
    return expit(logits(probabilities) / temperature)


def reliability(y_true: np.ndarray, probabilities: np.ndarray, *, bins: int = 10) -> pd.DataFrame:
    """Set what was said beside what was so, in bins of equal count over all known entries.

    Equal probabilities stay in one bin, so bins may be uneven, and fewer than asked for. For one label pass its column:
    `y_true[:, [0]], probabilities[:, [0]]`.

    Args:
        y_true: float array, shape (num_images, num_labels): 1, 0 or NaN.
        probabilities: of the same shape, in [0, 1].
        bins: how many, at most.

    Returns:
        DataFrame, a row a bin, lowest first: mean_probability, observed (share of positives), n (entries).

    Raises:
        ValueError: unlike shapes, a value out of range, no known label, or fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"`bins` is {bins}; expected at least 1 (10 are usual).")
    truth, told = _known(y_true, probabilities)
    edges = np.sort(told)[np.arange(1, bins) * len(told) // bins]  # the first of each bin but the lowest
    number = np.searchsorted(edges, told, side="right")
    n = np.bincount(number, minlength=bins)
    sums = {"mean_probability": told, "observed": truth}
    table = {name: np.bincount(number, values, bins)[n > 0] / n[n > 0] for name, values in sums.items()}
    return pd.DataFrame({**table, "n": n[n > 0]})


def expected_calibration_error(y_true: np.ndarray, probabilities: np.ndarray, *, bins: int = 10) -> float:
    """Mean distance between what was said and what was so: Σ_b n_b / N · |observed_b − mean_probability_b|.

    Over the bins of `reliability`, whose arguments and errors it has. 0 is honest, and not yet good: who answers the
    prevalence everywhere is honest as well.
    """
    table = reliability(y_true, probabilities, bins=bins)
    return float(np.average((table["observed"] - table["mean_probability"]).abs(), weights=table["n"]))


def brier(y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> pd.Series:
    """Mean squared distance of probability and label, over the known rows of each label; 0 is perfect.

    Args:
        y_true: float array, shape (num_images, num_labels): 1, 0 or NaN.
        probabilities: of the same shape, in [0, 1].
        class_names: of the labels.

    Returns:
        Series of float by label, first "all", the mean over the labels; a label that is never known is NaN, and left
        out of the mean.

    Raises:
        ValueError: unlike shapes, a value out of range, or no known label.
    """
    _known(y_true, probabilities)
    y_true, probabilities = np.asarray(y_true, np.float64), np.asarray(probabilities, np.float64)
    known = ~np.isnan(y_true)
    values = metrics.ratio(np.where(known, (probabilities - y_true) ** 2, 0).sum(axis=0), known.sum(axis=0))
    return pd.Series([np.nanmean(values), *values], index=["all", *class_names], name="brier")


def _known(y_true, probabilities) -> tuple[np.ndarray, np.ndarray]:
    """Check both, and return the labels and probabilities of all known entries, flat, float64."""
    y_true, probabilities = np.asarray(y_true, np.float64), np.asarray(probabilities, np.float64)
    multilabel.check(y_true, probabilities)
    known = ~np.isnan(y_true)
    if not known.any():
        raise ValueError(f"none of the {y_true.size} labels is known; calibration needs some that are 1 or 0.")
    return y_true[known], probabilities[known]
