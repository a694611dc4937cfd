"""Fixtures: tiny trees in the real layout, and an environment that no test shares with a user's."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from kerasmed import notebooks
from kerasmed.datasets import brain


def pytest_collection_modifyitems(items):
    """Put whole notebooks first: begun last, they would keep one of two processes long after the other is done."""
    places = ("systems", "reliability")
    items.sort(key=lambda item: next((n for n, name in enumerate(places) if name in item.path.parts), len(places)))


@pytest.fixture(autouse=True)
def own_roots(tmp_path, monkeypatch):
    """Caches and runs of a test go to its own folder; no data root is named."""
    monkeypatch.setenv("KERASMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KERASMED_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("KERASMED_DATA", raising=False)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real images; a test that asks for it is skipped where there is none."""
    folder = os.environ.get("KERASMED_REAL_DATA")
    if not folder:
        pytest.skip("KERASMED_REAL_DATA is not set: no real images to test on")
    return Path(folder)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def brain_root(tmp_path, rng):
    """Both brain tasks in the real layout: 6 patients a class with 2 slices each, all in train/."""
    root = tmp_path / "data"
    for task, names in brain.CLASS_NAMES.items():
        for name in names:
            folder = root / "brain" / task / "train" / name
            folder.mkdir(parents=True)
            for patient in range(6):
                head = cv2.resize(rng.integers(0, 200, (5, 5), dtype=np.uint8), (70, 80), interpolation=cv2.INTER_CUBIC)
                for piece in range(2):
                    noisy = np.clip(head + rng.normal(0, 2, head.shape), 0, 255).astype(np.uint8)
                    cv2.imwrite(str(folder / f"{name[:2]} ({patient * 2 + piece}).jpg"), noisy)
    return root


@pytest.fixture
def write_odd_files():
    """Function of a folder and a uint8 picture: three files that cannot be read, three of unusual pixels."""

    def write(folder, picture):
        (folder / "zero.jpg").write_bytes(b"")
        (folder / "cut.jpg").write_bytes(cv2.imencode(".jpg", picture)[1].tobytes()[:-200])
        (folder / "text.jpg").write_text("not pixels")
        cv2.imwrite(str(folder / "deep.png"), picture.astype(np.uint16) * 16)  # 12 bits in 16
        Image.fromarray(np.dstack([picture] * 3 + [np.full_like(picture, 255)])).save(folder / "rgba.png")
        Image.fromarray(np.dstack([picture] * 3)).convert("CMYK").save(folder / "cmyk.jpg")

    return write


@pytest.fixture(scope="session")
def write_cascade_run():
    """Function of a models root: a complete run of 08_brain_cascade with four networks of random weights."""

    def write(root, data_source="real", fit="stretch", threshold=0.5):
        import keras

        from kerasmed import models, runs
        from kerasmed.systems.brain.cascade import STAGES, BrainCascade

        keras.utils.set_random_seed(5)
        networks = {stage: models.compact_cnn((32, 32), len(names), filters=(8, 8)) for stage, names in STAGES.items()}
        coarse = np.random.default_rng(0).integers(0, 256, (24, 6, 5), dtype=np.uint8)
        pictures = np.stack([cv2.resize(one, (32, 32), interpolation=cv2.INTER_CUBIC) for one in coarse])[..., None]
        for model in networks.values():  # so that pictures are told apart, and no answer is sure
            logits = model.get_layer("logits")
            told = keras.ops.convert_to_numpy(keras.Model(model.inputs, logits.output)(pictures))
            logits.kernel.assign(logits.kernel / told.std(axis=0))
            logits.bias.assign(-told.mean(axis=0) / told.std(axis=0))
        options = {"image_size": [32, 32], "fit": fit, "interpolation": "area", "equalize": False}
        parameters = {"profile": "smoke", "sensitivity": 0.9}
        common = {"fingerprint": "0" * 16, "data_source": data_source, "environment": {}, "models_root": root}
        run = runs.start("brain", "08_brain_cascade", parameters, **common)
        BrainCascade(networks, threshold, options, {"run": run.name}).save(run / "cascade")
        row = {"task": "slices", "variant": "cascade", "split": "test", "metric": "balanced_accuracy", "label": "all"}
        against = {"variant": "nearest_neighbour", "value": 0.25, "difference": 0.25, "difference_ci95": [0.1, 0.4]}
        row |= {"value": 0.5, "ci95": [0.375, 0.625], "n": 80, "n_groups": 40, "baseline": against, "reason": None}
        found = {"task": "disease", "metric": "sensitivity", "label": "disease", "value": 0.875}
        runs.finish(run, headline=[row], rows=[row, row | found])
        return run

    return write


@pytest.fixture
def project(tmp_path, monkeypatch, brain_root):
    """A project of one notebook whose body a test writes; data in the real layout beside it."""
    home = tmp_path / "project"
    (home / "notebooks/params/smoke").mkdir(parents=True)
    (home / "notebooks/params/smoke/10_tiny.yaml").write_text("profile: smoke\nepochs: 2\n")
    monkeypatch.chdir(home)

    def write(body):
        parameters = (
            'profile = "full"  # type: str  name\nepochs = 5  # type: int  number\nrate = 0.001  # type: float  step\n'
            'tasks = ["a"]  # type: list  which\nsure = False  # type: bool  or not\n'
            'data_source = "auto"  # type: str  which\n'
            f'data_root = "{brain_root}"  # type: str  where\nmodels_root = ""  # type: str  where\n'
        )
        cells = [
            {"cell_type": "markdown", "metadata": {}, "source": ["# Tiny\n", "text"]},
            {
                "cell_type": "code",
                "metadata": {"tags": ["parameters"]},
                "source": [parameters],
                "outputs": [],
                "execution_count": None,
            },
            {"cell_type": "code", "metadata": {}, "source": [body], "outputs": [], "execution_count": None},
        ]
        metadata = {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "kerasmed": {"system": "brain", "budget_minutes": {"smoke": 1}},
        }
        content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
        (home / "notebooks/10_tiny.ipynb").write_text(json.dumps(content))
        notebook = notebooks.describe("10_tiny")
        return notebook, notebooks.resolve(notebook, profile="smoke", given={})

    return write
