"""The eight networks of earlier work on small scans with yes-or-no labels, rebuilt layer by layer.

Five are convolutional, one reads a picture's rows as a sequence, two are dense; all learn from scratch.
"""

import keras
from keras import layers

from kerasmed import models
from kerasmed.layers import BATCH_NORM_MOMENTUM

SMALLEST_SIDE = 32  # pixels, the smaller size of the earlier work; below it, most windows would hold padding only


def build(name: str, image_size: tuple[int, int], num_labels: int, *, head: str = "binary") -> keras.Model:
    """Build one of the eight networks.

    In order, with the number of weights at 64×64 and 3 labels ("n(k)": n channels of k×k, stride 1; pools are 2×2
    where no size is given; "norm" is batch normalisation of momentum 0.9; decimals are dropout):

        cnn1   26,217,987  conv 256(3), pool 3; dense 256
        cnn2       81,503  conv 25(5), pool; conv 50(5, stride 2), pool, norm; conv 70(3, stride 2), pool, norm;
                           dense 100; dense 100, 0.25
        cnn3   12,495,328  conv 50(3), conv 75(3), pool, 0.25; conv 125(3), pool, 0.25; dense 500, 0.4; dense 250, 0.3
        cnn4      121,731  conv 32(5), pool 5; conv 64(5), pool 5; dense 1024, 0.8
        cnn5    9,007,843  for f in 32, 64, 128: conv f(3) same, conv f(3), pool, 0.2; then conv 512(5) same,
                           conv 512(5), pool 4, 0.2; dense 1024, 0.2
        lstm      238,851  LSTM 128 of the rows, putting out a sequence; LSTM 128 of that; dense 64
        fcnn1   1,115,395  dense 256; dense 256
        fcnn2   1,075,235  dense 256; dense 100, 0.5, norm

    Convolutions and dense layers end in ReLU. Unless marked "same", a convolution or pool is "valid" where its input
    is at least as large as its window, and "same" where it would leave nothing. At 64×64 that is cnn5's last pool; at
    32×32 cnn2's last convolution and pool, cnn4's last pool, and cnn5's last convolution and pool.

    Args:
        name: one of `NAMES`.
        image_size: (height, width) in pixels, each at least 32. The weights of cnn1, cnn3 and the dense networks grow
            with the area.
        num_labels: number of labels, at least 1.
        head: "binary" or "categorical", of `kerasmed.models.label_head`.

    Returns:
        Uncompiled model, uint8 (batch, height, width, 1) -> float32 (batch, num_labels), the probability that a label
        is present. The pixels reach the network in [0, 1]. lstm and the dense networks have no feature maps, so
        `kerasmed.gradcam` refuses them.

    Raises:
        ValueError: unknown name or head, a side below 32 pixels, or no labels.
    """
    if name not in _NETWORKS:
        raise ValueError(f"network {name!r} is unknown; known are {', '.join(NAMES)}.")
    if len(image_size) != 2 or min(image_size) < SMALLEST_SIDE:
        raise ValueError(
            f"`image_size` is {tuple(image_size)}; expected (height, width) of at least {SMALLEST_SIDE} pixels each. "
            "Read the images at a larger size."
        )
    inputs = keras.Input((*image_size, 1), dtype="uint8", name="image")
    x = inputs
    # Before the scaling: its output would be a map (height, width, 1), which Grad-CAM would take for features.
    if name == "lstm":
        x = layers.Reshape(tuple(image_size), name="rows")(x)
    elif name.startswith("fcnn"):
        x = layers.Flatten(name="flatten")(x)
    x = layers.Rescaling(1 / 255, name="preprocess")(x)
    x = _NETWORKS[name](x)
    return keras.Model(inputs, models.label_head(x, num_labels, loss=head), name=name)


def _padding(x, window):
    return "valid" if min(x.shape[1:3]) >= window else "same"


def _conv(x, filters, kernel_size, name, *, strides=1, padding=None):
    padding = padding or _padding(x, kernel_size)
    return layers.Conv2D(filters, kernel_size, strides, padding=padding, activation="relu", name=f"{name}_conv")(x)


def _pool(x, size, name):
    return layers.MaxPooling2D(size, padding=_padding(x, size), name=f"{name}_pool")(x)


def _norm(x, name):
    return layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, name=f"{name}_bn")(x)


def _dropout(x, rate, name):
    return layers.Dropout(rate, name=f"{name}_dropout")(x)


def _dense(x, units, name):
    return layers.Dense(units, activation="relu", name=name)(x)


def _cnn1(x):
    x = _pool(_conv(x, 256, 3, "block1"), 3, "block1")
    return _dense(layers.Flatten(name="flatten")(x), 256, "dense1")


def _cnn2(x):
    x = _pool(_conv(x, 25, 5, "block1"), 2, "block1")
    x = _norm(_pool(_conv(x, 50, 5, "block2", strides=2), 2, "block2"), "block2")
    x = _norm(_pool(_conv(x, 70, 3, "block3", strides=2), 2, "block3"), "block3")
    x = _dense(layers.Flatten(name="flatten")(x), 100, "dense1")
    return _dropout(_dense(x, 100, "dense2"), 0.25, "dense2")


def _cnn3(x):
    x = _conv(_conv(x, 50, 3, "block1_a"), 75, 3, "block1_b")
    x = _dropout(_pool(x, 2, "block1"), 0.25, "block1")
    x = _dropout(_pool(_conv(x, 125, 3, "block2"), 2, "block2"), 0.25, "block2")
    x = _dropout(_dense(layers.Flatten(name="flatten")(x), 500, "dense1"), 0.4, "dense1")
    return _dropout(_dense(x, 250, "dense2"), 0.3, "dense2")


def _cnn4(x):
    x = _pool(_conv(x, 32, 5, "block1"), 5, "block1")
    x = _pool(_conv(x, 64, 5, "block2"), 5, "block2")
    return _dropout(_dense(layers.Flatten(name="flatten")(x), 1024, "dense1"), 0.8, "dense1")


def _cnn5(x):
    for number, (filters, kernel_size, pool) in enumerate([(32, 3, 2), (64, 3, 2), (128, 3, 2), (512, 5, 4)], start=1):
        block = f"block{number}"
        x = _conv(x, filters, kernel_size, f"{block}_a", padding="same")
        x = _conv(x, filters, kernel_size, f"{block}_b")
        x = _dropout(_pool(x, pool, block), 0.2, block)
    return _dropout(_dense(layers.Flatten(name="flatten")(x), 1024, "dense1"), 0.2, "dense1")


def _lstm(x):
    x = layers.LSTM(128, return_sequences=True, name="lstm1")(x)
    return _dense(layers.LSTM(128, name="lstm2")(x), 64, "dense1")


def _fcnn1(x):
    return _dense(_dense(x, 256, "dense1"), 256, "dense2")


def _fcnn2(x):
    x = _dense(_dense(x, 256, "dense1"), 100, "dense2")
    return _norm(_dropout(x, 0.5, "dense2"), "dense2")


_NETWORKS = {
    "cnn1": _cnn1,
    "cnn2": _cnn2,
    "cnn3": _cnn3,
    "cnn4": _cnn4,
    "cnn5": _cnn5,
    "lstm": _lstm,
    "fcnn1": _fcnn1,
    "fcnn2": _fcnn2,
}
NAMES = tuple(_NETWORKS)
