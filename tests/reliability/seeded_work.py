"""All that kerasmed draws by a seed and needs no network for, hashed: `python seeded_work.py FOLDER SEED JOBS`.

A process of its own, so that `test_reproducibility` can give it another hash seed, working folder and number of cores.
Prints a JSON object: what -> SHA-256.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import audit, augment, classifiers, datasets, imputation, metrics, pipelines, splits
from kerasmed.datasets import brain

SETS = {
    "brain": {"patients_per_class": 4, "slices_per_patient": 2, "image_size": (64, 64)},
    "chest": {"patients": 24, "image_side": 48},
    "lumbar": {"studies": 10, "image_side": (48, 52)},
    "mura": {"patients": 40, "image_side": (64, 72)},
    "tritask": {"train_images": 24, "valid_images": 10, "test_images": 10},
}


def _hash(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _sets(folder, seed):
    """Each system's synthetic set, every file's name and bytes."""
    for system, options in SETS.items():
        root = Path(datasets.write_synthetic(system, folder / system, seed=seed, **options))
        files = sorted(path for path in root.rglob("*") if path.is_file())
        named = [part for path in files for part in (path.relative_to(root).as_posix().encode(), path.read_bytes())]
        yield f"synthetic set of {system}", _hash(*named)


def _pictures(folder, seed, jobs):
    """A decoded store, the groups of its pictures, splits and folds of them, and batches of several epochs."""
    manifest = brain.read(folder / "brain", "brain_tumor")
    store = pipelines.decode(manifest, folder / "brain", image_size=(48, 48), jobs=jobs, progress=False)
    yield "decoded pictures", _hash(store.images, store.thumbnails)
    groups = audit.similarity_groups(store.thumbnails)
    yield "similarity groups", _hash(groups)
    names = brain.CLASS_NAMES["brain_tumor"]
    grouped = store.manifest.assign(group_id=[f"g{row // 2}" for row in range(len(store.manifest))])
    divided = splits.assign(grouped, names, seed=seed)
    divided.to_csv(folder / "split.csv", index=False)
    yield "split.csv", _hash((folder / "split.csv").read_bytes())
    folds = splits.cross_validate(grouped, names, num_folds=3, seed=seed)
    yield "folds", _hash(*(each["split"].astype(str).str.cat(sep=" ").encode() for each in folds))
    rows, targets = np.arange(len(store.images)), grouped[list(names)].to_numpy(np.float32)
    for library in ([name] for name in augment.NAMES):
        changed = augment.build(library, (48, 48))
        options = {"seed": seed, "batch_size": 8, "augment": changed}
        made = [
            pipelines.batch(store.images, rows, targets, epoch=epoch, index=index, **options)
            for epoch in range(3)
            for index in range(4)
        ]
        yield f"batches with {library[0]}", _hash(*(part for each in made for part in each))


def _tables(seed, jobs):
    """The imputer, each classifier and sampling on one table, and intervals of a metric."""
    rng = np.random.default_rng(99)  # the data; what is drawn on them has the seed
    rows = 90
    x, groups = rng.normal(size=(rows, 6)), np.repeat(np.arange(rows // 3), 3)
    y = (x[:, 0] + rng.normal(size=rows) > 0).astype(int) + (x[:, 1] > 1)
    table = pd.DataFrame(x[:, :4], columns=list("abcd")).assign(sex=rng.choice(["F", "M"], rows))
    table = table.mask(pd.DataFrame(rng.random(table.shape) < 0.2, columns=table.columns))
    filled = (
        imputation.RandomForestImputer(num_trees=20, max_iterations=2, seed=seed, jobs=jobs).fit(table).transform(table)
    )
    yield "imputer", _hash(filled.to_csv(index=False).encode())
    for name in classifiers.NAMES:
        for sampling in ("weighted", "smote_under"):
            # How many threads add up its sums is part of what fixes the network's result, as its docstring says.
            threads = 1 if name == "dense" else jobs
            told = classifiers.fit_predict(name, sampling, x[:60], y[:60], groups[:60], x[60:], seed=seed, jobs=threads)
            yield f"classifier {name}, {sampling}", _hash(told)
    pictures = rng.integers(0, 256, (60, 64, 64), dtype=np.uint8)
    truth = np.eye(3)[y[:40]][:, :2]
    draws = metrics.bootstrap_weights(groups, num_draws=50, seed=seed)
    yield "bootstrap draws", _hash(draws)
    yield (
        "pixel baseline",
        _hash(classifiers.svc_on_pixels(pictures[:40], truth, pictures[40:], max_images=30, seed=seed)),
    )


if __name__ == "__main__":
    where, seed, jobs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    found = dict(_sets(where, seed)) | dict(_pictures(where, seed, jobs)) | dict(_tables(seed, jobs))
    print(json.dumps(found))
