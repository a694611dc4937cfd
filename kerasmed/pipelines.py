"""Manifest -> decoded store -> batches.

Decoding is what an epoch costs, so every image is decoded once, into one memory-mapped uint8 array that training
gathers whole batches from: a true shuffle of all rows every epoch, in memory that does not grow with the data set.
"""

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd

from kerasmed import datasets, dicom, fanout, images, locks, paths, runs
from kerasmed import progress as bars

# Few enough to keep many cores at work on a few hundred images.
SHARD_ROWS = 64
_CONTENT = 3  # what a store and its shards hold; to be raised when that changes
# A change of the reader may alter pixels: stores made by another are not taken for current ones.
_READERS = b"".join(Path(module.__file__).read_bytes() for module in (images, dicom))
_MAKERS = hashlib.sha256(_READERS).hexdigest()[:16] + f"-{_CONTENT}"
_SYSTEM_REFUSED = "system refused:"
_AT_ONCE = 2  # batches


class Store(NamedTuple):
    """Decoded images of a manifest, in its order, without those that could not be read."""

    images: np.ndarray  # uint8 memory map, (num_images, height, width)
    thumbnails: np.ndarray  # uint8 memory map, (num_images, 64, 64)
    manifest: pd.DataFrame  # the rows that were read; position = row of the arrays
    facts: pd.DataFrame  # of the decoded pictures, beside the manifest: the fields of `images.FACTS`
    quarantine: pd.DataFrame  # image_path, reason
    folder: Path


def rows(store: Store, split: str) -> np.ndarray:
    """Return the positions of a split's images in a store, int."""
    return np.flatnonzero(store.manifest["split"] == split)


def decode_options(parameters: Mapping) -> dict:
    """Pick out of a run's parameters what `decode`, `decode_stream` and `predict_files` do with a file."""
    options = {name: parameters[name] for name in ("fit", "interpolation", "equalize")}
    return {"image_size": tuple(parameters["image_size"]), "read_options": options}


# --- the decoded store -----------------------------------------------------------------------------------------------


def decode(
    manifest: pd.DataFrame,
    root,
    *,
    image_size: tuple[int, int],
    read_options: Mapping | None = None,
    jobs: int = -1,
    max_quarantined_share: float = 0.05,
    progress: bool = True,
) -> Store:
    """Decode every image of a manifest once, or open the store that an earlier call has finished.

    Work is done in shards of 64 images, each written whole, so that a killed call goes on where it stopped and shards
    may be made anywhere and in any order (`kerasmed.fanout.shards`). Of several processes one decodes, the others wait.
    The store is `<cache>/<fingerprint>/`: images.npy, thumbnails.npy, facts.npy and quarantine.csv; the fingerprint
    covers paths, sizes, modification times, target size and options.

    Args:
        manifest: rows with `image_path`.
        root: data root that the paths are relative to.
        image_size: (height, width) to resize to.
        read_options: further options of `kerasmed.images.read`.
        jobs: joblib workers; -1 for one per core.
        max_quarantined_share: stop where more than this share of the files cannot be read.
        progress: show a bar.

    Returns:
        `Store`; unreadable files are in its quarantine, with reasons, and not in its manifest.

    Raises:
        ValueError: too large a share of the files is unreadable; names the first, with reasons.
    """
    root = Path(root)
    options = dict(read_options or {})
    image_paths = manifest["image_path"].tolist()
    target = paths.cache_root() / _store_fingerprint(image_paths, root, image_size, options)
    if not _is_whole(target):
        with locks.held(target):
            if not _is_whole(target):  # another process may have made it meanwhile
                shutil.rmtree(target, ignore_errors=True)
                _build(target, image_paths, root, image_size, options, jobs, progress)
    quarantine = pd.read_csv(target / "quarantine.csv")
    if len(quarantine) > max_quarantined_share * len(manifest):
        first = "; ".join(f"{row.image_path}: {row.reason}" for row in quarantine.head(3).itertuples())
        raise ValueError(
            f"{len(quarantine)} of {len(manifest)} files cannot be read, more than the share of "
            f"{max_quarantined_share} that is put up with (`max_quarantined_share`). First: {first}. "
            f"All: {target / 'quarantine.csv'}."
        )
    readable = ~manifest["image_path"].isin(quarantine["image_path"])
    return Store(
        np.load(target / "images.npy", mmap_mode="r"),
        np.load(target / "thumbnails.npy", mmap_mode="r"),
        manifest[readable].reset_index(drop=True),
        pd.DataFrame(np.load(target / "facts.npy")),
        quarantine,
        target,
    )


def _is_whole(target: Path) -> bool:
    """Whether a store is there, and no file is worth another try: what the system refused, it may give now."""
    try:
        reasons = pd.read_csv(target / "quarantine.csv")["reason"]
    except FileNotFoundError:
        return False
    return not reasons.str.startswith(_SYSTEM_REFUSED).any()


def _store_fingerprint(image_paths, root, image_size, options) -> str:
    header = f"{_MAKERS} {tuple(image_size)} {sorted(options.items())}\n"
    digest = hashlib.sha256(header.encode())
    for path in image_paths:
        try:
            state = os.stat(root / path)
            digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path}\0absent\n".encode())
    return digest.hexdigest()[:16]


def _build(target, image_paths, root, image_size, options, jobs, progress):
    """Make the missing shards, then join all into the store; the last step is a rename."""
    building = target.with_name(target.name + ".building")
    building.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(image_paths), SHARD_ROWS)
    shards = [building / f"{start:09d}.npy" for start in starts]
    parts = [image_paths[start : start + SHARD_ROWS] for start in starts]
    tasks = {shard: (shard, root, part, image_size, options) for shard, part in zip(shards, parts)}
    finished = sum(len(part) for shard, part in zip(shards, parts) if shard.exists())
    with bars.bar(len(image_paths), "decode", unit="image", done=finished, shown=progress) as bar:
        # Threads: decoding and resizing release the interpreter's lock.
        for count in fanout.build(decode_shard, tasks, what="shards", jobs=jobs):
            bar.update(count)
    with runs.whole_folder(target) as joined:
        _join(joined, shards, image_paths, image_size)
    shutil.rmtree(building, ignore_errors=True)


def decode_shard(
    shard: Path, root: Path, image_paths: Sequence[str], image_size: tuple[int, int], options: Mapping
) -> int:
    """Decode some images into one shard file, written whole: `np.save` of reasons, facts, images and thumbnails.

    Returns:
        Number of paths handled.
    """
    pixels, thumbnails, facts, reasons = decode_files(root, image_paths, image_size, options)
    with runs.whole(shard) as temporary, open(temporary, "wb") as file:
        for array in (reasons, facts, pixels, thumbnails):
            np.save(file, array, allow_pickle=False)
    return len(image_paths)


def decode_files(
    root: Path, image_paths: Sequence[str], image_size: tuple[int, int], options: Mapping
) -> tuple[np.ndarray, ...]:
    """Decode image files, each once, and note why any could not be read.

    Returns:
        uint8 images (num_paths, height, width), uint8 thumbnails (num_paths, 64, 64), `images.FACTS` (num_paths,), and
        str reasons (num_paths,): "" for a file that was read; one that was not is black.
    """
    pixels = np.zeros((len(image_paths), *image_size), np.uint8)
    thumbnails = np.zeros((len(image_paths), *images.THUMBNAIL_SIZE), np.uint8)
    facts = np.zeros(len(image_paths), images.FACTS)
    reasons = [""] * len(image_paths)
    for row, path in enumerate(image_paths):
        try:
            image = images.read(root / path)
        except images.ImageError as error:
            reasons[row] = str(error)
        except OSError as error:
            absent = isinstance(error, FileNotFoundError)
            reasons[row] = "absent" if absent else f"{_SYSTEM_REFUSED} {type(error).__name__}: {error.strerror}"
        else:
            facts[row] = images.facts(image)
            thumbnails[row] = images.thumbnail(image)
            pixels[row] = images.finish(image, image_size=image_size, **options)
    return pixels, thumbnails, facts, np.array(reasons, dtype=str)


def decode_stream(
    root,
    image_paths: Sequence[str],
    *,
    image_size: tuple[int, int],
    read_options: Mapping | None = None,
    jobs: int = -1,
    chunk: int = 64,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decode files in parallel and in order without keeping them: for prediction, which looks at an image once.

    Yields:
        uint8 images (at most `chunk`, height, width) and str reasons, as `decode_files`.
    """
    parts = (image_paths[start : start + chunk] for start in range(0, len(image_paths), chunk))
    decoded = joblib.Parallel(n_jobs=jobs, prefer="threads", return_as="generator")(
        joblib.delayed(decode_files)(Path(root), part, image_size, dict(read_options or {})) for part in parts
    )
    for pixels, _, _, reasons in decoded:
        yield pixels, reasons


def _join(joined, shards, image_paths, image_size):
    reasons, facts = map(np.concatenate, zip(*(_load_shard(shard, 2) for shard in shards)))
    count = int((reasons == "").sum())
    np.save(joined / "facts.npy", facts[reasons == ""])
    with contextlib.ExitStack() as stack:
        files = []
        for name, size in (("images", image_size), ("thumbnails", images.THUMBNAIL_SIZE)):
            files.append(stack.enter_context(open(joined / f"{name}.npy", "wb")))
            header = np.lib.format.header_data_from_array_1_0(np.empty((0, *size), np.uint8))
            np.lib.format.write_array_header_1_0(files[-1], header | {"shape": (count, *size)})
        for shard in shards:
            reasons_here, _, *arrays = _load_shard(shard, 4)
            kept = reasons_here == ""
            for file, array in zip(files, arrays):
                (array if kept.all() else array[kept]).tofile(file)
    quarantine = pd.DataFrame({"image_path": image_paths, "reason": reasons}).query("reason != ''")
    quarantine.to_csv(joined / "quarantine.csv", index=False)


def _load_shard(shard: Path, num_arrays: int) -> list[np.ndarray]:
    """Read the first arrays of what `decode_shard` wrote."""
    with open(shard, "rb") as file:
        return [np.load(file) for _ in range(num_arrays)]


# --- batches ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def epoch_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order of rows in an epoch: a permutation drawn from (seed, epoch), int, shape (num_rows,)."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def batch(
    images_: np.ndarray,
    rows: np.ndarray,
    targets: np.ndarray,
    *,
    seed: int,
    epoch: int,
    index: int,
    batch_size: int,
    augment: Callable | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
    weights: np.ndarray | None = None,
) -> tuple:
    """Make one training batch, a function of (seed, epoch, index) alone.

    Args:
        images_: uint8, shape (num_images, height, width).
        rows: int, shape (num_rows,): which images, before shuffling.
        targets: shape (num_rows, ...), beside `rows`.
        seed, epoch, index: which batch.
        batch_size: rows a batch; an epoch's last batch may be smaller.
        augment: function (images, seed) -> images, from `kerasmed.augment.build`.
        beside: further inputs of a model, name -> array (num_images, ...) beside `images_`.
        weights: Keras's sample weights, float32, shape (num_rows,), beside `rows`: of the loss, not of the metrics.

    Returns:
        uint8 images (batch, height, width, 1), with `beside` a dict in which they are "image"; their targets; and, if
        given, their weights.
    """
    chosen = epoch_order(len(rows), seed=seed, epoch=epoch)[index * batch_size : (index + 1) * batch_size]
    pixels = images_[rows[chosen]]
    if augment is not None:
        pixels = augment(pixels, int(np.random.default_rng((seed, epoch, index)).integers(2**31)))
    inputs = _inputs(pixels[..., None], beside, rows[chosen])
    return (inputs, targets[chosen]) if weights is None else (inputs, targets[chosen], weights[chosen])


def _inputs(pixels, beside, rows):
    """What a model takes: the pixels, or a dict of them and of its further inputs at the same rows."""
    return {"image": pixels, **{name: values[rows] for name, values in beside.items()}} if beside else pixels


def _signature(images_, rows, beside, targets, weights):
    """Shapes and types of a batch of any number of rows; refuses weights that are not beside the rows."""
    import tensorflow as tf

    def spec(values):
        return tf.TensorSpec((None, *values.shape[1:]), values.dtype)

    if weights is not None and (targets is None or np.shape(weights) != (len(rows),)):
        found = f"`weights` of shape {np.shape(weights)} with {'no' if targets is None else len(rows)} targets"
        raise ValueError(f"{found}; expected one weight a row, beside its target.")
    inputs = tf.TensorSpec((None, *images_.shape[1:], 1), tf.uint8)
    if beside:
        inputs = {"image": inputs, **{name: spec(values) for name, values in beside.items()}}
    others = [spec(values) for values in (targets, weights) if values is not None]
    return (inputs, *others) if others else inputs


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Return the number of batches that hold every row once."""
    return -(-num_rows // batch_size)


class _AtWork:
    """Counts the batches that are being made, so that the interpreter can end between them.

    A dataset without end that is still there when Python ends makes batches ahead: one that is under way then would
    wait for an interpreter that waits for it. From that moment on batches are empty, which fills the queues at once.
    """

    def __init__(self):
        self._changed, self._count, self._closing, self._used = threading.Condition(), 0, False, False

    def __enter__(self) -> bool:
        with self._changed:
            self._count += 1
            self._used = True
            return self._closing

    def __exit__(self, *_):
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def close(self):
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._count)
        if self._used:
            time.sleep(0.1)  # for the queues


_at_work = _AtWork()
atexit.register(_at_work.close)


def numbered_dataset(make: Callable[[int], object], signature, *, first: int = 0, count: int | None = None):
    """Make a `tf.data.Dataset` of what a function makes of a batch's number, two batches at once and two ahead.

    Args:
        make: number -> nested dicts and tuples of arrays; called from several threads.
        signature: `tf.TensorSpec` of each array, nested alike.
        first: number of the first batch.
        count: of batches; None for no end.

    Returns:
        Dataset, in the order of numbers.
    """
    import tensorflow as tf

    # Not `from_generator`: it has the C library give back every array's memory, which costs half of the speed.
    specs = tf.nest.flatten(signature)

    def arrays_of(number):
        with _at_work as closing:
            if closing:
                return [np.zeros([size or 0 for size in one.shape], one.dtype.as_numpy_dtype) for one in specs]
            return tf.nest.flatten(make(int(number)))

    def batch_of(number):
        arrays = tf.numpy_function(arrays_of, [number], [one.dtype for one in specs])
        for array, spec in zip(arrays, specs):
            array.set_shape(spec.shape)
        return tf.nest.pack_sequence_as(signature, arrays)

    numbers = tf.data.Dataset.counter(first) if count is None else tf.data.Dataset.range(first, first + count)
    found = numbers.map(batch_of, num_parallel_calls=_AT_ONCE).prefetch(_AT_ONCE)
    # There is nothing to tune, and tf.data's autotuner sleeps ever longer, and may not wake where a dataset ends:
    # `predict` and `evaluate` then stand still for up to as long as they took.
    options = tf.data.Options()
    options.autotune.enabled = False
    return found.with_options(options)


def training_dataset(
    images_: np.ndarray,
    rows: np.ndarray,
    targets: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    first_epoch: int = 0,
    **options,
):
    """Make a `tf.data.Dataset` of the batches of epoch `first_epoch`, the next, and so on without end.

    Use it with `steps_per_epoch`. See `batch` for the arguments and further `options`.
    """
    steps = steps_per_epoch(len(rows), batch_size)

    def make(number):
        epoch, index = divmod(number, steps)
        return batch(images_, rows, targets, seed=seed, epoch=epoch, index=index, batch_size=batch_size, **options)

    signature = _signature(images_, rows, options.get("beside"), targets, options.get("weights"))
    return numbered_dataset(make, signature, first=first_epoch * steps)


def evaluation_dataset(
    images_: np.ndarray,
    rows: np.ndarray,
    targets: np.ndarray | None = None,
    *,
    batch_size: int = 64,
    beside: Mapping[str, np.ndarray] | None = None,
    weights: np.ndarray | None = None,
):
    """Make a `tf.data.Dataset` of every row once, in order, never augmented.

    Args:
        images_: uint8, shape (num_images, height, width).
        rows: int, shape (num_rows,).
        targets: shape (num_rows, ...); None for prediction.
        batch_size: rows a batch.
        beside, weights: as in `batch`.

    Returns:
        Dataset of images (batch, height, width, 1), or of dicts as in `batch`, with targets and weights if given.
    """

    def make(index):
        here = slice(index * batch_size, (index + 1) * batch_size)
        inputs = _inputs(images_[rows[here]][..., None], beside, rows[here])
        others = [values[here] for values in (targets, weights) if values is not None]
        return (inputs, *others) if others else inputs

    signature = _signature(images_, rows, beside, targets, weights)
    return numbered_dataset(make, signature, count=steps_per_epoch(len(rows), batch_size))


def datasets_of(
    store: Store,
    targets: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    augment: Callable | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
    weights: np.ndarray | None = None,
) -> tuple[Callable, object]:
    """Make what `kerasmed.training.fit` takes of a store whose manifest is split.

    Args:
        store: with "train" and "valid" in its manifest's `split`.
        targets: shape (num_images, ...), beside the store.
        batch_size: training images a step.
        seed: of shuffle and augmentation.
        augment: from `kerasmed.augment.build`; of training images alone.
        beside: as in `batch`.
        weights: Keras's sample weights, float32, shape (num_images,), beside the store; of both splits' losses.

    Returns:
        Function of the first epoch -> training dataset without end; and the validation dataset.
    """
    train, valid = rows(store, "train"), rows(store, "valid")

    def train_from(first_epoch):
        return training_dataset(
            store.images,
            train,
            targets[train],
            batch_size=batch_size,
            seed=seed,
            first_epoch=first_epoch,
            augment=augment,
            beside=beside,
            weights=None if weights is None else weights[train],
        )

    valid_weights = None if weights is None else weights[valid]
    return train_from, evaluation_dataset(store.images, valid, targets[valid], beside=beside, weights=valid_weights)


# --- prediction ------------------------------------------------------------------------------------------------------


def predict_files(
    path,
    models: Sequence[tuple],
    *,
    image_size: tuple[int, int],
    read_options: Mapping | None = None,
    beside: Callable[[Sequence[str]], Mapping[str, np.ndarray]] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Predict raw image files, each read once and not kept.

    Args:
        path: an image file or a folder, searched through; see `kerasmed.datasets.image_files`.
        models: (Keras model, uint8 (batch, height, width, 1) -> probabilities; names of its classes) each.
        image_size, read_options: as in the models' training.
        beside: function of image paths, as in the table -> the models' further inputs, as in `batch`.
        progress: show a bar.

    Returns:
        DataFrame, a row a file: image_path (relative to the folder), error ("" or why it could not be read), and
        `p_<class>` of each model; NaN for unreadable files.

    Raises:
        FileNotFoundError: no such path, or no image below it.
    """
    root, names = datasets.image_files(path)
    tables = []
    with bars.bar(len(names), "predict", unit="image", shown=progress, file=sys.stderr) as bar:
        for pixels, reasons in decode_stream(root, names, image_size=image_size, read_options=read_options):
            readable = reasons == ""
            first = sum(map(len, tables))
            others = beside(names[first : first + len(reasons)]) if beside else None
            inputs = _inputs(pixels[readable][..., None], others, readable)
            table = pd.DataFrame({"error": reasons})
            for model, class_names in models:
                probabilities = np.full((len(reasons), len(class_names)), np.nan, np.float32)
                if readable.any():
                    probabilities[readable] = model.predict_on_batch(inputs)
                table[[f"p_{name}" for name in class_names]] = probabilities
            tables.append(table)
            bar.update(len(reasons))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "image_path", names)
    return table
