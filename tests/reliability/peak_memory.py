"""Print the peak of memory that reading each file takes: python -m tests.reliability.peak_memory LIMIT_MB FILE...

Each is read in a process of its own, forked from this one, whose address space may grow by LIMIT_MB at most. A line a
file, as JSON: name; outcome ("read: <shape>", "refused: <reason>", or what else came out); and mb, by which memory grew
at its peak.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pydicom.pixels.decoders  # noqa: F401  imported by the first file that is DICOM, and no memory of its pixels

from kerasmed import dicom, images


def _resident(what: str) -> int:
    """A number of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def _child(path: str, limit_mb: int) -> dict:
    allowed = _resident("VmSize") * 1024 + limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    signal.alarm(60)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    try:
        if dicom.is_dicom(path):
            dicom.study_uid(path)  # which `predict mura` asks of each, whether it is read or not
        outcome = f"read: {images.read(path).shape}"
    except images.ImageError as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    return {"name": Path(path).name, "outcome": outcome, "mb": round((_resident("VmHWM") - before) / 1024, 1)}


def measure(path: str, limit_mb: int) -> dict:
    """Read a file in a fork of this process; see the module."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.write(write_end, json.dumps(_child(path, limit_mb)).encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(told) if told else {"name": Path(path).name, "outcome": f"signal {status & 127}", "mb": 0}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(json.dumps(measure(name, int(sys.argv[1]))), flush=True)
