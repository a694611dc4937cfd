"""The same weights give the same answers under every Keras backend, and TensorFlow is needed for none but its own.

Each backend works in a process of its own, as Keras takes one at its first import.
"""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

# A skip that is a mark comes before the fixture does its work.
OTHERS = [
    pytest.param(name, marks=[] if importlib.util.find_spec(name) else pytest.mark.skip(f"{name} is not installed"))
    for name in ("jax", "torch")
]
pytestmark = pytest.mark.slow


def _work(backend, *command, **environ):
    """Run Python under a backend, and return what it printed."""
    environ = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", **environ}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environ, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Function of a backend: what `parity` found under it, for weights that TensorFlow wrote."""
    folder = tmp_path_factory.mktemp("parity")

    def of(backend):
        if not (folder / f"{backend}.npz").exists():
            _work(backend, "-m", "tests.parity", str(folder))
        return dict(np.load(folder / f"{backend}.npz"))

    of("tensorflow")
    return of


@pytest.mark.parametrize("backend", OTHERS)
def test_each_backend_gives_tensorflows_outputs_maps_and_gradients(answers, backend):
    expected, got = answers("tensorflow"), answers(backend)
    assert got.keys() == expected.keys()
    assert sum(name.endswith("maps") for name in got) == 4 and sum("gradient" in name for name in got) == 7
    furthest = {}
    for name, values in expected.items():
        assert got[name].shape == values.shape and np.isfinite(values).all() and values.any(), name
        furthest[name] = np.abs(got[name] - values).max() / np.abs(values).max()
    # float32 sums in another order, through up to a hundred layers
    assert max(furthest.values()) < 1e-4, {name: far for name, far in furthest.items() if far >= 1e-4}


_WITHOUT = """
import sys

from importlib.machinery import PathFinder

found = PathFinder.find_spec  # as where it is not installed
PathFinder.find_spec = classmethod(
    lambda cls, name, *others: None if name.split(".")[0] == "tensorflow" else found(name, *others)
)
import importlib
from pathlib import Path
for name in sys.argv[2].split():
    importlib.import_module(f"kerasmed.{name}")
import cv2, keras, numpy as np, pandas as pd
from kerasmed import augment, embeddings, environment, gradcam, losses, models, pipelines, training

folder = Path(sys.argv[1])
print(environment.setup(seed=0, deterministic=True)["versions"][environment.backend()])
rng = np.random.default_rng(0)
for number in range(24):
    picture = rng.integers(0, 120, (20, 20), dtype=np.uint8)
    picture[(number % 2) * 10 :][:10] += 100
    cv2.imwrite(str(folder / f"{number:02d}.png"), picture)
names = [f"{number:02d}.png" for number in range(24)]
manifest = pd.DataFrame({"image_path": names, "split": ["train"] * 16 + ["valid"] * 8})
store = pipelines.decode(manifest, folder, image_size=(16, 16), progress=False)
y = np.eye(2, dtype=np.float32)[np.arange(24) % 2]
age = rng.normal(50, 10, (24, 1)).astype(np.float32)
weights = np.linspace(0.5, 1, 24, dtype=np.float32)
recipe = augment.build(("flip",), (16, 16))
options = {"batch_size": 6, "seed": 0, "augment": recipe, "beside": {"age": age}, "weights": weights}
train_from, valid = pipelines.datasets_of(store, y, **options)
print(type(valid).__mro__[1].__name__)

def built():
    image, years = keras.Input((16, 16, 1), dtype="uint8", name="image"), keras.Input((1,), name="age")
    x = keras.layers.Conv2D(4, 3, activation="relu", name="maps")(keras.layers.Rescaling(1 / 255)(image))
    x = keras.layers.Concatenate()([keras.layers.Flatten()(x), keras.layers.Rescaling(0.01)(years)])
    x = keras.layers.Dense(2, name="logits")(keras.layers.Dropout(0.3)(x))
    return keras.Model([image, years], keras.layers.Softmax()(x))

def fitted(name, epochs):
    environment.fresh(3)
    model = built()
    loss = losses.WeightedCategoricalCrossentropy([1.0, 2.0])
    options = {"steps_per_epoch": 3, "epochs": epochs, "loss": loss, "learning_rate": 0.01, "schedule": "constant"}
    return model, training.fit(model, train_from, valid, folder=folder / name, **options)

model, history = fitted("whole", 3)
write = training._Checkpoint.on_epoch_end

def killed(self, epoch, logs=None):
    write(self, epoch, logs)
    raise SystemExit

training._Checkpoint.on_epoch_end = killed
try:
    fitted("cut", 3)
except SystemExit:
    training._Checkpoint.on_epoch_end = write
again, _ = fitted("cut", 3)
for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
    np.testing.assert_array_equal(one, other)
assert history["val_loss"].iloc[-1] < history["val_loss"].iloc[0]

rows = np.arange(24)
dataset = pipelines.evaluation_dataset(store.images, rows, beside={"age": age}, batch_size=10)
told = model.predict(dataset, verbose=0)
everything = {"image": store.images[..., None], "age": age}
np.testing.assert_allclose(told, model.predict(everything, verbose=0), rtol=1e-5)
model.compile(loss=keras.losses.CategoricalCrossentropy(), metrics=["categorical_accuracy"])
known = pipelines.evaluation_dataset(store.images, rows, y, beside={"age": age}, batch_size=10)
accuracy = model.evaluate(known, verbose=0, return_dict=True)["categorical_accuracy"]
np.testing.assert_allclose(accuracy, (told.argmax(axis=1) == y.argmax(axis=1)).mean(), rtol=1e-6)
loaded = keras.saving.load_model(folder / "whole/model.keras")
np.testing.assert_array_equal(loaded.predict(everything, verbose=0), model.predict(everything, verbose=0))
maps = gradcam.build(loaded, layer="maps")(store.images, 1, beside={"age": age}, batch_size=5)
np.testing.assert_allclose(maps.probabilities, told, rtol=1e-4)
assert maps.heat.shape == (24, 14, 14) and maps.heat.any()
table = pipelines.predict_files(folder, [(models.compact_cnn((16, 16), 2, filters=(4, 8)), ["a", "b"])],
    image_size=(16, 16), progress=False)
assert len(table) == 24 and np.isfinite(table["p_a"]).all()
features = keras.Model(loaded.inputs[0], keras.layers.GlobalAveragePooling2D()(loaded.get_layer("maps").output))
volumes = [store.images[:5], store.images[5:]]
values = embeddings.encode_slices(features, [5, 19], volumes.__getitem__, folder / "f", batch_size=4, progress=False)
np.testing.assert_allclose(values, features.predict(store.images[..., None], verbose=0), rtol=1e-5)
assert "tensorflow" not in sys.modules
print("done")
"""


@pytest.mark.parametrize("backend", OTHERS)
def test_without_tensorflow_all_that_learns_runs_and_resumes_exactly(backend, tmp_path):
    from tests.test_imports import LAYERS

    modules = " ".join(name for name, layer in LAYERS.items() if layer <= 3)
    out = _work(backend, "-c", _WITHOUT, str(tmp_path), modules, KERASMED_CACHE=str(tmp_path / "cache"))
    version, kind, *_, last = out.splitlines()
    assert version[0].isdigit() and kind == "PyDataset" and last == "done"
