import timeit

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from kerasmed import metrics, multilabel, predictions, studies

NAMES = ("abnormal",)
HALF = np.array([0.5])


def _manifest(listed):
    """A manifest of (study_id, split, label, images); a study_id is type/patient/study."""
    rows = [
        (f"{study}_{'positive' if label else 'negative'}/image{number}.png", study, split, label)
        for study, split, label, count in listed
        for number in range(1, count + 1)
    ]
    manifest = pd.DataFrame(rows, columns=["image_path", "study_id", "split", "abnormal"])
    manifest["image_path"] = "mura/MURA-v1.1/train/" + manifest["image_path"]
    body_part, patient = (manifest["study_id"].str.split("/").str[part] for part in (0, 1))
    return manifest.assign(patient_id=patient, group_id=patient, body_part=body_part, abnormal=manifest["abnormal"] * 1)


@pytest.fixture
def small():
    """Four studies of three patients, not in the order of their ids."""
    listed = [
        ("b/p2/s1", "test", 1, 2),
        ("a/p3/s1", "valid", 0, 1),
        ("a/p1/s2", "train", 1, 3),
        ("a/p1/s1", "train", 0, 1),
    ]
    return _manifest(listed)


def _table(manifest, probabilities):
    return predictions.tabulate(manifest, np.reshape(probabilities, (-1, 1)), NAMES, variant="net")


def test_study_probability_by_hand_in_any_order():
    told = studies.study_probability(
        np.array([0.9, 0.25, 0.75, 1.0]), pd.Series(["b", "a", "a", "b"], index=[7, 7, 8, 9])
    )
    assert told.to_dict() == {"a": 0.5, "b": 0.95} and told.index.tolist() == ["a", "b"]
    assert studies.study_probability([0.0, 1.0, 0.5], [3, 20, 3]).to_dict() == {3: 0.25, 20: 1.0}
    assert studies.study_probability([], []).empty


@pytest.mark.parametrize(
    ("probabilities", "ids", "message"),
    [
        ([0.1, 0.2], ["a"], r"shape \(2,\) beside 1 study ids; expected one an image, shape \(1,\)"),
        ([[0.1, 0.2]], ["a"], r"shape \(1, 2\) beside 1.*one class at a time"),
        ([0.1, np.nan, 1.5], ["a", "b", "c"], r"outside \[0, 1\] in 2 of 3 rows.*First: nan in b, 1.5 in c"),
        ([0.1, -0.1], ["a", "b"], "1 of 2 rows.*no logits. First: -0.1 in b"),
        ([0.1, 0.2], ["a", None], r"study_id is missing in 1 of 2 rows.*First: \[1\]"),
    ],
)
def test_study_probability_unfit_input_is_refused(probabilities, ids, message):
    with pytest.raises(ValueError, match=message):
        studies.study_probability(probabilities, ids)


def test_table_by_hand(small):
    found = studies.table(small, NAMES)
    columns = ["study_path", "patient_id", "study_id", "group_id", "split", "body_part", "abnormal", "images"]
    assert found.columns.tolist() == columns and found.index.tolist() == [0, 1, 2, 3]
    home = "mura/MURA-v1.1/train/"
    assert found.to_numpy().tolist() == [
        [home + "a/p1/s1_negative", "p1", "a/p1/s1", "p1", "train", "a", 0, 1],
        [home + "a/p1/s2_positive", "p1", "a/p1/s2", "p1", "train", "a", 1, 3],
        [home + "a/p3/s1_negative", "p3", "a/p3/s1", "p3", "valid", "a", 0, 1],
        [home + "b/p2/s1_positive", "p2", "b/p2/s1", "p2", "test", "b", 1, 2],
    ]


def test_table_does_not_depend_on_the_order_of_images_nor_on_their_index(small):
    shuffled = small.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(studies.table(shuffled, NAMES), studies.table(small, NAMES))
    pd.testing.assert_frame_equal(studies.table(small.set_axis([0] * 7), NAMES), studies.table(small, NAMES))


def test_table_unknown_labels_and_patients_stay_unknown(small):
    unknown = small.assign(abnormal=np.nan, other=1.0, patient_id=pd.NA).drop(columns="body_part")
    found = studies.table(unknown, ("abnormal", "other"))
    assert found["abnormal"].isna().all() and found["patient_id"].isna().all() and found["other"].tolist() == [1] * 4
    assert "body_part" not in found and found["images"].sum() == 7


def test_table_without_images_is_empty(small):
    found = studies.table(small.iloc[:0], NAMES)
    assert found.empty and found.columns.tolist() == studies.table(small, NAMES).columns.tolist()


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("split", ["valid", "test"]),
        ("group_id", ["p2", "p9"]),
        ("group_id", ["p2", None]),
        ("patient_id", ["p2", "p9"]),
        ("body_part", ["b", "a"]),
        ("abnormal", [1, 0]),
        ("abnormal", [np.nan, 1]),
    ],
)
def test_table_study_whose_images_differ_is_refused(small, column, values):
    small[column] = small[column].astype(object)
    small.loc[:1, column] = values
    with pytest.raises(ValueError, match=rf"of 1 of 4 studies differ in {column}, .*First: \['b/p2/s1'\]"):
        studies.table(small, NAMES)


def test_table_study_in_two_folders_is_refused(small):
    small.loc[0, "image_path"] = "mura/elsewhere/image1.png"
    with pytest.raises(ValueError, match="differ in study_path"):
        studies.table(small, NAMES)


def test_table_missing_study_is_refused(small):
    small.loc[[1, 3], "study_id"] = None
    with pytest.raises(
        ValueError, match=r"study_id is missing in 2 of 7 rows.*s1_positive/image2.png', '.*image1.png'\]"
    ):
        studies.table(small, NAMES)


def test_table_of_the_whole_set_is_made_in_no_time(rng):
    images = np.repeat(np.arange(14_600), rng.integers(1, 6, 14_600))[:40_000]
    study = [f"XR_HAND/patient{number // 2:05d}/study{number % 2}" for number in images]
    manifest = pd.DataFrame(
        {"image_path": [f"{name}/image.png" for name in study], "study_id": study, "split": "train"}
    )
    patient = manifest["study_id"].str.split("/").str[1]
    manifest = manifest.assign(patient_id=patient, group_id=patient, body_part="XR_HAND", abnormal=images % 2)
    found = studies.table(manifest, NAMES)
    assert len(found) == images[-1] + 1 and found["images"].sum() == len(images)
    # It takes 0.03 s, a Python function for each study at least a second; between them is room for a busy machine.
    assert min(timeit.repeat(lambda: studies.table(manifest, NAMES), number=1, repeat=3)) < 0.3


def test_predictions_by_hand_and_in_the_order_of_the_table(small):
    told = [0.9, 0.4, 0.2, 1.0, 0.5, 0.0, 0.75]
    found = studies.predictions(_table(small, told), NAMES)
    columns = [
        "study_path",
        "patient_id",
        "study_id",
        "group_id",
        "split",
        "variant",
        "y_abnormal",
        "p_abnormal",
        "images",
    ]
    assert found.columns.tolist() == columns and set(found["variant"]) == {"net"}
    assert found["p_abnormal"].tolist() == [0.75, 0.5, 0.2, 0.65]
    table = studies.table(small, NAMES).rename(columns={"abnormal": "y_abnormal"})
    shared = [name for name in columns if name in table]
    pd.testing.assert_frame_equal(found[shared], table[shared])
    means = studies.study_probability(told, small["study_id"])
    assert means.tolist() == found["p_abnormal"].tolist() and means.index.tolist() == found["study_id"].tolist()


def test_predictions_of_two_classes_are_averaged_apart(small):
    manifest = small.assign(other=1 - small["abnormal"])
    told = np.column_stack([np.linspace(0, 1, 7), np.linspace(1, 0, 7)])
    names = ("abnormal", "other")
    found = studies.predictions(predictions.tabulate(manifest, told, names, variant="net"), names)
    np.testing.assert_allclose(found["p_abnormal"] + found["p_other"], 1, rtol=1e-15)
    assert found["p_abnormal"].tolist() == studies.study_probability(told[:, 0], small["study_id"]).tolist()


def test_predictions_come_back_from_csv_as_they_were(tmp_path, small):
    found = studies.predictions(_table(small, np.linspace(0.1, 0.7, 7)), NAMES)
    found.to_csv(tmp_path / "studies.csv", index=False)
    # Text is of another type in a table read from a file.
    pd.testing.assert_frame_equal(predictions.read(tmp_path / "studies.csv"), found, check_dtype=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_abnormal": [0.5, np.nan, *[0.5] * 5]}, r"p_abnormal are NaN or outside.* in 1 of 7 rows.*nan in b/p2/s1"),
        ({"p_abnormal": [0.5, 0.5, 7, *[0.5] * 4]}, "First: 7 in a/p3/s1"),
        ({"y_abnormal": [0, 1, 0, 1, 1, 1, 0]}, "1 of 4 studies differ in y_abnormal"),
        ({"variant": ["net", *["other"] * 6]}, "1 of 4 studies differ in variant"),
        ({"split": ["test", "train", *["valid"] * 5]}, "1 of 4 studies differ in split"),
        ({"study_id": [None] * 7}, "study_id is missing in 7 of 7 rows"),
    ],
)
def test_predictions_unfit_tables_are_refused(small, change, message):
    with pytest.raises(ValueError, match=message):
        studies.predictions(_table(small, np.full(7, 0.5)).assign(**change), NAMES)


@pytest.fixture
def judged():
    """Images of two types and what a network says of them.

    Six test studies, image probabilities -> study mean:
    XR_ELBOW   s1 abnormal 0.9, 0.5 -> 0.7     s2 normal 0.2 -> 0.2             s3 normal 0.875, 0.5, 0.5 -> 0.625
    XR_WRIST   s1 abnormal 0.25, 0.5 -> 0.375  s2 abnormal 0.75, 0.5 -> 0.625   s3 normal 0.1 -> 0.1
    """
    listed = [("XR_ELBOW/p1/s1", "test", 1, 2), ("XR_ELBOW/p2/s2", "test", 0, 1), ("XR_ELBOW/p3/s3", "test", 0, 3)]
    listed += [("XR_WRIST/p4/s1", "test", 1, 2), ("XR_WRIST/p5/s2", "test", 1, 2), ("XR_WRIST/p6/s3", "test", 0, 1)]
    told = [0.9, 0.5, 0.2, 0.875, 0.5, 0.5, 0.25, 0.5, 0.75, 0.5, 0.1]
    # Study means 0.8 abnormal, 0.3 normal; by images the threshold would be between 0.7 and 0.5.
    listed += [("XR_WRIST/p7/s1", "valid", 1, 2), ("XR_WRIST/p8/s1", "valid", 0, 2)]
    told += [0.9, 0.7, 0.5, 0.1]
    # One of two elbows is abnormal, two of three wrists: the majority of studies is abnormal, of images normal.
    listed += [("XR_ELBOW/p9/s1", "train", 1, 1), ("XR_ELBOW/p9/s2", "train", 0, 5)]
    listed += [
        ("XR_WRIST/p10/s1", "train", 1, 1),
        ("XR_WRIST/p10/s2", "train", 1, 1),
        ("XR_WRIST/p11/s1", "train", 0, 1),
    ]
    told += [0.5] * 9
    manifest = _manifest(listed)
    return manifest, _table(manifest, told)


def _scored(judged, **options):
    """Rows by split, over all test studies and by type."""
    manifest, images = judged
    table = studies.table(manifest, NAMES)
    parts = {f"test, {name}": (table["body_part"] == name).to_numpy() for name in ("XR_ELBOW", "XR_WRIST")}
    learnt = table[table["split"] == "train"].groupby("body_part")["abnormal"].mean()
    tested = table.loc[table["split"] == "test", "body_part"]
    extra = {metrics.TYPE_SHARE: multilabel.Answer(tested.map(learnt).to_numpy(float)[:, None], HALF)}
    options = {"task": "t", "subsets": {"test": np.ones(len(table), bool)} | parts, "extra": extra} | options
    tables = {"net": studies.predictions(images, NAMES)}
    return multilabel.evaluate(tables, table, None, NAMES, num_draws=20, **options)


def test_evaluate_studies_equals_numbers_worked_by_hand(judged):
    asked = ("kappa", "sensitivity", "specificity")
    rows = _scored(judged, at_half=asked)
    assert {row["label"] for row in rows} == {"abnormal"} and {row["task"] for row in rows} == {"t"}
    value = {(row["variant"], row["split"], row["metric"]): row["value"] for row in rows}
    expected = {
        # abnormal 0.7, 0.375, 0.625; normal 0.2, 0.625, 0.1: of nine pairs seven are right, and 0.625 ties once;
        # at 0.5 four are right: p_o = 4/6, p_e = 1/2
        "test": (7.5 / 9, 1 / 3, 2 / 3, 2 / 3),
        # 0.7 beats both; at 0.5 two of three are right: p_o = 2/3, p_e = 1/3 · 2/3 + 2/3 · 1/3 = 4/9
        "test, XR_ELBOW": (1, (2 / 3 - 4 / 9) / (1 - 4 / 9), 1, 1 / 2),
        # both beat 0.1; at 0.5 two of three are right, with the same p_e
        "test, XR_WRIST": (1, 2 / 5, 1 / 2, 1),
    }
    for split, numbers in expected.items():
        for metric, number in zip(["auroc", *(f"{metric}_at_half" for metric in asked)], numbers, strict=True):
            assert value["net", split, metric] == pytest.approx(number, abs=1e-15), (split, metric)
    # Tuned to 0.55, between the validation means; no test study lies between that and 0.5.
    assert value["net", "test", "kappa"] == value["net", "test", "kappa_at_half"]
    # Shares 1/2 of elbows, 2/3 of wrists: of nine pairs two wrists beat two elbows, and 2 + 2 of one type tie. At
    # 0.5 every study is answered abnormal.
    assert value["type_share", "test", "auroc"] == pytest.approx((4 + 4 / 2) / 9, abs=1e-15)
    assert value["type_share", "test", "kappa_at_half"] == value["majority", "test", "kappa_at_half"] == 0
    assert value["type_share", "test", "sensitivity_at_half"] == value["majority", "test", "sensitivity_at_half"] == 1
    assert value["type_share", "test, XR_ELBOW", "auroc"] == 1 / 2
    found = {row["metric"]: row for row in rows if row["variant"] == "net" and row["split"] == "test"}
    assert (found["auroc"]["n"], found["auroc"]["n_groups"]) == (6, 6)
    assert found["auroc"]["baseline"]["variant"] == "type_share"


def test_evaluate_studies_equals_scikit_learn(judged):
    manifest, images = judged
    value = {
        (row["split"], row["metric"]): row["value"]
        for row in _scored(judged, at_half=("kappa", "sensitivity", "specificity"))
        if row["variant"] == "net"
    }
    means = images.groupby("study_id").agg({"y_abnormal": "first", "p_abnormal": "mean", "split": "first"})
    means = means[means["split"] == "test"]
    of_type = means.index.str.split("/").str[0]
    for split, among in {"test": of_type != "", **{f"test, {name}": of_type == name for name in set(of_type)}}.items():
        truth, told = means.loc[among, "y_abnormal"].astype(int), means.loc[among, "p_abnormal"]
        answer = (told >= 0.5).astype(int)
        expected = {
            "auroc": sk.roc_auc_score(truth, told),
            "average_precision": sk.average_precision_score(truth, told),
            "kappa_at_half": sk.cohen_kappa_score(truth, answer),
            "sensitivity_at_half": sk.recall_score(truth, answer),
            "specificity_at_half": sk.recall_score(1 - truth, 1 - answer),
        }
        for metric, number in expected.items():
            assert value[split, metric] == pytest.approx(number, abs=1e-12), (split, metric)


def test_evaluate_studies_with_the_neighbour_answers_of_images(judged):
    manifest, _ = judged
    pictures = np.random.default_rng(0).integers(0, 256, (9, 64, 64), dtype=np.uint8)
    train, test = (np.flatnonzero(manifest["split"] == split) for split in ("train", "test"))
    y_train = manifest["abnormal"].to_numpy(float)[train][:, None]
    # The first eight test images look like the sole abnormal elbow, the last three like the first normal image.
    asked = pictures[[0] * 8 + [1] * 3]
    told = multilabel.baselines(y_train, len(test), pictures, asked)[metrics.NEAREST_NEIGHBOUR].probabilities
    means = studies.study_probability(told[:, 0], manifest["study_id"].iloc[test])
    answer = multilabel.Answer(means.to_numpy()[:, None], HALF)
    rows = _scored(judged, extra={metrics.NEAREST_NEIGHBOUR: answer}, subsets=None)
    assert {row["variant"] for row in rows} == {"net", "majority", "all_positive", "nearest_neighbour"}
    found = {row["metric"]: row["value"] for row in rows if row["variant"] == "nearest_neighbour"}
    # Three elbows and the first wrist are answered abnormal: two of four rightly, one abnormal wrist is missed.
    assert found["sensitivity"] == pytest.approx(2 / 3) and found["specificity"] == pytest.approx(1 / 3)
