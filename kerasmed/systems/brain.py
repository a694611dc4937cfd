"""Brain MRI: Alzheimer's severity and tumour type, each a four-class model.

    kerasmed run 07_brain_mri --profile demo       synthetic data, about 2 minutes on 2 cores
    kerasmed run 07_brain_mri --data-root DIR      real images, about 20 minutes on 2 cores

The published train and test folders are pooled and split anew by group, because both tasks' published test sets hold
slices of patients, or copies of images, that are in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

from kerasmed import audit, augment, datasets, images, losses, metrics, models, pipelines, runs, splits, training
from kerasmed.datasets import brain as data
from kerasmed.manifest import class_ids, targets

NOTEBOOK = "07_brain_mri"  # whose runs `predict` uses
CLASS_NAMES = data.CLASS_NAMES
# A class of fewer groups cannot stand in train, valid and test at once.
MIN_GROUPS = 3


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
    test_share: float
    valid_share: float
    augmentation: Sequence[str]
    batch_size: int
    epochs: int
    learning_rate: float
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
        _refuse(
            "tasks", self.tasks, set(self.tasks) <= set(data.TASKS) and self.tasks, f"some of {', '.join(data.TASKS)}"
        )
        size = len(self.image_size) == 2 and all(isinstance(side, int) and side >= 16 for side in self.image_size)
        _refuse("image_size", self.image_size, size, "[height, width], each at least 16")
        images.check_options(fit=self.fit, interpolation=self.interpolation)
        augment.build(self.augmentation, tuple(self.image_size))
        for name in (
            "synthetic_patients_per_class",
            "synthetic_slices_per_patient",
            "batch_size",
            "epochs",
            "bootstraps",
        ):
            _refuse(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("similarity", "test_share", "valid_share", "learning_rate"):
            _refuse(name, getattr(self, name), 0 < getattr(self, name) < 1, "a number between 0 and 1")
        _refuse("test_share", self.test_share, self.test_share + self.valid_share < 1, "with `valid_share` below 1")
        _refuse("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1")
        _refuse(
            "schedule", self.schedule, self.schedule in training.SCHEDULES, f"one of {', '.join(training.SCHEDULES)}"
        )


def _refuse(name, value, fits, expected):
    if not fits:
        raise ValueError(f"parameter `{name}` is {value!r}; expected {expected}.")


def decode_options(parameters: Mapping) -> dict:
    """Pick out of a run's parameters what `pipelines.decode` and `decode_stream` do with a file."""
    options = {name: parameters[name] for name in ("fit", "interpolation", "equalize")}
    return {"image_size": tuple(parameters["image_size"]), "read_options": options}


def parameter_names() -> list[str]:
    """Return the notebook parameters that a configuration is made of: all but the two roots."""
    return [field.name for field in fields(Config)]


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
        **decode_options(asdict(config)),
        max_quarantined_share=config.max_quarantined_share,
    )
    unread = [name for name in CLASS_NAMES[task] if not store.manifest[name].any()]
    if unread:
        raise ValueError(f"{task} has no readable image of {', '.join(unread)}; see {store.folder / 'quarantine.csv'}.")
    manifest = store.manifest
    if manifest["group_id"].isna().all():
        found = audit.similarity_groups(store.thumbnails, threshold=config.similarity)
        manifest = manifest.assign(group_id=[f"{task}-{number:05d}" for number in found])
    return store._replace(manifest=manifest)


def split(config: Config, store: pipelines.Store, task: str) -> pipelines.Store:
    """Split a store's rows anew by group, and refuse to go on where anything leaks."""
    manifest = splits.assign(
        store.manifest,
        CLASS_NAMES[task],
        test_share=config.test_share,
        valid_share=config.valid_share,
        seed=config.seed,
    )
    audit.gate(manifest)
    return store._replace(manifest=manifest)


def rows(store: pipelines.Store, split: str) -> np.ndarray:
    """Return the positions of a split's images in the store, int."""
    return np.flatnonzero(store.manifest["split"] == split)


def samples(store: pipelines.Store, task: str, *, count: int = 8) -> np.ndarray:
    """Return positions of `count` images of each class (fewer where there are fewer), spread over the class, int."""
    ids = class_ids(store.manifest, CLASS_NAMES[task])
    of_class = [np.flatnonzero(ids == number) for number in range(len(CLASS_NAMES[task]))]
    return np.concatenate(
        [found[np.linspace(0, len(found) - 1, min(count, len(found)), dtype=int)] for found in of_class]
    )


def build_model(config: Config, task: str) -> keras.Model:
    """Build the compact residual network for a task."""
    return models.compact_cnn(tuple(config.image_size), len(CLASS_NAMES[task]), dropout=config.dropout)


def make_datasets(config: Config, store: pipelines.Store, task: str):
    """Make the training datasets (a function of the first epoch) and the validation dataset."""
    y = targets(store.manifest, CLASS_NAMES[task])
    train, valid = rows(store, "train"), rows(store, "valid")
    recipe = augment.build(config.augmentation, tuple(config.image_size))

    def train_from(first_epoch):
        return pipelines.training_dataset(
            store.images,
            train,
            y[train],
            batch_size=config.batch_size,
            seed=config.seed,
            first_epoch=first_epoch,
            augment=recipe,
        )

    return train_from, pipelines.evaluation_dataset(store.images, valid, y[valid])


def fit(config: Config, model: keras.Model, store: pipelines.Store, task: str, *, folder: Path) -> pd.DataFrame:
    """Train a model on a store's training rows, or go on with it; see `kerasmed.training.fit`."""
    train_from, valid = make_datasets(config, store, task)
    train = rows(store, "train")
    ids = class_ids(store.manifest, CLASS_NAMES[task])[train]
    weights = losses.balanced_class_weights(ids, len(CLASS_NAMES[task])) if config.class_weights else None
    return training.fit(
        model,
        train_from,
        valid,
        folder=folder,
        steps_per_epoch=pipelines.steps_per_epoch(len(train), config.batch_size),
        epochs=config.epochs,
        loss=losses.WeightedCategoricalCrossentropy(weights, config.focusing),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        stop_patience=config.stop_patience,
    )


def predict_store(model: keras.Model, store: pipelines.Store, task: str, *, variant: str) -> pd.DataFrame:
    """Predict every image of a store.

    Returns:
        DataFrame: the ids, split, variant, y_<class> and p_<class>.
    """
    names = CLASS_NAMES[task]
    probabilities = model.predict(pipelines.evaluation_dataset(store.images, np.arange(len(store.manifest))), verbose=0)
    ids = store.manifest[["image_path", "patient_id", "study_id", "group_id", "split"]].assign(variant=variant)
    truth = store.manifest[list(names)].set_axis([f"y_{name}" for name in names], axis=1)
    return pd.concat([ids, truth, pd.DataFrame(probabilities, columns=[f"p_{name}" for name in names])], axis=1)


def scored(predictions: pd.DataFrame, store: pipelines.Store, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the test split's positions in the store, class ids, and predicted probabilities (num_images, 4)."""
    test = rows(store, "test")
    ids = class_ids(store.manifest, CLASS_NAMES[task])[test]
    return test, ids, predictions.loc[test, [f"p_{name}" for name in CLASS_NAMES[task]]].to_numpy()


def confident(
    predictions: pd.DataFrame, store: pipelines.Store, task: str, *, right: bool, count: int = 8
) -> np.ndarray:
    """Return positions of the test images that were surest, right or wrong, one a group, surest first, int."""
    test, truth, probabilities = scored(predictions, store, task)
    found = pd.DataFrame(
        {"position": test, "sure": probabilities.max(axis=1), "group": store.manifest["group_id"].to_numpy()[test]}
    )
    found = found[(probabilities.argmax(axis=1) == truth) == right].sort_values("sure", ascending=False, kind="stable")
    return found.drop_duplicates("group")["position"].to_numpy()[:count]


def evaluate(config: Config, predictions: pd.DataFrame, store: pipelines.Store, task: str) -> list[dict]:
    """Score a task's test split beside majority and nearest neighbour, with intervals over groups.

    Classes of fewer than three groups cannot be in all splits: the figures without them are given as well, over the
    images of the other classes, with the probabilities of these.

    Returns:
        Rows of `kerasmed.metrics.multiclass_rows`.
    """
    names = CLASS_NAMES[task]
    test, truth, predicted = scored(predictions, store, task)
    ids = class_ids(store.manifest, names)
    num_groups = [store.manifest.loc[ids == number, "group_id"].nunique() for number in range(len(names))]
    kept = np.flatnonzero(np.array(num_groups) >= MIN_GROUPS)
    table = []
    for classes in [np.arange(len(names))] + ([kept] if 1 < len(kept) < len(names) else []):
        among = np.isin(truth, classes)
        probabilities = {
            predictions["variant"].iloc[0]: predicted[among][:, classes],
            **_baselines(store, ids, test[among], classes),
        }
        table += metrics.multiclass_rows(
            np.searchsorted(classes, truth[among]),
            probabilities,
            store.manifest["group_id"].to_numpy()[test[among]],
            [names[number] for number in classes],
            task=task,
            prefix="" if len(classes) == len(names) else f"{len(classes)} classes: ",
            num_draws=config.bootstraps,
            seed=config.seed,
        )
    return table


def _baselines(store, ids, queries, classes) -> dict[str, np.ndarray]:
    """Answers of majority and nearest neighbour to some images, learnt from the training images of some classes."""
    train = rows(store, "train")
    train = train[np.isin(ids[train], classes)]
    known = np.searchsorted(classes, ids[train])
    neighbour, _ = audit.nearest(store.thumbnails[queries], store.thumbnails[train])
    return {
        metrics.MAJORITY: metrics.majority_probabilities(known, len(queries), len(classes)),
        metrics.NEAREST_NEIGHBOUR: np.eye(len(classes))[known[neighbour]],
    }


def predict(run: Path, path, *, progress: bool = True) -> pd.DataFrame:
    """Predict raw image files with every model of a run, reading them as its training did.

    Args:
        run: a complete run folder of 07_brain_mri.
        path: an image file or a folder, searched through.
        progress: show a bar.

    Returns:
        DataFrame, a row a file: image_path (relative to the folder), error ("" or why it could not be read), and for
        each task `<task>` (the likeliest class) and `p_<class>`; empty for unreadable files.

    Raises:
        FileNotFoundError: no such path, or no image below it.
    """
    path = Path(path)
    params = runs.read_json(run / "params.json")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name an image file or a folder of images.")
    root = path if path.is_dir() else path.parent
    found = list(datasets.files(path)) if path.is_dir() else [path]
    names = [
        Path(entry).relative_to(root).as_posix() for entry in found if Path(entry).suffix.lower() in images.SUFFIXES
    ]
    if not names:
        raise FileNotFoundError(f"no image under {path}; files ending in {', '.join(images.SUFFIXES)} are read.")
    loaded = {task: keras.saving.load_model(run / f"model-{task}.keras") for task in params["tasks"]}
    tables = []
    with tqdm(
        total=len(names), unit="image", desc="predict", disable=not progress, mininterval=1, ascii=True, ncols=80
    ) as bar:
        for pixels, reasons in pipelines.decode_stream(root, names, **decode_options(params)):
            readable = reasons == ""
            table = pd.DataFrame({"error": reasons})
            for task, model in loaded.items():
                classes = CLASS_NAMES[task]
                probabilities = np.full((len(reasons), len(classes)), np.nan, np.float32)
                if readable.any():
                    probabilities[readable] = model.predict_on_batch(pixels[readable][..., None])
                table[task] = np.where(readable, np.array(classes)[np.nan_to_num(probabilities).argmax(axis=1)], "")
                table[[f"p_{name}" for name in classes]] = probabilities
            tables.append(table)
            bar.update(len(reasons))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "image_path", names)
    return table


def headline(rows: Sequence[Mapping], *, variant: str) -> list[Mapping]:
    """Pick the rows that answer the notebook's question: accuracy and balanced accuracy over all classes that occur."""
    return [
        row
        for row in rows
        if row["variant"] == variant
        and row["metric"] in ("accuracy", "balanced_accuracy")
        and (row["label"] == "all" or row["label"].endswith(": all"))
    ]
