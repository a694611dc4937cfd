"""Numbered notebooks: what they take, and running them through papermill.

A notebook's metadata hold `kerasmed: {system, budget_minutes: {profile: minutes}}`, where an empty system leaves it to
the parameter `system`, and `needs`, the notebook whose run it builds on, where there is one; its parameters are those
of the cell tagged `parameters`; a profile's values lie in `notebooks/params/<profile>/<notebook>.yaml`, which plain
papermill takes with `-f` as well.
"""

import ast
import contextlib
import difflib
import itertools
import math
import os
import re
import reprlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from kerasmed import collection, datasets, paths, runs

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ARROW = re.compile(r"^-+> *(\d+) (.*)")


class Parameter(NamedTuple):
    """One name of a parameters cell."""

    name: str
    type: str
    default: object
    help: str


class Notebook(NamedTuple):
    """What a notebook says of itself."""

    name: str
    path: Path
    title: str
    system: str  # "" where the parameter `system` decides
    budget_minutes: Mapping[str, float]
    parameters: Mapping[str, Parameter]
    needs: str  # the notebook whose run the parameter `from_run` names; "" for none

    def system_of(self, parameters: Mapping) -> str:
        """Return the system that an execution with these parameters belongs to."""
        return self.system or parameters["system"]


def names() -> list[str]:
    """Return the names of the numbered notebooks, in order."""
    return sorted(path.stem for path in paths.notebooks_root().glob("[0-9][0-9]_*.ipynb"))


def profiles() -> list[str]:
    """Return the names of the profiles."""
    return sorted(path.name for path in (paths.notebooks_root() / "params").iterdir() if path.is_dir())


def describe(name: str) -> Notebook:
    """Read a notebook's title, system, budgets and parameters; refuse an unknown name with those near it.

    Raises:
        ValueError: no such notebook, one without the package's metadata, or one that leaves its system, or the run that
            it needs, to a parameter it has not.
    """
    from papermill import inspect_notebook

    if name not in names():
        raise ValueError(f"notebook {name!r} is unknown{_meant(name, names())}; known are {', '.join(names())}.")
    path = paths.notebooks_root() / f"{name}.ipynb"
    content = runs.read_json(path)
    own = content["metadata"].get("kerasmed", {})
    if not {"system", "budget_minutes"} <= set(own):
        raise ValueError(f"{path} lacks `kerasmed: {{system, budget_minutes}}` in its metadata; add it.")
    lines = [line for cell in content["cells"] for line in "".join(cell["source"]).splitlines()]
    title = next((line.removeprefix("# ") for line in lines if line.startswith("# ")), name)
    found = {
        key: Parameter(key, entry["inferred_type_name"], ast.literal_eval(entry["default"]), entry["help"])
        for key, entry in inspect_notebook(str(path)).items()
    }
    if not own["system"] and "system" not in found:
        raise ValueError(f"{path} names no system in its metadata and has no parameter `system`; add either.")
    if own.get("needs") and "from_run" not in found:
        raise ValueError(f"{path} needs a run of {own['needs']} and has no parameter `from_run`; add it.")
    return Notebook(name, path, title, own["system"], own["budget_minutes"], found, own.get("needs", ""))


def _meant(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def parse_value(text: str):
    """Turn the text of `-p name=value` into a Python literal, "true"/"false"/"null" included; anything else stays text.

    Example:
        >>> parse_value("1e-3"), parse_value("[96, 96]"), parse_value("true"), parse_value('"; import os')
        (0.001, [96, 96], True, '"; import os')
    """
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def resolve(notebook: Notebook, *, profile: str, given: Mapping) -> dict:
    """Join a notebook's defaults, a profile's values and given values into its parameters.

    Args:
        notebook: from `describe`.
        profile: a name of `profiles()`.
        given: name -> value, which win.

    Returns:
        Every parameter of the notebook, in its order.

    Raises:
        ValueError: unknown profile, one without a file for this notebook, unknown names (with the known ones), a
            value of another type than the default, or an unknown system.
    """
    if profile not in profiles():
        raise ValueError(
            f"profile {profile!r} is unknown{_meant(profile, profiles())}; known are {', '.join(profiles())}."
        )
    path = paths.notebooks_root() / "params" / profile / f"{notebook.name}.yaml"
    if not path.is_file():
        raise ValueError(f"profile {profile!r} has no values for {notebook.name}; write {path} (it may be empty).")
    from_profile = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for origin, values in ((path.name, from_profile), ("-p", given)):
        for name, value in values.items():
            if name not in notebook.parameters:
                raise ValueError(
                    f"parameter {name!r} ({origin}) is unknown to {notebook.name}{_meant(name, notebook.parameters)}; "
                    f"known are {', '.join(notebook.parameters)}."
                )
            default = notebook.parameters[name].default
            fits = isinstance(value, type(default)) and not (isinstance(value, bool) and not isinstance(default, bool))
            if not fits and not (isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)):
                hint = ""
                if isinstance(value, str) and isinstance(default, float):
                    hint = "; YAML reads 1e-3 as text, write 1.0e-3"
                elif isinstance(value, str) and isinstance(default, list):
                    hint = """; write texts in quotes, as in '["first", "second"]'"""
                raise ValueError(
                    f"parameter {name!r} ({origin}) of {notebook.name} is {value!r}; "
                    f"expected {type(default).__name__}, "
                    f"such as {default!r}{hint}."
                )
    merged = {name: parameter.default for name, parameter in notebook.parameters.items()} | from_profile | dict(given)
    datasets.reader(notebook.system_of(merged))  # refuses an unknown system
    # 1 and 1.0 are one value and must give one key.
    return {
        name: float(value) if isinstance(notebook.parameters[name].default, float) else value
        for name, value in merged.items()
    }


def run(
    notebook: Notebook, parameters: Mapping, *, force: bool = False, timeout: int | None = None
) -> tuple[Path, bool]:
    """Execute a notebook into its run folder, or find that this was done.

    The same parameters, data and sources find the same folder: a finished run is returned at once, one that was killed
    goes on at its last whole stage. The executed notebook is kept in either case.

    Args:
        notebook: from `describe`.
        parameters: from `resolve`.
        force: throw the folder away first.
        timeout: seconds that one cell may take; None for any.

    Returns:
        The run folder, complete, and whether the notebook was executed.

    Raises:
        RuntimeError: the notebook failed, its kernel died, a cell took too long, or the run is under way elsewhere. The
            text says where and why; the run's status is "failed".
        FileNotFoundError: no complete run, on these data, of the notebook that this one needs.
        OSError: the models root cannot be written to.
    """
    from papermill import execute_notebook

    system = notebook.system_of(parameters)
    source = datasets.locate(system, parameters, data_root=parameters["data_root"])
    fingerprint = datasets.fingerprint(system, source)
    models_root = parameters["models_root"]
    if notebook.needs:
        found = {"run": parameters["from_run"], "fingerprint": fingerprint, "models_root": models_root}
        found["profile"] = parameters["profile"]
        parameters = {**parameters, "from_run": str(runs.find(system, notebook.needs, **found))}
    folder = runs.folder(system, notebook.name, parameters, fingerprint, models_root=models_root)
    runs.refuse_running(folder, force=force)
    if force:
        shutil.rmtree(folder, ignore_errors=True)
    elif runs.status(folder)["status"] == "complete":
        return folder, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {folder}: {error.strerror}; choose another folder with --models-root.") from error
    for half_written in folder.rglob(".*.tmp.*"):  # what a killed process left
        half_written.unlink()
    runs.reserve(folder, system, notebook.name, parameters["profile"], data_source=source.kind)
    # A user's own kernel of the same name must not take the place of this environment's.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    try:
        with _kept(folder / "notebook.ipynb") as output, _kernel_config() as config:
            execute_notebook(
                notebook.path,
                output,
                parameters=dict(parameters),
                kernel_name="python3",
                progress_bar=sys.stderr.isatty(),
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                execution_timeout=timeout,
                config=config,
            )
    except (Exception, KeyboardInterrupt) as error:  # whatever ended the notebook ends this run, and no other
        reason = _reason(error)
        runs.set_status(folder, "failed", error=reason)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RuntimeError(f"{reason}\n  executed notebook: {folder / 'notebook.ipynb'}") from error
    if runs.status(folder)["status"] != "complete":
        runs.set_status(folder, "failed", error="ended without `runs.finish` or `runs.summarize`")
        raise RuntimeError(
            f"{notebook.name} ended without `runs.finish` or `runs.summarize` on {folder}; its last cell must write "
            "the metrics, or the summary."
        )
    return folder, True


@contextlib.contextmanager
def _kernel_config():
    """Configure a kernel that talks through sockets in a folder of its own: closed to others, and no race for ports."""
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="kerasmed-", ignore_cleanup_errors=True) as folder:
        sockets = {} if sys.platform == "win32" else {"transport": "ipc", "ip": os.path.join(folder, "kernel")}
        yield Config({"KernelManager": sockets})


@contextlib.contextmanager
def _kept(path: Path):
    """Yield a temporary name and rename it to `path` afterwards, failed or not: the executed notebook is kept."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
    finally:
        if temporary.exists():
            os.replace(temporary, path)


def _reason(error: BaseException) -> str:
    """Say in a few lines which cell failed and why."""
    if hasattr(error, "evalue"):
        where = f"cell {error.cell_index} (In [{error.exec_count}])" if hasattr(error, "exec_count") else "a cell"
        trace = [
            _ANSI.sub("", line) for part in (getattr(error, "traceback", None) or []) for line in str(part).splitlines()
        ]
        arrows = [match for line in trace if (match := _ARROW.match(line))]
        at = f"\n  at line {arrows[0][1]}: {arrows[0][2].strip()}" if arrows else ""
        return f"{where}: {error.ename}: {error.evalue}{at}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


# --- sweeps ----------------------------------------------------------------------------------------------------------


def parse_grid(text: str) -> tuple[str, list]:
    """Turn the text of `--grid name=value,value` into a name and its values; a value that is a list needs brackets.

    Example:
        >>> parse_grid("rate=0.1,1e-2"), parse_grid("optimizer=adam,sgd"), parse_grid("networks=['cnn5'],['cnn1']")
        (('rate', [0.1, 0.01]), ('optimizer', ['adam', 'sgd']), ('networks', [['cnn5'], ['cnn1']]))
    """
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(f"--grid {text!r} is no list of values; write --grid name=value,value.")
    listed = parse_value(f"[{values}]")
    return name, listed if isinstance(listed, list) else [parse_value(value) for value in values.split(",")]


def read_grid(path: Path) -> dict[str, list]:
    """Read the YAML of `--grid-file`: parameters, each with its list of values, as they stand there.

    Raises:
        ValueError: no YAML, or something else than a mapping of names.
    """
    expected = "expected a YAML mapping of parameters to lists of values, such as `epochs: [5, 10]`"
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}; {expected}.") from error
    if not grid or not isinstance(grid, dict) or not all(isinstance(name, str) for name in grid):
        raise ValueError(f"{path} holds {'nothing' if grid is None else reprlib.repr(grid)}; {expected}.")
    return grid


def points(grid: Mapping[str, Sequence]) -> list[dict]:
    """Combine every value of each parameter with every one of the others, the last parameter fastest.

    Raises:
        ValueError: a parameter has no list of values.
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"the grid gives {name} as {values!r}; expected a list of values to try.")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def labels(tried: Sequence[Mapping]) -> list[str]:
    """Name each point of a sweep by what tells it from the others; by all that it was given where nothing does.

    Example:
        >>> labels(points({"epochs": [3], "rate": [0.1, 0.2]}))
        ['rate=0.1', 'rate=0.2']
    """
    telling = [name for name in tried[0] if len({str(given[name]) for given in tried}) > 1] or list(tried[0])
    return [", ".join(f"{name}={given[name]}" for name in telling) for given in tried]


def sweep_table(tried: Sequence[Mapping], done: Mapping[int, Path], failed: Mapping[int, str]) -> pd.DataFrame:
    """Join the headlines of a sweep's runs into one table, best validation value first, failed ones last.

    Runs are ordered by what each says it may be chosen by, on validation; its test figures stand beside it, and have
    no say: the best test figure of many is too good by chance.

    Args:
        tried: parameters that each run was given.
        done: complete runs, position in `tried` -> folder.
        failed: position in `tried` -> error, the first line of which is kept.

    Returns:
        DataFrame, a row a run: the swept parameters, validation, `<task> <label> <metric>` of each headline value, its
        interval "... 95 %", baseline "... baseline", status, error, and run, the folder's name. A run that has only a
        summary, and one that failed, has no numbers.
    """
    records, figures = [], {}  # a dict keeps the order
    for position, given in enumerate(tried):
        record = {name: str(value) for name, value in given.items()}
        if position in failed:
            error = (failed[position].strip().splitlines() or ["no message"])[0]
            records.append({**record, "validation": math.nan, "status": "failed", "error": error, "run": ""})
        elif position in done:
            table = collection.collect(done[position])
            found = _figures(table)
            figures |= dict.fromkeys(found)
            chosen_by = {"validation": table["validation"].iloc[0]}
            records.append(
                {**record, **chosen_by, **found, "status": "complete", "error": "", "run": done[position].name}
            )
    columns = [*(tried[0] if tried else ()), "validation", *figures, "status", "error", "run"]
    table = pd.DataFrame(records, columns=columns).astype({"validation": float})
    table = table.sort_values("validation", ascending=False, kind="stable")
    return table.sort_values("status", key=lambda status: status == "failed", kind="stable", ignore_index=True)


def _figures(table: pd.DataFrame) -> dict:
    """Return the columns that the rows of a run in `collection.collect` become; none of a run without numbers."""
    found = {}
    for row in table[table["task"].notna()].to_dict("records"):
        name = " ".join((row["task"], row["label"], row["metric"]))
        ends, baseline = (row["ci_low"], row["ci_high"]), row["baseline_value"]
        found[name] = row["value"]
        found[f"{name} 95 %"] = "" if any(map(pd.isna, ends)) else f"[{ends[0]:.3f}, {ends[1]:.3f}]"
        found[f"{name} baseline"] = row["baseline"] if pd.isna(baseline) else f"{row['baseline']} {baseline:.3f}"
    return found


def shown_of_sweep(table: pd.DataFrame, swept: Sequence[str]) -> pd.DataFrame:
    """Leave out of a `sweep_table` what need not be printed.

    That is: swept parameters of one value, baselines, run, and error where nothing failed.
    """
    idle = {name for name in swept if table[name].nunique() == 1} | {"run"}
    if not (table["status"] == "failed").any():
        idle.add("error")
    return table[[name for name in table if name not in idle and not name.endswith(" baseline")]]


def quickest_first(notebooks: Sequence[Notebook], profile: str) -> list[Notebook]:
    """Sort by a profile's budget, so that first results come soon, each after the one whose run it needs.

    What has no budget comes last, in order.
    """
    by_name = {notebook.name: notebook for notebook in notebooks}

    def place(notebook):
        chain = [notebook]
        while chain[-1].needs in by_name:
            chain.append(by_name[chain[-1].needs])
        return max(each.budget_minutes.get(profile, math.inf) for each in chain), len(chain)

    return sorted(notebooks, key=place)
