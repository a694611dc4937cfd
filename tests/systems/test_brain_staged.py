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
from kerasmed.systems.brain import cascade, networks, staged
from kerasmed.systems.brain.cascade import NONE, OUTCOMES, SEVERITIES, STAGES, TYPES
from kerasmed.systems.brain.staged import CASCADE, FLAT, JOINT, ORIGIN, PEOPLE, SLICES

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


def test_read_keeps_patients_of_the_two_sets_apart(brain_root, source, earlier):
    # Each set numbers its own patients from 0, and nobody is in both.
    for task in CLASS_NAMES:
        home = brain_root / "brain" / task
        paths = sorted(home.rglob("*.jpg"), key=lambda path: (path.parent.name, int(path.stem.split("(")[1][:-1])))
        if task == "brain_tumor":
            paths = paths[::-1]
        lines = [f"{path.relative_to(home).as_posix()},{number // 2}" for number, path in enumerate(paths)]
        (home / "patients.csv").write_text("image_path,patient_id\n" + "\n".join(lines))
    run, _ = earlier(seed=1)
    store = staged.read(_config(), source, _origin(run))[0]
    assert store.manifest["group_id"].nunique() == 48


# --- a store without files -------------------------------------------------------------------------------------------


def _store(outcomes, groups, split, thumbnails=None):
    """A store of images that show nothing: their outcomes, groups and splits are what is looked at."""
    ids = np.array([OUTCOMES.index(name) for name in outcomes])
    count = len(ids)
    manifest = pd.DataFrame(np.eye(7, dtype=int)[ids], columns=OUTCOMES).assign(
        image_path=[f"{row}.png" for row in range(count)],
        patient_id=np.nan,
        study_id=np.nan,
        group_id=[str(group) for group in groups],
        split=split,
        task=np.where(ids > 3, "brain_tumor", "alzheimer"),
    )
    if thumbnails is None:
        thumbnails = np.random.default_rng(0).integers(0, 256, (count, 64, 64), dtype=np.uint8)
    return pipelines.Store(thumbnails[:, :8, :8], thumbnails, manifest, None, pd.DataFrame(), None)


@pytest.fixture
def store():
    """Of each outcome nine groups of two images, three groups in each split; rows in no order of these."""
    order = np.random.default_rng(1).permutation(126)
    group = order // 2
    outcomes = [OUTCOMES[number % 7] for number in group]
    split = np.array(["train", "valid", "test"])[group // 7 % 3]
    made = _store(outcomes, group, split)
    # Healthy people are of either set.
    made.manifest.loc[(made.manifest[NONE] == 1) & (group % 2 == 1), "task"] = "brain_tumor"
    return made


def _trained(store, told):
    """What training leaves, for stage -> probabilities of every image."""
    return {
        task: staged.Trained(
            "compact",
            task,
            None,
            predictions.tabulate(
                (store if task == FLAT else staged.ask(store, task)).manifest,
                values,
                staged.classes_of(task),
                variant="compact",
            ),
        )
        for task, values in told.items()
    }


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


def test_tabulate_by_hand():
    #  the valid images: none at .7, ill at .8, .6 and .3; at a sensitivity of 2/3 the threshold is (.6 + .3) / 2
    store = _store([NONE, *SEVERITIES, *TYPES], range(7), ["valid"] * 4 + ["train", "test", "test"])
    disease = np.array([0.7, 0.8, 0.6, 0.3, 0.9, 0.45, 0.44])
    alzheimer = np.array([0.9, 0.9, 0.9, 0.9, 0.9, 0.2, 0.9])
    told = {
        "disease": np.stack([1 - disease, disease], axis=1),
        "kind": np.stack([alzheimer, 1 - alzheimer], axis=1),
        "severity": np.tile([0.5, 0.3, 0.2], (7, 1)),
        "type": np.tile([0.1, 0.6, 0.3], (7, 1)),
        FLAT: np.tile([0.3, 0.1, 0.05, 0.05, 0.1, 0.15, 0.25], (7, 1)),
    }
    tables = staged.tabulate(_config(sensitivity=2 / 3), store, _trained(store, told))
    assert list(tables) == [CASCADE, FLAT]
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
    assert set(table["variant"]) == {CASCADE} and set(flat["variant"]) == {FLAT}
    for each in tables.values():
        assert each["y_none"].tolist() == [1, 0, 0, 0, 0, 0, 0] and each["split"].tolist()[-2:] == ["test", "test"]


def test_tabulate_threshold_is_of_the_validation_images_alone(store, rng):
    told = _random(rng, 126)
    config = _config(sensitivity=0.8)
    threshold = staged.tabulate(config, store, _trained(store, told))[CASCADE]["threshold"]
    assert threshold.nunique() == 1
    valid, ill = (store.manifest["split"] == "valid").to_numpy(), store.manifest[NONE].to_numpy() == 0
    found = told["disease"][:, 1] >= threshold[0]
    assert found[valid & ill].sum() == 29  # of 36
    # Whatever is said of, and true of, the other images.
    other = told | {"disease": np.where(valid[:, None], told["disease"], rng.dirichlet(np.ones(2), 126))}
    shuffled = store.manifest.copy()
    shuffled.loc[~valid, list(OUTCOMES)] = shuffled.loc[~valid, list(OUTCOMES)].to_numpy()[::-1]
    elsewhere = store._replace(manifest=shuffled)
    again = staged.tabulate(config, elsewhere, _trained(elsewhere, other))[CASCADE]["threshold"]
    assert again.tolist() == threshold.tolist()
    higher = told | {"disease": np.where(valid[:, None], told["disease"][:, ::-1], told["disease"])}
    assert staged.tabulate(config, store, _trained(store, higher))[CASCADE]["threshold"][0] != threshold[0]
    stricter = staged.tabulate(_config(sensitivity=1), store, _trained(store, told))[CASCADE]["threshold"][0]
    assert stricter < threshold[0]


def test_tabulate_outcome_is_that_of_the_cascade_and_stages_come_back(store, rng):
    told = _random(rng, 126)
    tables = staged.tabulate(_config(), store, _trained(store, told))
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
    assert tables[CASCADE].columns.is_unique and list(tables[CASCADE]) == list(tables[FLAT])


def test_tabulate_without_a_diseased_validation_image_is_refused(rng):
    store = _store([NONE, TYPES[0]], "ab", ["valid", "train"])
    with pytest.raises(ValueError, match="no row is positive"):
        staged.tabulate(_config(), store, _trained(store, _random(rng, 2)))


# --- people ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few():
    """Seven slices of three groups, the second of which has slices of two outcomes; rows in no order."""
    thumbnails = np.zeros((7, 64, 64), np.uint8)
    thumbnails[:] = np.array([10, 100, 21, 30, 7, 61, 200])[:, None, None]
    thumbnails[0, 0, 0] = 255
    outcomes = [TYPES[0], NONE, TYPES[0], SEVERITIES[1], NONE, TYPES[0], SEVERITIES[1]]
    return _store(outcomes, ["a", "b", "a", "c", "b", "b", "c"], ["test"] * 7, thumbnails)


def test_people_by_hand(few, rng):
    told = _random(rng, 7)
    tables = staged.tabulate(_config(), few._replace(manifest=few.manifest.assign(split="valid")), _trained(few, told))
    found = staged.people(few, tables)
    rows_of = [[0, 2], [1, 4], [3, 6], [5]]
    assert found.manifest["group_id"].tolist() == ["a", "b", "c", "b"]
    assert found.manifest["slices"].tolist() == [2, 2, 2, 1]
    truth = class_ids(found.manifest, OUTCOMES)
    assert [OUTCOMES[number] for number in truth] == [TYPES[0], NONE, SEVERITIES[1], TYPES[0]]
    # 10 and 21, of which the half goes to the even; 100 and 7; 30 and 200; 61
    assert found.thumbnails.dtype == np.uint8 and found.thumbnails[:, 5, 5].tolist() == [16, 54, 115, 61]
    assert found.thumbnails[0, 0, 0] == 138
    of_cascade, of_flat = found.tables[CASCADE], found.tables[FLAT]
    for person, rows in enumerate(rows_of):
        for stage in STAGES:
            mean = told[stage][rows].mean(axis=0)
            np.testing.assert_allclose(of_cascade.loc[person, cascade.columns(stage)].tolist(), mean, rtol=1e-13)
        # Of the flat network the outcomes are averaged, not its stages.
        mean = told[FLAT][rows].mean(axis=0)
        np.testing.assert_allclose(of_flat.loc[person, [f"p_{name}" for name in OUTCOMES]].tolist(), mean, rtol=1e-13)
        assert of_flat.loc[person, "outcome"] == OUTCOMES[mean.argmax()]
        conditional = mean[1:4] / mean[1:4].sum()
        np.testing.assert_allclose(of_flat.loc[person, cascade.columns("severity")].tolist(), conditional, rtol=1e-12)
    stages = staged.stages_of(of_cascade)
    np.testing.assert_allclose(of_cascade[[f"p_{name}" for name in OUTCOMES]], cascade.joint(stages), rtol=1e-13)
    assert (of_cascade["threshold"] == tables[CASCADE]["threshold"].iloc[0]).all()
    ends = cascade.answers(stages, of_cascade["threshold"].to_numpy())
    assert of_cascade["outcome"].tolist() == np.array(OUTCOMES)[ends].tolist()
    assert of_cascade["y_none"].tolist() == [0, 1, 0, 0]


def test_people_of_one_slice_each_are_the_slices(store, rng):
    alone = store._replace(manifest=store.manifest.assign(group_id=[f"g{row}" for row in range(126)]))
    tables = staged.tabulate(_config(), alone, _trained(alone, _random(rng, 126)))
    found = staged.people(alone, tables)
    np.testing.assert_array_equal(found.thumbnails, alone.thumbnails)
    assert (found.manifest["slices"] == 1).all()
    for variant, table in tables.items():
        pd.testing.assert_frame_equal(found.tables[variant], table, rtol=1e-12, check_dtype=False)


def test_people_do_not_depend_on_the_order_of_slices(store, rng):
    told = _random(rng, 126)
    tables = staged.tabulate(_config(), store, _trained(store, told))
    found = staged.people(store, tables)
    assert len(found.manifest) == 63 and (found.manifest["slices"] == 2).all()
    order = rng.permutation(126)
    mixed = store._replace(
        manifest=store.manifest.iloc[order].reset_index(drop=True), thumbnails=store.thumbnails[order]
    )
    again = staged.people(mixed, {name: table.iloc[order].reset_index(drop=True) for name, table in tables.items()})
    place = pd.Index(again.manifest["group_id"]).get_indexer(found.manifest["group_id"])
    np.testing.assert_array_equal(again.thumbnails[place], found.thumbnails)
    for variant in tables:
        one, other = found.tables[variant], again.tables[variant].iloc[place]
        assert one["outcome"].tolist() == other["outcome"].tolist()
        values = [name for name in one if name.startswith("p_")]
        np.testing.assert_allclose(one[values], other[values], rtol=1e-12)


# --- scores ----------------------------------------------------------------------------------------------------------


def _measures(count, **columns):
    """Measures that tell nothing, but for those given."""
    names = [name for names in staged.MEASURES.values() for name in names]
    return pd.DataFrame(dict.fromkeys(names, 1.0) | columns, index=range(count))


def _value(rows):
    return {(row["task"], row["variant"], row["metric"], row["label"]): row for row in rows}


def test_evaluate_perfect_stages_are_always_right_beside_baselines_that_are_not(store):
    tables = staged.tabulate(_config(), store, _trained(store, _perfect(store)))
    rows = _value(staged.evaluate(_config(), [store], [tables], _measures(126)))
    for task, count in ((SLICES, 42), (PEOPLE, 21)):
        for variant in (CASCADE, JOINT, FLAT):
            for metric in ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc"):
                assert rows[task, variant, metric, "all"]["value"] == 1
            accuracy = rows[task, variant, "accuracy", "all"]
            assert (accuracy["n"], accuracy["n_groups"], accuracy["ci95"]) == (count, 21, [1, 1])
            assert accuracy["baseline"]["value"] < 0.5
            assert ("reference" in accuracy) == (variant != FLAT)
            if variant != FLAT:
                assert accuracy["reference"]["variant"] == FLAT and accuracy["reference"]["difference"] == 0
        assert rows[task, metrics.MAJORITY, "accuracy", "all"]["value"] == pytest.approx(1 / 7)
        assert (task, metrics.NEAREST_NEIGHBOUR, "accuracy", "all") in rows
    assert (SLICES, metrics.MEASURES, "accuracy", "all") in rows
    assert (PEOPLE, metrics.MEASURES, "accuracy", "all") not in rows
    assert {task for task, *_ in rows} == {SLICES, PEOPLE}


def test_evaluate_scores_the_paths_outcome_and_the_likeliest_apart_over_all_folds(store, rng):
    turned = store.manifest["split"].map({"train": "test", "valid": "train", "test": "valid"})
    folds = [store, store._replace(manifest=store.manifest.assign(split=turned))]
    told = [_random(rng, 126) for _ in folds]
    tables = [staged.tabulate(_config(), fold, _trained(fold, each)) for fold, each in zip(folds, told)]
    rows = _value(staged.evaluate(_config(), folds, tables, _measures(126)))
    truth = np.array(OUTCOMES)[class_ids(store.manifest, OUTCOMES)]
    right = {CASCADE: [], JOINT: [], FLAT: []}
    for fold, of_fold in zip(folds, tables):
        tested = pipelines.rows(fold, "test")
        joint = of_fold[CASCADE][[f"p_{name}" for name in OUTCOMES]].to_numpy()
        answers = {
            CASCADE: of_fold[CASCADE]["outcome"].to_numpy(),
            JOINT: np.array(OUTCOMES)[joint.argmax(axis=1)],
            FLAT: of_fold[FLAT]["outcome"].to_numpy(),
        }
        for variant, each in answers.items():
            right[variant] += (each == truth)[tested].tolist()
    for variant, hits in right.items():
        accuracy = rows[SLICES, variant, "accuracy", "all"]
        assert (accuracy["value"], accuracy["n"]) == (pytest.approx(np.mean(hits), abs=1e-12), 84)
    assert np.mean(right[CASCADE]) != np.mean(right[JOINT])
    # The probabilities behind both are the same.
    areas = [rows[SLICES, variant, "macro_auroc", "all"]["value"] for variant in (CASCADE, JOINT)]
    assert areas[0] == areas[1]
    gathered = [staged.people(fold, of_fold) for fold, of_fold in zip(folds, tables)]
    hits = [
        (each.tables[CASCADE]["outcome"] == np.array(OUTCOMES)[class_ids(each.manifest, OUTCOMES)])[
            each.manifest["split"] == "test"
        ]
        for each in gathered
    ]
    accuracy = rows[PEOPLE, CASCADE, "accuracy", "all"]
    assert (accuracy["value"], accuracy["n"]) == (pytest.approx(np.concatenate(hits).mean(), abs=1e-12), 42)


def test_evaluate_without_a_rare_outcome_follows_paths_that_do_not_lead_to_it(store, rng):
    # Of the last severity two groups are left, in train and test: six outcomes are scored apart.
    rare = store.manifest[SEVERITIES[2]] == 1
    groups = store.manifest.loc[rare].drop_duplicates("group_id").groupby("split")["group_id"].first()
    kept = ~rare | store.manifest["group_id"].isin(groups[["train", "test"]])
    manifest = store.manifest[kept].reset_index(drop=True)
    store = store._replace(manifest=manifest, thumbnails=store.thumbnails[kept], images=store.images[kept])
    told = _random(rng, len(manifest))
    tables = staged.tabulate(_config(), store, _trained(store, told))
    rows = _value(staged.evaluate(_config(), [store], [tables], _measures(len(manifest))))
    tested = np.flatnonzero((manifest["split"] == "test") & (manifest[SEVERITIES[2]] == 0))
    truth = class_ids(manifest, OUTCOMES)[tested]
    among = [0, 1, 2, 4, 5, 6]
    stages = {stage: told[stage][tested] for stage in STAGES}
    ends = cascade.answers(stages, tables[CASCADE]["threshold"].to_numpy()[tested], among=among)
    apart = rows[SLICES, CASCADE, "accuracy", "6 classes: all"]
    assert (apart["value"], apart["n"]) == (pytest.approx((ends == truth).mean(), abs=1e-12), 36)
    likeliest = np.array(among)[cascade.joint(stages)[:, among].argmax(axis=1)]
    apart = rows[SLICES, JOINT, "accuracy", "6 classes: all"]
    assert apart["value"] == pytest.approx((likeliest == truth).mean(), abs=1e-12)
    assert rows[SLICES, CASCADE, "accuracy", "all"]["n"] == 38


def test_evaluate_stages_score_each_on_its_own_images_and_disease_by_the_threshold(store, rng):
    told = _random(rng, 126)
    config = _config(sensitivity=0.9)
    tables = staged.tabulate(config, store, _trained(store, told))
    threshold = tables[CASCADE]["threshold"][0]
    assert abs(threshold - 0.5) > 0.05
    rows = _value(staged.evaluate_stages(config, [store], [tables]))
    # What is asked -> its stage, of which set, and how many test images of it there are.
    asked = {stage: (stage, list(CLASS_NAMES), {"disease": 42, "kind": 36}.get(stage, 18)) for stage in STAGES}
    asked |= {"disease, alzheimer": ("disease", ["alzheimer"], 22)}
    asked |= {"disease, brain_tumor": ("disease", ["brain_tumor"], 20)}
    assert {task for task, *_ in rows} == set(asked)
    flat = cascade.from_joint(told[FLAT])
    for task, (stage, sets, count) in asked.items():
        names = list(STAGES[stage])
        manifest = staged.ask(store, stage).manifest
        here = ((manifest["split"] == "test") & manifest["task"].isin(sets)).to_numpy()
        truth = class_ids(manifest, names)
        for variant, each in ((CASCADE, told), (FLAT, flat)):
            answer = each[stage].argmax(axis=1)
            if (stage, variant) == ("disease", CASCADE):
                answer = (each[stage][:, 1] >= threshold).astype(int)
            accuracy = rows[task, variant, "accuracy", "all"]
            assert accuracy["value"] == pytest.approx((answer == truth)[here].mean(), abs=1e-12), (task, variant)
            assert accuracy["n"] == here.sum() == count
            second = names[1]
            sensitivity = (answer == 1)[here & (truth == 1)].mean()
            assert rows[task, variant, "sensitivity", second]["value"] == pytest.approx(sensitivity, abs=1e-12)
            area = metrics.auroc(truth[here] == 1, each[stage][here, 1], np.ones((1, count)))[0]
            assert rows[task, variant, "auroc", second]["value"] == pytest.approx(area, abs=1e-12)
        assert rows[task, CASCADE, "accuracy", "all"]["reference"]["variant"] == FLAT
        # Of the training images of the same stage and set.
        learnt = truth[((manifest["split"] == "train") & manifest["task"].isin(sets)).to_numpy()]
        majority = (truth[here] == np.bincount(learnt).argmax()).mean()
        assert rows[task, metrics.MAJORITY, "accuracy", "all"]["value"] == pytest.approx(majority)
        assert (task, metrics.NEAREST_NEIGHBOUR, "accuracy", "all") in rows


def test_evaluate_stages_nearest_neighbour_learns_from_the_images_of_the_stage_alone(store):
    # Every test image has its copy among the training images of no stage but disease: healthy ones.
    thumbnails = np.array(store.thumbnails)
    healthy = np.flatnonzero((store.manifest["split"] == "train") & (store.manifest[NONE] == 1))
    tested = pipelines.rows(store, "test")
    thumbnails[tested] = thumbnails[np.resize(healthy, len(tested))]
    tables = staged.tabulate(_config(), store, _trained(store, _perfect(store)))
    rows = _value(staged.evaluate_stages(_config(), [store._replace(thumbnails=thumbnails)], [tables]))
    neighbour = {stage: rows[stage, metrics.NEAREST_NEIGHBOUR, "accuracy", "all"]["value"] for stage in STAGES}
    assert neighbour["disease"] == pytest.approx(6 / 42)
    # Were the healthy images counted to the first class, all would be answered by it.
    first = list(STAGES["severity"])[0]
    assert rows["severity", metrics.NEAREST_NEIGHBOUR, "sensitivity", first]["value"] < 1
    assert all(rows[stage, CASCADE, "accuracy", "all"]["value"] == 1 for stage in STAGES)


@pytest.mark.parametrize("rare", SEVERITIES)
def test_evaluate_stages_score_a_class_of_few_groups_apart(store, rng, rare):
    here = store.manifest[rare] == 1
    groups = store.manifest.loc[here].drop_duplicates("group_id").groupby("split")["group_id"].first()
    kept = ~here | store.manifest["group_id"].isin(groups[["train", "test"]])
    manifest = store.manifest[kept].reset_index(drop=True)
    store = store._replace(manifest=manifest, thumbnails=store.thumbnails[kept], images=store.images[kept])
    tables = staged.tabulate(_config(), store, _trained(store, _random(rng, len(manifest))))
    rows = _value(staged.evaluate_stages(_config(), [store], [tables]))
    assert rows["severity", CASCADE, "accuracy", "all"]["n"] == 14
    assert ("severity", CASCADE, "accuracy", "2 classes: all") in rows
    assert rows["severity", CASCADE, "accuracy", "2 classes: all"]["n"] == 12


# --- measures --------------------------------------------------------------------------------------------------------


def test_measure_gives_what_is_known_without_looking_beside_the_store(source, earlier):
    run, _ = earlier()
    store = staged.read(_config(), source, _origin(run))[0]
    found = staged.measure(source, store)
    assert list(found) == [name for names in staged.MEASURES.values() for name in names]
    assert len(found) == 96 and set(found["height"]) == {80} and set(found["width"]) == {70}
    np.testing.assert_allclose(found["mean intensity"], store.thumbnails.mean(axis=(1, 2)), rtol=1e-12)


def test_guess_learns_from_the_training_images_alone(store):
    ids = class_ids(store.manifest, OUTCOMES)
    # Enough images for a leaf of twenty.
    many = store.manifest.loc[np.tile(np.arange(126), 12)].reset_index(drop=True)
    store, ids = store._replace(manifest=many, thumbnails=np.tile(store.thumbnails, (12, 1, 1))), np.tile(ids, 12)
    measures = _measures(len(ids), height=ids * 10.0)
    told = staged.guess(store, measures, seed=0)
    names = [f"p_{name}" for name in OUTCOMES]
    assert (told[names].to_numpy().argmax(axis=1) == ids).all() and set(told["variant"]) == {metrics.MEASURES}
    np.testing.assert_allclose(told[names].sum(axis=1), 1, atol=1e-12)
    other = many.copy()
    unseen = (many["split"] != "train").to_numpy()
    other.loc[unseen, list(OUTCOMES)] = np.eye(7, dtype=int)[(ids[unseen] + 1) % 7]
    again = staged.guess(store._replace(manifest=other), measures, seed=0)
    np.testing.assert_array_equal(again[names], told[names])
    moved = measures.assign(height=np.where(unseen, 10.0 * ((ids + 3) % 7), measures["height"]))
    seen = staged.guess(store, moved, seed=0)
    np.testing.assert_array_equal(seen.loc[~unseen, names], told.loc[~unseen, names])
    assert (seen[names].to_numpy().argmax(axis=1)[unseen] == ((ids + 3) % 7)[unseen]).all()
    tables = staged.tabulate(_config(), store, _trained(store, _perfect(store)))
    rows = _value(staged.evaluate(_config(bootstraps=2), [store], [tables], measures))
    assert rows[SLICES, metrics.MEASURES, "accuracy", "all"]["value"] == 1
    assert rows[SLICES, CASCADE, "accuracy", "all"]["baseline"]["variant"] == metrics.MEASURES


def test_probe_finds_the_planted_shortcut_and_none_in_noise(store, rng):
    many = store.manifest.loc[np.tile(np.arange(126), 4)].reset_index(drop=True)
    many["group_id"] = [f"{group}-{row // 126}" for row, group in enumerate(many["group_id"])]
    store, count = store._replace(manifest=many), len(many)
    tumour, ill = (many["task"] == "brain_tumor").to_numpy(), many[NONE].to_numpy() == 0
    measures = _measures(
        count,
        height=np.where(tumour, 200.0, 100.0),
        width=rng.random(count),
        **{"border intensity": rng.random(count), "mean intensity": ill * 50.0},
    )
    probed = staged.probe(_config(bootstraps=50), store, measures)
    table = probed.set_index(["target", "measures"])
    assert set(table.index) == {
        (target, name) for target in ("tumour set", "disease") for name in (*staged.MEASURES, staged.ALL_MEASURES)
    }
    assert table.loc[("tumour set", "size"), ["auroc", "low", "strongest"]].tolist() == [1, 1, "height"]
    assert table.loc[("disease", "mean intensity"), "auroc"] == 1
    for target, every in (("tumour set", tumour), ("disease", ill)):
        assert table.loc[(target, staged.ALL_MEASURES), "auroc"] == 1
        # Noise: three standard errors of an AUROC of 252 groups, of which a fourth are healthy, are 0.11.
        assert table.loc[(target, "border"), "auroc"] == pytest.approx(0.5, abs=0.11)
        assert table.loc[(target, "border"), "low"] + 0.02 < table.loc[(target, "border"), "high"]
        assert set(table.loc[target, "images"]) == {count} and set(table.loc[target, "positives"]) == {every.sum()}
    assert probed["target"].tolist() == sorted(probed["target"])  # rows of a target stand together

    rows = staged.probe_rows(probed, store)
    value = {(row["label"], row["variant"]): row for row in rows}
    row = value["tumour set", "size"]
    assert (row["task"], row["metric"], row["value"], row["ci95"]) == ("shortcuts", "auroc", 1, [1, 1])
    assert (row["n"], row["n_groups"], row["baseline"], row["reason"]) == (count, 252, None, "")
    assert len(rows) == 8 and value["disease", "border"]["value"] < 0.62


def test_probe_rows_of_too_few_groups_say_why(store):
    few = store._replace(manifest=store.manifest.assign(group_id=np.where(store.manifest[NONE] == 1, "a", "b")))
    rows = staged.probe_rows(staged.probe(_config(), few, _measures(126)), few)
    assert {row["value"] for row in rows} == {row["ci95"] for row in rows} == {None}
    assert all("groups" in row["reason"] for row in rows) and {row["n_groups"] for row in rows} == {2}


def test_rows_of_all_scores_may_be_written(store, rng, tmp_path):
    run, _ = _leave_run()
    tables = staged.tabulate(_config(), store, _trained(store, _random(rng, 126)))
    rows = staged.evaluate(_config(), [store], [tables], _measures(126))
    rows += staged.evaluate_stages(_config(), [store], [tables])
    rows += staged.probe_rows(staged.probe(_config(), store, _measures(126)), store)
    headline = predictions.headline(rows, task=SLICES, variant=CASCADE)
    assert len(headline) == 2
    runs.finish(run, headline=headline, rows=rows)
    assert len(runs.read_json(run / "metrics.json")["rows"]) == len(rows)


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
    assert all(f"no training image of {TYPES[0]}" in line for line in said)


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
    tables = [staged.tabulate(config, store, {task: steps[0] for task, steps in trained.items()})]
    rows = staged.evaluate(config, stores, tables, staged.measure(source, store))
    rows += staged.evaluate_stages(config, stores, tables)
    rows += staged.probe_rows(staged.probe(config, store, staged.measure(source, store)), store)
    reader = staged.assemble(run, trained, origin, tables[0][CASCADE])
    assert reader.about == {"run": run.name, "data_source": "real"}
    assert reader.threshold == tables[0][CASCADE]["threshold"][0]
    assert dict(reader.read_options) == {
        name: origin.parameters[name] for name in ("image_size", "fit", "interpolation", "equalize")
    }
    runs.finish(run, headline=predictions.headline(rows, task=SLICES, variant=CASCADE), rows=rows)

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
    gathered = staged.people(store, tables[0])
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
    monkeypatch.setattr(staged.keras.saving, "load_model", lambda path: path.relative_to(tmp_path).as_posix())

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
    assert about == {"run": tmp_path.name, "data_source": "synthetic"}


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("network", "LeNet", "one of compact, five_block"),
        ("network", "", "one of compact, five_block"),
        ("folds", -1, "at least 1, or 0 for all"),
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
