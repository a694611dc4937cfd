"""`kerasmed export` of a run of 03_lumbar_fusion: the encoder of slices or volumes, and the network of its vectors."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import embeddings, export, runs, saved_models, series
from kerasmed.datasets import lumbar as data
from kerasmed.embeddings import Features
from kerasmed.systems.lumbar.embedded import encode_series
from kerasmed.systems.lumbar.shared import MODALITIES, TARGETS

STUDIES = 4  # a volume takes a network of 152 layers seconds


def exported_networks(run: Path) -> list[export.Network]:
    """Describe the two networks of a run, the second of which takes what the first gives."""
    chosen = runs.read_json(run / "answers.json")
    read = {**chosen["read"], "normalisation": chosen["normalisation"]}
    unit = "slice" if chosen["vectors"] == "slices" else "volume"
    inputs = {
        "slices": f"{', '.join(MODALITIES)}, and of each the encoder's vectors, 0 where there is none",
        "slice_mask": "whether there is a vector",
        "available": "whether the modality is there; without any the answer is no number",
    }
    return [
        export.Network(
            "encoder",
            ("encoder.keras",),
            lambda: saved_models.read(run / "encoder.keras", compile=False),
            (),
            f"the vectors of a {unit}, which `model` takes",
            {},
            read,
        ),
        export.Network(
            "model",
            ("model.keras",),
            lambda: saved_models.read(run / "model.keras", compile=False),
            tuple(data.GRADES),
            f"of each of {len(TARGETS)} targets the probabilities of its grades, which sum to 1; the targets are, in "
            f"this order, {', '.join(TARGETS)}",
            {},
            read,
            inputs,
        ),
    ]


def exported_samples(run: Path, root: Path) -> tuple[dict, str]:
    """Read series of a few test studies as training did, and encode them for the network of vectors.

    Raises:
        FileNotFoundError: no series of a test study can be read.
    """
    chosen = runs.read_json(run / "answers.json")
    split = pd.read_csv(run / "split.csv", dtype=str, keep_default_na=False)
    asked = set(split.loc[split["split"].str.startswith("test"), "study_id"])
    manifest = data.read(root)
    ids = export.spread([each for each in manifest["study_id"].drop_duplicates() if each in asked], STUDIES)
    encoder = saved_models.read(run / "encoder.keras", compile=False)
    with tempfile.TemporaryDirectory(prefix="kerasmed-") as folder:
        volumes = series.convert(
            manifest[manifest["study_id"].isin(ids)].reset_index(drop=True),
            root,
            image_size=tuple(chosen["read"]["image_size"]),
            normalisations=(chosen["normalisation"],),
            window=chosen["read"]["window"],
            max_quarantined_share=1.0,
            folder=folder,
            progress=False,
        )
        if volumes.table.empty:
            raise FileNotFoundError(f"no series of the test split of {run.name} can be read under {root}.")
        loaded = [np.array(series.load(volumes, chosen["normalisation"], row)) for row in range(len(volumes.table))]
        values, index = encode_series(
            encoder, chosen["vectors"], volumes, chosen["normalisation"], Path(folder), progress=False
        )
        features = Features(np.array(values), index)
    if chosen["vectors"] == "planes":
        pictures = np.stack(
            [embeddings.resample(each, encoder.input_shape[1:4]) for each in loaded[: export.ODD_BATCH]]
        )
    else:
        pictures = np.concatenate(export.spread(loaded, STUDIES))[: export.IMAGES]
    bags = embeddings.stack_bags([embeddings.bag_rows(features.index, ids, name) for name in MODALITIES])
    bags = bags[(bags >= 0).any(axis=(1, 2))]
    given = {"encoder": {encoder.inputs[0].name: pictures[..., None]}}
    given["model"] = embeddings.modality_inputs(features.values, bags)
    return given, f"series of {len(bags)} studies of the test split"
