"""Grad-CAM of 32 images by DenseNet121, against tf-keras-vis image by image, and against the forward pass alone.

The chest system's DenseNet121 of 14 labels on made-up grey images of 224×224; each image is asked of one label.
tf-keras-vis is the library that Keras users mostly take for Grad-CAM, usually an image a call. It needs a model that
ends at the logits and takes float pixels, as it takes gradients from the input on: it gets such a copy, made once, and
is not asked to enlarge or normalise its maps, so that nothing but Grad-CAM is timed. (Its call on 32 images at once
gives the same maps, and takes about four fifths of the time.) The forward pass is the quicker of `predict_on_batch` and
a `tf.function`, on the same batch of 32. Maps must equal tf-keras-vis's, and probabilities those of the forward pass.
"""

import keras
import measure
import numpy as np
import tensorflow as tf
from tf_keras_vis.gradcam import Gradcam
from tf_keras_vis.utils.scores import CategoricalScore

from kerasmed import backbones, embeddings, gradcam, models

SIDE, LABELS, IMAGES = 224, 14, 32


def build_model(images):
    """Build the network of random weights, with the images' batch statistics: else its maps say nothing."""
    keras.utils.set_random_seed(0)
    features, _ = backbones.build("DenseNet121", (SIDE, SIDE), weights="none")
    embeddings.calibrate(features, images)
    return keras.Model(features.input, models.two_layer_head(features.output, LABELS, dropout=0.3))


def run():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 192, (IMAGES, 7, 7)).repeat(SIDE // 7, axis=1).repeat(SIDE // 7, axis=2)
    images = (coarse + rng.integers(0, 64, (IMAGES, SIDE, SIDE))).astype(np.uint8)[..., None]
    labels = np.arange(IMAGES) % LABELS
    model = build_model(images)
    explain = gradcam.build(model)

    copy = keras.models.clone_model(model, input_tensors=keras.Input((SIDE, SIDE, 1)))
    copy.set_weights(model.get_weights())
    visualizer = Gradcam(keras.Model(copy.input, copy.get_layer("logits").output), clone=False)
    layer = copy.get_layer(gradcam.default_layer(model))
    options = {"seek_penultimate_conv_layer": False, "expand_cam": False, "normalize_cam": False}
    forward = tf.function(lambda batch: model(batch, training=False))

    def ours():
        return explain(images, labels, batch_size=IMAGES)

    def one_by_one():
        maps = [
            visualizer(CategoricalScore(int(label)), image[None].astype(np.float32), layer, **options)
            for image, label in zip(images, labels)
        ]
        return np.concatenate(maps)

    calls = {
        "ours": ours,
        "tf-keras-vis": one_by_one,
        "predict_on_batch": lambda: model.predict_on_batch(images),
        "tf.function": lambda: forward(images).numpy(),
    }
    # This also compiles what is compiled.
    maps, theirs, *probabilities = (call() for call in calls.values())
    if (maps.status == gradcam.OK).sum() < IMAGES // 2:
        raise AssertionError(f"half of the maps are empty: {maps.status}; a comparison of them says little.")
    # float32: a convolution sums a batch of another size in another order, 120 layers deep.
    if not np.allclose(maps.heat, theirs, rtol=1e-4, atol=1e-5 * maps.heat.max()):
        raise AssertionError("maps differ from those of tf-keras-vis.")
    if not all(np.allclose(maps.probabilities, each, rtol=1e-5, atol=0) for each in probabilities):
        raise AssertionError("probabilities differ from those of the forward pass.")
    seconds = measure.rounds(calls, warm=0)

    yield measure.faster(
        f"Grad-CAM of {IMAGES} images, DenseNet121 / tf-keras-vis image by image",
        seconds["ours"],
        seconds["tf-keras-vis"],
        amount=IMAGES,
        unit="images/s",
        at_least=4,
        checked="maps of all images equal to 0.0001",
    )
    quickest = measure.best(seconds, ["predict_on_batch", "tf.function"])
    yield measure.shorter(
        f"Grad-CAM of {IMAGES} images, DenseNet121 / forward pass by {quickest}",
        seconds["ours"],
        seconds[quickest],
        at_most=1.5,
        checked="probabilities of all images equal to 0.00001",
    )


if __name__ == "__main__":
    measure.main(run)
