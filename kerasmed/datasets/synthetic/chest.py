"""Write a synthetic chest set: the real layout, findings that persist over visits, and a sign for each to be seen."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from kerasmed import atomic, metrics
from kerasmed.datasets.chest import BOXES, FINDINGS, LISTS, NO_FINDING
from kerasmed.datasets.synthetic.drawing import inside, refuse_other, rotated, write_image, write_text

# Of each finding: its rate at age 55, half-way between the views and the sexes, and the change in log odds by 20 years
# of age, from PA to AP, and from women to men.
_RATES = {
    "Atelectasis": (0.080, 0.4, 0.5, 0.0),
    "Cardiomegaly": (0.080, 0.5, 0.4, -0.3),
    "Consolidation": (0.080, 0.0, 0.8, 0.0),
    "Edema": (0.080, 0.2, 1.0, 0.0),
    "Effusion": (0.080, 0.4, 0.8, 0.0),
    "Emphysema": (0.080, 0.6, 0.0, 0.5),
    "Fibrosis": (0.080, 0.7, -0.4, 0.0),
    "Hernia": (0.075, 0.7, 0.0, -0.4),
    "Infiltration": (0.085, -0.2, 0.8, 0.0),
    "Mass": (0.085, 0.4, -0.2, 0.0),
    "Nodule": (0.085, 0.4, -0.4, 0.0),
    "Pleural_Thickening": (0.080, 0.3, -0.2, 0.5),
    "Pneumonia": (0.080, -0.4, 0.7, 0.0),
    "Pneumothorax": (0.080, -0.6, 0.2, 0.2),
}
_KEPT = 0.64  # chance that a finding is carried over to the next visit rather than drawn anew
_FALSE_SIGNS = 0.02  # share of the images without a finding that show its sign
_TEST_SHARE = 0.25  # of patients
# Shares of patients with 1, 2, ... 8 visits: more in test, as in the real lists.
_VISITS = {
    "train": (0.32, 0.20, 0.14, 0.11, 0.08, 0.06, 0.05, 0.04),
    "test": (0.10, 0.12, 0.15, 0.15, 0.14, 0.13, 0.11, 0.10),
}
_AP_SHARE, _VIEW_KEPT, _MEN_SHARE = 0.4, 0.7, 0.56
_UNKNOWN_AGES, _UNKNOWN_AGE_SHARE = (148, 150, 155, 411, 412, 413, 414), 0.006
_UNBOXED = ("Consolidation", "Edema", "Emphysema", "Fibrosis", "Hernia", "Pleural_Thickening")
_DRAWN = [f"drawn_{name}" for name in FINDINGS]
_TABLES = {"2020": "Data_Entry_2017_v2020.csv", "2017": "Data_Entry_2017.csv"}
_HEADERS = {
    "2020": "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]",
    "2017": "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,"
    "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y,",
}
_ORIGINALS = ("2500,2048,0.168,0.168", "2992,2991,0.143,0.143", "3056,2544,0.139,0.139")
_NUM_FOLDERS, _FEWEST_PATIENTS, _SMALLEST_SIDE = 3, 20, 48
_NOTICEABLE = 10  # grey levels by which a sign changes the pixels that its box holds

# Where a sign's centre lies, and its radii (across, along). Places of signs of one lung are in halves of that lung from
# its centre, x positive towards the wall; the others in halves of the image, x positive to the right. Units of the
# radii are halves of the image.
_SIGNS = {
    "Cardiomegaly": (False, (0.04, 0.12), (0.36, 0.42), (0.50, 0.24)),
    "Edema": (False, (-0.03, 0.03), (-0.16, -0.06), (0.52, 0.26)),
    "Emphysema": (True, (-0.15, 0.15), (-0.35, -0.05), (0.26, 0.34)),
    "Effusion": (True, (0.20, 0.35), (0.45, 0.60), (0.26, 0.28)),
    "Pneumothorax": (True, (0.30, 0.45), (-0.60, -0.40), (0.24, 0.36)),
    "Pleural_Thickening": (True, (0.90, 1.00), (-0.05, 0.20), (0.10, 0.40)),
    "Atelectasis": (True, (-0.20, 0.10), (0.00, 0.45), (0.30, 0.09)),
    "Consolidation": (True, (-0.30, 0.20), (-0.10, 0.40), (0.22, 0.22)),
    "Infiltration": (True, (-0.30, 0.30), (-0.50, 0.30), (0.23, 0.23)),
    "Pneumonia": (True, (-0.30, 0.30), (0.00, 0.45), (0.23, 0.23)),
    "Fibrosis": (True, (-0.20, 0.30), (0.10, 0.55), (0.24, 0.24)),
    "Hernia": (False, (-0.08, 0.04), (0.40, 0.52), (0.20, 0.20)),
    "Mass": (True, (-0.30, 0.30), (-0.50, 0.30), (0.22, 0.22)),
    "Nodule": (True, (-0.40, 0.40), (-0.60, 0.30), (0.20, 0.20)),
}


def write(
    root: str | os.PathLike,
    *,
    patients: int = 1000,
    image_side: int = 96,
    header: str = "2020",
    missing_share: float = 0.02,
    rgba_share: float = 0.03,
    unseen_share: float = 0.15,
    seed: int = 0,
) -> Path:
    """Write a synthetic set in the layout of the real one.

    Layout (square 8-bit PNG, grey; `rgba_share` of them RGBA, opaque):

        root/chest/Data_Entry_2017_v2020.csv       the table of labels as spelled in 2020, or Data_Entry_2017.csv with
                                                   "Patient Sex", other names of sizes, and a comma at each line's end
        root/chest/{train_val_list,test_list}.txt  a quarter of the patients are test
        root/chest/BBox_List_2017.csv              tight boxes of 8 findings' signs, of test images that have both the
                                                   record and the sign, unless other signs hide it
        root/chest/images_{001,002,003}/images/*.png
        root/chest/truth.csv       image_path (relative to root), study_id, split, present (1: the file is there), the
                                   14 findings (recorded) and drawn_<finding> (its sign is drawn)
        root/chest/synthetic.json  system, parameters, images, prevalence, ceiling

    Patients have 1 to 8 visits (mean 3.0, of test patients 4.4), each with a view (40 % AP) and one image; they are 20
    to 90 years old at the first; a few ages are unknown and written as over 100. A finding's rate p at a visit is

        logit p = logit m + a (age - 55) / 20 + b (1/2 if AP, else -1/2) + c (1/2 if a man, else -1/2)

    with m, a, b, c of `_RATES`; an unknown age counts as 55. A first visit has the finding with chance p, a later one,
    after a visit of rate q, with chance

        k min(1, p / q) + (1 - k) p              if it was there, k = 0.64: it stays in 60 to 70 of 100
        k max(0, p - q) / (1 - q) + (1 - k) p    if it was not

    whose mean over the visit before is p: so p is exactly the chance given age, sex and view at any visit. Given these,
    findings are independent of one another. In each list a finding has 7 to 11 % of the images, `No Finding` 28 %. The
    sign of a finding is drawn with chance 1 - u, u = `unseen_share`, and without the finding with chance 0.02: that is
    the label noise. A finding of prior p then has exactly the chance

        p (1 - u) / (p (1 - u) + (1 - p) 0.02) with its sign,    p u / (p u + (1 - p) 0.98) without it

    and `ceiling` holds the mean AUROC of these chances on the test images that are there, by what is known ("image": p
    constant; "patient": p itself, no image; "image + patient"; "image + patient + previous": for p the chance after the
    visit before) and by part ("test", "test, first visits", "test, follow-ups"). Findings of all or no images do not
    count; null: none counts. "image" is of the signs alone: the larger heart and whiter lungs in AP add 0.01.

    A patient is one anatomy; its visits differ in shift, scale, turn, contrast, brightness and noise. A sign has a
    shape, a texture and a region of its own. By default the four ceilings of "test" are 0.920, 0.642, 0.939 and 0.973;
    `models.compact_cnn` on 64×64 pixels reaches 0.88 in 12 epochs, the nearest neighbour's findings 0.55, and the size
    of a file at most 0.59 for any finding. No two images of different patients correlate above 0.98.

    Args:
        root: folder to write under, created where missing.
        patients: at least 20; from 300 on every finding has at least 5 % of the images of both lists.
        image_side: pixels, at least 48.
        header: "2020" or "2017", the spelling of the table of labels.
        missing_share: share of the listed images without a file, as in a partial download, in [0, 0.9].
        rgba_share: share of the files that are RGBA, in [0, 1].
        unseen_share: share of the recorded findings whose sign is not drawn, in [0, 0.9].
        seed: non-negative integer; the same seed and parameters write byte-identical files of the same times.

    Returns:
        `root` as a Path. A set of the same parameters is left as it is. The folder gets its name when it is whole.

    Raises:
        ValueError: a parameter is outside the range above.
        FileExistsError: `root/chest` is there and is not this set.
    """
    parameters = _checked_parameters(patients, image_side, header, missing_share, rgba_share, unseen_share, seed)
    root = Path(root)
    truth = _draw_truth(parameters)
    description = {"system": "chest", **parameters, **_describe(truth, parameters["unseen_share"])}
    target = root / "chest"
    if target.exists():
        refuse_other(target, description)
        return root

    with atomic.whole_folder(target) as writing:
        write_text(writing / _TABLES[header], _entries(truth, header))
        for split, name in LISTS.items():
            # The last line has no end, as in the real lists.
            write_text(writing / name, "\n".join(truth.loc[truth["split"] == split, "name"]))
        lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", *_write_images(writing, truth, parameters), ""]
        write_text(writing / BOXES, "\n".join(lines).replace("Infiltration", "Infiltrate"))  # sic
        columns = ["image_path", "study_id", "split", "present", *FINDINGS, *_DRAWN]
        write_text(writing / "truth.csv", truth[columns].to_csv(index=False, lineterminator="\n"))
        write_text(writing / "synthetic.json", json.dumps(description, indent=2) + "\n")
    refuse_other(target, description)  # another process may have written there meanwhile
    return root


def _checked_parameters(patients, image_side, header, missing_share, rgba_share, unseen_share, seed) -> dict:
    """Return the parameters as plain Python values, or raise ValueError."""
    numbers = {"seed": seed, "patients": patients, "image_side": image_side}
    shares = {"missing_share": missing_share, "rgba_share": rgba_share, "unseen_share": unseen_share}
    for name, least in (("seed", 0), ("patients", _FEWEST_PATIENTS), ("image_side", _SMALLEST_SIDE)):
        if not numbers[name] >= least:
            raise ValueError(f"`{name}` is {numbers[name]}; expected at least {least}. Pass {least} or more.")
    if header not in _HEADERS:
        raise ValueError(f"`header` is {header!r}; expected one of {', '.join(map(repr, _HEADERS))}, a year as text.")
    for name, most in (("missing_share", 0.9), ("rgba_share", 1), ("unseen_share", 0.9)):
        if not 0 <= shares[name] <= most:
            raise ValueError(f"`{name}` is {shares[name]}; expected a share in [0, {most}], such as 0.05.")
    numbers = {name: int(number) for name, number in numbers.items()}
    return numbers | {"header": header} | {name: float(share) for name, share in shares.items()}


# --- patients, labels and signs --------------------------------------------------------------------------------------


def _draw_truth(parameters: dict) -> pd.DataFrame:
    """Draw visits, recorded findings and signs: a row an image, by patient and visit."""
    rng = np.random.default_rng([parameters["seed"], 0])
    table = _draw_visits(rng, parameters["patients"])
    table[list(FINDINGS)] = _draw_findings(rng, table)
    labels, drawn = table[list(FINDINGS)].to_numpy(), np.zeros((len(table), len(FINDINGS)), int)
    for split in LISTS:
        rows = np.flatnonzero(table["split"] == split)
        seen = np.where(labels[rows] == 1, 1 - parameters["unseen_share"], _FALSE_SIGNS)
        drawn[rows] = _draw(rng, seen)
    table = pd.concat([table, pd.DataFrame(drawn, columns=_DRAWN)], axis=1)
    present = _draw(rng, np.full((len(table), 1), 1 - parameters["missing_share"]))[:, 0]
    table["present"], table["rgba"] = present, _draw(rng, present[:, None] * parameters["rgba_share"])[:, 0]
    folders = np.arange(len(table)) * _NUM_FOLDERS // len(table) + 1
    table["folder"] = [f"images_{number:03d}/images" for number in folders]
    table["study_id"] = [f"{row.patient:08d}_{row.visit:03d}" for row in table.itertuples()]
    table["name"] = table["study_id"] + ".png"
    table["image_path"] = "chest/" + table["folder"] + "/" + table["name"]
    return table


def _draw_visits(rng, num_patients: int) -> pd.DataFrame:
    """Draw split, visits, follow_up, age (NaN unknown), sex, view: a row an image, by patient (from 1) and visit."""
    in_test = rng.permutation(num_patients) < round(_TEST_SHARE * num_patients)
    visits = np.zeros(num_patients, int)
    for split, rows in (("train", ~in_test), ("test", in_test)):
        # One uniform number in each of as many equal parts of [0, 1]: the shares are met as nearly as may be.
        uniform = (rng.permutation(rows.sum()) + rng.uniform(size=rows.sum())) / rows.sum()
        visits[rows] = np.searchsorted(np.cumsum(_VISITS[split])[:-1], uniform, side="right") + 1
    patient = np.repeat(np.arange(num_patients), visits)
    num_images = len(patient)
    visit = np.arange(num_images) - np.repeat(np.cumsum(visits) - visits, visits)
    first = visit == 0
    # Sums over a patient's visits: 1 visit in 20 is not in the table, and 2 in 5 are a birthday later.
    sums = np.stack([1 + (rng.uniform(size=num_images) < 0.05), rng.uniform(size=num_images) < 0.4])
    sums = np.cumsum(np.where(first, 0, sums), axis=1)
    follow_up, years = sums - np.repeat(sums[:, first], visits, axis=1)
    age = (rng.integers(20, 91, num_patients)[patient] + years).astype(float)
    age[rng.permutation(num_images)[: max(2, round(_UNKNOWN_AGE_SHARE * num_images))]] = np.nan
    is_ap = rng.uniform(size=num_images) < _AP_SHARE
    for row in np.flatnonzero(~first & (rng.uniform(size=num_images) < _VIEW_KEPT)):
        is_ap[row] = is_ap[row - 1]
    return pd.DataFrame(
        {
            "patient": patient + 1,
            "visit": visit,
            "follow_up": follow_up,
            "split": np.where(in_test, "test", "train")[patient],
            "age": age,
            "sex": np.where(rng.uniform(size=num_patients) < _MEN_SHARE, "M", "F")[patient],
            "view": np.where(is_ap, "AP", "PA"),
        }
    )


def _draw(rng, chances: np.ndarray, begun=None) -> np.ndarray:
    """Draw 1 with these chances, shape (num_rows, num_columns), so that each column's sum is as expected within one.

    Systematic sampling of rows in random order: a 1 for each whole number that the running sum of chances passes. It
    begins at random in [0, 1), or where an earlier draw has left it.
    """
    begun = rng.uniform(size=chances.shape[1]) if begun is None else begun
    order = rng.permuted(np.tile(np.arange(len(chances))[:, None], chances.shape[1]), axis=0)
    passed = np.floor(begun + np.cumsum(np.take_along_axis(chances, order, axis=0), axis=0))
    drawn = np.zeros(chances.shape, int)
    np.put_along_axis(drawn, order, np.diff(passed, axis=0, prepend=0).astype(int), axis=0)
    return drawn


def _draw_findings(rng, table: pd.DataFrame) -> np.ndarray:
    """Draw the recorded findings visit by visit: int, shape (num_images, num_findings)."""
    labels, rate = np.zeros((len(table), len(FINDINGS)), int), _rates(table)
    for split in LISTS:
        begun = rng.uniform(size=len(FINDINGS))
        for visit in range(table["visit"].max() + 1):
            rows = np.flatnonzero((table["visit"] == visit) & (table["split"] == split))
            chance = rate[rows] if visit == 0 else _carried(rate[rows], rate[rows - 1], labels[rows - 1])
            labels[rows] = _draw(rng, chance, begun)
            begun = (begun + chance.sum(axis=0)) % 1
    return labels


def _rates(table: pd.DataFrame) -> np.ndarray:
    """Chances of the findings given age, view and sex: shape (num_images, num_findings)."""
    middle, of_age, of_view, of_sex = np.array([_RATES[name] for name in FINDINGS]).T
    age, view, sex = (table["age"].fillna(55) - 55) / 20, (table["view"] == "AP") - 0.5, (table["sex"] == "M") - 0.5
    change = np.outer(age, of_age) + np.outer(view, of_view) + np.outer(sex, of_sex)
    return 1 / (1 + (1 - middle) / middle * np.exp(-change))


def _carried(rate, rate_before, label_before) -> np.ndarray:
    """Chances of the findings given also those of the visit before; their mean over these is the rate."""
    lasting = np.minimum(1, rate / rate_before)
    beginning = np.maximum(0, rate - rate_before) / (1 - rate_before)
    return _KEPT * np.where(label_before == 1, lasting, beginning) + (1 - _KEPT) * rate


def _describe(truth: pd.DataFrame, unseen_share: float) -> dict:
    """Count images, and state prevalence by split and what the best answers to the test images reach."""
    described = {"images": {}, "prevalence": {}}
    for split in LISTS:
        table = truth.loc[truth["split"] == split, list(FINDINGS)]
        described["images"][split] = len(table)
        described["prevalence"][split] = table.mean().to_dict() | {NO_FINDING: float((table.sum(axis=1) == 0).mean())}
    labels, drawn, first = truth[list(FINDINGS)].to_numpy(), truth[_DRAWN].to_numpy(), (truth["visit"] == 0).to_numpy()
    rate = _rates(truth)
    before = np.arange(len(truth)) - ~first
    chance = np.where(first[:, None], rate, _carried(rate, rate[before], labels[before]))
    answers = {
        "image": _posterior(np.broadcast_to(rate.mean(axis=0), rate.shape), drawn, unseen_share),
        "patient": rate,
        "image + patient": _posterior(rate, drawn, unseen_share),
        "image + patient + previous": _posterior(chance, drawn, unseen_share),
    }
    shown = ((truth["split"] == "test") & (truth["present"] == 1)).to_numpy()
    parts = {"test": shown, "test, first visits": shown & first, "test, follow-ups": shown & ~first}
    described["ceiling"] = {
        kind: {part: _mean_auroc(labels[rows], answer[rows]) for part, rows in parts.items()}
        for kind, answer in answers.items()
    }
    return described


def _posterior(prior, drawn, unseen_share) -> np.ndarray:
    """Chances of the findings given that their signs are drawn or not."""
    present = prior * np.where(drawn == 1, 1 - unseen_share, unseen_share)
    absent = (1 - prior) * np.where(drawn == 1, _FALSE_SIGNS, 1 - _FALSE_SIGNS)
    return present / (present + absent)


def _mean_auroc(labels, scores) -> float | None:
    """Average the AUROC of the findings that are present in some and absent in others; None where there is none."""
    # Rounded: 25 years and the view may weigh the same, and equal chances must not be ranked by their last digits.
    weights, scores = np.ones((1, len(labels))), scores.round(9)
    areas = [metrics.auroc(y == 1, score, weights)[0] for y, score in zip(labels.T, scores.T)]
    areas = [area for area in areas if np.isfinite(area)]
    return float(np.mean(areas)) if areas else None


# --- files -----------------------------------------------------------------------------------------------------------


def _entries(truth: pd.DataFrame, header: str) -> str:
    """Lay out the table of labels."""
    end = "," if header == "2017" else ""
    lines = [_HEADERS[header]]
    for number, row in enumerate(truth.itertuples()):
        found = "|".join(name for name in FINDINGS if getattr(row, name)) or NO_FINDING
        age = int(row.age) if row.age == row.age else _UNKNOWN_AGES[number % len(_UNKNOWN_AGES)]
        original = _ORIGINALS[number % len(_ORIGINALS)]
        lines.append(f"{row.name},{found},{row.follow_up},{row.patient},{age},{row.sex},{row.view},{original}{end}")
    return "\n".join([*lines, ""])


def _write_images(folder: Path, truth: pd.DataFrame, parameters: dict) -> list[str]:
    """Draw and write the images that are present; return the lines of the list of boxes."""
    for name in truth["folder"].unique():
        (folder / name).mkdir(parents=True)
    seed, side = parameters["seed"], parameters["image_side"]
    drawn, lines, patient = truth[_DRAWN].to_numpy() == 1, [], 0
    for number, row in enumerate(truth.itertuples()):
        if row.patient != patient:
            patient = row.patient
            anatomy = _draw_anatomy(np.random.default_rng([seed, 1, patient]))
        if not row.present:
            continue
        boxed = [name for name in FINDINGS if row.split == "test" and getattr(row, name) and name not in _UNBOXED]
        signs = [name for name, is_drawn in zip(FINDINGS, drawn[number]) if is_drawn]
        image, boxes = _draw_image([seed, 2, number], anatomy, row.view, signs, side, boxed)
        opaque = np.full_like(image, 255)
        write_image(folder / row.folder / row.name, cv2.merge([image] * 3 + [opaque]) if row.rgba else image)
        lines += [f"{row.name},{name},{x},{y},{w},{h}" for name, (x, y, w, h) in boxes.items()]
    return lines


# --- pictures --------------------------------------------------------------------------------------------------------


def _draw_anatomy(rng) -> dict:
    """Draw what a patient's images share; lengths are in halves of the image's side."""
    return {
        "body": rng.uniform([0.84, 1.1], [0.98, 1.5]),
        "lung_x": rng.uniform(0.40, 0.47, 2),
        "lung_y": rng.uniform(-0.16, -0.06, 2),
        "lung_radii": rng.uniform([0.27, 0.58], [0.34, 0.72], (2, 2)),
        "diaphragm": rng.uniform(0.38, 0.58, 2),
        "heart": rng.uniform([0.06, 0.22], [0.14, 0.34]),
        "heart_radii": rng.uniform([0.20, 0.20], [0.28, 0.28]),
        "spine": rng.uniform(0.10, 0.16),
        "ribs": rng.uniform([4.0, 0.0, 0.2, 12.0], [5.5, 2 * np.pi, 0.5, 28.0]),  # number, phase, bend, contrast
        "tissue": rng.uniform(135, 165),
        "lungs": rng.uniform(50, 80),
        "texture": (10 * rng.standard_normal((5, 5)), 5 * rng.standard_normal((12, 12))),
    }


def _draw_image(key, anatomy, view, signs, side, boxed=()) -> tuple[np.ndarray, dict]:
    """Return a uint8 image and the boxes (x, y, width, height) of those of its signs that are `boxed`.

    The key seeds all that is drawn; a sign looks the same and lies in the same place whatever else is drawn.
    """
    rng = np.random.default_rng(key)
    shift, scale, turn = rng.uniform(-0.05, 0.05, 2), rng.uniform(0.95, 1.05), rng.uniform(-0.07, 0.07)
    gain, offset, noise = rng.uniform(0.85, 1.1), rng.uniform(-8, 12), rng.uniform(2, 10)
    axis = (2 * np.arange(side) + 1) / side - 1  # centres of pixels from -1 to 1
    u, v = rotated((axis[None, :] - shift[0]) / scale, (axis[:, None] - shift[1]) / scale, turn)
    picture = _chest(rng, u, v, anatomy, view)
    layers = {}
    for index, name in enumerate(_SIGNS):
        if name in signs:
            layers[name] = _sign(np.random.default_rng([*key, index]), name, u, v, anatomy)

    def compose(left_out=None):
        painted = picture
        for name, (alpha, level) in layers.items():
            if name != left_out:
                painted = painted + alpha * (level - painted)
        return np.clip(gain * painted + offset, 0, 255)

    whole = compose()
    boxes = {}
    for name in layers:
        if name in boxed:
            changed = np.abs(whole - compose(name)) > _NOTICEABLE
            if changed.any():  # else hidden under others
                boxes[name] = cv2.boundingRect(changed.astype(np.uint8))
    image = np.clip(np.rint(whole + noise * rng.standard_normal((side, side))), 0, 255).astype(np.uint8)
    return image, boxes


def _chest(rng, u, v, anatomy, view) -> np.ndarray:
    """Draw a chest without signs: grey levels at chest coordinates, in which the image reaches from -1 to 1."""
    is_ap, side = view == "AP", len(u)
    texture = np.zeros(2 * (side,))
    for nodes in anatomy["texture"]:
        changed = nodes + 0.3 * nodes.std() * rng.standard_normal(nodes.shape)
        texture += cv2.resize(changed, (side, side), interpolation=cv2.INTER_CUBIC)
    picture = anatomy["tissue"] + 12 * is_ap + texture
    number, phase, bend, contrast = anatomy["ribs"]
    ribs = contrast * np.cos(2 * np.pi * number * (v - bend * (np.abs(u) - 0.3) ** 2) / 2 + phase)
    for lung in (0, 1):
        a, b = _in_lung(u, v, anatomy, lung)
        dome = anatomy["diaphragm"][lung] - 0.08 * is_ap + 0.1 * a**2
        alpha = inside(np.hypot(a, b), 0.05) * inside(1 + v - dome, 0.03)
        picture += alpha * (anatomy["lungs"] + 18 * is_ap + 0.5 * texture + ribs - picture)
    radii = anatomy["heart_radii"] * (1.2 if is_ap else 1.0)
    heart = inside(np.hypot((u - anatomy["heart"][0]) / radii[0], (v - anatomy["heart"][1]) / radii[1]), 0.06)
    middle = np.exp(-((u / anatomy["spine"]) ** 2))
    picture += np.maximum(heart, middle) * (175 + texture - picture)
    body = inside(np.hypot(u / anatomy["body"][0], v / anatomy["body"][1]), 0.03)
    return picture * body


def _in_lung(u, v, anatomy, lung):
    """Coordinates in halves of a lung from its centre: x positive towards the wall, y downwards."""
    radii = anatomy["lung_radii"][lung]
    return ((2 * lung - 1) * u - anatomy["lung_x"][lung]) / radii[0], (v - anatomy["lung_y"][lung]) / radii[1]


def _sign(rng, name, u, v, anatomy) -> tuple[np.ndarray, np.ndarray | float]:
    """Draw a sign: how far it covers each pixel, 0 to 1, and its grey levels."""
    in_lung, across, along, radii = _SIGNS[name]
    centre, scale = np.array([rng.uniform(*across), rng.uniform(*along)]), rng.uniform(0.92, 1.08)
    mirror = 1
    if in_lung:
        lung = rng.integers(2)
        mirror = 2 * lung - 1
        centre = centre * anatomy["lung_radii"][lung] + [anatomy["lung_x"][lung], anatomy["lung_y"][lung]]
    x, y = (mirror * u - centre[0]) / (scale * radii[0]), (v - centre[1]) / (scale * radii[1])
    alpha, level = _pattern(name, *rotated(x, y, rng.uniform(-0.15, 0.15)))
    return rng.uniform(0.4, 0.75) * alpha, level


def _pattern(name, x, y) -> tuple[np.ndarray, np.ndarray | float]:
    """Cover and grey levels of a sign in its own coordinates, in which it reaches from -1 to 1, x towards the wall."""
    radius = np.hypot(x, y)
    disc = inside(radius, 0.05)
    if name == "Cardiomegaly":  # a broad heart
        return disc, 215.0
    if name == "Edema":  # two wings beside the middle
        return inside(np.hypot((np.abs(x) - 0.58) / 0.42, y), 0.15), 185.0
    if name == "Emphysema":  # dark and mottled
        return disc, 30 + 60 * np.cos(5 * x + 1) * np.cos(5 * y)
    if name == "Effusion":  # a wedge in the corner, its upper edge hollow
        square = inside(np.maximum(np.abs(x), np.abs(y)), 0.04)
        return square * inside(1.7 - 0.45 * (x + 1) ** 2 - y, 0.04), 230.0
    if name == "Pneumothorax":  # a dark crescent with a thin line at its inner edge
        inner = np.hypot(x + 0.5, y - 0.25) / 0.95
        line = np.exp(-(((inner - 1) / 0.07) ** 2))
        return disc * np.maximum(1 - inside(inner, 0.03), line), 5 + 225 * line
    if name == "Pleural_Thickening":  # a string of bright beads
        return inside(np.hypot(x / (0.65 + 0.35 * np.cos(9 * y)), y), 0.05), 240.0
    if name == "Atelectasis":  # a level band
        return inside(np.maximum(np.abs(x), np.abs(y)), 0.1), 225.0
    if name == "Consolidation":  # bright, with dark branches from its inner edge
        return disc, 215 - 160 * np.clip(np.cos(12 * np.arctan2(y, x + 1.1)) * 2 - 0.6, 0, 1)
    if name == "Infiltration":  # bright dots
        dots = np.clip(3 * np.cos(4.5 * (x + y)) * np.cos(4.5 * (x - y)) - 0.3, 0, 1)
        return disc * dots, 235.0
    if name == "Pneumonia":  # upright stripes
        return disc, 135 + 95 * np.cos(3 * np.pi * x)
    if name == "Fibrosis":  # a net of bright lines
        lines = np.maximum(np.cos(5 * (x + y)), np.cos(5 * (x - y)))
        return disc, 70 + 160 * np.clip(2.5 * lines - 1.2, 0, 1)
    if name == "Hernia":  # a ring round a dark hollow
        return disc, np.where(radius > 0.6, 240.0, 20.0)
    if name == "Mass":
        return disc, 235.0
    if name == "Nodule":  # a small disc with a ring round it
        return inside(np.minimum(radius / 0.4, np.abs(radius - 0.82) / 0.14), 0.05), 235.0
    raise ValueError(f"{name!r} has no sign; known are {', '.join(_SIGNS)}.")
