"""`kerasmed predict mura`: raw radiographs, study by study."""

from pathlib import Path, PurePosixPath

import keras
import pandas as pd

from kerasmed import models, pipelines, runs
from kerasmed.systems.mura.networks import CLASS_NAMES, LABEL


def predict(run: Path, path, *, progress: bool = True) -> pd.DataFrame:
    """Predict studies with the model or models that a run chose, reading images as its training did.

    Args:
        run: a complete run folder of 06_mura_densenet.
        path: a folder, searched through, whose images are a study where they lie in one folder; or one image file
            (PNG, JPEG, DICOM ...), which is then a study of its own.
        progress: show a bar.

    Returns:
        DataFrame, a row a study: study_path (relative to the folder), images (that could be read), p_abnormal (the mean
        over them; NaN for none), abnormal (1 or 0, by the threshold tuned on validation studies), abnormal_at_half (by
        0.5) and error: "", or which images could not be read and why.
    """
    chosen = runs.read_json(run / "answers.json")
    members = [keras.saving.load_model(run / name) for name in chosen["models"]]
    model = models.averaged(members, mirrored=chosen["flips_at_test"])
    options = {**pipelines.decode_options(chosen["read"]), "progress": progress}
    told = pipelines.predict_files(path, [(model, CLASS_NAMES)], **options)
    path = Path(path)
    folders = [PurePosixPath(name).parent.as_posix() for name in told["image_path"]]
    # Of a study's own folder, or of one file, the name is all that is known.
    told["study_path"] = [path.resolve().name if folder == "." else folder for folder in folders]
    told["reason"] = told["image_path"].where(told["error"] != "", "").str.cat(told["error"], sep=": ").str.strip(": ")
    grouped = told.groupby("study_path", sort=False)
    table = grouped.agg(
        images=("p_" + LABEL, "count"),
        **{f"p_{LABEL}": (f"p_{LABEL}", "mean")},
        error=("reason", lambda reasons: "; ".join(filter(None, reasons))),
    ).reset_index()
    for name, threshold in ((LABEL, chosen["threshold"]), (f"{LABEL}_at_half", 0.5)):
        decided = (table[f"p_{LABEL}"] >= threshold).astype("Int64")
        table.insert(table.columns.get_loc("error"), name, decided.mask(table["images"] == 0))
    return table
