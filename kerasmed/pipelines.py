"""Manifest -> decoded store -> batches.

Decoding is what an epoch costs, so every image is decoded once, into one memory-mapped uint8 array that training
gathers whole batches from: a true shuffle of all rows every epoch, in memory that does not grow with the data set.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd

from kerasmed import atomic, batches, datasets, dicom, fanout, images, locks, paths, runs
from kerasmed import progress as bars
from kerasmed.manifest import check_paths

# Few enough to keep many cores at work on a few hundred images.
SHARD_ROWS = 64
_CONTENT = 4  # what a store and its shards hold; to be raised when that changes
# A change of the reader may alter pixels: stores made by another are not taken for current ones.
_READERS = b"".join(Path(module.__file__).read_bytes() for module in (images, dicom))
_MAKERS = hashlib.sha256(_READERS).hexdigest()[:16] + f"-{_CONTENT}"
_SYSTEM_REFUSED = "system refused:"
_HASHES = "hashes.json"  # of a store's small files
_ARRAYS = ("pixels", "thumbnails", "facts", "reasons")  # of a shard
logger = logging.getLogger(__name__)


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
    covers paths, sizes, modification times, target size and options. A store that has been damaged since is made again,
    as far as this can be seen without reading it all: a pixel of images.npy that has turned into another cannot. It is
    also made again where a file that the system refused, for want of a permission or memory, can now be read: each call
    tries those alone.

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
        ValueError: a path that `kerasmed.manifest.check_paths` refuses, such as one that leaves the root; or too large
            a share of the files is unreadable: names the first, with reasons.
        RuntimeError: a file was changed meanwhile.
    """
    root = Path(root)
    options = dict(read_options or {})
    image_paths = manifest["image_path"].tolist()
    check_paths(image_paths)
    states = _states(root, image_paths)
    target = paths.cache_root() / _store_fingerprint(image_paths, states, image_size, options)
    if _flaw(target, root, image_paths, image_size) is not None:
        with locks.held(target):
            flaw = _flaw(target, root, image_paths, image_size)
            if flaw is not None:  # else another process has made it meanwhile
                if flaw:
                    logger.warning("the decoded store %s %s", target, flaw)
                shutil.rmtree(target, ignore_errors=True)
                _build(target, image_paths, states, root, image_size, options, jobs, progress)
    quarantine = _read_quarantine(target)
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


def _flaw(target: Path, root: Path, image_paths, image_size) -> str | None:
    """Say why a store is to be made again: "" where there is none, None where it is whole and nothing can be added.

    Tables are compared with their hashes, arrays of gigabytes by their shapes alone.
    """
    if not target.is_dir():
        return ""
    try:
        lost = runs.changed(target, runs.read_json(target / _HASHES))
        quarantine = _read_quarantine(target)
        count = len(image_paths) - len(quarantine)
        for name, size in (("images", image_size), ("thumbnails", images.THUMBNAIL_SIZE)):
            array = np.load(target / f"{name}.npy", mmap_mode="r")
            if (array.shape, array.dtype) != ((count, *size), np.uint8):
                lost.append(f"{name}.npy")
    except (*runs.DAMAGED, AttributeError) as error:
        lost = [str(error)]
    if lost:
        return f"is damaged and is made again: {'; '.join(lost)}"
    refused = quarantine.loc[quarantine["reason"].str.startswith(_SYSTEM_REFUSED), "image_path"].tolist()
    granted = (path for path in refused if not _reason(root, path).startswith(_SYSTEM_REFUSED))
    found = list(itertools.islice(granted, SHARD_ROWS))  # a few tell as much as all, which would be decoded twice
    if not found:
        return None
    told = f"{'at least ' * (len(found) == SHARD_ROWS)}{len(found)} of the {len(refused)}"
    return f"is made again: {told} files that the system refused can now be read. First: {found[:3]}"


def _reason(root: Path, path: str) -> str:
    """Why a file cannot be read now; "" where it can."""
    _, _, _, (reason,) = decode_files(root, [path], (1, 1), {})
    return str(reason)


def _read_quarantine(target: Path) -> pd.DataFrame:
    """Read the names as they were written: scanners call files 6154, and one may be called NA."""
    return pd.read_csv(target / "quarantine.csv", dtype=str, keep_default_na=False)


def _states(root: Path, image_paths: Sequence[str]) -> list[tuple[int, int] | None]:
    """Size and modification time of each file; None where it is absent."""
    states = []
    for path in image_paths:
        try:
            state = os.stat(root / path)
            states.append((state.st_size, state.st_mtime_ns))
        except (OSError, ValueError):  # ValueError: a name that no file can have
            states.append(None)
    return states


def _store_fingerprint(image_paths, states, image_size, options) -> str:
    header = f"{_MAKERS} {tuple(image_size)} {sorted(options.items())}\n"
    digest = hashlib.sha256(header.encode())
    for path, state in zip(image_paths, states):
        told = "\0".join(map(str, state)) if state else "absent"
        digest.update(f"{path}\0{told}\n".encode())
    return digest.hexdigest()[:16]


def _build(target, image_paths, states, root, image_size, options, jobs, progress):
    """Make the missing shards, then join all into the store; the last step is a rename."""
    building = target.with_name(target.name + ".building")
    building.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(image_paths), SHARD_ROWS)
    shards = [building / f"{start:09d}.npy" for start in starts]
    parts = [image_paths[start : start + SHARD_ROWS] for start in starts]
    states = [states[start : start + SHARD_ROWS] for start in starts]
    tasks = {
        shard: (shard, root, part, image_size, options, state) for shard, part, state in zip(shards, parts, states)
    }
    finished = sum(len(part) for shard, part in zip(shards, parts) if shard.exists())
    with bars.bar(len(image_paths), "decode", unit="image", done=finished, shown=progress) as bar:
        # Threads: decoding and resizing release the interpreter's lock.
        for count in fanout.build(decode_shard, tasks, what="shards", jobs=jobs):
            bar.update(count)
    with atomic.whole_folder(target) as joined:
        _join(joined, shards, image_paths, image_size)
    shutil.rmtree(building, ignore_errors=True)


def decode_shard(
    shard: Path,
    root: Path,
    image_paths: Sequence[str],
    image_size: tuple[int, int],
    options: Mapping,
    states: Sequence[tuple[int, int] | None],
) -> int:
    """Decode some images into one shard file, written whole: `np.savez`, whose checksums tell of damage.

    Args:
        shard: file to write.
        root, image_paths, image_size, options: of `decode_files`.
        states: size and modification time of each file, by which the store is named; None for an absent one.

    Returns:
        Number of paths handled.

    Raises:
        RuntimeError: a file has another state now, so that its pixels may not be those that the store is named by.
    """
    arrays = dict(zip(_ARRAYS, decode_files(root, image_paths, image_size, options)))
    other = [path for path, now, told in zip(image_paths, _states(root, image_paths), states) if now != told]
    if other:
        raise RuntimeError(
            f"{len(other)} files were changed while they were decoded; give the command again when nothing writes to "
            f"{root}. First: {other[:3]}."
        )
    with atomic.whole(shard) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
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
        except MemoryError:
            reasons[row] = f"{_SYSTEM_REFUSED} out of memory"
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
    reasons, facts = map(np.concatenate, zip(*(_load_shard(shard, "reasons", "facts") for shard in shards)))
    count = int((reasons == "").sum())
    np.save(joined / "facts.npy", facts[reasons == ""])
    with contextlib.ExitStack() as stack:
        files = []
        for name, size in (("images", image_size), ("thumbnails", images.THUMBNAIL_SIZE)):
            files.append(stack.enter_context(open(joined / f"{name}.npy", "wb")))
            header = np.lib.format.header_data_from_array_1_0(np.empty((0, *size), np.uint8))
            np.lib.format.write_array_header_1_0(files[-1], header | {"shape": (count, *size)})
        for shard in shards:
            reasons_here, *arrays = _load_shard(shard, "reasons", "pixels", "thumbnails")
            kept = reasons_here == ""
            for file, array in zip(files, arrays):
                (array if kept.all() else array[kept]).tofile(file)
    quarantine = pd.DataFrame({"image_path": image_paths, "reason": reasons}).query("reason != ''")
    quarantine.to_csv(joined / "quarantine.csv", index=False)
    runs.write_json(joined / _HASHES, {name: runs.file_hash(joined / name) for name in ("facts.npy", "quarantine.csv")})


def _load_shard(shard: Path, *names: str) -> list[np.ndarray]:
    """Read arrays of what `decode_shard` wrote; one that is damaged is removed, so that the next call makes it."""
    try:
        with np.load(shard) as arrays:
            return [arrays[name] for name in names]
    except runs.DAMAGED as error:
        shard.unlink(missing_ok=True)
        raise RuntimeError(
            f"{shard} is damaged ({str(error) or type(error).__name__}) and was removed; give the command again, which "
            "makes it anew."
        ) from error


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
    return _parts(_inputs(pixels[..., None], beside, rows[chosen]), targets, weights, chosen)


def _inputs(pixels, beside, rows):
    """What a model takes: the pixels, or a dict of them and of its further inputs at the same rows."""
    return {"image": pixels, **{name: values[rows] for name, values in beside.items()}} if beside else pixels


def _parts(inputs, targets, weights, rows):
    """What Keras takes: inputs alone, or a tuple of them and of the targets and weights at some rows, if given."""
    others = [values[rows] for values in (targets, weights) if values is not None]
    return (inputs, *others) if others else inputs


def _empty(images_, rows, targets, *, beside=None, weights=None, **_):
    """A batch of no rows; refuses weights that are not beside the rows."""
    if weights is not None and (targets is None or np.shape(weights) != (len(rows),)):
        found = f"`weights` of shape {np.shape(weights)} with {'no' if targets is None else len(rows)} targets"
        raise ValueError(f"{found}; expected one weight a row, beside its target.")
    return _parts(_inputs(images_[:0][..., None], beside, slice(0)), targets, weights, slice(0))


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Return the number of batches that hold every row once."""
    return -(-num_rows // batch_size)


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
    """Make a dataset (`kerasmed.batches`) of the batches of epoch `first_epoch`, the next, and so on without end.

    Use it with `steps_per_epoch`. See `batch` for the arguments and further `options`.
    """
    steps = steps_per_epoch(len(rows), batch_size)

    def make(number):
        epoch, index = divmod(number, steps)
        return batch(images_, rows, targets, seed=seed, epoch=epoch, index=index, batch_size=batch_size, **options)

    return batches.numbered_dataset(make, _empty(images_, rows, targets, **options), first=first_epoch * steps)


def evaluation_dataset(
    images_: np.ndarray,
    rows: np.ndarray,
    targets: np.ndarray | None = None,
    *,
    batch_size: int = 64,
    beside: Mapping[str, np.ndarray] | None = None,
    weights: np.ndarray | None = None,
):
    """Make a dataset (`kerasmed.batches`) of every row once, in order, never augmented.

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
        here = np.arange(index * batch_size, min((index + 1) * batch_size, len(rows)))  # of a slice it would be a view
        return _parts(_inputs(images_[rows[here]][..., None], beside, rows[here]), targets, weights, here)

    empty = _empty(images_, rows, targets, beside=beside, weights=weights)
    return batches.numbered_dataset(make, empty, count=steps_per_epoch(len(rows), batch_size))


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
                    # Of several devices Keras asks each the whole batch, and gives the answers one after another.
                    probabilities[readable] = model.predict_on_batch(inputs)[: readable.sum()]
                table[[f"p_{name}" for name in class_names]] = probabilities
            tables.append(table)
            bar.update(len(reasons))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "image_path", names)
    return table
