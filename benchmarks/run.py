"""Run benchmarks on two cores, print their rows, and write benchmarks/results.md.

    python benchmarks/run.py                    # all
    python benchmarks/run.py gradcam memory     # some; the other rows of results.md stay as they are

Each script runs in a process of its own. One that fails is named at the end, with exit code 1, and keeps no rows; a
missed target is no failure: the table says so, with the reason.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import measure
import psutil

from kerasmed import environment

HERE = Path(__file__).parent
NAMES = (
    "input_pipeline",
    "first_pass",
    "second_start",
    "slice_embedding",
    "training_step",
    "gradcam",
    "mura_index",
    "near_duplicates",
    "imputation",
    "dicom_series",
    "start_up",
    "memory",
)
CORES = 2
_HEAD = """# Benchmarks

Each claim is a ratio to what a user would pick instead, measured by turns in one run, on {cores} cores; `make bench`
measures all anew. Figures are medians over at least five rounds; beside the result stands its range over rounds. Before
anything is timed, each script makes sure that both sides compute the same: the last column and its first lines say how.

{machine}.
"""


def run_script(name: str, folder: Path = HERE) -> dict:
    """Run a benchmark; return its rows and seconds, or its error.

    Args:
        name: of the script, without ".py".
        folder: that holds it.

    Returns:
        dict: seconds; commit and rows (of `measure.Row`), or error: the last lines that it wrote.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as kept:
        rows = Path(kept) / "rows"
        surroundings = {**os.environ, measure.ROWS_FILE: str(rows), "TF_CPP_MIN_LOG_LEVEL": "3"}
        process = subprocess.run(
            [sys.executable, folder / f"{name}.py"],
            env=surroundings,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        found = [json.loads(text) for text in rows.read_text().splitlines()] if rows.exists() else []
    seconds = round(time.perf_counter() - began)
    if process.returncode or not found:
        error = process.stderr.strip().splitlines()[-8:] or [f"exit code {process.returncode}, and no rows"]
        return {"seconds": seconds, "error": "\n".join(error)}
    return {"seconds": seconds, "commit": environment.describe()["commit"], "rows": found}


def table(results: Mapping[str, dict], names: Sequence[str] = NAMES) -> str:
    """Write results as Markdown: a table of all rows, and what falls short.

    Args:
        results: name of a script -> of `run_script`, without errors.
        names: scripts in order; those without results are listed as not measured.

    Returns:
        str.
    """
    lines = [
        "| claim | ours | peer | result | rounds | target | met | script, its checks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    short = []
    for name in names:
        if name not in results:
            lines.append(f"| not measured | | | | | | | `{name}.py` |")
            continue
        for row in (measure.Row(**values) for values in results[name]["rows"]):
            peer = "–" if row.peer is None else f"{measure.number(row.peer)} {row.unit}"
            result = f"{measure.number(row.result)} {row.result_unit or '×'}"
            rounds = f"{measure.number(row.lowest)} to {measure.number(row.highest)}"
            target = f"{row.relation} {row.target:g}"
            ours, met = f"{measure.number(row.ours)} {row.unit}", "yes" if row.is_met else "**no**"
            cells = [row.name, ours, peer, result, rounds, target, met, f"`{name}.py`: {row.checked}"]
            lines.append(f"| {' | '.join(cells)} |")
            if not row.is_met:
                short.append(f"- **{row.name}**: {result}, target {target}. {row.limit or 'No reason is known.'}")
    seconds = [f"{name} {results[name]['seconds']} s ({results[name]['commit']})" for name in names if name in results]
    falls = "\n".join(short) or "Nothing: every target that was measured is met."
    return "\n".join(lines) + f"\n\n## What falls short\n\n{falls}\n\n## Seconds and commits\n\n{', '.join(seconds)}.\n"


def machine() -> str:
    """Return what the figures were measured on, in words."""
    found = environment.describe()
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("tensorflow", "keras", "numpy"))
    memory = psutil.virtual_memory().total / 2**30
    return f"{processor()}, {memory:.0f} GiB, Python {found['python']}, {versions}"


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.machine()


def main(names: Sequence[str]) -> int:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; expected of {', '.join(NAMES)}.", file=sys.stderr)
        return 2
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    kept = HERE / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    errors = {}
    for name in names or NAMES:
        found = run_script(name)
        results.pop(name, None)
        if "error" in found:
            errors[name] = found["error"]
        else:
            results[name] = found
        kept.write_text(json.dumps(results, indent=1) + "\n")
        head = _HEAD.format(cores=CORES, machine=machine())
        (HERE / "results.md").write_text(f"{head}\n{table(results)}")
    for name, error in errors.items():
        print(f"{name} failed:\n{error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
