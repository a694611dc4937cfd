"""Notebook 04_chest_backbones: six pretrained backbones under one head, each with its own preprocessing.

kerasmed run 04_chest_backbones --profile demo                synthetic data
kerasmed run 04_chest_backbones --profile cpu --data-root DIR    what real images there are, from scratch
kerasmed run 04_chest_backbones --data-root DIR               the six with ImageNet weights, for a GPU
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from kerasmed import (
    augment,
    backbones,
    environment,
    images,
    models,
    pipelines,
    predictions,
    runs,
    seals,
)
from kerasmed.datasets.chest import NO_FINDING
from kerasmed.manifest import targets
from kerasmed.parameters import refuse, refuse_others
from kerasmed.systems.chest import shared
from kerasmed.systems.chest.shared import LABELS
from kerasmed.training import Trained, Variant

NETWORKS = ("compact", *backbones.NAMES)
_SMALLEST_SIDE = 32
_TIMED_BATCH = 32


@dataclass(frozen=True)
class Config:
    """Parameters of notebook 04_chest_backbones; the notebook's parameters cell says what each means."""

    profile: str
    seed: int
    data_source: str
    synthetic_patients: int
    synthetic_seed: int
    image_size: Sequence[int]
    fit: str
    interpolation: str
    equalize: bool
    max_quarantined_share: float
    accepted: Sequence[str]
    valid_share: float
    networks: Sequence[str]
    step_only: Sequence[str]
    weights: str
    weights_seconds: float
    loss: str
    augmentation: Sequence[str]
    undersampling: float
    compare_augmentation: bool
    compare_undersampling: float
    compare_losses: Sequence[str]
    batch_size: int
    epochs: int
    learning_rate: float
    schedule: str
    stop_patience: int
    dropout: float
    precision: str
    deterministic: bool
    bootstraps: int

    def __post_init__(self):
        size = len(self.image_size) == 2 and all(isinstance(side, int) for side in self.image_size)
        size = size and min(self.image_size) >= _SMALLEST_SIDE
        refuse("image_size", self.image_size, size, f"[height, width], each at least {_SMALLEST_SIDE}")
        images.check_options(fit=self.fit, interpolation=self.interpolation)
        augment.build(self.augmentation, tuple(self.image_size))
        some_of = {
            "networks": NETWORKS,
            "step_only": [name for name in NETWORKS if name not in self.networks],
            "compare_losses": [name for name in shared.LOSSES if name != self.loss],
        }
        for name, known in some_of.items():
            refuse_others(name, getattr(self, name), known, empty=True)
        refuse("networks", self.networks, self.networks, "at least one")
        backbones.refuse_unfit(self.networks, self.weights, self.image_size)
        backbones.refuse_unfit(self.step_only, "none", self.image_size)
        refuse("valid_share", self.valid_share, 0 < self.valid_share < 1, "a number between 0 and 1")
        for name in ("undersampling", "compare_undersampling"):
            refuse(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a share, at least 0 and below 1")
        refuse("weights_seconds", self.weights_seconds, self.weights_seconds > 0, "more than 0")
        refuse("epochs", self.epochs, self.epochs >= 1, "at least 1")
        shared.refuse_unfit(self)


def variants(config: Config) -> list[Variant]:
    """List the trainings that a configuration asks for: the networks, then what the first is compared with."""
    first = config.networks[0]
    listed = [Variant(name, name, config, None) for name in config.networks]
    if config.compare_augmentation:
        what = "no augmentation" if config.augmentation else "noise and rotation"
        other = replace(config, augmentation=[] if config.augmentation else ["noise", "rotate"])
        listed.append(Variant(f"{first}, {what}", first, other, first))
    if config.compare_undersampling != config.undersampling:
        share = config.compare_undersampling
        other = replace(config, undersampling=share)
        listed.append(Variant(f"{first}, {share:.0%} of {NO_FINDING} left out", first, other, first))
    for loss in config.compare_losses:
        listed.append(Variant(f"{first}, {loss} loss", first, replace(config, loss=loss, compare_losses=[]), first))
    return listed


def undersample(config: Config, store: pipelines.Store) -> pipelines.Store:
    """Leave a share of the training images without any finding out; validation and test keep theirs."""
    manifest = store.manifest
    healthy = np.flatnonzero((manifest["split"] == "train") & (manifest[NO_FINDING] == 1))
    count = round(config.undersampling * len(healthy))
    left_out = np.random.default_rng(config.seed).permutation(healthy)[:count]
    return store._replace(
        manifest=manifest.assign(split=manifest["split"].mask(manifest.index.isin(left_out), "left out"))
    )


def build_model(config: Config, network: str) -> tuple[keras.Model, backbones.Receipt | None]:
    """Build a network under the head that all share.

    Returns:
        The model, and which tensors of a pretrained backbone's weights were taken over (None from scratch).
    """
    size = tuple(config.image_size)
    if network == "compact":
        whole, receipt = models.compact_cnn(size, len(LABELS), activation="sigmoid"), None
        features = keras.Model(whole.inputs, whole.get_layer("pool").output, name=network)
    else:
        options = {"weights": config.weights, "time_limit": config.weights_seconds}
        features, receipt = backbones.build(network, size, **options)
    outputs = models.two_layer_head(features.output, len(LABELS), dropout=config.dropout)
    return keras.Model(features.inputs, outputs, name=network), receipt


def find_weights(config: Config) -> None:
    """Have the weights of every backbone at hand; see `kerasmed.backbones.find_weights` for what it raises."""
    for network in config.networks:
        if network in backbones.NAMES:
            backbones.find_weights(network, config.weights, time_limit=config.weights_seconds)


def train(variant: Variant, store: pipelines.Store, *, run: Path) -> Trained:
    """Train a variant and predict every image of the store, or read what an earlier call finished.

    Args:
        variant: of `variants`.
        store: of `shared.split`; the variant's undersampling is applied here.
        run: the run folder; the training goes to `variants/<name>`, what it cost to cost.json there.
    """
    config, folder = variant.config, runs.variant_folder(run, variant.name)
    if not seals.is_sealed(folder):
        environment.fresh(config.seed)
        learnt_from = undersample(config, store)
        model, receipt = build_model(config, variant.network)
        print(f"{variant.name}: {len(pipelines.rows(learnt_from, 'train'))} images to learn from", flush=True)
        if receipt:
            runs.write_json(folder / "weights.json", receipt.as_dict())
        rates = {"epochs": config.epochs, "learning_rate": config.learning_rate}
        shared.fit(config, model, learnt_from, LABELS, folder=folder, **rates)
        runs.write_json(folder / "cost.json", cost(model, store))
        table = shared.predict_store(model, store, LABELS, variant=variant.name)
        runs.write_table(folder / "predictions.csv", table)
        seals.seal(folder)
    # Read from the file in any case, so that a resumed run has the very numbers of an undisturbed one.
    history, table = pd.read_csv(folder / "history.csv"), predictions.read(folder / "predictions.csv")
    return Trained(variant.name, folder.name, history, table)


def cost(model: keras.Model, store: pipelines.Store, *, repeats: int = 3) -> dict:
    """Measure what a model costs: its weights, and milliseconds to predict an image, in batches of 32 from the store.

    Returns:
        {"weights": int, "ms_an_image": float, the median of `repeats`}.
    """
    rows = np.arange(min(len(store.manifest), 2 * _TIMED_BATCH))
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        dataset = pipelines.evaluation_dataset(store.images, rows, batch_size=_TIMED_BATCH)
        began = time.perf_counter()
        model.predict(dataset, verbose=0)
        seconds.append(time.perf_counter() - began)
    return {"weights": model.count_params(), "ms_an_image": 1000 * float(np.median(seconds[1:])) / len(rows)}


def from_scratch(config: Config) -> Config:
    """The configuration without pretrained weights."""
    return replace(config, weights="none")


def step(config: Config, network: str, store: pipelines.Store, *, run: Path) -> dict:
    """Build a network from scratch, train it on one batch, and predict with it: that it works, not how well.

    What an earlier call wrote to `variants/<network>-step/cost.json` is read.

    Returns:
        What `cost` says, with loss and loss_after: of the batch at the first and the third step, with dropout.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    path = runs.variant_folder(run, f"{network}-step") / "cost.json"
    if path.exists():
        return runs.read_json(path)
    environment.fresh(config.seed)
    model, _ = build_model(from_scratch(config), network)
    learnt = pipelines.rows(store, "train")
    y = targets(store.manifest, LABELS)
    pixels, wanted = pipelines.batch(
        store.images, learnt, y[learnt], seed=config.seed, epoch=0, index=0, batch_size=config.batch_size
    )
    trained = keras.Model(model.inputs[0], model.get_layer("logits").output)
    # Eagerly: to trace a graph of hundreds of layers takes longer than three steps.
    loss = shared.build_loss(config.loss, y[learnt])
    trained.compile(keras.optimizers.Adam(config.learning_rate), loss, run_eagerly=True)
    told = [float(trained.train_on_batch(pixels, wanted)) for _ in range(3)]
    if not np.isfinite(told).all():
        raise FloatingPointError(f"the loss of {network} in three steps is {told}.")
    content = {**cost(model, store), "loss": told[0], "loss_after": told[-1]}
    runs.write_json(path, content)
    return content


def costs(run: Path, trained: Mapping[str, Trained]) -> pd.DataFrame:
    """What each training cost: weights, ms_an_image of `cost`, minutes_an_epoch (the median); indexed by variant."""
    found = {}
    for name, each in trained.items():
        found[name] = runs.read_json(runs.variant_folder(run, each.folder) / "cost.json")
        found[name]["minutes_an_epoch"] = each.history["seconds"].median() / 60
    return pd.DataFrame(found).T.astype({"weights": int}).round({"ms_an_image": 2, "minutes_an_epoch": 3})
