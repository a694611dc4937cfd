"""All runs in one table: as a frame, as text, as a page.

A broken run is a row like any other: `flags` says what is wrong with it, and nothing that a run folder holds stops the
reading of the others.
"""

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from kerasmed import paths
from kerasmed.runs import damaged, file_hash, kind_of, read_mapping, status

# The columns of `collect`.
COLLECTED = (
    *("run", "status", "data_source", "task", "variant", "validation", "metric", "label", "value", "ci_low", "ci_high"),
    *("baseline", "baseline_value", "difference", "difference_low", "difference_high", "error", "folder"),
    *("system", "notebook", "profile", "split", "n", "n_groups", "finished", "flags"),
    # What a comparison of runs needs.
    *("row", "paired_by", "fingerprint", "chosen_metric", "chosen_split", "chosen_images", "parameters"),
)
# Those of them that a terminal has room for.
SHOWN = (
    *("run", "status", "data_source", "task", "variant", "validation", "metric", "label", "value", "ci_low", "ci_high"),
    *("baseline", "baseline_value", "difference", "difference_low", "difference_high", "flags"),
)
_NUMBERS = (
    *("validation", "value", "ci_low", "ci_high"),
    *("baseline_value", "difference", "difference_low", "difference_high"),
)
_COUNTS = ("n", "n_groups", "row")

FAILED, GATE, INTERRUPTED, RUNNING = "failed", "failed at the audit's gate", "interrupted", "running"
NO_STATUS = "status unknown"
SYNTHETIC, ACCEPTED = "synthetic data", "findings let through the gate"
OTHER_WEIGHTS, OLD_METRICS = "weights are not those that were measured", "metrics are older than weights"
UNCHECKED_WEIGHTS = "weights cannot be checked"
MISSING, DAMAGED, NO_DRAWS = "file is missing", "file cannot be read", "no paired draws"
# What `flags` may say, and what it means; a detail may follow after ": ".
FLAGS = {
    OTHER_WEIGHTS: "A model of the run was changed, added or removed after its metrics were written: they say nothing "
    "of the models that lie there now. The run is ranked last. Run it again with --force.",
    OLD_METRICS: "A model was written after the metrics, and an earlier version of the package noted no hash by which "
    "to tell whether it is the one that was measured. The run is ranked last. Run it again with --force.",
    UNCHECKED_WEIGHTS: "A model cannot be read, so whether it is the one that was measured is not known.",
    GATE: "The audit found what would spoil a result, and nothing was trained. Mend the data or the split, or accept "
    "the finding knowingly by the parameter `accepted`.",
    ACCEPTED: "The parameter `accepted` lets these kinds of finding pass the audit; the figures may be too good.",
    SYNTHETIC: "The images were drawn by the package: the figures show that the recipe works, and nothing of patients.",
    FAILED: "The run ended with an error.",
    INTERRUPTED: "The run's process ended without a word; the same command goes on from its last whole stage.",
    RUNNING: "The run is under way: collect again when it is done.",
    NO_STATUS: "status.json cannot be read, or says what this version does not know.",
    MISSING: "The run is complete without a file that it should have.",
    DAMAGED: "A file of the run is damaged, half written, or of a version with another form.",
    NO_DRAWS: "The run holds no bootstrap draws of this figure, as those of earlier versions: it can be compared with "
    "others by their separate intervals only.",
}
_RELIED_ON = ("metrics.json", "summary.json", "draws.npz", "params.json", "environment.json")
_UNTRUSTED = (OTHER_WEIGHTS, OLD_METRICS)
_GATE_ERROR = re.compile(r"\b(GateError|LeakError):")


def collect(models_root=None) -> pd.DataFrame:
    """Read every run under a folder into one table: a row per headline number, or one per run that has none.

    A run with summary.json instead of metrics has no numbers in the table, and neither has one whose files are damaged.

    Args:
        models_root: a folder that holds `<system>/<run>/status.json`, or one system's folder, or one run.

    Returns:
        DataFrame with the columns `COLLECTED`, newest run last; the difference is to the strongest baseline,
        `validation` is the value that a run may be chosen by (NaN where it gives none), in `chosen_metric` of
        `chosen_split`, whose images `chosen_images` tells from others (None where the run does not say), and `flags`
        joins texts of `FLAGS` by "; ". `row` is the position among the run's headline, by which `read_draws` has its
        draws; `paired_by` is None where there are none. `parameters` is a dict.
    """
    top = paths.models_root(models_root)
    found = {path.parent for depth in ("", "*/", "*/*/") for path in top.glob(f"{depth}status.json")}
    states = {run: status(run) for run in found}
    order = sorted(found, key=lambda run: (str(states[run].get("started", "")), run))
    records = [_clean(record) for run in order for record in _records(run, states[run])]
    table = pd.DataFrame(records, columns=COLLECTED)
    return table.astype(dict.fromkeys(_NUMBERS, "float64") | dict.fromkeys(_COUNTS, "Int64"))


def is_trusted(flags: str) -> bool:
    """Say whether a figure belongs to the models that lie beside it, as far as the `flags` of its row tell.

    Example:
        >>> is_trusted("synthetic data"), is_trusted("synthetic data; metrics are older than weights: model.keras")
        (True, False)
    """
    return not any(flag.startswith(_UNTRUSTED) for flag in flags.split("; "))


def read_draws(run: Path) -> dict[int, np.ndarray]:
    """Read draws.npz: a run's headline figures on each bootstrap draw.

    Returns:
        Position among the headline -> float64 array, shape (num_draws,); empty where there is no such file.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    path = run / "draws.npz"
    if not path.exists():
        return {}
    draws = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    # As a file in memory: what its header claims cannot be more than there is.
                    values = np.lib.format.read_array(file, allow_pickle=False)
                if values.ndim != 1 or values.dtype.kind != "f" or not len(values):
                    raise ValueError(f"{name} has type {values.dtype} and shape {values.shape}")
                draws[int(name.removesuffix(".npy"))] = values.astype(np.float64)
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
    ) as error:
        raise ValueError(f"draws.npz ({error or type(error).__name__})") from error
    return draws


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Format a table for reading: three decimals, and nothing where a value is missing."""

    def shown(value):
        return "" if pd.isna(value) else f"{value:.3f}" if isinstance(value, float) else str(value)

    return table.astype(object).map(shown)


# --- reading one run -------------------------------------------------------------------------------------------------


def _records(run: Path, state: Mapping) -> list[dict]:
    """Rows of one run."""
    complete, flags = state["status"] == "complete", []
    parameters = _read(run / "params.json", flags, needed=complete) or {}
    environment = _read(run / "environment.json", flags, needed=complete) or {}
    content, rows = None, []
    if complete and not (run / "summary.json").exists():
        content = _read(run / "metrics.json", flags, needed=True)
        rows = [] if content is None else _measured(run, content, flags)
    lost = _changed(run) if complete else []
    if lost:
        flags.append(_flag(DAMAGED, f"{', '.join(lost)} (not as the run left it; its command makes it anew)"))
    if "metrics.json" in lost:
        rows = []
    sources = (state.get("data_source"), (content or {}).get("data_source"), environment.get("data_source"))
    common = {
        "run": run.name,
        "status": state["status"],
        "data_source": next((source for source in sources if isinstance(source, str)), None),
        "error": _as_text(state.get("error")),
        "folder": str(run),
        "system": str(state.get("system") or run.parent.name),
        "notebook": str(state.get("notebook") or run.name.rsplit("-", 2)[0]),
        "profile": _as_text(state.get("profile")),
        "finished": _as_text(state.get("finished")),
        "fingerprint": _as_text(environment.get("fingerprint")),
        "parameters": parameters,
    }
    flags = [*_status_flags(common), *flags]
    flags += [SYNTHETIC] if common["data_source"] == "synthetic" else []
    accepted = parameters.get("accepted")
    if accepted:
        flags.append(_flag(ACCEPTED, ", ".join(map(str, accepted if isinstance(accepted, list) else [accepted]))))
    if not rows:
        return [{**common, "flags": "; ".join(flags)}]
    try:
        draws = read_draws(run)
    except ValueError as error:
        draws = {}
        flags.append(_flag(DAMAGED, str(error)))
    records = []
    for number, row in enumerate(rows):
        paired_by = row["paired_by"] if number in draws else None
        told = [*flags, NO_DRAWS] if paired_by is None else flags
        records.append({**common, **row, "row": number, "paired_by": paired_by, "flags": "; ".join(told)})
    return records


def _changed(run: Path) -> list[str]:
    """List the files that a table relies on and that are not as the run left them."""
    try:
        return damaged(run, only=_RELIED_ON)
    except OSError:  # which reading them has told
        return []


def _measured(run: Path, content: Mapping, flags: list[str]) -> list[dict]:
    """Lay the headline of metrics.json out flat; where it has another form than it should, add a flag instead."""
    try:
        headline, chosen_by = content.get("headline"), _chosen_by(content)
        if not (isinstance(headline, list) and headline and all(isinstance(row, dict) for row in headline)):
            raise ValueError("`headline` is no list of rows")
        rows = [chosen_by | _figures(row) for row in headline]
        flags += _weights_flags(run, content)
    except ValueError as error:
        flags.append(_flag(DAMAGED, f"metrics.json ({error})"))
        return []
    return rows


def _clean(value):
    """Replace what is no text, as in the names of some files, by "?": no table and no page can hold it."""
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _flag(kind: str, detail: str) -> str:
    """One flag with its detail, in which nothing looks like the end of a flag."""
    return f"{kind}: {' '.join(detail.replace(';', ',').split())}"


def _as_text(value) -> str | None:
    return None if value is None else str(value)


def _read(path: Path, flags: list[str], *, needed: bool) -> dict | None:
    """Read a JSON file that holds a mapping; where it does not, add a flag and return None."""
    try:
        return read_mapping(path)
    except FileNotFoundError:
        if needed:
            flags.append(_flag(MISSING, path.name))
    except ValueError as error:
        flags.append(_flag(DAMAGED, f"{path.name} ({error})"))
    except OSError as error:
        flags.append(_flag(DAMAGED, f"{path.name} ({error.strerror})"))
    return None


def _status_flags(common: Mapping) -> list[str]:
    """Say what became of a run that is not complete."""
    state = common["status"]
    if state == "complete":
        return []
    if state == "failed":
        return [GATE if _GATE_ERROR.search(common["error"] or "") else FAILED]
    return [state if state in (INTERRUPTED, RUNNING) else _flag(NO_STATUS, common["error"] or state)]


def _weights_flags(run: Path, content: Mapping) -> list[str]:
    """Compare the models that lie in a run with those that its metrics were measured with; name the first other one."""
    measured = content.get("weights")
    if not isinstance(measured, dict | None):
        raise ValueError(f"`weights` is {kind_of(measured)}, no mapping")
    there = {path.relative_to(run).as_posix(): path for path in run.rglob("*.keras") if not path.name.startswith(".")}
    kind = OLD_METRICS if measured is None else OTHER_WEIGHTS
    for name in sorted({*there, *(measured or ())}):
        if name not in there or (measured is not None and name not in measured):
            return [_flag(kind, name)]
        try:
            # Folders hold gigabytes: only what was written later is looked into. A copy is the same model.
            younger = there[name].stat().st_mtime_ns > (run / "metrics.json").stat().st_mtime_ns
            if younger and (measured is None or file_hash(there[name]) != measured[name]):
                return [_flag(kind, name)]
        except OSError as error:
            return [_flag(UNCHECKED_WEIGHTS, f"{name} ({error.strerror})")]
    return []


def _chosen_by(content: Mapping) -> dict:
    chosen_by = content.get("chosen_by") or {}
    if not isinstance(chosen_by, dict):
        raise ValueError("`chosen_by` is no mapping")
    return {
        "validation": _number(chosen_by, "value"),
        "chosen_metric": _text(chosen_by, "metric"),
        "chosen_split": _text(chosen_by, "split"),
        "chosen_images": _text(chosen_by, "images"),
    }


def _figures(row: Mapping) -> dict:
    """Lay a headline row out flat, and check each part of it."""
    baseline = row.get("baseline") or {}
    if not isinstance(baseline, dict):
        raise ValueError("`baseline` is no mapping")
    ends, difference = _ends(row, "ci95"), _ends(baseline, "difference_ci95")
    return {
        **{name: _text(row, name) for name in ("task", "variant", "split", "metric", "label", "paired_by")},
        "value": _number(row, "value"),
        **{name: _count(row, name) for name in ("n", "n_groups")},
        **dict(zip(("ci_low", "ci_high"), ends)),
        "baseline": _text(baseline, "variant"),
        "baseline_value": _number(baseline, "value"),
        "difference": _number(baseline, "difference"),
        **dict(zip(("difference_low", "difference_high"), difference)),
    }


def _text(part: Mapping, name: str) -> str | None:
    value = part.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"`{name}` is {value!r}, no text")
    return value


def _number(part: Mapping, name: str) -> float | None:
    value = part.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float | None) or abs(value or 0) > 1e300:
        raise ValueError(f"`{name}` is {str(value)[:20]}, no number")
    return None if value is None or math.isnan(value) else float(value)


def _count(part: Mapping, name: str) -> int | None:
    value = part.get(name)
    if isinstance(value, bool) or not isinstance(value, int | None) or not 0 <= (value or 0) < 2**63:
        raise ValueError(f"`{name}` is {str(value)[:20]}, no count")
    return value


def _ends(part: Mapping, name: str) -> list:
    ends = part.get(name) or [None, None]
    if not isinstance(ends, list) or len(ends) != 2:
        raise ValueError(f"`{name}` is {ends!r}, no interval")
    return [_number({name: end}, name) for end in ends]
