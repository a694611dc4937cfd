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
