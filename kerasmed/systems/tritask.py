"""Three yes-or-no labels of 64×64 scans, a quarter of which are black.

    kerasmed run 09_tritask_dedup --profile demo                synthetic data
    kerasmed run 09_tritask_dedup --data-root DIR               real images, all that there is; for a GPU
    kerasmed sweep 09_tritask_dedup --profile smoke --grid learning_rate=0.1,0.01,0.001 --grid optimizer=adam,sgd

The labelled validation images that the set comes with are the test here: each is scored once, by networks that were
stopped, chosen and given their thresholds on a validation split carved off the training images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from kerasmed import (
    audit,
    augment,
    backbones,
    classifiers,
    datasets,
    environment,
    export,
    images,
    losses,
    models,
    multilabel,
    pipelines,
    predictions,
    runs,
    saved_models,
    scan_networks,
    seals,
    splits,
    training,
)
from kerasmed.datasets import tritask as data
from kerasmed.manifest import SPLITS, targets
from kerasmed.parameters import refuse, refuse_others
from kerasmed.training import Trained, Variant

NOTEBOOK = "09_tritask_dedup"  # whose runs `predict` uses
TASK = "scans"
CLASS_NAMES = data.CLASS_NAMES[TASK]
NETWORKS = (*scan_networks.NAMES, *backbones.NAMES)
HEADS = ("shared", "independent")
# Those of earlier work, which the notebook pictures; `augmentation` takes any of `augment.NAMES`.
AUGMENTATIONS = ("rotate_any", "flip", "flip_vertical", "shear", "scale_wide", "pad", "crop", "blur", "cutout")


@dataclass(frozen=True)
class Config:
    """Parameters of notebook 09_tritask_dedup; the notebook's parameters cell says what each means."""

    profile: str
    seed: int
    data_source: str
    synthetic_train_images: int
    synthetic_valid_images: int
    synthetic_test_images: int
    synthetic_seed: int
    image_size: Sequence[int]
    fit: str
    interpolation: str
    equalize: bool
    max_quarantined_share: float
    similarity: float
    accepted: Sequence[str]
    valid_share: float
    policy: str
    networks: Sequence[str]
    heads: str
    weights: str
    weights_seconds: float
    augmentation: Sequence[str]
    without_augmentation: Sequence[str]
    compare_policies: Sequence[str]
    compare_heads: bool
    loss: str
    optimizer: str
    learning_rate: float
    schedule: str
    batch_size: int
    epochs: int
    monitor: str
    stop_patience: int
    svc_images: int
    precision: str
    deterministic: bool
    bootstraps: int

    def __post_init__(self):
        size = len(self.image_size) == 2 and all(isinstance(side, int) for side in self.image_size)
        size = size and min(self.image_size) >= scan_networks.SMALLEST_SIDE
        refuse("image_size", self.image_size, size, f"[height, width], each at least {scan_networks.SMALLEST_SIDE}")
        images.check_options(fit=self.fit, interpolation=self.interpolation)
        augment.build(self.augmentation, tuple(self.image_size))
        some_of = {
            "networks": NETWORKS,
            "without_augmentation": self.networks,
            "compare_policies": [policy for policy in audit.POLICIES if policy != self.policy],
            "accepted": audit.FAILING,
        }
        for name, known in some_of.items():
            refuse_others(name, getattr(self, name), known, empty=True)
        refuse("networks", self.networks, self.networks, "at least one")
        backbones.refuse_unfit(self.networks, self.weights, self.image_size)
        refuse(
            "without_augmentation",
            self.without_augmentation,
            self.augmentation or not self.without_augmentation,
            "none, as `augmentation` is empty",
        )
        one_of = {
            "policy": audit.POLICIES,
            "heads": HEADS,
            "loss": models.LABEL_LOSSES,
            "optimizer": training.OPTIMIZERS,
            "schedule": training.SCHEDULES,
            "monitor": ("val_loss", "val_accuracy", "val_f1"),
        }
        for name, known in one_of.items():
            refuse(name, getattr(self, name), getattr(self, name) in known, f"one of {', '.join(known)}")
        for name in ("batch_size", "epochs", "svc_images", "bootstraps"):
            refuse(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("similarity", "valid_share"):
            refuse(name, getattr(self, name), 0 < getattr(self, name) < 1, "a number between 0 and 1")
        for name in ("learning_rate", "weights_seconds"):
            refuse(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        refuse("stop_patience", self.stop_patience, self.stop_patience >= 0, "at least 0")
        refuse("max_quarantined_share", self.max_quarantined_share, 0 <= self.max_quarantined_share <= 1, "0 to 1")


def variants(config: Config) -> list[Variant]:
    """List the trainings that a configuration asks for: the networks, then what is compared with them."""
    first = config.networks[0]
    listed = [Variant(name, name, config, None) for name in config.networks]
    listed += [
        Variant(f"{name}, no augmentation", name, replace(config, augmentation=[], without_augmentation=[]), name)
        for name in config.without_augmentation
    ]
    listed += [
        Variant(f"{first}, {policy}", first, replace(config, policy=policy, compare_policies=[]), first)
        for policy in config.compare_policies
    ]
    if config.compare_heads:
        other = next(heads for heads in HEADS if heads != config.heads)
        listed.append(Variant(f"{first}, {other}", first, replace(config, heads=other), first))
    return listed


def read(config: Config, source: datasets.Source) -> pipelines.Store:
    """Read the manifest, decode the images once, and find their groups.

    No patients are known, so similarity groups stand for them; each black image is a group of its own.

    Returns:
        `pipelines.Store` whose manifest has `group_id` and `black` (0 or 1; constant images of any level).
    """
    store = pipelines.decode(
        data.read(source.root, TASK),
        source.root,
        **pipelines.decode_options(asdict(config)),
        max_quarantined_share=config.max_quarantined_share,
    )
    constant = (audit.identify(store.thumbnails, store.facts)["constant"] != "").to_numpy()
    manifest = audit.assign_groups(
        store.manifest, store.thumbnails, prefix="scan", threshold=config.similarity, facts=store.facts
    )
    return store._replace(manifest=manifest.assign(black=constant.astype(int)))


def split(config: Config, store: pipelines.Store) -> pipelines.Store:
    """Carve validation off the training images by group; the published validation images become the test.

    Labels, their combinations and black images keep their shares. The published parts are not mixed: where a group is
    in both, its training images are "left out". Unlabelled images are "unlabelled". The gate is asked.

    Raises:
        ValueError: no labelled validation images.
        kerasmed.audit.GateError: something that `accepted` does not name.
    """
    published = store.manifest["split"]
    if not (published == "valid").any():
        raise ValueError(f"no readable image in {data.FOLDERS['valid']}, so none to test on; expected {data.LAYOUT}.")
    tested = store.manifest["group_id"].isin(store.manifest.loc[published == "valid", "group_id"])
    learnt = store.manifest[(published == "train") & ~tested]
    shares = {"test_share": 0, "valid_share": config.valid_share, "seed": config.seed}
    carved = splits.assign(learnt, [*CLASS_NAMES, "black"], **shares)["split"]
    renamed = published.map({"train": "left out", "valid": "test", "test": "unlabelled"})
    parted = store._replace(manifest=store.manifest.assign(split=carved.reindex(store.manifest.index).fillna(renamed)))
    gate(config, parted)
    return parted


def gate(config: Config, store: pipelines.Store) -> pd.DataFrame:
    """Ask `audit.gate` whether the images of train, valid and test may be used; `accepted` is let through."""
    used = store.manifest["split"].isin(SPLITS).to_numpy()
    identity = audit.identify(store.thumbnails[used], store.facts[used])
    return audit.gate(store.manifest[used], identity, CLASS_NAMES, accepted=config.accepted)


def deduplicate(config: Config, store: pipelines.Store) -> pipelines.Store:
    """Leave black images out of training by `policy`; validation and test keep theirs, as new data will have them."""
    learnt = (store.manifest["split"] == "train").to_numpy()
    identity = audit.identify(store.thumbnails[learnt], store.facts[learnt])
    kept = audit.deduplicate(store.manifest[learnt], identity, CLASS_NAMES, policy=config.policy)
    left_out = learnt.copy()
    left_out[learnt] = ~kept
    return store._replace(manifest=store.manifest.assign(split=store.manifest["split"].mask(left_out, "left out")))


def build_model(config: Config, network: str) -> tuple[keras.Model, backbones.Receipt | None]:
    """Build a network for the three labels.

    With heads "shared", one trunk serves all labels. With "independent", three trunks stand side by side in one model,
    a label each, and share nothing: what three models would learn, on the same batches.

    Returns:
        The model, and which tensors of a pretrained backbone's weights were taken over (None from scratch).
    """
    if config.heads == "shared":
        return _build_trunk(config, network, len(CLASS_NAMES))
    inputs = keras.Input((*config.image_size, 1), dtype="uint8", name="image")
    logits, receipt = [], None
    for name in CLASS_NAMES:
        trunk, receipt = _build_trunk(config, network, 1)
        logits.append(keras.Model(trunk.inputs, trunk.get_layer("logits").output, name=name)(inputs))
    joined = keras.layers.Concatenate(dtype="float32", name="logits")(logits)
    outputs = keras.layers.Activation("sigmoid", dtype="float32", name="probabilities")(joined)
    return keras.Model(inputs, outputs, name=f"{network}_independent"), receipt


def _build_trunk(config, network, num_labels):
    size = tuple(config.image_size)
    if network in scan_networks.NAMES:
        return scan_networks.build(network, size, num_labels, head=config.loss), None
    features, receipt = backbones.build(network, size, weights=config.weights, time_limit=config.weights_seconds)
    outputs = models.label_head(features.output, num_labels, loss=config.loss)
    return keras.Model(features.inputs, outputs, name=network), receipt


def find_weights(config: Config) -> None:
    """Have the weights of every backbone at hand; see `kerasmed.backbones.find_weights` for what it raises."""
    for network in config.networks:
        if network in backbones.NAMES:
            backbones.find_weights(network, config.weights, time_limit=config.weights_seconds)


def fit(config: Config, model: keras.Model, store: pipelines.Store, *, folder: Path) -> pd.DataFrame:
    """Train a model on a store's training rows, or go on with it."""
    train_from, valid = pipelines.datasets_of(
        store,
        targets(store.manifest, CLASS_NAMES),
        batch_size=config.batch_size,
        seed=config.seed,
        augment=augment.build(config.augmentation, tuple(config.image_size)),
    )
    return training.fit(
        model,
        train_from,
        valid,
        folder=folder,
        steps_per_epoch=pipelines.steps_per_epoch(len(pipelines.rows(store, "train")), config.batch_size),
        epochs=config.epochs,
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy"), losses.F1(name="f1")],
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        schedule=config.schedule,
        monitor=config.monitor,
        stop_patience=config.stop_patience,
    )


def train(variant: Variant, store: pipelines.Store, *, run: Path) -> Trained:
    """Train a variant and predict every image of the store, or read what an earlier call finished.

    Args:
        variant: of `variants`.
        store: of `split`; the variant's policy is applied here.
        run: the run folder; the training goes to `variants/<name>`.
    """
    config, folder = variant.config, runs.variant_folder(run, variant.name)
    if not seals.is_sealed(folder):
        environment.fresh(config.seed)
        store = deduplicate(config, store)
        model, receipt = build_model(config, variant.network)
        print(f"{variant.name}: {len(pipelines.rows(store, 'train'))} images to learn from", flush=True)
        if receipt:
            runs.write_json(folder / "weights.json", receipt.as_dict())
        fit(config, model, store, folder=folder)
        told = model.predict(pipelines.evaluation_dataset(store.images, np.arange(len(store.manifest))), verbose=0)
        table = predictions.tabulate(store.manifest, told, CLASS_NAMES, variant=variant.name)
        runs.write_table(folder / "predictions.csv", table)
        seals.seal(folder)
    # Read from the file in any case, so that a resumed run has the very numbers of an undisturbed one.
    history, table = pd.read_csv(folder / "history.csv"), predictions.read(folder / "predictions.csv")
    return Trained(variant.name, folder.name, history, table)


def choose(candidates: Sequence[Trained]) -> Trained:
    """Choose the training of the best mean average precision on validation; test images have no say."""
    return max(candidates, key=lambda each: multilabel.mean_score(each.predictions, CLASS_NAMES, split="valid"))


def pixel_baseline(config: Config, store: pipelines.Store) -> multilabel.Answer:
    """Answer the test images with a support vector machine on pixels, its thresholds tuned on validation."""
    store = deduplicate(config, store)
    y = targets(store.manifest, CLASS_NAMES)
    train_, valid, test = (pipelines.rows(store, name) for name in ("train", "valid", "test"))
    asked = np.concatenate([valid, test])
    told = classifiers.svc_on_pixels(
        store.thumbnails[train_], y[train_], store.thumbnails[asked], max_images=config.svc_images, seed=config.seed
    )
    return multilabel.Answer(told[len(valid) :], multilabel.tune_thresholds(y[valid], told[: len(valid)]))


def evaluate(config: Config, tables: Mapping[str, pd.DataFrame], store: pipelines.Store, **options) -> list[dict]:
    """Score the test images: all, and the black and the others apart.

    Args:
        config: `policy` and `bootstraps` are used.
        tables: variant -> predictions of every image.
        store: of `split`.
        options: of `kerasmed.multilabel.evaluate`, such as `extra` and `reference`.

    Returns:
        Rows of `kerasmed.multilabel.rows`; on black images, which are all alike, without the baselines on pixels.
    """
    store = deduplicate(config, store)
    black = (store.manifest["black"] == 1).to_numpy()
    tested = (store.manifest["split"] == "test").to_numpy()
    parts = {"test": np.ones(len(black), bool), "test, not black": ~black, "test, black": black}
    masks = {name: mask for name, mask in parts.items() if (mask & tested).any()}
    return multilabel.evaluate(
        tables,
        store.manifest,
        store.thumbnails,
        CLASS_NAMES,
        task=TASK,
        subsets=masks,
        constant_only=[name for name in masks if name == "test, black"],
        num_draws=config.bootstraps,
        **options,
    )


def promote(run: Path, chosen: Trained) -> dict:
    """Copy the chosen model up to `model.keras` and write its thresholds to thresholds.json, for `predict`."""
    thresholds = multilabel.thresholds(chosen.predictions, CLASS_NAMES)
    content = {"variant": chosen.variant, "thresholds": dict(zip(CLASS_NAMES, thresholds.tolist()))}
    runs.promote(run, chosen.folder, "model")
    runs.write_json(run / "thresholds.json", content)
    return content


def errors(store: pipelines.Store, chosen: Trained, label: str, *, count: int = 8) -> pd.DataFrame:
    """List the surest errors in a label among the test images that are not black, surest first.

    Returns:
        DataFrame indexed by row of the store: truth (0 or 1) and probability.
    """
    asked = (store.manifest["split"] == "test") & (store.manifest["black"] == 0)
    told = chosen.predictions[asked.to_numpy()].rename(columns={f"y_{label}": "truth", f"p_{label}": "probability"})
    told = told.assign(error=(told["truth"] - told["probability"]).abs())
    return told.sort_values("error", ascending=False, kind="stable")[["truth", "probability"]].head(count)


def submission(source: datasets.Source, chosen: Trained) -> tuple[pd.DataFrame | None, list[str]]:
    """Answer the unlabelled images in the form of the sample.

    Returns:
        The checked table, None where the set has no sample or no unlabelled image; and the ids that could not be
        answered, because their file is absent or cannot be read, and stand as 0.
    """
    sample, table = data.read_sample(source.root), chosen.predictions
    if sample is None or not (table["split"] == "unlabelled").any():
        return None, []
    _, told = multilabel.truth_and_probabilities(table, CLASS_NAMES)
    decided = (told >= multilabel.thresholds(table, CLASS_NAMES)).astype(int)
    ids = [Path(path).name for path in table["image_path"]]
    answers = pd.DataFrame(decided, index=ids, columns=list(CLASS_NAMES))[(table["split"] == "unlabelled").to_numpy()]
    unanswered = [name for name in sample["id"] if not {name, f"{name}.png"} & set(answers.index)]
    blank = pd.DataFrame(0, index=unanswered, columns=answers.columns)
    return data.submission(sample, pd.concat([answers, blank])), unanswered


def predict(run: Path, path, *, progress: bool = True) -> pd.DataFrame:
    """Predict raw image files with the model that a run chose, reading them as its training did.

    Args:
        run: a complete run folder of 09_tritask_dedup.
        path: an image file or a folder, searched through.
        progress: show a bar.

    Returns:
        DataFrame of `kerasmed.pipelines.predict_files`, with each label, 1 or 0 by its threshold (missing where the
        file could not be read).
    """
    params, chosen = runs.read_json(run / "params.json"), runs.read_json(run / "thresholds.json")
    loaded = [(saved_models.read(run / "model.keras"), CLASS_NAMES)]
    table = pipelines.predict_files(path, loaded, **pipelines.decode_options(params), progress=progress)
    for name in CLASS_NAMES:
        decided = (table[f"p_{name}"] >= chosen["thresholds"][name]).astype("Int64")
        table[name] = decided.mask(table["error"] != "")
    return table


def exported_networks(run: Path) -> list[export.Network]:
    """Describe the network that a run chose, for `kerasmed export`."""
    params, chosen = runs.read_json(run / "params.json"), runs.read_json(run / "thresholds.json")
    return [
        export.Network(
            "model",
            ("model.keras",),
            lambda: saved_models.read(run / "model.keras"),
            CLASS_NAMES,
            "each a probability by itself; a label is present where it reaches its threshold",
            chosen["thresholds"],
            export.read_options(params),
        )
    ]
