"""Locks between processes, so that two commands never write one thing at once.

A lock is an empty file beside what it guards, `.<name>.lock`, which stays; the operating system lets go of it when its
holder ends, however that ends. Several machines exclude one another where their shared file system passes locks on
(NFS 4, Lustre with `flock`, SMB).
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import filelock

# One who only asks has the lock for a moment: many tries in a short time, or two who ask would take each other for it.
_SECONDS_TO_ASK, _SECONDS_BETWEEN_TRIES = 0.2, 0.005
logger = logging.getLogger(__name__)


class Busy(RuntimeError):
    """Another process holds the lock."""


def acquire(path: Path, *, wait: float | None = None, every: float = 0.05) -> filelock.BaseFileLock:
    """Take the lock of a file or folder, which need not exist, and keep it until `release()` or the process's end.

    Args:
        path: what is guarded.
        wait: seconds to wait for another holder; None for as long as it takes.
        every: seconds between two tries.

    Raises:
        Busy: it was still held after `wait`.
        OSError: the lock's file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Each call excludes all others, also those of other threads.
    lock = filelock.FileLock(_file(path), thread_local=False)
    try:
        lock.acquire(timeout=-1 if wait is None else wait, poll_interval=every)
    except filelock.Timeout as error:
        raise Busy(f"another process is at work on {path}.") from error
    except PermissionError as error:
        raise PermissionError(
            f"cannot open {_file(path)}: {error.strerror}; where several users share runs or caches, they need a group "
            "of their own and umask 002."
        ) from error
    return lock


@contextlib.contextmanager
def held(path: Path, *, wait: float | None = None) -> Iterator[None]:
    """Hold the lock of a file or folder for the length of a block; see `acquire`."""
    try:
        lock = acquire(path, wait=0 if wait is None else wait)
    except Busy:
        if wait is not None:
            raise
        logger.warning("waiting for another process that is at work on %s", path)
        lock = acquire(path)
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Say whether a process, this one included, holds the lock of a file or folder.

    Where this process may not write, and so cannot try, the answer is yes.
    """
    if not _file(path).exists():
        return False
    try:
        acquire(path, wait=_SECONDS_TO_ASK, every=_SECONDS_BETWEEN_TRIES).release()
    except (Busy, OSError):
        return True
    return False


def _file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
