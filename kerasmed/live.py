"""Progress of many runs, read from their folders: bars on a terminal, plain lines in a log.

What executes a run, here or on another machine, writes progress.json into its folder at each cell, and into a
training's folder at each epoch. Reading them needs nothing but the disk.
"""

import contextlib
import datetime
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from kerasmed import runs

_SECONDS_A_LOOK = 1.0
_SECONDS_A_LINE = 30.0  # of one run, in a log


class Position(NamedTuple):
    """Where an execution stands."""

    cell: int
    cells: int
    text: str


def position(folder: Path, since: float) -> Position | None:
    """Read where the execution into a run folder stands.

    Args:
        folder: of the run.
        since: seconds of the epoch; what was written earlier was left by a killed process.

    Returns:
        Such as (12, 40, "cell 12 of 40 (Train); compact, epoch 3 of 11"); None where nothing is under way.
    """
    state = _read(folder / runs.PROGRESS, since)
    if state is None:
        return None
    text = f"cell {state['cell']} of {state['cells']}"
    text += f" ({state['section']})" if state["section"] else ""
    trainings = [(path, _read(path, since)) for path in folder.glob(f"variants/*/{runs.PROGRESS}")]
    for path, training in trainings:
        if training:
            text += f"; {path.parent.name}, epoch {training['epoch']} of {training['epochs']}"
    return Position(state["cell"], state["cells"], text)


def _read(path: Path, since: float) -> dict | None:
    try:
        return runs.read_json(path) if path.stat().st_mtime >= since else None
    except (OSError, ValueError):  # it is there only while there is something to tell; a shared disk may stumble
        return None


@contextlib.contextmanager
def shown(folders: Mapping[int, Path], labels: Mapping[int, str], *, file=None) -> Iterator[Callable[[int, str], None]]:
    """Show where runs stand while a block works on them.

    Args:
        folders: number of a run -> its folder.
        labels: number of a run -> what it is called.
        file: where to; None for standard output. Bars are for terminals, others get plain lines: a run's position when
            it changes, at most every 30 seconds.

    Yields:
        Function to be called with a run's number and a line of text when it has ended.
    """
    file = file or sys.stdout
    display = _bars(folders, labels, file) if file.isatty() else _lines(labels, file)
    waiting, done, since = dict(folders), threading.Event(), time.time() - 2
    turn = threading.Lock()  # a run that has ended moves no more

    def look():
        while not done.wait(_SECONDS_A_LOOK):
            for number, folder in list(waiting.items()):
                where = position(folder, since)
                with turn:
                    if where and number in waiting:
                        display.move(number, where)

    def ended(number, line):
        with turn:
            waiting.pop(number, None)
            display.end(number, line)

    watch = threading.Thread(target=look, name="live", daemon=True)
    with display.open:
        watch.start()
        try:
            yield ended
        finally:
            done.set()
            watch.join()


class _Display(NamedTuple):
    """Two ways to show the same: `open` it, `move` a run, `end` a run."""

    open: contextlib.AbstractContextManager
    move: Callable[[int, Position], None]
    end: Callable[[int, str], None]


def _lines(labels, file) -> _Display:
    last: dict[int, tuple[str, float]] = {}

    def write(text):
        print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=file, flush=True)

    def move(number, where):
        text, when = last.get(number, ("", 0.0))
        if where.text != text and time.monotonic() - when >= _SECONDS_A_LINE:
            last[number] = where.text, time.monotonic()
            write(f"{labels[number]}: {where.text}")

    return _Display(contextlib.nullcontext(), move, lambda number, line: write(line))


def _bars(folders, labels, file) -> _Display:
    from rich import progress
    from rich.console import Console

    console = Console(file=file)
    columns = (progress.TextColumn("{task.description}", markup=False), progress.BarColumn(20))
    columns += (progress.TextColumn("{task.fields[where]}", markup=False), progress.TimeElapsedColumn())
    bars = progress.Progress(*columns, console=console)
    whole = bars.add_task("runs", total=len(folders), where=f"0 of {len(folders)}")
    of_run: dict[int, progress.TaskID] = {}

    def move(number, where):
        if number not in of_run:
            of_run[number] = bars.add_task(labels[number], total=where.cells, where="")
        bars.update(of_run[number], completed=where.cell - 1, where=where.text)

    def end(number, line):
        if number in of_run:
            bars.remove_task(of_run.pop(number))
        bars.advance(whole)
        bars.update(whole, where=f"{int(bars.tasks[0].completed)} of {len(folders)}")
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

    return _Display(bars, move, end)
