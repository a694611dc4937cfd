"""Notebook 02_lumbar_embeddings: where attention looks, and which studies are alike."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kerasmed import metrics, series
from kerasmed.datasets import lumbar as data
from kerasmed.systems.lumbar.shared import CONDITIONS, Data, Part

CHANCE, MIDDLE = "a slice at random", "the middle slice"


def top_slices(
    weights: pd.DataFrame, signal: Mapping[tuple[str, str], set[int]], studies: Sequence[int]
) -> pd.DataFrame:
    """Say of each study whether the slice of the largest weight is one that carries a sign.

    Args:
        weights: of `kerasmed.systems.lumbar.embedded.slice_weights`, of slices.
        signal: (study_id, series_id) -> positions that carry a sign of the modality's own condition.
        studies: positions of the studies to look at: those that attention has not learnt from.

    Returns:
        DataFrame, a row a condition and study with at least one such slice: condition, study_id, slices, with_sign,
        top (whether the top slice carries a sign), chance (share of the slices that do), middle (whether the middle
        slice of the first series does).
    """
    weights = weights[weights["study"].isin(studies)]
    signs = [
        place in signal.get((study, series), ())
        for study, series, place in zip(weights["study_id"], weights["series_id"], weights["position"])
    ]
    rows = []
    for (condition, study_id), of_bag in weights.assign(sign=signs).groupby(["condition", "study_id"], sort=False):
        sign = of_bag["sign"].to_numpy()
        if sign.any():
            top, chance = sign[of_bag["weight"].to_numpy().argmax()], sign.mean()
            counts = {"slices": len(sign), "with_sign": int(sign.sum())}
            row = {"condition": condition, "study_id": study_id, **counts}
            first = (of_bag["series_id"] == of_bag["series_id"].iloc[0]).sum()
            rows.append(row | {"top": bool(top), "chance": float(chance), "middle": bool(sign[first // 2])})
    columns = ["condition", "study_id", "slices", "with_sign", "top", "chance", "middle"]
    return pd.DataFrame(rows, columns=columns)


def top_slice_rows(
    found: pd.DataFrame, *, variant: str, num_draws: int = metrics.BOOTSTRAPS, seed: int = 0
) -> list[dict]:
    """Tabulate how often the top slice carries a sign, beside what a slice at random and the middle slice would hit.

    Args:
        found: of `top_slices`.
        variant: whose attention.
        num_draws, seed: of the bootstrap over studies.

    Returns:
        Rows as of `kerasmed.metrics.multiclass_rows`, of metric "top_slice": a row a condition, with the baseline
        "a slice at random" and the reference "the middle slice".
    """
    rows = []
    for condition in CONDITIONS:
        among = found[found["condition"] == condition]
        row = {"task": condition, "split": "test", "variant": variant, "metric": "top_slice", "label": "all"}
        row |= {"n": len(among), "n_groups": among["study_id"].nunique(), "baseline": None}
        if among.empty:
            rows.append(row | {"value": None, "ci95": None, "reason": "no study with a slice that carries a sign"})
            continue
        values = among[["top", "chance", "middle"]].to_numpy(float)
        draws = metrics.bootstrap_weights(among["study_id"], num_draws=num_draws, seed=seed)
        spread = (draws @ values) / draws.sum(axis=1, keepdims=True)
        value, chance, middle = values.mean(axis=0)
        row |= {"value": value, "ci95": metrics.interval(spread[:, 0])}
        for place, (name, rival, against) in enumerate(
            (("baseline", CHANCE, chance), ("reference", MIDDLE, middle)), 1
        ):
            ends = metrics.interval(spread[:, 0] - spread[:, place])
            compared = {"variant": rival, "value": against, "difference": value - against, "difference_ci95": ends}
            row[name] = compared
        rows.append(row)
    return rows


def alike(
    vectors: np.ndarray, queries: Sequence[int], among: Sequence[int], *, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the studies whose embedding points in the most similar direction: cosine, after centring on `among`.

    Args:
        vectors: float array, shape (num_studies, D); NaN where a study has none.
        queries: positions that are asked.
        among: positions that are searched; those without a vector are passed over.
        count: how many to find of each; at most as many as there are.

    Returns:
        int and float arrays, shape (num_queries, count): positions in the studies, most alike first, and cosines; a
        query that lies in `among` does not find itself, and one without a vector finds -1 with NaN.
    """
    queries = np.asarray(queries)
    among = np.asarray(among)[np.isfinite(vectors[among]).all(axis=1)]
    unit = vectors - vectors[among].mean(axis=0)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    cosines = unit[queries] @ unit[among].T
    itself = queries[:, None] == among
    cosines[itself] = -np.inf
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : min(count, len(among) - int(itself.any()))]
    found, sure = among[order], np.take_along_axis(cosines, order, axis=1)
    without = ~np.isfinite(vectors[queries]).all(axis=1)
    found[without], sure[without] = -1, np.nan
    return found, sure


def agreement(
    grades: np.ndarray,
    queries: Sequence[int],
    found: np.ndarray,
    among: Sequence[int],
    *,
    num_draws: int = metrics.BOOTSTRAPS,
    seed: int = 0,
) -> dict:
    """Compare how far a study's worst grade lies from those of its likes, and from those of all that were searched.

    Args:
        grades: float array, shape (num_studies,): a study's worst grade of a condition, NaN where unknown.
        queries: positions that were asked.
        found: of `alike`.
        among: positions that could be found: those with a vector.
        num_draws, seed: of the bootstrap over the queries.

    Returns:
        dict: n, how many queries have a grade and likes with one; of_alike and at_random, the mean absolute differences
        of grades; difference, the first less the second, and its 95 % interval ci95 (None for no query).
    """
    queries, among = np.asarray(queries), np.asarray(among)
    near = np.where(found >= 0, grades[found], np.nan)
    alike_known, among_known = np.isfinite(near), grades[among][np.isfinite(grades[among])]
    rows = np.flatnonzero(np.isfinite(grades[queries]) & alike_known.any(axis=1))
    if not len(rows) or not len(among_known):
        return {"n": 0, "of_alike": None, "at_random": None, "difference": None, "ci95": None}
    own = grades[queries[rows]][:, None]
    of_alike = np.nanmean(np.abs(own - near[rows]), axis=1)
    pairs = np.stack([of_alike, np.abs(own - among_known).mean(axis=1)], axis=1)
    draws = metrics.bootstrap_weights(rows, num_draws=num_draws, seed=seed)
    spread = (draws @ (pairs[:, 0] - pairs[:, 1])) / draws.sum(axis=1)
    near_mean, far_mean = pairs.mean(axis=0).tolist()
    means = {"of_alike": near_mean, "at_random": far_mean, "difference": near_mean - far_mean}
    return {"n": len(rows), **means, "ci95": metrics.interval(spread)}


def worst_grades(studies: pd.DataFrame, condition: str) -> np.ndarray:
    """Return each study's worst known grade of a condition, float, shape (num_studies,); NaN where all are blank."""
    return studies[list(data.targets_of(condition))].max(axis=1).to_numpy(float)


def neighbours_shown(
    found: Data, vectors: np.ndarray, part: Part, condition: str, normalisation: str, *, count: int, queries: int = 3
) -> dict:
    """Pick asked studies, the worst first, with those that are learnt from and are most alike, for `retrieval`.

    Returns:
        dict: queries, a list of (image, caption), and neighbours, a list of such a list for each.
    """
    worst = worst_grades(found.studies, condition)
    has = part.asked[np.isfinite(vectors[part.asked]).all(axis=1) & np.isfinite(worst[part.asked])]
    asked = has[np.argsort(-worst[has], kind="stable")][:queries]
    near, sure = alike(vectors, asked, part.learnt, count=count)
    ids = found.studies["study_id"].to_numpy()

    def picture(study):
        return _middle(found, ids[study], data.PAIRED[condition], normalisation)

    def grade(study):
        return "blank" if np.isnan(worst[study]) else data.GRADES[int(worst[study])]

    near_by = [list(zip(row, of_row)) for row, of_row in zip(near, sure)]
    return {
        "queries": [(picture(study), f"study {ids[study]}\nworst: {grade(study)}") for study in asked],
        "neighbours": [
            [(picture(study), f"cosine {cosine:.2f}\nworst: {grade(study)}") for study, cosine in row]
            for row in near_by
        ],
    }


def _middle(found, study_id, modality, normalisation) -> np.ndarray:
    """The middle slice of a study's first series of a modality, uint8."""
    table = found.volumes.table
    rows = np.flatnonzero((table["study_id"] == study_id) & (table["modality"] == modality))
    volume = series.load(found.volumes, normalisation, int(rows[0]))
    return np.asarray(volume[len(volume) // 2])


def drawn_weights(
    found: Data,
    weights: pd.DataFrame,
    signal: Mapping[tuple[str, str], set[int]] | None,
    studies: Sequence[int],
    normalisation: str,
    *,
    count: int = 3,
) -> dict:
    """Pick studies of each condition, the worst first, with their slice weights and top slices, for `slice_weights`.

    Returns:
        dict: weights, signal (None where it is not known), captions, images.
    """
    drawn = {"weights": [], "signal": [], "captions": [], "images": []}
    table = found.volumes.table.reset_index(names="row").set_index(["study_id", "series_id"])["row"]
    for condition in CONDITIONS:
        worst = pd.Series(worst_grades(found.studies, condition)).iloc[list(studies)].dropna()
        of_condition = weights[weights["condition"] == condition]
        worst = worst[worst.index.isin(of_condition["study"])].sort_values(ascending=False, kind="stable")
        for study, grade in worst.head(count).items():
            bag = of_condition[of_condition["study"] == study]
            top = bag.loc[bag["weight"].idxmax()]
            volume = series.load(found.volumes, normalisation, int(table[top["study_id"], top["series_id"]]))
            drawn["weights"].append(bag["weight"].to_numpy())
            drawn["images"].append(np.asarray(volume[top["position"]]))
            drawn["captions"].append(f"{condition.replace('_', ' ')}\n{top['study_id']}: {data.GRADES[int(grade)]}")
            places = zip(bag["study_id"], bag["series_id"], bag["position"])
            drawn["signal"].append(
                np.array([place in (signal or {}).get((study_id, name), ()) for study_id, name, place in places])
            )
    return drawn if signal is not None else drawn | {"signal": None}
