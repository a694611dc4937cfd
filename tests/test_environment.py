import logging
import platform
import subprocess
import sys

import keras
import numpy as np
import pytest

from kerasmed import environment


def _draws():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    return layer.name, layer.get_weights()[0], keras.layers.Dropout(0.5)(np.ones((1, 50)), training=True).numpy()


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
