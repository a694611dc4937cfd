"""The manifest: the table that every reader returns, a row an image (or series).

Columns: `image_path` (relative to the data root, "/" between folders; see `check_paths`), `patient_id`, `study_id`,
`group_id` (what no split may cut), `split` ("train", "valid", "test"), and label columns with 1 / 0 / NaN for present /
absent / unknown.
Optional: `view`, `modality`, `body_part`, `age`, `sex`.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

COLUMNS = ("image_path", "patient_id", "study_id", "group_id", "split")
OPTIONAL = ("view", "modality", "body_part", "age", "sex")
SPLITS = ("train", "valid", "test")

# What is wrong with a path, and the mend; the first that fits is told.
_MISFITS = (
    (re.compile(r"\s*"), "is empty", "give every row a path"),
    (re.compile(r"[^\0]*\0.*", re.DOTALL), "holds a NUL byte", "write the table anew"),
    (re.compile(r".*[\ud800-\udfff].*", re.DOTALL), "is not in UTF-8", "rename the file"),
    (re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.*", re.DOTALL), "is a URL", "download the files and name those"),
    (
        re.compile(r"(/|\\|~(/|$)|[A-Za-z]:[\\/]|(.*[\\/])?\.\.([\\/]|$)).*", re.DOTALL),
        "leaves the data root",
        "use paths relative to the data root, without '..'",
    ),
    (re.compile(r".*\\.*", re.DOTALL), "has backslashes", "write '/' between folders"),
    (
        re.compile(r"(.*/)?\.?(/.*)?", re.DOTALL),
        "has a folder '.' or one without a name",
        "write it in its shortest form, as in folder/image.png",
    ),
)
# Any path that is wrong has one of these, between slashes, or is blank or not in UTF-8; so have some that are right.
_SIGNS = ("\0", "\\", "//", "/.", "/~", ":/")


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
    needed = (*COLUMNS, *class_names)
    missing = [column for column in needed if column not in manifest.columns]
    if missing:
        raise ValueError(f"manifest lacks the columns {missing}; it has {list(manifest.columns)}.")
    twice = [column for column in manifest.columns[manifest.columns.duplicated()].unique() if column in needed]
    if twice:
        raise ValueError(f"manifest has the columns {twice} twice; rename or remove one of each.")
    if manifest.empty:
        raise ValueError("manifest has no rows; check the data root and the folder names.")
    paths = manifest["image_path"]
    _refuse(manifest, paths.isna(), "image_path", "is empty", "give every row a path")
    check_paths(paths.tolist())
    _refuse(manifest, paths.duplicated(keep=False), "image_path", "is not unique", "list every image once")
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
        labels = manifest[list(class_names)]
        _refuse(
            manifest,
            ((labels == 1).fillna(False).sum(axis=1) != 1) | labels.isna().any(axis=1),
            ", ".join(class_names),
            "mark none or several classes",
            "give each image one class",
        )
    return manifest


def check_paths(paths: Sequence[str], what: str = "column image_path") -> None:
    """Refuse paths that could lead out of the data root, or are not in the one form that is compared and kept.

    A path is the word of whoever wrote the table: it may not be absolute, hold "..", begin with "~/", or be a URL.
    Links are made by whoever owns the disk, and sets are often linked from a larger one: a data root, a folder or an
    image that is a link is followed, wherever it leads.

    Args:
        paths: relative to the data root.
        what: what they are, for the error.

    Raises:
        ValueError: one is no text, blank, absolute (of any system), a URL, holds "..", ".", an empty folder, a
            backslash or a NUL, or is not in UTF-8; counts them and names the first.
    """
    if set(map(type, paths)) != {str}:
        _raise_misfits([not isinstance(path, str) for path in paths], paths, what, "is no text", "write it as text")
    joined = f"/{'/'.join(paths)}/"  # one look at all, as nearly all sets have none
    if all(map(str.strip, paths)) and not any(sign in joined for sign in _SIGNS) and _is_unicode(joined):
        return
    for pattern, wrong, mend in _MISFITS:
        _raise_misfits([pattern.fullmatch(path) is not None for path in paths], paths, what, wrong, mend)


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; a file's name that is in another encoding cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _raise_misfits(misfits: Sequence[bool], paths: Sequence, what: str, wrong: str, mend: str) -> None:
    if any(misfits):
        first = [path for path, is_misfit in zip(paths, misfits) if is_misfit][:3]
        raise ValueError(f"{what} {wrong} in {sum(misfits)} of {len(paths)} rows: {mend}. First rows: {first}.")


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
