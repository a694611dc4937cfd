import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from kerasmed import grades, metrics

NAMES = ("Normal/Mild", "Moderate", "Severe")
TOLD = [f"p_{name}" for name in NAMES]
CANAL, FORAMINAL, SUBARTICULAR = CONDITIONS = ("canal", "foraminal", "subarticular")
FACTORS = ("embedding", "classifier")


def _table(rows):
    """Answers of rows (study, condition, side, level, grade, p, p, p)."""
    return pd.DataFrame(rows, columns=["study_id", "condition", "side", "level", "grade", *TOLD])


@pytest.fixture
def by_hand():
    return _table(
        [
            ("s1", CANAL, "", "l1", 0, 0.5, 0.25, 0.25),
            ("s1", CANAL, "", "l2", 2, 0.5, 0, 0.5),
            ("s1", CANAL, "", "l3", np.nan, 0, 0, 1),  # blank: neither its row nor its p_Severe counts
            ("s2", CANAL, "", "l1", 1, 0.5, 0.25, 0.25),
            ("s1", FORAMINAL, "left", "l1", 0, 1, 0, 0),
            ("s2", SUBARTICULAR, "left", "l1", 1, 0, 0.5, 0.5),
            ("s3", SUBARTICULAR, "right", "l1", 0, 0.25, 0.75, 0),
            ("s3", CANAL, "", "l1", np.nan, 1, 0, 0),
        ]
    )


@pytest.fixture
def drawn(rng):
    """Answers to 40 studies with five targets of each condition, some blank, better than chance."""
    rows = []
    for study in range(40):
        for condition in CONDITIONS:
            for level in "12345":
                grade = rng.choice([0, 1, 2, np.nan], p=[0.6, 0.2, 0.15, 0.05])
                logits = rng.normal(0, 1, 3)
                if np.isfinite(grade):
                    logits[int(grade)] += 1
                rows.append((f"s{study}", condition, "", f"l{level}", grade, *np.exp(logits) / np.exp(logits).sum()))
    return _table(rows)


def _competition(table, **options):
    return grades.competition(table, NAMES, conditions=CONDITIONS, spinal=CANAL, **options)


def test_competition_by_hand(by_hand):
    two = np.log(2)
    # Canal: weights 1, 4 and 2 on log 2, log 2 and log 4. Any severe: s1 yes, at 0.5 and weight 4, s2 no, at 0.75 and
    # weight 2. Subarticular: weights 2 and 1 on log 2 and log 4.
    expected = {
        CANAL: (1 * two + 4 * two + 2 * 2 * two) / 7,
        FORAMINAL: 0,
        SUBARTICULAR: (2 * two + 2 * two) / 3,
        "any_severe_spinal": (4 * two + 2 * np.log(4 / 3)) / 6,
    }
    found = _competition(by_hand)
    assert list(found) == [*expected, "all"]
    for label, value in expected.items():
        assert found[label] == pytest.approx(value, abs=1e-12), label
    assert found["all"] == pytest.approx(sum(expected.values()) / 4, abs=1e-12)


@pytest.mark.parametrize(
    ("counts", "loss"), [((8664, 736, 470), 0.783), ((15357, 3564, 779), 0.919), ((13733, 3660, 1840), 1.051)]
)
def test_weighted_log_loss_of_the_weighted_shares_is_that_of_the_real_counts(counts, loss):
    known = np.append(np.repeat([0.0, 1, 2], counts), np.nan)
    told = grades.weighted_prior(known, len(known))
    assert round(grades.weighted_log_loss(known, told), 3) == loss
    assert grades.weighted_log_loss(known, grades.prior(known, len(known))) > loss


def test_competition_equals_scikit_learn(drawn):
    found, known = _competition(drawn), drawn[drawn["grade"].notna()]
    weight = known["grade"].map({0: 1, 1: 2, 2: 4})
    for condition in CONDITIONS:
        rows = known["condition"] == condition
        expected = sk.log_loss(known["grade"][rows], known.loc[rows, TOLD].to_numpy(), sample_weight=weight[rows])
        assert found[condition] == pytest.approx(expected, abs=1e-12)
    canal = known[known["condition"] == CANAL].assign(weight=weight).groupby("study_id").max(numeric_only=True)
    told = np.stack([1 - canal["p_Severe"], canal["p_Severe"]], axis=1)
    expected = sk.log_loss(canal["grade"] == 2, told, sample_weight=canal["weight"])
    assert found["any_severe_spinal"] == pytest.approx(expected, abs=1e-12)


def test_competition_under_weights_is_that_of_the_repeated_studies(drawn):
    times = {f"s{study}": study % 3 for study in range(40)}
    weights = drawn["study_id"].map(times).to_numpy(float)
    copies = [
        drawn[drawn["study_id"].map(times) > copy].assign(
            study_id=lambda rows, copy=copy: rows["study_id"] + f"/{copy}"
        )
        for copy in range(2)
    ]
    found = _competition(drawn, weights=np.stack([np.ones(len(drawn)), weights]))
    for label, value in _competition(pd.concat(copies)).items():
        assert found[label].shape == (2,) and found[label][1] == pytest.approx(value, abs=1e-12)
    assert found["all"][0] == pytest.approx(_competition(drawn)["all"], abs=1e-12)


def test_competition_of_right_answers_is_0_and_of_a_draw_without_a_condition_undefined(drawn):
    known = drawn["grade"].fillna(0).to_numpy(int)
    right = drawn.copy()
    right[TOLD] = np.eye(3)[known]
    # the clip leaves 2e-15 of each row
    assert all(0 <= value < 1e-14 for value in _competition(right).values())
    weights = (drawn["condition"] != FORAMINAL).to_numpy(float)[None]
    found = _competition(drawn, weights=weights)
    assert np.isnan(found[FORAMINAL]) and np.isnan(found["all"]) and np.isfinite(found[CANAL])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="p_Severe"), r"lacks the columns \['p_Severe'\]"),
        (lambda table: table[table["condition"] != FORAMINAL], r"the table has \['canal', 'subarticular'\]"),
        (lambda table: table.assign(condition=table["condition"].replace(CANAL, "else")), "Expected rows with a grade"),
        (lambda table: pd.concat([table, table.iloc[[2]]]), "1 of 9 rows repeat a study_id.*'l3'"),
        (lambda table: table.assign(grade=3), r"8 grades are not 0, 1, 2 or NaN.*First: \[3.0, 3.0"),
        (lambda table: table.assign(p_Moderate=2), "8 of 8 rows of the table are no probabilities.*no logits"),
    ],
)
def test_competition_refuses_tables_that_do_not_fit(by_hand, change, message):
    with pytest.raises(ValueError, match=message):
        _competition(change(by_hand))


def test_competition_refuses_a_spinal_condition_that_is_none(by_hand):
    with pytest.raises(ValueError, match="`spinal` is 'neck'"):
        grades.competition(by_hand, NAMES, conditions=CONDITIONS, spinal="neck")


def test_weighted_log_loss_leaves_blanks_out_and_refuses_logits():
    told = np.array([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0, 0, 1]])
    # weights 2 and 4 on log 4 and log 4: any weights
    assert grades.weighted_log_loss([1, 2, np.nan], told[[0, 1, 2]]) == pytest.approx(np.log(4), abs=1e-12)
    assert grades.weighted_log_loss([2, 0, np.nan], told, (1, 1, 1)) == pytest.approx(np.log(2), abs=1e-12)
    assert np.isnan(grades.weighted_log_loss([np.nan] * 3, told))
    with pytest.raises(ValueError, match="1 of 3 rows of the answer are no probabilities"):
        grades.weighted_log_loss([0, 1, 2], np.vstack([told[:2], [np.nan, 0, 1]]))
    with pytest.raises(ValueError, match=r"has shape \(3, 2\); expected \(3, 3\)"):
        grades.weighted_log_loss([0, 1, 2], told[:, :2])


def test_weighted_prior_is_the_best_constant_answer(rng):
    known = rng.choice([0.0, 1, 2, np.nan], 200, p=[0.7, 0.15, 0.1, 0.05])
    best = grades.weighted_log_loss(known, grades.weighted_prior(known, 200))
    for _ in range(50):
        assert grades.weighted_log_loss(known, np.tile(rng.dirichlet([3, 1, 1]), (200, 1))) > best


def test_prior_by_hand_and_without_a_grade():
    assert grades.prior([0, 0, 1, 2, np.nan], 2).tolist() == [[0.5, 0.25, 0.25]] * 2
    with pytest.raises(ValueError, match="none of the 2 training rows has a grade"):
        grades.prior([np.nan, np.nan], 1)


def test_level_share_by_hand():
    train = pd.DataFrame(
        [("left", "l1", 0), ("left", "l1", 1), ("left", "l1", 1), ("right", "l1", 2), ("left", "l2", np.nan)],
        columns=["side", "level", "grade"],
    )
    rows = pd.DataFrame([("left", "l1"), ("left", "l2"), ("right", "l1")], columns=["side", "level"])
    # the prior (1, 2, 1) / 4 counts as one row more; nothing is known of left l2
    expected = [[1.25 / 4, 2.5 / 4, 0.25 / 4], [0.25, 0.5, 0.25], [0.125, 0.25, 1.25 / 2]]
    np.testing.assert_allclose(grades.level_share(train, rows), expected, rtol=1e-15)
    # a side that is empty in a file comes back as missing
    empty, missing = train.assign(side=""), rows.assign(side=np.nan)
    np.testing.assert_array_equal(
        grades.level_share(empty, missing), grades.level_share(empty, missing.assign(side=""))
    )
    assert grades.level_share(empty, missing)[0].tolist() == [1.25 / 5, 2.5 / 5, 1.25 / 5]


def test_nearest_takes_the_grade_at_the_same_target_else_the_prior():
    train = pd.DataFrame(
        [("t1", "", "l1", 2), ("t1", "", "l2", np.nan), ("t2", "", "l1", 0), ("t2", "", "l2", 0)],
        columns=["study_id", "side", "level", "grade"],
    )
    rows = pd.DataFrame([("a", "", "l1"), ("a", "", "l2"), ("b", np.nan, "l1")], columns=["study_id", "side", "level"])
    told = grades.nearest(train, rows, {"a": "t1", "b": "t2"})
    np.testing.assert_allclose(told, [[0, 0, 1], [2 / 3, 0, 1 / 3], [1, 0, 0]], rtol=1e-15)
    with pytest.raises(ValueError, match=r"lacks 1 of 2 studies. First: \['b'\]"):
        grades.nearest(train, rows, {"a": "t1"})
    with pytest.raises(ValueError, match=r"no training studies. First: \['a'\]"):
        grades.nearest(train, rows, {"a": "t1", "b": "a"})
    with pytest.raises(ValueError, match="1 of 5 rows repeat"):
        grades.nearest(pd.concat([train, train.iloc[:1]]), rows, {"a": "t1", "b": "t2"})


def test_baselines_learn_each_condition_from_its_own_rows(drawn):
    train, rows = drawn[drawn["study_id"] < "s3"], drawn[drawn["study_id"] >= "s3"].drop(columns="grade")
    neighbours = dict.fromkeys(rows["study_id"], "s0")
    told = grades.baselines(train, rows, neighbours=neighbours)
    assert set(told) <= set(metrics.BASELINES) and len(told) == 5
    for condition in CONDITIONS:
        among = (rows["condition"] == condition).to_numpy()
        learnt = train[train["condition"] == condition]
        shares = grades.prior(learnt["grade"], among.sum())
        np.testing.assert_array_equal(told["prior"][among], shares)
        ids = learnt["grade"].dropna().to_numpy(int)
        expected = metrics.majority_probabilities(ids, among.sum(), 3)
        np.testing.assert_array_equal(told["majority"][among], expected)
        np.testing.assert_array_equal(told["level_share"][among], grades.level_share(learnt, rows[among]))
        np.testing.assert_array_equal(told["nearest_neighbour"][among], grades.nearest(learnt, rows[among], neighbours))
        np.testing.assert_array_equal(
            told["weighted_prior"][among], grades.weighted_prior(learnt["grade"], among.sum())
        )
    assert "nearest_neighbour" not in grades.baselines(train, rows)
    with pytest.raises(ValueError, match="none of the 0 training rows has a grade"):
        grades.baselines(train[train["condition"] != CANAL], rows)


def test_scores_add_the_log_losses_and_leave_blanks_out(drawn):
    told, known = drawn[TOLD].to_numpy(), drawn["grade"].notna().to_numpy()
    weights = np.ones((1, len(drawn)))
    found = grades.scores(drawn["grade"], told, NAMES, weights)
    ids = drawn["grade"][known].to_numpy(int)
    expected = metrics.multiclass(ids, told[known], NAMES, weights[:, known])
    assert set(found) - set(expected) == {("log_loss", "all"), ("weighted_log_loss", "all")}
    assert all(found[key] == value for key, value in expected.items())
    assert found["log_loss", "all"][0] == pytest.approx(sk.log_loss(ids, told[known]), abs=1e-12)
    assert found["weighted_log_loss", "all"][0] == grades.weighted_log_loss(drawn["grade"], told)


def test_rows_compare_losses_with_the_lowest_baseline(drawn):
    rows = drawn[drawn["condition"] == CANAL]
    answers = {"net": rows[TOLD].to_numpy(), **grades.baselines(rows, rows)}
    options = {"task": CANAL, "split": "test", "num_draws": 50}
    found = grades.rows(answers, rows["grade"], rows["study_id"], NAMES, **options)
    at = {(row["variant"], row["metric"]): row for row in found if row["label"] == "all"}
    assert {metric for _, metric in at} == set(grades.METRICS)
    assert all(row["n"] == rows["grade"].notna().sum() and row["n_groups"] == 40 for row in found)
    for metric, pick in [("weighted_log_loss", min), ("log_loss", min), ("accuracy", max), ("macro_auroc", max)]:
        best = pick(at[name, metric]["value"] for name in answers if name != "net")
        row = at["net", metric]
        assert row["baseline"]["value"] == best
        assert row["baseline"]["difference"] == pytest.approx(row["value"] - best, abs=1e-15)
    assert at["net", "log_loss"]["baseline"]["variant"] == "level_share"
    assert at["net", "weighted_log_loss"]["baseline"]["variant"] == "weighted_prior"
    with pytest.raises(ValueError, match="no image"):
        grades.rows(answers, rows["grade"] * np.nan, rows["study_id"], NAMES, **options)


def test_competition_rows_hold_every_part_and_its_interval_over_studies(drawn):
    tables = {"net": drawn}
    for name, told in grades.baselines(drawn, drawn).items():
        tables[name] = drawn.assign(**dict(zip(TOLD, told.T)))
    options = {"conditions": CONDITIONS, "spinal": CANAL, "task": "lumbar", "split": "test", "num_draws": 60}
    found = grades.competition_rows(tables, NAMES, **options, reference="net")
    at = {(row["variant"], row["label"]): row for row in found}
    assert {row["metric"] for row in found} == {"competition"}
    for label, value in _competition(drawn).items():
        row = at["net", label]
        assert row["value"] == pytest.approx(value, abs=1e-12)
        assert row["ci95"][0] < value < row["ci95"][1]
        rivals = [at[name, label]["value"] for name in tables if name != "net"]
        assert row["baseline"]["value"] == min(rivals)
        assert (row["n"], row["n_groups"]) == (drawn["grade"].notna().sum(), 40)
    # The interval is that of `competition` under the same draws of studies.
    known = drawn[drawn["grade"].notna()]
    weights = metrics.bootstrap_weights(known["study_id"], num_draws=60)
    assert at["net", "all"]["ci95"] == pytest.approx(metrics.interval(_competition(known, weights=weights)["all"]))


def test_competition_rows_refuse_tables_of_other_rows(drawn):
    options = {"conditions": CONDITIONS, "spinal": CANAL, "task": "lumbar", "split": "test"}
    with pytest.raises(ValueError, match=r"the rows of \['prior'\] are not those of net"):
        grades.competition_rows({"net": drawn, "prior": drawn[::-1]}, NAMES, **options)
    with pytest.raises(ValueError, match="`tables` is empty"):
        grades.competition_rows({}, NAMES, **options)


@pytest.fixture
def grid(rng):
    """Grid of two embeddings and three classifiers on 200 rows in 40 groups, some blank, and a baseline."""
    known = rng.choice([0.0, 1, 2, np.nan], 200, p=[0.5, 0.3, 0.15, 0.05])
    right = np.eye(3)[np.nan_to_num(known).astype(int)]
    points = {}
    for e, embedding in enumerate(("flat", "deep")):
        for c, classifier in enumerate(("svc", "trees", "boosted")):
            told = rng.dirichlet(np.ones(3), 200) + right * (0.1 + 0.3 * e + 0.1 * c)
            points[embedding, classifier] = told / told.sum(axis=1, keepdims=True)
    return points | {"prior": grades.prior(known, 200)}, known, np.repeat(np.arange(40), 5)


def test_draws_are_those_of_the_rows(grid):
    points, known, groups = grid
    drawn = grades.draws(points, known, groups, num_draws=30, seed=4)
    assert list(drawn) == list(grades.METRICS) and all(list(each) == list(points) for each in drawn.values())
    weights = metrics.bootstrap_weights(groups, num_draws=30, seed=4)
    expected = grades.scores(known, points["deep", "svc"], NAMES, weights)
    for metric, each in drawn.items():
        value, spread = each["deep", "svc"]
        np.testing.assert_allclose(spread, expected[metric, "all"], rtol=1e-12)
        once = grades.scores(known, points["deep", "svc"], NAMES, np.ones((1, 200)))
        assert value == pytest.approx(once[metric, "all"][0], abs=1e-12)


def test_draws_of_two_conditions_are_of_the_same_studies(grid):
    points, known, groups = grid
    blank = np.where(groups == 7, np.nan, known)  # a study without a grade
    weights = metrics.bootstrap_weights(groups, num_draws=20)
    ids = np.nan_to_num(known).astype(int)
    here = np.isfinite(blank)
    expected = metrics.log_losses(ids[here], points["flat", "svc"][here], weights[:, here])
    found = grades.draws(points, blank, groups, num_draws=20)["log_loss"]["flat", "svc"][1]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_draws_without_a_grade_are_refused(grid):
    points, known, groups = grid
    with pytest.raises(ValueError, match="none of the 200 rows has a grade"):
        grades.draws(points, known * np.nan, groups)
    with pytest.raises(ValueError, match=r"\('flat', 'svc'\) are no probabilities"):
        grades.draws(points | {("flat", "svc"): np.ones((200, 3))}, known, groups)


def test_table_has_a_row_a_point_with_its_interval(grid):
    points, known, groups = grid
    drawn = grades.draws(points, known, groups, num_draws=30)
    table = grades.table(drawn, FACTORS, condition=CANAL, split="test")
    assert table.columns[:5].tolist() == ["condition", "split", "variant", *FACTORS] and len(table) == len(points)
    assert table.columns[5:8].tolist() == ["accuracy", "accuracy_low", "accuracy_high"] and table.shape[1] == 5 + 18
    row = table.set_index("variant").loc["deep boosted"]
    assert (row["embedding"], row["classifier"], row["condition"]) == ("deep", "boosted", CANAL)
    value, spread = drawn["macro_f1"]["deep", "boosted"]
    assert [row["macro_f1"], row["macro_f1_low"], row["macro_f1_high"]] == [value, *metrics.interval(spread)]
    assert table.set_index("variant").loc["prior", list(FACTORS)].tolist() == ["", ""]
    assert table.set_index("variant").loc["prior", "macro_auroc"] == 0.5
    with pytest.raises(ValueError, match=r"the key \('flat', 'svc'\) has 2 values; expected one for each of \['a'\]"):
        grades.table(drawn, ["a"])


def test_contrast_is_the_mean_of_the_paired_differences(grid):
    points, known, groups = grid
    drawn = grades.draws(points, known, groups, num_draws=200)["macro_auroc"]
    found = grades.contrast(drawn, FACTORS, "embedding", "flat", "deep")
    pairs = [[drawn[name, classifier] for name in ("deep", "flat")] for classifier in ("svc", "trees", "boosted")]
    differences = [deep[0] - flat[0] for deep, flat in pairs]
    assert found["pairs"] == 3 and found["value"] == pytest.approx(np.mean(differences), abs=1e-15)
    spread = np.mean([deep[1] - flat[1] for deep, flat in pairs], axis=0)
    assert found["ci95"] == pytest.approx(np.percentile(spread, [2.5, 97.5]), abs=1e-12)
    assert [each["classifier"] for each in found["each"]] == ["svc", "trees", "boosted"]
    assert [each["value"] for each in found["each"]] == pytest.approx(differences, abs=1e-15)
    assert found["value"] > 0 and found["ci95"][0] > 0
    # Exchanging the sides changes the sign alone; a point against itself differs by nothing.
    turned = grades.contrast(drawn, FACTORS, "embedding", "deep", "flat")
    assert turned["value"] == -found["value"]
    assert turned["ci95"] == pytest.approx([-found["ci95"][1], -found["ci95"][0]], abs=1e-12)
    same = {("a", "x"): drawn["flat", "svc"], ("b", "x"): drawn["flat", "svc"]}
    none = grades.contrast(same, FACTORS, "embedding", "a", "b")
    assert none["value"] == 0 and none["ci95"] == [0, 0]


def test_contrast_averages_several_values_and_keeps_within():
    zeros = np.zeros(4)
    values = {"svc": 0.5, "trees": 0.6, "boosted": 0.8}
    points = {(e, c): (value + 0.1 * (e == "deep"), zeros) for e in ("flat", "deep") for c, value in values.items()}
    found = grades.contrast(points, FACTORS, "classifier", "svc", ("trees", "boosted"))
    assert found["pairs"] == 2 and found["value"] == pytest.approx(0.2, abs=1e-15)
    assert (found["minus"], found["plus"]) == (["svc"], ["trees", "boosted"])
    del points["deep", "trees"]  # then the deep ones are no complete pair
    found = grades.contrast(points, FACTORS, "classifier", "svc", ("trees", "boosted"))
    assert [each["embedding"] for each in found["each"]] == ["flat"]
    kept = grades.contrast(points, FACTORS, "embedding", "flat", "deep", within={"classifier": ("svc", "trees")})
    assert [each["classifier"] for each in kept["each"]] == ["svc"]


def test_contrast_without_a_pair_says_why():
    points = {("flat", "svc"): (0.5, np.zeros(4)), ("deep", "svc"): (np.nan, np.zeros(4)), "prior": (0.5, np.zeros(4))}
    found = grades.contrast(points, FACTORS, "embedding", "flat", "deep")
    assert (found["value"], found["ci95"], found["pairs"], found["each"]) == (None, None, 0, [])
    assert found["reason"] == "no setting of the grid has all of ['flat', 'deep'] as embedding"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": "pooling"}, "`factor` is 'pooling'"),
        ({"within": {"embedding": "flat"}}, r"`within` names \['embedding'\]"),
        ({"plus": ("flat", "deep")}, "expected different values of embedding"),
        ({"plus": ()}, "expected different values of embedding"),
        ({"factors": ("embedding",)}, "has 2 values"),
    ],
)
def test_contrast_refuses_what_is_no_contrast(options, message):
    points = {("flat", "svc"): (0.5, np.zeros(4)), ("deep", "svc"): (0.6, np.zeros(4))}
    given = {"factors": FACTORS, "factor": "embedding", "minus": "flat", "plus": "deep"} | options
    with pytest.raises(ValueError, match=message):
        grades.contrast(points, **given)


def test_draws_that_hold_only_blank_rows_are_undefined_without_a_warning():
    graded = [np.nan, np.nan, 0, 1, 2]
    told = np.full((5, 3), 1 / 3)
    drawn = grades.draws({("a",): told}, graded, ["blank", "blank", "known", "known", "known"], num_draws=64)
    for points in drawn.values():
        value, spread = points["a",]
        assert np.isfinite(value) and 0 < np.isnan(spread).sum() < 40  # a quarter of the draws are "blank" twice
