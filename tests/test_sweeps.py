import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from click.testing import CliRunner

from kerasmed import collection, fanout, notebooks, paths, pipelines, runs, sweeps
from kerasmed.cli import main
from kerasmed.datasets import brain
from kerasmed.parameters import names_of
from kerasmed.systems import tritask

# The body of a notebook that finishes a run; `project` is in conftest.py.
GOOD = "\n" + (Path(__file__).parent / "tiny_body.txt").read_text()
LOOK = GOOD.split("row = ")[0].replace('"brain"', "tasks[0]") + 'runs.summarize(run, {"headline": ["4 images"]})'
SWEPT = GOOD.replace("rows=[row])", 'rows=[row], chosen_by={"metric": "f1", "split": "valid", "value": rate * epochs})')


def test_parse_grid_and_points_combine_every_value():
    grid = dict(sweeps.parse_grid(text) for text in ("rate=0.1,1e-3", "optimizer=adam,sgd", "tasks=['a','b'],['c']"))
    assert grid == {"rate": [0.1, 0.001], "optimizer": ["adam", "sgd"], "tasks": [["a", "b"], ["c"]]}
    found = sweeps.points(grid)
    assert len(found) == 8 and found[1] == {"rate": 0.1, "optimizer": "adam", "tasks": ["c"]}
    assert sweeps.parse_grid("one=true") == ("one", [True])
    for text in ("rate", "rate="):
        with pytest.raises(ValueError, match="write --grid name=value,value"):
            sweeps.parse_grid(text)
    with pytest.raises(ValueError, match="gives rate the value 1.0 twice"):  # they would be one run
        sweeps.points({"rate": [1, 1.0]})
    for values in (3, "abc", []):
        with pytest.raises(ValueError, match="expected a list of values to try"):
            sweeps.points({"rate": values})


def test_with_lists_takes_a_text_for_a_list_of_one(project):
    notebook, _ = project(GOOD)
    grid = {"tasks": ["a", ["b", "c"]], "epochs": [1, 2], "data_source": ["auto"], "rate": 3}
    assert sweeps.with_lists(grid, notebook) == grid | {"tasks": [["a"], ["b", "c"]]}


def _sweep(*arguments):
    return CliRunner().invoke(main, ["sweep", "10_tiny", "--profile", "smoke", *map(str, arguments)])


def test_sweep_runs_every_point_and_ends_in_one_table_by_validation(project, tmp_path):
    project(SWEPT.replace("runs.finish", "assert epochs != 3, 'three is too many'\nruns.finish"))
    (tmp_path / "grid.yaml").write_text("epochs: [1, 2, 3]\n")
    result = _sweep("--grid-file", tmp_path / "grid.yaml", "--grid", "rate=0.1,0.2", "--out", tmp_path / "t.csv")
    assert result.exit_code == 1 and "2 of 6 failed: epochs=3, rate=0.1; epochs=3, rate=0.2\n" in result.output
    last = "[6/6] epochs=3, rate=0.2: failed: cell 4 (In [3]): AssertionError: three is too many\n"
    assert "10_tiny (smoke): 6 runs\n" in result.output and last in result.output
    told = result.output[result.output.index("written to") :]
    assert told.count("\nfailed: epochs=3") == 2 and told.count("executed notebook: ") == 2
    assert len(re.findall(r"  \| -+> \d+ assert epochs != 3, 'three is too many'\n", told)) == 2
    table = pd.read_csv(tmp_path / "t.csv")
    assert list(table) == [
        *("epochs", "rate", "validation", "t all accuracy", "t all accuracy 95 %", "t all accuracy baseline"),
        *("status", "error", "run"),
    ]
    lost, table = table[4:], table[:4]
    assert set(table["status"]) == {"complete"} and table["error"].isna().all()
    assert lost[["epochs", "rate", "status"]].values.tolist() == [[3, 0.1, "failed"], [3, 0.2, "failed"]]
    assert lost["error"].str.fullmatch(r"cell 4 \(In \[3\]\): AssertionError: three is too many").all()
    assert lost[["validation", "t all accuracy", "run"]].isna().all(axis=None)
    (header,) = [line for line in result.output.splitlines() if "validation" in line and "written" not in line]
    assert not {"error", "run"} & set(header.split()) and "baseline" not in header
    assert table[["epochs", "rate"]].values.tolist() == [[2, 0.2], [1, 0.2], [2, 0.1], [1, 0.1]]
    np.testing.assert_allclose(table["validation"], [0.4, 0.2, 0.2, 0.1])
    assert table["t all accuracy"].tolist() == [0.2, 0.1, 0.2, 0.1]  # epochs / 10: the test has no say in the order
    assert table["t all accuracy baseline"].unique().tolist() == ["majority 0.100"]
    assert len(set(table["run"])) == 4 and (paths.models_root() / "brain" / table["run"][0]).is_dir()
    again = _sweep("--grid", "epochs=1,2", "--grid", "rate=0.2", "--out", tmp_path / "u.csv")
    assert again.exit_code == 0 and again.output.count(": finished already\n") == 2
    assert pd.read_csv(tmp_path / "u.csv")["run"].tolist() == table["run"].tolist()[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to sweep over"),
        (["--grid", "epoch=1,2"], "did you mean epochs?"),
        (["--grid", "epochs=1,two"], "is 'two'; expected int"),
        (["--grid", "epochs"], "write --grid name=value,value"),
        (["--grid", "epochs=1,2", "-p", "epochs=3"], "epochs is given both as 3 (by -p or its own option)"),
        (["--grid", "data_root='a','b'", "--data-root", "c"], "data_root is given both as"),
        (["--grid", "epochs=1", "--grid", "epochs=2"], "epochs is given in 2 --grid; write all its values in one"),
        (["--grid", "epochs=1,2", "--out", "."], "is a directory"),
        (["--grid", "models_root=a,b"], "models_root says where runs go, not what they compute"),
    ],
)
def test_sweep_refuses_every_typo_before_the_first_run(project, arguments, message):
    project(SWEPT)
    result = _sweep(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not paths.models_root().exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "holds nothing; expected a YAML mapping of parameters to lists of values"),
        ("- epochs\n- 3\n", "holds ['epochs', 3]; expected a YAML mapping"),
        ("3: [1]\n", "holds {3: [1]}; expected a YAML mapping"),
        ("epochs: [1, 2", "cannot be read as YAML: while parsing a flow sequence"),
        *((f"epochs: !!{tag}\n", "cannot be read as YAML") for tag in ("bool maybe", "int ''", "timestamp x")),
        ("epochs: 3\n", "the grid gives epochs as 3; expected a list of values to try"),
        ("rate: [1e-3]\n", "'rate' (given) of 10_tiny is '1e-3'; expected float"),
        ("epochs: [1, 2]\nsure: [true]\n", "sure is given both as False"),
    ],
)
def test_sweep_grid_file_that_is_no_grid_is_refused(project, tmp_path, content, message):
    project(SWEPT)
    if content is not None:
        (tmp_path / "g.yaml").write_text(content)
    result = _sweep("--grid-file", tmp_path / "g.yaml", "-p", "sure=false")
    # click breaks its own messages, at hyphens too.
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not paths.models_root().exists()


def test_sweep_grid_file_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "g.yaml").write_bytes(b"epochs: [\xff]")
    with pytest.raises(ValueError, match="g.yaml cannot be read as YAML: .*; expected a YAML mapping"):
        sweeps.read_grid(tmp_path / "g.yaml")


def test_sweep_out_that_cannot_be_written_is_found_before_the_first_run(project, tmp_path):
    project(SWEPT)
    (tmp_path / "file").write_text("")
    result = _sweep("--grid", "epochs=1,2", "--out", tmp_path / "file/t.csv")
    assert result.exit_code == 1 and str(tmp_path / "file") in "".join(result.output.splitlines())
    assert "[1/2]" not in result.output and not paths.models_root().exists()


def test_sweep_of_a_notebook_without_metrics_has_a_table_without_numbers(project):
    project(LOOK.replace("tasks[0]", '"brain"'))
    result = _sweep("--grid", "epochs=1,2", "--grid", "rate=0.5")
    assert result.exit_code == 0 and "[2/2] epochs=2: executed\n" in result.output
    (header,) = [line.split() for line in result.output.splitlines() if "status" in line]
    assert header == ["epochs", "validation", "status"]  # rate has one value
    table = pd.read_csv("sweep-10_tiny.csv")
    assert list(table) == ["epochs", "rate", "validation", "status", "error", "run"]
    assert table["epochs"].tolist() == [1, 2] and table["validation"].isna().all()


def _complete(folder, value, ci95, baseline=0.1):
    """A run folder with one headline number, without a notebook."""
    runs.mark_running(folder, "brain", "10_tiny", "smoke", data_source="real")
    runs.write_json(folder / "environment.json", {"data_source": "real"})
    row = {"task": "t", "variant": "net", "metric": "f1", "label": "all", "value": value, "ci95": ci95}
    row["baseline"] = {"variant": "majority", "value": baseline}
    runs.finish(folder, headline=[row], rows=[row], chosen_by={"metric": "f1", "split": "valid", "value": value})
    return folder


def test_sweep_table_null_intervals_failures_and_order(tmp_path):
    folders = {
        1: _complete(tmp_path / "one", 0.25, None),
        2: _complete(tmp_path / "two", 0.75, [None, None], baseline=None),
        3: _complete(tmp_path / "three", 0.5, [0.25, 1]),
    }
    done = {number: collection.collect(folder) for number, folder in folders.items()}
    tried = sweeps.points({"tasks": [["a"]], "epochs": [1, 2, 3, 4, 5]})
    table = sweeps.sweep_table(tried, done, {0: "no data\nat all", 4: ""})
    assert table["epochs"].tolist() == ["3", "4", "2", "1", "5"]
    assert table["t all f1 95 %"].tolist()[:3] == ["", "[0.250, 1.000]", ""]
    assert table["t all f1 baseline"].tolist()[:3] == ["majority", "majority 0.100", "majority 0.100"]
    assert table["error"].tolist() == ["", "", "", "no data", "no message"]
    shown = sweeps.shown_of_sweep(table, ["tasks", "epochs"])
    assert list(shown) == ["epochs", "validation", "t all f1", "t all f1 95 %", "status"]
    done = {number: table.assign(chosen_metric="weighted_log_loss") for number, table in done.items()}
    assert sweeps.sweep_table(tried, done, {0: "no data", 4: ""})["epochs"].tolist() == ["2", "4", "3", "1", "5"]
    nothing = sweeps.sweep_table(tried[:1], {}, {0: "no data"})
    assert list(nothing) == ["tasks", "epochs", "validation", "status", "error", "run"]


def test_labels_name_a_point_by_what_differs():
    assert sweeps.labels(sweeps.points({"epochs": [3], "tasks": [["a"], []]})) == ["tasks=['a']", "tasks=[]"]
    assert sweeps.labels([{"epochs": 3, "rate": 0.1}]) == ["epochs=3, rate=0.1"]


def test_the_shipped_sweep_is_of_parameters_that_the_notebook_knows():
    for path in (paths.notebooks_root() / "sweeps").glob("*.yaml"):
        notebook, grid = notebooks.describe(path.stem), yaml.safe_load(path.read_text())
        found = [notebooks.resolve(notebook, profile="full", given=point) for point in sweeps.points(grid)]
        assert len(found) == 144
        configs = [tritask.Config(**{name: point[name] for name in names_of(tritask.Config)}) for point in found]
        assert {len(tritask.variants(config)) for config in configs} == {1}, "one training a run"


# --- killed and shared sweeps ----------------------------------------------------------------------------------------

# Six points, of which one always fails; a point ends when a file of its own says so, and then leaves a mark.
HELD = """
import os, pathlib, time
marks = pathlib.Path("marks")
marks.mkdir(exist_ok=True)
(marks / f"{epochs} began {os.getpid()}").touch()
while not (marks / f"go {epochs}").exists():
    time.sleep(0.05)
assert epochs != 4, "four is too many"
"""
GRID = ("--grid", "epochs=1,2,3,4,5,6")


def _command(*arguments, **options):
    command = [sys.executable, "-m", "kerasmed", "sweep", "10_tiny", "--profile", "smoke", *GRID, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def _go(*points):
    Path("marks").mkdir(exist_ok=True)
    for point in points:
        Path(f"marks/go {point}").touch()


def _began(point):
    """Process numbers of the kernels that began a point."""
    return [int(path.name.split()[-1]) for path in Path("marks").glob(f"{point} began *")]


def _wait(until, seconds=90):
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.05)


def _statuses():
    """Points and their status, with when they ended."""
    found = {}
    for path in (paths.models_root() / "brain").glob("*/status.json"):
        state = runs.status(path.parent)
        found[runs.read_json(path.with_name("params.json"))["epochs"]] = (state["status"], path.stat().st_mtime_ns)
    return found


def _complete_now():
    return {point: state for point, state in _statuses().items() if state[0] == "complete"}


def _check_second_call(process, before):
    """It does what is left, and nothing else; the planted failure is told, and is not the others'."""
    _go(*range(1, 7))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "1 of 6 failed: epochs=4\n" in output, output
    assert "AssertionError: four is too many" in output
    assert output.count("finished already") == len(before), output
    now = _statuses()
    assert {point: now[point] for point in before} == before  # not written again
    assert {point for point, (status, _) in now.items() if status == "complete"} == {1, 2, 3, 5, 6}
    table = pd.read_csv("sweep-10_tiny.csv")
    assert table["epochs"].tolist() == [6, 5, 3, 2, 1, 4] and table["status"].tolist() == ["complete"] * 5 + ["failed"]


@pytest.mark.slow
def test_sweep_killed_in_the_middle_does_on_the_second_call_what_is_left(project):
    project(HELD + SWEPT)
    _go(1, 2)
    first = _command("--jobs", "2")
    _wait(lambda: set(_complete_now()) == {1, 2} and _began(3) and _began(4))
    first.kill()
    first.wait()
    before = _complete_now()
    assert set(before) == {1, 2} and not _began(5)
    kernels = [*_began(3), *_began(4)]
    _wait(lambda: not any(map(psutil.pid_exists, kernels)))  # they end with their command
    assert {_statuses()[point][0] for point in (3, 4)} == {"interrupted"}
    _check_second_call(_command("--jobs", "2"), before)
    assert {point: len(_began(point)) for point in range(1, 7)} == {1: 1, 2: 1, 3: 2, 4: 2, 5: 1, 6: 1}


@pytest.mark.slow
def test_sweep_two_at_once_share_the_work(project):
    project(HELD + SWEPT)
    both = [_command("--out", f"{name}.csv") for name in "ab"]
    _wait(lambda: _began(1) and _began(2))  # the second leaves what the first is at work on
    _go(*range(1, 7))
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [1, 1], outputs
    assert {point: len(_began(point)) for point in (1, 2, 3, 5, 6)} == dict.fromkeys((1, 2, 3, 5, 6), 1)
    first, second = (pd.read_csv(f"{name}.csv") for name in "ab")
    assert first.drop(columns="error").equals(second.drop(columns="error"))


@pytest.fixture
def cluster(project):
    """A Dask scheduler and two workers, started from the shell: its address, their processes, how to start more."""
    pytest.importorskip("distributed")
    dask = [sys.executable, "-m", "dask"]
    started = []

    def start(*arguments, **environment):
        with open(f"dask {len(started)}.log", "w") as log:
            options = {"stderr": log, "start_new_session": True, "env": os.environ | environment}
            started.append(subprocess.Popen([*dask, *arguments], **options))
        return started[-1]

    def start_worker(name, **environment):
        return start("worker", address, *options, "--name", name, **environment)

    file = Path("scheduler.json").resolve()
    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    _wait(file.exists)
    address = json.loads(file.read_text())["address"]
    options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")
    options += ("--local-directory", str(file.with_name("spill")))
    yield address, [start_worker(name) for name in "ab"], start_worker
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_sweep_on_a_cluster_loses_neither_a_killed_command_nor_a_killed_worker(project, cluster):
    project(HELD + SWEPT)
    address, workers, start_worker = cluster

    def two_begin(gone):
        _wait(lambda: sum(bool(_began(point)) for point in range(1, 7)) == len(gone) + 2)
        return {point for point in range(1, 7) if _began(point)} - gone

    first = _command("--scheduler", address)
    one = two_begin(set())
    _go(*one)
    two = two_begin(one)
    _wait(lambda: set(_complete_now()) == one - {4})
    first.kill()
    first.wait()
    second = _command("--scheduler", address)
    _go(*two)  # the workers go on with what the killed command gave them
    three = two_begin(one | two)
    _wait(lambda: set(_complete_now()) == (one | two) - {4})
    before = _complete_now()
    lost, *_ = three - {4}
    start_worker("c", KERASMED_CACHE="elsewhere")
    _wait(lambda: "Registered to" in Path("dask 3.log").read_text())  # idle, but unlike the command: of no use
    (kernel,) = _began(lost)
    (victim,) = [worker for worker in workers if psutil.Process(kernel).ppid() == worker.pid]
    victim.kill()
    _wait(lambda: not psutil.pid_exists(kernel))
    _check_second_call(second, before)
    assert {point: len(_began(point)) for point in range(1, 7) if point != 4} == {
        point: 2 if point == lost else 1 for point in range(1, 7) if point != 4
    }


@pytest.mark.slow
def test_sweep_stopped_by_the_keyboard_writes_what_is_done_and_says_how_to_go_on(project):
    project(HELD + SWEPT)
    _go(1, 2)
    # A shell's background jobs, as tests may be, are deaf to this signal.
    process = _command("--jobs", "2", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    _wait(lambda: set(_complete_now()) == {1, 2} and _began(3) and _began(4))
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "stopped; the same command does the rest\n" in output, output
    assert pd.read_csv("sweep-10_tiny.csv")["epochs"].tolist() == [2, 1]


@pytest.mark.slow
def test_decoding_on_a_cluster_equals_decoding_here(project, cluster, brain_root, monkeypatch):
    project(GOOD)
    manifest = brain.read(brain_root, "brain_tumor")
    monkeypatch.setattr(pipelines, "SHARD_ROWS", 7)
    here = pipelines.decode(manifest, brain_root, image_size=(32, 32), progress=False)
    expected = np.array(here.images)
    here.folder.rename(here.folder.with_name("elsewhere"))
    monkeypatch.setenv(fanout.SCHEDULER, cluster[0])
    there = pipelines.decode(manifest, brain_root, image_size=(32, 32), progress=False)
    assert there.folder == here.folder and np.array_equal(there.images, expected)


def test_sweep_on_no_scheduler_is_refused_before_the_first_run(project, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(fanout, "_SECONDS_TO_CONNECT", 1)
    project(SWEPT)
    result = _sweep("--grid", "epochs=1,2", "--scheduler", "tcp://127.0.0.1:9", "--out", "t.csv")
    assert result.exit_code == 1 and "no Dask scheduler answers at 'tcp://127.0.0.1:9'" in " ".join(
        result.output.split()
    )
    assert not Path("t.csv").exists()
    result = _sweep("--grid", "epochs=1,2", "--scheduler", "tcp://127.0.0.1:9", "--jobs", 2)
    assert result.exit_code == 2 and "leave one of them out" in result.output


def test_sweep_that_cannot_be_tracked_is_refused_before_the_first_run(project, monkeypatch):
    project(SWEPT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = _sweep("--grid", "epochs=1,2", "--track", "mlflow")
    assert result.exit_code == 1 and "pip install 'kerasmed[track]'" in result.output
    assert not paths.models_root().exists()
