import sys

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedGroupKFold
from sklearn.svm import LinearSVC

from kerasmed import classifiers


def _pictures(rng, labels):
    """Noise, and where the first label is 1 a brighter left half."""
    images = rng.integers(60, 120, (len(labels), 64, 64))
    images[:, :, :32] += (40 * labels[:, 0]).astype(int)[:, None, None]
    return images.astype(np.uint8)


def test_svc_on_pixels_learns_what_pixels_show_and_no_more(rng):
    labels = (rng.random((120, 2)) < 0.5).astype(float)
    images = _pictures(rng, labels)
    told = classifiers.svc_on_pixels(images[:80], labels[:80], images[80:])
    assert told.shape == (40, 2) and ((told >= 0) & (told <= 1)).all()
    right = (told >= 0.5) == labels[80:]
    assert right[:, 0].all()
    assert right[:, 1].mean() < 0.8  # 40 fair coins: 0.5, and 0.8 is four standard errors above


def test_svc_on_pixels_of_a_rare_label_is_its_share(rng):
    labels = np.zeros((20, 3))
    labels[:4, 0], labels[:, 1], labels[:, 2] = 1, 1, np.nan
    told = classifiers.svc_on_pixels(_pictures(rng, labels * 0), labels, _pictures(rng, labels[:2] * 0))
    np.testing.assert_array_equal(told, [[0.2, 1, 0]] * 2)


def test_svc_on_pixels_leaves_unknown_labels_out_and_draws_at_most_so_many(rng):
    labels = (rng.random((60, 1)) < 0.5).astype(float)
    images = _pictures(rng, labels)
    unknown = labels.copy()
    unknown[::2] = np.nan
    told = classifiers.svc_on_pixels(images, unknown, images)
    assert ((told >= 0.5) == labels).all()
    few = classifiers.svc_on_pixels(images, labels, images, max_images=20, seed=1)
    assert not np.array_equal(few, classifiers.svc_on_pixels(images, labels, images, max_images=20, seed=2))
    np.testing.assert_array_equal(few, classifiers.svc_on_pixels(images, labels, images, max_images=20, seed=1))


def test_svc_on_pixels_without_queries_answers_nothing(rng):
    labels = np.array([[0.0], [1.0]] * 10)
    images = _pictures(rng, labels)
    assert classifiers.svc_on_pixels(images, labels, images[:0]).shape == (0, 1)


@pytest.mark.parametrize("count", [0, 3])
def test_svc_on_pixels_of_too_few_images_needs_no_machine(rng, count):
    labels = np.ones((count, 1))
    told = classifiers.svc_on_pixels(_pictures(rng, labels), labels, _pictures(rng, np.ones((1, 1))))
    assert told.tolist() == [[1.0 if count else 0.0]]


def test_logistic_on_table_learns_the_chances_of_a_simulated_label(rng):
    age = rng.uniform(0, 90, 20_000)
    chance = 1 / (1 + np.exp(-(age - 60) / 10))
    labels = (rng.random((20_000, 1)) < chance[:, None]).astype(float)
    told = classifiers.logistic_on_table(age[:, None], labels, np.array([[30.0], [60.0], [80.0]]))
    # 20,000 rows: a standard error of the logit below 0.04, of the probability below 0.01
    np.testing.assert_allclose(told[:, 0], 1 / (1 + np.exp([3, 0, -2])), atol=0.03)


def test_logistic_on_table_learns_what_unknown_means(rng):
    labels = np.tile([[1.0], [0.0]], (500, 1))
    values = np.where(labels == 1, np.nan, rng.normal(5, 1, (1000, 1)))  # unknown where present, else near the mean
    told = classifiers.logistic_on_table(values, labels, np.array([[np.nan], [5.0]]))
    assert told[0, 0] > 0.99 and told[1, 0] < 0.01


def test_logistic_on_table_leaves_unknown_labels_out(rng):
    values, labels = rng.normal(size=(400, 2)), (rng.random((400, 2)) < 0.4).astype(float)
    labels[:, 0] = values[:, 0] > 0
    unknown = labels.copy()
    unknown[::2, 0] = np.nan
    told = classifiers.logistic_on_table(values, unknown, values)
    assert ((told[:, 0] > 0.5) == labels[:, 0]).mean() > 0.97
    # The other label keeps all its rows, and the order of the columns does not matter.
    whole = classifiers.logistic_on_table(values[:, ::-1], labels[:, ::-1], values[:, ::-1])
    np.testing.assert_allclose(told[:, 1], whole[:, 0], atol=1e-4)  # where the solver stops


def test_logistic_on_table_of_one_kind_is_its_share_and_a_column_never_known_tells_nothing(rng):
    values = np.column_stack([rng.normal(size=50), np.full(50, np.nan)])
    labels = np.column_stack([np.ones(50), np.zeros(50), np.full(50, np.nan), rng.random(50) < 0.5])
    told = classifiers.logistic_on_table(values, labels, [[0.0, np.nan], [0.0, 7.0]])
    assert told[:, :3].tolist() == [[1, 0, 0]] * 2
    assert told[0, 3] == told[1, 3] == pytest.approx(labels[:, 3].mean(), abs=0.1)
    assert classifiers.logistic_on_table(values, labels, values[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("train", "labels", "rows"),
    [((3, 2), (4, 1), (5, 2)), ((3, 2), (3, 1), (5, 1)), ((0, 2), (0, 1), (5, 2))],
)
def test_logistic_on_table_of_unlike_lengths_is_refused(train, labels, rows):
    with pytest.raises(
        ValueError, match=rf"values of shape \({train[0]}, 2\) beside labels of shape \({labels[0]}, 1\)"
    ):
        classifiers.logistic_on_table(np.zeros(train), np.zeros(labels), np.zeros(rows))


def _graded(rng, num_groups, rows=4):
    """Three classes along the first column, in groups of some rows, beside a column of noise and one-hot columns."""
    y = rng.choice(3, num_groups * rows, p=[0.5, 0.3, 0.2])
    side = rng.integers(0, 2, len(y))
    x = np.column_stack([3 * y + rng.choice([-0.5, 0, 0.5], len(y)), rng.normal(5, 20, len(y)), side, 1 - side])
    return x, y, np.repeat(np.arange(num_groups), rows)


@pytest.mark.parametrize("sampling", classifiers.SAMPLINGS)
@pytest.mark.parametrize("name", classifiers.NAMES)
def test_fit_predict_learns_what_a_column_tells(rng, name, sampling):
    x, y, groups = _graded(rng, 60)
    told = classifiers.fit_predict(name, sampling, x[:200], y[:200], groups[:200], x[200:], categorical=(2, 3))
    assert told.shape == (40, 3) and told.dtype == np.float64 and told.min() >= 0
    np.testing.assert_allclose(told.sum(axis=1), 1, rtol=1e-12)
    for label in (0, 2):  # one line a class cannot cut out the middle one
        assert roc_auc_score(y[200:] == label, told[:, label]) == pytest.approx(1, abs=1e-12)
    if name in ("lightgbm", "xgboost", "bagging"):
        assert (told.argmax(axis=1) == y[200:]).all()


@pytest.mark.parametrize("name", classifiers.NAMES)
def test_fit_predict_of_a_seed_repeats_and_answers_each_row_by_itself(rng, name):
    x, y, groups = _graded(rng, 30)
    asked = x[:6] + 0.5
    options = (name, "smote_under", x, y, groups)
    told = classifiers.fit_predict(*options, asked)
    np.testing.assert_array_equal(classifiers.fit_predict(*options, asked), told)
    # Nothing is fitted to the rows asked, neither their scale nor their number; sums of float32 differ by their order.
    alone = classifiers.fit_predict(*options, np.vstack([asked[4:5], np.full((1, 4), 1e6)]))
    np.testing.assert_allclose(alone[0], told[4], rtol=1e-5)
    assert classifiers.fit_predict(*options, asked[:0]).shape == (0, 3)
    if name != "svc":  # its undersampling leaves a few rows, which may be the same for two seeds
        assert not np.array_equal(classifiers.fit_predict(*options, asked, seed=1), told)


@pytest.mark.parametrize("name", ["svc", "lightgbm", "xgboost"])
def test_fit_predict_with_more_threads_gives_the_same(rng, name):
    x, y, groups = _graded(rng, 60)
    one, two = (classifiers.fit_predict(name, "none", x, y, groups, x, jobs=jobs) for jobs in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "sampling", "expected"),
    [
        ("lightgbm", "none", [0.5, 0.3, 0.2]),
        ("lightgbm", "weighted", [1 / 3] * 3),
        ("lightgbm", "smote", [1 / 3] * 3),
        ("xgboost", "none", [0.5, 0.3, 0.2]),
        ("xgboost", "weighted", [1 / 3] * 3),
        ("xgboost", "smote_under", [1 / 3] * 3),
        ("bagging", "weighted", [1 / 3] * 3),
        ("svc", "none", [0.5, 0.3, 0.2]),
        ("svc", "weighted", [0.5, 0.3, 0.2]),
        ("svc", "smote", [0.5, 0.3, 0.2]),
    ],
)
def test_fit_predict_of_columns_that_tell_nothing_gives_the_shares_it_was_fitted_to(name, sampling, expected):
    y = np.tile([0, 0, 0, 0, 0, 1, 1, 1, 2, 2], 40)
    told = classifiers.fit_predict(name, sampling, np.ones((400, 2)), y, np.arange(400) // 4, np.ones((1, 2)))
    # A hundred rounds at a rate of 0.1 leave 0.9^100 of the way; Platt's sigmoid adds one row to either side of 400.
    np.testing.assert_allclose(told[0], expected, atol=0.003)


@pytest.mark.parametrize(("sampling", "class_weight"), [("none", None), ("weighted", "balanced")])
def test_fit_predict_of_svc_is_a_calibrated_linear_machine(rng, sampling, class_weight):
    x = rng.normal(size=(300, 3))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    y, groups = np.digitize(x[:, 0] + rng.normal(size=300), [0.5, 1.5]), np.arange(300) // 3
    machine = LinearSVC(C=0.001, dual=False, class_weight=class_weight)
    folds = classifiers._inner_folds(y, groups, 0)
    expected = CalibratedClassifierCV(machine, cv=folds, ensemble=False).fit(x, y).predict_proba(x)
    told = classifiers.fit_predict("svc", sampling, x, y, groups, x)
    np.testing.assert_allclose(told, expected, atol=1e-5)  # float32


@pytest.mark.parametrize("name", classifiers.NAMES)
def test_fit_predict_of_a_class_absent_from_training_gives_it_0(rng, name):
    x, y, groups = _graded(rng, 20)
    kept = y != 1
    told = classifiers.fit_predict(name, "smote", x[kept], y[kept], groups[kept], x[:5], num_classes=4)
    assert (told[:, [1, 3]] == 0).all() and (told[:, [0, 2]] > 0).all()
    kept = y == 2
    told = classifiers.fit_predict(name, "weighted", x[kept], y[kept], groups[kept], x[:5])
    assert told.tolist() == [[0, 0, 1]] * 5


@pytest.mark.parametrize("name", classifiers.NAMES)
@pytest.mark.parametrize("sampling", ["smote", "smote_under"])
def test_fit_predict_of_a_class_of_one_row_works(rng, name, sampling):
    x, y, groups = _graded(rng, 15)
    rare = np.where(y == 2, 1, y)
    x[7, 0], rare[7] = 30, 2
    told = classifiers.fit_predict(name, sampling, x, rare, groups, x[[7, 0]])
    assert told[0, 2] > told[1, 2]


@pytest.mark.parametrize("name", ["svc", "dense"])
def test_fit_predict_does_not_depend_on_units(rng, name):
    x, y, groups = _graded(rng, 30)
    other = x * [1e-3, 1e4, 1, 1] + [70, 5, 0, 0]
    told = [classifiers.fit_predict(name, "smote", v, y, groups, v, categorical=(2, 3)) for v in (x, other)]
    np.testing.assert_allclose(*told, atol=1e-3)  # standardised values differ in the last digits of float32


def test_inner_folds_keep_groups_whole_and_every_class_in_training(rng):
    _, y, groups = _graded(rng, 40)
    y[y == 2] = 1
    y[8:11] = 2  # three rows of one group
    pairs = classifiers._inner_folds(y, groups, 0)
    assert np.sort(np.concatenate([held_out for _, held_out in pairs])).tolist() == list(range(160))
    for learnt, held_out in pairs:
        assert set(y[learnt]) == {0, 1, 2}
        shared = np.intersect1d(groups[learnt], groups[held_out])
        # Only the class of one group is learnt where it is held out: else it could not be scored.
        assert set(shared) <= {2} and set(np.intersect1d(learnt, held_out)) <= {8, 9, 10}
    assert sum(len(np.intersect1d(*pair)) for pair in pairs) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "forest"}, "`name` is 'forest'; expected one of"),
        ({"sampling": "adasyn"}, "`sampling` is 'adasyn'; expected one of"),
        (
            {"x_train": np.full((12, 2), np.nan)},
            r"`x_train` has 24 missing .* 2 of 2 columns and 12 of 12 rows.*\[0, 1\]",
        ),
        ({"x_rows": np.array([[1, 0], [0, np.inf]])}, r"`x_rows` has 1 missing .* columns: \[1\]; first rows: \[1\]"),
        ({"x_rows": np.zeros((3, 1))}, r"`x_train` has shape \(12, 2\) and `x_rows` \(3, 1\)"),
        ({"y_train": np.zeros(11)}, r"12 rows, `y_train` shape \(11,\)"),
        (
            {"y_train": np.array([0.0, 1, 3, np.nan] * 3)},
            r"6 of 12 labels are none of 0 to 2.*rows: \[2, 3, 6, 7, 10\]",
        ),
        ({"groups_train": [None, *range(11)]}, "1 of 12 rows have no group"),
        ({"groups_train": [1, 2] * 6}, "2 groups of 12 training rows; a calibrated svc needs at least 3"),
        ({"categorical": (0, 1)}, r"1 of 2 `categorical` columns have values other than 0 and 1.*First: \[1\]"),
        ({"categorical": (2,)}, r"`categorical` names columns \[2\]; expected places from 0 to 1"),
    ],
)
def test_fit_predict_of_what_does_not_fit_is_refused(change, message):
    given = {
        "name": "svc",
        "sampling": "none",
        "x_train": np.column_stack([np.arange(12) % 2, np.arange(12)]),
        "y_train": np.arange(12) % 3,
        "groups_train": np.arange(12),
        "x_rows": np.zeros((1, 2)),
    }
    with pytest.raises(ValueError, match=message):
        classifiers.fit_predict(**given | change)


@pytest.mark.parametrize(
    ("library", "name", "sampling", "message"),
    [
        ("lightgbm", "lightgbm", "none", "lightgbm cannot be loaded .*libgomp1"),
        ("xgboost", "bagging", "none", "xgboost cannot be loaded .*pip install xgboost-cpu"),
        ("imblearn.over_sampling", "dense", "smote", "imblearn cannot be loaded .*pip install imbalanced-learn"),
    ],
)
def test_fit_predict_without_its_library_says_how_to_install_it(rng, monkeypatch, library, name, sampling, message):
    monkeypatch.setitem(sys.modules, library, None)
    x, y, groups = _graded(rng, 10)
    with pytest.raises(ImportError, match=message):
        classifiers.fit_predict(name, sampling, x, y, groups, x)


@pytest.mark.parametrize(
    ("counts", "smote", "smote_under"),
    [
        ((100, 60, 10), (100, 100, 100), (50, 50, 50)),
        ((100, 80), (100, 100), (80, 80)),
        ((9, 2, 1), (9, 9, 9), (4, 4, 4)),
        ((3, 1), (3, 3), (1, 1)),
        ((7, 7), (7, 7), (7, 7)),
        ((5,), (5,), (5,)),
    ],
)
def test_resample_evens_out_counts(rng, counts, smote, smote_under):
    y = np.repeat(np.arange(len(counts)), counts)
    x = rng.normal(size=(len(y), 3))
    for sampling, expected in (("none", counts), ("weighted", counts), ("smote", smote), ("smote_under", smote_under)):
        more, labels = classifiers.resample(x, y, sampling)
        assert np.bincount(labels).tolist() == list(expected) and len(more) == len(labels)
        assert sampling == "smote_under" or np.array_equal(more[: len(x)], x)


def test_resample_puts_new_rows_between_two_of_their_class(rng):
    x = np.vstack([rng.normal(0, 1, (20, 2)), [[10.0, 10.0], [12.0, 14.0]]])
    more, labels = classifiers.resample(x, np.repeat([0, 1], [20, 2]), "smote")
    share = (more[22:, 0] - 10) / 2
    assert (labels[22:] == 1).all() and share.min() > 0 and share.max() < 1 and len(np.unique(share)) == 18
    np.testing.assert_allclose(more[22:, 1], 10 + 4 * share, rtol=1e-12)


def test_resample_gives_new_rows_the_one_hots_of_their_nearer_parent():
    x = np.zeros((42, 5))
    x[:40, 1], x[40], x[41] = 1, [0, 1, 0, 1, 0], [8, 0, 1, 0, 1]
    more, _ = classifiers.resample(x, np.repeat([0, 1], [40, 2]), "smote", categorical=range(1, 5))
    near = more[42:, 0] < 4
    assert near.any() and not near.all()
    np.testing.assert_array_equal(more[42:, 1:], np.where(near[:, None], x[40, 1:], x[41, 1:]))
    plain, _ = classifiers.resample(x, np.repeat([0, 1], [40, 2]), "smote")
    assert ((plain[42:, 1] > 0) & (plain[42:, 1] < 1)).all()  # what is not named is a mixture


def test_resample_repeats_a_class_of_one_row_and_draws_from_the_largest(rng):
    x = rng.normal(size=(21, 2))
    y = np.repeat([0, 1], [20, 1])
    more, labels = classifiers.resample(x, y, "smote_under", seed=3)
    assert (more[labels == 1] == x[20]).all()
    drawn = [x.tolist().index(row) for row in more[labels == 0].tolist()]
    assert len(set(drawn)) == 10 and max(drawn) < 20
    np.testing.assert_array_equal(classifiers.resample(x, y, "smote_under", seed=3)[0], more)
    assert not np.array_equal(classifiers.resample(x, y, "smote_under", seed=4)[0], more)


def test_resample_of_missing_values_or_unknown_sampling_is_refused():
    x, y = np.array([[0.0], [np.nan], [1.0]]), np.array([0, 0, 1])
    with pytest.raises(ValueError, match=r"`x` has 1 missing or infinite values, in 1 of 1 columns and 1 of 3 rows"):
        classifiers.resample(x, y, "smote")
    with pytest.raises(ValueError, match="`sampling` is 'SMOTE'"):
        classifiers.resample(x, y, "SMOTE")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "leak", "sampling"), [("svc", 0.55, "none"), ("lightgbm", 0.75, "smote")])
def test_fit_predict_of_labels_shuffled_between_studies_is_chance_in_grouped_folds_only(name, leak, sampling):
    # Labels of a study are alike, and so are its embeddings, but no study's embedding tells another's labels.
    rng = np.random.default_rng(0)
    study = np.repeat(np.arange(1200), 10)
    x = rng.normal(size=(1200, 64))[study] + rng.normal(0, 0.3, (12_000, 64))
    latent = rng.normal(0, 2, 1200)[study] + rng.normal(size=12_000)
    y = np.digitize(latent, np.quantile(latent, [0.6, 0.85]))

    def mean_auroc(folds, groups):
        told = [
            roc_auc_score(
                y[held_out],
                classifiers.fit_predict(name, sampling, x[learnt], y[learnt], groups[learnt], x[held_out]),
                multi_class="ovr",
            )
            for learnt, held_out in folds
        ]
        return np.mean(told)

    grouped = mean_auroc(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(x, y, study), study)
    assert grouped == pytest.approx(0.5, abs=0.05)  # 1,200 studies: a standard error of 0.01 to 0.02
    # Rows taken for groups, outside and in: found 0.59 for the linear machine, which has 64 weights for 1,200 studies,
    # and 0.84 for trees.
    assert mean_auroc(KFold(5, shuffle=True, random_state=0).split(x), np.arange(12_000)) > leak
