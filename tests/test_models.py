import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from kerasmed import losses, models
from tests import gradients


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
    assert float(convert_to_numpy(scaled[0]).max()) == -1 and float(convert_to_numpy(scaled[1]).min()) == 1


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
    logits, probabilities = (convert_to_numpy(part) for part in parts(np.float16(rng.normal(size=(4, 5)))))
    assert probabilities.shape == (4, 3)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)  # float32


def test_label_head_of_two_scores_is_a_softmax_over_each_pair_with_its_cross_entropy(rng):
    features = keras.Input((5,))
    probabilities = models.label_head(features, 3, loss="categorical")
    model = keras.Model(features, probabilities)
    names = ("scores_absent", "scores_present", "logits")
    parts = keras.Model(features, [*(model.get_layer(name).output for name in names), probabilities])
    # Scores of up to some 10, where a probability rounds to 0 or 1 but a logit does not.
    absent, present, logits, got = (convert_to_numpy(part) for part in parts(np.float32(rng.normal(0, 5, (64, 5)))))
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
    logits, probabilities = (convert_to_numpy(part) for part in parts(np.float16(rng.normal(size=(4, 5)))))
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
    maps = convert_to_numpy(keras.Model(compact.input, compact.get_layer("pool").input)(pixels))
    assert maps.shape == (5, 8, 8, 16) and features.output.shape == (None, 16) and features.name == compact.name
    np.testing.assert_array_equal(features(pixels), maps.max(axis=(1, 2)))
    assert isinstance(features.get_layer("pool"), keras.layers.GlobalMaxPooling2D)
    assert features.get_layer("stem_conv") is compact.get_layer("stem_conv")
    assert "logits" not in {layer.name for layer in features.layers}
    kernel = compact.get_layer("stem_conv").kernel
    before = convert_to_numpy(features(pixels))
    kernel.assign(kernel * 2)
    changed = convert_to_numpy(features(pixels))
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


# --- slices and attention --------------------------------------------------------------------------------------------

BRANCHES = {"canal": 2, "foraminal": 3}


def _batch(rng, num_rows=6, num_slices=4, num_features=5):
    """Inputs by name: rows of 0 to `num_slices` slices, NaN where there is none."""
    batch = {}
    for offset, branch in enumerate(BRANCHES):
        mask = np.arange(num_slices) < (np.arange(num_rows) + offset)[:, None] % (num_slices + 1)
        slices = rng.normal(size=(num_rows, num_slices, num_features))
        batch[f"{branch}_slices"] = np.where(mask[..., None], slices, np.nan).astype("float32")
        batch[f"{branch}_mask"] = mask
    return batch


@pytest.fixture
def attention():
    keras.utils.set_random_seed(0)
    return models.attention_classifier(BRANCHES, 4, 5, width=8, units=6)


def test_attention_classifier_gives_grades_of_all_targets_in_order(attention, rng):
    batch = _batch(rng)
    probabilities = attention.predict(batch, verbose=0)
    assert probabilities.shape == (6, 5, 3) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-6)
    assert [tensor.name for tensor in attention.inputs] == [
        f"{branch}_{part}" for branch in BRANCHES for part in ("slices", "mask")
    ]
    listed = attention.predict([batch[tensor.name] for tensor in attention.inputs], verbose=0)
    np.testing.assert_array_equal(listed, probabilities)
    for dtype in ("float32", "int64"):
        numbers = {name: each.astype(dtype) if "mask" in name else each for name, each in batch.items()}
        np.testing.assert_array_equal(attention.predict(numbers, verbose=0), probabilities)


def test_attention_classifier_weights_by_hand():
    # A branch: 2 · 5 of the norm, 5 · 8 + 8, V and U of 8 · 6 each and w of 6, and 8 · 3 + 3 for each target.
    branch = 2 * 5 + 5 * 8 + 8 + 2 * 8 * 6 + 6
    model = models.attention_classifier(BRANCHES, 4, 5, width=8, units=6)
    assert model.count_params() == 2 * branch + (2 + 3) * 27
    assert models.attention_classifier({"canal": 1}, 4, 5, num_grades=2, width=8, units=6).count_params() == branch + 18


def test_attention_classifier_branches_share_nothing(attention, rng):
    batch = _batch(rng)
    before = attention.predict(batch, verbose=0)
    other = batch | {"canal_slices": batch["canal_slices"] + rng.normal(size=(6, 4, 5)).astype("float32")}
    after = attention.predict(other, verbose=0)
    np.testing.assert_array_equal(after[:, 2:], before[:, 2:])
    there = batch["canal_mask"].any(axis=1)
    assert (np.abs(after[there, :2] - before[there, :2]).max(axis=(1, 2)) > 1e-3).all()
    np.testing.assert_array_equal(after[~there, :2], before[~there, :2])


def test_attention_classifier_values_that_are_masked_change_no_bit_of_output_and_gradients(attention, rng):
    batch, y = _batch(rng), rng.integers(0, 3, (6, 5)).astype("float32")
    y[0, 1], y[3] = np.nan, np.nan
    logits = keras.Model(attention.inputs, attention.get_layer("logits").output)
    counted, results = losses.GradedCrossentropy((1, 2, 4)), []
    for odd in (np.nan, 0, 1e30):
        filled = {name: np.nan_to_num(each, nan=odd) if "slices" in name else each for name, each in batch.items()}
        loss, found = gradients.of(
            lambda filled=filled: counted(y, logits(filled, training=False)), variables=attention.trainable_variables
        )
        results.append([loss, *found])
    for result in results:
        assert np.isfinite(result[0]) and all(np.abs(gradient).max() > 0 for gradient in result[1:])
        for got, expected in zip(result, results[0]):
            np.testing.assert_array_equal(got, expected)


def test_attention_classifier_learns_which_slice_tells(rng):
    # The grade stands in one slice of five, the one that is marked; the others tell of other grades.
    grades, marked = rng.integers(0, 3, 400), rng.integers(0, 5, 400)
    slices = np.float32(rng.normal(0, 0.3, (400, 6, 6)))
    told = rng.integers(0, 3, (400, 5))
    told[np.arange(400), marked] = grades
    slices[:, :5, :3] += np.eye(3)[told]
    slices[np.arange(400), marked, 3] += 2
    mask = np.arange(6) < np.full((400, 1), 5)
    slices[~mask] = np.nan
    keras.utils.set_random_seed(0)
    model = models.attention_classifier({"canal": 1}, 6, 6, width=16, units=8, dropout=0.1)
    trained = keras.Model(model.inputs, model.get_layer("logits").output)
    trained.compile(keras.optimizers.Adam(0.02), losses.GradedCrossentropy())
    inputs = {"canal_slices": slices, "canal_mask": mask}
    trained.fit(inputs, np.float32(grades[:, None]), batch_size=50, epochs=20, verbose=0)
    right = model.predict(inputs, verbose=0)[:, 0].argmax(axis=-1) == grades
    assert right.mean() > 0.9  # the mean over slices tells about half
    _, weights = models.attention_parts(model, "canal").predict(inputs, verbose=0)
    assert weights[np.arange(400), marked].mean() > 0.6 and (weights[:, 5] == 0).all()


def test_attention_parts_are_what_the_branch_goes_on_with(attention, rng):
    batch = _batch(rng)
    parts = models.attention_parts(attention, "foraminal")
    pooled, weights = parts.predict({name: batch[name] for name in ("foraminal_slices", "foraminal_mask")}, verbose=0)
    assert pooled.shape == (6, 8) and weights.shape == (6, 4)
    mask = batch["foraminal_mask"]
    np.testing.assert_allclose(weights.sum(axis=1), mask.any(axis=1), atol=1e-6)
    assert (weights[~mask] == 0).all()
    kernel, bias = attention.get_layer("foraminal_scores").get_weights()
    logits = (pooled @ kernel + bias).reshape(6, 3, 3)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(attention.predict(batch, verbose=0)[:, 2:], probabilities, atol=1e-6)


def test_attention_parts_of_an_unknown_branch_are_refused(attention):
    with pytest.raises(ValueError, match=r"no branch 'subarticular'; expected .* \['canal', 'foraminal'\]"):
        models.attention_parts(attention, "subarticular")


def test_attention_classifier_round_trips_through_keras_file(attention, tmp_path, rng):
    batch = _batch(rng)
    attention.save(tmp_path / "m.keras")
    copy = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(copy.predict(batch, verbose=0), attention.predict(batch, verbose=0))
    inputs = [batch["canal_slices"], batch["canal_mask"]]
    for got, expected in zip(*(models.attention_parts(each, "canal")(inputs) for each in (copy, attention))):
        np.testing.assert_array_equal(got, expected)


def test_attention_classifier_under_mixed_precision_ends_in_float32(rng):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = models.attention_classifier(BRANCHES, 4, 5, width=8)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("canal_embed").compute_dtype == "float16" and model.output.dtype == "float32"
    assert model.get_layer("logits").output.dtype == "float32" and model.inputs[0].dtype == "float32"
    np.testing.assert_allclose(model.predict(_batch(rng), verbose=0).sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (({}, 4, 5), {}, "`branches` are {}"),
        (({"canal": 2, "a/b": 1}, 4, 5), {}, r"First unfit: \['a/b'\]"),
        (({"canal": 0}, 4, 5), {}, r"First unfit: \['canal'\]"),
        (({"canal": 1}, 0, 5), {}, "`num_slices` is 0"),
        (({"canal": 1}, 4, 5), {"num_grades": 1}, "`num_grades` is 1"),
    ],
)
def test_attention_classifier_unfit_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        models.attention_classifier(*arguments, **options)


def test_attention_classifier_with_moments_standardises_each_feature_and_round_trips(tmp_path):
    moments = {"canal": (np.array([1.0, -2.0]), np.array([4.0, 0.25]))}
    model = models.attention_classifier({"canal": 2, "foraminal": 1}, 3, 2, width=4, units=2, moments=moments)
    standardised = model.get_layer("canal_norm")(np.array([[[3.0, -1.5]]], np.float32))
    np.testing.assert_allclose(standardised, [[[0.5**0.5, 0.5**0.5]]], rtol=1e-6)  # one deviation each, over √2
    assert isinstance(model.get_layer("foraminal_norm"), keras.layers.LayerNormalization)
    rng = np.random.default_rng(0)
    inputs = {f"{name}_slices": rng.normal(size=(2, 3, 2)).astype(np.float32) for name in ("canal", "foraminal")}
    inputs |= {f"{name}_mask": np.array([[1, 1, 0], [1, 0, 0]], bool) for name in ("canal", "foraminal")}
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(again.predict(inputs, verbose=0), model.predict(inputs, verbose=0))


@pytest.mark.parametrize("competing", [True, False])
def test_attention_branch_is_the_classifiers_with_slices_that_compete_or_not(competing, attention, rng):
    slices, mask = keras.Input((4, 5), name="slices"), keras.Input((4,), dtype="bool", name="mask")
    parts = models.attention_branch(slices, mask, "canal", width=8, units=6, dropout=0.25, competing=competing)
    branch = keras.Model([slices, mask], list(parts))
    names = [layer.name for layer in branch.layers if layer.name.startswith("canal_")]
    assert names == ["canal_norm", "canal_thinned", "canal_embed", "canal_pooled"]
    batch = _batch(rng)
    inputs = [batch["canal_slices"], batch["canal_mask"]]
    taken = models.attention_parts(attention, "canal")
    branch.set_weights([each for name in names for each in attention.get_layer(name).get_weights()])
    pooled, weights = (convert_to_numpy(part) for part in branch(inputs))
    for got, expected in zip((pooled, weights), taken(inputs)):
        assert np.array_equal(got, expected) == competing
    there = batch["canal_mask"]
    if not competing:  # the same scores, each by itself: odds w K / (1 - w K) stand as the softmax's weights do
        scaled = weights[there] * np.broadcast_to(there.sum(axis=1, keepdims=True), there.shape)[there]
        odds = np.zeros(there.shape)
        odds[there] = scaled / (1 - scaled)
        sums = np.maximum(odds.sum(axis=1, keepdims=True), 1e-12)
        np.testing.assert_allclose(odds / sums, taken(inputs)[1], rtol=1e-5)
    assert pooled.shape == (6, 8) and (weights[~there] == 0).all() and (pooled[~there.any(axis=1)] == 0).all()


def test_attention_branch_with_moments_takes_the_length_of_its_own_slices():
    slices, mask = keras.Input((3, 2)), keras.Input((3,), dtype="bool")
    moments = (np.array([1.0, -2.0]), np.array([4.0, 0.25]))
    embedding, _ = models.attention_branch(slices, mask, "t1", width=4, units=2, dropout=0.0, moments=moments)
    model = keras.Model([slices, mask], embedding)
    kernel, score = np.float32([[1, 0, -1, 0], [0, 1, 0, 0]]), np.zeros((2, 1))
    model.get_layer("t1_embed").set_weights([kernel, np.zeros(4)])
    model.get_layer("t1_pooled").set_weights([np.zeros((4, 2)), np.zeros((4, 2)), score])
    # One deviation above the mean and two, over √2; the third place, out of the mask, has nothing in it.
    batch = [np.float32([[[3, -1.5], [5, -1], [np.nan, 9]]]), np.array([[True, True, False]])]
    np.testing.assert_allclose(model(batch), [[1.5 / 2**0.5, 1.5 / 2**0.5, 0, 0]], rtol=1e-6)
