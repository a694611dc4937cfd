"""Brain MRI: Alzheimer's severity and tumour type, each a four-class model.

    kerasmed run 07_brain_mri --profile demo                    synthetic data, about 6 minutes on 2 cores
    kerasmed run 07_brain_mri --profile cpu --data-root DIR     real images, under two hours on 2 cores
    kerasmed run 07_brain_mri --data-root DIR                   real images, all that there is; for a GPU

The published train and test folders are pooled and split anew by group, because both tasks' published test sets hold
slices of patients, or copies of images, that are in training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
    images,
    layers,
    localisation,
    losses,
    models,
    pipelines,
    predictions,
    runs,
    splits,
    training,
)
from kerasmed.datasets import brain as data
from kerasmed.datasets.synthetic import brain as synthetic
from kerasmed.manifest import class_ids, targets
from kerasmed.parameters import refuse
from kerasmed.training import Trained

NOTEBOOK = "07_brain_mri"  # whose runs `predict` uses
CLASS_NAMES = data.CLASS_NAMES
NETWORKS = ("compact", "five_block", *backbones.NAMES)
SMALLEST_SIDE = {"five_block": models.FIVE_BLOCK_SIDE}
AUGMENTATION_LIBRARIES = ("albumentations", "keras")


@dataclass(frozen=True)
class Config:
    """Parameters of notebook 07_brain_mri; the notebook's parameters cell says what each means."""

    profile: str
    seed: int
    data_source: str
    synthetic_patients_per_class: int
    synthetic_slices_per_patient: int
    synthetic_seed: int
    tasks: Sequence[str]
    image_size: Sequence[int]
    fit: str
    interpolation: str
    equalize: bool
    max_quarantined_share: float
    similarity: float
    accepted: Sequence[str]
    test_share: float
    valid_share: float
    folds: int
    networks: Sequence[str]
    weights: str
    weights_seconds: float
    augmentation: Sequence[str]
    augmentation_library: str
    ablation: Sequence[str]
    compare_class_weights: bool
    published_protocol: bool
    batch_size: int
    epochs: int
    learning_rate: float
    unfrozen_learning_rate: float
    weight_decay: float
    schedule: str
    stop_patience: int
    dropout: float
    class_weights: bool
    focusing: float
    precision: str
    deterministic: bool
    bootstraps: int

    def __post_init__(self):
        refuse(
            "tasks", self.tasks, set(self.tasks) <= set(data.TASKS) and self.tasks, f"some of {', '.join(data.TASKS)}"
        )
        size = len(self.image_size) == 2 and all(isinstance(side, int) and side >= 16 for side in self.image_size)
        refuse("image_size", self.image_size, size, "[height, width], each at least 16")
        images.check_options(fit=self.fit, interpolation=self.interpolation)
        refuse(
            "networks",
            self.networks,
            set(self.networks) <= set(NETWORKS) and self.networks,
            f"some of {', '.join(NETWORKS)}",
        )
        refuse(
            "accepted", self.accepted, set(self.accepted) <= set(audit.FAILING), f"some of {', '.join(audit.FAILING)}"
        )
        for name in ("tasks", "networks", "ablation"):
            given = getattr(self, name)
            refuse(name, given, len(set(given)) == len(given), "each but once")
        backbones.refuse_unfit(self.networks, self.weights, self.image_size, smallest_sides=SMALLEST_SIDE)
        for given in [asdict(self), *map(_parse_recipe, self.ablation)]:
            augment.build(given["augmentation"], tuple(self.image_size))
            library = given["augmentation_library"]
            refuse("augmentation_library", library, library in AUGMENTATION_LIBRARIES, "albumentations or keras")
        for name in (
            "synthetic_patients_per_class",
            "synthetic_slices_per_patient",
            "folds",
            "batch_size",
            "epochs",
            "bootstraps",
        ):
            refuse(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("similarity", "test_share", "valid_share", "learning_rate", "unfrozen_learning_rate"):
            refuse(name, getattr(self, name), 0 < getattr(self, name) < 1, "a number between 0 and 1")
        test_share = self.test_share if self.folds == 1 else 1 / self.folds
        refuse("valid_share", self.valid_share, test_share + self.valid_share < 1, "with the test split's below 1")
        refuse("weights_seconds", self.weights_seconds, self.weights_seconds > 0, "more than 0")
        for name in ("weight_decay", "focusing", "stop_patience"):
            refuse(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        refuse("max_quarantined_share", self.max_quarantined_share, 0 <= self.max_quarantined_share <= 1, "0 to 1")
        refuse("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1")
        refuse(
            "schedule", self.schedule, self.schedule in training.SCHEDULES, f"one of {', '.join(training.SCHEDULES)}"
        )


def read(config: Config, source: datasets.Source, task: str) -> pipelines.Store:
    """Read a task's manifest, decode its images once, and find its groups.

    Patients are the groups where a `patients.csv` gives them, similarity groups where none does.

    Returns:
        `pipelines.Store` whose manifest has `group_id`.

    Raises:
        ValueError: a class has no readable image.
    """
    store = pipelines.decode(
        data.read(source.root, task),
        source.root,
        **pipelines.decode_options(asdict(config)),
        max_quarantined_share=config.max_quarantined_share,
    )
    unread = [name for name in CLASS_NAMES[task] if not store.manifest[name].any()]
    if unread:
        raise ValueError(f"{task} has no readable image of {', '.join(unread)}; see {store.folder / 'quarantine.csv'}.")
    manifest = audit.assign_groups(
        store.manifest, store.thumbnails, prefix=task, threshold=config.similarity, facts=store.facts
    )
    return store._replace(manifest=manifest)


def split(config: Config, store: pipelines.Store, task: str) -> list[pipelines.Store]:
    """Split a store's rows anew by group, once or into `folds`, and refuse to go on where anything leaks.

    Returns:
        A store for each fold, which share their pixels; with `folds` 1 the only one's test split has `test_share`.
    """
    shares = {"valid_share": config.valid_share, "seed": config.seed}
    names = CLASS_NAMES[task]
    if config.folds == 1:
        manifests = [splits.assign(store.manifest, names, test_share=config.test_share, **shares)]
    else:
        manifests = splits.cross_validate(store.manifest, names, num_folds=config.folds, **shares)
    stores = [store._replace(manifest=manifest) for manifest in manifests]
    for each in stores:
        gate(config, each, task)
    return stores


def gate(config: Config, store: pipelines.Store, task: str) -> pd.DataFrame:
    """Ask `audit.gate` whether a split store may be trained on; `accepted` is let through."""
    identity = audit.identify(store.thumbnails, store.facts)
    return audit.gate(store.manifest, identity, CLASS_NAMES[task], accepted=config.accepted)


def published_splits(config: Config, store: pipelines.Store, task: str) -> dict[str, pipelines.Store]:
    """Keep the published test folder, leaks and all, for comparison with published results.

    Returns:
        The store with that split, as "published test", and without the test images that have a relative in training,
        as "published test, clean" (where any are left); nothing where the set has no test folder, or none is asked for.
    """
    if not config.published_protocol or not (store.manifest["split"] == "test").any():
        return {}
    manifest = splits.published(store.manifest, CLASS_NAMES[task], valid_share=config.valid_share, seed=config.seed)
    clean = manifest.assign(split=manifest["split"].mask(manifest["leaked"], "left out"))
    found = {"published test": manifest, "published test, clean": clean}
    return {name: store._replace(manifest=each) for name, each in found.items() if (each["split"] == "test").any()}


def build_model(config: Config, task: str, network: str) -> tuple[keras.Model, backbones.Receipt | None]:
    """Build a network for a task.

    Returns:
        The model, and which tensors of a pretrained backbone's weights were taken over (None from scratch).
    """
    size, num_classes = tuple(config.image_size), len(CLASS_NAMES[task])
    if network == "compact":
        return models.compact_cnn(size, num_classes, dropout=config.dropout), None
    if network == "five_block":
        return models.five_block_cnn(size, num_classes), None
    features, receipt = backbones.build(network, size, weights=config.weights, time_limit=config.weights_seconds)
    return models.classifier(features, num_classes, dropout=config.dropout), receipt


def find_weights(config: Config) -> None:
    """Have the weights of every backbone at hand, so that their lack shows before hours of training.

    Raises:
        kerasmed.backbones.DownloadError: a file is neither in the cache nor to be had.
        ValueError: `weights` is no such thing.
        FileNotFoundError: no file at `weights`.
    """
    for network in config.networks:
        if network in backbones.NAMES:
            backbones.find_weights(network, config.weights, time_limit=config.weights_seconds)


def recipe(config: Config):
    """Build the augmentation that a configuration names, with Albumentations or with Keras's layers."""
    build = layers.build_augmentation if config.augmentation_library == "keras" else augment.build
    return build(config.augmentation, tuple(config.image_size))


def make_datasets(config: Config, store: pipelines.Store, task: str):
    """Make the training datasets (a function of the first epoch) and the validation dataset."""
    y = targets(store.manifest, CLASS_NAMES[task])
    return pipelines.datasets_of(store, y, batch_size=config.batch_size, seed=config.seed, augment=recipe(config))


def fit(
    config: Config, model: keras.Model, store: pipelines.Store, task: str, *, folder: Path, **options
) -> pd.DataFrame:
    """Train a model on a store's training rows, or go on with it; `options` of `training.fit` take precedence."""
    train_from, valid = make_datasets(config, store, task)
    train = pipelines.rows(store, "train")
    ids = class_ids(store.manifest, CLASS_NAMES[task])[train]
    weights = losses.balanced_class_weights(ids, len(CLASS_NAMES[task])) if config.class_weights else None
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


def stages(config: Config, network: str) -> list[tuple[str, str | None, dict]]:
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
    config: Config, store: pipelines.Store, task: str, network: str, *, run: Path, label: str = ""
) -> list[Trained]:
    """Train a network in all its stages and predict every image of the store, or read what an earlier call finished.

    Args:
        config: the recipe.
        store: with a split.
        task: one of `CLASS_NAMES`.
        network: one of `NETWORKS`.
        run: the run folder; each stage goes to `variants/<task>-<variant>[-<label>]`.
        label: tells trainings of the same network apart: a fold, an ablation.

    Returns:
        `Trained` of each stage.
    """
    planned = stages(config, network)
    names = ["-".join(filter(None, (task, variant, label))) for variant, _, _ in planned]
    folders = [runs.variant_folder(run, name) for name in names]
    if not all((folder / "predictions.csv").exists() for folder in folders):
        environment.fresh(config.seed)
        model, receipt = build_model(config, task, network)
        for (variant, part, options), folder in zip(planned, folders):
            print(f"{folder.name}: {len(pipelines.rows(store, 'train'))} images to learn from", flush=True)
            if part:
                backbones.set_trainable(model, network, part)
                runs.write_json(folder / "weights.json", receipt.as_dict() if receipt else {"source": "none"})
            if receipt:
                left = len(receipt.unmatched_model)
                print(f"  weights of {receipt.source}: {len(receipt.matched)} tensors matched, {left} left random")
            fit(config, model, store, task, folder=folder, **options)
            runs.write_table(folder / "predictions.csv", predict_store(model, store, task, variant=variant))
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


def predict_store(model: keras.Model, store: pipelines.Store, task: str, *, variant: str) -> pd.DataFrame:
    """Predict every image of a store, as a table of `kerasmed.predictions`."""
    dataset = pipelines.evaluation_dataset(store.images, np.arange(len(store.manifest)))
    return predictions.tabulate(store.manifest, model.predict(dataset, verbose=0), CLASS_NAMES[task], variant=variant)


def choose(candidates: Sequence[Trained], task: str) -> Trained:
    """Choose the network of the best balanced accuracy on the validation split; test images have no say."""
    return max(
        candidates,
        key=lambda each: predictions.balanced_accuracy(each.predictions, CLASS_NAMES[task], split="valid"),
    )


def ablations(config: Config) -> dict[str, Config]:
    """List what to try instead of the configuration, each with one thing changed, by name.

    Augmentation recipes of `ablation` ("flip+rotate", "none", with "keras:" before it for Keras's layers), and class
    weights turned on (or off).
    """
    changed = {f"augmentation {text}": replace(config, **_parse_recipe(text)) for text in config.ablation}
    if config.compare_class_weights:
        weighted = not config.class_weights
        changed[f"class weights {'on' if weighted else 'off'}"] = replace(config, class_weights=weighted)
    return changed


def _parse_recipe(text: str) -> dict:
    library, _, names = text.rpartition(":")
    return {
        "augmentation": [] if names == "none" else names.split("+"),
        "augmentation_library": library or "albumentations",
    }


def ablate(config: Config, reference: Trained, store: pipelines.Store, task: str, *, run: Path) -> list[dict]:
    """Train the first network again for each of `ablations`, and score them beside the training that they depart from.

    Returns:
        Rows of `evaluate` with `reference`; none where there is nothing to try.
    """
    tables = {reference.variant: [reference.predictions]}
    for name, changed in ablations(config).items():
        tables[name] = [train(changed, store, task, config.networks[0], run=run, label=name)[-1].predictions]
    if len(tables) == 1:
        return []
    return evaluate(config, tables, [store], task, split="test of fold 1", reference=reference.variant)


def evaluate(
    config: Config,
    tables: Mapping[str, Sequence[pd.DataFrame]],
    folds: Sequence[pipelines.Store],
    task: str,
    **options,
) -> list[dict]:
    """Score the test images of all folds; `options` of `kerasmed.predictions.evaluate`.

    Args:
        config: `bootstraps` and `seed` are used.
        tables: variant -> predictions of each fold.
        folds: a store for each fold.
        task: one of `CLASS_NAMES`.

    Returns:
        Rows of `kerasmed.metrics.multiclass_rows`.
    """
    return predictions.evaluate(
        tables,
        [store.manifest for store in folds],
        folds[0].thumbnails,
        CLASS_NAMES[task],
        task=task,
        num_draws=config.bootstraps,
        seed=config.seed,
        **options,
    )


def sign_boxes(config: Config, source: datasets.Source, store: pipelines.Store) -> np.ndarray:
    """Where the sign lies in each image: float (num_images, 4), see `synthetic.brain.sign_boxes`; NaN in real data."""
    if source.kind == "real":
        return np.full((len(store.manifest), 4), np.nan)
    refuse("fit", config.fit, config.fit == "stretch", "'stretch': boxes are scaled with the whole image")
    return synthetic.sign_boxes(source.root, store.manifest["image_path"], tuple(config.image_size))


def pointing_game(
    store: pipelines.Store, task: str, boxes: np.ndarray, explain: Callable[..., gradcam.Maps]
) -> pd.DataFrame:
    """Ask of each right answer to a test image with a sign whether Grad-CAM's peak lies on the sign.

    Args:
        store: with a split.
        task: one of `CLASS_NAMES`.
        boxes: of `sign_boxes`.
        explain: of `kerasmed.gradcam.build`, for the model that is asked.

    Returns:
        DataFrame, a row an image: image_path, hit, and chance, the share of the image that the sign's box covers.
    """
    asked = pipelines.rows(store, "test")
    asked = asked[np.isfinite(boxes[asked]).all(axis=1)]
    maps = explain(store.images[asked])
    right = maps.class_ids == class_ids(store.manifest, CLASS_NAMES[task])[asked]
    hits, chance = localisation.pointing_game(maps.heat[right], boxes[asked[right]], store.images.shape[1:])
    paths = store.manifest["image_path"].to_numpy()[asked[right]]
    return pd.DataFrame({"image_path": paths, "hit": hits, "chance": chance})


def predict(run: Path, path, *, progress: bool = True) -> pd.DataFrame:
    """Predict raw image files with every model of a run, reading them as its training did.

    With folds it is the first fold's model, which has learnt from part of the run's own images.

    Args:
        run: a complete run folder of 07_brain_mri.
        path: an image file or a folder, searched through.
        progress: show a bar.

    Returns:
        DataFrame of `kerasmed.pipelines.predict_files`, with `<task>`, the likeliest class, before each task's columns.
    """
    params = runs.read_json(run / "params.json")
    tasks = params["tasks"]
    loaded = [(keras.saving.load_model(run / f"model-{task}.keras"), CLASS_NAMES[task]) for task in tasks]
    table = pipelines.predict_files(path, loaded, **pipelines.decode_options(params), progress=progress)
    for task in tasks:
        probabilities = table[[f"p_{name}" for name in CLASS_NAMES[task]]]
        likeliest = np.array(CLASS_NAMES[task])[probabilities.fillna(0).to_numpy().argmax(axis=1)]
        place = table.columns.get_loc(probabilities.columns[0])
        table.insert(place, task, np.where(table["error"] == "", likeliest, ""))
    return table
