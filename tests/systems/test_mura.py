"""The mura system end to end, as its user runs it."""

import os
import shutil
import subprocess
import sys

import cv2
import keras
import numpy as np
import pandas as pd
import pydicom
import pytest
from sklearn.metrics import cohen_kappa_score, confusion_matrix, roc_auc_score

from kerasmed import audit, datasets, environment, metrics, multilabel, notebooks, runs, studies
from kerasmed.datasets import mura as data
from kerasmed.parameters import names_of
from kerasmed.systems import mura
from kerasmed.systems.mura import networks, prediction, results
from kerasmed.training import Trained

QUICK = {"ensemble_seeds": [], "compare_loss": False, "experts": [], "tuned_experts": [], "bootstraps": 50}


def _config(**changes):
    notebook = notebooks.describe("06_mura_densenet")
    parameters = notebooks.resolve(notebook, profile="smoke", given=QUICK | changes)
    return networks.Config(**{name: parameters[name] for name in names_of(networks.Config)})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("mura")
    datasets.write_synthetic("mura", root, patients=60, seed=0)
    return datasets.Source(root, "synthetic")


@pytest.fixture
def store(source):
    return networks.split(_config(), networks.read(_config(), source))


def _predictions(store, variant="one", seed=0):
    """Made-up probabilities of every image that know a little of the truth."""
    rng = np.random.default_rng(seed)
    truth = store.manifest["abnormal"].to_numpy()
    told = np.clip(0.3 * truth + 0.7 * rng.random(len(truth)), 0, 1)
    table = store.manifest[["image_path", "patient_id", "study_id", "group_id", "split"]].assign(variant=variant)
    return table.assign(y_abnormal=truth, p_abnormal=told)


def _trained(table):
    history = pd.DataFrame({"epoch": [1], "val_loss": [0.5], "kept": [True]})
    return Trained(table["variant"].iloc[0], table["variant"].iloc[0], history, table)


def test_config_is_the_parameters_cell():
    cell = set(notebooks.describe("06_mura_densenet").parameters)
    assert cell - {"data_root", "models_root"} == set(names_of(networks.Config))


def test_split_keeps_the_published_test_and_carves_validation_by_patient(source, store):
    published = data.read(source.root)["split"]
    after = store.manifest["split"]
    assert (after[published == "test"] == "test").all()
    assert set(after[published == "train"]) == {"train", "valid"}
    assert (store.manifest.groupby("patient_id")["split"].nunique() == 1).all()
    learnt = store.manifest[after != "test"]
    # of 100 and more images, dealt in whole patients of up to a dozen
    assert abs((learnt["split"] == "valid").mean() - _config().valid_share) < 0.08


def test_split_with_a_patient_on_both_sides_is_refused(source):
    config = _config()
    store = networks.read(config, source)
    manifest = store.manifest.copy()
    known, tested = (manifest.loc[manifest["split"] == name, "patient_id"].iloc[0] for name in ("train", "test"))
    same = manifest["patient_id"] == tested
    manifest.loc[same, ["patient_id", "group_id"]] = known
    with pytest.raises(audit.GateError, match="1 of .* in several splits|several splits"):
        networks.split(config, store._replace(manifest=manifest))


@pytest.mark.parametrize(("part", "kind"), [("train", 0.0), ("test", 1.0)])
def test_split_with_a_part_of_one_kind_is_refused_before_any_training(source, part, kind):
    config = _config()
    store = networks.read(config, source)
    one_kind = store.manifest["abnormal"].where(store.manifest["split"] != part, kind)
    with pytest.raises(
        ValueError, match=f"the .* {part} images are all {'abnormal' if kind else 'normal'}, so nothing"
    ):
        networks.split(config, store._replace(manifest=store.manifest.assign(abnormal=one_kind)))


def test_type_weights_count_training_images_alone(store):
    table = networks.type_weights(store)
    learnt = store.manifest[store.manifest["split"] == "train"]
    for name in ("XR_WRIST", "XR_SHOULDER"):
        of_type = learnt.loc[learnt["body_part"] == name, "abnormal"]
        abnormal, normal = int((of_type == 1).sum()), int((of_type == 0).sum())
        assert table.at[name, "positive"] == pytest.approx(normal / (abnormal + normal), abs=1e-12)
        assert table.at[name, "negative"] == pytest.approx(abnormal / (abnormal + normal), abs=1e-12)


def test_of_type_leaves_other_types_out_and_keeps_splits(store):
    part = networks.of_type(store, "XR_WRIST").manifest
    wrist = (store.manifest["body_part"] == "XR_WRIST").to_numpy()
    assert (part.loc[wrist, "split"] == store.manifest.loc[wrist, "split"]).all()
    assert (part.loc[~wrist, "split"] == "left out").all()


def test_variants_change_one_thing_each():
    config = _config(compare_loss=True, ensemble_seeds=[1, 2])
    found = {variant.name: variant for variant in networks.variants(config)}
    assert list(found) == ["compact", "compact, plain loss"]
    assert [variant.reference for variant in found.values()] == [None, "compact"]
    assert found["compact, plain loss"].config.loss == "plain"
    seeds = {variant.name: variant.config.seed for variant in networks.further_seeds(config)}
    assert seeds == {"compact, seed 1": 1, "compact, seed 2": 2}
    pretrained = _config(network="DenseNet169", weights="imagenet", compare_fine_tuning=True)
    assert networks.variants(pretrained)[1].config.fine_tune


def test_read_without_one_of_the_published_parts_names_it(source, tmp_path):
    for absent, other in (("train", "valid"), ("valid", "train")):
        root = tmp_path / absent
        shutil.copytree(source.root / "mura/MURA-v1.1" / other, root / "mura/MURA-v1.1" / other)
        with pytest.raises(FileNotFoundError, match=f"no image in {absent} of .*; both published parts are needed"):
            networks.read(_config(), datasets.Source(root, "real"))


def test_fit_augments_and_weighs_training_and_leaves_validation_as_it_is(store, tmp_path, monkeypatch):
    handed = {}

    def keep(model, train, valid, **options):
        handed.update(train=next(iter(train(0).as_numpy_iterator())), valid=list(valid.as_numpy_iterator()), **options)

    monkeypatch.setattr(networks.training, "fit", keep)
    config = _config(augmentation=["flip", "rotate_30"], batch_size=16)
    networks.fit(config, None, store, folder=tmp_path, epochs=1, learning_rate=0.1)
    valid = store.manifest[store.manifest["split"] == "valid"]
    pixels, labels, weights = (np.concatenate(each) for each in zip(*handed["valid"]))
    np.testing.assert_array_equal(pixels[..., 0], store.images[valid.index])
    np.testing.assert_array_equal(labels[:, 0], valid["abnormal"])
    # The weights of validation images are those of the training images' counts.
    learnt = store.manifest[store.manifest["split"] == "train"]
    shares = learnt.groupby("body_part")["abnormal"].mean()
    of_type = valid["body_part"].map(shares)
    np.testing.assert_allclose(weights, np.where(valid["abnormal"] == 1, 1 - of_type, of_type), rtol=1e-6)
    counted = valid["body_part"].map(valid.groupby("body_part")["abnormal"].mean())
    assert np.abs(weights - np.where(valid["abnormal"] == 1, 1 - counted, counted)).max() > 0.05
    # Each image of the batch is some training image, but none as it is stored, up to a rotation by next to nothing.
    stored = {image.tobytes() for image in store.images[learnt.index]}
    assert sum(image[..., 0].tobytes() in stored for image in handed["train"][0]) <= 1
    assert (handed["plateau_patience"], handed["plateau_factor"]) == (1, 0.1)
    plain = _config(loss="plain")
    networks.fit(plain, None, store, folder=tmp_path, epochs=1, learning_rate=0.1)
    assert len(handed["train"]) == 2


def test_stages_of_fine_tuning_are_the_head_then_all_at_a_share_of_the_rate():
    config = _config(learning_rate=0.01, unfrozen_share=0.1, head_epochs=3)
    assert networks.stages(config, 7, fine_tune=False) == [("all", "all", 7, 0.01)]
    assert networks.stages(config, 7, fine_tune=True) == [("head", "head", 3, 0.01), ("all", "all", 7, 0.001)]


def test_build_model_goes_on_from_a_saved_model_of_the_same_network(tmp_path):
    config = _config()
    model, receipt = networks.build_model(config)
    assert receipt is None and model.output_shape == (None, 1)
    model.save(tmp_path / "model.keras")
    again, receipt = networks.build_model(_config(weights=str(tmp_path / "model.keras")))
    assert receipt.share == 1
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 1), dtype=np.uint8)
    pooled = [keras.Model(each.inputs, each.get_layer("pool").output)(pixels) for each in (model, again)]
    np.testing.assert_array_equal(*pooled)


@pytest.mark.slow
def test_train_average_promote_and_predict_agree(source, store, tmp_path):
    config = _config(ensemble_seeds=[1])
    run = tmp_path / "run"
    environment.setup(seed=0)
    listed = [*networks.variants(config), *networks.further_seeds(config)]
    members = [networks.train(variant, store, run=run) for variant in listed]
    mean = networks.average(members, run=run)
    told = [each.predictions["p_abnormal"].to_numpy() for each in (*members, mean)]
    np.testing.assert_allclose(told[2], (told[0] + told[1]) / 2, rtol=1e-12)
    assert np.abs(told[0] - told[1]).max() > 1e-4
    again = networks.train(networks.variants(config)[0], store, run=run)
    pd.testing.assert_frame_equal(members[0].predictions, again.predictions)

    answers = results.promote(config, run, mean, members)
    assert answers["models"] == ["model.keras", "model-2.keras"]
    of_studies = studies.predictions(mean.predictions, networks.CLASS_NAMES)
    assert answers["threshold"] == multilabel.thresholds(of_studies, networks.CLASS_NAMES)[0]
    folder = source.root / "mura/MURA-v1.1/valid"
    table = mura.predict(run, folder, progress=False).set_index("study_path")
    expected = studies.predictions(mean.predictions, networks.CLASS_NAMES).query("split == 'test'")
    expected = expected.set_index(expected["study_path"].str.removeprefix("mura/MURA-v1.1/valid/"))
    assert set(table.index) == set(expected.index)
    # batches of other sizes sum in another order
    np.testing.assert_allclose(table["p_abnormal"], expected.loc[table.index, "p_abnormal"], atol=1e-5)
    assert (table["images"] == expected.loc[table.index, "images"]).all() and (table["error"] == "").all()
    assert ((table["p_abnormal"] >= answers["threshold"]) == (table["abnormal"] == 1)).all()


def _write_dicom(path, pixels, study="1.2.9"):
    """A computed radiograph whose bright bone is stored as small numbers."""
    dataset = pydicom.Dataset()
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME1"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.ComputedRadiographyImageStorage, "1.2.3"
    dataset.StudyInstanceUID = study
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.PixelData = (255 - pixels).tobytes()
    dataset.save_as(path, enforce_file_format=True)


def test_predict_averages_what_can_be_read_and_names_what_cannot(source, store, tmp_path):
    config, run = _config(), tmp_path / "run"
    environment.setup(seed=0)
    trained = networks.train(networks.variants(config)[0], store, run=run)
    results.promote(config, run, trained, [trained])
    study = store.manifest.groupby("study_id").filter(lambda images: len(images) > 1).iloc[0]["study_id"]
    paths = store.manifest.loc[store.manifest["study_id"] == study, "image_path"].tolist()
    for number, path in enumerate(paths):
        target = tmp_path / "asked/one" / f"image{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.root / path, target)
    (tmp_path / "asked/one/image9.png").write_text("not pixels")
    (tmp_path / "asked/two").mkdir()
    (tmp_path / "asked/two/image1.png").write_bytes(b"")
    table = mura.predict(run, tmp_path / "asked", progress=False).set_index("study_path")
    told = trained.predictions.loc[trained.predictions["study_id"] == study, "p_abnormal"]
    assert table.at["one", "p_abnormal"] == pytest.approx(told.mean(), abs=1e-5)
    assert table.at["one", "images"] == len(paths) and "one/image9.png: not an image" in table.at["one", "error"]
    assert np.isnan(table.at["two", "p_abnormal"]) and pd.isna(table.at["two", "abnormal"])
    assert table.at["two", "error"] == "two/image1.png: empty file (0 bytes)"

    one = mura.predict(run, tmp_path / "asked/one/image0.png", progress=False)
    assert one["study_path"].tolist() == ["image0.png"] and one["p_abnormal"].item() == pytest.approx(
        told.iloc[0], abs=1e-5
    )
    whole = mura.predict(run, tmp_path / "asked/one/", progress=False)
    assert whole["study_path"].tolist() == ["one"]
    pixels = cv2.imread(str(tmp_path / "asked/one/image0.png"), cv2.IMREAD_GRAYSCALE)
    _write_dicom(tmp_path / "asked/image.dcm", pixels)
    of_dicom = mura.predict(run, tmp_path / "asked/image.dcm", progress=False)
    assert of_dicom["p_abnormal"].item() == pytest.approx(told.iloc[0], abs=1e-5)


def test_gather_joins_dicom_of_one_study_and_other_images_of_one_folder(tmp_path):
    names = [
        "a/SE1/x.dcm",
        "a/SE2/IM0001",
        "b/y.dcm",
        "c/image1.png",
        "c/image2.png",
        "c/other.dcm",
        "c/third.dcm",
        "top.png",
    ]
    uids = {"a/SE1/x.dcm": "1.2.1", "a/SE2/IM0001": "1.2.1", "b/y.dcm": "1.2.2", "c/other.dcm": "1.2.3"}
    uids["c/third.dcm"] = "1.2.4"
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name in uids:
            _write_dicom(tmp_path / name, np.zeros((4, 4), np.uint8), study=uids[name])
        else:
            (tmp_path / name).write_bytes(b"png")
    found = prediction.gather(tmp_path, names)
    assert found == {
        "a": [0, 1],
        "b": [2],
        "c/image1.png": [3, 4],
        "c/other.dcm": [5],
        "c/third.dcm": [6],
        ".": [7],
    }
    assert prediction.gather(tmp_path / "c", ["image1.png", "image2.png"]) == {"c": [0, 1]}
    assert prediction.gather(tmp_path / "top.png", ["top.png"]) == {"top.png": [0]}


@pytest.mark.slow
def test_train_experts_answer_their_own_type_alone(store, tmp_path):
    config = _config(flips_at_test=False)
    run = tmp_path / "run"
    environment.setup(seed=0)
    one = networks.train(networks.variants(config)[0], store, run=run)
    wrist = (store.manifest["body_part"] == "XR_WRIST").to_numpy()
    assert networks.experts_name(one, sorted(set(store.manifest["body_part"])), store, fine_tune=True) == (
        "compact, one per type, fine-tuned"
    )
    own = "compact, one per type (wrist)"
    for fine_tune, name in ((False, own), (True, f"{own}, fine-tuned")):
        routed = networks.train_experts(config, one, ["XR_WRIST"], store, fine_tune=fine_tune, run=run)
        assert routed.variant == name and set(routed.predictions["variant"]) == {name}
        told, before = (each.predictions["p_abnormal"].to_numpy() for each in (routed, one))
        np.testing.assert_array_equal(told[~wrist], before[~wrist])
        assert np.abs(told[wrist] - before[wrist]).max() > 1e-4
        expert = keras.saving.load_model(runs.variant_folder(run, f"{name}-XR_WRIST") / "model.keras")
        pixels = store.images[np.flatnonzero(wrist)][..., None]
        np.testing.assert_allclose(expert.predict(pixels, verbose=0)[:, 0], told[wrist], atol=1e-5)
    stages_ = {path.name for path in (run / "variants").iterdir()}
    assert {f"compact-one-per-type-wrist-fine-tuned-XR_WRIST-{stage}" for stage in ("head", "all")} <= stages_


def test_expert_types_leaves_out_types_without_both_kinds(store):
    manifest = store.manifest
    normal = manifest["abnormal"].mask(manifest["body_part"] == "XR_HUMERUS", 0.0)
    poorer = store._replace(manifest=manifest.assign(abnormal=normal))
    assert "XR_HUMERUS" not in networks.expert_types(poorer, ["all"])
    assert networks.expert_types(store, ["XR_WRIST", "XR_HAND"]) == ["XR_HAND", "XR_WRIST"]
    assert networks.expert_types(store, []) == []
    with pytest.raises(ValueError, match="experts are asked for XR_HIP; expected some of XR_ELBOW"):
        networks.expert_types(store, ["XR_HIP"])


def test_type_share_by_hand():
    manifest = pd.DataFrame(
        {
            "split": ["train"] * 5 + ["valid"] + ["test"] * 3,
            "body_part": [
                "XR_HAND",
                "XR_HAND",
                "XR_HAND",
                "XR_HAND",
                "XR_WRIST",
                "XR_HAND",
                "XR_HAND",
                "XR_WRIST",
                "XR_HIP",
            ],
            "abnormal": [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0],
        }
    )
    assert results.type_share(manifest).probabilities[:, 0].tolist() == [0.25, 1.0, 0.4]


def test_evaluate_scores_studies_as_scikit_learn_does(store):
    config = _config()
    table = _predictions(store)
    rows = pd.DataFrame(results.evaluate(config, {"one": table}, store))
    found = rows[(rows["task"] == "studies") & (rows["variant"] == "one")].set_index(["split", "metric"])["value"]
    tested = table[table["split"] == "test"]
    # Independently of kerasmed.studies: one study after the other.
    for split in ("test", "test, XR_WRIST"):
        truth, told = [], []
        for study, images in tested.groupby("study_id"):
            if split == "test" or study.startswith("XR_WRIST/"):
                truth.append(images["y_abnormal"].iloc[0])
                told.append(sum(images["p_abnormal"]) / len(images))
        decided = np.array(told) >= 0.5
        (tn, fp), (fn, tp) = confusion_matrix(truth, decided)
        assert found[split, "auroc"] == pytest.approx(roc_auc_score(truth, told), abs=1e-12)
        assert found[split, "kappa_at_half"] == pytest.approx(cohen_kappa_score(truth, decided), abs=1e-6)
        assert found[split, "sensitivity_at_half"] == pytest.approx(tp / (tp + fn), abs=1e-6)
        assert found[split, "specificity_at_half"] == pytest.approx(tn / (tn + fp), abs=1e-6)
    # The nearest neighbour of each test image, and its study's mean, one after the other.
    learnt, asked = (np.flatnonzero(store.manifest["split"] == name) for name in ("train", "test"))
    flat = store.thumbnails.reshape(len(store.thumbnails), -1).astype(float)
    likeness = np.corrcoef(flat)[np.ix_(asked, learnt)]
    answer = store.manifest["abnormal"].to_numpy()[learnt[likeness.argmax(axis=1)]]
    by_study = pd.DataFrame({"told": answer, "study": store.manifest["study_id"].to_numpy()[asked]})
    by_study["truth"] = store.manifest["abnormal"].to_numpy()[asked]
    means = by_study.groupby("study").mean()
    neighbour = rows[(rows["task"] == "studies") & (rows["variant"] == metrics.NEAREST_NEIGHBOUR)]
    neighbour = neighbour.set_index(["split", "metric"])["value"]
    assert neighbour["test", "auroc"] == pytest.approx(roc_auc_score(means["truth"], means["told"]), abs=1e-9)

    baselines = {metrics.MAJORITY, metrics.ALL_POSITIVE, metrics.NEAREST_NEIGHBOUR, metrics.TYPE_SHARE}
    for level in ("images", "studies"):
        of_level = rows[(rows["task"] == level) & (rows["split"] == "test")]
        assert set(of_level["variant"]) == {"one"} | baselines and set(of_level["label"]) == {"abnormal"}
        assert of_level["n_groups"].unique().tolist() == [tested["patient_id"].nunique()]


def test_gain_of_studies_is_the_difference_of_the_two_levels(store):
    config = _config()
    table = _predictions(store)
    gain = results.gain_of_studies(config, _trained(table))
    rows = pd.DataFrame(results.evaluate(config, {"one": table}, store))
    rows = rows[(rows["variant"] == "one") & (rows["split"] == "test") & (rows["metric"] == "auroc")]
    values = rows.set_index("task")["value"]
    assert gain["value"] == pytest.approx(values["studies"] - values["images"])
    low, high = gain["ci95"]
    assert low < gain["value"] < high and gain["metric"] == "auroc_gain"


def test_choose_looks_at_validation_studies_alone(store):
    good, bad = _predictions(store, "good"), _predictions(store, "bad")
    valid, test = (good["split"] == name for name in ("valid", "test"))
    good.loc[valid, "p_abnormal"] = good.loc[valid, "y_abnormal"]
    bad.loc[valid, "p_abnormal"] = 1 - bad.loc[valid, "y_abnormal"]
    bad.loc[test, "p_abnormal"] = bad.loc[test, "y_abnormal"]
    assert results.choose([_trained(bad), _trained(good)]).variant == "good"
    assert results.validation_auroc(good) == 1


def test_choose_prefers_the_better_studies_to_the_better_images(store):
    manifest = store.manifest[store.manifest["split"] == "valid"].drop_duplicates("study_id")
    abnormal, normal = (manifest[manifest["abnormal"] == kind].iloc[0] for kind in (1, 0))

    def table(variant, *probabilities):
        rows = pd.concat([abnormal.to_frame().T] * 3 + [normal.to_frame().T] * 3, ignore_index=True)
        rows = rows[["image_path", "patient_id", "study_id", "group_id", "split"]].assign(variant=variant)
        return rows.assign(y_abnormal=[1.0] * 3 + [0.0] * 3, p_abnormal=probabilities)

    # Of images, 3 of 9 pairs are in order here and 6 of 9 there; of studies (means 0.5 and 0.4, 0.5 and 0.57) it turns.
    by_study = table("by study", 0.9, 0.3, 0.3, 0.4, 0.4, 0.4)
    by_image = table("by image", 0.5, 0.5, 0.5, 0.4, 0.4, 0.9)
    assert results.choose([_trained(by_image), _trained(by_study)]).variant == "by study"


def test_validation_compares_with_the_chosen_on_the_same_draws(store):
    tables = {name: _trained(_predictions(store, name, seed)) for seed, name in enumerate(("one", "two"))}
    found = results.validation(_config(), tables, "two")
    for name, each in tables.items():
        assert found.at[name, "auroc"] == pytest.approx(results.validation_auroc(each.predictions))
        assert found.at[name, "low"] <= found.at[name, "auroc"] <= found.at[name, "high"]
    assert found.loc["two", ["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]


def test_surest_shows_the_most_and_the_least_suspicious_image_of_each_type(store):
    table = _predictions(store)
    shown = results.surest(table)
    types = store.manifest.query("split == 'test' and abnormal == 1")["body_part"].nunique()
    assert len(shown) == 2 * types and shown["body_part"][:types].is_unique
    upper, lower = shown.iloc[:types], shown.iloc[types:]
    assert upper["body_part"].tolist() == lower["body_part"].tolist()
    assert (upper["p"].to_numpy() >= lower["p"].to_numpy()).all()
    for row in shown.itertuples():
        assert table.at[row.row, "split"] == "test" and table.at[row.row, "y_abnormal"] == 1
        study = table[table["study_id"] == table.at[row.row, "study_id"]]
        assert row.p == table.at[row.row, "p_abnormal"] and row.study == pytest.approx(study["p_abnormal"].mean())


def test_boxes_of_are_those_of_abnormal_test_images_in_the_stores_pixels(source, store):
    boxes = results.boxes_of(store, source)
    rows = store.manifest.iloc[boxes["row"]]
    assert len(boxes) and (rows["split"] == "test").all() and (rows["abnormal"] == 1).all()
    truth = pd.read_csv(source.root / "mura/truth.csv").set_index("image_path").loc[rows["image_path"]]
    share = boxes["x"].to_numpy() / store.images.shape[2]
    np.testing.assert_allclose(share, truth["x"].to_numpy() / store.facts["width"].to_numpy()[boxes["row"]])
    assert results.boxes_of(store, source._replace(kind="real")).empty


def test_cam_health_counts_maps_with_and_without_boxes(source, store):
    config = _config(cam_images=12)
    environment.setup(seed=0)
    model, _ = networks.build_model(config)
    boxes = results.boxes_of(store, source)
    held = results.cam_health(config, model, store, boxes, variant="one")
    assert {row["metric"] for row in held} >= {"pointing_hit", "dead_negative"}
    counted = results.cam_health(config, model, store, boxes.head(0), variant="one")
    assert {row["metric"] for row in counted} == {"dead_zero_gradient", "dead_negative"}
    assert next(row["n"] for row in counted if row["label"] == "all") == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [16, 16]}, "`image_size` is .16, 16.; expected .height, width., each at least 32"),
        ({"network": "DenseNet"}, "`network` is 'DenseNet'; expected one of compact, DenseNet121"),
        ({"weights": "imagenet"}, "no ImageNet weights of compact exist"),
        ({"loss": "focal"}, "`loss` is 'focal'; expected one of per_type, plain"),
        ({"fine_tune": True}, "with weights none there is nothing to go on from"),
        ({"compare_fine_tuning": True}, "`compare_fine_tuning` is True"),
        ({"ensemble_seeds": [0, 1]}, "`ensemble_seeds` is .0, 1.; expected further seeds"),
        ({"experts": ["all", "XR_WRIST"]}, "`experts` is .*; expected study types, each but once, or all alone"),
        ({"tuned_experts": ["XR_WRIST", "XR_WRIST"]}, "`tuned_experts` is"),
        ({"accepted": ["blak"]}, "`accepted` is"),
        ({"valid_share": 1.0}, "`valid_share` is 1.0"),
        ({"unfrozen_share": 0.0}, "`unfrozen_share` is 0.0"),
        ({"augmentation": ["spin"]}, "augmentation .'spin'. is unknown"),
    ],
)
def test_config_refuses_values_before_any_work(changes, message):
    with pytest.raises(ValueError, match=message):
        _config(**changes)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    notebook = notebooks.describe("06_mura_densenet")
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERASMED_CACHE", str(root / "cache"))
        given = {"models_root": str(root / "models")}
        run, executed = notebooks.run(notebook, notebooks.resolve(notebook, profile="smoke", given=given))
        assert executed
        located = datasets.locate("mura", runs.read_json(run / "params.json"))
    return run, located


@pytest.mark.slow
def test_smoke_run_trains_all_and_writes_everything(smoke_run):
    run, _ = smoke_run
    content = runs.read_json(run / "metrics.json")
    rows = pd.DataFrame(content["rows"])
    trained = {"compact", "compact, plain loss", "compact, seed 1", "compact, mean of 2 seeds"}
    routed = {"compact, one per type (wrist)", "compact, one per type (wrist), fine-tuned"}
    judged = rows[rows["task"] == "studies"]
    assert set(judged["variant"]) - set(metrics.BASELINES) == trained | routed
    assert set(judged.loc[judged["reference"].notna(), "variant"]) == (trained | routed) - {"compact"}
    assert {row["metric"] for row in content["headline"]} == {"auroc", "kappa_at_half"}
    assert all(row["task"] == "studies" and row["baseline"] for row in content["headline"])
    table = pd.read_csv(run / "studies.csv")
    assert table["study_id"].is_unique and set(table["split"]) == {"train", "valid", "test"}
    assert content["chosen_by"]["split"] == "valid"
    assert {path.name for path in (run / "figures").iterdir()} >= {"auroc-by-type.png", "explained.png", "studies.png"}


@pytest.mark.slow
def test_predict_of_a_fresh_process_gives_the_studies_of_the_run(smoke_run, tmp_path):
    run, located = smoke_run
    out = tmp_path / "studies.csv"
    command = [sys.executable, "-m", "kerasmed", "predict", "mura", str(located.root / "mura/MURA-v1.1/valid")]
    command += ["--run", str(run), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"})
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out).set_index("study_path")
    expected = pd.read_csv(run / "studies.csv").query("split == 'test'")
    expected = expected.set_index(expected["study_path"].str.removeprefix("mura/MURA-v1.1/valid/"))
    np.testing.assert_allclose(table["p_abnormal"], expected.loc[table.index, "p_abnormal"], atol=1e-5)
    alone = (expected["images"] == 1).sum()
    assert f"{len(expected)} of {len(expected)} studies ({alone} of one image) predicted" in done.stdout
    assert "synthetic" in done.stderr


@pytest.mark.slow
def test_training_on_synthetic_data_learns_the_signs_and_stays_below_the_ceiling(tmp_path):
    root = datasets.write_synthetic("mura", tmp_path / "set")
    demo = notebooks.resolve(notebooks.describe("06_mura_densenet"), profile="demo", given={"epochs": 5})
    config = networks.Config(**{name: demo[name] for name in names_of(networks.Config)})
    source = datasets.Source(root, "synthetic")
    store = networks.split(config, networks.read(config, source))
    environment.setup(seed=0)
    trained = networks.train(networks.variants(config)[0], store, run=tmp_path / "run")
    rows = pd.DataFrame(results.evaluate(config, {"compact": trained.predictions}, store))
    rows = rows[(rows["split"] == "test") & (rows["variant"] == "compact") & (rows["metric"] == "auroc")]
    found = rows.set_index("task")[["value", "ci95"]]
    assert found.at["studies", "value"] > 0.85
    assert results.gain_of_studies(config, trained)["ci95"][0] > 0.05
    ceiling = datasets.truth("mura", source)["ceiling"]
    for level, best in (("studies", ceiling["study_auroc"]), ("images", ceiling["image_auroc_with_type"])):
        low, high = found.at[level, "ci95"]
        # Three standard errors, a quarter of the interval's width each: more could only be a leak.
        assert found.at[level, "value"] < best + 3 * (high - low) / 4


@pytest.mark.slow
def test_densenet169_at_224_trains_and_lowers_its_rate_on_a_plateau(source, tmp_path):
    """The published recipe on a few images: batches of 8, Adam 1e-4, a tenth after an epoch without a better loss."""
    changes = {"network": "DenseNet169", "image_size": [224, 224], "batch_size": 8, "schedule": "plateau"}
    changes |= {"augmentation": ["flip", "rotate_30"], "loss": "plain", "stop_patience": 9, "epochs": 4}
    config = _config(**changes)
    whole = networks.read(config, source)
    # Learning that everything is abnormal does not help where everything is normal, so that the loss must plateau.
    split = np.full(len(whole.manifest), "left out", object)
    split[:8], split[8:12] = "train", "valid"
    store = whole._replace(manifest=whole.manifest.assign(split=split, abnormal=(split == "train").astype(float)))
    environment.fresh(0)
    model, _ = networks.build_model(config)
    options = {"folder": tmp_path / "variants", "epochs": config.epochs, "learning_rate": 1e-4}
    networks.fit(config, model, store, **options)
    history = pd.read_csv(tmp_path / "variants/history.csv")
    expected, best, rate = [], np.inf, 1e-4
    for loss in history["val_loss"]:
        expected.append(rate)
        # Keras's callback counts an epoch as better from 1e-4 on.
        best, rate = (loss, rate) if loss < best - 1e-4 else (best, rate / 10)
    np.testing.assert_allclose(history["learning_rate"], expected, rtol=1e-5)
    assert history["learning_rate"].iloc[-1] < 0.5e-4 and np.isfinite(history[["loss", "mse", "val_mse"]]).all(
        axis=None
    )
