"""The recipe of notebook 08_brain_cascade: what it takes over of an earlier run, trains, joins and scores."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest

from kerasmed import audit, datasets, metrics, notebooks, pipelines, predictions, runs
from kerasmed.datasets.brain import CLASS_NAMES
from kerasmed.manifest import class_ids
from kerasmed.parameters import names_of
from kerasmed.systems import brain
from kerasmed.systems.brain import cascade, networks, results, staged
from kerasmed.systems.brain.cascade import NONE, OUTCOMES, SEVERITIES, STAGES, TYPES
from kerasmed.systems.brain.staged import CASCADE, FLAT, ORIGIN

CONFIG = {
    "profile": "smoke",
    "seed": 0,
    "data_source": "auto",
    "synthetic_patients_per_class": 6,
    "synthetic_slices_per_patient": 2,
    "synthetic_seed": 0,
    "from_run": "auto",
    "folds": 0,
    "network": "compact",
    "weights": "none",
    "weights_seconds": 60.0,
    "max_quarantined_share": 0.1,
    "accepted": [],
    "sensitivity": 0.9,
    "augmentation": ["flip"],
    "augmentation_library": "albumentations",
    "batch_size": 16,
    "epochs": 1,
    "learning_rate": 1e-3,
    "unfrozen_learning_rate": 1e-4,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "stop_patience": 5,
    "dropout": 0.3,
    "class_weights": False,
    "focusing": 0.0,
    "precision": "float32",
    "deterministic": False,
    "bootstraps": 20,
}
FOLDS = 2


def _config(**changes):
    return staged.Config(**CONFIG | changes)


# --- the earlier run -------------------------------------------------------------------------------------------------


def _leave_run(fingerprint="f", **changes):
    """Leave a complete run of the earlier notebook, without its models: its folder and parameters."""
    given = {"folds": FOLDS, "image_size": [32, 40], "max_quarantined_share": 0.2} | changes
    parameters = notebooks.resolve(notebooks.describe(ORIGIN), profile="smoke", given=given)
    machine = {"fingerprint": fingerprint, "data_source": "real", "environment": {}}
    run = runs.start("brain", ORIGIN, parameters, **machine)
    runs.finish(run, headline=[{"task": "t", "metric": "m", "value": 0.5, "baseline": {"value": 0.1}}], rows=[])
    return run, parameters


@pytest.fixture
def source(brain_root):
    return datasets.Source(brain_root, "real")


@pytest.fixture
def earlier(source):
    """Function of the earlier notebook's parameters: its run on these images, and its stores, task -> folds."""

    def make(**changes):
        run, parameters = _leave_run(**changes)
        config = networks.Config(**{name: parameters[name] for name in names_of(networks.Config)})
        parts = {task: networks.split(config, networks.read(config, source, task), task) for task in CLASS_NAMES}
        tables = [
            part.manifest[list(predictions.ID_COLUMNS)].assign(fold=number)
            for stores in parts.values()
            for number, part in enumerate(stores, start=1)
        ]
        runs.write_table(run / "split.csv", pd.concat(tables))
        return run, parts

    return make


def _origin(run):
    return staged.Origin(run, runs.read_json(run / "params.json"))


def _edit_split(run, change):
    """Write split.csv anew as `change` makes it of the table."""
    table = pd.read_csv(run / "split.csv", dtype=str, keep_default_na=False)
    change(table).to_csv(run / "split.csv", index=False)


@pytest.mark.parametrize("named", ["auto", "folder", "path"])
def test_find_origin_finds_the_run_on_the_same_data(named):
    run, parameters = _leave_run()
    given = {"auto": "auto", "folder": run.name, "path": str(run)}[named]
    found = staged.find_origin(_config(from_run=given), fingerprint="f")
    assert found.run == run and found.parameters == parameters
    assert staged.find_origin(_config(folds=FOLDS), fingerprint="f").run == run


def test_find_origin_refuses_where_there_is_no_run_on_these_data():
    with pytest.raises(FileNotFoundError, match="on these data .*`kerasmed run 07_brain_mri --profile smoke`"):
        staged.find_origin(_config(), fingerprint="f")
    run, _ = _leave_run()
    with pytest.raises(FileNotFoundError, match="on these data"):
        staged.find_origin(_config(), fingerprint="g")
    with pytest.raises(FileNotFoundError, match="made with other data"):
        staged.find_origin(_config(from_run=run.name), fingerprint="g")
    runs.set_status(run, "failed")
    with pytest.raises(FileNotFoundError, match="is failed, not complete"):
        staged.find_origin(_config(from_run=run.name), fingerprint="f")


@pytest.mark.parametrize("task", list(CLASS_NAMES))
def test_find_origin_refuses_a_run_of_one_task(task):
    run, _ = _leave_run(tasks=[task])
    with pytest.raises(ValueError, match=f"{run.name} did {task} alone; a cascade needs a run with both tasks"):
        staged.find_origin(_config(), fingerprint="f")


def test_find_origin_refuses_what_the_run_cannot_give():
    run, _ = _leave_run()
    with pytest.raises(ValueError, match=f"`folds` is 3; expected at most 2, which {run.name} has, or 0 for all"):
        staged.find_origin(_config(folds=3), fingerprint="f")
    with pytest.raises(ValueError, match="at least 63 pixels a side"):
        staged.find_origin(_config(network="five_block"), fingerprint="f")
    with pytest.raises(ValueError, match="known are flip"):
        staged.find_origin(_config(augmentation=["spin"]), fingerprint="f")


# --- images, groups and splits ---------------------------------------------------------------------------------------


def test_read_labels_by_outcome_and_keeps_pixels_groups_and_splits_of_each_fold(source, earlier):
    run, parts = earlier()
    _edit_split(run, lambda table: table.sample(frac=1, random_state=0))  # its rows need not stand in our order
    stores = staged.read(_config(), source, _origin(run))
    assert len(stores) == FOLDS
    for number, store in enumerate(stores):
        manifest = store.manifest
        assert len(manifest) == 96 and list(manifest.index) == list(range(96))
        for row, path in enumerate(manifest["image_path"]):
            _, task, _, folder, _ = path.split("/")
            assert manifest.at[row, "task"] == task
            expected = NONE if folder in ("NonDemented", "no_tumor") else folder
            assert [name for name in OUTCOMES if manifest.at[row, name] == 1] == [expected]
        assert manifest[list(OUTCOMES)].sum().tolist() == [24] + [12] * 6
        known = pd.concat([stores_of[number].manifest for stores_of in parts.values()]).set_index("image_path")
        for name in ("group_id", "split"):
            assert manifest[name].tolist() == known.loc[manifest["image_path"], name].tolist()
        pixels = np.concatenate([stores_of[number].images for stores_of in parts.values()])
        order = known.index.get_indexer(manifest["image_path"])
        np.testing.assert_array_equal(store.images, pixels[order])
        assert store.images.shape == (96, 32, 40)
        assert store.images is stores[0].images  # one array serves all folds
    assert (stores[0].manifest["split"] != stores[1].manifest["split"]).any()
    tested = np.concatenate([pipelines.rows(store, "test") for store in stores])
    assert sorted(tested) == list(range(96))


def test_read_takes_the_first_folds_in_the_order_of_their_numbers(source, earlier):
    run, _ = earlier()
    _edit_split(run, lambda table: table.assign(fold=table["fold"].map({"1": "10", "2": "2"})))
    numbered = pd.read_csv(run / "split.csv").query("fold == 2").set_index("image_path")["split"]
    (store,) = staged.read(_config(folds=1), source, _origin(run))
    assert store.manifest["split"].tolist() == numbered.loc[store.manifest["image_path"]].tolist()
    assert len(staged.read(_config(), source, _origin(run))) == 2


def test_read_keeps_ids_as_they_are_spelt(source, earlier):
    run, _ = earlier()
    first = pd.read_csv(run / "split.csv")["group_id"].iloc[0]
    _edit_split(run, lambda table: table.assign(group_id=table["group_id"].replace({first: "NA"})))
    store = staged.read(_config(), source, _origin(run))[0]
    assert (store.manifest["group_id"] == "NA").sum() == 2 and store.manifest["group_id"].notna().all()


def test_read_leaves_out_what_the_earlier_run_could_not_read(brain_root, source, earlier, write_odd_files, rng):
    picture = cv2.resize(rng.integers(0, 256, (6, 6), dtype=np.uint8), (60, 60), interpolation=cv2.INTER_CUBIC)
    write_odd_files(brain_root / "brain/brain_tumor/train/no_tumor", picture)
    # Three that are read show one picture.
    run, _ = earlier()
    store = staged.read(_config(), source, _origin(run))[0]
    assert len(store.manifest) == 99 and len(store.quarantine) == 3
    with pytest.raises(ValueError, match="3 of 102 files cannot be read"):
        staged.read(_config(max_quarantined_share=0.02), source, _origin(run))


def test_read_refuses_a_split_of_other_images(brain_root, source, earlier):
    run, _ = earlier()
    whole = (run / "split.csv").read_text()
    _edit_split(run, lambda table: table.iloc[:-1])
    with pytest.raises(ValueError, match=f"lists 95 images in fold 2, 95 .* the 96 here; run {ORIGIN} again"):
        staged.read(_config(), source, _origin(run))
    (run / "split.csv").write_text(whole)
    path = brain_root / "brain/brain_tumor/train/no_tumor/no (0).jpg"
    path.rename(path.with_name("another.jpg"))
    with pytest.raises(ValueError, match="lists 96 images in fold 1, 95 of them among the 96 here"):
        staged.read(_config(), source, _origin(run))
    path.with_name("another.jpg").unlink()
    with pytest.raises(ValueError, match="lists 96 images in fold 1, 95 of them among the 95 here"):
        staged.read(_config(), source, _origin(run))


def test_read_asks_the_gate_of_every_fold(source, earlier):
    run, _ = earlier()

    def part_a_group(table):
        """Of the first group that the last fold trains on, one image is tested."""
        last = table["fold"] == str(FOLDS)
        group = table.loc[last & (table["split"] == "train"), "group_id"].iloc[0]
        row = table.index[last & (table["group_id"] == group)][0]
        table.loc[row, "split"] = "test"
        return table

    _edit_split(run, part_a_group)
    with pytest.raises(audit.LeakError, match="lie in several splits"):
        staged.read(_config(), source, _origin(run))
    assert len(staged.read(_config(folds=1), source, _origin(run))) == 1
    stores = staged.read(_config(accepted=list(audit.FAILING)), source, _origin(run))
    checked = staged.gate(_config(accepted=list(audit.FAILING)), stores[-1]).set_index("check")
    assert checked.loc["leak_group", "found"] == 1 and checked["accepted"].all()


def test_gate_looks_for_pictures_of_several_outcomes(brain_root, source, earlier):
    folder = brain_root / "brain/alzheimer/train"
    # In the first task's own terms nothing is wrong: the copy lies in the other task.
    content = (folder / "MildDemented/Mi (0).jpg").read_bytes()
    (brain_root / "brain/brain_tumor/train/glioma_tumor/gl (0).jpg").write_bytes(content)
    run, _ = earlier()
    with pytest.raises(audit.GateError, match="label_conflict"):
        staged.read(_config(), source, _origin(run))


def _name_patients(brain_root, prefix):
    """Write patients.csv of each set: two files a patient, numbered from 0 after `prefix` of the set."""
    for task in CLASS_NAMES:
        home = brain_root / "brain" / task
        paths = sorted(home.rglob("*.jpg"), key=lambda path: (path.parent.name, int(path.stem.split("(")[1][:-1])))
        lines = [f"{path.relative_to(home).as_posix()},{prefix(task)}{n // 2}" for n, path in enumerate(paths)]
        (home / "patients.csv").write_text("image_path,patient_id\n" + "\n".join(lines))


def test_read_refuses_patients_of_both_sets_even_where_no_split_parts_them(brain_root, source, earlier):
    _name_patients(brain_root, lambda task: "")
    run, _ = earlier()
    message = r"24 patient ids stand in the patients.csv of both sets\..*put the set's name .*First: \['0', '1', '"
    with pytest.raises(ValueError, match=message):
        staged.read(_config(), source, _origin(run))
    _edit_split(run, lambda table: table.assign(split="train"))
    with pytest.raises(ValueError, match=message):
        staged.read(_config(), source, _origin(run))


def test_read_takes_patients_whose_ids_name_their_set(brain_root, source, earlier):
    _name_patients(brain_root, lambda task: f"{task} ")
    run, _ = earlier()
    for store in staged.read(_config(), source, _origin(run)):
        groups = store.manifest.groupby("group_id")
        assert len(groups) == 48 and (groups["split"].nunique() == 1).all() and (groups["task"].nunique() == 1).all()


# --- stages ---------------------------------------------------------------------------------------------------------


def _random(rng, count):
    told = {stage: rng.dirichlet(np.ones(len(classes)), count) for stage, classes in STAGES.items()}
    return {**told, FLAT: rng.dirichlet(np.ones(7), count)}


def _perfect(store):
    ids = class_ids(store.manifest, OUTCOMES)
    return {**cascade.from_joint(np.eye(7)[ids]), FLAT: np.eye(7)[ids]}


def test_ask_keeps_the_images_of_a_stage_and_labels_them_by_its_classes(store):
    truth = np.array(OUTCOMES)[class_ids(store.manifest, OUTCOMES)]
    for stage, classes in STAGES.items():
        asked = staged.ask(store, stage).manifest
        meant = {outcome: name for name, outcomes in classes.items() for outcome in outcomes}
        assert asked["image_path"].tolist() == store.manifest["image_path"].tolist()
        for row, outcome in enumerate(truth):
            here = [name for name in classes if asked.at[row, name] == 1]
            assert here == ([meant[outcome]] if outcome in meant else [])
            expected = store.manifest.at[row, "split"] if outcome in meant else "left out"
            assert asked.at[row, "split"] == expected
        assert asked["group_id"].equals(store.manifest["group_id"]) and asked.columns.is_unique
        assert asked[list(classes)].isin([0, 1]).all(axis=None)
    left_out = [(staged.ask(store, stage).manifest["split"] == "left out").sum() for stage in STAGES]
    assert left_out == [0, 18, 72, 72]


def test_ask_leaves_the_store_as_it_was(store):
    before = store.manifest.copy()
    asked = staged.ask(store, "severity")
    pd.testing.assert_frame_equal(store.manifest, before)
    assert asked.images is store.images and asked.thumbnails is store.thumbnails
    assert list(staged.classes_of("kind")) == ["alzheimer", "tumour"] and staged.classes_of(FLAT) == OUTCOMES


# --- tables ----------------------------------------------------------------------------------------------------------


def test_tabulate_by_hand(store_of, tables_of):
    #  the valid images: none at .7, ill at .8, .6 and .3; at a sensitivity of 2/3 the threshold is (.6 + .3) / 2
    store = store_of([NONE, *SEVERITIES, *TYPES], range(7), ["valid"] * 4 + ["train", "train", "test"])
    disease = np.array([0.7, 0.8, 0.6, 0.3, 0.9, 0.45, 0.44])
    alzheimer = np.array([0.9, 0.9, 0.9, 0.9, 0.9, 0.2, 0.9])
    told = {
        "disease": np.stack([1 - disease, disease], axis=1),
        "kind": np.stack([alzheimer, 1 - alzheimer], axis=1),
        "severity": np.tile([0.5, 0.3, 0.2], (7, 1)),
        "type": np.tile([0.1, 0.6, 0.3], (7, 1)),
        FLAT: np.tile([0.3, 0.1, 0.05, 0.05, 0.1, 0.15, 0.25], (7, 1)),
    }
    tables = tables_of(_config(sensitivity=2 / 3), store, told)
    assert list(tables) == [CASCADE, FLAT, metrics.MEASURES]
    table = tables[CASCADE]
    np.testing.assert_allclose(table["threshold"], 0.45, rtol=1e-14)
    mild = [SEVERITIES[0]]
    assert table["outcome"].tolist() == mild * 3 + [NONE] + mild + [TYPES[1], NONE]
    np.testing.assert_allclose(table["p_none"], 1 - disease, rtol=1e-14)
    np.testing.assert_allclose(table[f"p_{SEVERITIES[2]}"], disease * alzheimer * 0.2, rtol=1e-14)
    np.testing.assert_allclose(table[f"p_{TYPES[1]}"], disease * (1 - alzheimer) * 0.6, rtol=1e-14)
    for stage, names in STAGES.items():
        for place, name in enumerate(names):
            np.testing.assert_array_equal(table[f"{stage}_{name}"], told[stage][:, place])
    flat = tables[FLAT]
    assert flat["outcome"].tolist() == [NONE] * 7 and flat["threshold"].isna().all()
    np.testing.assert_allclose(flat[[f"p_{name}" for name in OUTCOMES]], told[FLAT], rtol=1e-14)
    np.testing.assert_allclose(flat["disease_disease"], 0.7, rtol=1e-14)
    # Conditional: an Alzheimer's outcome has .2 of the .7, and the first severity half of that.
    np.testing.assert_allclose(flat["kind_alzheimer"], 2 / 7, rtol=1e-14)
    np.testing.assert_allclose(flat[f"severity_{SEVERITIES[0]}"], 0.5, rtol=1e-14)
    np.testing.assert_allclose(flat[cascade.columns("type")], np.tile([0.2, 0.3, 0.5], (7, 1)), rtol=1e-14)
    # Measures that tell nothing: each of the two outcomes that were learnt is as likely, and the first is the answer.
    guessed = tables[metrics.MEASURES]
    expected = np.tile([0, 0, 0, 0, 0.5, 0.5, 0], (7, 1))
    np.testing.assert_allclose(guessed[[f"p_{name}" for name in OUTCOMES]], expected, atol=1e-12)
    assert guessed["outcome"].tolist() == [TYPES[0]] * 7 and guessed["threshold"].isna().all()
    np.testing.assert_allclose(guessed[["disease_disease", "kind_tumour"]], 1, rtol=1e-14)
    np.testing.assert_allclose(guessed[cascade.columns("severity")], 1 / 3, rtol=1e-14)
    np.testing.assert_allclose(guessed[cascade.columns("type")], np.tile([0.5, 0.5, 0], (7, 1)), atol=1e-12)
    for variant, each in tables.items():
        assert set(each["variant"]) == {variant} and each["y_none"].tolist() == [1, 0, 0, 0, 0, 0, 0]
        assert each["split"].tolist() == store.manifest["split"].tolist()


def test_tabulate_threshold_is_of_the_validation_images_alone(store, tables_of, rng):
    told = _random(rng, 126)
    config = _config(sensitivity=0.8)
    threshold = tables_of(config, store, told)[CASCADE]["threshold"]
    assert threshold.nunique() == 1
    valid, ill = (store.manifest["split"] == "valid").to_numpy(), store.manifest[NONE].to_numpy() == 0
    found = told["disease"][:, 1] >= threshold[0]
    assert found[valid & ill].sum() == 29  # of 36
    # Whatever is said of, and true of, the other images.
    other = told | {"disease": np.where(valid[:, None], told["disease"], rng.dirichlet(np.ones(2), 126))}
    shuffled = store.manifest.copy()
    shuffled.loc[~valid, list(OUTCOMES)] = shuffled.loc[~valid, list(OUTCOMES)].to_numpy()[::-1]
    elsewhere = store._replace(manifest=shuffled)
    again = tables_of(config, elsewhere, other)[CASCADE]["threshold"]
    assert again.tolist() == threshold.tolist()
    higher = told | {"disease": np.where(valid[:, None], told["disease"][:, ::-1], told["disease"])}
    assert tables_of(config, store, higher)[CASCADE]["threshold"][0] != threshold[0]
    stricter = tables_of(_config(sensitivity=1), store, told)[CASCADE]["threshold"][0]
    assert stricter < threshold[0]


def test_tabulate_outcome_is_that_of_the_cascade_and_stages_come_back(store, tables_of, rng):
    told = _random(rng, 126)
    tables = tables_of(_config(), store, told)
    stages = staged.stages_of(tables[CASCADE])
    for stage in STAGES:
        np.testing.assert_array_equal(stages[stage], told[stage])
    expected = cascade.answers(stages, tables[CASCADE]["threshold"].to_numpy())
    assert tables[CASCADE]["outcome"].tolist() == np.array(OUTCOMES)[expected].tolist()
    joint = tables[CASCADE][[f"p_{name}" for name in OUTCOMES]]
    np.testing.assert_allclose(joint, cascade.joint(stages), rtol=1e-14)
    of_flat = tables[FLAT]["outcome"].tolist()
    assert of_flat == np.array(OUTCOMES)[told[FLAT].argmax(axis=1)].tolist()
    np.testing.assert_allclose(cascade.joint(staged.stages_of(tables[FLAT])), told[FLAT], rtol=1e-12)
    assert tables[CASCADE].columns.is_unique
    assert list(tables[CASCADE]) == list(tables[FLAT]) == list(tables[metrics.MEASURES])


def test_tabulate_without_a_diseased_validation_image_is_refused(store_of, tables_of, rng):
    store = store_of([NONE, TYPES[0]], "ab", ["valid", "train"])
    with pytest.raises(ValueError, match="no row is positive"):
        tables_of(_config(), store, _random(rng, 2))


# --- measures --------------------------------------------------------------------------------------------------------


def test_measure_gives_what_is_known_without_looking_beside_the_store(source, earlier):
    run, _ = earlier()
    store = staged.read(_config(), source, _origin(run))[0]
    found = staged.measure(source, store)
    assert list(found) == [name for names in staged.MEASURES.values() for name in names]
    assert len(found) == 96 and set(found["height"]) == {80} and set(found["width"]) == {70}
    np.testing.assert_allclose(found["mean intensity"], store.thumbnails.mean(axis=(1, 2)), rtol=1e-12)


def test_tabulate_measures_learn_from_the_training_images_alone(store, tables_of, measures_of):
    ids = class_ids(store.manifest, OUTCOMES)
    # Enough images for a leaf of twenty.
    many = store.manifest.loc[np.tile(np.arange(126), 12)].reset_index(drop=True)
    store, ids = store._replace(manifest=many, thumbnails=np.tile(store.thumbnails, (12, 1, 1))), np.tile(ids, 12)
    measures = measures_of(len(ids), height=ids * 10.0)
    perfect = {**cascade.from_joint(np.eye(7)[ids]), FLAT: np.eye(7)[ids]}
    told = tables_of(_config(), store, perfect, measures)[metrics.MEASURES]
    names = [f"p_{name}" for name in OUTCOMES]
    assert (told[names].to_numpy().argmax(axis=1) == ids).all()
    assert told["outcome"].tolist() == np.array(OUTCOMES)[ids].tolist()
    np.testing.assert_allclose(told[names].sum(axis=1), 1, atol=1e-12)
    unseen = (many["split"] != "train").to_numpy()
    other = many.copy()
    other.loc[unseen, list(OUTCOMES)] = np.eye(7, dtype=int)[(ids[unseen] + 1) % 7]
    again = tables_of(_config(), store._replace(manifest=other), perfect, measures)[metrics.MEASURES]
    np.testing.assert_array_equal(again[names], told[names])
    moved = measures.assign(height=np.where(unseen, 10.0 * ((ids + 3) % 7), measures["height"]))
    seen = tables_of(_config(), store, perfect, moved)[metrics.MEASURES]
    np.testing.assert_array_equal(seen.loc[~unseen, names], told.loc[~unseen, names])
    assert (seen[names].to_numpy().argmax(axis=1)[unseen] == ((ids + 3) % 7)[unseen]).all()


def test_probe_finds_the_planted_shortcut_and_none_in_noise(store, measures_of, rng):
    many = store.manifest.loc[np.tile(np.arange(126), 4)].reset_index(drop=True)
    many["group_id"] = [f"{group}-{row // 126}" for row, group in enumerate(many["group_id"])]
    store, count = store._replace(manifest=many), len(many)
    tumour, ill = (many["task"] == "brain_tumor").to_numpy(), many[NONE].to_numpy() == 0
    measures = measures_of(
        count,
        height=np.where(tumour, 200.0, 100.0),
        width=rng.random(count),
        **{"border intensity": rng.random(count), "mean intensity": ill * 50.0},
    )
    probed = staged.probe(_config(bootstraps=50), store, measures)
    table = probed.set_index(["target", "measures"])
    every = np.ones(count, bool)
    # Target -> what is positive, among which images, of how many groups. Nine groups of each outcome, four times; of
    # the healthy, five are of the one set and four of the other.
    asked = {
        "tumour set": (tumour, every, 252),
        "disease": (ill, every, 252),
        "disease, alzheimer": (ill, ~tumour, 4 * (27 + 5)),
        "disease, brain_tumor": (ill, tumour, 4 * (27 + 4)),
    }
    by = [*staged.MEASURES, staged.ALL_MEASURES]
    assert list(table.index) == [(target, name) for target in asked for name in by]
    assert table.loc[("tumour set", "size"), ["auroc", "low", "strongest"]].tolist() == [1, 1, "height"]
    for target, (positive, among, groups) in asked.items():
        assert target == "tumour set" or table.loc[(target, "mean intensity"), "auroc"] == 1
        assert table.loc[(target, staged.ALL_MEASURES), "auroc"] == 1
        # Noise: three standard errors of an AUROC of 72 healthy images are 0.11, of 32 within a set 0.16.
        assert table.loc[(target, "border"), "auroc"] == pytest.approx(0.5, abs=0.11 if among.all() else 0.16)
        assert table.loc[(target, "border"), "low"] + 0.02 < table.loc[(target, "border"), "high"]
        assert set(table.loc[target, "images"]) == {among.sum()}
        assert set(table.loc[target, "positives"]) == {(positive & among).sum()}
        assert set(table.loc[target, "n_groups"]) == {groups}
    for task in CLASS_NAMES:  # within a set its size is the same everywhere
        assert table.loc[(f"disease, {task}", "size"), "strongest"] == "width"

    rows = staged.probe_rows(probed)
    value = {(row["label"], row["variant"]): row for row in rows}
    row = value["tumour set", "size"]
    assert (row["task"], row["metric"], row["value"], row["ci95"]) == ("shortcuts", "auroc", 1, [1, 1])
    assert (row["n"], row["n_groups"], row["baseline"], row["reason"]) == (count, 252, None, "")
    row = value["disease, brain_tumor", "border"]
    shown = table.loc[("disease, brain_tumor", "border"), ["auroc", "low", "high"]].tolist()
    assert [row["value"], *row["ci95"]] == shown and (row["n"], row["n_groups"]) == (tumour.sum(), 124)
    assert len(rows) == len(value) == 16 and value["disease", "border"]["value"] < 0.62


def test_probe_rows_of_too_few_groups_say_why(store, measures_of):
    few = store._replace(manifest=store.manifest.assign(group_id=np.where(store.manifest[NONE] == 1, "a", "b")))
    rows = staged.probe_rows(staged.probe(_config(), few, measures_of(126)))
    assert {row["value"] for row in rows} == {row["ci95"] for row in rows} == {None}
    assert all("groups" in row["reason"] for row in rows) and {row["n_groups"] for row in rows} == {2}


# --- the whole chain -------------------------------------------------------------------------------------------------


def test_train_has_each_stage_learn_from_its_own_images(store, tmp_path, monkeypatch, capsys):
    asked = []

    def train(config, given, names, network, *, run, task, label):
        asked.append((task, label, network, names))
        learnt = given.manifest[given.manifest["split"] == "train"]
        assert learnt[list(names)].sum(axis=1).eq(1).all()
        truth = np.array(OUTCOMES)[class_ids(store.manifest.loc[learnt.index], OUTCOMES)]
        assert task == FLAT or set(truth) <= {name for each in STAGES[task].values() for name in each}
        steps = []
        for step, sure in (("head", 0.2), ("unfrozen", 0.9)):  # the later is better on the validation images
            ids = class_ids(given.manifest, names)
            told = np.full((len(ids), len(names)), (1 - sure) / len(names))
            told[np.arange(len(ids)), ids if sure > 0.5 else (ids + 1) % len(names)] = sure + 0.1
            table = predictions.tabulate(given.manifest, told, names, variant=step)
            steps.append(staged.Trained(step, f"{task}-{step}", None, table))
        return steps[::-1]

    monkeypatch.setattr(staged.shared, "train", train)
    found = staged.train(_config(), [store, store], run=tmp_path)
    tasks = [*STAGES, FLAT]
    assert asked == [(task, f"fold{number}", "compact", staged.classes_of(task)) for number in (1, 2) for task in tasks]
    assert {task: [each.folder for each in steps] for task, steps in found.items()} == {
        task: [f"{task}-unfrozen"] * 2 for task in tasks
    }
    asked.clear()
    bare = store.manifest["split"].mask((store.manifest["split"] == "train") & (store.manifest[TYPES[0]] == 1), "test")
    staged.train(_config(), [store._replace(manifest=store.manifest.assign(split=bare))], run=tmp_path)
    assert {label for _, label, _, _ in asked} == {""}
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["type", FLAT]
    assert all(f"no train image of {TYPES[0]}, so it will hardly be answered" in line for line in said)
    healthy = store.manifest["split"].mask((store.manifest["split"] == "valid") & (store.manifest[NONE] == 1), "test")
    rare = healthy.mask((healthy == "valid") & store.manifest[list(SEVERITIES[1:])].any(axis=1), "test")
    staged.train(_config(), [store._replace(manifest=store.manifest.assign(split=rare))], run=tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        f"disease: no valid image of {NONE}, which has no say in it",
        f"severity: no valid image of {SEVERITIES[1]}, {SEVERITIES[2]}, which has no say in it",
        f"{FLAT}: no valid image of {NONE}, {SEVERITIES[1]}, {SEVERITIES[2]}, which has no say in it",
    ]


@pytest.mark.slow
def test_chain_from_training_to_prediction_of_files(brain_root, source, earlier, monkeypatch):
    origin = _origin(earlier(folds=1, image_size=[32, 32], fit="pad", equalize=True)[0])
    config = _config()
    (store,) = stores = staged.read(config, source, origin)
    machine = {"fingerprint": "f", "data_source": "real", "environment": {}}
    run = runs.start("brain", "08_brain_cascade", CONFIG, **machine)
    trained = staged.train(config, stores, run=run)
    assert list(trained) == [*STAGES, FLAT] and all(len(each) == 1 for each in trained.values())
    assert {path.name for path in (run / "variants").iterdir()} == {f"{task}-compact" for task in trained}
    for stage in STAGES:
        told = trained[stage][0].predictions
        assert len(told) == 96 and told["split"].tolist() == staged.ask(store, stage).manifest["split"].tolist()
    measures = staged.measure(source, store)
    tables = [staged.tabulate(config, store, {task: steps[0] for task, steps in trained.items()}, measures)]
    gathered = results.people(store, tables[0])
    rows = results.evaluate(config, stores, tables, task=results.SLICES)
    rows += results.evaluate(config, [gathered], [gathered.tables], task=results.PEOPLE)
    rows += results.evaluate_stages(config, stores, tables, [gathered])
    rows += staged.probe_rows(staged.probe(config, store, measures))
    reader = staged.assemble(run, trained, origin, tables[0][CASCADE])
    assert reader.about == {"run": run.name, "data_source": "real", "folds": 1}
    assert reader.threshold == tables[0][CASCADE]["threshold"][0]
    assert dict(reader.read_options) == {
        name: origin.parameters[name] for name in ("image_size", "fit", "interpolation", "equalize")
    }
    runs.finish(run, headline=predictions.headline(rows, task=results.SLICES, variant=CASCADE), rows=rows)

    said = brain.predict(run, brain_root / "brain", progress=False)
    said = said.assign(image_path="brain/" + said["image_path"]).set_index("image_path")
    table = tables[0][CASCADE].set_index("image_path")
    assert len(said) == len(table) == 96
    said = said.loc[table.index]
    names = [f"p_{name}" for name in OUTCOMES] + [name for stage in STAGES for name in cascade.columns(stage)]
    # Batches of other sizes: float32 sums in another order.
    np.testing.assert_allclose(said[names], table[names], atol=1e-5)
    assert said["outcome"].tolist() == table["outcome"].tolist()

    # A person of two slices: as the recipe gathers them, and as the cascade reads them.
    for person in (0, 20, 40):
        paths = store.manifest.query("group_id == @gathered.manifest.group_id[@person]")["image_path"]
        reading = reader.predict([brain_root / path for path in paths])
        expected = gathered.tables[CASCADE].loc[person]
        assert len(reading.pixels) == gathered.manifest.at[person, "slices"] == 2
        assert reading.outcome == expected["outcome"]
        for outcome, probability in reading.joint.items():
            assert probability == pytest.approx(expected[f"p_{outcome}"], abs=1e-5)

    # Once more, nothing is trained, and the cascade is made anew in its place.
    monkeypatch.setattr(staged.shared, "fit", None)
    again = staged.train(config, stores, run=run)
    for task, steps in trained.items():
        pd.testing.assert_frame_equal(again[task][0].predictions, steps[0].predictions, check_exact=True)
    assert staged.assemble(run, again, origin, tables[0][CASCADE]).threshold == reader.threshold


def test_assemble_takes_the_models_and_the_threshold_of_the_first_fold(store, tmp_path, monkeypatch):
    runs.write_json(tmp_path / "environment.json", {"data_source": "synthetic"})
    trained = {
        task: [SimpleNamespace(folder=f"{task}-compact-fold{number}") for number in (1, 2)] for task in (*STAGES, FLAT)
    }
    made = []
    monkeypatch.setattr(staged.saved_models, "read", lambda path: path.relative_to(tmp_path).as_posix())

    class Written(SimpleNamespace):
        def save(self, folder):
            made.append(self)
            return folder

        load = staticmethod(lambda folder: folder)

    monkeypatch.setattr(staged, "BrainCascade", lambda *given: Written(given=given))
    staged.BrainCascade.load = Written.load
    table = pd.DataFrame({"threshold": [0.25, 0.25]})
    found = staged.assemble(tmp_path, trained, staged.Origin(None, {"image_size": [1, 2]}), table)
    assert found == tmp_path / "cascade"
    models, threshold, options, about = made[0].given
    assert models == {stage: f"variants/{stage}-compact-fold1/model.keras" for stage in STAGES}
    assert (threshold, options) == (0.25, {"image_size": [1, 2]})
    assert about == {"run": tmp_path.name, "data_source": "synthetic", "folds": 2}


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("network", "LeNet", "one of compact, five_block"),
        ("network", "", "one of compact, five_block"),
        ("folds", -1, "at least 1, or 0 for all"),
        ("folds", 1.5, "at least 1, or 0 for all"),
        ("sensitivity", 0.0, "a share above 0, at most 1"),
        ("sensitivity", 1.01, "a share above 0, at most 1"),
        ("accepted", ["everything"], "some of"),
        ("augmentation_library", "torch", "albumentations or keras"),
        ("batch_size", 0, "at least 1"),
        ("epochs", 0, "at least 1"),
        ("bootstraps", 0, "at least 1"),
        ("synthetic_slices_per_patient", 0, "at least 1"),
        ("learning_rate", 1.0, "between 0 and 1"),
        ("unfrozen_learning_rate", 0.0, "between 0 and 1"),
        ("weights_seconds", 0.0, "more than 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("max_quarantined_share", 1.1, "0 to 1"),
        ("dropout", 1.0, "below 1"),
        ("schedule", "warm", "one of cosine"),
    ],
)
def test_config_refuses_values_before_any_work(name, value, expected):
    with pytest.raises(ValueError, match=f"`{name}` is .*{expected}"):
        _config(**{name: value})


def test_config_takes_the_limits():
    config = _config(sensitivity=1, folds=0, accepted=list(audit.FAILING), augmentation_library="keras")
    assert (config.sensitivity, config.folds) == (1, 0)
    assert replace(config, network="five_block").network == "five_block"
