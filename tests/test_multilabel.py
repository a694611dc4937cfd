import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from kerasmed import metrics, multilabel, predictions

NAMES = ("a", "b")
THREE = ("a", "b", "c")
HALF = np.full(2, 0.5)


@pytest.fixture
def labelled(rng):
    """120 images in 40 groups, three independent labels of which a tenth is unknown, probabilities with ties."""
    y_true = (rng.random((120, 3)) < (0.1, 0.4, 0.7)).astype(float)
    probabilities = np.clip(rng.normal(0.3 + 0.3 * y_true, 0.2), 0, 1).round(1)
    y_true[rng.random((120, 3)) < 0.1] = np.nan
    return y_true, probabilities, np.repeat(np.arange(40), 3)


def test_scores_equals_scikit_learn_under_weights_over_known_rows(labelled, rng):
    y_true, probabilities, _ = labelled
    thresholds = np.array([0.4, 0.5, 0.6])
    weights = rng.integers(0, 4, (3, 120)).astype(np.float32)
    got = multilabel.scores(y_true, probabilities, thresholds, THREE, weights, at_half=multilabel.AT_HALF)
    for draw, weight in enumerate(weights):
        expected = {}
        for position, name in enumerate(THREE):
            known = np.isfinite(y_true[:, position])
            truth, scores = y_true[known, position].astype(int), probabilities[known, position]
            answer, each = (scores >= thresholds[position]).astype(int), {"sample_weight": weight[known]}
            expected["average_precision", name] = sk.average_precision_score(truth, scores, **each)
            expected["auroc", name] = sk.roc_auc_score(truth, scores, **each)
            for suffix, told in {"": answer, "_at_half": (scores >= 0.5).astype(int)}.items():
                expected[f"f1{suffix}", name] = sk.f1_score(truth, told, **each)
                expected[f"accuracy{suffix}", name] = sk.accuracy_score(truth, told, **each)
                expected[f"sensitivity{suffix}", name] = sk.recall_score(truth, told, **each)
                expected[f"specificity{suffix}", name] = sk.recall_score(1 - truth, 1 - told, **each)
                expected[f"precision{suffix}", name] = sk.precision_score(truth, told, **each)
                expected[f"kappa{suffix}", name] = sk.cohen_kappa_score(truth, told, **each)
        for metric in dict.fromkeys(metric for metric, _ in expected):
            expected[metric, "all"] = np.mean([expected[metric, name] for name in THREE])
        assert set(expected) == set(got)
        for key, value in expected.items():
            # float32 counts are exact; the rest is float64
            assert got[key][draw] == pytest.approx(value, abs=1e-9), key


def test_scores_by_hand_with_undefined_labels():
    nan = np.nan
    # a: tp, fn, fp, and one unknown; b: never present, never answered; c: always present; d: never known
    y_true = np.array([[1, 0, 1, nan], [1, 0, 1, nan], [0, 0, 1, nan], [nan, 0, 1, nan]])
    probabilities = np.array([[0.9, 0.1, 0.5, 0], [0.2, 0.1, 0.4, 0], [0.8, 0.1, 0.9, 0], [0.9, 0.1, 0.9, 0]])
    got = multilabel.scores(y_true, probabilities, np.full(4, 0.5), "abcd", np.ones((1, 4)))
    got = {key: float(value[0]) for key, value in got.items()}
    expected = {
        "f1": (1 / 2, nan, 6 / 7, nan, (1 / 2 + 6 / 7) / 2),
        "f1_at_half": (1 / 2, nan, 6 / 7, nan, (1 / 2 + 6 / 7) / 2),
        "average_precision": (5 / 6, nan, 1, nan, 11 / 12),
        "auroc": (1 / 2, nan, nan, nan, 1 / 2),
        "accuracy": (1 / 3, 1, 3 / 4, nan, 25 / 36),
        "sensitivity": (1 / 2, nan, 3 / 4, nan, 5 / 8),
        "specificity": (0, 1, nan, nan, 1 / 2),
        "precision": (1 / 2, nan, 1, nan, 3 / 4),
        # a: p_o = 1/3, p_e = 5/9; b: all absent, all answered so; c: all present, one not answered so, p_o = p_e
        "kappa": (-1 / 2, nan, 0, nan, -1 / 4),
    }
    assert {metric for metric, _ in got} == set(expected)
    for metric, values in expected.items():
        for label, value in zip([*"abcd", "all"], values):
            assert got[metric, label] == pytest.approx(value, abs=1e-15, nan_ok=True), (metric, label)
    # At other thresholds F1 moves, F1 at one half does not.
    moved = multilabel.scores(y_true, probabilities, np.full(4, 0.15), "abcd", np.ones((1, 4)))
    assert (moved["f1", "a"][0], moved["f1_at_half", "a"][0]) == (4 / 5, 1 / 2)
    # An answer to a label that is never present is wrong, not undefined.
    answered = multilabel.scores(y_true[:, 1:2], probabilities[:, 1:2], np.zeros(1), "b", np.ones((1, 4)))
    assert answered["f1", "b"][0] == 0


def test_scores_at_half_are_those_asked_for(labelled):
    y_true, probabilities, _ = labelled
    options = (THREE, np.ones((1, 120)))
    plain = multilabel.scores(y_true, probabilities, np.full(3, 0.5), *options, at_half=())
    assert not [metric for metric, _ in plain if metric.endswith("_at_half")]
    moved = multilabel.scores(y_true, probabilities, np.full(3, 0.3), *options, at_half=("kappa", "specificity"))
    assert {metric for metric, _ in moved} - {metric for metric, _ in plain} == {"kappa_at_half", "specificity_at_half"}
    for metric in ("kappa", "specificity"):
        for label in ("all", *THREE):
            assert moved[f"{metric}_at_half", label] == plain[metric, label] != moved[metric, label]


def test_scores_at_half_of_a_metric_without_a_threshold_is_refused(labelled):
    y_true, probabilities, _ = labelled
    with pytest.raises(ValueError, match=r"`at_half` names \['auroc', 'dice'\]; expected some of .*'kappa'"):
        multilabel.scores(y_true, probabilities, np.ones(3), THREE, np.ones((1, 120)), at_half=["f1", "auroc", "dice"])


def test_scores_of_a_single_label_have_no_mean(labelled):
    y_true, probabilities, _ = labelled
    options = {"thresholds": np.full(3, 0.5), "class_names": THREE, "weights": np.ones((2, 120))}
    among = multilabel.scores(y_true, probabilities, **options)
    options |= {"thresholds": np.full(1, 0.5), "class_names": ("b",)}
    alone = multilabel.scores(y_true[:, 1:2], probabilities[:, 1:2], **options)
    assert {label for _, label in alone} == {"b"} and len(alone) == 9
    for key, values in alone.items():
        np.testing.assert_array_equal(values, among[key])


@pytest.mark.parametrize("positives", [1, 5, 10])
def test_scores_of_all_positive_is_the_best_constant_by_f1(positives):
    y_true, once, half = (np.arange(10) < positives)[:, None].astype(float), np.ones((1, 10)), np.array([0.5])
    prevalence = positives / 10
    present = multilabel.scores(y_true, np.ones((10, 1)), half, "a", once)
    absent = multilabel.scores(y_true, np.zeros((10, 1)), half, "a", once)
    assert present["f1", "a"][0] == pytest.approx(2 * prevalence / (1 + prevalence), abs=1e-15)
    assert present["average_precision", "a"][0] == absent["average_precision", "a"][0] == prevalence
    assert absent["f1", "a"][0] == 0


def test_tune_thresholds_take_the_middle_of_the_gap():
    nan = np.nan
    y_true = np.array([[1, 1, 0, nan, 1], [1, 1, 0, nan, 1], [0, 0, 0, nan, nan], [0, 1, 0, nan, nan]])
    probabilities = np.array([[0.9, 0.9], [0.7, 0.6], [0.3, 0.5], [0.1, 0.4]])
    probabilities = np.column_stack([probabilities, np.full((4, 2), 0.2), [0.8, 0.6, 0.99, 0.01]])
    # a: 0.7 | 0.3; b: all present, F1 = 6/7 against 4/5, half of the way from 0.4 to 0; c, d: no positive; e: 0.6 | 0
    np.testing.assert_allclose(multilabel.tune_thresholds(y_true, probabilities), [0.5, 0.2, 0.5, 0.5, 0.3], atol=1e-15)


def test_tune_thresholds_of_equal_f1_take_the_widest_gap_then_the_highest():
    # F1 = 2/3 after one answer (1 of 2 found, none wrong) and after four (2 found, 2 wrong)
    y_true = np.array([1, 0, 0, 1, 0, 0, 0])[:, None]
    wide_low = np.array([0.9, 0.85, 0.8, 0.75, 0.25, 0.2, 0.1])[:, None]
    assert multilabel.tune_thresholds(y_true, wide_low)[0] == 0.5
    even = np.array([0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])[:, None]
    assert multilabel.tune_thresholds(y_true, even)[0] == (0.875 + 0.75) / 2


def test_tune_thresholds_reach_the_best_f1_of_any_threshold(labelled, rng):
    y_true, probabilities, _ = labelled
    tuned = multilabel.tune_thresholds(y_true, probabilities)
    for position in range(3):
        known = np.isfinite(y_true[:, position])
        truth, scores = y_true[known, position], probabilities[known, position]
        f1 = [sk.f1_score(truth, scores >= threshold) for threshold in (*np.arange(0, 1.05, 0.05), tuned[position])]
        assert f1[-1] == max(f1)
    order = rng.permutation(120)
    np.testing.assert_array_equal(multilabel.tune_thresholds(y_true[order], probabilities[order]), tuned)


def test_tune_thresholds_between_neighbouring_floats_still_part_them():
    low = 0.5
    high = np.nextafter(low, 1)
    tuned = multilabel.tune_thresholds(np.array([[1], [0]]), np.array([[high], [low]]))
    assert low < tuned[0] <= high
    assert multilabel.tune_thresholds(np.array([[1], [1]]), np.zeros((2, 1)))[0] == 0
    assert multilabel.tune_thresholds(np.zeros((0, 2)), np.zeros((0, 2))).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("y_true", "probabilities", "message"),
    [
        (np.zeros((3, 1)), np.zeros((3, 2)), r"shape \(3, 2\) beside labels of shape \(3, 1\)"),
        (np.zeros(3), np.zeros(3), r"\(num_images, num_labels\)"),
        (np.zeros((3, 1)), np.full((3, 1), np.nan), "all finite"),
        (np.zeros((3, 1)), np.array([[-1], [0], [2.5]]), r"in \[-1, 2.5\]"),
        (np.array([[0], [-1], [1]]), np.zeros((3, 1)), r"1 labels are not 1, 0 or NaN.*\[\[1, 0\]\], the value -1"),
    ],
)
def test_tune_thresholds_unfit_input_is_refused(y_true, probabilities, message):
    with pytest.raises(ValueError, match=message):
        multilabel.tune_thresholds(y_true, probabilities)


def _constant(y_true, value):
    return multilabel.Answer(np.full(y_true.shape, float(value)), np.full(y_true.shape[1], 0.5))


def test_rows_stand_beside_the_strongest_baseline(labelled):
    y_true, probabilities, groups = labelled
    answers = {
        "net": multilabel.Answer(probabilities, np.full(3, 0.5)),
        "twin": multilabel.Answer(probabilities, np.full(3, 0.5)),
        "majority": _constant(y_true, 0),
        "all_positive": _constant(y_true, 1),
        "svc": multilabel.Answer(1 - probabilities, np.full(3, 0.5)),
    }
    rows = multilabel.rows(y_true, answers, groups, THREE, task="t", reference="twin", num_draws=100)
    value = {(row["variant"], row["metric"], row["label"]): row for row in rows}
    assert len(value) == len(rows) == 5 * 9 * 4
    mean_f1 = value["net", "f1", "all"]
    assert mean_f1["baseline"]["variant"] == "all_positive"
    prevalence = np.nanmean(y_true, axis=0)
    assert mean_f1["baseline"]["value"] == pytest.approx(np.mean(2 * prevalence / (1 + prevalence)), abs=1e-12)
    assert mean_f1["baseline"]["difference"] == pytest.approx(mean_f1["value"] - mean_f1["baseline"]["value"])
    assert mean_f1["ci95"][0] < mean_f1["value"] < mean_f1["ci95"][1]
    assert (mean_f1["n"], mean_f1["n_groups"], mean_f1["split"]) == (120, 40, "test")
    assert mean_f1["reference"]["difference"] == 0
    assert all(row["baseline"] is None and "reference" not in row for row in rows if row["variant"] == "svc")
    undefined = value["majority", "precision", "a"]
    assert (undefined["value"], undefined["ci95"], undefined["reason"]) == (None, None, "never predicted")
    shown = metrics.tabulate(rows).set_index(["variant", "metric", "label"])["baseline"]
    assert shown["net", "f1", "all"].startswith("all_positive 0.")


def test_rows_do_not_depend_on_the_order_of_images(labelled, rng):
    y_true, probabilities, groups = labelled

    def rows(order):
        answers = {
            "net": multilabel.Answer(probabilities[order], np.full(3, 0.5)),
            "all_positive": _constant(y_true, 1),
        }
        return multilabel.rows(y_true[order], answers, groups[order], THREE, task="t", num_draws=50)

    for first, second in zip(rows(np.arange(120)), rows(rng.permutation(120)), strict=True):
        assert first["value"] == second["value"] and first["ci95"] == second["ci95"]
        assert first["baseline"] == second["baseline"]


def test_rows_say_why_a_value_is_undefined():
    y_true = np.array([[0, 1, np.nan]] * 4)
    answers = {"net": _constant(y_true, 0.2), "all_positive": _constant(y_true, 1)}
    options = {"task": "t", "split": "night", "num_draws": 5, "at_half": multilabel.AT_HALF}
    rows = multilabel.rows(y_true, answers, np.arange(4), THREE, **options)
    reason = {(row["metric"], row["label"]): row.get("reason") for row in rows if row["variant"] == "net"}
    assert reason["f1", "a"] == reason["auroc", "a"] == reason["sensitivity", "a"] == "no a in the night split"
    assert reason["specificity", "b"] == reason["auroc", "b"] == "no image without b in the night split"
    assert reason["precision", "b"] == reason["precision_at_half", "b"] == "never predicted"
    assert reason["kappa", "a"] == reason["kappa_at_half", "a"] == "no a in the night split"
    assert reason["f1", "b"] is None
    assert reason["accuracy", "c"] == reason["precision", "c"] == "c is unknown in the night split"
    assert reason["auroc", "all"] == "undefined of every label"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"all_positive": None}, r"no baseline among the variants \['net'\]"),
        ({"net": multilabel.Answer(np.zeros((120, 2)), np.zeros(2))}, r"probabilities of net have shape \(120, 2\)"),
        ({"net": multilabel.Answer(np.full((120, 3), np.nan), np.zeros(3))}, "all finite"),
        ({"net": multilabel.Answer(np.full((120, 3), -3.0), np.zeros(3))}, r"net are in \[-3, 1\].*no logits"),
        ({"net": multilabel.Answer(np.zeros((120, 3)), np.zeros(2))}, r"thresholds of net have shape \(2,\)"),
    ],
)
def test_rows_unfit_answers_are_refused(labelled, change, message):
    y_true, probabilities, groups = labelled
    given = {"net": multilabel.Answer(probabilities, np.full(3, 0.5)), "all_positive": _constant(y_true, 1)} | change
    given = {name: answer for name, answer in given.items() if answer is not None}
    with pytest.raises(ValueError, match=message):
        multilabel.rows(y_true, given, groups, THREE, task="t")


def test_rows_empty_split_or_strange_label_is_refused(labelled):
    empty = np.zeros((0, 3))
    with pytest.raises(ValueError, match="the test split of t has no image"):
        multilabel.rows(empty, {"all_positive": _constant(empty, 1)}, [], THREE, task="t")
    uncertain = np.full((2, 3), -1.0)
    with pytest.raises(ValueError, match="6 labels are not 1, 0 or NaN"):
        multilabel.rows(uncertain, {"all_positive": _constant(uncertain, 1)}, [0, 1], THREE, task="t")


def test_rows_each_variant_is_compared_with_its_own_reference(rng):
    y_true = (rng.random((30, 1)) < 0.5).astype(float)
    told = {
        name: multilabel.Answer(rng.random((30, 1)), np.array([0.5])) for name in ("a", "b", "b without", "majority")
    }
    options = {"task": "t", "num_draws": 20}
    rows = multilabel.rows(y_true, told, range(30), ["x"], reference={"b without": "b"}, **options)
    compared = [row for row in rows if "reference" in row]
    assert {row["variant"] for row in compared} == {"b without"}
    assert {row["reference"]["variant"] for row in compared} == {"b"}
    with pytest.raises(ValueError, match="`reference` is .'c': 'b'."):
        multilabel.rows(y_true, told, range(30), ["x"], reference={"c": "b"}, **options)


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


def test_mean_score_by_hand_and_by_scikit_learn(small, rng):
    _, _, table = small
    # a: found first; b: of the known test rows the positives stand second and third, at precisions 1/2 and 2/3
    assert multilabel.mean_score(table, NAMES, split="valid") == 1
    assert multilabel.mean_score(table, NAMES, split="test") == pytest.approx((1 + 7 / 12) / 2, abs=1e-15)
    labels = rng.integers(0, 2, (50, 2))
    probabilities = rng.random((50, 2)).round(1)
    table = _table(_manifest(labels, "valid"), probabilities)
    expected = sk.average_precision_score(labels, probabilities, average="macro")
    assert multilabel.mean_score(table, NAMES, split="valid") == pytest.approx(expected, abs=1e-12)
    area = sk.roc_auc_score(labels, probabilities, average="macro")
    assert multilabel.mean_score(table, NAMES, split="valid", metric="auroc") == pytest.approx(area, abs=1e-12)
    shuffled = table.sample(frac=1, random_state=0)
    assert multilabel.mean_score(shuffled, NAMES, split="valid") == pytest.approx(expected, abs=1e-12)


def test_mean_score_of_a_single_label_is_its_own(small):
    _, _, table = small
    assert multilabel.mean_score(table, ["b"], split="test") == pytest.approx(7 / 12, abs=1e-15)
    assert multilabel.mean_score(table, ["a"], split="test", metric="auroc") == 1
    absent = _table(_manifest(np.zeros((3, 2)), "valid"), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"none of \['a'\] has a positive in the valid split"):
        multilabel.mean_score(absent, ["a"], split="valid")


def test_mean_score_without_a_positive_is_refused():
    table = _table(_manifest(np.zeros((3, 2)), "valid"), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="has a positive in the valid split, which average_precision needs"):
        multilabel.mean_score(table, NAMES, split="valid")
    table = _table(_manifest(np.ones((3, 2)), "valid"), np.zeros((3, 2)))
    assert multilabel.mean_score(table, NAMES, split="valid") == 1
    with pytest.raises(ValueError, match="has a positive and a negative in the valid split, which auroc needs"):
        multilabel.mean_score(table, NAMES, split="valid", metric="auroc")


def test_mean_score_of_a_metric_with_a_threshold_is_refused(small):
    with pytest.raises(ValueError, match="`metric` is 'f1'; expected one of .*auroc"):
        multilabel.mean_score(small[2], NAMES, split="valid", metric="f1")


def test_cooccurrence_by_hand_over_known_labels():
    nan = np.nan
    y_true = np.array([[1, 1, nan], [1, 0, nan], [1, nan, nan], [0, 1, nan], [nan, 0, nan]])
    table = multilabel.cooccurrence(y_true, THREE)
    # 3 of 4 have a, and 1 of the 2 of them whose b is known have b; 2 of 4 have b, both with a known, one of them 1
    expected = [[3 / 4, 1 / 2, nan], [1 / 2, 2 / 4, nan], [nan, nan, nan]]
    np.testing.assert_allclose(table, expected, rtol=1e-15)
    assert table.index.tolist() == table.columns.tolist() == list(THREE)


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
    svc = multilabel.Answer(np.zeros((4, 2)), HALF)
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


def test_evaluate_subset_without_a_label_says_so_and_keeps_baselines_that_see_no_image(small):
    manifest, thumbnails, table = small
    first = np.zeros(10, bool)
    first[[7, 9]] = True  # a is present, and unknown; b is absent in both
    carried = multilabel.Answer(np.array([[0.0, 1], [1, 0], [0, 0], [0, 0]]), HALF)
    options = {"task": "t", "subsets": {"test, first": first}, "constant_only": ["test, first"], "num_draws": 10}
    extra = {metrics.CARRY_FORWARD: carried, metrics.PATIENT: multilabel.Answer(np.full((4, 2), 0.3), HALF / 2)}
    rows = multilabel.evaluate({"net": table}, manifest, thumbnails, NAMES, extra=extra, **options)
    assert {row["variant"] for row in rows} == {"net", "majority", "all_positive", "carry_forward", "patient_data"}
    found = {(row["variant"], row["metric"], row["label"]): row for row in rows}
    assert found["net", "auroc", "b"]["value"] is None
    assert found["net", "auroc", "b"]["reason"] == "no b in the test, first split"
    assert found["carry_forward", "f1", "a"]["value"] == 1 and found["carry_forward", "f1", "a"]["n"] == 2
    # 0.3 reaches the tuned threshold, not one half.
    assert found["patient_data", "f1", "a"]["value"] == 1 and found["patient_data", "f1_at_half", "a"]["value"] == 0
    assert all(row["baseline"] is None for row in rows if row["variant"] in extra)


def test_evaluate_does_not_depend_on_the_order_of_rows(small, rng):
    manifest, thumbnails, table = small
    order = rng.permutation(10)
    first = multilabel.evaluate({"net": table}, manifest, thumbnails, NAMES, task="t", num_draws=10)
    again = multilabel.evaluate(
        {"net": table.iloc[order]}, manifest.iloc[order], thumbnails[order], NAMES, task="t", num_draws=10
    )
    np.testing.assert_equal(first, again)


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
        ({"extra": {"forest": multilabel.Answer(np.zeros((4, 2)), HALF)}}, r"`extra` names \['forest'\]"),
        ({"extra": {"svc": multilabel.Answer(np.zeros((10, 2)), HALF)}}, "answers 10 rows as svc; expected the 4 test"),
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
    found = multilabel.headline(rows, task="t", variant="net", metrics=("auroc", "f1_at_half"))
    assert [(row["split"], row["metric"]) for row in found] == [("test", "f1_at_half"), ("test", "auroc")]


def test_headline_of_a_single_label_is_its_own_rows(small):
    manifest, thumbnails, table = small
    rows = multilabel.evaluate({"net": table}, manifest, thumbnails, ["b"], task="t", at_half=("kappa",), num_draws=5)
    assert {row["label"] for row in rows} == {"b"} and len(rows) == 4 * 9
    assert multilabel.headline(rows, task="t", variant="net") == []
    found = multilabel.headline(rows, task="t", variant="net", metrics=("auroc", "kappa_at_half"), label="b")
    # three of four are right, where chance would have two; two of four pairs are
    assert [(row["metric"], row["value"]) for row in found] == [("kappa_at_half", 1 / 2), ("auroc", 1 / 2)]
    assert all(row["baseline"] for row in found)


def test_evaluate_rows_without_images_have_no_neighbour_but_a_given_one(small):
    manifest, _, table = small
    named = {"study_id": [f"s{number}" for number in range(10)]}
    manifest, table = (each.drop(columns="image_path").assign(**named) for each in (manifest, table))
    told = {"nearest_neighbour": multilabel.Answer(np.ones((4, 2)), HALF)}
    for extra in ({}, told):
        rows = multilabel.evaluate({"net": table}, manifest, None, NAMES, task="t", extra=extra, num_draws=5)
        assert {row["variant"] for row in rows} == {"net", "majority", "all_positive", *extra}
        assert _value(rows)["net", "test", "f1", "all"] == pytest.approx(9 / 10)
    with pytest.raises(ValueError, match="in its order, by study_id; predict all rows"):
        multilabel.evaluate({"net": table.iloc[::-1]}, manifest, None, NAMES, task="t")
    tuned_on_test = table.assign(split=["train"] * 3 + ["valid"] * 4 + ["test"] * 3)
    with pytest.raises(ValueError, match=r"1 test rows are valid rows in the table of net.*\['s6'\]"):
        multilabel.evaluate({"net": tuned_on_test}, manifest, None, NAMES, task="t")


def test_evaluate_a_table_of_studies_beside_a_manifest_of_images_is_refused(small):
    manifest, thumbnails, table = small
    with pytest.raises(ValueError, match="by image_path; predict all rows"):
        multilabel.evaluate({"net": table.drop(columns="image_path")}, manifest, thumbnails, NAMES, task="t")


def test_baselines_without_thumbnails_or_training_images(small):
    manifest, thumbnails, _ = small
    y_train = manifest[list(NAMES)].to_numpy()[:3]
    told, whole = multilabel.baselines(y_train, 4), multilabel.baselines(y_train, 4, thumbnails[:3], thumbnails[6:])
    assert list(told) == ["majority", "all_positive"] and list(whole) == [*told, "nearest_neighbour"]
    for name, answer in told.items():
        np.testing.assert_array_equal(answer.probabilities, whole[name].probabilities)
    with pytest.raises(ValueError, match="3 training thumbnails beside 3 rows of labels, and 0 others beside 4 rows"):
        multilabel.baselines(y_train, 4, thumbnails[:3])
    with pytest.raises(ValueError, match="no training image for baselines to learn from"):
        multilabel.baselines(y_train[:0], 4)


def test_baselines_answer_constant_images_as_the_majority(rng):
    pictures = rng.integers(0, 256, (3, 64, 64), dtype=np.uint8)
    y_train = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    asked = np.stack([np.zeros((64, 64), np.uint8), pictures[0]])
    told = multilabel.baselines(y_train, 2, pictures, asked)
    np.testing.assert_array_equal(told["nearest_neighbour"].probabilities, [[0, 1], [1, 0]])


def test_scores_means_are_over_the_labels_asked_for():
    y_true = np.array([[1.0, 1], [0, 0], [1, 0], [0, 1]])
    told = np.array(
        [[0.9, 0.1], [0.2, 0.8], [0.8, 0.7], [0.1, 0.3]]
    )  # the first label ranked rightly, the other wrongly
    options = (np.full(2, 0.5), ["a", "b"], np.ones((1, 4)))
    areas = {
        name: multilabel.scores(y_true, told, *options, averaged=averaged)["auroc", "all"].tolist()
        for name, averaged in {"both": None, "first": ["a"], "second": ("b",)}.items()
    }
    assert areas == {"both": [0.5], "first": [1.0], "second": [0.0]}
