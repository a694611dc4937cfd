"""Brain MRI: Alzheimer's severity and tumour type, two folder-labelled sets of greyscale JPEG.

Alzheimer: 5,121 training and 1,279 test slices of 176×208 pixels in four grades; really 200 patients of 32 slices, who
are on both sides of the published split. Tumour: 2,870 and 394 images of varied size in four types; 251 of the test
images are copies of training images. Neither has patient ids in its files: groups come from
`kerasmed.audit.similarity_groups`, or from a `patients.csv` (`image_path, patient_id`) beside the folders.
"""

import logging
from pathlib import Path

import pandas as pd

from kerasmed import images, manifest, tables

logger = logging.getLogger(__name__)

# Class ids are positions in these tuples, never a directory listing's order.
CLASS_NAMES = {
    "alzheimer": ("NonDemented", "VeryMildDemented", "MildDemented", "ModerateDemented"),
    "brain_tumor": ("no_tumor", "glioma_tumor", "meningioma_tumor", "pituitary_tumor"),
}
TASKS = tuple(CLASS_NAMES)
EXCLUSIVE = True  # every image has exactly one class
PUBLISHED_SPLITS = ("train", "test")
SOURCES = {
    "alzheimer": ("https://www.kaggle.com/datasets/tourist55/alzheimers-dataset-4-class-of-images", "see its page"),
    "brain_tumor": ("https://www.kaggle.com/datasets/sartajbhuvaji/brain-tumor-classification-mri", "MIT"),
}
LAYOUT = "brain/{alzheimer,brain_tumor}/{train,test}/<class>/*.jpg"
# What the archives call the folders that `LAYOUT` names.
ARCHIVE_FOLDERS = {
    "alzheimer": {"train": "Alzheimer_s Dataset/train", "test": "Alzheimer_s Dataset/test"},
    "brain_tumor": {"train": "Training", "test": "Testing"},
}
TABLES = ("patients.csv",)


def folder(root: Path) -> Path | None:
    """Return the folder that holds the tasks, `root/brain`, or None where no task is there."""
    home = Path(root) / "brain"
    return home if any((home / task).is_dir() for task in TASKS) else None


def part_folder(root, part: str) -> Path:
    """Return the folder of a task."""
    return Path(root) / "brain" / part


def read(root, task: str) -> pd.DataFrame:
    """Read one task's folders into a manifest.

    `split` is the published one, which leaks; `study_id` is NaN, and so are `patient_id` and `group_id` unless a
    `patients.csv` lies in the task's folder. The published test folder may be absent.

    Args:
        root: data root, the folder that holds `brain/`.
        task: "alzheimer" or "brain_tumor".

    Returns:
        Manifest sorted by path, with one label column per class of `CLASS_NAMES[task]`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: unknown task, unknown class folder, a class without images, or a patients.csv that does not fit.

    Source: see `SOURCES`.
    """
    if task not in CLASS_NAMES:
        raise ValueError(f"task {task!r} is unknown; known are {', '.join(TASKS)}.")
    home = part_folder(root, task)
    class_names = CLASS_NAMES[task]
    records, ignored = [], _list_others(root, home)
    for split in PUBLISHED_SPLITS:
        if not (home / split).is_dir():
            continue
        for class_folder in sorted(path for path in (home / split).iterdir() if path.name[0] != "."):
            if not class_folder.is_dir():
                ignored.append(class_folder.relative_to(root).as_posix())
                continue
            if class_folder.name not in class_names:
                raise ValueError(
                    f"{split}/{class_folder.name} in {home} is no class of {task}; rename it to one of "
                    f"{', '.join(class_names)}, or move it out."
                )
            for path in sorted(class_folder.iterdir()):
                if path.name.startswith("."):
                    continue
                if path.suffix.lower() not in images.SUFFIXES or path.is_dir():
                    ignored.append(path.relative_to(root).as_posix())
                    continue
                records.append((path.relative_to(root).as_posix(), split, class_folder.name))
    manifest.check_paths([path for path, _, _ in records], f"the path of a file below {home}")
    if not records:
        raise FileNotFoundError(
            f"no images of {task} under {home}; expected {LAYOUT}. Without them leave it out of `tasks`."
        )
    if ignored:
        logger.warning(
            "%d entries are no images by their suffix, or no split, and were left out: %s", len(ignored), ignored[:5]
        )
    frame = pd.DataFrame(records, columns=["image_path", "split", "label"])
    empty = [name for name in class_names if name not in set(frame["label"])]
    if empty:
        raise ValueError(
            f"{task} has no image of {', '.join(empty)} under {home}; a four-class model needs all of "
            f"{', '.join(class_names)}."
        )
    labels = {name: (frame["label"] == name).astype(int) for name in class_names}
    frame = frame.drop(columns="label").assign(patient_id=pd.NA, study_id=pd.NA, group_id=pd.NA, **labels)
    if (home / "patients.csv").exists():
        frame["patient_id"] = frame["group_id"] = _patients(home / "patients.csv", frame["image_path"])
    frame = frame[[*manifest.COLUMNS, *class_names]]
    return manifest.validate(frame, class_names, exclusive=EXCLUSIVE)


def _list_others(root, home: Path) -> list[str]:
    """List what lies beside the folders of the splits and belongs to nothing, such as "Test" for "test"."""
    known = {*PUBLISHED_SPLITS, *TABLES}
    names = sorted(path.name for path in home.iterdir()) if home.is_dir() else []
    start = home.relative_to(root).as_posix()
    return [f"{start}/{name}" for name in names if name not in known and name[0] != "."]


def _patients(path: Path, image_paths: pd.Series) -> pd.Series:
    """Look up each image's patient; paths in the file are relative to the file's folder."""
    expected = "the columns image_path and patient_id, and a row an image"
    table = tables.read(path, ("image_path", "patient_id"), expected=expected).drop_duplicates()
    twice = table["image_path"].duplicated()
    if twice.any():
        raise ValueError(
            f"{path} gives {int(twice.sum())} images two patients; keep one. "
            f"First: {table.loc[twice, 'image_path'].head(3).tolist()}."
        )
    prefix = "/".join(Path(image_paths.iloc[0]).parts[:2])
    patient = image_paths.map({f"{prefix}/{row.image_path}": row.patient_id for row in table.itertuples()})
    surplus = table[~(f"{prefix}/" + table["image_path"]).isin(image_paths)]["image_path"]
    if len(surplus):
        logger.warning(
            "%d images of %s are not there and were left out: %s", len(surplus), path, surplus.head(3).tolist()
        )
    unknown = patient.isna() | (patient == "")
    if unknown.any():
        raise ValueError(
            f"{path} gives no patient for {int(unknown.sum())} of {len(patient)} images; add them or remove the file. "
            f"First: {image_paths[unknown].head(3).tolist()}."
        )
    return patient
