"""Tables of predictions of independent labels: thresholds tuned on validation, baselines, scores of the test images.

A table is that of `kerasmed.predictions` (`tabulate` makes it, `read` reads it), where y_<class> is 1, 0 or NaN
(unknown) and the p_<class> of a row need not sum to 1.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from kerasmed import audit, metrics, predictions
from kerasmed.manifest import targets
from kerasmed.metrics import Answer

# Answers that look at no image: they mean the same on images that are all alike.
CONSTANT = (metrics.MAJORITY, metrics.ALL_POSITIVE)


def truth_and_probabilities(table: pd.DataFrame, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a table's labels (1, 0, NaN) and probabilities, each float, shape (num_images, num_labels)."""
    return predictions.columns(table, class_names)


def thresholds(table: pd.DataFrame, class_names: Sequence[str], *, split: str = "valid") -> np.ndarray:
    """Tune the threshold of each label on one split of a table of predictions.

    Args:
        table: predictions, with `split`.
        class_names: label columns.
        split: which rows to tune on; never "test", where a tuned threshold would have seen the answers.

    Returns:
        float array, shape (num_labels,), of `kerasmed.metrics.tune_thresholds`.

    Raises:
        ValueError: the split is "test", or has no row.
    """
    if split == "test":
        raise ValueError("`split` is 'test'; tune thresholds on 'valid': on test rows they would know the answers.")
    return metrics.tune_thresholds(*truth_and_probabilities(_rows_of(table, split), class_names))


def mean_average_precision(table: pd.DataFrame, class_names: Sequence[str], *, split: str) -> float:
    """Average precision in a split, averaged over the labels that occur in it: what networks are chosen by.

    Networks are chosen on validation, where thresholds are tuned as well; F1 would be too high there by as much as the
    tuning gains, and by more for the network whose threshold fits by chance. Average precision needs no threshold.

    Args:
        table: predictions, with `split`.
        class_names: label columns.
        split: which rows.

    Raises:
        ValueError: the split has no row, or no label occurs in it.
    """
    truth, probabilities = truth_and_probabilities(_rows_of(table, split), class_names)
    if not (truth == 1).any():
        raise ValueError(
            f"none of {list(class_names)} occurs in the {split} split; average precision needs a positive."
        )
    once, half = np.ones((1, len(truth)), np.float32), np.full(len(class_names), 0.5)
    return float(metrics.multilabel(truth, probabilities, half, class_names, once)["average_precision", "all"][0])


def _rows_of(table, split) -> pd.DataFrame:
    rows = table[table["split"] == split]
    if rows.empty:
        raise ValueError(f"the table has no row of split {split!r}, only of {sorted(table['split'].unique())}.")
    return rows


def baselines(
    y_train: np.ndarray, num_rows: int, thumbnails_train: np.ndarray, thumbnails_rows: np.ndarray
) -> dict[str, Answer]:
    """Answer images without a model, learnt from the training images.

    - majority: each label present where more than half of its known training rows are positive, else absent.
    - all_positive: every label present. No other constant answer has a higher F1: at prevalence p it is 2p / (1 + p)
      (tp = p, fp = 1 − p, fn = 0), which a rare label's "absent" answer, with F1 = 0, hides.
    - nearest_neighbour: the labels of the most correlated training thumbnail; the majority's answer where that
      image's label is unknown, and to a constant image, which correlates with nothing.

    Args:
        y_train: float array, shape (num_train, num_labels): 1, 0 or NaN.
        num_rows: how many images to answer.
        thumbnails_train: uint8, shape (num_train, height, width).
        thumbnails_rows: uint8, shape (num_rows, height, width).

    Returns:
        dict name -> `Answer` with probabilities 0 and 1, shape (num_rows, num_labels), and thresholds 0.5.

    Raises:
        ValueError: the counts of labels and thumbnails differ, or there is no training image.
    """
    if (len(thumbnails_train), len(thumbnails_rows)) != (len(y_train), num_rows):
        raise ValueError(
            f"{len(thumbnails_train)} training thumbnails beside {len(y_train)} rows of labels, and "
            f"{len(thumbnails_rows)} others beside {num_rows} rows; one thumbnail a row is expected."
        )
    num_labels = y_train.shape[1]
    majority = (2 * (y_train == 1).sum(axis=0) > np.isfinite(y_train).sum(axis=0)).astype(float)
    found = y_train[audit.nearest(thumbnails_rows, thumbnails_train)[0]] if num_rows else np.zeros((0, num_labels))
    constant = thumbnails_rows.min(axis=(1, 2)) == thumbnails_rows.max(axis=(1, 2))
    found = np.where(constant[:, None], np.nan, found)
    told = {
        metrics.MAJORITY: np.tile(majority, (num_rows, 1)),
        metrics.ALL_POSITIVE: np.ones((num_rows, num_labels)),
        metrics.NEAREST_NEIGHBOUR: np.where(np.isnan(found), majority, found),
    }
    return {name: Answer(probabilities, np.full(num_labels, 0.5)) for name, probabilities in told.items()}


def evaluate(
    tables: Mapping[str, pd.DataFrame],
    manifest: pd.DataFrame,
    thumbnails: np.ndarray,
    class_names: Sequence[str],
    *,
    task: str,
    subsets: Mapping[str, np.ndarray] | None = None,
    constant_only: Collection[str] = (),
    extra: Mapping[str, Answer] | None = None,
    reference: str | Mapping[str, str] | None = None,
    num_draws: int = metrics.BOOTSTRAPS,
    seed: int = 0,
) -> list[dict]:
    """Score the test images, all and by subset, beside the baselines, with intervals over groups.

    Thresholds are tuned on the valid rows of each table; baselines learn from the manifest's training rows.

    Args:
        tables: variant -> predictions of all rows of the manifest, in its order; empty for the baselines alone.
        manifest: a row an image, with split, group_id and the label columns.
        thumbnails: uint8, shape (num_images, 64, 64), in the manifest's order.
        class_names: label columns.
        task: what is classified, for the rows.
        subsets: split as the rows name it -> bool mask over the manifest's rows, of which the test rows are scored,
            such as {"test": all, "test, black": black}; None for {"test": all}.
        constant_only: the subsets whose images are all alike, so that a nearest neighbour means nothing: only the
            baselines `CONSTANT` stand there.
        extra: further baselines, named in `kerasmed.metrics.BASELINES` -> `Answer` to the test rows, in their order.
        reference: variant that the others are compared with as well; or variant -> its own.
        num_draws, seed: of the bootstrap.

    Returns:
        Rows of `kerasmed.metrics.multilabel_rows`.

    Raises:
        ValueError: a table does not fit the manifest or was tuned on its test rows, a name or mask does not fit, or a
            subset has no test image.
    """
    split = manifest["split"].to_numpy()
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    subsets = {"test": np.ones(len(manifest), bool)} if subsets is None else subsets
    extra = {} if extra is None else extra
    _refuse_unfit(tables, manifest, subsets, constant_only, extra)
    answers = {
        variant: Answer(
            truth_and_probabilities(table.iloc[test], class_names)[1],
            thresholds(table, class_names),
        )
        for variant, table in tables.items()
    }
    y_true = targets(manifest, class_names)
    answers |= baselines(y_true[train], len(test), thumbnails[train], thumbnails[test]) | dict(extra)
    groups = manifest["group_id"].to_numpy()[test]
    rows = []
    for name, mask in subsets.items():
        among = np.asarray(mask)[test]
        left_out = set(metrics.BASELINES) - set(CONSTANT) if name in constant_only else ()
        rows += metrics.multilabel_rows(
            y_true[test][among],
            {
                variant: Answer(answer.probabilities[among], answer.thresholds)
                for variant, answer in answers.items()
                if variant not in left_out
            },
            groups[among],
            class_names,
            task=task,
            split=name,
            reference=reference,
            num_draws=num_draws,
            seed=seed,
        )
    return rows


def _refuse_unfit(tables, manifest, subsets, constant_only, extra) -> None:
    is_test = (manifest["split"] == "test").to_numpy()
    for variant, table in tables.items():
        if variant in metrics.BASELINES:
            raise ValueError(f"`tables` name a variant {variant!r}, which is a baseline's name; rename it.")
        if table["image_path"].tolist() != manifest["image_path"].tolist():
            raise ValueError(
                f"the table of {variant} has {len(table)} rows that are not the {len(manifest)} of the manifest in "
                "its order; predict all rows of the manifest."
            )
        seen = manifest["image_path"][(table["split"] == "valid").to_numpy() & is_test]
        if len(seen):
            raise ValueError(
                f"{len(seen)} test rows are valid rows in the table of {variant}; its thresholds would be tuned on "
                f"them. First: {seen.head(3).tolist()}."
            )
    strange = [name for name in extra if name not in metrics.BASELINES]
    if strange:
        raise ValueError(f"`extra` names {strange}; expected baselines of {metrics.BASELINES}.")
    for name, answer in extra.items():
        if len(answer.probabilities) != is_test.sum():
            raise ValueError(
                f"`extra` answers {len(answer.probabilities)} rows as {name}; expected the {is_test.sum()} test rows."
            )
    strange = [name for name in constant_only if name not in subsets]
    if strange:
        raise ValueError(f"`constant_only` names {strange}; expected some of {list(subsets)}.")
    for name, mask in subsets.items():
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != (len(manifest),):
            raise ValueError(
                f"the mask of {name!r} is {mask.dtype} of shape {mask.shape}; expected bool, {(len(manifest),)}."
            )
        if not (mask & is_test).any():
            raise ValueError(f"the subset {name!r} has no test image; leave it out, or change the split.")


def headline(rows: Sequence[Mapping], *, task: str, variant: str) -> list[Mapping]:
    """Pick the rows that answer the notebook's question: mean F1 and mean average precision, over all test images."""
    return [
        row
        for row in rows
        if (row["task"], row["variant"], row["split"], row["label"]) == (task, variant, "test", "all")
        and row["metric"] in ("f1", "average_precision")
    ]
