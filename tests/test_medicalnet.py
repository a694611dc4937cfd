import sys

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from kerasmed import backbones, medicalnet
from kerasmed.backbones import WeightsError

CHANNELS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
PARAMETERS_152 = 117_359_936


# --- the published layout, written a second time --------------------------------------------------------------------


def _published(depth):
    """Names and shapes of the published encoder: (name of a convolution, its shape) and of what normalises it."""
    yield "conv1", (64, 1, 7, 7, 7), "bn1"
    width = 64
    for (stage, channels), num_blocks in zip(CHANNELS.items(), medicalnet.BLOCKS[depth]):
        expansion = 1 if depth == 10 else 4
        for place in range(num_blocks):
            block = f"{stage}.{place}"
            sizes = (
                [(width, channels, 3), (channels, channels, 3)]
                if depth == 10
                else [(width, channels, 1), (channels, channels, 3), (channels, 4 * channels, 1)]
            )
            for number, (before, after, size) in enumerate(sizes, start=1):
                yield f"{block}.conv{number}", (after, before, size, size, size), f"{block}.bn{number}"
            if place == 0 and (stage != "layer1" or expansion == 4):
                shape = (expansion * channels, width, 1, 1, 1)
                yield f"{block}.downsample.0", shape, f"{block}.downsample.1"
            width = expansion * channels


def _state(depth, seed=0):
    """Random weights under the published names, of a size that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    state = {}
    for convolution, shape, norm in _published(depth):
        kernel = rng.standard_normal(shape, dtype="float32")
        state[f"{convolution}.weight"] = kernel * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        state[f"{norm}.weight"] = np.float32(rng.uniform(0.5, 1, shape[0]))
        state[f"{norm}.bias"] = np.float32(rng.normal(0, 0.2, shape[0]))
        state[f"{norm}.running_mean"] = np.float32(rng.normal(0, 0.3, shape[0]))
        state[f"{norm}.running_var"] = np.float32(rng.uniform(0.5, 2, shape[0]))
        state[f"{norm}.num_batches_tracked"] = np.int64(7)
    return state


def _reference(x, state, depth, convolve, normalise, relu, pool):
    """The published network on (batch, channels, depth, height, width), with whatever does the arithmetic."""

    def unit(x, convolution, norm, stride=1, dilation=1):
        kernel = state[f"{convolution}.weight"]
        padding = dilation * (kernel.shape[2] - 1) // 2
        statistics = [state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return normalise(convolve(x, kernel, stride, padding, dilation), *statistics)

    x = pool(relu(unit(x, "conv1", "bn1", stride=2)))
    for stage, stride, dilation in (("layer1", 1, 1), ("layer2", 2, 1), ("layer3", 1, 2), ("layer4", 1, 4)):
        for place in range(medicalnet.BLOCKS[depth][int(stage[-1]) - 1]):
            block, stride = f"{stage}.{place}", stride if place == 0 else 1
            shortcut = x
            if f"{block}.downsample.0.weight" in state:
                shortcut = unit(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            if depth == 10:
                x = relu(unit(x, f"{block}.conv1", f"{block}.bn1", stride, dilation))
                x = unit(x, f"{block}.conv2", f"{block}.bn2", 1, dilation)
            else:
                x = relu(unit(x, f"{block}.conv1", f"{block}.bn1"))
                x = relu(unit(x, f"{block}.conv2", f"{block}.bn2", stride, dilation))
                x = unit(x, f"{block}.conv3", f"{block}.bn3")
            x = relu(x + shortcut)
    return x


def _windows(x, size, stride, padding, dilation, fill):
    x = np.pad(x, ((0, 0), (0, 0), *[(padding, padding)] * 3), constant_values=fill)
    reach = dilation * (size - 1) + 1
    windows = np.lib.stride_tricks.sliding_window_view(x, (reach,) * 3, axis=(2, 3, 4))
    return windows[:, :, ::stride, ::stride, ::stride, ::dilation, ::dilation, ::dilation]


def _convolve(x, kernel, stride, padding, dilation):
    windows = _windows(x, kernel.shape[2], stride, padding, dilation, 0)
    return np.moveaxis(np.tensordot(windows, kernel, axes=((1, 5, 6, 7), (1, 2, 3, 4))), -1, 1)


def _normalise(x, mean, variance, gamma, beta):
    mean, variance, gamma, beta = (values[:, None, None, None] for values in (mean, variance, gamma, beta))
    return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta


def _numpy_maps(volume, state, depth):
    maps = _reference(
        _standardised(volume)[None, None],
        state,
        depth,
        _convolve,
        _normalise,
        lambda x: np.maximum(x, 0),
        lambda x: _windows(x, 3, 2, 1, 1, -np.inf).max(axis=(5, 6, 7)),
    )
    return np.moveaxis(maps[0], 0, -1)


def _standardised(volume):
    volume = volume.astype("float64")
    body = volume[volume > 0]
    return np.where(volume == 0, 0, (volume - body.mean()) / body.std()).astype("float32")


def _volume(shape, seed=1):
    rng = np.random.default_rng(seed)
    volume = rng.integers(0, 256, shape, dtype=np.uint8)
    volume[:, : shape[1] // 5] = 0
    return volume


def _relative(got, expected):
    """Largest difference over the root mean square of what is expected."""
    return np.abs(got - expected).max() / np.sqrt(np.mean(np.square(expected, dtype="float64")))


def _weights(model):
    return {
        f"{layer.name}/{weight.name}": convert_to_numpy(weight) for layer in model.layers for weight in layer.weights
    }


@pytest.fixture(scope="module")
def state10():
    return _state(10)


@pytest.fixture
def model10():
    return medicalnet.build(10, (8, 16, 16, 1))


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "sides"), [(10, (9, 40, 47)), (50, (8, 24, 41))])
def test_build_with_loaded_weights_equals_a_reference_in_numpy(depth, sides):
    # Sides that are odd, even, and long enough for a dilation of 4 to reach other voxels.
    state, volume = _state(depth), _volume(sides)
    model = medicalnet.build(depth, (*sides, 1))
    assert medicalnet.load(model, state, source="random").share == 1
    maps = convert_to_numpy(model(volume[None, ..., None]))[0]
    expected = _numpy_maps(volume, state, depth)
    assert maps.shape == expected.shape == (*[-(-side // 8) for side in sides], 512 if depth == 10 else 2048)
    assert _relative(maps, expected) < 1e-4  # float32, summed in another order over 10 to 53 convolutions
    assert (maps > 0).mean() > 0.3


def test_build_depth_152_has_the_published_number_of_parameters_and_takes_the_published_names():
    model = medicalnet.build(152, (8, 16, 16, 1))
    moving = sum(array.size for name, array in _weights(model).items() if "moving" in name)
    assert model.count_params() - moving == PARAMETERS_152
    shapes = {f"{name}.weight": shape for name, shape, _ in _published(152)}
    assert len(shapes) == 155
    state = {name: np.full(shape, 0.01, "float32") for name, shape in shapes.items()}
    for _, shape, norm in _published(152):
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{name}"] = np.ones(shape[0], "float32")
    receipt = medicalnet.load(model, state, source="synthetic", min_share=1)
    assert receipt.share == 1 and len(receipt.matched) == 155 * 5
    assert not receipt.unmatched_model and not receipt.unmatched_file
    assert sum(array.size for name, array in state.items() if "running" not in name) == PARAMETERS_152


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(10, 4), (50, 16), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((101, 33), (200, 66)))],
)
def test_build_depths_have_their_blocks(depth, blocks):
    model = medicalnet.build(depth, (8, 16, 16, 1))
    assert sum(layer.name.endswith("_add") for layer in model.layers) == blocks
    assert not [layer.name for layer in model.layers if "." in layer.name]  # which PyTorch does not take
    assert sum(isinstance(layer, keras.layers.Conv3D) for layer in model.layers) == len(list(_published(depth)))


def test_build_pools_are_the_means_of_the_maps(state10):
    models = {pool: medicalnet.build(10, (17, 24, 33, 1), pool=pool) for pool in medicalnet.POOLS}
    for model in models.values():
        medicalnet.load(model, state10, source="random")
    volume = _volume((17, 24, 33))[None, ..., None]
    maps, planes, pooled = (convert_to_numpy(models[pool](volume)) for pool in ("none", "plane", "all"))
    assert maps.shape == (1, 3, 3, 5, 512) and planes.shape == (1, 3, 512) and pooled.shape == (1, 512)
    np.testing.assert_allclose(planes, maps.mean(axis=(2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pooled, planes.mean(axis=1), rtol=1e-5, atol=1e-6)
    assert models["plane"].get_layer("planes") and models["all"].get_layer("pool")


def test_load_freezes_the_running_statistics_even_in_training_mode(model10, state10, rng):
    assert model10.trainable_variables
    medicalnet.load(model10, state10, source="random")
    before, volume = _weights(model10), rng.integers(0, 256, (2, 8, 16, 16, 1), dtype=np.uint8)
    np.testing.assert_array_equal(model10(volume, training=True), model10(volume, training=False))
    after = _weights(model10)
    assert all((after[name] == before[name]).all() for name in before) and not model10.trainable_variables
    model10.trainable = True
    assert np.abs(model10(volume, training=True) - model10(volume, training=False)).max() > 0.1


def test_build_round_trips_through_keras_file(tmp_path, state10):
    model = medicalnet.build(10, (8, 16, 16, 1), pool="plane")
    medicalnet.load(model, state10, source="random")
    model.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    volume = _volume((8, 16, 16))[None, ..., None]
    assert copy.input.dtype == "uint8" and not copy.trainable_variables
    np.testing.assert_array_equal(copy(volume), model(volume))


def test_build_of_floats_gives_what_it_gives_of_bytes(model10, state10):
    floats = medicalnet.build(10, (8, 16, 16, 1), dtype="float32")
    for model in (model10, floats):
        medicalnet.load(model, state10, source="random")
    volume = _volume((8, 16, 16))[None, ..., None]
    np.testing.assert_array_equal(floats(np.float32(volume)), model10(volume))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((34, (8, 16, 16, 1)), {}, "`depth` is 34; expected one of 10, 50, 101, 152, 200"),
        ((10, (8, 16, 16)), {}, r"`input_shape` is \(8, 16, 16\)"),
        ((10, (8, 16, 16, 3)), {}, r"expected \(depth, height, width, 1\)"),
        ((10, (None, 16, 16, 1)), {}, "fixed numbers"),
        ((10, (8, 16, 16, 1)), {"pool": "max"}, "`pool` is 'max'.* none, plane, all"),
        ((10, (8, 16, 16, 1)), {"dtype": "int16"}, "`dtype` 'int16'"),
    ],
)
def test_build_unfit_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        medicalnet.build(*arguments, **options)


def test_volume_standardisation_by_hand():
    # 2, 4 and 6 are above 0: mean 4, variance 8 / 3. Background stays 0, and the second volume is on its own.
    volumes = np.uint8([[0, 2, 4, 6], [0, 0, 10, 30]]).reshape(2, 1, 2, 2, 1)
    out = medicalnet.VolumeStandardisation()(volumes)
    assert out.dtype == "float32" and out.shape == volumes.shape
    root = np.sqrt(8 / 3)
    np.testing.assert_allclose(
        convert_to_numpy(out).reshape(2, 4), [[0, -2 / root, 0, 2 / root], [0, 0, -1, 1]], rtol=1e-6, atol=1e-7
    )
    # Voxels below 0 are standardised, and no part of the statistics.
    signed = medicalnet.VolumeStandardisation()(np.float32([-6, 2, 4, 6]).reshape(1, 1, 2, 2, 1))
    np.testing.assert_allclose(convert_to_numpy(signed).ravel(), np.array([-10, -2, 0, 2]) / root, rtol=1e-6, atol=1e-7)


def test_volume_standardisation_of_empty_and_of_constant_volumes_is_zero():
    volumes = np.stack([np.zeros((7, 50, 50, 1)), np.full((7, 50, 50, 1), 201)]).astype("uint8")
    volumes[1, 0, 0, 0] = 0
    np.testing.assert_array_equal(medicalnet.VolumeStandardisation()(volumes), np.zeros(volumes.shape))


def test_volume_standardisation_ignores_brightness_and_contrast(rng):
    volume = np.float32(rng.integers(1, 60, (1, 4, 30, 30, 1)))
    layer = medicalnet.VolumeStandardisation()
    np.testing.assert_allclose(layer(3 * volume + 20), layer(volume), atol=1e-5)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_load_turns_kernels_and_names_as_by_hand(model10, state10):
    receipt = medicalnet.load(model10, state10, source="here")
    ours = _weights(model10)
    kernel = state10["layer2.0.downsample.0.weight"]
    assert kernel.shape == (128, 64, 1, 1, 1)
    assert ours["layer2_0_downsample_0/kernel"][0, 0, 0, 3, 5] == kernel[5, 3, 0, 0, 0]
    assert ours["conv1/kernel"][1, 2, 3, 0, 9] == state10["conv1.weight"][9, 0, 1, 2, 3]
    np.testing.assert_array_equal(ours["bn1/moving_variance"], state10["bn1.running_var"])
    np.testing.assert_array_equal(ours["layer4_0_bn2/gamma"], state10["layer4.0.bn2.weight"])
    assert ["layer1_0_bn1/beta", "layer1.0.bn1.bias"] in receipt.matched and receipt.source == "here"
    assert len(receipt.matched) == 12 * 5 == len(ours)


def test_load_takes_names_of_parallel_training_and_lists_the_head_without_asking_for_it(model10, state10):
    state = {f"module.{name}": array for name, array in state10.items()}
    state |= {f"module.conv_seg.{place}.weight": np.ones((2, 2, 1, 1, 1), "float32") for place in range(3)}
    receipt = medicalnet.load(model10, state, source="whole", min_share=1)
    assert receipt.unmatched_file == [f"conv_seg.{place}.weight" for place in range(3)]
    assert receipt.unmatched_model == [] and receipt.share == pytest.approx(60 / 63)


def test_load_of_a_2d_network_is_refused_and_says_so(model10, state10):
    before = _weights(model10)
    flat = {name: array[..., 0] if array.ndim == 5 else array for name, array in state10.items()}
    with pytest.raises(WeightsError, match=r"12 tensors have other shapes.*12 of its kernels.*weights of a 2D network"):
        medicalnet.load(model10, flat, source="resnet", min_share=0)
    after = _weights(model10)
    assert all((after[name] == before[name]).all() for name in before)


def test_load_of_a_single_unfit_shape_is_refused_whatever_the_share(model10, state10):
    state = state10 | {"layer3.0.bn1.bias": np.zeros(255, "float32")}
    with pytest.raises(WeightsError, match=r"1 tensors have.*layer3.0.bn1.bias \(255,\) for \(256,\)"):
        medicalnet.load(model10, state, source="odd", min_share=0)
    state = state10 | {"layer1.0.conv1.weight": np.zeros((64, 64, 3, 3, 1), "float32")}
    with pytest.raises(WeightsError, match=r"conv1.weight \(64, 64, 3, 3, 1\) for \(64, 64, 3, 3, 3\)"):
        medicalnet.load(model10, state, source="odd", min_share=0)


def test_load_below_the_share_is_refused_and_changes_nothing(model10, state10):
    before = _weights(model10)
    fewer = {name: array for name, array in state10.items() if not name.startswith("layer4")}
    with pytest.raises(WeightsError, match=r"share of 0.750 and less than 0.99.*layer4_0_conv1/kernel"):
        medicalnet.load(model10, fewer, source="cut")
    more = state10 | {f"layer4.1.conv{place}.weight": np.ones((1,) * 5, "float32") for place in range(3)}
    with pytest.raises(WeightsError, match=r"of the file: \['layer4.1.conv0.weight'"):
        medicalnet.load(model10, more, source="deeper")
    with pytest.raises(WeightsError, match="share of 0.000"):
        medicalnet.load(model10, {}, source="empty")
    after = _weights(model10)
    assert all((after[name] == before[name]).all() for name in before)
    receipt = medicalnet.load(model10, fewer, source="cut", min_share=0.75)
    assert len(receipt.unmatched_model) == 15 and receipt.share == 0.75


def test_load_of_values_that_are_not_finite_is_refused(model10, state10):
    state = state10 | {"bn1.bias": np.full(64, np.nan, "float32")}
    with pytest.raises(WeightsError, match=r"1 tensors with values that are not finite.*'bn1.bias'"):
        medicalnet.load(model10, state, source="broken")


def test_load_of_names_with_and_without_prefix_is_refused(model10, state10):
    with pytest.raises(WeightsError, match=r"1 tensors both with and without `module.`. First: \['conv1.weight'\]"):
        medicalnet.load(model10, state10 | {"module.conv1.weight": state10["conv1.weight"]}, source="double")


def test_weights_of_3d_networks_are_refused_by_2d_backbones():
    flat = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(32, 32, 3))
    tensors = []
    for convolution, shape, norm in _published(50):
        tensors.append((convolution, [np.zeros((*shape[2:], shape[1], shape[0]), "float32")]))
        tensors.append((norm, [np.ones(shape[0], "float32")] * 4))
    with pytest.raises(WeightsError, match="does not fit resnet50"):
        backbones.transfer(flat, tensors, source="medicalnet 50")


def test_read_state_dict_of_npz_round_trips_without_torch(tmp_path, state10, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    np.savez(tmp_path / "w.npz", **{f"module.{name}": array for name, array in state10.items()})
    state = medicalnet.read_state_dict(tmp_path / "w.npz")
    assert state.keys() == state10.keys()
    assert all((state[name] == state10[name]).all() for name in state)


def test_read_state_dict_of_npz_with_objects_or_cut_short_is_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.array([{"code": 1}], dtype=object))
    np.savez(tmp_path / "whole.npz", a=np.zeros(9))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])
    (tmp_path / "empty.npz").write_bytes(b"")
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, np.zeros(3))
    for name in ("objects", "cut", "empty", "single"):
        with pytest.raises(WeightsError, match=f"{name}.npz cannot be read as .npz of plain arrays"):
            medicalnet.read_state_dict(tmp_path / f"{name}.npz")


def test_read_state_dict_of_pth_without_torch_says_how_to_convert(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(ImportError, match=r"needs torch.*weights_only=True.*numpy.savez\('FILE.npz'"):
        medicalnet.read_state_dict(tmp_path / "w.pth")


def test_read_state_dict_of_other_and_of_missing_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a .npz or .pth"):
        medicalnet.read_state_dict(tmp_path / "w.h5")
    with pytest.raises(FileNotFoundError, match="w.npz"):
        medicalnet.read_state_dict(tmp_path / "w.npz")


# --- against torch, where it is installed ----------------------------------------------------------------------------


def test_read_state_dict_of_pth_is_that_of_torch(tmp_path, state10):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state10.items()}
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": each for name, each in tensors.items()}}, tmp_path / "n.pth"
    )
    torch.save(tensors, tmp_path / "flat.pth", _use_new_zipfile_serialization=False)  # as files of 2019
    for name in ("n", "flat"):
        state = medicalnet.read_state_dict(tmp_path / f"{name}.pth")
        assert state.keys() == state10.keys()
        assert all((state[key] == state10[key]).all() for key in state)


def test_read_state_dict_of_pth_that_holds_code_or_no_tensors_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {"conv1.weight": print}}, tmp_path / "code.pth")
    torch.save({"state_dict": {"conv1.weight": [1.0]}}, tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "list.pth").read_bytes()[:90])
    for name in ("code", "cut"):
        with pytest.raises(WeightsError, match="cannot be read as a file of tensors"):
            medicalnet.read_state_dict(tmp_path / f"{name}.pth")
    with pytest.raises(WeightsError, match=r"no state dict.*\['conv1.weight'\]"):
        medicalnet.read_state_dict(tmp_path / "list.pth")


@pytest.mark.slow
@pytest.mark.parametrize("depth", [50, 152])
def test_build_with_loaded_weights_equals_torch(depth):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    state, volume = _state(depth), _volume((17, 72, 80))
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    with torch.inference_mode():
        expected = _reference(
            torch.from_numpy(_standardised(volume)[None, None]),
            tensors,
            depth,
            lambda x, kernel, stride, padding, dilation: functional.conv3d(x, kernel, None, stride, padding, dilation),
            lambda x, mean, variance, gamma, beta: functional.batch_norm(x, mean, variance, gamma, beta, eps=1e-5),
            functional.relu,
            lambda x: functional.max_pool3d(x, 3, 2, 1),
        )
    expected = np.moveaxis(expected.numpy()[0], 0, -1)
    model = medicalnet.build(depth, (*volume.shape, 1))
    medicalnet.load(model, state, source="random", min_share=1)
    maps = convert_to_numpy(model(volume[None, ..., None]))[0]
    assert maps.shape == expected.shape == (3, 9, 10, 2048)
    assert _relative(maps, expected) < 1e-4  # float32; 2.2e-5 of depth 152 with torch 2.13 on a CPU
