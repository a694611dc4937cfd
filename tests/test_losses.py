import keras
import numpy as np
import pandas as pd
import pytest
from keras.ops import convert_to_numpy

from kerasmed import losses
from tests import gradients


def _loss(y_true, logits, **options):
    return float(losses.WeightedCategoricalCrossentropy(**options)(np.float32(y_true), np.float32(logits)))


def test_loss_by_hand():
    # p = (0.8, 0.2) for logits ln 4 and 0; true class 1: −log 0.2 = 1.6094; true class 0: −log 0.8 = 0.2231
    logits = [[np.log(4), 0], [np.log(4), 0]]
    y = [[0, 1], [1, 0]]
    assert _loss(y, logits) == pytest.approx((1.609438 + 0.223144) / 2, abs=1e-5)
    assert _loss(y, logits, class_weights=[1, 3]) == pytest.approx((3 * 1.609438 + 0.223144) / 2, abs=1e-5)
    # (1 − p)²: 0.64 for p = 0.2 and 0.04 for p = 0.8
    assert _loss(y, logits, focusing=2) == pytest.approx((0.64 * 1.609438 + 0.04 * 0.223144) / 2, abs=1e-5)


def test_loss_equals_keras_without_weights(rng):
    logits, y = rng.normal(size=(16, 4)), np.eye(4)[rng.integers(0, 4, 16)]
    expected = float(keras.losses.CategoricalCrossentropy(from_logits=True)(y, logits))
    assert _loss(y, logits) == pytest.approx(expected, rel=1e-5)


def test_loss_extreme_logits_are_finite_and_right_ones_cost_nothing():
    assert _loss([[1, 0]], [[500, -500]], focusing=2) == pytest.approx(0, abs=1e-6)
    assert _loss([[0, 1]], [[500, -500]], focusing=0.5, class_weights=[1, 2]) == pytest.approx(2000, rel=1e-5)


def test_loss_gradient_of_a_sure_answer_is_finite():
    loss = losses.WeightedCategoricalCrossentropy(focusing=0.5)
    _, (gradient,) = gradients.of(lambda logits: loss(np.float32([[1, 0]]), logits), [np.float32([[200, 0]])])
    assert np.isfinite(gradient).all()


def test_loss_round_trips_through_its_config():
    loss = losses.WeightedCategoricalCrossentropy(class_weights=[1, 2], focusing=2, name="mine")
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert copy.get_config() == loss.get_config() and copy.focusing == 2 and copy.class_weights == [1, 2]


@pytest.mark.parametrize("options", [{"focusing": -1}, {"class_weights": [1, -1]}])
def test_loss_negative_options_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        losses.WeightedCategoricalCrossentropy(**options)


def test_balanced_class_weights_average_one_over_the_images(rng):
    ids = np.repeat([0, 1, 2], [70, 20, 10])
    weights = losses.balanced_class_weights(ids, 3)
    np.testing.assert_allclose(weights, [100 / 210, 100 / 60, 100 / 30])
    assert weights[ids].mean() == pytest.approx(1)


def test_balanced_class_weights_empty_class_is_refused():
    with pytest.raises(ValueError, match=r"classes \[1\] have no training image"):
        losses.balanced_class_weights(np.array([0, 2]), 3)


# --- yes-or-no labels ------------------------------------------------------------------------------------------------


def _binary(y_true, logits, **options):
    return float(losses.WeightedBinaryCrossentropy(**options)(np.float32(y_true), np.float32(logits)))


# p = 0.5 for 0, 0.75 for ln 3
HAND_LOGITS = [[0, np.log(3)], [np.log(3), -5]]
HAND_Y = [[1, 0], [0, np.nan]]
HAND_WEIGHTS = {"positive_weights": [0.75, 1], "negative_weights": [0.25, 2]}


def test_label_loss_by_hand():
    # First label: (0.75 · ln 2 + 0.25 · ln 4) / 2 = 0.625 ln 2. Second, of which one entry is known: 2 · ln 4 = 4 ln 2.
    assert _binary(HAND_Y, HAND_LOGITS, **HAND_WEIGHTS) == pytest.approx(4.625 * np.log(2), rel=1e-6)
    # (1 − p)² = 1/4 of the first, p² = 9/16 of the others: (0.1875 + 0.28125) / 2 + 2.25 = 2.484375
    assert _binary(HAND_Y, HAND_LOGITS, **HAND_WEIGHTS, focusing=2) == pytest.approx(2.484375 * np.log(2), rel=1e-6)


def test_label_loss_of_each_sample_by_hand():
    # First label: 0.375 ln 2 and 0.25 ln 2; second: 4 ln 2, all of the first sample. Times the batch of two.
    loss = losses.WeightedBinaryCrossentropy(**HAND_WEIGHTS, reduction=None)
    values = convert_to_numpy(loss(np.float32(HAND_Y), np.float32(HAND_LOGITS)))
    np.testing.assert_allclose(values, np.log(2) * np.array([8.75, 0.5]), rtol=1e-6)


def test_label_loss_equals_the_sum_of_keras_losses_without_weights(rng):
    logits, y = rng.normal(0, 3, (16, 4)), rng.integers(0, 2, (16, 4))
    expected = 4 * float(keras.losses.BinaryCrossentropy(from_logits=True)(y, logits))
    assert _binary(y, logits) == pytest.approx(expected, rel=1e-5)  # float32
    one = float(keras.losses.BinaryFocalCrossentropy(from_logits=True, gamma=2)(y, logits))
    assert _binary(y, logits, focusing=2) == pytest.approx(4 * one, rel=1e-5)


def test_label_loss_of_a_label_without_known_entries_is_zero(rng):
    y, logits = np.float32([[1, np.nan], [0, np.nan]]), rng.normal(size=(2, 2))
    assert _binary(y, logits) == pytest.approx(_binary(y[:, :1], logits[:, :1]), rel=1e-6)
    assert _binary(np.full((2, 2), np.nan), logits) == 0


def test_label_loss_extreme_logits_are_finite_and_right_ones_cost_nothing():
    assert _binary([[1, 0]], [[500, -500]], focusing=2) == 0
    assert _binary([[1, 0]], [[-500, 500]], focusing=0.5, positive_weights=[3, 1]) == pytest.approx(2000, rel=1e-6)


@pytest.mark.parametrize("focusing", [0, 0.5, 2])
def test_label_loss_gradient_is_finite_and_none_of_unknown_entries(focusing):
    logits = np.float32([[3e38, 1.0, 500.0], [-1.0, np.inf, -500.0], [0.5, np.nan, 500.0]])
    y = np.float32([[np.nan, 1, 0], [0, np.nan, 1], [1, np.nan, 1]])
    counted = losses.WeightedBinaryCrossentropy([1, 2, 3], [3, 2, 1], focusing)
    loss, (gradient,) = gradients.of(lambda logits: counted(y, logits), [logits])
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[np.isnan(y)], 0)
    right = np.array([False, False, True])  # sure and right
    assert (gradient[2][right] == 0).all() and (gradient[~np.isnan(y)][:-1] != 0).all()


def test_label_loss_gradient_by_hand():
    loss = losses.WeightedBinaryCrossentropy(**HAND_WEIGHTS)
    _, (gradient,) = gradients.of(lambda logits: loss(np.float32(HAND_Y), logits), [np.float32(HAND_LOGITS)])
    # w⁺ · (p − 1) and w⁻ · p over the label's known entries: 0.75 · −0.5 / 2, 2 · 0.75, 0.25 · 0.75 / 2
    np.testing.assert_allclose(gradient, [[-0.1875, 1.5], [0.09375, 0]], rtol=1e-6)


def test_label_loss_of_half_precision_logits_is_computed_in_float32():
    logits = np.float16([[9.0], [9.0]])  # in float16, log p = −1.2e-4 has three digits
    got = losses.WeightedBinaryCrossentropy().call(np.float32([[1], [1]]), logits)
    assert keras.backend.standardize_dtype(got.dtype) == "float32"
    np.testing.assert_allclose(got, np.log1p(np.exp(-9.0)), rtol=1e-6)


def test_label_loss_weights_of_shares_make_both_kinds_of_a_label_pull_alike(rng):
    y = np.float32(rng.random((500, 3)) < [0.02, 0.3, 0.9])
    y[::7] = np.nan
    positive, negative = losses.label_shares(y)
    counted = losses.WeightedBinaryCrossentropy(positive_weights=negative, negative_weights=positive)
    loss, (gradient,) = gradients.of(
        lambda bias: counted(y, keras.ops.broadcast_to(bias, y.shape)), [np.zeros(3, np.float32)]
    )
    # At p = 0.5 a label's share of the loss is ln 2 · (n · p + p · n), and its two parts cancel in the gradient.
    assert float(loss) == pytest.approx(np.log(2) * 2 * (positive * negative).sum(), rel=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_label_loss_round_trips_through_its_config():
    loss = losses.WeightedBinaryCrossentropy(np.array([1, 2]), [0.5, 0], focusing=2, name="mine")
    config = keras.saving.serialize_keras_object(loss)
    assert config["registered_name"] == "kerasmed>WeightedBinaryCrossentropy"
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == loss.get_config() and copy.focusing == 2 and copy.name == "mine"
    assert copy.positive_weights == [1, 2] and copy.negative_weights == [0.5, 0]


def test_label_loss_round_trips_through_a_compiled_keras_file(tmp_path, rng):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", loss=losses.WeightedBinaryCrossentropy(**HAND_WEIGHTS, focusing=1))
    x, y = np.float32(rng.normal(size=(5, 4))), np.float32(rng.integers(0, 2, (5, 2)))
    y[1, 0] = np.nan
    before = model.evaluate(x, y, verbose=0)
    assert before == pytest.approx(_binary(y, model(x), **HAND_WEIGHTS, focusing=1), rel=1e-5)
    model.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    assert copy.loss.get_config() == model.loss.get_config() and copy.evaluate(x, y, verbose=0) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"focusing": -1}, "`focusing` is -1"),
        ({"positive_weights": [1, -1]}, "`positive_weights` are .* none below 0"),
        ({"negative_weights": [np.nan, 1]}, "`negative_weights` are .* finite"),
    ],
)
def test_label_loss_unfit_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        losses.WeightedBinaryCrossentropy(**options)


def test_label_loss_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match="3 weights for 2 labels"):
        _binary(np.zeros((4, 2)), np.zeros((4, 2)), positive_weights=[1, 1, 1])
    for shape in ((4,), (4, 1)):  # both would broadcast
        with pytest.raises(ValueError, match="expected .batch, num_labels. of both"):
            _binary(np.zeros(shape), np.zeros((4, 2)))


def test_label_shares_count_known_entries_only():
    positive, negative = losses.label_shares(np.array([[1, 0], [0, 1], [0, np.nan], [0, 1]]))
    np.testing.assert_allclose(positive, [1 / 4, 2 / 3])
    np.testing.assert_allclose(positive + negative, 1)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([np.nan, np.nan], r"positions \[1\] are unknown in all 2 training rows"),
        ([1, -1], r"holds \[-1.0\]; expected 1 present"),
    ],
)
def test_label_shares_unfit_labels_are_refused(column, message):
    with pytest.raises(ValueError, match=message):
        losses.label_shares(np.column_stack([[0, 1], column]))


def test_label_shares_of_one_kind_are_0_and_keep_the_label_from_being_learnt():
    y = np.array([[1, 0], [0, 0], [0, np.nan]])
    positive, negative = losses.label_shares(y)
    assert positive.tolist() == [pytest.approx(1 / 3), 0] and negative.tolist() == [pytest.approx(2 / 3), 1]
    logits = np.float32([[2, -9], [1, 9], [0, 9]])
    weights = {"positive_weights": negative, "negative_weights": positive}
    assert _binary(y, logits, **weights) == pytest.approx(
        _binary(y[:, :1], logits[:, :1], **{name: values[:1] for name, values in weights.items()})
    )


def test_label_shares_of_one_dimension_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        losses.label_shares([0, 1])


def test_label_loss_of_chest_at_one_half_everywhere_is_as_published_shares_give(real_data):
    from kerasmed.datasets import chest

    table = chest.read_table(real_data)
    names = [*chest.FINDINGS, chest.NO_FINDING]
    y = table.loc[table["split"] == "train", names].to_numpy("float32")
    assert len(y) == 86_524
    for num_labels, expected in ((15, 1.127), (14, 0.790)):
        positive, negative = losses.label_shares(y[:, :num_labels])
        loss = _binary(y[:, :num_labels], 0 * y[:, :num_labels], positive_weights=negative, negative_weights=positive)
        assert loss == pytest.approx(expected, abs=5e-4)
        assert loss == pytest.approx(np.log(2) * 2 * (positive * negative).sum(), rel=1e-4)


# --- graded targets --------------------------------------------------------------------------------------------------

# Probabilities (1/2, 1/4, 1/4), (1/8, 1/8, 3/4), (0.2, 0.2, 0.6) and (1/3, 1/3, 1/3)
GRADED_LOGITS = np.log([[[2, 1, 1], [1, 1, 6]], [[1, 1, 3], [5, 5, 5]]])


def _graded(y_true, logits, **options):
    return float(losses.GradedCrossentropy(**options)(np.float32(y_true), np.float32(logits)))


def test_graded_loss_by_hand():
    y = [[0, 2], [1, np.nan]]
    ln2, ln43, ln5 = np.log(2), np.log(4 / 3), np.log(5)
    assert _graded(y, GRADED_LOGITS) == pytest.approx((ln2 + ln43 + ln5) / 3, rel=1e-6)
    weighted = (1 * ln2 + 4 * ln43 + 2 * ln5) / 7
    assert _graded(y, GRADED_LOGITS, class_weights=(1, 2, 4)) == pytest.approx(weighted, rel=1e-6)
    per_sample = losses.GradedCrossentropy((1, 2, 4), reduction="none")(np.float32(y), np.float32(GRADED_LOGITS))
    np.testing.assert_allclose(per_sample, [2 * (ln2 + 4 * ln43) / 7, 2 * 2 * ln5 / 7], rtol=1e-6)


def test_graded_loss_of_right_and_of_wrong_answers():
    y = np.array([[0, 1], [2, np.nan]])
    logits = 1000 * np.eye(3)[np.nan_to_num(y).astype(int)]
    assert _graded(y, logits) == 0
    assert _graded(y, np.roll(logits, 1, axis=-1), class_weights=(1, 2, 4)) == pytest.approx(1000, rel=1e-6)


def test_graded_loss_equals_scikit_learns_log_loss_with_sample_weights(rng):
    from sklearn.metrics import log_loss

    y = rng.choice([0, 1, 2, np.nan], (40, 5), p=[0.5, 0.2, 0.1, 0.2])
    logits = rng.normal(0, 2, (40, 5, 3))
    known = ~np.isnan(y)
    grades = y[known].astype(int)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = log_loss(grades, probabilities[known], sample_weight=np.array([1, 2, 4])[grades], labels=[0, 1, 2])
    assert _graded(y, logits, class_weights=(1, 2, 4)) == pytest.approx(expected, rel=1e-6)


def test_graded_loss_of_blanks_adds_neither_value_nor_gradient():
    y = np.float32([[0, np.nan], [np.nan, 2]])
    counted = losses.GradedCrossentropy((1, 2, 4))
    results = []
    for odd in (0.0, 7.0, np.nan, np.inf):
        logits = np.float32(GRADED_LOGITS)
        logits[np.isnan(y)] = odd
        results.append(gradients.of(lambda logits: counted(y, logits), [logits]))
    for loss, (gradient,) in results:
        assert loss == results[0][0] > 0
        np.testing.assert_array_equal(gradient, results[0][1][0])
    assert (gradient[np.isnan(y)] == 0).all()
    # w_g · (p − y) / Σ w: of weights 1 and 4
    np.testing.assert_allclose(gradient[0, 0], np.array([-1 / 2, 1 / 4, 1 / 4]) / 5, rtol=1e-5)
    np.testing.assert_allclose(gradient[1, 1], np.array([1, 1, -2]) / 3 * 4 / 5, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, (0, 1, 1)])
def test_graded_loss_without_known_or_weighted_entries_is_0_with_gradient_0(weights):
    logits = np.full((2, 2, 3), np.nan, np.float32) if weights is None else np.float32(GRADED_LOGITS)
    y, counted = np.full((2, 2), np.nan if weights is None else 0, np.float32), losses.GradedCrossentropy(weights)
    loss, (gradient,) = gradients.of(lambda logits: counted(y, logits), [logits])
    assert float(loss) == 0 and not gradient.any()


@pytest.mark.parametrize("odd", [3, -1, 0.5, np.inf])
def test_graded_loss_of_what_is_no_grade_is_nan(odd):
    assert np.isnan(_graded([[0, 2], [odd, 1]], GRADED_LOGITS))


def test_graded_loss_of_half_precision_logits_is_computed_in_float32():
    loss = losses.GradedCrossentropy()(np.float32([[0]]), np.float16([[[9.0, 0, 0]]]))
    assert float(loss) == pytest.approx(np.log1p(2 * np.exp(-9)), rel=1e-3)  # float16 has no digits left beside 1


def test_graded_loss_round_trips_through_a_compiled_keras_file(tmp_path, rng):
    loss = losses.GradedCrossentropy(np.array([1, 2, 4]), name="mine")
    config = keras.saving.serialize_keras_object(loss)
    assert config["registered_name"] == "kerasmed>GradedCrossentropy"
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == loss.get_config() and copy.class_weights == [1, 2, 4] and copy.name == "mine"
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6), keras.layers.Reshape((2, 3))])
    model.compile("sgd", loss=loss)
    x, y = np.float32(rng.normal(size=(5, 4))), np.float32(rng.integers(0, 3, (5, 2)))
    y[1, 0] = np.nan
    before = model.evaluate(x, y, verbose=0)
    assert before == pytest.approx(_graded(y, model(x), class_weights=(1, 2, 4)), rel=1e-6)
    model.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    assert copy.loss.get_config() == loss.get_config() and copy.evaluate(x, y, verbose=0) == before


def test_graded_loss_unfit_weights_and_shapes_are_refused():
    with pytest.raises(ValueError, match="`class_weights` are .* none below 0"):
        losses.GradedCrossentropy((1, -2, 4))
    with pytest.raises(ValueError, match="2 weights for 3 grades"):
        _graded([[0, 1], [0, 1]], GRADED_LOGITS, class_weights=(1, 2))
    for shape in ((2,), (2, 1), (2, 2, 1)):  # the last two would broadcast
        with pytest.raises(ValueError, match="expected .batch, num_targets. and .batch, num_targets, num_grades."):
            _graded(np.zeros(shape), GRADED_LOGITS)


# --- weights of groups -----------------------------------------------------------------------------------------------

# elbow: one of four abnormal; wrist: three of five.
GROUPS_TRAIN = np.repeat(["wrist", "elbow"], [5, 4])
Y_TRAIN = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0])


def _weighted(y, logits, weights):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    return float(loss(np.float32(y)[:, None], np.float32(logits)[:, None], sample_weight=weights))


def test_group_weights_by_hand():
    table = losses.group_weights(Y_TRAIN, GROUPS_TRAIN)
    assert table.columns.tolist() == ["positive", "negative", "present", "absent"]
    assert table.index.tolist() == ["elbow", "wrist"] and table.index.name == "group"
    np.testing.assert_allclose(table.loc["elbow"], [3 / 4, 1 / 4, 1, 3], rtol=1e-15)
    np.testing.assert_allclose(table.loc["wrist"], [2 / 5, 3 / 5, 3, 2], rtol=1e-15)
    assert (table[["present", "absent"]].dtypes == "int64").all()


def test_sample_weights_and_the_loss_of_a_batch_by_hand():
    table = losses.group_weights(Y_TRAIN, GROUPS_TRAIN)
    y, groups = [1, 0, 1, 0], ["elbow", "elbow", "wrist", "wrist"]
    weights = losses.sample_weights(y, groups, table)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [0.75, 0.25, 0.4, 0.6], rtol=1e-7)
    # p = 0.5 for 0, 0.75 for ln 3: ln 2, 2 ln 2, −ln 0.75, ln 2. Divided by 4 images, not by the weights' sum of 2.
    expected = (0.75 * np.log(2) + 0.25 * 2 * np.log(2) - 0.4 * np.log(0.75) + 0.6 * np.log(2)) / 4
    assert _weighted(y, [0, np.log(3), np.log(3), 0], weights) == pytest.approx(expected, rel=1e-6)
    assert _weighted(y, [0] * 4, np.float32([3, 1, 0, 0])) == pytest.approx(np.log(2), rel=1e-6)


def test_sample_weights_of_validation_images_are_the_training_images():
    table = losses.group_weights(Y_TRAIN, GROUPS_TRAIN)
    y, groups = np.array([1, 1, 1, 0]), np.repeat("elbow", 4)
    # Of its own, with three of four abnormal, these would be 1/4 and 3/4.
    np.testing.assert_allclose(losses.sample_weights(y, groups, table), [0.75, 0.75, 0.75, 0.25], rtol=1e-7)
    assert losses.group_weights(y, groups).loc["elbow", "positive"] == 0.25


def test_sample_weights_make_both_kinds_of_each_group_weigh_alike(rng):
    groups = rng.integers(0, 3, 600)
    y = (rng.random(600) < np.array([0.05, 0.5, 0.8])[groups]).astype(float)
    table = losses.group_weights(y, groups)
    weights = losses.sample_weights(y, groups, table)
    totals = pd.Series(weights).groupby([groups, y]).sum().unstack()
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-5)  # float32
    np.testing.assert_allclose(totals[1], table["present"] * table["absent"] / np.bincount(groups), rtol=1e-5)


def test_group_weights_equal_the_other_kinds_share_of_each_group(rng):
    groups, y = rng.integers(0, 3, 50), rng.integers(0, 2, 50)
    columns = np.where(groups[:, None] == np.arange(3), y[:, None], np.nan)
    positive, negative = losses.label_shares(columns)
    table = losses.group_weights(y, groups)
    np.testing.assert_allclose(table["positive"], negative, rtol=1e-15)
    np.testing.assert_allclose(table["negative"], positive, rtol=1e-15)


def test_group_weights_of_one_kind_weigh_its_images_0():
    y, groups = [1, 1, 0, 1, 0], ["hand", "hand", "finger", "elbow", "elbow"]
    table = losses.group_weights(y, groups)
    assert table.loc["hand"].tolist() == [0, 1, 2, 0] and table.loc["finger"].tolist() == [1, 0, 0, 1]
    weights = losses.sample_weights(y, groups, table)
    assert weights.tolist() == [0, 0, 0, 0.5, 0.5]
    assert _weighted(y, [-9, 9, 9, 0, 0], weights) == pytest.approx(np.log(2) / 5, rel=1e-6)


def test_sample_weights_of_groups_without_training_images_are_refused():
    table = losses.group_weights(Y_TRAIN, GROUPS_TRAIN)
    with pytest.raises(
        ValueError, match=r"groups \['hand'\] have no weights, which are counted on training images only"
    ):
        losses.sample_weights([1, 0, 1], ["hand", "elbow", "hand"], table)


@pytest.mark.parametrize(
    ("y", "groups", "message"),
    [
        ([1, np.nan], ["a", "a"], r"`y_train` holds \[nan\]; expected 1 present or 0 absent"),
        ([1, 2], ["a", "a"], r"holds \[2.0\]"),
        ([1, 0], ["a"], r"shape \(2,\) and its groups \(1,\)"),
        ([[1], [0]], ["a", "a"], r"shape \(2, 1\)"),
        ([1, 0], ["a", None], r"1 of 2 training images have no group.*positions: \[1\]"),
        ([], [], "`y_train` is empty"),
    ],
)
def test_group_weights_unfit_labels_are_refused(y, groups, message):
    with pytest.raises(ValueError, match=message):
        losses.group_weights(y, np.array(groups, dtype=object))


def test_sample_weights_unknown_labels_are_refused():
    with pytest.raises(ValueError, match=r"`y` holds \[nan\]"):
        losses.sample_weights([np.nan], ["elbow"], losses.group_weights(Y_TRAIN, GROUPS_TRAIN))


# --- F1 --------------------------------------------------------------------------------------------------------------


def _f1(y_true, logits, **options):
    metric = losses.F1(**options)
    for rows in np.array_split(np.arange(len(logits)), 2):  # as batches
        metric.update_state(np.float32(y_true)[rows], np.float32(logits)[rows])
    return convert_to_numpy(metric.result())


def test_f1_by_hand():
    # Label 1: TP 1, FP 1, FN 1: 2 / 4. Label 2: TP 2, FP 0, FN 1: 4 / 5. Label 3: none present, none predicted: 0.
    y_true = [[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    logits = [[2, 0.1, -1], [0.3, 5, -1], [-0.2, -3, -1], [-1, -1, -1]]
    # Keras adds 1e-7 to each denominator.
    np.testing.assert_allclose(_f1(y_true, logits, average=None), [0.5, 0.8, 0], atol=1e-6)
    assert _f1(y_true, logits) == pytest.approx(1.3 / 3, abs=1e-6)
    assert _f1(y_true, logits, average="micro") == pytest.approx(6 / 9, abs=1e-6)
    # sigmoid(2) = 0.88: only 2 and 5 stay.
    np.testing.assert_allclose(_f1(y_true, logits, average=None, threshold=0.8), [2 / 3, 0.5, 0], atol=1e-6)


def test_f1_of_right_and_of_wrong_answers():
    y_true = np.eye(3)[[0, 1, 2, 0]]
    assert _f1(y_true, 9 * y_true - 1) == pytest.approx(1, abs=1e-6)
    assert _f1(y_true, 1 - 9 * y_true) == 0
    assert _f1(y_true, 0 * y_true) == 0  # a probability of one half is not above it


def test_f1_equals_scikit_learns(rng):
    from sklearn.metrics import f1_score

    y_true, logits = rng.integers(0, 2, (50, 3)), rng.normal(size=(50, 3))
    for average in ("macro", "micro", "weighted"):
        assert _f1(y_true, logits, average=average) == pytest.approx(
            f1_score(y_true, logits > 0, average=average), abs=1e-6
        )


def test_f1_round_trips_through_its_config():
    metric = losses.F1(average="micro", threshold=0.3, name="mine")
    config = keras.saving.serialize_keras_object(metric)
    assert config["registered_name"] == "kerasmed>F1"
    copy = keras.saving.deserialize_keras_object(config)
    assert isinstance(copy, losses.F1) and copy.get_config() == metric.get_config()
    assert copy.threshold == 0.3 and copy.average == "micro" and copy.name == "mine"


@pytest.mark.parametrize("options", [{"average": "samples"}, {"threshold": 0.0}])
def test_f1_unfit_options_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        losses.F1(**options)


def test_binary_accuracy_of_keras_takes_logits_with_a_threshold_of_zero():
    accuracy = keras.metrics.BinaryAccuracy(threshold=0.0)
    # Right: 3 of 4. At Keras's default of 0.5, 0.2 would count as absent.
    accuracy.update_state(np.float32([[1, 0], [1, 1]]), np.float32([[0.2, -0.2], [3, -3]]))
    assert float(accuracy.result()) == 0.75


# --- Brier score -----------------------------------------------------------------------------------------------------


def _brier(y_true, logits, **options):
    metric = losses.BrierScore(**options)
    for rows in np.array_split(np.arange(len(logits)), 2):  # as batches
        metric.update_state(np.float32(y_true)[rows], np.float32(logits)[rows])
    return float(metric.result())


def test_brier_score_by_hand():
    # p = 0.75, 0.5, 0.25 and 0.75 against 1, 0, 0 and 0: (1 + 4 + 1 + 9) / 16 / 4
    logits = np.log(3) * np.array([[1], [0], [-1], [1]])
    assert _brier([[1], [0], [0], [0]], logits) == pytest.approx(15 / 64, rel=1e-6)
    metric = losses.BrierScore()
    metric.update_state(np.float32([[1], [0]]), np.float32([[0], [np.log(3)]]), sample_weight=np.float32([3, 1]))
    assert float(metric.result()) == pytest.approx((3 * 0.25 + 0.5625) / 4, rel=1e-6)


def test_brier_score_of_right_wrong_and_undecided_answers():
    y_true = np.array([[1, 0], [0, 1]])
    sure = 1000 * (2 * y_true - 1)
    assert _brier(y_true, sure) == 0 and _brier(y_true, -sure) == 1 and _brier(y_true, 0 * y_true) == 0.25


def test_brier_score_of_one_label_equals_scikit_learns(rng):
    from sklearn.metrics import brier_score_loss

    y_true, logits = rng.integers(0, 2, 50), rng.normal(0, 3, 50)
    expected = brier_score_loss(y_true, 1 / (1 + np.exp(-logits)))
    assert _brier(y_true[:, None], logits[:, None]) == pytest.approx(expected, rel=1e-5)  # float32


def test_brier_score_of_half_precision_logits_is_computed_in_float32():
    metric = losses.BrierScore()
    metric.update_state(np.float32([[0]]), np.float16([[-9.0]]))  # in float16, the square of 1.2e-4 is 0
    assert float(metric.result()) == pytest.approx(1 / (1 + np.exp(9)) ** 2, rel=1e-4)


def test_brier_score_round_trips_through_a_compiled_keras_file(tmp_path, rng):
    metric = losses.BrierScore(name="mine")
    config = keras.saving.serialize_keras_object(metric)
    assert config["registered_name"] == "kerasmed>BrierScore" and losses.BrierScore().name == "mse"
    copy = keras.saving.deserialize_keras_object(config)
    assert isinstance(copy, losses.BrierScore) and copy.get_config() == metric.get_config() and copy.name == "mine"
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True), metrics=[losses.BrierScore()])
    x, y = np.float32(rng.normal(size=(5, 4))), np.float32(rng.integers(0, 2, (5, 1)))
    before = model.evaluate(x, y, verbose=0, return_dict=True)
    assert before["mse"] == pytest.approx(_brier(y, model(x)), rel=1e-6)
    model.save(tmp_path / "m.keras")
    assert keras.saving.load_model(tmp_path / "m.keras").evaluate(x, y, verbose=0, return_dict=True) == before
