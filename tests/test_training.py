import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest

from kerasmed import losses, models, pipelines, training


@pytest.fixture(autouse=True)
def with_a_graph(monkeypatch):
    """Short as the trainings of these tests are, TensorFlow does them as it does long ones."""
    monkeypatch.setattr(training, "_STEPS_WORTH_A_GRAPH", 0)


def _setting(rng_seed=0):
    """A tiny task: bright upper or lower half, 48 images, dropout on."""
    rng = np.random.default_rng(rng_seed)
    ids = rng.integers(0, 2, 48)
    pixels = rng.integers(0, 120, (48, 16, 16), dtype=np.uint8)
    pixels[ids == 0, :8] += 60
    pixels[ids == 1, 8:] += 60
    return pixels, np.eye(2, dtype=np.float32)[ids]


def _fit(folder, *, epochs=4, schedule="plateau", seed=0, **options):
    keras.utils.set_random_seed(seed)
    model = models.compact_cnn((16, 16), 2, filters=(4, 8), dropout=0.5)
    pixels, targets = _setting()
    rows = np.arange(36)

    def train(first_epoch):
        return pipelines.training_dataset(pixels, rows, targets[:36], batch_size=8, seed=1, first_epoch=first_epoch)

    valid = pipelines.evaluation_dataset(pixels, np.arange(36, 48), targets[36:])
    options = {
        "loss": losses.WeightedCategoricalCrossentropy(),
        "metrics": [keras.metrics.CategoricalAccuracy(name="accuracy")],
        **options,
    }
    history = training.fit(
        model, train, valid, folder=folder, steps_per_epoch=5, epochs=epochs, schedule=schedule, **options
    )
    return model, history


def _kill_after(monkeypatch, epochs):
    """Make the checkpoint callback end the process, as far as `fit` can tell, once an epoch is written."""
    ended = training._Checkpoint.on_epoch_end

    def end(self, epoch, logs=None):
        ended(self, epoch, logs)
        if epoch + 1 == epochs:
            raise SystemExit("killed")

    monkeypatch.setattr(training._Checkpoint, "on_epoch_end", end)


@pytest.mark.parametrize(("schedule", "killed_after"), [("plateau", 3), ("cosine", 1)])
def test_fit_resumed_equals_undisturbed(tmp_path, monkeypatch, schedule, killed_after):
    options = {"schedule": schedule, "weight_decay": 0.01, "plateau_patience": 1}
    whole, history = _fit(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        _kill_after(patch, killed_after)
        with pytest.raises(SystemExit):
            _fit(tmp_path / "cut", **options)
    assert not (tmp_path / "cut/model.keras").exists()
    # Another seed builds other first weights: all that counts comes from the checkpoint.
    resumed, resumed_history = _fit(tmp_path / "cut", seed=99, **options)
    for one, other in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), resumed_history.drop(columns="seconds"))
    assert not (tmp_path / "cut/checkpoint.npz").exists()


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_fit_resumed_equals_undisturbed_in_half_precision(tmp_path, monkeypatch, precision):
    keras.config.set_dtype_policy(precision)
    try:
        whole, _ = _fit(tmp_path / "whole", epochs=2)
        with monkeypatch.context() as patch:
            _kill_after(patch, 1)
            with pytest.raises(SystemExit):
                _fit(tmp_path / "cut", epochs=2)
        resumed, _ = _fit(tmp_path / "cut", epochs=2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert (
        whole.get_layer("logits").compute_dtype == "float32" and whole.get_layer("stem_conv").compute_dtype != "float32"
    )
    for one, other in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def _f1():
    return {"monitor": "val_f1", "metrics": [losses.F1()], "loss": keras.losses.BinaryCrossentropy(from_logits=True)}


@pytest.mark.parametrize(("schedule", "weight_decay"), [("plateau", 0.0), ("cosine", 0.01)])
def test_fit_resumed_equals_undisturbed_with_sgd_and_highest_f1(tmp_path, monkeypatch, schedule, weight_decay):
    options = {"schedule": schedule, "weight_decay": weight_decay, "epochs": 7, "learning_rate": 0.1}
    options |= {"optimizer": "sgd", "plateau_patience": 1, "stop_patience": 4, **_f1()}
    whole, history = _fit(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        _kill_after(patch, 5)
        with pytest.raises(SystemExit):
            _fit(tmp_path / "cut", **options)
    resumed, resumed_history = _fit(tmp_path / "cut", seed=99, **options)
    assert len(history) > 5
    for one, other in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), resumed_history.drop(columns="seconds"))
    # Killed while it waits for a better one: were the best F1 lost, the sixth epoch would count as better.
    if schedule == "plateau":
        assert history["val_f1"][:5].idxmax() < 4


def test_fit_without_dropouts_seed_state_would_differ(tmp_path, monkeypatch):
    # Guards the test above: leaving the seed state out of the checkpoint must be seen.
    _, whole = _fit(tmp_path / "whole")
    keep = training._variables
    monkeypatch.setattr(training, "_variables", lambda model: [v for v in keep(model) if "seed" not in v.path])
    with monkeypatch.context() as patch:
        _kill_after(patch, 2)
        with pytest.raises(SystemExit):
            _fit(tmp_path / "cut")
    _, resumed = _fit(tmp_path / "cut")
    assert (whole["loss"][:2] == resumed["loss"][:2]).all() and (whole["loss"][2:] != resumed["loss"][2:]).all()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow traces graphs of its own")
def test_fit_of_few_steps_without_a_graph_equals_that_with_one_and_is_resumed(tmp_path, monkeypatch):
    whole, history = _fit(tmp_path / "graph", epochs=2)
    monkeypatch.setattr(training, "_STEPS_WORTH_A_GRAPH", 10)
    seen, compiled = [], keras.Model.compile
    monkeypatch.setattr(keras.Model, "compile", lambda *a, **k: seen.append(k["run_eagerly"]) or compiled(*a, **k))
    eager, eager_history = _fit(tmp_path / "eager", epochs=2)
    with monkeypatch.context() as patch:
        _kill_after(patch, 1)
        with pytest.raises(SystemExit):
            _fit(tmp_path / "cut", epochs=2)
    resumed, _ = _fit(tmp_path / "cut", epochs=2)
    assert seen == [True] * 3 and not training._is_short(eager, 11, "auto") and not training._is_short(eager, 1, True)
    for one, other in zip(eager.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    # Float32 sums in another order: Adam's first steps go by the sign of a gradient, however small that is.
    np.testing.assert_allclose(eager_history["loss"], history["loss"], rtol=1e-4)
    assert [weight.shape for weight in eager.get_weights()] == [weight.shape for weight in whole.get_weights()]


def test_fit_killed_after_the_stop_does_not_train_on(tmp_path, monkeypatch):
    options = {"epochs": 12, "stop_patience": 1, "learning_rate": 0.05}
    whole, history = _fit(tmp_path / "whole", **options)
    assert len(history) < 12
    with monkeypatch.context() as patch:
        _kill_after(patch, len(history))
        with pytest.raises(SystemExit):
            _fit(tmp_path / "cut", **options)
    resumed, resumed_history = _fit(tmp_path / "cut", **options)
    assert len(resumed_history) == len(history)
    for one, other in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_fit_keeps_the_best_epochs_weights_and_saves_them(tmp_path):
    model, history = _fit(tmp_path, epochs=6)
    pixels, targets = _setting()
    probabilities = model.predict(pixels[36:, ..., None], verbose=0)
    loss = -np.log((probabilities * targets[36:]).sum(axis=1)).mean()
    assert loss == pytest.approx(history["val_loss"].min(), rel=1e-4)
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        reloaded.predict(pixels[..., None], verbose=0)[36:], model.predict(pixels[..., None], verbose=0)[36:]
    )


def test_fit_keeps_the_epoch_of_highest_f1_and_says_so(tmp_path, capsys):
    options = {"optimizer": "sgd", "learning_rate": 0.1, "plateau_patience": 1}
    model, history = _fit(tmp_path, epochs=8, **options, **_f1())
    best = history["val_f1"].idxmax()
    # Otherwise the loss would have chosen the same epoch, and the test would show nothing.
    assert best != history["val_loss"].idxmin() and best + 1 != len(history)
    pixels, targets = _setting()
    trained = keras.Model(model.input, model.get_layer("logits").output)
    logits = trained.predict(pixels[36:, ..., None], verbose=0)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)(targets[36:], logits)
    assert float(loss) == pytest.approx(history["val_loss"][best], rel=1e-4)
    f1 = losses.F1()
    f1.update_state(targets[36:], logits)
    assert float(f1.result()) == pytest.approx(history["val_f1"].max(), rel=1e-6)
    assert f"(best val_f1 {history['val_f1'].max():.3f} in epoch {best + 1};" in capsys.readouterr().out


def test_fit_metric_of_an_earlier_training_begins_anew(tmp_path):
    metrics = _f1()
    histories = [_fit(tmp_path / name, epochs=1, **metrics)[1] for name in ("first", "second")]
    pd.testing.assert_frame_equal(*(history.drop(columns="seconds") for history in histories))


def test_fit_monitors_an_error_for_its_lowest_value(tmp_path, capsys):
    error = keras.metrics.CategoricalCrossentropy(from_logits=True, name="entropy")
    _, history = _fit(tmp_path, epochs=3, monitor="val_entropy", metrics=[error], learning_rate=0.01)
    lowest = history["val_entropy"].idxmin()
    assert lowest != history["val_entropy"].idxmax()
    assert f"(best val_entropy {history['val_entropy'].min():.3f} in epoch {lowest + 1};" in capsys.readouterr().out


def test_fit_finished_folder_is_only_loaded(tmp_path, monkeypatch):
    model, history = _fit(tmp_path, epochs=2)
    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("trained again"))
    again, same = _fit(tmp_path, epochs=2, seed=5)
    np.testing.assert_array_equal(again.get_weights()[0], model.get_weights()[0])
    pd.testing.assert_frame_equal(history, same)


def test_fit_plateau_lowers_the_rate(tmp_path):
    _, history = _fit(tmp_path, epochs=8, learning_rate=0.5, plateau_patience=1, stop_patience=8)
    rates = history["learning_rate"].unique()
    assert len(rates) > 1
    np.testing.assert_allclose(rates[1] / rates[0], 0.2, rtol=1e-5)


def test_fit_checkpoint_of_another_architecture_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _kill_after(patch, 1)
        with pytest.raises(SystemExit):
            _fit(tmp_path)
    with pytest.raises(ValueError, match="another architecture or optimizer"):
        _fit(tmp_path, schedule="cosine", weight_decay=0.1, epochs=3)


def test_fit_checkpoint_of_another_optimizer_or_monitor_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _kill_after(patch, 1)
        with pytest.raises(SystemExit):
            _fit(tmp_path)
    with pytest.raises(ValueError, match="another architecture or optimizer"):
        _fit(tmp_path, optimizer="sgd")
    with pytest.raises(ValueError, match="written with monitor 'val_loss', this call has 'val_accuracy'"):
        _fit(tmp_path, monitor="val_accuracy")


@pytest.mark.parametrize("monitor", ["val_f1", "accuracy", "val_acc"])
def test_fit_monitor_that_no_epoch_logs_is_refused_before_training(tmp_path, monitor):
    with pytest.raises(ValueError, match=f"'{monitor}', which no epoch logs; expected one of val_loss, val_accuracy"):
        _fit(tmp_path / "new", monitor=monitor)
    assert not (tmp_path / "new").exists()


def test_fit_infinite_loss_is_an_error_that_names_the_rate(tmp_path):
    with pytest.raises(FloatingPointError, match="lower `learning_rate`"):
        _fit(tmp_path, learning_rate=1e30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "warm"}, "'warm'"),
        ({"epochs": 0}, "at least 1"),
        ({"optimizer": "rmsprop"}, "'rmsprop'; expected one of adam, sgd"),
    ],
)
def test_fit_unfit_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _fit(tmp_path, **options)


# --- sample weights --------------------------------------------------------------------------------------------------


def _fit_weighted(folder, *, y_valid=None, **options):
    """Train a dense model on one yes-or-no label in two groups, weighted by the training images' table."""
    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 1), dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image))
    x = keras.layers.Dropout(0.3)(x)
    logits = keras.layers.Dense(1, kernel_initializer="zeros", name="logits")(x)
    model = keras.Model(image, keras.layers.Activation("sigmoid")(logits))
    pixels, one_hot = _setting()
    y, groups = one_hot[:, 1].copy(), np.arange(48) % 3 == 0
    if y_valid is not None:
        y[36:] = y_valid(y[36:])
    table = losses.group_weights(y[:36], groups[:36])
    weights = losses.sample_weights(y, groups, table)

    def train(first_epoch):
        return pipelines.training_dataset(
            pixels, np.arange(36), y[:36, None], batch_size=8, seed=1, first_epoch=first_epoch, weights=weights[:36]
        )

    valid = pipelines.evaluation_dataset(pixels, np.arange(36, 48), y[36:, None], batch_size=5, weights=weights[36:])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    metrics = [losses.BrierScore(), keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")]
    options = {"steps_per_epoch": 5, "epochs": 2, "metrics": metrics, **options}
    history = training.fit(model, train, valid, folder=folder, loss=loss, **options)
    return model, history, (pixels[36:, ..., None], y[36:], weights[36:])


def test_fit_with_sample_weights_weighs_the_loss_over_images_and_not_the_metrics(tmp_path):
    model, history, (pixels, y, weights) = _fit_weighted(tmp_path)
    p = model.predict(pixels, verbose=0)[:, 0].astype("float64")
    bce = -np.where(y == 1, np.log(p), np.log(1 - p))
    kept = history[history["kept"]].iloc[0]
    assert kept["val_loss"] == pytest.approx((weights * bce).sum() / 12, abs=1e-5)
    # What else it might have been is far from it.
    assert len(np.unique(weights)) == 4
    for other in (bce.mean(), (weights * bce).sum() / weights.sum()):
        assert abs(kept["val_loss"] - other) > 0.01
    squared = (y - p) ** 2
    assert kept["val_mse"] == pytest.approx(squared.mean(), abs=1e-6)
    assert abs((weights * squared).sum() / weights.sum() - squared.mean()) > 1e-3
    assert kept["val_accuracy"] == pytest.approx(((p > 0.5) == y).mean(), abs=1e-6)


def test_fit_monitors_the_brier_score_for_its_lowest_value(tmp_path, capsys):
    _, history, _ = _fit_weighted(tmp_path, monitor="val_mse", epochs=3)
    lowest = history["val_mse"].idxmin()
    assert history["kept"].idxmax() == lowest != history["val_mse"].idxmax()
    assert f"(best val_mse {history['val_mse'].min():.3f} in epoch {lowest + 1};" in capsys.readouterr().out


@pytest.mark.parametrize("killed_after", [2, 3])
def test_fit_with_sample_weights_divides_the_rate_by_ten_on_a_plateau_also_when_resumed(
    tmp_path, monkeypatch, killed_after
):
    # Validation labels the wrong way round: what training learns makes their loss rise from the second epoch on.
    options = {"y_valid": lambda y: 1 - y, "epochs": 5, "learning_rate": 1e-4, "stop_patience": 9}
    options |= {"plateau_factor": 0.1, "plateau_patience": 1}
    whole, history, _ = _fit_weighted(tmp_path / "whole", **options)
    np.testing.assert_allclose(history["learning_rate"], [1e-4, 1e-4, 1e-5, 1e-6, 1e-7], rtol=1e-5)
    written = pd.read_csv(tmp_path / "whole/history.csv")
    np.testing.assert_array_equal(written["learning_rate"], history["learning_rate"])
    with monkeypatch.context() as patch:
        _kill_after(patch, killed_after)
        with pytest.raises(SystemExit):
            _fit_weighted(tmp_path / "cut", **options)
    resumed, resumed_history, _ = _fit_weighted(tmp_path / "cut", **options)
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), resumed_history.drop(columns="seconds"))
    for one, other in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("losses_", "kept"), [((0.9, 0.4), "all"), ((0.5, 0.7), "head")])
def test_fit_stages_goes_on_from_the_stage_before_and_keeps_the_best(tmp_path, losses_, kept):
    model = models.compact_cnn((16, 16), 2, filters=(16, 16))
    planned = [training.Stage("head", "head", 2, 0.1), training.Stage("all", "all", 1, 0.01)]
    told = dict(zip(("run-head", "run-all"), losses_))
    seen = []

    def fit_one(*, folder, epochs, learning_rate):
        seen.append((folder.name, epochs, learning_rate, model.get_layer("stem_conv").trainable))
        bias = model.get_layer("logits").bias
        bias.assign(bias + 1)  # tells the stages apart, and that the second goes on from the first
        rows = {
            "epoch": np.arange(1, epochs + 1),
            "val_loss": told[folder.name],
            "kept": np.arange(epochs) == epochs - 1,
        }
        pd.DataFrame(rows).to_csv(folder / "history.csv", index=False)
        model.save(folder / "model.keras")

    history = training.fit_stages(model, planned, fit_one, network="compact", folder=tmp_path / "run")
    assert seen == [("run-head", 2, 0.1, False), ("run-all", 1, 0.01, True)]
    assert history["epoch"].tolist() == [1, 2, 3] and history["stage"].tolist() == ["head", "head", "all"]
    assert history["kept"].tolist() == [False, kept == "head", kept == "all"]
    pd.testing.assert_frame_equal(history, pd.read_csv(tmp_path / "run/history.csv"))
    saved = keras.saving.load_model(tmp_path / "run/model.keras")
    for each in (model, saved):
        np.testing.assert_array_equal(each.get_layer("logits").bias, {"head": 1, "all": 2}[kept])


def test_fit_stages_of_one_stage_trains_in_the_folder_itself(tmp_path):
    model = models.compact_cnn((16, 16), 2, filters=(16, 16))

    def fit_one(*, folder, **_):
        pd.DataFrame({"epoch": [1], "val_loss": [0.5], "kept": [True]}).to_csv(folder / "history.csv", index=False)

    stage = training.Stage("all", "all", 1, 0.1)
    history = training.fit_stages(model, [stage], fit_one, network="compact", folder=tmp_path / "run")
    assert history.columns.tolist() == ["epoch", "val_loss", "kept"] and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_fit_with_a_damaged_checkpoint_begins_anew_and_says_so(tmp_path, monkeypatch, caplog):
    whole, history = _fit(tmp_path / "whole", epochs=2)
    with monkeypatch.context() as patch:
        _kill_after(patch, 1)
        with pytest.raises(SystemExit):
            _fit(tmp_path / "killed", epochs=2)
    content = (tmp_path / "killed/checkpoint.npz").read_bytes()
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    for name, damaged in {"flipped": flipped, "cut": content[:-100], "empty": b""}.items():
        shutil.copytree(tmp_path / "killed", tmp_path / name)
        path = tmp_path / name / "checkpoint.npz"
        path.write_bytes(damaged)
        again, _ = _fit(tmp_path / name, epochs=2)
        assert f"{path} is damaged" in caplog.text and "this training begins anew" in caplog.text
        for one, other in zip(whole.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
        caplog.clear()


def test_fit_with_a_cut_model_trains_again(tmp_path, caplog):
    whole, history = _fit(tmp_path, epochs=1)
    path = tmp_path / "model.keras"
    path.write_bytes(path.read_bytes()[:-100])
    again, same = _fit(tmp_path, epochs=1)
    assert f"{path} is damaged" in caplog.text
    np.testing.assert_array_equal(whole.get_weights()[0], again.get_weights()[0])
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), same.drop(columns="seconds"))


def _nesting(dropout=0.5):
    """A network whose trunk, with batch normalisation and dropout, is a model of its own."""
    trunk = models.compact_cnn((16, 16), 2, filters=(4,), dropout=dropout)
    trunk = keras.Model(trunk.inputs, trunk.get_layer("logits").input, name="trunk")
    inputs = keras.Input((16, 16, 1), dtype="uint8", name="image")
    logits = keras.layers.Dense(2, name="logits")(trunk(inputs))
    return keras.Model(inputs, keras.layers.Softmax()(logits))


def test_statistics_of_whole_batches_are_those_of_nested_models_too():
    model = _nesting()
    norms = [one for one in model.get_layer("trunk").layers if isinstance(one, keras.layers.BatchNormalization)]
    shared = SimpleNamespace(
        distribute_strategy=SimpleNamespace(num_replicas_in_sync=2), _flatten_layers=model._flatten_layers
    )
    with training._statistics_of_whole_batches(shared):
        assert norms and all(norm.synchronized for norm in norms)
    assert not any(norm.synchronized for norm in norms)


def test_fit_with_pytorch_seeds_dropout_of_nested_models_too(tmp_path, monkeypatch):
    model = _nesting()
    (dropout,) = [one for one in model.get_layer("trunk").layers if isinstance(one, keras.layers.Dropout)]
    assert dropout.seed_generator._initial_seed is None
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    monkeypatch.setattr(training, "_Checkpoint", lambda *_: 1 / 0)  # nothing is trained
    with pytest.raises(ZeroDivisionError):
        training.fit(
            model, None, None, folder=tmp_path, steps_per_epoch=1, epochs=1, loss="categorical_crossentropy", metrics=[]
        )
    assert dropout.seed_generator._initial_seed == 0
