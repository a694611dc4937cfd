"""Run folders in MLflow, where they can be sorted, filtered and drawn beside one another.

A run folder is the record; MLflow holds a copy, which may be thrown away and made anew. Nothing is sent anywhere but to
the store that is named: MLflow's own telemetry is off. MLflow's tables get neither the user's nor the machine's name,
and of folders no more than where the store itself keeps artefacts.
"""

import contextlib
import datetime
import importlib.util
import json
import math
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

from kerasmed import locks, paths, runs

# What MLflow takes; a longer text is refused.
MAX_PARAMETER, MAX_NAME = 6000, 250
MAX_ERROR = 1000  # the whole text is in status.json
# Artefacts by suffix, and the bytes above which one stays where it is.
SUFFIXES = (".json", ".csv", ".npz", ".png", ".ipynb", ".html", ".keras")
MAX_MODEL, MAX_OTHER = 100_000_000, 50_000_000
SECONDS_TO_ANSWER = 4  # of a server, before a run is sent to it
# Read by MLflow; what the user has set is left, telemetry included.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # by default 120 seconds, and 7 trials: minutes for each request
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
_FOLDERS = re.compile(r"""(?<![\w.:/\\~-])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:"'<>|,;()]+[/\\])+""")


def log(run: str | os.PathLike, *, uri: str = "", models_root=None) -> str:
    """Copy one run folder to MLflow, once.

    The experiment is the notebook, the run's name the folder's, its times the run's own. Logged are

    - parameters: params.json without the roots; of a value that is a path its last part; lists as JSON;
    - metrics: the headline's values as `<task>.<metric>.<label>` (and variant and split, where these alone tell two
      apart), with `.ci_low`, `.ci_high`, `.baseline` and `.difference`; `chosen_by` as `validation.<metric>`; the
      numbers of `variants/<name>/history.csv` as `<name>.<column>` by epoch, or of history.csv where there is no
      variant. Missing and infinite values are left out, and what suits no name becomes "_";
    - tags: status, system, profile, data_source, fingerprint, commit, error (cut, and without folders), and
      kerasmed.version; kerasmed.key and kerasmed.finished, by which the run is found again; kerasmed.cut, the
      parameters that were too long; kerasmed.left_out, the files that were too large;
    - artefacts: tables, JSON files, models and the notebook at the top of the folder, and figures/, as they are: up to
      100 MB a model, so that all but the largest networks go along, and 50 MB any other file; no variants, checkpoints
      or hidden files. params.json and the notebook name folders of this machine.

    The same folder with the same `finished` is logged once; a rerun, which ends at another time, makes another MLflow
    run. One that a failure left half logged is gone on with.

    A store in SQLite is written by one process at a time. Its artefacts lie in the folder `mlflow` beside it; MLflow
    keeps their place as an absolute path, so that they are not found any more where the folder was moved.

    Args:
        run: the run folder, complete or failed.
        uri: MLflow's tracking URI, a server's or sqlite:///<file>; "" for $MLFLOW_TRACKING_URI, else
            `sqlite:///<models_root>/mlflow.db`.
        models_root: see `kerasmed.paths.models_root`; of the default store alone.

    Returns:
        MLflow's id of the run.

    Raises:
        ImportError: MLflow is not installed.
        ValueError: the folder is no run, or one that is neither complete nor failed; a file of it cannot be read; or
            `uri` names an SQLite file whose path has one of %?#.
        RuntimeError: the store cannot be reached, read or written; says which and why. The run itself is whole: go on,
            and log it another time. An HTTP server has 4 seconds to answer; for a database's server MLflow waits two
            minutes.
    """
    run = Path(run).resolve()
    state, content = _state(run), _content(run)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _default(models_root)
    file = _sqlite_file(uri)
    load()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if file is None:
            _refuse_silent(uri)
            return _send(uri, run, state, content, artefacts=None)
        with locks.held(file):
            _open_database(file)
            return _send(_default_of(file), run, state, content, artefacts=_artefacts_of(file))
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        reason = _without_password(str(error)).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"{run.name} was not logged to MLflow at {_without_password(uri)}: {reason[0]}") from error


# --- stores ----------------------------------------------------------------------------------------------------------


def load() -> None:
    """Import MLflow, which takes seconds, after what it reads from the environment is set.

    Raises:
        ImportError: it is not installed; says how to mend it.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ImportError(
            "tracking needs MLflow, which is not installed: pip install 'kerasmed[track]' (in a clone: -e '.[track]')."
        )
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401


def _default(models_root) -> str:
    return _default_of(paths.models_root(models_root) / "mlflow.db")


def _default_of(file: Path) -> str:
    return f"sqlite:///{file.as_posix()}"


def _artefacts_of(file: Path) -> Path:
    return file.with_name("mlflow")


def _sqlite_file(uri: str) -> Path | None:
    """File of an SQLite URI, None for any other."""
    if not uri.startswith("sqlite:"):
        return None
    name = uri.removeprefix("sqlite:///")
    if name == uri or not name or set("%?#") & set(name):
        raise ValueError(
            f"`uri` is {uri!r}; expected sqlite:///<file> whose path has none of %?#, which mean other things there."
        )
    return Path(name).resolve()


def _open_database(file: Path) -> None:
    """Make the database if there is none; raise at once where it cannot be opened: MLflow tries for two minutes."""
    new = not file.exists() or file.stat().st_size == 0
    with contextlib.closing(sqlite3.connect(file, timeout=20)) as connection:
        connection.execute("PRAGMA schema_version").fetchone()
    if new:
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        # MLflow's default experiment would keep its artefacts in the working directory.
        SqlAlchemyStore(_default_of(file), _artefacts_of(file).as_uri())


def _refuse_silent(uri: str) -> None:
    """Raise ConnectionError where a server answers nothing within seconds; any answer will do."""
    if not uri.startswith(("http://", "https://")):
        return
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=SECONDS_TO_ANSWER, allow_redirects=False)
    except requests.exceptions.SSLError:
        return  # it is there; which certificates are trusted is among MLflow's own settings
    except requests.RequestException as error:
        raise ConnectionError(
            f"no answer within {SECONDS_TO_ANSWER} seconds ({type(error).__name__}); start the server, or mend the "
            "address."
        ) from error


def _without_password(text: str) -> str:
    return re.sub(r"//[^/\s]+@", "//", text)


# --- sending ---------------------------------------------------------------------------------------------------------


def _send(uri: str, run: Path, state: Mapping, content: Mapping, *, artefacts: Path | None) -> str:
    """Log what was read of a run, or find that this was done; return MLflow's id."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(tracking_uri=uri)
    place = None if artefacts is None else (artefacts / state["notebook"]).as_uri()
    experiment = _experiment(client, state["notebook"], place)
    begun, ended = (_milliseconds(state[name]) for name in ("started", "finished"))
    key = {"kerasmed.key": run.name, "kerasmed.finished": state["finished"]}
    # A time can stand in MLflow's query, as it was read as one; a folder's name may hold quotes, and is compared here.
    wanted = f"tags.`kerasmed.finished` = '{state['finished']}'"
    found = client.search_runs([experiment], filter_string=wanted)
    found = [each for each in found if each.data.tags["kerasmed.key"] == run.name]
    if found and found[0].info.status in ("FINISHED", "FAILED"):
        return found[0].info.run_id
    parameters, cut = _parameters(content["params"])
    files, left_out = _artefacts(run)
    tags = _tags(run, state, content["environment"]) | {
        **{"mlflow.source.name": state["notebook"], "mlflow.source.type": "NOTEBOOK"},
        **({"kerasmed.cut": ", ".join(cut)[:MAX_ERROR]} if cut else {}),
        **({"kerasmed.left_out": ", ".join(left_out)[:MAX_ERROR]} if left_out else {}),
    }
    run_id = (
        found[0] if found else client.create_run(experiment, start_time=begun, tags=key, run_name=run.name)
    ).info.run_id
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, ended, step) for name, value, step in content["metrics"]],
        params=[Param(name, value) for name, value in parameters.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    for file in files:
        folder = file.relative_to(run).parent.as_posix()
        client.log_artifact(run_id, str(file), None if folder == "." else folder)
    client.set_terminated(run_id, "FINISHED" if state["status"] == "complete" else "FAILED", end_time=ended)
    return run_id


def _experiment(client, name: str, place: str | None) -> str:
    """Id of an experiment, made if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was quicker
    if found.lifecycle_stage == "deleted":
        raise MlflowException(
            f"its experiment {name} is deleted; restore it: mlflow experiments restore -x {found.experiment_id}"
        )
    return found.experiment_id


def _milliseconds(when: str) -> int:
    return int(datetime.datetime.fromisoformat(when).timestamp() * 1000)


# --- what is logged --------------------------------------------------------------------------------------------------


def _state(run: Path) -> dict:
    """Status of a run that is over."""
    state = runs.status(run)
    if state["status"] == "absent":
        raise ValueError(f"{run} is no run folder: it has no status.json; name one such as models/<system>/<run>.")
    if state["status"] not in ("complete", "failed"):
        raise ValueError(f"{run} is {state['status']}; only runs that are complete or failed are logged: finish it.")
    lacking = [name for name in ("notebook", "system", "started", "finished") if not state.get(name)]
    if lacking:
        raise ValueError(f"status.json of {run} lacks {', '.join(lacking)}; run the notebook anew with --force.")
    return state


def _content(run: Path) -> dict:
    """Parameters, environment and metrics of a run; what a failed one has not written is empty."""
    names = ("params", "environment", "metrics")
    content = {
        name: _read(run / f"{name}.json", runs.read_json) if (run / f"{name}.json").exists() else {} for name in names
    }
    histories = {path.parent.name: path for path in sorted(run.glob("variants/*/history.csv"))}
    if not histories and (run / "history.csv").exists():
        histories = {"": run / "history.csv"}
    content["metrics"] = [
        *((name, value, 0) for name, value in _headline(content["metrics"]).items()),
        *(point for name, path in histories.items() for point in _points(name, _read(path, pd.read_csv))),
    ]
    return content


def _read(path: Path, reader):
    try:
        return reader(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; run the notebook anew with --force.") from error


def _parameters(given: Mapping) -> tuple[dict[str, str], list[str]]:
    """Parameters as texts, and the names of those that were cut."""
    kept = {name: _last_part(value) for name, value in given.items() if name not in runs.LOCATION_PARAMETERS}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for name, value in kept.items()
    }
    cut = [name for name, text in texts.items() if len(text) > MAX_PARAMETER]
    return {name: text[:MAX_PARAMETER] for name, text in texts.items()}, cut


def _last_part(value):
    """A parameter's value; of a path, also within a list, what does not tell where it lies."""
    if isinstance(value, list):
        return [_last_part(item) for item in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value


def _headline(content: Mapping) -> dict[str, float]:
    """Metrics of the headline and of the validation, by name."""
    rows = content.get("headline", [])
    counts = Counter(_name(row["task"], row["metric"], row["label"]) for row in rows)
    values = {}
    for row in rows:
        name = _name(row["task"], row["metric"], row["label"])
        if counts[name] > 1:
            name = _name(row["task"], row["metric"], row["label"], row["variant"], row["split"])
        low, high = row.get("ci95") or (None, None)
        baseline = row.get("baseline") or {}
        values |= {name: row["value"], f"{name}.ci_low": low, f"{name}.ci_high": high}
        values |= {f"{name}.baseline": baseline.get("value"), f"{name}.difference": baseline.get("difference")}
    if chosen := content.get("chosen_by"):
        values[f"validation.{_name(chosen['metric'])}"] = chosen["value"]
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def _points(variant: str, history: pd.DataFrame) -> Iterator[tuple[str, float, int]]:
    """Name, value and epoch of each number of a history."""
    epochs = history["epoch"] if "epoch" in history else range(1, len(history) + 1)
    for column in history.select_dtypes("number").columns.drop("epoch", errors="ignore"):
        name = _name(variant, column)
        for epoch, value in zip(epochs, history[column]):
            if math.isfinite(value):
                yield name, float(value), int(epoch)


def _name(*parts: str) -> str:
    """Join the parts of a metric's name that are not empty, as far as MLflow takes them, a suffix included."""
    return ".".join(re.sub(r"[^\w.-]+", "_", str(part)).strip("._") for part in parts if part)[: MAX_NAME - 20]


def _tags(run: Path, state: Mapping, environment: Mapping) -> dict[str, str]:
    """What runs are filtered by."""
    tags = {name: state.get(name) for name in ("status", "system", "profile", "data_source")}
    tags |= {name: environment.get(name) for name in ("fingerprint", "commit")}
    tags["error"] = _without_folders(state.get("error") or "", run)[:MAX_ERROR]
    tags["kerasmed.version"] = environment.get("versions", {}).get("kerasmed")
    return {name: str(value) for name, value in tags.items() if value}


def _without_folders(text: str, run: Path) -> str:
    """Take the folders out of the paths in a text."""
    for known in (run, *run.parents[:2], Path.home()):
        if len(known.parts) > 1:
            text = re.sub(re.escape(str(known)) + r"(?![\w.-])", known.name if known != Path.home() else "~", text)
    return _FOLDERS.sub("", text)


def _artefacts(run: Path) -> tuple[list[Path], list[str]]:
    """Files to copy, and the names of those that are too large."""
    seen = sorted(path for path in (*run.iterdir(), *run.glob("figures/*")) if path.is_file())
    files = [path for path in seen if path.suffix in SUFFIXES and not path.name.startswith((".", "checkpoint"))]
    large = [path for path in files if path.stat().st_size > (MAX_MODEL if path.suffix == ".keras" else MAX_OTHER)]
    return [path for path in files if path not in large], [path.relative_to(run).as_posix() for path in large]
