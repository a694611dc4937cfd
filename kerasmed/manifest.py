"""The manifest: the table that every reader returns, a row an image (or series).

Columns: `image_path` (relative to the data root, "/" between folders), `patient_id`, `study_id`, `group_id` (what no
split may cut), `split` ("train", "valid", "test"), and label columns with 1 / 0 / NaN for present / absent / unknown.
Optional: `view`, `modality`, `body_part`, `age`, `sex`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

COLUMNS = ("image_path", "patient_id", "study_id", "group_id", "split")
OPTIONAL = ("view", "modality", "body_part", "age", "sex")
SPLITS = ("train", "valid", "test")


def validate(manifest: pd.DataFrame, class_names: Sequence[str], *, exclusive: bool = False) -> pd.DataFrame:
    """Check a manifest and return it unchanged.

    Args:
        manifest: the table.
        class_names: its label columns.
        exclusive: whether exactly one label of a row is 1 (multi-class).

    Returns:
        The same table.

    Raises:
        ValueError: names the column, the first rows and the mend.
    """
    missing = [column for column in (*COLUMNS, *class_names) if column not in manifest.columns]
    if missing:
        raise ValueError(f"manifest lacks the columns {missing}; it has {list(manifest.columns)}.")
    if manifest.empty:
        raise ValueError("manifest has no rows; check the data root and the folder names.")
    paths = manifest["image_path"]
    _refuse(manifest, paths.isna(), "image_path", "is empty", "give every row a path")
    _refuse(manifest, paths.duplicated(keep=False), "image_path", "is not unique", "list every image once")
    _refuse(
        manifest,
        _leave_root(paths),
        "image_path",
        "leaves the data root",
        "use paths relative to the data root, without '..'",
    )
    _refuse(
        manifest,
        ~manifest["split"].isin(SPLITS),
        "split",
        f"is none of {SPLITS}",
        "spell it so, or assign splits first",
    )
    for name in class_names:
        _refuse(
            manifest,
            ~(manifest[name].isin((0, 1)) | manifest[name].isna()),
            name,
            "is not 1, 0 or NaN",
            "write 1 for present, 0 for absent and nothing for unknown",
        )
    if exclusive:
        positives = manifest[list(class_names)].sum(axis=1)
        _refuse(
            manifest,
            positives != 1,
            ", ".join(class_names),
            "mark none or several classes",
            "give each image one class",
        )
    return manifest


def _leave_root(paths: pd.Series) -> pd.Series:
    """Mark absolute paths and those with a folder ".."; few paths hold ".." at all, so few are taken apart."""
    wrong = [path[:1] == "/" or (".." in path and ".." in path.split("/")) for path in paths.astype(str).tolist()]
    return pd.Series(wrong, paths.index, dtype=bool)


def _refuse(manifest, wrong, column, what, mend):
    if wrong.any():
        rows = manifest.loc[wrong, "image_path"].head(3).tolist()
        raise ValueError(
            f"column {column} {what} in {int(wrong.sum())} of {len(manifest)} rows: {mend}. First rows: {rows}."
        )


def class_ids(manifest: pd.DataFrame, class_names: Sequence[str]) -> np.ndarray:
    """Return the position of each row's one positive label in `class_names`, int, shape (num_rows,)."""
    return manifest[list(class_names)].to_numpy().argmax(axis=1)


def targets(manifest: pd.DataFrame, class_names: Sequence[str]) -> np.ndarray:
    """Return the label columns as float32, shape (num_rows, num_classes); NaN stays NaN."""
    return manifest[list(class_names)].to_numpy(dtype="float32")


def samples(manifest: pd.DataFrame, class_names: Sequence[str], *, count: int = 8) -> list[np.ndarray]:
    """Pick images of each class, evenly spread over it.

    Args:
        manifest: rows with label columns.
        class_names: which.
        count: images a class; fewer where it has fewer.

    Returns:
        For each class, positions in the manifest, int, ascending.
    """
    of_class = [np.flatnonzero(manifest[name] == 1) for name in class_names]
    return [found[np.linspace(0, len(found) - 1, min(count, len(found)), dtype=int)] for found in of_class]
