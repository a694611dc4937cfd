"""Classifiers that are no networks, from scikit-learn."""

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
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


def _flat(thumbnails: np.ndarray) -> np.ndarray:
    """Halve and flatten: float32 (num_images, height / 2 · width / 2)."""
    halves = likeness.halve(thumbnails)
    return halves.reshape(len(halves), halves.shape[1] * halves.shape[2])
