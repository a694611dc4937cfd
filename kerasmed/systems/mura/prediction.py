"""`kerasmed predict mura`: raw radiographs, study by study."""

import posixpath
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import dicom, export, models, pipelines, runs, saved_models
from kerasmed.systems.mura.networks import CLASS_NAMES, LABEL


def predict(run: Path, path, *, progress: bool = True) -> pd.DataFrame:
    """Predict studies with the model or models that a run chose, reading images as its training did.

    What is one study: DICOM files of one StudyInstanceUID, wherever they lie; other images that lie in one folder; one
    file that is named alone. Deep DICOM pixels are scaled by their own range, without a window, which is not how the
    8-bit pictures of MURA were made: look at some before trusting the answers.

    Args:
        run: a complete run folder of 06_mura_densenet.
        path: a folder, searched through, or one image file (PNG, JPEG, DICOM ...).
        progress: show a bar.

    Returns:
        DataFrame, a row a study: study_path (the folder of its images, relative to `path`; with the first image's name
        where several studies share it), images (that could be read), p_abnormal (the mean over them; NaN for none),
        abnormal (1 or 0, by the threshold tuned on validation studies), abnormal_at_half (by 0.5) and error: "", or
        which images could not be read and why.
    """
    chosen = runs.read_json(run / "answers.json")
    members = [saved_models.read(run / name) for name in chosen["models"]]
    model = models.averaged(members, mirrored=chosen["flips_at_test"])
    options = {**pipelines.decode_options(chosen["read"]), "progress": progress}
    told = pipelines.predict_files(path, [(model, CLASS_NAMES)], **options)
    studies = gather(path, told["image_path"].tolist())
    told["reason"] = told["image_path"].where(told["error"] != "", "").str.cat(told["error"], sep=": ").str.strip(": ")
    number = np.empty(len(told), int)
    for position, rows in enumerate(studies.values()):
        number[rows] = position
    table = told.groupby(number).agg(
        images=(f"p_{LABEL}", "count"),
        **{f"p_{LABEL}": (f"p_{LABEL}", "mean")},
        error=("reason", lambda reasons: "; ".join(filter(None, reasons))),
    )
    table.insert(0, "study_path", list(studies))
    for name, threshold in ((LABEL, chosen["threshold"]), (f"{LABEL}_at_half", 0.5)):
        decided = (table[f"p_{LABEL}"] >= threshold).astype("Int64")
        table.insert(table.columns.get_loc("error"), name, decided.mask(table["images"] == 0))
    return table


def gather(path, names: Sequence[str]) -> dict[str, list[int]]:
    """Gather images into studies; see `predict` for what one study is.

    Args:
        path: the folder that the names are relative to, or the one file.
        names: of the images, "/" between folders.

    Returns:
        dict from a study's name, as `predict` gives it, to the positions of its images; in order of the first ones.
    """
    path = Path(path)
    root = path if path.is_dir() else path.parent
    found: dict[tuple[str, str], list[int]] = {}
    for position, name in enumerate(names):
        uid = dicom.study_uid(root / name) if dicom.is_dicom(root / name) else ""
        found.setdefault((uid, "" if uid else posixpath.dirname(name)), []).append(position)
    folders = [posixpath.commonpath([posixpath.dirname(names[each]) for each in rows]) for rows in found.values()]
    often, shown = Counter(folders), []
    for folder, rows in zip(folders, found.values()):
        if len(found) == 1 and not folder:  # the study's own folder, or the one file
            shown.append(path.resolve().name)
        elif often[folder] > 1:
            shown.append(posixpath.join(folder, posixpath.basename(names[rows[0]])))
        else:
            shown.append(folder or ".")
    return dict(zip(shown, found.values()))


def exported_networks(run: Path) -> list[export.Network]:
    """Describe what a run answers an image with, for `kerasmed export`: one network, of several the mean of them."""
    chosen = runs.read_json(run / "answers.json")

    def load():
        members = [saved_models.read(run / name) for name in chosen["models"]]
        return models.averaged(members, mirrored=chosen["flips_at_test"])

    count = len(chosen["models"])
    mean = f"; the mean of {count} networks{', each also of the mirror image' if chosen['flips_at_test'] else ''}"
    return [
        export.Network(
            "model",
            tuple(chosen["models"]),
            load,
            tuple(CLASS_NAMES),
            f"a probability of one image{mean if count > 1 or chosen['flips_at_test'] else ''}; a study's is the mean "
            "over its images, and is abnormal where that reaches the threshold",
            {LABEL: chosen["threshold"]},
            export.read_options(chosen["read"]),
        )
    ]
