"""Fixtures: smooth pictures, what is noted of them, and folders with planted faults."""

import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest

from kerasmed import audit, images, pipelines


@pytest.fixture
def heads(rng):
    """Function of a count: that many smooth uint8 pictures (64, 64) that do not resemble each other."""

    def make(count):
        grids = rng.integers(0, 256, (count, 6, 6), dtype=np.uint8)
        return np.stack([cv2.resize(grid, (64, 64), interpolation=cv2.INTER_CUBIC) for grid in grids])

    return make


@pytest.fixture
def facts_of():
    """Function of uint8 pictures: the table that a decoded store holds of them."""
    return lambda pictures: pd.DataFrame(np.array([images.facts(picture) for picture in pictures], images.FACTS))


@pytest.fixture
def examined():
    """Function of a path and options of `audit.examine`: the report, made as the command makes it."""

    def examine(path, **options):
        root, table, class_names, _ = audit.index(path)
        store = pipelines.decode(table, root, image_size=images.THUMBNAIL_SIZE, max_quarantined_share=1, progress=False)
        return audit.examine(
            store.manifest,
            class_names,
            name="t",
            thumbnails=store.thumbnails,
            facts=store.facts,
            headers=images.headers(root, store.manifest["image_path"]),
            quarantine=store.quarantine,
            **options,
        )

    return examine


@pytest.fixture
def drawn(tmp_path, rng):
    """Twelve PNG files of smooth pictures of different sizes."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    for number in range(12):
        size = (150 + number, 160)
        picture = cv2.resize(rng.integers(0, 256, (9, 9), dtype=np.uint8), size, interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{number:02d}.png"), picture)
    return sorted(folder.iterdir())


@pytest.fixture
def plant(tmp_path):
    """Function of twelve unlike image files: a folder of copies of them, and faults among them."""

    def make(originals):
        root = tmp_path / "planted"
        places = ["train/ill"] * 6 + ["train/well"] * 3 + ["test/ill"] * 3
        names = [f"{place}/{file.name}" for place, file in zip(places, originals, strict=True)]
        for name, file in zip(names, originals):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / name)

        def write(name, pixels, *options):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(root / name), pixels, options)
            return name

        raw = [cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in originals[:4]]
        height, width = (round(side * 0.95) for side in raw[2].shape[:2])
        other = ".tif" if originals[0].suffix == ".png" else ".png"
        copy = write(f"test/ill/another name{other}", raw[0])
        saved = write("train/ill/saved anew.jpg", images.read(originals[1]), cv2.IMWRITE_JPEG_QUALITY, 80)
        sized = write("test/ill/sized anew.png", cv2.resize(raw[2], (width, height)))
        (root / "train/well/contradiction").with_suffix(originals[3].suffix).write_bytes(originals[3].read_bytes())
        faint = np.zeros((80, 80), np.uint8)
        faint[20:50, 20:40] = 3  # which no eye sees: the two black images correlate, and still belong to nobody
        black = {
            write("train/well/black.png", faint),
            write("test/ill/black.bmp", cv2.cvtColor(faint, cv2.COLOR_GRAY2BGR)),
            write("test/ill/black.jpg", np.zeros((70, 70, 3), np.uint8)),
        }
        flat = write("train/ill/flat.png", np.full((50, 60), 77, np.uint8))
        (root / "train/ill/empty.png").touch()
        contradiction = {names[3], f"train/well/contradiction{originals[3].suffix}"}
        expected = {
            "unreadable": [set()],
            "black": [black],
            "constant": [{flat}],
            "label_conflict": [contradiction],
            "leak_duplicate": [{names[0], copy}],
            "leak_near_duplicate": [{names[2], sized}],
            "exact_duplicate": [contradiction],
            "near_duplicate": [{names[1], saved}],
        }
        return SimpleNamespace(root=root, names=names, expected=expected)

    return make


@pytest.fixture(params=["drawn", "brain", "chest"])
def planted(request, plant):
    """A folder with planted faults among drawn pictures, real slices of tumours, and real radiographs."""
    if request.param == "drawn":
        return plant(request.getfixturevalue("drawn"))
    root = request.getfixturevalue("real_data")
    if request.param == "chest":
        return plant(sorted((root / "chest/images").iterdir())[::8])
    return plant(sorted((root / "brain/brain_tumor/train/glioma_tumor").iterdir())[::70])
