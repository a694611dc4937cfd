"""Write a synthetic brain set: both real folder layouts, a planted sign per class, and the published sets' leak."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from kerasmed import atomic, images
from kerasmed.datasets.brain import CLASS_NAMES
from kerasmed.datasets.synthetic.drawing import inside, refuse_other, rotated, write_image, write_text

# The class order of CLASS_NAMES; None: the class has no sign.
_SIGNS = {
    "alzheimer": (None, "stripes", "grid", "spokes"),
    "brain_tumor": (None, "bars", "dots", "star"),
}
_FILE_NAMES = {
    "alzheimer": ("nonDem{}.jpg", "verymildDem{}.jpg", "mildDem{}.jpg", "moderateDem{}.jpg"),
    "brain_tumor": ("no tumor ({}).jpg", "gg ({}).jpg", "m ({}).jpg", "p ({}).jpg"),
}
_ALZHEIMER_ASPECT = 176 / 208  # width / height
_SMALLEST_SIDE = 64  # below it noise and aliasing part the slices of a patient
_TEST_SHARE = 0.2
_SIGN_RADIUS = 0.32  # in halves of the image's side
_SIGN_CONTRAST = 90.0  # grey levels
_JPEG_QUALITY = 90
_TRUTH_COLUMNS = ["image_path", "task", "patient", "label", "signal", "x", "y", "width", "height"]


def write(
    root: str | os.PathLike,
    *,
    patients_per_class: int = 60,
    slices_per_patient: int = 4,
    label_noise: float = 0.1,
    image_size: tuple[int, int] = (96, 96),
    seed: int = 0,
) -> Path:
    """Write a synthetic set in the layout of the two real brain sets.

    Layout (greyscale 8-bit JPEG; class folders in the order of `CLASS_NAMES`, file names spelled as in the real sets):

        root/brain/alzheimer/{train,test}/{NonDemented,...}/*.jpg       all of one size, width : height = 176 : 208
        root/brain/brain_tumor/{train,test}/{no_tumor,...}/*.jpg        nearly square, sides within 25 % of image_size
        root/brain/truth.csv      image_path (relative to root), task, patient, label (the recorded class), signal (the
                                  class drawn), x, y, width, height (box of the sign in pixels, empty without a sign)
        root/brain/synthetic.json system, seed, parameters, ceiling

    A patient is one anatomy; its slices differ from it slightly, so that their 64×64 mean-free thumbnails correlate
    above 0.98 within a patient and below it between patients. As in the published sets, a patient's slices lie in train
    and in test (a fifth of each class's slices): only a split by patient is honest. The class is a texture of mean near
    zero at a random place in the brain, nearly the same place in all slices of a patient.

    In each class, flipped = round(label_noise * patients_per_class) patients carry the sign of another class, drawn
    uniformly. The best attainable accuracy, which is also the best balanced accuracy, is therefore

        ceiling = 1 - flipped / patients_per_class

    Args:
        root: folder to write under, created where missing.
        patients_per_class: patients of each recorded class and task, at least 3.
        slices_per_patient: images of each patient, at least 1.
        label_noise: share of patients whose recorded class is not the one drawn, in [0, 0.5).
        image_size: (height, width) in pixels, each at least 64; Alzheimer images take the height.
        seed: non-negative integer; the same seed and parameters write byte-identical files of the same times.

    Returns:
        `root` as a Path. A set of the same parameters is left as it is. The folder gets its name when it is whole.

    Raises:
        ValueError: a parameter is outside the range above.
        FileExistsError: `root/brain` is there and is not this set.
    """
    parameters = _checked_parameters(patients_per_class, slices_per_patient, label_noise, image_size, seed)
    root = Path(root)
    flipped = round(parameters["label_noise"] * parameters["patients_per_class"])
    ceiling = 1 - flipped / parameters["patients_per_class"]
    description = {"system": "brain", **parameters, "ceiling": dict.fromkeys(CLASS_NAMES, ceiling)}
    target = root / "brain"
    if target.exists():
        refuse_other(target, description)
        return root

    with atomic.whole_folder(target) as writing:
        rows = []
        for task in CLASS_NAMES:
            rows += _write_task(writing, task, flipped, parameters)
        truth = pd.DataFrame(rows, columns=_TRUTH_COLUMNS).sort_values("image_path")
        truth = truth.astype(dict.fromkeys(("x", "y", "width", "height"), "Int64"))
        write_text(writing / "truth.csv", truth.to_csv(index=False, lineterminator="\n"))
        write_text(writing / "synthetic.json", json.dumps(description, indent=2) + "\n")
    refuse_other(target, description)  # another process may have written there meanwhile
    return root


def sign_boxes(root: str | os.PathLike, image_paths: Sequence[str], image_size: tuple[int, int]) -> np.ndarray:
    """Read where the sign lies in images of a set, in pixels of images stretched to one size.

    Args:
        root: data root of a synthetic set.
        image_paths: relative to it.
        image_size: (height, width).

    Returns:
        float array, shape (num_images, 4): x, y, width, height; NaN in images of the class without a sign.
    """
    truth = pd.read_csv(Path(root) / "brain" / "truth.csv").set_index("image_path").loc[list(image_paths)]
    sizes = images.headers(root, list(image_paths))[["width", "height"]].to_numpy(float)
    scale = np.array(image_size[::-1]) / sizes
    return truth[["x", "y", "width", "height"]].to_numpy() * np.tile(scale, 2)


def _checked_parameters(patients_per_class, slices_per_patient, label_noise, image_size, seed) -> dict:
    """Return the parameters as plain Python values, or raise ValueError."""
    if patients_per_class < 3:
        raise ValueError(
            f"`patients_per_class` is {patients_per_class}; expected at least 3, one for each of train, "
            "validation and test. Pass 3 or more."
        )
    if slices_per_patient < 1:
        raise ValueError(f"`slices_per_patient` is {slices_per_patient}; expected at least 1. Pass 1 or more.")
    if not 0 <= label_noise < 0.5:
        raise ValueError(
            f"`label_noise` is {label_noise}; expected a share in [0, 0.5), such as 0.1: from one half on "
            "the recorded classes no longer name the signs."
        )
    if len(image_size) != 2 or min(image_size) < _SMALLEST_SIDE:
        raise ValueError(
            f"`image_size` is {image_size}; expected (height, width), each at least {_SMALLEST_SIDE} "
            "pixels: in smaller images the slices of a patient no longer look alike. Pass a larger one."
        )
    if seed < 0:
        raise ValueError(f"`seed` is {seed}; expected a non-negative integer. Pass 0 or more.")
    return {
        "seed": int(seed),
        "patients_per_class": int(patients_per_class),
        "slices_per_patient": int(slices_per_patient),
        "label_noise": float(label_noise),
        "image_size": [int(side) for side in image_size],
    }


def _write_task(folder: Path, task: str, flipped: int, parameters: dict) -> list[dict]:
    """Write the images of one task; return their rows of truth.csv."""
    num_patients, num_slices = parameters["patients_per_class"], parameters["slices_per_patient"]
    task_key = list(CLASS_NAMES).index(task)
    rng = np.random.default_rng([parameters["seed"], task_key])
    patient_numbers = rng.permutation(len(CLASS_NAMES[task]) * num_patients)
    rows = []
    for label, class_name in enumerate(CLASS_NAMES[task]):
        signals = _signals(rng, label, len(CLASS_NAMES[task]), num_patients, flipped)
        in_test = _in_test(rng, num_patients, num_slices)
        numbers = np.zeros(in_test.shape, int)
        for split in (False, True):
            numbers[in_test == split] = rng.permutation(np.count_nonzero(in_test == split)) + 1
        for split in ("train", "test"):
            (folder / task / split / class_name).mkdir(parents=True)
        for patient in range(num_patients):
            number = int(patient_numbers[label * num_patients + patient])
            patient_rng = np.random.default_rng([parameters["seed"], task_key, number])
            anatomy = _draw_anatomy(patient_rng)
            for index in range(num_slices):
                size = _slice_size(patient_rng, task, parameters["image_size"])
                image, box = _draw_slice(patient_rng, anatomy, _SIGNS[task][signals[patient]], size)
                split = "test" if in_test[patient, index] else "train"
                name = _FILE_NAMES[task][label].format(numbers[patient, index])
                relative = f"{task}/{split}/{class_name}/{name}"
                write_image(folder / relative, image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
                row = (
                    f"brain/{relative}",
                    task,
                    f"{task}-{number:04d}",
                    class_name,
                    CLASS_NAMES[task][signals[patient]],
                    *box,
                )
                rows.append(dict(zip(_TRUTH_COLUMNS, row, strict=True)))
    return rows


def _signals(rng, label, num_classes, num_patients, flipped) -> np.ndarray:
    """Class drawn for each patient of a recorded class: its own but for `flipped` patients."""
    signals = np.full(num_patients, label)
    chosen = rng.choice(num_patients, flipped, replace=False)
    signals[chosen] = (label + rng.integers(1, num_classes, flipped)) % num_classes
    return signals


def _in_test(rng, num_patients, num_slices) -> np.ndarray:
    """Boolean (patients, slices): a fifth of the slices, taken from as many patients as possible."""
    order = rng.permuted(np.tile(np.arange(num_slices), (num_patients, 1)), axis=1) * num_patients
    order += rng.permutation(num_patients)[:, None]
    return order < max(1, round(_TEST_SHARE * order.size))


def _slice_size(rng, task, image_size) -> tuple[int, int]:
    height, width = image_size
    if task == "alzheimer":
        return height, round(height * _ALZHEIMER_ASPECT)
    factors = rng.uniform(0.8, 1.2) * rng.uniform(0.96, 1.04, 2)
    return round(height * factors[0]), round(width * factors[1])


def _draw_anatomy(rng) -> dict:
    """Draw what a patient's slices share; lengths are in halves of the image's side, angles in radians."""
    distance, direction = 0.5 * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
    return {
        "centre": rng.uniform(-0.1, 0.1, 2),
        "radii": rng.uniform(0.68, 0.88, 2),
        "angle": rng.uniform(-0.35, 0.35),
        "lobes": rng.uniform(-0.035, 0.035, (2, 2)),
        "skull": rng.uniform(150, 215),
        "skull_width": rng.uniform(0.07, 0.13),
        "tissue": rng.uniform(95, 130),
        "coarse": 14 * rng.standard_normal((5, 5)),
        "fine": 5 * rng.standard_normal((12, 12)),
        "bias": rng.uniform(-0.2, 0.2, 2),
        "ventricle_centres": np.stack([[-1, 1] * rng.uniform(0.14, 0.24, 2), rng.uniform(-0.25, 0.15, 2)], axis=1),
        "ventricle_radii": np.stack([rng.uniform(0.06, 0.16, 2), rng.uniform(0.16, 0.38, 2)], axis=1),
        "ventricle_tilts": [1, -1] * rng.uniform(-0.1, 0.6, 2),
        "ventricle_depth": rng.uniform(40, 70),
        "noise": rng.uniform(2, 4),
        "sign_place": distance * np.array([np.cos(direction), np.sin(direction)]),
        "sign_angle": rng.uniform(-0.2, 0.2),
        "sign_mirror": rng.choice([-1, 1]),
        "sign_radius": _SIGN_RADIUS * rng.uniform(0.9, 1.1),
    }


def _draw_slice(rng, anatomy, sign, size) -> tuple[np.ndarray, tuple]:
    """Return a uint8 image of `size` = (height, width), and the sign's box (x, y, width, height) or four None."""
    height, width = size
    shift, scale = rng.uniform(-0.003, 0.003, 2), rng.uniform(0.997, 1.003)
    y, x = np.meshgrid(_pixel_centres(height), _pixel_centres(width), indexing="ij", sparse=True)
    x, y = (x - shift[0]) / scale, (y - shift[1]) / scale
    # Head coordinates: the outer edge of the skull is where the radius is 1.
    u, v = rotated(x - anatomy["centre"][0], y - anatomy["centre"][1], anatomy["angle"])
    u, v = u / anatomy["radii"][0], v / anatomy["radii"][1]
    theta = np.arctan2(v, u)
    radius = np.hypot(u, v)
    for harmonic, (cosine, sine) in enumerate(anatomy["lobes"], start=2):
        radius = radius * (1 + cosine * np.cos(harmonic * theta) + sine * np.sin(harmonic * theta))

    tissue = anatomy["tissue"] + _field(rng, anatomy["coarse"], size) + _field(rng, anatomy["fine"], size)
    tissue -= 25 * np.exp(-((u / 0.025) ** 2))  # the fissure between the halves
    for centre, radii, tilt in zip(
        anatomy["ventricle_centres"], anatomy["ventricle_radii"], anatomy["ventricle_tilts"], strict=True
    ):
        a, b = rotated(u - centre[0], v - centre[1], tilt)
        tissue -= anatomy["ventricle_depth"] * inside(np.hypot(a / radii[0], b / radii[1]), 0.15)
    box = (None,) * 4
    if sign:
        place = anatomy["sign_place"] + rng.uniform(-0.003, 0.003, 2)
        offset = rotated(*(place * anatomy["radii"]), -anatomy["angle"])
        place = scale * (np.array(offset) + anatomy["centre"]) + shift
        extent = scale * anatomy["sign_radius"]
        a, b = (x * scale + shift[0] - place[0]) / extent, (y * scale + shift[1] - place[1]) / extent
        tissue += _SIGN_CONTRAST * _sign(sign, anatomy["sign_mirror"] * a, b, anatomy["sign_angle"])
        box = _pixel_box(place, extent, size)

    brain_edge = 1 - anatomy["skull_width"] - 0.05
    image = tissue * inside(radius / brain_edge, 0.02)
    image += anatomy["skull"] * inside(radius, 0.03) * (1 - inside(radius / (1 - anatomy["skull_width"]), 0.03))
    image *= rng.uniform(0.85, 1.15) * (1 + anatomy["bias"][0] * x + anatomy["bias"][1] * y)
    image += 8 + anatomy["noise"] * rng.standard_normal(size)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), box


def _pixel_centres(length) -> np.ndarray:
    """Centres of pixels on an axis from -1 to 1."""
    return (2 * np.arange(length) + 1) / length - 1


def _field(rng, nodes, size) -> np.ndarray:
    """Smooth field through a grid of values, a little different at each call."""
    changed = nodes + 0.2 * nodes.std() * rng.standard_normal(nodes.shape)
    return cv2.resize(changed, size[::-1], interpolation=cv2.INTER_CUBIC)


def _sign(kind, x, y, angle) -> np.ndarray:
    """Texture of a sign in the unit disc, from -1 to 1; its mean is near zero, so that a coarse thumbnail hides it."""
    a, b = rotated(x, y, angle)
    radius = np.hypot(a, b)
    if kind == "stripes":
        texture = np.cos(4 * np.pi * b)
    elif kind == "bars":
        texture = np.cos(4 * np.pi * a)
    elif kind == "grid":
        texture = 1.5 * np.sin(3 * np.pi * a) * np.sin(3 * np.pi * b)
    elif kind == "dots":
        texture = np.tanh(4 * (np.cos(3 * np.pi * a) * np.cos(3 * np.pi * b) - 0.3))
    elif kind == "spokes":
        texture = 1.2 * np.cos(4 * np.arctan2(b, a))
    elif kind == "star":
        texture = 1.2 * np.cos(5 * np.arctan2(b, a))
    else:
        raise ValueError(f"Unknown sign {kind!r}; expected one of {_SIGNS}.")
    window = inside(radius, 0.06)
    return np.clip(texture - (texture * window).sum() / window.sum(), -1, 1) * window


def _pixel_box(place, extent, size) -> tuple[int, int, int, int]:
    """Smallest box of whole pixels round the sign, cut at the image's edge."""
    height, width = size
    lowest = np.floor((place - extent + 1) / 2 * (width, height)).astype(int).clip(0)
    highest = np.minimum(np.ceil((place + extent + 1) / 2 * (width, height)).astype(int), (width, height))
    return tuple(int(value) for value in (*lowest, *(highest - lowest)))
