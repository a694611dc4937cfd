"""Run folders: one per notebook execution, written and read only here.

`models/<system>/<notebook>-<profile>-<10 hex>/` holds status.json, params.json, environment.json, split.csv,
history.csv, predictions.csv, metrics.json, the models, figures/ and notebook.ipynb; the variants of a notebook lie in
`variants/<name>/`; a notebook that only looks at data writes summary.json instead of metrics.json. A run is its folder,
a `Path`. The ten digits are a hash of the notebook, its parameters, the data's fingerprint, the sources and the Keras
backend, so the same work finds the same folder and any change finds another. Every file is written under a temporary
name and renamed: what has its final name is whole.
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kerasmed import atomic, locks, paths
from kerasmed.environment import backend

# Where things lie is no part of what a run computes.
LOCATION_PARAMETERS = ("data_root", "models_root")
WEIGHT_SUFFIXES = (".keras", ".h5", ".npz", ".pth")
KEY_DIGITS = 10
PROGRESS = "progress.json"  # of a run and of a training, only while somebody is at work on it
_PARTING_SECONDS = 20.0  # that the kernel of a killed command may take to end
_STATED = ("notebook", "profile", "data_source", "finished")  # by status.json of a complete run
_HELD: dict[Path, object] = {}  # run -> the lock that this kernel holds
# What reading a damaged file raises, by NumPy, zipfile, HDF5 and Keras.
DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, TypeError, NotImplementedError)
DAMAGED += (zipfile.BadZipFile, zlib.error, struct.error, MemoryError)
_RECORDED = (".json", ".csv", ".npz")  # of a run folder itself, status.json aside: status.json has their hashes


class Damaged(FileNotFoundError):
    """A complete run has lost a file, or one of its files is not as it was when the run ended."""


# --- files -----------------------------------------------------------------------------------------------------------


def _plain(value):
    """Turn NumPy values, paths, tuples and non-finite floats into what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(path: str | os.PathLike, content) -> None:
    """Write `content` whole; NumPy values are converted, NaN and infinity become null."""
    with atomic.whole(path) as temporary:
        temporary.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike):
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_mapping(path: str | os.PathLike) -> dict:
    """Read a JSON file that holds a mapping.

    Raises:
        ValueError: it holds anything else; says in words what.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        content = read_json(path)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}" if path.stat().st_size else "it is empty") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds {kind_of(content)}, no mapping")
    return content


def kind_of(value) -> str:
    """Name the kind of a JSON value."""
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def write_table(path: str | os.PathLike, frame: pd.DataFrame) -> None:
    """Write a DataFrame as CSV, whole, without its index."""
    with atomic.whole(path) as temporary:
        frame.to_csv(temporary, index=False)


def write_model(path: str | os.PathLike, model) -> None:
    """Write a Keras model as `.keras`, whole."""
    with atomic.whole(path) as temporary:
        model.save(temporary)


# --- identity --------------------------------------------------------------------------------------------------------


def sources_hash(notebook: str) -> str:
    """Hash the package's sources and the code cells of a notebook (but the parameters cell), hexadecimal."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes())
    path = paths.notebooks_root() / f"{notebook}.ipynb"
    if path.is_file():
        for cell in read_json(path)["cells"]:
            if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", ()):
                digest.update("".join(cell["source"]).encode())
    return digest.hexdigest()


def key(notebook: str, parameters: Mapping, fingerprint: str) -> str:
    """Hash what determines a run's results: notebook, parameters (not locations), data, sources and Keras's backend.

    TensorFlow, the usual backend, is not named in the hash; the same weights under another give other last digits.

    Returns:
        10 hexadecimal digits.
    """
    kept = {name: value for name, value in parameters.items() if name not in LOCATION_PARAMETERS}
    if "from_run" in kept:  # the folder's name tells the run, and its key; where it lies does not matter
        kept["from_run"] = Path(kept["from_run"]).name
    identity = {
        "notebook": notebook,
        "data": fingerprint,
        "sources": sources_hash(notebook),
        "parameters": kept,
    }
    if backend() != "tensorflow":
        identity["backend"] = backend()
    # A file of weights may hold others tomorrow.
    files = {name: Path(value) for name, value in kept.items() if str(value).endswith(WEIGHT_SUFFIXES)}
    for name, path in files.items():
        if path.is_file():
            identity[f"content of {name}"] = file_hash(path)
    return hashlib.sha256(json.dumps(_plain(identity), sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def folder(system: str, notebook: str, parameters: Mapping, fingerprint: str, *, models_root=None) -> Path:
    """Return the run folder that these inputs belong to, whether it exists or not."""
    name = f"{notebook}-{parameters['profile']}-{key(notebook, parameters, fingerprint)}"
    return paths.models_root(models_root) / system / name


# --- a run's life ----------------------------------------------------------------------------------------------------


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def start(
    system: str,
    notebook: str,
    parameters: Mapping,
    *,
    fingerprint: str,
    data_source: str,
    environment: Mapping,
    models_root=None,
) -> Path:
    """Open a run's folder, new or left by a killed run, and write its status, parameters and environment.

    Args:
        system: "brain", "chest", "lumbar", "mura" or "tritask".
        notebook: name without suffix, such as "07_brain_mri".
        parameters: name to value; `profile` among them.
        fingerprint: of the data, from `kerasmed.datasets.fingerprint`.
        data_source: "real" or "synthetic".
        environment: from `kerasmed.environment.setup`.
        models_root: see `kerasmed.paths.models_root`.

    Returns:
        The run folder.

    Raises:
        Busy: another process is writing it; says which.
    """
    run = folder(system, notebook, parameters, fingerprint, models_root=models_root)
    state = status(run)
    mine = state.get("host") == atomic.host_hash() and state.get("pid") in (os.getpid(), os.getppid())
    if locks.is_held(run) and not mine:
        raise locks.Busy(_busy(run))  # by a command that has not started this kernel
    _hold(run)
    (run / "figures").mkdir(parents=True, exist_ok=True)
    # Results of an earlier execution must not outlive it.
    for name in ("metrics.json", "draws.npz", "summary.json"):
        (run / name).unlink(missing_ok=True)
    write_json(run / "params.json", parameters)
    write_json(run / "environment.json", {**environment, "data_source": data_source, "fingerprint": fingerprint})
    mark_running(run, system, notebook, parameters["profile"], data_source=data_source)
    return run


def mark_running(run: Path, system: str, notebook: str, profile: str, *, data_source: str) -> None:
    """Write the status of a run that this process begins to write."""
    write_json(
        run / "status.json",
        {
            "status": "running",
            "system": system,
            "notebook": notebook,
            "profile": profile,
            "data_source": data_source,
            "started": _now(),
            "pid": os.getpid(),
            "host": atomic.host_hash(),
        },
    )


@contextlib.contextmanager
def reserved(run: Path, *, wait: float | None = None) -> Iterator[None]:
    """Keep all other processes off a run for the length of a block; see `kerasmed.locks`.

    Args:
        run: the run folder, which need not exist.
        wait: seconds to wait for another process that has it; None for as long as it takes.

    Raises:
        Busy: another process has it; says which, since when, and what to do.
    """
    try:
        with locks.held(run, wait=wait):
            # Of a killed command the kernel lives on for a moment, until it notices.
            kernel = locks.acquire(_kernel(run), wait=_PARTING_SECONDS if wait is not None else None)
            kernel.release()
            yield
    except locks.Busy as error:
        raise locks.Busy(_busy(run)) from error


def _kernel(run: Path) -> Path:
    """What the kernel that writes a run locks; the command that has started it locks the run itself."""
    return run.with_name(f"{run.name}.kernel")


def _hold(run: Path) -> None:
    """Lock a run for this kernel, which writes one at a time, until it is finished or the kernel ends."""
    if run in _HELD:
        return
    _let_go()
    try:
        _HELD[run] = locks.acquire(_kernel(run), wait=_PARTING_SECONDS)
    except locks.Busy as error:
        raise locks.Busy(_busy(run)) from error


def _let_go() -> None:
    while _HELD:
        _HELD.popitem()[1].release()


def _busy(run: Path) -> str:
    state = status(run)
    here = state.get("host") == atomic.host_hash()
    where = f"process {state['pid']} of this machine" if here else "a process of another machine"
    return f"{run} has been written by {where} since {state.get('started', 'a moment ago')}; wait for it, or stop it."


class Picture(NamedTuple):
    """A figure as it was written; a notebook that is given it shows that very file."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()

    def __repr__(self) -> str:
        return f"<figure {self.path.stem}>"


def save_figure(run: Path, figure, name: str) -> Picture:
    """Write a matplotlib figure to `figures/<name>.png`; one made from synthetic data says so on itself.

    To `display` what is returned spares a notebook drawing the figure a second time.
    """
    if read_json(run / "environment.json")["data_source"] == "synthetic":
        # Above all else: a legend outside the axes keeps to the lower edge of what is saved.
        figure.text(1, 1.0, "synthetic data", ha="right", va="bottom", fontsize=9, color="firebrick")
    path = run / "figures" / f"{name}.png"
    with atomic.whole(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    return Picture(path)


def variant_folder(run: Path, variant: str) -> Path:
    """Return (and make) the folder of a variant, `variants/<name>`; what suits no file name becomes one "-"."""
    path = run / "variants" / re.sub(r"[^\w.]+", "-", variant).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path


def promote(run: Path, variant: str, name: str) -> None:
    """Copy the model of the variant chosen on validation up to `<name>.keras`."""
    with atomic.whole(run / f"{name}.keras") as temporary:
        shutil.copyfile(variant_folder(run, variant) / "model.keras", temporary)


def finish(
    run: Path, *, headline: Sequence[Mapping], rows: Sequence[Mapping], chosen_by: Mapping | None = None
) -> dict:
    """Check and write metrics.json, with a hash of each model that was measured, and mark the run complete.

    Args:
        run: the run folder.
        headline: the rows that answer the notebook's question; their values are finite. Their `draws`, where they have
            them, go to draws.npz, by position, so that runs can be compared draw by draw.
        rows: dicts of `kerasmed.metrics.multiclass_rows`: task, variant, split, metric, label, value, ci95, n,
            n_groups, baseline. An undefined value is None or NaN and has a `reason`.
        chosen_by: metric, split and value that runs may be chosen by, such as of a sweep: never of the test split.

    Returns:
        What was written; `chosen_by` with `images`, a hash of its split in split.csv, or None without one.

    Raises:
        ValueError: no headline, a headline value that is not finite or has no baseline, an undefined row without a
            reason, or `chosen_by` looks at the test split or is not finite.
    """
    if not headline:
        raise ValueError("`headline` is empty; name at least one row that answers the notebook's question.")
    for row in headline:
        if row["value"] is None or not math.isfinite(row["value"]):
            raise ValueError(
                f"headline {row['task']} {row['metric']} is {row['value']}; it must be finite: {row.get('reason')}"
            )
        if not row["baseline"]:
            raise ValueError(f"headline {row['task']} {row['metric']} has no baseline beside it.")
    for row in rows:
        if (row["value"] is None or not math.isfinite(row["value"])) and not row.get("reason"):
            raise ValueError(f"row {row['variant']} {row['metric']} {row['label']} has no value and no `reason`.")
    if chosen_by and (chosen_by["split"].startswith("test") or not math.isfinite(chosen_by["value"])):
        raise ValueError(f"`chosen_by` is {dict(chosen_by)}; expected a finite value of a split that is not the test.")
    content = {
        "data_source": read_json(run / "environment.json")["data_source"],
        "chosen_by": chosen_by and {**chosen_by, "images": _images_of(run, chosen_by["split"])},
        "headline": [_without_draws(row) for row in headline],
        "rows": [_without_draws(row) for row in rows],
        "weights": {path.relative_to(run).as_posix(): file_hash(path) for path in sorted(run.rglob("*.keras"))},
    }
    with atomic.whole(run / "draws.npz") as temporary:
        np.savez(temporary, **{str(number): row["draws"] for number, row in enumerate(headline) if "draws" in row})
    write_json(run / "metrics.json", content)
    set_status(run, "complete", files=_recorded(run))
    _let_go()
    return content


def _images_of(run: Path, split: str) -> str | None:
    """Hash the rows of a split in split.csv, of folds all but the test: values over other ones are of other images."""
    if not (run / "split.csv").exists():
        return None
    lines = pd.read_csv(run / "split.csv", dtype=str, keep_default_na=False)
    of_split = lines["split"] == split
    lines = lines[of_split if of_split.any() else ~lines["split"].str.startswith("test")]
    told = lines.to_csv(index=False).encode()
    return hashlib.sha256(told).hexdigest()[:16] if len(lines) else None


def _without_draws(row: Mapping) -> dict:
    return {name: value for name, value in row.items() if name != "draws"}


def file_hash(path: str | os.PathLike) -> str:
    """Hash the content of a file, hexadecimal SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """Hash the files of a folder (not of those below it) that end in one of some suffixes, by name."""
    found = sorted(path for path in folder.iterdir() if path.suffix in suffixes and not path.name.startswith("."))
    return {path.name: file_hash(path) for path in found}


def _recorded(run: Path) -> dict[str, str]:
    """Hash what a complete run is read by; status.json, where the hashes go, and progress.json, which goes, aside."""
    return {name: told for name, told in hashes(run, _RECORDED).items() if name not in ("status.json", PROGRESS)}


def summarize(run: Path, summary: Mapping) -> dict:
    """Write summary.json and mark the run complete: what `finish` is to a notebook that trains nothing.

    Args:
        run: the run folder.
        summary: plain facts, nested as they come; what does not exist is None or left out. `headline` among them: a
            list of sentences that say the main facts, which the command prints after the run.

    Returns:
        What was written: `data_source` and the summary.

    Raises:
        ValueError: no headline, or a number that is not finite; names where it stands.
    """
    if not summary.get("headline") or isinstance(summary["headline"], str):
        raise ValueError("`summary` has no `headline`; give it a list of sentences that say the main facts.")
    endless = list(_not_finite(summary))
    if endless:
        raise ValueError(
            f"{len(endless)} numbers of `summary` are not finite; leave them out, or write None. First: {endless[:3]}."
        )
    content = {"data_source": read_json(run / "environment.json")["data_source"], **summary}
    write_json(run / "summary.json", content)
    set_status(run, "complete", files=_recorded(run))
    _let_go()
    return content


def _not_finite(value, where: str = "") -> Iterator[str]:
    """Yield the places of NaN and infinity in nested dicts, lists and arrays, such as "a.files.0"."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple, np.ndarray)):
        for position, item in enumerate(value):
            yield from _not_finite(item, f"{where}.{position}")
    elif isinstance(value, (float, np.floating)) and not math.isfinite(value):
        yield where.removeprefix(".")


def set_status(run: Path, status: str, **details) -> None:
    """Update status.json: "running", "complete" or "failed", the time, and any details."""
    path = run / "status.json"
    current = read_json(path) if path.exists() else {}
    write_json(path, {**current, "status": status, "finished": _now(), **details})


# --- reading ---------------------------------------------------------------------------------------------------------


def status(run: Path) -> dict:
    """Read status.json; a run marked "running" that no process has locked any more reads as "interrupted".

    Without the file it is "absent"; one that cannot be read, or has no status, is "unreadable", with the reason as
    `error`.
    """
    path = run / "status.json"
    if not path.exists():
        return {"status": "absent"}
    try:
        current = read_mapping(path)
        if "status" not in current:
            raise ValueError("it has no `status`")
        if not isinstance(current["status"], str):
            raise ValueError(f"its `status` is {kind_of(current['status'])}, no text")
    except ValueError as error:
        return {"status": "unreadable", "error": f"status.json: {error}"}
    except OSError as error:
        return {"status": "unreadable", "error": f"status.json: {error.strerror}"}
    if current["status"] == "running" and not (locks.is_held(run) or locks.is_held(_kernel(run))):
        current["status"] = "interrupted"
    return current


def damaged(run: Path, *, only: Sequence[str] | None = None, models: bool = False) -> list[str]:
    """List the files of a complete run that are absent or not as `finish` or `summarize` left them.

    Args:
        run: the run folder. Of one that an earlier version of the package wrote nothing is known, and nothing listed.
        only: look at files of these names alone.
        models: look at the models as well, but those of variants, by the hashes of metrics.json: of gigabytes, a second
            each.
    """
    told = status(run).get("files")
    told = (
        {name: value for name, value in told.items() if only is None or name in only} if isinstance(told, dict) else {}
    )
    if models and (run / "metrics.json").exists() and "metrics.json" not in changed(run, told):
        weights = read_json(run / "metrics.json").get("weights") or {}
        told |= {name: value for name, value in weights.items() if not name.startswith("variants/")}
    return changed(run, told)


def changed(folder: Path, told: Mapping[str, str]) -> list[str]:
    """List the files of a folder that are absent, or whose hash is not the one told."""
    return [name for name, value in told.items() if not (folder / name).is_file() or file_hash(folder / name) != value]


def find(
    system: str,
    notebook: str | None = None,
    *,
    run: str | os.PathLike = "auto",
    fingerprint: str | None = None,
    profile: str | None = None,
    models_root=None,
) -> Path:
    """Find the run that a later step builds on.

    Args:
        system: whose runs.
        notebook: of which notebook; None for any that has metrics: nothing builds on a mere look at the data.
        run: "auto" to choose among the complete ones, or the path or the folder name of one.
        fingerprint: of the data that it must have been made with; None for any.
        profile: of the later step, which "auto" prefers; None for no preference.
        models_root: see `kerasmed.paths.models_root`.

    Returns:
        The run folder, complete. "auto" prefers, in this order, runs on real data to runs on synthetic data, runs of
        `profile` to those of others, and the newest.

    Raises:
        FileNotFoundError: there is none, with the command that makes one; or the one named is of another notebook, or
            was made with other data.
        Damaged: a file of the one found is not as the run left it; likewise a FileNotFoundError.
    """
    home = paths.models_root(models_root) / system
    command = f"`kerasmed run {notebook or 'NOTEBOOK'}{f' --profile {profile}' if profile else ''}`"
    same = "synthetic data are the same only with the size and the seed of the earlier run"
    if str(run) != "auto":
        for candidate in (Path(run), home / str(run)):
            if (candidate / "status.json").exists():
                if status(candidate)["status"] != "complete":
                    raise FileNotFoundError(
                        f"run {candidate} is {status(candidate)['status']}, not complete; finish it with {command}."
                    )
                if unstated := _unstated(candidate):
                    raise Damaged(
                        f"status.json of run {candidate} does not say {', '.join(unstated)}: it is "
                        f"damaged; make the run anew with {command}."
                    )
                _undamaged(candidate)
                if not _is_fit(candidate, notebook):
                    raise FileNotFoundError(
                        f"run {candidate} only looks at data and has no model; make one with {command}."
                    )
                if notebook not in (None, status(candidate)["notebook"]):
                    raise FileNotFoundError(
                        f"run {candidate} is of {status(candidate)['notebook']}, expected one of {notebook}; name "
                        f"another, or make one with {command}."
                    )
                if fingerprint not in (None, _data_of(candidate)):
                    raise FileNotFoundError(
                        f"run {candidate} was made with other data (fingerprint {_data_of(candidate)}, here it is "
                        f"{fingerprint}), so its split is not this one's; make one with these by {command}, or read "
                        f"those: {same}."
                    )
                return candidate
        raise FileNotFoundError(f"no run folder at {run}, nor under {home}; make one with {command}.")
    complete = [
        path.parent
        for path in home.glob(f"{notebook or ''}*/status.json")
        if status(path.parent)["status"] == "complete"
        and not _unstated(path.parent)
        and _is_fit(path.parent, notebook)
        and fingerprint in (None, _data_of(path.parent))
    ]
    if not complete:
        what, hint = (f"{notebook or system} on these data", f" ({same})") if fingerprint else (notebook or system, "")
        raise FileNotFoundError(f"no complete run of {what} under {home}; make one with {command}{hint}.")

    def rank(path):
        state = status(path)
        return state["data_source"] == "real", state["profile"] == profile, state["finished"]

    return _undamaged(max(complete, key=rank))


def _undamaged(run: Path) -> Path:
    """Return a complete run if all is as it was when it was finished."""
    lost = damaged(run)
    if lost:
        raise Damaged(
            f"{', '.join(lost)} of run {run} is damaged, or was changed after the run; give the command that made the "
            "run again: it makes anew what is damaged."
        )
    return run


def _unstated(run: Path) -> list[str]:
    """List what the status.json of a complete run should say as text, and does not."""
    state = status(run)
    return [name for name in _STATED if not isinstance(state.get(name), str)]


def _is_fit(run: Path, notebook: str | None) -> bool:
    """Whether a later step can build on a run: any that has metrics, one that has a summary only if it asks for it."""
    return not (run / "summary.json").exists() or status(run)["notebook"] == notebook


def _data_of(run: Path) -> str | None:
    """Fingerprint of the data that a run was made with; None where that cannot be read: it hides no other run."""
    try:
        return read_json(run / "environment.json")["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
