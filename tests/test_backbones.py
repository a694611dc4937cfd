import contextlib
import hashlib
import inspect
import json
import math
import socket
import threading
import time

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format
from keras.src.utils import file_utils

from kerasmed import backbones, fusion, models
from kerasmed.backbones import BACKBONES, NAMES

MODULES = {
    "DenseNet121": "densenet",
    "DenseNet169": "densenet",
    "VGG19": "vgg19",
    "ResNet50": "resnet",
    "InceptionV3": "inception_v3",
    "MobileNetV2": "mobilenet_v2",
    "EfficientNetB0": "efficientnet",
    "EfficientNetB3": "efficientnet",
    "EfficientNetV2S": "efficientnet_v2",
    "Xception": "xception",
}


@pytest.fixture(autouse=True)
def keras_home(tmp_path, monkeypatch):
    """Weights of a test are cached in its own folder, and nothing goes through a proxy."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "keras"


def _pixels(rng, side=32, channels=1, number=3):
    """Pictures of 4×4 fields and a brightness of their own: of white noise, pooled features are all alike."""
    fields = rng.uniform(0, 255, (number, 4, 4, channels)) * rng.uniform(0.2, 1, (number, 1, 1, 1))
    large = np.kron(fields, np.ones((1, -(-side // 4), -(-side // 4), 1)))[:, :side, :side]
    return np.clip(large + rng.normal(0, 8, large.shape), 0, 255).astype(np.uint8)


def _enliven(model, rng):
    """Make features depend on the picture, and every tensor differ from its like, so that an exchange shows.

    With the statistics of fresh BatchNorms the signal fades on its way: all pictures get the same features.
    """
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.set_weights([np.float32([0.45, 0.5, 0.4]), np.float32([0.2, 0.3, 0.25]), np.int32(0)])
            layer.finalize_state()
    for layer in norms:
        layer.momentum = 0.0
    _, side, _, channels = model.input.shape
    model(_pixels(rng, side, channels, 16).astype(model.input.dtype), training=True)
    for layer, momentum in zip(norms, momenta):
        layer.momentum = momentum
        *scale, mean, variance = layer.get_weights()
        # Silent channels of 16 pictures are not silent on others.
        variance = (variance + variance.mean()) / 2
        layer.set_weights([*[array + rng.uniform(-0.1, 0.1, array.shape) for array in scale], mean, variance])


def _assert_lively(features):
    """Assert that features tell pictures apart, so that comparing them means something."""
    assert features.std(axis=0).mean() > 0.1 * np.abs(features).mean() > 0


def _write_legacy(path, model):
    """Write weights in the layout of the published files of keras.applications."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    return path


def _features(model, pixels):
    return keras.ops.convert_to_numpy(model(pixels, training=False))


def _with_head(model, num_classes=2):
    logits = keras.layers.Dense(num_classes, name="logits")(
        keras.layers.BatchNormalization(name="head_bn")(model.output)
    )
    return keras.Model(model.input, logits)


def _tensors(model):
    return [(layer.name, layer.get_weights()) for layer in model.layers]


@pytest.fixture(scope="module")
def mobile():
    keras.utils.set_random_seed(0)
    model, receipt = backbones.build("MobileNetV2", (32, 32), weights="none")
    assert receipt is None
    _enliven(model, np.random.default_rng(1))
    return model


# --- build -----------------------------------------------------------------------------------------------------------


def test_build_of_mobilenet_is_flat_grey_bytes_to_features(mobile, rng):
    assert mobile.input.dtype == "uint8" and mobile.input.shape == (None, 32, 32, 1)
    assert [layer.name for layer in mobile.layers[:2]] == ["image", "preprocess"]
    assert mobile.layers[-1].name == "pool" and mobile.output.shape == (None, 1280)
    assert not [layer for layer in mobile.layers if isinstance(layer, keras.Model)]
    _assert_lively(_features(mobile, _pixels(rng)))


def test_build_of_colour_equals_grey_on_equal_channels(mobile, rng):
    colour, _ = backbones.build("MobileNetV2", (32, 32), channels=3, weights="none")
    backbones.transfer(colour, _tensors(mobile), source="grey")
    grey = _pixels(rng)
    np.testing.assert_array_equal(_features(colour, grey.repeat(3, axis=-1)), _features(mobile, grey))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ResNet", (32, 32)), {}, "unknown backbone 'ResNet'.*DenseNet121, .*Xception"),
        (("Xception", (96, 70)), {}, r"\(96, 70\); Xception needs at least 71 pixels"),
        (("InceptionV3", (74, 96)), {}, "at least 75 pixels"),
        (("MobileNetV2", (32, 32)), {"channels": 2}, "`channels` is 2; expected 1"),
        (("MobileNetV2", (32, 32)), {"weights": None}, "`weights` is None; expected 'imagenet', 'none', or"),
        (("MobileNetV2", (32, 32)), {"weights": "w.pt"}, "`weights` is 'w.pt'; expected"),
    ],
)
def test_build_unfit_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        backbones.build(*arguments, **{"weights": "none", **options})


def test_build_missing_weights_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="away.keras"):
        backbones.build("MobileNetV2", (32, 32), weights=tmp_path / "away.keras")


def test_build_from_a_classifier_with_another_head_leaves_the_head_out(mobile, tmp_path, rng):
    path = tmp_path / "earlier.keras"
    _with_head(mobile, 5).save(path)
    model, receipt = backbones.build("MobileNetV2", (32, 32), weights=path)
    assert receipt.source == str(path) and receipt.share == 1 and len(receipt.matched) == len(model.weights) == 260
    assert not receipt.unmatched_file and not [pair for pair in receipt.matched if "logits" in pair[1]]
    pixels = _pixels(rng)
    np.testing.assert_array_equal(_features(model, pixels), _features(mobile, pixels))


def test_build_from_none_starts_with_lively_batch_norm(mobile, tmp_path):
    norms = [layer for layer in mobile.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(norms) == 52 and {layer.momentum for layer in norms} == {0.9}
    path = _write_legacy(tmp_path / "w.h5", mobile)
    pretrained, _ = backbones.build("MobileNetV2", (32, 32), weights=str(path))
    assert pretrained.get_layer("bn_Conv1").momentum == 0.999  # as keras.applications has it


def test_build_from_imagenet_takes_the_cached_file_and_says_so(mobile, keras_home, monkeypatch, rng):
    name = BACKBONES["MobileNetV2"].url.rsplit("/", 1)[1]
    (keras_home / "models").mkdir(parents=True)
    path = _write_legacy(keras_home / "models" / name, mobile)
    monkeypatch.setattr(backbones, "_download", lambda *_: pytest.fail("the cache was not used"))
    model, receipt = backbones.build("MobileNetV2", (32, 32))
    assert receipt.source == f"imagenet: {path.name}" and receipt.share == 1
    pixels = _pixels(rng)
    np.testing.assert_array_equal(_features(model, pixels), _features(mobile, pixels))


# --- the rescaling of EfficientNets B ---------------------------------------------------------------------------------


@pytest.fixture(params=["EfficientNetB0", pytest.param("EfficientNetB3", marks=pytest.mark.slow)])
def published(request, tmp_path, monkeypatch, rng):
    """An EfficientNet B as Keras builds it with ImageNet weights and without, and a file that passes for them."""
    keras.utils.set_random_seed(0)
    options = {"include_top": False, "pooling": "avg", "input_shape": (32, 32, 3)}
    path = tmp_path / f"{request.param.lower()}_notop.h5"
    without = getattr(keras.applications, request.param)(weights=None, **options)
    monkeypatch.setattr(file_utils, "get_file", lambda *_, **__: str(_write_legacy(path, without)))
    with_rescaling = getattr(keras.applications, request.param)(weights="imagenet", **options)
    _enliven(with_rescaling, rng)
    without.set_weights(with_rescaling.get_weights())
    without.get_layer(_normalization(without)).finalize_state()
    # As in the published file, whose layers know nothing of the rescaling.
    _write_legacy(path, without)
    monkeypatch.setattr(backbones, "fetch", lambda *_, **__: path)
    return request.param, with_rescaling, without


def _normalization(model):
    return next(layer.name for layer in model.layers if isinstance(layer, keras.layers.Normalization))


def test_build_of_efficientnet_b_equals_keras_with_its_extra_rescaling(published, rng):
    name, with_rescaling, without = published
    pixels = _pixels(rng)
    colour = pixels.repeat(3, axis=-1).astype("float32")
    ours, receipt = backbones.build(name, (32, 32))
    assert receipt.share == 1
    expected = _features(with_rescaling, colour)
    _assert_lively(expected)
    # √(v·s) for √v·√s is one rounding of 1e-7 at the input, which some hundred layers in float32 amplify.
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(_features(ours, pixels), expected, rtol=0, atol=tolerance)
    # The same weights without the rescaling, as weights=None builds it, are another network.
    assert np.abs(_features(without, colour) - expected).max() > 100 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("published", ["EfficientNetB0"], indirect=True)
def test_build_of_efficientnet_b_from_its_own_and_keras_files_folds_once(published, tmp_path, rng):
    name, theirs, without = published
    ours, _ = backbones.build(name, (32, 32))
    ours.save(tmp_path / "ours.keras")
    _write_legacy(tmp_path / "ours.h5", ours)
    theirs.save(tmp_path / "theirs.keras")
    _write_legacy(tmp_path / "theirs.h5", theirs)
    without.save(tmp_path / "none.keras")
    pixels = _pixels(rng)
    variance = ours.get_layer(_normalization(ours)).get_weights()[1]
    np.testing.assert_allclose(variance, np.multiply([0.2, 0.3, 0.25], [0.229, 0.224, 0.225]), rtol=1e-6)
    for file in ("ours.keras", "ours.h5", "theirs.keras", "theirs.h5"):
        again, _ = backbones.build(name, (32, 32), weights=tmp_path / file)
        np.testing.assert_array_equal(again.get_layer(_normalization(again)).get_weights()[1], variance, file)
        np.testing.assert_array_equal(_features(again, pixels), _features(ours, pixels), file)
    plain, _ = backbones.build(name, (32, 32), weights=tmp_path / "none.keras")
    np.testing.assert_array_equal(plain.get_layer(_normalization(plain)).get_weights()[1], np.float32([0.2, 0.3, 0.25]))


# --- transfer --------------------------------------------------------------------------------------------------------


def _dense(*widths):
    """A chain of Dense layers, 4 inputs."""
    x = inputs = keras.Input((4,))
    for width in widths:
        x = keras.layers.Dense(width)(x)
    return keras.Model(inputs, x, name="chain")


def test_transfer_receipt_by_hand():
    model = _dense(3, 3, 2)
    ones = [("a", [np.ones((4, 3)), np.ones(3)]), ("gap", []), ("b", [np.ones((3, 3)), np.ones(3)])]
    receipt = backbones.transfer(model, [*ones, ("c", [np.ones((3, 7))])], source="here", min_share=0.6)
    names = [layer.name for layer in model.layers[1:]]
    assert receipt.matched == [
        [f"{names[0]}/kernel", "a[0]"],
        [f"{names[0]}/bias", "a[1]"],
        [f"{names[1]}/kernel", "b[0]"],
        [f"{names[1]}/bias", "b[1]"],
    ]
    assert receipt.unmatched_model == [f"{names[2]}/kernel", f"{names[2]}/bias"]
    assert receipt.unmatched_file == ["c[0]"]
    assert receipt.share == pytest.approx(4 / 6)  # 4 of 6 in the model, 4 of 5 in the file
    assert all((weight == 1).all() for layer in model.layers[1:3] for weight in layer.get_weights())
    assert json.loads(json.dumps(receipt.as_dict()))["share"] == receipt.share


@pytest.mark.parametrize(("ours", "theirs"), [((3, 3, 3, 3, 2), (3, 3, 2)), ((3, 3, 2), (3, 3, 3, 3, 2))])
def test_transfer_between_a_network_and_one_that_contains_it_is_refused(ours, theirs):
    model, other = _dense(*ours), _dense(*theirs)
    before = model.get_weights()
    with pytest.raises(
        backbones.WeightsError,
        match=rf"other does not fit chain: 6 tensors match of {2 * len(ours)} in the model and {2 * len(theirs)} in "
        r"the file, a share of 0.600 and less than 0.95. First unmatched of the model: \[.*; of the file: \[.*: none`",
    ):
        backbones.transfer(model, _tensors(other), source="other")
    for kept, weight in zip(before, model.get_weights()):
        np.testing.assert_array_equal(kept, weight)


def test_transfer_takes_order_and_not_names():
    model, other = _dense(4, 4, 4), _dense(4, 4, 4)
    tensors = [(name, arrays) for name, (_, arrays) in zip("zyx", _tensors(other)[1:])]
    backbones.transfer(model, tensors, source="other")
    for mine, theirs in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(mine, theirs)


def test_transfer_sets_the_constants_of_a_normalization(rng):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Normalization()(inputs))
    arrays = [np.float32([1, 2, 3]), np.float32([4, 4, 16]), np.int32(0)]
    backbones.transfer(model, [("normalization", arrays)], source="here")
    np.testing.assert_allclose(model(np.float32([[3, 4, 7]])), [[1, 1, 1]], rtol=1e-6)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["weights", "model"])
def test_read_tensors_of_legacy_files_gives_every_layer_in_order(writer, tmp_path):
    model = _dense(3, 2)
    if writer == "weights":
        _write_legacy(tmp_path / "m.h5", model)
    else:
        legacy_h5_format.save_model_to_hdf5(model, str(tmp_path / "m.h5"), include_optimizer=False)
    read = backbones.read_tensors(tmp_path / "m.h5")
    assert [name for name, _ in read] == [layer.name for layer in model.layers]
    for (_, mine), (_, theirs) in zip(read, _tensors(model)):
        assert len(mine) == len(theirs)
        for array, expected in zip(mine, theirs):
            np.testing.assert_array_equal(array, expected)


def test_read_tensors_of_names_split_over_attributes_joins_them(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names0"], file.attrs["layer_names1"] = [b"a"], [b"b"]
        for layer in "ab":
            file.create_group(layer).attrs["weight_names"] = [f"{layer}/kernel".encode()]
            file[layer][f"{layer}/kernel"] = np.full(2, ord(layer))
    assert [(name, array.tolist()) for name, (array,) in backbones.read_tensors(tmp_path / "w.h5")] == [
        ("a", [97, 97]),
        ("b", [98, 98]),
    ]


def test_read_tensors_of_a_keras_file_with_a_side_branch_reads_what_pool_hangs_on(tmp_path):
    image, age = keras.Input((8, 8, 1), name="image"), keras.Input((1,), name="age")
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(keras.layers.Conv2D(3, 3, name="conv")(image))
    aside = keras.layers.Dense(7, name="deep")(keras.layers.Dense(5, name="wide")(keras.layers.Dense(4)(age)))
    keras.Model([image, age], keras.layers.Dense(1)(keras.layers.Concatenate()([pooled, aside]))).save(
        tmp_path / "fused.keras"
    )
    assert [name for name, arrays in backbones.read_tensors(tmp_path / "fused.keras") if arrays] == ["conv"]


def test_read_tensors_of_other_files_are_refused(tmp_path):
    _dense(3).save_weights(tmp_path / "new.weights.h5")
    with pytest.raises(backbones.WeightsError, match="no `layer_names`.*save the whole, as .keras"):
        backbones.read_tensors(tmp_path / "new.weights.h5")
    whole = _write_legacy(tmp_path / "whole.h5", _dense(300, 300)).read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(backbones.WeightsError, match="cut.h5 cannot be read as HDF5"):
        backbones.read_tensors(tmp_path / "cut.h5")
    (tmp_path / "text.keras").write_text("not a model")
    with pytest.raises(backbones.WeightsError, match="text.keras is no .keras file"):
        backbones.read_tensors(tmp_path / "text.keras")


# --- set_trainable ---------------------------------------------------------------------------------------------------


def _check_parts(name, model):
    """Assert what each part frees; return the layers of the last stage that train."""
    classifier = _with_head(model)
    head = {"logits", "head_bn"}
    statistics = (keras.layers.BatchNormalization, keras.layers.Normalization)
    norms = {layer.name for layer in model.layers if isinstance(layer, statistics)}
    weighted = {layer.name for layer in model.layers if layer.weights}

    def training():
        return {layer.name for layer in classifier.layers if layer.trainable_weights}

    backbones.set_trainable(classifier, name, "head")
    assert training() == head and not any(classifier.get_layer(layer.name).trainable for layer in model.layers)
    backbones.set_trainable(classifier, name, "last_stage")
    stage = training() - head
    assert head < training() and stage < weighted - norms
    assert not any(layer.trainable for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
    backbones.set_trainable(classifier, name, "all")
    constants = {layer.name for layer in model.layers if isinstance(layer, keras.layers.Normalization)}
    assert training() == head | (weighted - constants)
    return stage


def test_set_trainable_parts_of_mobilenet(mobile):
    stage = _check_parts("MobileNetV2", mobile)
    # Blocks 13–16 have an expansion, a depthwise and a projecting convolution each; one convolution follows.
    assert len(stage) == 4 * 3 + 1
    assert {"block_13_expand", "Conv_1"} < stage and "block_12_project" not in stage


def test_set_trainable_of_a_last_stage_counts_its_weights(mobile):
    classifier = _with_head(mobile)
    backbones.set_trainable(classifier, "MobileNetV2", "last_stage")
    block_13 = 96 * 576 + 9 * 576 + 576 * 160
    later = 3 * (160 * 960 + 9 * 960) + 2 * 960 * 160 + 960 * 320
    trainable = sum(math.prod(weight.shape) for weight in classifier.trainable_weights)
    assert trainable == block_13 + later + 320 * 1280 + (1280 * 2 + 2) + 2 * 1280


def test_set_trainable_leaves_side_branches_to_the_head(mobile):
    age = keras.Input((1,), name="age")
    deep = keras.layers.Dense(4, name="deep")(keras.layers.BatchNormalization(name="age_bn")(age))
    fused = keras.Model([mobile.input, age], keras.layers.Concatenate()([mobile.output, deep]))
    backbones.set_trainable(fused, "MobileNetV2", "head")
    assert {layer.name for layer in fused.layers if layer.trainable_weights} == {"deep", "age_bn"}


def test_set_trainable_of_a_frozen_model_trains_its_head(mobile):
    classifier = _with_head(mobile)
    classifier.trainable = False
    backbones.set_trainable(classifier, "MobileNetV2", "head")
    assert {weight.path.split("/")[0] for weight in classifier.trainable_weights} == {"head_bn", "logits"}


@pytest.mark.parametrize("name", ["compact_cnn", "MobileNetV2"])
def test_set_trainable_head_and_all_of_another_network_go_by_its_pool_alone(name):
    model = models.compact_cnn((32, 32), 2, filters=(8, 16))
    backbones.set_trainable(model, name, "head")
    assert {weight.path.split("/")[0] for weight in model.trainable_weights} == {"logits"}
    backbones.set_trainable(model, name, "all")
    everything = keras.models.clone_model(model)
    assert len(model.trainable_weights) == len(everything.trainable_weights) > 2
    with pytest.raises(ValueError, match="unknown backbone 'compact_cnn'|no layer 'block_12_add'"):
        backbones.set_trainable(model, name, "last_stage")


def test_set_trainable_of_a_fused_model_trains_the_patients_layers_with_the_head(mobile):
    fused = fusion.fused_classifier(mobile, 2, means=[0.0], scales=[1.0], residual=True, units=8)
    of_backbone = {layer.name for layer in mobile.layers}
    head = {"image_dense", "patient_dense", "sauce", "image_residual", "head_dense1", "head_dense2", "logits"}

    def training():
        return {layer.name for layer in fused.layers if layer.trainable_weights}

    backbones.set_trainable(fused, "MobileNetV2", "head")
    assert training() == head and not any(fused.get_layer(name).trainable for name in of_backbone)
    backbones.set_trainable(fused, "MobileNetV2", "last_stage")
    assert len(training() - head) == 13 and {"block_13_expand", "Conv_1"} < training()
    backbones.set_trainable(fused, "MobileNetV2", "all")
    assert training() == head | {layer.name for layer in mobile.layers if layer.weights}


def test_set_trainable_unfit_arguments_are_refused(mobile):
    with pytest.raises(ValueError, match="`part` is 'body'; expected one of head, last_stage, all"):
        backbones.set_trainable(mobile, "MobileNetV2", "body")
    with pytest.raises(ValueError, match="no layer 'pool4_pool'.*'last_stage' of DenseNet121"):
        backbones.set_trainable(mobile, "DenseNet121", "last_stage")
    with pytest.raises(ValueError, match="unknown backbone 'mobile'"):
        backbones.set_trainable(mobile, "mobile", "last_stage")
    inputs = keras.Input((4,))
    for part in backbones.PARTS:
        with pytest.raises(ValueError, match="no layer '(pool|block_12_add)'"):
            backbones.set_trainable(keras.Model(inputs, keras.layers.Dense(2)(inputs)), "MobileNetV2", part)


# --- download --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(answer):
    """A socket server on this machine that hands each connection to `answer(connection, closing)`; yields its URL."""
    closing = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)

    def handle(connection):
        with connection, contextlib.suppress(OSError):
            answer(connection, closing)

    def serve():
        while not closing.is_set():
            with contextlib.suppress(TimeoutError):
                threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        closing.set()
        thread.join()
        listener.close()


def _answering(body, *, status="200 OK", claimed=None):
    def answer(connection, closing):
        connection.recv(4096)
        head = f"HTTP/1.1 {status}\r\nContent-Length: {claimed or len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)

    return answer


def _trickling(connection, closing):
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while not closing.wait(0.1):
        connection.sendall(b"x")


def _point(monkeypatch, name, url, md5):
    file = BACKBONES[name].url.rsplit("/", 1)[1]
    monkeypatch.setitem(BACKBONES, name, BACKBONES[name]._replace(url=url + file, md5=md5))
    return file


def _md5(content):
    return hashlib.md5(content).hexdigest()


def _refused(file, keras_home, reason, time_limit=1.0):
    """Fetch, and assert that the error has every part, comes in time and leaves nothing behind."""
    started = time.monotonic()
    with pytest.raises(backbones.DownloadError) as caught:
        backbones.fetch("VGG19", time_limit=time_limit)
    assert time.monotonic() - started < time_limit + 0.5
    message = str(caught.value)
    for part in (
        file,
        str(keras_home / "models"),
        "$KERAS_HOME/models",
        "`weights: none`",
        f"{time_limit:g} s",
        reason,
    ):
        assert part in message, part
    assert isinstance(caught.value, OSError)
    folder = keras_home / "models"
    assert not folder.exists() or [path.name for path in folder.iterdir()] in ([], [file])
    return message


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(lambda connection, closing: closing.wait(), "TimeoutError", id="stalled"),
        pytest.param(_trickling, "TimeoutError: out of time", id="trickling"),
        pytest.param(_answering(b"", status="404 Not Found"), "HTTPError: HTTP Error 404: Not Found", id="absent"),
        pytest.param(_answering(b"other"), "the 5 bytes received have a wrong checksum", id="foreign"),
        pytest.param(_answering(b"half", claimed=8), "ended after 4 of 8 bytes", id="cut_short"),
        pytest.param(lambda connection, closing: connection.recv(4096), "RemoteDisconnected", id="hung_up"),
    ],
)
def test_fetch_from_a_failing_server_ends_in_time_and_says_what_to_do(answer, reason, keras_home, monkeypatch):
    with _server(answer) as url:
        _refused(_point(monkeypatch, "VGG19", url, _md5(b"the right one")), keras_home, reason)


def test_fetch_without_a_server_says_what_to_do(keras_home, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    _refused(_point(monkeypatch, "VGG19", f"http://127.0.0.1:{port}/", _md5(b"")), keras_home, "refused")


def test_fetch_with_a_name_service_that_hangs_ends_in_time(keras_home, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(30))
    try:
        _refused(_point(monkeypatch, "VGG19", "http://weights.invalid/", _md5(b"")), keras_home, "TimeoutError", 0.5)
    finally:
        released.set()


@pytest.mark.parametrize(
    "answer", [_trickling, lambda connection, closing: closing.wait()], ids=["trickling", "stalled"]
)
def test_fetch_out_of_time_ends_its_thread_soon(answer, keras_home, monkeypatch):
    with _server(answer) as url:
        _refused(_point(monkeypatch, "VGG19", url, _md5(b"")), keras_home, "TimeoutError", 0.5)
        left = [thread for thread in threading.enumerate() if thread.name == "download" and thread.is_alive()]
        for thread in left:
            thread.join(1.0)
        assert not any(thread.is_alive() for thread in left)


def test_fetch_puts_a_whole_file_into_the_cache_and_finds_it_there(keras_home, monkeypatch):
    body = bytes(range(256)) * 1000
    with _server(_answering(body)) as url:
        file = _point(monkeypatch, "VGG19", url, _md5(body))
        path = backbones.fetch("VGG19", time_limit=10)
    assert path == keras_home / "models" / file and path.read_bytes() == body
    assert [entry.name for entry in path.parent.iterdir()] == [file]
    assert backbones.fetch("VGG19", time_limit=1) == path  # the server is gone


def test_fetch_over_a_file_cut_short_downloads_again(keras_home, monkeypatch):
    (keras_home / "models").mkdir(parents=True)
    body = b"weights" * 100
    with _server(_answering(body)) as url:
        file = _point(monkeypatch, "VGG19", url, _md5(body))
        (keras_home / "models" / file).write_bytes(body[:50])
        assert backbones.fetch("VGG19", time_limit=10).read_bytes() == body
    (keras_home / "models" / file).write_bytes(body[:50])
    message = _refused(file, keras_home, "refused")
    assert f"The file {keras_home / 'models' / file} is cut short or foreign: delete it" in message


def test_fetch_without_a_known_checksum_refuses_what_is_not_whole_hdf5(keras_home, monkeypatch, tmp_path):
    whole = _write_legacy(tmp_path / "w.h5", _dense(300, 300)).read_bytes()
    with _server(_answering(whole[: len(whole) // 2])) as url:
        _refused(_point(monkeypatch, "VGG19", url, None), keras_home, "are no HDF5")
    monkeypatch.undo()
    monkeypatch.setenv("KERAS_HOME", str(keras_home))
    with _server(_answering(whole)) as url:
        _point(monkeypatch, "VGG19", url, None)
        assert backbones.fetch("VGG19", time_limit=10).read_bytes() == whole


def test_cache_folder_is_that_of_keras(monkeypatch, tmp_path):
    assert backbones.cache_folder() == tmp_path / "keras" / "models"
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert backbones.cache_folder() == tmp_path / ".keras" / "models"


# --- agreement with keras.applications -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_table_hashes_and_folders_are_in_the_source_of_keras(name):
    source = inspect.getsource(inspect.getmodule(getattr(keras.applications, name)))
    joined = source.replace('"\n', "").replace('    "', "").replace(" ", "")
    folder, file = BACKBONES[name].url.rsplit("/", 1)
    assert f"{folder}/".removeprefix("https://storage.googleapis.com/tensorflow/") in joined
    assert file.rsplit("_", 1)[1] in source  # "notop.h5" or "top.h5"
    if BACKBONES[name].md5 is None:
        assert "file_hash" not in source
    else:
        assert BACKBONES[name].md5 in source


# Of networks that differ in depth alone, one.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("DenseNet121", "EfficientNetB0")])
def test_build_of_each_backbone_agrees_with_keras_and_with_itself(name, tmp_path, monkeypatch, rng):
    keras.utils.set_random_seed(0)
    side = BACKBONES[name].smallest_side
    pixels = _pixels(rng, side)
    model, _ = backbones.build(name, (side, side), weights="none")

    # The graph: flat, bytes in, lively BatchNorm.
    assert model.input.dtype == "uint8" and not [part for part in model.layers if isinstance(part, keras.Model)]
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert (name == "VGG19") == (not norms) and {layer.momentum for layer in norms} <= {0.9}

    # The preprocessing, the same in training.
    prepared = keras.Model(model.input, model.get_layer("preprocess").output)
    module = getattr(keras.applications, MODULES[name])
    colour = pixels.repeat(3, axis=-1)
    expected = module.preprocess_input(colour.astype("float32"))
    # A factor and a summand for a division, a difference and a division: some roundings of 1e-7 on values up to 255.
    np.testing.assert_allclose(prepared(pixels), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(prepared(pixels, training=True), prepared(pixels, training=False))

    # Saved and loaded whole.
    _enliven(model, rng)
    model.save(tmp_path / "m.keras")
    features = _features(model, pixels)
    copy = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(_features(copy, pixels), features)
    _assert_lively(features)

    # A legacy file, read by us and by Keras.
    legacy = _write_legacy(tmp_path / "notop.h5", model)
    copy.set_weights([np.zeros_like(weight) for weight in copy.get_weights()])
    receipt = backbones.transfer(copy, backbones.read_tensors(legacy), source="file")
    assert receipt.share == 1 and len(receipt.matched) == len(model.weights)
    np.testing.assert_array_equal(_features(copy, pixels), features)
    requested = []

    def get_file(file, origin, *, file_hash=None, **_):
        requested.append((file, origin, file_hash))
        return str(legacy)

    # Keras asks for the file of the table, and has the same features from it.
    monkeypatch.setattr(file_utils, "get_file", get_file)
    theirs = getattr(keras.applications, name)(include_top=False, pooling="avg", input_shape=(side, side, 3))
    url = BACKBONES[name].url
    assert requested == [(url.rsplit("/", 1)[1], url, BACKBONES[name].md5)]
    if name not in backbones._RESCALED:  # their rescaling has tests of its own
        # Roundings of 1e-7 in the preprocessing, which the layers amplify.
        reference = _features(theirs, expected)
        np.testing.assert_allclose(features, reference, rtol=0, atol=1e-3 * np.abs(reference).max())

    # What trains: the last stage, all of whose maps are after the fourth halving or later.
    stage = _check_parts(name, model)
    assert len(stage) >= 4
    assert max(model.get_layer(layer).output.shape[1] for layer in stage) <= math.ceil(side / 16)


@pytest.mark.slow
def test_transfer_between_densenets_is_refused_and_leaves_them_unchanged():
    """The smaller one's layers are a subsequence of the larger one's."""
    models = {name: backbones.build(name, (32, 32), weights="none")[0] for name in ("DenseNet121", "DenseNet169")}
    for ours, theirs in (models, reversed(models)):
        before = models[ours].get_weights()
        with pytest.raises(backbones.WeightsError, match=f"{theirs} does not fit {ours}"):
            backbones.transfer(models[ours], _tensors(models[theirs]), source=theirs)
        for kept, weight in zip(before, models[ours].get_weights()):
            np.testing.assert_array_equal(kept, weight)


def test_build_with_weights_of_another_backbone_is_refused(mobile, tmp_path):
    path = _write_legacy(tmp_path / "mobile.h5", mobile)
    with pytest.raises(
        backbones.WeightsError, match="mobile.h5 does not fit VGG19: 0 tensors match of 32 in the model"
    ):
        backbones.build("VGG19", (32, 32), weights=path)
