"""Numbered notebooks: what they take, and running them through papermill.

A notebook's metadata hold `kerasmed: {system, budget_minutes: {profile: minutes}}`, where an empty system leaves it to
the parameter `system`, and `needs`, the notebook whose run it builds on, where there is one; its parameters are those
of the cell tagged `parameters`; a profile's values lie in `notebooks/params/<profile>/<notebook>.yaml`, which plain
papermill takes with `-f` as well.
"""

import ast
import contextlib
import difflib
import logging
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

import yaml

from kerasmed import datasets, notebook_page, paths, runs

logger = logging.getLogger(__name__)

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ARROW = re.compile(r"^-+> *(\d+) (.*)")


SOON = 1.0  # seconds that another command may take to let go of a run it only looked at
_TAIL_LINES = 8
_FORCED = ".forced"  # of a run folder: the word that it was emptied for


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


class Placed(NamedTuple):
    """An execution that has its folder."""

    notebook: Notebook
    parameters: Mapping
    folder: Path
    data_source: str  # "real" or "synthetic"
    fingerprint: str  # of the data


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
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # `{[]}`, brackets without end
        return text


def read_yaml(path: Path, expected: str) -> dict:
    """Read a mapping of names from a YAML file: plain values alone, never an object that would run code.

    Args:
        path: the file.
        expected: what the error says was expected.

    Returns:
        The mapping, {} for an empty file.

    Raises:
        ValueError: no YAML, a tag of an object, or something else than a mapping of names.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # The last three of values that are not of their tag, as in `!!bool maybe`.
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}; {expected}.") from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} holds {reprlib.repr(content)}; {expected}.")
    return content


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
    from_profile = read_yaml(path, "expected a YAML mapping of parameters to values, such as `epochs: 5`")
    for origin, values in ((path.name, from_profile), ("given", given)):
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


def place(notebook: Notebook, parameters: Mapping) -> Placed:
    """Find the data, the earlier run that is needed, and with them the folder that an execution belongs to.

    Args:
        notebook: from `describe`.
        parameters: from `resolve`.

    Raises:
        FileNotFoundError: no data, or no complete run, on these data, of the notebook that this one needs.
        ValueError: data of another kind than `data_source` says.
    """
    system = notebook.system_of(parameters)
    source = datasets.locate(system, parameters, data_root=parameters["data_root"])
    fingerprint = datasets.fingerprint(system, source)
    models_root = parameters["models_root"]
    if notebook.needs:
        found = {"run": parameters["from_run"], "fingerprint": fingerprint, "models_root": models_root}
        found["profile"] = parameters["profile"]
        parameters = {**parameters, "from_run": str(runs.find(system, notebook.needs, **found))}
    folder = runs.folder(system, notebook.name, parameters, fingerprint, models_root=models_root)
    return Placed(notebook, dict(parameters), folder, source.kind, fingerprint)


def run(
    notebook: Notebook, parameters: Mapping, *, force: bool = False, timeout: int | None = None
) -> tuple[Path, bool]:
    """Execute a notebook into its run folder, or find that this was done: `place`, then `execute`.

    Returns:
        The run folder, complete, and whether the notebook was executed.
    """
    placed = place(notebook, parameters)
    return placed.folder, execute(placed, force=force, timeout=timeout)


def execute(
    placed: Placed,
    *,
    force: bool | str = False,
    timeout: int | None = None,
    wait: float | None = SOON,
    shown: bool = True,
) -> bool:
    """Execute a notebook into its run folder, or find that this was done.

    The same parameters, data and sources find the same folder: a finished run is left as it is. One that failed or was
    killed, also before its executed notebook was whole, or of which a file is damaged, goes on at its last whole stage.
    The executed notebook is kept in any case, also as a page, notebook.html. While it runs, progress.json says which
    cell of how many is at work.

    Args:
        placed: from `place`.
        force: empty the folder first. A word instead of True: only if it was not emptied for this word before, so that
            an execution that is begun again elsewhere, after its machine was lost, goes on.
        timeout: seconds that one cell may take; None for any.
        wait: seconds to wait for another process that is at work on the same run; None for as long as it takes.
        shown: whether what the notebook prints is passed on as it comes.

    Returns:
        Whether the notebook was executed; the run is complete either way.

    Raises:
        Busy: another process is at work on the run.
        RuntimeError: the notebook failed, its kernel died, or a cell took too long. The text says where and why; the
            run's status is "failed". Or sources or folders are not those that the execution was placed by.
        OSError: the models root cannot be written to.
    """
    folder = placed.folder
    # Without the lock, which cannot be had where files are only read.
    if not force and _why_unfinished(folder) == "":
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {folder}: {error.strerror}; choose another folder with --models-root.") from error
    with runs.reserved(folder, wait=wait):
        emptied = isinstance(force, str) and _text_of(folder / _FORCED) == force
        unfinished = _why_unfinished(folder)
        if (not force or emptied) and not unfinished:
            return False
        if not force and runs.status(folder)["status"] == "complete":
            logger.warning("%s is done again from its last whole stage: %s", folder, unfinished)
        _refuse_moved(placed)
        if force and not emptied:
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / _FORCED).write_text(str(force), encoding="utf-8")
        for half_written in folder.rglob(".*.tmp.*"):  # what a killed process left
            half_written.unlink()
        system = placed.notebook.system_of(placed.parameters)
        profile = placed.parameters["profile"]
        runs.write_json(folder / "params.json", placed.parameters)  # also of a run that fails before it has begun
        runs.mark_running(folder, system, placed.notebook.name, profile, data_source=placed.data_source)
        try:
            _papermill(placed, timeout, shown)
        except (Exception, KeyboardInterrupt) as error:  # whatever ended the notebook ends this run, and no other
            stopped = isinstance(error, KeyboardInterrupt)
            reason = "stopped by the keyboard" if stopped else _reason(error, folder)
            _clear_progress(folder)  # first: on a full disk the status takes its place
            with contextlib.suppress(OSError):  # of a full disk; the notebook's own error says more
                runs.set_status(folder, "interrupted" if stopped else "failed", error=reason)
            if stopped:
                raise
            tail = "".join(f"\n  | {line}" for line in _tail(error))
            raise RuntimeError(f"{reason}{tail}\n  executed notebook: {folder / 'notebook.ipynb'}") from error
        finally:
            _clear_progress(folder)
            _write_page(folder)
        if runs.status(folder)["status"] != "complete":
            reason = "ended without `runs.finish` or `runs.summarize`"
            runs.set_status(folder, "failed", error=reason)
            raise RuntimeError(
                f"{placed.notebook.name} {reason} on {folder}; its last cell must write the metrics, or the summary. "
                "(Or the data or a source were changed just when it began: then give the command again.)"
            )
        _tell_changed(placed, system)
    return True


def _why_unfinished(folder: Path) -> str:
    """Say why a run is to be executed; "" for one that is complete, has its executed notebook and no damage."""
    state = runs.status(folder)["status"]
    if state != "complete":
        return f"it is {state}"
    if any(folder.glob(".notebook.*.tmp.ipynb")):
        return "its command was killed before the executed notebook was whole"
    lost = runs.damaged(folder)
    return f"{', '.join(lost)} is damaged" if lost else ""


def _clear_progress(folder: Path) -> None:
    for left in folder.rglob(runs.PROGRESS):
        left.unlink(missing_ok=True)


def _tell_changed(placed: Placed, system: str) -> None:
    """Warn where the data are no longer those of the run: it is of what it read, and the same command is another run.

    `datasets.refuse_changed`, which notebooks call when all is read, has ended a run that read anything else.
    """
    try:
        source = datasets.locate(system, placed.parameters, data_root=placed.parameters["data_root"])
        now = datasets.fingerprint(system, source)
    except (OSError, ValueError) as error:
        now = error
    if now != placed.fingerprint:
        told = (
            "the data have changed since %s read them: it is of what they were, and the same command is another run now"
        )
        logger.warning(told, placed.folder.name)


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _refuse_moved(placed: Placed) -> None:
    """Raise where the kernel would write another folder than the one that was promised."""
    parameters = placed.parameters
    options = {"models_root": parameters["models_root"]}
    system = placed.notebook.system_of(parameters)
    now = runs.folder(system, placed.notebook.name, parameters, placed.fingerprint, **options)
    if now != placed.folder:
        raise RuntimeError(
            f"the run would go to {now}, no longer to {placed.folder}: a source or the notebook has changed since this "
            "command began, or a worker has other folders; give the command again."
        )


def _papermill(placed: Placed, timeout: int | None, shown: bool) -> None:
    from papermill import execute_notebook

    # A user's own kernel of the same name must not take the place of this environment's.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    sections = _sections(placed.notebook.path)

    def note(cell, cell_index):  # papermill puts a cell with the given parameters behind the default ones
        section = sections[min(cell_index, len(sections) - 1)]
        state = {"cell": cell_index + 1, "cells": len(sections) + 1, "section": section}
        runs.write_json(placed.folder / runs.PROGRESS, state)

    with _kept(placed.folder / "notebook.ipynb") as output, _kernel_config() as config:
        execute_notebook(
            placed.notebook.path,
            output,
            parameters=dict(placed.parameters),
            kernel_name="python3",
            progress_bar=shown and sys.stderr.isatty(),
            stdout_file=sys.stdout if shown else None,
            stderr_file=sys.stderr if shown else None,
            execution_timeout=timeout,
            config=config,
            on_cell_start=note,
            extra_arguments=["--log-level=50"],  # a kernel takes the interrupt that goes before its end for an error
        )


def _sections(path: Path) -> list[str]:
    """Of each cell of a notebook the heading that it stands under."""
    sections, last = [], ""
    for cell in runs.read_json(path)["cells"]:
        if cell["cell_type"] == "markdown":
            last = next((line.strip("# \n") for line in cell["source"] if line.startswith("##")), last)
        sections.append(last)
    return sections


def _write_page(folder: Path) -> None:
    """Write the executed notebook as a page; one that cannot be written spoils no run."""
    if (folder / "notebook.ipynb").exists():
        try:
            notebook_page.write(folder / "notebook.ipynb", folder / "notebook.html")
        except Exception as error:  # whatever nbconvert meets: the notebook itself is there
            logger.warning("no page of %s: %s: %s", folder / "notebook.ipynb", type(error).__name__, error)


@contextlib.contextmanager
def _kernel_config():
    """Configure a kernel that talks through sockets in a folder of its own: closed to others, and no race for ports."""
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="kerasmed-", ignore_cleanup_errors=True) as folder:
        sockets = {} if sys.platform == "win32" else {"transport": "ipc", "ip": os.path.join(folder, "kernel")}
        yield Config({"KernelManager": sockets})


@contextlib.contextmanager
def _kept(path: Path):
    """Yield a temporary name and rename it to `path` afterwards, failed or not: the executed notebook is kept.

    One that was cut off while it was written is not.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError, ValueError):
            runs.read_json(temporary)
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)


def _trace(error: BaseException) -> list[str]:
    """Lines of a cell's traceback, without colours."""
    parts = getattr(error, "traceback", None) or []
    return [_ANSI.sub("", line) for part in parts for line in str(part).splitlines()]


def _tail(error: BaseException) -> list[str]:
    """Last lines of a cell's traceback that say something, but for its message, which `_reason` gives."""
    message = f"{getattr(error, 'ename', '')}: "
    heads = (message, "----------", f"{getattr(error, 'ename', '')}   ")
    return [line for line in _trace(error) if line.strip() and not line.startswith(heads)][-_TAIL_LINES:]


def _reason(error: BaseException, folder: Path) -> str:
    """Say in a few lines which cell failed and why."""
    if hasattr(error, "exec_count"):
        lines = _trace(error)  # what an error was raised from goes first, and may begin anywhere
        cell = next((number for number, line in enumerate(lines) if line.startswith("Cell In[")), 0)
        arrows = [match for line in lines[cell:] if (match := _ARROW.match(line))]
        at = f"\n  at line {arrows[0][1]}: {arrows[0][2].strip()}" if arrows else ""
        return f"cell {error.cell_index + 1} (In [{error.exec_count}]): {error.ename}: {error.evalue}{at}"
    text = (str(error).strip().splitlines() or ["no message"])[0]
    hint = "; was it short of memory?" if type(error).__name__ == "DeadKernelError" else ""
    try:
        where = f"cell {runs.read_json(folder / runs.PROGRESS)['cell']}: "
    except FileNotFoundError:  # before the first cell
        where = ""
    return f"{where}{type(error).__name__}: {text}{hint}"


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
