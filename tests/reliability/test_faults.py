"""What befalls whole runs from outside, and what the same command then makes of them.

The notebook is that of 09 without its pictures (`faults_body.txt`): decoding, two trainings of several epochs, choice,
evaluation against baselines, metrics. It says where it is and waits there if told to, so that a fault strikes where it
should. Two runs are at work at once, one a core.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from click.testing import CliRunner

from kerasmed import collection, datasets, notebooks, pipelines, runs
from kerasmed.cli import main

REPOSITORY = Path(__file__).parents[2]
SECONDS = 600  # that a command may take where the machine is busy
STAGES = ("starting", "reading", "decoding", "between", "training", "choosing", "evaluating", "finishing")
PROFILE = {
    "profile": "smoke",
    "data_source": "auto",
    "image_size": [32, 32],
    "networks": ["fcnn2", "fcnn1"],
    "weights": "none",
    "augmentation": ["flip"],
    "epochs": 4,
    "batch_size": 40,  # twelve steps, which are done without a graph
    "bootstraps": 30,
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # minutes where the cores are free


class Lane:
    """Places of one run after the other: models root, cache, marks and data of its own or of all."""

    def __init__(self, home: Path, project: Path, data: Path):
        self.models, self.cache, self.marks = home / "models", home / "cache", home / "marks"
        self.project, self.data = project, data
        self.begun = []
        self.marks.mkdir(parents=True)

    @property
    def environment(self) -> dict:
        own = {"KERASMED_MODELS": str(self.models), "KERASMED_CACHE": str(self.cache), "FAULTS_MARKS": str(self.marks)}
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, **quiet, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{self.project / 'without'}"}

    def start(self, *arguments, **options) -> subprocess.Popen:
        for mark in self.marks.glob("at *"):
            mark.unlink()
        command = [sys.executable, "-m", "kerasmed", "run", "10_faults", "--profile", "smoke"]
        command += ["--data-root", str(self.data), *map(str, arguments)]
        told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.begun.append(
            subprocess.Popen(command, cwd=self.project, env=self.environment, start_new_session=True, **told, **options)
        )
        return self.begun[-1]

    def go(self, *arguments, **options) -> tuple[int, str]:
        """Give the command and wait for its end: exit code and output."""
        process = self.start(*arguments, **options)
        return _end(process)

    @property
    def run(self) -> Path:
        (run,) = self.runs
        return run

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.models.glob("tritask/*/status.json"))

    def hold(self, place):
        (self.marks / f"hold {place}").touch()

    def let_go(self, place):
        (self.marks / f"hold {place}").unlink()

    def is_at(self, place) -> bool:
        return (self.marks / f"at {place}").exists()

    def copy(self, home: Path) -> "Lane":
        """The same places in another folder, with what is in them."""
        other = Lane(home, self.project, self.data)
        for name in ("models", "cache"):
            if getattr(self, name).exists():
                shutil.copytree(getattr(self, name), getattr(other, name))
        return other


def _end(process) -> tuple[int, str]:
    output = process.communicate(timeout=SECONDS)[0]
    return process.returncode, output


def _wait(until, process=None):
    deadline = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < deadline, f"waited {SECONDS} s"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.004)


def _kill(process):
    """Kill a command and its kernel at once, as the end of a machine's session does."""
    parent = psutil.Process(process.pid)
    # Stopped first, so that none starts another meanwhile or learns that the other is gone.
    for signal_ in (signal.SIGSTOP, signal.SIGKILL):
        for each in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal_)
    process.wait(timeout=SECONDS)
    process.stdout.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project of the one notebook."""
    home = tmp_path_factory.mktemp("project")
    (home / "notebooks/params/smoke").mkdir(parents=True)
    content = runs.read_json(REPOSITORY / "notebooks/09_tritask_dedup.ipynb")
    cells = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    body = (Path(__file__).parent / "faults_body.txt").read_text()
    for number, source in enumerate(body.split("# %%\n")):
        cell = {"cell_type": "code", "id": f"faults-{number}", "metadata": {}, "outputs": [], "execution_count": None}
        cells.append({**cell, "source": [source]})
    metadata = content["metadata"] | {"kerasmed": {"system": "tritask", "budget_minutes": {"smoke": 1}}}
    runs.write_json(home / "notebooks/10_faults.ipynb", content | {"cells": cells, "metadata": metadata})
    (home / "notebooks/params/smoke/10_faults.yaml").write_text(json.dumps(PROFILE))  # JSON is YAML
    # albumentations would load it where it is there, which takes seconds
    (home / "without").mkdir()
    (home / "without/torch.py").write_text("raise ImportError")
    return home


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data root with a synthetic set of 200 images."""
    root = tmp_path_factory.mktemp("data")
    datasets.write_synthetic("tritask", root, train_images=120, valid_images=60, test_images=20, seed=0)
    return root


@pytest.fixture(scope="module")
def lane_of(tmp_path_factory, project, data):
    """Function that makes a new lane, with `own_data` over data that it may harm."""
    made = []

    def make(own_data=False):
        home = tmp_path_factory.mktemp("lane")
        if own_data:
            shutil.copytree(data, home / "data")
        made.append(Lane(home, project, home / "data" if own_data else data))
        return made[-1]

    yield make
    for process in [process for lane in made for process in lane.begun]:
        if process.poll() is None:  # of a test that has failed
            _kill(process)


@pytest.fixture(scope="module")
def undisturbed(lane_of):
    """Lane of a run that nothing befell, from empty folders to the end."""
    lane = lane_of()
    code, output = lane.go()
    assert code == 0, output
    return lane


@pytest.fixture(scope="module")
def half(lane_of):
    """Lane of a run that was killed when its first training was done and its second had begun."""
    lane = lane_of()
    process = lane.start()
    _wait(lambda: list(lane.models.glob("tritask/*/variants/fcnn1/checkpoint.npz")), process)
    _kill(process)
    return lane


# --- what must hold --------------------------------------------------------------------------------------------------


def _results(run: Path) -> dict:
    """All that a run found: metrics, predictions, answers of each training, by file.

    Left out is what says when or how long, and hashes of .keras files: these are zip archives, which hold the time.
    """
    found = {"metrics.json": {**runs.read_json(run / "metrics.json"), "weights": None}}
    for path in (*run.glob("*.csv"), *run.glob("variants/*/*.csv")):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        found[path.relative_to(run).as_posix()] = table.drop(columns="seconds", errors="ignore").to_dict("list")
    with np.load(run / "draws.npz") as draws:
        found["draws.npz"] = {name: draws[name].tolist() for name in draws.files}
    return found


def _assert_equal(run: Path, other: Path):
    one, two = _results(run), _results(other)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert runs.status(run)["status"] == "complete" and runs.damaged(run, models=True) == []


def _halves(lane: Lane, undisturbed: Lane) -> list[str]:
    """Name what has a final name and is not whole, in a lane's run folders and cache."""
    return [f"{path}: {error!r}" for path in _files(lane) if (error := _why_not_whole(path, lane, undisturbed))]


def _files(lane: Lane):
    for root in (lane.models, lane.cache):
        for path in root.rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.is_file() and not hidden:
                yield path


def _why_not_whole(path: Path, lane: Lane, undisturbed: Lane):
    try:
        if path.suffix in (".json", ".ipynb"):
            runs.read_json(path)
        elif path.parent.suffix == ".building":
            shapes = [array.shape[:1] for array in pipelines._load_shard(path, *pipelines._ARRAYS)]
            assert len(set(shapes)) == 1
        elif path.suffix == ".npy":
            array = np.load(path)
            assert array.dtype.kind == "V" or array.any()
        elif path.suffix in (".npz", ".keras"):
            with zipfile.ZipFile(path) as archive:
                assert archive.namelist() and archive.testzip() is None
        elif path.suffix == ".csv":
            table, name = (
                pd.read_csv(path),
                path.relative_to(lane.models if path.is_relative_to(lane.models) else lane.cache),
            )
            if path.is_relative_to(lane.models):
                whole = pd.read_csv(undisturbed.run / Path(*name.parts[2:]))
                grows = path.parent.parent.name == "variants" and path.name == "history.csv"
                assert list(table)[: len(whole.columns) - 1] == list(whole)[: len(whole.columns) - 1]
                assert len(table) == len(whole) or (grows and 0 < len(table) < len(whole))
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        else:
            assert path.stat().st_size
    except Exception as error:  # whatever it is, the file is not whole
        return error
    return None


def _both(function, cases) -> list:
    """Do cases two at once."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, cases))


# --- killed ----------------------------------------------------------------------------------------------------------


def _moments(lane: Lane) -> dict:
    """When each stage is reached: a name -> a function that says whether it is."""

    def epoch(network, number):
        path = f"tritask/*/variants/{network}/progress.json"
        return lambda: any(_epoch(found) >= number for found in lane.models.glob(path))

    def there(pattern, root=lane.models):
        return lambda: any(root.glob(pattern))

    return {
        "starting": lambda: True,
        "reading": there("tritask/*/progress.json"),
        "decoding": lambda: lane.is_at("decoding"),
        "first shard": there("*.building/0*", lane.cache),
        "store": there("*/images.npy", lane.cache),
        "splitting": lambda: lane.is_at("splitting"),
        "fcnn2 epoch 1": epoch("fcnn2", 1),
        "fcnn2 epoch 2": epoch("fcnn2", 2),
        "fcnn2 epoch 4": epoch("fcnn2", 4),
        "fcnn2 saved": there("tritask/*/variants/fcnn2/model.keras"),
        "fcnn2 answered": there("tritask/*/variants/fcnn2/predictions.csv"),
        "fcnn1 epoch 1": epoch("fcnn1", 1),
        "fcnn1 epoch 3": epoch("fcnn1", 3),
        "fcnn1 saved": there("tritask/*/variants/fcnn1/model.keras"),
        "choosing": lambda: lane.is_at("choosing"),
        "chosen": there("tritask/*/model.keras"),
        "evaluating": lambda: lane.is_at("evaluating"),
        "finishing": lambda: lane.is_at("finishing"),
        "draws": there("tritask/*/draws.npz"),
        "metrics": there("tritask/*/metrics.json"),
    }


# What the stage is called in the record.
PART_OF = {
    **dict.fromkeys(("starting", "reading"), "at the start"),
    **dict.fromkeys(("decoding", "first shard", "store"), "while decoding"),
    **dict.fromkeys(("splitting", "fcnn2 saved", "fcnn2 answered", "fcnn1 saved", "choosing"), "between stages"),
    **dict.fromkeys(
        ("fcnn2 epoch 1", "fcnn2 epoch 2", "fcnn2 epoch 4", "fcnn1 epoch 1", "fcnn1 epoch 3"), "while training"
    ),
    **dict.fromkeys(("chosen", "evaluating"), "while evaluating"),
    **dict.fromkeys(("finishing", "draws", "metrics"), "while metrics were written"),
}


def _epoch(path: Path) -> int:
    try:
        return runs.read_json(path)["epoch"]
    except FileNotFoundError:  # between two epochs of another process
        return 0


def test_run_killed_at_any_moment_ends_equal_and_leaves_nothing_half_written(lane_of, undisturbed, record):
    lanes = [lane_of() for _ in range(4)]
    rng = random.Random(0)
    moments = list(_moments(lanes[0]))
    # Each lane's kills in the order of the run, as what is done is not done again: every fourth moment.
    plans = [moments[number::4] for number in range(4)]
    delays = {moment: rng.uniform(0, 0.15) for moment in moments} | {"starting": 1.5, "metrics": 0.0}
    seen = []

    def torment(planned):
        lane, plan = planned
        for moment in plan:
            process = lane.start()
            reached = _moments(lane)[moment]
            while not reached() and process.poll() is None:
                time.sleep(0.002)
            time.sleep(delays[moment])
            if process.poll() is None:
                _kill(process)
                seen.append(PART_OF[moment])
            else:  # it was quicker, and must have ended well
                assert process.returncode == 0, process.communicate()[0]
                seen.append("when the run was already complete")
            assert _halves(lane, undisturbed) == []
        code, output = lane.go()
        assert code == 0, output
        _assert_equal(lane.run, undisturbed.run)
        assert not list(lane.run.rglob(".*.tmp*")) and not (lane.run / runs.PROGRESS).exists()
        assert runs.read_json(lane.run / "notebook.ipynb")["cells"]

    _both(torment, zip(lanes, plans))
    assert len(seen) == 20
    record(
        "Faults",
        "command and kernel killed, and run again",
        Counter(f"equal, killed {part}" for part in seen),
        exact=False,
        timed=True,
    )


def test_run_whose_clock_and_process_numbers_lie_goes_on(half, undisturbed, tmp_path, record):
    outcomes = Counter()

    def lie(case):
        number, (what, state) = case
        lane = half.copy(tmp_path / str(number))
        runs.write_json(lane.run / "status.json", runs.read_json(lane.run / "status.json") | state)
        if what == "future":
            for path in (*lane.models.rglob("*"), *lane.cache.rglob("*")):
                os.utime(path, (4e9, 4e9))  # the year 2096
        else:
            assert runs.status(lane.run)["status"] == "interrupted"
        code, output = lane.go()
        assert code == 0 and "fcnn2: " not in output, output  # the first training is not done again
        _assert_equal(lane.run, undisturbed.run)
        outcomes["equal, and went on"] += 1

    later = {"started": "2096-10-02T07:06:40+00:00"}
    _both(lie, enumerate([("reused", {"pid": os.getpid()}), ("future", later | {"pid": 1})]))
    record("Faults", "process number of another process, or times in the future", outcomes)


# --- two at once -----------------------------------------------------------------------------------------------------


def test_second_run_on_the_same_folder_is_refused_and_harms_nothing(lane_of, undisturbed, record, monkeypatch):
    lane = lane_of()
    lane.hold("splitting")
    first = lane.start()
    _wait(lambda: lane.is_at("splitting"), first)
    outcomes = Counter()
    second = subprocess.run(
        [*first.args], cwd=lane.project, env=lane.environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert second.returncode == 1 and "wait for it, or stop it" in second.stderr, second.stderr
    outcomes["second refused, first equal"] += 1
    notebook = lane.project / "notebooks/10_faults.ipynb"
    monkeypatch.chdir(lane.project)
    given = {"data_root": str(lane.data)}
    values = notebooks.resolve(notebooks.describe("10_faults"), profile="smoke", given=given)
    (lane.marks / "values.json").write_text(json.dumps(values))
    plain = subprocess.run(
        [*(sys.executable, "-m", "papermill", str(notebook), str(lane.marks / "out.ipynb"), "--no-progress-bar")]
        + ["-k", "python3", "-f", str(lane.marks / "values.json")],
        cwd=lane.project,
        env=lane.environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert plain.returncode and "wait for it, or stop it" in plain.stderr, plain.stderr[-2000:]
    outcomes["second refused, first equal"] += 1
    assert runs.status(lane.run)["status"] == "running"
    lane.let_go("splitting")
    code, output = _end(first)
    assert code == 0, output
    _assert_equal(lane.run, undisturbed.run)
    record("Faults", "a command and papermill on a run that a command is at work on", outcomes)


# --- a disk that is full, or may not be written to -------------------------------------------------------------------


@pytest.fixture
def small_disk():
    """Function (folder, size) that puts a file system of its own there; and `resize`. Skipped where it is refused."""
    mounted = []

    def mount(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no small file system can be mounted: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _remount(folder, option):
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def _fails(lane, undisturbed, told, **options) -> str:
    """Give the command where it must fail with some words; return what became of it."""
    code, output = lane.go(**options)
    assert code == 1, output
    for part in told:
        assert part in output, output
    (state,) = [runs.status(run)["status"] for run in lane.runs] or ["absent"]
    assert state in ("failed", "absent"), (state, output)
    assert _halves(lane, undisturbed) == []
    return "failed with a reason, then equal" if state == "failed" else "refused with a reason, then equal"


def _ends_equal(lane, undisturbed):
    code, output = lane.go()
    assert code == 0, output
    _assert_equal(lane.run, undisturbed.run)


def test_run_on_a_disk_that_is_full_fails_with_a_reason_and_goes_on(lane_of, undisturbed, small_disk, record):
    """Each disk grows from size to size, and the same run goes on until it is full again."""
    cases = [("models", ("16k", "300k", "2000k", "4000k")), ("cache", ("600k", "1500k"))]
    lanes = [lane_of() for _ in cases]
    for lane, (which, sizes) in zip(lanes, cases):
        small_disk(getattr(lane, which), sizes[0])

    def fill(number):
        lane, (which, sizes) = lanes[number], cases[number]
        folder, seen = getattr(lane, which), []
        for size in sizes:
            _remount(folder, f"size={size}")
            seen.append(_fails(lane, undisturbed, (str(folder), "No space left on device")))
        _remount(folder, "size=64m")
        _ends_equal(lane, undisturbed)
        return seen

    outcomes = Counter(sum(_both(fill, range(len(cases))), []))
    record("Faults", "models root or cache on a disk that fills up, at six sizes", outcomes)


def test_run_that_may_write_no_large_file_fails_with_a_reason_and_goes_on(lane_of, undisturbed, record):
    resource = pytest.importorskip("resource")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    lane = lane_of()
    outcome = _fails(lane, undisturbed, (str(lane.models), "File too large"), preexec_fn=limit)
    _ends_equal(lane, undisturbed)
    record("Faults", "files limited to 1 MB", {outcome: 1})


def test_run_into_a_folder_that_is_read_only_is_refused_and_leaves_nothing(lane_of, small_disk, undisturbed, record):
    lane = lane_of()
    small_disk(lane.models, "16m")
    _remount(lane.models, "ro")
    code, output = lane.go()
    assert code == 1 and str(lane.models) in output and "Read-only file system" in output, output
    assert not list(lane.models.iterdir()) and not list(lane.cache.glob("*/images.npy"))
    _remount(lane.models, "rw")
    shutil.copytree(undisturbed.models, lane.models, dirs_exist_ok=True)
    _remount(lane.models, "ro")
    code, output = lane.go()  # what is finished can be read there
    assert code == 0 and "finished already" in output, output
    table = collection.collect(lane.models)
    assert (
        table["status"].tolist() == ["complete"] * len(table)
        and not table["flags"].str.contains("cannot be read").any()
    )
    outcomes = {"refused with a reason, nothing left": 1, "a finished run found there": 1}
    record("Faults", "models root that is read-only", outcomes)


# --- data that change under way --------------------------------------------------------------------------------------


def _delete(data: Path):
    _file(data, 7).unlink()


def _change(data: Path):
    _flip(_file(data, 8), bit=0xFF)


def _cut(data: Path):
    _halve(_file(data, 9))


def _relabel(data: Path):
    table = data / "tritask/train_labels.csv"
    lines = table.read_text().splitlines()
    lines[3] = lines[3][:-1] + str(1 - int(lines[3][-1]))
    table.write_text("\n".join(lines) + "\n")


def _file(data: Path, number: int) -> Path:
    return data / f"tritask/train_images/{sorted(os.listdir(data / 'tritask/train_images'))[number]}"


def test_data_that_change_under_way_are_never_filed_as_others(lane_of, undisturbed, record):
    cases = [("decoding", [change]) for change in (_delete, _change, _cut, _relabel)]
    cases += [("checking", [_change]), ("fcnn1", [_delete, _change, _cut])]

    def strike(case):
        place, changes = case
        lane = lane_of(own_data=True)
        lane.hold(place)
        process = lane.start()
        _wait(lambda: lane.is_at(place), process)
        for change in changes:
            change(lane.data)
        lane.let_go(place)
        code, output = _end(process)
        if place == "fcnn1":  # all was read
            assert code == 0 and "the data have changed since" in output, output
            _assert_equal(lane.run, undisturbed.run)
            return ["equal, of the data as they were, and says so"] * len(changes)
        assert code == 1 and "have changed since this run began" in output, output
        state = runs.status(lane.run)
        assert state["status"] == "failed" and "have changed" in state["error"]
        assert not (lane.run / "metrics.json").exists()
        if changes == [_relabel]:  # the same command is now a run of its own
            code, output = lane.go()
            assert code == 0, output
            (other,) = [run for run in lane.runs if runs.status(run)["status"] == "complete"]
            now = datasets.fingerprint("tritask", datasets.Source(lane.data, "synthetic"))
            assert runs.read_json(other / "environment.json")["fingerprint"] == now
        return ["failed with a reason, no metrics"]

    outcomes = Counter(sum(_both(strike, cases), []))
    record("Faults", "data deleted, changed, cut or labelled otherwise while a run is under way", outcomes)


# --- damaged files ---------------------------------------------------------------------------------------------------


def _flip(path: Path, share: float = 0.5, bit: int = 0x04):
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= bit
    path.write_bytes(content)


def _halve(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path):
    path.write_bytes(b"")


DAMAGES = (_flip, _halve, _empty, Path.unlink)


def test_complete_run_with_a_damaged_file_is_noticed_by_all_who_read_it(undisturbed, tmp_path, record):
    names = runs.status(undisturbed.run)["files"]
    assert {"metrics.json", "draws.npz", "predictions.csv", "history.csv", "split.csv", "params.json"} <= set(names)
    outcomes = Counter()
    root = tmp_path / "models"
    for name in names:
        for damage in DAMAGES:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(undisturbed.models, root)
            (run,) = (path.parent for path in root.glob("tritask/*/status.json"))
            damage(run / name)
            assert runs.damaged(run) == [name]  # so the command does it again
            with pytest.raises(runs.Damaged, match=f"^{name} of run .* give the command that made the run again"):
                runs.find("tritask", models_root=root)
            flags = collection.collect(root)["flags"]
            if name in collection._RELIED_ON:
                assert flags.str.contains(f"{name}").all() and flags.str.contains("cannot be read|missing").all(), (
                    flags[0]
                )
            outcomes["noticed by runs.damaged, runs.find and, where it relies on it, collection.collect"] += 1
    record("Faults", "a file of a complete run with a bit flipped, cut, empty or gone", outcomes)


def test_complete_run_that_is_damaged_is_mended_by_its_command(undisturbed, tmp_path, record):
    def mend(case):
        number, damages = case
        lane = undisturbed.copy(tmp_path / str(number))
        for name, damage in damages.items():
            damage(lane.run / name)
        code, output = lane.go()
        assert code == 0 and "finished already" not in output, output
        _assert_equal(lane.run, undisturbed.run)
        return "done again, equal"

    several = {"metrics.json": _flip, "predictions.csv": _halve, "draws.npz": _flip, "model.keras": _flip}
    outcomes = Counter(_both(mend, enumerate([{"status.json": _halve}, several])))
    record("Faults", "a complete run with damaged files, and run again", outcomes)


def test_predict_with_a_damaged_model_is_refused_by_name(undisturbed, data, tmp_path, record):
    root = tmp_path / "models"
    shutil.copytree(undisturbed.models, root)
    (model,) = root.glob("tritask/*/model.keras")
    whole, outcomes = model.read_bytes(), Counter()
    notebook = "09_tritask_dedup"
    state = runs.read_json(model.with_name("status.json"))
    runs.write_json(model.with_name("status.json"), state | {"notebook": notebook})
    model.parent.rename(model.parent.with_name(f"{notebook}-smoke-0123456789"))
    (model,) = root.glob("tritask/*/model.keras")
    for damage in (*(lambda path, share=share: _flip(path, share) for share in (0.1, 0.3, 0.5, 0.9)), _halve, _empty):
        model.write_bytes(whole)
        damage(model)
        arguments = ["predict", "tritask", str(data / "tritask/test_images"), "--out", str(tmp_path / "out.csv")]
        result = CliRunner().invoke(main, [*arguments, "--models-root", str(root)])
        assert result.exit_code == 1 and "model.keras of" in result.output and "damaged" in result.output, result.output
        assert not (tmp_path / "out.csv").exists()
        outcomes["refused with a reason"] += 1
    model.write_bytes(whole)
    assert CliRunner().invoke(main, [*arguments, "--models-root", str(root)]).exit_code == 0
    record("Faults", "predict with a damaged model", outcomes)


def test_half_done_run_with_damaged_files_does_them_again_and_ends_equal(half, undisturbed, tmp_path, record):
    cases = [
        {"variants/fcnn2/predictions.csv": _flip, "variants/fcnn1/checkpoint.npz": _flip},
        {"variants/fcnn2/model.keras": _flip, "variants/fcnn1/checkpoint.npz": _halve, "split.csv": _halve},
        {"variants/fcnn2/history.csv": _flip, "status.json": _halve, "params.json": _empty},
        {"variants/fcnn2/model.keras": _halve, "variants/fcnn2/sealed.json": _flip, "environment.json": _empty},
    ]

    def mend(case):
        number, damages = case
        lane = half.copy(tmp_path / str(number))
        for name, damage in damages.items():
            damage(lane.run / name)
        code, output = lane.go()
        assert code == 0, output
        _assert_equal(lane.run, undisturbed.run)
        return "done again, equal"

    outcomes = Counter()
    for outcome, damages in zip(_both(mend, enumerate(cases)), cases):
        outcomes[outcome] += len(damages)
    record("Faults", "damaged files of a run that was killed half way", outcomes)


def _decode(data) -> pipelines.Store:
    from kerasmed.datasets import tritask

    return pipelines.decode(tritask.read(data), data, image_size=(32, 32), progress=False)


def test_decoded_store_that_is_damaged_is_made_again(data, record, monkeypatch, tmp_path):
    monkeypatch.setenv("KERASMED_CACHE", str(tmp_path / "cache"))
    whole = _decode(data)
    expected = {name: np.array(getattr(whole, name)) for name in ("images", "thumbnails")}
    outcomes = Counter()
    for name in ("images.npy", "thumbnails.npy", "facts.npy", "quarantine.csv", "hashes.json"):
        for damage in (*DAMAGES, lambda path: _flip(path, 0.0)):
            if damage is _flip and name in ("images.npy", "thumbnails.npy"):
                continue
            damage(whole.folder / name)
            again = _decode(data)
            for which, array in expected.items():
                np.testing.assert_array_equal(getattr(again, which), array)
            pd.testing.assert_frame_equal(again.facts, whole.facts)
            pd.testing.assert_frame_equal(again.manifest, whole.manifest)
            outcomes["made again, equal"] += 1
    for name in ("images", "thumbnails"):  # what it would cost to read gigabytes at each opening to see
        _flip(whole.folder / f"{name}.npy")
        assert (np.array(getattr(_decode(data), name)) != expected[name]).sum() == 1
        outcomes["not noticed: a bit of a pixel in gigabytes"] += 1
    record("Faults", "a file of a decoded store with a bit flipped, cut, empty or gone", outcomes)


def test_shard_that_is_damaged_is_refused_by_name_and_made_anew(data, record, monkeypatch, tmp_path, rng):
    monkeypatch.setenv("KERASMED_CACHE", str(tmp_path / "cache"))
    expected, join = np.array(_decode(data).images), pipelines._join
    shutil.rmtree(tmp_path / "cache")
    outcomes = Counter()

    def stop(*_):
        raise KeyboardInterrupt

    for number in range(24):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pipelines, "_join", stop)
            _decode(data)
        shard = sorted((tmp_path / "cache").glob("*.building/0*"))[number % 4]
        (lambda path: _flip(path, rng.random()) if number < 16 else [_halve, _empty][number % 2](path))(shard)
        try:
            found = _decode(data)
            outcomes["read right: the bit says nothing"] += 1
        except RuntimeError as error:
            assert str(shard) in str(error) and "give the command again" in str(error)
            found = _decode(data)
            outcomes["refused with a reason, then equal"] += 1
        np.testing.assert_array_equal(found.images, expected)
        shutil.rmtree(found.folder)
    assert pipelines._join is join
    record("Faults", "a shard with a bit flipped, cut or empty", outcomes)
