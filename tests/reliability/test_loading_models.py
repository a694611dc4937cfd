"""Models that someone tampered with: each way into the package refuses them, and nothing of them runs."""

import base64
import io
import json
import marshal
import pickle
import re
import warnings
import zipfile
from collections import Counter
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
from keras.src.backend.common import global_state

from kerasmed import backbones, embeddings, models, runs, saved_models, training
from kerasmed.systems import tritask
from kerasmed.systems.brain import BrainCascade
from kerasmed.systems.brain import prediction as brain_prediction
from kerasmed.systems.brain.cascade import STAGES
from kerasmed.systems.chest import fused
from kerasmed.systems.chest import prediction as chest_prediction
from kerasmed.systems.lumbar import prediction as lumbar_prediction
from kerasmed.systems.mura import prediction as mura_prediction

REFUSED = "refused with a reason, nothing run"


@pytest.fixture
def canary(tmp_path):
    """A file that each attack tries to make."""
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Members of the zip of a sound model: name -> bytes."""
    path = tmp_path_factory.mktemp("sound") / "model.keras"
    model = models.compact_cnn((8, 8), 2, filters=(2,))
    model.compile("adam", "categorical_crossentropy")
    model.save(path)
    saved_models.read(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def unsafe():
    """Keras's global word that `safe_mode=True` counts for nothing; taken back afterwards."""
    keras.config.enable_unsafe_deserialization()
    yield
    global_state.set_global_attribute("safe_mode_saving", None)


def _lambda(canary):
    """A function that makes the file, as marshalled bytecode in Keras's own wrapping."""
    code = eval(f"lambda x: (open({str(canary)!r}, 'w').close(), x)[1]").__code__
    encoded = base64.b64encode(marshal.dumps(code)).decode()
    return {"class_name": "__lambda__", "config": {"code": encoded, "defaults": None, "closure": None}}


def _write(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _with_layer(sound, layer, *, call=None):
    """Members with the last layer, an activation over the logits, replaced; `call` are other arguments of its call."""
    config = json.loads(sound["config.json"])
    last = config["config"]["layers"][-1]
    kept = {"name": last["name"], "inbound_nodes": last["inbound_nodes"], "registered_name": None}
    if call:
        kept["inbound_nodes"] = [{"args": call, "kwargs": {}}]
    config["config"]["layers"][-1] = kept | layer
    if "config" in layer and isinstance(layer["config"], dict):
        layer["config"].setdefault("name", last["name"])
    return {**sound, "config.json": json.dumps(config).encode()}


def _layers(canary, tmp_path):
    """Kind of attack -> (layer, arguments of its call)."""
    body = {"function": _lambda(canary), "arguments": {}}  # without a shape, it is called to find one
    touch = f"touch {canary}"
    words = tmp_path / "secret.txt"
    words.write_text("a\nb\n")
    download = [str(canary), words.as_uri()]
    function = {"class_name": "function"}
    named = {"module": "keras.layers"}
    return {
        "bytecode in a Lambda layer": ({**named, "class_name": "Lambda", "config": body}, None),
        "a Lambda layer by Keras's private name": (
            {"module": "keras.src.layers.core.lambda_layer", "class_name": "Lambda", "config": body},
            None,
        ),
        "a Lambda layer in the legacy form, without module": ({"class_name": "Lambda", "config": body}, None),
        "bytecode as an activation": (
            {**named, "class_name": "Activation", "config": {"activation": _lambda(canary)}},
            None,
        ),
        "os.system as a layer, with a command": ({**function, "module": "os", "config": "system"}, [touch]),
        "os.system as an activation": (
            {
                **named,
                "class_name": "Activation",
                "config": {"activation": {**function, "module": "os", "config": "system"}},
            },
            None,
        ),
        "subprocess.Popen as a layer": (
            {"module": "subprocess", "class_name": "Popen", "config": {"args": touch, "shell": True}},
            None,
        ),
        "keras.utils.get_file as a layer, with an address": (
            {**function, "module": "keras.utils", "config": "get_file"},
            download,
        ),
        "keras.config.enable_unsafe_deserialization as a layer": (
            {**function, "module": "keras.config", "config": "enable_unsafe_deserialization"},
            [[]],
        ),
        "keras.models.load_model as a layer, with a file": (
            {**function, "module": "keras.models", "config": "load_model"},
            [str(words)],
        ),
        "keras.datasets, which download, as a layer": (
            {**function, "module": "keras.datasets.mnist", "config": "load_data"},
            [str(canary)],
        ),
        "a vocabulary that is a file of this machine": (
            {**named, "class_name": "StringLookup", "config": {"vocabulary": str(words)}},
            None,
        ),
        "a vectorizer with such a vocabulary": (
            {**named, "class_name": "TextVectorization", "config": {"vocabulary": str(words)}},
            None,
        ),
        "a TensorFlow graph of another folder": (
            {**named, "class_name": "TFSMLayer", "config": {"filepath": str(tmp_path)}},
            None,
        ),
        "a pickled PyTorch module": (
            {
                **named,
                "class_name": "TorchModuleWrapper",
                "config": {"module": base64.b64encode(_pickle(canary)).decode()},
            },
            None,
        ),
        "a class of a type specification": (
            {"module": "os", "class_name": "__typespec__", "spec_name": "system", "config": [touch]},
            None,
        ),
    }


def _pickle(canary):
    """A pickle that makes the file when it is read."""

    class Making:
        def __reduce__(self):
            return open, (str(canary), "w")

    return pickle.dumps(Making())


def _refuse(path, canary, error=ValueError):
    with pytest.raises(error, match=str(path.name)) as caught:
        saved_models.read(path)
    assert not canary.exists(), f"ran before it was refused: {caught.value}"
    assert any(word in str(caught.value) for word in ("take", "expected"))


def test_attack_without_the_package_makes_its_file(sound, tmp_path, canary):
    """Otherwise the tests below would prove nothing."""
    layer, _ = _layers(canary, tmp_path)["bytecode in a Lambda layer"]
    path = _write(tmp_path / "model.keras", _with_layer(sound, layer))
    keras.saving.load_model(path, safe_mode=False)
    assert canary.exists()


def test_attack_is_not_stopped_by_safe_mode_alone_once_it_is_turned_off(sound, tmp_path, canary, unsafe):
    layer, _ = _layers(canary, tmp_path)["bytecode in a Lambda layer"]
    keras.saving.load_model(_write(tmp_path / "model.keras", _with_layer(sound, layer)), safe_mode=True)
    assert canary.exists()


def test_read_of_names_that_run_something_refuses(sound, tmp_path, canary, record, unsafe):
    seen = Counter()
    for layer, call in _layers(canary, tmp_path).values():
        _refuse(_write(tmp_path / "model.keras", _with_layer(sound, layer, call=call)), canary)
        seen[REFUSED] += 1
    for place in ("compile_config", "build_config"):
        config = json.loads(sound["config.json"])
        config[place] = {**(config.get(place) or {}), "loss": _lambda(canary)}
        _refuse(_write(tmp_path / "model.keras", {**sound, "config.json": json.dumps(config)}), canary)
        seen[REFUSED] += 1
    record("Loading", "`.keras` whose config.json names code to run or a file to read, Keras's safe mode off", seen)


def test_read_of_names_that_run_something_leaves_keras_in_safe_mode(sound, tmp_path, canary):
    for layer, call in _layers(canary, tmp_path).values():
        _refuse(_write(tmp_path / "model.keras", _with_layer(sound, layer, call=call)), canary)
    assert keras.src.saving.serialization_lib.in_safe_mode() is not False


def test_read_of_other_kinds_of_file_refuses(sound, tmp_path, canary, record):
    seen = Counter()
    path = tmp_path / "model.keras"
    layer, _ = _layers(canary, tmp_path)["bytecode in a Lambda layer"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _write(tmp_path / "attack.keras", _with_layer(sound, layer))
        keras.saving.load_model(tmp_path / "attack.keras", safe_mode=False).save(tmp_path / "legacy.h5")
    canary.unlink()
    legacy = (tmp_path / "legacy.h5").read_bytes()
    object_array = io.BytesIO()
    np.savez(object_array, values=np.array([{}], object))
    for content in (legacy, _pickle(canary), object_array.getvalue(), b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        _refuse(path, canary)
        seen[REFUSED] += 1
    path.unlink()
    path.mkdir()
    for name, content in _with_layer(sound, layer).items():
        (path / name).write_bytes(content)
    _refuse(path, canary, FileNotFoundError)
    for name in ("hf://someone/model.keras", "gs://bucket/model.keras", "http://127.0.0.1:9/model.keras"):
        with pytest.raises(FileNotFoundError, match="no file at .*model.keras"):
            saved_models.read(name)
    _refuse(tmp_path / "legacy.h5", canary)
    seen[REFUSED] += 5
    record("Loading", "legacy .h5, pickle, object array, folder and address in the place of a `.keras`", seen)


def test_read_of_zips_that_unpack_elsewhere_or_without_end_refuses(sound, tmp_path, canary, record):
    seen = Counter()
    path = tmp_path / "model.keras"
    link = zipfile.ZipInfo("assets")
    link.external_attr = 0o120777 << 16  # a symbolic link
    strange = [
        "../canary",
        f"/{canary}",
        "..\\canary",
        "assets/../../canary",
        "config.json/",
        "model.weights.npz",
        link,
    ]
    for name in strange:
        _write(path, sound)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"..")
        _refuse(path, canary)
        seen[REFUSED] += 1
    endless = {**sound, "model.weights.h5": bytes(2**26)}
    _refuse(_write(path, endless, compression=zipfile.ZIP_DEFLATED), canary)
    assert path.stat().st_size < 2**20
    nested = b"[" * 100_000 + b"]" * 100_000
    deep = json.dumps({"class_name": "Functional", "module": "keras", "config": 0}).replace(
        "0", '{"a":' * 900 + "0" + "}" * 900
    )
    for config in (nested, deep.encode(), b"\xff\xfe", b"[]", b"null", b"{}", b'{"class_name": {}, "config": {}}'):
        _refuse(_write(path, {**sound, "config.json": config}), canary)
        seen[REFUSED] += 1
    _refuse(_write(path, {name: content for name, content in sound.items() if name != "config.json"}), canary)
    _refuse(_write(path, {name: content for name, content in sound.items() if name != "model.weights.h5"}), canary)
    lying = _write(path, sound).read_bytes().replace(b"config.json", b"config.jsom", 1)  # of two names of one member
    path.write_bytes(lying)
    _refuse(path, canary)
    seen[REFUSED] += 4
    record("Loading", "`.keras` with paths out of the zip, links, bombs, nesting, or members that lack or lie", seen)


def test_read_of_weights_that_point_elsewhere_refuses(sound, tmp_path, canary, record):
    """HDF5 can say that the numbers of a tensor lie in another file: a model would carry it off."""
    seen = Counter()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.arange(4096, dtype=np.float32).tobytes())
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["values"] = np.ones((3, 3, 1, 2), np.float32)

    def first(file):
        names = []
        file.visititems(lambda name, each: names.append(name) if getattr(each, "shape", None) == (3, 3, 1, 2) else None)
        return names[0]

    def external(file, name, shape):
        file.create_dataset(name, shape, np.float32, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])

    def virtual(file, name, shape):
        layout = h5py.VirtualLayout(shape, np.float32)
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "values", shape)
        file.create_virtual_dataset(name, layout)

    def link(file, name, shape):
        file[name] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/values")

    def shape_bomb(file, name, shape):
        file.create_dataset(name, (2**40,), np.float32, chunks=(2**20,), compression="gzip")

    for harm in (external, virtual, link, shape_bomb):
        held = io.BytesIO(sound["model.weights.h5"])
        with h5py.File(held, "r+") as file:
            name = first(file)
            shape = file[name].shape
            del file[name]
            harm(file, name, shape)
        _refuse(_write(tmp_path / "model.keras", {**sound, "model.weights.h5": held.getvalue()}), canary)
        seen[REFUSED] += 1
    record("Loading", "`.keras` whose weights lie in another file, or have a shape without end", seen)


# --- each way in -----------------------------------------------------------------------------------------------------


def _ways(run, path):
    """Name -> call that opens `<run>/model.keras`, or what stands there under the names of that way."""
    model = models.compact_cnn((8, 8), 2, filters=(2,))
    stages = [training.Stage(name, "all", 1, 1e-3) for name in ("one", "two")]

    def fit_one(folder, **_):
        lost = 1.0 if folder.name.endswith("two") else 0.5  # the first is the better, and read again
        (folder / "model.keras").write_bytes((run / "model.keras").read_bytes())
        (folder / "history.csv").write_text(f"epoch,val_loss,kept\n1,{lost},True\n")

    def fused_train(name):
        step = next(each for each in fused.STEPS if each.patient == (name == "trunk"))
        trunk = runs.variant_folder(run, f"{fused.STEPS[0].name}-whole") / "model.keras"
        trunk.write_bytes((run / "model.keras").read_bytes())
        origin = SimpleNamespace(model=run / "model.keras")
        return fused.train(SimpleNamespace(seed=0), step, None, origin, run=run)

    fitted = {"steps_per_epoch": 1, "epochs": 1, "loss": "mse", "folder": run}
    return {
        "predict of brain": lambda: brain_prediction.predict(run, path, progress=False),
        "predict of chest": lambda: chest_prediction.predict(run, path, progress=False),
        "predict of mura": lambda: mura_prediction.predict(run, path, progress=False),
        "predict of tritask": lambda: tritask.predict(run, path, progress=False),
        "predict of lumbar": lambda: lumbar_prediction.predict(run, path, progress=False),
        "cascade": lambda: BrainCascade.load(run / "cascade"),
        "training that was finished": lambda: training.fit(model, None, None, **fitted),
        "stages of training": lambda: training.fit_stages(model, stages, fit_one, network="", folder=run / "stages"),
        "encoder of a worker": lambda: embeddings._loaded(run / "model.keras"),
        "network of an earlier run": lambda: fused_train("image"),
        "trunk of an earlier step": lambda: fused_train("trunk"),
        "model of a step": lambda: fused.load(fused.STEPS[0], run),
        "weights of a backbone": lambda: backbones.build("MobileNetV2", (32, 32), weights=run / "model.keras"),
    }


def _place(run, content):
    """Lay a model under each name that a run may have it by, with the tables that are read before it."""
    for name in ("model", "encoder", "model-brain_tumor", f"variants/{fused.STEPS[0].name}/model"):
        (run / f"{name}.keras").parent.mkdir(parents=True, exist_ok=True)
        (run / f"{name}.keras").write_bytes(content)
    for stage in STAGES:
        (run / f"cascade/{stage}.keras").write_bytes(content)
    (run / "history.csv").write_text("epoch\n1\n")
    runs.write_json(run / "params.json", {"tasks": ["brain_tumor"]})
    runs.write_json(run / "answers.json", {"thresholds": {"a": 0.5}, "models": ["model.keras"]})
    runs.write_json(run / "thresholds.json", {"thresholds": {}})


@pytest.fixture
def run(tmp_path, write_cascade_run, monkeypatch):
    """A run folder whose cascade is to be read from `cascade/` or, without it, from one model."""
    found = write_cascade_run(tmp_path / "models")
    monkeypatch.setattr(lumbar_prediction, "gather", lambda path: (path, []))
    return found


def test_each_way_to_a_model_refuses_one_that_runs_something(sound, run, tmp_path, canary, record, unsafe, caplog):
    seen, told = Counter(), r"\.keras is not opened: its config.json names"
    for kind in ("bytecode in a Lambda layer", "os.system as a layer, with a command"):
        layer, call = _layers(canary, tmp_path)[kind]
        _place(run, _write(tmp_path / "attack.keras", _with_layer(sound, layer, call=call)).read_bytes())
        ways = _ways(run, tmp_path)
        for name, open_it in ways.items():
            if name == "predict of brain":
                (run / "cascade").rename(run / "aside")
            if name == "training that was finished":  # anew, for which no data are given
                with pytest.raises(TypeError, match="not callable"), caplog.at_level("WARNING", "kerasmed.training"):
                    open_it()
                assert re.search(told, caplog.text) and not (run / "model.keras").exists()
                _place(run, (tmp_path / "attack.keras").read_bytes())
            else:
                with pytest.raises(ValueError, match=told):
                    open_it()
            assert not canary.exists(), name
            if name == "predict of brain":
                (run / "aside").rename(run / "cascade")
            seen[REFUSED] += 1
    record(
        "Loading", "such a `.keras` by each way in: predict of every system, cascade, resume, backbone, encoder", seen
    )
