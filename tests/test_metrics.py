import numpy as np
import pytest
from sklearn import metrics as sk

from kerasmed import metrics

NAMES = ("a", "b", "c")


@pytest.fixture
def scored(rng):
    """90 images in 30 groups, three classes, probabilities with ties."""
    ids = rng.integers(0, 3, 90)
    probabilities = rng.dirichlet(np.ones(3), 90)
    probabilities[np.arange(90), ids] += 0.4
    probabilities = (probabilities / probabilities.sum(axis=1, keepdims=True)).round(1)
    return ids, probabilities, np.repeat(np.arange(30), 3)


def test_multiclass_equals_scikit_learn_under_weights(scored, rng):
    ids, probabilities, _ = scored
    weights = rng.integers(0, 4, (3, 90)).astype(np.float32)
    got = metrics.multiclass(ids, probabilities, NAMES, weights)
    predicted = probabilities.argmax(axis=1)
    for draw, weight in enumerate(weights):
        expected = {
            ("accuracy", "all"): sk.accuracy_score(ids, predicted, sample_weight=weight),
            ("balanced_accuracy", "all"): sk.balanced_accuracy_score(ids, predicted, sample_weight=weight),
            ("macro_f1", "all"): sk.f1_score(ids, predicted, average="macro", sample_weight=weight),
        }
        areas = []
        for position, name in enumerate(NAMES):
            positive = ids == position
            expected["sensitivity", name] = sk.recall_score(positive, predicted == position, sample_weight=weight)
            expected["specificity", name] = sk.recall_score(~positive, predicted != position, sample_weight=weight)
            expected["precision", name] = sk.precision_score(positive, predicted == position, sample_weight=weight)
            expected["auroc", name] = sk.roc_auc_score(positive, probabilities[:, position], sample_weight=weight)
            areas.append(expected["auroc", name])
        expected["macro_auroc", "all"] = np.mean(areas)
        assert set(expected) == set(got)
        for key, value in expected.items():
            # float32 counts are exact; the rest is float64
            assert got[key][draw] == pytest.approx(value, abs=1e-9), key


def test_auroc_by_hand_and_of_one_class():
    positive, scores = np.array([True, False, True, False]), np.array([0.9, 0.5, 0.5, 0.1])
    # pairs: 0.9 beats both, 0.5 ties once and beats once: 3.5 of 4
    assert metrics.auroc(positive, scores, np.ones((1, 4)))[0] == 3.5 / 4
    assert np.isnan(metrics.auroc(np.array([True, True]), np.array([0.1, 0.2]), np.ones((1, 2)))[0])


def test_bootstrap_weights_draw_whole_groups():
    weights = metrics.bootstrap_weights(["x", "x", "y", "z"], num_draws=500, seed=1)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
    np.testing.assert_array_equal(weights, metrics.bootstrap_weights(["x", "x", "y", "z"], num_draws=500, seed=1))


def test_interval_covers_the_true_accuracy_in_about_95_of_100_samples(rng):
    hits = 0
    for sample in range(200):
        right = np.repeat(rng.random(100) < 0.7, 3)  # groups of three images, right or wrong together
        ids = np.zeros(300, int)
        draws = metrics.bootstrap_weights(np.repeat(np.arange(100), 3), num_draws=300, seed=sample)
        table = metrics.confusion(ids, np.where(right, 0, 1), 2, draws)
        low, high = metrics.interval(table[:, 0, 0] / table.sum(axis=(1, 2)))
        hits += low <= 0.7 <= high
    # 200 trials at 0.95: standard error 0.015; the percentile interval is known to be slightly short
    assert 0.88 <= hits / 200 <= 0.99


def test_multiclass_rows_stand_beside_the_stronger_baseline(scored):
    ids, probabilities, groups = scored
    neighbour = np.eye(3)[np.roll(ids, 1)]
    rows = metrics.multiclass_rows(
        ids,
        {"net": probabilities, "majority": metrics.majority_probabilities(ids, 90, 3), "nearest_neighbour": neighbour},
        groups,
        NAMES,
        task="t",
        num_draws=100,
    )
    row = next(row for row in rows if row["variant"] == "net" and row["metric"] == "accuracy")
    accuracies = {"majority": np.bincount(ids).max() / 90, "nearest_neighbour": (np.roll(ids, 1) == ids).mean()}
    strongest = max(accuracies, key=accuracies.get)
    assert row["baseline"]["variant"] == strongest
    assert row["baseline"]["value"] == pytest.approx(accuracies[strongest])
    assert row["baseline"]["difference"] == pytest.approx(row["value"] - accuracies[strongest])
    assert row["ci95"][0] < row["value"] < row["ci95"][1]
    assert (row["n"], row["n_groups"]) == (90, 30)
    assert all(row["baseline"] is None for row in rows if row["variant"] in metrics.BASELINES)


def test_multiclass_rows_perfect_and_absent_class():
    ids = np.array([0, 1] * 10)
    rows = metrics.multiclass_rows(
        ids,
        {"net": np.eye(3)[ids], "majority": metrics.majority_probabilities(ids, 20, 3)},
        np.arange(20),
        NAMES,
        task="t",
    )
    value = {(row["variant"], row["metric"], row["label"]): row for row in rows}
    assert value["net", "balanced_accuracy", "all"]["value"] == 1 and value["net", "balanced_accuracy", "all"][
        "ci95"
    ] == [1, 1]
    assert (
        value["net", "sensitivity", "c"]["value"] is None
        and value["net", "sensitivity", "c"]["reason"] == "no c in the test split"
    )
    assert value["majority", "precision", "b"]["reason"] == "never predicted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"majority": None}, "no baseline"),
        ({"net": np.full((90, 2), 0.5)}, r"shape \(90, 2\)"),
        ({"net": np.full((90, 3), np.nan)}, "all finite"),
    ],
)
def test_multiclass_rows_unfit_probabilities_are_refused(scored, change, message):
    ids, probabilities, groups = scored
    given = {"net": probabilities, "majority": metrics.majority_probabilities(ids, 90, 3)} | change
    with pytest.raises(ValueError, match=message):
        metrics.multiclass_rows(
            ids, {name: values for name, values in given.items() if values is not None}, groups, NAMES, task="t"
        )


def test_multiclass_rows_empty_split_is_refused():
    with pytest.raises(ValueError, match="the test split of t has no image"):
        metrics.multiclass_rows(np.zeros(0, int), {"majority": np.zeros((0, 3))}, [], NAMES, task="t")


@pytest.fixture
def labelled(rng):
    """120 images in 40 groups, three independent labels of which a tenth is unknown, probabilities with ties."""
    y_true = (rng.random((120, 3)) < (0.1, 0.4, 0.7)).astype(float)
    probabilities = np.clip(rng.normal(0.3 + 0.3 * y_true, 0.2), 0, 1).round(1)
    y_true[rng.random((120, 3)) < 0.1] = np.nan
    return y_true, probabilities, np.repeat(np.arange(40), 3)


def test_average_precision_by_hand_and_of_one_class():
    positive, scores = np.array([True, False, True, False]), np.array([0.9, 0.5, 0.5, 0.1])
    # recall 1/2 at precision 1, then recall 1 at precision 2/3, the two that tie together
    assert metrics.average_precision(positive, scores, np.ones((1, 4)))[0] == pytest.approx(5 / 6, abs=1e-15)
    assert metrics.average_precision(positive, positive * 0.9, np.ones((1, 4)))[0] == 1
    # the first draw has no positive
    drawn = metrics.average_precision(positive, scores, np.array([[0, 1, 0, 1], [1, 0, 0, 1]]))
    assert np.isnan(drawn[0]) and drawn[1] == 1
    assert np.isnan(metrics.average_precision(~positive & positive, scores, np.ones((1, 4)))[0])
    assert metrics.average_precision(positive | True, scores, np.ones((1, 4)))[0] == 1


def test_average_precision_and_auroc_equal_scikit_learn_in_every_chunk(rng, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", 500)  # of 200 images: two draws at once, and one left over
    for prevalence, decimals in [(0.02, 2), (0.3, 1), (0.3, 6), (0.95, 1)]:
        positive, scores = rng.random(200) < prevalence, rng.random(200).round(decimals)
        positive[0] = True
        weights = rng.integers(0, 4, (5, 200)) * rng.random((5, 1))
        weights[:, 0] = 1
        precision, area = (each(positive, scores, weights) for each in (metrics.average_precision, metrics.auroc))
        for draw, weight in enumerate(weights):
            expected = sk.average_precision_score(positive, scores, sample_weight=weight)
            assert precision[draw] == pytest.approx(expected, abs=1e-12)
            assert area[draw] == pytest.approx(sk.roc_auc_score(positive, scores, sample_weight=weight), abs=1e-12)


def test_multilabel_equals_scikit_learn_under_weights_over_known_rows(labelled, rng):
    y_true, probabilities, _ = labelled
    thresholds = np.array([0.4, 0.5, 0.6])
    weights = rng.integers(0, 4, (3, 120)).astype(np.float32)
    got = metrics.multilabel(y_true, probabilities, thresholds, NAMES, weights)
    for draw, weight in enumerate(weights):
        expected = {}
        for position, name in enumerate(NAMES):
            known = np.isfinite(y_true[:, position])
            truth, scores = y_true[known, position].astype(int), probabilities[known, position]
            answer, each = (scores >= thresholds[position]).astype(int), {"sample_weight": weight[known]}
            expected["f1", name] = sk.f1_score(truth, answer, **each)
            expected["average_precision", name] = sk.average_precision_score(truth, scores, **each)
            expected["auroc", name] = sk.roc_auc_score(truth, scores, **each)
            expected["accuracy", name] = sk.accuracy_score(truth, answer, **each)
            expected["sensitivity", name] = sk.recall_score(truth, answer, **each)
            expected["specificity", name] = sk.recall_score(1 - truth, 1 - answer, **each)
            expected["precision", name] = sk.precision_score(truth, answer, **each)
        for metric in dict.fromkeys(metric for metric, _ in expected):
            expected[metric, "all"] = np.mean([expected[metric, name] for name in NAMES])
        assert set(expected) == set(got)
        for key, value in expected.items():
            # float32 counts are exact; the rest is float64
            assert got[key][draw] == pytest.approx(value, abs=1e-9), key


def test_multilabel_by_hand_with_undefined_labels():
    nan = np.nan
    # a: tp, fn, fp, and one unknown; b: never present, never answered; c: always present; d: never known
    y_true = np.array([[1, 0, 1, nan], [1, 0, 1, nan], [0, 0, 1, nan], [nan, 0, 1, nan]])
    probabilities = np.array([[0.9, 0.1, 0.5, 0], [0.2, 0.1, 0.4, 0], [0.8, 0.1, 0.9, 0], [0.9, 0.1, 0.9, 0]])
    got = metrics.multilabel(y_true, probabilities, np.full(4, 0.5), "abcd", np.ones((1, 4)))
    got = {key: float(value[0]) for key, value in got.items()}
    expected = {
        "f1": (1 / 2, nan, 6 / 7, nan, (1 / 2 + 6 / 7) / 2),
        "average_precision": (5 / 6, nan, 1, nan, 11 / 12),
        "auroc": (1 / 2, nan, nan, nan, 1 / 2),
        "accuracy": (1 / 3, 1, 3 / 4, nan, 25 / 36),
        "sensitivity": (1 / 2, nan, 3 / 4, nan, 5 / 8),
        "specificity": (0, 1, nan, nan, 1 / 2),
        "precision": (1 / 2, nan, 1, nan, 3 / 4),
    }
    for metric, values in expected.items():
        for label, value in zip([*"abcd", "all"], values):
            assert got[metric, label] == pytest.approx(value, abs=1e-15, nan_ok=True), (metric, label)
    # An answer to a label that is never present is wrong, not undefined.
    answered = metrics.multilabel(y_true[:, 1:2], probabilities[:, 1:2], np.zeros(1), "b", np.ones((1, 4)))
    assert answered["f1", "b"][0] == 0


@pytest.mark.parametrize("positives", [1, 5, 10])
def test_multilabel_of_all_positive_is_the_best_constant_by_f1(positives):
    y_true, once, half = (np.arange(10) < positives)[:, None].astype(float), np.ones((1, 10)), np.array([0.5])
    prevalence = positives / 10
    present = metrics.multilabel(y_true, np.ones((10, 1)), half, "a", once)
    absent = metrics.multilabel(y_true, np.zeros((10, 1)), half, "a", once)
    assert present["f1", "a"][0] == pytest.approx(2 * prevalence / (1 + prevalence), abs=1e-15)
    assert present["average_precision", "a"][0] == absent["average_precision", "a"][0] == prevalence
    assert absent["f1", "a"][0] == 0


def test_tune_thresholds_take_the_middle_of_the_gap():
    nan = np.nan
    y_true = np.array([[1, 1, 0, nan, 1], [1, 1, 0, nan, 1], [0, 0, 0, nan, nan], [0, 1, 0, nan, nan]])
    probabilities = np.array([[0.9, 0.9], [0.7, 0.6], [0.3, 0.5], [0.1, 0.4]])
    probabilities = np.column_stack([probabilities, np.full((4, 2), 0.2), [0.8, 0.6, 0.99, 0.01]])
    # a: 0.7 | 0.3; b: all present, F1 = 6/7 against 4/5, half of the way from 0.4 to 0; c, d: no positive; e: 0.6 | 0
    np.testing.assert_allclose(metrics.tune_thresholds(y_true, probabilities), [0.5, 0.2, 0.5, 0.5, 0.3], atol=1e-15)


def test_tune_thresholds_of_equal_f1_take_the_widest_gap_then_the_highest():
    # F1 = 2/3 after one answer (1 of 2 found, none wrong) and after four (2 found, 2 wrong)
    y_true = np.array([1, 0, 0, 1, 0, 0, 0])[:, None]
    wide_low = np.array([0.9, 0.85, 0.8, 0.75, 0.25, 0.2, 0.1])[:, None]
    assert metrics.tune_thresholds(y_true, wide_low)[0] == 0.5
    even = np.array([0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])[:, None]
    assert metrics.tune_thresholds(y_true, even)[0] == (0.875 + 0.75) / 2


def test_tune_thresholds_reach_the_best_f1_of_any_threshold(labelled, rng):
    y_true, probabilities, _ = labelled
    tuned = metrics.tune_thresholds(y_true, probabilities)
    for position in range(3):
        known = np.isfinite(y_true[:, position])
        truth, scores = y_true[known, position], probabilities[known, position]
        f1 = [sk.f1_score(truth, scores >= threshold) for threshold in (*np.arange(0, 1.05, 0.05), tuned[position])]
        assert f1[-1] == max(f1)
    order = rng.permutation(120)
    np.testing.assert_array_equal(metrics.tune_thresholds(y_true[order], probabilities[order]), tuned)


def test_tune_thresholds_between_neighbouring_floats_still_part_them():
    low = 0.5
    high = np.nextafter(low, 1)
    tuned = metrics.tune_thresholds(np.array([[1], [0]]), np.array([[high], [low]]))
    assert low < tuned[0] <= high
    assert metrics.tune_thresholds(np.array([[1], [1]]), np.zeros((2, 1)))[0] == 0
    assert metrics.tune_thresholds(np.zeros((0, 2)), np.zeros((0, 2))).tolist() == [0.5, 0.5]


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
        metrics.tune_thresholds(y_true, probabilities)


def _constant(y_true, value):
    return metrics.Answer(np.full(y_true.shape, float(value)), np.full(y_true.shape[1], 0.5))


def test_multilabel_rows_stand_beside_the_strongest_baseline(labelled):
    y_true, probabilities, groups = labelled
    answers = {
        "net": metrics.Answer(probabilities, np.full(3, 0.5)),
        "twin": metrics.Answer(probabilities, np.full(3, 0.5)),
        "majority": _constant(y_true, 0),
        "all_positive": _constant(y_true, 1),
        "svc": metrics.Answer(1 - probabilities, np.full(3, 0.5)),
    }
    rows = metrics.multilabel_rows(y_true, answers, groups, NAMES, task="t", reference="twin", num_draws=100)
    value = {(row["variant"], row["metric"], row["label"]): row for row in rows}
    assert len(value) == len(rows) == 5 * 7 * 4
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


def test_multilabel_rows_do_not_depend_on_the_order_of_images(labelled, rng):
    y_true, probabilities, groups = labelled

    def rows(order):
        answers = {
            "net": metrics.Answer(probabilities[order], np.full(3, 0.5)),
            "all_positive": _constant(y_true, 1),
        }
        return metrics.multilabel_rows(y_true[order], answers, groups[order], NAMES, task="t", num_draws=50)

    for first, second in zip(rows(np.arange(120)), rows(rng.permutation(120)), strict=True):
        assert first["value"] == second["value"] and first["ci95"] == second["ci95"]
        assert first["baseline"] == second["baseline"]


def test_multilabel_rows_say_why_a_value_is_undefined():
    y_true = np.array([[0, 1, np.nan]] * 4)
    answers = {"net": _constant(y_true, 0.2), "all_positive": _constant(y_true, 1)}
    rows = metrics.multilabel_rows(y_true, answers, np.arange(4), NAMES, task="t", split="night", num_draws=5)
    reason = {(row["metric"], row["label"]): row.get("reason") for row in rows if row["variant"] == "net"}
    assert reason["f1", "a"] == reason["auroc", "a"] == reason["sensitivity", "a"] == "no a in the night split"
    assert reason["specificity", "b"] == reason["auroc", "b"] == "no image without b in the night split"
    assert reason["precision", "b"] == "never predicted"
    assert reason["f1", "b"] is None
    assert reason["accuracy", "c"] == reason["precision", "c"] == "c is unknown in the night split"
    assert reason["auroc", "all"] == "undefined of every label"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"all_positive": None}, r"no baseline among the variants \['net'\]"),
        ({"net": metrics.Answer(np.zeros((120, 2)), np.zeros(2))}, r"probabilities of net have shape \(120, 2\)"),
        ({"net": metrics.Answer(np.full((120, 3), np.nan), np.zeros(3))}, "all finite"),
        ({"net": metrics.Answer(np.zeros((120, 3)), np.zeros(2))}, r"thresholds of net have shape \(2,\)"),
    ],
)
def test_multilabel_rows_unfit_answers_are_refused(labelled, change, message):
    y_true, probabilities, groups = labelled
    given = {"net": metrics.Answer(probabilities, np.full(3, 0.5)), "all_positive": _constant(y_true, 1)} | change
    given = {name: answer for name, answer in given.items() if answer is not None}
    with pytest.raises(ValueError, match=message):
        metrics.multilabel_rows(y_true, given, groups, NAMES, task="t")


def test_multilabel_rows_empty_split_or_strange_label_is_refused(labelled):
    empty = np.zeros((0, 3))
    with pytest.raises(ValueError, match="the test split of t has no image"):
        metrics.multilabel_rows(empty, {"all_positive": _constant(empty, 1)}, [], NAMES, task="t")
    uncertain = np.full((2, 3), -1.0)
    with pytest.raises(ValueError, match="6 labels are not 1, 0 or NaN"):
        metrics.multilabel_rows(uncertain, {"all_positive": _constant(uncertain, 1)}, [0, 1], NAMES, task="t")


def test_tabulate_shows_value_interval_and_reason(scored):
    ids, probabilities, groups = scored
    rows = metrics.multiclass_rows(
        ids[:3] * 0,
        {"net": probabilities[:3], "majority": metrics.majority_probabilities(ids[:3] * 0, 3, 3)},
        groups[:3],
        NAMES,
        task="t",
        num_draws=10,
    )
    table = metrics.tabulate(rows).set_index(["variant", "metric", "label"])
    assert table.loc[("majority", "accuracy", "all"), "shown"] == "1.000 [1.000, 1.000]"
    assert table.loc[("net", "auroc", "b"), "shown"] == "no b in the test split"
    assert table.loc[("net", "accuracy", "all"), "baseline"] == "majority 1.000"


def test_multiclass_rows_reference_is_compared_on_the_same_draws(scored):
    ids, probabilities, groups = scored
    answers = {
        "net": probabilities,
        "twin": probabilities,
        "reversed": probabilities[::-1],
        "majority": metrics.majority_probabilities(ids, 90, 3),
    }
    rows = metrics.multiclass_rows(ids, answers, groups, NAMES, task="t", reference="net", num_draws=100)
    accuracy = {row["variant"]: row for row in rows if row["metric"] == "accuracy"}
    assert "reference" not in accuracy["net"] and "reference" not in accuracy["majority"]
    assert accuracy["twin"]["reference"]["difference"] == 0 and accuracy["twin"]["reference"]["difference_ci95"] == [
        0,
        0,
    ]
    other = accuracy["reversed"]["reference"]
    assert other["difference"] == pytest.approx(accuracy["reversed"]["value"] - accuracy["net"]["value"])
    assert other["difference_ci95"][0] < other["difference"] < other["difference_ci95"][1]
    shown = metrics.tabulate(rows).set_index(["metric", "variant"])["to_reference"]
    assert shown["accuracy", "twin"] == "+0.000 [+0.000, +0.000]" and shown["accuracy", "net"] == ""
    with pytest.raises(ValueError, match="`reference` is 'nobody'"):
        metrics.multiclass_rows(ids, answers, groups, NAMES, task="t", reference="nobody")


def test_multilabel_rows_each_variant_is_compared_with_its_own_reference(rng):
    y_true = (rng.random((30, 1)) < 0.5).astype(float)
    told = {name: metrics.Answer(rng.random((30, 1)), np.array([0.5])) for name in ("a", "b", "b without", "majority")}
    options = {"task": "t", "num_draws": 20}
    rows = metrics.multilabel_rows(y_true, told, range(30), ["x"], reference={"b without": "b"}, **options)
    compared = [row for row in rows if "reference" in row]
    assert {row["variant"] for row in compared} == {"b without"}
    assert {row["reference"]["variant"] for row in compared} == {"b"}
    with pytest.raises(ValueError, match="`reference` is .'c': 'b'."):
        metrics.multilabel_rows(y_true, told, range(30), ["x"], reference={"c": "b"}, **options)
