"""Who resembles whom, and whether a split leaks."""

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Correlation above which two thumbnails show the same patient's anatomy. On the public Alzheimer set it finds exactly
# its 200 patients of 32 slices each.
SAME_ANATOMY = 0.98
_BLOCK = 2048


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
