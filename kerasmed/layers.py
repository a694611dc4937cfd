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


# --- augmentation ----------------------------------------------------------------------------------------------------


def build_augmentation(
    names: Sequence[str], image_size: tuple[int, int]
) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """Build a recipe of `kerasmed.augment` a second time, with Keras's layers on whole batches.

    The same transforms with the same strengths and probabilities, drawn by other generators: results on one recipe
    should not depend on which library drew it. Zoom is uniform in the inverse scale here, in the scale there.

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


_BLACK = {"fill_mode": "constant", "fill_value": 0.0}
# Name -> function that makes (probability, transform); the flip's layer draws its own halves.
_TRANSFORMS = {
    "flip": lambda: (1.0, _drawn(keras.layers.RandomFlip("horizontal"))),
    "noise": lambda: (0.5, _noise),
    "noise_rare": lambda: (0.25, _noise),
    "rotate": lambda: (0.5, _drawn(keras.layers.RandomRotation(10 / 360, **_BLACK))),
    "brightness_contrast": lambda: (0.5, _brightness_contrast),
    "scale": lambda: (0.5, _drawn(keras.layers.RandomZoom((-0.1, 0.1), **_BLACK))),
    "shift": lambda: (0.5, _drawn(keras.layers.RandomTranslation(0.06, 0.06, **_BLACK))),
}
