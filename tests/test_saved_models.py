"""What a `.keras` file may name, and what is said where it names something else."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras.src.backend.common import global_state

import kerasmed
from kerasmed import fusion, layers, losses, models, saved_models

PACKAGE = Path(kerasmed.__file__).parent


@pytest.fixture
def model_file(tmp_path):
    """A compiled network of kerasmed in a file; and the network."""
    model = models.compact_cnn((16, 16), 3, filters=(4, 4))
    model.compile("adam", losses.WeightedCategoricalCrossentropy([1.0, 2.0, 3.0]), metrics=["accuracy"])
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras", model


def _rewritten(path, change=lambda config: None, **options):
    """Write a model file again with its config changed; return its path."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config)
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_read_opens_what_was_saved_with_and_without_its_compilation(model_file, rng):
    path, model = model_file
    pictures = rng.integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    opened = saved_models.read(path)
    np.testing.assert_array_equal(opened(pictures), model(pictures))
    assert isinstance(opened.loss, losses.WeightedCategoricalCrossentropy)
    assert not saved_models.read(str(path), compile=False).compiled
    saved_models.read(_rewritten(path))  # written anew without a change, so that a refusal below is of the change


def test_read_opens_operations_on_symbolic_tensors(tmp_path):
    first, second = keras.Input((3,)), keras.Input((3,))
    keras.Model([first, second], keras.ops.exp(first) * second).save(tmp_path / "m.keras")
    told = saved_models.read(tmp_path / "m.keras")([np.zeros((1, 3)), np.full((1, 3), 2.0)])
    np.testing.assert_array_equal(told, [[2.0, 2.0, 2.0]])


def test_read_in_a_fresh_process_knows_every_class_that_the_package_registers(tmp_path):
    image, patient = keras.Input((4, 4, 1), dtype="uint8"), keras.Input((2,), name="patient")
    x = keras.layers.Flatten()(layers.Preprocessing(1.0, 0.0)(image))
    x = keras.layers.Concatenate()([x, fusion.TabularDense(2, [0.0, 0.0], [1.0, 1.0])(patient)])
    model = keras.Model([image, patient], keras.layers.Dense(2)(x))
    model.compile(loss=losses.WeightedBinaryCrossentropy([1.0, 1.0], [1.0, 1.0]))
    model.save(tmp_path / "m.keras")
    code = (
        "import sys; from kerasmed import saved_models; saved_models.read(sys.argv[1]);"
        "import keras; print(*sorted(keras.saving.get_custom_objects()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m.keras"], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.split()
    decorated = sum(path.read_text().count("\n@keras.saving.register_keras_ser") for path in PACKAGE.rglob("*.py"))
    assert len([name for name in told if name.startswith("kerasmed>")]) == decorated


def test_read_of_no_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at .*gone.keras; expected a model"):
        saved_models.read(tmp_path / "gone.keras")


def test_read_of_a_cut_file_or_another_config_says_that_it_is_damaged(model_file):
    path, _ = model_file
    for change in (lambda config: config["config"].update(layers=[1]), lambda config: config.pop("config")):
        with pytest.raises(ValueError, match="model.keras cannot be opened as a model: .*damaged, or of another"):
            saved_models.read(_rewritten(path, change))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match="model.keras is no .keras file.*take a whole one"):
        saved_models.read(path)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *(("Lambda", "keras.layers"), ("Dense", "os"), ("system", None), ("__lambda__", "keras")),
        *((f"layers.{name}", "keras") for name in saved_models._REFUSED),  # which Keras finds as keras.layers.<name>
    ],
)
def test_read_refuses_what_is_neither_of_keras_nor_registered_and_names_it(model_file, name, module):
    path, _ = model_file

    def change(config):
        config["config"]["layers"][1] |= {"class_name": name, "module": module, "registered_name": None}

    with pytest.raises(ValueError, match=rf"model.keras is not opened: its config.json names '{name}' of module"):
        saved_models.read(_rewritten(path, change))


def test_read_refuses_even_where_keras_was_told_not_to(model_file):
    path, _ = model_file
    keras.config.enable_unsafe_deserialization()
    try:
        with pytest.raises(ValueError, match="names 'Lambda' of module 'keras.layers'"):
            saved_models.read(
                _rewritten(path, lambda config: config["config"]["layers"][1].update(class_name="Lambda"))
            )
    finally:
        global_state.set_global_attribute("safe_mode_saving", None)  # as it was; Keras has no call for it


def test_read_refuses_further_files_and_compression(model_file):
    path, _ = model_file
    with pytest.raises(ValueError, match="holds 'metadata.json' compressed, which Keras does not write"):
        saved_models.read(_rewritten(path, compression=zipfile.ZIP_DEFLATED))
    _rewritten(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../outside", "")
    with pytest.raises(ValueError, match="it holds '../outside' beside config.json"):
        saved_models.read(path)
