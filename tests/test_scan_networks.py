import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from kerasmed import gradcam, scan_networks

# By hand: (k² · channels in + 1) · channels out a convolution, (in + 1) · out a dense layer, 4 · channels a
# normalisation, 4 · units · (in + units + 1) an LSTM; at 64×64 with 3 labels.
WEIGHTS = {
    "cnn1": 2_560 + (20 * 20 * 256 + 1) * 256 + 771,
    "cnn2": 650 + 31_300 + 200 + 31_570 + 280 + 7_100 + 10_100 + 303,
    "cnn3": 500 + 33_825 + 84_500 + (14 * 14 * 125 + 1) * 500 + 125_250 + 753,
    "cnn4": 832 + 51_264 + 66_560 + 3_075,
    "cnn5": 320 + 9_248 + 18_496 + 36_928 + 73_856 + 147_584 + 1_638_912 + 6_554_112 + 525_312 + 3_075,
    "lstm": 98_816 + 131_584 + 8_256 + 195,
    "fcnn1": 1_048_832 + 65_792 + 771,
    "fcnn2": 1_048_832 + 25_700 + 400 + 303,
}


@pytest.fixture(scope="module")
def small():
    """Function of a name: that network at 32×32 with 2 labels, built once."""
    built = {}

    def get(name):
        if name not in built:
            keras.utils.set_random_seed(0)
            built[name] = scan_networks.build(name, (32, 32), 2)
        return built[name]

    return get


@pytest.mark.parametrize("name", scan_networks.NAMES)
def test_build_has_the_weights_of_its_layers_and_the_documented_number(name):
    model = scan_networks.build(name, (64, 64), 3)
    assert model.count_params() == WEIGHTS[name]
    assert f"{WEIGHTS[name]:,}" in scan_networks.build.__doc__
    assert model.input.dtype == "uint8" and model.input.shape == (None, 64, 64, 1) and model.name == name
    assert model.layers[0].name == "image" and model.output.shape == (None, 3)
    kinds = (keras.layers.Conv2D, keras.layers.Dense)
    activations = {layer.activation for layer in model.layers[:-2] if isinstance(layer, kinds)}
    assert activations == {keras.activations.relu}
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(norms) == {"cnn2": 2, "fcnn2": 1}.get(name, 0) and {layer.momentum for layer in norms} <= {0.9}


@pytest.mark.parametrize(
    ("name", "side", "last_map", "same"),
    [
        ("cnn2", 64, (1, 1), set()),
        ("cnn4", 64, (1, 1), set()),
        ("cnn5", 64, (1, 1), {"block4_pool"}),
        ("cnn2", 32, (1, 1), {"block3_conv", "block3_pool"}),
        ("cnn4", 32, (1, 1), {"block2_pool"}),
        ("cnn5", 32, (1, 1), {"block4_b_conv", "block4_pool"}),
        ("cnn1", 32, (10, 10), set()),
        ("cnn3", 32, (6, 6), set()),
    ],
)
def test_build_pads_only_where_a_window_would_not_fit(name, side, last_map, same):
    model = scan_networks.build(name, (side, side), 1)
    windows = [layer for layer in model.layers if hasattr(layer, "padding")]
    always = {f"block{number}_a_conv" for number in range(1, 5)} if name == "cnn5" else set()
    assert {layer.name for layer in windows if layer.padding == "same"} == same | always
    assert windows[-1].output.shape[1:3] == last_map


def test_build_of_an_oblong_size_pads_by_the_shorter_side():
    model = scan_networks.build("cnn4", (64, 32), 1)
    assert model.get_layer("block2_pool").padding == "same" and model.output.shape == (None, 1)


def test_build_dropout_stands_where_the_earlier_work_had_it():
    rates = {
        name: [layer.rate for layer in scan_networks.build(name, (32, 32), 1).layers if hasattr(layer, "rate")]
        for name in scan_networks.NAMES
    }
    assert rates == {
        "cnn1": [],
        "cnn2": [0.25],
        "cnn3": [0.25, 0.25, 0.4, 0.3],
        "cnn4": [0.8],
        "cnn5": [0.2] * 5,
        "lstm": [],
        "fcnn1": [],
        "fcnn2": [0.5],
    }


@pytest.mark.parametrize("name", scan_networks.NAMES)
def test_build_scales_the_pixels_to_zero_and_one_inside(small, name):
    model = small(name)
    ends = np.uint8([0, 255]).repeat(32 * 32).reshape(2, 32, 32, 1)
    scaled = convert_to_numpy(keras.Model(model.input, model.get_layer("preprocess").output)(ends))
    assert scaled[0].max() == 0 and np.ptp(scaled[1]) == 0 and scaled[1].min() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", scan_networks.NAMES)
def test_build_round_trips_through_keras_file(small, name, tmp_path, rng):
    model = small(name)
    pixels = rng.integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    model.save(tmp_path / "m.keras")
    probabilities = convert_to_numpy(model(pixels))
    assert probabilities.dtype == "float32" and probabilities.std(axis=0).min() > 0
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "m.keras")(pixels), probabilities)


def test_build_lstm_reads_the_rows_in_order(small, rng):
    # The last row counts for more than the first in a network that has learnt nothing yet; a dense one knows no order.
    pixels = rng.integers(0, 256, (1, 32, 32, 1), dtype=np.uint8)
    first, last = pixels.copy(), pixels.copy()
    first[:, 0], last[:, -1] = 255 - first[:, 0], 255 - last[:, -1]
    logits = keras.Model(small("lstm").input, small("lstm").get_layer("logits").output)
    now, without_first, without_last = convert_to_numpy(logits(np.concatenate([pixels, first, last])))
    assert np.abs(without_last - now).sum() > 3 * np.abs(without_first - now).sum()


def test_build_head_of_two_scores_has_the_same_trunk():
    binary, categorical = (scan_networks.build("cnn2", (32, 32), 3, head=head) for head in ("binary", "categorical"))
    assert categorical.count_params() - binary.count_params() == 101 * 3
    assert categorical.get_layer("logits").output.shape == (None, 3)


@pytest.mark.parametrize("head", ["binary", "categorical"])
def test_build_convolutional_network_can_be_explained(head, rng):
    model = scan_networks.build("cnn5", (32, 32), 3, head=head)
    assert gradcam.default_layer(model) == "block2_b_conv"
    maps = gradcam.build(model)(rng.integers(0, 256, (2, 32, 32), dtype=np.uint8), 1)
    assert maps.heat.shape == (2, 13, 13) and (maps.status != gradcam.ZERO_GRADIENT).all()


@pytest.mark.parametrize("name", ["lstm", "fcnn1", "fcnn2"])
def test_build_network_without_maps_is_not_explained(small, name):
    with pytest.raises(ValueError, match=f"model '{name}' has no layer that puts out maps.*convolutional networks"):
        gradcam.build(small(name))


@pytest.mark.parametrize(
    ("arguments", "head", "message"),
    [
        (("cnn6", (64, 64), 3), "binary", "'cnn6' is unknown; known are cnn1, cnn2"),
        (("cnn1", (64, 31), 3), "binary", r"\(64, 31\).*at least 32 pixels"),
        (("cnn1", (64,), 3), "binary", r"\(64,\); expected \(height, width\)"),
        (("fcnn1", (32, 32), 0), "binary", "at least 1"),
        (("fcnn1", (32, 32), 3), "softmax", "'softmax'"),
    ],
)
def test_build_unfit_arguments_are_refused(arguments, head, message):
    with pytest.raises(ValueError, match=message):
        scan_networks.build(*arguments, head=head)
