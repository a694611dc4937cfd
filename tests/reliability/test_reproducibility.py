"""The same seed twice, in processes that differ in all that should not matter; and another seed, which should."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

import kerasmed
from kerasmed import runs

WORK = Path(__file__).with_name("seeded_work.py")
SAME, OTHER = "the same bytes", "other bytes by another seed"
# Without a sample of rows or columns these trees draw nothing.
DRAWS_NOTHING = {"classifier lightgbm, weighted", "classifier xgboost, weighted"}
TINY = {
    "networks": "['cnn1']",
    "without_augmentation": "[]",
    "compare_policies": "[]",
    "compare_heads": "false",
    "deterministic": "true",
    "synthetic_train_images": "100",
    "synthetic_valid_images": "60",
    "synthetic_test_images": "20",
    "bootstraps": "50",
}


def _start(words, folder, **variables):
    """Start Python in a folder of its own, with the package of this checkout."""
    folder.mkdir()
    home = str(Path(kerasmed.__file__).parents[1])
    own = {"KERASMED_CACHE": str(folder / "cache"), "PYTHONPATH": home, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = {**os.environ, **own, **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=folder, env=environment, **pipes)


def _ended(process):
    told, errors = process.communicate(timeout=850)
    assert process.returncode == 0, f"{told[-2000:]}\n{errors[-2000:]}"
    return told


@pytest.mark.slow
def test_draws_of_one_seed_are_the_same_bytes_in_any_process(tmp_path, record):
    """Hash seed, working folder and number of cores differ: sets, splits, batches, imputer, classifiers do not."""
    first = _start([WORK, tmp_path / "a", 0, 1], tmp_path / "a", PYTHONHASHSEED="0")
    other = _start([WORK, tmp_path / "c", 1, 1], tmp_path / "c", PYTHONHASHSEED="0")
    again = _start([WORK, tmp_path / "b", 0, 2], tmp_path / "b", PYTHONHASHSEED="4242", LOKY_MAX_CPU_COUNT="2")
    first, again, other = (json.loads(_ended(process)) for process in (first, again, other))
    assert first.keys() == again.keys() == other.keys() and first.keys() >= DRAWS_NOTHING
    assert [name for name in first if first[name] != again[name]] == []
    assert [name for name in first if first[name] == other[name]] == sorted(DRAWS_NOTHING)
    for kind, named in {
        "synthetic sets, file by file": "synthetic set",
        "decoded pictures, similarity groups, split.csv, folds, bootstrap draws": (
            "decoded",
            "similarity",
            "split.csv",
            "folds",
            "bootstrap",
        ),
        "batches of three epochs, by augmentation": "batches",
        "imputer, classifiers and the pixel baseline": ("imputer", "classifier", "pixel"),
    }.items():
        seen = [name for name in first if name.startswith(named)]
        differing = [name for name in seen if name not in DRAWS_NOTHING]
        record(
            "Reproducibility",
            f"{kind}: another process, hash seed, folder, jobs",
            {SAME: len(seen), OTHER: len(differing)},
        )


def _facts(models):
    """What a run of one network found: name -> bytes or value, without times of day and durations."""
    run = next(models.glob("tritask/09_tritask_dedup-*/metrics.json")).parent
    found = {name: (run / name).read_bytes() for name in ("split.csv", "predictions.csv")}
    found["history.csv"] = pd.read_csv(run / "history.csv").drop(columns="seconds").to_csv()
    # Its `weights` are hashes of whole files, in which Keras writes when they were saved.
    content = runs.read_json(run / "metrics.json")
    assert content.pop("weights")
    found["metrics.json"] = json.dumps(content, sort_keys=True)
    with zipfile.ZipFile(run / "model.keras") as archive:
        found["weights"] = hashlib.sha256(archive.read("model.weights.h5")).hexdigest()
    return found


@pytest.mark.slow
def test_run_of_one_seed_gives_the_same_bytes_in_another_process(tmp_path, record):
    """A whole notebook, trained and measured, deterministic on the CPU: bit for bit, whatever the process."""

    def start(name, seed, **variables):
        folder = tmp_path / name
        given = [word for key, value in {**TINY, "seed": seed}.items() for word in ("-p", f"{key}={value}")]
        command = [
            "-m",
            "kerasmed",
            "run",
            "09_tritask_dedup",
            "--profile",
            "smoke",
            "--models-root",
            folder / "models",
        ]
        return _start([*command, *given], folder, **variables)

    first = start("a", 0, PYTHONHASHSEED="0", OMP_NUM_THREADS="2")
    again = start("b", 0, PYTHONHASHSEED="4242", LOKY_MAX_CPU_COUNT="1", OMP_NUM_THREADS="1")
    other = start("c", 1, PYTHONHASHSEED="0")
    for process in (first, again, other):
        _ended(process)
    first, again, other = (_facts(tmp_path / name / "models") for name in "abc")
    assert [name for name in first if first[name] != again[name]] == []
    assert [name for name in first if first[name] == other[name]] == []
    seen = Counter({SAME: len(first), OTHER: len(first)})
    record("Reproducibility", "split, history, weights, predictions and metrics of a whole run on the CPU", seen)
