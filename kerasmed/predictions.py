"""Tables of predictions of exclusive classes: what a model said of each image, joined over folds and scored.

A table has a row an image, in the order of its manifest: the ids, split, variant, y_<class> (0 or 1) and p_<class>.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from kerasmed import audit, metrics
from kerasmed.manifest import class_ids

ID_COLUMNS = ("image_path", "patient_id", "study_id", "group_id", "split")
# A class of fewer groups cannot stand in train, valid and test at once.
MIN_GROUPS = 3


def tabulate(
    manifest: pd.DataFrame, probabilities: np.ndarray, class_names: Sequence[str], *, variant: str
) -> pd.DataFrame:
    """Make a table of predictions.

    Args:
        manifest: a row an image, with the label columns.
        probabilities: shape (num_images, num_classes).
        class_names: the label columns.
        variant: whose predictions they are.

    Returns:
        DataFrame: the ids, split, variant, y_<class> and p_<class>.
    """
    truth = manifest[list(class_names)].set_axis([f"y_{name}" for name in class_names], axis=1)
    told = pd.DataFrame(probabilities, columns=[f"p_{name}" for name in class_names], index=manifest.index)
    return pd.concat([manifest[list(ID_COLUMNS)].assign(variant=variant), truth, told], axis=1)


def read(path) -> pd.DataFrame:
    """Read a table from CSV, ids as text; an empty id or label is missing."""
    # An id may be spelt "NA": only nothing is missing.
    return pd.read_csv(path, dtype=dict.fromkeys(ID_COLUMNS, str), keep_default_na=False, na_values=[""])


def truth_and_probabilities(table: pd.DataFrame, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a table's class ids, int (num_images,), and probabilities, float (num_images, num_classes)."""
    truth, probabilities = columns(table, class_names)
    return truth.argmax(axis=1), probabilities


def columns(table: pd.DataFrame, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a table's columns y_<class> and p_<class>, each float, shape (num_images, num_classes); NaN is unknown."""
    truth, probabilities = (table[[f"{letter}_{name}" for name in class_names]].to_numpy(float) for letter in "yp")
    return truth, probabilities


def held_out(tables: Sequence[pd.DataFrame], manifests: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join the test rows of each fold: over all folds, every image once, by a model that is new to its group.

    Args:
        tables: predictions of the model of each fold.
        manifests: each fold's manifest; its split counts.

    Returns:
        DataFrame of predictions with `fold` (from 1), indexed by row of the manifest.
    """
    return pd.concat(
        [
            table.loc[(manifest["split"] == "test").to_numpy()].assign(fold=number)
            for number, (table, manifest) in enumerate(zip(tables, manifests, strict=True), start=1)
        ]
    )


def confident(
    table: pd.DataFrame,
    class_names: Sequence[str],
    *,
    right: bool,
    count: int = 8,
    answered: np.ndarray | None = None,
) -> np.ndarray:
    """Return the index of the images that were surest, right or wrong, one a group, surest first.

    Args:
        table: predictions, such as of `held_out`.
        class_names: label columns.
        right: whether to look among the right or the wrong answers.
        count: at most so many.
        answered: int, shape (num_images,): the answers, where they are not the likeliest classes.
    """
    truth, probabilities = truth_and_probabilities(table, class_names)
    told = probabilities.argmax(axis=1) if answered is None else answered
    sure = probabilities[np.arange(len(told)), told]
    found = pd.DataFrame({"index": table.index, "sure": sure, "group": table["group_id"].to_numpy()})
    found = found[(told == truth) == right].sort_values("sure", ascending=False, kind="stable")
    return found.drop_duplicates("group")["index"].to_numpy()[:count]


def captions(table: pd.DataFrame, class_names: Sequence[str]) -> list[str]:
    """Say of each image its class, the answer and how sure it was, in three lines to stand above the picture."""
    truth, probabilities = truth_and_probabilities(table, class_names)
    likeliest, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    return [
        f"{class_names[true]}\nread as {class_names[told]}\np = {p:.2f}"
        for true, told, p in zip(truth, likeliest, sure)
    ]


def balanced_accuracy(table: pd.DataFrame, class_names: Sequence[str], *, split: str) -> float:
    """Mean sensitivity of the classes that occur in a split."""
    rows = table[table["split"] == split]
    truth, probabilities = truth_and_probabilities(rows, class_names)
    once = np.ones((1, len(rows)), np.float32)
    return float(metrics.multiclass(truth, probabilities, class_names, once)["balanced_accuracy", "all"][0])


def evaluate(
    tables: Mapping[str, Sequence[pd.DataFrame]],
    manifests: Sequence[pd.DataFrame],
    thumbnails: np.ndarray,
    class_names: Sequence[str],
    *,
    task: str,
    split: str = "test",
    reference: str | None = None,
    decide: Mapping[str, Callable] | None = None,
    num_draws: int = metrics.BOOTSTRAPS,
    seed: int = 0,
) -> list[dict]:
    """Score the test images of all folds beside majority and nearest neighbour, with intervals over groups.

    Baselines learn from each fold's own training images. Classes of fewer than three groups cannot be in all splits:
    the figures without them are given as well, over the images of the other classes, with the probabilities of these.

    Args:
        tables: variant -> predictions of each fold; empty for the baselines alone.
        manifests: each fold's manifest, with its split.
        thumbnails: uint8, shape (num_images, 64, 64), in the manifests' order.
        class_names: label columns.
        task: what is classified, for the rows.
        split: what the scored images are called in the rows.
        reference: variant that the others are compared with as well.
        decide: variant -> function of its table's test rows and of the classes that are scored, positions in
            `class_names`, -> its answers, such positions; where it is left out, the likeliest class is the answer.
        num_draws, seed: of the bootstrap.

    Returns:
        Rows of `kerasmed.metrics.multiclass_rows`.
    """
    joined = {variant: held_out(each, manifests) for variant, each in tables.items()}
    ids = class_ids(manifests[0], class_names)
    tested = np.concatenate([np.flatnonzero(manifest["split"] == "test") for manifest in manifests])
    truth, groups = ids[tested], manifests[0]["group_id"].to_numpy()[tested]
    # Rows that are in no split may have none of the classes.
    num_groups = [manifests[0].loc[manifests[0][name] == 1, "group_id"].nunique() for name in class_names]
    kept = np.flatnonzero(np.array(num_groups) >= MIN_GROUPS)
    rows = []
    for classes in [np.arange(len(class_names))] + ([kept] if 1 < len(kept) < len(class_names) else []):
        among = np.isin(truth, classes)
        answers = {
            variant: truth_and_probabilities(table, class_names)[1][among][:, classes]
            for variant, table in joined.items()
        }
        answered = {
            variant: np.searchsorted(classes, choose(joined[variant][among], classes))
            for variant, choose in (decide or {}).items()
        }
        learnt = [_baselines(manifest, thumbnails, ids, classes) for manifest in manifests]
        answers |= {name: np.concatenate([each[name] for each in learnt]) for name in learnt[0]}
        rows += metrics.multiclass_rows(
            np.searchsorted(classes, truth[among]),
            answers,
            groups[among],
            [class_names[number] for number in classes],
            task=task,
            split=split,
            prefix="" if len(classes) == len(class_names) else f"{len(classes)} classes: ",
            reference=reference,
            num_draws=num_draws,
            seed=seed,
            answered=answered,
        )
    return rows


def _baselines(manifest, thumbnails, ids, classes) -> dict[str, np.ndarray]:
    """Answers to the test images of some classes, learnt from the training images of these classes."""
    among = np.isin(ids, classes)
    train, test = (np.flatnonzero(among & (manifest["split"] == split).to_numpy()) for split in ("train", "test"))
    known = np.searchsorted(classes, ids[train])
    neighbour = audit.nearest(thumbnails[test], thumbnails[train])[0] if len(test) else np.zeros(0, int)
    return {
        metrics.MAJORITY: metrics.majority_probabilities(known, len(test), len(classes)),
        metrics.NEAREST_NEIGHBOUR: np.eye(len(classes))[known[neighbour]],
    }


def headline(rows: Sequence[Mapping], *, task: str, variant: str) -> list[Mapping]:
    """Pick the rows that answer the notebook's question: accuracy and balanced accuracy over all classes that occur."""
    return [
        row
        for row in rows
        if (row["task"], row["variant"], row["split"]) == (task, variant, "test")
        and row["metric"] in ("accuracy", "balanced_accuracy")
        and (row["label"] == "all" or row["label"].endswith(": all"))
    ]
