import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn import metrics as sk

from kerasmed import calibration

NAN = np.nan


@pytest.fixture
def simulated(rng):
    """20,000 images of three labels, drawn with the very chances that the probabilities say; a tenth is unknown."""
    honest = expit(rng.normal((-3, -1, 1), 1.5, (20_000, 3)))
    y_true = (rng.random(honest.shape) < honest).astype(float)
    y_true[rng.random(honest.shape) < 0.1] = NAN
    return y_true, honest


def test_logits_are_finite_and_keep_the_order_of_float32_probabilities():
    tiny, below_one = np.float32(1.2e-38), np.nextafter(np.float32(1), np.float32(0))
    told = calibration.logits(np.array([0, tiny, 1e-20, 0.5, 0.9, below_one, 1], np.float32))
    assert np.isfinite(told).all() and (np.diff(told) > 0).all()
    assert told[3] == 0 and told[4] == pytest.approx(np.log(9), rel=1e-6)  # 0.9 in float32
    assert told[0] == pytest.approx(-126 * np.log(2)) and told[-1] == pytest.approx(53 * np.log(2))


def test_remove_weights_by_hand_and_of_equal_weights():
    # odds 4 and 1/4; the first label's weights, 3 to 1, made them three times too high, the second's are alike
    told = calibration.remove_weights(np.array([[0.8, 0.8], [0.2, 0.2]]), [0.75, 0.5], [0.25, 0.5])
    np.testing.assert_allclose(told, [[4 / 7, 0.8], [1 / 13, 0.2]], rtol=1e-14)


def test_remove_weights_finds_the_chance_at_which_the_weighted_loss_is_least():
    chance, positive, negative = 0.07, 0.93, 0.07
    p = np.linspace(0.001, 0.999, 99_801)
    loss = -positive * chance * np.log(p) - negative * (1 - chance) * np.log(1 - p)
    least = p[loss.argmin()]
    assert least == pytest.approx(0.5, abs=1e-5)  # the step of p: as if labels were balanced
    told = calibration.remove_weights(np.array([[least]]), [positive], [negative])
    assert told[0, 0] == pytest.approx(chance, abs=1e-5)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ([1.0], [1.0, 1.0], r"`positive_weights` are \[1.0\] beside probabilities of shape \(4, 2\)"),
        ([1.0, 1.0], [1.0, 0.0], r"`negative_weights` are \[1.0, 0.0\].*above 0"),
        ([1.0, NAN], [1.0, 1.0], "finite"),
    ],
)
def test_remove_weights_unfit_weights_are_refused(positive, negative, message):
    with pytest.raises(ValueError, match=message):
        calibration.remove_weights(np.full((4, 2), 0.5), positive, negative)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_fit_temperature_recovers_a_known_temperature(simulated, temperature):
    y_true, honest = simulated
    sure = calibration.apply_temperature(honest, 1 / temperature)
    # of 54,000 entries; a standard error of T is near 1 %
    assert calibration.fit_temperature(y_true, sure) == pytest.approx(temperature, rel=0.03)


def test_fit_temperature_by_hand():
    # Said with odds of 16 to 1, right three times of four: odds of 3, so log 16 / T = log 3.
    y_true, told = np.array([[1, 1], [1, 0], [NAN, NAN]]), np.full((3, 2), 16 / 17)
    assert calibration.fit_temperature(y_true, told) == pytest.approx(np.log(16) / np.log(3), rel=1e-5)


def test_fit_temperature_of_perfect_and_of_senseless_probabilities_is_an_end_of_the_range(rng):
    y_true = (rng.random((200, 2)) < 0.5).astype(float)
    low, high = calibration.TEMPERATURES
    assert calibration.fit_temperature(y_true, y_true) == pytest.approx(low, rel=1e-3)
    assert calibration.fit_temperature(y_true, 1 - y_true) == pytest.approx(high, rel=1e-3)


def test_apply_temperature_of_one_changes_nothing_and_any_other_keeps_the_order(simulated):
    y_true, honest = simulated
    np.testing.assert_allclose(calibration.apply_temperature(honest, 1.0), honest, rtol=1e-12)
    weighted = calibration.remove_weights(honest, [0.9, 0.5, 0.2], [0.1, 0.5, 0.8])
    for told in (calibration.apply_temperature(honest, 3.0), calibration.apply_temperature(honest, 0.6), weighted):
        for truth, before, after in zip(y_true.T, honest.T, told.T):
            known = np.isfinite(truth)
            assert sk.roc_auc_score(truth[known], after[known]) == sk.roc_auc_score(truth[known], before[known])
    back = calibration.apply_temperature(calibration.apply_temperature(honest, 3.0), 1 / 3)
    np.testing.assert_allclose(back, honest, rtol=1e-9)


@pytest.mark.parametrize("temperature", [0, -1, NAN, np.inf])
def test_apply_temperature_not_above_zero_is_refused(temperature):
    with pytest.raises(ValueError, match="`temperature` is"):
        calibration.apply_temperature(np.array([0.5]), temperature)


def test_reliability_by_hand_over_known_entries():
    y_true = np.array([[1, 0], [0, NAN], [1, 0]])
    told = np.array([[0.9, 0.1], [0.4, 0.99], [0.6, 0.3]])
    table = calibration.reliability(y_true, told, bins=2)
    # 0.1, 0.3 | 0.4, 0.6, 0.9
    expected = pd.DataFrame({"mean_probability": [0.2, 1.9 / 3], "observed": [0, 2 / 3], "n": [2, 3]})
    pd.testing.assert_frame_equal(table, expected, check_exact=False, rtol=1e-14, check_dtype=False)
    error = (2 * 0.2 + 3 * (2 - 1.9) / 3) / 5
    assert calibration.expected_calibration_error(y_true, told, bins=2) == pytest.approx(error, abs=1e-15)


def test_reliability_keeps_equal_probabilities_together_whatever_the_order(rng):
    y_true, told = (rng.random((500, 2)) < 0.3).astype(float), rng.random((500, 2)).round(1)
    table = calibration.reliability(y_true, told)
    assert table["n"].sum() == 1000 and len(table) <= 10 and (np.diff(table["mean_probability"]) > 0).all()
    order = rng.permutation(500)
    pd.testing.assert_frame_equal(table, calibration.reliability(y_true[order], told[order]), rtol=1e-12)
    assert calibration.reliability(y_true[:, [0]] * 0, np.full((500, 1), 0.2)).to_numpy() == pytest.approx(
        np.array([[0.2, 0, 500]]), rel=1e-12
    )
    assert len(calibration.reliability(y_true[:2, [0]], np.array([[0.1], [0.2]]))) == 2


def test_expected_calibration_error_is_small_of_honest_and_mended_probabilities(simulated):
    y_true, honest = simulated
    # A bin of 5,400 entries has a standard error of at most 0.007, the mean over ten a smaller one.
    assert calibration.expected_calibration_error(y_true, honest) < 0.008
    sure = calibration.apply_temperature(honest, 1 / 3)
    assert calibration.expected_calibration_error(y_true, sure) > 0.08
    mended = calibration.apply_temperature(sure, calibration.fit_temperature(y_true, sure))
    assert calibration.expected_calibration_error(y_true, mended) < 0.008
    perfect = np.nan_to_num(y_true)
    assert calibration.expected_calibration_error(y_true, perfect) == 0
    assert calibration.expected_calibration_error(y_true, 1 - perfect) == 1


def test_brier_by_hand_and_by_scikit_learn(simulated):
    y_true, told = np.array([[1, 0, NAN], [0, NAN, NAN]]), np.array([[0.5, 0.1, 0.3], [0.2, 0.7, 0.3]])
    found = calibration.brier(y_true, told, "abc")
    np.testing.assert_allclose(found, [(0.145 + 0.01) / 2, 0.145, 0.01, NAN], rtol=1e-14)
    assert found.index.tolist() == ["all", "a", "b", "c"]
    y_true, honest = simulated
    known = np.isfinite(y_true[:, 0])
    expected = sk.brier_score_loss(y_true[known, 0], honest[known, 0])
    assert calibration.brier(y_true, honest, "abc")["a"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "score",
    [
        calibration.fit_temperature,
        calibration.reliability,
        calibration.expected_calibration_error,
        lambda y_true, told: calibration.brier(y_true, told, "a"),
    ],
)
def test_calibration_of_unfit_input_is_refused(score):
    half = np.full((3, 1), 0.5)
    for y_true, told, message in [
        (np.full((3, 1), NAN), half, "none of the 3 labels is known"),
        (np.zeros((0, 1)), np.zeros((0, 1)), "none of the 0 labels is known"),
        (np.zeros((2, 1)), half, r"shape \(3, 1\) beside labels of shape \(2, 1\)"),
        (np.zeros((3, 1)), half * 4, r"in \[0, 2\]; expected in \[0, 1\]"),
        (np.full((3, 1), 0.5), half, "3 labels are not 1, 0 or NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(y_true, told)


def test_reliability_of_no_bin_is_refused():
    with pytest.raises(ValueError, match="`bins` is 0"):
        calibration.reliability(np.zeros((2, 1)), np.zeros((2, 1)), bins=0)
