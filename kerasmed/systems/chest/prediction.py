"""`kerasmed predict chest`: raw radiographs, with what the table beside them says of the patients."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import export, pipelines, runs, saved_models
from kerasmed.datasets import chest as data
from kerasmed.systems.chest import shared

logger = logging.getLogger(__name__)


def predict(run: Path, path, *, progress: bool = True) -> pd.DataFrame:
    """Predict raw image files with the model that a run chose, reading them as its training did.

    Where the model takes patient data, these are looked up by file name in the tables of the data set that `path` lies
    in, if it lies in one; an image that no table lists is predicted as a first visit with age, sex and view unknown.

    Args:
        run: a complete run folder of 04_chest_backbones or 05_chest_fusion_gradcam.
        path: an image file or a folder, searched through.
        progress: show a bar.

    Returns:
        DataFrame of `kerasmed.pipelines.predict_files`, with each label, 1 or 0 by its threshold (missing where the
        file could not be read).
    """
    chosen = runs.read_json(run / "answers.json")
    labels = list(chosen["thresholds"])
    model = saved_models.read(run / "model.keras")
    widths = _widths(model)
    beside = _patients(Path(path), widths[0]) if widths else None
    options = {**pipelines.decode_options(chosen["read"]), "beside": beside, "progress": progress}
    table = pipelines.predict_files(path, [(model, labels)], **options)
    for name in labels:
        decided = (table[f"p_{name}"] >= chosen["thresholds"][name]).astype("Int64")
        table[name] = decided.mask(table["error"] != "")
    return table


def _widths(model) -> list[int]:
    """How many values of a patient a network takes; empty for one of images alone."""
    return [each.shape[1] for each in model.inputs if each.name == "patient"]


def _patients(path: Path, width: int):
    """Function of image paths -> {"patient": values}, from the tables of the data set that `path` lies in."""
    unknown = np.array([np.nan] * len(shared.PATIENT) + [0.0] * (width - len(shared.PATIENT)), np.float32)
    # As it was named and as it is: a big set may be linked to from elsewhere, under either name.
    places = [each for start in (path.absolute(), path.resolve()) for each in (start, *start.parents)]
    roots = [each.parent for each in places if each.name == "chest"]
    root = next((each for each in roots if data.folder(each)), None)
    if root is None:
        logger.warning("no table of patients around %s: age, sex, view and earlier visits are taken as unknown", path)
        rows, values = {}, unknown[None]
    else:
        table = data.read_table(root)
        rows = {study: row for row, study in enumerate(table["study_id"])}
        values = np.vstack([shared.patient_values(table, previous=width > len(shared.PATIENT)), unknown])

    def beside(names):
        return {"patient": values[[rows.get(Path(name).stem, -1) for name in names]]}

    return beside


def exported_networks(run: Path) -> list[export.Network]:
    """Describe the network that a run of either notebook chose, for `kerasmed export`."""
    chosen = runs.read_json(run / "answers.json")
    known = f"{', '.join(shared.PATIENT)} (years; F 0, M 1; PA 0, AP 1), NaN where unknown"
    if any(width > len(shared.PATIENT) for width in _widths(saved_models.read(run / "model.keras"))):
        known += f"; then, 1 or 0, all 0 where there is none, has_previous, {', '.join(data.PREVIOUS)}"
    return [
        export.Network(
            "model",
            ("model.keras",),
            lambda: saved_models.read(run / "model.keras"),
            tuple(chosen["thresholds"]),
            "each a probability by itself; a finding is present where it reaches its threshold",
            chosen["thresholds"],
            export.read_options(chosen["read"]),
            {"patient": known},
        )
    ]


def exported_samples(run: Path, root: Path) -> tuple[dict, str]:
    """Read what the network is compared on: images of the test split, and what is known of their patients."""
    (network,) = exported_networks(run)
    widths = _widths(network.load())
    beside = _patients(data.folder(root), widths[0]) if widths else None
    return export.samples_of_images(run, root, [network], beside=beside)
