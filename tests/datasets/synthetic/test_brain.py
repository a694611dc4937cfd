"""The synthetic brain set: layout, leak, label noise, and what can and what cannot read its signs."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kerasmed.datasets.synthetic import brain

TASKS = tuple(brain.CLASS_NAMES)
BOX = ["x", "y", "width", "height"]


def read_truth(root, task=None):
    truth = pd.read_csv(root / "brain" / "truth.csv")
    return truth if task is None else truth[truth["task"] == task].reset_index(drop=True)


def read_thumbnails(root, truth, side):
    images = (cv2.imread(str(root / path), cv2.IMREAD_UNCHANGED) for path in truth["image_path"])
    return np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images])


def correlations(thumbnails):
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return flat @ flat.T


def held_out_patients(truth, share, seed):
    patients = truth["patient"].unique()
    chosen = np.random.default_rng(seed).permutation(patients)[: round(share * len(patients))]
    return truth["patient"].isin(chosen).to_numpy()


def file_bytes(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    """2 tasks × 4 classes × 20 patients × 4 slices."""
    return brain.write(tmp_path_factory.mktemp("brain") / "set", patients_per_class=20)


def test_write_default_layout_is_the_real_one(small_root):
    truth = read_truth(small_root)
    assert list(truth.columns) == ["image_path", "task", "patient", "label", "signal", *BOX]
    on_disk = sorted(path.relative_to(small_root).as_posix() for path in small_root.rglob("*.jpg"))
    assert on_disk == truth["image_path"].tolist()
    parts = truth["image_path"].str.split("/", expand=True)
    assert (parts[0] == "brain").all() and (parts[1] == truth["task"]).all()
    assert (parts[3] == truth["label"]).all()
    counts = truth.groupby(["task", "label", parts[2]]).size().unstack()
    # 20 patients × 4 slices, a fifth of them test.
    assert (counts["train"] == 64).all() and (counts["test"] == 16).all()
    assert len(counts) == 8
    assert (
        parts[4].str.fullmatch(r"(nonDem|verymildDem|mildDem|moderateDem)\d+\.jpg|(no tumor|gg|m|p) \(\d+\)\.jpg").all()
    )
    assert [path.name for path in small_root.iterdir()] == ["brain"]


def test_write_image_sizes_follow_the_task(small_root):
    shapes = {}
    for task in TASKS:
        paths = read_truth(small_root, task)["image_path"][::5]
        images = [cv2.imread(str(small_root / path), cv2.IMREAD_UNCHANGED) for path in paths]
        assert all(image.dtype == np.uint8 and image.ndim == 2 for image in images)
        shapes[task] = {image.shape for image in images}
    # 96 × 176 / 208 = 81.2
    assert shapes["alzheimer"] == {(96, 81)}
    sides = np.array(sorted(shapes["brain_tumor"]))
    assert len(sides) > 10
    assert (np.abs(sides / 96 - 1) <= 0.25).all()


def test_write_same_seed_gives_identical_files_and_times(tmp_path):
    options = {"patients_per_class": 3, "slices_per_patient": 2, "label_noise": 0.4, "image_size": (64, 64)}
    first, again, other = (
        brain.write(tmp_path / name, seed=seed, **options) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert file_bytes(first) == file_bytes(again)
    times = {path.stat().st_mtime_ns for root in (first, again) for path in root.rglob("*") if path.is_file()}
    assert len(times) == 1
    images = [{data for name, data in file_bytes(root).items() if name.endswith(".jpg")} for root in (first, other)]
    assert images[0].isdisjoint(images[1])


def test_write_description_states_parameters_and_ceiling(small_root):
    description = json.loads((small_root / "brain/synthetic.json").read_text())
    # round(0.1 × 20) = 2 of 20 patients carry another sign: 1 - 2 / 20.
    assert description == {
        "system": "brain",
        "seed": 0,
        "patients_per_class": 20,
        "slices_per_patient": 4,
        "label_noise": 0.1,
        "image_size": [96, 96],
        "ceiling": {"alzheimer": 0.9, "brain_tumor": 0.9},
    }


@pytest.mark.parametrize("task", TASKS)
def test_write_label_noise_flips_whole_patients_of_each_class(small_root, task):
    patients = read_truth(small_root, task).groupby("patient")
    assert (patients[["label", "signal"]].nunique() == 1).all(axis=None)
    one_row = patients.first()
    flipped = one_row["label"] != one_row["signal"]
    assert flipped.groupby(one_row["label"]).sum().tolist() == [2, 2, 2, 2]
    truth = read_truth(small_root, task)
    # Reading every sign reaches the ceiling exactly.
    assert balanced_accuracy_score(truth["label"], truth["signal"]) == pytest.approx(0.9, abs=1e-12)


def test_write_without_label_noise_has_ceiling_one(tmp_path):
    root = brain.write(tmp_path, patients_per_class=3, slices_per_patient=1, label_noise=0, image_size=(64, 64))
    truth = read_truth(root)
    assert (truth["label"] == truth["signal"]).all()
    assert set(json.loads((root / "brain/synthetic.json").read_text())["ceiling"].values()) == {1.0}
    split = truth["image_path"].str.split("/").str[2]
    assert truth.groupby(["task", "label"]).size().eq(3).all()
    assert (split == "test").groupby([truth["task"], truth["label"]]).sum().eq(1).all()


def test_write_box_lies_on_the_sign(small_root):
    truth = read_truth(small_root)
    healthy = truth["signal"].isin(["NonDemented", "no_tumor"])
    assert truth.loc[healthy, BOX].isna().all(axis=None)
    assert truth.loc[~healthy, BOX].notna().all(axis=None)
    inside, outside = [], []
    for row in truth[~healthy].itertuples():
        image = cv2.imread(str(small_root / row.image_path), cv2.IMREAD_UNCHANGED).astype(float)
        x, y, width, height = (int(value) for value in (row.x, row.y, row.width, row.height))
        assert x >= 0 and y >= 0 and x + width <= image.shape[1]
        assert y + height <= image.shape[0]
        detail = np.abs(cv2.Laplacian(cv2.GaussianBlur(image, (0, 0), 1), cv2.CV_64F))
        inside.append(detail[y : y + height, x : x + width].mean())
        # The box mirrored through the image's centre: brain too, without the sign unless the two overlap.
        mirrored = detail[::-1, ::-1][y : y + height, x : x + width]
        outside.append(mirrored.mean())
    # Overlaps and the skull's edge raise some mirrored boxes: nine in ten is a wide margin (measured: all).
    assert np.mean(np.array(inside) > outside) > 0.9


@pytest.mark.parametrize("task", TASKS)
def test_thumbnails_correlated_above_098_are_exactly_the_patients(small_root, task):
    truth = read_truth(small_root, task)
    matrix = correlations(read_thumbnails(small_root, truth, 64))
    patient = truth["patient"].to_numpy(object)
    same = patient[:, None] == patient
    # 0.005 on either side of the threshold, so that another JPEG decoder cannot move a pair across it.
    assert matrix[same].min() >= 0.985
    assert matrix[~same].max() < 0.975


@pytest.mark.parametrize("task", TASKS)
def test_split_patients_lie_in_train_and_in_test(small_root, task):
    truth = read_truth(small_root, task)
    in_test = truth["image_path"].str.split("/").str[2] == "test"
    leaked = truth.loc[in_test, "patient"].isin(truth.loc[~in_test, "patient"])
    assert leaked.all()


@pytest.mark.parametrize("task", TASKS)
def test_linear_model_on_coarse_thumbnails_does_not_see_the_signs(small_root, task):
    truth = read_truth(small_root, task)
    features = read_thumbnails(small_root, truth, 8).reshape(len(truth), -1)
    test = held_out_patients(truth, 0.5, seed=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(features[~test], truth["label"][~test])
    # Chance is 0.25; 40 test patients have a standard error of 0.07, so 0.45 is nearly three of them above.
    assert balanced_accuracy_score(truth["label"][test], model.predict(features[test])) < 0.45


@pytest.mark.parametrize("task", TASKS)
def test_nearest_neighbour_scores_only_where_patients_leak(small_root, task):
    truth = read_truth(small_root, task)
    matrix = correlations(read_thumbnails(small_root, truth, 64))
    labels = truth["label"].to_numpy(object)

    def score(test):
        return balanced_accuracy_score(labels[test], labels[~test][matrix[test][:, ~test].argmax(axis=1)])

    published = truth["image_path"].str.split("/").str[2].to_numpy(object) == "test"
    # Every test image of the published split has a training slice of the same patient.
    assert score(published) == 1.0
    assert score(held_out_patients(truth, 0.5, seed=0)) < 0.45


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("patients_per_class", 2),
        ("slices_per_patient", 0),
        ("label_noise", 0.5),
        ("label_noise", -0.1),
        ("label_noise", float("nan")),
        ("image_size", (96, 32)),
        ("seed", -1),
    ],
)
def test_write_parameter_out_of_range_is_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}` is .*expected"):
        brain.write(tmp_path / "set", **{option: value})
    assert not (tmp_path / "set").exists()


TINY = {"patients_per_class": 3, "slices_per_patient": 1, "image_size": (64, 64)}


def test_write_real_data_in_the_way_is_never_touched(tmp_path):
    image = tmp_path / "brain" / "alzheimer" / "train" / "NonDemented" / "nonDem0.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"real")
    with pytest.raises(FileExistsError, match="may be real data"):
        brain.write(tmp_path, **TINY)
    assert image.read_bytes() == b"real"


def test_write_other_parameters_in_the_way_is_refused(tmp_path):
    brain.write(tmp_path, **TINY)
    before = file_bytes(tmp_path)
    with pytest.raises(FileExistsError, match="describes another set"):
        brain.write(tmp_path, seed=1, **TINY)
    assert file_bytes(tmp_path) == before


def test_write_whole_set_is_left_as_it_is(tmp_path):
    root = brain.write(str(tmp_path), **TINY)
    assert root == tmp_path
    image = next(root.rglob("*.jpg"))
    image.write_bytes(b"kept")
    assert brain.write(tmp_path, **TINY) == root
    assert image.read_bytes() == b"kept"


def test_write_interrupted_leaves_no_set_and_is_done_anew(tmp_path, monkeypatch):
    whole = brain.write(tmp_path / "whole", **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(brain, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            brain.write(tmp_path / "killed", **TINY)
    assert not (tmp_path / "killed/brain").exists()
    assert file_bytes(brain.write(tmp_path / "killed", **TINY)) == file_bytes(whole)
