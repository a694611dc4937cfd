"""What both chest notebooks do: read, split, patient data as numbers, train, predict, score."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from kerasmed import (
    audit,
    augment,
    classifiers,
    datasets,
    losses,
    metrics,
    multilabel,
    pipelines,
    predictions,
    runs,
    splits,
    training,
)
from kerasmed.datasets import chest as data
from kerasmed.manifest import targets
from kerasmed.parameters import refuse

TASK = "frontal"
LABELS = data.CLASS_NAMES[TASK]
FINDINGS = data.FINDINGS
# Weighted by the training shares; with the weights all 1; that, focused on what the network is not sure of.
LOSSES = ("weighted", "plain", "focal")
FOCUSING = 2.0
PATIENT = ("age", "sex", "view")
# Of the subgroup table: years at which a band begins.
AGE_BANDS = (0, 40, 60)


def refuse_unfit(config) -> None:
    """Raise ValueError for values that both configurations have and that cannot work."""
    for name in ("batch_size", "bootstraps"):
        refuse(name, getattr(config, name), getattr(config, name) >= 1, "at least 1")
    refuse("learning_rate", config.learning_rate, 0 < config.learning_rate < 1, "a number between 0 and 1")
    refuse("stop_patience", config.stop_patience, config.stop_patience >= 0, "at least 0")
    refuse("dropout", config.dropout, 0 <= config.dropout < 1, "at least 0 and below 1")
    schedules = ", ".join(training.SCHEDULES)
    refuse("schedule", config.schedule, config.schedule in training.SCHEDULES, f"one of {schedules}")
    refuse("loss", config.loss, config.loss in LOSSES, f"one of {', '.join(LOSSES)}")
    refuse("max_quarantined_share", config.max_quarantined_share, 0 <= config.max_quarantined_share <= 1, "0 to 1")
    known = set(config.accepted) <= set(audit.FAILING)
    refuse("accepted", config.accepted, known, f"some of {', '.join(audit.FAILING)}")


def read(source: datasets.Source, parameters: Mapping) -> pipelines.Store:
    """Decode the radiographs that are present, each once; those that the table lists and that are absent are left out.

    Args:
        source: of `kerasmed.datasets.locate`.
        parameters: image_size, fit, interpolation, equalize and max_quarantined_share.
    """
    return pipelines.decode(
        data.read(source.root, TASK),
        source.root,
        **pipelines.decode_options(parameters),
        max_quarantined_share=parameters["max_quarantined_share"],
    )


def split(store: pipelines.Store, *, valid_share: float, seed: int, accepted: Sequence[str]) -> pipelines.Store:
    """Keep the official test list, carve validation off the rest by patient, and ask the gate.

    Raises:
        ValueError: no image of the official test list is present, or validation has no finding that tells its images
            apart, so that nothing could be chosen by it.
        kerasmed.audit.GateError: something that `accepted` does not name.
    """
    manifest = splits.published(store.manifest, LABELS, valid_share=valid_share, seed=seed).drop(columns="leaked")
    parted = store._replace(manifest=manifest)
    valid = manifest[manifest["split"] == "valid"]
    if not any(valid[name].nunique() > 1 for name in FINDINGS if name not in unlearnt(parted, FINDINGS)):
        raise ValueError(
            f"the {len(valid)} validation images have no finding that some have and others lack, so networks could not "
            f"be chosen by them; get more of the {len(manifest)} images, or raise `valid_share`."
        )
    gate(parted, accepted=accepted)
    return parted


def gate(store: pipelines.Store, *, accepted: Sequence[str]) -> pd.DataFrame:
    """Ask `audit.gate` whether a split store may be trained on; `accepted` is let through."""
    identity = audit.identify(store.thumbnails, store.facts)
    return audit.gate(store.manifest, identity, LABELS, accepted=accepted)


def patient_values(manifest: pd.DataFrame, *, previous: bool) -> np.ndarray:
    """Lay patient data out as numbers: age in years, sex (F 0, M 1), view (PA 0, AP 1); NaN where unknown.

    With `previous`, has_previous and the findings of the previous visit follow, 0 or 1; all 0 on a first visit.

    Returns:
        float32 array, shape (num_rows, 3), or (num_rows, 18) with `previous`.
    """
    columns = [
        manifest["age"].to_numpy(float),
        manifest["sex"].map({"F": 0.0, "M": 1.0}).to_numpy(float),
        manifest["view"].map({"PA": 0.0, "AP": 1.0}).to_numpy(float),
    ]
    values = np.stack(columns, axis=1)
    if previous:
        values = np.concatenate([values, manifest[["has_previous", *data.PREVIOUS]].to_numpy(float)], axis=1)
    return values.astype(np.float32)


def describe(table: pd.DataFrame) -> pd.DataFrame:
    """Count images, patients and follow-ups by split, and the images without any finding."""
    grouped = table.groupby("split", sort=False)
    return pd.DataFrame(
        {
            "images": grouped.size(),
            "patients": grouped["patient_id"].nunique(),
            "follow-ups": grouped["has_previous"].sum().astype(int),
            data.NO_FINDING: grouped[data.NO_FINDING].sum().astype(int),
        }
    )


def fit(
    config,
    model: keras.Model,
    store: pipelines.Store,
    labels: Sequence[str],
    *,
    folder: Path,
    epochs: int,
    learning_rate: float,
    beside: Mapping[str, np.ndarray] | None = None,
) -> pd.DataFrame:
    """Train a model on a store's training rows, or go on with it.

    Args:
        config: loss, augmentation, batch_size, seed, schedule and stop_patience are used.
        model: with outputs for `labels`.
        store: with a split.
        labels: label columns.
        folder: of the training.
        epochs, learning_rate: of `kerasmed.training.fit`.
        beside: the model's further inputs, as in `kerasmed.pipelines.batch`.
    """
    y = targets(store.manifest, labels)
    learnt = pipelines.rows(store, "train")
    train_from, valid = pipelines.datasets_of(
        store,
        y,
        batch_size=config.batch_size,
        seed=config.seed,
        augment=augment.build(config.augmentation, store.images.shape[1:]),
        beside=beside,
    )
    return training.fit(
        model,
        train_from,
        valid,
        folder=folder,
        steps_per_epoch=pipelines.steps_per_epoch(len(learnt), config.batch_size),
        epochs=epochs,
        loss=build_loss(config.loss, y[learnt]),
        learning_rate=learning_rate,
        schedule=config.schedule,
        stop_patience=config.stop_patience,
    )


def build_loss(name: str, y_train: np.ndarray) -> keras.losses.Loss:
    """Build one of `LOSSES` for training labels (num_images, num_labels)."""
    if name == "plain":
        return losses.WeightedBinaryCrossentropy()
    if name == "focal":
        return losses.WeightedBinaryCrossentropy(focusing=FOCUSING)
    return losses.WeightedBinaryCrossentropy(*label_weights(y_train))


def label_weights(y_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of present and of absent labels: the share of the others among the training images.

    A label of which the training images have one kind only has a weight of 0 and is not learnt.
    """
    positive, negative = losses.label_shares(y_train)
    return negative, positive


def unlearnt(store: pipelines.Store, labels: Sequence[str]) -> list[str]:
    """Labels of which the training images have one kind only, so that nothing can be learnt of them."""
    learnt = store.manifest.loc[store.manifest["split"] == "train", list(labels)]
    return [name for name in labels if learnt[name].nunique() < 2]


def predict_store(
    model: keras.Model,
    store: pipelines.Store,
    labels: Sequence[str],
    *,
    variant: str,
    beside: Mapping[str, np.ndarray] | None = None,
) -> pd.DataFrame:
    """Predict every image of a store, as a table of `kerasmed.predictions`."""
    dataset = pipelines.evaluation_dataset(store.images, np.arange(len(store.manifest)), beside=beside)
    return predictions.tabulate(store.manifest, model.predict(dataset, verbose=0), labels, variant=variant)


def validation_auroc(table: pd.DataFrame) -> float:
    """Mean AUROC on validation of the findings that could be learnt and occur there: what models are chosen by."""
    learnt = table[table["split"] == "train"]
    names = [name for name in FINDINGS if learnt[f"y_{name}"].nunique() > 1]
    return multilabel.mean_score(table, names, split="valid", metric="auroc")


def choose(candidates: Sequence[training.Trained]) -> training.Trained:
    """Choose the training of the best mean AUROC on validation; test images have no say."""
    return max(candidates, key=lambda each: validation_auroc(each.predictions))


def visits(manifest: pd.DataFrame) -> dict[str, np.ndarray]:
    """Masks of all test images, and of first visits and follow-ups apart, where there are any."""
    tested, later = (manifest["split"] == "test").to_numpy(), (manifest["has_previous"] == 1).to_numpy()
    parts = {"test": np.ones(len(later), bool), "test, first visits": ~later, "test, follow-ups": later}
    return {name: mask for name, mask in parts.items() if (mask & tested).any()}


def subgroups(manifest: pd.DataFrame) -> dict[str, np.ndarray]:
    """Masks of test images by sex, age band and view, and of those where one is unknown, where there are any."""
    tested = (manifest["split"] == "test").to_numpy()
    bands = pd.cut(manifest["age"], [*AGE_BANDS, np.inf], right=False)
    names = [f"{low} to {high - 1} years" for low, high in zip(AGE_BANDS, AGE_BANDS[1:])]
    names.append(f"{AGE_BANDS[-1]} years and more")
    described = {
        "sex": manifest["sex"].map({"F": "women", "M": "men"}),
        "age": bands.cat.rename_categories(names).astype(object),
        "view": manifest["view"].map({"PA": "PA view", "AP": "AP view"}),
    }
    masks = {}
    for what, values in described.items():
        values = values.where(values.notna(), f"{what} unknown")
        masks |= {f"test, {name}": (values == name).to_numpy() for name in sorted(values.unique())}
    return {name: mask for name, mask in masks.items() if (mask & tested).any()}


def patient_baseline(
    config, store: pipelines.Store, labels: Sequence[str], *, previous: bool = False
) -> dict[str, multilabel.Answer]:
    """Answer the test images from patient data alone: a logistic regression a label, thresholds by validation.

    Returns:
        {"patient_data": from age, sex and view}; with `previous`, {"patient_and_previous": from the findings of the
        previous visit as well}, which is what a network that is given them has to beat.
    """
    y = targets(store.manifest, labels)
    learnt, valid, test = (pipelines.rows(store, name) for name in ("train", "valid", "test"))
    values = patient_values(store.manifest, previous=previous)
    asked = np.concatenate([valid, test])
    told = classifiers.logistic_on_table(values[learnt], y[learnt], values[asked], seed=config.seed)
    thresholds = multilabel.tune_thresholds(y[valid], told[: len(valid)])
    name = metrics.PATIENT_AND_PREVIOUS if previous else metrics.PATIENT
    return {name: multilabel.Answer(told[len(valid) :], thresholds)}


def evaluate(
    config, tables: Mapping[str, pd.DataFrame], store: pipelines.Store, labels: Sequence[str], **options
) -> list[dict]:
    """Score the test images beside the baselines; `options` of `kerasmed.multilabel.evaluate`.

    Means are over the findings, also where `No Finding` is a label, so that they compare with published ones; a finding
    of which the training images have one kind only is left out of them, as what a network says of it is its luck.
    """
    idle = unlearnt(store, FINDINGS)
    return multilabel.evaluate(
        tables,
        store.manifest,
        store.thumbnails,
        labels,
        task=TASK,
        averaged=[name for name in FINDINGS if name not in idle],
        num_draws=config.bootstraps,
        **options,
    )


def headline(rows: Sequence[Mapping], *, variant: str) -> list[Mapping]:
    """Pick the rows that answer the notebooks' question: mean AUROC and average precision of all test images."""
    return multilabel.headline(rows, task=TASK, variant=variant, metrics=("auroc", "average_precision"))


def promote(run: Path, chosen: training.Trained, labels: Sequence[str], parameters: Mapping) -> dict:
    """Copy the chosen model up to `model.keras`, and write to answers.json what `predict` must know of it.

    Args:
        run: the run folder.
        chosen: the training whose model is copied.
        labels: of its outputs.
        parameters: how its images were read: image_size, fit, interpolation and equalize.

    Returns:
        {"variant", "thresholds": label -> threshold, tuned on validation, "read": those parameters}.
    """
    content = {
        "variant": chosen.variant,
        "thresholds": dict(zip(labels, multilabel.thresholds(chosen.predictions, labels).tolist())),
        "read": {name: parameters[name] for name in ("image_size", "fit", "interpolation", "equalize")},
    }
    runs.promote(run, chosen.folder, "model")
    runs.write_json(run / "answers.json", content)
    return content
