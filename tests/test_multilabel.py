import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from kerasmed import metrics, multilabel, predictions

NAMES = ("a", "b")
HALF = np.full(2, 0.5)


def _manifest(labels, split):
    labels = pd.DataFrame(np.asarray(labels, float), columns=NAMES)
    texts = [str(number) for number in range(len(labels))]
    paths = [f"{text}.png" for text in texts]
    return labels.assign(image_path=paths, patient_id=pd.NA, study_id=pd.NA, group_id=texts, split=split)


def _table(manifest, probabilities):
    return predictions.tabulate(manifest, np.asarray(probabilities, float), NAMES, variant="net")


@pytest.fixture
def small():
    """Three training, three validation and four test images; the thumbnails of the test images are known ones."""
    labels = [[1, 1], [1, 0], [0, np.nan], [1, 0], [0, 1], [0, 0], [1, 1], [1, 0], [0, 1], [np.nan, 0]]
    manifest = _manifest(labels, ["train"] * 3 + ["valid"] * 3 + ["test"] * 4)
    patterns = np.random.default_rng(0).integers(0, 256, (6, 64, 64), dtype=np.uint8)
    told = (
        [[0.5] * 2] * 3
        + [[0.375, 0.25], [0.125, 0.75], [0.1, 0.2]]
        + [[0.3, 0.7], [0.25, 0.1], [0.15, 0.5], [0.9, 0.9]]
    )
    return manifest, patterns[[0, 1, 2, 3, 4, 5, 0, 1, 2, 2]], _table(manifest, told)


def _value(rows):
    return {(row["variant"], row["split"], row["metric"], row["label"]): row["value"] for row in rows}


def test_truth_and_probabilities_come_back_from_csv_with_unknown_labels(tmp_path, small):
    manifest, _, table = small
    table.to_csv(tmp_path / "p.csv", index=False)
    back = multilabel.truth_and_probabilities(predictions.read(tmp_path / "p.csv"), NAMES)
    np.testing.assert_array_equal(back[0], manifest[list(NAMES)])
    for one, other in zip(back, multilabel.truth_and_probabilities(table, NAMES), strict=True):
        assert one.dtype == other.dtype == float
        np.testing.assert_array_equal(one, other)


def test_thresholds_come_from_the_validation_rows_alone(small):
    _, _, table = small
    # a: 0.375 | 0.125; b: 0.75 | 0.25
    assert multilabel.thresholds(table, NAMES).tolist() == [0.25, 0.5]
    changed = table.assign(p_a=np.where(table["split"] == "valid", table["p_a"], 0.0))
    np.testing.assert_array_equal(multilabel.thresholds(changed, NAMES), multilabel.thresholds(table, NAMES))


def test_thresholds_of_test_or_of_an_absent_split_are_refused(small):
    _, _, table = small
    with pytest.raises(ValueError, match="tune thresholds on 'valid'"):
        multilabel.thresholds(table, NAMES, split="test")
    with pytest.raises(ValueError, match=r"no row of split 'val', only of \['test', 'train', 'valid'\]"):
        multilabel.thresholds(table, NAMES, split="val")


def test_mean_average_precision_by_hand_and_by_scikit_learn(small, rng):
    _, _, table = small
    # a: found first; b: of the known test rows the positives stand second and third, at precisions 1/2 and 2/3
    assert multilabel.mean_average_precision(table, NAMES, split="valid") == 1
    assert multilabel.mean_average_precision(table, NAMES, split="test") == pytest.approx((1 + 7 / 12) / 2, abs=1e-15)
    labels = rng.integers(0, 2, (50, 2))
    probabilities = rng.random((50, 2)).round(1)
    table = _table(_manifest(labels, "valid"), probabilities)
    expected = sk.average_precision_score(labels, probabilities, average="macro")
    assert multilabel.mean_average_precision(table, NAMES, split="valid") == pytest.approx(expected, abs=1e-12)
    shuffled = table.sample(frac=1, random_state=0)
    assert multilabel.mean_average_precision(shuffled, NAMES, split="valid") == pytest.approx(expected, abs=1e-12)


def test_mean_average_precision_without_a_positive_is_refused():
    table = _table(_manifest(np.zeros((3, 2)), "valid"), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="occurs in the valid split"):
        multilabel.mean_average_precision(table, NAMES, split="valid")


def test_baselines_by_hand(small):
    manifest, thumbnails, _ = small
    y_train = manifest[list(NAMES)].to_numpy()[:3]
    answers = multilabel.baselines(y_train, 4, thumbnails[:3], thumbnails[6:])
    # a is present in 2 of 3; b in 1 of the 2 where it is known, which is not more than half
    assert answers["majority"].probabilities.tolist() == [[1, 0]] * 4
    assert answers["all_positive"].probabilities.tolist() == [[1, 1]] * 4
    # the third training image's b is unknown: the majority answers
    assert answers["nearest_neighbour"].probabilities.tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]
    assert all(answer.thresholds.tolist() == [0.5, 0.5] for answer in answers.values())
    unknown = multilabel.baselines(np.full((3, 2), np.nan), 0, thumbnails[:3], thumbnails[:0])
    assert all(answer.probabilities.shape == (0, 2) for answer in unknown.values())


def test_baselines_unfit_thumbnails_are_refused(small):
    manifest, thumbnails, _ = small
    with pytest.raises(ValueError, match="2 training thumbnails beside 3 rows of labels, and 4 others beside 5 rows"):
        multilabel.baselines(manifest[list(NAMES)].to_numpy()[:3], 5, thumbnails[:2], thumbnails[6:])


def test_evaluate_by_hand(small):
    manifest, thumbnails, table = small
    rows = multilabel.evaluate({"net": table}, manifest, thumbnails, NAMES, task="t", num_draws=20)
    value = _value(rows)
    # Tuned to 0.25 and 0.5, which one test image each just reaches: a is right of all three, b has one false alarm.
    assert value["net", "test", "f1", "a"] == 1 and value["net", "test", "f1", "b"] == pytest.approx(4 / 5)
    assert value["net", "test", "f1", "all"] == pytest.approx(9 / 10)
    assert value["net", "test", "accuracy", "b"] == 3 / 4
    # of the three known a, two are present: 2p / (1 + p) = 4/5; of four b, two: 2/3
    assert value["all_positive", "test", "f1", "all"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert value["majority", "test", "f1", "all"] == pytest.approx((4 / 5 + 0) / 2)
    assert value["nearest_neighbour", "test", "f1", "all"] == pytest.approx((1 + 2 / 3) / 2)
    row = next(row for row in rows if (row["variant"], row["metric"], row["label"]) == ("net", "f1", "all"))
    assert (row["n"], row["n_groups"], row["baseline"]["variant"]) == (4, 4, "nearest_neighbour")


def test_evaluate_subsets_keep_their_own_baselines(small):
    manifest, thumbnails, table = small
    black = np.zeros(10, bool)
    black[[0, 6, 7]] = True
    svc = metrics.Answer(np.zeros((4, 2)), HALF)
    rows = multilabel.evaluate(
        {"net": table, "other": table},
        manifest,
        thumbnails,
        NAMES,
        task="t",
        subsets={"test": np.ones(10, bool), "test, black": black, "test, not black": ~black},
        constant_only=["test, black"],
        extra={"svc": svc},
        reference="other",
        num_draws=10,
    )
    variants = {}
    for row in rows:
        variants.setdefault(row["split"], {})[row["variant"]] = row["n"]
    everyone = {"net", "other", "majority", "all_positive", "nearest_neighbour", "svc"}
    assert {split: set(names) for split, names in variants.items()} == {
        "test": everyone,
        "test, black": everyone - {"nearest_neighbour", "svc"},
        "test, not black": everyone,
    }
    assert [set(names.values()) for names in variants.values()] == [{4}, {2}, {2}]
    value = _value(rows)
    assert value["net", "test, black", "f1", "b"] == 1 and value["net", "test, not black", "f1", "b"] == 2 / 3
    assert value["svc", "test", "f1", "all"] == 0
    compared = {row["variant"] for row in rows if row.get("reference")}
    assert compared == {"net"}


def test_evaluate_does_not_depend_on_the_order_of_rows(small, rng):
    manifest, thumbnails, table = small
    order = rng.permutation(10)
    first = multilabel.evaluate({"net": table}, manifest, thumbnails, NAMES, task="t", num_draws=10)
    again = multilabel.evaluate(
        {"net": table.iloc[order]}, manifest.iloc[order], thumbnails[order], NAMES, task="t", num_draws=10
    )
    assert first == again


def test_evaluate_baselines_alone(small):
    manifest, thumbnails, _ = small
    rows = multilabel.evaluate({}, manifest, thumbnails, NAMES, task="t", num_draws=5)
    assert {row["variant"] for row in rows} == {"majority", "all_positive", "nearest_neighbour"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": {"dark": np.zeros(10, bool)}}, "subset 'dark' has no test image"),
        ({"subsets": {"dark": np.ones(4, bool)}}, r"mask of 'dark' is bool of shape \(4,\); expected bool, \(10,\)"),
        ({"subsets": {"dark": np.ones(10, int)}}, "mask of 'dark' is int64"),
        ({"constant_only": ["dark"]}, r"`constant_only` names \['dark'\]; expected some of \['test'\]"),
        ({"extra": {"forest": metrics.Answer(np.zeros((4, 2)), HALF)}}, r"`extra` names \['forest'\]"),
        ({"extra": {"svc": metrics.Answer(np.zeros((10, 2)), HALF)}}, "answers 10 rows as svc; expected the 4 test"),
    ],
)
def test_evaluate_unfit_options_are_refused(small, options, message):
    manifest, thumbnails, table = small
    with pytest.raises(ValueError, match=message):
        multilabel.evaluate({"net": table}, manifest, thumbnails, NAMES, task="t", **options)


def test_evaluate_unfit_tables_are_refused(small):
    manifest, thumbnails, table = small
    tuned_on_test = table.assign(split=["train"] * 3 + ["valid"] * 4 + ["test"] * 3)
    for tables, message in [
        ({"svc": table}, "variant 'svc', which is a baseline's name"),
        ({"net": table.iloc[6:]}, "table of net has 4 rows that are not the 10 of the manifest"),
        ({"net": table.iloc[::-1]}, "in its order"),
        ({"net": tuned_on_test}, r"1 test rows are valid rows in the table of net.*\['6.png'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            multilabel.evaluate(tables, manifest, thumbnails, NAMES, task="t")


def test_headline_is_mean_f1_and_average_precision_of_one_variant_on_all_test_images(small):
    manifest, thumbnails, table = small
    some = np.arange(10) != 9
    rows = multilabel.evaluate(
        {"net": table, "other": table},
        manifest,
        thumbnails,
        NAMES,
        task="t",
        subsets={"test": some | True, "test, some": some},
        num_draws=5,
    )
    found = multilabel.headline(rows, task="t", variant="net")
    assert [(row["variant"], row["split"], row["metric"], row["label"]) for row in found] == [
        ("net", "test", "f1", "all"),
        ("net", "test", "average_precision", "all"),
    ]
    assert all(row["baseline"] for row in found)


def test_baselines_answer_constant_images_as_the_majority(rng):
    pictures = rng.integers(0, 256, (3, 64, 64), dtype=np.uint8)
    y_train = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    asked = np.stack([np.zeros((64, 64), np.uint8), pictures[0]])
    told = multilabel.baselines(y_train, 2, pictures, asked)
    np.testing.assert_array_equal(told["nearest_neighbour"].probabilities, [[0, 1], [1, 0]])
