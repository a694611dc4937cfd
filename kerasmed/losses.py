"""Weighted losses and metrics of labels, from logits, on any Keras backend.

Yes-or-no labels that are all known and weigh alike need no loss of their own:
`keras.losses.BinaryCrossentropy(from_logits=True)` is theirs, also where images weigh unlike: by `group_weights` and
`sample_weights`, which a dataset gives beside its targets. Nor do they need an accuracy:
`keras.metrics.BinaryAccuracy(threshold=0.0)` takes a logit above 0, a probability above one half, as present.
"""

import keras
import numpy as np
import pandas as pd
from keras import ops


def balanced_class_weights(class_ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Weigh classes inversely to their frequency, so that each contributes equally to the loss.

        weight_c = num_images / (num_classes · count_c)

    Args:
        class_ids: int array, shape (num_images,): the *training* split's classes.
        num_classes: how many there are.

    Returns:
        float array, shape (num_classes,); the weights of the images average 1.

    Raises:
        ValueError: a class has no image, so that its weight would be infinite.

    Example:
        >>> balanced_class_weights(np.array([0, 0, 0, 1]), 2).round(2).tolist()
        [0.67, 2.0]
    """
    counts = np.bincount(class_ids, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(
            f"classes {np.flatnonzero(counts == 0).tolist()} have no training image, so no weight: counts are "
            f"{counts.tolist()}. Add images, change the split's seed, or leave the class out."
        )
    return len(class_ids) / (num_classes * counts)


@keras.saving.register_keras_serializable(package="kerasmed")
class WeightedCategoricalCrossentropy(keras.losses.Loss):
    """Cross-entropy of exclusive classes, weighted per class, optionally focused on hard images.

        loss = − Σ_c w_c · y_c · (1 − p_c)^γ · log p_c,   p = softmax(logits)

    then the mean over the batch. γ = 0 is the weighted cross-entropy, γ > 0 the focal loss, which turns down images
    that are already right.

    Args:
        class_weights: w, one per class; None for all 1.
        focusing: γ, at least 0.
        name: of the loss.

    Call with y_true (batch, num_classes), one-hot, and logits (batch, num_classes).

    Raises:
        ValueError: negative focusing or weights.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 5, for softmax and with a weight per class.
    """

    def __init__(
        self, class_weights=None, focusing: float = 0.0, name: str = "weighted_categorical_crossentropy", **kwargs
    ):
        super().__init__(name=name, **kwargs)
        if focusing < 0:
            raise ValueError(f"`focusing` is {focusing}; expected at least 0 (0 is plain cross-entropy, 2 is usual).")
        self.class_weights = None if class_weights is None else [float(weight) for weight in class_weights]
        if self.class_weights and min(self.class_weights) < 0:
            raise ValueError(f"`class_weights` are {self.class_weights}; expected none below 0.")
        self.focusing = float(focusing)

    def call(self, y_true, y_pred):
        log_probabilities = ops.log_softmax(y_pred, axis=-1)
        terms = -ops.cast(y_true, log_probabilities.dtype) * log_probabilities
        if self.focusing:
            # 1 - p is kept off 0, where the gradient of a power below 1 is infinite.
            terms = terms * ops.power(ops.maximum(1 - ops.exp(log_probabilities), 1e-7), self.focusing)
        if self.class_weights:
            terms = terms * ops.convert_to_tensor(self.class_weights, dtype=terms.dtype)
        return ops.sum(terms, axis=-1)

    def get_config(self):
        return {**super().get_config(), "class_weights": self.class_weights, "focusing": self.focusing}


def label_shares(y_train) -> tuple[np.ndarray, np.ndarray]:
    """Share of present and of absent among the known entries of each yes-or-no label.

    To let both kinds of a label contribute equally, weigh each by the other's share:
    `WeightedBinaryCrossentropy(positive_weights=negative_share, negative_weights=positive_share)`.

    Args:
        y_train: array or table, shape (num_images, num_labels): the *training* split's labels, 1 present, 0 absent, NaN
            unknown.

    Returns:
        positive_share and negative_share, float arrays, shape (num_labels,), which sum to 1. Where one is 0, the
        training rows have nothing to tell the label by, and as weights they keep it from being learnt.

    Raises:
        ValueError: not two-dimensional, other values, or a label without a known entry.

    Example:
        >>> positive, negative = label_shares(np.array([[1, 0], [0, 1], [0, np.nan], [0, 1]]))
        >>> positive.round(2).tolist(), negative.round(2).tolist()
        ([0.25, 0.67], [0.75, 0.33])
    """
    y_train = np.asarray(y_train, dtype="float64")
    if y_train.ndim != 2:
        raise ValueError(f"`y_train` has shape {y_train.shape}; expected (num_images, num_labels).")
    strange = y_train[~(np.isnan(y_train) | (y_train == 0) | (y_train == 1))]
    if strange.size:
        raise ValueError(f"`y_train` holds {strange[:5].tolist()}; expected 1 present, 0 absent or NaN unknown.")
    present, absent = (y_train == 1).sum(axis=0), (y_train == 0).sum(axis=0)
    unknown = np.flatnonzero(present + absent == 0)
    if len(unknown):
        raise ValueError(
            f"labels at positions {unknown.tolist()} are unknown in all {len(y_train)} training rows and have no "
            "shares; leave them out, or add rows where they are known."
        )
    return present / (present + absent), absent / (present + absent)


@keras.saving.register_keras_serializable(package="kerasmed")
class WeightedBinaryCrossentropy(keras.losses.Loss):
    """Cross-entropy of yes-or-no labels, some of them unknown, weighted per label, optionally focused on hard entries.

        loss = Σ_l mean_{known i} [ − w⁺_l · y · (1 − p)^γ · log p − w⁻_l · (1 − y) · p^γ · log(1 − p) ],
        p = sigmoid(logit)

    The mean of a label runs over its known entries in the batch; one without any adds 0. An unknown entry, NaN, adds
    neither value nor gradient, whatever its logit. With w⁺ the share of absent and w⁻ the share of present entries in
    training (`label_shares`), the present and the absent entries of a label weigh alike in total, however rare it is.
    γ = 0 is the weighted cross-entropy, γ > 0 the focal loss, which turns down entries that are already right.

    `call` returns, for sample i of a batch of B, B · Σ_l term_il / known_l, whose mean over the batch is the loss. Over
    several batches Keras averages the batches' losses: with unknown entries that is not the loss of all rows at once.

    Args:
        positive_weights: w⁺, one per label; None for all 1.
        negative_weights: w⁻, one per label; None for all 1.
        focusing: γ, at least 0.
        name: of the loss.

    Call with y_true (batch, num_labels) of 1, 0 and NaN (unknown), and logits of the same shape; at least float32
    within.

    Raises:
        ValueError: negative focusing, weights that are negative, not finite or of another number of labels, or
            y_true and logits of unlike shapes.

    Source: with shares of the training split, Rajpurkar et al. 2017 (CheXNet), arXiv:1711.05225, section 2.1, for one
    label; here the sum over labels. Wang et al. 2017, arXiv:1705.02315, take the weights from each batch, one pair for
    all labels. Focusing: Lin et al. 2017, arXiv:1708.02002, equation 5.
    """

    def __init__(
        self,
        positive_weights=None,
        negative_weights=None,
        focusing: float = 0.0,
        name: str = "weighted_binary_crossentropy",
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        if focusing < 0:
            raise ValueError(f"`focusing` is {focusing}; expected at least 0 (0 is plain cross-entropy, 2 is usual).")
        self.focusing = float(focusing)
        self.positive_weights = _label_weights("positive_weights", positive_weights)
        self.negative_weights = _label_weights("negative_weights", negative_weights)

    def call(self, y_true, y_pred):
        y_true, logits = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        # Unlike ranks would broadcast to all pairs of samples.
        if len(y_true.shape) != 2 or len(logits.shape) != 2 or y_true.shape[1] != logits.shape[1]:
            raise ValueError(
                f"labels of shape {tuple(y_true.shape)} and logits of shape {tuple(logits.shape)}; expected (batch, "
                "num_labels) of both."
            )
        if keras.backend.standardize_dtype(logits.dtype) != "float64":
            logits = ops.cast(logits, "float32")
        y_true = ops.cast(y_true, logits.dtype)
        known = ops.logical_not(ops.isnan(y_true))
        # Before the arithmetic: what comes after is multiplied by 0, which takes no NaN away.
        y_true, logits = (ops.where(known, tensor, ops.zeros_like(tensor)) for tensor in (y_true, logits))
        log_present, log_absent = ops.log_sigmoid(logits), ops.log_sigmoid(-logits)
        present, absent = -y_true * log_present, -(1 - y_true) * log_absent
        if self.focusing:
            # As the exponential of a logarithm, a power has a finite gradient at 0.
            present = present * ops.exp(self.focusing * log_absent)
            absent = absent * ops.exp(self.focusing * log_present)
        terms = self._weighted(present, self.positive_weights) + self._weighted(absent, self.negative_weights)
        terms = ops.where(known, terms, ops.zeros_like(terms))
        num_known = _mean_over_devices(ops.sum(ops.cast(known, terms.dtype), axis=0))
        num_known = ops.where(num_known > 0, num_known, ops.ones_like(num_known))
        return ops.cast(ops.shape(terms)[0], terms.dtype) * ops.sum(terms / num_known, axis=-1)

    def _weighted(self, terms, weights):
        if weights is None:
            return terms
        if len(weights) != terms.shape[1]:
            raise ValueError(
                f"{self.name} has {len(weights)} weights for {terms.shape[1]} labels; expected one per label, in order."
            )
        return terms * ops.convert_to_tensor(weights, dtype=terms.dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "positive_weights": self.positive_weights,
            "negative_weights": self.negative_weights,
            "focusing": self.focusing,
        }


@keras.saving.register_keras_serializable(package="kerasmed")
class GradedCrossentropy(keras.losses.Loss):
    """Cross-entropy of several graded targets, of which some are blank, weighted per grade.

        loss = Σ w_g · (− log p_g) / Σ w_g,   both over the known entries (i, t) of the batch,
        g = y_it,   p = softmax(logits_it)

    With w = (1, 2, 4) it is, of one batch, the sample-weighted log loss of the RSNA 2024 lumbar spine competition for
    one condition, whose rows are the entries. Targets of several conditions are pooled here, where the competition
    averages the conditions. A blank entry, NaN, adds neither value nor gradient, whatever its logits, and a batch of
    blanks costs 0. An entry that is no grade, such as −1 or 3 of three, makes the loss NaN, as a graph cannot refuse
    it.

    `call` returns, for sample i of a batch of B, B · Σ_t w_g · (− log p_g) / Σ w_g, whose mean over the batch is the
    loss. Over several batches Keras averages the batches' losses: that is not the loss of all rows at once, as the
    batches' weights differ.

    Args:
        class_weights: w, one per grade; None for all 1.
        name: of the loss.

    Call with y_true (batch, num_targets) of 0 … num_grades − 1 and NaN (blank), and logits (batch, num_targets,
    num_grades); at least float32 within.

    Raises:
        ValueError: weights that are negative, not finite or of another number of grades, or y_true and logits of
            unlike shapes.

    Source: of the weighting, the evaluation of the RSNA 2024 Lumbar Spine Degenerative Classification competition.
    """

    def __init__(self, class_weights=None, name: str = "graded_crossentropy", **kwargs):
        super().__init__(name=name, **kwargs)
        self.class_weights = _label_weights("class_weights", class_weights)

    def call(self, y_true, y_pred):
        y_true, logits = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        if len(y_true.shape) != 2 or len(logits.shape) != 3 or y_true.shape[1] != logits.shape[1]:
            raise ValueError(
                f"grades of shape {tuple(y_true.shape)} and logits of shape {tuple(logits.shape)}; expected (batch, "
                "num_targets) and (batch, num_targets, num_grades)."
            )
        num_grades = logits.shape[2]
        class_weights = self.class_weights or [1.0] * num_grades
        if len(class_weights) != num_grades:
            raise ValueError(
                f"{self.name} has {len(class_weights)} weights for {num_grades} grades; expected one per grade, in "
                "order."
            )
        if keras.backend.standardize_dtype(logits.dtype) != "float64":
            logits = ops.cast(logits, "float32")
        y_true = ops.cast(y_true, logits.dtype)
        known = ops.logical_not(ops.isnan(y_true))
        # Before the arithmetic: what comes after is multiplied by 0, which takes no NaN away.
        y_true = ops.where(known, y_true, ops.zeros_like(y_true))
        logits = ops.where(known[..., None], logits, ops.zeros_like(logits))
        grades = ops.clip(ops.cast(y_true, "int32"), 0, num_grades - 1)
        chosen = ops.one_hot(grades, num_grades, dtype=logits.dtype)
        weights = ops.sum(chosen * ops.convert_to_tensor(class_weights, dtype=logits.dtype), axis=-1)
        weights = ops.where(known, weights, ops.zeros_like(weights))
        terms = -weights * ops.sum(chosen * ops.log_softmax(logits, axis=-1), axis=-1)
        terms = ops.where(ops.cast(grades, y_true.dtype) == y_true, terms, np.nan)
        total = _mean_over_devices(ops.sum(weights))
        batch_size = ops.cast(ops.shape(terms)[0], terms.dtype)
        return batch_size * ops.sum(terms, axis=-1) / ops.where(total > 0, total, ops.ones_like(total))

    def get_config(self):
        return {**super().get_config(), "class_weights": self.class_weights}


def _mean_over_devices(values):
    """Average numbers of a batch's parts where TensorFlow has shared it out; other backends see a batch whole.

    What a loss is divided by so is of the whole batch, and the sum of the parts' gradients is that of one device.
    """
    if keras.backend.backend() != "tensorflow":
        return values
    return ops.moments(values[None], axes=[0], synchronized=True)[0]


def _label_weights(name, weights):
    """Return weights as plain floats, or None."""
    if weights is None:
        return None
    weights = [float(weight) for weight in weights]
    if not all(0 <= weight < np.inf for weight in weights):
        raise ValueError(f"`{name}` are {weights}; expected finite numbers, none below 0.")
    return weights


def group_weights(y_train, groups_train) -> pd.DataFrame:
    """Count a yes-or-no label within each group of training images, and weigh both kinds alike in total.

        positive_T = |N_T| / (|A_T| + |N_T|),   negative_T = |A_T| / (|A_T| + |N_T|)

    where A_T are the group's images with the label present and N_T those with it absent. Groups, such as study types,
    differ in prevalence: one pair of weights for all would leave each of them out of balance.

    Args:
        y_train: array, shape (num_images,): the *training* split's label, 1 present, 0 absent.
        groups_train: array, shape (num_images,): the group of each image.

    Returns:
        DataFrame indexed by sorted group: positive and negative, the weights of an image of either kind, which sum to
        1; present and absent, int, the counts. In a group of one kind only, that kind weighs 0 and the one that it
        lacks 1: its training images add nothing to the loss, as nothing can be told from them.

    Raises:
        ValueError: no images, unlike lengths, labels other than 0 and 1, or an image without a group.

    Example:
        >>> table = group_weights([1, 0, 0, 0, 1, 0], ["elbow", "elbow", "elbow", "elbow", "wrist", "wrist"])
        >>> table.loc["elbow"].to_dict()
        {'positive': 0.75, 'negative': 0.25, 'present': 1.0, 'absent': 3.0}

    Source: Rajpurkar et al. 2018 (MURA), arXiv:1712.06957, section 3.1, where the groups are study types.
    """
    y_train, groups_train = _known_labels("y_train", y_train, groups_train)
    if not len(y_train):
        raise ValueError("`y_train` is empty; expected the labels of the training images.")
    without = np.flatnonzero(pd.isna(groups_train))
    if len(without):
        raise ValueError(
            f"{len(without)} of {len(y_train)} training images have no group; name it or leave them out. First "
            f"positions: {without[:5].tolist()}."
        )
    grouped = pd.Series(y_train == 1).groupby(groups_train)
    present, total = grouped.sum(), grouped.size()
    absent = total - present
    table = {"positive": absent / total, "negative": present / total, "present": present, "absent": absent}
    return pd.DataFrame(table).rename_axis("group")


def sample_weights(y, groups, weights: pd.DataFrame) -> np.ndarray:
    """Look up the weight of each image, by its label and group.

    With these as Keras's sample weights, the loss of a batch of B images is that of the weighted cross-entropy,

        loss = 1/B · Σ_i w_i · bce_i

    since `keras.losses.BinaryCrossentropy(from_logits=True)` divides by the number of images, not by the sum of their
    weights. Validation images take the training images' weights too: with weights of its own, the validation loss
    would be another function than the one that is minimised.

    Args:
        y: array, shape (num_images,): 1 present, 0 absent, of any split.
        groups: array, shape (num_images,).
        weights: from `group_weights` of the training images.

    Returns:
        float32 array, shape (num_images,).

    Raises:
        ValueError: a group that the table lacks, unlike lengths, or labels other than 0 and 1.

    Example:
        >>> table = group_weights([1, 0, 0, 0], ["elbow"] * 4)
        >>> sample_weights([1, 0], ["elbow", "elbow"], table).tolist()
        [0.75, 0.25]

    Source: as of `group_weights`.
    """
    y, groups = _known_labels("y", y, groups)
    positions = weights.index.get_indexer(groups)
    if (positions < 0).any():
        lacking = pd.unique(groups[positions < 0])
        raise ValueError(
            f"groups {lacking[:5].tolist()} have no weights, which are counted on training images only: the table has "
            f"{weights.index.tolist()}. Add training images of these groups, or leave theirs out."
        )
    both = weights[["negative", "positive"]].to_numpy("float32")
    return both[positions, y.astype(int)]


def _known_labels(name, y, groups):
    """Return a label without unknown entries, and the group of each image, as arrays of one dimension."""
    y, groups = np.asarray(y, dtype="float64"), np.asarray(groups)
    if y.ndim != 1 or groups.shape != y.shape:
        raise ValueError(f"`{name}` has shape {y.shape} and its groups {groups.shape}; expected (num_images,) of both.")
    strange = y[(y != 0) & (y != 1)]
    if strange.size:
        raise ValueError(
            f"`{name}` holds {strange[:5].tolist()}; expected 1 present or 0 absent. Leave out images whose label is "
            "unknown."
        )
    return y, groups


@keras.saving.register_keras_serializable(package="kerasmed")
class F1(keras.metrics.F1Score):
    """F1 of yes-or-no labels, from logits: per label over all images seen, then averaged over the labels.

        F1 = 2 · TP / (2 · TP + FP + FN),   predicted present where sigmoid(logit) > threshold

    A label with neither a present nor a predicted image counts as 0.

    Args:
        average: "macro" (mean over labels), "micro" (counts of all labels together), "weighted" (by the number of
            present images) or None (one value a label).
        threshold: on the probability, in (0, 1]; 0.5 is a logit of 0.
        name: of the metric.

    Call with y_true (batch, num_labels) of 0 and 1, and logits (batch, num_labels).
    """

    def __init__(self, average: str | None = "macro", threshold: float = 0.5, name: str = "f1", **kwargs):
        super().__init__(average=average, threshold=threshold, name=name, **kwargs)

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(y_true, ops.sigmoid(ops.cast(y_pred, self.dtype)), sample_weight)


@keras.saving.register_keras_serializable(package="kerasmed")
class BrierScore(keras.metrics.MeanSquaredError):
    """Mean squared error of probabilities, from logits: over all entries seen, and lower is better.

        mse = mean (y − sigmoid(logit))²

    0 is perfect; 1/4 is what one half everywhere gives. Of logits themselves, `keras.metrics.MeanSquaredError` would
    count a sure and right answer as far off.

    Args:
        name: of the metric.
        dtype: of the result; None for Keras's default.

    Call with y_true (batch, num_labels) of 0 and 1, and logits (batch, num_labels).

    Source: Brier 1950, Monthly Weather Review 78(1), 1–3, for one class of a pair.
    """

    def __init__(self, name: str = "mse", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_true, ops.sigmoid(ops.cast(y_pred, self.dtype)), sample_weight)
