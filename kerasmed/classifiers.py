"""Classifiers that need no Keras: baselines on pixels and tables, and the five that are compared on embeddings."""

import importlib
import warnings
from collections.abc import Sequence

import joblib
import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.utils.class_weight import compute_sample_weight
from threadpoolctl import threadpool_limits

from kerasmed import splits
from kerasmed.audit import likeness

NAMES = ("svc", "lightgbm", "xgboost", "bagging", "dense")
SAMPLINGS = ("none", "weighted", "smote", "smote_under")
_NEIGHBOURS = 5
_SVC_C = 0.001  # rows of one study are much alike: of 1 to 0.0001, the best or next to it at 2,400 and 15,000 rows
_INNER_FOLDS = 5
_TREES, _RATE, _LEAVES, _DEPTH = 100, 0.1, 31, 6
_BINS = 63  # half the time of 255, and no worse on standardised embeddings
_BAGS, _BAG_SHARE = 10, 0.8
_HIDDEN, _EPOCHS, _BATCH = (256, 128, 64), 20, 128
_MENDS = {
    "lightgbm": "`pip install lightgbm`, and the system's libgomp1 (Debian: `apt install libgomp1`)",
    "xgboost": "`pip install xgboost-cpu`",
    "imblearn": "`pip install imbalanced-learn`",
}


def fit_predict(
    name: str,
    sampling: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    groups_train: Sequence,
    x_rows: np.ndarray,
    *,
    categorical: Sequence[int] = (),
    num_classes: int = 3,
    seed: int = 0,
    jobs: int = 1,
) -> np.ndarray:
    """Fit a classifier on training rows and tell the class probabilities of others.

    Columns are standardised by the training rows, one-hot columns left at 0 and 1. No figure of `x_rows` goes into
    anything that is fitted.

    * svc: linear support vector machine (squared hinge, C = 0.001), calibrated by Platt's sigmoid, class by class, on
      scores of five inner folds grouped by `groups_train`. Sampling is inside the folds: the sigmoid is fitted to rows
      as they are, so that the probabilities keep the training rows' class shares under every sampling.
    * lightgbm: 100 rounds at rate 0.1, 31 leaves a tree. xgboost: 100 rounds at rate 0.1, depth 6. Both with 63 bins.
    * bagging: the mean of ten XGBoost of 100 rounds, depth 1, rate 0.3 (the library's), each on 0.8 of the groups,
      drawn without replacement, and 0.8 of the columns. A class that a draw leaves out gets all its rows back. Sampling
      comes after the draw.
    * dense: layers of 256, 128 and 64 units, ReLU, Adam at rate 0.001, 20 epochs of batches of 128.

    Args:
        name: one of `NAMES`.
        sampling: one of `SAMPLINGS`; "weighted" weighs each row in the loss by num_rows / (number of classes present ·
            rows of its class); "smote" and "smote_under" as in `resample`.
        x_train: float array, shape (num_train, num_columns).
        y_train: int array, shape (num_train,), classes 0 to num_classes - 1.
        groups_train: shape (num_train,): what must not be cut by inner folds, such as the study.
        x_rows: float array, shape (num_rows, num_columns), to answer.
        categorical: places of the one-hot columns.
        num_classes: how many classes there are.
        seed: of draws and starts; with `jobs` it fixes the result.
        jobs: threads.

    Returns:
        float64 array, shape (num_rows, num_classes), rows sum to 1. A class that training rows do not have gets 0;
        where they have but one, that gets 1.

    Raises:
        ValueError: unknown name or sampling, shapes that differ, no training row, missing or infinite values, labels
            out of range, one-hot columns of other values than 0 and 1, or svc with fewer than three groups.
        ImportError: a library is not installed.
    """
    _check_choice("name", name, NAMES)
    _check_choice("sampling", sampling, SAMPLINGS)
    x_train, x_rows, y_train, groups = _checked(x_train, x_rows, y_train, groups_train, num_classes)
    categorical = _check_one_hot(x_train, categorical)
    classes, y = np.unique(y_train, return_inverse=True)
    told = np.zeros((len(x_rows), num_classes))
    if len(classes) == 1 or not len(x_rows):
        told[:, classes[:1]] = 1
        return told
    scaler = StandardScaler().fit(x_train)
    scaler.mean_[categorical], scaler.scale_[categorical] = 0, 1
    x, asked = (scaler.transform(values).astype(np.float32) for values in (x_train, x_rows))
    options = {"sampling": sampling, "categorical": categorical, "seed": seed}
    with threadpool_limits(jobs):
        told[:, classes] = _ANSWERS[name](x, y, groups, asked, options, jobs)
    return told / told.sum(axis=1, keepdims=True)


def resample(
    x: np.ndarray, y: np.ndarray, sampling: str, *, categorical: Sequence[int] = (), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Even out the classes of training rows.

    SMOTE puts new rows of a class at random places between one of its rows and one of that row's 5 nearest neighbours
    in the class; n - 1 where the rarest class to be lifted has n < 6 rows. A class of one row has no neighbours: the
    row is repeated. One-hot columns of a new row are those of the nearer of its two parents.

    * "none" and "weighted": rows as they are ("weighted" is a matter of the loss).
    * "smote": every class gets as many rows as the largest has.
    * "smote_under": SMOTE lifts classes below half of the largest to that half (rounded down); then rows are drawn
      without replacement from each larger class, as many as the smallest now has.

    Distances are Euclidean: give columns of one scale. Where rows share an embedding, as rows of a study do, they are
    one another's nearest neighbours, and new rows are little more than repetitions.

    Args:
        x: float array, shape (num_rows, num_columns).
        y: int array, shape (num_rows,).
        sampling: one of `SAMPLINGS`.
        categorical: places of one-hot columns, of 0 and 1 only.
        seed: of the draws.

    Returns:
        x and y; given rows come first where none is left out.

    Raises:
        ValueError: unknown sampling, missing values, or one-hot columns of other values than 0 and 1.
        ImportError: imbalanced-learn is not installed.

    Example:
        >>> x, y = np.arange(22.0).reshape(11, 2), np.array([0] * 8 + [1] * 2 + [2])
        >>> [np.bincount(resample(x, y, sampling)[1]).tolist() for sampling in SAMPLINGS]
        [[8, 2, 1], [8, 2, 1], [8, 8, 8], [4, 4, 4]]

    Source: Chawla et al. 2002, SMOTE, doi:10.1613/jair.953, which undersamples the largest class before.
    """
    _check_choice("sampling", sampling, SAMPLINGS)
    counts = dict(zip(*np.unique(y, return_counts=True)))
    if sampling in ("none", "weighted") or len(counts) < 2:
        return x, y
    _check_known("x", x)
    categorical = _check_one_hot(x, categorical)
    over_sampling, under_sampling = (_load("imblearn", part) for part in ("over_sampling", "under_sampling"))
    num_given, largest = len(x), max(counts.values())
    target = largest if sampling == "smote" else largest // 2
    between = {label: target for label, count in counts.items() if 1 < count < target}
    if between:
        neighbours = min(_NEIGHBOURS, min(counts[label] for label in between) - 1)
        smote = over_sampling.SMOTE(sampling_strategy=between, k_neighbors=neighbours, random_state=seed)
        x, y = smote.fit_resample(x, y)
        # A one-hot column of a new row says how near it is to which parent: 0.3 is 30 % of the way from a 0 to a 1.
        x[num_given:, categorical] = x[num_given:, categorical] > 0.5
    repeated = {label: target for label, count in counts.items() if count == 1 < target}
    if repeated:
        x, y = over_sampling.RandomOverSampler(sampling_strategy=repeated, random_state=seed).fit_resample(x, y)
    if sampling == "smote_under":
        x, y = under_sampling.RandomUnderSampler(random_state=seed).fit_resample(x, y)
    return x, y


def svc_on_pixels(
    thumbnails: np.ndarray, y: np.ndarray, queries: np.ndarray, *, max_images: int = 3000, seed: int = 0
) -> np.ndarray:
    """Baseline: learn each label with a support vector machine on pixels, and answer other images.

    The pixels of thumbnails at half their side, standardised; radial kernel, C = 1, gamma "scale"; probabilities by
    Platt's sigmoid on scores of five folds.

    Args:
        thumbnails: uint8 array, shape (num_images, 64, 64), to learn from.
        y: float array, shape (num_images, num_labels): 1, 0 or NaN (left out of that label).
        queries: uint8 array, shape (num_queries, 64, 64).
        max_images: learn from at most so many, drawn at random: time grows with their square.
        seed: of the draw and of the folds.

    Returns:
        float array, shape (num_queries, num_labels). A label of fewer than 5 images of either kind gets its share.
    """
    drawn = np.random.default_rng(seed).permutation(len(y))[:max_images]
    x, answered = (_flat(images) for images in (thumbnails[np.sort(drawn)], queries))
    told = np.zeros((len(queries), y.shape[1]))
    for position, label in enumerate(y[np.sort(drawn)].T):
        known = np.isfinite(label)
        counts = np.bincount(label[known].astype(int), minlength=2)
        if counts.min() < 5:
            told[:, position] = counts[1] / max(counts.sum(), 1)
            continue
        parts = StratifiedKFold(5, shuffle=True, random_state=seed)
        machine = CalibratedClassifierCV(make_pipeline(StandardScaler(), SVC()), cv=parts, ensemble=False)
        machine.fit(x[known], label[known])
        told[:, position] = machine.predict_proba(answered)[:, 1] if len(answered) else []
    return told


def logistic_on_table(
    values_train: np.ndarray, y_train: np.ndarray, values_rows: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Baseline: learn each label by logistic regression on a table of numbers, such as age, sex and view.

    Columns are standardised over all training rows; an unknown value stands as its column's mean, and each column with
    unknown training values gets a second one that marks them, so that "unknown" is learnt and is not taken for a mean
    one. Ridge penalty, C = 1.

    Args:
        values_train: float array, shape (num_train, num_columns); NaN is unknown.
        y_train: float array, shape (num_train, num_labels): 1, 0 or NaN (left out of that label).
        values_rows: float array, shape (num_rows, num_columns), to answer.
        seed: of the solver, for those that draw; the present one, L-BFGS, does not.

    Returns:
        float64 array, shape (num_rows, num_labels): probabilities. A label of one kind only gets its share, 0 where it
        is never known.

    Raises:
        ValueError: lengths or columns differ, there is no training row, or a value is infinite.
    """
    values_train, values_rows = (np.asarray(values, np.float64) for values in (values_train, values_rows))
    if not len(values_train) or len(values_train) != len(y_train) or values_train.shape[1:] != values_rows.shape[1:]:
        raise ValueError(
            f"training values of shape {values_train.shape} beside labels of shape {np.shape(y_train)}, and other "
            f"values of shape {values_rows.shape}; expected as many training rows as labels, at least one, and the "
            "same columns."
        )
    prepare = make_pipeline(SimpleImputer(add_indicator=True, keep_empty_features=True), StandardScaler())
    x = prepare.fit_transform(values_train)
    asked = prepare.transform(values_rows) if len(values_rows) else np.zeros((0, x.shape[1]))
    told = np.zeros((len(values_rows), y_train.shape[1]))
    for position, label in enumerate(y_train.T):
        known = np.isfinite(label)
        if len(np.unique(label[known])) < 2:
            told[:, position] = label[known].mean() if known.any() else 0
        elif len(asked):
            model = LogisticRegression(max_iter=1000, random_state=seed).fit(x[known], label[known])
            told[:, position] = model.predict_proba(asked)[:, 1]
    return told


def _flat(thumbnails: np.ndarray) -> np.ndarray:
    """Halve and flatten: float32 (num_images, height / 2 · width / 2)."""
    halves = likeness.halve(thumbnails)
    return halves.reshape(len(halves), halves.shape[1] * halves.shape[2])


def _check_choice(what, value, known):
    """Refuse a name that is not known."""
    if value not in known:
        raise ValueError(f"`{what}` is {value!r}; expected one of {known}.")


def _check_known(what, x):
    """Refuse missing and infinite values, naming columns and rows."""
    wrong = ~np.isfinite(x)
    if wrong.any():
        columns, rows = (np.flatnonzero(wrong.any(axis=axis)) for axis in (0, 1))
        raise ValueError(
            f"`{what}` has {wrong.sum()} missing or infinite values, in {len(columns)} of {x.shape[1]} columns and "
            f"{len(rows)} of {len(x)} rows. Fill them first, from training rows only (`kerasmed.imputation`). First "
            f"columns: {columns[:5].tolist()}; first rows: {rows[:5].tolist()}."
        )


def _check_one_hot(x, categorical):
    """The places of one-hot columns as a list; refuse places that there are not and values other than 0 and 1."""
    categorical = [int(column) for column in categorical]
    beyond = [column for column in categorical if not 0 <= column < x.shape[1]]
    if beyond:
        raise ValueError(f"`categorical` names columns {beyond[:5]}; expected places from 0 to {x.shape[1] - 1}.")
    wrong = [column for column in categorical if not np.isin(x[:, column], (0, 1)).all()]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(categorical)} `categorical` columns have values other than 0 and 1; expected "
            f"one-hot columns. First: {wrong[:5]}."
        )
    return categorical


def _checked(x_train, x_rows, y_train, groups, num_classes):
    """Both tables, labels and groups as arrays; refuse what does not fit together."""
    x_train, x_rows = (np.asarray(x, np.float64) for x in (x_train, x_rows))
    y_train, groups = np.asarray(y_train), pd.Series(np.asarray(groups))
    if x_train.ndim != 2 or x_rows.ndim != 2 or x_train.shape[1] != x_rows.shape[1] or not len(x_train):
        raise ValueError(
            f"`x_train` has shape {x_train.shape} and `x_rows` {x_rows.shape}; expected two tables of the same "
            "columns, the first with at least one row."
        )
    if y_train.shape != (len(x_train),) or groups.shape != (len(x_train),):
        raise ValueError(
            f"`x_train` has {len(x_train)} rows, `y_train` shape {y_train.shape} and `groups_train` {groups.shape}; "
            "expected one label and one group a row."
        )
    _check_known("x_train", x_train)
    _check_known("x_rows", x_rows)
    wrong = np.flatnonzero(~np.isin(y_train, np.arange(num_classes)))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(y_train)} labels are none of 0 to {num_classes - 1}; leave rows of unknown label "
            f"out. First rows: {wrong[:5].tolist()}, labels {y_train[wrong[:5]].tolist()}."
        )
    if groups.isna().any():
        raise ValueError(
            f"{groups.isna().sum()} of {len(groups)} rows have no group; expected a study or patient a row."
        )
    return x_train, x_rows, y_train.astype(int), groups.astype(str).to_numpy()


def _load(module, part=""):
    """Import a library that only some classifiers need."""
    try:
        return importlib.import_module(f"{module}.{part}" if part else module)
    except (ImportError, OSError) as error:  # a missing system library is an OSError
        raise ImportError(f"{module} cannot be loaded ({error}). It needs {_MENDS[module]}.") from error


def _weights(y, sampling):
    """Weights of rows in the loss, None where they are alike."""
    return compute_sample_weight("balanced", y) if sampling == "weighted" else None


def _inner_folds(y, groups, seed):
    """Pairs of training and held-out rows, cut by group, every class in each training part."""
    if len(np.unique(groups)) < 3 or np.bincount(y).max() < 2:
        raise ValueError(
            f"{len(np.unique(groups))} groups of {len(y)} training rows; a calibrated svc needs at least 3 groups, "
            "and a class of at least 2 rows, for its inner folds. Add data or take another classifier."
        )
    classes = range(y.max() + 1)
    rows = pd.DataFrame({"group_id": groups} | {str(label): y == label for label in classes})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        fold = splits.folds(rows, [str(label) for label in classes], num_folds=_INNER_FOLDS, seed=seed)
    pairs = []
    for number in range(fold.max() + 1):
        learnt = fold != number
        # A class of which all rows are held out cannot be scored. Its rows are learnt as well as held out: their
        # scores are too good, but the class keeps a probability.
        lacking = np.setdiff1d(classes, y[learnt])
        pairs.append((np.flatnonzero(learnt | np.isin(y, lacking)), np.flatnonzero(fold == number)))
    return pairs


def _svc(x, y, groups, asked, options, jobs):
    """Probabilities of a calibrated linear support vector machine."""
    machine = LinearSVC(C=_SVC_C, dual=False, class_weight="balanced" if options["sampling"] == "weighted" else None)
    if options["sampling"].startswith("smote"):
        sampler = _load("imblearn").FunctionSampler(func=resample, kw_args=options, validate=False)
        machine = _load("imblearn", "pipeline").make_pipeline(sampler, machine)
    calibrated = CalibratedClassifierCV(machine, cv=_inner_folds(y, groups, options["seed"]), ensemble=False)
    with joblib.parallel_config("threading", n_jobs=jobs):
        return calibrated.fit(x, y).predict_proba(asked)


def _lightgbm(x, y, groups, asked, options, jobs):
    """Probabilities of gradient boosted trees that grow by leaves."""
    model = _load("lightgbm").LGBMClassifier(
        n_estimators=_TREES,
        learning_rate=_RATE,
        num_leaves=_LEAVES,
        max_bin=_BINS,
        random_state=options["seed"],
        deterministic=True,
        force_col_wise=True,  # else it times both ways, and takes the quicker
        n_jobs=jobs,
        verbose=-1,
    )
    x, y = resample(x, y, **options)
    return model.fit(x, y, sample_weight=_weights(y, options["sampling"])).predict_proba(asked)


def _xgboost(x, y, groups, asked, options, jobs, depth=_DEPTH, rate=_RATE):
    """Probabilities of gradient boosted trees that grow by levels."""
    model = _load("xgboost").XGBClassifier(
        n_estimators=_TREES,
        learning_rate=rate,
        max_depth=depth,
        max_bin=_BINS,
        tree_method="hist",
        random_state=options["seed"],
        n_jobs=jobs,
    )
    x, y = resample(x, y, **options)
    return model.fit(x, y, sample_weight=_weights(y, options["sampling"])).predict_proba(asked)


def _bagging(x, y, groups, asked, options, jobs):
    """Mean probabilities of boosted stumps, each of other groups and columns."""
    rng = np.random.default_rng(options["seed"])
    names = np.unique(groups)
    told = 0
    for _ in range(_BAGS):
        rows = np.isin(groups, rng.permutation(names)[: int(np.ceil(_BAG_SHARE * len(names)))])
        rows |= np.isin(y, np.setdiff1d(y, y[rows]))
        columns = np.sort(rng.permutation(x.shape[1])[: int(np.ceil(_BAG_SHARE * x.shape[1]))])
        places = {"categorical": np.flatnonzero(np.isin(columns, options["categorical"]))}
        part = (x[np.ix_(rows, columns)], y[rows], groups[rows], asked[:, columns])
        told = told + _xgboost(*part, options | places, jobs, depth=1, rate=0.3).astype(np.float64) / _BAGS
    return told


def _dense(x, y, groups, asked, options, jobs):
    """Probabilities of a network of three hidden layers."""
    x, y = resample(x, y, **options)
    network = MLPClassifier(
        _HIDDEN,
        max_iter=_EPOCHS,
        n_iter_no_change=_EPOCHS,
        batch_size=min(_BATCH, len(x)),
        random_state=options["seed"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is fixed
        network.fit(x, y, sample_weight=_weights(y, options["sampling"]))
    return network.predict_proba(asked)


_ANSWERS = {"svc": _svc, "lightgbm": _lightgbm, "xgboost": _xgboost, "bagging": _bagging, "dense": _dense}
