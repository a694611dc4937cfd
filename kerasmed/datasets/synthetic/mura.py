"""Write a synthetic MURA set: the real layout, seven types of bones, and signs that some of a study's images show."""

import json
import os
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd

from kerasmed import atomic, metrics
from kerasmed.datasets.mura import STUDY_TYPES
from kerasmed.datasets.synthetic.drawing import refuse_other, rotated, write_image, write_text

# Beside STUDY_TYPES: each type's share of the studies, and of these the share of abnormal ones; nearly the real ones.
_TYPE_SHARES = np.array([0.12, 0.14, 0.07, 0.16, 0.06, 0.20, 0.25])
_ABNORMAL_SHARES = np.array([0.40, 0.38, 0.37, 0.29, 0.47, 0.44, 0.39])
# Of patients: in valid/; with a second study of their type; with one of another type.
_VALID_SHARE, _SAME_TYPE_SHARE, _OTHER_TYPE_SHARE = 0.25, 0.14, 0.10
_IMAGE_SHARES = (0.12, 0.31, 0.37, 0.15, 0.05)  # of studies with 1, 2, ... 5 images: 2.7 on average
_GAP_SHARE, _RGB_SHARE = 0.1, 0.03  # of studies whose image numbers skip some; of images stored in three channels
_FEWEST_PATIENTS, _SMALLEST_SIDE = 40, 64
_TRUTH_COLUMNS = ["image_path", "study_id", "sign", "visible", "x", "y", "width", "height"]
# What macOS leaves behind: no images, whatever their names.
_DS_STORE = "\x00\x00\x00\x01Bud1\x00\x00\x10\x00\x00\x00\x08\x00\x00\x00\x10\x00" + "\x00" * 64
_APPLE_DOUBLE = "\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \x00\x02\x00\x00\x00\x09" + "\x00" * 96


def write(
    root: str | os.PathLike,
    *,
    patients: int = 900,
    label_noise: float = 0.04,
    visible_share: float = 0.6,
    image_side: tuple[int, int] = (120, 220),
    seed: int = 0,
) -> Path:
    """Write a synthetic set in the layout of the real one.

    Layout (8-bit PNG, grey, 3 % of them in three equal channels; width / height from 0.72 to 1.15 in all types):

        root/mura/MURA-v1.1/{train,valid}/XR_*/patientNNNNN/studyN_{positive,negative}/imageN.png
        root/mura/truth.csv       image_path (relative to root), study_id, sign ("", "fracture", "hardware" or
                                  "lesion"), visible (1: the sign is drawn), x, y, width, height (its box in pixels of
                                  the file, empty without a sign); in the reader's order
        root/mura/synthetic.json  system, parameters, images, studies, prevalence, ceiling

    Hidden files (`.DS_Store`, `._image1.png`) lie among the images, as macOS leaves them. A quarter of the patients,
    those of the highest numbers, are in valid/. Of the patients, 14 % have a second study of the same type and 10 % one
    of another; studies have 1 to 5 images (mean 2.7), and in some of them the images' numbers have gaps.

    A type has its own bones, a patient their widths, a study a side, and an image its own turn (20° either way), shift,
    scale, foreshortening, exposure and noise, and the side's letter. An abnormal study has one sign (a third each) on
    one of its long bones, of the same shapes in all types. At least one of its images shows it, and of all images of a
    split's abnormal studies the share `visible_share`, as nearly as these two agree; the others look normal, though
    their folder says positive. In each split round(label_noise * studies) studies are recorded as the opposite.

    `ceiling` holds, on valid/, the AUROC of the true visibility for the label: "image_auroc" by image, "study_auroc"
    with its mean over a study's images. "image_auroc_with_type" is by image that of whoever ranks the images without a
    sign by their type's share of abnormal studies: a network learns that too, and may so pass "image_auroc".

    By default 838 + 279 studies and 2,256 + 761 images (train + valid; 19 valid studies of the smallest type), ceilings
    of 0.772 by image (0.803 with the type) and 0.952 by study. In 8 epochs `models.compact_cnn` on 64×64 pixels reaches
    0.80 and 0.94, the nearest neighbour 0.53 and 0.55, and size, shape, border and mean intensity of an image 0.49 to
    0.55. No two images of different patients correlate above 0.98.

    Args:
        root: folder to write under, created where missing.
        patients: at least 40, so that every type is in both splits.
        label_noise: share of the studies whose label is not what is drawn, in [0, 0.5).
        visible_share: share of the images of abnormal studies that show the sign, in (0, 1].
        image_side: least and most pixels of an image's long side, at least 64.
        seed: non-negative integer; the same seed and parameters write byte-identical files of the same times.

    Returns:
        `root` as a Path. A set of the same parameters is left as it is. The folder gets its name when it is whole.

    Raises:
        ValueError: a parameter is outside the range above.
        FileExistsError: `root/mura` is there and is not this set.
    """
    parameters = _checked_parameters(patients, label_noise, visible_share, image_side, seed)
    root = Path(root)
    studies, truth = _draw_truth(parameters)
    description = {"system": "mura", **parameters, **_describe(studies, truth)}
    target = root / "mura"
    if target.exists():
        refuse_other(target, description)
        return root

    with atomic.whole_folder(target) as writing:
        boxes = _write_images(writing, studies, truth, parameters)
        truth[["x", "y", "width", "height"]] = pd.DataFrame(boxes, index=truth.index).astype("Int64")
        write_text(writing / "MURA-v1.1" / ".DS_Store", _DS_STORE)
        for name in studies["folder"].iloc[:: len(studies) // 5]:
            write_text(writing / name / "._image1.png", _APPLE_DOUBLE)
            write_text((writing / name).parent / ".DS_Store", _DS_STORE)
        write_text(writing / "truth.csv", truth[_TRUTH_COLUMNS].to_csv(index=False, lineterminator="\n"))
        write_text(writing / "synthetic.json", json.dumps(description, indent=2) + "\n")
    refuse_other(target, description)  # another process may have written there meanwhile
    return root


def _checked_parameters(patients, label_noise, visible_share, image_side, seed) -> dict:
    """Return the parameters as plain Python values, or raise ValueError."""
    side_fits = len(image_side) == 2 and _SMALLEST_SIDE <= image_side[0] <= image_side[1]
    for name, value, fits, expected in (
        ("patients", patients, patients >= _FEWEST_PATIENTS, f"at least {_FEWEST_PATIENTS}"),
        ("label_noise", label_noise, 0 <= label_noise < 0.5, "a share in [0, 0.5), such as 0.04"),
        ("visible_share", visible_share, 0 < visible_share <= 1, "a share in (0, 1], such as 0.6"),
        ("image_side", image_side, side_fits, f"(least, most) pixels, at least {_SMALLEST_SIDE}, such as (120, 220)"),
        ("seed", seed, seed >= 0, "a non-negative integer"),
    ):
        if not fits:
            raise ValueError(f"`{name}` is {value}; expected {expected}.")
    shares = {"label_noise": float(label_noise), "visible_share": float(visible_share)}
    return {"seed": int(seed), "patients": int(patients)} | shares | {"image_side": [int(side) for side in image_side]}


# --- patients, studies and labels ------------------------------------------------------------------------------------


def _draw_truth(parameters: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw studies and their images, both in the reader's order; `row` of an image is its study's."""
    rng = np.random.default_rng([parameters["seed"], 0])
    num_valid = round(_VALID_SHARE * parameters["patients"])
    num_train = parameters["patients"] - num_valid
    parts = [
        _draw_studies(rng, first, number, parameters["label_noise"]).assign(split=split)
        for split, first, number in (("train", 1, num_train), ("valid", num_train + 1, num_valid))
    ]
    studies = pd.concat(parts, ignore_index=True)
    ids = zip(studies["type"], studies["patient"], studies["number"])
    studies["study_id"] = [f"{STUDY_TYPES[kind]}/patient{patient:05d}/study{number}" for kind, patient, number in ids]
    studies["folder"] = "MURA-v1.1/" + studies["split"] + "/" + studies["study_id"] + "_"
    studies["folder"] += np.where(studies["positive"], "positive", "negative")

    rows = studies.index.repeat(rng.choice(len(_IMAGE_SHARES), len(studies), p=_IMAGE_SHARES) + 1)
    drawn = studies.loc[rows]
    truth = drawn[["study_id", "positive"]].reset_index(names="row")
    number = truth.groupby("row").cumcount().to_numpy() + 1
    # In a study with a gap the numbers from some image on are higher: image2 may be followed by image10.
    gap, begins = rng.integers(1, 9, len(studies)), rng.integers(1, 4, len(studies))
    gap[rng.uniform(size=len(studies)) >= _GAP_SHARE] = 0
    number += gap[rows] * (number >= begins[rows])
    truth["name"] = [f"image{value}.png" for value in number]
    truth["image_path"] = "mura/" + drawn["folder"].to_numpy() + "/" + truth["name"]
    truth["rgb"] = rng.uniform(size=len(truth)) < _RGB_SHARE

    truth["visible"] = 0
    for split in ("train", "valid"):
        order = pd.Series(rng.permutation(truth.index[(drawn["abnormal"] & (drawn["split"] == split)).to_numpy()]))
        is_first = ~truth["row"][order].duplicated().to_numpy()  # one image of each study
        more = max(0, round(parameters["visible_share"] * len(order)) - is_first.sum())
        truth.loc[[*order[is_first], *order[~is_first][:more]], "visible"] = 1
    truth["sign"] = np.where(truth["visible"] == 1, drawn["sign"], "")
    return studies, truth


def _draw_studies(rng, first: int, num_patients: int, label_noise: float) -> pd.DataFrame:
    """Draw the studies of a split by type, patient (numbered from `first`) and number: what they are and are called."""
    exact = _TYPE_SHARES * (num_patients - len(STUDY_TYPES))  # each type has one patient in any case
    counts = np.floor(exact).astype(int) + 1
    counts[np.argsort(counts - exact, kind="stable")[: num_patients - counts.sum()]] += 1
    types = rng.permutation(np.repeat(np.arange(len(STUDY_TYPES)), counts))
    evenly = np.linspace(0, num_patients, round(_SAME_TYPE_SHARE * num_patients), endpoint=False).astype(int)
    again = np.argsort(types, kind="stable")[evenly]  # of each type as many as it is large
    elsewhere = rng.permutation(num_patients)[: round(_OTHER_TYPE_SHARE * num_patients)]
    others = (types[elsewhere] + rng.integers(1, len(STUDY_TYPES), len(elsewhere))) % len(STUDY_TYPES)
    patient = first + np.concatenate([np.arange(num_patients), again, elsewhere])
    table = pd.DataFrame({"type": np.concatenate([types, types[again], others]), "patient": patient})
    table = table.sort_values(["type", "patient"], ignore_index=True)
    table["number"] = table.groupby(["type", "patient"]).cumcount() + 1

    # Systematic sampling: a 1 for each whole number that the sum of chances, taken type by type, passes. So each type,
    # and the split, has its share of abnormal studies within one.
    order = np.lexsort([rng.uniform(size=len(table)), table["type"]])
    passed = np.floor(rng.uniform() + np.cumsum(_ABNORMAL_SHARES[table["type"][order]]))
    abnormal = np.zeros(len(table), bool)
    abnormal[order] = np.diff(passed, prepend=0) == 1
    flipped = rng.permutation(len(table)) < round(label_noise * len(table))
    sign = np.full(len(table), "", object)
    sign[rng.permutation(np.flatnonzero(abnormal))] = np.resize(list(_DRAW_SIGN), abnormal.sum())
    return table.assign(abnormal=abnormal, positive=abnormal ^ flipped, sign=sign)


def _describe(studies: pd.DataFrame, truth: pd.DataFrame) -> dict:
    """Count images and studies, and state what reading every sign rightly reaches on valid/."""
    counted = studies.assign(images=truth.groupby("row").size()).groupby("split")
    images = truth[(studies["split"] == "valid").to_numpy()[truth["row"]]]
    means = images.groupby("row")[["positive", "visible"]].mean()
    with_type = images["visible"] + _ABNORMAL_SHARES[studies["type"][images["row"]]]
    return {
        "images": counted["images"].sum().to_dict(),
        "studies": counted.size().to_dict(),
        "prevalence": counted["positive"].mean().to_dict(),
        "ceiling": {
            "image_auroc": _auroc(images["positive"], images["visible"]),
            "study_auroc": _auroc(means["positive"], means["visible"]),
            "image_auroc_with_type": _auroc(images["positive"], with_type),
        },
    }


def _auroc(labels: pd.Series, scores: pd.Series) -> float | None:
    """AUROC; None where all labels are the same."""
    area = metrics.auroc(labels.to_numpy() == 1, scores.to_numpy(float), np.ones((1, len(labels))))[0]
    return float(area) if np.isfinite(area) else None


# --- files -----------------------------------------------------------------------------------------------------------


def _write_images(folder: Path, studies: pd.DataFrame, truth: pd.DataFrame, parameters: dict) -> list[tuple]:
    """Draw and write all images; return their signs' boxes."""
    for name in studies["folder"]:
        (folder / name).mkdir(parents=True)

    def draw(image):
        study = studies.loc[image.row]
        # What a patient's images of a type share, what a study's share, and what is an image's own.
        keys = [1, study["patient"], study["type"]], [2, image.row], [3, image.Index]
        rngs = [np.random.default_rng([parameters["seed"], *key]) for key in keys]
        picture, box = _draw_image(study["type"], image.sign, *rngs, parameters["image_side"])
        write_image(folder / study["folder"] / image.name, cv2.merge([picture] * 3) if image.rgb else picture)
        return box

    # Threads: drawing, noise and compression release the interpreter's lock.
    return joblib.Parallel(n_jobs=-1, prefer="threads")(joblib.delayed(draw)(image) for image in truth.itertuples())


# --- bones and pictures ----------------------------------------------------------------------------------------------
# Lengths are in halves of the side of a square of the image's area, x to the right and y downwards from its centre. A
# bone is a row: x, y of its start, x, y of its end; half-widths at the start, in the shaft and at the end; bow (how far
# the middle of its axis lies off the straight line); density (1: a whole bone). A type's function returns its bones,
# which of them may have a sign, and the thickness of the flesh about them.

_T = (1 - np.cos(np.linspace(0, np.pi, 17))) / 2
_CAP = np.sqrt(1 - np.abs(2 * _T - 1) ** 8)
_AT_START = np.exp(-((_T / 0.2) ** 2))
_FRACTION = 4  # bits of the coordinates that OpenCV draws


def _axis(bones: np.ndarray, t) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points at shares `t` of bones' lengths, shape (..., 2), unit normals, and lengths (..., 1)."""
    along = bones[..., 2:4] - bones[..., :2]
    length = np.linalg.norm(along, axis=-1, keepdims=True)
    normal = np.stack([-along[..., 1], along[..., 0]], axis=-1) / length
    bow = (bones[..., 7] * np.sin(np.pi * t))[..., None]
    return bones[..., :2] + along * np.asarray(t)[..., None] + normal * bow, normal, length


def _outlines(bones: np.ndarray, *, factor: float = 1.0, widen: float = 0.0) -> np.ndarray:
    """Outlines of bones of `factor` times their widths and `widen` more all round: (num_bones, num_points, 2)."""
    bones = bones[:, None]
    first, shaft, last = bones[..., 4], bones[..., 5], bones[..., 6]
    width = shaft + (first - shaft) * _AT_START + (last - shaft) * _AT_START[::-1]
    longer = 1 + 2 * (widen - (1 - factor) * shaft) / _axis(bones, 0.5)[2][..., 0]
    points, normal, _ = _axis(bones, (_T - 0.5) * np.maximum(longer, 0.2) + 0.5)
    side = normal * ((width * factor + widen) * _CAP)[..., None]
    return np.concatenate([points + side, (points - side)[:, ::-1]], axis=1)


def _chain(x, y, angles, lengths, widths, gap=0.035):
    """Bones end to end from (x, y), upwards at angle 0: a finger."""
    rows = []
    for angle, length, width in zip(angles, lengths, widths):
        ahead = np.array([np.sin(angle), -np.cos(angle)])
        rows.append((x, y, *((x, y) + length * ahead), 1.35 * width, width, 1.2 * width, 0, 1))
        x, y = (x, y) + (length + gap) * ahead
    return rows


def _row_of_blobs(x, y, step, number, width, height, density=1.0):
    """Short round bones side by side."""
    at = x + step * np.arange(number)
    return [(left, y - height, left, y + height, width, width, width, 0, density) for left in at]


def _elbow(rng):
    bend = rng.uniform(1.0, 1.7) if rng.uniform() < 0.6 else rng.uniform(0.0, 0.2)  # from the side, or from the front
    ahead, across = np.array([np.sin(bend), np.cos(bend)]), np.array([np.cos(bend), -np.sin(bend)])
    x, y = -0.45 * np.sin(bend), 0.15
    ulna, radius = ((x, y + 0.05) + at * ahead + side * across for at, side in ((-0.01, -0.12), (0.11, 0.12)))
    bones = [
        (x - 0.08, y - 1.5, x, y, 0.15, 0.125, 0.25, 0, 1),
        (*ulna, *(ulna + 1.5 * ahead), 0.17, 0.09, 0.09, 0, 1),
        (*radius, *(radius + 1.5 * ahead), 0.13, 0.08, 0.08, 0, 1),
    ]
    return bones, (0, 1, 2), 0.22


def _finger(rng):
    bend, side, lean = rng.uniform(-0.1, 0.25), rng.choice([-1, 1]), rng.uniform(0.1, 0.25)
    lengths, widths = (0.78, 0.66, 0.42, 0.26), (0.125, 0.105, 0.09, 0.065)
    bones = _chain(-0.1, 1.45, (0, 0.02, bend, 1.6 * bend), lengths, widths, gap=0.045)
    bones += _chain(-0.1 + 0.52 * side, 1.6, [side * lean] * 3, (0.7, 0.6, 0.4), (0.12, 0.1, 0.085), gap=0.045)
    return bones, (0, 1, 2), 0.15


def _forearm(rng):
    bones = [
        (0.17, -0.72, 0.17, 0.78, 0.11, 0.075, 0.16, 0.09, 1),
        (-0.1, -0.86, -0.14, 0.74, 0.17, 0.08, 0.08, 0.03, 1),
        (0.0, -1.6, 0.02, -0.84, 0.13, 0.13, 0.24, 0, 1),
    ]
    bones += _row_of_blobs(-0.08, 0.92, 0.16, 3, 0.08, 0.07) + _row_of_blobs(0.0, 1.1, 0.16, 2, 0.08, 0.07)
    return bones, (0, 1), 0.2


def _hand(rng):
    spread, bones, long_bones = rng.uniform(0.8, 1.25), [], []
    for x, y, angle, width, *lengths in (
        (-0.25, 0.38, -0.75, 0.062, 0.32, 0.24, 0.2),  # the thumb
        (-0.16, 0.30, -0.20, 0.060, 0.50, 0.33, 0.21, 0.14),
        (-0.02, 0.28, -0.04, 0.060, 0.50, 0.36, 0.24, 0.15),
        (0.11, 0.30, 0.11, 0.055, 0.46, 0.33, 0.22, 0.14),
        (0.22, 0.34, 0.27, 0.052, 0.42, 0.27, 0.17, 0.13),
    ):
        long_bones += [len(bones), len(bones) + 1]
        angles = [spread * angle + rng.uniform(-0.05, 0.05)] * len(lengths)
        bones += _chain(x, y, angles, lengths, width * np.array([1.0, 0.88, 0.76, 0.64]))
    bones += _row_of_blobs(-0.17, 0.43, 0.12, 4, 0.06, 0.055) + _row_of_blobs(-0.12, 0.57, 0.12, 3, 0.06, 0.055)
    bones += [(-0.1, 0.68, -0.12, 1.4, 0.14, 0.08, 0.08, 0, 1), (0.15, 0.7, 0.15, 1.4, 0.08, 0.06, 0.06, 0, 1)]
    return bones, long_bones[2:], 0.09


def _humerus(rng):
    bones = [
        (0.02, -0.8, 0.0, 0.82, 0.17, 0.115, 0.24, 0.03, 1),
        *_row_of_blobs(-0.08, -0.76, 0, 1, 0.19, 0.18, 0.8),
        (-0.3, -0.98, 0.2, -1.02, 0.07, 0.05, 0.07, 0.03, 0.7),  # acromion
        (-0.4, -0.95, -0.62, -0.1, 0.14, 0.07, 0.03, 0.05, 0.5),  # scapula
        (-0.08, 0.84, -0.1, 1.7, 0.15, 0.09, 0.08, 0, 1),
        (0.12, 0.92, 0.14, 1.7, 0.11, 0.08, 0.08, 0, 1),
    ]
    return bones, (0,), 0.27


def _shoulder(rng):
    raised = rng.uniform(-0.05, 0.35)
    bones = [
        (0.32, -0.26, 0.26 + 1.6 * np.sin(raised), -0.16 + 1.6 * np.cos(raised), 0.17, 0.12, 0.13, 0, 1),
        *_row_of_blobs(0.24, -0.16, 0, 1, 0.2, 0.2, 0.8),
        (-0.02, -0.26, -0.3, 0.85, 0.12, 0.05, 0.04, 0, 0.9),  # scapula: outer border and blade
        (-0.16, -0.42, -0.42, 0.75, 0.3, 0.28, 0.1, 0, 0.35),
        (0.18, -0.5, -1.2, -0.5, 0.08, 0.055, 0.09, 0.14, 0.9),  # clavicle
        (-0.1, -0.34, 0.36, -0.52, 0.05, 0.07, 0.07, 0.03, 0.7),  # acromion
    ]
    ribs = [(-1.3, y - 0.4, -0.42, 0.1 + 1.2 * y, 0.04, 0.035, 0.03, -0.12, 0.4) for y in (0, 0.3, 0.6, 0.9)]
    return bones + ribs, (0, 4), 0.3


def _wrist(rng):
    lean = rng.uniform(-0.2, 0.2)
    bones = [(0.16, 1.6, 0.12, 0.22, 0.11, 0.11, 0.23, 0, 1), (-0.24, 1.6, -0.22, 0.3, 0.08, 0.085, 0.11, 0, 1)]
    for x, y, angle in ((-0.27, -0.38, -0.21), (-0.1, -0.45, -0.07), (0.07, -0.46, 0.07), (0.24, -0.42, 0.21)):
        bones += _chain(x, y, [lean + angle], [0.75], [0.07])
    bones += _chain(0.38, -0.2, [lean + 0.8], [0.6], [0.075])
    bones += _row_of_blobs(-0.2, 0.08, 0.16, 4, 0.085, 0.08) + _row_of_blobs(-0.22, -0.19, 0.165, 4, 0.085, 0.1)
    return bones, range(6), 0.17


_ANATOMIES = (_elbow, _finger, _forearm, _hand, _humerus, _shoulder, _wrist)  # beside STUDY_TYPES


def _draw_image(study_type: int, sign, of_patient, of_study, rng, image_side) -> tuple[np.ndarray, tuple]:
    """Return a uint8 image and its sign's box (x, y, width, height), four times None without one.

    The generators are the patient's (for this type), the study's and the image's own.
    """
    mirror, kind = of_study.choice([-1, 1]), of_study.integers(2)
    long_side, aspect = rng.integers(image_side[0], image_side[1] + 1), rng.uniform(0.72, 1.15)
    width, height = round(long_side * min(1, aspect)), round(long_side / max(1, aspect))
    turn, scale, squeeze = rng.uniform(-0.35, 0.35), rng.uniform(0.9, 1.1), rng.uniform(0.82, 1.0)
    unit, turned = np.sqrt(height * width) / 2, np.stack(rotated(*np.eye(2), turn))
    origin = np.array([width, height]) / 2 + unit * rng.uniform(-0.08, 0.08, 2)
    matrix = unit * scale * turned * [mirror * squeeze, 1]

    def to_pixels(points):
        return points @ matrix.T + origin

    bones, long_bones, flesh = _ANATOMIES[study_type](rng)
    bones = np.array(bones, float)
    bones[:, 4:7] *= of_patient.uniform(0.88, 1.15) * of_patient.uniform(0.92, 1.08, (len(bones), 1))
    bones[:, :4] += np.tile(of_patient.normal(0, 0.012, (len(bones), 2)), 2)
    flesh = flesh * of_patient.uniform(0.85, 1.2)
    letter = (rng.uniform(0.08, 0.12, 2) + 0.8 * rng.integers(2, size=2)) * [width, height]
    layers = []
    if sign:
        place = _choose_place(of_study, bones, long_bones, to_pixels, (width, height), letter)
        bones, layers = _DRAW_SIGN[sign](rng, kind, bones, *place)

    picture, changed = _radiograph(rng, bones, flesh, layers, to_pixels, (width, height))
    size = 0.1 * min(width, height) / 22  # a tenth of the short side; at size 1 a letter is 22 pixels high, 18 wide
    left, bottom = np.rint(letter + [-9 * size, 11 * size]).astype(int).tolist()
    name = "R" if mirror > 0 else "L"
    cv2.putText(picture, name, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, size, 250, 2, cv2.LINE_AA)
    return picture, cv2.boundingRect(changed) if sign else (None,) * 4


def _fill(canvas: np.ndarray, outline, level) -> None:
    """Paint inside an outline in pixels, with a smooth edge."""
    cv2.fillPoly(canvas, [np.rint(outline * 2**_FRACTION).astype(np.int32)], level, cv2.LINE_AA, _FRACTION)


def _radiograph(rng, bones, flesh, layers, to_pixels, size) -> tuple[np.ndarray, np.ndarray]:
    """Draw bones in flesh, and layers over them: a uint8 picture of `size` = (width, height), and where layers are."""
    small = np.zeros((size[1] // 4 + 1, size[0] // 4 + 1), np.uint8)  # flesh is blurred anyway
    for outline in to_pixels(_outlines(bones, widen=flesh)) / 4:
        _fill(small, outline, 255)
    tissue = cv2.resize(cv2.GaussianBlur(small, (0, 0), 0.02 * size[0]), size) * np.float32(1 / 255)
    tissue *= rng.uniform(45, 75) * (1 + _field(rng, 4, 0.12, size))

    layer, mask, changed = np.zeros((3, *size[::-1]), np.uint8)
    cortex, marrow = rng.uniform(95, 120), rng.uniform(0.62, 0.8)
    outer, inner = (to_pixels(_outlines(bones, factor=factor)) for factor in (1, 0.6))
    for rim, core, level in zip(outer, inner, cortex * bones[:, 8]):
        mask[:] = 0
        _fill(mask, rim, level)
        _fill(mask, core, level * marrow)
        layer = cv2.add(layer, mask)
    # What lies one over another adds up, but ever less: film saturates.
    picture = rng.uniform(4, 16) + tissue + 150 * np.tanh(layer * (1 + _field(rng, 14, 0.07, size)) / 150)
    for outline, level in layers:
        mask[:] = 0
        _fill(mask, to_pixels(outline), 255)
        picture += mask * np.float32(1 / 255) * (np.float32(level) - picture)
        changed |= mask > 127
    picture = cv2.GaussianBlur(picture, (0, 0), 0.006 * max(size))
    picture = picture * np.float32(rng.uniform(0.8, 1.15)) + np.float32(rng.uniform(-4, 10))
    if rng.uniform() < 0.3:  # collimated
        for side in np.flatnonzero(rng.uniform(size=4) < 0.6):
            np.rot90(picture, side)[: round(rng.uniform(0.02, 0.07) * min(size))] *= 0.15
    picture += np.float32(rng.uniform(1.5, 3.5)) * rng.standard_normal(picture.shape, np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), changed


def _field(rng, nodes, deviation, size) -> np.ndarray:
    """Smooth field through a grid of random values: float32, of `size` = (width, height)."""
    return cv2.resize(np.float32(deviation) * rng.standard_normal((nodes, nodes), np.float32), size)


# --- signs -----------------------------------------------------------------------------------------------------------
# Each takes a place on a bone (which one, the point, directions along and across), and returns the bones, and outlines
# with the grey levels to paint them in.


def _choose_place(rng, bones, long_bones, to_pixels, size, letter) -> tuple:
    """Choose a place on a long bone, so that a sign there is well in the picture and clear of the letter."""
    index, t = rng.choice(long_bones, 40), rng.uniform(0.25, 0.75, 40)
    x, y = to_pixels(_axis(bones[index], t)[0]).T
    room = np.min([x, size[0] - x, y, size[1] - y, np.hypot(x - letter[0], y - letter[1])], axis=0)
    best = np.argmax(np.minimum(room, 0.08 * sum(size)))  # the first that has room enough
    (before, point, after), _, _ = _axis(bones[index[best]], t[best] + np.array([-0.05, 0, 0.05]))
    ahead = (after - before) / np.linalg.norm(after - before)
    return index[best], point, ahead, np.array([-ahead[1], ahead[0]])


def _fracture(rng, kind, bones, index, point, ahead, across):
    """A shaft in two: the far part shifted and turned, and a dark jagged gap between."""
    half_width, side = bones[index, 5], 2 * kind - 1
    near, far = bones[index].copy(), bones[index].copy()
    near[7] = far[7] = 0
    near[6] = far[4] = half_width
    step = side * max(0.07, rng.uniform(0.5, 0.8) * half_width) * across
    near[2:4], far[:2] = point, point + step
    far[2:4] = far[:2] + rotated(*(bones[index, 2:4] - point), -side * rng.uniform(0.12, 0.3))
    v = np.linspace(-1, 1, 9) * max(0.17, 1.45 * half_width)
    edge = rng.uniform(-0.5, 0.5) * v + rng.uniform(-0.03, 0.03, 9)
    u = np.concatenate([edge - rng.uniform(0.05, 0.065), (edge + rng.uniform(0.045, 0.07, 9))[::-1]])
    outline = point + step / 2 + np.outer(u, ahead) + np.outer(np.concatenate([v, v[::-1]]), across)
    return np.concatenate([np.delete(bones, index, axis=0), [near, far]]), [(outline, rng.uniform(8, 25))]


def _hardware(rng, kind, bones, index, point, ahead, across):
    """A plate beside a shaft, or a rod in it, with screws across."""
    half_width, length = bones[index, 5], rng.uniform(0.42, 0.55)
    beside = point + rng.choice([-0.7, 0.7]) * half_width * across
    bars = [(point, 0.6 * length * ahead, 0.042) if kind else (beside, 0.5 * length * ahead, 0.05)]
    for at in (-0.5, -0.38, 0.45) if kind else (-0.4, -0.15, 0.12, 0.38):
        bars.append((point + at * length * ahead, (half_width + 0.06) * across, 0.02))
    rows = [(*(middle - reach), *(middle + reach), width, width, width, 0, 1) for middle, reach, width in bars]
    return bones, [(outline, 250) for outline in _outlines(np.array(rows))]


def _lesion(rng, kind, bones, index, point, ahead, across):
    """A round spot: dark with a bright rim, or bright with an uneven edge."""
    radius, angles = rng.uniform(0.155, 0.2), np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if kind:
        uneven = 0.07 * np.cos(5 * angles + rng.uniform(0, 6)) + 0.05 * np.cos(8 * angles + rng.uniform(0, 6))
        return bones, [(point + radius * (1 + uneven[:, None]) * circle, rng.uniform(205, 235))]
    hollow = point + (radius - 0.04) * circle, rng.uniform(15, 35)
    return bones, [(point + radius * circle, rng.uniform(175, 205)), hollow]


_DRAW_SIGN = {"fracture": _fracture, "hardware": _hardware, "lesion": _lesion}
