"""Several devices train as one does: in processes of their own, whose processor is parted into two."""

import json
import subprocess
import sys

import numpy as np
import pytest

from kerasmed import environment

# A network with batch normalisation and without dropout, whose draws go by device; batches of 14 of 60 images leave a
# last one of 4 on which all of a batch must still count, and one of 5 of 33 in validation is odd.
_TRAINING = """
import json, os, sys, tempfile
backend, parts = sys.argv[1], int(sys.argv[2])
os.environ["KERAS_BACKEND"] = backend
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={parts}"
if backend == "tensorflow" and parts > 1:
    import tensorflow as tf
    logical = [tf.config.LogicalDeviceConfiguration()] * parts
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
import keras
import numpy as np
from kerasmed import environment, images as files, losses, models, pipelines, training

devices = [f"CPU:{number}" for number in range(parts)]
machine = environment.setup(seed=0, devices=devices)
environment.fresh(0)  # as between the trainings of a notebook
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (93, 16, 16), dtype=np.uint8)
targets = np.eye(3, dtype="float32")[rng.integers(0, 3, 93)]
train, valid = np.arange(60), np.arange(60, 93)
batches = lambda first: pipelines.training_dataset(
    images, train, targets[train], batch_size=14, seed=0, first_epoch=first
)
trunk = models.compact_cnn((16, 16), 3, filters=(4,), dropout=0.0)
trunk = keras.Model(trunk.inputs, trunk.get_layer("logits").input)  # a model of its own, within another
image = keras.Input((16, 16, 1), dtype="uint8", name="image")
model = keras.Model(image, keras.layers.Softmax()(keras.layers.Dense(3, name="logits")(trunk(image))))
measured = pipelines.evaluation_dataset(images, valid, targets[valid], batch_size=14)
with tempfile.TemporaryDirectory() as folder:
    history = training.fit(
        model, batches, measured, folder=folder, steps_per_epoch=5, epochs=2, learning_rate=1e-3,
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
    )
    saved = keras.saving.load_model(f"{folder}/model.keras")
asked = pipelines.evaluation_dataset(images, valid, batch_size=14)
with tempfile.TemporaryDirectory() as folder:
    for number in range(5):
        files.cv2.imwrite(f"{folder}/{number}.png", images[valid[number]])
    table = pipelines.predict_files(folder, [(model, ["a", "b", "c"])], image_size=(16, 16))
# Losses that divide by what a batch holds, of which the two devices have unlike numbers.
learnt = {}
for loss, shape in ((losses.GradedCrossentropy([1, 2, 4]), (4, 3)), (losses.WeightedBinaryCrossentropy(), (12,))):
    environment.fresh(0)
    image = keras.Input((16, 16, 1), dtype="uint8", name="image")
    dense = keras.layers.Dense(12)(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image)))
    linear = keras.Model(image, keras.layers.Softmax()(keras.layers.Reshape(shape, name="logits")(dense)))
    told = rng.integers(0, 3 if len(shape) == 2 else 2, (93, shape[0])).astype("float32")
    told[rng.random(told.shape) < 0.8] = np.nan
    batches = lambda first: pipelines.training_dataset(
        images, train, told[train], batch_size=20, seed=0, first_epoch=first
    )
    measured = pipelines.evaluation_dataset(images, valid[:32], told[valid[:32]], batch_size=16)
    with tempfile.TemporaryDirectory() as folder:
        course = training.fit(
            linear, batches, measured, folder=folder, steps_per_epoch=3, epochs=2, learning_rate=1e-3, loss=loss
        )
    learnt[loss.name] = course[["loss", "val_loss"]].to_numpy().tolist()
norms = [layer.synchronized for layer in trunk.layers if isinstance(layer, keras.layers.BatchNormalization)]
print(json.dumps({
    "replicas": machine["replicas"], "history": history[["loss", "val_loss", "accuracy"]].to_numpy().tolist(),
    "predicted": model.predict(asked, verbose=0).tolist(), "loaded": saved.predict(asked, verbose=0).tolist(),
    "learnt": learnt, "synchronized": norms, "files": table[["p_a", "p_b", "p_c"]].to_numpy().tolist(),
}))
"""


def train(backend, parts):
    command = [sys.executable, "-c", _TRAINING, backend, str(parts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_training_on_two_devices_equals_that_on_one(backend):
    pytest.importorskip(backend)
    one, two = train(backend, 1), train(backend, 2)
    assert (one["replicas"], two["replicas"]) == (1, 2)
    # Sums are taken in another order.
    np.testing.assert_allclose(two["history"], one["history"], rtol=2e-4)
    for name, history in one["learnt"].items():
        np.testing.assert_allclose(two["learnt"][name], history, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(two["predicted"], one["predicted"], atol=1e-3)
    np.testing.assert_allclose(two["loaded"], two["predicted"], atol=1e-6)
    np.testing.assert_allclose(two["files"], two["predicted"][:5], atol=1e-6)
    assert np.shape(two["predicted"]) == (33, 3) and not any(two["synchronized"])


def test_strategy_of_one_device_is_none():
    first = environment._device_names()[0]
    assert environment.strategy() is None and environment.strategy([first]) is None and environment.strategy([]) is None


def test_strategy_auto_takes_all_gpus_where_the_backend_shares_batches(monkeypatch):
    monkeypatch.setattr(environment, "_device_names", lambda: ["GPU:0", "GPU:1", "CPU:0"])
    monkeypatch.setattr(environment, "_data_parallel", lambda names: names)
    monkeypatch.setattr(environment, "backend", lambda: "jax")
    assert environment.strategy() == ["gpu:0", "gpu:1"]
    monkeypatch.setattr(environment, "backend", lambda: "torch")
    assert environment.strategy() is None
    tf = pytest.importorskip("tensorflow")
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda names: names)
    monkeypatch.setattr(environment, "backend", lambda: "tensorflow")
    assert environment.strategy() == ["GPU:0", "GPU:1"]


def test_strategy_of_a_single_device_that_is_not_the_default_is_refused(monkeypatch):
    monkeypatch.setattr(environment, "_device_names", lambda: ["GPU:0", "GPU:1", "CPU:0"])
    assert environment.strategy(["GPU:0"]) is None
    for name in ("GPU:1", "CPU:0"):
        with pytest.raises(ValueError, match=f"'{name}'.*a single device is GPU:0.*set CUDA_VISIBLE_DEVICES"):
            environment.strategy([name])


@pytest.mark.parametrize("devices", ["all", ["GPU:7"], ["CPU:0", "CPU:9"]])
def test_strategy_of_devices_that_are_not_there_names_those_that_are(devices):
    with pytest.raises(ValueError, match="expected 'auto' or names of .*CPU:0"):
        environment.strategy(devices)
