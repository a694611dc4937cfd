"""Notebook 02_lumbar_embeddings: its parameters, checked before any work."""

from collections.abc import Sequence
from dataclasses import dataclass

from kerasmed import audit, backbones, classifiers, medicalnet, series
from kerasmed.parameters import refuse, refuse_others

AVERAGE, ATTENTION, MEDICALNET = "average", "attention", "medicalnet"
METHODS = (AVERAGE, ATTENTION, MEDICALNET)
_SMALLEST_SIDE = 32
_RESERVED = 16  # studies, whose slices give networks of random weights their batch statistics


@dataclass(frozen=True)
class Config:
    """Parameters of notebook 02_lumbar_embeddings; the notebook's parameters cell says what each means."""

    profile: str
    seed: int
    data_source: str
    synthetic_studies: int
    synthetic_seed: int
    image_size: Sequence[int]
    normalisations: Sequence[str]
    window: bool
    max_quarantined_share: float
    accepted: Sequence[str]
    test_share: float
    folds: int
    valid_share: float
    impute_labels: bool
    methods: Sequence[str]
    encoder: str
    weights: str
    weights_seconds: float
    projection: int
    medicalnet_depth: int
    medicalnet_weights: str
    medicalnet_size: Sequence[int]
    min_matched_share: float
    encode_batch_size: int
    attention_width: int
    attention_units: int
    batch_size: int
    epochs: int
    learning_rate: float
    stop_patience: int
    dropout: float
    classifiers: Sequence[str]
    samplings: Sequence[str]
    neighbours: int
    precision: str
    deterministic: bool
    bootstraps: int

    def __post_init__(self):
        known = {
            "normalisations": series.NORMALISATIONS,
            "methods": METHODS,
            "classifiers": classifiers.NAMES,
            "samplings": classifiers.SAMPLINGS,
        }
        for name, values in known.items():
            refuse_others(name, getattr(self, name), values)
        refuse(
            "accepted", self.accepted, set(self.accepted) <= set(audit.FAILING), f"some of {', '.join(audit.FAILING)}"
        )
        refuse("encoder", self.encoder, self.encoder in backbones.NAMES, f"one of {', '.join(backbones.NAMES)}")
        size = len(self.image_size) == 2 and all(isinstance(side, int) for side in self.image_size)
        refuse(
            "image_size",
            self.image_size,
            size and min(self.image_size) >= _SMALLEST_SIDE,
            f"[height, width], each at least {_SMALLEST_SIDE}",
        )
        backbones.refuse_unfit([self.encoder], self.weights, self.image_size)
        size = len(self.medicalnet_size) == 3 and all(isinstance(side, int) for side in self.medicalnet_size)
        size = size and min(self.medicalnet_size) >= 8
        refuse("medicalnet_size", self.medicalnet_size, size, "[depth, height, width], each at least 8")
        refuse(
            "medicalnet_depth",
            self.medicalnet_depth,
            self.medicalnet_depth in medicalnet.DEPTHS,
            f"one of {', '.join(map(str, medicalnet.DEPTHS))}",
        )
        fits = self.medicalnet_weights == "none" or str(self.medicalnet_weights).endswith((".npz", ".pth"))
        refuse("medicalnet_weights", self.medicalnet_weights, fits, "none, or the path of an .npz or .pth file")
        at_least_one = ("attention_width", "attention_units", "batch_size", "encode_batch_size", "epochs")
        for name in (*at_least_one, "neighbours", "bootstraps"):
            refuse(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        refuse("folds", self.folds, self.folds >= 2, "at least 2")
        refuse("projection", self.projection, self.projection >= 0, "at least 1, or 0 for none")
        refuse("test_share", self.test_share, 0 < self.test_share <= 0.5, "above 0, at most 0.5")
        for name in ("valid_share", "learning_rate"):
            refuse(name, getattr(self, name), 0 < getattr(self, name) < 1, "a number between 0 and 1")
        refuse("min_matched_share", self.min_matched_share, 0 < self.min_matched_share <= 1, "above 0, at most 1")
        refuse("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1")
        refuse("weights_seconds", self.weights_seconds, self.weights_seconds > 0, "more than 0")
        refuse("stop_patience", self.stop_patience, self.stop_patience >= 0, "at least 0")
        refuse("max_quarantined_share", self.max_quarantined_share, 0 <= self.max_quarantined_share <= 1, "0 to 1")

    @property
    def reserved(self) -> int:
        """Studies that no fold asks, where a network of random weights is fitted to the look of some."""
        random = self.weights == "none" and bool({AVERAGE, ATTENTION} & set(self.methods))
        random |= self.medicalnet_weights == "none" and MEDICALNET in self.methods
        return _RESERVED if random else 0
