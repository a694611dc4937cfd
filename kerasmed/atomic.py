"""Files and folders that appear whole: written under a temporary name, and renamed when they are done."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT = re.compile(r"errno = (28|122|27)\b|\d+ requested and \d+ written")  # as HDF5 and NumPy tell of it


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` if the block succeeds, delete it if not.

    The suffix is kept, for writers that look at it.

    Raises:
        OSError: the disk is full; says of which file, however the writer told of it.
    """
    path = Path(path)
    with _named_where_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{host_hash()}.{os.getpid()}.tmp{path.suffix}")
    try:
        with _named_where_full(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named_where_full(path: Path) -> Iterator[None]:
    """Turn what writers raise on a full disk, often without a name or a reason, into one error that has both."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE and not _SHORT.search(str(error)):
            raise
        # NumPy says only that it was cut short.
        reason = os.strerror(error.errno) if error.errno in _NO_SPACE else f"{os.strerror(errno.ENOSPC)}, or a limit"
        raise OSError(
            f"cannot write {path}: {reason}; make space there, or choose another folder, and give the command again."
        ) from error


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; rename it to `target` if the block succeeds, delete it if not.

    Where another process has made `target` meanwhile, theirs stays. What killed processes of this machine left is
    removed; on a shared disk, those of others may live.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_over in target.parent.glob(f".{target.name}.{host_hash()}.*.tmp"):
        if not psutil.pid_exists(int(left_over.name.split(".")[-2])):
            shutil.rmtree(left_over, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{host_hash()}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _named_where_full(target):
            temporary.mkdir()
            yield temporary
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def host_hash() -> str:
    """Name of this machine, hashed: enough to ask whether a process of a run still lives here."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:10]
