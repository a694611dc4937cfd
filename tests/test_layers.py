from concurrent.futures import ThreadPoolExecutor

import cv2
import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from kerasmed import augment
from kerasmed.layers import _TRANSFORMS, GatedAttentionPooling, Preprocessing, build_augmentation, masked_softmax
from tests import gradients


def test_preprocessing_by_hand():
    grey = np.uint8([[[[10], [200]]]])
    out = Preprocessing(scale=[1, 0.5, 2], offset=[0, 1, -3])(grey)
    assert out.dtype == "float32"
    np.testing.assert_array_equal(out, np.float32([[[[10, 6, 17], [200, 101, 397]]]]))


def test_preprocessing_of_colour_keeps_the_channels_apart_and_bgr_reverses_them():
    colour = np.uint8([[[[10, 20, 30]]]])
    np.testing.assert_array_equal(Preprocessing(offset=[1, 2, 3])(colour), np.float32([[[[11, 22, 33]]]]))
    np.testing.assert_array_equal(Preprocessing(offset=[1, 2, 3], bgr=True)(colour), np.float32([[[[31, 22, 13]]]]))


def test_preprocessing_limits_map_to_minus_one_and_one():
    ends = convert_to_numpy(Preprocessing(1 / 127.5, -1)(np.uint8([0, 255]).reshape(2, 1, 1, 1)))
    np.testing.assert_allclose(ends[:, 0, 0], [[-1] * 3, [1] * 3], atol=1e-6)  # two roundings in float32


def test_preprocessing_under_mixed_precision_computes_in_float32():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layer = Preprocessing(1.0, -103.939)
        out = layer(np.full((1, 2, 2, 1), 201, np.uint8))
    finally:
        keras.config.set_dtype_policy(before)
    assert layer.compute_dtype == out.dtype == "float32"
    assert float(out[0, 0, 0, 0]) == np.float32(201) - np.float32(103.939)  # in float16 it would be 97.0625


def test_preprocessing_shape_is_known_without_computing():
    layer = Preprocessing()
    assert layer.compute_output_shape((None, 5, 4, 1)) == (None, 5, 4, 3)
    assert layer(keras.Input((5, 4, 1), dtype="uint8")).shape == (None, 5, 4, 3)


def test_preprocessing_round_trips_through_keras_file(tmp_path, rng):
    inputs = keras.Input((4, 4, 3), dtype="uint8")
    model = keras.Model(inputs, Preprocessing([1, 2, 3], [0.1, 0.2, 0.3], bgr=True, name="preprocess")(inputs))
    model.save(tmp_path / "m.keras")
    reloaded = keras.saving.load_model(tmp_path / "m.keras")
    assert reloaded.get_layer("preprocess").get_config() == model.get_layer("preprocess").get_config()
    pixels = rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(reloaded(pixels), model(pixels))


def test_preprocessing_of_two_channels_is_refused():
    with pytest.raises(ValueError, match=r"got 2 channels.*expected 1 \(grey\) or 3"):
        Preprocessing()(np.zeros((1, 4, 4, 2), np.uint8))


@pytest.mark.parametrize("options", [{"scale": [1, 2]}, {"offset": [1, 2, 3, 4]}])
def test_preprocessing_values_for_other_numbers_of_channels_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`.*one number, or three"):
        Preprocessing(**options)


# --- attention -------------------------------------------------------------------------------------------------------


def _pooling(slices, mask, **options):
    layer = GatedAttentionPooling(return_weights=True, **options)
    pooled, weights = layer([slices, mask])
    return layer, convert_to_numpy(pooled), convert_to_numpy(weights)


def test_gated_attention_pooling_by_hand():
    slices = np.float32([[[1, 0], [0, 1], [9, 9]], [[2, 5], [9, 9], [9, 9]]])
    mask = np.array([[True, True, False], [True, False, False]])
    layer = GatedAttentionPooling(1, return_weights=True)
    layer.build([(2, 3, 2), (2, 3)])
    # Hidden values: tanh(artanh 1/2) · sigmoid(ln 3) = 1/2 · 3/4 and tanh(0) · sigmoid(0) = 0, times w = 8/3 · ln 4.
    told = [[[np.arctanh(0.5)], [0]], [[np.log(3)], [0]], [[8 / 3 * np.log(4)]]]
    layer.set_weights([np.float32(kernel) for kernel in told])
    pooled, weights = layer([slices, mask])
    np.testing.assert_allclose(weights, [[0.8, 0.2, 0], [1, 0, 0]], atol=1e-6)  # ln 4 against 0: 4 to 1
    np.testing.assert_allclose(pooled, [[0.8, 0.2], [2, 5]], atol=1e-6)
    assert convert_to_numpy(weights)[0, 2] == convert_to_numpy(weights)[1, 1] == 0


def test_gated_attention_pooling_of_equal_slices_weighs_them_alike(rng):
    one = np.float32(rng.normal(size=(4, 1, 6)))
    mask = np.arange(5) < np.array([[5], [3], [2], [1]])
    _, pooled, weights = _pooling(np.repeat(one, 5, axis=1), mask)
    np.testing.assert_allclose(weights, mask / mask.sum(axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(pooled, one[:, 0], rtol=1e-5)


def test_gated_attention_pooling_does_not_depend_on_the_order_of_slices(rng):
    slices, mask = np.float32(rng.normal(size=(3, 7, 4))), rng.random((3, 7)) < 0.7
    mask[:, 0] = True
    layer, pooled, weights = _pooling(slices, mask)
    order = rng.permutation(7)
    other_pooled, other_weights = layer([slices[:, order], mask[:, order]])
    np.testing.assert_allclose(other_pooled, pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other_weights, weights[:, order], rtol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert weights[mask].std() > 0.01 and (weights[mask] > 0).all() and (weights[~mask] == 0).all()


def test_gated_attention_pooling_without_competing_by_hand():
    slices = np.float32([[[1, 0], [0, 1], [9, 9]], [[1, 0], [9, 9], [9, 9]]])
    mask = np.array([[True, True, False], [True, False, False]])
    layer = GatedAttentionPooling(1, competing=False, return_weights=True)
    layer.build([(2, 3, 2), (2, 3)])
    # As above the scores are ln 4 and 0: sigmoids of 4/5 and 1/2, over two slices in the first row, one in the second.
    told = [[[np.arctanh(0.5)], [0]], [[np.log(3)], [0]], [[8 / 3 * np.log(4)]]]
    layer.set_weights([np.float32(kernel) for kernel in told])
    pooled, weights = layer([slices, mask])
    np.testing.assert_allclose(weights, [[0.4, 0.25, 0], [0.8, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(pooled, [[0.4, 0.25], [0.8, 0]], atol=1e-6)
    assert (convert_to_numpy(weights)[~mask] == 0).all() and convert_to_numpy(pooled)[1, 1] == 0


def test_gated_attention_pooling_without_competing_weighs_each_slice_by_itself(rng):
    slices, mask = np.float32(rng.normal(size=(4, 5, 3))), np.ones((4, 5), bool)
    layer, _, weights = _pooling(slices, mask, competing=False)
    other = slices.copy()
    other[:, 1:] = rng.normal(size=(4, 4, 3))
    _, moved = layer([other, mask])
    np.testing.assert_array_equal(moved[:, 0], weights[:, 0])
    assert np.abs(moved - weights)[:, 1:].min() > 0 and weights.min() > 0 and weights.max() < 1 / 5
    # With fewer slices each weighs more, in proportion.
    _, fewer = layer([slices, np.arange(5) < np.full((4, 1), 2)])
    np.testing.assert_allclose(fewer[:, :2], weights[:, :2] * 5 / 2, rtol=1e-6)
    assert (convert_to_numpy(fewer)[:, 2:] == 0).all()


@pytest.mark.parametrize("competing", [True, False])
def test_gated_attention_pooling_values_that_are_masked_change_no_bit_of_output_and_gradients(competing, rng):
    slices = np.float32(rng.normal(size=(3, 5, 4)))
    mask = np.arange(5) < np.array([[5], [3], [0]])
    layer = GatedAttentionPooling(8, competing=competing, return_weights=True)
    layer.build([slices.shape, mask.shape])
    results = []

    def squared(x):
        pooled, weights = layer([x, mask])
        return keras.ops.sum(pooled**2) + keras.ops.sum(weights**2), pooled, weights

    for odd in (0.0, 1e30, np.nan, np.inf):
        x = np.where(mask[..., None], slices, np.float32(odd))
        (_, *told), found = gradients.of(squared, [x], layer.trainable_variables)
        results.append([*told, *found])
    for result in results:
        assert np.abs(result[3]).max() > 0
        for got, expected in zip(result, results[0]):
            np.testing.assert_array_equal(got, expected)
    assert (results[0][2][~mask] == 0).all()


@pytest.mark.parametrize("competing", [True, False])
def test_gated_attention_pooling_of_a_row_without_slices_gives_zeros(competing):
    slices, mask = np.full((2, 3, 4), np.nan, np.float32), np.array([[0.0, 0, 0], [0, 0, 0]])
    _, pooled, weights = _pooling(slices, mask, competing=competing)
    np.testing.assert_array_equal(pooled, np.zeros((2, 4)))
    np.testing.assert_array_equal(weights, np.zeros((2, 3)))


def test_gated_attention_pooling_takes_numbers_as_mask_and_returns_the_vector_alone_by_default(rng):
    slices, mask = np.float32(rng.normal(size=(2, 3, 4))), np.array([[1, 0, 1], [1, 1, 0]])
    layer, pooled, _ = _pooling(slices, mask.astype(bool), units=5)
    alone = GatedAttentionPooling(5)
    alone.build([slices.shape, mask.shape])
    alone.set_weights(layer.get_weights())
    for dtype in ("float32", "int64", "uint8"):
        np.testing.assert_array_equal(alone([slices, mask.astype(dtype)]), pooled)


def test_gated_attention_pooling_under_mixed_precision_weighs_in_float32(rng):
    slices, mask = rng.normal(size=(2, 300, 4)), np.ones((2, 300), bool)
    layer = GatedAttentionPooling(return_weights=True, dtype="mixed_float16")
    pooled, weights = layer([np.float16(slices), mask])
    assert pooled.dtype == "float16" and weights.dtype == "float32"
    np.testing.assert_allclose(convert_to_numpy(weights).sum(axis=1), 1, rtol=1e-6)  # in float16, 300 roundings: 1e-3
    apart = GatedAttentionPooling(competing=False, return_weights=True, dtype="mixed_float16")
    pooled, weights = apart([np.float16(slices * 0 + 100), mask])
    # The scores are the same of all: each weighs sigmoid / 300, and the pooled is 100 of the sigmoids.
    assert pooled.dtype == "float16" and weights.dtype == "float32"
    np.testing.assert_allclose(
        pooled, 100 * convert_to_numpy(weights).sum(axis=1, keepdims=True).repeat(4, 1), rtol=1e-3
    )


@pytest.mark.parametrize("competing", [True, False])
def test_gated_attention_pooling_round_trips_through_keras_file(competing, tmp_path, rng):
    inputs = [keras.Input((5, 4)), keras.Input((5,), dtype="bool")]
    layer = GatedAttentionPooling(7, competing=competing, return_weights=True, name="pooled")
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    assert copy.get_layer("pooled").get_config() == layer.get_config() and layer.get_config()["units"] == 7
    assert layer.get_config()["competing"] is competing and GatedAttentionPooling().competing
    assert keras.saving.get_registered_name(GatedAttentionPooling) == "kerasmed>GatedAttentionPooling"
    batch = [np.float32(rng.normal(size=(3, 5, 4))), rng.random((3, 5)) < 0.5]
    for got, expected in zip(copy(batch), model(batch)):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shapes", [[(2, 5, 4), (2, 4)], [(2, 5), (2, 5)], [(2, 5, 4)], [(2, 5, 4), (2, 5, 1)]])
def test_gated_attention_pooling_of_other_shapes_is_refused(shapes):
    with pytest.raises(ValueError, match=r"expected a list of the slices, \(batch, S, D\), and their mask"):
        GatedAttentionPooling()([np.zeros(shape, np.float32) for shape in shapes])


def test_gated_attention_pooling_without_units_is_refused():
    with pytest.raises(ValueError, match="`units` is 0"):
        GatedAttentionPooling(0)


def test_masked_softmax_by_hand():
    scores = np.float32([[[0, np.log(3), 7], [np.log(2), 5, 0]], [[1, 1, 1], [4, 4, 4]]])
    mask = np.array([[[1, 1, 0], [1, 0, 1]], [[1, 1, 1], [0, 0, 1]]], bool)
    got = convert_to_numpy(masked_softmax(scores, mask))
    expected = [[[1 / 4, 3 / 4, 0], [2 / 3, 0, 1 / 3]], [[1 / 3] * 3, [0, 0, 1]]]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (got[~mask] == 0).all()


def test_masked_softmax_of_what_the_mask_leaves_out_changes_no_bit_of_output_and_gradient(rng):
    scores, mask = rng.normal(0, 3, (6, 4)).astype("float32"), rng.random((6, 4)) < 0.5
    mask[0], mask[1] = True, False
    results = []

    def summed(x):
        weights = masked_softmax(x, mask)
        return keras.ops.sum(weights * np.arange(4, dtype="float32")), weights

    for odd in (0.0, np.nan, np.inf, -np.inf, 1e38):
        (_, weights), (gradient,) = gradients.of(summed, [np.where(mask, scores, np.float32(odd))])
        results.append([weights, gradient])
    for weights, gradient in results:
        np.testing.assert_array_equal(weights, results[0][0])
        np.testing.assert_array_equal(gradient, results[0][1])
    weights, gradient = results[0]
    assert (weights[~mask] == 0).all() and (gradient[~mask] == 0).all() and np.abs(gradient[0]).min() > 0
    np.testing.assert_allclose(weights.sum(axis=1), mask.any(axis=1), rtol=1e-6)


def test_masked_softmax_of_large_scores_stays_finite_and_goes_by_differences():
    scores, mask = np.float32([[-1e20, -1e20, 0], [1e20, 0, 0], [5000, 5001, 9000]]), np.array([[1, 1, 0]] * 3, bool)
    share = 1 / (1 + np.e)
    np.testing.assert_allclose(
        masked_softmax(scores, mask), [[0.5, 0.5, 0], [1, 0, 0], [share, 1 - share, 0]], rtol=1e-6
    )


# --- augmentation ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head():
    """One picture, 300 times: a textured patch on black."""
    patch = np.random.default_rng(0).integers(60, 200, (6, 6), dtype=np.uint8)
    picture = np.zeros((96, 80), np.uint8)
    picture[20:72, 16:60] = cv2.resize(patch, (44, 52), interpolation=cv2.INTER_CUBIC)
    return np.repeat(picture[None], 300, axis=0)


def test_build_augmentation_knows_the_names_of_augment():
    assert sorted(_TRANSFORMS) == sorted(augment.NAMES)


@pytest.mark.parametrize("name", [name for name in augment.NAMES if "noise" not in name and "bright" not in name])
def test_build_augmentation_black_stays_black(name):
    assert not build_augmentation((name,), (32, 24))(np.zeros((20, 32, 24), np.uint8), seed=0).any()


CENTRED = [name for name in augment.NAMES if name not in ("shift", "pad", "crop", "cutout")]


@pytest.mark.parametrize("name", CENTRED)
def test_build_augmentation_keeps_the_middle_where_it_is(name):
    # A dot in the centre of an oblong picture stays there under all that is centred, in either library.
    dot = np.zeros((40, 33, 25), np.uint8)
    dot[:, 15:18, 11:14] = 200
    for build in (augment.build, build_augmentation):
        got = build((name,), (33, 25))(dot, seed=0).astype(float)
        weights = got - np.median(got, axis=(1, 2), keepdims=True)
        weights[weights < 60] = 0
        y, x = ((weights * axis).sum(axis=(1, 2)) / weights.sum(axis=(1, 2)) for axis in np.mgrid[:33, :25])
        # Albumentations scales to whole pixels and centres those, up to half a pixel off.
        np.testing.assert_allclose(y, 16, atol=0.6)
        np.testing.assert_allclose(x, 12, atol=0.6)


@pytest.mark.parametrize("name", augment.NAMES)
def test_build_augmentation_changes_as_much_and_as_often_as_albumentations(head, name):
    changed, strength, brightness = [], [], []
    for build in (augment.build, build_augmentation):
        draws = build((name,), (96, 80))(head, seed=0).astype(float)
        differs = (draws != head).any(axis=(1, 2))
        changed.append(differs.mean())
        strength.append(np.abs(draws - head)[differs].mean())
        brightness.append(draws[differs].mean())
    # 300 draws at 0.5 or 0.25: four standard errors of a difference are 0.16
    assert changed[1] == pytest.approx(changed[0], abs=0.16)
    assert changed[1] == pytest.approx({"noise_rare": 0.25, "rotate_30": 1.0}.get(name, 0.5), abs=0.12)
    # Albumentations shifts and scales by whole pixels and cuts noise towards 0: up to a fifth of the change.
    assert strength[1] == pytest.approx(strength[0], rel=0.25)
    assert brightness[1] == pytest.approx(brightness[0], rel=0.06)


@pytest.mark.parametrize("name", ["shear", "scale_wide", "pad", "crop", "blur"])
def test_build_augmentation_with_given_draws_equals_opencv(name, head, monkeypatch):
    picture = head[0]
    height, width = picture.shape
    centre = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    shear = np.array([[1, np.tan(0.2), 0], [np.tan(-0.1), 1, 0], [0, 0, 1]])

    def resized(part):
        return cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)

    # What is drawn, in order: angles of x and y; the scale; top, right, bottom, left; σ.
    drawn, expected = {
        "shear": ([0.2, -0.1], cv2.warpAffine(picture, (centre @ shear @ np.linalg.inv(centre))[:2], (width, height))),
        "scale_wide": ([4 / 3], resized(picture[12:-12, 10:-10])),
        "pad": ([0.125, 0, 0.0625, 0.1], resized(np.pad(picture, ((12, 6), (8, 0))))),
        "crop": ([0.125, 0, 0.0625, 0.1], resized(picture[12:-6, 8:])),
        "blur": ([1.2], cv2.GaussianBlur(picture, (11, 11), 1.2)),
    }[name]
    draws = iter(drawn)
    monkeypatch.setattr(keras.random, "uniform", lambda shape, *_, **__: np.full(shape, next(draws), np.float32))
    _, transform = _TRANSFORMS[name]()
    got = convert_to_numpy(transform(keras.ops.cast(picture[None, ..., None], "float32"), None))[0, ..., 0]
    # OpenCV rounds places to 1/32 of a pixel and results to whole grey levels.
    np.testing.assert_allclose(got, expected, atol=2)
    assert not list(draws)


def test_build_augmentation_same_seed_same_pixels_other_seed_others(rng):
    batch = rng.integers(0, 256, (8, 32, 24), dtype=np.uint8)
    recipe = build_augmentation(augment.NAMES, (32, 24))
    first = recipe(batch, seed=1)
    assert first.dtype == np.uint8 and first.shape == batch.shape
    assert (recipe(batch, seed=2) != first).any()
    np.testing.assert_array_equal(recipe(batch, seed=1), first)
    with ThreadPoolExecutor(1) as pool:
        np.testing.assert_array_equal(pool.submit(recipe, batch, 1).result(), first)


def test_build_augmentation_flips_about_half():
    batch = np.tile(np.uint8([[0, 255]]), (400, 1, 1))
    got = build_augmentation(("flip",), (1, 2))(batch, seed=0)
    # 400 draws at 0.5: four standard errors are 0.1
    assert (got[:, 0, 0] == 255).mean() == pytest.approx(0.5, abs=0.1) and (np.sort(got) == batch).all()


def test_build_augmentation_no_names_is_no_recipe_and_unknown_names_are_refused():
    assert build_augmentation((), (4, 4)) is None
    with pytest.raises(ValueError, match=r"\['spin'\] is unknown"):
        build_augmentation(("spin",), (4, 4))
