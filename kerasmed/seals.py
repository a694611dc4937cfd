"""Finished stages of a run, told by the hashes of what they left.

A stage that is found finished is not done again, and its tables are read instead: so a table that was damaged since
must not pass for a whole one.
"""

import logging
from pathlib import Path

from kerasmed import runs

SEAL = "sealed.json"
_SEALED = (".csv", ".json", ".keras", ".npz")
logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Say that a stage is done: write the hashes of the tables and models in its folder to sealed.json."""
    told = {name: value for name, value in runs.hashes(folder, _SEALED).items() if name not in (SEAL, runs.PROGRESS)}
    runs.write_json(folder / SEAL, told)


def is_sealed(folder: Path) -> bool:
    """Say whether a stage is done and all that it left is as it was.

    What is damaged is removed, with a warning, so that the stage goes on without it.
    """
    if not (folder / SEAL).exists():
        return False
    try:
        told = runs.read_mapping(folder / SEAL)
    except ValueError:
        told = {}
    # Names of other files than `seal` writes, such as of other folders, are nothing to remove.
    sound = told and all(Path(name).name == name and name.endswith(_SEALED) for name in told)
    lost = runs.changed(folder, told) if sound else [SEAL]
    for name in lost:
        logger.warning("%s of %s is damaged or gone; it is made anew", name, folder)
        (folder / name).unlink(missing_ok=True)
    if lost:
        (folder / SEAL).unlink(missing_ok=True)
    return not lost
