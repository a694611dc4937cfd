"""DICOM series -> slices in order -> grey levels that compare -> one uint8 array a series on disk.

Decoding is what a pass over scans costs, so every series is decoded once, by as many processes as asked for, and all
normalisations are written from that. No name, id, date or free text of a DICOM header is written: studies and series go
by the ids of the manifest, files by their names.
"""

import hashlib
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd

from kerasmed import atomic, dicom, fanout, locks, paths, runs
from kerasmed import progress as bars
from kerasmed.manifest import check_paths

NORMALISATIONS = ("gsl", "hist")
PERCENTILES = (0.5, 99.5)  # of a series' values: what gsl shows black and white
COLUMNS = ("study_id", "series_id", "modality", "series_path")  # of a manifest
# A change of what is written must not take another's arrays for its own.
_MAKERS = hashlib.sha256(b"".join(Path(each).read_bytes() for each in (dicom.__file__, __file__))).hexdigest()[:16]
_SYSTEM_REFUSED = "system refused:"
_NO_DECODER = "the extra `dicom` installs further ones"  # how `dicom` ends a reason that another decoder may mend
_TABLES, _HASHES = ("index.csv", "slices.csv", "quarantine.csv"), "hashes.json"
_MIN_AGREEMENT = 0.7  # length of the mean normal: slices turned by 45° either way still make one stack
_WORDS = dict.fromkeys(("study_id", "series_id", "modality", "file", "path", "reason", "manufacturer", "sex"), str)
logger = logging.getLogger(__name__)


class Series(NamedTuple):
    """A series as it was read; slices may differ in size."""

    slices: list[dicom.Slice]  # in order
    table: pd.DataFrame  # beside the slices: position (0, 1, ...), file, instance_number
    ordered_by: str  # "position", "instance" or "name"
    acquisition: dict  # of the first slice, see `kerasmed.dicom.read_acquisition`
    quarantine: pd.DataFrame  # file, reason


class Volumes(NamedTuple):
    """What `convert` wrote; tables are in the order of the manifest."""

    folder: Path
    table: pd.DataFrame  # a row a series: study_id, series_id, modality, slices, ordered_by, `dicom.ACQUISITION`
    slices: pd.DataFrame  # a row a slice: study_id, series_id, position, file, instance_number
    quarantine: pd.DataFrame  # path of a file or series relative to the root, reason


# --- one series ------------------------------------------------------------------------------------------------------


def natural(name: str) -> tuple:
    """Return a key by which names sort as people count.

    Example:
        >>> sorted(["10.dcm", "9.dcm", "1.dcm"], key=natural)
        ['1.dcm', '9.dcm', '10.dcm']
    """
    parts = re.split(r"([0-9]+)", name)
    parts[1::2] = map(int, parts[1::2])
    return tuple(parts), name


def order(slices: Sequence[dicom.Slice]) -> tuple[list[int], str]:
    """Put slices in the order in which they lie in the body.

    A slice's normal is the cross product of its directions of rows and of columns. Axial stacks of the lumbar spine
    tilt a little from disc to disc, so the mean normal of the series is used, and slices are sorted by their position
    along it; where that is equal (to a micrometre) by instance number. The normal is turned so that its largest
    component is positive, whichever way the scanner counted: sagittal slices begin at the patient's right, axial ones
    at the feet, coronal ones at the front.

    Where a slice has no position or orientation, where all lie in one place, or where the normals have nothing in
    common, as in a scout of three planes, the instance number decides; where one is absent or all are the same, the
    order given does, which should be the natural order of the file names.

    Args:
        slices: in any order, but for the last case.

    Returns:
        list of positions in `slices`, in order; and what decided: "position", "instance" or "name".

    Source: DICOM PS3.3, C.7.6.2.1.1 (x grows to the patient's left, y to the back, z to the head).
    """
    numbers = [each.instance_number for each in slices]
    has_numbers = None not in numbers
    along = _along_normal(slices)
    if along:
        return sorted(range(len(slices)), key=lambda row: (along[row], numbers[row] if has_numbers else 0)), "position"
    if has_numbers and len(set(numbers)) > 1:
        return sorted(range(len(slices)), key=numbers.__getitem__), "instance"
    return list(range(len(slices))), "name"


def _along_normal(slices) -> list[float] | None:
    """Positions of slices along their mean normal, mm; None where it has no meaning."""
    if not slices or any(each.position is None or each.orientation is None for each in slices):
        return None
    normals = [np.cross(each.orientation[:3], each.orientation[3:]) for each in slices]
    lengths = [float(np.linalg.norm(normal)) for normal in normals]
    if min(lengths) < 0.1:  # of unit vectors, so these are no directions
        return None
    # Exact sums do not depend on the order in which files come, so neither do ties.
    mean = [math.fsum(normal[axis] / length for normal, length in zip(normals, lengths)) for axis in range(3)]
    if math.hypot(*mean) < _MIN_AGREEMENT * len(slices):
        return None
    largest = max(mean, key=lambda component: round(abs(component), 6))
    unit = [math.copysign(1, largest) * component / math.hypot(*mean) for component in mean]
    along = [round(math.fsum(map(math.prod, zip(unit, each.position))), 3) for each in slices]
    return along if len(slices) == 1 or len(set(along)) > 1 else None


def read(root, files: Iterable[str]) -> Series:
    """Read the files of one series and put their slices in order; a file that cannot be read is set aside.

    Slices are not stacked: those of one series may differ in size, and each has its own padding.

    Args:
        root: folder that the names are relative to.
        files: names, sorted by `natural`, as the order of last resort.

    Returns:
        `Series`, without slices where no file is readable.
    """
    root, found, quarantine = Path(root), [], []
    for file in files:
        try:
            found += [(file, each) for each in dicom.read_slices(root / file)]
        except dicom.ImageError as error:
            quarantine.append((file, str(error)))
        except OSError as error:
            absent = isinstance(error, FileNotFoundError)
            refused = f"{_SYSTEM_REFUSED} {type(error).__name__}: {error.strerror}"
            quarantine.append((file, "absent" if absent else refused))
        except MemoryError:
            quarantine.append((file, f"{_SYSTEM_REFUSED} out of memory"))
    rows, ordered_by = order([each for _, each in found])
    names, slices = [found[row][0] for row in rows], [found[row][1] for row in rows]
    table = {"position": range(len(rows)), "file": names, "instance_number": [each.instance_number for each in slices]}
    return Series(
        slices,
        pd.DataFrame(table).astype({"position": int, "file": str, "instance_number": "Int64"}),
        ordered_by,
        dicom.read_acquisition(root / names[0]) if names else dict.fromkeys(dicom.ACQUISITION),
        pd.DataFrame(quarantine, columns=["file", "reason"], dtype=str),
    )


def normalise(slices: Sequence[dicom.Slice], normalisation: str = "gsl", *, window: bool = False) -> list[np.ndarray]:
    """Turn the values of a series into 8 bits by one mapping for all its slices, so that these stay comparable.

    "gsl", grey-scale normalisation, is linear: from the 0.5th percentile of all values of the series to 0, from the
    99.5th to 255, clipped. A percentile p is the smallest value that at least p % of the values do not exceed. Where
    the two are equal, the range takes their place. "hist" is histogram equalisation of the values, at their full
    depth: a value v becomes 255 · (C(v) - C(least)) / (n - C(least)), where C(v) of the n values are not above v.

    Padding does not count and becomes 0. A series of one value becomes 0.

    Args:
        slices: of one series; sizes may differ.
        normalisation: one of `NORMALISATIONS`.
        window: for "gsl", let the window of the file take the place of the percentiles where all slices share one.

    Returns:
        list of uint8 arrays (height, width), beside `slices`.

    Raises:
        ValueError: unknown normalisation.
    """
    _check_normalisations([normalisation])
    return _normalise(slices, normalisation, window, _distribution(slices))


def _normalise(slices, normalisation, window, distribution) -> list[np.ndarray]:
    values, counts = distribution
    if not len(values):
        return [np.zeros(each.pixels.shape, np.uint8) for each in slices]
    to_grey = _equalising(values, counts) if normalisation == "hist" else _stretching(slices, window, values, counts)
    pictures = [to_grey(each.pixels) for each in slices]
    for picture, each in zip(pictures, slices):
        if each.padding is not None:
            picture[each.padding] = 0
    return pictures


def _distribution(slices) -> tuple[np.ndarray, np.ndarray]:
    """The values of a series without padding, ascending, and how often each occurs."""
    parts = [each.pixels.ravel() if each.padding is None else each.pixels[~each.padding] for each in slices]
    return np.unique(np.concatenate([np.empty(0, np.float32), *parts]), return_counts=True)


def _stretching(slices, window, values, counts):
    """Function of float pixels -> uint8: linear between the ends of the window, the percentiles or the range."""
    windows = {each.window for each in slices}
    if window and len(windows) == 1 and None not in windows:
        (centre, width) = windows.pop()
        low, high = centre - width / 2, centre + width / 2
    else:
        cumulative = np.cumsum(counts)
        ranks = [math.ceil(percentile * cumulative[-1] / 100) for percentile in PERCENTILES]
        low, high = (float(values[row]) for row in np.searchsorted(cumulative, ranks))
        if low == high:
            low, high = float(values[0]), float(values[-1])
    low, scale = np.float32(low), np.float32(min(255 / (high - low), 1e38) if high > low else 0)

    def stretch(pixels):
        with np.errstate(over="ignore"):  # a narrow window in a wide range; what overflows is clipped
            return np.rint(np.clip((pixels - low) * scale, 0, 255)).astype(np.uint8)

    return stretch


def _equalising(values, counts):
    """Function of float pixels -> uint8: the share of the values that are not above."""
    above_least = np.cumsum(counts) - counts[0]
    grey = np.rint(255 * above_least / max(above_least[-1], 1)).astype(np.uint8)
    low, scale = values[0], np.float32(min(65535 / float(values[-1] - values[0]), 1e38) if len(values) > 1 else 0)

    def level(pixels):
        return np.rint(np.clip((pixels - low) * scale, 0, 65535)).astype(np.uint16)

    levels = level(values)
    if (np.diff(levels.astype(int)) > 0).all():  # 16 bits tell all values apart, and a table is much the faster way
        table = np.zeros(65536, np.uint8)
        table[levels] = grey
        return lambda pixels: table[level(pixels)]
    return lambda pixels: grey[np.minimum(np.searchsorted(values, pixels), len(grey) - 1)]


def _check_normalisations(normalisations) -> None:
    unknown = [each for each in normalisations if each not in NORMALISATIONS]
    if unknown or not normalisations:
        raise ValueError(f"unknown normalisations {unknown} of {list(normalisations)}; expected of {NORMALISATIONS}.")


# --- many series -----------------------------------------------------------------------------------------------------


def convert(
    manifest: pd.DataFrame,
    root,
    *,
    image_size: tuple[int, int],
    normalisations: Sequence[str] = ("gsl",),
    window: bool = False,
    jobs: int = -1,
    max_quarantined_share: float = 0.05,
    folder=None,
    progress: bool = True,
) -> Volumes:
    """Write each series of a manifest as uint8 arrays (slices, height, width), or open what an earlier call wrote.

    A series is decoded once. Its arrays are `<folder>/<fingerprint>/<normalisation>/<study>/<series>.npy`, its table
    rows `<folder>/<fingerprint>/series/<study>/<series>.json`; each is written whole, the rows last, so that a killed
    call goes on where it stopped. hashes.json, written after the tables of all series and over them, marks the end;
    tables that have been damaged since are written again from the rows. The fingerprint covers the manifest's columns,
    the names, sizes and modification times of the series' files, the options and the sources. Series with files that
    the system refused, or that no decoder at hand could read, are tried again by every call.

    A series' files are the visible ones of its folder that end in one of `dicom.SUFFIXES`, in either case: copies such
    as 1.dcm.bak, Thumbs.db and notes count nowhere. Where none ends so, all visible files are taken, as scanners may
    name theirs anyhow.

    Work goes to processes: pydicom holds the interpreter's lock, and one file is read at a time in a process. See
    `kerasmed.fanout.shards` for a cluster. Of several processes that are asked one converts, the others wait.

    Args:
        manifest: rows with `COLUMNS`; series_path is a folder that holds one series.
        root: data root that the paths are relative to.
        image_size: (height, width) that slices are stretched or shrunk to, by area; their aspect ratio is not kept.
        normalisations: of `NORMALISATIONS`, see `normalise`; window likewise.
        jobs: joblib workers; -1 for one per core.
        max_quarantined_share: stop where more than this share of the files, or of the series, cannot be read.
        folder: where all is written; None for the cache (`kerasmed.paths.cache_root`).
        progress: show a bar.

    Returns:
        `Volumes`. A series with no readable file is in its quarantine and not in its tables, and so is a file that
        cannot be read; the rest of its series is kept.

    Raises:
        ValueError: a column is missing, a series is named twice, an id makes no file name, a series_path is one that
            `kerasmed.manifest.check_paths` refuses, an unknown normalisation, or too much is unreadable; names the
            first.
        RuntimeError: a series was changed meanwhile.
    """
    root, normalisations = Path(root), tuple(dict.fromkeys(normalisations))
    _check_normalisations(normalisations)
    asked = _asked(manifest)
    files = [_files(root / row.series_path) for row in asked.itertuples()]
    options = (tuple(image_size), sorted(normalisations), bool(window))
    target = Path(folder or paths.cache_root()) / _fingerprint(asked, files, options)
    if not _is_whole(target):
        with locks.held(target):
            if not _is_whole(target):  # another process may have made it meanwhile
                (target / _HASHES).unlink(missing_ok=True)
                _build(target, asked, root, files, tuple(image_size), normalisations, window, jobs, progress)
    volumes = Volumes(
        target,
        _read_csv(target / "index.csv"),
        _read_csv(target / "slices.csv").astype({"instance_number": "Int64"}),
        _read_csv(target / "quarantine.csv"),
    )
    _check_share(volumes, asked, sum(map(len, files)), max_quarantined_share)
    return volumes


def load(volumes: Volumes, normalisation: str, row: int) -> np.ndarray:
    """Open the array of a series, uint8 memory map (slices, height, width); `row` is a position in `volumes.table`.

    Each array that is kept holds a file open, of which systems often allow 1,024; keep copies of what is needed.

    Raises:
        ValueError: a normalisation that was not written, or an array that is damaged.
        FileNotFoundError: an array is gone.
    """
    if not (volumes.folder / normalisation).is_dir():
        written = [each for each in NORMALISATIONS if (volumes.folder / each).is_dir()]
        raise ValueError(f"{normalisation!r} was not written; `convert` was asked for {written}.")
    study, series = volumes.table.iloc[row][["study_id", "series_id"]]
    path = volumes.folder / normalisation / study / f"{series}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is gone; delete {volumes.folder} and give the command again.") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete {volumes.folder} and give the command again.") from error


def middle(volumes: Volumes, normalisation: str, image_size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Shrink the middle slice of each series by area: uint8 (num_series, height, width), beside `volumes.table`."""
    pictures = np.zeros((len(volumes.table), *image_size), np.uint8)
    for row in range(len(pictures)):
        volume = load(volumes, normalisation, row)
        pictures[row] = _resize(volume[len(volume) // 2], image_size)
    return pictures


def _resize(picture, image_size):
    return cv2.resize(np.ascontiguousarray(picture), image_size[::-1], interpolation=cv2.INTER_AREA)


def _asked(manifest) -> pd.DataFrame:
    """The manifest's columns that are used, as str, checked: ids become names of files."""
    missing = [name for name in COLUMNS if name not in manifest]
    if missing:
        raise ValueError(f"the manifest has no columns {missing}; expected {list(COLUMNS)}.")
    asked = manifest[list(COLUMNS)].astype(str).reset_index(drop=True)
    check_paths(asked["series_path"].tolist(), "column series_path")
    ids = asked[["study_id", "series_id"]]
    odd = ids[~ids.map(lambda name: bool(re.fullmatch(r"\w[\w.-]*", name))).all(axis=1)]
    if len(odd):
        raise ValueError(
            f"{len(odd)} rows have a study_id or series_id that makes no file name; expected letters, digits, '.', '_' "
            f"and '-'. First rows: {odd.index[:5].tolist()}."
        )
    if ids.duplicated().any():
        first = ids[ids.duplicated()].head(3).agg("/".join, axis=1).tolist()
        raise ValueError(f"{ids.duplicated().sum()} series are named twice; name each once. First: {first}.")
    return asked


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of a series' files, in natural order; none where the folder is absent."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".") and entry.is_file()]
            kept = [entry for entry in visible if entry.name.lower().endswith(dicom.SUFFIXES)] or visible
            states = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in kept]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(states, key=lambda state: natural(state[0]))


def _fingerprint(asked, files, options) -> str:
    digest = hashlib.sha256(f"{_MAKERS} {options}\n".encode())
    for row, states in zip(asked.itertuples(index=False), files):
        digest.update(f"{tuple(row)}{states}\n".encode())
    return digest.hexdigest()[:16]


def _may_pass(reason: str) -> bool:
    """Whether the cause may be gone next time though no file has changed: refused by the system, or no decoder."""
    return reason.startswith(_SYSTEM_REFUSED) or reason.endswith(_NO_DECODER)


def _read_csv(path) -> pd.DataFrame:
    # A file or series may be called NA.
    return pd.read_csv(path, dtype=_WORDS, keep_default_na=False, na_values=[""])


def _check_share(volumes, asked, num_files, share) -> None:
    num_series = len(asked) - len(volumes.table)
    num_bad = int((~volumes.quarantine["path"].isin(asked["series_path"])).sum())
    if num_series <= share * len(asked) and num_bad <= share * num_files:
        return
    first = "; ".join(f"{row.path}: {row.reason}" for row in volumes.quarantine.head(3).itertuples())
    raise ValueError(
        f"{num_bad} of {num_files} files and {num_series} of {len(asked)} series cannot be read, more than the share "
        f"of {share} that is put up with (`max_quarantined_share`). First: {first}. "
        f"All: {volumes.folder / 'quarantine.csv'}."
    )


def _build(target, asked, root, files, image_size, normalisations, window, jobs, progress) -> None:
    """Write the missing series, then the tables."""
    notes = [target / "series" / row.study_id / f"{row.series_id}.json" for row in asked.itertuples()]
    options = (image_size, normalisations, window)
    tasks = {
        note: (target, row.study_id, row.series_id, root / row.series_path, states, *options)
        for note, row, states in zip(notes, asked.itertuples(), files)
    }
    finished = sum(map(_is_done, notes))
    how = {"what": "series", "jobs": jobs, "prefer": "processes"}
    with bars.bar(len(notes), "convert", unit="series", done=finished, shown=progress) as bar:
        for _ in fanout.build(_convert_one, tasks, done=_is_done, **how):
            bar.update()
    _write_tables(target, asked, [runs.read_json(note) for note in notes])


def _is_whole(target: Path) -> bool:
    """Whether all series are written, none is worth another try, and the tables are as they were."""
    if not (target / _HASHES).exists():
        return False
    try:
        lost = runs.changed(target, dict.fromkeys(_TABLES) | runs.read_json(target / _HASHES))
        reasons = [] if lost else _read_csv(target / "quarantine.csv")["reason"]
    except (*runs.DAMAGED, AttributeError) as error:
        lost = [str(error)]
    if lost:
        logger.warning("tables of the series in %s are damaged and are made again: %s", target, "; ".join(lost))
        return False
    return not any(map(_may_pass, reasons))


def _is_done(note: Path) -> bool:
    try:
        return note.exists() and not any(_may_pass(reason) for _, reason in runs.read_json(note)["quarantine"])
    except (ValueError, TypeError, KeyError):  # damaged
        return False


def _convert_one(target, study_id, series_id, folder, states, image_size, normalisations, window) -> None:
    """Read one series and write its arrays, then its rows; refuse files that are not those it is named by any more."""
    series = read(folder, [name for name, *_ in states])
    if _files(folder) != states:
        raise RuntimeError(f"{folder} was changed while it was read; give the command again when nothing writes to it.")
    if series.slices:
        distribution = _distribution(series.slices)
        for normalisation in normalisations:
            pictures = _normalise(series.slices, normalisation, window, distribution)
            with atomic.whole(target / normalisation / study_id / f"{series_id}.npy") as temporary:
                np.save(temporary, np.stack([_resize(each, image_size) for each in pictures]), allow_pickle=False)
    row = {"slices": len(series.slices), "ordered_by": series.ordered_by, **series.acquisition}
    files = [
        [file, None if pd.isna(number) else int(number)] for _, file, number in series.table.itertuples(index=False)
    ]
    quarantine = series.quarantine.to_numpy().tolist()
    runs.write_json(
        target / "series" / study_id / f"{series_id}.json", {"row": row, "files": files, "quarantine": quarantine}
    )


def _write_tables(target, asked, notes) -> None:
    index, slices, quarantine = [], [], []
    for row, note in zip(asked.itertuples(), notes):
        quarantine += [(f"{row.series_path}/{file}", reason) for file, reason in note["quarantine"]]
        if not note["files"]:
            total = len(note["quarantine"])
            quarantine.append((row.series_path, f"none of its {total} files is readable" if total else "no files"))
            continue
        index.append({"study_id": row.study_id, "series_id": row.series_id, "modality": row.modality, **note["row"]})
        slices += [(row.study_id, row.series_id, at, *told) for at, told in enumerate(note["files"])]
    columns = ["study_id", "series_id", "modality", "slices", "ordered_by", *dicom.ACQUISITION]
    runs.write_table(
        target / "slices.csv",
        pd.DataFrame(slices, columns=["study_id", "series_id", "position", "file", "instance_number"]).astype(
            {"instance_number": "Int64"}
        ),
    )
    runs.write_table(target / "quarantine.csv", pd.DataFrame(quarantine, columns=["path", "reason"]))
    runs.write_table(target / "index.csv", pd.DataFrame(index, columns=columns))
    runs.write_json(target / _HASHES, {name: runs.file_hash(target / name) for name in _TABLES})
