"""Notebook 02_lumbar_embeddings: encoders, and embeddings of studies, by mean and by trained attention."""

import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from kerasmed import (
    atomic,
    backbones,
    embeddings,
    environment,
    grades,
    losses,
    medicalnet,
    models,
    pipelines,
    runs,
    seals,
    series,
    training,
)
from kerasmed.datasets import lumbar as data
from kerasmed.embeddings import Features
from kerasmed.systems.lumbar.config import ATTENTION, AVERAGE, MEDICALNET, Config
from kerasmed.systems.lumbar.shared import BRANCHES, CONDITIONS, TEST, Data, Part, never_asked

_CALIBRATION_SLICES, _CALIBRATION_VOLUMES = 1024, 32


class Attended(NamedTuple):
    """What attention that was trained for one part says of every study."""

    pooled: dict[str, np.ndarray]  # condition -> (num_studies, width)
    weights: dict[str, np.ndarray]  # condition -> (num_studies, S), beside the bags; 0 where there is no slice
    probabilities: np.ndarray  # (num_studies, 25, 3): the network's own answers
    history: pd.DataFrame
    folder: str


# --- encoders --------------------------------------------------------------------------------------------------------


def find_weights(config: Config) -> None:
    """Have the weights at hand; see `kerasmed.backbones.find_weights` for what it raises.

    Raises:
        FileNotFoundError: no file at `medicalnet_weights`.
    """
    if {AVERAGE, ATTENTION} & set(config.methods):
        backbones.find_weights(config.encoder, config.weights, time_limit=config.weights_seconds)
    wanted = MEDICALNET in config.methods and config.medicalnet_weights != "none"
    if wanted and not Path(config.medicalnet_weights).is_file():
        raise FileNotFoundError(
            f"no file at `medicalnet_weights` = {config.medicalnet_weights}; expected none, or the path of a state "
            "dict of github.com/Tencent/MedicalNet as .pth, or converted to .npz."
        )


def slice_encoder(config: Config, found: Data, normalisation: str, parts: Sequence[Part]) -> tuple[keras.Model, dict]:
    """Build the network that encodes slices.

    Random weights (`weights` none) get batch statistics from slices of studies that no part asks.

    Returns:
        The model, and the receipt of its weights as a dict.
    """
    environment.fresh(config.seed)
    encoder, receipt = backbones.build(
        config.encoder,
        tuple(config.image_size),
        weights=config.weights,
        time_limit=config.weights_seconds,
        min_share=config.min_matched_share,
    )
    if receipt:
        return encoder, receipt.as_dict()
    drawn = _drawn_rows(config, found, parts, _CALIBRATION_SLICES // 8)
    pictures = np.concatenate([np.array(series.load(found.volumes, normalisation, row)) for row in drawn])
    chosen = np.random.default_rng(config.seed).permutation(len(pictures))[:_CALIBRATION_SLICES]
    embeddings.calibrate(encoder, pictures[chosen, ..., None])
    return encoder, _random_receipt(config, f"batch statistics of {len(chosen)} slices")


def volume_encoder(config: Config, found: Data, normalisation: str, parts: Sequence[Part]) -> tuple[keras.Model, dict]:
    """Build the 3D network that encodes whole series; see `slice_encoder`."""
    environment.fresh(config.seed)
    encoder = medicalnet.build(config.medicalnet_depth, (*config.medicalnet_size, 1), pool="plane")
    if config.medicalnet_weights != "none":
        state = medicalnet.read_state_dict(config.medicalnet_weights)
        options = {"min_share": config.min_matched_share, "source": str(config.medicalnet_weights)}
        return encoder, medicalnet.load(encoder, state, **options).as_dict()
    drawn = _drawn_rows(config, found, parts, _CALIBRATION_VOLUMES)
    volumes = [series.load(found.volumes, normalisation, row) for row in drawn]
    volumes = np.stack([embeddings.resample(volume, tuple(config.medicalnet_size)) for volume in volumes])
    embeddings.calibrate(encoder, volumes[..., None], batch_size=8)
    return encoder, _random_receipt(config, f"batch statistics of {len(drawn)} volumes")


def _random_receipt(config, how) -> dict:
    source = f"none: random weights of seed {config.seed}, {how}"
    return backbones.Receipt(source, [], [], []).as_dict() | {"share": None}


def _drawn_rows(config, found, parts, count) -> np.ndarray:
    """Draw some series of studies that no part asks: rows of the volumes' table."""
    learnt = found.volumes.table["study_id"].isin(found.studies["study_id"].iloc[never_asked(parts)])
    if not learnt.any():
        raise ValueError(
            "a network of random weights gets its batch statistics from studies that no part asks, and there are none "
            "with a series that could be read; reserve some when the studies are split."
        )
    return np.random.default_rng(config.seed).permutation(np.flatnonzero(learnt))[:count]


def encode(
    config: Config, found: Data, parts: Sequence[Part], method: str, normalisation: str, *, run: Path
) -> Features:
    """Encode every series by the method's network, or open what an earlier call has written.

    Writes `features/<kind>-<normalisation>/` (features.npy, index.csv), `encoders/<kind>-<normalisation>.keras` and its
    receipt, where kind is "slices" or, of MedicalNet, "planes": the means over height and width at each depth.

    Args:
        config: the recipe.
        found: of `read`.
        parts: of `split`; random weights get their batch statistics from studies that none of them asks.
        method: "average" and "attention" share slices, "medicalnet" takes volumes.
        normalisation: "gsl" or "hist".
        run: the run folder.
    """
    kind = "planes" if method == MEDICALNET else "slices"
    folder = run / "features" / f"{kind}-{normalisation}"
    if not (folder / "index.csv").exists():
        encoder, receipt = (volume_encoder if kind == "planes" else slice_encoder)(config, found, normalisation, parts)
        runs.write_json(run / "encoders" / f"{kind}-{normalisation}.json", receipt)
        runs.write_model(run / "encoders" / f"{kind}-{normalisation}.keras", encoder)
        options = {"batch_size": config.encode_batch_size}
        _, index = encode_series(encoder, kind, found.volumes, normalisation, folder, **options)
        runs.write_table(folder / "index.csv", index)
    return open_features(found, folder)


def encode_series(
    encoder: keras.Model,
    kind: str,
    volumes: series.Volumes,
    normalisation: str,
    folder: Path,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Turn every series into vectors of its slices, or of its depths; features.npy is written to the folder.

    Returns:
        Memory map (num_rows, num_features), and a row a vector: study_id, series_id, modality, position.
    """
    table, load = volumes.table, functools.partial(series.load, volumes, normalisation)
    if kind == "planes":
        values = embeddings.encode_volumes(encoder, len(table), load, folder, progress=progress)
        counts = np.full(len(table), encoder.output_shape[1])
    else:
        counts = table["slices"].to_numpy()
        values = embeddings.encode_slices(encoder, counts, load, folder, batch_size=batch_size, progress=progress)
    index = table.loc[np.repeat(np.arange(len(table)), counts), ["study_id", "series_id", "modality"]]
    return values, index.assign(position=np.concatenate([np.arange(count) for count in counts])).reset_index(drop=True)


def open_features(found: Data, folder: Path) -> Features:
    """Open the vectors that `encode` has written.

    Raises:
        ValueError: they are not of the series that can be read now.
    """
    values = np.load(folder / "features.npy", mmap_mode="r")
    index = pd.read_csv(folder / "index.csv", dtype={"study_id": str, "series_id": str})
    counted = index.groupby(["study_id", "series_id"], sort=False).size()
    wanted = found.volumes.table.set_index(["study_id", "series_id"])["slices"]
    slices = folder.name.startswith("slices")
    if not counted.index.equals(wanted.index) or (slices and (counted != wanted).any()):
        raise ValueError(
            f"{folder} holds {len(index)} vectors of {len(counted)} series, but {len(wanted)} series of {wanted.sum()} "
            "slices can be read now; delete that folder and run 02_lumbar_embeddings again."
        )
    return Features(values.reshape(len(index), -1), index)


# --- embeddings ------------------------------------------------------------------------------------------------------


def bags_of(found: Data, features: Features) -> dict[str, np.ndarray]:
    """List each study's rows of the features, of the modality that each condition is paired with."""
    ids = found.studies["study_id"].to_numpy()
    bags = {name: embeddings.bag_rows(features.index, ids, data.PAIRED[name]) for name in CONDITIONS}
    longest = max(rows.shape[1] for rows in bags.values())
    return {
        name: np.pad(rows, ((0, 0), (0, longest - rows.shape[1])), constant_values=-1) for name, rows in bags.items()
    }


def average(config: Config, features: Features, bags: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Average each study's vectors of the paired modality, projected to `projection` numbers.

    Returns:
        Condition -> float32 array (num_studies, width); NaN where a study has no such series.
    """
    means = {name: embeddings.bag_average(features.values, rows) for name, rows in bags.items()}
    return {name: embeddings.project(each, config.projection, seed=config.seed) for name, each in means.items()}


def attend(
    config: Config,
    found: Data,
    features: Features,
    bags: Mapping[str, np.ndarray],
    part: Part,
    *,
    name: str,
    run: Path,
) -> Attended:
    """Train attention over each condition's bags on a part's training studies, or read what an earlier call finished.

    One network a part, whose three branches share nothing. A grade that is blank, or whose modality is missing, adds
    nothing to the loss, and the part's asked studies are never shown to it.

    Args:
        config: the recipe.
        found: of `read`.
        features: of `encode`.
        bags: of `bags_of`.
        part: what to learn from.
        name: of the embedding, such as "attention-gsl".
        run: the run folder; the training goes to `variants/<name>-<part>`.
    """
    folder = runs.variant_folder(run, f"{name}-{part.name}")
    if not seals.is_sealed(folder):
        environment.fresh(config.seed)
        rows = {BRANCHES[condition]: bags[condition] for condition in CONDITIONS}
        model = _network(config, features, rows, part)
        y = _targets(found, bags)
        print(f"{folder.name}: {len(part.train)} studies to learn from", flush=True)
        training.fit(
            model,
            lambda first: embeddings.bag_dataset(
                features.values,
                rows,
                part.train,
                y[part.train],
                batch_size=config.batch_size,
                seed=config.seed,
                first_epoch=first,
            ),
            embeddings.bag_dataset(features.values, rows, part.valid, y[part.valid], batch_size=config.batch_size),
            folder=folder,
            steps_per_epoch=pipelines.steps_per_epoch(len(part.train), config.batch_size),
            epochs=config.epochs,
            loss=losses.GradedCrossentropy(grades.SAMPLE_WEIGHTS),
            learning_rate=config.learning_rate,
            schedule="cosine",
            stop_patience=config.stop_patience,
        )
        _answer(model, features, rows, folder)
        seals.seal(folder)
    with np.load(folder / "attended.npz") as saved:
        pooled, weights = (
            {condition: saved[f"{BRANCHES[condition]}_{what}"] for condition in CONDITIONS}
            for what in ("pooled", "weights")
        )
        return Attended(pooled, weights, saved["probabilities"], pd.read_csv(folder / "history.csv"), folder.name)


def _network(config, features, rows, part) -> keras.Model:
    """Build the attention network, each branch standardised by its training slices."""
    moments = {branch: embeddings.moments(features.values, bags[part.train]) for branch, bags in rows.items()}
    return models.attention_classifier(
        {BRANCHES[condition]: len(data.targets_of(condition)) for condition in CONDITIONS},
        next(iter(rows.values())).shape[1],
        features.values.shape[1],
        width=config.attention_width,
        units=config.attention_units,
        dropout=config.dropout,
        moments=moments,
    )


def _targets(found, bags) -> np.ndarray:
    """Grades (num_studies, 25) in the order of the branches; NaN where blank or where the modality is missing."""
    y = []
    for condition in CONDITIONS:
        known = found.studies[list(data.targets_of(condition))].to_numpy(np.float32)
        y.append(np.where(bags[condition][:, :1] >= 0, known, np.float32(np.nan)))
    return np.concatenate(y, axis=1)


def _answer(model, features, rows, folder) -> None:
    """Write what a trained network makes of every study: pooled vectors, weights of slices, probabilities."""
    every = embeddings.bag_dataset(features.values, rows, np.arange(len(next(iter(rows.values())))))
    found = {"probabilities": model.predict(every, verbose=0)}
    for branch in rows:
        found[f"{branch}_pooled"], found[f"{branch}_weights"] = models.attention_parts(model, branch).predict(
            every, verbose=0
        )
    with atomic.whole(folder / "attended.npz") as temporary:
        np.savez(temporary, **found)


def write_embedding(
    found: Data, features: Features, bags: Mapping[str, np.ndarray], vectors: Mapping[str, np.ndarray], path: Path
) -> pd.DataFrame:
    """Write a study's vector of each modality as CSV: study_id, series_id ("+" between several), 0 … D − 1.

    Args:
        found: of `read`.
        features, bags: that the vectors were made of.
        vectors: condition -> array (num_studies, D).
        path: the CSV.

    Returns:
        The first two columns, and the condition that each row's modality is paired with.
    """
    tables, numbers = [], []
    series_ids = features.index["series_id"].to_numpy()
    for condition, rows in bags.items():
        has = np.flatnonzero(rows[:, 0] >= 0)
        joined = ["+".join(dict.fromkeys(series_ids[bag[bag >= 0]])) for bag in rows[has]]
        studies = found.studies["study_id"].to_numpy()[has]
        tables.append(pd.DataFrame({"study_id": studies, "series_id": joined, "condition": condition}))
        numbers.append(vectors[condition][has])
    index = pd.concat(tables, ignore_index=True)
    if not path.exists():
        embeddings.write(path, index[["study_id", "series_id"]], np.concatenate(numbers))
    return index


def slice_weights(found: Data, features: Features, bags: Mapping[str, np.ndarray], attended: Attended) -> pd.DataFrame:
    """Lay the attention's weights out, a row a slice (or depth position) of the paired modality.

    Returns:
        DataFrame: condition, study (position in the studies), study_id, series_id, position, weight; weights of a study
        sum to 1.
    """
    tables = []
    for condition, rows in bags.items():
        study, place = np.nonzero(rows >= 0)
        table = features.index.iloc[rows[study, place]][["study_id", "series_id", "position"]].reset_index(drop=True)
        table.insert(0, "study", study)
        table.insert(0, "condition", condition)
        tables.append(table.assign(weight=attended.weights[condition][study, place]))
    return pd.concat(tables, ignore_index=True)


def embed_all(
    config: Config, found: Data, parts: Sequence[Part], *, run: Path
) -> tuple[dict[tuple[str, str, str], dict[str, np.ndarray]], dict[tuple[str, str, str], Attended]]:
    """Make every embedding of every part.

    Attention is trained anew for each part, so that no embedding knows the grades of the studies it is judged by; means
    are the same in all parts.

    Returns:
        dict (method, normalisation, part) -> condition -> vectors (num_studies, width); and, of the methods with
        attention, dict of the same keys -> `Attended`.
    """
    vectors, attended = {}, {}
    for normalisation in config.normalisations:
        for method in config.methods:
            features = encode(config, found, parts, method, normalisation, run=run)
            bags = bags_of(found, features)
            name = f"{method}-{normalisation}"
            means = average(config, features, bags) if method == AVERAGE else None
            for part in parts:
                key = (method, normalisation, part.name)
                if method == AVERAGE:
                    vectors[key] = means
                else:
                    attended[key] = attend(config, found, features, bags, part, name=name, run=run)
                    vectors[key] = attended[key].pooled
            path = run / "embeddings" / f"{name}.csv"
            write_embedding(found, features, bags, vectors[method, normalisation, TEST], path)
    return vectors, attended


def weights_of(
    config: Config,
    found: Data,
    parts: Sequence[Part],
    method: str,
    normalisation: str,
    attended: Attended,
    *,
    run: Path,
) -> pd.DataFrame:
    """Return `slice_weights` of an embedding that `embed_all` made."""
    features = encode(config, found, parts, method, normalisation, run=run)
    return slice_weights(found, features, bags_of(found, features), attended)


def model_path(config: Config, attended: Mapping[tuple[str, str, str], Attended], chosen: Sequence[str] = ()) -> str:
    """Name the attention network of the test part that stands for the run: the chosen embedding's, else the first.

    Returns:
        Path in the run folder, "" where no embedding has attention.
    """
    tested = {key[:2]: each for key, each in attended.items() if key[2] == TEST}
    if not tested:
        return ""
    own = tested.get(tuple(chosen[:2]), next(iter(tested.values())))
    return f"variants/{own.folder}/model.keras"


def keep(
    config: Config,
    answers: pd.DataFrame,
    attended: Mapping[tuple[str, str, str], Attended],
    chosen: Sequence[str],
    *,
    run: Path,
) -> None:
    """Put what stands for the run on top of its folder: predictions.csv, history.csv and, with attention, model.keras.

    The predictions are the chosen point's. Classifiers that are no networks are not saved: a file of them would have to
    be unpickled, which runs whatever it says. Fitting one anew on the saved embeddings takes seconds.

    Args:
        config: the recipe.
        answers: of the chosen point.
        attended: of `embed_all`.
        chosen: embedding, normalisation, sampling and classifier.
        run: the run folder.
    """
    runs.write_table(run / "predictions.csv", answers.assign(variant=" ".join(chosen)))
    histories = [each.history.assign(training=each.folder) for each in attended.values()]
    if histories:
        runs.write_table(run / "history.csv", pd.concat(histories))
        with atomic.whole(run / "model.keras") as temporary:
            shutil.copyfile(run / model_path(config, attended, chosen), temporary)


def receipts(run: Path) -> pd.DataFrame:
    """Say of each encoder where its weights came from, how many tensors matched, and their share (NaN without a file).

    Returns:
        DataFrame: encoder, weights, matched, share.
    """
    found = {path.stem: runs.read_json(path) for path in sorted((run / "encoders").glob("*.json"))}
    rows = [(name, each["source"], len(each["matched"]), each["share"]) for name, each in found.items()]
    return pd.DataFrame(rows, columns=["encoder", "weights", "matched", "share"])
