"""Notebook 06_mura_densenet: data, and models for all study types and for each."""

from collections.abc import Sequence
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
    images,
    losses,
    models,
    pipelines,
    predictions,
    runs,
    saved_models,
    seals,
    splits,
    training,
)
from kerasmed.datasets import mura as data
from kerasmed.manifest import targets
from kerasmed.parameters import refuse
from kerasmed.training import Stage, Trained, Variant

CLASS_NAMES = data.CLASS_NAMES[data.PART]
(LABEL,) = CLASS_NAMES
NETWORKS = ("compact", *backbones.NAMES)
LOSSES = ("per_type", "plain")
ALL = "all"  # of study types: each that the data have
# The rate falls to a tenth after one epoch without a better validation loss, as in the paper.
PLATEAU = {"plateau_patience": 1, "plateau_factor": 0.1}
_SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Config:
    """Parameters of notebook 06_mura_densenet; the notebook's parameters cell says what each means."""

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
    network: str
    weights: str
    weights_seconds: float
    loss: str
    augmentation: Sequence[str]
    batch_size: int
    epochs: int
    learning_rate: float
    schedule: str
    stop_patience: int
    dropout: float
    fine_tune: bool
    head_epochs: int
    unfrozen_share: float
    flips_at_test: bool
    ensemble_seeds: Sequence[int]
    compare_loss: bool
    compare_fine_tuning: bool
    experts: Sequence[str]
    tuned_experts: Sequence[str]
    expert_epochs: int
    cam_images: int
    precision: str
    deterministic: bool
    bootstraps: int

    def __post_init__(self):
        size = len(self.image_size) == 2 and all(isinstance(side, int) for side in self.image_size)
        size = size and min(self.image_size) >= _SMALLEST_SIDE
        refuse("image_size", self.image_size, size, f"[height, width], each at least {_SMALLEST_SIDE}")
        images.check_options(fit=self.fit, interpolation=self.interpolation)
        augment.build(self.augmentation, tuple(self.image_size))
        one_of = {"network": NETWORKS, "loss": LOSSES, "schedule": training.SCHEDULES}
        for name, known in one_of.items():
            refuse(name, getattr(self, name), getattr(self, name) in known, f"one of {', '.join(known)}")
        refuse(
            "accepted", self.accepted, set(self.accepted) <= set(audit.FAILING), f"some of {', '.join(audit.FAILING)}"
        )
        for name in ("experts", "tuned_experts"):
            given = getattr(self, name)
            fits = len(set(given)) == len(given) and (ALL not in given or len(given) == 1)
            refuse(name, given, fits, f"study types, each but once, or {ALL} alone")
        backbones.refuse_unfit([self.network], self.weights, self.image_size)
        of_backbone = self.network != "compact" or self.weights != "imagenet"
        refuse("weights", self.weights, of_backbone, "none or a .keras file, as no ImageNet weights of compact exist")
        for name in ("fine_tune", "compare_fine_tuning"):
            pretrained = self.weights != "none" or not getattr(self, name)
            refuse(name, getattr(self, name), pretrained, "false, as with weights none there is nothing to go on from")
        seeds = [self.seed, *self.ensemble_seeds]
        refuse("ensemble_seeds", self.ensemble_seeds, len(set(seeds)) == len(seeds), "further seeds, each but once")
        for name in ("batch_size", "epochs", "head_epochs", "expert_epochs", "cam_images", "bootstraps"):
            refuse(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "valid_share"):
            refuse(name, getattr(self, name), 0 < getattr(self, name) < 1, "a number between 0 and 1")
        refuse("unfrozen_share", self.unfrozen_share, 0 < self.unfrozen_share <= 1, "a number above 0, at most 1")
        refuse("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1")
        refuse("weights_seconds", self.weights_seconds, self.weights_seconds > 0, "more than 0")
        refuse("stop_patience", self.stop_patience, self.stop_patience >= 0, "at least 0")
        refuse("max_quarantined_share", self.max_quarantined_share, 0 <= self.max_quarantined_share <= 1, "0 to 1")


# --- data ------------------------------------------------------------------------------------------------------------


def read(config: Config, source: datasets.Source) -> pipelines.Store:
    """Decode every radiograph once; those that cannot be read are in the store's quarantine, with reasons.

    Raises:
        FileNotFoundError: one of the two published parts is not here: the one is learnt from, the other tested.
    """
    manifest = data.read(source.root)
    absent = {"train": "train", "test": "valid"}.keys() - set(manifest["split"])
    if absent:
        names = ", ".join({"train": "train", "test": "valid"}[name] for name in sorted(absent))
        raise FileNotFoundError(
            f"no image in {names} of {data.part_folder(source.root, data.PART)}; both published parts are needed: "
            "train to learn from, valid to test on."
        )
    return pipelines.decode(
        manifest,
        source.root,
        **pipelines.decode_options(asdict(config)),
        max_quarantined_share=config.max_quarantined_share,
    )


def split(config: Config, store: pipelines.Store) -> pipelines.Store:
    """Keep the published test studies, carve validation off the rest by patient, and ask the gate.

    Study types and their labels keep their shares; a patient with studies of several types stays whole.

    Raises:
        ValueError: the images of a split are all normal or all abnormal.
        kerasmed.audit.GateError: something that `accepted` does not name.
    """
    types = pd.get_dummies(store.manifest["body_part"], dtype=float)
    strata = [*types.columns, *CLASS_NAMES]
    carved = splits.published(store.manifest.join(types), strata, valid_share=config.valid_share, seed=config.seed)
    parted = store._replace(manifest=store.manifest.assign(split=carved["split"]))
    for name, use in {"train": "learnt from", "valid": "chosen by", "test": "told of"}.items():
        among = carved.loc[carved["split"] == name, LABEL]
        if among.nunique() < 2:
            raise ValueError(
                f"the {len(among)} {name} images are all {'abnormal' if among.any() else 'normal'}, so nothing could "
                f"be {use} them; the set needs studies of both kinds in its published train and valid, and a share of "
                f"`valid_share` = {config.valid_share} of train must hold both as well."
            )
    gate(config, parted)
    return parted


def gate(config: Config, store: pipelines.Store) -> pd.DataFrame:
    """Ask `audit.gate` whether a split store may be trained on; `accepted` is let through."""
    identity = audit.identify(store.thumbnails, store.facts)
    return audit.gate(store.manifest, identity, CLASS_NAMES, accepted=config.accepted)


def type_weights(store: pipelines.Store) -> pd.DataFrame:
    """Weights of abnormal and normal images of each study type, counted on the training images."""
    learnt = store.manifest[store.manifest["split"] == "train"]
    return losses.group_weights(learnt[LABEL].to_numpy(), learnt["body_part"].to_numpy())


def of_type(store: pipelines.Store, study_type: str) -> pipelines.Store:
    """Keep one type's images in their splits; those of other types are "left out"."""
    others = store.manifest["body_part"] != study_type
    return store._replace(manifest=store.manifest.assign(split=store.manifest["split"].mask(others, "left out")))


# --- training --------------------------------------------------------------------------------------------------------


def variants(config: Config) -> list[Variant]:
    """List the models for all types: the network, and what it is compared with."""
    name = config.network
    listed = [Variant(name, name, config, None)]
    if config.compare_loss:
        loss = next(each for each in LOSSES if each != config.loss)
        listed.append(Variant(f"{name}, {loss.replace('_', ' ')} loss", name, replace(config, loss=loss), name))
    if config.compare_fine_tuning:
        what = "all at once" if config.fine_tune else "head first"
        listed.append(Variant(f"{name}, {what}", name, replace(config, fine_tune=not config.fine_tune), name))
    return listed


def further_seeds(config: Config) -> list[Variant]:
    """List the network's trainings from further seeds, whose answers are averaged with its own."""
    name, alone = config.network, replace(config, ensemble_seeds=[])
    return [Variant(f"{name}, seed {seed}", name, replace(alone, seed=seed), name) for seed in config.ensemble_seeds]


def build_model(config: Config) -> tuple[keras.Model, backbones.Receipt | None]:
    """Build the network under one logit, after dropout.

    Returns:
        The model, and which tensors of its weights were taken over (None from scratch).
    """
    size = tuple(config.image_size)
    if config.network == "compact":
        whole = models.compact_cnn(size, 1, activation="sigmoid")
        features, receipt = keras.Model(whole.inputs, whole.get_layer("pool").output, name="compact"), None
        path = backbones.find_weights("compact", config.weights)
        if path is not None:
            receipt = backbones.transfer(features, backbones.read_tensors(path), source=str(path))
    else:
        options = {"weights": config.weights, "time_limit": config.weights_seconds}
        features, receipt = backbones.build(config.network, size, **options)
    return models.classifier(features, 1, dropout=config.dropout, activation="sigmoid"), receipt


def find_weights(config: Config) -> None:
    """Have the weights at hand; see `kerasmed.backbones.find_weights` for what it raises."""
    backbones.find_weights(config.network, config.weights, time_limit=config.weights_seconds)


def stages(config: Config, epochs: int, *, fine_tune: bool) -> list[Stage]:
    """All at once, or the head alone first and then all at a share of the rate."""
    if not fine_tune:
        return [Stage("all", "all", epochs, config.learning_rate)]
    lower = config.learning_rate * config.unfrozen_share
    return [Stage("head", "head", config.head_epochs, config.learning_rate), Stage("all", "all", epochs, lower)]


def fit(config: Config, model: keras.Model, store: pipelines.Store, **options) -> pd.DataFrame:
    """Train a model on a store's training rows, or go on with it.

    Validation images weigh as training images of their type and label do, so that its loss is the one that is learnt.

    Args:
        config: the recipe.
        model: of `build_model`.
        store: with a split.
        options: folder, epochs and learning_rate of `kerasmed.training.fit`.
    """
    y = targets(store.manifest, CLASS_NAMES)
    weights = None
    if config.loss == "per_type":
        used = store.manifest["split"].isin(("train", "valid")).to_numpy()
        weights = np.zeros(len(y), np.float32)
        weights[used] = losses.sample_weights(
            y[used, 0], store.manifest["body_part"].to_numpy()[used], type_weights(store)
        )
    train_from, valid = pipelines.datasets_of(
        store,
        y,
        batch_size=config.batch_size,
        seed=config.seed,
        augment=augment.build(config.augmentation, tuple(config.image_size)),
        weights=weights,
    )
    return training.fit(
        model,
        train_from,
        valid,
        steps_per_epoch=pipelines.steps_per_epoch(len(pipelines.rows(store, "train")), config.batch_size),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[losses.BrierScore(name="mse")],
        schedule=config.schedule,
        stop_patience=config.stop_patience,
        **PLATEAU,
        **options,
    )


def answer(config: Config, model: keras.Model, store: pipelines.Store, rows: np.ndarray) -> np.ndarray:
    """Probabilities of some of the store's images, shape (num_rows, 1); with `flips_at_test`, of both orientations."""
    asked = models.averaged([model], mirrored=config.flips_at_test)
    return asked.predict(pipelines.evaluation_dataset(store.images, rows), verbose=0)


def train(variant: Variant, store: pipelines.Store, *, run: Path) -> Trained:
    """Train a variant and predict every image of the store, or read what an earlier call finished.

    Args:
        variant: of `variants`.
        store: of `split`.
        run: the run folder; the training goes to `variants/<name>`.
    """
    config, folder = variant.config, runs.variant_folder(run, variant.name)
    if not seals.is_sealed(folder):
        environment.fresh(config.seed)
        model, receipt = build_model(config)
        print(f"{variant.name}: {len(pipelines.rows(store, 'train'))} images to learn from", flush=True)
        if receipt:
            runs.write_json(folder / "weights.json", receipt.as_dict())
        _fit_stages(config, model, store, folder, stages(config, config.epochs, fine_tune=config.fine_tune))
        told = answer(config, model, store, np.arange(len(store.manifest)))
        table = predictions.tabulate(store.manifest, told, CLASS_NAMES, variant=variant.name)
        runs.write_table(folder / "predictions.csv", table)
        seals.seal(folder)
    return _trained(variant.name, folder)


def train_experts(
    config: Config, one: Trained, study_types: Sequence[str], store: pipelines.Store, *, fine_tune: bool, run: Path
) -> Trained:
    """Train a model for each of some study types and let each answer its own type's images.

    A type without an expert, because it is not asked for or there is nothing to learn it from, is answered by the one
    model for all.

    Args:
        config: the recipe.
        one: the model for all types.
        study_types: of `expert_types`.
        store: of `split`.
        fine_tune: go on from the one model, head first; else begin as it began.
        run: the run folder; a type's training goes to `variants/<name>-<type>`, what all answer to `variants/<name>`.
    """
    name = experts_name(one, study_types, store, fine_tune=fine_tune)
    folder = runs.variant_folder(run, name)
    if not seals.is_sealed(folder):
        table, histories = one.predictions.assign(variant=name), []
        for study_type in study_types:
            environment.fresh(config.seed)
            part = of_type(store, study_type)
            print(f"{name}, {study_type}: {len(pipelines.rows(part, 'train'))} images to learn from", flush=True)
            if fine_tune:
                model = saved_models.read(runs.variant_folder(run, one.folder) / "model.keras")
            else:
                model, _ = build_model(config)
            expert = runs.variant_folder(run, f"{folder.name}-{study_type}")
            _fit_stages(config, model, part, expert, stages(config, config.expert_epochs, fine_tune=fine_tune))
            rows = np.flatnonzero(store.manifest["body_part"] == study_type)
            table.loc[rows, f"p_{LABEL}"] = answer(config, model, store, rows)[:, 0]
            histories.append(pd.read_csv(expert / "history.csv").assign(body_part=study_type))
        runs.write_table(folder / "history.csv", pd.concat(histories))
        runs.write_table(folder / "predictions.csv", table)
        seals.seal(folder)
    return _trained(name, folder)


def experts_name(one: Trained, study_types: Sequence[str], store: pipelines.Store, *, fine_tune: bool) -> str:
    """Name what experts answer: "one per type", with the types where not all have one, and how they were trained."""
    every = set(store.manifest["body_part"]) == set(study_types)
    of_types = "" if every else f" ({', '.join(name.removeprefix('XR_').lower() for name in study_types)})"
    return f"{one.variant}, one per type{of_types}{', fine-tuned' if fine_tune else ''}"


def expert_types(store: pipelines.Store, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted study types (`ALL` for each) of which there are images of both kinds to learn from.

    Raises:
        ValueError: a wanted type that the data do not have.
    """
    known = sorted(store.manifest["body_part"].unique())
    strange = sorted(set(wanted) - {ALL, *known})
    if strange:
        raise ValueError(f"experts are asked for {', '.join(strange)}; expected some of {', '.join(known)}, or {ALL}.")
    kinds = store.manifest.groupby(["body_part", "split"])[LABEL].nunique().unstack("split", fill_value=0)
    asked = known if ALL in wanted else [name for name in known if name in wanted]
    return [name for name in asked if kinds.at[name, "train"] > 1 and kinds.at[name, "valid"] > 0]


def average(members: Sequence[Trained], *, run: Path) -> Trained:
    """Average what several models say of each image: an ensemble, whose studies are the means of its images."""
    name = f"{members[0].variant}, mean of {len(members)} seeds"
    folder = runs.variant_folder(run, name)
    column = f"p_{LABEL}"
    told = np.mean([each.predictions[column].to_numpy() for each in members], axis=0)
    histories = [each.history.assign(member=each.variant) for each in members]
    runs.write_table(folder / "history.csv", pd.concat(histories))
    runs.write_table(folder / "predictions.csv", members[0].predictions.assign(variant=name, **{column: told}))
    return _trained(name, folder)


def _fit_stages(config, model, store, folder, planned):
    """Train in stages into a folder; see `kerasmed.training.fit_stages`."""

    def fit_one(**options):
        return fit(config, model, store, **options)

    training.fit_stages(model, planned, fit_one, network=config.network, folder=folder)


def _trained(name: str, folder: Path) -> Trained:
    # Read from the files in any case, so that a resumed run has the very numbers of an undisturbed one.
    return Trained(name, folder.name, pd.read_csv(folder / "history.csv"), predictions.read(folder / "predictions.csv"))
