"""Work spread over this machine's cores, or over a Dask cluster.

A task is a function and its arguments; it writes its result, whole, into a folder that all workers see, and says
little. So tasks may be done anywhere, in any order, and again where a worker was lost. Workers are started by `dask
worker`; they must have loaded the same sources and look for files in the same places: the command checks that before
its first task, and each worker before each.
"""

import contextlib
import itertools
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import joblib

from kerasmed import paths, runs

# Names the scheduler that `shards` uses.
SCHEDULER = "KERASMED_SCHEDULER"
_SECONDS_TO_CONNECT = 10
_SECONDS_TO_REFUSE_AGAIN = 0.5
_ADDRESS = re.compile(r"\w+://[^\s/]+:\d+/?")
# As this process has loaded them: a worker that was started before a change computes what was.
_SOURCES = runs.sources_hash("")[:12]
logger = logging.getLogger(__name__)


class StrangeWorker(ConnectionError):
    """A worker has other sources or folders than the command."""


def scheduler() -> str:
    """Return the address of the Dask scheduler that shards go to, "" for none."""
    return os.environ.get(SCHEDULER, "")


def shards(function: Callable, tasks: Iterable[tuple], *, jobs: int = -1, prefer: str = "threads") -> Iterator:
    """Call a function with the arguments of each task, in parallel, and yield what it returns in any order.

    Tasks go to this machine's cores, by joblib, or, where `$KERASMED_SCHEDULER` names a Dask scheduler, to its workers;
    those of a worker that is lost go to another one. (joblib's own Dask backend does them here, in the process that
    asks, where the cluster has one thread, and takes workers unseen that come later.)

    Args:
        function: importable by its name, where a cluster is used; what its tasks write must be whole or absent.
        tasks: arguments.
        jobs: joblib workers on this machine; -1 for one per core, 1 for none but this process.
        prefer: "threads" or "processes", on this machine.

    Raises:
        ConnectionError: as of `cluster`.
    """
    tasks = list(tasks)
    if not scheduler() or not tasks:
        parallel = joblib.Parallel(n_jobs=jobs, prefer=prefer, return_as="generator_unordered")
        yield from parallel(joblib.delayed(function)(*task) for task in tasks)
        return
    with cluster(scheduler()) as client:
        for _, found in on_cluster(client, function, tasks):
            if isinstance(found, BaseException):
                raise found
            yield found


def on_threads(jobs: int, function: Callable, tasks: Iterable[tuple]) -> Iterator:
    """Call a function with the arguments of each task on threads of this process; yield what it returns, in any order.

    Of one job there is no thread: it is done here, one task after the other.
    """
    calls = (joblib.delayed(function)(*task) for task in tasks)
    # One task at a time: they take minutes.
    options = {"prefer": "threads", "batch_size": 1, "pre_dispatch": "n_jobs", "return_as": "generator_unordered"}
    yield from joblib.Parallel(n_jobs=jobs, **options)(calls)


def build(
    function: Callable, tasks: Mapping[Path, tuple], *, what: str, done: Callable[[Path], bool] = Path.exists, **options
) -> Iterator:
    """Do the tasks whose files are not there yet, as `shards`, and yield what each returns.

    A file that was written and lost again meanwhile is made a second time.

    Args:
        function, options: as of `shards`.
        tasks: file that a task writes -> its arguments.
        what: is written, for the error.
        done: tells of a file whether it need not be made again.

    Raises:
        FileNotFoundError: a file is still not there: workers write where this process does not see it.
    """
    for is_there in (done, Path.exists):
        yield from shards(function, [task for path, task in tasks.items() if not is_there(path)], **options)
    missing = [path for path in tasks if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(tasks)} {what} were written and are not there; workers of a cluster must share "
            f"the disk of $KERASMED_CACHE. First: {missing[0]}."
        )


def on_cluster(client, function: Callable, tasks: Iterable[tuple]) -> Iterator[tuple[tuple, object]]:
    """Call a function with the arguments of each task on a cluster's workers; yield each task with what it returned.

    One that raised, or whose workers were lost more often than Dask puts up with, comes with the exception instead:
    no task spoils another. What a worker refuses, because it came later and is unlike this command, goes to others.

    Args:
        client: of `cluster`.
        function: importable by its name.
        tasks: arguments.
    """
    from dask.distributed import as_completed

    here, numbers = surroundings(), itertools.count()
    futures, told = {}, set()

    def submit(task, **options):
        options["priority"] = -next(numbers)  # in order, as here
        future = client.submit(_there, here, function, task, pure=False, **options)
        futures[future] = task
        return future

    waiting = as_completed([submit(task) for task in tasks], loop=client.loop)
    for future in waiting:
        task = futures.pop(future)
        try:
            found = future.result()
        except StrangeWorker as error:
            alike = [worker for worker, there in _surroundings_of(client).items() if there == here]
            if alike:
                if str(error) not in told:
                    logger.warning("%s Its tasks go to others.", error)
                told.add(str(error))
                time.sleep(_SECONDS_TO_REFUSE_AGAIN)  # Dask may let an idle worker steal it once more
                waiting.add(submit(task, workers=alike, allow_other_workers=True))
                continue
            found = error
        except Exception as error:  # whatever it was, it is the caller's to tell
            found = error
        future.release()  # what a lost worker had delivered is not done again
        yield task, found


def _surroundings_of(client) -> dict:
    return client.run(surroundings, on_error="return")


@contextlib.contextmanager
def cluster(address: str) -> Iterator:
    """Connect to a Dask scheduler (extra `cluster`); yield its client.

    Raises:
        ImportError: Dask is not installed; says how to mend it.
        ConnectionError: nothing answers there, no worker comes, or a worker has other sources or folders.
    """
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise ImportError("a cluster needs Dask: pip install 'kerasmed[cluster]', on every machine.") from error
    if not _ADDRESS.fullmatch(address):
        raise ConnectionError(f"{address!r} is no address of a Dask scheduler; write it as it says, tcp://HOST:8786.")
    try:
        _refuse_silent(address)
        client = Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at {address!r}; start one with `dask scheduler` and name it as it says, such "
            f"as tcp://HOST:8786."
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_SECONDS_TO_CONNECT)
        except TimeoutError as error:
            raise ConnectionError(f"{address} has no worker; start some with `dask worker {address}`.") from error
        for worker, there in _surroundings_of(client).items():
            _refuse_strange(surroundings(), there, worker)
        yield client


def _refuse_silent(address: str) -> None:
    """Raise OSError where something else listens, for whose greeting Dask would wait for ever: its servers begin."""
    kind, place = address.rstrip("/").split("://")
    if kind == "tcp":
        host, port = place.rsplit(":", 1)
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT) as link:
            if not link.recv(1):
                raise ConnectionError("it closed the connection")


def surroundings() -> dict[str, str]:
    """Say what a worker must have in common with the command: sources, and where files are."""
    roots = {"data": paths.data_root(), "models": paths.models_root(), "cache": paths.cache_root()}
    # What parameters name by relative paths is looked for from the working directory.
    roots |= {"project": paths.project_root(), "folder": os.getcwd()}
    return {"sources": _SOURCES, **{name: str(root) for name, root in roots.items()}}


def _refuse_strange(here: dict, there, worker: str) -> None:
    if isinstance(there, BaseException):
        raise StrangeWorker(
            f"worker {worker} cannot use kerasmed ({type(there).__name__}: {there}); install the same version there."
        )
    other = [f"{name} {there[name]}, here {here[name]}" for name in here if there[name] != here[name]]
    if other:
        raise StrangeWorker(
            f"worker {worker} is unlike this command: {'; '.join(other)}. Start workers in the same folder, with the "
            "same $KERASMED_DATA, $KERASMED_MODELS and $KERASMED_CACHE, on a disk that all share, and anew where "
            "sources have changed."
        )


def _there(here: dict, function: Callable, task: tuple):
    """Do a task on a worker."""
    from dask.distributed import get_worker

    _refuse_strange(here, surroundings(), get_worker().address)
    # A task that waited for the cluster whose slot it holds could wait for ever.
    os.environ.pop(SCHEDULER, None)
    return function(*task)
