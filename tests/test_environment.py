import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from kerasmed import environment


def _draws():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    return (
        layer.name,
        layer.get_weights()[0],
        convert_to_numpy(keras.layers.Dropout(0.5)(np.ones((1, 50)), training=True)),
    )


def test_fresh_makes_a_training_independent_of_what_ran_before():
    environment.fresh(5)
    name, weights, kept = _draws()
    assert not np.array_equal(_draws()[1], weights)
    environment.fresh(5)
    again = _draws()
    assert again[0] == name
    np.testing.assert_array_equal(again[1], weights)
    np.testing.assert_array_equal(again[2], kept)


@pytest.fixture
def own_policy():
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


def test_fresh_keeps_the_precision(own_policy):
    environment.setup(seed=0, precision="mixed_bfloat16")
    environment.fresh(0)
    assert keras.config.dtype_policy().name == "mixed_bfloat16"


_FAULTS = """
import ctypes, resource
import numpy as np
from kerasmed import environment

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        np.ones(2**21, np.uint8)  # 512 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).mallopt(-3, 2**17)  # as it is where tf.data is at work
print(faults())
environment.setup(seed=0)
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_setup_keeps_the_memory_of_freed_arrays():
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 50 * 500 and after < 50 * 50


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="asks TensorFlow")
def test_setup_on_the_processor_hides_the_gpus_and_otherwise_does_not(monkeypatch):
    import tensorflow as tf

    hidden = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *arguments: hidden.append(arguments))
    monkeypatch.setattr(environment, "_device_names", lambda: ["CPU:0"])  # as it is from then on
    for devices in ("auto", []):
        environment.setup(seed=0, devices=devices)
    assert not hidden
    environment.setup(seed=0, devices=["CPU:0"])
    assert hidden == [([], "GPU")]


def test_setup_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="'half'; expected one of float32"):
        environment.setup(seed=0, precision="half")


def test_setup_drops_the_retracing_warning_and_nothing_else(caplog, monkeypatch):
    environment.setup(seed=0)
    logger = logging.getLogger("tensorflow")
    monkeypatch.setattr(logger, "propagate", True)  # so that the test hears it
    with caplog.at_level(logging.WARNING, "tensorflow"):
        logger.warning("5 out of the last 9 calls to %s triggered tf.function retracing.", "f")
        logger.warning("the sky falls")
    assert [record.getMessage() for record in caplog.records] == ["the sky falls"]


_DESCRIBED = """
import json, sys
from kerasmed import environment
import keras
print(json.dumps(environment.setup(seed=3, deterministic=True)))
assert keras.ops.convert_to_numpy(keras.random.uniform((2,))).shape == (2,)  # the devices are met, with the flags
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_setup_deterministic_describes_backend_devices_and_replicas(backend):
    pytest.importorskip(backend)
    surroundings = {**os.environ, "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _DESCRIBED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings)
    told = json.loads(done.stdout)
    assert (told["backend"], told["devices"], told["replicas"]) == (backend, ["CPU"], 1)
    assert told["deterministic"] is True and told["versions"][backend]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="asks TensorFlow")
def test_gpus_of_tensorflow_are_told_by_name_and_capability(monkeypatch):
    import tensorflow as tf

    devices = [SimpleNamespace(name="/physical_device:GPU:0"), SimpleNamespace(name="/physical_device:GPU:1")]
    details = {devices[0].name: {"device_name": "NVIDIA T4", "compute_capability": (7, 5)}, devices[1].name: {}}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: devices)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details[gpu.name])
    assert environment.describe()["devices"] == ["NVIDIA T4, compute capability 7.5", "/physical_device:GPU:1"]


_BACKEND = "import sys; from kerasmed import environment; print(environment.backend(), 'keras' in sys.modules)"


@pytest.mark.parametrize(
    ("named", "content", "expected"),
    [
        ("jax", '{"backend": "torch"}', "jax"),
        ("", '{"backend": "torch"}', "torch"),
        (None, '{"backend": "torch"}', "torch"),
        (None, "{}", "tensorflow"),
        (None, "{", "tensorflow"),
        (None, None, "tensorflow"),
    ],
)
def test_backend_is_what_keras_will_take_without_importing_it(tmp_path, monkeypatch, named, content, expected):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if named is not None:
        monkeypatch.setenv("KERAS_BACKEND", named)
    if content is not None:
        (tmp_path / "keras.json").write_text(content)
    done = subprocess.run([sys.executable, "-c", _BACKEND], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False"]


def test_describe_names_the_backend_at_work_and_its_version(monkeypatch):
    described = environment.describe()
    assert described["backend"] == keras.backend.backend()
    assert described["versions"][described["backend"]] == importlib.metadata.version(described["backend"])
    monkeypatch.setattr(keras.config, "backend", lambda: "tensorflow")
    assert not {"jax", "torch"} & set(environment.describe()["versions"])
