"""Studies: a network answers images one by one, but labels are given to studies, so studies are what is reported.

A study is the images that share a `study_id`. Its probability is the arithmetic mean over them. `table` makes a
manifest a row a study, `predictions` a table of predictions of it, in the same order; both fit `kerasmed.multilabel`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def study_probability(image_probabilities: Sequence[float], study_ids: Sequence) -> pd.Series:
    """Average image probabilities into one probability per study.

    MURA labels studies, so an image score is not yet a prediction.

    Args:
        image_probabilities: float array, shape (num_images,), in [0, 1].
        study_ids: array, shape (num_images,); order is free.

    Returns:
        Series of float, one per study, indexed by sorted study id.

    Raises:
        ValueError: lengths differ, a study id is missing, or a probability is NaN or outside [0, 1].

    Example:
        >>> study_probability([0.2, 0.6, 0.9], ["a", "a", "b"]).round(1).to_dict()
        {'a': 0.4, 'b': 0.9}

    Source: Rajpurkar et al. 2018, arXiv:1712.06957, section 3.
    """
    values, ids = np.asarray(image_probabilities, np.float64), pd.Index(study_ids, name="study_id")
    if values.shape != (len(ids),):
        raise ValueError(
            f"`image_probabilities` have shape {values.shape} beside {len(ids)} study ids; expected one an image, "
            f"shape {(len(ids),)}. Pass one class at a time."
        )
    _refuse_missing(ids, np.arange(len(ids)))
    _refuse_improbable(values, "`image_probabilities`", ids)
    return pd.Series(values, name="probability").groupby(ids).mean()


def table(manifest: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Make a table of studies of a manifest of images.

    Args:
        manifest: a row an image, as of `kerasmed.manifest`, with study_id in every row.
        class_names: label columns.

    Returns:
        DataFrame, a row a study, sorted by study_id: study_path (the folder of its images, relative to the data root),
        patient_id, study_id, group_id, split, body_part where the manifest has it, the label columns, and images (how
        many the study has).

    Raises:
        ValueError: a row has no study_id, or the images of a study differ in folder, patient, group, split, body part
            or a label; unknown (NaN) equals unknown.
    """
    body_part = ["body_part"] if "body_part" in manifest else []
    studies, study_of_image = _gather(manifest, ["split", *body_part, *class_names])
    return studies.assign(images=np.bincount(study_of_image, minlength=len(studies)))


def predictions(table: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Average a table of image predictions into one of study predictions.

    Args:
        table: a row an image, as of `kerasmed.predictions`, of one variant, with study_id in every row.
        class_names: label columns.

    Returns:
        DataFrame, a row a study, sorted by study_id, so that it is in the order of `table` of the same images:
        study_path, patient_id, study_id, group_id, split, variant, y_<class>, p_<class> (the arithmetic mean over the
        study's images) and images.

    Raises:
        ValueError: as `table` does, or a probability is NaN or outside [0, 1].
    """
    told = [f"p_{name}" for name in class_names]
    studies, study_of_image = _gather(table, ["split", "variant", *(f"y_{name}" for name in class_names)])
    for name in told:
        _refuse_improbable(table[name].to_numpy(float), name, table["study_id"])
    means = table[told].groupby(study_of_image).mean()
    return studies.assign(**means, images=np.bincount(study_of_image, minlength=len(studies)))


def _gather(rows, shared) -> tuple[pd.DataFrame, np.ndarray]:
    """Studies with the columns that their images share, and the study of each image, int, shape (num_images,)."""
    _refuse_missing(rows["study_id"], rows["image_path"])
    study_of_image, _ = pd.factorize(rows["study_id"], sort=True)
    _, first = np.unique(study_of_image, return_index=True)
    columns = rows[["patient_id", "study_id", "group_id", *shared]].copy()
    columns.insert(0, "study_path", [path.rpartition("/")[0] for path in rows["image_path"]])
    for name in columns:
        # Numbers of the distinct values: any type can be compared so, and what is missing equals what is missing.
        values, _ = pd.factorize(columns[name])
        differs = values != values[first][study_of_image]
        if differs.any():
            found = columns["study_id"].iloc[first[np.unique(study_of_image[differs])]]
            raise ValueError(
                f"the images of {len(found)} of {len(first)} studies differ in {name}, but a study is one row: give "
                f"the images of a study the same {name}, or those of other studies an id of their own. "
                f"First: {found.head(3).tolist()}."
            )
    return columns.iloc[first].reset_index(drop=True), study_of_image


def _refuse_missing(study_ids, names) -> None:
    missing = np.asarray(study_ids.isna())
    if missing.any():
        raise ValueError(
            f"study_id is missing in {missing.sum()} of {len(missing)} rows: give every image its study, or leave the "
            f"rows out. First: {np.asarray(names)[missing][:3].tolist()}."
        )


def _refuse_improbable(values, name, study_ids) -> None:
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(wrong):
        first = [f"{value:.3g} in {study}" for value, study in zip(values[wrong[:3]], np.asarray(study_ids)[wrong[:3]])]
        raise ValueError(
            f"{name} are NaN or outside [0, 1] in {len(wrong)} of {len(values)} rows: predict every image, and give "
            f"probabilities, no logits. First: {', '.join(first)}."
        )
