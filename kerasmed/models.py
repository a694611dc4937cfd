"""Model builders: grey uint8 pixels in, class probabilities out; and one of slices that are vectors already.

Every builder of images returns an uncompiled functional model whose input is `uint8`, shape `(height, width, 1)`, and
whose preprocessing is a layer of the model, so that a saved `.keras` file takes the pixels that `kerasmed.images.read`
returns. The head is a layer named `logits`, in float32, and then the activation, named `probabilities`.
"""

from collections.abc import Mapping, Sequence

import keras
import numpy as np
from keras import layers, ops

from kerasmed.layers import BATCH_NORM_MOMENTUM, GatedAttentionPooling

LABEL_LOSSES = ("binary", "categorical")
FIVE_BLOCK_SIDE = 63  # pixels, of which five blocks leave one position


def classification_head(features, num_classes: int, *, dropout: float = 0.0, activation: str = "softmax"):
    """Append dropout, `Dense(num_classes, name="logits")` and the activation `probabilities`, both in float32.

    Args:
        features: tensor, shape (batch, num_features).
        num_classes: number of outputs, at least 1 (at least 2 for softmax).
        dropout: share of features dropped while training, in [0, 1).
        activation: "softmax" (multi-class) or "sigmoid" (multi-label).

    Returns:
        Tensor of probabilities, shape (batch, num_classes).
    """
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(
            f"`activation` is {activation!r}; expected 'softmax' (multi-class) or 'sigmoid' (multi-label)."
        )
    if num_classes < (2 if activation == "softmax" else 1):
        raise ValueError(
            f"`num_classes` is {num_classes}; a {activation} head needs at least {2 if activation == 'softmax' else 1}."
        )
    if dropout:
        features = layers.Dropout(dropout, name="head_dropout")(features)
    logits = layers.Dense(num_classes, dtype="float32", name="logits")(features)
    return layers.Activation(activation, dtype="float32", name="probabilities")(logits)


def label_head(features, num_labels: int, *, loss: str = "binary"):
    """Append the head of yes-or-no labels: a layer "logits" and its sigmoid `probabilities`, all in float32.

    "binary" gives a label one score, its logit. "categorical" gives it two, s₁ for present and s₀ for absent, as where
    each label is a softmax over two classes that trains with categorical cross-entropy. The logit is then s₁ − s₀, as

        softmax(s₀, s₁)₁ = exp(s₁) / (exp(s₀) + exp(s₁)) = sigmoid(s₁ − s₀)

    and the pair's categorical cross-entropy is the binary cross-entropy of the difference. So
    `keras.losses.BinaryCrossentropy(from_logits=True)` trains both; what differs is the number of weights, and that a
    step moves two scores apart where it moved one.

    Args:
        features: tensor, shape (batch, num_features).
        num_labels: number of labels, at least 1.
        loss: "binary": layer `Dense(num_labels, name="logits")`; "categorical": two such layers, "scores_present" and
            "scores_absent", and their difference "logits".

    Returns:
        Tensor of probabilities that the label is present, shape (batch, num_labels), not summing to 1.

    Raises:
        ValueError: unknown loss, or no labels.
    """
    if loss not in LABEL_LOSSES:
        raise ValueError(
            f"`loss` is {loss!r}; expected 'binary' (a score a label) or 'categorical' (two: present and absent)."
        )
    if num_labels < 1:
        raise ValueError(f"`num_labels` is {num_labels}; a head needs at least 1.")
    if loss == "binary":
        return classification_head(features, num_labels, activation="sigmoid")
    present = layers.Dense(num_labels, dtype="float32", name="scores_present")(features)
    absent = layers.Dense(num_labels, dtype="float32", name="scores_absent")(features)
    logits = layers.Subtract(dtype="float32", name="logits")([present, absent])
    return layers.Activation("sigmoid", dtype="float32", name="probabilities")(logits)


def two_layer_head(features, num_labels: int, *, units: int = 256, dropout: float = 0.5):
    """Append the head of yes-or-no labels that has two hidden layers: `head_dense1`, dropout, `head_dense2`, "logits".

    Args:
        features: tensor, shape (batch, num_features).
        num_labels: number of labels, at least 1.
        units: width of both hidden layers, which are `Dense(units, relu)`.
        dropout: share of the first one's outputs dropped while training, in [0, 1).

    Returns:
        Tensor of probabilities that the label is present, float32, shape (batch, num_labels), not summing to 1.

    Raises:
        ValueError: no labels.
    """
    x = layers.Dense(units, activation="relu", name="head_dense1")(features)
    if dropout:
        x = layers.Dropout(dropout, name="head_dropout")(x)
    x = layers.Dense(units, activation="relu", name="head_dense2")(x)
    return classification_head(x, num_labels, activation="sigmoid")


def _conv_bn(x, filters, name, *, kernel_size=3, strides=1, relu=True):
    x = layers.Conv2D(
        filters,
        kernel_size,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)
    x = layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, name=f"{name}_bn")(x)
    return layers.ReLU(name=f"{name}_relu")(x) if relu else x


def compact_cnn(
    image_size: tuple[int, int],
    num_classes: int,
    *,
    filters: tuple[int, ...] = (32, 64, 128, 256),
    dropout: float = 0.3,
    activation: str = "softmax",
    name: str = "compact_cnn",
) -> keras.Model:
    """Build a small residual network that learns from scratch on a few thousand images.

    A 3×3 stem of stride 2, then one residual block of two 3×3 convolutions per entry of `filters` (every block but the
    first halves the map), global average pooling, dropout and the head: 1.2 million weights at the default widths.

    Args:
        image_size: (height, width) in pixels, each at least 2 ** len(filters).
        num_classes: number of outputs.
        filters: channels of each block.
        dropout: share of pooled features dropped while training.
        activation: "softmax" or "sigmoid".

    Returns:
        Uncompiled model, uint8 (batch, height, width, 1) -> float32 (batch, num_classes).

    Source: residual blocks of He et al. 2016, arXiv:1512.03385, figure 2; batch-normalisation momentum 0.9.
    """
    smallest = 2 ** len(filters)
    if min(image_size) < smallest:
        raise ValueError(
            f"`image_size` is {tuple(image_size)}; {len(filters)} blocks need at least {smallest} pixels a side."
        )
    inputs = keras.Input((*image_size, 1), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="preprocess")(inputs)
    x = _conv_bn(x, filters[0], "stem", strides=2)
    for index, width in enumerate(filters):
        strides = 1 if index == 0 else 2
        shortcut = x
        if strides != 1 or x.shape[-1] != width:
            shortcut = _conv_bn(x, width, f"block{index + 1}_shortcut", kernel_size=1, strides=strides, relu=False)
        x = _conv_bn(x, width, f"block{index + 1}_a", strides=strides)
        x = _conv_bn(x, width, f"block{index + 1}_b", relu=False)
        x = layers.Add(name=f"block{index + 1}_add")([x, shortcut])
        x = layers.ReLU(name=f"block{index + 1}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, classification_head(x, num_classes, dropout=dropout, activation=activation), name=name)


def five_block_cnn(
    image_size: tuple[int, int],
    num_classes: int,
    *,
    dropout: float = 0.2,
    activation: str = "softmax",
    name: str = "five_block_cnn",
) -> keras.Model:
    """Build the plain network of earlier work on the brain sets, as a rival.

    Five blocks of a 2×2 convolution without padding (64, 64, 128, 256, 512 channels), ReLU and 2×2 max pooling;
    flatten, dropout, dense layers of 256 and 128 with an L2 penalty of 5e-4 and dropout, and the head.

    Args:
        image_size: (height, width) in pixels, each at least 63: what five blocks leave one position of.
        num_classes: number of outputs.
        dropout: share of features dropped while training, before and after each dense layer.
        activation: "softmax" or "sigmoid".

    Returns:
        Uncompiled model, uint8 (batch, height, width, 1) -> float32 (batch, num_classes).
    """
    if min(image_size) < FIVE_BLOCK_SIDE:
        raise ValueError(
            f"`image_size` is {tuple(image_size)}; five blocks need at least {FIVE_BLOCK_SIDE} pixels a side."
        )
    inputs = keras.Input((*image_size, 1), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="preprocess")(inputs)
    for number, width in enumerate((64, 64, 128, 256, 512), start=1):
        x = layers.Conv2D(width, 2, activation="relu", name=f"block{number}_conv")(x)
        x = layers.MaxPooling2D(name=f"block{number}")(x)
    x = layers.Flatten(name="flatten")(x)
    for number, width in enumerate((256, 128), start=1):
        x = layers.Dropout(dropout, name=f"dense{number}_dropout")(x)
        x = layers.Dense(
            width, activation="relu", kernel_regularizer=keras.regularizers.L2(5e-4), name=f"dense{number}"
        )(x)
    return keras.Model(inputs, classification_head(x, num_classes, dropout=dropout, activation=activation), name=name)


def classifier(
    features: keras.Model, num_classes: int, *, dropout: float = 0.2, activation: str = "softmax"
) -> keras.Model:
    """Put a classification head on a feature extractor of `kerasmed.backbones.build`; the graph stays flat.

    Args:
        features: model, images -> (batch, num_features).
        num_classes, dropout, activation: of `classification_head`.

    Returns:
        Uncompiled model that shares the extractor's layers, images -> float32 (batch, num_classes).
    """
    outputs = classification_head(features.output, num_classes, dropout=dropout, activation=activation)
    return keras.Model(features.inputs[0], outputs, name=features.name)


def max_pooled(model: keras.Model) -> keras.Model:
    """Take the feature extractor out of a trained classifier, with the largest value of each map in place of the mean.

    A small finding fills few positions of the last map: the mean dilutes it, the maximum keeps it.

    Args:
        model: with one input and, in its graph, a `GlobalAveragePooling2D` named "pool"; what follows is left out.

    Returns:
        Uncompiled model that shares the classifier's layers and weights, images -> (batch, num_features); its
        `GlobalMaxPooling2D` is named "pool".

    Raises:
        ValueError: no such layer, or several inputs.
    """
    pool = {layer.name: layer for layer in model.layers}.get("pool")
    if not isinstance(pool, layers.GlobalAveragePooling2D):
        found = "no layer" if pool is None else f"a {type(pool).__name__}"
        raise ValueError(
            f"the model {model.name!r} has {found} named 'pool' in its graph; expected a GlobalAveragePooling2D, as "
            "`kerasmed.backbones.build` and `compact_cnn` make it."
        )
    if len(model.inputs) != 1:
        raise ValueError(f"the model {model.name!r} has {len(model.inputs)} inputs; expected one, the image.")
    largest = layers.GlobalMaxPooling2D(data_format=pool.data_format, dtype=pool.dtype_policy, name="pool")
    return keras.Model(model.inputs[0], largest(pool.input), name=model.name)


def averaged(members: Sequence[keras.Model], *, mirrored: bool = False) -> keras.Model:
    """Make one model of several: the mean of their probabilities, also over left-right mirror images if asked.

        p(x) = 1/M · Σ_m p_m(x),   mirrored: 1/(2M) · Σ_m [ p_m(x) + p_m(x mirrored) ]

    The members, such as trainings of one network from several seeds, may bear equal names; the model shares their
    weights, round-trips through a `.keras` file, and has no layer "logits" of its own.

    Args:
        members: models, uint8 (batch, height, width, 1) -> probabilities of one shape, at least one.
        mirrored: whether each also sees the image with left and right exchanged.

    Returns:
        Uncompiled model, uint8 (batch, height, width, 1) -> float32 probabilities; of one member that is not mirrored,
        that member itself.

    Raises:
        ValueError: no members, a member of another kind of input, or unlike inputs or outputs.
    """
    members = list(members)
    if not members:
        raise ValueError("`members` is empty; expected at least one model.")
    for member in members:
        taken = [(tensor.dtype, len(tensor.shape), tensor.shape[-1]) for tensor in member.inputs]
        if taken != [("uint8", 4, 1)] or len(member.outputs) != 1:
            raise ValueError(
                f"the model {member.name!r} takes {[(x.dtype, *x.shape) for x in member.inputs]} and gives "
                f"{[y.shape for y in member.outputs]}; expected uint8 (batch, height, width, 1), and one array of "
                "probabilities."
            )
    shapes = [(member.inputs[0].shape[1:], member.outputs[0].shape[1:]) for member in members]
    unlike = [position for position, pair in enumerate(shapes) if pair != shapes[0]]
    if unlike:
        raise ValueError(
            f"members at positions {unlike[:5]} take and give other shapes than the first: {shapes[unlike[0]]}, not "
            f"{shapes[0]}. Average models of one image size and the same classes."
        )
    if len(members) == 1 and not mirrored:
        return members[0]
    image = keras.Input(shapes[0][0], dtype="uint8", name="image")
    views = [image, ops.flip(image, axis=2)] if mirrored else [image]
    # A graph needs a name of its own for each layer, which models of one network do not have.
    named = [keras.Model(each.inputs[0], each.outputs[0], name=f"member{n}") for n, each in enumerate(members, start=1)]
    answers = [member(view) for member in named for view in views]
    return keras.Model(image, layers.Average(dtype="float32", name="probabilities")(answers), name="averaged")


def attention_classifier(
    branches: Mapping[str, int],
    num_slices: int,
    num_features: int,
    *,
    num_grades: int = 3,
    width: int = 512,
    units: int = 128,
    dropout: float = 0.25,
    moments: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    name: str = "attention_classifier",
) -> keras.Model:
    """Build a classifier of graded targets that reads series as vectors of their slices, and learns which slices count.

    A branch, such as a condition read off one kind of series, has layers of its own and shares none; NAME is its name:

        NAME_norm     layer normalisation of each slice; or, with moments, each feature standardised by its own and
                      divided by √D, so that a usual slice has length 1, an outstanding one more, and no gate saturates
        NAME_thinned  dropout of features, the same in all slices of a row
        NAME_embed    Dense(width, relu) of each slice
        NAME_pooled   gated attention over the slices that are there: the embedding (batch, width), and the weights
        NAME_dropout
        NAME_scores   Dense(targets · num_grades), which NAME_grades reshapes to (targets, num_grades)

    "logits" puts the branches' targets after one another and "probabilities" is the softmax over the grades. Values of
    slices that are not there, NaN included, change neither the output nor a gradient. A branch without any slice
    answers what its biases say, the same for all.

    Args:
        branches: name -> number of targets, at least 1, in the order of the targets; names are Python identifiers.
        num_slices: S, places for slices; rows with fewer leave some out by the mask.
        num_features: D, length of a slice's vector.
        num_grades: classes of each target, at least 2.
        width: of the embedding.
        units: of `kerasmed.layers.GatedAttentionPooling`.
        dropout: share of the features, and of the embedding, dropped while training, in [0, 1).
        moments: name -> mean and variance (D,) of the features of *training* slices, where slices of one kind differ
            little beside what all have in common, as they do in networks of random weights.
        name: the model's.

    Returns:
        Uncompiled model of the inputs "NAME_slices" (batch, S, D) float32 and "NAME_mask" (batch, S) bool (or numbers,
        0 no slice) for each branch: a list in this order, or a dict by name. -> float32 probabilities (batch, number of
        targets, num_grades).

    Raises:
        ValueError: no branches, one without targets, a name that is no identifier, fewer than 2 grades, or sizes
            below 1.
    """
    unfit = [branch for branch, targets in branches.items() if not str(branch).isidentifier() or targets < 1]
    if unfit or not branches:
        raise ValueError(
            f"`branches` are {dict(branches)}; expected at least one, a name like 'canal' -> a number of targets from "
            f"1. First unfit: {unfit[:5]}."
        )
    if num_grades < 2:
        raise ValueError(f"`num_grades` is {num_grades}; a softmax needs at least 2.")
    if min(num_slices, num_features) < 1:
        raise ValueError(
            f"`num_slices` is {num_slices} and `num_features` {num_features}; expected at least 1 of each: the "
            "shape of a row of slices."
        )
    inputs, logits = [], []
    for branch, targets in branches.items():
        slices = keras.Input((num_slices, num_features), dtype="float32", name=f"{branch}_slices")
        mask = keras.Input((num_slices,), dtype="bool", name=f"{branch}_mask")
        inputs += [slices, mask]
        x, _ = attention_branch(
            slices, mask, branch, width=width, units=units, dropout=dropout, moments=(moments or {}).get(branch)
        )
        x = layers.Dropout(dropout, name=f"{branch}_dropout")(x)
        x = layers.Dense(targets * num_grades, dtype="float32", name=f"{branch}_scores")(x)
        logits.append(layers.Reshape((targets, num_grades), dtype="float32", name=f"{branch}_grades")(x))
    logits = layers.Concatenate(axis=1, dtype="float32", name="logits")(logits)
    return keras.Model(inputs, layers.Activation("softmax", dtype="float32", name="probabilities")(logits), name=name)


def attention_branch(
    slices,
    mask,
    name: str,
    *,
    width: int,
    units: int,
    dropout: float,
    moments: tuple[np.ndarray, np.ndarray] | None = None,
    competing: bool = True,
):
    """Read one kind of series as vectors of its slices; see NAME_norm to NAME_pooled of `attention_classifier`.

    Args:
        slices, mask: Keras tensors (batch, S, D) and (batch, S).
        name: of the branch.
        width, units, dropout, moments: as there; moments of this branch.
        competing: of `kerasmed.layers.GatedAttentionPooling`.

    Returns:
        Keras tensors: the embedding (batch, width), and the weights of the slices (batch, S).
    """
    # Ahead of the pooling, which also does so: else NaN would reach the gradients of the layers in between.
    x = ops.where(ops.expand_dims(mask, -1), slices, ops.zeros_like(slices))
    if moments is None:
        x = layers.LayerNormalization(name=f"{name}_norm")(x)
    else:
        mean, variance = (np.asarray(each, "float32") for each in moments)
        x = layers.Normalization(mean=mean, variance=variance * slices.shape[-1], name=f"{name}_norm")(x)
    x = layers.SpatialDropout1D(dropout, name=f"{name}_thinned")(x)
    x = layers.Dense(width, activation="relu", name=f"{name}_embed")(x)
    options = {"competing": competing, "return_weights": True, "name": f"{name}_pooled"}
    return GatedAttentionPooling(units, **options)([x, mask])


def attention_parts(model: keras.Model, name: str) -> keras.Model:
    """Take out of an `attention_classifier` what one branch makes of its slices: the embedding, and the slice weights.

    Args:
        model: from `attention_classifier`, trained or loaded.
        name: of the branch.

    Returns:
        Uncompiled model that shares the classifier's layers and weights, of the inputs "NAME_slices" and "NAME_mask"
        (a list, or a dict by name) -> [embedding (batch, width), weights (batch, S)]. Dropout comes after it.

    Raises:
        ValueError: no such branch.
    """
    pools = {layer.name: layer for layer in model.layers if isinstance(layer, GatedAttentionPooling)}
    if f"{name}_pooled" not in pools:
        known = [each.removesuffix("_pooled") for each in pools]
        raise ValueError(f"the model {model.name!r} has no branch {name!r}; expected one of its branches, {known}.")
    inputs = {tensor.name: tensor for tensor in model.inputs}
    return keras.Model(
        [inputs[f"{name}_slices"], inputs[f"{name}_mask"]], list(pools[f"{name}_pooled"].output), name=f"{name}_parts"
    )
