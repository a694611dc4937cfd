"""The cascade that the app and the command use: its arithmetic, its reading of images, its folder."""

import io
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from kerasmed import gradcam, images, layers, models, runs
from kerasmed.systems.brain import cascade, prediction
from kerasmed.systems.brain.cascade import NONE, OUTCOMES, SEVERITIES, STAGES, TYPES, BrainCascade

SIZE = (16, 24)
READ = {"image_size": SIZE, "fit": "stretch", "interpolation": "area", "equalize": False}
# Logits are slope · mean grey level + offset: black shows nothing, grey a tumour (from 1/3), white Alzheimer's (1/2).
LINES = {
    "disease": ([-6.0, 6.0], [2.0, -2.0]),
    "kind": ([4.0, -4.0], [-2.0, 2.0]),
    "severity": ([3.0, 0.5, -3.0], [-1.0, 0.4, 1.5]),
    "type": ([-2.0, 1.0, 4.0], [1.0, 0.2, -2.0]),
}
DICOM = Path(pydicom.__path__[0]) / "data/test_files/MR_small.dcm"  # comes with the library


def _line(slope, offset, size=SIZE):
    """A network that sees the mean grey level alone."""
    inputs = keras.Input((*size, 1), dtype="uint8", name="image")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, models.classification_head(x, len(slope)))
    model.get_layer("logits").set_weights([np.array([slope]), np.array(offset)])
    return model


@pytest.fixture(scope="module")
def lines():
    return BrainCascade({stage: _line(*line) for stage, line in LINES.items()}, 0.5, READ, {"run": "r"})


@pytest.fixture(scope="module")
def convolving():
    """A cascade of networks with random weights, one of which has a layer of the package."""
    keras.utils.set_random_seed(3)
    networks = {}
    for stage, classes in STAGES.items():
        networks[stage] = models.compact_cnn((32, 32), len(classes), filters=(16, 16))
    inputs = keras.Input((32, 32, 1), dtype="uint8", name="image")
    x = keras.layers.Conv2D(16, 3, activation="relu")(layers.Preprocessing(1 / 127.5, -1.0)(inputs))
    networks["type"] = keras.Model(inputs, models.classification_head(keras.layers.GlobalAveragePooling2D()(x), 3))
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 1), dtype=np.uint8)
    for model in networks.values():  # no answer is sure, and pictures are told apart
        logits = model.get_layer("logits")
        logits.kernel.assign(4 * logits.kernel)
        logits.bias.assign(-keras.Model(model.inputs, logits.output).predict_on_batch(noise)[0])
    return BrainCascade(networks, 0.5, READ | {"image_size": (32, 32)})


@pytest.fixture
def picture(rng):
    return cv2.resize(rng.integers(0, 256, (6, 5), dtype=np.uint8), (50, 40), interpolation=cv2.INTER_CUBIC)


def _softmax(logits):
    powers = np.exp(logits - np.max(logits))
    return powers / powers.sum()


def _expected(pixels):
    """What `LINES` say of a uint8 picture: stage -> probabilities."""
    return {
        stage: _softmax(np.array(slope) * pixels.mean() / 255 + np.array(offset))
        for stage, (slope, offset) in LINES.items()
    }


def _random(rng, count):
    return {stage: rng.dirichlet(np.ones(len(classes)), count) for stage, classes in STAGES.items()}


def _grey(level):
    return np.full(SIZE, level, np.uint8)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_stages_tell_every_outcome_apart_and_each_asks_what_the_one_before_left_open():
    assert (NONE, *SEVERITIES, *TYPES) == OUTCOMES and len(set(OUTCOMES)) == 7
    assert list(STAGES) == ["disease", "kind", "severity", "type"]
    for classes in STAGES.values():
        listed = [name for outcomes in classes.values() for name in outcomes]
        assert len(set(listed)) == len(listed)
    named = {
        outcome: [(stage, name) for stage, classes in STAGES.items() for name in classes if outcome in classes[name]]
        for outcome in OUTCOMES
    }
    assert named[NONE] == [("disease", "none")]
    for outcome, kind, last in [
        *((s, "alzheimer", "severity") for s in SEVERITIES),
        *((t, "tumour", "type") for t in TYPES),
    ]:
        assert named[outcome] == [("disease", "disease"), ("kind", kind), (last, outcome)]


def test_columns_are_of_the_stage_in_the_order_of_its_classes():
    assert cascade.columns("disease") == ["disease_none", "disease_disease"]
    assert cascade.columns("severity") == [f"severity_{name}" for name in SEVERITIES]
    assert len({name for stage in STAGES for name in cascade.columns(stage)}) == 10


def test_joint_by_hand():
    stages = {
        "disease": np.array([[0.2, 0.8]]),
        "kind": np.array([[0.25, 0.75]]),
        "severity": np.array([[0.5, 0.3, 0.2]]),
        "type": np.array([[0.6, 0.3, 0.1]]),
    }
    expected = [0.2, 0.1, 0.06, 0.04, 0.36, 0.18, 0.06]  # 0.8 · 0.25 = 0.2, 0.8 · 0.75 = 0.6
    np.testing.assert_allclose(cascade.joint(stages)[0], expected, rtol=1e-15)


def test_joint_sums_to_one_and_from_joint_takes_it_apart_again(rng):
    stages = _random(rng, 200)
    joint = cascade.joint(stages)
    assert joint.dtype == np.float64 and joint.min() > 0
    np.testing.assert_allclose(joint.sum(axis=1), 1, rtol=1e-14)
    back = cascade.from_joint(joint)
    assert list(back) == list(STAGES)
    for stage, told in stages.items():
        np.testing.assert_allclose(back[stage], told, rtol=1e-12, atol=1e-15)
    # Networks put out float32.
    single = cascade.joint({stage: told.astype(np.float32) for stage, told in stages.items()})
    assert single.dtype == np.float64
    np.testing.assert_allclose(single, joint, rtol=1e-6)


def test_joint_of_certain_stages_is_certain(rng):
    for outcome in OUTCOMES:
        stages = {stage: np.zeros((1, len(classes))) for stage, classes in STAGES.items()}
        for stage, classes in STAGES.items():
            met = [outcome in outcomes for outcomes in classes.values()]
            stages[stage][0] = met if any(met) else rng.dirichlet(np.ones(len(met)))
        assert cascade.joint(stages).tolist() == [[float(name == outcome) for name in OUTCOMES]]


def test_from_joint_by_hand_gives_conditional_probabilities_and_halves_where_nothing_is_known():
    told = cascade.from_joint(np.array([[0.4, 0.1, 0.1, 0.0, 0.3, 0.1, 0.0], [1, 0, 0, 0, 0, 0, 0]]))
    np.testing.assert_allclose(told["disease"], [[0.4, 0.6], [1, 0]], rtol=1e-15)
    np.testing.assert_allclose(told["kind"], [[1 / 3, 2 / 3], [0.5, 0.5]], rtol=1e-14)
    np.testing.assert_allclose(told["severity"], [[0.5, 0.5, 0], [1 / 3] * 3], rtol=1e-15)
    np.testing.assert_allclose(told["type"], [[0.75, 0.25, 0], [1 / 3] * 3], rtol=1e-15)


def test_from_joint_of_what_does_not_sum_to_one_is_divided_by_its_total(rng):
    flat = rng.random((50, 7))
    back = cascade.joint(cascade.from_joint(flat))
    np.testing.assert_allclose(back, flat / flat.sum(axis=1, keepdims=True), rtol=1e-12)


def _path(disease, kind, severity, kind_of_tumour, threshold, allowed):
    """Where a path ends by plain questions: positions in OUTCOMES of which only `allowed` may be answered."""
    severities, types = ([place for place in places if place in allowed] for places in ((1, 2, 3), (4, 5, 6)))
    ill = disease[1] >= threshold if 0 in allowed and (severities or types) else 0 not in allowed
    if not ill:
        return 0
    alzheimer = kind[0] >= kind[1] if severities and types else bool(severities)
    if alzheimer:
        return max(severities, key=lambda place: (severity[place - 1], -place))
    return max(types, key=lambda place: (kind_of_tumour[place - 4], -place))


@pytest.mark.parametrize("decimals", [1, 12])  # with many ties, and without
def test_answers_are_those_of_plain_questions_for_any_outcomes_to_choose_from(rng, decimals):
    stages = {stage: told.round(decimals) for stage, told in _random(rng, 60).items()}
    thresholds = rng.random(60).round(decimals)
    for count in range(1, 8):
        for among in itertools.combinations(range(7), count):
            expected = [_path(*(stages[stage][row] for stage in STAGES), thresholds[row], among) for row in range(60)]
            assert cascade.answers(stages, thresholds, among=among).tolist() == expected, among
    assert set(cascade.answers(stages, thresholds)) == set(range(7))
    np.testing.assert_array_equal(
        cascade.answers(stages, thresholds), cascade.answers(stages, thresholds, among=np.arange(7))
    )


def test_answers_go_on_to_a_disease_where_its_probability_equals_the_threshold():
    stages = {stage: np.tile(np.eye(len(classes))[-1], (3, 1)) for stage, classes in STAGES.items()}
    stages["disease"] = np.array([[0.7, 0.3]] * 3)
    thresholds = np.array([0.3, np.nextafter(0.3, 1), np.nextafter(0.3, 0)])
    assert cascade.answers(stages, thresholds).tolist() == [6, 0, 6]
    assert cascade.answers(stages, np.array([0.0, 1.0, 0.5])).tolist() == [6, 0, 0]


def test_answers_and_joint_of_a_batch_are_those_of_its_rows(rng):
    stages, thresholds = _random(rng, 40), rng.random(40)
    for row in range(40):
        one = {stage: told[row : row + 1] for stage, told in stages.items()}
        assert cascade.answers(one, thresholds[row : row + 1])[0] == cascade.answers(stages, thresholds)[row]
        np.testing.assert_array_equal(cascade.joint(one)[0], cascade.joint(stages)[row])
    nothing = {stage: told[:0] for stage, told in stages.items()}
    assert cascade.answers(nothing, np.zeros(0)).shape == (0,) and cascade.joint(nothing).shape == (0, 7)


# --- one person ------------------------------------------------------------------------------------------------------


def _check_consistent(reader, reading):
    """What any reading must hold."""
    assert sum(reading.joint.values()) == pytest.approx(1, abs=1e-6) and list(reading.joint) == list(OUTCOMES)
    assert list(reading.stages) == list(STAGES) and list(reading.by_slice) == list(STAGES)
    product = 1.0
    for stage, answer, probability in reading.path:
        assert probability == reading.stages[stage][answer]
        product *= probability
    assert product == pytest.approx(reading.joint[reading.outcome], rel=1e-12)
    assert [stage for stage, _, _ in reading.path] == [
        stage for stage, classes in STAGES.items() if any(reading.outcome in each for each in classes.values())
    ]
    assert reading.outcome in STAGES[reading.path[-1].stage][reading.path[-1].answer]
    assert reading.likeliest == max(reading.joint, key=reading.joint.get)
    assert reading.pixels.dtype == np.uint8
    assert reading.pixels.shape[1:] == tuple(reader.read_options["image_size"])
    for stage, classes in STAGES.items():
        assert list(reading.stages[stage]) == list(classes)
        assert reading.by_slice[stage].shape == (len(reading.pixels), len(classes))
        mean = reading.by_slice[stage].mean(axis=0, dtype=float)
        np.testing.assert_allclose(list(reading.stages[stage].values()), mean, rtol=1e-12)
        again = reader.models[stage].predict_on_batch(reading.pixels[..., None])
        np.testing.assert_array_equal(again, reading.by_slice[stage])


@pytest.mark.parametrize(
    ("level", "outcome", "stages"),
    [
        (40, NONE, ["disease"]),
        (110, "meningioma_tumor", ["disease", "kind", "type"]),
        (240, "VeryMildDemented", ["disease", "kind", "severity"]),
    ],
)
def test_predict_by_hand(lines, level, outcome, stages):
    reading, expected = lines.predict(_grey(level)), _expected(_grey(level))
    assert reading.outcome == outcome and [step.stage for step in reading.path] == stages
    for stage, probabilities in expected.items():
        np.testing.assert_allclose(list(reading.stages[stage].values()), probabilities, rtol=1e-5)  # float32
    joint = cascade.joint({stage: told[None] for stage, told in expected.items()})[0]
    np.testing.assert_allclose(list(reading.joint.values()), joint, rtol=1e-5)
    assert reading.path[0].probability == pytest.approx(expected["disease"][int(outcome != NONE)], rel=1e-5)
    _check_consistent(lines, reading)


def test_predict_path_may_end_elsewhere_than_the_likeliest_outcome(lines):
    # At 95 / 255 the disease is just the likelier, and three types share it.
    reading = lines.predict(_grey(95))
    assert reading.outcome in TYPES and reading.likeliest == NONE
    assert reading.joint[reading.outcome] < reading.joint[NONE] < reading.stages["disease"]["disease"]
    _check_consistent(lines, reading)


def test_predict_reaches_a_disease_at_the_threshold_itself(lines):
    probability = lines.predict(_grey(60)).stages["disease"]["disease"]
    assert replace(lines, threshold=probability).predict(_grey(60)).outcome != NONE
    above = replace(lines, threshold=float(np.nextafter(probability, 1))).predict(_grey(60))
    assert above.outcome == NONE and above.stages["disease"]["disease"] == probability
    assert replace(lines, threshold=0).predict(_grey(0)).outcome != NONE


def _write(folder, name, pixels):
    assert cv2.imwrite(str(folder / name), pixels)
    return folder / name


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "deep.png", "colour.png", "alpha.png", "MR_small.dcm"])
def test_predict_of_a_file_of_its_bytes_and_of_its_pixels_is_the_same(lines, tmp_path, picture, name):
    arrays = {
        "deep.png": picture.astype(np.uint16) * 9 + 5,
        "colour.png": np.dstack([picture, 255 - picture, picture // 2]),
        "alpha.png": np.dstack([picture, picture, picture, picture.T.ravel()[::-1].reshape(picture.shape)]),
    }
    path = DICOM if name.endswith(".dcm") else _write(tmp_path, name, arrays.get(name, picture))
    reading = lines.predict(path)
    np.testing.assert_array_equal(reading.pixels[0], images.read(path, **READ))
    _check_consistent(lines, reading)
    forms = [str(path), io.BytesIO(path.read_bytes()), images.read(path)]
    if name in arrays:
        forms.append(
            arrays[name] if arrays[name].ndim == 2 else arrays[name][..., [2, 1, 0, 3][: arrays[name].shape[2]]]
        )
    for form in forms:
        other = lines.predict(form)
        np.testing.assert_array_equal(other.pixels, reading.pixels)
        assert other.joint == reading.joint and other.path == reading.path
    with open(path, "rb") as file:
        assert lines.predict(file).joint == reading.joint


@pytest.mark.parametrize(
    ("make", "depth"),
    [
        (lambda picture: picture, "kept"),
        (lambda picture: picture[..., None], "kept"),
        (lambda picture: np.dstack([picture] * 3), "kept"),
        (lambda picture: picture.astype(np.uint16), "scaled"),
        (lambda picture: picture.astype(np.int16) - 500, "scaled"),
        (lambda picture: picture / 255, "scaled"),
        (lambda picture: picture.astype(np.float32) * 7 - 3, "scaled"),
        (lambda picture: np.dstack([picture.astype(np.uint16) * 3] * 3), "scaled"),
    ],
)
def test_predict_of_arrays_of_any_kind(lines, picture, make, depth):
    picture = np.clip(picture, 20, 200)
    picture[:2, 0] = 20, 200  # both ends are there, and are not those of the type
    wanted = picture if depth == "kept" else np.rint((picture - 20.0) * 255 / 180).astype(np.uint8)
    reading = lines.predict(make(picture))
    expected = images.finish(wanted, **READ)
    # Scaling in float32 may round one grey level otherwise.
    assert np.abs(reading.pixels[0].astype(int) - expected).max() <= (0 if depth == "kept" else 1)
    _check_consistent(lines, reading)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2, 3), SIZE, (31, 17), (300, 700)])
def test_predict_of_any_size(lines, rng, size, tmp_path):
    pixels = rng.integers(0, 256, size, dtype=np.uint8)
    reading = lines.predict(pixels)
    _check_consistent(lines, reading)
    assert lines.predict(_write(tmp_path, "a.png", pixels)).joint == reading.joint
    if size == SIZE:
        np.testing.assert_array_equal(reading.pixels[0], pixels)


def test_predict_of_several_slices_is_the_mean_of_each_stage_by_hand(lines):
    levels = (20, 200, 250)
    reading = lines.predict([_grey(level) for level in levels])
    each = [_expected(_grey(level)) for level in levels]
    means = {stage: np.mean([told[stage] for told in each], axis=0) for stage in STAGES}
    for stage in STAGES:
        np.testing.assert_allclose(reading.by_slice[stage], [told[stage] for told in each], rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(list(reading.stages[stage].values()), means[stage], rtol=1e-5)
    joint = cascade.joint({stage: told[None] for stage, told in means.items()})[0]
    np.testing.assert_allclose(list(reading.joint.values()), joint, rtol=1e-5)
    # It is neither the mean of the slices' joint probabilities, nor what is said of the mean slice.
    averaged = np.mean([cascade.joint({stage: told[stage][None] for stage in STAGES})[0] for told in each], axis=0)
    assert np.abs(averaged - joint).max() > 0.02
    of_mean = lines.predict(_grey(round(np.mean(levels))))
    assert abs(of_mean.joint[NONE] - reading.joint[NONE]) > 0.1
    _check_consistent(lines, reading)


def test_predict_takes_slices_of_unlike_sizes_and_kinds_in_any_order(convolving, tmp_path, rng, picture):
    slices = [
        picture,
        _write(tmp_path, "a.png", rng.integers(0, 256, (33, 90), dtype=np.uint8)),
        str(DICOM),
        rng.random((20, 20)),
        io.BytesIO(cv2.imencode(".jpg", picture.T.copy())[1].tobytes()),
    ]
    reading = convolving.predict(slices)
    assert reading.pixels.shape == (5, 32, 32)
    _check_consistent(convolving, reading)
    slices[-1].seek(0)
    backwards = convolving.predict(tuple(slices[::-1]))
    np.testing.assert_array_equal(backwards.pixels, reading.pixels[::-1])
    # Sums of float32 in another order.
    np.testing.assert_allclose(list(backwards.joint.values()), list(reading.joint.values()), atol=1e-6)
    for stage in STAGES:
        alone = [convolving.predict(pixels).by_slice[stage][0] for pixels in reading.pixels]
        np.testing.assert_allclose(reading.by_slice[stage], alone, atol=1e-6)
        assert np.ptp(reading.by_slice[stage], axis=0).max() > 0.01  # the slices are told apart


def test_predict_of_a_list_of_one_slice_is_that_of_the_slice(convolving, picture):
    one, listed = convolving.predict(picture), convolving.predict([picture])
    assert (one.outcome, one.path, one.stages, one.joint) == (listed.outcome, listed.path, listed.stages, listed.joint)
    twice = convolving.predict([picture, picture])
    np.testing.assert_allclose(list(twice.joint.values()), list(one.joint.values()), atol=1e-6)


def test_predict_refuses_what_is_no_slice(lines, tmp_path, picture):
    with pytest.raises(ValueError, match="`slices` is empty; expected an image or a list"):
        lines.predict([])
    (tmp_path / "notes.png").write_text("patient notes, not pixels")
    for form in (tmp_path / "notes.png", io.BytesIO(b"patient notes, not pixels")):
        with pytest.raises(images.ImageError, match="not an image"):
            lines.predict(form)
    with pytest.raises(images.ImageError, match="empty file"):
        lines.predict([picture, io.BytesIO(b"")])
    with pytest.raises(FileNotFoundError):
        lines.predict(tmp_path / "absent.png")
    with pytest.raises(ValueError, match=r"shape \(5, 40, 50\).*Give several slices as a list of such arrays"):
        lines.predict(np.stack([picture] * 5))
    for odd in (np.zeros((0, 4), np.uint8), np.zeros((4, 4), bool), np.zeros(4), np.array(["a"])):
        with pytest.raises(ValueError, match="expected numbers of shape"):
            lines.predict([picture, odd])
    for odd in (np.array([[0.0, np.inf]]), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="nothing but NaN, or values that are infinite"):
            lines.predict([picture, odd])


@pytest.mark.parametrize(
    ("odd", "name"),
    [
        (None, "NoneType"),
        (3, "int"),
        (b"\x89PNG", "bytes"),
        ({"image": "a.png"}, "dict"),
        ([np.zeros((4, 4), np.uint8)], "list"),
        (Image.new("L", (4, 4)), "Image"),
    ],
)
def test_read_refuses_what_is_neither_path_nor_file_nor_array(lines, picture, odd, name):
    message = f"a slice is a {name}; expected a path, a binary file object or an array, or a flat list"
    with pytest.raises(ValueError, match=message):
        lines.read(odd)
    with pytest.raises(ValueError, match=message):
        lines.predict([picture, odd])


def test_answer_on_two_devices_of_which_each_answers_all_of_a_batch_is_that_on_one(convolving, rng, monkeypatch):
    pixels = rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    expected = convolving.answer(pixels)
    asked = {stage: model.predict_on_batch for stage, model in convolving.models.items()}
    for stage, model in convolving.models.items():
        monkeypatch.setattr(model, "predict_on_batch", lambda batch, stage=stage: np.tile(asked[stage](batch), (2, 1)))
    _same(convolving.answer(pixels), expected)


def test_answer_is_predict_of_slices_that_are_read_already(convolving, tmp_path, rng, picture):
    slices = [picture, _write(tmp_path, "a.png", rng.integers(0, 256, (33, 90), dtype=np.uint8)), DICOM]
    pixels = np.stack([convolving.read(one) for one in slices])
    _same(convolving.answer(pixels), convolving.predict(slices))
    _same(convolving.answer(pixels[:1]), convolving.predict(picture))
    assert convolving.answer(pixels).pixels is pixels


@pytest.mark.parametrize("changed", [{"fit": "pad"}, {"equalize": True}, {"interpolation": "nearest"}, {}])
def test_read_follows_its_options_for_files_and_arrays(lines, tmp_path, rng, changed):
    pixels = cv2.resize(rng.integers(0, 150, (9, 9), dtype=np.uint8), (90, 31))
    path = _write(tmp_path, "a.png", pixels)
    reader = replace(lines, read_options=READ | changed)
    expected = images.read(path, **READ | changed)
    assert expected.shape == SIZE and (not changed or (expected != images.read(path, **READ)).any())
    for form in (path, pixels):
        np.testing.assert_array_equal(reader.read(form), expected)
        np.testing.assert_array_equal(reader.predict(form).pixels[0], expected)


def test_read_takes_the_options_of_a_run_and_leaves_its_other_parameters(lines, picture):
    reader = replace(lines, read_options=READ | {"image_size": list(SIZE), "seed": 0, "epochs": 3})
    np.testing.assert_array_equal(reader.read(picture), lines.read(picture))


@pytest.mark.parametrize(("level", "stage"), [(110, "type"), (240, "severity"), (40, "disease")])
def test_explain_is_of_the_last_stage_and_its_answer_by_hand(lines, level, stage):
    pixels = np.clip(_grey(level).astype(int) + np.arange(SIZE[1]) - 12, 0, 255).astype(np.uint8)
    reading = lines.predict([pixels, pixels[::-1, ::-1]])
    maps = lines.explain(reading)
    assert reading.path[-1].stage == stage
    place = list(STAGES[stage]).index(reading.path[-1].answer)
    assert maps.class_ids.tolist() == [place] * 2
    np.testing.assert_allclose(maps.probabilities, reading.by_slice[stage], rtol=1e-5)
    # ∂ logit / ∂ pixel is the slope over the number of pixels; a negative one leaves no map.
    slope = LINES[stage][0][place]
    expected = max(slope, 0) / np.prod(SIZE) * reading.pixels / 255
    np.testing.assert_allclose(maps.heat, expected, rtol=1e-4)
    assert set(maps.status) == {gradcam.OK if slope > 0 else gradcam.NEGATIVE}


def test_explain_is_of_the_persons_answer_where_a_slice_says_another(lines):
    reading = lines.predict([_grey(level) for level in (20, 200, 250)])
    assert reading.outcome == SEVERITIES[0] and reading.by_slice["severity"][0].argmax() == 2
    assert lines.explain(reading).class_ids.tolist() == [0, 0, 0]
    healthy = replace(lines, threshold=1.0)
    reading = healthy.predict(_grey(250))
    assert reading.outcome == NONE and reading.by_slice["disease"][0].argmax() == 1
    assert healthy.explain(reading).class_ids.tolist() == [0]


def test_explain_equals_grad_cam_of_the_deciding_network_which_is_built_once(convolving, picture, monkeypatch):
    reader, built = replace(convolving, threshold=0.0), []
    build = gradcam.build
    monkeypatch.setattr(cascade.gradcam, "build", lambda model: built.append(model) or build(model))
    for slices in ([picture], [picture, picture.T]):
        reading = reader.predict(slices)
        stage, answer, _ = reading.path[-1]
        maps = reader.explain(reading)
        assert built == [reader.models[stage]]
        expected = build(reader.models[stage])(reading.pixels, list(STAGES[stage]).index(answer))
        np.testing.assert_allclose(maps.heat, expected.heat, rtol=1e-5, atol=1e-7)
        assert maps.heat.shape[0] == len(slices) and maps.heat.max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, r"`models` are of \[\]; expected one of each of disease, kind, severity, type"),
        ({"threshold": 1.5}, "`threshold` is 1.5; expected a probability"),
        ({"threshold": float("nan")}, "`threshold` is nan"),
        ({"read_options": READ | {"image_size": (24, 16)}}, r"turns \(None, 16, 24, 1\).*expected \(None, 24, 16, 1\)"),
        ({"read_options": READ | {"fit": "squeeze"}}, "expected one of"),
        ({"read_options": READ | {"interpolation": "sinc"}}, "expected one of"),
    ],
)
def test_cascade_that_does_not_fit_is_refused(lines, change, message):
    with pytest.raises(ValueError, match=message):
        replace(lines, **change)


def test_cascade_with_a_stage_too_many_or_of_other_classes_is_refused(lines):
    with pytest.raises(ValueError, match="expected one of each"):
        replace(lines, models={**lines.models, "flat": lines.models["type"]})
    with pytest.raises(ValueError, match=r"the model of kind turns .* into \(None, 3\); expected .*alzheimer, tumour"):
        replace(lines, models={**lines.models, "kind": lines.models["type"]})


# --- its folder ------------------------------------------------------------------------------------------------------


def _same(reading, other):
    """Whether two readings are equal bit for bit."""
    assert (reading.outcome, reading.path, reading.stages, reading.joint, reading.likeliest) == (
        *(other.outcome, other.path, other.stages, other.joint, other.likeliest),
    )
    np.testing.assert_array_equal(reading.pixels, other.pixels)
    for stage in STAGES:
        np.testing.assert_array_equal(reading.by_slice[stage], other.by_slice[stage])


def test_save_and_load_answer_bit_for_bit_as_before(convolving, tmp_path, picture):
    made = replace(convolving, threshold=0.1 + 0.2, about={"run": "r", "number": np.int64(3)})
    folder = made.save(str(tmp_path / "a" / "cascade"))
    assert folder == tmp_path / "a" / "cascade"
    assert {path.name for path in folder.iterdir()} == {"cascade.json", *(f"{stage}.keras" for stage in STAGES)}
    assert list(folder.parent.iterdir()) == [folder]
    loaded = BrainCascade.load(folder)
    assert loaded.threshold == 0.1 + 0.2 and loaded.about == {"run": "r", "number": 3}
    slices = [picture, DICOM]
    _same(loaded.predict(slices), made.predict(slices))
    reading = made.predict(slices)
    np.testing.assert_array_equal(loaded.explain(reading).heat, made.explain(reading).heat)
    _same(BrainCascade.load(loaded.save(tmp_path / "b")).predict(slices), reading)


def test_load_in_a_new_process_answers_bit_for_bit_as_before(convolving, tmp_path, picture):
    folder = convolving.save(tmp_path / "cascade")
    path = _write(tmp_path, "a.png", picture)
    script = (
        "import json, sys\n"
        "from kerasmed.systems.brain.cascade import BrainCascade\n"
        "reading = BrainCascade.load(sys.argv[1]).predict(sys.argv[2:])\n"
        "print(json.dumps([reading.outcome, reading.path, reading.stages, reading.joint, reading.pixels.tolist()]))\n"
    )
    said = subprocess.run([sys.executable, "-c", script, folder, path, DICOM], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    reading = convolving.predict([path, DICOM])
    expected = [reading.outcome, reading.path, reading.stages, reading.joint, reading.pixels.tolist()]
    assert json.loads(said.stdout) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("changed", [{"fit": "pad"}, {"equalize": True}, {"interpolation": "nearest"}])
def test_load_reads_images_as_before_saving(lines, tmp_path, rng, changed):
    made = replace(lines, read_options=READ | changed | {"epochs": 3})
    loaded = BrainCascade.load(made.save(tmp_path / "cascade"))
    assert loaded.read_options == json.loads(json.dumps(READ | changed))
    pixels = rng.integers(0, 150, (31, 90), dtype=np.uint8)
    np.testing.assert_array_equal(loaded.predict(pixels).pixels, made.predict(pixels).pixels)
    assert (loaded.read(pixels) != lines.read(pixels)).any()


def test_save_over_an_earlier_cascade_replaces_it(lines, tmp_path):
    folder = lines.save(tmp_path / "cascade")
    (folder / "left.txt").write_text("of the earlier one")
    turned = {**lines.models, "disease": _line([6.0, -6.0], [-2.0, 2.0])}
    other = replace(lines, models=turned, threshold=0.25, about={"run": "other"})
    loaded = BrainCascade.load(other.save(folder))
    assert loaded.threshold == 0.25 and loaded.about == {"run": "other"} and not (folder / "left.txt").exists()
    _same(loaded.predict(_grey(40)), other.predict(_grey(40)))
    assert list(tmp_path.iterdir()) == [folder]


def test_save_refuses_to_write_over_something_else(lines, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("mine", "file"):
        with pytest.raises(FileExistsError, match=f"{name} is there and holds no cascade; name another folder"):
            lines.save(tmp_path / name)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("earlier", [False, True])
def test_save_that_fails_half_way_leaves_nothing_that_loads(lines, tmp_path, monkeypatch, earlier):
    folder = tmp_path / "cascade"
    if earlier:
        lines.save(folder)
    written = []

    def fail_third(path, model):
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left on device")
        model.save(path)

    monkeypatch.setattr(runs, "write_model", fail_third)
    with pytest.raises(OSError, match="no space left"):
        replace(lines, threshold=0.9).save(folder)
    assert len(written) == 3 and list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no cascade in .*`BrainCascade.save` writes one"):
        BrainCascade.load(folder)
    monkeypatch.undo()
    assert BrainCascade.load(lines.save(folder)).threshold == 0.5


@pytest.mark.parametrize("moment", ["before it was aside", "while it was removed"])
def test_save_goes_on_where_a_killed_one_left_off_with_the_earlier_cascade(lines, tmp_path, monkeypatch, moment):
    folder = lines.save(tmp_path / "cascade")
    removed = []

    def killed(path, *_, **__):
        if moment == "while it was removed":
            removed.append(path)
            (path / "kind.keras").unlink()
        raise KeyboardInterrupt

    where = (cascade.shutil, "rmtree") if moment == "while it was removed" else (cascade.os, "rename")
    monkeypatch.setattr(*where, killed)
    with pytest.raises(KeyboardInterrupt):
        replace(lines, threshold=0.9).save(folder)
    monkeypatch.undo()
    # The earlier one is there whole, or not at all: half of it lies under another name.
    if moment == "before it was aside":
        assert BrainCascade.load(folder).threshold == 0.5
    else:
        assert (removed[0] / "disease.keras").exists()
        with pytest.raises(FileNotFoundError, match="no cascade in"):
            BrainCascade.load(folder)
    assert BrainCascade.load(replace(lines, threshold=0.9).save(folder)).threshold == 0.9
    if removed:  # what the killed one left goes with the next earlier one
        replace(lines, threshold=0.8).save(folder)
        assert not removed[0].exists()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _edited(folder, **changes):
    runs.write_json(folder / "cascade.json", runs.read_json(folder / "cascade.json") | changes)


def test_load_refuses_what_is_no_whole_cascade_of_this_version(lines, tmp_path):
    with pytest.raises(FileNotFoundError, match="it has no cascade.json"):
        BrainCascade.load(tmp_path)
    folder = lines.save(tmp_path / "cascade")
    _edited(folder, format=2)
    with pytest.raises(ValueError, match="has format 2 .* reads format 1 .*Make the cascade anew"):
        BrainCascade.load(folder)
    stages = {stage: list(classes) for stage, classes in STAGES.items()}
    _edited(folder, format=1, stages=stages | {"severity": list(SEVERITIES[::-1])})
    with pytest.raises(ValueError, match="Make the cascade anew"):
        BrainCascade.load(folder)
    _edited(folder, stages=stages)
    BrainCascade.load(folder)
    (folder / "severity.keras").rename(folder / "kept")
    with pytest.raises(FileNotFoundError, match="lacks the models of severity; make the cascade anew"):
        BrainCascade.load(folder)


def test_load_refuses_models_of_other_images_or_classes(lines, tmp_path):
    folder = lines.save(tmp_path / "cascade")
    runs.write_model(folder / "kind.keras", lines.models["type"])
    with pytest.raises(ValueError, match=r"the model of kind turns .* into \(None, 3\)"):
        BrainCascade.load(folder)
    runs.write_model(folder / "kind.keras", _line(*LINES["kind"], size=(24, 16)))
    with pytest.raises(ValueError, match=r"the model of kind turns \(None, 24, 16, 1\)"):
        BrainCascade.load(folder)
    runs.write_model(folder / "kind.keras", lines.models["kind"])
    _edited(folder, read=READ | {"image_size": [24, 16]})
    with pytest.raises(ValueError, match="expected .*as `read_options` say"):
        BrainCascade.load(folder)


def test_load_runs_no_code_that_a_model_brings(lines, tmp_path):
    inputs = keras.Input((*SIZE, 1), dtype="uint8", name="image")
    x = keras.layers.Lambda(lambda pixels: pixels * 2)(inputs)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(x))
    brought = keras.Model(inputs, models.classification_head(x, 2))
    folder = replace(lines, models={**lines.models, "kind": brought}).save(tmp_path / "cascade")
    with pytest.raises(ValueError, match="kind.keras is not opened: its config.json names 'Lambda'"):
        BrainCascade.load(folder)


# --- kerasmed predict brain ------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path, rng, picture):
    """A folder of files of many kinds, of which the first and another are no images."""
    folder = tmp_path / "asked"
    (folder / "deeper").mkdir(parents=True)
    (folder / "0 notes.jpg").write_text("not pixels")
    for number, level in enumerate((10, 60, 95, 130, 180, 250)):
        pixels = np.clip(rng.normal(level, 9, (20 + number, 33)), 0, 255).astype(np.uint8)
        _write(folder, f"{number} (1).{'png' if number % 2 else 'jpg'}", pixels)
    _write(folder / "deeper", "deep.png", picture.astype(np.uint16) * 16)
    (folder / "deeper/a.dcm").write_bytes(DICOM.read_bytes())
    (folder / "deeper/zero.png").write_bytes(b"")
    return folder


@pytest.fixture
def run(tmp_path, lines):
    """What of a run of 08_brain_cascade is looked at."""
    replace(lines, threshold=0.4).save(tmp_path / "run" / "cascade")
    return tmp_path / "run"


def test_prediction_of_files_is_that_of_the_cascade_image_by_image(run, asked, lines):
    table = prediction.predict(run, asked, progress=False)
    stages = [name for stage in STAGES for name in cascade.columns(stage)]
    probabilities = [f"p_{name}" for name in OUTCOMES]
    assert list(table) == ["image_path", "error", "outcome", "likeliest", *probabilities, *stages]
    unread = table["image_path"].isin(["0 notes.jpg", "deeper/zero.png"])
    assert len(table) == 10 and unread.sum() == 2
    assert (table["error"] != "").tolist() == unread.tolist()
    assert (table.loc[unread, ["outcome", "likeliest"]] == "").all(axis=None)
    assert table.loc[unread, [*probabilities, *stages]].isna().all(axis=None)
    read = table[~unread]
    np.testing.assert_allclose(read[probabilities].sum(axis=1), 1, atol=1e-6)
    for stage in STAGES:
        np.testing.assert_allclose(read[cascade.columns(stage)].sum(axis=1), 1, atol=1e-6)
    assert read["outcome"].nunique() > 3 and (read["outcome"] != read["likeliest"]).any()
    reader = replace(lines, threshold=0.4)
    for row in read.to_dict("records"):
        reading = reader.predict(asked / row["image_path"])
        assert (row["outcome"], row["likeliest"]) == (reading.outcome, reading.likeliest)
        for outcome, probability in reading.joint.items():
            assert row[f"p_{outcome}"] == pytest.approx(probability, abs=1e-6)
        for stage, told in reading.stages.items():
            for name, probability in told.items():
                assert row[f"{stage}_{name}"] == pytest.approx(probability, abs=1e-6)


def test_prediction_of_one_file_and_of_none_that_is_an_image(run, asked):
    (row,) = prediction.predict(run, asked / "5 (1).png", progress=False).itertuples()
    assert row.image_path == "5 (1).png" and row.outcome == "VeryMildDemented"
    (row,) = prediction.predict(run, asked / "0 notes.jpg", progress=False).to_dict("records")
    assert row["error"].startswith("not an image") and row["outcome"] == row["likeliest"] == ""
    assert np.isnan([value for name, value in row.items() if name[:2] == "p_"]).all()


def test_prediction_comes_back_from_csv_as_it_was(run, asked, tmp_path):
    table = prediction.predict(run, asked, progress=False)
    table.to_csv(tmp_path / "t.csv", index=False)
    back = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, na_values={name: [""] for name in table.columns[4:]})
    assert back["outcome"].tolist() == table["outcome"].tolist() and NONE in set(back["outcome"])
    np.testing.assert_allclose(back.iloc[:, 4:].to_numpy(float), table.iloc[:, 4:].to_numpy(float), rtol=1e-6)


def test_prediction_follows_the_threshold_and_the_options_of_the_cascade(tmp_path, lines, asked):
    replace(lines, threshold=1.0, read_options=READ | {"equalize": True}).save(tmp_path / "run" / "cascade")
    table = prediction.predict(tmp_path / "run", asked, progress=False)
    read = table[table["error"] == ""]
    assert set(read["outcome"]) == {NONE}
    reader = replace(lines, read_options=READ | {"equalize": True})
    for row in read.itertuples():
        expected = reader.predict(asked / row.image_path).stages["disease"]["disease"]
        assert row.disease_disease == pytest.approx(expected, abs=1e-6)
