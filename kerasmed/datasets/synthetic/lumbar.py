"""Write a synthetic lumbar set: real DICOM in the real layout, and signs of 25 grades in the modality of each."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from kerasmed import atomic, metrics
from kerasmed.datasets.lumbar import CONDITIONS, GRADES, LEVELS, MODALITIES, PAIRED, PLACES, TARGETS
from kerasmed.datasets.synthetic import lumbar_drawing as drawing
from kerasmed.datasets.synthetic import lumbar_files as files
from kerasmed.datasets.synthetic.drawing import refuse_other, write_text

_SHARES = {CONDITIONS[0]: (0.85, 0.09, 0.06), CONDITIONS[1]: (0.77, 0.17, 0.06), CONDITIONS[2]: (0.70, 0.18, 0.12)}
_BLANK_SHARES = dict(zip(CONDITIONS, (0.005, 0.01, 0.03)))
_LATENT_SHARE = 0.7  # of the variance of severity, beside the levels'
_CORRELATION = 0.3  # of two conditions' latents
_LEVEL_SHIFTS = np.array([-0.35, -0.2, 0.0, 0.25, 0.3])
_DOUBLE_SHARE = 0.08  # of studies with two series of one kind
_SHUFFLED_SHARE, _INVERTED_SHARE, _DEEP_SHARE = 0.5, 0.15, 0.4  # of series; deep: 16 bits, else 12
_FEWEST_STUDIES, _SMALLEST_SIDE = 10, 48
_TRUTH_COLUMNS = ["study_id", "series_id", "instance_number", "position", "condition", "side", "level", "grade"]
_TRUTH_COLUMNS += ["x", "y", "width", "height"]
_COORDINATE_COLUMNS = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
_SIDE_NUMBERS = {"": 0, "left": 1, "right": -1}
_OF_TARGET = pd.DataFrame(PLACES.values(), columns=["condition", "side", "level"])
_CONDITION_OF = _OF_TARGET["condition"].map(CONDITIONS.index).to_numpy()  # (25,)
_LEVEL_OF = _OF_TARGET["level"].map(LEVELS.index).to_numpy()


class _Grades(NamedTuple):
    """Arrays (num_studies, 25) beside `TARGETS`, and what they come from."""

    latent: np.ndarray  # (num_studies, 3)
    strength: np.ndarray  # in [0, 1]: what is drawn
    grade: np.ndarray  # int: what it is
    recorded: np.ndarray  # float, NaN where blank: what train.csv says


def write(
    root: str | os.PathLike,
    *,
    studies: int = 300,
    seed: int = 0,
    image_side: tuple[int, int] = (72, 104),
    label_noise: float = 0.02,
    echo: float = 0.35,
    missing_share: float = 0.08,
) -> Path:
    """Write a synthetic set in the layout of the real one.

    Layout (MR images in DICOM, explicit VR little endian, uncompressed):

        root/lumbar/train.csv, train_series_descriptions.csv     as in the real set
        root/lumbar/train_label_coordinates.csv                  a point for every place whose own modality is there
        root/lumbar/train_images/<study>/<series>/<instance>.dcm
        root/lumbar/truth.csv       a row for every slice and place of the slice's own modality, whatever the grade:
                                    study_id, series_id, instance_number, position (rank along the normal: sagittal
                                    slices from the patient's right, axial ones from the feet), condition, side, level
                                    (as in `kerasmed.datasets.lumbar.PLACES`), grade (0, 1, 2: what is drawn), x, y,
                                    width, height (the sign's box in pixels)
        root/lumbar/synthetic.json  system, parameters, series and slices by modality, studies that lack a modality,
                                    recorded grades by condition, ceiling

    Sagittal series have 7 to 11 slices, axial ones 8 to 12. The share `missing_share` of the studies lacks a modality,
    and 8 %, others, have two series of one kind (an axial stack cut in two, or a sagittal one repeated), each modality
    as often. Of the series 15 % are MONOCHROME1, 40 % use 16 bits and the others 12, half have instance
    numbers in random order, half a window, a fifth a rescaling, and sizes vary. Sagittal stacks are turned by up to 6°
    about two axes, axial planes tilt with their disc. Spacing, thickness, field strength and maker are each absent in
    8 %, sex and age in 30 % of the studies, and tell nothing of the grades. Invented names and ids are in the headers,
    for de-identification to remove.

    A study has a latent degeneration u of each condition; those of two conditions correlate by 0.3. A place's severity

        z = √0.7 · u + √0.3 · e + shift of its level,   u and e standard normal, e of the place alone

    is graded by two thresholds, so that of the true grades 85 / 9 / 6 % are Normal/Mild, Moderate and Severe for the
    canal, 77 / 17 / 6 % foraminal and 70 / 18 / 12 % subarticular. The share `label_noise` is recorded as a
    neighbouring grade, and 0.5, 1 and 3 % are blank.

    A sign is a patch of fine stripes or squares (3 to 4 % of a slice) at the place in the modality that its condition
    is paired with: on the 2 or 3 middle sagittal slices for the canal, 1 or 2 lateral ones of its side for a foramen, 1
    or 2 axial ones of its disc for a recess. Its strength grows with z: up to 0.15 for Normal/Mild, 0.55 to 0.7 for
    Moderate, 0.85 to 1 for Severe. In the other two modalities an echo of it lies at the anatomical place. Anatomy is
    the study's, exposure and noise the series'; anatomy has little contrast, as else what random weights make of a
    slice would go by it alone.

    `ceiling` holds, by condition and as their mean ("macro"), the macro one-vs-rest AUROC for the recorded grades of
    three observers, each of whom answers with P(recorded grade | what it knows): "grade" knows the true grade,
    "latent_and_level" u and the level, "level" the level. One vector a series, as the mean over slices is, may pass the
    second: beside u it shows how many of the study's places are graded.

    By default 300 studies, 900 series and 8,342 slices, 155 MB in 16 s on two cores; ceilings of 0.953, 0.977, 0.973
    (grade; canal, foraminal, subarticular), 0.884, 0.888, 0.862 (latent and level) and 0.609, 0.608, 0.604 (level). A
    ResNet50 of random weights on 64×64 pixels with batch statistics of 1,024 slices, in five folds by study:

        slices, Moderate or Severe against the others of such a place: AUROC 0.985, 0.969, 0.995
        grades by the mean over slices, level and side (logistic):     macro AUROC 0.886, 0.852, 0.859
        the same of the two other modalities, by echo:                 0.66 to 0.77
        after histogram equalisation, which raises the anatomy:        0.854, 0.696, 0.821; by slice 0.72 to 0.95

    The nearest neighbour among other studies by thumbnails of the middle slices has 0.56, 0.51 and 0.58 for the grades.
    For whether anything is Moderate or Severe it has 0.65, 0.54 and 0.58, and the thumbnail's standard deviation 0.74,
    0.61 and 0.72, as a sign is contrast; its mean, border and the number of slices have 0.40 to 0.51. No two pictures
    of different studies are near duplicates by `kerasmed.audit`.

    Args:
        root: folder to write under, created where missing.
        studies: at least 10.
        seed: non-negative integer; the same seed and parameters write byte-identical files of the same times.
        image_side: least and most pixels of a slice's side (the root of its area), at least 48.
        label_noise: share of the grades that are recorded as another one, in [0, 0.5).
        echo: energy (squared contrast) of a sign in the two modalities that are not its own, as a share of that in its
            own, in [0, 1].
        missing_share: share of the studies that lack one modality, in [0, 0.9].

    Returns:
        `root` as a Path. A set of the same parameters is left as it is. The folder gets its name when it is whole.

    Raises:
        ValueError: a parameter is outside the range above.
        FileExistsError: `root/lumbar` is there and is not this set.
    """
    parameters = _checked_parameters(studies, seed, image_side, label_noise, echo, missing_share)
    root = Path(root)
    rng = np.random.default_rng([parameters["seed"], 0])
    grades = _draw_grades(rng, parameters)
    series = _draw_series(rng, parameters)
    description = {"system": "lumbar", **parameters, **_describe(grades, series, parameters["label_noise"])}
    target = root / "lumbar"
    if target.exists():
        refuse_other(target, description)
        return root

    with atomic.whole_folder(target) as writing:
        tasks = [
            joblib.delayed(_write_study)(writing / "train_images", rows, grades.strength[study], parameters)
            for study, rows in series.groupby("study")
        ]
        # Processes, as pydicom holds the interpreter's lock; a few studies are not worth starting them.
        signs = pd.concat(joblib.Parallel(n_jobs=-1 if len(tasks) >= 24 else 1)(tasks), ignore_index=True)
        _write_tables(writing, grades, series, signs)
        write_text(writing / "synthetic.json", json.dumps(description, indent=2) + "\n")
    refuse_other(target, description)  # another process may have written there meanwhile
    return root


def _checked_parameters(studies, seed, image_side, label_noise, echo, missing_share) -> dict:
    """Return the parameters as plain Python values, or raise ValueError."""
    side_fits = len(image_side) == 2 and _SMALLEST_SIDE <= image_side[0] <= image_side[1]
    for name, value, fits, expected in (
        ("studies", studies, studies >= _FEWEST_STUDIES, f"at least {_FEWEST_STUDIES}"),
        ("seed", seed, seed >= 0, "a non-negative integer"),
        ("image_side", image_side, side_fits, f"(least, most) pixels, at least {_SMALLEST_SIDE}, such as (72, 104)"),
        ("label_noise", label_noise, 0 <= label_noise < 0.5, "a share in [0, 0.5), such as 0.02"),
        ("echo", echo, 0 <= echo <= 1, "a share in [0, 1], such as 0.35"),
        ("missing_share", missing_share, 0 <= missing_share <= 0.9, "a share in [0, 0.9], such as 0.08"),
    ):
        if not fits:
            raise ValueError(f"`{name}` is {value}; expected {expected}.")
    whole = {"studies": int(studies), "seed": int(seed), "image_side": [int(side) for side in image_side]}
    return whole | {"label_noise": float(label_noise), "echo": float(echo), "missing_share": float(missing_share)}


# --- grades ----------------------------------------------------------------------------------------------------------


def _draw_grades(rng, parameters: dict) -> _Grades:
    """Draw what each place is and what is recorded of it."""
    number = parameters["studies"]
    common, own = rng.standard_normal((number, 1)), rng.standard_normal((number, 3))
    latent = np.sqrt(_CORRELATION) * common + np.sqrt(1 - _CORRELATION) * own
    latent = ndtri((rankdata(latent, axis=0) - 0.5) / number)  # so shares of grades do not depend on luck
    severity = np.sqrt(_LATENT_SHARE) * latent[:, _CONDITION_OF]
    severity += np.sqrt(1 - _LATENT_SHARE) * rng.standard_normal((number, len(TARGETS))) + _LEVEL_SHIFTS[_LEVEL_OF]
    moderate, severe = np.array([_thresholds(name) for name in CONDITIONS])[_CONDITION_OF].T
    grade = (severity > moderate).astype(int) + (severity > severe)
    strength = np.choose(
        grade,
        [
            0.15 * np.clip((severity - moderate + 1.5) / 1.5, 0, 1),
            0.55 + 0.15 * (severity - moderate) / (severe - moderate),
            0.85 + 0.15 * np.clip(severity - severe, 0, 1),
        ],
    )
    flipped = rng.permutation(grade.size).reshape(grade.shape) < round(parameters["label_noise"] * grade.size)
    aside = np.where(grade == 1, rng.choice([0, 2], grade.shape), 1)  # readers differ by one grade
    recorded = np.where(flipped, aside, grade).astype(float)
    for name, share in _BLANK_SHARES.items():
        columns = np.flatnonzero(_OF_TARGET["condition"] == name)
        cells = rng.permutation(number * len(columns))[: max(1, round(share * number * len(columns)))]
        recorded[cells // len(columns), columns[cells % len(columns)]] = np.nan
    return _Grades(latent, strength, grade, recorded)


def _thresholds(condition: str) -> np.ndarray:
    """Severities above which a grade is Moderate, and Severe, for the condition's shares over all levels."""
    at = np.linspace(-6, 6, 4001)
    return np.interp(np.cumsum(_SHARES[condition])[:2], ndtr(at[:, None] - _LEVEL_SHIFTS).mean(axis=1), at)


def _ceilings(grades: _Grades, label_noise: float) -> dict:
    """Macro one-vs-rest AUROC of three observers for the recorded grades, by condition and over the conditions."""
    found = {}
    for number, name in enumerate(CONDITIONS):
        columns = np.flatnonzero(number == _CONDITION_OF)
        recorded = grades.recorded[:, columns].ravel()
        known = ~np.isnan(recorded)
        of_level = ndtr(_thresholds(name)[:, None] - _LEVEL_SHIFTS)  # (2, 5): variance 1
        own = _thresholds(name)[:, None, None] - np.sqrt(_LATENT_SHARE) * grades.latent[:, number, None]
        own = ndtr((own - _LEVEL_SHIFTS[_LEVEL_OF[columns]]) / np.sqrt(1 - _LATENT_SHARE))
        observers = {
            "grade": np.eye(len(GRADES))[grades.grade[:, columns].ravel()],
            "latent_and_level": _shares(own).reshape(-1, len(GRADES)),
            "level": np.tile(_shares(of_level)[_LEVEL_OF[columns]], (len(grades.latent), 1)),
        }
        found[name] = {
            observer: _macro_auroc(recorded[known], _mixed(told, label_noise)[known])
            for observer, told in observers.items()
        }
    every = pd.DataFrame(found).T.astype(float).mean()
    return found | {"macro": {name: value if np.isfinite(value) else None for name, value in every.items()}}


def _shares(below: np.ndarray) -> np.ndarray:
    """Chances of the grades, on a new last axis, of those to be below the two thresholds, on the first axis."""
    return np.diff(np.concatenate([0 * below[:1], below, 0 * below[:1] + 1]), axis=0).transpose(
        *range(1, below.ndim), 0
    )


def _mixed(told: np.ndarray, label_noise: float) -> np.ndarray:
    """Chances of the recorded grades, of those of the true ones."""
    aside = np.array([[0, 1, 0], [0.5, 0, 0.5], [0, 1, 0]])
    return told @ ((1 - label_noise) * np.eye(3) + label_noise * aside)


def _macro_auroc(recorded: np.ndarray, told: np.ndarray) -> float | None:
    weights = np.ones((1, len(recorded)))
    areas = [metrics.auroc(recorded == grade, told[:, grade], weights)[0] for grade in range(len(GRADES))]
    areas = [area for area in areas if np.isfinite(area)]
    return float(np.mean(areas)) if areas else None


def _describe(grades: _Grades, series: pd.DataFrame, label_noise: float) -> dict:
    """Count studies, series, slices and grades, and state the ceilings."""
    kinds = series.groupby(["study", "modality"]).size().unstack(fill_value=0).reindex(columns=list(MODALITIES))
    recorded = {name: grades.recorded[:, number == _CONDITION_OF] for number, name in enumerate(CONDITIONS)}
    return {
        "series": series.groupby("modality").size().reindex(list(MODALITIES)).to_dict(),
        "slices": series.groupby("modality")["slices"].sum().reindex(list(MODALITIES)).to_dict(),
        "missing": (kinds.fillna(0) == 0).sum().to_dict(),
        "grades": {
            name: {grade: int((values == code).sum()) for code, grade in enumerate(GRADES)}
            | {"blank": int(np.isnan(values).sum())}
            for name, values in recorded.items()
        },
        "ceiling": _ceilings(grades, label_noise),
    }


# --- series ----------------------------------------------------------------------------------------------------------


def _draw_series(rng, parameters: dict) -> pd.DataFrame:
    """Draw which series there are, a row a series in the order of studies: what `_write_study` draws and writes."""
    number = parameters["studies"]
    study_ids = np.sort(rng.choice(np.arange(10**6, 4 * 10**9, 7919), number, replace=False))
    order = rng.permutation(number)
    num_missing = round(parameters["missing_share"] * number)
    missing = dict(zip(order[:num_missing], np.resize(MODALITIES, num_missing)))
    doubled = order[num_missing:][: round(_DOUBLE_SHARE * number)]
    doubles = dict(zip(doubled, np.resize(MODALITIES[::-1], len(doubled))))
    rows = []
    for study in range(number):
        depths = {**dict(zip(MODALITIES, rng.integers(7, 12, 3))), "Axial T2": rng.integers(8, 13)}
        for modality, depth in depths.items():
            if missing.get(study) == modality:
                continue
            cut = int(rng.integers(3, depth - 2)) if modality == "Axial T2" else 0
            pieces = [(0, depth)]
            if doubles.get(study) == modality:  # an axial stack in two, or a sagittal one again
                pieces = [(0, cut), (cut, depth)] if cut else [(0, depth)] * 2
            rows += [(study, modality, depth, *piece, copy) for copy, piece in enumerate(pieces)]
    table = pd.DataFrame(rows, columns=["study", "modality", "depth", "first", "end", "copy"])
    table["slices"] = table["end"] - table["first"]
    table["study_id"] = study_ids[table["study"]]
    table["series_id"] = rng.choice(np.arange(10**6, 4 * 10**9, 7907), len(table), replace=False)
    for name, share in (("shuffled", _SHUFFLED_SHARE), ("inverted", _INVERTED_SHARE), ("deep", _DEEP_SHARE)):
        table[name] = rng.permutation(len(table)) < round(share * len(table))
    return table


def _write_study(folder: Path, rows: pd.DataFrame, strength: np.ndarray, parameters: dict) -> pd.DataFrame:
    """Draw and write a study's series; return its signs as rows of truth.csv, with `at_x`, `at_y` and `is_nearest`."""
    study = int(rows["study"].iloc[0])
    rng = np.random.default_rng([parameters["seed"], 1, study])
    body, patient = drawing.anatomy(rng), files.patient(rng, study)
    found = []
    for series in rows.itertuples():
        # The same for both halves of a stack that is cut in two.
        of_stack = np.random.default_rng([parameters["seed"], 2, study, MODALITIES.index(series.modality)])
        own = np.random.default_rng([parameters["seed"], 3, series.Index])
        side, aspect = own.uniform(*parameters["image_side"]), own.uniform(0.92, 1.09)
        size = round(side / np.sqrt(aspect)), round(side * np.sqrt(aspect))
        stack = _stack(of_stack, series.modality, series.depth, strength, parameters["echo"])
        exposure, pictures = drawing.exposure(own), []
        numbers = own.permutation(series.slices) + 1 if series.shuffled else np.arange(series.slices) + 1
        if not series.shuffled and own.uniform() < 0.5:
            numbers = numbers[::-1]
        for position, number in zip(range(series.first, series.end), numbers):
            place, signs = stack[position]
            chosen = [sign for sign, _, _ in signs]
            if series.modality == "Axial T2":
                picture, points = drawing.axial(own, body, exposure, size, *place, chosen)
            else:
                picture, points = drawing.sagittal(own, body, exposure, series.modality, size, place, chosen)
            pictures.append(picture)
            for (_, target, is_nearest), point in zip(signs, points):
                if target is not None:
                    found.append((target, series.Index, number, position - series.first, is_nearest, *point))
        places = [place for place, _ in stack[series.first : series.end]]
        files.write_series(folder, series, patient, of_stack, own, places, numbers, pictures)
    columns = ["target", "series", "instance_number", "position", "is_nearest", "at_x", "at_y", *_TRUTH_COLUMNS[-4:]]
    return pd.DataFrame(found, columns=columns)


def _stack(rng, modality: str, depth: int, strength: np.ndarray, echo: float) -> list[tuple]:
    """List a stack's slices in order: the place of each, and its signs with their targets (None: an echo)."""
    signs = [[] for _ in range(depth)]
    if modality == "Axial T2":  # two slices a disc, at some one or three, from the feet up
        counts = np.full(len(LEVELS), 2)
        counts[rng.permutation(len(LEVELS))[: abs(depth - 10)]] += np.sign(depth - 10)
        levels = np.repeat(np.arange(len(LEVELS))[::-1], counts[::-1])
        above = np.concatenate([np.linspace(-0.5, 0.5, count) if count > 1 else [0.0] for count in counts[::-1]])
        places = list(zip(levels.tolist(), above.tolist()))
    else:
        places = np.linspace(-0.9, 0.9, depth).tolist()
    for number, (target, (condition, side, level)) in enumerate(PLACES.items()):
        is_own = PAIRED[condition] == modality
        # The energy of a contrast goes by its square.
        drawn = strength[number] * (1 if is_own else np.sqrt(echo))
        sign = drawing.Sign(condition, _SIDE_NUMBERS[side], LEVELS.index(level), drawn)
        if modality == "Axial T2":
            where = np.flatnonzero(levels == sign.level)[:2]
        else:
            where = drawing.sagittal_slices(condition, sign.side, np.array(places))
        for position in where:
            signs[position].append((sign, target if is_own else None, position == where[0]))
    return list(zip(places, signs))


# --- tables ----------------------------------------------------------------------------------------------------------


def _write_tables(folder: Path, grades: _Grades, series: pd.DataFrame, signs: pd.DataFrame) -> None:
    """Write the CSV files of the real set, and truth.csv."""
    study_ids = series.drop_duplicates("study").set_index("study")["study_id"]
    words = np.array([*GRADES, ""])[np.where(np.isnan(grades.recorded), 3, grades.recorded).astype(int)]
    studies = pd.DataFrame(words, columns=list(TARGETS))
    studies.insert(0, "study_id", study_ids.to_numpy())
    described = series[["study_id", "series_id"]].assign(series_description=series["modality"])

    signs = signs.join(series[["study", "study_id", "series_id", "copy"]], on="series")
    number = signs["target"].map(TARGETS.index).to_numpy()
    signs["grade"] = grades.grade[signs["study"], number]
    signs = signs.join(_OF_TARGET, on=pd.Series(number, signs.index, name="number"))
    order = signs.assign(number=number).sort_values(["study", "number", "series", "position"], kind="stable").index
    signs = signs.loc[order]
    nearest = signs[signs["is_nearest"] & ((signs["copy"] == 0) | (signs["condition"] == CONDITIONS[2]))]
    titles = (nearest["side"] + " " + nearest["condition"].str.replace("_", " ")).str.strip().str.title()
    points = nearest.assign(
        condition=titles,
        level=nearest["level"].str.upper().str.replace("_", "/"),
        x=nearest["at_x"].round(3),
        y=nearest["at_y"].round(3),
    )
    for name, table in (
        ("train.csv", studies),
        ("train_series_descriptions.csv", described),
        ("train_label_coordinates.csv", points[_COORDINATE_COLUMNS]),
        ("truth.csv", signs[_TRUTH_COLUMNS]),
    ):
        write_text(folder / name, table.to_csv(index=False, lineterminator="\n"))
