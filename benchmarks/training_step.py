"""A training step through `training.fit`, against `keras.Model.fit`.

The whole call of both, over its steps: three epochs of 2,048 made-up images of 64×64 and one validation of 256 after
each, by the compact network with Adam. Both train the same logits from the same weights on the same batches, made the
same way from arrays in memory, and trace their step anew, as a first call does. Ours also writes a checkpoint and the
history after each epoch and the model at the end. Keras is given `optimizer.build`, without which it traces the step
twice, and no callbacks and no output, so that nothing but training is left. The datasets of both are without tf.data's
autotuner, which else may hold up either for seconds where an iterator ends. The losses of all epochs must be equal.
"""

import contextlib
import io
import itertools
import tempfile
from pathlib import Path

import keras
import measure
import numpy as np
import tensorflow as tf

from kerasmed import models, training

SIDE, CLASSES, BATCH, STEPS, EPOCHS, VALID, ROUNDS = 64, 4, 32, 64, 3, 256, 5
RATE = 1e-3


def images(count, seed):
    """Noise whose brightness hints at the class: losses stay far from 0."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, CLASSES, count)
    brightness = (40 * classes + rng.normal(0, 25, count))[:, None, None, None]
    pixels = np.clip(brightness + rng.normal(70, 20, (count, SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
    return pixels, np.eye(CLASSES, dtype=np.float32)[classes]


def network():
    """Build the network, of the same weights and seeds every time."""
    keras.utils.set_random_seed(0)
    return models.compact_cnn((SIDE, SIDE), CLASSES)


def asked():
    """Loss and metrics of the logits."""
    return {
        "loss": keras.losses.CategoricalCrossentropy(from_logits=True),
        "metrics": [keras.metrics.CategoricalAccuracy(name="accuracy")],
    }


def run():
    train, valid = (tf.data.Dataset.from_tensor_slices(images(*each)) for each in ((BATCH * STEPS, 1), (VALID, 2)))
    untuned = tf.data.Options()
    untuned.autotune.enabled = False
    train, valid = (each.batch(BATCH).prefetch(2).with_options(untuned) for each in (train.repeat(), valid))
    numbers, losses = itertools.count(), {}
    # Building them is no part of a training.
    networks = [network() for _ in range(2 * (ROUNDS + 1))]

    with tempfile.TemporaryDirectory() as temporary:

        def ours():
            folder, options = Path(temporary) / f"{next(numbers)}", {"epochs": EPOCHS, "steps_per_epoch": STEPS}
            options |= {"learning_rate": RATE, "schedule": "constant"} | asked()
            with contextlib.redirect_stdout(io.StringIO()):
                history = training.fit(networks.pop(), lambda first_epoch: train, valid, folder=folder, **options)
            losses["ours"] = history[["loss", "val_loss"]].to_numpy()

        def keras_fit():
            model = networks.pop()
            logits = keras.Model(model.inputs, model.get_layer("logits").output)
            logits.compile(keras.optimizers.Adam(RATE), **asked())
            logits.optimizer.build(logits.trainable_variables)
            options = {"epochs": EPOCHS, "steps_per_epoch": STEPS, "shuffle": False, "verbose": 0}
            history = logits.fit(train, validation_data=valid, **options).history
            losses["keras"] = np.stack([history["loss"], history["val_loss"]], axis=-1)

        ours(), keras_fit()
        # float32 sums in another order, where threads make them, over 192 steps; another batch, rate or seed differs
        # by percents.
        if not np.allclose(losses["ours"], losses["keras"], rtol=1e-3, atol=0):
            raise AssertionError(f"losses differ: {losses}.")
        seconds = measure.rounds({"ours": ours, "keras": keras_fit}, count=ROUNDS, warm=0)

    yield measure.shorter(
        "Training step, training.fit / keras.Model.fit",
        [each / (STEPS * EPOCHS) for each in seconds["ours"]],
        [each / (STEPS * EPOCHS) for each in seconds["keras"]],
        at_most=1.03,
        checked="losses and validation losses of all epochs equal to 0.001",
    )


if __name__ == "__main__":
    measure.main(run)
