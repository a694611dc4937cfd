import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from kerasmed import modalities
from kerasmed.modalities import DynamicWeights, ModalityDropout, NeutralVectors, PseudoModality, ZeroFilling
from tests import gradients

SUBSETS = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
ODD = (np.nan, np.inf, -np.inf, 1e30, 5.0)
COPING = {
    "zero": lambda **options: ZeroFilling(**options),
    "neutral": lambda **options: NeutralVectors(**options),
    "dynamic": lambda **options: DynamicWeights(8, 2, **options),
    "pseudo": lambda **options: PseudoModality(16, 0.7, seed=1, **options),
}


def _vary(layer):
    """Give every weight, those that begin at zero included, a value of its own."""
    rng = np.random.default_rng(7)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(0, 0.25, variable.shape))
    return layer


def _made(name, shape=(None, 3, 4), **options):
    layer = COPING[name](**options)
    layer.build([shape, shape[:2]])
    return _vary(layer)


def _rewind(layer):
    """Have every generator of a layer or model draw what it drew first, as `kerasmed.training.fit` does."""
    for variable in layer.variables:
        if variable.path.endswith("seed_generator_state"):
            variable.assign(variable * np.array([1, 0], "uint32"))


def _set_draws(monkeypatch, draws):
    monkeypatch.setattr(keras.random, "uniform", lambda *_, **__: keras.ops.convert_to_tensor(draws, "float32"))


# --- all layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", COPING)
def test_layers_values_of_missing_modalities_change_no_bit_of_output_and_gradients(name, training, rng):
    layer, available = _made(name), SUBSETS
    vectors = rng.normal(size=(7, 3, 4)).astype("float32")
    options = {"training": True} if training and name == "pseudo" else {}
    results = []

    def mixed(x):
        y = layer([x, available], **options)
        factors = np.cos(np.arange(y.shape[1] * y.shape[2], dtype="float32")).reshape(y.shape[1:])
        loss = keras.ops.sum(y * factors) + sum(layer.losses)
        return loss, y

    for odd in (0.0, *ODD):
        _rewind(layer)
        x = np.where(available[..., None], vectors, np.float32(odd))
        (loss, y), found = gradients.of(mixed, [x], layer.trainable_variables)
        results.append([y, loss, *found])
    by_vectors = results[0][2]
    assert (by_vectors[~available] == 0).all() and (np.abs(by_vectors[available]).max() > 0.01)
    for result in results:
        assert all(np.isfinite(each).all() for each in result)
        assert all(np.abs(gradient).max() > 0 for gradient in result[3:])
        for got, expected in zip(result, results[0]):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["zero", "neutral", "pseudo"])
def test_layers_hand_on_the_vectors_that_are_available(name, rng):
    vectors = rng.normal(size=(7, 3, 4)).astype("float32")
    got = convert_to_numpy(_made(name)([vectors, SUBSETS]))
    np.testing.assert_array_equal(got[SUBSETS], vectors[SUBSETS])


@pytest.mark.parametrize("name", COPING)
def test_layers_take_numbers_of_which_zero_is_missing(name, rng):
    vectors, layer = rng.normal(size=(7, 3, 4)).astype("float32"), _made(name)
    expected = layer([vectors, SUBSETS])
    for numbers in (SUBSETS.astype("float32"), SUBSETS.astype("int64"), SUBSETS * np.float32(0.2), SUBSETS * -2):
        np.testing.assert_array_equal(layer([vectors, numbers]), expected)


@pytest.mark.parametrize("name", COPING)
def test_layers_refuse_rows_without_any_modality(name, rng):
    vectors, available = rng.normal(size=(4, 3, 4)).astype("float32"), SUBSETS[:4].copy()
    available[[1, 3]] = False
    for each in (available, available.astype("float32")):
        with pytest.raises(ValueError, match=r"no modality for 2 of 4 rows; .* First rows: \[1, 3\]"):
            COPING[name]()([vectors, each])


@pytest.mark.parametrize(
    "shapes", [[(2, 3, 4), (2, 2)], [(2, 3), (2, 3)], [(2, 3, 4), (2, 3, 1)], [(2, 3, 4)]], ids=str
)
@pytest.mark.parametrize("name", COPING)
def test_layers_of_other_shapes_are_refused(name, shapes):
    with pytest.raises(ValueError, match=r"expected a list of the modalities' vectors, \(batch, M, D\), and"):
        COPING[name]()([np.ones(shape, np.float32) for shape in shapes])


@pytest.mark.parametrize("name", COPING)
def test_layers_round_trip_through_config_and_keras_file(name, tmp_path, rng):
    inputs = [keras.Input((3, 4)), keras.Input((3,), dtype="bool")]
    layer = COPING[name](name="strategy")
    model = keras.Model(inputs, layer(inputs))
    assert model.output.shape == model([rng.normal(size=(7, 3, 4)), SUBSETS]).shape[:0] + (
        None,
        *model.output.shape[1:],
    )
    _vary(model)
    model.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    assert copy.get_layer("strategy").get_config() == layer.get_config()
    assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()
    assert keras.saving.get_registered_name(type(layer)) == f"kerasmed>{type(layer).__name__}"
    batch, told = [np.float32(rng.normal(size=(7, 3, 4))), SUBSETS], []
    for each in (model, copy):
        _rewind(each)
        told.append([each(batch), each(batch, training=True), *each.losses])
    assert model.output.shape == (None, *told[0][0].shape[1:])
    assert len(told[0]) == (3 if name == "pseudo" else 2)
    for got, expected in zip(told[1], told[0], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_layers_configurations_name_every_argument():
    for layer, expected in (
        (ModalityDropout(0.25, seed=3), {"rate": 0.25, "seed": 3}),
        (DynamicWeights(5, 2), {"units": 5, "num_groups": 2}),
        (PseudoModality(6, 0.5, seed=9), {"units": 6, "loss_weight": 0.5, "seed": 9}),
    ):
        assert expected.items() <= layer.get_config().items()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", COPING)
def test_layers_under_mixed_precision_stay_finite_with_float32_weights(name, policy, rng):
    layer, exact = _made(name, dtype=policy), _made(name)
    available = np.tile(SUBSETS, (2, 1))  # two complete rows, for an error to count
    vectors = np.where(available[..., None], rng.normal(size=(14, 3, 4)), 1e30).astype("float32")
    got = layer([vectors, available], **({"training": True} if name == "pseudo" else {}))
    assert got.dtype == ("float32" if name == "dynamic" else policy.removeprefix("mixed_"))
    assert all(variable.dtype == "float32" for variable in layer.trainable_variables)
    assert all(loss.dtype == "float32" and np.isfinite(loss) and loss > 0 for loss in layer.losses)
    assert len(layer.losses) == (name == "pseudo")
    # Rounded to 11 or 8 bits, of sums of up to 15 products.
    np.testing.assert_allclose(
        np.float32(got), exact([vectors, available]), atol=0.02 if policy == "mixed_float16" else 0.1
    )


def test_refuse_empty_names_the_first_rows_and_lets_others_pass():
    assert modalities.refuse_empty(SUBSETS) is None and modalities.refuse_empty(np.zeros((0, 3))) is None
    rows = np.ones((9, 3), int)
    rows[[0, 2, 3, 5, 7, 8]] = 0
    with pytest.raises(ValueError, match=r"no modality for 6 of 9 rows; .* First rows: \[0, 2, 3, 5, 7\]\.$"):
        modalities.refuse_empty(rows)


# --- ModalityDropout -------------------------------------------------------------------------------------------------


def test_modality_dropout_by_hand(monkeypatch):
    _set_draws(monkeypatch, [[0.1, 0.5, 0.2], [0.1, 0.2, 0.25], [0.9, 0.2, 0.1], [0.3, 0.1, 0.9], [0.9, 0.8, 0.7]])
    available = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 1, 0]], bool)
    kept = ModalityDropout(0.3)(available, training=True)
    # All of the second row would go: its largest stays. In the third a missing one has the largest, and stays missing.
    np.testing.assert_array_equal(kept, [[0, 1, 0], [0, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert kept.dtype == "bool"


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 0.999])
def test_modality_dropout_leaves_one_resurrects_none_and_hides_its_share(rate):
    available = np.repeat(SUBSETS, 3000, axis=0)
    kept = convert_to_numpy(ModalityDropout(rate, seed=1)(available, training=True))
    assert kept.any(axis=1).all() and not (kept & ~available).any()
    for subset in SUBSETS:
        rows, count = kept[(available == subset).all(axis=1)], subset.sum()
        # Each survives with 1 − rate; if none does, of probability rate^count, one of them stays, each as often.
        expected = 1 - rate + rate**count / count
        deviation = np.sqrt(expected * (1 - expected) / 3000)
        np.testing.assert_allclose(rows[:, subset].mean(axis=0), expected, atol=4 * deviation + 1e-12)
        alone = (rows.sum(axis=1) == 1).mean()
        expected = rate**count + count * (1 - rate) * rate ** (count - 1)
        assert alone == pytest.approx(expected, abs=4 * np.sqrt(expected * max(1 - expected, 0) / 3000) + 1e-9)


def test_modality_dropout_draws_modalities_and_rows_apart():
    kept = convert_to_numpy(ModalityDropout(0.5, seed=1)(np.ones((8000, 3), bool), training=True))
    patterns, counts = np.unique(kept, axis=0, return_counts=True)
    # 1/8 for two or three kept, and for each one alone its 1/8 and a third of the 1/8 of none.
    assert len(patterns) == 7
    expected = np.where(patterns.sum(axis=1) == 1, 1 / 6, 1 / 8)
    np.testing.assert_allclose(counts / 8000, expected, atol=4 * np.sqrt(1 / 6 * 5 / 6 / 8000))


def test_modality_dropout_hides_nothing_in_inference_and_at_rate_zero():
    layer = ModalityDropout(0.9, seed=1)
    for kept in (layer(SUBSETS), layer(SUBSETS, training=False), ModalityDropout(0)(SUBSETS, training=True)):
        np.testing.assert_array_equal(kept, SUBSETS)
    for numbers in (SUBSETS * 1.0, SUBSETS * 0.5, SUBSETS.astype("int64")):
        assert layer(numbers).dtype == "bool" and layer(numbers, training=True).dtype == "bool"
        np.testing.assert_array_equal(layer(numbers), SUBSETS)


def test_modality_dropout_leaves_a_row_without_any_as_it_is():
    kept = ModalityDropout(0.5, seed=1)(np.zeros((50, 3), bool), training=True)
    assert not convert_to_numpy(kept).any()


def test_modality_dropout_same_seed_same_draws_other_steps_others():
    rows = np.ones((200, 3), bool)
    first, second = ModalityDropout(0.5, seed=3), ModalityDropout(0.5, seed=3)
    drawn = convert_to_numpy(first(rows, training=True))
    np.testing.assert_array_equal(second(rows, training=True), drawn)
    assert (convert_to_numpy(first(rows, training=True)) != drawn).any()
    assert (convert_to_numpy(ModalityDropout(0.5, seed=4)(rows, training=True)) != drawn).any()


def test_modality_dropout_round_trips_through_keras_file_seed_included(tmp_path):
    inputs = keras.Input((3,), dtype="bool")
    model = keras.Model(inputs, ModalityDropout(0.5, seed=3, name="hidden")(inputs))
    assert model.output.dtype == "bool" and model.output.shape == (None, 3)
    model.save(tmp_path / "m.keras")
    copy, rows = keras.saving.load_model(tmp_path / "m.keras"), np.ones((200, 3), bool)
    assert copy.get_layer("hidden").get_config() == model.get_layer("hidden").get_config()
    assert keras.saving.get_registered_name(ModalityDropout) == "kerasmed>ModalityDropout"
    drawn = convert_to_numpy(model(rows, training=True))
    np.testing.assert_array_equal(copy(rows, training=True), drawn)
    assert not drawn.all()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_modality_dropout_under_mixed_precision_draws_the_same(policy):
    rows = np.ones((200, 3), bool)
    kept = ModalityDropout(0.999, seed=3, dtype=policy)(rows, training=True)
    np.testing.assert_array_equal(kept, ModalityDropout(0.999, seed=3)(rows, training=True))


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, np.nan])
def test_modality_dropout_unfit_rates_are_refused(rate):
    with pytest.raises(ValueError, match=rf"`rate` is {rate}; expected at least 0 .* and below 1"):
        ModalityDropout(rate)


# --- ZeroFilling, NeutralVectors -------------------------------------------------------------------------------------


def test_zero_filling_by_hand():
    vectors = np.float32([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    got = ZeroFilling()([vectors, np.array([[True, False], [False, True]])])
    np.testing.assert_array_equal(got, [[[1, 2], [0, 0]], [[0, 0], [7, 8]]])


def test_neutral_vectors_by_hand():
    vectors, available = np.float32([[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 9], [9, 9]]]), [[1, 0], [0, 1], [1, 0]]
    layer = NeutralVectors()
    np.testing.assert_array_equal(layer([vectors, np.array(available)]), ZeroFilling()([vectors, np.array(available)]))
    layer.neutral.assign([[10, 20], [30, 40]])

    def summed():
        got = layer([vectors, np.array(available)])
        return keras.ops.sum(got * np.float32([[1, 2]])), got

    (_, got), (gradient,) = gradients.of(summed, variables=[layer.neutral])
    np.testing.assert_array_equal(got, [[[1, 2], [30, 40]], [[10, 20], [7, 8]], [[9, 9], [30, 40]]])
    # The first modality is missing once, the second twice.
    np.testing.assert_array_equal(gradient, [[1, 2], [2, 4]])


# --- DynamicWeights --------------------------------------------------------------------------------------------------


def test_dynamic_weights_by_hand():
    layer = DynamicWeights(1, 2)
    layer.build([(None, 3, 2), (None, 3)])
    # Hidden: tanh(artanh 1/2) = 1/2 of the first modality, 0 of the others; a score of 2 ln 3 makes ln 3 of it.
    layer.kernel.assign(np.float32([[[np.arctanh(0.5)], [0]], [[0], [0]], [[0], [0]]]))
    layer.score.assign(np.float32([[[2 * np.log(3), 0]], [[7, 7]], [[-7, -7]]]))
    layer.bias.assign(np.float32([[0, 0, 0], [0, np.log(2), 0]]))
    vectors = np.float32([[[1, 5], [2, 2], [3, 3]]] * 3)
    got = convert_to_numpy(layer([vectors, np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0]], bool)]))
    expected = [[[3 / 5, 1 / 5, 1 / 5], [1 / 4, 1 / 2, 1 / 4]], [[3 / 4, 0, 1 / 4], [1 / 2, 0, 1 / 2]], [[0, 1, 0]] * 2]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (got[1, :, 1] == 0).all() and (got[2] == [0, 1, 0]).all()


def test_dynamic_weights_sum_to_one_and_keep_their_ratios_whatever_is_missing(rng):
    layer = _made("dynamic")
    vectors = np.repeat(rng.normal(size=(20, 1, 3, 4)), 7, axis=1).astype("float32")
    available = np.broadcast_to(SUBSETS, (20, 7, 3))
    weights = convert_to_numpy(layer([vectors.reshape(140, 3, 4), available.reshape(140, 3)])).reshape(20, 7, 2, 3)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    there = np.broadcast_to(available[:, :, None], weights.shape)
    assert (weights[~there] == 0).all() and (weights[there] > 0).all()
    for first, second in ((0, 1), (0, 2), (1, 2)):
        both = SUBSETS[:, first] & SUBSETS[:, second]
        ratios = weights[:, both][..., first] / weights[:, both][..., second]
        np.testing.assert_allclose(ratios[:, 1:], ratios[:, :1], rtol=1e-6)
        assert ratios.std() > 0.1
    # A score goes by its own modality's vector: the ratio of the others does not know of it.
    vectors[:, :, 0] += 3
    moved = convert_to_numpy(layer([vectors.reshape(140, 3, 4), available.reshape(140, 3)])).reshape(20, 7, 2, 3)
    assert np.abs(moved - weights)[:, 0].max() > 0.1
    np.testing.assert_allclose(
        moved[:, 0, :, 1] / moved[:, 0, :, 2], weights[:, 0, :, 1] / weights[:, 0, :, 2], rtol=1e-6
    )


def test_dynamic_weights_begin_without_bias_and_differ_by_group_and_modality(rng):
    keras.utils.set_random_seed(1)
    layer = DynamicWeights(8, 2)
    vectors = np.repeat(rng.normal(0, 3, (1, 1, 4)), 3, axis=1).astype("float32")
    weights = convert_to_numpy(layer([vectors, np.ones((1, 3), bool)]))[0]
    # The same vector in each modality: what differs is the weights of each.
    assert np.diff(np.sort(weights.ravel())).min() > 1e-3 and (convert_to_numpy(layer.bias) == 0).all()
    zeros = layer([vectors * 0, np.array([[1, 0, 1]], bool)])
    np.testing.assert_allclose(zeros, [[[0.5, 0, 0.5]] * 2], rtol=1e-6)


@pytest.mark.parametrize("arguments", [(0, 1), (4, 0)])
def test_dynamic_weights_without_units_or_groups_are_refused(arguments):
    with pytest.raises(ValueError, match=rf"`units` is {arguments[0]} and `num_groups` {arguments[1]}"):
        DynamicWeights(*arguments)


# --- PseudoModality --------------------------------------------------------------------------------------------------


def _two_by_hand(**options):
    """Two modalities of one number: h = relu(x_1 + 2 x_2 + f_1 − f_2), predicted (2 h − 1, h / 2 + 1)."""
    layer = PseudoModality(1, **options)
    layer.build([(None, 2, 1), (None, 2)])
    layer.hidden.set_weights([np.float32([[1], [2], [1], [-1]]), np.zeros(1)])
    layer.predicted.set_weights([np.float32([[2, 0.5]]), np.float32([-1, 1])])
    return layer


def test_pseudo_modality_by_hand():
    vectors = np.float32([[[3], [99]], [[99], [2]], [[7], [8]], [[-5], [99]]])
    got = _two_by_hand()([vectors, np.array([[1, 0], [0, 1], [1, 1], [1, 0]], bool)])
    # h = 3 + 1, then 2 · 2 − 1; the third row is complete; h = relu(−5 + 1) = 0.
    np.testing.assert_allclose(got[..., 0], [[3, 3], [5, 2], [7, 8], [-5, 1]], rtol=1e-6)


def test_pseudo_modality_error_by_hand(monkeypatch):
    layer = _two_by_hand(loss_weight=0.5)
    _set_draws(monkeypatch, [[0.1, 0.9], [0.8, 0.7], [0.2, 0.1]])
    vectors = np.float32([[[0], [1]], [[2], [5]], [[7], [99]]])
    layer([vectors, np.array([[1, 1], [1, 1], [1, 0]], bool)], training=True)
    # Two complete rows, variances 1 and 4. In the first, x_1 is hidden: h = 2 − 1, predicted 1 for 0. In the second,
    # x_2, whose draw is the smaller though it is over a half: h = 2 + 1, predicted 2.5 for 5.
    np.testing.assert_allclose(layer.losses, [0.5 * (1 / 1 + 2.5**2 / 4) / 2], rtol=2e-6)  # 1e-6 added to variances


def test_pseudo_modality_error_of_predicting_the_mean_is_one(rng):
    mean, away = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = _made("pseudo")
    layer.predicted.set_weights([np.zeros((16, 12)), mean.ravel()])
    # Rows as far above as below the mean: the squared distance of each is the variance, all features together.
    vectors = np.stack([mean + away, mean - away] * 5)
    layer([vectors, np.ones((10, 3), bool)], training=True)
    np.testing.assert_allclose(layer.losses, [0.7], rtol=1e-5)


def test_pseudo_modality_hides_some_and_never_all_while_it_learns(rng, monkeypatch):
    layer, asked = _made("pseudo"), []
    predict = layer._predict
    monkeypatch.setattr(
        layer,
        "_predict",
        lambda known, kept: asked.append((convert_to_numpy(known), convert_to_numpy(kept))) or predict(known, kept),
    )
    layer([rng.normal(size=(6000, 3, 4)).astype("float32"), np.ones((6000, 3), bool)], training=True)
    known, kept = next(each for each in asked if not each[1].all())
    patterns, counts = np.unique(kept, axis=0, return_counts=True)
    assert len(patterns) == 6 and counts.min() > 500  # all but none and all, each often
    assert (known[~kept] == 0).all() and (known[kept] != 0).all()


def _of_error(layer, masks, vectors):
    """A layer's own loss in training, and its gradients by the vectors and the weights."""

    def error(x):
        layer([x, *masks], training=True)
        return sum(layer.losses)

    return gradients.of(error, vectors, layer.trainable_variables)


def test_pseudo_modality_error_moves_its_weights_and_never_the_vectors(rng):
    layer, x = _made("pseudo"), rng.normal(size=(7, 3, 4)).astype("float32")
    available = SUBSETS | (np.arange(7) < 3)[:, None]
    for masks in ([available], [SUBSETS, available]):
        found = _of_error(layer, masks, [x])[1]
        assert (found[0] is None or (found[0] == 0).all()) and len(found) == 5
        assert all(np.abs(gradient).max() > 1e-3 for gradient in found[1:])


def test_pseudo_modality_learns_from_complete_rows_alone(rng):
    layer, vectors = _made("pseudo"), rng.normal(size=(7, 3, 4)).astype("float32")
    available = SUBSETS | (np.arange(7) < 3)[:, None]
    results = []
    for shift in (0, 10):  # of the rows that are not complete, where they have something
        _rewind(layer)
        shifted = vectors + np.float32(shift) * ~available.all(axis=1)[:, None, None]
        loss, (_, *found) = _of_error(layer, [available], [shifted])
        results.append([loss, *found])
    assert results[0][0] > 0.01
    for got, expected in zip(*results):
        np.testing.assert_array_equal(got, expected)


def test_pseudo_modality_without_complete_rows_adds_nothing(rng):
    layer, vectors = _made("pseudo"), rng.normal(size=(6, 3, 4)).astype("float32")
    loss, (_, *found) = _of_error(layer, [SUBSETS[1:]], [vectors])
    assert loss == 0 and all((gradient == 0).all() for gradient in found)
    layer([vectors, SUBSETS[1:]], training=True)
    assert len(layer.losses) == 1


@pytest.mark.parametrize("complete", [1, 5])
def test_pseudo_modality_error_stays_bounded_where_nothing_varies(complete, rng):
    # One complete row, or several alike: no variance to divide by. One such batch must not outweigh all others.
    vectors = np.repeat(rng.normal(size=(1, 3, 4)), 8, axis=0).astype("float32")
    layer, available = _made("pseudo"), np.ones((8, 3), bool)
    available[complete:, 0] = False
    layer([vectors, available], training=True)
    assert 0 <= float(sum(layer.losses)) < 1000


def test_pseudo_modality_learns_what_dropout_has_hidden(rng):
    vectors = rng.normal(size=(6, 3, 4)).astype("float32")
    losses = []
    for inputs in ([np.ones_like(SUBSETS[1:])], [SUBSETS[1:], np.ones_like(SUBSETS[1:])], [SUBSETS[1:]]):
        layer = _made("pseudo")
        told = layer([vectors, *inputs], training=True)
        losses.append(float(layer.losses[0]))
    assert losses[0] == losses[1] > 0.01 and losses[2] == 0
    # What is handed on goes by `available` all the same.
    np.testing.assert_array_equal(layer([vectors, SUBSETS[1:], np.ones_like(SUBSETS[1:])], training=True), told)


def test_pseudo_modality_values_that_are_not_present_change_no_bit(rng):
    layer, vectors = _made("pseudo"), rng.normal(size=(8, 3, 4)).astype("float32")
    present = np.array([[1, 1, 1]] * 4 + [[1, 1, 0]] * 4, bool)
    available = present & (rng.random((8, 3)) < 0.6)
    available[:, 1] = True
    results = []

    def squared(x):
        y = layer([x, available, present], training=True)
        return keras.ops.sum(y**2) + sum(layer.losses), y

    for odd in (0.0, *ODD):
        _rewind(layer)
        x = np.where(present[..., None], vectors, np.float32(odd))
        (loss, y), found = gradients.of(squared, [x], layer.trainable_variables)
        results.append([y, loss, *found])
    assert (results[0][2][~available] == 0).all() and (available != present).any()
    for result in results:
        assert np.isfinite(result[1])
        for got, expected in zip(result, results[0]):
            np.testing.assert_array_equal(got, expected)


def test_pseudo_modality_adds_no_loss_in_inference_or_of_no_weight(rng):
    vectors, rows = rng.normal(size=(5, 3, 4)).astype("float32"), np.ones((5, 3), bool)
    layer = _made("pseudo")
    layer([vectors, rows], training=True)
    assert len(layer.losses) == 1
    layer([vectors, rows], training=False)
    assert layer.losses == []
    layer([vectors, rows])
    assert layer.losses == []
    unweighted = PseudoModality(4, 0)
    unweighted([vectors, rows], training=True)
    assert unweighted.losses == []


def test_pseudo_modality_learns_to_predict_what_follows_from_the_others(rng):
    a, b = rng.normal(size=(2, 4, 4))

    def drawn(count):
        first, second = rng.normal(size=(2, count, 4))
        return np.stack([first, second, first @ a + second @ b], axis=1).astype("float32")

    keras.utils.set_random_seed(1)
    layer = PseudoModality(64, seed=1)
    inputs = [keras.Input((3, 4)), keras.Input((3,), dtype="bool")]
    learner = keras.Model(inputs, layer(inputs))
    learner.compile(keras.optimizers.Adam(0.01))

    new = drawn(500)
    available, told = np.array([[True, True, False]] * 500), []
    for steps in (0, 400):
        for _ in range(steps):
            learner.train_on_batch([drawn(256), np.ones((256, 3), bool)])
        told.append(convert_to_numpy(layer([new, available]))[:, 2])
    before, after = (
        1 - np.square(each - new[:, 2]).sum() / np.square(new[:, 2] - new[:, 2].mean(0)).sum() for each in told
    )
    assert before < 0.1 and after > 0.9


@pytest.mark.parametrize(
    ("arguments", "told"), [((0, 1.0), "0 and `loss_weight` 1.0"), ((4, -1), "4 and `loss_weight` -1")]
)
def test_pseudo_modality_unfit_arguments_are_refused(arguments, told):
    with pytest.raises(ValueError, match=f"`units` is {told}"):
        PseudoModality(*arguments)


def test_pseudo_modality_of_one_modality_is_refused():
    with pytest.raises(ValueError, match="got 1 modality; expected at least 2"):
        PseudoModality(4)([np.ones((2, 1, 4), np.float32), np.ones((2, 1), bool)])


# --- graded_fusion ---------------------------------------------------------------------------------------------------

GROUPS = {"canal": 5, "foraminal": 10, "subarticular": 10}
NAMES = ("t1", "t2", "axial")
EACH = [(architecture, strategy) for architecture in modalities.ARCHITECTURES for strategy in modalities.STRATEGIES]
_each = pytest.mark.parametrize(("architecture", "strategy"), EACH)


def _fused(architecture, strategy, **options):
    keras.utils.set_random_seed(1)
    sizes = {"width": 16, "attention_units": 8, "units": 16}
    return _vary(
        modalities.graded_fusion(GROUPS, NAMES, 4, 6, architecture=architecture, strategy=strategy, **sizes | options)
    )


@pytest.fixture(scope="module")
def fused():
    """Function of architecture and strategy: the model, built once, with its generators at their beginning."""
    built = {}

    def get(*kind):
        if kind not in built:
            built[kind] = _fused(*kind, modality_dropout=0.3, l2=1e-3)
        _rewind(built[kind])
        return built[kind]

    return get


@pytest.fixture
def batch(rng):
    """Two rows of every subset, with 1 to 4 slices anywhere, and values where there is none, too."""
    available = np.repeat(SUBSETS, 2, axis=0)
    mask = rng.random((14, 3, 4)) < 0.6
    mask[..., 1] |= ~mask.any(axis=-1)
    return {"slices": rng.normal(size=(14, 3, 4, 6)).astype("float32"), "slice_mask": mask, "available": available}


def _there(batch):
    """Which slices are there, (batch, M, S)."""
    return batch["slice_mask"] & batch["available"][..., None]


@_each
def test_graded_fusion_gives_grades_that_what_is_missing_does_not_move_by_a_bit(architecture, strategy, fused, batch):
    model, there = fused(architecture, strategy), _there(batch)
    told, results = [], []

    def summed(slices):
        given = {name: keras.ops.convert_to_tensor(array) for name, array in batch.items()}
        y = model(given | {"slices": slices}, training=True)
        return keras.ops.sum(keras.ops.log(y[..., 0])) + sum(model.losses), y

    for odd in (0.0, np.nan, np.inf, 1e30):
        inputs = batch | {"slices": np.where(there[..., None], batch["slices"], np.float32(odd))}
        told.append(convert_to_numpy(model(inputs)))
        _rewind(model)
        (loss, y), found = gradients.of(summed, [inputs["slices"]], model.trainable_variables)
        results.append([y, loss, *found])
    assert told[0].shape == (14, 25, 3) and told[0].dtype == np.float32
    np.testing.assert_allclose(told[0].sum(axis=-1), 1, atol=1e-6)
    assert told[0].std(axis=0).max(axis=-1).min() > 1e-3  # no target is told the same of all rows
    by_slices = results[0][2]
    # In training three modalities in ten are hidden besides: of these few rows, by each backend's draws, up to half.
    assert (by_slices[~there] == 0).all() and (np.abs(by_slices[there]).max(axis=-1) > 0).mean() > 0.4
    for each, result in zip(told, results):
        np.testing.assert_array_equal(each, told[0])
        assert all(np.abs(gradient).max() > 0 for gradient in result[3:])
        for got, expected in zip(result, results[0]):
            assert np.isfinite(got).all()
            np.testing.assert_array_equal(got, expected)


@_each
def test_graded_fusion_round_trips_through_keras_file(architecture, strategy, fused, batch, tmp_path):
    model = fused(architecture, strategy)
    batch["available"] = np.concatenate([batch["available"][:-1], [[False] * 3]])
    model.save(tmp_path / "m.keras")
    copy, expected = keras.saving.load_model(tmp_path / "m.keras"), convert_to_numpy(model(batch))
    np.testing.assert_array_equal(copy(batch), expected)
    np.testing.assert_array_equal(np.isnan(expected).any(axis=(1, 2)), np.arange(14) == 13)
    np.testing.assert_allclose(copy.predict(batch, verbose=0), expected, atol=1e-6)  # as a graph, whose sums differ
    assert copy.get_layer("hidden_modalities").rate == 0.3 and copy.name == f"{architecture}_{strategy}"
    for got, told in zip(
        modalities.strategy_parts(copy)(batch).values(), modalities.strategy_parts(model)(batch).values()
    ):
        np.testing.assert_array_equal(got, told)


@_each
def test_graded_fusion_not_available_and_without_slices_are_one(architecture, strategy, fused, batch):
    model, expected = fused(architecture, strategy), None
    expected = convert_to_numpy(model(batch))  # not available, with slices there
    masked = {**batch, "slice_mask": _there(batch), "available": np.ones_like(batch["available"])}
    np.testing.assert_array_equal(model(masked), expected)
    np.testing.assert_array_equal(model(batch | {"slice_mask": _there(batch)}), expected)
    # They do count where they are available.
    everything = convert_to_numpy(model(batch | {"available": np.ones_like(batch["available"])}))
    assert (np.abs(everything - expected).max(axis=(1, 2))[2:] > 1e-4).all()
    np.testing.assert_array_equal(everything[:2], expected[:2])


@_each
def test_graded_fusion_of_a_row_without_any_modality_is_nan_there_alone(architecture, strategy, fused, batch):
    model = fused(architecture, strategy)
    expected = convert_to_numpy(model(batch))
    batch["available"][3] = False
    batch["available"][5], batch["slice_mask"][5, 0] = [True, False, False], False  # its only one has no slice
    for training in (False, True):
        got = convert_to_numpy(model(batch, training=training))
        np.testing.assert_array_equal(np.isnan(got).all(axis=(1, 2)), np.isin(np.arange(14), [3, 5]))
        assert np.isfinite(got[np.isin(np.arange(14), [3, 5], invert=True)]).all()
    others = np.isin(np.arange(14), [3, 5], invert=True)
    np.testing.assert_array_equal(convert_to_numpy(model(batch))[others], expected[others])


def _relu(x):
    return np.maximum(x, 0)


def _softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def _network(model, name, x):
    """Logits (batch, targets, 3) of one network, by NumPy."""
    kernel, bias = model.get_layer(f"{name}_hidden").get_weights()
    x = _relu(x @ kernel + bias)
    kernel, bias = model.get_layer(f"{name}_scores").get_weights()
    return (x @ kernel + bias).reshape(len(x), -1, 3)


def _convolved(model, x):
    """(batch, 3, width) -> (batch, units): two convolutions of three places, the first padded by one on each side."""
    kernel, bias = model.get_layer("fusion_mix").get_weights()
    x = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    x = _relu(sum(x[:, k : k + 3] @ kernel[k] for k in range(3)) + bias)
    kernel, bias = model.get_layer("fusion_join").get_weights()
    return _relu(sum(x[:, k] @ kernel[k] for k in range(3)) + bias)


@_each
def test_graded_fusion_makes_of_its_parts_what_it_says(architecture, strategy, fused, batch):
    model, available = fused(architecture, strategy), batch["available"]
    parts = {name: convert_to_numpy(part) for name, part in modalities.strategy_parts(model)(batch).items()}
    assert parts["vectors"].shape == (14, 3, 16)
    vectors, weights = parts["coped"], None
    if strategy == "dynamic":
        weights = parts["coped"]
        assert weights.shape == (14, 3 if architecture == "late" else 1, 3)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
        assert (weights[np.broadcast_to(~available[:, None], weights.shape)] == 0).all()
        vectors = np.where(available[..., None], parts["vectors"], 0)
    else:
        np.testing.assert_array_equal(vectors[available], parts["vectors"][available])
        if strategy == "zero":
            assert (vectors[~available] == 0).all()
        if strategy == "neutral":
            neutral = np.broadcast_to(model.get_layer("strategy").neutral, vectors.shape)
            np.testing.assert_array_equal(vectors[~available], neutral[~available])
    if architecture == "late":
        each = np.stack([_network(model, f"{name}network", vectors[:, m]) for m, name in enumerate(NAMES)], axis=1)
        if weights is None:
            logits = each.mean(axis=1)
        else:
            logits, start = np.empty_like(each[:, 0]), 0
            for group, number in enumerate(GROUPS.values()):
                columns = slice(start, start + number)
                logits[:, columns] = (weights[:, group, :, None, None] * each[:, :, columns]).sum(axis=1)
                start += number
    else:
        x = _convolved(model, vectors if weights is None else vectors * 3 * weights[:, 0, :, None])
        names = ["network"] if architecture == "joint" else [f"{name}network" for name in GROUPS]
        logits = np.concatenate([_network(model, name, x) for name in names], axis=1)
    np.testing.assert_allclose(model(batch), _softmax(logits), atol=2e-6)


def test_graded_fusion_late_and_dynamic_with_one_modality_is_its_network_alone(fused, batch):
    model = fused("late", "dynamic")
    vectors = convert_to_numpy(modalities.strategy_parts(model)(batch)["vectors"])
    told = convert_to_numpy(model(batch))
    for row, modality in ((8, 0), (9, 0), (10, 1), (11, 1), (12, 2), (13, 2)):
        assert batch["available"][row].tolist() == [each == modality for each in range(3)]
        alone = _network(model, f"{NAMES[modality]}network", vectors[row : row + 1, modality])
        np.testing.assert_allclose(told[row], _softmax(alone)[0], atol=1e-6)


@pytest.mark.parametrize("architecture", ["joint", "grouped"])
def test_graded_fusion_dynamic_with_equal_weights_changes_nothing(architecture, fused, batch):
    dynamic, zero = _fused(architecture, "dynamic"), fused(architecture, "zero")
    ours = {variable.path: variable for variable in zero.trainable_variables}
    for variable in dynamic.trainable_variables:
        strategy = variable.path.startswith("strategy/")
        variable.assign(np.zeros(variable.shape) if strategy else ours.pop(variable.path))
    assert not ours
    complete = batch | {"available": np.ones((14, 3), bool)}
    np.testing.assert_allclose(dynamic(complete), zero(complete), atol=1e-6)
    # With one of three missing the others weigh a half each, of which three times is one and a half.
    parts = modalities.strategy_parts(dynamic)(batch)
    np.testing.assert_allclose(parts["coped"][2, 0], [0.5, 0.5, 0], atol=1e-6)
    assert np.abs(dynamic(batch) - zero(batch))[2:].max() > 1e-3


@pytest.mark.parametrize("strategy", ["zero", "dynamic"])
def test_graded_fusion_networks_of_groups_move_their_own_targets(strategy, fused, batch):
    model, start = fused("grouped", strategy), 0
    before = convert_to_numpy(model(batch))
    for name, number in GROUPS.items():
        bias = model.get_layer(f"{name}network_scores").bias
        kept = convert_to_numpy(bias)
        assert kept.shape == (number * 3,)
        bias.assign(kept + np.tile([2, 0, 0], number))
        moved = np.abs(convert_to_numpy(model(batch)) - before).max(axis=(0, 2)) > 1e-3
        bias.assign(kept)
        np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(start, start + number))
        start += number


def test_graded_fusion_late_and_dynamic_weighs_each_group_of_targets_apart(fused, batch):
    model, start = fused("late", "dynamic"), 0
    before, bias = convert_to_numpy(model(batch)), model.get_layer("strategy").bias
    kept = convert_to_numpy(bias)
    for group, number in enumerate(GROUPS.values()):
        bias.assign(kept + 3 * (np.arange(3) == group)[:, None] * [1, 0, 0])
        moved = np.abs(convert_to_numpy(model(batch)) - before).max(axis=(0, 2)) > 1e-3
        np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(start, start + number))
        start += number
    bias.assign(kept)


def test_graded_fusion_slices_compete_but_in_the_joint_one(fused, batch):
    for architecture in modalities.ARCHITECTURES:
        model = fused(architecture, "zero")
        pool = keras.Model(model.inputs, [model.get_layer(f"{name}_pooled").output[1] for name in NAMES])
        sums = np.stack(pool(batch), axis=1).sum(axis=-1)
        assert (sums[~batch["available"]] == 0).all()
        there = sums[batch["available"]]
        assert (there < 0.99).all() if architecture == "joint" else np.allclose(there, 1, rtol=1e-6)


def test_graded_fusion_branches_read_their_own_slices(fused, batch):
    parts = modalities.strategy_parts(fused("grouped", "zero"))
    before = convert_to_numpy(parts(batch)["vectors"])
    for place in range(3):
        slices = batch["slices"].copy()
        slices[:, place] = slices[:, place, :, ::-1]
        moved = np.abs(convert_to_numpy(parts(batch | {"slices": slices})["vectors"]) - before).max(axis=(0, 2))
        np.testing.assert_array_equal(moved > 1e-3, np.arange(3) == place)


@pytest.mark.parametrize(("architecture", "strategy"), [("late", "zero"), ("late", "dynamic"), ("joint", "neutral")])
def test_graded_fusion_hides_modalities_in_training_alone(architecture, strategy, batch):
    model = _fused(architecture, strategy, modality_dropout=0.999, dropout=0.0)
    batch = {name: np.tile(each[:2], (15, *[1] * (each.ndim - 1))) for name, each in batch.items()}  # all complete
    alone = np.stack([model(batch | {"available": batch["available"] & (np.arange(3) == m)}) for m in range(3)])
    drawn = convert_to_numpy(model(batch, training=True))
    nearest = np.abs(alone - drawn).max(axis=(2, 3))
    assert nearest.min(axis=0).max() < 1e-6 and len(set(nearest.argmin(axis=0))) == 3
    assert np.abs(model(batch) - alone).max(axis=(2, 3)).min() > 1e-4


def test_graded_fusion_pseudo_learns_from_what_dropout_hides_and_leaves_the_branches_alone(batch):
    model = _fused("joint", "pseudo", modality_dropout=0.999)
    own = {variable.path for variable in model.get_layer("strategy").trainable_variables}
    for available, learns in ((np.ones((14, 3), bool), True), (np.array([[True, True, False]] * 14), False)):

        def error(available=available):
            model(batch | {"available": available}, training=True)
            return sum(model.losses), len(model.losses)

        (loss, count), found = gradients.of(error, variables=model.trainable_variables)
        assert count == 1 and (loss > 0.01 if learns else loss == 0)
        pairs = zip(model.trainable_variables, found)
        moved = {variable.path for variable, gradient in pairs if gradient is not None and np.abs(gradient).max() > 0}
        assert moved == (own if learns else set())
    model(batch)
    assert model.losses == []


@pytest.mark.parametrize("architecture", modalities.ARCHITECTURES)
def test_graded_fusion_l2_is_of_convolutions_and_networks(architecture, fused, batch):
    model = fused(architecture, "neutral")
    model(batch)
    kernels = [
        variable
        for variable in model.trainable_variables
        if variable.path.endswith("/kernel") and ("network_" in variable.path or "fusion_" in variable.path)
    ]
    assert len(kernels) == {"joint": 4, "grouped": 8, "late": 6}[architecture]
    expected = 1e-3 * sum(np.square(convert_to_numpy(kernel)).sum() for kernel in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    assert _fused(architecture, "neutral").losses == []


def test_graded_fusion_weights_by_hand():
    # A branch: 2 · 6 of the norm, 6 · 16 + 16, V and U of 16 · 8 each and w of 8. A network of n targets from 16:
    # 16 · 16 + 16, 16 · 3 n + 3 n. Convolutions: 3 · 16 · 16 + 16, twice.
    branches = 3 * (2 * 6 + 6 * 16 + 16 + 2 * 16 * 8 + 8)
    convolutions, hidden, scores = 2 * (3 * 16 * 16 + 16), 16 * 16 + 16, 17 * 3 * 25
    cores = {
        "joint": convolutions + hidden + scores,
        "grouped": convolutions + 3 * hidden + scores,
        "late": 3 * (hidden + scores),
    }
    for architecture, core in cores.items():
        groups = 3 if architecture == "late" else 1
        ways = {
            "zero": 0,
            "neutral": 3 * 16,
            "dynamic": 3 * 16 * 16 + 3 * 16 * groups + 3 * groups,
            "pseudo": (3 * 16 + 3) * 16 + 16 + 16 * 3 * 16 + 3 * 16,
        }
        for strategy, way in ways.items():
            model = modalities.graded_fusion(
                GROUPS, NAMES, 4, 6, architecture=architecture, strategy=strategy, width=16, attention_units=8, units=16
            )
            assert sum(np.prod(each.shape) for each in model.trainable_variables) == branches + core + way


@pytest.mark.filterwarnings("ignore:You are using a softmax over axis -1")
def test_graded_fusion_of_one_modality_one_group_and_two_grades(rng):
    inputs = {
        "slices": rng.normal(size=(2, 1, 4, 6)).astype("float32"),
        "slice_mask": np.ones((2, 1, 4), bool),
        "available": np.ones((2, 1), bool),
    }
    for architecture in modalities.ARCHITECTURES:
        for strategy in ("zero", "dynamic"):
            model = modalities.graded_fusion(
                {"canal": 1},
                ["t2"],
                4,
                6,
                architecture=architecture,
                strategy=strategy,
                num_grades=2,
                width=16,
                units=16,
            )
            told = convert_to_numpy(model(inputs))
            assert told.shape == (2, 1, 2) and np.isfinite(told).all()


def test_graded_fusion_standardises_by_the_moments_of_a_modality(rng):
    moments = {"t2": (rng.normal(size=6), rng.uniform(0.5, 2, 6))}
    model = _fused("joint", "zero", moments=moments)
    assert isinstance(model.get_layer("t2_norm"), keras.layers.Normalization)
    for name in ("t1", "axial"):
        assert isinstance(model.get_layer(f"{name}_norm"), keras.layers.LayerNormalization)
    mean, variance = moments["t2"]
    slices = rng.normal(size=(2, 4, 6)).astype("float32")
    np.testing.assert_allclose(
        model.get_layer("t2_norm")(slices), (slices - mean) / np.sqrt(6 * variance), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "strategy"),
    [("joint", "dynamic"), ("grouped", "neutral"), ("late", "pseudo"), ("late", "dynamic")],
)
def test_graded_fusion_under_mixed_precision_ends_in_float32(architecture, strategy, policy, fused, batch):
    exact = fused(architecture, strategy)
    keras.config.set_dtype_policy(policy)
    try:
        model = _fused(architecture, strategy)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("t1_embed").compute_dtype == policy.removeprefix("mixed_")
    assert all(variable.dtype == "float32" for variable in model.trainable_variables)
    batch["slices"][~_there(batch)] = 1e30
    told = model(batch)
    assert told.dtype == "float32" and model.get_layer("logits").output.dtype == "float32"
    np.testing.assert_allclose(np.sum(told, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(told, exact(batch), atol=0.02 if policy == "mixed_float16" else 0.1)
    assert np.isfinite(model(batch, training=True)).all() and all(np.isfinite(loss) for loss in model.losses)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "early"}, "`architecture` is 'early'; expected one of joint, grouped, late"),
        ({"strategy": "mean"}, "`strategy` is 'mean'; expected one of zero, neutral, dynamic, pseudo"),
        ({"groups": {}}, "`groups` are {}; expected at least one"),
        ({"groups": {"canal": 5, "a b": 1, "late": 0}}, r"First unfit: \['a b', 'late'\]"),
        ({"modalities": []}, r"`modalities` are \[\]; expected at least one"),
        ({"modalities": ["t1", "t2", "t1"]}, r"`modalities` are .*; expected .* each but once"),
        ({"modalities": ["t1", "Axial T2"]}, r"`modalities` are \['t1', 'Axial T2'\]; expected .* names like 'axial'"),
        ({"modalities": ["t1", "canal"]}, r"\['canal'\] are names of modalities and of groups"),
        ({"num_slices": 0}, "`num_slices` is 0, `num_features` 6 and `num_grades` 3"),
        ({"num_features": 0}, "`num_features` 0 and"),
        ({"num_grades": 1}, "`num_grades` 1; expected at least 1 \\(or None\\), 1 and 2"),
        ({"modality_dropout": 1.0}, "`rate` is 1.0"),
        ({"modalities": ["t1"], "strategy": "pseudo"}, "got 1 modality; expected at least 2"),
    ],
)
def test_graded_fusion_unfit_arguments_are_refused(changed, message):
    arguments = {"groups": GROUPS, "modalities": NAMES, "num_slices": 4, "num_features": 6}
    with pytest.raises(ValueError, match=message):
        modalities.graded_fusion(**arguments | changed)


def test_strategy_parts_share_weights_and_say_nothing_of_another_model(fused, batch):
    model = fused("joint", "neutral")
    parts, neutral = modalities.strategy_parts(model), model.get_layer("strategy").neutral
    assert parts.name == "joint_neutral_parts"
    kept = convert_to_numpy(neutral)
    neutral.assign(kept + 1)
    got = convert_to_numpy(parts(batch)["coped"])
    neutral.assign(kept)
    missing = ~batch["available"]
    np.testing.assert_array_equal(got[missing], np.broadcast_to(kept + 1, got.shape)[missing])
    inputs = keras.Input((4,))
    for odd in (keras.layers.Dense(2)(inputs), keras.layers.Dense(2, name="strategy")(inputs)):
        with pytest.raises(
            ValueError, match="the model 'plain' has no layer 'strategy'; expected one of `graded_fusion`"
        ):
            modalities.strategy_parts(keras.Model(inputs, odd, name="plain"))


# --- learn_pseudo ----------------------------------------------------------------------------------------------------


def _learnable(rng):
    """A model that copes by "pseudo", and complete cases whose third vector follows from the first two."""
    first, second = rng.normal(size=(2, 64, 16))
    vectors = np.stack([first, second, first - second], axis=1).astype("float32")
    options = {"width": 16, "attention_units": 4, "units": 32}
    return modalities.graded_fusion({"grades": 2}, ("a", "b", "c"), 2, 3, strategy="pseudo", **options), vectors


def test_learn_pseudo_teaches_the_cross_modal_network_and_nothing_else(rng):
    model, vectors = _learnable(rng)
    layer = model.get_layer("strategy")
    before = {variable.path: np.array(variable) for variable in model.trainable_variables}
    errors = modalities.learn_pseudo(model, vectors, epochs=60, learning_rate=0.01)
    moved = {path for path, value in before.items() if not np.array_equal(value, np.array(_variable(model, path)))}
    assert len(errors) == 60 and errors[-1] < 0.6 * errors[0]
    assert moved == {variable.path for variable in layer.trainable_variables}
    available = np.tile([True, True, False], (64, 1))
    told = np.array(layer([vectors, available]))[:, 2]
    assert 1 - ((told - vectors[:, 2]) ** 2).sum() / ((vectors[:, 2] - vectors[:, 2].mean(axis=0)) ** 2).sum() > 0.5


def test_learn_pseudo_is_the_same_whatever_was_learnt_before(rng):
    model, vectors = _learnable(rng)
    options = {"epochs": 3, "seed": 7}
    first = modalities.learn_pseudo(model, vectors, **options)
    weights = model.get_layer("strategy").get_weights()
    np.testing.assert_array_equal(modalities.learn_pseudo(model, vectors, **options), first)
    for one, other in zip(weights, model.get_layer("strategy").get_weights()):
        np.testing.assert_array_equal(one, other)
    assert modalities.learn_pseudo(model, vectors, epochs=3, seed=8) != first


def test_learn_pseudo_refuses_other_strategies_and_no_cases(rng):
    model, vectors = _learnable(rng)
    with pytest.raises(ValueError, match="there are 0 complete cases"):
        modalities.learn_pseudo(model, vectors[:0])
    other = modalities.graded_fusion({"grades": 2}, ("a", "b"), 2, 3, strategy="neutral")
    with pytest.raises(ValueError, match="copes by NeutralVectors"):
        modalities.learn_pseudo(other, vectors)


def _variable(model, path):
    return next(variable for variable in model.trainable_variables if variable.path == path)


def test_graded_fusion_of_any_number_of_slices_answers_alike_whatever_the_padding(rng):
    options = {"architecture": "late", "strategy": "dynamic", "width": 16, "units": 16, "attention_units": 4}
    model = modalities.graded_fusion({"grades": 2}, ("a", "b"), None, 3, **options)
    slices, available = rng.normal(size=(4, 2, 5, 3)).astype("float32"), np.ones((4, 2), bool)
    mask = np.ones((4, 2, 5), bool)
    mask[0, 0, 2:] = mask[1, 1, 1:] = False
    told = model.predict({"slices": slices, "slice_mask": mask, "available": available}, verbose=0)
    wider = np.pad(slices, ((0, 0), (0, 0), (0, 11), (0, 0)), constant_values=np.nan)
    wide = {"slices": wider, "slice_mask": np.pad(mask, ((0, 0), (0, 0), (0, 11))), "available": available}
    # Sums over more places are in another order.
    np.testing.assert_allclose(model.predict(wide, verbose=0), told, atol=1e-6)
