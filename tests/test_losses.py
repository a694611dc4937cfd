import keras
import numpy as np
import pytest

from kerasmed import losses


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
    import tensorflow as tf

    logits = tf.Variable([[200.0, 0.0]])
    with tf.GradientTape() as tape:
        loss = losses.WeightedCategoricalCrossentropy(focusing=0.5)(tf.constant([[1.0, 0.0]]), logits)
    assert np.isfinite(tape.gradient(loss, logits).numpy()).all()


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


# --- F1 --------------------------------------------------------------------------------------------------------------


def _f1(y_true, logits, **options):
    metric = losses.F1(**options)
    for rows in np.array_split(np.arange(len(logits)), 2):  # as batches
        metric.update_state(np.float32(y_true)[rows], np.float32(logits)[rows])
    return metric.result().numpy()


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
