import contextlib
import io
import os
import re
import threading
import time

import pytest

from kerasmed import live, runs

LABELS = {0: "tasks=['a']", 1: "tasks=[b]"}


class Terminal(io.StringIO):
    """A file that says of itself that it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look often, write often, and be a terminal of plain bars wherever the tests run."""
    monkeypatch.setattr(live, "_SECONDS_A_LOOK", 0.02)
    monkeypatch.setattr(live, "_SECONDS_A_LINE", 0.0)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def folders(tmp_path):
    made = {number: tmp_path / f"10_tiny-smoke-{number}" for number in LABELS}
    for folder in made.values():
        folder.mkdir()
    return made


def _at_cell(folder, cell, section="Train", cells=40):
    runs.write_json(folder / "progress.json", {"cell": cell, "cells": cells, "section": section})


def _at_epoch(folder, variant, epoch, epochs=11):
    runs.write_json(folder / f"variants/{variant}/progress.json", {"epoch": epoch, "epochs": epochs})


def _wait(until):
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline, "waited 20 s"
        time.sleep(0.005)


# --- position --------------------------------------------------------------------------------------------------------


def test_position_of_a_run_that_nobody_works_on_is_none(tmp_path):
    assert live.position(tmp_path / "none", 0) is None
    _at_epoch(tmp_path, "compact", 3)  # a training alone is no execution
    assert live.position(tmp_path, 0) is None


def test_position_says_cell_section_and_trainings(tmp_path):
    _at_cell(tmp_path, 12)
    assert live.position(tmp_path, 0) == (12, 40, "cell 12 of 40 (Train)")
    _at_cell(tmp_path, 13, section="")
    assert live.position(tmp_path, 0) == (13, 40, "cell 13 of 40")
    _at_epoch(tmp_path, "compact", 3)
    assert live.position(tmp_path, 0).text == "cell 13 of 40; compact, epoch 3 of 11"
    _at_epoch(tmp_path, "wide", 1)
    head, *trainings = live.position(tmp_path, 0).text.split("; ")
    assert head == "cell 13 of 40" and sorted(trainings) == ["compact, epoch 3 of 11", "wide, epoch 1 of 11"]


def test_position_leaves_out_what_a_killed_process_left(tmp_path):
    _at_cell(tmp_path, 12)
    _at_epoch(tmp_path, "compact", 3)
    _at_epoch(tmp_path, "wide", 2)
    os.utime(tmp_path / "variants/wide/progress.json", (1000, 1000))
    assert live.position(tmp_path, 1000).text.count("epoch") == 2
    assert live.position(tmp_path, 1001).text == "cell 12 of 40 (Train); compact, epoch 3 of 11"
    os.utime(tmp_path / "progress.json", (1000, 1000))
    assert live.position(tmp_path, 1001) is None


def test_position_of_files_that_go_while_they_are_read(tmp_path, monkeypatch):
    _at_cell(tmp_path, 12)
    _at_epoch(tmp_path, "compact", 3)
    read = runs.read_json

    def goes(name):
        def read_json(path):
            if path.parent.name == name:
                path.unlink()
            return read(path)

        return read_json

    with monkeypatch.context() as patch:
        patch.setattr(runs, "read_json", goes("compact"))
        assert live.position(tmp_path, 0).text == "cell 12 of 40 (Train)"
    monkeypatch.setattr(runs, "read_json", goes(tmp_path.name))
    assert live.position(tmp_path, 0) is None


# --- lines -----------------------------------------------------------------------------------------------------------


def _texts(file):
    """Lines without their time, which each must have."""
    found = [re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line) for line in file.getvalue().splitlines()]
    assert all(found), file.getvalue()
    return [each[1] for each in found]


def test_shown_in_a_log_is_a_line_a_change_and_one_an_end(folders):
    file = io.StringIO()
    with live.shown(folders, LABELS, file=file) as ended:
        _at_cell(folders[0], 1, section="")
        _wait(lambda: len(_texts(file)) == 1)
        _at_cell(folders[0], 2)
        _at_epoch(folders[0], "compact", 1)
        _wait(lambda: _texts(file)[-1].endswith("cell 2 of 40 (Train); compact, epoch 1 of 11"))
        _at_cell(folders[1], 1)
        _wait(lambda: "tasks=[b]: cell 1 of 40 (Train)" in _texts(file))
        before = _texts(file)
        time.sleep(0.1)
        assert _texts(file) == before  # nothing moved
        ended(1, "[1/2] tasks=[b]: failed: cell 1")
        assert _texts(file) == [*before, "[1/2] tasks=[b]: failed: cell 1"]
    assert before[0] == "tasks=['a']: cell 1 of 40"


def test_shown_in_a_log_writes_nothing_of_a_run_that_has_ended(folders):
    file = io.StringIO()
    with live.shown(folders, LABELS, file=file) as ended:
        ended(0, "the end")
        for cell in range(1, 6):
            _at_cell(folders[0], cell)
            time.sleep(0.03)
        _at_cell(folders[1], 1)
        _wait(lambda: len(_texts(file)) > 1)
    assert _texts(file) == ["the end", "tasks=[b]: cell 1 of 40 (Train)"]


def test_shown_in_a_log_writes_nothing_of_a_run_that_ends_while_it_is_looked_at(folders, monkeypatch):
    looking, go = threading.Event(), threading.Event()

    def slow(folder, since):
        looking.set()
        assert go.wait(20)
        return live.Position(1, 4, f"cell 1 of 4 of {folder.name[-1]}")

    monkeypatch.setattr(live, "position", slow)
    file = io.StringIO()
    with live.shown(folders, LABELS, file=file) as ended:
        assert looking.wait(20)
        ended(0, "the end")
        go.set()
        _wait(lambda: len(_texts(file)) > 1)
    assert _texts(file) == ["the end", "tasks=[b]: cell 1 of 4 of 1"]


def test_shown_in_a_log_writes_a_line_of_a_run_now_and_then(folders, monkeypatch):
    monkeypatch.setattr(live, "_SECONDS_A_LINE", 30.0)
    file = io.StringIO()
    display = live._lines(LABELS, file)
    now = 0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    for now in (1000, 1010, 1029.9, 1030, 1031, 1061, 1100):
        display.move(0, live.Position(1, 9, f"at {now if now < 1061 else 'rest'}"))
        if now == 1010:
            display.move(1, live.Position(1, 9, "at 1010"))  # another run's turn is its own
    assert _texts(file) == [
        "tasks=['a']: at 1000",
        "tasks=[b]: at 1010",
        "tasks=['a']: at 1030",
        "tasks=['a']: at rest",
    ]


def test_shown_of_no_runs_and_of_a_folder_that_never_comes_writes_nothing(tmp_path):
    file = io.StringIO()
    with live.shown({}, {}, file=file):
        pass
    with live.shown({0: tmp_path / "none"}, LABELS, file=file):
        time.sleep(0.05)
    assert file.getvalue() == ""


def test_shown_goes_to_standard_output_and_ends_its_thread(folders, capsys):
    with live.shown(folders, LABELS) as ended:
        assert "live" in [thread.name for thread in threading.enumerate()]
        ended(0, "the end")
    assert capsys.readouterr().out.endswith(" the end\n")
    assert "live" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_shown_block_that_raises_ends_the_thread_and_raises_on(folders, kind):
    with pytest.raises(ZeroDivisionError), live.shown(folders, LABELS, file=kind()) as ended:
        ended(0, "the end")
        _ = 1 / 0
    assert "live" not in [thread.name for thread in threading.enumerate()]


# --- bars ------------------------------------------------------------------------------------------------------------


def _plain(written):
    """What was written, without the codes that move and colour."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)


def test_shown_on_a_terminal_is_bars_with_their_labels_as_they_are(folders):
    file = Terminal()
    with live.shown(folders, LABELS, file=file) as ended:
        _at_cell(folders[0], 12, section="[bold]Train[/bold]")
        _at_epoch(folders[0], "compact", 3)
        _wait(lambda: "epoch 3 of 11" in file.getvalue())
        _at_cell(folders[1], 1)
        _wait(lambda: "tasks=[b]" in _plain(file.getvalue()))
        bars = _plain(file.getvalue())
        ended(0, "[1/2] tasks=['a']: [red]executed[/red] in 1.5 s")
        after = len(file.getvalue())
        _wait(lambda: "1 of 2" in file.getvalue()[after:])
        ended(1, "[2/2] tasks=[b]: executed")
    assert re.search(r"tasks=\['a'\] +\S+ cell 12 of 40 \(\[bold\]Train\[/bold\]\); compact, epoch 3 of 11", bars)
    assert re.search(r"runs +\S+ 0 of 2", bars)
    written = _plain(file.getvalue())
    assert "[1/2] tasks=['a']: [red]executed[/red] in 1.5 s\n" in written
    assert "[2/2] tasks=[b]: executed\n" in written
    assert "tasks=['a'] " not in _plain(file.getvalue()[after:]).replace("\r", "\n")  # its bar goes with it
    assert re.search(r"runs +\S+ 2 of 2", written)


def test_shown_on_a_terminal_does_not_break_a_long_line(folders, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    file, line = Terminal(), "[1/2] " + "word " * 40 + "end"
    with live.shown(folders, LABELS, file=file) as ended:
        ended(0, line)
    assert line + "\n" in _plain(file.getvalue())


def test_shown_on_a_terminal_fills_a_bar_by_whole_cells(folders):
    display = live._bars(folders, LABELS, Terminal())
    bars = display.open
    display.move(0, live.Position(1, 4, "cell 1 of 4"))
    display.move(0, live.Position(3, 4, "cell 3 of 4"))
    runs_, first = bars.tasks
    assert (runs_.completed, runs_.total) == (0, 2)
    assert (first.completed, first.total, first.fields["where"]) == (2, 4, "cell 3 of 4")  # two are done
    display.end(0, "the end")
    display.end(1, "ended before it was ever seen at work")
    assert [task.description for task in bars.tasks] == ["runs"]
    assert bars.tasks[0].finished and bars.tasks[0].fields["where"] == "2 of 2"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals on this system")
def test_shown_on_a_pseudo_terminal_leaves_the_ended_lines_on_its_screen(folders):
    leader, follower = os.openpty()
    written = []

    def drain():
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(leader, 4096):
                written.append(piece)

    drained = threading.Thread(target=drain)
    drained.start()
    with open(follower, "w") as file, live.shown(folders, LABELS, file=file) as ended:
        _at_cell(folders[0], 2)
        _wait(lambda: b"cell 2 of 40" in b"".join(written))
        ended(0, "[1/2] tasks=['a']: executed")
    drained.join(10)
    os.close(leader)
    lines = _plain(b"".join(written).decode()).replace("\r", "\n").splitlines()
    assert "[1/2] tasks=['a']: executed" in lines
    assert lines.index("[1/2] tasks=['a']: executed") < max(row for row, line in enumerate(lines) if "1 of 2" in line)


def test_shown_on_a_terminal_leaves_colons_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    file.isatty = lambda: True
    with live.shown({0: tmp_path}, {0: "a"}, file=file) as ended:
        ended(0, "[1/1] failed: KeyError: 'left:x:right'")
    assert "left:x:right" in file.getvalue()


def test_shown_goes_on_after_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_SECONDS_A_LOOK", 0.02)
    monkeypatch.setattr(live, "_SECONDS_A_LINE", 0)
    read, broken = runs.read_json, [OSError(116, "Stale file handle")]

    def stale(path):
        if broken:
            raise broken.pop()
        return read(path)

    monkeypatch.setattr(runs, "read_json", stale)
    file = io.StringIO()
    with live.shown({0: tmp_path}, {0: "a"}, file=file):
        runs.write_json(tmp_path / "progress.json", {"cell": 1, "cells": 4, "section": ""})
        time.sleep(0.3)
    assert not broken and "cell 1 of 4" in file.getvalue()
