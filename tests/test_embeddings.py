import time

import keras
import numpy as np
import pandas as pd
import pytest

from kerasmed import backbones, embeddings

for_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="tf.data serves TensorFlow alone; tests/test_batches.py has the rest",
)


def _encoder(size=(8, 8)):
    """Mean grey level and mean square of a slice, so that every value can be worked out by hand."""
    inputs = keras.Input((*size, 1), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1.0)(inputs)
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Concatenate()([x, keras.layers.Multiply()([x, x])]))
    return keras.Model(inputs, pooled)


def _volumes(depths, size=(8, 8), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (depth, *size), dtype=np.uint8) for depth in depths]


def _given(volumes):
    """Depths, and the function that loads a series."""
    return [len(volume) for volume in volumes], volumes.__getitem__


def _expected(volumes):
    slices = np.concatenate(volumes).astype(float)
    return np.stack([slices.mean(axis=(1, 2)), (slices**2).mean(axis=(1, 2))], axis=1)


def test_encode_slices_series_of_unlike_depths_gives_a_row_a_slice_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD_SLICES", 4)  # shards that end within series
    volumes = _volumes((3, 1, 7, 2))
    values = embeddings.encode_slices(_encoder(), *_given(volumes), tmp_path, batch_size=3, progress=False)
    assert values.shape == (13, 2) and values.dtype == np.float32
    np.testing.assert_allclose(values, _expected(volumes), rtol=1e-5)


def test_encode_slices_killed_call_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD_SLICES", 4)
    volumes, encoder = _volumes((3, 1, 7, 2)), _encoder()
    asked = []
    predict = encoder.predict

    def counted(batches, **options):
        asked.append(sum(map(len, batches)))
        return predict(batches, **options)

    def killed(batches, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return counted(batches, **options)

    monkeypatch.setattr(encoder, "predict", killed)
    with pytest.raises(KeyboardInterrupt):
        embeddings.encode_slices(encoder, *_given(volumes), tmp_path, progress=False)
    assert not (tmp_path / "features.npy").exists()
    asked.clear()
    monkeypatch.setattr(encoder, "predict", counted)
    values = embeddings.encode_slices(encoder, *_given(volumes), tmp_path, progress=False)
    assert asked == [4, 1]
    np.testing.assert_allclose(values, _expected(volumes), rtol=1e-5)
    asked.clear()
    embeddings.encode_slices(encoder, *_given(volumes), tmp_path, progress=False)
    assert asked == [] and [path.name for path in tmp_path.glob("[!.]*")] == ["features.npy"]


@for_tensorflow
def test_encode_slices_has_batches_that_are_not_tuned(tmp_path, monkeypatch):
    # Where a dataset ends, tf.data's autotuner may hold `predict` up for seconds.
    encoder, given = _encoder(), []
    predict = encoder.predict
    monkeypatch.setattr(encoder, "predict", lambda batches, **options: (given.append(batches), predict(batches))[1])
    embeddings.encode_slices(encoder, *_given(_volumes((3, 4))), tmp_path, batch_size=3, progress=False)
    assert [dataset.options().autotune.enabled for dataset in given] == [False]
    assert [len(batch) for batch in given[0]] == [3, 3, 1]


def test_encode_slices_of_no_series_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no series to encode"):
        embeddings.encode_slices(_encoder(), *_given([]), tmp_path)


def test_encode_slices_values_that_are_not_finite_are_refused(tmp_path):
    encoder = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    encoder.layers[-1].set_weights([np.full((16, 2), np.inf), np.zeros(2)])
    with pytest.raises(FloatingPointError, match="not finite"):
        embeddings.encode_slices(encoder, *_given([np.ones((2, 4, 4), np.uint8)]), tmp_path, progress=False)
    assert not (tmp_path / "features.npy").exists()


def test_encode_volumes_gives_a_row_a_depth_position(tmp_path):
    inputs = keras.Input((4, 2, 2, 1), dtype="uint8")
    planes = keras.layers.Reshape((4, 4))(keras.layers.Rescaling(1.0)(inputs))
    encoder = keras.Model(inputs, keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")(planes))
    flat = np.zeros((3, 2, 2), np.uint8)
    rising = np.repeat(np.arange(4, dtype=np.uint8) * 30, 4).reshape(4, 2, 2)
    values = embeddings.encode_volumes(encoder, 2, [flat, rising].__getitem__, tmp_path, progress=False)
    assert values.ravel().tolist() == [0, 0, 0, 0, 0, 120, 240, 360]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_resample_keeps_ends_and_constants(depth):
    volume = _volumes((4,))[0]
    made = embeddings.resample(volume, (depth, 8, 8))
    np.testing.assert_array_equal(made[0], volume[0])
    if depth > 1:
        np.testing.assert_array_equal(made[-1], volume[-1])
    assert (embeddings.resample(np.full((1, 2, 2), 9, np.uint8), (depth, 2, 2)) == 9).all()
    np.testing.assert_array_equal(embeddings.resample(volume, (4, 8, 8)), volume)


def test_resample_to_half_the_size_averages_pixels():
    volume = np.array([[[0, 100], [40, 60]], [[10, 10], [10, 10]]], np.uint8)
    assert embeddings.resample(volume, (3, 1, 1)).ravel().tolist() == [50, 30, 10]


def test_calibrate_sets_statistics_of_all_batches_and_keeps_weights():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.BatchNormalization(momentum=0.9)(keras.layers.Dense(2)(inputs)))
    pictures = np.random.default_rng(0).normal(3, 2, (40, 3)).astype(np.float32)
    kernel = model.layers[1].get_weights()
    embeddings.calibrate(model, pictures, batch_size=10)
    seen = pictures @ kernel[0] + kernel[1]
    moving_mean, moving_variance = model.layers[2].get_weights()[2:]
    np.testing.assert_allclose(moving_mean, seen.mean(axis=0), rtol=1e-5)
    batches = seen.reshape(4, 10, 2).var(axis=1).mean(axis=0)
    np.testing.assert_allclose(moving_variance, batches, rtol=1e-4)
    assert model.layers[2].momentum == 0.9
    np.testing.assert_array_equal(model.layers[1].get_weights()[0], kernel[0])


def test_calibrate_without_pictures_is_refused():
    with pytest.raises(ValueError, match="no pictures"):
        embeddings.calibrate(_encoder(), np.zeros((0, 8, 8, 1), np.uint8))


def test_encode_slices_does_not_depend_on_the_other_slices_of_a_batch(tmp_path):
    keras.utils.set_random_seed(0)
    encoder, _ = backbones.build("ResNet50", (32, 32), weights="none")
    volumes = _volumes((3, 2), (32, 32))
    embeddings.calibrate(encoder, np.concatenate(volumes)[..., None], batch_size=5)
    together = embeddings.encode_slices(encoder, *_given(volumes), tmp_path / "a", batch_size=5, progress=False)
    alone = embeddings.encode_slices(encoder, *_given(volumes[1:]), tmp_path / "b", batch_size=1, progress=False)
    # Kernels for one picture and for five add up in another order, which fifty layers of random weights make much of in
    # a few features; the statistics of a batch move all of them.
    assert np.abs(together[3:] - alone).mean() < 1e-3
    assert np.abs(np.asarray(encoder(volumes[1][..., None], training=True)) - alone).mean() > 0.1


def _index():
    rows = [("s1", "a", "T1"), ("s1", "a", "T1"), ("s2", "b", "T2"), ("s1", "c", "T1"), ("s3", "d", "T1")]
    return pd.DataFrame(rows, columns=["study_id", "series_id", "modality"])


def test_bag_rows_several_series_follow_one_another_and_absent_ones_are_empty():
    bags = embeddings.bag_rows(_index(), ["s3", "s1", "s2", "s9"], "T1")
    assert bags.tolist() == [[4, -1, -1], [0, 1, 3], [-1, -1, -1], [-1, -1, -1]]


def test_bag_average_by_hand_and_empty_bag_is_nan():
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    means = embeddings.bag_average(values, np.array([[0, 1, 3], [4, -1, -1], [-1, -1, -1]]))
    np.testing.assert_allclose(means[:2], [[8 / 3, 11 / 3], [8, 9]], rtol=1e-6)
    assert np.isnan(means[2]).all()


def test_bag_inputs_places_without_a_slice_are_masked_zeros():
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    inputs = embeddings.bag_inputs(values, {"canal": np.array([[0, 1], [4, -1], [-1, -1]])}, np.array([1, 2]))
    assert inputs["canal_slices"].tolist() == [[[8, 9], [0, 0]], [[0, 0], [0, 0]]]
    assert inputs["canal_mask"].tolist() == [[True, False], [False, False]]


@for_tensorflow
def test_bag_dataset_shuffles_by_epoch_and_resumes_at_one():
    values, bags = np.arange(12, dtype=np.float32).reshape(12, 1), {"a": np.arange(12).reshape(12, 1)}
    studies, y = np.array([1, 3, 5, 7, 9, 11, 0]), np.arange(7, dtype=np.float32)

    def seen(first_epoch, count):
        options = {"batch_size": 3, "seed": 4, "first_epoch": first_epoch}
        dataset = embeddings.bag_dataset(values, bags, studies, y, **options).take(count)
        return [(x["a_slices"].numpy().ravel().tolist(), target.numpy().tolist()) for x, target in dataset]

    epochs = seen(0, 6)
    assert epochs[3:] == seen(1, 3)
    assert epochs[:3] != epochs[3:]
    for part in (epochs[:3], epochs[3:]):
        pairs = sorted((target, slice_) for x, targets in part for slice_, target in zip(x, targets))
        assert pairs == sorted(zip(y.tolist(), studies.astype(float).tolist()))


@for_tensorflow
def test_bag_dataset_without_seed_is_every_study_once_in_order():
    values, bags = np.arange(5, dtype=np.float32).reshape(5, 1), {"a": np.arange(5).reshape(5, 1)}
    dataset = embeddings.bag_dataset(values, bags, np.array([4, 2, 0]), batch_size=2)
    assert [x["a_slices"].numpy().ravel().tolist() for x in dataset] == [[4, 2], [0]] and len(dataset) == 2


def test_project_keeps_distances_nearly_and_repeats_with_its_seed():
    values = np.random.default_rng(1).normal(size=(30, 2000)).astype(np.float32)
    made = embeddings.project(values, 500, seed=3)
    assert made.shape == (30, 500)
    np.testing.assert_array_equal(made, embeddings.project(values, 500, seed=3))
    assert not np.array_equal(made, embeddings.project(values, 500, seed=4))
    before, after = (np.linalg.norm(each[0] - each[1:], axis=1) for each in (values, made))
    # The relative error of a squared distance has a standard deviation of √(2 / 500).
    assert np.abs(after / before - 1).max() < 4 * (2 / 500) ** 0.5 / 2


@pytest.mark.parametrize("width", [0, 2000, 3000])
def test_project_to_no_fewer_numbers_leaves_them(width):
    values = np.random.default_rng(1).normal(size=(3, 2000)).astype(np.float32)
    np.testing.assert_array_equal(embeddings.project(values, width), values)


def test_write_and_read_keep_ids_as_text(tmp_path):
    index = pd.DataFrame({"study_id": ["007", "10"], "series_id": ["1+2", "003"]})
    embeddings.write(tmp_path / "e.csv", index, np.array([[0.5, 1.25], [2.0, -3.0]], np.float32))
    table = embeddings.read(tmp_path / "e.csv")
    assert table.columns.tolist() == ["study_id", "series_id", "0", "1"]
    assert table["study_id"].tolist() == ["007", "10"] and table["series_id"].tolist() == ["1+2", "003"]
    assert table[["0", "1"]].to_numpy().tolist() == [[0.5, 1.25], [2.0, -3.0]]


@pytest.mark.timed
@pytest.mark.slow
def test_encode_slices_in_batches_is_four_times_as_fast_as_slice_by_slice(tmp_path):
    size, count = (96, 96), 192
    encoder, _ = backbones.build("ResNet50", size, weights="none")
    volumes = _volumes((24,) * (count // 24), size)
    ready = np.concatenate(volumes)[..., None]
    encoder.predict(ready[:64], batch_size=64, verbose=0)
    encoder(ready[:1], training=False)
    batched, arrays, single = [], [], []
    # The best of each, interleaved: whatever else runs on the machine can only add time.
    for number in range(8):
        began = time.perf_counter()
        embeddings.encode_slices(encoder, *_given(volumes), tmp_path / str(number), batch_size=64, progress=False)
        batched.append((time.perf_counter() - began) / count)
        began = time.perf_counter()
        encoder.predict(ready, batch_size=64, verbose=0)
        arrays.append((time.perf_counter() - began) / count)
        began = time.perf_counter()
        for row in range(24):
            encoder(ready[row : row + 1], training=False)
        single.append((time.perf_counter() - began) / 24)
        if number > 1 and min(single) >= 4 * min(batched) and min(arrays) >= 0.95 * min(batched):
            return
    pytest.fail(f"seconds a slice in batches: {batched}; by `predict` on ready arrays: {arrays}; alone: {single}")


def test_modality_inputs_by_hand_take_no_more_places_than_needed():
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    bags = np.full((2, 2, 40), -1)
    bags[0, 0, :3], bags[1, 1, 0] = [2, 0, 1], 3
    inputs = embeddings.modality_inputs(values, bags)
    assert inputs["slices"].shape == (2, 2, 16, 2) and inputs["slices"][0, 0, :3].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert inputs["slices"][1, 1, 0].tolist() == [6, 7] and inputs["slices"].sum() == 15 + 13
    assert inputs["slice_mask"].sum() == 4 and inputs["slice_mask"][0, 0, :4].tolist() == [True, True, True, False]
    assert inputs["available"].tolist() == [[True, False], [False, True]]
    bags[0, 0, :17] = 0
    assert embeddings.modality_inputs(values, bags)["slices"].shape == (2, 2, 32, 2)
    assert embeddings.modality_inputs(values, bags[..., :20])["slices"].shape == (2, 2, 20, 2)  # there are no more
    assert embeddings.modality_inputs(values, bags[:0])["slices"].shape == (0, 2, 0, 2)


def test_modality_inputs_hide_what_is_not_shown_and_refuse_a_study_of_nothing():
    values, bags = np.ones((2, 3), np.float32), np.array([[[0, -1], [1, -1]], [[1, 0], [-1, -1]]])
    shown = np.array([[False, True], [True, True]])
    inputs = embeddings.modality_inputs(values, bags, shown)
    assert inputs["available"].tolist() == [[False, True], [True, False]]
    assert not inputs["slices"][0, 0].any() and not inputs["slice_mask"][0, 0].any() and inputs["slices"][0, 1, 0].all()
    with pytest.raises(ValueError, match=r"no modality for 1 of 2 rows; .* First rows: \[1\]"):
        embeddings.modality_inputs(values, bags, np.array([[True, True], [False, True]]))


@for_tensorflow
def test_dataset_of_bags_has_places_that_differ_by_batch():
    bags = np.full((3, 1, 40), -1)
    bags[0, 0, :20], bags[1:, 0, :2] = 0, 0
    values = np.ones((1, 2), np.float32)
    found = embeddings.dataset(lambda rows: embeddings.modality_inputs(values, bags[rows]), 3, batch_size=1)
    assert found.element_spec["slices"].shape.as_list() == [None, 1, None, 2]
    assert [batch["slices"].shape[2] for batch in found] == [32, 16, 16]


def test_moments_are_of_the_vectors_in_the_bags_and_no_variance_is_tiny():
    values = np.array([[0, 1], [4, 1], [100, 100]], np.float32)
    mean, variance = embeddings.moments(values, np.array([[0, -1], [1, -1]]))
    assert mean.tolist() == [2, 1] and variance.tolist() == pytest.approx([4, 1e-3 * 2])
    assert embeddings.moments(values, np.array([[-1, -1]])) is None


def test_encode_slices_features_that_are_cut_are_made_again(tmp_path, caplog):
    volumes, encoder = _volumes((3, 2)), _encoder()
    expected = np.array(embeddings.encode_slices(encoder, *_given(volumes), tmp_path, progress=False))
    path = tmp_path / "features.npy"
    path.write_bytes(path.read_bytes()[:-1])
    again = embeddings.encode_slices(encoder, *_given(volumes), tmp_path, progress=False)
    np.testing.assert_array_equal(again, expected)
    assert f"{path} is damaged and is made again" in caplog.text
