"""Weighted losses and a metric of labels, from logits, on any Keras backend.

Yes-or-no labels need no loss of their own: `keras.losses.BinaryCrossentropy(from_logits=True)` is theirs. Nor do they
need an accuracy: `keras.metrics.BinaryAccuracy(threshold=0.0)` takes a logit above 0, a probability above one half, as
present.
"""

import keras
import numpy as np
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
