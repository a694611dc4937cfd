import numpy as np
import pandas as pd
import pytest

from kerasmed import predictions

NAMES = ("a", "b", "c")


def _manifest(ids, split, groups=None):
    labels = pd.DataFrame(np.eye(3, dtype=int)[ids], columns=NAMES)
    groups = [str(number) for number in (range(len(ids)) if groups is None else groups)]
    paths = [f"{number}.png" for number in range(len(ids))]
    return labels.assign(image_path=paths, patient_id=pd.NA, study_id=pd.NA, group_id=groups, split=split)


def _table(manifest, answers, sure=0.8):
    probabilities = np.full((len(manifest), 3), (1 - np.asarray(sure)[..., None]) / 2 * np.ones(3))
    probabilities[np.arange(len(manifest)), answers] = sure
    return predictions.tabulate(manifest, probabilities, NAMES, variant="net")


def test_table_comes_back_from_csv_as_it_was(tmp_path):
    table = _table(_manifest([0, 1, 2], "test", groups=["007", "NA", "9"]), [0, 1, 1])
    table.to_csv(tmp_path / "p.csv", index=False)
    back = predictions.read(tmp_path / "p.csv")
    assert back["group_id"].tolist() == ["007", "NA", "9"]
    assert back["patient_id"].isna().all()
    truth, probabilities = predictions.truth_and_probabilities(back, NAMES)
    assert truth.tolist() == [0, 1, 2] and probabilities.argmax(axis=1).tolist() == [0, 1, 1]
    np.testing.assert_array_equal(probabilities, predictions.truth_and_probabilities(table, NAMES)[1])


def test_held_out_takes_each_image_from_the_fold_that_tests_it():
    first = _manifest([0, 1, 2, 0], ["test", "train", "test", "train"])
    second = first.assign(split=["train", "test", "valid", "test"])
    joined = predictions.held_out([_table(first, [0] * 4), _table(second, [1] * 4)], [first, second])
    assert joined.index.tolist() == [0, 2, 1, 3] and joined["fold"].tolist() == [1, 1, 2, 2]
    assert predictions.truth_and_probabilities(joined, NAMES)[1].argmax(axis=1).tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError):
        predictions.held_out([_table(first, [0] * 4)], [first, second])


def test_confident_shows_each_group_once_and_the_surest_first():
    manifest = _manifest([0, 0, 1, 1, 0], "test", groups=[1, 1, 2, 3, 4])
    table = _table(manifest, [0] * 5, sure=np.array([0.5, 0.9, 0.6, 0.7, 0.8]))
    assert predictions.confident(table, NAMES, right=True).tolist() == [1, 4]
    assert predictions.confident(table, NAMES, right=False).tolist() == [3, 2]
    assert predictions.confident(table, NAMES, right=False, count=1).tolist() == [3]


def test_captions_say_class_answer_and_sureness():
    table = _table(_manifest([0, 2], "test"), [0, 1])
    assert predictions.captions(table, NAMES) == ["a\nread as a\np = 0.80", "c\nread as b\np = 0.80"]


def test_balanced_accuracy_by_hand():
    manifest = _manifest([0, 0, 0, 1, 2], ["valid", "valid", "valid", "valid", "test"])
    # class a: 2 of 3; class b: 1 of 1; class c does not occur in valid
    assert predictions.balanced_accuracy(_table(manifest, [0, 0, 1, 1, 0]), NAMES, split="valid") == pytest.approx(
        5 / 6
    )


@pytest.fixture
def two_folds(rng):
    """Ten patterns, each once in either half; those of the images 10 and 19 are exchanged, and their classes differ."""
    ids = np.arange(20) % 2
    patterns = rng.integers(0, 256, (10, 64, 64), dtype=np.uint8)
    thumbnails = patterns[np.arange(20) % 10]
    thumbnails[[10, 19]] = thumbnails[[19, 10]]
    first = _manifest(ids, np.where(np.arange(20) < 10, "test", "train"))
    second = first.assign(split=np.where(np.arange(20) < 10, "train", "test"))
    return ids, thumbnails, [first, second]


def test_evaluate_scores_every_image_once_beside_baselines_of_its_own_fold(two_folds):
    ids, thumbnails, manifests = two_folds
    tables = {"net": [_table(manifest, ids) for manifest in manifests]}
    rows = predictions.evaluate(tables, manifests, thumbnails, NAMES, task="t", num_draws=50)
    value = {(row["variant"], row["metric"], row["label"]): row for row in rows}
    accuracy = value["net", "accuracy", "all"]
    assert (accuracy["value"], accuracy["n"], accuracy["n_groups"], accuracy["split"]) == (1, 20, 20, "test")
    # The images 0, 9, 10 and 19 are answered by one of the other class.
    assert value["nearest_neighbour", "accuracy", "all"]["value"] == pytest.approx(16 / 20)
    assert accuracy["baseline"]["variant"] == "nearest_neighbour"
    # Class c has no group at all: the two others are scored apart.
    assert value["net", "accuracy", "2 classes: all"]["n"] == 20


def test_evaluate_without_an_image_to_test_is_refused(two_folds):
    ids, thumbnails, manifests = two_folds
    empty = manifests[0].assign(split="train")
    with pytest.raises(ValueError, match="has no image"):
        predictions.evaluate({"net": [_table(empty, ids)]}, [empty], thumbnails, NAMES, task="t")


def test_evaluate_baselines_alone_by_hand(rng):
    # Tested: a copy of an "a", a copy of a "b", and a copy of a "b" that is labelled "a": 2 of 3 right.
    thumbnails = rng.integers(0, 256, (3, 64, 64), dtype=np.uint8)[[0, 1, 2, 0, 1, 2]]
    manifest = _manifest([0, 1, 1, 0, 1, 0], ["train"] * 3 + ["test"] * 3)
    rows = predictions.evaluate({}, [manifest], thumbnails, NAMES[:2], task="t", split="published", num_draws=20)
    accuracy = {row["variant"]: row["value"] for row in rows if row["metric"] == "accuracy"}
    assert accuracy == {"nearest_neighbour": pytest.approx(2 / 3), "majority": pytest.approx(1 / 3)}
    assert {(row["split"], row["n"], row["n_groups"]) for row in rows} == {("published", 3, 3)}


def test_evaluate_majority_over_folds_of_unlike_prevalence_tells_nothing():
    ids = np.array([0] * 9 + [1] * 3 + [0] * 7 + [1] * 5)
    first = _manifest(ids, ["test"] * 12 + ["train"] * 12)
    second = first.assign(split=["train"] * 12 + ["test"] * 12)
    rows = predictions.evaluate({}, [first, second], np.zeros((24, 64, 64), np.uint8), NAMES[:2], task="t", num_draws=5)
    areas = {row["label"]: row["value"] for row in rows if row["metric"] == "auroc" and row["variant"] == "majority"}
    assert areas == {"a": 0.5, "b": 0.5}


def test_evaluate_decide_answers_its_variant_from_the_test_rows_of_each_fold(two_folds):
    ids, thumbnails, manifests = two_folds
    wrong = [_table(manifest, 1 - ids).assign(mark=number) for number, manifest in enumerate(manifests)]
    asked = []

    def right(table, classes):
        asked.append((len(table), table["mark"].tolist(), classes.tolist()))
        return table[["y_a", "y_b", "y_c"]].to_numpy().argmax(axis=1)

    tables = {"net": wrong, "twin": wrong}
    rows = predictions.evaluate(
        tables, manifests, thumbnails, NAMES, task="t", num_draws=5, decide={"net": right}, reference="twin"
    )
    value = {(row["variant"], row["metric"], row["label"]): row for row in rows}
    for prefix in ("", "2 classes: "):
        assert value["net", "accuracy", f"{prefix}all"]["value"] == 1
        assert value["twin", "accuracy", f"{prefix}all"]["value"] == 0
        assert value["net", "accuracy", f"{prefix}all"]["reference"]["difference"] == 1
        # Its probabilities are still those of the table, which is always wrong.
        assert value["net", "auroc", f"{prefix}a"]["value"] == 0
    # Each fold's own rows; all classes, and then the two that have groups.
    assert asked == [(20, [0] * 10 + [1] * 10, classes) for classes in ([0, 1, 2], [0, 1])]


def test_evaluate_decide_names_classes_by_their_position_among_all():
    ids = np.repeat([0, 1, 2], 8)
    groups = [f"{number}-{row % (4 if number != 1 else 2)}" for row, number in enumerate(ids)]
    split = np.where(np.arange(24) % 2, "test", "train")
    manifest = _manifest(ids, split, groups=groups)  # the middle class has two groups alone
    table = _table(manifest, [0] * 24)

    def last(rows, classes):
        return np.full(len(rows), classes[-1])

    rows = predictions.evaluate(
        {"net": [table]},
        [manifest],
        np.zeros((24, 64, 64), np.uint8),
        NAMES,
        task="t",
        num_draws=5,
        decide={"net": last},
    )
    sensitivity = {
        row["label"]: row["value"] for row in rows if row["metric"] == "sensitivity" and row["variant"] == "net"
    }
    assert sensitivity == {"a": 0, "b": 0, "c": 1, "2 classes: a": 0, "2 classes: c": 1}
    (apart,) = (
        row for row in rows if (row["variant"], row["metric"], row["label"]) == ("net", "accuracy", "2 classes: all")
    )
    assert (apart["value"], apart["n"]) == (0.5, 8)
