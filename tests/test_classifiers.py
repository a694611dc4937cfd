import numpy as np
import pytest

from kerasmed import classifiers


def _pictures(rng, labels):
    """Noise, and where the first label is 1 a brighter left half."""
    images = rng.integers(60, 120, (len(labels), 64, 64))
    images[:, :, :32] += (40 * labels[:, 0]).astype(int)[:, None, None]
    return images.astype(np.uint8)


def test_svc_on_pixels_learns_what_pixels_show_and_no_more(rng):
    labels = (rng.random((120, 2)) < 0.5).astype(float)
    images = _pictures(rng, labels)
    told = classifiers.svc_on_pixels(images[:80], labels[:80], images[80:])
    assert told.shape == (40, 2) and ((told >= 0) & (told <= 1)).all()
    right = (told >= 0.5) == labels[80:]
    assert right[:, 0].all()
    assert right[:, 1].mean() < 0.8  # 40 fair coins: 0.5, and 0.8 is four standard errors above


def test_svc_on_pixels_of_a_rare_label_is_its_share(rng):
    labels = np.zeros((20, 3))
    labels[:4, 0], labels[:, 1], labels[:, 2] = 1, 1, np.nan
    told = classifiers.svc_on_pixels(_pictures(rng, labels * 0), labels, _pictures(rng, labels[:2] * 0))
    np.testing.assert_array_equal(told, [[0.2, 1, 0]] * 2)


def test_svc_on_pixels_leaves_unknown_labels_out_and_draws_at_most_so_many(rng):
    labels = (rng.random((60, 1)) < 0.5).astype(float)
    images = _pictures(rng, labels)
    unknown = labels.copy()
    unknown[::2] = np.nan
    told = classifiers.svc_on_pixels(images, unknown, images)
    assert ((told >= 0.5) == labels).all()
    few = classifiers.svc_on_pixels(images, labels, images, max_images=20, seed=1)
    assert not np.array_equal(few, classifiers.svc_on_pixels(images, labels, images, max_images=20, seed=2))
    np.testing.assert_array_equal(few, classifiers.svc_on_pixels(images, labels, images, max_images=20, seed=1))


def test_svc_on_pixels_without_queries_answers_nothing(rng):
    labels = np.array([[0.0], [1.0]] * 10)
    images = _pictures(rng, labels)
    assert classifiers.svc_on_pixels(images, labels, images[:0]).shape == (0, 1)


@pytest.mark.parametrize("count", [0, 3])
def test_svc_on_pixels_of_too_few_images_needs_no_machine(rng, count):
    labels = np.ones((count, 1))
    told = classifiers.svc_on_pixels(_pictures(rng, labels), labels, _pictures(rng, np.ones((1, 1))))
    assert told.tolist() == [[1.0 if count else 0.0]]
