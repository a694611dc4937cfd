"""What else than the picture tells the classes apart: sizes, grey levels, borders, file types."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from kerasmed import metrics

# AUROC that the lower end of a probe's interval must exceed to be called a shortcut.
SHORTCUT = 0.7
_FOLDS = 5
_HISTOGRAM_BLOCK = 64  # images whose pixels are counted at once: 64-bit indices of 64 images of 512² are 134 MB


def grey_levels(images: np.ndarray) -> np.ndarray:
    """Count the pixels of each grey level in each image.

    Args:
        images: uint8 array, shape (num_images, height, width).

    Returns:
        int64 array, shape (num_images, 256); a row sums to height * width.
    """
    counts = np.zeros((len(images), 256), np.int64)
    for start in range(0, len(images), _HISTOGRAM_BLOCK):
        block = images[start : start + _HISTOGRAM_BLOCK]
        # A range of 256 numbers an image, so that one count does for the whole block.
        levels = block.reshape(len(block), -1) + 256 * np.arange(len(block))[:, None]
        counts[start : start + len(block)] = np.bincount(levels.ravel(), minlength=256 * len(block)).reshape(-1, 256)
    return counts


def class_means(images: np.ndarray, membership: np.ndarray) -> np.ndarray:
    """Average the images of each class, pixel by pixel.

    Args:
        images: uint8 array, shape (num_images, height, width).
        membership: bool array, shape (num_images, num_classes); an image may be in several classes or in none.

    Returns:
        float32 array, shape (num_classes, height, width), 0–255; NaN for a class without images.
    """
    totals = np.zeros((membership.shape[1], *images.shape[1:]), np.float64)
    for start in range(0, len(images), _HISTOGRAM_BLOCK):
        block = images[start : start + _HISTOGRAM_BLOCK].astype(np.float32)
        totals += np.tensordot(membership[start : start + len(block)].astype(np.float32), block, axes=(0, 0))
    count = membership.sum(axis=0)[:, None, None]
    return np.divide(totals, count, out=np.full_like(totals, np.nan), where=count > 0).astype(np.float32)


def by_class(manifest: pd.DataFrame, class_names: Sequence[str], measures: pd.DataFrame) -> pd.DataFrame:
    """Compare what can be measured without reading a picture between the classes: file size, shape, mean intensity.

    AUROC is the chance that an image of the class has the larger value than one that is not of it, ties half: 0.5
    where the measure tells nothing of the class, near 0 or 1 where a network needs nothing else.

    Args:
        manifest: rows with label columns; NaN is neither of the class nor not of it.
        class_names: label columns.
        measures: a column a measure, beside the manifest; NaN where it is unknown.

    Returns:
        DataFrame, a row a measure and class: measure, class, images, q25, median, q75, auroc; NaN where undefined.
    """
    if len(measures) != len(manifest):
        raise ValueError(
            f"{len(measures)} rows of measures for {len(manifest)} of the manifest; one a row is expected."
        )
    records = []
    for measure in measures:
        values = measures[measure].to_numpy(float, na_value=np.nan)
        for name in class_names:
            label = manifest[name].to_numpy(float, na_value=np.nan)
            known = np.isfinite(values) & np.isfinite(label)
            of_class = values[known & (label == 1)]
            quartiles = np.percentile(of_class, [25, 50, 75]) if len(of_class) else np.full(3, np.nan)
            area = (
                metrics.auroc(label[known] == 1, values[known], np.ones((1, known.sum()))) if known.any() else [np.nan]
            )
            records.append((measure, name, len(of_class), *quartiles.tolist(), float(area[0])))
    return pd.DataFrame(records, columns=["measure", "class", "images", "q25", "median", "q75", "auroc"])


def measure(files: pd.DataFrame, thumbnails: np.ndarray) -> pd.DataFrame:
    """Measure what can be known of images without looking at what they show.

    Args:
        files: of `kerasmed.images.headers`, beside the thumbnails.
        thumbnails: uint8 array, shape (num_images, 64, 64).

    Returns:
        DataFrame of float, a row an image: bytes, height, width, bits (a channel), format and mode (numbered by
        name), mean intensity, border intensity and border spread (mean and standard deviation of the outermost pixels
        of the thumbnail).
    """
    table = files[["bytes", "height", "width", "bits"]].astype(float).reset_index(drop=True)
    for name in ("format", "mode"):
        table[name] = pd.Categorical(files[name]).codes.astype(float)
    edge = np.ones(thumbnails.shape[1:], bool)
    edge[1:-1, 1:-1] = False
    border = thumbnails[:, edge].astype(np.float32)
    return table.assign(
        **{
            "mean intensity": thumbnails.mean(axis=(1, 2)),
            "border intensity": border.mean(axis=1),
            "border spread": border.std(axis=1),
        }
    )


def probe(
    measures: pd.DataFrame, targets: pd.DataFrame, groups: Sequence, *, num_draws: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Ask how well measures alone predict a label, or the split, of images of groups never seen.

    Boosted trees learn each target in five folds by group; a network that scores no better than this may have learnt
    how its images were made. 0.5 is chance.

    Args:
        measures: of `measure`; NaN where unknown, else not below 0.
        targets: a column a target, 1 / 0 / NaN, beside the measures.
        groups: shape (num_images,): what no fold may cut.
        num_draws: bootstrap draws over groups for the interval.
        seed: of folds, trees and draws.

    Returns:
        DataFrame, a row a target: target, images, positives, auroc, low, high (95 %), strongest (the measure that is
        furthest from 0.5 alone), alone (its AUROC), reason ("" or why there is no figure, and then no other).

    Raises:
        ValueError: measures, targets and groups have not the same rows.
    """
    if not len(measures) == len(targets) == len(groups):
        raise ValueError(
            f"{len(measures)} rows of measures, {len(targets)} of targets and {len(groups)} of groups; "
            "each wants one an image."
        )
    groups = pd.factorize(np.asarray(groups))[0]
    columns = ["target", "images", "positives", "auroc", "low", "high", "strongest", "alone", "reason"]
    records = [_probe_one(name, targets[name], measures, groups, num_draws, seed) for name in targets]
    return pd.DataFrame(records, columns=columns)


def classify(
    measures: pd.DataFrame, class_ids: np.ndarray, train: np.ndarray, num_classes: int, *, seed: int = 0
) -> np.ndarray:
    """Baseline: tell exclusive classes from measures alone, by boosted trees that learn from the training images.

    Args:
        measures: of `measure`, a row an image; NaN where unknown, else not below 0.
        class_ids: int, shape (num_train,): of the training images.
        train: int, shape (num_train,): their rows.
        num_classes: how many classes there are; one that no training image has gets 0.
        seed: of the trees.

    Returns:
        float array, shape (num_images, num_classes): probabilities for every image.
    """
    x = np.nan_to_num(measures.to_numpy(float, na_value=np.nan), nan=-1)
    told = np.zeros((len(x), num_classes))
    if len(np.unique(class_ids)) == 1:  # trees refuse to learn nothing
        told[:, class_ids[0]] = 1
        return told
    with threadpool_limits(1, user_api="openmp"):
        trees = HistGradientBoostingClassifier(max_iter=50, random_state=seed).fit(x[train], class_ids)
        told[:, trees.classes_] = trees.predict_proba(x)
    return told


def _probe_one(name, target, measures, groups, num_draws, seed) -> dict:
    label = target.to_numpy(float, na_value=np.nan)
    known = np.isfinite(label)
    positive, groups, x = label[known] == 1, groups[known], measures.to_numpy(float, na_value=np.nan)[known]
    record = {"target": name, "images": len(positive), "positives": int(positive.sum())}
    if min(len(set(groups[positive])), len(set(groups[~positive]))) < _FOLDS:
        return record | {"reason": f"fewer than {_FOLDS} groups with, or without, it"}
    folds, scores = _folds(positive, groups, seed), np.zeros(len(positive))
    filled = np.nan_to_num(x, nan=-1)  # trees refuse a column without any value
    # One thread: on so few columns, several wait for one another far longer than they work.
    with threadpool_limits(1, user_api="openmp"):
        for fold in range(_FOLDS):
            learn, held_out = folds != fold, folds == fold
            trees = HistGradientBoostingClassifier(max_iter=50, random_state=seed).fit(filled[learn], positive[learn])
            scores[held_out] = trees.predict_proba(filled[held_out])[:, 1]
    once = np.ones((1, len(positive)))
    draws = metrics.bootstrap_weights(groups, num_draws=num_draws, seed=seed)
    low, high = metrics.interval(metrics.auroc(positive, scores, draws)) or (np.nan, np.nan)
    alone = {}
    for measure, column in zip(measures, x.T):
        finite = np.isfinite(column)
        alone[measure] = metrics.auroc(positive[finite], column[finite], once[:, finite])[0] if finite.any() else np.nan
    strongest = max(alone, key=lambda measure: np.nan_to_num(abs(alone[measure] - 0.5)))
    return record | {
        "auroc": float(metrics.auroc(positive, scores, once)[0]),
        "low": low,
        "high": high,
        "strongest": strongest,
        "alone": float(alone[strongest]),
        "reason": "",
    }


def _folds(positive: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Deal groups out to folds at random, those with a positive and those with a negative evenly: int (num_images,)."""
    table = pd.DataFrame({"group": groups, "positive": positive}).groupby("group")["positive"].agg(["min", "max"])
    table = table.sample(frac=1, random_state=seed)
    # Groups of both kinds come between those of one, so that either kind is dealt out in one run.
    order = table.sum(axis=1).sort_values(kind="stable").index
    return pd.Series(np.arange(len(order)) % _FOLDS, order).loc[groups].to_numpy()
