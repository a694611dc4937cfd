"""The tritask system end to end, as its user runs it."""

from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest

from kerasmed import audit, datasets, environment, metrics, multilabel, notebooks, runs
from kerasmed.datasets import tritask as data
from kerasmed.parameters import names_of
from kerasmed.systems import tritask

QUICK = {
    "networks": ["fcnn2"],
    "without_augmentation": [],
    "compare_policies": [],
    "compare_heads": False,
    "bootstraps": 50,
}


def _config(**changes):
    notebook = notebooks.describe("09_tritask_dedup")
    parameters = notebooks.resolve(notebook, profile="smoke", given=QUICK | changes)
    return tritask.Config(**{name: parameters[name] for name in names_of(tritask.Config)})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("tritask")
    datasets.write_synthetic("tritask", root, train_images=160, valid_images=80, test_images=20, seed=0)
    return datasets.Source(root, "synthetic")


@pytest.fixture
def store(source):
    return tritask.split(_config(), tritask.read(_config(), source))


def test_read_makes_each_black_image_a_group_of_its_own(source):
    manifest = tritask.read(_config(), source).manifest
    assert manifest["black"].sum() == 65  # a quarter of 160, 80 and 20
    assert not manifest.loc[manifest["black"] == 1, "group_id"].duplicated().any()


def test_split_tests_on_the_published_validation_and_carves_its_own(source, store):
    published = data.read(source.root)["split"]
    after = store.manifest["split"]
    assert (after[published == "valid"] == "test").all() and (after[published == "test"] == "unlabelled").all()
    assert set(after[published == "train"]) == {"train", "valid"}
    assert (after == "valid").sum() == 24  # 15 % of 160
    shares = store.manifest.query("split in ('train', 'valid')").groupby("split")["black"].mean()
    # 24 images of 16 strata: dealing whole images shifts a share by a few of them
    assert abs(shares["train"] - shares["valid"]) < 0.15


def test_split_without_labelled_validation_images_is_refused(source, store):
    unlabelled = store._replace(manifest=store.manifest.assign(split="train").dropna())
    with pytest.raises(ValueError, match="no readable image in val_images, so none to test on"):
        tritask.split(_config(), unlabelled)


def test_split_gate_stops_at_black_images_that_nobody_has_accepted(source):
    config = _config(accepted=[])
    with pytest.raises(audit.GateError, match=r"60 of 240 images: entirely black images.*accept knowingly: black"):
        tritask.split(config, tritask.read(config, source))


def test_split_leaves_training_images_of_a_tested_group_out(source):
    store = tritask.read(_config(), source)
    first = store.manifest[store.manifest["black"] == 0].reset_index().groupby("split")["index"].first()
    thumbnails, facts, manifest = np.array(store.thumbnails), store.facts.copy(), store.manifest.copy()
    train, valid = first["train"], first["valid"]
    thumbnails[valid], facts.loc[valid, "digest"] = thumbnails[train], facts.loc[train, "digest"]
    copied = store._replace(thumbnails=thumbnails, facts=facts)
    # The copy has a group of its own yet: only the pixels tell.
    with pytest.raises(audit.LeakError, match="leak_duplicate"):
        tritask.split(_config(), copied)
    manifest.loc[valid, "group_id"] = manifest.loc[train, "group_id"]
    after = tritask.split(_config(), copied._replace(manifest=manifest)).manifest["split"]
    assert (after[train], after[valid]) == ("left out", "test") and (after == "left out").sum() == 1


def test_deduplicate_leaves_black_images_out_of_training_alone(store):
    black = {
        policy: tritask.deduplicate(_config(policy=policy), store).manifest.query("black == 1")["split"].value_counts()
        for policy in audit.POLICIES
    }
    before = store.manifest.query("black == 1")["split"].value_counts()
    sets = audit.label_sets(store.manifest.query("black == 1 and split == 'train'"), tritask.CLASS_NAMES)
    assert black["keep_all"].to_dict() == before.to_dict()
    assert "train" not in black["drop_all"] and black["drop_all"]["left out"] == before["train"]
    assert black["one_per_label_set"]["train"] == sets.nunique()
    assert (
        black["all_zero_and_all_one"]["train"] == sets.isin(["none", "label1+label2+label3"]).groupby(sets).any().sum()
    )
    for counts in black.values():
        assert counts[["valid", "test", "unlabelled"]].to_dict() == before[["valid", "test", "unlabelled"]].to_dict()


def test_variants_change_one_thing_each():
    config = _config(
        networks=["cnn2", "fcnn1"],
        without_augmentation=["fcnn1"],
        compare_policies=["drop_all"],
        compare_heads=True,
    )
    found = {variant.name: variant for variant in tritask.variants(config)}
    assert list(found) == ["cnn2", "fcnn1", "fcnn1, no augmentation", "cnn2, drop_all", "cnn2, independent"]
    assert [variant.reference for variant in found.values()] == [None, None, "fcnn1", "cnn2", "cnn2"]
    assert found["fcnn1, no augmentation"].config.augmentation == []
    assert (found["cnn2, drop_all"].config.policy, found["cnn2"].config.policy) == ("drop_all", "all_zero_and_all_one")
    assert found["cnn2, independent"].config == replace(config, heads="independent")


def test_build_model_independent_trunks_share_nothing():
    config = _config(heads="independent")
    model, _ = tritask.build_model(config, "fcnn2")
    shared, _ = tritask.build_model(_config(), "fcnn2")
    assert model.output_shape == shared.output_shape == (None, 3)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), dtype=np.uint8)
    before = model.predict(images, verbose=0)
    trunk = model.get_layer("label2")
    trunk.set_weights([weight + 0.1 for weight in trunk.get_weights()])
    changed = np.abs(model.predict(images, verbose=0) - before).max(axis=0)
    assert changed[1] > 1e-3 and changed[[0, 2]].max() == 0


@pytest.mark.parametrize("heads", tritask.HEADS)
def test_train_choose_promote_and_predict_agree_with_the_run(source, store, tmp_path, heads):
    config = _config(heads=heads, epochs=2)
    run = tmp_path / "run"
    environment.setup(seed=0)
    (variant,) = tritask.variants(config)
    trained = tritask.train(variant, store, run=run)
    again = tritask.train(variant, store, run=run)
    pd.testing.assert_frame_equal(trained.predictions, again.predictions)
    assert len(trained.history) == 2 and trained.history["kept"].sum() == 1
    promoted = tritask.promote(run, tritask.choose([trained]))
    assert set(promoted["thresholds"]) == set(tritask.CLASS_NAMES)
    runs.write_json(run / "params.json", {name: getattr(config, name) for name in names_of(tritask.Config)})
    folder = source.root / "tritask/val_images"
    table = tritask.predict(run, folder, progress=False)
    told = trained.predictions[trained.predictions["split"] == "test"]
    assert [f"tritask/val_images/{name}" for name in table["image_path"]] == told["image_path"].tolist()
    columns = [f"p_{name}" for name in tritask.CLASS_NAMES]
    # other batch sizes sum in another order
    np.testing.assert_allclose(table[columns], told[columns], atol=1e-5)
    thresholds = list(promoted["thresholds"].values())
    decided = table[columns].to_numpy() >= thresholds
    np.testing.assert_array_equal(table[list(tritask.CLASS_NAMES)].to_numpy(bool), decided)

    submission, unanswered = tritask.submission(source, trained)
    data.check_submission(submission, data.read_sample(source.root))
    assert len(submission) == 20 and unanswered == []


def test_submission_of_an_unreadable_image_stands_as_zero_and_is_named(source, store):
    told = store.manifest[list(("image_path", "split"))].assign(variant="v")
    for name in tritask.CLASS_NAMES:
        told[f"y_{name}"], told[f"p_{name}"] = store.manifest[name], 0.9
    lost = told[told["split"] == "unlabelled"]["image_path"].iloc[3]
    kept = told[told["image_path"] != lost].reset_index(drop=True)
    submission, unanswered = tritask.submission(source, tritask.Trained("v", "v", pd.DataFrame(), kept))
    assert [name.removesuffix(".png") for name in unanswered] == [lost.split("/")[-1].removesuffix(".png")]
    zero = submission[(submission[list(tritask.CLASS_NAMES)] == 0).all(axis=1)]
    assert zero["id"].tolist() == unanswered


def test_evaluate_on_black_images_stands_beside_constant_answers_only(store):
    config, rng = _config(), np.random.default_rng(0)
    table = store.manifest[["image_path", "split"]].copy()
    for name in tritask.CLASS_NAMES:
        table[f"y_{name}"] = store.manifest[name]
        table[f"p_{name}"] = np.where(store.manifest["black"] == 1, 0.7, rng.random(len(table)))
    rows = pd.DataFrame(tritask.evaluate(config, {"net": table}, store))
    assert set(rows["split"]) == {"test", "test, not black", "test, black"}
    black = rows[(rows["split"] == "test, black") & (rows["metric"] == "f1") & (rows["label"] != "all")]
    assert set(black["variant"]) == {"net", metrics.MAJORITY, metrics.ALL_POSITIVE}
    tested = store.manifest.query("split == 'test' and black == 1")
    for row in black[black["variant"] == metrics.ALL_POSITIVE].itertuples():
        p = tested[row.label].mean()
        assert row.value == pytest.approx(2 * p / (1 + p), rel=1e-6)
    best = black[black["variant"] == metrics.ALL_POSITIVE].set_index("label")["value"]
    # 0.7 for every black image is a constant answer; one that is told the labels of black images is above the best.
    told = table.assign(**{f"p_{name}": table[f"y_{name}"].fillna(0) * 0.8 + 0.1 for name in tritask.CLASS_NAMES})
    rows = pd.DataFrame(tritask.evaluate(config, {"net": table, "told": told}, store))
    black = rows[(rows["split"] == "test, black") & (rows["metric"] == "f1") & (rows["label"] != "all")]
    values = black.pivot(index="label", columns="variant", values="value")
    assert (values["net"] <= best + 1e-9).all() and (values["told"] > best + 0.1).all()


def test_evaluate_without_black_test_images_has_no_such_subset(store):
    bright = store._replace(manifest=store.manifest.assign(black=0))
    table = store.manifest[["image_path", "split"]].copy()
    for name in tritask.CLASS_NAMES:
        table[f"y_{name}"], table[f"p_{name}"] = store.manifest[name], 0.5
    rows = pd.DataFrame(tritask.evaluate(_config(), {"net": table}, bright))
    assert set(rows["split"]) == {"test", "test, not black"}


def test_errors_are_the_surest_wrong_answers_of_images_that_show_something(store):
    table = store.manifest[["image_path", "split"]].copy()
    for name in tritask.CLASS_NAMES:
        table[f"y_{name}"], table[f"p_{name}"] = store.manifest[name], 0.5
    shown = store.manifest.query("split == 'test' and black == 0").index
    table.loc[shown[5], "p_label2"] = 1 - 0.9 * table.loc[shown[5], "y_label2"]
    trained = tritask.Trained("v", "v", pd.DataFrame(), table)
    found = tritask.errors(store, trained, "label2", count=3)
    assert found.index[0] == shown[5] and set(found.index) <= set(shown) and len(found) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [16, 16]}, "`image_size` is .16, 16.; expected .height, width., each at least 32"),
        ({"networks": ["cnn6"]}, r"`networks` is \['cnn6'\]; expected some of cnn1"),
        ({"networks": []}, "expected at least one"),
        ({"networks": ["Xception"], "image_size": [64, 64]}, "`image_size` is .64, 64.; expected at least 71 pixels"),
        ({"networks": ["VGG19", "ResNet50"], "weights": "x.h5"}, "`weights` is 'x.h5'; expected imagenet or none"),
        ({"policy": "drop"}, "`policy` is 'drop'; expected one of keep_all"),
        ({"compare_policies": ["all_zero_and_all_one"]}, "`compare_policies` is"),
        ({"without_augmentation": ["cnn1"]}, "expected some of fcnn2"),
        ({"without_augmentation": ["fcnn2"], "augmentation": []}, "as `augmentation` is empty"),
        ({"monitor": "loss"}, "expected one of val_loss, val_accuracy, val_f1"),
        ({"optimizer": "rmsprop"}, "expected one of adam, sgd"),
        ({"accepted": ["blak"]}, "`accepted` is"),
        ({"learning_rate": 0.0}, "expected more than 0"),
        ({"epochs": 0}, "expected at least 1"),
    ],
)
def test_config_refuses_values_before_any_work(changes, message):
    with pytest.raises(ValueError, match=message):
        _config(**changes)


@pytest.mark.slow
def test_smoke_run_trains_all_and_writes_everything():
    notebook = notebooks.describe("09_tritask_dedup")
    run, executed = notebooks.run(notebook, notebooks.resolve(notebook, profile="smoke", given={}))
    assert executed
    content = runs.read_json(run / "metrics.json")
    networks = {*tritask.scan_networks.NAMES, "EfficientNetB0"}
    compared = {"cnn2, no augmentation", "cnn2, keep_all", "cnn2, independent"}
    rows = pd.DataFrame(content["rows"])
    assert set(rows["variant"]) == networks | compared | {"majority", "all_positive", "nearest_neighbour", "svc"}
    assert set(rows.loc[rows["reference"].notna(), "variant"]) == compared
    for name in networks | compared:
        folder = run / "variants" / name.replace(", ", "-").replace(" ", "-")
        assert {"model.keras", "history.csv", "predictions.csv"} <= {path.name for path in folder.iterdir()}
    constant = rows[(rows["split"] == "test, black") & (rows["variant"] == metrics.ALL_POSITIVE)]
    best = constant[constant["metric"] == "f1"].set_index("label")["value"]
    black = rows[
        (rows["split"] == "test, black") & (rows["metric"] == "f1") & rows["variant"].isin(networks | compared)
    ]
    assert (black["value"] <= black["label"].map(best) + 1e-9)[black["label"] != "all"].all()
    root = datasets.locate("tritask", runs.read_json(run / "params.json")).root
    data.check_submission(pd.read_csv(run / "submission.csv", dtype={"id": str}), data.read_sample(root))
    assert content["chosen_by"]["split"] == "valid" and content["headline"][0]["baseline"]
    chosen = runs.read_json(run / "thresholds.json")["variant"]
    table = pd.read_csv(run / "predictions.csv")
    assert set(table["variant"]) == {chosen} and keras.saving.load_model(run / "model.keras").output_shape == (None, 3)
    value = multilabel.mean_score(table, tritask.CLASS_NAMES, split="valid")
    assert content["chosen_by"]["value"] == pytest.approx(value)
