"""Notebook 08_brain_cascade: four networks in a cascade, judged end to end beside one flat network of seven outcomes.

    kerasmed run 07_brain_mri 08_brain_cascade --profile demo                    synthetic data
    kerasmed run 08_brain_cascade --profile cpu --data-root DIR       goes on from the newest run of 07 on the same data

How images are read, the groups and the split are those of a run of 07_brain_mri, so that its figures compare.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kerasmed import audit, augment, backbones, datasets, images, metrics, pipelines, predictions, runs, saved_models
from kerasmed.datasets import brain as data
from kerasmed.manifest import class_ids, validate
from kerasmed.parameters import refuse
from kerasmed.systems.brain import cascade, shared
from kerasmed.systems.brain.cascade import NONE, OUTCOMES, STAGES, BrainCascade
from kerasmed.training import Trained

ORIGIN = "07_brain_mri"  # whose run this notebook goes on from
FLAT = "flat"  # the one network of seven outcomes
CASCADE = "cascade"  # the four stages, answered by their path
# What is known of an image without looking at what it shows; the thumbnail's border and mean are the same for any size.
MEASURES = {
    "size": ("height", "width"),
    "border": ("border intensity", "border spread"),
    "mean intensity": ("mean intensity",),
}
ALL_MEASURES = ", ".join(MEASURES)
PROBE_DRAWS = 200  # bootstrap draws of the probe, which learns 16 times


@dataclass(frozen=True)
class Config:
    """Parameters of notebook 08_brain_cascade; the notebook's parameters cell says what each means."""

    profile: str
    seed: int
    data_source: str
    synthetic_patients_per_class: int
    synthetic_slices_per_patient: int
    synthetic_seed: int
    from_run: str
    folds: int
    network: str
    weights: str
    weights_seconds: float
    max_quarantined_share: float
    accepted: Sequence[str]
    sensitivity: float
    augmentation: Sequence[str]
    augmentation_library: str
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
        refuse("network", self.network, self.network in shared.NETWORKS, f"one of {', '.join(shared.NETWORKS)}")
        refuse(
            "folds",
            self.folds,
            isinstance(self.folds, int) and self.folds >= 0,
            "at least 1, or 0 for all that the earlier run has",
        )
        refuse("sensitivity", self.sensitivity, 0 < self.sensitivity <= 1, "a share above 0, at most 1")


class Origin(NamedTuple):
    """The run that this one goes on from: its folder, and how it read images."""

    run: Path
    parameters: dict


def find_origin(config: Config, *, fingerprint: str, models_root=None) -> Origin:
    """Find the run of 07_brain_mri to go on from.

    Raises:
        FileNotFoundError: no complete run on these data.
        ValueError: it has not done both tasks, or has fewer folds, or the network does not take its images.
    """
    options = {"fingerprint": fingerprint, "profile": config.profile, "models_root": models_root}
    run = runs.find("brain", ORIGIN, run=config.from_run, **options)
    parameters = runs.read_json(run / "params.json")
    done = parameters["tasks"]
    if set(done) != set(data.TASKS):
        raise ValueError(f"{run.name} did {', '.join(done)} alone; a cascade needs a run with both tasks.")
    known = parameters["folds"]
    refuse("folds", config.folds, config.folds <= known, f"at most {known}, which {run.name} has, or 0 for all of them")
    size = tuple(parameters["image_size"])
    backbones.refuse_unfit([config.network], config.weights, size, smallest_sides=shared.SMALLEST_SIDE)
    augment.build(config.augmentation, size)
    return Origin(run, parameters)


def read(config: Config, source: datasets.Source, origin: Origin) -> list[pipelines.Store]:
    """Decode the images of both tasks as the earlier run did, label them by outcome, and split them as it did.

    Returns:
        A store for each fold, which share their pixels; their manifest has `task` and the columns `OUTCOMES`.

    Raises:
        ValueError: the earlier run's split does not name the same images, or both sets name a patient.
        kerasmed.audit.GateError: something that `accepted` does not name.
    """
    manifest = pd.concat([_by_outcome(data.read(source.root, task), task) for task in data.TASKS], ignore_index=True)
    store = pipelines.decode(
        validate(manifest, OUTCOMES, exclusive=True),
        source.root,
        **pipelines.decode_options(origin.parameters),
        max_quarantined_share=config.max_quarantined_share,
    )
    earlier = pd.read_csv(origin.run / "split.csv", dtype=str, keep_default_na=False)
    names = store.manifest["image_path"]
    stores = []
    for fold in sorted(earlier["fold"].unique(), key=int)[: config.folds or None]:
        of_fold = earlier[earlier["fold"] == fold].set_index("image_path")
        found = names.isin(of_fold.index)
        if not found.all() or len(of_fold) != len(names):
            raise ValueError(
                f"{origin.run / 'split.csv'} lists {len(of_fold)} images in fold {fold}, {int(found.sum())} of them "
                f"among the {len(names)} here; run {ORIGIN} again on these data."
            )
        kept = of_fold.loc[names, ["group_id", "split"]].set_index(store.manifest.index)
        stores.append(store._replace(manifest=store.manifest.assign(**kept)))
        _refuse_people_of_both_sets(stores[-1].manifest)
        gate(config, stores[-1])
    return stores


def _refuse_people_of_both_sets(manifest):
    """Raise where a patient id stands in both sets, whose splits and numbers were made for each by itself."""
    both = manifest.groupby("group_id")["task"].nunique()
    both = both.index[both > 1]
    if len(both):
        raise ValueError(
            f"{len(both)} patient ids stand in the patients.csv of both sets. If they are not the same people, put the "
            "set's name before the ids of each file; if they are, take them out of one set; then run "
            f"{ORIGIN} again. First: {both[:5].tolist()}."
        )


def _by_outcome(manifest: pd.DataFrame, task: str) -> pd.DataFrame:
    """A task's manifest with the columns `OUTCOMES` in place of its classes, the first of which is none."""
    names = data.CLASS_NAMES[task]
    others = [name for name in manifest.columns if name not in names]
    labels = manifest.rename(columns={names[0]: NONE}).reindex(columns=list(OUTCOMES), fill_value=0)
    return pd.concat([manifest[others].assign(task=task), labels], axis=1)


def gate(config: Config, store: pipelines.Store) -> pd.DataFrame:
    """Ask `audit.gate` whether a split store may be trained on; `accepted` is let through."""
    return audit.gate(store.manifest, audit.identify(store.thumbnails, store.facts), OUTCOMES, accepted=config.accepted)


def classes_of(task: str) -> tuple[str, ...]:
    """The classes of a stage, or the outcomes of the flat network."""
    return OUTCOMES if task == FLAT else tuple(STAGES[task])


def ask(store: pipelines.Store, stage: str) -> pipelines.Store:
    """Keep for a stage the images of its outcomes, labelled by its classes; the split of all others is "left out"."""
    manifest = store.manifest
    labels = pd.DataFrame({name: manifest[list(outcomes)].sum(axis=1) for name, outcomes in STAGES[stage].items()})
    asked = labels.sum(axis=1) == 1
    others = manifest.drop(columns=[name for name in labels if name in manifest])
    others = others.assign(split=manifest["split"].where(asked, "left out"))
    return store._replace(manifest=pd.concat([others, labels], axis=1))


def train(config: Config, stores: Sequence[pipelines.Store], *, run: Path) -> dict[str, list[Trained]]:
    """Train the four stages and the flat network on each fold, or read what an earlier call finished.

    Where a network is trained in several steps, validation chooses among them.

    Returns:
        Stage, or `FLAT`, -> `Trained` of each fold.
    """
    trained = {}
    for number, store in enumerate(stores, start=1):
        label = f"fold{number}" if len(stores) > 1 else ""
        for task in (*STAGES, FLAT):
            asked, names = store if task == FLAT else ask(store, task), classes_of(task)
            for split, means in {"train": "so it will hardly be answered", "valid": "which has no say in it"}.items():
                empty = [name for name in names if not asked.manifest.loc[asked.manifest["split"] == split, name].any()]
                if empty:
                    print(f"{task}: no {split} image of {', '.join(empty)}, {means}")
            steps = shared.train(config, asked, names, config.network, run=run, task=task, label=label)
            trained.setdefault(task, []).append(shared.choose(steps, names))
    return trained


def tabulate(
    config: Config, store: pipelines.Store, trained: Mapping[str, Trained], measures: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """Join a fold's networks into the answers of the cascade and of the flat network to every image.

    The threshold of disease lies midway between the highest score at which `sensitivity` of the diseased validation
    images is found, and the next lower one.

    Args:
        config: the recipe.
        store: a fold of `read`.
        trained: of this fold: stage, or `FLAT`, -> `Trained`.
        measures: of `measure`.

    Returns:
        `CASCADE`, `FLAT` and `metrics.MEASURES`, the baseline that sees no picture, -> table of `kerasmed.predictions`:
        p_<outcome>, which of the cascade are the joint probabilities; `<stage>_<class>`, each stage's own; threshold;
        outcome, the answer.
    """
    told = {task: predictions.columns(each.predictions, classes_of(task))[1] for task, each in trained.items()}
    train, valid = pipelines.rows(store, "train"), pipelines.rows(store, "valid")
    diseased = store.manifest[NONE].to_numpy()[valid] == 0
    threshold = metrics.threshold_of_sensitivity(diseased, told["disease"][valid, 1], config.sensitivity)
    learnt = class_ids(store.manifest, OUTCOMES)[train]
    guessed = audit.classify(measures, learnt, train, len(OUTCOMES), seed=config.seed)
    return {
        CASCADE: tabulate_stages(store.manifest, CASCADE, {stage: told[stage] for stage in STAGES}, threshold),
        FLAT: tabulate_stages(store.manifest, FLAT, cascade.from_joint(told[FLAT])),
        metrics.MEASURES: tabulate_stages(store.manifest, metrics.MEASURES, cascade.from_joint(guessed)),
    }


def tabulate_stages(
    manifest: pd.DataFrame, variant: str, stages: Mapping[str, np.ndarray], threshold: float = np.nan
) -> pd.DataFrame:
    """Lay each stage's probabilities out as a table of `tabulate`."""
    joint = cascade.joint(stages)
    table = predictions.tabulate(manifest, joint, OUTCOMES, variant=variant)
    parts = [pd.DataFrame(stages[stage], columns=cascade.columns(stage), index=table.index) for stage in STAGES]
    table = pd.concat([table, *parts], axis=1).assign(threshold=threshold)
    ends = answer_of(table, range(len(OUTCOMES))) if variant == CASCADE else joint.argmax(axis=1)
    return table.assign(outcome=np.array(OUTCOMES)[ends])


def stages_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Take each stage's probabilities out of a table of `tabulate`."""
    return {stage: table[cascade.columns(stage)].to_numpy(float) for stage in STAGES}


def answer_of(table: pd.DataFrame, among: Sequence[int]) -> np.ndarray:
    """Where the paths end, of the outcomes `among`: `decide` of `predictions.evaluate`."""
    return cascade.answers(stages_of(table), table["threshold"].to_numpy(), among=among)


def measure(source: datasets.Source, store: pipelines.Store) -> pd.DataFrame:
    """Measure what `MEASURES` names of every image, whatever it shows: a row an image, a column a measure."""
    files = images.headers(source.root, store.manifest["image_path"].tolist())
    return audit.measure(files, store.thumbnails)[[name for names in MEASURES.values() for name in names]]


def probe(config: Config, store: pipelines.Store, measures: pd.DataFrame) -> pd.DataFrame:
    """Ask how well measures alone tell from which of the two sets an image comes, and whether it shows a disease.

    Disease is asked over both sets, and within each, where knowing the set is of no help.

    Returns:
        Rows of `audit.probe` with `measures`: each of `MEASURES`, and all of them; and n_groups.
    """
    manifest = store.manifest
    diseased = (manifest[NONE] == 0).astype(float)
    targets = pd.DataFrame({"tumour set": (manifest["task"] == data.TASKS[1]).astype(float), "disease": diseased})
    for task in data.TASKS:
        targets[f"disease, {task}"] = diseased.where(manifest["task"] == task)
    groups = manifest["group_id"]
    options = {"num_draws": min(config.bootstraps, PROBE_DRAWS), "seed": config.seed}
    found = [
        audit.probe(measures[list(names)], targets, groups, **options).assign(measures=name)
        for name, names in {**MEASURES, ALL_MEASURES: list(measures)}.items()
    ]
    table = pd.concat(found, ignore_index=True)
    table["n_groups"] = table["target"].map({name: groups[targets[name].notna()].nunique() for name in targets})
    order = table["target"].map({name: place for place, name in enumerate(targets)})
    return table.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def probe_rows(probed: pd.DataFrame) -> list[dict]:
    """Turn `probe` into rows of metrics.json: task "shortcuts", AUROC over five folds by group; 0.5 is chance."""
    common = {"task": "shortcuts", "split": "five folds by group", "metric": "auroc", "baseline": None}
    return [
        {
            **common,
            "variant": row.measures,
            "label": row.target,
            "value": None if np.isnan(row.auroc) else row.auroc,
            "ci95": None if np.isnan(row.low) else [row.low, row.high],
            "n": row.images,
            "n_groups": row.n_groups,
            "reason": row.reason,
        }
        for row in probed.itertuples()
    ]


def assemble(run: Path, trained: Mapping[str, Sequence[Trained]], origin: Origin, table: pd.DataFrame) -> BrainCascade:
    """Save the first fold's cascade as `cascade/` of a run, and load it from there.

    Args:
        run: the run folder.
        trained: of `train`.
        origin: of `find_origin`.
        table: the cascade's, of `tabulate`, of the first fold.
    """
    models = {
        stage: saved_models.read(runs.variant_folder(run, trained[stage][0].folder) / "model.keras") for stage in STAGES
    }
    about = {
        "run": run.name,
        "data_source": runs.read_json(run / "environment.json")["data_source"],
        "folds": len(trained["disease"]),  # of which these are the first one's networks
    }
    made = BrainCascade(models, float(table["threshold"].iloc[0]), origin.parameters, about)
    return BrainCascade.load(made.save(run / "cascade"))
