"""Grad-CAM: where in an image a model saw the class that it names.

    α_k = mean over positions (i, j) of ∂ logit_c / ∂ A_kij,   map = ReLU(Σ_k α_k A_k)

for the feature maps A of one layer and the logit of class c: the probability's gradient vanishes where the model is
sure, the logit's does not. `kerasmed.localisation` enlarges the maps and compares them with boxes.

Source: Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from kerasmed.localisation import NEGATIVE, OK, ZERO_GRADIENT

# The largest |α| that counts as no gradient, in logits per unit of a feature. A dead unit gives exactly 0, a saturated
# one some 1e-20; a real weight over a map of 100×100 positions is about 1e-6, behind average pooling as behind max
# pooling: the one spreads its gradient over the positions, the other leaves all of it at one of them.
WEIGHT_TOLERANCE = 1e-12
# For `default_layer`: what the usual networks end in at 224 pixels. Coarser maps point less well.
MIN_MAP_SIDE = 7

_LIKELIEST = -1
_passes = threading.RLock()  # one change of a layer's call at a time
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

    Only layers that depend on the images, and the logits on them, are listed.

    Raises:
        ValueError: the model has no layer "logits" without activation, or not one input of images.
    """
    return [layer.name for layer, _ in _candidates(model)]


def default_layer(model: keras.Model) -> str:
    """Return the last of `candidate_layers` whose map is smaller than the image and has `MIN_MAP_SIDE` cells a side.

    It lies on the trunk: nothing of the image passes around it, so that its maps hold all that the logits know of the
    image; other inputs do not count. Pooling and padding layers are passed over. For the usual networks at 224 pixels
    it is the last convolution's output after its activation, the paper's choice; for smaller images it is an earlier
    block's. Where no layer is so, it is the last whose map is larger than 1×1, on the trunk if any is.

    Raises:
        ValueError: no map is larger than 1×1, there is no layer "logits", or not one input of images.
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
    image_size = _image_input(model).shape[1:3]
    # A side of unknown length is that of an image of any size, and taken to fit.
    fine = [
        layer
        for layer in trunk
        if all(side is None or side >= MIN_MAP_SIDE for side in layer.output.shape[1:3])
        and all(side is None or full is None or side < full for side, full in zip(layer.output.shape[1:3], image_size))
    ]
    return (fine or trunk)[-1].name


def _candidates(model):
    """Pairs of a layer that puts out maps of the image and whether all paths from image to logits lead through it."""
    image = id(_image_input(model))
    # Only operations that depend on the image are followed; place 0 is the image.
    followed, last_use, made, beside = [None], [0], {image: 0}, {id(tensor) for tensor in model.inputs} - {image}
    for one in keras.Model(model.inputs, _logits(model).output).operations:
        if isinstance(one, keras.layers.InputLayer):
            continue
        outputs = [id(tensor) for tensor in keras.tree.flatten(one.output)]
        # A tensor of unknown origin, of a layer called twice, counts as the image.
        sources = [made.get(id(tensor), 0) for tensor in keras.tree.flatten(one.input) if id(tensor) not in beside]
        if not sources:
            beside.update(outputs)
            continue
        for source in sources:
            last_use[source] = len(followed)
        made.update(dict.fromkeys(outputs, len(followed)))
        followed.append(one)
        last_use.append(0)
    found, reach = [], last_use[0]  # reach: the last use of anything made so far
    for place, one in enumerate(followed[1:], start=1):
        if isinstance(one, keras.Layer) and len(getattr(one.output, "shape", ())) == 4:
            found.append((one, reach <= place))
        reach = max(reach, last_use[place])
    return found


def build(model: keras.Model, *, layer: str | None = None) -> Callable[..., Maps]:
    """Make a function that explains images; it is compiled at its first call and serves every batch.

    With JAX it is compiled once for each number of images at once, at most for the powers of two up to `batch_size`.
    A batch costs one forward pass, and one backward pass from the logits to the layer only. The model runs in inference
    mode; later changes of its weights are seen.

    Args:
        model: functional and flat (no model nested in it), with one input of images (batch, height, width, channels),
            any number of other inputs, none of rank 4, one output, and a layer "logits" without activation.
        layer: whose feature maps, shape (batch, h, w, channels); None for `default_layer`. An earlier layer's map is
            finer, and speaks less of the class.

    Returns:
        Function `explain(images, class_ids=None, *, beside=None, batch_size=32) -> Maps` of

        - images: uint8, shape (num_images, height, width, channels), or without the last axis for one channel;
        - class_ids: int, one for all or shape (num_images,); None explains each image's likeliest class;
        - beside: what the model takes beside images: name of the input -> array, shape (num_images, ...), NaN where
          the model knows what to do with it. Maps show the image's part alone: at these values of the others.

    Raises:
        ValueError: the model or the layer is not of this kind; from the function: images, class ids or other inputs do
            not fit.
        FloatingPointError: from the function: a map or a probability is not finite.
        RuntimeError: the Keras backend is none of TensorFlow, JAX and PyTorch.

    Example:
        >>> from kerasmed import models
        >>> explain = build(models.compact_cnn((32, 32), 3, filters=(4, 8)))
        >>> explain(np.zeros((5, 32, 32), np.uint8), 2).heat.shape
        (5, 8, 8)

    Source: Selvaraju et al. 2017, arXiv:1610.02391.
    """
    if len(model.outputs) != 1:
        raise ValueError(f"model {model.name!r} has {len(model.outputs)} outputs; expected one.")
    image, logits = _image_input(model), _logits(model)
    # Layers' names outlast saving; a tensor without a name of its own is named anew.
    inputs = {one.name: one.output for one in model.layers if isinstance(one, keras.layers.InputLayer)}
    others = {name: tensor for name, tensor in inputs.items() if tensor is not image}
    chosen = _layer(model, default_layer(model) if layer is None else layer)
    parts = keras.Model([image, *others.values()], [chosen.output, logits.output, model.outputs[0]])
    explain_batch = _compile(parts, chosen)
    num_classes = logits.output.shape[-1]

    def explain(
        images: np.ndarray,
        class_ids=None,
        *,
        beside: Mapping[str, np.ndarray] | None = None,
        batch_size: int = 32,
    ) -> Maps:
        images = _checked_images(images, image.shape[1:])
        wanted = _checked_class_ids(class_ids, len(images), num_classes)
        added = _checked_beside({} if beside is None else beside, others, len(images))
        if not len(images):
            # There is no gradient of an empty batch; one image gives the arrays their shapes.
            one = {name: np.zeros((1, *values.shape[1:]), values.dtype) for name, values in added.items()}
            return Maps(*(part[:0] for part in explain(np.zeros((1, *images.shape[1:]), np.uint8), beside=one)))
        batches = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
        # A few images alone are filled up to a power of two at most, so that few numbers of them are compiled.
        rows = min(batch_size, 1 << (len(images) - 1).bit_length())
        parts = [
            explain_batch(images[batch], [values[batch] for values in added.values()], wanted[batch], rows)
            for batch in batches
        ]
        heat, explained, probabilities, largest_weight = (np.concatenate(part) for part in zip(*parts))
        lost = np.flatnonzero(~(np.isfinite(heat).all(axis=(1, 2)) & np.isfinite(probabilities).all(axis=-1)))
        if len(lost):
            raise FloatingPointError(
                f"the maps or probabilities of {len(lost)} of {len(images)} images are not finite; look at the model's "
                f"weights{' and at NaN in `beside`' if others else ''}, or load the model in float32. First images: "
                f"{lost[:5].tolist()}."
            )
        heat[largest_weight <= WEIGHT_TOLERANCE] = 0
        status = np.where(
            largest_weight <= WEIGHT_TOLERANCE, ZERO_GRADIENT, np.where(heat.max(axis=(1, 2)) > 0, OK, NEGATIVE)
        )
        return Maps(heat, explained.astype(int), probabilities, status)

    return explain


def _image_input(model):
    """The one input of rank 4; refuse models with none, and with several."""
    found = [tensor for tensor in model.inputs if len(tensor.shape) == 4]
    if len(found) != 1:
        inputs = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in model.inputs)
        raise ValueError(
            f"model {model.name!r} has {len(found)} inputs of images among its inputs {inputs}; expected one of shape "
            "(batch, height, width, channels), and all others of another rank."
        )
    return found[0]


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
        raise ValueError(
            f"no path from the images to the logits of model {model.name!r} leads through layer {name!r}. {last}"
        )
    return layer


def _compile(parts: keras.Model, layer) -> Callable:
    """Compile (images, other inputs, class ids, rows) -> (maps, class ids, probabilities, largest |α| of each image).

    All are NumPy, and so are the arguments. `parts` takes the images first, and puts out the features, which `layer`
    makes, logits and probabilities. A backend that compiles anew for every number of images fills them up to `rows`.
    Only here the Keras backend matters.
    """
    backend = keras.backend.backend()
    if backend not in _BY_BACKEND:
        raise RuntimeError(
            f"Grad-CAM takes its gradient with TensorFlow, JAX or PyTorch, and the Keras backend is {backend!r}; set "
            "KERAS_BACKEND to one of them (a saved model loads under any)."
        )
    return _BY_BACKEND[backend](parts, layer)


def _score(features, logits, class_ids):
    """Class ids, with the likeliest put in; their logits, scaled by a root of the number of positions; and the root.

    For half precision: behind average pooling a gradient is a weight / num_positions, and would be rounded to nothing;
    behind max pooling it is the weight, and times num_positions it would be infinite. The root serves both.
    """
    logits = ops.cast(logits, "float32")
    class_ids = ops.where(class_ids == _LIKELIEST, ops.cast(ops.argmax(logits, axis=-1), "int32"), class_ids)
    height, width = ops.shape(features)[1:3]
    scale = ops.sqrt(ops.cast(height * width, "float32"))
    return class_ids, scale * ops.take_along_axis(logits, class_ids[:, None], axis=1)[:, 0], scale


def _weighed(features, gradients, scale):
    """Maps, and the largest |α| of each image, of the features and the scaled logits' gradients."""
    weights = ops.mean(ops.cast(gradients, "float32"), axis=(1, 2)) / scale
    heat = ops.relu(ops.einsum("bhwk,bk->bhw", ops.cast(features, "float32"), weights))
    return heat, ops.max(ops.abs(weights), axis=-1)


def _by_tensorflow(parts, _):
    import tensorflow as tf

    pixels, *others = (tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in parts.inputs)
    pixels = tf.TensorSpec(pixels.shape, tf.uint8)

    # A batch of unknown length: the last, smaller one is not traced anew.
    @tf.function(input_signature=[pixels, others, tf.TensorSpec([None], tf.int32)])
    def explain_batch(images, others, class_ids):
        features, logits, probabilities = parts([images, *others], training=False)
        class_ids, scores, scale = _score(features, logits, class_ids)
        # The graph's own gradient: it stops at the tensor asked for, whatever passes around it or stands before it. A
        # tape would follow the trainable weights up to the first layer, and see nothing where all are frozen.
        (gradients,) = tf.gradients(scores, features, unconnected_gradients="zero")
        heat, largest = _weighed(features, gradients, scale)
        return heat, class_ids, tf.cast(probabilities, tf.float32), largest

    return lambda images, others, class_ids, rows: [part.numpy() for part in explain_batch(images, others, class_ids)]


@contextlib.contextmanager
def _passing(layer, change):
    """Have what a layer makes pass through a function, as long as the block runs.

    A second model, from the layer's output to the logits, would do as well; but Keras then cannot save the first.
    """
    call = layer.call
    with _passes:
        object.__setattr__(layer, "call", lambda *args, **options: change(call(*args, **options)))
        try:
            yield
        finally:
            object.__delattr__(layer, "call")


def _by_jax(parts, layer):
    import jax

    def run(variables, inputs, change):
        with _passing(layer, change):
            return parts.stateless_call(*variables, inputs, training=False)[0]

    @jax.jit
    def explain_batch(variables, images, others, class_ids):
        inputs = [images, *others]

        def score(shift):
            features, logits, probabilities = run(variables, inputs, lambda made: made + shift)
            ids, scores, scale = _score(features, logits, class_ids)
            return ops.sum(scores), (features, ids, probabilities, scale)

        # The gradient by the features is that by what is added to them: it stops there, whatever passes around them.
        shape = jax.eval_shape(lambda: run(variables, inputs, lambda made: made)[0])
        nothing = ops.zeros(shape.shape, shape.dtype)
        gradients, (features, ids, probabilities, scale) = jax.grad(score, has_aux=True)(nothing)
        heat, largest = _weighed(features, gradients, scale)
        return heat, ids, ops.cast(probabilities, "float32"), largest

    def explain_filled(images, others, class_ids, rows):
        count = len(images)
        # By more of the last image: with it, a value that the model cannot take is not a new one.
        filled = [
            np.concatenate([part, np.repeat(part[-1:], rows - count, 0)]) for part in (images, *others, class_ids)
        ]
        variables = [[one.value for one in kind] for kind in (parts.trainable_variables, parts.non_trainable_variables)]
        return [np.asarray(part)[:count] for part in explain_batch(variables, filled[0], filled[1:-1], filled[-1])]

    return explain_filled


def _by_torch(parts, layer):
    import torch

    def watched(made):
        torch.set_grad_enabled(True)  # from here on, until the block below ends
        return made.detach().requires_grad_()

    def explain_batch(images, others, class_ids, rows):
        # On the device of the weights.
        images, class_ids, *others = (ops.convert_to_tensor(part) for part in (images, class_ids, *others))
        with torch.no_grad():
            with _passing(layer, watched):
                features, logits, probabilities = parts([images, *others], training=False)
            ids, scores, scale = _score(features, logits, class_ids)
            # Frozen weights or not, what comes before the features takes no part.
            (gradients,) = torch.autograd.grad(scores.sum(), features, allow_unused=True, materialize_grads=True)
            heat, largest = _weighed(features.detach(), gradients, scale)
        return [ops.convert_to_numpy(part) for part in (heat, ids, ops.cast(probabilities, "float32"), largest)]

    return explain_batch


_BY_BACKEND = {"tensorflow": _by_tensorflow, "jax": _by_jax, "torch": _by_torch}


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


def _checked_beside(beside, inputs, num_images):
    """Arrays of all other inputs by name, in the model's order and dtypes."""
    missing, extra = [name for name in inputs if name not in beside], [name for name in beside if name not in inputs]
    if missing or extra:
        raise ValueError(
            f"`beside` lacks {missing} and has {extra}, which the model does not take; beside images it takes "
            f"{list(inputs) or 'nothing'}."
        )
    checked = {}
    for name, tensor in inputs.items():
        values, shape = np.asarray(beside[name]), (num_images, *tensor.shape[1:])
        fits = values.ndim == len(shape) and all(side in (None, got) for side, got in zip(shape, values.shape))
        if not fits or not np.can_cast(values.dtype, tensor.dtype, "same_kind"):
            raise ValueError(
                f"`beside[{name!r}]` is {values.dtype} of shape {values.shape}; expected {tensor.dtype} of "
                f"shape {shape}: a row for each of {num_images} images."
            )
        checked[name] = values.astype(tensor.dtype)
    return checked
