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


def test_logistic_on_table_learns_the_chances_of_a_simulated_label(rng):
    age = rng.uniform(0, 90, 20_000)
    chance = 1 / (1 + np.exp(-(age - 60) / 10))
    labels = (rng.random((20_000, 1)) < chance[:, None]).astype(float)
    told = classifiers.logistic_on_table(age[:, None], labels, np.array([[30.0], [60.0], [80.0]]))
    # 20,000 rows: a standard error of the logit below 0.04, of the probability below 0.01
    np.testing.assert_allclose(told[:, 0], 1 / (1 + np.exp([3, 0, -2])), atol=0.03)


def test_logistic_on_table_learns_what_unknown_means(rng):
    labels = np.tile([[1.0], [0.0]], (500, 1))
    values = np.where(labels == 1, np.nan, rng.normal(5, 1, (1000, 1)))  # unknown where present, else near the mean
    told = classifiers.logistic_on_table(values, labels, np.array([[np.nan], [5.0]]))
    assert told[0, 0] > 0.99 and told[1, 0] < 0.01


def test_logistic_on_table_leaves_unknown_labels_out(rng):
    values, labels = rng.normal(size=(400, 2)), (rng.random((400, 2)) < 0.4).astype(float)
    labels[:, 0] = values[:, 0] > 0
    unknown = labels.copy()
    unknown[::2, 0] = np.nan
    told = classifiers.logistic_on_table(values, unknown, values)
    assert ((told[:, 0] > 0.5) == labels[:, 0]).mean() > 0.97
    # The other label keeps all its rows, and the order of the columns does not matter.
    whole = classifiers.logistic_on_table(values[:, ::-1], labels[:, ::-1], values[:, ::-1])
    np.testing.assert_allclose(told[:, 1], whole[:, 0], atol=1e-4)  # where the solver stops


def test_logistic_on_table_of_one_kind_is_its_share_and_a_column_never_known_tells_nothing(rng):
    values = np.column_stack([rng.normal(size=50), np.full(50, np.nan)])
    labels = np.column_stack([np.ones(50), np.zeros(50), np.full(50, np.nan), rng.random(50) < 0.5])
    told = classifiers.logistic_on_table(values, labels, [[0.0, np.nan], [0.0, 7.0]])
    assert told[:, :3].tolist() == [[1, 0, 0]] * 2
    assert told[0, 3] == told[1, 3] == pytest.approx(labels[:, 3].mean(), abs=0.1)
    assert classifiers.logistic_on_table(values, labels, values[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("train", "labels", "rows"),
    [((3, 2), (4, 1), (5, 2)), ((3, 2), (3, 1), (5, 1)), ((0, 2), (0, 1), (5, 2))],
)
def test_logistic_on_table_of_unlike_lengths_is_refused(train, labels, rows):
    with pytest.raises(
        ValueError, match=rf"values of shape \({train[0]}, 2\) beside labels of shape \({labels[0]}, 1\)"
    ):
        classifiers.logistic_on_table(np.zeros(train), np.zeros(labels), np.zeros(rows))
