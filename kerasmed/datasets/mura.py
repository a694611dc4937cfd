"""MURA v1.1: radiographs of the elbow, finger, forearm, hand, humerus, shoulder and wrist, normal or abnormal by study.

40,561 PNG of varied size of 14,863 studies of 12,173 patients; 9,045 studies are normal, 5,818 abnormal.
Radiologists labelled studies, not images: every image carries its study's label, and an image score is no result before
it is averaged over the study. `train` holds 36,808 images of 13,457 studies of 11,184 patients, `valid` 3,197 images of
1,199 studies of 783 patients; the test set of 207 studies was never published, so `valid` is the test set here. A
patient may have several studies, also of several types. Image numbers have gaps. Nothing of the set is shipped with
this package: it is for research, after registration.

Source: Rajpurkar et al. 2018, arXiv:1712.06957; https://stanfordmlgroup.github.io/competitions/mura/
"""

import functools
import itertools
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import manifest

logger = logging.getLogger(__name__)

STUDY_TYPES = ("XR_ELBOW", "XR_FINGER", "XR_FOREARM", "XR_HAND", "XR_HUMERUS", "XR_SHOULDER", "XR_WRIST")
PART = "radiographs"
CLASS_NAMES = {PART: ("abnormal",)}
EXCLUSIVE = False  # one logit, 1 or 0
SOURCES = {PART: ("https://stanfordmlgroup.github.io/competitions/mura/", "research use, after registration")}
LAYOUT = (
    "mura/MURA-v1.1/{train,valid}/XR_{ELBOW,FINGER,FOREARM,HAND,HUMERUS,SHOULDER,WRIST}/patient<digits>/"
    "study<digits>_{positive,negative}/image<digits>.png"
)
ARCHIVE_FOLDERS = {}
TABLES = (
    "train_image_paths.csv",
    "train_labeled_studies.csv",
    "valid_image_paths.csv",
    "valid_labeled_studies.csv",
)

_SPLITS = {"train": "train", "valid": "test"}  # folder to the manifest's split
_TYPE = re.compile(r"XR_.+")
_PATIENT = re.compile(r"patient[0-9]+")
_STUDY = re.compile(r"study[0-9]+_(?:positive|negative)")
_is_study = functools.lru_cache(maxsize=1024)(_STUDY.fullmatch)  # the same few names in all patients
_DIGITS = re.compile(r"[0-9]+")
_LINK = "{} is a link to a folder that is not there; restore that folder, or remove the link."


def folder(root) -> Path | None:
    """Return the folder that holds `MURA-v1.1`, `root/mura`, or None where neither train nor valid lies in that."""
    home = part_folder(root, PART)
    return home.parent if any((home / name).is_dir() for name in _SPLITS) else None


def part_folder(root, part: str) -> Path:
    """Return the folder of a part: the one part lies in `root/mura/MURA-v1.1`."""
    return Path(root) / "mura" / "MURA-v1.1"


def read(root, part: str = PART) -> pd.DataFrame:
    """Read the folders into a manifest, in one pass.

    Every visible file of a study folder that ends in .png, in either case, is an image; hidden entries
    (`.DS_Store`, `._image1.png`) and other files count nowhere. Either split may be absent, as after a partial
    download. A study folder without an image gives no row, and one warning counts them. Only folders are listed and no
    file is queried, so a folder that is named as an image is taken for one: decoding reports it. A patient in both
    splits is read as it lies: the audit's gate finds it.

    Args:
        root: data root, the folder that holds `mura/`.
        part: "radiographs", the only one.

    Returns:
        Manifest, a row an image, ordered by split (train, test), type, patient, study and image, with numbers in order
        (image2 before image10): the manifest's columns (patient_id = group_id: "patient00011"; study_id:
        "XR_ELBOW/patient00011/study1"; split: "train", and "test" for the published valid), body_part ("XR_ELBOW") and
        abnormal (1.0 and 0.0, the study's).

    Raises:
        FileNotFoundError: neither train nor valid is there, or they hold no image.
        ValueError: unknown part; a folder below train or valid that does not fit the layout; a study that is both
            positive and negative.
    """
    if part not in CLASS_NAMES:
        raise ValueError(f"part {part!r} is unknown; known is {', '.join(CLASS_NAMES)}.")
    home = part_folder(root, part)
    places, entries = _walk(home)
    found = [_image_names(text) for text in entries]
    if not any(found):
        raise FileNotFoundError(f"no images of mura under {home}; expected {LAYOUT}.")
    empty = [place for place, images in zip(places, found) if not images]
    if empty:
        logger.warning("%d study folders hold no image and were left out: %s", len(empty), empty[:3])
    unlabelled = [place.rpartition("_")[0] for place in places]
    _refuse_both_labels(home, unlabelled)
    levels = "/".join(places).split("/")  # four of every place: one split of them all spares a list for each
    splits, body_parts, patients = [_SPLITS[name] for name in levels[0::4]], levels[1::4], levels[2::4]
    studies = [place.partition("/")[2] for place in unlabelled]
    abnormal = np.array([study.endswith("_positive") for study in levels[3::4]], dtype=float)
    rows = np.repeat(np.arange(len(places)), [len(images) for images in found])
    start = home.relative_to(root).as_posix()
    # Their folders fit the layout; what no table can hold is to be told before there is one.
    manifest.check_paths([*itertools.chain.from_iterable(found)], f"the name of an image below {home}")
    image_paths = [f"{start}/{place}/{image}" for place, images in zip(places, found) for image in images]
    splits, body_parts, patients, studies = (
        pd.array(np.array(texts, dtype=object), dtype="str").take(rows)
        for texts in (splits, body_parts, patients, studies)
    )
    table = pd.DataFrame(
        {
            "image_path": image_paths,
            "patient_id": patients,
            "study_id": studies,
            "group_id": patients,
            "split": splits,
            "body_part": body_parts,
            "abnormal": abnormal[rows],
        }
    )
    return manifest.validate(table, CLASS_NAMES[part], exclusive=EXCLUSIVE)


def _walk(home: Path) -> tuple[list[str], list[str]]:
    """List the study folders in order, as "train/XR_ELBOW/patient00011/study1_positive", and the names in each."""
    # Nearly all the time goes into listing folders. Their depth is known, so an entry is asked for no more than its
    # name; names are joined by "/", as text, unlike lists, gives the garbage collector nothing to go through.
    home = str(home)
    places, entries, misfits = [], [], []
    for split in _SPLITS:
        if not os.path.isdir(f"{home}/{split}"):
            continue
        for body_part in sorted(_list(f"{home}/{split}", _TYPE.fullmatch, misfits)):
            for patient in _list(f"{home}/{split}/{body_part}", _PATIENT.fullmatch, misfits):
                for study in _list(f"{home}/{split}/{body_part}/{patient}", _is_study, misfits):
                    place = f"{split}/{body_part}/{patient}/{study}"
                    try:
                        entries.append("/".join(os.listdir(f"{home}/{place}")))
                    except NotADirectoryError:
                        continue
                    except FileNotFoundError as error:
                        raise FileNotFoundError(_LINK.format(f"{home}/{place}")) from error
                    places.append(place)
    if misfits:
        raise ValueError(
            f"{len(misfits)} folders below {home} do not fit the layout; expected "
            "{train,valid}/XR_<TYPE>/patient<digits>/study<digits>_{positive,negative}. Rename them so, or move them "
            f"out. First: {[path.removeprefix(f'{home}/') for path in misfits[:3]]}."
        )
    return places, entries


def _list(path: str, fits: Callable, misfits: list[str]) -> list[str]:
    """Return a folder's names that fit, by length and name (none where it is a file); note other visible folders."""
    try:
        names = os.listdir(path)
    except NotADirectoryError:
        return []
    except FileNotFoundError as error:
        raise FileNotFoundError(_LINK.format(path)) from error
    fitting = [name for name in names if fits(name)]
    if len(fitting) < len(names):
        others = [f"{path}/{name}" for name in names if name[0] != "." and not fits(name)]
        misfits += sorted(other for other in others if os.path.isdir(other))
    if len(fitting) > 1:
        fitting.sort()
        fitting.sort(key=len)  # patient2 before patient10
    return fitting


@functools.lru_cache(maxsize=1024)  # the same few names in all studies
def _image_names(entries: str) -> tuple[str, ...]:
    """Pick the names of images out of names joined by "/", in the order of their numbers."""
    names = [name for name in entries.split("/") if name[:1] != "." and name.lower().endswith(".png")]
    return tuple(sorted(names, key=lambda name: ([*map(int, _DIGITS.findall(name))], name)))


def _refuse_both_labels(home: Path, studies: Sequence[str]) -> None:
    both = [study for study, other in zip(studies, studies[1:]) if study == other]  # in order, so side by side
    if both:
        raise ValueError(
            f"{len(both)} studies below {home} are both positive and negative; a study has one label. Remove the wrong "
            f"folder of each, or number the studies apart. First: {both[:3]}."
        )
