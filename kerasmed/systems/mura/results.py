"""Notebook 06_mura_densenet: choice, scores of images and studies, explanations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from kerasmed import datasets, gradcam, localisation, metrics, multilabel, pipelines, runs, studies
from kerasmed.datasets import mura as data
from kerasmed.manifest import targets
from kerasmed.systems.mura.networks import CLASS_NAMES, LABEL, Config
from kerasmed.training import Trained

IMAGES, STUDIES = "images", "studies"  # the two levels of the rows
AT_HALF = ("f1", "kappa", "sensitivity", "specificity")  # given at threshold 0.5, as published, as well
# Over all types, on a hidden test set of 207 studies: no figure of this repository is on those.
# Source: Rajpurkar et al. 2018, arXiv:1712.06957.
PUBLISHED = {
    "auroc": {"paper's ensemble": 0.929},
    "kappa_at_half": {
        "paper's ensemble": 0.705,
        "radiologist 1": 0.731,
        "radiologist 2": 0.763,
        "radiologist 3": 0.778,
    },
    "sensitivity_at_half": {"paper's ensemble": 0.815},
    "specificity_at_half": {"paper's ensemble": 0.887},
}


def validation_auroc(table: pd.DataFrame) -> float:
    """AUROC of the validation studies: what models are chosen by."""
    return multilabel.mean_score(studies.predictions(table, CLASS_NAMES), CLASS_NAMES, split="valid", metric="auroc")


def choose(candidates: Sequence[Trained]) -> Trained:
    """Choose the model for all types of the best AUROC of validation studies; test studies have no say.

    Experts are no candidates: whoever asks about one image need not know its study type.
    """
    return max(candidates, key=lambda each: validation_auroc(each.predictions))


def type_share(manifest: pd.DataFrame) -> multilabel.Answer:
    """Baseline: answer each test row with the share of abnormal training rows of its study type."""
    learnt, tested = (manifest[manifest["split"] == name] for name in ("train", "test"))
    shares = tested["body_part"].map(learnt.groupby("body_part")[LABEL].mean()).fillna(learnt[LABEL].mean())
    return multilabel.Answer(shares.to_numpy(float)[:, None], np.full(1, 0.5))


def evaluate(config: Config, tables: Mapping[str, pd.DataFrame], store: pipelines.Store, *, reference=None) -> list:
    """Score the test images and the test studies, all and by study type, with intervals over patients.

    Args:
        config: `bootstraps` is used.
        tables: variant -> predictions of every image.
        store: of `split`.
        reference: as in `kerasmed.multilabel.evaluate`.

    Returns:
        Rows of `kerasmed.multilabel.rows`: of task "images", and of task "studies", whose thresholds are tuned on the
        validation studies and whose nearest neighbour is the mean of its images' neighbours.
    """
    learnt, tested = (pipelines.rows(store, name) for name in ("train", "test"))
    y = targets(store.manifest, CLASS_NAMES)
    thumbnails = store.thumbnails[learnt], store.thumbnails[tested]
    neighbour = multilabel.baselines(y[learnt], len(tested), *thumbnails)[metrics.NEAREST_NEIGHBOUR]
    of_study = studies.study_probability(neighbour.probabilities[:, 0], store.manifest["study_id"].to_numpy()[tested])
    rows = []
    for task, table, told, neighbours in (
        (IMAGES, store.manifest, dict(tables), neighbour.probabilities),
        (
            STUDIES,
            studies.table(store.manifest, CLASS_NAMES),
            {name: studies.predictions(each, CLASS_NAMES) for name, each in tables.items()},
            of_study.to_numpy()[:, None],
        ),
    ):
        extra = {
            metrics.TYPE_SHARE: type_share(table),
            metrics.NEAREST_NEIGHBOUR: multilabel.Answer(neighbours, neighbour.thresholds),
        }
        rows += multilabel.evaluate(
            told,
            table,
            None,
            CLASS_NAMES,
            task=task,
            subsets=subsets(table),
            extra=extra,
            at_half=AT_HALF,
            reference=reference,
            num_draws=config.bootstraps,
        )
    return rows


def subsets(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Masks of all rows, and of each study type that test rows have: "test", "test, XR_ELBOW", ..."""
    types = sorted(table.loc[table["split"] == "test", "body_part"].unique())
    return {"test": np.ones(len(table), bool)} | {
        f"test, {name}": (table["body_part"] == name).to_numpy() for name in types
    }


def _drawn_auroc(config: Config, table: pd.DataFrame, split: str) -> tuple[float, np.ndarray]:
    """AUROC of a split's rows, and of its bootstrap draws: equal for tables of equal patients, at either level."""
    among = table[table["split"] == split]
    truth, told = (among[f"{letter}_{LABEL}"].to_numpy(float) for letter in "yp")
    draws = metrics.bootstrap_weights(among["group_id"], num_draws=config.bootstraps)
    value, *spread = metrics.auroc(truth == 1, told, np.vstack([np.ones(len(among)), draws]))
    return float(value), np.array(spread)


def validation(config: Config, trained: Mapping[str, Trained], chosen: str) -> pd.DataFrame:
    """AUROC of the validation studies with its 95 % interval, and the difference to the chosen on the same draws.

    Returns:
        DataFrame indexed by variant, best first: auroc, low, high, difference, difference_low, difference_high.
    """
    tables = {name: studies.predictions(each.predictions, CLASS_NAMES) for name, each in trained.items()}
    found = {name: _drawn_auroc(config, table, "valid") for name, table in tables.items()}
    rows = {}
    for name, (value, spread) in found.items():
        ends, apart = metrics.interval(spread), metrics.interval(spread - found[chosen][1])
        rows[name] = [value, *(ends or [np.nan] * 2), value - found[chosen][0], *(apart or [np.nan] * 2)]
    columns = ["auroc", "low", "high", "difference", "difference_low", "difference_high"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).sort_values("auroc", ascending=False, kind="stable")


def gain_of_studies(config: Config, chosen: Trained) -> dict:
    """How much better test studies are told than test images: the difference of AUROC on the same draws of patients.

    Returns:
        A row as of `kerasmed.metrics.multiclass_rows`, of metric "auroc_gain": the studies' AUROC less the images'.
    """
    of_studies = studies.predictions(chosen.predictions, CLASS_NAMES)
    (images, image_draws), (judged, study_draws) = (
        _drawn_auroc(config, each, "test") for each in (chosen.predictions, of_studies)
    )
    tested = of_studies[of_studies["split"] == "test"]
    return {
        "task": STUDIES,
        "split": "test",
        "n": len(tested),
        "n_groups": tested["group_id"].nunique(),
        "variant": chosen.variant,
        "metric": "auroc_gain",
        "label": LABEL,
        "value": judged - images,
        "ci95": metrics.interval(study_draws - image_draws),
        "baseline": None,
    }


def headline(rows: Sequence[Mapping], *, variant: str) -> list[Mapping]:
    """Pick the rows that answer the notebook's question: AUROC and kappa at 0.5 of all test studies."""
    asked = ("auroc", "kappa_at_half")
    return multilabel.headline(rows, task=STUDIES, variant=variant, metrics=asked, label=LABEL)


def promote(config: Config, run: Path, chosen: Trained, members: Sequence[Trained]) -> dict:
    """Copy the chosen models up, the first to `model.keras`, and write to answers.json what `predict` must know.

    Args:
        config: how images are read, and whether both orientations are asked.
        run: the run folder.
        chosen: of `choose`.
        members: the trainings that it is the mean of; itself where it is one model.

    Returns:
        {"variant", "models": file names, "threshold": of studies, tuned on validation, "flips_at_test", "read"}.
    """
    names = ["model", *(f"model-{number}" for number in range(2, len(members) + 1))]
    for name, member in zip(names, members):
        runs.promote(run, member.folder, name)
    threshold = multilabel.thresholds(studies.predictions(chosen.predictions, CLASS_NAMES), CLASS_NAMES)
    content = {
        "variant": chosen.variant,
        "models": [f"{name}.keras" for name in names],
        "threshold": float(threshold[0]),
        "flips_at_test": config.flips_at_test,
        "read": {name: getattr(config, name) for name in ("image_size", "fit", "interpolation", "equalize")},
    }
    runs.write_json(run / "answers.json", content)
    return content


def surest(table: pd.DataFrame) -> pd.DataFrame:
    """Of each study type the surest abnormal test study of several images, its most and its least suspicious image.

    Args:
        table: predictions of images.

    Returns:
        DataFrame, most suspicious images of all types first: row (of the table), body_part, study (the study's
        probability) and p (the image's). Where all are of one image, the surest of them stands twice.
    """
    tested = table[(table["split"] == "test") & (table[f"y_{LABEL}"] == 1)]
    told = tested.groupby("study_id")[f"p_{LABEL}"].agg(["mean", "size"])
    told = told.assign(body_part=told.index.str.split("/").str[0], several=told["size"] > 1)
    best = told.sort_values(["several", "mean"], ascending=False, kind="stable").groupby("body_part").head(1)
    shown = tested[tested["study_id"].isin(best.index)].sort_values(f"p_{LABEL}", ascending=False, kind="stable")
    by_study = shown.groupby("study_id")
    ends = pd.concat([by_study.head(1).sort_values("study_id"), by_study.tail(1).sort_values("study_id")])
    columns = {"body_part": ends["study_id"].str.split("/").str[0], "study": ends["study_id"].map(told["mean"])}
    return (
        ends.rename_axis("row")
        .reset_index()[["row"]]
        .assign(**{name: values.to_numpy() for name, values in columns.items()}, p=ends[f"p_{LABEL}"].to_numpy())
    )


def boxes_of(store: pipelines.Store, source: datasets.Source) -> pd.DataFrame:
    """Boxes of the signs drawn into abnormal test images of a synthetic set, in pixels of the store's images.

    Returns:
        DataFrame: row (of the store), label (the sign), x, y, width, height; empty for real data, which have none.
    """
    corners = ["x", "y", "width", "height"]
    if source.kind != "synthetic":
        return pd.DataFrame(columns=["row", "label", *corners])
    truth = pd.read_csv(
        data.folder(source.root) / "truth.csv", keep_default_na=False, na_values={c: "" for c in corners}
    )
    rows = pd.Series(np.arange(len(store.manifest)), index=store.manifest["image_path"].to_numpy())
    asked = (store.manifest["split"] == "test") & (store.manifest[LABEL] == 1)
    found = truth.assign(row=truth["image_path"].map(rows)).dropna(subset=["row", *corners]).astype({"row": int})
    found = found[asked.to_numpy()[found["row"]]].reset_index(drop=True)
    sizes = store.facts[["height", "width"]].to_numpy()[found["row"]]
    found[corners] = localisation.scale_boxes(found[corners].to_numpy(float), sizes, store.images.shape[1:])
    return found.rename(columns={"sign": "label"})[["row", "label", *corners]]


def cam_health(
    config: Config, model: keras.Model, store: pipelines.Store, boxes: pd.DataFrame, *, variant: str
) -> list:
    """Explain at most `cam_images` abnormal test images, and tabulate how the maps fare, and against boxes if any.

    Args:
        config: `cam_images`, `bootstraps` and `seed` are used.
        model: flat, such as loaded from `model.keras`.
        store: of `split`.
        boxes: of `boxes_of`; where empty, maps of abnormal test images are counted as alive or dead.
        variant: whose model, for the rows.

    Returns:
        Rows of `kerasmed.localisation.summary`, by sign or by study type.
    """
    abnormal = (store.manifest["split"] == "test") & (store.manifest[LABEL] == 1)
    unboxed = pd.DataFrame({"row": np.flatnonzero(abnormal), "label": store.manifest.loc[abnormal, "body_part"]})
    pairs = boxes if len(boxes) else unboxed
    drawn = np.random.default_rng(config.seed).permutation(len(pairs))[: config.cam_images]
    pairs = pairs.iloc[np.sort(drawn)]
    rows = pairs["row"].to_numpy()
    maps = gradcam.build(model)(store.images[rows], 0)
    corners = pairs[["x", "y", "width", "height"]].to_numpy() if len(boxes) else None
    table = localisation.table(maps.heat, maps.status, pairs["label"], corners, store.images.shape[1:])
    groups = store.manifest["group_id"].to_numpy()[rows]
    options = {"task": IMAGES, "variant": variant, "num_draws": config.bootstraps}
    return localisation.summary(table, groups, **options)
