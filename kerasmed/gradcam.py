"""Grad-CAM: where in an image a model saw the class that it names, and how often that is where the sign lies.

    α_k = mean over positions (i, j) of ∂ logit_c / ∂ A_kij,   map = ReLU(Σ_k α_k A_k)

for the feature maps A of one layer and the logit of class c: the probability's gradient vanishes where the model is
sure, the logit's does not.

Source: Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import keras
import numpy as np

OK = "ok"
# No feature's weight is above `WEIGHT_TOLERANCE`: to first order, the class does not depend on the layer.
ZERO_GRADIENT = "zero_gradient"
# There are weights, but the weighted sum is nowhere above 0: what the layer shows speaks against the class, or nothing
# in it is active.
NEGATIVE = "negative"
# In logits per unit of a feature. A dead unit gives exactly 0, a saturated one some 1e-20; a real weight over a map of
# 100×100 positions is about 1e-6.
WEIGHT_TOLERANCE = 1e-12
# For `default_layer`: what the usual networks end in at 224 pixels. Coarser maps point less well.
MIN_MAP_SIDE = 7

_LIKELIEST = -1
_PASSED_OVER = (keras.layers.MaxPooling2D, keras.layers.AveragePooling2D, keras.layers.ZeroPadding2D)


class Maps(NamedTuple):
    """Grad-CAM maps of some images; a map is all zero just where its status is not `OK`."""

    heat: np.ndarray  # float32, (num_images, h, w): the layer's resolution, in the logit's units, at least 0
    class_ids: np.ndarray  # int, (num_images,): the class explained
    probabilities: np.ndarray  # float32, (num_images, num_classes): the model's output
    status: np.ndarray  # str, (num_images,): `OK`, `ZERO_GRADIENT` or `NEGATIVE`


# --- maps ------------------------------------------------------------------------------------------------------------


def candidate_layers(model: keras.Model) -> list[str]:
    """Return the layers whose maps can be explained, in graph order: those that put out (batch, h, w, channels).

    Only layers that the logits depend on are listed.

    Raises:
        ValueError: the model has no layer "logits" without activation.
    """
    return [layer.name for layer, _ in _candidates(model)]


def default_layer(model: keras.Model) -> str:
    """Return the last of `candidate_layers` whose map is smaller than the image and has `MIN_MAP_SIDE` cells a side.

    It lies on the trunk: nothing passes around it, so that its maps hold all that the logits are made of. Pooling and
    padding layers are passed over. For the usual networks at 224 pixels it is the last convolution's output after its
    activation, the paper's choice; for smaller images it is an earlier block's. Where no layer is so, it is the last
    whose map is larger than 1×1, on the trunk if any is.

    Raises:
        ValueError: no map is larger than 1×1, or there is no layer "logits".
    """
    maps = [
        (layer, on_trunk)
        for layer, on_trunk in _candidates(model)
        if not isinstance(layer, _PASSED_OVER) and layer.output.shape[1:3] != (1, 1)
    ]
    if not maps:
        raise ValueError(
            f"model {model.name!r} has no layer that puts out maps (batch, h, w, channels) larger than 1×1 before its "
            "logits; Grad-CAM explains convolutional networks."
        )
    trunk = [layer for layer, on_trunk in maps if on_trunk] or [layer for layer, _ in maps]
    image_size = model.inputs[0].shape[1:3]
    # A side of unknown length is that of an image of any size, and taken to fit.
    fine = [
        layer
        for layer in trunk
        if all(side is None or side >= MIN_MAP_SIDE for side in layer.output.shape[1:3])
        and all(side is None or full is None or side < full for side, full in zip(layer.output.shape[1:3], image_size))
    ]
    return (fine or trunk)[-1].name


def _candidates(model):
    """Pairs of a layer that puts out maps and whether every path from image to logits leads through it."""
    operations = keras.Model(model.inputs, _logits(model).output).operations
    made = {id(tensor): place for place, one in enumerate(operations) for tensor in keras.tree.flatten(one.output)}
    last_use = [0] * len(operations)
    for place, one in enumerate(operations):
        if not isinstance(one, keras.layers.InputLayer):
            for tensor in keras.tree.flatten(one.input):
                last_use[made.get(id(tensor), 0)] = place
    found, reach = [], 0  # reach: the last use of anything made so far
    for place, one in enumerate(operations):
        is_layer = isinstance(one, keras.Layer) and not isinstance(one, keras.layers.InputLayer)
        if is_layer and len(getattr(one.output, "shape", ())) == 4:
            found.append((one, reach <= place))
        reach = max(reach, last_use[place])
    return found


def build(model: keras.Model, *, layer: str | None = None) -> Callable[..., Maps]:
    """Make a function that explains images; it is compiled at its first call and serves every batch.

    A batch costs one forward pass, and one backward pass from the logits to the layer only. The model runs in inference
    mode; later changes of its weights are seen.

    Args:
        model: functional and flat (no model nested in it), with one input, one output, and a layer "logits" without
            activation.
        layer: whose feature maps, shape (batch, h, w, channels); None for `default_layer`. An earlier layer's map is
            finer, and speaks less of the class.

    Returns:
        Function `explain(images, class_ids=None, *, batch_size=32) -> Maps` of

        - images: uint8, shape (num_images, height, width, channels), or without the last axis for one channel;
        - class_ids: int, one for all or shape (num_images,); None explains each image's likeliest class.

    Raises:
        ValueError: the model or the layer is not of this kind; from the function: images or class ids do not fit.
        FloatingPointError: from the function: a map is not finite.
        RuntimeError: the Keras backend is not TensorFlow.

    Example:
        >>> from kerasmed import models
        >>> explain = build(models.compact_cnn((32, 32), 3, filters=(4, 8)))
        >>> explain(np.zeros((5, 32, 32), np.uint8), 2).heat.shape
        (5, 8, 8)

    Source: Selvaraju et al. 2017, arXiv:1610.02391.
    """
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"model {model.name!r} has {len(model.inputs)} inputs and {len(model.outputs)} outputs; expected one each."
        )
    logits = _logits(model)
    chosen = _layer(model, default_layer(model) if layer is None else layer)
    explain_batch = _compile(keras.Model(model.inputs[0], [chosen.output, logits.output, model.outputs[0]]))
    input_shape = model.inputs[0].shape[1:]
    num_classes = logits.output.shape[-1]

    def explain(images: np.ndarray, class_ids=None, *, batch_size: int = 32) -> Maps:
        images = _checked_images(images, input_shape)
        wanted = _checked_class_ids(class_ids, len(images), num_classes)
        if not len(images):
            # TensorFlow takes no gradient of an empty batch; one image gives the arrays their shapes.
            return Maps(*(part[:0] for part in explain(np.zeros((1, *images.shape[1:]), np.uint8))))
        starts = range(0, len(images), batch_size)
        parts = [
            explain_batch(images[start : start + batch_size], wanted[start : start + batch_size]) for start in starts
        ]
        heat, explained, probabilities, largest_weight = (np.concatenate(part) for part in zip(*parts))
        lost = np.flatnonzero(~np.isfinite(heat).all(axis=(1, 2)))
        if len(lost):
            raise FloatingPointError(
                f"the maps of {len(lost)} of {len(images)} images are not finite; look at the model's weights, or load "
                f"it in float32. First images: {lost[:5].tolist()}."
            )
        heat[largest_weight <= WEIGHT_TOLERANCE] = 0
        status = np.where(
            largest_weight <= WEIGHT_TOLERANCE, ZERO_GRADIENT, np.where(heat.max(axis=(1, 2)) > 0, OK, NEGATIVE)
        )
        return Maps(heat, explained.astype(int), probabilities, status)

    return explain


def _logits(model):
    """The layer "logits"; refuse models without one, and one that holds the activation."""
    names = [layer.name for layer in model.layers]
    if "logits" not in names:
        raise ValueError(
            f"model {model.name!r} has no layer 'logits', whose gradient Grad-CAM takes; name its last Dense so and "
            f"put the activation after it. Last layers: {', '.join(names[-5:])}."
        )
    layer = model.get_layer("logits")
    activation = getattr(layer, "activation", keras.activations.linear)
    if activation is not keras.activations.linear:
        raise ValueError(
            f"layer 'logits' of model {model.name!r} has the activation {activation.__name__!r}, so it does not put "
            "out logits; make the activation a layer of its own after it."
        )
    return layer


def _layer(model, name):
    """The layer to explain; refuse what is no candidate, and say why."""
    candidates = candidate_layers(model)
    last = f"The last that fit: {', '.join(candidates[-5:]) or 'none'}."
    if name not in [layer.name for layer in model.layers]:
        raise ValueError(f"model {model.name!r} has no layer {name!r}; a nested model's layers are not seen. {last}")
    layer = model.get_layer(name)
    if isinstance(layer, keras.Model):
        raise ValueError(
            f"layer {name!r} is a model nested in {model.name!r}, whose maps cannot be reached; build the backbone "
            "with `input_tensor=`, so that the graph is flat."
        )
    if name not in candidates:
        shape = getattr(layer.output, "shape", None)
        if shape is None or len(shape) != 4 or isinstance(layer, keras.layers.InputLayer):
            raise ValueError(f"layer {name!r} puts out {shape}; expected maps (batch, h, w, channels). {last}")
        raise ValueError(f"the logits of model {model.name!r} do not depend on layer {name!r}. {last}")
    return layer


def _compile(parts: keras.Model) -> Callable:
    """Compile (images, class ids) -> (maps, class ids, probabilities, largest |α| of each image), NumPy in and out.

    `parts` puts out features, logits and probabilities. Only this function depends on the Keras backend.
    """
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise RuntimeError(
            f"Grad-CAM takes its gradient with TensorFlow, and the Keras backend is {backend!r}; set "
            "KERAS_BACKEND=tensorflow (a saved model loads under either)."
        )
    import tensorflow as tf

    pixels = tf.TensorSpec(parts.inputs[0].shape, tf.uint8)

    # A batch of unknown length: the last, smaller one is not traced anew.
    @tf.function(input_signature=[pixels, tf.TensorSpec([None], tf.int32)])
    def explain_batch(images, class_ids):
        features, logits, probabilities = parts(images, training=False)
        logits = tf.cast(logits, tf.float32)
        class_ids = tf.where(class_ids == _LIKELIEST, tf.argmax(logits, axis=-1, output_type=tf.int32), class_ids)
        num_positions = tf.cast(tf.reduce_prod(tf.shape(features)[1:3]), tf.float32)
        # After average pooling a gradient is a weight / num_positions, which half precision would round to nothing.
        scaled = num_positions * tf.gather(logits, class_ids, batch_dims=1)
        # The graph's own gradient: it stops at the tensor asked for, whatever passes around it or stands before it. A
        # tape would follow the trainable weights up to the first layer, and see nothing where all are frozen.
        (gradients,) = tf.gradients(scaled, features, unconnected_gradients="zero")
        weights = tf.reduce_mean(tf.cast(gradients, tf.float32), axis=(1, 2)) / num_positions
        heat = tf.nn.relu(tf.einsum("bhwk,bk->bhw", tf.cast(features, tf.float32), weights))
        largest = tf.reduce_max(tf.abs(weights), axis=-1)
        return heat, class_ids, tf.cast(probabilities, tf.float32), largest

    return lambda images, class_ids: [part.numpy() for part in explain_batch(images, class_ids)]


def _checked_images(images, input_shape):
    if images.dtype != np.uint8:
        raise ValueError(f"`images` are {images.dtype}; expected uint8 grey levels from 0 to 255, as files hold them.")
    given = images.shape
    if images.ndim == 3 and input_shape[-1] == 1:
        images = images[..., None]
    if images.ndim != 4 or any(side not in (None, got) for side, got in zip(input_shape, images.shape[1:])):
        raise ValueError(
            f"`images` have shape {given}; the model takes (num_images, {', '.join(str(side) for side in input_shape)})"
            f"{', the last axis of which may be left out' if input_shape[-1] == 1 else ''}."
        )
    return images


def _checked_class_ids(class_ids, num_images, num_classes):
    if class_ids is None:
        return np.full(num_images, _LIKELIEST, np.int32)
    wanted = np.asarray(class_ids)
    if wanted.dtype.kind not in "iu" or wanted.shape not in ((), (num_images,)):
        raise ValueError(
            f"`class_ids` are {wanted.dtype} of shape {wanted.shape}; expected one int, or one for each of "
            f"{num_images} images."
        )
    wanted = np.broadcast_to(wanted, num_images)
    outside = np.flatnonzero((wanted < 0) | (wanted >= num_classes))
    if len(outside):
        raise ValueError(
            f"`class_ids` holds {wanted[outside[:5]].tolist()} for images {outside[:5].tolist()}; the model has "
            f"{num_classes} classes, 0 to {num_classes - 1}."
        )
    return wanted.astype(np.int32)


# --- at the image's size ---------------------------------------------------------------------------------------------


def upsample(heat: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Enlarge maps (num_images, h, w) to `image_size` = (height, width), bilinearly; units are kept.

    Returns:
        float32 array, shape (num_images, height, width).
    """
    height, width = image_size
    enlarged = np.empty((len(heat), height, width), np.float32)
    for target, map_ in zip(enlarged, heat):
        target[:] = cv2.resize(np.asarray(map_, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return enlarged


# --- the pointing game -----------------------------------------------------------------------------------------------


def peaks(heat: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Find where each map is highest, in pixels of an image of `image_size`.

    A bilinear map is highest at the centre of its highest cell:

        y = (i + 1/2) · height / h − 1/2,   x = (j + 1/2) · width / w − 1/2

    so the enlarged map is not searched, whose outer rows repeat a maximum at the border out to the border itself.

    Args:
        heat: float, shape (num_images, h, w).
        image_size: (height, width).

    Returns:
        float array (num_images, 2) of (y, x), 0 at the centre of the first pixel; NaN where a map is nowhere above 0.
        Of equal maxima the first counts, row by row.

    Example:
        >>> peaks(np.array([[[0, 1], [0, 0]]]), (4, 4)).tolist()
        [[0.5, 2.5]]
    """
    num_images, *cells = heat.shape
    flat = heat.reshape(num_images, -1)
    indices = np.stack(np.unravel_index(flat.argmax(axis=1), cells), axis=1)
    found = (indices + 0.5) * np.divide(image_size, cells) - 0.5
    found[flat.max(axis=1) <= 0] = np.nan
    return found


def pointing_game(heat: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Say of each map whether its peak falls in the box of the sign, and how often a blind guess would.

    Args:
        heat: float, shape (num_images, h, w), of the class that the box belongs to.
        boxes: float, shape (num_images, 4): x, y, width, height in pixels of an image of `image_size`; a box covers the
            pixels from x up to, not including, x + width. Boxes in pixels of another size are to be scaled first.
        image_size: (height, width).

    Returns:
        hits: bool, shape (num_images,); a map nowhere above 0 misses. No margin is granted around the box.
        chance: float, shape (num_images,): box area / image area, the share that a peak at random would hit.

    Raises:
        ValueError: shapes do not fit, or a box is missing, empty, or more than a pixel outside the image.

    Example:
        >>> heat = np.array([[[0, 1], [0, 0]]] * 2)
        >>> hits, chance = pointing_game(heat, np.array([[2, 0, 2, 2], [0, 0, 2, 4]]), (4, 4))
        >>> hits.tolist(), chance.tolist()
        ([True, False], [0.25, 0.5])

    Source: Zhang et al. 2016, arXiv:1608.00507.
    """
    boxes = np.asarray(boxes, float)
    if boxes.shape != (len(heat), 4):
        raise ValueError(
            f"`boxes` have shape {boxes.shape}; expected ({len(heat)}, 4): x, y, width, height for each map."
        )
    corners, sides = boxes[:, :2], boxes[:, 2:]
    limits = np.array(image_size[::-1], float)
    unfit = ~((sides > 0) & (corners >= -1) & (corners + sides <= limits + 1)).all(axis=1)
    if unfit.any():
        raise ValueError(
            f"{int(unfit.sum())} of {len(boxes)} boxes are missing, empty, or outside an image of {tuple(image_size)}; "
            "leave out images without a box, and scale boxes by `image_size` over the file's own size. "
            f"First rows: {np.flatnonzero(unfit)[:5].tolist()}, first box: {boxes[unfit][0].tolist()}."
        )
    # In lengths, the centre of pixel 0 is at one half.
    points = peaks(heat, image_size)[:, ::-1] + 0.5
    hits = ((points >= corners) & (points < corners + sides)).all(axis=1)
    inside = np.minimum(corners + sides, limits) - np.maximum(corners, 0)
    return hits, inside.prod(axis=1) / limits.prod()
