"""Notebook 03_lumbar_fusion: what is asked with modalities hidden, what trains on it, and the report card."""

import json
import re

import keras
import numpy as np
import pandas as pd
import pytest

from kerasmed import datasets, embeddings, grades, modalities, notebooks, runs, training
from kerasmed.datasets import lumbar as data
from kerasmed.embeddings import Features
from kerasmed.parameters import names_of
from kerasmed.series import Volumes
from kerasmed.systems import lumbar
from kerasmed.systems.lumbar import card, fused, grid, shared

CANAL, FORAMINAL, SUBARTICULAR = data.CONDITIONS
NOTEBOOK, EARLIER = "03_lumbar_fusion", "02_lumbar_embeddings"
WHOLE = "t1 + t2 + axial"
SUBSETS = [WHOLE, "t1 + t2", "t1 + axial", "t2 + axial", "t1", "t2", "axial"]
COLUMNS = list(data.TARGETS)
LN2 = np.log(2)
# Split, and how many series of each modality: position 0 is no training study, and some studies lack something.
STUDIES = ["test 111", "train 111", "valid 111", "train 101", "test 010", "train 121", "valid 110", "train 111"]
STUDIES += ["test 111", "train 110", "train 111", "valid 211", "test 101", "train 111", "train 001", "train 111"]


def _config(**changes):
    parameters = notebooks.resolve(notebooks.describe(NOTEBOOK), profile="smoke", given=changes)
    return fused.Config(**{name: parameters[name] for name in names_of(fused.Config)})


def _found(described, *, slices=2, width=4, seed=0):
    """Studies of random grades and vectors, without files; "train 121" is of split train with two series of T2."""
    rng = np.random.default_rng(seed)
    counts = np.array([[int(number) for number in each.split()[1]] for each in described])
    studies = pd.DataFrame(rng.integers(0, 3, (len(counts), len(COLUMNS))).astype(float), columns=COLUMNS)
    studies.insert(0, "study_id", [f"{1000 + number}" for number in range(len(counts))])
    studies = studies.assign(**dict(zip(data.MODALITIES, counts.T)))
    table = pd.DataFrame(
        [
            {"study_id": study, "series_id": f"{study}{place}{number}", "modality": modality, "slices": slices}
            for study, of_study in zip(studies["study_id"], counts)
            for place, modality in enumerate(data.MODALITIES)
            for number in range(of_study[place])
        ]
    )
    index = table.loc[np.repeat(table.index, slices), ["study_id", "series_id", "modality"]]
    index = index.assign(position=np.tile(np.arange(slices), len(table))).reset_index(drop=True)
    values = rng.normal(size=(len(index), width)).astype(np.float32)
    volumes = Volumes(None, table, pd.DataFrame(), pd.DataFrame(columns=["path", "reason"]))
    return shared.Data(studies, None, volumes), Features(values, index)


def _cases(described, **options):
    found, features = _found(described, **options)
    ids, split = found.studies["study_id"].to_numpy(), np.array([each.split()[0] for each in described])
    bags = embeddings.stack_bags([embeddings.bag_rows(features.index, ids, name) for name in data.MODALITIES])
    positions = [np.flatnonzero(split == name) for name in ("train", "valid", "test")]
    return fused.Cases(found, shared.Part(shared.TEST, *positions), features, bags, [])


def _graded(cases, study, grade):
    """Give all targets of a study one grade."""
    cases.found.studies.loc[study, COLUMNS] = grade


@pytest.fixture
def cases():
    return _cases(STUDIES)


@pytest.fixture
def rows(cases):
    return fused.asked(cases)


# --- configuration and origin ----------------------------------------------------------------------------------------


def test_config_is_the_parameters_cell():
    cell = set(notebooks.describe(NOTEBOOK).parameters)
    assert cell - {"data_root", "models_root"} == set(names_of(fused.Config))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("architectures", [], "some of joint, grouped, late"),
        ("architectures", ["early"], "some of joint, grouped, late"),
        ("architectures", ["late", "late"], "each but once"),
        ("strategies", ["zero", "mean"], "some of zero, neutral, dynamic, pseudo"),
        ("strategies", ["zero", "zero"], "each but once"),
        ("strategies", ["neutral", "pseudo"], "zero among them"),
        ("vectors", "volumes", "one of slices, planes"),
        ("modality_dropouts", [], "rates from 0 and below 1"),
        ("modality_dropouts", [0.0, 1.0], "rates from 0 and below 1"),
        ("modality_dropouts", [-0.1], "rates from 0 and below 1"),
        ("modality_dropouts", [0.3, 0.3], "each but once"),
        ("modality_dropouts", [0.3, 0.3000001], "each but once"),
        ("accepted", ["anything"], "some of "),
        *((name, 0, "at least 1") for name in ("width", "attention_units", "units", "batch_size")),
        *((name, 0, "at least 1") for name in ("epochs", "pseudo_epochs", "bootstraps")),
        ("dropout", 1.0, "at least 0 and below 1"),
        ("dropout", -0.1, "at least 0 and below 1"),
        ("l2", -1e-6, "at least 0"),
        ("learning_rate", 0.0, "between 0 and 1"),
        ("learning_rate", 1.0, "between 0 and 1"),
        ("stop_patience", -1, "at least 0"),
        ("max_quarantined_share", 1.1, "0 to 1"),
        ("max_quarantined_share", -0.1, "0 to 1"),
    ],
)
def test_config_value_that_cannot_work_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=rf"parameter `{name}` is {re.escape(repr(value))}; expected .*{expected}"):
        _config(**{name: value})


def test_points_are_each_architecture_and_dropout_with_every_strategy():
    config = _config(architectures=["late", "joint"], strategies=["zero", "pseudo"], modality_dropouts=[0.0, 0.25])
    each = [("zero", "0"), ("pseudo", "0"), ("zero", "0.25"), ("pseudo", "0.25")]
    assert config.points == [(name, *pair) for name in ("late", "joint") for pair in each]
    assert len(_config().points) == len(set(_config().points)) == 12


@pytest.fixture
def earlier():
    """Function that leaves a finished run of the earlier notebook, holding vectors of these names."""

    def leave(*held, normalisations=("gsl", "hist"), fingerprint="x", status="complete"):
        parameters = {"profile": "smoke", "normalisations": normalisations, "image_size": [32, 48], "window": True}
        machine = {"fingerprint": fingerprint, "data_source": "synthetic", "environment": {}}
        run = runs.start("lumbar", EARLIER, parameters, **machine)
        for name in held:
            (run / "features" / name).mkdir(parents=True)
            (run / "features" / name / "index.csv").touch()
        runs.set_status(run, status)
        return run

    return leave


def test_find_origin_takes_the_first_normalisation_that_there_are_vectors_of(earlier):
    run = earlier("slices-hist", "slices-gsl", "planes-hist")
    origin = fused.find_origin(_config(), fingerprint="x")
    assert (origin.run, origin.normalisation) == (run, "gsl") and origin.vectors == run / "features" / "slices-gsl"
    assert origin.encoder == run / "encoders" / "slices-gsl.keras"
    assert origin.parameters["image_size"] == [32, 48]
    asked = _config(normalisation="hist", from_run=run.name)
    assert fused.find_origin(asked, fingerprint="x").vectors.name == "slices-hist"
    assert fused.find_origin(_config(vectors="planes"), fingerprint="x").normalisation == "hist"


def test_find_origin_without_a_complete_run_on_the_same_data_names_the_command(earlier):
    with pytest.raises(FileNotFoundError, match=f"no complete run of {EARLIER} .* `kerasmed run {EARLIER} --profile "):
        fused.find_origin(_config(), fingerprint="x")
    earlier("slices-gsl", status="failed")
    earlier("slices-gsl", fingerprint="of other data")
    with pytest.raises(FileNotFoundError, match=f"no complete run of {EARLIER} .* `kerasmed run {EARLIER} --profile "):
        fused.find_origin(_config(), fingerprint="x")


def test_find_origin_without_the_vectors_or_normalisation_says_what_the_run_holds(earlier):
    run = earlier("slices-gsl")
    with pytest.raises(ValueError, match=rf"`vectors` is 'planes'; expected a kind that {run.name} holds: slices\."):
        fused.find_origin(_config(vectors="planes"), fingerprint="x")
    for absent in ("hist", "GSL"):  # one that the run read, but made no vectors of; one that it does not know
        with pytest.raises(ValueError, match=rf"`normalisation` is '{absent}'; .* one that {run.name} holds: \['gsl'"):
            fused.find_origin(_config(normalisation=absent), fingerprint="x")


# --- read ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Studies as they are read, and the origin: its vectors, and a split table with a row a series."""
    described = [*STUDIES[:3], "train 000", *STUDIES[3:6], "test 000"]
    found, features = _found(described)
    vectors = tmp_path / "earlier" / "features" / "slices-gsl"
    vectors.mkdir(parents=True)
    np.save(vectors / "features.npy", features.values)
    features.index.to_csv(vectors / "index.csv", index=False)
    split = dict(zip(found.studies["study_id"], (each.split()[0] for each in described)))
    table = found.volumes.table[["study_id", "series_id"]]
    table.assign(split=table["study_id"].map(split)).sort_index(ascending=False).to_csv(
        tmp_path / "earlier" / "split.csv", index=False
    )
    parameters = {"image_size": [32, 48], "normalisations": ["gsl"], "window": True, "profile": "smoke"}
    calls = []
    monkeypatch.setattr(shared, "read", lambda source, **options: (calls.append((source, options)), found)[1])
    return found, features, fused.Origin(tmp_path / "earlier", parameters, vectors, "gsl"), calls


def test_read_splits_as_the_earlier_run_and_names_studies_without_any_modality(made):
    found, features, origin, calls = made
    cases = fused.read(_config(max_quarantined_share=0.25), "the source", origin)
    options = {"image_size": [32, 48], "normalisations": ["gsl"], "window": True, "max_quarantined_share": 0.25}
    assert calls == [("the source", options)]
    assert cases.left_out == ["1003", "1007"]
    ids = cases.found.studies["study_id"].to_numpy()
    assert ids.tolist() == ["1000", "1001", "1002", "1004", "1005", "1006"]
    of_part = {name: ids[getattr(cases.part, name)].tolist() for name in ("train", "valid", "asked")}
    assert of_part == {"train": ["1001", "1004", "1006"], "valid": ["1002"], "asked": ["1000", "1005"]}
    assert cases.part.name == "test"
    told = ["".join(str(int(there)) for there in each) for each in cases.present]
    assert told == ["111", "111", "111", "101", "010", "111"]
    np.testing.assert_array_equal(cases.features.values, features.values)


def test_read_joins_all_series_of_a_modality_in_its_place(made):
    cases = fused.read(_config(), None, made[2])
    assert cases.bags.shape == (6, 3, 4)  # two series of two slices are the longest
    index = cases.features.index
    for study, name in enumerate(cases.found.studies["study_id"]):
        for place, modality in enumerate(data.MODALITIES):
            chosen = cases.bags[study, place][cases.bags[study, place] >= 0]
            wanted = index.index[(index["study_id"] == name) & (index["modality"] == modality)]
            assert chosen.tolist() == wanted.tolist()


@pytest.mark.parametrize("change", ["lacks one", "has one more", "has another"])
def test_read_split_of_other_studies_is_refused(made, change):
    found, _, origin, _ = made
    table = pd.read_csv(origin.run / "split.csv", dtype=str)
    if change == "lacks one":
        table = table[table["study_id"] != "1002"]
    elif change == "has one more":
        table = pd.concat([table, table[:1].assign(study_id="2000")])
    else:
        table = table.assign(study_id=table["study_id"].replace("1002", "2000"))
    table.to_csv(origin.run / "split.csv", index=False)
    number = {"lacks one": "5 studies, 5", "has one more": "7 studies, 6", "has another": "6 studies, 5"}[change]
    with pytest.raises(ValueError, match=f"split.csv parts {number} of them .* the 6 here; run {EARLIER} again"):
        fused.read(_config(), None, origin)


def test_read_vectors_of_other_series_are_refused(made):
    origin = made[2]
    pd.read_csv(origin.vectors / "index.csv")[1:].to_csv(origin.vectors / "index.csv", index=False)
    with pytest.raises(ValueError, match=f"series of .* slices can be read now; .* run {EARLIER} again"):
        fused.read(_config(), None, origin)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_subsets_are_all_seven_the_whole_first():
    masks = {name: "".join(str(int(there)) for there in shown) for name, shown in fused.subsets().items()}
    assert list(masks.items()) == list(zip(SUBSETS, ["111", "110", "101", "011", "100", "010", "001"]))
    assert [fused.WHOLE, *fused.PARTIAL] == SUBSETS
    assert [data.MODALITIES[place] for place in range(3)] == list(fused.SHORT)
    assert fused.GROUPS == {"canal": 5, "foraminal": 10, "subarticular": 10}


def test_asked_by_hand():
    described = ["test 101", "train 111", "valid 111", "train 100", "test 010", "valid 012"]
    rows = fused.asked(_cases(described))
    assert rows.columns.tolist() == ["study", "split", "modalities", "as_is", "complete", "shown"]
    assert list(rows.itertuples(index=False, name=None)) == [
        (1, "train", WHOLE, True, True, 0),
        (3, "train", "t1", True, False, 4),
        *((2, "valid", name, name == WHOLE, True, place) for place, name in enumerate(SUBSETS)),
        (5, "valid", "t2 + axial", True, False, 3),
        (0, "test", "t1 + axial", True, False, 2),
        (4, "test", "t2", True, False, 5),
    ]


def test_asked_has_each_study_once_as_it_is_and_shows_nothing_that_it_lacks(cases, rows):
    assert sorted(rows.loc[rows["as_is"], "study"]) == list(range(len(STUDIES)))
    assert rows.loc[rows["split"] == "train", "as_is"].all()
    shown = np.stack(list(fused.subsets().values()))[rows["shown"]]
    assert not (shown & ~cases.present[rows["study"]]).any()
    assert ((shown == cases.present[rows["study"]]).all(axis=1) == rows["as_is"]).all()
    assert not rows.duplicated(["study", "modalities"]).any()


def test_inputs_of_hidden_modalities_are_empty(cases):
    studies = np.array([0, 5, 3])  # 111, 121 and 101
    shown = np.array([[True, False, True], [False, True, False], [True, True, True]])
    found = fused.inputs(cases, studies, shown)
    expected = shown & cases.present[studies]
    assert expected.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    np.testing.assert_array_equal(found["available"], expected)
    counts = np.array([[2, 0, 2], [0, 4, 0], [2, 0, 2]])  # two slices a series
    np.testing.assert_array_equal(found["slice_mask"].sum(axis=2), counts)
    assert not found["slices"][~found["slice_mask"]].any()
    np.testing.assert_array_equal(found["slices"][1, 1], cases.features.values[cases.bags[5, 1]])
    every = fused.inputs(cases, studies)
    np.testing.assert_array_equal(every["available"], cases.present[studies])


def test_answer_is_in_the_order_of_the_rows_and_of_what_each_shows(cases, rows):
    """A network that tells what it was given: the sum of the vectors, and which modalities were there."""
    places, width = cases.bags.shape[2], cases.features.values.shape[1]
    slices = keras.Input((3, places, width), name="slices")
    mask = keras.Input((3, places), dtype="bool", name="slice_mask")
    there = keras.Input((3,), dtype="bool", name="available")
    told = keras.ops.concatenate([keras.ops.sum(slices, axis=(2, 3)), keras.ops.cast(there, "float32")], axis=-1)
    told = told + 0 * keras.ops.sum(keras.ops.cast(mask, "float32"), axis=(1, 2))[:, None]
    model = keras.Model({"slices": slices, "slice_mask": mask, "available": there}, told)
    mixed = rows.sample(frac=1, random_state=0)  # as a part of the rows has other numbers than places
    found = fused.answer(model, cases, mixed, batch_size=8)
    shown = np.stack(list(fused.subsets().values()))[mixed["shown"]]
    np.testing.assert_array_equal(found[:, 3:], shown)
    values = np.append(cases.features.values, np.zeros((1, width), np.float32), axis=0)
    sums = values[cases.bags[mixed["study"]]].sum(axis=(2, 3))
    np.testing.assert_allclose(found[:, :3], np.where(shown, sums, 0), atol=1e-5)


# --- answers as tables -----------------------------------------------------------------------------------------------


def _encoded(rows):
    """Answers that say where they belong: row / 1000 and target / 1000."""
    row, target = np.meshgrid(np.arange(len(rows)), np.arange(len(COLUMNS)), indexing="ij")
    return np.stack([row / 1000, target / 1000, 1 - (row + target) / 1000], axis=2)


def _right_places(table, cases, rows):
    """Whether each answer of `_encoded` is beside the study (as it is), target and grade that it is of."""
    ids = cases.found.studies["study_id"]
    own = {ids[rows["study"][row]]: row for row in np.flatnonzero(rows["as_is"])}
    places = {where: number for number, where in enumerate(data.PLACES.values())}
    found = [places[where] for where in zip(table["condition"], table["side"], table["level"])]
    np.testing.assert_allclose(table[grid.TOLD[0]] * 1000, table["study_id"].map(own), atol=1e-9)
    np.testing.assert_allclose(table[grid.TOLD[1]] * 1000, found, atol=1e-9)
    grades_ = cases.found.studies.set_index("study_id")[COLUMNS].to_numpy()
    np.testing.assert_array_equal(table["grade"], grades_[ids.searchsorted(table["study_id"]), found])
    return True


def test_as_is_puts_each_answer_beside_its_study_target_and_grade(cases, rows):
    cases.found.studies.loc[[0, 3], COLUMNS[7]] = np.nan
    table = fused.as_is(cases, rows, _encoded(rows))
    assert table.columns.tolist() == ["study_id", "split", "condition", "side", "level", "grade", *grid.TOLD]
    assert len(table) == len(STUDIES) * 25 and _right_places(table, cases, rows)
    assert not table.duplicated(["study_id", "condition", "side", "level"]).any()
    split = {f"{1000 + number}": each.split()[0] for number, each in enumerate(STUDIES)}
    assert (table["split"] == table["study_id"].map(split)).all()
    blank = table[table["grade"].isna()]
    assert set(blank["study_id"]) == {"1000", "1003"} and len(blank) == 2 and blank[grid.TOLD].notna().all(axis=None)


def test_own_answers_answer_the_questions_with_a_grade(cases, rows):
    cases.found.studies.loc[0, COLUMNS[7]] = np.nan
    questions = grid.questions(cases.found, [cases.part], paired=False)
    keys = [("joint", "zero", "0"), ("late", "pseudo", "0.3")]
    found = fused.own_answers({keys[0]: _encoded(rows), keys[1]: _encoded(rows)}, rows, questions)
    assert list(found) == keys
    for table in found.values():
        assert set(table["part"]) == {"test"} and set(table["study_id"]) == {"1000", "1004", "1008", "1012"}
        assert len(table) == 4 * 25 - 1 and table["grade"].notna().all() and _right_places(table, cases, rows)
    swapped = fused.own_answers({keys[0]: _encoded(rows)[:, :, [1, 0, 2]]}, rows, questions)[keys[0]]
    np.testing.assert_array_equal(swapped[grid.TOLD[1]], found[keys[0]][grid.TOLD[0]])


def test_compare_scores_a_submission_that_was_written_and_read_as_the_metric_does(cases, rows, tmp_path):
    cases.found.studies.loc[0, COLUMNS[7]] = np.nan
    told = np.random.default_rng(0).dirichlet(np.ones(3), (len(rows), 25))
    table = fused.as_is(cases, rows, told).query("split == 'test'")
    submission = data.submission(table).sample(frac=1, random_state=0)
    assert len(submission) == 4 * 25
    submission.to_csv(tmp_path / "submission.csv", index=False)
    truth = table[["study_id", "condition", "side", "level", "grade"]]
    read = data.read_submission(tmp_path / "submission.csv")
    back = truth.merge(read, on=["study_id", "condition", "side", "level"], validate="one_to_one")
    np.testing.assert_array_equal(back[grid.TOLD], table[grid.TOLD])
    found = fused.compare(read, truth)
    expected = grades.competition(table, data.GRADES, conditions=data.CONDITIONS, spinal=CANAL)
    assert found == pytest.approx(expected, rel=1e-12) and set(found) == {*data.CONDITIONS, grades.ANY_SEVERE, "all"}
    with pytest.raises(ValueError, match="1 of 100 rows .* no probabilities"):
        fused.compare(read[1:], truth)


def test_compare_by_hand():
    studies = pd.DataFrame({"study_id": ["1", "2"]} | dict.fromkeys(COLUMNS, [2.0, 0.0]))
    truth = data.long(studies).drop(columns="target")
    told = truth.drop(columns="grade").assign(**dict(zip(grid.TOLD, (0.25, 0.25, 0.5))))
    found = fused.compare(told, truth)
    # Of each condition 4 parts of log 2 and 1 part of log 4; any_severe: log 2 of both.
    assert found[CANAL] == found[FORAMINAL] == pytest.approx(6 / 5 * LN2)
    assert found["all"] == pytest.approx((3 * 6 / 5 + 1) / 4 * LN2)


# --- training --------------------------------------------------------------------------------------------------------


TINY = {"width": 4, "attention_units": 4, "units": 4, "epochs": 2, "batch_size": 8, "pseudo_epochs": 3, "dropout": 0.1}
PSEUDO, ZERO = ("grouped", "pseudo", "0.3"), ("joint", "zero", "0")


class _Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def tiny():
    return _config(**TINY, learning_rate=0.01)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A network with a cross-modal one, trained without a stop."""
    cases = _cases(STUDIES)
    rows, run = fused.asked(cases), tmp_path_factory.mktemp("undisturbed")
    return cases, rows, run, fused.fit(tiny, PSEUDO, cases, rows, run=run)


def _weights(folder):
    return keras.saving.load_model(folder / "model.keras").get_weights()


def _same(first, second):
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_fit_writes_history_network_and_answers(trained):
    cases, rows, run, found = trained
    assert found.folder == run / "variants" / "grouped-pseudo-0.3"
    names = {path.name for path in found.folder.iterdir()}
    assert names == {"history.csv", "model.keras", "predictions.csv", "pseudo.csv", "sealed.json", "told.npz"}
    assert found.history["epoch"].tolist() == [1, 2] and found.history["kept"].sum() == 1
    assert pd.read_csv(found.folder / "pseudo.csv")["epoch"].tolist() == [1, 2, 3]
    assert found.told.shape == (len(rows), 25, 3) and found.told.dtype == np.float32
    np.testing.assert_allclose(found.told.sum(axis=2), 1, atol=1e-5)
    model = keras.saving.load_model(found.folder / "model.keras")
    again = fused.answer(model, cases, rows)
    np.testing.assert_allclose(found.told, again, atol=1e-5)  # another batch is summed in another order
    # What is shown tells: a study's answers differ between all subsets.
    of_study = found.told[(rows["study"] == 8).to_numpy()]
    assert len(of_study) == 7 and (np.abs(of_study[:, None] - of_study).max(axis=(2, 3)) > 1e-6).sum() == 42
    table = pd.read_csv(found.folder / "predictions.csv", dtype={"study_id": str}, keep_default_na=False)
    assert set(table.pop("variant")) == {"grouped pseudo 0.3"}
    expected = fused.as_is(cases, rows, found.told)
    assert table["study_id"].tolist() == expected["study_id"].tolist()
    np.testing.assert_allclose(table[grid.TOLD], expected[grid.TOLD], rtol=1e-6)


def test_fit_called_again_reads_what_was_finished(tiny, trained, monkeypatch):
    cases, rows, run, found = trained
    for module, name in ((training, "fit"), (fused, "build_model"), (fused, "answer")):
        monkeypatch.setattr(module, name, None)
    before = {path: path.stat().st_mtime_ns for path in found.folder.iterdir()}
    again = fused.fit(tiny, PSEUDO, cases, rows, run=run)
    np.testing.assert_array_equal(again.told, found.told)
    pd.testing.assert_frame_equal(again.history, found.history)
    assert before == {path: path.stat().st_mtime_ns for path in found.folder.iterdir()}


@pytest.mark.slow
def test_fit_killed_before_and_after_the_cross_modal_network_learns_ends_alike(tiny, trained, tmp_path, monkeypatch):
    cases, rows, _, found = trained
    expected = _weights(found.folder)

    def stop(*_):
        raise _Stopped

    with monkeypatch.context() as patch:
        patch.setattr(fused, "_learn_pseudo", stop)
        with pytest.raises(_Stopped):
            fused.fit(tiny, PSEUDO, cases, rows, run=tmp_path)
    folder = tmp_path / "variants" / "grouped-pseudo-0.3"
    assert not (folder / "told.npz").exists() and not _same(_weights(folder), expected)
    resumed = fused.fit(tiny, PSEUDO, cases, rows, run=tmp_path)
    np.testing.assert_array_equal(resumed.told, found.told)
    assert _same(_weights(folder), expected)
    (folder / "told.npz").unlink()
    again = fused.fit(tiny, PSEUDO, cases, rows, run=tmp_path)
    np.testing.assert_array_equal(again.told, found.told)
    assert _same(_weights(folder), expected)
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "pseudo.csv"), pd.read_csv(found.folder / "pseudo.csv"), check_exact=True
    )


def test_fit_killed_before_it_answers_gives_the_same_answers(tiny, cases, rows, tmp_path):
    first = fused.fit(tiny, ZERO, cases, rows, run=tmp_path)
    assert not (first.folder / "pseudo.csv").exists()
    written = (first.folder / "model.keras").stat().st_mtime_ns
    (first.folder / "told.npz").unlink()
    (first.folder / "predictions.csv").unlink()
    again = fused.fit(tiny, ZERO, cases, rows, run=tmp_path)
    np.testing.assert_array_equal(again.told, first.told)
    assert (first.folder / "predictions.csv").exists()
    assert (first.folder / "model.keras").stat().st_mtime_ns == written


def test_fit_learns_nothing_from_test_studies(tiny, trained, tmp_path):
    """Neither their grades nor their vectors move the network, the standardisation or the cross-modal network."""
    cases, rows, _, found = trained
    studies, asked = cases.found.studies.copy(), cases.part.asked
    studies.loc[asked, COLUMNS] = 2 - studies.loc[asked, COLUMNS]
    of_test = cases.features.index["study_id"].isin(studies["study_id"][asked]).to_numpy()
    values = np.where(of_test[:, None], 3 * cases.features.values + 7, cases.features.values)
    features = cases.features._replace(values=values)
    moved = cases._replace(found=cases.found._replace(studies=studies), features=features)
    other = fused.fit(tiny, PSEUDO, moved, rows, run=tmp_path)
    assert _same(_weights(other.folder), _weights(found.folder))
    kept = (rows["split"] != "test").to_numpy()
    np.testing.assert_array_equal(other.told[kept], found.told[kept])
    assert (other.told[~kept] != found.told[~kept]).any(axis=(1, 2)).all()


def test_fit_trains_on_training_studies_with_the_loss_of_the_competition(cases, rows, tmp_path, monkeypatch):
    config = _config(**TINY, learning_rate=0.25, stop_patience=3, seed=5)
    calls = []

    def fit(*given, **options):
        calls.append((given, options))
        raise _Stopped

    monkeypatch.setattr(training, "fit", fit)
    cases.found.studies.loc[cases.part.valid[0], COLUMNS[3]] = np.nan
    with pytest.raises(_Stopped):
        fused.fit(config, ZERO, cases, rows, run=tmp_path)
    (((model, train, valid), options),) = calls
    y = cases.found.studies[COLUMNS].to_numpy(np.float32)
    ((given, targets),) = [tuple(batch) for batch in valid]  # three studies in one batch, in order, nothing hidden
    np.testing.assert_array_equal(targets, y[cases.part.valid])
    for name, array in fused.inputs(cases, cases.part.valid).items():
        np.testing.assert_array_equal(given[name], array)
    epoch = list(train(0).take(2))  # of nine studies, eight a batch
    seen = np.concatenate([targets for _, targets in epoch])
    order = [np.flatnonzero((y == each).all(axis=1)).item() for each in seen]
    slices = np.concatenate([given["slices"] for given, _ in epoch])
    np.testing.assert_array_equal(slices, fused.inputs(cases, np.array(order))["slices"])
    assert sorted(order) == cases.part.train.tolist() and order != sorted(order)
    named = {"folder": tmp_path / "variants" / "joint-zero-0", "steps_per_epoch": 2, "epochs": 2, "schedule": "cosine"}
    named |= {"learning_rate": 0.25, "stop_patience": 3}
    assert {name: options[name] for name in named} == named and model.name == "joint_zero"
    # The true grades 0, 1, 2 and a blank are told 1/2, 1/4, 1/8: (1 · 1 + 2 · 2 + 4 · 3) / (1 + 2 + 4) bits.
    told = np.log([[[1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1 / 2, 3 / 8, 1 / 8], [0.9, 0.05, 0.05]]])
    value = float(options["loss"](np.array([[0.0, 1.0, 2.0, np.nan]], np.float32), told.astype(np.float32)))
    assert value == pytest.approx(17 / 7 * LN2, rel=1e-6)


def test_build_model_takes_its_sizes_from_the_configuration(cases):
    config = _config(width=5, attention_units=3, units=7, dropout=0.25, l2=0.125)
    model = fused.build_model(config, ("grouped", "dynamic", "0.3"), cases)
    names = {layer.name: layer for layer in model.layers}
    assert model.output_shape == (None, 25, 3) and model.name == "grouped_dynamic"
    assert {each.name: each.shape[1:] for each in model.inputs} == {
        "slices": (3, None, 4),
        "slice_mask": (3, None),
        "available": (3,),
    }
    assert names["hidden_modalities"].rate == 0.3 and names["canalnetwork_dropout"].rate == 0.25
    assert names["canalnetwork_hidden"].units == 7
    assert float(names["canalnetwork_hidden"].kernel_regularizer.l2) == pytest.approx(0.125)
    assert names["strategy"].input[0].shape == (None, 3, 5)
    assert names["foraminalnetwork_scores"].units == 30 and names["canalnetwork_scores"].units == 15


def test_learn_pseudo_without_complete_training_studies_leaves_the_network_as_it_is(tmp_path):
    rows = fused.asked(_cases(["train 110", "train 011", "valid 111", "test 111"]))
    fused._learn_pseudo(None, None, None, rows, tmp_path)  # a look at the network would fail
    assert not list(tmp_path.iterdir())


def test_keep_puts_the_chosen_network_on_top_and_says_how_series_are_read(tmp_path):
    origin = fused.Origin(
        tmp_path / "02-x", {"image_size": [32, 48], "window": True, "seed": 1}, tmp_path / "planes-hist", "hist"
    )
    chosen = fused.Fused(tmp_path / "run" / "variants" / "late-zero-0", None, None)
    for folder, names in (
        (chosen.folder, ("model.keras", "history.csv", "predictions.csv", "told.npz")),
        (origin.encoder.parent, ("planes-hist.keras", "slices-hist.keras")),
    ):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(name)
    run = tmp_path / "run"
    fused.keep(_config(vectors="planes"), origin, chosen, run=run)
    written = {path.name: path.read_text() for path in run.iterdir() if path.is_file()}
    assert json.loads(written.pop("answers.json")) == {
        "variant": "late-zero-0",
        "vectors": "planes",
        "normalisation": "hist",
        "read": {"image_size": [32, 48], "window": True},
        "encoder_from": "02-x",
    }
    own = {name: name for name in ("model.keras", "history.csv", "predictions.csv")}
    assert written == {**own, "encoder.keras": "planes-hist.keras"}


# --- report card -----------------------------------------------------------------------------------------------------


def _knowing(cases, rows, share):
    """Answers that give the true grade a probability, `share` of (study, subset); the other two have the rest."""
    given = np.array([share(*each) for each in zip(rows["study"], rows["modalities"])], float)
    truth = np.nan_to_num(cases.found.studies[COLUMNS].to_numpy(float)[rows["study"]]).astype(int)
    told = np.repeat((1 - given[:, None, None]) / 2, 25, axis=1) * np.ones(3)
    told[np.arange(len(rows))[:, None], np.arange(25), truth] = given[:, None]
    return told


def _even(rows):
    return np.full((len(rows), 25, 3), 1 / 3)


def _score(told, rows, cases, baselines=None, num_draws=50):
    return card.score(told, rows, cases, baselines or {}, num_draws=num_draws, seed=0)


def _many(count, seed=0):
    """Studies of which the last two thirds are test, some of them incomplete."""
    described = np.resize(["test 111", "test 111", "train 111", "test 110", "valid 111", "test 111"], count)
    return _cases(described.tolist(), slices=1, width=1, seed=seed)


def test_score_of_who_knows_all_is_one_and_of_who_knows_nothing_chance():
    cases = _many(120)
    rows = fused.asked(cases)
    coin = np.random.default_rng(1).dirichlet(np.ones(3), (len(rows), 25))
    # Knows the complete test studies alone: the others have no say.
    oracle = _knowing(
        cases, rows, lambda study, _: float(study in set(cases.part.asked) and cases.present[study].all())
    )
    told = {("joint", "zero", "0"): _even(rows), ("joint", "pseudo", "0"): oracle, ("joint", "dynamic", "0"): coin}
    scored = _score(told, rows, cases)
    assert set(scored) == {(metric, name) for metric in card.METRICS for name in (*data.CONDITIONS, card.ALL)}
    for name in (*data.CONDITIONS, card.ALL):
        for subset in SUBSETS:
            value, draws = scored["macro_auroc", name]["joint", "pseudo", "0", subset]
            assert value == 1 and (draws == 1).all() and draws.shape == (50,)
            assert scored["macro_f1", name]["joint", "pseudo", "0", subset][0] == 1
            assert scored["weighted_log_loss", name]["joint", "pseudo", "0", subset][0] == pytest.approx(0, abs=1e-9)
            assert scored["macro_auroc", name]["joint", "zero", "0", subset][0] == 0.5
            # 60 studies with 5 levels at least: three standard errors of an AUROC are 0.1.
            assert abs(scored["macro_auroc", name]["joint", "dynamic", "0", subset][0] - 0.5) < 0.1


def test_score_of_the_same_answers_to_all_subsets_is_the_same_value_and_draws(cases, rows):
    told = np.random.default_rng(0).dirichlet(np.ones(3), (len(STUDIES), 25))[rows["study"]]
    scored = _score({("late", "zero", "0"): told}, rows, cases)
    for points in scored.values():
        assert list(points) == [("late", "zero", "0", name) for name in SUBSETS]
        first, *others = points.values()
        assert len(np.unique(first[1])) > 1
        for value, draws in others:
            assert value == first[0]
            np.testing.assert_array_equal(draws, first[1])


def test_score_reads_the_targets_of_each_condition_and_all_is_their_mean(cases, rows):
    of_canal = [name in data.targets_of(CANAL) for name in COLUMNS]
    told = _even(rows)
    told[:, of_canal] = _knowing(cases, rows, lambda *_: 0.75)[:, of_canal]
    scored = _score({("late", "zero", "0"): told}, rows, cases)
    key = ("late", "zero", "0", "t2")
    assert [scored["macro_auroc", name][key][0] for name in data.CONDITIONS] == [1, 0.5, 0.5]
    assert scored["macro_auroc", card.ALL][key][0] == pytest.approx(2 / 3)
    for metric in card.METRICS:
        draws = [scored[metric, name][key][1] for name in data.CONDITIONS]
        np.testing.assert_allclose(scored[metric, card.ALL][key][1], np.mean(draws, axis=0), rtol=1e-12)
    assert scored["weighted_log_loss", CANAL][key][0] == pytest.approx(np.log(4 / 3))
    assert scored["weighted_log_loss", FORAMINAL][key][0] == pytest.approx(np.log(3))


def test_score_reads_each_subset_where_it_was_asked(cases, rows):
    share = {name: 0.4 + 0.05 * place for place, name in enumerate(SUBSETS)}
    told = _knowing(cases, rows, lambda _, name: share[name])
    points = _score({("late", "zero", "0"): told}, rows, cases)["weighted_log_loss", SUBARTICULAR]
    found = {key[3]: value for key, (value, _) in points.items()}
    assert found == pytest.approx({name: -np.log(each) for name, each in share.items()}, rel=1e-9)


def _two_studies():
    """Two complete test studies, one of all Normal/Mild and one of all Severe, and one that lacks a modality."""
    cases = _cases(["test 111", "train 111", "valid 111", "test 111", "test 101"])
    _graded(cases, 0, 0.0)
    _graded(cases, 3, 2.0)
    return cases, fused.asked(cases)


def test_table_of_differences_to_zero_filling_by_hand():
    cases, rows = _two_studies()
    # Of the severe study the other knows less; where only T1 is shown, less still; of foraminal nothing is changed.
    half = _knowing(cases, rows, lambda _, name: 1 / 4 if name == "t1" else 1 / 2)
    less = {(3, "t1"): 1 / 16, (0, "t1"): 1 / 4, (3, None): 1 / 4}
    worse = _knowing(cases, rows, lambda study, name: less.get((study, "t1" if name == "t1" else None), 1 / 2))
    of_foraminal = [name in data.targets_of(FORAMINAL) for name in COLUMNS]
    worse[:, of_foraminal] = half[:, of_foraminal]
    even = _even(rows)
    told = {
        ("late", "zero", "0"): half,
        ("late", "zero", "0.3"): even,
        ("late", "pseudo", "0"): worse,
        ("late", "neutral", "0"): half.copy(),
        ("late", "pseudo", "0.3"): even.copy(),
        ("joint", "zero", "0"): worse.copy(),
    }
    scored = _score(told, rows, cases, num_draws=200)
    table = card.table(scored)
    names = ["metric", "condition", "variant", *fused.FACTORS, "modalities", "value", "low", "high"]
    assert table.columns.tolist() == [*names, "difference", "difference_low", "difference_high"]
    assert len(table) == 6 * 7 * 4 * 3
    losses = table[table["metric"] == "weighted_log_loss"].set_index(["condition", "variant", "modalities"])
    # (1 · log 2 + 4 · log 4) / 5; the draws hold one study twice, or both.
    canal = losses.loc[CANAL, "late pseudo 0", WHOLE]
    assert canal["value"] == pytest.approx(9 / 5 * LN2)
    assert [canal["low"], canal["high"]] == pytest.approx([LN2, 2 * LN2])
    expected = [4 / 5 * LN2, 0, LN2]
    gaps = ["difference", "difference_low", "difference_high"]
    assert canal[gaps].tolist() == pytest.approx(expected, abs=1e-9)
    told_less = losses.loc[SUBARTICULAR, "late pseudo 0", "t1"]
    assert told_less[gaps].tolist() == pytest.approx([8 / 5 * LN2, 0, 2 * LN2], abs=1e-9)
    of_all = losses.loc[card.ALL, "late pseudo 0", "t1"]
    assert of_all[gaps].tolist() == pytest.approx([16 / 15 * LN2, 0, 4 / 3 * LN2], abs=1e-9)
    # What answers as zero filling of its own dropout does differs by nothing, in no draw.
    alike = table[table["variant"].isin(["late neutral 0", "late pseudo 0.3"])]
    assert (alike["difference"] == 0).all()
    # An AUROC needs both studies, which half of the draws have not: it may have no interval.
    assert (alike.loc[alike["metric"] != "macro_auroc", gaps] == 0).all(axis=None)
    assert table.loc[table["strategy"] == "zero", gaps].isna().all(axis=None)
    assert all(losses.loc[FORAMINAL, "late pseudo 0", name]["difference"] == 0 for name in SUBSETS)


def test_table_has_each_baseline_once_with_its_answers_in_place(cases, rows):
    cases.found.studies.loc[0, COLUMNS[7]] = np.nan
    questions = grid.questions(cases.found, [cases.part], paired=False)
    known = _knowing(cases, rows, lambda *_: 0.75)
    ((_, right),) = fused.own_answers({("", "", ""): known}, rows, questions).items()
    baselines = {"prior": right.assign(**dict.fromkeys(grid.TOLD, 1 / 3)), "nearest": right.sample(frac=1)}
    table = card.table(_score({("late", "zero", "0"): known}, rows, cases, baselines))
    among = table[table["modalities"] == "any"]
    assert len(table) == (7 + 2) * 4 * 3 and len(among) == 2 * 4 * 3
    assert (among[list(fused.FACTORS)] == "").all(axis=None) and set(among["variant"]) == {"prior", "nearest"}
    assert among[["difference", "difference_low", "difference_high"]].isna().all(axis=None)
    of_metric = among.set_index(["metric", "variant"])["value"]
    assert (of_metric["macro_auroc", "nearest"] == 1).all() and (of_metric["macro_auroc", "prior"] == 0.5).all()
    np.testing.assert_allclose(of_metric["weighted_log_loss", "nearest"], np.log(4 / 3), rtol=1e-9)
    np.testing.assert_allclose(of_metric["weighted_log_loss", "prior"], np.log(3), rtol=1e-9)


def test_score_without_a_complete_test_study_is_refused():
    cases = _cases(["train 111", "valid 111", "test 110", "test 001"])
    rows = fused.asked(cases)
    with pytest.raises(ValueError, match="no test study has all modalities"):
        _score({("late", "zero", "0"): _even(rows)}, rows, cases)


def test_drawn_is_a_column_a_model_of_one_architecture(cases, rows):
    keys = [(name, *each) for name in ("joint", "late") for each in (("zero", "0"), ("pseudo", "0"), ("zero", "0.3"))]
    report = card.table(_score(dict.fromkeys(keys, _even(rows)), rows, cases))
    found = card.drawn(report, metric="macro_f1", architecture="late", condition=CANAL)
    assert found["column"].unique().tolist() == ["zero", "pseudo", "zero, dropout 0.3"] and len(found) == 3 * 7
    assert set(found["architecture"]) == {"late"} and set(found["metric"]) == {"macro_f1"}
    assert set(found["condition"]) == {CANAL} and found["modalities"].unique().tolist() == SUBSETS
    assert set(card.drawn(report, metric="macro_f1", architecture="late")["condition"]) == {card.ALL}


def _points(**values):
    """Points of one architecture, "strategy_rate" -> (value of the whole, of the six others, what draws are off by)."""
    points = {}
    for name, (whole, others, off) in values.items():
        strategy, rate = name.split("_")
        for place, subset in enumerate(SUBSETS):
            value = whole if place == 0 else others[place - 1]
            points["late", strategy, {"none": "0", "some": "0.3"}[rate], subset] = (value, value + np.array(off))
    return points | {"prior": (0.5, np.full(3, 0.5))}


CONTRASTED = {
    "zero_none": (0.5, [0.5] * 6, [0, 0, 0]),
    "pseudo_none": (0.4, [0.51, 0.52, 0.53, 0.54, 0.55, 0.56], [-0.02, 0, 0.02]),
    "neutral_none": (0.6, [0.5, 0.5, 0.5, 0.5, 0.5, 0.44], [-0.2, 0, 0.2]),
    "zero_some": (0.45, [0.45] * 6, [0, 0, 0]),
    "pseudo_some": (0.45, [0.39] * 6, [0, 0, 0]),
    "neutral_some": (0.45, [0.45] * 6, [0, 0, 0.2]),
}


@pytest.mark.parametrize(("metric", "sign"), [("macro_auroc", 1), ("weighted_log_loss", -1)])
def test_contrasts_by_hand(metric, sign):
    found = card.contrasts({(metric, card.ALL): _points(**CONTRASTED)}, metric=metric)
    names = ["architecture", "modality_dropout", "strategy", "against", "where", "difference", "low", "high", "better"]
    assert found.columns.tolist() == names and len(found) == 15 and set(found["architecture"]) == {"late"}
    by_name = found.set_index(["strategy", "modality_dropout", "where"])
    numbers = ["difference", "low", "high", "better"]
    # Of three draws at -1, 0 and 1 the 2.5th percentile is -0.95.
    some, whole = (by_name.loc["pseudo", "0", where] for where in (card.SOME_MISSING, card.ALL_THERE))
    assert some[numbers].tolist() == pytest.approx([0.035, 0.016, 0.054, sign])
    assert whole[numbers].tolist() == pytest.approx([-0.1, -0.119, -0.081, -sign])
    # What is owed to coping: the draws of both are off alike, so their difference is not.
    coping = by_name.loc["pseudo", "0", card.COPING]
    assert coping[numbers].tolist() == pytest.approx([0.135, 0.135, 0.135, sign])
    some, whole = (by_name.loc["neutral", "0", where] for where in (card.SOME_MISSING, card.ALL_THERE))
    assert some[numbers].tolist() == pytest.approx([-0.01, -0.2, 0.18, 0])
    assert whole[numbers].tolist() == pytest.approx([0.1, -0.09, 0.29, 0])
    # Against zero filling of the same dropout; zero filling with dropout against that without.
    assert by_name.loc[("pseudo", "0.3", card.SOME_MISSING), numbers].tolist() == pytest.approx([*[-0.06] * 3, -sign])
    assert by_name.loc[("pseudo", "0.3", card.ALL_THERE), numbers].tolist() == pytest.approx([0, 0, 0, 0])
    assert by_name.loc[("zero", "0.3", card.SOME_MISSING), numbers].tolist() == pytest.approx([*[-0.05] * 3, -sign])
    # An interval that begins at 0 holds it.
    assert by_name.loc[("neutral", "0.3", card.ALL_THERE), numbers].tolist() == pytest.approx([0, 0, 0.19, 0], abs=0)
    assert set(found.loc[found["strategy"] == "zero", "against"]) == {"zero, no modality dropout"}
    assert set(found.loc[found["strategy"] != "zero", "against"]) == {"zero"}


def test_contrasts_of_one_dropout_compare_no_zero_filling_with_itself():
    kept = {name: CONTRASTED[name] for name in ("zero_some", "pseudo_some")}
    found = card.contrasts({("macro_f1", CANAL): _points(**kept)}, metric="macro_f1", condition=CANAL)
    assert found["strategy"].tolist() == ["pseudo"] * 3


def test_shown_marks_intervals_that_do_not_hold_zero():
    compared = card.contrasts({("macro_auroc", card.ALL): _points(**CONTRASTED)}, metric="macro_auroc")
    found = card.shown(compared)
    assert found.columns.tolist() == [card.SOME_MISSING, card.ALL_THERE, card.COPING]
    assert found.index.tolist() == [
        ("late", "0", "pseudo", "zero"),
        ("late", "0", "neutral", "zero"),
        ("late", "0.3", "zero", "zero, no modality dropout"),
        ("late", "0.3", "pseudo", "zero"),
        ("late", "0.3", "neutral", "zero"),
    ]
    assert found.iloc[0].tolist() == [
        "+0.035 [+0.016, +0.054] *",
        "-0.100 [-0.119, -0.081] *",
        "+0.135 [+0.135, +0.135] *",
    ]
    assert found.iloc[1].tolist()[:2] == ["-0.010 [-0.200, +0.180]", "+0.100 [-0.090, +0.290]"]


def test_contrasts_of_an_undefined_metric_are_nan_and_of_nothing_empty():
    undefined = {key: (np.nan, np.full(3, np.nan)) for key in _points(**CONTRASTED)}
    found = card.contrasts({("macro_auroc", card.ALL): undefined}, metric="macro_auroc")
    assert len(found) == 15 and found[["difference", "low", "high"]].isna().all(axis=None) and not found["better"].any()
    assert "nan" in card.shown(found).iloc[0, 0]
    alone = {key: point for key, point in undefined.items() if key[1] == "zero" and key[2] == "0"}
    found = card.contrasts({("macro_auroc", card.ALL): alone}, metric="macro_auroc")
    assert found.empty and card.shown(found).empty and card.verdict(found) == []


def _compared(*rows):
    """Of "architecture rate strategy" the signs where something is missing, where all is there, and of coping."""
    names = ["architecture", "modality_dropout", "strategy"]
    records = [
        dict(zip(names, name.split())) | {"where": where, "better": sign}
        for name, *signs in rows
        for where, sign in zip(card.WHERE, signs, strict=True)
    ]
    return pd.DataFrame(records)


def test_verdict_says_how_each_strategy_did_where_something_is_missing_and_where_not():
    compared = _compared(
        ("joint 0.3 zero", 1, 1, 0),
        ("joint 0 pseudo", 1, 0, 1),
        ("joint 0.3 pseudo", 1, 0, 0),
        ("grouped 0 pseudo", 1, -1, 1),
        ("late 0 pseudo", -1, -1, 1),  # it loses less, which is no gain
        ("late 0 neutral", 0, 1, -1),
    )
    assert card.verdict(compared) == [
        "pseudo beside zero filling: better where something is missing, not told apart where all is there (joint 0, "
        "joint 0.3); better where something is missing, worse where all is there (grouped 0); worse where something is "
        "missing, worse where all is there (late 0); gains more where something is missing than where not: grouped 0, "
        "joint 0.",
        "neutral beside zero filling: not told apart where something is missing, better where all is there (late 0).",
    ]


def test_beyond_names_the_strongest_baseline_and_what_does_worse():
    rows = [
        ("prior", "any", 0.7, 1.1),
        ("level_share", "any", 0.6, 1.3),
        ("late zero 0", WHOLE, 0.8, 1.0),
        ("late zero 0", "t1", 0.65, 1.2),
        ("late zero 0", "t2", 0.5, 1.4),
    ]
    tables = [
        pd.DataFrame(
            [(name, subset, each[place]) for name, subset, *each in rows], columns=["variant", "modalities", "value"]
        ).assign(metric=metric, condition=card.ALL)
        for place, metric in enumerate(("macro_auroc", "weighted_log_loss"))
    ]
    report = pd.concat(tables)
    worse = ["late zero 0 on t2", "late zero 0 on t1"]
    assert card.beyond(report, metric="macro_auroc") == ("prior", 0.7, worse)
    assert card.beyond(report, metric="weighted_log_loss") == ("prior", 1.1, worse)


def test_refuse_too_few_wants_complete_studies_of_two_grades_in_every_split(cases, rows):
    assert card.refuse_too_few(rows, cases) is None
    for split in ("train", "valid", "test"):
        few = rows[~((rows["split"] == split) & rows["complete"])]
        with pytest.raises(ValueError, match=f"0 {split} studies have all of Sagittal T1, .* with another `seed`"):
            card.refuse_too_few(few, cases)
    mild = cases.found.studies.copy()
    mild[[name for name in data.TARGETS if "canal" in name]] = 0.0
    found = cases._replace(found=cases.found._replace(studies=mild))
    with pytest.raises(ValueError, match=rf"fewer than two kinds of \['{CANAL}'\]"):
        card.refuse_too_few(rows, found)


def test_groups_are_consecutive_blocks_of_the_targets():
    conditions = [condition for condition, number in zip(data.CONDITIONS, fused.GROUPS.values()) for _ in range(number)]
    assert [data.PLACES[target][0] for target in data.TARGETS] == conditions


def test_validation_losses_by_hand():
    cases = _cases(["valid 111", "train 111", "valid 111", "test 111", "valid 110", "train 111"])
    _graded(cases, 0, 0.0)
    _graded(cases, 2, 2.0)
    rows = fused.asked(cases)
    # The incomplete study and the test are answered as badly as can be, and have no say.
    exponents = {0: 1, 2: 2, 4: 20, 3: 20, 1: 20, 5: 20}
    told = {
        ("late", "zero", "0"): _knowing(
            cases, rows, lambda study, name: 0.5 ** (exponents[study] + 2 * (name != WHOLE and study in (0, 2)))
        ),
        ("late", "pseudo", "0.3"): _knowing(cases, rows, lambda study, _: 0.5 ** exponents[study]),
    }
    found = card.validation_losses(told, rows, cases)
    assert tuple(found.index.names) == fused.FACTORS and found.name == "weighted_log_loss"
    # (1 · 1 + 4 · 2) / 5 bits of the whole, two bits more of the six others.
    assert found["late", "zero", "0"] == pytest.approx((9 / 5 + 6 / 7 * 2) * LN2)
    assert found["late", "pseudo", "0.3"] == pytest.approx(9 / 5 * LN2)
    assert found.idxmin() == ("late", "pseudo", "0.3")


def test_validation_losses_weigh_conditions_alike_whatever_they_hold():
    cases = _cases(["train 111", "valid 111", "test 111", "valid 111"])
    rows = fused.asked(cases)
    told = _knowing(cases, rows, lambda *_: 0.5)
    of_canal = [name in data.targets_of(CANAL) for name in COLUMNS]
    told[:, of_canal] = _knowing(cases, rows, lambda *_: 0.125)[:, of_canal]
    key = ("late", "zero", "0")
    assert card.validation_losses({key: told}, rows, cases)[key] == pytest.approx((3 + 1 + 1) / 3 * LN2)
    positions = rows.index[(rows["split"] == "valid") & (rows["modalities"] == WHOLE)]
    y = cases.found.studies[COLUMNS].to_numpy()[rows["study"][positions]]
    coin = np.random.default_rng(0).dirichlet(np.ones(3), (4, 25))[rows["study"]]
    each = [
        grades.weighted_log_loss(y[:, columns].ravel(), coin[positions][:, columns].reshape(-1, 3))
        for columns in (slice(0, 5), slice(5, 15), slice(15, 25))
    ]
    assert card.validation_losses({key: coin}, rows, cases)[key] == pytest.approx(np.mean(each), rel=1e-9)


def test_validation_losses_without_a_complete_validation_study_are_refused():
    cases = _cases(["train 111", "valid 110", "test 111"])
    rows = fused.asked(cases)
    with pytest.raises(ValueError, match="no validation study has all modalities"):
        card.validation_losses({("late", "zero", "0"): _even(rows)}, rows, cases)


@pytest.mark.parametrize(
    ("architecture", "groups"), [("late", ["canal", "foraminal", "subarticular"]), ("joint", ["all targets"])]
)
def test_weights_of_are_the_means_over_complete_test_studies(cases, rows, tiny, architecture, groups):
    keras.utils.set_random_seed(0)
    model = fused.build_model(tiny, (architecture, "dynamic", "0.3"), cases)
    found = card.weights_of(model, rows, cases)
    assert len(found) == 7 * len(groups) * 3 and found["group"].unique().tolist() == groups
    assert found["modalities"].unique().tolist() == SUBSETS
    assert found["modality"].unique().tolist() == ["t1", "t2", "axial"]
    sums = found.groupby(["modalities", "group"])["weight"].sum()
    np.testing.assert_allclose(sums, 1, rtol=1e-6)
    hidden = [modality not in text.split(" + ") for text, modality in zip(found["modalities"], found["modality"])]
    assert (found.loc[hidden, "weight"] == 0).all() and (found.loc[~np.array(hidden), "weight"] > 0).all()
    studies = np.array([0, 8])  # the two test studies that lack nothing
    shown = np.array([[True, True, False]] * 2)
    weights = modalities.strategy_parts(model).predict(fused.inputs(cases, studies, shown), verbose=0)["coped"]
    of_subset = found[found["modalities"] == "t1 + t2"]["weight"].to_numpy().reshape(len(groups), 3)
    np.testing.assert_allclose(of_subset, weights.mean(axis=0), rtol=1e-5)


def test_explained_by_hand(cases, rows, monkeypatch):
    """Complete training studies have 1 on average; the complete test studies 0 and 8 have 2 and 5."""
    own = np.ones((len(STUDIES), 3, 4))
    own[[0, 8]] = np.array([2.0, 5.0])[:, None, None]
    learnt = [study for study in cases.part.train if cases.present[study].all()]
    own[learnt[0]], own[learnt[1]] = -7, 9
    own[[3, 9, 14]] = 100  # training studies that lack something

    def telling(share):
        """Predict what is hidden so far from the mean, 1, to the truth."""

        def answer(parts, cases_, asked, **_):
            assert parts == "parts" and cases_ is cases
            shown = np.stack(list(fused.subsets().values()))[asked["shown"]][..., None]
            truth = own[asked["study"]]
            vectors = np.where(shown, truth, 1000)  # which say nothing where a modality is hidden
            return {"vectors": vectors, "coped": np.where(shown, truth, 1 + share * (truth - 1))}

        return answer

    monkeypatch.setattr(modalities, "strategy_parts", lambda _: "parts")
    for share, expected in ((1, 1), (0, 0), (0.5, 0.75), (-1, -3)):
        monkeypatch.setattr(fused, "answer", telling(share))
        found = card.explained(None, rows, cases)
        pairs = list(zip(found["seen"], found["predicted"]))
        assert pairs == [
            *(("t1 + t2", "axial"), ("t1 + axial", "t2"), ("t2 + axial", "t1")),
            *(("t1", "t2"), ("t1", "axial"), ("t2", "t1"), ("t2", "axial"), ("axial", "t1"), ("axial", "t2")),
        ]
        assert found["explained"].tolist() == pytest.approx([expected] * 9, abs=1e-12)


def test_explained_reads_the_parts_of_a_trained_network(trained):
    cases, rows, _, found = trained
    told = card.explained(keras.saving.load_model(found.folder / "model.keras"), rows, cases)
    assert len(told) == 9 and (told["explained"] < 1).all() and np.isfinite(told["explained"]).all()


def test_explained_without_complete_training_studies_is_undefined(trained):
    cases, rows, _, found = trained
    few = rows[(rows["split"] != "train") | ~rows["complete"]].reset_index(drop=True)
    assert card.explained(keras.saving.load_model(found.folder / "model.keras"), few, cases)["explained"].isna().all()


# --- many studies ----------------------------------------------------------------------------------------------------


LEARNT = [
    ("joint", "zero", "0"),
    ("grouped", "neutral", "0.3"),
    ("late", "dynamic", "0.3"),
    ("grouped", "pseudo", "0.3"),
]
TELLING = 2  # the modality whose vectors hold the grades: axial


def _planted(count, seed=0):
    """Studies graded alike at a level, whose axial vectors hold the five grades; other vectors are noise."""
    rng = np.random.default_rng(seed)
    series = (rng.random((count, 3)) > 0.07).astype(int)  # a fifth of the studies lacks something
    series[~series.any(axis=1), 0] = 1
    split = np.resize(["train"] * 8 + ["valid"] * 2 + ["test"] * 10, count)
    described = [f"{name} {''.join(map(str, each))}" for name, each in zip(split, series)]
    cases = _cases(described, width=len(data.LEVELS) + 3, seed=seed)
    told = rng.choice([0.0, 1.0, 2.0], (count, len(data.LEVELS)), p=[0.5, 0.3, 0.2])
    for place, level in enumerate(data.LEVELS):
        for name in COLUMNS:
            if name.endswith(level):
                cases.found.studies[name] = told[:, place]
    study, slice_ = np.nonzero(cases.bags[:, TELLING] >= 0)
    noise = 0.5 * rng.normal(size=(len(study), told.shape[1]))
    cases.features.values[cases.bags[study, TELLING, slice_], : told.shape[1]] = 2 * (told[study] - 1) + noise
    return cases


def _learn(cases, run):
    """Macro AUROC of each network and subset, the mean over the conditions."""
    sizes = {"width": 16, "attention_units": 8, "units": 32, "dropout": 0.0, "batch_size": 16, "pseudo_epochs": 5}
    config, rows = _config(**sizes, epochs=12, learning_rate=0.01), fused.asked(cases)
    told = {key: fused.fit(config, key, cases, rows, run=run).told for key in LEARNT}
    points = _score(told, rows, cases, num_draws=2)["macro_auroc", card.ALL]
    return pd.Series({key: value for key, (value, _) in points.items()}).rename_axis([*fused.FACTORS, "modalities"])


@pytest.mark.slow
def test_shuffled_grades_are_not_told_from_any_subset_by_any_network(tmp_path):
    cases = _planted(600)
    shuffled = cases.found.studies[COLUMNS].to_numpy()[np.random.default_rng(7).permutation(600)]
    cases.found.studies[COLUMNS] = shuffled
    found = _learn(cases, tmp_path)
    # Three standard errors of 240 studies with five grades each: 0.05.
    assert len(found) == len(LEARNT) * 7 and (found - 0.5).abs().max() < 0.06, found


@pytest.mark.slow
def test_grades_planted_in_one_modality_are_told_where_it_is_shown_and_nowhere_else(tmp_path):
    found = _learn(_planted(600), tmp_path)
    shown = np.array(["axial" in text for text in found.index.get_level_values("modalities")])
    assert shown.sum() == len(LEARNT) * 4
    assert found[shown].min() > 0.8, found
    assert (found[~shown] - 0.5).abs().max() < 0.06, found


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Both notebooks on the made set, the earlier one with no more than is read of it: run, earlier run, home."""
    home = tmp_path_factory.mktemp("smoke")
    given = {"models_root": str(home / "models")}
    little = {"methods": ["average"], "normalisations": ["gsl"], "classifiers": ["svc"], "samplings": ["weighted"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERASMED_CACHE", str(home / "cache"))
        found = []
        for name, changes in (
            (EARLIER, {**little, "projection": 0, "impute_labels": False}),
            (NOTEBOOK, {}),
        ):
            notebook = notebooks.describe(name)
            run, executed = notebooks.run(notebook, notebooks.resolve(notebook, profile="smoke", given=given | changes))
            assert executed
            found.append(run)
    return found[1], found[0], home


@pytest.mark.slow
def test_smoke_run_leaves_a_report_card_of_every_network_and_subset(smoke):
    run, _, _ = smoke
    names = {path.name for path in run.iterdir()}
    assert names >= {"model.keras", "encoder.keras", "answers.json", "history.csv", "predictions.csv", "submission.csv"}
    assert names >= {"audit.csv", "quarantine.csv", "split.csv", "report_card.csv", "contrasts.csv", "metrics.json"}
    table = pd.read_csv(run / "report_card.csv", keep_default_na=False)
    networks = table[table["modalities"] != "any"]
    each = networks.groupby(["metric", "condition", "modalities"])["variant"]
    assert len(each) == 3 * 4 * 7 and (each.nunique() == 12).all() and len(networks) == 12 * 7 * 4 * 3
    assert set(networks["modalities"]) == set(SUBSETS)
    baselines = table[table["modalities"] == "any"]
    assert len(baselines) == 6 * 4 * 3 and baselines["variant"].nunique() == 6
    assert pd.to_numeric(networks["value"]).between(0, 2).all()  # log loss of an even answer: log 3
    assert pd.to_numeric(baselines["value"]).between(0, 35).all()  # and of a wrong one that is sure: -log 1e-15
    held_to = pd.to_numeric(networks["difference"], errors="coerce")
    assert (held_to.isna() == (networks["strategy"] == "zero")).all()
    compared = pd.read_csv(run / "contrasts.csv", dtype={"modality_dropout": str})
    # In each of 3 architectures 3 strategies, beside zero filling; in every place.
    assert (compared.groupby("metric").size() == 3 * 3 * len(card.WHERE)).all() and compared["metric"].nunique() == 3
    variants = {path.name for path in (run / "variants").iterdir()}
    assert len(variants) == 12 and runs.read_json(run / "answers.json")["variant"] in variants


@pytest.mark.slow
def test_smoke_run_keeps_the_earlier_split_and_answers_each_test_study(smoke):
    run, earlier, _ = smoke
    # The mean alone needs no network.
    assert not (earlier / "model.keras").exists() and not (earlier / "history.csv").exists()
    headline = runs.read_json(earlier / "metrics.json")["headline"]
    assert {row["variant"] for row in headline} == {"average gsl weighted svc"} and len(headline) == 4
    split, before = (
        pd.read_csv(each / "split.csv", dtype=str).drop_duplicates(["study_id", "split"]) for each in (run, earlier)
    )
    split, before = (each.set_index("study_id")["split"] for each in (split, before))
    assert split.index.is_unique and split.sort_index().equals(before.sort_index())
    assert set(split) == {"train", "valid", "test"}
    test = set(split.index[split == "test"])
    told = pd.read_csv(run / "predictions.csv", dtype={"study_id": str}, keep_default_na=False)
    assert (told.groupby("study_id").size() == 25).all() and (told["split"] == told["study_id"].map(split)).all()
    submitted = pd.read_csv(run / "submission.csv", dtype={"row_id": str})
    per_study = submitted["row_id"].str.partition("_")[0].value_counts()
    assert set(per_study.index) == test and (per_study == 25).all()
    of_test = data.submission(told[told["split"] == "test"]).set_index("row_id").loc[submitted["row_id"]]
    np.testing.assert_allclose(submitted.set_index("row_id"), of_test, rtol=1e-6)
    model = keras.saving.load_model(run / "model.keras")
    assert model.output_shape == (None, 25, 3)


@pytest.mark.slow
def test_smoke_run_writes_a_headline_with_baselines_and_every_figure_of_the_notebook(smoke):
    run, _, _ = smoke
    content = runs.read_json(run / "metrics.json")
    assert [row["metric"] for row in content["headline"]] == ["macro_auroc"] * 3 + ["competition"]
    for row in content["headline"]:
        assert np.isfinite(row["value"]) and np.isfinite(row["baseline"]["value"]) and row["split"] == "test"
    assert content["chosen_by"]["split"] == "valid" and np.isfinite(content["chosen_by"]["value"])
    cells = runs.read_json(notebooks.describe(NOTEBOOK).path)["cells"]
    source = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    named = re.findall(r'save_figure\(\s*run, figure, f?"([^"]+)"\)', source)
    assert len(named) == source.count("save_figure(") >= 5
    written = {path.stem: path for path in (run / "figures").glob("*.png")}
    patterns = [re.sub(r"\\{.*?\\}", ".+", re.escape(name)) for name in named]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in written), pattern
    assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in written)
    assert {f"{what}-{name}" for what in ("model", "weights") for name in modalities.ARCHITECTURES} <= set(written)
    assert all(path.stat().st_size > 5000 for path in written.values())


@pytest.mark.slow
def test_smoke_run_is_found_finished_and_predicts_as_it_told(smoke, monkeypatch):
    run, earlier, home = smoke
    monkeypatch.setenv("KERASMED_CACHE", str(home / "cache"))
    notebook = notebooks.describe(NOTEBOOK)
    parameters = notebooks.resolve(notebook, profile="smoke", given={"models_root": str(home / "models")})
    assert notebooks.run(notebook, parameters) == (run, False)
    assert runs.read_json(run / "params.json")["from_run"] == str(earlier)
    source = datasets.locate("lumbar", parameters)
    told = pd.read_csv(run / "predictions.csv", dtype={"study_id": str}, keep_default_na=False)
    study = told.loc[told["split"] == "test", "study_id"].iloc[0]
    found = lumbar.predict(run, source.root / "lumbar" / "train_images" / study, progress=False)
    expected = data.submission(told[told["study_id"] == study])
    assert found["row_id"].tolist() == expected["row_id"].tolist()
    names = ["normal_mild", "moderate", "severe"]
    np.testing.assert_allclose(found[names], expected[names], atol=1e-5)  # another batch is summed in another order
