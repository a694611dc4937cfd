"""The brain system end to end, as its user runs it."""

import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

from kerasmed import audit, backbones, datasets, environment, gradcam, metrics, notebooks, pipelines, predictions, runs
from kerasmed.manifest import class_ids
from kerasmed.parameters import names_of
from kerasmed.systems.brain import networks as brain
from kerasmed.systems.brain import shared

TYPES = brain.CLASS_NAMES["brain_tumor"]
QUICK = {
    "data_source": "auto",
    "folds": 1,
    "networks": ["compact"],
    "ablation": [],
    "compare_class_weights": False,
    "published_protocol": False,
    "epochs": 2,
    "bootstraps": 50,
    "max_quarantined_share": 0.2,
    "test_share": 0.2,
    "valid_share": 0.2,
}


def _config(**changes):
    notebook = notebooks.describe("07_brain_mri")
    parameters = notebooks.resolve(notebook, profile="smoke", given=QUICK | changes)
    return brain.Config(**{name: parameters[name] for name in names_of(brain.Config)})


def test_read_groups_slices_and_split_cuts_none(brain_root):
    config = _config()
    store = brain.read(config, datasets.Source(brain_root, "real"), "alzheimer")
    assert store.manifest["group_id"].nunique() == 24
    (store,) = brain.split(config, store, "alzheimer")
    assert store.manifest.groupby("group_id")["split"].nunique().eq(1).all()
    assert set(store.manifest["split"]) == {"train", "valid", "test"}


def test_split_into_folds_tests_every_image_once(brain_root):
    config = _config(folds=3, valid_share=0.2)
    parts = brain.split(config, brain.read(config, datasets.Source(brain_root, "real"), "brain_tumor"), "brain_tumor")
    tested = np.concatenate([pipelines.rows(part, "test") for part in parts])
    assert len(parts) == 3 and sorted(tested) == list(range(48))


def test_published_splits_are_with_and_without_the_leaked_images(brain_root):
    home = brain_root / "brain/brain_tumor"
    source, config = datasets.Source(brain_root, "real"), _config(published_protocol=True)
    store = brain.read(config, source, "brain_tumor")
    assert brain.published_splits(config, store, "brain_tumor") == {}
    # Patients have two slices, 0 and 1, 2 and 3, ...: one patient goes to test whole, of another one slice.
    (home / "test/glioma_tumor").mkdir(parents=True)
    for number in (0, 1, 2):
        name = f"glioma_tumor/gl ({number}).jpg"
        (home / "train" / name).rename(home / "test" / name)
    found = brain.published_splits(config, brain.read(config, source, "brain_tumor"), "brain_tumor")
    assert {name: len(pipelines.rows(part, "test")) for name, part in found.items()} == {
        "published test": 3,
        "published test, clean": 2,
    }
    with pytest.raises(audit.LeakError):
        audit.gate(found["published test"].manifest)
    audit.gate(found["published test, clean"].manifest.query("split != 'left out'"))


def test_stages_of_a_backbone_are_its_head_and_then_its_last_stage():
    config = _config(unfrozen_learning_rate=1e-5, weights="imagenet")
    (head, part, _), (unfrozen, last, options) = shared.stages(config, "VGG19")
    assert (head, part) == ("VGG19-head", "head") and (unfrozen, last) == ("VGG19-unfrozen", "last_stage")
    assert options["learning_rate"] == 1e-5 and options["schedule"] == "plateau"
    assert shared.stages(config, "compact") == [("compact", None, {})]
    ((whole, part, _),) = shared.stages(_config(weights="none"), "VGG19")
    assert (whole, part) == ("VGG19", "all")


def test_ablations_change_one_thing_each():
    config = _config(ablation=["none", "keras:flip+rotate"], compare_class_weights=True, class_weights=True)
    found = brain.ablations(config)
    assert list(found) == ["augmentation none", "augmentation keras:flip+rotate", "class weights off"]
    changed = {
        name: {key: value for key, value in asdict(other).items() if value != asdict(config)[key]}
        for name, other in found.items()
    }
    assert changed["augmentation none"] == {"augmentation": []}
    assert changed["augmentation keras:flip+rotate"] == {
        "augmentation": ["flip", "rotate"],
        "augmentation_library": "keras",
    }
    assert changed["class weights off"] == {"class_weights": False}


def _pretrained(tmp_path):
    """A MobileNetV2 whose file passes for pretrained, and a task's split."""
    environment.fresh(7)
    features, _ = backbones.build("MobileNetV2", (32, 32), weights="none")
    features.save(tmp_path / "pretrained.keras")
    return _config(weights=str(tmp_path / "pretrained.keras"), networks=["MobileNetV2"], epochs=1, image_size=[32, 32])


@pytest.mark.slow
def test_train_backbone_learns_its_head_then_its_last_stage_and_is_not_repeated(brain_root, tmp_path, capsys):
    config = _pretrained(tmp_path)
    store = brain.read(config, datasets.Source(brain_root, "real"), "brain_tumor")
    (store,) = brain.split(config, store, "brain_tumor")
    parts = shared.train(config, store, TYPES, "MobileNetV2", run=tmp_path, task="brain_tumor", label="a b:c")
    folders = [tmp_path / "variants" / each.folder for each in parts]
    assert [folder.name for folder in folders] == [
        "brain_tumor-MobileNetV2-head-a-b-c",
        "brain_tumor-MobileNetV2-unfrozen-a-b-c",
    ]
    assert "260 tensors matched, 0 left random" in capsys.readouterr().out
    assert runs.read_json(folders[0] / "weights.json")["share"] == 1
    start, head, unfrozen = (
        {layer.name: layer for layer in keras.saving.load_model(path).layers}
        for path in (tmp_path / "pretrained.keras", *(folder / "model.keras" for folder in folders))
    )

    def changed(one, other):
        return {
            name
            for name in one.keys() & other.keys()
            if any(not np.array_equal(*pair) for pair in zip(one[name].get_weights(), other[name].get_weights()))
        }

    assert changed(start, head) == set() and "logits" in changed(head, unfrozen)
    names = list(unfrozen)
    last_stage = set(names[names.index("block_12_add") + 1 :])
    moved = changed(head, unfrozen)
    assert {"Conv_1", "block_13_expand"} <= moved <= last_stage
    assert not any(isinstance(unfrozen[name], keras.layers.BatchNormalization) for name in moved)

    written = (folders[0] / "model.keras").stat().st_mtime_ns
    again = shared.train(config, store, TYPES, "MobileNetV2", run=tmp_path, task="brain_tumor", label="a b:c")
    pd.testing.assert_frame_equal(again[1].predictions, parts[1].predictions, check_exact=True)
    assert (folders[0] / "model.keras").stat().st_mtime_ns == written

    # Killed between its stages, it ends with the same weights: dropout's draws do not depend on the stage before.
    shutil.rmtree(folders[1])
    shared.train(config, store, TYPES, "MobileNetV2", run=tmp_path, task="brain_tumor", label="a b:c")
    resumed = {layer.name: layer for layer in keras.saving.load_model(folders[1] / "model.keras").layers}
    assert changed(unfrozen, resumed) == set()


def test_choose_looks_at_validation_only(brain_root):
    config = _config()
    (store,) = brain.split(
        config, brain.read(config, datasets.Source(brain_root, "real"), "brain_tumor"), "brain_tumor"
    )
    names = brain.CLASS_NAMES["brain_tumor"]
    right = np.eye(4)[class_ids(store.manifest, names)]
    valid = (store.manifest["split"] == "valid").to_numpy()[:, None]
    tables = [np.where(valid, right, 0.25), np.where(valid, right[:, ::-1], right)]
    candidates = [
        brain.Trained(str(number), "", None, predictions.tabulate(store.manifest, each, names, variant=str(number)))
        for number, each in enumerate(tables)
    ]
    assert shared.choose(candidates, TYPES).variant == "0"


def test_read_uses_patients_where_given(brain_root):
    home = brain_root / "brain/alzheimer"
    lines = [
        f"{path.relative_to(home).as_posix()},P{number % 9}" for number, path in enumerate(sorted(home.rglob("*.jpg")))
    ]
    (home / "patients.csv").write_text("image_path,patient_id\n" + "\n".join(lines))
    store = brain.read(_config(), datasets.Source(brain_root, "real"), "alzheimer")
    assert sorted(store.manifest["group_id"].unique()) == [f"P{number}" for number in range(9)]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("tasks", [], "some of alzheimer, brain_tumor"),
        ("tasks", ["stroke"], "some of alzheimer, brain_tumor"),
        ("image_size", [96], "each at least 16"),
        ("image_size", [0, 96], "each at least 16"),
        ("batch_size", 0, "at least 1"),
        ("bootstraps", 0, "at least 1"),
        ("test_share", 0.0, "between 0 and 1"),
        ("test_share", 0.9, "below 1"),
        ("schedule", "warm", "one of cosine"),
        ("augmentation", ["spin"], "known are flip"),
        ("fit", "squeeze", "expected one of"),
        ("folds", 0, "at least 1"),
        ("networks", [], "some of compact, five_block"),
        ("networks", ["LeNet"], "some of compact, five_block"),
        ("networks", ["compact", "compact"], "each but once"),
        ("tasks", ["alzheimer", "alzheimer"], "each but once"),
        ("networks", ["compact", "five_block", "Xception"], "at least 71 pixels a side"),
        ("weights_seconds", 0.0, "more than 0"),
        ("focusing", -1.0, "at least 0"),
        ("max_quarantined_share", 5.0, "0 to 1"),
        ("ablation", ["flip+spin"], "known are flip"),
        ("ablation", ["torch:flip"], "albumentations or keras"),
        ("augmentation_library", "torch", "albumentations or keras"),
    ],
)
def test_config_refuses_values_before_any_work(name, value, expected):
    with pytest.raises(ValueError, match=expected):
        _config(**{name: value})


def test_config_refuses_what_two_parameters_make_together():
    with pytest.raises(ValueError, match="a file fits one backbone only"):
        _config(networks=["VGG19", "ResNet50"], weights="mine.keras")
    with pytest.raises(ValueError, match="`valid_share` is 0.6"):
        _config(folds=2, valid_share=0.6)


def test_find_weights_refuses_before_any_training():
    with pytest.raises(FileNotFoundError, match="no file at `weights` = gone.keras"):
        shared.find_weights(_config(weights="gone.keras"), ["VGG19"])
    with pytest.raises(ValueError, match="'ImageNet'; expected 'imagenet', 'none'"):
        shared.find_weights(_config(weights="ImageNet"), ["compact", "VGG19"])
    shared.find_weights(_config(weights="imagenet"), ["compact"])  # nothing to have


def test_read_class_without_readable_images_is_refused(brain_root):
    for path in (brain_root / "brain/alzheimer/train/MildDemented").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="alzheimer has no readable image of MildDemented"):
        brain.read(_config(max_quarantined_share=0.9), datasets.Source(brain_root, "real"), "alzheimer")


def test_evaluate_scores_few_group_classes_apart(brain_root, rng):
    home = brain_root / "brain/alzheimer/train/ModerateDemented"
    for path in sorted(home.iterdir())[4:]:
        path.unlink()  # two patients are left
    config = _config(test_share=0.3)
    parts = brain.split(config, brain.read(config, datasets.Source(brain_root, "real"), "alzheimer"), "alzheimer")
    names, manifest = brain.CLASS_NAMES["alzheimer"], parts[0].manifest
    probabilities = rng.dirichlet(np.ones(4), len(manifest))
    table = predictions.tabulate(manifest, probabilities, names, variant="net")
    rows = brain.evaluate(config, {"net": [table]}, parts, "alzheimer")
    found = predictions.headline(rows, task="alzheimer", variant="net")
    assert {row["label"] for row in found} == {"all", "3 classes: all"}
    apart = next(row for row in found if row["label"] == "3 classes: all" and row["metric"] == "accuracy")
    kept = (manifest["split"] == "test") & (manifest["ModerateDemented"] == 0)
    truth = manifest.loc[kept, list(names[:3])].to_numpy().argmax(axis=1)
    expected = (probabilities[kept][:, :3].argmax(axis=1) == truth).mean()
    assert apart["value"] == pytest.approx(expected) and apart["n"] == kept.sum()


def test_sign_boxes_cover_the_sign_in_the_stores_pixels():
    config = _config(data_source="synthetic", image_size=[48, 64], synthetic_patients_per_class=3)
    source = datasets.locate("brain", asdict(config))
    store = brain.read(config, source, "brain_tumor")
    boxes = shared.sign_boxes(source, store, fit=config.fit)
    signless = np.isnan(boxes).all(axis=1)
    truth = pd.read_csv(source.root / "brain/truth.csv").set_index("image_path").loc[store.manifest["image_path"]]
    assert (signless == (truth["signal"] == "no_tumor").to_numpy()).all() and 0 < signless.sum() < len(signless)
    x, y, width, height = boxes[~signless].T
    assert (x + width <= 64 + 1e-9).all() and (y + height <= 48 + 1e-9).all()
    # The sign is a disc of 0.29 to 0.35 of either side, cut to whole pixels of the file (at least 77 a side).
    assert ((width / 64 > 0.27) & (width / 64 < 0.39)).all() and ((height / 48 > 0.27) & (height / 48 < 0.39)).all()
    with pytest.raises(ValueError, match="'stretch'"):
        shared.sign_boxes(source, store, fit="pad")


@pytest.mark.slow
def test_fit_on_synthetic_data_reaches_the_known_ceiling_and_no_more(tmp_path):
    task = "brain_tumor"
    notebook = notebooks.describe("07_brain_mri")
    parameters = notebooks.resolve(notebook, profile="demo", given={"epochs": 9})
    config = brain.Config(**{name: parameters[name] for name in names_of(brain.Config)})
    environment.setup(seed=config.seed)
    (store,) = brain.split(config, brain.read(config, datasets.locate("brain", parameters), task), task)
    (trained,) = shared.train(config, store, brain.CLASS_NAMES[task], "compact", run=tmp_path, task=task)
    model = keras.saving.load_model(tmp_path / "variants" / trained.folder / "model.keras")

    # Patients that no part of the training set has seen, one image each: 400 independent trials.
    other = datasets.write_synthetic(
        "brain", tmp_path / "other", patients_per_class=100, slices_per_patient=1, seed=1000
    )
    unseen = brain.read(config, datasets.Source(other, "synthetic"), task)
    predicted = shared.predict_store(model, unseen, brain.CLASS_NAMES[task], variant="compact")
    right = predicted.filter(regex="^p_").to_numpy().argmax(axis=1) == predicted.filter(regex="^y_").to_numpy().argmax(
        axis=1
    )
    ceiling = datasets.truth("brain", datasets.Source(other, "synthetic"))["ceiling"][task]
    # Classes are of equal size, so accuracy is balanced accuracy.
    assert right.mean() >= ceiling - 0.07
    assert right.mean() <= ceiling + 3 * np.sqrt(ceiling * (1 - ceiling) / len(right)), (
        "better than the label noise allows: a leak"
    )

    # Grad-CAM of the reloaded model finds the planted sign, whose box covers about a tenth of the image.
    tested = unseen._replace(manifest=unseen.manifest.assign(split="test"))
    boxes = shared.sign_boxes(datasets.Source(other, "synthetic"), tested, fit=config.fit)
    pointing = shared.pointing_game(tested, brain.CLASS_NAMES[task], boxes, gradcam.build(model))
    assert len(pointing) > 200 and pointing["chance"].mean() < 0.15
    assert pointing["hit"].mean() >= 0.7


@pytest.mark.parametrize("task", list(brain.CLASS_NAMES))
def test_ceiling_shows_a_split_that_cuts_patients(task):
    # The leak alarm itself: with patients cut, even a nearest neighbour scores above what label noise allows.
    # Eight slices a patient, so that nearly every image has a sibling in training; 160 patients bound the error.
    size = {"synthetic_patients_per_class": 40, "synthetic_slices_per_patient": 8}
    config = _config(data_source="synthetic", test_share=0.3, **size)
    store = brain.read(config, datasets.locate("brain", asdict(config)), task)
    cut = store._replace(manifest=store.manifest.assign(group_id=[str(row) for row in range(len(store.manifest))]))
    ceiling, scores = 0.9, {}
    careless = replace(config, accepted=audit.FAILING)  # the gate would see the copies that this split parts
    for name, each, chosen in (("whole", store, config), ("cut", cut, careless)):
        (each,) = brain.split(chosen, each, task)
        patients = store.manifest["group_id"][pipelines.rows(each, "test")]
        ids = class_ids(each.manifest, brain.CLASS_NAMES[task])
        test, train = pipelines.rows(each, "test"), pipelines.rows(each, "train")
        neighbour, _ = audit.nearest(each.thumbnails[test], each.thumbnails[train])
        error = np.sqrt(ceiling * (1 - ceiling) / patients.nunique())
        scores[name] = (ids[train][neighbour] == ids[test]).mean(), ceiling + 3 * error
    assert scores["whole"][0] < 0.45
    assert scores["cut"][0] > scores["cut"][1]


def _run(brain_root):
    command = [sys.executable, "-m", "kerasmed", "run", "07_brain_mri", "--profile", "smoke"]
    command += ["--data-root", str(brain_root)]
    for name, value in QUICK.items():
        command += ["-p", f"{name}={value}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_run_smoke_does_all_that_the_notebook_can():
    notebook = notebooks.describe("07_brain_mri")
    task = "alzheimer"  # of both, with their split, see the run of 08
    run, _ = notebooks.run(notebook, notebooks.resolve(notebook, profile="smoke", given={"tasks": [task]}))
    content = runs.read_json(run / "metrics.json")
    rows = pd.DataFrame(content["rows"])
    assert set(rows["split"]) == {"test", "test of fold 1", "published test"}
    tested, ablated = rows[rows["split"] == "test"], rows[rows["split"] == "test of fold 1"]
    networks = {"compact", "MobileNetV2", "chosen"}
    assert set(tested["variant"]) == networks | {metrics.MAJORITY, metrics.NEAREST_NEIGHBOUR}
    assert {row["variant"] for row in content["headline"]} == {"chosen"}
    # Two folds test each of the 80 images once; the ablation looks at the first alone.
    assert set(tested["n"]) == {80} and ablated["n"].max() < 80
    compared = ablated[(ablated["metric"] == "accuracy") & ablated["reference"].notna()]
    assert set(compared["variant"]) == {"augmentation keras:flip+noise+rotate", "class weights on"}
    assert {reference["variant"] for reference in compared["reference"]} == {"compact"}
    split = pd.read_csv(run / "split.csv")
    assert (split[split["split"] == "test"].groupby("image_path").size() == 1).all() and set(split["fold"]) == {1, 2}
    assert runs.read_json(run / "variants/alzheimer-MobileNetV2-fold1/weights.json") == {"source": "none"}
    figures = {path.stem for path in (run / "figures").iterdir()}
    assert {"augmentation", "model-MobileNetV2", "explained-alzheimer-errors"} <= figures
    assert list(pd.read_csv(run / f"pointing-{task}.csv")) == ["image_path", "hit", "chance"]


@pytest.mark.slow
def test_run_with_bad_files_then_predict_gives_the_same_probabilities(brain_root, tmp_path, rng, write_odd_files):
    folder = brain_root / "brain/brain_tumor/train/no_tumor"
    picture = cv2.resize(rng.integers(0, 256, (6, 6), dtype=np.uint8), (60, 60), interpolation=cv2.INTER_CUBIC)
    write_odd_files(folder, picture)
    output = _run(brain_root)
    assert "brain_tumor: 51 images read, 3 set aside" in output
    run = runs.find("brain", "07_brain_mri")
    assert {path.name for path in run.iterdir()} >= {
        "status.json",
        "params.json",
        "environment.json",
        "split.csv",
        "history.csv",
        "predictions.csv",
        "metrics.json",
        "model-alzheimer.keras",
        "model-brain_tumor.keras",
        "figures",
        "notebook.ipynb",
        "variants",
        "quarantine.csv",
    }
    assert runs.read_json(run / "environment.json")["data_source"] == "real"
    assert len(pd.read_csv(run / "quarantine.csv")) == 3

    out = tmp_path / "probabilities.csv"
    command = [
        sys.executable,
        "-m",
        "kerasmed",
        "predict",
        "brain",
        str(brain_root / "brain"),
        "--run",
        str(run),
        "--out",
        str(out),
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (
        said.returncode == 0
        and "99 of 102 images predicted" in said.stdout
        and "cut.jpg: truncated JPEG" in said.stderr
    )
    raw = pd.read_csv(out).assign(image_path=lambda table: "brain/" + table["image_path"])
    assert raw["error"].notna().sum() == 3 and raw.loc[raw["error"].notna(), "p_no_tumor"].isna().all()
    known = pd.read_csv(run / "predictions.csv")
    assert len(known) == 99
    for task, names in brain.CLASS_NAMES.items():
        columns = [f"p_{name}" for name in names]
        expected = known[known["task"] == task].set_index("image_path")[columns]
        got = raw.set_index("image_path").loc[expected.index, columns]
        # Batches of other sizes: float32 sums in another order.
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_smoke_run_keeps_the_split_of_07_and_predict_repeats_it_in_a_fresh_process(tmp_path):
    quick = {"networks": ["compact"], "ablation": [], "compare_class_weights": False, "published_protocol": False}
    quick |= {"folds": 1, "test_share": 0.3, "valid_share": 0.2}
    done = []
    for name, given in {"07_brain_mri": quick, "08_brain_cascade": {}}.items():
        notebook = notebooks.describe(name)
        given = {**given, "epochs": 1}
        done.append(notebooks.run(notebook, notebooks.resolve(notebook, profile="smoke", given=given))[0])
    earlier, run = done
    assert runs.read_json(run / "params.json")["from_run"] == str(earlier)
    ids = ["fold", "image_path", "group_id", "split"]
    one, other = (pd.read_csv(each / "split.csv")[ids].sort_values(ids, ignore_index=True) for each in done)
    pd.testing.assert_frame_equal(one, other)

    content = runs.read_json(run / "metrics.json")
    rows = pd.DataFrame(content["rows"])
    assert set(rows["task"]) == {
        *("slices", "people", "kind", "severity", "type", "shortcuts"),
        *("disease", "disease, alzheimer", "disease, brain_tumor", "disease, people"),
    }
    of_slices = rows[(rows["task"] == "slices") & (rows["metric"] == "accuracy") & (rows["label"] == "all")]
    assert set(of_slices["variant"]) == {
        *("cascade", "cascade, likeliest", "flat", "measures"),
        *(metrics.MAJORITY, metrics.NEAREST_NEIGHBOUR),
    }
    assert set(of_slices["n"]) == {(other["split"] == "test").sum()} and {
        row["variant"] for row in content["headline"]
    } == {"cascade"}
    assert content["chosen_by"]["split"] == "valid"
    told = pd.read_csv(run / "predictions.csv")
    stated = told.query("variant == 'cascade' and split == 'test'")
    right = stated.apply(lambda row: row[f"y_{row['outcome']}"] == 1, axis=1).mean()
    by_hand = of_slices.set_index("variant").loc["cascade", "value"]
    assert right == pytest.approx(by_hand, abs=1e-12)
    figures = {path.stem for path in (run / "figures").iterdir()}
    assert {"threshold", "losses", "confusion", "explained-errors", "model"} <= figures

    source = datasets.locate("brain", runs.read_json(run / "params.json"))
    out = tmp_path / "told.csv"
    command = [sys.executable, "-m", "kerasmed", "predict", "brain", str(source.root / "brain")]
    subprocess.run([*command, "--run", str(run), "--out", str(out)], check=True, timeout=300)
    got = pd.read_csv(out).assign(image_path=lambda table: "brain/" + table["image_path"]).set_index("image_path")
    expected = told.query("variant == 'cascade' and fold == 1").set_index("image_path").loc[got.index]
    columns = [name for name in got if name.startswith(("p_", "disease_", "kind_", "severity_", "type_"))]
    assert len(columns) == 7 + 2 + 2 + 3 + 3
    # Batches of other sizes: float32 sums in another order.
    np.testing.assert_allclose(got[columns], expected[columns], atol=1e-5)
    assert (got["outcome"] == expected["outcome"]).all()
