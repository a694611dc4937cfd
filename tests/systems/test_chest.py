"""The chest system end to end, as its user runs it."""

import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from kerasmed import backbones, datasets, environment, localisation, metrics, models, notebooks, pipelines, runs, splits
from kerasmed.cli import main
from kerasmed.datasets import chest as data
from kerasmed.parameters import names_of
from kerasmed.systems import chest
from kerasmed.systems.chest import fused, networks, shared

BACKBONES = "04_chest_backbones"
FUSION = "05_chest_fusion_gradcam"


def _config(notebook=BACKBONES, **changes):
    described = notebooks.describe(notebook)
    parameters = notebooks.resolve(described, profile="smoke", given=changes)
    config_class = networks.Config if notebook == BACKBONES else fused.Config
    return config_class(**{name: parameters[name] for name in names_of(config_class)})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("chest")
    datasets.write_synthetic("chest", root, patients=60, image_side=48, seed=0)
    return datasets.Source(root, "synthetic")


@pytest.fixture
def store(source):
    config = _config()
    store = shared.read(source, vars(config))
    return shared.split(store, valid_share=0.2, seed=0, accepted=())


@pytest.mark.parametrize(("notebook", "config_class"), [(BACKBONES, networks.Config), (FUSION, fused.Config)])
def test_config_is_the_parameters_cell(notebook, config_class):
    assert set(notebooks.describe(notebook).parameters) == {*names_of(config_class), *runs.LOCATION_PARAMETERS}


def test_profiles_of_both_notebooks_use_one_synthetic_set():
    for profile in ("smoke", "demo"):
        found = [notebooks.resolve(notebooks.describe(name), profile=profile, given={}) for name in (BACKBONES, FUSION)]
        both = [{name: each[name] for name in each if name.startswith("synthetic_")} for each in found]
        assert both[0] == both[1] and found[1]["network"] in found[0]["networks"]


def test_read_leaves_absent_images_out_and_keeps_what_is_known_of_them(source, store):
    listed = data.read_table(source.root)
    assert (~listed["present"]).sum() > 0 and len(store.manifest) == listed["present"].sum()
    lost = listed[~listed["present"]]
    after = store.manifest.merge(lost.assign(follow_up=lost["follow_up"] + 1), on=["patient_id", "follow_up"])
    for name in data.FINDINGS:  # the visit after an absent image knows its findings
        assert (after[f"previous_{name}_x"] == after[f"{name}_y"]).all()


def test_split_keeps_the_official_test_list_and_no_patient_crosses(source, store):
    official = data.read(source.root)["split"]
    assert ((official == "test") == (store.manifest["split"] == "test")).all()
    assert (store.manifest.groupby("patient_id")["split"].nunique() == 1).all()
    learnt = store.manifest[official == "train"]
    assert 0.1 < (learnt["split"] == "valid").mean() < 0.3


def test_patient_values_by_hand_with_unknowns():
    manifest = pd.DataFrame(
        {"age": [40.0, np.nan], "sex": ["F", None], "view": ["AP", "PA"], "has_previous": [0.0, 1.0]}
    ).assign(**dict.fromkeys(data.PREVIOUS, 0.0))
    manifest.loc[1, "previous_Mass"] = 1.0
    np.testing.assert_array_equal(shared.patient_values(manifest, previous=False), [[40, 0, 1], [np.nan, np.nan, 0]])
    values = shared.patient_values(manifest, previous=True)
    assert values.shape == (2, 18) and values.dtype == "float32"
    assert values[0, 3:].tolist() == [0] * 15
    assert values[1, 3] == 1 and np.flatnonzero(values[1, 4:]).tolist() == [data.FINDINGS.index("Mass")]


def test_visits_and_subgroups_part_the_test_images(store):
    test = (store.manifest["split"] == "test").to_numpy()
    visits = shared.visits(store.manifest)
    assert list(visits) == ["test", "test, first visits", "test, follow-ups"]
    np.testing.assert_array_equal(visits["test, first visits"] ^ visits["test, follow-ups"], np.ones(len(test), bool))
    manifest = store.manifest.assign(sex=store.manifest["sex"].mask(store.manifest.index == np.flatnonzero(test)[0]))
    manifest.loc[np.flatnonzero(test)[1], "age"] = 40.0
    groups = shared.subgroups(manifest)
    assert {"test, women", "test, men", "test, sex unknown", "test, PA view", "test, AP view"} <= set(groups)
    assert groups["test, sex unknown"].sum() == 1 and groups["test, 40 to 59 years"][np.flatnonzero(test)[1]]
    ages = sum(mask.astype(int) for name, mask in groups.items() if "years" in name or "age" in name)
    assert (ages[test] == 1).all()


def test_undersample_leaves_out_training_images_without_findings_alone(store):
    before, after = store.manifest, networks.undersample(_config(undersampling=0.5), store).manifest
    gone = before["split"] != after["split"]
    assert set(after.loc[gone, "split"]) == {"left out"} and set(before.loc[gone, "split"]) == {"train"}
    healthy = (before["split"] == "train") & (before[data.NO_FINDING] == 1)
    assert (before.loc[gone, data.NO_FINDING] == 1).all() and gone.sum() == round(0.5 * healthy.sum())


def test_unlearnt_names_labels_of_one_kind(store):
    assert shared.unlearnt(store, data.FINDINGS) == []
    learnt = store.manifest["split"] == "train"
    manifest = store.manifest.assign(Hernia=store.manifest["Hernia"].mask(learnt, 0.0))
    assert shared.unlearnt(store._replace(manifest=manifest), data.FINDINGS) == ["Hernia"]


def test_variants_change_one_thing_each():
    config = _config(networks=["compact", "MobileNetV2"], augmentation=["noise"], compare_losses=["focal"])
    found = networks.variants(config)
    assert [each.name for each in found] == [
        *("compact", "MobileNetV2", "compact, no augmentation", "compact, 50% of No Finding left out"),
        "compact, focal loss",
    ]
    for each in found[2:]:
        assert each.reference == each.network == "compact"
        changed = {name for name in names_of(networks.Config) if getattr(each.config, name) != getattr(config, name)}
        assert len(changed - {"compare_losses"}) == 1
    quiet = replace(config, compare_augmentation=False, compare_undersampling=0.0, compare_losses=[])
    assert [each.name for each in networks.variants(quiet)] == ["compact", "MobileNetV2"]


@pytest.mark.parametrize(
    "network", ["DenseNet121", "VGG19", "ResNet50", "InceptionV3", "MobileNetV2", "EfficientNetB3"]
)
def test_training_and_prediction_give_every_backbone_the_same_tensor(source, network, tmp_path):
    # InceptionV3 needs the 75 pixels.
    config = _config(image_size=[80, 80], networks=[network], step_only=[], augmentation=[])
    manifest = data.read(source.root).head(6)
    options = {**pipelines.decode_options(vars(config)), "progress": False}
    store = pipelines.decode(manifest, source.root, **options)
    model, _ = networks.build_model(config, network)
    prepared = keras.Model(model.inputs[0], model.get_layer("preprocess").output)
    batch = {"batch_size": 6, "seed": 0, "epoch": 0, "index": 0}
    order = pipelines.epoch_order(6, seed=0, epoch=0)
    pixels, _ = pipelines.batch(store.images, np.arange(6), np.zeros((6, 1)), **batch)
    training = keras.ops.convert_to_numpy(prepared(pixels, training=True))
    # What prediction does: the file read anew, the model loaded from its file.
    prepared.save(tmp_path / "prepared.keras")
    loaded = keras.saving.load_model(tmp_path / "prepared.keras")
    told, _ = next(
        pipelines.decode_stream(source.root, manifest["image_path"].tolist(), **pipelines.decode_options(vars(config)))
    )
    inference = loaded.predict(told[..., None], verbose=0)
    np.testing.assert_array_equal(training, inference[order])
    assert training.shape[-1] == 3 and np.ptp(training) > 0


def test_build_model_same_head_on_every_network():
    heads = []
    for network in ("compact", "MobileNetV2"):
        model, _ = networks.build_model(_config(), network)
        names = [layer.name for layer in model.layers]
        heads.append([type(layer).__name__ for layer in model.layers[names.index("pool") :]])
        assert model.output_shape == (None, 15)
    assert heads[0] == heads[1] == [*("GlobalAveragePooling2D", "Dense", "Dropout", "Dense", "Dense", "Activation")]


def test_build_loss_weights_are_the_shares_of_the_others():
    y = np.array([[1.0, 0], [0, 0], [0, 1], [0, 1]])
    loss = shared.build_loss("weighted", y)
    assert loss.positive_weights == [0.75, 0.5] and loss.negative_weights == [0.25, 0.5]
    assert shared.build_loss("plain", y).positive_weights is None and shared.build_loss("focal", y).focusing == 2


# --- fusion ----------------------------------------------------------------------------------------------------------


def _image_branch(side=48):
    whole = models.compact_cnn((side, side), 15, filters=(16, 32, 32, 32), activation="sigmoid")
    return models.max_pooled(whole)


def test_build_model_of_each_step_takes_what_the_step_knows(store):
    config = _config(FUSION, units=16)
    widths = {}
    for step in fused.STEPS:
        model = fused.build_model(config, step, _image_branch(), store)
        widths[step.name] = [each.shape[1] for each in model.inputs[1:]]
        assert ("image_residual" in {layer.name for layer in model.layers}) == step.residual
        assert model.output_shape == (None, 14)
    assert widths == {"image": [], "+ patient": [3], "+ previous": [18], "+ residual": [18]}
    layer = model.get_layer("patient_dense")
    learnt = store.manifest[store.manifest["split"] == "train"]
    assert layer.means[0] == pytest.approx(learnt["age"].mean(), rel=1e-5)  # of training rows alone


def test_baselines_carry_the_previous_findings_forward(store):
    answers = fused.baselines(_config(FUSION), store)
    test = store.manifest[store.manifest["split"] == "test"]
    carried = answers[metrics.CARRY_FORWARD].probabilities
    np.testing.assert_array_equal(carried, test[list(data.PREVIOUS)])
    assert not carried[(test["has_previous"] == 0).to_numpy()].any()
    assert answers[metrics.PATIENT].probabilities.shape == carried.shape


def test_baselines_patient_and_previous_rank_better_than_either(store, tmp_path):
    datasets.write_synthetic("chest", tmp_path, patients=400, image_side=48, seed=0)
    parted = splits.published(data.read(tmp_path), shared.LABELS)
    answers = fused.baselines(_config(FUSION), store._replace(manifest=parted))
    y = parted.loc[parted["split"] == "test", list(data.FINDINGS)].to_numpy()
    once = np.ones((1, len(y)))
    areas = {
        name: np.mean([metrics.auroc(truth == 1, told, once) for truth, told in zip(y.T, each.probabilities.T)])
        for name, each in answers.items()
    }
    assert areas[metrics.PATIENT_AND_PREVIOUS] > max(areas[metrics.PATIENT], areas[metrics.CARRY_FORWARD])


def test_boxes_of_are_those_of_test_images_in_the_stores_pixels(source, store):
    half = store._replace(images=np.zeros((len(store.manifest), 24, 48), np.uint8))
    boxes = fused.boxes_of(half, source.root)
    assert len(boxes) and set(boxes["label"]) <= set(data.FINDINGS)
    assert (store.manifest["split"].to_numpy()[boxes["row"]] == "test").all()
    first = boxes.iloc[0]
    listed = data.read_boxes(source.root).set_index(["study_id", "label"])
    listed = listed.loc[(store.manifest.at[first["row"], "study_id"], first["label"])]
    assert (first["x"], first["width"]) == (listed["x"], listed["width"])
    assert (first["y"], first["height"]) == (listed["y"] / 2, listed["height"] / 2)


def test_boxes_of_findings_that_are_not_recorded_are_left_out(source, store):
    boxes = fused.boxes_of(store, source.root)
    row, label = boxes.loc[0, ["row", "label"]]
    manifest = store.manifest.copy()
    manifest.loc[row, label] = 0.0
    fewer = fused.boxes_of(store._replace(manifest=manifest), source.root)
    assert len(fewer) == len(boxes) - 1 and not ((fewer["row"] == row) & (fewer["label"] == label)).any()


def test_boxes_of_a_set_without_boxes_are_none(store, tmp_path):
    (tmp_path / "chest").mkdir()
    boxes = fused.boxes_of(store, tmp_path)
    assert boxes.empty and list(boxes) == ["label", "x", "y", "width", "height", "row"]
    assert fused.cam_health(_config(FUSION), fused.STEPS[0], store, boxes, None, split="test, boxes") == []


@pytest.mark.parametrize(("losses", "kept"), [((0.9, 0.5, 0.7), "whole"), ((0.9, 0.6, 0.4), "unfrozen")])
def test_train_keeps_the_stage_of_the_lowest_validation_loss(store, tmp_path, monkeypatch, losses, kept):
    run, stages = tmp_path / "run", dict(zip(("head", "whole", "unfrozen"), losses))
    earlier = models.compact_cnn((48, 48), 15, filters=(16, 32, 32, 32), activation="sigmoid")
    earlier.save(tmp_path / "earlier.keras")

    def fit(config, model, store, labels, *, folder, epochs, learning_rate, beside):
        loss = stages[folder.name.removeprefix("image-")]
        model.get_layer("logits").bias.assign(np.full(14, loss))  # tells the stages apart
        pd.DataFrame({"epoch": [1], "val_loss": [loss], "kept": [True]}).to_csv(folder / "history.csv", index=False)
        model.save(folder / "model.keras")

    monkeypatch.setattr(fused.shared, "fit", fit)
    origin = fused.Origin(None, {}, "compact", "compact", tmp_path / "earlier.keras")
    config = _config(FUSION, units=16)
    trained = fused.train(config, fused.STEPS[0], store, origin, run=run)
    model = keras.saving.load_model(run / "variants/image/model.keras")
    np.testing.assert_allclose(model.get_layer("logits").bias, stages[kept], rtol=1e-6)
    assert trained.history.set_index("stage")["kept"].to_dict() == {name: name == kept for name in stages}
    assert trained.history["val_loss"].tolist() == list(losses) and trained.history["epoch"].tolist() == [1, 2, 3]
    told = shared.predict_store(model, store, data.FINDINGS, variant="image")
    np.testing.assert_allclose(trained.predictions["p_Mass"], told["p_Mass"], atol=1e-6)
    assert {path.name for path in (run / "variants").iterdir()} == {"image", *(f"image-{name}" for name in stages)}
    # Once more, it is read.
    monkeypatch.setattr(fused.shared, "fit", None)
    pd.testing.assert_frame_equal(
        fused.train(config, fused.STEPS[0], store, origin, run=run).predictions, trained.predictions
    )


def test_read_refuses_another_split(source, store, tmp_path):
    config, parameters = _config(FUSION), vars(_config())
    origin = fused.Origin(tmp_path, parameters, "compact", "compact", None)
    store.manifest[["image_path", "split"]].to_csv(tmp_path / "split.csv", index=False)
    again = fused.read(config, source, origin)
    assert (again.manifest["split"] == store.manifest["split"]).all()
    store.manifest[["image_path", "split"]].iloc[1:].to_csv(tmp_path / "split.csv", index=False)
    with pytest.raises(
        ValueError, match=f"split.csv lists {len(store.manifest) - 1} images.*run 04_chest_backbones again"
    ):
        fused.read(config, source, origin)


def test_split_without_a_finding_to_choose_by_is_refused(store):
    bare = store._replace(manifest=store.manifest.assign(**dict.fromkeys(data.FINDINGS, 0.0), **{data.NO_FINDING: 1.0}))
    with pytest.raises(ValueError, match="validation images have no finding that some have and others lack"):
        shared.split(bare, valid_share=0.2, seed=0, accepted=("label_conflict",))


def test_evaluate_leaves_findings_that_nothing_is_learnt_of_out_of_the_means(store):
    learnt = store.manifest["split"] == "train"
    bare = store._replace(manifest=store.manifest.assign(Hernia=store.manifest["Hernia"].mask(learnt, 0.0)))
    rows = shared.evaluate(_config(), {}, bare, shared.LABELS)
    areas = {
        row["label"]: row["value"]
        for row in rows
        if row["variant"] == metrics.NEAREST_NEIGHBOUR and row["metric"] == "auroc"
    }
    kept = [areas[name] for name in data.FINDINGS if name != "Hernia" and areas[name] is not None]
    assert areas["all"] == pytest.approx(np.mean(kept)) and areas["Hernia"] is not None


def test_positive_pairs_are_recorded_findings_of_test_images(store):
    pairs = fused.positive_pairs(_config(FUSION, cam_pairs=25), store)
    assert len(pairs) == 25 and not pairs.duplicated().any()
    assert all(store.manifest.at[row, label] == 1 for row, label in pairs.itertuples(index=False))
    assert (store.manifest["split"].to_numpy()[pairs["row"]] == "test").all()


def test_find_origin_refuses_other_data_and_networks_that_were_not_trained(tmp_path):
    config = _config(FUSION)
    with pytest.raises(FileNotFoundError, match="on these data .*`kerasmed run 04_chest_backbones --profile smoke`"):
        fused.find_origin(config, fingerprint="f")
    parameters = vars(_config())
    run = runs.start("chest", BACKBONES, parameters, fingerprint="f", data_source="synthetic", environment={})
    runs.write_json(run / "answers.json", {"variant": "MobileNetV2, no augmentation"})
    row = {"task": "t", "metric": "m", "value": 0.5, "baseline": {"value": 0.1}}
    runs.finish(run, headline=[row], rows=[])
    named = fused.find_origin(config, fingerprint="f")
    assert named.network == "compact" and named.model == run / "variants/compact/model.keras"
    chosen = fused.find_origin(replace(config, network=""), fingerprint="f")
    assert (chosen.network, chosen.variant) == ("MobileNetV2", "MobileNetV2, no augmentation")
    assert chosen.model == run / "model.keras"  # the one that was chosen, whatever was changed in it
    with pytest.raises(
        ValueError, match="`network` is 'VGG19'; expected empty, or one that .* trained: compact, Mobile"
    ):
        fused.find_origin(replace(config, network="VGG19"), fingerprint="f")
    with pytest.raises(FileNotFoundError, match="made with other data"):
        fused.find_origin(replace(config, from_run=str(run)), fingerprint="g")


def test_surest_keeps_the_most_probable_of_each_label():
    table = pd.DataFrame({"p_Mass": [0.2, 0.9, 0.5], "p_Edema": [0.1, 0.3, 0.2]})
    pairs = pd.DataFrame({"row": [0, 1, 2, 2], "label": ["Mass", "Mass", "Mass", "Edema"]})
    kept = fused.surest(fused.Trained("x", "x", None, table), pairs, count=2)
    assert kept.to_dict("records") == [
        {"row": 2, "label": "Edema", "p": 0.2},
        {"row": 1, "label": "Mass", "p": 0.9},
        {"row": 2, "label": "Mass", "p": 0.5},
    ]


@pytest.mark.parametrize(
    ("notebook", "changes", "message"),
    [
        (BACKBONES, {"image_size": [16, 16]}, "`image_size` is .16, 16.; expected .height, width., each at least 32"),
        (BACKBONES, {"networks": ["ResNet51"]}, "`networks` is .*expected some of compact, DenseNet121"),
        (BACKBONES, {"networks": []}, "expected at least one"),
        (BACKBONES, {"step_only": ["compact"]}, "`step_only` is"),
        (BACKBONES, {"step_only": ["InceptionV3"]}, "at least 75 pixels a side"),
        (BACKBONES, {"loss": "hinge"}, "expected one of weighted, plain, focal"),
        (BACKBONES, {"compare_losses": ["weighted"]}, "`compare_losses` is"),
        (BACKBONES, {"undersampling": 1.0}, "expected a share"),
        (BACKBONES, {"accepted": ["blak"]}, "`accepted` is"),
        (BACKBONES, {"epochs": 0}, "expected at least 1"),
        (FUSION, {"unfrozen_share": 0.0}, "expected a number above 0"),
        (FUSION, {"cam_pairs": 0}, "expected at least 1"),
        (FUSION, {"dropout": 1.0}, "expected at least 0 and below 1"),
        (FUSION, {"learning_rate": 2.0}, "expected a number between 0 and 1"),
    ],
)
def test_config_refuses_values_before_any_work(notebook, changes, message):
    with pytest.raises(ValueError, match=message):
        _config(notebook, **changes)


# --- whole runs ------------------------------------------------------------------------------------------------------


def _gradient_norms(model, inputs, y, loss):
    """Norm of the loss's gradient in the first convolution of the image branch, and in all of the model."""
    import tensorflow as tf

    logits = keras.Model(model.inputs, model.get_layer("logits").output)
    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    with tf.GradientTape() as tape:
        value = loss(y, logits(inputs, training=True))
    variables = [each.value for each in model.trainable_variables]
    gradients = dict(zip([id(each) for each in model.trainable_variables], tape.gradient(value, variables)))
    norms = [float(tf.norm(each)) for each in gradients.values()]
    return float(tf.norm(gradients[id(first.kernel)])), float(np.linalg.norm(norms))


@pytest.mark.slow
def test_gradients_reach_the_image_branch_at_start_and_end_of_training(store, tmp_path):
    config = _config(FUSION, units=64, loss="weighted")
    step = fused.STEPS[-1]
    environment.fresh(0)
    model = fused.build_model(config, step, _image_branch(), store)
    y = store.manifest[list(data.FINDINGS)].to_numpy("float32")
    rows = pipelines.rows(store, "train")[:64]
    inputs = [store.images[rows][..., None], fused.beside(step, store)["patient"][rows]]
    loss = shared.build_loss("weighted", y[pipelines.rows(store, "train")])
    shares = []
    for stage in ("start", "end"):
        backbones.set_trainable(model, "compact", "all")
        branch, whole = _gradient_norms(model, inputs, y[rows], loss)
        shares.append(branch / whole)
        if stage == "start":
            options = {"epochs": 12, "learning_rate": 1e-3, "beside": fused.beside(step, store)}
            history = shared.fit(
                replace(config, stop_patience=20), model, store, data.FINDINGS, folder=tmp_path, **options
            )
            assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert min(shares) > 0.01, shares


@pytest.mark.slow
def test_training_on_synthetic_data_learns_the_signs_and_stays_below_the_ceiling(tmp_path):
    datasets.write_synthetic("chest", tmp_path, patients=500, image_side=64, seed=1)
    source = datasets.Source(tmp_path, "synthetic")
    changes = {"image_size": [64, 64], "epochs": 8, "schedule": "cosine", "stop_patience": 8, "networks": ["compact"]}
    config = _config(**changes, step_only=[], compare_losses=[])
    store = shared.split(shared.read(source, vars(config)), valid_share=0.15, seed=0, accepted=())
    (variant, *_) = networks.variants(config)
    trained = networks.train(variant, store, run=tmp_path / "run")
    extra = shared.patient_baseline(config, store, shared.LABELS)
    rows = shared.evaluate(config, {"compact": trained.predictions}, store, shared.LABELS, extra=extra)
    row = next(row for row in rows if (row["variant"], row["metric"], row["label"]) == ("compact", "auroc", "all"))
    three_errors = 3 * (row["ci95"][1] - row["ci95"][0]) / 3.92
    ceiling = datasets.truth("chest", source)["ceiling"]["image"]["test"]
    assert 0.7 < row["value"] < ceiling + three_errors
    assert row["baseline"]["difference_ci95"][0] > 0.03, "no better than what knows no image"


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    """Run folders of both notebooks in profile smoke."""
    home = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERASMED_CACHE", str(home / "cache"))
        patch.delenv("KERASMED_DATA", raising=False)
        arguments = ["run", FUSION, BACKBONES, "--profile", "smoke", "--models-root", str(home / "models")]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        found = sorted((home / "models/chest").glob("[!.]*"))
        yield found, result.output


@pytest.mark.slow
def test_smoke_run_of_04_compares_networks_beside_baselines(smoke_runs):
    (run, _), _ = smoke_runs
    content = runs.read_json(run / "metrics.json")
    rows = pd.DataFrame(content["rows"])
    compared = {"compact, no augmentation", "compact, 50% of No Finding left out", "compact, focal loss"}
    baselines = {"majority", "all_positive", "nearest_neighbour", "patient_data"}
    assert set(rows["variant"]) == {"compact", "MobileNetV2", *compared, *baselines}
    assert set(rows.loc[rows["reference"].notna(), "variant"]) == compared
    assert set(rows["label"]) == {"all", *shared.LABELS}
    one = rows[(rows["variant"] == "compact") & (rows["metric"] == "auroc")].set_index("label")["value"]
    assert one["all"] == pytest.approx(one[list(data.FINDINGS)].astype(float).mean())
    assert runs.read_json(run / "variants/VGG19-step/cost.json")["weights"] > 20_000_000
    chosen = runs.read_json(run / "answers.json")
    table = pd.read_csv(run / "predictions.csv", dtype={"patient_id": str})
    assert set(table["variant"]) == {chosen["variant"]} and content["chosen_by"]["split"] == "valid"
    assert content["chosen_by"]["value"] == pytest.approx(shared.validation_auroc(table))


@pytest.mark.slow
def test_smoke_run_of_05_goes_on_from_04_and_keeps_its_split(smoke_runs):
    (earlier, run), output = smoke_runs
    assert output.index("[1/2] 04_chest") < output.index("[2/2] 05_chest")  # whatever the order asked for
    assert runs.read_json(run / "params.json")["from_run"] == str(earlier)
    pd.testing.assert_frame_equal(pd.read_csv(run / "split.csv"), pd.read_csv(earlier / "split.csv"))
    content = runs.read_json(run / "metrics.json")
    rows = pd.DataFrame(content["rows"])
    told = rows[rows["metric"] == "auroc"]
    assert {"test", "test, first visits", "test, follow-ups", "test, women"} <= set(told["split"])
    baselines = {metrics.CARRY_FORWARD, metrics.PATIENT, metrics.PATIENT_AND_PREVIOUS}
    assert {*fused.NAMES, *baselines} <= set(told["variant"])
    steps = told[told["variant"].isin(fused.NAMES[1:]) & (told["label"] == "all") & (told["split"] == "test")]
    against = {row["variant"]: row["reference"]["variant"] for row in steps.to_dict("records")}
    assert against == {"+ patient": "image", "+ previous": "+ patient", "+ residual": "+ previous"}
    health = rows[rows["metric"].isin(localisation.METRICS) & (rows["label"] == "all")]
    counts = health.groupby(["split", "variant"]).size().unstack(0)
    assert counts.loc[list(fused.NAMES)].to_numpy().tolist() == [[6, 2]] * 4
    assert {row["metric"] for row in content["headline"]} == {"auroc", "average_precision", "pointing_hit"}


@pytest.mark.slow
def test_predict_gives_the_probabilities_of_both_runs(smoke_runs, tmp_path):
    found, _ = smoke_runs
    params = runs.read_json(found[0] / "params.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERASMED_CACHE", str(found[0].parents[2] / "cache"))
        root = datasets.locate("chest", params).root
    for run in found:
        # In a process of its own, which has built no such model before.
        out = tmp_path / f"{run.name}.csv"
        arguments = ["predict", "chest", root / "chest", "--run", run, "--out", out]
        subprocess.run([sys.executable, "-m", "kerasmed", *map(str, arguments)], check=True)
        told = pd.read_csv(out)
        known = pd.read_csv(run / "predictions.csv")
        told["image_path"] = "chest/" + told["image_path"]
        both = known.merge(told, on="image_path", suffixes=("", "_again"))
        assert len(both) == len(known) == len(told)
        columns = [name for name in known if name.startswith("p_")]
        again = both[[f"{name}_again" for name in columns]].to_numpy()
        np.testing.assert_allclose(both[columns].to_numpy(), again, atol=1e-5)
    # Away from its tables, an image is predicted with nothing known of the patient.
    alone = tmp_path / "one.png"
    alone.write_bytes((root / known["image_path"][0]).read_bytes())
    table = chest.predict(found[1], alone, progress=False)
    assert np.isfinite(table[columns].to_numpy()).all() and set(table["Mass"]) <= {0, 1}
