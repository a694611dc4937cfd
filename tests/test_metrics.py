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


def test_ranking_is_both_figures_over_the_rows_whose_truth_is_known(rng):
    truth, scores = (rng.random(60) < 0.4).astype(float), rng.random(60).round(1)
    truth[::5] = np.nan
    known, weights = np.isfinite(truth), rng.integers(0, 3, (4, 60)).astype(float)
    area, precision = metrics.ranking(truth, scores, weights)
    np.testing.assert_array_equal(area, metrics.auroc(truth[known] == 1, scores[known], weights[:, known]))
    expected = metrics.average_precision(truth[known] == 1, scores[known], weights[:, known])
    np.testing.assert_array_equal(precision, expected)
    assert np.isnan(metrics.ranking(np.full(2, np.nan), np.zeros(2), np.ones((1, 2)))).all()


def test_kappa_by_hand_and_at_its_limits():
    # columns: 35 of 50 right, p_o = 0.7, with p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5; all right; all wrong; one answer to
    # both classes; one class only, rightly answered; the same with a false one; nothing to answer
    tp, fn = np.array([[20, 3, 0, 4, 4, 4, 0], [5, 0, 3, 0, 0, 1, 0]])
    fp, tn = np.array([[10, 0, 3, 6, 0, 0, 0], [15, 3, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(metrics.kappa(tp, fn, fp, tn), [0.4, 1, -1, 0, np.nan, 0, np.nan], rtol=1e-15)
    # Neither exchanging truth and answer nor the classes changes it.
    assert metrics.kappa(tp, fp, fn, tn)[0] == metrics.kappa(tn, fp, fn, tp)[0] == metrics.kappa(tp, fn, fp, tn)[0]


def test_kappa_equals_its_definition_and_scikit_learn(rng):
    for prevalence in (0.02, 0.3, 0.5, 0.9):
        truth = np.append(rng.random(300) < prevalence, [True, False])
        answer = np.where(rng.random(302) < 0.7, truth, rng.random(302) < 0.4)
        tp, fn, fp, tn = (
            (truth & answer).sum(),
            (truth & ~answer).sum(),
            (~truth & answer).sum(),
            (~truth & ~answer).sum(),
        )
        found = metrics.kappa(*np.array([tp, fn, fp, tn]))
        right, chance = (truth == answer).mean(), truth.mean() * answer.mean() + (~truth).mean() * (~answer).mean()
        assert found == pytest.approx((right - chance) / (1 - chance), abs=1e-12)
        assert found == pytest.approx(sk.cohen_kappa_score(truth, answer), abs=1e-12)


def test_ratio_over_zero_is_undefined():
    np.testing.assert_array_equal(metrics.ratio(np.array([1, 0, 3]), np.array([2, 0, 0])), [0.5, np.nan, np.nan])


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


def test_log_losses_equal_scikit_learn_under_weights(scored, rng):
    ids, probabilities, _ = scored
    probabilities = np.clip(probabilities, 0.01, 1)
    weights, each = rng.integers(0, 4, (3, 90)).astype(np.float32), rng.choice([1, 2, 4], 90)
    normal = probabilities / probabilities.sum(axis=1, keepdims=True)
    for sample_weights in (None, each):
        found = metrics.log_losses(ids, probabilities, weights, sample_weights)
        for draw, weight in enumerate(weights):
            both = weight if sample_weights is None else weight * each
            expected = sk.log_loss(ids, normal, sample_weight=both, labels=range(3))
            assert found[draw] == pytest.approx(expected, abs=1e-12)


def test_log_losses_by_hand_at_their_limits():
    ids, told = np.array([0, 1, 0]), np.array([[1, 0], [1, 0], [0.2, 0.2]])
    # right: 0 but for the clip; impossible: log 1e15; unnormalised: log 2; and a draw of nothing
    weights = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 2, 1], [0, 0, 0]])
    expected = [0, 15 * np.log(10), np.log(2), (2 * 15 * np.log(10) + np.log(2)) / 3, np.nan]
    np.testing.assert_allclose(metrics.log_losses(ids, told, weights), expected, atol=2e-15, rtol=1e-14)
    halved = metrics.log_losses(ids, told, np.ones((1, 3)), np.array([0, 0, 3]))
    assert halved[0] == pytest.approx(np.log(2), abs=1e-15)


def test_compared_rows_of_a_loss_stand_beside_the_lowest_baseline():
    answers = {"net": 0.5, "prior": 0.7, "majority": 9.0}

    def score(value, weights):
        return {(name, "all"): np.full(len(weights), value) for name in ("accuracy", *metrics.LOWER_IS_BETTER)}

    options = {"task": "t", "split": "test", "reference": None, "num_draws": 3, "seed": 0}
    rows = metrics.compared_rows(answers, np.arange(4), score, None, **options)
    strongest = {row["metric"]: row["baseline"]["variant"] for row in rows if row["variant"] == "net"}
    assert strongest == {"accuracy": "majority"} | dict.fromkeys(metrics.LOWER_IS_BETTER, "prior")


def test_multiclass_rows_take_other_scores(scored):
    ids, probabilities, groups = scored
    answers = {"net": probabilities, "prior": np.full((90, 3), 1 / 3)}

    def losses(class_ids, values, class_names, weights):
        return {("log_loss", "all"): metrics.log_losses(class_ids, values, weights)}

    rows = metrics.multiclass_rows(ids, answers, groups, NAMES, task="t", num_draws=9, scores=losses)
    assert [row["metric"] for row in rows] == ["log_loss"] * 2
    assert rows[1]["value"] == pytest.approx(np.log(3), abs=1e-12) and rows[0]["baseline"]["variant"] == "prior"


def test_threshold_of_sensitivity_by_hand():
    positive = np.array([True, True, True, True, False, False])
    scores = np.array([0.9, 0.7, 0.5, 0.2, 0.6, 0.1])
    # For 3 of 4 the score 0.5 is to be answered yes, and 0.2, a positive's, is the next: the middle lies between.
    for sensitivity, expected in [(0.75, 0.35), (0.7, 0.35), (0.76, 0.15), (1, 0.15), (0.5, 0.65), (0.25, 0.8)]:
        found = metrics.threshold_of_sensitivity(positive, scores, sensitivity)
        assert found == pytest.approx(expected, abs=1e-15), sensitivity
    # Below the lowest of all scores lies 0.
    assert metrics.threshold_of_sensitivity(positive[:4], scores[:4], 1) == pytest.approx(0.1, abs=1e-15)
    assert metrics.threshold_of_sensitivity(np.array([True]), np.array([0.0]), 1) == 0


def test_threshold_of_sensitivity_takes_equal_scores_together():
    positive, scores = np.array([True, True, True, False, False]), np.array([0.8, 0.8, 0.8, 0.8, 0.4])
    for sensitivity in (0.01, 0.5, 1):
        assert metrics.threshold_of_sensitivity(positive, scores, sensitivity) == pytest.approx(0.6, abs=1e-15)
    # Where no number lies between two scores, the higher is the threshold: the lower is answered no.
    near = np.array([0.5, np.nextafter(0.5, 1)])
    assert metrics.threshold_of_sensitivity(np.array([False, True]), near, 1) == near[1]


@pytest.mark.parametrize("decimals", [1, 8])
def test_threshold_of_sensitivity_is_the_highest_that_finds_the_share(rng, decimals):
    for share in (0.01, 0.07, 0.3, 0.5, 0.9, 0.95, 1):
        positive, scores = rng.random(100) < 0.4, rng.random(100).round(decimals)
        found = metrics.threshold_of_sensitivity(positive, scores, share)
        wanted = share - 1e-9  # 0.07 · 100 is a little above 7
        assert 0 <= found <= 1 and (scores[positive] >= found).mean() >= wanted
        # With the next higher score for a threshold, fewer than the share are found.
        higher = scores[scores >= found].min()
        assert (scores[positive] > higher).mean() < wanted
        # No positive without its score has a say but as the next lower one.
        assert metrics.threshold_of_sensitivity(positive, np.where(scores < found, 0, scores), share) <= found
    assert metrics.threshold_of_sensitivity(np.ones(100, bool), np.arange(100) / 100, 0.07) == pytest.approx(0.925)


def test_threshold_of_sensitivity_of_a_minute_share_finds_the_surest_alone():
    scores = np.array([0.2, 0.4, 0.8])
    assert metrics.threshold_of_sensitivity(np.ones(3, bool), scores, 1e-10) == pytest.approx(0.6, abs=1e-15)


@pytest.mark.parametrize("sensitivity", [0, -0.1, 1.01, float("nan")])
def test_threshold_of_sensitivity_out_of_range_is_refused(sensitivity):
    with pytest.raises(ValueError, match="expected a share above 0, at most 1"):
        metrics.threshold_of_sensitivity(np.array([True]), np.array([0.5]), sensitivity)


def test_threshold_of_sensitivity_without_a_positive_is_refused():
    for positive in (np.zeros(3, bool), np.zeros(0, bool)):
        with pytest.raises(ValueError, match="no row is positive"):
            metrics.threshold_of_sensitivity(positive, np.full(len(positive), 0.5), 0.9)


def test_multiclass_answered_decides_instead_of_the_largest_probability_but_for_auroc(scored, rng):
    ids, probabilities, _ = scored
    weights = rng.integers(0, 4, (3, 90)).astype(np.float32)
    plain = metrics.multiclass(ids, probabilities, NAMES, weights)
    answered = rng.integers(0, 3, 90)
    found = metrics.multiclass(ids, probabilities, NAMES, weights, answered=answered)
    of_answers = metrics.multiclass(ids, np.eye(3)[answered], NAMES, weights)
    for metric, label in plain:
        expected = plain if "auroc" in metric else of_answers
        np.testing.assert_array_equal(found[metric, label], expected[metric, label])
    assert (found["accuracy", "all"] != plain["accuracy", "all"]).all()
    same = metrics.multiclass(ids, probabilities, NAMES, weights, answered=probabilities.argmax(axis=1))
    for key, values in plain.items():
        np.testing.assert_array_equal(same[key], values)


def test_rows_of_equal_groups_and_draws_may_be_paired_and_others_not(scored):
    ids, probabilities, groups = scored
    given = {"net": probabilities, "majority": metrics.majority_probabilities(ids, 90, 3)}

    def row(**options):
        order = options.pop("order", np.arange(90))
        mine = {name: told[order] for name, told in given.items()}
        rows = metrics.multiclass_rows(
            ids[order], mine, options.pop("groups", groups)[order], NAMES, task="t", **options
        )
        return next(each for each in rows if each["variant"] == "net" and each["metric"] == "accuracy")

    first, turned = row(), row(order=np.arange(90)[::-1])
    assert first["draws"].shape == (1000,) and first["draws"].dtype == np.float32
    assert first["ci95"] == pytest.approx(metrics.interval(first["draws"]), abs=1e-6)
    assert turned["paired_by"] == first["paired_by"]
    np.testing.assert_array_equal(turned["draws"], first["draws"])
    others = [row(seed=1), row(num_draws=999), row(groups=np.arange(90))]
    assert len({first["paired_by"], *(each["paired_by"] for each in others)}) == 4


def test_multiclass_rows_answered_changes_its_own_variant_alone(scored):
    ids, probabilities, groups = scored
    majority = metrics.majority_probabilities(ids, 90, 3)
    given = {"net": probabilities, "twin": probabilities, "majority": majority}
    options = {"task": "t", "num_draws": 60, "reference": "twin"}
    plain = metrics.multiclass_rows(ids, given, groups, NAMES, **options)
    found = metrics.multiclass_rows(ids, given, groups, NAMES, **options, answered={"net": ids})
    pairs = [({**new, "draws": None}, {**old, "draws": None}) for new, old in zip(found, plain, strict=True)]
    changed = {(new["variant"], new["metric"]) for new, old in pairs if new != old}
    assert changed == {("net", name) for name in {row["metric"] for row in plain} if "auroc" not in name}
    accuracy = {row["variant"]: row for row in found if row["metric"] == "accuracy"}
    assert accuracy["net"]["value"] == 1 and accuracy["net"]["ci95"] == [1, 1]  # in every draw
    twin = (probabilities.argmax(axis=1) == ids).mean()
    assert accuracy["net"]["reference"]["difference"] == pytest.approx(1 - twin, abs=1e-12)
    low, high = accuracy["twin"]["ci95"]
    np.testing.assert_allclose(accuracy["net"]["reference"]["difference_ci95"], [1 - high, 1 - low], atol=1e-12)
