"""Where each system's data lie, and readers from their real layout to a manifest.

A system's module (`datasets/<system>.py`) states `CLASS_NAMES` (part to classes), `EXCLUSIVE` (whether every image has
exactly one of them), `SOURCES` (part to link and licence, empty where there is no public link), `LAYOUT`,
`ARCHIVE_FOLDERS` (part to what its folder takes from the download: name there to folder or file in the archive; empty
where there is no download),
`TABLES` (files of a part's folder that are no images but belong there), `folder(root)` (where its data lie under a data
root, or None), `part_folder(root, part)` and `read(root, part)`; `datasets/synthetic/<system>.py` has
`write(root, **options)`, which writes `synthetic.json` and `truth.csv` into the system's folder.
"""

import hashlib
import importlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import joblib
import pandas as pd

from kerasmed import dicom, images, manifest, paths
from kerasmed.manifest import SPLITS

logger = logging.getLogger(__name__)

SYSTEMS = ("brain", "chest", "lumbar", "mura", "tritask")
DATA_SOURCES = ("auto", "real", "synthetic")
# Written into every synthetic set, so that it can never pass for real data.
SYNTHETIC_MARKER = "synthetic.json"
SYNTHETIC_FILES = (SYNTHETIC_MARKER, "truth.csv")


class Source(NamedTuple):
    """A data root and whether what lies there is "real" or "synthetic"."""

    root: Path
    kind: str


def reader(system: str):
    """Import the module that reads a system's layout."""
    if system not in SYSTEMS:
        raise ValueError(f"system {system!r} is unknown; known are {', '.join(SYSTEMS)}.")
    return importlib.import_module(f"kerasmed.datasets.{system}")


def kind(folder: Path) -> str:
    """Say whether a system's folder is "real" or "synthetic", by the marker that every synthetic set carries."""
    return "synthetic" if (folder / SYNTHETIC_MARKER).exists() else "real"


def locate(system: str, parameters: Mapping, *, data_root=None) -> Source:
    """Find a system's data, or write a synthetic set into the cache.

    Args:
        system: one of `SYSTEMS`.
        parameters: of a notebook. `data_source` is "real" (never falls back), "synthetic", or "auto": real where it is
            present, else synthetic. Where a data root was named (`data_root` or `$KERASMED_DATA`), "auto" takes what is
            there or refuses: a typo in a path must not turn into a synthetic result. `synthetic_<option>` are passed to
            the system's synthetic `write`; each combination of them has its own folder.
        data_root: see `kerasmed.paths.data_root`.

    Returns:
        `Source`.

    Raises:
        FileNotFoundError: real data are asked for and absent; says where they were looked for and how to get them.
        ValueError: unknown system or data source, synthetic data where real data are asked for, or a data root beside
            `data_source` "synthetic".
    """
    module = reader(system)
    data_source = parameters["data_source"]
    if data_source not in DATA_SOURCES:
        raise ValueError(f"`data_source` is {data_source!r}; expected one of {', '.join(DATA_SOURCES)}.")
    if data_source == "synthetic" and data_root:
        raise ValueError(
            f"a data root is named ({data_root}), but `data_source` is 'synthetic', which would ignore it; "
            "add -p data_source=real, or leave the data root out."
        )
    root = paths.data_root(data_root)
    folder = None if data_source == "synthetic" else module.folder(root)
    if folder and data_source == "real" and kind(folder) == "synthetic":
        raise ValueError(
            f"`data_source` is 'real', but {folder} holds a synthetic set ({SYNTHETIC_MARKER}); name another data root."
        )
    if folder:
        return Source(root, kind(folder))
    if data_source == "real" or (data_source == "auto" and paths.is_data_root_chosen(data_root)):
        links = ", ".join(link for link, _ in module.SOURCES.values())
        if module.ARCHIVE_FOLDERS:
            mend = f"Get them with `kerasmed data fetch {system}` or from {links}."
        elif links:
            mend = f"Get them from {links} and lay them out so, or name the data root that holds them."
        else:
            mend = "No public link is known: lay the files out by hand, or name the data root that holds them."
        raise FileNotFoundError(f"no {system} data under {root}; expected {module.LAYOUT}. {mend}")
    options = {
        name.removeprefix("synthetic_"): value for name, value in parameters.items() if name.startswith("synthetic_")
    }
    # What another version of the package has written is another set.
    writers = sorted((Path(__file__).parent / "synthetic").glob(f"{system}*.py"))
    code = b"".join(writer.read_bytes() for writer in writers)
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode() + code).hexdigest()[:10]
    target = paths.cache_root() / "synthetic" / f"{system}-{digest}"
    write_synthetic(system, target, **options)
    return Source(target, "synthetic")


def write_synthetic(system: str, root, **options) -> Path:
    """Write a system's synthetic set in its real layout under `root`; the options are those of its `write`."""
    reader(system)
    return importlib.import_module(f"kerasmed.datasets.synthetic.{system}").write(root, **options)


def truth(system: str, source: Source) -> dict:
    """Return what is known of a synthetic set (parameters, best attainable score), {} for real data."""
    marker = reader(system).folder(source.root) / SYNTHETIC_MARKER
    return json.loads(marker.read_text(encoding="utf-8")) if source.kind == "synthetic" else {}


def check(system: str, root, *, jobs: int = -1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Check layout, columns and labels of a system's data, and read every image; nothing is compared.

    Args:
        system: one of `SYSTEMS`.
        root: data root.
        jobs: joblib workers.

    Returns:
        Counts of images by part, split and class, and problems (part, file, problem), empty where all is well. Where
        an image may have several labels or none, "(none)", "(no label)" and "(all images)" stand beside the classes:
        images of which every label is known and none is 1, images of which no label is known, and all.
    """
    module = reader(system)
    root = Path(root)
    if module.folder(root) is None:
        return pd.DataFrame(), pd.DataFrame(
            [{"part": system, "file": str(root), "problem": f"no data; expected {module.LAYOUT}"}]
        )
    counts, problems = [], []
    for part, class_names in module.CLASS_NAMES.items():
        home = module.part_folder(root, part)
        if not home.is_dir():
            problems.append({"part": part, "file": str(home), "problem": "absent"})
            continue
        try:
            frame = module.read(root, part)
        except (ValueError, OSError) as error:
            problems.append({"part": part, "file": "", "problem": str(error)})
            continue
        counts.append(_count(frame, list(class_names), exclusive=module.EXCLUSIVE).assign(part=part))
        pictures = _pictures(root, frame)
        reasons = joblib.Parallel(n_jobs=jobs, prefer="threads")(
            joblib.delayed(_why_unreadable)(root / path) for path in pictures
        )
        problems += [
            {"part": part, "file": path, "problem": reason} for path, reason in zip(pictures, reasons) if reason
        ]
        expected = {home / name for name in module.TABLES}
        if kind(module.folder(root)) == "synthetic":
            expected |= {module.folder(root) / name for name in SYNTHETIC_FILES}
        listed = {*pictures, *(path.relative_to(root).as_posix() for path in expected)}
        present = [Path(entry.path).relative_to(root).as_posix() for entry in files(home)]
        problems += [
            {
                "part": part,
                "file": path,
                "problem": "left out: no image by its suffix, or not in a folder or table of images",
            }
            for path in present
            if path not in listed
        ]
    table = pd.concat(counts)[["part", "split", "class", "images"]] if counts else pd.DataFrame()
    # A name that is not in UTF-8 is told with its bytes as \xNN: no table and no terminal takes it as it is.
    problems = [{**row, "file": os.fsencode(row["file"]).decode(errors="backslashreplace")} for row in problems]
    return table, pd.DataFrame(problems, columns=["part", "file", "problem"])


def _pictures(root: Path, frame: pd.DataFrame) -> list[str]:
    """List the images of a manifest: of series all their DICOM files, not the middle ones alone."""
    if "series_path" not in frame.columns:
        return frame["image_path"].tolist()
    found = [Path(entry.path) for path in frame["series_path"] for entry in files(root / path)]
    return [path.relative_to(root).as_posix() for path in found if path.suffix.lower() in dicom.SUFFIXES]


def _count(frame: pd.DataFrame, class_names: list[str], *, exclusive: bool) -> pd.DataFrame:
    """Count images by split and class: split, class, images."""
    labels = frame[class_names]
    members = labels == 1  # an unknown label is not 1
    if not exclusive:
        members = members.assign(
            **{
                "(none)": (labels == 0).all(axis=1),
                "(no label)": labels.isna().all(axis=1),
                "(all images)": True,
            }
        )
    counts = members.groupby(frame["split"]).sum().rename_axis(columns="class")
    return counts.loc[[split for split in SPLITS if split in counts.index]].stack().rename("images").reset_index()


def _why_unreadable(path: Path) -> str:
    try:
        images.read(path)
    except (images.ImageError, OSError) as error:
        return str(error)
    return ""


def fetch(system: str, root, *, download: Callable[[str], str] | None = None) -> list[Path]:
    """Download a system's public sets with kagglehub and lay them out as the reader expects.

    kagglehub compares each archive with the md5 that the server states, where it states one: what was sent is what
    arrived. No sum of the sets themselves is published, so whether they are what they were cannot be said; here only
    the folders and files that an archive is known by are asked for, and `check` counts and reads what they hold.

    Args:
        system: one of `SYSTEMS`.
        root: data root to write to.
        download: function of a Kaggle handle -> folder of the unpacked archive; default kagglehub's, which wants the
            extra `data`, and Kaggle credentials for some sets.

    Returns:
        The folders and files made; those already there are left alone.

    Raises:
        ValueError: unknown system, or one that cannot be downloaded: no link is known, or it wants a registration.
        ImportError: kagglehub is not installed.
        FileNotFoundError: the archive has not the folders and files that it is known by.
    """
    module = reader(system)
    if not module.ARCHIVE_FOLDERS:
        links = "; ".join(f"{link} ({licence})" for link, licence in module.SOURCES.values())
        raise ValueError(
            f"{system} has no link to download from{f', only the page {links}' if links else ''}; lay its files out by "
            f"hand under {root}, as {module.LAYOUT}."
        )
    if download is None:
        try:
            import kagglehub
        except ImportError as error:
            raise ImportError("`kerasmed data fetch` wants kagglehub: pip install 'kerasmed[data]'.") from error
        download = kagglehub.dataset_download
    made = []
    for part, (link, _) in module.SOURCES.items():
        targets = {name: module.part_folder(root, part) / name for name in module.ARCHIVE_FOLDERS[part]}
        if all(target.exists() for target in targets.values()):
            continue
        archive = Path(download(link.split("/datasets/")[1]))
        for name, target in targets.items():
            origin = archive / module.ARCHIVE_FOLDERS[part][name]
            if not origin.exists():
                raise FileNotFoundError(
                    f"the archive of {link} has no {'file' if origin.suffix else 'folder'} "
                    f"{module.ARCHIVE_FOLDERS[part][name]}; it holds "
                    f"{sorted(path.name for path in archive.iterdir())}. Lay it out by hand as {module.LAYOUT}."
                )
            if not target.exists():
                unfinished = target.with_name(f".{target.name}.copying")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if origin.is_dir() else shutil.copy2)(origin, unfinished)
                unfinished.rename(target)
                made.append(target)
    return made


def files(folder: Path) -> Iterator[os.DirEntry]:
    """Yield every file below a folder in sorted order, but hidden ones (`.DS_Store`, `._image1.png`).

    Links are followed, to files and to folders; one to a folder that it lies in is left out with a warning, as it would
    lead round for ever, and one to nothing is yielded as a file.
    """
    yield from _files(folder, (os.path.realpath(folder),))


def _files(folder: Path, above: tuple[str, ...]) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                yield entry
                continue
            place = os.path.realpath(entry.path) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
            if place in above:
                logger.warning("%s is a link to a folder that it lies in (%s) and was left out", entry.path, place)
                continue
            yield from _files(Path(entry.path), (*above, place))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say: decoding says what is wrong with it
        return False


def image_files(path) -> tuple[Path, list[str]]:
    """List the images at a path: the file itself, whatever its name, or those below a folder.

    Below a folder a file is an image by its suffix, or, as scanners name theirs anyhow, by beginning as DICOM does. A
    warning counts the visible files that are neither.

    Returns:
        The folder, and the paths relative to it, "/" between folders, in sorted order.

    Raises:
        FileNotFoundError: no such path, or no image below it.
        ValueError: an image below the folder whose name is not in UTF-8 or holds a backslash.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name an image file or a folder of images.")
    if not path.is_dir():
        manifest.check_paths([path.name], "the name of the image")
        return path.parent, [path.name]
    names, others = [], []
    for entry in map(Path, files(path)):
        is_image = entry.suffix.lower() in images.SUFFIXES or (entry.is_file() and dicom.is_dicom(entry))
        (names if is_image else others).append(entry.relative_to(path).as_posix())
    manifest.check_paths(names, f"the path of an image below {path}")
    if not names:
        raise FileNotFoundError(
            f"no image under {path}; files ending in {', '.join(images.SUFFIXES)}, and DICOM of any name, are read."
        )
    if others:
        logger.warning("%d files are no images and were left out: %s", len(others), ", ".join(others[:3]))
    return path, names


def fingerprint(system: str, source: Source) -> str:
    """Hash the path, size and modification time of every file of a system's data.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(source.kind.encode())
    for entry in files(reader(system).folder(source.root)):
        path = os.path.relpath(entry.path, source.root)
        try:
            state = entry.stat()
            digest.update(os.fsencode(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n"))
        except OSError:  # a link to nothing: decoding names it
            digest.update(os.fsencode(f"{path}\0unreadable\n"))
    return digest.hexdigest()[:16]


def refuse_changed(system: str, source: Source, told: str) -> None:
    """Raise where a system's data are not those of a fingerprint any more.

    Called when a run has read all that it learns from, so that no figure is filed under other data than it is of: what
    changes later is not read again. It looks at every file once more, as `fingerprint`. A file that was changed and put
    back with its size and time in between is not noticed here; `pipelines.decode` and `series.convert` look at each
    file's state when they have read it.

    Args:
        system: one of `SYSTEMS`.
        source: from `locate`.
        told: from `fingerprint`, before anything was read.

    Raises:
        RuntimeError: they have changed.
    """
    now = fingerprint(system, source)
    if now != told:
        raise RuntimeError(
            f"the {system} data under {source.root} have changed since this run began (fingerprint {now}, then "
            f"{told}), so it cannot say which it is of; give the command again when nothing writes to them."
        )
