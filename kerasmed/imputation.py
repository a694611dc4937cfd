"""Fill the gaps of a table of mixed columns by random forests that were fitted on training rows only."""

import logging

import numpy as np
import pandas as pd
from pandas.api import types
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.utils.validation import check_is_fitted

ALL_MISSING = ("error", "drop", "keep")
_MAX_CATEGORIES = 100  # more is an identifier: it tells nothing of other rows, and a forest of it fills the memory
_INPUTS = 0.5  # share of the inputs looked at for each cut
# Rows that a cut needs: as accurate as full trees, and a quarter quicker. A least number of rows in each leaf would end
# a tree at its root where the inputs drawn hold nothing but the mark of a few gaps.
_ROWS_TO_CUT = 10
_log = logging.getLogger(__name__)


class RandomForestImputer(TransformerMixin, BaseEstimator):
    """Fill each column's gaps by a random forest that looks at the other columns.

    Gaps start at the training median, or the most frequent category. A round visits the columns that have gaps, those
    of fewest gaps first: a forest (classifier for a categorical column, regressor for a numeric one) learns the column
    from the rows where it is known, and guesses its gaps. Its inputs are all other columns (numbers standardised,
    categories one-hot) with their present guesses, and a 0/1 mark of each gap that was guessed. Rounds follow until no
    categorical guess changes and no numeric column's guesses change by `tol` or more (root mean square over its gaps,
    in standard deviations of the column), or `max_iterations` are done. The forests of each round are fitted anew and
    differ by chance, so a table of many gaps seldom comes to rest: after three rounds there is little to gain.

    `transform` replays the forests of all rounds on the rows given, from the training median or category on. It looks
    at no other row, so a row is filled alone as it is in a table, and training rows as they were while fitting. (The
    last round's forests alone, applied again and again, are clearly worse.)

    * Numeric columns: integers and floats. Categorical: text, categories, booleans. The dtype is kept, but integers
      with gaps (`Int64`) come back as float64, since a guess is a mean.
    * Known values are never changed. A category that training did not have counts as a gap for its row's other
      columns, and is kept; a warning counts such values.
    * A column without gaps in training has no forest: its gaps in other rows get the median or most frequent category,
      with a warning. A column of one known value, or without others beside it, is filled in the same way.

    Args:
        num_trees: trees a forest.
        max_iterations: rounds at most.
        tol: change of numeric guesses, in standard deviations, below which they are stable; 0 asks for no
            change.
        all_missing: what to do with columns that no training row has: "error" refuses them, "drop" leaves them out of
            what `transform` gives, "keep" passes them on as they are; neither makes inputs of them.
        seed: of the forests.
        jobs: processor cores that fit a forest; results do not depend on it.

    Attributes:
        n_iterations_: rounds done; 0 where training had no gaps.
        converged_: whether the last round changed too little to go on.
        statistics_: training median or most frequent category, by column.
        all_missing_: columns that no training row has.
        forests_: a dict a round, from column to forest.

    Example:
        >>> table = pd.DataFrame({"sex": ["F", "M"] * 20, "height": [160.0, 180.0] * 20})
        >>> imputer = RandomForestImputer(num_trees=10).fit(table.assign(height=table["height"].where(table.index > 3)))
        >>> imputer.transform(pd.DataFrame({"sex": ["M", "F"], "height": [None, 171.5]}))["height"].tolist()
        [180.0, 171.5]

    Source: Stekhoven and Bühlmann 2012, MissForest, Bioinformatics 28(1), doi:10.1093/bioinformatics/btr597. There: no
    marks of gaps, no rows but those fitted, and an end where the change between rounds first grows.
    """

    def __init__(self, *, num_trees=100, max_iterations=5, tol=0.01, all_missing="error", seed=0, jobs=1):
        self.num_trees = num_trees
        self.max_iterations = max_iterations
        self.tol = tol
        self.all_missing = all_missing
        self.seed = seed
        self.jobs = jobs

    def fit(self, table: pd.DataFrame, y=None) -> "RandomForestImputer":
        """Fit the forests.

        Args:
            table: training rows, at least one.
            y: ignored; pipelines pass it.

        Returns:
            self.

        Raises:
            TypeError: `table` is no DataFrame, or a column is neither numeric nor categorical.
            ValueError: no rows, a column twice, a column without any value (unless `all_missing` allows it), an
                infinite value, more than 100 categories in a column, or an option out of range.
        """
        self._check_options()
        _check_table(table)
        if not len(table):
            raise ValueError("the table has no rows; expected at least one training row.")
        self.columns_ = list(table.columns)
        self.all_missing_ = [name for name in self.columns_ if table[name].isna().all()]
        if self.all_missing_ and self.all_missing == "error":
            raise ValueError(
                f"{len(self.all_missing_)} of {len(self.columns_)} columns have no value in {len(table)} training "
                f"rows: {self.all_missing_[:5]}. Leave them out, or say `all_missing='drop'` or 'keep'."
            )
        self._used = [name for name in self.columns_ if name not in self.all_missing_]
        self._learn_columns(table)
        values, missing = self._encode(table)
        self._marked = missing.any(axis=0)
        self.forests_, self.n_iterations_, self.converged_ = [], 0, not missing.any()
        self._order = [column for column in np.argsort(missing.sum(axis=0), kind="stable") if self._marked[column]]
        blocks = [self._block(values, missing, column) for column in range(len(self._used))]
        while not self.converged_ and self.n_iterations_ < self.max_iterations:
            before = values.copy()
            forests = {self._used[column]: self._fit_forest(values, missing, blocks, column) for column in self._order}
            self.forests_.append(forests)
            self.n_iterations_ += 1
            self.converged_ = self._is_stable(before, values, missing)
        _log.info(
            "%d of %d columns had gaps; %s after %d rounds.",
            len(self._order),
            len(self._used),
            "stable" if self.converged_ else "not yet stable",
            self.n_iterations_,
        )
        return self

    def transform(self, table: pd.DataFrame) -> pd.DataFrame:
        """Fill gaps by the fitted forests.

        Args:
            table: rows with the columns of training; their order is free.

        Returns:
            A copy without gaps, in the columns' and rows' order given, under the same index; columns that training did
            not have a value of are left out or as they were.

        Raises:
            NotFittedError: `fit` was not called.
            TypeError: `table` is no DataFrame, or a column is numeric here and was categorical, or the other way.
            ValueError: the columns differ from those of training, or a value is infinite.
        """
        check_is_fitted(self, "forests_")
        _check_table(table)
        self._check_columns(table)
        values, missing = self._encode(table)
        self._warn(table, missing)
        blocks = [self._block(values, missing, column) for column in range(len(self._used))]
        for forests in self.forests_:
            for column in self._order:
                self._guess(forests[self._used[column]], values, missing, blocks, column)
        filled = table.drop(columns=self.all_missing_) if self.all_missing == "drop" else table.copy()
        for column, name in enumerate(self._used):
            gaps = np.flatnonzero(table[name].isna())
            if len(gaps):
                filled[name] = self._fill(table[name], gaps, values[gaps, column])
        return filled

    def _check_options(self):
        """Refuse options out of range, all by name."""
        if self.all_missing not in ALL_MISSING:
            raise ValueError(f"`all_missing` is {self.all_missing!r}; expected one of {ALL_MISSING}.")
        if self.num_trees < 1 or self.max_iterations < 1 or self.tol < 0:
            raise ValueError(
                f"`num_trees` is {self.num_trees}, `max_iterations` {self.max_iterations}, `tol` {self.tol}; expected "
                "at least 1, 1 and 0."
            )

    def _check_columns(self, table):
        """Refuse other columns than those of training, or columns of another kind."""
        lacking = [name for name in self.columns_ if name not in table.columns]
        added = [name for name in table.columns if name not in self.columns_]
        if lacking or added:
            raise ValueError(
                f"columns differ from those of the {len(self.columns_)} in training: {len(lacking)} lacking "
                f"{lacking[:5]}, {len(added)} unknown {added[:5]}. Give the same columns, NaN where unknown."
            )
        for name in self._used:
            told = "categorical" if name in self.categories_ else "numeric"
            if not table[name].isna().all() and (kind := _kind(table[name])) != told:
                raise TypeError(
                    f"column {name!r} is {kind} here ({table[name].dtype}) and was {told} in training; convert it "
                    "as it was then."
                )

    def _learn_columns(self, table):
        """Keep each column's categories or scale, and its median or most frequent category."""
        self.categories_, self.statistics_, self._scales = {}, {}, {}
        for name in self._used:
            known = table[name].dropna()
            if _kind(known) == "numeric":
                numbers = _numbers(known)
                self.statistics_[name] = float(np.median(numbers))
                # Inputs of a forest are float32: large values of small spread, such as dates, would run together.
                self._scales[name] = (numbers.mean(), numbers.std() or 1.0)
                continue
            values = known.astype(object)
            categories = pd.Index(sorted(values.unique(), key=str), dtype=object)
            if len(categories) > _MAX_CATEGORIES:
                raise ValueError(
                    f"column {name!r} has {len(categories)} categories in {len(known)} rows; expected at most "
                    f"{_MAX_CATEGORIES}. Leave it out if it names rows, or make it numeric or coarser. First: "
                    f"{list(categories[:5])}."
                )
            self.categories_[name] = categories
            self.statistics_[name] = categories[np.bincount(categories.get_indexer(values)).argmax()]

    def _encode(self, table):
        """Values as numbers (standardised, or the category's place), gaps at the start value, and where gaps are."""
        values, missing = np.zeros((2, len(table), len(self._used)))
        for column, name in enumerate(self._used):
            if name in self.categories_:
                codes = self.categories_[name].get_indexer(table[name].astype(object))
                start = self.categories_[name].get_loc(self.statistics_[name])
                missing[:, column] = codes < 0
            else:
                mean, deviation = self._scales[name]
                codes = (_numbers(table[name]) - mean) / deviation
                start = (self.statistics_[name] - mean) / deviation
                missing[:, column] = np.isnan(codes)
            values[:, column] = np.where(missing[:, column], start, codes)
        return values, missing.astype(bool)

    def _block(self, values, missing, column):
        """What other columns' forests see of a column: float32, shape (num_rows, num_inputs)."""
        block = values[:, column, None]
        categories = self.categories_.get(self._used[column], ())
        if len(categories) > 2:
            block = block == np.arange(len(categories))
        return np.hstack([block, missing[:, column, None]][: 1 + self._marked[column]]).astype(np.float32)

    def _fit_forest(self, values, missing, blocks, column):
        """Fit a column's forest and guess its gaps; None where it has nothing to learn, or to learn from."""
        known = ~missing[:, column]
        y = values[known, column]
        if len(blocks) < 2 or (y == y[0]).all():
            return None
        kind = RandomForestClassifier if self._used[column] in self.categories_ else RandomForestRegressor
        forest = kind(
            self.num_trees,
            max_features=_INPUTS,
            min_samples_split=_ROWS_TO_CUT,
            random_state=self.seed,
            n_jobs=self.jobs,
        ).fit(_inputs(blocks, column)[known], y)
        # Threads add up the trees' answers in any order, and so differ in the last digit.
        forest.set_params(n_jobs=1)
        self._guess(forest, values, missing, blocks, column)
        return forest

    def _guess(self, forest, values, missing, blocks, column):
        """Write a forest's guesses into values and blocks."""
        gaps = missing[:, column]
        if forest is not None and gaps.any():
            values[gaps, column] = forest.predict(_inputs(blocks, column)[gaps])
            blocks[column] = self._block(values, missing, column)

    def _is_stable(self, before, values, missing):
        """Whether a round left categories as they were and moved numbers by less than `tol` deviations."""
        for column in self._order:
            gaps = missing[:, column]
            change = np.sqrt(np.mean((values[gaps, column] - before[gaps, column]) ** 2))
            if change > 0 and (self._used[column] in self.categories_ or change >= self.tol):
                return False
        return True

    def _warn(self, table, missing):
        """Log unseen categories, and gaps that no forest fills."""
        for column, name in enumerate(self._used):
            gaps = table[name].isna().to_numpy()
            unseen = missing[:, column] & ~gaps
            if unseen.any():
                _log.warning(
                    "column %r: %d of %d values are categories that training did not have, kept as they are and taken "
                    "for gaps by the forests of other columns. First: %s.",
                    name,
                    unseen.sum(),
                    len(table),
                    list(table[name][unseen].unique()[:5]),
                )
            if gaps.any() and not self._marked[column]:
                _log.warning(
                    "column %r: %d of %d values are missing, none was in training; filled with %r.",
                    name,
                    gaps.sum(),
                    len(table),
                    self.statistics_[name],
                )

    def _fill(self, column, gaps, guesses):
        """A copy of a column with its gaps filled, in its dtype where that holds the guesses."""
        if column.name not in self.categories_:
            mean, deviation = self._scales[column.name]
            # A start value is the median again to the last digit; the scale's rounding would move it.
            start = (self.statistics_[column.name] - mean) / deviation
            told = np.where(guesses == start, self.statistics_[column.name], guesses * deviation + mean)
            if not types.is_float_dtype(column.dtype):
                column = pd.Series(_numbers(column), column.index)
            told = told.astype(column.to_numpy().dtype) if isinstance(column.dtype, np.dtype) else told
        else:
            told = self.categories_[column.name].to_numpy()[guesses.astype(int)]
            if isinstance(column.dtype, pd.CategoricalDtype):
                lacking = [value for value in pd.unique(told) if value not in column.cat.categories]
                column = column.cat.add_categories(lacking)
            elif column.isna().all() and types.is_numeric_dtype(column.dtype):
                column = column.astype(object)
        filled = column.copy()
        filled.iloc[gaps] = told
        return filled


def _check_table(table):
    """Refuse what is no DataFrame, and names that stand for two columns."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"the table is a {type(table).__name__}; expected a pandas DataFrame.")
    twice = table.columns[table.columns.duplicated()].unique()
    if len(twice):
        raise ValueError(f"{len(twice)} column names occur more than once; rename them. First: {list(twice[:5])}.")


def _kind(column):
    """Tell "numeric" from "categorical"; refuse dates, lists and numbers kept as objects."""
    text = ("string", "boolean")
    if isinstance(column.dtype, pd.CategoricalDtype) or types.infer_dtype(column, skipna=True) in text:
        return "categorical"
    if types.is_numeric_dtype(column.dtype) and not types.is_complex_dtype(column.dtype):
        return "numeric"
    raise TypeError(
        f"column {column.name!r} has dtype {column.dtype} and values such as {column.dropna().iloc[0]!r}; expected "
        "numbers, text, categories or booleans. Convert it (`pd.to_numeric`, `astype('category')`) or leave it out."
    )


def _numbers(column):
    """A numeric column, or one of gaps only, as float64 with NaN; infinite values are refused."""
    numbers = pd.to_numeric(column).to_numpy(np.float64, na_value=np.nan)
    infinite = np.isinf(numbers)
    if infinite.any():
        raise ValueError(
            f"column {column.name!r} has {infinite.sum()} infinite values; expected finite ones, or NaN where unknown. "
            f"First rows: {list(column.index[infinite][:5])}."
        )
    return numbers


def _inputs(blocks, column):
    """All columns' blocks but one's, side by side."""
    return np.hstack([block for other, block in enumerate(blocks) if other != column])
