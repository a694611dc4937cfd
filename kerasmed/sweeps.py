"""Many executions: grids of parameters, on this machine or on a Dask cluster, and one table of them.

Each execution is a run of its own (`kerasmed.notebooks.execute`): what is finished is not repeated, what failed or was
killed goes on at its last whole stage, and none stops another. On this machine executions are threads that each look
after a kernel, and kernels end when the command does.
"""

import functools
import itertools
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kerasmed import fanout, locks, notebooks
from kerasmed.metrics import LOWER_IS_BETTER
from kerasmed.notebooks import Notebook, Placed, parse_value, read_yaml

EXECUTED, FINISHED_ALREADY, FAILED, BUSY = "executed", "finished already", "failed", "busy"


class Outcome(NamedTuple):
    """What became of an execution."""

    position: int
    what: str  # EXECUTED, FINISHED_ALREADY or FAILED
    error: str = ""


# --- execution -------------------------------------------------------------------------------------------------------


def place(notebook: Notebook, resolved: Sequence[Mapping]) -> tuple[dict[int, Placed], dict[int, str]]:
    """Find the folder of each execution of a notebook, or why it has none.

    Args:
        notebook: from `kerasmed.notebooks.describe`.
        resolved: parameters of each, from `kerasmed.notebooks.resolve`.

    Returns:
        Position -> `Placed`, and position -> error.
    """
    placed, failed = {}, {}
    for position, parameters in enumerate(resolved):
        try:
            placed[position] = notebooks.place(notebook, parameters)
        except (RuntimeError, ValueError, OSError) as error:
            failed[position] = str(error)
    return placed, failed


def execute(
    placed: Mapping[int, Placed], *, jobs: int = 1, scheduler: str = "", force: bool = False, timeout: int | None = None
) -> Iterator[Outcome]:
    """Execute notebooks, and yield what became of each as it ends.

    A run that another process is at work on is left until all others are done, and then waited for.

    Args:
        placed: position -> an execution.
        jobs: executions at once on this machine; they share its cores and its GPU.
        scheduler: address of a Dask scheduler, such as "tcp://HOST:8786", whose workers execute instead, each as many
            at once as it has threads. Where a worker dies, another one goes on with its run, also with `force`.
        force, timeout: as in `kerasmed.notebooks.execute`.

    Raises:
        ImportError, ConnectionError: as of `kerasmed.fanout.cluster`.
    """
    word = uuid.uuid4().hex if force else ""
    if scheduler:
        with fanout.cluster(scheduler) as client:
            yield from _in_two_passes(functools.partial(_on_cluster, client), placed, word, timeout)
    else:
        yield from _in_two_passes(functools.partial(fanout.on_threads, jobs, _execute), placed, word, timeout)


def _in_two_passes(do, placed, force, timeout) -> Iterator[Outcome]:
    busy = []
    for outcome in do((position, each, force, timeout, notebooks.SOON) for position, each in placed.items()):
        if outcome.what == BUSY:
            busy.append(outcome.position)
        else:
            yield outcome
    yield from do((position, placed[position], force, timeout, None) for position in busy)


def _on_cluster(client, tasks) -> Iterator[Outcome]:
    for (position, *_), outcome in fanout.on_cluster(client, _execute, tasks):
        if isinstance(outcome, BaseException):
            outcome = Outcome(position, FAILED, f"{type(outcome).__name__}: {outcome}")
        yield outcome


def _execute(position: int, placed: Placed, force: str, timeout: int | None, wait: float | None) -> Outcome:
    try:
        executed = notebooks.execute(placed, force=force, timeout=timeout, wait=wait, shown=False)
    except locks.Busy:
        return Outcome(position, BUSY)
    except (RuntimeError, ValueError, OSError) as error:
        return Outcome(position, FAILED, str(error) or type(error).__name__)
    return Outcome(position, EXECUTED if executed else FINISHED_ALREADY)


# --- grids and tables ------------------------------------------------------------------------------------------------


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
    grid = read_yaml(path, expected)
    if not grid:
        raise ValueError(f"{path} holds nothing; {expected}.")
    return grid


def with_lists(grid: Mapping[str, Sequence], notebook: Notebook) -> dict[str, list]:
    """Make a list of one of each text that is to be tried for a parameter that is a list.

    So `--grid networks=VGG19,compact` tries two networks, each alone.
    """
    lists = {name for name, parameter in notebook.parameters.items() if isinstance(parameter.default, list)}
    return {
        name: [[value] if name in lists and isinstance(value, str) else value for value in values]
        if isinstance(values, list)
        else values
        for name, values in grid.items()
    }


def points(grid: Mapping[str, Sequence]) -> list[dict]:
    """Combine every value of each parameter with every one of the others, the last parameter fastest.

    Raises:
        ValueError: a parameter has no list of values, or the same value twice.
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"the grid gives {name} as {values!r}; expected a list of values to try.")
        twice = [value for number, value in enumerate(values) if value in values[:number]]
        if twice:
            raise ValueError(f"the grid gives {name} the value {twice[0]!r} twice; write each once.")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def labels(tried: Sequence[Mapping]) -> list[str]:
    """Name each point of a sweep by what tells it from the others; by all that it was given where nothing does.

    Example:
        >>> labels(points({"epochs": [3], "rate": [0.1, 0.2]}))
        ['rate=0.1', 'rate=0.2']
    """
    telling = [name for name in tried[0] if len({str(given[name]) for given in tried}) > 1] or list(tried[0])
    return [", ".join(f"{name}={given[name]}" for name in telling) for given in tried]


def sweep_table(tried: Sequence[Mapping], done: Mapping[int, pd.DataFrame], failed: Mapping[int, str]) -> pd.DataFrame:
    """Join the headlines of a sweep's runs into one table, best validation value first, failed ones last.

    Runs are ordered by what each says it may be chosen by, on validation, in that metric's own direction; test figures
    stand beside it, and have no say: the best test figure of many is too good by chance.

    Args:
        tried: parameters that each run was given.
        done: complete runs, position in `tried` -> table of `kerasmed.collection.collect`, as read when it was done.
        failed: position in `tried` -> error, the first line of which is kept.

    Returns:
        DataFrame, a row a run: the swept parameters, validation, `<task> <label> <metric>` of each headline value, its
        interval "... 95 %", baseline "... baseline", status, error, and run, the folder's name. A run that has only a
        summary, and one that failed, has no numbers.
    """
    records, figures, best_first = [], {}, []  # a dict keeps the order
    for position, given in enumerate(tried):
        record = {name: str(value) for name, value in given.items()}
        if position in failed:
            error = (failed[position].strip().splitlines() or ["no message"])[0]
            records.append({**record, "validation": math.nan, "status": "failed", "error": error, "run": ""})
            best_first.append(math.inf)
        elif position in done:
            table = done[position]
            found = _figures(table)
            figures |= dict.fromkeys(found)
            validation, metric = table[["validation", "chosen_metric"]].iloc[0]
            best_first.append(validation if metric in LOWER_IS_BETTER else -validation)
            run = {"status": table["status"].iloc[0], "error": "", "run": table["run"].iloc[0]}
            records.append({**record, "validation": validation, **found, **run})
    columns = [*(tried[0] if tried else ()), "validation", *figures, "status", "error", "run"]
    table = pd.DataFrame(records, columns=columns).astype({"validation": float})
    table = table.iloc[np.argsort(best_first, kind="stable")]  # NaN, of a run that gives no value, comes last
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
    """Leave out of a `sweep_table` what need not be printed: parameters of one value, baselines, run and error."""
    idle = {name for name in swept if table[name].nunique() == 1} | {"run", "error"}
    return table[[name for name in table if name not in idle and not name.endswith(" baseline")]]
