"""Notebook 03_lumbar_fusion: how each way to cope with missing modalities does, for each subset of the modalities.

A study that has all modalities is asked seven times, with each subset of them shown and the others hidden: the same
studies and grades in each, so that differences are between what was shown and how the model coped.
"""

from collections.abc import Mapping
from itertools import product

import keras
import numpy as np
import pandas as pd

from kerasmed import grades, metrics, modalities
from kerasmed.datasets import lumbar as data
from kerasmed.systems.lumbar import fused
from kerasmed.systems.lumbar.fused import FACTORS, PARTIAL, SHORT, WHOLE, Cases, Key
from kerasmed.systems.lumbar.shared import CONDITIONS, TARGETS, TEST

METRICS = ("macro_auroc", "macro_f1", "weighted_log_loss")
ALL = "all conditions"  # the mean of the three
REFERENCE = "zero"
SOME_MISSING, ALL_THERE, COPING = WHERE = "some missing", "all there", "some missing − all there"
_NUM_GRADES = len(data.GRADES)
_COLUMNS = {name: [TARGETS.index(target) for target in data.targets_of(name)] for name in CONDITIONS}

_PLACE = {where: place for place, where in enumerate(data.PLACES.values())}

Points = Mapping[tuple, tuple[float, np.ndarray]]  # key and subset, or a baseline's name -> value, draws


def _asked(rows: pd.DataFrame, split: str) -> dict[str, np.ndarray]:
    """Subset -> positions in `rows` of the split's complete studies, the same studies in the same order in each."""
    chosen = rows[(rows["split"] == split) & rows["complete"]]
    return {name: np.flatnonzero(rows.index.isin(of.index)) for name, of in chosen.groupby("modalities", sort=False)}


def _flat(array: np.ndarray, condition: str) -> np.ndarray:
    """(num_studies, 25, ...) -> (num_rows, ...) of one condition."""
    return array[:, _COLUMNS[condition]].reshape(-1, *array.shape[2:])


def score(
    told: Mapping[Key, np.ndarray],
    rows: pd.DataFrame,
    cases: Cases,
    baselines: Mapping[str, pd.DataFrame],
    *,
    num_draws: int,
    seed: int = 0,
) -> dict[tuple[str, str], Points]:
    """Score every model on every subset, on the same draws of the complete test studies.

    Args:
        told: key -> answers, beside `rows`.
        rows: of `kerasmed.systems.lumbar.fused.asked`.
        cases: of `read`.
        baselines: of `kerasmed.systems.lumbar.grid.baselines`, of the test part; they do not depend on the subset.
        num_draws, seed: of the bootstrap over studies.

    Returns:
        dict (metric, condition or `ALL`) -> points.

    Raises:
        ValueError: no test study has all modalities.
    """
    places = _asked(rows, TEST)
    if not places:
        raise ValueError(
            "no test study has all modalities, so nothing can be hidden from one; the report card needs some."
        )
    studies = rows["study"].to_numpy()[places[WHOLE]]
    y = cases.found.studies[list(TARGETS)].to_numpy(float)[studies]
    ids = cases.found.studies["study_id"].to_numpy(str)[studies]
    found: dict[tuple[str, str], dict] = {}
    for condition in CONDITIONS:
        grid = {(*key, name): _flat(each[at], condition) for key, each in told.items() for name, at in places.items()}
        groups, graded = np.repeat(ids, len(_COLUMNS[condition])), _flat(y, condition)
        grid |= {name: _flat(_array(table, cases)[studies], condition) for name, table in baselines.items()}
        drawn = grades.draws(grid, graded, groups, num_draws=num_draws, seed=seed)
        found |= {(metric, condition): drawn[metric] for metric in METRICS}
    for metric in METRICS:
        each = [found[metric, condition] for condition in CONDITIONS]
        found[metric, ALL] = {
            key: tuple(np.mean([points[key][place] for points in each], axis=0) for place in (0, 1)) for key in each[0]
        }
    return found


def _array(table: pd.DataFrame, cases: Cases) -> np.ndarray:
    """Answers in rows -> (num_studies, 25, 3); even shares where there is no row, whose grade is blank."""
    told = np.full((len(cases.found.studies), len(TARGETS), _NUM_GRADES), 1 / _NUM_GRADES)
    study = pd.Series(np.arange(len(told)), index=cases.found.studies["study_id"])[table["study_id"]]
    place = [_PLACE[where] for where in zip(table["condition"], table["side"], table["level"])]
    told[study, place] = table[[f"p_{name}" for name in data.GRADES]]
    return told


def table(scored: Mapping[tuple[str, str], Points]) -> pd.DataFrame:
    """Lay the report card out as one tidy table.

    Returns:
        DataFrame, a row a metric, condition, model and subset: metric, condition, variant, FACTORS (empty for a
        baseline), modalities ("any" for a baseline), value, low, high, and difference, difference_low, difference_high:
        to zero filling of the same architecture and modality dropout; NaN there and in baselines.
    """
    records = []
    for (metric, condition), points in scored.items():
        for key, (value, draws) in points.items():
            baseline = isinstance(key, str)
            named = (
                dict.fromkeys((*FACTORS, "modalities"), "") if baseline else dict(zip((*FACTORS, "modalities"), key))
            )
            record = {"metric": metric, "condition": condition, "variant": key if baseline else " ".join(key[:3])}
            record |= named | ({"modalities": "any"} if baseline else {}) | _with_ends("", value, draws)
            against = None if baseline or key[1] == REFERENCE else points[(key[0], REFERENCE, *key[2:])]
            gap = (np.nan, None) if against is None else (value - against[0], draws - against[1])
            records.append(record | _with_ends("difference", *gap))
    return pd.DataFrame(records)


def _with_ends(name, value, draws) -> dict:
    low, high = (np.nan, np.nan) if draws is None else metrics.interval(draws) or (np.nan, np.nan)
    ends = f"{name}_" if name else ""
    return {name or "value": value, f"{ends}low": low, f"{ends}high": high}


def drawn(card: pd.DataFrame, *, metric: str, architecture: str, condition: str = ALL) -> pd.DataFrame:
    """Pick what `kerasmed.modality_plots.report_card` draws of a `table`: the models of an architecture."""
    wanted = {"metric": metric, "condition": condition, "architecture": architecture}
    chosen = card[(card[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    hidden = chosen["modality_dropout"].map(lambda rate: "" if rate == "0" else f", dropout {rate}")
    return chosen.assign(column=chosen["strategy"] + hidden)


def contrasts(scored: Mapping[tuple[str, str], Points], *, metric: str, condition: str = ALL) -> pd.DataFrame:
    """Compare every strategy with zero filling where something is missing, and where all is there.

    The former is the mean over the six subsets that lack something. Each is compared with zero filling of the same
    architecture and modality dropout; zero filling with modality dropout is compared with that without, if there is.
    What a strategy gains where all is there has nothing to do with coping: the difference of the two is told as well.

    Returns:
        DataFrame, a row a comparison and where: architecture, modality_dropout, strategy, against, where
        (`SOME_MISSING`, `ALL_THERE` or `COPING`: the former less the latter), difference, low, high, and better: 1
        where the interval is on the better side of 0, -1 where it is on the other, 0 where it holds 0. Where grades of
        one kind alone leave a metric undefined, numbers are NaN.
    """
    points = scored[metric, condition]
    keys = list(dict.fromkeys(key[:3] for key in points if not isinstance(key, str)))
    sign, records = -1 if metric in metrics.LOWER_IS_BETTER else 1, []
    for architecture, strategy, rate in keys:
        key, rival, against = (architecture, strategy, rate), (architecture, REFERENCE, rate), REFERENCE
        if strategy == REFERENCE:
            rival, against = (architecture, REFERENCE, "0"), f"{REFERENCE}, no modality dropout"
        if rival not in keys or rival == key:
            continue
        some, whole = (
            [np.mean([points[*key, name][i] - points[*rival, name][i] for name in names], axis=0) for i in (0, 1)]
            for names in (PARTIAL, [WHOLE])
        )
        coping = [some[0] - whole[0], some[1] - whole[1]]
        for where, (value, draws) in ((SOME_MISSING, some), (ALL_THERE, whole), (COPING, coping)):
            low, high = metrics.interval(draws) or (np.nan, np.nan)
            better = sign * (int(low > 0) - int(high < 0))
            named = {"architecture": architecture, "modality_dropout": rate, "strategy": strategy}
            gap = {"difference": float(value), "low": low, "high": high, "better": better}
            records.append({**named, "against": against, "where": where, **gap})
    names = ["architecture", "modality_dropout", "strategy", "against", "where", "difference", "low", "high", "better"]
    return pd.DataFrame(records, columns=names)


def shown(compared: pd.DataFrame) -> pd.DataFrame:
    """Lay `contrasts` out for reading: a row a model, a column where, "*" beside intervals that do not hold 0."""
    text = [
        f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]{' *' if row.better else ''}"
        for row in compared.itertuples()
    ]
    index = ["architecture", "modality_dropout", "strategy", "against"]
    table = compared.assign(text=text).pivot(index=index, columns="where", values="text")
    order = compared.drop_duplicates(index).set_index(index).index
    return table.reindex(index=order, columns=list(WHERE)).rename_axis(columns=None)


def verdict(compared: pd.DataFrame) -> list[str]:
    """Say in a sentence for each strategy how it does beside zero filling: where something is missing, and where not.

    Models are named by architecture and modality dropout; zero filling with modality dropout is left to the table.
    """
    words = {1: "better", 0: "not told apart", -1: "worse"}
    sentences = []
    for strategy in dict.fromkeys(compared.loc[compared["strategy"] != REFERENCE, "strategy"]):
        rows = compared[compared["strategy"] == strategy]
        signs = rows.set_index(["architecture", "modality_dropout", "where"])["better"].unstack("where")[list(WHERE)]
        models = pd.Series([" ".join(name) for name in signs.index], index=signs.index)
        parts = []
        for some, whole in product((1, 0, -1), repeat=2):
            among = models[(signs[SOME_MISSING] == some) & (signs[ALL_THERE] == whole)]
            if len(among):
                where = f"{words[some]} where something is missing, {words[whole]} where all is there"
                parts.append(f"{where} ({', '.join(among)})")
        gains = models[(signs[COPING] > 0) & (signs[SOME_MISSING] > 0)]  # not where it merely loses less
        gained = f"; gains more where something is missing than where not: {', '.join(gains)}" if len(gains) else ""
        sentences.append(f"{strategy} beside zero filling: {'; '.join(parts)}{gained}.")
    return sentences


def beyond(card: pd.DataFrame, *, metric: str, condition: str = ALL) -> tuple[str, float, list[str]]:
    """Find the strongest baseline of a `table`, and what does worse: "<model> on <subset>", the worst first.

    Returns:
        Its name, its value, and the list.
    """
    lower = metric in metrics.LOWER_IS_BETTER
    rows = card[(card["metric"] == metric) & (card["condition"] == condition)]
    rows = rows.assign(loss=rows["value"] if lower else -rows["value"])
    baselines, models = rows[rows["modalities"] == "any"], rows[rows["modalities"] != "any"]
    best = baselines.loc[baselines["loss"].idxmin()]
    worse = models[models["loss"] > best["loss"]].sort_values("loss", ascending=False, kind="stable")
    return best["variant"], float(best["value"]), (worse["variant"] + " on " + worse["modalities"]).tolist()


def refuse_too_few(rows: pd.DataFrame, cases: Cases) -> None:
    """Raise ValueError where a report card could not be made, before any training.

    Training, validation and test each need a study that has all modalities, and of such validation and test studies
    each condition needs known grades of two kinds.
    """
    for split in ("train", "valid", TEST):
        complete = rows[(rows["split"] == split) & rows["complete"] & rows["as_is"]]["study"].to_numpy()
        graded = data.long(cases.found.studies.iloc[complete]).dropna(subset="grade")
        kinds = graded.groupby("condition")["grade"].nunique().reindex(list(CONDITIONS), fill_value=0)
        few = [] if split == "train" else kinds.index[kinds < 2].tolist()
        if not len(complete) or few:
            raise ValueError(
                f"{len(complete)} {split} studies have all of {', '.join(data.MODALITIES)}"
                f"{f', with grades of fewer than two kinds of {few}' if len(complete) else ''}; the report card hides "
                "modalities of such studies, so some are needed in training, validation and test. Run "
                f"{fused.ORIGIN} on more studies, or with another `seed`."
            )


def validation_losses(told: Mapping[Key, np.ndarray], rows: pd.DataFrame, cases: Cases) -> pd.Series:
    """Return each model's weighted log loss on complete validation studies, the mean over subsets and conditions.

    Raises:
        ValueError: no validation study has all modalities.
    """
    places = _asked(rows, "valid")
    if not places:
        raise ValueError(
            "no validation study has all modalities, so no model can be chosen by how it does without some."
        )
    y = cases.found.studies[list(TARGETS)].to_numpy(float)[rows["study"].to_numpy()[places[WHOLE]]]
    means = {}
    for key, each in told.items():
        parts = [
            grades.weighted_log_loss(_flat(y, condition), _flat(each[at], condition))
            for at in places.values()
            for condition in CONDITIONS
        ]
        means[key] = np.mean(parts)
    return pd.Series(means).rename_axis(FACTORS).rename("weighted_log_loss")


def weights_of(model: keras.Model, rows: pd.DataFrame, cases: Cases) -> pd.DataFrame:
    """Return the mean weight that "dynamic" gives each modality on complete test studies, by subset shown and group.

    Returns:
        DataFrame: modalities, group, modality, weight; a missing modality has 0.
    """
    asked = rows[(rows["split"] == TEST) & rows["complete"]].reset_index(drop=True)
    weights = fused.answer(modalities.strategy_parts(model), cases, asked)["coped"]
    groups = list(fused.GROUPS) if weights.shape[1] > 1 else ["all targets"]
    found = []
    for name, of_subset in asked.groupby("modalities", sort=False):
        means = weights[of_subset.index].mean(axis=0)
        for group, of_group in zip(groups, means):
            for modality, weight in zip(SHORT.values(), of_group):
                found.append({"modalities": name, "group": group, "modality": modality, "weight": weight})
    return pd.DataFrame(found)


def explained(model: keras.Model, rows: pd.DataFrame, cases: Cases) -> pd.DataFrame:
    """Return how much of a hidden modality's vector "pseudo" predicts, of complete test studies.

    1 - squared error / squared distance to the mean, which is that of the training studies.

    Returns:
        DataFrame: seen (the subset), predicted (the modality), explained: 1 perfect, 0 no better than the mean, NaN
        where no training study is complete, so that nothing could be learnt.
    """
    parts = modalities.strategy_parts(model)
    learnt = rows[(rows["split"] == "train") & rows["as_is"] & rows["complete"]].reset_index(drop=True)
    means = fused.answer(parts, cases, learnt)["vectors"].mean(axis=0) if len(learnt) else np.full(len(SHORT), np.nan)
    asked = rows[(rows["split"] == TEST) & rows["complete"]].reset_index(drop=True)
    told = fused.answer(parts, cases, asked)
    own = told["vectors"][asked.index[asked["modalities"] == WHOLE]]
    found = []
    for name, shown_ in fused.subsets().items():
        coped = told["coped"][asked.index[asked["modalities"] == name]]
        for place in np.flatnonzero(~shown_):
            error = ((coped[:, place] - own[:, place]) ** 2).sum()
            share = 1 - error / ((own[:, place] - means[place]) ** 2).sum()
            found.append({"seen": name, "predicted": list(SHORT.values())[place], "explained": float(share)})
    return pd.DataFrame(found)
