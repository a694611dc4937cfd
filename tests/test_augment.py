import threading
import warnings

import albumentations as A
import cv2
import numpy as np
import pytest

from kerasmed import augment

# What moves pixels, and nothing else.
GEOMETRIC = (
    "flip",
    "rotate",
    "scale",
    "shift",
    "flip_vertical",
    "rotate_any",
    "rotate_30",
    "shear",
    "scale_wide",
    "pad",
    "crop",
)


@pytest.fixture
def batch(rng):
    return rng.integers(0, 256, (24, 32, 24), dtype=np.uint8)


@pytest.mark.parametrize("name", augment.NAMES)
def test_build_each_recipe_keeps_shape_and_type_and_changes_something(name, batch):
    got = augment.build((name,), (32, 24))(batch, seed=1)
    assert got.shape == batch.shape and got.dtype == np.uint8
    assert (got != batch).any()


def test_build_arguments_are_those_of_the_installed_albumentations():
    # It only warns of an argument that it does not know, and goes on with its default.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment.build(augment.NAMES, (32, 24))(np.zeros((1, 32, 24), np.uint8), seed=0)


@pytest.mark.parametrize("name", [*GEOMETRIC, "blur", "cutout"])
def test_build_black_stays_black(name):
    assert not augment.build((name,), (32, 24))(np.zeros((20, 32, 24), np.uint8), seed=0).any()


def _sides(masks):
    """Height and width of each mask's True rectangle, as shares of the picture."""
    return [masks.any(axis=axis).mean(axis=1) for axis in (2, 1)]


def test_build_flip_vertical_mirrors_top_and_bottom_of_about_half(rng):
    batch = rng.integers(0, 256, (400, 4, 4), dtype=np.uint8)
    got = augment.build(("flip_vertical",), (4, 4))(batch, seed=0)
    flipped = (got == batch[:, ::-1]).all(axis=(1, 2))
    assert (flipped | (got == batch).all(axis=(1, 2))).all()
    assert flipped.mean() == pytest.approx(0.5, abs=0.1)  # 400 draws at 0.5: four standard deviations


def _angles(name):
    """Degrees by which a recipe turns each of 200 horizontal lines."""
    line = np.zeros((200, 65, 65), np.uint8)
    line[:, 31:34] = 255
    got = augment.build((name,), (65, 65))(line, seed=0)
    # Moments of the line within the largest circle, which no turn cuts.
    y, x = np.mgrid[-32:33, -32:33]
    weights = got * (x**2 + y**2 < 32**2)
    covariance = [(weights * moment).sum(axis=(1, 2)) for moment in (x * x, x * y, y * y)]
    return np.degrees(np.arctan2(2 * covariance[1], covariance[0] - covariance[2]) / 2)


def test_build_rotate_any_turns_a_line_by_up_to_a_quarter():
    angles = _angles("rotate_any")
    turned = np.abs(angles[np.abs(angles) > 0.5])
    # Uniform in 0–90: of 100 draws at least one lies above 80 and one below 10, and the mean is 45 ± 4 · 2.6
    assert turned.max() > 80 and turned.min() < 10 and turned.mean() == pytest.approx(45, abs=11)


def test_build_rotate_30_turns_every_line_by_up_to_30_degrees_either_way():
    angles = _angles("rotate_30")
    # Uniform in −30 to 30: mean 0 ± 4 · 17.3 / √200; by half a degree or less one in 60, which is 3 ± 4 · 1.8 of 200.
    assert -30.5 < angles.min() < -27 and 27 < angles.max() < 30.5 and angles.mean() == pytest.approx(0, abs=5)
    assert (np.abs(angles) < 0.5).sum() <= 10
    white = augment.build(("rotate_30",), (65, 65))(np.full((200, 65, 65), 255, np.uint8), seed=0)
    corners = white[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners[np.abs(angles) > 3] == 0).all()  # the same seed, so the same angles


def test_build_scale_wide_spans_its_range():
    square = np.zeros((300, 64, 64), np.uint8)
    square[:, 20:44, 20:44] = 255
    heights, widths = _sides(augment.build(("scale_wide",), (64, 64))(square, seed=0) > 127)
    # 24 pixels by 0.8 to 1.3 are 19.2 to 31.2
    assert (np.abs(heights - widths) < 1.5 / 64).all()
    assert 18.5 < 64 * heights.min() < 21 and 29.5 < 64 * heights.max() < 32


def test_build_pad_and_crop_move_each_side_by_up_to_a_fifth(rng):
    white = np.full((300, 60, 60), 255, np.uint8)
    padded = augment.build(("pad",), (60, 60))(white, seed=0) > 127
    heights, widths = _sides(padded)
    # All four frames of 0.2 leave 1 / 1.4 of the side; one of 0.2 alone is 0.2 / 1.2 of it.
    assert 1 / 1.4 - 0.02 < min(heights.min(), widths.min()) < 0.8
    assert np.corrcoef(heights[heights < 1], widths[heights < 1])[0, 1] < 0.4  # not one draw for both axes
    first_rows = padded.any(axis=2).argmax(axis=1) / 60
    assert 0.12 < first_rows.max() < 0.2 / 1.2 + 0.02
    # Cropped, a ramp loses up to 0.2 at either end.
    ramp = np.repeat(np.linspace(0, 250, 60).astype(np.uint8)[None, None], 300, axis=0).repeat(60, axis=1)
    cropped = augment.build(("crop",), (60, 60))(ramp, seed=0)
    left, right = cropped[:, 0, 0] / 250, cropped[:, 0, -1] / 250
    assert left.min() == 0 and 0.17 < left.max() < 0.21 and right.max() == 1 and 0.79 < right.min() < 0.83


def test_build_blur_spreads_a_point_by_the_stated_width():
    point = np.zeros((200, 33, 33), np.uint8)
    point[:, 16, 16] = 255
    got = augment.build(("blur",), (33, 33))(point, seed=0).astype(float)
    # The middle of a Gaussian holds 1 / (2 π σ²): 0.57 for σ = 0.5 (0.62 in pixels) and 0.071 for 1.5.
    middle = got[:, 16, 16] / 255
    blurred = middle[middle < 1]
    assert 0.066 < blurred.min() < 0.085 and 0.4 < blurred.max() < 0.66
    assert 72 < len(blurred) < 128  # 200 draws at 0.5: four standard deviations


def test_build_cutout_blackens_one_rectangle_of_the_stated_size():
    white = np.full((300, 50, 50), 255, np.uint8)
    holes = augment.build(("cutout",), (50, 50))(white, seed=0) == 0
    heights, widths = (side[holes.any(axis=(1, 2))] for side in _sides(holes))
    np.testing.assert_allclose(holes.mean(axis=(1, 2))[holes.any(axis=(1, 2))], heights * widths)  # a full rectangle
    for sides in (heights, widths):
        assert 0.2 <= sides.min() < 0.22 and 0.38 <= sides.max() <= 0.4
    assert np.corrcoef(heights, widths)[0, 1] < 0.4


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
    # 0.0124–0.0277 of 255 is 3.2–7.1; levels cut towards 0 take up to 0.5, and 1,024 pixels spread by 2 %
    assert changed.std(axis=(1, 2)).min() > 2.6 and changed.std(axis=(1, 2)).max() < 7.4


LIBRARY = {
    "flip": A.HorizontalFlip(p=0.5),
    "flip_vertical": A.VerticalFlip(p=0.5),
    "noise": A.GaussNoise(std_range=(0.0124, 0.0277), p=0.5),
    "noise_rare": A.GaussNoise(std_range=(0.0124, 0.0277), p=0.25),
    "rotate": A.Rotate(limit=10, border_mode=cv2.BORDER_CONSTANT, p=0.5),
    "rotate_any": A.Rotate(limit=90, border_mode=cv2.BORDER_CONSTANT, p=0.5),
    "rotate_30": A.Rotate(limit=30, border_mode=cv2.BORDER_CONSTANT, p=1.0),
}


def _two_samples(name, count):
    """The same picture, many times, as the recipe makes it and as Albumentations does."""
    y, x = np.mgrid[:40, :48]
    picture = (127 + 60 * np.sin(x / 5) + 60 * np.cos(y / 7)).astype(np.uint8)  # lopsided, and far from both ends
    ours = augment.build((name,), picture.shape)(np.repeat(picture[None], count, axis=0), seed=0)
    library = A.Compose([LIBRARY[name]], seed=1)
    return picture, ours, np.stack([library(image=picture)["image"] for _ in range(count)])


@pytest.mark.parametrize("name", LIBRARY)
def test_build_own_changes_are_distributed_as_those_of_albumentations(name):
    picture, *both = _two_samples(name, 3000)
    changed, means, deviations, differences = [], [], [], []
    for draws in both:
        differs = (draws != picture).any(axis=(1, 2))
        changed.append(differs.mean())
        means.append(draws[differs].mean(axis=0))
        deviations.append(draws[differs].std(axis=0, dtype=float))
        differences.append(np.sort(np.abs(draws[differs].astype(int) - picture).mean(axis=(1, 2))))
    # Four standard errors of two shares of 3,000 draws, of two means, and of two deviations (at most 0.5 of a mean's).
    assert changed[0] == pytest.approx(changed[1], abs=4 * np.sqrt(2 * 0.25 / 3000))
    error = deviations[1] * np.sqrt(2 / len(differences[1])) + 1e-9
    # 1,919 pixels are looked at: of so many, five standard errors are one in a thousand tries. The first is not: there
    # Albumentations has no noise, as it seeds OpenCV's generator anew for each image.
    assert (np.abs(means[0] - means[1]) < 5 * error).ravel()[1:].all()
    assert (np.abs(deviations[0] - deviations[1]) < 5 * error).ravel()[1:].all()
    # The strengths, image by image: Kolmogorov and Smirnov's distance, with a level of one in 10,000.
    places = np.concatenate(differences)
    shares = [np.searchsorted(one, places, side="right") / len(one) for one in differences]
    assert np.abs(shares[0] - shares[1]).max() < 2.23 * np.sqrt(1 / len(differences[0]) + 1 / len(differences[1]))


def test_build_noise_takes_each_grey_level_as_often_as_albumentations():
    grey = np.full((1200, 32, 32), 100, np.uint8)
    ours = augment.build(("noise",), (32, 32))(grey, seed=0)
    library = A.Compose([LIBRARY["noise"]], seed=1)
    counts = []
    for draws in (ours, np.stack([library(image=image)["image"] for image in grey])):
        noisy = draws[(draws != 100).any(axis=(1, 2))]
        counts.append(np.bincount(noisy.ravel(), minlength=256) / noisy.size)
    # Some 600 images have noise: the widths drawn for them spread the share of a level by at most 3 % of itself.
    np.testing.assert_allclose(counts[0], counts[1], rtol=0.12, atol=4e-4)
    # Cut towards 0: no brighter and no darker, and of a deviation of 5, the middle level has 0.16 rather than 0.08.
    assert np.arange(256) @ counts[0] == pytest.approx(100, abs=0.03) and counts[0][100] > 0.15


@pytest.mark.parametrize("names", [("flip", "flip_vertical"), ("shear", "scale_wide"), ("cutout", "flip", "crop")])
def test_build_names_of_a_recipe_are_drawn_each_for_itself(names, rng):
    batch = rng.integers(0, 256, (8, 32, 24), dtype=np.uint8)
    recipe = augment.build(names, (32, 24))
    unchanged = np.stack([(recipe(batch, seed) == batch).all(axis=(1, 2)) for seed in range(200)])
    # By place in the batch: 200 draws at 0.25 or 0.125 each, four standard deviations.
    expected = 0.5 ** len(names)
    np.testing.assert_allclose(unchanged.mean(axis=0), expected, atol=4 * np.sqrt(expected * (1 - expected) / 200))


def test_build_on_several_threads_gives_the_same_pixels(rng):
    batch = rng.integers(0, 256, (32, 64, 64), dtype=np.uint8)
    recipe = augment.build(("flip", "noise", "rotate", "shift"), (64, 64))
    expected = [recipe(batch, seed) for seed in range(16)]
    got = [None] * 16

    def work(first):
        for seed in range(first, 16, 4):
            got[seed] = recipe(batch, seed)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(got, expected)


def test_build_leaves_the_batch_given_as_it_is(batch):
    before = batch.copy()
    augment.build(augment.NAMES, (32, 24))(batch, seed=1)
    np.testing.assert_array_equal(batch, before)


def test_build_no_names_is_no_recipe_and_unknown_names_are_refused():
    assert augment.build((), (4, 4)) is None
    with pytest.raises(ValueError, match=r"\['spin'\] is unknown; known are flip"):
        augment.build(("flip", "spin"), (4, 4))
