"""`kerasmed predict chest`: raw radiographs, with what the table beside them says of the patients."""

import logging
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from kerasmed import (
    fusion,  # noqa: F401  registers the layers that saved models are made of
    pipelines,
    runs,
)
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
    model = keras.saving.load_model(run / "model.keras")
    widths = [each.shape[1] for each in model.inputs if each.name == "patient"]
    beside = _patients(Path(path), widths[0]) if widths else None
    options = {**pipelines.decode_options(chosen["read"]), "beside": beside, "progress": progress}
    table = pipelines.predict_files(path, [(model, labels)], **options)
    for name in labels:
        decided = (table[f"p_{name}"] >= chosen["thresholds"][name]).astype("Int64")
        table[name] = decided.mask(table["error"] != "")
    return table


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
