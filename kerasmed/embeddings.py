"""Series -> features of their slices, bags of them a study, and batches of bags.

A network that was not trained for the task turns each slice, or each depth position of a volume, into a vector; a
study's vectors of one modality are its bag. Networks see many slices at once, whatever series they are of, which is
what makes it quick on any device. Batch normalisation uses its stored statistics, never those of a batch: a slice's
vector does not depend on its neighbours in the batch.
"""

import functools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from kerasmed import atomic, batches, fanout, images, locks, modalities, pipelines, runs, saved_models
from kerasmed import progress as bars

SHARD_SLICES = 2048
SHARD_VOLUMES = 64
_PLACES = 16  # slices, by which a batch of bags grows
logger = logging.getLogger(__name__)
_LEAST_VARIANCE = 1e-3  # of a feature, over the mean of all


class Features(NamedTuple):
    """Vectors of slices or of depth positions."""

    values: np.ndarray  # float32 memory map, (num_rows, num_features)
    index: pd.DataFrame  # a row a vector: study_id, series_id, modality, position


# --- encoders --------------------------------------------------------------------------------------------------------


def calibrate(model: keras.Model, pictures: np.ndarray, *, batch_size: int = 64) -> None:
    """Give a network of random weights the statistics that its batch normalisations have on some pictures.

    Without them each block of a residual network doubles the variance of what passes through, and what comes out says
    little. The statistics are means over batches, each in training mode; the weights stay as they are, and no label is
    looked at. Take the pictures from the training split.

    Args:
        model: whose BatchNormalization layers are set.
        pictures: as the model takes them; at least one.
        batch_size: pictures that statistics are taken over; a smaller last batch is left out where there are others.

    Raises:
        ValueError: no pictures.
    """
    if not len(pictures):
        raise ValueError("there are no pictures to calibrate by; give some of the training split.")
    normalisations = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in normalisations]
    for number in range(max(1, len(pictures) // batch_size)):
        for layer in normalisations:
            layer.momentum = number / (number + 1)  # a running mean over the batches
        model(pictures[number * batch_size : (number + 1) * batch_size], training=True)
    for layer, momentum in zip(normalisations, momenta):
        layer.momentum = momentum


def encode_slices(
    encoder: keras.Model,
    depths: Sequence[int],
    load: Callable[[int], np.ndarray],
    folder: Path,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> np.ndarray:
    """Encode every slice of many series, in batches that know nothing of where a series ends.

    Parts of 2,048 slices are written whole as they come, so that a killed call goes on where it stopped.

    Args:
        encoder: uint8 (batch, height, width, 1) -> (batch, num_features).
        depths: slices of each series.
        load: function of a position among the series -> uint8 (depth, height, width); sizes alike but for the depth.
            It is asked when a series' turn comes: of thousands of memory maps, few are open at a time.
        folder: where `features.npy` goes; one that is there is opened. Name it by all that determines the features.
        batch_size: slices at once.
        progress: show a bar.

    Returns:
        float32 memory map, shape (total number of slices, num_features), in the order of series and slices.

    Raises:
        ValueError: no series.
    """
    ends = np.cumsum(depths)

    def gather(first, last):
        begin, end = np.searchsorted(ends, [first, last - 1], side="right")
        start = ends[begin] - depths[begin]
        slices = np.concatenate([np.array(load(int(row))) for row in range(begin, end + 1)])
        return slices[first - start : last - start, ..., None]

    return _encode(encoder, gather, int(ends[-1]) if len(ends) else 0, SHARD_SLICES, folder, batch_size, progress)


def encode_volumes(
    encoder: keras.Model,
    num_volumes: int,
    load: Callable[[int], np.ndarray],
    folder: Path,
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> np.ndarray:
    """Encode many series as volumes, each resampled to the size that the network takes.

    Args:
        encoder: uint8 (batch, depth, height, width, 1) -> (batch, positions, num_features).
        num_volumes: how many series.
        load, folder, progress: as of `encode_slices`.
        batch_size: volumes at once.

    Returns:
        float32 memory map, shape (number of series · positions, num_features).

    Raises:
        ValueError: no series.
    """
    shape, positions = encoder.input_shape[1:4], encoder.output_shape[1]

    def gather(first, last):
        return np.stack([resample(load(row), shape) for row in range(first, last)])[..., None]

    values = _encode(encoder, gather, num_volumes, SHARD_VOLUMES, folder, batch_size, progress)
    return values.reshape(num_volumes * positions, -1)


def resample(volume: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resample a volume: each slice to a size, by area, then along the depth, linearly between slices.

    The first and last slices stay where they are.

    Args:
        volume: uint8, shape (slices, height, width).
        shape: (depth, height, width) to make.

    Returns:
        uint8 array of that shape.

    Example:
        >>> resample(np.array([[[0]], [[100]]], np.uint8), (3, 1, 1)).ravel().tolist()
        [0, 50, 100]
    """
    depth, *image_size = shape
    if volume.shape[1:] != tuple(image_size):
        volume = np.stack([images.finish(np.ascontiguousarray(each), image_size=tuple(image_size)) for each in volume])
    places = np.linspace(0, len(volume) - 1, depth)
    below = np.minimum(places.astype(int), max(len(volume) - 2, 0))
    above = np.minimum(below + 1, len(volume) - 1)
    share = (places - below)[:, None, None].astype(np.float32)
    return np.rint(volume[below] * (1 - share) + volume[above] * share).astype(np.uint8)


def _encode(encoder, gather, count, shard_rows, folder, batch_size, progress) -> np.ndarray:
    """Predict rows 0 to `count` - 1 in shards, and join what they give."""
    if not count:
        raise ValueError("there is no series to encode; see the quarantine for why.")
    target = Path(folder) / "features.npy"
    if not _is_whole(target):
        with locks.held(target):
            if not _is_whole(target):  # another process may have made it meanwhile
                _build(encoder, gather, count, shard_rows, target, batch_size, progress)
    return np.load(target, mmap_mode="r")


def _is_whole(path: Path) -> bool:
    """Whether an array is there in full length, as far as its header tells; its values are not looked at."""
    if not path.exists():
        return False
    try:
        np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        logger.warning("%s is damaged and is made again: %s", path, error)
        return False
    return True


def _build(encoder, gather, count, shard_rows, target, batch_size, progress) -> None:
    building = target.with_suffix(".building")
    building.mkdir(parents=True, exist_ok=True)
    starts = {building / f"{first:09d}.npy": first for first in range(0, count, shard_rows)}
    model = encoder
    if fanout.scheduler():  # workers load the network, each once
        model = building / "encoder.keras"
        runs.write_model(model, encoder)
    tasks = {
        shard: (model, gather, first, min(first + shard_rows, count), shard, batch_size)
        for shard, first in starts.items()
    }
    finished = sum(task[3] - task[2] for shard, task in tasks.items() if _is_whole(shard))
    with bars.bar(count, "encode", done=finished, shown=progress) as bar:
        # This process alone has the device: one shard after the other.
        for number in fanout.build(_encode_shard, tasks, what="shards", done=_is_whole, jobs=1):
            bar.update(number)
    _join(target, list(tasks), count, encoder.name)
    shutil.rmtree(building)


def _encode_shard(encoder, gather, first, last, shard, batch_size) -> int:
    """Predict some rows into a file, written whole; return how many."""
    encoder = _loaded(encoder) if isinstance(encoder, Path) else encoder
    values = encoder.predict(_batches(gather(first, last), batch_size), verbose=0)
    with atomic.whole(shard) as temporary:
        np.save(temporary, values.astype(np.float32))
    return last - first


def _batches(rows, batch_size):
    """Make a dataset of an array's rows in order."""

    def make(number):
        return rows[number * batch_size : (number + 1) * batch_size]

    # `predict` would make a dataset of an array as well, one that tf.data tunes; see `batches.numbered_dataset`.
    return batches.numbered_dataset(make, rows[:0], count=pipelines.steps_per_epoch(len(rows), batch_size))


@functools.lru_cache(maxsize=1)
def _loaded(path: Path) -> keras.Model:
    return saved_models.read(path)


def _join(target, shards, count, name) -> None:
    """Write the shards one after the other: a memory map would be forced to the disk before it may be closed."""
    shape = np.load(shards[0], mmap_mode="r").shape[1:]
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
    with atomic.whole(target) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *shape)})
        for shard in shards:
            values = np.load(shard)
            if not np.isfinite(values).all():
                raise FloatingPointError(f"{name} gives values that are not finite; look at its weights.")
            values.tofile(file)


# --- bags ------------------------------------------------------------------------------------------------------------


def bag_rows(index: pd.DataFrame, study_ids: Sequence[str], modality: str) -> np.ndarray:
    """List the rows of each study's vectors of one modality; several series of it follow one another.

    Args:
        index: of `Features`; rows of a series are in order.
        study_ids: which studies, in order.
        modality: a value of the index's `modality`.

    Returns:
        int array, shape (num_studies, most vectors of a study): rows of the index, then -1.
    """
    of_study = index.groupby("study_id").indices
    wanted = (index["modality"] == modality).to_numpy()
    found = [of_study.get(study, np.zeros(0, int)) for study in study_ids]
    found = [rows[wanted[rows]] for rows in found]
    bags = np.full((len(found), max([1, *map(len, found)])), -1)
    for bag, rows in zip(bags, found):
        bag[: len(rows)] = rows
    return bags


def bag_average(values: np.ndarray, bags: np.ndarray) -> np.ndarray:
    """Average each bag's vectors.

    Args:
        values: float array, shape (num_rows, num_features).
        bags: of `bag_rows`.

    Returns:
        float32 array, shape (num_studies, num_features); NaN for an empty bag.
    """
    means = np.full((len(bags), values.shape[1]), np.nan, np.float32)
    for mean, bag in zip(means, bags):
        if bag[0] >= 0:
            mean[:] = values[bag[bag >= 0]].mean(axis=0)
    return means


def project(values: np.ndarray, width: int, *, seed: int = 0) -> np.ndarray:
    """Project vectors to fewer numbers by a random matrix of N(0, 1 / width), which keeps distances on average.

    Args:
        values: float array, shape (num_rows, num_features).
        width: numbers a row afterwards; 0, or not fewer than there are, leaves them as they are.
        seed: of the matrix.

    Returns:
        float32 array, shape (num_rows, width).

    Source: Johnson and Lindenstrauss 1984; Dasgupta and Gupta 2003, doi:10.1002/rsa.10073.
    """
    if not 0 < width < values.shape[1]:
        return values.astype(np.float32)
    matrix = np.random.default_rng(seed).normal(0, width**-0.5, (values.shape[1], width))
    return (values @ matrix.astype(np.float32)).astype(np.float32)


def bag_inputs(values: np.ndarray, bags: Mapping[str, np.ndarray], studies: np.ndarray) -> dict[str, np.ndarray]:
    """Gather what `models.attention_classifier` takes of some studies.

    Args:
        values: float32, shape (num_rows, num_features).
        bags: branch name -> `bag_rows`.
        studies: int, positions in the bags.

    Returns:
        dict: "<name>_slices", float32 (num_studies, S, num_features), 0 where there is none, and "<name>_mask", bool.
    """
    inputs = {}
    for name, rows in bags.items():
        chosen = rows[studies]
        mask = chosen >= 0
        gathered = np.zeros((*chosen.shape, values.shape[1]), np.float32)
        gathered[mask] = values[chosen[mask]]
        inputs |= {f"{name}_slices": gathered, f"{name}_mask": mask}
    return inputs


def stack_bags(bags: Sequence[np.ndarray]) -> np.ndarray:
    """Lay the bags of several modalities beside one another.

    Args:
        bags: of each modality, `bag_rows` of the same studies.

    Returns:
        int array, shape (num_studies, M, S), S the longest bag's length: rows of the features, then -1.

    Example:
        >>> stack_bags([np.array([[0, 1], [2, -1]]), np.array([[3], [-1]])]).tolist()
        [[[0, 1], [3, -1]], [[2, -1], [-1, -1]]]
    """
    longest = max(rows.shape[1] for rows in bags)
    return np.stack([np.pad(rows, ((0, 0), (0, longest - rows.shape[1])), constant_values=-1) for rows in bags], axis=1)


def modality_inputs(values: np.ndarray, bags: np.ndarray, shown: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Gather what `kerasmed.modalities.graded_fusion` takes, of no more places than these studies need.

    A few studies of a set have many more slices than the rest. The number of places is rounded up to a multiple of 16,
    so that batches come in few shapes.

    Args:
        values: float32, shape (num_rows, num_features).
        bags: of `stack_bags`, of the studies wanted.
        shown: bool, shape (num_studies, M): hide the other modalities, as if a study had none; None to show all.

    Returns:
        dict: "slices", float32 (num_studies, M, S, num_features), 0 where there is none, "slice_mask", bool, and
        "available", bool (num_studies, M).

    Raises:
        ValueError: a study without any modality, or of which none is shown.
    """
    longest = int((bags >= 0).sum(axis=-1).max(initial=0))
    bags = bags[..., : -(-longest // _PLACES) * _PLACES]
    mask = bags >= 0
    if shown is not None:
        mask = mask & shown[..., None]
    available = mask.any(axis=-1)
    modalities.refuse_empty(available)
    gathered = np.zeros((*bags.shape, values.shape[1]), np.float32)
    gathered[mask] = values[bags[mask]]
    return {"slices": gathered, "slice_mask": mask, "available": available}


def moments(values: np.ndarray, bags: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Take mean and variance of each feature over the vectors in some bags, to standardise by.

    A feature that hardly varies there must not become all that counts in another study: its variance is taken as a
    thousandth of the features' mean one, at least.

    Args:
        values: float array, shape (num_rows, num_features).
        bags: of `bag_rows`, of *training* studies.

    Returns:
        Two arrays (num_features,); None where all bags are empty.
    """
    chosen = values[bags[bags >= 0]]
    if not len(chosen):
        return None
    variance = chosen.var(axis=0)
    return chosen.mean(axis=0), np.maximum(variance, _LEAST_VARIANCE * variance.mean() + 1e-12)


def bag_dataset(
    values: np.ndarray,
    bags: Mapping[str, np.ndarray],
    studies: np.ndarray,
    targets: np.ndarray | None = None,
    **options,
):
    """Make a `dataset` of `bag_inputs` of some studies; `targets` lie beside `studies`."""
    return dataset(lambda rows: bag_inputs(values, bags, studies[rows]), len(studies), targets, **options)


def dataset(
    gather: Callable[[np.ndarray], dict[str, np.ndarray]],
    count: int,
    targets: np.ndarray | None = None,
    *,
    batch_size: int = 32,
    seed: int | None = None,
    first_epoch: int = 0,
):
    """Make a dataset (`kerasmed.batches`) of gathered rows: shuffled by epoch and without end, or each once, in order.

    Args:
        gather: function of int positions -> dict of arrays, whose first axis goes along with them; another axis may
            differ in length by batch, if it has length 0 for no positions.
        count: of rows: positions are 0 to `count` - 1.
        targets: shape (count, ...); None for prediction.
        batch_size: rows a batch.
        seed: of the shuffle, by epoch; None for every row once, in order.
        first_epoch: which epoch comes first.

    Returns:
        Dataset of dicts, with targets if given.
    """
    steps = pipelines.steps_per_epoch(count, batch_size)

    def make(number) -> tuple | dict:
        epoch, index = divmod(number, steps)
        order = np.arange(count) if seed is None else pipelines.epoch_order(count, seed=seed, epoch=epoch)
        chosen = order[index * batch_size : (index + 1) * batch_size]
        return gather(chosen) if targets is None else (gather(chosen), targets[chosen])

    empty = gather(np.zeros(0, int))
    empty = empty if targets is None else (empty, targets[:0])
    first, ends = first_epoch * steps, steps if seed is None else None
    return batches.numbered_dataset(make, empty, first=first, count=ends)


def write(path: Path, index: pd.DataFrame, values: np.ndarray) -> None:
    """Write embeddings as CSV, whole: the index's columns, such as study_id and series_id, then 0 … D − 1."""
    numbers = pd.DataFrame(values, columns=[str(place) for place in range(values.shape[1])])
    runs.write_table(path, pd.concat([index.reset_index(drop=True), numbers], axis=1))


def read(path: Path) -> pd.DataFrame:
    """Read embeddings that `write` wrote, ids as text."""
    return pd.read_csv(path, dtype={"study_id": str, "series_id": str})
