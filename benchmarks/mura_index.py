"""MURA's folders become a table in one pass, against a table grown row by row, and against walking the folders.

A tree in MURA's layout, of its numbers of images, studies and patients, with empty files: all sides only list folders,
which the checks leave in memory for all. The first peer is the loop over nested `os.listdir` that notebooks on MURA
have, which grows the table by a row an image: by `pd.concat` on columns of objects, several times as quick as
`df.loc[len(df)] = ...` and as columns of text. The second, `os.walk`, only collects the paths of all files, without
reading anything off them. Before, all fields are compared with those of the grown table, and the paths with those of
`os.walk`.
"""

import os
import random
import tempfile

import measure
import pandas as pd

from kerasmed.datasets import mura

IMAGES = 40_561
# Folder -> images, studies, patients; the 207 studies never published lie in valid too.
SIZES = {"train": (36_808, 13_457, 11_184), "valid": (3_753, 1_406, 989)}
WEIGHTS = (5, 6, 3, 6, 2, 9, 10)  # of the study types
COLUMNS = ["image_path", "patient_id", "body_part", "study", "split", "abnormal"]


def write(root: str) -> None:
    """Write the tree."""
    draw, first = random.Random(0), 1
    for split, (num_images, num_studies, num_patients) in SIZES.items():
        patients = [f"patient{number:05d}" for number in range(first, first + num_patients)]
        first += num_patients
        type_of = dict(zip(patients, draw.choices(mura.STUDY_TYPES, WEIGHTS, k=num_patients)))
        owners = patients + draw.choices(patients, k=num_studies - num_patients)
        extra = draw.choices(range(num_studies), k=num_images - num_studies)
        counts = [1] * num_studies
        for study in extra:
            counts[study] += 1
        studies = dict.fromkeys(patients, 0)
        for patient, count in zip(owners, counts):
            studies[patient] += 1
            label = draw.choices(("negative", "positive"), (9_045, 5_818))[0]
            folder = f"{mura.part_folder(root, mura.PART)}/{split}/{type_of[patient]}/{patient}"
            folder += f"/study{studies[patient]}_{label}"
            os.makedirs(folder)
            for number in range(1, count + 1):
                open(f"{folder}/image{number}.png", "wb").close()


def listed(root: str):
    """Yield the fields of each image by nested listing."""
    home = "mura/MURA-v1.1"
    for split in ("train", "valid"):
        for body_part in os.listdir(f"{root}/{home}/{split}"):
            for patient in os.listdir(f"{root}/{home}/{split}/{body_part}"):
                for study in os.listdir(f"{root}/{home}/{split}/{body_part}/{patient}"):
                    folder = f"{home}/{split}/{body_part}/{patient}/{study}"
                    for image in os.listdir(f"{root}/{folder}"):
                        yield f"{folder}/{image}", patient, body_part, study, split, float("positive" in study)


def grown(root: str) -> pd.DataFrame:
    """Join a table of one row to the table for each image."""
    table = pd.DataFrame(columns=COLUMNS, dtype=object)
    for fields in listed(root):
        row = pd.DataFrame([fields], columns=COLUMNS, dtype=object)
        table = pd.concat([table, row], ignore_index=True)
    return table


def walked(root: str) -> list[str]:
    """Collect the path of every file."""
    return [os.path.join(folder, name) for folder, _, files in os.walk(root) for name in files]


def check(root: str) -> None:
    """Raise where the tables or paths differ."""
    ours = mura.read(root)
    paths = sorted(os.path.relpath(path, root) for path in walked(root))
    if len(paths) != IMAGES or sorted(ours["image_path"]) != paths:
        raise ValueError(f"{len(ours)} images were read, and {len(paths)} of {IMAGES} walked; the paths differ.")
    counts = ours["study_id"].nunique(), ours["patient_id"].nunique()
    if counts != (14_863, 12_173):
        raise ValueError(f"{counts} studies and patients were read; expected 14,863 and 12,173.")
    number = ours["study_id"].str.rpartition("/")[2] + ours["abnormal"].map({0: "_negative", 1: "_positive"})
    split = ours["split"].replace("test", "valid")
    told = ours.assign(study=number, split=split).set_index("image_path")[COLUMNS[1:]]
    other = grown(root).set_index("image_path")
    if (other.loc[told.index] != told).any(axis=None):
        raise ValueError("fields differ from those of the table grown row by row.")


def run():
    with tempfile.TemporaryDirectory() as root:
        write(root)
        check(root)
        slow = measure.rounds({"ours": lambda: mura.read(root), "grown": lambda: grown(root)}, warm=0)
        quick = measure.rounds({"ours": lambda: mura.read(root), "walk": lambda: walked(root)}, count=21)
    yield measure.faster(
        "MURA index, 40,561 files, against a table grown row by row",
        slow["ours"],
        slow["grown"],
        amount=IMAGES,
        unit="files/s",
        at_least=20,
        checked="all fields equal in all rows",
    )
    yield measure.shorter(
        "MURA index, 40,561 files, against os.walk",
        quick["ours"],
        quick["walk"],
        at_most=1,
        checked="the same 40,561 paths",
    )


if __name__ == "__main__":
    measure.main(run)
