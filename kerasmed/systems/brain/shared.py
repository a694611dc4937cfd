"""What both brain notebooks do: build a network for some exclusive classes, train it in its stages, predict a store.

`config` is either notebook's Config; they name what is used here alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from kerasmed import (
    audit,
    augment,
    backbones,
    datasets,
    environment,
    gradcam,
    layers,
    localisation,
    losses,
    models,
    pipelines,
    predictions,
    runs,
    seals,
    training,
)
from kerasmed.datasets.synthetic import brain as synthetic
from kerasmed.manifest import class_ids, targets
from kerasmed.parameters import refuse, refuse_others
from kerasmed.training import Trained

NETWORKS = ("compact", "five_block", *backbones.NAMES)
SMALLEST_SIDE = {"five_block": models.FIVE_BLOCK_SIDE}
AUGMENTATION_LIBRARIES = ("albumentations", "keras")


def refuse_unfit(config) -> None:
    """Raise ValueError for a value, of those that both notebooks have, that does not fit."""
    refuse_others("accepted", config.accepted, audit.FAILING, empty=True)
    refuse(
        "augmentation_library",
        config.augmentation_library,
        config.augmentation_library in AUGMENTATION_LIBRARIES,
        "albumentations or keras",
    )
    given = asdict(config)
    for name in ("synthetic_patients_per_class", "synthetic_slices_per_patient", "batch_size", "epochs", "bootstraps"):
        refuse(name, given[name], given[name] >= 1, "at least 1")
    for name in ("learning_rate", "unfrozen_learning_rate"):
        refuse(name, given[name], 0 < given[name] < 1, "a number between 0 and 1")
    refuse("weights_seconds", config.weights_seconds, config.weights_seconds > 0, "more than 0")
    for name in ("weight_decay", "focusing", "stop_patience"):
        refuse(name, given[name], given[name] >= 0, "at least 0")
    refuse("max_quarantined_share", config.max_quarantined_share, 0 <= config.max_quarantined_share <= 1, "0 to 1")
    refuse("dropout", config.dropout, 0 <= config.dropout < 1, "at least 0 and below 1")
    known = ", ".join(training.SCHEDULES)
    refuse("schedule", config.schedule, config.schedule in training.SCHEDULES, f"one of {known}")


def find_weights(config, networks: Sequence[str]) -> None:
    """Have the weights of every backbone at hand, so that their lack shows before hours of training.

    Raises:
        kerasmed.backbones.DownloadError: a file is neither in the cache nor to be had.
        ValueError: `weights` is no such thing.
        FileNotFoundError: no file at `weights`.
    """
    for network in networks:
        if network in backbones.NAMES:
            backbones.find_weights(network, config.weights, time_limit=config.weights_seconds)


def build_model(
    config, image_size: tuple[int, int], num_classes: int, network: str
) -> tuple[keras.Model, backbones.Receipt | None]:
    """Build a network for some exclusive classes.

    Returns:
        The model, and which tensors of a pretrained backbone's weights were taken over (None from scratch).
    """
    if network == "compact":
        return models.compact_cnn(image_size, num_classes, dropout=config.dropout), None
    if network == "five_block":
        return models.five_block_cnn(image_size, num_classes), None
    features, receipt = backbones.build(network, image_size, weights=config.weights, time_limit=config.weights_seconds)
    return models.classifier(features, num_classes, dropout=config.dropout), receipt


def recipe(config, image_size: tuple[int, int]):
    """Build the augmentation that a configuration names, by `kerasmed.augment` or with Keras's layers."""
    build = layers.build_augmentation if config.augmentation_library == "keras" else augment.build
    return build(config.augmentation, image_size)


def make_datasets(config, store: pipelines.Store, class_names: Sequence[str]):
    """Make the training datasets (a function of the first epoch) and the validation dataset."""
    augmentation = recipe(config, store.images.shape[1:])
    y = targets(store.manifest, class_names)
    return pipelines.datasets_of(store, y, batch_size=config.batch_size, seed=config.seed, augment=augmentation)


def fit(
    config, model: keras.Model, store: pipelines.Store, class_names: Sequence[str], *, folder: Path, **options
) -> pd.DataFrame:
    """Train a model on a store's training rows, or go on with it; `options` of `training.fit` take precedence."""
    train_from, valid = make_datasets(config, store, class_names)
    train = pipelines.rows(store, "train")
    ids = class_ids(store.manifest, class_names)[train]
    weights = losses.balanced_class_weights(ids, len(class_names)) if config.class_weights else None
    options = {
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "schedule": config.schedule,
        "stop_patience": config.stop_patience,
        **options,
    }
    return training.fit(
        model,
        train_from,
        valid,
        folder=folder,
        steps_per_epoch=pipelines.steps_per_epoch(len(train), config.batch_size),
        epochs=config.epochs,
        loss=losses.WeightedCategoricalCrossentropy(weights, config.focusing),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
        **options,
    )


def stages(config, network: str) -> list[tuple[str, str | None, dict]]:
    """List the trainings of a network: variant, part of a backbone that learns (None: no backbone), options of `fit`.

    The compact network follows the configuration; the others the earlier work: Adam, a fifth of the rate where
    validation loss stays for two epochs, stop after five. A pretrained backbone first learns its head alone, and then,
    from there and at a lower rate, its last stage; one without weights learns as a whole.
    """
    plateau = {"schedule": "plateau", "weight_decay": 0.0, "stop_patience": 5}
    if network == "compact":
        return [(network, None, {})]
    if network == "five_block":
        return [(network, None, plateau)]
    if config.weights == "none":
        return [(network, "all", plateau)]
    lower = {**plateau, "learning_rate": config.unfrozen_learning_rate}
    return [(f"{network}-head", "head", plateau), (f"{network}-unfrozen", "last_stage", lower)]


def train(
    config,
    store: pipelines.Store,
    class_names: Sequence[str],
    network: str,
    *,
    run: Path,
    task: str,
    label: str = "",
) -> list[Trained]:
    """Train a network in all its stages and predict every image of the store, or read what an earlier call finished.

    Args:
        config: the recipe.
        store: with a split; rows of neither "train" nor "valid" are only predicted.
        class_names: label columns, which exclude each other in the training and validation rows.
        network: one of `NETWORKS`.
        run: the run folder; each stage goes to `variants/<task>-<variant>[-<label>]`.
        task: what is classified.
        label: tells trainings of the same network apart: a fold, an ablation.

    Returns:
        `Trained` of each stage.
    """
    planned = stages(config, network)
    names = ["-".join(filter(None, (task, variant, label))) for variant, _, _ in planned]
    folders = [runs.variant_folder(run, name) for name in names]
    if not all([seals.is_sealed(folder) for folder in folders]):
        environment.fresh(config.seed)
        model, receipt = build_model(config, store.images.shape[1:], len(class_names), network)
        for (variant, part, options), folder in zip(planned, folders):
            print(f"{folder.name}: {len(pipelines.rows(store, 'train'))} images to learn from", flush=True)
            if part:
                backbones.set_trainable(model, network, part)
                runs.write_json(folder / "weights.json", receipt.as_dict() if receipt else {"source": "none"})
            if receipt:
                left = len(receipt.unmatched_model)
                print(f"  weights of {receipt.source}: {len(receipt.matched)} tensors matched, {left} left random")
            fit(config, model, store, class_names, folder=folder, **options)
            runs.write_table(folder / "predictions.csv", predict_store(model, store, class_names, variant=variant))
            seals.seal(folder)
    # Read from the file in any case, so that a resumed run has the very numbers of an undisturbed one.
    return [
        Trained(
            variant,
            folder.name,
            pd.read_csv(folder / "history.csv"),
            predictions.read(folder / "predictions.csv"),
        )
        for (variant, _, _), folder in zip(planned, folders)
    ]


def predict_store(
    model: keras.Model, store: pipelines.Store, class_names: Sequence[str], *, variant: str
) -> pd.DataFrame:
    """Predict every image of a store, as a table of `kerasmed.predictions`."""
    dataset = pipelines.evaluation_dataset(store.images, np.arange(len(store.manifest)))
    return predictions.tabulate(store.manifest, model.predict(dataset, verbose=0), class_names, variant=variant)


def choose(candidates: Sequence[Trained], class_names: Sequence[str]) -> Trained:
    """Choose the network of the best balanced accuracy on the validation split; test images have no say."""
    return max(
        candidates,
        key=lambda each: predictions.balanced_accuracy(each.predictions, class_names, split="valid"),
    )


def sign_boxes(source: datasets.Source, store: pipelines.Store, *, fit: str) -> np.ndarray:
    """Where the sign lies in each image: float (num_images, 4), see `synthetic.brain.sign_boxes`; NaN in real data."""
    if source.kind == "real":
        return np.full((len(store.manifest), 4), np.nan)
    refuse("fit", fit, fit == "stretch", "'stretch': boxes are scaled with the whole image")
    return synthetic.sign_boxes(source.root, store.manifest["image_path"], store.images.shape[1:])


def pointing_game(
    store: pipelines.Store, class_names: Sequence[str], boxes: np.ndarray, explain: Callable[..., gradcam.Maps]
) -> pd.DataFrame:
    """Ask of each right answer to a test image with a sign whether Grad-CAM's peak lies on the sign.

    Args:
        store: with a split.
        class_names: label columns, the classes of the model that is asked.
        boxes: of `sign_boxes`.
        explain: of `kerasmed.gradcam.build`, for that model.

    Returns:
        DataFrame, a row an image: image_path, hit, and chance, the share of the image that the sign's box covers.
    """
    asked = pipelines.rows(store, "test")
    asked = asked[np.isfinite(boxes[asked]).all(axis=1)]
    maps = explain(store.images[asked])
    right = maps.class_ids == class_ids(store.manifest, class_names)[asked]
    hits, chance = localisation.pointing_game(maps.heat[right], boxes[asked[right]], store.images.shape[1:])
    paths = store.manifest["image_path"].to_numpy()[asked[right]]
    return pd.DataFrame({"image_path": paths, "hit": hits, "chance": chance})
