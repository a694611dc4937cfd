import collections
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import psutil
import pydicom
import pytest

from kerasmed import dicom, embeddings, fanout, runs, series

WHEEL = Path(pydicom.__path__[0]) / "data/test_files"  # test files that come with the library

# What workers in other processes import by name: a task that leaves a mark, waits for a sign, and writes its file.
CHORES = """
import os, pathlib, time
from kerasmed import runs

def write(number, file):
    pathlib.Path("marks").mkdir(exist_ok=True)
    pathlib.Path(f"marks/{number} began {os.getpid()}").touch()
    while number and not pathlib.Path("marks/go").exists():
        time.sleep(0.02)
    runs.write_json(file, number)
    return number
"""


def _where(number):
    return number, os.getpid(), threading.get_ident()


def _touch(file, seen=None):
    if seen is not None:
        seen.append(file.name)
    file.touch()
    return file.name


def _mark(folder, number):
    (folder / f"{number} {time.monotonic()}").touch()
    time.sleep(0.05 if number < 6 else 0.5)


def _is_main_thread():
    return threading.current_thread() is threading.main_thread()


def _wait(until, seconds=60):
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.02)


# --- this machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"jobs": 1}, {"jobs": 2}, {"jobs": 2, "prefer": "processes"}])
def test_shards_yields_what_each_task_gives_in_any_order(options):
    assert sorted(fanout.shards(pow, [(2, 3), (3, 2), (5, 0), (2, 3)], **options)) == [1, 8, 8, 9]


@pytest.mark.parametrize("spread", [functools.partial(fanout.shards, jobs=2), functools.partial(fanout.on_threads, 2)])
def test_shards_and_on_threads_yield_what_is_done_before_what_is_still_at_work(spread):
    go = threading.Event()
    found = spread(lambda number: number if number else go.wait(10), [(0,), (7,)])
    assert next(found) == 7
    go.set()
    assert list(found) == [True]


@pytest.mark.parametrize("prefer", ["threads", "processes"])
def test_shards_of_one_job_stays_in_this_process_and_thread(prefer):
    found = list(fanout.shards(_where, [(1,), (2,)], jobs=1, prefer=prefer))
    assert found == [(number, os.getpid(), threading.get_ident()) for number in (1, 2)]


def test_shards_of_more_jobs_leaves_this_thread_or_process():
    threads = {(process, thread) for _, process, thread in fanout.shards(_where, [(1,), (2,)], jobs=2)}
    assert {process for process, _ in threads} == {os.getpid()}
    assert (os.getpid(), threading.get_ident()) not in threads
    (process,) = fanout.shards(os.getpid, [()], jobs=2, prefer="processes")
    assert process != os.getpid()


@pytest.mark.parametrize("address", ["", "tcp://127.0.0.1:9"])
@pytest.mark.parametrize("prefer", ["threads", "processes"])
def test_shards_without_tasks_makes_no_worker_and_asks_no_cluster(monkeypatch, prefer, address):
    monkeypatch.setenv(fanout.SCHEDULER, address)
    monkeypatch.setattr(fanout, "cluster", lambda _: pytest.fail("asked a cluster"))

    def workers():
        """Threads, and processes but those that Python keeps to tidy up after others."""
        children = [each for each in psutil.Process().children() if "tracker" not in " ".join(each.cmdline())]
        return set(threading.enumerate()), set(children)

    before = workers()
    assert list(fanout.shards(_where, [], prefer=prefer)) == []
    assert all(now <= then for now, then in zip(workers(), before))


def test_shards_task_that_raises_ends_in_its_own_error():
    with pytest.raises(ZeroDivisionError):
        list(fanout.shards(divmod, [(4, 2), (1, 0)], jobs=2))


@pytest.mark.parametrize("jobs", [1, 2])
def test_on_threads_begins_no_more_at_once_than_jobs(jobs):
    begun, most, lock = [], [], threading.Lock()

    def work(number):
        with lock:
            begun.append(number)
            most.append(len(begun))
        time.sleep(0.01)
        with lock:
            begun.remove(number)
        return number, threading.get_ident()

    found = list(fanout.on_threads(jobs, work, ((number,) for number in range(7))))
    assert sorted(number for number, _ in found) == list(range(7)) and max(most) == jobs
    assert (threading.get_ident() in {thread for _, thread in found}) == (jobs == 1)


def test_on_threads_takes_a_task_only_when_a_job_is_free():
    taken, go = [], threading.Semaphore(0)

    def tasks():
        for number in range(6):
            taken.append(number)
            yield (number,)

    def work(number):
        assert go.acquire(timeout=30)
        return number

    found = fanout.on_threads(2, work, tasks())
    assert taken == []  # a generator: nothing yet
    go.release()
    first = next(found)
    time.sleep(0.05)
    assert len(taken) <= 2 + 2  # as many as there are jobs, and as many again when one is free
    go.release(5)
    assert sorted([first, *found]) == list(range(6)) == taken


def test_on_threads_of_one_job_works_only_when_asked():
    seen = []
    found = fanout.on_threads(1, seen.append, ((number,) for number in range(3)))
    next(found)
    assert seen == [0]
    assert list(found) == [None, None] and seen == [0, 1, 2]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    return [tmp_path / f"{letter}.npy" for letter in "abc"]


def test_build_does_only_what_is_missing(files):
    files[1].touch()
    before = files[1].stat().st_mtime_ns
    tasks = {file: (file,) for file in files}
    assert sorted(fanout.build(_touch, tasks, what="shards", jobs=2)) == ["a.npy", "c.npy"]
    assert files[1].stat().st_mtime_ns == before
    assert list(fanout.build(_touch, tasks, what="shards")) == []


def test_build_makes_again_what_is_lost_meanwhile(files):
    seen = []

    def work(file):
        if file is files[2] and "c.npy" not in seen:
            files[0].unlink()
        return _touch(file, seen)

    assert list(fanout.build(work, {file: (file,) for file in files}, what="shards", jobs=1)) == seen
    assert seen == ["a.npy", "b.npy", "c.npy", "a.npy"] and all(file.exists() for file in files)


def test_build_of_files_that_never_appear_names_the_first_and_the_cache(files):
    seen = []

    def work(file):
        seen.append(file.name)
        if file is files[0]:
            file.touch()

    message = rf"2 of 3 series were written and are not there; .*\$KERASMED_CACHE\. First: {files[1]}\."
    with pytest.raises(FileNotFoundError, match=message):
        list(fanout.build(work, {file: (file,) for file in files}, what="series", jobs=1))
    assert seen == ["a.npy", "b.npy", "c.npy", "b.npy", "c.npy"]  # each is tried twice


def test_build_done_speaks_on_the_first_pass_and_existence_on_the_second(files):
    files[0].touch()
    files[1].touch()
    asked, seen = [], []

    def done(file):
        asked.append(file.name)
        return file is not files[1]  # as if the second were worth another try, and the third were there

    tasks = {file: (file, seen) for file in files}
    assert list(fanout.build(_touch, tasks, what="shards", done=done, jobs=1)) == ["b.npy", "c.npy"] == seen
    assert asked == ["a.npy", "b.npy", "c.npy"]


# --- a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def near():
    """A Dask scheduler and a worker of two threads in this process."""
    distributed = pytest.importorskip("distributed")
    options = {
        "processes": False,
        "n_workers": 1,
        "threads_per_worker": 2,
        "dashboard_address": ":0",
        "protocol": "tcp",
    }
    with distributed.LocalCluster(**options) as made:
        yield made


@pytest.fixture
def address(near, monkeypatch):
    monkeypatch.setattr(fanout, "_SECONDS_TO_CONNECT", 5)
    monkeypatch.setenv(fanout.SCHEDULER, near.scheduler_address)
    return near.scheduler_address


@pytest.fixture
def strange_elsewhere(monkeypatch):
    """Function that makes all threads but the main one, those of the worker, see other sources."""
    honest = fanout.surroundings

    def surroundings():
        return honest() | ({} if _is_main_thread() else {"sources": "f" * 12})

    return lambda: monkeypatch.setattr(fanout, "surroundings", surroundings)


def test_scheduler_is_what_the_variable_says(monkeypatch):
    monkeypatch.delenv(fanout.SCHEDULER, raising=False)
    assert fanout.scheduler() == ""
    monkeypatch.setenv("KERASMED_SCHEDULER", "tcp://here:8786")
    assert fanout.scheduler() == "tcp://here:8786"


def test_shards_on_a_cluster_gives_what_it_gives_here(address):
    assert sorted(fanout.shards(pow, [(number, 2) for number in range(20)])) == [number**2 for number in range(20)]


def test_shards_on_a_cluster_work_there_whatever_the_jobs(address):
    found = list(fanout.shards(_where, [(1,), (2,)], jobs=1))
    assert threading.get_ident() not in [thread for *_, thread in found]  # jobs are of this machine


def test_shards_on_a_cluster_task_that_raises_ends_in_its_own_error(address):
    with pytest.raises(ZeroDivisionError):
        list(fanout.shards(divmod, [(4, 2), (1, 0)]))


def test_build_on_a_cluster_does_only_what_is_missing(address, files):
    files[0].touch()
    found = fanout.build(_touch, {file: (file,) for file in files}, what="shards", prefer="processes")
    assert sorted(found) == ["b.npy", "c.npy"] and all(file.exists() for file in files)


def test_on_cluster_gives_errors_beside_their_tasks_and_all_else(address):
    with fanout.cluster(address) as client:
        found = dict(fanout.on_cluster(client, divmod, [(7, 2), (1, 0), (9, "x"), (8, 3)]))
    assert found[7, 2] == (3, 1) and found[8, 3] == (2, 2) and len(found) == 4
    assert isinstance(found[1, 0], ZeroDivisionError) and isinstance(found[9, "x"], TypeError)


def test_on_cluster_begins_tasks_in_order_and_does_equal_ones_each(address, tmp_path):
    def work(number):
        with open(tmp_path / "log", "a") as log:
            log.write(f"{number}\n")
        time.sleep(0.02)

    numbers = [number * 7 % 24 for number in range(24)]
    tasks = [(number,) for number in [*numbers, 5, 5]]
    with fanout.cluster(address) as client:
        found = [task for task, _ in fanout.on_cluster(client, work, tasks)]
        assert list(fanout.on_cluster(client, work, [])) == []
    assert sorted(found) == sorted(tasks)
    begun = [int(number) for number in (tmp_path / "log").read_text().split()]
    assert sorted(begun) == sorted([*numbers, 5, 5])
    # One of the two workers may be held up with what it has in hand, so that this begins later than its turn.
    early = [abs(begun.index(number) - place) for place, number in enumerate(numbers)]
    assert np.median(early) <= 2


def test_tasks_on_a_cluster_see_no_scheduler(address):
    with fanout.cluster(address) as client:
        assert list(fanout.on_cluster(client, fanout.scheduler, [()])) == [((), "")]


def test_shards_on_a_cluster_see_no_scheduler(address):
    assert list(fanout.shards(fanout.scheduler, [()])) == [""]


def test_on_cluster_refuses_a_strange_worker_that_came_later(near, address, strange_elsewhere):
    with fanout.cluster(address) as client:
        strange_elsewhere()
        ((_, found),) = fanout.on_cluster(client, pow, [(2, 3)])
    assert isinstance(found, ConnectionError)
    (name,) = near.scheduler_info["workers"]
    assert f"worker {name} is unlike this command: sources ffffffffffff, here " in str(found)


def test_shards_refuse_a_strange_worker(address, strange_elsewhere):
    strange_elsewhere()
    with pytest.raises(ConnectionError, match="sources ffffffffffff, here "):
        list(fanout.shards(pow, [(2, 3)]))


def test_cluster_with_a_worker_of_other_sources_is_refused(near, address, strange_elsewhere):
    strange_elsewhere()
    here = fanout.surroundings()["sources"]
    (name,) = near.scheduler_info["workers"]
    message = f"worker {name} is unlike this command: sources ffffffffffff, here {here}. Start workers in the same"
    with pytest.raises(ConnectionError) as refused, fanout.cluster(address):
        pytest.fail("it is used")
    assert str(refused.value).startswith(message)


def test_cluster_with_a_worker_that_cannot_say_is_refused(address, monkeypatch):
    honest = fanout.surroundings

    def surroundings():
        if _is_main_thread():
            return honest()
        raise ModuleNotFoundError("No module named 'keras'")

    monkeypatch.setattr(fanout, "surroundings", surroundings)
    message = r"worker \S+ cannot use kerasmed \(ModuleNotFoundError: No module named 'keras'\); install the same"
    with pytest.raises(ConnectionError, match=message), fanout.cluster(address):
        pytest.fail("it is used")


@pytest.mark.parametrize(
    ("name", "variable"), [("data", "KERASMED_DATA"), ("models", "KERASMED_MODELS"), ("cache", "KERASMED_CACHE")]
)
def test_surroundings_tell_where_files_are(monkeypatch, tmp_path, name, variable):
    there = fanout.surroundings()
    monkeypatch.setenv(variable, str(tmp_path / "other"))
    here = fanout.surroundings()
    assert {each for each in here if here[each] != there[each]} == {name}
    with pytest.raises(ConnectionError, match=rf"worker tcp://a:1 is unlike .*: {name} \S+, here {tmp_path}/other\. "):
        fanout._refuse_strange(here, there, "tcp://a:1")
    fanout._refuse_strange(here, dict(here), "tcp://a:1")


def test_surroundings_tell_project_folder_and_the_sources_that_are_loaded(monkeypatch, tmp_path):
    here = fanout.surroundings()
    assert set(here) == {"sources", "project", "folder", "data", "models", "cache"}
    (tmp_path / "notebooks/params").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(runs, "sources_hash", lambda _: "f" * 64)  # changed since this process began
    there = fanout.surroundings()
    assert (there["project"], there["folder"]) == (str(tmp_path), str(tmp_path / "notebooks"))
    assert there["sources"] == here["sources"] and len(here["sources"]) == 12


@pytest.mark.parametrize("address", ["", "x", "HOST:8786", "tcp://HOST", "tcp://a b:1"])
def test_cluster_of_no_address_says_how_to_write_one(address):
    pytest.importorskip("distributed")
    message = f"'{address}' is no address of a Dask scheduler; write it as it says, tcp://HOST:8786"
    with pytest.raises(ConnectionError, match=message), fanout.cluster(address):
        pytest.fail("nobody is there")


def test_cluster_without_dask_says_how_to_mend_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    monkeypatch.setenv(fanout.SCHEDULER, "tcp://127.0.0.1:9")
    with pytest.raises(ImportError, match=r"pip install 'kerasmed\[cluster\]', on every machine"):
        list(fanout.shards(pow, [(2, 3)]))


def test_cluster_without_a_scheduler_says_how_to_start_one(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(fanout, "_SECONDS_TO_CONNECT", 1)
    with (
        pytest.raises(ConnectionError, match="no Dask scheduler answers at 'tcp://127.0.0.1:9'; start one with"),
        fanout.cluster("tcp://127.0.0.1:9"),
    ):
        pytest.fail("nobody is there")


def test_cluster_without_a_worker_says_how_to_start_one(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(fanout, "_SECONDS_TO_CONNECT", 1)
    with distributed.LocalCluster(processes=False, n_workers=0, dashboard_address=":0", protocol="tcp") as empty:
        message = f"{empty.scheduler_address} has no worker; start some with `dask worker {empty.scheduler_address}`"
        with pytest.raises(ConnectionError, match=message), fanout.cluster(empty.scheduler_address):
            pytest.fail("nobody is there")


def test_shards_on_a_cluster_of_one_thread_are_done_there(monkeypatch):
    from dask.distributed import LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None, "protocol": "tcp"}
    with LocalCluster(processes=False, **options) as made:
        monkeypatch.setenv(fanout.SCHEDULER, made.scheduler_address)
        found = list(fanout.shards(threading.get_ident, [()] * 3))
    assert len(found) == 3 and threading.get_ident() not in found


@pytest.mark.slow
def test_on_cluster_does_not_repeat_what_is_done_when_a_worker_is_lost(tmp_path):
    from dask.distributed import LocalCluster

    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "protocol": "tcp"}
    with LocalCluster(processes=True, **options) as made, fanout.cluster(made.scheduler_address) as client:
        client.wait_for_workers(2)
        victim = next(iter(client.run(os.getpid).values()))
        for seen, _ in enumerate(fanout.on_cluster(client, _mark, [(tmp_path, number) for number in range(8)])):
            if seen == 5:
                os.kill(victim, signal.SIGKILL)
    begun = [path.name.split()[0] for path in tmp_path.iterdir()]
    assert {number: begun.count(str(number)) for number in range(6)} == dict.fromkeys(range(6), 1)
    assert {"6", "7"} <= set(begun)


def test_cluster_of_something_else_that_listens_is_refused(monkeypatch):
    monkeypatch.setattr(fanout, "_SECONDS_TO_CONNECT", 0.5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="no Dask scheduler answers"), fanout.cluster(address):
            pass


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A Dask scheduler and two workers of a thread, started from the shell in a project; address and processes."""
    pytest.importorskip("distributed")
    (tmp_path / "notebooks/params").mkdir(parents=True)
    (tmp_path / "chores.py").write_text(CHORES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    started = []

    def start(*arguments):
        command = [sys.executable, "-m", "dask", *arguments, "--host", "127.0.0.1", "--no-dashboard"]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    file = tmp_path / "scheduler.json"
    try:
        start("scheduler", "--port", "0", "--scheduler-file", str(file))
        _wait(lambda: file.exists() and file.read_text().endswith("}"))
        address = json.loads(file.read_text())["address"]
        options = ("--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path / "spill"))
        workers = [start("worker", address, *options, "--name", name) for name in "ab"]
        with fanout.cluster(address) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, workers
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


@pytest.mark.slow
def test_work_on_a_cluster_equals_work_here_and_outlives_a_worker(far, tmp_path, monkeypatch):
    address, workers = far
    scans = [("1", "MR1"), ("1", "MR2"), ("2", "MR700")]
    manifest = pd.DataFrame(
        [(study, name, "T1", f"dicomdirtests/98892003/{name}") for study, name in scans], columns=[*series.COLUMNS]
    )
    inputs = keras.Input((16, 20, 1), dtype="uint8")
    planes = keras.layers.Rescaling(1 / 255)(inputs)
    squares = keras.layers.Multiply()([planes, planes])
    encoder = keras.Model(
        inputs, keras.layers.GlobalAveragePooling2D()(keras.layers.Concatenate()([planes, squares])), name="moments"
    )
    monkeypatch.setattr(embeddings, "SHARD_SLICES", 4)

    def both(folder):
        volumes = series.convert(
            manifest, WHEEL, image_size=(16, 20), normalisations=("gsl", "hist"), jobs=1, folder=folder, progress=False
        )
        load = functools.partial(series.load, volumes, "gsl")
        depths = volumes.table["slices"].tolist()
        return embeddings.encode_slices(encoder, depths, load, folder / "features", progress=False)

    here = both(tmp_path / "here")
    assert here.shape == (17, 2) and np.ptp(here[:, 0]) > 0
    monkeypatch.setenv(fanout.SCHEDULER, address)
    with monkeypatch.context() as patch:  # this process does none of it
        patch.setattr(dicom, "read_slices", lambda path: pytest.fail("read here"))
        patch.setattr(encoder, "predict", lambda *_, **__: pytest.fail("encoded here"))
        there = both(tmp_path / "there")
    # One thread a worker and batches of the same shards: the same sums, in the same order.
    np.testing.assert_array_equal(there, here)
    assert _contents(tmp_path / "there") == _contents(tmp_path / "here") and len(_contents(tmp_path / "here")) == 14

    chores = __import__("chores")
    files = {tmp_path / f"shards/{number}.json": number for number in range(8)}

    def began():
        return [(int(path.name.split()[0]), int(path.name.split()[-1])) for path in Path("marks").glob("* began *")]

    def kill_one_when_both_are_at_work():
        _wait(lambda: len({process for number, process in began() if number}) == 2)
        workers[0].kill()
        workers[0].wait()
        Path("marks/go").touch()

    killing = threading.Thread(target=kill_one_when_both_are_at_work)
    killing.start()
    found = fanout.build(chores.write, {file: (number, file) for file, number in files.items()}, what="shards")
    assert sorted(found) == list(range(8)) and all(runs.read_json(file) == number for file, number in files.items())
    killing.join()
    times = collections.Counter(number for number, _ in began())
    (lost,) = [number for number, process in began() if process == workers[0].pid and number]
    assert times[lost] == 2 and max(times[number] for number in range(1, 8) if number != lost) == 1
