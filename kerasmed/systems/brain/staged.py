"""Notebook 08_brain_cascade: four networks in a cascade, judged end to end beside one flat network of seven outcomes.

    kerasmed run 07_brain_mri 08_brain_cascade --profile demo                    synthetic data
    kerasmed run 08_brain_cascade --profile cpu --data-root DIR       goes on from the newest run of 07 on the same data

How images are read, the groups and the split are those of a run of 07_brain_mri, so that its figures compare.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from kerasmed import audit, augment, backbones, datasets, images, metrics, pipelines, predictions, runs
from kerasmed.datasets import brain as data
from kerasmed.manifest import class_ids, validate
from kerasmed.parameters import refuse
from kerasmed.systems.brain import cascade, shared
from kerasmed.systems.brain.cascade import NONE, OUTCOMES, STAGES, BrainCascade
from kerasmed.training import Trained

ORIGIN = "07_brain_mri"  # whose run this notebook goes on from
FLAT = "flat"  # the one network of seven outcomes
CASCADE, JOINT = "cascade", "cascade, likeliest"  # the path's outcome, and that of the largest joint probability
SLICES, PEOPLE = "slices", "people"
# What is known of an image without looking at what it shows; the thumbnail's border and mean are the same for any size.
MEASURES = {
    "size": ("height", "width"),
    "border": ("border intensity", "border spread"),
    "mean intensity": ("mean intensity",),
}
ALL_MEASURES = ", ".join(MEASURES)


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
        refuse("folds", self.folds, self.folds >= 0, "at least 1, or 0 for all that the earlier run has")
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
        ValueError: the earlier run's split does not name the same images, or parts a patient whom both sets name.
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
    """Raise where a patient id of both sets is in two splits, which were made for each set by itself."""
    of_group = manifest.groupby("group_id")[["task", "split"]].nunique()
    both = of_group.index[(of_group > 1).all(axis=1)]
    if len(both):
        raise ValueError(
            f"{len(both)} patient ids stand in the patients.csv of both sets, and in two splits. If they are not the "
            "same people, put the set's name before the ids of each file; if they are, take them out of one set; then "
            f"run {ORIGIN} again. First: {both[:5].tolist()}."
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
            empty = [name for name in names if not asked.manifest.loc[asked.manifest["split"] == "train", name].any()]
            if empty:
                print(f"{task}: no training image of {', '.join(empty)}, so it will hardly be answered")
            steps = shared.train(config, asked, names, config.network, run=run, task=task, label=label)
            trained.setdefault(task, []).append(shared.choose(steps, names))
    return trained


def tabulate(config: Config, store: pipelines.Store, trained: Mapping[str, Trained]) -> dict[str, pd.DataFrame]:
    """Join a fold's networks into the answers of the cascade and of the flat network to every image.

    The threshold of disease is the highest that finds `sensitivity` of the diseased validation images.

    Args:
        config: the recipe.
        store: a fold of `read`.
        trained: of this fold: stage, or `FLAT`, -> `Trained`.

    Returns:
        `CASCADE` and `FLAT` -> table of `kerasmed.predictions`: p_<outcome>, which of the cascade are the joint
        probabilities; `<stage>_<class>`, each stage's own; threshold; outcome, the answer.
    """
    told = {task: predictions.columns(each.predictions, classes_of(task))[1] for task, each in trained.items()}
    valid = pipelines.rows(store, "valid")
    diseased = store.manifest[NONE].to_numpy()[valid] == 0
    threshold = metrics.threshold_of_sensitivity(diseased, told["disease"][valid, 1], config.sensitivity)
    stages = {stage: told[stage] for stage in STAGES}
    return {
        CASCADE: _table(store.manifest, CASCADE, stages, threshold),
        FLAT: _table(store.manifest, FLAT, cascade.from_joint(told[FLAT]), np.nan),
    }


def _table(manifest, variant, stages, threshold) -> pd.DataFrame:
    joint = cascade.joint(stages)
    table = predictions.tabulate(manifest, joint, OUTCOMES, variant=variant)
    parts = [pd.DataFrame(stages[stage], columns=cascade.columns(stage), index=table.index) for stage in STAGES]
    table = pd.concat([table, *parts], axis=1).assign(threshold=threshold)
    ends = joint.argmax(axis=1) if variant == FLAT else _answer(table, range(len(OUTCOMES)))
    return table.assign(outcome=np.array(OUTCOMES)[ends])


def stages_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Take each stage's probabilities out of a table of `tabulate`."""
    return {stage: table[cascade.columns(stage)].to_numpy(float) for stage in STAGES}


def _answer(table, among) -> np.ndarray:
    """Where the paths end, of the outcomes `among`: `decide` of `predictions.evaluate`."""
    return cascade.answers(stages_of(table), table["threshold"].to_numpy(), among=among)


class People(NamedTuple):
    """Slices gathered into people: a row a group and outcome."""

    manifest: pd.DataFrame  # of one fold
    thumbnails: np.ndarray  # uint8 (num_people, 64, 64): means of their slices'
    tables: dict[str, pd.DataFrame]  # as of `tabulate`, of the means of each stage's probabilities


def people(store: pipelines.Store, tables: Mapping[str, pd.DataFrame]) -> People:
    """Gather a fold's slices into people, as `BrainCascade.predict` does: the mean of each stage over the slices.

    A group whose slices have several outcomes is one person for each of them.
    """
    key = pd.MultiIndex.from_arrays([store.manifest["group_id"], class_ids(store.manifest, OUTCOMES)])
    number, _ = pd.factorize(key)
    first = np.unique(number, return_index=True)[1]
    count = np.bincount(number)
    manifest = store.manifest.iloc[first].reset_index(drop=True).assign(slices=count)
    # Groups lie together in no order: sums by number, row after row, hold one picture a person in memory.
    sums = np.zeros((len(count), *images.THUMBNAIL_SIZE), np.float32)
    np.add.at(sums, number, store.thumbnails)
    thumbnails = np.rint(sums / count[:, None, None]).astype(np.uint8)
    gathered = {}
    for variant, table in tables.items():
        means = table[[name for stage in STAGES for name in cascade.columns(stage)]].groupby(number).mean()
        stages = {stage: means[cascade.columns(stage)].to_numpy() for stage in STAGES}
        if variant == FLAT:  # whose own answer is the outcomes' probabilities: these are averaged
            joint = table[[f"p_{name}" for name in OUTCOMES]].groupby(number).mean().to_numpy()
            stages = cascade.from_joint(joint)
        gathered[variant] = _table(manifest, variant, stages, table["threshold"].iloc[0])
    return People(manifest, thumbnails, gathered)


def measure(source: datasets.Source, store: pipelines.Store) -> pd.DataFrame:
    """Measure what `MEASURES` names of every image, whatever it shows: a row an image, a column a measure."""
    files = images.headers(source.root, store.manifest["image_path"].tolist())
    return audit.measure(files, store.thumbnails)[[name for names in MEASURES.values() for name in names]]


def evaluate(
    config: Config, folds: Sequence[pipelines.Store], tables: Sequence[Mapping], measures: pd.DataFrame
) -> list[dict]:
    """Score the seven outcomes end to end, by slice and by person, the cascade beside the flat network.

    Args:
        config: `bootstraps` and `seed` are used.
        folds: of `read`.
        tables: of `tabulate`, for each fold.
        measures: of `measure`; what they alone say of the outcome is a baseline.

    Returns:
        Rows of `kerasmed.metrics.multiclass_rows` of the variants `CASCADE`, `JOINT` and `FLAT`, beside majority,
        nearest neighbour and, of slices, measures, with `reference` to the flat network; tasks `SLICES` and `PEOPLE`.
    """
    guessed = [guess(store, measures, seed=config.seed) for store in folds]
    gathered = [people(store, {**of_fold}) for store, of_fold in zip(folds, tables)]
    rows = _rows(config, SLICES, [store.manifest for store in folds], folds[0].thumbnails, tables, guessed)
    manifests = [each.manifest for each in gathered]
    return rows + _rows(config, PEOPLE, manifests, gathered[0].thumbnails, [each.tables for each in gathered], [])


def _rows(config, task, manifests, thumbnails, tables, guessed) -> list[dict]:
    told = {
        CASCADE: [each[CASCADE] for each in tables],
        JOINT: [each[CASCADE] for each in tables],
        FLAT: [each[FLAT] for each in tables],
        **({metrics.MEASURES: guessed} if guessed else {}),
    }
    options = {"reference": FLAT, "decide": {CASCADE: _answer}, "num_draws": config.bootstraps, "seed": config.seed}
    return predictions.evaluate(told, manifests, thumbnails, OUTCOMES, task=task, **options)


def evaluate_stages(config: Config, folds: Sequence[pipelines.Store], tables: Sequence[Mapping]) -> list[dict]:
    """Score each stage on the test slices that it is for, beside what the flat network says of the same classes.

    Disease or none is scored within each of the two sets as well, where knowing the set is of no help. There the
    cascade's answer is by the threshold, the flat network's by the larger probability.

    Returns:
        Rows of `kerasmed.metrics.multiclass_rows` with `reference` to the flat network; the task is the stage, or
        "disease, <set>".
    """

    def by_threshold(table, _):
        return (table["p_disease"] >= table["threshold"]).to_numpy(int)

    asked = [(stage, stage, data.TASKS) for stage in STAGES]
    asked[1:1] = [(f"disease, {task}", "disease", [task]) for task in data.TASKS]
    rows = []
    for name, stage, tasks in asked:
        manifests = [ask(store, stage).manifest for store in folds]
        manifests = [each.assign(split=each["split"].where(each["task"].isin(tasks), "left out")) for each in manifests]
        told = {variant: [] for variant in (CASCADE, FLAT)}
        for manifest, of_fold in zip(manifests, tables):
            for variant, each in told.items():
                values = of_fold[variant][cascade.columns(stage)].to_numpy()
                table = predictions.tabulate(manifest, values, classes_of(stage), variant=variant)
                each.append(table.assign(threshold=of_fold[variant]["threshold"].to_numpy()))
        rows += predictions.evaluate(
            told,
            manifests,
            folds[0].thumbnails,
            classes_of(stage),
            task=name,
            reference=FLAT,
            decide={CASCADE: by_threshold} if stage == "disease" else {},
            num_draws=config.bootstraps,
            seed=config.seed,
        )
    return rows


def where_lost(table: pd.DataFrame) -> pd.DataFrame:
    """Say of each outcome what share of its rows is answered right, and at which stage the others leave their path.

    Args:
        table: test rows of the cascade's tables of `tabulate`.

    Returns:
        DataFrame indexed by outcome, those without rows left out: images (how many), right, and each of `STAGES`, the
        share that this stage is the first to answer wrong.
    """
    truth, _ = predictions.truth_and_probabilities(table, OUTCOMES)
    ended = pd.Categorical(table["outcome"], OUTCOMES).codes
    lost = np.where(truth == ended, "right", "")
    for stage, classes in STAGES.items():
        # The class of each outcome at this stage, -1 where it is none of the stage's.
        number = np.array([[name in outcomes for outcomes in classes.values()] for name in OUTCOMES])
        number = np.where(number.any(axis=1), number.argmax(axis=1), -1)
        lost = np.where((lost == "") & (number[truth] != number[ended]), stage, lost)
    shares = pd.crosstab(np.array(OUTCOMES)[truth], lost, normalize="index")
    shares = shares.reindex(columns=["right", *STAGES], fill_value=0.0)
    shares.insert(0, "images", np.bincount(truth, minlength=len(OUTCOMES))[[OUTCOMES.index(n) for n in shares.index]])
    return shares.loc[[name for name in OUTCOMES if name in shares.index]].rename_axis(index=None, columns=None)


def verdicts(rows: Sequence[Mapping]) -> list[str]:
    """Say for each variant whether it does better than the flat network, of slices and people, on the same draws."""
    told = {}
    for row in rows:
        against = row.get("reference")
        if against is None or not row["label"].endswith("all") or row["metric"] == "macro_f1":
            continue
        low, high = against["difference_ci95"] or (np.nan, np.nan)
        word = "better" if low > 0 else "worse" if high < 0 else "not told apart"
        where = f"{row['task']}, {row['label']}: {row['variant']} against {against['variant']}"
        told.setdefault(where, []).append(
            f"{row['metric'].replace('_', ' ')} {word} ({against['difference']:+.3f} [{low:+.3f}, {high:+.3f}])"
        )
    return [f"{where}: {', '.join(words)}" for where, words in told.items()]


def guess(store: pipelines.Store, measures: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Baseline: answer every image by boosted trees on its measures alone, learnt from the training images."""
    train = pipelines.rows(store, "train")
    told = audit.classify(measures, class_ids(store.manifest, OUTCOMES)[train], train, len(OUTCOMES), seed=seed)
    return predictions.tabulate(store.manifest, told, OUTCOMES, variant=metrics.MEASURES)


def probe(config: Config, store: pipelines.Store, measures: pd.DataFrame) -> pd.DataFrame:
    """Ask how well measures alone tell from which of the two sets an image comes, and whether it shows a disease.

    Returns:
        Rows of `audit.probe` with `measures`: each of `MEASURES`, and all of them.
    """
    manifest = store.manifest
    targets = pd.DataFrame({"tumour set": manifest["task"] == data.TASKS[1], "disease": manifest[NONE] == 0})
    asked = {**MEASURES, ALL_MEASURES: list(measures)}
    options = {"num_draws": min(config.bootstraps, 200), "seed": config.seed}
    found = [
        audit.probe(measures[list(names)], targets.astype(float), manifest["group_id"], **options).assign(measures=name)
        for name, names in asked.items()
    ]
    return pd.concat(found, ignore_index=True).sort_values("target", kind="stable", ignore_index=True)


def probe_rows(probed: pd.DataFrame, store: pipelines.Store) -> list[dict]:
    """Turn `probe` into rows of metrics.json: task "shortcuts", AUROC over five folds by group."""
    common = {"task": "shortcuts", "split": "five folds by group", "metric": "auroc", "baseline": None}
    groups = store.manifest["group_id"].nunique()
    return [
        {
            **common,
            "variant": row.measures,
            "label": row.target,
            "value": None if np.isnan(row.auroc) else row.auroc,
            "ci95": None if np.isnan(row.low) else [row.low, row.high],
            "n": row.images,
            "n_groups": groups,
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
        stage: keras.saving.load_model(runs.variant_folder(run, trained[stage][0].folder) / "model.keras")
        for stage in STAGES
    }
    about = {"run": run.name, "data_source": runs.read_json(run / "environment.json")["data_source"]}
    made = BrainCascade(models, float(table["threshold"].iloc[0]), origin.parameters, about)
    return BrainCascade.load(made.save(run / "cascade"))


def confident(table: pd.DataFrame, *, right: bool, count: int = 8) -> np.ndarray:
    """Return the index of the rows whose path was surest, right or wrong, one a group, surest first.

    Args:
        table: the cascade's, of `tabulate`.
        right: whether to look among the right or the wrong answers.
        count: at most so many.
    """
    truth, joint = predictions.truth_and_probabilities(table, OUTCOMES)
    ended = pd.Categorical(table["outcome"], OUTCOMES).codes
    found = pd.DataFrame(
        {"index": table.index, "sure": joint[np.arange(len(joint)), ended], "group": table["group_id"].to_numpy()}
    )
    found = found[(ended == truth) == right].sort_values("sure", ascending=False, kind="stable")
    return found.drop_duplicates("group")["index"].to_numpy()[:count]


def captions(table: pd.DataFrame, readings: Sequence[cascade.Reading]) -> list[str]:
    """Say of each image its outcome, the path's, and the deciding stage with its own probability, in three lines."""
    truth, _ = predictions.truth_and_probabilities(table, OUTCOMES)
    return [
        f"{OUTCOMES[true]}\nread as {reading.outcome}\n{reading.path[-1].stage}: p = {reading.path[-1].probability:.2f}"
        for true, reading in zip(truth, readings)
    ]
