"""Fixtures: tiny trees in the real layout, and an environment that no test shares with a user's."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from kerasmed.datasets import brain


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
