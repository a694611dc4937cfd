"""`kerasmed predict brain`: raw image files, with the models of a run of either notebook."""

from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import export, pipelines, runs, saved_models
from kerasmed.datasets.brain import CLASS_NAMES
from kerasmed.systems.brain import cascade


def predict(run: Path, path, *, progress: bool = True) -> pd.DataFrame:
    """Predict raw image files with the models of a run, reading them as its training did.

    With folds they are the first fold's, which have learnt from part of the run's own images.

    Args:
        run: a complete run folder of 07_brain_mri or 08_brain_cascade.
        path: an image file or a folder, searched through.
        progress: show a bar.

    Returns:
        DataFrame of `kerasmed.pipelines.predict_files`. Of 07, `<task>`, the likeliest class, stands before each task's
        columns. Of 08: outcome, where the path ends; likeliest, the outcome of the largest joint probability;
        `p_<outcome>`, the joint probabilities; and `<stage>_<class>`, each stage's own. Each image is a person.
    """
    if (run / "cascade").is_dir():
        return _predict_outcomes(cascade.BrainCascade.load(run / "cascade"), path, progress=progress)
    params = runs.read_json(run / "params.json")
    tasks = params["tasks"]
    loaded = [(saved_models.read(run / f"model-{task}.keras"), CLASS_NAMES[task]) for task in tasks]
    table = pipelines.predict_files(path, loaded, **pipelines.decode_options(params), progress=progress)
    for task in tasks:
        probabilities = table[[f"p_{name}" for name in CLASS_NAMES[task]]]
        likeliest = np.array(CLASS_NAMES[task])[probabilities.fillna(0).to_numpy().argmax(axis=1)]
        place = table.columns.get_loc(probabilities.columns[0])
        table.insert(place, task, np.where(table["error"] == "", likeliest, ""))
    return table


def _predict_outcomes(reader: cascade.BrainCascade, path, *, progress: bool) -> pd.DataFrame:
    models = [(reader.models[stage], cascade.columns(stage)) for stage in cascade.STAGES]
    table = pipelines.predict_files(path, models, **pipelines.decode_options(reader.read_options), progress=progress)
    told = table.drop(columns=["image_path", "error"]).rename(columns=lambda name: name.removeprefix("p_"))
    stages = {stage: told[cascade.columns(stage)].fillna(0).to_numpy() for stage in cascade.STAGES}
    joint, read = cascade.joint(stages), table["error"] == ""
    named = np.array(cascade.OUTCOMES)
    ends = cascade.answers(stages, np.full(len(table), reader.threshold))
    return pd.concat(
        [
            table[["image_path", "error"]],
            pd.DataFrame({"outcome": np.where(read, named[ends], "")}),
            pd.DataFrame({"likeliest": np.where(read, named[joint.argmax(axis=1)], "")}),
            pd.DataFrame(joint, columns=[f"p_{name}" for name in named]).where(read),
            told,
        ],
        axis=1,
    )


def exported_networks(run: Path) -> list[export.Network]:
    """Describe the networks of a run of either notebook, for `kerasmed export`: one a task, or one a stage."""
    if not (run / "cascade").is_dir():
        params = runs.read_json(run / "params.json")
        return [
            export.Network(
                f"model-{task}",
                (f"model-{task}.keras",),
                lambda task=task: saved_models.read(run / f"model-{task}.keras"),
                CLASS_NAMES[task],
                "sums to 1; the likeliest class is the answer",
                {},
                export.read_options(params),
            )
            for task in params["tasks"]
        ]
    reader = cascade.BrainCascade.load(run / "cascade")
    answers = dict.fromkeys(cascade.STAGES, "sums to 1; the likeliest class is the answer, where the path leads here")
    answers["disease"] = (
        "sums to 1; the first stage of four: at the threshold or above the path leads to disease, and on to kind, "
        "which leads to severity or to type. P(none) = 1 - d, P(severity k) = d a s_k, P(type k) = d (1 - a) t_k"
    )
    return [
        export.Network(
            stage,
            (f"cascade/{stage}.keras",),
            lambda stage=stage: reader.models[stage],
            tuple(classes),
            answers[stage],
            {"disease": reader.threshold} if stage == "disease" else {},
            export.read_options(reader.read_options),
        )
        for stage, classes in cascade.STAGES.items()
    ]
