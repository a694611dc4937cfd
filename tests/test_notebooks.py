import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from kerasmed import datasets, notebooks, paths, runs
from kerasmed.cli import main
from kerasmed.datasets import brain
from kerasmed.notebooks import parse_value
from kerasmed.parameters import names_of
from kerasmed.systems import tritask
from kerasmed.systems.brain.networks import Config

NOTEBOOKS = notebooks.names()


@pytest.fixture
def project(tmp_path, monkeypatch, brain_root):
    """A project of one notebook whose body a test writes; data in the real layout beside it."""
    home = tmp_path / "project"
    (home / "notebooks/params/smoke").mkdir(parents=True)
    (home / "notebooks/params/smoke/10_tiny.yaml").write_text("profile: smoke\nepochs: 2\n")
    monkeypatch.chdir(home)

    def write(body):
        parameters = (
            'profile = "full"  # type: str  name\nepochs = 5  # type: int  number\nrate = 0.001  # type: float  step\n'
            'tasks = ["a"]  # type: list  which\nsure = False  # type: bool  or not\n'
            'data_source = "auto"  # type: str  which\n'
            f'data_root = "{brain_root}"  # type: str  where\nmodels_root = ""  # type: str  where\n'
        )
        cells = [
            {"cell_type": "markdown", "metadata": {}, "source": ["# Tiny\n", "text"]},
            {
                "cell_type": "code",
                "metadata": {"tags": ["parameters"]},
                "source": [parameters],
                "outputs": [],
                "execution_count": None,
            },
            {"cell_type": "code", "metadata": {}, "source": [body], "outputs": [], "execution_count": None},
        ]
        metadata = {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "kerasmed": {"system": "brain", "budget_minutes": {"smoke": 1}},
        }
        content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
        (home / "notebooks/10_tiny.ipynb").write_text(json.dumps(content))
        notebook = notebooks.describe("10_tiny")
        return notebook, notebooks.resolve(notebook, profile="smoke", given={})

    return write


GOOD = """
import numpy as np
from kerasmed import datasets, runs
names = ("profile", "epochs", "rate", "tasks", "sure", "data_source")
parameters = {name: globals()[name] for name in names}
source = datasets.locate("brain", parameters, data_root=data_root)
fingerprint = datasets.fingerprint("brain", source)
run = runs.start("brain", "10_tiny", parameters, fingerprint=fingerprint, data_source=source.kind, environment={})
row = {"task": "t", "variant": "net", "split": "test", "metric": "accuracy", "label": "all", "value": epochs / 10,
       "ci95": [0, 1], "n": 1, "n_groups": 1, "baseline": {"variant": "majority", "value": 0.1}}
runs.finish(run, headline=[row], rows=[row])
"""


def test_describe_and_resolve_join_defaults_profile_and_given(project):
    notebook, parameters = project(GOOD)
    assert (notebook.title, notebook.system) == ("Tiny", "brain")
    assert notebook.parameters["rate"] == ("rate", "float", 0.001, "step")
    assert (parameters["profile"], parameters["epochs"], parameters["tasks"]) == ("smoke", 2, ["a"])
    assert notebooks.resolve(notebook, profile="smoke", given={"epochs": 9, "rate": 1})["rate"] == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"epoch": 3},
            r"'epoch' \(-p\) is unknown to 10_tiny \(did you mean epochs\?\); known are profile, epochs, rate",
        ),
        ({"epochs": "five"}, "is 'five'; expected int, such as 5"),
        ({"tasks": "[a]"}, "is '.a.'; expected list, such as .*; write texts in quotes, as in"),
        ({"epochs": True}, "is True; expected int"),
        ({"epochs": 2.5}, "is 2.5; expected int"),
        ({"tasks": "a"}, "expected list"),
        ({"sure": 1}, "expected bool"),
        ({"rate": "1e-3"}, "YAML reads 1e-3 as text"),
    ],
)
def test_resolve_refuses_what_papermill_would_swallow(project, given, message):
    notebook, _ = project(GOOD)
    with pytest.raises(ValueError, match=message):
        notebooks.resolve(notebook, profile="smoke", given=given)


def test_resolve_unknown_profile_and_name_in_a_profile_are_refused(project):
    notebook, _ = project(GOOD)
    with pytest.raises(ValueError, match=r"profile 'smok' is unknown \(did you mean smoke\?\)"):
        notebooks.resolve(notebook, profile="smok", given={})
    (paths.notebooks_root() / "params/mine").mkdir()
    with pytest.raises(ValueError, match="profile 'mine' has no values for 10_tiny; write .*10_tiny.yaml"):
        notebooks.resolve(notebook, profile="mine", given={})
    (paths.notebooks_root() / "params/smoke/10_tiny.yaml").write_text("epoch: 1\n")
    with pytest.raises(ValueError, match=r"'epoch' \(10_tiny.yaml\) is unknown"):
        notebooks.resolve(notebook, profile="smoke", given={})
    with pytest.raises(ValueError, match="known are 10_tiny"):
        notebooks.describe("11_none")


def test_describe_notebook_without_the_packages_metadata_is_refused(project):
    project(GOOD)
    path = paths.notebooks_root() / "10_tiny.ipynb"
    path.write_text(path.read_text().replace('kerasmed": {', 'other": {'))
    with pytest.raises(ValueError, match="in its metadata; add it"):
        notebooks.describe("10_tiny")


LOOK = GOOD.split("row = ")[0].replace('"brain"', "tasks[0]") + 'runs.summarize(run, {"headline": ["4 images"]})'


def _leave_system_to_a_parameter(name="system"):
    path = paths.notebooks_root() / "10_tiny.ipynb"
    text = path.read_text().replace('"system": "brain"', '"system": ""').replace("tasks[0]", name)
    text = text.replace('tasks = [\\"a\\"]  # type: list', f'{name} = \\"brain\\"  # type: str')
    path.write_text(text.replace('\\"tasks\\"', f'\\"{name}\\"'))
    return notebooks.describe("10_tiny")


def test_run_of_a_notebook_without_a_system_goes_where_its_parameter_says(project):
    project(LOOK)
    notebook = _leave_system_to_a_parameter()
    parameters = notebooks.resolve(notebook, profile="smoke", given={})
    assert (notebook.system, notebook.system_of(parameters)) == ("", "brain")
    folder, executed = notebooks.run(notebook, parameters)
    assert executed and folder.parent.name == "brain" and runs.status(folder)["system"] == "brain"
    assert runs.read_json(folder / "summary.json") == {"data_source": "real", "headline": ["4 images"]}
    assert notebooks.run(notebook, parameters) == (folder, False)


def test_resolve_unknown_system_is_refused_with_the_known_ones(project):
    project(LOOK)
    notebook = _leave_system_to_a_parameter()
    with pytest.raises(ValueError, match="system 'heart' is unknown; known are .*brain"):
        notebooks.resolve(notebook, profile="smoke", given={"system": "heart"})


def test_describe_notebook_that_names_no_system_anywhere_is_refused(project):
    project(LOOK)
    with pytest.raises(ValueError, match="names no system in its metadata and has no parameter `system`"):
        _leave_system_to_a_parameter("part")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 0.001),
        ("[64, 64]", [64, 64]),
        ("True", True),
        ("false", False),
        ("null", None),
        ("demo", "demo"),
        ("__import__('os').getcwd()", "__import__('os').getcwd()"),
        ('"; import os', '"; import os'),
        ("['a']", ["a"]),
    ],
)
def test_parse_value_takes_literals_and_runs_nothing(text, value):
    assert parse_value(text) == value


def test_run_leaves_a_complete_folder_and_does_not_repeat_it(project):
    notebook, parameters = project(GOOD)
    folder, executed = notebooks.run(notebook, parameters)
    assert executed and runs.status(folder)["status"] == "complete" and folder.name.startswith("10_tiny-smoke-")
    assert runs.read_json(folder / "metrics.json")["headline"][0]["value"] == 0.2
    executed = runs.read_json(folder / "notebook.ipynb")
    assert executed["cells"][-1]["execution_count"]
    written = (folder / "notebook.ipynb").stat().st_mtime_ns
    assert (
        notebooks.run(notebook, parameters) == (folder, False)
        and (folder / "notebook.ipynb").stat().st_mtime_ns == written
    )
    (folder / "leftover").write_text("")
    assert notebooks.run(notebook, parameters, force=True) == (folder, True) and not (folder / "leftover").exists()
    other, _ = notebooks.run(notebook, parameters | {"epochs": 3})
    (other / ".notebook.99.tmp.ipynb").write_text("half")
    runs.set_status(other, "failed")
    assert notebooks.run(notebook, parameters | {"epochs": 3}) == (other, True)
    assert not [path.name for path in other.iterdir() if path.name.startswith(".")]
    assert other != folder and {run.name for run in folder.parent.iterdir()} == {folder.name, other.name}


@pytest.mark.parametrize(
    ("body", "timeout", "message"),
    [
        (
            "epochs / 0",
            None,
            r"cell 3 \(In \[3\]\): ZeroDivisionError: division by zero\n  at line 1: epochs / 0\n  executed notebook: ",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", None, "DeadKernelError"),
        ("import time; time.sleep(60)", 2, "CellTimeoutError"),
        ("print('no metrics')", None, "ended without `runs.finish` or `runs.summarize`"),
    ],
    ids=["error", "dead kernel", "timeout", "no metrics"],
)
def test_run_failure_is_an_error_and_keeps_the_notebook(project, body, timeout, message):
    notebook, parameters = project(body)
    with pytest.raises(RuntimeError, match=message):
        notebooks.run(notebook, parameters, timeout=timeout)
    (folder,) = (paths.models_root() / "brain").iterdir()
    state = runs.status(folder)
    assert state["status"] == "failed" and state["error"]
    assert runs.read_json(folder / "notebook.ipynb")["cells"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_run_string_parameter_stays_a_string(project):
    notebook, parameters = project(GOOD)
    evil = '"; import pathlib; pathlib.Path("proof").touch() #'
    folder, _ = notebooks.run(notebook, parameters | {"tasks": [evil]})
    assert runs.read_json(folder / "params.json")["tasks"] == [evil]
    assert not (paths.project_root() / "proof").exists()


def test_run_two_at_once_do_not_disturb_each_other(project):
    notebook, parameters = project("import time; time.sleep(2)" + GOOD)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda epochs: notebooks.run(notebook, parameters | {"epochs": epochs}), (3, 4)))
    assert len({folder for folder, _ in found}) == 2
    assert all(runs.status(folder)["status"] == "complete" for folder, _ in found)
    assert not list(paths.project_root().glob("kernel-*"))


def test_run_under_way_elsewhere_is_left_alone(project):
    notebook, parameters = project("import time; time.sleep(8)" + GOOD)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(notebooks.run, notebook, parameters)
        while not list(paths.models_root().rglob("status.json")):
            time.sleep(0.05)
        with pytest.raises(RuntimeError, match=r"written by process \d+ of this machine"):
            notebooks.run(notebook, parameters)
        assert first.result()[1]


def test_run_relative_roots_are_those_of_the_caller(project, monkeypatch):
    notebook, parameters = project(GOOD.replace("environment={}", "environment={}, models_root=models_root"))
    (paths.project_root() / "sub").mkdir()
    monkeypatch.chdir(paths.project_root() / "sub")
    folder, _ = notebooks.run(notebook, parameters | {"models_root": "mine"})
    assert folder.is_relative_to(Path.cwd() / "mine")


# --- the notebooks that are shipped ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_shipped_notebook_keeps_the_conventions(name):
    notebook = notebooks.describe(name)
    content = runs.read_json(notebook.path)
    cells = content["cells"]
    assert cells[0]["cell_type"] == "markdown" and "**Data.**" in "".join(cells[0]["source"])
    assert cells[1]["metadata"]["tags"] == ["parameters"]
    assert notebook.system_of(notebooks.resolve(notebook, profile="smoke", given={})) in datasets.SYSTEMS
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    long = [
        position
        for position, cell in enumerate(cells)
        if cell["cell_type"] == "code"
        and len("".join(cell["source"]).splitlines()) > 20
        and "parameters" not in cell["metadata"].get("tags", [])
    ]
    assert not long
    source = "\n".join("".join(cell["source"]) for cell in code)
    for banned in ("!pip", "\nclass ", "filterwarnings"):
        assert banned not in source
    assert not re.search(r"""["'](/|~|[A-Za-z]:\\)""", source), "an absolute path"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_shipped_profiles_fit_their_notebook_and_say_where_data_come_from(name):
    notebook = notebooks.describe(name)
    assert set(notebooks.profiles()) == {"smoke", "demo", "cpu", "full"}
    for profile in notebooks.profiles():
        assert notebooks.resolve(notebook, profile=profile, given={})["profile"] == profile
        # What wants a GPU has no budget on 2 cores.
        assert profile == "full" or notebook.budget_minutes[profile] > 0
        values = yaml.safe_load((paths.notebooks_root() / f"params/{profile}/{name}.yaml").read_text())
        assert values["data_source"] == ("synthetic" if profile in ("smoke", "demo") else "real")


def test_brain_config_is_the_parameters_cell():
    names = set(notebooks.describe("07_brain_mri").parameters)
    assert names == {field.name for field in fields(Config)} | set(runs.LOCATION_PARAMETERS)
    assert list(brain.TASKS) == notebooks.describe("07_brain_mri").parameters["tasks"].default


# --- sweeps ----------------------------------------------------------------------------------------------------------


SWEPT = GOOD.replace("rows=[row])", 'rows=[row], chosen_by={"metric": "f1", "split": "valid", "value": rate * epochs})')


def test_parse_grid_and_points_combine_every_value():
    grid = dict(notebooks.parse_grid(text) for text in ("rate=0.1,1e-3", "optimizer=adam,sgd", "tasks=['a','b'],['c']"))
    assert grid == {"rate": [0.1, 0.001], "optimizer": ["adam", "sgd"], "tasks": [["a", "b"], ["c"]]}
    found = notebooks.points(grid)
    assert len(found) == 8 and found[1] == {"rate": 0.1, "optimizer": "adam", "tasks": ["c"]}
    assert notebooks.parse_grid("one=true") == ("one", [True])
    for text in ("rate", "rate="):
        with pytest.raises(ValueError, match="write --grid name=value,value"):
            notebooks.parse_grid(text)
    for values in (3, "abc", []):
        with pytest.raises(ValueError, match="expected a list of values to try"):
            notebooks.points({"rate": values})


def _sweep(*arguments):
    return CliRunner().invoke(main, ["sweep", "10_tiny", "--profile", "smoke", *map(str, arguments)])


def test_sweep_runs_every_point_and_ends_in_one_table_by_validation(project, tmp_path):
    project(SWEPT.replace("runs.finish", "assert epochs != 3, 'three is too many'\nruns.finish"))
    (tmp_path / "grid.yaml").write_text("epochs: [1, 2, 3]\n")
    result = _sweep("--grid-file", tmp_path / "grid.yaml", "--grid", "rate=0.1,0.2", "--out", tmp_path / "t.csv")
    assert result.exit_code == 1 and "2 of 6 failed: epochs=3, rate=0.1; epochs=3, rate=0.2\n" in result.output
    assert "[6/6] 10_tiny (smoke, about 1 min on 2 cores): epochs=3, rate=0.2\n" in result.output
    table = pd.read_csv(tmp_path / "t.csv")
    assert list(table) == [
        *("epochs", "rate", "validation", "t all accuracy", "t all accuracy 95 %", "t all accuracy baseline"),
        *("status", "error", "run"),
    ]
    lost, table = table[4:], table[:4]
    assert set(table["status"]) == {"complete"} and table["error"].isna().all()
    assert lost[["epochs", "rate", "status"]].values.tolist() == [[3, 0.1, "failed"], [3, 0.2, "failed"]]
    assert lost["error"].str.fullmatch(r"cell 3 \(In \[3\]\): AssertionError: three is too many").all()
    assert lost[["validation", "t all accuracy", "run"]].isna().all(axis=None)
    (header,) = [line for line in result.output.splitlines() if "validation" in line and "written" not in line]
    assert "error" in header and "baseline" not in header and "run" not in header
    assert table[["epochs", "rate"]].values.tolist() == [[2, 0.2], [1, 0.2], [2, 0.1], [1, 0.1]]
    np.testing.assert_allclose(table["validation"], [0.4, 0.2, 0.2, 0.1])
    assert table["t all accuracy"].tolist() == [0.2, 0.1, 0.2, 0.1]  # epochs / 10: the test has no say in the order
    assert table["t all accuracy baseline"].unique().tolist() == ["majority 0.100"]
    assert len(set(table["run"])) == 4 and (paths.models_root() / "brain" / table["run"][0]).is_dir()
    again = _sweep("--grid", "epochs=1,2", "--grid", "rate=0.2", "--out", tmp_path / "u.csv")
    assert again.exit_code == 0 and again.output.count("finished already") == 2
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
        ("epochs: 3\n", "the grid gives epochs as 3; expected a list of values to try"),
        ("rate: [1e-3]\n", "'rate' (-p) of 10_tiny is '1e-3'; expected float"),
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
        notebooks.read_grid(tmp_path / "g.yaml")


def test_sweep_out_that_cannot_be_written_is_found_before_the_first_run(project, tmp_path):
    project(SWEPT)
    (tmp_path / "file").write_text("")
    result = _sweep("--grid", "epochs=1,2", "--out", tmp_path / "file/t.csv")
    assert result.exit_code == 1 and str(tmp_path / "file") in "".join(result.output.splitlines())
    assert "[1/2]" not in result.output and not paths.models_root().exists()


def test_sweep_of_a_notebook_without_metrics_has_a_table_without_numbers(project):
    project(LOOK.replace("tasks[0]", '"brain"'))
    result = _sweep("--grid", "epochs=1,2", "--grid", "rate=0.5")
    assert result.exit_code == 0 and "): epochs=2\n" in result.output
    (header,) = [line.split() for line in result.output.splitlines() if "status" in line]
    assert header == ["epochs", "validation", "status"]  # rate has one value, and nothing failed
    table = pd.read_csv("sweep-10_tiny.csv")
    assert list(table) == ["epochs", "rate", "validation", "status", "error", "run"]
    assert table["epochs"].tolist() == [1, 2] and table["validation"].isna().all()


def _complete(folder, value, ci95, baseline=0.1):
    """A run folder with one headline number, without a notebook."""
    runs.reserve(folder, "brain", "10_tiny", "smoke", data_source="real")
    runs.write_json(folder / "environment.json", {"data_source": "real"})
    row = {"task": "t", "variant": "net", "metric": "f1", "label": "all", "value": value, "ci95": ci95}
    row["baseline"] = {"variant": "majority", "value": baseline}
    runs.finish(folder, headline=[row], rows=[row], chosen_by={"metric": "f1", "split": "valid", "value": value})
    return folder


def test_sweep_table_null_intervals_failures_and_order(tmp_path):
    done = {
        1: _complete(tmp_path / "one", 0.25, None),
        2: _complete(tmp_path / "two", 0.75, [None, None], baseline=None),
        3: _complete(tmp_path / "three", 0.5, [0.25, 1]),
    }
    tried = notebooks.points({"tasks": [["a"]], "epochs": [1, 2, 3, 4, 5]})
    table = notebooks.sweep_table(tried, done, {0: "no data\nat all", 4: ""})
    assert table["epochs"].tolist() == ["3", "4", "2", "1", "5"]
    assert table["t all f1 95 %"].tolist()[:3] == ["", "[0.250, 1.000]", ""]
    assert table["t all f1 baseline"].tolist()[:3] == ["majority", "majority 0.100", "majority 0.100"]
    assert table["error"].tolist() == ["", "", "", "no data", "no message"]
    shown = notebooks.shown_of_sweep(table, ["tasks", "epochs"])
    assert list(shown) == ["epochs", "validation", "t all f1", "t all f1 95 %", "status", "error"]
    nothing = notebooks.sweep_table(tried[:1], {}, {0: "no data"})
    assert list(nothing) == ["tasks", "epochs", "validation", "status", "error", "run"]


def test_labels_name_a_point_by_what_differs():
    assert notebooks.labels(notebooks.points({"epochs": [3], "tasks": [["a"], []]})) == ["tasks=['a']", "tasks=[]"]
    assert notebooks.labels([{"epochs": 3, "rate": 0.1}]) == ["epochs=3, rate=0.1"]


def test_the_shipped_sweep_is_of_parameters_that_the_notebook_knows():
    for path in (paths.notebooks_root() / "sweeps").glob("*.yaml"):
        notebook, grid = notebooks.describe(path.stem), yaml.safe_load(path.read_text())
        found = [notebooks.resolve(notebook, profile="full", given=point) for point in notebooks.points(grid)]
        assert len(found) == 144
        configs = [tritask.Config(**{name: point[name] for name in names_of(tritask.Config)}) for point in found]
        assert {len(tritask.variants(config)) for config in configs} == {1}, "one training a run"


def test_quickest_first_puts_a_notebook_behind_the_one_whose_run_it_needs():
    def notebook(name, minutes, needs=""):
        return notebooks.Notebook(name, None, "", "brain", {"demo": minutes}, {}, needs)

    listed = [notebook("05", 1, "04"), notebook("09", 3), notebook("04", 5), notebook("07", 6), notebook("03", 2, "02")]
    assert [each.name for each in notebooks.quickest_first(listed, "demo")] == ["03", "09", "04", "05", "07"]


def test_describe_notebook_that_needs_a_run_has_a_parameter_for_it(project):
    project(GOOD)
    path = paths.notebooks_root() / "10_tiny.ipynb"
    path.write_text(path.read_text().replace('"system": "brain"', '"system": "brain", "needs": "07_brain_mri"'))
    with pytest.raises(ValueError, match="needs a run of 07_brain_mri and has no parameter `from_run`"):
        notebooks.describe("10_tiny")


def test_run_that_needs_another_says_which_to_run_first(project):
    body = GOOD.replace('"data_source")', '"data_source", "from_run")')
    project(body)
    path = paths.notebooks_root() / "10_tiny.ipynb"
    text = path.read_text().replace('"system": "brain"', '"system": "brain", "needs": "07_brain_mri"')
    path.write_text(text.replace("sure = False", 'from_run = \\"auto\\"  # type: str  which\\nsure = False'))
    notebook = notebooks.describe("10_tiny")
    parameters = notebooks.resolve(notebook, profile="smoke", given={})
    with pytest.raises(FileNotFoundError, match="no complete run of 07_brain_mri on these data.*kerasmed run 07_brain"):
        notebooks.run(notebook, parameters)
    source = datasets.locate("brain", parameters, data_root=parameters["data_root"])
    made = {"fingerprint": datasets.fingerprint("brain", source), "data_source": "real", "environment": {}}
    earlier = runs.start("brain", "07_brain_mri", {"profile": "smoke"}, **made)
    row = {"task": "t", "metric": "m", "value": 0.5, "baseline": {"value": 0.1}}
    runs.finish(earlier, headline=[row], rows=[])
    folder, executed = notebooks.run(notebook, parameters)
    assert executed and runs.read_json(folder / "params.json")["from_run"] == str(earlier)
    assert notebooks.run(notebook, parameters) == (folder, False)
