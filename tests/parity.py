"""What the package computes under one Keras backend, for `test_backends` to compare: `python -m tests.parity FOLDER`.

TensorFlow writes models of random weights and their inputs into the folder; the others load them. Each writes outputs,
Grad-CAM maps, losses and gradients as `<backend>.npz`.
"""

import sys
from pathlib import Path

import keras
import numpy as np

from kerasmed import backbones, fusion, gradcam, losses, medicalnet, modalities, models, scan_networks
from tests import gradients

# Model -> layers to explain; None for the one that is taken unasked.
EXPLAINED = {
    "compact": (None, "block4_a_relu"),  # which the shortcut passes around
    "cnn5": (None,),
    "fused": (None,),
}
LOSSES = {
    "categorical": (losses.WeightedCategoricalCrossentropy([1.0, 2.0, 0.5], focusing=2.0), (4, 3)),
    "binary": (losses.WeightedBinaryCrossentropy([0.9, 0.8, 0.5], [0.1, 0.2, 0.5], focusing=1.0), (4, 3)),
    "graded": (losses.GradedCrossentropy([1.0, 2.0, 4.0]), (4, 5, 3)),
}


def _write(folder):
    """Write models of random weights, with what each takes."""
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)

    def add(name, model, **inputs):
        for layer in model.layers:  # moving averages unlike a batch's, as after a training
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.moving_mean.assign(rng.normal(0, 0.2, layer.moving_mean.shape))
                layer.moving_variance.assign(rng.uniform(0.5, 2, layer.moving_variance.shape))
        model.save(folder / f"{name}.keras")
        np.savez(folder / f"{name}-inputs.npz", **inputs)

    _add_of_images(add, rng)
    _add_of_vectors(add, rng)


def _add_of_images(add, rng):
    def pixels(*shape):
        return rng.integers(0, 256, (3, *shape, 1), dtype=np.uint8)

    add("compact", models.compact_cnn((64, 64), 4, filters=(4, 8, 8, 8)), image=pixels(64, 64))
    for name in ("cnn2", "cnn5", "lstm", "fcnn2"):
        add(name, scan_networks.build(name, (32, 32), 3), image=pixels(32, 32))
    for name in ("DenseNet121", "EfficientNetB0"):
        features = backbones.build(name, (32, 32), weights="none")[0]
        add(name, models.classifier(features, 3), image=pixels(32, 32))
    patient = np.float32([[40, 1, np.nan], [np.nan] * 3, [70, 0, 5]])
    features = models.max_pooled(backbones.build("MobileNetV2", (64, 64), weights="none")[0])
    fused = fusion.fused_classifier(features, 4, means=[50, 0.5, 4], scales=[10, 1, 2], residual=True, units=16)
    add("fused", fused, image=pixels(64, 64), patient=patient)
    add("medicalnet10", medicalnet.build(10, (8, 32, 32, 1), pool="all"), volume=pixels(8, 32, 32))


def _add_of_vectors(add, rng):
    slices, mask = rng.normal(0, 1, (3, 3, 6, 8)).astype(np.float32), rng.random((3, 3, 6)) < 0.6
    mask[1, 0] = False  # a modality that is missing
    available = mask.any(axis=-1)
    slices[~mask] = np.nan
    bag = {"canal_slices": slices[:, 1], "canal_mask": mask[:, 1]}
    add("attention", models.attention_classifier({"canal": 2}, 6, 8, width=8, units=4), **bag)
    sizes = {"width": 8, "attention_units": 4, "units": 8}
    for architecture, strategy in zip((*modalities.ARCHITECTURES, "joint"), modalities.STRATEGIES, strict=True):
        options = {"architecture": architecture, "strategy": strategy, **sizes}
        model = modalities.graded_fusion({"a": 2, "b": 1}, ("t1", "t2", "axial"), 6, 8, **options)
        add(model.name, model, slices=slices, slice_mask=mask, available=available)


def main(folder):
    backend = keras.backend.backend()
    if backend == "tensorflow":
        _write(folder)
    found, rng = {}, np.random.default_rng(1)
    for path in sorted(folder.glob("*.keras")):
        model, name = keras.saving.load_model(path), path.stem
        inputs = dict(np.load(folder / f"{name}-inputs.npz"))
        found[name] = model.predict(inputs if len(inputs) > 1 else next(iter(inputs.values())), verbose=0)
        beside = {key: values for key, values in inputs.items() if key != "image"}
        for layer in EXPLAINED.get(name, ()):
            maps = gradcam.build(model, layer=layer)(inputs["image"], 1, beside=beside, batch_size=2)
            found[f"{name} {layer} maps"], found[f"{name} {layer} told"] = maps.heat, maps.probabilities
        if "slices" in inputs:  # gradients of weights as in a training, but without what it draws
            found[f"{name} gradients"] = _of_weights(model, inputs)
    for name, (loss, shape) in LOSSES.items():
        logits = rng.normal(0, 3, shape).astype(np.float32)
        y = np.eye(3, dtype=np.float32)[[0, 2, 1, 1]] if name != "graded" else rng.integers(0, 3, (4, 5)) * 1.0
        if name != "categorical":
            y[0, 1] = y[3, 2] = np.nan
        value, (gradient,) = gradients.of(lambda x, loss=loss, y=y: loss(y.astype("float32"), x), [logits])
        found |= {f"{name} loss": value, f"{name} loss gradient": gradient}
    np.savez(folder / f"{backend}.npz", **found)


def _of_weights(model, inputs):
    """Gradients of the mean squared output, over all weights, end to end."""
    variables = model.trainable_variables

    def squared():
        return keras.ops.mean(keras.ops.square(model(inputs, training=False)))

    told = gradients.of(squared, (), variables)[1]
    return np.concatenate(
        [np.zeros(v.shape).ravel() if one is None else one.ravel() for v, one in zip(variables, told)]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
