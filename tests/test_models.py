import keras
import numpy as np
import pytest

from kerasmed import models


@pytest.fixture(scope="module")
def compact():
    keras.utils.set_random_seed(0)
    return models.compact_cnn((32, 32), 4, filters=(8, 16))


def test_compact_cnn_takes_grey_bytes_and_gives_probabilities(compact, rng):
    pixels = rng.integers(0, 256, (5, 32, 32, 1), dtype=np.uint8)
    probabilities = compact.predict(pixels, verbose=0)
    assert compact.input.dtype == "uint8" and compact.get_layer("logits").compute_dtype == "float32"
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert probabilities.std(axis=0).min() > 0


def test_compact_cnn_preprocessing_is_inside_and_covers_minus_one_to_one(compact):
    scaled = keras.Model(compact.input, compact.get_layer("preprocess").output)(
        np.array([0, 255], np.uint8).repeat(1024).reshape(2, 32, 32, 1)
    )
    assert float(scaled[0].numpy().max()) == -1 and float(scaled[1].numpy().min()) == 1


def test_compact_cnn_default_size_and_reduction():
    model = models.compact_cnn((96, 96), 4)
    assert model.count_params() == 1_229_732
    assert model.get_layer("block4").output.shape[1:] == (6, 6, 256)
    momenta = {layer.momentum for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)}
    assert momenta == {0.9}


def test_compact_cnn_round_trips_through_keras_file(compact, tmp_path, rng):
    pixels = rng.integers(0, 256, (5, 32, 32, 1), dtype=np.uint8)
    compact.save(tmp_path / "m.keras")
    reloaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(reloaded.predict(pixels, verbose=0), compact.predict(pixels, verbose=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 32), 4), "at least 16 pixels"),
        (((32, 32), 1), "at least 2"),
    ],
)
def test_compact_cnn_unfit_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.compact_cnn(*arguments)


def test_classification_head_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="'tanh'"):
        models.classification_head(keras.Input((4,)), 2, activation="tanh")


@pytest.mark.parametrize("loss", models.LABEL_LOSSES)
def test_label_head_puts_float32_logits_before_independent_probabilities(loss, rng):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        features = keras.Input((5,), dtype="float16")
        model = keras.Model(features, models.label_head(features, 3, loss=loss))
    finally:
        keras.config.set_dtype_policy("float32")
    head = model.layers[1:]
    assert {layer.compute_dtype for layer in head} == {"float32"} and model.output.dtype == "float32"
    assert model.count_params() == {"binary": 18, "categorical": 36}[loss]
    parts = keras.Model(features, [model.get_layer("logits").output, model.output])
    logits, probabilities = (part.numpy() for part in parts(np.float16(rng.normal(size=(4, 5)))))
    assert probabilities.shape == (4, 3)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)  # float32


def test_label_head_of_two_scores_is_a_softmax_over_each_pair_with_its_cross_entropy(rng):
    features = keras.Input((5,))
    probabilities = models.label_head(features, 3, loss="categorical")
    model = keras.Model(features, probabilities)
    names = ("scores_absent", "scores_present", "logits")
    parts = keras.Model(features, [*(model.get_layer(name).output for name in names), probabilities])
    # Scores of up to some 10, where a probability rounds to 0 or 1 but a logit does not.
    absent, present, logits, got = (part.numpy() for part in parts(np.float32(rng.normal(0, 5, (64, 5)))))
    pairs = np.stack([absent, present], axis=-1)
    assert np.abs(logits).max() > 8
    np.testing.assert_allclose(got, keras.ops.softmax(pairs)[..., 1], atol=1e-6)  # float32
    y = rng.integers(0, 2, (64, 3))
    pairwise = keras.losses.CategoricalCrossentropy(from_logits=True)(np.eye(2)[y], pairs)
    binary = keras.losses.BinaryCrossentropy(from_logits=True)(y, logits)
    assert float(binary) == pytest.approx(float(pairwise), rel=1e-5)


@pytest.mark.parametrize(
    ("num_labels", "loss", "message"), [(3, "focal", "'focal'; expected 'binary'"), (0, "categorical", "at least 1")]
)
def test_label_head_unfit_arguments_are_refused(num_labels, loss, message):
    with pytest.raises(ValueError, match=message):
        models.label_head(keras.Input((4,)), num_labels, loss=loss)


def test_two_layer_head_of_one_label_is_dense_dropout_dense_and_float32_logits(rng):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        features = keras.Input((5,), dtype="float16")
        model = keras.Model(features, models.two_layer_head(features, 1, units=8, dropout=0.3))
    finally:
        keras.config.set_dtype_policy("float32")
    names = ["head_dense1", "head_dropout", "head_dense2", "logits", "probabilities"]
    assert [layer.name for layer in model.layers[1:]] == names and model.get_layer("head_dropout").rate == 0.3
    assert [layer.compute_dtype for layer in model.layers[1:]] == ["float16"] * 3 + ["float32"] * 2
    assert model.count_params() == 6 * 8 + 9 * 8 + 9
    hidden = [model.get_layer(name).activation for name in ("head_dense1", "head_dense2")]
    assert hidden == [keras.activations.relu] * 2
    parts = keras.Model(features, [model.get_layer("logits").output, model.output])
    logits, probabilities = (part.numpy() for part in parts(np.float16(rng.normal(size=(4, 5)))))
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)  # float32


def test_two_layer_head_without_dropout_has_no_such_layer_and_needs_a_label():
    features = keras.Input((5,))
    model = keras.Model(features, models.two_layer_head(features, 3, dropout=0))
    assert "head_dropout" not in {layer.name for layer in model.layers}
    assert model.get_layer("head_dense2").units == 256 and model.output.shape == (None, 3)
    with pytest.raises(ValueError, match="at least 1"):
        models.two_layer_head(features, 0)


def test_five_block_cnn_is_the_published_plain_network():
    model = models.five_block_cnn((64, 64), 4)
    # 2×2 kernels: 320 + 16,448 + 32,896 + 131,328 + 524,800; one position left: 131,328 + 32,896 + 516
    assert model.count_params() == 870_532
    assert [model.get_layer(f"block{number}").output.shape[1] for number in range(1, 6)] == [31, 15, 7, 3, 1]
    for number in (1, 2):
        assert float(model.get_layer(f"dense{number}").kernel_regularizer.l2) == pytest.approx(5e-4)
    assert models.five_block_cnn((63, 63), 4).get_layer("block5").output.shape[1] == 1
    with pytest.raises(ValueError, match="at least 63"):
        models.five_block_cnn((62, 64), 4)


def test_classifier_keeps_the_graph_flat_and_shares_the_extractors_weights(rng):
    inputs = keras.Input((8, 8, 1), dtype="uint8", name="image")
    x = keras.layers.Conv2D(3, 3, name="conv")(keras.layers.Rescaling(1 / 255)(inputs))
    features = keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="tiny")
    model = models.classifier(features, 2, dropout=0.5)
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)
    assert model.get_layer("conv") is features.get_layer("conv") and model.name == "tiny"
    probabilities = model.predict(rng.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8), verbose=0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_max_pooled_takes_the_largest_of_each_map_of_the_same_layers(compact, rng):
    features = models.max_pooled(compact)
    pixels = rng.integers(0, 256, (5, 32, 32, 1), dtype=np.uint8)
    maps = keras.Model(compact.input, compact.get_layer("pool").input)(pixels).numpy()
    assert maps.shape == (5, 8, 8, 16) and features.output.shape == (None, 16) and features.name == compact.name
    np.testing.assert_array_equal(features(pixels), maps.max(axis=(1, 2)))
    assert isinstance(features.get_layer("pool"), keras.layers.GlobalMaxPooling2D)
    assert features.get_layer("stem_conv") is compact.get_layer("stem_conv")
    assert "logits" not in {layer.name for layer in features.layers}
    kernel = compact.get_layer("stem_conv").kernel
    before = features(pixels).numpy()
    kernel.assign(kernel * 2)
    changed = features(pixels).numpy()
    kernel.assign(kernel / 2)
    assert (changed != before).any()


def test_max_pooled_of_a_loaded_model_keeps_its_precision_and_round_trips(tmp_path, rng):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        models.compact_cnn((32, 32), 4, filters=(8, 16)).save(tmp_path / "m.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    features = models.max_pooled(keras.saving.load_model(tmp_path / "m.keras"))
    assert features.get_layer("pool").compute_dtype == "float16"
    features.save(tmp_path / "f.keras")
    pixels = rng.integers(0, 256, (5, 32, 32, 1), dtype=np.uint8)
    copy = keras.saving.load_model(tmp_path / "f.keras")
    np.testing.assert_array_equal(copy.predict(pixels, verbose=0), features.predict(pixels, verbose=0))


def test_max_pooled_unfit_models_are_refused(compact):
    with pytest.raises(ValueError, match="has no layer named 'pool'"):
        models.max_pooled(models.five_block_cnn((64, 64), 2))
    with pytest.raises(ValueError, match="a GlobalMaxPooling2D named 'pool'.*expected a GlobalAveragePooling2D"):
        models.max_pooled(models.max_pooled(compact))
    image, age = keras.Input((8, 8, 1)), keras.Input((1,))
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(image)
    with pytest.raises(ValueError, match="has 2 inputs"):
        models.max_pooled(keras.Model([image, age], keras.layers.Concatenate()([pooled, age])))


@pytest.fixture(scope="module")
def members():
    """Three of one network with one name, from different seeds."""
    made = []
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        made.append(models.compact_cnn((16, 12), 1, filters=(4, 8), activation="sigmoid"))
    return made


@pytest.fixture
def pixels(rng):
    return rng.integers(0, 256, (5, 16, 12, 1), dtype=np.uint8)


# Of means in another order, in float32.
CLOSE = {"rtol": 0, "atol": 1e-6}


def test_averaged_is_the_mean_of_the_members_probabilities(members, pixels):
    told = np.stack([member.predict(pixels, verbose=0) for member in members])
    assert np.ptp(told, axis=0).min() > 1e-3 and {member.name for member in members} == {"compact_cnn"}
    model = models.averaged(members)
    got = model.predict(pixels, verbose=0)
    assert got.shape == (5, 1) and got.dtype == np.float32 and model.input.dtype == "uint8"
    np.testing.assert_allclose(got, told.mean(axis=0), **CLOSE)
    np.testing.assert_allclose(models.averaged(members[:1] * 2).predict(pixels, verbose=0), told[0], **CLOSE)


def test_averaged_mirrored_is_the_mean_over_left_right_mirror_images_too(members, pixels):
    flipped = pixels[:, :, ::-1]
    told = [member.predict(x, verbose=0) for member in members for x in (pixels, flipped)]
    assert np.abs(told[0] - told[1]).max() > 1e-3
    model = models.averaged(members, mirrored=True)
    np.testing.assert_allclose(model.predict(pixels, verbose=0), np.mean(told, axis=0), **CLOSE)
    np.testing.assert_allclose(model.predict(flipped, verbose=0), model.predict(pixels, verbose=0), **CLOSE)
    alone = models.averaged(members[:1], mirrored=True)
    np.testing.assert_allclose(alone.predict(pixels, verbose=0), (told[0] + told[1]) / 2, **CLOSE)


def test_averaged_mirrored_of_a_symmetric_image_equals_the_plain(members, pixels):
    symmetric = np.concatenate([pixels[:, :, :6], pixels[:, :, 5::-1]], axis=2)
    plain, mirrored = (models.averaged(members, mirrored=mirrored) for mirrored in (False, True))
    np.testing.assert_allclose(mirrored.predict(symmetric, verbose=0), plain.predict(symmetric, verbose=0), **CLOSE)


def test_averaged_takes_models_whose_one_input_is_a_list(members, pixels):
    listed = [keras.Model([each.input], [each.output]) for each in members]
    told, expected = (models.averaged(each, mirrored=True).predict(pixels, verbose=0) for each in (listed, members))
    np.testing.assert_array_equal(told, expected)


def test_averaged_of_one_member_is_that_member(members):
    assert models.averaged(members[:1]) is members[0]


def test_averaged_round_trips_through_keras_file(members, pixels, tmp_path):
    model = models.averaged(members, mirrored=True)
    model.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(copy.predict(pixels, verbose=0), model.predict(pixels, verbose=0))


def test_averaged_shares_the_members_weights_and_leaves_their_names(members):
    names = [(member.name, [layer.name for layer in member.layers]) for member in members]
    model = models.averaged(members, mirrored=True)
    assert [(member.name, [layer.name for layer in member.layers]) for member in members] == names
    shared = {id(weight) for member in members for weight in member.weights}
    assert {id(weight) for weight in model.weights} == shared and len(model.weights) == len(shared)


def test_averaged_unfit_members_are_refused(members):
    with pytest.raises(ValueError, match="`members` is empty"):
        models.averaged([])
    for other in (models.compact_cnn((16, 16), 1, activation="sigmoid"), models.compact_cnn((16, 12), 2, filters=(4,))):
        with pytest.raises(
            ValueError, match=r"positions \[1\] take and give other shapes.*not \(\(16, 12, 1\), \(1,\)\)"
        ):
            models.averaged([members[0], other])
    image, age = keras.Input((8, 8, 1), dtype="uint8"), keras.Input((1,))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1.0)(image))
    fused = keras.Model([image, age], keras.layers.Concatenate()([pooled, age]), name="fused")
    colour = keras.Input((8, 8, 3), dtype="uint8")
    for odd in (fused, keras.Model(colour, keras.layers.Rescaling(1.0)(colour), name="colour")):
        with pytest.raises(ValueError, match=f"the model '{odd.name}' takes .* expected uint8"):
            models.averaged([odd])
