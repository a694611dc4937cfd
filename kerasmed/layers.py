"""Layers that the models of several systems share, and augmentation with Keras's own layers."""

import threading
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from kerasmed import augment

# Networks trained from scratch on small sets take few steps: with Keras's default of 0.99 the moving averages lag so
# far behind the weights that inference mode stays at chance.
BATCH_NORM_MOMENTUM = 0.9


def _three(name, value):
    """Return `value` as three floats, one per output channel."""
    channels = np.asarray(value, dtype="float64").ravel()
    if channels.size not in (1, 3):
        raise ValueError(f"`{name}` is {value!r}; expected one number, or three: one per output channel.")
    return [float(number) for number in np.broadcast_to(channels, 3)]


@keras.saving.register_keras_serializable(package="kerasmed")
class Preprocessing(keras.layers.Layer):
    """Turn pixels into what a backbone trained on colour pictures takes: `x * scale + offset`, three channels.

    A grey picture becomes three equal channels before scale and offset. Computes in float32 under every precision
    policy: the offsets of a picture in 0–255 need more digits than float16 has.

    Args:
        scale: factor, one number or one per output channel.
        offset: summand, one number or one per output channel.
        bgr: reverse the order of the channels first, so that scale and offset are in the order blue, green, red. On
            grey pictures only the order of scale and offset matters.

    Input shape: (batch, height, width, 1 or 3), uint8 or float, 0–255, colour in the order red, green, blue.
    Output shape: (batch, height, width, 3), float32.

    Raises:
        ValueError: another number of channels, or of values of `scale` or `offset`.
    """

    def __init__(self, scale=1.0, offset=0.0, *, bgr: bool = False, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.scale, self.offset, self.bgr = _three("scale", scale), _three("offset", offset), bool(bgr)

    def build(self, input_shape):
        if input_shape[-1] not in (1, 3):
            raise ValueError(
                f"{self.name} got {input_shape[-1]} channels, shape {tuple(input_shape)}; expected 1 (grey) or 3 (red, "
                "green, blue) in the last place."
            )

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        if self.bgr:
            x = ops.flip(x, axis=-1)
        # One channel times three factors is three channels.
        return x * ops.convert_to_tensor(self.scale, "float32") + ops.convert_to_tensor(self.offset, "float32")

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 3)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale, "offset": self.offset, "bgr": self.bgr}


@keras.saving.register_keras_serializable(package="kerasmed")
class GatedAttentionPooling(keras.layers.Layer):
    """Pool a row's slices into one vector, with weights learnt from the slices.

        s_k = wᵀ (tanh(V h_k) · sigmoid(U h_k))
        a_k = softmax_k(s_k), or where slices do not compete sigmoid(s_k) / K, of K slices in the row
        output = Σ_k a_k · h_k

    Softmax and K are of the row's slices alone. A place that the mask leaves out weighs exactly 0, and what stands
    there, NaN included, changes neither the output nor a gradient, not by a bit. A row without any slice has weights of
    0 and gives zeros. Softmax and sum are in float32 under every precision policy.

    Args:
        units: width of V and U.
        competing: with the softmax, as the source has it; else each slice is reweighted by itself, and all averaged.
        return_weights: also return a.

    Input shape: list of the slices (batch, S, D) and the mask (batch, S): bool, or numbers, of which 0 is no slice.
    Output shape: (batch, D); with `return_weights` also (batch, S), float32, which sum to 1 over a row's slices where
        these compete, else to less.

    Raises:
        ValueError: `units` below 1, or inputs of other shapes.

    Source: Ilse, Tomczak and Welling 2018, arXiv:1802.04712, equation 9, without biases as written there.
    """

    def __init__(self, units: int = 128, *, competing: bool = True, return_weights: bool = False, **kwargs):
        super().__init__(**kwargs)
        if units < 1:
            raise ValueError(f"`units` is {units}; expected at least 1.")
        self.units, self.competing, self.return_weights = int(units), bool(competing), bool(return_weights)

    def build(self, input_shape):
        shapes = [tuple(shape) for shape in input_shape if isinstance(shape, (list, tuple))]
        if [len(shape) for shape in shapes] != [3, 2] or shapes[0][1] != shapes[1][1]:
            raise ValueError(
                f"{self.name} got shape {input_shape}; expected a list of the slices, (batch, S, D), and their mask, "
                "(batch, S)."
            )
        shape = (shapes[0][2], self.units)
        self.tanh_kernel = self.add_weight(shape=shape, initializer="glorot_uniform", name="tanh_kernel")
        self.gate_kernel = self.add_weight(shape=shape, initializer="glorot_uniform", name="gate_kernel")
        self.score_kernel = self.add_weight(shape=(self.units, 1), initializer="glorot_uniform", name="score_kernel")

    def call(self, inputs):
        slices, mask = ops.cast(inputs[0], self.compute_dtype), ops.cast(inputs[1], "bool")
        # Before the arithmetic: a weight of 0 takes no NaN away, neither from the sum nor from a gradient.
        slices = ops.where(ops.expand_dims(mask, -1), slices, ops.zeros_like(slices))
        gate = ops.sigmoid(ops.matmul(slices, self.gate_kernel))
        scores = ops.matmul(ops.tanh(ops.matmul(slices, self.tanh_kernel)) * gate, self.score_kernel)
        scores = ops.cast(ops.squeeze(scores, -1), "float32")
        if self.competing:
            weights = masked_softmax(scores, mask)
        else:
            count = ops.sum(ops.cast(mask, "float32"), axis=-1, keepdims=True)
            weights = ops.where(mask, ops.sigmoid(scores) / ops.maximum(count, 1.0), 0.0)
        pooled = ops.sum(ops.expand_dims(weights, -1) * ops.cast(slices, "float32"), axis=1)
        pooled = ops.cast(pooled, self.compute_dtype)
        return (pooled, weights) if self.return_weights else pooled

    def get_config(self):
        config = {"units": self.units, "competing": self.competing, "return_weights": self.return_weights}
        return {**super().get_config(), **config}


def masked_softmax(scores, mask):
    """Softmax over the places of the last axis that a mask of the same shape keeps; 0 in the others, and where none is.

    Example:
        >>> weights = masked_softmax(np.array([[1.0, 1.0, np.nan]]), np.array([[True, True, False]]))
        >>> ops.convert_to_numpy(weights).tolist()
        [[0.5, 0.5, 0.0]]
    """
    # Far below every score, yet finite: the softmax of nothing would be NaN.
    return ops.where(mask, ops.softmax(ops.where(mask, scores, -1e30), axis=-1), 0.0)


# --- augmentation ----------------------------------------------------------------------------------------------------


def build_augmentation(
    names: Sequence[str], image_size: tuple[int, int]
) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """Build a recipe of `kerasmed.augment` a second time, with Keras's layers on whole batches.

    The same transforms with the same strengths and probabilities, drawn by other generators: results on one recipe
    should not depend on which library drew it. "scale" is uniform in the inverse scale here, in the scale there; the
    sides of "cutout" are uniform in their squares here, in themselves there.

    Args:
        names: any of `kerasmed.augment.NAMES`, applied in the order given; empty for no augmentation.
        image_size: (height, width) of the images; kept for the same signature, as these layers do not need it.

    Returns:
        Function (uint8 array (batch, height, width), seed) -> array of the same shape and type; None for no names.

    Raises:
        ValueError: unknown name.
    """
    augment.build(names, image_size)  # refuses unknown names
    if not names:
        return None
    local = threading.local()

    def augment_batch(images: np.ndarray, seed: int) -> np.ndarray:
        # Each thread has its own generator and seeds it for every batch.
        if not hasattr(local, "generator"):
            local.generator = keras.random.SeedGenerator(0)
            local.transforms = [_TRANSFORMS[name]() for name in names]
        local.generator.state.assign(np.array([seed, 0], np.uint32))
        pixels = ops.cast(images[..., None], "float32")
        for probability, transform in local.transforms:
            chosen = keras.random.uniform((len(images), 1, 1, 1), seed=local.generator) < probability
            pixels = ops.where(chosen, transform(pixels, local.generator), pixels)
        pixels = ops.cast(ops.round(ops.clip(pixels, 0, 255)), "uint8")
        return ops.convert_to_numpy(pixels)[..., 0]

    return augment_batch


def _drawn(layer):
    """A function of (images, generator) from one of Keras's random image layers."""

    def transform(images, generator):
        drawn = layer.get_random_transformation(images, training=True, seed=generator)
        return layer.transform_images(images, drawn, training=True)

    return transform


def _noise(images, generator):
    strength = 255 * keras.random.uniform((images.shape[0], 1, 1, 1), 0.0124, 0.0277, seed=generator)
    return images + strength * keras.random.normal(images.shape, seed=generator)


def _brightness_contrast(images, generator):
    """α · x + β · 255, with α in 1 ± 0.2 and β in ± 0.2, one draw an image."""
    contrast, brightness = (
        keras.random.uniform((images.shape[0], 1, 1, 1), -0.2, 0.2, seed=generator) for _ in range(2)
    )
    return (1 + contrast) * images + 255 * brightness


def _warped(images, rows, fill_mode="constant"):
    """Images read at x' = a · x + b · y + c, y' = d · x + e · y + f; black outside, or the nearest pixel.

    `rows` are (a, b, c, d, e, f), each (batch,) or a number; the centre of the first pixel is (0, 0).
    """
    entries = [ops.broadcast_to(ops.cast(entry, "float32"), images.shape[:1]) for entry in (*rows, 0, 0)]
    return ops.image.affine_transform(images, ops.stack(entries, axis=1), fill_mode=fill_mode)


def _sheared(images, generator):
    """Both axes by ± 15 degrees, about the centre."""
    limit = np.pi / 12
    x, y = (ops.tan(keras.random.uniform((len(images),), -limit, limit, seed=generator)) for _ in range(2))
    # Pixels are looked up, not sent: the matrix is the inverse of the shear's.
    scale = 1 / (1 - x * y)
    centre_y, centre_x = (np.array(images.shape[1:3]) - 1) / 2
    a, b, d = scale, -x * scale, -y * scale
    return _warped(images, (a, b, centre_x - a * centre_x - b * centre_y, d, a, centre_y - d * centre_x - a * centre_y))


def _scaled(images, generator):
    """By 0.8 to 1.3, about the centre."""
    step = 1 / keras.random.uniform((len(images),), 0.8, 1.3, seed=generator)
    centre_y, centre_x = (np.array(images.shape[1:3]) - 1) / 2
    return _warped(images, (step, 0, centre_x * (1 - step), 0, step, centre_y * (1 - step)))


def _framed(sign, fill_mode):
    """Each side moved out (sign 1) or in (sign -1) by up to 0.2 of the picture, which is then resized back."""

    def transform(images, generator):
        height, width = images.shape[1:3]
        top, right, bottom, left = (
            sign * keras.random.uniform((len(images),), 0, 0.2, seed=generator) for _ in range(4)
        )
        x_step, y_step = 1 + left + right, 1 + top + bottom
        # Resizing keeps the outer edges in place, which are half a pixel outside the first and last centres.
        x_first, y_first = (x_step - 1) / 2 - left * width, (y_step - 1) / 2 - top * height
        return _warped(images, (x_step, 0, x_first, 0, y_step, y_first), fill_mode)

    return transform


def _blurred(images, generator):
    """Gaussian of σ 0.5 to 1.5 pixels, one draw an image; Keras's own layer draws one a batch."""
    sigma = keras.random.uniform((len(images), 1, 1, 1), 0.5, 1.5, seed=generator)
    radius = min(5, min(images.shape[1:3]) - 1)  # beyond three σ; the border can be mirrored no further
    weights = ops.exp(-ops.square(ops.arange(-radius, radius + 1, dtype="float32") / sigma) / 2)
    weights = weights / ops.sum(weights, axis=-1, keepdims=True)
    for _ in range(2):
        # Along the first axis of the picture, which then changes places with the other.
        padded = ops.pad(images, ((0, 0), (radius, radius), (0, 0), (0, 0)), mode="reflect")
        length = images.shape[1]
        images = sum(weights[..., k : k + 1] * padded[:, k : k + length] for k in range(2 * radius + 1))
        images = ops.transpose(images, (0, 2, 1, 3))
    return images


_BLACK = {"fill_mode": "constant", "fill_value": 0.0}
# Name -> function that makes (probability, transform); the layers of the flips draw their own halves.
_TRANSFORMS = {
    "flip": lambda: (1.0, _drawn(keras.layers.RandomFlip("horizontal"))),
    "noise": lambda: (0.5, _noise),
    "noise_rare": lambda: (0.25, _noise),
    "rotate": lambda: (0.5, _drawn(keras.layers.RandomRotation(10 / 360, **_BLACK))),
    "brightness_contrast": lambda: (0.5, _brightness_contrast),
    "scale": lambda: (0.5, _drawn(keras.layers.RandomZoom((-0.1, 0.1), **_BLACK))),
    "shift": lambda: (0.5, _drawn(keras.layers.RandomTranslation(0.06, 0.06, **_BLACK))),
    "flip_vertical": lambda: (1.0, _drawn(keras.layers.RandomFlip("vertical"))),
    "rotate_any": lambda: (0.5, _drawn(keras.layers.RandomRotation(90 / 360, **_BLACK))),
    "rotate_30": lambda: (1.0, _drawn(keras.layers.RandomRotation(30 / 360, **_BLACK))),
    "shear": lambda: (0.5, _sheared),
    "scale_wide": lambda: (0.5, _scaled),
    "pad": lambda: (0.5, _framed(1, "constant")),
    "crop": lambda: (0.5, _framed(-1, "nearest")),
    "blur": lambda: (0.5, _blurred),
    "cutout": lambda: (0.5, _drawn(keras.layers.RandomErasing((1.0, 1.0), (0.2**2, 0.4**2), fill_value=0.0))),
}
