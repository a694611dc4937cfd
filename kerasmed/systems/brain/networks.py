"""Notebook 07_brain_mri: Alzheimer's severity and tumour type, each a four-class model.

kerasmed run 07_brain_mri --profile demo                    synthetic data
kerasmed run 07_brain_mri --profile cpu --data-root DIR     real images, under two hours on 2 cores
kerasmed run 07_brain_mri --data-root DIR                   real images, all that there is; for a GPU
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from kerasmed import audit, augment, backbones, datasets, images, pipelines, predictions, splits
from kerasmed.datasets import brain as data
from kerasmed.parameters import refuse, refuse_others
from kerasmed.systems.brain import shared
from kerasmed.training import Trained

CLASS_NAMES = data.CLASS_NAMES


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
        shared.refuse_unfit(self)
        refuse_others("tasks", self.tasks, data.TASKS)
        refuse_others("networks", self.networks, shared.NETWORKS)
        size = len(self.image_size) == 2 and all(isinstance(side, int) and side >= 16 for side in self.image_size)
        refuse("image_size", self.image_size, size, "[height, width], each at least 16")
        images.check_options(fit=self.fit, interpolation=self.interpolation)
        refuse("ablation", self.ablation, len(set(self.ablation)) == len(self.ablation), "each but once")
        backbones.refuse_unfit(self.networks, self.weights, self.image_size, smallest_sides=shared.SMALLEST_SIDE)
        for given in [asdict(self), *map(_parse_recipe, self.ablation)]:
            augment.build(given["augmentation"], tuple(self.image_size))
            library = given["augmentation_library"]
            known = library in shared.AUGMENTATION_LIBRARIES
            refuse("augmentation_library", library, known, "albumentations or keras")
        refuse("folds", self.folds, self.folds >= 1, "at least 1")
        for name in ("similarity", "test_share", "valid_share"):
            refuse(name, getattr(self, name), 0 < getattr(self, name) < 1, "a number between 0 and 1")
        test_share = self.test_share if self.folds == 1 else 1 / self.folds
        refuse("valid_share", self.valid_share, test_share + self.valid_share < 1, "with the test split's below 1")


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
        trained = shared.train(changed, store, CLASS_NAMES[task], config.networks[0], run=run, task=task, label=name)
        tables[name] = [trained[-1].predictions]
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
        config: `bootstraps` is used.
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
        **options,
    )
