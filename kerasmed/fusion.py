"""Image and patient data in one model: values that may be unknown, and learned weights of the sources.

Known values are standardised, unknown ones have vectors of their own, so that nothing stands for "unknown" that also
means something. A fused model takes "image" as `kerasmed.images.read` returns it and "patient" as it stands in the
table: NaN is unknown, and the standardisation is inside the saved file.
"""

from collections.abc import Sequence

import keras
import numpy as np
from keras import layers, ops

from kerasmed.models import two_layer_head


def standardisation(values) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each patient value over its known entries, for `TabularDense`.

    Args:
        values: float array or table, shape (num_rows, k): the *training* split's values, NaN where unknown.

    Returns:
        means and scales, plain lists of length k. The scale (the population's standard deviation, divisor num_known)
        is 1 of a constant value and of one that is unknown in all rows; the mean of the latter is 0.

    Raises:
        ValueError: not two-dimensional, or an infinite entry.

    Example:
        >>> standardisation(np.array([[1.0, 7.0, np.nan], [np.nan, 7.0, np.nan], [5.0, 7.0, np.nan]]))
        ([3.0, 7.0, 0.0], [2.0, 1.0, 1.0])
    """
    values = np.asarray(values, dtype="float64")
    if values.ndim != 2:
        raise ValueError(f"`values` have shape {values.shape}; expected (num_rows, k): a row an image.")
    if np.isinf(values).any():
        rows, columns = np.nonzero(np.isinf(values))
        raise ValueError(
            f"`values` are infinite in {len(rows)} places; expected numbers, or NaN where unknown. First (row, column):"
            f" {list(zip(rows[:5].tolist(), columns[:5].tolist()))}."
        )
    means, scales = [], []
    for column in values.T:
        column = column[~np.isnan(column)]
        # Not std() == 0: rounding leaves a constant column a standard deviation of 1e-17.
        varies = column.size > 0 and column.min() < column.max()
        means.append(float(column.mean()) if varies else float(column[0]) if column.size else 0.0)
        scales.append(float(column.std()) if varies else 1.0)
    return means, scales


@keras.saving.register_keras_serializable(package="kerasmed")
class TabularDense(keras.layers.Layer):
    """Dense layer on patient data in which values may be unknown, with a learned vector for each that is.

        z_j = (x_j − mean_j) / scale_j
        output = activation(b + Σ_j known_j · z_j · W_j + Σ_j (1 − known_j) · U_j)

    An unknown value neither poses as the mean, as an imputed one would, nor as a zero that means something else. While
    training, each known value counts as unknown with probability `unknown_rate`: else U would keep its random values
    where the training table is complete. Computes in float32 under every precision policy, as values in their own
    units need more digits than float16 has.

    Args:
        units: width of the output.
        means: one per value, in its unit; of `standardisation`.
        scales: one per value, above 0.
        unknown_rate: share of known values hidden while training, in [0, 1).
        activation: of the output, a name or function of Keras.
        seed: of the draws.

    Input shape: (batch, k), finite numbers, or NaN where unknown.
    Output shape: (batch, units), float32.

    Raises:
        ValueError: means and scales of unlike lengths, none, not finite, or a scale not above 0; `unknown_rate` outside
            [0, 1); an input of another number of values.
    """

    def __init__(self, units, means, scales, unknown_rate=0.1, activation="relu", *, seed=None, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.units, self.seed = int(units), seed
        self.means, self.scales = [float(mean) for mean in means], [float(scale) for scale in scales]
        if len(self.means) != len(self.scales) or not self.means:
            raise ValueError(
                f"there are {len(self.means)} `means` and {len(self.scales)} `scales`; expected one of each per value, "
                "and at least one value: take both from `standardisation`."
            )
        if not np.isfinite(self.means).all():
            raise ValueError(f"`means` are {self.means}; expected finite numbers: take them from `standardisation`.")
        unfit = [place for place, scale in enumerate(self.scales) if not 0 < scale < np.inf]
        if unfit:
            raise ValueError(
                f"`scales` at {unfit[:5]} are {[self.scales[place] for place in unfit[:5]]}; expected numbers above 0, "
                "1 for a constant value."
            )
        if not 0 <= unknown_rate < 1:
            raise ValueError(
                f"`unknown_rate` is {unknown_rate}; expected at least 0 (hide none) and below 1 (hide all)."
            )
        self.unknown_rate = float(unknown_rate)
        self.activation = keras.activations.get(activation)
        if self.unknown_rate:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        if len(input_shape) != 2 or input_shape[-1] != len(self.means):
            raise ValueError(
                f"{self.name} got shape {tuple(input_shape)}; expected (batch, {len(self.means)}): a value per mean."
            )
        shape = (len(self.means), self.units)
        self.kernel = self.add_weight(shape=shape, initializer="glorot_uniform", name="kernel")
        self.unknown = self.add_weight(shape=shape, initializer="glorot_uniform", name="unknown")
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")

    def call(self, inputs, training=False):
        values = ops.cast(inputs, "float32")
        hidden = ops.isnan(values)
        if training and self.unknown_rate:
            dropped = keras.random.uniform(ops.shape(values), seed=self.seed_generator) < self.unknown_rate
            hidden = ops.logical_or(hidden, dropped)
        means = ops.convert_to_tensor(self.means, "float32")
        # Before the arithmetic: 0 times NaN is NaN. An unknown value's z is 0.
        z = (ops.where(hidden, means, values) - means) / ops.convert_to_tensor(self.scales, "float32")
        unknown = ops.cast(hidden, "float32")
        return self.activation(ops.matmul(z, self.kernel) + ops.matmul(unknown, self.unknown) + self.bias)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "means": self.means,
            "scales": self.scales,
            "unknown_rate": self.unknown_rate,
            "activation": keras.activations.serialize(self.activation),
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="kerasmed")
class SauceLayer(keras.layers.Layer):
    """Mix vectors of several sources with learned weights, which are each sample's own.

        a = softmax(Dense_k(tanh(Dense_hidden([x_1, …, x_k]))))
        output = Σ_i a_i · x_i

    The weights tell how much each source counted. They also share out the gradient: a source whose weight goes to 0 is
    no longer trained, see `fused_classifier`. Softmax and sum are in float32 under every precision policy.

    Args:
        hidden: width of the score network's hidden layer.

    Input shape: list of k ≥ 2 tensors (batch, d), all of one width.
    Output shape: (batch, d), and the weights, (batch, k), float32, which sum to 1.

    Raises:
        ValueError: fewer than two sources, or of unlike widths.
    """

    def __init__(self, hidden: int = 64, **kwargs):
        super().__init__(**kwargs)
        self.hidden = int(hidden)

    def build(self, input_shape):
        if not isinstance(input_shape[0], (list, tuple)) or len(input_shape) < 2:
            raise ValueError(
                f"{self.name} got shape {input_shape}; expected a list of at least two tensors (batch, d)."
            )
        if any(len(shape) != 2 for shape in input_shape) or len({shape[-1] for shape in input_shape}) > 1:
            raise ValueError(
                f"{self.name} got shapes {[tuple(shape) for shape in input_shape]}; expected (batch, d) with one d: "
                "put a Dense of the same units before each."
            )
        num_sources, width = len(input_shape), input_shape[0][-1]
        self.score_hidden = layers.Dense(self.hidden, activation="tanh", dtype=self.dtype_policy, name="score_hidden")
        self.score = layers.Dense(num_sources, dtype="float32", name="score")
        self.score_hidden.build((None, num_sources * width))
        self.score.build((None, self.hidden))

    def call(self, inputs):
        weights = ops.softmax(self.score(self.score_hidden(ops.concatenate(inputs, axis=-1))), axis=-1)
        stacked = ops.cast(ops.stack(inputs, axis=1), "float32")
        return ops.cast(ops.sum(weights[..., None] * stacked, axis=1), self.compute_dtype), weights

    def get_config(self):
        return {**super().get_config(), "hidden": self.hidden}


def fused_classifier(
    features: keras.Model,
    num_labels: int,
    *,
    means: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    residual: bool = False,
    units: int = 256,
    dropout: float = 0.5,
    name: str = "fused_classifier",
) -> keras.Model:
    """Put the head of yes-or-no labels on an image's features, mixed with patient data if means and scales are given.

        without patient data:  two_layer_head(image_dense(pooled))
        with:                  two_layer_head(sauce(image_dense(pooled), patient_dense(patient)))
        and the residual:      two_layer_head(fused = sauce(…) + image_residual(pooled))

    The residual keeps a path from the head to the image that the sauce's weights cannot close: where patient data are
    the quicker teacher, the weights go to them, and then neither the image's layers are trained nor does Grad-CAM find
    a gradient to draw.

    Args:
        features: model, uint8 "image" (batch, height, width, 1) -> (batch, num_features), from
            `kerasmed.backbones.build` or `kerasmed.models.max_pooled`.
        num_labels: number of labels.
        means, scales: of the patient's values, from `standardisation`; None for a model of the image alone.
        residual: add `Dense(units, relu)` of the pooled features to the sauce's output.
        units: width of all dense layers.
        dropout: of the head.
        name: the model's.

    Returns:
        Uncompiled model that shares the extractor's layers, of the inputs "image" and, with means, "patient" (batch, k)
        float32 with NaN where unknown: a list in this order, or a dict by name. -> float32 probabilities (batch,
        num_labels), not summing to 1.

    Raises:
        ValueError: means without scales or the reverse, a residual without them, or `features` of another make.
    """
    if (means is None) != (scales is None):
        raise ValueError(f"`means` are {means} and `scales` {scales}; expected both, or neither for the image alone.")
    if residual and means is None:
        raise ValueError("`residual` is true without `means`; there is nothing that it could be added to.")
    inputs, pooled = list(features.inputs), features.outputs[0]
    if [tensor.name for tensor in inputs] != ["image"] or len(pooled.shape) != 2:
        raise ValueError(
            f"{features.name} takes {[tensor.name for tensor in inputs]} and returns shape {tuple(pooled.shape)}; "
            "expected one input 'image' and an output (batch, num_features)."
        )
    x = layers.Dense(units, activation="relu", name="image_dense")(pooled)
    if means is not None:
        inputs.append(keras.Input((len(means),), dtype="float32", name="patient"))
        patient = TabularDense(units, means, scales, name="patient_dense")(inputs[-1])
        x, _ = SauceLayer(name="sauce")([x, patient])
    if residual:
        shortcut = layers.Dense(units, activation="relu", name="image_residual")(pooled)
        x = layers.Add(name="fused")([x, shortcut])
    return keras.Model(inputs, two_layer_head(x, num_labels, units=units, dropout=dropout), name=name)
