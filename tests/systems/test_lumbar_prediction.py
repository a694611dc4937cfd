"""`kerasmed predict lumbar`: which studies and series are found, and that they are answered as training answered."""

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from kerasmed import datasets, environment, runs
from kerasmed.cli import main
from kerasmed.datasets import lumbar as data
from kerasmed.systems import lumbar
from kerasmed.systems.lumbar import embedded, fused, prediction, shared

NOTEBOOK = "03_lumbar_fusion"
TOLD = ["normal_mild", "moderate", "severe"]
TRAIN, TEST = "train_series_descriptions.csv", "test_series_descriptions.csv"
T1, T2, AXIAL = data.MODALITIES
SIZE = (40, 36)


class Made(NamedTuple):
    """A run folder, and what it was made of."""

    run: Path
    home: Path  # of the synthetic set: tables and train_images
    cases: fused.Cases
    expected: pd.DataFrame  # normal_mild, moderate, severe by row_id: the run's predictions.csv

    @property
    def images(self):
        return self.home / "train_images"


def _slice_encoder():
    picture = keras.Input((*SIZE, 1), dtype="uint8")
    x = keras.layers.Rescaling(1 / 128, offset=-1)(picture)
    x = keras.layers.Conv2D(6, 5, strides=3, activation="relu")(x)
    return keras.Model(picture, keras.layers.GlobalAveragePooling2D()(x), name="encoder")


def _volume_encoder():
    volume = keras.Input((8, 16, 16, 1), dtype="uint8")
    x = keras.layers.Rescaling(1 / 128, offset=-1)(volume)
    x = keras.layers.Conv3D(6, 3, strides=2, activation="relu")(x)
    return keras.Model(volume, keras.ops.mean(x, axis=(2, 3)), name="encoder")


def _make(home, root, method, *, normalisation, architecture):
    """Leave what a run of the notebook leaves, with networks of random weights."""
    environment.setup(seed=0)
    origin_run, source = home / "origin", datasets.Source(root, "synthetic")
    options = {"image_size": list(SIZE), "normalisations": ["gsl", "hist"], "window": True}
    found = shared.read(source, **options, max_quarantined_share=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "slice_encoder", lambda *_: (_slice_encoder(), {}))
        patch.setattr(embedded, "volume_encoder", lambda *_: (_volume_encoder(), {}))
        config = SimpleNamespace(encode_batch_size=16)
        embedded.encode(config, found, [], method, normalisation, run=origin_run)
    split = np.resize(["train", "train", "valid", "test"], len(found.studies))
    runs.write_table(origin_run / "split.csv", found.studies[["study_id"]].assign(split=split))
    kind = "planes" if method == "medicalnet" else "slices"
    vectors = origin_run / "features" / f"{kind}-{normalisation}"
    origin = fused.Origin(origin_run, options, vectors, normalisation)
    sizes = {"width": 8, "attention_units": 4, "units": 8, "dropout": 0.5, "l2": 0.0}
    config = SimpleNamespace(max_quarantined_share=0.0, vectors=kind, **sizes)
    cases = fused.read(config, source, origin)
    key = (architecture, "pseudo", "0.3")
    rows, model = fused.asked(cases), fused.build_model(config, key, cases)
    for layer in model.layers:  # as random weights answer nearly the same of any study
        if layer.name.endswith("_scores"):
            layer.kernel.assign(30 * layer.kernel)
    told = fused.answer(model, cases, rows)
    parameters = {"profile": "demo", "seed": 0}
    machine = {"fingerprint": "x", "data_source": "synthetic", "environment": {}, "models_root": home / "models"}
    run = runs.start("lumbar", NOTEBOOK, parameters, **machine)
    folder = runs.variant_folder(run, "-".join(key))
    runs.write_model(folder / "model.keras", model)
    runs.write_table(folder / "history.csv", pd.DataFrame({"epoch": [1]}))
    runs.write_table(folder / "predictions.csv", fused.as_is(cases, rows, told))
    fused.keep(config, origin, fused.Fused(folder, None, told), run=run)
    runs.set_status(run, "complete")
    known = pd.read_csv(run / "predictions.csv", dtype={"study_id": str}, keep_default_na=False)
    return Made(run, root / "lumbar", cases, data.submission(known).set_index("row_id"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A set of 18 studies, more than are read at once, some of which lack a modality or have two series of one."""
    home = tmp_path_factory.mktemp("set") / "set"
    return datasets.write_synthetic("lumbar", home, studies=18, image_side=(48, 50), missing_share=0.25)


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERASMED_CACHE", str(root.parent / "cache"))
        yield _make(home, root, "average", normalisation="gsl", architecture="grouped")


@pytest.fixture
def asked(made, tmp_path):
    """Function of study ids -> a folder of copies of those studies, without a table."""

    def copy(*studies, folder="asked"):
        for study in studies:
            shutil.copytree(made.images / study, tmp_path / folder / study)
        return tmp_path / folder

    return copy


def _described(made, **changes):
    """The set's table, series_description by series id changed."""
    table = pd.read_csv(made.home / TRAIN, dtype=str)
    kinds = [changes.get(name, kind) for name, kind in zip(table["series_id"], table["series_description"])]
    return table.assign(series_description=kinds)


def _series(made, study, modality):
    table = _described(made)
    return table.query("study_id == @study and series_description == @modality")["series_id"].tolist()


def _complete(made):
    """Ids of studies that have all modalities, in order."""
    return made.cases.found.studies["study_id"][made.cases.present.all(axis=1)].tolist()


def _same(table, made):
    """Whether the answers of some studies are those of the run."""
    expected = made.expected.loc[table["row_id"], TOLD].to_numpy()
    return np.abs(table[TOLD].to_numpy() - expected).max() < 1e-5


def _call(made, path, out, *others):
    arguments = ["predict", "lumbar", path, "--run", made.run, "--out", out, *others]
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# --- the answers of the run ------------------------------------------------------------------------------------------


def test_predict_of_the_training_set_gives_the_predictions_of_the_run_and_leaves_nothing(made, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    table = lumbar.predict(made.run, made.home, progress=False)
    assert table.columns.tolist() == ["row_id", *TOLD, "study_path", "modalities", "error"]
    studies = made.cases.found.studies["study_id"]
    assert table["row_id"].tolist() == [
        f"{study}_{name}" for study in sorted(studies, key=int) for name in data.TARGETS
    ]
    assert len(studies) == 18 > prediction._AT_ONCE and set(table["error"]) == {""} and _same(table, made)
    # Each target's answers differ between studies, so that one study's for another's would be noticed.
    target = made.expected.index.str.replace("^[0-9]+_", "", regex=True)
    assert made.expected.groupby(target)[TOLD].std().min(axis=None) > 0.01
    beside = table.iloc[::25].set_index(table["row_id"].iloc[::25].str.partition("_")[0])
    for study, present in zip(studies, made.cases.present):
        shown = [name for name, is_there in zip(("t1", "t2", "axial"), present) if is_there]
        assert beside.at[study, "modalities"] == " + ".join(shown)
        assert beside.at[study, "study_path"] == f"train_images/{study}"
    assert (~made.cases.present.all(axis=1)).sum() >= 2 and (made.cases.found.studies[list(data.MODALITIES)] > 1).any(
        axis=None
    )
    # Nothing in the cache, nor among temporary files.
    assert not (tmp_path / "cache").exists() and not list((tmp_path / "temporary").iterdir())


def test_predict_from_planes_after_histogram_equalisation_equals_the_run(root, tmp_path, monkeypatch):
    monkeypatch.setenv("KERASMED_CACHE", str(root.parent / "cache"))
    made = _make(tmp_path, root, "medicalnet", normalisation="hist", architecture="late")
    assert runs.read_json(made.run / "answers.json")["vectors"] == "planes"
    table = lumbar.predict(made.run, made.images, progress=False)
    assert len(table) == 18 * 25 and set(table["error"]) == {""} and _same(table, made)


def test_predict_does_not_depend_on_what_else_is_asked(made, asked):
    study = _complete(made)[0]
    folder = asked(study)
    _described(made).to_csv(folder / TRAIN, index=False)
    table = lumbar.predict(made.run, folder, progress=False)
    assert table["study_path"].tolist() == [study] * 25 and _same(table, made)


# --- what is found ---------------------------------------------------------------------------------------------------


def test_gather_finds_the_same_study_from_every_folder_that_may_be_named(made, asked, tmp_path, monkeypatch):
    study = _complete(made)[0]
    layout = tmp_path / "layout"
    home = asked(study, folder="layout/test_images")
    _described(made).to_csv(layout / TEST, index=False)
    (home / ".hidden/1").mkdir(parents=True)
    (home / "figures").mkdir()
    for path, root, name in (
        (layout, layout, f"test_images/{study}"),
        (home, home, study),
        (home / study, home, study),
        (home / study / ".." / study, home, study),
    ):
        found = prediction.gather(path)
        assert found[0] == root and [each.path for each in found[1]] == [name]
        assert [modality for _, modality in found[1][0].series] == list(data.MODALITIES) and not found[1][0].reasons
    monkeypatch.chdir(home / study)
    assert prediction.gather(".") == found


def test_gather_takes_the_nearest_table(made, asked):
    study = _complete(made)[0]
    folder = asked(study)
    series_id = _series(made, study, T1)[0]
    places = (folder.parent, folder, folder / study)
    for number, place in enumerate(places):
        _described(made, **{series_id: f"kind {number}"}).to_csv(place / TRAIN, index=False)
        (described,) = prediction.gather(folder / study)[1]
        assert described.reasons == [
            f"{study}/{series_id}: described as 'kind {number}', none of Sagittal T1, Sagittal T2/STIR, Axial T2"
        ]


def test_gather_of_a_linked_folder_finds_the_table_on_either_side(made, asked, tmp_path):
    study = _complete(made)[0]
    folder = asked(study, folder="far/images")
    (tmp_path / "near").mkdir()
    os.symlink(folder, tmp_path / "near/linked")
    for place in (tmp_path / "near", tmp_path / "far"):
        _described(made).to_csv(place / TRAIN, index=False)
        for path in (tmp_path / "near/linked", tmp_path / "near/linked" / study):
            (found,) = prediction.gather(path)[1]
            assert found.study_id == study and len(found.series) == 3
        (place / TRAIN).unlink()


def test_gather_orders_series_as_training_does(made):
    _, studies = prediction.gather(made.images)
    manifest = data.read(made.home.parent)
    pairs = [(study.study_id, *pair) for study in studies for pair in study.series]
    assert pairs == list(zip(manifest["study_id"], manifest["series_id"], manifest["modality"]))
    assert any(len({modality for _, modality in study.series}) < len(study.series) for study in studies)


def test_read_tables_joins_both_tables_and_refuses_a_contradiction(tmp_path):
    words = "study_id,series_id,series_description\n"
    (tmp_path / TRAIN).write_text(words + "1,10,Axial T2\n2,20,Axial T2\n")
    (tmp_path / TEST).write_text(words + "2,20,Axial T2\n2,21,Sagittal T1\n")
    (tmp_path / f"._{TRAIN}").write_bytes(b"\0")
    described, names = prediction.read_tables([tmp_path / "none", tmp_path])
    assert described == {"1": {"10": "Axial T2"}, "2": {"20": "Axial T2", "21": "Sagittal T1"}}
    assert names == f"{TEST} and {TRAIN}"
    (tmp_path / TEST).write_text(words + "2,20,Sagittal T1\n")
    with pytest.raises(ValueError, match=r"describe 1 series differently; correct one of them. First: \['2/20'\]"):
        prediction.read_tables([tmp_path])


def test_gather_without_a_table_says_where_it_looked_and_shows_a_line(made, asked):
    folder = asked(_complete(made)[0])
    with pytest.raises(FileNotFoundError, match="44036939,2828203845,Sagittal T1") as caught:
        prediction.gather(folder)
    assert f"in {folder} or {folder.parent}, and" in str(caught.value)


def test_gather_of_folders_without_series_says_what_was_expected(made, tmp_path):
    study = made.images / _complete(made)[0]
    (tmp_path / "empty/train_images/1/2").mkdir(parents=True)
    one = next(study.iterdir())
    for path in (tmp_path / "empty", one, made.home.parent):
        with pytest.raises(FileNotFoundError, match="no series below .*expected a folder of studies"):
            prediction.gather(path)
    for path in (tmp_path / "typo", next(one.iterdir())):
        with pytest.raises(FileNotFoundError, match="is no folder; expected a folder of studies"):
            prediction.gather(path)


def test_gather_study_in_two_folders_is_taken_once_and_says_so(made, asked, tmp_path):
    study = _complete(made)[0]
    asked(study, folder="layout/test_images")
    asked(study, folder="layout/train_images")
    _described(made).to_csv(tmp_path / "layout" / TRAIN, index=False)
    (found,) = prediction.gather(tmp_path / "layout")[1]
    assert found.path == f"test_images/{study}"
    assert found.reasons == [f"train_images/{study}: left out, for it is read from test_images/{study}"]


# --- what is wrong with a study --------------------------------------------------------------------------------------


def test_predict_study_lacking_modalities_equals_the_run_with_them_hidden(made, asked):
    study = _complete(made)[0]
    folder = asked(study)
    for modality in (T1, AXIAL):
        for name in _series(made, study, modality):
            shutil.rmtree(folder / study / name)
    _described(made).query("series_description == @T2").to_csv(folder / TRAIN, index=False)
    table = lumbar.predict(made.run, folder, progress=False)
    assert set(table["modalities"]) == {"t2"} and set(table["error"]) == {""}
    row = np.flatnonzero(made.cases.found.studies["study_id"] == study)
    inputs = fused.inputs(made.cases, row, np.array([[False, True, False]]))
    told = keras.saving.load_model(made.run / "model.keras").predict(inputs, verbose=0)[0]
    np.testing.assert_allclose(table[TOLD], told, atol=1e-5)  # another batch is summed in another order
    assert not _same(table, made)


def test_predict_bad_studies_are_named_and_do_not_stop_the_others(made, asked, monkeypatch):
    good, broken, cut, unknown, empty, closed = _complete(made)[:6]
    folder = asked(good, broken, cut, unknown, empty, closed)
    for file in (folder / broken).rglob("*.dcm"):
        file.write_bytes(b"not an image")
    (axial,) = _series(made, cut, AXIAL)
    first = min((folder / cut / axial).iterdir())
    first.write_bytes(b"")
    for name in _series(made, empty, T1):
        (folder / empty / name / "notes.txt").write_text("no image")
    for file in (folder / empty).rglob("*.dcm"):
        file.unlink()
    table = _described(made).query("study_id != @unknown")
    table.to_csv(folder / TRAIN, index=False)
    listed = data.list_series

    def refuse(home, studies):
        if studies == [closed]:
            raise PermissionError(13, "Permission denied", "secret")
        return listed(home, studies)

    monkeypatch.setattr(data, "list_series", refuse)
    found = lumbar.predict(made.run, folder, progress=False).set_index("study_path")
    assert found.index.unique().tolist() == sorted([good, broken, cut, unknown, empty, closed], key=int)
    answered = found[TOLD].notna().all(axis=1)
    assert set(found.index[answered]) == {good, cut} and (answered | found[TOLD].isna().all(axis=1)).all()
    assert _same(found.loc[good], made) and set(found.loc[good, "error"]) == {""}
    errors = found["error"].groupby(level=0).unique()
    assert errors.map(len).eq(1).all()
    errors = errors.str[0]
    name = _series(made, broken, T1)[0]
    count = len(list((folder / broken / name).iterdir()))
    assert errors[broken].startswith(f"{broken}/{name}: none of its {count} files is readable; {broken}/{name}/1.dcm: ")
    assert f"and {count - 3} more files of {broken}/{name}" in errors[broken]
    assert errors[cut] == f"{cut}/{axial}/{first.name}: empty file (0 bytes)"
    assert set(found.loc[cut, "modalities"]) == {"t1 + t2 + axial"}
    assert f"{unknown}/{_series(made, unknown, T2)[0]}: not described by {TRAIN}" in errors[unknown]
    assert errors[unknown].count("not described") == 3
    assert errors[empty].count(f"described by {TRAIN}, but no .dcm file of it is there") == 3
    assert errors[closed] == f"{closed}: PermissionError: Permission denied"
    assert set(found.loc[[broken, unknown, empty, closed], "modalities"]) == {""}


def test_predict_series_of_another_kind_are_named_and_the_rest_is_answered(made, asked):
    study = _complete(made)[0]
    folder = asked(study)
    (series_id,) = _series(made, study, T1)
    shutil.copytree(folder / study / series_id, folder / study / "9999999999")
    _described(made, **{series_id: "Sagittal PD"}).to_csv(folder / TEST, index=False)
    table = lumbar.predict(made.run, folder, progress=False)
    assert set(table["modalities"]) == {"t2 + axial"} and table[TOLD].notna().all(axis=None)
    kinds = ", ".join(data.MODALITIES)
    assert set(table["error"]) == {
        f"{study}/{series_id}: described as 'Sagittal PD', none of {kinds}; {study}/9999999999: not described by {TEST}"
    }


def test_predict_reads_a_longer_bag_than_any_in_training_whole(made, asked):
    study = _complete(made)[0]
    folder = asked(study)
    ((name,), places) = _series(made, study, T2), made.cases.bags.shape[2]
    depth = len(list((folder / study / name).iterdir()))
    added = [f"{number}" for number in range(1, 6)]  # these stand before the series that they are copies of
    for copy in added:
        shutil.copytree(folder / study / name, folder / study / copy)
    rows = [{"study_id": study, "series_id": each, "series_description": T2} for each in added]
    pd.concat([_described(made), pd.DataFrame(rows)]).to_csv(folder / TRAIN, index=False)
    table = lumbar.predict(made.run, folder, progress=False)
    assert 6 * depth > places and set(table["error"]) == {""}
    (row,) = np.flatnonzero(made.cases.found.studies["study_id"] == study)
    own = made.cases.bags[row, 1][made.cases.bags[row, 1] >= 0]
    bags = np.pad(made.cases.bags[[row]], ((0, 0), (0, 0), (0, 6 * depth - places)), constant_values=-1)
    bags[0, 1] = np.tile(own, 6)
    inputs = fused.inputs(made.cases._replace(bags=bags), np.array([0]))
    told = keras.saving.load_model(made.run / "model.keras").predict(inputs, verbose=0)[0]
    np.testing.assert_allclose(table[TOLD], told, atol=1e-5)  # another batch is summed in another order


def test_predict_with_a_run_of_another_notebook_says_what_is_absent(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no model.keras, encoder.keras, answers.json; expected a complete"):
        lumbar.predict(tmp_path, made.home, progress=False)


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_export_compares_both_networks_on_series_of_the_test_studies(made, root, tmp_path):
    pytest.importorskip("tf2onnx")
    run = tmp_path / made.run.name
    shutil.copytree(made.run, run)
    ids = made.cases.found.studies["study_id"]
    rows = pd.DataFrame({"image_path": "", "patient_id": "", "study_id": ids, "group_id": ids, "split": "train"})
    rows.loc[made.cases.part.asked, "split"] = "test"
    runs.write_table(run / "split.csv", rows)
    hashes = {path.relative_to(run).as_posix(): runs.file_hash(path) for path in run.rglob("*.keras")}
    runs.write_json(run / "metrics.json", {"headline": [], "rows": [], "weights": hashes})
    result = CliRunner().invoke(main, ["export", str(run), "--format", "onnx", "--data-root", str(root)])
    assert result.exit_code == 0, result.output
    parity = {each["network"]: each for each in runs.read_json(run / "export/onnx/parity.json")["networks"]}
    assert set(parity) == {"encoder", "model"} and parity["model"]["pixels"].startswith("series of ")
    # The samples are what the run answered: the same studies' grades, in the order of the studies.
    assert f"in this order, {', '.join(shared.TARGETS)}" in lumbar.exported_networks(run)[1].answer
    samples, _ = lumbar.exported_samples(run, root)
    told = keras.saving.load_model(run / "model.keras").predict_on_batch(samples["model"])
    asked = rows.loc[rows["split"] == "test", "study_id"].tolist()
    matching = [
        study
        for study in asked
        for answer in told
        if np.allclose(made.expected.loc[[f"{study}_{name}" for name in shared.TARGETS], TOLD], answer, atol=1e-5)
    ]
    assert len(matching) == len(told) == parity["model"]["rows"] >= 2 and set(matching) <= set(asked)


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_writes_a_submission_that_is_read_back(made, asked, tmp_path):
    studies, out = _complete(made)[:2], tmp_path / "told.csv"
    folder = asked(*studies)
    _described(made).to_csv(tmp_path / TRAIN, index=False)
    done = _call(made, folder, out)
    assert done.exit_code == 0, done.output
    assert f"2 of 2 studies predicted with {made.run.name}, written to {out}" in done.output
    assert "not read" not in done.output and "trained on synthetic data" in done.output
    read = data.read_submission(out)
    assert read["study_id"].unique().tolist() == sorted(studies, key=int) and len(read) == 50
    known = made.expected.loc[pd.read_csv(out)["row_id"], TOLD]
    np.testing.assert_allclose(read[[f"p_{grade}" for grade in data.GRADES]], known, atol=1e-5)


def test_command_counts_studies_names_bad_ones_and_exits_with_1_where_none_is_told(made, asked, tmp_path):
    (good, cut, bad), out = _complete(made)[:3], tmp_path / "told.csv"
    folder = asked(good, cut, bad)
    _described(made).to_csv(folder / TRAIN, index=False)
    for file in (folder / bad).rglob("*.dcm"):
        file.write_bytes(b"")
    next((folder / cut).rglob("1.dcm")).write_bytes(b"")
    done = _call(made, folder, out)
    assert done.exit_code == 0 and "2 of 3 studies predicted" in done.output
    assert done.output.count(f"  not read: {bad}: ") == 1 == done.output.count(f"  not read in full: {cut}: ")
    assert pd.read_csv(out)["normal_mild"].isna().sum() == 25
    done = _call(made, folder / bad, out)
    assert done.exit_code == 1 and "0 of 1 studies predicted" in done.output
    table = pd.read_csv(out)
    assert len(table) == 25 and table[TOLD].isna().all(axis=None) and table["error"].notna().all()


def test_command_without_series_or_table_exits_with_2_and_writes_nothing(made, asked, tmp_path):
    out = tmp_path / "told.csv"
    done = _call(made, asked(_complete(made)[0]), out)
    assert done.exit_code == 2 and "there is no table *series_descriptions.csv" in " ".join(done.output.split())
    (tmp_path / "empty").mkdir()
    done = _call(made, tmp_path / "empty", out)
    assert done.exit_code == 2 and "there is no series below" in done.output and not out.exists()
