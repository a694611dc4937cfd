import keras
import numpy as np
import pytest
from keras import layers
from keras.ops import convert_to_numpy

from kerasmed import gradcam, models
from tests import gradients


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


for_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="JAX compiles anew for each number of images, PyTorch not at all",
)
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

    def probability(features):
        pooled = keras.ops.mean(features, axis=(1, 2))
        return keras.ops.softmax(keras.ops.matmul(pooled, model.get_layer("logits").kernel))[0, 0]

    assert not gradients.of(probability, [convert_to_numpy(features)])[1][0].any()
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
        return get("logits")(keras.ops.mean(keras.ops.relu(inner + shortcut), axis=(1, 2)))

    def chosen(features):
        logits = rest(features, branch(features)) if name == "block3" else rest(block3, features)
        return keras.ops.sum(logits * keras.ops.one_hot(class_ids, logits.shape[-1])), logits

    features = convert_to_numpy(block3 if name == "block3" else branch(block3))
    (_, logits), (gradient,) = gradients.of(chosen, [features])
    return np.maximum((features * gradient.mean(axis=(1, 2))[:, None, None]).sum(axis=-1), 0), logits


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
    assert maps.heat.any()


@for_tensorflow
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
    before = [convert_to_numpy(variable) for variable in compact.variables]
    explain(images)
    for variable, value in zip(compact.variables, before, strict=True):
        np.testing.assert_array_equal(convert_to_numpy(variable), value)


def test_build_reloaded_model_has_exactly_the_same_maps(compact, explain, images, tmp_path):
    compact.save(tmp_path / "m.keras")
    maps = explain(images)
    for before, after in zip(maps, gradcam.build(keras.saving.load_model(tmp_path / "m.keras"))(images)):
        np.testing.assert_array_equal(after, before)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX compiles for each number of images at once")
def test_build_fills_few_images_up_so_that_few_numbers_are_compiled():
    traced = []

    class Counting(layers.Layer):
        def call(self, x):
            traced.append(x.shape[0])
            return x

    inputs = keras.Input((2, 2, 1), dtype="uint8")
    x = Counting()(_pointwise([1], [0], name="maps")(layers.Rescaling(1)(inputs)))
    model = keras.Model(inputs, layers.Softmax()(_dense([[1, 2]], name="logits")(layers.Flatten()(x))))
    explain, pixels = gradcam.build(model, layer="maps"), np.arange(28, dtype=np.uint8).reshape(7, 2, 2)
    traced.clear()
    for count in (3, 4, 7, 1, 6):
        maps = explain(pixels[:count], 1, batch_size=5)
        np.testing.assert_array_equal(maps.heat, 2 * pixels[:count])  # α = 2
    # 7 and 6 are 5 and what is left, filled up to 5. Each is looked at for its shapes, then traced.
    assert traced == [4, 4, 5, 5, 1, 1]


def test_build_leaves_a_model_that_can_be_saved_and_explained_again(tmp_path, images):
    model = models.compact_cnn((64, 64), 4, filters=(4, 8, 8, 8))
    maps = gradcam.build(model, layer="block2")(images)
    model.save(tmp_path / "m.keras")
    for one in (model, keras.saving.load_model(tmp_path / "m.keras")):
        assert "call" not in vars(one.get_layer("block2"))
        np.testing.assert_array_equal(gradcam.build(one, layer="block2")(images).heat, maps.heat)


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
    with pytest.raises(ValueError, match="to the logits .* leads through layer 'aside'.*maps"):
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
    with pytest.raises(ValueError, match="has 2 outputs; expected one"):
        gradcam.build(keras.Model(inputs, [layers.Dense(2, name="logits")(pooled), pooled]))
    backbone = keras.Model(compact.inputs, compact.get_layer("block3").output, name="backbone")
    outer = keras.Input((64, 64, 1), dtype="uint8")
    nested = keras.Model(outer, layers.Dense(2, name="logits")(layers.Flatten()(backbone(outer))))
    with pytest.raises(ValueError, match="'backbone' is a model nested in .*input_tensor"):
        gradcam.build(nested)


def test_build_other_backend_is_named(compact, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    with pytest.raises(RuntimeError, match="the Keras backend is 'openvino'"):
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


# --- max pooling -----------------------------------------------------------------------------------------------------


def test_build_max_pooled_head_has_the_weights_of_an_average_pooled_one():
    # The whole gradient w_k sits at a channel's largest place, so α_k = w_k / 4 as behind average pooling, and the map
    # shows all places alike: those of `test_build_pooled_head_gives_map_worked_by_hand_for_each_class`.
    model = _by_hand([[2, -1, 0], [0, 3, 0]], head=layers.GlobalMaxPooling2D)
    maps = gradcam.build(model, layer="maps")(np.repeat(PIXELS, 3, axis=0), [0, 1, 2])
    np.testing.assert_array_equal(maps.heat, [[[2, 4], [0, 10]], [[3.5, 0], [7.5, 0]], np.zeros((2, 2))])
    assert maps.status.tolist() == ["ok", "ok", "zero_gradient"]
    # The largest are 20 and 10: logits 40, 10 and 0.
    np.testing.assert_allclose(maps.probabilities[:, 1], 1 / (1 + np.exp(30)), rtol=1e-5)  # float32


def test_build_max_pooled_ties_share_the_gradient_and_keep_its_sum():
    # Class 0, w = (-1, 2) over equal pixels: α = (-1/4, 1/2), map ReLU(-4/4 + 6/2) = 2; class 1 is against all: -x/4.
    model = _by_hand([[-1, -1], [2, 0]], head=layers.GlobalMaxPooling2D)
    maps = gradcam.build(model, layer="maps")(np.full((2, 2, 2), 4, np.uint8), [0, 1])
    np.testing.assert_array_equal(maps.heat, [[[2, 2], [2, 2]], np.zeros((2, 2))])
    assert maps.status.tolist() == ["ok", "negative"]


def test_build_max_pooled_weight_in_a_large_map_is_above_the_tolerance():
    # One of 512² places has the gradient 1e-5: α = 3.8e-11, some 40 times the tolerance.
    inputs = keras.Input((512, 512, 1), dtype="uint8")
    x = layers.GlobalMaxPooling2D()(_pointwise([1], [0], name="maps")(layers.Rescaling(1)(inputs)))
    model = keras.Model(inputs, layers.Softmax()(_dense([[1e-5, 0]], name="logits")(x)))
    pixels = np.zeros((1, 512, 512), np.uint8)
    pixels[0, 3, 5] = 200
    maps = gradcam.build(model, layer="maps")(pixels, 0)
    assert maps.status.tolist() == ["ok"] and np.argwhere(maps.heat[0]).tolist() == [[3, 5]]
    np.testing.assert_allclose(maps.heat[0, 3, 5], 200e-5 / 512**2, rtol=1e-6)  # float32


@pytest.mark.parametrize("head", [layers.GlobalMaxPooling2D, layers.GlobalAveragePooling2D])
def test_build_half_precision_gradients_do_not_overflow_in_large_maps(head):
    # Times all 256² positions, the weight 8 would be 2**19, and the logit's own gradient 2**16: above 65,504.
    inputs = keras.Input((256, 256, 1), dtype="uint8")
    x = _pointwise([1], [0], name="maps", dtype="mixed_float16")(layers.Rescaling(1)(inputs))
    x = _dense([[8, 0]], name="logits", dtype="mixed_float16")(head(dtype="mixed_float16")(x))
    model = keras.Model(inputs, layers.Softmax(dtype="float32")(x))
    pixels = np.full((1, 256, 256), 2, np.uint8)
    pixels[0, 0, 0] = 4
    maps = gradcam.build(model, layer="maps")(pixels, 0)
    np.testing.assert_array_equal(maps.heat, pixels * np.float32(8 / 256**2))


# --- several inputs --------------------------------------------------------------------------------------------------


def _mixed(features, patient, *, units, residual):
    """Image and patient vectors weighed by a softmax of scores, the pooled features added, then yes-or-no labels."""
    pooled = layers.GlobalMaxPooling2D(name="pool")(features)
    known = keras.ops.where(keras.ops.isnan(patient), 0.0, patient)
    sources = [layers.Dense(units, name="image_dense")(pooled), layers.Dense(units, name="patient_dense")(known)]
    weights = keras.ops.softmax(layers.Dense(2, name="scores")(known), axis=-1)
    x = sources[0] * weights[:, :1] + sources[1] * weights[:, 1:]
    if residual:
        x = layers.Add(name="fused")([x, layers.Dense(units, name="residual")(pooled)])
    return x


def _fused_by_hand(*, residual):
    """Features x and 10 - x; image vector (4 A_1, 8 A_2); scores (p, 0); labels h_1 and h_1 - h_2."""
    inputs = [keras.Input((2, 2, 1), dtype="uint8", name="image"), keras.Input((1,), name="patient")]
    x = _pointwise([1, -1], [0, 10], name="maps")(layers.Rescaling(1)(inputs[0]))
    x = _dense([[1, 1], [0, -1]], name="logits")(_mixed(x, inputs[1], units=2, residual=residual))
    model = keras.Model(inputs, layers.Activation("sigmoid", name="probabilities")(x))
    kernels = {
        "image_dense": [[4, 0], [0, 8]],
        "patient_dense": [[1, 1]],
        "scores": [[1, 0]],
        "residual": [[2, 0], [0, 4]],
    }
    for name, kernel in kernels.items():
        if residual or name != "residual":
            model.get_layer(name).set_weights([np.array(kernel, np.float32), np.zeros(2, np.float32)])
    return model


def test_build_fused_model_gives_map_worked_by_hand():
    # At p = ln 3 the image's weight is 3/4; at p = NaN, taken for 0, it is 1/2. With the residual h_1 grows with A_1 by
    # 4 · 3/4 + 2 = 5 and h_2 with A_2 by 8 · 3/4 + 4 = 10; or by 4 and 8. Over 4 places label 0, h_1, has α = (5/4, 0)
    # and (1, 0); label 1, h_1 - h_2, has (5/4, -10/4) and (1, -2): maps ReLU(5x/4 - 25 + 5x/2), ReLU(x - 20 + 2x).
    explain = gradcam.build(_fused_by_hand(residual=True), layer="maps")
    patient = np.array([[np.log(3)], [np.nan]])
    maps = explain(np.repeat(PIXELS, 4, axis=0), [0, 0, 1, 1], beside={"patient": patient[[0, 1, 0, 1]]}, batch_size=3)
    expected = [[[5, 10], [0, 25]], [[4, 8], [0, 20]], [[0, 5], [0, 50]], [[0, 4], [0, 40]]]
    np.testing.assert_allclose(maps.heat, expected, rtol=1e-6)  # float32: the softmax of ln 3
    assert maps.status.tolist() == ["ok"] * 4


def test_build_fused_model_that_does_not_weigh_the_image_is_dead_without_the_residual():
    # At p = -200 the image's weight is 1e-87: 0 in float32.
    beside = {"patient": np.array([[-200.0], [0.0]])}
    images = np.repeat(PIXELS, 2, axis=0)
    starved = gradcam.build(_fused_by_hand(residual=False), layer="maps")(images, 0, beside=beside)
    assert starved.status.tolist() == ["zero_gradient", "ok"] and not starved.heat[0].any()
    kept = gradcam.build(_fused_by_hand(residual=True), layer="maps")(images, 0, beside=beside)
    np.testing.assert_array_equal(kept.heat[0], PIXELS[0] / 2)  # α = 2/4
    assert kept.status.tolist() == ["ok", "ok"]


@pytest.fixture(scope="module")
def fused():
    """Inputs "image" and "patient" of three values; a patient's path as long as the image's, and joining late."""
    keras.utils.set_random_seed(0)
    image, patient = keras.Input((32, 32, 1), dtype="uint8", name="image"), keras.Input((3,), name="patient")
    x = layers.Rescaling(1 / 255, name="preprocess")(image)
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="early")(x)
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="last")(x)
    aside = layers.Conv2D(6, 3, padding="same", name="aside")(x)
    x = layers.MaxPooling2D(4, name="sparse")(x)
    x = layers.Concatenate(name="joined")([x, layers.AveragePooling2D(4, name="mean")(aside)])
    y = patient
    for number in range(6):
        y = layers.Dense(3, name=f"patient_{number}")(y)
    y = layers.Concatenate()([keras.ops.where(keras.ops.isnan(y), 1.0, y), layers.Flatten()(patient)])
    # Maps that no image is in: no candidates.
    y = layers.Reshape((1, 1, 6), name="patient_map")(y)
    y = layers.Flatten()(layers.UpSampling2D(16, name="patient_large_map")(y))[:, :6]
    x = _mixed(x, y, units=5, residual=True)
    x = layers.Dense(4, name="logits")(layers.ReLU()(x))
    return keras.Model([image, patient], layers.Activation("sigmoid", name="probabilities")(x))


@pytest.fixture
def patients(rng):
    values = rng.normal(0, 1, (7, 3)).astype(np.float32)
    values[1, 2] = values[4] = np.nan
    return values


def test_build_fused_model_equals_a_tape_through_its_second_half(fused, rng, patients):
    images, class_ids = rng.integers(0, 256, (7, 32, 32), dtype=np.uint8), np.arange(7) % 4
    maps = gradcam.build(fused)(images, class_ids, beside={"patient": patients}, batch_size=3)
    features = keras.Model(fused.inputs[0], fused.get_layer("last").output)(images[..., None])
    rest = keras.Model([fused.get_layer("last").output, fused.inputs[1]], fused.get_layer("logits").output)
    features, chosen = convert_to_numpy(features), keras.ops.one_hot(class_ids, 4)
    beside = keras.ops.convert_to_tensor(patients)
    (gradient,) = gradients.of(lambda x: keras.ops.sum(rest([x, beside]) * chosen), [features])[1]
    expected = np.maximum((features * gradient.mean(axis=(1, 2))[:, None, None]).sum(axis=-1), 0)
    assert maps.heat.any(axis=(1, 2)).sum() >= 4
    # float32 sums in another order
    np.testing.assert_allclose(maps.heat, expected, rtol=1e-4, atol=1e-6 * expected.max())
    probabilities = fused.predict([images[..., None], patients], verbose=0)
    np.testing.assert_allclose(maps.probabilities, probabilities, rtol=1e-5)
    np.testing.assert_array_equal(maps.class_ids, class_ids)


@pytest.mark.parametrize("by_name", [False, True])
def test_build_reloaded_fused_model_has_exactly_the_same_maps(fused, rng, patients, tmp_path, by_name):
    images, beside = rng.integers(0, 256, (7, 32, 32), dtype=np.uint8), {"patient": patients}
    inputs = {tensor.name: tensor for tensor in reversed(fused.inputs)} if by_name else fused.inputs
    keras.Model(inputs, fused.output).save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert gradcam.default_layer(loaded) == "last"
    for before, after in zip(gradcam.build(fused)(images, beside=beside), gradcam.build(loaded)(images, beside=beside)):
        np.testing.assert_array_equal(after, before)


@for_tensorflow
def test_build_fused_model_is_traced_once_and_takes_no_images(fused, patients, monkeypatch):
    calls = []
    monkeypatch.setattr(keras.layers.GlobalMaxPooling2D, "call", _counted(layers.GlobalMaxPooling2D.call, calls))
    explain = gradcam.build(fused)
    before = len(calls)
    for count in (5, 7, 1, 0):
        maps = explain(np.ones((count, 32, 32), np.uint8), beside={"patient": patients[:count]}, batch_size=3)
        assert [part.shape for part in maps] == [(count, 8, 8), (count,), (count, 4), (count,)]
    assert len(calls) == before + 1


def _counted(call, calls):
    def counting(self, *args):
        calls.append(self.name)
        return call(self, *args)

    return counting


def test_build_input_without_a_name_keeps_the_name_of_its_layer(tmp_path):
    inputs = [keras.Input((2, 2, 1), dtype="uint8"), keras.Input((2,), dtype="int32")]
    x = layers.Conv2D(1, 1, kernel_initializer="ones", name="maps")(layers.Rescaling(1)(inputs[0]))
    x = layers.Concatenate()([layers.Flatten()(x), layers.Rescaling(1)(inputs[1])])
    model = keras.Model(inputs, layers.Softmax()(layers.Dense(2, kernel_initializer="ones", name="logits")(x)))
    names = [layer.name for layer in model.layers if isinstance(layer, layers.InputLayer)]
    (name,) = [name for name in names if model.get_layer(name).output is inputs[1]]
    model.save(tmp_path / "m.keras")
    for one in (model, keras.saving.load_model(tmp_path / "m.keras")):
        maps = gradcam.build(one, layer="maps")(PIXELS, 0, beside={name: [[1, 2]]})
        np.testing.assert_array_equal(maps.heat, PIXELS)  # α = 1
        with pytest.raises(ValueError, match="float64 of shape .*; expected int32"):
            gradcam.build(one, layer="maps")(PIXELS, 0, beside={name: [[1.5, 2]]})


def test_build_fused_model_with_unknown_values_that_reach_the_answer_is_refused():
    inputs = [keras.Input((2, 2, 1), dtype="uint8"), keras.Input((1,), name="patient")]
    x = layers.GlobalMaxPooling2D()(_pointwise([1], [0], name="maps")(layers.Rescaling(1)(inputs[0])))
    x = _dense([[1, 0], [1, 0]], name="logits")(layers.Concatenate()([x, inputs[1]]))
    explain = gradcam.build(keras.Model(inputs, layers.Activation("sigmoid")(x)), layer="maps")
    # The map is finite here: the features' weight does not depend on the patient.
    with pytest.raises(FloatingPointError, match=r"1 of 2 images are not finite.*NaN in `beside`.*\[1\]"):
        explain(np.repeat(PIXELS, 2, axis=0), 0, beside={"patient": [[1.0], [np.nan]]})


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (None, r"lacks \['patient'\] and has \[\]"),
        ({"patients": np.zeros((2, 3))}, r"lacks \['patient'\] and has \['patients'\], .* it takes \['patient'\]"),
        ({"patient": np.zeros((2, 3)), "image": 0}, r"lacks \[\] and has \['image'\]"),
        ({"patient": np.zeros((1, 3))}, r"float64 of shape \(1, 3\); expected float32 of shape \(2, 3\)"),
        ({"patient": np.zeros((2, 4))}, r"shape \(2, 4\)"),
        ({"patient": np.zeros(2)}, r"shape \(2,\)"),
        ({"patient": np.array([["a"] * 3] * 2)}, "<U1 of shape"),
        ({"patient": np.array([[None, 1, 2]] * 2)}, "object of shape"),
    ],
)
def test_build_unfit_other_inputs_are_refused(fused, beside, message):
    with pytest.raises(ValueError, match=message):
        gradcam.build(fused)(np.zeros((2, 32, 32), np.uint8), beside=beside)


def test_build_other_inputs_of_a_model_without_any_are_refused(explain, images):
    with pytest.raises(ValueError, match=r"has \['patient'\].* beside images it takes nothing"):
        explain(images, beside={"patient": np.zeros((7, 3))})


def test_build_no_and_two_image_inputs_are_refused():
    vector, one = keras.Input((4,), name="vector"), keras.Input((8, 8, 1), dtype="uint8", name="one")
    two = keras.Input((8, 8, 1), dtype="uint8", name="two")
    model = keras.Model(vector, layers.Dense(2, name="logits")(vector))
    with pytest.raises(ValueError, match=r"0 inputs of images among its inputs vector \(None, 4\); expected one"):
        gradcam.build(model)
    x = layers.Flatten()(layers.Concatenate()([layers.Conv2D(2, 3)(one), layers.Conv2D(2, 3)(two)]))
    for refused in (gradcam.build, gradcam.default_layer, gradcam.candidate_layers):
        with pytest.raises(ValueError, match=r"2 inputs of images among its inputs one .*, two "):
            refused(keras.Model([one, two], layers.Dense(2, name="logits")(x)))


def test_build_layer_that_no_image_reaches_is_refused(fused):
    candidates = gradcam.candidate_layers(fused)
    assert candidates[:3] == ["preprocess", "early", "last"] and candidates[-1] == "joined"
    assert set(candidates[3:-1]) == {"aside", "sparse", "mean"}
    for name in ("patient_map", "patient_large_map"):
        with pytest.raises(ValueError, match=rf"no path from the images .* leads through layer '{name}'.*joined"):
            gradcam.build(fused, layer=name)
    with pytest.raises(ValueError, match="'patient' puts out"):
        gradcam.build(fused, layer="patient")


def test_default_layer_of_a_fused_model_is_the_last_fine_map_before_the_pooling(fused):
    # Behind the pooling the image has two ways to the logits, and the patient's long way ends at the sum of both; no
    # map is off the trunk for it, but "aside" is, which the image passes around.
    assert gradcam.default_layer(fused) == "last"
    maps = gradcam.build(fused)(np.zeros((1, 32, 32), np.uint8), beside={"patient": np.zeros((1, 3))})
    assert maps.heat.shape == (1, 8, 8)


def test_default_layer_where_patient_data_scale_the_maps_is_the_scaled_map():
    image, patient = keras.Input((16, 16, 1), dtype="uint8"), keras.Input((3,), name="patient")
    x = layers.Conv2D(2, 3, padding="same", strides=2, name="maps")(layers.Rescaling(1)(image))
    x = layers.Multiply(name="scaled")([x, layers.Reshape((1, 1, 2), name="scales")(layers.Dense(2)(patient))])
    model = keras.Model([patient, image], layers.Dense(2, name="logits")(layers.GlobalMaxPooling2D()(x)))
    assert gradcam.candidate_layers(model)[1:] == ["maps", "scaled"] and gradcam.default_layer(model) == "scaled"


def test_build_takes_inputs_in_any_order_by_name():
    # h = image mean · scale + shift.
    named = {"scale": keras.Input((1,), name="scale"), "shift": keras.Input((1,), name="shift")}
    image = keras.Input((16, 16, 1), dtype="uint8", name="image")
    x = layers.AveragePooling2D(2)(layers.Rescaling(1)(image))
    x = _pointwise([1], [0], name="maps")(x)
    x = layers.Conv2D(1, 4, strides=4, kernel_initializer=keras.initializers.Constant(1 / 16), name="coarse")(x)
    x = _dense([[1, -1]], name="logits")(layers.GlobalAveragePooling2D()(x) * named["scale"] + named["shift"])
    model = keras.Model([named["shift"], image, named["scale"]], layers.Softmax()(x))
    assert gradcam.default_layer(model) == "maps"
    explain = gradcam.build(model)
    beside = {"scale": np.array([[2.0], [3.0]]), "shift": np.array([[-5.0], [0.0]])}
    maps = explain(np.full((2, 16, 16), 4, np.uint8), 0, beside=beside)
    for map_, scale in zip(maps.heat, (2, 3)):
        np.testing.assert_allclose(map_, np.full((8, 8), 4 * scale / 64), rtol=1e-6)  # α = scale / 64
    # Logits ±3 and ±12.
    np.testing.assert_allclose(maps.probabilities[:, 0], 1 / (1 + np.exp([-6, -24])), rtol=1e-6)
