"""Grouped, stratified splits: no patient, study or similarity group is ever cut."""

import warnings

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

_NUM_DEALS = 100
_MAX_LABEL_SETS = 32  # more are not kept in their shares: most of ChestX-ray14's 836 occur in one image


def assign(
    manifest: pd.DataFrame, class_names, *, test_share: float = 0.15, valid_share: float = 0.15, seed: int = 0
) -> pd.DataFrame:
    """Split rows anew into train, valid and test by `group_id`, with each class's share kept.

    The groups are dealt into twenty stratified folds, and whole folds make up the splits, so shares are met to about
    one twentieth of the images, or one group where groups are large. A class of one group goes to train, one of two to
    train and test, as far as a hundred deals of the folds allow; `groups_per_split` shows it.

    Args:
        manifest: rows with `group_id` and label columns, none unknown.
        class_names: label columns. Where they do not exclude each other, each combination is kept in its share, or,
            of more than 32 combinations, the images by the rarest of their labels.
        test_share: share of images in test, in [0, 1).
        valid_share: share of images in valid, in (0, 1); with `test_share` below 1.
        seed: of the shuffle.

    Returns:
        A copy with `split` assigned.

    Raises:
        ValueError: missing group ids, unknown labels, shares out of range, fewer than three groups.
    """
    if not (test_share >= 0 and valid_share > 0 and test_share + valid_share < 1):
        raise ValueError(
            f"shares are test {test_share} and valid {valid_share}; expected test >= 0, valid > 0, together below 1."
        )
    num_folds = _limit_folds(manifest, class_names, 20)
    fold = folds(manifest, class_names, num_folds=num_folds, seed=seed)
    num_test = max(1, round(test_share * num_folds)) if test_share else 0
    num_valid = max(1, round(valid_share * num_folds))
    if num_test + num_valid >= num_folds:
        raise ValueError(
            f"{manifest['group_id'].nunique()} groups are too few for shares of test {test_share} and valid "
            f"{valid_share}; lower them or add data."
        )
    splits = np.array(["test"] * num_test + ["valid"] * num_valid + ["train"] * (num_folds - num_test - num_valid))
    present = np.zeros((num_folds, len(class_names)), bool)
    np.logical_or.at(present, fold, manifest[list(class_names)].to_numpy() == 1)
    # Where a class has few groups, chance may leave none to train on: the first of some deals of the folds that gives
    # most classes to train, then to test, then to valid is taken.
    rng = np.random.default_rng(seed)
    deals = [splits] + [rng.permutation(splits) for _ in range(_NUM_DEALS)]
    best = max(
        deals, key=lambda deal: [present[deal == split].any(axis=0).sum() for split in ("train", "test", "valid")]
    )
    return manifest.assign(split=best[fold])


def cross_validate(
    manifest: pd.DataFrame, class_names, *, num_folds: int = 5, valid_share: float = 0.15, seed: int = 0
) -> list[pd.DataFrame]:
    """Split rows anew once per fold, so that every group is tested once, by a model that has not seen it.

    A fold is the test split; validation is carved off the rest by `assign`, which sees to it that a class of few
    groups is in train first.

    Args:
        manifest: rows with `group_id` and label columns, none unknown.
        class_names: label columns, as in `assign`.
        num_folds: at least 2; fewer are made where there are fewer groups.
        valid_share: share of all images in each fold's valid.
        seed: of the shuffles.

    Returns:
        A copy of the manifest with `split` assigned, for each fold.

    Raises:
        ValueError: fewer than 2 folds, or as in `assign`.
    """
    if num_folds < 2:
        raise ValueError(f"`num_folds` is {num_folds}; expected at least 2, or one split with `assign`.")
    fold = folds(manifest, class_names, num_folds=num_folds, seed=seed)
    splits = []
    for number in range(fold.max() + 1):
        rest = manifest[fold != number]
        share = valid_share * len(manifest) / len(rest)
        rest = assign(rest, class_names, test_share=0, valid_share=share, seed=seed)
        splits.append(manifest.assign(split=rest["split"].reindex(manifest.index, fill_value="test")))
    return splits


def published(manifest: pd.DataFrame, class_names, *, valid_share: float = 0.15, seed: int = 0) -> pd.DataFrame:
    """Keep the test split that a set was published with, leaks and all, and carve validation off the rest by group.

    For comparison with published results only: `audit.gate` refuses it where the test split holds relatives of
    training images, which the column `leaked` marks.

    Args:
        manifest: rows with the published `split`, `group_id` and label columns; some are test.
        class_names: label columns.
        valid_share: share of the images that are not test.
        seed: of the shuffle.

    Returns:
        A copy with `split` and `leaked` (bool).

    Raises:
        ValueError: no row is test, or as in `assign`.
    """
    test = manifest["split"] == "test"
    if not test.any():
        raise ValueError("the manifest has no published test split: no row's `split` is 'test'.")
    rest = assign(manifest[~test], class_names, test_share=0, valid_share=valid_share, seed=seed)
    leaked = test & manifest["group_id"].isin(rest["group_id"])
    return manifest.assign(split=rest["split"].reindex(manifest.index, fill_value="test"), leaked=leaked)


def folds(manifest: pd.DataFrame, class_names, *, num_folds: int = 5, seed: int = 0) -> np.ndarray:
    """Deal rows into folds by `group_id`, each class spread evenly.

    Returns:
        int array, shape (num_rows,): the fold in which a row is held out.
    """
    num_folds = _limit_folds(manifest, class_names, num_folds)
    labels = manifest[list(class_names)].to_numpy()
    fold = np.zeros(len(manifest), int)
    # scikit-learn warns where a class has fewer images than folds; the folds are still the best there are.
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class in y", UserWarning)
        for index, (_, held_out) in enumerate(
            splitter.split(labels, _strata(labels), manifest["group_id"].astype(str))
        ):
            fold[held_out] = index
    return fold


def _strata(labels: np.ndarray) -> np.ndarray:
    """Number the label sets: the class where classes exclude each other, else each combination, or the rarest label."""
    if len(np.unique(labels, axis=0)) == len(labels) or not labels.shape[1]:
        return np.zeros(len(labels), int)  # no two images alike: there are no shares to keep
    if (labels.sum(axis=1) == 1).all():
        return labels.argmax(axis=1)
    sets, numbers = np.unique(labels, axis=0, return_inverse=True)
    if len(sets) <= _MAX_LABEL_SETS:
        return numbers.ravel()
    rarest_first = np.argsort(labels.sum(axis=0), kind="stable")
    return np.where(labels.any(axis=1), labels[:, rarest_first].argmax(axis=1), labels.shape[1])


def _limit_folds(manifest, class_names, num_folds):
    """At most as many folds as there are groups, and images of the largest stratum; refuse what cannot be split."""
    missing = int(manifest["group_id"].isna().sum())
    if missing:
        raise ValueError(
            f"`group_id` is missing in {missing} rows; use the patient, or `audit.similarity_groups` where patients "
            "are unknown."
        )
    unknown = int(manifest[list(class_names)].isna().any(axis=1).sum())
    if unknown:
        raise ValueError(f"a label is unknown in {unknown} rows, which have no stratum; leave them out of the split.")
    num_groups = manifest["group_id"].astype(str).nunique()
    if num_groups < 3:
        raise ValueError(f"{num_groups} groups cannot fill train, valid and test; at least 3 are needed.")
    return min(num_folds, num_groups, int(np.bincount(_strata(manifest[list(class_names)].to_numpy(int))).max()))


def groups_per_split(manifest: pd.DataFrame, class_names) -> pd.DataFrame:
    """Count images and groups of each class in each split: what a reader checks before trusting a number.

    Returns:
        DataFrame indexed by class, columns (split, "images" or "groups").
    """
    long = manifest.melt(["group_id", "split"], list(class_names), "class", "present").query("present == 1")
    grouped = (
        long.groupby(["class", "split"])["group_id"].agg(images="size", groups="nunique").unstack("split", fill_value=0)
    )
    grouped = grouped.swaplevel(axis=1)
    columns = [(split, what) for split in ("train", "valid", "test") for what in ("images", "groups")]
    return grouped.reindex(index=list(class_names), columns=pd.MultiIndex.from_tuples(columns), fill_value=0)
