"""The lumbar system: what is learnt from, what is asked, and what comes out."""

import dataclasses
import json
import re
import zipfile

import keras
import numpy as np
import pandas as pd
import pytest

from kerasmed import (
    audit,
    backbones,
    classifiers,
    datasets,
    environment,
    medicalnet,
    metrics,
    notebooks,
    runs,
    series,
    training,
)
from kerasmed.datasets import lumbar as data
from kerasmed.embeddings import Features
from kerasmed.parameters import names_of
from kerasmed.pipelines import Store
from kerasmed.series import Volumes
from kerasmed.systems.lumbar import embedded, grid, results, shared
from kerasmed.systems.lumbar.config import Config

CANAL, FORAMINAL, SUBARTICULAR = data.CONDITIONS
NOTEBOOK = "02_lumbar_embeddings"


def _config(**changes):
    parameters = notebooks.resolve(notebooks.describe(NOTEBOOK), profile="smoke", given=changes)
    return Config(**{name: parameters[name] for name in names_of(Config)})


def _studies(count, seed=0):
    """Grades of which a third of the studies has many: a study's own burden shows in all its targets."""
    rng = np.random.default_rng(seed)
    burden = rng.random(count)
    grades = np.clip(np.floor(burden[:, None] * 2.2 + rng.random((count, len(data.TARGETS))) - 0.4), 0, 2)
    table = pd.DataFrame(grades, columns=list(data.TARGETS))
    table.insert(0, "study_id", [f"{1000 + number}" for number in range(count)])
    return table.assign(**dict.fromkeys(data.MODALITIES, 1))


def _found(count=40, seed=0, slices=3):
    """Studies with a series of each modality, without files: tables, thumbnails and no volumes."""
    studies = _studies(count, seed)
    rows = [
        {"study_id": study, "series_id": f"{study}{place}", "modality": modality}
        for study in studies["study_id"]
        for place, modality in enumerate(data.MODALITIES)
    ]
    manifest = pd.DataFrame(rows)
    for name in ("patient_id", "group_id"):
        manifest[name] = manifest["study_id"]
    manifest["image_path"] = "lumbar/" + manifest["series_id"] + ".dcm"
    manifest["split"] = "train"
    graded = {name: (studies[list(data.targets_of(name))] > 0).any(axis=1).astype(float) for name in data.CONDITIONS}
    manifest = manifest.merge(studies[["study_id"]].assign(**graded), on="study_id")
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (len(manifest), 64, 64), dtype=np.uint8)
    facts = pd.DataFrame({"height": 64, "width": 64, "maximum": 255, "std": 70.0}, index=range(len(manifest)))
    facts["digest"] = [f"{number:016d}" for number in range(len(manifest))]
    store = Store(pictures, pictures, manifest, facts, pd.DataFrame(columns=["image_path", "reason"]), None)
    table = manifest[["study_id", "series_id", "modality"]].assign(slices=slices, ordered_by="position")
    table = table.assign(field_strength=1.5, slice_thickness=4.0, pixel_spacing=0.5, manufacturer="GE", sex="F")
    table["age"] = rng.integers(30, 80, len(table)).astype(float)
    volumes = Volumes(None, table, pd.DataFrame(), pd.DataFrame(columns=["path", "reason"]))
    return shared.Data(studies, store, volumes)


def _parts(found, folds=3, **options):
    return shared.split(found.studies, **{"test_share": 0.2, "folds": folds, "valid_share": 0.2, "seed": 0} | options)


def _features(found, slices=3, width=6, seed=0):
    """Vectors of slices; one slice of each series has the burden of the study, the others noise."""
    rng = np.random.default_rng(seed)
    index = found.volumes.table[["study_id", "series_id", "modality"]]
    index = index.loc[np.repeat(index.index, slices)].assign(position=np.tile(np.arange(slices), len(index)))
    values = rng.normal(size=(len(index), width)).astype(np.float32)
    burden = found.studies[list(data.TARGETS)].mean(axis=1).to_numpy(np.float32)
    telling = (index["position"] == 1).to_numpy()
    values[telling, 0] = 5
    values[telling, 1] = 4 * burden[np.repeat(np.arange(len(burden)), len(data.MODALITIES))]
    return Features(values, index.reset_index(drop=True))


def test_config_is_the_parameters_cell():
    cell = set(notebooks.describe(NOTEBOOK).parameters)
    assert cell - {"data_root", "models_root"} == set(names_of(Config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["average", "averge"]}, "methods"),
        ({"normalisations": []}, "normalisations"),
        ({"samplings": ["none", "none"]}, "samplings"),
        ({"classifiers": ["forest"]}, "classifiers"),
        ({"encoder": "ResNet"}, "encoder"),
        ({"medicalnet_depth": 34}, "medicalnet_depth"),
        ({"medicalnet_weights": "resnet_152.h5"}, "medicalnet_weights"),
        ({"medicalnet_size": [16, 4, 32]}, "medicalnet_size"),
        ({"image_size": [16, 64]}, "image_size"),
        ({"folds": 1}, "folds"),
        ({"test_share": 0.0}, "test_share"),
        ({"accepted": ["anything"]}, "accepted"),
    ],
)
def test_config_value_that_cannot_work_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"parameter `{message}`"):
        _config(**changes)


@pytest.mark.parametrize(
    ("methods", "weights", "medicalnet_weights", "reserves"),
    [
        (["average"], "none", "some.npz", True),
        (["attention", "medicalnet"], "imagenet", "none", True),
        (["average", "attention"], "imagenet", "none", False),
        (["medicalnet"], "none", "some.npz", False),
    ],
)
def test_config_reserves_studies_where_a_network_in_use_has_random_weights(
    methods, weights, medicalnet_weights, reserves
):
    config = _config(methods=methods, weights=weights, medicalnet_weights=medicalnet_weights)
    assert (config.reserved > 0) == reserves


def test_find_weights_of_a_state_dict_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="medicalnet_weights"):
        embedded.find_weights(_config(medicalnet_weights=str(tmp_path / "none.npz")))


# --- split -----------------------------------------------------------------------------------------------------------


def test_split_asks_every_study_once_by_a_part_that_has_not_learnt_from_it():
    found = _found(60)
    parts = _parts(found)
    assert [part.name for part in parts] == ["test", "fold 1", "fold 2", "fold 3"]
    assert sorted(np.concatenate([part.asked for part in parts])) == list(range(60))
    for part in parts:
        assert not set(part.asked) & set(part.learnt) and not set(part.train) & set(part.valid)
        assert not set(part.learnt) & set(parts[0].asked)
        assert sorted([*part.learnt, *part.asked, *(parts[0].asked if part is not parts[0] else [])]) == list(range(60))
    assert 10 <= len(parts[0].asked) <= 14


def test_split_without_folds_has_the_same_test():
    found = _found(60)
    alone = _parts(found, with_folds=False)
    assert len(alone) == 1
    np.testing.assert_array_equal(alone[0].asked, _parts(found)[0].asked)


def test_split_reserves_studies_that_every_part_learns_from_and_none_asks():
    found = _found(60)
    parts = _parts(found, reserved=6)
    reserved = shared.never_asked(parts)
    assert len(reserved) == 6 and reserved.dtype.kind == "i"
    assert sorted([*reserved, *np.concatenate([part.asked for part in parts])]) == list(range(60))
    assert all(set(reserved) <= set(part.learnt) for part in parts)
    np.testing.assert_array_equal(parts[0].asked, _parts(found)[0].asked)
    # A sixth of those that are not test is the most.
    assert len(shared.never_asked(_parts(found, reserved=60))) == (60 - len(parts[0].asked)) // 6


def test_split_of_nine_studies_is_refused():
    with pytest.raises(ValueError, match="9 studies cannot be parted .* at least 10"):
        _parts(_found(9))


def test_never_asked_by_hand():
    of = [np.array(each) for each in ([1, 4, 5], [2], [0, 3])], [np.array(each) for each in ([0, 5], [3], [1])]
    parts = [shared.Part(name, *each) for name, each in zip(("test", "fold 1"), of)]
    assert shared.never_asked(parts).tolist() == [2, 4, 5]
    assert shared.never_asked(parts[:1]).tolist() == [1, 2, 4, 5]


def test_gate_passes_made_studies_and_stops_at_a_picture_that_lies_on_both_sides():
    found = _found(40)
    parts = _parts(found)
    checks = shared.gate(found, parts, accepted=[])
    assert set(checks["part"]) == {part.name for part in parts}
    # The same picture in a study that fold 1 asks and in one that it learns from; the test is untouched.
    first, second = found.studies["study_id"].iloc[[parts[1].asked[0], parts[1].train[0]]]
    rows = [np.flatnonzero(found.store.manifest["study_id"] == study)[0] for study in (first, second)]
    pictures, facts = found.store.thumbnails.copy(), found.store.facts.copy()
    pictures[rows[1]] = pictures[rows[0]]
    facts.loc[rows[1], "digest"] = facts.loc[rows[0], "digest"]
    copied = found._replace(store=found.store._replace(thumbnails=pictures, images=pictures, facts=facts))
    with pytest.raises(audit.GateError):
        shared.gate(copied, parts, accepted=[])


def test_split_table_names_split_and_fold_of_every_series():
    found = _found(40)
    parts = _parts(found)
    table = shared.split_table(found, parts)
    per_study = table.groupby("study_id")[["split", "fold"]].nunique()
    assert (per_study == 1).all().all() and set(table["split"]) == {"train", "valid", "test"}
    assert ((table["fold"] == "") == (table["split"] == "test")).all()


def test_parts_table_counts_known_grades_by_hand():
    found = _found(40)
    found.studies.loc[0, data.targets_of(CANAL)[0]] = np.nan
    table = shared.parts_table(found.studies, _parts(found)).set_index(["part", "role"])
    grades = found.studies[list(data.targets_of(CANAL))].to_numpy()
    counted = [int((grades == grade).sum()) for grade in range(3)]
    both = [[int(number) for number in table.at[("test", role), "canal"].split(" / ")] for role in ("learnt", "asked")]
    assert np.sum(both, axis=0).tolist() == counted


# --- beside the pictures ---------------------------------------------------------------------------------------------


def test_study_table_and_filled_learn_gaps_from_the_rows_they_may():
    found = _found(30)
    table = found.volumes.table
    table.loc[table["modality"] == "Axial T2", "slice_thickness"] = np.nan
    table.loc[::7, "sex"] = None
    table.loc[table["study_id"].isin(["1003", "1027"]), "age"] = np.nan
    beside = shared.study_table(found)
    assert beside.index.tolist() == found.studies["study_id"].tolist()
    assert beside["Axial T2: slice_thickness"].isna().all() and (beside["Sagittal T1: slices"] == 3).all()
    learnt = np.arange(20)
    complete, left_out = shared.filled(beside, learnt, seed=0)
    assert left_out == ["Axial T2: slice_thickness"] and complete.notna().all().all()
    changed = beside.copy()
    changed.loc[changed.index[20:27], "age"] = 1000.0
    again, _ = shared.filled(changed, learnt, seed=0)
    others = np.delete(np.arange(30), np.arange(20, 27))
    np.testing.assert_array_equal(again.iloc[others], complete.iloc[others])


def test_fill_blank_grades_fills_what_is_learnt_from_and_nothing_else():
    studies = _studies(40)
    target = data.TARGETS[3]
    studies.loc[[2, 30], target] = np.nan
    complete = shared.fill_blank_grades(studies, np.arange(20), seed=0)
    assert complete.loc[2, target] in (0, 1, 2) and np.isnan(complete.loc[30, target])
    known = studies[list(data.TARGETS)].notna()
    assert (complete[list(data.TARGETS)].where(known) == studies[list(data.TARGETS)]).to_numpy()[known.to_numpy()].all()


def test_nearest_studies_is_the_one_of_the_same_picture_and_none_without_a_series():
    found = _found(20)
    part = shared.Part("test", np.arange(2, 14), np.arange(14, 18), np.array([0, 1]))
    row = {
        study: np.flatnonzero(
            (found.store.manifest["study_id"] == found.studies["study_id"][study])
            & (found.store.manifest["modality"] == data.PAIRED[CANAL])
        )[0]
        for study in (0, 1, 15)
    }
    pictures = found.store.thumbnails.copy()
    pictures[row[15]] = pictures[row[0]]
    kept = np.delete(np.arange(len(pictures)), row[1])
    store = found.store._replace(
        thumbnails=pictures[kept], manifest=found.store.manifest.iloc[kept].reset_index(drop=True)
    )
    assert shared.nearest_studies(found._replace(store=store), CANAL, part).tolist() == [15, -1]
    # A likeness whose grades are all blank has nothing to answer by.
    studies = found.studies.copy()
    studies.loc[15, list(data.targets_of(CANAL))] = np.nan
    (instead, none) = shared.nearest_studies(found._replace(store=store, studies=studies), CANAL, part)
    assert instead in part.learnt and instead != 15 and none == -1


def test_truth_of_slices_by_hand_keeps_graded_signs_of_the_modality_of_their_condition(tmp_path):
    (tmp_path / "lumbar" / "train_images").mkdir(parents=True)
    found = _found(10)
    of = found.volumes.table[found.volumes.table["study_id"] == "1000"].set_index("modality")["series_id"]
    sagittal_t1, sagittal_t2, axial = of[list(data.MODALITIES)]
    # The scanner counted backwards: instance 1 lies last.
    rows = [(sagittal_t2, 1, CANAL, 2), (sagittal_t2, 1, CANAL, 1), (sagittal_t2, 3, CANAL, 1)]
    rows += [(sagittal_t2, 2, CANAL, 0)]  # nothing is there to see
    rows += [
        (sagittal_t1, 2, CANAL, 2),
        (axial, 1, FORAMINAL, 2),
        (sagittal_t2, 2, SUBARTICULAR, 2),
    ]  # not judged there
    rows += [(axial, 2, SUBARTICULAR, 1), (sagittal_t1, 3, FORAMINAL, 0)]
    truth = pd.DataFrame(rows, columns=["series_id", "instance_number", "condition", "grade"]).assign(study_id="1000")
    truth.to_csv(tmp_path / "lumbar" / "truth.csv", index=False)
    places = found.volumes.table[["study_id", "series_id"]].merge(pd.DataFrame({"position": range(3)}), how="cross")
    places["instance_number"] = (3 - places["position"]).astype("Int64")
    found = found._replace(volumes=found.volumes._replace(slices=places))
    signal = shared.truth_of_slices(datasets.Source(tmp_path, "synthetic"), found)
    assert signal == {("1000", sagittal_t2): {0, 2}, ("1000", axial): {1}}


# --- encoders --------------------------------------------------------------------------------------------------------


def _encoder_config(**changes):
    small = {"image_size": [32, 32], "weights": "none", "medicalnet_weights": "none", "medicalnet_size": [8, 16, 16]}
    return _config(**small, medicalnet_depth=10, **changes)


def _with_volumes(found, folder, changed=()):
    """The same studies with volumes on disk, drawn by study; those of the `changed` positions are drawn anew."""
    for row in found.volumes.table.reset_index(names="row").itertuples():
        position = int(row.study_id) - 1000
        rng = np.random.default_rng([row.row, position in changed])
        path = folder / "gsl" / row.study_id / f"{row.series_id}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng.integers(0, rng.integers(50, 256), (row.slices, 32, 32), dtype=np.uint8))
    return found._replace(volumes=found.volumes._replace(folder=folder))


def _tiny(shape, convolution, pool):
    """A network with what calibration sets: a convolution and its batch normalisation."""
    inputs = keras.Input((*shape, 1), dtype="uint8")
    x = convolution(4, 3)(keras.layers.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, pool()(keras.layers.BatchNormalization()(x)))


@pytest.mark.parametrize("kind", ["slice_encoder", "volume_encoder"])
def test_encoders_of_random_weights_take_nothing_from_pictures_of_any_asked_study(tmp_path, monkeypatch, kind):
    layers = keras.layers
    flat = lambda *_, **__: (_tiny((32, 32), layers.Conv2D, layers.GlobalAveragePooling2D), None)  # noqa: E731
    deep = lambda *_, **__: _tiny((8, 16, 16), layers.Conv3D, layers.GlobalAveragePooling3D)  # noqa: E731
    monkeypatch.setattr(backbones, "build", flat)
    monkeypatch.setattr(medicalnet, "build", deep)
    found, config = _found(40), _encoder_config()
    parts = _parts(found, reserved=5)
    asked = set(np.concatenate([part.asked for part in parts]).tolist())
    reserved = set(range(40)) - asked
    assert len(reserved) == 5

    def weights(name, changed):
        there = _with_volumes(found, tmp_path / name, changed)
        encoder, receipt = getattr(embedded, kind)(config, there, "gsl", parts)
        assert receipt["share"] is None and receipt["source"].startswith("none: random weights")
        return encoder.get_weights()

    first = weights("as they are", ())
    for before, after in zip(first, weights("others where asked", asked), strict=True):
        np.testing.assert_array_equal(before, after)
    moved = weights("others where reserved", reserved)
    assert any((before != after).any() for before, after in zip(first, moved))


def test_volume_encoder_refuses_a_state_dict_of_half_its_tensors(tmp_path):
    path = tmp_path / "half.npz"
    names = {"kernel": "weight", "gamma": "weight", "beta": "bias"}
    names |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    network = medicalnet.build(10, (8, 16, 16, 1))
    state = {
        f"{layer.name.replace('_', '.')}.{names[weight.name]}": np.ones(
            tuple(weight.shape)[:-3:-1] + tuple(weight.shape)[:-2] if len(weight.shape) == 5 else weight.shape,
            "float32",
        )
        for layer in network.layers
        for weight in layer.weights
    }
    np.savez(path, **{name: state[name] for name in sorted(state)[::2]})
    options = {"found": None, "normalisation": "gsl", "parts": []}
    config = dataclasses.replace(_encoder_config(), medicalnet_weights=str(path))
    with pytest.raises(backbones.WeightsError, match=r"a share of 0\.5\d* and less than 0\.95"):
        embedded.volume_encoder(dataclasses.replace(config, min_matched_share=0.95), **options)
    _, receipt = embedded.volume_encoder(dataclasses.replace(config, min_matched_share=0.4), **options)
    assert 0.49 < receipt["share"] < 0.52


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    found = _found(40)
    config = _config(attention_width=8, attention_units=4, epochs=3, batch_size=8, learning_rate=0.01)
    features = _features(found)
    return config, found, features, embedded.bags_of(found, features), tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(small):
    """Attention of fold 1, which asks nothing of the test's studies either."""
    config, found, features, bags, run = small
    part = _parts(found)[1]
    options = {"name": "attention-gsl", "run": run / "first"}
    return part, embedded.attend(config, found, features, bags, part, **options), options


def test_bags_of_take_the_paired_modality(small):
    _, found, features, bags, _ = small
    for condition, rows in bags.items():
        assert set(features.index["modality"].iloc[rows.ravel()]) == {data.PAIRED[condition]}
        assert (features.index["study_id"].to_numpy()[rows[:, 0]] == found.studies["study_id"]).all()


def test_average_is_the_mean_of_the_paired_slices(small):
    config, _, features, bags, _ = small
    means = embedded.average(config, features, bags)  # 6 features are fewer than the projection's width
    np.testing.assert_allclose(means[CANAL][7], features.values[bags[CANAL][7]].mean(axis=0), rtol=1e-6)


def test_attend_never_sees_grades_or_slices_that_it_is_asked(small, trained):
    config, found, features, bags, run = small
    part, first, _ = trained
    other = found.studies.copy()
    columns = list(data.TARGETS)
    hidden = np.setdiff1d(np.arange(len(other)), part.learnt)
    other.loc[hidden, columns] = 2 - other.loc[hidden, columns]
    second = embedded.attend(
        config, found._replace(studies=other), features, bags, part, name="attention-gsl", run=run / "b"
    )
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    for condition in data.CONDITIONS:
        np.testing.assert_array_equal(first.pooled[condition], second.pooled[condition])
    # Nor their slices: those of other scanners, say, change nothing of what is learnt, scaling included.
    of_hidden = features.index["study_id"].isin(found.studies["study_id"].iloc[hidden]).to_numpy()
    moved = features._replace(values=np.where(of_hidden[:, None], 3 * features.values + 7, features.values))
    third = embedded.attend(config, found, moved, bags, part, name="attention-gsl", run=run / "c")
    np.testing.assert_array_equal(third.probabilities[part.learnt], first.probabilities[part.learnt])
    assert (third.probabilities[hidden] != first.probabilities[hidden]).any(axis=(1, 2)).all()
    for condition in data.CONDITIONS:
        np.testing.assert_array_equal(third.pooled[condition][part.learnt], first.pooled[condition][part.learnt])


class _Stopped(Exception):
    pass


def test_attend_is_trained_by_a_loss_that_weighs_grades_as_the_competition_does(small, monkeypatch):
    config, found, features, bags, run = small
    losses = []

    def fit(*_, loss, **__):
        losses.append(loss)
        raise _Stopped

    monkeypatch.setattr(training, "fit", fit)
    with pytest.raises(_Stopped):
        embedded.attend(config, found, features, bags, _parts(found)[0], name="attention-gsl", run=run / "weighed")
    # The true grades 0, 1, 2 and a blank are told 1/2, 1/4, 1/8: (1 · 1 + 2 · 2 + 4 · 3) / (1 + 2 + 4) bits.
    told = np.log([[[1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1 / 2, 3 / 8, 1 / 8], [0.9, 0.05, 0.05]]])
    value = float(losses[0](np.array([[0.0, 1.0, 2.0, np.nan]], np.float32), told.astype(np.float32)))
    assert value == pytest.approx(17 / 7 * np.log(2), rel=1e-6)


def test_attend_weights_of_a_study_sum_to_one_and_a_missing_modality_teaches_nothing(small):
    config, found, features, bags, run = small
    part = _parts(found)[0]
    bags = {name: rows.copy() for name, rows in bags.items()}
    bags[CANAL][part.train[0]] = -1
    attended = embedded.attend(config, found, features, bags, part, name="attention-gsl", run=run / "missing")
    sums = attended.weights[CANAL].sum(axis=1)
    assert sums[part.train[0]] == 0
    np.testing.assert_allclose(np.delete(sums, part.train[0]), 1, rtol=1e-5)
    assert attended.probabilities.shape == (40, 25, 3)
    y = embedded._targets(found, bags)
    assert np.isnan(y[part.train[0], :5]).all() and np.isfinite(y[part.train[0], 5:]).all()


def test_attend_reads_what_an_earlier_call_finished(small, trained, monkeypatch):
    config, found, features, bags, _ = small
    part, first, options = trained
    monkeypatch.setattr(keras.Model, "fit", None)
    again = embedded.attend(config, found, features, bags, part, **options)
    np.testing.assert_array_equal(first.pooled[FORAMINAL], again.pooled[FORAMINAL])
    assert (options["run"] / "variants" / again.folder / "model.keras").exists()


def test_write_embedding_and_slice_weights_have_a_row_a_series_and_a_slice(small):
    config, found, features, bags, run = small
    # A second axial series of the first study joins its bag.
    table = features.index.copy()
    last = table[(table["study_id"] == "1000") & (table["modality"] == "Axial T2")].assign(series_id="x9")
    features = Features(
        np.concatenate([features.values, features.values[last.index] + 1]), pd.concat([table, last], ignore_index=True)
    )
    bags = embedded.bags_of(found, features)
    means = embedded.average(config, features, bags)
    index = embedded.write_embedding(found, features, bags, means, run / "average-gsl.csv")
    written = pd.read_csv(run / "average-gsl.csv", dtype={"study_id": str, "series_id": str})
    assert written.columns.tolist() == ["study_id", "series_id", *map(str, range(6))] and len(written) == 120
    joined = written[index["condition"].eq(SUBARTICULAR) & written["study_id"].eq("1000")]
    assert joined["series_id"].tolist() == ["10002+x9"]
    np.testing.assert_allclose(joined.iloc[0, 2:].to_numpy(float), means[SUBARTICULAR][0], rtol=1e-5)
    weights = {name: np.full(rows.shape, 0.5, np.float32) for name, rows in bags.items()}
    attended = embedded.Attended({}, weights, np.zeros(0), pd.DataFrame(), "")
    listed = embedded.slice_weights(found, features, bags, attended)
    assert len(listed) == len(features.index)
    of_bag = listed[(listed["condition"] == SUBARTICULAR) & (listed["study"] == 0)]
    assert of_bag["series_id"].tolist() == ["10002"] * 3 + ["x9"] * 3 and of_bag["position"].tolist() == [0, 1, 2] * 2


# --- grid ------------------------------------------------------------------------------------------------------------


def test_rows_of_leave_out_a_study_without_the_paired_modality():
    found = _found(10)
    found.studies.loc[4, data.PAIRED[CANAL]] = 0
    found.studies.loc[5, data.targets_of(CANAL)[0]] = np.nan
    rows = grid.rows_of(found)
    assert len(rows) == 10 * 25 - 5
    of_four = rows[rows["study"] == 4]
    assert set(of_four["condition"]) == {FORAMINAL, SUBARTICULAR}
    assert rows.loc[(rows["study"] == 5) & (rows["target"] == data.targets_of(CANAL)[0]), "grade"].isna().all()


def test_questions_part_studies_and_leave_blanks_out():
    found = _found(40)
    parts = _parts(found)
    target = data.targets_of(CANAL)[0]
    found.studies.loc[[parts[0].asked[0], parts[0].train[0]], target] = np.nan
    asked = grid.questions(found, parts)
    assert [(each.part.name, each.condition) for each in asked[:3]] == [("test", name) for name in data.CONDITIONS]
    for each in asked:
        assert not set(each.learnt["study"]) & set(each.asked["study"])
        assert each.learnt["grade"].notna().all() and each.asked["grade"].notna().all()
    assert len(asked[0].asked) == 5 * len(parts[0].asked) - 1
    filled = grid.questions(found, parts, impute_labels=True)
    assert len(filled[0].learnt) == len(asked[0].learnt) + 1 and len(filled[0].asked) == len(asked[0].asked)


def test_questions_without_any_series_of_a_modality_are_refused():
    found = _found(40)
    found.studies["Axial T2"] = 0
    with pytest.raises(ValueError, match=r"subarticular_stenosis has 0 known grades\b.* in test"):
        grid.questions(found, _parts(found))


@pytest.mark.parametrize("role", ["learnt", "asked"])
def test_questions_of_one_grade_alone_are_refused_where_nothing_could_be_told(role):
    found = _found(40)
    parts = _parts(found)
    alone = found.studies.columns.get_indexer(data.targets_of(FORAMINAL))
    found.studies.iloc[getattr(parts[0], role), alone] = 1.0
    with pytest.raises(ValueError, match=r"neural_foraminal_narrowing has .*\bof 1\b.* in test"):
        grid.questions(found, parts[:1])


def test_questions_of_one_grade_in_a_fold_are_asked():
    found = _found(40)
    parts = _parts(found)
    found.studies.iloc[parts[1].asked, found.studies.columns.get_indexer(data.targets_of(FORAMINAL))] = 0.0
    of_fold = [
        each for each in grid.questions(found, parts) if (each.part.name, each.condition) == ("fold 1", FORAMINAL)
    ]
    assert set(of_fold[0].asked["grade"]) == {0.0}


def test_design_by_hand():
    rows = pd.DataFrame({"study": [1, 0], "side": ["right", "left"], "level": ["l1_l2", "l5_s1"]})
    x, categorical = grid.design(rows, np.array([[0.5, 1.0], [2.0, 3.0]]))
    assert x.tolist() == [[2, 3, 0, 1, 1, 0, 0, 0, 0], [0.5, 1, 1, 0, 0, 0, 0, 0, 1]]
    assert categorical == [2, 3, 4, 5, 6, 7, 8]
    x, categorical = grid.design(rows.assign(side=""), np.array([[0.5], [2.0]]))
    assert x.shape == (2, 6) and categorical == [1, 2, 3, 4, 5]


def _answers(asked, seed, knowing):
    """Made-up answers that know a share of the truth, laid out as the grid's."""
    rng = np.random.default_rng(seed)
    tables = []
    for question in asked:
        truth = np.eye(3)[question.asked["grade"].astype(int)]
        told = knowing * truth + (1 - knowing) * rng.dirichlet(np.ones(3), len(truth))
        tables.append(grid.answered(question, told))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def asked():
    found = _found(60)
    return grid.questions(found, _parts(found))


def test_fit_writes_points_whole_and_reads_them_again(asked, tmp_path, monkeypatch):
    found = _found(60)
    burden = found.studies[list(data.TARGETS)].mean(axis=1).to_numpy(np.float32)[:, None]
    vectors = {
        ("average", "gsl", part): dict.fromkeys(data.CONDITIONS, burden) for part in {q.part.name for q in asked}
    }
    keys = grid.points(["average"], ["gsl"], ["none", "weighted"], ["lightgbm"])
    assert keys == [("average", "gsl", "none", "lightgbm"), ("average", "gsl", "weighted", "lightgbm")]
    options = {"run": tmp_path, "jobs": 1, "progress": False}
    first = grid.fit(asked, keys, vectors, **options)
    table = first[keys[0]]
    assert len(table) == sum(len(question.asked) for question in asked)
    np.testing.assert_allclose(table[grid.TOLD].sum(axis=1), 1, atol=1e-6)
    assert set(table.loc[table["condition"] == CANAL, "side"]) == {""}
    (tmp_path / "variants" / "average-gsl-weighted-lightgbm" / "predictions.csv").unlink()
    calls = []
    fit_predict = classifiers.fit_predict
    monkeypatch.setattr(
        classifiers, "fit_predict", lambda *args, **rest: (calls.append(args[1]), fit_predict(*args, **rest))[1]
    )
    again = grid.fit(asked, keys, vectors, **options)
    assert set(calls) == {"weighted"} and len(calls) == len(asked)
    for key in keys:
        pd.testing.assert_frame_equal(again[key], first[key])


def test_own_answers_take_the_targets_of_their_condition(asked):
    told = np.random.default_rng(0).dirichlet(np.ones(3), (60, 25)).astype(np.float32)
    attended = {
        ("attention", "gsl", name): embedded.Attended({}, {}, told, pd.DataFrame(), "")
        for name in {question.part.name for question in asked}
    }
    ((key, table),) = grid.own_answers(asked, attended).items()
    assert key == ("attention", "gsl", "weighted", "own head")
    row = table[(table["condition"] == SUBARTICULAR) & (table["side"] == "right") & (table["level"] == "l3_l4")].iloc[0]
    place = data.TARGETS.index("right_subarticular_stenosis_l3_l4")
    np.testing.assert_allclose(row[grid.TOLD].to_numpy(float), told[int(row["study_id"]) - 1000, place])


def test_baselines_answer_the_same_rows_from_what_is_learnt(asked):
    found = _found(60)
    told = grid.baselines(found, asked, jobs=1)
    assert set(told) == {
        *(metrics.MAJORITY, metrics.PRIOR, metrics.WEIGHTED_PRIOR, metrics.LEVEL_SHARE),
        *(metrics.NEAREST_NEIGHBOUR, metrics.PATIENT),
    }
    for table in told.values():
        assert len(table) == sum(len(question.asked) for question in asked)
        np.testing.assert_allclose(table[grid.TOLD].sum(axis=1), 1, atol=1e-9)
    first = asked[0].learnt["grade"].value_counts(normalize=True)
    np.testing.assert_allclose(told[metrics.PRIOR][grid.TOLD].iloc[0], [first[grade] for grade in (0.0, 1.0, 2.0)])


def _telling_table(found):
    """Let age go by the study's grades: whoever reads the study table can tell them."""
    burden = found.studies[list(data.TARGETS)].mean(axis=1).to_numpy()
    table = found.volumes.table
    age = 30 + 25 * burden[table["study_id"].astype(int) - 1000]
    return found._replace(volumes=found.volumes._replace(table=table.assign(age=age)))


def _auroc(table):
    """Of Moderate or Severe against Normal/Mild, all rows of the test."""
    among = table[table["part"] == "test"]
    told, positive = 1 - among[grid.TOLD[0]].to_numpy(), among["grade"].to_numpy() > 0
    pairs = told[positive][:, None] - told[~positive]
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean()


def test_patient_baseline_reads_the_study_table():
    found = _telling_table(_found(80))
    asked = grid.questions(found, _parts(found, with_folds=False))
    told = grid.baselines(found, asked, jobs=1)
    assert _auroc(told[metrics.PATIENT]) > 0.75
    # Without what tells, the same trees know no more than levels do.
    blind = found._replace(volumes=found.volumes._replace(table=found.volumes.table.assign(age=50.0)))
    assert _auroc(grid.baselines(blind, asked, jobs=1)[metrics.PATIENT]) < 0.6


def test_baselines_take_nothing_from_the_table_of_other_asked_studies():
    found = _telling_table(_found(60))
    parts = _parts(found, with_folds=False)
    # Gaps among what is learnt and what is asked: what fills them must not know the asked.
    table = found.volumes.table.copy()
    table.loc[(table["study_id"].astype(int) % 4 == 0).to_numpy(), "age"] = np.nan
    found = found._replace(volumes=found.volumes._replace(table=table))
    asked = grid.questions(found, parts)
    first = grid.baselines(found, asked, jobs=1)
    ids = found.studies["study_id"].to_numpy()
    gaps = table[table["age"].isna()]["study_id"]

    def without(rows, studies):
        changed = table.copy()
        chosen = changed["study_id"].isin(ids[studies]) & changed["age"].notna()
        changed.loc[chosen, "age"] = 1000.0
        again = grid.baselines(found._replace(volumes=found.volumes._replace(table=changed)), asked, jobs=1)
        return {name: [each[~each["study_id"].isin(rows)] for each in (first[name], again[name])] for name in first}

    known = [study for study in parts[0].asked if ids[study] not in set(gaps)]
    others = without(ids[known], known)
    assert len(others[metrics.PATIENT][0])
    for before, after in others.values():
        pd.testing.assert_frame_equal(before, after, check_exact=True)
    before, after = without([], parts[0].learnt[::2])[metrics.PATIENT]
    assert (before[grid.TOLD].to_numpy() != after[grid.TOLD].to_numpy()).any()


@pytest.fixture(scope="module")
def scored(asked):
    found = _found(60)
    answers = {
        ("average", "gsl", "none", "svc"): _answers(asked, 1, 0.05),
        ("average", "gsl", "weighted", "svc"): _answers(asked, 2, 0.2),
        ("attention", "gsl", "none", "svc"): _answers(asked, 3, 0.1),
        ("attention", "gsl", "weighted", "svc"): _answers(asked, 4, 0.3),
    }
    # Right on the test and wrong on the folds: a choice that looked at the test would take it.
    tempting = _answers(asked, 5, 0.0)
    of_test = tempting["part"] == "test"
    tempting.loc[of_test, grid.TOLD] = np.eye(3)[tempting.loc[of_test, "grade"].astype(int)]
    answers["attention", "gsl", "smote", "svc"] = tempting
    answers |= grid.baselines(found, asked, jobs=1)
    return answers, grid.score(answers, num_draws=100, seed=0)


def test_choose_looks_at_the_folds_alone(scored):
    table = grid.table_of(scored[1])
    assert grid.choose(table) == ("attention", "gsl", "weighted", "svc")
    assert grid.best_of_each(table) == [("attention", "gsl", "weighted", "svc"), ("average", "gsl", "weighted", "svc")]
    tempting = table[(table["sampling"] == "smote") & (table["split"] == "test")]
    assert (tempting["macro_auroc"] == 1).all()


def test_choose_takes_the_best_mean_over_the_conditions_by_hand():
    of_folds = {
        ("average", "gsl", "none", "svc"): (0.95, 0.76, 0.30),  # the best condition, and the best median
        ("average", "gsl", "weighted", "svc"): (0.90, 0.75, 0.60),  # the best mean
        ("average", "hist", "none", "svc"): (0.65, 0.65, 0.65),  # the best worst condition
        ("", "", "", ""): (1.0, 1.0, 1.0),  # a baseline
    }
    rows = [
        (split, condition, *key, value if split == "folds" else 1 - value)
        for key, values in of_folds.items()
        for split in ("test", "folds")
        for condition, value in zip(data.CONDITIONS, values)
    ]
    table = pd.DataFrame(rows, columns=["split", "condition", *grid.FACTORS, "macro_auroc"])
    keys = list(of_folds)
    assert grid.choose(table) == keys[1]
    assert grid.best_of_each(table) == [keys[1], keys[2]]


def test_contrasts_leave_the_networks_own_heads_out_by_hand():
    values = {
        ("attention", "gsl", "none", "svc"): 0.6,
        ("attention", "hist", "none", "svc"): 0.7,
        ("attention", "gsl", *grid.OWN_HEAD): 0.9,
        ("attention", "hist", *grid.OWN_HEAD): 0.5,
        metrics.PRIOR: 0.5,
    }
    points = {key: (value, np.full(4, value)) for key, value in values.items()}
    swapped = {key: (1 - value, 1 - spread) for key, (value, spread) in points.items()}
    drawn = {
        (split, name): {"macro_auroc": points if split == "folds" else swapped}
        for split in ("test", "folds")
        for name in data.CONDITIONS
    }
    table = pd.DataFrame([key for key in values if not isinstance(key, str)], columns=list(grid.FACTORS))
    (found,) = grid.contrasts(drawn, table)
    assert (found["factor"], found["minus"], found["plus"], found["pairs"]) == ("normalisation", ["gsl"], ["hist"], 1)
    assert found["value"] == pytest.approx(0.1) and found["ci95"] == pytest.approx([0.1, 0.1])


def test_contrasts_answer_by_pairs_of_the_folds(scored):
    found = grid.contrasts(scored[1], grid.table_of(scored[1]))
    by_name = {(each["factor"], *each["minus"]): each for each in found}
    assert set(by_name) == {("sampling", "none"), ("embedding", "average")}
    weighting = by_name["sampling", "none"]
    assert weighting["pairs"] == 2 and weighting["ci95"][0] > 0
    table = grid.contrasts_table(found)
    assert table.loc[("sampling", "weighted − none"), "pairs"] == 2


def test_score_draws_the_same_studies_in_all_conditions(asked):
    """Two conditions of the same rows, of which one lacks a study: where the other's is blank, all draws are equal."""
    key = ("average", "gsl", "none", "svc")
    whole = _answers(asked, 1, 0.2)
    rows = whole[whole["condition"] == CANAL]
    whole = pd.concat([rows.assign(condition=name) for name in data.CONDITIONS], ignore_index=True)
    of_study = whole["study_id"] == whole.loc[whole["part"] == "test", "study_id"].iloc[0]
    blank = whole.assign(grade=whole["grade"].mask(of_study & (whole["condition"] == FORAMINAL)))
    lacking = blank[~(of_study & (whole["condition"] == CANAL))]
    complete, found = (grid.score({key: each}, num_draws=20, seed=0) for each in (whole, lacking))
    assert set(found) == {(split, name) for split in ("test", "folds") for name in data.CONDITIONS}

    def drawn(of, name):
        return np.append(*of["test", name]["macro_auroc"][key])

    np.testing.assert_array_equal(drawn(found, CANAL), drawn(found, FORAMINAL))
    np.testing.assert_array_equal(drawn(found, SUBARTICULAR), drawn(complete, SUBARTICULAR))
    assert np.isfinite(drawn(found, CANAL)).all() and (drawn(found, CANAL) != drawn(complete, CANAL)).any()


def test_evaluate_sets_points_beside_baselines_and_the_first(scored):
    answers, drawn = scored
    best = grid.best_of_each(grid.table_of(drawn))
    rows = grid.evaluate(answers, best, num_draws=100, seed=0)
    headline = grid.headline(rows, best[0])
    assert [(row["task"], row["metric"]) for row in headline] == [
        *((name, "macro_auroc") for name in data.CONDITIONS),
        ("all conditions", "competition"),
    ]
    assert all(row["baseline"] and row["split"] == "test" for row in headline)
    assert headline[-1]["baseline"]["value"] > headline[-1]["value"]
    second = [row for row in rows if row["variant"] == " ".join(best[1]) and row["metric"] == "macro_auroc"]
    assert all(row["reference"]["variant"] == " ".join(best[0]) for row in second)


# --- results ---------------------------------------------------------------------------------------------------------


def _weights():
    rows = [(CANAL, 0, "a", "1", place, weight) for place, weight in enumerate((0.1, 0.7, 0.2))]
    rows += [(CANAL, 1, "b", "2", place, weight) for place, weight in enumerate((0.5, 0.3, 0.1, 0.1))]
    rows += [(CANAL, 2, "c", "3", place, 0.5) for place in range(2)]
    return pd.DataFrame(rows, columns=["condition", "study", "study_id", "series_id", "position", "weight"])


def test_top_slices_by_hand():
    signal = {("a", "1"): {1}, ("b", "2"): {2, 3}}
    found = results.top_slices(_weights(), signal, [0, 1, 2])
    assert found["study_id"].tolist() == ["a", "b"]  # nothing is known to find in c
    assert found["top"].tolist() == [True, False] and found["middle"].tolist() == [True, True]
    assert found["chance"].round(3).tolist() == [0.333, 0.5] and found["with_sign"].tolist() == [1, 2]
    assert results.top_slices(_weights(), signal, [1])["study_id"].tolist() == ["b"]


def test_top_slices_of_two_series_take_the_middle_of_the_first():
    rows = [(CANAL, 0, "a", "1", place, 0.1) for place in range(3)] + [(CANAL, 0, "a", "2", 0, 0.1)]
    rows += [(CANAL, 0, "a", "2", place, 0.3) for place in (1, 2)]
    weights = pd.DataFrame(rows, columns=["condition", "study", "study_id", "series_id", "position", "weight"])
    (row,) = results.top_slices(weights, {("a", "1"): {1}}, [0]).to_dict("records")
    assert row["middle"] and not row["top"] and (row["slices"], row["with_sign"]) == (6, 1)
    (row,) = results.top_slices(weights, {("a", "2"): {0, 1}}, [0]).to_dict("records")
    assert not row["middle"] and row["top"] and row["chance"] == pytest.approx(1 / 3)


def test_top_slice_rows_stand_beside_chance_and_say_where_there_is_none():
    found = results.top_slices(_weights(), {("a", "1"): {1}, ("b", "2"): {2, 3}}, [0, 1])
    canal, *others = results.top_slice_rows(found, variant="attention gsl", num_draws=50)
    assert canal["value"] == 0.5 and canal["baseline"]["value"] == pytest.approx(5 / 12)
    assert canal["reference"]["value"] == 1 and canal["n"] == 2
    assert all(row["value"] is None and row["reason"] for row in others)


def test_alike_by_hand_leaves_out_itself_and_studies_without_a_vector():
    vectors = np.array([[1.0, 0.0], [-1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [np.nan, np.nan], [0.0, -1.0]])
    near, sure = results.alike(vectors, [0, 4], [0, 1, 2, 3, 4, 5], count=2)
    assert near[0].tolist()[0] == 2 and 0 not in near[0] and sure[0][0] > 0.9
    assert near[1].tolist() == [-1, -1] and np.isnan(sure[1]).all()


def test_alike_looks_from_the_middle_of_what_is_searched():
    centre = np.array([10.0, 10.0])
    around = centre + [[2.0, 0.0], [-2.0, 0.0], [0.0, 0.2], [0.0, -0.2]]
    # From the origin the last one is nearest; one that is not searched would move the middle far to the right.
    vectors = np.concatenate([[centre + [0.1, 0.0]], around, [centre + [100.0, 0.0]]])
    near, sure = results.alike(vectors, [0], [1, 2, 3, 4], count=2)
    assert near[0, 0] == 1 and sure[0, 0] == pytest.approx(1) and sure[0, 1] == pytest.approx(0, abs=1e-9)


def test_alike_finds_at_most_as_many_as_there_are_beside_the_query():
    vectors = np.random.default_rng(0).normal(size=(6, 3))
    near, _ = results.alike(vectors, [0, 1], [0, 1, 2, 3], count=9)
    assert near.shape == (2, 3) and [sorted(row) for row in near.tolist()] == [[1, 2, 3], [0, 2, 3]]
    near, _ = results.alike(vectors, [5], [0, 1, 2, 3], count=9)
    assert sorted(near[0]) == [0, 1, 2, 3]


def test_agreement_by_hand():
    grades = np.array([2.0, 2.0, 0.0, np.nan])
    found = results.agreement(grades, [0], np.array([[1, 3]]), [1, 2, 3])
    assert found == {"n": 1, "of_alike": 0.0, "at_random": 1.0, "difference": -1.0, "ci95": [-1.0, -1.0]}


def test_agreement_pairs_each_query_with_itself_and_passes_over_those_without_a_grade_or_likes():
    grades = np.array([1.0, 2.0, np.nan, 1.0, 0.0, 1.0])
    near = np.array([[5], [5], [5], [-1]])
    found = results.agreement(grades, [0, 1, 2, 3], near, [4, 5], num_draws=50)
    # 0 beside 1/2, and 1 beside 3/2: both queries gain as much, so that no draw differs.
    assert found == {"n": 2, "of_alike": 0.5, "at_random": 1.0, "difference": -0.5, "ci95": [-0.5, -0.5]}
    none = results.agreement(grades, [2], near[2:3], [4, 5])
    assert none == {"n": 0, "of_alike": None, "at_random": None, "difference": None, "ci95": None}


def test_worst_grades_skip_blanks():
    studies = _studies(2)
    columns = list(data.targets_of(CANAL))
    studies.loc[0, columns] = [0, np.nan, 1, 0, np.nan]
    studies.loc[1, columns] = np.nan
    assert results.worst_grades(studies, CANAL)[0] == 1 and np.isnan(results.worst_grades(studies, CANAL)[1])


# --- end to end ------------------------------------------------------------------------------------------------------


# What the made headers hold of a person, a hospital and the scanner's numbering; ages and makers are read on purpose.
IDENTIFIERS = {
    "name": rb"SYNTHETIC\^|PATIENT\d{5}",
    "id": rb"SYNTHETIC-\d",
    "institution": rb"(?i)SYNTHETIC HOSPITAL",
    "birth date": rb"(?<![\d.])1900-?01-?01(?!\d)",
    "uid": rb"(?<!\d)2\.25\.\d{4,}",
}


def _identifiers_in(path):
    """Kinds of identifiers in a file, in its name, or in what it packs."""
    contents = [str(path.name).encode(), path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            contents += [archive.read(name) for name in archive.namelist()]
    return {kind for kind, pattern in IDENTIFIERS.items() if any(re.search(pattern, each) for each in contents)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("lumbar-set")
    datasets.write_synthetic("lumbar", root, studies=40, seed=1)
    return datasets.Source(root, "synthetic")


def test_read_finds_every_series_and_knows_where_the_signs_are(source):
    options = {"image_size": (32, 32), "normalisations": ("gsl",), "window": False, "max_quarantined_share": 0.0}
    found = shared.read(source, **options)
    assert len(found.studies) == 40 and len(found.volumes.table) == len(found.store.manifest)
    assert (found.studies[list(data.MODALITIES)].sum().sum()) == len(found.volumes.table)
    signal = shared.truth_of_slices(source, found)
    modality = found.volumes.table.set_index(["study_id", "series_id"])
    assert set(signal) <= set(modality.index)
    slices = modality["slices"]
    assert all(0 <= place < slices[key] for key, places in signal.items() for place in places)
    share = np.mean([len(places) / slices[key] for key, places in signal.items()])
    assert 0.05 < share < 0.6
    # The store shows each series' middle slice, as it was read.
    for row in (0, 50, len(found.store.images) - 1):
        volume = series.load(found.volumes, "gsl", row)
        np.testing.assert_array_equal(np.squeeze(found.store.images[row]), volume[len(volume) // 2])
    assert found.store.manifest["series_id"].tolist() == found.volumes.table["series_id"].tolist()
    assert json.loads((source.root / "lumbar" / "synthetic.json").read_text())["ceiling"]


def test_read_writes_nothing_of_what_headers_say_of_a_person(source, tmp_path):
    options = {"image_size": (32, 32), "normalisations": ("gsl",), "window": True, "max_quarantined_share": 0.0}
    shared.read(source, **options)
    written = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert written and not {path: kinds for path in written if (kinds := _identifiers_in(path))}
    # The search finds all of them where they are, packed or not.
    header = next(source.root.rglob("*.dcm"))
    assert _identifiers_in(header) == set(IDENTIFIERS)
    with zipfile.ZipFile(tmp_path / "packed.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(header, "config.json")
    assert _identifiers_in(tmp_path / "packed.keras") == set(IDENTIFIERS)


def test_truth_of_slices_of_real_data_is_not_known(source):
    assert shared.truth_of_slices(source._replace(kind="real"), None) is None


@pytest.mark.slow
def test_smoke_run_makes_all_embeddings_the_grid_and_no_identifier(tmp_path, monkeypatch):
    monkeypatch.setenv("KERASMED_CACHE", str(tmp_path / "cache"))
    given = {"models_root": str(tmp_path / "models"), "normalisations": ["hist"]}
    run, executed = notebooks.run(
        notebooks.describe(NOTEBOOK), notebooks.resolve(notebooks.describe(NOTEBOOK), profile="smoke", given=given)
    )
    assert executed
    content = runs.read_json(run / "metrics.json")
    assert [row["metric"] for row in content["headline"]] == ["macro_auroc"] * 3 + ["competition"]
    assert content["chosen_by"]["split"] == "folds"
    table = pd.read_csv(run / "grid.csv").fillna({"embedding": ""})
    points = table[table["embedding"] != ""].groupby(["split", "condition"]).size()
    # 3 methods × 2 samplings × 2 classifiers, and the own heads of 2 methods.
    assert (points == 14).all() and len(points) == 6
    for method in ("average", "attention", "medicalnet"):
        written = pd.read_csv(run / "embeddings" / f"{method}-hist.csv")
        assert written.columns[:2].tolist() == ["study_id", "series_id"] and written.iloc[:, 2:].notna().all().all()
    for kind in ("slices", "planes"):
        assert runs.read_json(run / "encoders" / f"{kind}-hist.json")["source"].startswith("none: random weights")
    assert {path.name for path in (run / "figures").iterdir()} >= {"grid-test.png", "contrasts.png", "neighbours.png"}
    assert keras.saving.load_model(run / "model.keras").output_shape == (None, 25, 3)
    written = [path for path in [*run.rglob("*"), *(tmp_path / "cache").rglob("*")] if path.is_file()]
    kept = [path for path in written if path.suffix != ".dcm"]
    assert {".ipynb", ".keras", ".npy", ".npz", ".csv", ".json"} <= {path.suffix for path in kept}
    assert not {path: kinds for path in kept if (kinds := _identifiers_in(path))}


@pytest.mark.slow
def test_shuffled_grades_of_many_studies_are_not_told_by_any_point_of_the_grid(tmp_path):
    """Attention, sampling, scaling, calibration and classifiers see nothing of the studies that they are asked."""
    found = _found(1200)
    columns = list(data.TARGETS)
    shuffled = found.studies[columns].to_numpy()[np.random.default_rng(7).permutation(1200)]
    features = _features(found, width=32)  # which tell the grades before they are shuffled
    found = found._replace(studies=found.studies.assign(**dict(zip(columns, shuffled.T))))
    parts = _parts(found, folds=2)
    bags = embedded.bags_of(found, features)
    config = _config(attention_width=16, attention_units=8, epochs=4, learning_rate=0.01, projection=16)
    vectors, attended = {}, {}
    for part in parts:
        options = {"name": "attention-gsl", "run": tmp_path}
        attended["attention", "gsl", part.name] = embedded.attend(config, found, features, bags, part, **options)
        vectors["attention", "gsl", part.name] = attended["attention", "gsl", part.name].pooled
        vectors["average", "gsl", part.name] = embedded.average(config, features, bags)
    asked = grid.questions(found, parts)
    keys = grid.points(["average", "attention"], ["gsl"], ["none", "weighted", "smote"], ["svc", "lightgbm"])
    answers = grid.fit(asked, keys, vectors, run=tmp_path, progress=False) | grid.own_answers(asked, attended)
    table = grid.table_of(grid.score(answers, num_draws=2, seed=0))
    assert len(table) == 6 * 13
    means = table.groupby(["split", *grid.FACTORS])["macro_auroc"].mean()
    assert (means - 0.5).abs().max() < 0.05, means


@pytest.mark.slow
def test_demo_embeddings_grade_unseen_studies_below_the_ceiling_and_attention_finds_the_slices(tmp_path):
    root = datasets.write_synthetic("lumbar", tmp_path / "set", studies=200)
    parameters = notebooks.resolve(notebooks.describe(NOTEBOOK), profile="demo", given={"methods": ["attention"]})
    config = Config(**{name: parameters[name] for name in names_of(Config)})
    source = datasets.Source(root, "synthetic")
    names = ("image_size", "normalisations", "window", "max_quarantined_share")
    found = shared.read(source, **{name: parameters[name] for name in names})
    parts = shared.split(
        found.studies, test_share=0.2, folds=3, valid_share=config.valid_share, seed=0, with_folds=False
    )
    environment.setup(seed=0)
    vectors, attended = embedded.embed_all(config, found, parts, run=tmp_path / "run")
    asked = grid.questions(found, parts)
    key = ("attention", "gsl", "weighted", "svc")
    answers = grid.fit(asked, [key], vectors, run=tmp_path / "run", progress=False)
    answers |= grid.baselines(found, asked)
    rows = [row for row in grid.evaluate(answers, [key], num_draws=200, seed=0) if row["variant"] == " ".join(key)]
    of_auroc = [row for row in rows if row["metric"] == "macro_auroc"]
    assert np.mean([row["value"] for row in of_auroc]) > 0.8
    assert all(row["baseline"]["difference_ci95"][0] > 0.05 for row in of_auroc)
    ceiling = datasets.truth("lumbar", source)["ceiling"]
    for row in of_auroc:
        low, high = row["ci95"]
        # Three standard errors, a quarter of the interval's width each: more could only be a leak.
        assert row["value"] < ceiling[row["task"]]["grade"] + 3 * (high - low) / 4
    (looked,) = attended.values()
    weights = embedded.weights_of(config, found, parts, "attention", "gsl", looked, run=tmp_path / "run")
    hits = results.top_slices(weights, shared.truth_of_slices(source, found), parts[0].asked)
    assert len(hits) > 40 and hits["top"].mean() > 0.7
    of_condition = hits.groupby("condition")[["top", "chance"]].mean()
    assert (of_condition["top"] > of_condition["chance"] + 0.2).all()
