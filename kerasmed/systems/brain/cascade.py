"""Four networks asked one after the other: disease or none, Alzheimer's or tumour, and then its severity or its type.

Each stage is a softmax over exclusive classes that stand for outcomes, and learns from images of these outcomes alone.
With d the probability of disease, a that a disease is Alzheimer's, s_k of a severity and t_k of a type,

    P(none) = 1 − d,   P(severity k) = d · a · s_k,   P(type k) = d · (1 − a) · t_k

which sum to 1: an outcome's probability is the product over the stages that tell it from others.
"""

import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from kerasmed import atomic, gradcam, images, pipelines, runs, saved_models
from kerasmed.datasets.brain import CLASS_NAMES

SEVERITIES = CLASS_NAMES["alzheimer"][1:]
TYPES = CLASS_NAMES["brain_tumor"][1:]
NONE = "none"  # NonDemented and no_tumor
OUTCOMES = (NONE, *SEVERITIES, *TYPES)
# Stage -> class -> the outcomes that it stands for; in the order in which they are asked.
STAGES = {
    "disease": {NONE: (NONE,), "disease": (*SEVERITIES, *TYPES)},
    "kind": {"alzheimer": SEVERITIES, "tumour": TYPES},
    "severity": {name: (name,) for name in SEVERITIES},
    "type": {name: (name,) for name in TYPES},
}
_FORMAT = 1
_ABOUT = "cascade.json"


class Step(NamedTuple):
    """A stage on the path, its answer, and the probability that this stage itself gives it."""

    stage: str
    answer: str
    probability: float


class Reading(NamedTuple):
    """What a cascade says of one person."""

    outcome: str  # where the path ends
    path: tuple[Step, ...]
    stages: dict[str, dict[str, float]]  # of every stage, on the path or not: class -> probability, mean over slices
    joint: dict[str, float]  # outcome -> probability; they sum to 1
    likeliest: str  # the outcome of the largest joint probability, which may be another than the path's
    pixels: np.ndarray  # uint8 (num_slices, height, width): the slices as the networks saw them
    by_slice: dict[str, np.ndarray]  # stage -> float32 (num_slices, num_classes)


def joint(stages: Mapping[str, np.ndarray]) -> np.ndarray:
    """Multiply the stages' probabilities into those of the outcomes.

    Args:
        stages: each of `STAGES` -> float array (num_rows, num_classes), rows sum to 1.

    Returns:
        float64 array, shape (num_rows, 7), in the order of `OUTCOMES`; a row sums to 1.

    Example:
        >>> halves, thirds = np.array([[0.5, 0.5]]), np.full((1, 3), 1 / 3)
        >>> joint({"disease": halves, "kind": halves, "severity": thirds, "type": thirds}).round(3).tolist()
        [[0.5, 0.083, 0.083, 0.083, 0.083, 0.083, 0.083]]
    """
    product = np.ones((len(stages["disease"]), len(OUTCOMES)))
    for stage, classes in STAGES.items():
        for position, outcomes in enumerate(classes.values()):
            product[:, _places(outcomes)] *= np.asarray(stages[stage], np.float64)[:, [position]]
    return product


def answers(
    stages: Mapping[str, np.ndarray], thresholds: np.ndarray, *, among: Sequence[int] = tuple(range(len(OUTCOMES)))
) -> np.ndarray:
    """Follow each row's path: disease where its probability reaches the threshold, then the likeliest class of a stage.

    Args:
        stages: as in `joint`.
        thresholds: of disease, float, shape (num_rows,).
        among: positions in `OUTCOMES` that may be answered; no path leads to another.

    Returns:
        Positions in `OUTCOMES`, int, shape (num_rows,).
    """
    rows = len(thresholds)
    open_ = np.tile(np.isin(np.arange(len(OUTCOMES)), among), (rows, 1))  # outcomes that the path still leads to
    for stage, classes in STAGES.items():
        member = np.array([np.isin(np.arange(len(OUTCOMES)), _places(outcomes)) for outcomes in classes.values()])
        asked = ~(open_ & ~member.any(axis=0)).any(axis=1)
        told = np.asarray(stages[stage], np.float64)
        if stage == "disease":
            told = np.eye(2)[(told[:, 1] >= thresholds).astype(int)]
        possible = (open_[:, None] & member).any(axis=2)
        decided = np.where(possible, told, -1).argmax(axis=1)
        open_ &= np.where(asked[:, None], member[decided], True)
    return open_.argmax(axis=1)


def from_joint(probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """Turn probabilities of the outcomes, of a flat network, into what they say at each stage; the inverse of `joint`.

    A stage's classes have the sums of their outcomes' probabilities, divided by their total.

    Args:
        probabilities: float array, shape (num_rows, 7).

    Returns:
        Stage -> float64 array (num_rows, num_classes), rows sum to 1; uniform where the stage's outcomes have none.
    """
    stages = {}
    for stage, classes in STAGES.items():
        sums = np.stack([probabilities[:, _places(each)].sum(axis=1, dtype=np.float64) for each in classes.values()], 1)
        total = sums.sum(axis=1, keepdims=True)
        stages[stage] = np.divide(sums, total, out=np.full_like(sums, 1 / sums.shape[1]), where=total > 0)
    return stages


def columns(stage: str) -> list[str]:
    """Return the columns that hold a stage's probabilities in tables, `<stage>_<class>`."""
    return [f"{stage}_{name}" for name in STAGES[stage]]


def _places(outcomes) -> list[int]:
    return [OUTCOMES.index(name) for name in outcomes]


@dataclass(frozen=True, eq=False)
class BrainCascade:
    """The four networks, the threshold of disease, and how images are read: all that an answer depends on.

    Args:
        models: each of `STAGES` -> Keras model, uint8 (batch, height, width, 1) -> probabilities of its classes.
        threshold: of the probability of disease, from which on the path leads to a disease.
        read_options: `image_size`, `fit`, `interpolation` and `equalize` of `kerasmed.images.read`.
        about: plain facts to keep beside them, such as the run that they come from.

    Raises:
        ValueError: a stage is missing or unknown, or a model takes or gives other shapes.
    """

    models: Mapping[str, keras.Model]
    threshold: float
    read_options: Mapping
    about: Mapping = field(default_factory=dict)

    def __post_init__(self):
        if set(self.models) != set(STAGES):
            raise ValueError(f"`models` are of {sorted(self.models)}; expected one of each of {', '.join(STAGES)}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` is {self.threshold}; expected a probability, 0 to 1.")
        images.check_options(fit=self.read_options["fit"], interpolation=self.read_options["interpolation"])
        for stage, model in self.models.items():
            expected = (None, *self.read_options["image_size"], 1), (None, len(STAGES[stage]))
            if (model.input_shape, model.output_shape) != expected:
                raise ValueError(
                    f"the model of {stage} turns {model.input_shape} into {model.output_shape}; expected "
                    f"{expected[0]}, as `read_options` say, into {expected[1]}: {', '.join(STAGES[stage])}."
                )

    def read(self, image) -> np.ndarray:
        """Read one slice as the networks' training did.

        Args:
            image: path or binary file object of what `kerasmed.images.read` takes (JPEG, PNG, DICOM ...), or an array
                of `kerasmed.images.from_array`, of any size and depth.

        Returns:
            uint8 array, shape `image_size`.

        Raises:
            kerasmed.images.ImageError: the file is no readable image.
            ValueError: something else, or the array is no picture.
        """
        options = pipelines.decode_options(self.read_options)
        options = {"image_size": options["image_size"], **options["read_options"]}
        if not (isinstance(image, (np.ndarray, str, os.PathLike)) or hasattr(image, "read")):
            raise ValueError(
                f"a slice is a {type(image).__name__}; expected a path, a binary file object or an array, or a flat "
                "list of such for several slices of one person."
            )
        if isinstance(image, np.ndarray):
            return images.finish(images.from_array(image), **options)
        return images.read(image, **options)

    def predict(self, slices) -> Reading:
        """Say what one person has, from one slice or several: of each stage the mean of the slices' probabilities.

        Args:
            slices: what `read` takes, or a list of such.

        Returns:
            `Reading`.

        Raises:
            ValueError: no slice; or as in `read`.
        """
        slices = list(slices) if isinstance(slices, (list, tuple)) else [slices]
        if not slices:
            raise ValueError("`slices` is empty; expected an image or a list of images of one person.")
        return self.answer(np.stack([self.read(one) for one in slices]))

    def answer(self, pixels: np.ndarray) -> Reading:
        """Do what `predict` does with slices that are read already.

        Args:
            pixels: uint8 (num_slices, height, width), each as `read` returns it; at least one.
        """
        # Of several devices Keras asks each the whole batch, and gives the answers one after another.
        by_slice = {stage: self.models[stage].predict_on_batch(pixels[..., None])[: len(pixels)] for stage in STAGES}
        means = {stage: told.mean(axis=0, keepdims=True, dtype=np.float64) for stage, told in by_slice.items()}
        told = joint(means)[0]
        outcome = OUTCOMES[int(answers(means, np.array([self.threshold]))[0])]
        named = {stage: dict(zip(STAGES[stage], means[stage][0].tolist())) for stage in STAGES}
        path = tuple(
            Step(stage, name, named[stage][name])
            for stage, classes in STAGES.items()
            for name, outcomes in classes.items()
            if outcome in outcomes
        )
        joint_ = dict(zip(OUTCOMES, told.tolist()))
        return Reading(outcome, path, named, joint_, OUTCOMES[int(told.argmax())], pixels, by_slice)

    def explain(self, reading: Reading) -> gradcam.Maps:
        """Show where the deciding stage, the path's last, saw its answer, by Grad-CAM of each slice."""
        stage, answer, _ = reading.path[-1]
        return self._explainers(stage)(reading.pixels, list(STAGES[stage]).index(answer))

    def _explainers(self, stage):
        if stage not in self._built:
            self._built[stage] = gradcam.build(self.models[stage])
        return self._built[stage]

    @cached_property
    def _built(self) -> dict:
        return {}

    def save(self, folder) -> Path:
        """Write one folder: cascade.json and `<stage>.keras` of each stage. It gets its name when it is whole.

        Raises:
            FileExistsError: something that is no cascade lies there.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / _ABOUT).exists():
            raise FileExistsError(f"{folder} is there and holds no cascade; name another folder.")
        content = {
            "format": _FORMAT,
            "stages": {stage: list(classes) for stage, classes in STAGES.items()},
            "threshold": float(self.threshold),
            "read": {name: self.read_options[name] for name in ("image_size", "fit", "interpolation", "equalize")},
            "about": dict(self.about),
        }
        # An earlier cascade goes first, whole: a folder of which one half is new must not pass for either.
        if folder.exists():
            os.rename(folder, folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old"))
        for aside in folder.parent.glob(f".{folder.name}.*.old"):
            shutil.rmtree(aside, ignore_errors=True)
        with atomic.whole_folder(folder) as writing:
            for stage, model in self.models.items():
                runs.write_model(writing / f"{stage}.keras", model)
            runs.write_json(writing / _ABOUT, content)
        return folder

    @classmethod
    def load(cls, folder) -> "BrainCascade":
        """Read what `save` wrote, in any process.

        Raises:
            FileNotFoundError: no cascade there, or one of its models is gone.
            ValueError: written by another version, with other stages.
        """
        folder = Path(folder)
        if not (folder / _ABOUT).exists():
            raise FileNotFoundError(f"no cascade in {folder}: it has no {_ABOUT}. `BrainCascade.save` writes one.")
        content = runs.read_json(folder / _ABOUT)
        known = {stage: list(classes) for stage, classes in STAGES.items()}
        if (content.get("format"), content.get("stages")) != (_FORMAT, known):
            raise ValueError(
                f"{folder / _ABOUT} has format {content.get('format')} and stages {content.get('stages')}; this "
                f"version reads format {_FORMAT} with {known}. Make the cascade anew."
            )
        gone = [stage for stage in STAGES if not (folder / f"{stage}.keras").exists()]
        if gone:
            raise FileNotFoundError(f"{folder} lacks the models of {', '.join(gone)}; make the cascade anew.")
        models = {stage: saved_models.read(folder / f"{stage}.keras") for stage in STAGES}
        return cls(models, content["threshold"], content["read"], content["about"])
