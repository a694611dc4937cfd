import numpy as np
import pytest

from kerasmed import augment


@pytest.fixture
def batch(rng):
    return rng.integers(0, 256, (24, 32, 24), dtype=np.uint8)


@pytest.mark.parametrize("name", augment.NAMES)
def test_build_each_recipe_keeps_shape_and_type_and_changes_something(name, batch):
    got = augment.build((name,), (32, 24))(batch, seed=1)
    assert got.shape == batch.shape and got.dtype == np.uint8
    assert (got != batch).any()


def test_build_same_seed_same_pixels_other_seed_others(batch):
    recipe = augment.build(augment.NAMES, (32, 24))
    first = recipe(batch, seed=1)
    recipe(batch, seed=2)
    np.testing.assert_array_equal(recipe(batch, seed=1), first)
    np.testing.assert_array_equal(augment.build(augment.NAMES, (32, 24))(batch, seed=1), first)
    assert (recipe(batch, seed=2) != first).any()


def test_build_flip_mirrors_about_half_of_the_images(rng):
    batch = rng.integers(0, 256, (400, 4, 4), dtype=np.uint8)
    got = augment.build(("flip",), (4, 4))(batch, seed=0)
    flipped = (got == batch[..., ::-1]).all(axis=(1, 2))
    assert (flipped | (got == batch).all(axis=(1, 2))).all()
    # 400 draws at 0.5: four standard deviations are 0.1
    assert flipped.mean() == pytest.approx(0.5, abs=0.1)


def test_build_noise_has_the_stated_strength():
    grey = np.full((200, 32, 32), 128, np.uint8)
    got = augment.build(("noise",), (32, 32))(grey, seed=0).astype(float)
    changed = got[(got != 128).any(axis=(1, 2))]
    # p = 0.5 of 200: four standard deviations are 28
    assert 72 < len(changed) < 128
    # 0.0124–0.0277 of 255 is 3.2–7.1; the library truncates towards 0, which takes up to 0.5, and 1,024 pixels spread
    # by 2 %
    assert changed.std(axis=(1, 2)).min() > 2.6 and changed.std(axis=(1, 2)).max() < 7.4


def test_build_no_names_is_no_recipe_and_unknown_names_are_refused():
    assert augment.build((), (4, 4)) is None
    with pytest.raises(ValueError, match=r"\['spin'\] is unknown; known are flip"):
        augment.build(("flip", "spin"), (4, 4))
