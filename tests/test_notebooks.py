import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from kerasmed import datasets, locks, notebooks, paths, runs
from kerasmed.datasets import brain
from kerasmed.notebooks import parse_value
from kerasmed.systems.brain.networks import Config

NOTEBOOKS = notebooks.names()


# The body of a notebook that finishes a run; `project` is in conftest.py.
GOOD = "\n" + (Path(__file__).parent / "tiny_body.txt").read_text()


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
            r"'epoch' \(given\) is unknown to 10_tiny \(did you mean epochs\?\); known are profile, epochs, rate",
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
        *((text, text) for text in ("{{1}}", "{[]}", "{[1]: 2}")),  # no set or mapping of such can be
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
    assert other != folder and {run.name for run in folder.parent.glob("[!.]*")} == {folder.name, other.name}


@pytest.mark.parametrize(
    ("body", "timeout", "message"),
    [
        (
            "epochs / 0",
            None,
            r"cell 4 \(In \[3\]\): ZeroDivisionError: division by zero\n  at line 1: epochs / 0\n(  \|.*\n)*"
            r"  \| Cell In\[3\], line 1\n  \| -+> 1 epochs / 0\n  executed notebook: ",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", None, "^cell 4: DeadKernelError.*short of memory"),
        ("import time; time.sleep(60)", 2, "^cell 4: CellTimeoutError"),
        (
            "from kerasmed import atomic\nwith atomic.whole('x.txt'):\n    raise OSError('4 requested and 1 written')",
            None,
            r"^cell 4 \(In \[3\]\): OSError: cannot write x.txt: No space left.*\n  at line [23]: (with|raise) ",
        ),
        ("print('no metrics')", None, "ended without `runs.finish` or `runs.summarize`"),
    ],
    ids=["error", "dead kernel", "timeout", "error from another", "no metrics"],
)
def test_run_failure_is_an_error_and_keeps_the_notebook(project, body, timeout, message):
    notebook, parameters = project(body)
    with pytest.raises(RuntimeError, match=message):
        notebooks.run(notebook, parameters, timeout=timeout)
    (folder,) = (paths.models_root() / "brain").glob("[!.]*")
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


def test_execute_with_a_word_empties_the_folder_once_for_each_word(project):
    notebook, parameters = project(GOOD)
    placed = notebooks.place(notebook, parameters)

    def execute(**options):
        executed = notebooks.execute(placed, **options)
        kept = (placed.folder / "mine").exists()
        (placed.folder / "mine").touch()
        return executed, kept

    assert execute(force="one") == (True, False)
    assert execute(force="one") == (False, True)  # done for this word
    runs.set_status(placed.folder, "failed")
    assert execute(force="one") == (True, True)  # its machine was lost: it goes on
    assert execute(force="two") == (True, False)
    assert execute(force=True) == execute(force=True) == (True, False)
    assert execute() == (False, True)


def test_execute_of_a_run_with_a_damaged_file_does_it_again(project, caplog):
    notebook, parameters = project(GOOD)
    placed = notebooks.place(notebook, parameters)
    assert notebooks.execute(placed) and not notebooks.execute(placed)
    metrics = (placed.folder / "metrics.json").read_text()
    (placed.folder / "metrics.json").write_text(metrics[:-9])
    assert notebooks.execute(placed)
    assert (placed.folder / "metrics.json").read_text() == metrics
    assert f"{placed.folder} is done again from its last whole stage: metrics.json is damaged" in caplog.text
    (placed.folder / ".notebook.1.tmp.ipynb").write_text("{")  # of a command killed after the metrics
    (placed.folder / "notebook.ipynb").unlink()
    assert notebooks.execute(placed) and runs.read_json(placed.folder / "notebook.ipynb")["cells"]
    assert not notebooks.execute(placed) and not list(placed.folder.glob(".*"))


def test_execute_warns_of_data_that_changed_after_they_were_read(project, brain_root, caplog):
    change = "\nimport os\nfrom pathlib import Path\nos.utime(next(Path(data_root).rglob('*.jpg')), (1, 1))"
    notebook, parameters = project(GOOD + change)
    assert notebooks.execute(notebooks.place(notebook, parameters))
    assert "the data have changed since" in caplog.text


def test_execute_after_a_change_of_the_notebook_says_so_before_it_begins(project):
    notebook, parameters = project(GOOD)
    placed = notebooks.place(notebook, parameters)
    project("epochs += 1" + GOOD)
    with pytest.raises(RuntimeError, match="a source or the notebook has changed since this command began"):
        notebooks.execute(placed)
    assert not list(paths.models_root().rglob("status.json"))


def test_run_under_way_elsewhere_is_left_alone(project):
    wait = "import pathlib, time\nwhile not pathlib.Path('go').exists():\n    time.sleep(0.05)\n"
    notebook, parameters = project(wait + GOOD)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(notebooks.run, notebook, parameters)
        while not list(paths.models_root().rglob("status.json")):
            time.sleep(0.05)
        try:
            with pytest.raises(locks.Busy, match=r"written by process \d+ of this machine"):
                notebooks.run(notebook, parameters)
        finally:
            Path("go").touch()
        assert first.result()[1]


def test_run_relative_roots_are_those_of_the_caller(project, monkeypatch):
    notebook, parameters = project(GOOD)
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
    assert source.index("datasets.fingerprint(") < source.index("datasets.refuse_changed(")
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


# --- order and need --------------------------------------------------------------------------------------------------


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
