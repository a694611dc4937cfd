import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from kerasmed import fusion, losses, models
from tests import gradients

MEANS, SCALES = [50.0, 0.5, 3.0], [10.0, 0.5, 2.0]


def _dense(units=4, means=MEANS, scales=SCALES, **options):
    layer = fusion.TabularDense(units, means, scales, **options)
    layer.build((None, len(means)))
    return layer


def _fill(layer, *weights):
    for variable, value in zip(layer.trainable_weights, weights, strict=True):
        variable.assign(value)


def _copy(layer):
    return keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))


# --- standardisation -------------------------------------------------------------------------------------------------


def test_standardisation_by_hand():
    # Known: 1, 5 and 6: mean 4, deviations −3, 1, 2, variance 14 / 3.
    values = [[1, 7, np.nan, np.nan], [np.nan, 7, np.nan, 2], [5, 7, np.nan, np.nan], [6, 7, np.nan, np.nan]]
    means, scales = fusion.standardisation(values)
    assert means == [4, 7, 0, 2] and scales == pytest.approx([np.sqrt(14 / 3), 1, 1, 1])
    assert {type(number) for number in means + scales} == {float}


def test_standardisation_of_a_constant_that_rounds_is_one():
    means, scales = fusion.standardisation(np.full((7, 1), 0.1))
    assert np.full(7, 0.1).std() > 0  # why equality with 0 would not do
    assert means == [0.1] and scales == [1]


def test_standardisation_makes_values_of_mean_zero_and_deviation_one(rng):
    values = rng.normal([50, -3], [20, 0.1], (200, 2))
    values[rng.random(values.shape) < 0.3] = np.nan
    means, scales = fusion.standardisation(values)
    z = (values - means) / scales
    np.testing.assert_allclose(np.nanmean(z, axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.nanstd(z, axis=0), 1, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "message"), [([1.0, 2.0], r"shape \(2,\)"), ([[1.0, 2.0], [3.0, np.inf]], r"1 places.*\[\(1, 1\)\]")]
)
def test_standardisation_unfit_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        fusion.standardisation(values)


# --- TabularDense ----------------------------------------------------------------------------------------------------


def test_tabular_dense_by_hand():
    layer = _dense(2, activation=None)
    _fill(layer, [[1, 2], [3, 4], [5, 6]], [[10, 0], [0, 20], [30, 30]], [0.5, -0.5])
    # z = (2, −1, 1): 2 · (1, 2) − (3, 4) + (5, 6) + b; with the second unknown: 2 · (1, 2) + (0, 20) + (5, 6) + b
    got = layer(np.float32([[70, 0, 5], [70, np.nan, 5], [np.nan] * 3]))
    np.testing.assert_allclose(got, [[4.5, 5.5], [7.5, 29.5], [40.5, 49.5]], rtol=1e-6)


def test_tabular_dense_of_known_values_is_a_dense_layer_of_standardised_ones(rng):
    layer, x = _dense(), rng.normal(MEANS, SCALES, (6, 3))
    dense = keras.layers.Dense(4, activation="relu")
    dense.build((None, 3))
    dense.set_weights([convert_to_numpy(layer.kernel), convert_to_numpy(layer.bias)])
    np.testing.assert_allclose(layer(np.float32(x)), dense((x - MEANS) / SCALES), atol=1e-5)  # float32 of some 50


def test_tabular_dense_unknown_is_neither_the_mean_nor_zero():
    layer = _dense(activation=None)
    unknown, mean, zero = convert_to_numpy(layer(np.float32([[np.nan, 0.5, 3], MEANS, [0, 0.5, 3]])))
    np.testing.assert_allclose(unknown, convert_to_numpy(layer.unknown)[0], rtol=1e-6)
    assert np.abs(unknown - mean).min() > 0 and np.abs(unknown - zero).min() > 0


def test_tabular_dense_takes_any_nan_and_each_row_alone(rng):
    layer, x = _dense(), np.float32(rng.normal(MEANS, SCALES, (4, 3)))
    x[1, 0] = np.nan
    before = convert_to_numpy(layer(x))
    other = x.copy()
    other[1, 0] = np.uint32(0xFFC12345).view(np.float32)  # negative, with a payload
    other[[0, 2, 3]] = [[np.nan] * 3, [1e30, 0, 0], [9, 9, 9]]
    assert np.isnan(other[1, 0])
    np.testing.assert_array_equal(convert_to_numpy(layer(other))[1], before[1])


@pytest.mark.parametrize("training", [False, True])
def test_tabular_dense_keeps_nan_out_of_values_and_gradients(training):
    layer = _dense(unknown_rate=0.5, activation=None, seed=0)
    x = np.float32([[np.nan, 0.5, np.nan], [np.nan] * 3, [40.0, 1.0, np.nan]])

    def squared(x):
        output = layer(x, training=training)
        return keras.ops.sum(output**2), output

    (_, output), found = gradients.of(squared, [x], layer.trainable_weights)
    assert np.isfinite(output).all()
    assert all(np.isfinite(gradient).all() for gradient in found)
    of_kernel, of_unknown = found[1:3]
    assert (of_kernel[2] == 0).all() and np.abs(of_unknown[[0, 2]]).min() > 0


def test_tabular_dense_hides_known_values_in_training_only():
    layer = _dense(2, [0.0], [1.0], unknown_rate=0.2, activation=None, seed=3)
    _fill(layer, [[1, 0]], [[0, 1]], [0, 0])
    x = np.ones((20_000, 1), np.float32)
    np.testing.assert_array_equal(layer(x), np.tile([1, 0], (20_000, 1)))
    drawn = convert_to_numpy(layer(x, training=True))
    # Each row is wholly known or wholly unknown; 0.2 ± 4 standard errors of 0.0028
    np.testing.assert_array_equal(drawn.sum(axis=1), 1)
    assert drawn[:, 1].mean() == pytest.approx(0.2, abs=0.0114)
    assert (convert_to_numpy(layer(x, training=True)) != drawn).any()
    unknown = layer(np.full((50, 1), np.nan, np.float32), training=True)
    np.testing.assert_array_equal(unknown, np.tile([0, 1], (50, 1)))


def test_tabular_dense_draws_again_alike_where_training_resets_seed_states():
    layer, x = _dense(unknown_rate=0.5, seed=7), np.full((100, 3), 60, np.float32)
    (state,) = [variable for variable in layer.variables if variable.path.endswith("seed_generator_state")]
    first = convert_to_numpy(layer(x, training=True))
    state.assign(state * np.array([1, 0], "uint32"))
    np.testing.assert_array_equal(layer(x, training=True), first)
    np.testing.assert_array_equal(_dense(unknown_rate=0.5, seed=7).seed_generator.state, [7, 0])
    assert not _dense(unknown_rate=0).non_trainable_variables


def test_tabular_dense_computes_in_float32_under_half_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layer = _dense(2, [1e5], [1.0], activation=None)
    finally:
        keras.config.set_dtype_policy("float32")
    _fill(layer, [[1, 1]], [[0, 0]], [0, 0])
    np.testing.assert_array_equal(layer(np.float32([[1e5 + 3]])), [[3, 3]])  # 1e5 is infinite in float16


def test_tabular_dense_round_trips_through_its_config():
    layer = fusion.TabularDense(4, np.array(MEANS), SCALES, 0.25, "tanh", seed=5, name="mine")
    config = keras.saving.serialize_keras_object(layer)
    assert config["registered_name"] == "kerasmed>TabularDense" and config["config"]["means"] == MEANS
    copy = _copy(layer)
    assert copy.get_config() == layer.get_config() and copy.unknown_rate == 0.25 and copy.seed == 5
    assert copy.activation is keras.activations.tanh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1]), "2 `means` and 1 `scales`"),
        (([], []), "0 `means`"),
        (([np.nan], [1]), "`means` are .*finite"),
        (([1, 2], [1, 0]), r"`scales` at \[1\] are \[0.0\]; expected numbers above 0"),
        (([1], [np.nan]), r"`scales` at \[0\]"),
        (([1], [1], 1.0), "`unknown_rate` is 1.0"),
    ],
)
def test_tabular_dense_unfit_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fusion.TabularDense(4, *arguments)


def test_tabular_dense_of_another_number_of_values_is_refused():
    with pytest.raises(ValueError, match=r"shape \(None, 2\); expected \(batch, 3\)"):
        fusion.TabularDense(4, MEANS, SCALES, name="patient")(keras.Input((2,)))


# --- SauceLayer ------------------------------------------------------------------------------------------------------


def test_sauce_by_hand():
    layer = fusion.SauceLayer(hidden=2)
    sources = np.float32([[1, 2], [0, 0]]), np.float32([[3, 6], [4, 8]])
    layer(sources)
    _fill(layer, np.zeros((4, 2)), np.arctanh([0.5, 0]), [[2 * np.log(3), 0], [9, 9]], [0, 0])
    # Scores (0.5 · 2 ln 3, 0): weights 3/4 and 1/4
    mixed, weights = layer(sources)
    np.testing.assert_allclose(weights, [[0.75, 0.25]] * 2, rtol=1e-6)
    np.testing.assert_allclose(mixed, [[1.5, 3], [1, 2]], rtol=1e-6)


def test_sauce_weights_sum_to_one_and_are_each_samples_own(rng):
    keras.utils.set_random_seed(0)
    sources = [np.float32(rng.normal(size=(9, 5))) for _ in range(3)]
    layer = fusion.SauceLayer()
    mixed, weights = (convert_to_numpy(part) for part in layer(sources))
    assert weights.shape == (9, 3) and weights.min() > 0 and weights.std(axis=0).min() > 0.01
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed, np.einsum("bk,kbd->bd", weights, np.stack(sources)), atol=1e-6)
    alone = layer([source[:1] for source in sources])[0]
    np.testing.assert_allclose(alone, mixed[:1], atol=1e-6)


def test_sauce_of_equal_sources_is_the_source(rng):
    x = np.float32(rng.normal(size=(9, 5)))
    np.testing.assert_allclose(fusion.SauceLayer()([x, x, x])[0], x, atol=1e-6)


def test_sauce_weights_are_float32_under_half_precision(rng):
    layer = fusion.SauceLayer(dtype="mixed_float16")
    mixed, weights = layer([np.float16(rng.normal(size=(9, 5))) for _ in range(3)])
    assert [keras.backend.standardize_dtype(each.dtype) for each in (mixed, weights)] == ["float16", "float32"]
    np.testing.assert_allclose(convert_to_numpy(weights).sum(axis=1), 1, atol=1e-6)
    inputs = [keras.Input((5,), dtype="float16") for _ in range(3)]
    symbolic = fusion.SauceLayer(dtype="mixed_float16")(inputs)
    assert [(tensor.shape, tensor.dtype) for tensor in symbolic] == [((None, 5), "float16"), ((None, 3), "float32")]


def test_sauce_round_trips_through_a_keras_file(tmp_path, rng):
    inputs = [keras.Input((5,)) for _ in range(3)]
    model = keras.Model(inputs, fusion.SauceLayer(hidden=7)(inputs))
    model.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    x = [np.float32(rng.normal(size=(4, 5))) for _ in range(3)]
    for got, expected in zip(copy.predict(x, verbose=0), model.predict(x, verbose=0), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert _copy(fusion.SauceLayer(hidden=7, name="mine")).get_config()["hidden"] == 7


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([keras.Input((5,))], "at least two tensors"),
        (keras.Input((5,)), "at least two tensors"),
        ([keras.Input((5,)), keras.Input((6,))], "one d: put a Dense"),
        ([keras.Input((5, 2)), keras.Input((5, 2))], "expected .batch, d."),
    ],
)
def test_sauce_unfit_sources_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        fusion.SauceLayer()(inputs)


# --- fused_classifier ------------------------------------------------------------------------------------------------

PATIENT = {"means": MEANS, "scales": SCALES}
VARIANTS = {"image": {}, "patient": PATIENT, "residual": {**PATIENT, "residual": True}}


def _fused(variant="residual", num_labels=2, **options):
    keras.utils.set_random_seed(0)
    features = models.max_pooled(models.compact_cnn((32, 32), 2, filters=(8, 16)))
    return fusion.fused_classifier(features, num_labels, units=16, **VARIANTS[variant], **options)


def _rows(rng, number=12):
    """Images of a brightness of their own, patients of whom much is unknown, labels: bright, and none."""
    bright = rng.integers(0, 2, number)
    images = rng.integers(0, 128, (number, 32, 32, 1)) + 100 * bright[:, None, None, None]
    patient = rng.normal(MEANS, SCALES, (number, 3))
    patient[rng.random((number, 3)) < 0.3] = np.nan
    assert np.isnan(patient).any()
    return {"image": np.uint8(images), "patient": np.float32(patient)}, np.float32(
        np.column_stack([bright, bright * 0])
    )


def _gradient_norms(model, inputs, labels, *layers):
    """Norm of the loss's gradient at the kernel of each layer."""
    logits = keras.Model(model.inputs, model.get_layer("logits").output)
    kernels = [model.get_layer(layer).kernel for layer in layers]
    loss, given = losses.WeightedBinaryCrossentropy(), [inputs[x.name] for x in model.inputs]
    found = gradients.of(lambda: loss(labels, logits(given)), variables=kernels)[1]
    return [float(np.linalg.norm(gradient)) for gradient in found]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_classifier_has_its_named_layers_and_inputs_in_order(variant):
    model = _fused(variant, num_labels=14)
    names = {layer.name for layer in model.layers}
    head = {"pool", "image_dense", "head_dense1", "head_dropout", "head_dense2", "logits", "probabilities"}
    of_patient, of_residual = {"patient", "patient_dense", "sauce"}, {"image_residual", "fused"}
    assert head <= names
    assert (of_patient <= names) == (variant != "image") and (of_residual <= names) == (variant == "residual")
    assert not names & (of_patient | of_residual) or variant != "image"
    assert [tensor.name for tensor in model.inputs] == ["image", "patient"][: 1 + (variant != "image")]
    assert isinstance(model.inputs, list) and model.output.shape == (None, 14) and model.output.dtype == "float32"
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)


def test_fused_classifier_shares_the_extractors_weights():
    cnn = models.compact_cnn((32, 32), 2, filters=(8, 16))
    model = fusion.fused_classifier(models.max_pooled(cnn), 2, **PATIENT, name="mine")
    assert model.get_layer("stem_conv") is cnn.get_layer("stem_conv") and model.name == "mine"
    # Dense layers of 16 → 256 and 3 values, sauce of 512 → 64 → 2, head of 256 → 256 → 256 → 2; W, U and biases
    expected = 17 * 256 + 7 * 256 + (513 * 64 + 65 * 2) + 2 * 257 * 256 + 257 * 2
    assert sum(np.prod(w.shape) for layer in model.layers[-8:] for w in layer.trainable_weights) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_classifier_round_trips_through_a_keras_file_bit_for_bit(variant, tmp_path, rng, recwarn):
    model, (inputs, labels) = _fused(variant), _rows(rng)
    inputs = {x.name: inputs[x.name] for x in model.inputs}
    model.compile("sgd", losses.WeightedBinaryCrossentropy([1, 2]), run_eagerly=True)
    model.fit(inputs, labels, verbose=0)  # so that biases and seed states are no fresh ones
    expected = model.predict(inputs, verbose=0)
    assert np.isfinite(expected).all() and expected.std(axis=0).min() > 0
    model.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    assert [x.name for x in copy.inputs] == list(inputs)
    np.testing.assert_array_equal(copy.predict(inputs, verbose=0), expected)
    np.testing.assert_array_equal(copy.predict(list(inputs.values()), verbose=0), expected)
    assert np.isfinite(copy.fit(inputs, labels, verbose=0).history["loss"]).all()
    assert not [str(w.message) for w in recwarn if "structure" in str(w.message)]


def test_fused_classifier_takes_a_dataset_of_dicts(rng):
    tf = pytest.importorskip("tensorflow")
    model, (inputs, labels) = _fused(), _rows(rng)
    model.compile("sgd", losses.WeightedBinaryCrossentropy())
    model.fit(tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(6), verbose=0, shuffle=False)
    batches = tf.data.Dataset.from_tensor_slices((inputs,)).batch(12)
    np.testing.assert_array_equal(model.predict(batches, verbose=0), model.predict(inputs, verbose=0, batch_size=12))


def test_fused_classifier_an_unknown_value_is_unlike_any_of_the_known(rng):
    model, (inputs, _) = _fused(), _rows(rng)
    inputs["patient"][0] = [50, 0.5, 3]
    mean = model.predict(inputs, verbose=0)
    inputs["patient"][0, 0] = np.nan
    unknown = model.predict(inputs, verbose=0)
    assert np.abs(unknown[0] - mean[0]).min() > 1e-4
    np.testing.assert_array_equal(unknown[1:], mean[1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_classifier_trains_its_first_convolution_from_the_start(variant, rng):
    model, (inputs, labels) = _fused(variant), _rows(rng)
    layers = ["stem_conv", "image_dense"] + ["image_residual"] * (variant == "residual")
    assert min(_gradient_norms(model, inputs, labels, *layers)) > 1e-3


def test_fused_classifier_residual_keeps_the_image_trained_where_the_sauce_takes_patient_data_alone(rng):
    inputs, labels = _rows(rng)
    stems = {}
    for variant in ("patient", "residual"):
        model = _fused(variant)
        opened = _gradient_norms(model, inputs, labels, "stem_conv")[0]
        model.get_layer("sauce").score.bias.assign([-30, 30])
        closed, dense = _gradient_norms(model, inputs, labels, "stem_conv", "image_dense")
        assert dense < 1e-6  # a weight of e⁻⁶⁰; what is left is the rounding of the other source's score, g − 1 · g
        stems[variant] = closed / opened
    assert stems["patient"] < 1e-5 and stems["residual"] > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_classifier_learns_a_planted_brightness(variant, rng):
    model, (inputs, labels) = _fused(variant, dropout=0.1), _rows(rng, 32)
    inputs = {x.name: inputs[x.name] for x in model.inputs}
    trained = keras.Model(model.inputs, model.get_layer("logits").output)
    # Eagerly, as to trace the few steps takes longer.
    trained.compile(keras.optimizers.Adam(0.01), losses.WeightedBinaryCrossentropy(), run_eagerly=True)
    history = trained.fit(inputs, labels, batch_size=16, epochs=8, verbose=0, shuffle=False).history["loss"]
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"means": MEANS}, "`scales` None; expected both"),
        ({"scales": SCALES}, "`means` are None"),
        ({"residual": True}, "`residual` is true without `means`"),
        ({"means": MEANS, "scales": [1, 1]}, "3 `means` and 2 `scales`"),
    ],
)
def test_fused_classifier_unfit_options_are_refused(options, message):
    features = models.max_pooled(models.compact_cnn((32, 32), 2, filters=(8,)))
    with pytest.raises(ValueError, match=message):
        fusion.fused_classifier(features, 2, **options)


def test_fused_classifier_unfit_features_are_refused():
    image, other = keras.Input((8, 8, 1), name="image"), keras.Input((8, 8, 1), name="scan")
    for features in (keras.Model(image, image), keras.Model(other, keras.layers.Flatten()(other))):
        with pytest.raises(ValueError, match="expected one input 'image' and an output .batch, num_features."):
            fusion.fused_classifier(features, 2)
