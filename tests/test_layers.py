from concurrent.futures import ThreadPoolExecutor

import cv2
import keras
import numpy as np
import pytest

from kerasmed import augment
from kerasmed.layers import Preprocessing, build_augmentation


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
    ends = Preprocessing(1 / 127.5, -1)(np.uint8([0, 255]).reshape(2, 1, 1, 1)).numpy()
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


# --- augmentation ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head():
    """One picture, 300 times: a textured patch on black."""
    patch = np.random.default_rng(0).integers(60, 200, (6, 6), dtype=np.uint8)
    picture = np.zeros((96, 80), np.uint8)
    picture[20:72, 16:60] = cv2.resize(patch, (44, 52), interpolation=cv2.INTER_CUBIC)
    return np.repeat(picture[None], 300, axis=0)


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
    assert changed[1] == pytest.approx({"noise_rare": 0.25}.get(name, 0.5), abs=0.12)
    # Albumentations shifts and scales by whole pixels and cuts noise towards 0: up to a fifth of the change.
    assert strength[1] == pytest.approx(strength[0], rel=0.25)
    assert brightness[1] == pytest.approx(brightness[0], rel=0.06)


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
