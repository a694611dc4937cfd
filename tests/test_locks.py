import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import filelock
import pytest

from kerasmed import locks

# Takes the lock of its argument, says so, and keeps it until it is told to end, or killed.
HOLDER = (
    "import pathlib, sys; from kerasmed import locks; "
    "lock = locks.acquire(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def guarded(tmp_path):
    return tmp_path / "run"


@contextlib.contextmanager
def _held_by_another_process(path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], **pipes) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_held_lets_one_thread_in_at_a_time(guarded):
    inside, most = [], []

    def enter(number):
        with locks.held(guarded):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.005)
            inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(8)))
    assert most == [1] * 8


def test_acquire_of_two_things_excludes_neither(tmp_path):
    first, second = (locks.acquire(tmp_path / name, wait=0) for name in ("a", "a.lock"))
    first.release()
    second.release()


def test_lock_of_another_process_is_busy_until_that_is_killed(guarded):
    with _held_by_another_process(guarded) as holder:
        assert locks.is_held(guarded)
        for wait, least in ((0, 0), (0.2, 0.2)):
            began = time.monotonic()
            with pytest.raises(locks.Busy, match=f"another process is at work on {guarded}"):
                locks.acquire(guarded, wait=wait)
            with pytest.raises(locks.Busy), locks.held(guarded, wait=wait):
                pytest.fail("two hold it")
            assert time.monotonic() - began >= 2 * least
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert not locks.is_held(guarded)
        locks.acquire(guarded, wait=0).release()


def test_held_waits_for_another_process_and_says_so(guarded, caplog):
    entered = threading.Event()

    def enter():
        with locks.held(guarded):
            entered.set()

    with _held_by_another_process(guarded) as holder:
        waiting = threading.Thread(target=enter)
        with caplog.at_level(logging.WARNING, "kerasmed.locks"):
            waiting.start()
            assert not entered.wait(0.3)
            holder.communicate("")  # it ends by itself
            waiting.join(30)
    assert entered.is_set()
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for another process that is at work on {guarded}"
    ]


def test_held_that_need_not_wait_says_nothing(guarded, caplog):
    with locks.held(guarded), pytest.raises(locks.Busy), locks.held(guarded, wait=0):
        pytest.fail("two hold it")
    assert not caplog.records


def test_held_block_that_raises_lets_go(guarded, monkeypatch):
    kept, acquire = [], locks.acquire  # what nobody keeps any more would let go by itself

    def keeps(path, **options):
        kept.append(acquire(path, **options))
        return kept[-1]

    monkeypatch.setattr(locks, "acquire", keeps)
    with pytest.raises(ZeroDivisionError), locks.held(guarded):
        assert locks.is_held(guarded)
        _ = 1 / 0
    assert kept and not locks.is_held(guarded)


def test_acquire_makes_the_folder_and_an_empty_file_that_stays(tmp_path):
    guarded = tmp_path / "not/yet/there.npy"
    locks.acquire(guarded, wait=0).release()
    (left,) = guarded.parent.iterdir()
    assert left.name == ".there.npy.lock" and left.read_bytes() == b""
    before = left.stat().st_ino
    with locks.held(guarded):
        pass
    assert left.stat().st_ino == before  # a lock on a file that was deleted meanwhile would exclude nobody


def test_acquire_keeps_other_threads_out_until_released_by_any(guarded):
    lock = locks.acquire(guarded)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(locks.is_held, guarded).result()
        pool.submit(lock.release).result()
    assert not locks.is_held(guarded)


def test_is_held_makes_no_file_and_takes_no_lock(tmp_path, guarded):
    assert not locks.is_held(guarded) and not locks.is_held(tmp_path / "no/folder")
    assert not list(tmp_path.iterdir())
    lock = locks.acquire(guarded)
    assert locks.is_held(guarded) and locks.is_held(guarded)
    lock.release()
    assert not locks.is_held(guarded)
    locks.acquire(guarded, wait=0).release()


def test_is_held_where_this_process_may_not_write_is_yes(guarded, monkeypatch):
    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuses)
    assert not locks.is_held(guarded)  # nobody ever locked it
    guarded.with_name(".run.lock").touch()
    assert locks.is_held(guarded)
    with pytest.raises(PermissionError, match=r"cannot open \S+/\.run\.lock: Permission denied; .* umask 002"):
        locks.acquire(guarded)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere: nothing to be refused")
def test_is_held_in_a_folder_that_is_read_only_is_yes(guarded):
    locks.acquire(guarded).release()
    guarded.with_name(".run.lock").chmod(0o444)
    guarded.parent.chmod(0o555)
    try:
        assert locks.is_held(guarded)
    finally:
        guarded.parent.chmod(0o755)


def test_is_held_of_a_free_lock_asked_by_two_at_once_is_no(tmp_path):
    locks.acquire(tmp_path / "run").release()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(locks.is_held, tmp_path / "run") for _ in range(400)]
    assert not any(each.result() for each in asked)
