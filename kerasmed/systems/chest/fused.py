"""Notebook 05_chest_fusion_gradcam: radiographs with patient data and earlier findings, in four steps.

    kerasmed run 04_chest_backbones 05_chest_fusion_gradcam --profile demo                synthetic data
    kerasmed run 05_chest_fusion_gradcam --data-root DIR          goes on from the newest run of 04 on the same data

The image branch is the network of a run of 04_chest_backbones, its last pooling by maximum; the split is that run's,
so that no patient whom the network learnt from is tested.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from kerasmed import (
    augment,
    environment,
    fusion,
    gradcam,
    localisation,
    metrics,
    models,
    multilabel,
    pipelines,
    predictions,
    runs,
    saved_models,
    seals,
    training,
)
from kerasmed.datasets import chest as data
from kerasmed.manifest import targets
from kerasmed.parameters import refuse
from kerasmed.systems.chest import shared
from kerasmed.systems.chest.shared import FINDINGS
from kerasmed.training import Stage, Trained

ORIGIN = "04_chest_backbones"  # whose run this notebook goes on from


class Step(NamedTuple):
    """What a model of the four knows of the patient, and whether the image has a way round the weighting."""

    name: str
    patient: bool  # age, sex, view
    previous: bool  # findings of the previous visit
    residual: bool
    reference: str | None  # the step before


STEPS = (
    Step("image", False, False, False, None),
    Step("+ patient", True, False, False, "image"),
    Step("+ previous", True, True, False, "+ patient"),
    Step("+ residual", True, True, True, "+ previous"),
)
NAMES = tuple(step.name for step in STEPS)


@dataclass(frozen=True)
class Config:
    """Parameters of notebook 05_chest_fusion_gradcam; the notebook's parameters cell says what each means."""

    profile: str
    seed: int
    data_source: str
    synthetic_patients: int
    synthetic_seed: int
    from_run: str
    network: str
    max_quarantined_share: float
    accepted: Sequence[str]
    loss: str
    augmentation: Sequence[str]
    batch_size: int
    head_epochs: int
    epochs: int
    unfrozen_epochs: int
    learning_rate: float
    unfrozen_share: float
    schedule: str
    stop_patience: int
    units: int
    dropout: float
    cam_pairs: int
    precision: str
    deterministic: bool
    bootstraps: int

    def __post_init__(self):
        for name in ("head_epochs", "epochs", "unfrozen_epochs", "units", "cam_pairs"):
            refuse(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        refuse("unfrozen_share", self.unfrozen_share, 0 < self.unfrozen_share <= 1, "a number above 0, at most 1")
        shared.refuse_unfit(self)


class Origin(NamedTuple):
    """The run that this one goes on from: its folder, how it read images, and the training that is taken of it."""

    run: Path
    parameters: dict
    variant: str
    network: str
    model: Path


def find_origin(config: Config, *, fingerprint: str, models_root=None) -> Origin:
    """Find the run of 04_chest_backbones to go on from, and the network of it.

    Raises:
        FileNotFoundError: no complete run on these data.
        ValueError: it has not trained that network.
    """
    options = {"fingerprint": fingerprint, "profile": config.profile, "models_root": models_root}
    run = runs.find("chest", ORIGIN, run=config.from_run, **options)
    parameters = runs.read_json(run / "params.json")
    known = parameters["networks"]
    fits = config.network in ("", *known)
    refuse("network", config.network, fits, f"empty, or one that {run.name} trained: {', '.join(known)}")
    refuse("fit", parameters["fit"], parameters["fit"] == "stretch", f"'stretch' in {run.name}: boxes scale with it")
    augment.build(config.augmentation, tuple(parameters["image_size"]))
    if config.network:
        model = runs.variant_folder(run, config.network) / "model.keras"
        return Origin(run, parameters, config.network, config.network, model)
    chosen = runs.read_json(run / "answers.json")["variant"]  # a network's name, perhaps with what was changed
    return Origin(run, parameters, chosen, chosen.split(",")[0], run / "model.keras")


def read(config: Config, source, origin: Origin) -> pipelines.Store:
    """Decode the radiographs as the earlier run did, and split them as it did; the gate is asked again.

    Raises:
        ValueError: the earlier run's split does not name the same images.
        kerasmed.audit.GateError: something that `accepted` does not name.
    """
    share = {"max_quarantined_share": config.max_quarantined_share}
    store = shared.read(source, {**origin.parameters, **share})
    earlier = pd.read_csv(origin.run / "split.csv", dtype=str, keep_default_na=False).set_index("image_path")["split"]
    found = store.manifest["image_path"].map(earlier)
    if found.isna().any() or len(earlier) != len(found):
        raise ValueError(
            f"{origin.run / 'split.csv'} lists {len(earlier)} images, {int(found.notna().sum())} of them among the "
            f"{len(found)} here; run {ORIGIN} again on these data."
        )
    store = store._replace(manifest=store.manifest.assign(split=found))
    shared.gate(store, accepted=config.accepted)
    return store


def beside(step: Step, store: pipelines.Store) -> dict[str, np.ndarray] | None:
    """What a step's model takes beside the image: {"patient": float32 (num_images, k)}, None for the image alone."""
    return {"patient": shared.patient_values(store.manifest, previous=step.previous)} if step.patient else None


def build_model(config: Config, step: Step, features: keras.Model, store: pipelines.Store) -> keras.Model:
    """Build a step's model on an image branch; patient data are standardised by the training rows, inside the model."""
    options = {"units": config.units, "dropout": config.dropout, "name": "fused" if step.patient else "image_only"}
    if step.patient:
        learnt = shared.patient_values(store.manifest, previous=step.previous)[pipelines.rows(store, "train")]
        means, scales = fusion.standardisation(learnt)
        options |= {"means": means, "scales": scales, "residual": step.residual}
    return fusion.fused_classifier(features, len(FINDINGS), **options)


def train(config: Config, step: Step, store: pipelines.Store, origin: Origin, *, run: Path) -> Trained:
    """Train a step in its stages and predict every image of the store, or read what an earlier call finished.

    The image alone: its head over the frozen network of the earlier run, then all of it at the full rate. Every other
    step begins with that network and learns its own head first. All end unfrozen at a share of the rate, so that the
    network inside is trained for as long in each. A step's model is that of the stage of the lowest validation loss, so
    that none wins by a rival's overfitting.

    Args:
        config: the recipe.
        step: of `STEPS`, in order: the later ones need the first.
        store: of `read`.
        origin: of `find_origin`.
        run: the run folder; the stages go to `variants/<step>-<stage>`, what is kept of them to `variants/<step>`.
    """
    folder = runs.variant_folder(run, step.name)
    trunk = runs.variant_folder(run, f"{STEPS[0].name}-whole") / "model.keras"
    if not seals.is_sealed(folder):
        environment.fresh(config.seed)
        if step.patient:
            earlier = saved_models.read(trunk)
            features = keras.Model(earlier.inputs, earlier.get_layer("pool").output)
        else:
            features = models.max_pooled(saved_models.read(origin.model))
        model = build_model(config, step, features, store)
        lower = config.learning_rate * config.unfrozen_share
        stages = [
            Stage("head", "head", config.head_epochs, config.learning_rate),
            Stage("unfrozen", "all", config.unfrozen_epochs, lower),
        ]
        if not step.patient:
            stages.insert(1, Stage("whole", "all", config.epochs, config.learning_rate))

        def fit_one(**options):
            return shared.fit(config, model, store, FINDINGS, beside=beside(step, store), **options)

        training.fit_stages(model, stages, fit_one, network=origin.network, folder=folder)
        table = shared.predict_store(model, store, FINDINGS, variant=step.name, beside=beside(step, store))
        runs.write_table(folder / "predictions.csv", table)
        seals.seal(folder)
    # Read from the file in any case, so that a resumed run has the very numbers of an undisturbed one.
    history, table = pd.read_csv(folder / "history.csv"), predictions.read(folder / "predictions.csv")
    return Trained(step.name, folder.name, history, table)


def baselines(config: Config, store: pipelines.Store) -> dict[str, multilabel.Answer]:
    """Answers to the test images without a look at them: from patient data, the previous visit's findings, and both.

    A first visit has no previous findings: there, carrying forward answers that nothing is found.
    """
    test = pipelines.rows(store, "test")
    carried = store.manifest[list(data.PREVIOUS)].to_numpy(float)[test]
    return {
        **shared.patient_baseline(config, store, FINDINGS),
        metrics.CARRY_FORWARD: multilabel.Answer(carried, np.full(len(FINDINGS), 0.5)),
        **shared.patient_baseline(config, store, FINDINGS, previous=True),
    }


# --- Grad-CAM --------------------------------------------------------------------------------------------------------


def boxes_of(store: pipelines.Store, root) -> pd.DataFrame:
    """Boxes of findings on test images, in pixels of the store's images.

    Returns:
        DataFrame: row (of the store), label, x, y, width, height; boxes of images that are absent are left out, and of
        findings that the table does not record for the image as well.
    """
    rows = pd.Series(np.arange(len(store.manifest)), index=store.manifest["study_id"].to_numpy())
    boxes = data.read_boxes(root)
    boxes = boxes.assign(row=boxes["study_id"].map(rows)).dropna(subset="row").astype({"row": int})
    tested = (store.manifest["split"].to_numpy() == "test")[boxes["row"]]
    recorded = [store.manifest.at[row, label] == 1 for row, label in zip(boxes["row"], boxes["label"])]
    boxes = boxes[tested & np.array(recorded, bool)].reset_index(drop=True)
    corners = ["x", "y", "width", "height"]
    sizes = store.facts[["height", "width"]].to_numpy()[boxes["row"]]
    boxes[corners] = localisation.scale_boxes(boxes[corners].to_numpy(), sizes, store.images.shape[1:])
    return boxes.drop(columns="study_id")


def load(step: Step, run: Path) -> keras.Model:
    """Load a step's finished model from its file."""
    return saved_models.read(runs.variant_folder(run, step.name) / "model.keras")


def source_weights(step: Step, store: pipelines.Store, model: keras.Model) -> pd.DataFrame:
    """How much the image counts for each test image beside the patient data: the weights of the layer "sauce".

    Returns:
        DataFrame: step, visit ("first visit" or "follow-up") and image, the weight of the image's vector, 0 to 1.
    """
    test = pipelines.rows(store, "test")
    weights = keras.Model(model.inputs, model.get_layer("sauce").output[1])
    told = weights.predict(pipelines.evaluation_dataset(store.images, test, beside=beside(step, store)), verbose=0)
    later = store.manifest["has_previous"].to_numpy()[test] == 1
    visit = np.where(later, "follow-up", "first visit")
    return pd.DataFrame({"step": step.name, "visit": visit, "image": told[:, 0]})


def explain(step: Step, store: pipelines.Store, pairs: pd.DataFrame, explainer: Callable) -> gradcam.Maps:
    """Explain (row, label) pairs with a model of a step; an image that is asked of several labels stands several times.

    Args:
        step: of `STEPS`.
        store: of `read`.
        pairs: with the columns row and label.
        explainer: of `kerasmed.gradcam.build`.
    """
    rows = pairs["row"].to_numpy()
    asked = pairs["label"].map({name: number for number, name in enumerate(FINDINGS)}).to_numpy(int)
    values = beside(step, store)
    others = {name: each[rows] for name, each in values.items()} if values else None
    return explainer(store.images[rows], asked, beside=others)


def cam_health(
    config: Config, step: Step, store: pipelines.Store, pairs: pd.DataFrame, explainer: Callable, *, split: str
) -> list[dict]:
    """Explain pairs of a test image and a finding, and tabulate how the maps fare.

    Args:
        config: `bootstraps` is used.
        step, store, explainer: as in `explain`.
        pairs: row and label; with x, y, width and height as well, of `boxes_of`, the maps are held against the boxes.
        split: what the pairs are, for the rows.

    Returns:
        Rows of `kerasmed.localisation.summary`, none without a pair.
    """
    if pairs.empty:
        return []
    maps = explain(step, store, pairs, explainer)
    boxes = pairs[["x", "y", "width", "height"]].to_numpy() if "width" in pairs else None
    table = localisation.table(maps.heat, maps.status, pairs["label"], boxes, store.images.shape[1:])
    groups = store.manifest["group_id"].to_numpy()[pairs["row"]]
    options = {"task": shared.TASK, "variant": step.name, "split": split}
    return localisation.summary(table, groups, num_draws=config.bootstraps, **options)


def positive_pairs(config: Config, store: pipelines.Store) -> pd.DataFrame:
    """Draw at most `cam_pairs` pairs of a test image and a finding recorded for it: row, label."""
    test = pipelines.rows(store, "test")
    present, label = np.nonzero(targets(store.manifest, FINDINGS)[test] == 1)
    drawn = np.random.default_rng(config.seed).permutation(len(present))[: config.cam_pairs]
    drawn.sort()
    return pd.DataFrame({"row": test[present[drawn]], "label": np.array(FINDINGS)[label[drawn]]})


def surest(trained: Trained, pairs: pd.DataFrame, *, count: int) -> pd.DataFrame:
    """Keep of each label the `count` pairs whose finding a training was surest of, and add `p`, its probability."""
    told = [trained.predictions.at[row, f"p_{label}"] for row, label in zip(pairs["row"], pairs["label"])]
    ordered = pairs.assign(p=told).sort_values(["label", "p"], ascending=[True, False], kind="stable")
    return ordered.groupby("label", sort=False).head(count).reset_index(drop=True)
