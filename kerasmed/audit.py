"""Who resembles whom, whether a split leaks, and what else than the picture tells the classes apart."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kerasmed import metrics

# Correlation above which two thumbnails show the same patient's anatomy. On the public Alzheimer set it finds exactly
# its 200 patients of 32 slices each.
SAME_ANATOMY = 0.98
_BLOCK = 2048
_HISTOGRAM_BLOCK = 64  # images whose pixels are counted at once: 64-bit indices of 64 images of 512² are 134 MB


class LeakError(ValueError):
    """A patient, study or group lies in two splits."""


def standardize(thumbnails: np.ndarray) -> np.ndarray:
    """Flatten thumbnails to mean 0 and length 1, so that a dot product is their correlation.

    Args:
        thumbnails: array, shape (num_images, height, width).

    Returns:
        float32 array, shape (num_images, height * width); constant images become zeros and correlate with nothing.
    """
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, length, out=np.zeros_like(flat), where=length > 0)


def similarity_groups(thumbnails: np.ndarray, *, threshold: float = SAME_ANATOMY) -> np.ndarray:
    """Group images whose thumbnails correlate above a threshold, directly or through others.

    Where patients are unknown this recovers them: slices of one head correlate, heads do not. Constant images have no
    correlation; those of one value form one group, as they are the same image.

    Args:
        thumbnails: uint8 array, shape (num_images, 64, 64).
        threshold: correlation in (0, 1); see `SAME_ANATOMY`.

    Returns:
        int array, shape (num_images,): group of each image, numbered by first appearance.

    Raises:
        ValueError: threshold out of range.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` is {threshold}; a correlation between 0 and 1 is expected.")
    vectors = standardize(thumbnails)
    pairs = []
    for start in range(0, len(vectors), _BLOCK):
        for other in range(start, len(vectors), _BLOCK):
            rows, columns = np.nonzero(vectors[start : start + _BLOCK] @ vectors[other : other + _BLOCK].T > threshold)
            pairs.append((rows + start, columns + other))
    constant = np.flatnonzero(~vectors.any(axis=1))
    if len(constant):
        values = thumbnails[constant, 0, 0]
        first = {value: row for row, value in zip(constant[::-1], values[::-1])}
        pairs.append((constant, np.array([first[value] for value in values])))
    rows, columns = (np.concatenate(side) for side in zip(*pairs)) if pairs else (np.zeros(0, int),) * 2
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(vectors),) * 2)
    return connected_components(graph, directed=False)[1]


def assign_groups(
    manifest: pd.DataFrame, thumbnails: np.ndarray, *, prefix: str, threshold: float = SAME_ANATOMY
) -> pd.DataFrame:
    """Fill `group_id` from `similarity_groups` where a manifest has none, and leave one that has it as it is.

    Args:
        manifest: rows with `group_id`, known in every row or in none.
        thumbnails: uint8 array, shape (num_rows, 64, 64), beside the manifest.
        prefix: of the names, which are `<prefix>-<five digits>`.
        threshold: of `similarity_groups`.

    Returns:
        A copy with `group_id`.

    Raises:
        ValueError: groups known in some rows only, or not one thumbnail a row.
    """
    missing = manifest["group_id"].isna()
    if not missing.any():
        return manifest.copy()
    if not missing.all():
        raise ValueError(
            f"`group_id` is missing in {int(missing.sum())} of {len(manifest)} rows; give it in all, or in none. "
            f"First: {manifest.loc[missing, 'image_path'].head(3).tolist()}."
        )
    if len(thumbnails) != len(manifest):
        raise ValueError(f"{len(thumbnails)} thumbnails for {len(manifest)} rows; one a row is expected.")
    found = similarity_groups(thumbnails, threshold=threshold)
    return manifest.assign(group_id=[f"{prefix}-{number:05d}" for number in found])


def nearest(queries: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the most correlated reference thumbnail of each query.

    Args:
        queries: array, shape (num_queries, height, width).
        references: array, shape (num_references, height, width), at least one.

    Returns:
        int array of positions in `references` and float array of correlations, each of shape (num_queries,).
    """
    if not len(references):
        raise ValueError("`references` is empty; a nearest neighbour needs at least one training image.")
    reference_vectors = standardize(references).T
    positions, correlations = [], []
    for start in range(0, len(queries), _BLOCK):
        similarity = standardize(queries[start : start + _BLOCK]) @ reference_vectors
        positions.append(similarity.argmax(axis=1))
        correlations.append(similarity.max(axis=1))
    return np.concatenate(positions), np.concatenate(correlations)


def gate(manifest: pd.DataFrame) -> pd.DataFrame:
    """Refuse to go on where a split leaks: call it before every training.

    Args:
        manifest: rows with `split`, `group_id`, `patient_id`, `study_id`; ids may be NaN but for `group_id`.

    Returns:
        DataFrame of what was checked: id column, number of ids, number in several splits (all 0).

    Raises:
        LeakError: an id lies in several splits; counts and first offenders.
        ValueError: a row has no group.
    """
    if manifest["group_id"].isna().any():
        raise ValueError(
            f"{int(manifest['group_id'].isna().sum())} rows have no `group_id`; the gate cannot vouch for them."
        )
    checked = []
    for column in ("group_id", "patient_id", "study_id"):
        splits = (
            manifest.dropna(subset=[column])
            .groupby(column)["split"]
            .agg(["nunique", lambda s: "+".join(sorted(set(s)))])
        )
        crossing = splits[splits["nunique"] > 1]
        if len(crossing):
            first = ", ".join(f"{name} in {where}" for name, where in crossing.iloc[:5, 1].items())
            raise LeakError(
                f"{len(crossing)} of {len(splits)} values of {column} lie in several splits: {first}. "
                "Split by `group_id` with `splits.assign`."
            )
        checked.append({"id": column, "known": len(splits), "in several splits": 0})
    return pd.DataFrame(checked)


def crossing(manifest: pd.DataFrame) -> pd.DataFrame:
    """Count the images of validation and test whose group is in train as well: what a split leaks.

    Args:
        manifest: rows with `split` and `group_id`.

    Returns:
        DataFrame indexed by split (those of valid and test that occur): images, groups, groups_in_train,
        images_in_train (images of these groups), share_in_train (of the images).

    Raises:
        ValueError: a row has no group.
    """
    if manifest["group_id"].isna().any():
        raise ValueError(
            f"{int(manifest['group_id'].isna().sum())} rows have no `group_id`; fill it with `assign_groups` first."
        )
    in_train = manifest["group_id"].isin(manifest.loc[manifest["split"] == "train", "group_id"])
    records = []
    for split in ("valid", "test"):
        chosen = manifest["split"] == split
        if chosen.any():
            leaked = manifest.loc[chosen & in_train, "group_id"]
            records.append(
                {
                    "split": split,
                    "images": int(chosen.sum()),
                    "groups": manifest.loc[chosen, "group_id"].nunique(),
                    "groups_in_train": leaked.nunique(),
                    "images_in_train": len(leaked),
                    "share_in_train": len(leaked) / int(chosen.sum()),
                }
            )
    columns = ["split", "images", "groups", "groups_in_train", "images_in_train", "share_in_train"]
    return pd.DataFrame(records, columns=columns).set_index("split")


# --- shortcuts -------------------------------------------------------------------------------------------------------


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
