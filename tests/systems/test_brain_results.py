"""What notebook 08_brain_cascade says of its cascade: people, scores by slice and person, where paths are lost."""

import numpy as np
import pandas as pd
import pytest

from kerasmed import metrics, notebooks, pipelines, predictions, runs
from kerasmed.datasets.brain import CLASS_NAMES
from kerasmed.manifest import class_ids
from kerasmed.parameters import names_of
from kerasmed.systems.brain import cascade, results, staged
from kerasmed.systems.brain.cascade import NONE, OUTCOMES, SEVERITIES, STAGES, TYPES
from kerasmed.systems.brain.results import JOINT, PEOPLE, SLICES
from kerasmed.systems.brain.staged import CASCADE, FLAT

NOTEBOOK = "08_brain_cascade"
NAMES = [f"p_{name}" for name in OUTCOMES]


def _parameters(**changes):
    return notebooks.resolve(notebooks.describe(NOTEBOOK), profile="smoke", given={"bootstraps": 5} | changes)


def _config(**changes):
    parameters = _parameters(**changes)
    return staged.Config(**{name: parameters[name] for name in names_of(staged.Config)})


def _random(rng, count):
    told = {stage: rng.dirichlet(np.ones(len(classes)), count) for stage, classes in STAGES.items()}
    return {**told, FLAT: rng.dirichlet(np.ones(7), count)}


def _perfect(store):
    ids = class_ids(store.manifest, OUTCOMES)
    return {**cascade.from_joint(np.eye(7)[ids]), FLAT: np.eye(7)[ids]}


def _truth(manifest):
    return np.array(OUTCOMES)[class_ids(manifest, OUTCOMES)]


def _value(rows):
    return {(row["task"], row["variant"], row["metric"], row["label"]): row for row in rows}


def _both(config, folds, tables):
    """Rows of slices and of people, by task, variant, metric and label."""
    gathered = [results.people(fold, of_fold) for fold, of_fold in zip(folds, tables)]
    rows = results.evaluate(config, folds, tables, task=SLICES)
    return _value(rows + results.evaluate(config, gathered, [each.tables for each in gathered], task=PEOPLE))


def _stages(config, folds, tables):
    gathered = [results.people(fold, of_fold) for fold, of_fold in zip(folds, tables)]
    return _value(results.evaluate_stages(config, folds, tables, gathered))


# --- people ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(store_of):
    """Nine slices of four groups, rows in no order: one has healthy slices too, one has two diseases."""
    thumbnails = np.zeros((9, 64, 64), np.uint8)
    thumbnails[:] = np.array([10, 100, 21, 30, 7, 61, 200, 0, 255])[:, None, None]
    thumbnails[0, 0, 0] = 255
    outcomes = [TYPES[0], NONE, TYPES[0], SEVERITIES[1], NONE, TYPES[0], SEVERITIES[1], TYPES[1], SEVERITIES[0]]
    split = ["test", "train", "test", "valid", "train", "train", "valid", "train", "train"]
    return store_of(outcomes, list("abacbbcdd"), split, thumbnails)


def test_people_by_hand(few, tables_of, rng):
    told = _random(rng, 9)
    tables = tables_of(_config(), few, told)
    guessed = rng.dirichlet(np.ones(7), 9)  # so that slices of a person are told apart
    tables[metrics.MEASURES] = staged.tabulate_stages(few.manifest, metrics.MEASURES, cascade.from_joint(guessed))
    found = results.people(few, tables)
    rows_of = [[0, 2], [1, 4, 5], [3, 6], [7, 8]]
    assert found.manifest["group_id"].tolist() == ["a", "b", "c", "d"]
    assert found.manifest["slices"].tolist() == [2, 3, 2, 2]
    assert found.manifest["split"].tolist() == ["test", "train", "valid", "left out"]
    # One slice with a disease makes the person ill; who has two is neither the one nor the other.
    has = [[name for name in OUTCOMES if row[name] == 1] for row in found.manifest.to_dict("records")]
    assert has == [[TYPES[0]], [TYPES[0]], [SEVERITIES[1]], [SEVERITIES[0], TYPES[1]]]
    # 10 and 21, of which the half goes to the even; 100, 7 and 61; 30 and 200; 0 and 255
    assert found.thumbnails.dtype == np.uint8 and found.thumbnails[:, 5, 5].tolist() == [16, 56, 115, 128]
    assert found.thumbnails[0, 0, 0] == 138
    of_cascade = found.tables[CASCADE]
    for person, rows in enumerate(rows_of):
        for stage in STAGES:
            mean = told[stage][rows].mean(axis=0)
            np.testing.assert_allclose(of_cascade.loc[person, cascade.columns(stage)].tolist(), mean, rtol=1e-13)
        # Of one network, or of measures, the outcomes are averaged, not the stages.
        for variant, values in ((FLAT, told[FLAT]), (metrics.MEASURES, guessed)):
            row, mean = found.tables[variant].loc[person], values[rows].mean(axis=0)
            np.testing.assert_allclose(row[NAMES].tolist(), mean, rtol=1e-13)
            assert row["outcome"] == OUTCOMES[mean.argmax()]
            conditional = mean[1:4] / mean[1:4].sum()
            np.testing.assert_allclose(row[cascade.columns("severity")].tolist(), conditional, rtol=1e-12)
    stages = staged.stages_of(of_cascade)
    np.testing.assert_allclose(of_cascade[NAMES], cascade.joint(stages), rtol=1e-13)
    assert (of_cascade["threshold"] == tables[CASCADE]["threshold"].iloc[0]).all()
    ends = cascade.answers(stages, of_cascade["threshold"].to_numpy())
    assert of_cascade["outcome"].tolist() == np.array(OUTCOMES)[ends].tolist()
    for variant, table in found.tables.items():
        assert table["y_none"].tolist() == [0, 0, 0, 0] and set(table["variant"]) == {variant}
        assert table["split"].tolist() == found.manifest["split"].tolist()


def test_people_of_healthy_slices_alone_are_healthy(store_of, tables_of, rng):
    store = store_of([NONE, TYPES[2], NONE, SEVERITIES[0]], "abac", ["train", "train", "train", "valid"])
    found = results.people(store, tables_of(_config(), store, _random(rng, 4)))
    assert _truth(found.manifest).tolist() == [NONE, TYPES[2], SEVERITIES[0]]
    assert (found.manifest[list(OUTCOMES)].sum(axis=1) == 1).all() and not (found.manifest["split"] == "left out").any()


def test_people_of_one_slice_each_are_the_slices(store, tables_of, rng):
    alone = store._replace(manifest=store.manifest.assign(group_id=[f"g{row}" for row in range(126)]))
    tables = tables_of(_config(), alone, _random(rng, 126))
    found = results.people(alone, tables)
    np.testing.assert_array_equal(found.thumbnails, alone.thumbnails)
    assert (found.manifest["slices"] == 1).all()
    for variant, table in tables.items():
        pd.testing.assert_frame_equal(found.tables[variant], table, rtol=1e-12, check_dtype=False)


def test_people_do_not_depend_on_the_order_of_slices(store, tables_of, rng):
    told = _random(rng, 126)
    # Slices of a group of several outcomes: healthy ones beside others, and two diseases.
    joined = store.manifest["group_id"].where(store.manifest["group_id"].astype(int) > 5, "0")
    store = store._replace(manifest=store.manifest.assign(group_id=joined))
    tables = tables_of(_config(), store, told)
    found = results.people(store, tables)
    assert len(found.manifest) == 58 and found.manifest["slices"].value_counts().to_dict() == {2: 57, 12: 1}
    order = rng.permutation(126)
    mixed = store._replace(
        manifest=store.manifest.iloc[order].reset_index(drop=True), thumbnails=store.thumbnails[order]
    )
    again = results.people(mixed, {name: table.iloc[order].reset_index(drop=True) for name, table in tables.items()})
    place = pd.Index(again.manifest["group_id"]).get_indexer(found.manifest["group_id"])
    np.testing.assert_array_equal(again.thumbnails[place], found.thumbnails)
    columns = [*OUTCOMES, "slices", "split"]
    pd.testing.assert_frame_equal(again.manifest[columns].iloc[place].reset_index(drop=True), found.manifest[columns])
    for variant in tables:
        one, other = found.tables[variant], again.tables[variant].iloc[place]
        assert one["outcome"].tolist() == other["outcome"].tolist()
        np.testing.assert_allclose(one[NAMES], other[NAMES], rtol=1e-12)


# --- end to end ------------------------------------------------------------------------------------------------------


def test_evaluate_perfect_stages_are_always_right_beside_baselines_that_are_not(store, tables_of):
    tables = tables_of(_config(), store, _perfect(store))
    rows = _both(_config(), [store], [tables])
    assert {task for task, *_ in rows} == {SLICES, PEOPLE}
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
        for variant in (metrics.MAJORITY, metrics.MEASURES):  # measures that tell nothing
            assert rows[task, variant, "accuracy", "all"]["value"] == pytest.approx(1 / 7)
            assert rows[task, variant, "accuracy", "all"]["baseline"] is None
        assert (task, metrics.NEAREST_NEIGHBOUR, "accuracy", "all") in rows
    assert {variant for _, variant, *_ in rows} == {
        *(CASCADE, JOINT, FLAT, metrics.MEASURES, metrics.MAJORITY, metrics.NEAREST_NEIGHBOUR)
    }


def test_evaluate_measures_that_tell_all_are_the_strongest_baseline(store, tables_of, measures_of):
    # Enough images for a leaf of twenty: each slice twelve times.
    ids = np.tile(class_ids(store.manifest, OUTCOMES), 12)
    many = store.manifest.loc[np.tile(np.arange(126), 12)].reset_index(drop=True)
    store = store._replace(manifest=many, thumbnails=np.tile(store.thumbnails, (12, 1, 1)))
    tables = tables_of(_config(), store, _perfect(store), measures_of(len(ids), height=ids * 10.0))
    rows = _both(_config(bootstraps=2), [store], [tables])
    for task in (SLICES, PEOPLE):
        assert rows[task, metrics.MEASURES, "accuracy", "all"]["value"] == 1
        assert rows[task, CASCADE, "accuracy", "all"]["baseline"]["variant"] == metrics.MEASURES


def test_evaluate_scores_the_paths_outcome_and_the_likeliest_apart_over_all_folds(store, tables_of, rng):
    turned = store.manifest["split"].map({"train": "test", "valid": "train", "test": "valid"})
    folds = [store, store._replace(manifest=store.manifest.assign(split=turned))]
    tables = [tables_of(_config(), fold, _random(rng, 126)) for fold in folds]
    gathered = [results.people(fold, of_fold) for fold, of_fold in zip(folds, tables)]
    rows = _both(_config(), folds, tables)
    for task, units, each, count in (
        (SLICES, folds, tables, 84),
        (PEOPLE, gathered, [one.tables for one in gathered], 42),
    ):
        right = {CASCADE: [], JOINT: [], FLAT: []}
        for unit, of_fold in zip(units, each):
            answers = {
                CASCADE: of_fold[CASCADE]["outcome"].to_numpy(),
                JOINT: np.array(OUTCOMES)[of_fold[CASCADE][NAMES].to_numpy().argmax(axis=1)],
                FLAT: of_fold[FLAT]["outcome"].to_numpy(),
            }
            for variant, answer in answers.items():
                hits = answer == _truth(unit.manifest)
                right[variant] += hits[unit.manifest["split"] == "test"].tolist()
        for variant, hits in right.items():
            accuracy = rows[task, variant, "accuracy", "all"]
            assert (accuracy["value"], accuracy["n"]) == (pytest.approx(np.mean(hits), abs=1e-12), count)
        assert right[CASCADE] != right[JOINT]
        # The probabilities behind both are the same.
        areas = [rows[task, variant, "macro_auroc", "all"]["value"] for variant in (CASCADE, JOINT)]
        assert areas[0] == areas[1]


def test_evaluate_leaves_out_people_of_several_diseases_but_not_their_slices(store, tables_of):
    tested = store.manifest[store.manifest["split"] == "test"]
    one, other = (tested.loc[tested[name] == 1, "group_id"].iloc[0] for name in (TYPES[0], SEVERITIES[0]))
    store = store._replace(manifest=store.manifest.assign(group_id=store.manifest["group_id"].replace({one: other})))
    tables = tables_of(_config(), store, _perfect(store))
    rows = _both(_config(), [store], [tables])
    assert (rows[SLICES, CASCADE, "accuracy", "all"]["n"], rows[PEOPLE, CASCADE, "accuracy", "all"]["n"]) == (42, 19)
    assert rows[PEOPLE, CASCADE, "accuracy", "all"]["value"] == 1
    by_stage = _stages(_config(), [store], [tables])
    assert by_stage["disease", CASCADE, "accuracy", "all"]["n"] == 42
    assert by_stage["disease, people", CASCADE, "accuracy", "all"]["n"] == 19


def _thin_out(store, name):
    """A store in which an outcome has one group in train and one in test alone, and which rows are kept."""
    here = store.manifest[name] == 1
    groups = store.manifest.loc[here].drop_duplicates("group_id").groupby("split")["group_id"].first()
    kept = ~here | store.manifest["group_id"].isin(groups[["train", "test"]])
    manifest = store.manifest[kept].reset_index(drop=True)
    return store._replace(manifest=manifest, thumbnails=store.thumbnails[kept], images=store.images[kept])


def test_evaluate_without_a_rare_outcome_follows_paths_that_do_not_lead_to_it(store, tables_of, rng):
    # Of the last severity two groups are left, in train and test: six outcomes are scored apart.
    store = _thin_out(store, SEVERITIES[2])
    manifest = store.manifest
    told = _random(rng, len(manifest))
    tables = tables_of(_config(), store, told)
    rows = _both(_config(), [store], [tables])
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
    apart = [rows[PEOPLE, CASCADE, "accuracy", label]["n"] for label in ("all", "6 classes: all")]
    assert apart == [19, 18]


# --- stage by stage --------------------------------------------------------------------------------------------------


def test_evaluate_stages_score_each_on_its_own_images_and_disease_by_the_threshold(store, tables_of, rng):
    told = _random(rng, 126)
    config = _config(sensitivity=0.9)
    tables = tables_of(config, store, told)
    threshold = tables[CASCADE]["threshold"][0]
    assert abs(threshold - 0.5) > 0.05
    rows = _stages(config, [store], [tables])
    gathered = results.people(store, tables)
    # What is asked -> its stage, of which rows, of which set, and how many of them are tested.
    asked = {stage: (stage, store, list(CLASS_NAMES), {"disease": 42, "kind": 36}.get(stage, 18)) for stage in STAGES}
    asked |= {"disease, alzheimer": ("disease", store, ["alzheimer"], 22)}
    asked |= {"disease, brain_tumor": ("disease", store, ["brain_tumor"], 20)}
    asked |= {"disease, people": ("disease", gathered, list(CLASS_NAMES), 21)}
    assert {task for task, *_ in rows} == set(asked)
    for task, (stage, units, sets, count) in asked.items():
        names = list(STAGES[stage])
        manifest = staged.ask(units, stage).manifest
        here = ((manifest["split"] == "test") & manifest["task"].isin(sets)).to_numpy()
        truth = class_ids(manifest, names)
        for variant in (CASCADE, FLAT, metrics.MEASURES):
            table = (tables if units is store else gathered.tables)[variant]
            each = table[cascade.columns(stage)].to_numpy()
            answer = each.argmax(axis=1)
            if (stage, variant) == ("disease", CASCADE):
                answer = (each[:, 1] >= threshold).astype(int)
            accuracy = rows[task, variant, "accuracy", "all"]
            assert accuracy["value"] == pytest.approx((answer == truth)[here].mean(), abs=1e-12), (task, variant)
            assert accuracy["n"] == here.sum() == count
            second = names[1]
            sensitivity = (answer == 1)[here & (truth == 1)].mean()
            assert rows[task, variant, "sensitivity", second]["value"] == pytest.approx(sensitivity, abs=1e-12)
            area = metrics.auroc(truth[here] == 1, each[here, 1], np.ones((1, count)))[0]
            assert rows[task, variant, "auroc", second]["value"] == pytest.approx(area, abs=1e-12)
        assert rows[task, CASCADE, "accuracy", "all"]["reference"]["variant"] == FLAT
        # Of the training rows of the same stage and set.
        learnt = truth[((manifest["split"] == "train") & manifest["task"].isin(sets)).to_numpy()]
        majority = (truth[here] == np.bincount(learnt).argmax()).mean()
        assert rows[task, metrics.MAJORITY, "accuracy", "all"]["value"] == pytest.approx(majority)
        assert (task, metrics.NEAREST_NEIGHBOUR, "accuracy", "all") in rows
    # What the stages say of slices is what the networks said.
    for stage in STAGES:
        np.testing.assert_array_equal(tables[CASCADE][cascade.columns(stage)], told[stage])


def test_evaluate_stages_nearest_neighbour_learns_from_the_images_of_the_stage_alone(store, tables_of):
    # Every test image has its copy among the training images of no stage but disease: healthy ones.
    thumbnails = np.array(store.thumbnails)
    healthy = np.flatnonzero((store.manifest["split"] == "train") & (store.manifest[NONE] == 1))
    tested = pipelines.rows(store, "test")
    thumbnails[tested] = thumbnails[np.resize(healthy, len(tested))]
    tables = tables_of(_config(), store, _perfect(store))
    rows = _stages(_config(), [store._replace(thumbnails=thumbnails)], [tables])
    neighbour = {stage: rows[stage, metrics.NEAREST_NEIGHBOUR, "accuracy", "all"]["value"] for stage in STAGES}
    assert neighbour["disease"] == pytest.approx(6 / 42)
    # Were the healthy images counted to the first class, all would be answered by it.
    first = list(STAGES["severity"])[0]
    assert rows["severity", metrics.NEAREST_NEIGHBOUR, "sensitivity", first]["value"] < 1
    assert all(rows[stage, CASCADE, "accuracy", "all"]["value"] == 1 for stage in STAGES)


@pytest.mark.parametrize("rare", SEVERITIES)
def test_evaluate_stages_score_a_class_of_few_groups_apart(store, tables_of, rng, rare):
    store = _thin_out(store, rare)
    tables = tables_of(_config(), store, _random(rng, len(store.manifest)))
    rows = _stages(_config(), [store], [tables])
    assert rows["severity", CASCADE, "accuracy", "all"]["n"] == 14
    assert rows["severity", CASCADE, "accuracy", "2 classes: all"]["n"] == 12


def test_rows_of_all_scores_may_be_written(store, tables_of, measures_of, rng):
    machine = {"fingerprint": "f", "data_source": "real", "environment": {}}
    run = runs.start("brain", NOTEBOOK, _parameters(), **machine)
    tables = tables_of(_config(), store, _random(rng, 126))
    gathered = results.people(store, tables)
    rows = results.evaluate(_config(), [store], [tables], task=SLICES)
    rows += results.evaluate(_config(), [gathered], [gathered.tables], task=PEOPLE)
    rows += results.evaluate_stages(_config(), [store], [tables], [gathered])
    rows += staged.probe_rows(staged.probe(_config(), store, measures_of(126)))
    headline = predictions.headline(rows, task=SLICES, variant=CASCADE)
    assert len(headline) == 2
    runs.finish(run, headline=headline, rows=rows)
    assert len(runs.read_json(run / "metrics.json")["rows"]) == len(rows)


# --- where paths are lost --------------------------------------------------------------------------------------------


def _ended(truth, outcomes, joint=None, groups=None):
    """Rows of a cascade's table: what they are, and where their paths ended."""
    count = len(truth)
    ids = [OUTCOMES.index(name) for name in truth]
    told = np.full((count, 7), 1 / 7) if joint is None else joint
    table = pd.DataFrame(np.eye(7, dtype=int)[ids], columns=[f"y_{name}" for name in OUTCOMES])
    table[NAMES] = told
    return table.assign(outcome=outcomes, group_id=range(count) if groups is None else groups)


def test_where_lost_by_hand():
    mild, worse, _ = SEVERITIES
    glioma, _, pituitary = TYPES
    truth = [pituitary, pituitary, NONE, NONE, NONE, mild, mild, mild, mild]
    ended = [glioma, glioma, NONE, glioma, NONE, mild, NONE, glioma, worse]
    found = results.where_lost(_ended(truth, ended))
    assert list(found.index) == [NONE, mild, pituitary]  # in the order of the outcomes
    assert list(found) == ["images", "right", *STAGES]
    assert found["images"].tolist() == [3, 4, 2]
    expected = [[2 / 3, 1 / 3, 0, 0, 0], [0.25, 0.25, 0.25, 0.25, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_allclose(found[["right", *STAGES]], expected, rtol=1e-14)


def test_where_lost_is_nowhere_where_all_is_right_and_always_somewhere(rng):
    every = list(OUTCOMES)
    assert results.where_lost(_ended(every, every))[["right", *STAGES]].to_numpy().tolist() == [[1, 0, 0, 0, 0]] * 7
    truth, ended = rng.choice(OUTCOMES, (2, 300)).tolist()
    found = results.where_lost(_ended(truth, ended))
    np.testing.assert_allclose(found[["right", *STAGES]].sum(axis=1), 1, rtol=1e-12)
    right = np.average(found["right"], weights=found["images"])
    assert right == pytest.approx(np.mean(np.array(truth) == ended), abs=1e-12)
    assert not found.loc[NONE, ["kind", "severity", "type"]].any()  # the path of the healthy has one step
    assert not found.loc[list(SEVERITIES), "type"].any() and not found.loc[list(TYPES), "severity"].any()


# --- in words --------------------------------------------------------------------------------------------------------


def _row(variant, metric, baseline=None, reference=None, label="all", task=SLICES):
    def against(given):
        return given and {"variant": given[0], "difference": given[1], "difference_ci95": given[2]}

    row = {"task": task, "variant": variant, "metric": metric, "label": label, "baseline": against(baseline)}
    return row | ({"reference": against(reference)} if reference else {})


def test_verdicts_by_hand():
    nearest, flat = metrics.NEAREST_NEIGHBOUR, FLAT
    rows = [
        _row("cascade", "accuracy", (nearest, 0.25, [0.125, 0.5]), (flat, -0.5, [-0.75, -0.25])),
        _row("cascade", "balanced_accuracy", (nearest, 0.125, [-0.25, 0.5]), (flat, 0.0, [0.0, 0.25])),
        _row("flat", "accuracy", ("measures", -0.0625, [-0.5, 0.25])),
        _row("flat", "balanced_accuracy", ("measures", -0.25, None)),
        _row("cascade", "accuracy", (nearest, 0.5, [0.25, 0.75]), task=PEOPLE),
        _row("majority", "accuracy"),
    ]
    unsaid = [
        _row("cascade", "macro_f1", (nearest, 0.25, [0.125, 0.5]), (flat, 0.25, [0.125, 0.5])),
        _row("cascade", "macro_auroc", (nearest, 0.25, [0.125, 0.5])),
        _row("cascade", "accuracy", (nearest, 0.25, [0.125, 0.5]), label="6 classes: all"),
        _row("cascade", "sensitivity", (nearest, 0.25, [0.125, 0.5]), label=NONE),
    ]
    assert results.verdicts([*unsaid, *rows]) == [
        "slices: cascade against nearest neighbour: accuracy better (+0.250 [+0.125, +0.500]), "
        "balanced accuracy not told apart (+0.125 [-0.250, +0.500])",
        "slices: cascade against flat: accuracy worse (-0.500 [-0.750, -0.250]), "
        "balanced accuracy not told apart (+0.000 [+0.000, +0.250])",
        "slices: flat against measures: accuracy not told apart (-0.062 [-0.500, +0.250]), "
        "balanced accuracy not told apart (-0.250 [+nan, +nan])",
        "people: cascade against nearest neighbour: accuracy better (+0.500 [+0.250, +0.750])",
    ]
    assert results.verdicts(unsaid) == results.verdicts([]) == []


def test_verdicts_of_the_scores_of_both_tasks_name_every_variant_beside_baseline_and_flat(store, tables_of):
    tables = tables_of(_config(), store, _perfect(store))
    said = results.verdicts(list(_both(_config(), [store], [tables]).values()))
    of_perfect = [line for line in said if " against flat: " in line]
    assert [line.split(" against ")[0] for line in of_perfect] == [
        f"{task}: {variant}" for task in (SLICES, PEOPLE) for variant in (CASCADE, JOINT)
    ]
    equal = "accuracy not told apart (+0.000 [+0.000, +0.000]), balanced accuracy not told apart (+0.000 [+0.000, "
    assert all(equal in line for line in of_perfect)
    others = [line for line in said if line not in of_perfect]
    assert {line.split(" against ")[0] for line in others} == {
        f"{task}: {variant}" for task in (SLICES, PEOPLE) for variant in (CASCADE, JOINT, FLAT)
    }
    assert all("worse" not in line and "not told apart" not in line for line in others)


# --- calibration -----------------------------------------------------------------------------------------------------


def _of_disease(diseased, told, variant):
    return pd.DataFrame({"variant": variant, "y_none": 1 - np.array(diseased), "disease_disease": told})


def test_calibration_table_by_hand():
    # Of those said to be 75 % likely three of four are ill, of those said to be 25 % likely two.
    diseased = [1, 1, 1, 0, 1, 1, 0, 0]
    told = [0.75] * 4 + [0.25] * 4
    tables = [_of_disease(diseased, told, CASCADE), _of_disease(diseased, [float(ill) for ill in diseased], FLAT)]
    found = results.calibration_table(tables, {"training share": 0.625, "a coin": 0.5})
    assert list(found.index) == [CASCADE, FLAT, "training share", "a coin"]
    # Half of the rows are 0 off, half 1/4. Squares: (3/16 + 9/16) / 4 and (2 · 9/16 + 2 · 1/16) / 4, averaged.
    expected = pd.DataFrame(
        {"expected calibration error": [0.125, 0, 0, 0.125], "Brier score": [0.25, 0, 0.625 * 0.375, 0.25]},
        index=found.index,
    )
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-15)


def test_calibration_table_takes_tables_of_the_recipe(store, tables_of, rng):
    told = _random(rng, 126)
    tables = tables_of(_config(), store, told)
    tested = pipelines.rows(store, "test")
    found = results.calibration_table([tables[variant].iloc[tested] for variant in (FLAT, CASCADE)], {})
    assert list(found.index) == [FLAT, CASCADE]
    ill = store.manifest[NONE].to_numpy()[tested] == 0
    for variant, said in ((CASCADE, told["disease"][:, 1]), (FLAT, 1 - told[FLAT][:, 0])):
        assert found.loc[variant, "Brier score"] == pytest.approx(np.mean((said[tested] - ill) ** 2), abs=1e-12)


# --- heat, pictures and captions -------------------------------------------------------------------------------------


def test_outer_heat_by_hand():
    heat = np.zeros((4, 3, 3))
    heat[0, 1, 1] = 2.0  # the middle third of either side
    heat[1, 0, 1] = 1.0  # the uppermost third, of which three eighths are the picture's outer eighth
    heat[2, 0, 0] = 1.0  # a corner, of which (5/8)² lie in the middle
    heat[3] = heat[0] + 3 * heat[1]
    found = results.outer_heat(heat, (48, 96))
    np.testing.assert_allclose(found, [0, 3 / 8, 1 - 25 / 64, 3 * (3 / 8) / 5], atol=1e-12)


@pytest.mark.parametrize("image_size", [(64, 64), (64, 96), (50, 70), (17, 9)])
@pytest.mark.parametrize("cells", [(1, 1), (4, 4), (7, 5), (8, 8)])
def test_outer_heat_of_a_constant_map_is_its_area(image_size, cells):
    # 1 − (3/4)²; and the scale of the heat has no say.
    np.testing.assert_allclose(results.outer_heat(np.full((2, *cells), 0.3), image_size), 7 / 16, atol=1e-12)


def test_outer_heat_of_a_peak_in_the_centre_is_none_in_a_corner_all_and_of_a_dead_map_unknown():
    heat = np.zeros((3, 9, 9))
    heat[0, 4, 4] = heat[1, 0, 8] = 1.0
    found = results.outer_heat(heat, (90, 90))
    assert found[:2].tolist() == [0, 1] and np.isnan(found[2])


def test_confident_by_hand():
    # The path's outcome counts, and its own joint probability, be another likelier or not.
    joint = np.full((6, 7), 0.05)
    joint[:, 0] = [0.5, 0.4, 0.1, 0.3, 0.2, 0.6]
    joint[:, 4] = [0.1, 0.3, 0.6, 0.5, 0.2, 0.1]
    truth = [NONE, TYPES[0], TYPES[0], TYPES[0], NONE, NONE]
    ended = [NONE, TYPES[0], TYPES[0], NONE, TYPES[0], TYPES[0]]
    table = _ended(truth, ended, joint, list("abbcca")).set_index(pd.Index([10, 20, 30, 40, 50, 60]))
    assert results.confident(table, right=True).tolist() == [30, 10]  # 20 is of the group of 30
    assert results.confident(table, right=False).tolist() == [40, 60]
    assert results.confident(table, right=True, count=1).tolist() == [30]
    assert results.confident(table.loc[[10]], right=False).tolist() == []


def test_captions_by_hand():
    path = (cascade.Step("disease", "disease", 0.875), cascade.Step("kind", "tumour", 0.756))
    last = cascade.Step("type", TYPES[1], 0.504)
    rest = ({}, {}, NONE, None, {})
    readings = [cascade.Reading(TYPES[1], (*path, last), *rest), cascade.Reading(NONE, (path[0],), *rest)]
    assert results.captions(_ended([NONE, SEVERITIES[0]], [TYPES[1], NONE]), readings) == [
        f"{NONE}\nread as {TYPES[1]}\ntype: p = 0.50",
        f"{SEVERITIES[0]}\nread as {NONE}\ndisease: p = 0.88",
    ]
