import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kerasmed import gradcam, models


def _dense(kernel, **options):
    kernel = np.asarray(kernel, np.float32)
    return layers.Dense(
        kernel.shape[1], kernel_initializer=lambda shape, dtype=None: np.broadcast_to(kernel, shape), **options
    )


def _pointwise(kernel, bias, **options):
    return layers.Conv2D(
        len(kernel),
        1,
        kernel_initializer=lambda shape, dtype=None: np.reshape(kernel, shape).astype(np.float32),
        bias_initializer=lambda shape, dtype=None: np.array(bias, np.float32),
        **options,
    )


def _by_hand(weights, *, head=layers.GlobalAveragePooling2D, size=(2, 2)):
    """Features A_1 = x and A_2 = 10 - x, pooled or flattened, then logits of the given weights."""
    inputs = keras.Input((*size, 1), dtype="uint8")
    x = _pointwise([1, -1], [0, 10], name="maps")(layers.Rescaling(1)(inputs))
    logits = _dense(weights, name="logits")(head()(x))
    return keras.Model(inputs, layers.Softmax(name="probabilities")(logits))


PIXELS = np.array([[[4, 8], [0, 20]]], np.uint8)


@pytest.fixture(scope="module")
def compact():
    keras.utils.set_random_seed(0)
    model = models.compact_cnn((64, 64), 4, filters=(4, 8, 8, 8))
    # Moving averages unlike a batch's: a map taken in training mode is another one.
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(rng.normal(0, 0.5, layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 2, layer.moving_variance.shape))
    return model


@pytest.fixture(scope="module")
def explain(compact):
    return gradcam.build(compact)  # of block3


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (7, 64, 64), dtype=np.uint8)


# --- maps ------------------------------------------------------------------------------------------------------------


def test_build_pooled_head_gives_map_worked_by_hand_for_each_class():
    # Pooling over 4 positions: α_k = w_kc / 4. Class 0, w = (2, 0): α = (1/2, 0), map x/2.
    # Class 1, w = (-1, 3): α = (-1/4, 3/4), map ReLU(-x/4 + 3 (10 - x) / 4) = ReLU(7.5 - x).
    explain = gradcam.build(_by_hand([[2, -1], [0, 3]]), layer="maps")
    maps = explain(np.repeat(PIXELS, 2, axis=0), [0, 1])
    np.testing.assert_array_equal(maps.heat, [[[2, 4], [0, 10]], [[3.5, 0], [7.5, 0]]])
    assert maps.heat.dtype == np.float32 and maps.status.tolist() == ["ok", "ok"]
    # Means are 8 and 2: logits 16 and -2.
    np.testing.assert_allclose(maps.probabilities[:, 1], 1 / (1 + np.exp(18)), rtol=1e-5)  # float32


def test_build_flat_head_averages_the_gradient_over_positions():
    # A weight per position and feature (A_1 and A_2 in turn): α_1 = (1 + 2 + 3 + 6) / 4 = 3 and α_2 = 1 for class 0,
    # map 3 x + (10 - x) = 2 x + 10. Class 1: α_1 = -1/2 and α_2 = 0, nowhere above 0.
    weights = [[1, 2], [4, 0], [2, -2], [0, 0], [3, 0], [0, 0], [6, -2], [0, 0]]
    maps = gradcam.build(_by_hand(weights, head=layers.Flatten), layer="maps")(np.repeat(PIXELS, 2, axis=0), [0, 1])
    np.testing.assert_array_equal(maps.heat[0], [[18, 26], [10, 50]])
    assert maps.status.tolist() == ["ok", "negative"] and not maps.heat[1].any()


def test_build_zero_gradient_is_told_from_negative_map():
    # Class 0 has no weights; class 1's map is ReLU(-x/4), as its α is (-1/4, 0); class 2's is x/4.
    explain = gradcam.build(_by_hand([[0, -1, 1], [0, 0, 0]]), layer="maps")
    maps = explain(np.repeat(PIXELS, 3, axis=0), [0, 1, 2])
    assert maps.status.tolist() == [gradcam.ZERO_GRADIENT, gradcam.NEGATIVE, gradcam.OK]
    assert maps.heat.any(axis=(1, 2)).tolist() == [False, False, True]


def test_build_saturated_unit_behind_the_layer_counts_as_zero_gradient():
    # The sigmoid's slope at -4 · 12 is 1e-21: not 0 in float32, and no dependence either.
    inputs = keras.Input((2, 2, 1), dtype="uint8")
    x = _pointwise([1], [0], name="maps")(layers.Rescaling(1)(inputs))
    x = _pointwise([-12], [0], activation="sigmoid", name="squashed")(x)
    model = keras.Model(inputs, layers.Softmax()(_dense([[-1, 1]], name="logits")(layers.GlobalAveragePooling2D()(x))))
    maps = gradcam.build(model, layer="maps")(np.full((1, 2, 2), 4, np.uint8), 0)
    assert maps.status.tolist() == ["zero_gradient"] and not maps.heat.any()


def test_build_explains_logits_where_the_probability_is_saturated():
    model = _by_hand([[2, -1], [0, 3]])
    pixels = np.full((1, 2, 2), 255, np.uint8)
    features = keras.Model(model.input, model.get_layer("maps").output)(pixels[..., None])
    with tf.GradientTape() as tape:
        tape.watch(features)
        pooled = tf.reduce_mean(features, axis=(1, 2))
        probability = tf.nn.softmax(pooled @ model.get_layer("logits").kernel)[0, 0]
    assert not tape.gradient(probability, features).numpy().any()
    np.testing.assert_array_equal(gradcam.build(model, layer="maps")(pixels).heat, [[[127.5] * 2] * 2])


def _reference(model, name, pixels, class_ids):
    """Maps of "block3", or of "block4_a_relu" that the shortcut passes around: the rest of the model step by step."""
    get = model.get_layer
    block3 = keras.Model(model.input, get("block3").output)(pixels, training=False)

    def branch(x):
        return get("block4_a_relu")(get("block4_a_bn")(get("block4_a_conv")(x), training=False))

    def rest(x, inner):
        shortcut = get("block4_shortcut_bn")(get("block4_shortcut_conv")(x), training=False)
        inner = get("block4_b_bn")(get("block4_b_conv")(inner), training=False)
        return get("logits")(tf.reduce_mean(tf.nn.relu(inner + shortcut), axis=(1, 2)))

    features = block3 if name == "block3" else branch(block3)
    with tf.GradientTape() as tape:
        tape.watch(features)
        logits = rest(features, branch(features)) if name == "block3" else rest(block3, features)
        chosen = tf.reduce_sum(logits * tf.one_hot(class_ids, logits.shape[-1]), axis=-1)
    weights = tape.gradient(chosen, features).numpy().mean(axis=(1, 2))
    return np.maximum((features.numpy() * weights[:, None, None]).sum(axis=-1), 0), logits.numpy()


@pytest.mark.parametrize("name", ["block3", "block4_a_relu"])
def test_build_residual_network_equals_reference(compact, images, name):
    explain = gradcam.build(compact, layer=name)
    class_ids = np.arange(7) % 4
    maps = explain(images, class_ids)
    expected, logits = _reference(compact, name, images[..., None], class_ids)
    # float32 sums in another order
    np.testing.assert_allclose(maps.heat, expected, rtol=1e-4, atol=1e-6 * expected.max())
    np.testing.assert_array_equal(maps.class_ids, class_ids)
    np.testing.assert_array_equal(explain(images).class_ids, logits.argmax(axis=1))


def test_build_without_class_ids_explains_the_likeliest(explain, images):
    maps = explain(images)
    np.testing.assert_array_equal(maps.class_ids, maps.probabilities.argmax(axis=1))
    np.testing.assert_array_equal(maps.heat, explain(images, maps.class_ids).heat)
    assert not np.array_equal(maps.heat, explain(images, (maps.class_ids + 1) % 4).heat)


def test_build_frozen_model_has_the_same_maps(compact, explain, images, monkeypatch):
    monkeypatch.setattr(compact, "trainable", False)
    assert not compact.trainable_variables
    np.testing.assert_array_equal(gradcam.build(compact)(images).heat, explain(images).heat)


def test_build_batches_equal_images_one_by_one(compact, explain, images):
    maps = explain(images, batch_size=3)
    single = [explain(images[row : row + 1, ..., None]) for row in range(7)]
    # float32: a convolution sums a batch of another size in another order
    np.testing.assert_allclose(maps.heat, np.concatenate([part.heat for part in single]), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(maps.class_ids, np.concatenate([part.class_ids for part in single]))
    np.testing.assert_allclose(maps.probabilities, compact.predict(images[..., None], verbose=0), rtol=1e-5)
    assert maps.heat.any() and maps.heat.min() == 0


def test_build_is_traced_once_whatever_the_batch():
    traced = []

    class Counting(layers.Layer):
        def call(self, x):
            traced.append(x.shape)
            return x

    inputs = keras.Input((2, 2, 1), dtype="uint8")
    x = Counting()(_pointwise([1], [0], name="maps")(layers.Rescaling(1)(inputs)))
    model = keras.Model(inputs, layers.Softmax()(_dense([[1, 2]], name="logits")(layers.Flatten()(x))))
    explain = gradcam.build(model, layer="maps")
    before = len(traced)
    for count, batch_size in ((7, 3), (2, 32), (1, 1)):
        explain(np.ones((count, 2, 2), np.uint8), batch_size=batch_size)
        explain(np.ones((count, 2, 2), np.uint8), 1, batch_size=batch_size)
    assert len(traced) == before + 1


def test_build_leaves_weights_and_random_states_as_they_were(compact, explain, images):
    before = [variable.numpy() for variable in compact.variables]
    explain(images)
    for variable, value in zip(compact.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_build_reloaded_model_has_exactly_the_same_maps(compact, explain, images, tmp_path):
    compact.save(tmp_path / "m.keras")
    maps = explain(images)
    for before, after in zip(maps, gradcam.build(keras.saving.load_model(tmp_path / "m.keras"))(images)):
        np.testing.assert_array_equal(after, before)


def test_build_no_images_give_empty_maps(explain):
    maps = explain(np.zeros((0, 64, 64), np.uint8), 1)
    assert [part.shape for part in maps] == [(0, 8, 8), (0,), (0, 4), (0,)]


def test_build_colour_images_are_taken():
    inputs = keras.Input((2, 2, 3), dtype="uint8")
    x = layers.Conv2D(1, 1, kernel_initializer="ones", name="maps")(layers.Rescaling(1)(inputs))
    model = keras.Model(inputs, layers.Softmax()(_dense([[4, 0]], name="logits")(layers.GlobalAveragePooling2D()(x))))
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    # α = 4 / 4, the map is the sum of the colours.
    np.testing.assert_array_equal(gradcam.build(model, layer="maps")(pixels, 0).heat, [[[3, 12], [21, 30]]])


def test_build_half_precision_gradients_do_not_vanish():
    # α = 2**-13 / 4096 = 2**-25, which half precision rounds to 0. The features are 1 everywhere, and so is the map.
    inputs = keras.Input((64, 64, 1), dtype="uint8")
    x = _pointwise([1], [0], name="maps", dtype="mixed_float16")(layers.Rescaling(1)(inputs))
    x = layers.GlobalAveragePooling2D(dtype="mixed_float16")(x)
    model = keras.Model(inputs, layers.Softmax()(_dense([[2**-13, 0]], name="logits", dtype="float32")(x)))
    assert model.get_layer("maps").output.dtype == "float16"
    maps = gradcam.build(model, layer="maps")(np.ones((1, 64, 64), np.uint8), 0)
    np.testing.assert_array_equal(maps.heat, np.full((1, 64, 64), 2**-25, np.float32))


def test_build_maps_that_are_not_finite_are_refused():
    explain = gradcam.build(_by_hand([[np.inf, 0], [0, 0]]), layer="maps")
    with pytest.raises(FloatingPointError, match=r"1 of 1 images are not finite.*\[0\]"):
        explain(PIXELS, 0)


@pytest.mark.parametrize(
    ("images", "class_ids", "message"),
    [
        (PIXELS / 255, None, "float64; expected uint8"),
        (PIXELS[0], None, r"shape \(2, 2\); the model takes \(num_images, 2, 2, 1\), the last axis"),
        (np.zeros((1, 2, 3), np.uint8), None, r"shape \(1, 2, 3\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), None, r"shape \(1, 2, 2, 3\)"),
        (PIXELS, [0, 1], r"shape \(2,\); expected one int, or one for each of 1"),
        (PIXELS, 0.5, "float64 of shape"),
        (PIXELS, 2, r"holds \[2\] for images \[0\]; the model has 2 classes, 0 to 1"),
        (PIXELS, [-1], r"holds \[-1\]"),
    ],
)
def test_build_unfit_images_or_class_ids_are_refused(images, class_ids, message):
    explain = gradcam.build(_by_hand([[2, -1], [0, 3]]), layer="maps")
    with pytest.raises(ValueError, match=message):
        explain(images, class_ids)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("block9", "no layer 'block9'.*block4_add, block4"),
        ("pool", r"'pool' puts out \(None, 8\); expected maps"),
        ("image", "'image' puts out"),
    ],
)
def test_build_unfit_layer_is_refused(compact, layer, message):
    with pytest.raises(ValueError, match=message):
        gradcam.build(compact, layer=layer)


def test_build_layer_beside_the_logits_is_refused():
    inputs = keras.Input((2, 2, 1), dtype="uint8")
    x = _pointwise([1], [0], name="maps")(layers.Rescaling(1)(inputs))
    aside = layers.Flatten()(layers.Conv2D(1, 2, name="aside")(x))
    logits = _dense([[1, 2]], name="logits")(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Add()([layers.Softmax()(logits), aside]))
    assert "aside" not in gradcam.candidate_layers(model)
    with pytest.raises(ValueError, match="do not depend on layer 'aside'.*maps"):
        gradcam.build(model, layer="aside")


def test_build_unfit_models_are_refused(compact):
    inputs = keras.Input((8, 8, 1), dtype="uint8")
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(2, 3)(inputs))
    with pytest.raises(ValueError, match="no layer 'logits'.*Last layers: .*answer"):
        gradcam.build(keras.Model(inputs, layers.Dense(2, name="answer")(pooled)))
    with pytest.raises(ValueError, match="'logits' .* has the activation 'softmax'"):
        gradcam.build(keras.Model(inputs, layers.Dense(2, "softmax", name="logits")(pooled)))
    with pytest.raises(ValueError, match="no layer that puts out maps"):
        gradcam.build(keras.Model(inputs, layers.Dense(2, name="logits")(layers.Flatten()(inputs))))
    with pytest.raises(ValueError, match="1 inputs and 2 outputs"):
        gradcam.build(keras.Model(inputs, [layers.Dense(2, name="logits")(pooled), pooled]))
    backbone = keras.Model(compact.inputs, compact.get_layer("block3").output, name="backbone")
    outer = keras.Input((64, 64, 1), dtype="uint8")
    nested = keras.Model(outer, layers.Dense(2, name="logits")(layers.Flatten()(backbone(outer))))
    with pytest.raises(ValueError, match="'backbone' is a model nested in .*input_tensor"):
        gradcam.build(nested)


def test_build_other_backend_is_named(compact, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="the Keras backend is 'jax'"):
        gradcam.build(compact)


@pytest.mark.parametrize(
    ("image_size", "filters", "expected"),
    [
        ((64, 64), (4, 8, 8, 8), "block3"),  # block4 is 4×4
        ((112, 112), (4, 8, 8, 8), "block4"),  # 7×7
        ((112, 96), (4, 8, 8, 8), "block3"),  # block4 is 7×6
        ((4, 4), (4, 8), "block1"),  # 2×2 and 1×1: none is fine enough
    ],
)
def test_default_layer_is_the_last_that_is_fine_enough(image_size, filters, expected):
    assert gradcam.default_layer(models.compact_cnn(image_size, 2, filters=filters)) == expected


def test_default_layer_passes_over_pooling_padding_and_whole_images():
    inputs = keras.Input((24, 24, 1), dtype="uint8")
    x = layers.Rescaling(1 / 255, name="preprocess")(inputs)
    x = layers.Conv2D(2, 3, activation="relu", name="last")(x)
    x = layers.ZeroPadding2D(name="padded")(layers.MaxPooling2D(name="pooled")(x))
    model = keras.Model(inputs, layers.Dense(2, name="logits")(layers.Flatten()(x)))
    assert gradcam.candidate_layers(model) == ["preprocess", "last", "pooled", "padded"]
    assert gradcam.default_layer(model) == "last"
    x = layers.Conv2D(2, 6, strides=6, name="coarse")(layers.Rescaling(1 / 255, name="preprocess")(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="logits")(layers.Flatten()(x)))
    assert gradcam.default_layer(model) == "coarse"  # 4×4, where the only finer map is the image itself


def test_default_layer_is_no_branch_that_something_passes_around():
    inputs = keras.Input((20, 20, 1), dtype="uint8")
    trunk = layers.Conv2D(2, 3, name="trunk")(layers.Rescaling(1 / 255)(inputs))
    one = layers.Conv2D(2, 5, strides=5)(layers.Conv2D(2, 1, name="branch")(trunk))
    other = layers.Conv2D(2, 5, strides=5)(trunk) * 2.0  # an operation, not a layer
    x = layers.Concatenate(name="joined")([one, other])
    model = keras.Model(inputs, layers.Dense(2, name="logits")(layers.GlobalAveragePooling2D()(x)))
    shapes = {name: model.get_layer(name).output.shape[1] for name in ("trunk", "branch", "joined")}
    assert shapes == {"trunk": 18, "branch": 18, "joined": 3}
    assert gradcam.default_layer(model) == "trunk"


def test_default_layer_takes_sides_of_unknown_length():
    inputs = keras.Input((None, None, 1), dtype="uint8")
    x = layers.Conv2D(2, 3, name="last")(layers.Rescaling(1)(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="logits")(layers.GlobalAveragePooling2D()(x)))
    assert gradcam.default_layer(model) == "last"
    assert gradcam.build(model)(np.zeros((2, 5, 9), np.uint8)).heat.shape == (2, 3, 7)


# --- at the image's size ---------------------------------------------------------------------------------------------


def test_upsample_is_bilinear_between_cell_centres_and_keeps_units():
    # Centres of two cells over four pixels are at 1/2 and 5/2; outside them the edge is repeated.
    enlarged = gradcam.upsample(np.array([[[0, 8]], [[3, 3]]]), (2, 4))
    np.testing.assert_array_equal(enlarged, [[[0, 2, 6, 8]] * 2, [[3] * 4] * 2])
    assert enlarged.dtype == np.float32


def test_upsample_no_maps_is_empty():
    assert gradcam.upsample(np.zeros((0, 2, 2)), (4, 6)).shape == (0, 4, 6)


# --- the pointing game -----------------------------------------------------------------------------------------------


def test_peaks_are_at_the_centre_of_the_highest_cell():
    # A cell of a 2×2 map covers 2×3 pixels of a 4×6 image: rows 2 and 3, columns 0 to 2 for the third cell.
    heat = np.array([[[0, 1], [5, 0]], [[2, 0], [0, 2]], [[0, 0], [0, 0]]])
    np.testing.assert_array_equal(gradcam.peaks(heat, (4, 6)), [[2.5, 1], [0.5, 1], [np.nan, np.nan]])


def test_peaks_are_where_the_enlarged_map_is_highest(rng):
    # With an odd number of pixels a cell, its centre is a pixel.
    heat = rng.random((20, 4, 5))
    enlarged = gradcam.upsample(heat, (12, 15))
    rows, columns = gradcam.peaks(heat, (12, 15)).astype(int).T
    np.testing.assert_array_equal(enlarged[np.arange(20), rows, columns], enlarged.max(axis=(1, 2)))


def test_pointing_game_by_hand():
    # The peak of each 2×2 map lies in the middle of the right upper quarter of a 8×4 image: y 1.5, x 2.5.
    heat = np.array([[[0, 1], [0, 0]]] * 4 + [[[0, 0], [0, 0]]])
    boxes = np.array([[2, 0, 2, 4], [0, 0, 4, 2], [2, 2, 2, 6], [0, 0, 3, 2], [0, 0, 4, 8]])
    hits, chance = gradcam.pointing_game(heat, boxes, (8, 4))
    # The box of the second ends at y = 2, the middle of the cell: outside. So begins the third's: inside.
    assert hits.tolist() == [True, False, True, False, False]
    np.testing.assert_array_equal(chance, [8 / 32, 8 / 32, 12 / 32, 6 / 32, 1])


def test_pointing_game_chance_is_the_share_of_all_pixels_that_hit():
    heat = np.eye(6 * 8).reshape(-1, 6, 8)
    for box in ([0, 0, 1, 1], [2, 1, 5, 3], [0, 0, 8, 6]):
        hits, chance = gradcam.pointing_game(heat, np.tile(box, (48, 1)), (6, 8))
        assert hits.mean() == chance[0]


def test_pointing_game_counts_only_what_lies_inside_the_image():
    _, chance = gradcam.pointing_game(np.ones((1, 2, 2)), np.array([[-0.5, 3, 2.5, 1.5]]), (4, 4))
    assert chance.tolist() == [2 * 1 / 16]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 2, 2]], r"shape \(1, 4\); expected \(2, 4\)"),
        ([[0, 0, 2, 2], [np.nan] * 4], r"1 of 2 boxes are missing.*First rows: \[1\]"),
        ([[0, 0, 2, 0], [0, 0, 2, 2]], "1 of 2 boxes are missing, empty"),
        ([[0, 0, 2, 2], [40, 30, 20, 20]], r"outside an image of \(4, 4\).*scale boxes"),
    ],
)
def test_pointing_game_unfit_boxes_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        gradcam.pointing_game(np.ones((2, 2, 2)), np.array(boxes, float), (4, 4))
