"""Several modalities in one model, of which a case may lack some.

A modality's series become one vector; a layer then copes with those that are missing, by a strategy:

    zero      a missing vector becomes zero
    neutral   a vector takes its place that is learnt, one a modality
    dynamic   each vector is weighed by a softmax over those available, so that a missing one weighs nothing
    pseudo    a network that has seen complete cases predicts it from those available

`ModalityDropout` hides some of what is there while training, so that a model meets what it will have to do without. In
every layer a missing modality's values, NaN included, change neither the output nor a gradient, not by a bit: they are
taken out by `where` before any arithmetic.
"""

from collections.abc import Mapping, Sequence

import keras
import numpy as np
from keras import layers, ops

from kerasmed.layers import masked_softmax
from kerasmed.models import attention_branch

ARCHITECTURES = ("joint", "grouped", "late")
STRATEGIES = ("zero", "neutral", "dynamic", "pseudo")
_LEAST_SHARE = 0.01  # of the vectors' mean square, that a modality's variance is taken to have


def refuse_empty(available) -> None:
    """Raise ValueError where a row has no modality, naming the rows; `available` is bool (batch, M)."""
    available = np.asarray(available, bool)
    empty = np.flatnonzero(~available.any(axis=-1))
    if len(empty):
        raise ValueError(
            f"`available` marks no modality for {len(empty)} of {len(available)} rows; fusion needs at least one. Drop "
            f"them first. First rows: {empty[:5].tolist()}."
        )


class _OfModalities(keras.layers.Layer):
    """What layers of [vectors, available] share: checks of what comes in."""

    def __call__(self, inputs, *args, **kwargs):
        # A graph cannot refuse a row; arrays, as in a first try or a test, can be looked at.
        if isinstance(inputs, (list, tuple)) and len(inputs) > 1 and isinstance(inputs[1], np.ndarray):
            refuse_empty(inputs[1])
        return super().__call__(inputs, *args, **kwargs)

    def _shape(self, input_shape) -> tuple:
        """(M, D) of the vectors, or ValueError."""
        shapes = [tuple(shape) for shape in input_shape if isinstance(shape, (list, tuple))]
        if [len(shape) for shape in shapes[:2]] != [3, 2] or any(shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(
                f"{self.name} got shape {input_shape}; expected a list of the modalities' vectors, (batch, M, D), and "
                "which are available, (batch, M)."
            )
        return shapes[0][1:]

    def compute_output_shape(self, input_shape):
        return tuple(input_shape[0])


def _there(vectors, available):
    """The vectors with zeros where the modality is missing, and `available` as bool."""
    available = ops.cast(available, "bool")
    return ops.where(available[..., None], vectors, ops.zeros_like(vectors)), available


@keras.saving.register_keras_serializable(package="kerasmed")
class ModalityDropout(keras.layers.Layer):
    """Hide modalities that are there, each with a probability, while training; at least one always stays.

    Where all would be hidden, one of them is drawn to stay. Nothing is hidden in inference, and what is missing stays
    missing.

    Args:
        rate: probability, in [0, 1).
        seed: of the draws.

    Input shape: available (batch, M), bool or numbers of which 0 is missing.
    Output shape: the same, bool.

    Raises:
        ValueError: `rate` outside [0, 1).

    Source: Neverova et al. 2016, arXiv:1501.00102 (ModDrop), section 3.
    """

    def __init__(self, rate: float, *, seed=None, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` is {rate}; expected at least 0 (hide none) and below 1 (hide all but one).")
        self.rate, self.seed = float(rate), seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=False):
        available = ops.cast(inputs, "bool")
        if not training or not self.rate:
            return available
        draws = ops.where(available, keras.random.uniform(ops.shape(available), seed=self.seed_generator), -1.0)
        survives = ops.logical_or(draws >= self.rate, draws == ops.max(draws, axis=-1, keepdims=True))
        return ops.logical_and(available, survives)

    def compute_output_spec(self, inputs, training=False):
        return keras.KerasTensor(inputs.shape, dtype="bool")

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable(package="kerasmed")
class ZeroFilling(_OfModalities):
    """Put zeros in the place of a missing modality's vector.

    Input shape: list of the vectors (batch, M, D) and available (batch, M): bool, or numbers of which 0 is missing.
    Output shape: (batch, M, D).

    Raises:
        ValueError: inputs of other shapes; or, of NumPy arrays, rows without any modality, by their index.
    """

    def build(self, input_shape):
        self._shape(input_shape)

    def call(self, inputs):
        return _there(ops.cast(inputs[0], self.compute_dtype), inputs[1])[0]


@keras.saving.register_keras_serializable(package="kerasmed")
class NeutralVectors(_OfModalities):
    """Put a learned vector, one a modality, in the place of a missing modality's vector.

    They begin at zero, as which they would do what `ZeroFilling` does.

    Input and output shape, errors: as of `ZeroFilling`.
    """

    def build(self, input_shape):
        self.neutral = self.add_weight(shape=self._shape(input_shape), initializer="zeros", name="neutral")

    def call(self, inputs):
        vectors, available = _there(ops.cast(inputs[0], self.compute_dtype), inputs[1])
        return ops.where(available[..., None], vectors, ops.cast(self.neutral, self.compute_dtype))


@keras.saving.register_keras_serializable(package="kerasmed")
class DynamicWeights(_OfModalities):
    """Weigh the modalities that are available, by what each of them shows, for each group of targets apart.

        s_mg = u_mgᵀ tanh(V_m x_m) + b_mg
        a_mg = exp(s_mg) / Σ_{m available} exp(s_mg)

    A missing modality weighs exactly 0 and the others proportionally more: a modality's score depends on its own vector
    alone, so the ratio of two weights does not depend on what else is there. In float32 under every precision policy.

    Args:
        units: width of V.
        num_groups: G, how many weightings.

    Input shape: as of `ZeroFilling`.
    Output shape: (batch, G, M), float32, which sum to 1 over the modalities available; 0 in a row without any.

    Raises:
        ValueError: as of `ZeroFilling`, or fewer than one unit or group.
    """

    def __init__(self, units: int = 64, num_groups: int = 1, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        if min(units, num_groups) < 1:
            raise ValueError(f"`units` is {units} and `num_groups` {num_groups}; expected at least 1 of each.")
        self.units, self.num_groups = int(units), int(num_groups)

    def build(self, input_shape):
        count, width = self._shape(input_shape)
        self.kernel = self.add_weight(shape=(count, width, self.units), initializer="glorot_uniform", name="kernel")
        self.score = self.add_weight(
            shape=(count, self.units, self.num_groups), initializer="glorot_uniform", name="score"
        )
        self.bias = self.add_weight(shape=(self.num_groups, count), initializer="zeros", name="bias")

    def call(self, inputs):
        vectors, available = _there(ops.cast(inputs[0], "float32"), inputs[1])
        hidden = ops.tanh(ops.einsum("bmd,mdu->bmu", vectors, self.kernel))
        scores = ops.einsum("bmu,mug->bgm", hidden, self.score) + self.bias
        return masked_softmax(scores, ops.broadcast_to(available[:, None], ops.shape(scores)))

    def compute_output_shape(self, input_shape):
        return (input_shape[0][0], self.num_groups, input_shape[0][1])

    def get_config(self):
        return {**super().get_config(), "units": self.units, "num_groups": self.num_groups}


@keras.saving.register_keras_serializable(package="kerasmed")
class PseudoModality(_OfModalities):
    """Predict a missing modality's vector from those of the others.

        x̂ = W₂ relu(W₁ [x_1, …, x_M, available]),   a missing x_m being 0

    stands in the place of what is missing. It learns from complete rows by masking: while training, some of their
    modalities are hidden by chance, at least one and never all, and the squared error of what is predicted for them,
    over the variance of the modality's vectors in the batch, is added to the loss. That error moves W alone, not the
    vectors, which else would become easy to predict rather than telling. What `ModalityDropout` has hidden in
    `available` but not in `present` can be learnt from.

    Args:
        units: width of the hidden layer.
        loss_weight: of the error.
        seed: of the masking.

    Input shape: list of the vectors (batch, M, D), available (batch, M) and, optionally, present (batch, M), which is
        `available` where it is not given.
    Output shape: (batch, M, D).

    Raises:
        ValueError: as of `ZeroFilling`, fewer than two modalities or one unit, or a negative weight.
    """

    def __init__(self, units: int = 128, loss_weight: float = 1.0, *, seed=None, **kwargs):
        super().__init__(**kwargs)
        if units < 1 or not loss_weight >= 0:
            raise ValueError(
                f"`units` is {units} and `loss_weight` {loss_weight}; expected at least 1 unit, and a weight from 0."
            )
        self.units, self.loss_weight, self.seed = int(units), float(loss_weight), seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        count, width = self._shape(input_shape)
        if count < 2:
            raise ValueError(
                f"{self.name} got {count} modality; expected at least 2, one to be predicted from another."
            )
        self.hidden = layers.Dense(self.units, activation="relu", dtype=self.dtype_policy, name="hidden")
        self.predicted = layers.Dense(count * width, dtype=self.dtype_policy, name="predicted")
        self.hidden.build((None, count * width + count))
        self.predicted.build((None, self.units))

    def call(self, inputs, training=False):
        vectors, available = ops.cast(inputs[0], self.compute_dtype), inputs[1]
        known, available = _there(vectors, available)
        if training and self.loss_weight:
            self.add_loss(self.loss_weight * self._error(vectors, inputs[2] if len(inputs) > 2 else available))
        return ops.where(available[..., None], known, self._predict(known, available))

    def _predict(self, known, available):
        flags = ops.cast(available, self.compute_dtype)
        flat = ops.reshape(known, (-1, known.shape[1] * known.shape[2]))
        return ops.reshape(self.predicted(self.hidden(ops.concatenate([flat, flags], axis=-1))), ops.shape(known))

    def _error(self, vectors, present):
        """Squared error over variance, mean over the hidden modalities of complete rows; 0 where no row is complete."""
        truth, present = _there(vectors, present)
        truth = ops.stop_gradient(truth)
        complete = ops.all(present, axis=-1, keepdims=True)
        draws = keras.random.uniform(ops.shape(present), seed=self.seed_generator)
        kept = ops.logical_or(draws >= 0.5, draws == ops.max(draws, axis=-1, keepdims=True))
        kept = ops.logical_and(kept, draws != ops.min(draws, axis=-1, keepdims=True))
        told = ops.cast(self._predict(_there(truth, kept)[0], kept), "float32")
        truth, rows = ops.cast(truth, "float32"), ops.cast(complete, "float32")[..., None]
        count = ops.maximum(ops.sum(rows), 1.0)
        mean = ops.sum(rows * truth, axis=0, keepdims=True) / count
        # Of each modality, all features together. Where nothing varies, as behind a dead branch or in a single row, an
        # error must not outgrow all others.
        spread = ops.sum(rows * ops.square(truth - mean), axis=(0, 2)) / count
        least = _LEAST_SHARE * ops.sum(rows * ops.square(truth)) / (count * spread.shape[0])
        spread = ops.maximum(spread, least + 1e-6)
        errors = ops.sum(ops.square(told - truth), axis=-1) / spread
        hidden = ops.cast(ops.logical_and(complete, ops.logical_not(kept)), "float32") * ops.cast(count > 1, "float32")
        return ops.sum(hidden * errors) / ops.maximum(ops.sum(hidden), 1.0)

    def get_config(self):
        config = {"units": self.units, "loss_weight": self.loss_weight, "seed": self.seed}
        return {**super().get_config(), **config}


# --- models ----------------------------------------------------------------------------------------------------------


def graded_fusion(
    groups: Mapping[str, int],
    modalities: Sequence[str],
    num_slices: int | None,
    num_features: int,
    *,
    architecture: str = "joint",
    strategy: str = "zero",
    modality_dropout: float = 0.0,
    num_grades: int = 3,
    width: int = 128,
    attention_units: int = 128,
    units: int = 128,
    dropout: float = 0.5,
    l2: float = 0.0,
    moments: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> keras.Model:
    """Build a classifier of graded targets that reads several modalities as vectors of their slices.

    Each modality has a branch of its own, as in `kerasmed.models.attention_classifier`, that makes one vector of its
    slices; `strategy` copes with those missing; then, by architecture:

        joint    slices are reweighted each by itself and averaged; convolutions over the modalities; one network
        grouped  gated attention over slices; convolutions over the modalities; a network a group of targets
        late     gated attention over slices; a network a modality, whose logits are averaged over the modalities

    With "dynamic", joint and grouped have each vector weighed by M times its weight, so that equal weights change
    nothing, and late has the logits weighed, with weights of their own for each group. With the other strategies what
    fills a missing vector goes through the networks as any other does.

    "logits" is (batch, number of targets, num_grades) and "probabilities" their softmax over the grades. A modality is
    there if `available` says so and it has a slice. Values of one that is not change neither the output nor a gradient;
    a row that has none gets NaN, as a graph cannot refuse it (`refuse_empty` can).

    Args:
        groups: name -> number of targets, in the order of the targets; names are Python identifiers.
        modalities: names of the branches, Python identifiers, in the order of the inputs.
        num_slices: S, places for slices; None where it may differ by batch.
        num_features: D, length of a slice's vector.
        architecture: of `ARCHITECTURES`.
        strategy: of `STRATEGIES`.
        modality_dropout: of `ModalityDropout`.
        num_grades: classes of each target.
        width: of a modality's vector.
        attention_units: of the attention over slices.
        units: width of the convolutions and of the networks' hidden layers.
        dropout: share of features, and of what the networks' layers take, that is dropped while training, in [0, 1).
        l2: penalty of squared weights of convolutions and networks; the branches and the strategy have none.
        moments: of `attention_classifier`, by modality.

    Returns:
        Uncompiled model of the dict of "slices" (batch, M, S, D) float32, "slice_mask" (batch, M, S) bool and
        "available" (batch, M) bool -> float32 probabilities (batch, number of targets, num_grades).

    Raises:
        ValueError: an unknown architecture or strategy, names that are no identifiers, or sizes below 1.
    """
    _refuse_unfit(groups, modalities, num_slices, num_features, architecture, strategy, num_grades)
    count, targets = len(modalities), sum(groups.values())
    slices = keras.Input((count, num_slices, num_features), dtype="float32", name="slices")
    mask = keras.Input((count, num_slices), dtype="bool", name="slice_mask")
    available = keras.Input((count,), dtype="bool", name="available")
    present = ops.logical_and(available, ops.any(mask, axis=-1))
    vectors = []
    for place, name in enumerate(modalities):
        vector, _ = attention_branch(
            slices[:, place],
            ops.logical_and(mask[:, place], available[:, place, None]),
            name,
            width=width,
            units=attention_units,
            dropout=dropout,
            moments=(moments or {}).get(name),
            competing=architecture != "joint",
        )
        vectors.append(vector)
    vectors = ops.stack(vectors, axis=1)
    kept = ModalityDropout(modality_dropout, name="hidden_modalities")(present)
    weights = None
    if strategy == "dynamic":
        weights = DynamicWeights(units, len(groups) if architecture == "late" else 1, name="strategy")([vectors, kept])
        vectors = ZeroFilling(name="strategy_zero")([vectors, kept])
    elif strategy == "pseudo":
        vectors = PseudoModality(units, name="strategy")([vectors, kept, present])
    else:
        vectors = (ZeroFilling if strategy == "zero" else NeutralVectors)(name="strategy")([vectors, kept])

    penalty = {"kernel_regularizer": keras.regularizers.L2(l2) if l2 else None}

    def network(x, name, outputs):
        x = layers.Dropout(dropout, name=f"{name}_thinned")(x)
        x = layers.Dense(units, activation="relu", name=f"{name}_hidden", **penalty)(x)
        x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
        x = layers.Dense(outputs * num_grades, dtype="float32", name=f"{name}_scores", **penalty)(x)
        return layers.Reshape((outputs, num_grades), dtype="float32", name=f"{name}_grades")(x)

    if architecture == "late":
        logits = ops.stack(
            [network(vectors[:, place], f"{name}network", targets) for place, name in enumerate(modalities)], axis=1
        )
        if weights is None:
            logits = ops.mean(logits, axis=1)
        else:
            group_of = np.repeat(np.arange(len(groups)), list(groups.values()))
            logits = ops.einsum("btm,bmtg->btg", ops.take(weights, group_of, axis=1), logits)
    else:
        if weights is not None:
            vectors = vectors * ops.cast(count * ops.moveaxis(weights, 1, 2), vectors.dtype)
        x = layers.Conv1D(units, count, padding="same", activation="relu", name="fusion_mix", **penalty)(vectors)
        x = layers.Conv1D(units, count, activation="relu", name="fusion_join", **penalty)(x)
        x = layers.Flatten(name="fusion_flat")(x)
        if architecture == "joint":
            logits = network(x, "network", targets)
        else:
            logits = [network(x, f"{name}network", number) for name, number in groups.items()]
            logits = (
                layers.Concatenate(axis=1, dtype="float32", name="groups")(logits) if len(logits) > 1 else logits[0]
            )
    unanswered = ops.where(ops.any(present, axis=-1), 0.0, np.nan)[:, None, None]
    logits = layers.Add(dtype="float32", name="logits")([logits, unanswered])
    told = layers.Activation("softmax", dtype="float32", name="probabilities")(logits)
    inputs = {"slices": slices, "slice_mask": mask, "available": available}
    return keras.Model(inputs, told, name=f"{architecture}_{strategy}")


def strategy_parts(model: keras.Model) -> keras.Model:
    """Take out of a `graded_fusion` what its strategy goes by and what it makes of it.

    Args:
        model: from `graded_fusion`, trained or loaded.

    Returns:
        Uncompiled model that shares the weights, of the same inputs -> dict of "vectors", the modalities' own (batch,
        M, D), which say nothing where a modality is missing, and "coped": for "dynamic" the weights (batch, G, M), else
        the vectors with what fills those missing (batch, M, D).

    Raises:
        ValueError: a model of another make.
    """
    found = {layer.name: layer for layer in model.layers}.get("strategy")
    if not isinstance(found, _OfModalities):
        raise ValueError(f"the model {model.name!r} has no layer 'strategy'; expected one of `graded_fusion`.")
    return keras.Model(model.inputs, {"vectors": found.input[0], "coped": found.output}, name=f"{model.name}_parts")


def learn_pseudo(
    model: keras.Model,
    vectors: np.ndarray,
    *,
    epochs: int = 60,
    learning_rate: float = 0.003,
    batch_size: int = 32,
    seed: int = 0,
) -> list[float]:
    """Teach the cross-modal network of a trained `graded_fusion` anew, all else as it is.

    While the model learnt, its vectors moved and were thinned by dropout: little of them could be predicted. Now they
    stand still: the network begins again and learns by masking from those of complete cases.

    Args:
        model: of strategy "pseudo"; its layer "strategy" is changed in place.
        vectors: shape (num_cases, M, D): "vectors" of `strategy_parts` of complete *training* cases.
        epochs: how many.
        learning_rate: of Adam, falling as a cosine.
        batch_size: cases a step.
        seed: of the masking and of the cases' order.

    Returns:
        Mean error of each epoch: squared error over variance, so 1 is what the mean vector would have.

    Raises:
        ValueError: a model of another strategy, one whose `loss_weight` is 0, or no case.
    """
    layer = {layer.name: layer for layer in model.layers}.get("strategy")
    if not isinstance(layer, PseudoModality) or not layer.loss_weight or not len(vectors):
        raise ValueError(
            f"{model.name!r} copes by {type(layer).__name__} and there are {len(vectors)} complete cases; expected a "
            "model of strategy 'pseudo' with a `loss_weight`, and at least one case."
        )
    for dense in (layer.hidden, layer.predicted):
        dense.kernel.assign(dense.kernel_initializer(dense.kernel.shape, dense.kernel.dtype))
        dense.bias.assign(ops.zeros(dense.bias.shape, dense.bias.dtype))
    layer.seed_generator.state.assign(np.array([seed, 0], "uint32"))
    inputs = [keras.Input(vectors.shape[1:]), keras.Input(vectors.shape[1:2], dtype="bool")]
    learner = keras.Model(inputs, layer(inputs))
    steps = epochs * -(-len(vectors) // batch_size)
    learner.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)))
    shuffled = vectors[np.random.default_rng(seed).permutation(len(vectors))]
    present = np.ones(shuffled.shape[:2], bool)
    # The masks are drawn anew in every step, so the order need not be.
    history = learner.fit([shuffled, present], batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
    return history.history["loss"]


def _refuse_unfit(groups, modalities, num_slices, num_features, architecture, strategy, num_grades) -> None:
    for name, value, known in (
        ("architecture", architecture, ARCHITECTURES),
        ("strategy", strategy, STRATEGIES),
    ):
        if value not in known:
            raise ValueError(f"`{name}` is {value!r}; expected one of {', '.join(known)}.")
    unfit = [name for name, number in groups.items() if not str(name).isidentifier() or number < 1]
    if unfit or not groups:
        raise ValueError(
            f"`groups` are {dict(groups)}; expected at least one, a name like 'canal' -> a number of targets from 1. "
            f"First unfit: {unfit[:5]}."
        )
    names = list(modalities)
    if not names or len(set(names)) < len(names) or not all(str(name).isidentifier() for name in names):
        raise ValueError(f"`modalities` are {names}; expected at least one, names like 'axial', each but once.")
    if set(names) & set(groups):
        raise ValueError(f"{sorted(set(names) & set(groups))} are names of modalities and of groups; take others.")
    if min(1 if num_slices is None else num_slices, num_features) < 1 or num_grades < 2:
        raise ValueError(
            f"`num_slices` is {num_slices}, `num_features` {num_features} and `num_grades` {num_grades}; expected at "
            "least 1 (or None), 1 and 2."
        )
