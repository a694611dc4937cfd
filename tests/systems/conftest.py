"""Fixtures of the cascade's tests: stores without files, and what training leaves of them."""

import numpy as np
import pandas as pd
import pytest

from kerasmed import pipelines, predictions
from kerasmed.systems.brain import staged
from kerasmed.systems.brain.cascade import NONE, OUTCOMES


@pytest.fixture
def store_of():
    """Function of outcomes, groups and splits: a store of images that show nothing, for these are looked at."""

    def make(outcomes, groups, split, thumbnails=None):
        ids = np.array([OUTCOMES.index(name) for name in outcomes])
        count = len(ids)
        manifest = pd.DataFrame(np.eye(7, dtype=int)[ids], columns=OUTCOMES).assign(
            image_path=[f"{row}.png" for row in range(count)],
            patient_id=np.nan,
            study_id=np.nan,
            group_id=[str(group) for group in groups],
            split=split,
            task=np.where(ids > 3, "brain_tumor", "alzheimer"),
        )
        if thumbnails is None:
            thumbnails = np.random.default_rng(0).integers(0, 256, (count, 64, 64), dtype=np.uint8)
        return pipelines.Store(thumbnails[:, :8, :8], thumbnails, manifest, None, pd.DataFrame(), None)

    return make


@pytest.fixture
def store(store_of):
    """Of each outcome nine groups of two images, three groups in each split; rows in no order of these."""
    order = np.random.default_rng(1).permutation(126)
    group = order // 2
    outcomes = [OUTCOMES[number % 7] for number in group]
    split = np.array(["train", "valid", "test"])[group // 7 % 3]
    made = store_of(outcomes, group, split)
    # Healthy people are of either set.
    made.manifest.loc[(made.manifest[NONE] == 1) & (group % 2 == 1), "task"] = "brain_tumor"
    return made


@pytest.fixture
def measures_of():
    """Function of a number of images: measures of them that tell nothing, but for those given."""

    def make(count, **columns):
        names = [name for names in staged.MEASURES.values() for name in names]
        return pd.DataFrame(dict.fromkeys(names, 1.0) | columns, index=range(count))

    return make


@pytest.fixture
def tables_of(measures_of):
    """Function of a recipe, a fold, and stage -> probabilities of every image: tables of `staged.tabulate`."""

    def make(config, store, told, measures=None):
        trained = {}
        for task, values in told.items():
            names, asked = staged.classes_of(task), store if task == staged.FLAT else staged.ask(store, task)
            table = predictions.tabulate(asked.manifest, values, names, variant="compact")
            trained[task] = staged.Trained("compact", task, None, table)
        measures = measures_of(len(store.manifest)) if measures is None else measures
        return staged.tabulate(config, store, trained, measures)

    return make
