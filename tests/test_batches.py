import itertools
import subprocess
import sys

import keras
import numpy as np
import pytest

from kerasmed import augment, batches, embeddings, environment, pipelines


@pytest.fixture
def arrays(rng):
    return rng.integers(0, 256, (30, 8, 8), dtype=np.uint8), np.arange(3, 30, 2), np.eye(14, dtype=np.float32)


@pytest.fixture
def both_ways(monkeypatch):
    """Function of what makes a dataset: it as `tf.data.Dataset` and as `keras.utils.PyDataset`."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.data serves TensorFlow alone")

    def make(function):
        found = [function()]
        with monkeypatch.context() as patch:
            patch.setattr(environment, "backend", lambda: "jax")
            patch.setitem(sys.modules, "tensorflow", None)  # importing it then fails
            found.append(function())
        assert [isinstance(each, keras.utils.PyDataset) for each in found] == [False, True]
        return found

    return make


def _assert_same(one, other, count):
    one, other = list(itertools.islice(one.as_numpy_iterator(), count)), list(itertools.islice(other, count))
    assert len(one) == len(other) > 1
    keras.tree.assert_same_structure(one, other)
    for expected, got in zip(keras.tree.flatten(one), keras.tree.flatten(other), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_numbered_dataset_without_tensorflow_has_the_same_training_batches(arrays, both_ways):
    images_, rows, targets = arrays
    options = {"batch_size": 4, "seed": 5, "first_epoch": 2, "weights": np.linspace(0.1, 1, 14, dtype=np.float32)}
    options |= {"augment": augment.build(("flip", "noise"), (8, 8)), "beside": {"age": np.full((30, 2), np.nan)}}
    one, other = both_ways(lambda: pipelines.training_dataset(images_, rows, targets, **options))
    _assert_same(one, other, 9)  # over epochs 2 to 4
    assert other.num_batches is None


def test_numbered_dataset_without_tensorflow_has_the_same_batches_in_order(arrays, both_ways):
    images_, rows, targets = arrays
    beside = {"age": np.arange(30, dtype=np.float32)[:, None]}
    for options in ({}, {"targets": targets}, {"targets": targets, "weights": targets[:, 0], "beside": beside}):
        one, other = both_ways(
            lambda options=options: pipelines.evaluation_dataset(images_, rows, batch_size=5, **options)
        )
        _assert_same(one, other, None)
        assert other.num_batches == len(one) == 3


def test_numbered_dataset_without_tensorflow_has_the_same_bags(both_ways):
    bags = np.full((3, 1, 40), -1)
    bags[0, 0, :20], bags[1:, 0, :2] = 0, 0
    values, y = np.ones((1, 2), np.float32), np.float32([1, 2, 3])

    def gather(rows):
        return embeddings.modality_inputs(values, bags[rows])

    for options in ({}, {"seed": 3, "first_epoch": 1}):
        one, other = both_ways(lambda options=options: embeddings.dataset(gather, 3, y, batch_size=1, **options))
        _assert_same(one, other, 5)


@pytest.fixture
def without_tensorflow(monkeypatch):
    if keras.backend.backend() == "tensorflow":
        monkeypatch.setattr(environment, "backend", lambda: "jax")
    monkeypatch.setitem(sys.modules, "tensorflow", None)


def test_numbered_dataset_without_tensorflow_begins_anew_after_a_first_look(without_tensorflow):
    # Keras looks at a first batch to build a model, and then begins again.
    dataset = batches.numbered_dataset(lambda number: np.array([number]), np.zeros(0, int), first=7)
    assert dataset[0].tolist() == [7]
    assert [batch.tolist() for batch in itertools.islice(dataset, 4)] == [[7], [8], [9], [10]]
    assert dataset[5].tolist() == [12] and dataset[5].tolist() == [12]


def test_numbered_dataset_without_tensorflow_makes_two_ahead_and_none_behind_the_end(without_tensorflow):
    made = []
    dataset = batches.numbered_dataset(lambda number: made.append(number) or np.array([number]), np.zeros(0), count=4)
    assert [batch.tolist() for batch in dataset] == [[0], [1], [2], [3]] and sorted(made) == [0, 1, 2, 3]


def test_numbered_dataset_without_tensorflow_passes_on_what_went_wrong(without_tensorflow):
    def broken(number):
        raise ValueError(f"no batch {number}")

    with pytest.raises(ValueError, match="no batch 3"):
        next(iter(batches.numbered_dataset(broken, np.zeros(0), first=3)))


_ENDS = """
import sys
sys.modules["tensorflow"] = None
import numpy as np
from kerasmed import augment, pipelines
images = np.zeros((640, 224, 224), np.uint8)
options = {"batch_size": 32, "seed": 0, "augment": augment.build(("flip", "noise", "rotate"), (224, 224))}
batches = iter(pipelines.training_dataset(images, np.arange(640), np.zeros(640), **options))
next(batches)
print("done")
"""


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="Keras itself needs TensorFlow here")
def test_numbered_dataset_without_tensorflow_that_is_under_way_does_not_keep_python_from_ending():
    done = subprocess.run([sys.executable, "-c", _ENDS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.data serves TensorFlow alone")
def test_batches_share_no_memory_with_what_they_are_made_of():
    """TensorFlow may write into what it was handed: a loss then changed the targets of the next epoch."""

    def aligned():  # of other memory TensorFlow makes a copy
        room = np.zeros(64 * 16 * 4 + 64, np.uint8)
        return room[-room.ctypes.data % 64 :][: 64 * 16 * 4].view(np.float32).reshape(64, 4, 4)

    kept = {name: aligned() for name in ("images", "targets", "beside")}
    weights, rows = aligned()[:, 0, 0], np.arange(64)
    options = {"batch_size": 32, "weights": weights, "beside": {"age": kept["beside"]}}
    one = pipelines.training_dataset(kept["images"], rows, kept["targets"], seed=0, **options).take(2)
    other = pipelines.evaluation_dataset(kept["images"], rows, kept["targets"], **options)
    found = [tuple(keras.tree.flatten(each)) for each in (*one, *other)]
    before = [[part.numpy().copy() for part in parts] for parts in found]
    for array in (*kept.values(), weights):
        array[:] = -1
    assert len(found) == 4
    for parts, values in zip(found, before):
        assert len(parts) == 4 and all(map(np.array_equal, parts, values))
