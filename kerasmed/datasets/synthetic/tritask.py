"""Write a synthetic tritask set: the real layout, three planted signals, and black images with contradictory labels."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from kerasmed import atomic
from kerasmed.datasets.synthetic.drawing import inside, refuse_other, rotated, write_image, write_text
from kerasmed.datasets.tritask import CLASS_NAMES, FOLDERS, LABEL_TABLES, SAMPLE

NAMES = CLASS_NAMES["scans"]
# A label's shape, and how often it is drawn without and with the hidden cause, which half of the images have.
_SIGNALS = {"label1": ("ring", 0.2, 0.8), "label2": ("spot", 0.1, 0.7), "label3": ("cross", 0.05, 0.55)}
# Drawn in the place of a signal that is absent, and as strong, so that an image's contrast does not tell how many
# signals it has.
_DECOY = "halves"
_SETS = (np.arange(8)[:, None] >> np.array([2, 1, 0])) & 1  # the eight sets of signals
_SIDE = 64  # pixels
_SHAPE_RADIUS = 0.25  # in halves of the image's side, so 8 pixels: 4 are left in an image of 32×32
_SHAPE_STRENGTH = 600.0  # root of the sum of squared grey levels; the same for all shapes
_PLACE_DISTANCE = (0.3, 0.44)  # of shapes from the centre: within the smallest scan, and apart from one another
# The three turn about the centre together by up to this, radians: each label's shape is mostly in its third of the
# scan, from which a dense network learns something, and too rarely in one place for a nearest neighbour.
_TURN = 1.0
_SMALLEST_SPLIT = 10
_AXIS = (2 * np.arange(_SIDE) + 1) / _SIDE - 1  # centres of pixels from -1 to 1
_X, _Y = _AXIS[None, :], _AXIS[:, None]


def write(
    root: str | os.PathLike,
    *,
    train_images: int = 1600,
    valid_images: int = 600,
    test_images: int = 300,
    black_share: float = 0.25,
    label_noise: float = 0.05,
    seed: int = 0,
) -> Path:
    """Write a synthetic set in the layout of the real one.

    Layout (8-bit PNG of 64×64, grey, stored in one channel or in three equal ones at random):

        root/tritask/{train_images,val_images,test_images}/*.png      named by number, counted through all splits
        root/tritask/{train_labels,val_labels}.csv    id (file name), label1, label2, label3
        root/tritask/sample_submission.csv            the same columns for the test images, labels all 0
        root/tritask/truth.csv      image_path (relative to root), black, signal1-3 (what is drawn), label1-3 (what is
                                    recorded, for test images here alone)
        root/tritask/synthetic.json system, parameters, black_images, prevalence, ceiling, ceiling_f1

    An image that is not black is an anatomy of its own: no two correlate above 0.95, and a nearest neighbour's mean F1
    on validation is 0.37 to 0.47, where the same answers shuffled give 0.37 to 0.40 (seeds 0 to 2). A signal is a shape
    (ring, spot, cross) of mean zero and of any orientation, mostly in its third of the scan; where it is absent, a disc
    of two halves of the same strength is drawn instead. The size of a file tells next to nothing of a label (AUROC 0.51
    to 0.56). A hidden cause z, which half of the images have, makes signals go together:

        P(set of signals) = mean over z of the product of P(signal | z)
        P(signal) = 0.5, 0.4, 0.3; phi of two signals 0.33 to 0.37

    and each split has the eight sets in these shares, as nearly as whole images allow. In each split and label, of the
    images that are not black, flipped = round(label_noise * number) at random are recorded with the other value:

        ceiling = 1 - flipped / number

    is the best attainable accuracy on them, and ceiling_f1 the F1 of reading every signal rightly (null where a label
    has neither signal nor record).

    In each split round(black_share * images) images are all zeros and show nothing. Their labels are sets drawn from
    those recorded for the other images of the split: they contradict one another, and nothing can be learnt of them.

    Args:
        root: folder to write under, created where missing.
        train_images: images of the training split, at least 10.
        valid_images: of the validation split, at least 10.
        test_images: of the test split, at least 10.
        black_share: share of black images in each split, in [0, 0.9].
        label_noise: share of the labels of other images that are flipped, in [0, 0.5).
        seed: non-negative integer; the same seed and parameters write byte-identical files of the same times.

    Returns:
        `root` as a Path. A set of the same parameters is left as it is. The folder gets its name when it is whole.

    Raises:
        ValueError: a parameter is outside the range above.
        FileExistsError: `root/tritask` is there and is not this set.
    """
    parameters = _checked_parameters(train_images, valid_images, test_images, black_share, label_noise, seed)
    root = Path(root)
    truth = _draw_truth(parameters)
    description = {"system": "tritask", **parameters, **_describe(truth)}
    target = root / "tritask"
    if target.exists():
        refuse_other(target, description)
        return root

    with atomic.whole_folder(target) as writing:
        _write_images(writing, truth, parameters["seed"])
        for split, name in {**LABEL_TABLES, "test": SAMPLE}.items():
            table = truth.loc[truth["split"] == split, ["id", *NAMES]]
            _write_table(writing / name, table.assign(**dict.fromkeys(NAMES, 0)) if split == "test" else table)
        _write_table(writing / "truth.csv", truth.drop(columns=["id", "split"]))
        write_text(writing / "synthetic.json", json.dumps(description, indent=2) + "\n")
    refuse_other(target, description)  # another process may have written there meanwhile
    return root


def _checked_parameters(train_images, valid_images, test_images, black_share, label_noise, seed) -> dict:
    """Return the parameters as plain Python values, or raise ValueError."""
    sizes = {"train_images": train_images, "valid_images": valid_images, "test_images": test_images}
    for name, number in sizes.items():
        if number < _SMALLEST_SPLIT:
            raise ValueError(
                f"`{name}` is {number}; expected at least {_SMALLEST_SPLIT}, so that every label occurs. "
                f"Pass {_SMALLEST_SPLIT} or more."
            )
    if not 0 <= black_share <= 0.9:
        raise ValueError(f"`black_share` is {black_share}; expected a share in [0, 0.9], such as 0.25.")
    if not 0 <= label_noise < 0.5:
        raise ValueError(
            f"`label_noise` is {label_noise}; expected a share in [0, 0.5), such as 0.05: from one half on "
            "the recorded labels no longer name the signals."
        )
    if seed < 0:
        raise ValueError(f"`seed` is {seed}; expected a non-negative integer. Pass 0 or more.")
    return {
        "seed": int(seed),
        **{name: int(number) for name, number in sizes.items()},
        "black_share": float(black_share),
        "label_noise": float(label_noise),
    }


def _draw_truth(parameters: dict) -> pd.DataFrame:
    """Draw which images are black, their signals and their recorded labels: truth.csv with split and id."""
    frames, first = [], 1
    for position, split in enumerate(FOLDERS):
        rng = np.random.default_rng([parameters["seed"], position])
        number = parameters[f"{split}_images"]
        black = np.zeros(number, bool)
        black[rng.permutation(number)[: round(parameters["black_share"] * number)]] = True
        signals, labels = np.zeros((2, number, len(NAMES)), int)
        signals[~black] = drawn = _draw_signals(rng, int((~black).sum()))
        flipped = round(parameters["label_noise"] * len(drawn))
        flips = np.stack([rng.permutation(len(drawn)) < flipped for _ in NAMES], axis=1)
        labels[~black] = recorded = drawn ^ flips
        labels[black] = recorded[rng.integers(len(recorded), size=int(black.sum()))]
        ids = [f"{image:05d}.png" for image in range(first, first + number)]
        first += number
        frames.append(
            pd.DataFrame(
                {
                    "split": split,
                    "id": ids,
                    "image_path": [f"tritask/{FOLDERS[split]}/{name}" for name in ids],
                    "black": black.astype(int),
                    **{name.replace("label", "signal"): column for name, column in zip(NAMES, signals.T, strict=True)},
                    **dict(zip(NAMES, labels.T, strict=True)),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _draw_signals(rng, number: int) -> np.ndarray:
    """Sets of signals in their exact shares, in random order: int, shape (number, num_labels)."""
    chances = np.array([_SIGNALS[name][1:] for name in NAMES])  # (num_labels, without and with the cause)
    of_set = np.where(_SETS[:, :, None] == 1, chances, 1 - chances).prod(axis=1).mean(axis=1)
    counts = np.floor(of_set * number).astype(int)
    # Largest remainders: what is left over goes to the sets that lost most by rounding down.
    counts[np.argsort(counts - of_set * number, kind="stable")[: number - counts.sum()]] += 1
    return rng.permutation(np.repeat(_SETS, counts, axis=0))


def _describe(truth: pd.DataFrame) -> dict:
    """State by split how many images are black, and of the others prevalence and what can be reached."""
    known = {"black_images": {}, "prevalence": {}, "ceiling": {}, "ceiling_f1": {}}
    for split, table in truth.groupby("split", sort=False):
        shown = table[table["black"] == 0]
        labels = shown[list(NAMES)].to_numpy()
        signals = shown[[name.replace("label", "signal") for name in NAMES]].to_numpy()
        both, either = 2 * (signals & labels).sum(axis=0), (signals + labels).sum(axis=0)
        known["black_images"][split] = int(table["black"].sum())
        known["prevalence"][split] = dict(zip(NAMES, labels.mean(axis=0).tolist(), strict=True))
        known["ceiling"][split] = float((signals == labels).mean())
        known["ceiling_f1"][split] = {
            name: float(b / e) if e else None for name, b, e in zip(NAMES, both, either, strict=True)
        }
    return known


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def _write_images(folder: Path, truth: pd.DataFrame, seed: int) -> None:
    for name in FOLDERS.values():
        (folder / name).mkdir()
    signals = truth[[name.replace("label", "signal") for name in NAMES]].to_numpy()
    for number, row in enumerate(truth.itertuples(), start=1):
        rng = np.random.default_rng([seed, len(FOLDERS), number])
        in_three_channels = rng.uniform() < 0.5
        image = np.zeros((_SIDE, _SIDE), np.uint8) if row.black else _draw_image(rng, signals[number - 1])
        path = folder / FOLDERS[row.split] / row.id
        write_image(path, cv2.merge([image] * 3) if in_three_channels else image)


def _draw_image(rng, signals) -> np.ndarray:
    """Return a uint8 image (64, 64): an anatomy, in it a shape for each signal that is 1, else a decoy."""
    centre, radii = rng.uniform(-0.12, 0.12, 2), rng.uniform(0.66, 0.98, 2)
    # Scan coordinates: the outer edge is where the radius is 1.
    u, v = rotated(_X - centre[0], _Y - centre[1], rng.uniform(0, np.pi))
    u, v = u / radii[0], v / radii[1]
    theta, radius = np.arctan2(v, u), np.hypot(u, v)
    for harmonic in (2, 3):
        radius = radius * (1 + rng.uniform(0, 0.08) * np.cos(harmonic * theta + rng.uniform(0, 2 * np.pi)))
    inner = radius / (1 - rng.uniform(0.04, 0.14))

    tissue = rng.uniform(85, 130) + _field(rng, 5, rng.uniform(20, 40)) + _field(rng, 8, rng.uniform(6, 16))
    for name, signal, place in zip(NAMES, signals, _places(rng), strict=True):
        extent = _SHAPE_RADIUS * rng.uniform(0.9, 1.1)
        x, y = rotated((_X - place[0]) / extent, (_Y - place[1]) / extent, rng.uniform(0, 2 * np.pi))
        tissue += _SHAPE_STRENGTH * rng.uniform(0.85, 1.15) * _shape(_SIGNALS[name][0] if signal else _DECOY, x, y)

    image = tissue * inside(inner, 0.05)
    image += rng.uniform(40, 200) * inside(radius, 0.04) * (1 - inside(inner, 0.04))
    image += (rng.uniform(0, 50) + _field(rng, 3, 10)) * (1 - inside(radius, 0.05))
    image *= rng.uniform(0.8, 1.2) * (1 + rng.uniform(-0.25, 0.25) * _X + rng.uniform(-0.25, 0.25) * _Y)
    image += rng.uniform(2, 6) * rng.standard_normal((_SIDE, _SIDE))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _places(rng) -> np.ndarray:
    """Centres (x, y) of the labels' shapes, about a third of a turn apart."""
    angles = 2 * np.pi / 3 * np.arange(3) + rng.uniform(-_TURN, _TURN) + rng.uniform(-0.25, 0.25, 3)
    return rng.uniform(*_PLACE_DISTANCE, 3)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _field(rng, nodes, deviation) -> np.ndarray:
    """Smooth field through a grid of random values."""
    values = deviation * rng.standard_normal((nodes, nodes))
    return cv2.resize(values, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)


def _shape(kind, x, y) -> np.ndarray:
    """Shape in the unit disc, of mean 0 in it and sum of squares 1 over the pixels."""
    radius = np.hypot(x, y)
    if kind == "ring":
        pattern = np.exp(-(((radius - 0.6) / 0.2) ** 2))
    elif kind == "spot":
        pattern = np.exp(-((radius / 0.4) ** 2))
    elif kind == "cross":
        pattern = np.exp(-((np.minimum(np.abs(x), np.abs(y)) / 0.25) ** 2))
    elif kind == "halves":
        pattern = np.tanh(x / 0.08)
    else:
        raise ValueError(f"shape {kind!r} is unknown; known are {_DECOY} and those of {_SIGNALS}.")
    window = inside(radius, 0.08)
    pattern = (pattern - (pattern * window).sum() / window.sum()) * window
    return pattern / np.linalg.norm(pattern)
