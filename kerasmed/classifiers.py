"""Classifiers that are no networks, from scikit-learn."""

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from kerasmed.audit import likeness


def svc_on_pixels(
    thumbnails: np.ndarray, y: np.ndarray, queries: np.ndarray, *, max_images: int = 3000, seed: int = 0
) -> np.ndarray:
    """Baseline: learn each label with a support vector machine on pixels, and answer other images.

    The pixels of thumbnails at half their side, standardised; radial kernel, C = 1, gamma "scale"; probabilities by
    Platt's sigmoid on scores of five folds.

    Args:
        thumbnails: uint8 array, shape (num_images, 64, 64), to learn from.
        y: float array, shape (num_images, num_labels): 1, 0 or NaN (left out of that label).
        queries: uint8 array, shape (num_queries, 64, 64).
        max_images: learn from at most so many, drawn at random: time grows with their square.
        seed: of the draw and of the folds.

    Returns:
        float array, shape (num_queries, num_labels). A label of fewer than 5 images of either kind gets its share.
    """
    drawn = np.random.default_rng(seed).permutation(len(y))[:max_images]
    x, answered = (_flat(images) for images in (thumbnails[np.sort(drawn)], queries))
    told = np.zeros((len(queries), y.shape[1]))
    for position, label in enumerate(y[np.sort(drawn)].T):
        known = np.isfinite(label)
        counts = np.bincount(label[known].astype(int), minlength=2)
        if counts.min() < 5:
            told[:, position] = counts[1] / max(counts.sum(), 1)
            continue
        parts = StratifiedKFold(5, shuffle=True, random_state=seed)
        machine = CalibratedClassifierCV(make_pipeline(StandardScaler(), SVC()), cv=parts, ensemble=False)
        machine.fit(x[known], label[known])
        told[:, position] = machine.predict_proba(answered)[:, 1] if len(answered) else []
    return told


def logistic_on_table(
    values_train: np.ndarray, y_train: np.ndarray, values_rows: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Baseline: learn each label by logistic regression on a table of numbers, such as age, sex and view.

    Columns are standardised over all training rows; an unknown value stands as its column's mean, and each column with
    unknown training values gets a second one that marks them, so that "unknown" is learnt and is not taken for a mean
    one. Ridge penalty, C = 1.

    Args:
        values_train: float array, shape (num_train, num_columns); NaN is unknown.
        y_train: float array, shape (num_train, num_labels): 1, 0 or NaN (left out of that label).
        values_rows: float array, shape (num_rows, num_columns), to answer.
        seed: of the solver, for those that draw; the present one, L-BFGS, does not.

    Returns:
        float64 array, shape (num_rows, num_labels): probabilities. A label of one kind only gets its share, 0 where it
        is never known.

    Raises:
        ValueError: lengths or columns differ, there is no training row, or a value is infinite.
    """
    values_train, values_rows = (np.asarray(values, np.float64) for values in (values_train, values_rows))
    if not len(values_train) or len(values_train) != len(y_train) or values_train.shape[1:] != values_rows.shape[1:]:
        raise ValueError(
            f"training values of shape {values_train.shape} beside labels of shape {np.shape(y_train)}, and other "
            f"values of shape {values_rows.shape}; expected as many training rows as labels, at least one, and the "
            "same columns."
        )
    prepare = make_pipeline(SimpleImputer(add_indicator=True, keep_empty_features=True), StandardScaler())
    x = prepare.fit_transform(values_train)
    asked = prepare.transform(values_rows) if len(values_rows) else np.zeros((0, x.shape[1]))
    told = np.zeros((len(values_rows), y_train.shape[1]))
    for position, label in enumerate(y_train.T):
        known = np.isfinite(label)
        if len(np.unique(label[known])) < 2:
            told[:, position] = label[known].mean() if known.any() else 0
        elif len(asked):
            model = LogisticRegression(max_iter=1000, random_state=seed).fit(x[known], label[known])
            told[:, position] = model.predict_proba(asked)[:, 1]
    return told


def _flat(thumbnails: np.ndarray) -> np.ndarray:
    """Halve and flatten: float32 (num_images, height / 2 · width / 2)."""
    halves = likeness.halve(thumbnails)
    return halves.reshape(len(halves), halves.shape[1] * halves.shape[2])
