"""The brain system end to end, as its user runs it."""

import os
import subprocess
import sys
import time
from dataclasses import asdict

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

from kerasmed import audit, datasets, environment, notebooks, runs
from kerasmed.manifest import class_ids
from kerasmed.systems import brain

QUICK = {
    "data_source": "auto",
    "epochs": 2,
    "bootstraps": 50,
    "max_quarantined_share": 0.2,
    "test_share": 0.2,
    "valid_share": 0.2,
}


def _config(**changes):
    notebook = notebooks.describe("07_brain_mri")
    parameters = notebooks.resolve(notebook, profile="smoke", given=QUICK | changes)
    return brain.Config(**{name: parameters[name] for name in brain.parameter_names()})


def test_read_groups_slices_and_split_cuts_none(brain_root):
    config = _config()
    store = brain.read(config, datasets.Source(brain_root, "real"), "alzheimer")
    assert store.manifest["group_id"].nunique() == 24
    store = brain.split(config, store, "alzheimer")
    assert store.manifest.groupby("group_id")["split"].nunique().eq(1).all()
    assert set(store.manifest["split"]) == {"train", "valid", "test"}


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
    ],
)
def test_config_refuses_values_before_any_work(name, value, expected):
    with pytest.raises(ValueError, match=expected):
        _config(**{name: value})


def test_read_class_without_readable_images_is_refused(brain_root):
    for path in (brain_root / "brain/alzheimer/train/MildDemented").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="alzheimer has no readable image of MildDemented"):
        brain.read(_config(max_quarantined_share=0.9), datasets.Source(brain_root, "real"), "alzheimer")


def test_samples_spread_over_each_class_in_class_order(brain_root):
    store = brain.read(_config(), datasets.Source(brain_root, "real"), "brain_tumor")
    positions = brain.samples(store, "brain_tumor", count=3)
    labels = store.manifest.loc[positions, list(brain.CLASS_NAMES["brain_tumor"])].to_numpy().argmax(axis=1)
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and len(set(positions)) == 12


def test_confident_shows_each_group_once_and_the_surest_first(brain_root):
    store = brain.split(_config(), brain.read(_config(), datasets.Source(brain_root, "real"), "alzheimer"), "alzheimer")
    names = brain.CLASS_NAMES["alzheimer"]
    # Always the first class, surer from image to image.
    sure = np.linspace(0.4, 0.9, len(store.manifest))
    table = pd.DataFrame({f"p_{name}": (1 - sure) / 3 for name in names}).assign(**{f"p_{names[0]}": sure})
    for right in (True, False):
        positions = brain.confident(table, store, "alzheimer", right=right)
        chosen = store.manifest.loc[positions]
        assert len(positions) and (chosen["split"] == "test").all() and (chosen[names[0]] == right).all()
        assert chosen["group_id"].is_unique and (np.diff(sure[positions]) < 0).all()


def test_evaluate_scores_few_group_classes_apart(brain_root, rng):
    home = brain_root / "brain/alzheimer/train/ModerateDemented"
    for path in sorted(home.iterdir())[4:]:
        path.unlink()  # two patients are left
    config = _config(test_share=0.3)
    store = brain.split(config, brain.read(config, datasets.Source(brain_root, "real"), "alzheimer"), "alzheimer")
    probabilities = rng.dirichlet(np.ones(4), len(store.manifest))
    predictions = pd.DataFrame(probabilities, columns=[f"p_{name}" for name in brain.CLASS_NAMES["alzheimer"]]).assign(
        variant="net"
    )
    rows = brain.evaluate(config, predictions, store, "alzheimer")
    labels = {row["label"] for row in brain.headline(rows, variant="net")}
    assert labels == {"all", "3 classes: all"}
    apart = next(
        row
        for row in rows
        if row["label"] == "3 classes: all" and row["metric"] == "accuracy" and row["variant"] == "net"
    )
    test = store.manifest["split"] == "test"
    kept = test & (store.manifest["ModerateDemented"] == 0)
    expected = (
        probabilities[kept][:, :3].argmax(axis=1)
        == store.manifest.loc[kept, list(brain.CLASS_NAMES["alzheimer"][:3])].to_numpy().argmax(axis=1)
    ).mean()
    assert apart["value"] == pytest.approx(expected) and apart["n"] == kept.sum()


@pytest.mark.slow
@pytest.mark.parametrize("task", list(brain.CLASS_NAMES))
def test_fit_on_synthetic_data_reaches_the_known_ceiling_and_no_more(tmp_path, task):
    notebook = notebooks.describe("07_brain_mri")
    parameters = notebooks.resolve(notebook, profile="demo", given={})
    config = brain.Config(**{name: parameters[name] for name in brain.parameter_names()})
    environment.setup(seed=config.seed)
    store = brain.split(config, brain.read(config, datasets.locate("brain", parameters), task), task)
    model = brain.build_model(config, task)
    brain.fit(config, model, store, task, folder=tmp_path / "run")

    # Patients that no part of the training set has seen, one image each: 400 independent trials.
    other = datasets.write_synthetic(
        "brain", tmp_path / "other", patients_per_class=100, slices_per_patient=1, seed=1000
    )
    unseen = brain.read(config, datasets.Source(other, "synthetic"), task)
    predicted = brain.predict_store(model, unseen, task, variant="compact")
    right = predicted.filter(regex="^p_").to_numpy().argmax(axis=1) == predicted.filter(regex="^y_").to_numpy().argmax(
        axis=1
    )
    ceiling = datasets.truth("brain", datasets.Source(other, "synthetic"))["ceiling"][task]
    # Classes are of equal size, so accuracy is balanced accuracy.
    assert right.mean() >= ceiling - 0.07
    assert right.mean() <= ceiling + 3 * np.sqrt(ceiling * (1 - ceiling) / len(right)), (
        "better than the label noise allows: a leak"
    )


@pytest.mark.parametrize("task", list(brain.CLASS_NAMES))
def test_ceiling_shows_a_split_that_cuts_patients(task):
    # The leak alarm itself: with patients cut, even a nearest neighbour scores above what label noise allows.
    # Eight slices a patient, so that nearly every image has a sibling in training; 160 patients bound the error.
    size = {"synthetic_patients_per_class": 40, "synthetic_slices_per_patient": 8}
    config = _config(data_source="synthetic", test_share=0.3, **size)
    store = brain.read(config, datasets.locate("brain", asdict(config)), task)
    cut = store._replace(manifest=store.manifest.assign(group_id=[str(row) for row in range(len(store.manifest))]))
    ceiling, scores = 0.9, {}
    for name, each in (("whole", store), ("cut", cut)):
        each = brain.split(config, each, task)
        patients = store.manifest["group_id"][brain.rows(each, "test")]
        ids = class_ids(each.manifest, brain.CLASS_NAMES[task])
        test, train = brain.rows(each, "test"), brain.rows(each, "train")
        neighbour, _ = audit.nearest(each.thumbnails[test], each.thumbnails[train])
        error = np.sqrt(ceiling * (1 - ceiling) / patients.nunique())
        scores[name] = (ids[train][neighbour] == ids[test]).mean(), ceiling + 3 * error
    assert scores["whole"][0] < 0.45
    assert scores["cut"][0] > scores["cut"][1]


def _run(brain_root, tmp_path, *extra, wait=True):
    command = [
        sys.executable,
        "-m",
        "kerasmed",
        "run",
        "07_brain_mri",
        "--profile",
        "smoke",
        "--data-root",
        str(brain_root),
    ]
    for name, value in QUICK.items():
        command += ["-p", f"{name}={value}"]
    process = subprocess.Popen(
        command + list(extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy()
    )
    if wait:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return output
    return process


@pytest.mark.slow
def test_run_with_bad_files_then_predict_gives_the_same_probabilities(brain_root, tmp_path, rng, write_odd_files):
    folder = brain_root / "brain/brain_tumor/train/no_tumor"
    picture = cv2.resize(rng.integers(0, 256, (6, 6), dtype=np.uint8), (60, 60), interpolation=cv2.INTER_CUBIC)
    write_odd_files(folder, picture)
    output = _run(brain_root, tmp_path)
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
        expected = known[known["variant"] == f"{task}-compact"].set_index("image_path")[columns]
        got = raw.set_index("image_path").loc[expected.index, columns]
        # Batches of other sizes: float32 sums in another order.
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_run_killed_while_training_ends_with_the_undisturbed_weights(brain_root, tmp_path, monkeypatch):
    extra = ("-p", "epochs=4", "-p", "tasks=['brain_tumor']")
    _run(brain_root, tmp_path, *extra)
    whole = runs.find("brain", "07_brain_mri")
    monkeypatch.setenv("KERASMED_MODELS", str(tmp_path / "killed"))
    process = _run(brain_root, tmp_path, *extra, wait=False)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").rglob("checkpoint.npz")):
        assert process.poll() is None and time.monotonic() < deadline, "never trained"
        time.sleep(0.05)
    (status,) = (tmp_path / "killed").rglob("status.json")
    process.kill()
    process.wait()
    while runs.status(status.parent)["status"] == "running":  # the kernel looks for its parent once a second
        assert time.monotonic() < deadline, "the kernel outlived the command"
        time.sleep(0.2)
    assert runs.status(status.parent)["status"] == "interrupted"
    output = _run(brain_root, tmp_path, *extra)
    assert "resuming" in output
    resumed = status.parent
    assert resumed.name == whole.name and runs.status(resumed)["status"] == "complete"
    models = [keras.saving.load_model(run / "model-brain_tumor.keras") for run in (whole, resumed)]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)
    one, other = (pd.read_csv(run / "predictions.csv") for run in (whole, resumed))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
