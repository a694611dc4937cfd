"""Where data, models, caches and notebooks are.

A root is what the caller gives, else an environment variable, else a folder of the project. The project is the nearest
folder upwards of the working directory, else of the package, that holds `notebooks/params`; a kernel started in
`notebooks/` and a command started in the checkout therefore agree.
"""

import os
from pathlib import Path


def project_root() -> Path:
    """Return the folder that holds `notebooks/params`, else the working directory."""
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "notebooks" / "params").is_dir():
                return folder
    return Path.cwd()


def notebooks_root() -> Path:
    """Return the folder of the numbered notebooks."""
    return project_root() / "notebooks"


def _root(given: str | os.PathLike | None, variable: str, folder: str) -> Path:
    chosen = given or os.environ.get(variable) or project_root() / folder
    return Path(chosen).expanduser().resolve()


def data_root(given: str | os.PathLike | None = None) -> Path:
    """Return the folder of inputs: `given`, else `$KERASMED_DATA`, else the project's `data/`."""
    return _root(given, "KERASMED_DATA", "data")


def is_data_root_chosen(given: str | os.PathLike | None = None) -> bool:
    """Say whether somebody named the data root: data missing there is a mistake, no reason for synthetic data."""
    return bool(given or os.environ.get("KERASMED_DATA"))


def models_root(given: str | os.PathLike | None = None) -> Path:
    """Return the folder of runs: `given`, else `$KERASMED_MODELS`, else the project's `models/`."""
    return _root(given, "KERASMED_MODELS", "models")


def cache_root() -> Path:
    """Return the folder of decoded stores and synthetic sets: `$KERASMED_CACHE`, else the project's `data/.cache`.

    It never lies beside data given by `--data-root`: that folder is only read.
    """
    return _root(None, "KERASMED_CACHE", "data/.cache")
